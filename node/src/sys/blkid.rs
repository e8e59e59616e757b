//! What is on a device, or proof that nothing is: libblkid asked for every superblock and every partition table it knows.
//!
//! libblkid reads errors as "no signature here" in places, and so would call a failing disk empty. Here every one of its reads is
//! seen (`libblkid_rs_sys::witness`), and one that failed or ended early turns the whole answer into an error. The same for an
//! answer given without any read. What is deliberately absent: partitions themselves, topology, writing.
//!
//! Blocking, and bound to its thread while it runs: call it from one `spawn_blocking`. It moves the descriptor's file offset.

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use libblkid_rs::{BlkidErr, BlkidProbe, BlkidProbeRet, BlkidSafeprobeRet, BlkidSublks, BlkidSublksFlags};
use libblkid_rs_sys::witness;
use rustix::io::Errno;

use super::Error;
use crate::kill;

#[cfg(test)]
mod tests;

/// On less than this libblkid leaves out its RAID probers (`BLKID_FL_TINY_DEV`, a floppy's size): nothing found would prove nothing.
pub const MIN_SIZE_BYTES: u64 = 1440 * 1024 + 1;

/// libblkid 2.38.1 knows 77 superblocks and 13 partition tables, and each answers once at most.
const MAX_SIGNATURES: usize = 128;

/// What a device holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Every read succeeded, and no prober knew what it saw.
    Nothing,
    /// Exactly one thing.
    Signature(Signature),
    /// More than one, in libblkid's order: something is there, and nobody can say what. At least two.
    Ambivalent(Vec<Signature>),
}

/// What kind of thing a signature stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usage {
    Filesystem,
    Raid,
    Crypto,
    PartitionTable,
    /// Swap, a log device, and whatever a newer libblkid may add.
    Other,
}

/// One thing that was recognised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    pub usage: Usage,
    /// blkid's word (`TYPE`, or `PTTYPE` of a partition table): `ext4`, `xfs`, `crypto_LUKS`, `LVM2_member`, `gpt`, `dos`, …
    pub kind: String,
    /// As the format writes it: `1` and `2` for LUKS, `1.0` for ext4.
    pub version: Option<String>,
    /// As blkid prints it; not always 128 bits (vfat has 32).
    pub uuid: Option<String>,
    /// For people: bytes that are no UTF-8 are named as such.
    pub label: Option<String>,
    /// Where the magic is. libblkid tells it of superblocks only; of the tables of partitions it is known where they begin that people use.
    pub offset_bytes: Option<u64>,
    /// The signature is there and its checksum is wrong: damaged, not blank.
    pub is_checksum_bad: bool,
}

impl fmt::Display for Signature {
    /// `ext4 filesystem, UUID 0d79…, label "data"`, for the refusals.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.usage {
            Usage::Filesystem => write!(f, "{} filesystem", self.kind)?,
            Usage::PartitionTable => write!(f, "{} partition table", self.kind)?,
            Usage::Raid | Usage::Crypto | Usage::Other => write!(f, "{}", self.kind)?,
        }
        if let Some(uuid) = &self.uuid {
            write!(f, ", UUID {uuid}")?;
        }
        if let Some(label) = &self.label {
            write!(f, ", label {label:?}")?;
        }
        if let Some(offset) = self.offset_bytes {
            write!(f, ", at byte {offset}")?;
        }
        if self.is_checksum_bad { write!(f, ", checksum wrong") } else { Ok(()) }
    }
}

/// Reads the device of `size_bytes` bytes and says what is on it. `path` is for the messages.
///
/// # Errors
/// A read that failed (its errno) or ended early (EIO), with its place; a device that is not `size_bytes` long (EAGAIN: it is being
/// resized, look again); one below [`MIN_SIZE_BYTES`] (EINVAL); a device that libblkid will not look at, which are other
/// programs' private device-mapper devices (EINVAL).
pub fn probe(device: BorrowedFd<'_>, path: &Path, size_bytes: u64) -> Result<Found, Error> {
    let mut prober = prepare(device, path, size_bytes)?;
    kill::inside("look");
    look(&mut prober, path)
}

