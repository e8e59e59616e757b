//! StorageClass parameters: checked strictly where a volume is made, taken as they are where it exists.
//!
//! Names, defaults and the normalised VolumeContext are the reference driver's. Values that go into a drive string are
//! checked against Proxmox's own enumerations, so that a comma cannot smuggle in an option. Pure.

mod luks;

use std::collections::{BTreeMap, HashMap};

use proto::{VolumeHandle, volume_context};

use crate::error::Error;
use crate::mutable::{self, Mutable, Options};
use crate::placement::Room;
use crate::pve::drive::Drive;

/// What this version formats. An empty fstype means the first.
pub const FILESYSTEMS: &[&str] = &["ext4", "xfs"];
/// mkfs.xfs makes nothing smaller since xfsprogs 5.19, and neither does our node.
const XFS_MIN_BYTES: u64 = 300 << 20;
/// The LUKS header and its keyslots, before the data of an encrypted volume.
const LUKS_HEADER_BYTES: u64 = 16 << 20;
/// What is inside a LUKS volume has to be more than a floppy disk, or nothing can be proven of it (libblkid).
const LUKS_MIN_BYTES: u64 = LUKS_HEADER_BYTES + (2 << 20);
/// qemu-server `PVE/QemuServer/Drive.pm`, `cache`.
const CACHES: &[&str] = &["none", "writethrough", "writeback", "unsafe", "directsync"];
/// The same, `aio`.
const AIOS: &[&str] = &["native", "threads", "io_uring"];
/// The same, `discard`.
const DISCARDS: &[&str] = &["on", "ignore"];
/// `storageFormat`.
const FORMATS: &[&str] = &["raw", "qcow2"];
/// QEMU's throttles take up to 10^15; more than this is no limit any more.
const MAX_THROTTLE: u64 = 1_000_000_000;
/// Block sizes of ext4 and xfs that a page of 4 KiB can mount.
const BLOCK_SIZES: &[u64] = &[1024, 2048, 4096];
/// Below this size mke2fs takes blocks of 1 KiB by itself, and so does our node.
const EXT4_SMALL_BYTES: u64 = 512 << 20;
/// Inode sizes that a volume of the reference driver may have; a new one has less choice, see `fit_ext4`.
const INODE_SIZES: &[u64] = &[128, 256, 512, 1024, 2048, 4096];
/// xfs inode sizes, with checksums; at most half a block.
const XFS_INODE_SIZES: &[u64] = &[512, 1024, 2048];

/// Every key that CreateVolume knows.
const KNOWN: &[&str] = &[
    "storage",
    "storageFormat",
    "storageReserve",
    "storageOvercommit",
    "cache",
    "aio",
    "ssd",
    volume_context::DISCARD,
    "iothread",
    "backup",
    "diskIOPS",
    "diskMBps",
    "blockSize",
    "inodeSize",
    "replicate",
    "strictParameters",
    volume_context::LUKS_KDF,
    volume_context::LUKS_KDF_MEMORY,
    volume_context::LUKS_KDF_TIME,
    volume_context::LUKS_KDF_ITERATIONS,
    volume_context::LUKS_DISCARDS,
];
/// What external-provisioner adds with --extra-create-metadata, or leaves when called by hand.
const PASSED_OVER: &[&str] = &["csi.storage.k8s.io/pv/name", "csi.storage.k8s.io/pvc/name", "csi.storage.k8s.io/pvc/namespace"];
/// The reference driver's, and not in this version.
const NOT_BUILT: &[&str] = &["replicateSchedule", "replicateZones"];

