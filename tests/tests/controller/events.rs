//! Refusals that need a person, told as Kubernetes Events.

use std::sync::Arc;
use std::time::Duration;

use controller::kube::{Kube, events};
use controller::run::Controller;
use controller::service::ControllerService;
use proto::VolumeHandle;
use serde_json::Value;
use testbed::kube::Kubernetes;
use tonic::Code;

use crate::bed::{Bed, MIB, assert_refused};
use crate::hold::{publish_by, shared_bed, unpublish_by};

/// It is told beside the call: so often it is looked for.
const LOOKS: u32 = 500;
const LOOK: Duration = Duration::from_millis(20);

async fn bed() -> (Bed, VolumeHandle, Kubernetes, ControllerService) {
    let (bed, volume) = shared_bed().await;
    let kubernetes = Kubernetes::start().await.unwrap();
    let kube = Kube::new(kubernetes.access(bed.config.parent().unwrap()).unwrap()).unwrap();
    let by = ControllerService::new(Arc::new(Controller::with_kube(bed.config.clone(), None, Some(Arc::new(kube)))));
    (bed, volume, kubernetes, by)
}

async fn events_when(kubernetes: &Kubernetes, done: impl Fn(&[Value]) -> bool) -> Vec<Value> {
    for _ in 0..LOOKS {
        let events = kubernetes.events();
        if done(&events) {
            return events;
        }
        tokio::time::sleep(LOOK).await;
    }
    panic!("{:#?}", kubernetes.events());
}

/// A call that begins later is answered later: what was to be asked of Kubernetes for an earlier one has been asked by then.
async fn no_events(kubernetes: &Kubernetes) {
    tokio::time::sleep(LOOK * 10).await;
    assert!(kubernetes.events().is_empty(), "{:#?}", kubernetes.events());
}

#[tokio::test(start_paused = true)]
async fn a_refusal_that_needs_a_person_is_told_on_the_claim_and_counted() {
    let (bed, volume, kubernetes, by) = bed().await;
    // A static PV: only its attachment says which one it is.
    kubernetes.pv("static-pv", &volume.to_string());
    kubernetes.attachment("static-pv", "node-101", true);
    publish_by(&by, &volume, "node-101/101").await.unwrap();
    for _ in 0..3 {
        assert_refused(publish_by(&by, &volume, "node-102/102").await, Code::FailedPrecondition, &["VM 101 on pve1"]);
    }
    let events = events_when(&kubernetes, |events| !events.is_empty()).await;
    let event = &events[0];
    let object = &event["involvedObject"];
    assert_eq!((&object["kind"], &object["name"]), (&"PersistentVolumeClaim".into(), &"claim-static-pv".into()));
    assert_eq!((&object["namespace"], &event["metadata"]["namespace"]), (&"apps".into(), &"apps".into()));
    assert_eq!(object["uid"], "uid-of-claim-static-pv");
    assert_eq!((&event["reason"], &event["type"]), (&"VolumeAttachRefused".into(), &"Warning".into()));
    let message = event["message"].as_str().unwrap();
    assert!(message.contains("VM 101 on pve1 has it configured as scsi1") && message.contains("detach it there first"), "{message}");
    assert_eq!((events.len(), &event["count"]), (1, &1.into()), "the rest is only counted");

    tokio::time::sleep(events::SAME_AGE).await;
    assert!(publish_by(&by, &volume, "node-102/102").await.is_err());
    let events = events_when(&kubernetes, |events| events[0]["count"] != 1).await;
    assert_eq!((events.len(), &events[0]["count"]), (1, &4.into()));
    assert_ne!(events[0]["firstTimestamp"], events[0]["lastTimestamp"]);
    drop(bed);
}

/// A disk that was made for a claim says its PV's name; one PV is not bound any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_claim_it_is_told_on_the_pv() {
    let (bed, _, kubernetes, by) = bed().await;
    let volume: VolumeHandle = "fsn1//san/vm-9999-pvc-7".parse().unwrap();
    bed.sim.create_volume("pve1", &volume.volid(), 64 * MIB).unwrap();
    let spec = serde_json::json!({"csi": {"driver": proto::DRIVER_NAME, "volumeHandle": volume.to_string()}});
    kubernetes.put("/api/v1/persistentvolumes/pvc-7", serde_json::json!({"metadata": {"name": "pvc-7", "uid": "u7"}, "spec": spec}));
    bed.sim.attach_by_hand(101, "scsi5", &volume.volid()).unwrap();
    assert!(publish_by(&by, &volume, "node-102/102").await.is_err());
    let events = events_when(&kubernetes, |events| !events.is_empty()).await;
    let object = &events[0]["involvedObject"];
    assert_eq!((&object["kind"], &object["name"], &object["uid"]), (&"PersistentVolume".into(), &"pvc-7".into(), &"u7".into()));
    assert_eq!((&events[0]["metadata"]["namespace"], &object["namespace"]), (&"default".into(), &Value::Null));
}

/// What heals by itself is not told; nor is anything where Kubernetes does not want to hear it, and the call is as it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_heals_is_not_told_and_what_cannot_be_told_hinders_nobody() {
    let (bed, volume, kubernetes, by) = bed().await;
    kubernetes.pv("pv-a", &volume.to_string());
    kubernetes.attachment("pv-a", "node-101", true);
    bed.sim.stop_vm(102);
    assert_refused(publish_by(&by, &volume, "node-102/102").await, Code::Unavailable, &["is not running"]);
    no_events(&kubernetes).await;
    bed.sim.start_vm(102).unwrap();
    publish_by(&by, &volume, "node-101/101").await.unwrap();
    for (call, status) in [("POST /api/v1/namespaces/apps/events", 403), ("GET /api/v1/persistentvolumes", 0)] {
        kubernetes.breaks(call, Some(status));
        assert_refused(publish_by(&by, &volume, "node-102/102").await, Code::FailedPrecondition, &["VM 101 on pve1"]);
    }
    no_events(&kubernetes).await;
    unpublish_by(&by, &volume, "node-101/101").await.unwrap();
}
