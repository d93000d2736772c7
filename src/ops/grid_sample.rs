//! Sampling of images at given places: `grid_sample`, and `affine_grid` which makes the places.

use crate::{
    DType, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    ensure, for_real, on_device,
};
use smallvec::{SmallVec, smallvec};

/// How values between pixels come about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GridMode {
    /// Four neighbours, linear.
    #[default]
    Bilinear,
    /// The nearest pixel, halves to even. No gradient reaches the grid.
    Nearest,
    /// Sixteen neighbours, cubic convolution with coefficient -0.75.
    Bicubic,
}

/// What lies outside the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GridPadding {
    /// Zeros.
    #[default]
    Zeros,
    /// The nearest edge pixel.
    Border,
    /// The image, mirrored as often as need be.
    Reflection,
}

/// Options of [`Tensor::grid_sample`].
#[derive(Clone, Copy, Debug, Default)]
pub struct GridOptions {
    /// How values between pixels come about.
    pub mode: GridMode,
    /// What lies outside.
    pub padding: GridPadding,
    /// Are -1 and 1 the centres of the corner pixels, instead of the image's edges?
    pub align_corners: bool,
}

impl Tensor {
    /// Images `[N, C, H, W]` sampled at `grid` `[N, H', W', 2]`, whose pairs are (x, y) in -1..=1 across the image:
    /// `[N, C, H', W']`. Saves: both.
    ///
    /// # Errors
    /// If the shapes do not fit or the image has no pixels.
    #[track_caller]
    pub fn grid_sample(&self, grid: &Tensor, options: &GridOptions) -> Result<Tensor> {
        const OP: &str = "grid_sample";
        let ([n, _, h, w], [m, _, _, two]) = (self.dims(OP)?, grid.dims(OP)?);
        ensure!(
            n == m && two == 2 && h > 0 && w > 0,
            OP,
            "needs an image [N, C, H, W] with pixels and a grid [N, H', W', 2], got {:?} and {:?}",
            self.shape(),
            grid.shape()
        );
        let (x, g) = (self.detach(), grid.detach());
        let y = Tensor::in_f32([&x, &g], |[x, g]| {
            let g = g.to_dtype(x.dtype())?;
            on_device!(x, OP, for_real!(x.dtype(), OP, T => cpu::forward::<T>(x, &g, options)))
        })?;
        y.record([self, grid], GridSample { x, grid: g, options: *options })
    }

    /// The places of an affine map for [`grid_sample`](Self::grid_sample): theta `[N, 2, 3]` applied to (x, y, 1) of
    /// every pixel of `size` `[N, C, H, W]`: `[N, H, W, 2]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    #[track_caller]
    pub fn affine_grid(&self, size: [usize; 4], align_corners: bool) -> Result<Tensor> {
        const OP: &str = "affine_grid";
        let [n, two, three] = self.dims(OP)?;
        ensure!(
            n == size[0] && two == 2 && three == 3,
            OP,
            "needs theta [{}, 2, 3], got {:?}",
            size[0],
            self.shape()
        );
        let size = [size[2], size[3]];
        let y = Tensor::in_f32([&self.detach()], |[theta]| {
            on_device!(
                theta,
                OP,
                for_real!(theta.dtype(), OP, T => cpu::affine::<T>(theta, size, align_corners))
            )
        })?;
        y.record([self], AffineGrid { align_corners })
    }
}

struct GridSample {
    x: Tensor,
    grid: Tensor,
    options: GridOptions,
}

impl Backward for GridSample {
    const NAME: &'static str = "grid_sample";

    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let wide = if self.x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let (x, grid, g) = (self.x.to_dtype(wide)?, self.grid.to_dtype(wide)?, grad.to_dtype(wide)?);
        let dx = ctx.grad(0, || {
            on_device!(
                g,
                Self::NAME,
                for_real!(wide, Self::NAME, T => cpu::grad_input::<T>(&x, &grid, &g, &self.options))
            )?
            .to_dtype(self.x.dtype())
        })?;
        let dgrid = ctx.grad(1, || {
            on_device!(
                g,
                Self::NAME,
                for_real!(wide, Self::NAME, T => cpu::grad_grid::<T>(&x, &grid, &g, &self.options))
            )?
            .to_dtype(self.grid.dtype())
        })?;
        Ok(smallvec![dx, dgrid])
    }
}

