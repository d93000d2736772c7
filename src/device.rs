//! Where a tensor lives.

use crate::{Error, Result};
use std::{
    cell::Cell,
    fmt,
    sync::{LazyLock, Mutex, PoisonError},
};

/// A device, as a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// Host memory, computed on by all cores.
    Cpu,
    /// CUDA device number i.
    Cuda(usize),
}

// Where tensors are made on this thread, if a scope says so.
thread_local!(static SCOPE: Cell<Option<Device>> = const { Cell::new(None) });
/// Where they are made elsewhere: the environment variable `SMALTI_DEVICE`, or the CPU.
static DEFAULT: LazyLock<Mutex<Result<Device, String>>> = LazyLock::new(|| {
    Mutex::new(match std::env::var("SMALTI_DEVICE") {
        Ok(name) => Device::parse(&name).map_err(|error| format!("SMALTI_DEVICE: {error}")),
        Err(_) => Ok(Device::Cpu),
    })
});

impl Device {
    /// CUDA device number `index`.
    ///
    /// # Errors
    /// If the crate was built without the features `cuda` and `emulate`, or no driver or no such device is there.
    pub fn cuda(index: usize) -> Result<Device> {
        #[cfg(gpu)]
        {
            crate::gpu::open(index)?;
            Ok(Device::Cuda(index))
        }
        #[cfg(not(gpu))]
        Err(Error::Device {
            device: Device::Cuda(index).to_string(),
            message: "this build of smalti has no CUDA side; build with --features cuda (or emulate)".into(),
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

    /// Where new tensors are made: the device of the innermost [`scope`](Self::scope), else the one of
    /// [`set_default`](Self::set_default), else that of the environment variable `SMALTI_DEVICE`, else the CPU.
    ///
    /// # Errors
    /// If `SMALTI_DEVICE` names a device that is not there.
    pub fn current() -> Result<Device> {
        match SCOPE.get() {
            Some(device) => Ok(device),
            None => DEFAULT.lock().unwrap_or_else(PoisonError::into_inner).clone().map_err(Error::Message),
        }
    }

    /// Makes new tensors of all threads on this device.
    pub fn set_default(self) {
        *DEFAULT.lock().unwrap_or_else(PoisonError::into_inner) = Ok(self);
    }

    /// Runs `f` with new tensors of this thread on this device.
    pub fn scope<R>(self, f: impl FnOnce() -> R) -> R {
        /// Restores the device that was there before, also when `f` panics.
        struct Restore(Option<Device>);
        impl Drop for Restore {
            fn drop(&mut self) {
                SCOPE.set(self.0);
            }
        }
        let _restore = Restore(SCOPE.replace(Some(self)));
        f()
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

/// Does this thread run CPU code on behalf of a GPU? Then tensors of both may meet.
pub(crate) fn is_on_host() -> bool {
    #[cfg(gpu)]
    return crate::gpu::is_on_host();
    #[cfg(not(gpu))]
    false
}

/// Chooses an operation's code by the tensor's device: the only place that does.
///
/// `on_device!(x, "softmax", cpu::forward(..), gpu::forward(..))`. Without GPU code, or where `when` does not
/// hold (`on_device!(x, "softmax", cpu, gpu, when x.rank() < 4)`), a tensor on a GPU goes through the host.
macro_rules! on_device {
    ($tensor:expr, $op:expr, $cpu:expr $(,)?) => {{
        #[cfg(gpu)]
        {
            match $crate::gpu::enter_host($op, &$tensor) {
                Ok(way) => {
                    let result = $cpu;
                    $crate::gpu::leave_host(way, result)
                }
                Err(error) => Err(error),
            }
        }
        #[cfg(not(gpu))]
        {
            $cpu
        }
    }};
    ($tensor:expr, $op:expr, $cpu:expr, $gpu:expr $(,)?) => {
        $crate::on_device!($tensor, $op, $cpu, $gpu, when true)
    };
    ($tensor:expr, $op:expr, $cpu:expr, $gpu:expr, when $condition:expr $(,)?) => {{
        #[cfg(gpu)]
        {
            if $crate::gpu::on_gpu(&$tensor) && $condition {
                $gpu
            } else {
                $crate::on_device!($tensor, $op, $cpu)
            }
        }
        #[cfg(not(gpu))]
        {
            $cpu
        }
    }};
}
pub(crate) use on_device;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(Device::parse("cpu").ok(), Some(Device::Cpu));
        for text in ["gpu", "cuda:", "cuda:x", "cuda:99", ""] {
            assert!(Device::parse(text).is_err(), "{text}");
        }
        assert_eq!(Device::Cuda(3).to_string(), "cuda:3");
    }

    #[test]
    fn scopes_nest_and_end() -> Result<()> {
        let before = Device::current()?;
        Device::Cpu.scope(|| {
            Device::Cuda(1).scope(|| assert_eq!(Device::current().ok(), Some(Device::Cuda(1))));
            assert_eq!(Device::current().ok(), Some(Device::Cpu));
        });
        assert_eq!(Device::current()?, before);
        Ok(())
    }
}
