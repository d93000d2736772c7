//! Sliding windows as columns and back: each is the other's gradient.

use crate::{
    Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    ensure, for_real, on_device,
};
use smallvec::smallvec;

/// How a window moves over an image, and the image's size.
#[derive(Clone, Copy)]
struct Windows {
    image: [usize; 2],
    kernel: [usize; 2],
    dilation: [usize; 2],
    padding: [usize; 2],
    stride: [usize; 2],
    /// Positions of the window.
    count: [usize; 2],
}

impl Windows {
    #[track_caller]
    fn new(
        op: &'static str,
        image: [usize; 2],
        kernel: [usize; 2],
        dilation: [usize; 2],
        padding: [usize; 2],
        stride: [usize; 2],
    ) -> Result<Windows> {
        let mut count = [0; 2];
        for d in 0..2 {
            ensure!(
                kernel[d] > 0 && dilation[d] > 0 && stride[d] > 0,
                op,
                "kernel {kernel:?}, dilation {dilation:?} and stride {stride:?} must be positive"
            );
            let (padded, span) = (image[d] + 2 * padding[d], dilation[d] * (kernel[d] - 1) + 1);
            ensure!(
                padded >= span,
                op,
                "a window spans {span} pixels, the padded image {image:?} has {padded}"
            );
            count[d] = (padded - span) / stride[d] + 1;
        }
        Ok(Windows { image, kernel, dilation, padding, stride, count })
    }

    /// Positions along axis `d` whose tap `k` lies within the image, and the pixel of the first of them.
    fn inside(&self, d: usize, k: usize) -> (std::ops::Range<usize>, usize) {
        let at = k * self.dilation[d];
        let first = self.padding[d].saturating_sub(at).div_ceil(self.stride[d]);
        let end = (self.image[d] + self.padding[d]).saturating_sub(at).div_ceil(self.stride[d]);
        let range = first..end.min(self.count[d]).max(first);
        let pixel = if range.is_empty() { 0 } else { first * self.stride[d] + at - self.padding[d] };
        (range, pixel)
    }
}

impl Tensor {
    /// Windows of `[N, C, H, W]` as columns: `[N, C kh kw, L]`, L the number of positions in row-major order.
    /// Without N for rank 3.
    ///
    /// # Errors
    /// If the rank is neither 3 nor 4, or no window fits the padded image.
    #[track_caller]
    pub fn unfold(
        &self,
        kernel_size: [usize; 2],
        dilation: [usize; 2],
        padding: [usize; 2],
        stride: [usize; 2],
    ) -> Result<Tensor> {
        if self.rank() == 3 {
            return self.unsqueeze(0)?.unfold(kernel_size, dilation, padding, stride)?.squeeze(0);
        }
        let [_, _, h, w] = self.dims::<4>("unfold")?;
        unfold(self, Windows::new("unfold", [h, w], kernel_size, dilation, padding, stride)?)
    }

    /// Adds columns `[N, C kh kw, L]` back into an image `[N, C, H, W]` of `output_size` (H, W); where windows
    /// overlap, values are summed. Without N for rank 2.
    ///
    /// # Errors
    /// If the rank is neither 2 nor 3, or the sizes do not fit the windows.
    #[track_caller]
    pub fn fold(
        &self,
        output_size: [usize; 2],
        kernel_size: [usize; 2],
        dilation: [usize; 2],
        padding: [usize; 2],
        stride: [usize; 2],
    ) -> Result<Tensor> {
        if self.rank() == 2 {
            return self.unsqueeze(0)?.fold(output_size, kernel_size, dilation, padding, stride)?.squeeze(0);
        }
        let [_, rows, positions] = self.dims::<3>("fold")?;
        let windows = Windows::new("fold", output_size, kernel_size, dilation, padding, stride)?;
        let ([kh, kw], [ny, nx]) = (windows.kernel, windows.count);
        ensure!(
            rows % (kh * kw) == 0 && positions == ny * nx,
            "fold",
            "columns of shape {:?} need a multiple of {kh} x {kw} rows and {ny} x {nx} positions",
            self.shape()
        );
        fold(self, windows)
    }
}

