//! What the first 4 KiB of a disk say about xfs on it: the part of the probe that needs no library.

use super::superblock::{self, NotAsuperblock, Superblock};
use crate::mark::{Mark, Marked};

/// How much of the disk's beginning [`judge`] wants to see: the largest sector that our profile makes.
pub const HEAD_BYTES: usize = 4096;

/// What a disk is, as far as xfs and the mark of an unfinished format can tell. A disk is Blank for the probe only when
/// the other looks of decision 3 (every range read, libblkid, backups) agree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Surface {
    /// The head is all zeros: neither mark nor superblock.
    Blank,
    /// A format of this very volume was cut short: to be formatted again, never to be mounted.
    Unfinished,
    /// A superblock with a good checksum, and no mark.
    Complete(Superblock),
    /// Something else: the mark of another volume, a damaged superblock, other data.
    Other(&'static str),
}

/// Judges the first [`HEAD_BYTES`] of a disk that should be `mark`'s volume. Fewer bytes are Other, never Blank.
#[must_use]
pub fn judge(head: &[u8], mark: &Mark) -> Surface {
    if head.len() < HEAD_BYTES {
        return Surface::Other("fewer than 4096 bytes could be read");
    }
    match mark.judge(head) {
        Marked::Ours => return Surface::Unfinished,
        Marked::Others => return Surface::Other("the mark of an unfinished format of another volume"),
        Marked::Damaged => return Surface::Other("a damaged mark of an unfinished format"),
        Marked::No => {}
    }
    match superblock::parse(head) {
        // mkfs.xfs leaves such a one when it is killed; our plan never does.
        Ok(superblock) if superblock.is_in_progress => Surface::Other("an xfs superblock whose mkfs was not finished"),
        Ok(superblock) => Surface::Complete(superblock),
        Err(NotAsuperblock::NoMagic) if head.iter().all(|byte| *byte == 0) => Surface::Blank,
        Err(NotAsuperblock::NoMagic | NotAsuperblock::Short) => Surface::Other("data that is no xfs"),
        Err(NotAsuperblock::Version) => Surface::Other("an xfs superblock without checksums"),
        Err(NotAsuperblock::BadChecksum) => Surface::Other("an xfs superblock whose checksum does not match"),
        Err(NotAsuperblock::Senseless) => Surface::Other("an xfs superblock with impossible sizes"),
    }
}