/// What a StorageClass says about a volume.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parameters {
    /// The Proxmox storage id; empty only when read from a VolumeContext.
    pub storage: String,
    /// `raw` or `qcow2`, if given.
    pub format: Option<String>,
    /// How much of the storage new volumes may have; only of a class.
    pub room: Room,
    cache: Option<String>,
    aio: Option<String>,
    ssd: Option<bool>,
    /// `None`: on where it is worth something, see `give_back_by_default`.
    discard: Option<String>,
    gives_back: bool,
    no_iothread: bool,
    backup: bool,
    replicate: bool,
    disk_iops: u64,
    disk_mbps: u64,
    block_size: u64,
    inode_size: u64,
    /// Only of a class: the node alone reads them again.
    luks: Vec<(&'static str, String)>,
    /// The class' own word for a filesystem, where somebody has written one by hand.
    fstype: String,
    /// What a VolumeAttributesClass says beside; the last one counts.
    pub mutable: Vec<Mutable>,
}

impl Parameters {
    /// For a new volume: every key known, every value right. Also gives what to warn of.
    ///
    /// # Errors
    /// A sentence with the key, the value and what would be right.
    pub fn of_class(given: &HashMap<String, String>) -> Result<(Self, Vec<String>), String> {
        let strict = match given.get("strictParameters") {
            None => true,
            Some(value) => boolean("strictParameters", value)?,
        };
        let mut warnings = Vec::new();
        let mut keys: Vec<&String> = given.keys().collect();
        keys.sort();
        for key in keys {
            let key = key.as_str();
            if NOT_BUILT.contains(&key) {
                return Err(format!("parameter {key} is not supported by this version (no replication); remove it"));
            }
            if KNOWN.contains(&key) || PASSED_OVER.contains(&key) || matches!(key, "csi.storage.k8s.io/fstype" | "fstype") {
                continue;
            }
            let sentence = format!("parameter {key:?} is not known; known are {}", KNOWN.join(", "));
            if strict {
                return Err(format!("{sentence} (strictParameters: \"false\" makes this a warning)"));
            }
            warnings.push(sentence);
        }
        for key in ["csi.storage.k8s.io/fstype", "fstype"] {
            filesystem(given.get(key).map_or("", String::as_str))?;
        }
        let mut parameters = Self::read(given, boolean)?;
        parameters.room = Self::room_of_class(given)?;
        parameters.luks = luks::of_class(given)?;
        parameters.fstype = ["csi.storage.k8s.io/fstype", "fstype"].iter().find_map(|key| given.get(*key).cloned()).unwrap_or_default();
        if parameters.storage.is_empty() {
            return Err("parameter storage is missing; it is the id of a Proxmox storage, e.g. local-lvm".into());
        }
        if parameters.replicate {
            return Err("parameter replicate is not supported by this version; remove it or write false".into());
        }
        Ok((parameters, warnings))
    }

    /// What a class says of the room on its storage.
    ///
    /// # Errors
    /// A sentence with the key, the value and what would be right.
    pub fn room_of_class(given: &HashMap<String, String>) -> Result<Room, String> {
        let text = |key: &str| given.get(key).map(String::as_str).filter(|value| !value.is_empty());
        Room::read(text("storageReserve"), text("storageOvercommit"))
    }

    /// Whether the class speaks of LUKS: it is an encrypting one then, with or without a secret for the provisioner.
    #[must_use]
    pub fn is_encrypting(&self) -> bool {
        !self.luks.is_empty()
    }

    /// The class' own filesystem, for a request whose capability names none.
    #[must_use]
    pub fn fstype(&self) -> &str {
        &self.fstype
    }

    /// Whether a LUKS volume of `size_bytes` can be made.
    ///
    /// # Errors
    /// OUT_OF_RANGE; a sentence with the numbers.
    pub fn fit_luks(size_bytes: u64) -> Result<(), Error> {
        if size_bytes < LUKS_MIN_BYTES {
            return Err(Error::out_of_range(format!(
                "an encrypted volume needs at least {LUKS_MIN_BYTES} bytes (18 MiB, of which 16 MiB are the LUKS header's), and {size_bytes} are asked for"
            )));
        }
        Ok(())
    }

