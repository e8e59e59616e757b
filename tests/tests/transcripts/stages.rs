//! Every recording with its stage.

use std::sync::Mutex;

use crate::stage::{self, Event, MIB, Stage};

fn stage(name: &'static str, describe: fn() -> testbed::sim::Description) -> Stage {
    Stage { name, describe, volumes: &[], events: &[], skips: &[], held: Mutex::default() }
}

/// What the earlier recordings left on ds1.
const LEFT: [(&str, u64); 8] = [
    ("ds1:9999/anything.raw", 1024),
    ("ds1:9999/vm-100-foreign.raw", MIB),
    ("ds1:9999/vm-9999-b.qcow2", 10 * MIB),
    ("ds1:9999/vm-9999-g.raw", 1024 * MIB),
    ("ds1:9999/vm-9999-low.raw", MIB),
    ("ds1:9999/vm-9999-odd.raw", 1025 * 1024),
    ("ds1:9999/vm-9999-v.vmdk", MIB),
    ("ds1:9999/vm-9999-z.raw", 0),
];

const LEFT_AND_P: [(&str, u64); 11] = [
    LEFT[0],
    LEFT[1],
    LEFT[2],
    LEFT[3],
    LEFT[4],
    LEFT[5],
    LEFT[6],
    LEFT[7],
    ("ds1:9999/vm-9999-p1.raw", 10 * MIB),
    ("ds1:9999/vm-9999-p2.raw", 10 * MIB),
    ("ds1:9999/vm-9999-p3.raw", 10 * MIB),
];

const H: [(&str, u64); 3] =
    [("ds1:9999/vm-9999-h1.raw", 16 * MIB), ("ds1:9999/vm-9999-h2.raw", 16 * MIB), ("ds1:9999/vm-9999-h3.raw", 16 * MIB)];
/// After the first online resize.
const H_GROWN: [(&str, u64); 3] = [("ds1:9999/vm-9999-h1.raw", 32 * MIB), H[1], H[2]];

const LOW_TASK: &str = "UPID:pve1:00000492:0005F7BC:6B0103D2:qmconfig:102:csi@pve!csi:";

pub(crate) fn all() -> Vec<Stage> {
    vec![
        stage("auth", stage::four_vms),
        stage("storage", stage::first_vm),
        stage("transport", stage::four_vms),
        vmconfig_stopped(),
        Stage { volumes: &H, ..stage("hotplug-virtio-scsi-single", stage::two_running) },
        Stage { volumes: &H_GROWN, ..stage("hotplug-virtio-scsi-pci", stage::two_running) },
        Stage {
            volumes: &H_GROWN,
            events: &[(88, Event::StartVm(103)), (156, Event::Hung(103, true)), (177, Event::StopVm(103))],
            ..stage("hotplug-ugly", stage::hotplugging)
        },
        Stage {
            volumes: &H_GROWN,
            events: &[(129, Event::KeyOrder(&["scsi1", "scsi3", "scsi2"]))],
            ..stage("hotplug-busy", stage::hotplugging)
        },
        Stage {
            volumes: &LEFT_AND_P,
            skips: &[(131, "lists tasks of earlier recordings"), (136, "counts tasks of earlier recordings")],
            events: &[(111, Event::PostTask("/nodes/pve1/qemu/102/config", "delete=scsi9", LOW_TASK))],
            ..stage("permissions-attach", stage::four_vms)
        },
        delete_in_use(),
        misc(),
        concurrency(),
        locks_proxy(),
        operations(),
        moves(),
    ]
}

fn vmconfig_stopped() -> Stage {
    Stage {
        volumes: &LEFT_AND_P,
        events: &[
            (328, Event::SetConfig(102, "lock", "backup")),
            (350, Event::DropConfig(102, "lock")),
            (350, Event::SetConfig(102, "protection", "1")),
            (366, Event::DropConfig(102, "protection")),
            (371, Event::HoldConfig(102)),
            (383, Event::Release),
            (383, Event::Low(&[("/storage", "Datastore.AllocateSpace"), ("/vms/102", "VM.Config.Disk,VM.Audit")])),
            // The recorder's grant missed: what it wrote replaced what low@pve had.
            (409, Event::Low(&[("/storage/ds1", "VM.Config.Disk"), ("/vms/102", "VM.Config.Disk,VM.Audit")])),
        ],
        ..stage("vmconfig-stopped", stage::four_vms)
    }
}

