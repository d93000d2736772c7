//! What stands behind a tensor: a piece of one device's memory.

use crate::{Device, cpu::pool::Buffer};

/// Memory on a device. Never written once a second tensor may see it.
pub enum Storage {
    /// Host memory from the pool.
    Cpu(Buffer),
}

impl Storage {
    /// The device.
    pub fn device(&self) -> Device {
        match self {
            Storage::Cpu(_) => Device::Cpu,
        }
    }
}
