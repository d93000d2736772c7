use super::*;
use crate::train::{
    Recipe, optimizer,
    recipe::{Optimizer as Kind, Precision},
};
use smalti::{DType, nn::Param};
use std::{path::Path, sync::atomic::AtomicU64};

/// Least squares with a random part of the inputs switched off, so that the steps' random numbers count. Each loss
/// counts in a buffer, as a queue or running statistics would, and a weight has an upper bound.
struct Regression {
    params: Params,
    weight: Param,
    count: Param,
    /// From this step on the loss is NaN.
    broken_from: u64,
    /// After this step the weight is NaN.
    poisoned_after: u64,
    /// Sets the flag at this step, as Ctrl-C would.
    interrupt_at: u64,
    flag: AtomicBool,
    seen: AtomicU64,
}

impl Regression {
    fn new() -> Result<Regression> {
        let params = Params::new();
        let weight = params.param("weight", Tensor::zeros([4], DType::F32)?)?;
        let count = params.buffer("count", Tensor::scalar(0.0))?;
        let flag = AtomicBool::new(false);
        let seen = AtomicU64::new(0);
        let never = u64::MAX;
        let (broken_from, poisoned_after, interrupt_at) = (never, never, never);
        Ok(Regression { params, weight, count, broken_from, poisoned_after, interrupt_at, flag, seen })
    }
}

impl Task for Regression {
    type Batch = (Tensor, Tensor);

    fn params(&self) -> &Params {
        &self.params
    }

    fn loss(&self, (x, y): &Self::Batch, at: &At) -> Result<Loss> {
        let mut rng = at.rng;
        self.seen.fetch_add(1, Ordering::Relaxed);
        if at.step == self.interrupt_at {
            self.flag.store(true, Ordering::Relaxed);
        }
        let keep = Tensor::rand([4], &mut rng)?.add_scalar(0.5)?;
        let error = x.mul(&keep)?.mul(&self.weight.get())?.sum(1)?.sub(y)?;
        let loss = error.mul(&error)?.mean(())?;
        let value = if at.step >= self.broken_from { loss.mul_scalar(f64::NAN)? } else { loss };
        self.count.update(|count| count.add_scalar(1.0))?;
        Ok(Loss {
            value,
            monitored: vec![("count", self.count.value()), ("done", Tensor::scalar(at.done as f32))],
        })
    }

    fn after_step(&self) -> Result<()> {
        self.weight.update(|w| w.clamp(-10.0, BOUND))?;
        if self.count.value().item()? / 2.0 >= self.poisoned_after as f64 {
            self.weight.update(|w| w.mul_scalar(f64::NAN))?;
        }
        Ok(())
    }

    fn inputs<'b>(&self, _: &'b Self::Batch) -> Vec<(String, &'b [f32])> {
        vec![("view".into(), &[0.0, 1.0])]
    }

    fn preview(&self) -> Result<Option<RgbImage>> {
        Ok(Some(RgbImage::new(2, 2)))
    }
}

/// Below the least-squares weights of 1, 3 and 0.5.
const BOUND: f64 = 0.25;

struct Points;

impl Batches for Points {
    type Batch = (Tensor, Tensor);

    fn per_epoch(&self) -> usize {
        7
    }

    fn epoch_from(&self, epoch: u64, first: usize) -> Box<dyn Iterator<Item = Result<Self::Batch>> + '_> {
        Box::new((first..7).map(move |number| {
            let mut rng = Rng::new(9).stream(epoch).stream(number as u64);
            let x = Tensor::randn([8, 4], &mut rng)?;
            let y = x.mul(&Tensor::from_slice(&[1f32, -2.0, 3.0, 0.5], [4])?)?.sum(1)?;
            Ok((x, y))
        }))
    }
}

fn recipe() -> Recipe {
    let overrides = [
        "schedule.epochs=6",
        "schedule.warmup_epochs=1",
        "optim.accumulate=2",
        "optim.clip=5.0",
        "data.batch=8",
    ];
    let overrides: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
    let mut recipe = Recipe::load("mae_digits", &overrides).unwrap();
    (recipe.optim.base_lr, recipe.optim.ema, recipe.run.log_every) = (1.0, Some(0.9), 4);
    (recipe.run.checkpoint_every, recipe.run.preview_every) = (2, 3);
    recipe
}

fn trainer<'a>(task: &'a Regression, recipe: &Recipe) -> Result<Trainer<'a, Regression>> {
    let ema = recipe.optim.ema.map(|decay| Ema::new(&task.params.all(), decay, false)).transpose()?;
    Ok(Trainer::new(task, Settings::of(recipe)?, optimizer(&recipe.optim, &task.params, [])?, ema))
}

