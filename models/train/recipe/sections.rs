//! What a recipe says beside the network.

use crate::train::trainer::Length;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Where images come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The handwritten digits that are part of the program.
    Digits,
    /// A folder of images; in class folders where labels are needed.
    Folder,
}

/// Mean and deviation of the channels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Normalization {
    /// ImageNet's; of its grey value for one channel.
    #[default]
    Imagenet,
    /// CIFAR-10's.
    Cifar10,
}

/// Images and their augmentation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Where images come from.
    pub source: Source,
    /// The folder; `--data` sets it.
    #[serde(default)]
    pub folder: Option<PathBuf>,
    /// Images that go through the network at a time.
    pub batch: usize,
    /// Folders: the random crop has at least this share of the image's area.
    #[serde(default = "Data::min_area")]
    pub crop_min_area: f64,
    /// Folders: probability of mirroring.
    #[serde(default = "Data::half")]
    pub flip: f64,
    /// Digits: shift, up to this share of the side each way.
    #[serde(default)]
    pub shift: f64,
    /// Digits: rotation, up to this many degrees each way.
    #[serde(default)]
    pub rotate: f64,
    /// Digits: scaling, up to this share smaller or larger.
    #[serde(default)]
    pub zoom: f64,
    /// Folders: what the channels are normalised by.
    #[serde(default)]
    pub normalize: Normalization,
}

impl Data {
    fn min_area() -> f64 {
        0.2
    }
    fn half() -> f64 {
        0.5
    }
}

/// Which optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Optimizer {
    /// AdamW
    AdamW,
    /// SGD with momentum
    Sgd,
    /// LARS as MAE's linear probe and MoCo v3 have it: matrices alone get the trust ratio and the decay
    Lars,
    /// LARS as SimSiam's linear probe has it (apex's LARC without clipping): all parameters get the trust ratio
    Larc,
    /// LAMB
    Lamb,
}

/// Number format of the computation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floats throughout.
    #[default]
    F32,
    /// bfloat16 with 32-bit master weights.
    Bf16,
}

/// The optimizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Optim {
    /// Which one.
    pub optimizer: Optimizer,
    /// Learning rate for an effective batch of 256; that of the run is base_lr * effective batch / 256.
    pub base_lr: f64,
    /// Adam's moments.
    #[serde(default = "Optim::betas")]
    pub betas: [f64; 2],
    /// Momentum of SGD and LARS.
    #[serde(default = "Optim::momentum")]
    pub momentum: f64,
    /// Decay of weights.
    #[serde(default)]
    pub weight_decay: f64,
    /// Decay biases, and gains and shifts of norms, too: all that has one dimension.
    #[serde(default)]
    pub decay_norms: bool,
    /// Factor on the learning rate from each layer to the one below.
    #[serde(default = "Optim::one")]
    pub layer_decay: f64,
    /// Largest norm of the gradient; none if absent.
    #[serde(default)]
    pub clip: Option<f64>,
    /// Micro-batches whose gradients make one step.
    #[serde(default = "Optim::accumulate")]
    pub accumulate: usize,
    /// Decay of a moving average of the weights; none if absent.
    #[serde(default)]
    pub ema: Option<f64>,
    /// Number format.
    #[serde(default)]
    pub precision: Precision,
}

impl Optim {
    fn betas() -> [f64; 2] {
        [0.9, 0.999]
    }
    fn momentum() -> f64 {
        0.9
    }
    fn one() -> f64 {
        1.0
    }
    fn accumulate() -> usize {
        1
    }
}

/// The learning rate behind the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Curve {
    /// Half a cosine down to `min_lr`, a little further in every step.
    #[default]
    Cosine,
    /// The same in steps of whole epochs, as MoCo v1, v2 and SimSiam have it.
    CosinePerEpoch,
    /// Times `gamma` at each of `milestones`.
    Milestones,
}

/// How long, and the learning rate over time: linear warm-up from 0, then a curve.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// Passes over the data; 0 if `steps` says how long.
    #[serde(default)]
    pub epochs: usize,
    /// Steps of the optimizer, in place of `epochs`.
    #[serde(default)]
    pub steps: u64,
    /// Epochs of warm-up.
    #[serde(default)]
    pub warmup_epochs: f64,
    /// Steps of warm-up, in place of `warmup_epochs`.
    #[serde(default)]
    pub warmup_steps: u64,
    /// What follows.
    #[serde(default)]
    pub curve: Curve,
    /// Epochs from which on another `gamma` counts.
    #[serde(default)]
    pub milestones: Vec<usize>,
    /// Factor at each milestone.
    #[serde(default = "Schedule::gamma")]
    pub gamma: f64,
    /// Learning rate at the end of a cosine.
    #[serde(default)]
    pub min_lr: f64,
}

impl Schedule {
    fn gamma() -> f64 {
        0.1
    }

    /// How long the run is.
    pub fn length(&self) -> Length {
        if self.steps > 0 { Length::Steps(self.steps) } else { Length::Epochs(self.epochs) }
    }
}

/// What is written, and when.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Run {
    /// Steps from one line of the metrics to the next.
    pub log_every: usize,
    /// Epochs from one checkpoint to the next.
    pub checkpoint_every: usize,
    /// Epochs from one set of pictures (loss curve, reconstructions or views) to the next.
    pub preview_every: usize,
    /// Ranks, as threads of the process, that share each batch; each has a copy of the model and a share of the
    /// threads. For pre-training.
    pub ranks: usize,
}

impl Default for Run {
    fn default() -> Self {
        Run { log_every: 10, checkpoint_every: 20, preview_every: 20, ranks: 1 }
    }
}

/// Regularisation of fine-tuning.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Finetune {
    /// Mean of the patch tokens in place of the class token.
    pub global_pool: bool,
    /// Drop path of the last block; rises linearly from 0 in the first.
    pub drop_path: f64,
    /// Mixup's Beta parameter; 0 turns it off.
    pub mixup: f64,
    /// CutMix's Beta parameter; 0 turns it off.
    pub cutmix: f64,
    /// Label smoothing.
    pub smoothing: f64,
    /// RandAugment in timm's notation; none if absent.
    pub randaugment: Option<String>,
    /// Probability of random erasing.
    pub reprob: f64,
}
