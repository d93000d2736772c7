//! Losses of pairs of numbers, as a table: a line forward, a line backward.

use super::{RUN, Reduction};
use crate::{
    Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    dtype::Real,
    ensure, for_real, on_device,
};
use smallvec::smallvec;

/// A loss of one prediction and one target.
trait Loss: Copy + Send + Sync + 'static {
    const NAME: &'static str;
    fn f<R: Real>(self, x: R, t: R) -> R;
    /// Derivatives by the prediction and by the target.
    fn df<R: Real>(self, x: R, t: R) -> (R, R);
}

macro_rules! losses {
    ($($(#[$doc:meta])* $name:ident($($field:ident: $type:ty),*) $struct:ident {
        f: |$s:ident, $x:ident, $t:ident| $f:expr,
        df: |$sd:ident, $xd:ident, $td:ident| $df:expr $(,)?
    })+) => {
        impl Tensor {$(
            $(#[$doc])*
            /// Saves: both inputs.
            ///
            /// # Errors
            /// If shape or dtype of prediction and target differ, or the dtype is not a float.
            #[track_caller]
            pub fn $name(&self, target: &Tensor $(, $field: $type)*, reduction: Reduction) -> Result<Tensor> {
                apply($struct { $($field),* }, self, target, reduction)
            }
        )+}
        $(
            #[derive(Clone, Copy)]
            struct $struct { $($field: $type),* }
            impl Loss for $struct {
                const NAME: &'static str = stringify!($name);
                #[inline(always)]
                fn f<R: Real>(self, $x: R, $t: R) -> R { let $s = self; $f }
                #[inline(always)]
                fn df<R: Real>(self, $xd: R, $td: R) -> (R, R) { let $sd = self; $df }
            }
        )+
    };
}

losses! {
    /// (x - t)^2
    mse_loss() Mse {
        f: |_s, x, t| (x - t) * (x - t),
        df: |_s, x, t| pair(R::of(2.0) * (x - t)),
    }

    /// |x - t|; the derivative is 0 where they are equal.
    l1_loss() L1 {
        f: |_s, x, t| (x - t).abs(),
        df: |_s, x, t| pair(sign(x - t)),
    }

    /// d^2 / (2 beta) where |d| < beta, else |d| - beta / 2, with d = x - t.
    smooth_l1_loss(beta: f64) SmoothL1 {
        f: |s, x, t| {
            let (d, beta) = ((x - t).abs(), R::of(s.beta));
            if d < beta { R::of(0.5) * d * d / beta } else { d - R::of(0.5) * beta }
        },
        df: |s, x, t| {
            let (d, beta) = (x - t, R::of(s.beta));
            pair(if d.abs() < beta { d / beta } else { sign(d) })
        },
    }

    /// d^2 / 2 where |d| < delta, else delta * (|d| - delta / 2), with d = x - t.
    huber_loss(delta: f64) Huber {
        f: |s, x, t| {
            let (d, delta) = ((x - t).abs(), R::of(s.delta));
            if d < delta { R::of(0.5) * d * d } else { delta * (d - R::of(0.5) * delta) }
        },
        df: |s, x, t| {
            let (d, delta) = (x - t, R::of(s.delta));
            pair(if d.abs() < delta { d } else { delta * sign(d) })
        },
    }

    /// t * (log t - x) for log-probabilities x and probabilities t (0 log 0 = 0), or e^t * (t - x) if the
    /// targets are logarithms too.
    kl_div(log_target: bool) KlDiv {
        f: |s, x, t| if s.log_target {
            t.exp() * (t - x)
        } else if t == R::ZERO {
            -t * x
        } else {
            t * (t.ln() - x)
        },
        df: |s, x, t| if s.log_target {
            (-t.exp(), t.exp() * (t - x + R::ONE))
        } else {
            (-t, t.ln() + R::ONE - x)
        },
    }
}

/// Binary cross-entropy of logits, without weights: max(x, 0) - x t + log(1 + e^-|x|).
#[derive(Clone, Copy)]
struct Bce;
impl Loss for Bce {
    const NAME: &'static str = "binary_cross_entropy_with_logits";
    #[inline(always)]
    fn f<R: Real>(self, x: R, t: R) -> R {
        let positive = if x > R::ZERO { x } else { R::ZERO };
        positive - x * t + (-x.abs()).exp().ln_1p()
    }
    #[inline(always)]
    fn df<R: Real>(self, x: R, t: R) -> (R, R) {
        (R::ONE / (R::ONE + (-x).exp()) - t, -x)
    }
}

impl Tensor {
    /// Kullback-Leibler divergence, summed over everything and divided by the size of dimension 0: what the
    /// mathematical definition asks of a batch.
    ///
    /// # Errors
    /// As [`kl_div`](Self::kl_div).
    #[track_caller]
    pub fn kl_div_batchmean(&self, target: &Tensor, log_target: bool) -> Result<Tensor> {
        let batch = self.shape().first().copied().unwrap_or(1);
        self.kl_div(target, log_target, Reduction::Sum)?.mul_scalar(1.0 / batch as f64)
    }

    /// Binary cross-entropy of logits x with targets t in 0..=1:
    /// `weight * (pos_weight * t * log(1 + e^-x) + (1 - t) * log(1 + e^x))`. Both weights broadcast to the input;
    /// one pass without them.
    ///
    /// # Errors
    /// If shape or dtype of logits and targets differ, a weight does not broadcast, or the dtype is not a float.
    #[track_caller]
    pub fn binary_cross_entropy_with_logits(
        &self,
        target: &Tensor,
        weight: Option<&Tensor>,
        pos_weight: Option<&Tensor>,
        reduction: Reduction,
    ) -> Result<Tensor> {
        if weight.is_none() && pos_weight.is_none() {
            return apply(Bce, self, target, reduction);
        }
        let mut losses = match pos_weight {
            None => apply(Bce, self, target, Reduction::None)?,
            Some(factor) => {
                let ones = target.detach().ones_like()?;
                let positive = apply(Bce, self, &ones, Reduction::None)?.mul(target)?.mul(factor)?;
                let negative = apply(Bce, self, &ones.zeros_like()?, Reduction::None)?;
                positive.add(&negative.mul(&ones.sub(target)?)?)?
            }
        };
        if let Some(weight) = weight {
            losses = losses.mul(weight)?;
        }
        ensure!(
            losses.shape() == self.shape(),
            Bce::NAME,
            "a weight broadcasts the input {:?} to {:?}",
            self.shape(),
            losses.shape()
        );
        reduction.apply(&losses)
    }
}

/// Derivatives of a loss of the difference.
#[inline(always)]
fn pair<R: Real>(dx: R) -> (R, R) {
    (dx, -dx)
}

#[inline(always)]
fn sign<R: Real>(x: R) -> R {
    if x > R::ZERO {
        R::ONE
    } else if x < R::ZERO {
        -R::ONE
    } else {
        R::ZERO * x
    }
}

#[track_caller]
fn apply<L: Loss>(loss: L, x: &Tensor, t: &Tensor, reduction: Reduction) -> Result<Tensor> {
    ensure!(
        x.shape() == t.shape() && x.dtype() == t.dtype(),
        L::NAME,
        "needs prediction and target of one shape and dtype, got {} {:?} and {} {:?}",
        x.dtype(),
        x.shape(),
        t.dtype(),
        t.shape()
    );
    Tensor::in_f32([x, t], |[x, t]| {
        let y = on_device!(
            x,
            L::NAME,
            for_real!(x.dtype(), L::NAME, R => cpu::forward::<R, L>(loss, x, t, reduction))
        )?;
        y.record([x, t], Pointwise { loss, x: x.detach(), t: t.detach(), reduction })
    })
}

struct Pointwise<L> {
    loss: L,
    x: Tensor,
    t: Tensor,
    reduction: Reduction,
}

impl<L: Loss> Backward for Pointwise<L> {
    const NAME: &'static str = L::NAME;

    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let needs = [ctx.needs(0), ctx.needs(1)];
        let [dx, dt] = on_device!(
            grad,
            Self::NAME,
            for_real!(grad.dtype(), Self::NAME, R => cpu::backward::<R, L>(self, grad, needs))
        )?;
        Ok(smallvec![dx, dt])
    }
}

