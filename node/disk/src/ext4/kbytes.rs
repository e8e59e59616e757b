//! `s_kbytes_written`: how much mke2fs believes to have written, which is a fact about its cache, not about the disk.
//!
//! Its library keeps eight blocks, written back when the least recently used one must make room; the count is taken
//! after the bitmaps and before the rest of the cache, the superblocks and the descriptors. Nothing reads the number but
//! `tune2fs -l`; it is kept because then "equal to upstream's" needs no exception.

/// Blocks that mke2fs keeps before it writes one back.
const CACHED_BLOCKS: usize = 8;
/// The first 4 KiB, zeroed before anything else.
const ZAPPED_BYTES: u64 = 4096;

#[derive(Debug, Clone, Copy, Default)]
struct Cached {
    block: u64,
    is_dirty: bool,
    /// 0: holds nothing.
    used_at: u64,
}

/// The cache, by the blocks that pass through it; their bytes do not matter.
#[derive(Debug, Clone, Default)]
pub(super) struct Cache {
    slots: [Cached; CACHED_BLOCKS],
    clock: u64,
    written_back: u64,
    #[cfg(test)]
    pub(super) trace: Vec<u64>,
}

impl Cache {
    pub(super) fn read(&mut self, block: u64) {
        self.touch(block, false);
    }

    pub(super) fn write(&mut self, block: u64) {
        self.touch(block, true);
    }

    fn touch(&mut self, block: u64, is_dirty: bool) {
        self.clock += 1;
        let used_at = self.clock;
        if let Some(slot) = self.slots.iter_mut().find(|slot| slot.used_at > 0 && slot.block == block) {
            slot.is_dirty |= is_dirty;
            slot.used_at = used_at;
            return;
        }
        if let Some(slot) = self.slots.iter_mut().min_by_key(|slot| slot.used_at) {
            self.written_back += u64::from(slot.is_dirty);
            #[cfg(test)]
            if slot.is_dirty {
                self.trace.push(slot.block);
            }
            *slot = Cached { block, is_dirty, used_at };
        }
    }

    /// The number for the superblock.
    pub(super) const fn kbytes_written(&self, block_size: u64, descriptor_blocks: u64) -> u64 {
        let counted = ZAPPED_BYTES + self.written_back * block_size;
        1 + counted / 1024 + (descriptor_blocks + 1) / (block_size / 1024)
    }
}
