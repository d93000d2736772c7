//! Vectors to unit norm.

use crate::{
    Dim, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    ensure, for_float, on_device,
};
use smallvec::smallvec;

impl Tensor {
    /// `x / max(|x|_p, eps)` along `dim`. Where eps bounds the norm, the gradient takes it for a constant too.
    /// Saves: its input and the norms.
    ///
    /// # Errors
    /// If the dimension does not exist, p is not positive and finite, or the dtype is not a float.
    #[track_caller]
    pub fn normalize(&self, p: f64, dim: impl Dim, eps: f64) -> Result<Tensor> {
        let dim = dim.of(OP, self)?;
        ensure!(p > 0.0 && p.is_finite(), OP, "needs a positive, finite p, got {p}");
        let x = rows(self, dim)?;
        let (y, norm) = on_device!(
            x,
            OP,
            for_float!(x.dtype(), OP, T => Ok(cpu::forward::<T>(&x, p, eps))),
            gpu::forward(&x, p, eps)
        )?;
        back(y, dim)?.record([self], Normalize { x, norm, p, dim, eps })
    }
}

const OP: &str = "normalize";

/// The vectors as contiguous rows, untracked.
fn rows(x: &Tensor, dim: usize) -> Result<Tensor> {
    x.detach().transpose(dim, -1)?.contiguous()
}

/// The way back.
fn back(rows: Tensor, dim: usize) -> Result<Tensor> {
    rows.transpose(dim, -1)
}

struct Normalize {
    x: Tensor,
    norm: Tensor,
    p: f64,
    dim: usize,
    eps: f64,
}

/// With n = |x|_p: dx = dy / n - sum(dy * x) / n^2 * dn/dx, dn/dx = sign(x) * (|x| / n)^(p - 1).
impl Backward for Normalize {
    const NAME: &'static str = OP;

    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        let grad = rows(grad, self.dim)?;
        let dx = on_device!(
            grad,
            Self::NAME,
            for_float!(grad.dtype(), Self::NAME, T => Ok(cpu::backward::<T>(self, &grad))),
            gpu::backward(self, &grad)
        )?;
        Ok(smallvec![Some(back(dx, self.dim)?)])
    }
}

mod cpu {
    use super::*;
    use crate::{
        cpu::{
            parallel::{SharedMut, for_rows},
            pool::CpuVec,
            rows::sum_of,
            simd::simd,
        },
        dtype::{Float, Real},
    };

    #[inline(always)]
    fn norm<T: Float>(x: &[T], p: f64) -> T::Acc {
        let value = |i: usize| unsafe { x.get_unchecked(i) }.acc();
        if p == 2.0 {
            sum_of(
                x.len(),
                #[inline(always)]
                |i| value(i) * value(i),
            )
            .sqrt()
        } else if p == 1.0 {
            sum_of(
                x.len(),
                #[inline(always)]
                |i| value(i).abs(),
            )
        } else {
            let p = T::Acc::of(p);
            sum_of(
                x.len(),
                #[inline(always)]
                |i| value(i).abs().powf(p),
            )
            .powf(T::Acc::ONE / p)
        }
    }

    fn width(x: &Tensor) -> usize {
        x.shape().last().copied().unwrap_or(1)
    }

    pub fn forward<T: Float>(x: &Tensor, p: f64, eps: f64) -> (Tensor, Tensor) {
        let (xs, n) = (x.cpu_slice::<T>(), width(x));
        let count = xs.len() / n.max(1);
        let (mut y, mut norms) = (CpuVec::<T>::new(xs.len()), CpuVec::<T::Acc>::new(count));
        let (y_out, norm_out) = (SharedMut::new(&mut y), SharedMut::new(&mut norms));
        for_rows(count, n, |range| {
            for row in range {
                let at = row * n..(row + 1) * n;
                let (x, y) = (&xs[at.clone()], unsafe { y_out.slice(at) });
                simd(
                    #[inline(always)]
                    || {
                        let norm = norm(x, p);
                        let scale = T::Acc::ONE / norm.maximum(T::Acc::of(eps));
                        (0..n).for_each(|i| y[i] = T::store(x[i].acc() * scale));
                        unsafe { *norm_out.ptr().add(row) = norm };
                    },
                );
            }
        });
        (Tensor::from_cpu(y, x.shape(), OP), Tensor::from_cpu(norms, count, OP))
    }

    pub fn backward<T: Float>(rule: &Normalize, grad: &Tensor) -> Tensor {
        let (xs, gs, n) = (rule.x.cpu_slice::<T>(), grad.cpu_slice::<T>(), width(grad));
        let norms = rule.norm.cpu_slice::<T::Acc>();
        let mut dx = CpuVec::<T>::new(xs.len());
        let target = SharedMut::new(&mut dx);
        let eps = T::Acc::of(rule.eps);
        for_rows(norms.len(), n, |range| {
            for row in range {
                let at = row * n..(row + 1) * n;
                let (x, g, dx) = (&xs[at.clone()], &gs[at.clone()], unsafe { target.slice(at) });
                simd(
                    #[inline(always)]
                    || row_backward(x, g, norms[row], rule.p, eps, dx),
                );
            }
        });
        Tensor::from_cpu(dx, grad.shape(), OP)
    }

