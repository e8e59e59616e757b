//! Several changes of one VM in one call: how many, who is answered what, and what is left when one of them fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proto::VolumeHandle;
use testbed::sim::{Effect, Fault, Inner, Version};
use tokio::task::JoinSet;
use tonic::{Code, Status};

use crate::bed::{Bed, assert_refused, release, standard, start};
use crate::hold::until;

const CONFIG: &str = "/nodes/*/qemu/*/config";

fn writes(bed: &Bed) -> usize {
    bed.sim.requests().iter().filter(|request| request.starts_with("POST") && request.contains("/qemu/")).count()
}

async fn volumes(bed: &Bed, count: usize) -> Vec<VolumeHandle> {
    let mut made = Vec::new();
    for n in 0..count {
        made.push(bed.volume(&format!("pvc-{n}"), "local-lvm").await);
    }
    made
}

/// Holds the VM's flock and the clock until all of `count` calls wait for the VM, so that those after the first go together.
async fn all_at_once(bed: &Arc<Bed>, volumes: &[VolumeHandle], detach: bool) -> Vec<Result<(), Status>> {
    let (stopped, held) = (bed.sim.freeze(), bed.sim.hold_config_lock(101).unwrap());
    let before = writes(bed);
    let mut calls = JoinSet::new();
    for (n, volume) in volumes.iter().enumerate() {
        let (shared, volume) = (Arc::clone(bed), volume.clone());
        calls.spawn(async move {
            let done = if detach {
                shared.unpublish(&volume, "node-101/101").await
            } else {
                shared.publish(&volume, "node-101/101").await.map(|context| assert!(context["lun"].parse::<u8>().unwrap() > 0))
            };
            (n, done)
        });
        if n == 0 {
            until(|| writes(bed) > before).await;
        }
    }
    // What the others do before they wait is over in no time; one that came late would only make one more call.
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    drop((held, stopped));
    let mut done = calls.join_all().await;
    done.sort_by_key(|(n, _)| *n);
    done.into_iter().map(|(_, done)| done).collect()
}

async fn warm(bed: &Bed) {
    let warm = bed.volume("warm", "local-lvm").await;
    bed.publish(&warm, "node-101/101").await.unwrap();
    bed.unpublish(&warm, "node-101/101").await.unwrap();
    bed.delete(&warm.to_string()).await.unwrap();
}

/// W63: one VM's changes go together, and wait for nobody else's.
/// Twenty drives: the first alone, then as many as fit into 25 s.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_volumes_come_and_go_in_few_calls() {
    let bed = Arc::new(standard().await);
    warm(&bed).await;
    let volumes = volumes(&bed, 20).await;
    bed.sim.reset_counters();
    for done in all_at_once(&bed, &volumes, false).await {
        done.unwrap();
    }
    assert!(writes(&bed) <= 3, "{} calls attach 20 volumes", writes(&bed));
    for volume in &volumes {
        assert_eq!(bed.traces(101, volume).len(), 2, "{volume}");
    }
    bed.sim.reset_counters();
    for done in all_at_once(&bed, &volumes, true).await {
        done.unwrap();
    }
    assert!((3..=4).contains(&writes(&bed)), "{} calls detach 20 volumes: no more than 10 in one", writes(&bed));
    assert!(volumes.iter().all(|volume| bed.traces(101, volume).is_empty()));
}

/// A volume that is not there fails the call of all, and leaves planned what Perl's hash order put before it: that is
/// reverted before any is tried alone, and each is answered for itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_missing_volume_does_not_fail_its_batch() {
    for _ in 0..10 {
        let bed = Arc::new(standard().await);
        warm(&bed).await;
        let mut volumes = volumes(&bed, 4).await;
        volumes.insert(2, "fsn1/pve1/local-lvm/vm-9999-nope".parse().unwrap());
        let planned: [Arc<AtomicUsize>; 2] = Default::default();
        for (nth, planned) in (3..).zip(&planned) {
            let planned = Arc::clone(planned);
            bed.sim.before("POST", CONFIG, nth, move |sim| planned.store(sim.vm(101).unwrap().pending.len(), Ordering::SeqCst));
        }
        let mut done = all_at_once(&bed, &volumes, false).await;
        assert_refused(done.remove(2), Code::NotFound, &["vm-9999-nope"]);
        for done in done {
            done.unwrap();
        }
        let vm = bed.sim.vm(101).unwrap();
        assert!(vm.pending.is_empty() && vm.plugged.len() == 4, "{:?} {:?}", vm.pending, vm.plugged.keys());
        let [at_first, then] = planned.map(|planned| planned.load(Ordering::SeqCst));
        assert_eq!(then, 0, "the call after the failed one reverts all that is planned");
        if at_first > 0 {
            return;
        }
    }
    panic!("the missing volume was first in each of ten batches");
}