fn prepare(device: BorrowedFd<'_>, path: &Path, size_bytes: u64) -> Result<BlkidProbe, Error> {
    if size_bytes < MIN_SIZE_BYTES {
        let subject = PathBuf::from(format!("{} ({size_bytes} bytes, at least {MIN_SIZE_BYTES} are needed)", path.display()));
        return Err(Error { call: "probe", subject, errno: Errno::INVAL });
    }
    witness::reset();
    let mut probe = BlkidProbe::new().map_err(failed("blkid_new_probe", path))?;
    let whole = 0;
    probe.set_device(device.as_raw_fd(), whole, whole).map_err(failed("blkid_probe_set_device", path))?;
    let seen_bytes = probe.get_size();
    if u64::try_from(seen_bytes) != Ok(size_bytes) {
        let subject = PathBuf::from(format!("{} ({seen_bytes} bytes now, {size_bytes} before)", path.display()));
        return Err(Error { call: "blkid_probe_get_size", subject, errno: Errno::AGAIN });
    }
    probe.enable_superblocks(true).map_err(failed("blkid_probe_enable_superblocks", path))?;
    probe.enable_partitions(true).map_err(failed("blkid_probe_enable_partitions", path))?;
    set_flags(&mut probe, path, None)?;
    Ok(probe)
}

fn look(probe: &mut BlkidProbe, path: &Path) -> Result<Found, Error> {
    let answer = probe.do_safeprobe();
    every_read_succeeded(path)?;
    match answer.map_err(failed("blkid_do_safeprobe", path))? {
        // Both chains have answered: a superblock and a partition table are two things.
        BlkidSafeprobeRet::Success => Ok(among(current(probe, path)?)),
        BlkidSafeprobeRet::Ambiguous => match among(all(probe, path)?) {
            Found::Ambivalent(signatures) => Ok(Found::Ambivalent(signatures)),
            // libblkid saw more than one. If they cannot be told apart now, the device is changing.
            Found::Nothing | Found::Signature(_) => Err(Error { call: "blkid_do_probe", subject: path.into(), errno: Errno::AGAIN }),
        },
        BlkidSafeprobeRet::None => {
            // Asked again one prober at a time, and so that a wrong checksum is a signature: damaged is not blank.
            set_flags(probe, path, Some(BlkidSublks::Badcsum))?;
            Ok(among(all(probe, path)?))
        }
    }
}

fn among(mut signatures: Vec<Signature>) -> Found {
    match (signatures.len(), signatures.pop()) {
        (1, Some(only)) => Found::Signature(only),
        (_, Some(last)) => {
            signatures.push(last);
            Found::Ambivalent(signatures)
        }
        (_, None) => Found::Nothing,
    }
}

fn set_flags(probe: &mut BlkidProbe, path: &Path, more: Option<BlkidSublks>) -> Result<(), Error> {
    use BlkidSublks::{Label, Magic, Type, Usage, Uuid, Version};
    let flags = [Label, Uuid, Type, Usage, Version, Magic].into_iter().chain(more).collect();
    probe.set_superblock_flags(BlkidSublksFlags::new(flags)).map_err(failed("blkid_probe_set_superblocks_flags", path))
}

/// Every signature, one prober after the other.
fn all(probe: &mut BlkidProbe, path: &Path) -> Result<Vec<Signature>, Error> {
    probe.reset();
    let mut signatures = Vec::new();
    for _ in 0..MAX_SIGNATURES {
        let answer = probe.do_probe();
        every_read_succeeded(path)?;
        match answer.map_err(failed("blkid_do_probe", path))? {
            BlkidProbeRet::Success => signatures.extend(current(probe, path)?),
            BlkidProbeRet::Done => return Ok(signatures),
        }
    }
    let subject = PathBuf::from(format!("{} (more than {MAX_SIGNATURES} signatures)", path.display()));
    Err(Error { call: "blkid_do_probe", subject, errno: Errno::OVERFLOW })
}

