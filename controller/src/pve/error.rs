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
    (&["volume_size_info on '", "no format"], Meaning::NoSuchVolume),
    (&["Failed to find logical volume"], Meaning::NoSuchVolume),
    (&["no such logical volume"], Meaning::NoSuchVolume),
    (&["zvol device link for '", "found after"], Meaning::NoSuchVolume),
    (&["dataset does not exist"], Meaning::NoSuchVolume),
    (&["(2) No such file or directory"], Meaning::NoSuchVolume),
    (&["volume '", "' does not exist"], Meaning::NoSuchVolume),
    (&["volume rbd:", "does not exist"], Meaning::NoSuchVolume),
    (&["No such storage."], Meaning::NoSuchStorage),
    (&["storage '", "' does not exist"], Meaning::NoSuchStorage),
    (&["storage '", "' is disabled"], Meaning::StorageNotHere),
    (&["storage '", "' is not available on node"], Meaning::StorageNotHere),
    (&["storage '", "' is not online"], Meaning::StorageOffline),
    (&["unable to activate storage"], Meaning::StorageOffline),
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

    /// The error table of the reference notes (proxmox-api.md §17), by its numbers.
    #[test]
    fn each_known_text_has_its_meaning() {
        use Meaning::*;
        let verify = "Parameter verification failed.";
        let table: Vec<(u32, Error, Meaning)> = vec![
            (1, answer(401, "No ticket", &[]), Unauthenticated),
            (2, answer(401, "Authentication failed!", &[]), Unauthenticated),
            (3, answer(403, "Permission check failed (/vms/100, VM.Config.Disk)", &[]), Forbidden),
            (4, answer(403, "Permission check failed (user != root@pam)", &[]), Forbidden),
            (
                5,
                answer(403, "Permission check failed (URI '/access/ticket' not available with API token, need proper ticket.", &[]),
                Forbidden,
            ),
            (6, answer(400, verify, &[("x", "type check ('integer') failed - got 'abc'")]), BadRequest),
            (7, answer(501, "Method 'GET /x' not implemented", &[]), NoSuchEndpoint),
            (8, answer(501, "Unexpected content for method 'DELETE'", &[]), NoSuchEndpoint),
            (9, answer(501, "chunked transfer encoding not supported", &[]), NoSuchEndpoint),
            (10, answer(506, "upload 'Content-Type 'text/plain' not implemented", &[]), NoSuchEndpoint),
            (11, answer(501, "for data too large", &[]), NoSuchEndpoint),
            (12, answer(500, "Configuration file 'nodes/pve1/qemu-server/888.conf' does not exist", &[]), NoSuchVm),
            (13, answer(500, "hostname lookup 'x' failed - failed to get address info for: x: Name or service not known", &[]), NoSuchHost),
            (14, answer(595, "No route to host", &[]), HostDown),
            (14, answer(595, "Connection refused", &[]), HostDown),
            (15, answer(596, "Connection timed out", &[]), OutcomeUnknown),
            (16, answer(596, "error:0A000086:SSL routines::certificate verify failed", &[]), HostDown),
            (17, answer(595, "Connection refused", &[]), HostDown),
            (18, answer(500, "storage 'x' does not exist", &[]), NoSuchStorage),
            (18, answer(400, verify, &[("storage", "No such storage.")]), NoSuchStorage),
            (19, answer(500, "storage 'x' is disabled", &[]), StorageNotHere),
            (20, answer(500, "storage 'x' is not available on node 'pve1'", &[]), StorageNotHere),
            (21, answer(500, "storage 'x' is not online", &[]), StorageOffline),
            (
                22,
                answer(500, "unable to activate storage 'x' - directory is expected to be a mount point but is not mounted: '/m'", &[]),
                StorageOffline,
            ),
            (23, answer(500, "disk image '/d/images/9999/vm-9999-a.raw' already exists", &[]), VolumeExists),
            (
                24,
                answer(500, "lvcreate 'vg/vm-9999-a' error:   Logical Volume \"vm-9999-a\" already exists in volume group \"vg\"", &[]),
                VolumeExists,
            ),
            (25, answer(500, "zfs error: cannot create 'pool/vm-9999-a': dataset already exists", &[]), VolumeExists),
            (26, answer(500, "rbd create 'vm-9999-a' error: rbd: create error: (17) File exists", &[]), VolumeExists),
            (27, answer(500, "unable to parse volume filename 'vm-9999-c'", &[]), Other),
            (28, answer(500, "illegal name 'x' - should be 'vm-9999-*'", &[]), Other),
            (29, answer(500, "unable to parse lvm volume name 'x'", &[]), Other),
            (30, answer(400, verify, &[("format", "different storage formats (raw != qcow2)")]), BadRequest),
            (
                31,
                answer(500, "lvcreate 'vg/x' error:   Volume group \"vg\" has insufficient free space (10 extents): 256 required.", &[]),
                NoSpace,
            ),
            (32, answer(500, "zfs error: cannot create 'pool/x': out of space", &[]), NoSpace),
            (33, answer(500, "unable to create image: qemu-img: /x: The image size is too large for file format 'raw'", &[]), TooLarge),
            (34, answer(500, "can't lock file '/var/lock/pve-manager/pve-storage-ds1' - got timeout", &[]), Busy),
            (35, task("cfs-lock 'storage-x' error: got lock request timeout"), Busy),
            (36, task("'storage-x'-locked command timed out - aborting"), OutcomeUnknown),
            (37, answer(500, "cfs-lock 'storage-x' error: no quorum!", &[]), NoQuorum),
            (37, answer(500, "cluster not ready - no quorum?", &[]), NoQuorum),
            (38, answer(500, "volume_size_info on 's:9999/x.raw' failed - no format", &[]), NoSuchVolume),
            (39, answer(500, "unable to parse directory volume name 'x'", &[]), Other),
            (40, answer(400, verify, &[("volume", "storage ID mismatch (a != b)\n")]), BadRequest),
            (41, answer(500, "volume 's:9999/x.raw' has size zero", &[]), Other),
            (42, task("lvremove 'vg/x' error:   Logical volume vg/x in use."), VolumeInUse),
            (43, task("lvremove 'vg/x' error:   Failed to find logical volume \"vg/x\""), NoSuchVolume),
            (44, task("zfs error: cannot destroy 'pool/x': dataset is busy"), VolumeInUse),
            (45, task("base volume 'x' is still in use by linked clones"), BaseInUse),
            (46, task("can't lock file '/var/lock/qemu-server/lock-102.conf' - got timeout"), Busy),
            (47, answer(500, "VM is locked (backup)", &[]), VmLocked),
            (48, task("checksum mismatch (file change by other user?)"), DigestChanged),
            (49, answer(500, "detected modified configuration - file changed by other user? Try again.", &[]), DigestChanged),
            (50, task("volume 'ds1:9999/nope.raw' does not exist"), NoSuchVolume),
            (51, task("no such logical volume vg/x"), NoSuchVolume),
            (52, task("can't activate LV '/dev/vg/x':   Failed to find logical volume \"vg/x\""), NoSuchVolume),
            (53, task("timeout: no zvol device link for 'x' found after 10 sec."), NoSuchVolume),
            (54, answer(400, verify, &[("scsi1", "unable to parse drive options")]), BadRequest),
            (55, answer(500, "drive 'scsi1' - volume 'v' - 'format=qcow2' option different from storage format 'raw'", &[]), Other),
            (56, answer(500, "Only root can pass arbitrary filesystem paths. at /usr/share/perl5/PVE/Storage.pm line 651.", &[]), Other),
            (
                57,
                answer(400, verify, &[("scsi31", "property is not defined in schema and the schema does not allow additional properties")]),
                BadRequest,
            ),
            (
                58,
                answer(
                    400,
                    verify,
                    &[("scsi1", "hotplug problem - error on hot-unplugging device 'virtioscsi1' - still busy in guest?\n")],
                ),
                StillBusyInGuest,
            ),
            (
                58,
                task("400 Parameter verification failed. scsi1: hotplug problem - error on hot-unplugging device 'virtioscsi1' "),
                StillBusyInGuest,
            ),
            (
                59,
                task(
                    "400 Parameter verification failed. scsi1: hotplug problem - VM 101 qmp command 'object-add' failed - attempt to add \
                     duplicate property 'throttle-drive-scsi1' to object (type 'container') ",
                ),
                LeakedSlot,
            ),
            (
                60,
                task("400 Parameter verification failed. scsi1: hotplug problem - VM 103 qmp command 'query-pci' failed - got timeout "),
                QemuHangs,
            ),
            (61, answer(400, verify, &[("scsi0", "hotplug problem - can't unplug bootdisk 'scsi0'\n")]), BootDisk),
            (62, answer(500, "can't remove drive 'scsi1' - protection mode enabled", &[]), Protected),
            (
                63,
                answer(
                    400,
                    verify,
                    &[("scsi4", "unable to apply pending change scsi4 : unable to delete 'v' - volume is still in use (snapshot?)\n")],
                ),
                VolumeInUse,
            ),
            (64, answer(500, "failed to update VM 102: checksum mismatch (file change by other user?)", &[]), DigestChanged),
            (65, answer(500, "no options specified", &[]), Other),
            (66, answer(500, "only root can set 'lock' config", &[]), Other),
            (67, answer(400, verify, &[("skiplock", "Only root may use this option.")]), BadRequest),
            (68, answer(400, verify, &[("delete", "unknown option 'bogus'")]), BadRequest),
            (69, task("shrinking disks is not supported"), Shrinking),
            (69, task("disk 'scsi9' does not exist"), Other),
            (70, task("403 Permission check failed (/storage/ds1, Datastore.AllocateSpace)"), Forbidden),
            (71, task("snapshot feature is not available"), Other),
            (72, answer(400, verify, &[("upid", "no such task")]), NoSuchTask),
            (73, answer(403, "Permission check failed (/nodes/pve1, Sys.Audit)", &[]), Forbidden),
            (74, task("unexpected status"), TaskKilled),
            (74, task("received interrupt"), TaskKilled),
            (75, task("migration aborted"), Other),
            (76, answer(400, verify, &[("vmid", "VM 100 already exists")]), BadRequest),
            (77, answer(500, "no such cluster node 'pve2'", &[]), NoSuchHost),
            (78, task("volume 'ds1:9999/x.raw' does not exist"), NoSuchVolume),
            // Of §12: trouble with plugging that has no row of its own.
            (0, task("400 Parameter verification failed. scsi1: hotplug problem - adding drive failed: x "), HotplugFailed),
        ];
        for (row, error, meaning) in &table {
            assert_eq!(error.meaning(), *meaning, "row {row}: {error}");
        }
        let rows: std::collections::BTreeSet<u32> = table.iter().map(|(row, ..)| *row).collect();
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
}
