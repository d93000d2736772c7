//! Reverse-mode automatic differentiation. Knows no operation.
//!
//! An operation that has a tracked input [`record`](Tensor::record)s a node: its inputs' edges and what its
//! [`Backward`] needs. The graph is owned by the tensors: it is gone when they are. [`Tensor::backward`] walks
//! it from the newest node to the oldest (a heap on sequence numbers, no recursion), drops what each node saved
//! as soon as it has been used, and returns the gradients of the leaves.

use crate::{Error, Result, Tensor, shape::Dims};
use smallvec::SmallVec;
use std::{
    cell::{Cell, RefCell},
    collections::{BinaryHeap, HashMap, HashSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// The derivative of one operation; the struct holds exactly what it saved.
pub trait Backward: Send + Sync + 'static {
    /// The operation's name, as it stands in errors.
    const NAME: &'static str;

    /// Is `backward` written in tensor operations alone, over saved tensors that kept their place in the graph
    /// (outputs by way of [`Ctx::output`])? Then it can be differentiated once more.
    const TWICE: bool = false;

    /// Gradients of the inputs, in the order in which `record` got them, from the gradient of the output. A
    /// gradient may have the broadcast shape; the engine sums it down to the input's.
    ///
    /// # Errors
    /// [`Error::NoGradient`] for an input that has no rule; whatever the operations inside return.
    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads>;
}

/// Gradients of an operation's inputs; `None` where none is needed or the derivative is zero.
pub type Grads = SmallVec<[Option<Tensor>; 4]>;

/// What an operation's backward may ask.
pub struct Ctx<'a> {
    node: &'a Arc<Node>,
    create_graph: bool,
    leaves: RefCell<Vec<(u64, Tensor)>>,
    waiting: RefCell<&'a mut HashMap<u64, Tensor>>,
}

impl Ctx<'_> {
    /// Is the gradient of input `i` wanted?
    pub fn needs(&self, i: usize) -> bool {
        self.node.inputs.get(i).is_some_and(|input| input.edge.is_some())
    }

    /// `Some(f()?)` if the gradient of input `i` is wanted.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn grad(&self, i: usize, f: impl FnOnce() -> Result<Tensor>) -> Result<Option<Tensor>> {
        self.needs(i).then(f).transpose()
    }

    /// An output that was saved detached (a node that owned its own output would never be freed), at its place
    /// in the graph again if a second derivative is wanted.
    pub fn output(&self, saved: &Tensor) -> Tensor {
        if self.create_graph { saved.with_edge(Some(Edge::Node(self.node.clone()))) } else { saved.clone() }
    }

    /// Takes out what other paths have sent to input `i` so far. A rule that asks must add it to what it returns
    /// for `i`: a fused kernel does so while it writes, which saves the engine a pass over memory.
    pub fn take_pending(&self, i: usize) -> Option<Tensor> {
        match self.node.inputs.get(i)?.edge.as_ref()? {
            Edge::Node(node) => self.waiting.borrow_mut().remove(&node.id),
            Edge::Leaf(_) => None,
        }
    }

    /// Adds to the gradient of a leaf that is not among the inputs: for operations that run a graph of their own.
    fn leaf(&self, id: u64, grad: Tensor) {
        self.leaves.borrow_mut().push((id, grad));
    }
}

