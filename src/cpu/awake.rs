//! Keeps the pool's threads at hand between one parallel operation and the next.
//!
//! Rayon's threads fall asleep some 20 microseconds after their last task, and to wake one takes as long as a whole
//! layer norm, above all in a virtual machine. So after an operation they look for new tasks for another [`PATIENCE`],
//! and meanwhile give way to whoever else wants the processor, as the threads of OpenMP do.
//!
//! A thread that was woken may find itself on the processor of the thread that woke it and that works too, for tens of
//! milliseconds, until the system spreads the two. So it moves away by itself.

use rayon::Yield;
use std::{
    cell::Cell,
    sync::atomic::{AtomicBool, AtomicI32, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// How long a thread without work looks for some: as much as one thread does between two parallel operations.
const PATIENCE: Duration = Duration::from_micros(200);
/// Looks between two times that the processor is offered to others.
const LOOKS: usize = 64;
/// Threads that are kept awake.
const MOST: usize = 64;

/// Is a thread waiting in this place, or on the way there?
static PLACES: [AtomicBool; MOST] = [const { AtomicBool::new(false) }; MOST];

/// The processor that the last caller was on; -1 if that is not known.
static CALLER: AtomicI32 = AtomicI32::new(-1);

thread_local! {
    /// Is this thread within a parallel operation, or waiting for one?
    static BUSY: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f`, which hands work to the pool.
pub fn with<R>(f: impl FnOnce() -> R) -> R {
    // A task that splits itself has its threads awake already.
    if BUSY.get() {
        return f();
    }
    // a caller from outside the pool sleeps meanwhile
    let works = rayon::current_thread_index().is_some();
    CALLER.store(if works { processor::current() } else { -1 }, Relaxed);
    let others = rayon::current_num_threads() - usize::from(works);
    for place in PLACES.iter().take(others) {
        if !place.load(Relaxed) && !place.swap(true, Relaxed) {
            rayon::spawn(move || {
                // the caller may come across this while it waits for other threads
                if !BUSY.replace(true) {
                    wait();
                    BUSY.set(false);
                }
                place.store(false, Relaxed);
            });
        }
    }
    struct Done;
    impl Drop for Done {
        fn drop(&mut self) {
            BUSY.set(false);
        }
    }
    BUSY.set(true);
    let _done = Done;
    f()
}

/// Works on whatever turns up until nothing has for a while.
fn wait() {
    let mut since = Instant::now();
    while since.elapsed() < PATIENCE {
        let caller = CALLER.load(Relaxed);
        if caller >= 0 && processor::current() == caller {
            processor::leave(caller);
        }
        for _ in 0..LOOKS {
            if rayon::yield_now() == Some(Yield::Executed) {
                since = Instant::now();
            }
            std::hint::spin_loop();
        }
        std::thread::yield_now();
    }
}

#[cfg(target_os = "linux")]
mod processor {
    /// The one that this thread is on.
    pub fn current() -> i32 {
        unsafe { libc::sched_getcpu() }
    }

    /// Moves this thread to any other processor that it may run on, if there is one.
    pub fn leave(here: i32) {
        let size = size_of::<libc::cpu_set_t>();
        unsafe {
            let mut allowed: libc::cpu_set_t = std::mem::zeroed();
            // a failure (more processors than a set holds, a sandbox) leaves things as they are
            if here >= libc::CPU_SETSIZE || libc::sched_getaffinity(0, size, &mut allowed) != 0 {
                return;
            }
            let mut others = allowed;
            libc::CPU_CLR(here as usize, &mut others);
            if libc::CPU_COUNT(&others) > 0 && libc::sched_setaffinity(0, size, &others) == 0 {
                libc::sched_setaffinity(0, size, &allowed);
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod processor {
    /// Not known here.
    pub fn current() -> i32 {
        -1
    }
    pub fn leave(_: i32) {}
}
