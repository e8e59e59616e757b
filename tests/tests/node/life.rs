//! One volume's life on a node, over the socket of the release binary, in a root that holds no program.

use std::time::Duration;

use proto::csi;
use proto::csi::volume_capability::access_mode::Mode;
use testbed::calls::{NodeVolume, block_capability};
use tonic::Code;

use crate::harness::{Agent, Image, MIB, NODE_ID, assert_clean, handle, wait_for_size};
use crate::luks::judge;
use crate::modes::mount_line;

#[test]
fn guest_life_of_a_volume() {
    let Some(agent) = Agent::start("life") else { return };
    let (handle, image) = (handle("life"), Image::new(256 * MIB));
    let volume = agent.attach(&handle, &image, 1);

    // Every call twice: the second finds all done.
    agent.stage(&volume);
    agent.stage(&volume);
    assert_eq!(agent.mounted_at(&volume.staging), ["ext4"]);
    agent.publish(&volume);
    agent.publish(&volume);
    assert_eq!(agent.mounted_at(&volume.target), ["ext4"]);

    let file = format!("/node{}/file", volume.target);
    let written = agent.guest.fill(&file, 1, 20 * MIB).unwrap();
    assert_stats(&agent, &volume);

    image.resize(512 * MIB);
    agent.guest.machine().resize(1, 512 * MIB).unwrap();
    wait_for_size(&agent.guest, 1, Some(512 * MIB));
    let before = agent.guest.stat_filesystem(&format!("/node{}", volume.target)).unwrap();
    for _ in 0..2 {
        let answer = agent.calls.node_expand_volume(volume.expand(512 * MIB)).unwrap();
        assert!(answer.capacity_bytes >= i64::try_from(512 * MIB).unwrap(), "{answer:?}");
    }
    let after = agent.guest.stat_filesystem(&format!("/node{}", volume.target)).unwrap();
    assert!(after.blocks > before.blocks * 19 / 10, "{before:?} {after:?}");
    assert_stats(&agent, &volume);

    agent.put_away(&volume);
    agent.put_away(&volume);
    assert!(agent.mounted_at(&volume.staging).is_empty() && agent.mounted_at(&volume.target).is_empty());
    assert_eq!(agent.guest.stat(&format!("/node{}", volume.target)).unwrap(), None, "the target is the driver's to remove");
    agent.detach(1);
    assert_clean(&image);

    // Another slot, as after a move to another VM: the data is there, and read from the disk.
    let volume = agent.attach(&handle, &image, 4);
    agent.stage(&volume);
    agent.publish(&volume);
    agent.guest.drop_caches().unwrap();
    assert_eq!(agent.guest.sha256(&file).unwrap(), written);
    agent.put_away(&volume);
    agent.detach(4);
    assert_clean(&image);
    agent.guest.power_off().unwrap();
}

fn assert_stats(agent: &Agent, volume: &testbed::calls::NodeVolume) {
    let seen = agent.guest.stat_filesystem(&format!("/node{}", volume.target)).unwrap();
    let answer = agent.calls.node_get_volume_stats(volume.stats()).unwrap();
    let usage = |unit: csi::volume_usage::Unit| *answer.usage.iter().find(|usage| usage.unit == i32::from(unit)).unwrap();
    let bytes = usage(csi::volume_usage::Unit::Bytes);
    let expected =
        [seen.blocks, seen.blocks_available, seen.blocks - seen.blocks_free].map(|blocks| (blocks * seen.block_bytes).cast_signed());
    assert_eq!([bytes.total, bytes.available, bytes.used], expected);
    let inodes = usage(csi::volume_usage::Unit::Inodes);
    let expected = [seen.inodes, seen.inodes_free, seen.inodes - seen.inodes_free].map(u64::cast_signed);
    assert_eq!([inodes.total, inodes.available, inodes.used], expected);
}

#[test]
fn guest_node_is_alone_and_small() {
    let Some(agent) = Agent::start("alone") else { return };
    let info = agent.calls.node_get_info(csi::NodeGetInfoRequest {}).unwrap();
    assert_eq!(info.node_id, NODE_ID);
    let segments = info.accessible_topology.unwrap().segments;
    assert_eq!(segments.get(proto::TOPOLOGY_REGION).map(String::as_str), Some("region-1"));
    assert_eq!(segments.get(proto::TOPOLOGY_ZONE).map(String::as_str), Some("pve-1"));

    // Nothing else is there to be started: neither a program nor a library.
    assert_eq!(agent.guest.list("/node").unwrap(), ["csi", "dev", "proc", "proxmox-csi-node", "sys", "var"]);
    assert_eq!(agent.guest.list("/node/var").unwrap(), ["lib"]);
    assert_eq!(agent.guest.list("/node/var/lib").unwrap(), ["kubelet"]);
    // What the next agent has to know lies beside the socket.
    assert_eq!(agent.guest.list("/node/csi").unwrap(), ["csi.sock", "rotations-outstanding"]);
    let socket = agent.guest.stat("/node/csi/csi.sock").unwrap().unwrap();
    assert_eq!(socket.mode, 0o600, "the socket is its owner's alone");

    let idle_kib = agent.guest.resident_kib(agent.job.pid).unwrap();
    let (handle, image) = (handle("alone"), Image::new(64 * MIB));
    let volume = agent.attach(&handle, &image, 1);
    agent.stage(&volume);
    agent.put_away(&volume);
    let worked_kib = agent.guest.resident_kib(agent.job.pid).unwrap();
    println!("node: resident {idle_kib} KiB when idle, {worked_kib} KiB after staging a volume");
    assert!(idle_kib <= 2500, "idle RSS is {idle_kib} KiB: 2.5 MB at most");
    // It has never had a child.
    let children = agent.guest.read(&format!("/proc/{0}/task/{0}/children", agent.job.pid)).unwrap_or_default();
    assert_eq!(children.trim(), "");

    agent.guest.signal(agent.job, 15).unwrap();
    let ended = agent.guest.wait(agent.job, Duration::from_secs(30)).unwrap();
    assert_eq!(ended.exit.code, Some(0), "SIGTERM ends it well: {}", ended.output);
    agent.guest.power_off().unwrap();
}

