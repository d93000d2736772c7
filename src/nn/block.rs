//! The pre-norm transformer block of ViT.

use super::{Attention, Gelu, LayerNorm, Mlp, Params};
use crate::{Result, Rng, Tensor};

/// x + Attn(norm1(x)), then x + MLP(norm2(x)). Registers `norm1`, `attn`, `norm2`, `mlp`.
#[derive(Clone, Debug)]
pub struct Block {
    norm1: LayerNorm,
    attn: Attention,
    norm2: LayerNorm,
    mlp: Mlp,
    drop_path: f64,
}

/// Sizes of a [`Block`].
#[derive(Clone, Copy, Debug)]
pub struct BlockConfig {
    /// Channels.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Hidden width of the MLP over `width`.
    pub mlp_ratio: f64,
    /// Do q, k and v have biases?
    pub qkv_bias: bool,
    /// Of the layer norms: 1e-6 in ViT.
    pub eps: f64,
    /// Of the MLP.
    pub gelu: Gelu,
    /// Probability with which a sample skips each branch in training.
    pub drop_path: f64,
}

impl Block {
    /// A block under `params`.
    ///
    /// # Errors
    /// If the width does not divide by the heads, or the names are taken.
    #[track_caller]
    pub fn new(params: &Params, config: BlockConfig, rng: &mut Rng) -> Result<Block> {
        let BlockConfig { width, heads, mlp_ratio, qkv_bias, eps, gelu, drop_path } = config;
        let hidden = (width as f64 * mlp_ratio) as usize;
        Ok(Block {
            norm1: LayerNorm::new(&params.sub("norm1"), width, eps)?,
            attn: Attention::new(&params.sub("attn"), width, heads, qkv_bias, rng)?,
            norm2: LayerNorm::new(&params.sub("norm2"), width, eps)?,
            mlp: Mlp::new(&params.sub("mlp"), width, hidden, gelu, rng)?,
            drop_path,
        })
    }

    /// `[B, S, D]` to the same shape. `rng`: draws of drop path; `None` in evaluation.
    ///
    /// # Errors
    /// If `x` has another rank or width.
    #[track_caller]
    pub fn forward(&self, x: &Tensor, mut rng: Option<&mut Rng>) -> Result<Tensor> {
        let mut branch = |y: Tensor| match rng.as_deref_mut() {
            Some(rng) if self.drop_path > 0.0 => y.drop_path(self.drop_path, rng),
            _ => Ok(y),
        };
        let attended = branch(self.attn.forward(&self.norm1.forward(x)?)?)?;
        let (x, normed) = self.norm2.forward_add(x, &attended)?;
        x.add(&branch(self.mlp.forward(&normed)?)?)
    }
}
