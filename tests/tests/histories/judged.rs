//! The judge of the histories sees what it is there for, and a history that goes wrong is made short.

use std::time::Duration;

use testbed::history::judge::Judge;
use testbed::history::plan::{Act, Item};
use testbed::history::{Answer, History, Rpc, World, check, plan, shrink, under_paused_time};
use testbed::sim::{Effect, Version};

const CALL_LIMIT: Duration = Duration::from_secs(300);
/// More than bisection takes for a dozen items.
const SHRINK_RUNS: usize = 60;

/// What the judge says of this call and its answer.
fn judged(judge: &mut Judge, world: &World, call: usize, answer: &Answer) -> Result<(), String> {
    judge.answered(&world.sim, &world.claims, call, answer)
}

#[test]
fn the_judge_sees_two_writers_also_where_calls_overlapped() {
    proto::log::set_level("error").unwrap();
    under_paused_time(async {
        let mut world = World::new(plan::cluster(), 1, plan::claims()).await?;
        world.answer_to(0, &Rpc::Create { volume: 0 }, CALL_LIMIT).await?.unwrap();
        let volid = world.claims[0].handle().unwrap().volid();
        let ok: Answer = Ok("1".into());
        let publish = |vm| Rpc::Publish { volume: 0, vm };
        world.sim.attach_by_hand(101, "scsi1", &volid).unwrap();
        world.sim.attach_by_hand(201, "scsi1", &volid).unwrap();
        let mut judge = Judge::new(1);
        judge.begins(1, &publish(101));
        judge.begins(2, &publish(201));
        judged(&mut judge, &world, 1, &ok).unwrap();
        assert!(judged(&mut judge, &world, 2, &ok).unwrap_err().contains("VM 101"), "two OKs that overlapped");
        // The other one's detachment failed, and it was not asked again.
        world.sim.detach_by_hand(201, "scsi1");
        let mut judge = Judge::new(1);
        for (call, rpc) in [(1, publish(101)), (2, Rpc::Unpublish { volume: 0, vm: 101 })] {
            judge.begins(call, &rpc);
            let answer = if call == 1 { ok.clone() } else { Err(tonic::Status::unavailable("no")) };
            judged(&mut judge, &world, call, &answer).unwrap();
        }
        world.sim.attach_by_hand(201, "scsi1", &volid).unwrap();
        judge.begins(3, &publish(201));
        assert!(judged(&mut judge, &world, 3, &ok).unwrap_err().contains("VM 101"));
        // Refused for good, and left there beside the one that has it.
        let mut judge = Judge::new(1);
        judge.begins(1, &publish(101));
        judge.begins(2, &publish(201));
        judged(&mut judge, &world, 1, &ok).unwrap();
        judged(&mut judge, &world, 2, &Err(tonic::Status::failed_precondition("no"))).unwrap();
        assert!(judge.at_rest(&world.sim, &world.claims).unwrap_err().contains("two VMs"));
        Ok(())
    })
    .unwrap();
}

#[test]
fn the_judge_sees_what_is_lost_and_what_is_configured_otherwise_than_plugged() {
    proto::log::set_level("error").unwrap();
    under_paused_time(async {
        let mut world = World::new(plan::cluster(), 1, plan::claims()).await?;
        let (mut judge, create, publish) = (Judge::new(1), Rpc::Create { volume: 0 }, Rpc::Publish { volume: 0, vm: 101 });
        for (call, rpc) in [create, publish].iter().enumerate() {
            judge.begins(call, rpc);
            let answer = world.answer_to(0, rpc, CALL_LIMIT).await?;
            judged(&mut judge, &world, call, &answer).unwrap();
        }
        let volid = world.claims[0].handle().unwrap().volid();
        judge.at_rest(&world.sim, &world.claims).unwrap();
        judge.only_in(&world.sim, &world.claims[0], 101).unwrap();
        assert!(judge.only_in(&world.sim, &world.claims[0], 102).is_err());
        world.sim.set_config(101, "scsi1", None);
        assert!(judge.at_rest(&world.sim, &world.claims).unwrap_err().contains("not as it was"));
        assert!(judge.only_in(&world.sim, &world.claims[0], 101).is_err());
        world.sim.set_config(101, "scsi2", Some(&volid));
        assert!(judge.only_in(&world.sim, &world.claims[0], 101).is_err(), "in another slot");
        judge.none_lost(&world.sim, &world.claims).unwrap();
        world.sim.detach_by_hand(101, "scsi2");
        world.sim.stop_vm(101);
        world.sim.remove_volume("pve1", &volid).unwrap();
        assert!(judge.none_lost(&world.sim, &world.claims).unwrap_err().contains("gone"));
        judge.begins(9, &Rpc::Delete { volume: 0 });
        judge.none_lost(&world.sim, &world.claims).unwrap();
        Ok(())
    })
    .unwrap();
}

