//! The on-disk structures, field by field at their offsets.
//!
//! Everything is big-endian except checksums (CRC-32C over the whole sector, block or inode with the checksum field
//! zero, stored little-endian) and the one magic inside the log. Field names in the comments are the format's own.

use super::geometry::{CHUNK_INODES, Extent, FREE_LIST_BLOCKS, FreeSpace, Geometry};
use crate::bytes::put;

/// No block, no inode.
pub(super) const NULL: u32 = u32::MAX;
const NULL_LONG: u64 = u64::MAX;

pub(super) const SB_MAGIC: &[u8; 4] = b"XFSB";
/// All fields of the superblock, and the smallest sector; the rest of a larger one is zero.
pub(super) const SB_BYTES: usize = 512;
pub(super) const SB_CRC: usize = 224;
/// Version 5 with the feature bits every version-5 filesystem has.
const VERSION: u16 = 0xB4A5;
const VERSION_STRIPE: u16 = 0x0100;
const VERSION_SECTOR: u16 = 0x0800;
/// Lazy counters, attr2, 32-bit project ids, checksums.
const FEATURES2: u32 = 0x18A;
/// Free-inode B-tree, reflink, inode B-tree block counts. No reverse mapping: the 6.1.0 profile.
const RO_COMPAT: u32 = 0xD;
/// File types in directories, sparse inode chunks, timestamps beyond 2038.
const INCOMPAT: u32 = 0xB;
const INCOMPAT_NREXT64: u32 = 0x20;

const INODE_BIGTIME: u64 = 0x8;
const INODE_NREXT64: u64 = 0x10;
const INODE_CRC: usize = 100;
const FORMAT_LOCAL: u8 = 1;
const FORMAT_EXTENTS: u8 = 2;
const MODE_ROOT: u16 = 0o040755;
const MODE_REALTIME: u16 = 0o100000;
/// The realtime bitmap inode's flag "new style bitmap".
const FLAG_NEW_BITMAP: u16 = 4;
/// Root, realtime bitmap and realtime summary: what mkfs allocates of the first chunk.
pub(super) const INODES_USED: u32 = 3;
pub(super) const INODES_FREE: u32 = CHUNK_INODES - INODES_USED;
/// One bit per free inode of the chunk.
const INODES_FREE_MASK: u64 = !0b111;

/// A structure under construction: zeroed bytes with big-endian setters.
pub(super) struct Image(Vec<u8>);

impl Image {
    pub(super) fn new(length_bytes: u32) -> Self {
        Self(vec![0; length_bytes as usize])
    }

    pub(super) fn put(&mut self, offset: usize, bytes: &[u8]) -> &mut Self {
        put(&mut self.0, offset, bytes);
        self
    }

    pub(super) fn u8(&mut self, offset: usize, value: u8) -> &mut Self {
        self.put(offset, &[value])
    }

    pub(super) fn u16(&mut self, offset: usize, value: u16) -> &mut Self {
        self.put(offset, &value.to_be_bytes())
    }

    pub(super) fn u32(&mut self, offset: usize, value: u32) -> &mut Self {
        self.put(offset, &value.to_be_bytes())
    }

    pub(super) fn u64(&mut self, offset: usize, value: u64) -> &mut Self {
        self.put(offset, &value.to_be_bytes())
    }

    pub(super) fn sealed(mut self, checksum_offset: usize) -> Vec<u8> {
        let checksum = crc32c::crc32c(&self.0);
        self.put(checksum_offset, &checksum.to_le_bytes());
        self.0
    }

    pub(super) fn unsealed(self) -> Vec<u8> {
        self.0
    }
}

/// Base-2 logarithm of a power of two, as the one byte the superblock gives it.
fn log2(value: u32) -> u8 {
    let [.., low] = value.ilog2().to_be_bytes();
    low
}

/// Which of the superblock's moments a copy shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Copy {
    /// The finished filesystem.
    Primary,
    /// As it was before anything was allocated; two of the copies learn the root inode.
    Secondary { knows_root: bool },
}

