//! What Kubernetes says of VMs that cannot be read: evidence for a dead host, and the word that it is off for certain.

use std::sync::Arc;

use controller::kube::Kube;
use controller::run::Controller;
use controller::service::ControllerService;
use proto::VolumeHandle;
use testbed::kube::Kubernetes;
use tonic::Code;

use crate::bed::{Bed, MIB, assert_refused};
use crate::hold::{publish_by, shared_bed, unpublish_by};

/// Node `node-201` is VM 201; `pv-a` is attached to it.
async fn with_an_attachment(volume: &VolumeHandle) -> Kubernetes {
    let kubernetes = Kubernetes::start().await.unwrap();
    for vmid in [101, 102, 201] {
        kubernetes.node(&format!("node-{vmid}"), &format!("node-{vmid}/{vmid}"));
    }
    kubernetes.pv("pv-a", &volume.to_string());
    kubernetes.attachment_of("other.csi", "x", "node-101", true);
    kubernetes.attachment("pv-a", "node-201", true);
    kubernetes
}

/// A controller that knows nothing yet, and can ask this API server.
pub(crate) fn controller_of(kubernetes: &Kubernetes, bed: &Bed) -> ControllerService {
    let kube = Kube::new(kubernetes.access(bed.config.parent().unwrap()).unwrap()).unwrap();
    ControllerService::new(Arc::new(Controller::with_kube(bed.config.clone(), None, Some(Arc::new(kube)))))
}

/// pve2 with VM 201 is off, and nobody has read it since the restart.
async fn dead_host() -> (Bed, VolumeHandle, VolumeHandle) {
    let (bed, held) = shared_bed().await;
    let free: VolumeHandle = "fsn1//san/vm-9999-b".parse().unwrap();
    bed.sim.create_volume("pve1", &free.volid(), 64 * MIB).unwrap();
    bed.publish(&held, "node-201/201").await.unwrap();
    bed.sim.set_node_unreachable("pve2", Some("595 No route to host"));
    (bed, held, free)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restart_volume_attachments_say_what_a_dead_host_holds() {
    let (bed, held, free) = dead_host().await;
    let kubernetes = with_an_attachment(&held).await;
    let by = controller_of(&kubernetes, &bed);
    publish_by(&by, &free, "node-101/101").await.unwrap();
    let refused = publish_by(&by, &held, "node-102/102").await;
    assert_refused(
        refused,
        Code::FailedPrecondition,
        &["VM 201 on pve2", "VolumeAttachment to node node-201", "off since", "out-of-service"],
    );
    assert!(bed.traces(102, &held).is_empty());
    // Nobody asks Kubernetes who holds what when all hosts are there; that people are told of the refusal is another matter.
    bed.sim.set_node_unreachable("pve2", None);
    let by = controller_of(&kubernetes, &bed);
    let _ = kubernetes.asked();
    let refused = publish_by(&by, &held, "node-102/102").await;
    assert_refused(refused, Code::FailedPrecondition, &["VM 201 on pve2 has it configured as scsi1"]);
    let asked = kubernetes.asked();
    assert!(!asked.iter().any(|call| call.contains("csinodes")), "{asked:?}");
}

/// An object that is gone says nothing: not that nothing is attached.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_csinode_or_pv_is_no_word_that_nothing_is_attached() {
    let (bed, held, free) = dead_host().await;
    for (path, code, words) in [
        ("/apis/storage.k8s.io/v1/csinodes/node-201", Code::FailedPrecondition, "VolumeAttachment to node node-201"),
        ("/api/v1/persistentvolumes/pv-a", Code::Unavailable, "without its PV"),
    ] {
        let kubernetes = with_an_attachment(&held).await;
        kubernetes.remove(path);
        let by = controller_of(&kubernetes, &bed);
        assert_refused(publish_by(&by, &held, "node-102/102").await, code, &[words]);
        assert!(bed.traces(102, &held).is_empty());
        // Whatever else goes on, a volume that is attached nowhere is not held up by a node that was forgotten.
        if code == Code::FailedPrecondition {
            publish_by(&by, &free, "node-101/101").await.unwrap();
        }
    }
}

/// Another Proxmox cluster has a VM of the same number, which is another Kubernetes node: its taint says nothing of this one's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_number_in_two_clusters_is_two_nodes() {
    let (bed, held, _) = dead_host().await;
    let kubernetes = with_an_attachment(&held).await;
    kubernetes.node("elsewhere", "elsewhere/201");
    let by = controller_of(&kubernetes, &bed);
    kubernetes.taint("elsewhere", true);
    assert_refused(unpublish_by(&by, &held, "node-201/201").await, Code::Unavailable, &["pve2 is off since"]);
    kubernetes.taint("elsewhere", false);
    kubernetes.taint("node-201", true);
    unpublish_by(&by, &held, "node-201/201").await.unwrap();
    publish_by(&by, &held, "node-102/102").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_out_of_service_taint_volumes_of_a_dead_host_move() {
    let (bed, held, _) = dead_host().await;
    let kubernetes = with_an_attachment(&held).await;
    let by = controller_of(&kubernetes, &bed);
    assert_refused(unpublish_by(&by, &held, "node-201/201").await, Code::Unavailable, &["pve2 is off since"]);
    kubernetes.taint("node-201", true);
    unpublish_by(&by, &held, "node-201/201").await.unwrap();
    publish_by(&by, &held, "node-102/102").await.unwrap();
    // The host is back, with the drive in its VM.
    bed.sim.set_node_unreachable("pve2", None);
    publish_by(&by, &held, "node-102/102").await.unwrap();
    assert!(bed.traces(201, &held).is_empty(), "{:?}", bed.traces(201, &held));
    assert_eq!(bed.traces(102, &held).len(), 2);
}