    #[inline(always)]
    fn row_backward<T: Float>(x: &[T], g: &[T], norm: T::Acc, p: f64, eps: T::Acc, dx: &mut [T]) {
        let n = x.len();
        let (g, dx) = (&g[..n], &mut dx[..n]);
        let one = T::Acc::ONE;
        if norm < eps || norm == T::Acc::ZERO {
            let scale = one / eps;
            return (0..n).for_each(|i| dx[i] = T::store(g[i].acc() * scale));
        }
        let scale = one / norm;
        let dot = sum_of(
            n,
            #[inline(always)]
            |i| unsafe { x.get_unchecked(i).acc() * g.get_unchecked(i).acc() },
        );
        let slope = dot * scale * scale;
        if p == 2.0 {
            return (0..n).for_each(|i| dx[i] = T::store((g[i].acc() - x[i].acc() * slope) * scale));
        }
        let power = T::Acc::of(p - 1.0);
        for i in 0..n {
            let x = x[i].acc();
            let sign = if x > T::Acc::ZERO {
                one
            } else if x < T::Acc::ZERO {
                -one
            } else {
                T::Acc::ZERO
            };
            let dn =
                if p == 1.0 || sign == T::Acc::ZERO { sign } else { sign * (x.abs() * scale).powf(power) };
            dx[i] = T::store(g[i].acc() * scale - slope * dn);
        }
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;
    use crate::gpu::{self, sys};

    /// Contiguous rows as a matrix.
    fn matrix(x: &Tensor) -> Result<Tensor> {
        let n = x.shape().last().copied().unwrap_or(1);
        x.reshape([x.numel().checked_div(n).unwrap_or(0), n])
    }

    #[track_caller]
    pub fn forward(x: &Tensor, p: f64, eps: f64) -> Result<(Tensor, Tensor)> {
        ensure!(x.dtype().is_float(), OP, "needs a float tensor, got {}", x.dtype());
        let rows = matrix(x)?;
        let y = gpu::empty(x, rows.shape(), x.dtype(), OP)?;
        let norm = gpu::empty(x, &rows.shape()[..1], x.dtype().computed_in(), OP)?;
        gpu::launch(OP, [&rows, &y, &norm], |[x, y, norm], stream| unsafe {
            sys::smalti_normalize_forward(&x, &y, &norm, p, eps, stream)
        })?;
        Ok((y.reshape(x.shape())?, norm))
    }

    #[track_caller]
    pub fn backward(rule: &Normalize, grad: &Tensor) -> Result<Tensor> {
        let (x, dy) = (matrix(&rule.x)?, matrix(grad)?);
        let dx = gpu::empty(grad, x.shape(), grad.dtype(), OP)?;
        gpu::launch(OP, [&x, &dy, &rule.norm, &dx], |[x, dy, norm, dx], stream| unsafe {
            sys::smalti_normalize_backward(&x, &dy, &norm, &dx, rule.p, rule.eps, stream)
        })?;
        dx.reshape(grad.shape())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Rng, gradcheck};

    #[test]
    fn gradients_and_edges() -> Result<()> {
        let mut rng = Rng::new(1);
        let mut random = |shape: &[usize]| Tensor::randn(shape, &mut rng)?.to_dtype(DType::F64);
        let x = random(&[3, 19, 2])?;
        for x in [x.clone(), x.permute([1, 2, 0])?, random(&[1, 4, 1])?.expand([2, 4, 3])?] {
            for p in [1.0, 2.0, 3.0] {
                for dim in 0..3 {
                    gradcheck(|t| t[0].normalize(p, dim, 1e-12), &[x.clone()])?;
                }
            }
            gradcheck(|t| t[0].normalize(2.0, 1, 100.0), &[x])?;
        }
        let y = Tensor::from_slice(&[3f32, 4.0, 0.0, 0.0], [2, 2])?.normalize(2.0, 1, 1e-12)?;
        assert_eq!(y.to_vec::<f32>()?, [0.6, 0.8, 0.0, 0.0]);
        assert_eq!(Tensor::zeros([0, 3], DType::F32)?.normalize(2.0, 1, 1e-12)?.shape(), [0, 3]);
        assert_eq!(Tensor::zeros([3, 0], DType::F32)?.normalize(2.0, 1, 1e-12)?.shape(), [3, 0]);
        assert!(x.normalize(0.0, 1, 1e-12).is_err() && x.normalize(f64::INFINITY, 1, 1e-12).is_err());
        Ok(())
    }
}
