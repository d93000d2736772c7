//! Splitting work over threads. Splits depend on sizes alone, never on the number of threads, so that results
//! are bit-identical for any `RAYON_NUM_THREADS`.

use super::team;
use rayon::prelude::*;
use std::ops::Range;

/// Elements of simple work that are worth a task of their own: some ten microseconds.
pub const GRAIN: usize = 32 * 1024;

/// Runs `f` on consecutive ranges of `grain` (the last may be shorter) that cover `0..n`. One range runs on
/// the caller's thread, without waking another.
pub fn for_ranges(n: usize, grain: usize, f: impl Fn(Range<usize>) + Sync) {
    ranges(n, grain, &f);
}

/// Apart, so that the thread pool's code is compiled once and not for every caller.
fn ranges(n: usize, grain: usize, f: &(dyn Fn(Range<usize>) + Sync)) {
    let grain = grain.max(1);
    let chunks = n.div_ceil(grain);
    if chunks <= 1 || rayon::current_num_threads() == 1 {
        (0..chunks).for_each(|i| f(i * grain..n.min((i + 1) * grain)));
    } else {
        let part = |i: usize| f(i * grain..n.min((i + 1) * grain));
        if !team::run(chunks, &part) {
            (0..chunks).into_par_iter().for_each(part);
        }
    }
}

/// [`for_ranges`] over rows of `width` elements each, with the grain counted in elements.
pub fn for_rows(rows: usize, width: usize, f: impl Fn(Range<usize>) + Sync) {
    for_ranges(rows, (GRAIN / width.max(1)).max(1), f)
}

/// A raw pointer that threads may share: they promise to touch disjoint elements.
#[derive(Clone, Copy)]
pub struct SharedMut<T>(*mut T);

unsafe impl<T: Send> Send for SharedMut<T> {}
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    /// Shares a slice that outlives the parallel section.
    pub fn new(slice: &mut [T]) -> Self {
        SharedMut(slice.as_mut_ptr())
    }

    /// Shares the memory at `ptr`.
    pub fn of(ptr: *mut T) -> Self {
        SharedMut(ptr)
    }

    /// The elements `range`.
    ///
    /// # Safety
    /// `range` lies within the slice, and no other thread touches it meanwhile.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    pub unsafe fn slice(&self, range: Range<usize>) -> &mut [T] {
        unsafe { std::slice::from_raw_parts_mut(self.0.add(range.start), range.len()) }
    }

    /// The same memory from element `offset` on.
    ///
    /// # Safety
    /// The element lies within the slice or at its end.
    pub unsafe fn from(&self, offset: isize) -> Self {
        SharedMut(unsafe { self.0.offset(offset) })
    }

    /// The raw pointer.
    #[inline(always)]
    pub fn ptr(&self) -> *mut T {
        self.0
    }
}

/// A raw pointer that threads may read through.
#[derive(Clone, Copy)]
pub struct Shared<T>(pub *const T);

unsafe impl<T: Sync> Send for Shared<T> {}
unsafe impl<T: Sync> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// The raw pointer.
    #[inline(always)]
    pub fn ptr(&self) -> *const T {
        self.0
    }
}
