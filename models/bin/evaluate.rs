//! `smalti evaluate knn|linear-probe|zero-shot|retrieval|finetune CHECKPOINT`

use crate::{run::Place, stop};
use clap::{Args, Subcommand};
use smalti::{Error, Result, Rng, Tensor, io, no_grad};
use smalti_models::{
    backbones::vit::Pool,
    data::{Batch, Tokenizer},
    evaluate::{Features, LinearProbe, ProbeConfig, Vote, knn_accuracy},
    flip::Flip,
    mae::transfer::pool,
    train::{
        Classifier, Encoder, FinetuneTask, Outcome, ProbeTask, Progress, Recipe, RunDir, Settings, Task,
        Trainer,
        features::{self, Split},
        optimizer,
        recipe::{Job, Source},
        retrieval, source, zero_shot,
    },
};
use std::{
    fs::File,
    io::BufReader,
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
        #[command(flatten)]
        run: Run,
    },
    /// Classifies by the names of the classes, with a model of images and texts (FLIP): the shipped digits, or the
    /// images in the class folders of --data.
    ZeroShot {
        #[command(flatten)]
        what: What,
        /// File of prompts, one a line, with {} for the name of the class.
        #[arg(long, value_name = "FILE")]
        templates: Option<PathBuf>,
    },
    /// Looks for the caption of each image and the image of each caption, with a model of images and texts (FLIP), in
    /// a folder of images with captions.tsv: a path, a tab, a caption in every line.
    Retrieval {
        #[command(flatten)]
        what: What,
        /// Among how many best the right one must be; may be repeated. 1, 5 and 10 if not given.
        #[arg(long, value_name = "K")]
        at: Vec<usize>,
    },
    /// Trains a classifier and the encoder under it, and tests it.
    Finetune {
        #[command(flatten)]
        what: What,
        #[command(flatten)]
        run: Run,
    },
}

/// What trains by a recipe takes these too.
#[derive(Args)]
pub struct Run {
    /// Folder of the run; runs/finetune or runs/linear-probe, numbered if that is taken, if not given.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on with an interrupted run: the one in --out, or the last in runs. The checkpoint must be the same.
    #[arg(long)]
    resume: bool,
}

