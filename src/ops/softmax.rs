//! Softmax and its logarithm over one dimension.

use crate::{
    Dim, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    for_float, on_device,
};
use smallvec::smallvec;

impl Tensor {
    /// `e^x / sum(e^x)` over `dim`. A slice that is -infinity throughout gives NaN. Saves: its output.
    ///
    /// # Errors
    /// If the dimension does not exist, or the dtype is not a float.
    #[track_caller]
    pub fn softmax(&self, dim: impl Dim) -> Result<Tensor> {
        let dim = dim.of("softmax", self)?;
        apply::<false>(self, dim)
    }

    /// `x - log(sum(e^x))` over `dim`. Saves: its output.
    ///
    /// # Errors
    /// If the dimension does not exist, or the dtype is not a float.
    #[track_caller]
    pub fn log_softmax(&self, dim: impl Dim) -> Result<Tensor> {
        let dim = dim.of("log_softmax", self)?;
        apply::<true>(self, dim)
    }
}

const fn name(log: bool) -> &'static str {
    if log { "log_softmax" } else { "softmax" }
}

#[track_caller]
fn apply<const LOG: bool>(x: &Tensor, dim: usize) -> Result<Tensor> {
    let op = name(LOG);
    let y = on_device!(
        x,
        op,
        for_float!(x.dtype(), op, T => cpu::forward::<T, LOG>(x, dim)),
        gpu::forward::<LOG>(x, dim)
    )?;
    let saved = y.clone();
    y.record([x], Softmax::<LOG> { y: saved, dim })
}

struct Softmax<const LOG: bool> {
    y: Tensor,
    dim: usize,
}

/// softmax: dx = y * (dy - sum(dy * y)); log_softmax: dx = dy - e^y * sum(dy).
impl<const LOG: bool> Backward for Softmax<LOG> {
    const NAME: &'static str = name(LOG);

    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        let dx = on_device!(
            grad,
            Self::NAME,
            for_float!(grad.dtype(), Self::NAME, T => cpu::backward::<T, LOG>(&self.y, grad, self.dim)),
            gpu::backward::<LOG>(&self.y, grad, self.dim)
        )?;
        Ok(smallvec![Some(dx)])
    }
}

mod cpu {
    use super::*;
    use crate::{
        cpu::{
            axis::Axis,
            parallel::{SharedMut, for_rows},
            pool::CpuVec,
            rows,
            simd::simd_of,
        },
        dtype::{Float, Real},
    };

    /// Columns that are worked on together where the dimension is not the innermost.
    const COLUMNS: usize = 64;

    pub fn forward<T: Float, const LOG: bool>(x: &Tensor, dim: usize) -> Result<Tensor> {
        let axis = Axis::of(x, dim);
        let x = axis.view(x)?;
        let xs = x.cpu_slice::<T>();
        let mut out = CpuVec::<T>::new(xs.len());
        let target = SharedMut::new(&mut out);
        let n = axis.n;
        if axis.inner == 1 {
            for_rows(axis.outer, n * 8, |range| {
                for row in range {
                    let at = row * n..(row + 1) * n;
                    let (x, y) = (&xs[at.clone()], unsafe { target.slice(at) });
                    simd_of::<T, _>(
                        #[inline(always)]
                        || forward_row::<T, LOG>(x, y),
                    );
                }
            });
        } else {
            for_columns(&axis, |at, step, width| {
                let (x, y) = (unsafe { xs.as_ptr().add(at) }, unsafe { target.ptr().add(at) });
                simd_of::<T, _>(
                    #[inline(always)]
                    || unsafe { forward_columns::<T, LOG>(x, y, n, step, width) },
                );
            });
        }
        Ok(axis.tensor(out, name(LOG)))
    }

    /// `f(start, step, width)` for groups of neighbouring columns.
    fn for_columns(axis: &Axis, f: impl Fn(usize, usize, usize) + Sync) {
        let (n, inner) = (axis.n, axis.inner);
        let groups = inner.div_ceil(COLUMNS);
        for_rows(axis.outer * groups, n * COLUMNS * 8, |range| {
            for task in range {
                let column = task % groups * COLUMNS;
                f(task / groups * n * inner + column, inner, COLUMNS.min(inner - column));
            }
        });
    }

