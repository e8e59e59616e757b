//! The probe's matrix: every signature that this machine's tools can make, and every way in which a look at a disk can fail.
//! Never formatted where refused, and the refusal says what was seen and where.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde_json::json;
use testbed::calls::NodeVolume;
use testbed::guest::{Fault, FaultyIo, GuestOptions, ScsiHardware, wait};
use testbed::tools;
use tonic::{Code, Status};

use crate::harness::{Agent, Image, MIB, SEEN_LIMIT, assert_clean, handle};

/// Stages all of them at once, as a node that was drained does; by name.
fn stage_all(agent: &Agent, volumes: &[(String, NodeVolume)]) -> BTreeMap<String, Result<(), Status>> {
    std::thread::scope(|scope| {
        let calls: Vec<_> =
            volumes.iter().map(|(name, volume)| (name, scope.spawn(|| agent.calls.node_stage_volume(volume.stage()).map(drop)))).collect();
        calls.into_iter().map(|(name, call)| (name.clone(), call.join().unwrap())).collect()
    })
}

/// One that was not made: its name, the tool, its arguments (`DISK`: the image, `FOLDER`: a folder with a file in it), and what
/// the refusal must name.
const SIGNATURES: &[(&str, &str, &[&str], &str)] = &[
    ("btrfs", "mkfs.btrfs", &["-q", "DISK"], "btrfs"),
    ("f2fs", "mkfs.f2fs", &["-q", "DISK"], "f2fs"),
    ("vfat", "mkfs.vfat", &["DISK"], "vfat"),
    ("exfat", "mkfs.exfat", &["DISK"], "exfat"),
    ("ntfs", "mkntfs", &["-F", "-Q", "-q", "DISK"], "ntfs"),
    ("minix", "mkfs.minix", &["DISK"], "minix"),
    ("cramfs", "mkfs.cramfs", &["FOLDER", "DISK"], "cramfs"),
    ("squashfs", "mksquashfs", &["FOLDER", "DISK", "-quiet", "-no-progress", "-noappend"], "squashfs"),
    ("erofs", "mkfs.erofs", &["DISK", "FOLDER"], "erofs"),
    ("iso9660", "xorriso", &["-as", "mkisofs", "-quiet", "-o", "DISK", "FOLDER"], "iso9660"),
    ("swap", "mkswap", &["-q", "DISK"], "swap"),
    ("bcache", "make-bcache", &["-B", "DISK"], "bcache"),
    ("journal", "mke2fs", &["-q", "-O", "journal_dev", "DISK"], "jbd"),
    ("gpt", "sgdisk", &["-o", "-n1", "DISK"], "gpt"),
    ("mbr", "sfdisk", &["-q", "DISK"], "dos"),
];

fn make(tool: &str, arguments: &[&str], image: &Image, folder: &Path) -> Option<()> {
    let Some(program) = tools::program(tool) else {
        tools::skipped(&format!("{tool} is missing: scripts/tools test installs it"));
        return None;
    };
    let size_bytes = image.size_bytes();
    let (disk, folder) = (image.0.to_str()?, folder.to_str()?);
    let arguments = arguments.iter().map(|word| {
        if *word == "DISK" {
            disk
        } else if *word == "FOLDER" {
            folder
        } else {
            word
        }
    });
    let script = std::fs::File::open(partition_script()).unwrap();
    let output = Command::new(program).args(arguments).stdin(script).output().unwrap();
    assert!(output.status.success(), "{tool}: {}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    // Some tools make the image as long as its content.
    image.resize(size_bytes);
    Some(())
}

/// What makes a disk a member of a zfs pool, by the public description of its layout ("ZFS On-Disk Specification", 1.2 and 1.3): four labels of
/// 256 KiB, two at each end, and in the second half of each a ring of uberblocks of 1 KiB. There is no tool for it here.
fn write_zfs_labels(image: &Image) {
    const LABEL_BYTES: u64 = 256 << 10;
    // ub_magic, ub_version, ub_txg, ub_guid_sum, ub_timestamp.
    let uberblock = |txg: u64| [0x00ba_b10c, 5000, txg, 0x1234_5678_9abc_def0, 1_767_225_600].map(u64::to_le_bytes).concat();
    let size_bytes = image.size_bytes();
    for label in [0, LABEL_BYTES, size_bytes - 2 * LABEL_BYTES, size_bytes - LABEL_BYTES] {
        for txg in 0..16 {
            image.write_at(label + LABEL_BYTES / 2 + txg * 1024, &uberblock(4 + txg));
        }
    }
}

/// This host's blkid agrees on what was made by hand.
fn judge_as(image: &Image, kind: &str) {
    let Some(blkid) = tools::program("blkid") else { return tools::skipped("blkid is missing: what was made by hand is not judged") };
    let output = Command::new(blkid).args(["-p", "-o", "value", "-s", "TYPE"]).arg(&image.0).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), kind, "{}", String::from_utf8_lossy(&output.stderr));
}

