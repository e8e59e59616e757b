//! CSI's requests, validated and typed. Past this file there are no raw strings, maps or required-but-optional fields.
//!
//! Pure. Every refusal has a name and a sentence with the field, the value and what would be right. Fields of the request
//! are judged before the publish context (csi-sanity asks for that). Unknown keys of either context are passed over, and
//! legacy values taken: the volume exists, and may be older than we.

mod encryption;

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::path::{Component, Path, PathBuf};

use proto::csi::volume_capability::access_mode::Mode;
use proto::csi::volume_capability::{AccessType, MountVolume};
use proto::csi::{self, VolumeCapability};
use proto::handle::HandleError;
use proto::{VolumeHandle, publish_context, secrets, volume_context};

use crate::identity::{self, Want};
use crate::sys::mount;

pub use encryption::{Encryption, Passphrases};

/// Of a secret without a passphrase so many names are said: a sentence, not a list.
const SECRETS_NAMED: usize = 5;
/// What this node mounts.
const MOUNTED: [&str; 4] = ["ext2", "ext3", "ext4", "xfs"];

/// A volume: its handle, and the serial that its drive carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// `region/zone/storage/disk`.
    pub handle: VolumeHandle,
    /// `csi-` + 16 hex digits.
    pub serial: String,
}

impl Volume {
    fn new(handle: VolumeHandle) -> Self {
        Self { serial: handle.serial(), handle }
    }
}

impl fmt::Display for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.handle.fmt(f)
    }
}

/// How a pod sees the volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// As a folder, with these mount options.
    Filesystem(mount::Options),
    /// As a block device.
    Block,
}

/// What the storage promises of a new volume (publish context `zeroed`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeroed {
    /// It reads as zeros.
    Yes,
    /// It may hold a stranger's old bytes behind a zeroed first 4 KiB.
    No,
    /// Not said (the reference driver attached it): probed as strictly as `Yes`, written as `No`.
    Unknown,
}

/// What this node makes. The ext4 driver mounts and grows ext2 and ext3 too; they are never made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs, reason = "the formats' names")]
pub enum Filesystem {
    #[default]
    Ext4,
    Xfs,
}

impl Filesystem {
    /// The kernel's word for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }
}

/// Options of a new filesystem; `None`: mkfs' own choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FormatOptions {
    /// Which.
    pub filesystem: Filesystem,
    /// StorageClass `blockSize`, bytes.
    pub block_size: Option<u32>,
    /// StorageClass `inodeSize`, bytes.
    pub inode_size: Option<u32>,
}

/// Whether a blank volume may be formatted (decision 3), and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Format {
    /// Made empty by a provisioner.
    May(FormatOptions),
    /// Never; why.
    Never(String),
}

/// NodeStageVolume.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are the request's")]
pub struct StageRequest {
    pub volume: Volume,
    pub staging: PathBuf,
    pub access: Access,
    /// The filesystem that is asked for; `None`: nothing is said, or a raw block device.
    pub fstype: Option<&'static str>,
    pub disk: Want,
    /// `None`: the volume is a plain one.
    pub encryption: Option<Encryption>,
    pub format: Format,
    pub zeroed: Zeroed,
    /// The volume was made larger than its source: a filesystem that cannot be grown is a failure.
    pub grow_required: bool,
    /// Its class does not say `discard: ignore`.
    pub trims: bool,
}

/// NodeUnstageVolume.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are the request's")]
pub struct UnstageRequest {
    pub volume: Volume,
    pub staging: PathBuf,
}

/// NodePublishVolume.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are the request's")]
pub struct PublishRequest {
    pub volume: Volume,
    pub target: PathBuf,
    pub source: PublishSource,
    pub read_only: bool,
    /// SINGLE_NODE_SINGLE_WRITER: one target only.
    pub single_target: bool,
}

/// Where a filesystem is staged, and from which disk it has to be.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "said above")]
pub struct StagedAt {
    pub path: PathBuf,
    pub disk: Want,
}

/// What a target shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PublishSource {
    /// The filesystem staged there.
    Staging(StagedAt),
    /// The block device itself.
    Device(Want),
}

/// NodeUnpublishVolume.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are the request's")]
pub struct UnpublishRequest {
    pub volume: Volume,
    pub target: PathBuf,
}

/// NodeExpandVolume.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are the request's")]
pub struct ExpandRequest {
    pub volume: Volume,
    pub path: PathBuf,
    /// The disk must be at least so large; `None`: whatever it has.
    pub required_bytes: Option<u64>,
}

