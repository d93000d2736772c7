//! The shared machine of the optimizers: which parameters there are, their state, and one pass over the memory
//! of all of them on all cores.

use super::{Group, Optimizer};
use crate::{
    DType, Gradients, Result, Tensor,
    cpu::{
        elementwise::make_mut,
        parallel::{GRAIN, SharedMut, for_ranges},
        simd::{LANES, simd_of},
    },
    dtype::{Element, Float, Real},
    ensure, for_float,
    nn::Param,
};
use std::{
    collections::{HashMap, HashSet},
    ops::Range,
};

/// The numbers of an optimizer, as [`AdamW`](super::AdamW).
pub trait Algorithm: Send + Sync + Sized + 'static {
    /// Names of the tensors that are kept for each parameter.
    #[doc(hidden)]
    fn states(&self) -> &'static [&'static str];

    /// Weight decay where no group says otherwise.
    #[doc(hidden)]
    fn decay(&self) -> f64;

    /// Is every number within its range?
    #[doc(hidden)]
    fn check(&self) -> Result<()>;

    /// Moves the parameters.
    #[doc(hidden)]
    fn advance(&self, jobs: &mut [Job], lr: f64);

    /// Binds the numbers to parameters. Groups that choose a parameter by name change its settings.
    ///
    /// # Errors
    /// If a number is out of its range or two parameters share a name.
    #[track_caller]
    fn over(self, params: &[Param], groups: &[Group]) -> Result<Stepper<Self>> {
        self.check()?;
        let mut names = HashSet::new();
        let mut slots = Vec::with_capacity(params.len());
        for param in params {
            let twice = !names.insert(param.name());
            ensure!(!twice, "optimizer", "there are two parameters {}", param.name());
            slots.push(Slot::new(param, groups, self.decay()));
        }
        Ok(Stepper { algorithm: self, slots })
    }
}

/// An algorithm at work on parameters.
pub struct Stepper<A> {
    /// Its numbers; they may be changed between steps.
    pub algorithm: A,
    slots: Vec<Slot>,
}

/// One parameter with its settings and state.
#[doc(hidden)]
pub struct Slot {
    param: Param,
    pub(super) lr_scale: f64,
    pub(super) weight_decay: f64,
    /// Do LARS and LAMB scale its steps? None: as they do by themselves.
    pub(super) trust: Option<bool>,
    /// Steps that it has made, the present one included.
    pub(super) steps: u64,
    /// The algorithm's tensors, then the f32 copy of a half-precision parameter. Empty before the first step.
    state: Vec<Tensor>,
}

/// A parameter that moves in this step.
#[doc(hidden)]
pub struct Job<'a> {
    pub(super) slot: &'a mut Slot,
    grad: Tensor,
}

const MASTER: &str = "master";
const STEP: &str = "step";

impl Slot {
    fn new(param: &Param, groups: &[Group], weight_decay: f64) -> Slot {
        let (mut lr_scale, mut decay, mut trust) = (1.0, weight_decay, None);
        for group in groups.iter().filter(|g| g.chooses(param.name())) {
            lr_scale *= group.lr_scale;
            decay = group.weight_decay.unwrap_or(decay);
            trust = group.trust.or(trust);
        }
        Slot { param: param.clone(), lr_scale, weight_decay: decay, trust, steps: 0, state: Vec::new() }
    }

    /// Number of dimensions of the parameter.
    pub(super) fn rank(&self) -> usize {
        self.param.value().rank()
    }

    /// The gradient as the update reads it: contiguous and of the parameter's dtype.
    fn gradient(&self, grads: &Gradients) -> Result<Option<Tensor>> {
        let Some(grad) = grads.get(&self.param) else { return Ok(None) };
        let value = self.param.value();
        ensure!(
            grad.shape() == value.shape(),
            "optimizer",
            "the gradient of {} has shape {:?}, the parameter {:?}",
            self.param.name(),
            grad.shape(),
            value.shape()
        );
        Ok(Some(grad.detach().to_dtype(value.dtype())?.contiguous()?))
    }

    /// Makes zero state at the first step, and the f32 copy.
    fn prepare(&mut self, states: usize) -> Result<()> {
        if self.state.is_empty() {
            let value = self.param.value();
            let dtype = state_dtype(value.dtype());
            for _ in 0..states {
                self.state.push(Tensor::zeros(value.shape(), dtype)?);
            }
            if value.dtype().is_half() {
                self.state.push(value.to_dtype(dtype)?);
            }
        }
        self.steps += 1;
        Ok(())
    }
}