/// W44: published twice is shown once. W46: the new size is there, whether virtio-scsi tells the kernel of it or the agent asks.
#[test]
fn guest_block_volume() {
    let Some(agent) = Agent::start("block") else { return };
    let (handle, image) = (handle("block"), Image::new(64 * MIB));
    let mut volume = agent.attach(&handle, &image, 2);
    volume.capability = block_capability();
    agent.stage(&volume);
    agent.publish(&volume);
    agent.publish(&volume);
    assert_eq!(agent.mounted_at(&volume.target).len(), 1);
    let target = format!("/node{}", volume.target);
    agent.guest.write_at(&target, 33 * MIB, b"block").unwrap();
    assert_eq!(image.read_at(33 * MIB, 5), b"block");
    image.resize(96 * MIB);
    agent.guest.machine().resize(2, 96 * MIB).unwrap();
    let answer = agent.calls.node_expand_volume(volume.expand(96 * MIB)).unwrap();
    assert_eq!(answer.capacity_bytes, (96 * MIB).cast_signed());
    let stats = agent.calls.node_get_volume_stats(volume.stats()).unwrap();
    assert_eq!(stats.usage[0].total, (96 * MIB).cast_signed());
    still_in_use(&agent, &volume, &format!("shown at {}", volume.target));
    agent.guest.write_at(&target, 34 * MIB, b"still").unwrap();
    agent.calls.node_unpublish_volume(volume.unpublish()).unwrap();
    read_only_is_the_binds(&agent, &volume, &image);
    a_pods_own_mapping_holds_the_disk(&agent, &volume);
    agent.put_away(&volume);
    agent.put_away(&volume);
    assert_eq!(agent.guest.stat(&target).unwrap(), None);
    agent.detach(2);

    // Its disk goes while it is published, and another volume's gets its number: what the target shows is nobody's.
    let volume = NodeVolume { capability: block_capability(), ..agent.attach(&handle, &image, 2) };
    agent.stage(&volume);
    agent.publish(&volume);
    let number = |lun| {
        wait_for_size(&agent.guest, lun, Some(96 * MIB));
        let disk = agent.guest.disk_at(lun).unwrap().unwrap();
        agent.guest.read(&format!("/sys/block/{disk}/dev")).unwrap()
    };
    let had = number(2);
    agent.detach(2);
    let condition = agent.calls.node_get_volume_stats(volume.stats()).unwrap().volume_condition.unwrap();
    assert!(condition.abnormal && condition.message.contains("no longer there"), "{condition:?}");
    let other = Image::new(96 * MIB);
    agent.attach(&crate::harness::handle("block-other"), &other, 3);
    assert_eq!(number(3), had, "the kernel gives the lowest number that is free");
    let condition = agent.calls.node_get_volume_stats(volume.stats()).unwrap().volume_condition.unwrap();
    assert!(condition.abnormal, "{condition:?}");
    // Shown anew from where it is now; then taken away while its node is another's again.
    let volume = NodeVolume { capability: block_capability(), ..agent.attach(&handle, &image, 4) };
    agent.publish(&volume);
    agent.guest.write_at(&target, 40 * MIB, b"again").unwrap();
    assert_eq!(image.read_at(40 * MIB, 5), b"again");
    let had = number(4);
    agent.detach(4);
    let third = Image::new(96 * MIB);
    agent.attach(&crate::harness::handle("block-third"), &third, 5);
    assert_eq!(number(5), had);
    agent.put_away(&volume);
    assert_eq!(agent.guest.stat(&target).unwrap(), None);
    assert!([other, third].iter().all(|image| image.allocated_bytes() == 0), "another volume's disk was written to");
    agent.guest.power_off().unwrap();
}

/// An unstage that must not give the disk up, and says who has it.
pub(crate) fn still_in_use(agent: &Agent, volume: &NodeVolume, by: &str) {
    let status = agent.calls.node_unstage_volume(volume.unstage()).unwrap_err();
    let is_right = status.code() == Code::FailedPrecondition && status.message().contains("still in use") && status.message().contains(by);
    assert!(is_right, "{status:?} should say {by:?}");
    println!("{}", status.message());
}

