//! Events, ranges for profilers, capture of graphs.

use super::{Library, cu, gpu};
use crate::Result;
use std::{ffi::CString, ptr::null_mut};

/// A moment on a device's stream.
pub(crate) struct Event(usize);

impl Event {
    fn handle(&self) -> cu::CUevent {
        self.0 as cu::CUevent
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // the driver keeps what is still under way
        let _ = unsafe { cu::cuEventDestroy_v2(self.handle()) };
    }
}

/// Marks the end of all work that device `index` was given so far.
pub(crate) fn record_event(index: usize) -> Result<Event> {
    let gpu = gpu(index)?;
    let mut event = null_mut();
    let flags = cu::CUevent_flags::CU_EVENT_DEFAULT as u32;
    gpu.check("cuEventCreate", unsafe { cu::cuEventCreate(&mut event, flags) })?;
    let event = Event(event as usize);
    gpu.check("cuEventRecord", unsafe { cu::cuEventRecord(event.handle(), gpu.stream()) })?;
    Ok(event)
}

/// Milliseconds from one moment to a later one, which is waited for. Both are of device `index`.
pub(crate) fn elapsed_ms(index: usize, from: &Event, to: &Event) -> Result<f64> {
    let gpu = gpu(index)?;
    gpu.check("event", unsafe { cu::cuEventSynchronize(to.handle()) })?;
    let mut ms = 0f32;
    let code = unsafe { cu::cuEventElapsedTime_v2(&mut ms, from.handle(), to.handle()) };
    gpu.check("cuEventElapsedTime", code)?;
    Ok(f64::from(ms))
}

/// Opens a range on this thread's line in a profile. Nothing happens where the NVTX library is not there.
pub(crate) fn push_range(name: &str) {
    if Library::Nvtx.is_present()
        && let Ok(name) = CString::new(name)
    {
        unsafe { cudarc::nvtx::sys::nvtxRangePushA(name.as_ptr()) };
    }
}

/// Ends the range opened last.
pub(crate) fn pop_range() {
    if Library::Nvtx.is_present() {
        unsafe { cudarc::nvtx::sys::nvtxRangePop() };
    }
}

/// From here on, work for device `index` is recorded and not run. The relaxed mode lets this thread ask the driver
/// for memory meanwhile; what would wait for the stream is refused before it comes here.
pub(crate) fn begin_capture(index: usize) -> Result<()> {
    let gpu = gpu(index)?;
    let mode = cu::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    gpu.check("cuStreamBeginCapture", unsafe { cu::cuStreamBeginCapture_v2(gpu.stream(), mode) })
}

/// Ends that. With `keep`, what was recorded becomes a graph that can be launched.
pub(crate) fn end_capture(index: usize, keep: bool) -> Result<Option<usize>> {
    let gpu = gpu(index)?;
    let mut graph = null_mut();
    gpu.check("cuStreamEndCapture", unsafe { cu::cuStreamEndCapture(gpu.stream(), &mut graph) })?;
    let mut ready = null_mut();
    let made = match keep {
        true => unsafe { cu::cuGraphInstantiateWithFlags(&mut ready, graph, 0) },
        false => cu::CUresult::CUDA_SUCCESS,
    };
    if !graph.is_null() {
        gpu.check("cuGraphDestroy", unsafe { cu::cuGraphDestroy(graph) })?;
    }
    gpu.check("cuGraphInstantiate", made)?;
    Ok(keep.then_some(ready as usize))
}

/// Runs a graph.
pub(crate) fn launch_graph(index: usize, graph: usize) -> Result<()> {
    let gpu = gpu(index)?;
    gpu.check("cuGraphLaunch", unsafe { cu::cuGraphLaunch(graph as cu::CUgraphExec, gpu.stream()) })
}

/// Frees a graph; where it runs, after that.
pub(crate) fn forget_graph(index: usize, graph: usize) {
    if gpu(index).is_ok() {
        let _ = unsafe { cu::cuGraphExecDestroy(graph as cu::CUgraphExec) };
    }
}
