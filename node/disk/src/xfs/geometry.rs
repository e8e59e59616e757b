//! From a device and options to where everything on the filesystem goes.
//!
//! Facts: `docs/formats.md`, checked against mkfs.xfs 6.1.0 by golden images and by a differential test.
//! Invariant: every number here is derived once; the writers below only place bytes.

use super::{BLOCK_SIZES, DEFAULT_BLOCK_SIZE, DEFAULT_INODE_SIZE, INODE_SIZES, MINIMUM_SIZE_BYTES, Options, Refusal};
pub(super) const KIB: u64 = 1 << 10;
pub(super) const MIB: u64 = 1 << 20;
pub(super) const GIB: u64 = 1 << 30;
pub(super) const TIB: u64 = 1 << 40;

/// An inode chunk: always 64 inodes, and the first chunk is all that a new filesystem has.
pub(super) const CHUNK_INODES: u32 = 64;
/// Blocks that the free list of each allocation group holds when no reverse mapping is kept.
pub(super) const FREE_LIST_BLOCKS: u32 = 4;
/// B-tree roots of a group: free space by block and by size, inodes, free inodes, reference counts.
pub(super) const ROOTS: u32 = 5;
/// mkfs.xfs zeroes this much at either end of the device, so that no other format's signature stays.
pub(super) const WIPE_BYTES: u64 = 128 * KIB;

/// The format's smallest and (one byte more than) largest allocation group.
const GROUP_MIN_BYTES: u64 = 16 * MIB;
const GROUP_MAX_BYTES: u64 = TIB;
/// Below this size mkfs.xfs ignores the stripe that a device reports.
const STRIPE_MIN_BYTES: u64 = GIB;
/// A device that reports a larger stripe unit is not believed: mkfs.xfs fails on some sizes with that, and no array is so.
const STRIPE_UNIT_MAX_BYTES: u32 = 32 << 20;
const LOG_MIN_BYTES: u64 = 64 * MIB;
const LOG_MAX_BYTES: u64 = 2 * GIB - 10 * MIB;
const LOG_MAX_BLOCKS: u64 = 1 << 20;
/// The log is this fraction of the data section, within its limits.
const LOG_DIVISOR: u64 = 2048;
/// Blocks of its group that the log leaves alone.
const LOG_GROUP_RESERVE: u64 = 11;
/// Log writes are padded to at most this much; a wider stripe falls back to `LOG_UNIT_FALLBACK_BYTES`.
const LOG_UNIT_MAX_BYTES: u64 = 256 * KIB;
const LOG_UNIT_FALLBACK_BYTES: u64 = 32 * KIB;
/// The largest sector the format can describe.
const SECTOR_MAX_BYTES: u32 = 32 << 10;

/// In filesystem blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stripe {
    pub(super) unit: u32,
    pub(super) width: u32,
}

/// A run of blocks inside one allocation group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) start: u32,
    pub(super) length: u32,
}

/// Where everything goes. Blocks unless a name says otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) block_size: u32,
    pub(super) inode_size: u32,
    pub(super) sector_bytes: u32,
    pub(super) stripe: Option<Stripe>,
    /// Blocks of the data section, which includes the log.
    pub(super) data_blocks: u64,
    pub(super) group_blocks: u32,
    pub(super) group_count: u32,
    pub(super) log_blocks: u32,
    pub(super) nrext64: bool,
    /// Where the device ends for mkfs.xfs, and so where the wipe of its tail ends.
    pub(super) device_end_bytes: u64,
    pub(super) log_group: u32,
    /// First block of the log inside `log_group`.
    pub(super) log_start: u32,
    /// What log writes are padded to, in blocks; `None` where the log has no stripe.
    pub(super) log_unit: Option<u32>,
}

