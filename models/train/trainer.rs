//! The training loop: any [`Task`] over any [`Batches`].
//!
//! Nothing but counters is carried from step to step: the random numbers of step s follow from (seed, s), the
//! order of the data from (seed, epoch). So a run that was interrupted and resumed is the uninterrupted run,
//! bit for bit.

use super::{
    Progress, Recipe, RunDir,
    metrics::{Metrics, Record},
    plot,
    recipe::{self, Job, Precision},
};
use image::RgbImage;
use serde_json::json;
use smalti::{
    DType, Device, Error, Gradients, Result, Rng, Tensor, ensure,
    io::checkpoint,
    nn::Params,
    optim::{
        AdamW, Algorithm, Ema, Group, Lamb, Lars, Optimizer, Schedule, Sgd, clip_grad_norm, no_decay_1d,
    },
};
use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

/// The stream of the seed that training steps draw from; data and initialisation have streams of their own.
pub const STEP_STREAM: u64 = 0x7472_6169;

/// Names in checkpoints.
const OPTIMIZER: &str = "main";
const EMA: &str = "ema.";

/// What is trained.
pub trait Task {
    /// What one micro-batch is.
    type Batch;

    /// All that is trained, and buffers.
    fn params(&self) -> &Params;

    /// The mean loss of a micro-batch.
    ///
    /// # Errors
    /// Any error ends the run.
    fn loss(&self, batch: &Self::Batch, at: &At) -> Result<Tensor>;

    /// A picture of what the model does at present.
    ///
    /// # Errors
    /// Any error ends the run.
    fn preview(&self) -> Result<Option<RgbImage>> {
        Ok(None)
    }
}

/// Where in the run a loss is computed.
#[derive(Clone, Copy, Debug)]
pub struct At {
    /// Number of the step, from 0.
    pub step: u64,
    /// Passes over the data, with fraction.
    pub epoch: f64,
    /// Random numbers of this micro-batch.
    pub rng: Rng,
}

/// Micro-batches by epoch, the same ones every time that they are asked for.
pub trait Batches {
    /// What one is.
    type Batch;

    /// How many an epoch has.
    fn per_epoch(&self) -> usize;

    /// Those of an epoch from number `first` on.
    fn epoch_from(&self, epoch: u64, first: usize) -> Box<dyn Iterator<Item = Result<Self::Batch>> + '_>;
}

/// How a run goes.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Every random number follows from it.
    pub seed: u64,
    /// Passes over the data.
    pub epochs: usize,
    /// Learning rate over epochs.
    pub schedule: Schedule,
    /// Micro-batches a step.
    pub accumulate: usize,
    /// Largest norm of the gradient.
    pub clip: Option<f64>,
    /// Images in a micro-batch.
    pub batch: usize,
    /// Steps from one line of the log to the next.
    pub log_every: u64,
    /// Epochs from one checkpoint to the next.
    pub checkpoint_every: usize,
    /// Epochs from one set of pictures to the next.
    pub preview_every: usize,
    /// What the run is built on and does not train, such as a frozen encoder: to go on, it must be the same.
    pub origin: Option<String>,
}

impl Settings {
    /// The settings of a recipe.
    ///
    /// # Errors
    /// If it asks for a precision that the device or the job does not train in.
    pub fn of(recipe: &Recipe) -> Result<Settings> {
        if recipe.optim.precision == Precision::Bf16 {
            if Device::current()? == Device::Cpu {
                return Err(Error::msg(
                    "optim.precision = \"bf16\" needs a GPU; train in \"f32\" on the CPU",
                ));
            }
            if recipe.job == Job::LinearProbe {
                return Err(Error::msg("optim.precision = \"bf16\": a linear probe is trained in \"f32\""));
            }
        }
        Ok(Settings {
            seed: recipe.seed,
            epochs: recipe.schedule.epochs,
            schedule: Schedule::WarmupCosine {
                base: recipe.peak_lr(),
                warmup: 0.0,
                min: recipe.schedule.min_lr,
                warmup_steps: recipe.schedule.warmup_epochs,
                steps: recipe.schedule.epochs as f64,
            },
            accumulate: recipe.optim.accumulate,
            clip: recipe.optim.clip,
            batch: recipe.data.batch,
            log_every: recipe.run.log_every as u64,
            checkpoint_every: recipe.run.checkpoint_every,
            preview_every: recipe.run.preview_every,
            origin: None,
        })
    }
}

