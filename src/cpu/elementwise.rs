//! Loops over any strided views: the shared core of elementwise operations and copies.
//!
//! A [`Loop`] reorders the dimensions so that the result is written in memory order, merges dimensions that
//! step together, and hands out rows. The result takes the memory order of the first operand of full size, so
//! channels-last stays channels-last.

use super::{
    parallel::{GRAIN, SharedMut, for_ranges},
    pool::CpuVec,
    simd::simd,
};
use crate::{
    Result, Tensor,
    dtype::Element,
    shape::{Dims, Strides, broadcast, broadcast_strides, count},
};

/// An iteration over `K` operands of one broadcast shape.
pub struct Loop<const K: usize> {
    /// Merged sizes, outermost first; never empty.
    sizes: Dims,
    /// Strides of each operand for these sizes.
    strides: [Strides; K],
}

impl<const K: usize> Loop<K> {
    /// Merges the dimensions of `shape`, visited in `order`, wherever all operands step evenly.
    pub fn new(shape: &[usize], order: &[usize], operands: [&[isize]; K]) -> Self {
        let mut sizes = Dims::new();
        let mut strides: [Strides; K] = std::array::from_fn(|_| Strides::new());
        for &d in order.iter().filter(|&&d| shape[d] != 1) {
            let n = shape[d] as isize;
            let merges =
                !sizes.is_empty() && (0..K).all(|k| strides[k].last() == Some(&(operands[k][d] * n)));
            if merges {
                if let Some(size) = sizes.last_mut() {
                    *size *= shape[d];
                }
            } else {
                sizes.push(shape[d]);
            }
            for k in 0..K {
                if merges {
                    strides[k].pop();
                }
                strides[k].push(operands[k][d]);
            }
        }
        if sizes.is_empty() {
            sizes.push(1);
            strides.iter_mut().for_each(|s| s.push(0));
        }
        Loop { sizes, strides }
    }

    /// Elements in all.
    pub fn len(&self) -> usize {
        count(&self.sizes)
    }

    /// Steps along the innermost dimension.
    pub fn inner(&self) -> [isize; K] {
        std::array::from_fn(|k| self.strides[k][self.sizes.len() - 1])
    }

    /// Calls `f(offsets, length)` for each piece of a row within elements `range`, counted in visiting order.
    pub fn rows(&self, range: std::ops::Range<usize>, mut f: impl FnMut([isize; K], usize)) {
        let last = self.sizes.len() - 1;
        let width = self.sizes[last];
        let (mut at, mut column) = (range.start, range.start % width);
        // Odometer over the outer dimensions.
        let mut index: Dims = Dims::from_elem(0, last);
        let mut rest = range.start / width;
        for d in (0..last).rev() {
            index[d] = rest % self.sizes[d];
            rest /= self.sizes[d];
        }
        let mut offset: [isize; K] =
            std::array::from_fn(|k| (0..last).map(|d| index[d] as isize * self.strides[k][d]).sum());
        while at < range.end {
            let n = (width - column).min(range.end - at);
            f(std::array::from_fn(|k| offset[k] + column as isize * self.strides[k][last]), n);
            at += n;
            column = 0;
            for d in (0..last).rev() {
                index[d] += 1;
                for k in 0..K {
                    offset[k] += self.strides[k][d];
                }
                if index[d] < self.sizes[d] {
                    break;
                }
                for k in 0..K {
                    offset[k] -= self.strides[k][d] * self.sizes[d] as isize;
                }
                index[d] = 0;
            }
        }
    }

    /// `f` over pieces of rows, on all threads.
    pub fn par_rows(&self, f: impl Fn([isize; K], usize) + Sync) {
        for_ranges(self.len(), GRAIN, |range| self.rows(range, &f));
    }
}

/// Dimensions from the largest stride to the smallest: the order of a dense view in memory.
pub fn memory_order(shape: &[usize], strides: &[isize]) -> Dims {
    let mut order: Dims = (0..shape.len()).collect();
    // Stable, so ties (size 1, stride 0) keep their logical order.
    order.sort_by_key(|&d| if shape[d] == 1 { isize::MIN } else { -strides[d].abs() });
    // Size-1 dimensions sort to the front, where they do no harm.
    order
}

/// Strides of a dense tensor of `shape` whose memory order is `order`.
pub fn dense_strides(shape: &[usize], order: &[usize]) -> Strides {
    let mut strides = Strides::from_elem(0, shape.len());
    let mut step = 1;
    for &d in order.iter().rev() {
        strides[d] = step;
        step *= shape[d].max(1) as isize;
    }
    strides
}

