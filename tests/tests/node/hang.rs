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

/// The agent's patience with a read or a write that does not end.
const STUCK: (&str, &str) = ("PROXMOX_CSI_LIMIT_STUCK", "3000");
const STUCK_FLUSH: (&str, &str) = ("PROXMOX_CSI_LIMIT_FLUSH", "500");
const HURRIED_TOO: (&str, &str) = ("PROXMOX_CSI_LIMIT_CALL", "15000");

/// Two places for probes and formats: two disks that never answer must not take them from all the others.
#[test]
fn guest_disks_that_never_answer_keep_no_place() {
    let Some(mut agent) = Agent::start_with_points("stuck") else { return };
    agent.restart_with(&[STUCK, STUCK_FLUSH, HURRIED_TOO]);
    let attached: Vec<(NodeVolume, Image)> = (1..=6_u8)
        .map(|lun| {
            let image = Image::new(64 * MIB);
            let volume = agent.attach(&handle(&format!("stuck-{lun}")), &image, lun);
            wait_for_size(&agent.guest, lun, Some(64 * MIB));
            (volume, image)
        })
        .collect();
    let volume = |lun: u8| &attached[usize::from(lun) - 1].0;
    // LUNs, what of theirs hangs, where their calls stay, and one that is sound.
    let kinds: [([u8; 2], &str, &str, u8); 2] = [([1, 2], "bps-read", "probe", 5), ([3, 4], "bps-write", "make the filesystem", 6)];
    for (luns, limit, step, sound) in kinds {
        // Recycled: zeroing waits for the disk by itself. New: all waits for the flush.
        let mut hung = [volume(luns[0]).clone(), volume(luns[1]).clone()];
        hung[0].publish_context.insert(proto::publish_context::ZEROED.into(), "0".into());
        luns.iter().for_each(|lun| agent.throttle(*lun, json!({ limit: 1 })));
        std::thread::scope(|scope| {
            let calls: Vec<_> = hung.iter().map(|volume| scope.spawn(|| agent.calls.node_stage_volume(volume.stage()))).collect();
            let line = "has not answered for ";
            let before = agent.log().matches(line).count();
            // Only who waits for a place looks at those who hold one.
            let begun = wait::until(SEEN_LIMIT, || {
                let log = agent.log();
                let is_at_it = hung.iter().all(|volume| log.contains(&format!("stage {}: {}", volume.id, step_name(step))));
                Ok::<_, ()>(is_at_it.then_some(()))
            });
            assert_eq!(begun, Ok(Some(())), "the calls do not come to {step:?}: {}", agent.log());
            let staged = wait::until(SEEN_LIMIT, || Ok::<_, ()>(agent.calls.node_stage_volume(volume(sound).stage()).ok()));
            assert!(staged.unwrap().is_some(), "a sound disk waits for those that do not answer; {}", agent.guest.quote());
            let log = agent.log();
            assert!(log.matches(line).count() > before, "nobody is named: {log}");
            for (volume, call) in hung.iter().zip(calls) {
                let status = call.join().unwrap().expect_err("its disk does not answer");
                assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
                assert!(
                    status.message().contains(&volume.id) && status.message().contains(&format!("stage, at {step:?} for ")),
                    "{status:?}"
                );
            }
        });
        luns.iter().for_each(|lun| agent.throttle(*lun, json!({ limit: 0 })));
        agent.guest.monitor("stop", json!({})).unwrap();
        agent.guest.monitor("cont", json!({})).unwrap();
        for volume in hung.iter().chain([volume(sound)]) {
            let staged = wait::until(2 * SEEN_LIMIT, || Ok::<_, ()>(agent.calls.node_stage_volume(volume.stage()).ok()));
            assert!(staged.unwrap().is_some(), "{} is not staged when its disk answers again; {}", volume.id, agent.guest.quote());
            agent.calls.node_unstage_volume(volume.unstage()).unwrap();
        }
        for lun in luns.into_iter().chain([sound]) {
            agent.guest.machine().unplug(lun).unwrap();
            wait_for_size(&agent.guest, lun, None);
            assert_clean(&attached[usize::from(lun) - 1].1);
        }
    }
    assert!(agent.log().contains("is waited for no more"), "{}", agent.log());
    agent.guest.power_off().unwrap();
}

/// As the log calls a step.
fn step_name(step: &str) -> &'static str {
    if step == "probe" { "Probe" } else { "MakeFilesystem" }
}
