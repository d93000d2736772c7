//! How a run goes.

use crate::train::{
    Rate, Recipe,
    recipe::{Job, Precision},
};
use smalti::{Device, Error, Result};
use std::fmt;

/// How long a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// Passes over the data.
    Epochs(usize),
    /// Steps of the optimizer; the last epoch may be cut.
    Steps(u64),
}

impl fmt::Display for Length {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Length::Epochs(epochs) => write!(f, "{epochs} epochs"),
            Length::Steps(steps) => write!(f, "{steps} steps"),
        }
    }
}

/// How a run goes.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Every random number follows from it.
    pub seed: u64,
    /// How long the run is.
    pub length: Length,
    /// Learning rate over the run.
    pub rate: Rate,
    /// Micro-batches a step.
    pub accumulate: usize,
    /// Largest norm of the gradient.
    pub clip: Option<f64>,
    /// Images in a micro-batch.
    pub batch: usize,
    /// Steps from one line of the log to the next.
    pub log_every: u64,
    /// Epochs from one checkpoint to the next.
    pub checkpoint_every: usize,
    /// Epochs from one set of pictures to the next.
    pub preview_every: usize,
    /// What the run is built on and does not train, such as a frozen encoder: to go on, it must be the same.
    pub origin: Option<String>,
}

impl Settings {
    /// The settings of a recipe.
    ///
    /// # Errors
    /// If it asks for a precision that the device or the job does not train in.
    pub fn of(recipe: &Recipe) -> Result<Settings> {
        if recipe.optim.precision == Precision::Bf16 {
            if Device::current()? == Device::Cpu {
                return Err(Error::msg(
                    "optim.precision = \"bf16\" needs a GPU; train in \"f32\" on the CPU",
                ));
            }
            if recipe.job == Job::LinearProbe {
                return Err(Error::msg("optim.precision = \"bf16\": a linear probe is trained in \"f32\""));
            }
        }
        Ok(Settings {
            seed: recipe.seed,
            length: recipe.schedule.length(),
            rate: Rate::of(recipe),
            accumulate: recipe.optim.accumulate,
            clip: recipe.optim.clip,
            batch: recipe.data.batch,
            log_every: recipe.run.log_every as u64,
            checkpoint_every: recipe.run.checkpoint_every,
            preview_every: recipe.run.preview_every,
            origin: None,
        })
    }
}
