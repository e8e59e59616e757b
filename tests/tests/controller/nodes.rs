//! Which VM a Kubernetes node is, where a number or a name alone would be another machine's.

use std::sync::Arc;

use proto::VolumeHandle;
use serde_json::json;
use testbed::kube::Kubernetes;
use testbed::sim::{Effect, Fault, Simulator, Vm};
use tonic::Code;

use crate::bed::{Bed, MIB, assert_refused, clusters, create_request, standard, topology, two_hosts_description, with_config};
use crate::hold::{again, publish_by, shared_bed, unpublish_by};
use crate::kube::controller_of;
use crate::owner::with_features;

const UUIDS: [&str; 2] = ["11833f4c-341f-4bd3-aad7-f7abed000101", "11833f4c-341f-4bd3-aad7-f7abed000102"];

/// What a Node object says; its agent says only its name.
fn node(kubernetes: &Kubernetes, name: &str, provider_id: &str, instance_id: Option<&str>) {
    kubernetes.node(name, name);
    let annotations = instance_id.map_or(json!({}), |id| json!({"proxmox.sinextra.dev/instance-id": id}));
    let object = json!({"metadata": {"name": name, "annotations": annotations}, "spec": {"providerID": provider_id}});
    kubernetes.put(&format!("/api/v1/nodes/{name}"), object);
}

/// Regions fsn1 and hel1, both with a VM 101: node-101 and hel-101. A volume of fsn1.
async fn two_regions() -> (Bed, VolumeHandle, Simulator) {
    let one = Simulator::standard().start().await.unwrap();
    let other = Simulator::builder(two_hosts_description()).with(|about| about.vms[0] = Vm::linux(101, "pve1", "hel-101", None));
    let other = other.start().await.unwrap();
    let second = clusters(other.url()).replace("clusters:\n", "").replace("fsn1", "hel1");
    let text = format!("{}{second}", clusters(one.url()));
    let bed = with_config(Arc::new(one), &text);
    let request =
        proto::csi::CreateVolumeRequest { accessibility_requirements: topology(&["pve1"]), ..create_request("pvc-1", "local", 64 * MIB) };
    let volume = bed.create_as(request).await.unwrap().volume_id.parse().unwrap();
    (bed, volume, other)
}

/// The pod landed on hel1's 101 first, where it was refused, and then on ours: the detach from the first one takes nothing from ours.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_detach_from_another_machine_of_that_number_takes_nothing() {
    let (bed, volume, _other) = two_regions().await;
    let kubernetes = Kubernetes::start().await.unwrap();
    node(&kubernetes, "hel-101", "proxmox://hel1/101", None);
    let by = controller_of(&kubernetes, &bed);
    assert_refused(publish_by(&by, &volume, "hel-101/101").await, Code::FailedPrecondition, &["region hel1"]);
    publish_by(&by, &volume, "node-101/101").await.unwrap();
    for id in ["hel-101/101", "hel-101"] {
        assert_refused(unpublish_by(&by, &volume, id).await, Code::FailedPrecondition, &[id, "VM 101 on pve1 has it configured"]);
        assert_eq!(bed.traces(101, &volume).len(), 2, "{id}");
    }
    // Elsewhere in our own cluster, by a clone that carries the number.
    assert_refused(unpublish_by(&by, &volume, "node-102/101").await, Code::FailedPrecondition, &["VM 102", "qm set 101 --delete scsi1"]);
    assert_eq!(bed.traces(101, &volume).len(), 2);
    unpublish_by(&by, &volume, "node-101/101").await.unwrap();
    for id in ["hel-101/101", "hel-101", "node-102/101"] {
        unpublish_by(&by, &volume, id).await.unwrap();
    }
}

