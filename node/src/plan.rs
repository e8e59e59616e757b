//! Decides the next step, from the request and what is seen now.
//!
//! Pure: no I/O, no clock. Called again after every step, so a crash is only a pause and a repeated call only a look.
//! Invariants: a step that destroys data comes only from a surface read as `Blank` or as our own `Unfinished` format, and
//! only where the volume may be formatted at all. An encrypted volume is never written in plain: what is in it is looked
//! for, made and mounted inside its mapping only.

#![warn(clippy::wildcard_enum_match_arm)]

use std::fmt;
use std::path::PathBuf;

use crate::request::{Access, ExpandRequest, Filesystem, Format, FormatOptions, PublishRequest, PublishSource, StageRequest};

/// What is mounted at a path of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mount {
    /// Nothing.
    None,
    /// This volume's filesystem.
    Ours,
    /// A filesystem whose disk is no longer there: the hypervisor took it away while it was mounted.
    Gone,
    /// A filesystem of another disk that nothing uses: what a call of long ago, or another driver, has left; what.
    Stale(String),
    /// Anything else; what.
    Stranger(String),
}

/// The volume's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disk {
    /// Not there (yet).
    NotYet,
    /// There, but the kernel refuses I/O: as the reference driver leaves a disk that it unstaged.
    Offline,
    /// There; and whether it refuses writes.
    Ready {
        #[allow(missing_docs, reason = "said above")]
        read_only: bool,
    },
}

/// What dm-crypt has over the volume's disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mapping {
    /// Nothing.
    None,
    /// The open volume: its table is what its LUKS header says.
    Open {
        /// The disk is larger than it.
        short: bool,
    },
    /// Ours, and nothing can be in it: it was cut short before it had a table, or its disk is gone.
    Leftover,
    /// Anything else; what.
    Strange(String),
}

/// What is on the disk, or inside its mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Surface {
    /// Not looked at.
    Unread,
    /// Proven to hold nothing.
    Blank,
    /// A format of this very volume that was cut short.
    Unfinished,
    /// A filesystem that the ext4 driver mounts.
    Ext(String),
    /// An xfs.
    Xfs,
    /// A LUKS header.
    Luks,
    /// Anything else; what.
    Other(String),
}

/// A mounted filesystem against its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Growth {
    /// It fills the disk, or must not be grown (read-only).
    Full,
    /// The disk is larger.
    Room,
    /// Growing was asked for; what is left is no whole block group, or growing was not required and failed.
    Tried,
}

/// For stage.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "named by their types")]
pub struct StageSeen {
    pub mount: Mount,
    pub disk: Disk,
    pub mapping: Mapping,
    pub surface: Surface,
    /// Of the mapping.
    pub inside: Surface,
    pub growth: Growth,
}

/// Stage's deeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StageStep {
    /// Take away what is mounted at the staging path from a disk that is gone, or from another disk and unused.
    Unmount,
    /// Wait for the disk, asking the SCSI hosts to look.
    FindDisk,
    /// Take the disk up again.
    SetRunning,
    /// Read what is on it.
    Probe,
    /// Destroys what is on the disk: makes it a LUKS volume.
    Encrypt {
        #[allow(missing_docs, reason = "as for MakeFilesystem")]
        unfinished: bool,
    },
    /// Make the mapping.
    Open,
    /// Take away a mapping that holds nothing.
    CloseLeftover,
    /// Let the mapping have all of the disk.
    GrowMapping,
    /// Read what is inside the mapping.
    ProbeInside,
    /// Destroys what is on the disk, or inside its mapping where the volume is encrypted. `unfinished`: something of ours is already there, so nothing reads as zeros for sure.
    MakeFilesystem {
        #[allow(missing_docs, reason = "the volume's mkfs options")]
        options: FormatOptions,
        #[allow(missing_docs, reason = "said above")]
        unfinished: bool,
    },
    /// Mount what was found at the staging path, by this driver.
    Mount(Filesystem),
    /// Grow the filesystem to the disk.
    Grow,
}

/// What is at a target path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Nothing.
    Absent,
    /// A folder, nothing mounted on it.
    Folder,
    /// A file, nothing mounted on it.
    File,
    /// This volume, as it was to be shown.
    Shows {
        #[allow(missing_docs, reason = "the mount refuses writes")]
        read_only: bool,
    },
    /// A mount whose disk is gone.
    ShowsGone,
    /// A device node whose disk is gone, as a raw block volume is shown by: nothing is lost by taking it away, and its number may be another
    /// disk's by now.
    Stale,
    /// Something else; what.
    Other(String),
}

