//! The day of the switch: a whole cluster as the reference driver leaves it (takeover.yaml) is taken over as it is, and could be given
//! back: what we attach has the form that its detach looks for.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use controller::service::ControllerService;
use proto::VolumeHandle;
use proto::csi::{self, controller_server::Controller as _};
use serde::Deserialize;
use serde_json::json;
use testbed::kube::Kubernetes;
use testbed::sim::{Description, Simulator};
use tonic::{Code, Request};

use crate::bed::{Bed, MIB, assert_refused, clusters, create_request, publish_request, release, topology, with_config};
use crate::hold::unpublish_by;
use crate::kube::controller_of;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    proxmox: Description,
    volumes: Vec<(String, String)>,
    pvs: BTreeMap<String, Pv>,
    nodes: BTreeMap<String, Node>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pv {
    handle: String,
    #[serde(default)]
    worker: Option<String>,
    #[serde(default)]
    path: String,
    #[serde(default)]
    lun: String,
    context: HashMap<String, String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Node {
    id: String,
    provider: String,
}

impl Pv {
    fn volume(&self) -> VolumeHandle {
        self.handle.parse().unwrap()
    }

    fn publish(&self, node: &str) -> csi::ControllerPublishVolumeRequest {
        csi::ControllerPublishVolumeRequest { volume_context: self.context.clone(), ..publish_request(&self.volume(), node) }
    }
}

/// The cluster as it was, and a controller that comes to it new.
async fn taken_over() -> (Bed, State, Kubernetes, ControllerService) {
    let text = include_str!("takeover.yaml");
    let state: State = serde_yaml::from_str(text).unwrap();
    let sim = Arc::new(Simulator::builder(state.proxmox.clone()).version(release()).start().await.unwrap());
    for (node, volid) in &state.volumes {
        sim.create_volume(node, volid, 64 * MIB).unwrap();
    }
    let bed = with_config(Arc::clone(&sim), &clusters(sim.url()));
    let kubernetes = Kubernetes::start().await.unwrap();
    for (name, node) in &state.nodes {
        kubernetes.node(name, &node.id);
        kubernetes.put(&format!("/api/v1/nodes/{name}"), json!({"metadata": {"name": name}, "spec": {"providerID": node.provider}}));
    }
    for (name, pv) in &state.pvs {
        kubernetes.pv(name, &pv.handle);
        if let Some(worker) = &pv.worker {
            kubernetes.attachment(name, worker, true);
        }
    }
    let by = controller_of(&kubernetes, &bed);
    (bed, state, kubernetes, by)
}

fn drives(bed: &Bed) -> BTreeMap<(u32, String), String> {
    let of = |vmid: u32| {
        bed.sim
            .vm(vmid)
            .unwrap()
            .config
            .into_iter()
            .filter(|(key, _)| key.starts_with("scsi") && key != "scsihw")
            .map(move |(key, line)| ((vmid, key), line))
    };
    [101, 102, 10010].into_iter().flat_map(of).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_attached_stays_as_it_is_and_is_known() {
    let (bed, state, kubernetes, by) = taken_over().await;
    let before = drives(&bed);
    let listed = by.list_volumes(Request::new(csi::ListVolumesRequest::default())).await.unwrap().into_inner().entries;
    let published: BTreeMap<String, Vec<String>> =
        listed.into_iter().map(|entry| (entry.volume.unwrap().volume_id, entry.status.unwrap().published_node_ids)).collect();
    for (name, pv) in &state.pvs {
        let nodes: Vec<String> = pv.worker.iter().map(|worker| state.nodes[worker].id.clone()).collect();
        assert_eq!(published[&pv.handle], nodes, "{name}: external-attacher would attach or detach it");
    }
    assert_eq!(published.len(), state.pvs.len(), "each once, and no snapshot: {published:?}");
    // The attacher's resync: every attachment once more.
    for (name, pv) in &state.pvs {
        let Some(worker) = &pv.worker else { continue };
        let answer = by.controller_publish_volume(Request::new(pv.publish(&state.nodes[worker].id))).await.unwrap().into_inner();
        assert_eq!((&answer.publish_context["DevicePath"], &answer.publish_context["lun"]), (&pv.path, &pv.lun), "{name}");
        assert!(!answer.publish_context.contains_key("serial"), "{name}: a serial that the drive has not");
        // Nobody else gets it.
        let other = if worker == "worker-1" { "worker-2" } else { "worker-1" };
        let refused = by.controller_publish_volume(Request::new(pv.publish(&state.nodes[other].id))).await;
        assert_eq!(refused.unwrap_err().code(), Code::FailedPrecondition, "{name}");
    }
    assert_eq!(drives(&bed), before, "nothing was written");
    let written: Vec<String> =
        kubernetes.asked().into_iter().filter(|call| !call.starts_with("GET ") && !call.contains("/events")).collect();
    assert!(written.is_empty(), "{written:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_grown_changed_detached_and_attached_anew() {
    let (bed, state, _kubernetes, by) = taken_over().await;
    for (name, pv) in &state.pvs {
        let Some(worker) = &pv.worker else { continue };
        let (node, volume) = (state.nodes[worker].id.as_str(), pv.volume());
        let range = csi::CapacityRange { required_bytes: 128 << 20, limit_bytes: 0 };
        let expand = csi::ControllerExpandVolumeRequest { volume_id: pv.handle.clone(), capacity_range: Some(range), ..Default::default() };
        by.controller_expand_volume(Request::new(expand)).await.unwrap_or_else(|why| panic!("{name}: {why:?}"));
        let mutable_parameters = HashMap::from([("diskIOPSRead".to_string(), "70".to_string())]);
        let modify = csi::ControllerModifyVolumeRequest { volume_id: pv.handle.clone(), mutable_parameters, ..Default::default() };
        by.controller_modify_volume(Request::new(modify)).await.unwrap_or_else(|why| panic!("{name}: {why:?}"));
        let vmid = if worker == "worker-1" { 101 } else { 102 };
        let line = bed.sim.vm(vmid).unwrap().config[&format!("scsi{}", pv.lun)].clone();
        assert!(line.contains("iops_rd=70") && !line.contains("iops=") && line.contains("size=128M"), "{name}: {line}");
        if name == "pvc-cccc" {
            assert!(line.contains("iops_wr=100") && line.contains("mbps_wr=50"), "limits of both directions are kept: {line}");
        }
        unpublish_by(&by, &volume, node).await.unwrap_or_else(|why| panic!("{name}: {why:?}"));
        assert!(bed.traces(vmid, &volume).iter().all(|trace| trace.contains("unused")), "{name}: {:?}", bed.traces(vmid, &volume));
    }
    // W48: what a class of releases up to 0.15 wrote into the PV counts.
    let pv = &state.pvs["pvc-cccc"];
    let answer = by.controller_publish_volume(Request::new(pv.publish("worker-1/101"))).await.unwrap().into_inner();
    let slot = format!("scsi{}", answer.publish_context["lun"]);
    let line = bed.sim.vm(101).unwrap().config[&slot].clone();
    assert!(line.contains("mbps_rd=50"), "{line}");
    gives_back(&bed, 101, &pv.volume());
}

/// Its detach: finds the slot from scsi1 to scsi29 whose line has the disk's name in it, and unlinks that. Its next attach of another
/// volume takes the lowest free slot, and the slot's own wwn. What its node looks for is that wwn.
fn gives_back(bed: &Bed, vmid: u32, volume: &VolumeHandle) {
    let vm = bed.sim.vm(vmid).unwrap();
    let with_name: Vec<(&String, &String)> =
        vm.config.iter().filter(|(key, line)| key.starts_with("scsi") && line.contains(&volume.disk)).collect();
    let [(key, line)] = with_name.as_slice() else { panic!("{volume}: {with_name:?}") };
    let slot: u8 = key.strip_prefix("scsi").unwrap().parse().unwrap();
    assert!((1..=29).contains(&slot), "{key}");
    assert_eq!(line.split(',').next(), Some(volume.volid().as_str()), "the volume comes first and is no file=: {line}");
    assert!(line.split(',').skip(1).all(|part| part.split('=').count() == 2), "it drops options with another form: {line}");
    assert!(line.contains(&format!("wwn={}", proto::wwn_of_lun(slot))), "{line}");
    assert!(vm.plugged.contains_key(*key) && !vm.pending.contains_key(*key) && !vm.pending_delete.contains_key(*key));
    // The volume is found in its storage's listing by exactly this name.
    assert!(["pve1", "pve2"].iter().any(|host| bed.sim.volumes(host, &volume.storage).contains(&volume.volid())));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_we_make_and_attach_it_can_detach() {
    let (bed, state, _kubernetes, by) = taken_over().await;
    let mut made = vec![state.pvs["pvc-dddd"].publish("worker-1/101")];
    for (name, storage) in [("pvc-new-1", "local-lvm"), ("pvc-new-2", "local")] {
        let request =
            csi::CreateVolumeRequest { accessibility_requirements: topology(&["pve1"]), ..create_request(name, storage, 64 * MIB) };
        let volume = by.create_volume(Request::new(request)).await.unwrap().into_inner().volume.unwrap();
        assert!(volume.volume_id.contains(&format!("vm-9999-{name}")), "{}", volume.volume_id);
        let handle: VolumeHandle = volume.volume_id.parse().unwrap();
        made.push(csi::ControllerPublishVolumeRequest {
            volume_context: volume.volume_context,
            ..publish_request(&handle, "worker-1/101")
        });
    }
    for request in made {
        let volume: VolumeHandle = request.volume_id.parse().unwrap();
        let context = by.controller_publish_volume(Request::new(request)).await.unwrap().into_inner().publish_context;
        // Its node takes these two, and passes over what it does not know.
        assert!(
            context["DevicePath"].starts_with("/dev/disk/by-id/wwn-0x5056432d494430")
                || context["DevicePath"].starts_with("/dev/disk/by-id/wwn-0x5056432d494431")
        );
        gives_back(&bed, 101, &volume);
    }
    let line = &bed.sim.vm(101).unwrap().config["scsi4"];
    assert!(line.contains("cache=writethrough") && line.contains("iops_rd=300"), "{line}");
}

/// Not built: named, and neither disk nor objects are touched. Not ours by its name: not deleted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_built_or_not_ours_is_left_alone() {
    let (bed, state, kubernetes, by) = taken_over().await;
    let (before, disks) = (drives(&bed), bed.sim.volumes("pve1", "zfs"));
    let replicated = &state.pvs["pvc-repl"];
    for node in ["worker-1/101", "worker-2"] {
        let refused = by.controller_publish_volume(Request::new(replicated.publish(node))).await;
        assert_refused(refused, Code::FailedPrecondition, &["replication is not built yet", "nothing was touched"]);
    }
    let delete =
        |volume_id: &str| by.delete_volume(Request::new(csi::DeleteVolumeRequest { volume_id: volume_id.into(), ..Default::default() }));
    assert_refused(delete(&replicated.handle).await, Code::FailedPrecondition, &["replication is not built yet"]);
    assert_refused(delete("fsn1/pve1/local-lvm/vm-9999-snapshot-3f2a").await, Code::FailedPrecondition, &["snapshots are not built yet"]);
    let snapshot = csi::DeleteSnapshotRequest { snapshot_id: "fsn1/pve1/local-lvm/vm-9999-snapshot-3f2a".into(), ..Default::default() };
    assert_refused(by.delete_snapshot(Request::new(snapshot)).await, Code::Unimplemented, &["snapshots are not built yet"]);
    for (name, owner) in [("pv-foreign", "VM 777's"), ("pv-static", "VM 102's")] {
        assert_refused(delete(&state.pvs[name].handle).await, Code::FailedPrecondition, &[owner, "delete it by hand"]);
    }
    assert_eq!((drives(&bed), bed.sim.volumes("pve1", "zfs")), (before, disks));
    assert!(bed.sim.image("pve1", "local-lvm:vm-9999-snapshot-3f2a").is_some());
    let written: Vec<String> =
        kubernetes.asked().into_iter().filter(|call| !call.starts_with("GET ") && !call.contains("/events")).collect();
    assert!(written.is_empty(), "{written:?}");
}

/// §5.1: where its own labels differ from the well-known ones, they count.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_override_labels_place_a_volume() {
    let (_bed, _, _kubernetes, by) = taken_over().await;
    for key in ["node", "zone"] {
        let segments = [
            ("topology.kubernetes.io/region", "eu"),
            ("topology.kubernetes.io/zone", "rack-7"),
            ("topology.proxmox.sinextra.dev/region", "fsn1"),
            (&format!("topology.proxmox.sinextra.dev/{key}"), "pve2"),
        ];
        let segments = segments.iter().map(|(key, value)| ((*key).to_string(), (*value).to_string())).collect();
        let requirement = csi::TopologyRequirement { requisite: vec![csi::Topology { segments }], preferred: vec![] };
        let request = csi::CreateVolumeRequest {
            accessibility_requirements: Some(requirement),
            ..create_request(&format!("pvc-{key}"), "local-lvm", 64 * MIB)
        };
        let volume = by.create_volume(Request::new(request)).await.unwrap().into_inner().volume.unwrap();
        assert!(volume.volume_id.starts_with("fsn1/pve2/local-lvm/"), "{}", volume.volume_id);
    }
}
