//! Reading an xfs superblock back: for the probe, for growing, and for telling where its copies would be.
//!
//! The bytes come from a disk that anyone may have written: nothing here panics, and nothing is believed before its
//! checksum.

use super::BLOCK_SIZES;
use super::geometry::{MIB, TIB};
use super::raw::{SB_BYTES, SB_CRC, SB_MAGIC};
use crate::bytes::get;

/// To read a superblock, read this much: the largest sector that the format knows. Ours have at most 4096 bytes.
pub const BYTES: usize = 32 << 10;
/// A gain below this is not worth growing for: it would make a tiny group, where mkfs.xfs leaves such a tail unused.
pub const MIN_GAIN_BYTES: u64 = 16 * MIB;

/// With checksums. Version 4 has none, and nothing in it could be believed.
const VERSION: u16 = 5;

/// What a superblock says. Counts are blocks of `block_size` bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    pub uuid: [u8; 16],
    pub block_size: u32,
    pub sector_bytes: u16,
    pub inode_size: u16,
    /// sb_agblocks: blocks of an allocation group; the last may be shorter.
    pub group_blocks: u32,
    /// sb_agcount.
    pub groups: u32,
    /// sb_dblocks: the data section, the log in it.
    pub blocks: u64,
    /// sb_inprogress: written before mkfs had finished. mkfs.xfs leaves it set in the copies.
    pub is_in_progress: bool,
}

/// Why these bytes are no superblock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotAsuperblock {
    /// Fewer than its sector.
    Short,
    /// No magic number where it would be.
    NoMagic,
    /// The magic number, but not of version 5.
    Version,
    /// The magic number, but not the checksum over the sector: damaged, or written in part.
    BadChecksum,
    /// The magic number, but sizes that no xfs has.
    Senseless,
}

impl std::fmt::Display for NotAsuperblock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Short => "shorter than an xfs superblock",
            Self::NoMagic => "no xfs superblock",
            Self::Version => "an xfs superblock of another version than 5, without checksums",
            Self::BadChecksum => "an xfs superblock whose checksum does not match",
            Self::Senseless => "an xfs superblock with impossible sizes",
        })
    }
}

impl std::error::Error for NotAsuperblock {}

/// Reads the superblock, or the copy of one, that these bytes begin with.
pub fn parse(bytes: &[u8]) -> Result<Superblock, NotAsuperblock> {
    use NotAsuperblock::{BadChecksum, NoMagic, Senseless, Short, Version};
    let sb = bytes.get(..SB_BYTES).ok_or(Short)?;
    if !sb.starts_with(SB_MAGIC) {
        return Err(NoMagic);
    }
    if get(sb, 100).map(u16::from_be_bytes).ok_or(Short)? & 0xF != VERSION {
        return Err(Version);
    }
    let superblock = Superblock::of_fields(sb).ok_or(Short)?;
    let sector_bytes = usize::from(superblock.sector_bytes);
    if !sector_bytes.is_power_of_two() || !(SB_BYTES..=BYTES).contains(&sector_bytes) {
        return Err(Senseless);
    }
    let sector = bytes.get(..sector_bytes).ok_or(Short)?;
    if Some(checksum(sector)) != get(sb, SB_CRC).map(u32::from_le_bytes) {
        return Err(BadChecksum);
    }
    if superblock.is_sensible() { Ok(superblock) } else { Err(Senseless) }
}

/// Reads what is left of a superblock, of which a sector is enough. For finding leftovers: version and checksum are not
/// looked at, since a damaged copy is a leftover too; block size and group size must be possible ones.
#[must_use]
pub fn parse_leftover(bytes: &[u8]) -> Option<Superblock> {
    let superblock = bytes.get(..SB_BYTES).filter(|sb| sb.starts_with(SB_MAGIC)).and_then(Superblock::of_fields)?;
    (superblock.has_possible_block_size() && superblock.group_blocks > 0).then_some(superblock)
}

/// CRC32C of the sector, its own field taken as zero.
fn checksum(sector: &[u8]) -> u32 {
    let before = sector.get(..SB_CRC).unwrap_or_default();
    let after = sector.get(SB_CRC + 4..).unwrap_or_default();
    crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(before), &[0; 4]), after)
}