/// What publish shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// What is mounted at the staging path.
    Staged(Mount),
    /// The disk itself, or the mapping over it.
    Device(Disk),
    /// A disk that this driver encrypted, and no mapping over it.
    NotOpen,
}

/// For publish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishSeen {
    /// What is to be shown.
    pub source: Source,
    /// What is to be shown is read-only itself (mount option `ro`, a drive that refuses writes): so is what shows it.
    pub is_source_read_only: bool,
    /// What is at the target path.
    pub target: Target,
    /// Where else this volume is published on this node.
    pub other_targets: Vec<PathBuf>,
}

/// Publish's deeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublishStep {
    /// Wait for the disk.
    FindDisk,
    /// Take the disk up again.
    SetRunning,
    /// Make the target folder.
    MakeFolder,
    /// Make the target file.
    MakeFile,
    /// Take away a device node whose disk is gone.
    Unmount,
    /// Show the source at the target.
    Bind,
}

/// Unpublish's deeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnpublishStep {
    /// Take the newest mount away.
    Unmount,
    /// Remove the empty folder.
    RemoveFolder,
    /// Remove the empty file.
    RemoveFile,
}

/// For unstage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnstageSeen {
    /// What is mounted at the staging path.
    pub mount: Mount,
    /// A mapping of this volume is there, and is shown to no pod.
    pub mapped: bool,
    /// The disk is still in use, in this mount namespace or another, by itself or by what was made of it: it must not be detached.
    pub held: bool,
    /// The disk takes no I/O, and has not been asked to in this call.
    pub offline: bool,
    /// It was asked to, and takes none: what is left of a disk that vanished.
    pub dead: bool,
    /// The staging path is an empty folder.
    pub empty_folder: bool,
}

/// Unstage's deeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnstageStep {
    /// Take the disk up again: what was written may still reach it.
    SetRunning,
    /// Take the newest mount away.
    Unmount,
    /// Take the mapping away, once nobody uses it.
    Close,
    /// Have the kernel forget the disk that takes no I/O.
    Delete,
    /// Wait until nobody holds the disk.
    AwaitRelease,
    /// Remove the empty folder.
    RemoveFolder,
}

/// What is at a volume path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shown {
    /// Not this volume; what instead.
    NotOurs(String),
    /// This volume's filesystem.
    Filesystem(Growth),
    /// This volume's block device.
    Device,
}

/// For expand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpandSeen {
    /// What is at the volume path.
    pub shown: Shown,
    /// The disk's size as the kernel knows it.
    pub size_bytes: u64,
    /// There is a mapping, and the disk is larger than it.
    pub short: bool,
}

/// Expand's deeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpandStep {
    /// Make the kernel read the disk's size again, and wait until it is enough.
    AwaitSize {
        #[allow(missing_docs, reason = "the size to wait for")]
        required_bytes: u64,
    },
    /// Let the mapping have all of the disk.
    GrowMapping,
    /// Grow the filesystem to the disk.
    Grow,
}

/// A decision not to act.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "each says itself in Display")]
pub enum Refusal {
    OtherMount { what: String },
    DiskGone,
    StagedAsFilesystem,
    HoldsOther { what: String },
    NeverFormat { why: String },
    NeverFinish { why: String },
    ReadOnlyBlank,
    NoPassphrase,
    InPlain { what: String },
    StrangeMapping { what: String },
    NotOpen,
    NotStaged,
    TargetTaken { what: String },
    OtherMode { read_only: bool },
    SecondTarget { at: PathBuf },
    NotPublishedHere { what: String },
    NoGrowing { fstype: String },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OtherMount { what } => write!(f, "the path is taken by something that is not this volume: {what}; nothing was touched"),
            Self::DiskGone => f.write_str(
                "the volume is mounted here from a disk that is no longer there: its writes are lost; unpublish and unstage it first",
            ),
            Self::StagedAsFilesystem => {
                f.write_str("the volume is staged as a filesystem here, so it cannot be staged as a raw block device")
            }
            Self::HoldsOther { what } => write!(f, "the disk holds {what}; it was neither mounted nor formatted"),
            Self::NeverFormat { why } => write!(f, "the disk holds nothing, and this node will not format it: {why}"),
            Self::NeverFinish { why } => {
                write!(f, "the disk holds a format of this volume that was cut short, and this node will not finish it: {why}")
            }
            Self::ReadOnlyBlank => f.write_str("the disk holds nothing and refuses writes, so it cannot be formatted"),
            Self::NoPassphrase => write!(
                f,
                "the volume is encrypted with LUKS, and no secret carries {}: give the class (or the PV) \
                 csi.storage.k8s.io/node-stage-secret-name and -namespace; nothing was touched",
                proto::secrets::PASSPHRASE
            ),
            Self::InPlain { what } => write!(
                f,
                "a secret carries {}, and the volume is not encrypted: {what} is on the disk itself; nothing was touched; use a class without \
                 node-stage-secret for it",
                proto::secrets::PASSPHRASE
            ),
            Self::StrangeMapping { what } => write!(f, "the disk is in use by device-mapper: {what}; nothing was touched"),
            Self::NotOpen => f.write_str("the volume is encrypted and not open on this node: it has to be staged first"),
            Self::NotStaged => f.write_str("the volume is not staged at staging_target_path"),
            Self::TargetTaken { what } => write!(f, "target_path is taken: {what}; nothing was touched"),
            Self::OtherMode { read_only } => write!(
                f,
                "the volume is already published at target_path, {}; unpublish it first",
                if *read_only { "read-only, but writable is asked for" } else { "writable, but read-only is asked for" }
            ),
            Self::SecondTarget { at } => {
                write!(f, "the volume is for a single writer (SINGLE_NODE_SINGLE_WRITER) and already published at {}", at.display())
            }
            Self::NoGrowing { fstype } => {
                write!(
                    f,
                    "the volume holds {fstype}, and this version grows ext4 (and ext2 and ext3) and xfs only; its disk has its new size, grow the filesystem by hand"
                )
            }
            Self::NotPublishedHere { what } => write!(f, "the volume is not at volume_path: {what}"),
        }
    }
}

