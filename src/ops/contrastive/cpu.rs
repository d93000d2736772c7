//! Blocks of logits: a product on all threads, then passes over the rows and columns of the block.

use super::{BLOCK, Output, Saved, Side};
use crate::{
    Error, Result, Tensor,
    cpu::{
        gemm::{GemmElement, Into, Mat, gemm},
        parallel::{Shared, SharedMut, for_ranges, for_rows},
        pool::CpuVec,
        rows,
        simd::simd,
    },
    dtype::Real,
};
use std::ops::Range;

/// f32 and f64.
pub trait Number: Real + GemmElement {}
impl Number for f32 {}
impl Number for f64 {}

const OP: &str = "contrastive_loss";
/// Columns that a column pass works on together.
const STRIP: usize = 64;
/// Rows that a column pass sums before they join the rest in f64.
const RUN: usize = 32;

/// One call: sizes and operands.
struct Problem<'a, T> {
    n: usize,
    m: usize,
    d: usize,
    q: &'a [T],
    keys: Keys<T>,
    /// Row i's positive.
    positives: Shared<T>,
    /// Column of row 0's positive, if it is among the keys.
    offset: Option<usize>,
    scale: f64,
}

/// The keys `[m, d]`.
struct Keys<T> {
    data: Shared<T>,
    row: isize,
    column: isize,
}

impl<T: Number> Keys<T> {
    fn of(k: &Tensor) -> Self {
        Keys { data: Shared(k.cpu_ptr::<T>()), row: k.strides()[0], column: k.strides()[1] }
    }

    fn from(&self, row: usize) -> Mat<*const T> {
        Mat::new(unsafe { self.data.ptr().offset(row as isize * self.row) }, self.row, self.column)
    }
}

impl<'a, T: Number> Problem<'a, T> {
    fn of(saved: &'a Saved) -> Result<Self> {
        let [n, d] = saved.q.dims(OP)?;
        let keys = Keys::of(&saved.k);
        let apart = saved.positive.as_ref();
        let offset = apart.is_none().then_some(saved.labels.offset);
        let positives =
            apart.map_or(Shared(keys.from(saved.labels.offset).ptr), |p| Shared(p.cpu_ptr::<T>()));
        Ok(Problem {
            n,
            m: saved.k.shape()[0],
            d,
            q: saved.q.cpu_slice::<T>(),
            positives,
            keys,
            offset,
            scale: saved.scale.cpu_slice::<T>()[0].to_f64(),
        })
    }

    fn query(&self, i: usize) -> &[T] {
        &self.q[i * self.d..(i + 1) * self.d]
    }

    fn positive(&self, i: usize) -> &[T] {
        unsafe { std::slice::from_raw_parts(self.positives.ptr().add(i * self.d), self.d) }
    }

    /// Logits of the positives, summed in f64.
    fn positive_logits(&self) -> CpuVec<f64> {
        let mut out = CpuVec::new(self.n);
        let target = SharedMut::new(&mut out);
        for_rows(self.n, self.d, |range| {
            let out = unsafe { target.slice(range.clone()) };
            for (out, i) in out.iter_mut().zip(range) {
                *out = self.scale * dot(self.query(i), self.positive(i));
            }
        });
        out
    }

    /// `f(rows, columns)` for each block, rows first.
    fn for_blocks(&self, mut f: impl FnMut(Range<usize>, Range<usize>)) {
        let columns = self.m.clamp(1, 2048);
        let rows = self.n.clamp(1, BLOCK / columns);
        let columns = self.m.clamp(1, BLOCK / rows);
        for r in (0..self.n).step_by(rows) {
            for c in (0..self.m).step_by(columns) {
                f(r..self.n.min(r + rows), c..self.m.min(c + columns));
            }
        }
    }

    fn block(&self) -> CpuVec<T> {
        CpuVec::new(BLOCK.min(self.n * self.m))
    }