impl Superblock {
    /// As they stand in the first 512 bytes.
    fn of_fields(sb: &[u8]) -> Option<Self> {
        Some(Self {
            uuid: get(sb, 32)?,
            block_size: get(sb, 4).map(u32::from_be_bytes)?,
            sector_bytes: get(sb, 102).map(u16::from_be_bytes)?,
            inode_size: get(sb, 104).map(u16::from_be_bytes)?,
            group_blocks: get(sb, 84).map(u32::from_be_bytes)?,
            groups: get(sb, 88).map(u32::from_be_bytes)?,
            blocks: get(sb, 8).map(u64::from_be_bytes)?,
            is_in_progress: get(sb, 126).map(u8::from_be_bytes)? != 0,
        })
    }

    const fn has_possible_block_size(&self) -> bool {
        self.block_size.is_power_of_two() && self.block_size >= 512 && self.block_size <= 65536
    }

    fn is_sensible(&self) -> bool {
        let most = u64::from(self.groups) * u64::from(self.group_blocks);
        self.has_possible_block_size()
            && self.group_blocks > 0
            && self.blocks <= most
            && self.blocks > most.saturating_sub(u64::from(self.group_blocks))
            && most.checked_mul(u64::from(self.block_size)).is_some()
    }

    /// Bytes of the disk that the filesystem covers.
    #[must_use]
    pub const fn filesystem_bytes(&self) -> u64 {
        self.blocks.saturating_mul(self.block_size as u64)
    }

    /// Where the copies of this superblock lie, in bytes: the beginning of each group but the first. Thousands of them
    /// where a small filesystem was grown far; they are made as they are asked for.
    pub fn copies(&self) -> impl Iterator<Item = u64> + use<> {
        let group_bytes = u64::from(self.group_blocks).saturating_mul(u64::from(self.block_size));
        (1..self.groups).map(move |group| u64::from(group).saturating_mul(group_bytes))
    }

    /// To how many blocks this filesystem should grow on a disk of `size_bytes`; see [`blocks_to_grow_to`].
    #[must_use]
    pub const fn blocks_to_grow_to(&self, size_bytes: u64) -> Option<u64> {
        blocks_to_grow_to(self.block_size, self.blocks, size_bytes)
    }
}

/// To how many blocks an xfs of `blocks` (XFS_IOC_FSGEOMETRY's datablocks) should grow on a disk of `size_bytes`.
///
/// `None`: leave it. XFS_IOC_FSGROWFSDATA must never get fewer blocks than there are, because Linux from 5.12 on then
/// shrinks the filesystem; and a gain of less than [`MIN_GAIN_BYTES`] is left alone.
#[must_use]
pub const fn blocks_to_grow_to(block_size: u32, blocks: u64, size_bytes: u64) -> Option<u64> {
    let block_size = block_size as u64;
    let Some(target) = size_bytes.checked_div(block_size) else { return None };
    let gain_bytes = target.saturating_sub(blocks).saturating_mul(block_size);
    if gain_bytes >= MIN_GAIN_BYTES { Some(target) } else { None }
}

/// Where copies of the superblock would lie on a disk of `size_bytes`, in bytes, ascending, if mkfs.xfs or we had chosen
/// the size of the groups. A filesystem that has grown since, or was made with options, has them elsewhere.
#[must_use]
pub fn backup_offsets(size_bytes: u64) -> Vec<u64> {
    /// 4 groups, and 8, 16 or 32 on a disk that names a stripe.
    const GROUP_SHIFTS: [u32; 4] = [2, 3, 4, 5];
    /// Of the groups of 1 TiB so many are looked at; a leftover has all or none.
    const MOST_GROUPS: u64 = 32;
    let mut offsets: Vec<u64> = BLOCK_SIZES
        .into_iter()
        .flat_map(|block_size| GROUP_SHIFTS.map(|shift| (u64::from(block_size), shift)))
        .flat_map(|(block_size, shift)| {
            let group_blocks = (size_bytes / block_size).div_ceil(1 << shift).clamp(1, (TIB - 1) / block_size);
            (1..MOST_GROUPS).map(move |group| group * group_blocks * block_size)
        })
        .filter(|offset| offset.saturating_add(SB_BYTES as u64) <= size_bytes)
        .collect();
    offsets.sort_unstable();
    offsets.dedup();
    offsets
}