/// QEMU refuses one of several: what is left planned is reverted before any is tried alone, and nobody is told a lie.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_failed_batch_left_planned_is_reverted_first() {
    let bed = Arc::new(standard().await);
    warm(&bed).await;
    let volumes = volumes(&bed, 5).await;
    // The first call is one volume's; the batch after it meets the fault in its first key, and the others stay planned.
    let sim = Arc::clone(&bed.sim);
    bed.sim.before("POST", CONFIG, 2, move |_| {
        sim.inject_inner(Inner::PlugFails { vmid: 101, text: "adding drive failed: something".into() }, 1);
    });
    let done = all_at_once(&bed, &volumes, false).await;
    for (volume, done) in volumes.iter().zip(done) {
        let plugged = bed.traces(101, volume);
        match done {
            Ok(()) => assert_eq!(plugged.len(), 2, "{volume}: {plugged:?}"),
            Err(refused) => assert!(plugged.is_empty(), "{}: {plugged:?}", refused.message()),
        }
    }
    assert!(bed.sim.vm(101).unwrap().pending.is_empty());
}

/// QEMU silently refuses one: it alone gets another slot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_is_answered_from_its_own_slot() {
    let bed = Arc::new(standard().await);
    warm(&bed).await;
    let volumes = volumes(&bed, 5).await;
    let sim = Arc::clone(&bed.sim);
    bed.sim.before("POST", CONFIG, 2, move |_| sim.inject_inner(Inner::PhantomAttach { vmid: 101 }, 1));
    for done in all_at_once(&bed, &volumes, false).await {
        done.unwrap();
    }
    let vm = bed.sim.vm(101).unwrap();
    // Before 8.4 it is said, and nothing is left over.
    let leaked = usize::from(release() >= Version::V8_4);
    assert_eq!((vm.plugged.len(), vm.leaked.len()), (5, leaked), "{:?}", vm.plugged.keys());
    assert!(volumes.iter().all(|volume| bed.traces(101, volume).len() == 2));
}

/// The answer of a batch is lost, or it never came: each ends as it is, and a repeat finishes the rest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_answer_of_a_batch_is_looked_after_volume_by_volume() {
    for effect in [Effect::CloseAfterwards, Effect::TimeOutButComplete, Effect::Close] {
        let bed = Arc::new(standard().await);
        warm(&bed).await;
        let volumes = volumes(&bed, 4).await;
        bed.sim.inject(Fault::next("POST", CONFIG, effect.clone()).nth(2));
        let done = all_at_once(&bed, &volumes, false).await;
        for (volume, done) in volumes.iter().zip(done) {
            match done {
                Ok(()) => assert_eq!(bed.traces(101, volume).len(), 2, "{effect:?}"),
                Err(refused) => assert_eq!(refused.code(), Code::Unavailable, "{}", refused.message()),
            }
            let mut answer = bed.publish(volume, "node-101/101").await;
            for _ in 0..200 {
                if answer.is_ok() {
                    break;
                }
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                answer = bed.publish(volume, "node-101/101").await;
            }
            answer.unwrap();
            assert_eq!(bed.traces(101, volume).len(), 2, "{effect:?}: one attachment, whatever was lost");
        }
        assert_eq!(bed.sim.vm(101).unwrap().plugged.len(), 4);
    }
}

/// A guest that keeps one disk for a while: the others of its call are out, and it is asked again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_guest_holds_up_no_other_volume() {
    let bed = Arc::new(standard().await);
    warm(&bed).await;
    let volumes = volumes(&bed, 4).await;
    for done in all_at_once(&bed, &volumes, false).await {
        done.unwrap();
    }
    bed.sim.inject_inner(Inner::DiskStays { vmid: 101 }, 2);
    for done in all_at_once(&bed, &volumes, true).await {
        done.unwrap();
    }
    let vm = bed.sim.vm(101).unwrap();
    assert!(vm.plugged.is_empty() && vm.pending_delete.is_empty(), "{:?}", vm.plugged.keys());
}

/// Whoever waits behind a lock has his own patience.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_behind_a_locked_vm_are_answered_in_time() {
    let bed = Arc::new(standard().await);
    warm(&bed).await;
    let volumes = volumes(&bed, 3).await;
    bed.sim.set_lock(101, Some("snapshot-delete"));
    let mut calls = JoinSet::new();
    for volume in volumes {
        let bed = Arc::clone(&bed);
        calls.spawn(async move {
            let mut request = tonic::Request::new(crate::bed::publish_request(&volume, "node-101/101"));
            request.set_timeout(std::time::Duration::from_secs(3));
            proto::csi::controller_server::Controller::controller_publish_volume(&bed.csi, request).await
        });
    }
    let all = tokio::time::timeout(std::time::Duration::from_secs(20), calls.join_all()).await.expect("none waits for another's patience");
    for refused in all {
        assert_refused(refused, Code::Unavailable, &["VM is locked (snapshot-delete) since"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_one_controller_for_all_disks_it_is_the_same() {
    let bed = Arc::new(start(testbed::sim::Simulator::standard()).await);
    bed.sim.set_config(101, "scsihw", Some("virtio-scsi-pci"));
    warm(&bed).await;
    let volumes = volumes(&bed, 6).await;
    for detach in [false, true] {
        for done in all_at_once(&bed, &volumes, detach).await {
            done.unwrap();
        }
    }
    assert!(bed.sim.vm(101).unwrap().plugged.is_empty());
}
