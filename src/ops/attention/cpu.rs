//! One task is a block of queries of one head, with a workspace for its logits.

use super::{Dims, Plan, Saved, Strides, like};
use crate::{
    DType, Result, Tensor,
    cpu::{
        gemm::{GemmElement, Into, Mat, gemm},
        parallel::{Shared, SharedMut, for_ranges},
        pool::CpuVec,
        rows,
        simd::simd_of,
    },
    dtype::Real,
    shape::{contiguous_strides, count},
};
use std::ops::Range;

/// f32 and f64.
pub trait Number: Real + GemmElement {}
impl Number for f32 {}
impl Number for f64 {}

/// Elements of a workspace: half of a second-level cache.
const WORKSPACE: usize = 1 << 17;
/// Heads from here on are work enough for all threads; fewer are split into blocks of queries.
const MANY: usize = 8;
/// Multiply-adds that are worth a task.
const TASK: usize = 1 << 21;

impl Plan {
    /// Queries in a block.
    fn block(&self) -> usize {
        let most = (WORKSPACE / self.keys.max(1)).clamp(16, 256);
        let share = self.queries.div_ceil(MANY.div_ceil(self.heads.max(1)));
        most.min(share.max(16)).min(self.queries.max(1))
    }

    /// Keys that the queries below `end` may see.
    fn visible(&self, end: usize) -> usize {
        if self.causal { self.keys.min(end) } else { self.keys }
    }

    /// Tasks that are run together.
    fn grain(&self, queries: usize) -> usize {
        (TASK / (queries * self.keys * (self.d + self.dv)).max(1)).max(1)
    }
}

/// Where the matrix of each head starts, counted from the tensor's first element.
fn starts(shape: &[usize], strides: &[isize]) -> Vec<isize> {
    let lead = shape.len() - 2;
    let mut starts = vec![0];
    for (&n, &step) in shape[..lead].iter().zip(strides) {
        starts = starts.iter().flat_map(|&s| (0..n as isize).map(move |i| s + i * step)).collect();
    }
    starts
}

/// A matrix of adjacent columns for each head.
struct Heads<P> {
    data: P,
    starts: Vec<isize>,
    row: isize,
}

impl<T: Number> Heads<Shared<T>> {
    fn of(t: &Tensor) -> Self {
        let row = t.strides()[t.rank() - 2];
        Heads { data: Shared(t.cpu_ptr::<T>()), starts: starts(t.shape(), t.strides()), row }
    }

    /// Rows of one head from `row` on.
    fn mat(&self, head: usize, row: usize) -> Mat<*const T> {
        let at = self.starts[head] + row as isize * self.row;
        Mat::new(unsafe { self.data.ptr().offset(at) }, self.row, 1)
    }
}

impl<T: Number> Heads<SharedMut<T>> {
    fn of(data: &mut [T], shape: &[usize], strides: &[isize]) -> Self {
        Heads { data: SharedMut::new(data), starts: starts(shape, strides), row: strides[shape.len() - 2] }
    }

    fn mat(&self, head: usize, row: usize) -> Mat<*mut T> {
        let at = self.starts[head] + row as isize * self.row;
        Mat::new(unsafe { self.data.ptr().offset(at) }, self.row, 1)
    }
}

/// Row `i` of a matrix of `n` adjacent columns.
#[inline(always)]
unsafe fn row<'a, T>(m: Mat<*const T>, i: usize, n: usize) -> &'a [T] {
    unsafe { std::slice::from_raw_parts(m.ptr.offset(i as isize * m.row), n) }
}

#[inline(always)]
unsafe fn row_mut<'a, T>(m: Mat<*mut T>, i: usize, n: usize) -> &'a mut [T] {
    unsafe { std::slice::from_raw_parts_mut(m.ptr.offset(i as isize * m.row), n) }
}

/// Copies the transpose of a matrix of `n` rows and `width` adjacent columns: the product with it runs up to
/// twice as fast.
fn transpose<T: Number>(m: Mat<*const T>, n: usize, width: usize, out: &mut [T]) -> Mat<*const T> {
    const TILE: usize = 16;
    for first in (0..n).step_by(TILE) {
        let rows = TILE.min(n - first);
        let source = unsafe { m.ptr.offset(first as isize * m.row) };
        for c in 0..width {
            let out = &mut out[c * n + first..c * n + first + rows];
            for (r, x) in out.iter_mut().enumerate() {
                *x = unsafe { *source.offset(r as isize * m.row + c as isize) };
            }
        }
    }
    Mat::new(out.as_ptr(), n as isize, 1)
}

