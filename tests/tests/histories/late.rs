//! A write of an old holder of the Lease that comes after all: its whole machine was paused, say, and its clock with it, so that
//! neither its fence nor any wait of the next holder kept it back. Proxmox takes it, since nobody changed that VM's config.

use std::time::Duration;

use testbed::history::judge::all_traces;
use testbed::history::{Rpc, World, plan, under_paused_time};
use testbed::sim::{Effect, Fault};
use tonic::Code;

const CALL_LIMIT: Duration = Duration::from_secs(300);
const HANDOVER_LIMIT: Duration = Duration::from_secs(120);

/// Lets all in but the old holder's, until done.
async fn without_old(world: &mut World, mut done: impl FnMut(&mut World) -> bool) {
    let end = world.now() + HANDOVER_LIMIT;
    while !done(world) {
        assert!(world.now() < end, "{}", world.log().join("\n"));
        match world.sim.waiting().into_iter().find(|one| !one.door.starts_with("c0")) {
            Some(one) => world.admit(&one).await.unwrap(),
            None => world.pass(Duration::from_millis(200)).await.unwrap(),
        }
    }
}

/// It is not answered OK, the new holder's attachment stays the only one, and the drive is taken out by what Kubernetes says.
#[test]
fn a_write_of_an_old_holder_that_comes_after_all_is_taken_out_by_the_new_one() {
    proto::log::set_level("error").unwrap();
    under_paused_time(async {
        let mut world = World::with_lease(plan::cluster(), 2, plan::claims()).await?;
        let volume = 0;
        world.answer_to(0, &Rpc::Create { volume }, CALL_LIMIT).await?.unwrap();
        let handle = world.claims[volume].handle().unwrap();
        let call = world.call(0, &Rpc::Publish { volume, vm: 101 })?;
        let is_write = |world: &mut World| world.sim.waiting().iter().any(|one| one.door == "c0" && one.request.starts_with("POST"));
        while !is_write(&mut world) {
            world.go_on(Duration::from_millis(1), is_write).await?;
        }
        without_old(&mut world, |world| world.serves(1)).await;
        let rival = world.call(1, &Rpc::Publish { volume, vm: 301 })?;
        let mut answer = None;
        without_old(&mut world, |world| {
            answer = answer.take().or_else(|| world.answers().into_iter().find(|(number, _)| *number == rival));
            answer.is_some()
        })
        .await;
        assert!(answer.unwrap().1.is_ok(), "{}", world.log().join("\n"));
        // Now all of the old one's comes.
        let mut old = None;
        let ended = |world: &mut World| {
            old = old.take().or_else(|| world.answers().into_iter().find(|(number, _)| *number == call));
            old.is_some() && world.ends(0)
        };
        assert!(world.go_on(CALL_LIMIT, ended).await?);
        assert_eq!(old.unwrap().1.unwrap_err().code(), Code::Unavailable, "{}", world.log().join("\n"));
        let holders = |world: &World| all_traces(&world.sim, &handle.volid()).into_iter().map(|(vm, _)| vm).collect::<Vec<u32>>();
        assert_eq!(holders(&world), [101, 301], "Proxmox took it: {}", world.log().join("\n"));

        // Both are wanted, and one is attached, by the books of the attacher.
        let kubernetes = world.kubernetes.as_ref().unwrap();
        for vm in plan::VMS {
            kubernetes.node(&format!("node-{vm}"), &format!("node-{vm}/{vm}"));
        }
        kubernetes.pv("pv-0", &handle.to_string());
        kubernetes.attachment("pv-0", "node-301", true);
        kubernetes.attachment("pv-0", "node-101", false);
        let again = world.answer_to(1, &Rpc::Publish { volume, vm: 101 }, CALL_LIMIT).await?;
        assert_eq!(again.unwrap_err().code(), Code::FailedPrecondition);
        assert_eq!(holders(&world), [301], "{}", world.log().join("\n"));
        world.answer_to(1, &Rpc::Publish { volume, vm: 301 }, CALL_LIMIT).await?.unwrap();
        Ok(())
    })
    .unwrap();
}

fn is_write(world: &mut World) -> bool {
    world.sim.waiting().iter().any(|one| !one.answer && one.request.starts_with("POST"))
}

/// The next write of the volume waits to be let in, long after the first.
async fn until_second_write(world: &mut World) {
    let repeats = |world: &mut World| world.now() > Duration::from_secs(29) && is_write(world);
    assert!(world.go_on(CALL_LIMIT, repeats).await.unwrap(), "no second write\n{}", world.log().join("\n"));
}

