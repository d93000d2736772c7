//! The launch. The kernels make the tables themselves.

use super::{Interpolation, table::Axis};
use crate::{
    Result, Tensor,
    cpu::elementwise::dense_strides,
    ensure,
    gpu::{self, sys},
    shape::Dims,
};

fn resize(axis: &Axis) -> sys::smalti_resize {
    let mode = match axis.options.mode {
        Interpolation::Nearest => sys::SMALTI_NEAREST,
        Interpolation::NearestExact => sys::SMALTI_NEAREST_EXACT,
        Interpolation::Bilinear => sys::SMALTI_LINEAR,
        Interpolation::Bicubic => sys::SMALTI_CUBIC,
        Interpolation::Area => sys::SMALTI_AREA,
    };
    sys::smalti_resize {
        input: axis.input as i64,
        output: axis.output as i64,
        scale: axis.scale,
        mode: mode as i32,
        align_corners: axis.options.align_corners.into(),
        antialias: axis.options.antialias.into(),
    }
}

/// Both axes of `x` `[N, C, H, W]`; channels-last gives channels-last.
#[track_caller]
pub fn resample(op: &'static str, x: &Tensor, rows: &Axis, columns: &Axis) -> Result<Tensor> {
    ensure!(x.dtype().is_float(), op, "needs a float tensor, got {}", x.dtype());
    let [n, c, _, _] = x.dims(op)?;
    let size = [rows, columns].map(|axis| if axis.back { axis.input } else { axis.output });
    let shape = Dims::from_slice(&[n, c, size[0], size[1]]);
    let last = !x.is_contiguous() && x.permute([0, 2, 3, 1])?.is_contiguous();
    let order: &[usize] = if last { &[0, 2, 3, 1] } else { &[0, 1, 2, 3] };
    let y = gpu::empty_strided(x, &shape, dense_strides(&shape, order), x.dtype(), op)?;
    let (axes, back) = ([resize(rows), resize(columns)], i32::from(rows.back));
    let mut bytes = 0;
    gpu::launch(op, [x, &y], |[x, y], _| {
        bytes = unsafe { sys::smalti_interpolate_workspace(&x, &y, axes.as_ptr(), back) };
        0
    })?;
    let space = gpu::workspace(op, x, bytes)?;
    gpu::launch(op, [x, &y, &space], |[x, y, space], stream| unsafe {
        sys::smalti_interpolate(&x, &y, axes.as_ptr(), back, space.ptr, stream)
    })?;
    Ok(y)
}
