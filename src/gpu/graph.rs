//! Graphs: a training step recorded once and launched as a whole.

use super::{driver, memory};
use crate::{Device, Error, Result, Tensor, storage::Storage};
use std::{
    cell::RefCell,
    collections::BTreeSet,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread::ThreadId,
};

// ---- what is being recorded ----------------------------------------------------------------------------

/// A recording on this thread.
struct Capture {
    device: usize,
    /// Where its memory comes from.
    pool: u64,
    /// Memory from elsewhere that it reads or writes.
    used: BTreeSet<usize>,
    /// Some of that was given back.
    lost: bool,
}

thread_local!(static CAPTURE: RefCell<Option<Capture>> = const { RefCell::new(None) });
/// Recordings on all threads: their number, which is 0 nearly always, and who they are.
static CAPTURES: AtomicUsize = AtomicUsize::new(0);
static RECORDING: Mutex<Vec<(usize, ThreadId)>> = Mutex::new(Vec::new());
/// Launches so far: what the host has copied before the last one is out of date.
static LAUNCHES: AtomicU64 = AtomicU64::new(0);
/// Graphs that are alive: device, pool, and the memory from elsewhere that they use; `None` once some of it was
/// given back.
static ALIVE: Mutex<Vec<Alive>> = Mutex::new(Vec::new());
static GRAPHS: AtomicUsize = AtomicUsize::new(0);
type Alive = (usize, u64, Option<BTreeSet<usize>>);

fn alive() -> MutexGuard<'static, Vec<Alive>> {
    ALIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn recording() -> MutexGuard<'static, Vec<(usize, ThreadId)>> {
    RECORDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// To be called before work is sent to a device: one thread that records has it for itself.
pub(super) fn enter(device: usize) -> Result<()> {
    if CAPTURES.load(Ordering::Acquire) == 0 {
        return Ok(());
    }
    let here = std::thread::current().id();
    match recording().iter().find(|(d, thread)| *d == device && *thread != here) {
        None => Ok(()),
        Some(_) => Err(Error::Device {
            device: Device::Cuda(device).to_string(),
            message: "another thread is recording a graph on it".into(),
        }),
    }
}

/// To be called before anything that waits for the device or reads from it.
pub(super) fn refuse_in_capture(device: usize, what: &str) -> Result<()> {
    if CAPTURES.load(Ordering::Acquire) == 0 {
        return Ok(());
    }
    enter(device)?;
    if !CAPTURE.with_borrow(|c| c.as_ref().is_some_and(|c| c.device == device)) {
        return Ok(());
    }
    Err(Error::Device {
        device: Device::Cuda(device).to_string(),
        message: format!("{what} is not possible while a graph is recorded: the values are not there yet"),
    })
}

/// The pool that this thread's memory of a device comes from: that of the graph being recorded, or the common one.
pub(super) fn pool(device: usize) -> u64 {
    if CAPTURES.load(Ordering::Acquire) == 0 {
        return memory::COMMON;
    }
    CAPTURE.with_borrow(|c| c.as_ref().filter(|c| c.device == device).map_or(memory::COMMON, |c| c.pool))
}

/// Does this thread record a graph, so that nothing can be read?
pub(crate) fn is_recording() -> bool {
    CAPTURES.load(Ordering::Acquire) > 0 && CAPTURE.with_borrow(Option::is_some)
}

/// To be called for every tensor that a kernel reads or writes: a graph watches over what is not its own.
pub(crate) fn touch(t: &Tensor) {
    if CAPTURES.load(Ordering::Acquire) > 0
        && let Storage::Cuda(buffer) = t.storage()
    {
        CAPTURE.with_borrow_mut(|c| {
            if let Some(c) = c.as_mut().filter(|c| c.device == buffer.device() && c.pool != buffer.pool()) {
                c.used.insert(buffer.ptr() as usize);
            }
        });
    }
}

/// To be called when memory is given back: graphs that use it cannot be launched any more.
pub(super) fn dropped(device: usize, address: usize) {
    if CAPTURES.load(Ordering::Acquire) > 0 {
        // while a thread ends, there is nothing it could record
        let _ = CAPTURE.try_with(|c| {
            if let Ok(mut c) = c.try_borrow_mut()
                && let Some(c) = c.as_mut().filter(|c| c.device == device)
            {
                c.lost |= c.used.contains(&address);
            }
        });
    }
    if GRAPHS.load(Ordering::Acquire) > 0 {
        for (_, _, used) in alive().iter_mut().filter(|g| g.0 == device) {
            if used.as_ref().is_some_and(|used| used.contains(&address)) {
                *used = None;
            }
        }
    }
}

