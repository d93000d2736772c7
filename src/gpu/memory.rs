//! GPU memory: a caching allocator. All work of a device runs on one stream, so a block that the host frees can
//! be handed out again at once: whoever gets it comes later on the stream.

use super::{driver, graph, known::Known};
use crate::{
    Device, Error, Result,
    arena::{Arena, Stats},
    cpu::pool::Buffer as HostBuffer,
};
use std::{
    collections::BTreeMap,
    sync::{
        LazyLock, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// Sizes are rounded up to multiples of this, the alignment of CUDA's own allocator.
const STEP: usize = 512;
/// Blocks below this come out of chunks of their own, so that small ones do not break up large ones.
const SMALL: usize = 1 << 20;
const SMALL_CHUNK: usize = 8 << 20;
const CHUNK: usize = 64 << 20;
const CHUNK_STEP: usize = 2 << 20;

/// The pool of all memory that does not belong to a graph.
pub(super) const COMMON: u64 = 0;

#[derive(Default)]
struct Pools {
    small: Arena,
    large: Arena,
    /// Its graph is gone: what is given back goes to the driver.
    retired: bool,
}

impl Pools {
    fn of(&mut self, bytes: usize) -> &mut Arena {
        if bytes < SMALL { &mut self.small } else { &mut self.large }
    }

    fn live(&self) -> usize {
        self.small.stats.live + self.large.stats.live
    }
}

/// By device and pool.
type AllPools = BTreeMap<(usize, u64), Pools>;

fn pools() -> MutexGuard<'static, AllPools> {
    static POOLS: LazyLock<Mutex<AllPools>> = LazyLock::new(Mutex::default);
    POOLS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Memory on a GPU, given back to the pool when dropped.
pub struct Buffer {
    index: usize,
    /// Whose memory it is.
    pool: u64,
    address: usize,
    bytes: usize,
    /// A copy on the host, for operations that go through it. Storage that others see is never written, so a
    /// copy stays true, except when a graph is launched.
    mirror: OnceLock<HostBuffer>,
    /// Launches of graphs when the copy was made.
    mirrored: AtomicU64,
    known: OnceLock<Known>,
}

impl Buffer {
    /// `bytes` bytes of unspecified content.
    pub fn new(device: usize, bytes: usize) -> Result<Buffer> {
        Buffer::of_pool(device, graph::pool(device), bytes)
    }

    fn of_pool(device: usize, owner: u64, bytes: usize) -> Result<Buffer> {
        let size = rounded(bytes).ok_or_else(|| exhausted(device, bytes, live(device, &pools())))?;
        let mut pools = pools();
        let address = loop {
            let pool = pools.entry((device, owner)).or_default();
            if let Some(address) = pool.of(size).take(size) {
                break address;
            }
            let least = if size < SMALL { SMALL_CHUNK } else { CHUNK };
            let exact = size.next_multiple_of(CHUNK_STEP);
            let mut chunk = exact.max(least);
            let mut found = driver::allocate(device, chunk)?;
            if found.is_none() {
                // what is cached but free, then a chunk of just the size
                give_back_all(device, &mut pools);
                chunk = exact;
                found = driver::allocate(device, chunk)?;
            }
            match found {
                Some(address) => pools.entry((device, owner)).or_default().of(size).grow(address, chunk),
                None => return Err(exhausted(device, bytes, live(device, &pools))),
            }
        };
        let (mirror, mirrored, known) = (OnceLock::new(), AtomicU64::new(0), OnceLock::new());
        Ok(Buffer { index: device, pool: owner, address, bytes, mirror, mirrored, known })
    }

    pub fn device(&self) -> usize {
        self.index
    }

    pub(super) fn pool(&self) -> u64 {
        self.pool
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Address on the device.
    pub fn ptr(&self) -> *mut u8 {
        self.address as *mut u8
    }

    /// Fills the buffer's first `bytes` bytes from host memory.
    pub fn upload(&self, from: *const u8, bytes: usize) -> Result<()> {
        self.upload_at(0, from, bytes)
    }

    /// Fills bytes `start..start + bytes` from host memory.
    pub fn upload_at(&self, start: usize, from: *const u8, bytes: usize) -> Result<()> {
        debug_assert!(start + bytes <= self.bytes);
        graph::refuse_in_capture(self.index, "making a tensor from host memory")?;
        unsafe { driver::upload(self.index, self.ptr().add(start), from, bytes) }
    }

    /// Copies bytes `start..start + to.bytes()` to the host.
    pub fn download(&self, start: usize, to: &HostBuffer) -> Result<()> {
        debug_assert!(start + to.bytes() <= self.bytes);
        graph::refuse_in_capture(self.index, "reading a tensor")?;
        unsafe { driver::download(self.index, to.ptr(), self.ptr().add(start), to.bytes()) }
    }

    /// The content on the host, brought over at the first call. A failed transfer is a lost device.
    pub fn mirror(&self) -> &HostBuffer {
        let now = graph::launches();
        let fill = |host: &HostBuffer| {
            if let Err(error) = self.download(0, host) {
                panic!("{error}");
            }
        };
        let host = self.mirror.get_or_init(|| {
            let host = HostBuffer::new(self.bytes);
            fill(&host);
            self.mirrored.store(now, Ordering::Release);
            host
        });
        // A launch may have written to this memory: the one case where it changes under those who see it.
        if self.mirrored.swap(now, Ordering::AcqRel) < now {
            fill(host);
        }
        host
    }

    /// What is known of the content.
    pub fn known(&self) -> Known {
        self.known.get().copied().unwrap_or_default()
    }

    /// Notes what is known; the first word stays.
    pub fn know(&self, known: Known) {
        self.known.get_or_init(|| known);
    }

    /// To be called before the content changes.
    pub fn forget_mirror(&mut self) {
        self.mirror.take();
        self.known.take();
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        graph::dropped(self.index, self.address);
        let Some(size) = rounded(self.bytes) else { return };
        let mut pools = pools();
        let key = (self.index, self.pool);
        let pool = pools.entry(key).or_default();
        pool.of(size).give(self.address, size);
        if pool.retired && pool.live() == 0 {
            give_back(self.index, pool);
            pools.remove(&key);
        }
    }
}

/// `None` beyond what a device could address.
fn rounded(bytes: usize) -> Option<usize> {
    (bytes <= isize::MAX as usize / 2).then(|| bytes.max(1).next_multiple_of(STEP))
}

fn exhausted(device: usize, bytes: usize, live: usize) -> Error {
    Error::Device {
        device: Device::Cuda(device).to_string(),
        message: format!("out of memory: {bytes} bytes wanted, {live} are in use"),
    }
}

fn give_back(device: usize, pools: &mut Pools) {
    // Work that still reads the blocks must be over before the driver takes them. While a graph is recorded, nothing
    // can be waited for, and what was recorded needs its blocks.
    if graph::refuse_in_capture(device, "").is_err() || driver::synchronize(device).is_err() {
        return;
    }
    for (address, size) in pools.small.trim().into_iter().chain(pools.large.trim()) {
        unsafe { driver::release(device, address, size) };
    }
}

/// Of a graph's pool only the graph knows what is free: a launch writes there again.
fn give_back_all(device: usize, pools: &mut AllPools) {
    if let Some(pool) = pools.get_mut(&(device, COMMON)) {
        give_back(device, pool);
    }
}

fn live(device: usize, pools: &AllPools) -> usize {
    pools.iter().filter(|((d, _), _)| *d == device).map(|(_, pool)| pool.live()).sum()
}

/// A graph is gone: its memory goes back to the driver, now or with the last tensor in it.
pub(super) fn retire(device: usize, graph: u64) {
    let mut pools = pools();
    if let Some(pool) = pools.get_mut(&(device, graph)) {
        pool.retired = true;
        if pool.live() == 0 {
            give_back(device, pool);
            pools.remove(&(device, graph));
        }
    }
}

/// Bytes that a graph's pool has from the driver.
pub(super) fn held(device: usize, graph: u64) -> usize {
    pools().get(&(device, graph)).map_or(0, |p| p.small.stats.reserved + p.large.stats.reserved)
}

pub(super) fn index(device: Device) -> Result<usize> {
    match device {
        Device::Cuda(i) => driver::open(i).map(|()| i),
        Device::Cpu => Err(Error::msg("gpu: cpu is no GPU")),
    }
}

/// The books of a GPU's memory.
///
/// # Errors
/// If the device is no GPU, or not there.
pub fn stats(device: Device) -> Result<Stats> {
    let i = index(device)?;
    let mut sum = Stats::default();
    for (_, pool) in pools().iter().filter(|((d, _), _)| *d == i) {
        for arena in [&pool.small, &pool.large] {
            // The peaks need not have been at one time, so their sum is an upper bound.
            sum.live += arena.stats.live;
            sum.peak += arena.stats.peak;
            sum.reserved += arena.stats.reserved;
        }
    }
    Ok(sum)
}

/// Starts the peak of [`stats`] anew from what is alive.
///
/// # Errors
/// If the device is no GPU, or not there.
pub fn reset_peak(device: Device) -> Result<()> {
    let i = index(device)?;
    for (_, pool) in pools().iter_mut().filter(|((d, _), _)| *d == i) {
        for arena in [&mut pool.small, &mut pool.large] {
            arena.stats.peak = arena.stats.live;
        }
    }
    Ok(())
}

/// Gives memory back to the driver that is cached but not in use (that of graphs stays).
///
/// # Errors
/// If the device is no GPU, or not there.
pub fn trim(device: Device) -> Result<()> {
    let i = index(device)?;
    graph::refuse_in_capture(i, "trim")?;
    give_back_all(i, &mut pools());
    Ok(())
}

/// Waits until all work that was sent to the device is done, and reports what failed meanwhile.
///
/// # Errors
/// If the device is no GPU or not there, or a kernel failed.
pub fn synchronize(device: Device) -> Result<()> {
    let i = index(device)?;
    graph::refuse_in_capture(i, "synchronize")?;
    driver::synchronize(i)
}

#[cfg(all(test, feature = "emulate"))]
mod tests {
    use super::*;

    /// A pool that no other test draws from: as if a graph of this number were alive.
    struct Own(u64);
    impl Own {
        fn buffer(&self, bytes: usize) -> Result<Buffer> {
            Buffer::of_pool(0, self.0, bytes)
        }
        fn stats(&self) -> Stats {
            let pools = pools();
            let Some(pool) = pools.get(&(0, self.0)) else { return Stats::default() };
            let (a, b) = (pool.small.stats, pool.large.stats);
            Stats { live: a.live + b.live, peak: a.peak + b.peak, reserved: a.reserved + b.reserved }
        }
        fn trim(&self) {
            give_back(0, pools().entry((0, self.0)).or_default());
        }
    }

    /// Numbers between 1 and `most`, many small and few large, the same at every run.
    fn sizes(n: usize, most: usize) -> Vec<usize> {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as f64 / (1u64 << 31) as f64
        };
        (0..n).map(|_| (most as f64).powf(next()).ceil() as usize).collect()
    }

    #[test]
    fn freed_memory_is_handed_out_again() -> Result<()> {
        let own = Own(u64::MAX);
        for bytes in [0, 1, 1000, SMALL - 1, SMALL, 3 * SMALL + 5, CHUNK + 1] {
            let first = own.buffer(bytes)?.ptr();
            let again = own.buffer(bytes)?;
            assert_eq!((first, again.bytes()), (again.ptr(), bytes));
            assert_eq!(first as usize % STEP, 0);
        }
        assert_eq!(own.stats().live, 0);
        Ok(())
    }

    #[test]
    fn a_loop_of_odd_sizes_does_not_grow() -> Result<()> {
        let own = Own(u64::MAX - 1);
        let sizes = sizes(400, 24 << 20);
        let mut reserved = Vec::new();
        for _ in 0..12 {
            // as in a step: what the forward makes is freed from the far end, with temporaries between
            let mut kept = Vec::new();
            for (i, &bytes) in sizes.iter().enumerate() {
                let temporary = own.buffer(bytes / 3 + 1)?;
                if i % 4 == 0 {
                    kept.push(own.buffer(bytes)?);
                }
                drop(temporary);
            }
            while kept.pop().is_some() {
                let _gradient = own.buffer(sizes[kept.len()])?;
            }
            reserved.push(own.stats().reserved);
        }
        assert_eq!(reserved[0], reserved[11], "{reserved:?}");
        let stats = own.stats();
        assert!(stats.reserved <= 2 * stats.peak + 2 * CHUNK, "{stats:?}");
        own.trim();
        assert_eq!((own.stats().live, own.stats().reserved), (0, 0));
        Ok(())
    }

    /// Lifetimes in no order at all: what is reserved stays within twice the most that was alive.
    #[test]
    fn fragmentation_is_bounded() -> Result<()> {
        let own = Own(u64::MAX - 2);
        let sizes = sizes(4000, 8 << 20);
        let mut alive: Vec<Buffer> = Vec::new();
        for (i, &bytes) in sizes.iter().enumerate() {
            alive.push(own.buffer(bytes)?);
            if alive.len() > 100 {
                alive.swap_remove(sizes[(i * 7 + 3) % sizes.len()] % 100);
            }
        }
        let stats = own.stats();
        assert!(stats.reserved <= 2 * stats.peak + CHUNK, "{stats:?}");
        let held = stats.reserved;
        own.trim();
        assert!(own.stats().reserved >= own.stats().live && own.stats().reserved <= held);
        drop(alive);
        own.trim();
        assert_eq!(own.stats().reserved, 0);
        Ok(())
    }

    #[test]
    fn out_of_memory_is_an_error() -> Result<()> {
        let own = Own(u64::MAX - 3);
        let _held = own.buffer(4096)?;
        for bytes in [1 << 60, usize::MAX, isize::MAX as usize] {
            let error = own.buffer(bytes).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains("out of memory") && error.contains(&bytes.to_string()), "{error}");
        }
        assert_eq!(own.stats().live, 4096, "the books are as before");
        Ok(())
    }
}