    /// The block's logits.
    fn logits(&self, r: &Range<usize>, c: &Range<usize>, block: &mut [T]) {
        let q = Mat::new(self.q[r.start * self.d..].as_ptr(), self.d as isize, 1);
        let to = Mat::new(block.as_mut_ptr(), c.len() as isize, 1);
        if self.d == 0 {
            return block[..r.len() * c.len()].fill(T::ZERO);
        }
        unsafe {
            gemm([r.len(), c.len(), self.d], to, q, self.keys.from(c.start).t(), self.scale, Into::Set, true)
        };
    }

    /// Where in the block row i has its positive.
    fn label(&self, i: usize, c: &Range<usize>) -> Option<usize> {
        let column = self.offset? + i;
        c.contains(&column).then(|| column - c.start)
    }
}

#[inline(always)]
fn dot_lanes<T: Real>(a: &[T], b: &[T]) -> f64 {
    let b = &b[..a.len()];
    rows::sum_of(
        a.len(),
        #[inline(always)]
        |i| unsafe { a.get_unchecked(i).to_f64() * b.get_unchecked(i).to_f64() },
    )
}

fn dot<T: Real>(a: &[T], b: &[T]) -> f64 {
    simd(
        #[inline(always)]
        || dot_lanes(a, b),
    )
}

/// Running maximum and sum of e^(logit - maximum), one a row or column.
struct Running<T> {
    max: CpuVec<T>,
    sum: CpuVec<f64>,
}

impl<T: Number> Running<T> {
    fn new(n: usize) -> Self {
        Running { max: CpuVec::full(n, T::NEG_INF), sum: CpuVec::zeros(n) }
    }

    /// The sides, and the sum of the losses.
    fn finish(&self, positives: &[f64]) -> (Side, f64) {
        let n = positives.len();
        let mut side = CpuVec::<T>::new(2 * n);
        let (lse, miss) = side.split_at_mut(n);
        let mut total = 0.0;
        for i in 0..n {
            let others = self.max[i].to_f64() + self.sum[i].ln();
            let r = others - positives[i];
            // the smaller of the two exponentials: neither overflows
            let tail = (-r.abs()).exp();
            total += r.max(0.0) + tail.ln_1p();
            lse[i] = T::of(others.max(positives[i]) + tail.ln_1p());
            miss[i] = T::of(if r > 0.0 { 1.0 / (1.0 + tail) } else { tail / (1.0 + tail) });
        }
        (Side { state: Tensor::from_cpu(side, [2, n], OP) }, total)
    }
}

/// What to subtract before the exponential: the maximum, or 0 where there is nothing to exponentiate.
#[inline(always)]
fn shift<T: Real>(max: T) -> T {
    if max == T::NEG_INF { T::ZERO } else { max }
}

pub fn forward<T: Number>(saved: &Saved, mean: bool, rank: bool) -> Result<Output> {
    let p = Problem::<T>::of(saved)?;
    let both = saved.labels.both;
    let positives = p.positive_logits();
    let (mut rows, mut columns) = (Running::<T>::new(p.n), Running::<T>::new(if both { p.m } else { 0 }));
    let mut average = CpuVec::<T>::zeros(if mean { p.n * p.d } else { 0 });
    let mut ranks = CpuVec::<i64>::zeros(if rank { p.n } else { 0 });
    let mut block = p.block();
    p.for_blocks(|r, c| {
        p.logits(&r, &c, &mut block);
        for i in r.clone() {
            if let Some(j) = p.label(i, &c) {
                block[(i - r.start) * c.len() + j] = T::NEG_INF;
            }
        }
        if both {
            column_pass(&block, r.len(), c.len(), &mut columns, c.start);
        }
        let pass = RowPass {
            d: p.d,
            mean: mean.then(|| SharedMut::new(&mut average)),
            rank: rank.then(|| (SharedMut::new(&mut ranks), &positives[..])),
        };
        pass.run(&mut block, &r, c.len(), &mut rows);
        if mean && p.d > 0 {
            let weights = Mat::new(block.as_ptr(), c.len() as isize, 1);
            let to = Mat::new(average[r.start * p.d..].as_mut_ptr(), p.d as isize, 1);
            unsafe { gemm([r.len(), p.d, c.len()], to, weights, p.keys.from(c.start), 1.0, Into::Add, true) };
        }
    });
    let (side, mut total) = rows.finish(&positives);
    let columns = both.then(|| columns.finish(&positives)).map(|(side, sum)| {
        total = (total + sum) / 2.0;
        side
    });
    let average = mean.then(|| {
        divide(&mut average, &rows.sum, p.d);
        Tensor::from_cpu(average, [p.n, p.d], OP)
    });
    Ok(Output {
        loss: Tensor::from_cpu(CpuVec::from_slice(&[T::of(total / p.n as f64)]), (), OP),
        rows: side,
        columns,
        mean: average,
        rank: rank.then(|| Tensor::from_cpu(ranks, p.n, OP)),
    })
}

