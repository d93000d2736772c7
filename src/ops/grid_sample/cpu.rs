//! CPU code: samples and channels on all threads, in either memory order of images.

use super::{
    GridOptions,
    taps::{Axis, taps},
};
use crate::{
    Result, Tensor,
    cpu::{
        elementwise::dense_strides,
        parallel::{SharedMut, for_ranges, for_rows},
        pool::CpuVec,
    },
    dtype::Real,
    shape::Dims,
};

/// The memory order of images: NHWC, or else NCHW.
#[derive(Clone, Copy)]
struct Order {
    last: bool,
}

impl Order {
    /// The order of `x` `[N, C, H, W]`, and its elements in that order, as a view or a copy.
    fn of(x: &Tensor) -> Result<(Order, Tensor)> {
        let pixels = x.permute([0, 2, 3, 1])?;
        let last = !x.is_contiguous() && pixels.is_contiguous();
        Ok((Order { last }, if last { pixels } else { x.contiguous()? }))
    }

    /// Steps from channel to channel and from pixel to pixel of images with `c` channels of `pixels`.
    fn steps(self, c: usize, pixels: usize) -> [usize; 2] {
        if self.last { [1, c] } else { [pixels, 1] }
    }

    fn tensor<T: Real>(self, data: CpuVec<T>, shape: [usize; 4], op: &'static str) -> Tensor {
        let order: &[usize] = if self.last { &[0, 2, 3, 1] } else { &[0, 1, 2, 3] };
        Tensor::from_cpu_strided(data, Dims::from_slice(&shape), dense_strides(&shape, order), op)
    }
}

fn axes(x: &Tensor, options: &GridOptions) -> Result<[Axis; 2]> {
    let [_, _, h, w] = x.dims("grid_sample")?;
    let axis = |size| Axis { size, padding: options.padding, align_corners: options.align_corners };
    Ok([axis(h), axis(w)])
}

fn pair<T: Real>(grid: &[T], point: usize) -> (f64, f64) {
    (grid[2 * point].to_f64(), grid[2 * point + 1].to_f64())
}

/// The result has the memory order of `x`.
pub fn forward<T: Real>(x: &Tensor, grid: &Tensor, options: &GridOptions) -> Result<Tensor> {
    let ([n, c, h, w], [_, h2, w2, _]) = (x.dims("grid_sample")?, grid.dims("grid_sample")?);
    let axes = axes(x, options)?;
    let (order, x) = Order::of(x)?;
    let grid = grid.contiguous()?;
    let (x, grid) = (x.cpu_slice::<T>(), grid.cpu_slice::<T>());
    let (plane, points) = (h * w, h2 * w2);
    let ([x_channel, x_pixel], [y_channel, y_pixel]) = (order.steps(c, plane), order.steps(c, points));
    let mut out = CpuVec::<T>::new(n * c * points);
    let target = SharedMut::new(&mut out);
    for_rows(n * points, 16 * c, |range| {
        for point in range {
            let (image, at) = (point / points, point % points);
            let (px, py) = pair(grid, point);
            let taps = taps(px, py, &axes, options.mode);
            let x = &x[image * c * plane..][..c * plane];
            let first = image * c * points + at * y_pixel;
            for channel in 0..c {
                let read = |at: usize| x[channel * x_channel + at * x_pixel];
                let sum = taps.iter().fold(T::ZERO, |sum, tap| sum + read(tap.at) * T::of(tap.weight));
                unsafe { *target.ptr().add(first + channel * y_channel) = sum };
            }
        }
    });
    Ok(order.tensor(out, [n, c, h2, w2], "grid_sample"))
}

/// In the memory order of `x`. Channels are shared out, and within a channel the samples add in order: the same sums on
/// any machine.
pub fn grad_input<T: Real>(
    x: &Tensor,
    grid: &Tensor,
    grad: &Tensor,
    options: &GridOptions,
) -> Result<Tensor> {
    let ([n, c, h, w], [_, h2, w2, _]) = (x.dims("grid_sample")?, grid.dims("grid_sample")?);
    let axes = axes(x, options)?;
    let ((order, _), (from, grad)) = (Order::of(x)?, Order::of(grad)?);
    let grid = grid.contiguous()?;
    let (grid, grad) = (grid.cpu_slice::<T>(), grad.cpu_slice::<T>());
    let (plane, points) = (h * w, h2 * w2);
    let ([x_channel, x_pixel], [g_channel, g_pixel]) = (order.steps(c, plane), from.steps(c, points));
    let mut out = CpuVec::<T>::zeros(n * c * plane);
    let target = SharedMut::new(&mut out);
    // The taps are found once for a group of channels.
    const GROUP: usize = 16;
    let groups = c.div_ceil(GROUP);
    for_ranges(n * groups, 1, |range| {
        for task in range {
            let (image, group) = (task / groups, task % groups);
            let channels = group * GROUP..c.min((group + 1) * GROUP);
            let grad = &grad[image * c * points..][..c * points];
            for at in 0..points {
                let (px, py) = pair(grid, image * points + at);
                let taps = taps(px, py, &axes, options.mode);
                for channel in channels.clone() {
                    let g = grad[channel * g_channel + at * g_pixel];
                    let first = image * c * plane + channel * x_channel;
                    // taps name pixels that exist, and channels belong to one task
                    let add = |at: usize, v: T| unsafe { *target.ptr().add(first + at * x_pixel) += v };
                    taps.iter().for_each(|tap| add(tap.at, g * T::of(tap.weight)));
                }
            }
        }
    });
    Ok(order.tensor(out, [n, c, h, w], "grid_sample backward"))
}

