//! Layer normalisation over the trailing dimensions, alone or fused with the residual sum before it.

use crate::{
    Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    ensure, for_float, on_device,
    shape::{Dims, IntoShape},
};
use smallvec::smallvec;

impl Tensor {
    /// `(x - mean) / sqrt(var + eps) * weight + bias`, with the mean and the biased variance of each group of
    /// trailing dimensions `normalized_shape`; `weight` and `bias` have that shape.
    /// Saves: its input, mean and 1/sqrt(var + eps) of each row.
    ///
    /// # Errors
    /// If the trailing dimensions, the weight or the bias are not of `normalized_shape`, or the dtype is no float.
    #[track_caller]
    pub fn layer_norm(
        &self,
        normalized_shape: impl IntoShape,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
    ) -> Result<Tensor> {
        let affine = Affine::of("layer_norm", self, normalized_shape.into_shape(), weight, bias)?;
        let x = self.detach().contiguous()?;
        let out = on_device!(
            x,
            "layer_norm",
            for_float!(x.dtype(), "layer_norm", T => Ok(cpu::forward::<T>(&x, None, &affine, eps)))
        )?;
        affine.record(self, x, out)
    }

    /// The residual sum and its layer norm in one pass: `(x + r, layer_norm(x + r))`. Both outputs carry
    /// gradients, and the backward adds them in one pass as well.
    ///
    /// # Errors
    /// As [`layer_norm`](Self::layer_norm), and if shape or dtype of `x` and `r` differ.
    #[track_caller]
    pub fn add_layer_norm(
        &self,
        residual: &Tensor,
        normalized_shape: impl IntoShape,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
    ) -> Result<(Tensor, Tensor)> {
        ensure!(
            self.shape() == residual.shape() && self.dtype() == residual.dtype(),
            "add_layer_norm",
            "needs two tensors of one shape and dtype, got {} {:?} and {} {:?}",
            self.dtype(),
            self.shape(),
            residual.dtype(),
            residual.shape()
        );
        let affine = Affine::of("add_layer_norm", self, normalized_shape.into_shape(), weight, bias)?;
        let (x, r) = (self.detach().contiguous()?, residual.detach().contiguous()?);
        let mut out = on_device!(
            x,
            "add_layer_norm",
            for_float!(x.dtype(), "add_layer_norm", T => Ok(cpu::forward::<T>(&x, Some(&r), &affine, eps)))
        )?;
        let sum = out.sum.take().unwrap_or(x);
        let tracked = sum.record([self, residual], Residual)?;
        let normed = affine.record(&tracked, tracked.detach(), out)?;
        Ok((tracked, normed))
    }
}

/// Weight and bias, in the dtype that is computed in.
struct Affine {
    normalized: Dims,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
}

impl Affine {
    #[track_caller]
    fn of(
        op: &'static str,
        x: &Tensor,
        normalized: Dims,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
    ) -> Result<Affine> {
        ensure!(
            !normalized.is_empty() && x.shape().ends_with(&normalized),
            op,
            "the last axes of the input {:?} are not {normalized:?}",
            x.shape()
        );
        let convert = |name: &str, t: Option<&Tensor>| match t {
            Some(t) if *t.shape() == normalized[..] => {
                t.to_dtype(x.dtype().computed_in())?.contiguous().map(Some)
            }
            Some(t) => crate::bail!(
                op,
                "{name} has shape {:?}, the last axes of the input {:?} need {normalized:?}",
                t.shape(),
                x.shape()
            ),
            None => Ok(None),
        };
        let (weight, bias) = (convert("weight", weight)?, convert("bias", bias)?);
        Ok(Affine { normalized, weight, bias })
    }

