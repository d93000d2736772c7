//! Recipes: everything that decides about a run, as a TOML file.
//!
//! A recipe is a built-in one (`mae_digits`, the papers' own), or a file; single values are overridden by
//! `section.key=value`. A key that does not exist is an error that names the nearest one that does.

mod check;
mod methods;
mod model;
mod sections;
mod text;

pub use methods::{Flip, Moco, MocoV3, Probe, ResNet, SimSiam, ViewKind, Views};
pub use model::{Dims, Model, Size};
pub use sections::{
    Curve, Data, Finetune, Normalization, Optim, Optimizer, Precision, Run, Schedule, Source,
};
pub use text::nearest;

use crate::{
    backbones::{BackboneConfig, resnet::ResNetConfig},
    data::Tokenizer,
    flip::FlipConfig,
};
use serde::{Deserialize, Serialize};
use smalti::{Error, Result};
use std::path::Path;
use text::{explain, file_error, set};
use toml::{Table, Value};

macro_rules! builtin {
    ($($name:literal),+ $(,)?) => {
        /// Name and text of the recipes that are part of the program.
        pub const BUILTIN: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../../recipes/", $name, ".toml")))),+];
    };
}
builtin!(
    "mae_digits",
    "mae_photos",
    "mae_pretrain_vit_base",
    "mae_pretrain_vit_large",
    "mae_pretrain_vit_huge",
    "mae_linear_probe_digits",
    "mae_linear_probe_vit_base",
    "mae_linear_probe_vit_large",
    "mae_linear_probe_vit_huge",
    "mae_finetune_digits",
    "mae_finetune_vit_base",
    "mae_finetune_vit_large",
    "mae_finetune_vit_huge",
    "flip_digits",
    "flip_vit_base",
    "flip_vit_large",
    "flip_vit_huge",
    "flip_tune_vit_base",
    "flip_tune_vit_large",
    "flip_tune_vit_huge",
    "flip_linear_probe_vit_base",
    "flip_linear_probe_vit_large",
    "flip_linear_probe_vit_huge",
    "moco_cifar10",
    "moco_digits",
    "moco_linear_probe_resnet50",
    "moco_v1_resnet50",
    "moco_v2_digits",
    "moco_v2_resnet50",
    "moco_v2_resnet50_800ep",
    "moco_v3_digits",
    "moco_v3_linear_probe_resnet50",
    "moco_v3_linear_probe_vit_base",
    "moco_v3_linear_probe_vit_conv_base",
    "moco_v3_linear_probe_vit_conv_small",
    "moco_v3_linear_probe_vit_small",
    "moco_v3_resnet50",
    "moco_v3_resnet50_1000ep",
    "moco_v3_resnet50_300ep",
    "moco_v3_vit_base",
    "moco_v3_vit_conv_base",
    "moco_v3_vit_conv_small",
    "moco_v3_vit_small",
    "simsiam_cifar10",
    "simsiam_digits",
    "simsiam_linear_probe_resnet50",
    "simsiam_resnet50",
    "simsiam_resnet50_256",
);

/// What a recipe is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Job {
    /// Pre-training of a masked autoencoder.
    Mae,
    /// Pre-training by momentum contrast with a queue, v1 or v2.
    Moco,
    /// Pre-training by momentum contrast within the batch.
    MocoV3,
    /// Pre-training by two views that predict one another.
    Simsiam,
    /// Pre-training by contrast of images and captions, with masked images.
    Flip,
    /// Training a linear classifier on frozen features.
    LinearProbe,
    /// Training a classifier and the encoder under it.
    Finetune,
}

impl Job {
    /// As recipes have it.
    pub fn name(self) -> &'static str {
        match self {
            Job::Mae => "mae",
            Job::Moco => "moco",
            Job::MocoV3 => "moco-v3",
            Job::Simsiam => "simsiam",
            Job::Flip => "flip",
            Job::LinearProbe => "linear-probe",
            Job::Finetune => "finetune",
        }
    }
}

/// A whole recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// What it is for.
    pub job: Job,
    /// Every random number of the run follows from it.
    #[serde(default)]
    pub seed: u64,
    /// The network.
    pub model: Model,
    /// Images and their augmentation.
    pub data: Data,
    /// The optimizer.
    pub optim: Optim,
    /// How long, and the learning rate over time.
    pub schedule: Schedule,
    /// What is written, and when.
    #[serde(default)]
    pub run: Run,
    /// Regularisation of fine-tuning.
    #[serde(default)]
    pub finetune: Finetune,
    /// The head of a linear probe.
    #[serde(default)]
    pub probe: Probe,
    /// A residual network in place of the transformer.
    #[serde(default)]
    pub resnet: Option<ResNet>,
    /// The two views of contrastive methods.
    #[serde(default)]
    pub views: Option<Views>,
    /// MoCo v1 and v2.
    #[serde(default)]
    pub moco: Option<Moco>,
    /// MoCo v3.
    #[serde(default)]
    pub moco_v3: Option<MocoV3>,
    /// SimSiam.
    #[serde(default)]
    pub simsiam: Option<SimSiam>,
    /// FLIP, and CLIP.
    #[serde(default)]
    pub flip: Option<Flip>,
}

