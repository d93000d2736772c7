//! Loops over any strided views: the shared core of elementwise operations and copies.
//!
//! A [`Loop`] reorders the dimensions so that the result is written in memory order, merges dimensions that
//! step together, and hands out rows. The result takes the memory order of the first operand of full size, so
//! channels-last stays channels-last.

use super::{
    parallel::{GRAIN, Shared, SharedMut, for_ranges},
    pool::{Buffer, CpuVec},
    simd::simd,
    transpose::transpose,
};
use crate::{
    DType, Result, Tensor,
    dtype::{Element, Float},
    shape::{Dims, Strides, broadcast, broadcast_strides, count},
};
use half::{bf16, f16};
use smallvec::SmallVec;
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

/// Elements that are brought together, or converted, at a time.
const BLOCK: usize = 512;
/// Room for them, whatever their type.
type Stage = [MaybeUninit<u64>; BLOCK];

/// Writes a row of results: from the rows of up to three operands, to where, and how many.
type Kernel<'a> = &'a (dyn Fn([*const u8; 3], *mut u8, usize) + Sync);
/// Reads elements from where, how far apart, and how many, and writes them side by side.
type Load = unsafe fn(*const u8, isize, usize, *mut u8);

/// Kernels compute in f32, f64 and i64. Other types are widened for them, a block on the stack at a time, and
/// results narrowed back: a kernel of its own for each of the eight would make up most of the build.
fn load(stored: DType, read: DType) -> Load {
    use DType::*;
    match (stored, read) {
        (BF16, F32) => |from, step, n, to| unsafe { gather(from, step, n, to, bf16::acc) },
        (F16, F32) => |from, step, n, to| unsafe { gather(from, step, n, to, f16::acc) },
        (I32, I64) => |from, step, n, to| unsafe { gather(from, step, n, to, i32::to_i64) },
        (U8 | Bool, I64) => |from, step, n, to| unsafe { gather(from, step, n, to, u8::to_i64) },
        _ => {
            assert!(stored == read || (stored, read) == (Bool, U8), "internal: {stored} read as {read}");
            match stored.size() {
                1 => |from, step, n, to| unsafe { gather(from, step, n, to, |x: u8| x) },
                2 => |from, step, n, to| unsafe { gather(from, step, n, to, |x: u16| x) },
                4 => |from, step, n, to| unsafe { gather(from, step, n, to, |x: u32| x) },
                _ => |from, step, n, to| unsafe { gather(from, step, n, to, |x: u64| x) },
            }
        }
    }
}

/// How results are narrowed, see [`load`]; nothing if they are stored as they were computed.
fn store(computed: DType, stored: DType) -> Option<Load> {
    use DType::*;
    match (computed, stored) {
        (F32, BF16) => Some(|from, step, n, to| unsafe { gather(from, step, n, to, bf16::store) }),
        (F32, F16) => Some(|from, step, n, to| unsafe { gather(from, step, n, to, f16::store) }),
        (I64, I32) => Some(|from, step, n, to| unsafe { gather(from, step, n, to, i32::from_i64) }),
        (I64, U8) => Some(|from, step, n, to| unsafe { gather(from, step, n, to, u8::from_i64) }),
        (I64, Bool) => Some(|from, step, n, to| unsafe { gather(from, step, n, to, bool::from_i64) }),
        _ => {
            assert!(computed == stored, "internal: {computed} stored as {stored}");
            None
        }
    }
}

/// The dtype of an operation's result that is computed in `computed`: that of its operand, if it was widened.
fn narrowed(operand: &Tensor, computed: DType) -> DType {
    match (operand.dtype(), computed) {
        (dtype, DType::F32) if dtype.is_half() => dtype,
        (dtype @ (DType::I32 | DType::U8 | DType::Bool), DType::I64) => dtype,
        _ => computed,
    }
}

/// # Safety
/// The elements lie within their storage, and `to` has room for `n`.
#[inline(always)]
unsafe fn gather<S: Copy, C: Copy>(
    from: *const u8,
    step: isize,
    n: usize,
    to: *mut u8,
    convert: impl Fn(S) -> C,
) {
    unsafe {
        let (at, out, f) = (from.cast::<S>(), slice_mut(to, n), &convert);
        match step {
            1 => {
                let from = slice(from, n);
                simd!(row1(from, out, f))
            }
            0 => out.fill(convert(*at)),
            _ => (0..n).for_each(|i| out[i] = convert(*at.offset(i as isize * step))),
        }
    }
}

unsafe fn slice<'a, T>(ptr: *const u8, n: usize) -> &'a [T] {
    unsafe { std::slice::from_raw_parts(ptr.cast(), n) }
}

