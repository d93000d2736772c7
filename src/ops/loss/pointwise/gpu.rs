//! Launching the kernels of losses of single elements.

use super::*;
use crate::{
    cpu::axis::Axis,
    gpu::{self, sys},
};

#[track_caller]
pub fn forward<L: Loss>(loss: L, x: &Tensor, t: &Tensor, reduction: Reduction) -> Result<Tensor> {
    ensure!(x.dtype().is_float(), L::NAME, "needs float tensors, got {}", x.dtype());
    let axis = Axis::of(x, 0);
    let (kind, parameter) = loss.kernel();
    let y = match reduction {
        Reduction::None => gpu::empty_strided(x, x.shape(), axis.strides(), x.dtype(), L::NAME)?,
        _ => gpu::empty(x, &[], x.dtype(), L::NAME)?,
    };
    let (flat, divisor) = match reduction {
        Reduction::None => (axis.view(&y)?, 1.0),
        Reduction::Sum => (y.clone(), 1.0),
        Reduction::Mean => (y.clone(), x.numel() as f64),
    };
    let (x, t) = (axis.view(x)?, axis.view(t)?);
    let mut bytes = -1;
    gpu::launch(L::NAME, [&x], |[x], _| {
        bytes = unsafe { sys::smalti_loss_workspace(&x) };
        0
    })?;
    let space = gpu::workspace(L::NAME, &x, bytes)?;
    gpu::launch(L::NAME, [&x, &t, &flat, &space], |[x, t, y, space], stream| unsafe {
        sys::smalti_loss_forward(kind as i32, &x, &t, &y, parameter, divisor, space.ptr, stream)
    })?;
    Ok(y)
}

#[track_caller]
pub fn backward<L: Loss>(
    saved: &Pointwise<L>,
    grad: &Tensor,
    needs: [bool; 2],
) -> Result<[Option<Tensor>; 2]> {
    let axis = Axis::of(&saved.x, 0);
    let (kind, parameter) = saved.loss.kernel();
    let (x, t) = (axis.view(&saved.x)?, axis.view(&saved.t)?);
    let (grad, divisor) = match saved.reduction {
        Reduction::None => (axis.view(grad)?, 1.0),
        Reduction::Sum => (grad.contiguous()?, 1.0),
        Reduction::Mean => (grad.contiguous()?, x.numel() as f64),
    };
    let shape = saved.x.shape();
    let made = |needed: bool| {
        needed.then(|| gpu::empty_strided(&x, shape, axis.strides(), x.dtype(), L::NAME)).transpose()
    };
    let slopes = [made(needs[0])?, made(needs[1])?];
    let [dx, dt] = slopes.each_ref().map(|d| d.as_ref().map(|d| axis.view(d)).transpose());
    let (dx, dt) = (dx?, dt?);
    gpu::launch_some(
        L::NAME,
        [Some(&x), Some(&t), Some(&grad), dx.as_ref(), dt.as_ref()],
        |[x, t, g, dx, dt], stream| unsafe {
            sys::smalti_loss_backward(kind as i32, x, t, g, dx, dt, parameter, divisor, stream)
        },
    )?;
    Ok(slopes)
}
