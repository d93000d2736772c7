//! One pass over the memory of all parameters, on all cores.

use super::{Job, Slot};
use crate::{
    Tensor,
    cpu::{
        elementwise::make_mut,
        parallel::{GRAIN, SharedMut, for_ranges},
        simd::{LANES, simd_of},
    },
    dtype::{Element, Float, Real},
    for_float,
    nn::Param,
};
use std::ops::Range;

/// What an algorithm does to one element. `state` holds the element's `N` numbers.
pub(in crate::optim) trait Rule<const N: usize>: Copy + Send + Sync {
    /// The new value.
    fn step<R: Real>(self, p: R, g: R, state: &mut [R; N]) -> R;

    /// A first look, for algorithms that need norms: a number whose squares are summed over the parameter.
    #[inline(always)]
    fn look<R: Real>(self, _p: R, g: R, _state: &mut [R; N]) -> R {
        g
    }
}

/// Runs `f(tensor, range)` over the elements of many tensors of these lengths, on all cores. The ranges depend
/// on the lengths alone.
pub(in crate::optim) fn for_chunks(lengths: &[usize], f: impl Fn(usize, Range<usize>) + Sync) {
    let chunks = chunks(lengths);
    for_ranges(chunks.len(), 1, |i| i.for_each(|i| f(chunks[i].0, chunks[i].1.clone())));
}

fn chunks(lengths: &[usize]) -> Vec<(usize, Range<usize>)> {
    let pieces = |(i, &n): (usize, &usize)| (0..n).step_by(GRAIN).map(move |at| (i, at..n.min(at + GRAIN)));
    lengths.iter().enumerate().flat_map(pieces).collect()
}

/// Sums `f(tensor, range)` over each tensor, in an order that depends on the lengths alone.
pub(in crate::optim) fn sum_chunks<const K: usize>(
    lengths: &[usize],
    join: impl Fn(f64, f64) -> f64,
    f: impl Fn(usize, Range<usize>) -> [f64; K] + Sync,
) -> Vec<[f64; K]> {
    let chunks = chunks(lengths);
    let mut parts = vec![[0.0; K]; chunks.len()];
    let target = SharedMut::new(&mut parts);
    for_ranges(chunks.len(), 1, |range| {
        for i in range {
            let (tensor, range) = chunks[i].clone();
            unsafe { *target.ptr().add(i) = f(tensor, range) };
        }
    });
    let mut sums = vec![[0.0; K]; lengths.len()];
    for ((tensor, _), part) in chunks.iter().zip(parts) {
        for k in 0..K {
            sums[*tensor][k] = join(sums[*tensor][k], part[k]);
        }
    }
    sums
}

/// Addresses of one parameter's memory, and the code for its dtype.
struct Raw<const N: usize, U> {
    len: usize,
    p: *mut u8,
    g: *const u8,
    /// The f32 copy, or null.
    master: *mut u8,
    state: [*mut u8; N],
    step: fn(&Raw<N, U>, Range<usize>, U),
    look: fn(&Raw<N, U>, Range<usize>, U) -> [f64; 2],
}
unsafe impl<const N: usize, U> Send for Raw<N, U> {}
unsafe impl<const N: usize, U> Sync for Raw<N, U> {}

/// Gathers the addresses, lets `f` use them, and holds all locks meanwhile.
fn with_memory<const N: usize, U: Rule<N>, R>(jobs: &mut [Job], f: impl FnOnce(&[Raw<N, U>]) -> R) -> R {
    let params: Vec<Param> = jobs.iter().map(|job| job.slot.param.clone()).collect();
    let mut locks: Vec<_> = params.iter().map(Param::lock).collect();
    let mut raw = Vec::with_capacity(jobs.len());
    for (job, lock) in jobs.iter_mut().zip(&mut locks) {
        let grad = &job.grad;
        // Parameters are floats: `Params::param` sees to it, and others have no gradient.
        let entry = (|| for_float!(grad.dtype(), "optimizer", T => Ok(addresses::<T, N, U>(job.slot, lock.elements(), grad))))(
        );
        raw.extend(entry);
    }
    f(&raw)
}

fn addresses<T: Float, const N: usize, U: Rule<N>>(slot: &mut Slot, p: &mut [T], grad: &Tensor) -> Raw<N, U> {
    let mut state = slot.state.iter_mut().map(|t| make_mut::<T::Acc>(t).as_mut_ptr().cast::<u8>());
    Raw {
        len: p.len(),
        p: p.as_mut_ptr().cast(),
        g: grad.cpu_ptr::<T>().cast(),
        state: std::array::from_fn(|_| state.next().unwrap_or(std::ptr::null_mut())),
        master: state.next().unwrap_or(std::ptr::null_mut()),
        step: step_range::<T, N, U>,
        look: look_range::<T, N, U>,
    }
}

