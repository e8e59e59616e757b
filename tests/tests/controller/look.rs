//! To look inside: numbers, probes, and that looking asks nothing of Proxmox.

use std::collections::BTreeSet;
use std::sync::Arc;

use controller::kube::Kube;
use controller::look::health::Standing;
use controller::look::{labels, metrics};
use proto::health::Pages;
use proto::serve::Socket;
use serde_json::json;
use testbed::kube::Kubernetes;
use testbed::sim::Simulator;

use crate::bed::{Bed, clusters, standard, with_config};

/// Names of metrics that the page has, without a histogram's parts.
fn names(page: &str) -> BTreeSet<String> {
    page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next().map(String::from)).collect()
}

/// The sample whose name and labels are these.
#[track_caller]
fn sample(page: &str, name: &str) -> f64 {
    let found = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    found.unwrap_or_else(|| panic!("no {name} in {page}")).parse().unwrap()
}

fn acting(bed: &Bed) -> (Pages, Socket) {
    let standing = Standing::new(bed.config.clone());
    let socket = Socket::open(&bed.config.with_file_name("csi.sock")).unwrap();
    standing.act(bed.csi.controller(), socket.place());
    (standing.pages("/metrics"), socket)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_numbers_say_what_was_done_and_ask_nothing() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local-lvm").await;
    bed.publish(&volume, "node-101/101").await.unwrap();
    bed.sim.reset_counters();
    let (pages, _socket) = acting(&bed);
    let page = (pages.metrics)();
    assert!(bed.sim.requests().is_empty(), "{:?}", bed.sim.requests());
    for (name, at_least) in [
        ("proxmox_csi_controller_acts", 1.0),
        ("proxmox_csi_controller_region_answered{region=\"fsn1\"}", 1.0),
        ("proxmox_csi_controller_index_vms{region=\"fsn1\"}", 2.0),
        ("proxmox_csi_controller_index_drives{region=\"fsn1\"}", 1.0),
        ("proxmox_csi_controller_index_age_seconds{region=\"fsn1\"}", 0.0),
        ("proxmox_csi_controller_cluster_age_seconds{region=\"fsn1\"}", 0.0),
        ("proxmox_csi_controller_storage_total_bytes{region=\"fsn1\",host=\"pve1\",storage=\"local-lvm\"}", 100.0 * f64::from(1 << 30)),
        ("proxmox_csi_controller_storage_active{region=\"fsn1\",host=\"pve1\",storage=\"local-lvm\"}", 1.0),
        ("proxmox_csi_controller_changes_waiting{region=\"fsn1\",kind=\"attach\"}", 0.0),
        ("proxmox_csi_controller_lock_waiting{lock=\"vm\"}", 0.0),
        ("proxmox_csi_controller_lock_wait_seconds_count{lock=\"vm\"}", 1.0),
        (
            "proxmox_csi_controller_proxmox_request_duration_seconds_count{endpoint=\"POST /nodes/{node}/qemu/{vmid}/config\",\
             region=\"fsn1\",outcome=\"OK\"}",
            1.0,
        ),
    ] {
        assert!(sample(&page, name) >= at_least, "{name}: {}", sample(&page, name));
    }
    let free = "proxmox_csi_controller_vm_slots_free{region=\"fsn1\",host=\"pve1\",vmid=\"101\"}";
    assert!((sample(&page, free) - 28.0).abs() < f64::EPSILON, "{page}");
    assert!(!page.contains("vmid=\"102\""), "no node of Kubernetes': {page}");
    // A VM that was destroyed has no numbers.
    let fresh = crate::bed::standard().await;
    let volume_of_fresh = fresh.volume("pvc-1", "local-lvm").await;
    fresh.publish(&volume_of_fresh, "node-102/102").await.unwrap();
    let (its_pages, _its_socket) = acting(&fresh);
    assert!((its_pages.metrics)().contains("vmid=\"102\""));
    fresh.sim.remove_vm(102);
    assert!(fresh.publish(&volume_of_fresh, "node-102/102").await.is_err());
    let gone = (its_pages.metrics)();
    assert!(!gone.contains("vmid=\"102\""), "{gone}");
    // A failure has its class.
    bed.sim.set_role("CSI", &["VM.Audit", "Datastore.Audit", "Sys.Audit"]);
    bed.unpublish(&volume, "node-101/101").await.unwrap_err();
    assert!((pages.metrics)().contains("outcome=\"Forbidden\""));
    assert_eq!(names(&page), names(&metrics::page(None)), "the same names without a Lease");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ready_is_who_has_a_config_and_an_answer() {
    let sim = Arc::new(Simulator::standard().start().await.unwrap());
    let good = clusters(sim.url());
    let dead = clusters("http://127.0.0.1:1").replace("fsn1", "nbg1").replace("clusters:\n", "");
    let bed = with_config(Arc::clone(&sim), "nonsense: 1");
    let (pages, socket) = acting(&bed);
    assert!((pages.ready)().unwrap_err().contains("unknown key \"nonsense\""));
    assert_eq!((pages.alive)(), Ok(String::new()), "a new start would not help");
    std::fs::remove_file(socket.place().path()).unwrap();
    assert!((pages.alive)().unwrap_err().contains("not ours"));

    // Nobody answers: the first probe asks, and says so later.
    let bed = with_config(Arc::clone(&sim), &format!("clusters:\n{dead}"));
    let (pages, _socket) = acting(&bed);
    assert_eq!((pages.ready)().unwrap_err(), "region nbg1 was not asked yet");
    while (pages.ready)().unwrap_err().contains("not asked") {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert!((pages.ready)().unwrap_err().contains("region nbg1 does not answer: GET /version: http://127.0.0.1:1"));

    // One of two: ready, and the other named.
    let bed = with_config(Arc::clone(&sim), &format!("{good}{dead}"));
    let (pages, _socket) = acting(&bed);
    bed.csi.controller().greet().await;
    let said = (pages.ready)().unwrap();
    assert!(said.contains("region fsn1 answers\n") && said.contains("region nbg1 does not answer: "), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_is_alive_and_ready_unless_its_config_is_bad() {
    let bed = standard().await;
    let standing = Standing::new(bed.config.clone());
    let pages = standing.pages("/metrics");
    assert!((pages.alive)().is_ok());
    assert!((pages.ready)().unwrap().contains("standby"));
    assert!((pages.metrics)().contains("proxmox_csi_controller_acts 0\n"));
    std::fs::write(&bed.config, "").unwrap();
    assert!((pages.ready)().unwrap_err().contains("is empty"));
    assert!(bed.sim.requests().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_s_labels_are_written_for_its_agent_once_they_are_there() {
    let (bed, kubernetes) = (standard().await, Kubernetes::start().await.unwrap());
    let folder = bed.config.parent().unwrap();
    let kube = Arc::new(Kube::new(kubernetes.access(folder).unwrap()).unwrap());
    assert!(labels::read(&kube, "w1").await.unwrap_err().contains("there is no Node w1"));
    assert!(labels::read(&kube, "w1/status").await.unwrap_err().contains("no name of a Node"));
    let path = "/api/v1/nodes/w1";
    kubernetes.put(path, json!({"metadata": {"name": "w1", "labels": {"topology.kubernetes.io/region": "fsn1"}}}));
    assert!(labels::read(&kube, "w1").await.unwrap_err().contains("topology.kubernetes.io/zone"));
    let both = json!({"topology.kubernetes.io/region": "fsn1", "topology.kubernetes.io/zone": "pve1"});
    kubernetes.put(path, json!({"metadata": {"name": "w1", "labels": both}}));
    let to = folder.join("labels");
    labels::write(&to, &labels::read(&kube, "w1").await.unwrap()).unwrap();
    assert_eq!(std::fs::read_to_string(&to).unwrap(), "topology.kubernetes.io/region=\"fsn1\"\ntopology.kubernetes.io/zone=\"pve1\"\n");
    kubernetes.breaks("GET /api/v1/nodes", Some(403));
    assert!(labels::read(&kube, "w1").await.unwrap_err().contains("403"));
}

/// Names of ours in a text, without a histogram's parts.
fn named(text: &str) -> BTreeSet<String> {
    let words = text.split(|character: char| !character.is_ascii_alphanumeric() && character != '_');
    let ours = words.filter(|word| word.starts_with("proxmox_csi_"));
    ours.map(|word| ["_bucket", "_sum", "_count"].iter().find_map(|part| word.strip_suffix(part)).unwrap_or(word).to_owned()).collect()
}

#[test]
fn dashboard_and_alerts_name_what_is_exported_and_all_of_it_is_shown() {
    let mut exported = names(&metrics::page(None));
    let of_node = named(include_str!("../../../node/src/metrics.rs"));
    let shown = named(include_str!("../../../deploy/monitoring/dashboard.json"));
    let alerts = named(include_str!("../../../deploy/monitoring/alerts.yaml"));
    exported.retain(|name| name.starts_with("proxmox_csi_"));
    let all: BTreeSet<String> = exported.union(&of_node).cloned().collect();
    for (what, names) in [("dashboard.json", &shown), ("alerts.yaml", &alerts)] {
        let unknown: Vec<_> = names.difference(&all).collect();
        assert!(names.len() > 5 && unknown.is_empty(), "{what} has {unknown:?}, which nothing exports");
    }
    let everywhere: BTreeSet<String> = shown.union(&alerts).cloned().collect();
    let hidden: Vec<_> = exported.difference(&everywhere).filter(|name| !name.ends_with("_build_info")).collect();
    assert!(hidden.is_empty(), "{hidden:?} is in neither");
}
