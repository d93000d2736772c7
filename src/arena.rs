//! The books of a memory pool: best fit out of large chunks that are kept; blocks split, freed neighbours merge.
//! Knows addresses only, so that it serves host memory and GPU memory alike.

use std::collections::{BTreeMap, BTreeSet};

/// What a pool holds, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// In buffers that are alive.
    pub live: usize,
    /// The most that was alive at any time.
    pub peak: usize,
    /// Taken from the system and not given back.
    pub reserved: usize,
}

#[derive(Default)]
pub(crate) struct Arena {
    /// Free blocks by address: neighbours are found here.
    by_address: BTreeMap<usize, usize>,
    /// The same as (size, address): the best fit is found here.
    by_size: BTreeSet<(usize, usize)>,
    /// Chunks: address and size.
    chunks: BTreeMap<usize, usize>,
    pub stats: Stats,
}

impl Arena {
    /// The address of a free block of `bytes`; `None` if a new chunk is needed.
    pub fn take(&mut self, bytes: usize) -> Option<usize> {
        let (size, address) = self.by_size.range((bytes, 0)..).next().copied()?;
        self.remove(address, size);
        if size > bytes {
            self.insert(address + bytes, size - bytes);
        }
        self.stats.live += bytes;
        self.stats.peak = self.stats.peak.max(self.stats.live);
        Some(address)
    }

    /// Takes a block back, with the size that it was taken with.
    pub fn give(&mut self, mut address: usize, mut size: usize) {
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

    /// A new chunk, free as a whole.
    pub fn grow(&mut self, address: usize, size: usize) {
        self.chunks.insert(address, size);
        self.stats.reserved += size;
        self.insert(address, size);
    }

    /// Takes out the chunks that hold no live block, as (address, size).
    pub fn trim(&mut self) -> Vec<(usize, usize)> {
        let whole = |(a, n): &(usize, usize)| self.by_address.get(a) == Some(n);
        let empty: Vec<_> = self.chunks.iter().map(|(&a, &n)| (a, n)).filter(whole).collect();
        for &(address, size) in &empty {
            self.remove(address, size);
            self.chunks.remove(&address);
            self.stats.reserved -= size;
        }
        empty
    }

    fn insert(&mut self, address: usize, size: usize) {
        self.by_address.insert(address, size);
        self.by_size.insert((size, address));
    }

    fn remove(&mut self, address: usize, size: usize) {
        self.by_address.remove(&address);
        self.by_size.remove(&(size, address));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_split_merge_and_return() {
        let mut arena = Arena::default();
        assert_eq!(arena.take(1), None);
        arena.grow(1 << 30, 8 << 20);
        let [a, b, c] = [1, 2, 4].map(|mib| arena.take(mib << 20).unwrap_or(0));
        assert_eq!((b, c), (a + (1 << 20), a + (3 << 20)));
        arena.give(b, 2 << 20);
        assert_eq!(arena.take(2 << 20), Some(b), "the best fit is the hole");
        assert!(arena.trim().is_empty(), "a chunk in use stays");
        arena.give(a, 1 << 20);
        arena.give(c, 4 << 20);
        arena.give(b, 2 << 20);
        assert_eq!(arena.by_address.len(), 1, "neighbours merge");
        assert_eq!(arena.stats, Stats { live: 0, peak: 7 << 20, reserved: 8 << 20 });
        // a chunk that happens to lie behind another is not merged with it
        arena.grow((1 << 30) + (8 << 20), 1 << 20);
        assert_eq!(arena.take(9 << 20), None);
        assert_eq!(arena.trim().len(), 2);
        assert_eq!(arena.stats.reserved, 0);
    }
}
