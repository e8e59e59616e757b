//! What histories have found, each as a test of its own.

use std::time::Duration;

use testbed::history::judge::{all_traces, traces};
use testbed::history::{Rpc, World, plan, under_paused_time};
use testbed::sim::{Effect, Fault, Inner, Latency};
use tonic::Code;

const CALL_LIMIT: Duration = Duration::from_secs(300);

/// Volume 0 is on NFS, 1 is local to pve1; both are made.
async fn world(controllers: usize) -> World {
    proto::log::set_level("error").unwrap();
    let mut world = World::new(plan::cluster(), controllers, plan::claims()).await.unwrap();
    for volume in [0, 1] {
        ok(&mut world, 0, &Rpc::Create { volume }).await;
    }
    world
}

async fn ok(world: &mut World, by: usize, rpc: &Rpc) {
    let answer = world.answer_to(by, rpc, CALL_LIMIT).await.unwrap();
    assert!(answer.is_ok(), "{rpc:?}: {answer:?}\n{}", world.log().join("\n"));
}

async fn refused(world: &mut World, by: usize, rpc: &Rpc, code: Code, words: &[&str]) {
    let answer = world.answer_to(by, rpc, CALL_LIMIT).await.unwrap();
    let status = answer.expect_err("a refusal");
    assert_eq!(status.code(), code, "{}\n{}", status.message(), world.log().join("\n"));
    for word in words {
        assert!(status.message().contains(word), "{:?} lacks {word:?}", status.message());
    }
}

fn volid(world: &World, volume: usize) -> String {
    world.claims[volume].handle().unwrap().volid()
}

/// The task is killed when QEMU has the drive and the config does not say so. Reverting the plan would leave the drive in QEMU, where
/// nothing but a restart of the VM removes it.
#[test]
fn a_worker_that_dies_between_qemu_and_the_config_leaves_nothing_behind() {
    under_paused_time(async {
        for (again, killed) in [(true, false), (false, false), (true, true), (false, true)] {
            let mut world = world(1).await;
            world.sim.inject_inner(Inner::WorkerDies { vmid: 101 }, 1);
            let (publish, unpublish) = (Rpc::Publish { volume: 1, vm: 101 }, Rpc::Unpublish { volume: 1, vm: 101 });
            let call = world.call(0, &publish).unwrap();
            // Killed, it does not see how the task ends.
            let met = |world: &mut World| world.sim.vm(101).is_some_and(|vm| !vm.plugged.is_empty());
            world.go_on(CALL_LIMIT, met).await.unwrap();
            if killed {
                world.kill(0).await.unwrap();
            } else {
                world.go_on(CALL_LIMIT, |world| world.answers().iter().any(|(number, _)| *number == call)).await.unwrap();
            }
            world.go_on(Duration::from_secs(5), |_| false).await.unwrap();
            let volid = volid(&world, 1);
            if again {
                ok(&mut world, 0, &publish).await;
                assert_eq!(traces(&world.sim, 101, &volid), ["configured scsi1", "plugged scsi1"]);
            }
            ok(&mut world, 0, &unpublish).await;
            assert!(all_traces(&world.sim, &volid).is_empty(), "{:?}", all_traces(&world.sim, &volid));
        }
        Ok(())
    })
    .unwrap();
}

/// 685800824: the same, and Proxmox does not answer the repeat in time. The plan is not taken back: QEMU has the drive.
#[test]
fn a_repeat_that_proxmox_refuses_takes_no_plan_back_that_qemu_has() {
    under_paused_time(async {
        let mut world = world(1).await;
        world.sim.inject_inner(Inner::WorkerDies { vmid: 101 }, 1);
        let late = Effect::Answer { status: 500, reason: "got timeout".into() };
        world.sim.inject(Fault::next("POST", "/nodes/*/qemu/101/config", late).nth(2));
        let publish = Rpc::Publish { volume: 1, vm: 101 };
        let _either = world.answer_to(0, &publish, CALL_LIMIT).await?;
        let volid = volid(&world, 1);
        let at = traces(&world.sim, 101, &volid);
        assert_ne!(at, ["plugged scsi1"], "only QEMU has it\n{}", world.log().join("\n"));
        ok(&mut world, 0, &Rpc::Unpublish { volume: 1, vm: 101 }).await;
        assert!(all_traces(&world.sim, &volid).is_empty(), "{:?}", all_traces(&world.sim, &volid));
        Ok(())
    })
    .unwrap();
}

/// Another VM of the node got the volume between our look and our write: QEMU refuses its image, Proxmox says OK.
#[test]
fn a_phantom_because_of_a_rival_names_the_rival_and_costs_one_slot() {
    under_paused_time(async {
        let mut world = world(1).await;
        let volid = volid(&world, 1);
        world.sim.before("POST", "/nodes/*/qemu/101/config", 1, {
            let volid = volid.clone();
            move |sim| sim.attach_by_hand(102, "scsi20", &volid).unwrap()
        });
        refused(&mut world, 0, &Rpc::Publish { volume: 1, vm: 101 }, Code::FailedPrecondition, &["VM 102 on pve1", "scsi20"]).await;
        assert!(traces(&world.sim, 101, &volid).is_empty());
        assert_eq!(world.sim.vm(101).unwrap().leaked.len(), 1);
        Ok(())
    })
    .unwrap();
}