impl Geometry {
    /// As mkfs.xfs 6.1.0 computes it, byte for byte.
    pub(super) fn new(options: &Options) -> Result<Self, Refusal> {
        let block_size = options.block_size.unwrap_or(DEFAULT_BLOCK_SIZE);
        let inode_size = options.inode_size.unwrap_or(DEFAULT_INODE_SIZE);
        if !BLOCK_SIZES.contains(&block_size) {
            return Err(Refusal::BlockSize { block_size });
        }
        if !INODE_SIZES.contains(&inode_size) || inode_size > block_size / 2 {
            return Err(Refusal::InodeSize { inode_size, block_size });
        }
        let sector_bytes = sector(options, block_size);
        if !sector_bytes.is_power_of_two() || sector_bytes < 512 || sector_bytes > block_size {
            return Err(Refusal::Sector { sector_bytes, block_size });
        }
        let granule = u64::from(sector_bytes).max(KIB);
        let device_end_bytes = options.size_bytes / granule * granule;
        let data_blocks = device_end_bytes / u64::from(block_size);
        let data_bytes = data_blocks * u64::from(block_size);
        if data_bytes < MINIMUM_SIZE_BYTES {
            return Err(Refusal::TooSmall { size_bytes: options.size_bytes });
        }
        let stripe = stripe(options, block_size, data_bytes);
        let groups = Groups::new(data_blocks, block_size, stripe);
        let mut geometry = Self {
            block_size,
            inode_size,
            sector_bytes,
            stripe,
            data_blocks: groups.data_blocks,
            group_blocks: narrow(groups.group_blocks),
            group_count: narrow(groups.group_count),
            log_blocks: 0,
            nrext64: options.nrext64,
            device_end_bytes,
            log_group: narrow(groups.group_count / 2),
            log_start: 0,
            log_unit: None,
        };
        geometry.place_log();
        Ok(geometry)
    }

    fn place_log(&mut self) {
        let block_size = u64::from(self.block_size);
        let group_blocks = u64::from(self.group_blocks);
        let stripe_unit = self.stripe.map(|stripe| u64::from(stripe.unit));
        let unit = if self.sector_bytes > 512 { Some(1) } else { stripe_unit };
        let unit = unit.map(|unit| if unit * block_size > LOG_UNIT_MAX_BYTES { LOG_UNIT_FALLBACK_BYTES / block_size } else { unit });

        let most = LOG_MAX_BLOCKS.min(LOG_MAX_BYTES / block_size).min(group_blocks - LOG_GROUP_RESERVE);
        let mut blocks = (self.data_blocks / LOG_DIVISOR).max(LOG_MIN_BYTES / block_size).min(most);
        let mut start = u64::from(self.prealloc());
        if let Some(align) = unit.or(stripe_unit) {
            // The number that names the log's first block is rounded, group number included, whatever that is inside the group.
            let group = u64::from(self.log_group) << self.group_log();
            start = (group + start).next_multiple_of(align) - group;
            blocks = if blocks.next_multiple_of(align) > most { blocks / align * align } else { blocks.next_multiple_of(align) };
            if start + blocks > group_blocks {
                blocks -= align;
            }
        }
        self.log_unit = unit.map(narrow);
        self.log_start = narrow(start);
        self.log_blocks = narrow(blocks);
    }

    /// Blocks at a group's head that hold its four header sectors.
    pub(super) fn header_blocks(&self) -> u32 {
        (4 * self.sector_bytes).div_ceil(self.block_size)
    }

    /// First block of a group that is not header or B-tree root.
    pub(super) fn prealloc(&self) -> u32 {
        self.header_blocks() + ROOTS
    }

    /// Bits of a block number that count inside a group.
    pub(super) fn group_log(&self) -> u32 {
        self.group_blocks.next_power_of_two().ilog2()
    }

    pub(super) fn inodes_per_block(&self) -> u32 {
        self.block_size / self.inode_size
    }

    /// Blocks of one inode chunk, which is also the alignment of chunks.
    pub(super) fn chunk_blocks(&self) -> u32 {
        CHUNK_INODES * self.inode_size / self.block_size
    }

