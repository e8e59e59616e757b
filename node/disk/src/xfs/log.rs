//! The log of a new filesystem: one record that says "cleanly unmounted", on a zeroed log.

use super::geometry::Geometry;
use super::raw::{Image, NULL};

/// A log is addressed in these, whatever the device's sector is.
const BASIC_BLOCK: u32 = 512;
const RECORD_MAGIC: u32 = 0xFEED_BABE;
const CYCLE: u32 = 1;
const VERSION: u32 = 2;
/// The least size of a log buffer, and what one header block's cycle table covers.
const BUFFER_MIN_BYTES: u32 = 32 << 10;
/// Little-endian Linux: the byte order inside log operations.
const FORMAT_LINUX_LE: u32 = 1;
/// `h_cycle_data`: the first word of each data block lives here, the block itself begins with the cycle number.
const CYCLE_DATA: usize = 44;

const UNMOUNT_TID: u32 = 0xB0C0_D0D0;
const UNMOUNT_LENGTH: u32 = 8;
const UNMOUNT_CLIENT: u8 = 0xAA;
const UNMOUNT_FLAGS: u8 = 0x20;
const UNMOUNT_MAGIC: u16 = 0x556E;

/// The bytes at the log's start: a record header, the unmount operation, and padding up to the log's unit.
pub(super) fn unmount_record(g: &Geometry, uuid: &[u8; 16]) -> Vec<u8> {
    let sector = if g.sector_bytes > BASIC_BLOCK { g.sector_bytes } else { 0 };
    let unit_bytes = g.log_unit.map_or(sector, |unit| unit * g.block_size);
    let headers = unit_bytes.div_ceil(BUFFER_MIN_BYTES).max(1);
    let blocks = (unit_bytes / BASIC_BLOCK).max(2);
    let length = unit_bytes.max(2 * BASIC_BLOCK) - headers * BASIC_BLOCK;

    let mut record = Image::new(blocks * BASIC_BLOCK);
    let lsn = u64::from(CYCLE) << 32;
    record.u32(0, RECORD_MAGIC).u32(4, CYCLE).u32(8, VERSION).u32(12, length).u64(16, lsn).u64(24, lsn);
    record.u32(36, NULL).u32(40, 1).u32(CYCLE_DATA, UNMOUNT_TID); // h_prev_block, h_num_logops
    record.u32(300, FORMAT_LINUX_LE).put(304, uuid).u32(320, unit_bytes.max(BUFFER_MIN_BYTES));
    for block in 1..blocks {
        record.u32((block * BASIC_BLOCK) as usize, CYCLE);
    }
    let operation = (headers * BASIC_BLOCK) as usize;
    record.u32(operation + 4, UNMOUNT_LENGTH).u8(operation + 8, UNMOUNT_CLIENT).u8(operation + 9, UNMOUNT_FLAGS);
    record.put(operation + 12, &UNMOUNT_MAGIC.to_le_bytes());
    record.unsealed()
}
