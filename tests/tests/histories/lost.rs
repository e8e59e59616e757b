//! Every request of every call goes wrong once: lost before it was looked at, answered to nobody, answered 596 and carried out later,
//! the controller or the task killed before, in the middle of, or after it. The repeat ends right, with one volume, one attachment, and
//! nothing left. With Kubernetes, each request to its API server is lost so, too.

use std::time::Duration;

use testbed::history::judge::{Judge, all_traces, images};
use testbed::history::{Rpc, World, plan, under_paused_time};
use testbed::sim::{Effect, Fault, Inner, Waiting};

const CALL_LIMIT: Duration = Duration::from_secs(300);
/// A sidecar's repeats, until what was lost can no longer come (two minutes).
const TRIES: usize = 12;
const BACK_OFF: Duration = Duration::from_secs(20);
const OLD: Duration = Duration::from_secs(130);
/// One that was not given back is waited out.
const LEASE_LIMIT: Duration = Duration::from_secs(300);
const MIB: u64 = 1 << 20;
const IOPS: u32 = 500;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    /// The connection ends, nothing is done.
    Before,
    /// Done, and the connection ends.
    After,
    /// 596 after 30 s; done a second later.
    Late,
    /// The controller is killed when it is about to send it.
    KilledBefore,
    /// The controller is killed when it was looked at.
    KilledAfter,
    /// The task that it begins is killed at once.
    TaskKilled,
    /// When QEMU has done its part and the config does not say so yet.
    TaskHalf,
    /// When all is done, before it says so.
    TaskDone,
}

const LOSSES: [Loss; 8] =
    [Loss::Before, Loss::After, Loss::Late, Loss::KilledBefore, Loss::KilledAfter, Loss::TaskKilled, Loss::TaskHalf, Loss::TaskDone];

impl Loss {
    /// Whether such a request can meet it: only some begin a task.
    fn befalls(self, request: &str) -> bool {
        let changes = request.starts_with("POST") && request.contains("/config");
        match self {
            Loss::TaskHalf => changes,
            Loss::TaskKilled | Loss::TaskDone => {
                changes || request.starts_with("PUT") && request.contains("/resize") || request.starts_with("DELETE")
            }
            _ => true,
        }
    }

    fn is_of_task(self) -> bool {
        matches!(self, Loss::TaskKilled | Loss::TaskHalf | Loss::TaskDone)
    }
}

/// Whose requests are lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum To {
    Proxmox,
    /// There is Kubernetes as well.
    ProxmoxBesideKubernetes,
    Kubernetes,
}

impl To {
    fn is_asked(self, one: &Waiting) -> bool {
        one.door.ends_with("kube") == (self == To::Kubernetes)
    }
}

/// Up to the call in question: the volume is made (1 is local to pve1, 2 on Ceph), and attached where the call needs it.
async fn prepared(volume: usize, rpc: &Rpc, to: To) -> World {
    let mut world = if to == To::Proxmox {
        World::new(plan::cluster(), 1, plan::claims()).await.unwrap()
    } else {
        World::with_lease(plan::cluster(), 1, plan::claims()).await.unwrap()
    };
    if !matches!(rpc, Rpc::Create { .. }) {
        world.answer_to(0, &Rpc::Create { volume }, CALL_LIMIT).await.unwrap().unwrap();
    }
    if let (Some(kubernetes), Some(handle)) = (&world.kubernetes, world.claims[volume].handle()) {
        kubernetes.pv(&world.claims[volume].name, &handle.to_string());
    }
    if matches!(rpc, Rpc::Unpublish { .. } | Rpc::Expand { .. } | Rpc::Modify { .. }) {
        world.answer_to(0, &Rpc::Publish { volume, vm: 101 }, CALL_LIMIT).await.unwrap().unwrap();
    }
    // What was read is old by now: the call reads everything.
    world.pass(Duration::from_secs(61)).await.unwrap();
    world
}

/// Makes the call; its `nth` request meets the loss. False: it has fewer requests.
async fn call_with_loss(world: &mut World, rpc: &Rpc, nth: usize, loss: Loss, to: To) -> bool {
    let call = world.call(0, rpc).unwrap();
    let (mut requests, mut met, mut pause) = (0, false, Duration::from_millis(20));
    world.calm().await.unwrap();
    let begun = world.now();
    loop {
        if world.answers().iter().any(|(number, _)| *number == call) || world.running() == 0 {
            return met;
        }
        assert!(world.now() - begun < CALL_LIMIT, "no end\n{}", world.log().join("\n"));
        let Some(one) = world.sim.waiting().last().cloned() else {
            world.pass(pause).await.unwrap();
            pause = (pause * 2).min(Duration::from_secs(2));
            continue;
        };
        pause = Duration::from_millis(20);
        let counts = !one.answer && to.is_asked(&one) && loss.befalls(&one.request);
        requests += usize::from(counts);
        if !counts || requests != nth {
            world.admit(&one).await.unwrap();
            continue;
        }
        met = true;
        meet(world, &one, loss).await;
    }
}

