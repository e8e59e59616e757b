//! What the first 4 KiB of a disk say about ext4 on it: the part of the probe that needs no library.

use super::superblock::{self, NotAsuperblock, Superblock};
use crate::mark::{self, Mark};

/// What a disk is, as far as ext4 and the mark of an unfinished format can tell.
pub type Surface = mark::Surface<Superblock>;

/// Judges the first [`mark::HEAD_BYTES`] of a disk that should be `mark`'s volume. Fewer bytes are Other, never Blank.
#[must_use]
pub fn judge(head: &[u8], mark: &Mark) -> Surface {
    mark.surface(head, |head| match superblock::parse(head.get(1024..).unwrap_or_default()) {
        Ok(superblock) => Surface::Complete(superblock),
        Err(NotAsuperblock::NoMagic | NotAsuperblock::Short) => Surface::Other("data that is no ext4"),
        Err(NotAsuperblock::BadChecksum) => Surface::Other("an ext4 superblock whose checksum does not match"),
        Err(NotAsuperblock::Senseless) => Surface::Other("an ext4 superblock with impossible sizes"),
    })
}
