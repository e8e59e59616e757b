//! How much deriving keys may cost: a header that anyone may have written names the price of each of its keyslots.
//!
//! Each price alone is bounded where the header is read; here all that one passphrase costs is. Pure, so that a refusal costs nothing.

use super::Error;
use super::keyslot::{Hash, Kdf};
use super::metadata::{Digest, Keyslot};
use super::open::Header;
use std::cmp::Reverse;

/// 256 GiB of Argon2's passes, some four minutes of one core: 32 keyslots as cryptsetup makes them on a fast machine (1 GiB, 8 passes), or
/// three of the longest PBKDF2 that is read at all. Beyond it a header is an attack or damage.
pub(super) const MAX_WORK_KIB: u64 = 256 << 20;
/// Rounds of PBKDF2, each for one block of output, in the time in which Argon2 fills a KiB (a microsecond): a slow core's, without
/// instructions for SHA. One that has them is four times as fast.
const ROUNDS_PER_KIB: u64 = 8;

impl Kdf {
    /// The work of deriving `length` bytes, in KiB that Argon2 fills.
    pub(super) fn work_kib(&self, length: usize) -> u64 {
        match self {
            Self::Argon2i(cost) | Self::Argon2id(cost) => u64::from(cost.time).saturating_mul(cost.memory_kib.into()),
            Self::Pbkdf2 { hash, iterations } => pbkdf2_kib(*hash, *iterations, length),
        }
    }
}

fn pbkdf2_kib(hash: Hash, iterations: u32, length: usize) -> u64 {
    let blocks = length.div_ceil(hash.length()) as u64;
    blocks.saturating_mul(iterations.into()).div_ceil(ROUNDS_PER_KIB)
}

impl Keyslot {
    /// The work of trying it; that of the digest comes on top.
    pub(super) fn work_kib(&self) -> u64 {
        self.kdf.work_kib(self.area_key_size)
    }
}

/// Into the order in which they are tried: by their priority; of one priority the cheapest first, as a volume is mostly opened by one passphrase of many.
pub(super) fn sort(keyslots: &mut [Keyslot]) {
    keyslots.sort_by_key(|slot| (Reverse(slot.priority), slot.work_kib(), slot.number));
}

/// What one passphrase is tried with.
pub(super) struct Attempts<'a> {
    /// In this order.
    pub(super) keyslots: Vec<&'a Keyslot>,
    /// Why not with the others; to be told if none of these opens.
    pub(super) refusal: Option<Error>,
}

impl Header {
    /// Those of priority 0 are tried only when they are asked for by number; of the rest as many as [`MAX_WORK_KIB`] allows in their order.
    pub(super) fn attempts(&self) -> Attempts<'_> {
        attempts(self.keyslots.iter().filter(|slot| slot.priority > 0), &self.digest)
    }

    /// Numbers of the keyslots, those of priority 0 among them, that one passphrase may be tried with one by one ([`Self::unlock_keyslot`]).
    #[must_use]
    pub fn affordable(&self) -> Vec<u8> {
        attempts(self.keyslots.iter(), &self.digest).keyslots.iter().map(|slot| slot.number).collect()
    }
}

fn attempts<'a>(keyslots: impl Iterator<Item = &'a Keyslot>, digest: &Digest) -> Attempts<'a> {
    let of_digest_kib = pbkdf2_kib(digest.hash, digest.iterations, digest.value.len());
    let (mut within, mut left_out, mut spent_kib, mut all_kib) = (Vec::new(), 0, 0_u64, 0_u64);
    for slot in keyslots {
        let work_kib = slot.work_kib().saturating_add(of_digest_kib);
        all_kib = all_kib.saturating_add(work_kib);
        if spent_kib.saturating_add(work_kib) <= MAX_WORK_KIB {
            spent_kib += work_kib;
            within.push(slot);
        } else {
            left_out += 1;
        }
    }
    let refusal = (left_out > 0).then_some(Error::KeyslotWork { tried: within.len(), left_out, all_kib, limit_kib: MAX_WORK_KIB });
    Attempts { keyslots: within, refusal }
}

