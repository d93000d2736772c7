//! Launching the kernels of batch norm.

use super::{super::images::Images, *};
use crate::{
    gpu::{self, sys},
    ops::reduce::gpu::fold,
    shape::Dims,
};

/// Mean and biased variance of each channel.
#[track_caller]
pub fn statistics(x: &Tensor) -> Result<(Tensor, Tensor)> {
    let dims: Dims = (0..x.rank()).filter(|&d| d != 1).collect();
    let (n, channels) = (dims.iter().map(|&d| x.shape()[d]).product::<usize>(), x.shape()[1]);
    let dtype = Some(x.dtype().computed_in());
    let (var, mean) = fold(OP, sys::SMALTI_VAR, &x.detach(), &dims, n as f64, dtype)?;
    let mean = mean.ok_or_else(|| crate::Error::msg("internal: the mean is missing"))?;
    Ok((mean.reshape([channels])?, var.reshape([channels])?))
}

/// The same as [`super::advance`] in one kernel.
#[track_caller]
pub fn advance(
    mean: &Tensor,
    var: &Tensor,
    old: Option<&Running<Tensor>>,
    eps: f64,
    momentum: f64,
    unbiased: f64,
) -> Result<(Tensor, Option<Running<Tensor>>)> {
    let like = || gpu::empty(var, var.shape(), var.dtype(), OP);
    let rstd = like()?;
    let moved = if old.is_some() { Some((like()?, like()?)) } else { None };
    let pair =
        |t: Option<&Running<Tensor>>| t.map_or((None, None), |(m, v)| (Some(m.clone()), Some(v.clone())));
    let ((old_mean, old_var), (new_mean, new_var)) = (pair(old), pair(moved.as_ref()));
    gpu::launch_some(
        OP,
        [
            Some(mean),
            Some(var),
            Some(&rstd),
            old_mean.as_ref(),
            old_var.as_ref(),
            new_mean.as_ref(),
            new_var.as_ref(),
        ],
        |[m, v, r, om, ov, nm, nv], stream| unsafe {
            sys::smalti_batch_norm_statistics(m, v, r, om, ov, nm, nv, eps, momentum, unbiased, stream)
        },
    )?;
    Ok((rstd, moved))
}

#[track_caller]
pub fn forward(rule: &BatchNorm, bias: Option<&Tensor>) -> Result<Tensor> {
    let images = Images::of(&rule.x, false)?;
    images.forward(OP, &rule.x, [&rule.mean, &rule.rstd], rule.weight.as_ref(), bias, 0)
}

#[track_caller]
pub fn backward(rule: &BatchNorm, grad: &Tensor, input: bool) -> Result<(Option<Tensor>, Tensor, Tensor)> {
    let images = Images::of(&rule.x, false)?;
    let (x, dy) = (images.flat(&rule.x)?, images.flat(grad)?);
    let dx = input.then(|| images.empty(OP, grad)).transpose()?;
    let flat_dx = dx.as_ref().map(|dx| images.flat(dx)).transpose()?;
    let vector = || gpu::empty(grad, rule.rstd.shape(), rule.rstd.dtype(), OP);
    let (dw, db) = (vector()?, vector()?);
    let mut bytes = -1;
    gpu::launch(OP, [&x], |[x], _| {
        bytes = unsafe { sys::smalti_batch_norm_backward_workspace(&x) };
        0
    })?;
    let space = gpu::workspace(OP, grad, bytes)?;
    gpu::launch_some(
        OP,
        [
            Some(&x),
            Some(&dy),
            Some(&rule.mean),
            Some(&rule.rstd),
            rule.weight.as_ref(),
            flat_dx.as_ref(),
            Some(&dw),
            Some(&db),
            Some(&space),
        ],
        |[x, dy, mean, rstd, w, dx, dw, db, space], stream| unsafe {
            let (batch, space) = (i32::from(rule.batch), (*space).ptr);
            sys::smalti_batch_norm_backward(x, dy, mean, rstd, w, dx, dw, db, batch, space, stream)
        },
    )?;
    Ok((dx, dw, db))
}
