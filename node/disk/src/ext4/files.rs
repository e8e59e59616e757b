//! What a fresh filesystem holds: the root directory, lost+found, the inode that keeps room for growing, the journal.
//!
//! Blocks are given out first-fit in the order of creation, as mke2fs does, so the order of this file is part of the
//! format. Beside the bytes it keeps book of the blocks that pass through mke2fs's cache ([`super::kbytes`]).

use super::geometry::{Geometry, USED_INODES};
use super::kbytes::Cache;
use super::layout::Layout;
use super::raw::{self, Extent, Inode};
use super::{Options, Refusal};
use crate::bytes::{length, low16, low32, put_u32};

const BAD_BLOCKS_INODE: u32 = 1;
const ROOT_INODE: u32 = 2;
const RESIZE_INODE: u32 = 7;
pub(super) const JOURNAL_INODE: u32 = 8;
const LOST_AND_FOUND_INODE: u32 = 11;
/// mke2fs adds blocks to lost+found until it is this large, and has at least two.
const LOST_AND_FOUND_BYTES: u64 = 16 << 10;
/// Its loop ends after this many blocks, whatever the size: with 1 KiB blocks it does.
const LOST_AND_FOUND_MAX_BLOCKS: u64 = 12;
/// An initialised extent is at most this many blocks long.
const MAX_EXTENT_BLOCKS: u64 = 32768;
/// Of an inode's 15 block pointers: the double-indirect one.
const DOUBLE_INDIRECT: usize = 13;

/// Blocks with their bytes, and where the journal is.
#[derive(Debug)]
pub(super) struct Files {
    /// Whole blocks, by block number, in the order in which they are written.
    pub(super) blocks: Vec<(u64, Vec<u8>)>,
    /// Runs of the journal: start and length in blocks. All zeros but the first block.
    pub(super) journal_runs: Vec<(u64, u64)>,
    pub(super) journal: Option<([u8; 60], u64)>,
    pub(super) cache: Cache,
}

struct Maker<'a> {
    layout: &'a mut Layout,
    options: &'a Options,
    seed: u32,
    inodes: Vec<u8>,
    inode_table: u64,
    files: Files,
}

/// Makes the files of an empty filesystem, taking their blocks out of `layout`.
pub(super) fn make(layout: &mut Layout, options: &Options) -> Result<Files, Refusal> {
    let block_size = layout.geometry.block_size;
    let too_small = Refusal::TooSmall { size_bytes: options.size_bytes, block_size };
    let inode_table = layout.place_of(0).ok_or(too_small.clone())?.inode_table;
    let table_bytes = (USED_INODES * layout.geometry.inode_size).next_multiple_of(block_size);
    let files = Files { blocks: Vec::new(), journal_runs: Vec::new(), journal: None, cache: Cache::default() };
    let mut maker =
        Maker { seed: raw::checksum_seed(&options.uuid), inodes: vec![0; length(table_bytes)], inode_table, layout, options, files };
    for number in 1..low32(USED_INODES) {
        maker.put_inode(&Inode::empty(number), None);
    }
    maker.make_all().ok_or(too_small)?;
    let Maker { inodes, mut files, .. } = maker;
    let inode_blocks = inodes.chunks(length(block_size)).zip(inode_table..).map(|(bytes, block)| (block, bytes.to_vec()));
    files.blocks.splice(0..0, inode_blocks.collect::<Vec<_>>());
    Ok(files)
}