/// Where there are several regions, a number that names none is anybody's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_number_without_a_region_is_not_that_of_every_region() {
    let (bed, volume, _other) = two_regions().await;
    let kubernetes = Kubernetes::start().await.unwrap();
    node(&kubernetes, "hel-101", "", Some("101"));
    node(&kubernetes, "talos", "proxmox:///101", None);
    node(&kubernetes, "node-101", "proxmox://hel1/101", None);
    node(&kubernetes, "node-101.lan", "proxmox:///101", None);
    node(&kubernetes, "by-id", "proxmox://fsn1/101", None);
    let by = controller_of(&kubernetes, &bed);
    for (name, words) in [
        ("hel-101", ["region hel1", "region fsn1"]),
        ("talos", ["without a region", "proxmox://REGION/101"]),
        ("node-101", ["region hel1", "provider ID"]),
    ] {
        assert_refused(publish_by(&by, &volume, name).await, Code::FailedPrecondition, &words);
        assert!(bed.traces(101, &volume).is_empty(), "{name}");
    }
    for name in ["node-101.lan", "by-id"] {
        publish_by(&by, &volume, name).await.unwrap();
        assert_eq!(bed.traces(101, &volume).len(), 2, "{name}");
        unpublish_by(&by, &volume, name).await.unwrap();
        assert!(bed.traces(101, &volume).is_empty(), "{name}");
    }
}

/// Its Kubernetes node was deleted; another region's node of its number is no reason to overlook what was attached to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bystander_hides_no_forgotten_node() {
    for bystander in ["elsewhere/201", "elsewhere"] {
        let (bed, held) = shared_bed().await;
        bed.publish(&held, "node-201/201").await.unwrap();
        bed.sim.set_node_unreachable("pve2", Some("595 No route to host"));
        let kubernetes = Kubernetes::start().await.unwrap();
        kubernetes.node("node-101", "node-101/101");
        kubernetes.node("elsewhere", bystander);
        kubernetes.taint("elsewhere", true);
        kubernetes.pv("pv-a", &held.to_string());
        kubernetes.attachment("pv-a", "node-201", true);
        let by = controller_of(&kubernetes, &bed);
        let refused = publish_by(&by, &held, "node-102/102").await;
        assert_refused(refused, Code::FailedPrecondition, &["VM 201 on pve2", "VolumeAttachment to node node-201"]);
        assert_refused(unpublish_by(&by, &held, "node-201/201").await, Code::Unavailable, &["pve2 is off since"]);
        assert!(bed.traces(102, &held).is_empty(), "{bystander}");
    }
}

/// One dead VM that nobody has read is not each node whose Node object carries a UUID.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_vm_is_no_node_that_another_vm_is_by_its_uuid() {
    let (plain, free) = shared_bed().await;
    for (vmid, uuid) in [(101, UUIDS[0]), (201, UUIDS[1])] {
        plain.sim.set_config(vmid, "smbios1", Some(&format!("uuid={uuid}")));
    }
    let kubernetes = Kubernetes::start().await.unwrap();
    node(&kubernetes, "by-uuid", &format!("proxmox://{}", UUIDS[0]), None);
    node(&kubernetes, "dead", &format!("proxmox://{}", UUIDS[1]), None);
    kubernetes.pv("pv-a", &free.to_string());
    kubernetes.attachment("pv-a", "by-uuid", false);
    let capmox = with_features(&plain, "{provider: capmox}");
    plain.sim.set_node_unreachable("pve2", Some("595 No route to host"));
    let by = controller_of(&kubernetes, &capmox);
    publish_by(&by, &free, "by-uuid").await.unwrap();
    unpublish_by(&by, &free, "by-uuid").await.unwrap();
    // What is attached to the dead one still is.
    kubernetes.attachment("pv-a", "dead", true);
    let fresh = controller_of(&kubernetes, &capmox);
    assert_refused(publish_by(&fresh, &free, "by-uuid").await, Code::FailedPrecondition, &["VM 201 on pve2", "node dead"]);
}

