//! ControllerModifyVolume and VolumeAttributesClasses: what is written is read back, and is still there after the next attach.

use std::collections::HashMap;

use controller::service::ControllerService;
use proto::VolumeHandle;
use proto::csi::{self, controller_server::Controller as _};
use serde_json::json;
use testbed::kube::Kubernetes;
use testbed::sim::{Effect, Fault, Inner};
use tonic::{Code, Request, Status};

use crate::bed::{Bed, MIB, assert_refused, create_request, standard};
use crate::hold::{publish_by, unpublish_by};
use crate::kube::controller_of;

const CONFIG: &str = "/nodes/*/qemu/*/config";

fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_string(), (*value).to_string())).collect()
}

async fn modify(by: &ControllerService, volume_id: &str, pairs: &[(&str, &str)]) -> Result<(), Status> {
    let request = csi::ControllerModifyVolumeRequest { volume_id: volume_id.into(), mutable_parameters: map(pairs), ..Default::default() };
    by.controller_modify_volume(Request::new(request)).await.map(drop)
}

async fn with_kubernetes() -> (Bed, Kubernetes, ControllerService, VolumeHandle) {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    let kubernetes = Kubernetes::start().await.unwrap();
    kubernetes.pv("pvc-1", &volume.to_string());
    let by = controller_of(&kubernetes, &bed);
    (bed, kubernetes, by, volume)
}

fn drive(bed: &Bed) -> String {
    bed.sim.vm(101).unwrap().config["scsi1"].clone()
}

