//! The backward: weights again from the logits; sums that many windows share are kept apart for each of a
//! fixed number of parts, which are added in order.

use super::{
    super::{OP, Saved, Side, Slopes},
    Field, Number, Place, Task, Work, mat, mat_mut, stored, transposed,
};
use crate::{
    Tensor,
    cpu::{
        gemm::{Into, gemm},
        parallel::{Shared, SharedMut, for_ranges},
        pool::CpuVec,
        rows,
        simd::simd,
    },
};
use std::ops::Range;

/// Partial sums of the tables' and the bias' gradients: as many at most.
const PARTS: usize = 64;

/// The gradients; `packed`: one tensor `[B, H, W, 3, heads, D]`, else three `[B, H, W, heads, D]`.
pub fn backward<T: Number>(saved: &Saved, grad: &Tensor, packed: bool) -> Slopes {
    let plan = &saved.plan;
    let task = Task::<T>::new(plan, &saved.views, saved.tables.as_ref(), saved.bias.as_ref());
    let sides = [plan.q, plan.k, plan.k];
    let size = |s: &Side| plan.batch * s.image[0] * s.image[1] * plan.heads * plan.d;
    let mut buffers: Vec<CpuVec<T>> = match packed {
        true => vec![CpuVec::new(3 * size(&plan.q))],
        false => sides.iter().map(|s| CpuVec::new(size(s))).collect(),
    };
    let fields = [0, 1, 2].map(|i| {
        let strides = stored(plan, &sides[i], if packed { 3 } else { 1 });
        let data = SharedMut::new(&mut buffers[if packed { 0 } else { i }]);
        let data = unsafe { data.from(if packed { (i * plan.heads * plan.d) as isize } else { 0 }) };
        Field { data, strides }
    });
    let lengths = task.tables.map_or([0, 0], |t| t.map(<[T]>::len));
    let bias = if saved.bias.is_some() { 3 * plan.heads * plan.d } else { 0 };
    let each = plan.jobs().div_ceil(PARTS).max(plan.grain());
    let parts = plan.jobs().div_ceil(each);
    let [mut sums_h, mut sums_w] = lengths.map(|n| CpuVec::<T>::zeros(parts * n));
    let mut sums_b = CpuVec::<T>::zeros(parts * bias);
    let run = BackwardTask {
        task,
        out: Field::<Shared<T>>::of(&saved.out),
        grad: Field::<Shared<T>>::of(grad),
        fields,
        tables: [SharedMut::new(&mut sums_h), SharedMut::new(&mut sums_w)],
        bias: SharedMut::new(&mut sums_b),
        lengths,
        bias_len: bias,
    };
    for_ranges(plan.jobs(), each, |jobs| run.jobs(jobs.start / each, jobs));
    let fold = |all: &[T], n: usize| {
        let mut sum = CpuVec::<T>::zeros(n);
        all.chunks_exact(n.max(1)).for_each(|part| sum.iter_mut().zip(part).for_each(|(s, &x)| *s += x));
        sum
    };
    let table = |all: &[T], n: usize| Tensor::from_cpu(fold(all, n), [n / plan.d, plan.d], OP);
    let qkv = buffers.into_iter().zip(&sides).map(|(data, s)| {
        let [h, w] = s.image;
        match packed {
            true => Tensor::from_cpu(data, [plan.batch, h, w, 3, plan.heads, plan.d], OP),
            false => Tensor::from_cpu(data, [plan.batch, h, w, plan.heads, plan.d], OP),
        }
    });
    Slopes {
        qkv: qkv.collect(),
        tables: saved.tables.is_some().then(|| [table(&sums_h, lengths[0]), table(&sums_w, lengths[1])]),
        bias: (bias > 0).then(|| Tensor::from_cpu(fold(&sums_b, bias), [3, plan.heads, plan.d], OP)),
    }
}

struct BackwardTask<'a, T: Number> {
    task: Task<'a, T>,
    out: Field<Shared<T>>,
    grad: Field<Shared<T>>,
    /// Gradients of queries, keys, values.
    fields: [Field<SharedMut<T>>; 3],
    tables: [SharedMut<T>; 2],
    bias: SharedMut<T>,
    lengths: [usize; 2],
    bias_len: usize,
}

/// More memory of a backward task.
struct Slope<T: Number> {
    v_t: CpuVec<T>,
    out: CpuVec<T>,
    grad: CpuVec<T>,
    ds: CpuVec<T>,
    dq: CpuVec<T>,
    dk: CpuVec<T>,
    dv: CpuVec<T>,
}