fn unfold(x: &Tensor, windows: Windows) -> Result<Tensor> {
    const OP: &str = "unfold";
    let y = on_device!(
        x,
        OP,
        Tensor::in_f32([&x.detach()], |[x]| for_real!(x.dtype(), OP, T => Ok(cpu::unfold::<T>(x, &windows)))),
        gpu::unfold(OP, x, &windows)
    )?;
    y.record([x], Unfold { windows })
}

fn fold(x: &Tensor, windows: Windows) -> Result<Tensor> {
    const OP: &str = "fold";
    let y = on_device!(
        x,
        OP,
        Tensor::in_f32([&x.detach()], |[x]| for_real!(x.dtype(), OP, T => Ok(cpu::fold::<T>(x, &windows)))),
        gpu::fold(OP, x, &windows)
    )?;
    y.record([x], Fold { windows })
}

struct Unfold {
    windows: Windows,
}
impl Backward for Unfold {
    const NAME: &'static str = "unfold";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(fold(grad, self.windows)?)])
    }
}

struct Fold {
    windows: Windows,
}
impl Backward for Fold {
    const NAME: &'static str = "fold";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(unfold(grad, self.windows)?)])
    }
}

mod cpu {
    use super::*;
    use crate::{
        cpu::{
            parallel::{Shared, SharedMut, for_rows},
            pool::CpuVec,
        },
        dtype::Real,
    };

    pub fn unfold<T: Real>(x: &Tensor, win: &Windows) -> Tensor {
        let (n, c, [kh, kw], [ny, nx]) = (x.shape()[0], x.shape()[1], win.kernel, win.count);
        let (rows, s) = (c * kh * kw, x.strides());
        let mut out = CpuVec::<T>::new(n * rows * ny * nx);
        let (source, target) = (Shared(x.cpu_ptr::<T>()), SharedMut::new(&mut out));
        for_rows(n * rows, ny * nx, |range| {
            for row in range {
                let (image, channel, tap) = (row / rows, row % rows / (kh * kw), row % (kh * kw));
                let at = image as isize * s[0] + channel as isize * s[1];
                let out = unsafe { target.slice(row * ny * nx..(row + 1) * ny * nx) };
                out.fill(T::ZERO);
                let ((ys, y0), (xs, x0)) = (win.inside(0, tap / kw), win.inside(1, tap % kw));
                for (i, y) in ys.enumerate() {
                    let y0 = (y0 + i * win.stride[0]) as isize;
                    let from = unsafe { source.ptr().offset(at + y0 * s[2] + x0 as isize * s[3]) };
                    let step = win.stride[1] as isize * s[3];
                    for (i, to) in out[y * nx + xs.start..y * nx + xs.end].iter_mut().enumerate() {
                        *to = unsafe { *from.offset(i as isize * step) };
                    }
                }
            }
        });
        Tensor::from_cpu(out, [n, rows, ny * nx], "unfold")
    }