    fn record(self, input: &Tensor, x: Tensor, out: Output) -> Result<Tensor> {
        // An untracked tensor stands for what is not there.
        let [weight, bias] = [&self.weight, &self.bias].map(|t| t.clone().unwrap_or_else(|| x.clone()));
        let Output { y, mean, rstd, .. } = out;
        let (weight_saved, normalized) = (self.weight.map(|w| w.detach()), self.normalized);
        y.record([input, &weight, &bias], LayerNorm { x, mean, rstd, weight: weight_saved, normalized })
    }
}

/// What the forward computes.
struct Output {
    sum: Option<Tensor>,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
}

struct LayerNorm {
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Option<Tensor>,
    normalized: Dims,
}

/// With xhat = (x - mean) * rstd and g = dy * weight:
/// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), dweight = sum(dy * xhat), dbias = sum(dy).
impl Backward for LayerNorm {
    const NAME: &'static str = "layer_norm";

    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let grad = grad.contiguous()?;
        let pending = ctx.take_pending(0).map(|p| p.contiguous()).transpose()?;
        let affine = ctx.needs(1) || ctx.needs(2);
        let (dx, dw, db) = on_device!(
            grad,
            Self::NAME,
            for_float!(grad.dtype(), Self::NAME, T => {
                Ok(cpu::backward::<T>(self, &grad, pending.as_ref(), ctx.needs(0), affine))
            })
        )?;
        let shaped = |t: Option<Tensor>| t.map(|t| t.reshape(&self.normalized)).transpose();
        Ok(smallvec![dx, shaped(dw)?, shaped(db)?])
    }
}

/// x + r, whose sum was computed elsewhere.
struct Residual;
impl Backward for Residual {
    const NAME: &'static str = "add_layer_norm";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        Ok(smallvec![ctx.grad(0, || Ok(grad.clone()))?, ctx.grad(1, || Ok(grad.clone()))?])
    }
}

mod cpu {
    use super::*;
    use crate::{
        cpu::{
            parallel::{GRAIN, SharedMut, for_ranges, for_rows},
            pool::CpuVec,
            simd::{fold, simd},
        },
        dtype::{Float, Real},
        shape::count,
    };

    /// A vector of parameters, or `value` where there is none.
    fn parameter<A: Real>(t: Option<&Tensor>, n: usize, value: A) -> CpuVec<A> {
        t.map_or_else(|| CpuVec::full(n, value), |t| CpuVec::from_slice(t.cpu_slice::<A>()))
    }

    #[inline(always)]
    fn total<A: Real>(x: &[impl Float<Acc = A>], f: impl Fn(A) -> A) -> A {
        fold(x, A::ZERO, |sum, v| sum + f(v.acc()), |a, b| a + b)
    }

    /// Mean and 1/sqrt(var + eps). Two passes, as the row stays in the cache and cancellation does not.
    #[inline(always)]
    fn statistics<T: Float>(x: &[T], eps: T::Acc) -> (T::Acc, T::Acc) {
        let n = T::Acc::of(x.len() as f64);
        let mean = total(x, |v| v) / n;
        let var = total(x, |v| (v - mean) * (v - mean)) / n;
        (mean, T::Acc::ONE / (var + eps).sqrt())
    }