/// The memory order for a result: that of the first operand of full size without repeats, else row-major.
pub fn result_order(shape: &[usize], operands: &[&Tensor]) -> Dims {
    for t in operands {
        if t.shape() == shape && t.strides().iter().zip(shape).all(|(&s, &n)| s != 0 || n == 1) {
            return memory_order(shape, t.strides());
        }
    }
    (0..shape.len()).collect()
}

/// A result of shape `shape` and its loop together with `K - 1` operands (the result is the last).
macro_rules! run {
    ($op:expr, $shape:expr, [$($t:ident: $T:ident),+], $R:ident, $K:literal, |$($x:ident),+| $body:expr) => {{
        let shape: Dims = $shape;
        let order = result_order(&shape, &[$($t),+]);
        let out_strides = dense_strides(&shape, &order);
        let mut out = CpuVec::<$R>::new(count(&shape));
        let ($($x,)+) = ($(broadcast_strides($t.shape(), $t.strides(), &shape),)+);
        let plan = Loop::<$K>::new(&shape, &order, [$(&$x,)+ &out_strides]);
        let steps = plan.inner();
        let target = SharedMut::new(&mut out);
        let sources = ($(super::parallel::Shared($t.cpu_ptr::<$T>()),)+);
        plan.par_rows(|offsets, n| {
            let ($($x,)+) = &sources;
            row!(offsets, steps, n, target, [$($x),+], $body);
        });
        Tensor::from_cpu_strided(out, shape, out_strides, $op)
    }};
}

/// One row: separate loops for the common steps, so that they vectorise.
macro_rules! row {
    ($offsets:ident, $steps:ident, $n:ident, $target:ident, [$a:ident], $f:expr) => {
        unsafe {
            let a = $a.ptr().offset($offsets[0]);
            let o = $target.ptr().offset($offsets[1]);
            match $steps {
                [1, 1] => simd(|| (0..$n).for_each(|i| *o.add(i) = $f(*a.add(i)))),
                [s, 1] => simd(|| (0..$n).for_each(|i| *o.add(i) = $f(*a.offset(i as isize * s)))),
                [s, t] => (0..$n as isize).for_each(|i| *o.offset(i * t) = $f(*a.offset(i * s))),
            }
        }
    };
    ($offsets:ident, $steps:ident, $n:ident, $target:ident, [$a:ident, $b:ident], $f:expr) => {
        unsafe {
            let a = $a.ptr().offset($offsets[0]);
            let b = $b.ptr().offset($offsets[1]);
            let o = $target.ptr().offset($offsets[2]);
            match $steps {
                [1, 1, 1] => simd(|| (0..$n).for_each(|i| *o.add(i) = $f(*a.add(i), *b.add(i)))),
                [1, 0, 1] => simd(|| {
                    let b = *b;
                    (0..$n).for_each(|i| *o.add(i) = $f(*a.add(i), b))
                }),
                [0, 1, 1] => simd(|| {
                    let a = *a;
                    (0..$n).for_each(|i| *o.add(i) = $f(a, *b.add(i)))
                }),
                [s, t, u] => {
                    (0..$n as isize).for_each(|i| *o.offset(i * u) = $f(*a.offset(i * s), *b.offset(i * t)))
                }
            }
        }
    };
    ($offsets:ident, $steps:ident, $n:ident, $target:ident, [$a:ident, $b:ident, $c:ident], $f:expr) => {
        unsafe {
            let a = $a.ptr().offset($offsets[0]);
            let b = $b.ptr().offset($offsets[1]);
            let c = $c.ptr().offset($offsets[2]);
            let o = $target.ptr().offset($offsets[3]);
            match $steps {
                [1, 1, 1, 1] => {
                    simd(|| (0..$n).for_each(|i| *o.add(i) = $f(*a.add(i), *b.add(i), *c.add(i))))
                }
                [s, t, u, v] => (0..$n as isize).for_each(|i| {
                    *o.offset(i * v) = $f(*a.offset(i * s), *b.offset(i * t), *c.offset(i * u))
                }),
            }
        }
    };
}

/// `f` of every element.
pub fn map<A: Element, R: Element>(op: &'static str, a: &Tensor, f: impl Fn(A) -> R + Sync) -> Tensor {
    run!(op, Dims::from_slice(a.shape()), [a: A], R, 2, |x| &f)
}

