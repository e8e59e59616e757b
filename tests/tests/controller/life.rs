//! One volume's life, each call repeated, and what each costs.

use proto::csi::controller_server::Controller as _;
use proto::csi::{self, volume_capability::access_mode::Mode};
use tonic::{Code, Request};

use crate::bed::{MIB, assert_refused, capability, create_request, standard, topology, two_hosts};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volumes_life_on_every_local_storage() {
    for (storage, zeroed) in [("local", "1"), ("local-lvm", "1"), ("local-zfs", "1"), ("thick-lvm", "0")] {
        let bed = standard().await;
        let created = bed.create_as(create_request("pvc-1", storage, 64 * MIB)).await.unwrap();
        assert_eq!(created.capacity_bytes, 64 << 20, "{storage}");
        assert_eq!(created.volume_context["contentSource"], "none");
        assert_eq!(created.accessible_topology[0].segments[proto::TOPOLOGY_ZONE], "pve1");
        let volume: proto::VolumeHandle = created.volume_id.parse().unwrap();
        assert!(bed.sim.image("pve1", &volume.volid()).is_some(), "{storage}: {volume}");

        let context = bed.publish(&volume, "node-101/101").await.unwrap();
        assert_eq!(context["DevicePath"], "/dev/disk/by-id/wwn-0x5056432d49443031");
        assert_eq!((context["lun"].as_str(), context["serial"].as_str()), ("1", volume.serial().as_str()));
        assert_eq!(context["zeroed"], zeroed, "{storage}");
        assert_eq!(bed.traces(101, &volume), ["configured scsi1", "plugged scsi1"]);

        let expanded = bed.expand(&created.volume_id, 128 * MIB, 0).await.unwrap();
        assert_eq!(expanded.capacity_bytes, 128 << 20);

        assert_refused(bed.delete(&created.volume_id).await, Code::FailedPrecondition, &["VM 101 on pve1", "scsi1"]);
        bed.unpublish(&volume, "node-101/101").await.unwrap();
        assert!(bed.traces(101, &volume).is_empty(), "{storage}");
        bed.delete(&created.volume_id).await.unwrap();
        assert!(bed.sim.volumes("pve1", storage).is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_call_may_be_repeated() {
    let bed = standard().await;
    let first = bed.create_as(create_request("pvc-1", "local", 64 * MIB)).await.unwrap();
    assert_eq!(bed.create_as(create_request("pvc-1", "local", 64 * MIB)).await.unwrap(), first);
    let volume = first.volume_id.parse().unwrap();
    let context = bed.publish(&volume, "node-101/101").await.unwrap();
    for _ in 0..3 {
        let again = bed.publish(&volume, "node-101/101").await.unwrap();
        for (key, value) in &context {
            assert_eq!(again[key], *value);
        }
        assert_eq!(again["sizeBytes"], (64 * MIB).to_string(), "the config's size, once it is read");
    }
    for _ in 0..2 {
        bed.expand(&first.volume_id, 128 * MIB, 0).await.unwrap();
    }
    for _ in 0..3 {
        bed.unpublish(&volume, "node-101/101").await.unwrap();
    }
    for _ in 0..3 {
        bed.delete(&first.volume_id).await.unwrap();
    }
    bed.unpublish(&volume, "node-101/101").await.unwrap();
}

/// W60, W61: one volume is asked about, not a storage's list; a VM is read once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_per_call() {
    let bed = standard().await;
    let created = bed.create_as(create_request("pvc-1", "local", 64 * MIB)).await.unwrap();
    let volume: proto::VolumeHandle = created.volume_id.parse().unwrap();
    let requests = bed.own_requests(101);
    assert!(requests.len() <= 1, "create: {requests:?}");

    bed.sim.reset_counters();
    bed.publish(&volume, "node-101/101").await.unwrap();
    let requests = bed.own_requests(101);
    assert!(requests.len() <= 3, "publish, nothing known: {requests:?}");

    bed.sim.reset_counters();
    bed.publish(&volume, "node-101/101").await.unwrap();
    let requests = bed.own_requests(101);
    assert!(requests.len() <= 1, "publish again: {requests:?}");

    bed.sim.reset_counters();
    bed.unpublish(&volume, "node-101/101").await.unwrap();
    let requests = bed.own_requests(101);
    assert!(requests.len() <= 3, "unpublish: {requests:?}");

    bed.sim.reset_counters();
    bed.unpublish(&volume, "node-101/101").await.unwrap();
    let requests = bed.own_requests(101);
    assert!(requests.len() <= 1, "unpublish again: {requests:?}");

    bed.sim.reset_counters();
    bed.delete(&created.volume_id).await.unwrap();
    let requests: Vec<String> = bed.own_requests(0).into_iter().filter(|request| !request.contains("/qemu/")).collect();
    assert!(requests.len() <= 1, "delete: {requests:?}");

    // What was read within the last minute is not read again; only the look after our own write asks for the newest VMs.
    bed.sim.reset_counters();
    let other = bed.volume("pvc-2", "local").await;
    bed.publish(&other, "node-102/102").await.unwrap();
    let lists =
        bed.sim.requests().iter().filter(|request| request.contains("/cluster/resources") || request.contains("permissions")).count();
    assert_eq!(lists, 1, "{:?}", bed.sim.requests());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_request_where_the_topology_leaves_one_zone_and_one_more_per_candidate() {
    let bed = two_hosts().await;
    bed.create_as(csi::CreateVolumeRequest { accessibility_requirements: topology(&["pve2"]), ..create_request("a", "ds", MIB) })
        .await
        .unwrap();
    assert_eq!(bed.own_requests(0).len(), 1, "{:?}", bed.sim.requests());
    bed.sim.reset_counters();
    bed.create_as(csi::CreateVolumeRequest { accessibility_requirements: topology(&["pve2", "pve1"]), ..create_request("b", "ds", MIB) })
        .await
        .unwrap();
    assert_eq!(bed.own_requests(0).len(), 2, "{:?}", bed.sim.requests());
}

/// W48, W50: what is not built is not advertised (no ControllerModifyVolume, whose values would not survive), and capacity is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn capabilities_capacity_and_validation() {
    let bed = standard().await;
    let capabilities = bed.csi.controller_get_capabilities(Request::new(csi::ControllerGetCapabilitiesRequest {})).await.unwrap();
    assert_eq!(capabilities.into_inner().capabilities.len(), 8);

    let capacity = |request| async { bed.csi.get_capacity(Request::new(request)).await.unwrap().into_inner().available_capacity };
    let all = capacity(csi::GetCapacityRequest::default()).await;
    let parameters = [("storage".to_string(), "local-lvm".to_string())];
    let one = capacity(csi::GetCapacityRequest { parameters: parameters.into(), ..Default::default() }).await;
    assert!(one > 0 && all > one, "{all} {one}");
    let none =
        capacity(csi::GetCapacityRequest { parameters: [("storage".to_string(), "nope".to_string())].into(), ..Default::default() }).await;
    assert_eq!(none, 0);

    let volume = bed.volume("pvc-1", "local").await;
    let validate = |id: &str, mode| {
        let request = csi::ValidateVolumeCapabilitiesRequest {
            volume_id: id.into(),
            volume_capabilities: vec![capability(mode)],
            ..Default::default()
        };
        bed.csi.validate_volume_capabilities(Request::new(request))
    };
    assert!(validate(&volume.to_string(), Mode::SingleNodeWriter).await.unwrap().into_inner().confirmed.is_some());
    let refused = validate(&volume.to_string(), Mode::MultiNodeMultiWriter).await.unwrap().into_inner();
    assert!(refused.confirmed.is_none() && refused.message.contains("MULTI_NODE_MULTI_WRITER"));
    assert_refused(validate("nonsense", Mode::SingleNodeWriter).await, Code::NotFound, &["nonsense"]);
    assert_refused(validate("fsn1/pve1/local/9999/vm-9999-nope.raw", Mode::SingleNodeWriter).await, Code::NotFound, &["vm-9999-nope"]);
    let missing = csi::ValidateVolumeCapabilitiesRequest { volume_id: volume.to_string(), ..Default::default() };
    assert_refused(bed.csi.validate_volume_capabilities(Request::new(missing)).await, Code::InvalidArgument, &["volume_capabilities"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_call_for_the_same_volume_is_aborted() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    let (first, second) = tokio::join!(bed.publish(&volume, "node-101/101"), bed.publish(&volume, "node-102/102"));
    first.unwrap();
    assert_refused(second, Code::Aborted, &["in flight", &volume.to_string()]);
    assert!(bed.traces(102, &volume).is_empty());
}