/// Moves every parameter, each by its own rule, in one pass over the memory.
pub(in crate::optim) fn step<const N: usize, U: Rule<N>>(jobs: &mut [Job], rules: &[U]) {
    with_memory(jobs, |raw| {
        let lengths: Vec<usize> = raw.iter().map(|r| r.len).collect();
        for_chunks(&lengths, |i, range| (raw[i].step)(&raw[i], range, rules[i]));
    });
}

/// The norms of every parameter and of what its rule's `look` gives.
pub(in crate::optim) fn norms<const N: usize, U: Rule<N>>(jobs: &mut [Job], rules: &[U]) -> Vec<[f64; 2]> {
    with_memory(jobs, |raw| {
        let lengths: Vec<usize> = raw.iter().map(|r| r.len).collect();
        let sums = sum_chunks(&lengths, |a, b| a + b, |i, range| (raw[i].look)(&raw[i], range, rules[i]));
        sums.into_iter().map(|sum| sum.map(f64::sqrt)).collect()
    })
}

fn step_range<T: Float, const N: usize, U: Rule<N>>(raw: &Raw<N, U>, range: Range<usize>, rule: U) {
    simd_of::<T, _>(
        #[inline(always)]
        || {
            let end = range.end - range.len() % LANES;
            for at in (range.start..end).step_by(LANES) {
                unsafe { step_lanes::<T, N, U, LANES>(raw, at, rule) };
            }
            for at in end..range.end {
                unsafe { step_lanes::<T, N, U, 1>(raw, at, rule) };
            }
        },
    );
}

/// Everything is loaded before anything is stored, so that the compiler needs no proof that the arrays differ.
#[inline(always)]
unsafe fn step_lanes<T: Float, const N: usize, U: Rule<N>, const L: usize>(
    raw: &Raw<N, U>,
    at: usize,
    rule: U,
) {
    unsafe {
        let (mut p, g, mut state) = load::<T, N, U, L>(raw, at);
        for i in 0..L {
            let mut s: [T::Acc; N] = std::array::from_fn(|k| state[k][i]);
            p[i] = rule.step(p[i], g[i], &mut s);
            (0..N).for_each(|k| state[k][i] = s[k]);
        }
        raw.p.cast::<T>().add(at).cast::<[T; L]>().write_unaligned(p.map(T::store));
        if !raw.master.is_null() {
            put(raw.master, at, p);
        }
        (0..N).for_each(|k| put(raw.state[k], at, state[k]));
    }
}

fn look_range<T: Float, const N: usize, U: Rule<N>>(
    raw: &Raw<N, U>,
    range: Range<usize>,
    rule: U,
) -> [f64; 2] {
    simd_of::<T, _>(
        #[inline(always)]
        || {
            let mut sums = [[0.0; LANES]; 2];
            let end = range.end - range.len() % LANES;
            for at in (range.start..end).step_by(LANES) {
                unsafe { look_lanes::<T, N, U, LANES>(raw, at, rule, &mut sums) };
            }
            for at in end..range.end {
                unsafe { look_lanes::<T, N, U, 1>(raw, at, rule, &mut sums) };
            }
            sums.map(|lanes| crate::cpu::simd::join_lanes(lanes, |a, b| a + b))
        },
    )
}

#[inline(always)]
unsafe fn look_lanes<T: Float, const N: usize, U: Rule<N>, const L: usize>(
    raw: &Raw<N, U>,
    at: usize,
    rule: U,
    sums: &mut [[f64; LANES]; 2],
) {
    unsafe {
        let (p, g, mut state) = load::<T, N, U, L>(raw, at);
        for i in 0..L {
            let mut s: [T::Acc; N] = std::array::from_fn(|k| state[k][i]);
            let (p, u) = (p[i].to_f64(), rule.look(p[i], g[i], &mut s).to_f64());
            (0..N).for_each(|k| state[k][i] = s[k]);
            sums[0][i] += p * p;
            sums[1][i] += u * u;
        }
        (0..N).for_each(|k| put(raw.state[k], at, state[k]));
    }
}

type Lanes<A, const N: usize, const L: usize> = ([A; L], [A; L], [[A; L]; N]);

#[inline(always)]
unsafe fn load<T: Float, const N: usize, U, const L: usize>(
    raw: &Raw<N, U>,
    at: usize,
) -> Lanes<T::Acc, N, L> {
    unsafe {
        let p = if raw.master.is_null() { get::<T, L>(raw.p, at).map(T::acc) } else { get(raw.master, at) };
        (p, get::<T, L>(raw.g, at).map(T::acc), std::array::from_fn(|k| get(raw.state[k], at)))
    }
}

#[inline(always)]
unsafe fn get<T: Copy, const L: usize>(base: *const u8, at: usize) -> [T; L] {
    unsafe { base.cast::<T>().add(at).cast::<[T; L]>().read_unaligned() }
}

#[inline(always)]
unsafe fn put<T: Copy, const L: usize>(base: *mut u8, at: usize, values: [T; L]) {
    unsafe { base.cast::<T>().add(at).cast::<[T; L]>().write_unaligned(values) }
}