/// What is done to a row of logits before the softmax.
enum Mask<T> {
    None,
    /// false becomes -infinity.
    Bool(Shared<bool>, Vec<isize>, [isize; 2]),
    Added(Shared<T>, Vec<isize>, [isize; 2]),
}

impl<T: Number> Mask<T> {
    fn of(plan: &Plan, mask: Option<&Tensor>) -> Mask<T> {
        let Some(mask) = mask else { return Mask::None };
        let shape = plan.shape(plan.queries, plan.keys);
        let strides = crate::shape::broadcast_strides(mask.shape(), mask.strides(), &shape);
        let (starts, steps) =
            (starts(&shape, &strides), [strides[shape.len() - 2], strides[shape.len() - 1]]);
        match mask.dtype() {
            DType::Bool => Mask::Bool(Shared(mask.cpu_ptr::<bool>()), starts, steps),
            _ => Mask::Added(Shared(mask.cpu_ptr::<T>()), starts, steps),
        }
    }

    #[inline(always)]
    fn apply(&self, head: usize, query: usize, logits: &mut [T]) {
        let at = |starts: &[isize], steps: &[isize; 2]| starts[head] + query as isize * steps[0];
        match self {
            Mask::None => {}
            Mask::Bool(data, starts, steps) => {
                let data = unsafe { data.ptr().offset(at(starts, steps)) };
                for (j, x) in logits.iter_mut().enumerate() {
                    let sees = unsafe { *data.offset(j as isize * steps[1]) };
                    *x = if sees { *x } else { T::NEG_INF };
                }
            }
            Mask::Added(data, starts, steps) => {
                let data = unsafe { data.ptr().offset(at(starts, steps)) };
                for (j, x) in logits.iter_mut().enumerate() {
                    *x += unsafe { *data.offset(j as isize * steps[1]) };
                }
            }
        }
    }
}

/// The output of shape `shape` at these strides, and the log-sum-exp.
pub fn forward<T: Number>(
    plan: &Plan,
    [q, k, v]: &[Tensor; 3],
    mask: Option<&Tensor>,
    shape: Dims,
    strides: Strides,
) -> Result<(Tensor, Tensor)> {
    let mut out = CpuVec::<T>::new(count(&shape));
    let mut lse = CpuVec::<T>::new(plan.heads * plan.queries);
    let task = Forward {
        plan,
        q: Heads::<Shared<T>>::of(q),
        k: Heads::<Shared<T>>::of(k),
        v: Heads::<Shared<T>>::of(v),
        mask: Mask::of(plan, mask),
        out: Heads::<SharedMut<T>>::of(&mut out, &shape, &strides),
        lse: SharedMut::new(&mut lse),
    };
    let block = plan.block();
    let blocks = plan.queries.div_ceil(block);
    for_ranges(plan.heads * blocks, plan.grain(block), |tasks| {
        let mut logits = CpuVec::<T>::new(block * plan.keys);
        let mut keys = CpuVec::<T>::new(plan.d * plan.keys);
        let mut done = None;
        for i in tasks {
            let (head, first) = (i / blocks, i % blocks * block);
            if done.replace(head) != Some(head) {
                transpose(task.k.mat(head, 0), plan.keys, plan.d, &mut keys);
            }
            task.run(head, first..plan.queries.min(first + block), &keys, &mut logits);
        }
    });
    let rows: Dims = plan.lead.iter().copied().chain([plan.queries]).collect();
    let out = Tensor::from_cpu_strided(out, shape, strides, "attention");
    Ok((out, Tensor::from_cpu(lse, rows, "attention")))
}

struct Forward<'a, T> {
    plan: &'a Plan,
    q: Heads<Shared<T>>,
    k: Heads<Shared<T>>,
    v: Heads<Shared<T>>,
    mask: Mask<T>,
    out: Heads<SharedMut<T>>,
    lse: SharedMut<T>,
}

