//! Batch normalisation.

use crate::{
    Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    bail, ensure, for_float, on_device,
};
use smallvec::smallvec;

/// Running mean and running variance, `[C]` each.
pub type Running<T> = (T, T);

impl Tensor {
    /// `(x - mean) / sqrt(var + eps) * weight + bias` for each channel of `[N, C, ..]`; weight, bias and the
    /// running statistics have shape `[C]`. The memory order (NCHW or channels-last) is kept.
    ///
    /// In training, mean and biased variance are the batch's, and the running statistics, moved towards them
    /// by the share `momentum` (the variance towards the unbiased one), come back as the second result. In
    /// evaluation, and only if running statistics are given, mean and variance are those.
    /// Saves: its input, mean and 1/sqrt(var + eps) of each channel.
    ///
    /// # Errors
    /// If a vector is not of shape `[C]`, if there is but one value a channel in training, or the dtype is not
    /// a float.
    #[track_caller]
    pub fn batch_norm(
        &self,
        running: Option<Running<&Tensor>>,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        training: bool,
        momentum: f64,
        eps: f64,
    ) -> Result<(Tensor, Option<Running<Tensor>>)> {
        normalised(self, After::Nothing, running, weight, bias, training, momentum, eps)
    }

    /// `relu(batch_norm(x) + residual)`, the end of a branch of a residual network (He et al. 2015), or without a
    /// residual `relu(batch_norm(x))`; otherwise as [`batch_norm`](Self::batch_norm). On the CPU in one pass.
    /// Saves: as `batch_norm`, and its result if there is a residual.
    ///
    /// # Errors
    /// As `batch_norm`; if the residual has another shape or dtype.
    #[track_caller]
    pub fn batch_norm_relu(
        &self,
        residual: Option<&Tensor>,
        running: Option<Running<&Tensor>>,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        training: bool,
        momentum: f64,
        eps: f64,
    ) -> Result<(Tensor, Option<Running<Tensor>>)> {
        if let Some(r) = residual {
            ensure!(
                r.shape() == self.shape() && r.dtype() == self.dtype(),
                "batch_norm_relu",
                "the input is {} {:?}, the residual {} {:?}",
                self.dtype(),
                self.shape(),
                r.dtype(),
                r.shape()
            );
        }
        #[cfg(gpu)]
        if crate::gpu::on_gpu(self) {
            let (y, moved) = self.batch_norm(running, weight, bias, training, momentum, eps)?;
            let y = residual.map_or_else(|| Ok(y.clone()), |r| y.add(r))?;
            return Ok((y.relu()?, moved));
        }
        normalised(self, After::Relu(residual), running, weight, bias, training, momentum, eps)
    }
}

const OP: &str = "batch_norm";

/// What follows the normalisation in the same pass.
#[derive(Clone, Copy)]
enum After<'a> {
    Nothing,
    /// `relu(. + residual)`
    Relu(Option<&'a Tensor>),
}

#[track_caller]
fn normalised(
    x: &Tensor,
    after: After,
    running: Option<Running<&Tensor>>,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    training: bool,
    momentum: f64,
    eps: f64,
) -> Result<(Tensor, Option<Running<Tensor>>)> {
    ensure!(x.rank() >= 2, OP, "needs shape [N, C, ..], got {:?}", x.shape());
    let channels = x.shape()[1];
    let vector = |name: &str, t: Option<&Tensor>| match t {
        Some(t) if *t.shape() == [channels] => t.to_dtype(x.dtype().computed_in())?.contiguous().map(Some),
        Some(t) => bail!(OP, "{name} has shape {:?}, needs [{channels}]", t.shape()),
        None => Ok(None),
    };
    let (weight, bias) = (vector("weight", weight)?, vector("bias", bias)?);
    let old_mean = vector("running mean", running.map(|r| r.0))?;
    let old_var = vector("running variance", running.map(|r| r.1))?;
    let count = x.numel() / channels.max(1);
    let batch = training || running.is_none();
    ensure!(!batch || count != 1, OP, "one value a channel has no variance, input {:?}", x.shape());
    let (mean, var) = match (old_mean.as_ref().filter(|_| !batch), old_var.as_ref()) {
        (Some(mean), Some(var)) => (mean.detach(), var.detach()),
        _ => on_device!(x, OP, for_float!(x.dtype(), OP, T => cpu::statistics::<T>(x)), gpu::statistics(x))?,
    };
    let old = match (&old_mean, &old_var) {
        (Some(m), Some(v)) if training => Some((m.detach(), v.detach())),
        _ => None,
    };
    let unbiased = count as f64 / (count as f64 - 1.0);
    let (rstd, moved) = on_device!(
        x,
        OP,
        advance(&mean, &var, old.as_ref(), eps, momentum, unbiased),
        gpu::advance(&mean, &var, old.as_ref(), eps, momentum, unbiased)
    )?;
    let moved = match (moved, running) {
        (Some((m, v)), Some(like)) => Some((m.to_dtype(like.0.dtype())?, v.to_dtype(like.1.dtype())?)),
        _ => None,
    };
    // An untracked tensor stands for what is not there.
    let inputs = [&weight, &bias].map(|t| t.clone().unwrap_or_else(|| mean.clone()));
    let (weight, bias) = (weight.map(|w| w.detach()), bias.map(|b| b.detach()));
    let rule = BatchNorm { x: x.clone(), mean, rstd, weight, batch, then: Then::Nothing };
    let y = on_device!(
        x,
        OP,
        for_float!(x.dtype(), OP, T => cpu::forward::<T>(&rule, bias.as_ref(), after)),
        gpu::forward(&rule, bias.as_ref())
    )?;
    Ok((recorded(y, rule, after, bias, &inputs)?, moved))
}

