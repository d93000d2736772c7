//! Recipes: everything that decides about a run, as a TOML file.
//!
//! A recipe is a built-in one (`mae_digits`, the papers' own), or a file; single values are overridden by
//! `section.key=value`. A key that does not exist is an error that names the nearest one that does.

use crate::{backbones::vit::ImageSize, mae::MaeConfig};
use serde::{Deserialize, Serialize};
use smalti::{Error, Result, nn::Gelu};
use std::path::{Path, PathBuf};
use toml::{Table, Value};

macro_rules! builtin {
    ($($name:literal),+ $(,)?) => {
        /// Name and text of the recipes that are part of the program.
        pub const BUILTIN: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../recipes/", $name, ".toml")))),+];
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
);

/// What a recipe is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Job {
    /// Pre-training of a masked autoencoder.
    Mae,
    /// Training a linear classifier on frozen features.
    LinearProbe,
    /// Training a classifier and the encoder under it.
    Finetune,
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
}

/// Published sizes of the encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Size {
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
}

impl Dims {
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
    /// All numbers.
    ///
    /// # Errors
    /// If there is no `size` and one of patch size, width, depth or heads is missing.
    pub fn dims(&self) -> Result<Dims> {
        let preset = self.size.map(|size| match size {
            Size::Base => (16, 768, 12, 12),
            Size::Large => (16, 1024, 24, 16),
            Size::Huge => (14, 1280, 32, 16),
        });
        let known = |given: Option<usize>, preset: Option<usize>, key: &str| {
            given.or(preset).ok_or_else(|| {
                Error::msg(format!("recipe: model.{key} is missing (or give model.size: base, large, huge)"))
            })
        };
        Ok(Dims {
            img_size: self.img_size.unwrap_or(224),
            patch_size: known(self.patch_size, preset.map(|p| p.0), "patch_size")?,
            in_chans: self.in_chans.unwrap_or(3),
            embed_dim: known(self.embed_dim, preset.map(|p| p.1), "embed_dim")?,
            depth: known(self.depth, preset.map(|p| p.2), "depth")?,
            num_heads: known(self.num_heads, preset.map(|p| p.3), "num_heads")?,
            decoder_embed_dim: self.decoder_embed_dim.unwrap_or(512),
            decoder_depth: self.decoder_depth.unwrap_or(8),
            decoder_num_heads: self.decoder_num_heads.unwrap_or(16),
            mlp_ratio: self.mlp_ratio.unwrap_or(4.0),
            mask_ratio: self.mask_ratio.unwrap_or(0.75),
            norm_pix_loss: self.norm_pix_loss.unwrap_or(true),
        })
    }
}

/// Where images come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The handwritten digits that are part of the program.
    Digits,
    /// A folder of images; in class folders where labels are needed.
    Folder,
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
    /// LARS
    Lars,
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
    /// Decay of weights; biases and norms are left alone.
    #[serde(default)]
    pub weight_decay: f64,
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

/// How long, and the learning rate over time: linear warm-up from 0, then half a cosine down to `min_lr`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// Passes over the data.
    pub epochs: usize,
    /// Of these, epochs of warm-up.
    #[serde(default)]
    pub warmup_epochs: f64,
    /// Learning rate at the end.
    #[serde(default)]
    pub min_lr: f64,
}

/// What is written, and when.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Run {
    /// Steps from one line of the metrics to the next.
    pub log_every: usize,
    /// Epochs from one checkpoint to the next.
    pub checkpoint_every: usize,
    /// Epochs from one set of pictures (loss curve, reconstructions) to the next.
    pub preview_every: usize,
}

impl Default for Run {
    fn default() -> Self {
        Run { log_every: 10, checkpoint_every: 20, preview_every: 20 }
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

    /// As a TOML text with every value that is not left to its default.
    ///
    /// # Errors
    /// None in practice.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::msg(format!("recipe: {e}")))
    }

    /// Images that make one step of the optimizer.
    pub fn effective_batch(&self) -> usize {
        self.data.batch * self.optim.accumulate
    }

    /// The peak learning rate: base_lr * effective batch / 256.
    pub fn peak_lr(&self) -> f64 {
        self.optim.base_lr * self.effective_batch() as f64 / 256.0
    }

