//! Batches in a fixed order, made by threads ahead of their use.

use std::{
    collections::BTreeMap,
    num::NonZeroUsize,
    panic::{self, AssertUnwindSafe},
    sync::{Arc, Mutex, PoisonError},
};

use smalti::{Error, Result, Rng, ensure};

use super::{Dataset, Transform, View, worker::Epoch};

/// What happens to a sample that cannot be read. Either way it is listed in [`Loader::skipped`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnUnreadable {
    /// The next readable sample in the epoch's order takes its place, augmented anew, so that batches keep
    /// their size: for training.
    Replace,
    /// The batch is smaller by it; a batch that loses all its samples is left out: for evaluation, where no
    /// sample may count twice.
    Drop,
}

/// Settings of a [`Loader`].
#[derive(Clone, Copy, Debug)]
pub struct LoaderOptions {
    /// Samples per batch, of this rank's part.
    pub batch_size: usize,
    /// Number of this rank and how many ranks share each batch: rank r's part comes behind those of lower ranks.
    /// `(0, 1)` for one that has all of it.
    pub share: (usize, usize),
    /// A new order every epoch; otherwise that of the dataset.
    pub shuffle: bool,
    /// Leave out the last batch if it is not full.
    pub drop_last: bool,
    /// Seed of order and augmentation.
    pub seed: u64,
    /// Number of worker threads; 0 for one a core.
    pub threads: usize,
    /// Number of batches that may be under way or wait, at least 1.
    pub prefetch: usize,
    /// What happens to unreadable samples.
    pub on_unreadable: OnUnreadable,
}

impl Default for LoaderOptions {
    /// Training: batches of 64, shuffled, full ones only, all cores, two batches ahead, replacing.
    fn default() -> Self {
        LoaderOptions {
            batch_size: 64,
            share: (0, 1),
            shuffle: true,
            drop_last: true,
            seed: 0,
            threads: 0,
            prefetch: 2,
            on_unreadable: OnUnreadable::Replace,
        }
    }
}

impl LoaderOptions {
    /// Evaluation: every sample once and in order; unreadable ones are left out.
    pub fn evaluation(batch_size: usize) -> Self {
        let on_unreadable = OnUnreadable::Drop;
        LoaderOptions { batch_size, shuffle: false, drop_last: false, on_unreadable, ..Self::default() }
    }
}

/// A batch of images of one size.
#[derive(Clone, Debug, PartialEq)]
pub struct Images {
    /// N, channels, rows, columns.
    pub shape: [usize; 4],
    /// The values, in this order.
    pub data: Vec<f32>,
}

/// What the training loop gets.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch<L = i64> {
    /// Number of this batch in its epoch.
    pub number: usize,
    /// One entry a view that the transform makes; mostly one.
    pub views: Vec<Images>,
    /// Labels.
    pub labels: Vec<L>,
    /// Which samples of the dataset these are.
    pub indices: Vec<usize>,
}

/// A sample that could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// Its number in the dataset.
    pub index: usize,
    /// Its path.
    pub name: String,
    /// What is wrong.
    pub reason: String,
}

/// Runs a dataset and a transform on worker threads.
///
/// Sample i of epoch e is augmented with the stream (seed, e, i) and put where the epoch's order has it, so
/// batches do not depend on the number of threads, nor on the batches before.
pub struct Loader<D: Dataset, T: Transform> {
    source: Arc<Source<D, T>>,
}

/// What the workers share.
pub(super) struct Source<D, T> {
    pub(super) dataset: D,
    transform: T,
    pub(super) options: LoaderOptions,
    skipped: Mutex<BTreeMap<usize, Skipped>>,
}

/// One sample, ready.
pub(super) struct Ready<L> {
    pub(super) index: usize,
    pub(super) label: L,
    pub(super) views: Vec<View>,
}

impl<D: Dataset, T: Transform> Loader<D, T> {
    /// A loader of `dataset`.
    ///
    /// Errors: an empty dataset, a batch size of 0, `drop_last` with too few samples for one batch.
    pub fn new(dataset: D, transform: T, mut options: LoaderOptions) -> Result<Self> {
        let (n, size, (rank, world)) = (dataset.len(), options.batch_size, options.share);
        ensure!(n > 0, "loader", "the dataset is empty");
        ensure!(size > 0, "loader", "batch_size is 0");
        ensure!(
            rank < world && (world == 1 || options.drop_last),
            "loader",
            "rank {rank} of {world} ranks, which share full batches alone (drop_last)"
        );
        let size = size * world;
        ensure!(
            !options.drop_last || n >= size,
            "loader",
            "{n} samples do not fill one batch of {size}, and drop_last leaves out what is not full"
        );
        if options.threads == 0 {
            options.threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        }
        options.prefetch = options.prefetch.max(1);
        let skipped = Mutex::new(BTreeMap::new());
        Ok(Loader { source: Arc::new(Source { dataset, transform, options, skipped }) })
    }

    /// The dataset.
    pub fn dataset(&self) -> &D {
        &self.source.dataset
    }

