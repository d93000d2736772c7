//! Vector norms.

use super::{
    fold::{Fold, Plan},
    squeezed,
};
use crate::{
    Error, Result, Tensor,
    autograd::{Backward, Ctx, Grads, is_grad_enabled},
    cpu::elementwise,
    dtype::Real,
    ensure, for_real, on_device,
    shape::{DimList, Dims},
};
use smallvec::smallvec;
use std::marker::PhantomData;

impl Tensor {
    /// Norm of order `ord` over `dims`, which go away: sum(|x|^ord)^(1/ord); the largest or smallest |x| for
    /// an order of +-infinity; the number of elements that are not 0 for order 0. The gradient at a zero vector
    /// is 0; elements that tie for an infinite order share it evenly.
    ///
    /// # Errors
    /// If a dimension does not exist, the dtype is not a float, or an infinite order has no elements.
    #[track_caller]
    pub fn norm(&self, ord: f64, dims: impl DimList) -> Result<Tensor> {
        let dims = dims.of("norm", self)?;
        squeezed(&self.norm_keepdim(ord, &dims)?, &dims)
    }

    /// [`norm`](Self::norm) with `dims` of size 1.
    ///
    /// # Errors
    /// As `norm`.
    #[track_caller]
    pub fn norm_keepdim(&self, ord: f64, dims: impl DimList) -> Result<Tensor> {
        let dims = dims.of("norm", self)?;
        let nothing = dims.iter().any(|&d| self.shape()[d] == 0);
        ensure!(
            !(ord.is_nan() || ord.is_infinite() && nothing),
            "norm",
            "no norm of order {ord} over dimensions {dims:?} of shape {:?}",
            self.shape()
        );
        Tensor::in_f32([self], |[x]| {
            let y = on_device!(
                x,
                "norm",
                for_real!(x.dtype(), "norm", T => {
                    let plan = Plan::new::<T>(x, &dims, "norm");
                    let y = if ord == 2.0 {
                        plan.run(Squares::<T>(PhantomData), &[])
                    } else {
                        plan.run(Powers { ord: T::of(ord) }, &[])
                    };
                    Ok(plan.tensor(y, "norm"))
                }),
                super::gpu::fold_one("norm", crate::gpu::sys::SMALTI_NORM, x, &dims, ord)
            )?;
            let rule = Norm { x: x.clone(), y: y.clone(), ord, dims };
            y.record([x], rule)
        })
    }
}

struct Norm {
    x: Tensor,
    y: Tensor,
    ord: f64,
    dims: Dims,
}
impl Backward for Norm {
    const NAME: &'static str = "norm";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let Norm { x, y, ord, dims } = self;
        let dx = if is_grad_enabled() {
            if *ord != 2.0 {
                return Err(Error::NoSecondOrder { op: Self::NAME });
            }
            let zero = y.eq(&y.zeros_like()?)?;
            grad.div(&ctx.output(y))?.masked_fill(&zero, 0.0)?.mul(x)?
        } else {
            on_device!(
                grad,
                "norm",
                for_real!(grad.dtype(), "norm", T => cpu::backward::<T>(x, y, grad, *ord, dims)),
                gpu::backward(x, y, grad, *ord, dims)
            )?
        };
        Ok(smallvec![Some(dx)])
    }
}

/// Root of the sum of squares.
#[derive(Clone, Copy)]
struct Squares<R>(PhantomData<R>);
impl<R: Real> Fold for Squares<R> {
    type In = R;
    type Acc = R;
    type Out = R;
    #[inline(always)]
    fn neutral(self) -> R {
        R::ZERO
    }
    #[inline(always)]
    fn lift(self, value: R, _: R) -> R {
        value * value
    }
    #[inline(always)]
    fn join(self, a: R, b: R) -> R {
        a + b
    }
    #[inline(always)]
    fn finish(self, acc: R, _: R) -> R {
        acc.sqrt()
    }
}

/// Any other order.
#[derive(Clone, Copy)]
struct Powers<R> {
    ord: R,
}
impl<R: Real> Fold for Powers<R> {
    type In = R;
    type Acc = R;
    type Out = R;
    const SIMD: bool = false;
    #[inline(always)]
    fn neutral(self) -> R {
        if self.ord == R::NEG_INF { R::INF } else { R::ZERO }
    }
    #[inline(always)]
    fn lift(self, value: R, _: R) -> R {
        let value = value.abs();
        match self.ord {
            _ if value.is_nan() => value,
            ord if ord == R::ONE || ord.abs() == R::INF => value,
            ord if ord == R::ZERO => R::of(f64::from(value != R::ZERO)),
            ord => value.powf(ord),
        }
    }
    #[inline(always)]
    fn join(self, a: R, b: R) -> R {
        match self.ord {
            ord if ord == R::INF => a.maximum(b),
            ord if ord == R::NEG_INF => a.minimum(b),
            _ => a + b,
        }
    }
    #[inline(always)]
    fn finish(self, acc: R, _: R) -> R {
        match self.ord {
            ord if ord == R::ZERO || ord == R::ONE || ord.abs() == R::INF => acc,
            ord => acc.powf(R::ONE / ord),
        }
    }
}

