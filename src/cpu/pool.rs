//! Buffers on the CPU, pooled: in steady state a training step takes no memory from the system, and so meets no
//! page faults (worth a third of a step: fresh pages are zeroed by the kernel at each first touch).
//!
//! Small buffers come from the global allocator. Large ones are carved best-fit out of chunks that are kept;
//! freed neighbours merge. Chunks ask for huge pages.

use std::{
    alloc::{Layout, alloc, dealloc, handle_alloc_error},
    marker::PhantomData,
    ops::{Deref, DerefMut},
    ptr::NonNull,
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
};

pub use crate::arena::Stats;
use crate::{arena::Arena, dtype::Element};

const ALIGN: usize = 64;
/// Buffers from here on are pooled.
const LARGE: usize = 32 * 1024;
/// Pooled sizes are multiples of this, so that neighbours do not share a page.
const STEP: usize = 4096;
/// Memory is taken from the system in pieces of this size.
const CHUNK: usize = 256 << 20;
const HUGE_PAGE: usize = 2 << 20;

/// Memory of a fixed size, 64-byte aligned, returned to the pool when dropped. Its content is unspecified
/// until written.
pub struct Buffer {
    ptr: NonNull<u8>,
    bytes: usize,
    /// Somebody else's memory, not to be returned.
    borrowed: bool,
}

unsafe impl Send for Buffer {}
unsafe impl Sync for Buffer {}

impl Buffer {
    /// A buffer of `bytes` bytes.
    pub fn new(bytes: usize) -> Self {
        let ptr = if bytes >= LARGE { take(rounded(bytes)) } else { system(small(bytes)) };
        Buffer { ptr, bytes, borrowed: false }
    }

    /// A view of somebody else's memory, which is left alone when dropped.
    ///
    /// # Safety
    /// `ptr` is not null and points to `bytes` bytes that live longer than the buffer.
    #[cfg(feature = "emulate")]
    pub(crate) unsafe fn borrowed(ptr: *mut u8, bytes: usize) -> Self {
        Buffer { ptr: unsafe { NonNull::new_unchecked(ptr) }, bytes, borrowed: true }
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its address.
    pub fn ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.borrowed {
            return;
        }
        if self.bytes >= LARGE {
            pool().give(self.ptr.as_ptr() as usize, rounded(self.bytes));
        } else {
            unsafe { dealloc(self.ptr.as_ptr(), small(self.bytes)) };
        }
    }
}

fn rounded(bytes: usize) -> usize {
    bytes.next_multiple_of(STEP)
}

fn small(bytes: usize) -> Layout {
    // Both are powers of two or small, so this cannot overflow; at least one byte, as `alloc` demands.
    unsafe { Layout::from_size_align_unchecked(bytes.max(1), ALIGN) }
}

fn system(layout: Layout) -> NonNull<u8> {
    NonNull::new(unsafe { alloc(layout) }).unwrap_or_else(|| handle_alloc_error(layout))
}

/// The pool's books.
pub fn stats() -> Stats {
    pool().stats
}

/// Starts [`Stats::peak`] anew from what is alive; returns that.
pub fn reset_peak() -> usize {
    let stats = &mut pool().stats;
    stats.peak = stats.live;
    stats.live
}

/// Gives chunks back to the system that hold no live buffer.
pub fn trim() {
    for (address, size) in pool().trim() {
        unsafe { dealloc(address as *mut u8, chunk(size)) };
    }
}

fn pool() -> MutexGuard<'static, Arena> {
    static POOL: LazyLock<Mutex<Arena>> = LazyLock::new(Mutex::default);
    // Every change of the books is complete before anything in it can panic, so a poisoned lock is as good.
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

fn take(bytes: usize) -> NonNull<u8> {
    let mut arena = pool();
    loop {
        if let Some(address) = arena.take(bytes) {
            // The address came from a non-null block.
            return unsafe { NonNull::new_unchecked(address as *mut u8) };
        }
        // A new chunk that holds at least `bytes`.
        let size = bytes.next_multiple_of(HUGE_PAGE).max(CHUNK);
        let ptr = system(chunk(size));
        #[cfg(target_os = "linux")]
        unsafe {
            libc::madvise(ptr.as_ptr().cast(), size, libc::MADV_HUGEPAGE);
        }
        arena.grow(ptr.as_ptr() as usize, size);
    }
}

fn chunk(size: usize) -> Layout {
    unsafe { Layout::from_size_align_unchecked(size, HUGE_PAGE) }
}

/// A typed buffer: elements of `T` that are about to be written, or have been.
pub struct CpuVec<T> {
    buffer: Buffer,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Element> CpuVec<T> {
    /// `len` elements of unspecified value, to be written before they are read.
    pub fn new(len: usize) -> Self {
        CpuVec { buffer: Buffer::new(len * size_of::<T>()), len, element: PhantomData }
    }

    /// `len` times `value`.
    pub fn full(len: usize, value: T) -> Self {
        let mut v = Self::new(len);
        super::parallel::for_ranges(len, 1 << 18, {
            let out = super::parallel::SharedMut::new(&mut v);
            move |range| unsafe { out.slice(range).fill(value) }
        });
        v
    }

    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        Self::full(len, T::default())
    }

    /// A copy of `values`.
    pub fn from_slice(values: &[T]) -> Self {
        let mut v = Self::new(values.len());
        v.copy_from_slice(values);
        v
    }

    /// The memory behind it.
    pub fn into_buffer(self) -> Buffer {
        self.buffer
    }
}

impl<T> Deref for CpuVec<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        unsafe { std::slice::from_raw_parts(self.buffer.ptr().cast(), self.len) }
    }
}

impl<T> DerefMut for CpuVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        unsafe { std::slice::from_raw_parts_mut(self.buffer.ptr().cast(), self.len) }
    }
}