impl Maker<'_> {
    fn make_all(&mut self) -> Option<()> {
        self.make_directories()?;
        self.put_inode(&Inode::empty(BAD_BLOCKS_INODE), Some(self.options.time));
        if self.layout.geometry.resize_inode {
            self.make_resize_inode()?;
        }
        self.make_journal()
    }

    const fn geometry(&self) -> &Geometry {
        &self.layout.geometry
    }

    /// The first free block at or after `goal`, else the first free one, taken.
    fn take_block(&mut self, goal: u64) -> Option<u64> {
        let (front, end) = (self.geometry().first_data_block, self.geometry().blocks);
        let taken = &self.layout.taken;
        let (block, _) = taken.free_run(goal, 1, end).or_else(|| taken.free_run(front, 1, end))?;
        self.layout.taken.take(block, 1);
        Some(block)
    }

    /// The block of the inode table in which inode `number` lies.
    fn inode_block(&self, number: u32) -> u64 {
        self.inode_table + u64::from(number - 1) * self.geometry().inode_size / self.geometry().block_size
    }

    fn put_inode(&mut self, inode: &Inode, time: Option<u32>) {
        let block = self.inode_block(inode.number);
        self.files.cache.read(block);
        self.files.cache.write(block);
        let inode_size = length(self.geometry().inode_size);
        let bytes = inode.bytes(inode_size, time, self.seed);
        crate::bytes::put(&mut self.inodes, inode_size * length(u64::from(inode.number - 1)), &bytes);
    }

    fn directory_block(&self, inode: u32, entries: &[(u32, &[u8])]) -> Vec<u8> {
        let mut block = vec![0_u8; length(self.geometry().block_size)];
        let end = low16(low32(self.geometry().block_size)) - raw::DIRECTORY_TAIL_BYTES;
        let mut at = 0;
        for (index, (child, name)) in entries.iter().enumerate() {
            let entry_length = if index + 1 == entries.len() { end - at } else { 12 };
            raw::put_directory_entry(&mut block, usize::from(at), *child, entry_length, name);
            at += entry_length;
        }
        raw::put_directory_tail(&mut block, raw::inode_seed(self.seed, inode));
        block
    }

    fn directory(&self, number: u32, mode: u16, links: u16, blocks: &[u64]) -> Option<Inode> {
        let block_size = self.geometry().block_size;
        let runs = blocks.iter().fold(Vec::<(u64, u64)>::new(), |mut runs, block| {
            match runs.last_mut() {
                Some(run) if run.0 + run.1 == *block => run.1 += 1,
                _ => runs.push((*block, 1)),
            }
            runs
        });
        let extents = extents(&runs)?;
        let mut i_block = [0; 60];
        if extents.len() > raw::EXTENTS_IN_INODE {
            return None;
        }
        raw::put_extents(&mut i_block, &extents, raw::EXTENTS_IN_INODE);
        let size_bytes = blocks.len() as u64 * block_size;
        Some(Inode { number, mode, links, size_bytes, sectors: size_bytes / 512, flags: raw::EXT4_EXTENTS_FL, i_block })
    }

    fn make_directories(&mut self) -> Option<()> {
        const DIRECTORY: u16 = 0o040_000;
        let front = self.geometry().first_data_block;
        let block_size = self.geometry().block_size;
        let root = self.take_block(front)?;
        let entries: [(u32, &[u8]); 3] = [(ROOT_INODE, b"."), (ROOT_INODE, b".."), (LOST_AND_FOUND_INODE, b"lost+found")];
        let bytes = self.directory_block(ROOT_INODE, &entries);
        self.files.blocks.push((root, bytes));
        self.files.cache.write(root);
        let root_inode = self.directory(ROOT_INODE, DIRECTORY | 0o755, 3, &[root])?;
        self.put_inode(&root_inode, Some(self.options.time));

        let first = self.take_block(front)?;
        let entries: [(u32, &[u8]); 2] = [(LOST_AND_FOUND_INODE, b"."), (ROOT_INODE, b"..")];
        let bytes = self.directory_block(LOST_AND_FOUND_INODE, &entries);
        self.files.blocks.push((first, bytes));
        self.files.cache.write(first);
        // Linking the name into the root, and looking it up again.
        self.files.cache.read(self.inode_block(LOST_AND_FOUND_INODE));
        self.files.cache.write(self.inode_block(LOST_AND_FOUND_INODE));
        self.files.cache.write(self.inode_block(ROOT_INODE));
        self.files.cache.write(root);

        let mut blocks = vec![first];
        let wanted = (LOST_AND_FOUND_BYTES / block_size).clamp(2, LOST_AND_FOUND_MAX_BLOCKS);
        while (blocks.len() as u64) < wanted {
            let block = self.take_block(blocks.last().copied()?)?;
            let bytes = self.directory_block(LOST_AND_FOUND_INODE, &[(0, b"")]);
            self.files.blocks.push((block, bytes));
            self.files.cache.write(block);
            self.files.cache.write(self.inode_block(LOST_AND_FOUND_INODE));
            blocks.push(block);
        }
        let inode = self.directory(LOST_AND_FOUND_INODE, DIRECTORY | 0o700, 2, &blocks)?;
        self.put_inode(&inode, Some(self.options.time));
        Some(())
    }

    /// Inode 7 owns the reserved descriptor blocks: those of group 0 as indirect blocks, which list the same block of
    /// every backup. The kernel takes them from it when the filesystem grows.
    fn make_resize_inode(&mut self) -> Option<()> {
        let geometry = self.geometry().clone();
        let pointers = geometry.block_size / 4;
        let reserved = geometry.reserved_descriptor_blocks;
        let first_reserved = geometry.first_data_block + 1 + geometry.descriptor_blocks;
        self.files.cache.read(self.inode_block(RESIZE_INODE));
        let root = self.take_block(first_reserved - 1 + reserved + 2 + geometry.inode_table_blocks)?;
        let mut root_bytes = vec![0_u8; length(geometry.block_size)];
        let backups: Vec<u64> = geometry.backup_groups().collect();
        for index in 0..reserved {
            let block = first_reserved + index;
            put_u32(&mut root_bytes, length((geometry.descriptor_blocks + index) % pointers * 4), low32(block));
            let mut bytes = vec![0_u8; length(geometry.block_size)];
            for (slot, group) in backups.iter().enumerate() {
                put_u32(&mut bytes, slot * 4, low32(block + group * geometry.blocks_per_group));
            }
            self.files.cache.write(block);
            self.files.blocks.push((block, bytes));
        }
        self.files.cache.write(root);
        self.files.blocks.push((root, root_bytes));
        let mut i_block = [0; 60];
        put_u32(&mut i_block, DOUBLE_INDIRECT * 4, low32(root));
        let owned = 1 + reserved + reserved * backups.len() as u64;
        let inode = Inode {
            number: RESIZE_INODE,
            mode: 0o100_600,
            links: 1,
            size_bytes: (pointers * pointers + pointers + 12) * geometry.block_size,
            sectors: owned * geometry.block_size / 512,
            flags: 0,
            i_block,
        };
        self.put_inode(&inode, Some(self.options.time));
        Some(())
    }

    fn make_journal(&mut self) -> Option<()> {
        let Some(journal_blocks) = journal_blocks(self.geometry().blocks) else { return Some(()) };
        let block_size = length(self.geometry().block_size);
        let goal = self.geometry().group_start(self.journal_group());
        let mut leaf = None;
        let mut left = journal_blocks;
        let mut from = goal;
        while left > 0 {
            let run = self.take_run(from, left.min(MAX_EXTENT_BLOCKS))?;
            self.files.journal_runs.push(run);
            from = run.0 + run.1;
            left -= run.1;
            if self.files.journal_runs.len() > raw::EXTENTS_IN_INODE && leaf.is_none() {
                let first = self.files.journal_runs.first()?.0;
                leaf = Some(self.take_block(first.saturating_sub(1))?);
            }
        }
        let extents = extents(&self.files.journal_runs)?;
        let mut i_block = [0; 60];
        raw::put_extents(&mut i_block, &extents, raw::EXTENTS_IN_INODE);
        if let Some(leaf) = leaf {
            if extents.len() > raw::extents_in_block(block_size) {
                return None;
            }
            let mut bytes = vec![0; block_size];
            raw::put_extents(&mut bytes, &extents, raw::extents_in_block(block_size));
            raw::put_leaf_checksum(&mut bytes, raw::inode_seed(self.seed, JOURNAL_INODE));
            raw::put_extent_index(&mut i_block, leaf);
            self.files.cache.write(leaf);
            self.files.blocks.push((leaf, bytes));
        }
        let size_bytes = journal_blocks * self.geometry().block_size;
        let sectors = (journal_blocks + u64::from(leaf.is_some())) * self.geometry().block_size / 512;
        let (number, flags) = (JOURNAL_INODE, raw::EXT4_EXTENTS_FL);
        self.put_inode(&Inode { number, mode: 0o100_600, links: 1, size_bytes, sectors, flags, i_block }, Some(self.options.time));
        self.files.cache.write(self.files.journal_runs.first()?.0);
        self.files.journal = Some((i_block, size_bytes));
        Some(())
    }

    /// A run of free blocks from `from` on, else from the front, at most `most` long, taken.
    fn take_run(&mut self, from: u64, most: u64) -> Option<(u64, u64)> {
        let (front, end) = (self.geometry().first_data_block, self.geometry().blocks);
        let taken = &self.layout.taken;
        let run = taken.free_run(from, most, end).or_else(|| taken.free_run(front, most, end))?;
        self.layout.taken.take(run.0, run.1);
        Some(run)
    }

    /// The journal lies in the middle of the disk: in the emptiest of up to three groups there, or from the first group
    /// of the flex group in the middle on.
    fn journal_group(&self) -> u64 {
        use super::geometry::FLEX_GROUPS;
        let geometry = self.geometry();
        let last = geometry.groups - 1;
        let mut middle = geometry.group_of(geometry.first_data_block + (geometry.blocks - geometry.first_data_block) / 2);
        let start = if middle > FLEX_GROUPS {
            middle = middle / FLEX_GROUPS * FLEX_GROUPS;
            while middle < last && self.layout.free_in(middle) == 0 {
                middle += 1;
            }
            middle
        } else {
            middle.saturating_sub(1)
        };
        let mut best = (start, 0);
        for group in start..=(middle + 1).min(last) {
            let free = self.layout.free_in(group);
            if free > best.1 {
                best = (group, free);
            }
        }
        best.0
    }
}

fn extents(runs: &[(u64, u64)]) -> Option<Vec<Extent>> {
    let mut first = 0;
    let mut extents = Vec::new();
    for (start, blocks) in runs {
        extents.push(Extent { first, start: *start, length: u16::try_from(*blocks).ok()? });
        first += u32::try_from(*blocks).ok()?;
    }
    Some(extents)
}

/// How many blocks the journal of a filesystem of `blocks` blocks has; none below 2048.
const fn journal_blocks(blocks: u64) -> Option<u64> {
    Some(match blocks {
        0..2048 => return None,
        2048..0x8000 => 1024,
        0x8000..0x4_0000 => 4096,
        0x4_0000..0x8_0000 => 8192,
        0x8_0000..0x40_0000 => 16384,
        0x40_0000..0x80_0000 => 32768,
        0x80_0000..0x100_0000 => 65536,
        0x100_0000..0x200_0000 => 131_072,
        _ => 262_144,
    })
}
