//! xfs as ext4 has it in the other files; and what is found on a disk against what is asked for.

use std::path::Path;
use std::process::Command;

use disk::{Write, xfs};
use proto::{publish_context, volume_context};
use serde_json::json;
use testbed::calls::{NodeVolume, mount_capability};
use testbed::guest::wait;
use testbed::tools;
use tonic::Code;

use crate::harness::{Agent, Image, MIB, SEEN_LIMIT, assert_clean, handle, wait_for_size};

const SIZE: u64 = 512 * MIB;

/// xfs_repair's word on an image that no guest has: 0 is clean.
pub(crate) fn assert_clean_xfs(image: &Path) {
    let Some(xfs_repair) = tools::program("xfs_repair") else { return tools::skipped("xfs_repair is missing: the image is not judged") };
    let output = Command::new(xfs_repair).args(["-n", "-f"]).arg(image).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
}

/// Plugged, and staged as xfs by its class.
fn attach_xfs(agent: &Agent, name: &str, image: &Image, lun: u8) -> NodeVolume {
    let mut volume = agent.attach(&handle(name), image, lun);
    volume.capability = mount_capability("xfs");
    volume
}

fn blocks(agent: &Agent, volume: &NodeVolume) -> u64 {
    agent.guest.stat_filesystem(&format!("/node{}", volume.target)).unwrap().blocks
}

/// Stage is refused; the image is byte for byte what it was. Answers code and sentence.
fn refused(agent: &Agent, volume: &NodeVolume, image: &Image) -> (Code, String) {
    let before = image.bytes();
    let status = agent.calls.node_stage_volume(volume.stage()).expect_err("stage should be refused");
    assert!(status.message().contains(&volume.id), "{status:?}");
    assert!(image.bytes() == before, "the disk was written to: {status:?}");
    assert!(agent.mounted_at(&volume.staging).is_empty());
    (status.code(), status.message().to_string())
}

#[test]
fn guest_life_of_an_xfs() {
    let Some(agent) = Agent::start("xfs") else { return };
    let image = Image::new(SIZE);
    let volume = attach_xfs(&agent, "xfs", &image, 1);
    for _ in 0..2 {
        agent.stage(&volume);
        agent.publish(&volume);
    }
    assert_eq!((agent.mounted_at(&volume.staging), agent.mounted_at(&volume.target)), (vec!["xfs".into()], vec!["xfs".into()]));
    let file = format!("/node{}/file", volume.target);
    let written = agent.guest.fill(&file, 1, 20 * MIB).unwrap();

    // Less than 16 MiB more would be a tiny group: left alone, and no failure. Then twice the size.
    let first = blocks(&agent, &volume);
    for (size_bytes, grown) in [(SIZE + 8 * MIB, false), (2 * SIZE, true)] {
        image.resize(size_bytes);
        agent.guest.machine().resize(1, size_bytes).unwrap();
        wait_for_size(&agent.guest, 1, Some(size_bytes));
        for _ in 0..2 {
            let answer = agent.calls.node_expand_volume(volume.expand(size_bytes)).unwrap();
            assert_eq!(answer.capacity_bytes, size_bytes.cast_signed());
        }
        let now = blocks(&agent, &volume);
        assert!(if grown { now - first == SIZE / 4096 } else { now == first }, "{first} {now}");
    }
    agent.put_away(&volume);
    agent.detach(1);
    assert_clean_xfs(&image.0);

    // Grown while it was away: stage does it. The data is there, and read from the disk.
    image.resize(3 * SIZE);
    let volume = attach_xfs(&agent, "xfs", &image, 4);
    agent.stage(&volume);
    agent.publish(&volume);
    assert_eq!(blocks(&agent, &volume) - first, 2 * SIZE / 4096);
    agent.guest.drop_caches().unwrap();
    assert_eq!(agent.guest.sha256(&file).unwrap(), written);
    agent.put_away(&volume);
    agent.detach(4);
    assert_clean_xfs(&image.0);

    // Block and inode size of the class.
    let small = Image::new(SIZE);
    let mut volume = attach_xfs(&agent, "xfs-small", &small, 1);
    volume.volume_context.extend([(volume_context::BLOCK_SIZE.into(), "1024".into()), (volume_context::INODE_SIZE.into(), "512".into())]);
    agent.stage(&volume);
    agent.publish(&volume);
    assert_eq!(agent.guest.stat_filesystem(&format!("/node{}", volume.target)).unwrap().block_bytes, 1024);
    agent.put_away(&volume);
    agent.detach(1);
    assert_clean_xfs(&small.0);
    agent.guest.power_off().unwrap();
}