    pub fn fold<T: Real>(x: &Tensor, win: &Windows) -> Tensor {
        let ([h, w], [kh, kw], nx) = (win.image, win.kernel, win.count[1]);
        let (n, c, s) = (x.shape()[0], x.shape()[1] / (kh * kw), x.strides());
        let mut out = CpuVec::<T>::new(n * c * h * w);
        let (source, target) = (Shared(x.cpu_ptr::<T>()), SharedMut::new(&mut out));
        for_rows(n * c, h * w, |range| {
            for plane in range {
                let out = unsafe { target.slice(plane * h * w..(plane + 1) * h * w) };
                out.fill(T::ZERO);
                for tap in 0..kh * kw {
                    let row = (plane % c * kh * kw + tap) as isize;
                    let from = unsafe { source.ptr().offset((plane / c) as isize * s[0] + row * s[1]) };
                    let ((ys, y0), (xs, x0)) = (win.inside(0, tap / kw), win.inside(1, tap % kw));
                    for (i, y) in ys.enumerate() {
                        let out = &mut out[(y0 + i * win.stride[0]) * w..][..w];
                        for (j, x) in xs.clone().enumerate() {
                            let value = unsafe { *from.offset((y * nx + x) as isize * s[2]) };
                            out[x0 + j * win.stride[1]] += value;
                        }
                    }
                }
            }
        });
        Tensor::from_cpu(out, [n, c, h, w], "fold")
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;
    use crate::gpu::{self, sys};

    fn moving(win: &Windows) -> sys::smalti_windows {
        let wide = |v: [usize; 2]| v.map(|n| n as i64);
        sys::smalti_windows {
            kernel: wide(win.kernel),
            dilation: wide(win.dilation),
            padding: wide(win.padding),
            stride: wide(win.stride),
        }
    }

    #[track_caller]
    pub fn unfold(op: &'static str, x: &Tensor, win: &Windows) -> Result<Tensor> {
        ensure!(x.dtype().is_float(), op, "needs a float tensor, got {}", x.dtype());
        let (n, c, [kh, kw], [ny, nx]) = (x.shape()[0], x.shape()[1], win.kernel, win.count);
        // Columns are rows of pixels, of which there are many more than here: neighbours are best made neighbours first.
        let x = if x.strides()[3].abs() > 1 { x.detach().contiguous()? } else { x.clone() };
        let y = gpu::empty(&x, &[n, c * kh * kw, ny * nx], x.dtype(), op)?;
        gpu::launch(op, [&x, &y], |[x, y], stream| unsafe {
            sys::smalti_unfold(&x, &y, &moving(win), stream)
        })?;
        Ok(y)
    }

    #[track_caller]
    pub fn fold(op: &'static str, x: &Tensor, win: &Windows) -> Result<Tensor> {
        ensure!(x.dtype().is_float(), op, "needs a float tensor, got {}", x.dtype());
        let ([h, w], [kh, kw]) = (win.image, win.kernel);
        let y = gpu::empty(x, &[x.shape()[0], x.shape()[1] / (kh * kw), h, w], x.dtype(), op)?;
        gpu::launch(op, [x, &y], |[x, y], stream| unsafe { sys::smalti_fold(&x, &y, &moving(win), stream) })?;
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Rng, gradcheck};

    fn random(shape: &[usize], seed: u64) -> Result<Tensor> {
        Tensor::randn(shape, &mut Rng::new(seed))?.to_dtype(DType::F64)
    }

    #[test]
    fn convolution_by_columns() -> Result<()> {
        let (x, w) = (random(&[2, 3, 6, 5], 0)?, random(&[4, 3, 3, 2], 1)?);
        let columns = x.unfold([3, 2], [1, 2], [2, 1], [2, 1])?;
        let y = w.reshape([4, 18])?.matmul(&columns)?;
        let o = crate::ConvOptions { stride: [2, 1], padding: [2, 1], dilation: [1, 2], groups: 1 };
        let truth = x.conv2d(&w, None, o)?.to_vec::<f64>()?;
        assert!(y.to_vec::<f64>()?.iter().zip(&truth).all(|(a, b)| (a - b).abs() < 1e-12));
        Ok(())
    }

    #[test]
    fn each_is_the_others_gradient() -> Result<()> {
        let x = random(&[2, 5, 4, 3], 0)?;
        for x in [x.clone(), x.permute([0, 3, 1, 2])?] {
            gradcheck(|t| t[0].unfold([2, 3], [1, 1], [1, 1], [2, 1]), &[x])?;
        }
        let columns = random(&[2, 12, 6], 0)?;
        gradcheck(|t| t[0].fold([4, 3], [2, 2], [1, 1], [0, 0], [1, 1]), &[columns])?;
        let columns = random(&[8, 4], 0)?;
        gradcheck(|t| t[0].fold([4, 3], [2, 2], [2, 1], [1, 1], [2, 2]), &[columns.t()?.contiguous()?.t()?])
    }

    #[test]
    fn errors() -> Result<()> {
        let x = random(&[3, 4, 4], 0)?;
        assert_eq!(x.unfold([2, 2], [1, 1], [0, 0], [2, 2])?.shape(), [12, 4]);
        assert!(x.unfold([5, 5], [1, 1], [0, 0], [1, 1]).is_err());
        assert!(x.unfold([2, 2], [1, 1], [0, 0], [0, 1]).is_err());
        assert!(x.fold([4, 4], [2, 2], [1, 1], [0, 0], [1, 1]).is_err());
        Ok(())
    }
}