/// The optimizer of a recipe over what is trained. `groups` come on top of "no decay for one dimension". In bf16
/// precision the parameters are converted, and the optimizer keeps f32 masters.
///
/// # Errors
/// If a number is out of range.
pub fn optimizer(
    recipe: &recipe::Optim,
    params: &Params,
    groups: impl IntoIterator<Item = Group>,
) -> Result<Box<dyn Optimizer>> {
    if recipe.precision == Precision::Bf16 {
        params.to_dtype(DType::BF16)?;
    }
    let trained = params.trained();
    let groups: Vec<Group> = std::iter::once(no_decay_1d(&trained)).chain(groups).collect();
    let betas = (recipe.betas[0], recipe.betas[1]);
    let (momentum, weight_decay) = (recipe.momentum, recipe.weight_decay);
    Ok(match recipe.optimizer {
        recipe::Optimizer::AdamW => {
            Box::new(AdamW { betas, weight_decay, ..AdamW::default() }.over(&trained, &groups)?)
        }
        recipe::Optimizer::Sgd => {
            Box::new(Sgd { momentum, weight_decay, ..Sgd::default() }.over(&trained, &groups)?)
        }
        recipe::Optimizer::Lars => {
            Box::new(Lars { momentum, weight_decay, ..Lars::default() }.over(&trained, &groups)?)
        }
        recipe::Optimizer::Lamb => {
            Box::new(Lamb { betas, weight_decay, ..Lamb::default() }.over(&trained, &groups)?)
        }
    })
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All epochs are done.
    Finished,
    /// It was asked to stop; the state is saved.
    Interrupted,
}

/// Where a run writes.
pub struct Output {
    /// Its folder.
    pub run: RunDir,
    /// The log in it.
    pub metrics: Metrics,
    /// Title of the loss curve.
    pub title: String,
}

impl Output {
    /// That of a new run.
    ///
    /// # Errors
    /// If the log cannot be made.
    pub fn create(run: RunDir, title: String) -> Result<Output> {
        let metrics = Metrics::create(&run.metrics())?;
        Ok(Output { run, metrics, title })
    }
}

/// A run.
pub struct Trainer<'a, T: Task> {
    task: &'a T,
    settings: Settings,
    optimizer: Box<dyn Optimizer>,
    ema: Option<Ema>,
    step: u64,
    /// Sum and number of the losses since the last line of the log.
    window: (f64, u64),
    /// Seconds of training in earlier sessions of this run.
    before: f64,
}

/// Time since the start of this session, and since the last line of the log.
struct Clock {
    session: Instant,
    line: Instant,
    steps: u64,
}

