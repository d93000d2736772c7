//! Batch norm on the CPU.

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
    dtype::{Element, Float, Real},
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

    /// `out[i] = f(channel)(i)` for all elements.
    fn apply<T: Element, G: Fn(usize) -> T>(&self, out: &SharedMut<T>, f: impl Fn(usize) -> G + Sync) {
        self.each(|units| {
            self.channels.apply(
                units,
                out,
                #[inline(always)]
                |_, c| f(c),
            )
        });
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
    for (part, (m, s)) in parts[0].chunks_exact(n.max(1)).zip(parts[1].chunks_exact(n.max(1))).enumerate() {
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

/// weight * rstd and bias of each channel.
fn factors<A: Real>(rule: &BatchNorm, bias: Option<&Tensor>) -> [CpuVec<A>; 2] {
    let mut scale = CpuVec::from_slice(rule.rstd.cpu_slice::<A>());
    if let Some(w) = &rule.weight {
        scale.iter_mut().zip(w.cpu_slice::<A>()).for_each(|(s, w)| *s *= *w);
    }
    let bias = bias.map_or_else(|| CpuVec::zeros(scale.len()), |b| CpuVec::from_slice(b.cpu_slice::<A>()));
    [scale, bias]
}

/// The normalised values: (x - mean) * scale + bias.
#[derive(Clone, Copy)]
struct Line<'a, T: Float> {
    xs: &'a [T],
    mean: &'a [T::Acc],
    scale: &'a [T::Acc],
    bias: &'a [T::Acc],
}

impl<'a, T: Float> Line<'a, T> {
    fn of(rule: &'a BatchNorm, x: &'a Tensor, [scale, bias]: &'a [CpuVec<T::Acc>; 2]) -> Line<'a, T> {
        Line { xs: x.cpu_slice::<T>(), mean: rule.mean.cpu_slice::<T::Acc>(), scale, bias }
    }

    /// Elements of channel `c`, by their index.
    #[inline(always)]
    fn channel(&self, c: usize) -> impl Fn(usize) -> T::Acc {
        let (m, s, b) = unsafe { (at(self.mean, c), at(self.scale, c), at(self.bias, c)) };
        let xs = self.xs;
        #[inline(always)]
        move |i| (unsafe { at(xs, i) }.acc() - m).mul_add(s, b)
    }
}

/// ReLU as the operation of that name has it: NaN is kept.
#[inline(always)]
fn relu<A: Real>(v: A) -> A {
    if v <= A::ZERO { A::ZERO } else { v }
}

pub fn forward<T: Float>(rule: &BatchNorm, bias: Option<&Tensor>, after: After) -> Result<Tensor> {
    let axis = Axis::of(&rule.x, 1);
    let x = axis.view(&rule.x)?;
    let factors = factors(rule, bias);
    let line = Line::<T>::of(rule, &x, &factors);
    let mut out = CpuVec::<T>::new(line.xs.len());
    let target = SharedMut::new(&mut out);
    let blocks = Blocks::of(&axis, line.xs.len());
    match after {
        After::Nothing => blocks.apply(&target, |c| {
            let y = line.channel(c);
            #[inline(always)]
            move |i| T::store(y(i))
        }),
        After::Relu(None) => blocks.apply(&target, |c| {
            let y = line.channel(c);
            #[inline(always)]
            move |i| T::store(relu(y(i)))
        }),
        After::Relu(Some(residual)) => {
            let residual = axis.view(residual)?;
            let rs = residual.cpu_slice::<T>();
            blocks.apply(&target, |c| {
                let y = line.channel(c);
                #[inline(always)]
                move |i| T::store(relu(y(i) + unsafe { at(rs, i) }.acc()))
            });
        }
    }
    Ok(axis.tensor(out, OP))
}

/// Gradients of x, weight, bias and residual.
pub type Gradients = (Option<Tensor>, Tensor, Tensor, Option<Tensor>);

pub fn backward<T: Float>(rule: &BatchNorm, grad: &Tensor, input: bool) -> Result<Gradients> {
    let axis = Axis::of(&rule.x, 1);
    let (x, grad) = (axis.view(&rule.x)?, axis.view(grad)?);
    match &rule.then {
        Then::Nothing => gradients::<T, false>(rule, &axis, &x, &grad, None, None, input),
        Then::Relu { bias } => gradients::<T, true>(rule, &axis, &x, &grad, bias.as_ref(), None, input),
        Then::AddRelu { y } => {
            gradients::<T, false>(rule, &axis, &x, &grad, None, Some(&axis.view(y)?), input)
        }
    }
}

/// The gradients, for tensors in the order of `axis`. `RELU`: only where the normalised values are positive. With
/// the result `y` of an added residual: only where that is; then this is the residual's gradient, too.
fn gradients<T: Float, const RELU: bool>(
    rule: &BatchNorm,
    axis: &Axis,
    x: &Tensor,
    grad: &Tensor,
    bias: Option<&Tensor>,
    y: Option<&Tensor>,
    input: bool,
) -> Result<Gradients> {
    let factors = factors(rule, bias);
    let line = Line::<T>::of(rule, x, &factors);
    let blocks = Blocks::of(axis, line.xs.len());
    let mut masked = y.map(|y| CpuVec::<T>::new(y.numel()));
    let gs = grad.cpu_slice::<T>();
    let mask = y.zip(masked.as_mut()).map(|(y, m)| (y.cpu_slice::<T>(), SharedMut::new(m)));
    let (mut dw, db) = sums::<T, RELU>(&blocks, &line, gs, mask);
    let gs = masked.as_deref().unwrap_or(gs);
    let rstd = rule.rstd.cpu_slice::<T::Acc>();
    dw.iter_mut().zip(rstd).for_each(|(w, r)| *w *= *r);
    let mut dx = CpuVec::<T>::new(if input { gs.len() } else { 0 });
    if input {
        // dx = a * (dy - b - c * (x - mean))
        let target = SharedMut::new(&mut dx);
        let share = if rule.batch { axis.n as f64 / gs.len() as f64 } else { 0.0 };
        let share = T::Acc::of(share);
        let (mut b, mut c) = (CpuVec::from_slice(&db), CpuVec::from_slice(&dw));
        b.iter_mut().for_each(|b| *b *= share);
        c.iter_mut().zip(rstd).for_each(|(c, r)| *c *= *r * share);
        let (a, b, c) = (line.scale, &b[..], &c[..]);
        blocks.apply(&target, |k| {
            let (a, b, c, m) = unsafe { (at(a, k), at(b, k), at(c, k), at(line.mean, k)) };
            let (xs, g) = (line.xs, gradient::<T, RELU>(&line, gs, k));
            #[inline(always)]
            move |i| T::store(a * (g(i) - b - c * (unsafe { at(xs, i) }.acc() - m)))
        });
    }
    let vector = |v| Tensor::from_cpu(v, axis.n, OP);
    let residual = masked.map(|m| axis.tensor(m, OP));
    Ok((input.then(|| axis.tensor(dx, OP)), vector(dw), vector(db), residual))
}

/// The gradient of the normalised values of channel `c`.
#[inline(always)]
fn gradient<T: Float, const RELU: bool>(line: &Line<T>, gs: &[T], c: usize) -> impl Fn(usize) -> T::Acc {
    let y = line.channel(c);
    #[inline(always)]
    move |i| {
        let g = unsafe { at(gs, i) }.acc();
        // as it was rounded
        if RELU && !(T::store(y(i)).acc() > T::Acc::ZERO) { T::Acc::ZERO } else { g }
    }
}

/// Sums of dy * (x - mean) and of dy for each channel. With a mask (y, to), dy is first written to `to`, 0 where y is
/// not positive.
fn sums<T: Float, const RELU: bool>(
    blocks: &Blocks,
    line: &Line<T>,
    gs: &[T],
    mask: Option<(&[T], SharedMut<T>)>,
) -> (CpuVec<T::Acc>, CpuVec<T::Acc>) {
    let mut parts = [(); 2].map(|()| CpuVec::<T::Acc>::new(blocks.slots()));
    let [dots, plain] = parts.each_mut().map(|p| SharedMut::new(p));
    blocks.each(|units| {
        let slots = blocks.of_block(&units);
        let out = unsafe { [dots.slice(slots.clone()), plain.slice(slots)] };
        let mut gs = gs;
        if let Some((ys, to)) = &mask {
            let dy = gs;
            blocks.channels.apply(units.clone(), to, |_, _| {
                #[inline(always)]
                move |i| {
                    let (y, g) = unsafe { (at(ys, i), at(dy, i)) };
                    if y.acc() > T::Acc::ZERO { g } else { T::default() }
                }
            });
            gs = unsafe { std::slice::from_raw_parts(to.ptr(), dy.len()) };
        }
        blocks.channels.reduce_two(units, out, |c| {
            let (m, xs, g) = (unsafe { at(line.mean, c) }, line.xs, gradient::<T, RELU>(line, gs, c));
            #[inline(always)]
            move |i| {
                let g = g(i);
                [g * (unsafe { at(xs, i) }.acc() - m), g]
            }
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
