//! Logarithms of sums of exponentials.

use super::{
    extremum::{Extreme, Ordered},
    fold::{Fold, Plan},
    squeezed,
};
use crate::{
    Result, Tensor,
    autograd::{Backward, Ctx, Grads, is_grad_enabled},
    cpu::elementwise,
    dtype::Real,
    for_real, on_device,
    shape::DimList,
};
use smallvec::smallvec;
use std::marker::PhantomData;

impl Tensor {
    /// ln(sum(e^x)) over `dims`, which go away. The maximum is taken out first, so nothing overflows; -infinity
    /// over nothing.
    ///
    /// # Errors
    /// If a dimension does not exist, or the dtype is not a float.
    #[track_caller]
    pub fn logsumexp(&self, dims: impl DimList) -> Result<Tensor> {
        let dims = dims.of("logsumexp", self)?;
        squeezed(&self.logsumexp_keepdim(&dims)?, &dims)
    }

    /// [`logsumexp`](Self::logsumexp) with `dims` of size 1.
    ///
    /// # Errors
    /// As `logsumexp`.
    #[track_caller]
    pub fn logsumexp_keepdim(&self, dims: impl DimList) -> Result<Tensor> {
        let dims = dims.of("logsumexp", self)?;
        Tensor::in_f32([self], |[x]| {
            let y = on_device!(
                x,
                "logsumexp",
                for_real!(x.dtype(), "logsumexp", T => {
                    let plan = Plan::new::<T>(x, &dims, "logsumexp");
                    Ok(plan.tensor(cpu::forward::<T>(&plan), "logsumexp"))
                }),
                super::gpu::fold_one("logsumexp", crate::gpu::sys::SMALTI_LOGSUMEXP, x, &dims, 0.0)
            )?;
            let rule = LogSumExp { x: x.clone(), y: y.clone() };
            y.record([x], rule)
        })
    }
}

struct LogSumExp {
    x: Tensor,
    y: Tensor,
}
impl Backward for LogSumExp {
    const NAME: &'static str = "logsumexp";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let dx = if is_grad_enabled() {
            grad.mul(&self.x.sub(&ctx.output(&self.y))?.exp()?)?
        } else {
            on_device!(
                grad,
                "logsumexp",
                for_real!(grad.dtype(), "logsumexp", T => {
                    elementwise::map3("logsumexp", &self.x, &self.y, grad, |x: T, y: T, g: T| {
                        if y == T::NEG_INF { T::ZERO } else { g * (x - y).exp() }
                    })
                }),
                gpu::backward(&self.x, &self.y, grad)
            )?
        };
        Ok(smallvec![Some(dx)])
    }
}

/// ln(sum(e^(x - context))) + context
#[derive(Clone, Copy)]
struct Exponentials<R>(PhantomData<R>);
impl<R: Real> Fold for Exponentials<R> {
    type In = R;
    type Acc = R;
    type Out = R;
    const CONTEXT: bool = true;
    #[inline(always)]
    fn neutral(self) -> R {
        R::ZERO
    }
    #[inline(always)]
    fn lift(self, value: R, largest: R) -> R {
        (value - largest).exp()
    }
    #[inline(always)]
    fn join(self, a: R, b: R) -> R {
        a + b
    }
    #[inline(always)]
    fn finish(self, acc: R, largest: R) -> R {
        acc.ln() + largest
    }
}

mod cpu {
    use super::*;
    use crate::cpu::pool::CpuVec;

    pub fn forward<T: Real + Ordered>(plan: &Plan) -> CpuVec<T> {
        let mut largest = plan.run(Extreme::<T, true>::NEW, &[]);
        // An infinite maximum would leave infinity - infinity; without one to take out the sum is right.
        largest.iter_mut().filter(|m| m.abs() == T::INF).for_each(|m| *m = T::ZERO);
        plan.run(Exponentials(PhantomData), &largest)
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;

    pub fn backward(x: &Tensor, y: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let nothing = y.eq(&y.full_like(f64::NEG_INFINITY)?)?;
        grad.mul(&x.sub(y)?.exp()?)?.masked_fill(&nothing, 0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Rng, gradcheck};

    #[test]
    fn ends_of_the_range() -> Result<()> {
        let inf = f32::INFINITY;
        let x = [1000., 1000., -inf, -inf, -inf, 2., inf, 0., f32::NAN, 0.];
        let y = Tensor::from_slice(&x, [5, 2])?.logsumexp(1)?.to_vec::<f32>()?;
        assert_eq!(y[..4], [1000.0 + 2f32.ln(), -inf, 2.0, inf]);
        assert!(y[4].is_nan());
        assert_eq!(Tensor::zeros([0], DType::F32)?.logsumexp(0)?.item()?, f64::NEG_INFINITY);
        let x = Tensor::full([3], f64::NEG_INFINITY, DType::F32)?.requires_grad();
        let grads = x.logsumexp(0)?.backward()?;
        assert_eq!(grads.get(&x).map(|g| g.to_vec::<f32>()).transpose()?, Some(vec![0.0; 3]));
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        let x = Tensor::randn([2, 3, 4], &mut Rng::new(1))?.to_dtype(DType::F64)?;
        gradcheck(|t| t[0].logsumexp([0, 2]), &[x.permute([1, 0, 2])?])?;
        gradcheck(|t| t[0].logsumexp_keepdim(1), &[x])
    }
}
