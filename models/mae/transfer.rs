//! What becomes of a pre-trained encoder: the classifier that takes over its weights, the losses of fine-tuning
//! and linear probing (MAE §4 and appendix A.1; `main_finetune.py`, `main_linprobe.py`).

use crate::backbones::{
    checkpoint::load_partly,
    vit::{Pool, VitClassifier},
};
use smalti::{
    CrossEntropy, Result, Rng, Tensor,
    nn::{BatchNorm, BatchNormConfig, Linear, LoadReport, Params, init, pos_embed},
};

/// Loads an autoencoder's encoder (or a fine-tuned classifier) by name into a classifier: a head of another
/// shape is left out, the position table is resized to the model's grid, decoder and mask token are of no use
/// here and are not loaded.
///
/// # Errors
/// If anything but the head (and the norm before it) is missing, or a shape does not fit; all are listed, and
/// nothing has been changed then.
pub fn load_encoder(model: &VitClassifier, tensors: Vec<(String, Tensor)>) -> Result<LoadReport> {
    let params = model.params();
    let grid = model.encoder().config().grid()?;
    let mut kept = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let fits = params.get(&name).is_some_and(|p| p.value().shape() == tensor.shape());
        match name.as_str() {
            "head.weight" | "head.bias" if !fits => {}
            "pos_embed" if !fits => kept.push((name, pos_embed::resize(&tensor, 1, grid)?)),
            _ => kept.push((name, tensor)),
        }
    }
    load_partly(params, &kept, |name| ["head.", "fc_norm."].iter().any(|head| name.starts_with(head)))
}

/// Loss of fine-tuning: cross-entropy of all images against soft targets (from mixup and label smoothing).
///
/// # Errors
/// If shapes do not fit.
pub fn finetune_loss(
    model: &VitClassifier,
    images: &Tensor,
    targets: &Tensor,
    rng: &mut Rng,
) -> Result<Tensor> {
    // in f32 also where the model is in half precision
    let logits = model.forward(images, Some(rng))?.to_dtype(targets.dtype())?;
    logits.cross_entropy(targets, &CrossEntropy::default())
}

/// The head of linear probing on a frozen encoder: BatchNorm without affine (eps 1e-6), then a linear layer.
/// Its names are those of the official checkpoints, `head.0.*` and `head.1.*`.
pub struct ProbeHead {
    params: Params,
    norm: BatchNorm,
    linear: Linear,
}

impl ProbeHead {
    /// For features of `width` channels; weight truncated normal with std 0.01, bias 0.
    ///
    /// # Errors
    /// None of its own.
    pub fn new(width: usize, classes: usize, rng: &mut Rng) -> Result<ProbeHead> {
        let params = Params::new();
        let head = params.sub("head");
        let norm = BatchNorm::new(
            &head.sub(0),
            width,
            &BatchNormConfig { affine: false, eps: 1e-6, ..Default::default() },
        )?;
        let linear = Linear::new(&head.sub(1), width, classes, true, rng)?;
        linear.weight().set(&init::trunc_normal([classes, width], 0.01, rng)?)?;
        if let Some(bias) = head.sub(1).get("bias") {
            bias.set(&init::zeros([classes])?)?;
        }
        Ok(ProbeHead { params, norm, linear })
    }

    /// Its parameters and running statistics.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Loss on features `[N, width]` of a frozen encoder. The norm sees batch statistics, as in the official code,
    /// where the whole model is in training mode.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn loss(&self, features: &Tensor, labels: &Tensor) -> Result<Tensor> {
        let logits = self.linear.forward(&self.norm.forward(features, true)?)?;
        logits.cross_entropy(labels, &CrossEntropy::default())
    }

    /// Logits in evaluation.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, features: &Tensor) -> Result<Tensor> {
        self.linear.forward(&self.norm.forward(features, false)?)
    }
}

/// The pool of a task: the mean over patches when everything is trained, the class token when it is probed.
pub fn pool(global_pool: bool) -> Pool {
    if global_pool { Pool::Mean } else { Pool::Class }
}
