//! Sums and means.

use super::{
    fold::{Fold, Plan},
    squeezed,
};
use crate::{
    DType, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    dtype::{Float, Real},
    ensure, for_float, on_device,
    shape::{DimList, Dims},
};
use smallvec::smallvec;
use std::marker::PhantomData;

impl Tensor {
    /// Sum over `dims`, which go away. Integers and booleans sum to i64.
    ///
    /// # Errors
    /// If a dimension does not exist.
    #[track_caller]
    pub fn sum(&self, dims: impl DimList) -> Result<Tensor> {
        let dims = dims.of("sum", self)?;
        squeezed(&self.sum_keepdim(&dims)?, &dims)
    }

    /// Sum over `dims`, which stay with size 1.
    ///
    /// # Errors
    /// If a dimension does not exist.
    #[track_caller]
    pub fn sum_keepdim(&self, dims: impl DimList) -> Result<Tensor> {
        let dims = dims.of("sum", self)?;
        let from = Dims::from_slice(self.shape());
        if self.dtype().is_float() {
            self.total("sum", &dims, 1)?.record([self], Sum { from })
        } else {
            self.to_dtype(DType::I64)?.total("sum", &dims, 1)
        }
    }

    /// Mean over `dims`, which go away; NaN over nothing.
    ///
    /// # Errors
    /// If a dimension does not exist, or the dtype is not a float.
    #[track_caller]
    pub fn mean(&self, dims: impl DimList) -> Result<Tensor> {
        let dims = dims.of("mean", self)?;
        squeezed(&self.mean_keepdim(&dims)?, &dims)
    }

    /// Mean over `dims`, which stay with size 1; NaN over nothing.
    ///
    /// # Errors
    /// If a dimension does not exist, or the dtype is not a float.
    #[track_caller]
    pub fn mean_keepdim(&self, dims: impl DimList) -> Result<Tensor> {
        let dims = dims.of("mean", self)?;
        ensure!(self.dtype().is_float(), "mean", "needs a float tensor, got {}", self.dtype());
        let n = dims.iter().map(|&d| self.shape()[d]).product();
        let y = self.total("mean", &dims, n)?;
        y.record([self], Mean { from: Dims::from_slice(self.shape()), n })
    }

    /// Sums a gradient of a broadcast shape down to the shape that was broadcast.
    pub(crate) fn sum_to(&self, shape: &[usize]) -> Result<Tensor> {
        let lead = self.rank() - shape.len();
        let dims: Dims = (0..self.rank())
            .filter(|&d| d < lead || (shape[d - lead] == 1 && self.shape()[d] != 1))
            .collect();
        self.sum_keepdim(&dims)?.reshape(shape)
    }

    /// Sum of floats or i64 over `dims`, divided by `n`.
    fn total(&self, op: &'static str, dims: &[usize], n: usize) -> Result<Tensor> {
        on_device!(
            self,
            op,
            if self.dtype() == DType::I64 {
                let plan = Plan::new::<i64>(self, dims, op);
                Ok(plan.tensor(plan.run(Integers, &[]), op))
            } else {
                for_float!(self.dtype(), op, T => {
                    let plan = Plan::new::<T>(self, dims, op);
                    Ok(plan.tensor(plan.run(Floats::<T>::over(n), &[]), op))
                })
            },
            super::gpu::fold_one(op, crate::gpu::sys::SMALTI_SUM, self, dims, n as f64)
        )
    }
}

struct Sum {
    from: Dims,
}
impl Backward for Sum {
    const NAME: &'static str = "sum";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(grad.expand(&self.from)?)])
    }
}

struct Mean {
    from: Dims,
    n: usize,
}
impl Backward for Mean {
    const NAME: &'static str = "mean";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(grad.mul_scalar(1.0 / self.n as f64)?.expand(&self.from)?)])
    }
}

/// Sum of floats, divided by a count.
#[derive(Clone, Copy)]
pub struct Floats<T: Float> {
    divisor: T::Acc,
    of: PhantomData<T>,
}
impl<T: Float> Floats<T> {
    pub fn over(n: usize) -> Self {
        Floats { divisor: T::Acc::of(n as f64), of: PhantomData }
    }
}
impl<T: Float> Fold for Floats<T> {
    type In = T;
    type Acc = T::Acc;
    type Out = T;
    #[inline(always)]
    fn neutral(self) -> T::Acc {
        T::Acc::ZERO
    }
    #[inline(always)]
    fn lift(self, value: T, _: T::Acc) -> T::Acc {
        value.acc()
    }
    #[inline(always)]
    fn join(self, a: T::Acc, b: T::Acc) -> T::Acc {
        a + b
    }
    #[inline(always)]
    fn finish(self, acc: T::Acc, _: T::Acc) -> T {
        T::store(acc / self.divisor)
    }
}

