//! What is on a disk: nothing (proven), our own unfinished format, a filesystem, or something else (decision 3).
//!
//! Three witnesses: our mark in sector 0, libblkid, and zeros where zeros must be. A look that fails is an error and never
//! an absence. It reads 3 to 4 MiB at most, plus one block per place where a backup superblock would be.

use std::fmt;
use std::ops::Range;

use disk::ext4::superblock::{self, NotAsuperblock, Superblock};
use disk::mark::{HEAD_BYTES, Mark, Marked, SECTOR_BYTES};
use disk::{ext4, xfs};
use rustix::io::Errno;

use crate::format;
use crate::plan::Surface;
use crate::request::{Volume, Zeroed};
use crate::sys;
use crate::sys::blkid::{self, Found, Signature, Usage};
use crate::sys::block::Device;

/// Zero in front and at the end of a new volume, where the storage promises zeros.
const EDGE_BYTES: u64 = 1 << 20;
/// Zero in front of a new volume on recycled storage: Proxmox wipes so much of a thick LV.
const RECYCLED_EDGE_BYTES: u64 = 4 << 10;
/// libblkid looks for superblocks up to 2 MiB and a little from the start (vmfs)…
const LOOKED_AT_FRONT_BYTES: u64 = (2 << 20) + (64 << 10);
/// … and up to 3087 sectors of 512 bytes before the end (promise_fasttrack).
const LOOKED_AT_END_BYTES: u64 = 2 << 20;
/// First bytes of a LUKS header, version 1 or 2.
const LUKS_MAGIC: &[u8] = b"LUKS\xba\xbe";
/// One read.
const CHUNK_BYTES: u64 = 128 << 10;
/// Where an ext superblock has its UUID (docs/formats.md).
const EXT_UUID: std::ops::Range<usize> = 0x68..0x78;
/// The kernel changes a mounted superblock and then its checksum: one that is read between the two is read again.
const SUPERBLOCK_READS: u32 = 5;

/// A look that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error(pub sys::Error);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; what cannot be read is not taken for blank", self.0)
    }
}

impl From<sys::Error> for Error {
    fn from(error: sys::Error) -> Self {
        Self(error)
    }
}

/// What is on the disk; of something else also where on it, and on which.
///
/// # Errors
/// Any part that had to be read could not be.
pub fn probe(device: &Device, volume: &Volume, zeroed: Zeroed) -> Result<Surface, Error> {
    Ok(match look(device, volume, zeroed)? {
        Surface::Other(what) => Surface::Other(format!("{what} ({})", device.path().display())),
        surface => surface,
    })
}

fn look(device: &Device, volume: &Volume, zeroed: Zeroed) -> Result<Surface, Error> {
    let size_bytes = device.size_bytes()?;
    let mut head = vec![0; HEAD_BYTES.min(usize::try_from(size_bytes).unwrap_or(usize::MAX))];
    device.read_at(0, &mut head)?;
    match mark(volume)?.judge(&head) {
        Marked::Ours => return Ok(Surface::Unfinished),
        Marked::Others => return Ok(Surface::Other("an unfinished format of another volume, at byte 0".into())),
        Marked::Damaged => return Ok(Surface::Other("a damaged mark of an unfinished format, at byte 0".into())),
        Marked::No => (),
    }
    if disk::first_nonzero(&head).is_none() {
        read_ahead(device, size_bytes);
    }
    match blkid::probe(std::os::fd::AsFd::as_fd(device), device.path(), size_bytes)? {
        Found::Signature(signature) if is_luks(&signature) => {
            if let Some(surface) = luks(device, &signature, size_bytes, volume, zeroed)? {
                return Ok(surface);
            }
        }
        Found::Signature(signature) => return recognised(device, &signature),
        Found::Ambivalent(signatures) => {
            let all: Vec<String> = signatures.iter().map(ToString::to_string).collect();
            return Ok(Surface::Other(format!("several things at once: {}", all.join("; "))));
        }
        Found::Nothing => (),
    }
    let read = |offset: u64, buffer: &mut [u8]| device.read_at(offset, buffer);
    Ok(match remains(read, size_bytes, volume, zeroed)? {
        Some(what) => Surface::Other(what),
        None => Surface::Blank,
    })
}

/// Where a blank disk is going to be read: a hundred places, so that in turn they would take a hundred times as long as one.
fn read_ahead(device: &Device, size_bytes: u64) {
    let edge = EDGE_BYTES.min(size_bytes);
    device.read_ahead(0, edge);
    device.read_ahead(size_bytes - edge, edge);
    for offset in [ext4::backup_offsets(size_bytes), xfs::backup_offsets(size_bytes)].concat() {
        device.read_ahead(offset, SECTOR_BYTES as u64);
    }
}

