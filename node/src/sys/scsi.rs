//! SCSI disks as sysfs shows them: found by what they say of themselves, never by their names.
//!
//! `sdX` and host numbers are given out again and in any order, and udev's links may be late or
//! absent. Every function takes the root of sysfs, so that a test can give it a folder.

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::{Dev, Error};

/// Attributes are small; a VPD page has at most 255 bytes from QEMU, 64 KiB by its format.
const MAX_ATTRIBUTE_BYTES: usize = 64 << 10;
/// In the place of a serial that is there and could not be read.
pub const UNREADABLE_SERIAL: &str = "(unreadable)";
/// sysfs counts a disk's size in these, whatever the disk's own sector size.
const SYSFS_SECTOR_BYTES: u64 = 512;

/// host:channel:target:lun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the four parts are SCSI's own")]
pub struct Address {
    pub host: u32,
    pub channel: u32,
    pub target: u32,
    pub lun: u64,
}

impl std::str::FromStr for Address {
    type Err = ();

    fn from_str(given: &str) -> Result<Self, ()> {
        let mut parts = given.split(':');
        let mut next = || parts.next().ok_or(());
        let address = Self {
            host: next()?.parse().map_err(|_| ())?,
            channel: next()?.parse().map_err(|_| ())?,
            target: next()?.parse().map_err(|_| ())?,
            lun: next()?.parse().map_err(|_| ())?,
        };
        if parts.next().is_some() { Err(()) } else { Ok(address) }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}:{}", self.host, self.channel, self.target, self.lun)
    }
}

/// The kernel's state of a SCSI device (`scsi_sysfs.c`, `sdev_states`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// I/O works.
    Running,
    /// Every I/O fails. The reference driver leaves disks so after it unstaged them.
    Offline,
    /// Coming, going or blocked: look again.
    Passing,
}

/// One SCSI disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Where it is.
    pub address: Address,
    /// `QEMU`, unless the drive says otherwise.
    pub vendor: String,
    /// Whether I/O works.
    pub state: State,
    /// `naa.` and 16 hex digits; none where the drive has no `wwn=`.
    pub wwid: Option<String>,
    /// VPD page 0x80: the drive's `serial=`.
    pub serial: Option<String>,
    /// The ASCII designators of VPD page 0x83: QEMU puts `drive-scsi<N>` there.
    pub designators: Vec<String>,
    /// `sda`: good for a path while a descriptor holds the disk, for nothing else.
    pub name: String,
    /// Its number; the kernel does not give it out again while the disk is held open or mounted.
    pub dev: Dev,
    /// As the kernel knows it now.
    pub size_bytes: u64,
    /// The drive refuses writes.
    pub read_only: bool,
}

impl Disk {
    /// Whether both are looks at one disk: what it says of itself, and its name and number. A slot and its names go to the next disk.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        (self.address, self.dev) == (other.address, other.dev)
            && (&self.serial, &self.wwid, &self.designators) == (&other.serial, &other.wwid, &other.designators)
            && (&self.vendor, &self.name) == (&other.vendor, &other.name)
    }
}

/// What mkfs wants to know of a disk, in bytes; zeros where the disk says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs, reason = "named as in /sys/block/<name>/queue")]
pub struct Topology {
    pub logical_block_size: u32,
    pub physical_block_size: u32,
    pub minimum_io_size: u32,
    pub optimal_io_size: u32,
    pub rotational: bool,
    /// Its physical sectors do not begin at its first byte (`alignment_offset`).
    pub is_misaligned: bool,
}

/// All SCSI disks. One that vanishes during the look is passed over; a look that fails is an error.
///
/// # Errors
/// sysfs cannot be read.
pub fn scan(sysfs: &Path) -> Result<Vec<Disk>, Error> {
    let folder = sysfs.join("bus/scsi/devices");
    let mut disks = Vec::new();
    for name in names(&folder)?.unwrap_or_default() {
        // host0 and target0:0:0 are in the same folder.
        if let Ok(address) = name.parse::<Address>()
            && let Some(disk) = disk(sysfs, address)?
        {
            disks.push(disk);
        }
    }
    disks.sort_by_key(|disk| disk.address);
    Ok(disks)
}

/// One disk; `None`: it is gone, is no disk, or the kernel has not made its block device yet.
///
/// # Errors
/// sysfs cannot be read.
pub fn disk(sysfs: &Path, address: Address) -> Result<Option<Disk>, Error> {
    disk_in(&device(sysfs, address), address)
}

