//! Multi-head self-attention.

use super::{BlockConfig, Linear, Params};
use crate::{Result, Rng, Tensor, ensure};

/// One layer D -> 3D (its outputs are [q | k | v], each split in heads of consecutive channels), the attention and a
/// projection, registered under the names that the block's configuration has for them. The scale is head_dim^-0.5.
#[derive(Clone, Debug)]
pub struct Attention {
    qkv: Linear,
    proj: Linear,
    heads: usize,
    causal: bool,
}

impl Attention {
    /// The attention of a block of this configuration, under `params`.
    ///
    /// # Errors
    /// If the width does not divide by the heads, or the names are taken.
    #[track_caller]
    pub fn new(params: &Params, config: &BlockConfig, rng: &mut Rng) -> Result<Attention> {
        let &BlockConfig { width, heads, qkv_bias, causal, names, .. } = config;
        ensure!(
            heads > 0 && width.is_multiple_of(heads),
            "attention",
            "width {width} does not divide by {heads} heads"
        );
        Ok(Attention {
            qkv: Linear::named(params, names.qkv, [width, 3 * width], qkv_bias, rng)?,
            proj: Linear::new(&params.sub(names.proj), width, width, true, rng)?,
            heads,
            causal,
        })
    }

    /// `[B, S, D]` to the same shape; every position attends to all, or causally to those up to itself.
    ///
    /// # Errors
    /// If `x` has another rank or width.
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.project(&self.attend(x)?)
    }

    /// The first half of it: the heads' results, one after the other.
    #[track_caller]
    pub(super) fn attend(&self, x: &Tensor) -> Result<Tensor> {
        let [b, s, d] = x.dims("attention")?;
        let qkv = self.qkv.forward(x)?.reshape([b, s, 3, self.heads, d / self.heads])?;
        qkv.attention(self.causal, None)
    }

    /// The second half, which is one of each position by itself.
    #[track_caller]
    pub(super) fn project(&self, attended: &Tensor) -> Result<Tensor> {
        self.proj.forward(attended)
    }
}
