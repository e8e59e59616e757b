//! From a size to numbers: block size, groups, inodes, descriptor blocks.
//!
//! The rules are those of mke2fs 1.47.0 with Debian 12's mke2fs.conf and `-F -m0`; docs/formats.md gives each one's source.

use super::{Options, Refusal};

/// A superblock is this long, at this byte of the disk.
pub(super) const SUPERBLOCK_BYTES: u64 = 1024;
/// 64 bytes: the 64bit feature is always on.
pub(super) const DESCRIPTOR_BYTES: u64 = 64;
/// Inodes 1 to 11: ten reserved ones and lost+found.
pub(super) const USED_INODES: u64 = 11;
/// Groups whose bitmaps and inode tables lie together (flex_bg).
pub(super) const FLEX_GROUPS: u64 = 16;
/// mke2fs drops a last group that would have fewer free blocks than this.
const MIN_LAST_GROUP_FREE: u64 = 50;
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;
/// The page size that mke2fs rounds to: 4096 on both of our architectures.
const PAGE_BYTES: u64 = 4096;

/// The numbers that say where everything is. Counts are blocks unless they say otherwise.
#[derive(Debug, Clone)]
pub(super) struct Geometry {
    pub(super) block_size: u64,
    pub(super) inode_size: u64,
    pub(super) blocks: u64,
    pub(super) first_data_block: u64,
    pub(super) blocks_per_group: u64,
    pub(super) groups: u64,
    pub(super) inodes_per_group: u64,
    pub(super) inode_table_blocks: u64,
    pub(super) descriptor_blocks: u64,
    pub(super) reserved_descriptor_blocks: u64,
    pub(super) resize_inode: bool,
    pub(super) raid_stride: u16,
    pub(super) raid_stripe_width: u32,
}

/// `ceil(a / b)`
const fn ceil_div(a: u64, b: u64) -> u64 {
    a.div_ceil(b)
}

impl Geometry {
    pub(super) fn new(options: &Options) -> Result<Self, Refusal> {
        let size_kib = options.size_bytes / PAGE_BYTES * (PAGE_BYTES / KIB);
        let (usual_block_size, usual_ratio) = usage_type(size_kib * KIB);
        let block_size = block_size(options, usual_block_size)?;
        let inode_size = inode_size(options, block_size)?;
        let blocks = size_kib * KIB / block_size;
        let ratio = usual_ratio.max(block_size);
        let inodes_wanted = (blocks * block_size / ratio).min(u64::from(u32::MAX));
        if inodes_wanted * inode_size >= blocks * block_size {
            return Err(Refusal::InodesTooLarge { inode_size, inodes: inodes_wanted, size_bytes: options.size_bytes });
        }
        let resize_inode = blocks <= u64::from(u32::MAX);
        let (raid_stride, raid_stripe_width) = stripes(options, block_size);
        let draft = Self {
            block_size,
            inode_size,
            blocks,
            first_data_block: u64::from(block_size == KIB),
            blocks_per_group: (8 * block_size).min(65528),
            groups: 0,
            inodes_per_group: 0,
            inode_table_blocks: 0,
            descriptor_blocks: 0,
            reserved_descriptor_blocks: 0,
            resize_inode,
            raid_stride,
            raid_stripe_width,
        };
        draft.settle(inodes_wanted, options.size_bytes)
    }

