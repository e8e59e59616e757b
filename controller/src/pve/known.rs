//! What the daemons of Proxmox VE are known to say, row by row: every one has a meaning, a code and a sentence. For tests.

use super::error::{Cause, Error, Meaning};

/// An answer above 399.
pub(crate) fn answer(status: u16, reason: &str, errors: &[(&str, &str)]) -> Error {
    let errors = errors.iter().map(|(k, v)| ((*k).to_string(), (*v).to_string())).collect();
    let cause = Cause::Answer { status, reason: reason.into(), message: String::new(), errors };
    Error { call: "GET /x".into(), cause }
}

/// A task that ended badly.
pub(crate) fn task(exit: &str) -> Error {
    Error { call: "POST /x".into(), cause: Cause::Task { upid: "UPID:pve1:0:0:0:x::u:".into(), exit: exit.into() } }
}

/// The error of a row.
pub(crate) trait RowError {
    /// As Proxmox gives it.
    fn error(&self) -> Error;
}

impl RowError for Row {
    fn error(&self) -> Error {
        match self.1 {
            Some(status) => answer(status, self.2, self.3),
            None => task(self.2),
        }
    }
}

const VERIFY: &str = "Parameter verification failed.";

/// Number in the table of reference/proxmox-api.md, HTTP status (none: a task's exit status), text, errors by parameter, meaning.
pub(crate) type Row = (u32, Option<u16>, &'static str, &'static [(&'static str, &'static str)], Meaning);

/// What the daemons of Proxmox VE 8.2 to 9.2 say, numbered: HTTP status (none: a task's exit status), text, errors by
/// parameter. Those that the recordings in tests/tests/transcripts/ hold are as recorded, the others as in the sources.
pub(crate) const KNOWN: &[Row] = &[
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
    (13, Some(500), "hostname lookup 'x' failed - failed to get address info for: x: Name or service not known", &[], Meaning::NoSuchHost),
    (
        13,
        Some(500),
        "hostname lookup 'x' failed - failed to get address info for: x: Temporary failure in name resolution",
        &[],
        Meaning::HostDown,
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
    // Proxmox VE 8 says it otherwise.
    (
        59,
        None,
        "400 Parameter verification failed. scsi1: hotplug problem - adding drive failed: Duplicate ID 'drive-scsi1' for drive ",
        &[],
        Meaning::LeakedSlot,
    ),
    (
        0,
        None,
        "400 Parameter verification failed. scsi1: hotplug problem - VM 101 qmp command 'device_add' failed - Failed to get \"write\" lock ",
        &[],
        Meaning::VolumeInUse,
    ),
    // Of §12: trouble with plugging that has no row of its own.
    (0, None, "400 Parameter verification failed. scsi1: hotplug problem - adding drive failed: x ", &[], Meaning::HotplugFailed),
];
