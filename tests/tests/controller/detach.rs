//! ControllerUnpublishVolume and DeleteVolume: OK only when it is true.

use proto::VolumeHandle;
use testbed::sim::{Effect, Fault, Inner};
use tonic::Code;

use crate::bed::{assert_refused, standard, two_hosts};

const CONFIG: &str = "/nodes/*/qemu/*/config";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_guest_is_asked_again() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.publish(&volume, "node-101/101").await.unwrap();
    bed.sim.inject_inner(Inner::ControllerStays { vmid: 101 }, 1);
    bed.unpublish(&volume, "node-101/101").await.unwrap();
    let vm = bed.sim.vm(101).unwrap();
    assert!(bed.traces(101, &volume).is_empty() && vm.pending_delete.is_empty(), "{:?}", bed.traces(101, &volume));
}

/// W02: a removal that Proxmox only planned is no success, nor is its repeat.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_stays_is_said_and_the_repeat_finishes() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.publish(&volume, "node-101/101").await.unwrap();
    bed.sim.inject_inner(Inner::DiskStays { vmid: 101 }, 50);
    assert_refused(bed.unpublish(&volume, "node-101/101").await, Code::Unavailable, &["VM 101", "error on hot-unplugging device"]);
    assert_refused(bed.publish(&volume, "node-102/102").await, Code::FailedPrecondition, &["VM 101 on pve1"]);
    bed.sim.clear_faults();
    bed.unpublish(&volume, "node-101/101").await.unwrap();
    assert!(bed.traces(101, &volume).is_empty());
    bed.publish(&volume, "node-102/102").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_node_id_it_leaves_every_vm() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.publish(&volume, "node-101/101").await.unwrap();
    bed.unpublish(&volume, "").await.unwrap();
    assert!(bed.traces(101, &volume).is_empty());
    bed.unpublish(&volume, "").await.unwrap();
}

