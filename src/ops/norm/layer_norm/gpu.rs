//! Launching the kernels of layer norm and its kin.

use super::*;
use crate::{
    gpu::{self, sys},
    shape::count,
};

/// [rows, elements of a row]
fn matrix(x: &Tensor, normalized: &[usize]) -> [usize; 2] {
    let n = count(normalized);
    [x.numel().checked_div(n).unwrap_or(0), n]
}

#[track_caller]
pub fn forward<const CENTERED: bool>(
    op: &'static str,
    x: &Tensor,
    residual: Option<&Tensor>,
    affine: &Affine,
    eps: f64,
) -> Result<Output> {
    crate::ensure!(x.dtype().is_float(), op, "needs a float tensor, got {}", x.dtype());
    let shape = matrix(x, &affine.normalized);
    let flat = |t: &Tensor| t.detach().reshape(shape);
    let like = || gpu::empty(x, &shape, x.dtype(), op);
    let row_numbers = || gpu::empty(x, &shape[..1], x.dtype().computed_in(), op);
    let vector = |t: &Option<Tensor>| t.as_ref().map(|t| t.detach().reshape([shape[1]])).transpose();
    let (weight, bias) = (vector(&affine.weight)?, vector(&affine.bias)?);
    let (residual, sum) = (residual.map(flat).transpose()?, residual.map(|_| like()).transpose()?);
    let (y, rstd) = (like()?, row_numbers()?);
    let mean = if CENTERED { Some(row_numbers()?) } else { None };
    gpu::launch_some(
        op,
        [
            Some(&flat(x)?),
            residual.as_ref(),
            weight.as_ref(),
            bias.as_ref(),
            Some(&y),
            sum.as_ref(),
            mean.as_ref(),
            Some(&rstd),
        ],
        |[x, r, w, b, y, sum, mean, rstd], stream| unsafe {
            sys::smalti_layer_norm_forward(x, r, w, b, y, sum, mean, rstd, eps, stream)
        },
    )?;
    Ok(Output {
        sum: sum.map(|s| s.reshape(x.shape())).transpose()?,
        y: y.reshape(x.shape())?,
        // Without a mean nothing reads it.
        mean: mean.unwrap_or_else(|| rstd.clone()),
        rstd,
    })
}

/// dx, dweight, dbias.
#[track_caller]
pub fn backward<const CENTERED: bool>(
    saved: &LayerNorm<CENTERED>,
    grad: &Tensor,
    pending: Option<&Tensor>,
    input: bool,
    affine: bool,
) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
    let op = LayerNorm::<CENTERED>::NAME;
    let shape = matrix(grad, &saved.normalized);
    let flat = |t: &Tensor| t.detach().reshape(shape);
    let (x, dy, pending) = (flat(&saved.x)?, flat(grad)?, pending.map(flat).transpose()?);
    let weight = saved.weight.as_ref().map(|w| w.reshape([shape[1]])).transpose()?;
    let made =
        |there: bool, shape: &[usize], dtype| there.then(|| gpu::empty(grad, shape, dtype, op)).transpose();
    let dx = made(input, &shape, grad.dtype())?;
    let dw = made(affine, &shape[1..], saved.rstd.dtype())?;
    let db = made(affine, &shape[1..], saved.rstd.dtype())?;
    let mut bytes = -1;
    gpu::launch(op, [&x], |[x], _| {
        bytes = unsafe { sys::smalti_layer_norm_backward_workspace(&x, i32::from(affine)) };
        0
    })?;
    let space = gpu::workspace(op, grad, bytes)?;
    gpu::launch_some(
        op,
        [
            Some(&x),
            Some(&dy),
            weight.as_ref(),
            CENTERED.then_some(&saved.mean),
            Some(&saved.rstd),
            pending.as_ref(),
            dx.as_ref(),
            dw.as_ref(),
            db.as_ref(),
            Some(&space),
        ],
        |[x, dy, w, mean, rstd, pending, dx, dw, db, space], stream| unsafe {
            sys::smalti_layer_norm_backward(x, dy, w, mean, rstd, pending, dx, dw, db, (*space).ptr, stream)
        },
    )?;
    Ok((dx.map(|dx| dx.reshape(grad.shape())).transpose()?, dw, db))
}
