//! The writes of a fresh ext4, in order: superblock destroyed, everything else, flush, superblock, flush. On a disk of zeros,
//! those of them that change something.
//!
//! Bitmaps, descriptors and their backups are made when they are asked for; what is kept is a few numbers per 16 groups.

use super::files::{self, Files};
use super::geometry::{DESCRIPTOR_BYTES, Geometry, SUPERBLOCK_BYTES, USED_INODES};
use super::layout::{Layout, set_bits};
use super::raw::{self, Descriptor, SuperblockFields};
use super::{Options, Refusal};
use crate::bytes::{crc32c_raw, length, low32};
use crate::{MAX_WRITE_BYTES, Write};

/// What mke2fs zeroes first, so that no old signature survives: the first 4 KiB.
const ZAPPED_BYTES: u64 = 4096;
/// Signatures of RAID members lie in the last 64 KiB.
const TAIL_BYTES: u64 = 64 << 10;

/// A part of the image: a flush, zeros, or bytes made from the layout, at most so long as they are asked for.
#[derive(Debug, Clone)]
enum Piece {
    Flush,
    Zeros {
        offset: u64,
        length: u64,
    },
    Bytes {
        offset: u64,
        bytes: Vec<u8>,
    },
    /// Those of group 0. Their copies in other groups are left as they are, as upstream does.
    ReservedBlocks,
    BlockBitmap {
        group: u64,
    },
    InodeBitmap,
    Superblock {
        group: u64,
    },
    /// The copy of all descriptors that lies in `group`.
    Descriptors {
        group: u64,
    },
}

/// The order in which the lazily made pieces come.
#[derive(Debug, Clone, Copy)]
enum Next {
    Files,
    Bitmap { group: u64 },
    Backup { after: u64 },
    Primary,
    Done,
}

/// Makes the plan of a filesystem, or says why there is none.
pub fn plan(options: &Options) -> Result<Plan, Refusal> {
    let geometry = Geometry::new(options)?;
    let mut layout = Layout::new(geometry, options.size_bytes)?;
    let mut files = files::make(&mut layout, options)?;
    let kbytes_written = count_kbytes(&layout, &mut files);
    let geometry = &layout.geometry;
    let journal_blocks: u64 = files.journal_runs.iter().map(|run| run.1).sum();
    let superblock = SuperblockFields {
        uuid: options.uuid,
        hash_seed: options.hash_seed,
        time: options.time,
        free_blocks: geometry.blocks - geometry.first_data_block - layout.taken.count(0, geometry.blocks),
        overhead_blocks: layout.overhead_blocks + journal_blocks + geometry.first_data_block,
        kbytes_written,
        journal: files.journal,
    };
    let pieces = file_pieces(geometry, files, options);
    let seed = raw::checksum_seed(&options.uuid);
    let mut inode_bitmap = vec![0xFF_u8; length(geometry.block_size)];
    inode_bitmap.get_mut(..length(geometry.inodes_per_group / 8)).unwrap_or_default().fill(0);
    set_bits(&mut inode_bitmap, 0, USED_INODES);
    let zeroed = if options.reads_zeros { raw::BG_INODE_ZEROED } else { 0 };
    Ok(Plan {
        current: None,
        pieces: pieces.into_iter(),
        next: Next::Files,
        reads_zeros: options.reads_zeros,
        image: Image { layout, superblock, seed, inode_bitmap, zeroed },
    })
}

/// The bitmaps pass through mke2fs's cache last.
fn count_kbytes(layout: &Layout, files: &mut Files) -> u64 {
    let geometry = &layout.geometry;
    for group in 0..geometry.groups {
        let Some(place) = layout.place_of(group) else { continue };
        if !layout.is_uninit(group, layout.free_in(group)) {
            files.cache.write(place.block_bitmap);
        }
        if group == 0 {
            files.cache.write(place.inode_bitmap);
        }
    }
    files.cache.kbytes_written(geometry.block_size, geometry.descriptor_blocks)
}