#[cfg(test)]
mod tests {
    use super::super::Argon2Cost;
    use super::*;

    fn slot(number: u8, priority: u8, kdf: Kdf) -> Keyslot {
        Keyslot {
            number,
            priority,
            kdf,
            salt: vec![1; 32],
            key_size: 64,
            stripes: 4000,
            af_hash: Hash::Sha256,
            area_offset_bytes: 0,
            area_size_bytes: 0,
            area_cipher: String::new(),
            area_key_size: 64,
        }
    }

    fn pbkdf2(iterations: u32) -> Kdf {
        Kdf::Pbkdf2 { hash: Hash::Sha256, iterations }
    }

    fn argon2id(time: u32, memory_kib: u32) -> Kdf {
        Kdf::Argon2id(Argon2Cost { time, memory_kib, lanes: 4 })
    }

    /// As cryptsetup makes it: 125 ms.
    fn digest() -> Digest {
        Digest { hash: Hash::Sha256, iterations: 400_000, salt: vec![1; 32], value: vec![1; 32] }
    }

    fn tried(mut keyslots: Vec<Keyslot>) -> (Vec<u8>, Option<String>) {
        sort(&mut keyslots);
        let Attempts { keyslots, refusal } = attempts(keyslots.iter().filter(|slot| slot.priority > 0), &digest());
        (keyslots.iter().map(|slot| slot.number).collect(), refusal.map(|why| why.to_string()))
    }

    #[test]
    fn all_keyslots_that_cryptsetup_makes_are_tried() {
        // The longest that its benchmark gives on a fast machine; and an old machine's LUKS1.
        for kdf in [argon2id(7, 1 << 20), argon2id(4, 1 << 20), Kdf::DEFAULT, pbkdf2(10_000_000)] {
            let (numbers, refusal) = tried((0..32).map(|number| slot(number, 1, kdf)).collect());
            assert_eq!((numbers, refusal), ((0..32).collect(), None), "{kdf:?}");
        }
        let sha1 = Kdf::Pbkdf2 { hash: Hash::Sha1, iterations: 10_000_000 };
        assert_eq!(tried((0..8).map(|number| slot(number, 1, sha1)).collect()).0.len(), 8);
    }

    #[test]
    fn a_header_of_many_dear_keyslots_is_refused_beyond_the_budget_with_the_numbers() {
        let (numbers, refusal) = tried((0..32).map(|number| slot(number, 1, pbkdf2(1 << 28))).collect());
        // Two blocks of 2^28 rounds: 64 GiB each, and the digests'.
        assert_eq!(numbers, [0, 1, 2]);
        let refusal = refusal.unwrap();
        for words in ["3 of its 32 keyslots", "2050 GiB", "256 GiB", "luksKillSlot"] {
            assert!(refusal.contains(words), "{words}: {refusal}");
        }
        // LUKS1 has eight.
        let sha1 = Kdf::Pbkdf2 { hash: Hash::Sha1, iterations: 1 << 28 };
        assert_eq!(tried((0..8).map(|number| slot(number, 1, sha1)).collect()).0.len(), 1);
        // Long keys take as many blocks more.
        let wide = Keyslot { area_key_size: 512, ..slot(0, 1, pbkdf2(1 << 28)) };
        assert_eq!(tried(vec![wide]).0, [0; 0]);
    }

    #[test]
    fn the_cheapest_of_the_highest_priority_comes_first() {
        let keyslots =
            vec![slot(0, 1, argon2id(128, 1 << 20)), slot(1, 1, pbkdf2(1000)), slot(2, 2, argon2id(4, 1 << 20)), slot(3, 0, pbkdf2(1000))];
        assert_eq!(tried(keyslots), (vec![2, 1, 0], None));
        // What is left out does not stand in the way of what comes after it.
        let keyslots = vec![slot(0, 2, argon2id(128, 1 << 20)), slot(1, 2, argon2id(129, 1 << 20)), slot(2, 1, pbkdf2(1000))];
        let (numbers, refusal) = tried(keyslots);
        assert!(numbers == [0, 2] && refusal.is_some(), "{numbers:?} {refusal:?}");
    }
}
