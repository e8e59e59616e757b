//! How a volume is shown, what stands in the way, and what the kernel says to a wrong option.

use proto::csi;
use proto::csi::volume_capability::{AccessType, access_mode::Mode};
use testbed::calls::NodeVolume;
use testbed::tools;
use tonic::{Code, Status};

use crate::harness::{Agent, Image, MIB, assert_clean, handle, wait_for_size};

pub(crate) fn with_flags(volume: &NodeVolume, flags: &[&str]) -> NodeVolume {
    let mut volume = volume.clone();
    let Some(AccessType::Mount(mount)) = &mut volume.capability.access_type else { panic!("no filesystem") };
    mount.mount_flags = flags.iter().map(|flag| (*flag).to_string()).collect();
    volume
}

pub(crate) fn mount_line(agent: &Agent, path: &str) -> String {
    let all = agent.guest.read("/proc/self/mounts").unwrap();
    all.lines().rfind(|line| line.split(' ').nth(1) == Some(&format!("/node{path}"))).unwrap_or_default().to_string()
}

pub(crate) fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, word: &str) {
    let status = answer.unwrap_err();
    assert!(status.code() == code && status.message().contains(word), "{status:?} should be {code:?} and say {word:?}");
    println!("{}", status.message());
}

/// W44: what is shown is compared with what is asked for.
#[test]
fn guest_modes_and_options() {
    let Some(agent) = Agent::start("modes") else { return };
    let (handle, image) = (handle("modes"), Image::new(64 * MIB));
    let mut volume = agent.attach(&handle, &image, 1);
    volume.volume_context.extend([("blockSize", "2048"), ("inodeSize", "512")].map(|(key, value)| (key.to_owned(), value.to_owned())));

    // The kernel's own word on an option that it does not know; then the same volume with good ones.
    let wrong = with_flags(&volume, &["noatime", "no_such_option"]);
    refused(agent.calls.node_stage_volume(wrong.stage()), Code::Internal, "Unknown parameter 'no_such_option'");
    let bad = with_flags(&volume, &["data=sideways"]);
    refused(agent.calls.node_stage_volume(bad.stage()), Code::Internal, "data");
    // A label is the kernel's business too; this one has no SELinux.
    let labelled = with_flags(&volume, &["context=\"system_u:object_r:ephemeral_t:s0:c1,c2\""]);
    refused(
        agent.calls.node_stage_volume(labelled.stage()),
        Code::Internal,
        "option \"context\"; the kernel says: ext4: Unknown parameter 'context'",
    );
    let mut good = with_flags(&volume, &["nodev", "commit=17"]);
    good.volume_context.insert("ssd".into(), "true".into());
    agent.stage(&good);
    let line = mount_line(&agent, &volume.staging);
    assert!(["noatime", "nodev", "commit=17"].iter().all(|option| line.contains(option)), "{line}");
    // s_log_block_size (1024 << n) and s_inode_size of ext4's superblock at byte 1024.
    assert_eq!(image.read_at(1024 + 0x18, 4), 1_u32.to_le_bytes(), "blockSize 2048");
    assert_eq!(image.read_at(1024 + 0x58, 2), 512_u16.to_le_bytes(), "inodeSize 512");

    // Read-only is the mount's, not the filesystem's, and from the first moment.
    let read_only = || csi::NodePublishVolumeRequest { readonly: true, ..volume.publish() };
    agent.calls.node_publish_volume(read_only()).unwrap();
    agent.calls.node_publish_volume(read_only()).unwrap();
    assert!(mount_line(&agent, &volume.target).split(' ').nth(3).unwrap().starts_with("ro,"));
    let error = format!("{:#}", agent.guest.write(&format!("/node{}/file", volume.target), b"x").unwrap_err());
    assert!(error.contains("Read-only") || error.contains("os error 30"), "{error}");
    agent.guest.write(&format!("/node{}/file", volume.staging), b"x").unwrap();
    refused(agent.calls.node_publish_volume(volume.publish()), Code::AlreadyExists, "read-only");

    // A second target: for one writer refused, for several not.
    let mut second = volume.publish();
    second.target_path = volume.target.replace("/mount", "/second");
    second.volume_capability.as_mut().unwrap().access_mode.as_mut().unwrap().mode = Mode::SingleNodeSingleWriter.into();
    refused(agent.calls.node_publish_volume(second.clone()), Code::FailedPrecondition, &volume.target);
    second.volume_capability.as_mut().unwrap().access_mode.as_mut().unwrap().mode = Mode::SingleNodeMultiWriter.into();
    agent.calls.node_publish_volume(second.clone()).unwrap();

    // Still published: unstage takes its own mount away, and does not give the disk free.
    refused(agent.calls.node_unstage_volume(volume.unstage()), Code::FailedPrecondition, "still in use");
    let unpublish = csi::NodeUnpublishVolumeRequest { volume_id: volume.id.clone(), target_path: second.target_path };
    agent.calls.node_unpublish_volume(unpublish).unwrap();
    agent.put_away(&volume);

    // Mounted read-only by its StorageClass: published as it is, though the pod does not ask for read-only.
    agent.stage(&with_flags(&volume, &["ro"]));
    agent.publish(&volume);
    agent.publish(&volume);
    assert!(mount_line(&agent, &volume.target).split(' ').nth(3).unwrap().starts_with("ro,"));
    agent.put_away(&volume);
    agent.detach(1);
    assert_clean(&image);
    the_owner_is_kubelets(&agent, &handle, &image);
    agent.guest.power_off().unwrap();
}

