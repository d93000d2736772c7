//! Launching the kernels of cuda/reduce.cu and cuda/reduce_cumulative.cu.

use crate::{
    DType, Result, Tensor,
    cpu::elementwise::{dense_strides, memory_order},
    gpu::{self, sys},
    shape::Dims,
};
/// `x` folded over `dims`, which stay with size 1, in the memory order of `x`; `kind` is one of `sys::SMALTI_SUM` and
/// its kin. `extra` is the dtype of a second result: the positions of extremes, or the means of variances.
#[track_caller]
pub fn fold(
    op: &'static str,
    kind: u32,
    x: &Tensor,
    dims: &[usize],
    parameter: f64,
    extra: Option<DType>,
) -> Result<(Tensor, Option<Tensor>)> {
    let spread = kind == sys::SMALTI_VAR || kind == sys::SMALTI_STD;
    let dtype = if spread { x.dtype().computed_in() } else { x.dtype() };
    let shape: Dims = (0..x.rank()).map(|d| if dims.contains(&d) { 1 } else { x.shape()[d] }).collect();
    let strides = dense_strides(&shape, &memory_order(x.shape(), x.strides()));
    let y = gpu::empty_strided(x, &shape, strides.clone(), dtype, op)?;
    let extra = extra.map(|dtype| gpu::empty_strided(x, &shape, strides, dtype, op)).transpose()?;
    let mut bytes = -1;
    gpu::launch(op, [x, &y], |[x, y], _| {
        bytes = unsafe { sys::smalti_reduce_workspace(kind as i32, &x, &y) };
        0
    })?;
    let space = gpu::workspace(op, x, bytes)?;
    gpu::launch_some(
        op,
        [Some(x), Some(&y), extra.as_ref(), Some(&space)],
        |[x, y, extra, space], stream| unsafe {
            sys::smalti_reduce(kind as i32, x, y, extra, parameter, (*space).ptr, stream)
        },
    )?;
    Ok((y, extra))
}

/// [`fold`] with one result.
#[track_caller]
pub fn fold_one(op: &'static str, kind: u32, x: &Tensor, dims: &[usize], parameter: f64) -> Result<Tensor> {
    Ok(fold(op, kind, x, dims, parameter, None)?.0)
}

/// Sum of all elements, a scalar.
#[track_caller]
pub fn total(op: &'static str, x: &Tensor) -> Result<Tensor> {
    let dims: Dims = (0..x.rank()).collect();
    fold_one(op, sys::SMALTI_SUM, x, &dims, 1.0)?.reshape(())
}

/// Running sums of a contiguous tensor.
#[track_caller]
pub fn running(op: &'static str, x: &Tensor, dim: usize, back: bool) -> Result<Tensor> {
    let y = gpu::empty(x, x.shape(), x.dtype(), op)?;
    gpu::launch(op, [x, &y], |[x, y], stream| unsafe {
        sys::smalti_cumsum(&x, &y, dim as i32, i32::from(back), stream)
    })?;
    Ok(y)
}