impl<T: Number> Forward<'_, T> {
    /// `k_t`: the head's keys, transposed.
    fn run(&self, head: usize, queries: Range<usize>, k_t: &[T], logits: &mut [T]) {
        let plan = self.plan;
        let k_t = Mat::new(k_t.as_ptr(), plan.keys as isize, 1);
        let (n, keys) = (queries.len(), plan.visible(queries.end));
        let p = Mat::new(logits.as_mut_ptr(), keys as isize, 1);
        let p_read = Mat::new(logits.as_ptr(), keys as isize, 1);
        let (q, v) = (self.q.mat(head, queries.start), self.v.mat(head, 0));
        let out = self.out.mat(head, queries.start);
        let lse =
            unsafe { self.lse.slice(head * plan.queries + queries.start..head * plan.queries + queries.end) };
        unsafe { gemm([n, keys, plan.d], p, q, k_t, plan.scale, Into::Set, false) };
        // The sums are divided out of the output, which is narrower than the weights; `lse` holds them till then.
        let mut maxima = [T::ZERO; 256];
        for (i, sum) in lse.iter_mut().enumerate() {
            let logits = unsafe { row_mut(p, i, keys) };
            simd_of::<T, _>(
                #[inline(always)]
                || (maxima[i], *sum) = self.weights(head, queries.start + i, logits),
            );
        }
        unsafe { gemm([n, plan.dv, keys], out, p_read, v, 1.0, Into::Set, false) };
        for (i, lse) in lse.iter_mut().enumerate() {
            let out = unsafe { row_mut(out, i, plan.dv) };
            if keys == 0 || maxima[i] == T::NEG_INF {
                out.fill(T::ZERO);
                *lse = T::NEG_INF;
            } else {
                let scale = T::ONE / *lse;
                simd_of::<T, _>(
                    #[inline(always)]
                    || out.iter_mut().for_each(|x| *x *= scale),
                );
                *lse = maxima[i] + lse.ln();
            }
        }
    }

    /// Turns logits into exp(logit - max); returns the maximum and the sum.
    #[inline(always)]
    fn weights(&self, head: usize, query: usize, logits: &mut [T]) -> (T, T) {
        self.mask.apply(head, query, logits);
        let visible = logits.len().min(self.plan.visible(query + 1));
        let (logits, hidden) = logits.split_at_mut(visible);
        hidden.fill(T::ZERO);
        let max = rows::max(logits);
        if max == T::NEG_INF {
            logits.fill(T::ZERO);
            return (max, T::ZERO);
        }
        (max, rows::exp_in_place(logits, max))
    }
}

/// Gradients of queries, keys, values and mask, those that are needed.
pub fn backward<T: Number>(saved: &Saved, grad: &Tensor, needs: [bool; 4]) -> [Option<Tensor>; 4] {
    let plan = &saved.plan;
    let mut buffers = saved.views.each_ref().map(|t| {
        let shape = Dims::from_slice(t.shape());
        let strides = like(t, &shape);
        (CpuVec::<T>::new(count(&shape)), shape, strides)
    });
    let logits = plan.shape(plan.queries, plan.keys);
    let mut mask = CpuVec::<T>::new(if needs[3] { count(&logits) } else { 0 });
    let mut targets = buffers
        .iter_mut()
        .enumerate()
        .map(|(i, (data, shape, strides))| needs[i].then(|| Heads::<SharedMut<T>>::of(data, shape, strides)));
    let targets = [(); 3].map(|()| targets.next().flatten());
    let mask_target =
        needs[3].then(|| Heads::<SharedMut<T>>::of(&mut mask, &logits, &contiguous_strides(&logits)));
    run_backward(saved, grad, &targets, mask_target);
    let mut buffers = buffers.into_iter().zip(needs).map(|((data, shape, strides), needed)| {
        needed.then(|| Tensor::from_cpu_strided(data, shape, strides, "attention"))
    });
    let [q, k, v] = [(); 3].map(|()| buffers.next().flatten());
    [q, k, v, needs[3].then(|| Tensor::from_cpu(mask, logits, "attention"))]
}