/// W06: whole volume ids are compared, with their storage.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_volume_itself_is_detached() {
    let bed = standard().await;
    let one: VolumeHandle = "fsn1/pve1/local-lvm/vm-100-disk-1".parse().unwrap();
    let ten: VolumeHandle = "fsn1/pve1/local-lvm/vm-100-disk-10".parse().unwrap();
    for volume in [&one, &ten] {
        bed.sim.create_volume("pve1", &volume.volid(), 1 << 26).unwrap();
        bed.publish(volume, "node-101/101").await.unwrap();
    }
    bed.unpublish(&one, "node-101/101").await.unwrap();
    assert!(bed.traces(101, &one).is_empty());
    assert_eq!(bed.traces(101, &ten).len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_is_gone_holds_nothing_if_the_cluster_can_say_so() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.publish(&volume, "node-102/102").await.unwrap();
    bed.sim.remove_vm(102);
    bed.sim.set_quorate(false);
    assert_refused(bed.unpublish(&volume, "node-102/102").await, Code::Unavailable, &["no quorum"]);
    bed.sim.set_quorate(true);
    bed.unpublish(&volume, "node-102/102").await.unwrap();
    bed.unpublish(&volume, "gone/999").await.unwrap();
    bed.delete(&volume.to_string()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_is_not_shown_may_hold_it() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.sim.set_role("CSI", &["Datastore.Allocate", "Datastore.AllocateSpace", "Datastore.Audit"]);
    assert_refused(bed.unpublish(&volume, "node-101/101").await, Code::PermissionDenied, &["(/vms/101, VM.Audit)"]);
    assert_refused(bed.unpublish(&volume, "").await, Code::FailedPrecondition, &["VM.Audit on /vms"]);
    assert_refused(bed.delete(&volume.to_string()).await, Code::FailedPrecondition, &["VM.Audit on /vms"]);
    assert_eq!(bed.sim.volumes("pve1", "local").len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_protected_vm_and_one_without_hotplug_keep_their_disks() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.publish(&volume, "node-101/101").await.unwrap();
    bed.sim.set_config(101, "protection", Some("1"));
    assert_refused(bed.unpublish(&volume, "node-101/101").await, Code::FailedPrecondition, &["protection mode enabled", "--protection 0"]);
    bed.sim.set_config(101, "protection", None);
    bed.sim.set_config(101, "hotplug", Some("network"));
    assert_refused(bed.unpublish(&volume, "node-101/101").await, Code::FailedPrecondition, &["qm set 101 --hotplug"]);
    assert_eq!(bed.traces(101, &volume).len(), 2);
    // A stopped VM gives its disk up without.
    bed.sim.stop_vm(101);
    let other =
        controller::service::ControllerService::new(std::sync::Arc::new(controller::run::Controller::new(bed.config.clone(), None)));
    let request = proto::csi::ControllerUnpublishVolumeRequest {
        volume_id: volume.to_string(),
        node_id: "node-101/101".into(),
        ..Default::default()
    };
    proto::csi::controller_server::Controller::controller_unpublish_volume(&other, tonic::Request::new(request)).await.unwrap();
    assert!(bed.traces(101, &volume).is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_answers_of_detach_and_delete_are_looked_after() {
    for effect in [Effect::CloseAfterwards, Effect::TimeOutButComplete, Effect::Close] {
        let bed = standard().await;
        let volume = bed.volume("pvc-1", "local").await;
        bed.publish(&volume, "node-101/101").await.unwrap();
        bed.sim.inject(Fault::next("POST", CONFIG, effect.clone()));
        bed.unpublish(&volume, "node-101/101").await.unwrap();
        assert!(bed.traces(101, &volume).is_empty(), "{effect:?}");
        bed.sim.inject(Fault::next("DELETE", "/nodes/*/storage/*/content/**", effect.clone()));
        bed.delete(&volume.to_string()).await.unwrap();
        assert!(bed.sim.volumes("pve1", "local").is_empty(), "{effect:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_is_gone_is_deleted_whatever_the_plugin_says() {
    let bed = standard().await;
    for id in [
        "fake-vol-id",
        "a/b/c",
        "fsn1/pve1/local/9999/../x",
        "fsn1/pve1/local/9999/vm-9999-nope.raw",
        "fsn1/pve1/local-lvm/vm-9999-nope",
        "fsn1/pve1/local-zfs/vm-9999-nope",
        "fsn1/pve1/thick-lvm/vm-9999-nope",
    ] {
        bed.delete(id).await.unwrap_or_else(|status| panic!("{id}: {}", status.message()));
    }
    assert_refused(bed.delete("").await, Code::InvalidArgument, &["volume_id"]);
    assert_refused(bed.delete("nowhere/pve1/local/vm-9999-a").await, Code::FailedPrecondition, &["nowhere", "fsn1"]);
    assert_refused(bed.delete("fsn1/pve1/nope/vm-9999-a").await, Code::FailedPrecondition, &["storage 'nope' does not exist"]);
    bed.delete("fsn1/pve9/local/9999/vm-9999-a.raw").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_unpublish_is_refused() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    let unpublish = |id: &str| {
        let request =
            proto::csi::ControllerUnpublishVolumeRequest { volume_id: id.into(), node_id: "node-101/101".into(), ..Default::default() };
        proto::csi::controller_server::Controller::controller_unpublish_volume(&bed.csi, tonic::Request::new(request))
    };
    assert_refused(unpublish("").await, Code::InvalidArgument, &["volume_id is missing"]);
    assert_refused(unpublish("a/b").await, Code::InvalidArgument, &["region/zone/storage/disk"]);
    assert_refused(bed.unpublish(&volume, "a/b/c").await, Code::InvalidArgument, &["NAME/VMID"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_privilege_keeps_its_name() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.sim.set_role("CSI", &["VM.Audit", "VM.Config.Disk", "Datastore.AllocateSpace", "Datastore.Audit"]);
    assert_refused(bed.delete(&volume.to_string()).await, Code::PermissionDenied, &["(/storage/local, Datastore.Allocate)"]);
    bed.sim.set_role("CSI", &["VM.Audit", "Datastore.Allocate", "Datastore.AllocateSpace", "Datastore.Audit"]);
    assert_refused(
        bed.publish(&volume, "node-101/101").await,
        Code::PermissionDenied,
        &["/vms/101", "VM.Config.Disk", "pveum role modify ROLE --append 1 --privs"],
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_sys_audit_the_nodes_are_counted() {
    let bed = two_hosts().await;
    let volume = bed.volume_on("pvc-1", "ds", "pve1").await;
    bed.sim.set_role("CSI", &["VM.Audit", "VM.Config.Disk", "Datastore.Allocate", "Datastore.AllocateSpace", "Datastore.Audit"]);
    bed.unpublish(&volume, "gone/999").await.unwrap();
    bed.sim.set_node_unreachable("pve2", Some("595 No route to host"));
    let other =
        controller::service::ControllerService::new(std::sync::Arc::new(controller::run::Controller::new(bed.config.clone(), None)));
    let request =
        proto::csi::ControllerUnpublishVolumeRequest { volume_id: volume.to_string(), node_id: "gone/999".into(), ..Default::default() };
    // One of two is no more than half.
    let answer = proto::csi::controller_server::Controller::controller_unpublish_volume(&other, tonic::Request::new(request)).await;
    assert_refused(answer, Code::PermissionDenied, &["1 of 2 Proxmox nodes", "Sys.Audit on /"]);
}
