//! Copies between host and device, by way of pinned memory: from pageable memory the driver would copy just so, but
//! one piece after the other. Here the host fills one piece while the device takes another.

use super::{Gpu, cu, gpu};
use crate::Result;
use std::{
    ffi::c_void,
    ptr::null_mut,
    sync::{MutexGuard, PoisonError},
};

/// Bytes of a piece: some 80 microseconds on the bus, beside which the start of a copy does not count.
const PIECE: usize = 4 << 20;
/// Pieces on their way at one time.
const PIECES: usize = 4;

/// Pinned pieces that are used in turn.
pub(super) struct Ring {
    slots: [Slot; PIECES],
    next: usize,
}

#[derive(Clone, Copy)]
struct Slot {
    memory: *mut u8,
    /// Recorded behind the copy that uses the slot last.
    done: cu::CUevent,
}

// Pinned memory and events belong to the process, not to a thread.
unsafe impl Send for Ring {}

impl Ring {
    /// Lives as long as the device.
    fn new(gpu: &Gpu) -> Result<Ring> {
        let mut slots = [Slot { memory: null_mut(), done: null_mut() }; PIECES];
        for slot in &mut slots {
            let mut memory: *mut c_void = null_mut();
            let flags = cu::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
            unsafe {
                gpu.check("pinned memory", cu::cuMemHostAlloc(&mut memory, PIECE, 0))?;
                gpu.check("cuEventCreate", cu::cuEventCreate(&mut slot.done, flags))?;
            }
            slot.memory = memory.cast();
        }
        Ok(Ring { slots, next: 0 })
    }

    /// The next slot, when the copy that used it last is over.
    fn turn(&mut self, gpu: &Gpu) -> Result<Slot> {
        let slot = self.slots[self.next];
        self.next = (self.next + 1) % PIECES;
        gpu.check("copy", unsafe { cu::cuEventSynchronize(slot.done) })?;
        Ok(slot)
    }
}

/// The device's ring. It is locked for the whole copy and nothing under the lock runs on other threads.
fn ring(gpu: &Gpu) -> Result<MutexGuard<'_, Option<Ring>>> {
    let mut ring = gpu.ring.lock().unwrap_or_else(PoisonError::into_inner);
    if ring.is_none() {
        *ring = Some(Ring::new(gpu)?);
    }
    Ok(ring)
}

/// Copies host memory to the device. The host memory may be changed when the call returns.
///
/// # Safety
/// Both places hold `bytes` bytes.
pub(crate) unsafe fn upload(index: usize, to: *mut u8, from: *const u8, bytes: usize) -> Result<()> {
    let gpu = gpu(index)?;
    let mut guard = ring(gpu)?;
    let Some(ring) = guard.as_mut() else { return Ok(()) };
    for at in (0..bytes).step_by(PIECE) {
        let n = PIECE.min(bytes - at);
        let slot = ring.turn(gpu)?;
        unsafe {
            std::ptr::copy_nonoverlapping(from.add(at), slot.memory, n);
            let to = to.add(at) as cu::CUdeviceptr;
            gpu.check("upload", cu::cuMemcpyHtoDAsync_v2(to, slot.memory.cast(), n, gpu.stream()))?;
            gpu.check("upload", cu::cuEventRecord(slot.done, gpu.stream()))?;
        }
    }
    Ok(())
}

/// Copies device memory to the host. It is there when the call returns.
///
/// # Safety
/// Both places hold `bytes` bytes.
pub(crate) unsafe fn download(index: usize, to: *mut u8, from: *const u8, bytes: usize) -> Result<()> {
    let gpu = gpu(index)?;
    let mut guard = ring(gpu)?;
    let Some(ring) = guard.as_mut() else { return Ok(()) };
    let pieces = bytes.div_ceil(PIECE);
    let mut used = [None; PIECES];
    // piece i is asked for while piece i - PIECES + 1 is taken out of its slot
    for i in 0..pieces + PIECES - 1 {
        if i < pieces {
            let n = PIECE.min(bytes - i * PIECE);
            let slot = ring.turn(gpu)?;
            unsafe {
                let from = from.add(i * PIECE) as cu::CUdeviceptr;
                gpu.check("download", cu::cuMemcpyDtoHAsync_v2(slot.memory.cast(), from, n, gpu.stream()))?;
                gpu.check("download", cu::cuEventRecord(slot.done, gpu.stream()))?;
            }
            used[i % PIECES] = Some((slot, n));
        }
        if let Some(first) = (i + 1).checked_sub(PIECES)
            && let Some((slot, n)) = used[first % PIECES].take()
        {
            unsafe {
                gpu.check("download", cu::cuEventSynchronize(slot.done))?;
                std::ptr::copy_nonoverlapping(slot.memory, to.add(first * PIECE), n);
            }
        }
    }
    Ok(())
}
