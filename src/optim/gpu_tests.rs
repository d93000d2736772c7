//! Optimizers on the emulated GPU against the CPU, and recorded in graphs.

use super::{
    Adam, AdamW, Algorithm, Ema, Group, Lamb, Lars, Optimizer, Sgd, Trust, average_into, clip_grad_norm,
    clip_grad_norm_tensor, clip_grad_value, grad_norm, no_decay_1d,
};
use crate::{
    DType, Device, Gradients, Result, Rng, Tensor,
    gpu::{Graph, alone},
    nn::{Param, Params},
};

const GPU: Device = Device::Cuda(0);
/// Recordings have this one for themselves.
const RECORDED: Device = Device::Cuda(1);

/// Parameters of one dtype, an empty one and a half one among them, the same on every device.
fn network(device: Device, dtype: DType) -> Result<Params> {
    let mut rng = Rng::new(5);
    let params = Params::new();
    for (name, shape) in [("a", vec![130, 301]), ("b", vec![17]), ("c", vec![]), ("e", vec![0, 3])] {
        let value = Device::Cpu.scope(|| Tensor::randn(shape, &mut rng))?;
        params.param(name, value.to_dtype(dtype)?.to_device(device)?)?;
    }
    let half = Device::Cpu.scope(|| Tensor::randn([7, 5], &mut rng))?;
    params.param("h", half.to_dtype(DType::BF16)?.to_device(device)?)?;
    params.buffer("n", Device::Cpu.scope(|| Tensor::from_slice(&[3i64], ()))?.to_device(device)?)?;
    Ok(params)
}

/// Gradients of step `t`. One parameter has none at every third step.
fn gradients(params: &Params, t: u64) -> Result<Gradients> {
    let mut rng = Rng::new(100 + t);
    let mut grads = Gradients::default();
    for p in params.trained() {
        let value = p.value();
        let g = Device::Cpu.scope(|| Tensor::randn(value.shape(), &mut rng))?;
        if t % 3 != 1 || p.name() != "b" {
            grads.insert(&p, g.to_dtype(value.dtype())?.to_device(value.device())?);
        }
    }
    Ok(grads)
}

fn numbers(t: &Tensor) -> Result<Vec<f64>> {
    t.to_device(Device::Cpu)?.to_dtype(DType::F64)?.to_vec()
}

/// Equal up to `tolerance` of the largest number, or of 1.
fn close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) -> Result<()> {
    assert_eq!((got.shape(), got.dtype()), (want.shape(), want.dtype()), "{what}");
    let (got, want) = (numbers(got)?, numbers(want)?);
    let scale = want.iter().fold(1.0, |a: f64, b| a.max(b.abs()));
    for (a, b) in got.iter().zip(&want) {
        assert!((a - b).abs() <= tolerance * scale, "{what}: {a}, on the CPU {b}");
    }
    Ok(())
}

type Make = Box<dyn Fn(&Params) -> Result<Box<dyn Optimizer>>>;

fn groups(params: &Params) -> [Group; 3] {
    let scaled = Group::named(["a", "h"]).lr_scale(0.5);
    [no_decay_1d(&params.all()), scaled, Group::named(["b"]).trust(true).weight_decay(0.3)]
}

fn all() -> Vec<(&'static str, Make)> {
    fn make<A: Algorithm + Copy>(algorithm: A) -> Make {
        Box::new(move |params| {
            let optimizer = algorithm.over(&params.trained(), &groups(params))?;
            Ok(Box::new(optimizer) as Box<dyn Optimizer>)
        })
    }
    let lars = Lars { weight_decay: 0.1, coefficient: 0.02, ..Default::default() };
    let momentum = Sgd { momentum: 0.9, dampening: 0.1, weight_decay: 0.1, ..Default::default() };
    let adam = Adam { weight_decay: 0.1, ..Default::default() };
    vec![
        ("sgd", make(Sgd { weight_decay: 0.1, maximize: true, ..Default::default() })),
        ("momentum", make(momentum)),
        ("nesterov", make(Sgd { nesterov: true, dampening: 0.0, ..momentum })),
        ("adam", make(adam)),
        ("amsgrad", make(Adam { amsgrad: true, ..adam })),
        ("adamw", make(AdamW { maximize: true, ..Default::default() })),
        ("adamw amsgrad", make(AdamW { amsgrad: true, weight_decay: 0.2, ..Default::default() })),
        ("lars", make(lars)),
        ("larc", make(Lars { trust: Trust::All, ..lars })),
        ("larc clipped", make(Lars { trust: Trust::Clipped, ..lars })),
        ("lamb", make(Lamb { weight_decay: 0.1, ..Default::default() })),
    ]
}

