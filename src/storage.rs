//! What stands behind a tensor: a piece of one device's memory.

use crate::{Device, cpu::pool::Buffer};

/// Memory on a device. Never written once a second tensor may see it.
pub enum Storage {
    /// Host memory from the pool.
    Cpu(Buffer),
    /// Memory of a GPU.
    #[cfg(gpu)]
    Cuda(crate::gpu::Buffer),
}

impl Storage {
    /// The device.
    pub fn device(&self) -> Device {
        match self {
            Storage::Cpu(_) => Device::Cpu,
            #[cfg(gpu)]
            Storage::Cuda(buffer) => Device::Cuda(buffer.device()),
        }
    }

    /// The content in host memory: for a GPU, a copy that is kept.
    pub fn host(&self) -> &Buffer {
        match self {
            Storage::Cpu(buffer) => buffer,
            #[cfg(gpu)]
            Storage::Cuda(buffer) => buffer.mirror(),
        }
    }
}
