//! Named parameters and buffers.

use crate::{
    DType, Device, Result, Tensor,
    autograd::{GradId, new_leaf_id},
    bail,
    cpu::elementwise,
    dtype::Element,
    ensure,
};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, PoisonError, RwLock, RwLockWriteGuard,
        atomic::{AtomicBool, Ordering},
    },
};

/// A tensor that training changes: a parameter (its gradient is tracked unless frozen) or a buffer (never).
///
/// Cloning shares it. [`get`](Param::get) hands out the present value; a graph that was built on an older value
/// keeps that value, so an update can never falsify a backward that is still to come. Updates are in place
/// when no graph holds the old value, which is so in every ordinary step.
#[derive(Clone)]
pub struct Param(Arc<Inner>);

struct Inner {
    name: String,
    id: u64,
    buffer: bool,
    frozen: AtomicBool,
    value: RwLock<Tensor>,
}

impl Param {
    /// A parameter that belongs to no [`Params`].
    pub fn new(name: &str, value: Tensor) -> Param {
        Self::build(name, value, false)
    }

    fn build(name: &str, value: Tensor, buffer: bool) -> Param {
        let value = RwLock::new(value.detach());
        let frozen = AtomicBool::new(false);
        Param(Arc::new(Inner { name: name.into(), id: new_leaf_id(), buffer, frozen, value }))
    }

    /// Its full name, as in checkpoints.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// A buffer holds state that is saved but not trained, such as running statistics.
    pub fn is_buffer(&self) -> bool {
        self.0.buffer
    }

    /// The present value: a leaf of the graph if it is trained.
    pub fn get(&self) -> Tensor {
        let value = self.value();
        if self.is_trained() { value.leaf(self.0.id) } else { value }
    }

    /// The present value, untracked.
    pub fn value(&self) -> Tensor {
        self.0.value.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Does it get gradients?
    pub fn is_trained(&self) -> bool {
        !self.0.buffer && !self.0.frozen.load(Ordering::Relaxed)
    }

    /// Stops or resumes training it.
    pub fn freeze(&self, frozen: bool) {
        self.0.frozen.store(frozen, Ordering::Relaxed);
    }

    /// Replaces the value; it moves to the parameter's device.
    ///
    /// # Errors
    /// If shape or dtype differ.
    #[track_caller]
    pub fn set(&self, value: &Tensor) -> Result<()> {
        let mut slot = self.0.value.write().unwrap_or_else(PoisonError::into_inner);
        ensure!(
            value.shape() == slot.shape() && value.dtype() == slot.dtype(),
            "set",
            "parameter {} is {} {:?}, the new value {} {:?}",
            self.0.name,
            slot.dtype(),
            slot.shape(),
            value.dtype(),
            value.shape()
        );
        *slot = value.transferred(slot.device())?;
        Ok(())
    }

    /// Replaces the value by `f` of it: `p.update(|v| v.mul_scalar(0.5))`.
    ///
    /// # Errors
    /// Those of `f` and of [`set`](Self::set); the old value stands then.
    #[track_caller]
    pub fn update(&self, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<()> {
        self.set(&crate::no_grad(|| f(&self.value()))?)
    }

    /// Keeps everyone else from this parameter while the result lives: how optimizers step many at once.
    pub(crate) fn lock(&self) -> Locked<'_> {
        let value = self.0.value.write().unwrap_or_else(PoisonError::into_inner);
        Locked { device: value.device(), value }
    }
}

/// A parameter that is being written. One on a GPU is brought to the host by [`elements`](Locked::elements), and goes
/// back when the lock is released; `on_gpu` leaves it there.
pub(crate) struct Locked<'a> {
    value: RwLockWriteGuard<'a, Tensor>,
    device: Device,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        if self.value.device() != self.device
            && let Ok(value) = self.value.transferred(self.device)
        {
            *self.value = value;
        }
    }
}

impl Locked<'_> {
    /// The elements, on the CPU where they lie. A value that a graph still holds is copied first. The parameter
    /// must be of dtype `T`.
    pub fn elements<T: Element>(&mut self) -> &mut [T] {
        elementwise::make_mut(&mut self.value)
    }

    /// The value on its GPU, for kernels to write over. One that a graph still holds is copied first.
    #[cfg(gpu)]
    #[track_caller]
    pub fn on_gpu(&mut self, op: &'static str) -> Result<&Tensor> {
        crate::gpu::writable_for_good(op, &mut self.value)?;
        Ok(&self.value)
    }
}

impl GradId for Param {
    fn grad_id(&self) -> Option<u64> {
        Some(self.0.id)
    }
}

impl std::fmt::Debug for Param {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} = {:?}", self.name(), self.value())
    }
}

/// A tree of named parameters. A layer takes the branch under its own name and registers there:
/// `Linear::new(&params.sub("fc1"), ..)` makes `fc1.weight` and `fc1.bias`. Cloning shares the tree.
#[derive(Clone, Default)]
pub struct Params {
    prefix: String,
    all: Arc<RwLock<Tree>>,
}

#[derive(Default)]
struct Tree {
    order: Vec<Param>,
    by_name: BTreeMap<String, usize>,
}

