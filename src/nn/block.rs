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
    pub fn forward(&self, x: &Tensor, rng: Option<&mut Rng>) -> Result<Tensor> {
        self.forward_kept(x, |tokens| Ok(tokens.clone()), rng)
    }

    /// The outputs at some tokens alone: what `keep` makes of `[B, S, D]`, `[B, K, D]`. All tokens are attended to; what
    /// comes behind the attention is computed for these only. So the last block costs a quarter where one token, such
    /// as the class token, stands for all.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), or if `keep` fails.
    #[track_caller]
    pub fn forward_kept(
        &self,
        x: &Tensor,
        keep: impl Fn(&Tensor) -> Result<Tensor>,
        mut rng: Option<&mut Rng>,
    ) -> Result<Tensor> {
        let mut branch = |y: Tensor| match rng.as_deref_mut() {
            Some(rng) if self.drop_path > 0.0 => y.drop_path(self.drop_path, rng),
            _ => Ok(y),
        };
        let attended = keep(&self.attn.attend(&self.norm1.forward(x)?)?)?;
        let attended = branch(self.attn.project(&attended)?)?;
        let (x, normed) = self.norm2.forward_add(&keep(x)?, &attended)?;
        x.add(&branch(self.mlp.forward(&normed)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: &Tensor, b: &Tensor) -> Result<bool> {
        Ok(a.shape() == b.shape() && a.detach().sub(&b.detach())?.abs()?.amax(())?.item()? < 1e-5)
    }

    /// Outputs and gradients at some tokens are those of the whole block.
    #[test]
    fn some_tokens_alone() -> Result<()> {
        let params = Params::new();
        let config = BlockConfig {
            width: 8,
            heads: 2,
            mlp_ratio: 2.0,
            qkv_bias: true,
            eps: 1e-5,
            gelu: Gelu::Erf,
            drop_path: 0.5,
            causal: true,
            names: BlockNames::CLIP,
        };
        let block = Block::new(&params, config, &mut Rng::new(0))?;
        let x = Tensor::randn([4, 5, 8], &mut Rng::new(1))?.requires_grad();
        let ids = Tensor::from_slice(&[2i64, 0, 4, 1], [4, 1])?;
        let keep = |tokens: &Tensor| tokens.gather_tokens(&ids);
        let (mut first, mut second) = (Rng::new(2), Rng::new(2));
        let all = keep(&block.forward(&x, Some(&mut first))?)?;
        let some = block.forward_kept(&x, keep, Some(&mut second))?;
        assert!(close(&all, &some)?);
        let grads = [&all, &some].map(|y| y.mul(y).and_then(|y| y.sum(())).and_then(|loss| loss.backward()));
        let [Ok(all), Ok(some)] = grads else { panic!("no gradients") };
        assert!(close(all.get(&x).unwrap(), some.get(&x).unwrap())?);
        for param in params.trained() {
            assert!(close(all.get(&param).unwrap(), some.get(&param).unwrap())?, "{}", param.name());
        }
        Ok(())
    }
}