/// Rows by their sums; a row without weights becomes zero.
fn divide<T: Number>(average: &mut [T], sums: &[f64], d: usize) {
    let target = SharedMut::new(average);
    for_rows(sums.len(), d, |range| {
        for i in range {
            let factor = T::of(if sums[i] == 0.0 { 0.0 } else { 1.0 / sums[i] });
            unsafe { target.slice(i * d..(i + 1) * d) }.iter_mut().for_each(|x| *x *= factor);
        }
    });
}

struct RowPass<'a, T> {
    d: usize,
    /// Weighted sums of keys so far; then the logits become weights.
    mean: Option<SharedMut<T>>,
    rank: Option<(SharedMut<i64>, &'a [f64])>,
}

impl<T: Number> RowPass<'_, T> {
    fn run(&self, block: &mut [T], r: &Range<usize>, width: usize, running: &mut Running<T>) {
        let (block, max) = (SharedMut::new(block), SharedMut::new(&mut running.max));
        let sum = SharedMut::new(&mut running.sum);
        for_rows(r.len(), width * 4, |range| {
            for i in range {
                let x = unsafe { block.slice(i * width..(i + 1) * width) };
                let i = r.start + i;
                let (max, sum) = unsafe { (&mut *max.ptr().add(i), &mut *sum.ptr().add(i)) };
                simd(
                    #[inline(always)]
                    || self.row(i, x, max, sum),
                );
            }
        });
    }

    #[inline(always)]
    fn row(&self, i: usize, x: &mut [T], max: &mut T, sum: &mut f64) {
        if let Some((ranks, positives)) = &self.rank {
            let positive = T::of(positives[i]);
            let above = rows::sum_of(
                x.len(),
                #[inline(always)]
                |j| if unsafe { *x.get_unchecked(j) } > positive { T::ONE } else { T::ZERO },
            );
            unsafe { *ranks.ptr().add(i) += above.to_i64() };
        }
        let here = rows::max(x);
        let new = if here > *max { here } else { *max };
        let decay = (shift(*max) - shift(new)).exp();
        let part = match &self.mean {
            None => rows::exp_sum(x, shift(new)),
            Some(mean) => {
                let mean = unsafe { mean.slice(i * self.d..(i + 1) * self.d) };
                mean.iter_mut().for_each(|v| *v *= decay);
                rows::exp_in_place(x, shift(new))
            }
        };
        // where nothing stood before, 0 times infinity must not become NaN
        *sum = if *sum == 0.0 { 0.0 } else { *sum * decay.to_f64() } + part.to_f64();
        *max = new;
    }
}

fn column_pass<T: Number>(block: &[T], n: usize, width: usize, running: &mut Running<T>, first: usize) {
    let (max, sum) = (SharedMut::new(&mut running.max), SharedMut::new(&mut running.sum));
    for_ranges(width, STRIP, |strip| {
        let at = first + strip.start..first + strip.end;
        let (max, sum) = unsafe { (max.slice(at.clone()), sum.slice(at)) };
        simd(
            #[inline(always)]
            || columns(&block[strip.start..], n, width, max, sum),
        );
    });
}