/// The next step of staging; `None`: it is staged.
///
/// # Errors
/// What must not be done, and why.
pub fn next_stage_step(want: &StageRequest, seen: &StageSeen) -> Result<Option<StageStep>, Refusal> {
    match (&seen.mount, &seen.disk, &want.access) {
        (Mount::Stranger(what), Disk::NotYet | Disk::Offline | Disk::Ready { .. }, Access::Filesystem(_) | Access::Block) => {
            Err(Refusal::OtherMount { what: what.clone() })
        }
        (Mount::Stale(what), Disk::NotYet | Disk::Offline | Disk::Ready { .. }, Access::Block) => {
            Err(Refusal::OtherMount { what: what.clone() })
        }
        (Mount::Stale(_), Disk::NotYet | Disk::Offline | Disk::Ready { .. }, Access::Filesystem(_))
        | (Mount::Gone, Disk::NotYet | Disk::Offline | Disk::Ready { .. }, Access::Filesystem(_) | Access::Block) => {
            Ok(Some(StageStep::Unmount))
        }
        (Mount::Ours, Disk::NotYet | Disk::Offline | Disk::Ready { .. }, Access::Block) => Err(Refusal::StagedAsFilesystem),
        (Mount::None | Mount::Ours, Disk::NotYet, Access::Filesystem(_)) | (Mount::None, Disk::NotYet, Access::Block) => {
            Ok(Some(StageStep::FindDisk))
        }
        (Mount::None | Mount::Ours, Disk::Offline, Access::Filesystem(_)) | (Mount::None, Disk::Offline, Access::Block) => {
            Ok(Some(StageStep::SetRunning))
        }
        (Mount::Ours, Disk::Ready { .. }, Access::Filesystem(_)) => mounted(want, seen),
        (Mount::None, Disk::Ready { read_only }, Access::Filesystem(_) | Access::Block) => match &want.encryption {
            None => plain(want, seen, *read_only),
            Some(_) => encrypted(want, seen, *read_only),
        },
    }
}

/// What is left to do for a volume that is mounted.
fn mounted(want: &StageRequest, seen: &StageSeen) -> Result<Option<StageStep>, Refusal> {
    match (&want.encryption, &seen.mapping) {
        (None, Mapping::None) | (Some(_), Mapping::Open { short: false }) => Ok(match seen.growth {
            Growth::Room => Some(StageStep::Grow),
            Growth::Full | Growth::Tried => None,
        }),
        (Some(_), Mapping::Open { short: true }) => Ok(Some(StageStep::GrowMapping)),
        (None, Mapping::Open { .. } | Mapping::Leftover | Mapping::Strange(_)) => Err(Refusal::NoPassphrase),
        (Some(_), Mapping::None) => Err(Refusal::InPlain { what: "the filesystem that is mounted".into() }),
        (Some(_), Mapping::Leftover) => Err(Refusal::StrangeMapping { what: "the mapping that is mounted has lost its table".into() }),
        (Some(_), Mapping::Strange(what)) => Err(Refusal::StrangeMapping { what: what.clone() }),
    }
}

