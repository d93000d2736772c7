//! The shared loop: folds a strided view over some of its dimensions.
//!
//! Where the innermost dimension in memory is reduced, each result folds *lines*, in lanes; where it is kept,
//! neighbouring results fold *columns*, a vector of them at a time. Long folds are cut into chunks of a fixed
//! size that are joined pairwise: sums stay accurate, and are the same for any number of threads.

use crate::{
    DType, Tensor,
    cpu::{
        elementwise::{Loop, contiguous, dense_strides},
        parallel::{GRAIN, Shared, SharedMut, for_ranges},
        pool::CpuVec,
        simd::{LANES, join_lanes, simd, simd_of},
    },
    dtype::Element,
    shape::{Dims, Strides, count},
};
use std::{ops::Range, slice};

/// What is done to the elements. `join` is associative and commutative up to rounding.
pub trait Fold: Copy + Send + Sync {
    type In: Element;
    type Acc: Element;
    type Out: Element;
    /// Is it worth compiling for every instruction set?
    const SIMD: bool = matches!(Self::Acc::DTYPE, DType::F32);
    /// Does `lift` read the result's own context (its mean, its maximum)?
    const CONTEXT: bool = false;
    /// Joins to anything without effect.
    fn neutral(self) -> Self::Acc;
    fn lift(self, value: Self::In, context: Self::Acc) -> Self::Acc;
    fn join(self, a: Self::Acc, b: Self::Acc) -> Self::Acc;
    fn finish(self, acc: Self::Acc, context: Self::Acc) -> Self::Out;
}

/// Elements of a line that one task folds.
const CHUNK: usize = GRAIN;
/// Elements of a line between joins of its lanes.
const BLOCK: usize = 2048;
/// Columns that one task folds, and rows of them.
const TILE: usize = 1024;
const ROWS: usize = 128;
/// Rows that are joined pairwise before they meet the running column.
const GROUP: usize = 8;

/// A view as kept positions times reduced positions.
pub struct Plan {
    x: Tensor,
    kept: Loop<1>,
    /// Results, and elements in each.
    pub results: usize,
    pub n: usize,
    /// Reduced positions: `starts.len()` pieces of `width` positions, `step` apart.
    starts: Vec<isize>,
    width: usize,
    step: isize,
    columns: bool,
    /// The result, in the view's memory order; reduced dimensions have size 1.
    shape: Dims,
    strides: Strides,
}

impl Plan {
    pub fn new<T: Element>(x: &Tensor, dims: &[usize], op: &'static str) -> Self {
        // What is not stored densely along some dimension is copied.
        let moves = |x: &Tensor, d: usize| x.shape()[d] > 1 && x.strides()[d] != 0;
        let dense = (0..x.rank()).any(|d| moves(x, d) && x.strides()[d] == 1);
        let x = if dense || x.numel() <= 1 { x.detach() } else { contiguous::<T>(x, op) };
        let mut order: Dims = (0..x.rank()).collect();
        order.sort_by_key(|&d| if moves(&x, d) { -x.strides()[d].abs() } else { isize::MIN });
        let (reduced, kept): (Dims, Dims) = order.iter().copied().partition(|d| dims.contains(d));
        let columns = order.last().is_some_and(|d| !dims.contains(d));
        let shape: Dims = (0..x.rank()).map(|d| if dims.contains(&d) { 1 } else { x.shape()[d] }).collect();
        let strides = dense_strides(&shape, &order);
        let kept = Loop::<1>::new(x.shape(), &kept, [x.strides()]);
        let reduced = Loop::<1>::new(x.shape(), &reduced, [x.strides()]);
        let (results, n) = (count(&shape), reduced.len());
        let (mut starts, mut width) = (Vec::new(), 1);
        if n > 0 {
            reduced.rows(0..n, |[start], length| {
                starts.push(start);
                width = length;
            });
        }
        let [step] = reduced.inner();
        Plan { x, kept, results, n, starts, width, step, columns, shape, strides }
    }

    /// The results as a tensor.
    pub fn tensor<T: Element>(&self, values: CpuVec<T>, op: &'static str) -> Tensor {
        Tensor::from_cpu_strided(values, self.shape.clone(), self.strides.clone(), op)
    }

    /// Where reduced position `i` lies, from the result's first element.
    #[inline(always)]
    fn at(&self, i: usize) -> isize {
        self.starts[i / self.width] + (i % self.width) as isize * self.step
    }

