//! xfs, for the probe: what a superblock looks like, and where the copies of one would be. Numbers are big-endian.
//!
//! Every allocation group begins with a copy of the superblock. How large the groups are is written only in a
//! superblock, so where the first one is gone, the copies are looked for where mkfs.xfs would have put them.

use crate::bytes::{get, get_u32};

/// As much of a superblock as tells one: a sector.
pub const SUPERBLOCK_BYTES: usize = 512;
const MAGIC: &[u8; 4] = b"XFSB";
/// The largest allocation group: 1 TiB less a block.
const MAX_GROUP_BYTES: u64 = 1 << 40;
/// mkfs.xfs makes 4 groups, and 8, 16 or 32 on a disk that names a stripe unit.
const GROUP_SHIFTS: [u32; 4] = [2, 3, 4, 5];
const BLOCK_SIZES: [u64; 3] = [1024, 2048, 4096];

/// What the superblock of a group says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Superblock {
    pub uuid: [u8; 16],
    pub block_size: u32,
    /// Of the whole filesystem.
    pub blocks: u64,
    pub blocks_per_group: u32,
}

/// Reads the superblock that these bytes begin with, if they do. For finding leftovers: the checksum is not looked at,
/// since a damaged copy is a leftover too; the sizes must be possible ones.
#[must_use]
pub fn parse(bytes: &[u8]) -> Option<Superblock> {
    let sector = bytes.get(..SUPERBLOCK_BYTES)?;
    if !sector.starts_with(MAGIC) {
        return None;
    }
    let word = |at| get_u32(sector, at).map(u32::swap_bytes);
    let block_size = word(4)?;
    let blocks_per_group = word(84)?;
    let is_possible = (512..=65536).contains(&block_size) && block_size.is_power_of_two() && blocks_per_group > 0;
    is_possible.then_some(Superblock { uuid: get(sector, 32)?, block_size, blocks: u64::from_be_bytes(get(sector, 8)?), blocks_per_group })
}

/// Where copies of the superblock would lie on a disk of `size_bytes`, in bytes, ascending, if mkfs.xfs had chosen the
/// size of the groups. A filesystem that has grown since, or was made with options, has them elsewhere.
#[must_use]
pub fn backup_offsets(size_bytes: u64) -> Vec<u64> {
    let mut offsets: Vec<u64> = BLOCK_SIZES.into_iter().flat_map(|block_size| of_block_size(size_bytes, block_size)).collect();
    offsets.sort_unstable();
    offsets.dedup();
    offsets
}

fn of_block_size(size_bytes: u64, block_size: u64) -> impl Iterator<Item = u64> {
    /// Of the groups of 1 TiB so many are looked at; a leftover has all or none.
    const MOST_GROUPS: u64 = 32;
    let blocks = size_bytes / block_size;
    let most_blocks = (MAX_GROUP_BYTES - 1) / block_size;
    let chosen = GROUP_SHIFTS.into_iter().map(move |shift| blocks.div_ceil(1 << shift).clamp(1, most_blocks));
    chosen.flat_map(move |group_blocks| {
        let group_bytes = group_blocks * block_size;
        (1..MOST_GROUPS)
            .map(move |group| group * group_bytes)
            .filter(move |offset| offset.saturating_add(SUPERBLOCK_BYTES as u64) <= size_bytes)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;
    const TIB: u64 = 1 << 40;

    #[test]
    fn copies_are_looked_for_at_the_usual_group_sizes() {
        // mkfs.xfs 6.1 of 1 GiB: 4 groups; of 8 TiB: groups of 268435455 blocks.
        let offsets = backup_offsets(GIB);
        assert!([GIB / 4, GIB / 2, 3 * GIB / 4, GIB / 32].iter().all(|offset| offsets.contains(offset)));
        assert!(backup_offsets(8 * TIB).contains(&(268_435_455 * 4096)));
        // 300 MiB + 4 KiB: 76801 blocks, groups of 19201.
        assert!(backup_offsets((300 << 20) + 4096).contains(&(19201 * 4096)));
        assert!(backup_offsets(u64::MAX).len() < 400 && backup_offsets(GIB).is_sorted());
        assert!(backup_offsets(511).is_empty());
    }

    #[test]
    fn a_superblock_is_told_by_its_magic_and_possible_sizes() {
        let mut sector = [0_u8; 512];
        sector[..4].copy_from_slice(b"XFSB");
        sector[4..8].copy_from_slice(&4096_u32.to_be_bytes());
        sector[8..16].copy_from_slice(&262_144_u64.to_be_bytes());
        sector[32..48].copy_from_slice(&[7; 16]);
        sector[84..88].copy_from_slice(&65536_u32.to_be_bytes());
        let expected = Superblock { uuid: [7; 16], block_size: 4096, blocks: 262_144, blocks_per_group: 65536 };
        assert_eq!(parse(&sector), Some(expected));
        assert_eq!(parse(&sector[..511]), None);
        sector[7] = 1;
        assert_eq!(parse(&sector), None);
    }

    proptest! {
        #[test]
        fn parsing_and_looking_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600), size in any::<u64>()) {
            let _ = parse(&[&b"XFSB"[..], &bytes].concat());
            prop_assert!(backup_offsets(size).iter().all(|offset| *offset < size));
        }
    }
}
