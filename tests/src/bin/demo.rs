//! `scripts/demo`: one volume's whole life over the real CSI sockets, on a real kernel, with the release binaries.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use proto::csi;
use testbed::calls::NodeVolume;
use testbed::cluster::{Cluster, ClusterNode, ClusterOptions};
use testbed::guest::Bridge;
use testbed::sim::Latency;
use testbed::tools;
use tonic::{Code, Status};

const GIB: i64 = 1 << 30;
const STORAGE: &str = "local-lvm";
const ZONE: &str = "pve1";
/// The pod's file: enough that a wrong block would show.
const FILE_BYTES: u64 = 16 << 20;
/// A filesystem keeps some of a volume for itself.
const LEAST_USABLE_PERCENT: i64 = 90;

/// With `--encrypt`: an emulated VM would take 20 s for argon2id, and three derivations are made.
const ENCRYPTING: [(&str, &str); 2] = [(proto::volume_context::LUKS_KDF, "pbkdf2"), (proto::volume_context::LUKS_KDF_ITERATIONS, "10000")];
const PASSPHRASE: &str = "what the Kubernetes secret holds";

/// A step's row of the summary.
struct Row {
    name: &'static str,
    took: Duration,
    calls: u64,
    polls: u64,
}

struct Demo<'a> {
    cluster: &'a Cluster,
    fs_type: &'static str,
    is_encrypted: bool,
    rows: Vec<Row>,
}

impl Demo<'_> {
    /// Plays one step: says what was done and verified, how long it took and what Proxmox was asked.
    fn step<T>(&mut self, name: &'static str, act: impl FnOnce(&Cluster) -> Result<(T, String)>) -> Result<T> {
        let number = self.rows.len() + 1;
        self.cluster.sim.reset_counters();
        let begun = Instant::now();
        let done = act(self.cluster);
        let took = begun.elapsed();
        let counters = self.cluster.sim.counters();
        let polls = counters.iter().filter(|(endpoint, _)| endpoint.contains("/tasks/")).map(|(_, count)| count).sum();
        let calls = counters.values().sum::<u64>() - polls;
        match done {
            Ok((value, verified)) => {
                say(&format!("{number:2}  {name:<34} {verified:<86} {:>6} ms", took.as_millis()));
                self.rows.push(Row { name, took, calls, polls });
                Ok(value)
            }
            Err(why) => {
                say(&format!("{number:2}  {name:<34} FAILED after {} ms", took.as_millis()));
                Err(why.context(format!("step {number}, {name}")))
            }
        }
    }
}