/// The gradient `[B, S, 3, H, D]`.
pub fn backward_packed<T: Number>(saved: &Saved, grad: &Tensor) -> Tensor {
    let plan = &saved.plan;
    let (b, h, s, d) = (plan.lead[0], plan.lead[1], plan.queries, plan.d);
    let mut out = CpuVec::<T>::new(b * s * 3 * h * d);
    let [sb, ss, sh] = [s * 3 * h * d, 3 * h * d, d].map(|n| n as isize);
    let targets = [0, 1, 2].map(|part| {
        let mut heads = Heads::<SharedMut<T>>::of(&mut out, &[b, h, s, d], &[sb, sh, ss, 1]);
        heads.starts.iter_mut().for_each(|at| *at += (part * h * d) as isize);
        Some(heads)
    });
    run_backward(saved, grad, &targets, None);
    Tensor::from_cpu(out, [b, s, 3, h, d], "attention")
}

type Target<T> = Option<Heads<SharedMut<T>>>;

/// A task is all queries of a head, or where heads are few a part of them, which then sums its own share of the
/// gradients of keys and values; the shares are added in order.
fn run_backward<T: Number>(saved: &Saved, grad: &Tensor, targets: &[Target<T>; 3], mask: Target<T>) {
    let plan = &saved.plan;
    let block = plan.block();
    let blocks = plan.queries.div_ceil(block);
    let parts = MANY.div_ceil(plan.heads.max(1)).clamp(1, blocks.max(1));
    let [q, k, v] = &saved.views;
    let sizes = [0, plan.d, plan.dv];
    let share = |i: usize| plan.keys * sizes[i];
    let mut shares = [1, 2].map(|i| {
        let needed = parts > 1 && targets[i].is_some();
        CpuVec::<T>::new(if needed { plan.heads * parts * share(i) } else { 0 })
    });
    let own = [0, 1].map(|i| {
        let width = sizes[i + 1];
        let shape = [plan.heads * parts, plan.keys, width];
        (parts > 1 && targets[i + 1].is_some())
            .then(|| Heads::<SharedMut<T>>::of(&mut shares[i], &shape, &contiguous_strides(&shape)))
    });
    let task = BackwardTask {
        plan,
        q: Heads::<Shared<T>>::of(q),
        k: Heads::<Shared<T>>::of(k),
        v: Heads::<Shared<T>>::of(v),
        out: Heads::<Shared<T>>::of(&saved.out),
        grad: Heads::<Shared<T>>::of(grad),
        lse: saved.lse.cpu_slice::<T>(),
        mask: Mask::of(plan, saved.mask.as_ref()),
        dq: &targets[0],
        dk: if parts > 1 { &own[0] } else { &targets[1] },
        dv: if parts > 1 { &own[1] } else { &targets[2] },
        dmask: &mask,
    };
    for_ranges(plan.heads * parts, plan.grain(plan.queries.div_ceil(parts)), |tasks| {
        let mut work = Work {
            p: CpuVec::new(block * plan.keys),
            ds: CpuVec::new(block * plan.keys),
            k_t: CpuVec::new(plan.d * plan.keys),
            v_t: CpuVec::new(plan.dv * plan.keys),
        };
        for i in tasks {
            let (head, part) = (i / parts, i % parts);
            let blocks = blocks * part / parts..blocks * (part + 1) / parts;
            task.run(head, i, blocks.map(|b| b * block..plan.queries.min((b + 1) * block)), &mut work);
        }
    });
    if parts > 1 {
        for i in [0, 1] {
            add_shares(plan, parts, sizes[i + 1], &shares[i], &targets[i + 1]);
        }
    }
}

/// Adds the shares of all parts of each head.
fn add_shares<T: Number>(plan: &Plan, parts: usize, width: usize, shares: &[T], target: &Target<T>) {
    let Some(target) = target else { return };
    let step = plan.keys * width;
    for_ranges(plan.heads, 1, |heads| {
        for head in heads {
            for key in 0..plan.keys {
                let out = unsafe { row_mut(target.mat(head, key), 0, width) };
                out.fill(T::ZERO);
                for part in 0..parts {
                    let at = (head * parts + part) * step + key * width;
                    let share = &shares[at..at + width];
                    simd_of::<T, _>(
                        #[inline(always)]
                        || out.iter_mut().zip(share).for_each(|(o, s)| *o += *s),
                    );
                }
            }
        }
    });
}

/// Memory of a task: weights, their gradient, and a head's keys and values transposed.
struct Work<T> {
    p: CpuVec<T>,
    ds: CpuVec<T>,
    k_t: CpuVec<T>,
    v_t: CpuVec<T>,
}

