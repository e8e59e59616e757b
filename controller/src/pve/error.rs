//! What Proxmox says when it refuses, kept word for word, and what it means.
//!
//! Proxmox has no codes worth the name: "exists", "missing", "locked" are all HTTP 500 (or an exit status of a task) and
//! told apart by text. The texts are those of qemu-server, pve-storage, pve-common and pve-http-server, versions 7 to 9.
//! Pure. Knows no CSI.

use std::collections::BTreeMap;
use std::fmt;

/// A call that did not succeed.
#[derive(Debug, Clone)]
pub struct Error {
    /// Method and path: `POST /nodes/pve1/qemu/101/config`.
    pub call: String,
    /// What happened.
    pub cause: Cause,
}

/// How a call did not succeed.
#[derive(Debug, Clone)]
pub enum Cause {
    /// Nothing was sent: no address, no connection, no trust.
    NotSent(String),
    /// It was sent and no answer came: done, not done, or still being done.
    NoAnswer(String),
    /// An answer above 399.
    Answer {
        /// HTTP status; 595 to 599 are the proxy's.
        status: u16,
        /// The first line of the message; in old versions all there is.
        reason: String,
        /// The body's `message`, since pve-http-server 5.2.0.
        message: String,
        /// Parameter → text, on 400.
        errors: BTreeMap<String, String>,
    },
    /// A task that ended badly.
    Task {
        /// Its id.
        upid: String,
        /// Its exit status.
        exit: String,
    },
    /// A task whose end was not seen.
    TaskUnknown {
        /// Its id.
        upid: String,
        /// Why.
        why: String,
    },
    /// An answer that makes no sense to us.
    Shape(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.call, self.words())
    }
}

impl std::error::Error for Error {}

/// What an error means for the one who called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Meaning {
    /// Who are you.
    Unauthenticated,
    /// A privilege is missing; Proxmox names it.
    Forbidden,
    /// No connection, or the certificate is not trusted.
    Unreachable,
    /// The host behind the API is not there.
    HostDown,
    /// Sent, and the outcome is unknown.
    OutcomeUnknown,
    /// The VM is not on that node, or is gone.
    NoSuchVm,
    /// No such Proxmox node.
    NoSuchHost,
    /// No such storage in the cluster.
    NoSuchStorage,
    /// The storage is disabled or not for that node.
    StorageNotHere,
    /// The storage should be there and is not active.
    StorageOffline,
    /// The volume is not there.
    NoSuchVolume,
    /// A volume of that name is there.
    VolumeExists,
    /// The storage is full.
    NoSpace,
    /// The size is beyond what the storage takes.
    TooLarge,
    /// The volume is open somewhere.
    VolumeInUse,
    /// Linked clones stand on it.
    BaseInUse,
    /// The storage or the VM is busy with another operation.
    Busy,
    /// The VM carries a lock (backup, snapshot, migration).
    VmLocked,
    /// The cluster has lost its quorum.
    NoQuorum,
    /// The VM's config changed since it was read.
    DigestChanged,
    /// QEMU still has the leftovers of an earlier drive in that slot.
    LeakedSlot,
    /// The guest did not let go.
    StillBusyInGuest,
    /// QEMU does not answer.
    QemuHangs,
    /// Another trouble while plugging or unplugging.
    HotplugFailed,
    /// The slot holds the boot disk.
    BootDisk,
    /// The VM is protected.
    Protected,
    /// A disk cannot be made smaller.
    Shrinking,
    /// A VM or container of that number is there.
    VmidTaken,
    /// The task is not known (any more).
    NoSuchTask,
    /// The task was killed, or its end was not written.
    TaskKilled,
    /// Our request is wrong in Proxmox's eyes.
    BadRequest,
    /// The endpoint is not there in this version.
    NoSuchEndpoint,
    /// Anything else.
    Other,
}

impl Meaning {
    /// Whether it may have been done, or may still be: it must be looked for before anything else is tried.
    #[must_use]
    pub fn is_outcome_unknown(self) -> bool {
        matches!(self, Self::OutcomeUnknown | Self::TaskKilled)
    }
}

impl Error {
    /// Proxmox's own words, on one line, with the status or the task's id.
    #[must_use]
    pub fn words(&self) -> String {
        match &self.cause {
            Cause::NotSent(why) => why.clone(),
            Cause::NoAnswer(why) => format!("{why} (sent, outcome unknown)"),
            Cause::Answer { status, reason, message, errors } => {
                let mut text = if message.trim().is_empty() { reason.trim() } else { message.trim() }.replace('\n', " ");
                for (name, why) in errors {
                    text.push_str(&format!(" {name}: {}", why.trim().replace('\n', " ")));
                }
                if text.is_empty() {
                    text = "no reason given".into();
                }
                format!("{status} {text}")
            }
            Cause::Task { upid, exit } => format!("task {upid} ended with: {}", exit.trim()),
            Cause::TaskUnknown { upid, why } => format!("task {upid}: {why} (outcome unknown)"),
            Cause::Shape(what) => format!("answer not understood: {what}"),
        }
    }

