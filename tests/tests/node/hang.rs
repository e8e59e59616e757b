//! What waits for ever holds nobody else up, is answered all the same, and is begun once.

use std::time::Duration;

use serde_json::json;
use testbed::calls::NodeVolume;
use testbed::guest::{GuestOptions, ScsiHardware, wait};
use testbed::tools;
use tonic::Code;

use crate::harness::{Agent, Image, MIB, SEEN_LIMIT, assert_clean, handle, start_node, wait_for_size};

const HELD_AT: &str = "inside:unstage:Unmount:umount2";
const VOLUMES: u8 = 8;

/// An agent whose calls are answered after two seconds, and with `hold` one that keeps the first call there for ever.
fn restart(agent: &mut Agent, hold: Option<&str>) {
    agent.guest.signal(agent.job, 9).unwrap();
    agent.guest.wait(agent.job, SEEN_LIMIT).unwrap();
    let hold = hold.map(|hold| ("PROXMOX_CSI_HOLD_AT", hold));
    agent.job = start_node(&agent.guest, &[&[("PROXMOX_CSI_LIMIT_MS", "2000")], hold.as_slice()].concat());
}

/// Its first answer, and what a second call is told.
fn assert_late(agent: &Agent, volume: &NodeVolume) {
    let status = agent.calls.node_unstage_volume(volume.unstage()).expect_err("it cannot be done");
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    assert!(status.message().contains("unstage, at \"unmount\" for ") && status.message().contains(&volume.id), "{status:?}");
    let status = agent.calls.node_unstage_volume(volume.unstage()).expect_err("it still goes on");
    assert!(status.code() == Code::Aborted && status.message().contains("unstage, at \"unmount\" for "), "{status:?}");
    println!("{}", status.message());
}

#[test]
fn guest_an_unmount_that_does_not_end_holds_nobody_up() {
    let files = vec![(format!("{}/proxmox-csi-node", guest_init::NODE_ROOT), tools::kill_points_binary())];
    let options = GuestOptions { files, scsi_hardware: ScsiHardware::VirtioScsiPci, ..GuestOptions::named("held") };
    let Some(mut agent) = Agent::start_on(&options) else { return };
    let disks: Vec<(NodeVolume, Image)> = (1..=VOLUMES)
        .map(|lun| {
            let image = Image::new(64 * MIB);
            (agent.attach(&handle(&format!("held-{lun}")), &image, lun), image)
        })
        .collect();
    disks.iter().for_each(|(volume, _)| agent.stage(volume));

    // One at a kill point: seven others come, go and come again.
    restart(&mut agent, Some(HELD_AT));
    let ((held, _), others) = disks.split_first().unwrap();
    assert_late(&agent, held);
    let (_, output) = agent.guest.output(agent.job).unwrap();
    assert!(output.contains(&format!("held at {HELD_AT}")), "{output}");
    std::thread::scope(|scope| {
        for (volume, _) in others {
            scope.spawn(|| {
                agent.calls.node_unstage_volume(volume.unstage()).unwrap();
                agent.stage(volume);
                agent.publish(volume);
                agent.put_away(volume);
            });
        }
    });
    let status = agent.calls.node_unstage_volume(held.unstage()).expect_err("it is held still");
    assert_eq!(status.code(), Code::Aborted, "{status:?}");
    restart(&mut agent, None);
    agent.calls.node_unstage_volume(held.unstage()).unwrap();

    // One whose disk takes no more writes: its journal cannot be written out.
    let (volume, image) = &disks[0];
    agent.stage(volume);
    agent.publish(volume);
    agent.guest.fill(&format!("/node{}/file", volume.target), 1, MIB).unwrap();
    agent.throttle(1, json!({ "bps-write": 1 }));
    agent.guest.write(&format!("/node{}/unwritten", volume.target), b"and what comes after it").unwrap();
    agent.calls.node_unpublish_volume(volume.unpublish()).unwrap();
    assert_late(&agent, volume);
    let (other, _) = &disks[1];
    agent.stage(other);
    agent.put_away(other);
    // When it takes them again, the call ends by itself.
    agent.throttle(1, json!({}));
    // What QEMU holds back waits for its old time, unless all I/O is drained.
    agent.guest.monitor("stop", json!({})).unwrap();
    agent.guest.monitor("cont", json!({})).unwrap();
    let done = wait::until(SEEN_LIMIT, || {
        let answer = agent.calls.node_unstage_volume(volume.unstage());
        Ok::<_, ()>(answer.is_ok().then_some(()))
    });
    assert_eq!(done, Ok(Some(())), "the volume is not unstaged within {SEEN_LIMIT:?}; {}", agent.guest.quote());
    let (_, output) = agent.guest.output(agent.job).unwrap();
    assert_eq!(output.matches("unmounted /var/lib/kubelet/plugins").count(), 2, "once for each: {output}");
    agent.guest.machine().unplug(1).unwrap();
    wait_for_size(&agent.guest, 1, None);
    assert_clean(image);
    agent.guest.power_off().unwrap();
}
