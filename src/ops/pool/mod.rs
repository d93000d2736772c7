//! Pooling of images: largest element or mean of windows, of fixed size or adapted to the size of the result.

mod cpu;
#[cfg(gpu)]
mod gpu;
mod windows;

use crate::{
    DType, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    ensure, for_real, on_device,
};
use smallvec::smallvec;
use std::sync::Arc;
use windows::Windows;

/// How a pooling window moves. Pairs are (height, width).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PoolOptions {
    /// Size of the window.
    pub kernel_size: [usize; 2],
    /// Pixels from window to window.
    pub stride: [usize; 2],
    /// Border on each side, at most half the window: never the largest element; zeros for means.
    pub padding: [usize; 2],
    /// Pixels from element to element of a window (max_pool2d only).
    pub dilation: [usize; 2],
    /// Keep a last window that sticks out at the bottom or right, if it starts within the image or the padding
    /// before it.
    pub ceil_mode: bool,
}

impl PoolOptions {
    /// A square window with this stride and padding.
    pub fn new(kernel_size: usize, stride: usize, padding: usize) -> Self {
        PoolOptions {
            kernel_size: [kernel_size; 2],
            stride: [stride; 2],
            padding: [padding; 2],
            dilation: [1, 1],
            ceil_mode: false,
        }
    }
}

/// By what [`Tensor::avg_pool2d`] divides a window's sum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PoolDivisor {
    /// The elements of the window, those of the padding too.
    WithPadding,
    /// The elements of the window that lie within the image.
    WithoutPadding,
    /// This number.
    Fixed(usize),
}

impl Tensor {
    /// Largest element of each window of `[N, C, H, W]` or `[C, H, W]`. The gradient goes to the first of equal
    /// elements. NaN wins. The result has the input's memory order, NCHW or NHWC.
    ///
    /// # Errors
    /// If the rank is neither 3 nor 4, or the window does not fit.
    #[track_caller]
    pub fn max_pool2d(&self, options: PoolOptions) -> Result<Tensor> {
        Ok(max("max_pool2d", self, |size| Windows::moving("max_pool2d", size, options))?.0)
    }

    /// [`max_pool2d`](Self::max_pool2d) and where each element stands in the flattened H x W plane, i64.
    ///
    /// # Errors
    /// As `max_pool2d`.
    #[track_caller]
    pub fn max_pool2d_with_indices(&self, options: PoolOptions) -> Result<(Tensor, Tensor)> {
        let (y, at) = max("max_pool2d", self, |size| Windows::moving("max_pool2d", size, options))?;
        Ok((y, at.to_dtype(DType::I64)?))
    }

    /// Largest element of each of `output_size` windows that cover the image evenly: window i of n takes
    /// `floor(i size / n) .. ceil((i + 1) size / n)`.
    ///
    /// # Errors
    /// If the rank is neither 3 nor 4, or the image is empty.
    #[track_caller]
    pub fn adaptive_max_pool2d(&self, output_size: [usize; 2]) -> Result<Tensor> {
        Ok(self.adaptive_max(output_size)?.0)
    }

    /// [`adaptive_max_pool2d`](Self::adaptive_max_pool2d) and where each element stands in the H x W plane, i64.
    ///
    /// # Errors
    /// As `adaptive_max_pool2d`.
    #[track_caller]
    pub fn adaptive_max_pool2d_with_indices(&self, output_size: [usize; 2]) -> Result<(Tensor, Tensor)> {
        let (y, at) = self.adaptive_max(output_size)?;
        Ok((y, at.to_dtype(DType::I64)?))
    }

    #[track_caller]
    fn adaptive_max(&self, output_size: [usize; 2]) -> Result<(Tensor, Tensor)> {
        max("adaptive_max_pool2d", self, |size| Windows::adaptive("adaptive_max_pool2d", size, output_size))
    }

    /// Mean of each window of `[N, C, H, W]` or `[C, H, W]`.
    ///
    /// # Errors
    /// If the rank is neither 3 nor 4, the window does not fit, it is dilated, or the divisor is 0.
    #[track_caller]
    pub fn avg_pool2d(&self, options: PoolOptions, divisor: PoolDivisor) -> Result<Tensor> {
        const OP: &str = "avg_pool2d";
        ensure!(options.dilation == [1, 1], OP, "has no dilation, got {:?}", options.dilation);
        ensure!(divisor != PoolDivisor::Fixed(0), OP, "the divisor is 0");
        let image = image(OP, self)?;
        let size = [image.shape()[2], image.shape()[3]];
        let windows = Windows::moving(OP, size, options)?.divided(divisor);
        like(self, average(OP, &image, &Arc::new(windows), false)?)
    }