fn say(line: &str) {
    // A reader that went away is no reason to stop half-way.
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// An RPC's refusal as an error that keeps code and sentence.
fn refused(rpc: &'static str) -> impl Fn(Status) -> anyhow::Error {
    move |status| anyhow!("{rpc}: {:?}: {}", status.code(), status.message())
}

fn nodes(cluster: &Cluster) -> Result<(&ClusterNode, &ClusterNode)> {
    match cluster.nodes.as_slice() {
        [first, second] => Ok((first, second)),
        others => bail!("the demo needs two VMs, not {}", others.len()),
    }
}

/// A mounted volume's bytes: all, and used.
fn stats(node: &ClusterNode, volume: &NodeVolume) -> Result<(i64, i64)> {
    let answer = node.calls.node_get_volume_stats(volume.stats()).map_err(refused("NodeGetVolumeStats"))?;
    let bytes = answer.usage.iter().find(|usage| usage.unit == i32::from(csi::volume_usage::Unit::Bytes)).context("stats without bytes")?;
    Ok((bytes.total, bytes.used))
}

/// Where a mount point's filesystem is from and of what type, as the guest's kernel says.
fn mounted(node: &ClusterNode, path: &str) -> Result<Option<(String, String)>> {
    let mounts = node.guest.mounts_below("/")?;
    Ok(mounts.into_iter().find(|(at, _)| at.ends_with(path)))
}

fn play(demo: &mut Demo<'_>) -> Result<()> {
    let (fs_type, is_encrypted) = (demo.fs_type, demo.is_encrypted);
    let (creating, staging) = match (fs_type, is_encrypted) {
        ("xfs", false) => ("create a 1 GiB xfs volume", "stage: probe, mkfs, mount"),
        (_, false) => ("create a 1 GiB ext4 volume", "stage: probe, mkfs, mount"),
        ("xfs", true) => ("create an encrypted 1 GiB xfs", "stage: probe, LUKS2, mkfs, mount"),
        (_, true) => ("create an encrypted 1 GiB ext4", "stage: probe, LUKS2, mkfs, mount"),
    };
    let volume = demo.step(creating, |cluster| create(cluster, is_encrypted))?;
    let attach = |cluster: &Cluster, node: &ClusterNode| {
        let (mut attached, verified) = attach(cluster, &volume, node)?;
        if is_encrypted {
            attached.secrets.insert(proto::secrets::PASSPHRASE.into(), PASSPHRASE.into());
        }
        Ok((attached, verified))
    };
    let first = demo.step("attach it to the first VM", |cluster| attach(cluster, nodes(cluster)?.0))?;
    demo.step(staging, |cluster| stage(nodes(cluster)?.0, &first, fs_type))?;
    demo.step("publish to the pod", |cluster| publish(nodes(cluster)?.0, &first))?;
    let file = format!("{}/file", first.target);
    let checksum = demo.step("write a file", |cluster| {
        let (node, _) = nodes(cluster)?;
        let written = node.guest.fill(&file, 1, FILE_BYTES)?;
        ensure!(node.guest.sha256(&file)? == written, "the file does not read back as written");
        let short: String = written.chars().take(16).collect();
        Ok((written, format!("{} MiB of it, sha256 {short}…", FILE_BYTES >> 20)))
    })?;
    demo.step("stats", |cluster| {
        let (total, used) = stats(nodes(cluster)?.0, &first)?;
        ensure!(total > GIB * LEAST_USABLE_PERCENT / 100 && total <= GIB, "{total} bytes in all for a volume of {GIB}");
        ensure!(used >= i64::try_from(FILE_BYTES)?, "{used} bytes used after a file of {FILE_BYTES}");
        Ok(((), format!("{} MiB in all, {} MiB used", total >> 20, used >> 20)))
    })?;
    demo.step("expand to 2 GiB while mounted", |cluster| expand(cluster, &volume, &first))?;
    demo.step("try to attach it to the second VM", |cluster| second_is_refused(cluster, &volume))?;
    demo.step("unpublish", |cluster| unpublish(nodes(cluster)?.0, &first))?;
    demo.step("unstage", |cluster| unstage(nodes(cluster)?.0, &first))?;
    demo.step("detach from the first VM", |cluster| {
        let (node, _) = nodes(cluster)?;
        detach(cluster, &volume, node)
    })?;
    let second = demo.step("attach it to the second VM", |cluster| attach(cluster, nodes(cluster)?.1))?;
    demo.step("stage there: nothing is formatted", |cluster| stage(nodes(cluster)?.1, &second, fs_type))?;
    demo.step("publish there", |cluster| publish(nodes(cluster)?.1, &second))?;
    demo.step("read the file back", |cluster| {
        let (_, node) = nodes(cluster)?;
        let read = node.guest.sha256(&format!("{}/file", second.target))?;
        ensure!(read == checksum, "sha256 {read} was read, {checksum} was written");
        Ok(((), "the same checksum".into()))
    })?;
    demo.step("unpublish and unstage there", |cluster| {
        let (_, node) = nodes(cluster)?;
        unpublish(node, &second)?;
        unstage(node, &second)
    })?;
    demo.step("detach from the second VM", |cluster| {
        let (_, node) = nodes(cluster)?;
        detach(cluster, &volume, node)
    })?;
    demo.step("delete", |cluster| {
        cluster.delete(&volume).map_err(refused("DeleteVolume"))?;
        let left = cluster.sim.volumes(ZONE, STORAGE);
        ensure!(left.is_empty(), "still on {STORAGE}: {left:?}");
        cluster.delete(&volume).map_err(refused("DeleteVolume, repeated"))?;
        Ok(((), format!("nothing is left on {STORAGE}; deleting it again is fine")))
    })
}

fn create(cluster: &Cluster, is_encrypted: bool) -> Result<(csi::Volume, String)> {
    let (node, _) = nodes(cluster)?;
    let mut class = vec![("storage", STORAGE), ("ssd", "true")];
    class.extend(ENCRYPTING.iter().filter(|_| is_encrypted));
    let volume = cluster.create("pvc-demo", GIB, &class, node).map_err(refused("CreateVolume"))?;
    let again = cluster.create("pvc-demo", GIB, &class, node).map_err(refused("CreateVolume, repeated"))?;
    ensure!(again.volume_id == volume.volume_id, "a repeat made a second volume: {}", again.volume_id);
    let volumes = cluster.sim.volumes(ZONE, STORAGE);
    ensure!(volumes.len() == 1 && volume.capacity_bytes == GIB, "volumes {volumes:?}, capacity {}", volume.capacity_bytes);
    let verified = format!("{}; asked twice, made once", volume.volume_id);
    Ok((volume, verified))
}

fn attach(cluster: &Cluster, volume: &csi::Volume, node: &ClusterNode) -> Result<(NodeVolume, String)> {
    let attached = cluster.attach(volume, "pvc-demo", node).map_err(refused("ControllerPublishVolume"))?;
    let plugged = cluster.sim.vm(node.vmid).context("the VM is gone")?.plugged;
    ensure!(plugged.len() == 1, "VM {} has {} drives plugged", node.vmid, plugged.len());
    let lun = attached.publish_context.get(proto::publish_context::LUN).cloned().unwrap_or_default();
    let serial = attached.publish_context.get(proto::publish_context::SERIAL).cloned().unwrap_or_default();
    Ok((attached, format!("VM {} has it plugged as scsi{lun}, serial {serial}", node.vmid)))
}

fn stage(node: &ClusterNode, volume: &NodeVolume, fs_type: &str) -> Result<((), String)> {
    node.prepare(volume)?;
    node.calls.node_stage_volume(volume.stage()).map_err(refused("NodeStageVolume"))?;
    let (at, kind) = mounted(node, &volume.staging)?.context("nothing is mounted at the staging path")?;
    node.calls.node_stage_volume(volume.stage()).map_err(refused("NodeStageVolume, repeated"))?;
    ensure!(!at.is_empty() && kind == fs_type, "{kind} is mounted at {at:?}, {fs_type} was asked for");
    let open = mappings(node)?;
    ensure!(open.len() == volume.secrets.len(), "open mappings: {open:?}");
    let from = open.first().map(|mapping| format!(" from {mapping}")).unwrap_or_default();
    Ok(((), format!("{kind} is mounted at …/{}{from}", tail(&volume.staging))))
}

/// Names of the encrypted mappings that the guest's kernel has open.
fn mappings(node: &ClusterNode) -> Result<Vec<String>> {
    let disks = node.guest.list("/sys/block")?.into_iter().filter(|disk| disk.starts_with("dm-"));
    disks.map(|disk| Ok(node.guest.read(&format!("/sys/block/{disk}/dm/name"))?.trim().to_owned())).collect()
}

fn publish(node: &ClusterNode, volume: &NodeVolume) -> Result<((), String)> {
    node.calls.node_publish_volume(volume.publish()).map_err(refused("NodePublishVolume"))?;
    mounted(node, &volume.target)?.context("nothing is mounted at the target path")?;
    Ok(((), format!("the pod sees it at …/{}", tail(&volume.target))))
}

fn expand(cluster: &Cluster, volume: &csi::Volume, staged: &NodeVolume) -> Result<((), String)> {
    let (node, _) = nodes(cluster)?;
    let (before, _) = stats(node, staged)?;
    let answer = cluster.expand(volume, 2 * GIB).map_err(refused("ControllerExpandVolume"))?;
    ensure!(answer.node_expansion_required && answer.capacity_bytes == 2 * GIB, "the controller answered {answer:?}");
    let request = staged.expand(u64::try_from(2 * GIB)?);
    node.calls.node_expand_volume(request).map_err(refused("NodeExpandVolume"))?;
    let (after, _) = stats(node, staged)?;
    ensure!(after > 2 * GIB * LEAST_USABLE_PERCENT / 100, "{after} bytes in all after growing to {}", 2 * GIB);
    Ok(((), format!("from {} to {} MiB, mounted all the time", before >> 20, after >> 20)))
}

fn second_is_refused(cluster: &Cluster, volume: &csi::Volume) -> Result<((), String)> {
    let (_, node) = nodes(cluster)?;
    match cluster.attach(volume, "pvc-demo", node) {
        Ok(_) => bail!("it was attached to both VMs"),
        Err(status) => {
            ensure!(status.code() == Code::FailedPrecondition, "{:?} instead of FailedPrecondition: {}", status.code(), status.message());
            ensure!(cluster.sim.vm(node.vmid).is_some_and(|vm| vm.plugged.is_empty()), "refused, and plugged all the same");
            Ok(((), format!("refused: {}", status.message())))
        }
    }
}

fn unpublish(node: &ClusterNode, volume: &NodeVolume) -> Result<((), String)> {
    node.calls.node_unpublish_volume(volume.unpublish()).map_err(refused("NodeUnpublishVolume"))?;
    ensure!(mounted(node, &volume.target)?.is_none(), "still mounted at the target path");
    ensure!(node.guest.stat(&volume.target)?.is_none(), "the target path is still there");
    Ok(((), "the target path is gone".into()))
}

fn unstage(node: &ClusterNode, volume: &NodeVolume) -> Result<((), String)> {
    node.calls.node_unstage_volume(volume.unstage()).map_err(refused("NodeUnstageVolume"))?;
    ensure!(mounted(node, &volume.staging)?.is_none(), "still mounted at the staging path");
    ensure!(mappings(node)?.is_empty(), "its mapping is still open");
    Ok(((), "nothing is mounted from the disk".into()))
}

fn detach(cluster: &Cluster, volume: &csi::Volume, node: &ClusterNode) -> Result<((), String)> {
    cluster.detach(volume, node).map_err(refused("ControllerUnpublishVolume"))?;
    let vm = cluster.sim.vm(node.vmid).context("the VM is gone")?;
    ensure!(vm.plugged.is_empty() && vm.pending.is_empty(), "VM {} still has {:?} {:?}", node.vmid, vm.plugged, vm.pending);
    Ok(((), format!("VM {} holds nothing: not configured, not planned, not plugged", node.vmid)))
}

/// A path's last two parts.
fn tail(path: &str) -> String {
    let parts: Vec<&str> = path.rsplit('/').take(2).collect();
    parts.into_iter().rev().collect::<Vec<_>>().join("/")
}

fn summary(demo: &Demo<'_>) -> Result<()> {
    say("\nsummary");
    say(&format!("  {:<34} {:>9} {:>14} {:>12}", "step", "time", "Proxmox calls", "task polls"));
    for row in &demo.rows {
        say(&format!("  {:<34} {:>6} ms {:>14} {:>12}", row.name, row.took.as_millis(), row.calls, row.polls));
    }
    for name in ["proxmox-csi-node", "proxmox-csi-controller"] {
        let size = std::fs::metadata(tools::release_binary(name))?.len();
        say(&format!("  {name:<34} {size:>9} bytes, static"));
    }
    say(&format!("  {:<34} {:>9} KiB resident", "controller", demo.cluster.controller.resident_kib()?));
    for node in &demo.cluster.nodes {
        let name = format!("node agent of VM {}", node.vmid);
        say(&format!("  {name:<34} {:>9} KiB resident", node.guest.resident_kib(node.agent.pid)?));
    }
    Ok(())
}

/// Leaves all of it running until standard input ends or the user presses Ctrl-C.
fn keep(cluster: &Cluster) -> Result<()> {
    let mut bridges = Vec::new();
    say("\nleft running; the CSI sockets:");
    say(&format!("  controller       unix://{}", cluster.controller.socket().display()));
    for node in &cluster.nodes {
        let socket = cluster.folder().join(format!("node-{}.sock", node.vmid));
        bridges.push(Bridge::from_socket(&socket, node.guest.node_port())?);
        say(&format!("  node {:<11} unix://{}", node.node_id, socket.display()));
    }
    say(&format!("the Proxmox simulator: {} (header Authorization: PVEAPIToken={})", cluster.sim.url(), cluster.sim.token()));
    say(&format!("for example: curl -s -H 'Authorization: PVEAPIToken={}' {}/cluster/resources", cluster.sim.token(), cluster.sim.url()));
    say("Enter (or Ctrl-C) ends it.");
    let (end, ended) = std::sync::mpsc::channel();
    let enter = end.clone();
    std::thread::spawn(move || {
        // Without a terminal there is no Enter, only the signal.
        if std::io::stdin().read_line(&mut String::new()).is_ok_and(|read| read > 0) {
            let _ = enter.send(Ok(()));
        }
    });
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let _ = end.send(runtime.and_then(|runtime| runtime.block_on(proto::serve::terminated())));
    });
    ended.recv()?.context("wait for the end")
}