mod cpu {
    use super::*;
    use crate::cpu::{
        axis::Axis,
        parallel::{GRAIN, SharedMut, for_ranges},
        pool::CpuVec,
        rows,
        simd::simd_of,
    };

    pub fn forward<R: Real, L: Loss>(l: L, x: &Tensor, t: &Tensor, reduction: Reduction) -> Result<Tensor> {
        let axis = Axis::of(x, 0);
        let (x, t) = (axis.view(x)?, axis.view(t)?);
        let (xs, ts) = (x.cpu_slice::<R>(), t.cpu_slice::<R>());
        if reduction == Reduction::None {
            let mut out = CpuVec::<R>::new(xs.len());
            let target = SharedMut::new(&mut out);
            for_ranges(xs.len(), GRAIN, |range| {
                let (x, t, y) = (&xs[range.clone()], &ts[range.clone()], unsafe { target.slice(range) });
                simd_of::<R, _>(
                    #[inline(always)]
                    || (0..y.len()).for_each(|i| y[i] = l.f(x[i], t[i])),
                );
            });
            return Ok(axis.tensor(out, L::NAME));
        }
        let mut sums = CpuVec::<R>::new(xs.len().div_ceil(GRAIN));
        let target = SharedMut::new(&mut sums);
        for_ranges(xs.len(), GRAIN, |range| {
            let at = range.start / GRAIN;
            let (x, t) = (&xs[range.clone()], &ts[range]);
            let sum = simd_of::<R, _>(
                #[inline(always)]
                || {
                    let mut sum = R::ZERO;
                    for from in (0..x.len()).step_by(RUN) {
                        let to = x.len().min(from + RUN);
                        let (x, t) = (&x[from..to], &t[from..to]);
                        sum += rows::sum_of(x.len(), |i| unsafe {
                            l.f(*x.get_unchecked(i), *t.get_unchecked(i))
                        });
                    }
                    sum
                },
            );
            unsafe { *target.ptr().add(at) = sum };
        });
        let sum: R = sums.iter().copied().sum();
        let count = if reduction == Reduction::Mean { R::of(xs.len() as f64) } else { R::ONE };
        Ok(Tensor::from_cpu(CpuVec::from_slice(&[sum / count]), (), L::NAME))
    }

