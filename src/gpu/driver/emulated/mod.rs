//! A GPU on host memory: device addresses are host addresses, and work is done when its call returns (or recorded,
//! while a graph is captured).

mod convolution;
mod graph;
mod product;

pub(crate) use convolution::convolution;
pub(crate) use graph::{
    Event, begin_capture, elapsed_ms, end_capture, forget_graph, launch_graph, pop_range, push_range,
    record_event,
};
pub(crate) use product::product;

use crate::{Device, Error, Result};
use std::{
    alloc::{Layout, alloc, dealloc},
    ffi::c_void,
};

/// Emulated devices that there are: two, so that code that mixes them up is found out.
const DEVICES: usize = 2;

/// Makes sure that device `index` is there.
pub(crate) fn open(index: usize) -> Result<()> {
    if index < DEVICES {
        return Ok(());
    }
    Err(Error::Device {
        device: Device::Cuda(index).to_string(),
        message: format!("there are {DEVICES} emulated devices"),
    })
}

fn layout(bytes: usize) -> Layout {
    // Sizes are multiples of 512 well below isize::MAX; the alignment is that of cudaMalloc.
    unsafe { Layout::from_size_align_unchecked(bytes.max(1), 512) }
}

/// Fresh memory of device `_index`, or `None` if there is not so much.
pub(crate) fn allocate(_index: usize, bytes: usize) -> Result<Option<usize>> {
    let ptr =
        if bytes < isize::MAX as usize { unsafe { alloc(layout(bytes)) } } else { std::ptr::null_mut() };
    Ok((!ptr.is_null()).then_some(ptr as usize))
}

/// Gives back what [`allocate`] gave.
///
/// # Safety
/// The memory is not used any more.
pub(crate) unsafe fn release(_index: usize, address: usize, bytes: usize) {
    unsafe { dealloc(address as *mut u8, layout(bytes)) };
}

/// Writes zeros, in the order of the stream.
///
/// # Safety
/// The place holds `bytes` bytes.
pub(crate) unsafe fn zero(index: usize, at: *mut u8, bytes: usize) -> Result<()> {
    graph::work(index, move || {
        unsafe { std::ptr::write_bytes(at, 0, bytes) };
        Ok(())
    })
}

/// Copies host memory to the device. The host memory may be changed when the call returns.
///
/// # Safety
/// Both places hold `bytes` bytes.
pub(crate) unsafe fn upload(_index: usize, to: *mut u8, from: *const u8, bytes: usize) -> Result<()> {
    unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
    Ok(())
}

/// Copies device memory to the host. It is there when the call returns.
///
/// # Safety
/// Both places hold `bytes` bytes.
pub(crate) unsafe fn download(_index: usize, to: *mut u8, from: *const u8, bytes: usize) -> Result<()> {
    unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
    Ok(())
}

/// The stream on which everything of device `_index` runs.
pub(crate) fn stream(index: usize) -> Result<*mut c_void> {
    Ok(graph::recorded(index))
}

/// Waits for all work of device `_index`.
pub(crate) fn synchronize(_index: usize) -> Result<()> {
    Ok(())
}
