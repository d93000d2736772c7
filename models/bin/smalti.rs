//! The command line.

mod evaluate;
mod inspect;
mod recipes;
mod report;
mod run;
mod stop;
mod train;
mod views;

use clap::{Parser, Subcommand};
use smalti::{Device, Error, Result};
use std::{path::PathBuf, process::ExitCode};

/// Vision papers on smalti: training, evaluation, checkpoints.
#[derive(Parser)]
#[command(name = "smalti", version, arg_required_else_help = true)]
struct Cli {
    /// Number of threads; all cores if not given. Results do not depend on it.
    #[arg(long, global = true, value_name = "N")]
    threads: Option<usize>,
    /// cpu, or cuda:N in a build with the feature `cuda` (or `emulate`); cpu if not given
    #[arg(long, global = true, value_name = "DEVICE")]
    device: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Trains a model.
    Train {
        #[command(subcommand)]
        what: train::Train,
    },
    /// Says how good an encoder is.
    Evaluate {
        #[command(subcommand)]
        what: evaluate::Evaluate,
    },
    /// Lists the parameters of a checkpoint (.safetensors or .pth): names, shapes, dtypes, counts.
    Inspect {
        /// The file.
        checkpoint: PathBuf,
    },
    /// Draws images beside their random views, to see what an augmentation does.
    Views(views::Options),
    /// Lists the built-in recipes, or prints one.
    Recipes {
        /// Which one to print.
        name: Option<String>,
    },
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", error.to_string().lines().collect::<Vec<_>>().join(" "));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    set_threads(cli.threads)?;
    if let Some(device) = &cli.device {
        Device::parse(device)?.set_default();
    }
    match &cli.command {
        Command::Train { what } => train::run(what),
        Command::Evaluate { what } => evaluate::run(what),
        Command::Inspect { checkpoint } => inspect::run(checkpoint),
        Command::Views(options) => views::run(options),
        Command::Recipes { name } => recipes::run(name.as_deref()),
    }
}

/// The main thread works too, so that `--threads 1` means one thread.
fn set_threads(threads: Option<usize>) -> Result<()> {
    if threads == Some(0) {
        return Err(Error::msg("--threads: needs at least 1"));
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0)).use_current_thread();
    pool.build_global().map_err(|e| Error::msg(format!("--threads: {e}")))
}
