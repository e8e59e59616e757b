//! What can go wrong while acting: volume, what was being done, step, and the cause in numbers.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use disk::luks;

use crate::request::Volume;
use crate::sys::{self, dm, mount};
use crate::{identity, plan, probe};

/// A call that did not end well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// `stage`, `publish`, …
    pub doing: &'static str,
    /// The volume id.
    pub volume: String,
    /// The step that failed; empty where the decision itself was to refuse.
    pub step: &'static str,
    /// Why; boxed: errors are rare, and answers small.
    pub cause: Box<Cause>,
}

/// Why a call did not end well.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "each says itself in Display")]
pub enum Cause {
    Refused(plan::Refusal),
    Disk(identity::Refusal),
    Sys(sys::Error),
    Mount(mount::Refused),
    /// The kernel refuses the filesystem itself.
    Damaged {
        refused: Box<mount::Refused>,
        /// `e2fsck -f`, `xfs_repair`.
        tool: &'static str,
        /// `sdb`, `dm-0`.
        device: Box<str>,
        /// The Kubernetes node.
        node: Box<str>,
    },
    /// The kernel does not take the label that we add to a mount on Talos, or may not.
    Label {
        refused: Box<mount::Refused>,
        label: &'static str,
    },
    Probe(probe::Error),
    /// No geometry of a filesystem fits: mkfs options, or a disk too small.
    Geometry(String),
    /// The disk is below the filesystem's minimum; both numbers.
    TooSmall(String),
    /// No keyslot opens; a sentence.
    WrongPassphrase(String),
    /// Keyslots need more memory than there is, or more work than a call may take; both numbers.
    KeyslotCost(String),
    /// The LUKS header cannot be used; what is wrong with it.
    Luks(String),
    /// It could not be read.
    LuksRead(String),
    /// The kernel refused a mapping.
    Mapping(dm::Refused),
    /// The kernel has no dm-crypt.
    NoCrypt(dm::Missing),
    /// A mapping cannot be grown without its key.
    NoKey,
    KdfBusy {
        waited: Duration,
    },
    Outside {
        real: PathBuf,
    },
    NoDisk {
        waited: Duration,
        why: String,
    },
    StaysOffline {
        disk: String,
    },
    OtherDiskNow {
        disk: String,
    },
    SizeNotSeen {
        waited: Duration,
        size_bytes: u64,
        required_bytes: u64,
    },
    NotGrown {
        blocks: u64,
        wanted_blocks: u64,
        block_size: u32,
    },
    /// The kernel has made the filesystem read-only, or grows it no more for an error on record; health's sentence.
    InTrouble(String),
    StillHeld {
        waited: Duration,
        disk: String,
        by: String,
    },
    NotBlankAnyMore {
        surface: String,
    },
    Crowded {
        waited: Duration,
        /// The disks that are at it.
        by: String,
    },
    /// A disk without serial, which several volumes may take for theirs.
    BeingMounted {
        waited: Duration,
        disk: String,
    },
    NoEnd {
        turns: usize,
    },
    Stopped {
        zeroed_bytes: u64,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: ", self.doing, self.volume)?;
        if !self.step.is_empty() {
            write!(f, "{}: ", self.step)?;
        }
        self.cause.fmt(f)
    }
}

