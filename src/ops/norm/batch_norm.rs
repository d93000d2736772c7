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
        ensure!(self.rank() >= 2, OP, "needs shape [N, C, ..], got {:?}", self.shape());
        let channels = self.shape()[1];
        let vector = |name: &str, t: Option<&Tensor>| match t {
            Some(t) if *t.shape() == [channels] => {
                t.to_dtype(self.dtype().computed_in())?.contiguous().map(Some)
            }
            Some(t) => bail!(OP, "{name} has shape {:?}, needs [{channels}]", t.shape()),
            None => Ok(None),
        };
        let (weight, bias) = (vector("weight", weight)?, vector("bias", bias)?);
        let old_mean = vector("running mean", running.map(|r| r.0))?;
        let old_var = vector("running variance", running.map(|r| r.1))?;
        let count = self.numel() / channels.max(1);
        let batch = training || running.is_none();
        ensure!(!batch || count != 1, OP, "one value a channel has no variance, input {:?}", self.shape());
        let (mean, var) = match (old_mean.as_ref().filter(|_| !batch), old_var.as_ref()) {
            (Some(mean), Some(var)) => (mean.detach(), var.detach()),
            _ => on_device!(
                self,
                OP,
                for_float!(self.dtype(), OP, T => cpu::statistics::<T>(self)),
                gpu::statistics(self)
            )?,
        };
        let old = match (&old_mean, &old_var) {
            (Some(m), Some(v)) if training => Some((m.detach(), v.detach())),
            _ => None,
        };
        let unbiased = count as f64 / (count as f64 - 1.0);
        let (rstd, moved) = on_device!(
            self,
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
        let bias = bias.map(|b| b.detach());
        let rule = BatchNorm { x: self.clone(), mean, rstd, weight: weight.map(|w| w.detach()), batch };
        let y = on_device!(
            self,
            OP,
            for_float!(self.dtype(), OP, T => cpu::forward::<T>(&rule, bias.as_ref())),
            gpu::forward(&rule, bias.as_ref())
        )?;
        Ok((y.record([self, &inputs[0], &inputs[1]], rule)?, moved))
    }
}

const OP: &str = "batch_norm";

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
}

/// With xhat = (x - mean) * rstd: dbias = sum(dy), dweight = sum(dy * xhat), and over a batch of n
/// dx = weight * rstd * (dy - dbias / n - xhat * dweight / n); with fixed statistics dx = weight * rstd * dy.
impl Backward for BatchNorm {
    const NAME: &'static str = OP;

    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let (dx, dw, db) = on_device!(
            grad,
            Self::NAME,
            for_float!(grad.dtype(), Self::NAME, T => cpu::backward::<T>(self, grad, ctx.needs(0))),
            gpu::backward(self, grad, ctx.needs(0))
        )?;
        Ok(smallvec![dx, Some(dw), Some(db)])
    }
}

mod cpu {
    use super::{
        super::channels::{Channels, at},
        *,
    };
    use crate::{
        cpu::{
            axis::Axis,
            parallel::{GRAIN, SharedMut, for_ranges},
            pool::CpuVec,
            simd::simd,
        },
        dtype::{Float, Real},
    };
    use std::ops::Range;

    /// Channel sums by blocks that stay in the cache while they are read again.
    struct Blocks {
        channels: Channels,
        units: usize,
        grain: usize,
    }

    impl Blocks {
        fn of(axis: &Axis, len: usize) -> Blocks {
            let channels = Channels::of(axis);
            let width = channels.width();
            Blocks { units: len / width.max(1), grain: (GRAIN / width.max(1)).max(1), channels }
        }

        /// Slots of all blocks: a matrix [parts, channels] of partial sums.
        fn slots(&self) -> usize {
            if self.channels.rows() { self.units.div_ceil(self.grain) * self.channels.n } else { self.units }
        }

        /// Slots of the block `units`.
        fn of_block(&self, units: &Range<usize>) -> Range<usize> {
            if self.channels.rows() {
                let first = units.start / self.grain * self.channels.n;
                first..first + self.channels.n
            } else {
                units.clone()
            }
        }

