//! Whose a volume is: what is deleted, what stays, what is attached; and which VM a node is.

use std::sync::Arc;

use controller::service::ControllerService;
use proto::VolumeHandle;
use proto::csi::{self, controller_server::Controller as _};
use serde_json::json;
use testbed::kube::Kubernetes;
use testbed::sim::{Effect, Fault, Inner, Vm};
use tonic::{Code, Request, Status};

use crate::bed::{Bed, MIB, assert_refused, clusters, standard, start, two_hosts_description, with_config};
use crate::hold::{publish_by, unpublish_by};
use crate::kube::controller_of;

const STATIC: &str = "fsn1/pve1/local-lvm/vm-777-disk-0";

async fn delete_by(by: &ControllerService, volume_id: &str) -> Result<(), Status> {
    let request = csi::DeleteVolumeRequest { volume_id: volume_id.into(), ..Default::default() };
    by.delete_volume(Request::new(request)).await.map(drop)
}

/// The same cluster, with `features` in the config file.
pub(crate) fn with_features(bed: &Bed, features: &str) -> Bed {
    with_config(std::sync::Arc::clone(&bed.sim), &format!("features: {features}\n{}", clusters(bed.sim.url())))
}

/// W36: only what is ours by its name is deleted; everything is attached, detached and grown.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_our_own_is_deleted_and_everything_is_attached() {
    let bed = standard().await;
    let volume: VolumeHandle = STATIC.parse().unwrap();
    bed.sim.create_volume("pve1", &volume.volid(), 64 * MIB).unwrap();
    assert_refused(bed.delete(STATIC).await, Code::FailedPrecondition, &["VM 777's", "deleteAlsoOwnedBy: [777]"]);
    bed.publish(&volume, "node-101/101").await.unwrap();
    bed.expand(STATIC, 128 * MIB, 0).await.unwrap();
    bed.unpublish(&volume, "node-101/101").await.unwrap();
    assert!(bed.sim.image("pve1", &volume.volid()).is_some());
    let strict = with_features(&bed, "{attachOnlyOwned: true}");
    assert_refused(
        strict.publish(&volume, "node-101/101").await,
        Code::FailedPrecondition,
        &["attachOnlyOwned: false", "VM 777's", "add 777 to deleteAlsoOwnedBy"],
    );
    let also = with_features(&bed, "{deleteAlsoOwnedBy: [777], attachOnlyOwned: true}");
    also.publish(&volume, "node-101/101").await.unwrap();
    assert_refused(also.delete(STATIC).await, Code::FailedPrecondition, &["refused while in use", "VM 101"]);
    // Detach does not ask whose it is.
    strict.unpublish(&volume, "node-101/101").await.unwrap();
    also.delete(STATIC).await.unwrap();
    assert!(bed.sim.image("pve1", &volume.volid()).is_none());
    bed.delete(STATIC).await.unwrap();
    for wrong in ["{deleteAlsoOwnedBy: 777}", "{deleteAlsoOwnedBy: [7]}", "{attachOnlyOwned: maybe}"] {
        let wrong = with_features(&bed, wrong);
        assert_refused(wrong.delete(STATIC).await, Code::FailedPrecondition, &["features", "should be"]);
    }
}

/// A file that cannot be read has no format by Proxmox's words, as one that is not there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_its_storage_lists_is_not_gone_whatever_is_said_of_it() {
    let bed = standard().await;
    let foreign = "fsn1/pve1/local/777/vm-777-disk-0.raw";
    bed.sim.create_volume("pve1", "local:777/vm-777-disk-0.raw", 64 * MIB).unwrap();
    let words = "volume_size_info on 'local:777/vm-777-disk-0.raw' failed - no format";
    let unread = Fault::next("GET", "/nodes/*/storage/*/content/**", Effect::Answer { status: 500, reason: words.into() });
    bed.sim.inject(unread.clone());
    assert_refused(bed.delete(foreign).await, Code::FailedPrecondition, &["VM 777's", "deleteAlsoOwnedBy: [777]"]);
    // One of ours whose deletion failed without saying why.
    let ours = bed.volume("pvc-1", "local").await;
    bed.sim.inject_inner(Inner::TaskFails { kind: "imgdel".into(), exit_status: "unable to delete".into() }, 1);
    bed.sim.inject(unread);
    assert_refused(bed.delete(&ours.to_string()).await, Code::Internal, &["unable to delete"]);
    assert_eq!(bed.sim.volumes("pve1", "local").len(), 2);
    bed.delete(&ours.to_string()).await.unwrap();
    bed.delete(&ours.to_string()).await.unwrap();
}

/// W20: a VM with our owner's number has all our disks for its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_deleted_while_a_vm_has_the_owners_number() {
    let bed = start(testbed::sim::Simulator::builder(two_hosts_description().vm(Vm::linux(9999, "pve2", "template", None)))).await;
    let volume = bed.volume_on("pvc-1", "local", "pve1").await;
    assert_refused(bed.delete(&volume.to_string()).await, Code::FailedPrecondition, &["VM 9999 is there, on pve2", "another number"]);
    assert!(bed.sim.image("pve1", &volume.volid()).is_some());
}

