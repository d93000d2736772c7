//! GPU memory: a caching allocator. All work of a device runs on one stream, so a block that the host frees can
//! be handed out again at once: whoever gets it comes later on the stream.

use super::{driver, known::Known};
use crate::{
    Device, Error, Result,
    arena::{Arena, Stats},
    cpu::pool::Buffer as HostBuffer,
};
use std::{
    collections::BTreeMap,
    sync::{LazyLock, Mutex, MutexGuard, OnceLock, PoisonError},
};

/// Sizes are rounded up to multiples of this, the alignment of CUDA's own allocator.
const STEP: usize = 512;
/// Blocks below this come out of chunks of their own, so that small ones do not break up large ones.
const SMALL: usize = 1 << 20;
const SMALL_CHUNK: usize = 8 << 20;
const CHUNK: usize = 64 << 20;
const CHUNK_STEP: usize = 2 << 20;

#[derive(Default)]
struct Pools {
    small: Arena,
    large: Arena,
}

impl Pools {
    fn of(&mut self, bytes: usize) -> &mut Arena {
        if bytes < SMALL { &mut self.small } else { &mut self.large }
    }
}

fn pools() -> MutexGuard<'static, BTreeMap<usize, Pools>> {
    static POOLS: LazyLock<Mutex<BTreeMap<usize, Pools>>> = LazyLock::new(Mutex::default);
    POOLS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Memory on a GPU, given back to the pool when dropped.
pub struct Buffer {
    index: usize,
    address: usize,
    bytes: usize,
    /// A copy on the host, for operations that go through it. Storage that others see is never written, so a
    /// copy stays true.
    mirror: OnceLock<HostBuffer>,
    known: OnceLock<Known>,
}

impl Buffer {
    /// `bytes` bytes of unspecified content.
    pub fn new(device: usize, bytes: usize) -> Result<Buffer> {
        let size = rounded(bytes);
        let mut pools = pools();
        let address = loop {
            let pool = pools.entry(device).or_default();
            if let Some(address) = pool.of(size).take(size) {
                break address;
            }
            let least = if size < SMALL { SMALL_CHUNK } else { CHUNK };
            let mut chunk = size.next_multiple_of(CHUNK_STEP).max(least);
            let mut found = driver::allocate(device, chunk)?;
            if found.is_none() {
                // what is cached but free, then a chunk of just the size
                give_back(device, pool);
                chunk = size.next_multiple_of(CHUNK_STEP);
                found = driver::allocate(device, chunk)?;
            }
            match found {
                Some(address) => pool.of(size).grow(address, chunk),
                None => {
                    let held = pool.small.stats.live + pool.large.stats.live;
                    return Err(Error::Device {
                        device: Device::Cuda(device).to_string(),
                        message: format!("out of memory: {bytes} bytes wanted, {held} are in use"),
                    });
                }
            }
        };
        Ok(Buffer { index: device, address, bytes, mirror: OnceLock::new(), known: OnceLock::new() })
    }

    pub fn device(&self) -> usize {
        self.index
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
        debug_assert!(bytes <= self.bytes);
        unsafe { driver::upload(self.index, self.ptr(), from, bytes) }
    }

    /// Copies bytes `start..start + to.bytes()` to the host.
    pub fn download(&self, start: usize, to: &HostBuffer) -> Result<()> {
        debug_assert!(start + to.bytes() <= self.bytes);
        unsafe { driver::download(self.index, to.ptr(), self.ptr().add(start), to.bytes()) }
    }

    /// The content on the host, brought over at the first call. A failed transfer is a lost device.
    pub fn mirror(&self) -> &HostBuffer {
        self.mirror.get_or_init(|| {
            let host = HostBuffer::new(self.bytes);
            if let Err(error) = self.download(0, &host) {
                panic!("{error}");
            }
            host
        })
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
        let size = rounded(self.bytes);
        pools().entry(self.index).or_default().of(size).give(self.address, size);
    }
}

fn rounded(bytes: usize) -> usize {
    bytes.max(1).next_multiple_of(STEP)
}

fn give_back(device: usize, pools: &mut Pools) {
    // Work that still reads the blocks must be over before the driver takes them.
    if driver::synchronize(device).is_err() {
        return;
    }
    for (address, size) in pools.small.trim().into_iter().chain(pools.large.trim()) {
        unsafe { driver::release(device, address, size) };
    }
}

fn index(device: Device) -> Result<usize> {
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
    let mut pools = pools();
    let Pools { small, large } = pools.entry(i).or_default();
    let (a, b) = (small.stats, large.stats);
    // The two peaks need not have been at one time, so their sum is an upper bound.
    Ok(Stats { live: a.live + b.live, peak: a.peak + b.peak, reserved: a.reserved + b.reserved })
}

/// Gives memory back to the driver that is cached but not in use.
///
/// # Errors
/// If the device is no GPU, or not there.
pub fn trim(device: Device) -> Result<()> {
    let i = index(device)?;
    give_back(i, pools().entry(i).or_default());
    Ok(())
}

/// Waits until all work that was sent to the device is done, and reports what failed meanwhile.
///
/// # Errors
/// If the device is no GPU or not there, or a kernel failed.
pub fn synchronize(device: Device) -> Result<()> {
    driver::synchronize(index(device)?)
}
