//! Twenty claims at one moment, as Velero restores them: where their volumes go, in both binding modes.
//!
//! The requests are external-provisioner's: with a selected node its zone comes first (or, with --strict-topology, alone), without
//! one the zones are rotated by a hash of the claim's name.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use controller::kube::Kube;
use controller::run::Controller;
use controller::service::ControllerService;
use proto::csi::{self, controller_server::Controller as _};
use serde_json::json;
use testbed::kube::Kubernetes;
use testbed::sim::{Simulator, Storage};
use tokio::task::JoinSet;
use tonic::{Code, Request};

use crate::bed::{Bed, MIB, assert_refused, create_request, start, topology};
use crate::storages::three_hosts;

const CLAIMS: usize = 20;
/// 40 % of them.
const MOST: usize = 8;
const ZONES: [&str; 3] = ["pve1", "pve2", "pve3"];

/// `ds` local to each of three hosts.
async fn bed() -> Bed {
    start(Simulator::builder(three_hosts().storage(Storage::new("ds", "lvmthin", &[("vgname", "vg"), ("thinpool", "data")])))).await
}

/// How the provisioner came to its order.
#[derive(Debug, Clone, Copy)]
enum Binding {
    /// No node is selected.
    Immediate,
    /// The pod's node is, by its zone.
    Selected(&'static str),
    /// The same with --strict-topology.
    Strict(&'static str),
}

/// `getPVCNameHashAndIndexOffset`, for names that end in no number.
fn fnv1(name: &str) -> u32 {
    name.bytes().fold(2_166_136_261, |hash: u32, byte| hash.wrapping_mul(16_777_619) ^ u32::from(byte))
}

fn request(claim: &str, binding: Binding) -> csi::CreateVolumeRequest {
    let rotated = |by: usize| {
        let mut zones = ZONES;
        zones.rotate_left(by);
        zones
    };
    let at = |zone: &str| ZONES.iter().position(|one| *one == zone).unwrap();
    let (requisite, preferred): (Vec<&str>, Vec<&str>) = match binding {
        Binding::Immediate => (ZONES.into(), rotated(usize::try_from(fnv1(claim) % 3).unwrap()).into()),
        Binding::Selected(zone) => (ZONES.into(), rotated(at(zone)).into()),
        Binding::Strict(zone) => (vec![zone], vec![zone]),
    };
    let mut request = create_request(&format!("pvc-{claim}"), "ds", 64 * MIB);
    request.accessibility_requirements = topology(&requisite)
        .zip(topology(&preferred))
        .map(|(requisite, preferred)| csi::TopologyRequirement { requisite: requisite.requisite, preferred: preferred.requisite });
    let metadata = [("pvc/name", claim), ("pvc/namespace", "apps"), ("pv/name", claim)];
    request.parameters.extend(metadata.map(|(key, value)| (format!("csi.storage.k8s.io/{key}"), value.to_string())));
    request
}

/// Asks for all of them at one moment; claim → zone.
async fn restored(csi: &ControllerService, claims: &[(String, Binding)]) -> BTreeMap<String, String> {
    let mut calls = JoinSet::new();
    for (claim, binding) in claims.iter().cloned() {
        let csi = csi.clone();
        calls.spawn(async move {
            let volume = csi.create_volume(Request::new(request(&claim, binding))).await.unwrap().into_inner().volume.unwrap();
            let zone = volume.volume_id.split('/').nth(1).unwrap().to_string();
            assert_eq!(volume.accessible_topology[0].segments[proto::TOPOLOGY_ZONE], zone);
            (claim, zone)
        });
    }
    calls.join_all().await.into_iter().collect()
}

fn of_each_zone(placed: &BTreeMap<String, String>) -> BTreeMap<&str, usize> {
    placed.values().fold(BTreeMap::new(), |mut counts, zone| {
        *counts.entry(zone.as_str()).or_default() += 1;
        counts
    })
}

#[track_caller]
fn assert_spread(placed: &BTreeMap<String, String>) {
    let counts = of_each_zone(placed);
    assert_eq!(counts.values().sum::<usize>(), CLAIMS);
    assert!(counts.values().all(|volumes| *volumes <= MOST), "{counts:?}");
}

/// Names whose hashes all say the same zone: the worst that chance can bring.
fn one_sided() -> Vec<String> {
    (0..1000).map(|n| format!("app{n}x")).filter(|claim| fnv1(claim) % 3 == 1).take(CLAIMS).collect()
}

/// W53: restored all at once, no host gets them all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w53_twenty_claims_that_bind_at_once_are_spread() {
    for claims in [one_sided(), (0..CLAIMS).map(|n| format!("app{n}x")).collect()] {
        let bed = bed().await;
        let claims: Vec<_> = claims.into_iter().map(|claim| (claim, Binding::Immediate)).collect();
        let placed = restored(&bed.csi, &claims).await;
        assert_spread(&placed);
        let there: usize = ZONES.iter().map(|zone| bed.sim.volumes(zone, "ds").len()).sum();
        assert_eq!(there, CLAIMS);
        assert_eq!(restored(&bed.csi, &claims).await, placed, "a repeat finds what there is");
    }
}

/// The scheduler has spread the pods; each volume is made where its pod is. A third of the selections could be rotations as well: the others
/// say which.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_claims_follow_their_pods() {
    for strict in [false, true] {
        let bed = bed().await;
        let binding = |n: usize| if strict { Binding::Strict(ZONES[n % 3]) } else { Binding::Selected(ZONES[n % 3]) };
        let claims: Vec<_> = (0..CLAIMS).map(|n| (format!("app{n}x"), binding(n))).collect();
        let placed = restored(&bed.csi, &claims).await;
        assert_spread(&placed);
        let strays = claims.iter().filter(|(claim, binding)| match binding {
            Binding::Selected(zone) | Binding::Strict(zone) => placed[claim] != *zone,
            Binding::Immediate => false,
        });
        assert_eq!(strays.count(), 0, "strict {strict}: {placed:?}");
    }
}

