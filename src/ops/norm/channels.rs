//! Loops over memory of the form `[outer, channels, inner]`, by units that are rows of all channels (inner = 1)
//! or planes of one channel: batch norm and group norm in NCHW and in channels-last.

use crate::{
    cpu::{
        axis::Axis,
        parallel::SharedMut,
        rows,
        simd::{each, simd},
    },
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
            let (mut row, end) = (units.start, units.end);
            simd(
                #[inline(always)]
                || {
                    // Four rows at a time, so that the sums are seldom written.
                    while row + 4 <= end {
                        each!(0..n, |c, L| {
                            let mut sums = [R::ZERO; L];
                            for l in 0..L {
                                let (term, i) = (f(c + l, c + l), row * n + c + l);
                                sums[l] = (term(i) + term(i + n)) + (term(i + 2 * n) + term(i + 3 * n));
                            }
                            unsafe { add_to(out, c, sums) };
                        });
                        row += 4;
                    }
                    for row in row..end {
                        each!(0..n, |c, L| {
                            let mut terms = [R::ZERO; L];
                            (0..L).for_each(|l| terms[l] = f(c + l, c + l)(row * n + c + l));
                            unsafe { add_to(out, c, terms) };
                        });
                    }
                },
            );
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

    /// Two sums at once: `f(channel)(i)` are the terms of element i; otherwise as [`reduce`](Self::reduce).
    pub fn reduce_two<R: Real, G: Fn(usize) -> [R; 2]>(
        &self,
        units: Range<usize>,
        [first, second]: [&mut [R]; 2],
        f: impl Fn(usize) -> G,
    ) {
        let n = self.n;
        if !self.rows() {
            self.reduce(units.clone(), first, |_, c| {
                let terms = f(c);
                #[inline(always)]
                move |i| terms(i)[0]
            });
            self.reduce(units, second, |_, c| {
                let terms = f(c);
                #[inline(always)]
                move |i| terms(i)[1]
            });
            return;
        }
        let (first, second) = (&mut first[..n], &mut second[..n]);
        first.fill(R::ZERO);
        second.fill(R::ZERO);
        simd(
            #[inline(always)]
            || {
                for row in units {
                    each!(0..n, |c, L| {
                        let (mut one, mut two) = ([R::ZERO; L], [R::ZERO; L]);
                        for l in 0..L {
                            [one[l], two[l]] = f(c + l)(row * n + c + l);
                        }
                        unsafe {
                            add_to(first, c, one);
                            add_to(second, c, two);
                        }
                    });
                }
            },
        );
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
            simd(
                #[inline(always)]
                || {
                    for row in units {
                        let out = unsafe { out.ptr().add(row * n) };
                        each!(0..n, |c, L| {
                            let mut block = [T::default(); L];
                            (0..L).for_each(|l| block[l] = f(c + l, c + l)(row * n + c + l));
                            unsafe { out.add(c).cast::<[T; L]>().write_unaligned(block) };
                        });
                    }
                },
            );
        } else {
            for (slot, plane) in units.enumerate() {
                let out = unsafe { out.ptr().add(plane * inner) };
                let value = f(slot, plane % n);
                simd(
                    #[inline(always)]
                    || {
                        each!(0..inner, |i, L| {
                            let mut block = [T::default(); L];
                            (0..L).for_each(|l| block[l] = value(plane * inner + i + l));
                            unsafe { out.add(i).cast::<[T; L]>().write_unaligned(block) };
                        });
                    },
                );
            }
        }
    }
}

/// `sums[c + l] += terms[l]`, without the bounds checks that keep loops from vectorising.
///
/// # Safety
/// `c..c + L` lies within.
#[inline(always)]
unsafe fn add_to<R: Real, const L: usize>(sums: &mut [R], c: usize, terms: [R; L]) {
    debug_assert!(c + L <= sums.len());
    let place = unsafe { sums.as_mut_ptr().add(c) }.cast::<[R; L]>();
    let mut block = unsafe { place.read_unaligned() };
    (0..L).for_each(|l| block[l] += terms[l]);
    unsafe { place.write_unaligned(block) };
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