struct AffineGrid {
    align_corners: bool,
}

impl Backward for AffineGrid {
    const NAME: &'static str = "affine_grid";

    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        let dtheta = Tensor::in_f32([grad], |[g]| {
            on_device!(
                g,
                Self::NAME,
                for_real!(g.dtype(), Self::NAME, T => cpu::affine_backward::<T>(g, self.align_corners))
            )
        })?;
        Ok(smallvec![Some(dtheta)])
    }
}

/// A pixel that a sample takes: its place in the plane, its weight, and the weight's derivatives along x and y.
struct Tap {
    at: usize,
    weight: f64,
    dx: f64,
    dy: f64,
}
type Taps = SmallVec<[Tap; 16]>;

/// One axis of an image.
struct Axis {
    size: usize,
    padding: GridPadding,
    align_corners: bool,
}

impl Axis {
    /// From -1..=1 to pixels, and the derivative.
    fn pixels(&self, x: f64) -> (f64, f64) {
        let n = self.size as f64;
        if self.align_corners {
            ((x + 1.0) / 2.0 * (n - 1.0), (n - 1.0) / 2.0)
        } else {
            (((x + 1.0) * n - 1.0) / 2.0, n / 2.0)
        }
    }

    /// Brings a place into the image as the padding demands; the derivative.
    fn pad(&self, x: f64) -> (f64, f64) {
        let last = (self.size - 1) as f64;
        let (x, slope) = match self.padding {
            GridPadding::Zeros => return (x, 1.0),
            GridPadding::Border => (x, 1.0),
            GridPadding::Reflection if self.align_corners => reflect(x, 0.0, last),
            GridPadding::Reflection => reflect(x, -0.5, last + 1.0),
        };
        // NaN goes to the first pixel.
        if x.is_nan() || x <= 0.0 {
            (0.0, 0.0)
        } else if x >= last {
            (last, 0.0)
        } else {
            (x, slope)
        }
    }

    /// The pixel at a whole number, if there is one.
    fn index(&self, x: f64) -> Option<usize> {
        (x >= 0.0 && x < self.size as f64).then_some(x as usize)
    }
}

/// Mirrors `x` at `low` and at `low + span`.
fn reflect(x: f64, low: f64, span: f64) -> (f64, f64) {
    if span == 0.0 {
        return (0.0, 0.0);
    }
    let (x, sign) = if x < low { (low - x, -1.0) } else { (x - low, 1.0) };
    let rest = x % span;
    if (x / span).floor() % 2.0 == 0.0 { (rest + low, sign) } else { (span - rest + low, -sign) }
}

/// Weights of the four pixels around a place `t` past the second, and their derivatives.
fn cubic(t: f64) -> [(f64, f64); 4] {
    const A: f64 = -0.75;
    let near =
        |x: f64| (((A + 2.0) * x - (A + 3.0)) * x * x + 1.0, (3.0 * (A + 2.0) * x - 2.0 * (A + 3.0)) * x);
    let far = |x: f64| ((((x - 5.0) * x + 8.0) * x - 4.0) * A, ((3.0 * x - 10.0) * x + 8.0) * A);
    let mirrored = |(w, d): (f64, f64)| (w, -d);
    [far(t + 1.0), near(t), mirrored(near(1.0 - t)), mirrored(far(2.0 - t))]
}

/// Positions along one axis with weight and derivative.
type Line = SmallVec<[(f64, f64, f64); 4]>;

fn line(axis: &Axis, x: f64, mode: GridMode) -> Line {
    let (x, unit) = axis.pixels(x);
    match mode {
        GridMode::Nearest => smallvec![(axis.pad(x).0.round_ties_even(), 1.0, 0.0)],
        GridMode::Bilinear => {
            let (x, slope) = axis.pad(x);
            let (low, t, d) = (x.floor(), x - x.floor(), unit * slope);
            smallvec![(low, 1.0 - t, -d), (low + 1.0, t, d)]
        }
        // Here each pixel is padded on its own.
        GridMode::Bicubic => {
            let weights = cubic(x - x.floor());
            (0..4)
                .map(|k| (axis.pad(x.floor() - 1.0 + k as f64).0, weights[k].0, weights[k].1 * unit))
                .collect()
        }
    }
}

