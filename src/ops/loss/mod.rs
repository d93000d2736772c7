//! Losses: what training minimises, each fused with its reduction.

mod cosine;
mod cross_entropy;
mod nll;
mod pointwise;

pub use cross_entropy::CrossEntropy;

use crate::{Result, Tensor};

/// What becomes of the losses of single elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reduction {
    /// They are returned as they are.
    None,
    /// They are summed.
    Sum,
    /// They are averaged; of nothing, NaN.
    #[default]
    Mean,
}

impl Reduction {
    /// The same in tensor operations.
    #[track_caller]
    fn apply(self, losses: &Tensor) -> Result<Tensor> {
        match self {
            Reduction::None => Ok(losses.clone()),
            Reduction::Sum => losses.sum(()),
            Reduction::Mean => losses.mean(()),
        }
    }
}