fn state_dtype(param: DType) -> DType {
    if param == DType::F64 { DType::F64 } else { DType::F32 }
}

/// Names of all state tensors of a parameter of `dtype`.
fn names<A: Algorithm>(algorithm: &A, dtype: DType) -> impl Iterator<Item = &'static str> {
    algorithm.states().iter().copied().chain(dtype.is_half().then_some(MASTER))
}

impl<A: Algorithm> Optimizer for Stepper<A> {
    #[track_caller]
    fn step(&mut self, grads: &Gradients, lr: f64) -> Result<()> {
        ensure!(lr.is_finite() && lr >= 0.0, "optimizer", "the learning rate is {lr}");
        let found: Vec<Option<Tensor>> =
            self.slots.iter().map(|slot| slot.gradient(grads)).collect::<Result<_>>()?;
        let states = self.algorithm.states().len();
        let mut jobs = Vec::with_capacity(self.slots.len());
        for (slot, grad) in self.slots.iter_mut().zip(found) {
            if let Some(grad) = grad {
                slot.prepare(states)?;
                jobs.push(Job { slot, grad });
            }
        }
        self.algorithm.advance(&mut jobs, lr);
        Ok(())
    }

    fn state(&self) -> Vec<(String, Tensor)> {
        let mut all = Vec::new();
        for slot in self.slots.iter().filter(|slot| slot.steps > 0) {
            let name = slot.param.name();
            let dtype = slot.param.value().dtype();
            let steps = crate::cpu::pool::CpuVec::from_slice(&[slot.steps as i64]);
            all.push((format!("{name}.{STEP}"), Tensor::from_cpu(steps, (), "step")));
            for (what, tensor) in names(&self.algorithm, dtype).zip(&slot.state) {
                all.push((format!("{name}.{what}"), tensor.clone()));
            }
        }
        all
    }

    #[track_caller]
    fn load_state(&mut self, state: &[(String, Tensor)]) -> Result<()> {
        let mut left: HashMap<&str, &Tensor> = state.iter().map(|(name, t)| (name.as_str(), t)).collect();
        let mut loaded: Vec<(u64, Vec<Tensor>)> = Vec::with_capacity(self.slots.len());
        for slot in &self.slots {
            let name = slot.param.name();
            let Some(steps) = left.remove(format!("{name}.{STEP}").as_str()) else {
                loaded.push((0, Vec::new()));
                continue;
            };
            let value = slot.param.value();
            let mut tensors = Vec::new();
            for what in names(&self.algorithm, value.dtype()) {
                let key = format!("{name}.{what}");
                let Some(tensor) = left.remove(key.as_str()) else {
                    crate::bail!("load_state", "{key} is missing");
                };
                let dtype = state_dtype(value.dtype());
                ensure!(
                    tensor.shape() == value.shape() && tensor.dtype() == dtype,
                    "load_state",
                    "{key} is {} {:?}, needs {dtype} {:?}",
                    tensor.dtype(),
                    tensor.shape(),
                    value.shape()
                );
                tensors.push(tensor.detach());
            }
            loaded.push((steps.item()? as u64, tensors));
        }
        if let Some(name) = left.keys().min() {
            crate::bail!("load_state", "{} names fit no parameter, such as {name}", left.len());
        }
        for (slot, (steps, tensors)) in self.slots.iter_mut().zip(loaded) {
            (slot.steps, slot.state) = (steps, tensors);
        }
        Ok(())
    }
}

/// What an algorithm does to one element. `state` holds the element's `N` numbers.
pub(super) trait Rule<const N: usize>: Copy + Send + Sync {
    /// The new value.
    fn step<R: Real>(self, p: R, g: R, state: &mut [R; N]) -> R;

    /// A first look, for algorithms that need norms: a number whose squares are summed over the parameter.
    #[inline(always)]
    fn look<R: Real>(self, _p: R, g: R, _state: &mut [R; N]) -> R {
        g
    }
}

/// Runs `f(tensor, range)` over the elements of many tensors of these lengths, on all cores. The ranges depend
/// on the lengths alone.
pub(super) fn for_chunks(lengths: &[usize], f: impl Fn(usize, Range<usize>) + Sync) {
    let chunks = chunks(lengths);
    for_ranges(chunks.len(), 1, |i| i.for_each(|i| f(chunks[i].0, chunks[i].1.clone())));
}

fn chunks(lengths: &[usize]) -> Vec<(usize, Range<usize>)> {
    let pieces = |(i, &n): (usize, &usize)| (0..n).step_by(GRAIN).map(move |at| (i, at..n.min(at + GRAIN)));
    lengths.iter().enumerate().flat_map(pieces).collect()
}