/// Launches so far.
pub(super) fn launches() -> u64 {
    LAUNCHES.load(Ordering::Acquire)
}

// ---- graphs --------------------------------------------------------------------------------------------

/// Work of a GPU, recorded once and launched as often as wanted at the cost of one launch.
///
/// What is recorded are the kernels with their addresses and numbers. So a step can be recorded if
/// - it ran once before in the ordinary way, so that libraries have chosen their algorithms;
/// - every operation in it has a kernel: one that goes through the host is refused by name, as is reading a value
///   (`item`, `to_vec`) or making a tensor from host values;
/// - it updates its state (weights, moments) in place. Where it replaces a tensor from before instead, a launch would
///   read the old one for ever; if that was dropped, the recording is refused. A graph does not keep what it uses
///   alive (that would forbid updates in place): once some of it is dropped, `launch` is an error.
///
/// Numbers are those of the recording at every launch, such as seeds of dropout. Steps that change them keep them in
/// tensors on the device, or are recorded anew. Optimizers do so by themselves: `Optimizer::next_step(lr)` (and
/// `Ema::next_update()`) before a launch writes the learning rate and what depends on the number of steps. Inputs are
/// written into the tensors that were there at the recording, with [`refill`]. Other threads leave the device alone
/// meanwhile.
///
/// Nothing runs at the recording; results have their values after a launch, and other ones after the next. Memory
/// of the step is the graph's own, and is free again when the graph and the last of its results are dropped.
///
/// The emulated device keeps all these rules: it records calls of kernels with their arguments, and a launch makes
/// these calls.
pub struct Graph {
    device: usize,
    pool: u64,
    handle: usize,
}

/// Writes `values` over a tensor on a GPU that nobody else sees (no clone and no view of it is alive): how a graph
/// gets new inputs.
///
/// # Errors
/// If the tensor is shared, strided or not on a GPU, or `values` has another shape or dtype.
#[track_caller]
pub fn refill(tensor: &mut Tensor, values: &Tensor) -> Result<()> {
    const OP: &str = "refill";
    crate::ensure!(
        tensor.shape() == values.shape() && tensor.dtype() == values.dtype(),
        OP,
        "needs {} values of shape {:?}, got {} of {:?}",
        tensor.dtype(),
        tensor.shape(),
        values.dtype(),
        values.shape()
    );
    let host = values.detach().transferred(Device::Cpu)?.contiguous()?;
    crate::ensure!(
        tensor.gpu_writable(),
        OP,
        "the tensor must be on a GPU, contiguous, and the only one that sees its memory"
    );
    let (size, start) = (host.dtype().size(), tensor.offset() * tensor.dtype().size());
    let from = unsafe { host.storage().host().ptr().add(host.offset() * size) };
    match tensor.storage() {
        Storage::Cuda(buffer) => buffer.upload_at(start, from, host.numel() * size),
        Storage::Cpu(_) => Ok(()),
    }
}

/// A recording under way; ended also when the step panics.
struct Recording {
    device: usize,
    pool: u64,
    /// The driver records no more.
    ended: bool,
}

impl Recording {
    fn begin(device: usize) -> Result<Recording> {
        static NEXT: AtomicU64 = AtomicU64::new(memory::COMMON + 1);
        if CAPTURE.with_borrow(Option::is_some) {
            return Err(Error::msg("Graph::capture: this thread is recording a graph already"));
        }
        enter(device)?;
        let pool = NEXT.fetch_add(1, Ordering::Relaxed);
        recording().push((device, std::thread::current().id()));
        CAPTURES.fetch_add(1, Ordering::AcqRel);
        // from here on, dropping it puts everything back
        let mut this = Recording { device, pool, ended: true };
        driver::synchronize(device)?;
        driver::begin_capture(device)?;
        this.ended = false;
        CAPTURE.set(Some(Capture { device, pool, used: BTreeSet::new(), lost: false }));
        Ok(this)
    }

