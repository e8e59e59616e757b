//! Mappings of dm-crypt over volumes' disks: found by the device in their tables and judged by their UUIDs and tables, so
//! that those of the reference driver (`sdb-encrypted`) are known as well as ours. Their names decide nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use disk::luks::Header;
use rustix::io::Errno;

use super::{Node, RELEASE_DEADLINE, poll};
use crate::error::Cause;
use crate::identity;
use crate::plan;
use crate::request::{Encryption, StageRequest, Volume};
use crate::sys::block::{Access, Device};
use crate::sys::scsi::{self, Disk};
use crate::sys::{self, Dev, dm};

/// How ours and the reference driver's mappings are called in their UUIDs.
const NAME_END: &str = "-encrypted";
/// The UUIDs that cryptsetup gives to the mappings of LUKS1 and LUKS2, and we do.
const UUID_BEGIN: &str = "CRYPT-LUKS";
/// dm-crypt's sectors.
const SECTOR_BYTES: u64 = 512;
/// Options of a table that change nothing of what is read and written.
const SPEED_OPTIONS: &[&str] = &["same_cpu_crypt", "submit_from_crypt_cpus", "no_read_workqueue", "no_write_workqueue", "high_priority"];
pub(super) const DISCARDS: &str = "allow_discards";

/// Where a volume's bytes are: its disk, or the open mapping over it.
#[derive(Debug, Clone)]
pub(super) struct Medium {
    pub(super) disk: Disk,
    pub(super) mapping: Option<dm::Mapping>,
}

impl Medium {
    /// The disk itself.
    pub(super) fn of(disk: &Disk) -> Self {
        Self { disk: disk.clone(), mapping: None }
    }

    /// The device that is mounted or shown.
    pub(super) fn dev(&self) -> Dev {
        self.mapping.as_ref().map_or(self.disk.dev, |mapping| mapping.dev)
    }

    /// Its size as the kernel knows it.
    pub(super) fn size_bytes(&self) -> u64 {
        self.mapping.as_ref().map_or(self.disk.size_bytes, |mapping| mapping.length_sectors().saturating_mul(SECTOR_BYTES))
    }

    /// What the kernel calls it in its log.
    pub(super) fn kernel_name(&self) -> String {
        // dm.c, alloc_dev: the name is made of the number.
        self.mapping.as_ref().map_or_else(|| self.disk.name.clone(), |mapping| format!("dm-{}", mapping.dev.minor))
    }

    /// For people.
    pub(super) fn name(&self) -> String {
        match &self.mapping {
            Some(mapping) => format!("{} over {}", mapping.name, identity::name(&self.disk)),
            None => identity::name(&self.disk),
        }
    }
}

/// `csi-<16 hex digits>-encrypted`.
pub(super) fn name_of(volume: &Volume) -> String {
    format!("{}{NAME_END}", volume.serial)
}

impl Node {
    /// At the start: takes keys back whose mappings somebody else has closed meanwhile.
    pub fn forget_keys(&self) {
        if let Err(error) = dm::forget_keys_of_gone(&self.devices) {
            proto::warn!("keys of mappings that are gone stay in the kernel: {error}");
        }
    }

    /// The serials of the volumes that are open here by our name for them.
    pub(super) fn opened_volumes(&self) -> Result<Vec<String>, sys::Error> {
        let open = self.mappings()?;
        Ok(open.iter().filter_map(serial_of).map(str::to_owned).collect())
    }

    /// All mappings, anybody's. A kernel without device-mapper is not asked.
    fn mappings(&self) -> Result<Vec<dm::Mapping>, sys::Error> {
        let there = self.sysfs.join("class/misc/device-mapper");
        if there.try_exists().map_err(sys::Error::io("stat", &there))? { dm::mappings(&self.devices) } else { Ok(Vec::new()) }
    }

    /// The mapping with this device number; `None`: it is no mapping.
    pub(super) fn mapping_at(&self, dev: Dev) -> Result<Option<dm::Mapping>, Cause> {
        let folder = self.sysfs.join("dev/block").join(dev.to_string());
        Ok(self.mapping_of_folder(&folder)?.filter(|mapping| mapping.dev == dev))
    }

    /// The mapping that a folder of sysfs is of. Only device-mapper's devices say a name there: of others nothing is asked.
    fn mapping_of_folder(&self, folder: &Path) -> Result<Option<dm::Mapping>, Cause> {
        let path = folder.join("dm/name");
        match std::fs::read_to_string(&path) {
            Ok(name) => Ok(dm::mapping(&self.devices, name.trim_end())?),
            Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(cause) => Err(sys::Error::io("read", &path)(cause).into()),
        }
    }

