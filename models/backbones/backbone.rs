//! Images to one vector each: what the heads of contrastive learning and linear classifiers are put on.

use super::{
    resnet::{ResNet, ResNetConfig},
    stem::Stem,
    vit::{Encoder, VitConfig, init_linears},
};
use serde::{Deserialize, Serialize};
use smalti::{
    Result, Rng, Tensor,
    nn::{LayerNorm, Params, Statistics, init, pos_embed},
};

/// Kind and sizes of a [`Backbone`]: `vit = { .. }` or `resnet = { .. }` in recipes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackboneConfig {
    /// A vision transformer, of which the class token is taken.
    Vit(VitConfig),
    /// A residual network, of which the mean over places is taken.
    ResNet(ResNetConfig),
}

impl BackboneConfig {
    /// Width of the vector.
    pub fn features(&self) -> usize {
        match self {
            BackboneConfig::Vit(config) => config.embed_dim,
            BackboneConfig::ResNet(config) => config.features(),
        }
    }

    /// The name of what stands behind the backbone in official checkpoints.
    pub fn head_name(&self) -> &'static str {
        match self {
            BackboneConfig::Vit(_) => "head",
            BackboneConfig::ResNet(_) => "fc",
        }
    }
}

/// A network without its head.
#[derive(Clone, Debug)]
pub enum Backbone {
    /// Vision transformer.
    Vit(ClassTokenVit),
    /// Residual network.
    ResNet(ResNet),
}

impl Backbone {
    /// Registers the names of timm or torchvision in `params`. `statistics`: whose means and variances batch norms
    /// take in training.
    ///
    /// # Errors
    /// If the sizes do not fit together.
    pub fn new(
        params: &Params,
        config: &BackboneConfig,
        statistics: Statistics,
        rng: &mut Rng,
    ) -> Result<Backbone> {
        Ok(match config {
            BackboneConfig::Vit(vit) => Backbone::Vit(ClassTokenVit::new(params, vit, statistics, rng)?),
            BackboneConfig::ResNet(net) => Backbone::ResNet(ResNet::new(params, net, statistics, rng)?),
        })
    }

    /// Images `[N, C, H, W]` to features `[N, D]`.
    ///
    /// # Errors
    /// If the images have another size or other channels.
    pub fn forward(&self, images: &Tensor, training: bool) -> Result<Tensor> {
        match self {
            Backbone::Vit(vit) => vit.forward(images, training),
            Backbone::ResNet(net) => net.forward(images, training),
        }
    }
}

/// The vision transformer of MoCo v3: fixed positions (row first), a class token, a norm behind the blocks.
/// Initialisation as in `vits.py`.
#[derive(Clone, Debug)]
pub struct ClassTokenVit {
    encoder: Encoder,
    norm: LayerNorm,
}

impl ClassTokenVit {
    /// Registers timm's names in `params`; the position table is frozen.
    ///
    /// # Errors
    /// If the sizes do not fit together.
    pub fn new(params: &Params, config: &VitConfig, statistics: Statistics, rng: &mut Rng) -> Result<Self> {
        let ([rows, columns], width) = (config.grid()?, config.embed_dim);
        let table = pos_embed::sin_cos_2d(width, rows, columns, pos_embed::First::Row)?;
        let cls_token = params.param("cls_token", init::normal([1, 1, width], 1e-6, rng)?)?;
        let positions = params.param("pos_embed", pos_embed::with_class_rows(&table, 1)?)?;
        positions.freeze(true);
        let stem = Stem::new(&params.sub("patch_embed"), config, statistics, rng)?;
        let encoder = Encoder::behind(stem, params, [cls_token, positions], config, 0.0, rng)?;
        let norm = LayerNorm::new(&params.sub("norm"), width, config.layer_norm_eps)?;
        init_linears(params, rng)?;
        for qkv in params.all().iter().filter(|p| p.name().ends_with("attn.qkv.weight")) {
            // three matrices to Xavier, not one of 3 D rows
            qkv.set(&init::uniform([3 * width, width], (3.0 / width as f64).sqrt(), rng)?)?;
        }
        if let Some(bias) = params.get("patch_embed.proj.bias") {
            bias.set(&init::zeros([width])?)?;
        }
        Ok(ClassTokenVit { encoder, norm })
    }

    /// Images `[N, C, H, W]` to the class token behind the norm, `[N, D]`.
    ///
    /// # Errors
    /// If the images have another size or other channels.
    pub fn forward(&self, images: &Tensor, training: bool) -> Result<Tensor> {
        self.norm.forward(&self.encoder.class_token(images, training)?)
    }
}
