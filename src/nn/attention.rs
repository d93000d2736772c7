//! Multi-head self-attention with timm's names and layout.

use super::{Linear, Params};
use crate::{Result, Rng, Tensor, ensure};

/// Registers `qkv` (one layer D -> 3D; its outputs are [q | k | v], each split in heads of consecutive channels)
/// and `proj`. The scale is head_dim^-0.5.
#[derive(Clone, Debug)]
pub struct Attention {
    qkv: Linear,
    proj: Linear,
    heads: usize,
}

impl Attention {
    /// `width` must divide by `heads`.
    ///
    /// # Errors
    /// If it does not, or the names are taken.
    #[track_caller]
    pub fn new(
        params: &Params,
        width: usize,
        heads: usize,
        qkv_bias: bool,
        rng: &mut Rng,
    ) -> Result<Attention> {
        ensure!(
            heads > 0 && width.is_multiple_of(heads),
            "attention",
            "width {width} does not divide by {heads} heads"
        );
        Ok(Attention {
            qkv: Linear::new(&params.sub("qkv"), width, 3 * width, qkv_bias, rng)?,
            proj: Linear::new(&params.sub("proj"), width, width, true, rng)?,
            heads,
        })
    }

    /// `[B, S, D]` to the same shape; every position attends to all.
    ///
    /// # Errors
    /// If `x` has another rank or width.
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [b, s, d] = x.dims("attention")?;
        let qkv = self.qkv.forward(x)?.reshape([b, s, 3, self.heads, d / self.heads])?;
        self.proj.forward(&qkv.attention(false, None)?)
    }
}