/// The pixels that the sample at (x, y) takes.
fn taps(x: f64, y: f64, [rows, columns]: &[Axis; 2], mode: GridMode) -> Taps {
    let mut taps = Taps::new();
    let (xs, ys) = (line(columns, x, mode), line(rows, y, mode));
    for &(y, wy, dy) in &ys {
        let Some(row) = rows.index(y) else { continue };
        for &(x, wx, dx) in &xs {
            if let Some(column) = columns.index(x) {
                taps.push(Tap { at: row * columns.size + column, weight: wx * wy, dx: dx * wy, dy: wx * dy });
            }
        }
    }
    taps
}

mod cpu {
    use super::*;
    use crate::{
        cpu::{
            parallel::{SharedMut, for_ranges, for_rows},
            pool::CpuVec,
        },
        dtype::Real,
    };

    fn axes(x: &Tensor, options: &GridOptions) -> Result<[Axis; 2]> {
        let [_, _, h, w] = x.dims("grid_sample")?;
        let axis = |size| Axis { size, padding: options.padding, align_corners: options.align_corners };
        Ok([axis(h), axis(w)])
    }

    fn pair<T: Real>(grid: &[T], point: usize) -> (f64, f64) {
        (grid[2 * point].to_f64(), grid[2 * point + 1].to_f64())
    }

    pub fn forward<T: Real>(x: &Tensor, grid: &Tensor, options: &GridOptions) -> Result<Tensor> {
        let ([n, c, h, w], [_, h2, w2, _]) = (x.dims("grid_sample")?, grid.dims("grid_sample")?);
        let axes = axes(x, options)?;
        let (x, grid) = (x.contiguous()?, grid.contiguous()?);
        let (x, grid) = (x.cpu_slice::<T>(), grid.cpu_slice::<T>());
        let (plane, points) = (h * w, h2 * w2);
        let mut out = CpuVec::<T>::new(n * c * points);
        let target = SharedMut::new(&mut out);
        for_rows(n * points, 16 * c, |range| {
            for point in range {
                let (image, at) = (point / points, point % points);
                let (px, py) = pair(grid, point);
                let taps = taps(px, py, &axes, options.mode);
                for channel in image * c..(image + 1) * c {
                    let x = &x[channel * plane..][..plane];
                    let sum = taps.iter().fold(T::ZERO, |sum, tap| sum + x[tap.at] * T::of(tap.weight));
                    unsafe { *target.ptr().add(channel * points + at) = sum };
                }
            }
        });
        Ok(Tensor::from_cpu(out, [n, c, h2, w2], "grid_sample"))
    }

    /// Planes are shared out, and within a plane the samples add in order: the same sums on any machine.
    pub fn grad_input<T: Real>(
        x: &Tensor,
        grid: &Tensor,
        grad: &Tensor,
        options: &GridOptions,
    ) -> Result<Tensor> {
        let ([n, c, h, w], [_, h2, w2, _]) = (x.dims("grid_sample")?, grid.dims("grid_sample")?);
        let axes = axes(x, options)?;
        let (grid, grad) = (grid.contiguous()?, grad.contiguous()?);
        let (grid, grad) = (grid.cpu_slice::<T>(), grad.cpu_slice::<T>());
        let (plane, points) = (h * w, h2 * w2);
        let mut out = CpuVec::<T>::zeros(n * c * plane);
        let target = SharedMut::new(&mut out);
        // The taps are found once for a group of channels.
        const GROUP: usize = 16;
        let groups = c.div_ceil(GROUP);
        for_ranges(n * groups, 1, |range| {
            for task in range {
                let (image, group) = (task / groups, task % groups);
                let channels = image * c + group * GROUP..image * c + c.min((group + 1) * GROUP);
                for at in 0..points {
                    let (px, py) = pair(grid, image * points + at);
                    let taps = taps(px, py, &axes, options.mode);
                    for channel in channels.clone() {
                        let dx = unsafe { target.slice(channel * plane..(channel + 1) * plane) };
                        let g = grad[channel * points + at];
                        taps.iter().for_each(|tap| dx[tap.at] += g * T::of(tap.weight));
                    }
                }
            }
        });
        Ok(Tensor::from_cpu(out, [n, c, h, w], "grid_sample backward"))
    }