    /// Batches per epoch (before any is left out for want of readable samples).
    pub fn batches(&self) -> usize {
        let (n, options) = (self.source.dataset.len(), &self.source.options);
        let size = options.batch_size * options.share.1;
        if options.drop_last { n / size } else { n.div_ceil(size) }
    }

    /// The order of an epoch: which sample stands where in this rank's batches.
    pub fn order(&self, epoch: u64) -> Vec<usize> {
        let (n, options) = (self.source.dataset.len(), &self.source.options);
        let order = if options.shuffle { self.source.stream(epoch).permutation(n) } else { (0..n).collect() };
        match options.share {
            (_, 1) => order,
            (rank, world) => {
                let own = options.batch_size;
                let batches = order.chunks_exact(own * world);
                batches.flat_map(|batch| batch.iter().skip(rank * own).take(own)).copied().collect()
            }
        }
    }

    /// The batches of an epoch. After an `Err` the iterator ends. It may be dropped at any time.
    pub fn epoch(&self, epoch: u64) -> Epoch<D::Label> {
        self.epoch_from(epoch, 0)
    }

    /// The batches of an epoch from number `first` on, for taking up a run where it stopped.
    pub fn epoch_from(&self, epoch: u64, first: usize) -> Epoch<D::Label> {
        Epoch::start(&self.source, epoch, self.order(epoch), first..self.batches())
    }

    /// The samples that could not be read so far, by index.
    pub fn skipped(&self) -> Vec<Skipped> {
        self.source.skipped.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}

impl<D: Dataset, T: Transform> Source<D, T> {
    fn stream(&self, epoch: u64) -> Rng {
        Rng::new(self.options.seed).stream(epoch)
    }

    /// The sample at `position` of an epoch's order; `None` if it is to be left out.
    pub(super) fn fetch(
        &self,
        epoch: u64,
        order: &[usize],
        position: usize,
    ) -> Result<Option<Ready<D::Label>>> {
        for ahead in 0..order.len() {
            let index = order[(position + ahead) % order.len()];
            let rng = self.stream(epoch).stream(index as u64);
            // A stand-in must not repeat the augmentation that the sample has in its own place.
            let rng = if ahead == 0 { rng } else { rng.stream(ahead as u64) };
            match self.sample(index, rng)? {
                Some(ready) => return Ok(Some(ready)),
                None if self.options.on_unreadable == OnUnreadable::Drop => return Ok(None),
                None => {}
            }
        }
        let first = self.skipped.lock().unwrap_or_else(PoisonError::into_inner).values().next().cloned();
        let example = first.map_or(String::new(), |s| format!(", the first because: {}", s.reason));
        Err(Error::msg(format!("loader: none of the {} samples can be read{example}", order.len())))
    }

    /// `None` if the sample cannot be read, now or before.
    fn sample(&self, index: usize, mut rng: Rng) -> Result<Option<Ready<D::Label>>> {
        if self.skipped.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&index) {
            return Ok(None);
        }
        let sample = match self.dataset.get(index) {
            Ok(sample) => sample,
            Err(error) => {
                let skipped = Skipped { index, name: self.dataset.name(index), reason: error.to_string() };
                self.skipped.lock().unwrap_or_else(PoisonError::into_inner).insert(index, skipped);
                return Ok(None);
            }
        };
        let views = self.transform.views(&sample.image, &mut rng)?;
        Ok(Some(Ready { index, label: sample.label, views }))
    }

    /// [`fetch`](Self::fetch), with a panic in the dataset or the transform turned into an error: a thread that
    /// died silently would leave the epoch waiting for ever.
    pub(super) fn fetch_guarded(
        &self,
        epoch: u64,
        order: &[usize],
        position: usize,
    ) -> Result<Option<Ready<D::Label>>> {
        panic::catch_unwind(AssertUnwindSafe(|| self.fetch(epoch, order, position))).unwrap_or_else(|_| {
            let name = self.dataset.name(order[position]);
            Err(Error::msg(format!("loader: a worker thread panicked at or after {name} (epoch {epoch})")))
        })
    }
}

/// Puts samples together; `None` if there are none.
pub(super) fn assemble<L>(number: usize, samples: Vec<Ready<L>>) -> Result<Option<Batch<L>>> {
    let Some(first) = samples.first() else { return Ok(None) };
    let n = samples.len();
    let shapes: Vec<[usize; 3]> = first.views.iter().map(|view| view.shape).collect();
    let mut views: Vec<Images> = shapes
        .iter()
        .map(|&[c, h, w]| Images { shape: [n, c, h, w], data: Vec::with_capacity(n * c * h * w) })
        .collect();
    let (mut labels, mut indices) = (Vec::with_capacity(n), Vec::with_capacity(n));
    for sample in samples {
        let own: Vec<[usize; 3]> = sample.views.iter().map(|view| view.shape).collect();
        ensure!(
            own == shapes,
            "loader",
            "sample {} has views of {own:?}, the batch begins with {shapes:?}; crop or resize to one size",
            sample.index
        );
        for (images, view) in views.iter_mut().zip(&sample.views) {
            images.data.extend_from_slice(&view.data);
        }
        labels.push(sample.label);
        indices.push(sample.index);
    }
    Ok(Some(Batch { number, views, labels, indices }))
}
