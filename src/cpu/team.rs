//! The threads that work on one operation together: the caller, and threads of rayon's pool that are kept at hand.
//!
//! Rayon's own loop suits neither end of an operation of 200 microseconds. Its threads fall asleep some 20 microseconds
//! after their last task, the caller too while it waits for the others' last pieces; and a thread that is woken is put on
//! the processor of the one that woke it, above all in a virtual machine, and gets no turn there for milliseconds. So
//! - the caller works too, and when nothing is left it waits for the others without sleeping;
//! - the others look for more work for another `PATIENCE` before they sleep, and meanwhile give way to whoever else
//!   wants the processor, as OpenMP's threads do; they keep off the processor that the caller works on.

use rayon::Yield;
use std::{
    any::Any,
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    ptr::null_mut,
    sync::{
        Mutex, PoisonError,
        atomic::{
            AtomicBool, AtomicI32, AtomicPtr, AtomicUsize,
            Ordering::{Acquire, Relaxed, Release, SeqCst},
        },
    },
    time::{Duration, Instant},
};

/// How long a thread without work looks for some: as much as one thread does between two parallel operations.
const PATIENCE: Duration = Duration::from_micros(200);
/// Looks between two times that the processor is offered to others.
const LOOKS: usize = 64;
/// Threads that are kept at hand.
const MOST: usize = 64;

/// Is a thread waiting in this place, or on the way there?
static PLACES: [AtomicBool; MOST] = [const { AtomicBool::new(false) }; MOST];
/// The processor that the caller is on; -1 if that is not known.
static CALLER: AtomicI32 = AtomicI32::new(-1);
/// What is worked on, on the caller's stack; null if nothing is.
static JOB: AtomicPtr<Job> = AtomicPtr::new(null_mut());
/// Threads that may hold that address. It stays valid until there are none.
static VISITORS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Is this thread within a parallel operation, or waiting for one?
    static BUSY: Cell<bool> = const { Cell::new(false) };
    /// The processor that this thread keeps off; -1 for none.
    static AVOIDED: Cell<i32> = const { Cell::new(-1) };
}

struct Job {
    /// Does piece i. Its lifetime is that of the call to [`run`].
    piece: *const (dyn Fn(usize) + Sync),
    pieces: usize,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Job {
    fn work(&self) {
        loop {
            let i = self.next.fetch_add(1, Relaxed);
            if i >= self.pieces {
                return;
            }
            unsafe { (*self.piece)(i) };
        }
    }
}

/// Does pieces `0..pieces` on the caller's thread and others. `false` if another thread's operation is under way, or this
/// is a piece of one: nothing was done then.
pub fn run(pieces: usize, piece: &(dyn Fn(usize) + Sync)) -> bool {
    if BUSY.get() {
        return false;
    }
    // only the lifetime is changed: `Posted` does not let go before all are done with it
    let piece: *const (dyn Fn(usize) + Sync + 'static) = unsafe { std::mem::transmute(piece) };
    let mut job = Job { piece, pieces, next: AtomicUsize::new(0), panic: Mutex::new(None) };
    if JOB.compare_exchange(null_mut(), &mut job, SeqCst, Relaxed).is_err() {
        return false;
    }
    let posted = Posted;
    BUSY.set(true);
    CALLER.store(processor::current(), Relaxed);
    invite();
    job.work();
    drop(posted);
    if let Some(panic) = job.panic.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
        resume_unwind(panic);
    }
    true
}

/// Takes the job back when it is dropped, also by a panic of the caller's piece.
struct Posted;

impl Drop for Posted {
    fn drop(&mut self) {
        JOB.store(null_mut(), SeqCst);
        let mut looks = 0usize;
        while VISITORS.load(SeqCst) > 0 {
            looks += 1;
            // the thread that is waited for may need this processor
            if looks.is_multiple_of(16 * LOOKS) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        BUSY.set(false);
    }
}

/// Runs `f`, which hands work to rayon.
pub fn with_rayon<R>(f: impl FnOnce() -> R) -> R {
    if !BUSY.get() {
        CALLER.store(processor::current(), Relaxed);
        invite();
    }
    f()
}

/// Calls the threads that are not at hand.
fn invite() {
    for place in PLACES.iter().take(rayon::current_num_threads() - 1) {
        if !place.load(Relaxed) && !place.swap(true, Acquire) {
            rayon::spawn(move || {
                // the caller may come across this while it waits for other threads
                if !BUSY.replace(true) {
                    wait();
                    BUSY.set(false);
                }
                place.store(false, Release);
            });
        }
    }
}

/// Works on whatever turns up until nothing has for a while.
fn wait() {
    let mut since = Instant::now();
    while since.elapsed() < PATIENCE {
        let caller = CALLER.load(Relaxed);
        if AVOIDED.replace(caller) != caller {
            processor::keep_off(caller);
        }
        for _ in 0..LOOKS {
            if help() || rayon::yield_now() == Some(Yield::Executed) {
                since = Instant::now();
            }
            std::hint::spin_loop();
        }
        std::thread::yield_now();
    }
}

/// Takes part in the job, if there is one.
fn help() -> bool {
    if JOB.load(Relaxed).is_null() {
        return false;
    }
    VISITORS.fetch_add(1, SeqCst);
    let job = JOB.load(SeqCst);
    if let Some(job) = unsafe { job.as_ref() }
        && let Err(panic) = catch_unwind(AssertUnwindSafe(|| job.work()))
    {
        job.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
    }
    VISITORS.fetch_sub(1, SeqCst);
    !job.is_null()
}

#[cfg(target_os = "linux")]
mod processor {
    /// The one that this thread is on.
    pub fn current() -> i32 {
        unsafe { libc::sched_getcpu() }
    }

    /// This thread may run wherever the process's main thread may, but for one processor (-1 for none).
    pub fn keep_off(one: i32) {
        let size = size_of::<libc::cpu_set_t>();
        unsafe {
            let mut allowed: libc::cpu_set_t = std::mem::zeroed();
            // a failure (more processors than a set holds, a sandbox) leaves things as they are
            if one >= libc::CPU_SETSIZE || libc::sched_getaffinity(libc::getpid(), size, &mut allowed) != 0 {
                return;
            }
            if one >= 0 && libc::CPU_COUNT(&allowed) > 1 {
                libc::CPU_CLR(one as usize, &mut allowed);
            }
            libc::sched_setaffinity(0, size, &allowed);
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod processor {
    /// Not known here.
    pub fn current() -> i32 {
        -1
    }
    pub fn keep_off(_: i32) {}
}