    /// Divides the blocks into groups. Two things start it over with other numbers: more inodes per group than a bitmap
    /// block can hold, and a last group too small to be of use.
    fn settle(mut self, inodes_wanted: u64, size_bytes: u64) -> Result<Self, Refusal> {
        let all_blocks = self.blocks;
        // Each turn takes 8 blocks from every group or the last group from the disk: groups have at most 65528 blocks.
        const MAX_TURNS: u32 = 65528 / 8 + 2;
        for _ in 0..MAX_TURNS {
            let too_small = Refusal::TooSmall { size_bytes, block_size: self.block_size };
            let Some(usable) = self.blocks.checked_sub(self.first_data_block).filter(|usable| *usable > 0) else {
                return Err(too_small);
            };
            self.groups = ceil_div(usable, self.blocks_per_group);
            self.descriptor_blocks = ceil_div(self.groups, self.block_size / DESCRIPTOR_BYTES);
            let inodes_per_group = ceil_div(inodes_wanted.max(USED_INODES + 1), self.groups);
            if inodes_per_group > 8 * self.block_size {
                self.blocks_per_group = self.blocks_per_group.saturating_sub(8);
                self.blocks = all_blocks;
                continue;
            }
            self.set_inodes(inodes_per_group);
            self.reserved_descriptor_blocks = self.reserve();
            if 4 * (self.reserved_descriptor_blocks + self.descriptor_blocks) > 3 * self.blocks_per_group {
                return Err(Refusal::NeedsMetaBg { size_bytes, block_size: self.block_size });
            }
            let in_last = usable % self.blocks_per_group;
            let needed = 2 + self.inode_table_blocks + self.reserved_in(self.groups - 1);
            if self.groups == 1 && 0 < in_last && in_last < needed {
                return Err(too_small);
            }
            if 0 < in_last && in_last < needed + MIN_LAST_GROUP_FREE {
                self.blocks -= in_last;
                continue;
            }
            if self.inodes() < USED_INODES {
                return Err(too_small);
            }
            return Ok(self);
        }
        Err(Refusal::TooSmall { size_bytes, block_size: self.block_size })
    }

    /// Fills whole blocks of inode table, in multiples of 8 inodes, and keeps the total below 2³².
    fn set_inodes(&mut self, wanted: u64) {
        let per_block = self.block_size / self.inode_size;
        // The count of free inodes in a descriptor was 16 bits wide once.
        let mut wanted = wanted.min(65536 - per_block);
        loop {
            let table_blocks = ceil_div(wanted * self.inode_size, self.block_size);
            self.inodes_per_group = (table_blocks * per_block).max(8) & !7;
            self.inode_table_blocks = ceil_div(self.inodes_per_group * self.inode_size, self.block_size);
            if self.inodes() <= u64::from(u32::MAX) || wanted <= 1 {
                return;
            }
            wanted -= 1;
        }
    }

    /// Descriptor blocks kept free for growing online to 1024 times the size.
    fn reserve(&self) -> u64 {
        if !self.resize_inode {
            return 0;
        }
        let mut most_blocks = u64::from(u32::MAX);
        if self.blocks < most_blocks / 1024 {
            most_blocks = self.blocks * 1024;
        }
        let most_groups = ceil_div(most_blocks - self.first_data_block, self.blocks_per_group);
        let most_descriptor_blocks = ceil_div(most_groups, self.block_size / DESCRIPTOR_BYTES);
        most_descriptor_blocks.saturating_sub(self.descriptor_blocks).min(self.block_size / 4)
    }

    pub(super) const fn inodes(&self) -> u64 {
        self.inodes_per_group * self.groups
    }

    /// Bytes of the disk that the filesystem covers.
    pub(super) const fn bytes(&self) -> u64 {
        self.blocks * self.block_size
    }

    pub(super) const fn group_start(&self, group: u64) -> u64 {
        self.first_data_block + group * self.blocks_per_group
    }

    /// One past the last block of `group`.
    pub(super) fn group_end(&self, group: u64) -> u64 {
        self.group_start(group + 1).min(self.blocks)
    }

    pub(super) const fn group_of(&self, block: u64) -> u64 {
        block.saturating_sub(self.first_data_block) / self.blocks_per_group
    }

    /// Superblock, descriptors and reserved descriptors at the start of `group`.
    pub(super) const fn reserved_in(&self, group: u64) -> u64 {
        if has_superblock(group) { 1 + self.descriptor_blocks + self.reserved_descriptor_blocks } else { 0 }
    }

    /// The groups with a backup superblock: 1 and the powers of 3, 5 and 7, in order.
    pub(super) fn backup_groups(&self) -> impl Iterator<Item = u64> + use<> {
        backup_groups(self.groups)
    }
}