/// Sums `f(tensor, range)` over each tensor, in an order that depends on the lengths alone.
pub(super) fn sum_chunks<const K: usize>(
    lengths: &[usize],
    join: impl Fn(f64, f64) -> f64,
    f: impl Fn(usize, Range<usize>) -> [f64; K] + Sync,
) -> Vec<[f64; K]> {
    let chunks = chunks(lengths);
    let mut parts = vec![[0.0; K]; chunks.len()];
    let target = SharedMut::new(&mut parts);
    for_ranges(chunks.len(), 1, |range| {
        for i in range {
            let (tensor, range) = chunks[i].clone();
            unsafe { *target.ptr().add(i) = f(tensor, range) };
        }
    });
    let mut sums = vec![[0.0; K]; lengths.len()];
    for ((tensor, _), part) in chunks.iter().zip(parts) {
        for k in 0..K {
            sums[*tensor][k] = join(sums[*tensor][k], part[k]);
        }
    }
    sums
}

/// Addresses of one parameter's memory, and the code for its dtype.
struct Raw<const N: usize, U> {
    len: usize,
    p: *mut u8,
    g: *const u8,
    /// The f32 copy, or null.
    master: *mut u8,
    state: [*mut u8; N],
    step: fn(&Raw<N, U>, Range<usize>, U),
    look: fn(&Raw<N, U>, Range<usize>, U) -> [f64; 2],
}
unsafe impl<const N: usize, U> Send for Raw<N, U> {}
unsafe impl<const N: usize, U> Sync for Raw<N, U> {}

/// Gathers the addresses, lets `f` use them, and holds all locks meanwhile.
fn with_memory<const N: usize, U: Rule<N>, R>(jobs: &mut [Job], f: impl FnOnce(&[Raw<N, U>]) -> R) -> R {
    let params: Vec<Param> = jobs.iter().map(|job| job.slot.param.clone()).collect();
    let mut locks: Vec<_> = params.iter().map(Param::lock).collect();
    let mut raw = Vec::with_capacity(jobs.len());
    for (job, lock) in jobs.iter_mut().zip(&mut locks) {
        let grad = &job.grad;
        // Parameters are floats: `Params::param` sees to it, and others have no gradient.
        let entry = (|| for_float!(grad.dtype(), "optimizer", T => Ok(addresses::<T, N, U>(job.slot, lock.elements(), grad))))(
        );
        raw.extend(entry);
    }
    f(&raw)
}

fn addresses<T: Float, const N: usize, U: Rule<N>>(slot: &mut Slot, p: &mut [T], grad: &Tensor) -> Raw<N, U> {
    let mut state = slot.state.iter_mut().map(|t| make_mut::<T::Acc>(t).as_mut_ptr().cast::<u8>());
    Raw {
        len: p.len(),
        p: p.as_mut_ptr().cast(),
        g: grad.cpu_ptr::<T>().cast(),
        state: std::array::from_fn(|_| state.next().unwrap_or(std::ptr::null_mut())),
        master: state.next().unwrap_or(std::ptr::null_mut()),
        step: step_range::<T, N, U>,
        look: look_range::<T, N, U>,
    }
}

/// Moves every parameter, each by its own rule, in one pass over the memory.
pub(super) fn step<const N: usize, U: Rule<N>>(jobs: &mut [Job], rules: &[U]) {
    with_memory(jobs, |raw| {
        let lengths: Vec<usize> = raw.iter().map(|r| r.len).collect();
        for_chunks(&lengths, |i, range| (raw[i].step)(&raw[i], range, rules[i]));
    });
}

/// The norms of every parameter and of what its rule's `look` gives.
pub(super) fn norms<const N: usize, U: Rule<N>>(jobs: &mut [Job], rules: &[U]) -> Vec<[f64; 2]> {
    with_memory(jobs, |raw| {
        let lengths: Vec<usize> = raw.iter().map(|r| r.len).collect();
        let sums = sum_chunks(&lengths, |a, b| a + b, |i, range| (raw[i].look)(&raw[i], range, rules[i]));
        sums.into_iter().map(|sum| sum.map(f64::sqrt)).collect()
    })
}

fn step_range<T: Float, const N: usize, U: Rule<N>>(raw: &Raw<N, U>, range: Range<usize>, rule: U) {
    simd_of::<T, _>(
        #[inline(always)]
        || {
            let end = range.end - range.len() % LANES;
            for at in (range.start..end).step_by(LANES) {
                unsafe { step_lanes::<T, N, U, LANES>(raw, at, rule) };
            }
            for at in end..range.end {
                unsafe { step_lanes::<T, N, U, 1>(raw, at, rule) };
            }
        },
    );
}