/// The result's place in the graph; `inputs` are weight and bias.
fn recorded(
    y: Tensor,
    mut rule: BatchNorm,
    after: After,
    bias: Option<Tensor>,
    [w, b]: &[Tensor; 2],
) -> Result<Tensor> {
    let x = rule.x.clone();
    match after {
        After::Nothing => y.record([&x, w, b], rule),
        After::Relu(None) => {
            rule.then = Then::Relu { bias };
            y.record([&x, w, b], rule)
        }
        After::Relu(Some(residual)) => {
            rule.then = Then::AddRelu { y: y.clone() };
            y.record([&x, w, b, residual], rule)
        }
    }
}

/// 1/sqrt(var + eps), and what was, moved towards the batch's mean and unbiased variance.
fn advance(
    mean: &Tensor,
    var: &Tensor,
    old: Option<&Running<Tensor>>,
    eps: f64,
    momentum: f64,
    unbiased: f64,
) -> Result<(Tensor, Option<Running<Tensor>>)> {
    crate::no_grad(|| {
        let step =
            |old: &Tensor, new: &Tensor| old.mul_scalar(1.0 - momentum)?.add(&new.mul_scalar(momentum)?);
        let moved = match old {
            Some((m, v)) => Some((step(m, mean)?, step(v, &var.mul_scalar(unbiased)?)?)),
            None => None,
        };
        Ok((var.add_scalar(eps)?.rsqrt()?, moved))
    })
}

struct BatchNorm {
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Option<Tensor>,
    /// Do mean and rstd depend on x?
    batch: bool,
    then: Then,
}

/// What the gradient needs of the pass's other operations. The gradient of the normalised values is that of the
/// result where it is positive, else 0.
enum Then {
    Nothing,
    /// The bias: the result is computed again, which costs less than to read it.
    Relu {
        bias: Option<Tensor>,
    },
    /// The result.
    AddRelu {
        y: Tensor,
    },
}

/// With xhat = (x - mean) * rstd: dbias = sum(dy), dweight = sum(dy * xhat), and over a batch of n
/// dx = weight * rstd * (dy - dbias / n - xhat * dweight / n); with fixed statistics dx = weight * rstd * dy.
impl Backward for BatchNorm {
    const NAME: &'static str = OP;

    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let (dx, dw, db, dr) = on_device!(
            grad,
            Self::NAME,
            for_float!(grad.dtype(), Self::NAME, T => cpu::backward::<T>(self, grad, ctx.needs(0))),
            gpu::backward(self, grad, ctx.needs(0)).map(|(dx, dw, db)| (dx, dw, db, None))
        )?;
        Ok(smallvec![dx, Some(dw), Some(db), dr])
    }
}