    /// Of each device the one below it, if it is a crypt mapping; else itself.
    pub(super) fn below<T>(&self, devices: impl IntoIterator<Item = (Dev, T)>) -> Result<Vec<(Dev, T)>, Cause> {
        // Each is asked about once: hundreds of mounts may be from one mapping.
        let mut known: BTreeMap<Dev, Dev> = BTreeMap::new();
        let mut found = Vec::new();
        for (dev, of) in devices {
            let below = match known.get(&dev) {
                Some(below) => *below,
                None if dev.major == 0 => dev,
                None => self.mapping_at(dev)?.as_ref().and_then(backing).unwrap_or(dev),
            };
            known.insert(dev, below);
            found.push((below, of));
        }
        Ok(found)
    }

    /// The crypt mappings over the disk.
    pub(super) fn mappings_over(&self, disk: &Disk) -> Result<Vec<dm::Mapping>, Cause> {
        let mut over = Vec::new();
        for holder in scsi::holders(&self.sysfs, &disk.name)? {
            let mapping = self.mapping_of_folder(&self.sysfs.join("class/block").join(&holder))?;
            over.extend(mapping.filter(|mapping| backing(mapping) == Some(disk.dev)));
        }
        Ok(over)
    }

    /// The mapping that stage has opened over a raw block volume's disk.
    pub(super) fn open_mapping(&self, volume: &Volume, disk: &Disk) -> Result<Option<dm::Mapping>, Cause> {
        Ok(self.mappings_over(disk)?.into_iter().find(|mapping| is_drivers(mapping, volume, disk)))
    }

    /// The volume's mappings that this driver, or the reference driver, opened: over its disk; those that we opened for it, over
    /// whatever disk (one that is gone, one of two that are there while it moves); and the one that was mounted, by its UUID.
    pub(super) fn mappings_of(&self, volume: &Volume, disk: Option<&Disk>, mounted: Option<&str>) -> Result<Vec<dm::Mapping>, Cause> {
        let mut found = Vec::new();
        for mapping in self.mappings()? {
            let is_over = |disk: &Disk| backing(&mapping) == Some(disk.dev) && is_drivers(&mapping, volume, disk);
            if disk.is_some_and(is_over) || is_named(&mapping, volume) || mounted == Some(&mapping.uuid) {
                found.push(mapping);
            }
        }
        Ok(found)
    }

    /// Whether the mapping is ours for this volume and nothing can be in it: cut short before it had a table, or over a disk
    /// that is gone.
    fn is_leftover(&self, mapping: &dm::Mapping, volume: &Volume) -> Result<bool, Cause> {
        if !is_named(mapping, volume) {
            return Ok(false);
        }
        match backing(mapping) {
            None => Ok(mapping.is_half_made()),
            Some(dev) => Ok(!sys::is_block_device_there(&self.sysfs, dev)?),
        }
    }

    /// What stage sees over the disk.
    pub(super) fn look_mapping(&self, want: &StageRequest, medium: &Medium) -> Result<(plan::Mapping, Option<dm::Mapping>), Cause> {
        let disk = &medium.disk;
        let over = match &medium.mapping {
            Some(mounted) => vec![mounted.clone()],
            None => self.mappings_over(disk)?,
        };
        let Some(encryption) = &want.encryption else {
            // A pod's own LUKS on its raw block device is the pod's business.
            let ours = over.into_iter().find(|mapping| medium.mapping.is_some() || is_drivers(mapping, &want.volume, disk));
            let seen = ours.as_ref().map_or(plan::Mapping::None, |_| plan::Mapping::Open { short: false });
            return Ok((seen, ours));
        };
        match over.as_slice() {
            [] => {
                let ours = self.mappings()?.into_iter().find(|mapping| opened_as(mapping) == Some(&name_of(&want.volume)));
                Ok(match ours {
                    Some(left) if self.is_leftover(&left, &want.volume)? => (plan::Mapping::Leftover, Some(left)),
                    Some(other) => (plan::Mapping::Strange(format!("{} is over another device", other.name)), None),
                    None => (plan::Mapping::None, None),
                })
            }
            [mapping] => Ok((self.judge(want, encryption, disk, mapping)?, Some(mapping.clone()))),
            several => {
                let names: Vec<&str> = several.iter().map(|mapping| mapping.name.as_str()).collect();
                Ok((plan::Mapping::Strange(format!("several mappings are over it: {}", names.join(", "))), None))
            }
        }
    }