    /// Values out of range, by key.
    fn check(&self) -> Result<(), String> {
        let dims = self.model.dims().map_err(|e| e.to_string())?;
        let positive = [
            ("model.img_size", dims.img_size),
            ("model.patch_size", dims.patch_size),
            ("model.embed_dim", dims.embed_dim),
            ("model.depth", dims.depth),
            ("model.num_heads", dims.num_heads),
            ("model.decoder_embed_dim", dims.decoder_embed_dim),
            ("model.decoder_num_heads", dims.decoder_num_heads),
            ("data.batch", self.data.batch),
            ("optim.accumulate", self.optim.accumulate),
            ("schedule.epochs", self.schedule.epochs),
            ("run.log_every", self.run.log_every),
            ("run.checkpoint_every", self.run.checkpoint_every),
            ("run.preview_every", self.run.preview_every),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(format!("{key} is 0, needs at least 1"));
        }
        let (lr, wd, decay) = (self.optim.base_lr, self.optim.weight_decay, self.optim.layer_decay);
        let [beta1, beta2] = self.optim.betas;
        let (f, warmup) = (&self.finetune, self.schedule.warmup_epochs);
        let below_one = |v: f64| (0.0..1.0).contains(&v);
        let share = |v: f64| (0.0..=1.0).contains(&v);
        let rules = [
            (dims.img_size % dims.patch_size == 0, "model.img_size is no multiple of model.patch_size"),
            (matches!(dims.in_chans, 1 | 3), "model.in_chans is neither 1 nor 3"),
            (dims.embed_dim % dims.num_heads == 0, "model.embed_dim is no multiple of model.num_heads"),
            (
                dims.decoder_embed_dim % dims.decoder_num_heads == 0,
                "model.decoder_embed_dim is no multiple of model.decoder_num_heads",
            ),
            (dims.mask_ratio > 0.0 && dims.mask_ratio < 1.0, "model.mask_ratio is not between 0 and 1"),
            (dims.mlp_ratio.is_finite() && dims.mlp_ratio > 0.0, "model.mlp_ratio is not above 0"),
            (lr.is_finite() && lr > 0.0, "optim.base_lr is not above 0"),
            (wd.is_finite() && wd >= 0.0, "optim.weight_decay is negative"),
            (decay > 0.0 && decay <= 1.0, "optim.layer_decay is not in (0, 1]"),
            (below_one(beta1) && below_one(beta2), "optim.betas are not in [0, 1)"),
            (below_one(self.optim.momentum), "optim.momentum is not in [0, 1)"),
            (self.optim.clip.is_none_or(|c| c > 0.0), "optim.clip is not above 0"),
            (self.optim.ema.is_none_or(below_one), "optim.ema is not in [0, 1)"),
            (
                (0.0..=self.schedule.epochs as f64).contains(&warmup),
                "schedule.warmup_epochs is not between 0 and schedule.epochs",
            ),
            (self.schedule.min_lr.is_finite() && self.schedule.min_lr >= 0.0, "schedule.min_lr is negative"),
            (
                self.data.crop_min_area > 0.0 && share(self.data.crop_min_area),
                "data.crop_min_area is not in (0, 1]",
            ),
            (share(self.data.flip), "data.flip is no probability"),
            (share(self.data.shift), "data.shift is not in [0, 1]"),
            (below_one(self.data.zoom), "data.zoom is not in [0, 1)"),
            (self.data.rotate.is_finite() && self.data.rotate >= 0.0, "data.rotate is negative"),
            (below_one(f.drop_path), "finetune.drop_path is not in [0, 1)"),
            (below_one(f.smoothing), "finetune.smoothing is not in [0, 1)"),
            (share(f.reprob), "finetune.reprob is no probability"),
            (f.mixup >= 0.0 && f.cutmix >= 0.0, "finetune.mixup and finetune.cutmix must not be negative"),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            Some((_, message)) => Err((*message).to_owned()),
            None => Ok(()),
        }
    }
}

/// Puts `section.key=value` into the table. The value is read as TOML, and as a string if it is none.
fn set(table: &mut Table, setting: &str) -> Result<()> {
    let wrong =
        || Error::msg(format!("--set {setting}: needs section.key=value, such as optim.base_lr=1e-3"));
    let (key, value) = setting.split_once('=').ok_or_else(wrong)?;
    let (key, value) = (key.trim(), value.trim());
    let value = match format!("value = {value}").parse::<Table>().map(|mut t| t.remove("value")) {
        Ok(Some(value)) => value,
        _ => Value::String(value.to_owned()),
    };
    let mut at = table;
    let mut parts = key.split('.').peekable();
    while let Some(part) = parts.next() {
        if part.is_empty() {
            return Err(wrong());
        }
        if parts.peek().is_none() {
            at.insert(part.to_owned(), value);
            return Ok(());
        }
        let next = at.entry(part).or_insert_with(|| Value::Table(Table::new()));
        at = next
            .as_table_mut()
            .ok_or_else(|| Error::msg(format!("--set {setting}: `{part}` is a value, not a section")))?;
    }
    Err(wrong())
}

/// `file: line 3: optim.base_lrr: unknown key; did you mean `base_lr`?`
fn file_error(path: &Path, text: &str, key: Option<String>, error: &toml::de::Error) -> Error {
    let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
    let line = line.map_or(String::new(), |line| format!("line {line}: "));
    let key = key.filter(|key| key != ".").map_or(String::new(), |key| format!("{key}: "));
    Error::format(path, format!("{line}{key}{}", explain(error.message())))
}

