//! The forward: softmax of each block of logits, times the values.

use super::{super::OP, Field, Number, Place, Plan, Task, Work, mat, mat_mut, stored, transposed};
use crate::{
    Tensor,
    cpu::{
        gemm::{Into, gemm},
        parallel::{SharedMut, for_ranges},
        pool::CpuVec,
        rows,
        simd::simd,
    },
};
use smallvec::smallvec;

/// The output `[B, heads, H, W, D]`, stored as `[B, H, W, heads, D]`, and the log-sum-exp.
pub fn forward<T: Number>(
    plan: &Plan,
    views: &[Tensor; 3],
    tables: Option<&[Tensor; 2]>,
    bias: Option<&Tensor>,
) -> (Tensor, Tensor) {
    let task = Task::<T>::new(plan, views, tables, bias);
    let ([h, w], d) = (plan.q.image, plan.d);
    let mut out = CpuVec::<T>::new(plan.batch * h * w * plan.heads * d);
    let mut lse = CpuVec::<T>::new(plan.batch * plan.heads * h * w);
    let strides = stored(plan, &plan.q, 1);
    let (to, to_lse) = (Field { data: SharedMut::new(&mut out), strides }, SharedMut::new(&mut lse));
    for_ranges(plan.jobs(), plan.grain(), |jobs| {
        let mut work = task.work();
        let mut rows_out = CpuVec::<T>::new(plan.block() * d);
        for job in jobs {
            let place = Place::of(plan, job);
            task.collect(&task.k, 1, &place, &mut work.k);
            task.collect(&task.v, 2, &place, &mut work.v);
            transposed(&work.k, d, &mut work.k_t);
            for (first, n) in task.blocks(&place) {
                task.queries(&task.q, &place, first, &mut work.q[..n * d]);
                task.logits(&place, first, n, &mut work);
                forward_block(&task, &place, first, n, &mut work, &mut rows_out, (&to, &to_lse));
            }
        }
    });
    let shape = smallvec![plan.batch, plan.heads, h, w, d];
    let steps = strides.into_iter().chain([1]).collect();
    let out = Tensor::from_cpu_strided(out, shape, steps, OP);
    (out, Tensor::from_cpu(lse, [plan.batch, plan.heads, h, w], OP))
}

/// Softmax of the block's logits times the values, to the output.
fn forward_block<T: Number>(
    task: &Task<T>,
    place: &Place,
    first: usize,
    n: usize,
    work: &mut Work<T>,
    rows_out: &mut [T],
    (to, to_lse): (&Field<SharedMut<T>>, &SharedMut<T>),
) {
    let (plan, keys, d) = (task.plan, task.plan.keys(), task.plan.d);
    let columns = place.inside(&plan.q)[1];
    let mut sums = [T::ZERO; 256];
    for i in 0..n {
        let logits = &mut work.p[i * keys..][..keys];
        let (max, sum) = simd(
            #[inline(always)]
            || {
                let max = rows::max(logits);
                (max, rows::exp_in_place(logits, max))
            },
        );
        sums[i] = T::ONE / sum;
        let at = task.row_index(place, first + i);
        unsafe { *to_lse.ptr().add(at) = max + sum.ln() };
    }
    unsafe {
        gemm([n, d, keys], mat_mut(rows_out, d), mat(&work.p, keys), mat(&work.v, d), 1.0, Into::Set, false)
    };
    for (i, row) in rows_out.chunks_exact(d).take(n).enumerate() {
        let at = to.at(place, place.token(&plan.q, (first + i) / columns, (first + i) % columns)) as usize;
        let out = unsafe { to.data.slice(at..at + d) };
        out.iter_mut().zip(row).for_each(|(o, &x)| *o = x * sums[i]);
    }
}