/// Object-safe face of [`Backward`].
trait Rule: Send + Sync {
    fn twice(&self) -> bool;
    fn run(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads>;
}
impl<B: Backward> Rule for B {
    fn twice(&self) -> bool {
        B::TWICE
    }
    fn run(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        B::backward(self, grad, ctx)
    }
}

/// Where a tensor's gradient goes.
#[derive(Clone)]
pub(crate) enum Edge {
    /// To the user, under this id.
    Leaf(u64),
    /// Into the operation that made the tensor.
    Node(Arc<Node>),
}

impl Edge {
    fn id(&self) -> u64 {
        match self {
            Edge::Leaf(id) => *id,
            Edge::Node(node) => node.id,
        }
    }
}

struct Input {
    edge: Option<Edge>,
    shape: Dims,
}

pub(crate) struct Node {
    /// Later nodes have larger ids; leaves draw from the same sequence.
    id: u64,
    name: &'static str,
    inputs: SmallVec<[Input; 3]>,
    rule: Mutex<Option<Arc<dyn Rule>>>,
}

fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Node {
    fn rule(&self) -> std::sync::MutexGuard<'_, Option<Arc<dyn Rule>>> {
        self.rule.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Long chains are freed in a loop, not by recursion: what a dying node owns is queued, and the outermost drop
/// works the queue off.
impl Drop for Node {
    fn drop(&mut self) {
        type Remains = (SmallVec<[Input; 3]>, Option<Arc<dyn Rule>>);
        thread_local! {
            static QUEUE: RefCell<Vec<Remains>> = const { RefCell::new(Vec::new()) };
            static BUSY: Cell<bool> = const { Cell::new(false) };
        }
        let remains = (std::mem::take(&mut self.inputs), self.rule().take());
        // At thread exit the queue may be gone; then plain recursion has to do.
        let _ = QUEUE.try_with(|queue| {
            queue.borrow_mut().push(remains);
            if !BUSY.get() {
                BUSY.set(true);
                loop {
                    let Some(next) = queue.borrow_mut().pop() else { break };
                    drop(next);
                }
                BUSY.set(false);
            }
        });
    }
}

thread_local!(static ENABLED: Cell<bool> = const { Cell::new(true) });

/// Sets gradient tracking on this thread while it lives.
struct Mode(bool);
impl Mode {
    fn set(enabled: bool) -> Self {
        Mode(ENABLED.replace(enabled))
    }
}
impl Drop for Mode {
    fn drop(&mut self) {
        ENABLED.set(self.0);
    }
}

/// Runs `f` without recording: its results are untracked.
pub fn no_grad<R>(f: impl FnOnce() -> R) -> R {
    let _mode = Mode::set(false);
    f()
}

/// Does this thread record operations at present?
pub fn is_grad_enabled() -> bool {
    ENABLED.get()
}

thread_local!(static DETECT: Cell<bool> = const { Cell::new(false) });

/// Runs `f` with a look at the result of every operation, and at every gradient: how the place is found at which a
/// computation goes wrong. (Infinities below zero are let pass, since masks are made of them; what becomes of them is
/// seen.)
///
/// # Errors
/// Those of `f`; the first operation that gives NaN or infinity, and the line that called it.
pub fn detect_anomaly<R>(f: impl FnOnce() -> Result<R>) -> Result<R> {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            DETECT.set(self.0);
        }
    }
    let _restore = Restore(DETECT.replace(true));
    f()
}

#[track_caller]
fn check_finite(t: &Tensor, op: &'static str, place: &str) -> Result<()> {
    if !t.dtype().is_float() || t.numel() == 0 {
        return Ok(());
    }
    let t = t.detach();
    // looking is no operation to be looked at
    DETECT.set(false);
    let most = no_grad(|| t.amax(())?.item());
    DETECT.set(true);
    let most = most?;
    crate::ensure!(
        most.is_finite() || most == f64::NEG_INFINITY,
        op,
        "gave {most}{place}, in a result of shape {:?}",
        t.shape()
    );
    Ok(())
}

/// What a node keeps of its inputs; nothing if none is tracked or recording is off. (Apart from `record`, so that
/// it is compiled once and not for every operation.)
fn edges(inputs: &mut dyn Iterator<Item = &Tensor>) -> Option<SmallVec<[Input; 3]>> {
    if !is_grad_enabled() {
        return None;
    }
    let inputs: SmallVec<[Input; 3]> =
        inputs.map(|t| Input { edge: t.edge().cloned(), shape: Dims::from_slice(t.shape()) }).collect();
    inputs.iter().any(|input| input.edge.is_some()).then_some(inputs)
}

