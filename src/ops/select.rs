//! The larger, the smaller, one or the other by a condition; boolean logic; the power of two tensors.

use super::binary::promoted;
#[cfg(gpu)]
use crate::gpu::{elementwise as gpu, sys};
use crate::{
    DType, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    cpu::elementwise,
    dtype::Real,
    ensure, for_computed, on_device,
};
use smallvec::smallvec;

impl Tensor {
    /// The larger of each pair, broadcast; NaN if either is. Where both are equal, each gets half the gradient.
    ///
    /// # Errors
    /// If the shapes do not broadcast.
    #[track_caller]
    pub fn maximum(&self, other: &Tensor) -> Result<Tensor> {
        let (a, b) = promoted(self, other)?;
        let y = on_device!(
            a,
            "maximum",
            if a.dtype().is_float() {
                for_computed!(a.dtype(), "maximum", T => {
                    elementwise::map2("maximum", &a, &b, |x: T, y: T| Real::maximum(x, y))
                })
            } else {
                elementwise::map2("maximum", &a, &b, |x: i64, y: i64| x.max(y))
            },
            gpu::map2("maximum", sys::SMALTI_MAXIMUM, &a, &b, a.dtype())
        )?;
        y.record([self, other], Extremum { larger: a.detach(), smaller: b.detach() })
    }

    /// The smaller of each pair, broadcast; NaN if either is. Where both are equal, each gets half the gradient.
    ///
    /// # Errors
    /// If the shapes do not broadcast.
    #[track_caller]
    pub fn minimum(&self, other: &Tensor) -> Result<Tensor> {
        let (a, b) = promoted(self, other)?;
        let y = on_device!(
            a,
            "minimum",
            if a.dtype().is_float() {
                for_computed!(a.dtype(), "minimum", T => {
                    elementwise::map2("minimum", &a, &b, |x: T, y: T| Real::minimum(x, y))
                })
            } else {
                elementwise::map2("minimum", &a, &b, |x: i64, y: i64| x.min(y))
            },
            gpu::map2("minimum", sys::SMALTI_MINIMUM, &a, &b, a.dtype())
        )?;
        // the input that wins where it is the smaller one
        y.record([other, self], Extremum { larger: a.detach(), smaller: b.detach() })
    }

    /// `a` where this bool tensor is true, else `b`; all three broadcast.
    ///
    /// # Errors
    /// If this is not bool, or the shapes do not broadcast.
    #[track_caller]
    pub fn where_cond(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let op = "where_cond";
        ensure!(self.dtype() == DType::Bool, op, "the condition is {}, needs bool", self.dtype());
        let (x, y) = promoted(a, b)?;
        let result = on_device!(x, op, elementwise::select(op, self, &x, &y), gpu::select(op, self, &x, &y))?;
        result.record([a, b], Where { condition: self.clone() })
    }

    /// self^exponent, broadcast. The gradient of the exponent is 0 where the base is 0 and the exponent is not
    /// negative, that of the base is 0 where the exponent is 0.
    ///
    /// # Errors
    /// If the shapes do not broadcast or the dtype is not a float.
    #[track_caller]
    pub fn pow(&self, exponent: &Tensor) -> Result<Tensor> {
        let (a, b) = promoted(self, exponent)?;
        let y = on_device!(
            a,
            "pow",
            for_computed!(a.dtype(), "pow", T => {
                elementwise::map2("pow", &a, &b, |x: T, e: T| x.powf(e))
            }),
            {
                ensure!(
                    a.dtype().is_float(),
                    "pow",
                    "needs a float tensor (f32, bf16, f16, f64), got {}",
                    a.dtype()
                );
                gpu::map2("pow", sys::SMALTI_POWER, &a, &b, a.dtype())
            }
        )?;
        y.record([self, exponent], Pow { base: a, exponent: b })
    }

    /// Is the element false (0)?
    ///
    /// # Errors
    /// None on the CPU.
    #[track_caller]
    pub fn logical_not(&self) -> Result<Tensor> {
        let x = self.to_dtype(DType::Bool)?;
        on_device!(
            x,
            "logical_not",
            Ok(elementwise::map("logical_not", &x, |x: bool| !x)),
            x.eq(&x.zeros_like()?)
        )
    }

    /// Are both true (not 0)? Broadcast.
    ///
    /// # Errors
    /// If the shapes do not broadcast.
    #[track_caller]
    pub fn logical_and(&self, other: &Tensor) -> Result<Tensor> {
        let (a, b) = (self.to_dtype(DType::Bool)?, other.to_dtype(DType::Bool)?);
        on_device!(
            a,
            "logical_and",
            elementwise::map2("logical_and", &a, &b, |x: bool, y: bool| x & y),
            gpu::map2("logical_and", sys::SMALTI_AND, &a, &b, DType::Bool)
        )
    }

    /// Is either true (not 0)? Broadcast.
    ///
    /// # Errors
    /// If the shapes do not broadcast.
    #[track_caller]
    pub fn logical_or(&self, other: &Tensor) -> Result<Tensor> {
        let (a, b) = (self.to_dtype(DType::Bool)?, other.to_dtype(DType::Bool)?);
        on_device!(
            a,
            "logical_or",
            elementwise::map2("logical_or", &a, &b, |x: bool, y: bool| x | y),
            gpu::map2("logical_or", sys::SMALTI_OR, &a, &b, DType::Bool)
        )
    }
}

