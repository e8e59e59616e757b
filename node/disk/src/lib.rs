//! On-disk formats as pure functions: geometry in, writes out.
#![forbid(unsafe_code)]

pub mod luks;

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