async fn meet(world: &mut World, one: &Waiting, loss: Loss) {
    world.note(format!("{loss:?}"));
    let effect = match loss {
        Loss::Before => Some((Effect::Close, 0)),
        Loss::After => Some((Effect::CloseAfterwards, 1)),
        Loss::Late => Some((Effect::TimeOutButComplete, 504)),
        _ => None,
    };
    match (effect, &world.kubernetes) {
        (Some((_, status)), Some(kubernetes)) if To::Kubernetes.is_asked(one) => kubernetes.breaks(&one.request, Some(status)),
        (Some((effect, _)), _) => world.sim.inject(Fault { method: None, path: "/**".into(), nth: 1, times: 1, effect }),
        (None, _) => match loss {
            Loss::TaskKilled => world.sim.inject_inner(Inner::TaskKilled { is_done: false }, 1),
            Loss::TaskDone => world.sim.inject_inner(Inner::TaskKilled { is_done: true }, 1),
            Loss::TaskHalf => world.sim.inject_inner(Inner::WorkerDies { vmid: 101 }, 1),
            _ => {}
        },
    }
    if loss != Loss::KilledBefore {
        world.admit(one).await.unwrap();
    }
    if let Some(kubernetes) = &world.kubernetes {
        kubernetes.breaks(&one.request, None);
    }
    if matches!(loss, Loss::KilledBefore | Loss::KilledAfter) {
        world.kill(0).await.unwrap();
        world.calm().await.unwrap();
    }
}

/// Who lost the Lease ends and is started again, as by kubelet; until it has it.
async fn serves(world: &mut World) {
    if world.ends(0) {
        world.kill(0).await.unwrap();
    }
    assert!(world.go_on(LEASE_LIMIT, |world| world.serves(0)).await.unwrap(), "nobody takes the Lease\n{}", world.log().join("\n"));
}

async fn until_ok(world: &mut World, rpc: &Rpc) {
    let mut last = None;
    for _ in 0..TRIES {
        serves(world).await;
        match world.answer_to(0, rpc, CALL_LIMIT).await.unwrap() {
            Ok(_) => return,
            Err(status) => last = Some(status),
        }
        world.go_on(BACK_OFF, |_| false).await.unwrap();
    }
    panic!("{rpc:?} still answers {last:?}\n{}", world.log().join("\n"));
}

/// The call is repeated until it is OK, and everything is as it says; then all is taken down, and nothing is left.
async fn ends_right(world: &mut World, volume: usize, rpc: &Rpc) {
    until_ok(world, rpc).await;
    // What Proxmox gave up on comes late.
    world.go_on(OLD, |_| false).await.unwrap();
    let story = |world: &World| world.log().join("\n");
    let (there, holders) = (images(&world.sim, &world.claims[volume]), holders(world, volume));
    let attached = [101u32];
    let wanted: (usize, &[u32]) = match rpc {
        Rpc::Create { .. } | Rpc::Unpublish { .. } => (1, &[]),
        Rpc::Publish { .. } | Rpc::Expand { .. } | Rpc::Modify { .. } => (1, &attached),
        Rpc::Delete { .. } => (0, &[]),
    };
    assert_eq!((there.len(), holders.as_slice()), wanted, "images {there:?}\n{}", story(world));
    if !wanted.1.is_empty() {
        let volid = world.claims[volume].handle().unwrap().volid();
        let traces = all_traces(&world.sim, &volid);
        assert_eq!(traces[0].1.len(), 2, "configured and plugged once: {traces:?}\n{}", story(world));
        let lines = world.sim.vm(101).unwrap().config.into_values();
        let limits = lines.filter(|line| line.contains(&volid) && line.contains(&format!("iops_rd={IOPS}"))).count();
        assert_eq!(limits, usize::from(matches!(rpc, Rpc::Modify { .. })), "{}", story(world));
    }
    let zone = world.claims[volume].handle().unwrap().zone;
    let vm = *plan::VMS.iter().find(|vm| zone.is_empty() || plan::home(**vm) == zone).unwrap();
    let mut rest = Vec::new();
    if matches!(rpc, Rpc::Create { .. } | Rpc::Unpublish { .. }) {
        rest.push(Rpc::Publish { volume, vm });
    }
    if !matches!(rpc, Rpc::Delete { .. }) {
        rest.extend([Rpc::Unpublish { volume, vm }, Rpc::Delete { volume }]);
    }
    for rpc in &rest {
        until_ok(world, rpc).await;
    }
    let nothing = Judge::new(0).at_the_end(&world.sim, &world.claims);
    assert!(nothing.is_ok(), "{nothing:?}\n{}", story(world));
}

