use super::*;
use smalti::{DType, nn::Param};
use std::{path::Path, sync::atomic::AtomicU64};

/// Least squares with a random part of the inputs switched off, so that the steps' random numbers count.
struct Regression {
    params: Params,
    weight: Param,
    /// From this step on the loss is NaN.
    broken_from: u64,
    /// Sets the flag at this step, as Ctrl-C would.
    interrupt_at: u64,
    flag: AtomicBool,
    seen: AtomicU64,
}

impl Regression {
    fn new() -> Result<Regression> {
        let params = Params::new();
        let weight = params.param("weight", Tensor::zeros([4], DType::F32)?)?;
        let flag = AtomicBool::new(false);
        let seen = AtomicU64::new(0);
        Ok(Regression { params, weight, broken_from: u64::MAX, interrupt_at: u64::MAX, flag, seen })
    }
}

impl Task for Regression {
    type Batch = (Tensor, Tensor);

    fn params(&self) -> &Params {
        &self.params
    }

    fn loss(&self, (x, y): &Self::Batch, at: &At) -> Result<Tensor> {
        let mut rng = at.rng;
        self.seen.fetch_add(1, Ordering::Relaxed);
        if at.step == self.interrupt_at {
            self.flag.store(true, Ordering::Relaxed);
        }
        let keep = Tensor::rand([4], &mut rng)?.add_scalar(0.5)?;
        let error = x.mul(&keep)?.mul(&self.weight.get())?.sum(1)?.sub(y)?;
        let loss = error.mul(&error)?.mean(())?;
        if at.step >= self.broken_from { loss.mul_scalar(f64::NAN) } else { Ok(loss) }
    }

    fn preview(&self) -> Result<Option<RgbImage>> {
        Ok(Some(RgbImage::new(2, 2)))
    }
}

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

/// What has to be equal: weights, averages, and (step, epoch, loss, lr) of the log, by bits.
type Fingerprint = (Vec<u32>, Vec<u32>, Vec<(u64, u64, u64, u64)>);

fn fingerprint(trainer: &Trainer<Regression>, output: &Output) -> Result<Fingerprint> {
    let bits =
        |t: &Tensor| -> Result<Vec<u32>> { Ok(t.to_vec::<f32>()?.into_iter().map(f32::to_bits).collect()) };
    let average = &trainer.ema().unwrap().averages()[0].1;
    let log = super::super::metrics::read(&output.run.metrics())?;
    let log = log.iter().map(|r| (r.step, r.epoch.to_bits(), r.loss.to_bits(), r.lr.to_bits())).collect();
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
    assert!(expected.2.first().unwrap().2 > expected.2.last().unwrap().2, "the loss falls");

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

#[test]
fn the_first_loss_that_is_not_finite_stops_the_run_and_the_last_checkpoint_stands() -> Result<()> {
    let (folder, recipe) = (tempfile::tempdir().unwrap(), recipe());
    let task = Regression { broken_from: 10, ..Regression::new()? };
    let mut run = trainer(&task, &recipe)?;
    let mut out = output(&folder.path().join("run"), &recipe)?;
    let never = AtomicBool::new(false);
    let error = run.run(&Points, Some(&mut out), &mut Progress::silent(), &never).unwrap_err().to_string();
    assert!(error.contains("loss is NaN at step 10") && error.contains("learning rate"), "{error}");
    assert!(task.weight.value().to_vec::<f32>()?.iter().all(|w| w.is_finite()));
    let fresh = Regression::new()?;
    let mut kept = trainer(&fresh, &recipe)?;
    kept.resume(&out.run.state())?;
    assert_eq!(kept.step(), 6, "the checkpoint after epoch 2");
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
    other.optim.optimizer = recipe::Optimizer::Sgd;
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