fn delete_in_use() -> Stage {
    Stage {
        volumes: &[
            ("ds1:102/vm-102-disk-0.raw", 10 * MIB),
            ("ds1:102/vm-102-disk-1.raw", 10 * MIB),
            ("ds1:9999/vm-9999-c1.raw", MIB),
            ("ds1:9999/vm-9999-c2.raw", MIB),
            ("ds1:9999/vm-9999-c3.raw", MIB),
            ("ds1:9999/vm-9999-c4.raw", MIB),
            ("ds1:9999/vm-9999-c5.raw", MIB),
            ("ds1:9999/vm-9999-c6.raw", MIB),
            ("ds1:9999/vm-9999-c7.raw", MIB),
            ("ds1:9999/vm-9999-d0.raw", MIB),
            ("ds1:9999/vm-9999-d1.raw", MIB),
            ("ds1:9999/vm-9999-d2.raw", MIB),
            ("ds1:9999/vm-9999-d3.raw", MIB),
            ("ds1:9999/vm-9999-d4.raw", MIB),
            ("ds1:9999/vm-9999-d5.raw", MIB),
            ("ds1:9999/vm-9999-d6.raw", MIB),
            ("ds1:9999/vm-9999-d7.raw", MIB),
            ("ds1:9999/vm-9999-k1.raw", 16 * MIB),
            ("ds1:9999/vm-9999-k2.raw", 16 * MIB),
            ("ds1:9999/vm-9999-same.raw", MIB),
            ("ds1:9999/vm-9999-slow.raw", MIB),
        ],
        ..stage("delete-in-use", stage::diskless)
    }
}

fn misc() -> Stage {
    Stage {
        volumes: &[
            ("ds1:102/vm-102-disk-1.raw", 52429 * 1024),
            ("ds1:9999/vm-9999-k1.raw", 16 * MIB),
            ("ds1:9999/vm-9999-k2.raw", 16 * MIB),
        ],
        events: &[
            (46, Event::SetConfig(102, "scsi0", "ds1:102/vm-102-disk-1.raw,size=52429K")),
            (46, Event::SetConfig(102, "scsihw", "virtio-scsi-pci")),
            (46, Event::SetConfig(102, "machine", "pc-i440fx-9.2")),
        ],
        ..stage("misc", stage::with_statistics)
    }
}

fn concurrency() -> Stage {
    Stage {
        volumes: &[
            ("ds1:9999/vm-9999-c0.raw", MIB),
            ("ds1:9999/vm-9999-c1.raw", MIB),
            ("ds1:9999/vm-9999-c2.raw", MIB),
            ("ds1:9999/vm-9999-c3.raw", MIB),
            ("ds1:9999/vm-9999-c4.raw", MIB),
            ("ds1:9999/vm-9999-c5.raw", MIB),
            ("ds1:9999/vm-9999-c6.raw", MIB),
        ],
        // Left over from misc.txt.
        events: &[(22, Event::Leak(100, "scsi1"))],
        ..stage("concurrency", stage::hotplugging)
    }
}

fn locks_proxy() -> Stage {
    Stage {
        volumes: &[
            ("second:102/vm-102-disk-1.raw", 10 * MIB),
            ("second:102/vm-102-disk-2.raw", 10 * MIB),
            ("second:151/base-151-disk-0.qcow2", 1025 * MIB),
            ("second:151/base-151-disk-1.raw", 10 * MIB),
            ("second:151/base-151-disk-2.raw", 10 * MIB),
        ],
        events: &[
            (4, Event::HoldStorage("ds1")),
            (17, Event::Release),
            (17, Event::HoldStorage("sharedir")),
            (30, Event::Release),
            (90, Event::SlowAllocation(40)),
            (96, Event::SlowAllocation(0)),
            (119, Event::DaemonDown),
        ],
        ..stage("locks-proxy", stage::with_neighbours)
    }
}

