//! Controller, simulator and guests together: a simulated attach is a real hot-plug. csi-sanity, and flows of our own.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use proto::csi;
use serde_json::Value;
use testbed::cluster::{Cluster, ClusterNode, ClusterOptions};
use testbed::guest::{self, Bridge, HOST_ADDRESS, Program};
use testbed::tools;
use tonic::Code;

use crate::harness::{MIB, assert_clean_file};

/// 52 specs took 8 s with a stub on TCG; a real node formats and mounts.
const SANITY_LIMIT: Duration = Duration::from_secs(240);
const SIZE: i64 = 64 << 20;
const GROWN: i64 = 128 << 20;
/// Expanding a volume that no VM holds is refused on purpose (Proxmox grows attached disks only). The same flows, with
/// the publish first, are [`guest_expand_after_publish`].
const SKIPPED_SPECS: [&str; 2] = [
    "ExpandVolume [Controller Server] should work",
    "Node Service NodeExpandVolume should work if node-expand is called after node-publish",
];

fn start(options: &ClusterOptions) -> Option<Cluster> {
    match guest::unavailable() {
        Some(why) => {
            tools::skipped(&why);
            None
        }
        None => Some(Cluster::start(options).unwrap()),
    }
}

/// A clean failure names both logs.
fn quote(cluster: &Cluster) -> String {
    let guests: Vec<String> = cluster.nodes.iter().map(|node| format!("{}: {}", node.node_id, node.guest.quote())).collect();
    format!("controller: {}\n{}", cluster.controller.quote(), guests.join("\n"))
}

#[test]
fn guest_csi_sanity() {
    let program = tools::cache().join("go/csi-sanity-v5.4.0/csi-sanity");
    if !program.exists() {
        return tools::skipped(&format!("{} is missing: run scripts/tools test", program.display()));
    }
    let sanity = ("/csi-sanity".to_owned(), program);
    // With Kubernetes: without it, less is advertised.
    let options = ClusterOptions { guests: vec![101], memory_mib: 512, files: vec![sanity], kubernetes: true, ..ClusterOptions::default() };
    let Some(cluster) = start(&options) else { return };
    let node = &cluster.nodes[0];
    let controller = Bridge::from_port(cluster.controller.socket()).unwrap();
    node.guest.write("/tmp/class.yaml", b"storage: local-lvm\n").unwrap();
    node.guest.write("/tmp/attributes.yaml", b"diskIOPS: \"500\"\nbackup: \"true\"\n").unwrap();
    // Ginkgo puts the suite's name before the spec's.
    let skip = SKIPPED_SPECS.map(|spec| format!(" {}$", spec.replace('[', "\\[").replace(']', "\\]"))).join("|");
    let args = [
        "-csi.endpoint=unix:///node/csi/csi.sock",
        &format!("-csi.controllerendpoint=dns:///{HOST_ADDRESS}:{}", controller.port().unwrap()),
        "-csi.mountdir=/var/lib/kubelet/sanity-mount",
        "-csi.stagingdir=/var/lib/kubelet/sanity-staging",
        &format!("-csi.testvolumesize={SIZE}"),
        &format!("-csi.testvolumeexpandsize={GROWN}"),
        "-csi.testvolumeparameters=/tmp/class.yaml",
        "-csi.testvolumemutableparameters=/tmp/attributes.yaml",
        &format!("-ginkgo.skip={skip}"),
        "-ginkgo.no-color",
        &format!("-ginkgo.timeout={}s", SANITY_LIMIT.as_secs()),
        "-ginkgo.json-report=/tmp/report.json",
    ];
    let program = Program {
        label: "sanity",
        program: "/csi-sanity",
        args: &args,
        env: &[("TMPDIR", "/tmp"), ("HOME", "/tmp")],
        ..Program::default()
    };
    let ended = node.guest.run(&program, SANITY_LIMIT).unwrap();
    let specs = specs(&node.guest.read("/tmp/report.json").unwrap_or_else(|error| panic!("{error:#}; {}", ended.output)));
    let of = |state: Outcome| specs.iter().filter(|(_, outcome)| **outcome == state).map(|(name, _)| name.as_str()).collect::<Vec<_>>();
    println!(
        "csi-sanity: {} passed, {} failed, {} without their capability",
        of(Outcome::Passed).len(),
        of(Outcome::Failed).len(),
        of(Outcome::NotAdvertised).len()
    );
    assert_eq!(of(Outcome::Failed), Vec::<&str>::new(), "{}\n{}", ended.output, quote(&cluster));
    assert_eq!(ended.exit.code, Some(0), "{:?}: {}", ended.exit, ended.output);
    // Sorted by name, like the report.
    assert_eq!(of(Outcome::ByName), SKIPPED_SPECS);
    assert!(
        of(Outcome::Passed).len() >= 60,
        "only {:?} ran; without their capability: {:?}",
        of(Outcome::Passed),
        of(Outcome::NotAdvertised)
    );

    // Nothing is left behind, neither here nor there.
    assert_eq!(cluster.sim.volumes("pve1", "local-lvm"), Vec::<String>::new());
    assert!(cluster.sim.vm(101).unwrap().plugged.is_empty());
    let mounts = node.guest.mounts_below("/node/var/lib/kubelet").unwrap();
    assert_eq!(mounts.len(), 1, "{mounts:?}");
    node.guest.power_off().unwrap();
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Passed,
    Failed,
    /// Skipped by itself, with a reason.
    NotAdvertised,
    /// Skipped by our `-ginkgo.skip`: no reason is given.
    ByName,
}