    fn end(&mut self, keep: bool) -> Result<Option<usize>> {
        self.ended = true;
        driver::end_capture(self.device, keep)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        CAPTURE.set(None);
        let panicked = !self.ended;
        if panicked {
            let _ = self.end(false);
        }
        let here = std::thread::current().id();
        recording().retain(|&(d, thread)| (d, thread) != (self.device, here));
        CAPTURES.fetch_sub(1, Ordering::AcqRel);
        if panicked {
            memory::retire(self.device, self.pool);
        }
    }
}

impl Graph {
    /// Records what `step` has the device do.
    ///
    /// # Errors
    /// Those of `step`, among them what a recording forbids; if `step` dropped a tensor from before; if the device
    /// is no GPU or is recording already.
    pub fn capture<R>(device: Device, step: impl FnOnce() -> Result<R>) -> Result<(Graph, R)> {
        let index = memory::index(device)?;
        let mut recording = Recording::begin(index)?;
        let pool = recording.pool;
        let result = step();
        let used = CAPTURE.take().filter(|c| !c.lost).map(|c| c.used);
        let handle = recording.end(result.is_ok() && used.is_some());
        drop(recording);
        let (result, handle) = match (result, handle) {
            (Ok(result), Ok(Some(handle))) => (result, handle),
            (result, handle) => {
                memory::retire(index, pool);
                drop(result?);
                handle?;
                let message = "Graph::capture: the step dropped a tensor that it uses and that was there before it. \
                               A launch would use its memory, which is free; update it in place";
                return Err(Error::Device { device: device.to_string(), message: message.into() });
            }
        };
        alive().push((index, pool, used));
        GRAPHS.fetch_add(1, Ordering::AcqRel);
        Ok((Graph { device: index, pool, handle }, result))
    }

    /// Runs the step. The call returns at once; what comes later on the device comes after it.
    ///
    /// # Errors
    /// If a tensor that the graph uses was dropped; if the device is recording a graph or is lost.
    pub fn launch(&self) -> Result<()> {
        refuse_in_capture(self.device, "Graph::launch")?;
        if alive().iter().any(|g| g.1 == self.pool && g.2.is_none()) {
            return Err(Error::msg("Graph::launch: a tensor that the graph reads or writes was dropped"));
        }
        driver::launch_graph(self.device, self.handle)?;
        LAUNCHES.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// Bytes that the graph holds for itself.
    pub fn memory(&self) -> usize {
        memory::held(self.device, self.pool)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        alive().retain(|g| g.1 != self.pool);
        GRAPHS.fetch_sub(1, Ordering::AcqRel);
        driver::forget_graph(self.device, self.handle);
        memory::retire(self.device, self.pool);
    }
}

/// For tests: recordings have the device for themselves, which is `cuda:1`.
#[cfg(all(test, feature = "emulate"))]
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(all(test, feature = "emulate"))]
mod tests {
    use super::*;
    use crate::{
        DType,
        gpu::timing::{Event, range},
        on_device,
    };

    const GPU: Device = Device::Cuda(1);

    fn matrix() -> Result<Tensor> {
        Device::Cpu.scope(|| Tensor::arange(4, DType::F32)?.reshape([2, 2]))?.to_device(GPU)
    }

    fn message<R>(result: Result<R>) -> String {
        result.err().map(|e| e.to_string()).unwrap_or_default()
    }

    #[test]
    fn events_and_ranges() -> Result<()> {
        let _alone = alone();
        let _range = range("test");
        let before = Event::record(GPU)?;
        let after = Event::record(GPU)?;
        assert!(after.ms_since(&before)? >= 0.0);
        assert!(Event::record(Device::Cpu).is_err());
        assert!(after.ms_since(&Event::record(Device::Cuda(0))?).is_err());
        Ok(())
    }

    #[test]
    fn a_step_is_recorded_in_memory_of_its_own() -> Result<()> {
        let _alone = alone();
        let x = matrix()?;
        let (graph, y) = Graph::capture(GPU, || x.matmul(&x)?.matmul(&x))?;
        assert!(graph.memory() > 0);
        let (device, pool) = (graph.device, graph.pool);
        graph.launch()?;
        assert_eq!(y.to_vec::<f32>()?, [6.0, 11.0, 22.0, 39.0]);
        drop(graph);
        assert!(memory::held(device, pool) > 0, "a result is alive");
        drop(y);
        assert_eq!(memory::held(device, pool), 0);
        Ok(())
    }