/// A copy that was restored beside the original has its UUID; while one of the two cannot be read, the other one is not it for certain.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_uuid_is_nobodys_while_a_vm_cannot_be_read() {
    let plain = standard().await;
    let volume = plain.volume("pvc-1", "local").await;
    for vmid in [101, 102] {
        plain.sim.set_config(vmid, "smbios1", Some(&format!("uuid={}", UUIDS[0])));
    }
    let kubernetes = Kubernetes::start().await.unwrap();
    node(&kubernetes, "by-uuid", &format!("proxmox://{}", UUIDS[0]), None);
    let capmox = with_features(&plain, "{provider: capmox}");
    let by = controller_of(&kubernetes, &capmox);
    let broken = Effect::Answer { status: 500, reason: "got no worker upid".into() };
    plain.sim.inject(Fault::next("GET", "/nodes/*/qemu/102/pending", broken).times(3));
    let refused = publish_by(&by, &volume, "by-uuid").await.unwrap_err();
    assert!(refused.message().contains("whether VM 102 is node by-uuid"), "{refused:?}");
    assert!(plain.traces(101, &volume).is_empty());
}

/// A VM that shows no name keeps nobody from being found by the Node object.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nameless_vm_is_in_the_way_of_no_provider_id() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.sim.set_fresh(102, true);
    assert_refused(publish_by(&again(&bed), &volume, "by-id").await, Code::Unavailable, &["shows no name now"]);
    let kubernetes = Kubernetes::start().await.unwrap();
    node(&kubernetes, "by-id", "proxmox://fsn1/101", None);
    node(&kubernetes, "silent", "", None);
    let by = controller_of(&kubernetes, &bed);
    publish_by(&by, &volume, "by-id").await.unwrap();
    assert_eq!(bed.traces(101, &volume).len(), 2);
    assert_refused(publish_by(&by, &volume, "silent").await, Code::Unavailable, &["shows no name now"]);
}

/// A cluster that hangs says of no name that it has it: then the Node object tells whose the number is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_detach_by_number_takes_nothing_for_a_node_of_a_region_that_is_silent() {
    let (bed, volume, other) = two_regions().await;
    bed.publish(&volume, "node-101/101").await.unwrap();
    let kubernetes = Kubernetes::start().await.unwrap();
    node(&kubernetes, "hel-101", "proxmox://hel1/101", None);
    other.inject(Fault { method: None, path: "/**".into(), nth: 1, times: 1000, effect: Effect::Hang });
    let by = controller_of(&kubernetes, &bed);
    assert_refused(unpublish_by(&by, &volume, "hel-101/101").await, Code::FailedPrecondition, &["region hel1", "VM 101 on pve1"]);
    assert_eq!(bed.traces(101, &volume).len(), 2);
    unpublish_by(&by, &volume, "node-101/101").await.unwrap();
    unpublish_by(&by, &volume, "hel-101/101").await.unwrap();
}

/// The dead VM could be either of two nodes that carry its number: the word about one of them lets nothing go.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_nodes_of_one_number_both_must_be_out_of_service() {
    let (bed, held) = shared_bed().await;
    bed.publish(&held, "node-201/201").await.unwrap();
    bed.sim.set_node_unreachable("pve2", Some("595 No route to host"));
    let kubernetes = Kubernetes::start().await.unwrap();
    kubernetes.node("node-102", "node-102/102");
    for name in ["one", "other"] {
        kubernetes.node(name, &format!("{name}/201"));
    }
    kubernetes.taint("one", true);
    kubernetes.pv("pv-a", &held.to_string());
    kubernetes.attachment("pv-a", "one", true);
    let by = controller_of(&kubernetes, &bed);
    assert_refused(publish_by(&by, &held, "node-102/102").await, Code::FailedPrecondition, &["VM 201 on pve2", "node one"]);
    assert!(bed.traces(102, &held).is_empty());
    // By its provider ID the other one is another cluster's.
    let object = json!({"metadata": {"name": "other"}, "spec": {"providerID": "proxmox://hel1/201"}});
    kubernetes.put("/api/v1/nodes/other", object);
    publish_by(&controller_of(&kubernetes, &bed), &held, "node-102/102").await.unwrap();
}