fn disk_in(device: &Path, address: Address) -> Result<Option<Disk>, Error> {
    let text = |name: &str| text(&device.join(name));
    let Some(name) = names(&device.join("block"))?.unwrap_or_default().into_iter().min() else { return Ok(None) };
    let block = device.join("block").join(&name);
    let (Some(dev), Some(size), Some(state)) = (self::text(&block.join("dev"))?, self::text(&block.join("size"))?, text("state")?) else {
        return Ok(None);
    };
    let (Ok(dev), Ok(sectors)) = (dev.parse::<Dev>(), size.parse::<u64>()) else {
        return Err(Error { call: "parse", subject: block, errno: Errno::INVAL });
    };
    Ok(Some(Disk {
        address,
        vendor: text("vendor")?.unwrap_or_default(),
        state: match state.as_str() {
            "running" => State::Running,
            "offline" | "transport-offline" => State::Offline,
            _ => State::Passing,
        },
        wwid: text("wwid")?.filter(|wwid| !wwid.is_empty()),
        serial: serial(device)?,
        designators: attribute(&device.join("vpd_pg83"))?.map(|page| ascii_designators(&page)).unwrap_or_default(),
        dev,
        size_bytes: sectors.saturating_mul(SYSFS_SECTOR_BYTES),
        read_only: self::text(&block.join("ro"))?.as_deref() == Some("1"),
        name,
    }))
}

/// Asks every virtio-scsi host to look for new disks; says how many were asked. Needed where a hot-plug event was lost.
///
/// # Errors
/// A host refused.
pub fn rescan_hosts(sysfs: &Path) -> Result<usize, Error> {
    let folder = sysfs.join("class/scsi_host");
    let mut asked = 0;
    for name in names(&folder)?.unwrap_or_default() {
        let host = folder.join(name);
        if text(&host.join("proc_name"))?.as_deref() == Some("virtio_scsi") {
            write(&host.join("scan"), "- - -")?;
            asked += 1;
        }
    }
    Ok(asked)
}

/// Asks the disk for its size again; virtio-scsi reports a change by itself, unless the event was lost.
///
/// # Errors
/// The disk is gone.
pub fn rescan_size(sysfs: &Path, address: Address) -> Result<(), Error> {
    write(&device(sysfs, address).join("rescan"), "1")
}

/// Takes an offline disk up again. The newline counts: without it the kernel knows no such state (`store_state_field`
/// in scsi_sysfs.c compares with it) and answers EINVAL.
///
/// # Errors
/// The disk is gone, or the kernel refuses.
pub fn set_running(sysfs: &Path, disk: &Disk) -> Result<(), Error> {
    write_to(sysfs, disk, "state", "running\n")
}

/// Has the kernel forget the disk; one that is really there is found anew when its host is asked to look.
///
/// # Errors
/// It is gone already.
pub fn delete(sysfs: &Path, disk: &Disk) -> Result<(), Error> {
    write_to(sysfs, disk, "delete", "1")
}

/// To an attribute of this disk and no other: its folder is held open from the look on. Below the folder of a device that is gone there is nothing
/// any more, whoever has its address now (kernfs: `kernfs_dop_revalidate`).
fn write_to(sysfs: &Path, disk: &Disk, name: &str, what: &str) -> Result<(), Error> {
    let path = device(sysfs, disk.address);
    let held = std::fs::File::open(&path).map_err(Error::io("open", &path))?;
    let device = Path::new("/proc/self/fd").join(held.as_raw_fd().to_string());
    if !disk_in(&device, disk.address)?.is_some_and(|now| now.is(disk)) {
        return Err(Error { call: "open", subject: path, errno: Errno::NODEV });
    }
    write(&device.join(name), what).map_err(|error| Error { subject: path.join(name), ..error })
}

/// What sits on the disk: `dm-0`, `md0`, …
///
/// # Errors
/// sysfs cannot be read.
pub fn holders(sysfs: &Path, name: &str) -> Result<Vec<String>, Error> {
    Ok(names(&sysfs.join("class/block").join(name).join("holders"))?.unwrap_or_default())
}

/// The kernel's count of commands to the disk that did not end well, harmless ones included (`scsi_complete` in scsi_lib.c); `None`: it is gone.
///
/// # Errors
/// sysfs cannot be read.
pub fn failed_commands(sysfs: &Path, address: Address) -> Result<Option<u64>, Error> {
    // `0x1f`
    let text = text(&device(sysfs, address).join("ioerr_cnt"))?;
    Ok(text.and_then(|text| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok()))
}

/// Sector and I/O sizes of the disk.
///
/// # Errors
/// sysfs cannot be read.
pub fn topology(sysfs: &Path, disk: &Disk) -> Result<Topology, Error> {
    topology_below(&device(sysfs, disk.address).join("block").join(&disk.name))
}

/// The same of any block device, such as a mapping.
///
/// # Errors
/// sysfs cannot be read.
pub fn topology_of(sysfs: &Path, dev: Dev) -> Result<Topology, Error> {
    topology_below(&sysfs.join("dev/block").join(dev.to_string()))
}

/// Whether a block device passes discards on: a disk as QEMU makes it, a mapping with `allow_discards`.
///
/// # Errors
/// sysfs cannot be read.
pub fn takes_discards(sysfs: &Path, dev: Dev) -> Result<bool, Error> {
    let most = text(&sysfs.join("dev/block").join(dev.to_string()).join("queue/discard_max_bytes"))?;
    Ok(most.is_some_and(|most| most != "0"))
}

