//! Two attachments of one volume at the same time: never two OKs, none left attached twice, and one wins in the end.

#[path = "handover.rs"]
mod handover;

use std::time::Duration;

use testbed::history::chance::of_name;
use testbed::history::judge::all_traces;
use testbed::history::{Answer, Rpc, World, plan, under_paused_time};
use testbed::sim::Waiting;
use tonic::Code;

/// Pairs in `scripts/test`: seeds from 0; `PROXMOX_CSI_RACES=FIRST:COUNT` for others.
pub(crate) const SHARE: u64 = 20;
pub(crate) const CALL_LIMIT: Duration = Duration::from_secs(300);
/// A sidecar repeats for hours; a race is over after some calls.
const TRIES: usize = 10;
const BACK_OFF: Duration = Duration::from_secs(20);

pub(crate) fn pairs(share: u64) -> std::ops::Range<u64> {
    let wanted = std::env::var("PROXMOX_CSI_RACES").ok();
    let Some((first, count)) = wanted.as_deref().and_then(|text| text.split_once(':')) else { return 0..share };
    let first: u64 = first.parse().unwrap();
    first..first + count.parse::<u64>().unwrap()
}

/// Two calls, their requests let in one at a time as the seed says; both answers.
async fn race(world: &mut World, seed: u64, calls: [(usize, Rpc); 2], stopped: Option<&str>) -> [Answer; 2] {
    let numbers = [world.call(calls[0].0, &calls[0].1).unwrap(), world.call(calls[1].0, &calls[1].1).unwrap()];
    let mut answers: [Option<Answer>; 2] = [None, None];
    let mut pause = Duration::from_millis(20);
    world.calm().await.unwrap();
    while answers.iter().any(Option::is_none) {
        for (call, answer) in world.answers() {
            let place = numbers.iter().position(|number| *number == call).unwrap();
            answers[place] = Some(answer);
        }
        // The stopped one goes on when the other has its answer.
        let goes_on = answers.iter().any(Option::is_some);
        let waiting: Vec<Waiting> =
            world.sim.waiting().into_iter().filter(|one| goes_on || stopped.is_none_or(|door| one.door != door)).collect();
        match waiting.into_iter().max_by_key(|one| of_name(seed, &format!("{one:?}"))) {
            Some(one) => {
                world.admit(&one).await.unwrap();
                pause = Duration::from_millis(20);
            }
            None => {
                world.pass(pause).await.unwrap();
                pause = (pause * 2).min(Duration::from_secs(2));
            }
        }
        assert!(world.now() < CALL_LIMIT * 4, "seed {seed}: no end\n{}", world.log().join("\n"));
    }
    answers.map(Option::unwrap)
}

pub(crate) fn holders(world: &World, volume: usize) -> Vec<u32> {
    let volid = world.claims[volume].handle().unwrap().volid();
    all_traces(&world.sim, &volid).into_iter().map(|(vm, _)| vm).collect()
}

/// Volume 0 is on NFS: every VM can have it. Volume 1 is local to pve1.
pub(crate) fn rivals(seed: u64) -> (usize, [u32; 2]) {
    let volume = usize::try_from(seed % 2).unwrap();
    let vms = plan::vms_of(volume);
    let first = usize::try_from(of_name(seed, "first") % vms.len() as u64).unwrap();
    let second = (first + 1 + usize::try_from(of_name(seed, "second") % (vms.len() as u64 - 1)).unwrap()) % vms.len();
    (volume, [vms[first], vms[second]])
}

async fn one_pair(seed: u64, mut world: World, controllers: usize, stopped: Option<&str>) {
    let (volume, [one, other]) = rivals(seed);
    world.answer_to(0, &Rpc::Create { volume }, CALL_LIMIT).await.unwrap().unwrap();
    let calls = [(0, Rpc::Publish { volume, vm: one }), (controllers - 1, Rpc::Publish { volume, vm: other })];
    let answers = race(&mut world, seed, calls, stopped).await;
    let story = |world: &World| format!("seed {seed}: {answers:?}\n{}", world.log().join("\n"));
    let won: Vec<u32> = [one, other].into_iter().zip(&answers).filter(|(_, answer)| answer.is_ok()).map(|(vm, _)| vm).collect();
    assert!(won.len() < 2, "two OKs: {}", story(&world));
    for answer in &answers {
        let code = answer.as_ref().err().map(tonic::Status::code);
        assert!(matches!(code, None | Some(Code::FailedPrecondition | Code::Aborted | Code::Unavailable)), "{}", story(&world));
    }
    let left = holders(&world, volume);
    assert!(left.len() < 2 && won.iter().all(|vm| left == [*vm]), "left in {left:?}: {}", story(&world));
    // As the sidecars do: both repeat, one after the other, until one has it.
    let mut has_it: Vec<u32> = won;
    for _ in 0..TRIES {
        if !has_it.is_empty() {
            break;
        }
        for (by, vm) in [(0, one), (controllers - 1, other)] {
            if world.answer_to(by, &Rpc::Publish { volume, vm }, CALL_LIMIT).await.unwrap().is_ok() {
                has_it.push(vm);
            }
        }
        world.go_on(BACK_OFF, |_| false).await.unwrap();
    }
    assert_eq!(has_it.len(), 1, "after retries: {}", story(&world));
    assert_eq!(holders(&world, volume), has_it, "{}", story(&world));
}

fn run(controllers: usize, stopped: Option<&'static str>) {
    proto::log::set_level("error").unwrap();
    for seed in pairs(SHARE) {
        under_paused_time(async {
            let world = World::new(plan::cluster(), controllers, plan::claims()).await?;
            one_pair(seed, world, controllers, stopped).await;
            Ok(())
        })
        .unwrap();
    }
}

/// Two Kubernetes clusters on one Proxmox: each has its Lease, and neither knows of the other's.
#[test]
fn racing_pairs_of_two_kubernetes_clusters() {
    proto::log::set_level("error").unwrap();
    for seed in pairs(SHARE) {
        under_paused_time(async {
            let world = World::with_a_lease_each(plan::cluster(), 2, plan::claims()).await?;
            one_pair(seed, world, 2, None).await;
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn racing_pairs_in_one_process() {
    run(1, None);
}

#[test]
fn racing_pairs_of_two_controllers_without_a_lease() {
    run(2, None);
}

/// The old holder of a Lease is stopped (SIGSTOP) in the middle of its call, goes on when the new one has answered.
#[test]
fn racing_pairs_with_one_controller_stopped_in_the_middle() {
    run(2, Some("c0"));
}
