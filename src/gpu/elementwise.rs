//! Elementwise kernels and copies, as many operations need them. The result takes the memory order of the first
//! operand of full size, as on the CPU.

use super::{empty_on, empty_strided, launch, sys};
use crate::{
    DType, Device, Error, Result, Tensor,
    cpu::elementwise::{dense_strides, result_order},
    shape::{broadcast, contiguous_strides},
};

/// One of the functions of `kernels.h` with its two constants.
pub(crate) type Code = (sys::smalti_unary, [f64; 2]);

fn result(op: &'static str, shape: &[usize], operands: &[&Tensor], dtype: DType) -> Result<Tensor> {
    let strides = dense_strides(shape, &result_order(shape, operands));
    empty_strided(operands[0], shape, strides, dtype, op)
}

/// One number may come from the CPU: it is brought over.
fn meet(t: &Tensor, device: Device) -> Result<Tensor> {
    if t.numel() == 1 && t.device() != device { t.transferred(device) } else { Ok(t.detach()) }
}

/// Operands of one broadcast shape on one device.
#[track_caller]
fn together<const N: usize>(op: &'static str, operands: [&Tensor; N]) -> Result<[Tensor; N]> {
    let mut shape = crate::shape::Dims::from_slice(operands[0].shape());
    for t in &operands[1..] {
        shape = broadcast(op, &shape, t.shape())?;
    }
    // the device of an operand that is more than a number decides
    let lead = operands.iter().find(|t| t.numel() != 1).unwrap_or(&operands[0]);
    let all: Vec<Tensor> =
        operands.iter().map(|t| meet(t, lead.device())?.expand(&shape)).collect::<Result<_>>()?;
    all.try_into().map_err(|_| Error::op(op, "internal: an operand was lost"))
}

/// f(x) of each element.
#[track_caller]
pub(crate) fn map(op: &'static str, (function, [p, q]): Code, x: &Tensor) -> Result<Tensor> {
    let y = result(op, x.shape(), &[x], x.dtype())?;
    launch(op, [x, &y], |[x, y], stream| unsafe {
        sys::smalti_unary_forward(function as i32, p, q, &x, &y, stream)
    })?;
    Ok(y)
}

/// The gradient of [`map`]'s input from that of its output and what was saved.
#[track_caller]
pub(crate) fn map_backward(
    op: &'static str,
    (function, [p, q]): Code,
    grad: &Tensor,
    saved: &Tensor,
) -> Result<Tensor> {
    let [grad, saved] = together(op, [grad, saved])?;
    let dx = result(op, grad.shape(), &[&grad, &saved], grad.dtype())?;
    launch(op, [&grad, &saved, &dx], |[g, s, dx], stream| unsafe {
        sys::smalti_unary_backward(function as i32, p, q, &g, &s, &dx, stream)
    })?;
    Ok(dx)
}

/// f(a, b) of each pair, broadcast; both of one dtype.
#[track_caller]
pub(crate) fn map2(
    op: &'static str,
    function: sys::smalti_binary_function,
    a: &Tensor,
    b: &Tensor,
    dtype: DType,
) -> Result<Tensor> {
    let [a, b] = together(op, [a, b])?;
    let y = result(op, a.shape(), &[&a, &b], dtype)?;
    launch(op, [&a, &b, &y], |[a, b, y], stream| unsafe {
        sys::smalti_binary(function as i32, &a, &b, &y, stream)
    })?;
    Ok(y)
}

/// `a += b` where `a` may be written; false, with nothing done, where it may not.
#[track_caller]
pub(crate) fn add_in_place(op: &'static str, a: &mut Tensor, b: &Tensor) -> Result<bool> {
    if !a.gpu_writable() {
        return Ok(false);
    }
    let function = sys::SMALTI_ADD as i32;
    launch(op, [&*a, b], |[a, b], stream| unsafe { sys::smalti_binary(function, &a, &b, &a, stream) })?;
    Ok(true)
}

/// condition ? a : b, broadcast.
#[track_caller]
pub(crate) fn select(op: &'static str, condition: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let [condition, a, b] = together(op, [condition, a, b])?;
    let y = result(op, a.shape(), &[&a, &b, &condition], a.dtype())?;
    launch(op, [&condition, &a, &b, &y], |[c, a, b, y], stream| unsafe {
        sys::smalti_where(&c, &a, &b, &y, stream)
    })?;
    Ok(y)
}

/// Writes the elements of `x` where those of the view `to` lie, converted to its dtype.
#[track_caller]
pub(crate) fn copy(op: &'static str, x: &Tensor, to: &Tensor) -> Result<()> {
    launch(op, [x, to], |[x, y], stream| unsafe { sys::smalti_copy(&x, &y, stream) })
}

/// The same values as another dtype.
#[track_caller]
pub(crate) fn cast(op: &'static str, x: &Tensor, dtype: DType) -> Result<Tensor> {
    let y = result(op, x.shape(), &[x], dtype)?;
    copy(op, x, &y)?;
    Ok(y)
}

/// The same values in row-major order.
#[track_caller]
pub(crate) fn contiguous(op: &'static str, x: &Tensor) -> Result<Tensor> {
    let y = empty_strided(x, x.shape(), contiguous_strides(x.shape()), x.dtype(), op)?;
    copy(op, x, &y)?;
    Ok(y)
}

/// `value` throughout.
#[track_caller]
pub(crate) fn full(
    op: &'static str,
    index: usize,
    shape: &[usize],
    value: f64,
    dtype: DType,
) -> Result<Tensor> {
    let y = empty_on(index, shape, dtype, op)?;
    launch(op, [&y], |[y], stream| unsafe { sys::smalti_fill(value, &y, stream) })?;
    Ok(y)
}