/// Ginkgo's report: `[{SpecReports: [{ContainerHierarchyTexts, LeafNodeText, LeafNodeType, State, Failure: {Message}}]}]`.
fn specs(report: &str) -> BTreeMap<String, Outcome> {
    let report: Value = serde_json::from_str(report).unwrap();
    let specs = report[0]["SpecReports"].as_array().unwrap().iter().filter(|spec| spec["LeafNodeType"] == "It");
    let named = specs.map(|spec| {
        let containers = spec["ContainerHierarchyTexts"].as_array().into_iter().flatten();
        let words: Vec<&str> = containers.chain([&spec["LeafNodeText"]]).filter_map(Value::as_str).collect();
        let outcome = match spec["State"].as_str().unwrap() {
            "passed" => Outcome::Passed,
            "skipped" if spec["Failure"]["Message"].as_str().unwrap_or_default().is_empty() => Outcome::ByName,
            // The one that csi-test itself leaves out.
            "skipped" | "pending" => Outcome::NotAdvertised,
            _ => Outcome::Failed,
        };
        (words.join(" "), outcome)
    });
    named.collect()
}

/// What csi-sanity's two skipped specs do, with the publish first.
#[test]
fn guest_expand_after_publish() {
    let Some(cluster) = start(&ClusterOptions { guests: vec![101], ..ClusterOptions::default() }) else { return };
    let node = &cluster.nodes[0];
    let volume = cluster.create("sanity-expand", SIZE, &[("storage", "local-lvm")], node).unwrap();
    // Before any VM holds it: refused, with the sentence.
    let refused = cluster.expand(&volume, GROWN).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    assert!(refused.message().contains("Proxmox grows attached disks only"), "{refused:?}");

    let attached = cluster.attach(&volume, "sanity-expand", node).unwrap();
    node.prepare(&attached).unwrap();
    node.calls.node_stage_volume(attached.stage()).unwrap_or_else(|status| panic!("{status:?}; {}", quote(&cluster)));
    node.calls.node_publish_volume(attached.publish()).unwrap();
    for _ in 0..2 {
        let answer = cluster.expand(&volume, GROWN).unwrap();
        assert_eq!(answer.capacity_bytes, GROWN);
        assert!(answer.node_expansion_required);
    }
    // As csi-sanity asks: without a capability and without the staging path.
    let mut expand = attached.expand(GROWN.cast_unsigned());
    expand.volume_capability = None;
    expand.staging_target_path.clear();
    node.calls.node_expand_volume(expand).unwrap();
    let seen = node.guest.stat_filesystem(&format!("/node{}", attached.target)).unwrap();
    assert!(seen.blocks * seen.block_bytes > 100 * MIB, "{seen:?}");

    node.calls.node_unpublish_volume(attached.unpublish()).unwrap();
    node.calls.node_unstage_volume(attached.unstage()).unwrap();
    cluster.detach(&volume, node).unwrap();
    assert_clean_file(&image(&cluster, node, &volume));
    cluster.delete(&volume).unwrap();
    assert_eq!(cluster.sim.volumes("pve1", "local-lvm"), Vec::<String>::new());
    node.guest.power_off().unwrap();
}

fn image(cluster: &Cluster, _node: &ClusterNode, volume: &csi::Volume) -> PathBuf {
    let handle: proto::VolumeHandle = volume.volume_id.parse().unwrap();
    cluster.sim.image(&handle.zone, &handle.volid()).unwrap()
}

/// A volume moves between two VMs with its data; the second VM is refused while the first holds it.
#[test]
fn guest_volume_moves_between_vms() {
    let Some(cluster) = start(&ClusterOptions::default()) else { return };
    let [first, second] = cluster.nodes.as_slice() else { panic!("two guests were asked for") };
    let volume = cluster.create("moves", SIZE, &[("storage", "local")], first).unwrap();
    let attached = cluster.attach(&volume, "moves", first).unwrap();
    first.prepare(&attached).unwrap();
    first.calls.node_stage_volume(attached.stage()).unwrap_or_else(|status| panic!("{status:?}; {}", quote(&cluster)));
    first.calls.node_publish_volume(attached.publish()).unwrap();
    let file = format!("/node{}/file", attached.target);
    let written = first.guest.fill(&file, 11, 8 * MIB).unwrap();

    let refused = cluster.attach(&volume, "moves", second).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    assert!(refused.message().contains("101"), "the sentence names the VM that holds it: {refused:?}");
    assert!(cluster.sim.vm(102).unwrap().plugged.is_empty());

    first.calls.node_unpublish_volume(attached.unpublish()).unwrap();
    first.calls.node_unstage_volume(attached.unstage()).unwrap();
    cluster.detach(&volume, first).unwrap();

    let attached = cluster.attach(&volume, "moves", second).unwrap();
    second.prepare(&attached).unwrap();
    second.calls.node_stage_volume(attached.stage()).unwrap();
    second.calls.node_publish_volume(attached.publish()).unwrap();
    assert_eq!(second.guest.sha256(&file).unwrap(), written);
    second.calls.node_unpublish_volume(attached.unpublish()).unwrap();
    second.calls.node_unstage_volume(attached.unstage()).unwrap();
    cluster.detach(&volume, second).unwrap();
    cluster.delete(&volume).unwrap();
    for node in &cluster.nodes {
        node.guest.power_off().unwrap();
    }
}
