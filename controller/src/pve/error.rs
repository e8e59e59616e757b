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
    (&["volume rbd:", "does not exist"], Meaning::NoSuchVolume),
    (&["vmid: VM ", " already exists"], Meaning::VmidTaken),
    (&["No such storage."], Meaning::NoSuchStorage),
    (&["storage '", "' does not exist"], Meaning::NoSuchStorage),
    (&["storage '", "' is disabled"], Meaning::StorageNotHere),
    (&["storage '", "' is not available on node"], Meaning::StorageNotHere),
    (&["storage '", "' is not online"], Meaning::StorageOffline),
    (&["Configuration file '", "' does not exist"], Meaning::NoSuchVm),
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
    use super::*;

    fn answer(status: u16, reason: &str, errors: &[(&str, &str)]) -> Error {
        let errors = errors.iter().map(|(k, v)| ((*k).to_string(), (*v).to_string())).collect();
        let cause = Cause::Answer { status, reason: reason.into(), message: String::new(), errors };
        Error { call: "GET /x".into(), cause }
    }

    fn task(exit: &str) -> Error {
        Error { call: "POST /x".into(), cause: Cause::Task { upid: "UPID:pve1:0:0:0:x::u:".into(), exit: exit.into() } }
    }

    const VERIFY: &str = "Parameter verification failed.";

    type Row = (u32, Option<u16>, &'static str, &'static [(&'static str, &'static str)], Meaning);

    /// What the daemons of Proxmox VE 8.2 to 9.2 say, numbered: HTTP status (none: a task's exit status), text, errors by
    /// parameter. Those that the recordings in tests/tests/transcripts/ hold are as recorded, the others as in the sources.
    const KNOWN: &[Row] = &[
        (1, Some(401), "No ticket", &[], Meaning::Unauthenticated),
        (2, Some(401), "Authentication failed!", &[], Meaning::Unauthenticated),
        (3, Some(403), "Permission check failed (/vms/100, VM.Config.Disk)", &[], Meaning::Forbidden),
        (4, Some(403), "Permission check failed (user != root@pam)", &[], Meaning::Forbidden),
        (
            5,
            Some(403),
            "Permission check failed (URI '/access/ticket' not available with API token, need proper ticket.",
            &[],
            Meaning::Forbidden,
        ),
        (6, Some(400), VERIFY, &[("x", "type check ('integer') failed - got 'abc'")], Meaning::BadRequest),
        (7, Some(501), "Method 'GET /x' not implemented", &[], Meaning::NoSuchEndpoint),
        (8, Some(501), "Unexpected content for method 'DELETE'", &[], Meaning::NoSuchEndpoint),
        (9, Some(501), "chunked transfer encoding not supported", &[], Meaning::NoSuchEndpoint),
        (10, Some(506), "upload 'Content-Type 'text/plain' not implemented", &[], Meaning::NoSuchEndpoint),
        (11, Some(501), "for data too large", &[], Meaning::NoSuchEndpoint),
        (12, Some(500), "Configuration file 'nodes/pve1/qemu-server/888.conf' does not exist", &[], Meaning::NoSuchVm),
        (
            13,
            Some(500),
            "hostname lookup 'x' failed - failed to get address info for: x: Name or service not known",
            &[],
            Meaning::NoSuchHost,
        ),
        (14, Some(595), "No route to host", &[], Meaning::HostDown),
        (14, Some(595), "Connection refused", &[], Meaning::HostDown),
        (15, Some(596), "Connection timed out", &[], Meaning::OutcomeUnknown),
        (16, Some(596), "error:0A000086:SSL routines::certificate verify failed", &[], Meaning::HostDown),
        (17, Some(595), "Connection refused", &[], Meaning::HostDown),
        (18, Some(500), "storage 'x' does not exist", &[], Meaning::NoSuchStorage),
        (18, Some(400), VERIFY, &[("storage", "No such storage.")], Meaning::NoSuchStorage),
        (19, Some(500), "storage 'x' is disabled", &[], Meaning::StorageNotHere),
        (20, Some(500), "storage 'x' is not available on node 'pve1'", &[], Meaning::StorageNotHere),
        (21, Some(500), "storage 'x' is not online", &[], Meaning::StorageOffline),
        (
            22,
            Some(500),
            "unable to activate storage 'x' - directory is expected to be a mount point but is not mounted: '/m'",
            &[],
            Meaning::StorageOffline,
        ),
        (23, Some(500), "disk image '/d/images/9999/vm-9999-a.raw' already exists", &[], Meaning::VolumeExists),
        (
            24,
            Some(500),
            "lvcreate 'vg/vm-9999-a' error:   Logical Volume \"vm-9999-a\" already exists in volume group \"vg\"",
            &[],
            Meaning::VolumeExists,
        ),
        (25, Some(500), "zfs error: cannot create 'pool/vm-9999-a': dataset already exists", &[], Meaning::VolumeExists),
        (26, Some(500), "rbd create 'vm-9999-a' error: rbd: create error: (17) File exists", &[], Meaning::VolumeExists),
        (27, Some(500), "unable to parse volume filename 'vm-9999-c'", &[], Meaning::Other),
        (28, Some(500), "illegal name 'x' - should be 'vm-9999-*'", &[], Meaning::Other),
        (29, Some(500), "unable to parse lvm volume name 'x'", &[], Meaning::Other),
        (30, Some(400), VERIFY, &[("format", "different storage formats (raw != qcow2)")], Meaning::BadRequest),
        (
            31,
            Some(500),
            "lvcreate 'vg/x' error:   Volume group \"vg\" has insufficient free space (10 extents): 256 required.",
            &[],
            Meaning::NoSpace,
        ),
        (32, Some(500), "zfs error: cannot create 'pool/x': out of space", &[], Meaning::NoSpace),
        (33, Some(500), "unable to create image: qemu-img: /x: The image size is too large for file format 'raw'", &[], Meaning::TooLarge),
        (34, Some(500), "can't lock file '/var/lock/pve-manager/pve-storage-ds1' - got timeout", &[], Meaning::Busy),
        (35, None, "cfs-lock 'storage-x' error: got lock request timeout", &[], Meaning::Busy),
        (36, None, "'storage-x'-locked command timed out - aborting", &[], Meaning::OutcomeUnknown),
        (37, Some(500), "cfs-lock 'storage-x' error: no quorum!", &[], Meaning::NoQuorum),
        (37, Some(500), "cluster not ready - no quorum?", &[], Meaning::NoQuorum),
        (38, Some(500), "volume_size_info on 's:9999/x.raw' failed - no format", &[], Meaning::NoSuchVolume),
        (39, Some(500), "unable to parse directory volume name 'x'", &[], Meaning::Other),
        (40, Some(400), VERIFY, &[("volume", "storage ID mismatch (a != b)\n")], Meaning::BadRequest),
        (41, Some(500), "volume 's:9999/x.raw' has size zero", &[], Meaning::Other),
        (42, None, "lvremove 'vg/x' error:   Logical volume vg/x in use.", &[], Meaning::VolumeInUse),
        (43, None, "lvremove 'vg/x' error:   Failed to find logical volume \"vg/x\"", &[], Meaning::NoSuchVolume),
        (44, None, "zfs error: cannot destroy 'pool/x': dataset is busy", &[], Meaning::VolumeInUse),
        (45, None, "base volume 'x' is still in use by linked clones", &[], Meaning::BaseInUse),
        (46, None, "can't lock file '/var/lock/qemu-server/lock-102.conf' - got timeout", &[], Meaning::Busy),
        (47, Some(500), "VM is locked (backup)", &[], Meaning::VmLocked),
        (48, None, "checksum mismatch (file change by other user?)", &[], Meaning::DigestChanged),
        (49, Some(500), "detected modified configuration - file changed by other user? Try again.", &[], Meaning::DigestChanged),
        (50, None, "volume 'ds1:9999/nope.raw' does not exist", &[], Meaning::NoSuchVolume),
        (51, None, "no such logical volume vg/x", &[], Meaning::NoSuchVolume),
        (52, None, "can't activate LV '/dev/vg/x':   Failed to find logical volume \"vg/x\"", &[], Meaning::NoSuchVolume),
        (53, None, "timeout: no zvol device link for 'x' found after 10 sec.", &[], Meaning::NoSuchVolume),
        (54, Some(400), VERIFY, &[("scsi1", "unable to parse drive options")], Meaning::BadRequest),
        (55, Some(500), "drive 'scsi1' - volume 'v' - 'format=qcow2' option different from storage format 'raw'", &[], Meaning::Other),
        (56, Some(500), "Only root can pass arbitrary filesystem paths. at /usr/share/perl5/PVE/Storage.pm line 651.", &[], Meaning::Other),
        (
            57,
            Some(400),
            VERIFY,
            &[("scsi31", "property is not defined in schema and the schema does not allow additional properties")],
            Meaning::BadRequest,
        ),
        (
            58,
            Some(400),
            VERIFY,
            &[("scsi1", "hotplug problem - error on hot-unplugging device 'virtioscsi1' - still busy in guest?\n")],
            Meaning::StillBusyInGuest,
        ),
        (
            58,
            None,
            "400 Parameter verification failed. scsi1: hotplug problem - error on hot-unplugging device 'virtioscsi1' ",
            &[],
            Meaning::StillBusyInGuest,
        ),
        (
            59,
            None,
            "400 Parameter verification failed. scsi1: hotplug problem - VM 101 qmp command 'object-add' failed - attempt to add \
                     duplicate property 'throttle-drive-scsi1' to object (type 'container') ",
            &[],
            Meaning::LeakedSlot,
        ),
        (
            60,
            None,
            "400 Parameter verification failed. scsi1: hotplug problem - VM 103 qmp command 'query-pci' failed - got timeout ",
            &[],
            Meaning::QemuHangs,
        ),
        (61, Some(400), VERIFY, &[("scsi0", "hotplug problem - can't unplug bootdisk 'scsi0'\n")], Meaning::BootDisk),
        (62, Some(500), "can't remove drive 'scsi1' - protection mode enabled", &[], Meaning::Protected),
        (
            63,
            Some(400),
            VERIFY,
            &[("scsi4", "unable to apply pending change scsi4 : unable to delete 'v' - volume is still in use (snapshot?)\n")],
            Meaning::VolumeInUse,
        ),
        (64, Some(500), "failed to update VM 102: checksum mismatch (file change by other user?)", &[], Meaning::DigestChanged),
        (65, Some(500), "no options specified", &[], Meaning::Other),
        (66, Some(500), "only root can set 'lock' config", &[], Meaning::Other),
        (67, Some(400), VERIFY, &[("skiplock", "Only root may use this option.")], Meaning::BadRequest),
        (68, Some(400), VERIFY, &[("delete", "unknown option 'bogus'")], Meaning::BadRequest),
        (69, None, "shrinking disks is not supported", &[], Meaning::Shrinking),
        (69, None, "disk 'scsi9' does not exist", &[], Meaning::Other),
        (70, None, "403 Permission check failed (/storage/ds1, Datastore.AllocateSpace)", &[], Meaning::Forbidden),
        (71, None, "snapshot feature is not available", &[], Meaning::Other),
        (72, Some(400), VERIFY, &[("upid", "no such task")], Meaning::NoSuchTask),
        (73, Some(403), "Permission check failed (/nodes/pve1, Sys.Audit)", &[], Meaning::Forbidden),
        (74, None, "unexpected status", &[], Meaning::TaskKilled),
        (74, None, "received interrupt", &[], Meaning::TaskKilled),
        (75, None, "migration aborted", &[], Meaning::Other),
        (76, Some(400), VERIFY, &[("vmid", "VM 100 already exists")], Meaning::VmidTaken),
        (77, Some(500), "no such cluster node 'pve2'", &[], Meaning::NoSuchHost),
        (78, None, "volume 'ds1:9999/x.raw' does not exist", &[], Meaning::NoSuchVolume),
        // Of §12: trouble with plugging that has no row of its own.
        (0, None, "400 Parameter verification failed. scsi1: hotplug problem - adding drive failed: x ", &[], Meaning::HotplugFailed),
    ];

    #[test]
    fn each_known_text_has_its_meaning() {
        for (row, status, text, errors, meaning) in KNOWN {
            let error = match status {
                Some(status) => answer(*status, text, errors),
                None => task(text),
            };
            assert_eq!(error.meaning(), *meaning, "row {row}: {error}");
        }
        let rows: std::collections::BTreeSet<u32> = KNOWN.iter().map(|(row, ..)| *row).collect();
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
