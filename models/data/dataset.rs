//! What a loader reads from.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use smalti::Result;

use super::RgbImage;

/// An image with what is known about it.
#[derive(Clone, Debug)]
pub struct Sample<L> {
    /// The pixels; shared, so that a cache can hand them out without a copy.
    pub image: Arc<RgbImage>,
    /// Class number, caption, ...
    pub label: L,
}

/// Images by index. Reading must depend on the index alone; threads call it at the same time.
pub trait Dataset: Send + Sync + 'static {
    /// What comes with an image: `i64` class numbers, or captions and the like.
    type Label: Clone + Send + 'static;

    /// Number of samples.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sample number `index`. An error is taken for an unreadable sample: the loader notes it and goes on.
    fn get(&self, index: usize) -> Result<Sample<Self::Label>>;

    /// What to call sample `index` in a message: its path, mostly.
    fn name(&self, index: usize) -> String;
}

/// Keeps decoded samples in memory until a number of bytes is reached, then reads the others anew every time.
///
/// Nothing is ever thrown out: every epoch reads every sample once, so what came first is as good as any.
pub struct Cached<D: Dataset> {
    inner: D,
    limit: usize,
    kept: Mutex<Kept<D::Label>>,
}

struct Kept<L> {
    samples: HashMap<usize, Sample<L>>,
    bytes: usize,
}

impl<D: Dataset> Cached<D> {
    /// Keeps up to `limit` bytes of pixels of `inner`.
    pub fn new(inner: D, limit: usize) -> Self {
        Cached { inner, limit, kept: Mutex::new(Kept { samples: HashMap::new(), bytes: 0 }) }
    }

    /// The dataset behind.
    pub fn inner(&self) -> &D {
        &self.inner
    }

    /// Bytes of pixels kept now.
    pub fn bytes(&self) -> usize {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).bytes
    }
}

impl<D: Dataset> Dataset for Cached<D> {
    type Label = D::Label;

    fn len(&self) -> usize {
        self.inner.len()
    }

    fn get(&self, index: usize) -> Result<Sample<D::Label>> {
        if let Some(sample) = self.kept.lock().unwrap_or_else(PoisonError::into_inner).samples.get(&index) {
            return Ok(sample.clone());
        }
        let sample = self.inner.get(index)?;
        let size = sample.image.len();
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.bytes + size <= self.limit && !kept.samples.contains_key(&index) {
            kept.bytes += size;
            kept.samples.insert(index, sample.clone());
        }
        Ok(sample)
    }

    fn name(&self, index: usize) -> String {
        self.inner.name(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    struct Counting(AtomicUsize);

    impl Dataset for Counting {
        type Label = i64;
        fn len(&self) -> usize {
            4
        }
        fn get(&self, index: usize) -> Result<Sample<i64>> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(Sample { image: Arc::new(RgbImage::new(2, 2)), label: index as i64 })
        }
        fn name(&self, index: usize) -> String {
            index.to_string()
        }
    }

    #[test]
    fn cache_keeps_to_its_limit() {
        let cached = Cached::new(Counting(AtomicUsize::new(0)), 30);
        for round in 0..3 {
            for index in 0..4 {
                assert_eq!(cached.get(index).unwrap().label, index as i64, "round {round}");
            }
        }
        assert_eq!(cached.bytes(), 24);
        // Two fit; the other two are read in each of three rounds.
        assert_eq!(cached.inner().0.load(Ordering::Relaxed), 2 + 2 * 3);
    }
}