/// Sum of i64; wraps.
#[derive(Clone, Copy)]
struct Integers;
impl Fold for Integers {
    type In = i64;
    type Acc = i64;
    type Out = i64;
    fn neutral(self) -> i64 {
        0
    }
    #[inline(always)]
    fn lift(self, value: i64, _: i64) -> i64 {
        value
    }
    #[inline(always)]
    fn join(self, a: i64, b: i64) -> i64 {
        a.wrapping_add(b)
    }
    fn finish(self, acc: i64, _: i64) -> i64 {
        acc
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Rng, gradcheck};

    /// Sums in f64 by the definition.
    fn naive(x: &Tensor, dims: &[usize]) -> Result<Vec<f64>> {
        let order: Vec<usize> =
            (0..x.rank()).filter(|d| !dims.contains(d)).chain(dims.iter().copied()).collect();
        let n: usize = dims.iter().map(|&d| x.shape()[d]).product();
        let values = x.permute(&order[..])?.to_vec::<f64>()?;
        Ok(values.chunks(n).map(|line| line.iter().sum()).collect())
    }

    #[test]
    fn against_the_definition() -> Result<()> {
        let x = Tensor::randn([3, 37, 5, 50], &mut Rng::new(1))?;
        let views = [
            x.clone(),
            x.permute([3, 1, 0, 2])?,
            x.permute([2, 0, 3, 1])?,
            x.slice(3, 1, 48, 3)?,
            x.narrow(1, 2, 1)?.expand([3, 37, 5, 50])?,
            x.flatten(0, 2)?.t()?.unsqueeze(1)?.unsqueeze(0)?,
        ];
        for x in views {
            for dims in [&[0usize][..], &[1], &[2], &[3], &[0, 2], &[1, 3], &[0, 1, 3], &[0, 1, 2, 3], &[]] {
                let expected = naive(&x.to_dtype(DType::F64)?, dims)?;
                let y = x.sum(dims)?.to_dtype(DType::F64)?.to_vec::<f64>()?;
                assert_eq!(y.len(), expected.len());
                let largest = expected.iter().fold(1f64, |m, v| m.max(v.abs()));
                let worst = y.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(worst <= 1e-6 * largest, "{:?} over {dims:?}: {worst:e}", x.shape());
            }
        }
        Ok(())
    }

    #[test]
    fn long_sums_are_accurate() -> Result<()> {
        let x = Tensor::rand([1 << 20, 3], &mut Rng::new(1))?;
        for x in [x.clone(), x.t()?.contiguous()?.t()?] {
            let exact = x.to_dtype(DType::F64)?.sum(0)?.to_vec::<f64>()?;
            for (y, exact) in x.sum(0)?.to_vec::<f32>()?.iter().zip(exact) {
                assert!((f64::from(*y) - exact).abs() <= 1e-6 * exact, "{y} is not {exact}");
            }
        }
        Ok(())
    }

    #[test]
    fn other_dtypes_and_nothing() -> Result<()> {
        let x = Tensor::ones([300, 7], DType::F16)?;
        assert_eq!(x.mean(())?.item()?, 1.0);
        assert_eq!(
            x.mul_scalar(100.0)?.mean(0)?.to_dtype(DType::F64)?.to_vec::<f64>()?,
            [100.0; 7],
            "the sum exceeds f16"
        );
        assert_eq!(x.to_dtype(DType::BF16)?.sum(0)?.to_dtype(DType::F64)?.to_vec::<f64>()?, [300.0; 7]);
        assert_eq!(x.to_dtype(DType::Bool)?.sum(1)?.to_vec::<i64>()?, [7; 300]);
        let empty = Tensor::zeros([2, 0, 3], DType::F32)?;
        assert_eq!(empty.sum(1)?.to_vec::<f32>()?, [0.0; 6]);
        assert_eq!(empty.sum(0)?.shape(), [0, 3]);
        assert!(empty.mean(())?.item()?.is_nan());
        assert_eq!(Tensor::scalar(2.0).sum(-1)?.item()?, 2.0);
        assert!(x.sum(2).is_err() && x.sum([0, -2]).is_err() && x.to_dtype(DType::I32)?.mean(0).is_err());
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        let x = Tensor::randn([2, 3, 4], &mut Rng::new(1))?.to_dtype(DType::F64)?;
        gradcheck(|t| t[0].sum([0, 2]), &[x.permute([1, 0, 2])?])?;
        gradcheck(|t| t[0].mean_keepdim(1)?.mul(&t[0]), &[x])
    }
}
