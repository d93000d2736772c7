//! The training loop: any [`Task`] over any [`Batches`].
//!
//! Nothing but counters is carried from step to step: the random numbers of step s follow from (seed, s), the
//! order of the data from (seed, epoch). So a run that was interrupted and resumed is the uninterrupted run,
//! bit for bit.

mod broken;
mod settings;
mod state;
mod window;

use super::{
    Progress, RunDir,
    metrics::{Metrics, Record},
    plot,
};
use image::RgbImage;
pub use settings::{Length, Settings};
use smalti::{
    Device, Error, Gradients, Result, Rng, Tensor,
    comm::{self, Comm},
    ensure,
    nn::Params,
    optim::{Ema, Optimizer, clip_grad_norm},
};
use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};
use window::Window;

/// The stream of the seed that training steps draw from; data and initialisation have streams of their own.
pub const STEP_STREAM: u64 = 0x7472_6169;

/// What is trained.
pub trait Task {
    /// What one micro-batch is.
    type Batch;

    /// All that is trained, and buffers.
    fn params(&self) -> &Params;

    /// The mean loss of a micro-batch, and what is watched beside it.
    ///
    /// # Errors
    /// Any error ends the run.
    fn loss(&self, batch: &Self::Batch, at: &At) -> Result<Loss>;

    /// Called when a step has changed the parameters: for bounds that they must keep to.
    ///
    /// # Errors
    /// Any error ends the run.
    fn after_step(&self) -> Result<()> {
        Ok(())
    }

    /// The numbers of a micro-batch by name, to say of a loss that is not finite whether the data are to blame.
    fn inputs<'b>(&self, _batch: &'b Self::Batch) -> Vec<(String, &'b [f32])> {
        Vec::new()
    }

    /// A picture of what the model does at present.
    ///
    /// # Errors
    /// Any error ends the run.
    fn preview(&self) -> Result<Option<RgbImage>> {
        Ok(None)
    }
}

/// What a task says of a micro-batch.
#[derive(Clone, Debug)]
pub struct Loss {
    /// The mean loss, a scalar.
    pub value: Tensor,
    /// Scalars that say how training goes, by the name that they have in the log; their means over the lines of the
    /// log are written beside that of the loss.
    pub monitored: Vec<(&'static str, Tensor)>,
}

impl From<Tensor> for Loss {
    fn from(value: Tensor) -> Loss {
        Loss { value, monitored: Vec::new() }
    }
}

/// Where in the run a loss is computed.
#[derive(Clone, Copy, Debug)]
pub struct At {
    /// Number of the step, from 0.
    pub step: u64,
    /// Passes over the data, with fraction.
    pub epoch: f64,
    /// Share of the whole run that is done, from 0 to 1.
    pub done: f64,
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
    comm: Comm,
    step: u64,
    /// What has come since the last line of the log.
    window: Window,
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
        let comm = comm::single();
        Trainer { task, settings, optimizer, ema, comm, step: 0, window: Window::default(), before: 0.0 }
    }