    /// Whether an ext4 of `size_bytes` can be made with these.
    ///
    /// # Errors
    /// INVALID_ARGUMENT; a sentence with the numbers.
    pub fn fit_ext4(&self, size_bytes: u64) -> Result<(), Error> {
        let by_size = if size_bytes < EXT4_SMALL_BYTES { 1024 } else { 4096 };
        let block_size = if self.block_size == 0 { by_size } else { self.block_size };
        if self.inode_size != 0 && !(256..=block_size).contains(&self.inode_size) {
            return Err(Error::invalid(format!(
                "parameter inodeSize {} is none of ext4's here: a power of two from 256 to the block size, which is {block_size}",
                self.inode_size
            )));
        }
        Ok(())
    }

    /// Whether an xfs of `size_bytes` can be made with these, behind a LUKS header or not.
    ///
    /// # Errors
    /// OUT_OF_RANGE for the size, INVALID_ARGUMENT for the rest; a sentence with the numbers.
    pub fn fit_xfs(&self, size_bytes: u64, is_encrypted: bool) -> Result<(), Error> {
        let block_size = if self.block_size == 0 { 4096 } else { self.block_size };
        if self.inode_size != 0 && (!XFS_INODE_SIZES.contains(&self.inode_size) || self.inode_size > block_size / 2) {
            return Err(Error::invalid(format!(
                "parameter inodeSize {} is none of xfs's with blockSize {block_size}: 512, 1024 or 2048, at most half a block",
                self.inode_size
            )));
        }
        // Inodes of 512 bytes are xfs's own choice, and half a block of 1024.
        let (least, words) = if is_encrypted {
            (XFS_MIN_BYTES + LUKS_HEADER_BYTES, "316 MiB, of which 16 MiB are the LUKS header's")
        } else {
            (XFS_MIN_BYTES, "300 MiB")
        };
        if size_bytes < least {
            return Err(Error::out_of_range(format!(
                "xfs needs at least {least} bytes ({words}), and {size_bytes} are asked for; ask for more, or use ext4"
            )));
        }
        Ok(())
    }

    /// For a volume that exists: unknown keys are passed over, booleans are read as the reference driver read them.
    ///
    /// # Errors
    /// A value that must not reach a drive string.
    pub fn of_context(given: &HashMap<String, String>) -> Result<Self, String> {
        let read = Self::read(given, |_, value| Ok(boolean("", value).unwrap_or(false)))?;
        Ok(Self { mutable: vec![Mutable::of_context(given)], ..read })
    }

    fn read(given: &HashMap<String, String>, boolean: impl Fn(&str, &str) -> Result<bool, String>) -> Result<Self, String> {
        let text = |key: &str| given.get(key).map(String::as_str).filter(|value| !value.is_empty());
        let flag = |key: &str| text(key).map(|value| boolean(key, value)).transpose();
        let one_of = |key: &str, allowed: &[&str]| match text(key) {
            Some(value) if !allowed.contains(&value) => {
                Err(format!("parameter {key} {value:?} is none of Proxmox's: {}", allowed.join(", ")))
            }
            value => Ok(value.map(String::from)),
        };
        Ok(Self {
            storage: match text("storage") {
                Some(id) => storage_id(id)?.into(),
                None => String::new(),
            },
            format: one_of("storageFormat", FORMATS)?,
            room: Room::default(),
            cache: one_of("cache", CACHES)?,
            aio: one_of("aio", AIOS)?,
            ssd: flag("ssd")?,
            discard: one_of(volume_context::DISCARD, DISCARDS)?,
            gives_back: false,
            no_iothread: flag("iothread")? == Some(false),
            backup: flag("backup")?.unwrap_or(false),
            replicate: flag("replicate")?.unwrap_or(false),
            disk_iops: number("diskIOPS", text("diskIOPS"), |n| n <= MAX_THROTTLE, "a number of operations per second")?,
            disk_mbps: number("diskMBps", text("diskMBps"), |n| n <= MAX_THROTTLE, "a number of MiB per second")?,
            block_size: number("blockSize", text("blockSize"), |n| n == 0 || BLOCK_SIZES.contains(&n), "1024, 2048 or 4096")?,
            inode_size: number("inodeSize", text("inodeSize"), |n| n == 0 || INODE_SIZES.contains(&n), "a power of two from 128 to 4096")?,
            luks: Vec::new(),
            mutable: Vec::new(),
            fstype: String::new(),
        })
    }