unsafe fn slice_mut<'a, T>(ptr: *mut u8, n: usize) -> &'a mut [T] {
    unsafe { std::slice::from_raw_parts_mut(ptr.cast(), n) }
}

/// A result of shape `shape`, written by `kernel` from up to three operands, each with the dtype as which the
/// kernel reads it. The kernel computes in `computed`, and the result is kept as `stored`.
fn run(
    op: &'static str,
    shape: Dims,
    operands: &[(&Tensor, DType)],
    computed: DType,
    stored: DType,
    kernel: Kernel,
) -> Tensor {
    let tensors: SmallVec<[&Tensor; 3]> = operands.iter().map(|&(t, _)| t).collect();
    let order = result_order(&shape, &tensors);
    let out_strides = dense_strides(&shape, &order);
    let of = |t: &&Tensor| broadcast_strides(t.shape(), t.strides(), &shape);
    let strides: SmallVec<[Strides; 3]> = tensors.iter().map(of).collect();
    // the result is the last; operands that are not there step with it
    let plan = Loop::<4>::new(
        &shape,
        &order,
        std::array::from_fn(|k| strides.get(k).map_or(&out_strides[..], |s| s)),
    );
    let steps = plan.inner();
    let out = Buffer::new(count(&shape) * stored.size());
    let target = SharedMut::of(out.ptr());
    let narrow = store(computed, stored);
    struct Source {
        ptr: Shared<u8>,
        size: isize,
        load: Load,
        direct: bool,
    }
    let sources: SmallVec<[Source; 3]> = (operands.iter().zip(steps))
        .map(|(&(t, read), step)| Source {
            ptr: Shared(t.cpu_bytes()),
            size: t.dtype().size() as isize,
            load: load(t.dtype(), read),
            direct: step == 1 && t.dtype().size() == read.size(),
        })
        .collect();
    let direct = narrow.is_none() && sources.iter().all(|s| s.direct);
    plan.par_rows(|offsets, n| unsafe {
        let mut stages: [Stage; 4] = [[MaybeUninit::uninit(); BLOCK]; 4];
        let width = if direct { n } else { BLOCK };
        for start in (0..n).step_by(width) {
            let m = width.min(n - start);
            let mut rows = [std::ptr::null(); 3];
            for (k, source) in sources.iter().enumerate() {
                let at = offsets[k] + start as isize * steps[k];
                let at = source.ptr.ptr().offset(at * source.size);
                let stage = stages[k].as_mut_ptr().cast::<u8>();
                rows[k] = if source.direct { at } else { stage };
                // a repeated element fills the whole stage once
                if !source.direct && (steps[k] != 0 || start == 0) {
                    (source.load)(at, steps[k], m, stage);
                }
            }
            let to = target.ptr().add((offsets[3] as usize + start) * stored.size());
            match narrow {
                None => kernel(rows, to, m),
                Some(narrow) => {
                    let stage = stages[3].as_mut_ptr().cast::<u8>();
                    kernel(rows, stage, m);
                    narrow(stage, 1, m, to);
                }
            }
        }
    });
    Tensor::from_buffer(out, stored, shape, out_strides, op)
}