    /// One rank of several, whose gradients, losses and stopping are one. Rank 0 alone gets an output and a flag that
    /// someone sets.
    pub fn on_ranks(self, comm: &Comm) -> Self {
        Trainer { comm: comm.clone(), ..self }
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
        Ok(match self.settings.length {
            Length::Epochs(epochs) => (n / accumulate * epochs) as u64,
            Length::Steps(steps) => steps,
        })
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
            for _ in first..per_epoch.min(total - epoch * per_epoch) {
                let lr = self.one_step(&mut source, batches.per_epoch(), total)?;
                clock.steps += 1;
                let end = self.epoch_now(batches.per_epoch());
                self.report(&mut clock, output.as_deref_mut(), progress, (end, lr, total))?;
                if self.stops(stop)? && self.step < total {
                    self.save(output.as_deref(), &clock)?;
                    progress.finish();
                    return Ok(Outcome::Interrupted);
                }
            }
            drop(source);
            self.end_of_epoch(epoch as usize + 1, self.step == total, output.as_deref(), &clock)?;
        }
        progress.finish();
        Ok(Outcome::Finished)
    }

    /// Whether rank 0 was asked to stop.
    fn stops(&self, flag: &AtomicBool) -> Result<bool> {
        let own = flag.load(Ordering::Relaxed);
        if self.comm.world() == 1 {
            return Ok(own);
        }
        let own = Device::Cpu.scope(|| Tensor::from_slice(&[i64::from(own)], [1]))?;
        Ok(own.broadcast_from(0, &self.comm)?.item()? > 0.0)
    }

    /// Passes over the data done, counted in micro-batches as the papers' code does.
    fn epoch_now(&self, batches: usize) -> f64 {
        let per_epoch = (batches / self.settings.accumulate) as u64;
        let within = (self.step % per_epoch) as usize * self.settings.accumulate;
        (self.step / per_epoch) as f64 + within as f64 / batches as f64
    }

    /// One step on the next micro-batches of an epoch that has `batches`; its learning rate.
    fn one_step(
        &mut self,
        source: &mut dyn Iterator<Item = Result<T::Batch>>,
        batches: usize,
        total: u64,
    ) -> Result<f64> {
        let accumulate = self.settings.accumulate;
        let epoch = self.epoch_now(batches);
        let epochs = match self.settings.length {
            Length::Epochs(epochs) => epochs as f64,
            Length::Steps(_) => total as f64 / (batches / accumulate) as f64,
        };
        let lr = self.settings.rate.at((self.step, total), (epoch, epochs));
        let rng = Rng::new(self.settings.seed).stream(STEP_STREAM).stream(self.step);
        let mut grads = Gradients::default();
        let mut means = Window::default();
        for micro in 0..accumulate {
            let batch =
                source.next().ok_or_else(|| Error::msg("train: the data ended within an epoch"))??;
            let mut rng = rng.stream(micro as u64);
            if self.comm.world() > 1 {
                rng = rng.stream(self.comm.rank() as u64);
            }
            let at = At { step: self.step, epoch, done: epoch / epochs, rng };
            let mut loss = self.task.loss(&batch, &at)?;
            if accumulate > 1 {
                loss.value = loss.value.mul_scalar(1.0 / accumulate as f64)?;
            }
            let value = loss.value.item()?;
            if !value.is_finite() {
                return Err(self.broken(value, &batch, &at, lr));
            }
            means.add(value, &loss.monitored, 1.0 / accumulate as f64)?;
            grads.accumulate(loss.value.backward_averaged(&self.comm)?)?;
        }
        if let Some(clip) = self.settings.clip {
            let norm = clip_grad_norm(&self.task.params().trained(), &mut grads, clip, 2.0)?;
            if !norm.is_finite() {
                return Err(self.broken_gradient(norm, &grads, lr));
            }
        }
        self.optimizer.step(&grads, lr)?;
        self.task.after_step()?;
        if let Some(ema) = &mut self.ema {
            ema.update()?;
        }
        self.step += 1;
        self.window.extend(means.over_ranks(&self.comm)?);
        Ok(lr)
    }

    fn report(
        &mut self,
        clock: &mut Clock,
        output: Option<&mut Output>,
        progress: &mut Progress,
        (epoch, lr, total): (f64, f64, u64),
    ) -> Result<()> {
        let images = clock.steps as f64 * (self.settings.batch * self.settings.accumulate) as f64;
        let images_per_second = images / clock.line.elapsed().as_secs_f64().max(1e-9);
        let (loss, monitored) = self.window.means();
        let seconds = self.before + clock.session.elapsed().as_secs_f64();
        let record = Record { step: self.step, epoch, loss, lr, images_per_second, seconds, monitored };
        progress.update(&record);
        if self.step.is_multiple_of(self.settings.log_every) || self.step == total {
            if let Some(output) = output {
                output.metrics.push(record)?;
            }
            self.window = Window::default();
            (clock.line, clock.steps) = (Instant::now(), 0);
        }
        Ok(())
    }

    fn end_of_epoch(&self, done: usize, last: bool, output: Option<&Output>, clock: &Clock) -> Result<()> {
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
}

#[cfg(test)]
mod tests;