    /// First block of the first inode chunk, in group 0.
    pub(super) fn root_chunk(&self) -> u32 {
        let align = match self.stripe {
            Some(stripe) if stripe.unit.is_multiple_of(self.chunk_blocks()) => stripe.unit,
            _ => self.chunk_blocks(),
        };
        (self.header_blocks() + 3 + 2 + FREE_LIST_BLOCKS).next_multiple_of(align)
    }

    pub(super) fn root_inode(&self) -> u32 {
        self.root_chunk() * self.inodes_per_block()
    }

    /// Per cent of the space that inodes may take.
    pub(super) fn inode_percent(&self) -> u8 {
        match self.data_blocks * u64::from(self.block_size) {
            ..TIB => 25,
            TIB..FIFTY_TIB => 5,
            _ => 1,
        }
    }

    /// Blocks of group `group`; the last may be shorter.
    pub(super) fn group_length(&self, group: u32) -> u32 {
        if group + 1 < self.group_count {
            return self.group_blocks;
        }
        narrow(self.data_blocks - u64::from(self.group_count - 1) * u64::from(self.group_blocks))
    }

    /// Where group `group` begins, in bytes from the device's start. Its superblock copy is there.
    pub(super) fn group_offset_bytes(&self, group: u32) -> u64 {
        u64::from(group) * u64::from(self.group_blocks) * u64::from(self.block_size)
    }

    pub(super) fn log_offset_bytes(&self) -> u64 {
        self.group_offset_bytes(self.log_group) + u64::from(self.log_start) * u64::from(self.block_size)
    }

    pub(super) fn log_bytes(&self) -> u64 {
        u64::from(self.log_blocks) * u64::from(self.block_size)
    }

    /// The free list's blocks and what is free beside them, as the allocator leaves it: the list comes off the
    /// smallest extent that can give it, then group 0 loses the inode chunk.
    pub(super) fn free_space(&self, group: u32) -> FreeSpace {
        let (first, end) = (self.prealloc(), self.group_length(group));
        let mut extents = vec![Extent { start: first, length: end - first }];
        if group == self.log_group {
            extents = without(&extents, Extent { start: self.log_start, length: self.log_blocks });
        }
        let smallest = extents.iter().filter(|extent| extent.length >= FREE_LIST_BLOCKS).min_by_key(|extent| (extent.length, extent.start));
        let list_start = smallest.map_or(first, |extent| extent.start);
        let ghost = smallest.filter(|extent| extent.length == FREE_LIST_BLOCKS).and(extents.last().copied());
        extents = without(&extents, Extent { start: list_start, length: FREE_LIST_BLOCKS });
        if group == 0 {
            extents = without(&extents, Extent { start: self.root_chunk(), length: self.chunk_blocks() });
        }
        FreeSpace { list_start, extents, ghost }
    }

    /// What statfs will call free: free extents and free lists of all groups.
    pub(super) fn free_blocks(&self) -> u64 {
        (0..self.group_count).map(|group| self.free_space(group).blocks() + u64::from(FREE_LIST_BLOCKS)).sum()
    }
}

const FIFTY_TIB: u64 = 50 * TIB;

/// One group's free extents, ordered by start, and the first block of its free list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FreeSpace {
    pub(super) list_start: u32,
    pub(super) extents: Vec<Extent>,
    /// Where the free list took a whole extent, its record is deleted by moving the later ones up, and the last stays
    /// behind the records once more: no part of the tree, but of mkfs.xfs's bytes.
    pub(super) ghost: Option<Extent>,
}

impl FreeSpace {
    pub(super) fn blocks(&self) -> u64 {
        self.extents.iter().map(|extent| u64::from(extent.length)).sum()
    }

    pub(super) fn longest(&self) -> u32 {
        self.extents.iter().map(|extent| extent.length).max().unwrap_or(0)
    }
}