impl<T: Number> BackwardTask<'_, T> {
    /// Jobs of one part, in order.
    fn jobs(&self, part: usize, jobs: Range<usize>) {
        let (task, plan) = (&self.task, self.task.plan);
        let (d, keys, block) = (plan.d, plan.keys(), plan.block());
        let mut work = task.work();
        let mut slope = Slope {
            v_t: CpuVec::new(keys * d),
            out: CpuVec::new(block * d),
            grad: CpuVec::new(block * d),
            ds: CpuVec::new(block * keys),
            dq: CpuVec::new(block * d),
            dk: CpuVec::new(keys * d),
            dv: CpuVec::new(keys * d),
        };
        for job in jobs {
            let place = Place::of(plan, job);
            task.collect(&task.k, 1, &place, &mut work.k);
            task.collect(&task.v, 2, &place, &mut work.v);
            transposed(&work.k, d, &mut work.k_t);
            transposed(&work.v, d, &mut slope.v_t);
            slope.dk.fill(T::ZERO);
            slope.dv.fill(T::ZERO);
            for (first, n) in task.blocks(&place) {
                task.queries(&task.q, &place, first, &mut work.q[..n * d]);
                task.queries(&self.out, &place, first, &mut slope.out[..n * d]);
                task.queries(&self.grad, &place, first, &mut slope.grad[..n * d]);
                task.logits(&place, first, n, &mut work);
                self.block(part, &place, first, n, &mut work, &mut slope);
            }
            self.give(1, part, &place, &slope.dk);
            self.give(2, part, &place, &slope.dv);
        }
    }

    fn block(
        &self,
        part: usize,
        place: &Place,
        first: usize,
        n: usize,
        work: &mut Work<T>,
        slope: &mut Slope<T>,
    ) {
        let (task, plan) = (&self.task, self.task.plan);
        let (d, keys, scale) = (plan.d, plan.keys(), plan.scale);
        let (q, grad) = (mat(&work.q, d), mat(&slope.grad, d));
        unsafe {
            gemm(
                [n, keys, d],
                mat_mut(&mut slope.ds, keys),
                grad,
                mat(&slope.v_t, keys),
                1.0,
                Into::Set,
                false,
            )
        };
        for i in 0..n {
            let (p, ds) = (&mut work.p[i * keys..][..keys], &mut slope.ds[i * keys..][..keys]);
            let (out, grad) = (&slope.out[i * d..][..d], &slope.grad[i * d..][..d]);
            simd(
                #[inline(always)]
                || {
                    let delta =
                        rows::sum_of(d, |c| unsafe { *out.get_unchecked(c) * *grad.get_unchecked(c) });
                    // Not from the log-sum-exp: where logits are large it is rounded too coarsely.
                    let max = rows::max(p);
                    let norm = T::ONE / rows::exp_in_place(p, max);
                    for (p, ds) in p.iter_mut().zip(ds) {
                        *p *= norm;
                        *ds = *p * (*ds - delta);
                    }
                },
            );
        }
        let (p, ds) = (mat(&work.p, keys), mat(&slope.ds, keys));
        unsafe {
            gemm([keys, d, n], mat_mut(&mut slope.dv, d), p.t(), grad, 1.0, Into::Add, false);
            gemm([keys, d, n], mat_mut(&mut slope.dk, d), ds.t(), q, scale, Into::Add, false);
            gemm([n, d, keys], mat_mut(&mut slope.dq, d), ds, mat(&work.k, d), scale, Into::Set, false);
        }
        if let Some(tables) = task.tables {
            self.table_terms(place, first, n, work, slope);
            for (axis, table) in tables.iter().enumerate() {
                let (rows, len) = (table.len() / d, self.lengths[axis]);
                let terms = mat(&work.terms[axis], rows);
                let sums = unsafe { self.tables[axis].slice(part * len..(part + 1) * len) };
                unsafe {
                    gemm(
                        [n, d, rows],
                        mat_mut(&mut slope.dq, d),
                        terms,
                        mat(table, d),
                        1.0,
                        Into::Add,
                        false,
                    );
                    gemm([rows, d, n], mat_mut(sums, d), terms.t(), mat(&work.q, d), 1.0, Into::Add, false);
                }
            }
        }
        let columns = place.inside(&plan.q)[1];
        for (i, row) in slope.dq.chunks_exact(d).take(n).enumerate() {
            let at =
                self.fields[0].at(place, place.token(&plan.q, (first + i) / columns, (first + i) % columns));
            let to = unsafe { self.fields[0].data.from(at) };
            unsafe { to.slice(0..d) }.copy_from_slice(row);
        }
    }

    /// Sums of dS over window columns and rows, at the table rows that the logits took their terms from.
    fn table_terms(&self, place: &Place, first: usize, n: usize, work: &mut Work<T>, slope: &Slope<T>) {
        let plan = self.task.plan;
        let ([kh, kw], keys, columns) = (plan.k.window, plan.keys(), place.inside(&plan.q)[1]);
        let rows = self.lengths.map(|len| len / plan.d);
        for i in 0..n {
            let (y, x) = ((first + i) / columns, (first + i) % columns);
            let [th, tw] = &mut work.terms;
            let (th, tw) = (&mut th[i * rows[0]..][..rows[0]], &mut tw[i * rows[1]..][..rows[1]]);
            th.fill(T::ZERO);
            tw.fill(T::ZERO);
            work.column.fill(T::ZERO);
            let ds = slope.ds[i * keys..][..keys].chunks_exact(kw);
            for (ds, &row) in ds.zip(&plan.index[0][y * kh..][..kh]) {
                let column = &mut work.column;
                simd(
                    #[inline(always)]
                    || {
                        th[row] += rows::sum_of(kw, |u| unsafe { *ds.get_unchecked(u) });
                        column.iter_mut().zip(ds).for_each(|(c, &x)| *c += x);
                    },
                );
            }
            for (&c, &row) in work.column.iter().zip(&plan.index[1][x * kw..][..kw]) {
                tw[row] += c;
            }
        }
    }

    /// A window's gradient of keys or values: to the tokens inside, and those beyond to the bias.
    fn give(&self, which: usize, part: usize, place: &Place, slope: &[T]) {
        let (plan, field) = (self.task.plan, &self.fields[which]);
        let (side, d) = (&plan.k, plan.d);
        let [rows, columns] = place.inside(side);
        for (i, from) in slope.chunks_exact(d).enumerate() {
            let (y, x) = (i / side.window[1], i % side.window[1]);
            if y < rows && x < columns {
                let at = field.at(place, place.token(side, y, x));
                let to = unsafe { field.data.from(at) };
                unsafe { to.slice(0..d) }.copy_from_slice(from);
            } else if self.bias_len > 0 {
                let at = part * self.bias_len + (which * plan.heads + place.head) * d;
                let sums = unsafe { self.bias.slice(at..at + d) };
                sums.iter_mut().zip(from).for_each(|(s, &x)| *s += x);
            }
        }
    }
}
