//! Every kind of storage: what its volumes are called, how large they get, who reaches them; and the kinds that cannot hold any.

use std::collections::BTreeSet;

use proto::VolumeHandle;
use proto::csi;
use testbed::sim::{Description, Effect, Fault, Inner, Node, Simulator, Storage, Vm};
use tonic::Code;

use crate::bed::{Bed, MIB, REGION, assert_refused, create_request, start, start_as_it_is, topology};

/// Hosts pve1 (VMs 101, 102), pve2 (201) and pve3 (301).
pub(crate) fn three_hosts() -> Description {
    Description::standard()
        .node(Node::online("pve2"))
        .node(Node::online("pve3"))
        .vm(Vm::linux(201, "pve2", "node-201", None))
        .vm(Vm::linux(301, "pve3", "node-301", None))
}

fn with_storages(storages: Vec<Storage>) -> Description {
    storages.into_iter().fold(three_hosts(), Description::storage)
}

fn shared(storage: Storage) -> Storage {
    Storage { shared: Some(true), ..storage }
}

fn target() -> Storage {
    Storage::new("tank", "zfs", &[("pool", "tank"), ("portal", "10.0.0.5"), ("target", "iqn.2003-01.org.example:tank")])
}

fn every_kind() -> Vec<Storage> {
    vec![
        Storage::new("files", "dir", &[("path", "/files")]),
        Storage::new("tree", "btrfs", &[("path", "/tree")]),
        Storage::new("thick", "lvm", &[("vgname", "vg")]),
        Storage::new("thin", "lvmthin", &[("vgname", "vg"), ("thinpool", "data")]),
        Storage::new("pool", "zfspool", &[("pool", "rpool/data")]),
        shared(Storage::new("cluster-files", "dir", &[("path", "/cluster")])),
        Storage::new("nas", "nfs", &[("path", "/mnt/pve/nas")]),
        Storage::new("share", "cifs", &[("path", "/mnt/pve/share")]),
        shared(Storage::new("san", "lvm", &[("vgname", "san")])),
        target(),
        Storage::new("ceph", "rbd", &[("pool", "rbd")]),
    ]
}

/// Zone of each entry; `-` for one without.
fn zones(volume: &csi::Volume) -> Vec<&str> {
    let zone = |topology: &csi::Topology| -> String {
        assert_eq!(topology.segments[proto::TOPOLOGY_REGION], REGION);
        topology.segments.get(proto::TOPOLOGY_ZONE).cloned().unwrap_or_else(|| "-".into())
    };
    let known = ["-", "pve1", "pve2", "pve3"];
    let of: Vec<String> = volume.accessible_topology.iter().map(zone).collect();
    of.iter().map(|zone| *known.iter().find(|known| *known == zone).unwrap()).collect()
}

