//! The writes of a fresh xfs, in order: ends of the disk and log zeroed, everything else, flush, superblock, flush.
//!
//! Each group is made when it is asked for; nothing is kept but the geometry.

use std::collections::VecDeque;

use super::geometry::{Geometry, WIPE_BYTES};
use super::raw::{self, Copy, SB_BYTES};
use super::{Options, Refusal, log};
use crate::{MAX_WRITE_BYTES, Write};

/// An iterator of the writes; made again from its start by cloning it before use.
#[derive(Debug, Clone)]
pub struct Plan {
    geometry: Geometry,
    uuid: [u8; 16],
    time: u32,
    /// Ranges yet to be zeroed: offset and length, in bytes.
    zeros: VecDeque<(u64, u64)>,
    /// Writes that are made, in order.
    due: VecDeque<Write>,
    next: Next,
}

/// What is made when `zeros` and `due` are empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Log,
    Group(u32),
    Done,
}

/// Makes the plan of a filesystem, or says why there is none.
pub fn plan(options: &Options) -> Result<Plan, Refusal> {
    let geometry = Geometry::new(options)?;
    // The log's own bytes must be zero where its one record does not lie: replay would look for records there.
    let log = (geometry.log_offset_bytes(), geometry.log_bytes());
    let zeros = [(0, WIPE_BYTES), (geometry.device_end_bytes - WIPE_BYTES, WIPE_BYTES), log];
    let zeros = if options.reads_zeros { VecDeque::new() } else { zeros.into() };
    Ok(Plan { geometry, uuid: options.uuid, time: options.time, zeros, due: VecDeque::new(), next: Next::Log })
}

impl Iterator for Plan {
    type Item = Write;

    fn next(&mut self) -> Option<Write> {
        if let Some((offset, length)) = self.zeros.pop_front() {
            let now = length.min(MAX_WRITE_BYTES);
            if now < length {
                self.zeros.push_front((offset + now, length - now));
            }
            return Some(Write::Zeros { offset, length: now });
        }
        if self.due.is_empty() {
            self.make_next();
        }
        self.due.pop_front()
    }
}

impl Plan {
    /// Bytes of the disk that the filesystem will cover.
    #[must_use]
    pub fn filesystem_bytes(&self) -> u64 {
        self.geometry.data_blocks * u64::from(self.geometry.block_size)
    }

    fn make_next(&mut self) {
        let g = &self.geometry;
        self.next = match self.next {
            Next::Log => {
                self.due.push_back(Write::Data { offset: g.log_offset_bytes(), bytes: log::unmount_record(g, &self.uuid) });
                Next::Group(0)
            }
            Next::Group(group) if group < g.group_count => {
                let writes = self.group(group);
                self.due.extend(writes);
                Next::Group(group + 1)
            }
            Next::Group(_) => {
                let inodes = self.inode_chunk();
                let mut superblock = self.superblock(Copy::Primary);
                // The rest of a larger sector is zero and stays so; the superblock itself fits what a disk writes whole.
                superblock.truncate(SB_BYTES);
                self.due.extend([inodes, Write::Flush, Write::Data { offset: 0, bytes: superblock }, Write::Flush]);
                Next::Done
            }
            Next::Done => Next::Done,
        };
    }

    /// A group's header sectors and B-tree roots; in group 0 without the superblock, which comes last.
    fn group(&self, group: u32) -> [Write; 2] {
        let (g, uuid) = (&self.geometry, &self.uuid);
        let free = g.free_space(group);
        let headers = [raw::agf(g, uuid, group, &free), raw::agi(g, uuid, group), raw::agfl(g, uuid, group, &free)].concat();
        let start = g.group_offset_bytes(group);
        let headers = if group == 0 {
            Write::Data { offset: u64::from(g.sector_bytes), bytes: headers }
        } else {
            // The middle and the last copy are the two that mkfs.xfs tells the root inode.
            let knows_root = group == g.group_count - 1 || (g.group_count > 2 && group == (g.group_count - 1) / 2);
            Write::Data { offset: start, bytes: [self.superblock(Copy::Secondary { knows_root }), headers].concat() }
        };
        let roots_offset = start + u64::from(g.header_blocks()) * u64::from(g.block_size);
        [headers, Write::Data { offset: roots_offset, bytes: raw::roots(g, uuid, group, &free) }]
    }

    fn inode_chunk(&self) -> Write {
        let g = &self.geometry;
        Write::Data { offset: u64::from(g.root_chunk()) * u64::from(g.block_size), bytes: raw::inode_chunk(g, &self.uuid, self.time) }
    }

    fn superblock(&self, copy: Copy) -> Vec<u8> {
        raw::superblock(&self.geometry, &self.uuid, copy)
    }
}
