//! SimSiam: Chen, He, CVPR 2021 (arXiv 2011.10566).
//!
//! One encoder sees two views of an image; a predictor on one side must match the other side, through which no
//! gradient flows. There are no negatives, no queue and no momentum encoder. Parameter names are those of the official
//! checkpoints.

use crate::backbones::{
    Head, HeadEnd,
    resnet::{ResNet, ResNetConfig, Stem},
    vit::yes,
};
use serde::{Deserialize, Serialize};
use smalti::{
    Result, Rng, Tensor, ensure,
    nn::{Params, Statistics},
};

/// Sizes of the encoder and the heads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SimSiamConfig {
    /// The network that is trained; the official one has `zero_init_residual`.
    pub backbone: ResNetConfig,
    /// Width of projections and predictions.
    #[serde(default = "dim")]
    pub dim: usize,
    /// Hidden width of the predictor.
    #[serde(default = "pred_dim")]
    pub pred_dim: usize,
    /// Linear layers of the projector: 3, or 2 for CIFAR (appendix D).
    #[serde(default = "projector_layers")]
    pub projector_layers: usize,
    /// Keep gradients from the targets. Without it the model collapses (§4.1): only to show that.
    #[serde(default = "yes")]
    pub stop_gradient: bool,
}

fn dim() -> usize {
    2048
}

fn pred_dim() -> usize {
    512
}

fn projector_layers() -> usize {
    3
}

impl SimSiamConfig {
    /// `imagenet`: ResNet-50 (§3); `cifar`: ResNet-18 for small images, with a projector of two layers (appendix D).
    pub fn preset(name: &str) -> Option<SimSiamConfig> {
        let (depth, stem, projector_layers) = match name {
            "imagenet" => (50, Stem::Imagenet, 3),
            "cifar" => (18, Stem::Cifar, 2),
            _ => return None,
        };
        let backbone = ResNetConfig { stem, zero_init_residual: true, ..ResNetConfig::preset(depth)? };
        let (dim, pred_dim) = (dim(), pred_dim());
        Some(SimSiamConfig { backbone, dim, pred_dim, projector_layers, stop_gradient: true })
    }
}

/// The model.
#[derive(Clone, Debug)]
pub struct SimSiam {
    params: Params,
    backbone: ResNet,
    projector: Head,
    predictor: Head,
    config: SimSiamConfig,
}

/// What a step gives. Projections z and predictions p are `[N, dim]`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct SimSiamOutput {
    /// `-(cos_p1_z2 + cos_p2_z1) / 2`, a scalar from -1 to 1.
    pub loss: Tensor,
    /// Mean cosine of the predictions of view 1 and the projections of view 2.
    pub cos_p1_z2: Tensor,
    /// The other way round.
    pub cos_p2_z1: Tensor,
    pub p1: Tensor,
    pub p2: Tensor,
    pub z1: Tensor,
    pub z2: Tensor,
}

impl SimSiam {
    /// A model with the official initialisation. `statistics`: whose means and variances batch norms take in training
    /// (over all ranks in the official runs).
    ///
    /// # Errors
    /// If a size is 0, or the projector has fewer than two layers.
    pub fn new(config: &SimSiamConfig, statistics: Statistics, rng: &mut Rng) -> Result<SimSiam> {
        let SimSiamConfig { dim, pred_dim, projector_layers: layers, .. } = *config;
        ensure!(
            dim > 0 && pred_dim > 0 && layers > 1,
            "simsiam",
            "needs widths from 1 up and at least two layers in the projector, got {config:?}"
        );
        let params = Params::new();
        let encoder = params.sub("encoder");
        let backbone = ResNet::new(&encoder, &config.backbone, statistics.clone(), rng)?;
        let mut widths = vec![config.backbone.features(); layers];
        widths.push(dim);
        let end = HeadEnd { bias: true, norm: true };
        let projector = Head::new(&encoder.sub("fc"), &widths, end, &statistics, rng)?;
        // Torchvision's layer taken over: the norm behind it would cancel its bias, which is kept and not trained.
        if let Some(bias) = encoder.sub("fc").sub(3 * (layers - 1)).get("bias") {
            bias.freeze(true);
        }
        let end = HeadEnd { bias: true, norm: false };
        let widths = [dim, pred_dim, dim];
        let predictor = Head::new(&params.sub("predictor"), &widths, end, &statistics, rng)?;
        Ok(SimSiam { params, backbone, projector, predictor, config: config.clone() })
    }

    /// All parameters under their official names, without `module.`. Those of the branch `predictor` keep the first
    /// learning rate in the official recipe, while that of the encoder decays.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The sizes.
    pub fn config(&self) -> &SimSiamConfig {
        &self.config
    }

    /// The network without heads: the product of the training.
    pub fn backbone(&self) -> &ResNet {
        &self.backbone
    }

    /// The head behind the backbone: `encoder.fc`.
    pub fn projector(&self) -> &Head {
        &self.projector
    }

    /// The head behind the projections.
    pub fn predictor(&self) -> &Head {
        &self.predictor
    }

    /// Images `[N, C, H, W]` to projections z and predictions p, `[N, dim]` both.
    ///
    /// # Errors
    /// If the images have other channels, or in training there is one only.
    pub fn encode(&self, images: &Tensor, training: bool) -> Result<[Tensor; 2]> {
        let z = self.projector.forward(&self.backbone.forward(images, training)?, training)?;
        let p = self.predictor.forward(&z, training)?;
        Ok([z, p])
    }

    /// The loss of two views `[N, C, H, W]` of the same images (§3, algorithm 1). Every view has a pass of its own,
    /// view 1 first, and so its own batch statistics.
    ///
    /// # Errors
    /// If the images have other channels, the views differ in number, or there is one image only.
    pub fn forward(&self, x1: &Tensor, x2: &Tensor) -> Result<SimSiamOutput> {
        let [z1, p1] = self.encode(x1, true)?;
        let [z2, p2] = self.encode(x2, true)?;
        let target = |z: Tensor| if self.config.stop_gradient { z.detach() } else { z };
        let (z1, z2) = (target(z1), target(z2));
        let cos = |p: &Tensor, z: &Tensor| p.cosine_similarity(z, 1, 1e-8)?.mean(());
        let (cos_p1_z2, cos_p2_z1) = (cos(&p1, &z2)?, cos(&p2, &z1)?);
        let loss = cos_p1_z2.add(&cos_p2_z1)?.mul_scalar(-0.5)?;
        Ok(SimSiamOutput { loss, cos_p1_z2, cos_p2_z1, p1, p2, z1, z2 })
    }
}

/// The sign of collapse, which the loss cannot tell: the deviation of each channel of normalised projections
/// `[N, dim]` over the batch, averaged over channels (§4.1). Near 1 / sqrt(dim) in a healthy run, 0 in a collapsed one.
///
/// # Errors
/// If `z` is no matrix of floats.
pub fn z_norm_std(z: &Tensor) -> Result<Tensor> {
    z.detach().normalize(2.0, 1, 1e-12)?.var(0, 0)?.sqrt()?.mean(())
}

#[cfg(test)]
mod tests;
