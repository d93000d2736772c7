//! Linear classification of fixed features.

use super::{Features, standardise};
use smalti::{
    CrossEntropy, Result, Rng, Tensor, ensure,
    nn::{Linear, Params, init},
    no_grad,
    optim::{AdamW, Algorithm, Optimizer, Schedule},
};

/// How a probe on stored features is trained: full batches, AdamW, cosine schedule.
#[derive(Clone, Copy, Debug)]
pub struct ProbeConfig {
    /// Full-batch steps.
    pub steps: usize,
    /// First learning rate.
    pub lr: f64,
    /// Decay of the weights, not of the bias.
    pub weight_decay: f64,
    /// Of the initial weights.
    pub seed: u64,
}

impl Default for ProbeConfig {
    fn default() -> Self {
        ProbeConfig { steps: 300, lr: 0.02, weight_decay: 0.05, seed: 0 }
    }
}

/// A linear classifier over standardised features: MAE's probe (BatchNorm without affine, then Linear), for
/// features that do not change from epoch to epoch.
pub struct LinearProbe {
    head: Linear,
    train: Features,
}

impl LinearProbe {
    /// Trains on `train`.
    ///
    /// # Errors
    /// If a label is negative.
    pub fn fit(train: &Features, config: ProbeConfig) -> Result<LinearProbe> {
        let labels = train.labels.to_vec::<i64>()?;
        ensure!(labels.iter().all(|&c| c >= 0), "linear probe", "labels must not be negative");
        let classes = labels.iter().max().map_or(0, |&c| c as usize + 1);
        let width = train.x.shape()[1];
        let params = Params::new();
        let head = Linear::new(&params, width, classes, true, &mut Rng::new(config.seed))?;
        head.weight().set(&init::trunc_normal([classes, width], 0.01, &mut Rng::new(config.seed))?)?;
        if let Some(bias) = params.get("bias") {
            bias.set(&Tensor::zeros([classes], smalti::DType::F32)?)?;
        }
        let data = standardise(train, &[train])?.remove(0);
        let groups = [smalti::optim::no_decay_1d(&params.trained())];
        let adam = AdamW { weight_decay: config.weight_decay, ..Default::default() };
        let mut optimizer = adam.over(&params.trained(), &groups)?;
        let schedule = Schedule::Cosine { base: config.lr, min: 0.0, steps: config.steps as f64 };
        for step in 0..config.steps {
            let loss = head.forward(&data.x)?.cross_entropy(&data.labels, &CrossEntropy::default())?;
            optimizer.step(&loss.backward()?, schedule.at(step as f64))?;
        }
        Ok(LinearProbe { head, train: train.clone() })
    }

    /// Part of the rows that it classifies rightly.
    ///
    /// # Errors
    /// If the width differs from the training set's.
    pub fn accuracy(&self, test: &Features) -> Result<f64> {
        let data = standardise(&self.train, &[test])?.remove(0);
        let best = no_grad(|| self.head.forward(&data.x)?.argmax(-1))?;
        let right = best.eq(&data.labels)?.sum(())?.item()?;
        Ok(right / test.len() as f64)
    }
}
