//! The structs of ext4 as they lie on the disk: field offsets and checksums, little-endian.
//!
//! Source: the kernel's Documentation/filesystems/ext4 (super.rst, group_descr.rst, inodes.rst, ifork.rst,
//! directory.rst, checksums.rst), and comparison with images of mke2fs 1.47.0.

use super::geometry::Geometry;
use crate::bytes::{crc32c_raw, high16, high32, low16, low32, put, put_u16, put_u32};

pub(super) const SUPERBLOCK_MAGIC: u16 = 0xEF53;
pub(super) const S_MAGIC: usize = 0x38;
pub(super) const S_STATE: usize = 0x3A;
pub(super) const S_UUID: usize = 0x68;
pub(super) const S_CHECKSUM: usize = 0x3FC;

pub(super) const EXT4_EXTENTS_FL: u32 = 0x8_0000;
const EXTENT_MAGIC: u16 = 0xF30A;
/// Extents in an inode's 60 bytes of i_block.
pub(super) const EXTENTS_IN_INODE: usize = 4;
const EXTENT_BYTES: usize = 12;
/// Of the fields past byte 128, those up to i_projid: what mke2fs sets.
const EXTRA_ISIZE: u16 = 32;

pub(super) const BG_INODE_UNINIT: u16 = 1;
pub(super) const BG_BLOCK_UNINIT: u16 = 2;
pub(super) const BG_INODE_ZEROED: u16 = 4;

/// The seed of every checksum but the superblock's.
pub(super) fn checksum_seed(uuid: &[u8; 16]) -> u32 {
    crc32c_raw(!0, uuid)
}

/// A run of blocks of a file: `length` blocks at `start`, as the file's blocks from `first` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) first: u32,
    pub(super) start: u64,
    pub(super) length: u16,
}

/// Puts an extent header and as many of `extents` as there are slots for.
pub(super) fn put_extents(node: &mut [u8], extents: &[Extent], slots: usize) {
    put_extent_header(node, extents.len().min(slots), slots, 0);
    for (slot, extent) in extents.iter().take(slots).enumerate() {
        let at = EXTENT_BYTES * (slot + 1);
        put_u32(node, at, extent.first);
        put_u16(node, at + 4, extent.length);
        put_u16(node, at + 6, low16(high32(extent.start)));
        put_u32(node, at + 8, low32(extent.start));
    }
}

/// Turns the root of an extent tree into a node of depth 1 with one child. What was in its other slots stays.
pub(super) fn put_extent_index(root: &mut [u8], leaf: u64) {
    put_extent_header(root, 1, EXTENTS_IN_INODE, 1);
    put_u32(root, EXTENT_BYTES, 0);
    put_u32(root, EXTENT_BYTES + 4, low32(leaf));
    put_u32(root, EXTENT_BYTES + 8, high32(leaf));
}

fn put_extent_header(node: &mut [u8], entries: usize, slots: usize, depth: u16) {
    let count = |number: usize| u16::try_from(number).unwrap_or(u16::MAX);
    put_u16(node, 0, EXTENT_MAGIC);
    put_u16(node, 2, count(entries));
    put_u16(node, 4, count(slots));
    put_u16(node, 6, depth);
    put_u32(node, 8, 0);
}

/// Extents in a leaf block of their own; the checksum follows the last slot.
pub(super) const fn extents_in_block(block_size: usize) -> usize {
    (block_size - EXTENT_BYTES) / EXTENT_BYTES
}

pub(super) fn put_leaf_checksum(leaf: &mut [u8], seed: u32) {
    let end = EXTENT_BYTES * (1 + extents_in_block(leaf.len()));
    let checksum = crc32c_raw(seed, leaf.get(..end).unwrap_or_default());
    put_u32(leaf, end, checksum);
}

/// An inode's own seed: number and generation, which is 0 on a fresh filesystem.
pub(super) fn inode_seed(seed: u32, number: u32) -> u32 {
    crc32c_raw(crc32c_raw(seed, &number.to_le_bytes()), &0_u32.to_le_bytes())
}