    /// Mean of each of `output_size` windows that cover the image evenly, as
    /// [`adaptive_max_pool2d`](Self::adaptive_max_pool2d) has them.
    ///
    /// # Errors
    /// If the rank is neither 3 nor 4, or the image is empty.
    #[track_caller]
    pub fn adaptive_avg_pool2d(&self, output_size: [usize; 2]) -> Result<Tensor> {
        const OP: &str = "adaptive_avg_pool2d";
        let image = image(OP, self)?;
        let size = [image.shape()[2], image.shape()[3]];
        let windows = Windows::adaptive(OP, size, output_size)?.divided(PoolDivisor::WithoutPadding);
        like(self, average(OP, &image, &Arc::new(windows), false)?)
    }
}

/// The tensor with a batch dimension.
#[track_caller]
fn image(op: &'static str, x: &Tensor) -> Result<Tensor> {
    ensure!(matches!(x.rank(), 3 | 4), op, "needs shape [N, C, H, W] or [C, H, W], got {:?}", x.shape());
    ensure!(x.dtype().is_float(), op, "needs a float tensor, got {}", x.dtype());
    if x.rank() == 3 { x.unsqueeze(0) } else { Ok(x.clone()) }
}

/// Without the batch dimension if `x` had none.
fn like(x: &Tensor, y: Tensor) -> Result<Tensor> {
    if x.rank() == 3 { y.squeeze(0) } else { Ok(y) }
}

#[track_caller]
fn max(
    op: &'static str,
    x: &Tensor,
    windows: impl FnOnce([usize; 2]) -> Result<Windows>,
) -> Result<(Tensor, Tensor)> {
    let image = image(op, x)?;
    let size = [image.shape()[2], image.shape()[3]];
    ensure!(size[0] * size[1] < i32::MAX as usize, op, "the image {size:?} is too large");
    let windows = Arc::new(windows(size)?);
    let (y, indices) = on_device!(image, op, largest(op, &image, &windows), gpu::max(op, &image, &windows))?;
    let y = y.record([&image], MaxPool { indices: indices.clone(), windows })?;
    Ok((like(x, y)?, like(x, indices)?))
}

/// The CPU's result and indices.
fn largest(op: &'static str, image: &Tensor, windows: &Windows) -> Result<(Tensor, Tensor)> {
    let mut indices = None;
    let y = Tensor::in_f32([&image.detach()], |[x]| {
        for_real!(x.dtype(), op, T => {
            let (y, at) = cpu::max::<T>(op, x, windows);
            indices = Some(at);
            Ok(y)
        })
    })?;
    Ok((y, super::binary::kept(op, &indices)?.clone()))
}

struct MaxPool {
    indices: Tensor,
    windows: Arc<Windows>,
}
impl Backward for MaxPool {
    const NAME: &'static str = "max pooling";
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        let (at, windows) = (&self.indices, &self.windows);
        let dx = on_device!(
            grad,
            Self::NAME,
            Tensor::in_f32([grad], |[g]| for_real!(g.dtype(), Self::NAME, T => {
                Ok(cpu::max_backward::<T>(Self::NAME, g, at, windows))
            })),
            gpu::max_backward(Self::NAME, grad, at, windows)
        )?;
        Ok(smallvec![Some(dx)])
    }
}

/// Means of windows, or (`back`) the gradient of that: each is the other's.
#[track_caller]
fn average(op: &'static str, x: &Tensor, windows: &Arc<Windows>, back: bool) -> Result<Tensor> {
    if back && windows.global() {
        let [n, c, ..] = x.dims::<4>(op)?;
        let [h, w] = windows.size();
        return x.mul_scalar(1.0 / windows.weight(0, 0) as f64)?.expand([n, c, h, w]);
    }
    let y = on_device!(
        x,
        op,
        Tensor::in_f32([&x.detach()], |[x]| for_real!(x.dtype(), op, T => Ok(if back {
            cpu::average_backward::<T>(op, x, windows)
        } else {
            cpu::average::<T>(op, x, windows)
        }))),
        gpu::average(op, &x.detach(), windows, back)
    )?;
    y.record([x], Average { windows: windows.clone(), back })
}