    fn judge(&self, want: &StageRequest, encryption: &Encryption, disk: &Disk, mapping: &dm::Mapping) -> Result<plan::Mapping, Cause> {
        if mapping.is_half_made() && opened_as(mapping) == Some(&name_of(&want.volume)) {
            return Ok(plan::Mapping::Leftover);
        }
        let strange = |what: String| Ok(plan::Mapping::Strange(format!("{} is over it, and {what}", mapping.name)));
        if opened_as(mapping).is_some_and(|name| name.starts_with(identity::OUR_SERIALS) && name != name_of(&want.volume)) {
            return strange("it was opened for another volume: unstage that first".into());
        }
        let header = match self.luks_header(disk) {
            Ok(header) => header,
            Err(Cause::Luks(why)) => return strange(format!("its disk has no header to judge it by: {why}")),
            Err(cause) => return Err(cause),
        };
        if mapping.is_suspended {
            return strange(format!("it is suspended: `dmsetup resume {}`, or unstage the volume", mapping.name));
        }
        match difference(&header, disk, encryption, mapping) {
            Some(what) => strange(what),
            None => Ok(plan::Mapping::Open { short: mapping.length_sectors() < length(&header, disk)? }),
        }
    }

    /// The LUKS header of the disk.
    pub(super) fn luks_header(&self, disk: &Disk) -> Result<Header, Cause> {
        let device = self.open(disk, Access::Shared)?;
        read_header(&device)
    }

    /// Opens the disk or the mapping over it, and looks again once it is open: then it stays what it is.
    pub(super) fn open_medium(&self, medium: &Medium, access: Access) -> Result<Device, Cause> {
        let Some(mapping) = &medium.mapping else { return self.open(&medium.disk, access) };
        let device = Device::open(&dm::node(&self.devices, mapping)?.real, mapping.dev, access)?;
        let now = dm::mapping(&self.devices, &mapping.name)?;
        let same = now.is_some_and(|now| (now.dev, &now.uuid, backing(&now)) == (mapping.dev, &mapping.uuid, Some(medium.disk.dev)));
        if same { Ok(device) } else { Err(Cause::OtherDiskNow { disk: medium.name() }) }
    }

    /// What of the medium can be the source of a mount, as the mount table is to show it.
    pub(super) fn source_of(&self, medium: &Medium) -> Result<PathBuf, Cause> {
        match &medium.mapping {
            Some(mapping) => Ok(dm::node(&self.devices, mapping)?.named),
            None => Ok(self.node_of(&medium.disk)),
        }
    }

    /// Ends a suspension that somebody left: what waits for the mapping's I/O would wait for ever.
    pub(super) fn wake(&self, mapping: &dm::Mapping) -> Result<(), Cause> {
        proto::warn!("{}: is suspended, and is resumed", mapping.name);
        Ok(dm::resume(&self.devices, mapping)?)
    }

    /// Takes a mapping away, waiting for those who let go of it just now.
    pub(super) fn close(&self, mapping: &dm::Mapping) -> Result<(), Cause> {
        let closed = poll(RELEASE_DEADLINE, || match dm::remove(&self.devices, mapping) {
            Ok(()) => Ok(Ok(())),
            // Somebody else was first.
            Err(error) if error.errno == Errno::NXIO => Ok(Ok(())),
            Err(error) if error.errno == Errno::BUSY => Ok(Err(error)),
            Err(error) => Err(Cause::Sys(error)),
        })?;
        let Err(_) = closed else {
            proto::info!("{}: closed", mapping.name);
            return Ok(());
        };
        let at: Vec<PathBuf> = self.mounts()?.into_iter().filter(|mount| mount.dev == mapping.dev).map(|mount| mount.point).collect();
        let by = match at.first() {
            Some(at) => format!("mounted at {}", at.display()),
            None if backing(mapping).is_some_and(|dev| self.is_trimmed(dev)) => {
                "by this agent's own trim, which ends with the piece that the disk is at; repeat the call".to_string()
            }
            None => "open somewhere, or mounted in another mount namespace (a container that has not ended)".to_string(),
        };
        Err(Cause::StillHeld { waited: RELEASE_DEADLINE, disk: mapping.name.clone(), by })
    }
}

/// The disk below a mapping that is one piece of dm-crypt; `None`: it is anything else.
pub(super) fn backing(mapping: &dm::Mapping) -> Option<Dev> {
    mapping.crypt().map(|crypt| crypt.backing)
}