/// Towards a mount of what is on the disk itself.
fn plain(want: &StageRequest, seen: &StageSeen, read_only: bool) -> Result<Option<StageStep>, Refusal> {
    match (&seen.mapping, &want.access, &seen.surface) {
        (Mapping::Open { .. } | Mapping::Leftover | Mapping::Strange(_), _, _) | (Mapping::None, _, Surface::Luks) => {
            Err(Refusal::NoPassphrase)
        }
        (Mapping::None, Access::Block, _) => Ok(None),
        (Mapping::None, Access::Filesystem(_), surface) => from_surface(want, surface, StageStep::Probe, read_only).map(Some),
    }
}

/// Towards a mapping, and a mount of what is in it. The only place from which [`StageStep::Encrypt`] comes.
fn encrypted(want: &StageRequest, seen: &StageSeen, read_only: bool) -> Result<Option<StageStep>, Refusal> {
    match (&seen.mapping, &want.access) {
        (Mapping::Strange(what), _) => Err(Refusal::StrangeMapping { what: what.clone() }),
        (Mapping::Leftover, _) => Ok(Some(StageStep::CloseLeftover)),
        (Mapping::Open { short: true }, _) => Ok(Some(StageStep::GrowMapping)),
        (Mapping::Open { short: false }, Access::Block) => Ok(None),
        (Mapping::Open { short: false }, Access::Filesystem(_)) => {
            from_surface(want, &seen.inside, StageStep::ProbeInside, read_only).map(Some)
        }
        (Mapping::None, _) => match (&seen.surface, &want.format) {
            (Surface::Unread, _) => Ok(Some(StageStep::Probe)),
            (Surface::Luks, _) => Ok(Some(StageStep::Open)),
            (Surface::Ext(what), _) => Err(Refusal::InPlain { what: what.clone() }),
            (Surface::Xfs, _) => Err(Refusal::InPlain { what: "xfs".into() }),
            (Surface::Other(what), _) => Err(Refusal::HoldsOther { what: what.clone() }),
            (Surface::Blank | Surface::Unfinished, format) => {
                may_format(format, &seen.surface, read_only)?;
                Ok(Some(StageStep::Encrypt { unfinished: seen.surface == Surface::Unfinished }))
            }
        },
    }
}

/// Whether a blank or unfinished surface may be made into something, and into what.
fn may_format<'a>(format: &'a Format, surface: &Surface, read_only: bool) -> Result<&'a FormatOptions, Refusal> {
    match (format, read_only) {
        (Format::Never(why), _) if *surface == Surface::Unfinished => Err(Refusal::NeverFinish { why: why.clone() }),
        (Format::Never(why), _) => Err(Refusal::NeverFormat { why: why.clone() }),
        (Format::May(_), true) => Err(Refusal::ReadOnlyBlank),
        (Format::May(options), false) => Ok(options),
    }
}

/// Towards a mount, by what is on the disk or inside its mapping. The only place from which [`StageStep::MakeFilesystem`] comes.
fn from_surface(want: &StageRequest, surface: &Surface, probe: StageStep, read_only: bool) -> Result<StageStep, Refusal> {
    match surface {
        Surface::Unread => Ok(probe),
        Surface::Ext(_) => Ok(StageStep::Mount(Filesystem::Ext4)),
        // What is there is mounted, whatever was asked for: a volume is never formatted for being of another kind.
        Surface::Xfs => Ok(StageStep::Mount(Filesystem::Xfs)),
        Surface::Luks => Err(Refusal::HoldsOther { what: "a LUKS volume inside the LUKS volume".into() }),
        Surface::Other(what) => Err(Refusal::HoldsOther { what: what.clone() }),
        Surface::Blank | Surface::Unfinished => {
            let options = *may_format(&want.format, surface, read_only)?;
            Ok(StageStep::MakeFilesystem { options, unfinished: *surface == Surface::Unfinished })
        }
    }
}

/// The next step of unstaging; `None`: it is unstaged.
///
/// # Errors
/// The path shows something that is not this volume.
pub fn next_unstage_step(seen: &UnstageSeen) -> Result<Option<UnstageStep>, Refusal> {
    match &seen.mount {
        Mount::Stranger(what) | Mount::Stale(what) => Err(Refusal::OtherMount { what: what.clone() }),
        Mount::None | Mount::Ours | Mount::Gone if seen.offline => Ok(Some(UnstageStep::SetRunning)),
        Mount::Ours | Mount::Gone => Ok(Some(UnstageStep::Unmount)),
        Mount::None if seen.mapped => Ok(Some(UnstageStep::Close)),
        // Before the disk is given up: whoever holds it may have written what has not reached it.
        Mount::None if seen.held => Ok(Some(UnstageStep::AwaitRelease)),
        Mount::None if seen.dead => Ok(Some(UnstageStep::Delete)),
        Mount::None => Ok(seen.empty_folder.then_some(UnstageStep::RemoveFolder)),
    }
}