#[test]
fn guest_agent_killed_while_it_formats_an_xfs() {
    let Some(mut agent) = Agent::start("killed-xfs") else { return };
    let image = Image::new(SIZE);
    let mut volume = attach_xfs(&agent, "killed-xfs", &image, 1);
    // Nothing said of zeros: the log is zeroed, 64 writes of 1 MiB.
    volume.publish_context.remove(publish_context::ZEROED);
    for round in 0..3 {
        image.write_at(0, &[0; 512]);
        agent.throttle(1, json!({ "iops-write": 20 }));
        let (calls, request) = (agent.calls.clone(), volume.stage());
        let staging = std::thread::spawn(move || calls.node_stage_volume(request));
        let marked = wait::until(SEEN_LIMIT, || Ok::<_, ()>((image.read_at(0, 512) != [0; 512]).then_some(())));
        assert_eq!(marked, Ok(Some(())), "the mark never came");
        agent.restart();
        let killed = staging.join().unwrap();
        assert!(killed.is_err() && image.read_at(0, 4) != b"XFSB", "round {round}: the kill came too late: {killed:?}");
        agent.throttle(1, json!({}));
    }
    agent.stage(&volume);
    assert_eq!(agent.mounted_at(&volume.staging), ["xfs"]);
    agent.publish(&volume);
    agent.restart();
    agent.stage(&volume);
    agent.put_away(&volume);
    agent.detach(1);
    assert_clean_xfs(&image.0);
    agent.guest.power_off().unwrap();
}

#[test]
fn guest_xfs_that_cannot_be_made() {
    let Some(agent) = Agent::start("no-xfs") else { return };
    let image = Image::new(299 * MIB);
    let mut volume = attach_xfs(&agent, "small", &image, 1);
    let (code, sentence) = refused(&agent, &volume, &image);
    assert_eq!(code, Code::OutOfRange, "{sentence}");
    assert!(sentence.contains("314572800") && sentence.contains(&(299 * MIB).to_string()), "{sentence}");
    agent.detach(1);

    image.resize(300 * MIB);
    volume = attach_xfs(&agent, "small", &image, 1);
    volume.volume_context.insert(volume_context::INODE_SIZE.into(), "256".into());
    let (code, sentence) = refused(&agent, &volume, &image);
    assert!(code == Code::InvalidArgument && sentence.contains("xfs inode size 256"), "{code:?} {sentence}");

    // ext3 is mounted where it is, and never made.
    volume.volume_context.remove(volume_context::INODE_SIZE);
    volume.capability = mount_capability("ext3");
    let (code, sentence) = refused(&agent, &volume, &image);
    assert!(code == Code::FailedPrecondition && sentence.contains("ext3"), "{code:?} {sentence}");

    volume.capability = mount_capability("btrfs");
    let (code, sentence) = refused(&agent, &volume, &image);
    assert!(code == Code::InvalidArgument && sentence.contains("\"btrfs\" is not supported"), "{code:?} {sentence}");

    // 300 MiB are enough.
    volume.capability = mount_capability("xfs");
    agent.stage(&volume);
    agent.put_away(&volume);
    agent.detach(1);
    assert_clean_xfs(&image.0);
    agent.guest.power_off().unwrap();
}

/// An xfs that somebody else made.
fn foreign_xfs(size_bytes: u64) -> Image {
    let image = Image::new(size_bytes);
    let options = xfs::Options { reads_zeros: true, ..xfs::Options::new(size_bytes, [7; 16], 1_700_000_000) };
    for write in xfs::plan(&options).unwrap() {
        if let Write::Data { offset, bytes } = write {
            image.write_at(offset, &bytes);
        }
    }
    image
}

