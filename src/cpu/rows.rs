//! Passes over one row in the cache, shared by softmax, attention and the losses. To be called within
//! [`simd`](super::simd::simd).

use super::simd::{LANES, fold, join_lanes};
use crate::dtype::{Float, Real};

/// Sum of `f(i)` for i below n, in [`LANES`] partial sums. `f` may write as it goes.
#[inline(always)]
pub fn sum_of<R: Real>(n: usize, mut f: impl FnMut(usize) -> R) -> R {
    let mut lanes = [R::ZERO; LANES];
    let body = n / LANES * LANES;
    for at in (0..body).step_by(LANES) {
        for i in 0..LANES {
            lanes[i] += f(at + i);
        }
    }
    for i in body..n {
        lanes[i - body] += f(i);
    }
    join_lanes(lanes, |a, b| a + b)
}

/// Largest element; NaN is passed over, and a row of nothing gives -infinity.
#[inline(always)]
pub fn max<T: Float>(x: &[T]) -> T::Acc {
    let larger = |a: T::Acc, b: T::Acc| if b > a { b } else { a };
    // several registers of lanes: one alone would wait for itself
    let mut lanes = [[T::Acc::NEG_INF; LANES]; 4];
    let mut chunks = x.chunks_exact(4 * LANES);
    for chunk in &mut chunks {
        for (lanes, part) in lanes.iter_mut().zip(chunk.chunks_exact(LANES)) {
            for i in 0..LANES {
                lanes[i] = larger(lanes[i], part[i].acc());
            }
        }
    }
    let rest = fold(chunks.remainder(), T::Acc::NEG_INF, |a, v| larger(a, v.acc()), larger);
    lanes.into_iter().fold(rest, |max, lanes| larger(max, join_lanes(lanes, larger)))
}

/// Sum of e^(x - shift), where the shift is about the largest x or above.
#[inline(always)]
pub fn exp_sum<T: Float>(x: &[T], shift: T::Acc) -> T::Acc {
    sum_of(
        x.len(),
        #[inline(always)]
        |i| (unsafe { *x.get_unchecked(i) }.acc() - shift).exp_low(),
    )
}

/// x = e^(x - shift), where the shift is about the largest x or above; returns the sum.
#[inline(always)]
pub fn exp_in_place<R: Real>(x: &mut [R], shift: R) -> R {
    sum_of(
        x.len(),
        #[inline(always)]
        |i| {
            let x = unsafe { x.get_unchecked_mut(i) };
            *x = (*x - shift).exp_low();
            *x
        },
    )
}