/// What an inode says; uid, gid and generation are 0.
#[derive(Debug, Clone)]
pub(super) struct Inode {
    pub(super) number: u32,
    pub(super) mode: u16,
    pub(super) links: u16,
    pub(super) size_bytes: u64,
    /// Disk space taken, in units of 512 bytes.
    pub(super) sectors: u64,
    pub(super) flags: u32,
    pub(super) i_block: [u8; 60],
}

impl Inode {
    pub(super) const fn empty(number: u32) -> Self {
        Self { number, mode: 0, links: 0, size_bytes: 0, sectors: 0, flags: 0, i_block: [0; 60] }
    }

    /// The bytes of this inode, `inode_size` long. `time`: None for one that was never used. One without a mode (that of
    /// the bad blocks) carries times but not the newer fields.
    pub(super) fn bytes(&self, inode_size: usize, time: Option<u32>, seed: u32) -> Vec<u8> {
        let mut inode = vec![0_u8; inode_size];
        let is_file = self.mode != 0;
        put_u16(&mut inode, 0x00, self.mode);
        put_u32(&mut inode, 0x04, low32(self.size_bytes));
        if let Some(time) = time {
            for i_time in [0x08, 0x0C, 0x10] {
                put_u32(&mut inode, i_time, time);
            }
        }
        put_u16(&mut inode, 0x1A, self.links);
        put_u32(&mut inode, 0x1C, low32(self.sectors));
        put_u32(&mut inode, 0x20, self.flags);
        put(&mut inode, 0x28, &self.i_block);
        put_u32(&mut inode, 0x6C, high32(self.size_bytes));
        put_u16(&mut inode, 0x74, low16(high32(self.sectors)));
        if is_file {
            put_u16(&mut inode, 0x80, EXTRA_ISIZE);
            put_u32(&mut inode, 0x90, time.unwrap_or(0));
        }
        let checksum = crc32c_raw(inode_seed(seed, self.number), &inode);
        put_u16(&mut inode, 0x7C, low16(checksum));
        if is_file {
            put_u16(&mut inode, 0x82, high16(checksum));
        }
        inode
    }
}

/// An entry of a directory: inode number, length of the whole entry, name. Only directories are listed.
pub(super) fn put_directory_entry(block: &mut [u8], at: usize, inode: u32, length: u16, name: &[u8]) {
    const FILE_TYPE_DIRECTORY: u8 = 2;
    put_u32(block, at, inode);
    put_u16(block, at + 4, length);
    if let (Ok(name_length), false) = (u8::try_from(name.len()), name.is_empty()) {
        put(block, at + 6, &[name_length, FILE_TYPE_DIRECTORY]);
        put(block, at + 8, name);
    }
}

/// Bytes of the checksum entry at the end of a directory block.
pub(super) const DIRECTORY_TAIL_BYTES: u16 = 12;

/// The last entry of a directory block: one that names nothing and carries the checksum of what is before it.
pub(super) fn put_directory_tail(block: &mut [u8], inode_seed: u32) {
    const FILE_TYPE_CHECKSUM: u8 = 0xDE;
    let at = block.len().saturating_sub(usize::from(DIRECTORY_TAIL_BYTES));
    let checksum = crc32c_raw(inode_seed, block.get(..at).unwrap_or_default());
    put_u32(block, at, 0);
    put_u16(block, at + 4, DIRECTORY_TAIL_BYTES);
    put(block, at + 6, &[0, FILE_TYPE_CHECKSUM]);
    put_u32(block, at + 8, checksum);
}

/// A group descriptor before its checksum.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Descriptor {
    pub(super) block_bitmap: u64,
    pub(super) inode_bitmap: u64,
    pub(super) inode_table: u64,
    pub(super) free_blocks: u32,
    pub(super) free_inodes: u32,
    pub(super) used_directories: u16,
    pub(super) unused_inodes: u32,
    pub(super) flags: u16,
    pub(super) block_bitmap_checksum: u32,
    pub(super) inode_bitmap_checksum: u32,
}

