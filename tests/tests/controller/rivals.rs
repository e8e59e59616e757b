//! Another workload that serves this driver's name: the controller does not start beside it, and says which two there are.

use std::sync::Arc;
use std::time::Duration;

use controller::kube::Kube;
use serde_json::{Value, json};
use testbed::kube::{Kubernetes, NAMESPACE};

const NAME: &str = "external-attacher-leader-csi-proxmox-sinextra-dev";

/// As external-attacher writes it; `renewed`: by its own clock.
fn hold(kubernetes: &Kubernetes, namespace: &str, holder: &str, renewed: &str) {
    let spec = json!({"holderIdentity": holder, "leaseDurationSeconds": 15, "renewTime": renewed});
    let object = json!({"metadata": {"name": NAME, "namespace": namespace}, "spec": spec});
    kubernetes.put(&format!("/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/{NAME}"), object);
}

const NOW: &str = "2999-01-01T00:00:00.000000Z";
const LONG_AGO: &str = "2020-01-01T00:00:00.000000Z";

async fn bed() -> (Arc<Kubernetes>, Arc<Kube>, std::path::PathBuf) {
    let folder = std::env::temp_dir().join(format!("pve-csi-rivals-{}-{:?}", std::process::id(), std::thread::current().id()));
    std::fs::create_dir_all(&folder).unwrap();
    let kubernetes = Arc::new(Kubernetes::start().await.unwrap());
    let kube = Arc::new(Kube::new(kubernetes.access(&folder).unwrap()).unwrap().with_lease("ours-7f9_0011223344556677"));
    (kubernetes, kube, folder)
}

/// Renews it every 5 s, as client-go does.
fn renews(kubernetes: &Arc<Kubernetes>, namespace: &'static str, holder: &'static str) -> tokio::task::JoinHandle<()> {
    renews_as_of(kubernetes, namespace, holder, NOW)
}

fn renews_as_of(
    kubernetes: &Arc<Kubernetes>,
    namespace: &'static str,
    holder: &'static str,
    clock: &'static str,
) -> tokio::task::JoinHandle<()> {
    let kubernetes = Arc::clone(kubernetes);
    tokio::spawn(async move {
        loop {
            hold(&kubernetes, namespace, holder, clock);
            tokio::time::sleep(Duration::from_secs(5)).await;
        }
    })
}

#[tokio::test(start_paused = true)]
async fn who_renews_an_attachers_lease_elsewhere_is_named_with_us() {
    let (kubernetes, kube, folder) = bed().await;
    let renewing = renews(&kubernetes, "kube-system", "proxmox-csi-plugin-controller-6d5-abcde");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let why = kube.check_alone().await.unwrap_err();
    for word in ["proxmox-csi-plugin-controller-6d5-abcde", "kube-system", "ours-7f9", NAMESPACE, "scale the other's controller to 0"] {
        assert!(why.contains(word), "{why} lacks {word}");
    }
    renewing.abort();
    let _ = renewing.await;
    // The same in our own namespace, whose Lease all replicas of ours respect.
    kubernetes.remove(&format!("/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/{NAME}"));
    kubernetes.put(
        &format!("/api/v1/namespaces/{NAMESPACE}/pods/other-1"),
        json!({"metadata": {"name": "other-1"}, "status": {"phase": "Running"}}),
    );
    let renewing = renews(&kubernetes, NAMESPACE, "other-1");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(kube.check_alone().await.unwrap_err().contains("pod other-1"));
    renewing.abort();
    let _ = std::fs::remove_dir_all(folder);
}

/// Its clock, or ours, is wrong by years: that it renews is what counts.
#[tokio::test(start_paused = true)]
async fn a_rival_whose_clock_is_far_behind_is_seen_by_its_renewals() {
    let (kubernetes, kube, folder) = bed().await;
    let renewing = renews_as_of(&kubernetes, "kube-system", "behind-1", LONG_AGO);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(kube.check_alone().await.unwrap_err().contains("pod behind-1"));
    renewing.abort();
    let _ = std::fs::remove_dir_all(folder);
}

#[tokio::test(start_paused = true)]
async fn what_nobody_renews_and_our_own_keep_nobody_from_starting() {
    let (kubernetes, kube, folder) = bed().await;
    kube.check_alone().await.unwrap();
    // Left by a driver that was removed; not so old, and nobody renews it; given back; beside us; of a pod of ours that goes, or has gone.
    let terminating = json!({"metadata": {"name": "goes", "deletionTimestamp": NOW}});
    kubernetes.put(&format!("/api/v1/namespaces/{NAMESPACE}/pods/goes"), terminating);
    for (namespace, holder, renewed, waits) in [
        ("kube-system", "gone", LONG_AGO, true),
        ("kube-system", "gone", NOW, true),
        ("kube-system", "", NOW, false),
        (NAMESPACE, "ours-7f9", NOW, false),
        (NAMESPACE, "goes", NOW, false),
        (NAMESPACE, "has-gone", NOW, false),
    ] {
        hold(&kubernetes, namespace, holder, renewed);
        let begun = tokio::time::Instant::now();
        kube.check_alone().await.unwrap();
        assert_eq!(begun.elapsed() >= Duration::from_secs(15), waits, "{namespace} {holder} {renewed}");
        kubernetes.remove(&format!("/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/{NAME}"));
    }
    // Without the right to look it is said, and no more.
    kubernetes.breaks("GET /apis/coordination.k8s.io/v1/leases", Some(403));
    hold(&kubernetes, "kube-system", "other", NOW);
    kube.check_alone().await.unwrap();
    let _ = std::fs::remove_dir_all(folder);
}

/// What the chart allows is what is asked for.
#[test]
fn the_chart_allows_this_one_lease() {
    let rules = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/base/rbac.yaml")).unwrap();
    assert!(rules.contains(NAME), "{}", Value::from(rules));
}
