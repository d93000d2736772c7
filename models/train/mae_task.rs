//! Pre-training of a masked autoencoder as a [`Task`].

use super::{
    Recipe, RunDir,
    grid::{fold_rows, grid},
    source::{self, Samples},
    trainer::{At, Task},
};
use crate::{data::Batch, mae::Mae};
use image::RgbImage;
use smalti::{Result, Rng, Tensor, io, nn::Params};

/// The stream of the seed that initialises the model.
const INIT_STREAM: u64 = 0x696E_6974;
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

impl MaeTask {
    /// The model of a recipe with its first weights.
    ///
    /// # Errors
    /// If its sizes do not fit together, or there are no images.
    pub fn new(recipe: &Recipe) -> Result<MaeTask> {
        let mae = MaeTask::untrained(recipe)?;
        Ok(MaeTask { mae, samples: Samples::of(recipe, PREVIEW.0)?, seed: recipe.seed })
    }

    /// The model as training finds it.
    ///
    /// # Errors
    /// If its sizes do not fit together.
    pub fn untrained(recipe: &Recipe) -> Result<Mae> {
        Mae::new(&recipe.model.dims()?.mae(), &mut Rng::new(recipe.seed).stream(INIT_STREAM))
    }

    /// The model.
    pub fn mae(&self) -> &Mae {
        &self.mae
    }

    /// Writes `model.safetensors`, all of it, and `encoder.safetensors` without the decoder, both with the recipe
    /// in the metadata.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn save(&self, recipe: &Recipe, run: &RunDir) -> Result<()> {
        let metadata = [("recipe".to_owned(), recipe.to_toml()?)];
        let mut tensors = self.mae.params().tensors();
        io::save_safetensors(run.file("model.safetensors"), &tensors, &metadata)?;
        tensors.retain(|(name, _)| !name.starts_with("decoder") && name != "mask_token");
        io::save_safetensors(run.file("encoder.safetensors"), &tensors, &metadata)
    }
}

impl Task for MaeTask {
    type Batch = Batch;

    fn params(&self) -> &Params {
        self.mae.params()
    }

    fn loss(&self, batch: &Batch, at: &At) -> Result<Tensor> {
        let images = source::tensor(&batch.views[0])?;
        let masking = self.mae.random_mask(batch.labels.len(), &mut at.rng.clone())?;
        Ok(self.mae.forward(&images, masking)?.loss)
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