/// `extents` with the blocks of `taken` cut out.
fn without(extents: &[Extent], taken: Extent) -> Vec<Extent> {
    let taken_end = taken.start + taken.length;
    let mut left = Vec::with_capacity(extents.len() + 1);
    for extent in extents {
        let end = extent.start + extent.length;
        let before = Extent { start: extent.start, length: end.min(taken.start).saturating_sub(extent.start) };
        let after_start = extent.start.max(taken_end);
        let after = Extent { start: after_start, length: end.saturating_sub(after_start) };
        left.extend([before, after].into_iter().filter(|part| part.length > 0));
    }
    left
}

/// The sector xfs works with: the physical one, unless that cannot be used.
fn sector(options: &Options, block_size: u32) -> u32 {
    let (logical, physical) = (options.logical_sector_bytes, options.physical_sector_bytes);
    let unusable = !options.is_aligned || !physical.is_power_of_two() || physical < logical || physical > SECTOR_MAX_BYTES;
    let larger_than_block = block_size < physical && block_size >= logical;
    if unusable || larger_than_block { logical } else { physical }
}

/// The stripe in filesystem blocks, or none where mkfs.xfs drops what the device reports.
fn stripe(options: &Options, block_size: u32, data_bytes: u64) -> Option<Stripe> {
    let (unit, width, sector) = (options.min_io_bytes, options.opt_io_bytes, options.physical_sector_bytes);
    let absent = unit == 0 || width == 0 || unit == sector || width == sector;
    let invalid = absent || unit > STRIPE_UNIT_MAX_BYTES || unit > width || !width.is_multiple_of(unit);
    let unfit = data_bytes < STRIPE_MIN_BYTES || !unit.is_multiple_of(block_size) || !width.is_multiple_of(block_size);
    (!invalid && !unfit).then(|| Stripe { unit: unit / block_size, width: width / block_size })
}

/// How the data section is cut into allocation groups.
struct Groups {
    data_blocks: u64,
    group_blocks: u64,
    group_count: u64,
}

impl Groups {
    fn new(data_blocks: u64, block_size: u32, stripe: Option<Stripe>) -> Self {
        let block_size = u64::from(block_size);
        let data_bytes = data_blocks * block_size;
        let (least, most) = (GROUP_MIN_BYTES / block_size, (GROUP_MAX_BYTES - 1) / block_size);
        let mut group_blocks = if data_bytes >= 32 * TIB || (stripe.is_none() && data_bytes >= 4 * TIB) {
            most
        } else {
            let shift = match stripe {
                None => 2,
                Some(_) if data_bytes <= 8 * GIB => 3,
                Some(_) if data_bytes <= 512 * GIB => 4,
                Some(_) => 5,
            };
            data_blocks.div_ceil(1 << shift).min(most)
        };
        if let Some(stripe) = stripe {
            group_blocks = align_to_stripe(group_blocks, data_blocks, stripe, least, most);
        }
        let mut group_count = data_blocks.div_ceil(group_blocks);
        let mut data_blocks = data_blocks;
        let tail = data_blocks % group_blocks;
        if tail != 0 && tail < least {
            group_count -= 1;
            data_blocks = group_count * group_blocks;
        }
        Self { data_blocks, group_blocks, group_count }
    }
}

/// Groups begin on stripe units, and not all on the same disk of the stripe.
fn align_to_stripe(group_blocks: u64, data_blocks: u64, stripe: Stripe, least: u64, most: u64) -> u64 {
    let (unit, width) = (u64::from(stripe.unit), u64::from(stripe.width));
    let up = group_blocks.next_multiple_of(unit);
    let aligned = if up > most { group_blocks / unit * unit } else { up };
    let same_disk = aligned.is_multiple_of(width) && width != unit && data_blocks.div_ceil(aligned) > 1;
    match same_disk {
        false => aligned,
        true if aligned - unit < least => aligned + unit,
        true => aligned - unit,
    }
}

