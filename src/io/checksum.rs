//! CRC-32 (of zip and gzip): any one damaged stretch of up to 32 bits is noticed, others all but always.

use crc32fast::Hasher;
use rayon::prelude::*;

/// Bytes that are worth a task of their own.
const PIECE: usize = 1 << 20;

/// Of `data`, on all threads.
pub(super) fn crc32(data: &[u8]) -> u32 {
    with_prefix(&[], data)
}

/// Of `prefix` followed by `data`.
pub(super) fn with_prefix(prefix: &[u8], data: &[u8]) -> u32 {
    let mut all = of_piece(prefix);
    let rest: Vec<Hasher> = data.par_chunks(PIECE).map(of_piece).collect();
    rest.iter().for_each(|piece| all.combine(piece));
    all.finalize()
}

fn of_piece(bytes: &[u8]) -> Hasher {
    let mut hasher = Hasher::new();
    hasher.update(bytes);
    hasher
}

/// The message for a `stored` checksum that is not the one of what is there.
pub(super) fn mismatch(what: &str, stored: &str, found: u32) -> String {
    format!("{what} is damaged: its CRC-32 should be {stored}, is {found:08x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_make_the_whole() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        let data: Vec<u8> = (0..2 * PIECE + 77).map(|i| ((i * i) >> 3) as u8).collect();
        for n in [0, 1, PIECE, PIECE + 1, data.len()] {
            assert_eq!(crc32(&data[..n]), crc32fast::hash(&data[..n]));
            assert_eq!(with_prefix(&data[..n / 2], &data[n / 2..n]), crc32fast::hash(&data[..n]));
        }
    }
}
