//! Timing, and ranges for profilers.

use super::{driver, graph, memory};
use crate::{Device, Error, Result};
use std::marker::PhantomData;

/// A moment in a GPU's work, for timing: `Event::record(d)?` before and after, then `after.ms_since(&before)?`.
pub struct Event {
    device: usize,
    at: driver::Event,
}

impl Event {
    /// Marks the end of all work that the device was given so far.
    ///
    /// # Errors
    /// If the device is no GPU, is not there, or is recording a graph.
    pub fn record(device: Device) -> Result<Event> {
        let device = memory::index(device)?;
        graph::refuse_in_capture(device, "Event::record")?;
        Ok(Event { device, at: driver::record_event(device)? })
    }

    /// Milliseconds on the device since an earlier moment; waits until this one has come.
    ///
    /// # Errors
    /// If the two are of different devices, or a kernel failed meanwhile.
    pub fn ms_since(&self, earlier: &Event) -> Result<f64> {
        if self.device != earlier.device {
            let devices = (Device::Cuda(self.device), Device::Cuda(earlier.device));
            return Err(Error::msg(format!("Event: one is of {}, the other of {}", devices.0, devices.1)));
        }
        graph::refuse_in_capture(self.device, "Event::ms_since")?;
        driver::elapsed_ms(self.device, &earlier.at, &self.at)
    }
}

/// A named stretch of this thread's line in a profile (NVTX), which ends when this is dropped. Nothing happens on
/// the emulated device and where the library (libnvToolsExt) is not there.
#[must_use = "the range ends when this is dropped"]
pub struct Range(PhantomData<*const ()>);

/// Opens a range: `let _range = gpu::range("forward");`
pub fn range(name: &str) -> Range {
    driver::push_range(name);
    Range(PhantomData)
}

impl Drop for Range {
    fn drop(&mut self) {
        driver::pop_range();
    }
}