/// sparse_super: which groups carry a copy of the superblock and the descriptors.
pub(super) const fn has_superblock(group: u64) -> bool {
    group <= 1 || is_power_of(group, 3) || is_power_of(group, 5) || is_power_of(group, 7)
}

const fn is_power_of(mut value: u64, base: u64) -> bool {
    while value > 1 {
        if !value.is_multiple_of(base) {
            return false;
        }
        value /= base;
    }
    value == 1
}

/// The groups below `groups` that carry a backup, in ascending order.
pub(super) fn backup_groups(groups: u64) -> impl Iterator<Item = u64> + use<> {
    let mut powers = [3_u64, 5, 7];
    let first = (groups > 1).then_some(1);
    first.into_iter().chain(std::iter::from_fn(move || {
        let next = powers.into_iter().min()?;
        for (power, base) in powers.iter_mut().zip([3, 5, 7]) {
            if *power == next {
                *power = power.saturating_mul(base);
            }
        }
        (next < groups).then_some(next)
    }))
}

/// mke2fs.conf: block size and bytes per inode, by the size of the disk.
const fn usage_type(size_bytes: u64) -> (u64, u64) {
    match size_bytes {
        0..0x30_0000 => (KIB, 8192),
        0x30_0000..0x2000_0000 => (KIB, 4096),
        _ if size_bytes < 4 * TIB => (4096, 16384),
        _ if size_bytes < 16 * TIB => (4096, 32768),
        _ => (4096, 65536),
    }
}
const _: () = assert!(3 * MIB == 0x30_0000 && 512 * MIB == 0x2000_0000);

fn block_size(options: &Options, usual: u64) -> Result<u64, Refusal> {
    let sector = u64::from(options.logical_sector_bytes);
    let given = options.block_size.map(u64::from);
    let block_size = given.unwrap_or(usual.max(sector));
    if !matches!(block_size, 1024 | 2048 | 4096) || block_size < sector {
        return Err(Refusal::BlockSize { block_size, logical_sector_bytes: sector });
    }
    Ok(block_size)
}

fn inode_size(options: &Options, block_size: u64) -> Result<u64, Refusal> {
    let inode_size = options.inode_size.map_or(256, u64::from);
    if !(256..=block_size).contains(&inode_size) || !inode_size.is_power_of_two() {
        return Err(Refusal::InodeSize { inode_size, block_size });
    }
    Ok(inode_size)
}

/// RAID stride and stripe width in blocks, from what the device says about itself; 0 where it is not more than a block.
fn stripes(options: &Options, block_size: u64) -> (u16, u32) {
    let (mut min_io, mut opt_io) = (u64::from(options.min_io_bytes), u64::from(options.opt_io_bytes));
    let physical = u64::from(options.physical_sector_bytes);
    if min_io == 0 && physical > block_size {
        (min_io, opt_io) = (physical, physical);
    }
    if opt_io == 0 {
        opt_io = min_io;
    }
    let in_blocks = |io: u64| if io > block_size { crate::bytes::low32(io / block_size) } else { 0 };
    (crate::bytes::low16(in_blocks(min_io)), in_blocks(opt_io))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backups_are_in_group_1_and_the_powers_of_3_5_and_7() {
        let expected = [1, 3, 5, 7, 9, 25, 27, 49, 81, 125, 243, 343, 625, 729];
        assert_eq!(backup_groups(730).collect::<Vec<_>>(), expected);
        assert_eq!((1..730).filter(|group| has_superblock(*group)).collect::<Vec<_>>(), expected);
        assert_eq!(backup_groups(1).count(), 0);
        assert_eq!(backup_groups(u64::MAX).count(), 1 + 40 + 27 + 22);
    }

    #[test]
    fn a_size_is_of_the_larger_type_from_its_limit_on() {
        assert_eq!(usage_type(3 * MIB - 1), (1024, 8192));
        assert_eq!(usage_type(3 * MIB), (1024, 4096));
        assert_eq!(usage_type(512 * MIB), (4096, 16384));
        assert_eq!(usage_type(4 * TIB), (4096, 32768));
        assert_eq!(usage_type(16 * TIB), (4096, 65536));
    }
}