impl Tensor {
    /// Makes a fresh result differentiable: `y.record([x, w], Linear { .. })`. Nothing is kept if no input is
    /// tracked or recording is off.
    ///
    /// # Errors
    /// If the tensors are on different devices.
    #[track_caller]
    pub fn record<'a, B: Backward>(
        self,
        inputs: impl IntoIterator<Item = &'a Tensor>,
        rule: B,
    ) -> Result<Tensor> {
        let inputs: SmallVec<[&Tensor; 3]> = inputs.into_iter().collect();
        self.check_devices(B::NAME, &inputs)?;
        if DETECT.get() {
            check_finite(&self, B::NAME, "")?;
        }
        self.record_across(inputs, rule)
    }

    /// One number, such as a learned temperature, may come from anywhere; CPU code on behalf of a GPU mixes both.
    #[track_caller]
    fn check_devices(&self, op: &'static str, inputs: &[&Tensor]) -> Result<()> {
        let elsewhere = inputs.iter().find(|t| t.device() != self.device() && t.numel() > 1);
        match elsewhere.filter(|_| !crate::device::is_on_host()) {
            Some(t) => crate::bail!(op, "the tensors are on {} and on {}", self.device(), t.device()),
            None => Ok(()),
        }
    }

    /// [`record`](Self::record) for the operation that goes from one device to another.
    pub(crate) fn record_across<'a, B: Backward>(
        self,
        inputs: impl IntoIterator<Item = &'a Tensor>,
        rule: B,
    ) -> Result<Tensor> {
        match edges(&mut inputs.into_iter()) {
            Some(inputs) => Ok(self.with_node(B::NAME, inputs, Arc::new(rule))),
            None => Ok(self),
        }
    }

    fn with_node(self, name: &'static str, inputs: SmallVec<[Input; 3]>, rule: Arc<dyn Rule>) -> Tensor {
        let node = Node { id: next_id(), name, inputs, rule: Mutex::new(Some(rule)) };
        self.with_edge(Some(Edge::Node(Arc::new(node))))
    }

    /// The same values as a leaf whose gradient is tracked.
    pub fn requires_grad(&self) -> Tensor {
        self.with_edge(Some(Edge::Leaf(next_id())))
    }

    /// The same values outside the graph.
    pub fn detach(&self) -> Tensor {
        if self.tracked() { self.with_edge(None) } else { self.clone() }
    }

    /// A leaf under an id that exists: how a parameter keeps its identity while its values change.
    pub(crate) fn leaf(&self, id: u64) -> Tensor {
        self.with_edge(Some(Edge::Leaf(id)))
    }

    /// Gradients of this scalar with respect to every leaf that it depends on. Frees what the graph saved.
    ///
    /// # Errors
    /// If the tensor has more than one element, is not tracked, or an operation has no rule.
    #[track_caller]
    pub fn backward(&self) -> Result<Gradients> {
        self.backward_with(&BackwardOptions::default())
    }

    /// [`backward`](Self::backward) with options.
    ///
    /// # Errors
    /// As `backward`; with `create_graph` also where an operation's backward is a fused kernel.
    #[track_caller]
    pub fn backward_with(&self, options: &BackwardOptions) -> Result<Gradients> {
        let seed = match &options.grad {
            Some(grad) if grad.shape() == self.shape() && grad.dtype() == self.dtype() => grad.clone(),
            Some(grad) => crate::bail!(
                "backward",
                "the gradient is {} {:?}, the tensor {} {:?}",
                grad.dtype(),
                grad.shape(),
                self.dtype(),
                self.shape()
            ),
            None => {
                crate::ensure!(
                    self.numel() == 1,
                    "backward",
                    "needs a scalar, got shape {:?}; sum it, or give `grad`",
                    self.shape()
                );
                self.detach().ones_like()?
            }
        };
        let Some(edge) = self.edge() else {
            crate::bail!("backward", "the tensor does not depend on any tracked tensor ({self:?})");
        };
        let _mode = Mode::set(options.create_graph);
        let mut engine = Engine::new(options, 0);
        engine.add(edge, seed)?;
        engine.run()?;
        Ok(Gradients { by_id: engine.done })
    }

    /// [`backward`](Self::backward) that hands over each leaf's gradient as soon as it is complete, with the leaf's
    /// number: so that it is sent away while the walk goes on. The order is that of the walk, the same for graphs that
    /// were built in the same way.
    ///
    /// # Errors
    /// As `backward`, and those of `ready`.
    #[track_caller]
    pub(crate) fn backward_each(&self, ready: &mut dyn FnMut(u64, Tensor) -> Result<()>) -> Result<()> {
        let Some(edge) = self.edge().filter(|_| self.numel() == 1) else {
            return self.backward().map(drop);
        };
        let _mode = Mode::set(false);
        let options = BackwardOptions::default();
        let mut engine = Engine { uses: leaf_uses(edge), ..Engine::new(&options, 0) };
        engine.add(edge, self.detach().ones_like()?)?;
        while engine.next()? {
            for id in std::mem::take(&mut engine.complete) {
                engine.done.remove(&id).map_or(Ok(()), |grad| ready(id, grad))?;
            }
        }
        let mut rest: Vec<(u64, Tensor)> = engine.done.drain().collect();
        rest.sort_by_key(|(id, _)| *id);
        rest.into_iter().try_for_each(|(id, grad)| ready(id, grad))
    }
}

/// How often each leaf is an input in the graph behind `edge`; nothing if a [`checkpoint`] hides a part of it.
fn leaf_uses(edge: &Edge) -> HashMap<u64, usize> {
    let (mut uses, mut seen, mut open) = (HashMap::new(), HashSet::new(), vec![edge.clone()]);
    while let Some(edge) = open.pop() {
        match edge {
            Edge::Leaf(id) => *uses.entry(id).or_insert(0) += 1,
            Edge::Node(node) if node.name == Checkpoint::NAME => return HashMap::new(),
            Edge::Node(node) if seen.insert(node.id) => {
                open.extend(node.inputs.iter().filter_map(|input| input.edge.clone()));
            }
            Edge::Node(_) => {}
        }
    }
    uses
}

