//! Reductions over any dimensions, one family a file; [`fold`] is the loop that they share. Each has a twin
//! `.._keepdim`, in whose result the reduced dimensions stay with size 1.

mod cumulative;
mod extremum;
mod fold;
#[cfg(gpu)]
pub(in crate::ops) mod gpu;
mod logsumexp;
mod norm;
mod prod;
mod sum;
mod var;

use crate::{Result, Tensor, shape::Dims};

/// Takes the reduced dimensions, which have size 1, out of a result.
#[track_caller]
fn squeezed(y: &Tensor, dims: &[usize]) -> Result<Tensor> {
    let shape: Dims = (0..y.rank()).filter(|d| !dims.contains(d)).map(|d| y.shape()[d]).collect();
    y.reshape(shape)
}
