//! Launches. Results have the memory order that the CPU code gives them.

use super::{cpu::Planes, windows::Windows};
use crate::{
    DType, Result, Tensor,
    gpu::{self, sys},
};

/// What the kernels compute the windows from.
fn pool(windows: &Windows) -> sys::smalti_pool {
    let divisor = match windows.divisor {
        Some(n) => n as i64,
        None if windows.padded => 0,
        None => -1,
    };
    let mut pool = sys::smalti_pool {
        kernel: [1; 2],
        stride: [1; 2],
        padding: [0; 2],
        dilation: [1; 2],
        divisor,
        adaptive: i32::from(windows.moves.is_none()),
    };
    if let Some(o) = windows.moves {
        pool.kernel = o.kernel_size.map(|n| n as i64);
        pool.stride = o.stride.map(|n| n as i64);
        pool.padding = o.padding.map(|n| n as i64);
        pool.dilation = o.dilation.map(|n| n as i64);
    }
    pool
}

/// Images of `size` in the memory order of `like`.
#[track_caller]
fn empty(op: &'static str, like: &Tensor, size: [usize; 2], dtype: DType) -> Result<Tensor> {
    let (shape, strides) = Planes::of(like).strides(size);
    gpu::empty_strided(like, &shape, strides, dtype, op)
}

/// The largest elements and where they stand in the plane, i32.
#[track_caller]
pub fn max(op: &'static str, x: &Tensor, windows: &Windows) -> Result<(Tensor, Tensor)> {
    let (y, at) = (empty(op, x, windows.count(), x.dtype())?, empty(op, x, windows.count(), DType::I32)?);
    gpu::launch(op, [x, &y, &at], |[x, y, at], stream| unsafe {
        sys::smalti_max_pool_forward(&x, &y, &at, &pool(windows), stream)
    })?;
    Ok((y, at))
}

#[track_caller]
pub fn max_backward(op: &'static str, grad: &Tensor, at: &Tensor, windows: &Windows) -> Result<Tensor> {
    let dx = empty(op, at, windows.size(), grad.dtype())?;
    gpu::launch(op, [grad, at, &dx], |[grad, at, dx], stream| unsafe {
        sys::smalti_max_pool_backward(&grad, &at, &dx, &pool(windows), stream)
    })?;
    Ok(dx)
}

/// Means of windows, or the gradient of that.
#[track_caller]
pub fn average(op: &'static str, x: &Tensor, windows: &Windows, back: bool) -> Result<Tensor> {
    let [h, w] = windows.size();
    if !back && windows.global() && windows.weight(0, 0) == h * w {
        // as a reduction, in which many threads share a plane
        return x.mean_keepdim([2, 3]);
    }
    let y = empty(op, x, if back { windows.size() } else { windows.count() }, x.dtype())?;
    gpu::launch(op, [x, &y], |[x, y], stream| unsafe {
        let pool = pool(windows);
        if back {
            sys::smalti_avg_pool_backward(&x, &y, &pool, stream)
        } else {
            sys::smalti_avg_pool_forward(&x, &y, &pool, stream)
        }
    })?;
    Ok(y)
}
