//! GetCapacity: what is left, where, for which class; and what that costs.

use std::collections::HashMap;

use proto::csi::{self, controller_server::Controller as _};
use testbed::sim::{Effect, Fault, Simulator, Storage};
use tonic::{Code, Request, Status};

use crate::bed::{Bed, REGION, assert_refused, create_request, start, topology};
use crate::storages::three_hosts;

const GIB: u64 = 1 << 30;

/// `thin` local to each of three hosts, `ceph` shared by all, `san` by two; 100 GiB each.
async fn bed() -> Bed {
    let mut san = Storage::new("san", "lvm", &[("vgname", "san")]);
    (san.shared, san.nodes) = (Some(true), Some(vec!["pve1".into(), "pve2".into()]));
    let description = three_hosts()
        .storage(Storage::new("thin", "lvmthin", &[("vgname", "vg"), ("thinpool", "data")]))
        .storage(Storage::new("ceph", "rbd", &[("pool", "rbd")]))
        .storage(Storage { content: vec!["images".into()], ..Storage::new("fs", "cephfs", &[("path", "/mnt/pve/fs")]) })
        .storage(san);
    start(Simulator::builder(description)).await
}

async fn ask(bed: &Bed, parameters: &[(&str, &str)], zone: Option<&str>) -> Result<(u64, u64), Status> {
    let segments = zone.map(|zone| topology(&[zone]).unwrap().requisite[0].clone());
    let parameters = parameters.iter().map(|(key, value)| ((*key).to_string(), (*value).to_string())).collect();
    let request = csi::GetCapacityRequest { parameters, accessible_topology: segments, ..Default::default() };
    let answer = bed.csi.get_capacity(Request::new(request)).await?.into_inner();
    let of = |bytes: i64| u64::try_from(bytes).unwrap();
    Ok((of(answer.available_capacity), of(answer.maximum_volume_size.unwrap())))
}

