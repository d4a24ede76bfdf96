//! A hasher for numbers that nobody outside chooses: those of pages, chunks and frames.
//!
//! Every fault-back looks several of them up. The one of the standard library withstands keys that
//! are chosen to collide, which here would be no more than a device that slows itself down, and
//! takes as long for one number as the rest of a look-up.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// A map by such numbers.
pub(super) type NumberMap<K, V> = HashMap<K, V, BuildHasherDefault<NumberHasher>>;

/// Multiplies each number in, and folds the product: its upper bits depend on all of the number's.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct NumberHasher(u64);

/// The golden ratio, as a fraction of 2^64, made odd.
const RATIO: u64 = 0x9e37_79b9_7f4a_7c15;

impl Hasher for NumberHasher {
    #[inline]
    fn write_u64(&mut self, number: u64) {
        let product = u128::from(self.0 ^ number) * u128::from(RATIO);
        self.0 = (product >> 64) as u64 ^ product as u64;
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(byte.into()));
    }

    #[inline]
    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// The table of the standard library takes seven bits at the top, and as many at the bottom as it
    /// has places.
    #[test]
    fn neighbours_are_spread_over_both_ends_of_the_hash() {
        for step in [1_u64, 512, 1 << 18, 1 << 30] {
            let hash = |index: u64| {
                let mut hasher = NumberHasher::default();
                hasher.write_u64(3);
                hasher.write_u64(0x7f00_0000 + index * step);
                hasher.finish()
            };
            let hashes: Vec<u64> = (0..1024).map(hash).collect();
            let low: HashSet<u64> = hashes.iter().map(|hash| hash & 1023).collect();
            let high: HashSet<u64> = hashes.iter().map(|hash| hash >> 57).collect();
            assert!(low.len() > 512 && high.len() > 100, "{step}: {} {}", low.len(), high.len());
        }
    }
}