    pub fn forward<T: Float>(x: &Tensor, r: Option<&Tensor>, affine: &Affine, eps: f64) -> Output {
        let n = count(&affine.normalized);
        let rows = if n == 0 { 0 } else { x.numel() / n };
        let weight = parameter::<T::Acc>(affine.weight.as_ref(), n, T::Acc::ONE);
        let bias = parameter::<T::Acc>(affine.bias.as_ref(), n, T::Acc::ZERO);
        let (mut y, mut sum) = (CpuVec::<T>::new(x.numel()), r.map(|_| CpuVec::<T>::new(x.numel())));
        let (mut mean, mut rstd) = (CpuVec::<T::Acc>::new(rows), CpuVec::<T::Acc>::new(rows));
        let outputs = (SharedMut::new(&mut y), SharedMut::new(&mut mean), SharedMut::new(&mut rstd));
        let sums = sum.as_mut().map(|s| SharedMut::new(s));
        let (xs, rs) = (x.cpu_slice::<T>(), r.map(|r| r.cpu_slice::<T>()));
        let eps = T::Acc::of(eps);
        for_rows(rows, n, |range| {
            for row in range {
                let at = row * n..(row + 1) * n;
                let (y, mean, rstd) = unsafe {
                    (
                        outputs.0.slice(at.clone()),
                        &mut *outputs.1.ptr().add(row),
                        &mut *outputs.2.ptr().add(row),
                    )
                };
                let (weight, bias) = (&weight[..n], &bias[..n]);
                simd(|| {
                    let x = match (&sums, rs) {
                        (Some(sums), Some(rs)) => {
                            let sum = unsafe { sums.slice(at.clone()) };
                            let (x, r) = (&xs[at.clone()], &rs[at.clone()]);
                            for i in 0..n {
                                sum[i] = T::store(x[i].acc() + r[i].acc());
                            }
                            &*sum
                        }
                        _ => &xs[at.clone()],
                    };
                    (*mean, *rstd) = statistics(x, eps);
                    let (m, s) = (*mean, *rstd);
                    let y = &mut y[..n];
                    for i in 0..n {
                        y[i] = T::store(((x[i].acc() - m) * s).mul_add(weight[i], bias[i]));
                    }
                });
            }
        });
        Output {
            sum: sum.map(|s| Tensor::from_cpu(s, x.shape(), "add_layer_norm")),
            y: Tensor::from_cpu(y, x.shape(), "layer_norm"),
            mean: Tensor::from_cpu(mean, rows, "layer_norm"),
            rstd: Tensor::from_cpu(rstd, rows, "layer_norm"),
        }
    }

