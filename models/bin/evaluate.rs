//! `smalti evaluate knn|linear-probe|finetune CHECKPOINT`

use crate::stop;
use clap::{Args, Subcommand};
use smalti::{Error, Result, Tensor, io, no_grad, optim::Optimizer};
use smalti_models::{
    backbones::vit::Pool,
    data::Batch,
    evaluate::{Features, LinearProbe, ProbeConfig, Vote, knn_accuracy},
    mae::transfer::pool,
    train::{
        Classifier, FinetuneTask, Metrics, Outcome, Output, ProbeTask, Progress, Recipe, RunDir, Settings,
        Task, Trainer,
        features::{self, Split},
        optimizer,
        recipe::{Job, Source},
        source,
    },
};
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

#[derive(Subcommand)]
pub enum Evaluate {
    /// Classifies by the nearest training images.
    Knn {
        #[command(flatten)]
        what: What,
        /// Number of neighbours.
        #[arg(long, short, default_value_t = 20)]
        k: usize,
        /// Cosine similarity with votes exp(s / T), in place of Euclidean distance with a vote each.
        #[arg(long, value_name = "T")]
        temperature: Option<f64>,
    },
    /// Trains a linear classifier on features of the training images; with a recipe for linear probing, on
    /// augmented images as the recipe says.
    LinearProbe {
        #[command(flatten)]
        what: What,
        /// Folder of the run, with such a recipe; runs/linear-probe, numbered if that is taken, if not given.
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
    /// Trains a classifier and the encoder under it, and tests it.
    Finetune {
        #[command(flatten)]
        what: What,
        /// Folder of the run; runs/finetune, numbered if that is taken, if not given.
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
}

#[derive(Args)]
pub struct What {
    /// The encoder: .safetensors of a run, or an official .pth.
    checkpoint: PathBuf,
    /// Recipe (file or built-in name). That of the checkpoint, if it has one, if not given; mae_finetune_digits
    /// for fine-tuning.
    #[arg(long)]
    recipe: Option<String>,
    /// Folder with train/<class>/ and val/<class>/.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Override a value of the recipe; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Probe the mean over patches, not the class token.
    #[arg(long)]
    mean: bool,
}

impl What {
    /// The checkpoint's own recipe says what the encoder is; `default` what else the job needs.
    fn recipe(&self, default: Option<&str>) -> Result<Recipe> {
        let own = features::recipe_of(&self.checkpoint)?;
        let mut recipe = match (self.recipe.as_deref().or(default), &own) {
            (Some(name), _) => Recipe::load(name, &self.set)?,
            (None, Some(own)) => Recipe::parse(&self.checkpoint, &own.to_toml()?, &self.set)?,
            (None, None) => {
                return Err(Error::format(
                    &self.checkpoint,
                    "says nothing about its sizes; name a recipe by --recipe, such as mae_linear_probe_vit_base",
                ));
            }
        };
        if let (None, Some(own)) = (&self.recipe, own) {
            recipe.model = own.model;
        }
        if let Some(data) = &self.data {
            (recipe.data.source, recipe.data.folder) = (Source::Folder, Some(data.clone()));
        }
        Ok(recipe)
    }

    fn pool(&self) -> Pool {
        pool(self.mean)
    }

    fn features(&self) -> Result<(Features, Features)> {
        let recipe = self.recipe(None)?;
        let model = features::classifier(&recipe, io::load(&self.checkpoint)?.tensors(), 1, self.pool())?;
        let of = |split| features::features(&model, &recipe, split);
        Ok((of(Split::Train)?, of(Split::Test)?))
    }
}

pub fn run(what: &Evaluate) -> Result<ExitCode> {
    match what {
        Evaluate::Knn { what, k, temperature } => {
            let (train, test) = what.features()?;
            let vote = temperature.map_or(Vote::Majority, |temperature| Vote::Weighted { temperature });
            let accuracy = knn_accuracy(&train, &test, *k, vote)?;
            println!("{k}-NN: {:.2} % of {} test images", accuracy * 100.0, test.len());
        }
        Evaluate::LinearProbe { what, out } => {
            if what.recipe(None)?.job == Job::LinearProbe {
                return transfer(what, &what.recipe(None)?, out.as_deref());
            }
            let (train, test) = what.features()?;
            let accuracy = LinearProbe::fit(&train, ProbeConfig::default())?.accuracy(&test)?;
            println!("linear probe: {:.2} % of {} test images", accuracy * 100.0, test.len());
        }
        Evaluate::Finetune { what, out } => {
            let recipe = what.recipe(what.data.is_none().then_some("mae_finetune_digits"))?;
            if recipe.job != Job::Finetune {
                let what = "name a recipe for fine-tuning by --recipe, such as mae_finetune_vit_base";
                return Err(Error::msg(what));
            }
            return transfer(what, &recipe, out.as_deref());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Trains what the recipe says on top of the checkpoint, and tests it.
fn transfer(what: &What, recipe: &Recipe, out: Option<&Path>) -> Result<ExitCode> {
    if let Some(out) = out {
        RunDir::check_free(out)?;
    }
    let classes = match recipe.data.source {
        Source::Digits => 10,
        Source::Folder => features::labelled(recipe, Split::Train)?.classes().len(),
    };
    let tensors = io::load(&what.checkpoint)?.tensors();
    if recipe.job == Job::LinearProbe {
        let encoder = features::classifier(recipe, tensors, classes, what.pool())?;
        let task = ProbeTask::new(recipe, encoder, classes)?;
        return train(&task, recipe, optimizer(&recipe.optim, task.params(), [])?, out, "linear-probe");
    }
    let model = features::classifier(recipe, tensors, classes, pool(recipe.finetune.global_pool))?;
    let task = FinetuneTask::new(recipe, model, classes);
    let optimizer = optimizer(&recipe.optim, task.params(), task.groups(recipe))?;
    train(&task, recipe, optimizer, out, "finetune")
}

fn train<T: Task<Batch = Batch> + Classifier>(
    task: &T,
    recipe: &Recipe,
    optimizer: Box<dyn Optimizer>,
    out: Option<&Path>,
    name: &str,
) -> Result<ExitCode> {
    let batches = source::supervised(recipe)?;
    let mut trainer = Trainer::new(task, Settings::of(recipe)?, optimizer, None);
    let mut progress = Progress::new(trainer.total(&batches)?, 0);
    let run = match out {
        Some(out) => RunDir::create(out, recipe)?,
        None => RunDir::create_numbered(Path::new("runs"), name, recipe)?,
    };
    let metrics = Metrics::create(&run.metrics())?;
    let mut output = Output { run, metrics, title: format!("{name}: loss") };
    if trainer.run(&batches, Some(&mut output), &mut progress, stop::flag()?)? == Outcome::Interrupted {
        return Ok(stop::code());
    }
    let file = output.run.file("model.safetensors");
    io::save_safetensors(&file, &task.params().tensors(), &[("recipe".to_owned(), recipe.to_toml()?)])?;
    let (right, all) = test(task, recipe)?;
    println!("{name}: {:.2} % of {all} test images; {}", right * 100.0 / all as f64, file.display());
    Ok(ExitCode::SUCCESS)
}

/// Right answers on the test split, and images in it.
fn test(model: &impl Classifier, recipe: &Recipe) -> Result<(f64, usize)> {
    let (mut right, mut all) = (0.0, 0);
    for batch in features::batches(recipe, Split::Test)? {
        let (images, labels) = batch?;
        let best = no_grad(|| model.logits(&images)?.argmax(-1))?;
        right += best.eq(&Tensor::from_slice(&labels, [labels.len()])?)?.sum(())?.item()?;
        all += labels.len();
    }
    Ok((right, all))
}
