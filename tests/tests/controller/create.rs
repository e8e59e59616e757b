//! CreateVolume: one volume per name, in a zone that can take it, or a sentence.

use std::collections::HashMap;

use proto::csi::{self, controller_server::Controller as _, volume_capability::access_mode::Mode};
use serde_json::json;
use testbed::kube::Kubernetes;
use testbed::sim::{Effect, Fault, Simulator};
use tonic::{Code, Request};

use crate::bed::{MIB, REGION, assert_refused, capability, create_request, standard, start, topology, two_hosts};

const CONTENT: &str = "/nodes/*/storage/*/content";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_bad_input_is_refused_before_anything_is_made() {
    type Change = fn(&mut csi::CreateVolumeRequest);
    fn range(required_bytes: i64, limit_bytes: i64) -> Option<csi::CapacityRange> {
        Some(csi::CapacityRange { required_bytes, limit_bytes })
    }
    fn parameter(request: &mut csi::CreateVolumeRequest, key: &str, value: &str) {
        request.parameters.insert(key.into(), value.into());
    }
    let cases: &[(Change, Code, &[&str])] = &[
        (|r| r.name.clear(), Code::InvalidArgument, &["name is missing"]),
        (|r| r.volume_capabilities.clear(), Code::InvalidArgument, &["volume_capabilities"]),
        (|r| r.volume_capabilities = vec![capability(Mode::MultiNodeReaderOnly)], Code::InvalidArgument, &["MULTI_NODE_READER_ONLY"]),
        (|r| r.parameters.clear(), Code::InvalidArgument, &["storage is missing"]),
        (|r| parameter(r, "storage", "nope"), Code::InvalidArgument, &["nope", "local-lvm", "Datastore.Audit"]),
        (|r| parameter(r, "cache", "none,file=/etc/passwd"), Code::InvalidArgument, &["cache", "writethrough"]),
        (|r| parameter(r, "replicate", "true"), Code::InvalidArgument, &["replicate"]),
        (|r| parameter(r, "nonsense", "1"), Code::InvalidArgument, &["nonsense", "strictParameters"]),
        (|r| parameter(r, "storageFormat", "qcow2"), Code::InvalidArgument, &["file storage"]),
        (|r| r.capacity_range = range(0, 0), Code::InvalidArgument, &["size 0"]),
        (|r| r.capacity_range = range(2 << 20, 1 << 20), Code::InvalidArgument, &["limit_bytes 1048576", "required_bytes 2097152"]),
        (|r| r.capacity_range = range(1 << 50, 0), Code::OutOfRange, &["beyond storage \"local-lvm\""]),
        (|r| r.capacity_range = range(5 << 20, 6 << 20), Code::OutOfRange, &["steps of 4194304"]),
        (|r| r.accessibility_requirements = topology(&["pve9"]), Code::ResourceExhausted, &["fsn1/pve1"]),
        (
            |r| {
                let segments = HashMap::from([(proto::TOPOLOGY_REGION.to_string(), "mars".to_string())]);
                let requisite = vec![csi::Topology { segments }];
                r.accessibility_requirements = Some(csi::TopologyRequirement { requisite, preferred: vec![] });
            },
            Code::InvalidArgument,
            &["mars", REGION],
        ),
        (|r| r.volume_content_source = Some(Default::default()), Code::InvalidArgument, &["volume_content_source"]),
    ];
    let bed = standard().await;
    for (change, code, words) in cases {
        let mut request = create_request("pvc-1", "local-lvm", 64 * MIB);
        change(&mut request);
        assert_refused(bed.create_as(request).await, *code, words);
    }
    assert!(bed.sim.volumes("pve1", "local-lvm").is_empty());
    assert!(!bed.sim.requests().iter().any(|request| request.starts_with("POST")), "{:?}", bed.sim.requests());
}

/// W39: what exists under the name and does not fit the request is said.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_size_under_the_same_name_is_a_conflict() {
    for storage in ["local", "local-lvm", "local-zfs", "thick-lvm"] {
        let bed = standard().await;
        let sized = |required: i64, limit: i64| csi::CreateVolumeRequest {
            capacity_range: Some(csi::CapacityRange { required_bytes: required, limit_bytes: limit }),
            ..create_request("pvc-1", storage, MIB)
        };
        // csi-sanity's pair: exactly this size, then exactly twice.
        let made = bed.create_as(sized(64 << 20, 64 << 20)).await.unwrap();
        assert_eq!(made.capacity_bytes, 64 << 20);
        assert_refused(bed.create_as(sized(128 << 20, 128 << 20)).await, Code::AlreadyExists, &["67108864", "134217728"]);
        assert_eq!(bed.create_as(sized(64 << 20, 64 << 20)).await.unwrap().volume_id, made.volume_id);
        assert_eq!(bed.sim.volumes("pve1", storage).len(), 1, "{storage}");
    }
}

/// Ten minutes later.
async fn an_age_passes() {
    tokio::time::pause();
    tokio::time::advance(std::time::Duration::from_secs(601)).await;
    tokio::time::resume();
}