/// `f` of every pair of elements of two broadcast tensors.
#[track_caller]
pub fn map2<A: Element, B: Element, R: Element>(
    op: &'static str,
    a: &Tensor,
    b: &Tensor,
    f: impl Fn(A, B) -> R + Sync,
) -> Result<Tensor> {
    let shape = broadcast(op, a.shape(), b.shape())?;
    Ok(run!(op, shape, [a: A, b: B], R, 3, |x, y| &f))
}

/// `f` of every triple of elements of three broadcast tensors.
#[track_caller]
pub fn map3<A: Element, B: Element, C: Element, R: Element>(
    op: &'static str,
    a: &Tensor,
    b: &Tensor,
    c: &Tensor,
    f: impl Fn(A, B, C) -> R + Sync,
) -> Result<Tensor> {
    let shape = broadcast(op, &broadcast(op, a.shape(), b.shape())?, c.shape())?;
    Ok(run!(op, shape, [a: A, b: B, c: C], R, 4, |x, y, z| &f))
}

/// Row-major copy of a view.
pub fn contiguous<T: Element>(a: &Tensor, op: &'static str) -> Tensor {
    Tensor::from_cpu(to_vec::<T>(a), a.shape(), op)
}

/// The elements of a view in row-major order.
pub fn to_vec<T: Element>(a: &Tensor) -> CpuVec<T> {
    let mut out = CpuVec::<T>::new(a.numel());
    let order: Dims = (0..a.rank()).collect();
    unsafe { copy_into(a, SharedMut::new(&mut out), &crate::shape::contiguous_strides(a.shape()), &order) };
    out
}

/// Copies a view to where `strides` put its elements from `target` on, visiting its dimensions in `order`.
///
/// # Safety
/// The places lie within the target's allocation, do not coincide, and nobody else touches them meanwhile.
pub unsafe fn copy_into<T: Element>(a: &Tensor, target: SharedMut<T>, strides: &[isize], order: &[usize]) {
    let plan = Loop::<2>::new(a.shape(), order, [a.strides(), strides]);
    let steps = plan.inner();
    let source = super::parallel::Shared(a.cpu_ptr::<T>());
    plan.par_rows(|[from, to], n| unsafe {
        let (from, to) = (source.ptr().offset(from), target.ptr().offset(to));
        match steps {
            [1, 1] => std::ptr::copy_nonoverlapping(from, to, n),
            [0, 1] => std::slice::from_raw_parts_mut(to, n).fill(*from),
            [s, 1] => (0..n).for_each(|i| *to.add(i) = *from.offset(i as isize * s)),
            [s, t] => (0..n as isize).for_each(|i| *to.offset(i * t) = *from.offset(i * s)),
        }
    });
}

/// The elements of `t` for writing. A view, or a tensor that somebody else sees, becomes a copy of its own first.
pub fn make_mut<T: Element>(t: &mut Tensor) -> &mut [T] {
    if t.cpu_slice_mut::<T>().is_none() {
        *t = contiguous::<T>(t, "update");
    }
    // Contiguous and unshared by now, so the empty slice is never seen.
    t.cpu_slice_mut::<T>().unwrap_or_default()
}

/// `f(&mut sum[i], x[i])` in place: `sum` is contiguous and unshared, `x` any view of the same shape. Returns
/// false, having done nothing, if `sum` may not be written.
pub fn update<T: Element>(sum: &mut Tensor, x: &Tensor, f: impl Fn(T, T) -> T + Sync) -> bool {
    let shape = Dims::from_slice(sum.shape());
    debug_assert_eq!(&shape[..], x.shape());
    let strides = crate::shape::contiguous_strides(&shape);
    let order: Dims = (0..shape.len()).collect();
    let Some(slice) = sum.cpu_slice_mut::<T>() else { return false };
    let plan = Loop::<2>::new(&shape, &order, [x.strides(), &strides]);
    let steps = plan.inner();
    let (target, source) = (SharedMut::new(slice), super::parallel::Shared(x.cpu_ptr::<T>()));
    plan.par_rows(|[from, to], n| unsafe {
        let (from, to) = (source.ptr().offset(from), target.ptr().offset(to));
        match steps {
            [1, 1] => simd(|| (0..n).for_each(|i| *to.add(i) = f(*to.add(i), *from.add(i)))),
            [s, t] => (0..n as isize).for_each(|i| {
                let to = to.offset(i * t);
                *to = f(*to, *from.offset(i * s));
            }),
        }
    });
    true
}