fn run(keep_running: bool, fs_type: &'static str, is_encrypted: bool) -> Result<()> {
    for name in ["proxmox-csi-node", "proxmox-csi-controller"] {
        let binary = tools::release_binary(name);
        ensure!(Path::new(&binary).exists(), "{} is missing: run scripts/build", binary.display());
    }
    let begun = Instant::now();
    say("starting the Proxmox simulator (9.2), the controller and two VMs of Proxmox node pve1 …");
    let cluster = Cluster::start(&ClusterOptions { latency: Latency::RECORDED, fs_type, ..ClusterOptions::default() })?;
    say(&format!("up after {} ms\n", begun.elapsed().as_millis()));
    let mut demo = Demo { cluster: &cluster, fs_type, is_encrypted, rows: Vec::new() };
    let played = play(&mut demo);
    summary(&demo)?;
    if keep_running {
        if let Err(why) = &played {
            say(&format!("\nFAILED: {why:#}"));
        }
        keep(&cluster)?;
    }
    played
}

/// `--keep`, `--fs ext4`, `--fs xfs`, `--encrypt`.
fn arguments() -> Result<(bool, &'static str, bool)> {
    let (mut keep, mut fs_type, mut is_encrypted) = (false, "ext4", false);
    let mut given = std::env::args().skip(1);
    while let Some(arg) = given.next() {
        match arg.as_str() {
            "--keep" => keep = true,
            "--encrypt" => is_encrypted = true,
            "--fs" => match given.next().as_deref() {
                Some("ext4") => fs_type = "ext4",
                Some("xfs") => fs_type = "xfs",
                other => bail!("--fs {}: ext4 or xfs", other.unwrap_or_default()),
            },
            other => bail!("unknown argument {other}"),
        }
    }
    Ok((keep, fs_type, is_encrypted))
}

fn main() -> ExitCode {
    match arguments().and_then(|(keep, fs_type, is_encrypted)| run(keep, fs_type, is_encrypted)) {
        Ok(()) => {
            say("\nall of it held");
            ExitCode::SUCCESS
        }
        Err(why) => {
            say(&format!("\nFAILED: {why:#}"));
            ExitCode::FAILURE
        }
    }
}
