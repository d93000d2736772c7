//! Momentum contrast: He, Fan, Wu, Xie, Girshick, CVPR 2020 (arXiv 1911.05722), and its second version: Chen, Fan,
//! Girshick, He (arXiv 2003.04297).
//!
//! A query, one view of an image, must find its key, another view of it, among keys of other images. These come out
//! of a queue, so that there are many of them whatever the batch; and out of an encoder that follows the trained one
//! slowly, so that old keys are comparable with new ones. Parameter names are those of the official checkpoints.

mod encoder;
mod queue;
mod shuffle;
#[cfg(test)]
mod tests;

pub use encoder::Encoder;

use crate::backbones::{
    checkpoint,
    resnet::{ResNetConfig, Stem},
};
use queue::Queue;
use serde::{Deserialize, Serialize};
use smalti::{
    DType, InfoNce, Result, Rng, Tensor,
    comm::Comm,
    ensure,
    nn::{LoadReport, Param, Params},
    no_grad,
    optim::average_into,
};

const OP: &str = "moco";

/// Sizes of the model and its loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MocoConfig {
    /// The encoders' network.
    pub backbone: ResNetConfig,
    /// Width of a key.
    #[serde(default = "dim")]
    pub dim: usize,
    /// Keys in the queue: K. The keys of a step must divide it.
    pub queue: usize,
    /// Share of its old parameters that the key encoder keeps at each step: m.
    pub momentum: f64,
    /// What similarities are divided by: T.
    pub temperature: f64,
    /// A hidden layer in the head, as in version 2.
    #[serde(default)]
    pub mlp: bool,
    /// Each view is query once and key once, as the CIFAR notebook offers; the loss is the sum of both.
    #[serde(default)]
    pub symmetric: bool,
    /// Groups of the batch with norms of their own: on one device they do what several devices do for shuffling BN.
    #[serde(default = "one")]
    pub bn_splits: usize,
}

fn dim() -> usize {
    128
}

fn one() -> usize {
    1
}

impl MocoConfig {
    /// `v1` and `v2` as published, on a ResNet-50; `cifar` as in the official notebook, on a ResNet-18.
    pub fn preset(name: &str) -> Option<MocoConfig> {
        let (depth, queue, momentum, temperature) = match name {
            "v1" => (50, 65536, 0.999, 0.07),
            "v2" => (50, 65536, 0.999, 0.2),
            "cifar" => (18, 4096, 0.99, 0.1),
            _ => return None,
        };
        let (mut backbone, mut bn_splits) = (ResNetConfig::preset(depth)?, 1);
        if name == "cifar" {
            (backbone.stem, bn_splits) = (Stem::Cifar, 8);
        }
        let (mlp, symmetric) = (name == "v2", false);
        Some(MocoConfig { backbone, dim: dim(), queue, momentum, temperature, mlp, symmetric, bn_splits })
    }

    /// Can ranks with `batch` images each train? For what is to be known before training begins; every step asks too.
    ///
    /// # Errors
    /// If the keys of a step do not divide the queue.
    pub fn check_batch(&self, batch: usize, world: usize) -> Result<()> {
        let keys = batch * world * self.directions();
        ensure!(
            keys > 0 && self.queue.is_multiple_of(keys),
            OP,
            "a queue of {} keys does not divide into steps of {keys} ({world} ranks, {batch} images each, {} keys \
             an image); choose another batch or drop the last, incomplete one",
            self.queue,
            self.directions()
        );
        Ok(())
    }

    fn check(&self) -> Result<()> {
        ensure!(
            self.dim > 0 && self.queue > 0,
            OP,
            "needs keys with a width, got {} of {}",
            self.queue,
            self.dim
        );
        ensure!((0.0..=1.0).contains(&self.momentum), OP, "the momentum is {}", self.momentum);
        let warm = self.temperature > 0.0 && self.temperature.is_finite();
        ensure!(warm, OP, "needs a positive temperature, got {}", self.temperature);
        Ok(())
    }

    fn directions(&self) -> usize {
        if self.symmetric { 2 } else { 1 }
    }
}

/// The model. Registers `queue`, `queue_ptr`, `encoder_q.*`, `encoder_k.*`, in this order.
#[derive(Clone, Debug)]
pub struct Moco {
    params: Params,
    queue: Queue,
    encoder_q: Encoder,
    encoder_k: Encoder,
    /// Parameters of the one and of the other encoder, pair by pair.
    pairs: (Vec<Param>, Vec<Param>),
    comm: Comm,
    config: MocoConfig,
}

