//! From a passphrase to a key: hashes, key derivation, anti-forensic split.
//!
//! Source: LUKS2 On-Disk Format Specification 1.1 §2.4 and LUKS1 specification 1.2.3 §4; RFC 9106 (Argon2), RFC 8018 (PBKDF2).

use super::Error;
use sha1::Sha1;
use sha2::{Sha256, Sha512};
use zeroize::{Zeroize as _, Zeroizing};

/// Most memory a keyslot may ask for: cryptsetup writes no more.
const MAX_ARGON2_MEMORY_KIB: u32 = 4 << 20;
/// Most memory passes: 128 GiB of them, a minute or two of one core. A larger number in a header is an attack or damage.
const MAX_ARGON2_PASSES_KIB: u64 = 128 << 20;
/// cryptsetup writes at most 4.
const MAX_ARGON2_LANES: u32 = 64;
/// About a minute of one core; two seconds of a fast one are 20 million. A fuzz target has no minute.
const MAX_PBKDF2_ITERATIONS: u32 = if cfg!(fuzzing) { 2000 } else { 1 << 28 };

/// A hash that LUKS headers name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hash {
    /// 20 bytes; LUKS1 before 2015.
    Sha1,
    /// 32 bytes; what cryptsetup 2 writes.
    Sha256,
    /// 64 bytes.
    Sha512,
}

impl Hash {
    pub(super) fn named(name: &str) -> Result<Self, Error> {
        match name {
            "sha1" => Ok(Self::Sha1),
            "sha256" => Ok(Self::Sha256),
            "sha512" => Ok(Self::Sha512),
            _ => Err(Error::Unsupported(format!("hash {name:?} (known: sha1, sha256, sha512)"))),
        }
    }

    /// As headers spell it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    pub(super) const fn length(self) -> usize {
        match self {
            Self::Sha1 => 20,
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }

    pub(super) fn of(self, parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
        fn run<D: sha2::Digest>(parts: &[&[u8]]) -> Vec<u8> {
            let mut hash = D::new();
            for part in parts {
                hash.update(part);
            }
            let mut hashed = hash.finalize();
            let out = hashed.to_vec();
            hashed.as_mut_slice().zeroize();
            out
        }
        Zeroizing::new(match self {
            Self::Sha1 => run::<Sha1>(parts),
            Self::Sha256 => run::<Sha256>(parts),
            Self::Sha512 => run::<Sha512>(parts),
        })
    }

    pub(super) fn pbkdf2(self, secret: &[u8], salt: &[u8], iterations: u32, length: usize) -> Zeroizing<Vec<u8>> {
        let mut out = Zeroizing::new(vec![0; length]);
        match self {
            Self::Sha1 => pbkdf2::pbkdf2_hmac::<Sha1>(secret, salt, iterations, &mut out),
            Self::Sha256 => pbkdf2::pbkdf2_hmac::<Sha256>(secret, salt, iterations, &mut out),
            Self::Sha512 => pbkdf2::pbkdf2_hmac::<Sha512>(secret, salt, iterations, &mut out),
        }
        out
    }
}

/// What one derivation with Argon2 costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Argon2Cost {
    /// Passes over the memory.
    pub time: u32,
    /// KiB.
    pub memory_kib: u32,
    /// `cpus` of the header. Computed one after the other here; the result is the same.
    pub lanes: u32,
}

/// How a keyslot's key is derived from the passphrase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kdf {
    /// Read only.
    Argon2i(Argon2Cost),
    /// The default.
    Argon2id(Argon2Cost),
    /// No memory to speak of.
    Pbkdf2 {
        /// Written: SHA-256.
        hash: Hash,
        /// Rounds of HMAC per block of output.
        iterations: u32,
    },
}

impl Kdf {
    /// What new keyslots get: no benchmark, so that the cost does not depend on the node; 64 MiB, so that a pod of 192 MiB can open it.
    pub const DEFAULT: Self = Self::Argon2id(Argon2Cost { time: 4, memory_kib: 65_536, lanes: 1 });

    /// KiB that deriving takes. Ask before [`super::Header::unlock`], which allocates them.
    #[must_use]
    pub const fn memory_kib(&self) -> u64 {
        match self {
            Self::Argon2i(cost) | Self::Argon2id(cost) => cost.memory_kib as u64,
            Self::Pbkdf2 { .. } => 0,
        }
    }

