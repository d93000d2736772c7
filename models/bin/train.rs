//! `smalti train mae|moco|moco-v2|moco-v3|simsiam|flip`

use crate::{report, run::Place, stop};
use clap::{Args, Subcommand};
use smalti::{
    Error, Result,
    comm::{self, Comm},
    nn::Params,
    optim::Ema,
};
use smalti_models::train::{
    Batches, FlipTask, MaeTask, Method, MocoTask, MocoV3Task, Outcome, Progress, Recipe, RunDir, Settings,
    SimSiamTask, Trainer, optimizer, recipe::Source,
};
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::AtomicBool,
    time::Instant,
};

#[derive(Subcommand)]
pub enum Train {
    /// Pre-trains a masked autoencoder.
    Mae(Options),
    /// Pre-trains by momentum contrast (MoCo v1).
    Moco(Options),
    /// Pre-trains by momentum contrast with a deeper head and more augmentation (MoCo v2).
    MocoV2(Options),
    /// Pre-trains by momentum contrast within the batch (MoCo v3).
    MocoV3(Options),
    /// Pre-trains by predicting one view from the other (SimSiam).
    Simsiam(Options),
    /// Pre-trains by contrast of images and captions, with a part of each image left out (FLIP). --data: a folder with
    /// captions.tsv, a path, a tab and a caption in every line.
    Flip(Options),
}

