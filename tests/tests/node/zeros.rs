//! What is written to a disk that reads as zeros, and to one that may not: by the block device's own counters.

use std::time::Duration;

use proto::{publish_context, volume_context};
use serde_json::json;
use testbed::calls::mount_capability;
use testbed::guest::wait;
use tonic::Code;

use crate::harness::{Agent, Image, MIB, SEEN_LIMIT, assert_clean, handle, wait_for_size};
use crate::xfs::assert_clean_xfs;

const GIB: u64 = 1 << 30;
/// The kernel begins to zero inode tables within 5 s of a mount, and reads all bitmaps first: 800 groups, under TCG. After each group
/// it rests for ten times as long as that one took: on a busy machine, minutes in all.
const LAZY_LIMIT: Duration = Duration::from_secs(300);

#[test]
fn guest_bytes_written_to_disks_of_zeros() {
    let Some(agent) = Agent::start("zeros") else { return };
    // ext4: made, mounted, and all that the kernel does with it by itself.
    let image = Image::new(100 * GIB);
    let volume = agent.attach(&handle("zeros-ext4"), &image, 1);
    agent.stage(&volume);
    let idle = wait::until(LAZY_LIMIT, || agent.guest.has_thread("ext4lazyinit").map(|runs| (!runs).then_some(())));
    assert!(idle.unwrap().is_some(), "the kernel still works on the inode tables; {}", agent.guest.quote());
    agent.guest.drop_caches().unwrap();
    let (written, allocated) = (agent.guest.disk_written_bytes(1).unwrap(), image.allocated_bytes());
    println!("100 GiB ext4: {written} bytes written, {allocated} on the host");
    assert!(written <= 6 * MIB && allocated <= 6 * MIB, "{written} bytes written, {allocated} on the host");
    agent.put_away(&volume);
    agent.detach(1);
    assert_clean(&image);

    // xfs: formatted and, for an option that there is not, not mounted. Then mounted: from 5.10 to 6.12 each mount clears 2 MiB of
    // the log ahead of its head (xlog_clear_stale_blocks).
    let image = Image::new(1024 * GIB);
    let mut volume = agent.attach(&handle("zeros-xfs"), &image, 1);
    volume.capability = mount_capability("xfs");
    let mut unmountable = volume.stage();
    set_mount_flags(&mut unmountable, &["no-such-option"]);
    let refused = agent.calls.node_stage_volume(unmountable).unwrap_err();
    assert!(refused.message().contains("no-such-option"), "{refused:?}");
    let formatted = agent.guest.disk_written_bytes(1).unwrap();
    agent.stage(&volume);
    agent.guest.drop_caches().unwrap();
    let mounted = agent.guest.disk_written_bytes(1).unwrap();
    println!("1 TiB xfs: {formatted} bytes written, {mounted} with the mount, {} on the host", image.allocated_bytes());
    assert!(formatted <= MIB / 5, "{formatted} bytes written");
    assert!(mounted - formatted <= 5 * MIB / 2, "{mounted} bytes written with the mount");
    agent.put_away(&volume);
    agent.detach(1);
    assert_clean_xfs(&image.0);

    // Nothing said of zeros: the journal of 32 MiB is zeroed.
    let image = Image::new(GIB);
    let mut volume = agent.attach(&handle("unsure"), &image, 1);
    volume.publish_context.remove(publish_context::ZEROED);
    agent.stage(&volume);
    let written = agent.guest.disk_written_bytes(1).unwrap();
    assert!(written >= 32 * MIB, "{written} bytes written");
    // The kernel was not told that the inode tables are zero: 2 MiB in each of 8 groups.
    let zeroed = wait::until(LAZY_LIMIT, || agent.guest.disk_written_bytes(1).map(|now| (now >= written + 15 * MIB).then_some(())));
    assert!(zeroed.unwrap().is_some(), "the kernel leaves the inode tables as they are; {}", agent.guest.quote());
    agent.put_away(&volume);
    agent.detach(1);
    assert_clean(&image);
    agent.guest.power_off().unwrap();
}