/// docs/storageclass.md: a read-only bind of a device node says so in the mount table, and keeps nobody from writing to the device; kubelet does, by
/// what it allows the container.
fn read_only_is_the_binds(agent: &Agent, volume: &NodeVolume, image: &Image) {
    let mut by_mode = volume.publish();
    by_mode.volume_capability.as_mut().unwrap().access_mode.as_mut().unwrap().mode = Mode::SingleNodeReaderOnly.into();
    for request in [csi::NodePublishVolumeRequest { readonly: true, ..volume.publish() }, by_mode] {
        agent.calls.node_publish_volume(request.clone()).unwrap();
        agent.calls.node_publish_volume(request).unwrap();
        let line = mount_line(agent, &volume.target);
        assert!(line.split(' ').nth(3).unwrap().starts_with("ro,"), "{line}");
        let status = agent.calls.node_publish_volume(volume.publish()).unwrap_err();
        assert!(status.code() == Code::AlreadyExists && status.message().contains("read-only"), "{status:?}");
        agent.guest.write_at(&format!("/node{}", volume.target), 35 * MIB, b"bound").unwrap();
        assert_eq!(image.read_at(35 * MIB, 5), b"bound", "the docs say too little of a read-only raw block volume");
        image.write_at(35 * MIB, b"-----");
        agent.calls.node_unpublish_volume(volume.unpublish()).unwrap();
    }
}

/// A pod's own dm-crypt or LVM on a raw block volume, which outlives the pod: as long as something in it is mounted, the disk is not given up.
fn a_pods_own_mapping_holds_the_disk(agent: &Agent, volume: &NodeVolume) {
    let disk = agent.guest.disk_at(2).unwrap().unwrap();
    let table = |name: &str, below: &str, sectors: u64| {
        judge(agent, "dmsetup", &["create", "--noudevsync", name, "--table", &format!("0 {sectors} linear {below} 0")])
    };
    // Two, one above the other.
    let Some((code, output)) = table("pods-disk", &format!("/dev/{disk}"), 65536) else { return };
    assert_eq!(code, Some(0), "{output}");
    let (code, output) = table("pods-part", "/dev/dm-0", 32768).unwrap();
    assert_eq!(code, Some(0), "{output}");
    let (code, output) = judge(agent, "mke2fs", &["-F", "-q", "/dev/dm-1"]).unwrap();
    assert_eq!(code, Some(0), "{output}");
    agent.guest.make_folder("/pods-own").unwrap();
    agent.guest.mount("/dev/dm-1", "/pods-own", "ext4", false).unwrap();
    agent.guest.write("/pods-own/file", b"not on the disk yet").unwrap();
    still_in_use(agent, volume, "held by dm-1");
    agent.guest.unmount("/pods-own").unwrap();
    // What waits for a device that is suspended would wait for ever.
    judge(agent, "dmsetup", &["suspend", "pods-part"]).unwrap();
    still_in_use(agent, volume, "held by dm-1, which is suspended");
    judge(agent, "dmsetup", &["resume", "pods-part"]).unwrap();
    // Nothing uses them: as with what the node's system activates by itself, the disk is given up.
    agent.calls.node_unstage_volume(volume.unstage()).unwrap();
    for name in ["pods-part", "pods-disk"] {
        let (code, output) = judge(agent, "dmsetup", &["remove", "--noudevsync", name]).unwrap();
        assert_eq!(code, Some(0), "{output}");
    }
}

#[test]
fn guest_requests_that_are_wrong() {
    let Some(agent) = Agent::start("wrong") else { return };
    let (handle, image) = (handle("wrong"), Image::new(64 * MIB));
    let volume = agent.volume(&handle, &image, 1);
    let stage = |change: fn(&mut csi::NodeStageVolumeRequest)| {
        let mut request = volume.stage();
        change(&mut request);
        let status = agent.calls.node_stage_volume(request).unwrap_err();
        (status.code(), status.message().to_string())
    };
    type Change = fn(&mut csi::NodeStageVolumeRequest);
    let wrong: [(Code, &str, Change); 6] = [
        // Empty: never a key, and never plaintext instead.
        (Code::InvalidArgument, "encryption-passphrase", |request| {
            drop(request.secrets.insert("encryption-passphrase".into(), String::new()))
        }),
        (Code::InvalidArgument, "staging_target_path", |request| request.staging_target_path = "/etc".into()),
        (Code::InvalidArgument, "staging_target_path", |request| request.staging_target_path = "/var/lib/kubelet/../x".into()),
        (Code::InvalidArgument, "volume_capability", |request| request.volume_capability = None),
        (Code::InvalidArgument, "serial", |request| drop(request.publish_context.insert("serial".into(), "csi-0000000000000000".into()))),
        (Code::InvalidArgument, "region-1", |request| request.volume_id = "region-1".into()),
    ];
    for (code, word, change) in wrong {
        let (got, message) = stage(change);
        assert!(got == code && message.contains(word), "{got:?} {message:?} should be {code:?} and name {word}");
    }
    agent.guest.power_off().unwrap();
}
