//! What waits for ever holds nobody else up, is answered all the same, and is begun once.

use serde_json::json;
use testbed::calls::NodeVolume;
use testbed::guest::wait;
use tonic::Code;

use crate::harness::{Agent, Image, MIB, SEEN_LIMIT, assert_clean, handle, wait_for_size};

const HELD_AT: &str = "inside:unstage:Unmount:umount2";
const VOLUMES: u8 = 8;

/// Calls are answered after five seconds.
const HURRIED: (&str, &str) = ("PROXMOX_CSI_LIMIT_CALL", "5000");

/// What another call is told while one goes on.
fn assert_taken(agent: &Agent, volume: &NodeVolume) {
    let status = agent.calls.node_unstage_volume(volume.unstage()).expect_err("it still goes on");
    assert!(status.code() == Code::Aborted && status.message().contains("unstage, at \"unmount\" for "), "{status:?}");
    println!("{}", status.message());
}

#[test]
fn guest_an_unmount_that_does_not_end_holds_nobody_up() {
    let Some(mut agent) = Agent::start_with_points("held") else { return };
    let disks: Vec<(NodeVolume, Image)> = (1..=VOLUMES)
        .map(|lun| {
            let image = Image::new(64 * MIB);
            (agent.attach(&handle(&format!("held-{lun}")), &image, lun), image)
        })
        .collect();
    disks.iter().for_each(|(volume, _)| agent.stage(volume));

    // One at a kill point: seven others come, go and come again.
    agent.restart_with(&[("PROXMOX_CSI_HOLD_AT", HELD_AT)]);
    let ((held, _), others) = disks.split_first().unwrap();
    let (calls, request) = (agent.calls.clone(), held.unstage());
    let call = std::thread::spawn(move || calls.node_unstage_volume(request));
    let line = format!("held at {HELD_AT}");
    let seen = wait::until(SEEN_LIMIT, || Ok::<_, ()>(agent.log().contains(&line).then_some(())));
    assert_eq!(seen, Ok(Some(())), "the unmount does not come to {HELD_AT}: {}", agent.log());
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
    assert_taken(&agent, held);
    agent.restart();
    assert!(call.join().unwrap().is_err(), "the agent has died over it");
    agent.calls.node_unstage_volume(held.unstage()).unwrap();

    // One whose disk takes no more writes: its journal cannot be written out.
    let (volume, image) = &disks[0];
    agent.stage(volume);
    agent.publish(volume);
    agent.guest.fill(&format!("/node{}/file", volume.target), 1, MIB).unwrap();
    agent.restart_with(&[HURRIED]);
    agent.throttle(1, json!({ "bps-write": 1 }));
    // Stays in memory for now.
    agent.guest.make_folder(&format!("/node{}/unwritten", volume.target)).unwrap();
    let unpublished = wait::until(SEEN_LIMIT, || Ok::<_, ()>(agent.calls.node_unpublish_volume(volume.unpublish()).ok()));
    assert!(unpublished.unwrap().is_some(), "what is not unmounted for good writes nothing out");
    let status = agent.calls.node_unstage_volume(volume.unstage()).expect_err("it cannot be done");
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    assert!(status.message().contains("unstage, at \"unmount\" for ") && status.message().contains(&volume.id), "{status:?}");
    assert_taken(&agent, volume);
    let (other, _) = &disks[1];
    // A machine that is slow answers late too, and goes on.
    let staged = wait::until(SEEN_LIMIT, || Ok::<_, ()>(agent.calls.node_stage_volume(other.stage()).ok()));
    assert!(staged.unwrap().is_some(), "stage of another volume");
    let unstaged = wait::until(SEEN_LIMIT, || Ok::<_, ()>(agent.calls.node_unstage_volume(other.unstage()).ok()));
    assert!(unstaged.unwrap().is_some(), "unstage of another volume");
    // When it takes them again, the call ends by itself.
    agent.throttle(1, json!({ "bps-write": 0 }));
    // What QEMU holds back waits for its old time, unless all I/O is drained.
    agent.guest.monitor("stop", json!({})).unwrap();
    agent.guest.monitor("cont", json!({})).unwrap();
    let done = wait::until(SEEN_LIMIT, || {
        let answer = agent.calls.node_unstage_volume(volume.unstage());
        Ok::<_, ()>(answer.is_ok().then_some(()))
    });
    assert_eq!(done, Ok(Some(())), "the volume is not unstaged within {SEEN_LIMIT:?}; {}", agent.guest.quote());
    let log = agent.log();
    let unmounted = format!("unmounted {}", volume.staging);
    assert_eq!(log.matches(&unmounted).count(), 1, "{log}");
    agent.guest.machine().unplug(1).unwrap();
    wait_for_size(&agent.guest, 1, None);
    assert_clean(image);
    agent.guest.power_off().unwrap();
}
