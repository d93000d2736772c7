//! Which patches and tokens stay in training (FLIP §3.1 and table 1d).

use super::{Flip, TextMasking};
use smalti::{DType, Result, Rng, Tensor, ensure};

/// What a training step encodes. The default is everything, as in evaluation.
#[derive(Clone, Debug, Default)]
pub struct Masking {
    /// Patches that stay, each image's own, `[N, K]` i64; in any order.
    pub image: Option<Tensor>,
    /// Positions of tokens that stay, `[N, K]` i64, ascending.
    pub text: Option<Tensor>,
}

impl Flip {
    /// A masking for the images that belong to tokens `[N, T]` and, if the configuration asks for it, the tokens
    /// themselves. Parts of 0 leave everything in.
    ///
    /// # Errors
    /// If `tokens` is no matrix.
    pub fn random_masking(&self, tokens: &Tensor, rng: &mut Rng) -> Result<Masking> {
        let [n, t] = tokens.dims("flip")?;
        let config = self.config();
        let mut masking = Masking::default();
        if config.mask_ratio > 0.0 {
            let patches = config.vit().patches()?;
            let kept = config.kept("patches", patches, config.mask_ratio)?;
            masking.image = Some(Tensor::random_masking(n, patches, kept, rng)?.0);
        }
        if config.text_mask_ratio > 0.0 {
            masking.text = Some(self.keep_tokens(tokens, &Tensor::rand([n, t], rng)?)?);
        }
        Ok(masking)
    }

    /// The patches that this noise `[N, L]` keeps, in its order: those of the smallest noise (official), or of the
    /// largest (open_clip). The distribution is the same; noise from a file wants the right one.
    ///
    /// # Errors
    /// If the noise has another shape.
    pub fn keep_patches(&self, noise: &Tensor) -> Result<Tensor> {
        let [_, l] = noise.dims("flip")?;
        let patches = self.config().vit().patches()?;
        ensure!(l == patches, "flip", "noise for {l} patches, the model has {patches}");
        let kept = self.config().kept("patches", patches, self.config().mask_ratio)?;
        let noise = if self.style.keep_largest { noise.neg()? } else { noise.clone() };
        Ok(noise.random_masking_ids(kept)?.0)
    }

    /// The positions of tokens `[N, T]` that noise `[N, T]` in 0..1 keeps, `[N, K]`, those of the smallest.
    /// Prioritised masking drops padding first.
    ///
    /// The token that stands for the text always stays, and positions ascend: the first token is still the first
    /// (or the last word the last), and a causal tower still reads forwards. The paper leaves both open.
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn keep_tokens(&self, tokens: &Tensor, noise: &Tensor) -> Result<Tensor> {
        let [_, t] = tokens.dims("flip")?;
        ensure!(
            noise.shape() == tokens.shape(),
            "flip",
            "noise {:?} for tokens {:?}",
            noise.shape(),
            tokens.shape()
        );
        let kept = self.config().kept("tokens", t, self.config().text_mask_ratio)?;
        let mut noise = noise.clone();
        if self.config().text_masking == TextMasking::Prioritised {
            noise = noise.add(&self.text().padding(tokens)?.to_dtype(noise.dtype())?)?;
        }
        let pooled = Tensor::arange(t, DType::I64)?.eq(&self.text().pooled(tokens)?)?;
        let (_, ids) = noise.masked_fill(&pooled, -1.0)?.topk(kept, 1, false)?;
        Ok(ids.sort(1, false)?.0)
    }
}
