//! A call that is refused or failed: a gRPC code, and one sentence that says what, where, and what to do.
//!
//! The one total match from Proxmox's meanings to codes is here. What the sidecars make of a code: `Unavailable` and
//! `Aborted` say "may still happen, ask again"; `ResourceExhausted` at CreateVolume lets the scheduler choose another
//! node; everything else is final for this attempt, and repeated with back-off.

use std::fmt;

use tonic::Code;

use crate::pve::{self, Meaning};

/// What an RPC answers instead of its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// The gRPC code.
    pub code: Code,
    /// The sentence.
    pub text: String,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.code, self.text)
    }
}

impl std::error::Error for Error {}

/// Constructors by code, so that a refusal reads as a sentence where it is made.
macro_rules! by_code {
    ($($name:ident $code:ident,)*) => {
        impl Error {
            $(
                /// An error of this code.
                pub fn $name(text: impl Into<String>) -> Self {
                    Self { code: Code::$code, text: text.into() }
                }
            )*
        }
    };
}

by_code! {
    invalid InvalidArgument,
    not_found NotFound,
    already_exists AlreadyExists,
    precondition FailedPrecondition,
    denied PermissionDenied,
    aborted Aborted,
    exhausted ResourceExhausted,
    out_of_range OutOfRange,
    unavailable Unavailable,
    internal Internal,
}

impl Error {
    /// The same with what was being done in front: `attach fsn1/pve1/lvm/vm-9999-x to VM 101: …`.
    #[must_use]
    pub fn during(self, step: &str) -> Self {
        Self { code: self.code, text: format!("{step}: {}", self.text) }
    }
}

impl From<pve::Error> for Error {
    fn from(error: pve::Error) -> Self {
        let meaning = error.meaning();
        let advice = advice(meaning);
        let text = if advice.is_empty() { error.to_string() } else { format!("{error} ({advice})") };
        Self { code: code(meaning), text }
    }
}

/// The code of each meaning.
#[must_use]
pub fn code(meaning: Meaning) -> Code {
    match meaning {
        Meaning::Unauthenticated
        | Meaning::NoSuchStorage
        | Meaning::StorageNotHere
        | Meaning::VolumeInUse
        | Meaning::BaseInUse
        | Meaning::BootDisk
        | Meaning::Protected
        | Meaning::NoSuchHost
        | Meaning::VmidTaken
        | Meaning::NoSuchEndpoint => Code::FailedPrecondition,
        Meaning::Forbidden => Code::PermissionDenied,
        Meaning::Unreachable
        | Meaning::HostDown
        | Meaning::OutcomeUnknown
        | Meaning::StorageOffline
        | Meaning::Busy
        | Meaning::VmLocked
        | Meaning::NoQuorum
        | Meaning::NoSuchVm
        | Meaning::StillBusyInGuest
        | Meaning::QemuHangs
        | Meaning::LeakedSlot
        | Meaning::NoSuchTask
        | Meaning::TaskKilled => Code::Unavailable,
        Meaning::DigestChanged => Code::Aborted,
        Meaning::NoSuchVolume => Code::NotFound,
        Meaning::VolumeExists => Code::AlreadyExists,
        Meaning::NoSpace => Code::ResourceExhausted,
        Meaning::TooLarge | Meaning::Shrinking => Code::OutOfRange,
        Meaning::HotplugFailed | Meaning::BadRequest | Meaning::Other => Code::Internal,
    }
}

/// What a person can do about it; empty where Proxmox's words say it all.
fn advice(meaning: Meaning) -> &'static str {
    match meaning {
        Meaning::Unauthenticated => "check token_id and token_secret, or username and password, in the config file",
        Meaning::Forbidden => "give the token's role this privilege, on this path; a token with privilege separation needs its own ACL",
        Meaning::Unreachable => "the call is repeated until the endpoint answers",
        Meaning::HostDown => "the Proxmox node behind the API does not answer; repeated until it does",
        Meaning::OutcomeUnknown => "the next call looks what became of it",
        Meaning::NoSuchVm => "the VM moved or is gone; the next call looks again",
        Meaning::NoSuchHost => "no Proxmox node of that name in this cluster",
        Meaning::NoSuchStorage => "check the storage's name in the StorageClass and in Datacenter > Storage",
        Meaning::StorageNotHere => "enable the storage for this node in Datacenter > Storage",
        Meaning::StorageOffline => "the storage should be active on this node and is not",
        Meaning::NoSpace => "free some space or use another storage",
        Meaning::VolumeInUse => "something still has the volume open",
        Meaning::BaseInUse => "delete the linked clones first",
        Meaning::Busy => "Proxmox is busy with another operation there; repeated",
        Meaning::VmLocked => "a backup, snapshot or migration holds the VM; repeated until it ends",
        Meaning::NoQuorum => "the cluster has no quorum; repeated until it has",
        Meaning::DigestChanged => "the VM's config changes all the time; repeated",
        Meaning::LeakedSlot => "QEMU still has leftovers of an earlier drive in this slot; a restart of the VM clears them",
        Meaning::StillBusyInGuest => "the guest did not let the disk's controller go; the removal is repeated",
        Meaning::QemuHangs => "QEMU of this VM does not answer",
        Meaning::BootDisk => "the slot holds the VM's boot disk",
        Meaning::Protected => "take the protection off: qm set VMID --protection 0",
        Meaning::Shrinking => "a volume cannot be made smaller",
        Meaning::TaskKilled => "the task was cut short; the next call looks what became of it",
        Meaning::NoSuchEndpoint => "is the url Proxmox VE 7 or later?",
        Meaning::VmidTaken => "another VM or container has this number",
        Meaning::NoSuchVolume => "the volume is not on this storage; look at the storage's content in Proxmox",
        Meaning::VolumeExists => "a volume of that name is there already",
        Meaning::TooLarge => "the storage takes no volume of this size",
        Meaning::HotplugFailed => "the change is taken back and repeated; look at the VM's log and at the task",
        Meaning::NoSuchTask => "Proxmox has forgotten the task; the next call looks what became of it",
        Meaning::BadRequest => "Proxmox does not take what was asked for; look at the parameters of the StorageClass",
        Meaning::Other => "look at the task and the system log of the Proxmox node; repeated",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pve::{Cause, Error as PveError};

    #[test]
    fn proxmoxs_words_stay_and_the_next_step_follows() {
        let cause = Cause::Task { upid: "UPID:pve1:x:".into(), exit: "VM is locked (backup)".into() };
        let error = Error::from(PveError { call: "POST /nodes/pve1/qemu/101/config".into(), cause });
        assert_eq!(error.code, Code::Unavailable);
        for part in ["POST /nodes/pve1/qemu/101/config", "UPID:pve1:x:", "VM is locked (backup)", "repeated"] {
            assert!(error.text.contains(part), "{} lacks {part}", error.text);
        }
    }

    #[test]
    fn a_missing_privilege_keeps_proxmoxs_name_for_it() {
        let cause =
            Cause::Task { upid: "UPID:a:".into(), exit: "403 Permission check failed (/storage/ds1, Datastore.AllocateSpace)".into() };
        let error = Error::from(PveError { call: "PUT /x".into(), cause });
        assert_eq!(error.code, Code::PermissionDenied);
        assert!(error.text.contains("(/storage/ds1, Datastore.AllocateSpace)"), "{}", error.text);
    }
}