mod cpu;
#[cfg(gpu)]
mod gpu;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Rng, gradcheck};

    fn random(shape: &[usize], seed: u64) -> Result<Tensor> {
        Tensor::randn(shape, &mut Rng::new(seed))?.to_dtype(DType::F64)
    }

    #[test]
    fn gradients() -> Result<()> {
        let (w, b, m) = (random(&[3], 1)?, random(&[3], 2)?, random(&[3], 3)?);
        let v = m.exp()?;
        let x = random(&[2, 3, 2, 9], 4)?;
        for x in [
            x.clone(),
            x.to_channels_last()?,
            random(&[5, 3], 5)?,
            random(&[3, 5, 1], 6)?.permute([1, 0, 2])?,
        ] {
            let inputs = [x.clone(), w.clone(), b.clone()];
            gradcheck(|t| Ok(t[0].batch_norm(None, Some(&t[1]), Some(&t[2]), true, 0.1, 1e-5)?.0), &inputs)?;
            let running = Some((&m, &v));
            gradcheck(
                |t| Ok(t[0].batch_norm(running, Some(&t[1]), Some(&t[2]), false, 0.1, 1e-5)?.0),
                &inputs,
            )?;
            gradcheck(|t| Ok(t[0].batch_norm(running, None, None, true, 0.1, 1e-5)?.0), &[x])?;
        }
        Ok(())
    }

    #[test]
    fn relu_in_the_same_pass() -> Result<()> {
        let (w, b, m) = (random(&[3], 1)?, random(&[3], 2)?, random(&[3], 3)?);
        let v = m.exp()?;
        let image = random(&[2, 3, 2, 9], 4)?;
        for x in [image.clone(), image.to_channels_last()?, random(&[5, 3], 5)?] {
            let inputs = [x.clone(), w.clone(), b.clone(), random(x.shape(), 6)?];
            for (training, residual) in [(true, true), (true, false), (false, true), (false, false)] {
                let run = |t: &[Tensor]| {
                    let added = residual.then(|| &t[3]);
                    let running = Some((&m, &v));
                    Ok(t[0].batch_norm_relu(added, running, Some(&t[1]), Some(&t[2]), training, 0.1, 1e-5)?.0)
                };
                let y = x.batch_norm(Some((&m, &v)), Some(&w), Some(&b), training, 0.1, 1e-5)?.0;
                let y = if residual { y.add(&inputs[3])? } else { y }.relu()?;
                assert_eq!(run(&inputs)?.to_vec::<f64>()?, y.to_vec::<f64>()?);
                gradcheck(run, &inputs[..if residual { 4 } else { 3 }])?;
            }
        }
        let long = random(&[2, 3, 1, 9], 4)?;
        assert!(image.batch_norm_relu(Some(&long), None, None, None, true, 0.1, 1e-5).is_err());
        Ok(())
    }

    #[test]
    fn running_statistics_and_layouts() -> Result<()> {
        // several blocks, and a mean far from zero
        let x = Tensor::randn([3, 5, 90, 50], &mut Rng::new(1))?.add_scalar(100.0)?;
        let (zero, one) = (Tensor::zeros([5], DType::F32)?, Tensor::ones([5], DType::F32)?);
        let run = |x: &Tensor| x.batch_norm(Some((&zero, &one)), None, None, true, 0.1, 0.0);
        let (y, moved) = run(&x)?;
        let (y_last, moved_last) = run(&x.to_channels_last()?)?;
        let (Some((mean, var)), Some((mean_last, var_last))) = (moved, moved_last) else { panic!() };
        let close = |a: &Tensor, b: &Tensor, tolerance: f32| -> Result<()> {
            for (a, b) in a.to_vec::<f32>()?.iter().zip(b.to_vec::<f32>()?) {
                assert!((a - b).abs() <= tolerance, "{a} {b}");
            }
            Ok(())
        };
        close(&y, &y_last, 1e-4)?;
        close(&mean, &mean_last, 1e-4)?;
        close(&var, &var_last, 1e-5)?;
        close(&mean, &Tensor::full([5], 10.0, DType::F32)?, 0.01)?;
        close(&var, &one, 0.01)?;
        close(&y.mul(&y)?.mean([0, 2, 3])?, &one, 1e-4)?;
        let (_, none) = x.batch_norm(Some((&zero, &one)), None, None, false, 0.1, 1e-5)?;
        assert!(none.is_none(), "evaluation moves nothing");
        Ok(())
    }

    #[test]
    fn edges() -> Result<()> {
        let x = random(&[2, 3, 4], 1)?;
        assert!(x.batch_norm(None, Some(&random(&[4], 1)?), None, true, 0.1, 1e-5).is_err());
        assert!(random(&[3], 1)?.batch_norm(None, None, None, true, 0.1, 1e-5).is_err());
        assert!(random(&[1, 3], 1)?.batch_norm(None, None, None, true, 0.1, 1e-5).is_err());
        let (y, _) = Tensor::zeros([0, 3, 2], DType::F32)?.batch_norm(None, None, None, true, 0.1, 1e-5)?;
        assert_eq!(y.shape(), [0, 3, 2]);
        let half = x.to_dtype(DType::BF16)?.batch_norm(None, None, None, true, 0.1, 1e-5)?.0;
        let exact = x.batch_norm(None, None, None, true, 0.1, 1e-5)?.0.to_vec::<f64>()?;
        for (a, b) in half.to_dtype(DType::F64)?.to_vec::<f64>()?.iter().zip(exact) {
            assert!((a - b).abs() < 0.02);
        }
        Ok(())
    }
}
