//! ext4: the bytes that `mkfs.ext4 -F -m0` of Debian 12 (e2fsprogs 1.47.0) would write, as a plan.
//!
//! [`plan`] turns [`Options`] into a [`Plan`], an iterator of [`Write`]s, or a [`Refusal`] with its sentence. The image
//! is the same byte for byte, given the same UUID, hash seed and time; so filesystems grow, are checked and are repaired
//! as everyone's do. [`superblock`] reads one back, [`judge`] says what a disk holds.
//!
//! Deliberately absent: the descriptor layout for more than 192 TiB (meta_bg), inodes of 128 bytes (their times end
//! in 2038), blocks larger than the page that every kernel mounts (4096).

mod files;
mod geometry;
mod judge;
mod kbytes;
mod layout;
mod plan;
mod raw;
mod space;
pub mod superblock;

pub use judge::{Surface, judge};
pub use plan::{Plan, plan};
pub use superblock::{Superblock, backup_offsets};

#[cfg(doc)]
use crate::Write;

/// What to make. Sizes are bytes; where a device says 0, it says nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    pub size_bytes: u64,
    /// BLKSSZGET: the smallest block size that can be used.
    pub logical_sector_bytes: u32,
    /// BLKPBSZGET.
    pub physical_sector_bytes: u32,
    /// `queue/minimum_io_size`; the RAID stride.
    pub min_io_bytes: u32,
    /// `queue/optimal_io_size`; the RAID stripe width.
    pub opt_io_bytes: u32,
    /// 1024, 2048 or 4096; chosen by size if not given.
    pub block_size: Option<u32>,
    /// 256 to the block size, a power of two; 256 if not given.
    pub inode_size: Option<u32>,
    pub uuid: [u8; 16],
    /// Seed of the hashes in directories.
    pub hash_seed: [u8; 16],
    /// Seconds since 1970.
    pub time: u32,
    /// The disk reads as zeros wherever the plan does not write: then nothing is written that would only write zeros, not
    /// even in the journal, and the kernel need not zero inode tables after the first mount. As `mke2fs -E
    /// assume_storage_prezeroed=1`; without it, mke2fs says the latter of plain files alone.
    pub reads_zeros: bool,
}

impl Options {
    /// A disk of 512-byte sectors that says nothing more about itself.
    #[must_use]
    pub const fn new(size_bytes: u64, uuid: [u8; 16], hash_seed: [u8; 16], time: u32) -> Self {
        Self {
            size_bytes,
            logical_sector_bytes: 512,
            physical_sector_bytes: 512,
            min_io_bytes: 0,
            opt_io_bytes: 0,
            block_size: None,
            inode_size: None,
            uuid,
            hash_seed,
            time,
            reads_zeros: false,
        }
    }
}

/// Why there is no ext4 with these options. Displayed as a sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    TooSmall { size_bytes: u64, block_size: u64 },
    BlockSize { block_size: u64, logical_sector_bytes: u64 },
    InodeSize { inode_size: u64, block_size: u64 },
    InodesTooLarge { inode_size: u64, inodes: u64, size_bytes: u64 },
    NeedsMetaBg { size_bytes: u64, block_size: u64 },
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::TooSmall { size_bytes, block_size } => {
                write!(f, "ext4 with blocks of {block_size} bytes does not fit into {size_bytes} bytes; make the volume larger")
            }
            Self::BlockSize { block_size, logical_sector_bytes } => write!(
                f,
                "ext4 block size {block_size} is not possible on a disk with sectors of {logical_sector_bytes} bytes; \
                 use 1024, 2048 or 4096, not smaller than a sector"
            ),
            Self::InodeSize { inode_size, block_size } => write!(
                f,
                "ext4 inode size {inode_size} is not possible with blocks of {block_size} bytes; \
                 use a power of two from 256 to {block_size}"
            ),
            Self::InodesTooLarge { inode_size, inodes, size_bytes } => {
                write!(f, "{inodes} ext4 inodes of {inode_size} bytes would fill all of {size_bytes} bytes; use a smaller inode size")
            }
            Self::NeedsMetaBg { size_bytes, block_size } => write!(
                f,
                "ext4 with blocks of {block_size} bytes cannot describe {size_bytes} bytes without the meta_bg layout, \
                 which is not written here; use larger blocks or a smaller volume"
            ),
        }
    }
}

impl std::error::Error for Refusal {}