/// A kernel that is compiled for every instruction set if it reads or writes f32; for the other types, where
/// speed matters less, once.
macro_rules! kernel {
    ($row:ident($($x:ident: $T:ident),+) -> $R:ident, $f:expr) => {
        &|rows, out, n| {
            let f = &$f;
            let [$($x,)+ ..] = rows;
            // `run` hands out rows of these types and of that length
            let ($($x,)+ out) = unsafe { ($(slice::<$T>($x, n),)+ slice_mut::<$R>(out, n)) };
            if const { $(matches!($T::DTYPE, DType::F32) ||)+ matches!($R::DTYPE, DType::F32) } {
                simd!($row($($x,)+ out, f))
            } else {
                $row($($x,)+ out, f)
            }
        }
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

/// `f` of every element. Half types are computed in f32 and integers in i64: the operand may be narrower than
/// `A`, and a result of type `R` is then narrowed to the dtype of the operand. A closure of more than a few
/// operations carries `#[inline(always)]`, see [`simd`](super::simd).
pub fn map<A: Element, R: Element>(op: &'static str, a: &Tensor, f: impl Fn(A) -> R + Sync) -> Tensor {
    map_to(op, a, narrowed(a, R::DTYPE), f)
}

/// [`map`] with a result of dtype `to`, which is `R` or narrower.
pub fn map_to<A: Element, R: Element>(
    op: &'static str,
    a: &Tensor,
    to: DType,
    f: impl Fn(A) -> R + Sync,
) -> Tensor {
    let shape = Dims::from_slice(a.shape());
    run(op, shape, &[(a, A::DTYPE)], R::DTYPE, to, kernel!(row1(a: A) -> R, f))
}

/// `f` of every pair of elements of two broadcast tensors, otherwise as [`map`].
#[track_caller]
pub fn map2<A: Element, B: Element, R: Element>(
    op: &'static str,
    a: &Tensor,
    b: &Tensor,
    f: impl Fn(A, B) -> R + Sync,
) -> Result<Tensor> {
    let shape = broadcast(op, a.shape(), b.shape())?;
    let operands = [(a, A::DTYPE), (b, B::DTYPE)];
    Ok(run(op, shape, &operands, R::DTYPE, narrowed(a, R::DTYPE), kernel!(row2(a: A, b: B) -> R, f)))
}

/// `f` of every triple of elements of three broadcast tensors, otherwise as [`map`].
#[track_caller]
pub fn map3<A: Element, B: Element, C: Element, R: Element>(
    op: &'static str,
    a: &Tensor,
    b: &Tensor,
    c: &Tensor,
    f: impl Fn(A, B, C) -> R + Sync,
) -> Result<Tensor> {
    let shape = broadcast(op, &broadcast(op, a.shape(), b.shape())?, c.shape())?;
    let operands = [(a, A::DTYPE), (b, B::DTYPE), (c, C::DTYPE)];
    Ok(run(op, shape, &operands, R::DTYPE, narrowed(a, R::DTYPE), kernel!(row3(a: A, b: B, c: C) -> R, f)))
}

/// `a` where `condition` (bool) is true, else `b`, which has the same dtype; all three broadcast.
#[track_caller]
pub fn select(op: &'static str, condition: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    fn pick<T: Copy>([a, b, condition]: [*const u8; 3], out: *mut u8, n: usize) {
        let (a, b) = unsafe { (slice::<T>(a, n), slice::<T>(b, n)) };
        let (condition, out) = unsafe { (slice::<bool>(condition, n), slice_mut::<T>(out, n)) };
        row3(a, b, condition, out, &|a, b, condition| if condition { a } else { b })
    }
    let shape = broadcast(op, &broadcast(op, condition.shape(), a.shape())?, b.shape())?;
    let dtype = a.dtype();
    let kernel: Kernel = match dtype.size() {
        1 => &pick::<u8>,
        2 => &pick::<u16>,
        4 => &pick::<u32>,
        _ => &pick::<u64>,
    };
    Ok(run(op, shape, &[(a, dtype), (b, dtype), (condition, DType::Bool)], dtype, dtype, kernel))
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
    let (from, to) = (a.cpu_ptr::<T>(), target.ptr());
    // Nothing is computed, so types of one size share the code.
    unsafe {
        match size_of::<T>() {
            1 => copy::<u8>(&plan, Shared(from.cast()), SharedMut::of(to.cast())),
            2 => copy::<u16>(&plan, Shared(from.cast()), SharedMut::of(to.cast())),
            4 => copy::<u32>(&plan, Shared(from.cast()), SharedMut::of(to.cast())),
            _ => copy::<u64>(&plan, Shared(from.cast()), SharedMut::of(to.cast())),
        }
    }
}

/// # Safety
/// As [`copy_into`].
unsafe fn copy<T: Copy + Send + Sync>(plan: &Loop<2>, source: Shared<T>, target: SharedMut<T>) {
    if let Some(dense) = plan.transposed() {
        return unsafe { copy_transposed(plan, dense, source, target) };
    }
    let steps = plan.inner();
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
unsafe fn copy_transposed<T: Copy + Send + Sync>(
    plan: &Loop<2>,
    dense: usize,
    source: Shared<T>,
    target: SharedMut<T>,
) {
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
    let Some(values) = sum.cpu_slice_mut::<T>() else { return false };
    let plan = Loop::<2>::new(&shape, &order, [x.strides(), &strides]);
    let [step, _] = plan.inner();
    let (target, source) = (SharedMut::new(values), Shared(x.cpu_ptr::<T>()));
    plan.par_rows(|[from, to], n| unsafe {
        let row = target.slice(to as usize..to as usize + n);
        let width = if step == 1 { n } else { BLOCK };
        let mut stage: Stage = [MaybeUninit::uninit(); BLOCK];
        for (i, sum) in row.chunks_mut(width).enumerate() {
            let mut x = source.ptr().offset(from + (i * width) as isize * step).cast();
            if step != 1 {
                load(T::DTYPE, T::DTYPE)(x, step, sum.len(), stage.as_mut_ptr().cast());
                x = stage.as_ptr().cast();
            }
            let (x, f) = (slice::<T>(x, sum.len()), &f);
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
