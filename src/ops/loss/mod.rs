//! Losses: what training minimises, each fused with its reduction.

mod cosine;
mod cross_entropy;
mod labels;
mod nll;
mod pointwise;

pub use cross_entropy::CrossEntropy;

use crate::{
    Result, Tensor,
    cpu::{rows, simd::simd_of},
    dtype::Real,
};

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

/// Elements that are summed before they join the rest, which keeps the digits of long sums.
const RUN: usize = 2048;

/// Sum of a column of losses.
fn total<R: Real>(values: &[R]) -> R {
    simd_of::<R, _>(
        #[inline(always)]
        || {
            let mut sum = R::ZERO;
            for run in values.chunks(RUN) {
                sum += rows::sum_of(run.len(), |i| unsafe { *run.get_unchecked(i) });
            }
            sum
        },
    )
}
