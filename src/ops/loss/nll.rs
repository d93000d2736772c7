//! Negative log-likelihood of labels.

use super::{CrossEntropy, Reduction, labels::Layout};
use crate::{
    Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    for_float, on_device,
};
use smallvec::smallvec;

impl Tensor {
    /// `-weight_y * x_y` for log-probabilities x `[N, C, ..]` or `[C]` and labels y `[N, ..]`. The mean divides
    /// by the sum of the labels' weights. Saves: the labels.
    ///
    /// # Errors
    /// If shapes do not fit, a label is neither a class nor ignored, or `options` asks for label smoothing.
    #[track_caller]
    pub fn nll_loss(&self, target: &Tensor, options: &CrossEntropy) -> Result<Tensor> {
        crate::ensure!(options.label_smoothing == 0.0, OP, "has no label smoothing; use cross_entropy");
        let layout = Layout::of(OP, self)?;
        let weight = layout.weight(OP, options.weight.as_ref(), self.dtype())?;
        let labels = layout.labels(OP, target, options.ignore_index)?;
        let (ignore, reduction) = (options.ignore_index, options.reduction);
        let mut rule = Nll { layout, weight, labels, ignore, reduction, divisor: None };
        let x = rule.layout.matrix(self)?;
        let (y, divisor) = on_device!(
            self,
            OP,
            for_float!(self.dtype(), OP, T => Ok((cpu::forward::<T>(&rule, &x), None))),
            gpu::forward(&rule, &x)
        )?;
        rule.divisor = divisor;
        y.record([self], rule)
    }
}

const OP: &str = "nll_loss";

struct Nll {
    layout: Layout,
    weight: Option<Tensor>,
    labels: Tensor,
    ignore: i64,
    reduction: Reduction,
    /// That of the mean, where it was computed on a GPU.
    divisor: Option<Tensor>,
}

impl Backward for Nll {
    const NAME: &'static str = OP;

    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        let grad = grad.contiguous()?;
        let dx = on_device!(
            grad,
            Self::NAME,
            for_float!(grad.dtype(), Self::NAME, T => Ok(cpu::backward::<T>(self, &grad))),
            gpu::backward(self, &grad)
        )?;
        Ok(smallvec![Some(self.layout.restore(dx)?)])
    }
}

mod cpu {
    use super::*;
    use crate::{
        cpu::pool::CpuVec,
        dtype::{Float, Real},
    };

    /// Position of each row's label in the matrix, and its weight.
    fn picks<T: Float>(rule: &Nll) -> impl Iterator<Item = Option<(usize, T::Acc)>> {
        let weight = rule.weight.as_ref().map(|w| w.cpu_slice::<T>());
        rule.labels.cpu_slice::<i64>().iter().enumerate().map(move |(i, &y)| {
            (y != rule.ignore).then(|| {
                let weight = weight.map_or(T::Acc::ONE, |w| w[y as usize].acc());
                (i * rule.layout.classes + y as usize, weight)
            })
        })
    }

    fn divisor<T: Float>(rule: &Nll) -> T::Acc {
        match rule.reduction {
            Reduction::Mean => picks::<T>(rule).flatten().map(|(_, w)| w).sum(),
            _ => T::Acc::ONE,
        }
    }

    pub fn forward<T: Float>(rule: &Nll, x: &Tensor) -> Tensor {
        let xs = x.cpu_slice::<T>();
        let losses = picks::<T>(rule).map(|p| p.map_or(T::Acc::ZERO, |(at, w)| -(w * xs[at].acc())));
        if rule.reduction == Reduction::None {
            let values: Vec<T> = losses.map(T::store).collect();
            return Tensor::from_cpu(CpuVec::from_slice(&values), rule.layout.row_shape(), OP);
        }
        let total: T::Acc = losses.sum();
        Tensor::from_cpu(CpuVec::from_slice(&[T::store(total / divisor::<T>(rule))]), (), OP)
    }