#[test]
fn steps_as_on_the_cpu() -> Result<()> {
    for (name, make) in all() {
        for (dtype, exact) in
            [(DType::F32, 2e-6), (DType::F64, 1e-13), (DType::BF16, 2e-6), (DType::F16, 2e-6)]
        {
            let (here, there) = (network(Device::Cpu, dtype)?, network(GPU, dtype)?);
            let (mut cpu, mut gpu) = (make(&here)?, make(&there)?);
            for t in 0..4 {
                let lr = 0.02 / (t + 1) as f64;
                cpu.step(&gradients(&here, t)?, lr)?;
                gpu.step(&gradients(&there, t)?, lr)?;
            }
            for (p, q) in there.all().iter().zip(here.all()) {
                assert_eq!(p.value().device(), GPU);
                // the f32 copy below is held to more
                let rounding = match p.value().dtype() {
                    DType::BF16 => 8e-3,
                    DType::F16 => 1e-3,
                    _ => exact,
                };
                close(&format!("{name} {dtype}: {}", p.name()), &p.value(), &q.value(), rounding)?;
            }
            let (states, want) = (gpu.state(), cpu.state());
            assert_eq!(states.len(), want.len());
            for ((what, s), (other, w)) in states.iter().zip(&want) {
                assert_eq!(what, other);
                let tolerance = if s.dtype() == DType::F32 { 2e-6 } else { exact };
                close(&format!("{name} {dtype}: {what}"), s, w, tolerance)?;
            }
        }
    }
    Ok(())
}

fn bits(params: &Params) -> Result<Vec<Vec<u64>>> {
    let bits = |p: &Param| Ok(numbers(&p.value())?.into_iter().map(f64::to_bits).collect());
    params.all().iter().map(bits).collect()
}

/// Going on from saved state is bit for bit the same as never having stopped, on whatever device it was saved.
#[test]
fn state_goes_through_the_cpu() -> Result<()> {
    for (name, make) in all() {
        for dtype in [DType::F32, DType::BF16] {
            let params = network(GPU, dtype)?;
            let mut first = make(&params)?;
            first.step(&gradients(&params, 0)?, 0.01)?;
            let off = |t: &Tensor, device| t.to_device(device);
            let saved: Vec<(String, Tensor)> = first
                .state()
                .iter()
                .map(|(n, t)| Ok((n.clone(), off(t, Device::Cpu)?)))
                .collect::<Result<_>>()?;
            let values: Vec<Tensor> =
                params.all().iter().map(|p| off(&p.value(), Device::Cpu)).collect::<Result<_>>()?;
            (1..4).try_for_each(|t| first.step(&gradients(&params, t)?, 0.01))?;
            let (expected, state) = (bits(&params)?, first.state());
            for (p, value) in params.all().iter().zip(&values) {
                p.set(value)?;
            }
            let mut second = make(&params)?;
            second.load_state(&saved)?;
            (1..4).try_for_each(|t| second.step(&gradients(&params, t)?, 0.01))?;
            assert_eq!(bits(&params)?, expected, "{name} {dtype}");
            for ((what, a), (_, b)) in second.state().iter().zip(&state) {
                assert_eq!(numbers(a)?, numbers(b)?, "{name} {dtype}: {what}");
                assert!(what.ends_with(".step") || a.device() == GPU);
            }
        }
    }
    Ok(())
}

