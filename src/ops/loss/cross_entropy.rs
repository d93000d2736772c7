//! Cross-entropy of logits, fused with the softmax: one pass forward, one backward, and nothing of the size of
//! the logits saved besides them.

use super::{Reduction, labels::Layout, total};
use crate::{
    Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    ensure, for_real, on_device,
};
use smallvec::smallvec;

/// Settings of [`Tensor::cross_entropy`] and [`Tensor::nll_loss`].
#[derive(Clone, Debug)]
pub struct CrossEntropy {
    /// Weight of each class, `[C]`. It gets no gradient.
    pub weight: Option<Tensor>,
    /// Labels of this value do not count; -100 by default.
    pub ignore_index: i64,
    /// Share of the target that is spread over all classes. Not for `nll_loss`.
    pub label_smoothing: f64,
    /// The mean over labels divides by the sum of their weights, that over probabilities by their number.
    pub reduction: Reduction,
}

impl Default for CrossEntropy {
    fn default() -> Self {
        CrossEntropy { weight: None, ignore_index: -100, label_smoothing: 0.0, reduction: Reduction::Mean }
    }
}

impl Tensor {
    /// `-sum_c weight_c * t_c * log_softmax(x)_c` for logits `[N, C, ..]` or `[C]` with the classes in dimension 1
    /// (0), and targets t that are labels (integers, `[N, ..]`) or probabilities (of the logits' shape).
    /// Saves: logits, targets, and maximum and log-sum of each row.
    ///
    /// # Errors
    /// If shapes do not fit, a label is neither a class nor ignored, the smoothing lies outside 0..=1, or the
    /// logits are no floats.
    #[track_caller]
    pub fn cross_entropy(&self, target: &Tensor, options: &CrossEntropy) -> Result<Tensor> {
        let dtype = self.dtype();
        let smoothing = options.label_smoothing;
        ensure!((0.0..=1.0).contains(&smoothing), OP, "label_smoothing must lie in 0..=1, got {smoothing}");
        let layout = Layout::of(OP, self)?;
        let logits = self.to_dtype(dtype.computed_in())?;
        let weight = layout.weight(OP, options.weight.as_ref(), logits.dtype())?;
        let (target, rows) = if target.dtype().is_float() {
            ensure!(
                target.shape() == self.shape(),
                OP,
                "probabilities {:?} are not of the shape of the logits {:?}",
                target.shape(),
                self.shape()
            );
            let target = target.to_dtype(logits.dtype())?;
            (target.clone(), layout.matrix(&target)?)
        } else {
            (target.clone(), layout.labels(OP, target, options.ignore_index)?)
        };
        let x = layout.matrix(&logits)?;
        let (ignore_index, reduction) = (options.ignore_index, options.reduction);
        let saved = Saved { x, rows, weight, layout, ignore_index, smoothing, reduction };
        let (y, state) =
            on_device!(logits, OP, for_real!(logits.dtype(), OP, T => Ok(cpu::forward::<T>(&saved))))?;
        y.record([&logits, &target], Rule { saved, state })?.to_dtype(dtype)
    }
}

const OP: &str = "cross_entropy";

struct Saved {
    x: Tensor,
    /// Labels or probabilities.
    rows: Tensor,
    weight: Option<Tensor>,
    layout: Layout,
    ignore_index: i64,
    smoothing: f64,
    reduction: Reduction,
}

/// What the forward found: maximum and log-sum of each row, and the divisor of the mean.
struct State {
    max: Tensor,
    log_sum: Tensor,
    divisor: f64,
}
#[cfg(gpu)]
crate::gpu::upload_fields!(State { max, log_sum, divisor });

struct Rule {
    saved: Saved,
    state: State,
}

/// With p the softmax, u = weight * t after smoothing: dx = p * sum(u) - u, dt = -weight * log p.
impl Backward for Rule {
    const NAME: &'static str = OP;

    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let layout = &self.saved.layout;
        let grad = grad.contiguous()?;
        let needs = [ctx.needs(0), ctx.needs(1)];
        let [dx, dt] = on_device!(
            grad,
            Self::NAME,
            for_real!(grad.dtype(), Self::NAME, T => Ok(cpu::backward::<T>(self, &grad, needs)))
        )?;
        let restore = |t: Option<Tensor>| t.map(|t| layout.restore(t)).transpose();
        Ok(smallvec![restore(dx)?, restore(dt)?])
    }
}

