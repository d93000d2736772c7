//! Keeps the pool's threads at hand between one parallel operation and the next.
//!
//! Rayon's threads fall asleep some 20 microseconds after their last task. To wake one takes as long as a whole layer
//! norm, above all in a virtual machine: there Linux takes a halted processor for one that the host has taken away,
//! and puts the woken thread on the processor of its waker, which goes on working. Until the load balancer comes,
//! tens of milliseconds later, one processor does the work of two. Two remedies, for calls from outside the pool and
//! from the main thread:
//!
//! - After its tasks a thread looks for new ones for another [`PATIENCE`] before it sleeps, and meanwhile gives way to
//!   whoever else wants the processor.
//! - Where the main thread works too (`use_current_thread`), the others keep off the processor that it is on.

use rayon::Yield;
use std::{
    cell::Cell,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
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

thread_local! {
    static WAITS: Cell<bool> = const { Cell::new(false) };
}

/// To be called before work is handed to the pool.
pub fn call() {
    let caller = rayon::current_thread_index();
    let main = caller == Some(0) && processor::is_main();
    // A task that splits itself has its threads awake already.
    if caller.is_some() && !main {
        return;
    }
    let others = rayon::current_num_threads() - usize::from(main);
    for place in PLACES.iter().take(others) {
        if place.load(Relaxed) || place.swap(true, Relaxed) {
            continue;
        }
        rayon::spawn(move || {
            // Whoever comes across this while it waits for other threads (the main thread does) must not wait here.
            if !(main && processor::is_main()) && !WAITS.replace(true) {
                if main {
                    processor::enlist();
                }
                wait();
                WAITS.set(false);
            }
            place.store(false, Relaxed);
        });
    }
    if main {
        processor::keep_off();
    }
}

/// Works on whatever turns up until nothing has for a while.
fn wait() {
    let mut since = Instant::now();
    while since.elapsed() < PATIENCE {
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
    use super::{MOST, Relaxed};
    use std::{
        cell::Cell,
        sync::atomic::{AtomicI32, AtomicUsize},
    };

    /// The pool's threads by their index, as the system numbers them; 0 for those that have not waited yet.
    static THREADS: [AtomicI32; MOST] = [const { AtomicI32::new(0) }; MOST];
    /// The processor that each keeps off, plus one.
    static AVOIDED: [AtomicUsize; MOST] = [const { AtomicUsize::new(0) }; MOST];

    fn thread() -> i32 {
        thread_local! {
            static THREAD: Cell<i32> = const { Cell::new(0) };
        }
        if THREAD.get() == 0 {
            THREAD.set(unsafe { libc::gettid() });
        }
        THREAD.get()
    }

    /// Is this the thread that the process began with?
    pub fn is_main() -> bool {
        thread_local! {
            static MAIN: Cell<Option<bool>> = const { Cell::new(None) };
        }
        let main = MAIN.get().unwrap_or_else(|| thread() == unsafe { libc::getpid() });
        MAIN.set(Some(main));
        main
    }

    /// This thread of the main thread's pool makes itself known.
    pub fn enlist() {
        let Some(index) = rayon::current_thread_index().filter(|&i| i < MOST) else { return };
        if THREADS[index].swap(thread(), Relaxed) != thread() {
            AVOIDED[index].store(0, Relaxed);
        }
    }

    /// The others may run wherever this thread may, but for where it is.
    pub fn keep_off() {
        let here = unsafe { libc::sched_getcpu() };
        let Ok(here) = usize::try_from(here) else { return };
        for (thread, avoided) in THREADS.iter().zip(&AVOIDED).take(rayon::current_num_threads()) {
            let thread = thread.load(Relaxed);
            if thread == 0 || avoided.load(Relaxed) == here + 1 {
                continue;
            }
            avoided.store(here + 1, Relaxed);
            let size = size_of::<libc::cpu_set_t>();
            unsafe {
                let mut allowed: libc::cpu_set_t = std::mem::zeroed();
                // A failure (more processors than a set holds, a sandbox) leaves things as they are.
                if here < libc::CPU_SETSIZE as usize && libc::sched_getaffinity(0, size, &mut allowed) == 0 {
                    libc::CPU_CLR(here, &mut allowed);
                    if libc::CPU_COUNT(&allowed) > 0 {
                        libc::sched_setaffinity(thread, size, &allowed);
                    }
                }
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod processor {
    /// Not known here: the main thread is treated as any other.
    pub fn is_main() -> bool {
        false
    }
    pub fn enlist() {}
    pub fn keep_off() {}
}