/// All pods want one host: by a node selector, say. Nobody's spread counts against that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_that_want_one_host_have_their_volumes_there() {
    let (bed, kubernetes, csi) = with_kubernetes().await;
    // The hash of each could have said so, too: only Kubernetes knows better.
    let claims: Vec<_> = one_sided().into_iter().map(|claim| (claim, Binding::Selected("pve2"))).collect();
    for (claim, _) in &claims {
        put_claim(&kubernetes, claim, Some("node-201"));
    }
    assert_eq!(of_each_zone(&restored(&csi, &claims).await), BTreeMap::from([("pve2", CLAIMS)]));
    assert_eq!(bed.sim.volumes("pve2", "ds").len(), CLAIMS);
    assert!(kubernetes.events().is_empty());
}

async fn with_kubernetes() -> (Bed, Kubernetes, ControllerService) {
    let bed = bed().await;
    let kubernetes = Kubernetes::start().await.unwrap();
    let kube = Kube::new(kubernetes.access(bed.config.parent().unwrap()).unwrap()).unwrap();
    let csi = ControllerService::new(Arc::new(Controller::with_kube(bed.config.clone(), None, Some(Arc::new(kube)))));
    (bed, kubernetes, csi)
}

fn put_claim(kubernetes: &Kubernetes, claim: &str, node: Option<&str>) {
    let annotations = node.map_or_else(|| json!({}), |node| json!({"volume.kubernetes.io/selected-node": node}));
    let metadata = json!({"name": claim, "namespace": "apps", "uid": format!("uid-of-{claim}"), "annotations": annotations});
    kubernetes.put(&format!("/api/v1/namespaces/apps/persistentvolumeclaims/{claim}"), json!({"metadata": metadata}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn binding_at_once_on_local_storage_is_told_once() {
    let (bed, kubernetes, csi) = with_kubernetes().await;
    let claims: Vec<_> = one_sided().into_iter().map(|claim| (claim, Binding::Immediate)).collect();
    for (claim, _) in &claims {
        put_claim(&kubernetes, claim, None);
    }
    assert_spread(&restored(&csi, &claims).await);
    let mut events = kubernetes.events();
    for _ in 0..100 {
        if !events.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        events = kubernetes.events();
    }
    assert_eq!(events.len(), 1, "{events:#?}");
    let (event, object) = (&events[0], &events[0]["involvedObject"]);
    assert_eq!((&event["reason"], &event["type"], &event["count"]), (&"ImmediateOnLocalStorage".into(), &"Warning".into(), &1.into()));
    assert_eq!((&object["kind"], &object["namespace"]), (&"PersistentVolumeClaim".into(), &"apps".into()));
    assert_eq!(object["uid"], format!("uid-of-{}", object["name"].as_str().unwrap()));
    let message = event["message"].as_str().unwrap();
    for words in ["WaitForFirstConsumer", "\"ds\"", "pve1, pve2, pve3"] {
        assert!(message.contains(words), "{message}");
    }
    drop(bed);
}

/// A Kubernetes that does not answer hinders nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_an_answer_of_kubernetes_they_are_spread_all_the_same() {
    let (bed, kubernetes, csi) = with_kubernetes().await;
    kubernetes.breaks("GET /api/v1/namespaces/apps/persistentvolumeclaims", Some(403));
    let claims: Vec<_> = one_sided().into_iter().map(|claim| (claim, Binding::Immediate)).collect();
    assert_spread(&restored(&csi, &claims).await);
    drop(bed);
}

/// A host that fills up is left out; one that is named alone and full is refused, for the scheduler to look elsewhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_host_is_left_out_and_said_when_it_is_the_only_one() {
    let thick = Storage::new("ds", "lvm", &[("vgname", "vg")]);
    let bed = start(Simulator::builder(three_hosts().storage(Storage { total_bytes: 400 * MIB, ..thick }))).await;
    // Six at 64 MiB fill 384 of a host's 400: three hosts take 18.
    let claims: Vec<_> = one_sided().into_iter().take(18).map(|claim| (claim, Binding::Immediate)).collect();
    let placed = restored(&bed.csi, &claims).await;
    assert_eq!(of_each_zone(&placed), ZONES.map(|zone| (zone, 6)).into());
    let refused = bed.csi.create_volume(Request::new(request("last", Binding::Strict("pve2")))).await;
    assert_refused(refused, Code::ResourceExhausted, &["fsn1/pve2"]);
}