/// NodeGetVolumeStats.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are the request's")]
pub struct StatsRequest {
    pub volume: Volume,
    pub path: PathBuf,
}

/// Why a request is refused before anything is looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "each says itself in Display")]
pub enum Refusal {
    Missing {
        field: &'static str,
    },
    Handle(HandleError),
    /// Where CSI asks for NOT_FOUND: a volume that cannot exist is not published either.
    NoSuchVolume(HandleError),
    Path {
        field: &'static str,
        given: String,
        wrong: String,
    },
    /// Where CSI asks for NOT_FOUND.
    NotAPublishedPath {
        given: String,
    },
    AccessMode {
        given: i32,
    },
    NoAccessType,
    EmptyPassphrase,
    OnlyPreviousPassphrase,
    /// An encrypted volume must not be put on its disk in plain.
    NoPassphrase,
    Filesystem {
        given: String,
    },
    Context {
        key: &'static str,
        given: String,
        right: &'static str,
    },
    NoDiskNamed,
    OtherSerial {
        given: String,
        expected: String,
    },
    Range {
        field: &'static str,
        given: i64,
        right: String,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { field } => write!(f, "{field} is missing"),
            Self::Handle(error) | Self::NoSuchVolume(error) => write!(f, "{error}"),
            Self::Path { field, given, wrong } => write!(f, "{field} {given:?} {wrong}"),
            Self::NotAPublishedPath { given } => write!(f, "volume_path {given:?} is no path where this node publishes volumes"),
            Self::AccessMode { given } => {
                let name = Mode::try_from(*given).map_or("unknown", |mode| mode.as_str_name());
                write!(f, "access mode {name} ({given}) is not supported: a Proxmox disk is for one node (SINGLE_NODE_…)")
            }
            Self::NoAccessType => write!(f, "volume_capability has neither mount nor block"),
            Self::EmptyPassphrase => write!(f, "the secret {} is empty: an encrypted volume needs a passphrase", secrets::PASSPHRASE),
            Self::OnlyPreviousPassphrase => write!(
                f,
                "the secret has {} without {}: the new passphrase goes under the second name",
                secrets::PASSPHRASE_PREVIOUS,
                secrets::PASSPHRASE
            ),
            Self::NoPassphrase => write!(
                f,
                "the volume is to be encrypted and no secret carries {}: nothing is written in plain; give the class (or the PV) \
                 csi.storage.k8s.io/node-stage-secret-name and -namespace",
                secrets::PASSPHRASE
            ),
            Self::Filesystem { given } => {
                write!(f, "fs_type {given:?} is not supported: this node makes ext4 and xfs, and mounts ext2 and ext3 too")
            }
            Self::Context { key, given, right } => write!(f, "context key {key} is {given:?}: it should be {right}"),
            Self::NoDiskNamed => {
                write!(f, "publish_context names no disk: it should carry DevicePath and lun, from ControllerPublishVolume")
            }
            Self::OtherSerial { given, expected } => {
                write!(f, "publish_context says serial {given:?}, but this volume's serial is {expected:?}: it is another volume's disk")
            }
            Self::Range { field, given, right } => write!(f, "capacity_range.{field} is {given}: {right}"),
        }
    }
}

impl std::error::Error for Refusal {}

/// Folders in which kubelet's paths lie (`--kubelet-dir`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folders(Vec<PathBuf>);

impl Folders {
    /// From absolute paths without `..`.
    ///
    /// # Errors
    /// A sentence about the path that is neither, or that there is none.
    pub fn new(folders: Vec<PathBuf>) -> Result<Self, String> {
        if folders.is_empty() {
            return Err("no kubelet folder is given".to_string());
        }
        match folders.iter().find(|folder| !is_plain(folder) || folder.parent().is_none()) {
            Some(folder) => Err(format!("kubelet folder {} should be an absolute path without '..', and not /", folder.display())),
            None => Ok(Self(folders)),
        }
    }

    /// Below one of them; lexically.
    #[must_use]
    pub fn contain(&self, path: &Path) -> bool {
        self.0.iter().any(|folder| path != folder && path.starts_with(folder))
    }

    /// The folders themselves.
    pub fn iter(&self) -> impl Iterator<Item = &Path> {
        self.0.iter().map(PathBuf::as_path)
    }

