//! Puts a filesystem on a disk: the `disk` crate says what to write where, this file writes it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use disk::{Format, Write, ext4, xfs};

use crate::error::Cause;
use crate::kill;
use crate::probe;
use crate::request::{Filesystem, FormatOptions, Volume};
use crate::sys::block::Device;
use crate::sys::scsi::Topology;

/// What a disk reads as where nothing was written to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ground {
    /// Zeros: a new volume, bare, of a storage that promises so. Nothing is written that would only write zeros, and the
    /// kernel is told that it need not zero ext4's inode tables.
    Zeros,
    /// Anything: recycled storage, what a format that was cut short has left, the inside of an encrypted mapping (where the
    /// disk's zeros read as noise). The journal or log is zeroed here, the inode tables by the kernel after the mount.
    Unknown,
}

/// The process is about to end: long work stops where it can be repeated.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// From now on.
    pub fn request(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// The UUID of a LUKS header that we make, as the header has it.
#[must_use]
pub fn luks_uuid(volume: &Volume) -> String {
    let digits: String = volume.handle.uuid("luks").iter().map(|byte| format!("{byte:02x}")).collect();
    let parts = [(0, 8), (8, 12), (12, 16), (16, 20), (20, 32)].map(|(from, to)| digits.get(from..to).unwrap_or_default());
    parts.join("-")
}

/// Whether such a filesystem fits a device of that size, before anything is written to what will be below it.
///
/// # Errors
/// The options do not fit.
pub fn check(size_bytes: u64, volume: &Volume, options: FormatOptions, topology: &Topology) -> Result<(), Cause> {
    match options.filesystem {
        Filesystem::Ext4 => ext4_plan(size_bytes, volume, options, topology, Ground::Unknown, 0).map(drop),
        Filesystem::Xfs => xfs_plan(size_bytes, volume, options, topology, Ground::Unknown, 0).map(drop),
    }
}

/// Makes a filesystem on the device, which must be held exclusively. Its UUID comes from the volume's name, so that a
/// damaged volume of ours is told from a stranger's leftovers.
///
/// # Errors
/// The options do not fit the disk (nothing was written), or a write failed or was not begun for `stop`'s sake (the mark of
/// an unfinished format stays).
pub fn make(
    device: &Device,
    volume: &Volume,
    options: FormatOptions,
    topology: &Topology,
    ground: Ground,
    stop: &Stop,
) -> Result<(), Cause> {
    let size_bytes = device.size_bytes()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u32::try_from(since.as_secs()).unwrap_or(u32::MAX));
    let mark = probe::mark(volume)?;
    let begun = Instant::now();
    let written = match options.filesystem {
        Filesystem::Ext4 => {
            let plan = ext4_plan(size_bytes, volume, options, topology, ground, now)?;
            execute(device, Format::new(plan, &mark), stop)?
        }
        Filesystem::Xfs => {
            let plan = xfs_plan(size_bytes, volume, options, topology, ground, now)?;
            execute(device, Format::new(plan, &mark), stop)?
        }
    };
    let (name, took) = (options.filesystem.name(), begun.elapsed().as_millis());
    proto::info!("{volume}: made an {name} of {size_bytes} bytes in {took} ms: wrote {} bytes, zeroed {}", written.data, written.zeros);
    Ok(())
}

fn ext4_plan(
    size_bytes: u64,
    volume: &Volume,
    options: FormatOptions,
    topology: &Topology,
    ground: Ground,
    now: u32,
) -> Result<ext4::Plan, Cause> {
    let options = ext4::Options {
        logical_sector_bytes: topology.logical_block_size,
        physical_sector_bytes: topology.physical_block_size,
        min_io_bytes: topology.minimum_io_size,
        opt_io_bytes: topology.optimal_io_size,
        block_size: options.block_size,
        inode_size: options.inode_size,
        reads_zeros: ground == Ground::Zeros,
        ..ext4::Options::new(size_bytes, volume.handle.uuid("ext4"), volume.handle.uuid("ext4 hash seed"), now)
    };
    ext4::plan(&options).map_err(|refusal| Cause::Geometry(refusal.to_string()))
}

fn xfs_plan(
    size_bytes: u64,
    volume: &Volume,
    options: FormatOptions,
    topology: &Topology,
    ground: Ground,
    now: u32,
) -> Result<xfs::Plan, Cause> {
    let options = xfs::Options {
        logical_sector_bytes: topology.logical_block_size,
        physical_sector_bytes: topology.physical_block_size,
        is_aligned: !topology.is_misaligned,
        min_io_bytes: topology.minimum_io_size,
        opt_io_bytes: topology.optimal_io_size,
        block_size: options.block_size,
        inode_size: options.inode_size,
        reads_zeros: ground == Ground::Zeros,
        ..xfs::Options::new(size_bytes, volume.handle.uuid("xfs"), now)
    };
    xfs::plan(&options).map_err(|refusal| match &refusal {
        xfs::Refusal::TooSmall { .. } => Cause::TooSmall(refusal.to_string()),
        xfs::Refusal::BlockSize { .. } | xfs::Refusal::InodeSize { .. } | xfs::Refusal::Sector { .. } => {
            Cause::Geometry(refusal.to_string())
        }
    })
}

/// Bytes that a format has put on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Written {
    /// As they are.
    pub data: u64,
    /// As requests for zeros, which cost a storage anything from nothing to as much as data.
    pub zeros: u64,
}

/// Puts the writes on the device, in their order. It may be stopped before each of those that zero: they are what takes long.
///
/// # Errors
/// A write failed, or the process is about to end.
pub fn execute(device: &Device, writes: impl IntoIterator<Item = Write>, stop: &Stop) -> Result<Written, Cause> {
    let mut written = Written::default();
    for write in writes {
        let is_flush = matches!(write, Write::Flush);
        match write {
            Write::Data { offset, bytes } => {
                device.write_at(offset, &bytes)?;
                written.data += bytes.len() as u64;
            }
            Write::Zeros { .. } if stop.is_requested() => return Err(Cause::Stopped { zeroed_bytes: written.zeros }),
            Write::Zeros { offset, length } => {
                device.zero(offset, length)?;
                written.zeros += length;
            }
            Write::Flush => device.flush()?,
        }
        kill::wrote(is_flush);
    }
    Ok(written)
}

#[cfg(test)]
mod tests;
