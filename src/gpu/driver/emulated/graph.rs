//! Events, ranges and graphs where work is done when its call returns, or recorded as calls.

use super::{DEVICES, open};
use crate::{Error, Result};
use std::{
    cell::RefCell,
    ffi::c_void,
    sync::atomic::{AtomicUsize, Ordering},
    time::Instant,
};

/// A moment.
pub(crate) struct Event(Instant);

/// Now, which is the end of all work that was given so far.
pub(crate) fn record_event(index: usize) -> Result<Event> {
    open(index)?;
    Ok(Event(Instant::now()))
}

/// Milliseconds from one moment to a later one.
pub(crate) fn elapsed_ms(_index: usize, from: &Event, to: &Event) -> Result<f64> {
    Ok(to.0.saturating_duration_since(from.0).as_secs_f64() * 1e3)
}

/// No profiler looks on.
pub(crate) fn push_range(_name: &str) {}

/// No profiler looks on.
pub(crate) fn pop_range() {}

// ---- graphs, kept in cuda/emulate/simt.cpp -----------------------------------------------------------

unsafe extern "C" {
    fn smalti_graph_new() -> *mut c_void;
    fn smalti_graph_add(
        graph: *mut c_void,
        run: extern "C" fn(*mut c_void),
        data: *mut c_void,
        drop: extern "C" fn(*mut c_void),
    );
    fn smalti_graph_launch(graph: *const c_void);
    fn smalti_graph_free(graph: *mut c_void);
}

/// The graph that is being recorded on each device, or 0.
static RECORDED: [AtomicUsize; DEVICES] = [const { AtomicUsize::new(0) }; DEVICES];

type Work = dyn Fn() -> Result<()>;

thread_local!(static FAILED: RefCell<Option<Error>> = const { RefCell::new(None) });

extern "C" fn run(data: *mut c_void) {
    let work = unsafe { &*data.cast::<Box<Work>>() };
    if let Err(error) = work() {
        FAILED.with_borrow_mut(|first| first.get_or_insert(error).to_string());
    }
}

extern "C" fn end(data: *mut c_void) {
    drop(unsafe { Box::from_raw(data.cast::<Box<Work>>()) });
}

/// The graph that is being recorded on a device, which is what its stream is called then; or null.
pub(super) fn recorded(index: usize) -> *mut c_void {
    RECORDED[index].load(Ordering::Acquire) as *mut c_void
}

/// Does work of device `index` that is no kernel of the crate; or keeps it, while a graph is recorded.
pub(super) fn work(index: usize, work: impl Fn() -> Result<()> + 'static) -> Result<()> {
    open(index)?;
    let graph = recorded(index);
    if graph.is_null() {
        return work();
    }
    let data: Box<Box<Work>> = Box::new(Box::new(work));
    unsafe { smalti_graph_add(graph, run, Box::into_raw(data).cast(), end) };
    Ok(())
}

/// From here on, work for device `index` is recorded and not run.
pub(crate) fn begin_capture(index: usize) -> Result<()> {
    open(index)?;
    RECORDED[index].store(unsafe { smalti_graph_new() } as usize, Ordering::Release);
    Ok(())
}

/// Ends that. With `keep`, what was recorded becomes a graph that can be launched.
pub(crate) fn end_capture(index: usize, keep: bool) -> Result<Option<usize>> {
    let graph = RECORDED[index].swap(0, Ordering::AcqRel);
    if !keep {
        forget_graph(index, graph);
    }
    Ok(keep.then_some(graph))
}

/// Runs a graph.
pub(crate) fn launch_graph(_index: usize, graph: usize) -> Result<()> {
    unsafe { smalti_graph_launch(graph as *const c_void) };
    FAILED.take().map_or(Ok(()), Err)
}

/// Frees a graph.
pub(crate) fn forget_graph(_index: usize, graph: usize) {
    unsafe { smalti_graph_free(graph as *mut c_void) };
}
