//! The pre-norm transformer block of ViT.

use super::{Attention, Gelu, LayerNorm, Mlp, Params};
use crate::{Result, Rng, Tensor};

/// x + Attn(norm1(x)), then x + MLP(norm2(x)). Registers its parts under `attn`, `mlp` and the names of the norms.
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
    /// Does a position attend only to those up to itself?
    pub causal: bool,
    /// What checkpoints call the parts.
    pub names: BlockNames,
}

/// Names of a block's parts, those of `qkv` and `proj` within `attn`, those of the perceptron within `mlp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct BlockNames {
    pub norms: [&'static str; 2],
    /// Weight and bias.
    pub qkv: [&'static str; 2],
    pub proj: &'static str,
    pub mlp: [&'static str; 2],
}

impl BlockNames {
    /// timm's, which most vision transformers share.
    pub const TIMM: BlockNames = BlockNames {
        norms: ["norm1", "norm2"],
        qkv: ["qkv.weight", "qkv.bias"],
        proj: "proj",
        mlp: ["fc1", "fc2"],
    };
    /// Those of CLIP's towers, over PyTorch's `MultiheadAttention`.
    pub const CLIP: BlockNames = BlockNames {
        norms: ["ln_1", "ln_2"],
        qkv: ["in_proj_weight", "in_proj_bias"],
        proj: "out_proj",
        mlp: ["c_fc", "c_proj"],
    };
}

impl Block {
    /// A block under `params`.
    ///
    /// # Errors
    /// If the width does not divide by the heads, or the names are taken.
    #[track_caller]
    pub fn new(params: &Params, config: BlockConfig, rng: &mut Rng) -> Result<Block> {
        let [norm1, norm2] = config.names.norms;
        Ok(Block {
            norm1: LayerNorm::new(&params.sub(norm1), config.width, config.eps)?,
            attn: Attention::new(&params.sub("attn"), &config, rng)?,
            norm2: LayerNorm::new(&params.sub(norm2), config.width, config.eps)?,
            mlp: Mlp::new(&params.sub("mlp"), &config, rng)?,
            drop_path: config.drop_path,
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