    /// The VolumeContext of a new, empty volume: the reference driver's normal form, and our word that it is new.
    #[must_use]
    pub fn volume_context(&self) -> HashMap<String, String> {
        let bit = |on: bool| String::from(if on { "1" } else { "0" });
        let mut context = HashMap::from([
            ("storage".to_string(), self.storage.clone()),
            ("backup".into(), bit(self.backup)),
            ("iothread".into(), bit(!self.no_iothread)),
            ("replicate".into(), bit(self.replicate)),
            (volume_context::CONTENT_SOURCE.into(), "none".into()),
        ]);
        let texts = [("storageFormat", &self.format), ("cache", &self.cache), ("aio", &self.aio), (volume_context::DISCARD, &self.discard)];
        context.extend(texts.iter().filter_map(|(key, value)| value.as_ref().map(|value| ((*key).to_string(), value.clone()))));
        context.extend(self.ssd.map(|ssd| (volume_context::SSD.to_string(), bit(ssd))));
        let numbers = [
            ("diskIOPS", self.disk_iops),
            ("diskMBps", self.disk_mbps),
            (volume_context::BLOCK_SIZE, self.block_size),
            (volume_context::INODE_SIZE, self.inode_size),
        ];
        context.extend(self.luks.iter().map(|(key, value)| ((*key).to_string(), value.clone())));
        context.extend(numbers.iter().filter(|(_, n)| *n > 0).map(|(key, n)| ((*key).to_string(), n.to_string())));
        self.mutable.iter().for_each(|mutable| mutable.write_context(&mut context));
        context
    }

    /// Whether Proxmox keeps copies of the volume on other nodes, as the reference driver had it do.
    #[must_use]
    pub fn is_replicated(&self) -> bool {
        self.replicate
    }

    /// Whether QEMU takes the limits of a new volume.
    ///
    /// # Errors
    /// A sentence with the numbers.
    pub fn check_limits(&self) -> Result<(), String> {
        let limits = [("iops_rd", self.disk_iops), ("iops_wr", self.disk_iops), ("mbps_rd", self.disk_mbps), ("mbps_wr", self.disk_mbps)];
        let mut options: Options = limits.iter().filter(|(_, n)| *n > 0).map(|(key, n)| ((*key).into(), n.to_string())).collect();
        self.mutable.iter().for_each(|mutable| mutable.apply(&mut options));
        mutable::check(&options)
    }

    /// Where nothing is said, `discard=on`: for a storage that has more room when a volume has less in it.
    pub fn give_back_by_default(&mut self) {
        self.gives_back = true;
    }

    /// The drive of this volume in slot `lun`: the reference driver's options, our serial, and the slot's WWN.
    #[must_use]
    pub fn drive(&self, handle: &VolumeHandle, lun: u8, readonly: bool) -> Drive {
        let bit = |on: bool| String::from(if on { "1" } else { "0" });
        let mut options = BTreeMap::from([
            ("backup", bit(self.backup)),
            ("iothread", bit(!self.no_iothread)),
            ("replicate", bit(self.replicate)),
            ("serial", handle.serial()),
            ("wwn", proto::wwn_of_lun(lun)),
        ]);
        options.extend(self.aio.clone().map(|aio| ("aio", aio)));
        options.extend(self.cache.clone().map(|cache| ("cache", cache)));
        options.extend(self.ssd.map(|ssd| ("ssd", bit(ssd))));
        let gives_back = self.gives_back || self.ssd == Some(true);
        options.extend(self.discard.clone().or_else(|| gives_back.then(|| "on".into())).map(|discard| ("discard", discard)));
        if self.disk_iops > 0 {
            options.extend(["iops_rd", "iops_wr"].map(|key| (key, self.disk_iops.to_string())));
        }
        if self.disk_mbps > 0 {
            options.extend(["mbps_rd", "mbps_wr"].map(|key| (key, self.disk_mbps.to_string())));
        }
        if readonly {
            options.insert("ro", "1".into());
        }
        let mut options: Options = options.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
        self.mutable.iter().for_each(|mutable| mutable.apply(&mut options));
        mutable::mend(&mut options);
        Drive { volid: handle.volid(), options }
    }
}

