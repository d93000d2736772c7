//! Sizes, and where the two variants differ.

use crate::backbones::{
    text::{TextConfig, TextPool, TextStyle},
    vit::{ImageSize, VitConfig, four, three},
};
use serde::{Deserialize, Serialize};
use smalti::{Result, ensure, nn::Gelu};

/// Whose CLIP with masked images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// The paper's own code.
    #[default]
    Official,
    /// open_clip's CLIP with patch dropout, which also runs CLIP's own weights.
    OpenClip,
}

/// What of the image tower's output stands for the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImagePool {
    /// The mean of all tokens behind the last norm, class token included.
    All,
    /// The class token.
    Class,
    /// The mean of the patches without the class token.
    Patches,
}

/// Which tokens of a text are left out first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TextMasking {
    /// Any.
    Random,
    /// Padding; words only when no padding is left.
    #[default]
    Prioritised,
}

/// Sizes of the image tower.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct ImageConfig {
    pub img_size: ImageSize,
    pub patch_size: usize,
    #[serde(default = "three")]
    pub in_chans: usize,
    pub width: usize,
    pub layers: usize,
    pub heads: usize,
    #[serde(default = "four")]
    pub mlp_ratio: f64,
}

/// Sizes of the model and its variant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlipConfig {
    /// Whose conventions.
    #[serde(default)]
    pub variant: Variant,
    /// Width of the features that images and texts share.
    pub embed_dim: usize,
    /// The image tower.
    pub image: ImageConfig,
    /// The text tower.
    pub text: TextConfig,
    /// Part of the patches that is left out in training; 0 for CLIP, and for unmasked tuning.
    #[serde(default = "half")]
    pub mask_ratio: f64,
    /// Part of a text's tokens that is left out in training. The paper tried it and left it at 0.
    #[serde(default)]
    pub text_mask_ratio: f64,
    /// Which tokens go first.
    #[serde(default)]
    pub text_masking: TextMasking,
    /// The activation of OpenAI's weights; `open_clip` only.
    #[serde(default)]
    pub quick_gelu: bool,
    /// Another pooling than the variant's own.
    #[serde(default)]
    pub image_pool: Option<ImagePool>,
}

fn half() -> f64 {
    0.5
}

/// The differences between the variants.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Style {
    pub image_pool: ImagePool,
    pub ln_pre: bool,
    pub patch_bias: bool,
    /// Sin-cos positions that are not trained, none for the class token.
    pub fixed_positions: bool,
    pub text: TextStyle,
    pub unit: Unit,
    /// Is the logarithm of the scale held within its bounds in the loss? Otherwise the parameter is.
    pub clamp_in_loss: bool,
    /// How few patches may be kept.
    pub least_kept: usize,
    /// Is the largest noise kept, not the smallest?
    pub keep_largest: bool,
}

/// How vectors get length 1.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Unit {
    /// x / (|x| + eps)
    Added(f64),
    /// x / max(|x|, eps)
    Floor(f64),
}

impl Style {
    const OFFICIAL: Style = Style {
        image_pool: ImagePool::All,
        ln_pre: false,
        patch_bias: true,
        fixed_positions: true,
        text: TextStyle { eps: 1e-6, gelu: Gelu::Tanh, causal: false, pool: TextPool::First },
        unit: Unit::Added(1e-8),
        clamp_in_loss: true,
        // the official count is truncated to 0 where open_clip's keeps one; nothing can be pooled then
        least_kept: 0,
        keep_largest: false,
    };
    const OPEN_CLIP: Style = Style {
        image_pool: ImagePool::Class,
        ln_pre: true,
        patch_bias: false,
        fixed_positions: false,
        text: TextStyle { eps: 1e-5, gelu: Gelu::Erf, causal: true, pool: TextPool::Largest },
        unit: Unit::Floor(1e-12),
        clamp_in_loss: false,
        least_kept: 1,
        keep_largest: true,
    };
}

impl FlipConfig {
    /// The paper's `base` (B/16), `large` (L/16) or `huge` (H/14) at 224 pixels: half of the patches masked, 32
    /// word pieces of BERT's vocabulary.
    pub fn official(name: &str) -> Option<FlipConfig> {
        let (image, embed_dim, heads) = match name {
            "base" => ("base", 512, 8),
            "large" => ("large", 768, 12),
            "huge" => ("huge", 1024, 16),
            _ => return None,
        };
        // one row more than BERT's vocabulary, for what is outside of it
        Self::sized(Variant::Official, VitConfig::preset(image)?, embed_dim, heads, [30_523, 32])
    }