fn holders(world: &World, volume: usize) -> Vec<u32> {
    let Some(handle) = world.claims[volume].handle() else { return Vec::new() };
    all_traces(&world.sim, &handle.volid()).into_iter().map(|(vm, _)| vm).collect()
}

fn every_request_lost(rpc: fn(usize) -> Rpc, volumes: &[usize]) {
    every_request_to_be_lost(rpc, volumes, To::Proxmox);
}

fn every_request_to_be_lost(rpc: fn(usize) -> Rpc, volumes: &[usize], to: To) {
    proto::log::set_level("error").unwrap();
    for volume in volumes.iter().copied() {
        let rpc = rpc(volume);
        for loss in LOSSES.into_iter().filter(|loss| to != To::Kubernetes || !loss.is_of_task()) {
            let mut nth = 1;
            while one_lost(volume, &rpc, nth, loss, to) {
                nth += 1;
            }
            let met = nth - 1;
            match loss {
                // A volume is made without a task, and neither grown nor deleted by a change of a VM.
                Loss::TaskKilled | Loss::TaskDone => assert!(met > 0 || matches!(rpc, Rpc::Create { .. }), "{rpc:?}: no task"),
                Loss::TaskHalf => assert_eq!(met > 0, matches!(rpc, Rpc::Publish { .. } | Rpc::Unpublish { .. } | Rpc::Modify { .. })),
                _ => assert!(met > usize::from(to != To::Kubernetes), "{rpc:?} makes {met} requests"),
            }
        }
    }
}

fn one_lost(volume: usize, rpc: &Rpc, nth: usize, loss: Loss, to: To) -> bool {
    under_paused_time(async {
        let mut world = prepared(volume, rpc, to).await;
        let met = call_with_loss(&mut world, rpc, nth, loss, to).await;
        if met {
            ends_right(&mut world, volume, rpc).await;
        }
        Ok(met)
    })
    .unwrap()
}

#[test]
fn a_creation_survives_the_loss_of_each_of_its_requests() {
    every_request_lost(|volume| Rpc::Create { volume }, &[1, 3]);
}

#[test]
fn an_attachment_survives_the_loss_of_each_of_its_requests() {
    every_request_lost(|volume| Rpc::Publish { volume, vm: 101 }, &[1, 2]);
}

#[test]
fn a_detachment_survives_the_loss_of_each_of_its_requests() {
    every_request_lost(|volume| Rpc::Unpublish { volume, vm: 101 }, &[1, 2]);
}

#[test]
fn an_expansion_survives_the_loss_of_each_of_its_requests() {
    every_request_lost(|volume| Rpc::Expand { volume, bytes: 128 * MIB }, &[1, 2]);
}

#[test]
fn a_deletion_survives_the_loss_of_each_of_its_requests() {
    every_request_lost(|volume| Rpc::Delete { volume }, &[1, 2]);
}

#[test]
fn a_modification_survives_the_loss_of_each_of_its_requests() {
    every_request_to_be_lost(|volume| Rpc::Modify { volume, iops: IOPS }, &[1], To::ProxmoxBesideKubernetes);
    every_request_to_be_lost(|volume| Rpc::Modify { volume, iops: IOPS }, &[1], To::Kubernetes);
}

/// The Lease, PVs and VolumeAttachments are asked about before and between the writes.
#[test]
fn each_call_survives_the_loss_of_each_of_its_requests_to_kubernetes() {
    every_request_to_be_lost(|volume| Rpc::Publish { volume, vm: 101 }, &[2], To::Kubernetes);
    every_request_to_be_lost(|volume| Rpc::Unpublish { volume, vm: 101 }, &[2], To::Kubernetes);
    every_request_to_be_lost(|volume| Rpc::Delete { volume }, &[1], To::Kubernetes);
}
