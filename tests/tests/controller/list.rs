//! ListVolumes and ControllerGetVolume: every volume once, under its PV's own handle, published where NodeGetInfo says, and how it is.

use controller::service::ControllerService;
use proto::VolumeHandle;
use proto::csi::controller_service_capability::Type;
use proto::csi::controller_service_capability::rpc::Type as Capability;
use proto::csi::list_volumes_response::Entry;
use proto::csi::{self, controller_server::Controller as _};
use testbed::kube::Kubernetes;
use tonic::{Code, Request, Status};

use crate::bed::{Bed, MIB, assert_refused, standard};
use crate::hold::{publish_by, shared_bed};
use crate::kube::controller_of;

async fn page(by: &ControllerService, max_entries: i32, starting_token: &str) -> Result<csi::ListVolumesResponse, Status> {
    let request = csi::ListVolumesRequest { max_entries, starting_token: starting_token.into() };
    Ok(by.list_volumes(Request::new(request)).await?.into_inner())
}

async fn all(by: &ControllerService) -> Vec<Entry> {
    page(by, 0, "").await.unwrap().entries
}

fn id(entry: &Entry) -> &str {
    &entry.volume.as_ref().unwrap().volume_id
}

fn how(entry: &Entry) -> (Vec<String>, bool, String) {
    let status = entry.status.clone().unwrap();
    let condition = status.volume_condition.unwrap();
    (status.published_node_ids, condition.abnormal, condition.message)
}

