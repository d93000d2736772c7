//! SimSiam as a [`Task`].

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
    simsiam::{SimSiam, SimSiamConfig, z_norm_std},
};
use image::RgbImage;
use smalti::{
    Result, Rng, Tensor,
    comm::Comm,
    nn::{Params, Statistics},
    optim::Group,
};

/// The model, and the recipe that says what its views are.
pub struct SimSiamTask {
    model: SimSiam,
    recipe: Recipe,
}

impl Method for SimSiamTask {
    const NAME: &'static str = "SimSiam";
    const JOB: Job = Job::Simsiam;

    fn new(recipe: &Recipe, comm: &Comm) -> Result<SimSiamTask> {
        let recipe::SimSiam { dim, pred_dim, projector_layers, stop_gradient, .. } =
            recipe.simsiam.clone().unwrap_or_default();
        let backbone = recipe.resnet()?;
        let config = SimSiamConfig { backbone, dim, pred_dim, projector_layers, stop_gradient };
        let mut rng = Rng::new(recipe.seed).stream(INIT_STREAM);
        let model = SimSiam::new(&config, Statistics::Ranks(comm.clone()), &mut rng)?;
        Ok(SimSiamTask { model, recipe: recipe.clone() })
    }

    fn batches(recipe: &mut Recipe, comm: &Comm) -> Result<Labelled> {
        source::two_views(recipe, comm)
    }

    /// The predictor's learning rate may stay at the peak (`--fix-pred-lr`).
    fn groups(&self, recipe: &Recipe) -> Vec<Group> {
        let fixed = recipe.simsiam.as_ref().is_some_and(|simsiam| simsiam.fix_pred_lr);
        let predictor = Group::new(|name| name.starts_with("predictor.")).fixed_lr(recipe.peak_lr());
        if fixed { vec![predictor] } else { Vec::new() }
    }

    fn encoder(&self) -> Vec<(String, Tensor)> {
        checkpoint::without_head(self.model.params().sub("encoder").tensors(), "fc.")
    }
}

impl Task for SimSiamTask {
    type Batch = Batch;

    fn params(&self) -> &Params {
        self.model.params()
    }

    /// Watched: `std`, the deviation of normalised projections. It is near 1 / sqrt(dim) in a healthy run and falls to
    /// 0 in one that collapses, which the loss does not show (§4.1).
    fn loss(&self, batch: &Batch, _: &At) -> Result<Loss> {
        let [x1, x2] = method::pair(batch)?;
        let output = self.model.forward(&x1, &x2)?;
        Ok(Loss { monitored: vec![("std", z_norm_std(&output.z1)?)], value: output.loss })
    }

    fn inputs<'b>(&self, batch: &'b Batch) -> Vec<(String, &'b [f32])> {
        method::views(batch)
    }

    fn preview(&self) -> Result<Option<RgbImage>> {
        source::contact_sheet(&self.recipe).map(Some)
    }
}
