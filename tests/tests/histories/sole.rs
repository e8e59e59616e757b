//! With a Lease nobody else acts: what falls away then, and what does not.

use std::time::Duration;

use testbed::history::judge::all_traces;
use testbed::history::{Claim, Rpc, World, plan, under_paused_time};

const CALL_LIMIT: Duration = Duration::from_secs(300);

/// Volume 0 on NFS (by its handle without a zone; volume 4 is the same with one), volume 1 local to pve1. Made; 102 had it before.
async fn world() -> World {
    proto::log::set_level("error").unwrap();
    let mut claims = plan::claims();
    let twin = Claim { id: Some("fsn1/pve1/nfs/9999/vm-9999-pvc-0.raw".into()), ..claims[0].clone() };
    claims.push(twin);
    let mut world = World::with_lease(plan::cluster(), 1, claims).await.unwrap();
    for rpc in
        [Rpc::Create { volume: 0 }, Rpc::Create { volume: 1 }, Rpc::Publish { volume: 1, vm: 102 }, Rpc::Unpublish { volume: 1, vm: 102 }]
    {
        let answer = world.answer_to(0, &rpc, CALL_LIMIT).await.unwrap();
        assert!(answer.is_ok(), "{rpc:?}: {answer:?}\n{}", world.log().join("\n"));
    }
    world
}

/// Whatever the number of VMs.
#[test]
fn a_warm_publish_with_a_lease_reads_the_vm_writes_and_looks_at_it_and_at_its_node() {
    under_paused_time(async {
        let mut world = world().await;
        world.sim.reset_counters();
        world.answer_to(0, &Rpc::Publish { volume: 1, vm: 102 }, CALL_LIMIT).await.unwrap().unwrap();
        let calls: Vec<String> = world.sim.requests().iter().map(|request| request.split('?').next().unwrap().to_owned()).collect();
        let vm = "/nodes/pve1/qemu/102";
        let node = "GET /nodes/pve1/qemu".to_owned();
        assert_eq!(calls, [format!("GET {vm}/pending"), format!("POST {vm}/config"), format!("GET {vm}/status/current"), node]);
        Ok(())
    })
    .unwrap();
}

/// A volume on shared storage has a handle with a zone and one without: no look after the write would find the other.
#[test]
fn two_handles_of_one_volume_are_one_volume() {
    under_paused_time(async {
        let mut world = world().await;
        let calls = [(0, 101), (4, 201)].map(|(volume, vm)| world.call(0, &Rpc::Publish { volume, vm }).unwrap());
        let mut answers = Vec::new();
        let done = |world: &mut World| {
            answers.extend(world.answers());
            answers.len() == calls.len()
        };
        assert!(world.go_on(CALL_LIMIT, done).await.unwrap());
        assert_eq!(answers.iter().filter(|(_, answer)| answer.is_ok()).count(), 1, "{answers:?}");
        let volid = world.claims[0].handle().unwrap().volid();
        assert_eq!(all_traces(&world.sim, &volid).len(), 1, "{}", world.log().join("\n"));
        Ok(())
    })
    .unwrap();
}