/// Who deletes cannot look again afterwards, as who attaches can. Controller 1 has just read everything when the volume is attached,
/// by hand or by controller 0.
#[test]
fn a_volume_that_was_attached_a_moment_ago_is_not_deleted() {
    under_paused_time(async {
        for (volume, by_hand) in [(0, true), (1, true), (0, false), (1, false)] {
            let mut world = world(2).await;
            refused(&mut world, 1, &Rpc::Expand { volume, bytes: 1 << 30 }, Code::FailedPrecondition, &["attached"]).await;
            let volid = volid(&world, volume);
            if by_hand {
                world.sim.attach_by_hand(102, "scsi20", &volid).unwrap();
            } else {
                ok(&mut world, 0, &Rpc::Publish { volume, vm: 102 }).await;
            }
            refused(&mut world, 1, &Rpc::Delete { volume }, Code::FailedPrecondition, &["VM 102 on pve1"]).await;
            assert!(world.sim.image("pve1", &volid).is_some());
        }
        Ok(())
    })
    .unwrap();
}

/// The same into a slot that held another volume when it was read: what is plugged has not changed its name.
#[test]
fn a_volume_in_a_slot_that_changed_hands_is_not_deleted() {
    under_paused_time(async {
        for (volume, other) in [(0, "ds:7/vm-7-a.raw"), (1, "ds:7/vm-7-a.raw")] {
            let mut world = world(1).await;
            world.sim.create_volume("pve1", other, 1 << 20).unwrap();
            world.sim.attach_by_hand(102, "scsi20", other).unwrap();
            refused(&mut world, 0, &Rpc::Expand { volume, bytes: 1 << 30 }, Code::FailedPrecondition, &["attached"]).await;
            world.sim.detach_by_hand(102, "scsi20");
            let volid = volid(&world, volume);
            world.sim.attach_by_hand(102, "scsi20", &volid).unwrap();
            refused(&mut world, 0, &Rpc::Delete { volume }, Code::FailedPrecondition, &["VM 102 on pve1", "scsi20"]).await;
            assert!(world.sim.image("pve1", &volid).is_some());
        }
        Ok(())
    })
    .unwrap();
}

/// W41: a task that does not end is not waited for without end, and its RPC answers; the next one looks what became of it.
#[test]
fn w41_a_task_without_end_holds_no_call_without_end() {
    const HOUR: Duration = Duration::from_secs(3600);
    proto::log::set_level("error").unwrap();
    under_paused_time(async {
        let latency = Latency { request: Duration::ZERO, plug: HOUR, ..Latency::RECORDED };
        let mut world = World::new(plan::cluster().latency(latency), 1, plan::claims()).await?;
        ok(&mut world, 0, &Rpc::Create { volume: 1 }).await;
        let publish = Rpc::Publish { volume: 1, vm: 101 };
        refused(&mut world, 0, &publish, Code::Unavailable, &["UPID:", "still running"]).await;
        world.go_on(HOUR, |_| false).await?;
        ok(&mut world, 0, &publish).await;
        assert_eq!(traces(&world.sim, 101, &volid(&world, 1)), ["configured scsi1", "plugged scsi1"]);
        Ok(())
    })
    .unwrap();
}

/// 106304: of two that expand at once, the one that wants less finds the volume larger than it was: done, not out of range.
#[test]
fn two_controllers_that_expand_at_once_both_get_what_they_want() {
    under_paused_time(async {
        let mut world = world(2).await;
        ok(&mut world, 0, &Rpc::Publish { volume: 1, vm: 101 }).await;
        for (by, bytes) in [(0, 2 << 30), (1, 1 << 30)] {
            world.call(by, &Rpc::Expand { volume: 1, bytes })?;
        }
        let mut answers = Vec::new();
        world
            .go_on(CALL_LIMIT, |world| {
                answers.extend(world.answers());
                answers.len() == 2
            })
            .await?;
        assert_eq!(answers.len(), 2);
        for (call, answer) in answers {
            assert!(answer.is_ok(), "{call}: {answer:?}\n{}", world.log().join("\n"));
        }
        Ok(())
    })
    .unwrap();
}