impl std::fmt::Debug for Params {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let names = self.all().into_iter().map(|p| p.name().to_owned());
        f.debug_set().entries(names).finish()
    }
}

impl Params {
    /// An empty tree.
    pub fn new() -> Params {
        Params::default()
    }

    /// The branch `name`.
    pub fn sub(&self, name: impl std::fmt::Display) -> Params {
        Params { prefix: format!("{}{name}.", self.prefix), all: self.all.clone() }
    }

    /// The full name of `name` in this branch.
    pub fn full_name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Registers a parameter.
    ///
    /// # Errors
    /// If the name is taken or the value is no float tensor.
    #[track_caller]
    pub fn param(&self, name: &str, value: Tensor) -> Result<Param> {
        ensure!(
            value.dtype().is_float(),
            "param",
            "{}{name} is {}, needs a float",
            self.prefix,
            value.dtype()
        );
        self.register(name, value, false)
    }

    /// Registers a buffer.
    ///
    /// # Errors
    /// If the name is taken.
    #[track_caller]
    pub fn buffer(&self, name: &str, value: Tensor) -> Result<Param> {
        self.register(name, value, true)
    }

    #[track_caller]
    fn register(&self, name: &str, value: Tensor, buffer: bool) -> Result<Param> {
        let name = self.full_name(name);
        // A constant is stored once and expanded; a parameter is a plain row-major array.
        let param = Param::build(&name, value.contiguous()?, buffer);
        let mut tree = self.all.write().unwrap_or_else(PoisonError::into_inner);
        if tree.by_name.contains_key(&name) {
            bail!("param", "there is a parameter {name} already");
        }
        let index = tree.order.len();
        tree.by_name.insert(name, index);
        tree.order.push(param.clone());
        Ok(param)
    }

    /// Parameters and buffers of this branch, in the order in which they were registered.
    pub fn all(&self) -> Vec<Param> {
        let tree = self.all.read().unwrap_or_else(PoisonError::into_inner);
        tree.order.iter().filter(|p| p.name().starts_with(&self.prefix)).cloned().collect()
    }

    /// Parameters that are trained: no buffers, nothing frozen.
    pub fn trained(&self) -> Vec<Param> {
        self.all().into_iter().filter(Param::is_trained).collect()
    }

    /// One parameter or buffer by its name in this branch.
    pub fn get(&self, name: &str) -> Option<Param> {
        let tree = self.all.read().unwrap_or_else(PoisonError::into_inner);
        tree.by_name.get(&self.full_name(name)).map(|&i| tree.order[i].clone())
    }

    /// Freezes (or thaws) what `choose` picks by full name.
    pub fn freeze(&self, frozen: bool, choose: impl Fn(&str) -> bool) {
        self.all().iter().filter(|p| choose(p.name())).for_each(|p| p.freeze(frozen));
    }

    /// Number of elements of all parameters, buffers not counted.
    pub fn count(&self) -> usize {
        self.all().iter().filter(|p| !p.is_buffer()).map(|p| p.value().numel()).sum()
    }

    /// Converts the parameters, trained and frozen, to a float dtype; buffers (running statistics) keep theirs. For
    /// training in half precision this comes before the optimizer is made, which keeps f32 masters.
    ///
    /// # Errors
    /// If `dtype` is no float.
    #[track_caller]
    pub fn to_dtype(&self, dtype: DType) -> Result<()> {
        ensure!(dtype.is_float(), "to_dtype", "parameters need a float dtype, got {dtype}");
        for param in self.all().iter().filter(|p| !p.is_buffer()) {
            let mut slot = param.0.value.write().unwrap_or_else(PoisonError::into_inner);
            *slot = slot.detach().to_dtype(dtype)?;
        }
        Ok(())
    }

    /// dtype of the first parameter, f32 if there is none.
    pub fn dtype(&self) -> DType {
        self.all().first().map_or(DType::F32, |p| p.value().dtype())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_updates_and_old_graphs() -> Result<()> {
        let params = Params::new();
        let w = params.sub("a").sub(0).param("weight", Tensor::ones([2], DType::F32)?)?;
        assert_eq!(w.name(), "a.0.weight");
        assert!(params.sub("a").sub(0).param("weight", Tensor::scalar(0.0)).is_err());
        let y = w.get().mul(&w.get())?.sum(())?;
        w.update(|v| v.mul_scalar(10.0))?;
        let grads = y.backward()?;
        let g = grads.get(&w).map(|g| g.to_vec::<f32>()).transpose()?;
        assert_eq!(g, Some(vec![2.0, 2.0]), "the graph keeps the value that it was built on");
        assert_eq!(w.value().to_vec::<f32>()?, [10.0, 10.0]);
        let seen = w.value();
        w.lock().elements::<f32>().fill(3.0);
        assert_eq!((seen.to_vec::<f32>()?[0], w.value().to_vec::<f32>()?[0]), (10.0, 3.0));
        params.freeze(true, |name| name.starts_with("a."));
        assert!(!w.get().tracked() && params.trained().is_empty() && params.count() == 2);
        assert!(w.set(&Tensor::ones([3], DType::F32)?).is_err());
        Ok(())
    }
}