/// Columns side by side; rows lie `step` apart.
#[inline(always)]
fn columns<T: Number>(x: &[T], n: usize, step: usize, max: &mut [T], sum: &mut [f64]) {
    let width = max.len().min(STRIP);
    let mut shifts = [T::NEG_INF; STRIP];
    let (max, sum, shifts) = (&mut max[..width], &mut sum[..width], &mut shifts[..width]);
    shifts.copy_from_slice(max);
    for i in 0..n {
        let x = &x[i * step..][..width];
        for j in 0..width {
            shifts[j] = if x[j] > shifts[j] { x[j] } else { shifts[j] };
        }
    }
    for j in 0..width {
        let decay = (shift(max[j]) - shift(shifts[j])).exp().to_f64();
        sum[j] = if sum[j] == 0.0 { 0.0 } else { sum[j] * decay };
        max[j] = shifts[j];
        shifts[j] = shift(shifts[j]);
    }
    for run in (0..n).step_by(RUN) {
        let mut part = [T::ZERO; STRIP];
        let part = &mut part[..width];
        for i in run..n.min(run + RUN) {
            let x = &x[i * step..][..width];
            for j in 0..width {
                part[j] += (x[j] - shifts[j]).exp_low();
            }
        }
        for j in 0..width {
            sum[j] += part[j].to_f64();
        }
    }
}

/// Gradients of queries, keys and scale, with the logits computed once more.
pub fn backward<T: Number>(
    saved: &Saved,
    rows: &Side,
    columns: Option<&Side>,
    grad: &Tensor,
    needs: [bool; 3],
) -> Result<[Option<Tensor>; 3]> {
    let p = Problem::<T>::of(saved)?;
    let of = |side: &Side| {
        let both = side.state.cpu_slice::<T>();
        let (lse, miss) = both.split_at(both.len() / 2);
        [lse, miss].map(|part| Shared(part.as_ptr()))
    };
    let (rows, columns) = (of(rows), columns.map(of));
    let weight = value::<T>(grad)? / (p.n as f64 * if columns.is_some() { 2.0 } else { 1.0 });
    let queries = needs[0] || needs[2];
    let mut dq = CpuVec::<T>::zeros(if queries { p.n * p.d } else { 0 });
    let mut dk = CpuVec::<T>::zeros(if needs[1] { p.m * p.d } else { 0 });
    let mut block = p.block();
    let width = p.d as isize;
    p.for_blocks(|r, c| {
        p.logits(&r, &c, &mut block);
        slopes(&p, &mut block, &r, &c, rows, columns);
        let g = Mat::new(block.as_ptr(), c.len() as isize, 1);
        if queries && p.d > 0 {
            let to = Mat::new(dq[r.start * p.d..].as_mut_ptr(), width, 1);
            unsafe { gemm([r.len(), p.d, c.len()], to, g, p.keys.from(c.start), weight, Into::Add, true) };
        }
        if needs[1] && p.d > 0 {
            let to = Mat::new(dk[c.start * p.d..].as_mut_ptr(), width, 1);
            let q = Mat::new(p.q[r.start * p.d..].as_ptr(), width, 1);
            unsafe { gemm([c.len(), p.d, r.len()], to, g.t(), q, weight * p.scale, Into::Add, true) };
        }
    });
    let ds = if queries { scale_rows(&p, &mut dq) } else { 0.0 };
    Ok([
        needs[0].then(|| Tensor::from_cpu(dq, [p.n, p.d], OP)),
        needs[1].then(|| Tensor::from_cpu(dk, [p.m, p.d], OP)),
        needs[2].then(|| Tensor::from_cpu(CpuVec::from_slice(&[T::of(ds)]), (), OP)),
    ])
}

/// Logits of a block become their gradients, up to the weight that all share.
fn slopes<T: Number>(
    p: &Problem<T>,
    block: &mut [T],
    r: &Range<usize>,
    c: &Range<usize>,
    [lse, miss]: [Shared<T>; 2],
    columns: Option<[Shared<T>; 2]>,
) {
    let (width, block) = (c.len(), SharedMut::new(block));
    for_rows(r.len(), width * 4, |range| {
        for i in range {
            let x = unsafe { block.slice(i * width..(i + 1) * width) };
            let i = r.start + i;
            let (lse, mut at_label) = unsafe { (*lse.ptr().add(i), *miss.ptr().add(i)) };
            match columns {
                None => simd(
                    #[inline(always)]
                    || slopes_of_rows(x, lse),
                ),
                Some([others, miss]) => {
                    let others = unsafe { std::slice::from_raw_parts(others.ptr().add(c.start), width) };
                    simd(
                        #[inline(always)]
                        || slopes_of_both(x, others, lse),
                    );
                    at_label += unsafe { *miss.ptr().add(i) };
                }
            }
            if let Some(j) = p.label(i, c) {
                x[j] = -at_label;
            }
        }
    });
}