    /// Whether a new keyslot may have this cost; the error names parameter, value and range.
    pub fn check_new(&self) -> Result<(), Error> {
        let within = |parameter: &'static str, value: u32, min: u32, max: u32| {
            if (min..=max).contains(&value) {
                Ok(())
            } else {
                Err(Error::Range { parameter, value: value.into(), min: min.into(), max: max.into() })
            }
        };
        match self {
            Self::Argon2i(_) => Err(Error::Unsupported("argon2i for a new keyslot (opened only; use argon2id or pbkdf2)".to_owned())),
            Self::Argon2id(cost) => {
                // cryptsetup's own bounds for a benchmarked keyslot, but for the memory: not more than its default maximum.
                within("argon2id time", cost.time, 4, 256)?;
                within("argon2id memory in KiB", cost.memory_kib, 32_768, 1 << 20)?;
                within("argon2id lanes", cost.lanes, 1, 4)
            }
            Self::Pbkdf2 { hash: Hash::Sha256, iterations } => within("pbkdf2 iterations", *iterations, 1000, 100_000_000),
            Self::Pbkdf2 { hash, .. } => Err(Error::Unsupported(format!("pbkdf2 with {} for a new keyslot (sha256 only)", hash.name()))),
        }
    }

    /// Whether what a header says can be computed in bounded time and memory.
    pub(super) fn check_read(&self) -> Result<(), Error> {
        match self {
            Self::Argon2i(cost) | Self::Argon2id(cost) => {
                let is_sane = cost.time >= 1
                    && (1..=MAX_ARGON2_LANES).contains(&cost.lanes)
                    && (8 * cost.lanes..=MAX_ARGON2_MEMORY_KIB).contains(&cost.memory_kib)
                    && u64::from(cost.time) * u64::from(cost.memory_kib) <= MAX_ARGON2_PASSES_KIB;
                if is_sane {
                    return Ok(());
                }
                Err(Error::Unsupported(format!("argon2 with time {}, memory {} KiB, {} lanes", cost.time, cost.memory_kib, cost.lanes)))
            }
            Self::Pbkdf2 { iterations, .. } if (1..=MAX_PBKDF2_ITERATIONS).contains(iterations) => Ok(()),
            Self::Pbkdf2 { iterations, .. } => {
                Err(Error::Unsupported(format!("pbkdf2 with {iterations} iterations (1 to {MAX_PBKDF2_ITERATIONS})")))
            }
        }
    }

    /// The key of a keyslot's area.
    pub(super) fn derive(&self, passphrase: &[u8], salt: &[u8], length: usize) -> Result<Zeroizing<Vec<u8>>, Error> {
        let (algorithm, cost) = match self {
            Self::Pbkdf2 { hash, iterations } => return Ok(hash.pbkdf2(passphrase, salt, *iterations, length)),
            Self::Argon2i(cost) => (argon2::Algorithm::Argon2i, cost),
            Self::Argon2id(cost) => (argon2::Algorithm::Argon2id, cost),
        };
        let unsupported = |why: argon2::Error| Error::Unsupported(format!("argon2: {why}"));
        let params = argon2::Params::new(cost.memory_kib, cost.time, cost.lanes, Some(length)).map_err(unsupported)?;
        let mut memory = Blocks::reserve(params.block_count(), self.memory_kib())?;
        let mut out = Zeroizing::new(vec![0; length]);
        argon2::Argon2::new(algorithm, argon2::Version::V0x13, params)
            .hash_password_into_with_memory(passphrase, salt, &mut out, memory.0.as_mut_slice())
            .map_err(unsupported)?;
        Ok(out)
    }
}

/// Argon2's memory: allocated with an answer instead of an abort, wiped after use (each block tells something about the passphrase).
struct Blocks(Vec<argon2::Block>);

impl Blocks {
    fn reserve(count: usize, needs_kib: u64) -> Result<Self, Error> {
        let mut blocks = Vec::new();
        blocks.try_reserve_exact(count).map_err(|_| Error::Allocation { needs_kib })?;
        blocks.resize(count, argon2::Block::new());
        Ok(Self(blocks))
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        for block in &mut self.0 {
            block.zeroize();
        }
    }
}

fn xor(to: &mut [u8], from: &[u8]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to ^= from;
    }
}