fn output(folder: &Path, recipe: &Recipe) -> Result<Output> {
    let run = RunDir::create(folder, recipe)?;
    Output::create(run, "loss".into())
}

/// What has to be equal: weights, averages, and the log but for times, by bits.
type Fingerprint = (Vec<u32>, Vec<u32>, Vec<[u64; 6]>);

fn fingerprint(trainer: &Trainer<Regression>, output: &Output) -> Result<Fingerprint> {
    let bits =
        |t: &Tensor| -> Result<Vec<u32>> { Ok(t.to_vec::<f32>()?.into_iter().map(f32::to_bits).collect()) };
    let average = &trainer.ema().unwrap().averages()[0].1;
    let log = super::super::metrics::read(&output.run.metrics())?;
    let line = |r: &Record| {
        let [epoch, loss, lr] = [r.epoch, r.loss, r.lr].map(f64::to_bits);
        [r.step, epoch, loss, lr, r.monitored["count"].to_bits(), r.monitored["done"].to_bits()]
    };
    let log = log.iter().map(line).collect();
    Ok((bits(&trainer.task.weight.value())?, bits(average)?, log))
}

#[test]
fn an_interrupted_and_resumed_run_is_the_uninterrupted_one_bit_for_bit() -> Result<()> {
    let (folder, recipe) = (tempfile::tempdir().unwrap(), recipe());
    let never = AtomicBool::new(false);
    let whole = Regression::new()?;
    let mut first = trainer(&whole, &recipe)?;
    let mut out = output(&folder.path().join("whole"), &recipe)?;
    assert_eq!(first.run(&Points, Some(&mut out), &mut Progress::silent(), &never)?, Outcome::Finished);
    assert_eq!((first.step(), first.total(&Points)?), (18, 18), "three steps of two micro-batches an epoch");
    assert!(out.run.file("loss.png").exists() && out.run.file("preview.png").exists());
    let expected = fingerprint(&first, &out)?;
    let (head, tail) = (expected.2.first().unwrap(), expected.2.last().unwrap());
    assert!(head[2] > tail[2], "the loss falls");
    // the first line is of four steps with two losses each, 1 to 8; the last of two steps, 33 to 36
    assert_eq!((f64::from_bits(head[4]), f64::from_bits(tail[4])), (4.5, 34.5));
    assert!(f64::from_bits(head[5]) < f64::from_bits(tail[5]) && f64::from_bits(tail[5]) < 1.0);
    let weights = whole.weight.value().to_vec::<f32>()?;
    assert_eq!(weights.iter().copied().fold(0.0, f32::max), BOUND as f32, "the bound holds");

    for interrupt_at in [0, 4, 8, 16] {
        let path = folder.path().join(interrupt_at.to_string());
        let part = Regression { interrupt_at, ..Regression::new()? };
        let mut begun = trainer(&part, &recipe)?;
        let mut out = output(&path, &recipe)?;
        let outcome = begun.run(&Points, Some(&mut out), &mut Progress::silent(), &part.flag)?;
        assert_eq!((outcome, begun.step()), (Outcome::Interrupted, interrupt_at + 1), "the step is finished");

        let (run, recipe) = RunDir::open(&path, &[])?;
        let rest = Regression::new()?;
        let mut resumed = trainer(&rest, &recipe)?;
        let mut out = resumed.go_on(run, &recipe, "loss".into())?;
        assert_eq!(resumed.run(&Points, Some(&mut out), &mut Progress::silent(), &never)?, Outcome::Finished);
        assert_eq!(fingerprint(&resumed, &out)?, expected, "interrupted at step {interrupt_at}");
        assert_eq!(rest.seen.into_inner(), 2 * (18 - interrupt_at - 1), "no step is done twice");
    }
    Ok(())
}

/// The error that ends a run of `task`; the checkpoint after epoch 2 stands.
fn fails_behind_epoch_2(task: &Regression) -> Result<String> {
    let (folder, recipe) = (tempfile::tempdir().unwrap(), recipe());
    let mut run = trainer(task, &recipe)?;
    let mut out = output(&folder.path().join("run"), &recipe)?;
    let never = AtomicBool::new(false);
    let error = run.run(&Points, Some(&mut out), &mut Progress::silent(), &never).unwrap_err().to_string();
    let fresh = Regression::new()?;
    let mut kept = trainer(&fresh, &recipe)?;
    kept.resume(&out.run.state())?;
    assert_eq!(kept.step(), 6, "the checkpoint after epoch 2");
    Ok(error)
}