/// sfdisk reads its table from there; the others read nothing.
fn partition_script() -> std::path::PathBuf {
    let path = std::env::temp_dir().join(format!("csi-partition-{}", std::process::id()));
    std::fs::write(&path, ";\n").unwrap();
    path
}

#[test]
fn guest_signatures_of_every_tool_are_refused_by_name() {
    let Some(agent) = Agent::start("signatures") else { return };
    let folder = std::env::temp_dir().join(format!("csi-content-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("a"), "somebody's").unwrap();
    let mut made = Vec::new();
    for (lun, (name, tool, arguments, word)) in (1..).zip(SIGNATURES) {
        // btrfs and f2fs want more than 100 MiB.
        let image = Image::new(160 * MIB);
        if make(tool, arguments, &image, &folder).is_some() {
            let volume = agent.attach(&handle(name), &image, lun);
            made.push((name.to_string(), *word, image.bytes(), image, volume));
        }
    }
    let _ = std::fs::remove_dir_all(&folder);
    let zfs = Image::new(160 * MIB);
    write_zfs_labels(&zfs);
    judge_as(&zfs, "zfs_member");
    let volume = agent.attach(&handle("zfs"), &zfs, 16);
    made.push(("zfs".into(), "zfs_member", zfs.bytes(), zfs, volume));
    let volumes: Vec<_> = made.iter().map(|(name, _, _, _, volume)| (name.clone(), volume.clone())).collect();
    let answers = stage_all(&agent, &volumes);
    for (name, word, before, image, volume) in &made {
        let status = answers[name].as_ref().expect_err("a disk with a signature should be refused");
        assert_eq!(status.code(), Code::FailedPrecondition, "{name}: {status:?}");
        assert!(status.message().contains(&volume.id) && status.message().contains(word), "{name}: {status:?}");
        assert!(image.bytes() == *before, "{name}: the disk was written to: {status:?}");
        assert!(agent.mounted_at(&volume.staging).is_empty(), "{name}");
    }
    agent.guest.power_off().unwrap();
}

/// Where the probe of a blank disk of this size must look, in bytes: the mark, the edges, and the places of backup superblocks.
fn probed_places(size_bytes: u64) -> BTreeMap<String, u64> {
    let mut places = BTreeMap::from([
        ("mark".to_string(), 0),
        ("ext superblock".to_string(), 1024),
        ("first MiB, inside".to_string(), 700 * 1024),
        ("first MiB, its end".to_string(), MIB - 512),
        ("last MiB, its start".to_string(), size_bytes - MIB),
        ("last MiB, inside".to_string(), size_bytes - 400 * 1024),
        ("last sector".to_string(), size_bytes - 512),
    ]);
    places.extend(disk::ext4::backup_offsets(size_bytes).into_iter().take(4).map(|at| (format!("ext4 backup at {at}"), at)));
    places.extend(disk::xfs::backup_offsets(size_bytes).into_iter().take(2).map(|at| (format!("xfs backup at {at}"), at)));
    places
}

/// W13, W14: with and without encryption.
#[test]
fn guest_a_read_error_in_any_probed_place_is_no_blank() {
    let mut options = GuestOptions::named("eio").with_node();
    // One controller: a kernel that tries to read the partitions of a faulty disk lets the next controller wait for it.
    options.scsi_hardware = ScsiHardware::VirtioScsiPci;
    let Some(agent) = Agent::start_on(&options) else { return };
    let size_bytes = 1024 * MIB;
    let mut disks = Vec::new();
    for (lun, (name, at)) in (1..).zip(probed_places(size_bytes)) {
        let (handle, image) = (handle(&format!("eio-{lun}")), Image::new(size_bytes));
        let fault = Fault { io: FaultyIo::Read, sector: Some(at / 512), errno: 5 };
        agent.guest.plug_faulty(&image.drive(lun, Some(&handle.serial())), &[fault]).unwrap();
        let mut volume = agent.volume(&handle, &image, lun);
        if lun % 2 == 0 {
            volume.secrets.insert(proto::secrets::PASSPHRASE.into(), "never used".into());
        }
        disks.push((name, volume, image));
    }
    let volumes: Vec<_> = disks.iter().map(|(name, volume, _)| (name.clone(), volume.clone())).collect();
    let answers = stage_all(&agent, &volumes);
    for (name, volume, image) in &disks {
        let status = answers[name].as_ref().expect_err("what cannot be read should not be formatted");
        assert_eq!(status.code(), Code::Internal, "{name}: {status:?}");
        for word in [volume.id.as_str(), "EIO", "not taken for blank"] {
            assert!(status.message().contains(word), "{name}: no {word:?} in {status:?}");
        }
        assert_eq!(image.allocated_bytes(), 0, "{name}: the disk was written to: {status:?}");
    }
    agent.guest.power_off().unwrap();
}

#[test]
fn guest_a_write_error_leaves_an_unfinished_format_that_the_next_stage_finishes() {
    let Some(agent) = Agent::start("write-error") else { return };
    // The mark itself, a backup's descriptors, the last superblock's first kilobyte, and the flushes.
    let faults = [
        ("mark", Fault { io: FaultyIo::Write, sector: Some(0), errno: 5 }),
        ("backup", Fault { io: FaultyIo::Write, sector: Some(32768 * 8), errno: 5 }),
        ("superblock", Fault { io: FaultyIo::Write, sector: Some(2), errno: 5 }),
        ("flush", Fault { io: FaultyIo::Flush, sector: None, errno: 5 }),
    ];
    let mut disks = Vec::new();
    for (lun, (name, fault)) in (1..).zip(faults) {
        let (handle, image) = (handle(&format!("write-{name}")), Image::new(512 * MIB));
        agent.guest.plug_faulty(&image.drive(lun, Some(&handle.serial())), &[fault]).unwrap();
        disks.push((name.to_string(), handle.clone(), agent.volume(&handle, &image, lun), image, lun));
    }
    let volumes: Vec<_> = disks.iter().map(|(name, _, volume, _, _)| (name.clone(), volume.clone())).collect();
    let answers = stage_all(&agent, &volumes);
    for (name, handle, volume, image, lun) in &disks {
        let status = answers[name].as_ref().expect_err("a format whose writes fail should fail");
        assert_eq!(status.code(), Code::Internal, "{name}: {status:?}");
        assert!(status.message().contains(&volume.id) && status.message().contains("make the filesystem"), "{name}: {status:?}");
        assert!(agent.mounted_at(&volume.staging).is_empty(), "{name}");
        agent.detach(*lun);
        // On a sound disk the same volume comes up.
        let volume = agent.attach(handle, image, *lun);
        agent.stage(&volume);
        agent.calls.node_unstage_volume(volume.unstage()).unwrap();
        agent.detach(*lun);
        assert_clean(image);
    }
    agent.guest.power_off().unwrap();
}

/// Slowed down by QEMU, so that the disk goes while it is read.
/// W14: a device that fails, and then works.
#[test]
fn guest_a_disk_that_vanishes_or_shrinks_while_it_is_probed_is_no_blank() {
    let Some(agent) = Agent::start("vanish") else { return };
    let reads = |lun: u8| -> u64 {
        let stats = agent.guest.monitor("query-blockstats", json!({})).unwrap();
        let devices = stats.as_array().unwrap();
        let ours = devices.iter().find(|device| {
            device["qdev"].as_str().is_some_and(|path| path.ends_with(&format!("/scsi{lun}")) || path == format!("scsi{lun}"))
        });
        ours.map_or(0, |device| device["stats"]["rd_bytes"].as_u64().unwrap())
    };
    for (name, lun) in [("vanishes", 1_u8), ("shrinks", 2)] {
        let (handle, image) = (handle(name), Image::new(256 * MIB));
        agent.guest.machine().plug(&image.drive(lun, Some(&handle.serial()))).unwrap();
        let volume = agent.volume(&handle, &image, lun);
        crate::harness::wait_for_size(&agent.guest, lun, Some(256 * MIB));
        // A probe reads 3 MiB or so: six seconds.
        let limits = json!({ "id": format!("throttle-drive-scsi{lun}"), "limits": { "bps-read": 512 * 1024 } });
        let group = limits["id"].as_str().unwrap();
        agent.guest.monitor("qom-set", json!({ "path": group, "property": "limits", "value": limits["limits"] })).unwrap();
        let before = reads(lun);
        let status = std::thread::scope(|scope| {
            let call = scope.spawn(|| agent.calls.node_stage_volume(volume.stage()));
            let begun = wait::until(SEEN_LIMIT, || Ok::<_, ()>((reads(lun) > before + 256 * 1024).then_some(())));
            assert!(begun.unwrap().is_some(), "{name}: the probe did not begin; {}", agent.guest.quote());
            if name == "vanishes" {
                agent.guest.machine().unplug(lun).unwrap();
            } else {
                // Where the last MiB was, nothing is any more.
                agent.guest.machine().resize(lun, 8 * MIB).unwrap();
            }
            call.join().unwrap().expect_err("a disk that went in the middle of a look should not be staged")
        });
        println!("{name}: {status:?}");
        assert!(matches!(status.code(), Code::Internal | Code::Unavailable | Code::FailedPrecondition), "{name}: {status:?}");
        assert!(status.message().contains(&volume.id), "{name}: {status:?}");
        assert_eq!(image.allocated_bytes(), 0, "{name}: the disk was written to: {status:?}");
        assert!(agent.mounted_at(&volume.staging).is_empty(), "{name}");
    }
    agent.guest.power_off().unwrap();
}

/// On recycled storage a stranger's leftovers behind a wiped head are nothing; the volume's own damaged filesystem is not.
#[test]
fn guest_leftovers_on_recycled_storage() {
    let Some(agent) = Agent::start("recycled") else { return };
    let wipe = |image: &Image| image.write_at(0, &[0; 4096]);
    let recycled = |mut volume: NodeVolume| {
        volume.publish_context.insert(proto::publish_context::ZEROED.into(), "0".into());
        volume
    };
    for (lun, fs_type) in [(1, "ext4"), (2, "xfs")] {
        let (handle, image) = (handle(&format!("recycled-{fs_type}")), Image::new(512 * MIB));
        let stranger = if fs_type == "ext4" { ("mke2fs", vec!["-q", "-t", "ext4", "DISK"]) } else { ("mkfs.xfs", vec!["-q", "DISK"]) };
        if make(stranger.0, &stranger.1, &image, Path::new("/")).is_none() {
            return;
        }
        wipe(&image);
        let mut volume = recycled(agent.attach(&handle, &image, lun));
        volume.capability = testbed::calls::mount_capability(fs_type);
        agent.stage(&volume);
        assert_eq!(agent.mounted_at(&volume.staging), [fs_type]);
        agent.calls.node_unstage_volume(volume.unstage()).unwrap();
        agent.detach(lun);

        // Now it is this volume's own; with its head gone it must not be taken for a stranger's.
        wipe(&image);
        let before = image.bytes();
        let volume = recycled(agent.attach(&handle, &image, lun));
        let status = agent.calls.node_stage_volume(volume.stage()).expect_err("a damaged volume should not be formatted");
        assert_eq!(status.code(), Code::FailedPrecondition, "{fs_type}: {status:?}");
        assert!(status.message().contains("this volume's own"), "{fs_type}: {status:?}");
        assert!(image.bytes() == before, "{fs_type}: the disk was written to: {status:?}");
    }
    agent.guest.power_off().unwrap();
}

#[test]
fn guest_a_blank_disk_that_refuses_writes_is_not_formatted() {
    let Some(agent) = Agent::start("read-only-blank") else { return };
    let (handle, image) = (handle("read-only"), Image::new(64 * MIB));
    let mut drive = image.drive(1, Some(&handle.serial()));
    drive.read_only = true;
    agent.guest.machine().plug(&drive).unwrap();
    let volume = agent.volume(&handle, &image, 1);
    let status = agent.calls.node_stage_volume(volume.stage()).expect_err("nothing can be written there");
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    assert!(status.message().contains("refuses writes"), "{status:?}");
    assert_eq!(image.allocated_bytes(), 0);
    agent.guest.power_off().unwrap();
}