/// Everything is loaded before anything is stored, so that the compiler needs no proof that the arrays differ.
#[inline(always)]
unsafe fn step_lanes<T: Float, const N: usize, U: Rule<N>, const L: usize>(
    raw: &Raw<N, U>,
    at: usize,
    rule: U,
) {
    unsafe {
        let (mut p, g, mut state) = load::<T, N, U, L>(raw, at);
        for i in 0..L {
            let mut s: [T::Acc; N] = std::array::from_fn(|k| state[k][i]);
            p[i] = rule.step(p[i], g[i], &mut s);
            (0..N).for_each(|k| state[k][i] = s[k]);
        }
        raw.p.cast::<T>().add(at).cast::<[T; L]>().write_unaligned(p.map(T::store));
        if !raw.master.is_null() {
            put(raw.master, at, p);
        }
        (0..N).for_each(|k| put(raw.state[k], at, state[k]));
    }
}

fn look_range<T: Float, const N: usize, U: Rule<N>>(
    raw: &Raw<N, U>,
    range: Range<usize>,
    rule: U,
) -> [f64; 2] {
    simd_of::<T, _>(
        #[inline(always)]
        || {
            let mut sums = [[0.0; LANES]; 2];
            let end = range.end - range.len() % LANES;
            for at in (range.start..end).step_by(LANES) {
                unsafe { look_lanes::<T, N, U, LANES>(raw, at, rule, &mut sums) };
            }
            for at in end..range.end {
                unsafe { look_lanes::<T, N, U, 1>(raw, at, rule, &mut sums) };
            }
            sums.map(|lanes| crate::cpu::simd::join_lanes(lanes, |a, b| a + b))
        },
    )
}

#[inline(always)]
unsafe fn look_lanes<T: Float, const N: usize, U: Rule<N>, const L: usize>(
    raw: &Raw<N, U>,
    at: usize,
    rule: U,
    sums: &mut [[f64; LANES]; 2],
) {
    unsafe {
        let (p, g, mut state) = load::<T, N, U, L>(raw, at);
        for i in 0..L {
            let mut s: [T::Acc; N] = std::array::from_fn(|k| state[k][i]);
            let (p, u) = (p[i].to_f64(), rule.look(p[i], g[i], &mut s).to_f64());
            (0..N).for_each(|k| state[k][i] = s[k]);
            sums[0][i] += p * p;
            sums[1][i] += u * u;
        }
        (0..N).for_each(|k| put(raw.state[k], at, state[k]));
    }
}

type Lanes<A, const N: usize, const L: usize> = ([A; L], [A; L], [[A; L]; N]);

#[inline(always)]
unsafe fn load<T: Float, const N: usize, U, const L: usize>(
    raw: &Raw<N, U>,
    at: usize,
) -> Lanes<T::Acc, N, L> {
    unsafe {
        let p = if raw.master.is_null() { get::<T, L>(raw.p, at).map(T::acc) } else { get(raw.master, at) };
        (p, get::<T, L>(raw.g, at).map(T::acc), std::array::from_fn(|k| get(raw.state[k], at)))
    }
}

#[inline(always)]
unsafe fn get<T: Copy, const L: usize>(base: *const u8, at: usize) -> [T; L] {
    unsafe { base.cast::<T>().add(at).cast::<[T; L]>().read_unaligned() }
}

