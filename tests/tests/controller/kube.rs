//! What Kubernetes says of VMs that cannot be read: evidence for a dead host, and the word that it is off for certain.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use controller::kube::Kube;
use controller::run::Controller;
use controller::service::ControllerService;
use proto::VolumeHandle;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tonic::Code;

use crate::bed::{Bed, MIB, assert_refused};
use crate::hold::{publish_by, shared_bed, unpublish_by};

/// An API server of fixed answers: path without its query → status and body.
#[derive(Clone, Default)]
struct Fake {
    answers: Arc<Mutex<HashMap<String, (u16, Value)>>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Fake {
    fn put(&self, path: &str, status: u16, body: Value) {
        self.answers.lock().unwrap().insert(path.into(), (status, body));
    }

    /// Node `node-201` is VM 201; `pv-a` is attached to it.
    fn with_an_attachment(volume: &VolumeHandle) -> Self {
        let fake = Self::default();
        let node = |name: &str, id: &str| {
            json!({"metadata": {"name": name}, "spec": {"drivers": [
            {"name": "other.csi", "nodeID": "x"}, {"name": proto::DRIVER_NAME, "nodeID": id}]}})
        };
        let nodes = [node("node-101", "node-101/101"), node("node-102", "node-102/102"), node("node-201", "node-201/201")];
        fake.put("/apis/storage.k8s.io/v1/csinodes", 200, json!({"metadata": {}, "items": nodes}));
        let attachment = |attacher: &str, node: &str, pv: &str| {
            json!({"spec": {"attacher": attacher, "nodeName": node,
            "source": {"persistentVolumeName": pv}}})
        };
        let attachments = [attachment("other.csi", "node-101", "x"), attachment(proto::DRIVER_NAME, "node-201", "pv-a")];
        fake.put("/apis/storage.k8s.io/v1/volumeattachments", 200, json!({"metadata": {}, "items": attachments}));
        fake.put("/api/v1/persistentvolumes/pv-a", 200, json!({"spec": {"csi": {"volumeHandle": volume.to_string()}}}));
        fake.put("/api/v1/nodes/node-201", 200, json!({"spec": {}}));
        fake
    }

    fn taint(&self, node: &str) {
        let taint = json!({"key": "node.kubernetes.io/out-of-service", "value": "nodeshutdown", "effect": "NoExecute"});
        self.put(&format!("/api/v1/nodes/{node}"), 200, json!({"spec": {"taints": [taint]}}));
    }

    /// The head is all that matters: everything asked is a GET.
    async fn serve(self, listener: TcpListener) {
        while let Ok((mut stream, _)) = listener.accept().await {
            let fake = self.clone();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let Ok(byte) = stream.read_u8().await else { return };
                    head.push(byte);
                }
                let head = String::from_utf8(head).unwrap();
                let target = head.split(' ').nth(1).unwrap_or_default().to_owned();
                let path = target.split('?').next().unwrap_or_default().to_owned();
                let authorised = head.to_ascii_lowercase().contains("authorization: bearer pod-token");
                let known = fake.answers.lock().unwrap().get(&path).cloned();
                fake.asked.lock().unwrap().push(target);
                let (status, body) = if authorised { known.unwrap_or((404, json!({}))) } else { (401, json!({})) };
                let body = body.to_string();
                let answer = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
                let _ = stream.write_all(answer.as_bytes()).await;
            });
        }
    }

    /// A controller that knows nothing yet, and can ask this API server.
    async fn controller(&self, bed: &Bed) -> ControllerService {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(self.clone().serve(listener));
        let token = bed.config.with_file_name("token");
        std::fs::write(&token, "pod-token\n").unwrap();
        let kube = Kube::new(&url, token, None).unwrap();
        ControllerService::new(Arc::new(Controller::with_kube(bed.config.clone(), None, Some(Arc::new(kube)))))
    }
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
    let fake = Fake::with_an_attachment(&held);
    let controller = fake.controller(&bed).await;
    publish_by(&controller, &free, "node-101/101").await.unwrap();
    let refused = publish_by(&controller, &held, "node-102/102").await;
    assert_refused(
        refused,
        Code::FailedPrecondition,
        &["VM 201 on pve2", "VolumeAttachment to node node-201", "off since", "out-of-service"],
    );
    assert!(bed.traces(102, &held).is_empty());
    // Nobody asks Kubernetes when all hosts are there.
    bed.sim.set_node_unreachable("pve2", None);
    let controller = fake.controller(&bed).await;
    fake.asked.lock().unwrap().clear();
    let refused = publish_by(&controller, &held, "node-102/102").await;
    assert_refused(refused, Code::FailedPrecondition, &["VM 201 on pve2 has it configured as scsi1"]);
    assert!(fake.asked.lock().unwrap().is_empty(), "{:?}", fake.asked.lock().unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_out_of_service_taint_volumes_of_a_dead_host_move() {
    let (bed, held, _) = dead_host().await;
    let fake = Fake::with_an_attachment(&held);
    let controller = fake.controller(&bed).await;
    assert_refused(unpublish_by(&controller, &held, "node-201/201").await, Code::Unavailable, &["pve2 is off since"]);
    fake.taint("node-201");
    unpublish_by(&controller, &held, "node-201/201").await.unwrap();
    publish_by(&controller, &held, "node-102/102").await.unwrap();
    // The host is back, with the drive in its VM.
    bed.sim.set_node_unreachable("pve2", None);
    publish_by(&controller, &held, "node-102/102").await.unwrap();
    assert!(bed.traces(201, &held).is_empty(), "{:?}", bed.traces(201, &held));
    assert_eq!(bed.traces(102, &held).len(), 2);
}

/// What cannot be asked is not known: refused, with the call that failed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubernetes_that_does_not_answer_is_no_evidence() {
    let (bed, held, free) = dead_host().await;
    for (path, status, words) in [
        ("/apis/storage.k8s.io/v1/volumeattachments", 403, "403; give the controller's ServiceAccount get and list"),
        ("/apis/storage.k8s.io/v1/csinodes", 500, "csinodes"),
        ("/api/v1/persistentvolumes/pv-a", 500, "persistentvolumes/pv-a"),
    ] {
        let fake = Fake::with_an_attachment(&held);
        fake.put(path, status, json!({}));
        let controller = fake.controller(&bed).await;
        assert_refused(publish_by(&controller, &free, "node-101/101").await, Code::Unavailable, &["VM 201 on pve2", words]);
    }
    assert!(bed.traces(101, &free).is_empty());
}
