//! What does not fit together, each in a sentence with what to do where there is something. Pure.

use std::collections::BTreeMap;

use crate::identity;
use crate::sys::mountinfo::{self, Mount};
use crate::sys::scsi::{Disk, State};

use super::{Claim, Seen};

/// All of them, in the disks' order.
pub(super) fn disagreements(disks: &[Seen], claims: &[Claim], mounts: &[Mount]) -> Vec<String> {
    let mut said = twice(disks);
    for seen in disks {
        said.extend(of_disk(seen, claims));
    }
    for claim in claims {
        said.extend(of_claim(claim, disks, mounts));
    }
    said
}

/// A mount whose disk has gone from under it.
pub(super) fn gone(mount: &Mount) -> String {
    format!(
        "the device {} mounted at {} is gone: what was not written is lost; unstaging takes the mount away",
        mount.dev,
        mount.point.display()
    )
}

/// What must be there once, and is there more often.
fn twice(disks: &[Seen]) -> Vec<String> {
    let mut serials: BTreeMap<&str, Vec<&Disk>> = BTreeMap::new();
    let mut slots: BTreeMap<u64, Vec<&Disk>> = BTreeMap::new();
    for disk in disks.iter().map(|seen| &seen.disk).filter(|disk| identity::is_of_this_driver(disk)) {
        slots.entry(disk.address.lun).or_default().push(disk);
        if let Some(serial) = &disk.serial {
            serials.entry(serial).or_default().push(disk);
        }
    }
    let names = |disks: &[&Disk]| disks.iter().map(|disk| identity::name(disk)).collect::<Vec<_>>().join(" and ");
    let serials = serials.iter().filter(|(_, disks)| disks.len() > 1);
    let slots = slots.iter().filter(|(_, disks)| disks.len() > 1);
    let by_serial = serials.map(|(serial, disks)| format!("{} both carry the serial {serial}: one volume in two slots", names(disks)));
    by_serial.chain(slots.map(|(lun, disks)| format!("{} are both at LUN {lun}: one of them is being detached", names(disks)))).collect()
}

fn of_disk(seen: &Seen, claims: &[Claim]) -> Vec<String> {
    let Seen { disk, holds, mappings, mounts, ext4_errors, volume } = seen;
    let name = identity::name(disk);
    let mut said = Vec::new();
    let is_ours = identity::is_of_this_driver(disk);
    let slot = u8::try_from(disk.address.lun).ok().filter(|lun| proto::LUN_RANGE.contains(lun));
    match slot {
        Some(lun) if is_ours => {
            let expected = identity::wwid(&proto::wwn_of_lun(lun));
            if disk.wwid.is_some() && disk.wwid != expected {
                let has = disk.wwid.as_deref().unwrap_or_default();
                said.push(format!("{name} has the WWN {has}, but a drive of slot {lun} should have {}", expected.unwrap_or_default()));
            }
        }
        Some(lun) if disk.vendor == "QEMU" => said.push(format!("{name} is not this driver's and takes slot {lun} of 1 to 29")),
        None if is_ours => said.push(format!("{name} is this driver's, but sits at LUN {}, outside 1 to 29", disk.address.lun)),
        Some(_) | None => (),
    }
    match (disk.state, holds) {
        (State::Offline, _) => said.push(format!("{name} is offline: every read of it fails; staging its volume sets it running")),
        (State::Passing, _) => said.push(format!("{name} is coming or going: look again")),
        (State::Running, Err(why)) => said.push(format!("{name} cannot be looked at: {why}")),
        (State::Running, Ok(_)) => (),
    }
    if *ext4_errors > 0 {
        said.push(format!("the kernel has counted {ext4_errors} errors in the ext4 on {name}: it needs e2fsck while it is not mounted"));
    }
    for mount in mounts.iter().filter(|mount| mount.filesystem_read_only && !mount.read_only) {
        let at = mount.point.display();
        said.push(format!("the filesystem on {name} is read-only, though its mount at {at} is not: the kernel has found it damaged"));
    }
    if is_ours && volume.is_none() && mounts.is_empty() && mappings.is_empty() && !claims.iter().any(|claim| claim.serial == disk.serial) {
        said.push(format!("{name} is attached, but kubelet keeps no volume for it: it is about to be staged, or should be detached"));
    }
    said
}

/// A volume that kubelet keeps, against what is mounted there.
fn of_claim(claim: &Claim, disks: &[Seen], mounts: &[Mount]) -> Option<String> {
    let Claim { volume, serial, path } = claim;
    let path = path.display();
    let Some(serial) = serial else { return Some(format!("kubelet keeps {volume:?} for {path}: that is no volume id of this driver")) };
    let Some(mount) = mountinfo::at(mounts, &claim.path) else {
        return Some(format!("kubelet keeps the volume {volume} for {path}, but nothing is mounted there (not yet, or not any more)"));
    };
    let Some(seen) = disks.iter().find(|seen| seen.mounts.contains(mount)) else {
        // A raw block volume's is the folder of device nodes.
        return (mount.fstype != "devtmpfs")
            .then(|| format!("{path} shows {} and no SCSI disk, though kubelet keeps {volume} there", mount.source));
    };
    identity::verify(serial, &seen.disk).err().map(|stranger| format!("the volume {volume} should be at {path}: {stranger}"))
}