mod cpu {
    use super::*;
    use crate::{
        cpu::{
            parallel::{SharedMut, for_rows},
            pool::CpuVec,
            rows,
            simd::simd_of,
        },
        dtype::Real,
    };

    /// The target of one row.
    #[derive(Clone, Copy)]
    enum Target<'a, R> {
        Label(usize),
        Ignored,
        Probabilities(&'a [R]),
    }

    /// What all rows share.
    struct Problem<'a, R> {
        x: &'a [R],
        labels: Option<&'a [i64]>,
        probabilities: &'a [R],
        weight: CpuVec<R>,
        weight_sum: R,
        ignore: i64,
        smoothing: R,
        classes: usize,
        rows: usize,
    }

    impl<'a, R: Real> Problem<'a, R> {
        fn of(saved: &'a Saved) -> Self {
            let classes = saved.layout.classes;
            let weight = match &saved.weight {
                Some(w) => CpuVec::from_slice(w.cpu_slice::<R>()),
                None => CpuVec::full(classes, R::ONE),
            };
            let labels = (!saved.rows.dtype().is_float()).then(|| saved.rows.cpu_slice::<i64>());
            Problem {
                x: saved.x.cpu_slice::<R>(),
                labels,
                probabilities: if labels.is_none() { saved.rows.cpu_slice::<R>() } else { &[] },
                weight_sum: weight.iter().copied().sum(),
                weight,
                ignore: saved.ignore_index,
                smoothing: R::of(saved.smoothing),
                classes,
                rows: saved.layout.rows,
            }
        }

        fn row(&self, i: usize) -> (&'a [R], Target<'a, R>) {
            let at = i * self.classes..(i + 1) * self.classes;
            let target = match self.labels {
                None => Target::Probabilities(&self.probabilities[at.clone()]),
                Some(labels) if labels[i] == self.ignore => Target::Ignored,
                Some(labels) => Target::Label(labels[i] as usize),
            };
            (&self.x[at], target)
        }

        /// The share of the target that smoothing gives to each class.
        fn spread(&self) -> R {
            self.smoothing / R::of(self.classes as f64)
        }

        /// Weighted target of class c.
        #[inline(always)]
        fn target(&self, t: &[R], c: usize) -> R {
            let (weight, t) = unsafe { (*self.weight.get_unchecked(c), *t.get_unchecked(c)) };
            weight * t.mul_add(R::ONE - self.smoothing, self.spread())
        }

        /// Loss of a row with its maximum and log-sum, and its weight in the mean.
        #[inline(always)]
        fn loss(&self, x: &[R], target: Target<R>, max: R, log_sum: R) -> (R, R) {
            // Differences to the maximum first: the log-sum-exp of large logits has no digits to spare.
            match target {
                Target::Ignored => (R::ZERO, R::ZERO),
                Target::Label(y) => {
                    let weight = self.weight[y];
                    let plain = weight * (max - x[y] + log_sum) * (R::ONE - self.smoothing);
                    if self.smoothing == R::ZERO {
                        return (plain, weight);
                    }
                    let all = rows::sum_of(x.len(), |c| unsafe {
                        *self.weight.get_unchecked(c) * (max - *x.get_unchecked(c) + log_sum)
                    });
                    (plain + self.spread() * all, weight)
                }
                Target::Probabilities(t) => {
                    let loss = rows::sum_of(x.len(), |c| unsafe {
                        self.target(t, c) * (max - *x.get_unchecked(c) + log_sum)
                    });
                    (loss, R::ONE)
                }
            }
        }

        /// dx of a row whose loss has gradient `g`.
        #[inline(always)]
        fn input(&self, x: &[R], target: Target<R>, max: R, log_sum: R, g: R, dx: &mut [R]) {
            let n = x.len();
            let softmax = |x: R| (x - max - log_sum).exp();
            let (dx, weight) = (&mut dx[..n], &self.weight[..n]);
            match target {
                Target::Ignored => dx.fill(R::ZERO),
                Target::Label(y) => {
                    let keep = (R::ONE - self.smoothing) * weight[y];
                    let (total, spread) = ((keep + self.spread() * self.weight_sum) * g, self.spread() * g);
                    if self.smoothing == R::ZERO {
                        (0..n).for_each(|c| dx[c] = softmax(x[c]) * total);
                    } else {
                        (0..n).for_each(|c| dx[c] = softmax(x[c]) * total - spread * weight[c]);
                    }
                    dx[y] += -(keep * g);
                }
                Target::Probabilities(t) => {
                    let total = rows::sum_of(n, |c| self.target(t, c));
                    (0..n).for_each(|c| dx[c] = (softmax(x[c]) * total - self.target(t, c)) * g);
                }
            }
        }
    }

    pub fn forward<R: Real>(saved: &Saved) -> (Tensor, State) {
        let p = Problem::<R>::of(saved);
        let mut columns = [(); 4].map(|()| CpuVec::<R>::new(p.rows));
        let [max, log_sum, losses, weights] = columns.each_mut().map(|c| SharedMut::new(c));
        for_rows(p.rows, p.classes * 8, |range| {
            for i in range {
                let (x, target) = p.row(i);
                simd_of::<R, _>(
                    #[inline(always)]
                    || unsafe {
                        let m = rows::max(x);
                        let l = rows::exp_sum(x, m).ln();
                        (*max.ptr().add(i), *log_sum.ptr().add(i)) = (m, l);
                        (*losses.ptr().add(i), *weights.ptr().add(i)) = p.loss(x, target, m, l);
                    },
                );
            }
        });
        let [max, log_sum, losses, weights] = columns;
        let mean = saved.reduction == Reduction::Mean;
        let divisor = if mean { total(&weights) } else { R::ONE };
        let y = match saved.reduction {
            Reduction::None => Tensor::from_cpu(losses, saved.layout.row_shape(), OP),
            _ => Tensor::from_cpu(CpuVec::from_slice(&[total(&losses) / divisor]), (), OP),
        };
        let [max, log_sum] = [max, log_sum].map(|v| Tensor::from_cpu(v, p.rows, OP));
        (y, State { max, log_sum, divisor: divisor.to_f64() })
    }

    pub fn backward<R: Real>(rule: &Rule, grad: &Tensor, needs: [bool; 2]) -> [Option<Tensor>; 2] {
        let (p, grads) = (Problem::<R>::of(&rule.saved), grad.cpu_slice::<R>());
        let (max, log_sum) = (rule.state.max.cpu_slice::<R>(), rule.state.log_sum.cpu_slice::<R>());
        let divisor = R::of(rule.state.divisor);
        let each = rule.saved.reduction == Reduction::None;
        let mut out = needs.map(|needed| CpuVec::<R>::new(if needed { p.x.len() } else { 0 }));
        let [dx, dt] = out.each_mut().map(|o| SharedMut::new(o));
        for_rows(p.rows, p.classes * 4, |range| {
            for i in range {
                let (x, target) = p.row(i);
                let g = if each { grads[i] } else { grads[0] / divisor };
                let at = i * p.classes..(i + 1) * p.classes;
                simd_of::<R, _>(
                    #[inline(always)]
                    || unsafe {
                        if needs[0] {
                            p.input(x, target, max[i], log_sum[i], g, dx.slice(at.clone()));
                        }
                        if needs[1] {
                            let g = g * (R::ONE - p.smoothing);
                            for (c, dt) in dt.slice(at).iter_mut().enumerate() {
                                *dt = (max[i] - x[c] + log_sum[i]) * p.weight[c] * g;
                            }
                        }
                    },
                );
            }
        });
        let [dx, dt] = out;
        let shape = [p.rows, p.classes];
        [needs[0].then(|| Tensor::from_cpu(dx, shape, OP)), needs[1].then(|| Tensor::from_cpu(dt, shape, OP))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Error, Rng, gradcheck};

    fn random(shape: &[usize], seed: u64) -> Result<Tensor> {
        Tensor::randn(shape, &mut Rng::new(seed))?.to_dtype(DType::F64)
    }

    fn variants() -> Result<Vec<CrossEntropy>> {
        let weight = random(&[5], 9)?.exp()?;
        let mut all = Vec::new();
        for reduction in [Reduction::None, Reduction::Sum, Reduction::Mean] {
            for weight in [None, Some(weight.clone())] {
                for label_smoothing in [0.0, 0.3] {
                    all.push(CrossEntropy {
                        weight: weight.clone(),
                        ignore_index: 7,
                        label_smoothing,
                        reduction,
                    });
                }
            }
        }
        Ok(all)
    }

    #[test]
    fn gradients() -> Result<()> {
        let labels = Tensor::from_slice(&[0i64, 4, 7, 2, 1, 3], [2, 3])?;
        let (x, t) = (random(&[2, 5, 3], 1)?, random(&[2, 5, 3], 2)?.softmax(1)?);
        let permuted = random(&[2, 3, 5], 3)?.permute([0, 2, 1])?;
        for options in &variants()? {
            gradcheck(|t| t[0].cross_entropy(&labels, options), &[x.clone()])?;
            gradcheck(|t| t[0].cross_entropy(&labels, options), &[permuted.clone()])?;
            gradcheck(|t| t[0].cross_entropy(&t[1], options), &[x.clone(), t.clone()])?;
        }
        let label = Tensor::from_slice(&[3i64], ())?;
        gradcheck(|t| t[0].cross_entropy(&label, &CrossEntropy::default()), &[random(&[5], 4)?])
    }

    #[test]
    fn large_logits_and_half_types() -> Result<()> {
        let x = random(&[4, 37], 1)?.mul_scalar(100.0)?.to_dtype(DType::F32)?;
        let labels = Tensor::from_slice(&[0i64, 36, 17, 5], [4])?;
        let options = CrossEntropy { reduction: Reduction::None, ..Default::default() };
        let y = x.cross_entropy(&labels, &options)?.to_vec::<f32>()?;
        let exact = x.to_dtype(DType::F64)?;
        let sum = exact.exp()?.sum(1)?.log()?.to_vec::<f64>()?;
        let exact = exact.to_vec::<f64>()?;
        for (i, &label) in [0usize, 36, 17, 5].iter().enumerate() {
            let expected = sum[i] - exact[i * 37 + label];
            assert!((y[i] as f64 - expected).abs() <= 1e-6 * expected.max(1.0));
        }
        let half = x.to_dtype(DType::BF16)?.cross_entropy(&labels, &options)?;
        assert_eq!(half.dtype(), DType::BF16);
        Ok(())
    }

    #[test]
    fn edges() -> Result<()> {
        let x = random(&[2, 3], 1)?;
        let ignored = Tensor::from_slice(&[-100i64, -100], [2])?;
        assert!(x.cross_entropy(&ignored, &CrossEntropy::default())?.item()?.is_nan());
        let wrong = Tensor::from_slice(&[0i64, 3], [2])?;
        let message = x.cross_entropy(&wrong, &CrossEntropy::default()).err().map(|e| e.to_string());
        assert!(message.unwrap_or_default().contains("label 3 is neither one of the 3 classes"));
        assert!(x.cross_entropy(&Tensor::from_slice(&[0i64], [1])?, &CrossEntropy::default()).is_err());
        assert!(x.cross_entropy(&random(&[2, 2], 1)?, &CrossEntropy::default()).is_err());
        let options = CrossEntropy { weight: Some(random(&[2], 1)?), ..Default::default() };
        assert!(x.cross_entropy(&ignored, &options).is_err());
        let weight = Some(random(&[3], 1)?.requires_grad());
        let options = CrossEntropy { weight, ..Default::default() };
        assert!(matches!(x.cross_entropy(&ignored, &options), Err(Error::NoGradient { .. })));
        let none = Tensor::zeros([0, 3], DType::F32)?;
        let labels = Tensor::zeros([0], DType::I64)?;
        let options = CrossEntropy { reduction: Reduction::Sum, ..Default::default() };
        assert_eq!(none.cross_entropy(&labels, &options)?.item()?, 0.0);
        Ok(())
    }
}