/// An update is in place, unless somebody holds the old value.
#[test]
fn in_place() -> Result<()> {
    let params = network(GPU, DType::BF16)?;
    let mut optimizer = AdamW::default().over(&params.trained(), &[])?;
    let mut ema = Ema::new(&params.all(), 0.9, false)?;
    let mut step = |t| -> Result<Vec<usize>> {
        optimizer.step(&gradients(&params, t)?, 0.01)?;
        ema.update()?;
        let tensors = optimizer.state().into_iter().chain(ema.averages()).map(|(_, t)| t);
        Ok(tensors.chain(params.all().iter().map(Param::value)).map(|t| t.gpu_ptr() as usize).collect())
    };
    step(0)?;
    let before = step(2)?;
    assert_eq!(step(3)?, before);
    let p = &params.all()[0];
    let (old, was) = (p.value(), numbers(&p.value())?);
    assert_ne!(step(5)?, before);
    assert_eq!(numbers(&old)?, was);
    assert_ne!(numbers(&p.value())?, was);
    Ok(())
}

#[test]
fn clipping_as_on_the_cpu() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        let (here, there) = (network(Device::Cpu, dtype)?, network(GPU, dtype)?);
        for order in [1.0, 2.0, 2.5, f64::INFINITY] {
            let (mut a, mut b) = (gradients(&here, 1)?, gradients(&there, 1)?);
            let (here, there) = (here.all(), there.all());
            let (want, got) = (grad_norm(&here, &a, order)?, grad_norm(&there, &b, order)?);
            assert!((got / want - 1.0).abs() < 1e-12, "{got} {want}");
            assert_eq!(clip_grad_norm(&there, &mut b, got * 2.0, order)?, got, "short enough");
            let unread = clip_grad_norm_tensor(&there, &mut b, want / 3.0, order)?;
            assert_eq!((unread.device(), unread.rank(), unread.dtype()), (GPU, 0, DType::F64));
            assert_eq!(clip_grad_norm(&here, &mut a, want / 3.0, order)?, want);
            assert_eq!(unread.item()?, got);
            let kept = b.get(&there[0]).cloned();
            clip_grad_value(&here, &mut a, 0.01)?;
            clip_grad_value(&there, &mut b, 0.01)?;
            for (p, q) in here.iter().zip(&there) {
                let (Some(a), Some(b)) = (a.get(p), b.get(q)) else { continue };
                assert_eq!(b.device(), GPU);
                close(p.name(), b, a, if a.dtype().is_half() { 1e-4 } else { 1e-8 })?;
            }
            let kept = kept.map(|t| numbers(&t)).transpose()?.unwrap_or_default();
            assert!(kept.iter().any(|x| x.abs() > 0.01), "whoever holds a gradient keeps it as it was");
        }
        let mut grads = gradients(&there, 1)?;
        let p = &there.all()[1];
        grads.insert(p, p.value().full_like(f64::NAN)?);
        assert!(clip_grad_norm(&there.all(), &mut grads, 1.0, 2.0)?.is_nan());
        let first = grads.get(&there.all()[0]).map(numbers).transpose()?.unwrap_or_default();
        assert!(first.iter().all(|x| x.is_nan()), "a NaN norm reaches the gradients");
    }
    Ok(())
}

#[test]
fn averages_as_on_the_cpu() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        let (here, there) = (network(Device::Cpu, dtype)?, network(GPU, dtype)?);
        let mut cpu = Ema::new(&here.all(), 0.9, true)?;
        let mut gpu = Ema::new(&there.all(), 0.9, true)?;
        for t in 0..3 {
            for params in [&here, &there] {
                params.all().iter().try_for_each(|p| p.update(|v| v.mul_scalar((t + 2) as f64)))?;
            }
            cpu.update()?;
            gpu.update()?;
            for ((name, a), (_, b)) in gpu.averages().iter().zip(&cpu.averages()) {
                assert_eq!(a.device(), GPU);
                close(name, a, b, if dtype == DType::F64 && name != "h" { 1e-13 } else { 1e-6 })?;
            }
        }
        let (targets, others) = (network(GPU, dtype)?, network(Device::Cpu, dtype)?);
        average_into(&targets.all(), &there.all(), 0.75)?;
        average_into(&others.all(), &here.all(), 0.75)?;
        for (p, q) in targets.all().iter().zip(others.all()) {
            close(p.name(), &p.value(), &q.value(), if p.value().dtype().is_half() { 8e-3 } else { 1e-6 })?;
        }
    }
    Ok(())
}