    /// All results of `fold`. `context` has one number a result, or none if the fold wants none.
    pub fn run<F: Fold>(&self, fold: F, context: &[F::Acc]) -> CpuVec<F::Out> {
        let k = self.results;
        let mut out = CpuVec::<F::Out>::new(k);
        let context = |i: usize| if F::CONTEXT { context[i] } else { fold.neutral() };
        if k == 0 || self.n == 0 {
            out.iter_mut().enumerate().for_each(|(i, y)| *y = fold.finish(fold.neutral(), context(i)));
            return out;
        }
        let chunk = if self.columns { ROWS } else { CHUNK };
        let chunks = self.n.div_ceil(chunk);
        let mut partial = CpuVec::<F::Acc>::new(if chunks == 1 { 0 } else { chunks * k });
        let (target, parts) = (SharedMut::new(&mut out), SharedMut::new(&mut partial));
        let put = |c: usize, i: usize, acc: F::Acc| unsafe {
            if chunks == 1 {
                *target.ptr().add(i) = fold.finish(acc, context(i));
            } else {
                *parts.ptr().add(c * k + i) = acc;
            }
        };
        if self.columns {
            self.columns(fold, chunks, &context, &put);
        } else {
            self.lines(fold, chunks, &context, &put);
        }
        if chunks > 1 {
            for_ranges(k, TILE, |range| {
                unsafe { join_chunks(fold, parts, k, chunks, range.clone()) };
                for i in range {
                    unsafe { *target.ptr().add(i) = fold.finish(*parts.ptr().add(i), context(i)) };
                }
            });
        }
        out
    }

    fn lines<F: Fold>(
        &self,
        fold: F,
        chunks: usize,
        context: &(impl Fn(usize) -> F::Acc + Sync),
        put: &(impl Fn(usize, usize, F::Acc) + Sync),
    ) {
        let source = Shared(self.x.cpu_ptr::<F::In>());
        let [step] = self.kept.inner();
        let tasks = self.results.saturating_mul(chunks);
        for_ranges(tasks, GRAIN / self.n.min(CHUNK), |range| {
            let mut task = range.start;
            while task < range.end {
                let (first, c) = (task / chunks, task % chunks);
                let end = if chunks == 1 { range.end } else { first + 1 };
                let part = c * CHUNK..self.n.min((c + 1) * CHUNK);
                let mut i = first;
                self.kept.rows(first..end, |[offset], length| {
                    let at = unsafe { source.ptr().offset(offset) };
                    fast::<F, _>(|| {
                        for j in 0..length {
                            let line = unsafe { at.offset(j as isize * step) };
                            put(c, i + j, self.line(fold, line, part.clone(), context(i + j)));
                        }
                    });
                    i += length;
                });
                task += end - first;
            }
        });
    }

    /// Reduced positions `part` of the line whose first element is `at`.
    #[inline(always)]
    fn line<F: Fold>(&self, fold: F, at: *const F::In, part: Range<usize>, context: F::Acc) -> F::Acc {
        let (mut total, mut acc, mut since) = (fold.neutral(), fold.neutral(), 0);
        let (mut row, mut column) = (part.start / self.width, part.start % self.width);
        let mut left = part.len();
        while left > 0 {
            let n = (self.width - column).min(left).min(BLOCK);
            let piece = unsafe {
                slice::from_raw_parts(at.offset(self.starts[row] + column as isize * self.step), n)
            };
            acc = fold.join(acc, block(fold, piece, context));
            since += n;
            if since >= BLOCK {
                (total, acc, since) = (fold.join(total, acc), fold.neutral(), 0);
            }
            left -= n;
            column += n;
            if column == self.width {
                (row, column) = (row + 1, 0);
            }
        }
        fold.join(total, acc)
    }

    fn columns<F: Fold>(
        &self,
        fold: F,
        chunks: usize,
        context: &(impl Fn(usize) -> F::Acc + Sync),
        put: &(impl Fn(usize, usize, F::Acc) + Sync),
    ) {
        let source = Shared(self.x.cpu_ptr::<F::In>());
        let (tile, rows) = (TILE.min(self.results), ROWS.min(self.n));
        let tasks = self.results.div_ceil(tile) * chunks;
        for_ranges(tasks, 2 * GRAIN / (tile * rows), |range| {
            let mut acc = [F::Acc::default(); TILE];
            for task in range {
                let (t, c) = (task / chunks, task % chunks);
                let part = c * ROWS..self.n.min((c + 1) * ROWS);
                let mut i = t * tile;
                self.kept.rows(i..self.results.min(i + tile), |[offset], length| {
                    let at = unsafe { source.ptr().offset(offset) };
                    let acc = &mut acc[..length];
                    fast::<F, _>(|| {
                        self.column(fold, at, part.clone(), acc, |j| context(i + j));
                        acc.iter().enumerate().for_each(|(j, &acc)| put(c, i + j, acc));
                    });
                    i += length;
                });
            }
        });
    }