/// The next step of publishing; `None`: it is published.
///
/// # Errors
/// What must not be done, and why.
pub fn next_publish_step(want: &PublishRequest, seen: &PublishSeen) -> Result<Option<PublishStep>, Refusal> {
    match &seen.target {
        Target::Shows { read_only } if *read_only == want.read_only || (*read_only && seen.is_source_read_only) => return Ok(None),
        Target::Shows { read_only } => return Err(Refusal::OtherMode { read_only: *read_only }),
        Target::ShowsGone => return Err(Refusal::DiskGone),
        Target::Other(what) => return Err(Refusal::TargetTaken { what: what.clone() }),
        Target::Absent | Target::Folder | Target::File | Target::Stale => (),
    }
    if let (true, Some(at)) = (want.single_target, seen.other_targets.first()) {
        return Err(Refusal::SecondTarget { at: at.clone() });
    }
    match &seen.source {
        Source::Staged(Mount::None) => return Err(Refusal::NotStaged),
        Source::Staged(Mount::Gone) => return Err(Refusal::DiskGone),
        Source::Staged(Mount::Stranger(what) | Mount::Stale(what)) => return Err(Refusal::OtherMount { what: what.clone() }),
        Source::NotOpen => return Err(Refusal::NotOpen),
        Source::Device(Disk::NotYet) => return Ok(Some(PublishStep::FindDisk)),
        Source::Device(Disk::Offline) => return Ok(Some(PublishStep::SetRunning)),
        Source::Staged(Mount::Ours) | Source::Device(Disk::Ready { .. }) => (),
    }
    match (&want.source, &seen.target) {
        (PublishSource::Staging(_), Target::Absent) => Ok(Some(PublishStep::MakeFolder)),
        (PublishSource::Device(_), Target::Absent) => Ok(Some(PublishStep::MakeFile)),
        (PublishSource::Staging(_), Target::Folder) | (PublishSource::Device(_), Target::File) => Ok(Some(PublishStep::Bind)),
        (PublishSource::Staging(_), Target::File) => Err(Refusal::TargetTaken { what: "a file, where a folder is wanted".into() }),
        (PublishSource::Device(_), Target::Folder) => Err(Refusal::TargetTaken { what: "a folder, where a file is wanted".into() }),
        (PublishSource::Staging(_) | PublishSource::Device(_), Target::Stale) => Ok(Some(PublishStep::Unmount)),
        (PublishSource::Staging(_) | PublishSource::Device(_), Target::Shows { .. } | Target::ShowsGone | Target::Other(_)) => Ok(None),
    }
}

/// The next step of unpublishing; `None`: nothing is left at the target path.
///
/// # Errors
/// The path shows something that is not this volume.
pub fn next_unpublish_step(seen: &Target) -> Result<Option<UnpublishStep>, Refusal> {
    match seen {
        Target::Absent => Ok(None),
        Target::Folder => Ok(Some(UnpublishStep::RemoveFolder)),
        Target::File => Ok(Some(UnpublishStep::RemoveFile)),
        Target::Shows { .. } | Target::ShowsGone | Target::Stale => Ok(Some(UnpublishStep::Unmount)),
        Target::Other(what) => Err(Refusal::TargetTaken { what: what.clone() }),
    }
}

/// The next step of expanding; `None`: it has the size.
///
/// # Errors
/// The volume is not there.
pub fn next_expand_step(want: &ExpandRequest, seen: &ExpandSeen) -> Result<Option<ExpandStep>, Refusal> {
    match (&seen.shown, want.required_bytes.filter(|required| *required > seen.size_bytes)) {
        (Shown::NotOurs(what), _) => Err(Refusal::NotPublishedHere { what: what.clone() }),
        (Shown::Filesystem(_) | Shown::Device, Some(required_bytes)) => Ok(Some(ExpandStep::AwaitSize { required_bytes })),
        (Shown::Filesystem(_) | Shown::Device, None) if seen.short => Ok(Some(ExpandStep::GrowMapping)),
        (Shown::Filesystem(Growth::Room), None) => Ok(Some(ExpandStep::Grow)),
        (Shown::Filesystem(Growth::Full | Growth::Tried) | Shown::Device, None) => Ok(None),
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod walk;