/// The controller that made the volume is gone with the node that has it: the next one knows of no try, and makes no second volume,
/// as long as the first may be on its way. A claim that is younger than the controller was never tried before.
#[tokio::test]
async fn a_volume_that_a_controller_before_made_on_a_dead_host_is_not_made_twice() {
    let bed = two_hosts().await;
    let asked = |name: &str, zones: &[&str]| {
        let mut request = csi::CreateVolumeRequest { accessibility_requirements: topology(zones), ..create_request(name, "ds", 64 * MIB) };
        for (key, value) in [("pvc/name", name), ("pvc/namespace", "apps"), ("pv/name", name)] {
            request.parameters.insert(format!("csi.storage.k8s.io/{key}"), value.into());
        }
        request
    };
    bed.create_as(asked("pvc-1", &["pve2"])).await.unwrap();
    bed.sim.set_node_unreachable("pve2", Some("595 No route to host"));
    let kubernetes = Kubernetes::start().await.unwrap();
    for (claim, made_at) in [("pvc-1", "2020-01-01T00:00:00Z"), ("pvc-2", "2999-01-01T00:00:00Z")] {
        let metadata = json!({"name": claim, "namespace": "apps", "uid": claim, "creationTimestamp": made_at});
        kubernetes.put(&format!("/api/v1/namespaces/apps/persistentvolumeclaims/{claim}"), json!({"metadata": metadata}));
    }
    let by = crate::kube::controller_of(&kubernetes, &bed);
    let make = async |name: &str| by.create_volume(Request::new(asked(name, &["pve1", "pve2"]))).await.map(drop);
    assert_refused(make("pvc-1").await, Code::Unavailable, &["fsn1/pve2 cannot be looked at", "pvc-1", "600 s"]);
    assert!(bed.sim.volumes("pve1", "ds").is_empty());
    make("pvc-2").await.unwrap();
    // A host that is dead for days stops nobody.
    an_age_passes().await;
    make("pvc-1").await.unwrap();
    assert_eq!(bed.sim.volumes("pve1", "ds").len(), 2);
}

