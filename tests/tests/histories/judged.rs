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