/// A refusal that no orchestrator is told what to do about, planted among a dozen other things: it and its call are what is left.
#[test]
fn a_history_that_goes_wrong_is_shrunk_to_what_it_needs() {
    proto::log::set_level("error").unwrap();
    let call = |rpc| Act::Call { by: 0, rpc, overlaps: false, patience: None };
    let planted = |path| {
        let effect = Effect::Answer { status: 403, reason: "Permission check failed (/storage/ds, Datastore.AllocateSpace)".into() };
        Act::Request { method: "POST", path, nth: 1, effect }
    };
    let mut acts = vec![call(Rpc::Create { volume: 0 }), call(Rpc::Publish { volume: 0, vm: 101 })];
    acts.extend([1, 2].map(|steps| Act::Lock { vm: 202, lock: "backup", steps }));
    acts.extend([planted("/nodes/*/storage/*/content"), call(Rpc::Create { volume: 1 }), Act::Restart { vm: 301 }]);
    acts.extend([call(Rpc::Unpublish { volume: 0, vm: 101 }), call(Rpc::Delete { volume: 0 }), Act::Restart { vm: 302 }]);
    let items = acts.into_iter().enumerate().map(|(number, act)| Item { number, act }).collect();
    let history = History { seed: 1, controllers: 1, has_lease: false, creates_shared: false, version: Version::default(), items };
    let failure = shrink(check(&history).unwrap_err(), SHRINK_RUNS);
    let left: Vec<usize> = failure.history.items.iter().map(|item| item.number).collect();
    assert_eq!(left, [4, 5], "{failure}");
    assert!(failure.what.contains("PermissionDenied"), "{}", failure.what);
}

/// A slot that QEMU refused is lost where somebody else can come between a look and a write, once for each attachment, and else never.
#[test]
fn the_judge_sees_slots_that_nobody_took_and_lets_a_rival_cost_one() {
    proto::log::set_level("error").unwrap();
    under_paused_time(async {
        let mut world = World::new(plan::cluster(), 1, plan::claims()).await?;
        let publish = Rpc::Publish { volume: 1, vm: 101 };
        world.answer_to(0, &Rpc::Create { volume: 1 }, CALL_LIMIT).await?.unwrap();
        let volid = world.claims[1].handle().unwrap().volid();
        world.sim.before("POST", "/nodes/*/qemu/101/config", 1, move |sim| sim.attach_by_hand(102, "scsi20", &volid).unwrap());
        assert!(world.answer_to(0, &publish, CALL_LIMIT).await?.is_err());
        world.sim.detach_by_hand(102, "scsi20");
        let judged = |judge: &Judge, world: &World| judge.at_the_end(&world.sim, &[]);
        let (mut alone, mut beside) = (Judge::new(2), Judge::new(2).beside_rivals(true));
        assert!(judged(&beside, &world).unwrap_err().contains("0 may be"), "none was begun");
        alone.begins(1, &publish);
        beside.begins(1, &publish);
        judged(&beside, &world).unwrap();
        assert!(judged(&alone, &world).unwrap_err().contains("another VM had the images"));
        world.sim.set_leaked(101, "scsi7");
        assert!(judged(&beside, &world).unwrap_err().contains("scsi7"), "no rival, and not planned");
        Ok(())
    })
    .unwrap();
}

/// 300049: a person attaches the volume while its attachment to that VM goes on, which finds it there and answers OK; then the person takes
/// it out. What else of it is there in that VM stays judged.
#[test]
fn what_a_person_takes_out_of_a_vm_is_not_held_there_any_more() {
    proto::log::set_level("error").unwrap();
    under_paused_time(async {
        let mut world = World::new(plan::cluster(), 1, plan::claims()).await?;
        let publish = Rpc::Publish { volume: 0, vm: 201 };
        world.answer_to(0, &Rpc::Create { volume: 0 }, CALL_LIMIT).await?.unwrap();
        let volid = world.claims[0].handle().unwrap().volid();
        for is_elsewhere_too in [false, true] {
            let mut judge = Judge::new(1);
            world.sim.attach_by_hand(201, "scsi20", &volid).unwrap();
            judge.took_by_hand(0, 201, "scsi20".into());
            judge.begins(1, &publish);
            let answer = world.answer_to(0, &publish, CALL_LIMIT).await?;
            assert_eq!(answer.as_deref().ok(), Some("20"), "{answer:?}");
            judged(&mut judge, &world, 1, &answer).unwrap();
            judge.at_rest(&world.sim, &world.claims).unwrap();
            world.sim.detach_by_hand(201, "scsi20");
            if is_elsewhere_too {
                world.sim.set_config(201, "scsi3", Some(&volid));
            }
            judge.gave_back(&world.sim, &world.claims, 0);
            let said = judge.at_rest(&world.sim, &world.claims);
            assert_eq!(said.is_err(), is_elsewhere_too, "{said:?}");
            world.sim.set_config(201, "scsi3", None);
        }
        Ok(())
    })
    .unwrap();
}