impl std::error::Error for Error {}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(refusal) => refusal.fmt(f),
            Self::Disk(refusal) => refusal.fmt(f),
            Self::Sys(error) => error.fmt(f),
            Self::Mount(refused) => refused.fmt(f),
            Self::Damaged { refused, tool, device, node } => write!(
                f,
                "{refused}; nothing is repaired by itself. While the pod waits, the disk stays attached: `kubectl debug node/{node} -it \
                 --profile=sysadmin --image=debian:13`, and there `apt-get update && apt-get install -y e2fsprogs xfsprogs` and \
                 `{tool} /dev/{device}` (docs/repair.md)"
            ),
            Self::Label { refused, label } => write!(
                f,
                "{refused}; the mount was to have {label}, which is added on Talos: `context=` (empty) among the StorageClass' mountOptions leaves \
                 it out, another label there takes its place"
            ),
            Self::Probe(error) => error.fmt(f),
            Self::Geometry(why)
            | Self::TooSmall(why)
            | Self::WrongPassphrase(why)
            | Self::KeyslotCost(why)
            | Self::Luks(why)
            | Self::LuksRead(why)
            | Self::InTrouble(why) => f.write_str(why),
            Self::Mapping(refused) => refused.fmt(f),
            Self::NoCrypt(missing) => missing.fmt(f),
            Self::NoKey => f.write_str(
                "the volume is encrypted, and its mapping cannot be grown without its key: give the class (or the PV) \
                 csi.storage.k8s.io/node-expand-secret-name and -namespace; without them it grows when it is staged the next time",
            ),
            Self::KdfBusy { waited } => write!(
                f,
                "other volumes' keys have been derived for {} s, and one at a time is allowed (each may take all of the pod's memory); this \
                 call may be repeated",
                waited.as_secs()
            ),
            Self::Outside { real } => write!(f, "the path leads to {}, outside the kubelet folder (--kubelet-dir)", real.display()),
            Self::NoDisk { waited, why } => write!(f, "the disk did not appear within {} s: {why}", waited.as_secs()),
            Self::StaysOffline { disk } => write!(f, "{disk} stays offline though it was set running: detach and attach the volume"),
            Self::OtherDiskNow { disk } => write!(f, "{disk} has become another disk meanwhile"),
            Self::SizeNotSeen { waited, size_bytes, required_bytes } => write!(
                f,
                "the disk has {size_bytes} bytes after {} s of rescanning, {required_bytes} bytes are required: is the volume grown on Proxmox?",
                waited.as_secs()
            ),
            Self::NotGrown { blocks, wanted_blocks, block_size } => write!(
                f,
                "the filesystem has {blocks} blocks of {block_size} bytes after growing, the disk has room for {wanted_blocks} blocks"
            ),
            Self::StillHeld { waited, disk, by } => {
                write!(f, "{disk} is still in use after {} s, {by}: detaching it now would lose data", waited.as_secs())
            }
            Self::NotBlankAnyMore { surface } => write!(f, "the disk was blank when probed, and holds {surface} now; it was not formatted"),
            Self::Crowded { waited, by } => write!(
                f,
                "the disks of other volumes are probed or formatted, and so many at one time are allowed, for {} s: {by}; this call \
                 may be repeated; where it stays so, those disks do not answer: look at their storage on Proxmox",
                waited.as_secs()
            ),
            Self::BeingMounted { waited, disk } => write!(
                f,
                "{disk} has no serial, and another volume, whose it may be, has been mounting it for {} s; this call may be repeated; where it \
                 stays so, that disk does not answer: look at its storage on Proxmox",
                waited.as_secs()
            ),
            Self::NoEnd { turns } => write!(f, "still not done after {turns} steps"),
            Self::Stopped { zeroed_bytes } => write!(
                f,
                "the node agent is ending, and the format was stopped after it had zeroed {zeroed_bytes} bytes; the disk is marked as \
                 unfinished, and the next call formats it again"
            ),
        }
    }
}

macro_rules! from {
    ($($from:ty => $variant:ident),* $(,)?) => { $(impl From<$from> for Cause {
        fn from(from: $from) -> Self { Self::$variant(from) }
    })* };
}
from! {
    plan::Refusal => Refused, identity::Refusal => Disk, sys::Error => Sys, mount::Refused => Mount, probe::Error => Probe,
    dm::Refused => Mapping, dm::Missing => NoCrypt,
}

impl From<luks::Error> for Cause {
    fn from(from: luks::Error) -> Self {
        let sentence = from.to_string();
        match from {
            luks::Error::WrongPassphrase { .. } => Self::WrongPassphrase(sentence),
            luks::Error::KeyslotMemory { .. } | luks::Error::KeyslotWork { .. } | luks::Error::Allocation { .. } => {
                Self::KeyslotCost(sentence)
            }
            luks::Error::Read { .. } => Self::LuksRead(sentence),
            luks::Error::Range { .. } => Self::Geometry(sentence),
            luks::Error::DeviceTooSmall { .. } => Self::TooSmall(sentence),
            _ => Self::Luks(sentence),
        }
    }
}

/// Remembers the step for an error on the way out.
pub(crate) trait AtStep<T> {
    /// `step`: what was being tried, in words.
    fn at(self, doing: &'static str, volume: &Volume, step: &'static str) -> Result<T, Error>;
}

impl<T, E: Into<Cause>> AtStep<T> for Result<T, E> {
    fn at(self, doing: &'static str, volume: &Volume, step: &'static str) -> Result<T, Error> {
        self.map_err(|cause| Error { doing, volume: volume.to_string(), step, cause: Box::new(cause.into()) })
    }
}
