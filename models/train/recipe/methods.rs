//! What the self-supervised methods have numbers of their own for, one section each.

use super::Dims;
use crate::{
    backbones::{
        resnet::{BlockKind, ResNetConfig, Stem},
        text::TextConfig,
        vit::ImageSize,
    },
    data::Tokenizer,
    flip::{FlipConfig, ImageConfig, TextMasking, Variant},
};
use serde::{Deserialize, Serialize};
use smalti::{Error, Result};
use std::path::PathBuf;

/// `[resnet]`: a residual network in place of `[model]`'s transformer. `[model]` gives `img_size` and `in_chans`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ResNet {
    /// A published depth: 18, 34, 50, 101 or 152.
    pub depth: Option<usize>,
    /// Or the kind of block..
    pub block: Option<BlockKind>,
    /// ..and how many of them each of the four stages has.
    pub layers: Option<[usize; 4]>,
    /// Width of the first stage.
    pub width: usize,
    /// What stands before the stages.
    pub stem: Stem,
    /// Start with every block as the identity.
    pub zero_init_residual: bool,
}

impl Default for ResNet {
    fn default() -> Self {
        let (stem, zero_init_residual) = (Stem::Imagenet, false);
        ResNet { depth: None, block: None, layers: None, width: 64, stem, zero_init_residual }
    }
}

impl ResNet {
    /// The network's configuration.
    ///
    /// # Errors
    /// If neither a published depth nor block and layers are given, or both.
    pub fn config(&self, in_chans: usize) -> Result<ResNetConfig> {
        let sizes = match (self.depth, self.block, self.layers) {
            (Some(depth), None, None) => {
                ResNetConfig::preset(depth).map(|config| (config.block, config.layers))
            }
            (None, Some(block), Some(layers)) => Some((block, layers)),
            _ => None,
        };
        let Some((block, layers)) = sizes else {
            return Err(Error::msg(
                "resnet.depth is none of 18, 34, 50, 101, 152, and not both of resnet.block and resnet.layers stand \
                 in its place",
            ));
        };
        let &ResNet { width, stem, zero_init_residual, .. } = self;
        Ok(ResNetConfig { block, layers, width, stem, in_chans, zero_init_residual })
    }
}

/// `[moco]`: momentum contrast, v1 or v2.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Moco {
    /// Width of queries and keys.
    pub dim: usize,
    /// Keys in the queue; a multiple of the batch.
    pub queue: usize,
    /// Part of the key encoder that stays in each step.
    pub momentum: f64,
    /// Temperature of the loss.
    pub temperature: f64,
    /// A hidden layer in the head: MoCo v2.
    pub mlp: bool,
    /// Loss in both directions (the CIFAR notebook's `--symmetric`).
    pub symmetric: bool,
    /// Groups of a batch that norms treat as batches of their own, which stands for the shuffling over devices.
    pub bn_groups: usize,
}

impl Default for Moco {
    fn default() -> Self {
        Moco {
            dim: 128,
            queue: 65_536,
            momentum: 0.999,
            temperature: 0.07,
            mlp: false,
            symmetric: false,
            bn_groups: 1,
        }
    }
}

/// `[moco_v3]`: contrast within the batch, with a momentum encoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MocoV3 {
    /// Width of queries and keys.
    pub dim: usize,
    /// Hidden width of projector and predictor.
    pub mlp_dim: usize,
    /// Part of the momentum encoder that stays in each step, at first.
    pub momentum: f64,
    /// Momentum along half a cosine to 1 at the end.
    pub momentum_cosine: bool,
    /// Temperature of the loss.
    pub temperature: f64,
    /// Leave the patch projection at its random start.
    pub stop_grad_conv1: bool,
}

impl Default for MocoV3 {
    fn default() -> Self {
        MocoV3 {
            dim: 256,
            mlp_dim: 4096,
            momentum: 0.99,
            momentum_cosine: true,
            temperature: 1.0,
            stop_grad_conv1: false,
        }
    }
}

/// `[simsiam]`: two views, one encoder, a predictor, a gradient that is stopped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SimSiam {
    /// Width of the projections.
    pub dim: usize,
    /// Hidden width of the predictor.
    pub pred_dim: usize,
    /// Layers of the projector: 3, or 2 for CIFAR.
    pub projector_layers: usize,
    /// The predictor's learning rate stays at the peak (`--fix-pred-lr`).
    pub fix_pred_lr: bool,
    /// False shows what the stopped gradient is for: the representation collapses.
    pub stop_gradient: bool,
}

impl Default for SimSiam {
    fn default() -> Self {
        SimSiam { dim: 2048, pred_dim: 512, projector_layers: 3, fix_pred_lr: false, stop_gradient: true }
    }
}