    /// open_clip's `ViT-B-16`, `ViT-L-16`, `ViT-L-14` or `ViT-H-14` at 224 pixels: half of the patches masked, 77
    /// tokens of CLIP's vocabulary.
    pub fn open_clip(name: &str) -> Option<FlipConfig> {
        let (image, patch_size, embed_dim, heads) = match name {
            "ViT-B-16" => ("base", 16, 512, 8),
            "ViT-L-16" => ("large", 16, 768, 12),
            "ViT-L-14" => ("large", 14, 768, 12),
            "ViT-H-14" => ("huge", 14, 1024, 16),
            _ => return None,
        };
        let image = VitConfig { patch_size, ..VitConfig::preset(image)? };
        Self::sized(Variant::OpenClip, image, embed_dim, heads, [49_408, 77])
    }

    /// The text tower is as wide as the features. It has 12 layers, 24 in the huge model.
    fn sized(
        variant: Variant,
        image: VitConfig,
        embed_dim: usize,
        heads: usize,
        [vocab_size, context_length]: [usize; 2],
    ) -> Option<FlipConfig> {
        let layers = if image.depth == 32 { 24 } else { 12 };
        Some(FlipConfig {
            variant,
            embed_dim,
            image: ImageConfig {
                img_size: image.img_size,
                patch_size: image.patch_size,
                in_chans: image.in_chans,
                width: image.embed_dim,
                layers: image.depth,
                heads: image.num_heads,
                mlp_ratio: image.mlp_ratio,
            },
            text: TextConfig { vocab_size, context_length, width: embed_dim, layers, heads, mlp_ratio: 4.0 },
            mask_ratio: 0.5,
            text_mask_ratio: 0.0,
            text_masking: TextMasking::default(),
            quick_gelu: false,
            image_pool: None,
        })
    }

    /// The variant's conventions with what this configuration changes in them.
    pub(crate) fn style(&self) -> Style {
        let mut style = match self.variant {
            Variant::Official => Style::OFFICIAL,
            Variant::OpenClip => Style::OPEN_CLIP,
        };
        if self.quick_gelu {
            style.text.gelu = Gelu::Quick;
        }
        style.image_pool = self.image_pool.unwrap_or(style.image_pool);
        style
    }

    /// The image tower's sizes.
    pub fn vit(&self) -> VitConfig {
        let (image, style) = (&self.image, self.style());
        VitConfig {
            img_size: image.img_size,
            patch_size: image.patch_size,
            in_chans: image.in_chans,
            embed_dim: image.width,
            depth: image.layers,
            num_heads: image.heads,
            mlp_ratio: image.mlp_ratio,
            qkv_bias: true,
            layer_norm_eps: style.text.eps,
            gelu: style.text.gelu,
            conv_stem: false,
        }
    }

    /// How many of `length` tokens stay when a part `ratio` goes: `length * (1 - ratio)`, truncated, in f64 as the
    /// official codes have it.
    ///
    /// # Errors
    /// If the ratio is not in 0..1, or nothing would stay.
    pub(crate) fn kept(&self, what: &str, length: usize, ratio: f64) -> Result<usize> {
        let kept = ((length as f64 * (1.0 - ratio)) as usize).max(self.style().least_kept);
        ensure!(
            (0.0..1.0).contains(&ratio) && kept > 0,
            "flip",
            "masking a part {ratio} keeps {kept} of {length} {what}; needs a part from 0 to below 1 that keeps one"
        );
        Ok(kept)
    }

    /// Numbers in all parameters, the fixed position table included, without making any of them.
    ///
    /// # Errors
    /// If the image does not divide into patches.
    pub fn parameters(&self) -> Result<usize> {
        let (image, text, style) = (&self.image, &self.text, self.style());
        let blocks = |layers: usize, width: usize, mlp_ratio: f64| {
            let hidden = (width as f64 * mlp_ratio) as usize;
            let attention = 4 * width * (width + 1);
            let mlp = 2 * width * hidden + hidden + width;
            layers * (4 * width + attention + mlp)
        };
        let patch = image.in_chans * image.patch_size * image.patch_size + usize::from(style.patch_bias);
        let norms = if style.ln_pre { 4 } else { 2 };
        let image_rows = patch + 1 + (1 + self.vit().patches()?) + norms + self.embed_dim;
        let text_rows = text.vocab_size + text.context_length + 2 + self.embed_dim;
        Ok(image_rows * image.width
            + blocks(image.layers, image.width, image.mlp_ratio)
            + text_rows * text.width
            + blocks(text.layers, text.width, text.mlp_ratio)
            + 1)
    }

    pub(crate) fn check(&self) -> Result<()> {
        let official_gelu = self.variant == Variant::OpenClip || !self.quick_gelu;
        ensure!(official_gelu, "flip", "quick_gelu goes with the variant open_clip alone");
        self.kept("patches", self.vit().patches()?, self.mask_ratio)?;
        self.kept("tokens", self.text.context_length, self.text_mask_ratio)?;
        Ok(())
    }
}