struct BackwardTask<'a, T: Number> {
    plan: &'a Plan,
    q: Heads<Shared<T>>,
    k: Heads<Shared<T>>,
    v: Heads<Shared<T>>,
    out: Heads<Shared<T>>,
    grad: Heads<Shared<T>>,
    lse: &'a [T],
    mask: Mask<T>,
    dq: &'a Target<T>,
    dk: &'a Target<T>,
    dv: &'a Target<T>,
    dmask: &'a Target<T>,
}

impl<T: Number> BackwardTask<'_, T> {
    /// All blocks of queries of one task, whose gradients of keys and values go to matrix `share`.
    fn run(&self, head: usize, share: usize, blocks: impl Iterator<Item = Range<usize>>, work: &mut Work<T>) {
        let plan = self.plan;
        let (k, v) = (self.k.mat(head, 0), self.v.mat(head, 0));
        let k_t = transpose(k, plan.keys, plan.d, &mut work.k_t);
        let v_t = transpose(v, plan.keys, plan.dv, &mut work.v_t);
        for (target, width) in [(self.dk, plan.d), (self.dv, plan.dv)] {
            let Some(target) = target else { continue };
            (0..plan.keys).for_each(|i| unsafe { row_mut(target.mat(share, i), 0, width).fill(T::ZERO) });
        }
        for queries in blocks {
            let (n, keys) = (queries.len(), plan.visible(queries.end));
            let (q, grad) = (self.q.mat(head, queries.start), self.grad.mat(head, queries.start));
            let p = Mat::new(work.p.as_mut_ptr(), keys as isize, 1);
            let ds = Mat::new(work.ds.as_mut_ptr(), keys as isize, 1);
            unsafe {
                gemm([n, keys, plan.d], p, q, k_t, plan.scale, Into::Set, false);
                gemm([n, keys, plan.dv], ds, grad, v_t, 1.0, Into::Set, false);
            }
            for i in 0..n {
                let (p, ds) = unsafe { (row_mut(p, i, keys), row_mut(ds, i, keys)) };
                simd_of::<T, _>(
                    #[inline(always)]
                    || self.logits(head, queries.start + i, p, ds),
                );
            }
            let [p, ds] = [p, ds].map(|m| Mat::new(m.ptr.cast_const(), m.row, 1));
            unsafe {
                if let Some(dv) = self.dv {
                    gemm([keys, plan.dv, n], dv.mat(share, 0), p.t(), grad, 1.0, Into::Add, false);
                }
                if let Some(dq) = self.dq {
                    let dq = dq.mat(head, queries.start);
                    gemm([n, plan.d, keys], dq, ds, k, plan.scale, Into::Set, false);
                }
                if let Some(dk) = self.dk {
                    gemm([keys, plan.d, n], dk.mat(share, 0), ds.t(), q, plan.scale, Into::Add, false);
                }
            }
        }
    }

    /// Logits become weights P, and `ds` = dP becomes dS = P * (dP - sum(dO * O)).
    #[inline(always)]
    fn logits(&self, head: usize, query: usize, p: &mut [T], ds: &mut [T]) {
        let (dv, keys) = (self.plan.dv, p.len());
        let ds = &mut ds[..keys];
        self.mask.apply(head, query, p);
        let (out, grad) =
            unsafe { (row(self.out.mat(head, query), 0, dv), row(self.grad.mat(head, query), 0, dv)) };
        let delta = rows::sum_of(
            dv,
            #[inline(always)]
            |i| unsafe { *out.get_unchecked(i) * *grad.get_unchecked(i) },
        );
        let lse = self.lse[head * self.plan.queries + query];
        let visible = if lse == T::NEG_INF { 0 } else { keys.min(self.plan.visible(query + 1)) };
        for j in 0..visible {
            let weight = (p[j] - lse).exp();
            p[j] = weight;
            ds[j] = weight * (ds[j] - delta);
        }
        p[visible..].fill(T::ZERO);
        ds[visible..].fill(T::ZERO);
        if let Some(target) = self.dmask {
            let target = unsafe { row_mut(target.mat(head, query), 0, self.plan.keys) };
            target[..keys].copy_from_slice(ds);
            target[keys..].fill(T::ZERO);
        }
    }
}