/// The mark of this volume's unfinished format.
///
/// # Errors
/// EINVAL: a serial that fits in no mark; ours all do.
pub fn mark(volume: &Volume) -> Result<Mark, sys::Error> {
    Mark::new(&volume.serial).map_err(|_| sys::Error { call: "mark", subject: volume.serial.clone().into(), errno: Errno::INVAL })
}

fn recognised(device: &Device, signature: &Signature) -> Result<Surface, Error> {
    match (signature.usage, signature.kind.as_str()) {
        (Usage::Filesystem, kind @ ("ext2" | "ext3" | "ext4")) if !signature.is_checksum_bad => Ok(Surface::Ext(kind.to_string())),
        (Usage::Filesystem, "xfs") if !signature.is_checksum_bad => xfs_by_superblock(device),
        _ => Ok(Surface::Other(signature.to_string())),
    }
}

fn is_luks(signature: &Signature) -> bool {
    (signature.usage, signature.kind.as_str()) == (Usage::Crypto, "crypto_LUKS")
}

/// A LUKS header, or its second copy alone; `None`: that copy is what a former volume left behind.
///
/// The second copy stands behind the first 4 KiB, which is all that recycled storage wipes. It would open with the same
/// secret, and show a former volume's data: such a copy counts only where it is this volume's own, or cannot be a leftover.
fn luks(device: &Device, signature: &Signature, size_bytes: u64, volume: &Volume, zeroed: Zeroed) -> Result<Option<Surface>, Error> {
    let mut magic = [0; LUKS_MAGIC.len()];
    device.read_at(0, &mut magic)?;
    let is_own = signature.uuid.as_deref() == Some(&format::luks_uuid(volume));
    if magic == LUKS_MAGIC || is_own {
        return Ok(Some(Surface::Luks));
    }
    let read = |offset: u64, buffer: &mut [u8]| device.read_at(offset, buffer);
    let is_front_wiped = first_nonzero(&read, 0, RECYCLED_EDGE_BYTES.min(size_bytes))?.is_none();
    Ok(match (is_front_wiped, zeroed) {
        (false, _) | (true, Zeroed::Yes) => Some(Surface::Luks),
        (true, Zeroed::No) => None,
        (true, Zeroed::Unknown) => Some(Surface::Other(format!(
            "the second copy of a LUKS header whose first is wiped ({signature}), perhaps a former volume's: if it is this volume's, restore it with \
             `cryptsetup repair`; else wipe the disk"
        ))),
    })
}

/// Whether the disk begins with a LUKS header that this driver made: for this very volume, or for the one that it is a copy of.
/// A pod's own on its raw block device is not: this driver's UUIDs say that they are of its own making (RFC 9562, version 8),
/// cryptsetup's are random ones (version 4).
///
/// # Errors
/// It cannot be read.
pub fn holds_own_luks(device: &Device) -> Result<bool, sys::Error> {
    const UUID: Range<usize> = 168..168 + 37;
    const VERSION_AT: usize = 14;
    let mut start = [0; SECTOR_BYTES];
    device.read_at(0, &mut start)?;
    let uuid = start.get(UUID).unwrap_or_default();
    let is_uuid = uuid.iter().enumerate().all(|(at, byte)| match at {
        8 | 13 | 18 | 23 => *byte == b'-',
        36 => *byte == 0,
        _ => byte.is_ascii_hexdigit(),
    });
    Ok(start.starts_with(LUKS_MAGIC) && is_uuid && uuid.get(VERSION_AT) == Some(&b'8'))
}

/// What a probe of a device of this size looks at: the inside of a new LUKS volume is made to read as zeros there, where it
/// would be noise otherwise, in which a magic of two bytes stands now and then.
#[must_use]
pub fn looked_at(size_bytes: u64) -> Vec<Range<u64>> {
    let mut ranges = vec![0..LOOKED_AT_FRONT_BYTES.min(size_bytes), size_bytes.saturating_sub(LOOKED_AT_END_BYTES)..size_bytes];
    ranges.extend(ext4::backup_offsets(size_bytes).into_iter().map(|offset| offset..offset + superblock::BYTES as u64));
    ranges.extend(xfs::backup_offsets(size_bytes).into_iter().map(|offset| offset..offset + xfs::superblock::BYTES as u64));
    ranges
}

