//! Operations without a kernel of their own go through the host: what they read is brought over, the CPU code
//! runs, and what it made is sent back. Right but slow, so it is counted by name.

use crate::{Device, Error, Result, Tensor};
use smallvec::SmallVec;
use std::{
    cell::Cell,
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

thread_local!(static ON_HOST: Cell<bool> = const { Cell::new(false) });

/// Does the kernel run, and not the CPU code?
pub(crate) fn on_gpu(t: &Tensor) -> bool {
    matches!(t.device(), Device::Cuda(_)) && !ON_HOST.get()
}

/// Is this thread within an operation that goes through the host? Then all code is CPU code.
pub(crate) fn is_on_host() -> bool {
    ON_HOST.get()
}

/// While it lives, operations on this thread run CPU code.
pub(crate) struct Way {
    device: Device,
}

impl Drop for Way {
    fn drop(&mut self) {
        ON_HOST.set(false);
    }
}

/// Takes the way through the host if the tensor is on a GPU and the way was not taken yet.
///
/// # Errors
/// If a graph is being recorded: the values are not there.
#[track_caller]
pub(crate) fn enter_host(op: &'static str, t: &Tensor) -> Result<Option<Way>> {
    let Device::Cuda(index) = t.device() else { return Ok(None) };
    if ON_HOST.get() {
        return Ok(None);
    }
    super::graph::refuse_in_capture(index, "going through the host")
        .map_err(|error| Error::op(op, format!("has no kernel for this case; {error}")))?;
    *counts().entry(op).or_default() += 1;
    ON_HOST.set(true);
    Ok(Some(Way { device: t.device() }))
}

/// Sends what CPU code made to the GPU, if the way was through the host.
pub(crate) fn leave_host<R: Upload>(way: Option<Way>, result: Result<R>) -> Result<R> {
    match way {
        None => result,
        Some(way) => {
            let device = way.device;
            drop(way);
            result?.upload(device)
        }
    }
}

fn counts() -> MutexGuard<'static, BTreeMap<&'static str, u64>> {
    static COUNTS: Mutex<BTreeMap<&'static str, u64>> = Mutex::new(BTreeMap::new());
    COUNTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Operations that went through the host, and how often.
pub fn host_operations() -> BTreeMap<&'static str, u64> {
    counts().clone()
}

/// Starts that count anew.
pub fn reset_host_operations() {
    counts().clear();
}

/// What CPU code returns, on the way back to a GPU.
pub(crate) trait Upload: Sized {
    fn upload(self, device: Device) -> Result<Self>;
}

impl Upload for Tensor {
    fn upload(self, device: Device) -> Result<Tensor> {
        self.transferred(device)
    }
}

macro_rules! nothing_to_send {
    ($($t:ty)+) => {$(
        impl Upload for $t {
            fn upload(self, _: Device) -> Result<Self> {
                Ok(self)
            }
        }
    )+};
}
nothing_to_send!(() bool usize i64 u64 f64 f32);

/// `upload_fields!(Output { y, mean })`: structs of tensors travel field by field.
macro_rules! upload_fields {
    ($name:ident { $($field:ident),+ }) => {
        impl $crate::gpu::Upload for $name {
            fn upload(self, device: $crate::Device) -> $crate::Result<Self> {
                Ok($name { $($field: $crate::gpu::Upload::upload(self.$field, device)?),+ })
            }
        }
    };
}
pub(crate) use upload_fields;

impl<T: Upload> Upload for Option<T> {
    fn upload(self, device: Device) -> Result<Self> {
        self.map(|t| t.upload(device)).transpose()
    }
}
impl<T: Upload> Upload for Vec<T> {
    fn upload(self, device: Device) -> Result<Self> {
        self.into_iter().map(|t| t.upload(device)).collect()
    }
}
impl<T: Upload, const N: usize> Upload for SmallVec<[T; N]> {
    fn upload(self, device: Device) -> Result<Self> {
        self.into_iter().map(|t| t.upload(device)).collect()
    }
}
impl<T: Upload, const N: usize> Upload for [T; N] {
    fn upload(self, device: Device) -> Result<Self> {
        let all: Vec<T> = self.into_iter().map(|t| t.upload(device)).collect::<Result<_>>()?;
        all.try_into().map_err(|_| Error::msg("internal: elements were lost on the way to the GPU"))
    }
}
impl<A: Upload, B: Upload> Upload for (A, B) {
    fn upload(self, device: Device) -> Result<Self> {
        Ok((self.0.upload(device)?, self.1.upload(device)?))
    }
}
impl<A: Upload, B: Upload, C: Upload> Upload for (A, B, C) {
    fn upload(self, device: Device) -> Result<Self> {
        Ok((self.0.upload(device)?, self.1.upload(device)?, self.2.upload(device)?))
    }
}
impl<A: Upload, B: Upload, C: Upload, D: Upload> Upload for (A, B, C, D) {
    fn upload(self, device: Device) -> Result<Self> {
        Ok((self.0.upload(device)?, self.1.upload(device)?, self.2.upload(device)?, self.3.upload(device)?))
    }
}