/// What the last call of libblkid found: a superblock, a partition table, or both.
fn current(probe: &BlkidProbe, path: &Path) -> Result<Vec<Signature>, Error> {
    let mut signatures = Vec::new();
    if let Some(kind) = required(probe, "TYPE", path)? {
        let usage = match required(probe, "USAGE", path)?.as_deref() {
            Some("filesystem") => Usage::Filesystem,
            Some("raid") => Usage::Raid,
            Some("crypto") => Usage::Crypto,
            _ => Usage::Other,
        };
        signatures.push(Signature {
            usage,
            kind,
            version: text(probe, "VERSION"),
            uuid: text(probe, "UUID"),
            label: text(probe, "LABEL"),
            offset_bytes: text(probe, "SBMAGIC_OFFSET").and_then(|offset| offset.parse().ok()),
            is_checksum_bad: probe.has_value("SBBADCSUM").map_err(failed("blkid_probe_has_value", path))?,
        });
    }
    if let Some(kind) = required(probe, "PTTYPE", path)? {
        signatures.push(Signature {
            usage: Usage::PartitionTable,
            // libblkid believes no GPT without the protective MBR in front of it.
            offset_bytes: matches!(kind.as_str(), "dos" | "gpt").then_some(0),
            kind,
            version: None,
            uuid: text(probe, "PTUUID"),
            label: None,
            is_checksum_bad: false,
        });
    }
    Ok(signatures)
}

/// A value of libblkid's own making: absent, or text.
fn required(probe: &BlkidProbe, name: &'static str, path: &Path) -> Result<Option<String>, Error> {
    if !probe.has_value(name).map_err(failed("blkid_probe_has_value", path))? {
        return Ok(None);
    }
    probe.lookup_value(name).map(Some).map_err(failed("blkid_probe_lookup_value", path))
}

/// A value that comes from the disk: whatever a stranger wrote there.
fn text(probe: &BlkidProbe, name: &'static str) -> Option<String> {
    match probe.lookup_value(name) {
        Ok(value) => Some(value),
        Err(BlkidErr::LibErr(_)) => None,
        Err(_) => Some("(not UTF-8)".to_owned()),
    }
}

/// The proof: libblkid has read something, and every byte it asked for came.
fn every_read_succeeded(path: &Path) -> Result<(), Error> {
    let seen = witness::seen();
    if let Some(fault) = seen.fault {
        let place = format!("{} bytes at byte {}", fault.wanted_bytes, fault.offset_bytes);
        let (detail, errno) = match fault.errno {
            0 => (format!("{place}: only {} came", fault.got_bytes), Errno::IO),
            errno => (place, Errno::from_raw_os_error(errno)),
        };
        return Err(Error { call: "read", subject: PathBuf::from(format!("{} ({detail})", path.display())), errno });
    }
    if seen.reads == 0 {
        let subject = PathBuf::from(format!("{} (libblkid did not look: another program's private mapping)", path.display()));
        return Err(Error { call: "blkid_do_safeprobe", subject, errno: Errno::INVAL });
    }
    Ok(())
}

/// For `map_err`. libblkid answers -1 or a negative errno; -1 says no more than "it failed".
fn failed<'a>(call: &'static str, path: &'a Path) -> impl Fn(BlkidErr) -> Error + 'a {
    move |cause| {
        let errno = match cause {
            BlkidErr::LibErr(code) if code < -1 => i32::try_from(-code).map_or(Errno::IO, Errno::from_raw_os_error),
            _ => Errno::IO,
        };
        Error { call, subject: path.to_path_buf(), errno }
    }
}