fn topology_below(block: &Path) -> Result<Topology, Error> {
    let queue = block.join("queue");
    let number = |name: &str| Ok(text(&queue.join(name))?.and_then(|text| text.parse().ok()).unwrap_or_default());
    Ok(Topology {
        logical_block_size: number("logical_block_size")?,
        physical_block_size: number("physical_block_size")?,
        minimum_io_size: number("minimum_io_size")?,
        optimal_io_size: number("optimal_io_size")?,
        rotational: text(&queue.join("rotational"))?.as_deref() == Some("1"),
        is_misaligned: text(&block.join("alignment_offset"))?.is_some_and(|offset| offset != "0"),
    })
}

fn device(sysfs: &Path, address: Address) -> PathBuf {
    sysfs.join("bus/scsi/devices").join(address.to_string())
}

/// The disk's serial; none if it has none. A disk that lists page 0x80 among its pages, and whose page the kernel could not
/// read when it found the disk, has one that nobody knows.
fn serial(device: &Path) -> Result<Option<String>, Error> {
    if let Some(page) = attribute(&device.join("vpd_pg80"))? {
        return Ok(serial_of(&page));
    }
    let listed = attribute(&device.join("vpd_pg0"))?.is_some_and(|page| page.get(4..).unwrap_or_default().contains(&0x80));
    Ok(listed.then(|| UNREADABLE_SERIAL.to_string()))
}

/// VPD page 0x80 (SPC-4 7.8.15): 4 bytes of header, length in the last two, then ASCII, padded with spaces.
fn serial_of(page: &[u8]) -> Option<String> {
    let (header, rest) = page.split_at_checked(4)?;
    let length = usize::from(u16::from_be_bytes([*header.get(2)?, *header.get(3)?]));
    if header.get(1) != Some(&0x80) {
        return None;
    }
    ascii(rest.get(..length.min(rest.len()))?)
}

/// VPD page 0x83 (SPC-4 7.8.6): descriptors of 4 bytes of header and up to 255 of data. Code set 2 is ASCII.
fn ascii_designators(page: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    let Some((header, mut rest)) = page.split_at_checked(4) else { return found };
    if header.get(1) != Some(&0x83) {
        return found;
    }
    while let Some((head, tail)) = rest.split_at_checked(4) {
        let (Some(code_set), Some(length)) = (head.first(), head.get(3)) else { break };
        let Some((data, after)) = tail.split_at_checked(usize::from(*length)) else { break };
        if code_set & 0x0f == 2
            && let Some(text) = ascii(data)
        {
            found.push(text);
        }
        rest = after;
    }
    found
}

fn ascii(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes).ok()?.trim_matches(|c: char| c == '\0' || c == ' ');
    (!text.is_empty() && text.is_ascii()).then(|| text.to_string())
}

/// Entries of a folder; `None`: no such folder.
fn names(folder: &Path) -> Result<Option<Vec<String>>, Error> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(cause) if is_absent(&cause) => return Ok(None),
        Err(cause) => return Err(Error::io("read folder", folder)(cause)),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry.map_err(Error::io("read folder", folder))?.file_name().into_string());
    }
    Ok(Some(names))
}

/// One attribute's bytes; `None`: the device is gone or has no such attribute.
/// EINVAL counts as none too: it is what `wwid` answers for a drive without `wwn=`.
fn attribute(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    match std::fs::read(path) {
        Ok(bytes) if bytes.len() > MAX_ATTRIBUTE_BYTES => Err(Error { call: "read", subject: path.into(), errno: Errno::FBIG }),
        Ok(bytes) => Ok(Some(bytes)),
        Err(cause) if is_absent(&cause) || cause.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => Ok(None),
        Err(cause) => Err(Error::io("read", path)(cause)),
    }
}

fn text(path: &Path) -> Result<Option<String>, Error> {
    Ok(attribute(path)?.map(|bytes| String::from_utf8_lossy(&bytes).trim().to_string()))
}

fn is_absent(cause: &io::Error) -> bool {
    cause.raw_os_error().is_some_and(|errno| is_gone(Errno::from_raw_os_error(errno)))
}

/// How a look at a device, or a deed on it, fails when it is not there any more.
#[must_use]
pub fn is_gone(errno: Errno) -> bool {
    matches!(errno, Errno::NOENT | Errno::NOTDIR | Errno::NXIO | Errno::NODEV)
}

fn write(path: &Path, what: &str) -> Result<(), Error> {
    // Opened without O_CREAT: an attribute that is not there must not become a file.
    let mut file = std::fs::OpenOptions::new().write(true).open(path).map_err(Error::io("open", path))?;
    io::Write::write_all(&mut file, what.as_bytes()).map_err(Error::io("write", path))
}

#[cfg(test)]
mod tests;