/// What a forward pass gives.
#[derive(Clone, Debug)]
pub struct MocoOutput {
    /// Mean over this rank's queries, f32, a scalar; with both directions the sum of the two. A step goes along the
    /// mean of all ranks' gradients.
    pub loss: Tensor,
    /// Normalised queries of this rank `[N, dim]`; with both directions those of the first view, then those of the
    /// second, `[2N, dim]`.
    pub q: Tensor,
    /// Normalised keys of this rank, untracked, in the same order: row i is the key of the *image* of row i; the
    /// positive of a query is the key of the other view.
    pub k: Tensor,
    /// How often the positive was the most similar of all 1 + K keys, percent of this rank's queries, f32, a scalar.
    pub acc1: Tensor,
    /// How often it was among the five most similar.
    pub acc5: Tensor,
}

impl Moco {
    /// A model with the official initialisation: torchvision's for the encoders, which are equal, and normalised
    /// random keys. The key encoder is frozen. All ranks start with what rank 0 draws.
    ///
    /// # Errors
    /// If the configuration does not fit together, or another rank failed.
    pub fn new(config: &MocoConfig, comm: &Comm, rng: &mut Rng) -> Result<Moco> {
        config.check()?;
        let params = Params::new();
        let queue = Queue::new(&params, config.dim, config.queue, rng)?;
        let encoder_q = Encoder::new(&params.sub("encoder_q"), config, rng)?;
        let encoder_k = Encoder::new(&params.sub("encoder_k"), config, rng)?;
        let of = |name: &str| -> Vec<Param> {
            params.sub(name).all().into_iter().filter(|p| !p.is_buffer()).collect()
        };
        let pairs = (of("encoder_q"), of("encoder_k"));
        if comm.world() > 1 {
            for param in params.all() {
                param.set(&param.value().broadcast_from(0, comm)?)?;
            }
        }
        for (q, k) in pairs.0.iter().zip(&pairs.1) {
            k.set(&q.value())?;
            k.freeze(true);
        }
        Ok(Moco { params, queue, encoder_q, encoder_k, pairs, comm: comm.clone(), config: config.clone() })
    }

    /// All parameters and buffers under their official names.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The sizes.
    pub fn config(&self) -> &MocoConfig {
        &self.config
    }

    /// The trained encoder.
    pub fn encoder_q(&self) -> &Encoder {
        &self.encoder_q
    }

    /// The one that follows it.
    pub fn encoder_k(&self) -> &Encoder {
        &self.encoder_k
    }

    /// One training step up to the loss, in the order of the official code (algorithm 1, §3.3): queries; the key
    /// encoder moves; keys, shuffled over ranks; the loss against the queue as it was; the keys enter the queue.
    ///
    /// `im_q` and `im_k` `[N, C, H, W]` are two views of this rank's images; every rank calls it with as many. It
    /// changes the model: running statistics of both encoders, parameters of the key encoder, queue and pointer. The
    /// optimizer's step comes after it; the next call reads the weights that it leaves. Running statistics stay each
    /// rank's own, and those of rank 0 are what is saved.
    ///
    /// # Errors
    /// If shapes do not fit, the keys of a step do not divide the queue, the encoders are in half precision, or
    /// another rank failed.
    pub fn forward(&self, im_q: &Tensor, im_k: &Tensor, rng: &mut Rng) -> Result<MocoOutput> {
        let all = im_q.dim(0)? * self.comm.world();
        let permutations: Vec<Tensor> =
            (0..self.config.directions()).map(|_| shuffle::permutation(all, rng)).collect::<Result<_>>()?;
        self.forward_permuted(im_q, im_k, &permutations)
    }

