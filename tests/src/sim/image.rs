//! Image files: sparse raw, an empty qcow2, and the recycled extents of thick LVM.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

/// What `qemu-img create` writes of a raw image, and what LVM wipes of a new volume.
const FIRST_BLOCK: u64 = 4096;
const QCOW2_CLUSTER: u64 = 65536;
/// L1 entries made at once, so that growing needs no new table: 8 TiB.
const QCOW2_L1_ENTRIES: u32 = 16384;
/// Where old bytes are put in extents nobody had before: at the head of each ext4 group of 128 MiB (its backup superblocks), 64 KiB each.
const STALE_EVERY: u64 = 128 << 20;
const STALE_LENGTH: u64 = 64 << 10;
/// Freed volumes waiting for their next owner.
const FREED: &str = ".freed";

fn new_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).open(path)
}

/// A hole of `bytes`.
pub(crate) fn create_sparse(path: &Path, bytes: u64) -> io::Result<()> {
    new_file(path)?.set_len(bytes)
}

/// As qemu-img makes it: the first block is allocated.
pub(crate) fn create_raw(path: &Path, bytes: u64) -> io::Result<()> {
    let mut file = new_file(path)?;
    file.write_all(&vec![0; usize::try_from(bytes.min(FIRST_BLOCK)).unwrap_or(0)])?;
    file.set_len(bytes)
}

/// An empty qcow2, version 3: header, refcount table, refcount block, two clusters of L1 table.
pub(crate) fn create_qcow2(path: &Path, bytes: u64) -> io::Result<()> {
    let mut header = Vec::with_capacity(112);
    header.extend_from_slice(b"QFI\xfb");
    header.extend_from_slice(&3_u32.to_be_bytes());
    header.extend_from_slice(&[0; 12]); // no backing file
    header.extend_from_slice(&16_u32.to_be_bytes()); // cluster bits
    header.extend_from_slice(&bytes.to_be_bytes());
    header.extend_from_slice(&0_u32.to_be_bytes()); // not encrypted
    header.extend_from_slice(&QCOW2_L1_ENTRIES.to_be_bytes());
    header.extend_from_slice(&(3 * QCOW2_CLUSTER).to_be_bytes()); // L1 table
    header.extend_from_slice(&QCOW2_CLUSTER.to_be_bytes()); // refcount table
    header.extend_from_slice(&1_u32.to_be_bytes());
    header.extend_from_slice(&[0; 12]); // no snapshots
    header.extend_from_slice(&[0; 24]); // no features
    header.extend_from_slice(&4_u32.to_be_bytes()); // refcounts of 16 bits
    header.extend_from_slice(&104_u32.to_be_bytes());
    let mut file = new_file(path)?;
    file.set_len(5 * QCOW2_CLUSTER)?;
    file.write_all(&header)?;
    file.seek(SeekFrom::Start(QCOW2_CLUSTER))?;
    file.write_all(&(2 * QCOW2_CLUSTER).to_be_bytes())?;
    file.seek(SeekFrom::Start(2 * QCOW2_CLUSTER))?;
    file.write_all(&[0, 1, 0, 1, 0, 1, 0, 1, 0, 1])
}

/// The size that a guest sees.
pub(crate) fn virtual_size(path: &Path, format: &str) -> io::Result<u64> {
    if format != "qcow2" {
        return Ok(fs::metadata(path)?.len());
    }
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(24))?;
    let mut size = [0; 8];
    file.read_exact(&mut size)?;
    Ok(u64::from_be_bytes(size))
}

/// Makes an image longer.
pub(crate) fn grow(path: &Path, format: &str, bytes: u64) -> io::Result<()> {
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    if format != "qcow2" {
        return file.set_len(bytes);
    }
    file.seek(SeekFrom::Start(24))?;
    file.write_all(&bytes.to_be_bytes())
}

/// Writes an old filesystem's leavings into extents that nobody of ours had before.
fn stain(file: &mut File, from: u64, to: u64) -> io::Result<()> {
    let old: Vec<u8> = (0..STALE_LENGTH)
        .map(|offset| b"STALE-EXTENT-OF-A-STRANGER\n".get(usize::try_from(offset % 27).unwrap_or(0)).copied().unwrap_or(0))
        .collect();
    let mut at = from;
    while at < to {
        file.seek(SeekFrom::Start(at))?;
        let length = usize::try_from((to - at).min(STALE_LENGTH)).unwrap_or(0);
        file.write_all(old.get(..length).unwrap_or_default())?;
        at = (at + 1).next_multiple_of(STALE_EVERY);
    }
    let tail = to.saturating_sub(STALE_LENGTH).max(from);
    file.seek(SeekFrom::Start(tail))?;
    let length = usize::try_from(to - tail).unwrap_or(0);
    file.write_all(old.get(..length).unwrap_or_default())
}

/// A new thick volume: a freed one's bytes, else a stranger's; the first 4 KiB zeroed (`lvcreate -Wy`).
pub(crate) fn recycle(folder: &Path, path: &Path, bytes: u64) -> io::Result<()> {
    let freed = fs::read_dir(folder.join(FREED)).ok().and_then(|mut entries| entries.next()).and_then(Result::ok);
    match freed {
        Some(freed) => {
            fs::rename(freed.path(), path)?;
            let mut file = OpenOptions::new().read(true).write(true).open(path)?;
            let had = file.metadata()?.len();
            file.set_len(bytes)?;
            if had < bytes {
                stain(&mut file, had, bytes)?;
            }
        }
        None => {
            let mut file = new_file(path)?;
            file.set_len(bytes)?;
            stain(&mut file, 0, bytes)?;
        }
    }
    let mut file = OpenOptions::new().write(true).open(path)?;
    file.write_all(&vec![0; usize::try_from(bytes.min(FIRST_BLOCK)).unwrap_or(0)])
}

/// New extents of a thick volume hold old bytes too.
pub(crate) fn extend_recycled(path: &Path, bytes: u64) -> io::Result<()> {
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    let had = file.metadata()?.len();
    file.set_len(bytes)?;
    if had < bytes { stain(&mut file, had, bytes) } else { Ok(()) }
}

/// Takes a thick volume away, and keeps its bytes for the next.
pub(crate) fn keep_for_recycling(folder: &Path, path: &Path) -> io::Result<()> {
    let freed = folder.join(FREED);
    fs::create_dir_all(&freed)?;
    let name = path.file_name().unwrap_or_default();
    // One is enough: the next volume takes it. More would only fill the disk.
    for entry in fs::read_dir(&freed)?.flatten() {
        fs::remove_file(entry.path())?;
    }
    fs::rename(path, freed.join(name))
}