/// Whose two views of a photograph.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ViewKind {
    /// MoCo v1.
    MocoV1,
    /// MoCo v2 and SimSiam.
    #[default]
    MocoV2,
    /// MoCo v3: two different pipelines; `data.crop_min_area` counts.
    MocoV3,
    /// MoCo's notebook for CIFAR-10.
    Cifar,
}

/// `[views]`: the two views of contrastive methods. Photographs take `kind`; the digits take the numbers, together
/// with `data.shift`, `rotate`, `zoom` and `crop_min_area`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Views {
    /// Photographs: whose pipelines.
    pub kind: ViewKind,
    /// Digits: factors of brightness are within this of 1.
    pub brightness: f64,
    /// Digits: factors of contrast are within this of 1.
    pub contrast: f64,
    /// Digits: probability of a blur.
    pub blur: f64,
    /// Digits: its largest sigma, as a share of the side.
    pub sigma: f64,
}

/// `[probe]`: the head of a linear probe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Probe {
    /// A BatchNorm without gain and shift before the linear layer: MAE's probe.
    pub norm: bool,
}

impl Default for Probe {
    fn default() -> Self {
        Probe { norm: true }
    }
}

/// `[flip]`: contrast of images and their captions, with a part of the patches left out. `[model]` has the sizes of
/// the image tower.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flip {
    /// Whose conventions: `official`, or `open_clip`.
    #[serde(default)]
    pub variant: Variant,
    /// Width of the features that images and texts share.
    pub embed_dim: usize,
    /// The text tower.
    pub text: TextConfig,
    /// Part of the patches that is left out in training; 0 for CLIP, and for unmasked tuning.
    #[serde(default = "Flip::half")]
    pub mask_ratio: f64,
    /// Part of a text's tokens that is left out in training.
    #[serde(default)]
    pub text_mask_ratio: f64,
    /// Which tokens go first.
    #[serde(default)]
    pub text_masking: TextMasking,
    /// The activation of OpenAI's weights; `open_clip` only.
    #[serde(default)]
    pub quick_gelu: bool,
    /// BERT's `vocab.txt` (official), or CLIP's `vocab.json`; the digits' own vocabulary if neither this nor `merges`
    /// is given.
    #[serde(default)]
    pub vocab: Option<PathBuf>,
    /// CLIP's byte pairs: `merges.txt` beside `vocab`, or `bpe_simple_vocab_16e6.txt(.gz)` alone.
    #[serde(default)]
    pub merges: Option<PathBuf>,
    /// A `model.safetensors` (or official file) whose weights training begins with, such as unmasked tuning.
    #[serde(default)]
    pub init: Option<PathBuf>,
}

impl Flip {
    fn half() -> f64 {
        0.5
    }

    /// The model's configuration with an image tower of these sizes.
    pub(super) fn config(&self, dims: &Dims) -> FlipConfig {
        FlipConfig {
            variant: self.variant,
            embed_dim: self.embed_dim,
            image: ImageConfig {
                img_size: ImageSize::Square(dims.img_size),
                patch_size: dims.patch_size,
                in_chans: dims.in_chans,
                width: dims.embed_dim,
                layers: dims.depth,
                heads: dims.num_heads,
                mlp_ratio: dims.mlp_ratio,
            },
            text: self.text.clone(),
            mask_ratio: self.mask_ratio,
            text_mask_ratio: self.text_mask_ratio,
            text_masking: self.text_masking,
            quick_gelu: self.quick_gelu,
            image_pool: None,
        }
    }

    /// The tokenizer of the variant.
    ///
    /// # Errors
    /// If a file cannot be read, or is not the one that the variant takes.
    pub(super) fn tokenizer(&self) -> Result<Tokenizer> {
        let length = self.text.context_length;
        match (self.variant, &self.vocab, &self.merges) {
            (Variant::Official, None, None) => Tokenizer::digits_wordpiece(length),
            (Variant::Official, Some(vocab), None) => Tokenizer::wordpiece(vocab, length),
            (Variant::OpenClip, None, None) => Tokenizer::digits_clip(length),
            (Variant::OpenClip, Some(vocab), Some(merges)) => Tokenizer::clip(vocab, merges, length),
            (Variant::OpenClip, None, Some(merges)) => Tokenizer::clip_merges(merges, length),
            (Variant::Official, _, Some(_)) => {
                Err(Error::msg("flip.merges: the official variant takes flip.vocab alone, BERT's vocab.txt"))
            }
            (Variant::OpenClip, Some(_), None) => {
                Err(Error::msg("flip.vocab: the variant open_clip takes flip.merges beside it"))
            }
        }
    }
}
