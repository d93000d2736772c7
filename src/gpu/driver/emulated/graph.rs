//! Events, ranges and capture where work is done when its call returns.

use super::open;
use crate::{Error, Result};
use std::time::Instant;

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

/// Work runs here while it is captured: all rules of a capture are checked, but there is nothing to record with.
pub(crate) fn begin_capture(index: usize) -> Result<()> {
    open(index)
}

/// Ends that.
pub(crate) fn end_capture(_index: usize, keep: bool) -> Result<Option<usize>> {
    Ok(keep.then_some(0))
}

/// Kernels are calls with the addresses and numbers of one moment; running the step's code again would be another
/// thing (new addresses, other numbers), so this is refused rather than pretended.
pub(crate) fn launch_graph(_index: usize, _graph: usize) -> Result<()> {
    Err(Error::msg(
        "Graph::launch: the emulated device checks what a capture demands but cannot replay it; run the step itself",
    ))
}

/// Nothing was kept.
pub(crate) fn forget_graph(_index: usize, _graph: usize) {}