    #[inline(always)]
    fn forward_row<T: Float, const LOG: bool>(x: &[T], y: &mut [T]) {
        let n = x.len();
        let y = &mut y[..n];
        let max = rows::max(x);
        if LOG {
            let shift = rows::exp_sum(x, max).ln();
            for i in 0..n {
                y[i] = T::store(x[i].acc() - max - shift);
            }
        } else if T::DTYPE.is_half() {
            // Half types would round twice if the row were kept in the output meanwhile.
            let scale = T::Acc::ONE / rows::exp_sum(x, max);
            for i in 0..n {
                y[i] = T::store((x[i].acc() - max).exp_low() * scale);
            }
        } else {
            let sum = rows::sum_of(
                n,
                #[inline(always)]
                |i| unsafe {
                    let e = (x.get_unchecked(i).acc() - max).exp_low();
                    *y.get_unchecked_mut(i) = T::store(e);
                    e
                },
            );
            let scale = T::Acc::ONE / sum;
            for y in y {
                *y = T::store(y.acc() * scale);
            }
        }
    }

    /// Columns `0..width`, side by side; rows of the dimension lie `step` apart.
    #[inline(always)]
    unsafe fn forward_columns<T: Float, const LOG: bool>(
        x: *const T,
        y: *mut T,
        n: usize,
        step: usize,
        width: usize,
    ) {
        let mut max = [T::Acc::NEG_INF; COLUMNS];
        let mut sum = [T::Acc::ZERO; COLUMNS];
        let (max, sum) = (&mut max[..width], &mut sum[..width]);
        let row = |k: usize| unsafe { std::slice::from_raw_parts(x.add(k * step), width) };
        for k in 0..n {
            let x = row(k);
            for i in 0..width {
                let v = x[i].acc();
                max[i] = if v > max[i] { v } else { max[i] };
            }
        }
        for k in 0..n {
            let x = row(k);
            for i in 0..width {
                sum[i] += (x[i].acc() - max[i]).exp_low();
            }
        }
        for i in 0..width {
            sum[i] = if LOG { sum[i].ln() } else { T::Acc::ONE / sum[i] };
        }
        for k in 0..n {
            let x = row(k);
            let y = unsafe { std::slice::from_raw_parts_mut(y.add(k * step), width) };
            for i in 0..width {
                let shifted = x[i].acc() - max[i];
                y[i] = T::store(if LOG { shifted - sum[i] } else { shifted.exp_low() * sum[i] });
            }
        }
    }

    pub fn backward<T: Float, const LOG: bool>(y: &Tensor, grad: &Tensor, dim: usize) -> Result<Tensor> {
        let axis = Axis::of(y, dim);
        let (y, grad) = (axis.view(y)?, axis.view(grad)?);
        let (ys, gs) = (y.cpu_slice::<T>(), grad.cpu_slice::<T>());
        let mut out = CpuVec::<T>::new(ys.len());
        let target = SharedMut::new(&mut out);
        let n = axis.n;
        if axis.inner == 1 {
            for_rows(axis.outer, n * 2, |range| {
                for row in range {
                    let at = row * n..(row + 1) * n;
                    let (y, g, dx) = (&ys[at.clone()], &gs[at.clone()], unsafe { target.slice(at) });
                    simd_of::<T, _>(
                        #[inline(always)]
                        || {
                            let sum = rows::sum_of(
                                n,
                                #[inline(always)]
                                |i| unsafe { share::<T, LOG>(*y.get_unchecked(i), *g.get_unchecked(i)) },
                            );
                            for i in 0..n {
                                dx[i] = slope::<T, LOG>(y[i], g[i], sum);
                            }
                        },
                    );
                }
            });
        } else {
            for_columns(&axis, |at, step, width| {
                let (y, g) = (&ys[at..], &gs[at..]);
                simd_of::<T, _>(
                    #[inline(always)]
                    || {
                        let mut sum = [T::Acc::ZERO; COLUMNS];
                        let sum = &mut sum[..width];
                        for k in 0..n {
                            let (y, g) = (&y[k * step..k * step + width], &g[k * step..k * step + width]);
                            for i in 0..width {
                                sum[i] += share::<T, LOG>(y[i], g[i]);
                            }
                        }
                        for k in 0..n {
                            let (y, g) = (&y[k * step..k * step + width], &g[k * step..k * step + width]);
                            let dx = unsafe { target.slice(at + k * step..at + k * step + width) };
                            for i in 0..width {
                                dx[i] = slope::<T, LOG>(y[i], g[i], sum[i]);
                            }
                        }
                    },
                );
            });
        }
        Ok(axis.tensor(out, name(LOG)))
    }