/// W17.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_its_pv_keeps_stays_and_without_an_answer_so_does_any() {
    let bed = standard().await;
    let kubernetes = Kubernetes::start().await.unwrap();
    let by = controller_of(&kubernetes, &bed);
    let (kept, plain) = (bed.volume("pvc-1", "local").await, bed.volume("pvc-2", "local").await);
    let pv = |handle: &str, keep: bool| {
        let annotations = if keep { json!({"csi.proxmox.sinextra.dev/lifecycle": "keep"}) } else { json!({}) };
        let spec = json!({"csi": {"driver": proto::DRIVER_NAME, "volumeHandle": handle}});
        json!({"metadata": {"name": "x", "annotations": annotations}, "spec": spec})
    };
    kubernetes.put("/api/v1/persistentvolumes/pvc-1", pv(&kept.to_string(), true));
    kubernetes.put("/api/v1/persistentvolumes/pvc-2", pv(&plain.to_string(), false));
    delete_by(&by, &kept.to_string()).await.unwrap();
    assert!(bed.sim.image("pve1", &kept.volid()).is_some());
    for (status, part) in [(500, "persistentvolumes"), (403, "give the controller's ServiceAccount"), (0, "persistentvolumes")] {
        kubernetes.breaks("GET /api/v1/persistentvolumes", Some(status));
        assert_refused(delete_by(&by, &plain.to_string()).await, Code::Unavailable, &["lifecycle: keep", "nothing is deleted", part]);
    }
    assert!(bed.sim.image("pve1", &plain.volid()).is_some());
    kubernetes.breaks("GET /api/v1/persistentvolumes", None);
    delete_by(&by, &plain.to_string()).await.unwrap();
    assert!(bed.sim.image("pve1", &plain.volid()).is_none());
    // A second PV of the same disk keeps it, though the one of its name does not.
    let twice = bed.volume("pvc-3", "local").await;
    kubernetes.put("/api/v1/persistentvolumes/pvc-3", pv(&twice.to_string(), false));
    kubernetes.put("/api/v1/persistentvolumes/second", pv(&twice.to_string(), true));
    delete_by(&by, &twice.to_string()).await.unwrap();
    assert!(bed.sim.image("pve1", &twice.volid()).is_some());
    // Also a PV whose name says nothing, and whose handle has no zone.
    let unnamed: VolumeHandle = "fsn1/pve1/local-lvm/vm-9999-Other".parse().unwrap();
    bed.sim.create_volume("pve1", &unnamed.volid(), MIB).unwrap();
    kubernetes.put("/api/v1/persistentvolumes/static", pv(&unnamed.to_string(), true));
    let fresh = controller_of(&kubernetes, &bed);
    delete_by(&fresh, &unnamed.to_string()).await.unwrap();
    assert!(bed.sim.image("pve1", &unnamed.volid()).is_some());
}

/// Deletions that come together look at all PVs together: a reading that began after they asked is everybody's. One thread, so that
/// all have asked before the first page comes.
#[tokio::test]
async fn deletions_that_wait_share_a_reading_of_all_pvs() {
    let bed = Arc::new(standard().await);
    let kubernetes = Kubernetes::start().await.unwrap();
    let by = Arc::new(controller_of(&kubernetes, &bed));
    for number in 0..1200 {
        kubernetes.pv(&format!("other-{number}"), &format!("fsn1/pve1/local/9999/vm-9999-other-{number}.raw"));
    }
    let mut volumes = Vec::new();
    for number in 0..8 {
        volumes.push(bed.volume(&format!("pvc-{number}"), "local").await);
    }
    drop(kubernetes.asked());
    let mut deleting = tokio::task::JoinSet::new();
    for id in volumes.iter().map(ToString::to_string) {
        let by = Arc::clone(&by);
        deleting.spawn(async move { delete_by(&by, &id).await });
    }
    deleting.join_all().await.into_iter().for_each(|deleted| deleted.unwrap());
    let pages = kubernetes.asked().iter().filter(|call| *call == "GET /api/v1/persistentvolumes").count();
    assert_eq!(pages, 2 * 3, "the first one's three pages, and those of all others");
    // Nothing that was read before is enough.
    let late = bed.volume("pvc-late", "local").await;
    delete_by(&by, &late.to_string()).await.unwrap();
    assert_eq!(kubernetes.asked().iter().filter(|call| *call == "GET /api/v1/persistentvolumes").count(), 3);
}

