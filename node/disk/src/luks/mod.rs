//! LUKS2 made, opened, and given new keyslots; LUKS1 opened. Bytes only: the mapping itself is the kernel's.
//!
//! Source: LUKS2 On-Disk Format Specification 1.1, LUKS1 specification 1.2.3 (both by the cryptsetup project, as documents), and images of cryptsetup 2.6.1.
//!
//! Invariants: at every cut of the writes one header copy is whole, so that what opened before still opens, or what is there carries the mark of an unfinished format;
//! a keyslot's area is written before a header names it, and wiped after no header names it. No clock and no randomness: salts, keys and noise are arguments.
//!
//! Deliberately absent: integrity (`dm-integrity`), tokens, re-encryption, detached headers, benchmarks; anything that changes a LUKS1 header.

mod cipher;
mod error;
mod format;
mod header;
mod json;
mod keyslot;
mod luks1;
mod metadata;
mod open;
mod rotate;
mod work;

pub use error::Error;
pub use format::{Format, Material, Noise, sector_size};
pub use keyslot::{Argon2Cost, Hash, Kdf};
pub use metadata::{Keyslot, Segment};
pub use open::{Header, Version, within};
pub use rotate::NewKeyslot;

use crate::Write;
use std::io;
use zeroize::Zeroizing;

/// The unit of dm tables, IVs and LUKS1 offsets, whatever the sector size is.
const SECTOR_BYTES: usize = 512;
const SECTOR: u64 = SECTOR_BYTES as u64;
/// Every area and header begins at a multiple of this, so that writes fit disks with 4096-byte sectors.
const BLOCK_BYTES: usize = 4096;
const BLOCK: u64 = BLOCK_BYTES as u64;
/// The longest write of a plan.
const CHUNK: u64 = crate::MAX_WRITE_BYTES;
/// AES-256-XTS.
const KEY_SIZE: usize = 64;
/// Of the anti-forensic split, as every LUKS version has it.
const STRIPES: usize = 4000;

/// `length` bytes of zeros; the callers' lengths are bounded by what a header may say.
fn zeroed(length: u64) -> Vec<u8> {
    vec![0; usize::try_from(length).unwrap_or(0)]
}

/// One piece of data as writes of at most [`CHUNK`] bytes.
fn writes(offset: u64, bytes: &[u8]) -> impl Iterator<Item = Write> {
    let offsets = (0..).map(move |n: u64| offset + n * CHUNK);
    bytes
        .chunks(usize::try_from(CHUNK).unwrap_or(BLOCK_BYTES))
        .zip(offsets)
        .map(|(piece, offset)| Write::Data { offset, bytes: piece.to_vec() })
}

/// Reads all of a buffer at an offset in bytes; a short read is an error.
pub type ReadAt<'a> = dyn FnMut(u64, &mut [u8]) -> io::Result<()> + 'a;

/// The key of the data. Wiped when dropped; has no `Debug`, so that no log can show it.
#[allow(missing_debug_implementations, reason = "a secret")]
#[derive(Clone, PartialEq, Eq)]
pub struct VolumeKey(Zeroizing<Vec<u8>>);

impl VolumeKey {
    /// 64 bytes for a new volume.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        Self(Zeroizing::new(bytes.to_vec()))
    }

    /// For the kernel; copy it nowhere else.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}
