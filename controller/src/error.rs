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

/// What our own sentences ask of people, where the code says only "ask again".
const WANTS_A_PERSON: &[&str] =
    &["restart the VM", "restart VM", "restart it", "qm unlock", "fencedNodes", "give the token's role", "to a person", "by hand"];

impl Error {
    /// Whether it lasts until a person does something: then it is told to people, too (see `kube::events`).
    #[must_use]
    pub fn needs_person(&self) -> bool {
        match self.code {
            // Config, privileges, another holder, a full storage: nothing of it heals by itself.
            Code::FailedPrecondition
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::InvalidArgument
            | Code::OutOfRange
            | Code::ResourceExhausted
            | Code::AlreadyExists
            | Code::Unimplemented
            | Code::DataLoss => true,
            // Repeated, and most often done then.
            Code::Unavailable | Code::Aborted | Code::Internal | Code::Unknown | Code::DeadlineExceeded => {
                WANTS_A_PERSON.iter().any(|words| self.text.contains(words))
            }
            // What is gone is gone.
            Code::Ok | Code::NotFound | Code::Cancelled => false,
        }
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
        Meaning::Forbidden => {
            "give the token's role this privilege, on this path (pveum role modify ROLE --append 1 --privs PRIVILEGE); a token with privilege \
             separation needs its own ACL"
        }
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
    use crate::pve::known::{KNOWN, RowError};
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

    /// Row, code, whether the outcome is unknown; in the order of the table of reference/proxmox-api.md. "In background"
    /// (Unavailable, Aborted) keeps the provisioner at the same node, and the attacher at the same attachment; everything
    /// that may be done without our knowing must be among those.
    const CODES: &[(u32, Code, bool)] = &[
        (1, Code::FailedPrecondition, false),
        (2, Code::FailedPrecondition, false),
        (3, Code::PermissionDenied, false),
        (4, Code::PermissionDenied, false),
        (5, Code::PermissionDenied, false),
        (6, Code::Internal, false),
        (7, Code::FailedPrecondition, false),
        (8, Code::FailedPrecondition, false),
        (9, Code::FailedPrecondition, false),
        (10, Code::FailedPrecondition, false),
        (11, Code::FailedPrecondition, false),
        (12, Code::Unavailable, false),
        (13, Code::FailedPrecondition, false),
        (14, Code::Unavailable, false),
        (15, Code::Unavailable, true),
        (16, Code::Unavailable, false),
        (17, Code::Unavailable, false),
        (18, Code::FailedPrecondition, false),
        (19, Code::FailedPrecondition, false),
        (20, Code::FailedPrecondition, false),
        (21, Code::Unavailable, false),
        (22, Code::Unavailable, false),
        (23, Code::AlreadyExists, false),
        (24, Code::AlreadyExists, false),
        (25, Code::AlreadyExists, false),
        (26, Code::AlreadyExists, false),
        (27, Code::Internal, false),
        (28, Code::Internal, false),
        (29, Code::Internal, false),
        (30, Code::Internal, false),
        (31, Code::ResourceExhausted, false),
        (32, Code::ResourceExhausted, false),
        (33, Code::OutOfRange, false),
        (34, Code::Unavailable, false),
        (35, Code::Unavailable, false),
        (36, Code::Unavailable, true),
        (37, Code::Unavailable, false),
        (38, Code::NotFound, false),
        (39, Code::Internal, false),
        (40, Code::Internal, false),
        (41, Code::Internal, false),
        (42, Code::FailedPrecondition, false),
        (43, Code::NotFound, false),
        (44, Code::FailedPrecondition, false),
        (45, Code::FailedPrecondition, false),
        (46, Code::Unavailable, false),
        (47, Code::Unavailable, false),
        (48, Code::Aborted, false),
        (49, Code::Aborted, false),
        (50, Code::NotFound, false),
        (51, Code::NotFound, false),
        (52, Code::NotFound, false),
        (53, Code::NotFound, false),
        (54, Code::Internal, false),
        (55, Code::Internal, false),
        (56, Code::Internal, false),
        (57, Code::Internal, false),
        (58, Code::Unavailable, false),
        (59, Code::Unavailable, false),
        (60, Code::Unavailable, false),
        (61, Code::FailedPrecondition, false),
        (62, Code::FailedPrecondition, false),
        (63, Code::FailedPrecondition, false),
        (64, Code::Aborted, false),
        (65, Code::Internal, false),
        (66, Code::Internal, false),
        (67, Code::Internal, false),
        (68, Code::Internal, false),
        (69, Code::OutOfRange, false),
        (70, Code::PermissionDenied, false),
        (71, Code::Internal, false),
        (72, Code::Unavailable, false),
        (73, Code::PermissionDenied, false),
        (74, Code::Unavailable, true),
        (75, Code::Internal, false),
        (76, Code::FailedPrecondition, false),
        (77, Code::FailedPrecondition, false),
        (78, Code::NotFound, false),
    ];

    /// Rows with a second text that means another thing than the first: the one that the code is not of.
    const SECOND_TEXTS: &[(u32, &str)] = &[(13, "Temporary failure"), (69, "disk 'scsi9' does not exist")];

    #[test]
    fn each_of_the_78_texts_has_a_code_and_a_sentence_that_keeps_it() {
        assert_eq!(CODES.iter().map(|(row, ..)| *row).collect::<Vec<_>>(), (1..=78).collect::<Vec<_>>());
        for row in KNOWN.iter().filter(|row| row.0 > 0) {
            let (number, meaning) = (row.0, row.4);
            let error = Error::from(row.error());
            if !SECOND_TEXTS.iter().any(|(second, text)| *second == number && row.2.contains(text)) {
                let expected = CODES.iter().find(|(of, ..)| *of == number).map(|(_, code, unknown)| (*code, *unknown));
                assert_eq!(Some((error.code, meaning.is_outcome_unknown())), expected, "row {number}: {error}");
            }
            // Proxmox's own words, the call, the task's id, the next step.
            let mut parts = vec![row.error().call, row.2.trim().into(), advice(meaning).into()];
            parts.extend(row.3.iter().map(|(_, why)| why.trim().into()));
            parts.extend(row.1.is_none().then(|| "UPID:pve1:0:0:0:x::u:".to_string()));
            for part in parts {
                assert!(!part.is_empty() && error.text.contains(&part), "row {number}: {:?} lacks {part:?}", error.text);
            }
        }
    }

    /// Of each of the 78: told to people or not.
    #[test]
    fn what_needs_a_person_is_told_and_what_heals_is_not() {
        let told = |row: u32| KNOWN.iter().filter(|known| known.0 == row).all(|known| Error::from(known.error()).needs_person());
        // No privilege, no such storage, no space, protection; a leaked slot, which a restart of the VM clears.
        for row in [2, 3, 10, 31] {
            assert!(told(row), "row {row}");
        }
        for (error, expected) in [
            (Error::from(PveError { call: "x".into(), cause: Cause::NotSent("no".into()) }), false),
            (Error::from(PveError { call: "x".into(), cause: Cause::NoAnswer("no".into()) }), false),
            (Error::unavailable("VM is locked (backup); if no such task runs: qm unlock 101"), true),
            (Error::internal("QEMU has leftovers; restart the VM"), true),
            (Error::aborted("another call is in flight"), false),
            (Error::not_found("no such VM"), false),
        ] {
            assert_eq!(error.needs_person(), expected, "{error}");
        }
        // Every text that we choose the code of is decided, and most of those that are repeated are not told.
        let repeated = KNOWN.iter().filter(|row| code(row.4) == Code::Unavailable);
        let (told, all) = repeated.fold((0, 0), |(told, all), row| (told + usize::from(Error::from(row.error()).needs_person()), all + 1));
        assert!(told * 4 < all, "{told} of {all}");
    }

    /// What may have been done without our knowing must not look final to the sidecars.
    #[test]
    fn an_unknown_outcome_is_never_final() {
        for row in KNOWN.iter().filter(|row| row.4.is_outcome_unknown()) {
            assert!(matches!(code(row.4), Code::Unavailable | Code::Aborted), "row {}", row.0);
        }
    }
}