async fn get(by: &ControllerService, volume_id: &str) -> Result<csi::ControllerGetVolumeResponse, Status> {
    let request = csi::ControllerGetVolumeRequest { volume_id: volume_id.into() };
    Ok(by.controller_get_volume(Request::new(request)).await?.into_inner())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_follow_each_other_and_a_wrong_token_is_told() {
    let bed = standard().await;
    let mut made = Vec::new();
    for (name, storage) in [("pvc-1", "local"), ("pvc-2", "local-lvm"), ("pvc-3", "local"), ("pvc-4", "local"), ("pvc-5", "local-lvm")] {
        made.push(bed.volume(name, storage).await.to_string());
    }
    // Neither other owners' disks nor the reference driver's snapshots are volumes.
    bed.sim.create_volume("pve1", "local-lvm:vm-101-disk-7", MIB).unwrap();
    bed.sim.create_volume("pve1", "local-lvm:vm-9999-snapshot-0b6c", MIB).unwrap();
    made.sort_by_key(|id| id.parse::<VolumeHandle>().unwrap());
    let (mut seen, mut token) = (Vec::new(), String::new());
    for size in [2, 2, 1] {
        let page = page(&bed.csi, 2, &token).await.unwrap();
        assert_eq!(page.entries.len(), size);
        seen.extend(page.entries.iter().map(|entry| id(entry).to_string()));
        token = page.next_token;
        // What goes between two pages moves nothing.
        if size == 2 && seen.len() == 2 {
            bed.delete(&made[0]).await.unwrap();
        }
    }
    assert!(token.is_empty());
    assert_eq!(seen, made);
    let first = all(&bed.csi).await.remove(0);
    assert_eq!(first.volume.as_ref().unwrap().capacity_bytes, 64 << 20);
    assert_eq!(how(&first), (vec![], false, "not attached".into()));
    for wrong in ["invalid-token", "2", "elsewhere/pve1/local/9999/vm-9999-a.raw"] {
        assert_refused(page(&bed.csi, 0, wrong).await, Code::Aborted, &["starting_token"]);
    }
    assert_refused(page(&bed.csi, -1, "").await, Code::InvalidArgument, &["max_entries -1"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_needs_kubernetes_is_advertised_with_it_only() {
    let bed = standard().await;
    let kubernetes = Kubernetes::start().await.unwrap();
    for (by, with) in [(bed.csi.clone(), false), (controller_of(&kubernetes, &bed), true)] {
        let answer = by.controller_get_capabilities(Request::new(csi::ControllerGetCapabilitiesRequest {})).await.unwrap().into_inner();
        let all: Vec<Capability> = answer
            .capabilities
            .into_iter()
            .map(|one| match one.r#type {
                Some(Type::Rpc(rpc)) => rpc.r#type(),
                None => Capability::Unknown,
            })
            .collect();
        for capability in [Capability::ListVolumes, Capability::GetVolume, Capability::VolumeCondition] {
            assert!(all.contains(&capability), "{capability:?}");
        }
        for capability in [Capability::ListVolumesPublishedNodes, Capability::ModifyVolume] {
            assert_eq!(all.contains(&capability), with, "{capability:?}");
        }
    }
    let refused = bed.csi.create_snapshot(Request::new(csi::CreateSnapshotRequest::default())).await;
    assert_refused(refused.map(drop), Code::Unimplemented, &["snapshots are not built yet"]);
}

/// Nodes by their own ids, PVs by their own handles: an old zone on shared storage, another owner.
async fn with_kubernetes() -> (Bed, Kubernetes, VolumeHandle, ControllerService) {
    let (bed, shared) = shared_bed().await;
    let kubernetes = Kubernetes::start().await.unwrap();
    kubernetes.node("node-101", "node-101");
    kubernetes.node("node-102", "node-102/102");
    kubernetes.node("node-201", "node-201/201");
    kubernetes.pv("pv-a", "fsn1/pve1/san/vm-9999-a");
    bed.sim.create_volume("pve1", "local-lvm:vm-777-disk-0", MIB).unwrap();
    kubernetes.pv("pv-static", "fsn1/pve1/local-lvm/vm-777-disk-0");
    kubernetes.pv("pv-gone", "fsn1/pve1/local-lvm/vm-9999-pv-gone");
    let by = controller_of(&kubernetes, &bed);
    (bed, kubernetes, shared, by)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_are_named_as_they_name_themselves_and_handles_as_pvs_have_them() {
    let (bed, _kubernetes, shared, by) = with_kubernetes().await;
    publish_by(&by, &shared, "node-101").await.unwrap();
    let foreign: VolumeHandle = "fsn1/pve1/local-lvm/vm-777-disk-0".parse().unwrap();
    publish_by(&by, &foreign, "node-102/102").await.unwrap();
    let entries = all(&by).await;
    let rows: Vec<(&str, Vec<String>, bool)> = entries.iter().map(|one| (id(one), how(one).0, how(one).1)).collect();
    assert_eq!(
        rows,
        [
            ("fsn1/pve1/local-lvm/vm-777-disk-0", vec!["node-102/102".to_string()], false),
            ("fsn1/pve1/local-lvm/vm-9999-pv-gone", vec![], true),
            ("fsn1/pve1/san/vm-9999-a", vec!["node-101".to_string()], false),
        ]
    );
    assert!(how(&entries[1]).2.contains("not on its storage"), "{:?}", how(&entries[1]));
    let status = get(&by, "fsn1/pve1/san/vm-9999-a").await.unwrap();
    assert_eq!(status.status.unwrap().published_node_ids, ["node-101"]);
    assert_eq!(status.volume.unwrap().capacity_bytes, 64 << 20);
    // W21: the drive vanishes by hand, and the attacher is told.
    bed.sim.stop_vm(101);
    bed.sim.set_config(101, "scsi1", None);
    bed.sim.start_vm(101).unwrap();
    let fresh = controller_of(&_kubernetes, &bed);
    let entries = all(&fresh).await;
    assert_eq!(how(entries.iter().find(|one| id(one).contains("san")).unwrap()), (vec![], false, "not attached".into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storage_that_does_not_answer_is_no_empty_storage() {
    let (bed, kubernetes, shared, by) = with_kubernetes().await;
    let there: VolumeHandle = "fsn1/pve2/ds/9999/vm-9999-b.raw".parse().unwrap();
    bed.sim.create_volume("pve2", &there.volid(), 64 * MIB).unwrap();
    kubernetes.pv("pv-b", &there.to_string());
    publish_by(&by, &shared, "node-201/201").await.unwrap();
    bed.sim.set_node_unreachable("pve2", Some("595 No route to host"));
    // Without Kubernetes nobody knows what is there.
    assert_refused(page(&bed.csi, 0, "").await, Code::Unavailable, &["ds", "pve2", "cannot be told"]);
    let fresh = controller_of(&kubernetes, &bed);
    kubernetes.attachment("pv-a", "node-201", true);
    for by in [&by, &fresh] {
        let entries = all(by).await;
        let of = |part: &str| how(entries.iter().find(|one| id(one).contains(part)).unwrap());
        assert!(of("vm-9999-b").1 && of("vm-9999-b").2.contains("pve2"), "{:?}", of("vm-9999-b"));
        assert_eq!(of("vm-9999-a").0, ["node-201/201"], "as last read, or as Kubernetes has it");
    }
    let status = get(&fresh, &there.to_string()).await.unwrap().status.unwrap();
    assert!(status.volume_condition.unwrap().message.contains("off since"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_is_not_well_is_abnormal() {
    let (bed, _kubernetes, shared, by) = with_kubernetes().await;
    assert_refused(get(&by, "fsn1//san/vm-9999-nope").await, Code::NotFound, &["vm-9999-nope"]);
    assert_refused(get(&by, "nonsense").await, Code::NotFound, &["nonsense"]);
    assert_refused(get(&by, "").await, Code::InvalidArgument, &["volume_id"]);
    publish_by(&by, &shared, "node-101").await.unwrap();
    bed.sim.set_config(102, "scsi7", Some(&shared.volid()));
    let fresh = controller_of(&_kubernetes, &bed);
    let condition = get(&fresh, &shared.to_string()).await.unwrap().status.unwrap().volume_condition.unwrap();
    assert!(condition.abnormal && condition.message.contains("more than one VM"), "{condition:?}");
    // As for configured, and not in QEMU.
    bed.sim.set_config(101, "scsi1", None);
    bed.sim.stop_vm(101);
    bed.sim.start_vm(101).unwrap();
    let fresh = controller_of(&_kubernetes, &bed);
    let status = get(&fresh, &shared.to_string()).await.unwrap().status.unwrap();
    assert!(status.published_node_ids.is_empty());
    assert!(status.volume_condition.unwrap().message.contains("QEMU does not have it"));
}

/// "Not attached" is said of what nobody holds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_that_is_no_vm_to_read_is_told() {
    let (bed, kubernetes, shared, by) = with_kubernetes().await;
    bed.sim.set_container(300, "pve1", &[("mp0", "san:vm-9999-a,mp=/x")]);
    let status = get(&by, &shared.to_string()).await.unwrap().status.unwrap();
    let condition = status.volume_condition.unwrap();
    assert!(condition.abnormal && condition.message.contains("container 300 on pve1"), "{condition:?}");
    bed.sim.set_container(300, "pve1", &[]);
    // On a node that is off, and never read.
    kubernetes.attachment("pv-a", "node-201", true);
    bed.sim.set_node_unreachable("pve2", Some("595 No route to host"));
    let fresh = controller_of(&kubernetes, &bed);
    let status = get(&fresh, &shared.to_string()).await.unwrap().status.unwrap();
    assert_eq!(status.published_node_ids, ["node-201/201"]);
    let condition = status.volume_condition.unwrap();
    assert!(condition.abnormal && condition.message.contains("VolumeAttachment to node node-201"), "{condition:?}");
}

/// One cluster that is away keeps nobody from seeing what is in the other; what it has is as Kubernetes has it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_does_not_answer_hides_no_other() {
    let here = standard().await;
    let volume = here.volume("pvc-1", "local").await;
    let dead = crate::bed::clusters("http://127.0.0.1:1/api2/json").replace("fsn1", "hel1").replacen("clusters:\n", "", 1);
    let both = crate::bed::with_config(std::sync::Arc::clone(&here.sim), &(crate::bed::clusters(here.sim.url()) + &dead));
    let kubernetes = Kubernetes::start().await.unwrap();
    kubernetes.node("node-101", "node-101/101");
    kubernetes.node("away", "away/101");
    kubernetes.pv("pv-away", "hel1/pve9/local/9999/vm-9999-pvc-1.raw");
    kubernetes.attachment("pv-away", "away", true);
    let by = controller_of(&kubernetes, &both);
    publish_by(&by, &volume, "node-101/101").await.unwrap();
    let entries = all(&by).await;
    let rows: Vec<(&str, Vec<String>, bool)> = entries.iter().map(|one| (id(one), how(one).0, how(one).1)).collect();
    assert_eq!(
        rows,
        [
            ("fsn1/pve1/local/9999/vm-9999-pvc-1.raw", vec!["node-101/101".to_string()], false),
            ("hel1/pve9/local/9999/vm-9999-pvc-1.raw", vec!["away/101".to_string()], true),
        ]
    );
}