#[inline(always)]
fn slopes_of_rows<T: Real>(x: &mut [T], row: T) {
    x.iter_mut().for_each(|x| *x = (*x - row).exp_low());
}

#[inline(always)]
fn slopes_of_both<T: Real>(x: &mut [T], columns: &[T], row: T) {
    let columns = &columns[..x.len()];
    for (x, &column) in x.iter_mut().zip(columns) {
        *x = (*x - row).exp_low() + (*x - column).exp_low();
    }
}

/// Turns `dS K` into `s dS K`; returns the gradient of s, `Σ q · dS K`.
fn scale_rows<T: Number>(p: &Problem<T>, dq: &mut [T]) -> f64 {
    let mut dots = CpuVec::<f64>::new(p.n);
    let (target, out, scale) = (SharedMut::new(dq), SharedMut::new(&mut dots), T::of(p.scale));
    for_rows(p.n, p.d, |range| {
        for i in range {
            let dq = unsafe { target.slice(i * p.d..(i + 1) * p.d) };
            unsafe { *out.ptr().add(i) = dot(p.query(i), dq) };
            dq.iter_mut().for_each(|x| *x *= scale);
        }
    });
    dots.iter().sum()
}

fn value<T: Number>(grad: &Tensor) -> Result<f64> {
    match grad.contiguous()?.cpu_slice::<T>() {
        [g] => Ok(g.to_f64()),
        other => Err(Error::msg(format!("{OP}: the gradient of a loss has {} elements", other.len()))),
    }
}

/// Gradients of queries, separate positives and scale from the mean of the other keys:
/// `dS K = miss * (mean - positive)`.
pub fn backward_mean<T: Number>(
    saved: &Saved,
    rows: &Side,
    mean: &Tensor,
    grad: &Tensor,
    needs: [bool; 3],
) -> Result<[Option<Tensor>; 3]> {
    let p = Problem::<T>::of(saved)?;
    let (miss, mean) = (&rows.state.cpu_slice::<T>()[p.n..], mean.cpu_slice::<T>());
    let weight = value::<T>(grad)? / p.n as f64;
    let queries = needs[0] || needs[2];
    let mut dq = CpuVec::<T>::new(if queries { p.n * p.d } else { 0 });
    let mut dp = CpuVec::<T>::new(if needs[1] { p.n * p.d } else { 0 });
    let (dq_target, dp_target) = (SharedMut::new(&mut dq), SharedMut::new(&mut dp));
    for_rows(p.n, p.d * 2, |range| {
        for i in range {
            let at = i * p.d..(i + 1) * p.d;
            let factor = miss[i] * T::of(weight);
            if queries {
                let (dq, mean, positive) =
                    (unsafe { dq_target.slice(at.clone()) }, &mean[at.clone()], p.positive(i));
                for ((dq, &mean), &positive) in dq.iter_mut().zip(mean).zip(positive) {
                    *dq = factor * (mean - positive);
                }
            }
            if needs[1] {
                let factor = -(factor * T::of(p.scale));
                let dp = unsafe { dp_target.slice(at) };
                dp.iter_mut().zip(p.query(i)).for_each(|(dp, &q)| *dp = factor * q);
            }
        }
    });
    let ds = if queries { scale_rows(&p, &mut dq) } else { 0.0 };
    Ok([
        needs[0].then(|| Tensor::from_cpu(dq, [p.n, p.d], OP)),
        needs[1].then(|| Tensor::from_cpu(dp, [p.n, p.d], OP)),
        needs[2].then(|| Tensor::from_cpu(CpuVec::from_slice(&[T::of(ds)]), (), OP)),
    ])
}
