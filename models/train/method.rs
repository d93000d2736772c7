//! What all ways of pre-training have in common.

use super::{
    Recipe, RunDir,
    recipe::Job,
    source,
    trainer::{Batches, Task},
};
use crate::data::Batch;
use smalti::{DType, Error, Result, Tensor, comm::Comm, io, no_grad, optim::Group};

/// The stream of the seed that initialises models.
pub(super) const INIT_STREAM: u64 = 0x696E_6974;

/// A way of pre-training as a [`Task`]: how it begins from a recipe, and what is kept of it in the end.
pub trait Method: Task + Sized {
    /// For headlines.
    const NAME: &'static str;
    /// The recipes that are for it.
    const JOB: Job;

    /// The model of a recipe with its first weights, on one rank of several.
    ///
    /// # Errors
    /// If its sizes do not fit together, or there are no images.
    fn new(recipe: &Recipe, comm: &Comm) -> Result<Self>;

    /// This rank's part of the batches of a recipe. What they turn out to be is put down in it.
    ///
    /// # Errors
    /// If there are no images, or too few.
    fn batches(recipe: &mut Recipe, comm: &Comm) -> Result<Box<dyn Batches<Batch = Self::Batch>>>;

    /// Settings of single parameters.
    fn groups(&self, _recipe: &Recipe) -> Vec<Group> {
        Vec::new()
    }

    /// The backbone under its own names: what transfer and evaluation build on.
    fn encoder(&self) -> Vec<(String, Tensor)>;

    /// Further results on the recipe's test images, a line each.
    ///
    /// # Errors
    /// If the images cannot be read.
    fn findings(&self, _recipe: &Recipe) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// Writes `model.safetensors`, all of it under its official names, and `encoder.safetensors`, the backbone alone,
    /// both with the recipe in the metadata.
    ///
    /// # Errors
    /// If they cannot be written.
    fn save(&self, recipe: &Recipe, run: &RunDir) -> Result<()> {
        let metadata = [("recipe".to_owned(), recipe.to_toml()?)];
        io::save_safetensors(run.file("model.safetensors"), &self.params().tensors(), &metadata)?;
        io::save_safetensors(run.file("encoder.safetensors"), &self.encoder(), &metadata)
    }
}

/// The numbers of a batch's views, by name.
pub(super) fn views<L>(batch: &Batch<L>) -> Vec<(String, &[f32])> {
    let named = batch.views.iter().enumerate();
    named
        .map(|(i, view)| (format!("view {} of shape {:?}", i + 1, view.shape), view.data.as_slice()))
        .collect()
}

/// Both views of a batch, `[N, C, H, W]` each.
pub(super) fn pair(batch: &Batch) -> Result<[Tensor; 2]> {
    match batch.views.as_slice() {
        [first, second] => Ok([source::tensor(first)?, source::tensor(second)?]),
        views => Err(Error::msg(format!("train: a batch of {} views, needs two", views.len()))),
    }
}

/// How many percent of the rows of `a` `[N, D]` have their own row of `b` as the most similar one, by cosine.
pub(super) fn matches(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    no_grad(|| {
        let unit = |t: &Tensor| t.detach().to_dtype(DType::F32)?.normalize(2.0, 1, 1e-12);
        let best = unit(a)?.matmul(&unit(b)?.t()?)?.argmax(-1)?;
        let own = Tensor::arange(a.dim(0)?, DType::I64)?.to_device(best.device())?;
        best.eq(&own)?.to_dtype(DType::F32)?.mean(())?.mul_scalar(100.0)
    })
}
