//! Convolutions by the crate's CPU code, on the same memory. Half types are widened, accumulated in f32 and
//! rounded once.

use super::graph;
use crate::{
    DType, Error, Result, Tensor,
    cpu::pool::Buffer,
    gpu::driver::{Convolution, Image},
    ops::conv::{Kind, on_cpu},
    shape::{Dims, Strides},
    storage::Storage,
};

/// Runs the operation. The answer is always `true`: nothing is left undone.
///
/// # Safety
/// The images lie in memory of device `index`, and what is written overlaps nothing else.
pub(crate) unsafe fn convolution(index: usize, c: &Convolution) -> Result<bool> {
    let c = *c;
    graph::work(index, move || unsafe { run(&c) })?;
    Ok(true)
}

unsafe fn run(c: &Convolution) -> Result<()> {
    let see = |image: &Image| unsafe { borrowed(image, c.dtype) };
    let (a, b, out) = match c.kind {
        Kind::Down => (see(&c.x), see(&c.w), &c.y),
        Kind::Up => (see(&c.y), see(&c.w), &c.x),
        Kind::Weight => (see(&c.x), see(&c.y), &c.w),
    };
    let y = on_cpu(c.op, c.kind, c.geometry, &a, &b, None)?;
    unsafe { write(c.op, &y, out) }
}

/// A CPU tensor over memory that others own. It must not outlive that, nor be written.
unsafe fn borrowed(image: &Image, dtype: DType) -> Tensor {
    let (shape, strides) = (Dims::from_slice(&image.shape), Strides::from_slice(&image.strides));
    let reach: isize = shape.iter().zip(&strides).map(|(&n, &s)| (n as isize - 1) * s).sum();
    let storage = Storage::Cpu(unsafe { Buffer::borrowed(image.ptr, (reach + 1) as usize * dtype.size()) });
    Tensor::from_storage(storage, shape, strides, dtype, "convolution")
}

/// Copies a result to its place.
unsafe fn write(op: &'static str, y: &Tensor, to: &Image) -> Result<()> {
    if y.shape() != to.shape {
        return Err(Error::op(
            op,
            format!("internal: the result is {:?}, its place {:?}", y.shape(), to.shape),
        ));
    }
    // in the order of its place, rows outermost first
    let mut order = [0, 1, 2, 3];
    order.sort_by_key(|&d| std::cmp::Reverse((to.strides[d], to.shape[d])));
    let dense = y.permute(&order[..])?.contiguous()?;
    let bytes = dense.numel() * dense.dtype().size();
    let from = unsafe { dense.storage().host().ptr().add(dense.offset() * dense.dtype().size()) };
    unsafe { std::ptr::copy_nonoverlapping(from, to.ptr, bytes) };
    Ok(())
}
