//! The encoder: a residual network and the head that gives keys.

use super::MocoConfig;
use crate::backbones::resnet::ResNet;
use smalti::{
    DType, Result, Rng, Tensor,
    nn::{Linear, Params, Statistics},
};

/// A residual network whose classifier is replaced: by a linear layer (`fc`) in version 1, by two with a ReLU between
/// them (`fc.0`, `fc.2`) in version 2.
#[derive(Clone, Debug)]
pub struct Encoder {
    backbone: ResNet,
    hidden: Option<Linear>,
    out: Linear,
}

impl Encoder {
    pub(super) fn new(params: &Params, config: &MocoConfig, rng: &mut Rng) -> Result<Encoder> {
        let statistics = match config.bn_splits {
            1 => Statistics::Batch,
            groups => Statistics::Split(groups),
        };
        let backbone = ResNet::new(params, &config.backbone, statistics, rng)?;
        let (fc, width) = (params.sub("fc"), config.backbone.features());
        let (hidden, last) = match config.mlp {
            true => (Some(Linear::new(&fc.sub(0), width, width, true, rng)?), fc.sub(2)),
            false => (None, fc),
        };
        Ok(Encoder { backbone, hidden, out: Linear::new(&last, width, config.dim, true, rng)? })
    }

    /// The network before the head.
    pub fn backbone(&self) -> &ResNet {
        &self.backbone
    }

    /// Images `[N, C, H, W]` to `[N, dim]`, not yet normalised.
    ///
    /// # Errors
    /// If the images have other channels.
    pub fn forward(&self, images: &Tensor, training: bool) -> Result<Tensor> {
        let mut x = self.backbone.forward(images, training)?;
        if let Some(hidden) = &self.hidden {
            x = hidden.forward(&x)?.relu()?;
        }
        self.out.forward(&x)
    }

    /// The same with rows of length 1, in f32: what is compared.
    ///
    /// # Errors
    /// If the images have other channels.
    pub fn normalized(&self, images: &Tensor, training: bool) -> Result<Tensor> {
        self.forward(images, training)?.to_dtype(DType::F32)?.normalize(2.0, 1, 1e-12)
    }
}
