//! On-disk formats as pure functions: geometry in, writes out.
//!
//! A writer is an iterator of [`Write`]s, generated as they are asked for, so that a volume of many TiB costs no memory.
//! Nothing here opens a device, reads a clock or draws a random number: UUIDs, seeds and "now" are arguments, and what
//! is on a disk comes in as bytes. The same arguments give the same bytes.
//!
//! The order of the writes is part of the format: what makes a disk recognisable is destroyed first and written last,
//! after a [`Write::Flush`], so that a format cut short is never taken for a finished one (see [`mark`]).
#![forbid(unsafe_code)]

mod bytes;
pub mod ext4;
pub mod luks;
pub mod mark;
pub mod xfs;

pub use mark::{Format, Mark};

/// No [`Write`] is longer than this: the caller's buffer, and the grain at which a format can be stopped.
pub const MAX_WRITE_BYTES: u64 = 1 << 20;

/// Where the first byte stands that is not zero. In words: a probe looks at megabytes, and byte by byte they are milliseconds.
#[must_use]
pub fn first_nonzero(bytes: &[u8]) -> Option<usize> {
    const WORD: usize = 64;
    let (words, _) = bytes.as_chunks::<WORD>();
    let is_zeros = |word: &[u8; WORD]| word.iter().fold(0, |all, byte| all | byte) == 0;
    let begin = words.iter().take_while(|word| is_zeros(word)).count() * WORD;
    bytes.get(begin..)?.iter().position(|byte| *byte != 0).map(|at| begin + at)
}

/// One thing to do to a disk. Offsets and lengths are bytes, and multiples of 512.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Put `bytes` at `offset`.
    Data { offset: u64, bytes: Vec<u8> },
    /// Make `length` bytes at `offset` read as zeros (BLKZEROOUT, or written out).
    Zeros { offset: u64, length: u64 },
    /// Everything before this reaches the medium before anything after it is written.
    Flush,
}

impl Write {
    /// Whether this leaves a disk of zeros as it is, where it writes at all.
    #[must_use]
    pub fn is_zeros(&self) -> bool {
        match self {
            Self::Data { bytes, .. } => first_nonzero(bytes).is_none(),
            Self::Zeros { .. } => true,
            Self::Flush => false,
        }
    }

    /// The bytes of the disk that this touches: offset and length. A flush touches none.
    #[must_use]
    pub fn range(&self) -> Option<(u64, u64)> {
        match self {
            Self::Data { offset, bytes } => Some((*offset, bytes.len() as u64)),
            Self::Zeros { offset, length } => Some((*offset, *length)),
            Self::Flush => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_byte_that_is_not_zero_is_found_wherever_it_stands() {
        for length in [0, 1, 63, 64, 65, 127, 128, 200] {
            let mut bytes = vec![0; length];
            assert_eq!(first_nonzero(&bytes), None, "{length}");
            for at in (0..length).rev() {
                bytes[at] = 1;
                assert_eq!(first_nonzero(&bytes), Some(at), "{length}");
            }
        }
    }
}