/// How [`Tensor::backward_with`] runs.
#[derive(Clone, Default)]
pub struct BackwardOptions {
    /// Gradient of the tensor itself; ones for a scalar.
    pub grad: Option<Tensor>,
    /// Keep what the graph saved, so that backward can run again.
    pub retain_graph: bool,
    /// Track the gradients themselves, for second derivatives. Implies `retain_graph`.
    pub create_graph: bool,
    /// Results of operations whose gradients are wanted too.
    pub keep: Vec<Tensor>,
}

/// Gradients by tensor or parameter.
#[derive(Default)]
pub struct Gradients {
    by_id: HashMap<u64, Tensor>,
}

/// What a gradient can be asked for: a tracked [`Tensor`] or a parameter.
pub trait GradId {
    /// Its number in the graph.
    fn grad_id(&self) -> Option<u64>;
}
impl GradId for Tensor {
    fn grad_id(&self) -> Option<u64> {
        self.edge().map(Edge::id)
    }
}

impl Gradients {
    /// The gradient of a leaf (or of a tensor named in `keep`); `None` if the result does not depend on it.
    pub fn get(&self, of: &impl GradId) -> Option<&Tensor> {
        self.by_id.get(&of.grad_id()?)
    }

    /// Takes a gradient out.
    pub fn remove(&mut self, of: &impl GradId) -> Option<Tensor> {
        self.by_id.remove(&of.grad_id()?)
    }

    /// Replaces a gradient, as clipping does.
    pub fn insert(&mut self, of: &impl GradId, grad: Tensor) {
        if let Some(id) = of.grad_id() {
            self.by_id.insert(id, grad);
        }
    }

    /// Adds another set: gradient accumulation over micro-batches.
    ///
    /// # Errors
    /// If shapes differ, which gradients of the same parameters never do.
    pub fn accumulate(&mut self, other: Gradients) -> Result<()> {
        for (id, grad) in other.by_id {
            accumulate(&mut self.by_id, id, grad)?;
        }
        Ok(())
    }

    pub(crate) fn from_ids(by_id: HashMap<u64, Tensor>) -> Gradients {
        Gradients { by_id }
    }

    /// All gradients, in no particular order.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        self.by_id.values_mut()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Are there none?
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }
}

/// The first contribution moves in, later ones are added in place where nobody else holds the sum.
fn accumulate(map: &mut HashMap<u64, Tensor>, id: u64, grad: Tensor) -> Result<()> {
    let sum = match map.remove(&id) {
        None => grad,
        Some(sum) => sum.accumulate(&grad)?,
    };
    map.insert(id, sum);
    Ok(())
}

/// Heap entry: the newest node first.
struct Pending(Arc<Node>);
impl PartialEq for Pending {
    fn eq(&self, other: &Self) -> bool {
        self.0.id == other.0.id
    }
}
impl Eq for Pending {}
impl PartialOrd for Pending {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Pending {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.id.cmp(&other.0.id)
    }
}

struct Engine<'a> {
    options: &'a BackwardOptions,
    /// Nodes older than this are out of bounds: they belong to the graph around a checkpoint.
    oldest: u64,
    keep: Vec<u64>,
    heap: BinaryHeap<Pending>,
    waiting: HashMap<u64, Tensor>,
    done: HashMap<u64, Tensor>,
    /// Leaves and the inputs that they still are of nodes to come; empty where nobody asks.
    uses: HashMap<u64, usize>,
    /// Leaves to which nothing will be added any more.
    complete: Vec<u64>,
}

impl<'a> Engine<'a> {
    fn new(options: &'a BackwardOptions, oldest: u64) -> Self {
        let keep = options.keep.iter().filter_map(GradId::grad_id).collect();
        Engine {
            options,
            oldest,
            keep,
            heap: BinaryHeap::new(),
            waiting: HashMap::new(),
            done: HashMap::new(),
            uses: HashMap::new(),
            complete: Vec::new(),
        }
    }

    fn add(&mut self, edge: &Edge, grad: Tensor) -> Result<()> {
        match edge {
            Edge::Leaf(id) => accumulate(&mut self.done, *id, grad),
            Edge::Node(node) => {
                if !self.waiting.contains_key(&node.id) {
                    self.heap.push(Pending(node.clone()));
                }
                accumulate(&mut self.waiting, node.id, grad)
            }
        }
    }

    fn run(&mut self) -> Result<()> {
        while self.next()? {}
        Ok(())
    }