        /// Elements behind one slot of row `part` of the matrix.
        fn count(&self, part: usize, inner: usize) -> usize {
            if self.channels.rows() { self.grain.min(self.units - part * self.grain) } else { inner }
        }

        fn each(&self, f: impl Fn(Range<usize>) + Sync) {
            for_ranges(self.units, self.grain, f);
        }
    }

    /// Mean and biased variance of each channel. Blocks are centred on their own mean and joined after Chan,
    /// Golub and LeVeque (1979), which keeps the digits where the mean is large.
    pub fn statistics<T: Float>(x: &Tensor) -> Result<(Tensor, Tensor)> {
        let axis = Axis::of(x, 1);
        let x = axis.view(x)?;
        let xs = x.cpu_slice::<T>();
        let blocks = Blocks::of(&axis, xs.len());
        let mut parts = [(); 2].map(|()| CpuVec::<T::Acc>::new(blocks.slots()));
        let [means, squares] = parts.each_mut().map(|p| SharedMut::new(p));
        blocks.each(|units| {
            let slots = blocks.of_block(&units);
            let (mean, square) = unsafe { (means.slice(slots.clone()), squares.slice(slots)) };
            let channels = &blocks.channels;
            // Sums of differences to one element: small numbers, which round less.
            let (start, n) = (units.start, axis.n);
            let pivot =
                |slot: usize| if channels.rows() { start * n + slot } else { (start + slot) * axis.inner };
            channels.reduce(units.clone(), mean, |slot, _| {
                let p = unsafe { at(xs, pivot(slot)) }.acc();
                move |i| unsafe { at(xs, i) }.acc() - p
            });
            let count = if channels.rows() { units.len() } else { axis.inner };
            let share = T::Acc::ONE / T::Acc::of(count as f64);
            mean.iter_mut().enumerate().for_each(|(slot, m)| *m = xs[pivot(slot)].acc() + *m * share);
            let mean = &*mean;
            channels.reduce(units, square, |slot, _| {
                let m = unsafe { at(mean, slot) };
                move |i| {
                    let d = unsafe { at(xs, i) }.acc() - m;
                    d * d
                }
            });
        });
        let n = axis.n;
        let mut mean = CpuVec::<T::Acc>::zeros(n);
        let mut var = CpuVec::<T::Acc>::zeros(n);
        let mut total = 0;
        for (part, (m, s)) in parts[0].chunks_exact(n.max(1)).zip(parts[1].chunks_exact(n.max(1))).enumerate()
        {
            let count = blocks.count(part, axis.inner);
            let share = T::Acc::of(count as f64 / (total + count) as f64);
            let weight = share * T::Acc::of(total as f64);
            simd(
                #[inline(always)]
                || {
                    for c in 0..n {
                        let d = m[c] - mean[c];
                        mean[c] += d * share;
                        var[c] += s[c] + d * d * weight;
                    }
                },
            );
            total += count;
        }
        let share = T::Acc::ONE / T::Acc::of(total as f64);
        var.iter_mut().for_each(|v| *v *= share);
        Ok((Tensor::from_cpu(mean, n, OP), Tensor::from_cpu(var, n, OP)))
    }

    pub fn forward<T: Float>(rule: &BatchNorm, bias: Option<&Tensor>) -> Result<Tensor> {
        let axis = Axis::of(&rule.x, 1);
        let x = axis.view(&rule.x)?;
        let (xs, n) = (x.cpu_slice::<T>(), axis.n);
        let (mean, scale) = (rule.mean.cpu_slice::<T::Acc>(), scale::<T::Acc>(rule));
        let bias = bias.map_or_else(|| CpuVec::zeros(n), |b| CpuVec::from_slice(b.cpu_slice::<T::Acc>()));
        let mut out = CpuVec::<T>::new(xs.len());
        let target = SharedMut::new(&mut out);
        let blocks = Blocks::of(&axis, xs.len());
        let (scale, bias) = (&scale[..], &bias[..]);
        blocks.each(|units| {
            blocks.channels.apply(units, &target, |_, c| {
                let (m, s, b) = unsafe { (at(mean, c), at(scale, c), at(bias, c)) };
                move |i| T::store((unsafe { at(xs, i) }.acc() - m).mul_add(s, b))
            });
        });
        Ok(axis.tensor(out, OP))
    }