#[test]
fn the_first_loss_that_is_not_finite_stops_the_run_and_the_last_checkpoint_stands() -> Result<()> {
    let task = Regression { broken_from: 10, ..Regression::new()? };
    let error = fails_behind_epoch_2(&task)?;
    assert!(error.contains("loss is NaN at step 10") && error.contains("learning rate"), "{error}");
    assert!(error.contains("goes wrong: affine: gave NaN") && error.contains("tests.rs"), "{error}");
    assert!(task.weight.value().to_vec::<f32>()?.iter().all(|w| w.is_finite()));
    Ok(())
}

/// A weight breaks in the last step before a checkpoint, or earlier: it is named, and the checkpoint before stands.
#[test]
fn parameters_that_are_not_finite_are_never_saved() -> Result<()> {
    for (poisoned_after, message) in
        [(12, "weight is not finite after step 12"), (11, "loss is NaN at step 11 (learning rate")]
    {
        let task = Regression { poisoned_after, ..Regression::new()? };
        let error = fails_behind_epoch_2(&task)?;
        assert!(error.contains(message) && error.contains("weight is not finite"), "{error}");
    }
    Ok(())
}

/// A run may end within an epoch; its schedule ends there.
#[test]
fn a_length_in_steps() -> Result<()> {
    let (folder, mut recipe) = (tempfile::tempdir().unwrap(), recipe());
    (recipe.schedule.epochs, recipe.schedule.steps) = (0, 8);
    let task = Regression::new()?;
    let mut run = trainer(&task, &recipe)?;
    let mut out = output(&folder.path().join("run"), &recipe)?;
    let never = AtomicBool::new(false);
    assert_eq!(run.run(&Points, Some(&mut out), &mut Progress::silent(), &never)?, Outcome::Finished);
    assert_eq!((run.step(), task.seen.into_inner()), (8, 16));
    let fresh = Regression::new()?;
    let mut kept = trainer(&fresh, &recipe)?;
    kept.resume(&out.run.state())?;
    assert_eq!(kept.step(), 8, "saved at its end");
    assert!(out.metrics.records().last().unwrap().lr < 0.2 * recipe.peak_lr());
    Ok(())
}

#[test]
fn a_state_that_does_not_fit_is_refused() -> Result<()> {
    let (folder, recipe) = (tempfile::tempdir().unwrap(), recipe());
    let task = Regression::new()?;
    let mut out = output(&folder.path().join("run"), &recipe)?;
    trainer(&task, &recipe)?.run(
        &Points,
        Some(&mut out),
        &mut Progress::silent(),
        &AtomicBool::new(false),
    )?;
    let path = out.run.state();
    let message = |recipe: &Recipe| {
        trainer(&Regression::new().unwrap(), recipe).unwrap().resume(&path).unwrap_err().to_string()
    };
    assert!(message(&Recipe { seed: 5, ..recipe.clone() }).contains("seed"));
    let mut other = recipe.clone();
    other.optim.ema = None;
    assert!(message(&other).contains("optim.ema"));
    other = recipe.clone();
    other.optim.optimizer = Kind::Sgd;
    assert!(message(&other).contains("load_state"));
    let settings = Settings { origin: Some("encoder B".into()), ..Settings::of(&recipe)? };
    let optimizer = optimizer(&recipe.optim, &task.params, [])?;
    let error = Trainer::new(&task, settings, optimizer, None).resume(&path).unwrap_err().to_string();
    assert!(error.contains("on top of null, not of \"encoder B\""), "{error}");
    let bytes = std::fs::read(&path).unwrap();
    for damaged in [&bytes[..bytes.len() - 3], &bytes[..20], b""] {
        std::fs::write(&path, damaged).unwrap();
        assert!(message(&recipe).contains("last.safetensors"));
    }
    Ok(())
}

#[test]
fn bf16_is_refused_on_the_cpu() {
    let mut recipe = recipe();
    recipe.optim.precision = Precision::Bf16;
    assert!(Settings::of(&recipe).unwrap_err().to_string().contains("bf16"));
    recipe.optim.precision = Precision::F32;
    recipe.optim.accumulate = 8;
    let task = Regression::new().unwrap();
    let run = trainer(&task, &recipe).unwrap();
    assert!(run.total(&Points).unwrap_err().to_string().contains("optim.accumulate"));
}
