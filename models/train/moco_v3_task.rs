//! MoCo v3 as a [`Task`].

use super::{
    Recipe,
    method::{self, INIT_STREAM, Method},
    recipe::{self, Job},
    source::{self, Labelled},
    trainer::{At, Loss, Task},
};
use crate::{
    backbones::checkpoint,
    data::Batch,
    moco_v3::{MocoV3, MocoV3Config, momentum_at},
};
use image::RgbImage;
use smalti::{Result, Rng, Tensor, comm::Comm, nn::Params};

/// The model, and the recipe that says what its views and its momentum are.
pub struct MocoV3Task {
    model: MocoV3,
    numbers: recipe::MocoV3,
    recipe: Recipe,
}

impl Method for MocoV3Task {
    const NAME: &'static str = "MoCo v3";
    const JOB: Job = Job::MocoV3;

    fn new(recipe: &Recipe, comm: &Comm) -> Result<MocoV3Task> {
        let numbers = recipe.moco_v3.clone().unwrap_or_default();
        let recipe::MocoV3 { dim, mlp_dim, temperature, stop_grad_conv1, .. } = numbers;
        let config =
            MocoV3Config { backbone: recipe.backbone()?, dim, mlp_dim, temperature, stop_grad_conv1 };
        let model = MocoV3::new(&config, comm.clone(), &mut Rng::new(recipe.seed).stream(INIT_STREAM))?;
        Ok(MocoV3Task { model, numbers, recipe: recipe.clone() })
    }

    fn batches(recipe: &mut Recipe, comm: &Comm) -> Result<Labelled> {
        source::two_views(recipe, comm)
    }

    fn encoder(&self) -> Vec<(String, Tensor)> {
        let head = format!("{}.", self.model.config().backbone.head_name());
        checkpoint::without_head(self.model.params().sub("base_encoder").tensors(), &head)
    }
}

impl Task for MocoV3Task {
    type Batch = Batch;

    fn params(&self) -> &Params {
        self.model.params()
    }

    /// Watched: in how many of 100 cases a query is most similar to the key of its image among this rank's.
    fn loss(&self, batch: &Batch, at: &At) -> Result<Loss> {
        let [x1, x2] = method::pair(batch)?;
        let m = self.numbers.momentum;
        let m = if self.numbers.momentum_cosine { momentum_at(m, at.done, 1.0) } else { m };
        let output = self.model.forward(&x1, &x2, m)?;
        let acc1 = method::matches(&output.q1, &output.k2)?;
        Ok(Loss { value: output.loss, monitored: vec![("acc1", acc1)] })
    }

    fn inputs<'b>(&self, batch: &'b Batch) -> Vec<(String, &'b [f32])> {
        method::views(batch)
    }

    fn preview(&self) -> Result<Option<RgbImage>> {
        source::contact_sheet(&self.recipe).map(Some)
    }
}