    /// Reduced positions `part` of `acc.len()` neighbouring columns from `at` on.
    #[inline(always)]
    fn column<F: Fold>(
        &self,
        fold: F,
        at: *const F::In,
        part: Range<usize>,
        acc: &mut [F::Acc],
        context: impl Fn(usize) -> F::Acc,
    ) {
        let n = acc.len();
        let row = |i: usize| unsafe { slice::from_raw_parts(at.offset(self.at(i)), n) };
        let top = row(part.start);
        for j in 0..n {
            acc[j] = fold.lift(top[j], context(j));
        }
        let mut i = part.start + 1;
        while i + GROUP <= part.end {
            let rows: [&[F::In]; GROUP] = std::array::from_fn(|r| row(i + r));
            for j in 0..n {
                let context = context(j);
                let v: [F::Acc; GROUP] = std::array::from_fn(|r| fold.lift(rows[r][j], context));
                let (a, b) = (fold.join(v[0], v[1]), fold.join(v[2], v[3]));
                let (c, d) = (fold.join(v[4], v[5]), fold.join(v[6], v[7]));
                acc[j] = fold.join(acc[j], fold.join(fold.join(a, b), fold.join(c, d)));
            }
            i += GROUP;
        }
        for i in i..part.end {
            let row = row(i);
            for j in 0..n {
                acc[j] = fold.join(acc[j], fold.lift(row[j], context(j)));
            }
        }
    }

    /// For a single reduced dimension: where along it the first element stands that equals the result's
    /// `values`.
    pub fn find<T: Element>(&self, values: &[T], same: impl Fn(T, T) -> bool + Sync) -> CpuVec<i64> {
        let mut out = CpuVec::<i64>::new(self.results);
        let target = SharedMut::new(&mut out);
        let source = Shared(self.x.cpu_ptr::<T>());
        let [step] = self.kept.inner();
        let grain = if self.columns { (2 * GRAIN / self.n).max(TILE) } else { GRAIN / self.n };
        for_ranges(self.results, grain, |range| {
            let mut i = range.start;
            self.kept.rows(range, |[offset], length| {
                let at = unsafe { source.ptr().offset(offset) };
                let to = unsafe { target.slice(i..i + length) };
                let values = &values[i..i + length];
                if self.columns {
                    // From the last row to the first, so that the first stays.
                    to.fill(0);
                    for r in (0..self.n).rev() {
                        let row = unsafe { slice::from_raw_parts(at.offset(self.at(r)), length) };
                        simd_of::<T, _>(
                            #[inline(always)]
                            || {
                                for j in 0..length {
                                    to[j] = if same(row[j], values[j]) { r as i64 } else { to[j] };
                                }
                            },
                        );
                    }
                } else {
                    for j in 0..length {
                        let line = unsafe { slice::from_raw_parts(at.offset(j as isize * step), self.n) };
                        to[j] = simd_of::<T, _>(
                            #[inline(always)]
                            || first(line, |v| same(v, values[j])),
                        ) as i64;
                    }
                }
                i += length;
            });
        });
        out
    }
}

/// Position of the first element that `is` holds for, by blocks that vectorise.
#[inline(always)]
fn first<T: Copy>(line: &[T], is: impl Fn(T) -> bool) -> usize {
    const BLOCK: usize = 8 * LANES;
    for (b, block) in line.chunks(BLOCK).enumerate() {
        if block.iter().fold(false, |any, &v| any | is(v)) {
            return b * BLOCK + block.iter().position(|&v| is(v)).unwrap_or(0);
        }
    }
    0
}

#[inline(always)]
fn fast<F: Fold, R>(f: impl FnOnce() -> R) -> R {
    if F::SIMD { simd(f) } else { f() }
}

/// Folds neighbouring elements in four sets of lanes, then the lanes pairwise.
#[inline(always)]
fn block<F: Fold>(fold: F, x: &[F::In], context: F::Acc) -> F::Acc {
    if x.len() < LANES {
        return x.iter().fold(fold.neutral(), |acc, &v| fold.join(acc, fold.lift(v, context)));
    }
    let mut lanes = [[fold.neutral(); LANES]; 4];
    let mut quads = x.chunks_exact(4 * LANES);
    for quad in &mut quads {
        for (s, lanes) in lanes.iter_mut().enumerate() {
            for (lane, &v) in lanes.iter_mut().zip(&quad[s * LANES..(s + 1) * LANES]) {
                *lane = fold.join(*lane, fold.lift(v, context));
            }
        }
    }
    for piece in quads.remainder().chunks(LANES) {
        for (lane, &v) in lanes[0].iter_mut().zip(piece) {
            *lane = fold.join(*lane, fold.lift(v, context));
        }
    }
    let [a, b, c, d] = lanes;
    let joined = std::array::from_fn(|i| fold.join(fold.join(a[i], b[i]), fold.join(c[i], d[i])));
    join_lanes(joined, |a, b| fold.join(a, b))
}

/// Joins the chunks of results `range` pairwise into the first chunk.
///
/// # Safety
/// `parts` holds `chunks` times `k` numbers, and nobody else touches those of `range`.
unsafe fn join_chunks<F: Fold>(
    fold: F,
    parts: SharedMut<F::Acc>,
    k: usize,
    chunks: usize,
    range: Range<usize>,
) {
    let row = |c: usize| unsafe { parts.slice(c * k + range.start..c * k + range.end) };
    let mut apart = 1;
    while apart < chunks {
        for c in (0..chunks - apart).step_by(2 * apart) {
            let (a, b) = (row(c), row(c + apart));
            a.iter_mut().zip(b).for_each(|(a, b)| *a = fold.join(*a, *b));
        }
        apart *= 2;
    }
}