    /// One row of the backward.
    struct Row<'a, T: Float> {
        x: &'a [T],
        dy: &'a [T],
        weight: &'a [T::Acc],
        mean: T::Acc,
        rstd: T::Acc,
    }

    impl<T: Float> Row<'_, T> {
        /// Adds dy * xhat to `dw` and dy to `db`.
        #[inline(always)]
        fn parameters(&self, dw: &mut [T::Acc], db: &mut [T::Acc]) {
            let n = self.x.len();
            let (dy, dw, db) = (&self.dy[..n], &mut dw[..n], &mut db[..n]);
            for i in 0..n {
                let g = dy[i].acc();
                dw[i] = ((self.x[i].acc() - self.mean) * self.rstd).mul_add(g, dw[i]);
                db[i] += g;
            }
        }

        /// Writes dx, plus what is pending.
        #[inline(always)]
        fn input(&self, pending: Option<&[T]>, dx: &mut [T]) {
            let n = self.x.len();
            let (x, dy, weight, dx) = (self.x, &self.dy[..n], &self.weight[..n], &mut dx[..n]);
            let (mean, rstd) = (self.mean, self.rstd);
            // Both sums in one pass: g and g * (x - mean), joined as pairs.
            let (sum, dot) = sums(x, dy, weight, mean);
            let n_inverse = T::Acc::ONE / T::Acc::of(n as f64);
            let mean_g = sum * n_inverse;
            let slope = dot * rstd * rstd * n_inverse;
            let value = |i: usize| {
                let g = dy[i].acc() * weight[i];
                rstd * (g - mean_g - (x[i].acc() - mean) * slope)
            };
            match pending {
                Some(pending) => {
                    let pending = &pending[..n];
                    for i in 0..n {
                        dx[i] = T::store(pending[i].acc() + value(i));
                    }
                }
                None => {
                    for i in 0..n {
                        dx[i] = T::store(value(i));
                    }
                }
            }
        }
    }

    /// Sums of g = dy * weight and of g * (x - mean).
    #[inline(always)]
    fn sums<T: Float>(x: &[T], dy: &[T], weight: &[T::Acc], mean: T::Acc) -> (T::Acc, T::Acc) {
        use crate::cpu::simd::{LANES, join_lanes};
        let mut sum = [T::Acc::ZERO; LANES];
        let mut dot = [T::Acc::ZERO; LANES];
        let body = x.len() / LANES * LANES;
        for at in (0..body).step_by(LANES) {
            let (x, dy, weight) = (&x[at..at + LANES], &dy[at..at + LANES], &weight[at..at + LANES]);
            for i in 0..LANES {
                let g = dy[i].acc() * weight[i];
                sum[i] += g;
                dot[i] = g.mul_add(x[i].acc() - mean, dot[i]);
            }
        }
        for i in body..x.len() {
            let g = dy[i].acc() * weight[i];
            sum[i - body] += g;
            dot[i - body] = g.mul_add(x[i].acc() - mean, dot[i - body]);
        }
        (join_lanes(sum, |a, b| a + b), join_lanes(dot, |a, b| a + b))
    }

    /// dx, dweight, dbias. Each block of rows sums its own share of the parameters' gradients; the shares are
    /// added in order.
    pub fn backward<T: Float>(
        saved: &LayerNorm,
        grad: &Tensor,
        pending: Option<&Tensor>,
        input: bool,
        affine: bool,
    ) -> (Option<Tensor>, Option<Tensor>, Option<Tensor>) {
        let n = count(&saved.normalized);
        let rows = saved.mean.numel();
        let weight = parameter::<T::Acc>(saved.weight.as_ref(), n, T::Acc::ONE);
        let (xs, dys) = (saved.x.cpu_slice::<T>(), grad.cpu_slice::<T>());
        let (means, rstds) = (saved.mean.cpu_slice::<T::Acc>(), saved.rstd.cpu_slice::<T::Acc>());
        let pending = pending.map(|p| p.cpu_slice::<T>());
        let grain = (GRAIN / n.max(1)).max(rows.div_ceil(64)).max(1);
        let mut dx = CpuVec::<T>::new(if input { xs.len() } else { 0 });
        let mut shares = CpuVec::<T::Acc>::new(if affine { rows.div_ceil(grain) * 2 * n } else { 0 });
        let (dx_out, shares_out) = (SharedMut::new(&mut dx), SharedMut::new(&mut shares));
        for_ranges(rows, grain, |range| {
            let first = range.start / grain * 2 * n;
            let share = if affine { unsafe { shares_out.slice(first..first + 2 * n) } } else { &mut [] };
            share.fill(T::Acc::ZERO);
            let (dw, db) = share.split_at_mut(share.len() / 2);
            for row in range {
                let at = row * n..(row + 1) * n;
                let (x, dy, mean, rstd) = (&xs[at.clone()], &dys[at.clone()], means[row], rstds[row]);
                let row = Row { x, dy, weight: &weight, mean, rstd };
                simd(|| {
                    if affine {
                        row.parameters(dw, db);
                    }
                    if input {
                        let dx = unsafe { dx_out.slice(at.clone()) };
                        row.input(pending.map(|p| &p[at.clone()]), dx);
                    }
                });
            }
        });
        let dx = input.then(|| Tensor::from_cpu(dx, saved.x.shape(), "layer_norm"));
        if !affine {
            return (dx, None, None);
        }
        let mut total = CpuVec::<T::Acc>::zeros(2 * n);
        for share in shares.chunks_exact((2 * n).max(1)) {
            simd(|| total.iter_mut().zip(share).for_each(|(t, s)| *t += *s));
        }
        let [dw, db] =
            [&total[..n], &total[n..]].map(|t| Tensor::from_cpu(CpuVec::from_slice(t), n, "layer_norm"));
        (dx, Some(dw), Some(db))
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
        let (w, b) = (random(&[2, 9], 1)?, random(&[2, 9], 2)?);
        let x = random(&[3, 2, 9], 3)?;
        gradcheck(|t| t[0].layer_norm([2, 9], Some(&t[1]), Some(&t[2]), 1e-5), &[x.clone(), w.clone(), b])?;
        gradcheck(|t| t[0].layer_norm(9, None, None, 1e-5), &[x.clone()])?;
        gradcheck(|t| t[0].layer_norm([2, 9], None, Some(&t[1]), 1e-5), &[x.clone(), w.clone()])?;
        let permuted = random(&[9, 2, 3], 4)?.permute([2, 1, 0])?;
        gradcheck(|t| t[0].layer_norm([2, 9], Some(&t[1]), None, 1e-5), &[permuted, w])?;
        let broadcast = random(&[1, 1, 4], 5)?.expand([3, 2, 4])?;
        gradcheck(|t| t[0].layer_norm(4, None, None, 1e-3), &[broadcast])?;
        gradcheck(|t| t[0].layer_norm(1, None, None, 1e-1), &[random(&[3, 1], 6)?])
    }

    #[test]
    fn residual_sum() -> Result<()> {
        let inputs = [random(&[4, 5], 1)?, random(&[4, 5], 2)?, random(&[5], 3)?, random(&[5], 4)?];
        let both = |t: &[Tensor]| t[0].add_layer_norm(&t[1], 5, Some(&t[2]), Some(&t[3]), 1e-5);
        // each output alone, and both with an older and with a newer user of the sum
        gradcheck(|t| Ok(both(t)?.0), &inputs)?;
        gradcheck(|t| Ok(both(t)?.1), &inputs)?;
        gradcheck(|t| both(t).and_then(|(s, y)| s.exp()?.add(&y)), &inputs)?;
        gradcheck(|t| both(t).and_then(|(s, y)| y.exp()?.add(&s)?.mul(&y.mul(&s)?)), &inputs)?;
        let (sum, y) = both(&inputs)?;
        let plain = inputs[0].add(&inputs[1])?;
        assert_eq!(sum.to_vec::<f64>()?, plain.to_vec::<f64>()?);
        let expected = plain.layer_norm(5, Some(&inputs[2]), Some(&inputs[3]), 1e-5)?;
        assert_eq!(y.to_vec::<f64>()?, expected.to_vec::<f64>()?);
        Ok(())
    }

    #[test]
    fn half_types_empty_tensors_and_errors() -> Result<()> {
        let x = random(&[7, 33], 1)?;
        let w = random(&[33], 2)?;
        let exact = x.layer_norm(33, Some(&w), None, 1e-6)?.to_vec::<f64>()?;
        for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F16, 5e-3), (DType::BF16, 4e-2)] {
            // weights may keep more digits than the input
            let y = x.to_dtype(dtype)?.layer_norm(33, Some(&w.to_dtype(DType::F32)?), None, 1e-6)?;
            assert_eq!(y.dtype(), dtype);
            for (a, b) in y.to_dtype(DType::F64)?.to_vec::<f64>()?.iter().zip(&exact) {
                assert!((a - b).abs() < tolerance * b.abs().max(1.0), "{dtype}: {a} {b}");
            }
        }
        for shape in [[0, 3], [3, 0]] {
            let x = Tensor::zeros(shape, DType::F32)?.requires_grad();
            let w = Tensor::ones(shape[1], DType::F32)?.requires_grad();
            let grads = x.layer_norm(shape[1], Some(&w), None, 1e-5)?.sum(())?.backward()?;
            assert_eq!(grads.get(&w).map(|g| g.to_vec::<f32>()).transpose()?, Some(vec![0.0; shape[1]]));
        }
        let message = |r: Result<Tensor>| r.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message(x.layer_norm(7, None, None, 1e-5)).contains("the last axes of the input [7, 33]"));
        assert!(message(x.layer_norm(33, Some(&x), None, 1e-5)).contains("weight has shape [7, 33]"));
        assert!(x.layer_norm((), None, None, 1e-5).is_err());
        Ok(())
    }
}
