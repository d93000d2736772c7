//! Loops over memory of the form `[outer, channels, inner]`, by units that are rows of all channels (inner = 1)
//! or planes of one channel: batch norm and group norm in NCHW and in channels-last.

use crate::{
    cpu::{axis::Axis, parallel::SharedMut, rows, simd::simd},
    dtype::{Element, Real},
};
use std::ops::Range;

pub struct Channels {
    pub n: usize,
    inner: usize,
}

impl Channels {
    pub fn of(axis: &Axis) -> Channels {
        Channels { n: axis.n, inner: axis.inner }
    }

    /// Is a unit a row of all channels?
    pub fn rows(&self) -> bool {
        self.inner == 1
    }

    /// Elements of a unit.
    pub fn width(&self) -> usize {
        if self.rows() { self.n } else { self.inner }
    }

    /// Sums over `units`. Rows: `out` has a slot for each channel; planes: one for each unit.
    /// `f(slot, channel)(i)` is the term of element i.
    pub fn reduce<R: Real, G: Fn(usize) -> R>(
        &self,
        units: Range<usize>,
        out: &mut [R],
        f: impl Fn(usize, usize) -> G,
    ) {
        let (n, inner) = (self.n, self.inner);
        if self.rows() {
            let out = &mut out[..n];
            out.fill(R::ZERO);
            for row in units {
                simd(
                    #[inline(always)]
                    || (0..n).for_each(|c| out[c] += f(c, c)(row * n + c)),
                );
            }
        } else {
            for (slot, plane) in units.enumerate() {
                let term = f(slot, plane % n);
                out[slot] = simd(
                    #[inline(always)]
                    || {
                        rows::sum_of(
                            inner,
                            #[inline(always)]
                            |i| term(plane * inner + i),
                        )
                    },
                );
            }
        }
    }

    /// `out[i] = f(slot, channel)(i)` over `units`, with slots as in [`reduce`](Self::reduce).
    pub fn apply<T: Element, G: Fn(usize) -> T>(
        &self,
        units: Range<usize>,
        out: &SharedMut<T>,
        f: impl Fn(usize, usize) -> G,
    ) {
        let (n, inner) = (self.n, self.inner);
        if self.rows() {
            for row in units {
                let out = unsafe { out.slice(row * n..(row + 1) * n) };
                simd(
                    #[inline(always)]
                    || (0..n).for_each(|c| out[c] = f(c, c)(row * n + c)),
                );
            }
        } else {
            for (slot, plane) in units.enumerate() {
                let out = unsafe { out.slice(plane * inner..(plane + 1) * inner) };
                let value = f(slot, plane % n);
                simd(
                    #[inline(always)]
                    || out.iter_mut().enumerate().for_each(|(i, y)| *y = value(plane * inner + i)),
                );
            }
        }
    }
}

/// Element `i` of a slice, without the bounds check that keeps loops from vectorising.
///
/// # Safety
/// `i` lies within.
#[inline(always)]
pub unsafe fn at<T: Copy>(x: &[T], i: usize) -> T {
    debug_assert!(i < x.len());
    unsafe { *x.get_unchecked(i) }
}
