//! Sizes and official models.

use crate::backbones::{
    BackboneConfig,
    resnet::ResNetConfig,
    vit::{VitConfig, yes},
};
use serde::{Deserialize, Serialize};
use smalti::{Result, ensure};

/// Sizes of the encoders and heads, and the loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MocoV3Config {
    /// The network that is trained.
    pub backbone: BackboneConfig,
    /// Width of queries and keys.
    #[serde(default = "dim")]
    pub dim: usize,
    /// Hidden width of the heads.
    #[serde(default = "mlp_dim")]
    pub mlp_dim: usize,
    /// What cosines are divided by.
    #[serde(rename = "T")]
    pub temperature: f64,
    /// Leave the patch projection at its random start (§4.2). Of no effect on a convolutional stem and on a ResNet.
    #[serde(default = "yes")]
    pub stop_grad_conv1: bool,
}

fn dim() -> usize {
    256
}

fn mlp_dim() -> usize {
    4096
}

impl MocoV3Config {
    /// The official models `vit_small`, `vit_base`, `vit_conv_small`, `vit_conv_base` and `resnet50`, and the paper's
    /// `vit_large` and `vit_huge`.
    pub fn preset(name: &str) -> Option<MocoV3Config> {
        let base = VitConfig::preset("base")?;
        // not DeiT-S, which has 6 heads
        let small = VitConfig { embed_dim: 384, ..base.clone() };
        // one block less pays for the stem
        let conv = |vit: VitConfig| VitConfig { depth: 11, conv_stem: true, ..vit };
        let vit = match name {
            "vit_small" => small,
            "vit_base" => base,
            "vit_conv_small" => conv(small),
            "vit_conv_base" => conv(base),
            "vit_large" => VitConfig::preset("large")?,
            "vit_huge" => VitConfig::preset("huge")?,
            "resnet50" => {
                let resnet = ResNetConfig { zero_init_residual: true, ..ResNetConfig::preset(50)? };
                return Some(MocoV3Config::new(BackboneConfig::ResNet(resnet), 1.0));
            }
            _ => return None,
        };
        Some(MocoV3Config::new(BackboneConfig::Vit(vit), 0.2))
    }

    fn new(backbone: BackboneConfig, temperature: f64) -> MocoV3Config {
        MocoV3Config { backbone, dim: dim(), mlp_dim: mlp_dim(), temperature, stop_grad_conv1: true }
    }

    /// The heads of the two kinds of backbones differ.
    pub(super) fn is_vit(&self) -> bool {
        matches!(self.backbone, BackboneConfig::Vit(_))
    }

    pub(super) fn check(&self) -> Result<()> {
        let MocoV3Config { dim, mlp_dim, temperature, .. } = *self;
        ensure!(dim > 0 && mlp_dim > 0, "moco_v3", "heads have widths {mlp_dim} and {dim}");
        ensure!(
            temperature > 0.0 && temperature.is_finite(),
            "moco_v3",
            "needs a positive temperature, got {temperature}"
        );
        Ok(())
    }
}