/// Group sizes, group counts and log sizes fit 32 bits: a group has less than 2^40 bytes and blocks at least 2^10,
/// and 2^64 bytes are at most 2^32 groups of the format's smallest size but never that many here.
fn narrow(blocks: u64) -> u32 {
    debug_assert!(u32::try_from(blocks).is_ok(), "{blocks} does not fit 32 bits");
    u32::try_from(blocks).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn options(size_bytes: u64) -> Options {
        Options::new(size_bytes, [0; 16], 0)
    }

    #[test]
    fn the_sector_is_the_physical_one_where_it_can_be() {
        let sector = |logical, physical, is_aligned, block_size| {
            let device = Options { logical_sector_bytes: logical, physical_sector_bytes: physical, is_aligned, ..options(GIB) };
            super::sector(&device, block_size)
        };
        assert_eq!(sector(512, 512, true, 4096), 512);
        assert_eq!(sector(512, 4096, true, 4096), 4096);
        assert_eq!(sector(512, 4096, false, 4096), 512, "physical sectors begin elsewhere");
        assert_eq!(sector(512, 4096, true, 1024), 512, "a block is smaller than the physical sector");
        assert_eq!(sector(512, 64 << 10, true, 4096), 512, "no sector that the format could describe");
        assert_eq!(sector(4096, 4096, true, 4096), 4096);
    }

    #[test]
    fn a_stripe_that_makes_no_sense_is_dropped() {
        let stripe = |unit, width, physical, size_bytes| {
            let device = Options { min_io_bytes: unit, opt_io_bytes: width, physical_sector_bytes: physical, ..options(size_bytes) };
            Geometry::new(&device).unwrap().stripe.map(|stripe| (stripe.unit, stripe.width))
        };
        assert_eq!(stripe(64 << 10, 256 << 10, 512, GIB), Some((16, 64)));
        assert_eq!(stripe(64 << 10, 64 << 10, 512, GIB), Some((16, 16)));
        assert_eq!(stripe(64 << 10, 256 << 10, 512, GIB - 4096), None, "below 1 GiB");
        assert_eq!(stripe(512, 64 << 10, 512, GIB), None, "the unit is the sector");
        assert_eq!(stripe(4096, 64 << 10, 4096, GIB), None, "the unit is the sector");
        assert_eq!(stripe(64 << 10, 4096, 4096, GIB), None, "the width is the sector");
        assert_eq!(stripe(0, 64 << 10, 512, GIB), None);
        assert_eq!(stripe(64 << 10, 0, 512, GIB), None);
        assert_eq!(stripe(256 << 10, 64 << 10, 512, GIB), None, "the unit is more than the width");
        assert_eq!(stripe(64 << 10, 96 << 10, 512, GIB), None, "the width is not so many units");
        assert_eq!(stripe(6 << 10, 12 << 10, 512, GIB), None, "not whole blocks");
        assert_eq!(stripe(64 << 20, 128 << 20, 512, GIB), None, "no array has such a unit");
    }

    /// mkfs.xfs 6.1.0: `-d su=24576,sw=7` and others. Found by the differential test: what is rounded up is the number
    /// of the log's first block with its group in the high bits, not its place in the group.
    #[test]
    fn the_log_of_a_stripe_that_is_no_power_of_two_begins_where_mkfs_xfs_puts_it() {
        for (unit, start, blocks) in [(3, 8, 16386), (5, 6, 16385), (6, 10, 16386), (7, 12, 16387), (24, 16, 16392), (63, 61, 16443)] {
            let device = Options { min_io_bytes: unit * 4096, opt_io_bytes: 2 * unit * 4096, ..options(2 * GIB) };
            let geometry = Geometry::new(&device).unwrap();
            assert_eq!((geometry.log_start, geometry.log_blocks), (start, blocks), "unit of {unit} blocks");
        }
    }

    /// mkfs.xfs 6.1.0: `-d su=28672,sw=2` on 256 GiB less a sector, found by the differential test. The log begins four
    /// blocks behind the group's head, and the free list takes just these.
    #[test]
    fn a_free_list_that_takes_a_whole_extent_leaves_a_ghost_record() {
        let device = Options { min_io_bytes: 28672, opt_io_bytes: 57344, ..options(256 * GIB - 512) };
        let geometry = Geometry::new(&device).unwrap();
        let after = Extent { start: 0x8009, length: 0x3F_7FFC };
        let expected = FreeSpace { list_start: 6, extents: vec![after], ghost: Some(after) };
        assert_eq!((geometry.log_group, geometry.free_space(8)), (8, expected));
        assert!((0..16).filter(|group| *group != 8).all(|group| geometry.free_space(group).ghost.is_none()));
    }

    #[test]
    fn free_space_is_cut_in_all_ways() {
        let extent = |start, length| Extent { start, length };
        let of = [extent(10, 10), extent(30, 5)];
        assert_eq!(without(&of, extent(0, 5)), of);
        assert_eq!(without(&of, extent(10, 4)), [extent(14, 6), extent(30, 5)]);
        assert_eq!(without(&of, extent(12, 4)), [extent(10, 2), extent(16, 4), extent(30, 5)]);
        assert_eq!(without(&of, extent(16, 4)), [extent(10, 6), extent(30, 5)]);
        assert_eq!(without(&of, extent(10, 10)), [extent(30, 5)]);
        assert_eq!(without(&of, extent(15, 20)), [extent(10, 5)]);
        assert_eq!(without(&of, extent(0, 100)), []);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        /// Every block of the disk is a group's head, log, free list, inode chunk or free: none twice, none forgotten.
        #[test]
        fn every_block_is_accounted_for(
            size_bytes in prop_oneof![300 * MIB..4 * GIB, 300 * MIB..100 * TIB, Just(u64::MAX)],
            block_size in prop::sample::select(super::super::BLOCK_SIZES.to_vec()),
            inode_size in prop::sample::select(super::super::INODE_SIZES.to_vec()),
            sector in prop::sample::select(vec![512_u32, 1024, 4096]),
            unit in prop_oneof![Just(0_u32), 1..8192_u32, Just(8192)],
            width in 1..12_u32,
        ) {
            let device = Options {
                logical_sector_bytes: sector,
                physical_sector_bytes: sector,
                min_io_bytes: unit * block_size,
                opt_io_bytes: unit * block_size * width,
                block_size: Some(block_size),
                inode_size: Some(inode_size),
                ..options(size_bytes)
            };
            let geometry = match Geometry::new(&device) {
                Ok(geometry) => geometry,
                Err(Refusal::InodeSize { .. }) if inode_size > block_size / 2 => return Ok(()),
                Err(Refusal::Sector { .. }) if sector > block_size => return Ok(()),
                Err(other) => return Err(TestCaseError::fail(other.to_string())),
            };
            prop_assert!(geometry.group_count >= 3);
            prop_assert!(geometry.data_blocks * u64::from(block_size) <= size_bytes);
            prop_assert!(geometry.log_start >= geometry.prealloc());
            prop_assert!(geometry.log_start + geometry.log_blocks <= geometry.group_length(geometry.log_group));
            prop_assert!(geometry.root_chunk() + geometry.chunk_blocks() <= geometry.group_length(0));
            prop_assert!(geometry.group_count < 1 << 25);
            if geometry.group_count < 4096 {
                let heads = u64::from(geometry.group_count) * u64::from(geometry.prealloc());
                let used = heads + u64::from(geometry.log_blocks) + u64::from(geometry.chunk_blocks());
                prop_assert_eq!(geometry.free_blocks() + used, geometry.data_blocks);
            }
        }
    }
}
