//! Saving a run and going on with it.

use super::{Clock, Output, Task, Trainer, Window};
use crate::train::{Metrics, Recipe, RunDir};
use serde_json::json;
use smalti::{
    Error, Result, Tensor,
    io::checkpoint,
    optim::{Ema, Optimizer},
};
use std::path::Path;

/// Names in checkpoints.
const OPTIMIZER: &str = "main";
const EMA: &str = "ema.";

impl<T: Task> Trainer<'_, T> {
    /// Writes the state, unless a parameter is no longer finite: the checkpoint before stands then.
    pub(super) fn save(&self, output: Option<&Output>, clock: &Clock) -> Result<()> {
        let Some(output) = output else { return Ok(()) };
        self.check_parameters()?;
        let ema = self.ema.as_ref();
        let averages = ema.map(Ema::averages).unwrap_or_default();
        let progress = checkpoint::Progress {
            step: self.step,
            tensors: averages.into_iter().map(|(name, t)| (format!("{EMA}{name}"), t)).collect(),
            metadata: json!({
                "seed": self.settings.seed,
                "origin": self.settings.origin,
                "window": self.window.state(),
                "seconds": self.before + clock.session.elapsed().as_secs_f64(),
                "ema_updates": ema.map(Ema::updates),
            }),
            ..Default::default()
        };
        checkpoint::save(output.run.state(), self.task.params(), &[(OPTIMIZER, &*self.optimizer)], &progress)
    }

    /// [`resume`](Self::resume) from the state in the folder of a run, whose log and recipe go on too.
    ///
    /// # Errors
    /// As there, or if the folder cannot be written.
    pub fn go_on(&mut self, run: RunDir, recipe: &Recipe, title: String) -> Result<Output> {
        self.resume(&run.state())?;
        run.set_recipe(recipe)?;
        let metrics = Metrics::resume(&run.metrics(), self.step)?;
        Ok(Output { run, metrics, title })
    }

    /// Goes on where a saved run stood.
    ///
    /// # Errors
    /// If the file is damaged, or belongs to another model, optimizer, seed or origin. The run cannot be used then.
    pub fn resume(&mut self, path: &Path) -> Result<()> {
        let optimizers = &mut [(OPTIMIZER, &mut *self.optimizer as &mut dyn Optimizer)];
        let progress = checkpoint::load(path, self.task.params(), optimizers)?;
        let meta = &progress.metadata;
        let number = |value: &serde_json::Value, what: &str| {
            value.as_u64().ok_or_else(|| Error::format(path, format!("the state has no {what}")))
        };
        let seed = number(&meta["seed"], "seed")?;
        if seed != self.settings.seed {
            let what = format!("was trained with seed {seed}, the recipe has {}", self.settings.seed);
            return Err(Error::format(path, what));
        }
        if meta["origin"] != json!(self.settings.origin) {
            let [then, now] = [&meta["origin"], &json!(self.settings.origin)].map(|o| o.to_string());
            return Err(Error::format(path, format!("was trained on top of {then}, not of {now}")));
        }
        match (&mut self.ema, &meta["ema_updates"]) {
            (None, serde_json::Value::Null) => {}
            (Some(ema), updates) if !updates.is_null() => {
                let strip =
                    |(name, t): &(String, Tensor)| Some((name.strip_prefix(EMA)?.to_owned(), t.clone()));
                let averages: Vec<_> = progress.tensors.iter().filter_map(strip).collect();
                ema.load(&averages, number(updates, "number of averages")?)?;
            }
            _ => return Err(Error::format(path, "optim.ema was switched on or off since the run began")),
        }
        let window = Window::restore(&meta["window"]);
        self.window = window.ok_or_else(|| Error::format(path, "the state has no mean of the loss"))?;
        self.before = meta["seconds"].as_f64().unwrap_or(0.0);
        self.step = progress.step;
        Ok(())
    }
}
