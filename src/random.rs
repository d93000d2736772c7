//! Random numbers: Philox4x32-10, a counter-based generator.
//!
//! An [`Rng`] is three numbers, (seed, stream, counter), and the n-th value of a stream depends on nothing
//! else: the same numbers come out on every device and for any number of threads. Source: Salmon et al.,
//! "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

/// A stream of random numbers. Cheap to copy; a copy repeats the same numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rng {
    seed: u64,
    stream: u64,
    counter: u64,
}

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Ten rounds of Philox4x32 on `counter` under `key`: four independent 32-bit words.
#[inline(always)]
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * u64::from(MULTIPLIERS[0]);
        let b = u64::from(counter[2]) * u64::from(MULTIPLIERS[1]);
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// A word as a number in [0, 1), 24 bits.
#[inline(always)]
pub fn unit_f32(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

impl Rng {
    /// Stream 0 of `seed`.
    pub fn new(seed: u64) -> Self {
        Rng { seed, stream: 0, counter: 0 }
    }

    /// An independent stream of the same seed, at its start. Streams nest: the new number is a hash of this
    /// stream's and `stream`, so `rng.stream(epoch).stream(index)` names one place without state.
    pub fn stream(&self, stream: u64) -> Self {
        let [a, b, _, _] = philox(
            [stream as u32, (stream >> 32) as u32, self.stream as u32, (self.stream >> 32) as u32],
            [0x736D_616C, 0x7469_0001],
        );
        Rng { seed: self.seed, stream: u64::from(a) | u64::from(b) << 32, counter: 0 }
    }

    /// Takes a fresh independent stream off this one, which moves on.
    pub fn fork(&mut self) -> Self {
        let n = self.next_u64();
        self.stream(n)
    }

    /// (seed, stream, counter), all that there is to save.
    pub fn state(&self) -> [u64; 3] {
        [self.seed, self.stream, self.counter]
    }

    /// The generator of a saved [`state`](Self::state).
    pub fn from_state([seed, stream, counter]: [u64; 3]) -> Self {
        Rng { seed, stream, counter }
    }

    /// Word number `index` of this stream, counted from its start; does not move.
    #[inline(always)]
    pub fn word(&self, index: u64) -> u32 {
        self.block(index / 4)[(index % 4) as usize]
    }

    /// Words `4 * block .. 4 * block + 4` of this stream.
    #[inline(always)]
    pub fn block(&self, block: u64) -> [u32; 4] {
        philox(
            [block as u32, (block >> 32) as u32, self.stream as u32, (self.stream >> 32) as u32],
            [self.seed as u32, (self.seed >> 32) as u32],
        )
    }

    /// `N` blocks from `first` on, for bulk consumers in [`simd`](crate::cpu::simd::simd): word w of block
    /// `first + i` is `[w][i]`.
    #[inline(always)]
    pub fn blocks<const N: usize>(&self, first: u64) -> [[u32; N]; 4] {
        let mut c = [[0; N], [0; N], [self.stream as u32; N], [(self.stream >> 32) as u32; N]];
        for i in 0..N {
            let block = first.wrapping_add(i as u64);
            (c[0][i], c[1][i]) = (block as u32, (block >> 32) as u32);
        }
        let mut key = [self.seed as u32, (self.seed >> 32) as u32];
        for _ in 0..10 {
            for i in 0..N {
                let a = u64::from(c[0][i]) * u64::from(MULTIPLIERS[0]);
                let b = u64::from(c[2][i]) * u64::from(MULTIPLIERS[1]);
                c[0][i] = (b >> 32) as u32 ^ c[1][i] ^ key[0];
                c[1][i] = b as u32;
                c[2][i] = (a >> 32) as u32 ^ c[3][i] ^ key[1];
                c[3][i] = a as u32;
            }
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        c
    }

    /// Reserves `words` words for a bulk consumer and returns the index of the first, rounded up to a whole
    /// block of four, so that consumers can read with [`block`](Self::block).
    pub fn reserve(&mut self, words: u64) -> u64 {
        let start = self.counter.next_multiple_of(4);
        self.counter = start + words;
        start
    }

    /// The next 32 bits.
    #[inline]
    pub fn next_u32(&mut self) -> u32 {
        let word = self.word(self.counter);
        self.counter += 1;
        word
    }

    /// The next 64 bits.
    #[inline]
    pub fn next_u64(&mut self) -> u64 {
        u64::from(self.next_u32()) | u64::from(self.next_u32()) << 32
    }

    /// Uniform in [0, 1).
    #[inline]
    pub fn f32(&mut self) -> f32 {
        unit_f32(self.next_u32())
    }

    /// Uniform in [0, 1), 53 bits.
    #[inline]
    pub fn f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in [low, high).
    pub fn range(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.f64()
    }

    /// A whole number in 0..n, without bias. `n` must not be 0.
    pub fn below(&mut self, n: u64) -> u64 {
        // Lemire's method: multiply, reject the few words that would favour small results.
        let threshold = n.wrapping_neg() % n;
        loop {
            let product = u128::from(self.next_u64()) * u128::from(n);
            if product as u64 >= threshold {
                return (product >> 64) as u64;
            }
        }
    }

    /// True with probability `p`.
    pub fn bernoulli(&mut self, p: f64) -> bool {
        self.f64() < p
    }

    /// Standard normal (Box-Muller, the cosine half).
    pub fn normal(&mut self) -> f64 {
        let (u, v) = (1.0 - self.f64(), self.f64());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    /// Gamma(shape, 1): Marsaglia and Tsang (2000), with their boost for shapes below 1.
    pub fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            let u = 1.0 - self.f64();
            return self.gamma(shape + 1.0) * u.powf(1.0 / shape);
        }
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let x = self.normal();
            let v = (1.0 + c * x).powi(3);
            let u = 1.0 - self.f64();
            if v > 0.0 && u.ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                return d * v;
            }
        }
    }

    /// Beta(a, b).
    pub fn beta(&mut self, a: f64, b: f64) -> f64 {
        let (x, y) = (self.gamma(a), self.gamma(b));
        x / (x + y)
    }

    /// Fisher-Yates shuffle.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }

    /// The numbers 0..n in random order.
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        self.shuffle(&mut order);
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 distribution (kat_vectors, philox4x32 10).
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox([!0; 4], [!0; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            philox([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn blocks_are_blocks() {
        let rng = Rng::new(0x1234_5678_9abc).stream(5);
        let first = u64::from(u32::MAX) - 3;
        let words = rng.blocks::<16>(first);
        for i in 0..16 {
            assert_eq!(words.map(|w| w[i]), rng.block(first + i as u64));
        }
    }

    #[test]
    fn moments() {
        let mut rng = Rng::new(7);
        let n = 20_000;
        let mean = |f: &mut dyn FnMut() -> f64| (0..n).map(|_| f()).sum::<f64>() / n as f64;
        assert!((mean(&mut || rng.f64()) - 0.5).abs() < 0.01);
        assert!(mean(&mut || rng.normal()).abs() < 0.03);
        assert!((mean(&mut || rng.normal().powi(2)) - 1.0).abs() < 0.05);
        assert!((mean(&mut || rng.gamma(0.8)) - 0.8).abs() < 0.03);
        assert!((mean(&mut || rng.beta(2.0, 6.0)) - 0.25).abs() < 0.01);
        assert!((mean(&mut || rng.below(10) as f64) - 4.5).abs() < 0.1);
    }

    #[test]
    fn streams_differ_and_repeat() {
        let root = Rng::new(1);
        assert_eq!(root.stream(3).word(5), root.stream(3).word(5));
        assert_ne!(root.stream(3).word(5), root.stream(4).word(5));
        let mut order = root.stream(9).permutation(50);
        order.sort();
        assert_eq!(order, (0..50).collect::<Vec<_>>());
    }
}
