//! Loops over any strided views: the shared core of elementwise operations and copies.
//!
//! A [`Loop`] reorders the dimensions so that the result is written in memory order, merges dimensions that
//! step together, and hands out rows. The result takes the memory order of the first operand of full size, so
//! channels-last stays channels-last.

use super::{
    parallel::{GRAIN, Shared, SharedMut, for_ranges},
    pool::CpuVec,
    simd::simd,
    transpose::transpose,
};
use crate::{
    Result, Tensor,
    dtype::Element,
    shape::{Dims, Strides, broadcast, broadcast_strides, count},
};
use std::mem::MaybeUninit;

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
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        count(&self.sizes)
    }

    /// Steps along the innermost dimension.
    pub fn inner(&self) -> [isize; K] {
        std::array::from_fn(|k| self.strides[k][self.sizes.len() - 1])
    }

    /// Calls `f(offsets, length)` for each piece of a row within elements `range`, counted in visiting order.
    pub fn rows(&self, range: std::ops::Range<usize>, mut f: impl FnMut([isize; K], usize)) {
        self.walk(range, &mut f);
    }

    /// Apart, so that the odometer is compiled once and not for every caller.
    fn walk(&self, range: std::ops::Range<usize>, f: &mut dyn FnMut([isize; K], usize)) {
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
        let f: &(dyn Fn([isize; K], usize) + Sync) = &f;
        for_ranges(self.len(), GRAIN, |range| self.walk(range, &mut |offsets, n| f(offsets, n)));
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

/// Elements of a strided operand that are brought together at a time.
const BLOCK: usize = 512;
type Stage<T> = [MaybeUninit<T>; BLOCK];

/// Elements `start..start + n` of a row: in place if they lie side by side, else gathered in `stage`.
///
/// # Safety
/// The row lies within its storage; `n` is at most [`BLOCK`] if `step` is not 1.
unsafe fn piece<T: Copy>(ptr: *const T, step: isize, start: usize, n: usize, stage: &mut Stage<T>) -> &[T] {
    unsafe {
        match step {
            1 => return std::slice::from_raw_parts(ptr.add(start), n),
            // a repeated element fills the whole stage once
            0 if start == 0 => stage[..n].fill(MaybeUninit::new(*ptr)),
            0 => {}
            _ => (0..n).for_each(|i| {
                stage[i].write(*ptr.offset((start + i) as isize * step));
            }),
        }
        std::slice::from_raw_parts(stage.as_ptr().cast(), n)
    }
}

/// The loop over a result of shape `shape` and its `K - 1` operands (the result is the last), and its strides.
fn prepare<const K: usize>(shape: &[usize], operands: &[&Tensor]) -> (Loop<K>, Strides) {
    let order = result_order(shape, operands);
    let out = dense_strides(shape, &order);
    let of = |t: &&Tensor| broadcast_strides(t.shape(), t.strides(), shape);
    let strides: Vec<Strides> = operands.iter().map(of).collect();
    let plan = Loop::new(shape, &order, std::array::from_fn(|k| strides.get(k).map_or(&out[..], |s| s)));
    (plan, out)
}

/// A result of shape `shape`, written by `$kernel` from pieces of the operands.
macro_rules! run {
    ($op:expr, $shape:expr, [$($t:ident: $T:ident),+], $R:ident, $K:literal, $kernel:ident, $f:ident) => {{
        let shape: Dims = $shape;
        let (plan, out_strides) = prepare::<$K>(&shape, &[$($t),+]);
        let mut out = CpuVec::<$R>::new(count(&shape));
        let steps = plan.inner();
        let target = SharedMut::new(&mut out);
        let sources = ($(Shared($t.cpu_ptr::<$T>()),)+);
        plan.par_rows(|offsets, n| unsafe {
            // the result is dense in visiting order, so its row is a slice
            let row = offsets[$K - 1] as usize;
            let row = target.slice(row..row + n);
            let ($($t,)+) = sources;
            let plain = steps[..$K - 1].iter().all(|&s| s == 1);
            let width = if plain { n } else { BLOCK };
            let mut stages = ($([MaybeUninit::<$T>::uninit(); BLOCK],)+);
            for start in (0..n).step_by(width) {
                let m = width.min(n - start);
                let out = &mut row[start..start + m];
                run!(@ $kernel, offsets, steps, start, m, stages, out, $f, $($t)+);
            }
        });
        Tensor::from_cpu_strided(out, shape, out_strides, $op)
    }};
    (@ $kernel:ident, $o:ident, $s:ident, $at:ident, $m:ident, $st:ident, $out:ident, $f:ident, $a:ident) => {
        let a = piece($a.ptr().offset($o[0]), $s[0], $at, $m, &mut $st.0);
        let f = &$f;
        simd!($kernel(a, $out, f))
    };
    (@ $kernel:ident, $o:ident, $s:ident, $at:ident, $m:ident, $st:ident, $out:ident, $f:ident, $a:ident $b:ident) => {
        let a = piece($a.ptr().offset($o[0]), $s[0], $at, $m, &mut $st.0);
        let b = piece($b.ptr().offset($o[1]), $s[1], $at, $m, &mut $st.1);
        let f = &$f;
        simd!($kernel(a, b, $out, f))
    };
    (@ $kernel:ident, $o:ident, $s:ident, $at:ident, $m:ident, $st:ident, $out:ident, $f:ident,
        $a:ident $b:ident $c:ident) => {
        let a = piece($a.ptr().offset($o[0]), $s[0], $at, $m, &mut $st.0);
        let b = piece($b.ptr().offset($o[1]), $s[1], $at, $m, &mut $st.1);
        let c = piece($c.ptr().offset($o[2]), $s[2], $at, $m, &mut $st.2);
        let f = &$f;
        simd!($kernel(a, b, c, $out, f))
    };
}

#[inline(always)]
fn row1<A: Copy, R>(a: &[A], out: &mut [R], f: &impl Fn(A) -> R) {
    let n = out.len();
    let a = &a[..n];
    for i in 0..n {
        out[i] = f(a[i]);
    }
}

#[inline(always)]
fn row2<A: Copy, B: Copy, R>(a: &[A], b: &[B], out: &mut [R], f: &impl Fn(A, B) -> R) {
    let n = out.len();
    let (a, b) = (&a[..n], &b[..n]);
    for i in 0..n {
        out[i] = f(a[i], b[i]);
    }
}

#[inline(always)]
fn row3<A: Copy, B: Copy, C: Copy, R>(a: &[A], b: &[B], c: &[C], out: &mut [R], f: &impl Fn(A, B, C) -> R) {
    let n = out.len();
    let (a, b, c) = (&a[..n], &b[..n], &c[..n]);
    for i in 0..n {
        out[i] = f(a[i], b[i], c[i]);
    }
}

#[inline(always)]
fn row_update<T: Copy>(sum: &mut [T], x: &[T], f: &impl Fn(T, T) -> T) {
    let n = sum.len();
    let x = &x[..n];
    for i in 0..n {
        sum[i] = f(sum[i], x[i]);
    }
}

/// `f` of every element. A closure of more than a few operations carries `#[inline(always)]`, see
/// [`simd`](super::simd).
pub fn map<A: Element, R: Element>(op: &'static str, a: &Tensor, f: impl Fn(A) -> R + Sync) -> Tensor {
    run!(op, Dims::from_slice(a.shape()), [a: A], R, 2, row1, f)
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
    Ok(run!(op, shape, [a: A, b: B], R, 3, row2, f))
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
    Ok(run!(op, shape, [a: A, b: B, c: C], R, 4, row3, f))
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
    let source = Shared(a.cpu_ptr::<T>());
    if let Some(dense) = plan.transposed() {
        return unsafe { copy_transposed(&plan, dense, source, target) };
    }
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

impl Loop<2> {
    /// The outer dimension along which the first operand is dense, if copying means to transpose.
    fn transposed(&self) -> Option<usize> {
        let last = self.sizes.len() - 1;
        let dense = (0..last).find(|&d| self.strides[0][d] == 1 && self.sizes[d] >= 8)?;
        (self.strides[0][last] != 1 && self.strides[1][last] == 1 && self.sizes[last] >= 8).then_some(dense)
    }
}

/// Rows of a result that are transposed together: a task is at least that high.
const BAND: usize = 32;

/// Copies matrices of the dimension along which the source is dense and of the innermost.
///
/// # Safety
/// As [`copy_into`].
unsafe fn copy_transposed<T: Element>(plan: &Loop<2>, dense: usize, source: Shared<T>, target: SharedMut<T>) {
    let last = plan.sizes.len() - 1;
    let (rows, columns) = (plan.sizes[dense], plan.sizes[last]);
    let (step, pitch) = (plan.strides[0][last], plan.strides[1][dense]);
    let outer: Dims = (0..last).filter(|&d| d != dense).collect();
    let bands = rows.div_ceil(BAND);
    let matrices: usize = outer.iter().map(|&d| plan.sizes[d]).product();
    for_ranges(matrices * bands, (GRAIN / (BAND * columns)).max(1), |range| {
        for item in range {
            let (mut rest, first) = (item / bands, item % bands * BAND);
            let (mut from, mut to) = (first as isize, first as isize * pitch);
            for &d in outer.iter().rev() {
                let i = (rest % plan.sizes[d]) as isize;
                rest /= plan.sizes[d];
                from += i * plan.strides[0][d];
                to += i * plan.strides[1][d];
            }
            let height = BAND.min(rows - first);
            unsafe {
                let (from, to) = (source.ptr().offset(from), target.ptr().offset(to));
                transpose([columns, height], from, step, to, pitch);
            }
        }
    });
}

/// The elements of `t` for writing. A view, or a tensor that somebody else sees, becomes a copy of its own first.
pub fn make_mut<T: Element>(t: &mut Tensor) -> &mut [T] {
    if t.cpu_slice_mut::<T>().is_none() {
        *t = contiguous::<T>(t, "update"); // on the CPU, wherever the tensor was
    }
    // Contiguous and unshared by now, so the empty slice is never seen.
    t.cpu_slice_mut::<T>().unwrap_or_default()
}

/// `f(sum[i], x[i])` in place: `sum` is contiguous and unshared, `x` any view of the same shape. Returns
/// false, having done nothing, if `sum` may not be written.
pub fn update<T: Element>(sum: &mut Tensor, x: &Tensor, f: impl Fn(T, T) -> T + Sync) -> bool {
    let shape = Dims::from_slice(sum.shape());
    debug_assert_eq!(&shape[..], x.shape());
    let strides = crate::shape::contiguous_strides(&shape);
    let order: Dims = (0..shape.len()).collect();
    let Some(slice) = sum.cpu_slice_mut::<T>() else { return false };
    let plan = Loop::<2>::new(&shape, &order, [x.strides(), &strides]);
    let [step, _] = plan.inner();
    let (target, source) = (SharedMut::new(slice), Shared(x.cpu_ptr::<T>()));
    plan.par_rows(|[from, to], n| unsafe {
        let row = target.slice(to as usize..to as usize + n);
        let width = if step == 1 { n } else { BLOCK };
        let mut stage = [MaybeUninit::uninit(); BLOCK];
        for (i, sum) in row.chunks_mut(width).enumerate() {
            let x = piece(source.ptr().offset(from), step, i * width, sum.len(), &mut stage);
            let f = &f;
            simd!(row_update(sum, x, f));
        }
    });
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    #[test]
    fn contiguous_transposes_every_order() -> Result<()> {
        let sizes = [3, 40, 9, 35];
        let x = Tensor::arange(sizes.iter().product(), DType::I32)?.reshape(sizes)?;
        for order in [[0, 1, 2, 3], [0, 2, 3, 1], [3, 2, 1, 0], [0, 3, 1, 2], [1, 0, 3, 2], [2, 3, 0, 1]] {
            let y = x.permute(order)?;
            let got = y.to_vec::<i32>()?;
            let mut at = 0;
            for i in 0..got.len() {
                let (mut rest, mut position) = (i, 0);
                for d in (0..4).rev() {
                    position += (rest % y.shape()[d]) as isize * y.strides()[d];
                    rest /= y.shape()[d];
                }
                at += usize::from(got[i] != position as i32);
            }
            assert_eq!(at, 0, "elements in the wrong place for {order:?}");
        }
        Ok(())
    }

    #[test]
    fn operands_of_any_step_meet() -> Result<()> {
        let a = Tensor::arange(2400, DType::F32)?.reshape([2, 1200])?;
        let column = Tensor::from_slice(&[1000f32, 2000.], [2, 1])?;
        let sum = map3("test", &a, &a.slice(1, 0, 1200, 1)?, &column, |x: f32, y: f32, z: f32| x + y + z)?;
        let skip = map2("test", &a.slice(1, 0, 1200, 2)?, &column, |x: f32, z: f32| x + z)?;
        assert_eq!(sum.narrow(0, 1, 1)?.to_vec::<f32>()?[1199], 2. * 2399. + 2000.);
        assert_eq!(skip.to_vec::<f32>()?[1199], 2398. + 2000.);
        Ok(())
    }
}
