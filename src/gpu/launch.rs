//! From tensors to kernel arguments.

use super::{driver, graph, memory::Buffer, sys};
use crate::{
    DType, Device, Error, Result, Tensor,
    shape::{Dims, Strides, contiguous_strides, count},
    storage::Storage,
};
use std::ffi::{CStr, c_void};

/// A tensor of unspecified content on the GPU of `like`, row-major.
#[track_caller]
pub(crate) fn empty(like: &Tensor, shape: &[usize], dtype: DType, op: &'static str) -> Result<Tensor> {
    empty_strided(like, shape, contiguous_strides(shape), dtype, op)
}

/// The same with dense strides of another order.
#[track_caller]
pub(crate) fn empty_strided(
    like: &Tensor,
    shape: &[usize],
    strides: Strides,
    dtype: DType,
    op: &'static str,
) -> Result<Tensor> {
    let Device::Cuda(index) = like.device() else {
        return Err(Error::op(op, format!("internal: {} is no GPU", like.device())));
    };
    let buffer = Buffer::new(index, count(shape) * dtype.size())?;
    Ok(Tensor::from_storage(Storage::Cuda(buffer), Dims::from_slice(shape), strides, dtype, op))
}

fn view(op: &'static str, t: &Tensor, device: Device) -> Result<sys::smalti_view> {
    if t.device() != device {
        return Err(Error::op(op, format!("the tensors are on {device} and on {}", t.device())));
    }
    if t.rank() > sys::SMALTI_MAX_RANK as usize {
        return Err(Error::op(op, format!("at most 8 dimensions on a GPU, got {:?}", t.shape())));
    }
    let mut view = sys::smalti_view {
        ptr: t.gpu_ptr().cast(),
        dtype: t.dtype() as i32,
        rank: t.rank() as i32,
        shape: [1; 8],
        stride: [0; 8],
    };
    for (i, (&n, &step)) in t.shape().iter().zip(t.strides()).enumerate() {
        (view.shape[i], view.stride[i]) = (n as i64, step as i64);
    }
    Ok(view)
}

/// Hands the tensors to a launcher as views, with the stream of their device.
///
/// # Errors
/// If they are not all on one GPU, or the launcher refuses.
#[track_caller]
pub(crate) fn launch<const N: usize>(
    op: &'static str,
    tensors: [&Tensor; N],
    f: impl FnOnce([sys::smalti_view; N], *mut c_void) -> i32,
) -> Result<()> {
    let device = tensors[0].device();
    let Device::Cuda(index) = device else {
        return Err(Error::op(op, format!("a tensor is on {device}, its kernel is on a GPU")));
    };
    let mut views = Vec::with_capacity(N);
    for t in tensors {
        graph::touch(t);
        views.push(view(op, t, device)?);
    }
    graph::enter(index)?;
    let stream = driver::stream(index)?;
    match f(std::array::from_fn(|i| views[i]), stream) {
        0 => Ok(()),
        code => {
            let text = unsafe { CStr::from_ptr(sys::smalti_status(code)) }.to_string_lossy().into_owned();
            let shapes: Vec<String> =
                tensors.iter().map(|t| format!("{} {:?}", t.dtype(), t.shape())).collect();
            Err(Error::op(op, format!("kernel: {text} ({})", shapes.join(", "))))
        }
    }
}