fn operations() -> Stage {
    Stage {
        volumes: &[
            LEFT[0],
            LEFT[1],
            LEFT[2],
            LEFT[3],
            LEFT[4],
            LEFT[5],
            LEFT[6],
            LEFT[7],
            ("ds1:9999/vm-9999-p1.raw", 10 * MIB),
            ("ds1:9999/vm-9999-p2.raw", 10 * MIB),
            H[0],
            H[1],
            H[2],
            ("ds1:9999/vm-9999-g2.raw", 10 * MIB),
            ("ds1:9999/vm-9999-g3.raw", 10 * MIB),
            ("second:9999/vm-9999-q.qcow2", MIB),
            ("second:9999/vm-9999-q.raw", MIB),
        ],
        events: &[
            (127, Event::DropConfig(102, "scsi1")),
            (135, Event::Create("second:9999/vm-9999-gq.qcow2", 10 * MIB)),
            (135, Event::SetConfig(102, "scsi2", "second:9999/vm-9999-gq.qcow2,size=10M")),
            (143, Event::SnapTime(102, "s1", "1795229082")),
            (143, Event::SnapTime(102, "s2", "1795229083")),
            // The rollback, not there yet, died of the deleted volume.
            (189, Event::SetConfig(102, "lock", "rollback")),
            // Snapshots deleted (not there yet), by hand unlocked.
            (254, Event::DropSnapshot(102, "s1")),
            (254, Event::DropSnapshot(102, "s2")),
            (254, Event::DropConfig(102, "lock")),
            (254, Event::DropConfig(102, "parent")),
            (254, Event::SetConfig(102, "scsi1", "ds1:9999/vm-9999-g1.raw,size=31458K")),
            (315, Event::SetConfig(102, "scsi3", "ds1:9999/vm-9999-g2.raw,size=10M")),
            // The reassignment (not there yet) renamed it.
            (373, Event::Remove("ds1:9999/vm-9999-g3.raw")),
            (373, Event::Create("ds1:103/vm-103-disk-1.raw", 10 * MIB)),
            (373, Event::SetConfig(103, "scsi7", "ds1:103/vm-103-disk-1.raw,size=10M")),
            (411, Event::Create("ds1:9999/vm-9999-src.raw", 10 * MIB)),
        ],
        ..stage("resize-move-snapshot-clone-migrate-destroy", stage::operations)
    }
}

/// Nearly all of it is not there yet; what is in between is played on what the daemons had made.
fn moves() -> Stage {
    Stage {
        volumes: &[
            ("second:102/vm-102-disk-1.raw", 10 * MIB),
            ("second:102/vm-102-disk-2.raw", 10 * MIB),
            ("ds1:102/vm-102-disk-0.raw", 10 * MIB),
            ("ds1:9999/vm-9999-src.raw", 10 * MIB),
            ("ds1:9999/vm-9999-m3.raw", 10 * MIB),
        ],
        events: &[
            (13, Event::SetConfig(102, "scsi1", "second:102/vm-102-disk-1.raw,backup=0,size=10M")),
            (13, Event::SetConfig(102, "unused0", "ds1:9999/vm-9999-m1.raw")),
            (34, Event::SetConfig(102, "scsi3", "second:102/vm-102-disk-2.raw,size=10M")),
            (52, Event::SetConfig(102, "scsi5", "ds1:102/vm-102-disk-0.raw,size=10M")),
            (124, Event::SetConfig(102, "scsi6", "ds1:9999/vm-9999-m3.raw,size=10M")),
            // Destroyed with the VM 9999.
            (130, Event::Remove("ds1:9999/vm-9999-m3.raw")),
        ],
        skips: &[(79, "VM 150 is a clone: cloning is not there yet"), (109, "VM 151 is a clone: cloning is not there yet")],
        ..stage("move-import-clone-destroy", stage::moving)
    }
}