/// 512-byte sectors that a mapping by this header has on the disk.
pub(super) fn length(header: &Header, disk: &Disk) -> Result<u64, Cause> {
    header.segment.mapping_sectors(disk.size_bytes).map_err(Cause::from)
}

/// What stands after the LUKS UUID in a mapping's own: the name it was opened under.
fn opened_as(mapping: &dm::Mapping) -> Option<&str> {
    let rest = mapping.uuid.strip_prefix(UUID_BEGIN)?;
    // `2-<32 hex digits>-<name>`
    rest.splitn(3, '-').nth(2)
}

/// The volume that we opened it for.
fn serial_of(mapping: &dm::Mapping) -> Option<&str> {
    opened_as(mapping)?.strip_suffix(NAME_END).filter(|serial| serial.starts_with(identity::OUR_SERIALS))
}

/// Whether we opened it for this volume.
fn is_named(mapping: &dm::Mapping, volume: &Volume) -> bool {
    opened_as(mapping) == Some(&name_of(volume))
}

/// Whether the driver opened a mapping over this disk, ours or the reference driver: that is by the volume's serial, or by
/// one of the disk's names. A pod may have opened others on its raw block device.
fn is_drivers(mapping: &dm::Mapping, volume: &Volume, disk: &Disk) -> bool {
    let Some(name) = opened_as(mapping) else { return false };
    name == name_of(volume) || name.strip_suffix(NAME_END).is_some_and(|of| of == disk.name || of.starts_with("wwn-0x"))
}

/// What of a live mapping is not as it would be made now; its length aside, where it is too short.
pub(super) fn difference(header: &Header, disk: &Disk, encryption: &Encryption, mapping: &dm::Mapping) -> Option<String> {
    let Some(crypt) = mapping.crypt() else {
        let kinds: Vec<&str> = mapping.targets.iter().map(|target| target.kind.as_str()).collect();
        return Some(format!("it is not one piece of dm-crypt: {}", kinds.join(", ")));
    };
    let segment = &header.segment;
    if !mapping.uuid.starts_with(&header.dm_uuid("")) {
        return Some(format!("its UUID {:?} is not of the header on the disk, {}", mapping.uuid, header.uuid));
    }
    if crypt.cipher != segment.cipher {
        return Some(format!("its cipher is {}, the header says {}", crypt.cipher, segment.cipher));
    }
    let offset_sectors = segment.offset_bytes / SECTOR_BYTES;
    if (crypt.offset_sectors, crypt.iv_offset) != (offset_sectors, segment.iv_tweak) {
        return Some(format!(
            "its data begins at sector {} with IV {}, the header says {offset_sectors} and {}",
            crypt.offset_sectors, crypt.iv_offset, segment.iv_tweak
        ));
    }
    if mapping.read_only != disk.read_only {
        return Some(format!("it is {}, the disk is not", if mapping.read_only { "read-only" } else { "writable" }));
    }
    match segment.mapping_sectors(disk.size_bytes) {
        Ok(sectors) if mapping.length_sectors() <= sectors => (),
        Ok(sectors) => return Some(format!("it has {} sectors, the disk has room for {sectors}", mapping.length_sectors())),
        Err(why) => return Some(why.to_string()),
    }
    let matters = |options: &[String]| {
        let mut options: Vec<String> = options.iter().filter(|option| !SPEED_OPTIONS.contains(&option.as_str())).cloned().collect();
        options.sort_unstable();
        options
    };
    let (live, wanted) = (matters(&crypt.options), matters(&options(header, encryption)));
    (live != wanted).then(|| format!("its options are [{}], they should be [{}]", live.join(" "), wanted.join(" ")))
}

/// The options of the volume's table, in cryptsetup's order.
pub(super) fn options(header: &Header, encryption: &Encryption) -> Vec<String> {
    let discards = encryption.discards.then(|| DISCARDS.to_string());
    let sector_size = header.segment.sector_size;
    discards.into_iter().chain((sector_size != 512).then(|| format!("sector_size:{sector_size}"))).collect()
}

/// The LUKS header on a device.
pub(super) fn read_header(device: &Device) -> Result<Header, Cause> {
    let size_bytes = device.size_bytes()?;
    Ok(Header::read(size_bytes, &mut |offset, buffer| read(device, offset, buffer))?)
}

/// For the `disk` crate, which knows errors of the standard library only.
pub(super) fn read(device: &Device, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
    device.read_at(offset, buffer).map_err(|error| std::io::Error::from_raw_os_error(error.errno.raw_os_error()))
}

#[cfg(test)]
mod tests;
