//! Pre-training of a masked autoencoder as a [`Task`].

use super::{
    Recipe,
    grid::{fold_rows, grid},
    method::{self, INIT_STREAM, Method},
    recipe::Job,
    source::{self, Labelled, Samples},
    trainer::{At, Loss, Task},
};
use crate::{data::Batch, mae::Mae};
use image::RgbImage;
use smalti::{Result, Rng, Tensor, comm::Comm, nn::Params};

/// The stream of the seed that masks the preview.
const PREVIEW_STREAM: u64 = 0x7072_6576;
/// Images of the preview, and how many of them stand side by side.
const PREVIEW: (usize, usize) = (24, 4);
/// Width of one picture of the preview, pixels.
const PREVIEW_SIDE: u32 = 96;

/// A masked autoencoder and the images that it is shown with.
pub struct MaeTask {
    mae: Mae,
    samples: Samples,
    seed: u64,
}

impl Method for MaeTask {
    const NAME: &'static str = "MAE";
    const JOB: Job = Job::Mae;

    fn new(recipe: &Recipe, _: &Comm) -> Result<MaeTask> {
        let mae = Mae::new(&recipe.model.dims()?.mae(), &mut Rng::new(recipe.seed).stream(INIT_STREAM))?;
        Ok(MaeTask { mae, samples: Samples::of(recipe, PREVIEW.0)?, seed: recipe.seed })
    }

    fn batches(recipe: &mut Recipe, comm: &Comm) -> Result<Labelled> {
        source::pretraining(recipe, comm)
    }

    /// All but the decoder.
    fn encoder(&self) -> Vec<(String, Tensor)> {
        let mut tensors = self.mae.params().tensors();
        tensors.retain(|(name, _)| !name.starts_with("decoder") && name != "mask_token");
        tensors
    }
}

impl Task for MaeTask {
    type Batch = Batch;

    fn params(&self) -> &Params {
        self.mae.params()
    }

    fn loss(&self, batch: &Batch, at: &At) -> Result<Loss> {
        let images = source::tensor(&batch.views[0])?;
        let masking = self.mae.random_mask(batch.labels.len(), &mut at.rng.clone())?;
        Ok(self.mae.forward(&images, masking)?.loss.into())
    }

    fn inputs<'b>(&self, batch: &'b Batch) -> Vec<(String, &'b [f32])> {
        method::views(batch)
    }

    /// Original, what the encoder sees, reconstruction: the visible patches with the predicted ones between them.
    fn preview(&self) -> Result<Option<RgbImage>> {
        let images = source::tensor(&self.samples.images)?;
        let mut rng = Rng::new(self.seed).stream(PREVIEW_STREAM);
        let output = self.mae.forward(&images, self.mae.random_mask(images.shape()[0], &mut rng)?)?;
        let hidden = self.mae.mask_image(&output.masking.mask)?;
        let masked = images.sub(&images.mul(&hidden)?)?;
        let pasted = masked
            .add(&self.mae.reconstruct(&images, &output.pred.to_dtype(images.dtype())?)?.mul(&hidden)?)?;
        let mut columns = Vec::new();
        for values in [&images, &masked, &pasted] {
            columns.push(self.samples.pictures(&values.contiguous()?.to_vec::<f32>()?)?.into_iter());
        }
        let rows = (0..images.shape()[0]).map(|_| columns.iter_mut().filter_map(Iterator::next).collect());
        Ok(Some(grid(&fold_rows(rows.collect(), PREVIEW.1), PREVIEW_SIDE)?))
    }
}