/// Each chunk of hash length becomes the hash of its number and itself.
fn diffuse(hash: Hash, block: &mut [u8]) {
    for (number, chunk) in (0u32..).zip(block.chunks_mut(hash.length())) {
        let hashed = hash.of(&[&number.to_be_bytes(), chunk]);
        for (to, from) in chunk.iter_mut().zip(hashed.iter()) {
            *to = *from;
        }
    }
}

fn walk(hash: Hash, key_size: usize, stripes: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut state = Zeroizing::new(vec![0; key_size]);
    for stripe in stripes.chunks_exact(key_size) {
        xor(&mut state, stripe);
        diffuse(hash, &mut state);
    }
    state
}

/// Spreads `key` over `random` (all stripes but the last) and one stripe more: every bit of all of it is needed to get the key back.
pub(super) fn af_split(hash: Hash, key: &[u8], random: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut last = walk(hash, key.len(), random);
    xor(&mut last, key);
    let mut out = Zeroizing::new(Vec::with_capacity(random.len() + key.len()));
    out.extend_from_slice(random);
    out.extend_from_slice(&last);
    out
}

/// The key out of all stripes; `None` if they are not a whole number of stripes.
pub(super) fn af_merge(hash: Hash, key_size: usize, stripes: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let (before, last) = stripes.split_at_checked(stripes.len().checked_sub(key_size)?)?;
    if key_size == 0 || before.len() % key_size != 0 {
        return None;
    }
    let mut key = walk(hash, key_size, before);
    xor(&mut key, last);
    Some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_and_merge() {
        for (hash, key_size) in [(Hash::Sha1, 64usize), (Hash::Sha256, 64), (Hash::Sha256, 16), (Hash::Sha512, 100)] {
            let key: Vec<u8> = (0..key_size).map(|n| n.to_le_bytes()[0]).collect();
            let random: Vec<u8> = (0..key_size * 9).map(|n| (n * 7).to_le_bytes()[0]).collect();
            let mut stripes = af_split(hash, &key, &random).to_vec();
            assert_eq!(af_merge(hash, key_size, &stripes).unwrap().as_slice(), key);
            stripes[3] ^= 1;
            assert_ne!(af_merge(hash, key_size, &stripes).unwrap().as_slice(), key);
            assert!(af_merge(hash, key_size, &stripes[1..]).is_none());
            assert!(af_merge(hash, 0, &stripes).is_none());
        }
    }

    /// The reference implementation's test vector (argon2 1.3, `password`/`somesalt`, t=2, m=64 MiB, p=1) and RFC 6070's.
    #[test]
    fn vectors() {
        let kdf = Kdf::Argon2id(Argon2Cost { time: 2, memory_kib: 65_536, lanes: 1 });
        let key = kdf.derive(b"password", b"somesalt", 32).unwrap();
        assert_eq!(key[..8], [0x09, 0x31, 0x61, 0x15, 0xd5, 0xcf, 0x24, 0xed]);
        let key = Hash::Sha1.pbkdf2(b"password", b"salt", 4096, 20);
        assert_eq!(key[..4], [0x4b, 0x00, 0x79, 0x01]);
    }

    #[test]
    fn costs_have_ranges() {
        assert!(Kdf::DEFAULT.check_new().is_ok());
        assert_eq!(Kdf::DEFAULT.memory_kib(), 65_536);
        for (time, memory_kib, lanes, word) in
            [(3, 65_536, 1, "time"), (4, 32_767, 1, "memory"), (4, 1_048_577, 1, "memory"), (4, 65_536, 5, "lanes")]
        {
            let why = Kdf::Argon2id(Argon2Cost { time, memory_kib, lanes }).check_new().unwrap_err().to_string();
            assert!(why.contains(word), "{why}");
        }
        assert!(Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: 999 }.check_new().is_err());
        assert!(Kdf::Pbkdf2 { hash: Hash::Sha1, iterations: 1000 }.check_new().is_err());
        for (time, memory_kib, lanes) in
            [(0, 65_536, 1), (4, 7, 1), (4, u32::MAX, 1), (u32::MAX, 65_536, 1), (4, 65_536, 0), (4, 65_536, u32::MAX)]
        {
            let kdf = Kdf::Argon2i(Argon2Cost { time, memory_kib, lanes });
            assert!(kdf.check_read().is_err(), "{kdf:?}");
        }
        assert!(Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: 0 }.check_read().is_err());
    }
}