mod cpu {
    use super::*;

    /// 1, -1, or x itself where it is 0 or NaN.
    #[inline(always)]
    fn sign<R: Real>(x: R) -> R {
        match x {
            _ if x > R::ZERO => R::ONE,
            _ if x < R::ZERO => -R::ONE,
            _ => x,
        }
    }

    pub fn backward<T: Real>(x: &Tensor, y: &Tensor, grad: &Tensor, ord: f64, dims: &Dims) -> Result<Tensor> {
        if ord == 2.0 {
            return elementwise::map3(
                "norm",
                x,
                y,
                grad,
                |x: T, y: T, g: T| {
                    if y == T::ZERO { T::ZERO } else { g / y * x }
                },
            );
        }
        if ord.is_infinite() {
            let ties = elementwise::map2("norm", x, y, |x: T, y: T| T::of(f64::from(x.abs() == y)))?;
            let share = grad.div(&ties.sum_keepdim(dims)?)?;
            return elementwise::map3("norm", x, &ties, &share, |x: T, tie: T, g: T| {
                if tie == T::ZERO { T::ZERO } else { g * sign(x) }
            });
        }
        let (ord, less) = (T::of(ord), T::of(ord - 1.0));
        elementwise::map3("norm", x, y, grad, |x: T, y: T, g: T| match ord {
            _ if x == T::ZERO || y == T::ZERO || ord == T::ZERO => T::ZERO,
            _ if ord == T::ONE => g * sign(x),
            _ => g * sign(x) * (x.abs() / y).powf(less),
        })
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;

    /// As on the CPU, in tensor operations.
    pub fn backward(x: &Tensor, y: &Tensor, grad: &Tensor, ord: f64, dims: &Dims) -> Result<Tensor> {
        let none = y.eq(&y.zeros_like()?)?;
        if ord == 2.0 {
            return grad.div(y)?.masked_fill(&none, 0.0)?.mul(x);
        }
        if ord == 0.0 {
            return x.zeros_like();
        }
        let size = x.abs()?;
        let sign = x.div(&size)?.masked_fill(&x.eq(&x.zeros_like()?)?, 0.0)?;
        if ord.is_infinite() {
            let ties = size.eq(y)?;
            let share = grad.div(&ties.sum_keepdim(dims)?.to_dtype(grad.dtype())?)?;
            return share.mul(&sign)?.masked_fill(&ties.logical_not()?, 0.0);
        }
        let slope = if ord == 1.0 { sign } else { size.div(y)?.pow_scalar(ord - 1.0)?.mul(&sign)? };
        let dx = grad.mul(&slope)?.masked_fill(&none, 0.0)?;
        dx.masked_fill(&x.eq(&x.zeros_like()?)?, 0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Rng, gradcheck};

    #[test]
    fn orders() -> Result<()> {
        let x = Tensor::from_slice(&[3.0f32, -4.0, 0.0], [3])?;
        let norm = |ord: f64| -> Result<f64> { x.norm(ord, ())?.item() };
        assert_eq!((norm(2.0)?, norm(1.0)?, norm(0.0)?), (5.0, 7.0, 2.0));
        assert_eq!((norm(f64::INFINITY)?, norm(f64::NEG_INFINITY)?), (4.0, 0.0));
        assert!((norm(3.0)? - 91f64.cbrt()).abs() < 1e-6);
        let empty = Tensor::zeros([2, 0], DType::F32)?;
        assert_eq!(empty.norm(2.0, 1)?.to_vec::<f32>()?, [0.0, 0.0]);
        assert!(empty.norm(f64::INFINITY, 1).is_err() && x.norm(f64::NAN, ()).is_err());
        assert_eq!(
            x.to_dtype(DType::F16)?.norm_keepdim(2.0, 0)?.to_dtype(DType::F64)?.to_vec::<f64>()?,
            [5.0]
        );
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        let x = Tensor::randn([2, 3, 4], &mut Rng::new(1))?.to_dtype(DType::F64)?;
        for ord in [2.0, 1.0, 3.0, 1.5, f64::INFINITY, f64::NEG_INFINITY] {
            gradcheck(|t| t[0].norm(ord, [0, 2]), &[x.permute([1, 0, 2])?])?;
            gradcheck(|t| t[0].norm_keepdim(ord, 1), &[x.clone()])?;
        }
        let zero = Tensor::zeros([3], DType::F64)?.requires_grad();
        for ord in [0.0, 1.0, 2.0, 3.0] {
            let grads = zero.norm(ord, ())?.backward()?;
            assert_eq!(grads.get(&zero).map(|g| g.to_vec::<f64>()).transpose()?, Some(vec![0.0; 3]));
        }
        Ok(())
    }
}