fn file_pieces(geometry: &Geometry, files: Files, options: &Options) -> Vec<Piece> {
    let block_size = geometry.block_size;
    let tail_blocks = TAIL_BYTES / block_size;
    let mut tail = geometry.blocks / tail_blocks * tail_blocks;
    tail = if tail > tail_blocks { tail - tail_blocks } else { tail };
    let mut pieces = vec![Piece::Zeros { offset: 0, length: ZAPPED_BYTES }];
    if !options.reads_zeros {
        pieces.push(Piece::Flush);
    }
    pieces.push(Piece::Zeros { offset: tail * block_size, length: (geometry.blocks - tail) * block_size });
    pieces.push(Piece::ReservedBlocks);
    pieces.extend(files.blocks.into_iter().map(|(block, bytes)| Piece::Bytes { offset: block * block_size, bytes }));
    pieces
        .extend(files.journal_runs.iter().map(|(start, blocks)| Piece::Zeros { offset: start * block_size, length: blocks * block_size }));
    if let Some((start, _)) = files.journal_runs.first() {
        let blocks: u64 = files.journal_runs.iter().map(|run| run.1).sum();
        let bytes = raw::journal_superblock(block_size, low32(blocks), &options.uuid);
        pieces.push(Piece::Bytes { offset: start * block_size, bytes });
    }
    pieces
}

/// An ext4 filesystem as a sequence of writes, none longer than [`MAX_WRITE_BYTES`].
#[derive(Debug)]
pub struct Plan {
    /// The piece being given out, and how many of its bytes have been.
    current: Option<(Piece, u64)>,
    pieces: std::vec::IntoIter<Piece>,
    next: Next,
    /// What would only write zeros is left out.
    reads_zeros: bool,
    image: Image,
}

impl Plan {
    /// Bytes of the disk that belong to the filesystem; what is beyond is not touched.
    #[must_use]
    pub const fn filesystem_bytes(&self) -> u64 {
        self.image.layout.geometry.bytes()
    }

    /// The block size that was chosen.
    #[must_use]
    pub const fn block_size(&self) -> u64 {
        self.image.layout.geometry.block_size
    }

    fn next_piece(&mut self) -> Option<Piece> {
        loop {
            let (piece, next) = self.step()?;
            self.next = next;
            if piece.is_some() {
                return piece;
            }
        }
    }

    /// What comes now, if anything, and what comes then.
    fn step(&mut self) -> Option<(Option<Piece>, Next)> {
        let groups = self.image.layout.geometry.groups;
        Some(match self.next {
            Next::Files => match self.pieces.next() {
                Some(piece) => (Some(piece), Next::Files),
                None => (Some(Piece::InodeBitmap), Next::Bitmap { group: 0 }),
            },
            Next::Bitmap { group } if group == groups => (Some(Piece::Descriptors { group: 0 }), Next::Backup { after: 0 }),
            Next::Bitmap { group } => {
                let is_written = !self.image.layout.is_uninit(group, self.image.layout.free_in(group));
                (is_written.then_some(Piece::BlockBitmap { group }), Next::Bitmap { group: group + 1 })
            }
            Next::Backup { after } => match super::geometry::backup_groups(groups).find(|group| *group > after) {
                Some(group) => {
                    self.pieces = vec![Piece::Descriptors { group }].into_iter();
                    (Some(Piece::Superblock { group }), Next::Backup { after: group })
                }
                None => (Some(Piece::Flush), Next::Primary),
            },
            Next::Primary => {
                self.pieces = vec![Piece::Flush].into_iter();
                (Some(Piece::Superblock { group: 0 }), Next::Done)
            }
            Next::Done => return None,
        })
    }
}

impl Iterator for Plan {
    type Item = Write;

    fn next(&mut self) -> Option<Write> {
        loop {
            if let Some((piece, done)) = self.current.take()
                && let Some((write, done)) = self.image.write(&piece, done)
            {
                self.current = Some((piece, done));
                if self.reads_zeros && write.is_zeros() {
                    continue;
                }
                return Some(write);
            }
            // A piece may bring others behind it.
            let piece = if matches!(self.next, Next::Files) { None } else { self.pieces.next() };
            self.current = Some((piece.or_else(|| self.next_piece())?, 0));
        }
    }
}

/// The parts of the image that are made on demand.
#[derive(Debug)]
struct Image {
    layout: Layout,
    superblock: SuperblockFields,
    seed: u32,
    /// Of group 0, the only one that is written.
    inode_bitmap: Vec<u8>,
    /// BG_INODE_ZEROED or 0.
    zeroed: u16,
}