#[derive(Args)]
pub struct Options {
    /// Recipe: a TOML file or a built-in name (see `smalti recipes`). That of the shipped digits if not given, such as
    /// mae_digits; with --data the one for folders: mae_photos, and the papers' own for the other methods.
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
    /// Ranks as threads of this process, which share each batch (run.ranks).
    #[arg(long, value_name = "N")]
    ranks: Option<usize>,
    /// Override a value of the recipe, such as optim.base_lr=1e-3; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

pub fn run(what: &Train) -> Result<ExitCode> {
    // the recipes for digits and for folders
    match what {
        Train::Mae(options) => pretrain::<MaeTask>("mae", options, ["mae_digits", "mae_photos"]),
        Train::Moco(options) => pretrain::<MocoTask>("moco", options, ["moco_digits", "moco_v1_resnet50"]),
        Train::MocoV2(options) => {
            pretrain::<MocoTask>("moco-v2", options, ["moco_v2_digits", "moco_v2_resnet50"])
        }
        Train::MocoV3(options) => {
            pretrain::<MocoV3Task>("moco-v3", options, ["moco_v3_digits", "moco_v3_vit_small"])
        }
        Train::Flip(options) => pretrain::<FlipTask>("flip", options, ["flip_digits", "flip_vit_base"]),
        Train::Simsiam(options) => {
            pretrain::<SimSiamTask>("simsiam", options, ["simsiam_digits", "simsiam_resnet50"])
        }
    }
}

fn pretrain<M: Method>(command: &str, options: &Options, defaults: [&str; 2]) -> Result<ExitCode> {
    let start = Instant::now();
    let default = defaults[usize::from(options.data.is_some())];
    let recipe_name = options.recipe.as_deref().unwrap_or(default);
    let name = name(recipe_name);
    let title = format!("{}: loss ({name})", M::NAME);
    let place = Place { out: options.out.as_deref(), resume: options.resume, name };
    let (recipe, resumed) = plan(options, recipe_name, &place)?;
    if recipe.job != M::JOB {
        return Err(Error::msg(format!(
            "the recipe is for the job {:?}, not for pre-training by {}",
            recipe.job.name(),
            M::NAME
        )));
    }
    let run = |comm: Comm| {
        let (recipe, resumed) = (recipe.clone(), resumed.clone());
        one_rank::<M>(command, recipe, resumed, &place, title.clone(), &comm)
    };
    let outcomes = match recipe.run.ranks {
        1 => vec![run(comm::single())?],
        ranks => comm::threads(ranks, run)?,
    };
    if outcomes.contains(&Outcome::Interrupted) {
        return Ok(stop::code());
    }
    println!("wall time {:.0} s", start.elapsed().as_secs_f64());
    Ok(ExitCode::SUCCESS)
}

/// Trains on one rank; that with number 0 writes and reports.
fn one_rank<M: Method>(
    command: &str,
    mut recipe: Recipe,
    resumed: Option<RunDir>,
    place: &Place,
    title: String,
    comm: &Comm,
) -> Result<Outcome> {
    let batches = M::batches(&mut recipe, comm)?;
    let task = M::new(&recipe, comm)?;
    let ema = recipe.optim.ema.map(|decay| Ema::new(&task.params().all(), decay, false)).transpose()?;
    let optimizer = optimizer(&recipe.optim, task.params(), task.groups(&recipe))?;
    let mut trainer = Trainer::new(&task, Settings::of(&recipe)?, optimizer, ema).on_ranks(comm);
    let total = trainer.total(&batches)?;
    if comm.rank() > 0 {
        if let Some(run) = &resumed {
            trainer.resume(&run.state())?;
        }
        comm::barrier(comm)?;
        return trainer.run(&batches, None, &mut Progress::silent(), &AtomicBool::new(false));
    }
    let mut output = place.output(&recipe, resumed, &mut trainer, title)?;
    // nothing is written before all have read
    comm::barrier(comm)?;
    announce::<M>(&recipe, &batches, task.params(), &output.run, (trainer.step(), total));
    let mut progress = Progress::new(total, trainer.step());
    let outcome = trainer.run(&batches, Some(&mut output), &mut progress, stop::flag()?)?;
    let out = output.run.path().display();
    if outcome == Outcome::Interrupted {
        let step = trainer.step();
        eprintln!(
            "stopped after step {step} of {total}; `smalti train {command} --resume --out {out}` goes on"
        );
        return Ok(outcome);
    }
    let save = || task.save(&recipe, &output.run);
    trainer.ema().map_or_else(save, |ema| ema.with_average(save))?;
    if recipe.data.source == Source::Digits {
        report::digits(&recipe, &task)?;
    }
    println!("results are in {out}:");
    println!("  encoder.safetensors  model.safetensors  metrics.jsonl  loss.png  preview.png  recipe.toml");
    Ok(outcome)
}

/// The recipe, and the run that is resumed.
fn plan(options: &Options, recipe: &str, place: &Place) -> Result<(Recipe, Option<RunDir>)> {
    if options.resume && (options.recipe.is_some() || options.data.is_some()) {
        return Err(Error::msg("--resume takes recipe and data of the run; leave out --recipe and --data"));
    }
    let mut set = options.set.clone();
    set.extend(options.ranks.map(|ranks| format!("run.ranks={ranks}")));
    if let Some((run, recipe)) = place.interrupted(&set)? {
        return Ok((recipe, Some(run)));
    }
    let mut recipe = Recipe::load(recipe, &set)?;
    if let Some(data) = &options.data {
        recipe.data.source = Source::Folder;
        recipe.data.folder = Some(data.clone());
        recipe.recheck()?;
    }
    Ok((recipe, None))
}

/// `mae-digits` for `mae_digits` and for `some/where/mae_digits.toml`.
fn name(recipe: &str) -> String {
    let stem = Path::new(recipe).file_stem().map_or_else(|| recipe.into(), |stem| stem.to_string_lossy());
    stem.replace('_', "-")
}

fn announce<M: Method>(
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
        "{} on {source}: {} batches of {} an epoch, {}, {:.2} M parameters, {} threads",
        M::NAME,
        batches.per_epoch(),
        recipe.data.batch,
        recipe.schedule.length(),
        params.count() as f64 / 1e6,
        rayon::current_num_threads()
    );
    let at = if done > 0 { format!(", from step {done} of {total}") } else { String::new() };
    println!("writing to {}{at}", run.path().display());
}