impl Run {
    fn place(&self, name: &str) -> Place<'_> {
        Place { out: self.out.as_deref(), resume: self.resume, name: name.into() }
    }
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
            (recipe.model, recipe.resnet, recipe.flip) = (own.model, own.resnet, own.flip);
            recipe.recheck()?;
        }
        if let Some(data) = &self.data {
            (recipe.data.source, recipe.data.folder) = (Source::Folder, Some(data.clone()));
        }
        Ok(recipe)
    }

    /// The run that is to be resumed.
    fn interrupted(&self, place: &Place) -> Result<Option<(RunDir, Recipe)>> {
        if place.resume && (self.recipe.is_some() || self.data.is_some()) {
            return Err(Error::msg(
                "--resume takes recipe and data of the run; leave out --recipe and --data",
            ));
        }
        place.interrupted(&self.set)
    }

    fn pool(&self) -> Pool {
        pool(self.mean)
    }

    /// A model of images and texts with its checkpoint loaded.
    fn images_and_texts(&self) -> Result<(Recipe, Flip, Tokenizer)> {
        let recipe = self.recipe(None)?;
        let (config, tokenizer) = (recipe.flip()?, recipe.tokenizer()?);
        let model = Flip::new(&config, &mut Rng::new(recipe.seed))?;
        model.load(&self.checkpoint)?;
        Ok((recipe, model, tokenizer))
    }

    fn features(&self) -> Result<(Features, Features)> {
        let recipe = self.recipe(None)?;
        let encoder = Encoder::load(&recipe, io::load(&self.checkpoint)?.tensors(), self.pool())?;
        let of = |split| features::features(&encoder, &recipe, split);
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
        Evaluate::ZeroShot { what, templates } => {
            println!("zero-shot: {}", zero_shot(what, templates.as_deref())?)
        }
        Evaluate::Retrieval { what, at } => {
            let (recipe, model, tokenizer) = what.images_and_texts()?;
            let at = if at.is_empty() { &[1, 5, 10] } else { at.as_slice() };
            println!("{}", retrieval::recall(&model, &tokenizer, &recipe, at)?)
        }
        Evaluate::LinearProbe { what, run } => {
            let place = run.place("linear-probe");
            if let Some((run, recipe)) = what.interrupted(&place)? {
                return transfer(what, &recipe, Job::LinearProbe, &place, Some(run));
            }
            let recipe = what.recipe(None)?;
            if recipe.job == Job::LinearProbe {
                return transfer(what, &recipe, Job::LinearProbe, &place, None);
            }
            let (train, test) = what.features()?;
            let accuracy = LinearProbe::fit(&train, ProbeConfig::default())?.accuracy(&test)?;
            println!("linear probe: {:.2} % of {} test images", accuracy * 100.0, test.len());
        }
        Evaluate::Finetune { what, run } => {
            let place = run.place("finetune");
            let (recipe, run) = match what.interrupted(&place)? {
                Some((run, recipe)) => (recipe, Some(run)),
                None => (what.recipe(what.data.is_none().then_some("mae_finetune_digits"))?, None),
            };
            return transfer(what, &recipe, Job::Finetune, &place, run);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn zero_shot(what: &What, templates: Option<&Path>) -> Result<zero_shot::Accuracy> {
    let (recipe, model, tokenizer) = what.images_and_texts()?;
    let read = |path| std::fs::read_to_string(path).map_err(|e| Error::io(path, e));
    let lines = |text: String| text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect();
    let templates: Option<Vec<String>> = templates.map(|path| read(path).map(lines)).transpose()?;
    zero_shot::accuracy(&model, &tokenizer, &recipe, templates.as_deref())
}

/// Trains what the recipe says on top of the checkpoint, and tests it; goes on with `resumed` if there is one.
fn transfer(
    what: &What,
    recipe: &Recipe,
    job: Job,
    place: &Place,
    resumed: Option<RunDir>,
) -> Result<ExitCode> {
    if recipe.job != job {
        return Err(Error::msg(match job {
            Job::Finetune => "name a recipe for fine-tuning by --recipe, such as mae_finetune_vit_base",
            _ => "the recipe is not one for linear probing, such as mae_linear_probe_vit_base",
        }));
    }
    let classes = match recipe.data.source {
        Source::Digits => 10,
        Source::Folder => features::labelled(recipe, Split::Train)?.classes().len(),
    };
    let pool = if job == Job::LinearProbe { what.pool() } else { pool(recipe.finetune.global_pool) };
    let mut settings = Settings::of(recipe)?;
    // a frozen encoder is no part of the training state: the same one is needed to go on
    settings.origin = Some(format!("CRC-32 {:08x}, pool {pool:?}", crc32(&what.checkpoint)?));
    let tensors = io::load(&what.checkpoint)?.tensors();
    if job == Job::LinearProbe {
        let task = ProbeTask::new(recipe, tensors, classes, pool)?;
        let optimizer = optimizer(&recipe.optim, task.params(), [])?;
        return train(&task, recipe, Trainer::new(&task, settings, optimizer, None), place, resumed);
    }
    let task = FinetuneTask::new(recipe, features::classifier(recipe, tensors, classes, pool)?, classes);
    let optimizer = optimizer(&recipe.optim, task.params(), task.groups(recipe))?;
    train(&task, recipe, Trainer::new(&task, settings, optimizer, None), place, resumed)
}

fn train<T: Task<Batch = Batch> + Classifier>(
    task: &T,
    recipe: &Recipe,
    mut trainer: Trainer<T>,
    place: &Place,
    resumed: Option<RunDir>,
) -> Result<ExitCode> {
    let (batches, name) = (source::supervised(recipe)?, &place.name);
    let total = trainer.total(&batches)?;
    let mut output = place.output(recipe, resumed, &mut trainer, format!("{name}: loss"))?;
    let mut progress = Progress::new(total, trainer.step());
    if trainer.run(&batches, Some(&mut output), &mut progress, stop::flag()?)? == Outcome::Interrupted {
        let (step, out) = (trainer.step(), output.run.path().display());
        eprintln!("stopped after step {step} of {total}; the same command with --resume --out {out} goes on");
        return Ok(stop::code());
    }
    task.check()?;
    let file = output.run.file("model.safetensors");
    io::save_safetensors(&file, &task.params().tensors(), &[("recipe".to_owned(), recipe.to_toml()?)])?;
    let (right, all) = test(task, recipe)?;
    println!("{name}: {:.2} % of {all} test images; {}", right * 100.0 / all as f64, file.display());
    Ok(ExitCode::SUCCESS)
}

fn crc32(path: &Path) -> Result<u32> {
    let read = || {
        let mut reader = flate2::CrcReader::new(BufReader::with_capacity(1 << 20, File::open(path)?));
        std::io::copy(&mut reader, &mut std::io::sink())?;
        Ok(reader.crc().sum())
    };
    read().map_err(|e| Error::io(path, e))
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