fn class_of_pv(kubernetes: &Kubernetes, volume: &VolumeHandle, class: &str) {
    let spec = json!({"csi": {"driver": proto::DRIVER_NAME, "volumeHandle": volume.to_string()}, "volumeAttributesClassName": class});
    kubernetes.put("/api/v1/persistentvolumes/pvc-1", json!({"metadata": {"name": "pvc-1"}, "spec": spec}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plugged_drive_is_changed_and_read_back() {
    let (bed, _kubernetes, by, volume) = with_kubernetes().await;
    publish_by(&by, &volume, "node-101/101").await.unwrap();
    let (id, before) = (volume.to_string(), drive(&bed));
    modify(&by, &id, &[("diskIOPS", "500"), ("diskMBpsWrite", "20"), ("diskMBpsWriteBurst", "60"), ("backup", "true")]).await.unwrap();
    for part in ["iops_rd=500", "iops_wr=500", "mbps_wr=20", "mbps_wr_max=60", "backup=1", "serial=csi-", "wwn=0x5056432d49443031"] {
        assert!(drive(&bed).contains(part), "{} lacks {part}", drive(&bed));
    }
    assert!(!drive(&bed).contains("mbps_rd"), "what is not given stays as it is");
    // The same again is no write.
    bed.sim.reset_counters();
    modify(&by, &id, &[("diskIOPS", "500")]).await.unwrap();
    assert!(!bed.sim.requests().iter().any(|request| request.starts_with("POST")), "{:?}", bed.sim.requests());
    modify(&by, &id, &[("diskIOPS", "0"), ("diskMBps", "0"), ("backup", "false")]).await.unwrap();
    assert_eq!(drive(&bed), before, "a limit of 0 is none");
    // An answer that is lost is looked after; a digest that changed is read again.
    bed.sim.inject(Fault::next("POST", CONFIG, Effect::TimeOutButComplete));
    modify(&by, &id, &[("diskIOPSRead", "7")]).await.unwrap();
    assert!(drive(&bed).contains("iops_rd=7"));
    bed.sim.before("POST", CONFIG, 1, |sim| sim.set_config(101, "description", Some("changed")));
    modify(&by, &id, &[("diskIOPSRead", "8")]).await.unwrap();
    assert!(drive(&bed).contains("iops_rd=8"));
}

/// W18: a drive that somebody detaches between the look and the write is not attached again by the write.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w18_a_drive_that_goes_meanwhile_is_not_brought_back() {
    let (bed, _kubernetes, by, volume) = with_kubernetes().await;
    let attached = |lun: u32| format!("scsi{lun}");
    let slot = attached(publish_by(&by, &volume, "node-101/101").await.unwrap());
    bed.sim.before("POST", CONFIG, 1, move |sim| sim.detach_by_hand(101, &slot));
    let answer = modify(&by, &volume.to_string(), &[("diskIOPS", "500")]).await;
    assert_refused(answer, Code::Unavailable, &["VM 101 does not have it configured (any more)"]);
    assert!(bed.traces(101, &volume).is_empty(), "{:?}", bed.traces(101, &volume));
    // The same into another slot: changed where it is now, and nowhere else.
    let slot = attached(publish_by(&by, &volume, "node-101/101").await.unwrap());
    let volid = volume.volid();
    bed.sim.before("POST", CONFIG, 1, move |sim| {
        sim.detach_by_hand(101, &slot);
        sim.attach_by_hand(101, "scsi7", &volid).unwrap();
    });
    let _answer = modify(&by, &volume.to_string(), &[("diskIOPS", "700")]).await;
    assert_eq!(bed.traces(101, &volume), ["configured scsi7", "plugged scsi7"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_changed_is_refused_and_nothing_stays_planned() {
    let (bed, _kubernetes, by, volume) = with_kubernetes().await;
    publish_by(&by, &volume, "node-101/101").await.unwrap();
    let (id, before) = (volume.to_string(), drive(&bed));
    assert_refused(modify(&by, &id, &[("diskIops", "1")]).await, Code::InvalidArgument, &["diskIops", "known are", "diskIOPSReadBurst"]);
    assert_refused(modify(&by, "", &[]).await, Code::InvalidArgument, &["volume_id"]);
    assert_refused(modify(&by, "non-existing", &[]).await, Code::NotFound, &["non-existing"]);
    assert_refused(modify(&by, "fsn1/pve1/local/9999/vm-9999-x.raw", &[]).await, Code::NotFound, &["vm-9999-x"]);
    assert_refused(
        modify(&by, &id, &[("diskIOPS", "50"), ("diskIOPSBurst", "10")]).await,
        Code::InvalidArgument,
        &["iops_rd_max=10", "below its limit iops_rd=50"],
    );
    assert_refused(modify(&by, &id, &[("cache", "writeback")]).await, Code::FailedPrecondition, &["cache=none", "stop its pod"]);
    assert_refused(modify(&bed.csi, &id, &[("diskIOPS", "1")]).await, Code::Unimplemented, &["Kubernetes API"]);
    bed.sim.set_pending(101, "scsi1", &format!("{before},queues=4"));
    assert_refused(modify(&by, &id, &[("diskIOPS", "50")]).await, Code::FailedPrecondition, &["--revert scsi1"]);
    bed.sim.drop_pending(101);
    bed.sim.set_lock(101, Some("backup"));
    assert_refused(modify_within(&by, &id).await, Code::Unavailable, &["locked (backup)"]);
    bed.sim.set_lock(101, None);
    // Its worker dies between the plan and the config: the plan must not wait for the VM's next start.
    bed.sim.inject_inner(Inner::WorkerDies { vmid: 101 }, 1);
    assert!(modify(&by, &id, &[("diskIOPS", "50")]).await.is_err());
    assert_eq!(drive(&bed), before);
    assert!(bed.sim.vm(101).unwrap().pending.is_empty());
}

/// With a deadline that is over soon.
async fn modify_within(by: &ControllerService, volume_id: &str) -> Result<(), Status> {
    let request = csi::ControllerModifyVolumeRequest {
        volume_id: volume_id.into(),
        mutable_parameters: map(&[("diskIOPS", "50")]),
        ..Default::default()
    };
    let mut request = Request::new(request);
    request.metadata_mut().insert("grpc-timeout", "1S".parse().unwrap());
    by.controller_modify_volume(request).await.map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_detached_volume_gets_it_at_the_next_attach_and_at_all_later_ones() {
    let (bed, kubernetes, by, volume) = with_kubernetes().await;
    let id = volume.to_string();
    // The PV still names no class: what was said last counts.
    modify(&by, &id, &[("diskIOPS", "500"), ("cache", "writeback")]).await.unwrap();
    publish_by(&by, &volume, "node-101/101").await.unwrap();
    assert!(drive(&bed).contains("iops_rd=500") && drive(&bed).contains("cache=writeback"), "{}", drive(&bed));
    unpublish_by(&by, &volume, "node-101/101").await.unwrap();
    // W48: a controller that knows nothing reads the PV's class, of either API version.
    for api in ["v1", "v1beta1"] {
        kubernetes.remove("/apis/storage.k8s.io/v1/volumeattributesclasses/gold");
        let path = format!("/apis/storage.k8s.io/{api}/volumeattributesclasses/gold");
        kubernetes.put(&path, json!({"metadata": {"name": "gold"}, "parameters": {"diskMBps": "30", "replicateSchedule": "*/5"}}));
        class_of_pv(&kubernetes, &volume, "gold");
        let fresh = controller_of(&kubernetes, &bed);
        publish_by(&fresh, &volume, "node-101/101").await.unwrap();
        assert!(drive(&bed).contains("mbps_rd=30,mbps_wr=30") && !drive(&bed).contains("iops"), "{}", drive(&bed));
        unpublish_by(&fresh, &volume, "node-101/101").await.unwrap();
    }
    // What cannot be asked is not guessed.
    kubernetes.breaks("GET /apis/storage.k8s.io/v1/volumeattributesclasses", Some(403));
    let fresh = controller_of(&kubernetes, &bed);
    assert_refused(
        publish_by(&fresh, &volume, "node-101/101").await,
        Code::Unavailable,
        &["volumeattributesclasses/gold", "give the controller's ServiceAccount"],
    );
    assert!(bed.traces(101, &volume).is_empty());
    // What is attached already needs no class.
    kubernetes.breaks("GET /apis/storage.k8s.io/v1/volumeattributesclasses", None);
    publish_by(&fresh, &volume, "node-101/101").await.unwrap();
    kubernetes.breaks("GET /apis/storage.k8s.io/v1/volumeattributesclasses", Some(403));
    publish_by(&fresh, &volume, "node-101/101").await.unwrap();
}

/// external-resizer repeats the call, and writes the PV's class only when it was OK.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cache_that_was_refused_while_attached_is_taken_over_by_the_next_attachment() {
    let (bed, _kubernetes, by, volume) = with_kubernetes().await;
    publish_by(&by, &volume, "node-101/101").await.unwrap();
    let (id, class) = (volume.to_string(), [("cache", "writeback"), ("diskIOPS", "70")]);
    assert_refused(modify(&by, &id, &class).await, Code::FailedPrecondition, &["stop its pod, and cache=writeback is taken over"]);
    assert!(!drive(&bed).contains("writeback"));
    unpublish_by(&by, &volume, "node-101/101").await.unwrap();
    publish_by(&by, &volume, "node-101/101").await.unwrap();
    assert!(drive(&bed).contains("cache=writeback") && drive(&bed).contains("iops_rd=70"), "{}", drive(&bed));
    modify(&by, &id, &class).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_class_at_creation_is_kept_in_the_context() {
    let bed = standard().await;
    let request =
        |pairs: &[(&str, &str)]| csi::CreateVolumeRequest { mutable_parameters: map(pairs), ..create_request("pvc-9", "local", 64 * MIB) };
    assert_refused(bed.create_as(request(&[("diskIops", "1")])).await, Code::InvalidArgument, &["diskIops", "known are"]);
    assert_refused(
        bed.create_as(request(&[("diskIOPS", "9"), ("diskIOPSReadBurst", "3")])).await,
        Code::InvalidArgument,
        &["iops_rd_max=3"],
    );
    let made = bed.create_as(request(&[("diskIOPSWrite", "40"), ("backup", "true")])).await.unwrap();
    let volume: VolumeHandle = made.volume_id.parse().unwrap();
    let request = csi::ControllerPublishVolumeRequest {
        volume_context: made.volume_context.clone(),
        ..crate::bed::publish_request(&volume, "node-101/101")
    };
    bed.publish_as(request).await.unwrap();
    assert!(drive(&bed).contains("iops_wr=40") && drive(&bed).contains("backup=1"), "{}", drive(&bed));
    assert!(!drive(&bed).contains("iops_rd="));
}