    pub fn backward<R: Real, L: Loss>(
        saved: &Pointwise<L>,
        grad: &Tensor,
        needs: [bool; 2],
    ) -> Result<[Option<Tensor>; 2]> {
        let axis = Axis::of(&saved.x, 0);
        let (x, t) = (axis.view(&saved.x)?, axis.view(&saved.t)?);
        let (xs, ts) = (x.cpu_slice::<R>(), t.cpu_slice::<R>());
        let n = xs.len();
        let mut out = needs.map(|needed| CpuVec::<R>::new(if needed { n } else { 0 }));
        let targets = out.each_mut().map(|o| SharedMut::new(o));
        // One gradient for all elements, or one for each.
        let each = (saved.reduction == Reduction::None).then(|| axis.view(grad)).transpose()?;
        let each = each.as_ref().map(|g| g.cpu_slice::<R>());
        let common = match saved.reduction {
            Reduction::None => R::ONE,
            Reduction::Sum => R::of(grad.item()?),
            Reduction::Mean => R::of(grad.item()? / n as f64),
        };
        let l = saved.loss;
        for_ranges(n, GRAIN, |range| {
            let (x, t) = (&xs[range.clone()], &ts[range.clone()]);
            let n = x.len();
            let t = &t[..n];
            let slice = |i: usize| unsafe { targets[i].slice(range.clone()) };
            let df = |i: usize| l.df(x[i], t[i]);
            simd_of::<R, _>(
                #[inline(always)]
                || match (each, needs) {
                    (None, [true, false]) => {
                        let dx = slice(0);
                        (0..n).for_each(|i| dx[i] = df(i).0 * common);
                    }
                    (None, [true, true]) => {
                        let (dx, dt) = (slice(0), slice(1));
                        for i in 0..n {
                            let (a, b) = df(i);
                            (dx[i], dt[i]) = (a * common, b * common);
                        }
                    }
                    _ => {
                        let g = |i: usize| each.map_or(common, |g| g[range.start + i]);
                        if needs[0] {
                            let dx = slice(0);
                            (0..n).for_each(|i| dx[i] = df(i).0 * g(i));
                        }
                        if needs[1] {
                            let dt = slice(1);
                            (0..n).for_each(|i| dt[i] = df(i).1 * g(i));
                        }
                    }
                },
            );
        });
        let [dx, dt] = out;
        let wrap = |needed: bool, data| needed.then(|| axis.tensor(data, L::NAME));
        Ok([wrap(needs[0], dx), wrap(needs[1], dt)])
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
        let x = random(&[3, 4], 1)?;
        for t in [random(&[3, 4], 2)?, random(&[4, 3], 3)?.t()?, random(&[1, 4], 4)?.expand([3, 4])?] {
            let inputs = [x.clone(), t.clone()];
            let probabilities = [x.clone(), t.sigmoid()?];
            let factor = random(&[4], 5)?.exp()?;
            for r in [Reduction::None, Reduction::Sum, Reduction::Mean] {
                gradcheck(|t| t[0].mse_loss(&t[1], r), &inputs)?;
                gradcheck(|t| t[0].l1_loss(&t[1], r), &inputs)?;
                gradcheck(|t| t[0].smooth_l1_loss(&t[1], 0.7, r), &inputs)?;
                gradcheck(|t| t[0].huber_loss(&t[1], 0.7, r), &inputs)?;
                gradcheck(|t| t[0].kl_div(&t[1], true, r), &inputs)?;
                gradcheck(|t| t[0].kl_div(&t[1], false, r), &probabilities)?;
                let bce = Tensor::binary_cross_entropy_with_logits;
                gradcheck(|t| bce(&t[0], &t[1], None, None, r), &probabilities)?;
                gradcheck(|t| bce(&t[0], &t[1], Some(&factor), Some(&factor), r), &probabilities)?;
            }
        }
        gradcheck(|t| x.mse_loss(&t[0], Reduction::Mean), &[random(&[3, 4], 2)?])
    }

