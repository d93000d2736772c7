//! Sampling of images at given places: `grid_sample`, and `affine_grid` which makes the places.

mod cpu;
#[cfg(gpu)]
mod gpu;
mod taps;

use crate::{
    Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    ensure, for_real, on_device,
};
use smallvec::smallvec;

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
    /// `[N, C, H', W']`, in the memory order of the images, NCHW or NHWC. Saves: both.
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
        let y = on_device!(
            x,
            OP,
            Tensor::in_f32([&x, &g], |[x, g]| {
                let g = g.to_dtype(x.dtype())?;
                for_real!(x.dtype(), OP, T => cpu::forward::<T>(x, &g, options))
            }),
            gpu::forward(&x, &g, options),
            when gpu::fits(&x, &g)
        )?;
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
        let y = on_device!(
            self,
            OP,
            Tensor::in_f32([&self.detach()], |[theta]| {
                for_real!(theta.dtype(), OP, T => cpu::affine::<T>(theta, size, align_corners))
            }),
            gpu::affine(self, size, align_corners)
        )?;
        y.record([self], AffineGrid { align_corners })
    }
}

struct GridSample {
    x: Tensor,
    grid: Tensor,
    options: GridOptions,
}

impl GridSample {
    /// Image, grid and gradient in the dtype that they are computed in.
    fn on_cpu(
        &self,
        grad: &Tensor,
        f: impl FnOnce(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let wide = self.x.dtype().computed_in();
        f(&self.x.to_dtype(wide)?, &self.grid.to_dtype(wide)?, &grad.to_dtype(wide)?)
    }
}

impl Backward for GridSample {
    const NAME: &'static str = "grid_sample";

    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let dx = ctx.grad(0, || {
            on_device!(
                grad,
                Self::NAME,
                self.on_cpu(grad, |x, grid, g| for_real!(g.dtype(), Self::NAME, T => {
                    cpu::grad_input::<T>(x, grid, g, &self.options)
                })),
                gpu::grad_input(&self.x, &self.grid, grad, &self.options),
                when gpu::fits(&self.x, &self.grid)
            )?
            .to_dtype(self.x.dtype())
        })?;
        let dgrid = ctx.grad(1, || {
            on_device!(
                grad,
                Self::NAME,
                self.on_cpu(grad, |x, grid, g| for_real!(g.dtype(), Self::NAME, T => {
                    cpu::grad_grid::<T>(x, grid, g, &self.options)
                })),
                gpu::grad_grid(&self.x, &self.grid, grad, &self.options),
                when gpu::fits(&self.x, &self.grid)
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
        let dtheta = on_device!(
            grad,
            Self::NAME,
            Tensor::in_f32([grad], |[g]| {
                for_real!(g.dtype(), Self::NAME, T => cpu::affine_backward::<T>(g, self.align_corners))
            }),
            gpu::affine_backward(grad, self.align_corners)
        )?;
        Ok(smallvec![Some(dtheta)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Rng, gradcheck};

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
    fn keeps_the_memory_order() -> Result<()> {
        let x = Tensor::randn([2, 3, 4, 5], &mut Rng::new(3))?;
        let grid = Tensor::rand([2, 6, 7, 2], &mut Rng::new(4))?.mul_scalar(2.6)?.add_scalar(-1.3)?;
        for dtype in [DType::F32, DType::BF16] {
            let run = |x: Tensor| -> Result<(Tensor, Tensor)> {
                let x = x.to_dtype(dtype)?.requires_grad();
                let y = x.grid_sample(&grid, &GridOptions::default())?;
                let grads = y.square()?.sum(())?.backward()?;
                Ok((y.detach(), grads.get(&x).cloned().expect("a gradient")))
            };
            let ((y, dx), (y_last, dx_last)) = (run(x.clone())?, run(x.to_channels_last()?)?);
            assert_eq!(y.strides(), [3 * 42, 42, 7, 1]);
            assert_eq!(y_last.strides(), [3 * 42, 1, 21, 3]);
            assert_eq!(dx_last.strides(), x.to_channels_last()?.strides());
            let values = |t: &Tensor| t.to_dtype(DType::F32)?.to_vec::<f32>();
            assert_eq!(values(&y)?, values(&y_last)?);
            assert_eq!(values(&dx)?, values(&dx_last)?);
        }
        Ok(())
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