/// libblkid looks at the magic and some sizes only; our reader knows more.
fn xfs_by_superblock(device: &Device) -> Result<Surface, Error> {
    let mut sector = vec![0; xfs::superblock::BYTES];
    device.read_at(0, &mut sector)?;
    Ok(match xfs::superblock::parse(&sector) {
        // The kernel refuses it too, with "Structure needs cleaning".
        Ok(superblock) if superblock.is_in_progress => Surface::Other("an xfs whose mkfs was cut short (not ours), at byte 0".into()),
        // Without checksums it is for the kernel to judge.
        Ok(_) | Err(xfs::superblock::NotAsuperblock::Version) => Surface::Xfs,
        Err(damage) => Surface::Other(format!("{damage}, at byte 0: repair it with xfs_repair, or wipe the disk")),
    })
}

/// What speaks against "blank" where libblkid knows nothing; `None`: nothing does.
fn remains(
    read: impl Fn(u64, &mut [u8]) -> Result<(), sys::Error>,
    size_bytes: u64,
    volume: &Volume,
    zeroed: Zeroed,
) -> Result<Option<String>, sys::Error> {
    let recycled = zeroed == Zeroed::No;
    // Backups first: what they say is more use to a person than where the first stray byte is.
    let mut block = [0; superblock::BYTES];
    for offset in ext4::backup_offsets(size_bytes) {
        read(offset, &mut block)?;
        let own = block.get(EXT_UUID).unwrap_or_default() == volume.handle.uuid("ext4");
        let there = match superblock::parse(&block) {
            Ok(_) | Err(NotAsuperblock::BadChecksum | NotAsuperblock::Senseless) => true,
            Err(NotAsuperblock::NoMagic | NotAsuperblock::Short) => false,
        };
        if there && (!recycled || own) {
            return Ok(Some(lost("ext4", offset, own)));
        }
    }
    let mut sector = [0; SECTOR_BYTES];
    for offset in xfs::backup_offsets(size_bytes) {
        read(offset, &mut sector)?;
        let Some(leftover) = xfs::superblock::parse_leftover(&sector) else { continue };
        let own = leftover.uuid == volume.handle.uuid("xfs");
        if !recycled || own {
            return Ok(Some(lost("xfs", offset, own)));
        }
    }
    let front = if recycled { RECYCLED_EDGE_BYTES } else { EDGE_BYTES }.min(size_bytes);
    if let Some(at) = first_nonzero(&read, 0, front)? {
        return Ok(Some(format!("data of an unknown kind in its first {front} bytes (at byte {at})")));
    }
    let end = size_bytes.saturating_sub(EDGE_BYTES);
    if !recycled && let Some(at) = first_nonzero(&read, end, size_bytes)? {
        return Ok(Some(format!("data of an unknown kind in its last {EDGE_BYTES} bytes (at byte {at})")));
    }
    Ok(None)
}

fn lost(kind: &str, offset: u64, own: bool) -> String {
    let whose = if own { "this volume's own" } else { "an" };
    let tool = if kind == "ext4" { "e2fsck -b" } else { "xfs_repair" };
    format!("{whose} {kind} without its first superblock (a backup is at byte {offset}): repair it with {tool}, or wipe the disk")
}

/// The first byte of `from..to` that is not zero.
fn first_nonzero(read: &impl Fn(u64, &mut [u8]) -> Result<(), sys::Error>, from: u64, to: u64) -> Result<Option<u64>, sys::Error> {
    let mut buffer = vec![0; usize::try_from(CHUNK_BYTES.min(to.saturating_sub(from))).unwrap_or_default()];
    let mut at = from;
    while at < to {
        let now = usize::try_from(to - at).unwrap_or(usize::MAX).min(buffer.len());
        let chunk = buffer.get_mut(..now).unwrap_or_default();
        read(at, chunk)?;
        if let Some(index) = disk::first_nonzero(chunk) {
            return Ok(Some(at + index as u64));
        }
        at += now as u64;
    }
    Ok(None)
}

/// The first superblock of the ext filesystem on the device: the kernel keeps it there up to date while it is mounted.
///
/// # Errors
/// The device cannot be read, or what is there is no superblock (EBADMSG).
pub fn ext_superblock(device: &Device) -> Result<Superblock, sys::Error> {
    let mut block = [0; superblock::BYTES];
    for _ in 0..SUPERBLOCK_READS {
        device.read_at(superblock::OFFSET, &mut block)?;
        if let Ok(superblock) = superblock::parse(&block) {
            return Ok(superblock);
        }
    }
    Err(sys::Error { call: "parse ext superblock", subject: device.path().into(), errno: Errno::BADMSG })
}

#[cfg(test)]
mod tests;