    #[test]
    fn inputs_are_refilled() -> Result<()> {
        let _alone = alone();
        let mut x = matrix()?;
        let before = x.gpu_ptr();
        let values = Device::Cpu.scope(|| Tensor::ones([2, 2], DType::F32))?;
        refill(&mut x, &values)?;
        assert_eq!((x.to_vec::<f32>()?, x.gpu_ptr()), (vec![1.0; 4], before));
        let other = x.clone();
        assert!(message(refill(&mut x, &values)).contains("only one"));
        assert!(
            refill(&mut x, &values.reshape([4])?).is_err() && refill(&mut values.clone(), &values).is_err()
        );
        assert_eq!(other.to_vec::<f32>()?, [1.0; 4]);
        Ok(())
    }

    /// Kernels, products and convolutions, with gradients: nothing runs when it is recorded, and each launch computes
    /// from what is in the input then.
    #[test]
    fn a_launch_computes_from_the_present_inputs() -> Result<()> {
        let _alone = alone();
        let values = |seed: usize| {
            let x = Device::Cpu.scope(|| Tensor::arange(48, DType::F32)?.reshape([1, 3, 4, 4]));
            x?.affine(0.1, seed as f64)
        };
        let step = |x: &Tensor| -> Result<(Tensor, Tensor)> {
            let x = x.detach().requires_grad();
            let y = x.conv2d(&x.narrow(0, 0, 1)?, None, Default::default())?.gelu()?.softmax(-1)?;
            let loss = y.add(&x.mean(())?)?.sum(())?;
            let grads = loss.backward()?;
            let grad = grads.get(&x).ok_or_else(|| Error::msg("no gradient"))?.clone();
            Ok((loss.detach(), grad))
        };
        let mut x = values(0)?.to_device(GPU)?;
        step(&x)?;
        let (graph, (loss, grad)) = Graph::capture(GPU, || step(&x))?;
        for seed in 1..4 {
            refill(&mut x, &values(seed)?)?;
            graph.launch()?;
            let (want_loss, want) = step(&x)?;
            assert_eq!(loss.item()?, want_loss.item()?);
            assert_eq!(grad.to_vec::<f32>()?, want.to_vec::<f32>()?);
        }
        Ok(())
    }

    #[test]
    fn what_cannot_be_recorded_is_refused_by_name() -> Result<()> {
        let _alone = alone();
        let x = matrix()?;
        let host = || -> Result<()> { on_device!(x, "probe", Ok(())) };
        let text = message(Graph::capture(GPU, host));
        assert!(text.contains("probe") && text.contains("host"), "{text}");
        assert!(message(Graph::capture(GPU, || x.to_vec::<f32>())).contains("reading a tensor"));
        assert!(message(Graph::capture(GPU, matrix)).contains("from host memory"));
        assert!(message(Graph::capture(GPU, || memory::synchronize(GPU))).contains("synchronize"));
        assert!(message(Graph::capture(GPU, || Event::record(GPU))).contains("Event"));
        assert!(message(Graph::capture(GPU, || Graph::capture(GPU, || Ok(())))).contains("already"));
        host()?;
        Ok(())
    }

    #[test]
    fn a_graph_watches_over_what_it_uses() -> Result<()> {
        let _alone = alone();
        let mut state = matrix()?;
        let replaced = Graph::capture(GPU, || {
            state = state.matmul(&state)?;
            Ok(())
        });
        assert!(message(replaced).contains("dropped a tensor"));
        let (x, unused) = (matrix()?, matrix()?);
        let (graph, _y) = Graph::capture(GPU, || x.matmul(&x))?;
        drop(unused);
        graph.launch()?;
        drop(x);
        assert!(message(graph.launch()).contains("was dropped"));
        Ok(())
    }

    #[test]
    fn other_threads_wait_and_panics_end_a_recording() -> Result<()> {
        let _alone = alone();
        let x = matrix()?;
        let elsewhere = |x: &Tensor| std::thread::scope(|s| s.spawn(|| x.matmul(x).map(|_| ())).join());
        let (graph, other) = Graph::capture(GPU, || Ok(elsewhere(&x)))?;
        assert!(message(other.unwrap_or(Ok(()))).contains("another thread"));
        drop(graph);
        let step = || Graph::capture(GPU, || -> Result<()> { panic!("the step fails") });
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(step)).is_err());
        assert!(elsewhere(&x).is_ok_and(|r| r.is_ok()));
        Ok(())
    }
}