/// Answered 596 and carried out later; the repeat, in the same call or the next one, writes, too, and is refused because the first write
/// came meanwhile. Who came in between, before there was anything to be seen, has it all the same.
#[test]
fn a_refused_repeat_does_not_forget_that_the_first_write_was_never_looked_after() {
    proto::log::set_level("error").unwrap();
    for in_batch in [false, true] {
        under_paused_time(async {
            let mut world = World::new(plan::cluster(), 1, plan::claims()).await?;
            let volumes = if in_batch { vec![1, 0, 2] } else { vec![0] };
            for volume in volumes.iter().copied() {
                world.answer_to(0, &Rpc::Create { volume }, CALL_LIMIT).await?.unwrap();
            }
            let volid = world.claims[0].handle().unwrap().volid();
            let nth = if in_batch { 2 } else { 1 };
            world.sim.inject(Fault::next("POST", "/nodes/*/qemu/101/config", Effect::TimeOutButComplete).nth(nth));
            let publish = Rpc::Publish { volume: 0, vm: 101 };
            let mut call = None;
            for volume in volumes {
                let number = world.call(0, &Rpc::Publish { volume, vm: 101 })?;
                call = call.or((volume == 0).then_some(number));
            }
            if !in_batch {
                assert!(world.go_on(CALL_LIMIT, |world| world.running() == 0 || !world.answers().is_empty()).await?);
                call = Some(world.call(0, &publish)?);
            }
            until_second_write(&mut world).await;
            world.sim.attach_by_hand(201, "scsi20", &volid).unwrap();
            // The first one comes, and then the second one is looked at.
            world.pass(Duration::from_secs(3)).await?;
            assert_eq!(all_traces(&world.sim, &volid).len(), 2, "{}", world.log().join("\n"));
            let mut found = None;
            let mut done = |world: &mut World| {
                found = found.take().or_else(|| world.answers().into_iter().find(|(number, _)| Some(*number) == call));
                found.is_some()
            };
            assert!(world.go_on(CALL_LIMIT, &mut done).await?);
            let status = found.unwrap().1.expect_err("two writers");
            assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}\n{}", world.log().join("\n"));
            assert!(status.message().contains("VM 201"), "{}", status.message());
            let holders: Vec<u32> = all_traces(&world.sim, &volid).into_iter().map(|(vm, _)| vm).collect();
            assert_eq!(holders, [201], "{}", world.log().join("\n"));
            Ok(())
        })
        .unwrap();
    }
}

/// Answered 596; the VM's config changes and is as it was again before the write comes. Who asked in between must not be told that it
/// does not come any more.
#[test]
fn a_digest_that_comes_back_lets_a_late_write_in() {
    proto::log::set_level("error").unwrap();
    under_paused_time(async {
        let mut world = World::new(plan::cluster(), 1, plan::claims()).await?;
        for volume in [0, 1] {
            world.answer_to(0, &Rpc::Create { volume }, CALL_LIMIT).await?.unwrap();
        }
        let [volid, other] = [0, 1].map(|volume| world.claims[volume].handle().unwrap().volid());
        world.sim.inject(Fault::next("POST", "/nodes/*/qemu/101/config", Effect::TimeOutButComplete));
        let lost = world.answer_to(0, &Rpc::Publish { volume: 0, vm: 101 }, CALL_LIMIT).await?;
        assert_eq!(lost.unwrap_err().code(), Code::Unavailable);
        world.sim.attach_by_hand(101, "scsi25", &other).unwrap();
        let there = world.answer_to(0, &Rpc::Publish { volume: 0, vm: 201 }, CALL_LIMIT).await?;
        world.sim.detach_by_hand(101, "scsi25");
        world.go_on(Duration::from_secs(5), |_| false).await?;
        let holders: Vec<u32> = all_traces(&world.sim, &volid).into_iter().map(|(vm, _)| vm).collect();
        assert_eq!(holders, [101], "it came: {}", world.log().join("\n"));
        let status = there.expect_err("two writers");
        assert!(status.code() == Code::Unavailable && status.message().contains("may still carry it out"), "{status:?}");
        Ok(())
    })
    .unwrap();
}

/// The same with a removal: with the same drive in the same slot again, the config would be the one that it was meant for.
#[test]
fn a_slot_with_a_lost_removal_is_left_free_for_a_while() {
    proto::log::set_level("error").unwrap();
    under_paused_time(async {
        let mut world = World::new(plan::cluster(), 1, plan::claims()).await?;
        let (publish, unpublish) = (Rpc::Publish { volume: 1, vm: 101 }, Rpc::Unpublish { volume: 1, vm: 101 });
        world.answer_to(0, &Rpc::Create { volume: 1 }, CALL_LIMIT).await?.unwrap();
        assert_eq!(world.answer_to(0, &publish, CALL_LIMIT).await?.unwrap(), "1");
        world.sim.inject(Fault::next("POST", "/nodes/*/qemu/101/config", Effect::Close));
        world.answer_to(0, &unpublish, CALL_LIMIT).await?.unwrap();
        assert_eq!(world.answer_to(0, &publish, CALL_LIMIT).await?.unwrap(), "2");
        world.answer_to(0, &unpublish, CALL_LIMIT).await?.unwrap();
        world.go_on(Duration::from_secs(130), |_| false).await?;
        assert_eq!(world.answer_to(0, &publish, CALL_LIMIT).await?.unwrap(), "1");
        Ok(())
    })
    .unwrap();
}

/// What a batch read and changed meanwhile is known without a digest; each write of a [`World`] must carry one.
#[test]
fn an_expansion_after_a_batch_is_guarded_by_a_digest() {
    proto::log::set_level("error").unwrap();
    under_paused_time(async {
        let mut world = World::new(plan::cluster(), 1, plan::claims()).await?;
        for volume in [0, 1] {
            world.answer_to(0, &Rpc::Create { volume }, CALL_LIMIT).await?.unwrap();
        }
        world.answer_to(0, &Rpc::Publish { volume: 1, vm: 101 }, CALL_LIMIT).await?.unwrap();
        let attaching = world.call(0, &Rpc::Publish { volume: 0, vm: 101 })?;
        assert!(world.go_on(CALL_LIMIT, is_write).await?);
        // It finds the VM, and waits for it.
        let expanding = world.call(0, &Rpc::Expand { volume: 1, bytes: 128 << 20 })?;
        world.calm().await?;
        while let Some(one) = world.sim.waiting().into_iter().find(|one| !one.request.starts_with("POST")) {
            world.admit(&one).await?;
        }
        let mut ended = Vec::new();
        let all = |world: &mut World| {
            ended.extend(world.answers());
            ended.len() == 2
        };
        assert!(world.go_on(CALL_LIMIT, all).await?);
        assert!(ended.iter().all(|(call, answer)| [attaching, expanding].contains(call) && answer.is_ok()), "{ended:?}");
        Ok(())
    })
    .unwrap();
}
