//! Variance and standard deviation, in two passes: the mean, then the squares of what is left.

use super::{
    fold::{Fold, Plan},
    squeezed,
    sum::Floats,
};
use crate::{
    Result, Tensor,
    autograd::{Backward, Ctx, Grads, is_grad_enabled},
    cpu::elementwise,
    dtype::Real,
    for_real, on_device,
    shape::{DimList, Dims},
};
use smallvec::smallvec;

impl Tensor {
    /// Variance over `dims`, which go away: sum((x - mean)^2) / (n - correction). Correction 1 estimates the
    /// variance of a population from a sample, 0 is that of the numbers themselves.
    ///
    /// # Errors
    /// If a dimension does not exist, or the dtype is not a float.
    #[track_caller]
    pub fn var(&self, dims: impl DimList, correction: usize) -> Result<Tensor> {
        let dims = dims.of("var", self)?;
        squeezed(&self.var_keepdim(&dims, correction)?, &dims)
    }

    /// [`var`](Self::var) with `dims` of size 1.
    ///
    /// # Errors
    /// As `var`.
    #[track_caller]
    pub fn var_keepdim(&self, dims: impl DimList, correction: usize) -> Result<Tensor> {
        let dims = dims.of("var", self)?;
        Tensor::in_f32([self], |[x]| spread(x, dims, correction, false))
    }

    /// Standard deviation over `dims`, which go away: the root of [`var`](Self::var). Its gradient is 0 where
    /// it is 0.
    ///
    /// # Errors
    /// If a dimension does not exist, or the dtype is not a float.
    #[track_caller]
    pub fn std(&self, dims: impl DimList, correction: usize) -> Result<Tensor> {
        let dims = dims.of("std", self)?;
        squeezed(&self.std_keepdim(&dims, correction)?, &dims)
    }

    /// [`std`](Self::std) with `dims` of size 1.
    ///
    /// # Errors
    /// As `std`.
    #[track_caller]
    pub fn std_keepdim(&self, dims: impl DimList, correction: usize) -> Result<Tensor> {
        let dims = dims.of("std", self)?;
        Tensor::in_f32([self], |[x]| spread(x, dims, correction, true))
    }
}

#[track_caller]
fn spread(x: &Tensor, dims: Dims, correction: usize, root: bool) -> Result<Tensor> {
    let op = if root { "std" } else { "var" };
    let n: usize = dims.iter().map(|&d| x.shape()[d]).product();
    let divisor = n.saturating_sub(correction) as f64;
    let (y, mean) = on_device!(
        x,
        op,
        for_real!(x.dtype(), op, T => {
            let plan = Plan::new::<T>(x, &dims, op);
            let mean = plan.run(Floats::<T>::over(n), &[]);
            let y = plan.run(Deviation { divisor: T::of(divisor), root }, &mean);
            Ok((plan.tensor(y, op), plan.tensor(mean, op)))
        }),
        gpu::spread(op, x, &dims, divisor, root)
    )?;
    let std = root.then(|| y.clone());
    y.record([x], Var { x: x.clone(), mean, dims, divisor, std })
}

struct Var {
    x: Tensor,
    mean: Tensor,
    dims: Dims,
    divisor: f64,
    /// The output, if it is a standard deviation.
    std: Option<Tensor>,
}
impl Backward for Var {
    const NAME: &'static str = "var";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let slope = match &self.std {
            None => grad.mul_scalar(2.0 / self.divisor)?,
            Some(y) => {
                let y = ctx.output(y);
                grad.div(&y.mul_scalar(self.divisor)?)?.masked_fill(&y.eq(&y.detach().zeros_like()?)?, 0.0)?
            }
        };
        let dx = if is_grad_enabled() {
            self.x.sub(&self.x.mean_keepdim(&self.dims)?)?.mul(&slope)?
        } else {
            on_device!(
                grad,
                "var",
                for_real!(grad.dtype(), "var", T => {
                    let rule = |x: T, mean: T, slope: T| (x - mean) * slope;
                    elementwise::map3("var", &self.x, &self.mean, &slope, rule)
                }),
                self.x.sub(&self.mean)?.mul(&slope)
            )?
        };
        Ok(smallvec![Some(dx)])
    }
}

