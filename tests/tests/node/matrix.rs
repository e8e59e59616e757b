//! The probe's matrix: every signature that this machine's tools can make, and every way in which a look at a disk can fail.
//! Never formatted where refused, and the refusal says what was seen and where.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use testbed::calls::NodeVolume;
use testbed::guest::{Fault, FaultyIo, GuestOptions, ScsiHardware};
use testbed::tools;
use tonic::{Code, Status};

use crate::harness::{Agent, Image, MIB, assert_clean, handle, wait_for_size};

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

/// An LVM2 physical volume's label in sector 1, as lib/label of LVM2 describes it: id, sector, CRC-32 from byte 20 on, offset, type, UUID.
fn write_lvm2_label(image: &Image) {
    let crc32 = |bytes: &[u8]| {
        bytes.iter().fold(0xf597_a6cf_u32, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 })
        })
    };
    let mut checked = [&32_u32.to_le_bytes()[..], b"LVM2 001", b"abcdefghijklmnopqrstuvwxyz012345"].concat();
    checked.resize(512 - 20, 0);
    let head = [&b"LABELONE"[..], &1_u64.to_le_bytes(), &crc32(&checked).to_le_bytes()].concat();
    image.write_at(512, &[head, checked].concat());
}

/// A member's superblock of a Linux RAID, version 1.2 (md_p.h): magic, major version, where it lies in sectors.
fn write_md_superblock(image: &Image) {
    let mut superblock = [0; 256];
    for (at, word) in [(0, 0xa92b_4efc_u32), (4, 1), (144, 8)] {
        superblock[at..at + 4].copy_from_slice(&word.to_le_bytes());
    }
    image.write_at(4096, &superblock);
}

/// What no tool here makes: its name and its writer, and what the refusal must name.
type ByHand = (&'static str, fn(&Image), &'static str);
const BY_HAND: [ByHand; 3] =
    [("zfs", write_zfs_labels, "zfs_member"), ("lvm2", write_lvm2_label, "LVM2_member"), ("md", write_md_superblock, "linux_raid_member")];

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
            made.push((name.to_string(), *word, image.bytes(), image, volume, lun));
        }
    }
    let _ = std::fs::remove_dir_all(&folder);
    for (lun, (name, write, word)) in (16..).zip(BY_HAND) {
        let image = Image::new(160 * MIB);
        write(&image);
        judge_as(&image, word);
        let volume = agent.attach(&handle(name), &image, lun);
        made.push((name.into(), word, image.bytes(), image, volume, lun));
    }
    let volumes: Vec<_> = made.iter().map(|(name, _, _, _, volume, _)| (name.clone(), volume.clone())).collect();
    for (.., lun) in &made {
        wait_for_size(&agent.guest, *lun, Some(160 * MIB));
    }
    let answers = stage_all(&agent, &volumes);
    for (name, word, before, image, volume, lun) in &made {
        let status = answers[name].as_ref().expect_err("a disk with a signature should be refused");
        assert_eq!(status.code(), Code::FailedPrecondition, "{name}: {status:?}");
        // What was seen, where, and on which disk.
        for word in [volume.id.as_str(), word, "at byte ", &format!("(/dev/{})", agent.guest.disk_at(*lun).unwrap().unwrap())] {
            assert!(status.message().contains(word), "{name}: no {word:?} in {status:?}");
        }
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

/// The bytes that could not be read, by the sentence: `(4096 bytes at byte 0)`.
fn place(sentence: &str) -> Option<std::ops::Range<u64>> {
    let (before, after) = sentence.split_once(" bytes at byte ")?;
    let length: u64 = before.rsplit_once('(')?.1.parse().ok()?;
    let at: u64 = after.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
    Some(at..at + length)
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
        disks.push((name, volume, image, lun, at));
    }
    let volumes: Vec<_> = disks.iter().map(|(name, volume, ..)| (name.clone(), volume.clone())).collect();
    let answers = stage_all(&agent, &volumes);
    for (name, volume, image, lun, at) in &disks {
        let status = answers[name].as_ref().expect_err("what cannot be read should not be formatted");
        assert_eq!(status.code(), Code::Internal, "{name}: {status:?}");
        for word in [volume.id.as_str(), "EIO", "not taken for blank", &format!("/dev/{}", agent.guest.disk_at(*lun).unwrap().unwrap())] {
            assert!(status.message().contains(word), "{name}: no {word:?} in {status:?}");
        }
        // The place, by pages: the kernel reads no less.
        const PAGE_BYTES: u64 = 4096;
        let read = place(status.message()).unwrap_or_else(|| panic!("{name}: no place in {status:?}"));
        let pages = read.start / PAGE_BYTES * PAGE_BYTES..read.end.next_multiple_of(PAGE_BYTES);
        assert!(pages.contains(at), "{name}, at byte {at}: {status:?}");
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

/// W14: a device that fails, and then works. The disk goes, or loses its end, after libblkid was told its size and before it reads: for libblkid alone
/// a read that ends early is a device without a signature.
#[test]
fn guest_a_disk_that_vanishes_or_shrinks_while_it_is_probed_is_no_blank() {
    const AT: &str = "inside:stage:Probe:look";
    let Some(mut agent) = Agent::start_with_points("vanish") else { return };
    for (name, lun) in [("vanishes", 1_u8), ("shrinks", 2)] {
        let (handle, image) = (handle(name), Image::new(256 * MIB));
        agent.restart_to_hold(AT, &[]);
        let volume = agent.attach(&handle, &image, lun);
        wait_for_size(&agent.guest, lun, Some(256 * MIB));
        let device = format!("/dev/{}", agent.guest.disk_at(lun).unwrap().unwrap());
        let status = std::thread::scope(|scope| {
            let call = scope.spawn(|| agent.calls.node_stage_volume(volume.stage()));
            agent.wait_until_held(AT);
            if name == "vanishes" {
                agent.detach(lun);
            } else {
                // Where the last MiB was, nothing is any more.
                agent.guest.machine().resize(lun, 8 * MIB).unwrap();
                wait_for_size(&agent.guest, lun, Some(8 * MIB));
            }
            agent.let_go();
            call.join().unwrap().expect_err("a disk that went in the middle of a look should not be staged")
        });
        println!("{name}: {status:?}");
        assert_eq!(status.code(), Code::Internal, "{name}: {status:?}");
        for word in [volume.id.as_str(), "probe: read on", &device, "not taken for blank"] {
            assert!(status.message().contains(word), "{name}: no {word:?} in {status:?}");
        }
        // A read over the end is short, one that begins behind it has no place.
        assert!(["EIO", "EINVAL"].iter().any(|errno| status.message().contains(errno)), "{name}: {status:?}");
        let read = place(status.message()).unwrap_or_else(|| panic!("{name}: no place in {status:?}"));
        if name == "shrinks" {
            assert!(read.end > 8 * MIB, "{status:?}");
        }
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
