//! Shuffling BN (§3.3): a query and its key must not share the statistics of a batch, by which the one could be told
//! from the other. So the keys of a rank's images are computed among images of all ranks, in an order that is drawn
//! anew for each step.

use super::OP;
use smalti::{DType, Result, Rng, Tensor, comm::Comm, ensure};

/// The numbers 0..n in random order, i64.
pub(super) fn permutation(n: usize, rng: &mut Rng) -> Result<Tensor> {
    Tensor::rand([n], rng)?.argsort(0, false)
}

/// Is it the numbers 0..n in some order?
pub(super) fn check(permutation: &Tensor, n: usize) -> Result<()> {
    let is_i64 = permutation.shape() == [n] && permutation.dtype() == DType::I64;
    let (dtype, shape) = (permutation.dtype(), permutation.shape());
    ensure!(is_i64, OP, "a permutation of {n} images is i64 [{n}], got {dtype} {shape:?}");
    let mut places = permutation.to_vec::<i64>()?;
    places.sort_unstable();
    ensure!(places.into_iter().eq(0..n as i64), OP, "a permutation of {n} images must name each once");
    Ok(())
}

/// `encode`, which maps this rank's `[n, ..]` to `[n, dim]`, applied to images that stand in rank 0's permutation of
/// all ranks' images; rows come back to where they belong.
pub(super) fn shuffled(
    images: &Tensor,
    permutation: &Tensor,
    comm: &Comm,
    encode: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let n = images.dim(0)?;
    let own = |order: &Tensor| order.narrow(0, comm.rank() * n, n);
    let order = permutation.broadcast_from(0, comm)?;
    let shuffled = images.all_gather(comm)?.index_select(0, &own(&order)?)?;
    // the inverse permutation says where an image has gone
    encode(&shuffled)?.all_gather(comm)?.index_select(0, &own(&order.argsort(0, false)?)?)
}