/// What cannot be asked is not known: refused, with the call that failed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubernetes_that_does_not_answer_is_no_evidence() {
    let (bed, held, free) = dead_host().await;
    for (path, status, words) in [
        ("/apis/storage.k8s.io/v1/volumeattachments", 403, "403: refused: Broken; give the controller's ServiceAccount get and list"),
        ("/apis/storage.k8s.io/v1/csinodes", 500, "csinodes"),
        ("/api/v1/persistentvolumes/pv-a", 500, "persistentvolumes/pv-a"),
    ] {
        let kubernetes = with_an_attachment(&held).await;
        kubernetes.breaks(&format!("GET {path}"), Some(status));
        let by = controller_of(&kubernetes, &bed);
        assert_refused(publish_by(&by, &free, "node-101/101").await, Code::Unavailable, &["VM 201 on pve2", words]);
    }
    assert!(bed.traces(101, &free).is_empty());
}

/// The volume moved while pve2 was off; the host is back with the drive in VM 201, and the controller was restarted, with neither
/// taint nor `fencedNodes` to tell of it. Kubernetes says which of the two has it.
async fn back_again() -> (Bed, VolumeHandle, Kubernetes, ControllerService) {
    let (bed, held, _) = dead_host().await;
    let kubernetes = with_an_attachment(&held).await;
    let by = controller_of(&kubernetes, &bed);
    kubernetes.taint("node-201", true);
    unpublish_by(&by, &held, "node-201/201").await.unwrap();
    kubernetes.detached("pv-a", "node-201");
    kubernetes.attachment("pv-a", "node-102", false);
    publish_by(&by, &held, "node-102/102").await.unwrap();
    kubernetes.attachment("pv-a", "node-102", true);
    kubernetes.taint("node-201", false);
    bed.sim.set_node_unreachable("pve2", None);
    assert_eq!((bed.traces(201, &held).len(), bed.traces(102, &held).len()), (2, 2));
    let fresh = controller_of(&kubernetes, &bed);
    (bed, held, kubernetes, fresh)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restart_a_leftover_is_derived_from_what_kubernetes_has_attached() {
    for call in ["its publish again", "another volume to the old VM", "its publish to the old VM", "its unpublish"] {
        let (bed, held, kubernetes, by) = back_again().await;
        let other: VolumeHandle = "fsn1//san/vm-9999-b".parse().unwrap();
        match call {
            "its publish again" => drop(publish_by(&by, &held, "node-102/102").await.unwrap()),
            "another volume to the old VM" => {
                // The first call after a start has read everything that two VMs could have.
                publish_by(&by, &other, "node-101/101").await.unwrap();
                unpublish_by(&by, &other, "node-101/101").await.unwrap();
                publish_by(&by, &other, "node-201/201").await.unwrap();
                assert_eq!(bed.traces(201, &other).len(), 2);
            }
            "its publish to the old VM" => {
                kubernetes.attachment("pv-a", "node-201", false);
                let refused = publish_by(&by, &held, "node-201/201").await;
                assert_refused(refused, Code::FailedPrecondition, &["VM 102 on pve1 has it configured"]);
            }
            _ => {
                // Something was asked before, so that it is known who has what.
                publish_by(&by, &other, "node-101/101").await.unwrap();
                unpublish_by(&by, &held, "node-102/102").await.unwrap();
                kubernetes.detached("pv-a", "node-102");
                publish_by(&by, &held, "node-101/101").await.unwrap();
            }
        }
        assert!(bed.traces(201, &held).is_empty(), "{call}: {:?}", bed.traces(201, &held));
        let holder = if call == "its unpublish" { 101 } else { 102 };
        assert_eq!(bed.traces(holder, &held).len(), 2, "{call}: nothing is lost");
    }
}

/// What is no leftover for certain is left to a person: never is the only holder's taken, nor one that Kubernetes has attached,
/// nor a drive that is not ours.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_may_be_in_use_is_no_leftover() {
    for case in ["the only holder", "attached by Kubernetes", "not ours", "Kubernetes does not answer"] {
        let (bed, held, kubernetes, by) = back_again().await;
        let mut target = 102;
        match case {
            "the only holder" => {
                bed.sim.detach_by_hand(102, "scsi1");
                target = 101;
            }
            "attached by Kubernetes" => kubernetes.attachment("pv-a", "node-201", true),
            "not ours" => {
                bed.sim.detach_by_hand(201, "scsi1");
                bed.sim.attach_by_hand(201, "scsi7", &held.volid()).unwrap();
            }
            _ => kubernetes.breaks("GET /apis/storage.k8s.io/v1/volumeattachments", Some(500)),
        }
        let refused = publish_by(&by, &held, &format!("node-{target}/{target}")).await;
        let code = refused.as_ref().unwrap_err().code();
        assert!(matches!(code, Code::FailedPrecondition | Code::Unavailable), "{case}: {refused:?}");
        assert_eq!(bed.traces(201, &held).len(), 2, "{case}");
    }
}
