//! MoCo v3: Chen, Xie, He, ICCV 2021 (arXiv 2104.02057).
//!
//! A query encoder with a predictor must find, for one view of an image, the key of the other view among the keys of
//! the whole batch; keys come from a slowly moving copy of the encoder. There is no queue. Parameter names are those
//! of the official checkpoints.

mod config;

pub use config::MocoV3Config;

use crate::backbones::{Backbone, Head, HeadEnd};
use smalti::{
    DType, Result, Rng, Tensor,
    comm::Comm,
    nn::{Param, Params, Statistics},
    no_grad,
    optim::{Schedule, average_into},
};

/// A backbone and its projector: what stands under `base_encoder` and `momentum_encoder`.
#[derive(Clone, Debug)]
pub struct Encoder {
    params: Params,
    backbone: Backbone,
    projector: Head,
}

impl Encoder {
    fn new(params: Params, config: &MocoV3Config, statistics: &Statistics, rng: &mut Rng) -> Result<Encoder> {
        let backbone = Backbone::new(&params, &config.backbone, statistics.clone(), rng)?;
        // A ResNet's projector has one hidden layer less.
        let hidden = if config.is_vit() { 2 } else { 1 };
        let mut widths = vec![config.mlp_dim; hidden + 2];
        (widths[0], widths[hidden + 1]) = (config.backbone.features(), config.dim);
        let name = params.sub(config.backbone.head_name());
        let projector = Head::new(&name, &widths, HeadEnd { bias: false, norm: true }, statistics, rng)?;
        Ok(Encoder { params, backbone, projector })
    }

    /// Images `[N, C, H, W]` to the backbone's features `[N, D]`.
    ///
    /// # Errors
    /// If the images have another size or other channels.
    pub fn features(&self, images: &Tensor, training: bool) -> Result<Tensor> {
        self.backbone.forward(images, training)
    }

    /// Features `[N, D]` to projections `[N, dim]`.
    ///
    /// # Errors
    /// If the width differs, or in training there is one sample only.
    pub fn project(&self, features: &Tensor, training: bool) -> Result<Tensor> {
        self.projector.forward(features, training)
    }

    /// Images `[N, C, H, W]` to projections `[N, dim]`.
    ///
    /// # Errors
    /// As [`features`](Self::features) and [`project`](Self::project).
    pub fn forward(&self, images: &Tensor, training: bool) -> Result<Tensor> {
        self.project(&self.features(images, training)?, training)
    }

    /// What the optimizer or the momentum moves: no running statistics.
    fn moving(&self) -> Vec<Param> {
        self.params.all().into_iter().filter(|p| !p.is_buffer()).collect()
    }
}

/// The model.
#[derive(Clone, Debug)]
pub struct MocoV3 {
    params: Params,
    base: Encoder,
    momentum: Encoder,
    predictor: Head,
    config: MocoV3Config,
    comm: Comm,
}

/// What a step gives. Queries and keys `[N, dim]` are not normalised.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct MocoV3Output {
    /// The sum of both directions, a scalar.
    pub loss: Tensor,
    /// Queries of view 1 against keys of view 2.
    pub loss_q1k2: Tensor,
    /// Queries of view 2 against keys of view 1.
    pub loss_q2k1: Tensor,
    pub q1: Tensor,
    pub q2: Tensor,
    pub k1: Tensor,
    pub k2: Tensor,
}

