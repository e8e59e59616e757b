//! Puts a filesystem on a disk: the `disk` crate says what to write where, this file writes it.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use disk::{Format, Write, ext4};

use crate::error::Cause;
use crate::probe;
use crate::request::{FormatOptions, Volume};
use crate::sys;
use crate::sys::block::Device;
use crate::sys::scsi::Topology;

/// Makes an ext4 on the device, which must be held exclusively. The UUID and the hash seed come from the volume's name, so
/// that a damaged volume of ours is told from a stranger's leftovers.
///
/// # Errors
/// The options do not fit the disk (nothing was written), or a write failed (the mark of an unfinished format stays).
pub fn make_ext4(device: &Device, volume: &Volume, options: FormatOptions, topology: &Topology, reads_as_zeros: bool) -> Result<(), Cause> {
    let size_bytes = device.size_bytes()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u32::try_from(since.as_secs()).unwrap_or(u32::MAX));
    let options = ext4::Options {
        logical_sector_bytes: topology.logical_block_size,
        physical_sector_bytes: topology.physical_block_size,
        min_io_bytes: topology.minimum_io_size,
        opt_io_bytes: topology.optimal_io_size,
        block_size: options.block_size,
        inode_size: options.inode_size,
        inode_tables_zeroed: reads_as_zeros,
        ..ext4::Options::new(size_bytes, volume.handle.uuid("ext4"), volume.handle.uuid("ext4 hash seed"), now)
    };
    let plan = ext4::plan(&options).map_err(|refusal| Cause::Geometry(refusal.to_string()))?;
    let begun = Instant::now();
    execute(device, Format::new(plan, &probe::mark(volume)?))?;
    proto::info!("{volume}: made an ext4 of {size_bytes} bytes in {} ms", begun.elapsed().as_millis());
    Ok(())
}

fn execute(device: &Device, writes: impl Iterator<Item = Write>) -> Result<(), sys::Error> {
    for write in writes {
        match write {
            Write::Data { offset, bytes } => device.write_at(offset, &bytes)?,
            Write::Zeros { offset, length } => device.zero(offset, length)?,
            Write::Flush => device.flush()?,
        }
    }
    Ok(())
}
