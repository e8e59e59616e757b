//! What the simulator plugs drives into: the seam between the Proxmox simulator and the QEMU guest.
//!
//! Without a machine the simulator keeps book of plugged drives alone; with one, plugging is a real SCSI hot-plug.

use std::path::PathBuf;

/// One drive as QEMU is told about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluggedDrive {
    /// N of `scsiN`.
    pub index: u8,
    /// `storage:disk`.
    pub volid: String,
    /// The image on this host.
    pub file: PathBuf,
    /// `raw` or `qcow2`.
    pub format: String,
    /// `0x` and 16 hex digits.
    pub wwn: Option<String>,
    /// At most 20 bytes.
    pub serial: Option<String>,
    /// `ssd=1`: QEMU's `rotation_rate=1`.
    pub ssd: bool,
    /// `ro=1`.
    pub read_only: bool,
    /// `discard=on`.
    pub discard: bool,
    /// `iothread=1`.
    pub iothread: bool,
}

/// A running virtual machine. Calls block; the simulator makes them from a blocking thread. An error is QEMU's own text.
pub trait Machine: Send + Sync + std::fmt::Debug {
    /// Hot-plugs a drive, in Proxmox's own sequence.
    fn plug(&self, drive: &PluggedDrive) -> Result<(), String>;
    /// Takes a drive out (surprise removal, as Proxmox does it).
    fn unplug(&self, index: u8) -> Result<(), String>;
    /// Tells the guest that drive `index` has grown to `size_bytes`.
    fn resize(&self, index: u8, size_bytes: u64) -> Result<(), String>;
}
