//! A Proxmox node that is off: what its VMs never held goes on, what they held waits for the operator's word, and comes back
//! without two writers.

use std::sync::Arc;

use proto::VolumeHandle;
use testbed::kube::Kubernetes;
use testbed::sim::{Description, Node, Simulator, Storage, Vm};
use tonic::Code;

use crate::bed::{Bed, MIB, assert_refused, clusters, start};
use crate::hold::{again, publish_by, shared_bed, unpublish_by};
use crate::kube::controller_of;

/// Rewrites the config file, and waits until it is looked at again.
pub(crate) async fn fence(bed: &Bed, hosts: &str) {
    std::fs::write(&bed.config, format!("{}    fencedNodes: [{hosts}]\n", clusters(bed.sim.url()))).unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
}

fn off(bed: &Bed, host: &str) {
    bed.sim.set_node_unreachable(host, Some("595 No route to host"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_vm_on_a_dead_host_holds_is_refused_with_all_there_is_to_say() {
    let (bed, volume) = shared_bed().await;
    bed.publish(&volume, "node-201/201").await.unwrap();
    // The cluster was read a moment ago, and says online.
    off(&bed, "pve2");
    let refused = bed.publish(&volume, "node-101/101").await;
    assert_refused(refused, Code::FailedPrecondition, &["VM 201 on pve2", "scsi1", "pve2 is off since 20", "UTC", "fencedNodes"]);
    assert_refused(bed.unpublish(&volume, "node-201/201").await, Code::Unavailable, &["pve2 is off since 20", "fencedNodes: [pve2]"]);
    // One that it never held is not in its way.
    let other: VolumeHandle = "fsn1//san/vm-9999-b".parse().unwrap();
    bed.sim.create_volume("pve1", &other.volid(), 64 * MIB).unwrap();
    bed.publish(&other, "node-101/101").await.unwrap();
    bed.unpublish(&other, "node-201/201").await.unwrap();
    // A cluster without quorum cannot say who is off.
    bed.sim.set_quorate(false);
    let fresh = again(&bed);
    assert_refused(publish_by(&fresh, &other, "node-102/102").await, Code::Unavailable, &["pve2", "no quorum"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_operators_word_it_moves_and_its_leftover_is_removed_when_the_host_is_back() {
    let (bed, volume) = shared_bed().await;
    let other: VolumeHandle = "fsn1//san/vm-9999-b".parse().unwrap();
    bed.sim.create_volume("pve1", &other.volid(), 64 * MIB).unwrap();
    bed.publish(&volume, "node-201/201").await.unwrap();
    off(&bed, "pve2");
    fence(&bed, "pve2").await;
    bed.unpublish(&volume, "node-201/201").await.unwrap();
    bed.publish(&volume, "node-101/101").await.unwrap();
    // Back, with the drive still in its config and the VM started from it.
    bed.sim.set_node_unreachable("pve2", None);
    assert_eq!(bed.traces(201, &volume).len(), 2);
    fence(&bed, "").await;
    bed.sim.advance(std::time::Duration::from_secs(61));
    bed.publish(&other, "node-201/201").await.unwrap();
    assert!(bed.traces(201, &volume).is_empty(), "{:?}", bed.traces(201, &volume));
    assert_eq!(bed.traces(101, &volume), ["configured scsi1", "plugged scsi1"], "nothing is lost");
    assert_eq!(bed.traces(201, &other).len(), 2);
    // And it may go there again.
    bed.unpublish(&volume, "node-101/101").await.unwrap();
    bed.publish(&volume, "node-201/201").await.unwrap();
    bed.publish(&volume, "node-201/201").await.unwrap();
    assert_eq!(bed.traces(201, &volume).len(), 2);
}

/// The cluster was read 20 s ago and the host is back since: its VMs may run again, whatever fencedNodes still says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_is_back_lets_nothing_go_by_the_operators_word() {
    let (bed, volume) = shared_bed().await;
    bed.publish(&volume, "node-201/201").await.unwrap();
    off(&bed, "pve2");
    let fresh = again(&bed);
    // Reads the cluster: pve2 is off.
    assert!(publish_by(&fresh, &volume, "node-101/101").await.is_err());
    fence(&bed, "pve2").await;
    bed.sim.set_node_unreachable("pve2", None);
    assert_refused(publish_by(&fresh, &volume, "node-101/101").await, Code::FailedPrecondition, &["VM 201 on pve2"]);
    assert_eq!((bed.traces(101, &volume).len(), bed.traces(201, &volume).len()), (0, 2));
}

/// The note of the takeover is gone with the process; the config file still names the node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restart_a_leftover_is_known_by_the_fenced_node_and_the_other_holder() {
    for publish_first in [true, false] {
        let (bed, volume) = shared_bed().await;
        let other: VolumeHandle = "fsn1//san/vm-9999-b".parse().unwrap();
        bed.sim.create_volume("pve1", &other.volid(), 64 * MIB).unwrap();
        bed.publish(&volume, "node-201/201").await.unwrap();
        off(&bed, "pve2");
        std::fs::write(&bed.config, format!("{}    fencedNodes: [pve2]\n", clusters(bed.sim.url()))).unwrap();
        // Never read by this one: by the operator's word its VMs hold nothing.
        let fresh = again(&bed);
        publish_by(&fresh, &volume, "node-101/101").await.unwrap();
        bed.sim.set_node_unreachable("pve2", None);
        let fresh = again(&bed);
        if publish_first {
            publish_by(&fresh, &volume, "node-101/101").await.unwrap();
        } else {
            publish_by(&fresh, &other, "node-201/201").await.unwrap();
        }
        assert!(bed.traces(201, &volume).is_empty(), "{:?}", bed.traces(201, &volume));
        assert_eq!(bed.traces(101, &volume).len(), 2, "nothing is lost");
    }
}

/// The controller whose entry in fencedNodes was forgotten: by Kubernetes both have it attached, so nobody's is a leftover.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forgotten_fenced_node_does_not_outrank_kubernetes() {
    let (bed, volume) = shared_bed().await;
    bed.publish(&volume, "node-201/201").await.unwrap();
    bed.sim.set_config(101, "scsi1", Some(&format!("{},size=64M", volume.volid())));
    bed.sim.start_vm(101).unwrap();
    let kubernetes = Kubernetes::start().await.unwrap();
    for vmid in [101, 201] {
        kubernetes.node(&format!("node-{vmid}"), &format!("node-{vmid}/{vmid}"));
    }
    kubernetes.pv("pv-a", &volume.to_string());
    kubernetes.attachment("pv-a", "node-201", true);
    fence(&bed, "pve2").await;
    let by = controller_of(&kubernetes, &bed);
    assert_refused(publish_by(&by, &volume, "node-101/101").await, Code::FailedPrecondition, &["VM 201 on pve2"]);
    assert_eq!(bed.traces(201, &volume).len(), 2);
}

/// Without the operator's word, and without a note, a second holder is nobody's leftover: a person decides.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_holders_that_nobody_explains_are_left_to_a_person() {
    let (bed, volume) = shared_bed().await;
    bed.publish(&volume, "node-201/201").await.unwrap();
    bed.sim.set_config(101, "scsi1", Some(&format!("{},size=64M", volume.volid())));
    bed.sim.start_vm(101).unwrap();
    let fresh = again(&bed);
    assert_refused(publish_by(&fresh, &volume, "node-101/101").await, Code::FailedPrecondition, &["VM 201 on pve2"]);
    assert_eq!((bed.traces(101, &volume).len(), bed.traces(201, &volume).len()), (2, 2));
    unpublish_by(&fresh, &volume, "node-101/101").await.unwrap();
    assert_eq!(bed.traces(201, &volume).len(), 2);
}

/// 32 hosts, 500 VMs, one host off: each volume that is not held there attaches; after a restart too, by the operator's word or by
/// what Kubernetes says. What is held there moves by the out-of-service taint, or by `fencedNodes`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_dead_host_of_many_stops_only_what_it_holds() {
    const HOSTS: u32 = 32;
    const VMS: u32 = 500;
    let mut san = Storage::new("san", "lvm", &[("vgname", "san")]);
    san.shared = Some(true);
    let mut about = Description::standard();
    about.vms.clear();
    for host in 2..=HOSTS {
        about = about.node(Node::online(&format!("pve{host}")));
    }
    for n in 0..VMS {
        about = about.vm(Vm::linux(1000 + n, &format!("pve{}", 1 + n % HOSTS), &format!("node-{n}"), None));
    }
    let bed = Arc::new(start(Simulator::builder(about.storage(san))).await);
    let volumes: Vec<VolumeHandle> = (0..20).map(|n| format!("fsn1//san/vm-9999-{n}").parse().unwrap()).collect();
    for volume in &volumes {
        bed.sim.create_volume("pve1", &volume.volid(), 64 * MIB).unwrap();
    }
    // VM 1007 is on pve8, which goes off.
    bed.publish(&volumes[0], "node-7/1007").await.unwrap();
    bed.publish(&volumes[1], "node-8/1008").await.unwrap();
    off(&bed, "pve8");
    assert_refused(bed.publish(&volumes[0], "node-1/1001").await, Code::FailedPrecondition, &["VM 1007 on pve8", "off since"]);
    let mut attaching = tokio::task::JoinSet::new();
    for (volume, vm) in volumes.iter().skip(2).cloned().zip(1000..) {
        let bed = Arc::clone(&bed);
        attaching.spawn(async move { if vm == 1007 { Ok(Default::default()) } else { bed.publish(&volume, &format!("n/{vm}")).await } });
    }
    for attached in attaching.join_all().await {
        attached.unwrap();
    }
    // Restarted, nothing known of pve8.
    let volume: VolumeHandle = "fsn1//san/vm-9999-x".parse().unwrap();
    bed.sim.create_volume("pve1", &volume.volid(), 64 * MIB).unwrap();
    let fresh = again(&bed);
    assert_refused(publish_by(&fresh, &volume, "n/1001").await, Code::Unavailable, &["on pve8", "not read before", "fencedNodes: [pve8]"]);
    moves_by_the_taint(&bed, &volumes[0], &volume, VMS).await;
    // The same without Kubernetes: VM 1008 is on pve9.
    off(&bed, "pve9");
    std::fs::write(&bed.config, format!("{}    fencedNodes: [pve9]\n", clusters(bed.sim.url()))).unwrap();
    let fresh = again(&bed);
    publish_by(&fresh, &volumes[1], "n/1002").await.unwrap();
}

/// `held` is in VM 1007, whose host is off; `other` never was there. Nobody knows but Kubernetes.
async fn moves_by_the_taint(bed: &Bed, held: &VolumeHandle, other: &VolumeHandle, vms: u32) {
    let kubernetes = Kubernetes::start().await.unwrap();
    for n in 0..vms {
        kubernetes.node(&format!("node-{n}"), &format!("node-{n}/{}", 1000 + n));
    }
    kubernetes.pv("pv-0", &held.to_string());
    kubernetes.attachment("pv-0", "node-7", true);
    let by = controller_of(&kubernetes, bed);
    publish_by(&by, other, "n/1001").await.unwrap();
    let words = ["VM 1007 on pve8", "VolumeAttachment to node node-7", "off since", "out-of-service"];
    assert_refused(publish_by(&by, held, "n/1002").await, Code::FailedPrecondition, &words);
    kubernetes.taint("node-7", true);
    unpublish_by(&by, held, "node-7/1007").await.unwrap();
    kubernetes.detached("pv-0", "node-7");
    publish_by(&by, held, "node-2/1002").await.unwrap();
    kubernetes.attachment("pv-0", "node-2", true);
    // Back, and nobody remembers: neither the taint nor a controller.
    kubernetes.taint("node-7", false);
    bed.sim.set_node_unreachable("pve8", None);
    assert_eq!(bed.traces(1007, held).len(), 2);
    publish_by(&controller_of(&kubernetes, bed), held, "node-2/1002").await.unwrap();
    assert!(bed.traces(1007, held).is_empty(), "{:?}", bed.traces(1007, held));
    assert_eq!(bed.traces(1002, held).len(), 2, "nothing is lost");
}