/// fsGroupPolicy File: kubelet gives the volume's root to the pod's group, and the agent leaves it so, however often the volume is staged.
fn the_owner_is_kubelets(agent: &Agent, handle: &proto::VolumeHandle, image: &Image) {
    let Some(debugfs) = tools::program("debugfs") else { return tools::skipped("debugfs is missing: the owner is not changed") };
    let run = |args: &[&str]| {
        let output = std::process::Command::new(&debugfs).args(args).arg(&image.0).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    for change in ["set_inode_field / gid 2000", "set_inode_field / mode 042775", "set_inode_field / uid 1000"] {
        run(&["-w", "-R", change]);
    }
    for lun in [1, 2] {
        let volume = agent.attach(handle, image, lun);
        agent.stage(&volume);
        agent.publish(&volume);
        agent.stage(&volume);
        agent.publish(&volume);
        for path in [&volume.staging, &volume.target] {
            assert_eq!(agent.guest.stat(&format!("/node{path}")).unwrap().unwrap().mode, 0o2775, "{path}");
        }
        agent.put_away(&volume);
        agent.detach(lun);
        let root = run(&["-R", "stat /"]);
        let words: Vec<&str> = root.split_whitespace().collect();
        let of = |name: &str| words.iter().position(|word| *word == name).and_then(|at| words.get(at + 1).copied());
        assert_eq!((of("User:"), of("Group:"), of("Mode:")), (Some("1000"), Some("2000"), Some("02775")), "{root}");
        assert_clean(image);
    }
}

/// W11: a folder that is not staged is not published. W12, W15: a stranger's mount is left alone, another volume's too. W30: an
/// offline disk is taken up. W33: the filesystem follows its disk at any stage, whoever grew it when.
#[test]
fn guest_what_stands_in_the_way() {
    let Some(agent) = Agent::start("obstacles") else { return };
    let (handle, image) = (handle("obstacles"), Image::new(64 * MIB));
    let volume = agent.attach(&handle, &image, 1);

    // A stranger's mount is left alone by every call.
    let (staging, target) = (format!("/node{}", volume.staging), format!("/node{}", volume.target));
    agent.guest.mount("none", &staging, "tmpfs", false).unwrap();
    refused(agent.calls.node_stage_volume(volume.stage()), Code::FailedPrecondition, "tmpfs");
    refused(agent.calls.node_unstage_volume(volume.unstage()), Code::FailedPrecondition, "tmpfs");
    assert_eq!(agent.mounted_at(&volume.staging), ["tmpfs"]);
    agent.guest.unmount(&staging).unwrap();

    // A folder is no staged volume.
    refused(agent.calls.node_publish_volume(volume.publish()), Code::FailedPrecondition, "not staged");
    assert_eq!(agent.guest.stat(&target).unwrap(), None);

    // Offline, as the reference driver leaves a disk that it unstaged.
    wait_for_size(&agent.guest, 1, Some(64 * MIB));
    let disk = agent.guest.disk_at(1).unwrap().unwrap();
    agent.guest.write(&format!("/sys/block/{disk}/device/state"), b"offline\n").unwrap();
    agent.stage(&volume);
    assert_eq!(agent.guest.read(&format!("/sys/block/{disk}/device/state")).unwrap().trim(), "running");

    // Another volume's stage finds this one's mount in its way.
    let mut next = agent.volume(&crate::harness::handle("next"), &image, 2);
    next.staging.clone_from(&volume.staging);
    refused(agent.calls.node_stage_volume(next.stage()), Code::FailedPrecondition, "not this volume's disk");
    assert_eq!(agent.mounted_at(&volume.staging), ["ext4"]);

    agent.guest.make_folder(&target).unwrap();
    agent.guest.mount("none", &target, "tmpfs", false).unwrap();
    refused(agent.calls.node_publish_volume(volume.publish()), Code::FailedPrecondition, "tmpfs");
    refused(agent.calls.node_unpublish_volume(volume.unpublish()), Code::FailedPrecondition, "tmpfs");
    refused(agent.calls.node_get_volume_stats(volume.stats()), Code::NotFound, "tmpfs");
    refused(agent.calls.node_expand_volume(volume.expand(1)), Code::NotFound, "tmpfs");
    assert_eq!(agent.mounted_at(&volume.target), ["tmpfs"]);
    agent.guest.unmount(&target).unwrap();
    agent.publish(&volume);

    // Another volume's id on this volume's path.
    let mut other = volume.clone();
    other.id = crate::harness::handle("somebody").to_string();
    refused(agent.calls.node_get_volume_stats(other.stats()), Code::NotFound, "not this volume's disk");
    refused(agent.calls.node_unpublish_volume(other.unpublish()), Code::FailedPrecondition, "not this volume's disk");
    refused(agent.calls.node_unstage_volume(other.unstage()), Code::FailedPrecondition, "not this volume's disk");

    agent.put_away(&volume);
    agent.detach(1);
    assert_clean(&image);

    // Grown while nobody had it staged: the filesystem follows at the next stage.
    image.resize(128 * MIB);
    let volume = agent.attach(&handle, &image, 2);
    agent.stage(&volume);
    let seen = agent.guest.stat_filesystem(&staging).unwrap();
    assert!(seen.blocks * seen.block_bytes > 110 * MIB, "{seen:?}");
    refused(agent.calls.node_get_volume_stats(volume.stats()), Code::NotFound, "volume_path");
    agent.put_away(&volume);
    agent.detach(2);
    assert_clean(&image);
    agent.guest.power_off().unwrap();
}