#[test]
fn guest_xfs_of_somebody_else() {
    let Some(agent) = Agent::start("foreign-xfs") else { return };
    // ext4 is asked for, an xfs is there: it is mounted, and the log says so. A second one of the same UUID beside it.
    let images = [foreign_xfs(SIZE), foreign_xfs(SIZE)];
    let volumes = [agent.attach(&handle("twin-1"), &images[0], 1), agent.attach(&handle("twin-2"), &images[1], 2)];
    for volume in &volumes {
        agent.stage(volume);
        agent.publish(volume);
        assert_eq!(agent.mounted_at(&volume.staging), ["xfs"]);
    }
    let (_, log) = agent.guest.output(agent.job).unwrap();
    assert!(log.contains("ext4 is asked for, xfs is on the disk: mounting what is there"), "{log}");
    let file = format!("/node{}/file", volumes[0].target);
    let written = agent.guest.fill(&file, 7, MIB).unwrap();
    for volume in &volumes {
        agent.put_away(volume);
    }
    agent.detach(2);
    agent.stage(&volumes[0]);
    agent.publish(&volumes[0]);
    assert_eq!(agent.guest.sha256(&file).unwrap(), written);
    agent.put_away(&volumes[0]);
    agent.detach(1);
    assert_clean_xfs(&images[0].0);

    // Its first superblock damaged, then lost: named, never formatted, whatever is asked for.
    for (length, byte) in [(4, 0xff), (usize::try_from(4 * MIB).unwrap(), 0)] {
        images[0].write_at(8, &vec![byte; length]);
        if byte == 0 {
            images[0].write_at(0, &[0; 8]);
        }
        let mut volume = agent.attach(&handle("twin-1"), &images[0], 1);
        for fstype in ["ext4", "xfs"] {
            volume.capability = mount_capability(fstype);
            let (code, sentence) = refused(&agent, &volume, &images[0]);
            assert!(code == Code::FailedPrecondition && sentence.contains("xfs"), "{code:?} {sentence}");
            println!("{fstype} asked for, {length} bytes of the head lost: {sentence}");
        }
        agent.detach(1);
    }
    agent.guest.power_off().unwrap();
}

#[test]
fn guest_ext2_and_ext3_are_mounted_and_grown_and_btrfs_is_refused() {
    let Some(agent) = Agent::start("old-ext") else { return };
    let Some(mke2fs) = tools::program("mke2fs") else { return tools::skipped("mke2fs is missing: no ext2, no ext3") };
    for (kind, asked) in [("ext2", "ext2"), ("ext3", "ext3"), ("ext3", "ext4")] {
        let image = Image::new(64 * MIB);
        let made = Command::new(&mke2fs).args(["-q", "-F", "-t", kind]).arg(&image.0).output().unwrap();
        assert!(made.status.success(), "{made:?}");
        image.resize(128 * MIB);
        let mut volume = agent.attach(&handle(kind), &image, 1);
        volume.capability = mount_capability(asked);
        agent.stage(&volume);
        agent.publish(&volume);
        let size_bytes =
            agent.guest.stat_filesystem(&format!("/node{}", volume.target)).map(|seen| seen.blocks * seen.block_bytes).unwrap();
        assert!(size_bytes > 110 * MIB, "{kind}: {size_bytes} bytes after growing");
        agent.put_away(&volume);
        agent.detach(1);
        assert_clean(&image);
    }
    // A btrfs superblock: at 64 KiB, its magic 64 bytes in (libblkid's magic of it; the rest is nonsense).
    let image = Image::new(32 * MIB);
    image.write_at((64 << 10) + 64, b"_BHRfS_M");
    let volume = agent.attach(&handle("btrfs"), &image, 1);
    let (code, sentence) = refused(&agent, &volume, &image);
    println!("btrfs: {sentence}");
    assert_eq!(code, Code::FailedPrecondition, "{sentence}");
    agent.detach(1);
    agent.guest.power_off().unwrap();
}
