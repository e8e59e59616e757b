//! Where the bitmaps and inode tables of every group lie (flex_bg: those of 16 groups together), and what is free.
//!
//! The search for their places has quirks, and they are kept: growing a filesystem and comparing it with upstream's
//! both depend on the same layout.

use super::Refusal;
use super::geometry::{FLEX_GROUPS, Geometry};
use super::space::Taken;

/// Blocks of one group's bitmaps and inode table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) block_bitmap: u64,
    pub(super) inode_bitmap: u64,
    pub(super) inode_table: u64,
}

#[derive(Debug, Clone)]
pub(super) struct Layout {
    pub(super) geometry: Geometry,
    pub(super) taken: Taken,
    /// The places of the groups from `.0` on follow each other, up to the next entry: a few entries per 16 groups.
    places: Vec<(u64, Place)>,
    /// Taken by superblocks, descriptors, bitmaps and inode tables.
    pub(super) overhead_blocks: u64,
}

impl Layout {
    pub(super) fn new(geometry: Geometry, size_bytes: u64) -> Result<Self, Refusal> {
        let mut taken = Taken::default();
        taken.take(geometry.first_data_block, geometry.reserved_in(0));
        for group in geometry.backup_groups() {
            taken.take(geometry.group_start(group), geometry.reserved_in(group));
        }
        let mut layout = Self { geometry, taken, places: Vec::new(), overhead_blocks: 0 };
        layout.place_groups().ok_or(Refusal::TooSmall { size_bytes, block_size: layout.geometry.block_size })?;
        layout.overhead_blocks = layout.taken.count(0, layout.geometry.blocks);
        Ok(layout)
    }

    fn place_groups(&mut self) -> Option<()> {
        let groups = self.geometry.groups;
        let table_blocks = self.geometry.inode_table_blocks;
        let mut previous = Place { block_bitmap: 0, inode_bitmap: 0, inode_table: 0 };
        for group in 0..groups {
            let flex = group / FLEX_GROUPS * FLEX_GROUPS;
            let in_flex = FLEX_GROUPS.min(groups - flex);
            let first = group == flex;
            let apart = if in_flex == 1 { FLEX_GROUPS } else { in_flex };
            let left = flex + in_flex - group;
            let after = if first { 0 } else { previous.block_bitmap + 1 };
            let block_bitmap = self.place(group, after, left, 1)?;
            let after = if first { block_bitmap + apart } else { previous.inode_bitmap + 1 };
            let inode_bitmap = self.place(group, after, left, 1)?;
            let after = if first { inode_bitmap + apart } else { previous.inode_table + table_blocks };
            let inode_table = self.place(group, after, left, table_blocks)?;
            let place = Place { block_bitmap, inode_bitmap, inode_table };
            if group == 0 || place != next_place(previous, 1, table_blocks) {
                self.places.push((group, place));
            }
            previous = place;
        }
        Some(())
    }

    /// Finds and takes `length` blocks for `group`, preferably from `after` on, with `left` groups of its flex to come.
    fn place(&mut self, group: u64, after: u64, left: u64, length: u64) -> Option<u64> {
        let geometry = &self.geometry;
        let flex = group / FLEX_GROUPS * FLEX_GROUPS;
        let start = geometry.group_start(flex);
        let finish = geometry.group_end((flex + FLEX_GROUPS).min(geometry.groups) - 1) - 1;
        let wanted = (left * length).min(geometry.blocks_per_group / 4);
        let near = if after != 0 && after < geometry.blocks { self.taken.search(geometry, after, after + wanted, length) } else { None };
        let from = near
            .or_else(|| self.taken.search(geometry, start, finish, wanted))
            .or_else(|| self.taken.search(geometry, start, finish, length))
            .or_else(|| self.taken.search(geometry, 0, finish, length))?;
        let found = self.taken.search(geometry, from, finish, length)?;
        self.taken.take(found, length);
        Some(found)
    }

    /// Where `group`'s bitmaps and inode table are.
    pub(super) fn place_of(&self, group: u64) -> Option<Place> {
        let at = self.places.partition_point(|entry| entry.0 <= group).checked_sub(1)?;
        let (first, place) = self.places.get(at)?;
        Some(next_place(*place, group - first, self.geometry.inode_table_blocks))
    }

    pub(super) fn free_in(&self, group: u64) -> u64 {
        let (start, end) = (self.geometry.group_start(group), self.geometry.group_end(group));
        end - start - self.taken.count(start, end)
    }

    /// Nothing lies in this group but copies of superblock and descriptors: its block bitmap is not written, the kernel
    /// makes it up (BLOCK_UNINIT). Never the last group's, whose end it could not know.
    pub(super) fn is_uninit(&self, group: u64, free: u64) -> bool {
        let blocks = self.geometry.group_end(group) - self.geometry.group_start(group);
        group + 1 != self.geometry.groups && free + self.geometry.reserved_in(group) == blocks
    }

    /// The block bitmap of `group`, a block long; blocks beyond the end of the group count as taken.
    pub(super) fn block_bitmap(&self, group: u64) -> Vec<u8> {
        let (start, end) = (self.geometry.group_start(group), self.geometry.group_end(group));
        let mut bitmap = vec![0_u8; crate::bytes::length(self.geometry.block_size)];
        for (from, to) in self.taken.within(start, end) {
            set_bits(&mut bitmap, from - start, to - start);
        }
        set_bits(&mut bitmap, end - start, 8 * self.geometry.block_size);
        bitmap
    }
}

/// The place `ahead` groups further on, if nothing is in the way.
const fn next_place(place: Place, ahead: u64, table_blocks: u64) -> Place {
    Place {
        block_bitmap: place.block_bitmap + ahead,
        inode_bitmap: place.inode_bitmap + ahead,
        inode_table: place.inode_table + ahead * table_blocks,
    }
}

/// Sets bits `from..to`, the lowest bit of each byte first.
pub(super) fn set_bits(bitmap: &mut [u8], from: u64, to: u64) {
    let whole = from.next_multiple_of(8)..to / 8 * 8;
    if whole.start < whole.end {
        let bytes = crate::bytes::length(whole.start / 8)..crate::bytes::length(whole.end / 8);
        bitmap.get_mut(bytes).unwrap_or_default().fill(0xFF);
    }
    let before = from..to.min(whole.start);
    let after = whole.end.max(before.end)..to;
    for bit in before.chain(after) {
        if let Some(byte) = bitmap.get_mut(crate::bytes::length(bit / 8)) {
            *byte |= 1 << (bit % 8);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_set_from_the_lowest_on() {
        let mut bitmap = [0_u8; 4];
        set_bits(&mut bitmap, 3, 5);
        set_bits(&mut bitmap, 14, 25);
        assert_eq!(bitmap, [0b0001_1000, 0b1100_0000, 0xFF, 1]);
    }
}