/// What is not built is refused by its name, and nothing is touched.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicated_volumes_and_snapshots_are_left_alone() {
    let bed = standard().await;
    // Without a zone, on a storage that each node has for itself.
    let replicated: VolumeHandle = "fsn1//local-lvm/vm-10010-pvc-7".parse().unwrap();
    bed.sim.create_volume("pve1", &replicated.volid(), 64 * MIB).unwrap();
    let id = replicated.to_string();
    assert_refused(bed.publish(&replicated, "node-101/101").await, Code::FailedPrecondition, &["replication is not built yet"]);
    assert_refused(bed.delete(&id).await, Code::FailedPrecondition, &["replication is not built yet"]);
    assert_refused(bed.expand(&id, 128 * MIB, 0).await, Code::FailedPrecondition, &["replication is not built yet"]);
    let volume = bed.volume("pvc-1", "local").await;
    let mut request = crate::bed::publish_request(&volume, "node-101/101");
    request.volume_context.insert("replicate".into(), "1".into());
    assert_refused(bed.publish_as(request).await, Code::FailedPrecondition, &["replicate: 1", "not built yet"]);
    let snapshot = "fsn1/pve1/local-lvm/vm-9999-snapshot-3f2a";
    bed.sim.create_volume("pve1", "local-lvm:vm-9999-snapshot-3f2a", MIB).unwrap();
    assert_refused(bed.delete(snapshot).await, Code::FailedPrecondition, &["snapshots are not built yet"]);
    assert_eq!(bed.sim.volumes("pve1", "local-lvm").len(), 2);
    assert!(!bed.sim.requests().iter().any(|request| request.starts_with("DELETE") || request.contains("/qemu/101/config")));
}

fn node(kubernetes: &Kubernetes, name: &str, provider_id: &str, instance_id: Option<&str>, uuid: &str) {
    kubernetes.node(name, name);
    let annotations = instance_id.map_or(json!({}), |id| json!({"proxmox.sinextra.dev/instance-id": id}));
    let object = json!({"metadata": {"name": name, "annotations": annotations}, "spec": {"providerID": provider_id},
        "status": {"nodeInfo": {"systemUUID": uuid}}});
    kubernetes.put(&format!("/api/v1/nodes/{name}"), object);
}

const UUIDS: [&str; 2] = ["11833f4c-341f-4bd3-aad7-f7abed000101", "11833f4c-341f-4bd3-aad7-f7abed000102"];

/// W38: a node is found by what its Node object says; VMs that cannot be read stop nobody else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_are_found_by_provider_id_annotation_and_uuid() {
    let plain = standard().await;
    let kubernetes = Kubernetes::start().await.unwrap();
    for (vmid, uuid) in [(101, UUIDS[0]), (102, UUIDS[1])] {
        plain.sim.set_config(vmid, "smbios1", Some(&format!("uuid={},serial=aD10,base64=1", uuid.to_uppercase())));
    }
    node(&kubernetes, "by-id", "proxmox://fsn1/101", None, UUIDS[1]);
    node(&kubernetes, "by-annotation", "", Some("102"), UUIDS[0]);
    node(&kubernetes, "by-uuid", "proxmox://11833f4c-341f-4bd3-aad7-f7abed000102", None, "");
    node(&kubernetes, "by-system", "", None, UUIDS[0]);
    // Its own VM has exactly its name, and is not the one that capmox means.
    node(&kubernetes, "node-101", "proxmox://fsn1/102", None, UUIDS[1]);
    node(&kubernetes, "elsewhere", "proxmox://hel1/101", None, "");
    node(&kubernetes, "silent", "aws:///x", None, "");
    let capmox = with_features(&plain, "{provider: capmox}");
    let by = controller_of(&kubernetes, &capmox);
    let volume = plain.volume("pvc-1", "local").await;
    for (name, vmid) in [("by-id", 101), ("by-annotation", 102), ("by-uuid", 102), ("by-system", 101), ("node-101", 102), ("x/101", 101)] {
        publish_by(&by, &volume, name).await.unwrap();
        assert_eq!(plain.traces(vmid, &volume), ["configured scsi1", "plugged scsi1"], "{name}");
        unpublish_by(&by, &volume, name).await.unwrap();
        assert!(plain.traces(vmid, &volume).is_empty(), "{name}");
    }
    assert_refused(publish_by(&by, &volume, "elsewhere").await, Code::FailedPrecondition, &["region hel1", "provider ID"]);
    for unknown in ["silent", "no-such-node"] {
        assert_refused(publish_by(&by, &volume, unknown).await, Code::NotFound, &[unknown]);
    }
    assert_refused(capmox.publish(&volume, "by-id").await, Code::FailedPrecondition, &["capmox", "no Kubernetes API", "NAME/VMID"]);
    // The default: by name first, and by the Node object where no VM has it.
    let by = controller_of(&kubernetes, &plain);
    for (name, vmid) in [("node-101", 101), ("by-annotation", 102), ("by-uuid", 102)] {
        let found = publish_by(&by, &volume, name).await;
        if name == "by-uuid" {
            // Of VMs whose names begin with the node's only, as the reference driver does.
            assert_refused(found, Code::NotFound, &["by-uuid"]);
            continue;
        }
        found.unwrap();
        assert_eq!(plain.traces(vmid, &volume).len(), 2, "{name}");
        unpublish_by(&by, &volume, name).await.unwrap();
    }
    // Restored beside the original.
    plain.sim.set_config(102, "smbios1", Some(&format!("uuid={}", UUIDS[0])));
    let by = controller_of(&kubernetes, &capmox);
    assert_refused(publish_by(&by, &volume, "by-system").await, Code::FailedPrecondition, &["VMs 101 and 102", "qm set 102 --smbios1"]);
}
