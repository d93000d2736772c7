//! Launches. The grid goes in the dtype that the image is computed in, as it does on the CPU.

use super::{GridMode, GridOptions, GridPadding};
use crate::{
    DType, Result, Tensor,
    cpu::elementwise::dense_strides,
    ensure,
    gpu::{self, sys},
};

const OP: &str = "grid_sample";

fn grid_of(o: &GridOptions) -> sys::smalti_grid {
    let mode = match o.mode {
        GridMode::Bilinear => sys::SMALTI_LINEAR,
        GridMode::Nearest => sys::SMALTI_NEAREST,
        GridMode::Bicubic => sys::SMALTI_CUBIC,
    };
    let padding = match o.padding {
        GridPadding::Zeros => sys::SMALTI_PAD_ZEROS,
        GridPadding::Border => sys::SMALTI_PAD_BORDER,
        GridPadding::Reflection => sys::SMALTI_PAD_REFLECTION,
    };
    sys::smalti_grid { mode: mode as i32, padding: padding as i32, align_corners: o.align_corners.into() }
}

/// Are there few enough pixels and samples for the kernels' 32-bit lists?
pub fn fits(x: &Tensor, grid: &Tensor) -> bool {
    let area = |n: usize, m: usize| n.saturating_mul(m);
    let (x, grid) = (x.shape(), grid.shape());
    area(x[2], x[3]) < i32::MAX as usize && area(grid[1], grid[2]) <= i32::MAX as usize / 16
}

/// Images of this shape in the memory order of `like`.
#[track_caller]
fn empty(like: &Tensor, shape: [usize; 4]) -> Result<Tensor> {
    let last = !like.is_contiguous() && like.permute([0, 2, 3, 1])?.is_contiguous();
    let order: &[usize] = if last { &[0, 2, 3, 1] } else { &[0, 1, 2, 3] };
    gpu::empty_strided(like, &shape, dense_strides(&shape, order), like.dtype(), OP)
}

#[track_caller]
pub fn forward(x: &Tensor, grid: &Tensor, options: &GridOptions) -> Result<Tensor> {
    ensure!(x.dtype().is_float(), OP, "needs a float tensor, got {}", x.dtype());
    let ([n, c, _, _], [_, h, w, _]) = (x.dims(OP)?, grid.dims(OP)?);
    let grid = grid.to_dtype(x.dtype().computed_in())?;
    let y = empty(x, [n, c, h, w])?;
    gpu::launch(OP, [x, &grid, &y], |[x, grid, y], stream| unsafe {
        sys::smalti_grid_sample_forward(&x, &grid, &y, &grid_of(options), stream)
    })?;
    Ok(y)
}

/// The taps of all samples, sorted by pixel, summed by pixel.
#[track_caller]
pub fn grad_input(x: &Tensor, grid: &Tensor, grad: &Tensor, options: &GridOptions) -> Result<Tensor> {
    let ([n, c, h, w], [_, h2, w2, _]) = (x.dims(OP)?, grid.dims(OP)?);
    let grid = grid.to_dtype(x.dtype().computed_in())?;
    let each = match options.mode {
        GridMode::Nearest => 1,
        GridMode::Bilinear => 4,
        GridMode::Bicubic => 16,
    };
    let shape = [n, h2 * w2 * each];
    let places = gpu::empty(x, &shape, DType::I32, OP)?;
    let weights = gpu::empty(x, &shape, grid.dtype(), OP)?;
    gpu::launch(OP, [&grid, &places, &weights], |[grid, places, weights], stream| unsafe {
        let options = grid_of(options);
        sys::smalti_grid_sample_taps(&grid, h as i64, w as i64, &places, &weights, &options, stream)
    })?;
    let order = places.argsort(1, false)?;
    let starts = gpu::empty(x, &[n, h * w + 1], DType::I32, OP)?;
    let dx = empty(x, [n, c, h, w])?;
    let tensors = [grad, &places, &weights, &order, &starts, &dx];
    gpu::launch(OP, tensors, |[g, places, weights, order, starts, dx], stream| unsafe {
        sys::smalti_grid_sample_backward_input(&g, &places, &weights, &order, &starts, &dx, stream)
    })?;
    Ok(dx)
}

/// In the dtype that it is computed in.
#[track_caller]
pub fn grad_grid(x: &Tensor, grid: &Tensor, grad: &Tensor, options: &GridOptions) -> Result<Tensor> {
    let grid = grid.to_dtype(x.dtype().computed_in())?;
    let dgrid = gpu::empty(x, grid.shape(), grid.dtype(), OP)?;
    gpu::launch(OP, [x, &grid, grad, &dgrid], |[x, grid, g, dgrid], stream| unsafe {
        sys::smalti_grid_sample_backward_grid(&x, &grid, &g, &dgrid, &grid_of(options), stream)
    })?;
    Ok(dgrid)
}

#[track_caller]
pub fn affine(theta: &Tensor, [h, w]: [usize; 2], align_corners: bool) -> Result<Tensor> {
    let op = "affine_grid";
    ensure!(theta.dtype().is_float(), op, "needs a float tensor, got {}", theta.dtype());
    let shape = [theta.shape()[0], h, w, 2];
    crate::shape::checked_count(op, &shape, theta.dtype().size())?;
    let y = gpu::empty(theta, &shape, theta.dtype(), op)?;
    gpu::launch(op, [theta, &y], |[theta, y], stream| unsafe {
        sys::smalti_affine_grid_forward(&theta, &y, align_corners.into(), stream)
    })?;
    Ok(y)
}

#[track_caller]
pub fn affine_backward(grad: &Tensor, align_corners: bool) -> Result<Tensor> {
    let op = "affine_grid backward";
    let grad = grad.contiguous()?;
    let dtheta = gpu::empty(&grad, &[grad.shape()[0], 2, 3], grad.dtype(), op)?;
    gpu::launch(op, [&grad, &dtheta], |[grad, dtheta], stream| unsafe {
        sys::smalti_affine_grid_backward(&grad, &dtheta, align_corners.into(), stream)
    })?;
    Ok(dtheta)
}
