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

/// A tensor of unspecified content on GPU `index`, row-major.
pub(crate) fn empty_on(index: usize, shape: &[usize], dtype: DType, op: &'static str) -> Result<Tensor> {
    driver::open(index)?;
    let buffer = Buffer::new(index, count(shape) * dtype.size())?;
    let strides = contiguous_strides(shape);
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
    launch_some(op, tensors.map(Some), |views, stream| f(views.map(|v| unsafe { *v }), stream))
}

/// The same with tensors that may be missing, whose views are null. The first is there.
#[track_caller]
pub(crate) fn launch_some<const N: usize>(
    op: &'static str,
    tensors: [Option<&Tensor>; N],
    f: impl FnOnce([*const sys::smalti_view; N], *mut c_void) -> i32,
) -> Result<()> {
    let device = tensors[0].map_or(Device::Cpu, Tensor::device);
    let Device::Cuda(index) = device else {
        return Err(Error::op(op, format!("a tensor is on {device}, its kernel is on a GPU")));
    };
    let mut views = [const { None }; N];
    for (view_of, t) in views.iter_mut().zip(tensors) {
        if let Some(t) = t {
            graph::touch(t);
            *view_of = Some(view(op, t, device)?);
        }
    }
    let views = std::array::from_fn(|i| views[i].as_ref().map_or(std::ptr::null(), std::ptr::from_ref));
    let tensors = || {
        let each = tensors.iter().flatten().map(|t| format!("{} {:?}", t.dtype(), t.shape()));
        each.collect::<Vec<_>>().join(", ")
    };
    launch_on(op, index, tensors, |stream| f(views, stream))
}

/// Calls a launcher with the stream of GPU `index`. `tensors` says in an error's text what it was handed.
#[track_caller]
pub(crate) fn launch_on(
    op: &'static str,
    index: usize,
    tensors: impl FnOnce() -> String,
    f: impl FnOnce(*mut c_void) -> i32,
) -> Result<()> {
    graph::enter(index)?;
    match f(driver::stream(index)?) {
        0 => Ok(()),
        code => {
            let text = unsafe { CStr::from_ptr(sys::smalti_status(code)) }.to_string_lossy();
            Err(Error::op(op, format!("kernel: {text} ({})", tensors())))
        }
    }
}

/// Memory of `bytes` for a kernel on the GPU of `like`, as its launcher asked for (-1: it refuses what it is handed).
/// It may be dropped while the kernel still runs: the stream keeps the order.
#[track_caller]
pub(crate) fn workspace(op: &'static str, like: &Tensor, bytes: i64) -> Result<Tensor> {
    match usize::try_from(bytes) {
        Ok(bytes) => empty(like, &[bytes], DType::U8, op),
        Err(_) => Err(Error::op(op, format!("no kernel for {} {:?}", like.dtype(), like.shape()))),
    }
}

/// The value's bits, in the lower ones of 64.
pub(crate) fn bits_of<T: crate::dtype::Element>(value: T) -> u64 {
    let mut bits = 0u64;
    let to = std::ptr::from_mut(&mut bits).cast::<u8>();
    unsafe { std::ptr::copy_nonoverlapping(std::ptr::from_ref(&value).cast::<u8>(), to, size_of::<T>()) };
    bits
}
