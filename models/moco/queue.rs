//! The queue of keys, `queue` and `queue_ptr` in checkpoints.

use super::OP;
use smalti::{
    DType, Result, Rng, Tensor, ensure,
    nn::{Param, Params},
};

/// K keys of the last steps, one a column, and where the next ones go. Every rank has the same.
#[derive(Clone, Debug)]
pub(super) struct Queue {
    /// `[dim, K]`
    keys: Param,
    /// `[1]` i64
    pointer: Param,
}

impl Queue {
    /// Filled with random directions.
    pub fn new(params: &Params, dim: usize, keys: usize, rng: &mut Rng) -> Result<Queue> {
        let random = Tensor::randn([dim, keys], rng)?.normalize(2.0, 0, 1e-12)?;
        let keys = params.buffer("queue", random)?;
        Ok(Queue { keys, pointer: params.buffer("queue_ptr", Tensor::zeros([1], DType::I64)?)? })
    }

    /// The keys as they are now, `[dim, K]`; what enters later does not change them.
    pub fn keys(&self) -> Tensor {
        self.keys.value()
    }

    /// Puts keys `[B, dim]` in the place of the oldest. A pointer that is no multiple of B, from a checkpoint of
    /// another batch size, makes them go on at the beginning.
    pub fn enqueue(&self, keys: &Tensor) -> Result<()> {
        let ([n, dim], [_, k]) = (keys.dims(OP)?, self.keys().dims(OP)?);
        let pointer = self.pointer.value().item()? as usize;
        ensure!(pointer < k, OP, "queue_ptr is {pointer}, the queue has {k} places");
        let places: Vec<i64> = (pointer..pointer + n).map(|place| (place % k) as i64).collect();
        let places = Tensor::from_slice(&places, [1, n])?.expand([dim, n])?;
        self.keys.update(|queue| queue.scatter(1, &places, &keys.t()?))?;
        self.pointer.set(&Tensor::from_slice(&[((pointer + n) % k) as i64], [1])?)
    }
}