    /// Works off the newest node; false if there is none.
    fn next(&mut self) -> Result<bool> {
        let Some(Pending(node)) = self.heap.pop() else { return Ok(false) };
        // a rule may have taken the gradient out
        let Some(grad) = self.waiting.remove(&node.id) else { return Ok(true) };
        if node.id < self.oldest {
            return Err(Error::msg(
                "checkpoint: the function uses a tracked tensor that is not among its inputs; pass it as one",
            ));
        }
        if self.keep.contains(&node.id) {
            self.done.insert(node.id, grad.clone());
        }
        self.step(&node, grad)?;
        for input in &node.inputs {
            if let Some(Edge::Leaf(id)) = &input.edge
                && let Some(left) = self.uses.get_mut(id)
            {
                *left -= 1;
                if *left == 0 {
                    self.complete.push(*id);
                }
            }
        }
        Ok(true)
    }

    fn step(&mut self, node: &Arc<Node>, grad: Tensor) -> Result<()> {
        let create_graph = self.options.create_graph;
        let retain = self.options.retain_graph || create_graph;
        let rule = if retain { node.rule().clone() } else { node.rule().take() };
        let rule = rule.ok_or(Error::GraphFreed { op: node.name })?;
        if create_graph && !rule.twice() {
            return Err(Error::NoSecondOrder { op: node.name });
        }
        let waiting = RefCell::new(&mut self.waiting);
        let ctx = Ctx { node, create_graph, leaves: RefCell::default(), waiting };
        let grads = rule.run(&grad, &ctx)?;
        drop((rule, grad));
        if DETECT.get() {
            grads.iter().flatten().try_for_each(|g| check_finite(g, node.name, " in its backward"))?;
        }
        for (id, grad) in ctx.leaves.into_inner() {
            accumulate(&mut self.done, id, grad)?;
        }
        for (input, grad) in node.inputs.iter().zip(grads) {
            if let (Some(edge), Some(grad)) = (&input.edge, grad) {
                let grad = if *grad.shape() == input.shape[..] { grad } else { grad.sum_to(&input.shape)? };
                self.add(edge, grad)?;
            }
        }
        Ok(())
    }
}

/// Runs `f` on `inputs` without keeping what its backward needs, and runs it again when the backward comes:
/// memory for time. Parameters that `f` uses get their gradients; other tracked tensors must be among `inputs`.
/// `f` must compute the same both times: a random generator goes in by value.
///
/// # Errors
/// Those of `f`.
pub fn checkpoint(
    f: impl Fn(&[Tensor]) -> Result<Tensor> + Send + Sync + 'static,
    inputs: &[&Tensor],
) -> Result<Tensor> {
    let saved: Vec<Tensor> = inputs.iter().map(|t| t.detach()).collect();
    let y = no_grad(|| f(&saved))?;
    if !is_grad_enabled() {
        return Ok(y);
    }
    // Parameters inside `f` are not seen from here, so the node is recorded even if no input is tracked.
    let inputs = inputs
        .iter()
        .map(|t| Input { edge: t.edge().cloned(), shape: Dims::from_slice(t.shape()) })
        .collect();
    let rule: Arc<dyn Rule> = Arc::new(Checkpoint { f: Box::new(f), saved });
    let node = Node { id: next_id(), name: Checkpoint::NAME, inputs, rule: Mutex::new(Some(rule)) };
    Ok(y.with_edge(Some(Edge::Node(Arc::new(node)))))
}

type Recompute = Box<dyn Fn(&[Tensor]) -> Result<Tensor> + Send + Sync>;

struct Checkpoint {
    f: Recompute,
    saved: Vec<Tensor>,
}

impl Backward for Checkpoint {
    const NAME: &'static str = "checkpoint";

    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let oldest = next_id();
        let leaves: Vec<Tensor> = self.saved.iter().map(Tensor::requires_grad).collect();
        let y = {
            let _mode = Mode::set(true);
            (self.f)(&leaves)?
        };
        let Some(edge) = y.edge() else { return Ok(self.saved.iter().map(|_| None).collect()) };
        let options = BackwardOptions::default();
        let mut engine = Engine::new(&options, oldest);
        engine.add(edge, grad.clone())?;
        engine.run()?;
        let grads = leaves.iter().map(|leaf| engine.done.remove(&leaf.grad_id()?)).collect();
        for (id, grad) in engine.done {
            ctx.leaf(id, grad);
        }
        Ok(grads)
    }
}

/// A new identity in the graph, for a parameter.
pub(crate) fn new_leaf_id() -> u64 {
    next_id()
}
