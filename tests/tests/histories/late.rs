//! A write of an old holder of the Lease that comes after all: its whole machine was paused, say, and its clock with it, so that
//! neither its fence nor any wait of the next holder kept it back. Proxmox takes it, since nobody changed that VM's config.

use std::time::Duration;

use testbed::history::judge::all_traces;
use testbed::history::{Rpc, World, plan, under_paused_time};
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