impl Image {
    /// The write of `piece` that follows after its first `done` bytes, and how many are done then.
    fn write(&self, piece: &Piece, done: u64) -> Option<(Write, u64)> {
        let geometry = &self.layout.geometry;
        let block_size = geometry.block_size;
        let (offset, total) = match piece {
            Piece::Flush => return (done == 0).then_some((Write::Flush, 1)),
            Piece::Zeros { offset, length } => (*offset, *length),
            Piece::Bytes { offset, bytes } => (*offset, bytes.len() as u64),
            Piece::ReservedBlocks => (geometry.first_reserved_block() * block_size, geometry.reserved_descriptor_blocks * block_size),
            Piece::BlockBitmap { group } => (self.layout.place_of(*group)?.block_bitmap * block_size, block_size),
            Piece::InodeBitmap => (self.layout.place_of(0)?.inode_bitmap * block_size, block_size),
            Piece::Superblock { group: 0 } => (SUPERBLOCK_BYTES, SUPERBLOCK_BYTES),
            Piece::Superblock { group } => (geometry.group_start(*group) * block_size, SUPERBLOCK_BYTES),
            Piece::Descriptors { group } => ((geometry.group_start(*group) + 1) * block_size, geometry.descriptor_blocks * block_size),
        };
        let now = (total - done.min(total)).min(MAX_WRITE_BYTES);
        if now == 0 {
            return None;
        }
        let bytes = match piece {
            Piece::Flush => return None,
            Piece::Zeros { .. } => return Some((Write::Zeros { offset: offset + done, length: now }, done + now)),
            Piece::Bytes { bytes, .. } => bytes.get(length(done)..length(done + now))?.to_vec(),
            Piece::ReservedBlocks => files::reserved_blocks(geometry, done, now),
            Piece::BlockBitmap { group } => self.layout.block_bitmap(*group),
            Piece::InodeBitmap => self.inode_bitmap.clone(),
            Piece::Superblock { group } => self.superblock.bytes(geometry, *group),
            Piece::Descriptors { .. } => self.descriptors(done, now),
        };
        Some((Write::Data { offset: offset + done, bytes }, done + now))
    }

    /// Bytes `from..from + count` of the descriptors; zeros behind the last.
    fn descriptors(&self, from: u64, count: u64) -> Vec<u8> {
        let mut bytes = vec![0_u8; length(count)];
        let groups = from / DESCRIPTOR_BYTES..self.layout.geometry.groups;
        for (slot, group) in bytes.chunks_exact_mut(length(DESCRIPTOR_BYTES)).zip(groups) {
            if let Some(descriptor) = self.descriptor(group) {
                slot.copy_from_slice(&descriptor.bytes(low32(group), self.seed));
            }
        }
        bytes
    }

    fn descriptor(&self, group: u64) -> Option<Descriptor> {
        let geometry = &self.layout.geometry;
        let place = self.layout.place_of(group)?;
        let free = self.layout.free_in(group);
        let inodes = low32(geometry.inodes_per_group);
        let mut descriptor = Descriptor {
            block_bitmap: place.block_bitmap,
            inode_bitmap: place.inode_bitmap,
            inode_table: place.inode_table,
            free_blocks: low32(free),
            free_inodes: inodes,
            unused_inodes: inodes,
            flags: self.zeroed,
            ..Descriptor::default()
        };
        if group == 0 {
            descriptor.free_inodes -= low32(USED_INODES);
            descriptor.unused_inodes -= low32(USED_INODES);
            descriptor.used_directories = 2;
            let counted = self.inode_bitmap.get(..length(geometry.inodes_per_group / 8))?;
            descriptor.inode_bitmap_checksum = crc32c_raw(self.seed, counted);
        } else {
            descriptor.flags |= raw::BG_INODE_UNINIT;
        }
        if self.layout.is_uninit(group, free) {
            descriptor.flags |= raw::BG_BLOCK_UNINIT;
        } else {
            let bitmap = self.layout.block_bitmap(group);
            let counted = bitmap.get(..length(geometry.blocks_per_group / 8))?;
            descriptor.block_bitmap_checksum = crc32c_raw(self.seed, counted);
        }
        Some(descriptor)
    }
}
