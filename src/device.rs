//! Where a tensor lives.

use crate::{Error, Result};
use std::fmt;

/// A device, as a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// Host memory, computed on by all cores.
    Cpu,
    /// CUDA device number i.
    Cuda(usize),
}

impl Device {
    /// CUDA device number `index`.
    ///
    /// # Errors
    /// If the crate was built without the CUDA side, or no driver or no such device is there.
    pub fn cuda(index: usize) -> Result<Device> {
        Err(Error::Device {
            device: Device::Cuda(index).to_string(),
            message: "this build of smalti has no CUDA side".into(),
        })
    }

    /// Parses `cpu` or `cuda:0`.
    ///
    /// # Errors
    /// On any other text, or if the device is not there.
    pub fn parse(text: &str) -> Result<Device> {
        match text.split_once(':') {
            None if text == "cpu" => Ok(Device::Cpu),
            None if text == "cuda" => Device::cuda(0),
            Some(("cuda", n)) if n.parse::<usize>().is_ok() => Device::cuda(n.parse().unwrap_or_default()),
            _ => {
                Err(Error::Device { device: text.into(), message: "is neither `cpu` nor `cuda:<n>`".into() })
            }
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(i) => write!(f, "cuda:{i}"),
        }
    }
}

/// Chooses an operation's code by the tensor's device: the only place that does.
/// `on_device!(x, "softmax", cpu::forward(..))`; the GPU call will stand behind the CPU call.
#[macro_export]
macro_rules! on_device {
    ($tensor:expr, $op:expr, $cpu:expr $(,)?) => {
        match $tensor.device() {
            $crate::Device::Cpu => $cpu,
            device => Err($crate::Error::Device {
                device: device.to_string(),
                message: format!("{} has no code for it", $op),
            }),
        }
    };
}