/// An fstype as a capability names it.
///
/// # Errors
/// A sentence with what is supported.
pub fn filesystem(given: &str) -> Result<(), String> {
    if given.is_empty() || FILESYSTEMS.contains(&given) {
        return Ok(());
    }
    Err(format!("filesystem {given:?} is not supported by this version; supported: {}", FILESYSTEMS.join(", ")))
}

/// Proxmox: `^[a-z][a-z0-9\-_.]*[a-z0-9]$`, case-insensitive.
fn storage_id(id: &str) -> Result<&str, String> {
    let inner = id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    let ends = id.starts_with(|c: char| c.is_ascii_alphabetic()) && id.ends_with(|c: char| c.is_ascii_alphanumeric());
    if id.len() >= 2 && inner && ends { Ok(id) } else { Err(format!("parameter storage {id:?} is no id of a Proxmox storage")) }
}

/// Go's `strconv.ParseBool`, as the reference driver reads them.
fn boolean(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(format!("parameter {key} {value:?} should be \"true\" or \"false\"")),
    }
}

fn number(key: &str, value: Option<&str>, fits: impl Fn(u64) -> bool, what: &str) -> Result<u64, String> {
    let Some(value) = value else { return Ok(0) };
    let plain = value.bytes().all(|b| b.is_ascii_digit());
    value.parse().ok().filter(|n| plain && fits(*n)).ok_or_else(|| format!("parameter {key} {value:?} should be {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_string(), (*value).to_string())).collect()
    }

    fn drive_of(pairs: &[(&str, &str)], readonly: bool) -> String {
        let handle: VolumeHandle = "r/pve1/ds/vm-9999-a".parse().unwrap();
        let mut given = map(&[("storage", "ds")]);
        given.extend(map(pairs));
        let (parameters, _) = Parameters::of_class(&given).unwrap();
        // What is written into the PV gives the same drive at attach.
        let again = Parameters::of_context(&parameters.volume_context()).unwrap();
        let text = parameters.drive(&handle, 1, readonly).to_string();
        assert_eq!(again.drive(&handle, 1, readonly).to_string(), text);
        let serial = handle.serial();
        text.replace(&serial, "SERIAL").strip_prefix("ds:vm-9999-a,").map(String::from).unwrap()
    }

    const END: &str = "serial=SERIAL,wwn=0x5056432d49443031";

    #[test]
    fn with_no_parameter_the_drive_is_the_reference_drivers() {
        assert_eq!(drive_of(&[], false), format!("backup=0,iothread=1,replicate=0,{END}"));
    }

    #[test]
    fn parameter_cache() {
        assert_eq!(drive_of(&[("cache", "writeback")], false), format!("backup=0,cache=writeback,iothread=1,replicate=0,{END}"));
    }

    #[test]
    fn parameter_aio() {
        assert_eq!(drive_of(&[("aio", "native")], false), format!("aio=native,backup=0,iothread=1,replicate=0,{END}"));
    }

    #[test]
    fn parameter_ssd() {
        let expected = "backup=0,discard=on,iothread=1,replicate=0,serial=SERIAL,ssd=1,wwn=0x5056432d49443031";
        assert_eq!(drive_of(&[("ssd", "true")], false), expected);
        let expected = "backup=0,iothread=1,replicate=0,serial=SERIAL,ssd=0,wwn=0x5056432d49443031";
        assert_eq!(drive_of(&[("ssd", "false")], false), expected);
    }

    #[test]
    fn parameter_discard() {
        assert_eq!(drive_of(&[("discard", "on")], false), format!("backup=0,discard=on,iothread=1,replicate=0,{END}"));
        let expected = "backup=0,discard=ignore,iothread=1,replicate=0,serial=SERIAL,ssd=1,wwn=0x5056432d49443031";
        assert_eq!(drive_of(&[("discard", "ignore"), ("ssd", "true")], false), expected, "its own word counts");
        // What a storage that gives room back has by default, and what its class can say against it.
        let handle: VolumeHandle = "r/pve1/ds/vm-9999-a".parse().unwrap();
        for (given, expected) in [(None, Some("on")), (Some("ignore"), Some("ignore")), (Some("on"), Some("on"))] {
            let context: HashMap<_, _> = given.map(|given| ("discard".to_string(), given.to_string())).into_iter().collect();
            let mut parameters = Parameters::of_context(&context).unwrap();
            parameters.give_back_by_default();
            assert_eq!(parameters.drive(&handle, 1, false).option("discard"), expected, "{given:?}");
        }
    }

    #[test]
    fn parameter_iothread() {
        assert_eq!(drive_of(&[("iothread", "false")], false), format!("backup=0,iothread=0,replicate=0,{END}"));
    }

    #[test]
    fn parameter_backup() {
        assert_eq!(drive_of(&[("backup", "true")], false), format!("backup=1,iothread=1,replicate=0,{END}"));
    }

    #[test]
    fn parameter_disk_iops() {
        assert_eq!(drive_of(&[("diskIOPS", "500")], false), format!("backup=0,iops_rd=500,iops_wr=500,iothread=1,replicate=0,{END}"));
    }

    #[test]
    fn parameter_disk_mbps() {
        assert_eq!(drive_of(&[("diskMBps", "30")], false), format!("backup=0,iothread=1,mbps_rd=30,mbps_wr=30,replicate=0,{END}"));
    }

    #[test]
    fn readonly_is_a_write_protected_drive() {
        assert_eq!(drive_of(&[], true), format!("backup=0,iothread=1,replicate=0,ro=1,{END}"));
    }

    /// What a class with these keys puts into the PV, beside what every class does.
    fn context_of(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        let mut given = map(&[("storage", "ds")]);
        given.extend(map(pairs));
        let (parameters, _) = Parameters::of_class(&given).unwrap();
        let mut context: BTreeMap<String, String> = parameters.volume_context().into_iter().collect();
        for (key, value) in [("backup", "0"), ("contentSource", "none"), ("iothread", "1"), ("replicate", "0")] {
            assert_eq!(context.remove(key).as_deref(), Some(value), "{key}");
        }
        context
    }

    fn expected(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        map(pairs).into_iter().collect()
    }

    #[test]
    fn parameter_storage() {
        assert_eq!(context_of(&[]), expected(&[("storage", "ds")]));
        assert_eq!(context_of(&[("storage", "local-zfs")]), expected(&[("storage", "local-zfs")]));
    }

    #[test]
    fn parameter_storage_format() {
        assert_eq!(context_of(&[("storageFormat", "qcow2")]), expected(&[("storage", "ds"), ("storageFormat", "qcow2")]));
        assert_eq!(drive_of(&[("storageFormat", "qcow2")], false), format!("backup=0,iothread=1,replicate=0,{END}"));
    }

    #[test]
    fn parameter_storage_reserve_and_overcommit() {
        for pairs in [[("storageReserve", "10%")], [("storageOvercommit", "1.5")]] {
            assert_eq!(context_of(&pairs), expected(&[("storage", "ds")]), "of new volumes only");
            assert_eq!(drive_of(&pairs, false), format!("backup=0,iothread=1,replicate=0,{END}"));
        }
    }

    #[test]
    fn parameter_block_size() {
        assert_eq!(context_of(&[("blockSize", "2048")]), expected(&[("storage", "ds"), ("blockSize", "2048")]));
        assert_eq!(drive_of(&[("blockSize", "2048")], false), format!("backup=0,iothread=1,replicate=0,{END}"));
    }

    #[test]
    fn parameter_inode_size() {
        assert_eq!(context_of(&[("inodeSize", "512")]), expected(&[("storage", "ds"), ("inodeSize", "512")]));
        assert_eq!(drive_of(&[("inodeSize", "512")], false), format!("backup=0,iothread=1,replicate=0,{END}"));
    }

    #[test]
    fn parameter_luks_kdf() {
        assert_eq!(context_of(&[("luksKdf", "pbkdf2")]), expected(&[("storage", "ds"), ("luksKdf", "pbkdf2")]));
        assert_eq!(drive_of(&[("luksKdf", "pbkdf2")], false), format!("backup=0,iothread=1,replicate=0,{END}"));
    }

    #[test]
    fn parameter_luks_kdf_memory() {
        assert_eq!(context_of(&[("luksKdfMemory", "32")]), expected(&[("storage", "ds"), ("luksKdfMemory", "32")]));
    }

    #[test]
    fn parameter_luks_kdf_time() {
        assert_eq!(context_of(&[("luksKdfTime", "8")]), expected(&[("storage", "ds"), ("luksKdfTime", "8")]));
    }

    #[test]
    fn parameter_luks_kdf_iterations() {
        let pairs = [("luksKdf", "pbkdf2"), ("luksKdfIterations", "600000")];
        assert_eq!(context_of(&pairs), expected(&[("storage", "ds"), pairs[0], pairs[1]]));
    }

    #[test]
    fn parameter_luks_discards() {
        assert_eq!(context_of(&[("luksDiscards", "true")]), expected(&[("storage", "ds"), ("luksDiscards", "1")]));
    }

    #[test]
    fn each_wrong_value_is_refused_by_name() {
        let cases = [
            ("cache", "none,foo=bar", "writethrough"),
            ("aio", "x", "io_uring"),
            ("ssd", "yes", "\"true\""),
            ("iothread", "2", "\"true\""),
            ("diskIOPS", "-1", "operations"),
            ("diskIOPS", "1e3", "operations"),
            ("diskMBps", "10M", "MiB"),
            ("blockSize", "8192", "4096"),
            ("inodeSize", "100", "power of two"),
            ("storageFormat", "vmdk", "qcow2"),
            ("storageReserve", "100%", "below 100%"),
            ("storageReserve", "10G", "20Gi"),
            ("storageReserve", "-1", "20Gi"),
            ("storageReserve", "99999999Pi", "20Gi"),
            ("storageOvercommit", "0.9", "from 1 to 100"),
            ("storageOvercommit", "101", "from 1 to 100"),
            ("storageOvercommit", "1.234", "two decimals"),
            ("storageOvercommit", "x", "1.5"),
            ("storage", "a,b", "storage"),
            ("replicate", "true", "not supported"),
            ("replicateZones", "a,b", "not supported"),
            ("strictParameters", "maybe", "\"true\""),
            ("Storage", "ds", "known are storage"),
            ("fstype", "btrfs", "supported: ext4, xfs"),
            ("csi.storage.k8s.io/fstype", "ntfs", "supported: ext4, xfs"),
        ];
        for (key, value, right) in cases {
            let mut given = map(&[("storage", "ds")]);
            given.insert(key.into(), value.into());
            let why = Parameters::of_class(&given).unwrap_err();
            assert!(why.contains(key) || key.contains("fstype"), "{why}");
            assert!(why.contains(right), "{key}={value}: {why}");
        }
        assert!(Parameters::of_class(&map(&[])).unwrap_err().contains("storage is missing"));
    }

    #[test]
    fn ext4_inodes_are_no_smaller_than_256_bytes_and_no_larger_than_a_block() {
        let fit = |pairs: &[(&str, &str)], size_bytes: u64| {
            let mut given = map(&[("storage", "ds")]);
            given.extend(map(pairs));
            Parameters::of_class(&given).unwrap().0.fit_ext4(size_bytes).map_err(|error| error.text)
        };
        assert_eq!(fit(&[], 1 << 20), Ok(()));
        assert_eq!(fit(&[("inodeSize", "4096")], 1 << 30), Ok(()));
        assert_eq!(fit(&[("inodeSize", "4096"), ("blockSize", "4096")], 64 << 20), Ok(()));
        for (pairs, size_bytes, right) in [
            (&[("inodeSize", "128")][..], 1 << 30, "from 256"),
            (&[("inodeSize", "2048")], 64 << 20, "which is 1024"),
            (&[("inodeSize", "2048"), ("blockSize", "1024")], 1 << 30, "which is 1024"),
        ] {
            let refused = fit(pairs, size_bytes).unwrap_err();
            assert!(refused.contains("inodeSize") && refused.contains(right), "{refused}");
        }
    }

    #[test]
    fn xfs_has_inode_sizes_and_a_minimum_of_its_own() {
        let fit = |pairs: &[(&str, &str)], size_bytes: u64| {
            let mut given = map(&[("storage", "ds")]);
            given.extend(map(pairs));
            Parameters::of_class(&given).unwrap().0.fit_xfs(size_bytes, false).map_err(|error| (error.code, error.text))
        };
        let pairs: [&[(&str, &str)]; 3] = [&[], &[("blockSize", "1024")], &[("inodeSize", "2048")]];
        for pairs in pairs {
            assert_eq!(fit(pairs, 300 << 20), Ok(()));
        }
        let pairs: [&[(&str, &str)]; 3] =
            [&[("inodeSize", "256")], &[("inodeSize", "4096")], &[("blockSize", "1024"), ("inodeSize", "1024")]];
        for pairs in pairs {
            let (code, text) = fit(pairs, 1 << 30).unwrap_err();
            assert!(code == tonic::Code::InvalidArgument && text.contains("inodeSize"), "{text}");
        }
        let (code, text) = fit(&[], (300 << 20) - 1).unwrap_err();
        assert_eq!(code, tonic::Code::OutOfRange);
        assert!(text.contains("314572800") && text.contains("314572799"), "{text}");
    }

    #[test]
    fn an_encrypted_volume_has_room_for_its_header() {
        let parameters = Parameters::default();
        assert_eq!(parameters.fit_xfs(316 << 20, true).map_err(|error| error.text), Ok(()));
        for refused in [parameters.fit_xfs((316 << 20) - 1, true), Parameters::fit_luks((18 << 20) - 1)] {
            let error = refused.unwrap_err();
            assert!(error.code == tonic::Code::OutOfRange && error.text.contains("16 MiB are the LUKS header's"), "{}", error.text);
        }
        assert!(Parameters::fit_luks(18 << 20).is_ok());
    }

    #[test]
    fn unknown_keys_are_warnings_on_request_and_metadata_passes() {
        let given = map(&[("storage", "ds"), ("foo", "1"), ("strictParameters", "false"), ("csi.storage.k8s.io/pv/name", "x")]);
        let (_, warnings) = Parameters::of_class(&given).unwrap();
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("\"foo\""));
    }

    #[test]
    fn a_context_of_the_reference_driver_is_taken() {
        let raw = map(&[("ssd", "true"), ("backup", "banana"), ("iops_rd", "5"), ("storage.kubernetes.io/csiProvisionerIdentity", "x")]);
        let parameters = Parameters::of_context(&raw).unwrap();
        assert_eq!((parameters.ssd, parameters.backup, parameters.no_iothread), (Some(true), false, false));
        assert!(Parameters::of_context(&map(&[("cache", "none,file=/etc/shadow")])).is_err(), "never into a drive string");
    }

    proptest! {
        #[test]
        fn no_value_smuggles_an_option(key in proptest::sample::select(KNOWN), value in "\\PC{0,20}") {
            let mut given = map(&[("storage", "ds")]);
            given.insert(key.to_string(), value);
            let handle: VolumeHandle = "r/pve1/ds/vm-9999-a".parse().unwrap();
            for parameters in [Parameters::of_class(&given).map(|(p, _)| p), Parameters::of_context(&given)].into_iter().flatten() {
                let drive = parameters.drive(&handle, 1, false);
                prop_assert_eq!(drive.to_string().parse::<Drive>().unwrap(), drive);
            }
        }
    }
}
