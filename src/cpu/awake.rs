//! Keeps the pool's threads at hand between one parallel operation and the next.
//!
//! Rayon's threads fall asleep some 20 microseconds after their last task, and to wake one takes as long as a whole
//! layer norm, above all in a virtual machine. So after an operation they look for new tasks for another [`PATIENCE`],
//! and meanwhile give way to whoever else wants the processor, as the threads of OpenMP do.

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
    /// Is this thread within a parallel operation, or waiting for one?
    static BUSY: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f`, which hands work to the pool.
pub fn with<R>(f: impl FnOnce() -> R) -> R {
    // A task that splits itself has its threads awake already.
    if BUSY.get() {
        return f();
    }
    let others = rayon::current_num_threads() - usize::from(rayon::current_thread_index().is_some());
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
        for _ in 0..LOOKS {
            if rayon::yield_now() == Some(Yield::Executed) {
                since = Instant::now();
            }
            std::hint::spin_loop();
        }
        std::thread::yield_now();
    }
}