/// Made, found again, attached, grown and deleted; on a shared storage from one host to the next, by its own handle and by an
/// old one with a zone.
async fn live(bed: &Bed, storage: &str, created_bytes: u64, zeroed: &str, is_shared: bool) {
    let name = format!("pvc-{storage}");
    let request = || csi::CreateVolumeRequest {
        accessibility_requirements: topology(&["pve1", "pve2", "pve3"]),
        ..create_request(&name, storage, 5 * MIB + 1)
    };
    let made = bed.create_as(request()).await.unwrap();
    assert_eq!(u64::try_from(made.capacity_bytes).unwrap(), created_bytes, "{storage}");
    assert_eq!(bed.create_as(request()).await.unwrap(), made, "{storage}: the repeat");
    let volume: VolumeHandle = made.volume_id.parse().unwrap();
    let old = VolumeHandle { zone: "pve1".into(), ..volume.clone() };
    let mut nodes = vec![(&volume, "node-101/101", 101)];
    if is_shared {
        assert_eq!((volume.zone.as_str(), zones(&made)), ("", vec!["-"]), "{storage}");
        nodes.extend([(&volume, "node-201/201", 201), (&old, "node-301/301", 301)]);
    } else {
        assert_eq!((volume.zone.as_str(), zones(&made)), ("pve1", vec!["pve1"]), "{storage}: the first of equals");
    }
    let mut bytes = created_bytes;
    for (handle, node, vmid) in nodes {
        let context = bed.publish(handle, node).await.unwrap_or_else(|why| panic!("{storage}: {handle} to {node}: {why}"));
        assert_eq!(context["zeroed"], zeroed, "{storage}");
        assert_eq!(bed.traces(vmid, handle).len(), 2, "{storage}");
        bytes += 64 * MIB;
        let grown = bed.expand(&handle.to_string(), bytes, 0).await.unwrap();
        assert_eq!(u64::try_from(grown.capacity_bytes).unwrap(), bytes, "{storage}");
        assert_refused(bed.delete(&handle.to_string()).await, Code::FailedPrecondition, &["scsi1"]);
        bed.unpublish(handle, node).await.unwrap();
    }
    let (mine, other) = if is_shared { (&old, &volume) } else { (&volume, &volume) };
    bed.delete(&mine.to_string()).await.unwrap_or_else(|why| panic!("{storage}: delete: {why}"));
    bed.delete(&other.to_string()).await.unwrap_or_else(|why| panic!("{storage}: delete again: {why}"));
    assert!(bed.sim.volumes("pve1", storage).is_empty(), "{storage}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volumes_life_on_every_kind_of_storage() {
    let bed = start(Simulator::builder(with_storages(every_kind()))).await;
    for (storage, created_mib, zeroed, is_shared) in [
        ("files", 6, "1", false),
        ("tree", 6, "1", false),
        ("thick", 8, "0", false),
        ("thin", 8, "1", false),
        ("pool", 6, "1", false),
        ("cluster-files", 6, "1", true),
        ("nas", 6, "1", true),
        ("share", 6, "1", true),
        ("san", 8, "0", true),
        ("tank", 6, "0", true),
        ("ceph", 6, "1", true),
    ] {
        live(&bed, storage, created_mib * MIB, zeroed, is_shared).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_are_as_each_plugin_wants_them() {
    let bed = start(Simulator::builder(with_storages(every_kind()))).await;
    for (storage, id) in [
        ("tree", "fsn1/pve1/tree/9999/vm-9999-pvc-tree.raw"),
        ("nas", "fsn1//nas/9999/vm-9999-pvc-nas.raw"),
        ("san", "fsn1//san/vm-9999-pvc-san"),
        ("tank", "fsn1//tank/vm-9999-pvc-tank"),
        ("ceph", "fsn1//ceph/vm-9999-pvc-ceph"),
    ] {
        let name = format!("pvc-{storage}");
        let request = csi::CreateVolumeRequest { accessibility_requirements: topology(&["pve1"]), ..create_request(&name, storage, MIB) };
        assert_eq!(bed.create_as(request).await.unwrap().volume_id, id);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn storages_that_cannot_hold_vm_disks_are_refused_by_type() {
    let mut storages: Vec<Storage> = ["iscsi", "iscsidirect", "pbs", "esxi"].map(|kind| Storage::new(kind, kind, &[])).into();
    let backups = Storage { content: vec!["backup".into()], ..Storage::new("cephfs", "cephfs", &[("path", "/mnt/pve/cephfs")]) };
    storages.push(backups);
    let bed = start(Simulator::builder(with_storages(storages))).await;
    for kind in ["iscsi", "iscsidirect", "pbs", "esxi", "cephfs"] {
        let words = [&format!("type \"{kind}\", which cannot hold new VM disks"), "lvmthin"];
        assert_refused(bed.create_as(create_request("pvc-1", kind, MIB)).await, Code::InvalidArgument, &words);
    }
    assert!(!bed.sim.requests().iter().any(|request| request.starts_with("POST")), "{:?}", bed.sim.requests());
}

/// Some of the cluster's nodes have the storage: one entry for each, and none of the others is a place for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shared_storage_of_some_nodes_is_reached_from_those() {
    let san = Storage { nodes: Some(vec!["pve1".into(), "pve3".into()]), ..shared(Storage::new("san", "lvm", &[("vgname", "san")])) };
    let bed = start(Simulator::builder(with_storages(vec![san]))).await;
    let on = |name: &str, zone: &str| csi::CreateVolumeRequest {
        accessibility_requirements: topology(&[zone]),
        ..create_request(name, "san", MIB)
    };
    let made = bed.create_as(on("pvc-1", "pve3")).await.unwrap();
    assert_eq!((made.volume_id.as_str(), zones(&made)), ("fsn1//san/vm-9999-pvc-1", vec!["pve1", "pve3"]));
    assert!(bed.sim.requests().iter().any(|request| request.starts_with("POST /nodes/pve3/storage/san/content")));
    assert_refused(bed.create_as(on("pvc-2", "pve2")).await, Code::ResourceExhausted, &["fsn1/pve1, fsn1/pve3"]);
    // Disabled for a while on one of them, or one of them off: made through the other, and reached from both as before.
    bed.sim.set_node_unreachable("pve3", Some("595 No route to host"));
    let both = csi::CreateVolumeRequest { accessibility_requirements: topology(&["pve3", "pve1"]), ..create_request("pvc-3", "san", MIB) };
    let made = bed.create_as(both).await.unwrap();
    assert_eq!(zones(&made), ["pve1", "pve3"]);
    assert!(bed.sim.requests().iter().any(|request| request.starts_with("POST /nodes/pve1/storage/san/content")));
}

/// The host that an old handle names is off: a shared storage is reached through another one, and nothing is taken for gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_handle_with_a_zone_is_served_while_that_host_is_off() {
    let bed = start(Simulator::builder(with_storages(vec![shared(Storage::new("san", "lvm", &[("vgname", "san")]))]))).await;
    bed.sim.create_volume("pve1", "san:vm-9999-old", 64 * MIB).unwrap();
    let old: VolumeHandle = "fsn1/pve3/san/vm-9999-old".parse().unwrap();
    let gone: VolumeHandle = "fsn1/pve9/san/vm-9999-old".parse().unwrap();
    bed.sim.remove_vm(301);
    bed.sim.set_node_unreachable("pve3", Some("595 No route to host"));
    bed.publish(&old, "node-101/101").await.unwrap();
    assert_eq!(bed.expand(&old.to_string(), 128 * MIB, 0).await.unwrap().capacity_bytes, 128 << 20);
    bed.unpublish(&old, "node-101/101").await.unwrap();
    // Active nowhere is not gone.
    bed.sim.change_storage("san", |san| san.unmounted = true);
    let fresh = crate::hold::again(&bed);
    let request = csi::DeleteVolumeRequest { volume_id: gone.to_string(), ..Default::default() };
    let refused = proto::csi::controller_server::Controller::delete_volume(&fresh, tonic::Request::new(request)).await;
    assert_refused(refused, Code::Unavailable, &["\"san\" is active on no Proxmox node"]);
    bed.sim.change_storage("san", |san| san.unmounted = false);
    let fresh = crate::hold::again(&bed);
    let request = csi::DeleteVolumeRequest { volume_id: gone.to_string(), ..Default::default() };
    proto::csi::controller_server::Controller::delete_volume(&fresh, tonic::Request::new(request)).await.unwrap();
    assert!(bed.sim.volumes("pve1", "san").is_empty());
}

/// zfs over iSCSI says of no failure what it was: whether the volume is there is looked for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_answer_of_zfs_over_iscsi_makes_no_second_volume() {
    let bed = start(Simulator::builder(with_storages(vec![target()]))).await;
    bed.sim.inject(Fault::next("POST", "/nodes/*/storage/*/content", Effect::CloseAfterwards));
    let made = bed.create_as(create_request("pvc-1", "tank", 64 * MIB)).await.unwrap();
    assert_eq!((made.capacity_bytes, bed.sim.volumes("pve1", "tank").len()), (64 << 20, 1));
    assert_refused(bed.create_as(create_request("pvc-1", "tank", 65 * MIB)).await, Code::AlreadyExists, &["67108864"]);
    // What is not there stays an error, in Proxmox's own words.
    bed.sim.change_storage("tank", |tank| tank.used_bytes = tank.total_bytes - 100 * MIB);
    let fresh = create_request("pvc-2", "tank", 60 * MIB);
    assert_refused(bed.create_as(fresh).await, Code::Internal, &["zfs create", "exit code 1"]);
}

/// Of a zvol without its logical unit Proxmox says what it says of one that is not there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_zvol_without_its_unit_is_not_gone() {
    let bed = start(Simulator::builder(with_storages(vec![target()]))).await;
    let volume = bed.volume("pvc-1", "tank").await;
    let words = "Could not find lu_name for zvol vm-9999-pvc-1 at /usr/share/perl5/PVE/Storage/ZFSPlugin.pm line 118.";
    bed.sim.inject_inner(Inner::TaskFails { kind: "imgdel".into(), exit_status: words.into() }, 1);
    let refused = bed.delete(&volume.to_string()).await;
    assert_refused(refused, Code::FailedPrecondition, &["lu_name", "\"tank\" lists it", "pvesm list tank"]);
    assert_eq!(bed.sim.volumes("pve1", "tank").len(), 1);
    // Nobody can list it: not known is not gone.
    bed.sim.inject_inner(Inner::TaskFails { kind: "imgdel".into(), exit_status: words.into() }, 1);
    bed.sim.inject(Fault::next("GET", "/nodes/*/storage/*/content", Effect::Answer { status: 500, reason: "got timeout".into() }));
    assert!(bed.delete(&volume.to_string()).await.is_err());
    bed.delete(&volume.to_string()).await.unwrap();
    // Gone for certain.
    bed.delete(&volume.to_string()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qcow2_on_lvm_is_asked_for_by_name_and_raw_as_well() {
    let chain = shared(Storage::new("san", "lvm", &[("vgname", "san"), ("snapshot-as-volume-chain", "1")]));
    let plain = shared(Storage::new("plain", "lvm", &[("vgname", "plain")]));
    let bed = start_as_it_is(Simulator::builder(with_storages(vec![chain, plain])).version("9.2".parse().unwrap())).await;
    let qcow2 = |name: &str, storage: &str| {
        let mut request = create_request(name, storage, 64 * MIB);
        request.parameters.insert("storageFormat".into(), "qcow2".into());
        request
    };
    let made = bed.create_as(qcow2("pvc-1", "san")).await.unwrap();
    assert_eq!((made.volume_id.as_str(), made.capacity_bytes), ("fsn1//san/vm-9999-pvc-1.qcow2", 64 << 20));
    assert_eq!(bed.create_as(qcow2("pvc-1", "san")).await.unwrap(), made, "the logical volume is larger, and says nothing else");
    let mut other = qcow2("pvc-1", "san");
    other.capacity_range = Some(csi::CapacityRange { required_bytes: 128 << 20, limit_bytes: 128 << 20 });
    assert!(bed.create_as(other).await.is_err());
    let volume: VolumeHandle = made.volume_id.parse().unwrap();
    assert_eq!(bed.publish(&volume, "node-101/101").await.unwrap()["zeroed"], "1");
    bed.unpublish(&volume, "node-101/101").await.unwrap();
    bed.delete(&made.volume_id).await.unwrap();
    // The storage's own default is qcow2: a raw volume has to be asked for.
    let raw = bed.create_as(create_request("pvc-2", "san", 64 * MIB)).await.unwrap();
    assert_eq!(raw.volume_id, "fsn1//san/vm-9999-pvc-2");
    assert_refused(bed.create_as(qcow2("pvc-3", "plain")).await, Code::InvalidArgument, &["snapshot-as-volume-chain", "storageFormat"]);
    let left: BTreeSet<String> = bed.sim.volumes("pve1", "plain").into_iter().collect();
    assert!(left.is_empty(), "{left:?}");
}