/// 300007: the write of a controller whose answer was 596 is carried out when another controller has the volume in a VM of the same node.
/// QEMU refuses it, and its slot is lost: no look can prevent that. But there is one writer, and the repeats end right.
#[test]
fn a_late_write_beside_another_controllers_costs_one_slot_and_makes_no_second_writer() {
    under_paused_time(async {
        let mut world = world(2).await;
        let volid = volid(&world, 1);
        let (late, other) = (Rpc::Publish { volume: 1, vm: 102 }, Rpc::Publish { volume: 1, vm: 101 });
        // The other controller is not young: it does not look for what one before it began.
        ok(&mut world, 1, &other).await;
        ok(&mut world, 1, &Rpc::Unpublish { volume: 1, vm: 101 }).await;
        world.sim.inject(Fault::next("POST", "/nodes/*/qemu/102/config", Effect::TimeOutButComplete));
        refused(&mut world, 0, &late, Code::Unavailable, &["596"]).await;
        let answer = world.answer_to(1, &other, CALL_LIMIT).await?;
        world.go_on(Duration::from_secs(60), |_| false).await?;
        let plugged =
            |world: &World| all_traces(&world.sim, &volid).into_iter().filter(|(_, has)| has.iter().any(|one| one.starts_with("plugged")));
        let holders: Vec<u32> = plugged(&world).map(|(vmid, _)| vmid).collect();
        match &answer {
            Ok(_) => assert_eq!(holders, [101]),
            Err(status) => assert_eq!((status.code(), holders.contains(&101)), (Code::FailedPrecondition, false), "{status:?}"),
        }
        for (by, vm) in [(0, 102), (1, 101)] {
            ok(&mut world, by, &Rpc::Unpublish { volume: 1, vm }).await;
        }
        assert!(all_traces(&world.sim, &volid).is_empty());
        ok(&mut world, 1, &other).await;
        assert_eq!(traces(&world.sim, 101, &volid).len(), 2);
        assert!(world.sim.vm(102).unwrap().leaked.len() <= 1 && world.sim.vm(101).unwrap().leaked.is_empty());
        Ok(())
    })
    .unwrap();
}

/// 301098: the deletion was answered 596, its repeat said gone, and the first one was carried out after that: on the next volume of the
/// name. While that may be, none is made or attached; what is there then is there to stay.
#[test]
fn a_deletion_whose_answer_was_lost_takes_no_later_volume_of_that_name() {
    under_paused_time(async {
        for by_hand in [false, true] {
            let mut world = world(1).await;
            let (create, publish) = (Rpc::Create { volume: 1 }, Rpc::Publish { volume: 1, vm: 101 });
            let volid = volid(&world, 1);
            world.sim.inject(Fault::next("DELETE", "/nodes/*/storage/*/content/**", Effect::TimeOutButComplete));
            ok(&mut world, 0, &Rpc::Delete { volume: 1 }).await;
            assert!(world.sim.deletes_late(&volid) && world.sim.image("pve1", &volid).is_none(), "the repeat did it");
            if by_hand {
                world.sim.create_volume("pve1", &volid, 1 << 20).unwrap();
            }
            let asked = if by_hand { &publish } else { &create };
            refused(&mut world, 0, asked, Code::Unavailable, &["deletion", "decided within 120 s"]).await;
            world.go_on(Duration::from_secs(60), |_| false).await?;
            assert!(!world.sim.deletes_late(&volid) && world.sim.image("pve1", &volid).is_none(), "also the person's");
            world.go_on(Duration::from_secs(61), |_| false).await?;
            ok(&mut world, 0, &create).await;
            ok(&mut world, 0, &publish).await;
            assert!(world.sim.image("pve1", &volid).is_some());
        }
        Ok(())
    })
    .unwrap();
}

/// 340326: a person's attachment in a VM of a host that goes off before anybody has read it; Kubernetes knows nothing of it. The host is back
/// when we have written: the look after the write reads it, and takes ours back.
#[test]
fn a_host_that_is_back_by_the_look_after_the_write_is_looked_at() {
    proto::log::set_level("error").unwrap();
    under_paused_time(async {
        let mut world = World::with_lease(plan::cluster(), 1, plan::claims()).await?;
        ok(&mut world, 0, &Rpc::Create { volume: 2 }).await;
        let volid = volid(&world, 2);
        world.sim.attach_by_hand(202, "scsi20", &volid).unwrap();
        world.sim.set_node_unreachable("pve2", Some("595 No route to host"));
        let call = world.call(0, &Rpc::Publish { volume: 2, vm: 302 })?;
        let writes =
            |world: &mut World| world.sim.waiting().iter().any(|one| one.request.starts_with("POST") && one.request.contains("/qemu/302/"));
        while !writes(&mut world) {
            world.go_on(Duration::from_millis(1), writes).await?;
            assert!(world.now() < CALL_LIMIT, "{}", world.log().join("\n"));
        }
        world.sim.set_node_unreachable("pve2", None);
        let mut answers = Vec::new();
        world
            .go_on(CALL_LIMIT, |world| {
                answers.extend(world.answers());
                !answers.is_empty()
            })
            .await?;
        let (_, answer) = answers.into_iter().find(|(number, _)| *number == call).unwrap();
        let status = answer.expect_err("a refusal");
        assert_eq!(status.code(), Code::FailedPrecondition, "{}", status.message());
        assert!(status.message().contains("VM 202 on pve2"), "{}", status.message());
        assert!(traces(&world.sim, 302, &volid).is_empty());
        Ok(())
    })
    .unwrap();
}