/// serde's message, with the nearest name where one is unknown, on one line.
fn explain(message: &str) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    let what = if message.starts_with("unknown field") {
        "key"
    } else if message.starts_with("unknown variant") {
        "value"
    } else {
        return message.lines().collect::<Vec<_>>().join(" ");
    };
    let unknown = quoted.next().unwrap_or_default();
    let known: Vec<&str> = quoted.collect();
    match nearest(unknown, known.iter().copied()) {
        Some(near) => format!("unknown {what} `{unknown}`; did you mean `{near}`?"),
        None => format!("unknown {what} `{unknown}`; there are {}", known.join(", ")),
    }
}

/// The most similar of `names`, if it is similar at all.
pub fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let (score, best) =
        names.map(|n| (strsim::jaro_winkler(name, n), n)).max_by(|a, b| a.0.total_cmp(&b.0))?;
    (score > 0.75).then_some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digits(overrides: &[&str]) -> Result<Recipe> {
        let overrides: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
        Recipe::load("mae_digits", &overrides)
    }

    fn message(result: Result<Recipe>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn every_builtin_recipe_parses_and_survives_writing() {
        for (name, _) in BUILTIN {
            let recipe = Recipe::load(name, &[]).unwrap();
            let again = Recipe::parse(Path::new("again"), &recipe.to_toml().unwrap(), &[]).unwrap();
            assert_eq!(recipe, again, "{name}");
        }
    }

    /// mae.md's table: the peak learning rates that the paper's repository names for its batch sizes.
    #[test]
    fn the_papers_recipes() {
        for (name, lr, batch) in [
            ("mae_pretrain_vit_base", 2.4e-3, 4096),
            ("mae_finetune_vit_base", 2e-3, 1024),
            ("mae_finetune_vit_large", 4e-3, 1024),
            ("mae_linear_probe_vit_base", 6.4, 16384),
        ] {
            let recipe = Recipe::load(name, &[]).unwrap();
            assert!((recipe.peak_lr() / lr - 1.0).abs() < 1e-9, "{name}: {}", recipe.peak_lr());
            assert_eq!(recipe.effective_batch(), batch, "{name}");
        }
        let huge = Recipe::load("mae_pretrain_vit_huge", &[]).unwrap();
        let dims = huge.model.dims().unwrap();
        assert_eq!((dims.patch_size, dims.embed_dim, dims.depth, dims.num_heads), (14, 1280, 32, 16));
        assert_eq!(
            (huge.optim.betas, huge.schedule.epochs, huge.schedule.warmup_epochs),
            ([0.9, 0.95], 1600, 40.0)
        );
    }

    #[test]
    fn overrides_are_typed() {
        let recipe =
            digits(&["optim.base_lr=1e-3", "schedule.epochs=3", "schedule.warmup_epochs=1", "seed=7"])
                .unwrap();
        assert_eq!((recipe.optim.base_lr, recipe.schedule.epochs, recipe.seed), (1e-3, 3, 7));
        let recipe = digits(&["data.source=folder", "data.folder=/some/where", "model.size=large"]).unwrap();
        assert_eq!((recipe.data.source, recipe.data.folder.unwrap()), (Source::Folder, "/some/where".into()));
        assert!(
            message(digits(&["optim.base_lr=fast"]))
                .contains("--set optim.base_lr=fast: optim.base_lr: invalid type")
        );
        assert!(message(digits(&["optim.base_rl=1"])).contains("did you mean `base_lr`?"));
        assert!(message(digits(&["optim.optimizer=adam"])).contains("did you mean `adamw`?"));
        assert!(message(digits(&["schedule.epochs=-1"])).contains("schedule.epochs"));
        assert!(message(digits(&["schedule.epochs=0"])).contains("schedule.epochs is 0"));
        assert!(message(digits(&["model.mask_ratio=1.5"])).contains("model.mask_ratio"));
        for bad in ["optim.base_lr", "=1", "optim..x=1", "optim.base_lr.x=1"] {
            assert!(message(digits(&[bad])).starts_with(&format!("--set {bad}: ")), "{bad}");
        }
    }

    #[test]
    fn typos_name_file_line_and_key() {
        let good = BUILTIN[0].1;
        let parse = |text: &str| message(Recipe::parse(Path::new("my.toml"), text, &[]));
        let line = good.lines().position(|l| l.starts_with("base_lr")).unwrap() + 1;
        let typo = parse(&good.replacen("base_lr", "base_lrr", 1));
        assert_eq!(
            typo,
            format!("my.toml: line {line}: optim.base_lrr: unknown key `base_lrr`; did you mean `base_lr`?")
        );
        assert!(parse(&good.replacen("[optim]", "[optimizer]", 1)).contains("did you mean `optim`?"));
        assert!(parse("job = \"mae\"").contains("missing field"));
        assert!(parse("job = ").contains("line 1"));
        assert!(parse(&good.replacen("job = \"mae\"", "job = 3", 1)).starts_with("my.toml: line"));
    }

    #[test]
    fn unknown_names() {
        assert!(message(Recipe::load("mae_digit", &[])).contains("did you mean `mae_digits`?"));
        assert!(message(Recipe::load("no/such/file.toml", &[])).starts_with("no/such/file.toml: "));
    }
}