struct Average {
    windows: Arc<Windows>,
    back: bool,
}
impl Backward for Average {
    const NAME: &'static str = "mean pooling";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(average(Self::NAME, grad, &self.windows, !self.back)?)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Rng, gradcheck};

    fn random(shape: &[usize], seed: u64) -> Result<Tensor> {
        Tensor::randn(shape, &mut Rng::new(seed))?.to_dtype(DType::F64)
    }

    fn options() -> [PoolOptions; 4] {
        let o = PoolOptions::new(3, 2, 1);
        [
            o,
            PoolOptions { ceil_mode: true, padding: [0, 1], ..o },
            PoolOptions { kernel_size: [2, 3], stride: [1, 3], ..o },
            PoolOptions { dilation: [2, 1], stride: [1, 1], ..o },
        ]
    }

    fn inputs() -> Result<[Tensor; 3]> {
        let x = random(&[2, 3, 7, 6], 1)?;
        Ok([x.clone(), x.to_channels_last()?, random(&[1, 3, 7, 1], 2)?.expand([2, 3, 7, 6])?])
    }

    #[test]
    fn gradients() -> Result<()> {
        for x in &inputs()?[..2] {
            for o in options() {
                gradcheck(|t| t[0].max_pool2d(o), &[x.clone()])?;
                if o.dilation == [1, 1] {
                    for divisor in
                        [PoolDivisor::WithPadding, PoolDivisor::WithoutPadding, PoolDivisor::Fixed(5)]
                    {
                        gradcheck(|t| t[0].avg_pool2d(o, divisor), &[x.clone()])?;
                    }
                }
            }
            for size in [[1, 1], [3, 4], [8, 6]] {
                gradcheck(|t| t[0].adaptive_avg_pool2d(size), &[x.clone()])?;
                gradcheck(|t| t[0].adaptive_max_pool2d(size), &[x.clone()])?;
            }
        }
        Ok(())
    }

    #[test]
    fn memory_order_does_not_matter() -> Result<()> {
        for x in inputs()? {
            let y = x.contiguous()?;
            for o in options() {
                let ((a, i), (b, j)) = (x.max_pool2d_with_indices(o)?, y.max_pool2d_with_indices(o)?);
                assert_eq!(
                    (a.to_vec::<f64>()?, i.to_vec::<i64>()?),
                    (b.to_vec::<f64>()?, j.to_vec::<i64>()?)
                );
            }
            assert_eq!(
                x.adaptive_avg_pool2d([2, 3])?.to_vec::<f64>()?,
                y.adaptive_avg_pool2d([2, 3])?.to_vec::<f64>()?
            );
        }
        let last = random(&[2, 3, 7, 6], 1)?.to_channels_last()?.max_pool2d(PoolOptions::new(2, 2, 0))?;
        assert_eq!(last.strides()[1], 1, "channels-last stays channels-last");
        Ok(())
    }

    #[test]
    fn small_values_by_hand() -> Result<()> {
        let x = Tensor::arange(16, DType::F32)?.reshape([1, 4, 4])?;
        let (y, at) = x.max_pool2d_with_indices(PoolOptions::new(2, 2, 0))?;
        assert_eq!((y.to_vec::<f32>()?, at.to_vec::<i64>()?), (vec![5., 7., 13., 15.], vec![5, 7, 13, 15]));
        let mean = x.avg_pool2d(PoolOptions::new(3, 3, 1), PoolDivisor::WithPadding)?;
        assert_eq!(mean.to_vec::<f32>()?, [10. / 9., 2., 42. / 9., 50. / 9.]);
        Ok(())
    }

    #[test]
    fn errors() -> Result<()> {
        let x = random(&[3, 4, 4], 1)?;
        assert!(x.max_pool2d(PoolOptions::new(5, 1, 0)).is_err());
        assert!(x.max_pool2d(PoolOptions::new(2, 1, 2)).is_err());
        assert!(x.max_pool2d(PoolOptions::new(2, 0, 0)).is_err());
        assert!(x.select(0, 0)?.max_pool2d(PoolOptions::new(2, 1, 0)).is_err());
        assert!(x.avg_pool2d(PoolOptions::new(2, 2, 0), PoolDivisor::Fixed(0)).is_err());
        assert!(x.adaptive_avg_pool2d([0, 2])?.numel() == 0);
        assert!(x.narrow(1, 0, 0)?.adaptive_avg_pool2d([1, 1]).is_err());
        Ok(())
    }
}