    #[inline(always)]
    fn share<T: Float, const LOG: bool>(y: T, g: T) -> T::Acc {
        if LOG { g.acc() } else { g.acc() * y.acc() }
    }

    #[inline(always)]
    fn slope<T: Float, const LOG: bool>(y: T, g: T, sum: T::Acc) -> T {
        T::store(if LOG { g.acc() - y.acc().exp() * sum } else { y.acc() * (g.acc() - sum) })
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;
    use crate::{
        cpu::axis::Axis,
        gpu::{self, sys},
    };

    #[track_caller]
    pub fn forward<const LOG: bool>(x: &Tensor, dim: usize) -> Result<Tensor> {
        let op = name(LOG);
        crate::ensure!(x.dtype().is_float(), op, "needs a float tensor, got {}", x.dtype());
        let y = gpu::empty_strided(x, x.shape(), Axis::of(x, dim).strides(), x.dtype(), op)?;
        gpu::launch(op, [x, &y], |[x, y], stream| unsafe {
            sys::smalti_softmax_forward(&x, &y, dim as i32, i32::from(LOG), stream)
        })?;
        Ok(y)
    }

    #[track_caller]
    pub fn backward<const LOG: bool>(y: &Tensor, grad: &Tensor, dim: usize) -> Result<Tensor> {
        let op = name(LOG);
        let dx = gpu::empty_strided(y, y.shape(), Axis::of(y, dim).strides(), y.dtype(), op)?;
        gpu::launch(op, [y, grad, &dx], |[y, grad, dx], stream| unsafe {
            sys::smalti_softmax_backward(&y, &grad, &dx, dim as i32, i32::from(LOG), stream)
        })?;
        Ok(dx)
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
    fn gradients() -> Result<()> {
        let x = random(&[3, 5, 4], 1)?;
        let inputs = [
            x.clone(),
            x.permute([2, 0, 1])?,
            random(&[1, 5, 1], 2)?.expand([2, 5, 3])?,
            random(&[2, 18, 1], 3)?.narrow(1, 1, 17)?,
        ];
        for x in &inputs {
            for dim in 0..3 {
                gradcheck(|t| t[0].softmax(dim), &[x.clone()])?;
                gradcheck(|t| t[0].log_softmax(dim), &[x.clone()])?;
            }
        }
        // more columns than one group
        gradcheck(|t| t[0].softmax(0), &[random(&[2, 70], 4)?])
    }

    #[test]
    fn layouts_agree() -> Result<()> {
        let x = random(&[2, 37, 3, 70], 1)?.to_dtype(DType::F32)?;
        let y = x.softmax(1)?;
        let last = x.to_channels_last()?.softmax(1)?;
        assert_eq!(last.strides(), x.to_channels_last()?.strides(), "the memory order is kept");
        for (a, b) in y.to_vec::<f32>()?.iter().zip(last.to_vec::<f32>()?) {
            assert!((a - b).abs() <= 1e-6 * b);
        }
        for sum in y.sum(1)?.to_vec::<f32>()? {
            assert!((sum - 1.0).abs() < 1e-6);
        }
        Ok(())
    }

    #[test]
    fn edges() -> Result<()> {
        let inf = f32::INFINITY;
        let x = Tensor::from_slice(&[1e4f32, -1e4, -inf, -inf, -inf, -inf], [2, 3])?;
        let y = x.softmax(1)?.to_vec::<f32>()?;
        assert_eq!(y[..3], [1.0, 0.0, 0.0]);
        assert!(y[3].is_nan(), "no element to attend to");
        assert_eq!(Tensor::scalar(3.0).softmax(0)?.item()?, 1.0);
        assert_eq!(Tensor::zeros([0, 3], DType::F32)?.softmax(0)?.shape(), [0, 3]);
        assert_eq!(Tensor::zeros([3, 0], DType::F32)?.log_softmax(0)?.shape(), [3, 0]);
        assert!(x.softmax(2).is_err() && Tensor::arange(3, DType::I64)?.softmax(0).is_err());
        for dtype in [DType::BF16, DType::F16] {
            let y = Tensor::arange(5, dtype)?.softmax(0)?;
            let sum: f64 = y.to_dtype(DType::F64)?.to_vec::<f64>()?.iter().sum();
            assert!(y.dtype() == dtype && (sum - 1.0).abs() < 1e-2);
        }
        Ok(())
    }
}
