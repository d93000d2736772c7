//! Where a run goes: a new folder, or that of an interrupted run.

use smalti::Result;
use smalti_models::train::{Output, Recipe, RunDir, Task, Trainer};
use std::path::{Path, PathBuf};

/// Where runs go that no `--out` places.
const RUNS: &str = "runs";

/// What the command line says about the folder.
pub struct Place<'a> {
    pub out: Option<&'a Path>,
    pub resume: bool,
    /// Name of the folder in [`RUNS`] if there is no `out`.
    pub name: String,
}

impl Place<'_> {
    /// The interrupted run and its recipe, if one is to be resumed; else nothing, once it is known that a new run
    /// may go to `out`.
    pub fn interrupted(&self, set: &[String]) -> Result<Option<(RunDir, Recipe)>> {
        match (self.resume, self.out) {
            (true, Some(out)) => RunDir::open(out, set).map(Some),
            (true, None) => RunDir::open(&self.last()?, set).map(Some),
            (false, Some(out)) => RunDir::check_free(out).map(|()| None),
            (false, None) => Ok(None),
        }
    }

    fn last(&self) -> Result<PathBuf> {
        RunDir::last_numbered(Path::new(RUNS), &self.name)
    }

    /// Brings the trainer to where the run stood, or makes the folder of a new one.
    pub fn output<T: Task>(
        &self,
        recipe: &Recipe,
        resumed: Option<RunDir>,
        trainer: &mut Trainer<T>,
        title: String,
    ) -> Result<Output> {
        if let Some(run) = resumed {
            return trainer.go_on(run, recipe, title);
        }
        let run = match self.out {
            Some(out) => RunDir::create(out, recipe)?,
            None => RunDir::create_numbered(Path::new(RUNS), &self.name, recipe)?,
        };
        Output::create(run, title)
    }
}