impl Recipe {
    /// The recipe `name`: a built-in one, or else a file; `overrides` are `section.key=value`.
    ///
    /// # Errors
    /// No such recipe; TOML that does not parse; a key that does not exist or has a value of another type or out
    /// of range. The message names the file (or override), the line and the key.
    pub fn load(name: &str, overrides: &[String]) -> Result<Recipe> {
        if let Some((_, text)) = BUILTIN.iter().find(|(builtin, _)| *builtin == name) {
            return Recipe::parse(Path::new(name), text, overrides);
        }
        let path = Path::new(name);
        if !path.exists() && !name.ends_with(".toml") {
            let names = BUILTIN.iter().map(|(name, _)| *name);
            let near = nearest(name, names).map_or(String::new(), |near| format!("; did you mean `{near}`?"));
            return Err(Error::msg(format!("recipe {name}: neither built in nor a file{near}")));
        }
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        Recipe::parse(path, &text, overrides)
    }

    /// A recipe from its text; `path` is for messages.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn parse(path: &Path, text: &str, overrides: &[String]) -> Result<Recipe> {
        let parsed = toml::Deserializer::parse(text).map_err(|e| file_error(path, text, None, &e))?;
        let mut recipe: Recipe = serde_path_to_error::deserialize(parsed)
            .map_err(|e| file_error(path, text, Some(e.path().to_string()), e.inner()))?;
        recipe.check().map_err(|message| Error::format(path, message))?;
        let mut table: Table = text.parse().map_err(|e| file_error(path, text, None, &e))?;
        for (i, setting) in overrides.iter().enumerate() {
            set(&mut table, setting)?;
            // One more file key may be needed by the next override only, so values are checked at the end.
            recipe = serde_path_to_error::deserialize(Value::Table(table.clone())).map_err(|e| {
                let (key, message) = (e.path().to_string(), explain(e.inner().message()));
                Error::msg(format!("--set {setting}: {key}: {message}"))
            })?;
            if i + 1 == overrides.len() {
                recipe.check().map_err(|message| Error::msg(format!("--set {setting}: {message}")))?;
            }
        }
        Ok(recipe)
    }

    /// Checks a recipe again that was changed after it was loaded.
    ///
    /// # Errors
    /// If a value is out of range or says nothing to the job; the message names the key.
    pub fn recheck(&self) -> Result<()> {
        self.check().map_err(|message| Error::msg(format!("recipe: {message}")))
    }

    /// As a TOML text with every value that is not left to its default.
    ///
    /// # Errors
    /// None in practice.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::msg(format!("recipe: {e}")))
    }

    /// The network that contrastive methods train: that of `[resnet]`, or else `[model]`'s transformer.
    ///
    /// # Errors
    /// If sizes are missing.
    pub fn backbone(&self) -> Result<BackboneConfig> {
        Ok(match &self.resnet {
            Some(resnet) => BackboneConfig::ResNet(resnet.config(self.model.in_chans())?),
            None => BackboneConfig::Vit(self.model.dims()?.vit()),
        })
    }

    /// The residual network of a recipe that must have one.
    ///
    /// # Errors
    /// If it has none, or sizes are missing.
    pub fn resnet(&self) -> Result<ResNetConfig> {
        match &self.resnet {
            Some(resnet) => resnet.config(self.model.in_chans()),
            None => Err(Error::msg("recipe: [resnet] is missing")),
        }
    }

    /// The model of a recipe for FLIP.
    ///
    /// # Errors
    /// If it has no `[flip]`, or sizes are missing.
    pub fn flip(&self) -> Result<FlipConfig> {
        Ok(self.flip_section()?.config(&self.model.dims()?))
    }

    /// The tokenizer of a recipe for FLIP.
    ///
    /// # Errors
    /// If it has no `[flip]`, or files of the vocabulary cannot be read.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        self.flip_section()?.tokenizer()
    }

    fn flip_section(&self) -> Result<&Flip> {
        self.flip.as_ref().ok_or_else(|| Error::msg("recipe: [flip] is missing"))
    }

    /// Images that make one step of the optimizer.
    pub fn effective_batch(&self) -> usize {
        self.data.batch * self.optim.accumulate
    }

    /// The peak learning rate: base_lr * effective batch / 256.
    pub fn peak_lr(&self) -> f64 {
        self.optim.base_lr * self.effective_batch() as f64 / 256.0
    }
}

#[cfg(test)]
mod tests;