/// W65: all zones and classes from one call, which the next minute's first asks again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w65_capacity_of_all_zones_and_classes_is_one_call() {
    let bed = bed().await;
    bed.sim.change_storage("ceph", |ceph| ceph.used_bytes = 30 * GIB);
    bed.sim.reset_counters();
    for zone in ["pve1", "pve2", "pve3"] {
        assert_eq!(ask(&bed, &[("storage", "thin")], Some(zone)).await.unwrap(), (100 * GIB, 100 * GIB), "{zone}");
        assert_eq!(ask(&bed, &[("storage", "ceph")], Some(zone)).await.unwrap(), (70 * GIB, 70 * GIB), "{zone}");
        let san = if zone == "pve3" { 0 } else { 100 * GIB };
        assert_eq!(ask(&bed, &[("storage", "san")], Some(zone)).await.unwrap(), (san, san), "{zone}");
    }
    assert_eq!(ask(&bed, &[("storage", "thin")], None).await.unwrap(), (300 * GIB, 100 * GIB), "the largest volume is one host's");
    assert_eq!(ask(&bed, &[("storage", "ceph")], None).await.unwrap(), (70 * GIB, 70 * GIB), "one storage, not three");
    assert_eq!(ask(&bed, &[("storage", "fs")], None).await.unwrap(), (0, 0), "of what cannot hold disks");
    assert_eq!(ask(&bed, &[("storage", "none")], None).await.unwrap(), (0, 0));
    assert_eq!(ask(&bed, &[("storage", "thin")], Some("pve9")).await.unwrap(), (0, 0));
    let region = csi::Topology { segments: HashMap::from([(proto::TOPOLOGY_REGION.to_string(), REGION.to_string())]) };
    let request = csi::GetCapacityRequest { accessible_topology: Some(region), ..Default::default() };
    assert!(bed.csi.get_capacity(Request::new(request)).await.unwrap().into_inner().available_capacity > 0);
    // local, local-lvm, local-zfs, thick-lvm and thin of three hosts, san once, ceph once.
    assert_eq!(ask(&bed, &[], None).await.unwrap(), ((15 * 100 + 100 + 70) * GIB, 100 * GIB));
    let asked = bed.sim.requests();
    assert_eq!(asked, ["GET /cluster/resources"], "{asked:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_is_off_has_no_room() {
    let bed = bed().await;
    bed.sim.set_node_unreachable("pve2", Some("595 No route to host"));
    assert_eq!(ask(&bed, &[("storage", "thin")], None).await.unwrap(), (200 * GIB, 100 * GIB));
    assert_eq!(ask(&bed, &[("storage", "thin")], Some("pve2")).await.unwrap(), (0, 0));
    assert_eq!(ask(&bed, &[("storage", "san")], None).await.unwrap(), (100 * GIB, 100 * GIB));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reserve_is_kept_and_promises_are_counted() {
    let bed = bed().await;
    bed.sim.change_storage("thin", |thin| thin.used_bytes = 50 * GIB);
    let on = Some("pve1");
    assert_eq!(ask(&bed, &[("storage", "thin"), ("storageReserve", "20%")], on).await.unwrap(), (30 * GIB, 30 * GIB));
    assert_eq!(ask(&bed, &[("storage", "thin"), ("storageReserve", "45Gi")], on).await.unwrap(), (5 * GIB, 5 * GIB));
    let class = [("storage", "thin"), ("storageOvercommit", "1.5")];
    assert_eq!(ask(&bed, &class, on).await.unwrap(), (150 * GIB, 150 * GIB), "what is used by others than volumes is no promise");
    assert_eq!(ask(&bed, &[("storage", "san"), ("storageOvercommit", "2")], None).await.unwrap(), (0, 0), "a thick one promises nothing");
    assert_refused(ask(&bed, &[("storage", "thin"), ("storageReserve", "much")], on).await, Code::InvalidArgument, &["storageReserve"]);

    let request = |name: &str, gib: u64| {
        let mut request = create_request(name, "thin", gib * GIB);
        request.parameters.insert("storageOvercommit".into(), "1.5".into());
        request.accessibility_requirements = topology(&["pve1"]);
        request
    };
    bed.create_as(request("pvc-1", 100)).await.unwrap();
    // Two at once, room for one: the other one's promise counts before it is made.
    let (one, two) = tokio::join!(bed.create_as(request("pvc-2", 40)), bed.create_as(request("pvc-3", 40)));
    let refused = if one.is_ok() { two } else { one };
    assert_refused(refused, Code::ResourceExhausted, &["storageOvercommit lets all volumes together have 150%", "left: fsn1/pve1"]);
    assert_eq!(bed.sim.volumes("pve1", "thin").len(), 2);
    assert_eq!(ask(&bed, &class, on).await.unwrap(), (10 * GIB, 10 * GIB));
    // Without that word in the class Proxmox's own numbers count: nothing is written yet.
    assert_eq!(ask(&bed, &[("storage", "thin")], on).await.unwrap(), (50 * GIB, 50 * GIB));

    // Whose volumes cannot be listed has nothing to promise; the others have.
    bed.sim.inject(Fault::next("GET", "/nodes/pve2/storage/thin/content", Effect::Answer { status: 500, reason: "no".into() }).times(20));
    let (sum, most) = ask(&bed, &class, None).await.unwrap();
    assert_eq!((sum, most), (160 * GIB, 150 * GIB));
    assert!(ask(&bed, &class, Some("pve2")).await.is_err());
    let anywhere = csi::CreateVolumeRequest { accessibility_requirements: topology(&["pve2", "pve3"]), ..request("pvc-4", 1) };
    assert!(bed.create_as(anywhere).await.unwrap().volume_id.starts_with("fsn1/pve3/"));
    let full = csi::CreateVolumeRequest { accessibility_requirements: topology(&["pve1"]), ..create_request("pvc-5", "thin", 51 * GIB) };
    assert_refused(bed.create_as(full).await, Code::ResourceExhausted, &["free: fsn1/pve1"]);
}