    /// One total match over what Proxmox is known to say.
    #[must_use]
    pub fn meaning(&self) -> Meaning {
        match &self.cause {
            Cause::NotSent(_) => Meaning::Unreachable,
            Cause::NoAnswer(_) | Cause::TaskUnknown { .. } => Meaning::OutcomeUnknown,
            Cause::Shape(_) => Meaning::Other,
            Cause::Answer { status, reason, message, errors } => {
                let mut text = format!("{reason}\n{message}");
                for (name, why) in errors {
                    text.push_str(&format!("\n{name}: {why}"));
                }
                of_status(*status, &text)
            }
            // Exceptions of a handler keep their code in front of the exit status.
            Cause::Task { exit, .. } => match exit.split_once(' ') {
                Some(("403", rest)) => of_status(403, rest),
                Some(("400", rest)) => of_status(400, rest),
                _ => of_status(500, exit),
            },
        }
    }
}

fn of_status(status: u16, text: &str) -> Meaning {
    match status {
        401 => Meaning::Unauthenticated,
        403 => Meaning::Forbidden,
        595 => Meaning::HostDown,
        // The peer's certificate was refused before anything was sent on.
        596 if text.contains("certificate verify failed") => Meaning::HostDown,
        596..=599 | 502..=504 => Meaning::OutcomeUnknown,
        501 | 506 => of_text(text).unwrap_or(Meaning::NoSuchEndpoint),
        400 => of_text(text).unwrap_or(if text.contains("hotplug problem") { Meaning::HotplugFailed } else { Meaning::BadRequest }),
        500 => of_text(text).unwrap_or(if text.contains("hotplug problem") { Meaning::HotplugFailed } else { Meaning::Other }),
        _ => Meaning::Other,
    }
}

/// Texts, most telling first. `All` of the words of a row must be there.
const TEXTS: &[(&[&str], Meaning)] = &[
    (&["Permission check failed"], Meaning::Forbidden),
    (&["checksum mismatch"], Meaning::DigestChanged),
    (&["detected modified configuration"], Meaning::DigestChanged),
    (&["VM is locked ("], Meaning::VmLocked),
    (&["duplicate property 'throttle-drive-"], Meaning::LeakedSlot),
    (&["Duplicate nodes with node-name='drive-"], Meaning::LeakedSlot),
    // Machines below 10.0, so all of Proxmox VE 8.
    (&["Duplicate ID 'drive-", "for drive"], Meaning::LeakedSlot),
    // Up to qemu-server 8.3.6, which still asks what became of device_add.
    (&["Failed to get \"write\" lock"], Meaning::VolumeInUse),
    (&["still busy in guest?"], Meaning::StillBusyInGuest),
    (&["error on hot-unplugging device"], Meaning::StillBusyInGuest),
    (&["can't unplug bootdisk"], Meaning::BootDisk),
    (&["qmp command", "got timeout"], Meaning::QemuHangs),
    (&["protection mode enabled"], Meaning::Protected),
    (&["no quorum"], Meaning::NoQuorum),
    (&["pve cluster filesystem not online"], Meaning::NoQuorum),
    (&["shrinking disks is not supported"], Meaning::Shrinking),
    (&["disk image '", "' already exists"], Meaning::VolumeExists),
    (&["lvcreate '", "already exists in volume group"], Meaning::VolumeExists),
    (&["zfs error: cannot create", "dataset already exists"], Meaning::VolumeExists),
    (&["rbd create '", "File exists"], Meaning::VolumeExists),
    (&["insufficient free space"], Meaning::NoSpace),
    (&["not enough free space"], Meaning::NoSpace),
    (&["out of space"], Meaning::NoSpace),
    (&["No space left on device"], Meaning::NoSpace),
    (&["image size is too large"], Meaning::TooLarge),
    (&["File too large"], Meaning::TooLarge),
    (&["logical volume", "in use."], Meaning::VolumeInUse),
    (&["Logical volume", "in use."], Meaning::VolumeInUse),
    (&["dataset is busy"], Meaning::VolumeInUse),
    (&["still has watchers"], Meaning::VolumeInUse),
    (&["still in use by linked clones"], Meaning::BaseInUse),
    (&["volume is still in use (snapshot?)"], Meaning::VolumeInUse),
    (&["cfs-lock '", "got lock request timeout"], Meaning::Busy),
    (&["can't lock file '", "got timeout"], Meaning::Busy),
    (&["-locked command timed out"], Meaning::OutcomeUnknown),
    // Before what its reason may contain: a directory that does not exist is no missing volume, nor a missing storage.
    (&["unable to activate storage"], Meaning::StorageOffline),
    (&["volume_size_info on '", "no format"], Meaning::NoSuchVolume),
    (&["Failed to find logical volume"], Meaning::NoSuchVolume),
    (&["no such logical volume"], Meaning::NoSuchVolume),
    (&["zvol device link for '", "found after"], Meaning::NoSuchVolume),
    (&["dataset does not exist"], Meaning::NoSuchVolume),
    (&["error opening image", "(2) No such file or directory"], Meaning::NoSuchVolume),
    (&["volume '", "' does not exist"], Meaning::NoSuchVolume),
    // zfs over iSCSI: neither the target nor a look at it has it.
    (&["Could not find lu_name for zvol"], Meaning::NoSuchVolume),
    (&["volume rbd:", "does not exist"], Meaning::NoSuchVolume),
    (&["vmid: VM ", " already exists"], Meaning::VmidTaken),
    (&["No such storage."], Meaning::NoSuchStorage),
    (&["storage '", "' does not exist"], Meaning::NoSuchStorage),
    (&["storage '", "' is disabled"], Meaning::StorageNotHere),
    (&["storage '", "' is not available on node"], Meaning::StorageNotHere),
    (&["storage '", "' is not online"], Meaning::StorageOffline),
    (&["Configuration file '", "' does not exist"], Meaning::NoSuchVm),
    // The resolver does not answer: that says nothing of the node.
    (&["hostname lookup '", "Temporary failure"], Meaning::HostDown),
    (&["hostname lookup '", "failed"], Meaning::NoSuchHost),
    (&["no such cluster node"], Meaning::NoSuchHost),
    (&["no such task"], Meaning::NoSuchTask),
    (&["unexpected status"], Meaning::TaskKilled),
    (&["received interrupt"], Meaning::TaskKilled),
    (&["interrupted by signal"], Meaning::TaskKilled),
    (&["unable to get last line from task log"], Meaning::TaskKilled),
];

