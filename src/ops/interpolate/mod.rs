//! Resizing of images. Every mode is separable and linear: along each axis an output element is a weighted sum
//! of consecutive input elements. So there is one table an axis ([`table`]), one loop, and the
//! gradient is the same loop with the transposed tables.

mod cpu;
#[cfg(gpu)]
mod gpu;
mod table;

use crate::{
    Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    ensure, for_real, on_device,
};
use smallvec::smallvec;
use std::sync::Arc;
use table::Axis;

/// How values between pixels come about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Interpolation {
    /// Pixel floor(i * in/out).
    Nearest,
    /// Pixel floor((i + 0.5) * in/out), the true nearest.
    NearestExact,
    /// Linear in both directions.
    #[default]
    Bilinear,
    /// Cubic convolution in both directions, coefficient -0.75 (with antialiasing -0.5).
    Bicubic,
    /// Mean over the pixels that the output pixel covers.
    Area,
}

/// Options of [`Tensor::interpolate`].
#[derive(Clone, Copy, Debug, Default)]
pub struct InterpolateOptions {
    /// How values between pixels come about.
    pub mode: Interpolation,
    /// Do the centres of the corner pixels coincide, instead of the images' edges? Bilinear and bicubic only.
    pub align_corners: bool,
    /// Widen the kernel where the image shrinks. Bilinear and bicubic only.
    pub antialias: bool,
}

/// The size to resize to, (height, width).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OutputSize {
    /// Exactly this.
    Pixels([usize; 2]),
    /// floor(in * factor); coordinates are computed with the factor itself.
    Factor([f64; 2]),
    /// floor(in * factor); coordinates are computed with out/in (PyTorch's `recompute_scale_factor`).
    RoundedFactor([f64; 2]),
}

impl Tensor {
    /// Resizes images `[N, C, H, W]` to `[N, C, H', W']`. Channels-last input gives channels-last output.
    ///
    /// # Errors
    /// If the rank is not 4, the input or output has no pixels, or an option does not go with the mode.
    #[track_caller]
    pub fn interpolate(&self, size: OutputSize, options: &InterpolateOptions) -> Result<Tensor> {
        const OP: &str = "interpolate";
        let [_, _, h, w] = self.dims(OP)?;
        let smooth = matches!(options.mode, Interpolation::Bilinear | Interpolation::Bicubic);
        ensure!(
            smooth || !(options.align_corners || options.antialias),
            OP,
            "align_corners and antialias go with bilinear and bicubic, not with {:?}",
            options.mode
        );
        let axis = |d: usize, input: usize| -> Result<Axis> {
            let (output, factor) = match size {
                OutputSize::Pixels(pixels) => (pixels[d], None),
                OutputSize::Factor(f) => (scaled(input, f[d])?, Some(f[d])),
                OutputSize::RoundedFactor(f) => (scaled(input, f[d])?, None),
            };
            ensure!(input > 0 && output > 0, OP, "from {h} x {w} pixels to {size:?}");
            ensure!(output <= 1 << 24, OP, "{size:?} is too large");
            Ok(Axis::new(input, output, factor, options))
        };
        let rows = axis(0, h)?;
        let columns = axis(1, w)?;
        resample(self, Arc::new(rows), Arc::new(columns))
    }
}

#[track_caller]
fn scaled(input: usize, factor: f64) -> Result<usize> {
    ensure!(factor.is_finite() && factor > 0.0, "interpolate", "the scale factor is {factor}");
    Ok((input as f64 * factor).floor() as usize)
}

/// Both axes of `x` `[N, C, H, W]`.
fn resample(x: &Tensor, rows: Arc<Axis>, columns: Arc<Axis>) -> Result<Tensor> {
    const OP: &str = "interpolate";
    let y = on_device!(
        x,
        OP,
        Tensor::in_f32([&x.detach()], |[x]| for_real!(x.dtype(), OP, T => {
            cpu::resample::<T>(x, rows.table(), columns.table())
        })),
        gpu::resample(OP, x, &rows, &columns)
    )?;
    y.record([x], Resample { rows, columns })
}