/// Clipping, step and average are recorded: no operation goes through the host, waits or makes memory of its own, and
/// what the launch reads is written before it. The emulator runs the step while it records.
#[test]
fn recorded() -> Result<()> {
    let _alone = alone();
    for (name, make) in all() {
        let (params, eager) = (network(RECORDED, DType::BF16)?, network(RECORDED, DType::BF16)?);
        let (mut optimizer, mut other) = (make(&params)?, make(&eager)?);
        let mut average = Ema::new(&params.all(), 0.9, true)?;
        let mut mean = Ema::new(&eager.all(), 0.9, true)?;
        let step = |params: &Params, optimizer: &mut dyn Optimizer, ema: &mut Ema, mut grads, lr| {
            let norm = clip_grad_norm_tensor(&params.all(), &mut grads, 3.0, 2.0)?;
            clip_grad_value(&params.all(), &mut grads, 0.05)?;
            optimizer.step(&grads, lr)?;
            ema.update()?;
            Ok(norm)
        };
        for (t, lr) in [(0, 0.01), (2, 0.02), (3, 0.03)] {
            step(&eager, &mut *other, &mut mean, gradients(&eager, t)?, lr)?;
            if t == 0 {
                step(&params, &mut *optimizer, &mut average, gradients(&params, t)?, lr)?;
                continue;
            }
            let grads = gradients(&params, t)?;
            optimizer.next_step(lr)?;
            average.next_update()?;
            let (graph, norm) = Graph::capture(RECORDED, || {
                let copies = params.trained().iter().fold(Gradients::default(), |mut all, p| {
                    if let Some(g) = grads.get(p).and_then(|g| g.mul_scalar(1.0).ok()) {
                        all.insert(p, g);
                    }
                    all
                });
                step(&params, &mut *optimizer, &mut average, copies, 7.0)
            })?;
            graph.launch()?;
            assert!(norm.item()? > 0.0);
            assert_eq!(bits(&params)?, bits(&eager)?, "{name}");
            for ((what, a), (_, b)) in optimizer.state().iter().zip(&other.state()) {
                assert_eq!(numbers(a)?, numbers(b)?, "{name}: {what}");
            }
            for ((what, a), (_, b)) in average.averages().iter().zip(&mean.averages()) {
                assert_eq!(numbers(a)?, numbers(b)?, "{name}: average of {what}");
            }
        }
    }
    Ok(())
}

#[test]
fn what_cannot_be_recorded() -> Result<()> {
    let _alone = alone();
    let params = network(RECORDED, DType::F32)?;
    let mut optimizer = AdamW::default().over(&params.trained(), &[])?;
    let mut ema = Ema::new(&params.all(), 0.9, false)?;
    let grads = gradients(&params, 0)?;
    let text = |result: Result<(Graph, ())>| result.err().map(|e| e.to_string()).unwrap_or_default();
    let message = text(Graph::capture(RECORDED, || optimizer.step(&grads, 0.1)));
    assert!(message.contains("first step of a"), "{message}");
    assert!(text(Graph::capture(RECORDED, || ema.update())).contains("ordinary way"));
    optimizer.step(&grads, 0.1)?;
    let held = params.all()[0].value();
    let message = text(Graph::capture(RECORDED, || optimizer.step(&grads, 0.1)));
    assert!(message.contains("also seen by somebody else"), "{message}");
    drop(held);
    let message = text(Graph::capture(RECORDED, || optimizer.next_step(0.1)));
    assert!(message.contains("before the launch"), "{message}");
    Graph::capture(RECORDED, || optimizer.step(&grads, 0.1))?;
    assert!(optimizer.next_step(f64::NAN).is_err());
    Ok(())
}