pub(super) fn superblock(geometry: &Geometry, uuid: &[u8; 16], copy: Copy) -> Vec<u8> {
    let g = geometry;
    let (block_size, sector) = (g.block_size, g.sector_bytes);
    let large_sector = sector > 512;
    let root = u64::from(g.root_inode());
    let rootino = if copy == (Copy::Secondary { knows_root: false }) { NULL_LONG } else { root };
    let (rbmino, rsumino, icount, ifree, free, inprogress) = match copy {
        Copy::Primary => (root + 1, root + 2, u64::from(CHUNK_INODES), u64::from(INODES_FREE), g.free_blocks(), 0),
        Copy::Secondary { .. } => (NULL_LONG, NULL_LONG, 0, 0, blocks_before_allocation(g), 1),
    };
    let logstart = (u64::from(g.log_group) << g.group_log()) | u64::from(g.log_start);
    let stripe_version = if g.stripe.is_some() { VERSION_STRIPE } else { 0 };
    let sector_version = if large_sector { VERSION_SECTOR } else { 0 };

    let mut sb = Image::new(sector);
    sb.put(0, SB_MAGIC).u32(4, block_size).u64(8, g.data_blocks).put(32, uuid).u64(48, logstart);
    sb.u64(56, rootino).u64(64, rbmino).u64(72, rsumino).u32(80, (4096 / block_size).max(1)); // sb_rextsize
    sb.u32(84, g.group_blocks).u32(88, g.group_count).u32(96, g.log_blocks);
    sb.u16(100, VERSION | stripe_version | sector_version).put(102, &be16(sector)).put(104, &be16(g.inode_size));
    sb.put(106, &be16(g.inodes_per_block()));
    sb.u8(120, log2(block_size)).u8(121, log2(sector)).u8(122, log2(g.inode_size)).u8(123, log2(g.inodes_per_block()));
    sb.u8(124, log2(g.group_blocks.next_power_of_two())).u8(126, inprogress).u8(127, g.inode_percent());
    sb.u64(128, icount).u64(136, ifree).u64(144, free).u32(180, g.chunk_blocks());
    if let Some(stripe) = g.stripe {
        sb.u32(184, stripe.unit).u32(188, stripe.width);
    }
    sb.u8(192, log2(4096 / block_size)); // sb_dirblklog: directory blocks are 4 KiB
    if large_sector {
        sb.u8(193, log2(sector)).put(194, &be16(sector)); // sb_logsectlog, sb_logsectsize
    }
    sb.u32(196, g.log_unit.map_or(1, |unit| unit * block_size)).u32(200, FEATURES2).u32(204, FEATURES2);
    let incompat = if g.nrext64 { INCOMPAT | INCOMPAT_NREXT64 } else { INCOMPAT };
    sb.u32(212, RO_COMPAT).u32(216, incompat).u32(228, 8192 * (g.inode_size / 256) / block_size); // sb_spino_align
    sb.sealed(SB_CRC)
}

/// What the copies call free: groups without their heads, and without the log.
fn blocks_before_allocation(g: &Geometry) -> u64 {
    g.data_blocks - u64::from(g.group_count) * u64::from(g.prealloc()) - u64::from(g.log_blocks)
}

/// The low 16 bits: sectors, inode sizes and inodes per block are at most 32 KiB here.
fn be16(value: u32) -> [u8; 2] {
    let [_, _, high, low] = value.to_be_bytes();
    [high, low]
}

/// Sector 1 of a group: its free space.
pub(super) fn agf(g: &Geometry, uuid: &[u8; 16], group: u32, free: &FreeSpace) -> Vec<u8> {
    let roots = g.header_blocks();
    let free_blocks = u32::try_from(free.blocks()).unwrap_or(u32::MAX);
    let mut agf = Image::new(g.sector_bytes);
    agf.put(0, b"XAGF").u32(4, 1).u32(8, group).u32(12, g.group_length(group));
    agf.u32(16, roots).u32(20, roots + 1).u32(28, 1).u32(32, 1); // agf_roots, agf_levels
    agf.u32(40, 1).u32(44, FREE_LIST_BLOCKS).u32(48, FREE_LIST_BLOCKS); // agf_flfirst, agf_fllast, agf_flcount
    agf.u32(52, free_blocks).u32(56, free.longest()).put(64, uuid);
    agf.u32(84, 1).u32(88, roots + 4).u32(92, 1); // agf_refcount_blocks, agf_refcount_root, agf_refcount_level
    agf.sealed(216)
}

/// Sector 2 of a group: its inodes.
pub(super) fn agi(g: &Geometry, uuid: &[u8; 16], group: u32) -> Vec<u8> {
    let roots = g.header_blocks();
    let (count, free, newest) = if group == 0 { (CHUNK_INODES, INODES_FREE, g.root_inode()) } else { (0, 0, NULL) };
    let mut agi = Image::new(g.sector_bytes);
    agi.put(0, b"XAGI").u32(4, 1).u32(8, group).u32(12, g.group_length(group));
    agi.u32(16, count).u32(20, roots + 2).u32(24, 1).u32(28, free).u32(32, newest).u32(36, NULL);
    agi.put(40, &[0xFF; 256]).put(296, uuid); // agi_unlinked
    agi.u32(328, roots + 3).u32(332, 1).u32(336, 1).u32(340, 1); // agi_free_root, agi_free_level, agi_iblocks, agi_fblocks
    agi.sealed(312)
}