    #[test]
    fn values_and_edges() -> Result<()> {
        let x = Tensor::from_slice(&[1f32, -2.0, 0.5, 0.0], [2, 2])?;
        let zero = x.zeros_like()?;
        let sum = |y: Result<Tensor>| y.and_then(|y| y.item());
        assert_eq!(sum(x.mse_loss(&zero, Reduction::Sum))?, 5.25);
        assert_eq!(sum(x.l1_loss(&zero, Reduction::Sum))?, 3.5);
        assert_eq!(sum(x.smooth_l1_loss(&zero, 1.0, Reduction::Sum))?, 0.5 + 1.5 + 0.125);
        assert_eq!(sum(x.smooth_l1_loss(&zero, 0.0, Reduction::Sum))?, 3.5, "beta 0 is l1");
        assert_eq!(sum(x.huber_loss(&zero, 1.0, Reduction::Sum))?, 0.5 + 1.5 + 0.125);
        let large = Tensor::from_slice(&[1e4f32, -1e4], 2)?;
        let y = large.binary_cross_entropy_with_logits(
            &Tensor::from_slice(&[1f32, 1.0], 2)?,
            None,
            None,
            Reduction::None,
        )?;
        assert_eq!(y.to_vec::<f32>()?, [0.0, 1e4]);
        let empty = Tensor::zeros([0, 3], DType::F32)?;
        assert!(sum(empty.mse_loss(&empty, Reduction::Mean))?.is_nan());
        assert_eq!(sum(empty.mse_loss(&empty, Reduction::Sum))?, 0.0);
        assert!(x.mse_loss(&Tensor::zeros([2, 1], DType::F32)?, Reduction::Mean).is_err());
        let wide = Tensor::ones([2, 2, 2], DType::F32)?;
        assert!(x.binary_cross_entropy_with_logits(&zero, Some(&wide), None, Reduction::Mean).is_err());
        let half = x.to_dtype(DType::BF16)?;
        assert_eq!(sum(half.mse_loss(&half.zeros_like()?, Reduction::Mean))?, 1.3125);
        Ok(())
    }
}
