//! Lists of tensors for kernels that take many of them in a launch, and numbers that such kernels read from the device.

use super::{elementwise, graph, launch, refill, sys};
use crate::{DType, Device, Result, Tensor, bail, ensure};
use std::ffi::c_void;

/// Contiguous tensors on one GPU. They must live, and be locked by whoever shares them, until the launch.
pub(crate) struct Many {
    op: &'static str,
    device: Device,
    tensors: Vec<sys::smalti_moving>,
}

impl Many {
    pub fn new(op: &'static str, device: Device) -> Many {
        Many { op, device, tensors: Vec::new() }
    }

    /// Adds a tensor that is changed, with its gradient (or what is averaged into it), its state and its f32 copy.
    pub fn push(
        &mut self,
        p: &Tensor,
        g: Option<&Tensor>,
        state: &[Tensor],
        master: Option<&Tensor>,
        row: usize,
    ) -> Result<()> {
        let mut address = |t: &Tensor| -> Result<*mut c_void> {
            graph::touch(t);
            let fits = t.device() == self.device && t.is_contiguous() && t.numel() == p.numel();
            ensure!(
                fits,
                self.op,
                "internal: {:?} on {} beside {:?} on {}",
                t.shape(),
                t.device(),
                p.shape(),
                self.device
            );
            Ok(t.gpu_ptr().cast())
        };
        let null = std::ptr::null_mut();
        let mut states = [null; 3];
        for (to, t) in states.iter_mut().zip(state) {
            *to = address(t)?;
        }
        self.tensors.push(sys::smalti_moving {
            p: address(p)?,
            g: g.map_or(Ok(null), &mut address)?,
            master: master.map_or(Ok(null), &mut address)?,
            state: states,
            n: p.numel() as i64,
            dtype: p.dtype() as i32,
            source: g.unwrap_or(p).dtype() as i32,
            row: row as i64,
        });
        Ok(())
    }

    /// Memory as a launcher asks for it, on the GPU of `like`.
    pub fn workspace(
        &self,
        like: &Tensor,
        bytes: impl FnOnce(*const sys::smalti_moving, i64) -> i64,
    ) -> Result<Tensor> {
        launch::workspace(self.op, like, bytes(self.tensors.as_ptr(), self.tensors.len() as i64))
    }

    /// Hands the list to a launcher.
    pub fn launch(&self, f: impl FnOnce(*const sys::smalti_moving, i64, *mut c_void) -> i32) -> Result<()> {
        let Device::Cuda(index) = self.device else {
            bail!(self.op, "internal: {} is no GPU", self.device);
        };
        let (tensors, n) = (self.tensors.as_ptr(), self.tensors.len());
        launch::launch_on(self.op, index, || format!("{n} tensors"), |stream| f(tensors, n as i64, stream))
    }
}

/// Makes `t` a tensor that kernels may write over: a view, or one that somebody else sees, becomes a copy of its own.
#[track_caller]
pub(crate) fn writable(op: &'static str, t: &mut Tensor) -> Result<()> {
    if !t.gpu_writable() {
        *t = elementwise::contiguous(op, t)?;
    }
    Ok(())
}

/// The same for what outlives a step. A recorded step writes to the same address at every launch, so it cannot begin
/// with a copy: each launch would start from the old values.
#[track_caller]
pub(crate) fn writable_for_good(op: &'static str, t: &mut Tensor) -> Result<()> {
    ensure!(
        !graph::is_recording() || t.gpu_writable(),
        op,
        "a tensor of shape {:?} that the step updates is also seen by somebody else (a clone, a view or a graph), so \
         the step cannot be recorded",
        t.shape()
    );
    writable(op, t)
}

/// The one of these tensors that is on `device`.
pub(crate) fn numbers_on(all: &[Tensor], device: Device) -> Option<&Tensor> {
    all.iter().find(|t| t.device() == device)
}

/// Writes `values` over the one of these tensors that is on `device`; where there is none, makes it.
pub(crate) fn write_numbers(all: &mut Vec<Tensor>, device: Device, values: &Tensor) -> Result<()> {
    debug_assert_eq!(values.dtype(), DType::F64);
    match all.iter_mut().find(|t| t.device() == device) {
        Some(t) => refill(t, values),
        None => {
            all.push(values.transferred(device)?);
            Ok(())
        }
    }
}
