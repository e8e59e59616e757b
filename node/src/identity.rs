//! Which disk is this volume's? (docs/architecture.md, decision 2.)
//!
//! Pure. The WWN names a slot, so it may belong to yesterday's volume; the serial names the volume. A disk whose serial
//! begins with `csi-` must carry the expected one, always. A disk without such a serial was attached by the reference
//! driver and is accepted only where nothing speaks against it.

use std::fmt;
use std::path::PathBuf;

use crate::sys::Dev;
use crate::sys::scsi::{Disk, State, UNREADABLE_SERIAL};

/// Serials that are ours begin so.
pub const OUR_SERIALS: &str = "csi-";
/// Longest list of disks in a sentence.
const MAX_NAMED: usize = 8;

/// What the volume id and the publish context say of the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    /// `VolumeHandle::serial()`.
    pub serial: String,
    /// The publish context carries the serial: our controller attached it, and the config has it.
    pub serial_promised: bool,
    /// `naa.` and 16 hex digits, from the context's `DevicePath`.
    pub wwid: Option<String>,
    /// The slot.
    pub lun: Option<u8>,
    /// At least so large (it may have grown since), where our controller said.
    pub size_bytes: Option<u64>,
}

/// What a scan gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found<'a> {
    /// This is it.
    Disk(&'a Disk),
    /// Not there, or coming, or the slot still shows another's: look again. The sentence is for when time is up.
    NotYet(String),
}

/// Looking again would not help.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// Several disks answer to the description.
    Ambiguous { what: String, disks: String },
    /// Another volume is mounted from it.
    InUse { disk: String, at: PathBuf },
    /// Smaller than Proxmox says the volume is.
    TooSmall { disk: String, size_bytes: u64, wanted_bytes: u64 },
    /// The disk carries the serial of another volume, or is no disk of this driver.
    Stranger { disk: String, serial: String, says: String },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ambiguous { what, disks } => write!(f, "more than one disk has {what}: {disks}; detach the one that is not this volume"),
            Self::InUse { disk, at } => write!(
                f,
                "the disk in this slot, {disk}, carries no serial and is mounted at {}: it may be another volume's; unmount it first",
                at.display()
            ),
            Self::TooSmall { disk, size_bytes, wanted_bytes } => write!(
                f,
                "the disk in this slot, {disk}, has {size_bytes} bytes, but the volume has {wanted_bytes} bytes: it is another volume's"
            ),
            Self::Stranger { disk, serial, says } => {
                write!(f, "{disk} is not this volume's disk: the volume's serial is {serial}, the disk says {says}")
            }
        }
    }
}

/// Finds the volume's disk among all disks, for stage and for raw block publish. `mounted`: what is mounted from where.
///
/// # Errors
/// A disk that must not be taken; see [`Refusal`].
pub fn find<'a>(want: &Want, seen: &'a [Disk], mounted: &[(Dev, PathBuf)]) -> Result<Found<'a>, Refusal> {
    let ours: Vec<&Disk> = seen.iter().filter(|disk| disk.serial.as_deref() == Some(&want.serial)).collect();
    match ours.as_slice() {
        [disk] => return Ok(in_its_slot(want, disk)),
        [] => (),
        several => return Err(ambiguous(format!("serial {}", want.serial), several)),
    }
    if want.serial_promised {
        return Ok(Found::NotYet(format!("no disk has serial {}; there are: {}", want.serial, list(seen))));
    }
    find_legacy(want, seen, mounted)
}

/// Our own disk counts only where the context says that it is, and once it takes I/O (or can be made to).
fn in_its_slot<'a>(want: &Want, disk: &'a Disk) -> Found<'a> {
    if want.lun.is_some_and(|lun| u64::from(lun) != disk.address.lun) {
        return Found::NotYet(format!(
            "the disk with serial {} is at LUN {}, but the publish context says LUN {}: it is being detached there",
            want.serial,
            disk.address.lun,
            want.lun.unwrap_or_default()
        ));
    }
    ready(disk)
}

fn ready(disk: &Disk) -> Found<'_> {
    match disk.state {
        State::Running | State::Offline => Found::Disk(disk),
        State::Passing => Found::NotYet(format!("{} is neither running nor offline", name(disk))),
    }
}

/// A disk that the reference driver attached.
fn find_legacy<'a>(want: &Want, seen: &'a [Disk], mounted: &[(Dev, PathBuf)]) -> Result<Found<'a>, Refusal> {
    let what = match (&want.wwid, want.lun) {
        (Some(wwid), Some(lun)) => format!("WWN {wwid} and LUN {lun}"),
        (Some(wwid), None) => format!("WWN {wwid}"),
        (None, Some(lun)) => format!("designator drive-scsi{lun} and LUN {lun}"),
        (None, None) => "any of what the publish context names".to_string(),
    };
    let in_slot: Vec<&Disk> = seen.iter().filter(|disk| is_in_slot(want, disk)).collect();
    let disk = match in_slot.as_slice() {
        [] => return Ok(Found::NotYet(format!("no disk has serial {} nor {what}; there are: {}", want.serial, list(seen)))),
        [disk] => *disk,
        several => return Err(ambiguous(what, several)),
    };
    if let Some(serial) = other_volume(&want.serial, disk) {
        return Ok(Found::NotYet(format!("the slot still shows another volume: {} has serial {serial}", name(disk))));
    }
    if let Some((_, at)) = mounted.iter().find(|(dev, _)| *dev == disk.dev) {
        return Err(Refusal::InUse { disk: name(disk), at: at.clone() });
    }
    if let Some(wanted_bytes) = want.size_bytes.filter(|wanted| disk.size_bytes < *wanted) {
        return Err(Refusal::TooSmall { disk: name(disk), size_bytes: disk.size_bytes, wanted_bytes });
    }
    Ok(ready(disk))
}

