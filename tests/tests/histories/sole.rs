//! With a Lease nobody else acts: what falls away then, and what does not; and what calls cost then, in requests and bytes.

use std::time::Duration;

use testbed::history::judge::all_traces;
use testbed::history::{Claim, Rpc, World, plan, under_paused_time};
use testbed::storm::{Cost, Size, costs};

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

/// The calls of one publish, without their queries.
async fn calls_of_a_publish(world: &mut World, volume: usize) -> Vec<String> {
    world.sim.reset_counters();
    world.answer_to(0, &Rpc::Publish { volume, vm: 102 }, CALL_LIMIT).await.unwrap().unwrap();
    world.sim.requests().iter().map(|request| request.split('?').next().unwrap().to_owned()).collect()
}

/// Whatever the number of VMs. On a storage of one Proxmox node QEMU's own lock keeps others off; on a shared one each node is asked
/// once, which says what the VM itself took, too.
#[test]
fn a_warm_publish_with_a_lease_is_three_calls_and_one_for_each_further_node_of_a_shared_storage() {
    under_paused_time(async {
        let mut world = world().await;
        let vm = "/nodes/pve1/qemu/102";
        let (look, write) = (format!("GET {vm}/pending"), format!("POST {vm}/config"));
        assert_eq!(calls_of_a_publish(&mut world, 1).await, [look.clone(), write.clone(), format!("GET {vm}/status/current")]);
        // What an earlier controller began is not looked for any more; every VM is read once.
        world.pass(Duration::from_secs(46)).await.unwrap();
        let first = calls_of_a_publish(&mut world, 0).await;
        assert!(first.len() > 6, "{first:?}");
        world.answer_to(0, &Rpc::Unpublish { volume: 0, vm: 102 }, CALL_LIMIT).await.unwrap().unwrap();
        let mut warm = calls_of_a_publish(&mut world, 0).await;
        warm.get_mut(2..).unwrap_or_default().sort();
        let lists = ["pve1", "pve2", "pve3"].map(|node| format!("GET /nodes/{node}/qemu"));
        assert_eq!(warm, [vec![look, write], lists.to_vec()].concat());
        Ok(())
    })
    .unwrap();
}

/// Issue 6, clause 9: counts, which the storm measures beside its times. With 500 VMs on 32 nodes as with 20 on 3.
#[test]
fn a_warm_publish_reads_five_kilobytes_and_an_expansion_makes_three_calls() {
    proto::log::set_level("error").unwrap();
    let (small, large) = (Size { nodes: 3, vms: 20, images: 0 }, Size { nodes: 32, vms: 500, images: 0 });
    for (size, shared) in [(small, false), (small, true), (large, false)] {
        let costs = under_paused_time(costs(size, shared, true)).unwrap();
        let of = |what: &str| costs.iter().find(|cost| cost.what == what).unwrap();
        let (warm, expand) = (of("publish, warm"), of("expand"));
        assert!(warm.bytes <= Cost::WARM_PUBLISH_BYTES, "{warm:?}");
        assert!(expand.requests <= Cost::EXPAND_REQUESTS, "{expand:?}");
    }
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