pub fn grad_grid<T: Real>(x: &Tensor, grid: &Tensor, grad: &Tensor, options: &GridOptions) -> Result<Tensor> {
    let ([n, c, h, w], [_, h2, w2, _]) = (x.dims("grid_sample")?, grid.dims("grid_sample")?);
    let axes = axes(x, options)?;
    let ((order, x), (from, grad)) = (Order::of(x)?, Order::of(grad)?);
    let grid = grid.contiguous()?;
    let (x, grid, grad) = (x.cpu_slice::<T>(), grid.cpu_slice::<T>(), grad.cpu_slice::<T>());
    let (plane, points) = (h * w, h2 * w2);
    let ([x_channel, x_pixel], [g_channel, g_pixel]) = (order.steps(c, plane), from.steps(c, points));
    let mut out = CpuVec::<T>::new(2 * n * points);
    let target = SharedMut::new(&mut out);
    for_rows(n * points, 16 * c, |range| {
        for point in range {
            let (image, at) = (point / points, point % points);
            let (px, py) = pair(grid, point);
            let taps = taps(px, py, &axes, options.mode);
            let (x, grad) = (&x[image * c * plane..][..c * plane], &grad[image * c * points..][..c * points]);
            let mut sum = [T::ZERO; 2];
            for channel in 0..c {
                let g = grad[channel * g_channel + at * g_pixel];
                for tap in &taps {
                    let v = x[channel * x_channel + tap.at * x_pixel];
                    sum[0] += g * v * T::of(tap.dx);
                    sum[1] += g * v * T::of(tap.dy);
                }
            }
            unsafe { target.slice(2 * point..2 * point + 2).copy_from_slice(&sum) };
        }
    });
    Ok(Tensor::from_cpu(out, [n, h2, w2, 2], "grid_sample backward"))
}

/// Coordinate of pixel `i` of `n`.
fn coordinate(i: usize, n: usize, align_corners: bool) -> f64 {
    match (align_corners, n) {
        (true, 1) => 0.0,
        (true, _) => 2.0 * i as f64 / (n - 1) as f64 - 1.0,
        (false, _) => (2 * i + 1) as f64 / n as f64 - 1.0,
    }
}

pub fn affine<T: Real>(theta: &Tensor, [h, w]: [usize; 2], align_corners: bool) -> Result<Tensor> {
    let n = theta.shape()[0];
    crate::shape::checked_count("affine_grid", &[n, h, w, 2], size_of::<T>())?;
    let theta = theta.contiguous()?;
    let theta = theta.cpu_slice::<T>();
    let mut out = CpuVec::<T>::new(n * h * w * 2);
    for (at, place) in out.chunks_exact_mut(2).enumerate() {
        let (image, row, column) = (at / (h * w), at / w % h, at % w);
        let (x, y) = (coordinate(column, w, align_corners), coordinate(row, h, align_corners));
        for (k, place) in place.iter_mut().enumerate() {
            let t = |j: usize| theta[image * 6 + k * 3 + j].to_f64();
            *place = T::of(t(0) * x + t(1) * y + t(2));
        }
    }
    Ok(Tensor::from_cpu(out, [n, h, w, 2], "affine_grid"))
}

pub fn affine_backward<T: Real>(grad: &Tensor, align_corners: bool) -> Result<Tensor> {
    let [n, h, w, _] = grad.dims("affine_grid")?;
    let grad = grad.contiguous()?;
    let mut sums = vec![0.0; n * 6];
    for (at, g) in grad.cpu_slice::<T>().chunks_exact(2).enumerate() {
        let (image, row, column) = (at / (h * w), at / w % h, at % w);
        let place = [coordinate(column, w, align_corners), coordinate(row, h, align_corners), 1.0];
        for k in 0..2 {
            (0..3).for_each(|j| sums[image * 6 + k * 3 + j] += g[k].to_f64() * place[j]);
        }
    }
    let sums: Vec<T> = sums.into_iter().map(T::of).collect();
    Ok(Tensor::from_cpu(CpuVec::from_slice(&sums), [n, 2, 3], "affine_grid backward"))
}