    /// [`forward`](Self::forward) with the order in which keys are encoded given: a permutation of the images of all
    /// ranks, i64 `[N * world]`, for each direction. That of rank 0 counts.
    ///
    /// # Errors
    /// As `forward`, and if they are no such permutations.
    pub fn forward_permuted(
        &self,
        im_q: &Tensor,
        im_k: &Tensor,
        permutations: &[Tensor],
    ) -> Result<MocoOutput> {
        self.check_step(im_q, im_k, permutations)?;
        let t = self.config.temperature;
        let queue = self.queue.keys();
        let nce = |q: &Tensor, k: &Tensor| q.info_nce(k, &queue, t);
        let q1 = self.encoder_q.normalized(im_q, true)?;
        self.move_key_encoder()?;
        let k2 = self.keys(im_k, &permutations[0])?;
        let first = nce(&q1, &k2)?;
        let out = match permutations.get(1) {
            None => MocoOutput::new(first.loss, q1, k2, &first.rank)?,
            Some(permutation) => {
                let q2 = self.encoder_q.normalized(im_k, true)?;
                let k1 = self.keys(im_q, permutation)?;
                let second = nce(&q2, &k1)?;
                let rows = |a: &Tensor, b: &Tensor| Tensor::cat(&[a, b], 0);
                let InfoNce { loss, rank } = second;
                let (loss, rank) = (first.loss.add(&loss)?, rows(&first.rank, &rank)?);
                MocoOutput::new(loss, rows(&q1, &q2)?, rows(&k1, &k2)?, &rank)?
            }
        };
        self.queue.enqueue(&out.k.all_gather(&self.comm)?)?;
        Ok(out)
    }

    fn check_step(&self, im_q: &Tensor, im_k: &Tensor, permutations: &[Tensor]) -> Result<()> {
        let shapes = (im_q.shape(), im_k.shape());
        ensure!(shapes.0 == shapes.1, OP, "queries are {:?}, keys {:?}", shapes.0, shapes.1);
        let (batch, world, directions) = (im_q.dim(0)?, self.comm.world(), self.config.directions());
        self.config.check_batch(batch, world)?;
        let given = permutations.len();
        ensure!(
            given == directions,
            OP,
            "needs a permutation for each of {directions} directions, got {given}"
        );
        permutations.iter().try_for_each(|p| shuffle::check(p, batch * world))?;
        let dtype = self.pairs.1.first().map_or(DType::F32, |p| p.value().dtype());
        // 1 - m is below what bf16 can add to a number: the key encoder would stand still
        ensure!(!dtype.is_half(), OP, "the key encoder moves by too little for {dtype}; train in f32");
        Ok(())
    }

    /// k = m k + (1 - m) q over parameters. Running statistics follow the key encoder's own batches.
    fn move_key_encoder(&self) -> Result<()> {
        average_into(&self.pairs.1, &self.pairs.0, self.config.momentum)
    }

    /// Normalised keys of this rank's images `[N, dim]`, with norms over the images of a shuffled batch (§3.3).
    fn keys(&self, images: &Tensor, permutation: &Tensor) -> Result<Tensor> {
        no_grad(|| {
            let encode = |x: &Tensor| self.encoder_k.normalized(x, true);
            shuffle::shuffled(images, permutation, &self.comm, encode)
        })
    }

    /// What the k-nearest-neighbour monitor compares: the query encoder's normalised output `[N, dim]` in evaluation,
    /// untracked.
    ///
    /// # Errors
    /// If the images have other channels.
    pub fn features(&self, images: &Tensor) -> Result<Tensor> {
        no_grad(|| self.encoder_q.normalized(images, false))
    }

    /// Loads a whole model, with or without `module.` before its names: `io::load(path)?.tensors()`. Files that are
    /// published for transfer hold the query encoder alone; these go into a backbone, by
    /// [`checkpoint::load_backbone`].
    ///
    /// # Errors
    /// If a name is missing (counters of batches may) or too much, or a shape does not fit; nothing has been changed
    /// then.
    pub fn load(&self, tensors: Vec<(String, Tensor)>) -> Result<LoadReport> {
        checkpoint::load_model(&self.params, tensors)
    }

    /// Writes a whole model as the official training does: a `.pth`, below `state_dict`, `module.` before its names.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<std::path::Path>) -> Result<()> {
        checkpoint::save_model(&self.params, path)
    }

    /// The trained backbone without head under torchvision's names.
    pub fn backbone(&self) -> Vec<(String, Tensor)> {
        checkpoint::without_head(self.params.sub("encoder_q").tensors(), "fc.")
    }
}

impl MocoOutput {
    fn new(loss: Tensor, q: Tensor, k: Tensor, rank: &Tensor) -> Result<MocoOutput> {
        let within = |n: usize| {
            let limit = rank.full_like(n as f64)?;
            rank.lt(&limit)?.to_dtype(DType::F32)?.mean(())?.mul_scalar(100.0)
        };
        Ok(MocoOutput { loss, q, k, acc1: within(1)?, acc5: within(5)? })
    }
}