impl Descriptor {
    pub(super) fn bytes(&self, group: u32, seed: u32) -> [u8; 64] {
        let mut bytes = [0_u8; 64];
        for (at, block) in [(0x00, self.block_bitmap), (0x04, self.inode_bitmap), (0x08, self.inode_table)] {
            put_u32(&mut bytes, at, low32(block));
            put_u32(&mut bytes, at + 0x20, high32(block));
        }
        put_u16(&mut bytes, 0x10, self.used_directories);
        put_u16(&mut bytes, 0x12, self.flags);
        let halves = [
            (0x0C, 0x2C, self.free_blocks),
            (0x0E, 0x2E, self.free_inodes),
            (0x1C, 0x32, self.unused_inodes),
            (0x18, 0x38, self.block_bitmap_checksum),
            (0x1A, 0x3A, self.inode_bitmap_checksum),
        ];
        for (low, high, value) in halves {
            put_u16(&mut bytes, low, low16(value));
            put_u16(&mut bytes, high, high16(value));
        }
        let checksum = crc32c_raw(crc32c_raw(seed, &group.to_le_bytes()), &bytes);
        put_u16(&mut bytes, 0x1E, low16(checksum));
        bytes
    }
}

/// What the superblock says beside the geometry.
#[derive(Debug, Clone)]
pub(super) struct SuperblockFields {
    pub(super) uuid: [u8; 16],
    pub(super) hash_seed: [u8; 16],
    pub(super) time: u32,
    pub(super) free_blocks: u64,
    pub(super) overhead_blocks: u64,
    pub(super) kbytes_written: u64,
    /// Of the journal, if there is one: i_block, size.
    pub(super) journal: Option<([u8; 60], u64)>,
}

const COMPAT_HAS_JOURNAL: u32 = 0x4;
const COMPAT_EXT_ATTR: u32 = 0x8;
const COMPAT_RESIZE_INODE: u32 = 0x10;
const COMPAT_DIR_INDEX: u32 = 0x20;
/// filetype, extents, 64bit, flex_bg.
const INCOMPAT: u32 = 0x2 | 0x40 | 0x80 | 0x200;
/// sparse_super, large_file, huge_file, dir_nlink, extra_isize, metadata_csum.
const RO_COMPAT: u32 = 0x1 | 0x2 | 0x8 | 0x20 | 0x40 | 0x400;

impl SuperblockFields {
    /// The superblock as it lies in `group`; the one in group 0 is the primary.
    pub(super) fn bytes(&self, geometry: &Geometry, group: u64) -> Vec<u8> {
        let mut sb = vec![0_u8; 1024];
        self.put_counts(&mut sb, geometry);
        self.put_identity(&mut sb, group);
        self.put_features(&mut sb, geometry);
        let checksum = crc32c_raw(!0, sb.get(..S_CHECKSUM).unwrap_or_default());
        put_u32(&mut sb, S_CHECKSUM, checksum);
        sb
    }

    fn put_counts(&self, sb: &mut [u8], geometry: &Geometry) {
        let log_block_size = low32(geometry.block_size).trailing_zeros() - 10;
        let blocks_per_group = low32(geometry.blocks_per_group);
        put_u32(sb, 0x00, low32(geometry.inodes()));
        put_u32(sb, 0x04, low32(geometry.blocks));
        put_u32(sb, 0x150, high32(geometry.blocks));
        put_u32(sb, 0x0C, low32(self.free_blocks));
        put_u32(sb, 0x158, high32(self.free_blocks));
        put_u32(sb, 0x10, low32(geometry.inodes() - super::geometry::USED_INODES));
        put_u32(sb, 0x14, low32(geometry.first_data_block));
        put_u32(sb, 0x18, log_block_size);
        put_u32(sb, 0x1C, log_block_size);
        put_u32(sb, 0x20, blocks_per_group);
        put_u32(sb, 0x24, blocks_per_group);
        put_u32(sb, 0x28, low32(geometry.inodes_per_group));
        put_u16(sb, 0x58, low16(low32(geometry.inode_size)));
        put_u16(sb, 0xCE, low16(low32(geometry.reserved_descriptor_blocks)));
        put_u16(sb, 0x164, geometry.raid_stride);
        put_u32(sb, 0x170, geometry.raid_stripe_width);
        put(sb, 0x178, &self.kbytes_written.to_le_bytes());
        put_u32(sb, 0x248, low32(self.overhead_blocks));
    }

