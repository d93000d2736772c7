//! The network's sizes.

use crate::{
    backbones::vit::{ImageSize, VitConfig},
    mae::MaeConfig,
};
use serde::{Deserialize, Serialize};
use smalti::{Error, Result, nn::Gelu};

/// Published sizes of the encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Size {
    /// ViT-S/16 with 12 heads, as MoCo v3 has it
    Small,
    /// ViT-B/16
    Base,
    /// ViT-L/16
    Large,
    /// ViT-H/14
    Huge,
}

/// The network: a published size, or numbers, or a size with some numbers replaced.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Model {
    /// A published size; the numbers below take its place where given.
    pub size: Option<Size>,
    /// Side of the image, pixels.
    pub img_size: Option<usize>,
    /// Side of a patch, pixels.
    pub patch_size: Option<usize>,
    /// Channels of the image: 1 or 3.
    pub in_chans: Option<usize>,
    /// Width of the encoder.
    pub embed_dim: Option<usize>,
    /// Blocks of the encoder.
    pub depth: Option<usize>,
    /// Heads of the encoder.
    pub num_heads: Option<usize>,
    /// Width of the decoder.
    pub decoder_embed_dim: Option<usize>,
    /// Blocks of the decoder.
    pub decoder_depth: Option<usize>,
    /// Heads of the decoder.
    pub decoder_num_heads: Option<usize>,
    /// Hidden width of the perceptrons over the width of the block.
    pub mlp_ratio: Option<f64>,
    /// Share of the patches that are hidden.
    pub mask_ratio: Option<f64>,
    /// Predict patches normalised one by one.
    pub norm_pix_loss: Option<bool>,
    /// A stack of convolutions in place of the patch projection (MoCo v3's ConvStem).
    pub conv_stem: Option<bool>,
}

/// [`Model`] with every number known.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct Dims {
    pub img_size: usize,
    pub patch_size: usize,
    pub in_chans: usize,
    pub embed_dim: usize,
    pub depth: usize,
    pub num_heads: usize,
    pub decoder_embed_dim: usize,
    pub decoder_depth: usize,
    pub decoder_num_heads: usize,
    pub mlp_ratio: f64,
    pub mask_ratio: f64,
    pub norm_pix_loss: bool,
    pub conv_stem: bool,
}

impl Dims {
    /// As the configuration of an encoder alone.
    pub fn vit(&self) -> VitConfig {
        VitConfig { conv_stem: self.conv_stem, ..self.mae().vit() }
    }

    /// As the model's configuration.
    pub fn mae(&self) -> MaeConfig {
        MaeConfig {
            img_size: ImageSize::Square(self.img_size),
            patch_size: self.patch_size,
            in_chans: self.in_chans,
            embed_dim: self.embed_dim,
            depth: self.depth,
            num_heads: self.num_heads,
            decoder_embed_dim: self.decoder_embed_dim,
            decoder_depth: self.decoder_depth,
            decoder_num_heads: self.decoder_num_heads,
            mlp_ratio: self.mlp_ratio,
            qkv_bias: true,
            layer_norm_eps: 1e-6,
            gelu: Gelu::Erf,
            mask_ratio: self.mask_ratio,
            norm_pix_loss: self.norm_pix_loss,
            target_eps: 1e-6,
        }
    }
}

impl Model {
    /// Side of the image, pixels.
    pub fn img_size(&self) -> usize {
        self.img_size.unwrap_or(224)
    }

    /// Channels of the image.
    pub fn in_chans(&self) -> usize {
        self.in_chans.unwrap_or(3)
    }

    /// A key that is given and that only a transformer has.
    pub(super) fn transformer_key(&self) -> Option<&'static str> {
        let keys = [
            ("size", self.size.is_some()),
            ("patch_size", self.patch_size.is_some()),
            ("embed_dim", self.embed_dim.is_some()),
            ("depth", self.depth.is_some()),
            ("num_heads", self.num_heads.is_some()),
            ("mlp_ratio", self.mlp_ratio.is_some()),
            ("conv_stem", self.conv_stem.is_some()),
        ];
        let given = keys.into_iter().find(|(_, given)| *given).map(|(key, _)| key);
        given.or_else(|| self.autoencoder_key())
    }

    /// A key that is given and that only a masked autoencoder has.
    pub(super) fn autoencoder_key(&self) -> Option<&'static str> {
        let keys = [
            ("decoder_embed_dim", self.decoder_embed_dim.is_some()),
            ("decoder_depth", self.decoder_depth.is_some()),
            ("decoder_num_heads", self.decoder_num_heads.is_some()),
            ("mask_ratio", self.mask_ratio.is_some()),
            ("norm_pix_loss", self.norm_pix_loss.is_some()),
        ];
        keys.into_iter().find(|(_, given)| *given).map(|(key, _)| key)
    }

    /// All numbers.
    ///
    /// # Errors
    /// If there is no `size` and one of patch size, width, depth or heads is missing.
    pub fn dims(&self) -> Result<Dims> {
        let preset = self.size.map(|size| match size {
            Size::Small => (16, 384, 12, 12),
            Size::Base => (16, 768, 12, 12),
            Size::Large => (16, 1024, 24, 16),
            Size::Huge => (14, 1280, 32, 16),
        });
        let known = |given: Option<usize>, preset: Option<usize>, key: &str| {
            given.or(preset).ok_or_else(|| {
                Error::msg(format!(
                    "recipe: model.{key} is missing (or give model.size: small, base, large, huge)"
                ))
            })
        };
        Ok(Dims {
            img_size: self.img_size(),
            patch_size: known(self.patch_size, preset.map(|p| p.0), "patch_size")?,
            in_chans: self.in_chans(),
            embed_dim: known(self.embed_dim, preset.map(|p| p.1), "embed_dim")?,
            depth: known(self.depth, preset.map(|p| p.2), "depth")?,
            num_heads: known(self.num_heads, preset.map(|p| p.3), "num_heads")?,
            decoder_embed_dim: self.decoder_embed_dim.unwrap_or(512),
            decoder_depth: self.decoder_depth.unwrap_or(8),
            decoder_num_heads: self.decoder_num_heads.unwrap_or(16),
            mlp_ratio: self.mlp_ratio.unwrap_or(4.0),
            mask_ratio: self.mask_ratio.unwrap_or(0.75),
            norm_pix_loss: self.norm_pix_loss.unwrap_or(true),
            conv_stem: self.conv_stem.unwrap_or(false),
        })
    }
}