/// Sector 3 of a group: blocks kept for the free-space B-trees themselves.
pub(super) fn agfl(g: &Geometry, uuid: &[u8; 16], group: u32, free: &FreeSpace) -> Vec<u8> {
    let mut agfl = Image::new(g.sector_bytes);
    agfl.put(0, b"XAFL").u32(4, group).put(8, uuid);
    let listed = 1..=FREE_LIST_BLOCKS;
    for (slot, offset) in (0u32..).zip((36..g.sector_bytes as usize).step_by(4)) {
        agfl.u32(offset, if listed.contains(&slot) { free.list_start + slot - 1 } else { NULL });
    }
    agfl.sealed(32)
}

/// A B-tree with all its records in its root: how many of them count, and their bytes.
struct Tree {
    magic: &'static [u8; 4],
    count: usize,
    records: Vec<u8>,
}

/// The five B-tree roots of a group, one block each, in the order of their blocks.
pub(super) fn roots(g: &Geometry, uuid: &[u8; 16], group: u32, free: &FreeSpace) -> Vec<u8> {
    let of_extents = |magic, extents: &[Extent]| {
        let records = extents.iter().chain(&free.ghost).flat_map(|extent| [extent.start, extent.length]).flat_map(u32::to_be_bytes);
        Tree { magic, count: extents.len(), records: records.collect() }
    };
    let of_inodes = |magic| match group {
        0 => Tree { magic, count: 1, records: chunk_record(g.root_inode()) },
        _ => Tree { magic, count: 0, records: Vec::new() },
    };
    let mut by_size = free.extents.clone();
    by_size.sort_by_key(|extent| (extent.length, extent.start));
    let trees = [
        of_extents(b"AB3B", &free.extents),
        of_extents(b"AB3C", &by_size),
        of_inodes(b"IAB3"),
        of_inodes(b"FIB3"),
        Tree { magic: b"R3FC", count: 0, records: Vec::new() },
    ];
    (g.header_blocks()..).zip(trees).flat_map(|(block, tree)| root(g, uuid, group, block, &tree)).collect()
}

fn root(g: &Geometry, uuid: &[u8; 16], group: u32, block: u32, tree: &Tree) -> Vec<u8> {
    let offset_bytes = g.group_offset_bytes(group) + u64::from(block) * u64::from(g.block_size);
    let count = u16::try_from(tree.count).unwrap_or(u16::MAX);
    let mut root = Image::new(g.block_size);
    root.put(0, tree.magic).u16(6, count).u32(8, NULL).u32(12, NULL).u64(16, offset_bytes / 512).put(32, uuid).u32(48, group);
    root.put(56, &tree.records);
    root.sealed(52)
}

/// The first chunk: all 64 inodes there (no holes), the first three in use.
fn chunk_record(first_inode: u32) -> Vec<u8> {
    let mut record = Image::new(16);
    let [.., count] = CHUNK_INODES.to_be_bytes();
    let [.., free] = INODES_FREE.to_be_bytes();
    record.u32(0, first_inode).u8(6, count).u8(7, free).u64(8, INODES_FREE_MASK);
    record.unsealed()
}

/// The first inode chunk: root directory, realtime bitmap, realtime summary and 61 free inodes.
pub(super) fn inode_chunk(g: &Geometry, uuid: &[u8; 16], time: u32) -> Vec<u8> {
    (0..CHUNK_INODES).flat_map(|index| inode(g, uuid, index, time)).collect()
}

fn inode(g: &Geometry, uuid: &[u8; 16], index: u32, time: u32) -> Vec<u8> {
    let number = u64::from(g.root_inode() + index);
    let mut inode = Image::new(g.inode_size);
    inode.put(0, b"IN").u8(4, 3).u32(96, NULL).u64(152, number).put(160, uuid); // di_version, di_next_unlinked, di_ino
    if index < INODES_USED {
        let (mode, format, links) = if index == 0 { (MODE_ROOT, FORMAT_LOCAL, 2) } else { (MODE_REALTIME, FORMAT_EXTENTS, 1) };
        let flags2 = if g.nrext64 { INODE_BIGTIME | INODE_NREXT64 } else { INODE_BIGTIME };
        inode.u16(2, mode).u8(5, format).u32(16, links).u8(83, FORMAT_EXTENTS); // di_nlink, di_aformat
        let created = bigtime(time);
        inode.u64(32, bigtime(0)).u64(40, created).u64(48, created).u64(144, created); // atime, mtime, ctime, crtime
        inode.u64(104, 2).u64(120, flags2); // di_changecount, di_flags2
    }
    match index {
        // An empty short-form directory: no entries, none with long numbers, and its parent is itself.
        0 => inode.u64(56, 6).u32(178, g.root_inode()),
        1 => inode.u16(90, FLAG_NEW_BITMAP),
        _ => &mut inode,
    };
    inode.sealed(INODE_CRC)
}

/// A timestamp as nanoseconds since the smallest 32-bit time, 13 December 1901.
fn bigtime(seconds_since_1970: u32) -> u64 {
    (u64::from(seconds_since_1970) + (1 << 31)) * 1_000_000_000
}
