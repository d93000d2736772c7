//! The shared machine of the optimizers: which parameters there are, their settings and state. How they are moved
//! is in `cpu` (one pass over the memory on all cores) and in `gpu` (many parameters in a launch).

mod cpu;
#[cfg(gpu)]
mod gpu;
#[cfg(test)]
mod tests;

pub(super) use cpu::{Rule, for_chunks, norms, step, sum_chunks};

use super::{Group, Optimizer};
use crate::{DType, Device, Gradients, Result, Tensor, ensure, nn::Param};
use std::collections::{HashMap, HashSet};

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

    /// Moves parameters that are on the CPU.
    #[doc(hidden)]
    fn advance(&self, jobs: &mut [Job], lr: f64);

    /// Which rule of `kernels.h` moves those that are on a GPU.
    #[cfg(gpu)]
    #[doc(hidden)]
    fn kernel(&self) -> u32;

    /// What that rule reads for one parameter, in the order of `kernels.h`.
    #[cfg(gpu)]
    #[doc(hidden)]
    fn numbers(&self, slot: &Slot, lr: f64) -> [f64; 8];

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
        Ok(Stepper {
            algorithm: self,
            slots,
            #[cfg(gpu)]
            numbers: Vec::new(),
        })
    }
}

/// An algorithm at work on parameters.
///
/// On a GPU, learning rates and all else that changes from step to step is read from memory of the device, so that a
/// recorded step can be launched with other numbers:
///
/// ```ignore
/// optimizer.step(&grads()?, lr(0))?;                                          // once in the ordinary way
/// let (graph, ()) = Graph::capture(device, || optimizer.step(&grads()?, 0.0))?; // the 0.0 is not looked at
/// for t in 1..steps {
///     optimizer.next_step(lr(t))?;
///     graph.launch()?;
/// }
/// ```
pub struct Stepper<A> {
    /// Its numbers; they may be changed between steps.
    pub algorithm: A,
    slots: Vec<Slot>,
    /// On each GPU that parameters are on: what its kernels read, a row for each slot.
    #[cfg(gpu)]
    numbers: Vec<Tensor>,
}

/// One parameter with its settings and state.
#[doc(hidden)]
pub struct Slot {
    param: Param,
    lr_scale: f64,
    fixed_lr: Option<f64>,
    pub(super) weight_decay: f64,
    /// Do LARS and LAMB scale its steps? None: as they do by themselves.
    pub(super) trust: Option<bool>,
    /// Steps that it has made, the present one included.
    pub(super) steps: u64,
    /// Had it a gradient at the last step?
    moves: bool,
    /// The algorithm's tensors, then the f32 copy of a half-precision parameter. Empty before the first step.
    state: Vec<Tensor>,
}

/// A parameter that moves in this step.
#[doc(hidden)]
pub struct Job<'a> {
    pub(super) slot: &'a mut Slot,
    grad: Tensor,
    /// The slot's number.
    #[cfg_attr(not(gpu), allow(dead_code))]
    row: usize,
}

const MASTER: &str = "master";
const STEP: &str = "step";

impl Slot {
    fn new(param: &Param, groups: &[Group], weight_decay: f64) -> Slot {
        let (mut lr_scale, mut fixed_lr, mut decay, mut trust) = (1.0, None, weight_decay, None);
        for group in groups.iter().filter(|g| g.chooses(param.name())) {
            lr_scale *= group.lr_scale;
            fixed_lr = group.fixed_lr.or(fixed_lr);
            decay = group.weight_decay.unwrap_or(decay);
            trust = group.trust.or(trust);
        }
        let (param, steps, state) = (param.clone(), 0, Vec::new());
        Slot { param, lr_scale, fixed_lr, weight_decay: decay, trust, steps, moves: false, state }
    }

    /// Its learning rate in a step that is called with `lr`.
    pub(super) fn rate(&self, lr: f64) -> f64 {
        self.fixed_lr.unwrap_or(lr) * self.lr_scale
    }

    /// Number of dimensions of the parameter.
    pub(super) fn rank(&self) -> usize {
        self.param.value().rank()
    }

    /// The gradient as the update reads it: contiguous, and of the parameter's dtype and device.
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
        Ok(Some(grad.transferred(value.device())?.to_dtype(value.dtype())?.contiguous()?))
    }

    /// Makes zero state at the first step, and the f32 copy. Counts the step, unless it is recorded to be launched
    /// later.
    fn prepare(&mut self, states: usize) -> Result<()> {
        if is_recording() {
            ensure!(
                self.steps > 0 && self.param.value().device() != Device::Cpu,
                "optimizer",
                "the first step of {}, or one on the CPU, cannot be recorded in a graph",
                self.param.name()
            );
            return Ok(());
        }
        if self.state.is_empty() {
            let value = self.param.value();
            let dtype = state_dtype(value.dtype());
            for _ in 0..states {
                self.state.push(value.device().scope(|| Tensor::zeros(value.shape(), dtype))?);
            }
            if value.dtype().is_half() {
                self.state.push(value.to_dtype(dtype)?);
            }
        }
        self.steps += 1;
        Ok(())
    }
}

/// Does this thread record a graph? Nothing moves then, or counts.
pub(super) fn is_recording() -> bool {
    #[cfg(gpu)]
    return crate::gpu::is_recording();
    #[cfg(not(gpu))]
    false
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
        for (slot, grad) in self.slots.iter_mut().zip(&found) {
            slot.moves = grad.is_some();
            if slot.moves {
                slot.prepare(states)?;
            }
        }
        #[cfg(gpu)]
        self.write_numbers(lr)?;
        let mut jobs: Vec<(Device, Vec<Job>)> = Vec::new();
        for (row, (slot, grad)) in self.slots.iter_mut().zip(found).enumerate() {
            let Some(grad) = grad else { continue };
            let device = grad.device();
            let job = Job { slot, grad, row };
            match jobs.iter_mut().find(|(d, _)| *d == device) {
                Some((_, jobs)) => jobs.push(job),
                None => jobs.push((device, vec![job])),
            }
        }
        for (device, mut jobs) in jobs {
            match device {
                Device::Cpu => self.algorithm.advance(&mut jobs, lr),
                #[cfg(gpu)]
                _ => gpu::advance(&self.algorithm, &mut jobs, &self.numbers)?,
                #[cfg(not(gpu))]
                _ => {}
            }
        }
        Ok(())
    }

    #[cfg(gpu)]
    #[track_caller]
    fn next_step(&mut self, lr: f64) -> Result<()> {
        ensure!(lr.is_finite() && lr >= 0.0, "optimizer", "the learning rate is {lr}");
        ensure!(!is_recording(), "optimizer", "next_step belongs before the launch, it cannot be recorded");
        for slot in self.slots.iter_mut().filter(|slot| slot.moves) {
            slot.steps += 1;
        }
        self.write_numbers(lr)
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
                tensors.push(tensor.transferred(value.device())?);
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