#[inline(always)]
unsafe fn put<T: Copy, const L: usize>(base: *mut u8, at: usize, values: [T; L]) {
    unsafe { base.cast::<T>().add(at).cast::<[T; L]>().write_unaligned(values) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Rng,
        nn::Params,
        optim::{AdamW, Lars, Sgd, no_decay_1d},
    };

    fn network(dtype: DType) -> Result<Params> {
        let mut rng = Rng::new(5);
        let params = Params::new();
        for (name, shape) in [("a", vec![300, 301]), ("b", vec![17]), ("c", vec![])] {
            params.param(name, Tensor::randn(shape, &mut rng)?.to_dtype(dtype)?)?;
        }
        Ok(params)
    }

    fn grads(params: &Params) -> Result<Gradients> {
        let mut all = Gradients::default();
        for p in params.trained() {
            let x = p.get();
            all.accumulate(x.mul(&x)?.sum(())?.backward()?)?;
        }
        Ok(all)
    }

    /// Elementwise the parallel pass equals a plain loop in f64, also where a chunk ends within a lane block.
    #[test]
    fn adamw_against_a_plain_loop() -> Result<()> {
        let params = network(DType::F64)?;
        let mut expected: Vec<Vec<f64>> =
            params.all().iter().map(|p| p.value().to_vec()).collect::<Result<_>>()?;
        let mut moments: Vec<Vec<[f64; 2]>> = expected.iter().map(|v| vec![[0.0; 2]; v.len()]).collect();
        let mut optimizer = AdamW { weight_decay: 0.1, ..Default::default() }
            .over(&params.trained(), &[no_decay_1d(&params.all())])?;
        for t in 1..=3 {
            optimizer.step(&grads(&params)?, 0.01)?;
            for (i, (w, m)) in expected.iter_mut().zip(&mut moments).enumerate() {
                for (w, [m, v]) in w.iter_mut().zip(m) {
                    let g = 2.0 * *w;
                    *w *= 1.0 - if i == 0 { 0.01 * 0.1 } else { 0.0 };
                    *m = 0.9 * *m + 0.1 * g;
                    *v = 0.999 * *v + 0.001 * g * g;
                    let (m, v) = (*m / (1.0 - 0.9f64.powi(t)), *v / (1.0 - 0.999f64.powi(t)));
                    *w -= 0.01 * m / (v.sqrt() + 1e-8);
                }
            }
        }
        for (p, expected) in params.all().iter().zip(&expected) {
            for (a, b) in p.value().to_vec::<f64>()?.iter().zip(expected) {
                assert!((a - b).abs() < 1e-12, "{}: {a} {b}", p.name());
            }
        }
        Ok(())
    }

    /// Going on from saved state is bit for bit the same as never having stopped.
    #[test]
    fn state_round_trip() -> Result<()> {
        for dtype in [DType::F32, DType::BF16] {
            let params = network(dtype)?;
            let mut first = AdamW::default().over(&params.trained(), &[])?;
            first.step(&grads(&params)?, 0.1)?;
            let state = first.state();
            let kept: Vec<Tensor> = params.all().iter().map(Param::value).collect();
            first.step(&grads(&params)?, 0.1)?;
            let expected: Vec<Tensor> = params.all().iter().map(Param::value).collect();
            for (p, kept) in params.all().iter().zip(&kept) {
                p.set(kept)?;
            }
            let mut second = AdamW::default().over(&params.trained(), &[])?;
            second.load_state(&state)?;
            second.step(&grads(&params)?, 0.1)?;
            for (p, e) in params.all().iter().zip(&expected) {
                let bits = |t: &Tensor| t.to_dtype(DType::F32)?.to_vec::<f32>();
                assert_eq!(bits(&p.value())?, bits(e)?, "{} {dtype}", p.name());
            }
            let mut wrong = state.clone();
            wrong[1].0.push('x');
            assert!(second.load_state(&wrong).is_err());
            assert!(Sgd::default().over(&params.trained(), &[])?.load_state(&state).is_err());
        }
        Ok(())
    }

    /// Small steps that bf16 cannot hold add up in the f32 copy.
    #[test]
    fn half_precision_has_an_f32_copy() -> Result<()> {
        let params = Params::new();
        let w = params.param("w", Tensor::ones([40], DType::BF16)?)?;
        let mut optimizer = Sgd::default().over(&params.trained(), &[])?;
        for _ in 0..64 {
            optimizer.step(&w.get().sum(())?.backward()?, 1e-3)?;
        }
        let got = w.value().to_dtype(DType::F32)?.to_vec::<f32>()?;
        assert!(got.iter().all(|x| (x - 0.936).abs() < 4e-3), "{got:?}");
        Ok(())
    }

    #[test]
    fn bad_arguments() -> Result<()> {
        let params = network(DType::F32)?;
        let twice: Vec<Param> = params.all().into_iter().chain(params.all()).collect();
        assert!(Lars::default().over(&twice, &[]).is_err());
        assert!(AdamW { betas: (1.0, 0.9), ..Default::default() }.over(&params.all(), &[]).is_err());
        assert!(Sgd { nesterov: true, ..Default::default() }.over(&params.all(), &[]).is_err());
        let mut optimizer = Sgd::default().over(&params.all(), &[])?;
        assert!(optimizer.step(&Gradients::default(), f64::NAN).is_err());
        let mut wrong = grads(&params)?;
        wrong.insert(&params.all()[0], Tensor::ones([2], DType::F32)?);
        assert!(optimizer.step(&wrong, 0.1).is_err() && optimizer.state().is_empty());
        Ok(())
    }
}