impl MocoV3 {
    /// A model with the official initialisation. Batch norms take their statistics over the ranks of `comm`
    /// (SyncBN); every rank must come with the same generator.
    ///
    /// # Errors
    /// If the configuration does not fit together.
    pub fn new(config: &MocoV3Config, comm: Comm, rng: &mut Rng) -> Result<MocoV3> {
        config.check()?;
        let (params, statistics) = (Params::new(), Statistics::Ranks(comm.clone()));
        let base = Encoder::new(params.sub("base_encoder"), config, &statistics, rng)?;
        let momentum = Encoder::new(params.sub("momentum_encoder"), config, &statistics, rng)?;
        for (key, query) in momentum.moving().iter().zip(base.moving()) {
            key.set(&query.value())?;
            key.freeze(true);
        }
        // A ResNet's predictor ends without a norm.
        let end = HeadEnd { bias: false, norm: config.is_vit() };
        let widths = [config.dim, config.mlp_dim, config.dim];
        let predictor = Head::new(&params.sub("predictor"), &widths, end, &statistics, rng)?;
        if config.stop_grad_conv1 {
            // A convolutional stem has no parameters of these names, nor does a ResNet.
            let names = ["weight", "bias"].map(|name| format!("base_encoder.patch_embed.proj.{name}"));
            params.freeze(true, |name| names.iter().any(|n| n == name));
        }
        Ok(MocoV3 { params, base, momentum, predictor, config: config.clone(), comm })
    }

    /// All parameters under their official names, without `module.`.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The sizes.
    pub fn config(&self) -> &MocoV3Config {
        &self.config
    }

    /// The encoder of the queries: the product of the training.
    pub fn base(&self) -> &Encoder {
        &self.base
    }

    /// The encoder of the keys.
    pub fn momentum(&self) -> &Encoder {
        &self.momentum
    }

    /// The loss of two views `[N, C, H, W]` of the same images (§3, algorithm 1). Every view has a pass of its own,
    /// view 1 first, and so its own batch statistics. Between queries and keys the key encoder moves towards the
    /// base encoder: k = m k + (1 - m) b for every parameter, frozen ones included, and no buffer.
    ///
    /// # Errors
    /// If the images have another size, the views or the ranks' batches differ in length, or there is one image only.
    pub fn forward(&self, x1: &Tensor, x2: &Tensor, m: f64) -> Result<MocoV3Output> {
        let query = |x: &Tensor| self.predictor.forward(&self.base.forward(x, true)?, true);
        let (q1, q2) = (query(x1)?, query(x2)?);
        let (k1, k2) = no_grad(|| {
            average_into(&self.momentum.moving(), &self.base.moving(), m)?;
            Ok::<_, smalti::Error>((self.momentum.forward(x1, true)?, self.momentum.forward(x2, true)?))
        })?;
        let loss_q1k2 = contrastive_loss(&q1, &k2, self.config.temperature, &self.comm)?;
        let loss_q2k1 = contrastive_loss(&q2, &k1, self.config.temperature, &self.comm)?;
        Ok(MocoV3Output { loss: loss_q1k2.add(&loss_q2k1)?, loss_q1k2, loss_q2k1, q1, q2, k1, k2 })
    }
}

/// One direction: 2 T times the mean cross-entropy of the cosines of this rank's queries `[N, dim]` with the keys of
/// all ranks, over T; the label of row i is i + N * rank. Keys get no gradient. The mean over ranks is the loss of
/// the whole batch.
///
/// # Errors
/// If queries and keys, or the ranks' keys, differ in shape.
pub fn contrastive_loss(q: &Tensor, k: &Tensor, temperature: f64, comm: &Comm) -> Result<Tensor> {
    let unit = |t: &Tensor| t.normalize(2.0, 1, 1e-12);
    let keys = unit(&k.detach())?.all_gather(comm)?;
    let scale = Tensor::full((), 1.0 / temperature, DType::F32)?.to_device(q.device())?;
    let offset = comm.rank() * k.shape()[0];
    unit(q)?.contrastive_cross_entropy(&keys, &scale, offset)?.mul_scalar(2.0 * temperature)
}

/// The momentum at a fractional epoch: `start` at 0, 1 at `epochs`, along half a cosine.
pub fn momentum_at(start: f64, epoch: f64, epochs: f64) -> f64 {
    1.0 - Schedule::Cosine { base: 1.0 - start, min: 0.0, steps: epochs }.at(epoch)
}

#[cfg(test)]
pub(crate) mod tests;
