//! The threads behind an epoch.

use std::{
    collections::VecDeque,
    iter::FusedIterator,
    ops::Range,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
};

use smalti::{Error, Result};

use super::{
    Dataset, Transform,
    loader::{Batch, Ready, Source, assemble},
};

/// The batches of one epoch, in order. Dropping it stops the workers and waits for the sample that each has in
/// hand.
pub struct Epoch<L> {
    shared: Arc<Shared<L>>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared<L> {
    state: Mutex<State<L>>,
    /// Signalled when a batch was taken, so that another may be begun, and on the end.
    room: Condvar,
    /// Signalled when a batch is complete.
    done: Condvar,
}

/// Batches number `front..`, those begun; samples are handed out in order of position.
struct State<L> {
    slots: VecDeque<Slot<L>>,
    front: usize,
    next_position: usize,
    /// Position of the epoch's end.
    end: usize,
    batch_size: usize,
    batches: usize,
    prefetch: usize,
    stop: bool,
}

struct Slot<L> {
    samples: Vec<Option<Ready<L>>>,
    missing: usize,
    result: Option<Result<Option<Batch<L>>>>,
}

impl<L> State<L> {
    /// Opens slots up to the bound of the prefetch and wakes nobody.
    fn open_slots(&mut self) {
        while self.slots.len() < self.prefetch && self.front + self.slots.len() < self.batches {
            let start = (self.front + self.slots.len()) * self.batch_size;
            let missing = self.batch_size.min(self.end - start);
            let samples = (0..missing).map(|_| None).collect();
            self.slots.push_back(Slot { samples, missing, result: None });
        }
    }

    /// The next position to work on, if its batch is open.
    fn take_position(&mut self) -> Option<usize> {
        let position = self.next_position;
        let open = self.front + self.slots.len();
        (position < self.end && position / self.batch_size < open).then(|| {
            self.next_position += 1;
            position
        })
    }
}

impl<L> Shared<L> {
    fn lock(&self) -> MutexGuard<'_, State<L>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for work; `None` when there will be no more.
    fn next_position(&self) -> Option<usize> {
        let mut state = self.lock();
        loop {
            if state.stop || state.next_position >= state.end {
                return None;
            }
            if let Some(position) = state.take_position() {
                return Some(position);
            }
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Stores a sample and, if its batch has all now, puts the batch together, outside of the lock.
    fn store(&self, position: usize, sample: Result<Option<Ready<L>>>) {
        let mut state = self.lock();
        let number = position / state.batch_size;
        let place = position % state.batch_size;
        let front = state.front;
        // A batch that failed may have been taken before its last samples came in.
        let Some(slot) = number.checked_sub(front).and_then(|at| state.slots.get_mut(at)) else { return };
        slot.missing -= 1;
        match sample {
            Ok(sample) => slot.samples[place] = sample,
            Err(error) => slot.result = Some(Err(error)),
        }
        if slot.missing == 0 && slot.result.is_none() {
            let samples = std::mem::take(&mut slot.samples);
            drop(state);
            let batch = assemble(number, samples.into_iter().flatten().collect());
            state = self.lock();
            let front = state.front;
            if let Some(slot) = number.checked_sub(front).and_then(|at| state.slots.get_mut(at)) {
                slot.result = Some(batch);
            }
        }
        drop(state);
        self.done.notify_one();
    }

    fn stop(&self) {
        self.lock().stop = true;
        self.room.notify_all();
    }
}

impl<L: Clone + Send + 'static> Epoch<L> {
    /// Starts the workers for the batches with these numbers.
    pub(super) fn start<D, T>(
        source: &Arc<Source<D, T>>,
        epoch: u64,
        order: Vec<usize>,
        numbers: Range<usize>,
    ) -> Self
    where
        D: Dataset<Label = L>,
        T: Transform,
    {
        let options = source.options;
        let first = numbers.start.min(numbers.end);
        let mut state = State {
            slots: VecDeque::new(),
            front: first,
            next_position: first * options.batch_size,
            end: (numbers.end * options.batch_size).min(order.len()),
            batch_size: options.batch_size,
            batches: numbers.end,
            prefetch: options.prefetch,
            stop: false,
        };
        state.open_slots();
        let count = options.threads.min(state.end.saturating_sub(state.next_position));
        let shared =
            Arc::new(Shared { state: Mutex::new(state), room: Condvar::new(), done: Condvar::new() });
        let order = Arc::new(order);
        let mut workers = Vec::with_capacity(count);
        for _ in 0..count {
            let (shared, source, order) = (shared.clone(), source.clone(), order.clone());
            let work = move || {
                while let Some(position) = shared.next_position() {
                    shared.store(position, source.fetch_guarded(epoch, &order, position));
                }
            };
            match thread::Builder::new().name("smalti-data".into()).spawn(work) {
                Ok(worker) => workers.push(worker),
                Err(_) => break,
            }
        }
        if workers.is_empty()
            && let Some(slot) = shared.lock().slots.front_mut()
        {
            slot.result = Some(Err(Error::msg("loader: the system starts no worker thread")));
        }
        Epoch { shared, workers }
    }
}

impl<L> Iterator for Epoch<L> {
    type Item = Result<Batch<L>>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut state = self.shared.lock();
        loop {
            if state.stop || state.front >= state.batches {
                return None;
            }
            let Some(result) = state.slots.front_mut().and_then(|slot| slot.result.take()) else {
                state = self.shared.done.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.slots.pop_front();
            state.front += 1;
            state.open_slots();
            self.shared.room.notify_all();
            match result {
                Ok(Some(batch)) => return Some(Ok(batch)),
                Ok(None) => {}
                Err(error) => {
                    state.stop = true;
                    return Some(Err(error));
                }
            }
        }
    }
}

impl<L> FusedIterator for Epoch<L> {}

impl<L> Drop for Epoch<L> {
    fn drop(&mut self) {
        self.shared.stop();
        for worker in self.workers.drain(..) {
            // Panics of the dataset were turned into errors in the thread.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests;
