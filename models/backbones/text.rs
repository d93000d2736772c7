//! The text transformer of CLIP and FLIP, with open_clip's parameter names.
//!
//! Source: Radford et al., ICML 2021 (CLIP); Li et al., CVPR 2023 (FLIP), which reads the text in both directions.

use super::{
    blocks,
    vit::{add_positions, four},
};
use serde::{Deserialize, Serialize};
use smalti::{
    DType, Device, Result, Rng, Tensor, ensure,
    nn::{Block, BlockConfig, BlockNames, Gelu, LayerNorm, Param, Params, init},
};

/// Sizes of the tower.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct TextConfig {
    pub vocab_size: usize,
    /// Positions that there are.
    pub context_length: usize,
    pub width: usize,
    pub layers: usize,
    pub heads: usize,
    #[serde(default = "four")]
    pub mlp_ratio: f64,
}

/// How the tower reads.
#[derive(Clone, Copy, Debug)]
pub struct TextStyle {
    /// Of the layer norms.
    pub eps: f64,
    /// Of the perceptrons.
    pub gelu: Gelu,
    /// Does a token see only those before it? Otherwise it sees all, padding included.
    pub causal: bool,
    /// Which token stands for the text.
    pub pool: TextPool,
}

/// Which token stands for the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextPool {
    /// The first one; 0 is padding.
    First,
    /// The one with the largest id, the end of the text; what follows is padding.
    Largest,
}

/// Token embedding, learned positions, blocks, norm, projection. Registers `token_embedding.weight` `[V, D]`,
/// `positional_embedding` `[T, D]`, `transformer.resblocks.N`, `ln_final` and `text_projection` `[D, E]`.
#[derive(Clone, Debug)]
pub struct TextTower {
    tokens: Param,
    positions: Param,
    blocks: Vec<Block>,
    norm: LayerNorm,
    projection: Param,
    config: TextConfig,
    style: TextStyle,
}

impl TextTower {
    /// A tower that projects to `embed_dim` channels, with values that its user has to initialise.
    pub(crate) fn new(
        params: &Params,
        config: &TextConfig,
        style: TextStyle,
        embed_dim: usize,
        rng: &mut Rng,
    ) -> Result<TextTower> {
        let &TextConfig { vocab_size, context_length, width, heads, mlp_ratio, .. } = config;
        let TextStyle { eps, gelu, causal, .. } = style;
        let block = BlockConfig {
            width,
            heads,
            mlp_ratio,
            qkv_bias: true,
            eps,
            gelu,
            drop_path: 0.0,
            causal,
            names: BlockNames::CLIP,
        };
        let normal = |shape, rng: &mut Rng| init::normal(shape, 0.02, rng);
        let tokens = params.sub("token_embedding").param("weight", normal([vocab_size, width], rng)?)?;
        let positions = params.param("positional_embedding", normal([context_length, width], rng)?)?;
        let branch = params.sub("transformer").sub("resblocks");
        let blocks =
            (0..config.layers).map(|i| Block::new(&branch.sub(i), block, rng)).collect::<Result<_>>()?;
        let norm = LayerNorm::new(&params.sub("ln_final"), width, eps)?;
        let projection = params.param("text_projection", init::xavier_uniform([width, embed_dim], rng)?)?;
        Ok(TextTower { tokens, positions, blocks, norm, projection, config: config.clone(), style })
    }

    /// Tokens `[N, T]` (i64) as vectors with their positions: `[N, T, D]`, or those of positions `ids` `[N, K]`
    /// alone, `[N, K, D]`.
    ///
    /// # Errors
    /// If there are more tokens than positions, or fewer where padding has an effect, or an id is out of range.
    pub fn embed(&self, tokens: &Tensor, ids: Option<&Tensor>) -> Result<Tensor> {
        let [_, t] = tokens.dims("text tower")?;
        let length = self.config.context_length;
        ensure!(
            t == length || (self.style.causal && t < length),
            "text tower",
            "the model reads texts of {length} tokens, got {:?}",
            tokens.shape()
        );
        let kept = ids.map(|ids| tokens.gather(1, ids)).transpose()?;
        let x = self.tokens.get().embedding(kept.as_ref().unwrap_or(tokens), None)?;
        add_positions(&x, &self.positions.get().narrow(0, 0, t)?, ids)
    }

    /// The blocks.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The norm behind them.
    pub fn norm(&self) -> &LayerNorm {
        &self.norm
    }

    /// Where in tokens `[N, T]` the one stands that is pooled, `[N, 1]` i64.
    ///
    /// # Errors
    /// If `tokens` is no matrix.
    pub fn pooled(&self, tokens: &Tensor) -> Result<Tensor> {
        let [n, _] = tokens.dims("text tower")?;
        match self.style.pool {
            TextPool::First => Tensor::zeros([n, 1], DType::I64),
            TextPool::Largest => tokens.argmax_keepdim(1),
        }
    }

    /// Which of tokens `[N, T]` are padding, bool.
    ///
    /// # Errors
    /// If `tokens` is no matrix.
    pub fn padding(&self, tokens: &Tensor) -> Result<Tensor> {
        let [_, t] = tokens.dims("text tower")?;
        match self.style.pool {
            TextPool::First => tokens.eq(&tokens.zeros_like()?),
            // 0 is a word in CLIP's vocabulary, so that only the end of the text tells
            TextPool::Largest => Tensor::arange(t, DType::I64)?.gt(&self.pooled(tokens)?),
        }
    }

    /// Tokens `[N, T]` without the columns that are padding in every row, where that changes no result: no token sees
    /// one behind it, and the last that counts is the pooled one. On a GPU they stay, since the host would have to
    /// wait for their number, and a recorded step needs shapes that stay.
    fn trimmed(&self, tokens: &Tensor) -> Result<Tensor> {
        let [_, t] = tokens.dims("text tower")?;
        let unseen = self.style.causal && self.style.pool == TextPool::Largest;
        if !unseen || t > self.config.context_length || tokens.device() != Device::Cpu {
            return Ok(tokens.clone());
        }
        let ends = self.pooled(tokens)?.to_vec::<i64>()?;
        match ends.iter().max() {
            Some(&last) => tokens.narrow(1, 0, last as usize + 1),
            None => Ok(tokens.clone()),
        }
    }

    /// Tokens `[N, T]` (i64) to features `[N, E]`, not normalised. With `ids` `[N, K]`, ascending in each row and
    /// with the pooled position among them, the other tokens are left out.
    ///
    /// # Errors
    /// As [`embed`](Self::embed).
    pub fn forward(&self, tokens: &Tensor, ids: Option<&Tensor>) -> Result<Tensor> {
        let trimmed = if ids.is_none() { self.trimmed(tokens)? } else { tokens.clone() };
        let x = self.embed(&trimmed, ids)?;
        let pooled = match self.style.pool {
            TextPool::First => blocks::first_token(&self.blocks, x)?,
            TextPool::Largest => {
                let kept = ids.map(|ids| tokens.gather(1, ids)).transpose()?;
                let end = self.pooled(kept.as_ref().unwrap_or(&trimmed))?;
                blocks::one_token(&self.blocks, x, |tokens| tokens.gather_tokens(&end))?
            }
        };
        // the norm is one of each token by itself, so that the others need none
        self.norm.forward(&pooled)?.matmul(&self.projection.get())
    }
}