    pub fn backward<T: Float>(rule: &Nll, grad: &Tensor) -> Tensor {
        let grads = grad.cpu_slice::<T>();
        let (each, divisor) = (rule.reduction == Reduction::None, divisor::<T>(rule));
        let mut dx = CpuVec::<T>::zeros(rule.layout.rows * rule.layout.classes);
        for (i, pick) in picks::<T>(rule).enumerate() {
            if let Some((at, w)) = pick {
                dx[at] = T::store(-(w * grads[if each { i } else { 0 }].acc() / divisor));
            }
        }
        Tensor::from_cpu(dx, [rule.layout.rows, rule.layout.classes], OP)
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;
    use crate::{
        gpu::{self, sys},
        ops::reduce::gpu::total,
    };

    /// The loss, and the divisor of its mean.
    #[track_caller]
    pub fn forward(rule: &Nll, x: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let rows = rule.layout.rows;
        let column = || gpu::empty(x, &[rows], x.dtype().computed_in(), OP);
        let (losses, shares) = (column()?, column()?);
        let (x, labels) = (x.reshape([rows, rule.layout.classes])?, rule.labels.reshape([rows])?);
        gpu::launch_some(
            OP,
            [Some(&x), Some(&labels), rule.weight.as_ref(), Some(&losses), Some(&shares)],
            |[x, labels, w, losses, shares], stream| unsafe {
                sys::smalti_nll_forward(x, labels, w, losses, shares, rule.ignore, stream)
            },
        )?;
        let (y, divisor) = match rule.reduction {
            Reduction::None => (losses.reshape(rule.layout.row_shape())?, None),
            Reduction::Sum => (total(OP, &losses)?, None),
            Reduction::Mean => {
                let divisor = total(OP, &shares)?;
                (total(OP, &losses)?.div(&divisor)?, Some(divisor))
            }
        };
        Ok((y.to_dtype(x.dtype())?, divisor))
    }

    #[track_caller]
    pub fn backward(rule: &Nll, grad: &Tensor) -> Result<Tensor> {
        let rows = rule.layout.rows;
        let dx = gpu::empty(grad, &[rows, rule.layout.classes], grad.dtype(), OP)?;
        let grad = match rule.reduction {
            Reduction::None => grad.reshape([rows])?,
            _ => grad.reshape(())?,
        };
        let labels = rule.labels.reshape([rows])?;
        gpu::launch_some(
            OP,
            [Some(&labels), rule.weight.as_ref(), Some(&grad), rule.divisor.as_ref(), Some(&dx)],
            |[labels, w, g, divisor, dx], stream| unsafe {
                sys::smalti_nll_backward(labels, w, g, divisor, dx, rule.ignore, stream)
            },
        )?;
        Ok(dx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Rng, gradcheck};

    #[test]
    fn gradients_and_errors() -> Result<()> {
        let mut rng = Rng::new(1);
        let mut random = |shape: &[usize]| Tensor::randn(shape, &mut rng)?.to_dtype(DType::F64);
        let labels = Tensor::from_slice(&[0i64, 4, 7, 2, 1, 3], [2, 3])?;
        let (x, permuted, weight) =
            (random(&[2, 5, 3])?, random(&[5, 3, 2])?.permute([2, 0, 1])?, random(&[5])?);
        for reduction in [Reduction::None, Reduction::Sum, Reduction::Mean] {
            for weight in [None, Some(weight.exp()?)] {
                let options = CrossEntropy { weight, ignore_index: 7, reduction, ..Default::default() };
                gradcheck(|t| t[0].nll_loss(&labels, &options), &[x.clone()])?;
                gradcheck(|t| t[0].nll_loss(&labels, &options), &[permuted.clone()])?;
            }
        }
        assert!(x.nll_loss(&labels, &CrossEntropy::default()).is_err(), "7 is no class");
        assert!(x.nll_loss(&x, &CrossEntropy::default()).is_err());
        let smooth = CrossEntropy { label_smoothing: 0.1, ..Default::default() };
        assert!(x.nll_loss(&labels, &smooth).is_err());
        Ok(())
    }
}