struct Resample {
    rows: Arc<Axis>,
    columns: Arc<Axis>,
}

impl Backward for Resample {
    const NAME: &'static str = "interpolate";
    const TWICE: bool = true;

    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        let (rows, columns) = (Arc::new(self.rows.transposed()), Arc::new(self.columns.transposed()));
        Ok(smallvec![Some(resample(grad, rows, columns)?)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Rng, gradcheck};

    const MODES: [Interpolation; 5] = [
        Interpolation::Nearest,
        Interpolation::NearestExact,
        Interpolation::Bilinear,
        Interpolation::Bicubic,
        Interpolation::Area,
    ];

    #[test]
    fn gradients_of_every_mode() -> Result<()> {
        let mut rng = Rng::new(3);
        let x = Tensor::randn([2, 3, 4, 5], &mut rng)?.to_dtype(DType::F64)?;
        for mode in MODES {
            let smooth = matches!(mode, Interpolation::Bilinear | Interpolation::Bicubic);
            for (align_corners, antialias) in [(false, false), (true, false), (false, true)] {
                if !smooth && (align_corners || antialias) {
                    continue;
                }
                let options = InterpolateOptions { mode, align_corners, antialias };
                for size in [OutputSize::Pixels([7, 3]), OutputSize::Factor([0.6, 1.7])] {
                    for x in [&x, &x.to_channels_last()?, &x.permute([0, 1, 3, 2])?, &x.narrow(2, 0, 1)?] {
                        gradcheck(|t| t[0].interpolate(OutputSize::Pixels([2, 6]), &options), &[x.clone()])?;
                        if x.shape()[2] > 1 {
                            gradcheck(|t| t[0].interpolate(size, &options), &[x.clone()])?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn layouts_and_dtypes_agree() -> Result<()> {
        let x = Tensor::randn([2, 3, 9, 7], &mut Rng::new(1))?;
        for mode in MODES {
            let options = InterpolateOptions { mode, ..Default::default() };
            let size = OutputSize::Pixels([5, 11]);
            let y = x.interpolate(size, &options)?;
            let last = x.to_channels_last()?.interpolate(size, &options)?;
            assert_eq!(last.strides()[1], 1);
            let close = |a: &Tensor, b: &Tensor, tolerance: f32| -> Result<()> {
                for (a, b) in a.to_vec::<f32>()?.iter().zip(b.to_vec::<f32>()?) {
                    assert!((a - b).abs() <= tolerance, "{mode:?}: {a} {b}");
                }
                Ok(())
            };
            close(&y, &last, 1e-6)?;
            let half = x.to_dtype(DType::BF16)?.interpolate(size, &options)?;
            close(&y, &half.to_dtype(DType::F32)?, 0.05)?;
            let same = x.interpolate(OutputSize::Pixels([9, 7]), &options)?;
            close(&x, &same, 0.0)?;
        }
        Ok(())
    }

    #[test]
    fn bad_arguments() -> Result<()> {
        let x = Tensor::ones([1, 1, 2, 2], DType::F32)?;
        let options = InterpolateOptions::default();
        assert!(x.interpolate(OutputSize::Pixels([0, 2]), &options).is_err());
        assert!(x.interpolate(OutputSize::Factor([0.1, 1.0]), &options).is_err());
        assert!(x.interpolate(OutputSize::Factor([f64::NAN, 1.0]), &options).is_err());
        assert!(x.reshape([2, 2])?.interpolate(OutputSize::Pixels([1, 1]), &options).is_err());
        let wrong =
            InterpolateOptions { mode: Interpolation::Nearest, align_corners: true, antialias: false };
        assert!(x.interpolate(OutputSize::Pixels([3, 3]), &wrong).is_err());
        let none =
            Tensor::ones([0, 3, 2, 2], DType::F32)?.interpolate(OutputSize::Pixels([4, 4]), &options)?;
        assert_eq!(none.shape(), [0, 3, 4, 4]);
        Ok(())
    }
}
