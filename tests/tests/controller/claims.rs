//! Two controllers, lost answers, lists that are old or filtered: never two holders, never "gone" without a look.

use std::sync::Arc;

use controller::run::Controller;
use controller::service::ControllerService;
use proto::VolumeHandle;
use proto::csi::{self, controller_server::Controller as _};
use testbed::sim::{Effect, Fault, Vm};
use tonic::{Code, Request, Status};

use crate::bed::{Bed, MIB, assert_refused, create_request, publish_request, standard, topology, two_hosts};

const CONFIG: &str = "/nodes/*/qemu/*/config";
const CONTENT: &str = "/nodes/*/storage/*/content";

async fn unpublish_again(bed: &Bed, volume: &VolumeHandle, node: &str) -> Result<(), Status> {
    let fresh = ControllerService::new(Arc::new(Controller::new(bed.config.clone(), None)));
    let request = csi::ControllerUnpublishVolumeRequest { volume_id: volume.to_string(), node_id: node.into(), ..Default::default() };
    fresh.controller_unpublish_volume(Request::new(request)).await.map(drop)
}

/// Proxmox reads `storage:100` as "make a disk of 100 GiB", and `storage:cloudinit` as "make such an image".
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_that_proxmox_would_take_for_a_new_disk_is_no_volume() {
    let bed = standard().await;
    for id in ["fsn1/pve1/local-lvm/1", "fsn1/pve1/local-lvm/0.5", "fsn1/pve1/local-lvm/cloudinit"] {
        let request = publish_request(&"fsn1/pve1/local-lvm/vm-9999-a".parse().unwrap(), "node-101/101");
        let answer = bed.publish_as(csi::ControllerPublishVolumeRequest { volume_id: id.into(), ..request }).await;
        assert_refused(answer, Code::NotFound, &[id]);
    }
    assert!(bed.sim.volumes("pve1", "local-lvm").is_empty(), "{:?}", bed.sim.volumes("pve1", "local-lvm"));
    assert!(!bed.sim.requests().iter().any(|request| request.starts_with("POST")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_whose_answer_was_lost_is_looked_at_for_rivals() {
    let bed = standard().await;
    let (warm, volume) = (bed.volume("pvc-0", "local").await, bed.volume("pvc-1", "local").await);
    bed.publish(&warm, "node-102/102").await.unwrap();
    // Another controller's claim comes after our look, and our own write's answer is lost.
    let volid = volume.volid();
    bed.sim.inject(Fault::next("POST", CONFIG, Effect::CloseAfterwards));
    bed.sim.before("POST", CONFIG, 1, move |sim| sim.set_config(101, "scsi9", Some(&volid)));
    let mut answer = bed.publish(&volume, "node-102/102").await;
    for _ in 0..100 {
        if !answer.as_ref().is_err_and(|status| status.code() == Code::Unavailable) {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        answer = bed.publish(&volume, "node-102/102").await;
    }
    assert_refused(answer, Code::FailedPrecondition, &["VM 101 on pve1", "scsi9"]);
    assert!(bed.traces(102, &volume).is_empty(), "{:?}", bed.traces(102, &volume));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_could_not_be_looked_after_is_looked_at_by_the_repeat() {
    let bed = standard().await;
    let (warm, volume) = (bed.volume("pvc-0", "local").await, bed.volume("pvc-1", "local").await);
    bed.publish(&warm, "node-102/102").await.unwrap();
    let volid = volume.volid();
    bed.sim.before("POST", CONFIG, 1, move |sim| sim.set_config(101, "scsi9", Some(&volid)));
    bed.sim.inject(Fault::next("GET", "/nodes/*/qemu/102/status/current", Effect::Answer { status: 500, reason: "got timeout".into() }));
    assert!(bed.publish(&volume, "node-102/102").await.is_err());
    assert_refused(bed.publish(&volume, "node-102/102").await, Code::FailedPrecondition, &["VM 101 on pve1", "scsi9"]);
    assert!(bed.traces(102, &volume).is_empty(), "{:?}", bed.traces(102, &volume));
}

/// The list of plugged drives may be some seconds old: no reason to pull a disk that another controller just attached.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drive_that_is_newer_than_our_list_is_not_taken_for_a_phantom() {
    let bed = standard().await;
    let (warm, volume) = (bed.volume("pvc-0", "local").await, bed.volume("pvc-1", "local").await);
    bed.publish(&warm, "node-101/101").await.unwrap();
    let other = ControllerService::new(Arc::new(Controller::new(bed.config.clone(), None)));
    other.controller_publish_volume(Request::new(publish_request(&volume, "node-101/101"))).await.unwrap();
    bed.sim.reset_counters();
    assert_eq!(bed.publish(&volume, "node-101/101").await.unwrap()["lun"], "2");
    assert!(!bed.sim.requests().iter().any(|request| request.starts_with("POST")), "{:?}", bed.sim.requests());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rival_vm_that_is_newer_than_our_list_is_seen_after_the_write() {
    let bed = standard().await;
    let (warm, volume) = (bed.volume("pvc-0", "local").await, bed.volume("pvc-1", "local").await);
    bed.publish(&warm, "node-101/101").await.unwrap();
    assert!(bed.sim.vm(100).is_none());
    let volid = volume.volid();
    bed.sim.before("POST", CONFIG, 1, move |sim| {
        sim.add_vm(&Vm::linux(100, "pve1", "node-100", None));
        sim.set_config(100, "scsi9", Some(&volid));
    });
    assert_refused(bed.publish(&volume, "node-101/101").await, Code::FailedPrecondition, &["VM 100 on pve1", "scsi9"]);
    assert!(bed.traces(101, &volume).is_empty(), "{:?}", bed.traces(101, &volume));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_detach_is_not_done_while_nobody_says_what_is_plugged() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.publish(&volume, "node-101/101").await.unwrap();
    bed.sim.set_config(101, "scsi1", None);
    // The list of the node fails: the VM itself is asked.
    bed.sim.inject(Fault::next("GET", "/nodes/*/qemu", Effect::Answer { status: 500, reason: "got timeout".into() }));
    assert_refused(unpublish_again(&bed, &volume, "node-101/101").await, Code::Unavailable, &["scsi1", "restart"]);
    assert_refused(unpublish_again(&bed, &volume, "node-101/101").await, Code::Unavailable, &["scsi1", "restart"]);
    bed.sim.set_hung(101, true);
    assert_refused(unpublish_again(&bed, &volume, "node-101/101").await, Code::Unavailable, &["QEMU of VM 101 does not answer"]);
    bed.sim.set_hung(101, false);
    bed.sim.stop_vm(101);
    unpublish_again(&bed, &volume, "node-101/101").await.unwrap();
}

/// W02: without hot-plug Proxmox says OK to a plan.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removal_that_proxmox_only_plans_is_no_detach() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    // In the config, never taken by QEMU; and hot-plug was switched off since.
    bed.sim.set_config(101, "scsi5", Some(&volume.volid()));
    bed.sim.set_config(101, "hotplug", Some("network"));
    assert_refused(bed.unpublish(&volume, "node-101/101").await, Code::FailedPrecondition, &["qm set 101 --hotplug"]);
    assert_eq!(bed.traces(101, &volume), ["configured scsi5"]);
}

fn in_zones(zones: &[&str]) -> csi::CreateVolumeRequest {
    csi::CreateVolumeRequest { accessibility_requirements: topology(zones), ..create_request("pvc-1", "ds", 64 * MIB) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_creation_without_answer_stays_in_its_zone_when_another_is_preferred() {
    let bed = two_hosts().await;
    bed.sim.inject(Fault::next("POST", CONTENT, Effect::Close).times(2));
    assert_refused(bed.create_as(in_zones(&["pve2", "pve1"])).await, Code::Unavailable, &["outcome unknown"]);
    // It may still be on its way: not seen yet is not "not made".
    assert!(bed.create_as(in_zones(&["pve1", "pve2"])).await.unwrap().volume_id.contains("/pve2/"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_made_volume_is_not_made_again_while_its_host_is_away() {
    let bed = two_hosts().await;
    let made = bed.create_as(in_zones(&["pve2", "pve1"])).await.unwrap();
    assert!(made.volume_id.contains("/pve2/"));
    bed.sim.set_node_unreachable("pve2", Some("595 No route to host"));
    // Makes the controller read the cluster again.
    assert!(bed.create_as(create_request("pvc-2", "ds", 1 << 50)).await.is_err());
    assert_refused(bed.create_as(in_zones(&["pve2", "pve1"])).await, Code::Unavailable, &["fsn1/pve2", "no second volume"]);
    assert!(bed.sim.volumes("pve1", "ds").is_empty());
    bed.sim.set_node_unreachable("pve2", None);
    assert_eq!(bed.create_as(in_zones(&["pve1", "pve2"])).await.unwrap().volume_id, made.volume_id);
    // A request that leaves its zone out gets no second one either.
    assert_refused(bed.create_as(in_zones(&["pve1"])).await, Code::Unavailable, &["fsn1/pve2", "no second volume"]);
    // Deleted, its name is free for any zone.
    bed.delete(&made.volume_id).await.unwrap();
    assert!(bed.create_as(in_zones(&["pve1"])).await.unwrap().volume_id.contains("/pve1/"));
}