fn set_mount_flags(stage: &mut proto::csi::NodeStageVolumeRequest, flags: &[&str]) {
    use proto::csi::volume_capability::AccessType;
    if let Some(AccessType::Mount(mount)) = stage.volume_capability.as_mut().and_then(|capability| capability.access_type.as_mut()) {
        mount.mount_flags = flags.iter().map(ToString::to_string).collect();
    }
}

/// With `noinit_itable` the kernel would zero the new inode tables, 1.6 % of the disk, before the call that grows ends.
#[test]
fn guest_growing_does_not_zero_inode_tables() {
    let Some(agent) = Agent::start("grow-zeros") else { return };
    let image = Image::new(GIB);
    let volume = agent.attach(&handle("noinit"), &image, 1);
    let mut stage = volume.stage();
    set_mount_flags(&mut stage, &["noinit_itable", "noatime", "commit=7"]);
    agent.calls.node_stage_volume(stage).unwrap();
    agent.publish(&volume);
    let options = || {
        let table = agent.guest.read("/proc/self/mountinfo").unwrap();
        let line = table.lines().find(|line| line.contains(&volume.target)).unwrap().to_owned();
        ["noinit_itable", "noatime", "commit=7"].map(|option| line.contains(option))
    };
    assert_eq!(options(), [true, true, true]);
    image.resize(10 * GIB);
    agent.guest.machine().resize(1, 10 * GIB).unwrap();
    wait_for_size(&agent.guest, 1, Some(10 * GIB));
    let before = agent.guest.disk_written_bytes(1).unwrap();
    agent.calls.node_expand_volume(volume.expand(10 * GIB)).unwrap();
    let written = agent.guest.disk_written_bytes(1).unwrap() - before;
    assert_eq!(options(), [false, true, true], "the other options stay");
    // 3.3 MiB of it; of the 147 MiB of inode tables the kernel's thread may have begun some.
    assert!(written <= 30 * MIB, "growing wrote {written} bytes");
    agent.put_away(&volume);
    agent.detach(1);
    assert_clean(&image);
    agent.guest.power_off().unwrap();
}

/// A disk that zeroes slowly does not hold up the end of the agent; the next one formats it again.
#[test]
fn guest_agent_told_to_end_while_it_zeroes() {
    let Some(mut agent) = Agent::start("end-zeros") else { return };
    for (name, kind) in [("end-ext4", "ext4"), ("end-xfs", "xfs")] {
        let image = Image::new(GIB);
        let mut volume = agent.attach(&handle(name), &image, 1);
        volume.publish_context.remove(publish_context::ZEROED);
        volume.volume_context.remove(volume_context::BLOCK_SIZE);
        volume.capability = mount_capability(kind);
        agent.throttle(1, json!({ "iops-write": 20 }));
        let (calls, request) = (agent.calls.clone(), volume.stage());
        let staging = std::thread::spawn(move || calls.node_stage_volume(request));
        let marked = wait::until(SEEN_LIMIT, || Ok::<_, ()>((image.read_at(0, 512) != [0; 512]).then_some(())));
        assert_eq!(marked, Ok(Some(())), "the mark never came");
        agent.guest.signal(agent.job, 15).unwrap();
        let stopped = staging.join().unwrap().unwrap_err();
        assert_eq!(stopped.code(), Code::Unavailable, "{stopped:?}");
        assert!(stopped.message().contains("stopped after it had zeroed") && stopped.message().contains(&volume.id), "{stopped:?}");
        let ended = agent.guest.wait(agent.job, SEEN_LIMIT).unwrap();
        assert_eq!(ended.exit.code, Some(0), "{}", ended.output);
        assert_eq!(image.read_at(0, 26), b"PVE-CSI unfinished format\n");
        agent.throttle(1, json!({}));
        agent.restart();
        agent.stage(&volume);
        assert_eq!(agent.mounted_at(&volume.staging), [kind]);
        agent.put_away(&volume);
        agent.detach(1);
        if kind == "xfs" { assert_clean_xfs(&image.0) } else { assert_clean(&image) }
    }
    agent.guest.power_off().unwrap();
}