fn is_in_slot(want: &Want, disk: &Disk) -> bool {
    let lun_fits = want.lun.is_none_or(|lun| u64::from(lun) == disk.address.lun);
    let named = match (&want.wwid, &disk.wwid) {
        (Some(wanted), Some(wwid)) => wanted == wwid,
        // A drive without wwn= still says its slot.
        (Some(_) | None, None) => want.lun.is_some_and(|lun| disk.designators.contains(&format!("drive-scsi{lun}"))),
        (None, Some(_)) => false,
    };
    disk.vendor == "QEMU" && lun_fits && named
}

/// Whether a disk that shows this volume already is the one that the publish context describes: by its serial, or, where
/// none is promised, by its slot. A legacy disk of another slot is what an older attachment left behind.
#[must_use]
pub fn fits(want: &Want, disk: &Disk) -> bool {
    disk.serial.as_deref() == Some(&want.serial)
        || (!want.serial_promised && other_volume(&want.serial, disk).is_none() && is_in_slot(want, disk))
}

/// Is the disk behind a mount or a device node this volume's? For publish, unpublish, unstage, expand and stats, where no
/// publish context is at hand.
///
/// # Errors
/// [`Refusal::Stranger`].
pub fn verify(serial: &str, disk: &Disk) -> Result<(), Refusal> {
    if disk.serial.as_deref() == Some(serial) {
        return Ok(());
    }
    let says = match other_volume(serial, disk) {
        Some(other) => format!("serial {other}"),
        None if is_legacy(disk) => return Ok(()),
        None => format!("serial {:?}, WWN {:?}, designators {:?}", disk.serial, disk.wwid, disk.designators),
    };
    Err(Refusal::Stranger { disk: name(disk), serial: serial.to_string(), says })
}

/// Whether the disk can be one of this driver's at all; for the count of slots that are left.
#[must_use]
pub fn is_of_this_driver(disk: &Disk) -> bool {
    disk.serial.as_deref().is_some_and(|serial| serial.starts_with(OUR_SERIALS)) || has_own_wwid(disk)
}

fn other_volume<'a>(serial: &str, disk: &'a Disk) -> Option<&'a str> {
    let may_be_ours = |given: &&str| given.starts_with(OUR_SERIALS) || *given == UNREADABLE_SERIAL;
    disk.serial.as_deref().filter(may_be_ours).filter(|given| *given != serial)
}

/// As the reference driver attaches: the WWN that its own LUN has, or no WWN and QEMU's name of that slot.
fn is_legacy(disk: &Disk) -> bool {
    let named = match &disk.wwid {
        Some(_) => has_own_wwid(disk),
        None => disk.designators.contains(&format!("drive-scsi{}", disk.address.lun)),
    };
    disk.vendor == "QEMU" && u8::try_from(disk.address.lun).is_ok_and(|lun| proto::LUN_RANGE.contains(&lun)) && named
}

fn has_own_wwid(disk: &Disk) -> bool {
    let Ok(lun) = u8::try_from(disk.address.lun) else { return false };
    proto::LUN_RANGE.contains(&lun) && disk.wwid == wwid(&proto::wwn_of_lun(lun))
}

/// sysfs' word for a WWN `0x` + 16 hex digits; `None` for any other text.
#[must_use]
pub fn wwid(wwn: &str) -> Option<String> {
    let digits = wwn.strip_prefix("0x")?;
    (digits.len() == 16 && digits.bytes().all(|digit| digit.is_ascii_hexdigit())).then(|| format!("naa.{}", digits.to_ascii_lowercase()))
}

fn ambiguous(what: String, disks: &[&Disk]) -> Refusal {
    Refusal::Ambiguous { what, disks: disks.iter().take(MAX_NAMED).map(|disk| name(disk)).collect::<Vec<_>>().join(", ") }
}

/// `sda (0:0:0:1)`.
#[must_use]
pub fn name(disk: &Disk) -> String {
    format!("{} ({})", disk.name, disk.address)
}

/// All disks with what they say of themselves: the first thing one asks when one is missing.
fn list(disks: &[Disk]) -> String {
    if disks.is_empty() {
        return "no SCSI disks at all".to_string();
    }
    let mut names: Vec<String> = disks
        .iter()
        .take(MAX_NAMED)
        .map(|disk| match (&disk.serial, &disk.wwid) {
            (Some(serial), _) => format!("{} serial {serial}", name(disk)),
            (None, Some(wwid)) => format!("{} WWN {wwid}", name(disk)),
            (None, None) => format!("{} {}", name(disk), disk.designators.join(" ")),
        })
        .collect();
    if let Some(more) = disks.len().checked_sub(MAX_NAMED).filter(|more| *more > 0) {
        names.push(format!("and {more} more"));
    }
    names.join(", ")
}

#[cfg(test)]
mod tests;