fn of_text(text: &str) -> Option<Meaning> {
    TEXTS.iter().find(|(words, _)| words.iter().all(|word| text.contains(word))).map(|(_, meaning)| *meaning)
}

#[cfg(test)]
mod tests {
    use super::super::known::{KNOWN, RowError, answer, task};
    use super::*;

    #[test]
    fn each_known_text_has_its_meaning() {
        for row in KNOWN {
            assert_eq!(row.error().meaning(), row.4, "row {}: {}", row.0, row.error());
        }
        let rows: std::collections::BTreeSet<u32> = KNOWN.iter().map(|row| row.0).collect();
        assert!((1..=78).all(|row| rows.contains(&row)), "a row of the table is not tried");
    }

    #[test]
    fn proxmoxs_words_and_the_task_are_kept() {
        let error = answer(400, "Parameter verification failed.", &[("scsi1", "hotplug problem - x\n")]);
        assert_eq!(error.to_string(), "GET /x: 400 Parameter verification failed. scsi1: hotplug problem - x");
        let error = task("VM is locked (backup)");
        assert!(error.to_string().contains("UPID:pve1") && error.to_string().contains("VM is locked (backup)"));
        // The message is used where there is one; the reason is its first line.
        let cause = Cause::Answer { status: 500, reason: "first".into(), message: "first\nsecond\n".into(), errors: BTreeMap::new() };
        assert_eq!(Error { call: "GET /x".into(), cause }.to_string(), "GET /x: 500 first second");
    }

    /// ceph's client says "(2) No such file or directory" of its keyring and config, too: that is no look at the image.
    #[test]
    fn only_a_look_at_the_volume_itself_says_that_it_is_not_there() {
        let keyring = "rbd error: rbd: couldn't connect to the cluster! unable to find a keyring on /etc/pve/priv/ceph/rbd.keyring: (2) No such \
                       file or directory";
        assert_eq!(task(keyring).meaning(), Meaning::Other);
        assert_eq!(task("rbd error: rbd: error opening image vm-9999-a: (2) No such file or directory").meaning(), Meaning::NoSuchVolume);
        let gone = "unable to activate storage 'x' - directory '/mnt/x' does not exist or is unreachable";
        assert_eq!(task(gone).meaning(), Meaning::StorageOffline);
    }
}
