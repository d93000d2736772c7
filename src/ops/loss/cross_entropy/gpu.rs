//! Launching the kernels of cross-entropy.

use super::*;
use crate::{
    gpu::{self, sys},
    ops::reduce::gpu::total,
};

#[track_caller]
pub fn forward(saved: &Saved) -> Result<(Tensor, State)> {
    let x = saved.x.reshape([saved.layout.rows, saved.layout.classes])?;
    let target = target(saved)?;
    let column = || gpu::empty(&x, &[saved.layout.rows], x.dtype(), OP);
    let (max, log_sum, losses, shares) = (column()?, column()?, column()?, column()?);
    gpu::launch_some(
        OP,
        [
            Some(&x),
            Some(&target),
            saved.weight.as_ref(),
            Some(&max),
            Some(&log_sum),
            Some(&losses),
            Some(&shares),
        ],
        |[x, t, w, max, log_sum, losses, shares], stream| unsafe {
            let (ignore, smoothing) = (saved.ignore_index, saved.smoothing);
            sys::smalti_cross_entropy_forward(
                x, t, w, max, log_sum, losses, shares, ignore, smoothing, stream,
            )
        },
    )?;
    let divisor = total(OP, &shares)?;
    let y = match saved.reduction {
        Reduction::None => losses.reshape(saved.layout.row_shape())?,
        Reduction::Sum => total(OP, &losses)?,
        Reduction::Mean => total(OP, &losses)?.div(&divisor)?,
    };
    Ok((y, State { max, log_sum, divisor }))
}

/// Labels or probabilities, flat.
fn target(saved: &Saved) -> Result<Tensor> {
    match saved.rows.dtype().is_float() {
        true => saved.rows.reshape([saved.layout.rows, saved.layout.classes]),
        false => saved.rows.reshape([saved.layout.rows]),
    }
}

#[track_caller]
pub fn backward(rule: &Rule, grad: &Tensor, needs: [bool; 2]) -> Result<[Option<Tensor>; 2]> {
    let (saved, state) = (&rule.saved, &rule.state);
    let shape = [saved.layout.rows, saved.layout.classes];
    let (x, target) = (saved.x.reshape(shape)?, target(saved)?);
    let grad = match saved.reduction {
        Reduction::None => grad.reshape([saved.layout.rows])?,
        _ => grad.reshape(())?,
    };
    let made = |needed: bool| needed.then(|| gpu::empty(&x, &shape, x.dtype(), OP)).transpose();
    let (dx, dt) = (made(needs[0])?, made(needs[1])?);
    gpu::launch_some(
        OP,
        [
            Some(&x),
            Some(&target),
            saved.weight.as_ref(),
            Some(&state.max),
            Some(&state.log_sum),
            Some(&grad),
            (saved.reduction == Reduction::Mean).then_some(&state.divisor),
            dx.as_ref(),
            dt.as_ref(),
        ],
        |[x, t, w, max, log_sum, g, divisor, dx, dt], stream| unsafe {
            let (ignore, smoothing) = (saved.ignore_index, saved.smoothing);
            sys::smalti_cross_entropy_backward(
                x, t, w, max, log_sum, g, divisor, dx, dt, ignore, smoothing, stream,
            )
        },
    )?;
    Ok([dx, dt])
}