    fn path(&self, field: &'static str, given: &str) -> Result<PathBuf, Refusal> {
        let refuse = |wrong: String| Refusal::Path { field, given: shorten(given), wrong };
        let path = PathBuf::from(given);
        if !is_plain(&path) || given.contains('\0') {
            return Err(refuse("should be an absolute path without '..'".into()));
        }
        if !self.contain(&path) {
            let folders: Vec<String> = self.iter().map(|folder| folder.display().to_string()).collect();
            return Err(refuse(format!("is not inside the kubelet folder {} (--kubelet-dir)", folders.join(" or "))));
        }
        Ok(path)
    }
}

/// Absolute, and every part is a name.
fn is_plain(path: &Path) -> bool {
    let mut parts = path.components();
    parts.next() == Some(Component::RootDir) && parts.all(|part| matches!(part, Component::Normal(_)))
}

fn shorten(given: &str) -> String {
    given.chars().take(200).collect()
}

fn present<'a>(field: &'static str, given: &'a str) -> Result<&'a str, Refusal> {
    if given.is_empty() { Err(Refusal::Missing { field }) } else { Ok(given) }
}

fn volume(given: &str) -> Result<Volume, Refusal> {
    given.parse().map(Volume::new).map_err(Refusal::Handle)
}

impl StageRequest {
    /// `passphrases`: what the request's secrets held, taken out of it before.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn new(given: &csi::NodeStageVolumeRequest, passphrases: Option<&Passphrases>, folders: &Folders) -> Result<Self, Refusal> {
        let id = present("volume_id", &given.volume_id)?;
        let staging = present("staging_target_path", &given.staging_target_path)?;
        let capability = given.volume_capability.as_ref().ok_or(Refusal::Missing { field: "volume_capability" })?;
        let volume = volume(id)?;
        let staging = folders.path("staging_target_path", staging)?;
        mode(capability)?;
        let access = access(capability, &given.volume_context)?;
        let fstype = fstype(capability)?;
        let is_ours = given.volume_context.contains_key(volume_context::CONTENT_SOURCE);
        // Whoever names a secret wants encryption: a misspelt key in it must not become plaintext. A raw block volume would be
        // written in plain at once, and be taken for blank when the secret is mended.
        let is_misspelt = passphrases.is_none() && !given.secrets.is_empty();
        let must_be_encrypted = encryption::is_asked_for(&given.volume_context) || (is_misspelt && is_ours && access == Access::Block);
        if passphrases.is_none() && must_be_encrypted {
            return Err(Refusal::NoPassphrase);
        }
        let disk = disk(&volume, &given.publish_context)?;
        let grow_required = is_true(&given.publish_context, publish_context::RESIZE_REQUIRED)
            || is_true(&given.volume_context, volume_context::RESIZE_REQUIRED);
        let zeroed = zeroed(&given.publish_context)?;
        let mut format = format(&given.volume_context, grow_required, fstype);
        if is_misspelt && matches!(format, Format::May(_)) {
            // What is there already is mounted.
            let names: BTreeSet<String> = given.secrets.keys().map(|name| shorten(name)).collect();
            format = Format::Never(format!(
                "its node-stage-secret has {}, and no {}",
                names.into_iter().take(SECRETS_NAMED).collect::<Vec<_>>().join(", "),
                secrets::PASSPHRASE
            ));
        }
        let mut encryption = None;
        if passphrases.is_some() {
            let (options, wrong) = encryption::options(&given.volume_context);
            if let (Format::May(_), Some(why)) = (&format, wrong) {
                format = Format::Never(why);
            }
            if access == Access::Block && !is_ours && matches!(format, Format::May(_)) {
                // Whatever the class says, the reference driver puts a raw block volume on its disk in plain, and what a pod has written there
                // may begin anywhere. Only our own controller's volumes say where they are from.
                format = Format::Never(
                    "the reference driver made it, which never encrypts a raw block volume: a pod may have written there in plain".into(),
                );
            }
            encryption = Some(options);
        }
        let trims = given.volume_context.get(volume_context::DISCARD).is_none_or(|discard| discard != "ignore");
        Ok(Self { volume, staging, access, fstype, disk, encryption, format, zeroed, grow_required, trims })
    }
}

impl UnstageRequest {
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn new(given: &csi::NodeUnstageVolumeRequest, folders: &Folders) -> Result<Self, Refusal> {
        let id = present("volume_id", &given.volume_id)?;
        let staging = present("staging_target_path", &given.staging_target_path)?;
        Ok(Self { volume: volume(id)?, staging: folders.path("staging_target_path", staging)? })
    }
}