    fn put_identity(&self, sb: &mut [u8], group: u64) {
        const STATE_CLEAN: u16 = 1;
        for s_time in [0x30, 0x40, 0x108] {
            put_u32(sb, s_time, self.time);
        }
        put_u16(sb, 0x36, 0xFFFF); // s_max_mnt_count: no check after so many mounts
        put_u16(sb, S_MAGIC, SUPERBLOCK_MAGIC);
        put_u16(sb, S_STATE, if group == 0 { STATE_CLEAN } else { 0 });
        put_u16(sb, 0x5A, u16::try_from(group).unwrap_or(u16::MAX));
        put(sb, S_UUID, &self.uuid);
        put(sb, 0xEC, &self.hash_seed);
    }

    fn put_features(&self, sb: &mut [u8], geometry: &Geometry) {
        put_u16(sb, 0x3C, 1); // s_errors: continue
        put_u32(sb, 0x4C, 1); // s_rev_level: inodes of any size
        put_u32(sb, 0x54, 11); // s_first_ino
        let resize = if geometry.resize_inode { COMPAT_RESIZE_INODE } else { 0 };
        let journal = if self.journal.is_some() { COMPAT_HAS_JOURNAL } else { 0 };
        put_u32(sb, 0x5C, COMPAT_EXT_ATTR | COMPAT_DIR_INDEX | resize | journal);
        put_u32(sb, 0x60, INCOMPAT);
        put_u32(sb, 0x64, RO_COMPAT);
        put(sb, 0xFC, &[1]); // s_def_hash_version: half MD4
        if let Some((i_block, size_bytes)) = &self.journal {
            put_u32(sb, 0xE0, super::files::JOURNAL_INODE);
            put(sb, 0xFD, &[1]); // s_jnl_backup_type: s_jnl_blocks holds the journal's inode
            put(sb, 0x10C, i_block);
            put_u32(sb, 0x148, high32(*size_bytes));
            put_u32(sb, 0x14C, low32(*size_bytes));
        }
        put_u16(sb, 0xFE, low16(low32(super::geometry::DESCRIPTOR_BYTES)));
        put_u32(sb, 0x100, 0x0C); // s_default_mount_opts: user_xattr, acl
        put_u16(sb, 0x15C, EXTRA_ISIZE);
        put_u16(sb, 0x15E, EXTRA_ISIZE);
        put_u32(sb, 0x160, 1); // s_flags: names are hashed as signed chars, on every machine
        put(sb, 0x174, &[4, 1]); // s_log_groups_per_flex: 16; s_checksum_type: CRC32C
    }
}

/// The journal's first block: a JBD2 superblock (big-endian) without features.
pub(super) fn journal_superblock(block_size: u64, blocks: u32, uuid: &[u8; 16]) -> Vec<u8> {
    const JBD2_MAGIC: u32 = 0xC03B_3998;
    const JBD2_SUPERBLOCK_V2: u32 = 4;
    let mut block = vec![0_u8; crate::bytes::length(block_size)];
    let fields =
        [(0x00, JBD2_MAGIC), (0x04, JBD2_SUPERBLOCK_V2), (0x0C, low32(block_size)), (0x10, blocks), (0x14, 1), (0x18, 1), (0x40, 1)];
    for (at, value) in fields {
        put(&mut block, at, &value.to_be_bytes());
    }
    put(&mut block, 0x30, uuid);
    block
}