/// Sum of squared distances from the context, divided; its root if asked.
#[derive(Clone, Copy)]
struct Deviation<R> {
    divisor: R,
    root: bool,
}
impl<R: Real> Fold for Deviation<R> {
    type In = R;
    type Acc = R;
    type Out = R;
    const CONTEXT: bool = true;
    #[inline(always)]
    fn neutral(self) -> R {
        R::ZERO
    }
    #[inline(always)]
    fn lift(self, value: R, mean: R) -> R {
        (value - mean) * (value - mean)
    }
    #[inline(always)]
    fn join(self, a: R, b: R) -> R {
        a + b
    }
    #[inline(always)]
    fn finish(self, acc: R, _: R) -> R {
        let variance = acc / self.divisor;
        if self.root { variance.sqrt() } else { variance }
    }
}

#[cfg(gpu)]
mod gpu {
    use super::{super::gpu::fold, *};
    use crate::gpu::sys;

    /// The result and the mean, in one pass.
    #[track_caller]
    pub fn spread(
        op: &'static str,
        x: &Tensor,
        dims: &[usize],
        divisor: f64,
        root: bool,
    ) -> Result<(Tensor, Tensor)> {
        let kind = if root { sys::SMALTI_STD } else { sys::SMALTI_VAR };
        let (y, mean) = fold(op, kind, x, dims, divisor, Some(x.dtype()))?;
        Ok((y, mean.ok_or_else(|| crate::Error::msg("internal: the mean is missing"))?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BackwardOptions, DType, Rng, gradcheck};

    #[test]
    fn values() -> Result<()> {
        let x = Tensor::from_slice(&[1.0f32, 2.0, 4.0, 9.0], [4])?;
        assert_eq!((x.var(0, 0)?.item()?, x.var((), 2)?.item()?), (9.5, 19.0));
        let far = x.add_scalar(4096.0)?;
        assert_eq!(far.var(0, 0)?.item()?, 9.5, "no cancellation");
        assert_eq!(x.to_dtype(DType::BF16)?.var_keepdim(0, 0)?.shape(), [1]);
        assert!(x.narrow(0, 0, 1)?.var(0, 1)?.item()?.is_nan());
        assert!(x.narrow(0, 0, 0)?.std(0, 0)?.item()?.is_nan());
        assert!(x.to_dtype(DType::I64)?.var(0, 1).is_err());
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        let x = Tensor::randn([3, 4, 2], &mut Rng::new(1))?.to_dtype(DType::F64)?;
        gradcheck(|t| t[0].var([0, 2], 1), &[x.permute([2, 0, 1])?])?;
        gradcheck(|t| t[0].std_keepdim(1, 0), &[x.clone()])?;
        gradcheck(|t| t[0].std((), 1), &[x.narrow(1, 0, 1)?.expand([3, 4, 2])?])?;
        let constant = Tensor::ones([3], DType::F64)?.requires_grad();
        let grads = constant.std(0, 1)?.backward()?;
        assert_eq!(grads.get(&constant).map(|g| g.to_vec::<f64>()).transpose()?, Some(vec![0.0; 3]));
        Ok(())
    }

    #[test]
    fn second_order() -> Result<()> {
        let x = Tensor::randn([5], &mut Rng::new(1))?.to_dtype(DType::F64)?;
        for root in [false, true] {
            // The numerical derivative is that of the first one, which the engine gives as a graph.
            let slope = |x: &Tensor| {
                let leaf = if x.tracked() { x.clone() } else { x.requires_grad() };
                let y = if root { leaf.std(0, 1)? } else { leaf.var(0, 1)? };
                let options = BackwardOptions { create_graph: true, ..Default::default() };
                let mut grads = y.mul(&y)?.backward_with(&options)?;
                grads.remove(&leaf).ok_or_else(|| crate::Error::msg("no gradient"))
            };
            let leaf = x.requires_grad();
            let weights = x.mul(&x)?;
            let second = slope(&leaf)?.mul(&weights)?.sum(())?.backward()?;
            let second = second.get(&leaf).map(|g| g.to_vec::<f64>()).transpose()?.unwrap_or_default();
            for (i, &analytic) in second.iter().enumerate() {
                let at = |h: f64| -> Result<f64> {
                    let mut values = x.to_vec::<f64>()?;
                    values[i] += h;
                    slope(&Tensor::from_slice(&values, [5])?)?.detach().mul(&weights)?.sum(())?.item()
                };
                let numeric = (at(1e-5)? - at(-1e-5)?) / 2e-5;
                assert!((numeric - analytic).abs() < 1e-6, "{analytic} is not {numeric}");
            }
        }
        Ok(())
    }
}