impl<'a, T: Task> Trainer<'a, T> {
    /// A run at its start.
    pub fn new(task: &'a T, settings: Settings, optimizer: Box<dyn Optimizer>, ema: Option<Ema>) -> Self {
        Trainer { task, settings, optimizer, ema, step: 0, window: (0.0, 0), before: 0.0 }
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Steps of the whole run over these batches.
    ///
    /// # Errors
    /// If an epoch has fewer micro-batches than one step takes.
    pub fn total(&self, batches: &impl Batches) -> Result<u64> {
        let (n, accumulate) = (batches.per_epoch(), self.settings.accumulate.max(1));
        ensure!(
            n >= accumulate,
            "train",
            "an epoch has {n} batches of {}, and one step takes {accumulate} (optim.accumulate)",
            self.settings.batch
        );
        Ok((n / accumulate * self.settings.epochs) as u64)
    }

    /// The moving average of the weights.
    pub fn ema(&self) -> Option<&Ema> {
        self.ema.as_ref()
    }

    /// Trains to the end, or until `stop` is set. The state is saved then, and every so many epochs.
    ///
    /// # Errors
    /// Those of the task, the data, and of writing; a loss that is not finite. The last checkpoint stands.
    pub fn run(
        &mut self,
        batches: &impl Batches<Batch = T::Batch>,
        mut output: Option<&mut Output>,
        progress: &mut Progress,
        stop: &AtomicBool,
    ) -> Result<Outcome> {
        let total = self.total(batches)?;
        let per_epoch = (batches.per_epoch() / self.settings.accumulate) as u64;
        let now = Instant::now();
        let mut clock = Clock { session: now, line: now, steps: 0 };
        while self.step < total {
            let (epoch, first) = (self.step / per_epoch, self.step % per_epoch);
            let mut source = batches.epoch_from(epoch, first as usize * self.settings.accumulate);
            for _ in first..per_epoch {
                let at = self.epoch_now(batches.per_epoch());
                let lr = self.settings.schedule.at(at);
                let loss = self.one_step(&mut source, at, lr)?;
                clock.steps += 1;
                let end = self.epoch_now(batches.per_epoch());
                self.report(&mut clock, output.as_deref_mut(), progress, (end, loss, lr, total))?;
                if stop.load(Ordering::Relaxed) && self.step < total {
                    self.save(output.as_deref(), &clock)?;
                    progress.finish();
                    return Ok(Outcome::Interrupted);
                }
            }
            drop(source);
            self.end_of_epoch(epoch as usize + 1, output.as_deref(), &clock)?;
        }
        progress.finish();
        Ok(Outcome::Finished)
    }

    /// Passes over the data done, counted in micro-batches as the papers' code does.
    fn epoch_now(&self, batches: usize) -> f64 {
        let per_epoch = (batches / self.settings.accumulate) as u64;
        let within = (self.step % per_epoch) as usize * self.settings.accumulate;
        (self.step / per_epoch) as f64 + within as f64 / batches as f64
    }

    fn one_step(
        &mut self,
        source: &mut dyn Iterator<Item = Result<T::Batch>>,
        epoch: f64,
        lr: f64,
    ) -> Result<f64> {
        let accumulate = self.settings.accumulate;
        let rng = Rng::new(self.settings.seed).stream(STEP_STREAM).stream(self.step);
        let mut grads = Gradients::default();
        let mut mean = 0.0;
        for micro in 0..accumulate {
            let batch =
                source.next().ok_or_else(|| Error::msg("train: the data ended within an epoch"))??;
            let at = At { step: self.step, epoch, rng: rng.stream(micro as u64) };
            let mut loss = self.task.loss(&batch, &at)?;
            if accumulate > 1 {
                loss = loss.mul_scalar(1.0 / accumulate as f64)?;
            }
            let value = loss.item()?;
            mean += value;
            self.check(value, "loss", lr)?;
            grads.accumulate(loss.backward()?)?;
        }
        if let Some(clip) = self.settings.clip {
            let norm = clip_grad_norm(&self.task.params().trained(), &mut grads, clip, 2.0)?;
            self.check(norm, "norm of the gradient", lr)?;
        }
        self.optimizer.step(&grads, lr)?;
        if let Some(ema) = &mut self.ema {
            ema.update()?;
        }
        self.step += 1;
        self.window = (self.window.0 + mean, self.window.1 + 1);
        Ok(mean)
    }

    fn check(&self, value: f64, what: &str, lr: f64) -> Result<()> {
        if value.is_finite() {
            return Ok(());
        }
        Err(Error::msg(format!(
            "train: the {what} is {value} at step {} (learning rate {lr:.3e}); nothing was saved after the last \
             checkpoint. A lower optim.base_lr, a longer schedule.warmup_epochs or optim.clip may help",
            self.step
        )))
    }

    fn report(
        &mut self,
        clock: &mut Clock,
        output: Option<&mut Output>,
        progress: &mut Progress,
        (epoch, loss, lr, total): (f64, f64, f64, u64),
    ) -> Result<()> {
        let images = clock.steps as f64 * (self.settings.batch * self.settings.accumulate) as f64;
        let images_per_second = images / clock.line.elapsed().as_secs_f64().max(1e-9);
        let mean = self.window.0 / self.window.1.max(1) as f64;
        progress.update(self.step, epoch, if mean.is_finite() { mean } else { loss }, lr, images_per_second);
        if self.step.is_multiple_of(self.settings.log_every) || self.step == total {
            let seconds = self.before + clock.session.elapsed().as_secs_f64();
            if let Some(output) = output {
                let record = Record { step: self.step, epoch, loss: mean, lr, images_per_second, seconds };
                output.metrics.push(record)?;
            }
            self.window = (0.0, 0);
            (clock.line, clock.steps) = (Instant::now(), 0);
        }
        Ok(())
    }

    fn end_of_epoch(&self, done: usize, output: Option<&Output>, clock: &Clock) -> Result<()> {
        let last = done == self.settings.epochs;
        if last || done.is_multiple_of(self.settings.checkpoint_every) {
            self.save(output, clock)?;
        }
        if last || done.is_multiple_of(self.settings.preview_every) {
            self.pictures(output)?;
        }
        Ok(())
    }

    fn pictures(&self, output: Option<&Output>) -> Result<()> {
        let Some(output) = output else { return Ok(()) };
        if output.metrics.records().len() > 1 {
            output.run.picture("loss.png", &plot::loss_curve(output.metrics.records(), &output.title)?)?;
        }
        match smalti::no_grad(|| self.task.preview())? {
            Some(picture) => output.run.picture("preview.png", &picture),
            None => Ok(()),
        }
    }

    fn save(&self, output: Option<&Output>, clock: &Clock) -> Result<()> {
        let Some(output) = output else { return Ok(()) };
        let (sum, number) = self.window;
        let ema = self.ema.as_ref();
        let averages = ema.map(Ema::averages).unwrap_or_default();
        let progress = checkpoint::Progress {
            step: self.step,
            tensors: averages.into_iter().map(|(name, t)| (format!("{EMA}{name}"), t)).collect(),
            metadata: json!({
                "seed": self.settings.seed,
                "origin": self.settings.origin,
                // as bits, so that the log goes on with the very same mean
                "window": [sum.to_bits(), number],
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
        let [sum, count] = [0, 1].map(|i| number(&meta["window"][i], "mean of the loss"));
        self.window = (f64::from_bits(sum?), count?);
        self.before = meta["seconds"].as_f64().unwrap_or(0.0);
        self.step = progress.step;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