/// An answer was lost, and from then on its zone refuses: refusals do not prolong the wait for what was lost.
#[tokio::test]
async fn a_zone_that_goes_on_refusing_does_not_keep_a_name_for_ever() {
    let bed = two_hosts().await;
    let asked =
        |zone: &str| csi::CreateVolumeRequest { accessibility_requirements: topology(&[zone]), ..create_request("pvc-1", "ds", 64 * MIB) };
    bed.sim.inject(Fault::next("POST", "/nodes/pve1/storage/ds/content", Effect::Close).times(2));
    assert!(bed.create_as(asked("pve1")).await.is_err());
    tokio::time::pause();
    tokio::time::advance(std::time::Duration::from_secs(400)).await;
    tokio::time::resume();
    let broken = Effect::Answer { status: 500, reason: "lvcreate: something is broken".into() };
    bed.sim.inject(Fault::next("POST", "/nodes/pve1/storage/ds/content", broken).times(9));
    assert!(bed.create_as(asked("pve1")).await.is_err());
    assert_refused(bed.create_as(asked("pve2")).await, Code::Unavailable, &["an earlier try to create pvc-1", "fsn1/pve1"]);
    tokio::time::pause();
    tokio::time::advance(std::time::Duration::from_secs(300)).await;
    tokio::time::resume();
    assert!(bed.create_as(asked("pve1")).await.is_err());
    bed.create_as(asked("pve2")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sanitys_longest_name_is_a_volume_on_every_storage() {
    let name = format!("sanity-controller-create-maxlen-1F2E3D4C-5B6A7988{}", "a".repeat(79));
    for storage in ["local", "local-lvm", "local-zfs", "thick-lvm"] {
        let bed = standard().await;
        let first = bed.volume(&name, storage).await;
        assert_eq!(bed.volume(&name, storage).await, first);
        bed.publish(&first, "node-101").await.unwrap();
    }
}

/// W53: the zone with most room, not the first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_topology_the_zone_with_most_room_takes_it_and_a_repeat_finds_it() {
    let bed = two_hosts().await;
    let first = bed.volume("pvc-1", "ds").await;
    // Whatever the room says later: the repeat finds the first one in the other zone.
    let other = if first.zone == "pve1" { "pve2" } else { "pve1" };
    for zones in [&[other, first.zone.as_str()][..], &[first.zone.as_str(), other]] {
        let request = csi::CreateVolumeRequest { accessibility_requirements: topology(zones), ..create_request("pvc-1", "ds", 64 * MIB) };
        assert_eq!(bed.create_as(request).await.unwrap().volume_id, first.to_string());
    }
    assert_eq!(bed.sim.volumes("pve1", "ds").len() + bed.sim.volumes("pve2", "ds").len(), 1);
}

/// W53: only zones that are online and have the storage.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zones_where_the_storage_is_not_active_are_left_out() {
    let bed = start(Simulator::builder(crate::bed::two_hosts_description())).await;
    bed.sim.set_node_unreachable("pve2", Some("595 No route to host"));
    assert_eq!(bed.volume("pvc-1", "ds").await.zone, "pve1");
    let request = csi::CreateVolumeRequest { accessibility_requirements: topology(&["pve2"]), ..create_request("pvc-2", "ds", MIB) };
    assert_refused(bed.create_as(request).await, Code::ResourceExhausted, &["not active on fsn1/pve2"]);
    // Repaired: seen at once, not after a minute.
    bed.sim.set_node_unreachable("pve2", None);
    assert_eq!(bed.volume_on("pvc-2", "ds", "pve2").await.zone, "pve2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disabled_or_full_storage_is_said() {
    let bed = standard().await;
    bed.sim.change_storage("local-lvm", |storage| storage.used_bytes = storage.total_bytes - (1 << 20));
    assert_refused(
        bed.create_as(create_request("pvc-1", "local-lvm", 64 * MIB)).await,
        Code::ResourceExhausted,
        &["no room for 67108864 bytes", "fsn1/pve1: 1048576 bytes"],
    );
    let bed = standard().await;
    bed.sim.change_storage("local-zfs", |storage| storage.disabled = true);
    bed.sim.change_storage("local", |storage| storage.content = vec!["iso".into()]);
    assert!(bed.create_as(create_request("pvc-1", "local-zfs", MIB)).await.is_err());
    assert_refused(bed.create_as(create_request("pvc-1", "local", MIB)).await, Code::InvalidArgument, &["Disk image"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_answer_makes_no_second_volume() {
    for effect in [Effect::CloseAfterwards, Effect::TimeOutButComplete, Effect::Close] {
        let bed = standard().await;
        bed.sim.inject(Fault::next("POST", CONTENT, effect.clone()));
        let mut answer = bed.create_as(create_request("pvc-1", "local", 64 * MIB)).await;
        for _ in 0..100 {
            if answer.is_ok() {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            answer = bed.create_as(create_request("pvc-1", "local", 64 * MIB)).await;
        }
        assert_eq!(answer.unwrap().capacity_bytes, 64 << 20, "{effect:?}");
        assert_eq!(bed.sim.volumes("pve1", "local").len(), 1, "{effect:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_creation_without_answer_binds_the_volume_to_its_zone() {
    let bed = two_hosts().await;
    let request =
        || csi::CreateVolumeRequest { accessibility_requirements: topology(&["pve2", "pve1"]), ..create_request("pvc-1", "ds", 64 * MIB) };
    bed.sim.inject(Fault::next("POST", CONTENT, Effect::CloseAfterwards).times(2));
    assert_refused(bed.create_as(request()).await, Code::Unavailable, &["outcome unknown"]);
    // Now that host is gone. The other zone would take a second volume of this name.
    bed.sim.set_node_unreachable("pve2", Some("595 No route to host"));
    let again = bed.create_as(request()).await;
    assert!(again.is_err(), "{again:?}");
    assert!(bed.sim.volumes("pve1", "ds").is_empty());
    bed.sim.set_node_unreachable("pve2", None);
    assert!(bed.create_as(request()).await.unwrap().volume_id.contains("/pve2/"));
}

/// W54: each option is written once, under the name that Proxmox has for it now.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parameters_reach_the_drive_and_unknown_ones_may_be_warnings() {
    let bed = standard().await;
    let mut request = create_request("pvc-1", "local", MIB);
    let parameters = [
        ("storageFormat", "qcow2"),
        ("cache", "none"),
        ("aio", "io_uring"),
        ("ssd", "true"),
        ("iothread", "true"),
        ("backup", "true"),
        ("diskIOPS", "300"),
        ("diskMBps", "20"),
        ("blockSize", "4096"),
        ("inodeSize", "512"),
        ("strictParameters", "false"),
        ("somethingElse", "x"),
        ("csi.storage.k8s.io/pvc/name", "data"),
    ];
    request.parameters.extend(parameters.map(|(key, value)| (key.to_string(), value.to_string())));
    let made = bed.create_as(request).await.unwrap();
    assert!(made.volume_id.ends_with("9999/vm-9999-pvc-1.qcow2"));
    let volume: proto::VolumeHandle = made.volume_id.parse().unwrap();
    let publish =
        csi::ControllerPublishVolumeRequest { volume_context: made.volume_context, ..crate::bed::publish_request(&volume, "node-101/101") };
    let context = bed.publish_as(publish).await.unwrap();
    assert_eq!(context["zeroed"], "1");
    let serial = volume.serial();
    assert_eq!(
        bed.sim.vm(101).unwrap().config["scsi1"],
        format!(
            "local:9999/vm-9999-pvc-1.qcow2,aio=io_uring,backup=1,cache=none,discard=on,iops_rd=300,iops_wr=300,iothread=1,mbps_rd=20,\
             mbps_wr=20,replicate=0,serial={serial},size=1M,ssd=1,wwn=0x5056432d49443031"
        )
    );
}
