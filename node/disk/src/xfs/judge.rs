//! What the first 4 KiB of a disk say about xfs on it: the part of the probe that needs no library.

use super::superblock::{self, NotAsuperblock, Superblock};
use crate::mark::{self, Mark};

/// What a disk is, as far as xfs and the mark of an unfinished format can tell.
pub type Surface = mark::Surface<Superblock>;

/// Judges the first [`mark::HEAD_BYTES`] of a disk that should be `mark`'s volume. Fewer bytes are Other, never Blank.
#[must_use]
pub fn judge(head: &[u8], mark: &Mark) -> Surface {
    mark.surface(head, |head| match superblock::parse(head) {
        // mkfs.xfs leaves such a one when it is killed; our plan never does.
        Ok(superblock) if superblock.is_in_progress => Surface::Other("an xfs superblock whose mkfs was not finished"),
        Ok(superblock) => Surface::Complete(superblock),
        Err(NotAsuperblock::NoMagic | NotAsuperblock::Short) => Surface::Other("data that is no xfs"),
        Err(NotAsuperblock::Version) => Surface::Other("an xfs superblock without checksums"),
        Err(NotAsuperblock::BadChecksum) => Surface::Other("an xfs superblock whose checksum does not match"),
        Err(NotAsuperblock::Senseless) => Surface::Other("an xfs superblock with impossible sizes"),
    })
}
