//! Reading an ext4 superblock back: for the probe, for growing, and for telling where its copies would be.

use super::geometry::backup_groups;
use super::raw::{S_CHECKSUM, S_STATE, S_UUID, SUPERBLOCK_MAGIC};
use crate::bytes::{crc32c_raw, get, get_u16, get_u32};

/// Where the primary superblock lies, and how long each is, in bytes.
pub const OFFSET: u64 = 1024;
pub const BYTES: usize = 1024;

const COMPAT_HAS_JOURNAL: u32 = 0x4;
const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_64BIT: u32 = 0x80;
const RO_COMPAT_METADATA_CSUM: u32 = 0x400;
const STATE_CLEAN: u16 = 1;
const STATE_ERRORS: u16 = 2;

/// What a superblock says. Counts are blocks of `block_size` bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    pub uuid: [u8; 16],
    pub block_size: u32,
    pub blocks: u64,
    pub blocks_per_group: u32,
    /// The group in which this copy lies; 0: the primary.
    pub group: u16,
    pub feature_compat: u32,
    pub feature_incompat: u32,
    pub feature_ro_compat: u32,
    /// s_state: bit 0 unmounted cleanly, bit 1 errors were found.
    pub state: u16,
}

/// Why these bytes are no superblock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotAsuperblock {
    /// Fewer than [`BYTES`].
    Short,
    /// No magic number where it would be.
    NoMagic,
    /// The magic number, but not the checksum over the rest: damaged, or written in part.
    BadChecksum,
    /// The magic number, but a block size or group size that no ext4 has.
    Senseless,
}

impl std::fmt::Display for NotAsuperblock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Short => "shorter than an ext4 superblock",
            Self::NoMagic => "no ext4 superblock",
            Self::BadChecksum => "an ext4 superblock whose checksum does not match",
            Self::Senseless => "an ext4 superblock with impossible sizes",
        })
    }
}

impl std::error::Error for NotAsuperblock {}

/// Reads the superblock that these bytes begin with.
pub fn parse(bytes: &[u8]) -> Result<Superblock, NotAsuperblock> {
    use NotAsuperblock::{BadChecksum, NoMagic, Senseless, Short};
    let sb = bytes.get(..BYTES).ok_or(Short)?;
    let word = |at| get_u32(sb, at).ok_or(Short);
    let half = |at| get_u16(sb, at).ok_or(Short);
    if half(super::raw::S_MAGIC)? != SUPERBLOCK_MAGIC {
        return Err(NoMagic);
    }
    let feature_ro_compat = word(0x64)?;
    if feature_ro_compat & RO_COMPAT_METADATA_CSUM != 0 {
        let checksum = crc32c_raw(!0, sb.get(..S_CHECKSUM).ok_or(Short)?);
        if checksum != word(S_CHECKSUM)? {
            return Err(BadChecksum);
        }
    }
    // Blocks of 1 KiB to 64 KiB.
    let log_block_size = word(0x18)?;
    let blocks_per_group = word(0x20)?;
    if log_block_size > 6 || blocks_per_group == 0 {
        return Err(Senseless);
    }
    let feature_incompat = word(0x60)?;
    let high = if feature_incompat & INCOMPAT_64BIT != 0 { u64::from(word(0x150)?) << 32 } else { 0 };
    Ok(Superblock {
        uuid: get(sb, S_UUID).ok_or(Short)?,
        block_size: 1024 << log_block_size,
        blocks: high | u64::from(word(0x04)?),
        blocks_per_group,
        group: half(0x5A)?,
        feature_compat: word(0x5C)?,
        feature_incompat,
        feature_ro_compat,
        state: half(S_STATE)?,
    })
}

impl Superblock {
    /// Bytes of the disk that the filesystem covers.
    #[must_use]
    pub const fn filesystem_bytes(&self) -> u64 {
        self.blocks.saturating_mul(self.block_size as u64)
    }

    /// The kernel or a check found damage: to be repaired before it is mounted.
    #[must_use]
    pub const fn has_errors(&self) -> bool {
        self.state & STATE_ERRORS != 0
    }

    /// Unmounted cleanly, with no journal to replay. A mount replays it; a check is not needed for that.
    #[must_use]
    pub const fn is_clean(&self) -> bool {
        self.state & STATE_CLEAN != 0 && self.feature_incompat & INCOMPAT_RECOVER == 0
    }

    #[must_use]
    pub const fn has_journal(&self) -> bool {
        self.feature_compat & COMPAT_HAS_JOURNAL != 0
    }

    /// To how many blocks this filesystem could grow on a disk of `size_bytes`, rounded down to whole pages as
    /// resize2fs does; `None` if that is no more than it has. The kernel (EXT4_IOC_RESIZE_FS) may leave up to a group of
    /// that unused: success does not mean that the disk is full.
    #[must_use]
    pub const fn blocks_to_grow_to(&self, size_bytes: u64) -> Option<u64> {
        const PAGE_BYTES: u64 = 4096;
        let block_size = self.block_size as u64;
        let unit = if block_size < PAGE_BYTES { PAGE_BYTES } else { block_size };
        let blocks = size_bytes / unit * (unit / block_size);
        if blocks > self.blocks { Some(blocks) } else { None }
    }
}

/// Where backup superblocks would lie on a disk of `size_bytes`, in bytes, ascending, for each block size that ext4 can
/// have here (1, 2 and 4 KiB) with its usual group size.
///
/// A few per block size, whatever the size of the disk: they are in group 1 and in powers of 3, 5 and 7.
#[must_use]
pub fn backup_offsets(size_bytes: u64) -> Vec<u64> {
    let mut offsets: Vec<u64> = [1024_u64, 2048, 4096]
        .into_iter()
        .flat_map(|block_size| {
            let group_bytes = 8 * block_size * block_size;
            let first_data_block_bytes = if block_size == 1024 { block_size } else { 0 };
            backup_groups(size_bytes / group_bytes + 1)
                .map(move |group| group * group_bytes + first_data_block_bytes)
                .filter(move |offset| offset.saturating_add(BYTES as u64) <= size_bytes)
        })
        .collect();
    offsets.sort_unstable();
    offsets.dedup();
    offsets
}