impl PublishRequest {
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn new(given: &csi::NodePublishVolumeRequest, folders: &Folders) -> Result<Self, Refusal> {
        let id = present("volume_id", &given.volume_id)?;
        let target = present("target_path", &given.target_path)?;
        let capability = given.volume_capability.as_ref().ok_or(Refusal::Missing { field: "volume_capability" })?;
        let volume = volume(id)?;
        let target = folders.path("target_path", target)?;
        let mode = mode(capability)?;
        let source = match access(capability, &given.volume_context)? {
            Access::Filesystem(_) => {
                let staging = present("staging_target_path", &given.staging_target_path)?;
                let path = folders.path("staging_target_path", staging)?;
                PublishSource::Staging(StagedAt { path, disk: disk(&volume, &given.publish_context)? })
            }
            Access::Block => PublishSource::Device(disk(&volume, &given.publish_context)?),
        };
        Ok(Self {
            volume,
            target,
            source,
            read_only: given.readonly || mode == Mode::SingleNodeReaderOnly,
            single_target: mode == Mode::SingleNodeSingleWriter,
        })
    }
}

impl UnpublishRequest {
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn new(given: &csi::NodeUnpublishVolumeRequest, folders: &Folders) -> Result<Self, Refusal> {
        let id = present("volume_id", &given.volume_id)?;
        let target = present("target_path", &given.target_path)?;
        Ok(Self { volume: volume(id)?, target: folders.path("target_path", target)? })
    }
}

impl ExpandRequest {
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn new(given: &csi::NodeExpandVolumeRequest, folders: &Folders) -> Result<Self, Refusal> {
        let id = present("volume_id", &given.volume_id)?;
        let path = present("volume_path", &given.volume_path)?;
        let volume = id.parse().map(Volume::new).map_err(Refusal::NoSuchVolume)?;
        let required_bytes = given.capacity_range.as_ref().map(required).transpose()?.flatten();
        let path = published(folders, path)?;
        Ok(Self { volume, path, required_bytes })
    }
}

impl StatsRequest {
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn new(given: &csi::NodeGetVolumeStatsRequest, folders: &Folders) -> Result<Self, Refusal> {
        let id = present("volume_id", &given.volume_id)?;
        let path = present("volume_path", &given.volume_path)?;
        let volume = id.parse().map(Volume::new).map_err(Refusal::NoSuchVolume)?;
        Ok(Self { volume, path: published(folders, path)? })
    }
}

/// A path outside our folders is a path where the volume is not (NOT_FOUND, as CSI asks).
fn published(folders: &Folders, path: &str) -> Result<PathBuf, Refusal> {
    folders.path("volume_path", path).map_err(|_| Refusal::NotAPublishedPath { given: shorten(path) })
}

fn required(range: &csi::CapacityRange) -> Result<Option<u64>, Refusal> {
    let bytes = |field, given: i64| {
        u64::try_from(given).map_err(|_| Refusal::Range { field, given, right: "it should be a number of bytes, 0 for none".into() })
    };
    let (required, limit) = (bytes("required_bytes", range.required_bytes)?, bytes("limit_bytes", range.limit_bytes)?);
    if limit != 0 && limit < required {
        let right = format!("it should be at least required_bytes, {required}");
        return Err(Refusal::Range { field: "limit_bytes", given: range.limit_bytes, right });
    }
    Ok((required != 0).then_some(required))
}

fn mode(capability: &VolumeCapability) -> Result<Mode, Refusal> {
    let given = capability.access_mode.as_ref().ok_or(Refusal::Missing { field: "volume_capability.access_mode" })?.mode;
    match Mode::try_from(given) {
        Ok(mode @ (Mode::SingleNodeWriter | Mode::SingleNodeReaderOnly | Mode::SingleNodeSingleWriter | Mode::SingleNodeMultiWriter)) => {
            Ok(mode)
        }
        Ok(Mode::Unknown | Mode::MultiNodeReaderOnly | Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter) | Err(_) => {
            Err(Refusal::AccessMode { given })
        }
    }
}

fn access(capability: &VolumeCapability, context: &HashMap<String, String>) -> Result<Access, Refusal> {
    match &capability.access_type {
        None => Err(Refusal::NoAccessType),
        Some(AccessType::Block(_)) => Ok(Access::Block),
        Some(AccessType::Mount(MountVolume { mount_flags, .. })) => {
            fstype(capability)?;
            // First, so that an explicit flag wins over it.
            let noatime = is_true(context, volume_context::SSD).then_some("noatime");
            Ok(Access::Filesystem(mount::Options::parse(noatime.into_iter().chain(mount_flags.iter().map(String::as_str)))))
        }
    }
}

