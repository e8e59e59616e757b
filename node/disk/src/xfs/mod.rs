//! xfs: the bytes that `mkfs.xfs -f` of Debian 12 (xfsprogs 6.1.0) would write, as a plan.
//!
//! [`plan`] turns [`Options`] into a [`Plan`], an iterator of [`Write`](crate::Write)s, or a [`Refusal`] with its
//! sentence. The image is the same byte for byte, given the same UUID and time. [`superblock`] reads one back,
//! [`judge`] says what a disk holds.
//!
//! The profile is 6.1.0's: no reverse mapping and no 64-bit extent counters, so that any kernel from 5.10 mounts it.
//! Deliberately absent: realtime and external log devices, labels, quotas, blocks larger than the page that every
//! kernel mounts (4096), and the CPU-dependent geometry of xfsprogs 6.8 and later.

mod geometry;
mod judge;
mod log;
mod plan;
mod raw;
pub mod superblock;

use std::fmt;

pub use judge::{Surface, judge};
pub use plan::{Plan, plan};
pub use superblock::{Superblock, backup_offsets};

/// mkfs.xfs refuses anything smaller since 5.19, and CreateVolume with it. A LUKS header comes on top.
pub const MINIMUM_SIZE_BYTES: u64 = 300 << 20;
/// What `blockSize` may be: checksummed metadata needs 1024, kernels with 4 KiB pages mount no more than 4096 before 6.12.
pub const BLOCK_SIZES: [u32; 3] = [1024, 2048, 4096];
pub const DEFAULT_BLOCK_SIZE: u32 = 4096;
/// What `inodeSize` may be, up to half a block: checksummed inodes need 512, the format ends at 2048.
pub const INODE_SIZES: [u32; 3] = [512, 1024, 2048];
pub const DEFAULT_INODE_SIZE: u32 = 512;

/// What to make. Sizes are bytes; where a device says 0, it says nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    pub size_bytes: u64,
    /// BLKSSZGET.
    pub logical_sector_bytes: u32,
    /// BLKPBSZGET: what the filesystem takes as its sector, where it can.
    pub physical_sector_bytes: u32,
    /// BLKALIGNOFF is 0: the device's physical sectors begin at its first byte.
    pub is_aligned: bool,
    /// `queue/minimum_io_size`; the stripe unit.
    pub min_io_bytes: u32,
    /// `queue/optimal_io_size`; the stripe width.
    pub opt_io_bytes: u32,
    /// One of [`BLOCK_SIZES`]; 4096 if not given.
    pub block_size: Option<u32>,
    /// One of [`INODE_SIZES`], at most half a block; 512 if not given.
    pub inode_size: Option<u32>,
    pub uuid: [u8; 16],
    /// Seconds since 1970.
    pub time: u32,
    /// The disk reads as zeros wherever the plan does not write: then nothing is written that would only write zeros.
    pub reads_zeros: bool,
    /// 64-bit extent counters (Linux 5.19). Not of the profile; here because the golden data has them.
    pub nrext64: bool,
}

impl Options {
    /// A disk of 512-byte sectors that says nothing more about itself, with old bytes on it.
    #[must_use]
    pub const fn new(size_bytes: u64, uuid: [u8; 16], time: u32) -> Self {
        Self {
            size_bytes,
            logical_sector_bytes: 512,
            physical_sector_bytes: 512,
            is_aligned: true,
            min_io_bytes: 0,
            opt_io_bytes: 0,
            block_size: None,
            inode_size: None,
            uuid,
            time,
            reads_zeros: false,
            nrext64: false,
        }
    }
}

/// Why there is no xfs with these options. Displayed as a sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    TooSmall { size_bytes: u64 },
    BlockSize { block_size: u32 },
    InodeSize { inode_size: u32, block_size: u32 },
    Sector { sector_bytes: u32, block_size: u32 },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooSmall { size_bytes } => write!(
                f,
                "xfs needs at least {MINIMUM_SIZE_BYTES} bytes (300 MiB), there are {size_bytes}; make the volume larger or use ext4"
            ),
            Self::BlockSize { block_size } => write!(f, "xfs block size {block_size} is not possible; use 1024, 2048 or 4096"),
            Self::InodeSize { inode_size, block_size } => write!(
                f,
                "xfs inode size {inode_size} is not possible with blocks of {block_size} bytes; \
                 use 512, 1024 or 2048, at most half a block"
            ),
            Self::Sector { sector_bytes, block_size } => write!(
                f,
                "xfs block size {block_size} is not possible on a disk with sectors of {sector_bytes} bytes; \
                 use 4096, and a disk with sectors of 512 to 4096 bytes"
            ),
        }
    }
}

impl std::error::Error for Refusal {}