    pub fn grad_grid<T: Real>(
        x: &Tensor,
        grid: &Tensor,
        grad: &Tensor,
        options: &GridOptions,
    ) -> Result<Tensor> {
        let ([n, c, h, w], [_, h2, w2, _]) = (x.dims("grid_sample")?, grid.dims("grid_sample")?);
        let axes = axes(x, options)?;
        let (x, grid, grad) = (x.contiguous()?, grid.contiguous()?, grad.contiguous()?);
        let (x, grid, grad) = (x.cpu_slice::<T>(), grid.cpu_slice::<T>(), grad.cpu_slice::<T>());
        let (plane, points) = (h * w, h2 * w2);
        let mut out = CpuVec::<T>::new(2 * n * points);
        let target = SharedMut::new(&mut out);
        for_rows(n * points, 16 * c, |range| {
            for point in range {
                let (image, at) = (point / points, point % points);
                let (px, py) = pair(grid, point);
                let taps = taps(px, py, &axes, options.mode);
                let mut sum = [T::ZERO; 2];
                for channel in image * c..(image + 1) * c {
                    let (x, g) = (&x[channel * plane..][..plane], grad[channel * points + at]);
                    for tap in &taps {
                        sum[0] += g * x[tap.at] * T::of(tap.dx);
                        sum[1] += g * x[tap.at] * T::of(tap.dy);
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Rng, gradcheck};

    const MODES: [GridMode; 3] = [GridMode::Bilinear, GridMode::Nearest, GridMode::Bicubic];
    const PADDINGS: [GridPadding; 3] = [GridPadding::Zeros, GridPadding::Border, GridPadding::Reflection];

    #[test]
    fn gradients() -> Result<()> {
        let mut rng = Rng::new(8);
        let x = Tensor::randn([2, 3, 4, 5], &mut rng)?.to_dtype(DType::F64)?;
        // not at whole pixels, where there are kinks
        let grid =
            Tensor::rand([2, 2, 3, 2], &mut rng)?.to_dtype(DType::F64)?.mul_scalar(2.6)?.add_scalar(-1.3)?;
        for mode in MODES {
            for padding in PADDINGS {
                for align_corners in [false, true] {
                    let options = GridOptions { mode, padding, align_corners };
                    for x in [&x, &x.to_channels_last()?] {
                        let sample = |t: &[Tensor]| t[0].grid_sample(&t[1], &options);
                        gradcheck(sample, &[x.clone(), grid.clone()])?;
                    }
                }
            }
        }
        let theta = Tensor::randn([2, 2, 3], &mut rng)?.to_dtype(DType::F64)?;
        gradcheck(|t| t[0].affine_grid([2, 1, 3, 4], false), std::slice::from_ref(&theta))?;
        gradcheck(|t| t[0].affine_grid([2, 1, 1, 4], true), &[theta])
    }

    #[test]
    fn identity_and_strange_places() -> Result<()> {
        let x = Tensor::randn([1, 2, 3, 4], &mut Rng::new(2))?;
        let theta = Tensor::from_slice(&[1f32, 0., 0., 0., 1., 0.], [1, 2, 3])?;
        for mode in MODES {
            for padding in PADDINGS {
                for align_corners in [false, true] {
                    let options = GridOptions { mode, padding, align_corners };
                    let grid = theta.affine_grid([1, 2, 3, 4], align_corners)?;
                    let y = x.grid_sample(&grid, &options)?;
                    for (a, b) in x.to_vec::<f32>()?.iter().zip(y.to_vec::<f32>()?) {
                        assert!((a - b).abs() < 2e-6, "{options:?}: {a} {b}");
                    }
                    let wild = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -1e30, 0.0];
                    x.grid_sample(&Tensor::from_slice(&wild, [1, 1, 3, 2])?, &options)?;
                }
            }
        }
        assert!(x.grid_sample(&theta, &GridOptions::default()).is_err());
        let half = x
            .to_dtype(DType::F16)?
            .grid_sample(&Tensor::zeros([1, 1, 1, 2], DType::F32)?, &Default::default())?;
        assert_eq!(half.dtype(), DType::F16);
        Ok(())
    }
}
