//! `smalti train mae`

use crate::{report, run::Place, stop};
use clap::{Args, Subcommand};
use smalti::{Error, Result, nn::Params, optim::Ema};
use smalti_models::train::{
    Batches, MaeTask, Outcome, Progress, Recipe, RunDir, Settings, Trainer, optimizer,
    recipe::{Job, Source},
    source,
};
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

#[derive(Subcommand)]
pub enum Train {
    /// Pre-trains a masked autoencoder: on the shipped digits if nothing else is said.
    Mae(Options),
}

#[derive(Args)]
pub struct Options {
    /// Recipe: a TOML file or a built-in name (see `smalti recipes`). mae_digits if not given, mae_photos with
    /// --data.
    #[arg(long)]
    recipe: Option<String>,
    /// Folder of JPEG and PNG images, in class folders or flat.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Folder of the run; runs/<recipe>, numbered if that is taken, if not given.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on with an interrupted run: the one in --out, or the last in runs/<recipe>.
    #[arg(long)]
    resume: bool,
    /// Override a value of the recipe, such as optim.base_lr=1e-3; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

pub fn run(what: &Train) -> Result<ExitCode> {
    let Train::Mae(options) = what;
    let start = Instant::now();
    let name = name(recipe_name(options));
    let title = format!("MAE: loss ({name})");
    let place = Place { out: options.out.as_deref(), resume: options.resume, name };
    let (mut recipe, resumed) = plan(options, &place)?;
    if recipe.job != Job::Mae {
        return Err(Error::msg(format!("the recipe is for {:?}, not for pre-training", recipe.job)));
    }
    let batches = source::pretraining(&mut recipe)?;
    let task = MaeTask::new(&recipe)?;
    let ema = recipe.optim.ema.map(|decay| Ema::new(&task.mae().params().all(), decay, false)).transpose()?;
    let optimizer = optimizer(&recipe.optim, task.mae().params(), [])?;
    let mut trainer = Trainer::new(&task, Settings::of(&recipe)?, optimizer, ema);
    let total = trainer.total(&batches)?;
    let mut output = place.output(&recipe, resumed, &mut trainer, title)?;
    announce(&recipe, &batches, task.mae().params(), &output.run, (trainer.step(), total));
    let mut progress = Progress::new(total, trainer.step());
    if trainer.run(&batches, Some(&mut output), &mut progress, stop::flag()?)? == Outcome::Interrupted {
        let out = output.run.path().display();
        eprintln!(
            "stopped after step {} of {total}; `smalti train mae --resume --out {out}` goes on",
            trainer.step()
        );
        return Ok(stop::code());
    }
    let save = || task.save(&recipe, &output.run);
    trainer.ema().map_or_else(save, |ema| ema.with_average(save))?;
    if recipe.data.source == Source::Digits {
        report::digits(&recipe, smalti::io::load(output.run.file("encoder.safetensors"))?.tensors())?;
    }
    println!(
        "wall time {:.0} s; results are in {}:",
        start.elapsed().as_secs_f64(),
        output.run.path().display()
    );
    println!("  encoder.safetensors  model.safetensors  metrics.jsonl  loss.png  preview.png  recipe.toml");
    Ok(ExitCode::SUCCESS)
}

/// The recipe, and the run that is resumed.
fn plan(options: &Options, place: &Place) -> Result<(Recipe, Option<RunDir>)> {
    if options.resume && (options.recipe.is_some() || options.data.is_some()) {
        return Err(Error::msg("--resume takes recipe and data of the run; leave out --recipe and --data"));
    }
    if let Some((run, recipe)) = place.interrupted(&options.set)? {
        return Ok((recipe, Some(run)));
    }
    let mut recipe = Recipe::load(recipe_name(options), &options.set)?;
    if let Some(data) = &options.data {
        recipe.data.source = Source::Folder;
        recipe.data.folder = Some(data.clone());
    }
    Ok((recipe, None))
}

fn recipe_name(options: &Options) -> &str {
    let default = if options.data.is_some() { "mae_photos" } else { "mae_digits" };
    options.recipe.as_deref().unwrap_or(default)
}

/// `mae-digits` for `mae_digits` and for `some/where/mae_digits.toml`.
fn name(recipe: &str) -> String {
    let stem = Path::new(recipe).file_stem().map_or_else(|| recipe.into(), |stem| stem.to_string_lossy());
    stem.replace('_', "-")
}

fn announce(
    recipe: &Recipe,
    batches: &impl Batches,
    params: &Params,
    run: &RunDir,
    (done, total): (u64, u64),
) {
    let source = match (&recipe.data.source, &recipe.data.folder) {
        (Source::Folder, Some(folder)) => folder.display().to_string(),
        _ => "the shipped digits".to_owned(),
    };
    println!(
        "MAE on {source}: {} batches of {} an epoch, {} epochs, {:.2} M parameters, {} threads",
        batches.per_epoch(),
        recipe.data.batch,
        recipe.schedule.epochs,
        params.count() as f64 / 1e6,
        rayon::current_num_threads()
    );
    let at = if done > 0 { format!(", from step {done} of {total}") } else { String::new() };
    println!("writing to {}{at}", run.path().display());
}
