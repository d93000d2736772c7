//! Buffers on the CPU, pooled: in steady state a training step takes no memory from the system, and so meets no
//! page faults (worth a third of a step: fresh pages are zeroed by the kernel at each first touch).
//!
//! Small buffers come from the global allocator. Large ones are carved best-fit out of chunks that are kept;
//! freed neighbours merge. Chunks ask for huge pages.

use std::{
    alloc::{Layout, alloc, dealloc, handle_alloc_error},
    collections::{BTreeMap, BTreeSet},
    marker::PhantomData,
    ops::{Deref, DerefMut},
    ptr::NonNull,
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
};

use crate::dtype::Element;

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
}

unsafe impl Send for Buffer {}
unsafe impl Sync for Buffer {}

impl Buffer {
    /// A buffer of `bytes` bytes.
    pub fn new(bytes: usize) -> Self {
        let ptr = if bytes >= LARGE { pool().take(rounded(bytes)) } else { system(small(bytes)) };
        Buffer { ptr, bytes }
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

/// What the pool holds, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// In buffers that are alive.
    pub live: usize,
    /// The most that was alive at any time.
    pub peak: usize,
    /// Taken from the system and not given back.
    pub reserved: usize,
}

/// The pool's books.
pub fn stats() -> Stats {
    pool().stats
}

/// Gives chunks back to the system that hold no live buffer.
pub fn trim() {
    pool().trim();
}

#[derive(Default)]
struct Pool {
    /// Free blocks by address: neighbours are found here.
    by_address: BTreeMap<usize, usize>,
    /// The same as (size, address): the best fit is found here.
    by_size: BTreeSet<(usize, usize)>,
    /// Chunks: address and size.
    chunks: BTreeMap<usize, usize>,
    stats: Stats,
}

fn pool() -> MutexGuard<'static, Pool> {
    static POOL: LazyLock<Mutex<Pool>> = LazyLock::new(Mutex::default);
    // Every change of the books is complete before anything in it can panic, so a poisoned lock is as good.
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    fn take(&mut self, bytes: usize) -> NonNull<u8> {
        let found = self.by_size.range((bytes, 0)..).next().copied();
        let (size, address) = found.unwrap_or_else(|| self.grow(bytes));
        self.remove(address, size);
        if size > bytes {
            self.insert(address + bytes, size - bytes);
        }
        self.stats.live += bytes;
        self.stats.peak = self.stats.peak.max(self.stats.live);
        // The address came from a non-null block.
        unsafe { NonNull::new_unchecked(address as *mut u8) }
    }

    fn give(&mut self, mut address: usize, mut size: usize) {
        self.stats.live -= size;
        if let Some((&before, &n)) = self.by_address.range(..address).next_back()
            && before + n == address
            && !self.chunks.contains_key(&address)
        {
            self.remove(before, n);
            (address, size) = (before, size + n);
        }
        let end = address + size;
        if let Some(&n) = self.by_address.get(&end)
            && !self.chunks.contains_key(&end)
        {
            self.remove(end, n);
            size += n;
        }
        self.insert(address, size);
    }

    fn insert(&mut self, address: usize, size: usize) {
        self.by_address.insert(address, size);
        self.by_size.insert((size, address));
    }

    fn remove(&mut self, address: usize, size: usize) {
        self.by_address.remove(&address);
        self.by_size.remove(&(size, address));
    }

    /// A new chunk that holds at least `bytes`, as one free block (size, address).
    fn grow(&mut self, bytes: usize) -> (usize, usize) {
        let size = bytes.next_multiple_of(HUGE_PAGE).max(CHUNK);
        let ptr = system(chunk(size));
        #[cfg(target_os = "linux")]
        unsafe {
            libc::madvise(ptr.as_ptr().cast(), size, libc::MADV_HUGEPAGE);
        }
        let address = ptr.as_ptr() as usize;
        self.chunks.insert(address, size);
        self.stats.reserved += size;
        self.insert(address, size);
        (size, address)
    }

    fn trim(&mut self) {
        let empty: Vec<_> = self
            .chunks
            .iter()
            .map(|(&a, &n)| (a, n))
            .filter(|(a, n)| self.by_address.get(a) == Some(n))
            .collect();
        for (address, size) in empty {
            self.remove(address, size);
            self.chunks.remove(&address);
            self.stats.reserved -= size;
            unsafe { dealloc(address as *mut u8, chunk(size)) };
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_split_merge_and_return() {
        let mut pool = Pool::default();
        let a = pool.take(1 << 20).as_ptr() as usize;
        let b = pool.take(2 << 20).as_ptr() as usize;
        let c = pool.take(4 << 20).as_ptr() as usize;
        assert_eq!((b, c), (a + (1 << 20), a + (3 << 20)));
        pool.give(b, 2 << 20);
        assert_eq!(pool.take(2 << 20).as_ptr() as usize, b, "the best fit is the hole");
        pool.give(a, 1 << 20);
        pool.give(c, 4 << 20);
        pool.give(b, 2 << 20);
        assert_eq!(pool.by_address.len(), 1, "neighbours merge");
        assert_eq!(pool.stats.live, 0);
        pool.trim();
        assert_eq!(pool.stats.reserved, 0);
    }
}
