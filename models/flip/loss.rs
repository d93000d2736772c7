//! The contrastive loss over ranks.

use smalti::{Result, Tensor, comm::Comm};

/// The symmetric loss of this rank's pairs `[n, E]` against the features of all ranks (FLIP §4, CLIP figure 3).
/// `scale` is the inverse temperature.
///
/// Features of other ranks are gathered with gradient: each rank's features are negatives in the losses of all
/// ranks. The mean over ranks is the loss of the whole batch, and gradients of parameters averaged over ranks are
/// its gradients.
///
/// # Errors
/// If shapes do not fit, or a rank is lost.
pub fn contrastive(images: &Tensor, texts: &Tensor, scale: &Tensor, comm: &Comm) -> Result<Tensor> {
    if comm.world() == 1 {
        return images.contrastive_loss(texts, scale);
    }
    let (all_images, all_texts) = (images.all_gather(comm)?, texts.all_gather(comm)?);
    let first = comm.rank() * images.shape()[0];
    images.contrastive_loss_gathered(texts, &all_images, &all_texts, scale, first)
}