    /// weight * rstd
    fn scale<A: Real>(rule: &BatchNorm) -> CpuVec<A> {
        let mut scale = CpuVec::from_slice(rule.rstd.cpu_slice::<A>());
        if let Some(w) = &rule.weight {
            scale.iter_mut().zip(w.cpu_slice::<A>()).for_each(|(s, w)| *s *= *w);
        }
        scale
    }

    /// dx, dweight, dbias.
    pub fn backward<T: Float>(
        rule: &BatchNorm,
        grad: &Tensor,
        input: bool,
    ) -> Result<(Option<Tensor>, Tensor, Tensor)> {
        let axis = Axis::of(&rule.x, 1);
        let (x, grad) = (axis.view(&rule.x)?, axis.view(grad)?);
        let (xs, gs) = (x.cpu_slice::<T>(), grad.cpu_slice::<T>());
        let (mean, rstd) = (rule.mean.cpu_slice::<T::Acc>(), rule.rstd.cpu_slice::<T::Acc>());
        let blocks = Blocks::of(&axis, xs.len());
        let (mut dw, db) = sums(&blocks, xs, gs, mean);
        dw.iter_mut().zip(rstd).for_each(|(w, r)| *w *= *r);
        let mut dx = CpuVec::<T>::new(if input { xs.len() } else { 0 });
        if input {
            // dx = a * (dy - b - c * (x - mean))
            let target = SharedMut::new(&mut dx);
            let share = if rule.batch { axis.n as f64 / xs.len() as f64 } else { 0.0 };
            let share = T::Acc::of(share);
            let a = scale::<T::Acc>(rule);
            let (mut b, mut c) = (CpuVec::from_slice(&db), CpuVec::from_slice(&dw));
            b.iter_mut().for_each(|b| *b *= share);
            c.iter_mut().zip(rstd).for_each(|(c, r)| *c *= *r * share);
            let (a, b, c) = (&a[..], &b[..], &c[..]);
            blocks.each(|units| {
                blocks.channels.apply(units, &target, |_, k| {
                    let (a, b, c, m) = unsafe { (at(a, k), at(b, k), at(c, k), at(mean, k)) };
                    move |i| {
                        let (x, g) = unsafe { (at(xs, i).acc(), at(gs, i).acc()) };
                        T::store(a * (g - b - c * (x - m)))
                    }
                });
            });
        }
        let vector = |v| Tensor::from_cpu(v, axis.n, OP);
        Ok((input.then(|| axis.tensor(dx, OP)), vector(dw), vector(db)))
    }

    /// Sums of dy * (x - mean) and of dy for each channel.
    fn sums<T: Float>(
        blocks: &Blocks,
        xs: &[T],
        gs: &[T],
        mean: &[T::Acc],
    ) -> (CpuVec<T::Acc>, CpuVec<T::Acc>) {
        let mut parts = [(); 2].map(|()| CpuVec::<T::Acc>::new(blocks.slots()));
        let [dots, plain] = parts.each_mut().map(|p| SharedMut::new(p));
        blocks.each(|units| {
            let slots = blocks.of_block(&units);
            let (dot, plain) = unsafe { (dots.slice(slots.clone()), plain.slice(slots)) };
            blocks.channels.reduce(units.clone(), plain, |_, _| |i| unsafe { at(gs, i) }.acc());
            blocks.channels.reduce(units, dot, |_, c| {
                let m = unsafe { at(mean, c) };
                move |i| unsafe { at(gs, i).acc() * (at(xs, i).acc() - m) }
            });
        });
        let n = blocks.channels.n;
        let total = |parts: &[T::Acc]| {
            let mut total = CpuVec::<T::Acc>::zeros(n);
            for part in parts.chunks_exact(n.max(1)) {
                simd(
                    #[inline(always)]
                    || total.iter_mut().zip(part).for_each(|(t, p)| *t += *p),
                );
            }
            total
        };
        (total(&parts[0]), total(&parts[1]))
    }
}

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
