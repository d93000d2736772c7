//! Normalisation of rows that lie one after the other: the kernels of layer norm and rms norm.

use super::layer_norm::{Affine, LayerNorm, Output};
use crate::{
    Tensor,
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

/// Mean (0 if not centered) and 1/sqrt(var + eps). Two passes, as the row stays in the cache and cancellation
/// does not.
#[inline(always)]
fn statistics<T: Float, const CENTERED: bool>(x: &[T], eps: T::Acc) -> (T::Acc, T::Acc) {
    let n = T::Acc::of(x.len() as f64);
    let mean = if CENTERED { total(x, |v| v) / n } else { T::Acc::ZERO };
    let var = total(x, |v| (v - mean) * (v - mean)) / n;
    (mean, T::Acc::ONE / (var + eps).sqrt())
}

pub fn forward<T: Float, const CENTERED: bool>(
    x: &Tensor,
    r: Option<&Tensor>,
    affine: &Affine,
    eps: f64,
) -> Output {
    let n = count(&affine.normalized);
    let rows = x.numel().checked_div(n).unwrap_or(0);
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
                (outputs.0.slice(at.clone()), &mut *outputs.1.ptr().add(row), &mut *outputs.2.ptr().add(row))
            };
            let (weight, bias) = (&weight[..n], &bias[..n]);
            simd(
                #[inline(always)]
                || {
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
                    (*mean, *rstd) = statistics::<T, CENTERED>(x, eps);
                    let (m, s) = (*mean, *rstd);
                    let y = &mut y[..n];
                    for i in 0..n {
                        y[i] = T::store(((x[i].acc() - m) * s).mul_add(weight[i], bias[i]));
                    }
                },
            );
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
    fn input<const CENTERED: bool>(&self, pending: Option<&[T]>, dx: &mut [T]) {
        let n = self.x.len();
        let (x, dy, weight, dx) = (self.x, &self.dy[..n], &self.weight[..n], &mut dx[..n]);
        let (mean, rstd) = (self.mean, self.rstd);
        // Both sums in one pass: g and g * (x - mean), joined as pairs.
        let (sum, dot) = sums(x, dy, weight, mean);
        let n_inverse = T::Acc::ONE / T::Acc::of(n as f64);
        let mean_g = if CENTERED { sum * n_inverse } else { T::Acc::ZERO };
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
pub fn backward<T: Float, const CENTERED: bool>(
    saved: &LayerNorm<CENTERED>,
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
            simd(
                #[inline(always)]
                || {
                    if affine {
                        row.parameters(dw, db);
                    }
                    if input {
                        let dx = unsafe { dx_out.slice(at.clone()) };
                        row.input::<CENTERED>(pending.map(|p| &p[at.clone()]), dx);
                    }
                },
            );
        }
    });
    let dx = input.then(|| Tensor::from_cpu(dx, saved.x.shape(), "layer_norm"));
    if !affine {
        return (dx, None, None);
    }
    let mut total = CpuVec::<T::Acc>::zeros(2 * n);
    for share in shares.chunks_exact((2 * n).max(1)) {
        simd(
            #[inline(always)]
            || total.iter_mut().zip(share).for_each(|(t, s)| *t += *s),
        );
    }
    let [dw, db] =
        [&total[..n], &total[n..]].map(|t| Tensor::from_cpu(CpuVec::from_slice(t), n, "layer_norm"));
    (dx, Some(dw), Some(db))
}