/// Input 0 wins where `larger` is larger, input 1 where `smaller` is.
struct Extremum {
    larger: Tensor,
    smaller: Tensor,
}
impl Extremum {
    /// The share of input `i`: 1, 1/2 or 0 (and 1 beside NaN, as PyTorch has it).
    fn share(&self, i: usize) -> Result<Tensor> {
        let (a, b) = if i == 0 { (&self.larger, &self.smaller) } else { (&self.smaller, &self.larger) };
        on_device!(
            a,
            Self::NAME,
            for_computed!(a.dtype(), Self::NAME, T => cpu::share::<T>(a, b)),
            gpu::map2(Self::NAME, sys::SMALTI_SHARE, a, b, a.dtype())
        )
    }
}
impl Backward for Extremum {
    const NAME: &'static str = "extremum";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        Ok(smallvec![ctx.grad(0, || grad.mul(&self.share(0)?))?, ctx.grad(1, || grad.mul(&self.share(1)?))?])
    }
}

struct Where {
    condition: Tensor,
}
impl Backward for Where {
    const NAME: &'static str = "where_cond";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let zero = grad.zeros_like()?;
        Ok(smallvec![
            ctx.grad(0, || self.condition.where_cond(grad, &zero))?,
            ctx.grad(1, || self.condition.where_cond(&zero, grad))?
        ])
    }
}

struct Pow {
    base: Tensor,
    exponent: Tensor,
}
impl Backward for Pow {
    const NAME: &'static str = "pow";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let (x, e) = (&self.base, &self.exponent);
        let zero = grad.zeros_like()?;
        let base = ctx.grad(0, || {
            let slope = e.mul(&x.pow(&e.add_scalar(-1.0)?)?)?;
            e.eq(&zero)?.where_cond(&zero, &grad.mul(&slope)?)
        })?;
        let exponent = ctx.grad(1, || {
            let slope = x.pow(e)?.mul(&x.log()?)?;
            let flat = x.eq(&zero)?.logical_and(&e.ge(&zero)?)?;
            flat.where_cond(&zero, &grad.mul(&slope)?)
        })?;
        Ok(smallvec![base, exponent])
    }
}

mod cpu {
    use super::*;

    pub fn share<T: Real>(a: &Tensor, b: &Tensor) -> Result<Tensor> {
        elementwise::map2(Extremum::NAME, a, b, |x: T, y: T| {
            if x == y {
                T::of(0.5)
            } else if x < y {
                T::ZERO
            } else {
                T::ONE
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Rng, gradcheck};

    fn pair() -> Result<(Tensor, Tensor)> {
        let mut rng = Rng::new(5);
        let a = Tensor::randn([3, 1, 4], &mut rng)?.to_dtype(DType::F64)?;
        let b = Tensor::randn([2, 1], &mut rng)?.to_dtype(DType::F64)?;
        Ok((a, b))
    }

    #[test]
    fn gradients() -> Result<()> {
        let (a, b) = pair()?;
        gradcheck(|t| t[0].maximum(&t[1]), &[a.clone(), b.clone()])?;
        gradcheck(|t| t[0].minimum(&t[1]), &[a.permute([2, 1, 0])?, b.clone()])?;
        gradcheck(|t| t[0].gt(&t[1])?.where_cond(&t[0], &t[1]), &[a.clone(), b.clone()])?;
        gradcheck(|t| t[0].pow(&t[1]), &[a.square()?.add_scalar(0.2)?, b])
    }

    #[test]
    fn ties_nan_and_integers() -> Result<()> {
        let a = Tensor::from_slice(&[1f32, 2., f32::NAN, 0.], [4])?.requires_grad();
        let b = Tensor::from_slice(&[1f32, 5., 0., f32::NAN], [4])?.requires_grad();
        for (y, expected) in [(a.maximum(&b)?, [0.5f32, 0., 1., 1.]), (a.minimum(&b)?, [0.5, 1., 1., 1.])] {
            let v = y.to_vec::<f32>()?;
            assert!(v[0] == 1. && v[2].is_nan() && v[3].is_nan());
            let grads = y.sum(())?.backward()?;
            let g = grads.get(&a).map(|g| g.to_vec::<f32>()).transpose()?.unwrap_or_default();
            assert_eq!(g, expected);
        }
        let n = Tensor::from_slice(&[i64::MAX, -3], [2])?;
        let m = Tensor::from_slice(&[i64::MAX - 1, 3], [2])?;
        assert_eq!(n.maximum(&m)?.to_vec::<i64>()?, [i64::MAX, 3]);
        assert_eq!(n.minimum(&m)?.to_vec::<i64>()?, [i64::MAX - 1, -3]);
        Ok(())
    }

    #[test]
    fn logic() -> Result<()> {
        let a = Tensor::from_slice(&[true, true, false, false], [4])?;
        let b = Tensor::from_slice(&[2i64, 0, 1, 0], [4])?;
        assert_eq!(a.logical_and(&b)?.to_vec::<bool>()?, [true, false, false, false]);
        assert_eq!(a.logical_or(&b)?.to_vec::<bool>()?, [true, true, true, false]);
        assert_eq!(b.logical_not()?.to_vec::<bool>()?, [false, true, false, true]);
        assert!(b.where_cond(&a, &a).is_err());
        Ok(())
    }
}
