//! Products.

use super::{
    fold::{Fold, Plan},
    squeezed,
};
use crate::{
    DType, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    dtype::Real,
    for_real, on_device,
    shape::{DimList, Dims},
};
use smallvec::smallvec;
use std::marker::PhantomData;

impl Tensor {
    /// Product over `dims`, which go away; 1 over nothing. Integers and booleans multiply to i64.
    ///
    /// # Errors
    /// If a dimension does not exist.
    #[track_caller]
    pub fn prod(&self, dims: impl DimList) -> Result<Tensor> {
        let dims = dims.of("prod", self)?;
        squeezed(&self.prod_keepdim(&dims)?, &dims)
    }

    /// Product over `dims`, which stay with size 1; 1 over nothing.
    ///
    /// # Errors
    /// If a dimension does not exist.
    #[track_caller]
    pub fn prod_keepdim(&self, dims: impl DimList) -> Result<Tensor> {
        let dims = dims.of("prod", self)?;
        if !self.dtype().is_float() {
            let x = self.to_dtype(DType::I64)?;
            return on_device!(
                self,
                "prod",
                {
                    let plan = Plan::new::<i64>(&x, &dims, "prod");
                    Ok(plan.tensor(plan.run(Integers, &[]), "prod"))
                },
                gpu::prod(&x, &dims)
            );
        }
        Tensor::in_f32([self], |[x]| {
            let y = on_device!(
                x,
                "prod",
                for_real!(x.dtype(), "prod", T => {
                    let plan = Plan::new::<T>(x, &dims, "prod");
                    Ok(plan.tensor(plan.run(Floats::<T>(PhantomData), &[]), "prod"))
                }),
                gpu::prod(x, &dims)
            )?;
            y.record([x], Prod { x: x.clone(), dims })
        })
    }
}

struct Prod {
    x: Tensor,
    dims: Dims,
}
impl Backward for Prod {
    const NAME: &'static str = "prod";
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        // The product of the others is that of the non-zero ones over this one, or 0 if another one is zero.
        let zero = self.x.eq(&self.x.zeros_like()?)?;
        let x = self.x.detach().masked_fill(&zero, 1.0)?;
        let others = zero.sum_keepdim(&self.dims)?.sub(&zero.to_dtype(DType::I64)?)?;
        let dx = grad.mul(&x.prod_keepdim(&self.dims)?)?.div(&x)?;
        Ok(smallvec![Some(dx.masked_fill(&others.to_dtype(DType::Bool)?, 0.0)?)])
    }
}

#[derive(Clone, Copy)]
struct Floats<R>(PhantomData<R>);
impl<R: Real> Fold for Floats<R> {
    type In = R;
    type Acc = R;
    type Out = R;
    const SIMD: bool = false;
    fn neutral(self) -> R {
        R::ONE
    }
    #[inline(always)]
    fn lift(self, value: R, _: R) -> R {
        value
    }
    #[inline(always)]
    fn join(self, a: R, b: R) -> R {
        a * b
    }
    fn finish(self, acc: R, _: R) -> R {
        acc
    }
}

/// Product of i64; wraps.
#[derive(Clone, Copy)]
struct Integers;
impl Fold for Integers {
    type In = i64;
    type Acc = i64;
    type Out = i64;
    const SIMD: bool = false;
    fn neutral(self) -> i64 {
        1
    }
    #[inline(always)]
    fn lift(self, value: i64, _: i64) -> i64 {
        value
    }
    #[inline(always)]
    fn join(self, a: i64, b: i64) -> i64 {
        a.wrapping_mul(b)
    }
    fn finish(self, acc: i64, _: i64) -> i64 {
        acc
    }
}

#[cfg(gpu)]
mod gpu {
    use super::{super::gpu::fold_one, *};
    use crate::gpu::sys;

    #[track_caller]
    pub fn prod(x: &Tensor, dims: &[usize]) -> Result<Tensor> {
        fold_one("prod", sys::SMALTI_PROD, x, dims, 0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Rng, gradcheck};

    #[test]
    fn values() -> Result<()> {
        let x = Tensor::from_slice(&[1i32, -2, 3, 4, 5, 6], [2, 3])?;
        assert_eq!(x.prod(1)?.to_vec::<i64>()?, [-6, 120]);
        assert_eq!(
            x.to_dtype(DType::F16)?.prod_keepdim(0)?.to_dtype(DType::F64)?.to_vec::<f64>()?,
            [4.0, -10.0, 18.0]
        );
        assert_eq!(Tensor::zeros([0, 2], DType::F32)?.prod(0)?.to_vec::<f32>()?, [1.0, 1.0]);
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        let x = Tensor::randn([3, 4], &mut Rng::new(1))?.to_dtype(DType::F64)?;
        gradcheck(|t| t[0].prod(0), &[x.t()?])?;
        gradcheck(|t| t[0].prod(()), &[x])?;
        let zeros = [2.0, 0.0, 3.0, 0.0, 4.0, 0.0, 1.0, 5.0, 2.0];
        gradcheck(|t| t[0].prod(1), &[Tensor::from_slice(&zeros, [3, 3])?])
    }
}
