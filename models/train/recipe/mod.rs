//! Recipes: everything that decides about a run, as a TOML file.
//!
//! A recipe is a built-in one (`mae_digits`, the papers' own), or a file; single values are overridden by
//! `section.key=value`. A key that does not exist is an error that names the nearest one that does.

mod check;
mod model;
mod sections;
mod text;

pub use model::{Dims, Model, Size};
pub use sections::{Data, Finetune, Optim, Optimizer, Precision, Run, Schedule, Source};
pub use text::nearest;

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
