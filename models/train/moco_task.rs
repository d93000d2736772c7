//! Momentum contrast, v1 and v2, as a [`Task`].

use super::{
    Recipe,
    method::{self, INIT_STREAM, Method},
    recipe::{self, Job},
    source::{self, Labelled},
    trainer::{At, Loss, Task},
};
use crate::{
    data::Batch,
    moco::{Moco, MocoConfig},
};
use image::RgbImage;
use smalti::{Result, Rng, Tensor, comm::Comm, nn::Params};

/// The model, and the recipe that says what its views are.
pub struct MocoTask {
    model: Moco,
    recipe: Recipe,
}

impl Method for MocoTask {
    const NAME: &'static str = "MoCo";
    const JOB: Job = Job::Moco;

    fn new(recipe: &Recipe, comm: &Comm) -> Result<MocoTask> {
        let recipe::Moco { dim, queue, momentum, temperature, mlp, symmetric, bn_groups } =
            recipe.moco.clone().unwrap_or_default();
        let backbone = recipe.resnet()?;
        let config =
            MocoConfig { backbone, dim, queue, momentum, temperature, mlp, symmetric, bn_splits: bn_groups };
        config.check_batch(recipe.data.batch / comm.world(), comm.world())?;
        let model = Moco::new(&config, comm, &mut Rng::new(recipe.seed).stream(INIT_STREAM))?;
        Ok(MocoTask { model, recipe: recipe.clone() })
    }

    fn batches(recipe: &mut Recipe, comm: &Comm) -> Result<Labelled> {
        source::two_views(recipe, comm)
    }

    fn encoder(&self) -> Vec<(String, Tensor)> {
        self.model.backbone()
    }
}

impl Task for MocoTask {
    type Batch = Batch;

    fn params(&self) -> &Params {
        self.model.params()
    }

    /// Watched: in how many of 100 cases the key of the image is the most similar, or among the five most similar.
    fn loss(&self, batch: &Batch, at: &At) -> Result<Loss> {
        let [im_q, im_k] = method::pair(batch)?;
        let output = self.model.forward(&im_q, &im_k, &mut at.rng.clone())?;
        Ok(Loss { value: output.loss, monitored: vec![("acc1", output.acc1), ("acc5", output.acc5)] })
    }

    fn inputs<'b>(&self, batch: &'b Batch) -> Vec<(String, &'b [f32])> {
        method::views(batch)
    }

    fn preview(&self) -> Result<Option<RgbImage>> {
        source::contact_sheet(&self.recipe).map(Some)
    }
}