fn fstype(capability: &VolumeCapability) -> Result<Option<&'static str>, Refusal> {
    let Some(AccessType::Mount(MountVolume { fs_type, .. })) = &capability.access_type else { return Ok(None) };
    if fs_type.is_empty() {
        return Ok(None);
    }
    let known = MOUNTED.into_iter().find(|known| known == fs_type);
    known.map(Some).ok_or_else(|| Refusal::Filesystem { given: shorten(fs_type) })
}

/// The disk that the publish context describes, ours or the reference driver's.
fn disk(volume: &Volume, context: &HashMap<String, String>) -> Result<Want, Refusal> {
    let text = |key: &'static str| context.get(key).map(String::as_str).filter(|text| !text.is_empty());
    let serial = text(publish_context::SERIAL);
    if let Some(given) = serial.filter(|given| *given != volume.serial) {
        return Err(Refusal::OtherSerial { given: shorten(given), expected: volume.serial.clone() });
    }
    let lun = match text(publish_context::LUN) {
        None => None,
        Some(given) => {
            let right = "the slot's number, 1 to 29";
            let wrong = || Refusal::Context { key: publish_context::LUN, given: shorten(given), right };
            Some(given.parse().ok().filter(|lun| proto::LUN_RANGE.contains(lun)).ok_or_else(wrong)?)
        }
    };
    let size_bytes = match text(publish_context::SIZE_BYTES) {
        None => None,
        Some(given) => {
            let wrong = |_| Refusal::Context { key: publish_context::SIZE_BYTES, given: shorten(given), right: "a number of bytes" };
            Some(given.parse().map_err(wrong)?)
        }
    };
    let device_path = text(publish_context::DEVICE_PATH);
    let wwid = device_path.and_then(|path| path.rsplit('/').next()).and_then(|name| name.strip_prefix("wwn-")).and_then(identity::wwid);
    if serial.is_none() && lun.is_none() && wwid.is_none() {
        return Err(Refusal::NoDiskNamed);
    }
    Ok(Want { serial: volume.serial.clone(), serial_promised: serial.is_some(), wwid, lun, size_bytes })
}

fn zeroed(context: &HashMap<String, String>) -> Result<Zeroed, Refusal> {
    match context.get(publish_context::ZEROED).map(String::as_str) {
        None | Some("") => Ok(Zeroed::Unknown),
        Some("1") => Ok(Zeroed::Yes),
        Some("0") => Ok(Zeroed::No),
        Some(given) => Err(Refusal::Context { key: publish_context::ZEROED, given: shorten(given), right: "1 or 0" }),
    }
}

/// Decision 3: only a volume that a provisioner made, and made empty, is ever formatted. A bad mkfs option is no refusal
/// here: the volume may have its filesystem for years.
fn format(context: &HashMap<String, String>, resize_required: bool, fstype: Option<&str>) -> Format {
    let source = context.get(volume_context::CONTENT_SOURCE).map(String::as_str);
    if !context.contains_key(volume_context::PROVISIONER_IDENTITY) && source.is_none() {
        return Format::Never("it is a static volume (its volume context carries no provisioner's mark)".into());
    }
    match source {
        None | Some("none") => (),
        Some(source) => return Format::Never(format!("it was made from a {}", shorten(source))),
    }
    if resize_required {
        return Format::Never("it was made from another volume (resizeRequired)".into());
    }
    let filesystem = match fstype {
        None | Some("ext4") => Filesystem::Ext4,
        Some("xfs") => Filesystem::Xfs,
        Some(other) => return Format::Never(format!("fs_type is {other}, which is mounted where it is found, and never made")),
    };
    let number = |key: &'static str| match context.get(key).map(|text| text.trim()) {
        None | Some("" | "0") => Ok(None),
        Some(text) => text
            .parse::<u32>()
            .map(Some)
            .map_err(|_| Format::Never(format!("{key} is {:?}: it should be a number of bytes", shorten(text)))),
    };
    match (number(volume_context::BLOCK_SIZE), number(volume_context::INODE_SIZE)) {
        (Ok(block_size), Ok(inode_size)) => Format::May(FormatOptions { filesystem, block_size, inode_size }),
        (Err(never), _) | (_, Err(never)) => never,
    }
}

/// Go's `strconv.ParseBool`, as the reference driver reads its own values; anything else is false, as there.
fn is_true(context: &HashMap<String, String>, key: &str) -> bool {
    matches!(context.get(key).map(String::as_str), Some("1" | "t" | "T" | "true" | "TRUE" | "True"))
}

#[cfg(test)]
mod tests;
