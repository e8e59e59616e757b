//! Resident memory of the release binary: idle, under 32 calls at once, and with a large cluster known.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use proto::csi;

use crate::calls::{mount_capability, runtime};
use crate::controller::Controller;
use crate::sim::{Description, Node, STANDARD_SECRET, Simulator, Storage, Vm};

const AT_ONCE: usize = 32;
const NODES: usize = 32;
const VMS: u32 = 500;
const VOLUMES_PER_VM: u32 = 20;
/// The last calls' threads and connections are gone by then.
const IDLE: Duration = Duration::from_secs(12);

fn row(text: &mut String, what: &str, kib: u64, goal_mb: u64) -> Result<()> {
    let met = if kib * 1024 <= goal_mb * 1_000_000 { "met" } else { "**not met**" };
    writeln!(text, "| {what} | {:.1} MB | ≤ {goal_mb} MB: {met} |", super::kilobytes(kib * 1024) / 1000.0)?;
    Ok(())
}

fn cluster() -> Description {
    let mut description = Description { nodes: Vec::new(), vms: Vec::new(), storages: Vec::new(), ..Description::standard() };
    description.nodes = (1..=NODES).map(|number| Node::online(&format!("pve{number}"))).collect();
    for number in 0..VMS {
        let vmid = 100 + number;
        let node = format!("pve{}", usize::try_from(number).unwrap_or(0) % NODES + 1);
        let mut vm = Vm::linux(vmid, &node, &format!("node-{vmid}"), None);
        // One is left empty, to be attached to.
        for slot in (1..=VOLUMES_PER_VM).filter(|_| number > 0) {
            let line = format!(
                "ceph:vm-9999-pvc-0b9d3c1e-2f4a-4c55-9a51-{vmid:06}{slot:06},backup=0,iothread=1,size=64M,serial=csi-{vmid:08x}{slot:08x},wwn=0x50564{slot:011x}"
            );
            vm.config.insert(format!("scsi{slot}"), line);
        }
        description.vms.push(vm);
    }
    let room = 1 << 50;
    description.storages = vec![
        Storage { total_bytes: room, ..Storage::new("ds", "dir", &[("path", "/ds")]) },
        Storage { total_bytes: room, ..Storage::new("ceph", "rbd", &[("pool", "ceph")]) },
    ];
    description
}

fn create(controller: &Controller, name: &str) -> Result<String> {
    let request = csi::CreateVolumeRequest {
        name: name.into(),
        capacity_range: Some(csi::CapacityRange { required_bytes: 64 << 20, limit_bytes: 0 }),
        volume_capabilities: vec![mount_capability("ext4")],
        parameters: [("storage".to_string(), "ds".to_string())].into(),
        ..Default::default()
    };
    let answer = controller.calls().create_volume(request).map_err(|status| anyhow!("create {name}: {status:?}"))?;
    Ok(answer.volume.unwrap_or_default().volume_id)
}

fn publish(controller: &Controller, disk: &str, vmid: usize) -> Result<()> {
    let request = csi::ControllerPublishVolumeRequest {
        volume_id: format!("fsn1//ceph/{disk}"),
        node_id: format!("node-{vmid}/{vmid}"),
        volume_capability: Some(mount_capability("ext4")),
        ..Default::default()
    };
    controller.calls().controller_publish_volume(request).map(drop).map_err(|status| anyhow!("publish {disk}: {status:?}"))
}

fn unpublish(controller: &Controller, disk: &str, vmid: usize) -> Result<()> {
    let request = csi::ControllerUnpublishVolumeRequest {
        volume_id: format!("fsn1//ceph/{disk}"),
        node_id: format!("node-{vmid}/{vmid}"),
        ..Default::default()
    };
    controller.calls().controller_unpublish_volume(request).map(drop).map_err(|status| anyhow!("unpublish {disk}: {status:?}"))
}

fn config(sim: &Simulator) -> String {
    format!("clusters:\n  - url: {}\n    region: fsn1\n    token_id: \"csi@pve!csi\"\n    token_secret: \"{STANDARD_SECRET}\"\n", sim.url())
}

/// The most KiB while so many callers call at once, some times each.
fn most_while(controller: &Controller, call: impl Fn(usize, usize) -> Result<()> + Sync) -> Result<u64> {
    let (most, call) = (std::sync::atomic::AtomicU64::new(0), &call);
    std::thread::scope(|scope| {
        let calls: Vec<_> = (0..AT_ONCE).map(|number| scope.spawn(move || (0..8).try_for_each(|turn| call(number, turn)))).collect();
        while calls.iter().any(|call| !call.is_finished()) {
            most.fetch_max(controller.resident_kib().unwrap_or(0), std::sync::atomic::Ordering::Relaxed);
            std::thread::yield_now();
        }
        calls.into_iter().try_for_each(|call| call.join().map_err(|_| anyhow!("a call panicked"))?)
    })?;
    Ok(most.into_inner())
}

/// The same of attachments to a VM each, of a shared storage; on a cluster that is small, so that it is the calls that are measured.
fn attachments_at_once() -> Result<u64> {
    let folder = crate::folder::new("csi-cluster-", "-storm")?;
    let mut about = cluster();
    about.nodes.truncate(3);
    about.vms = (0..AT_ONCE)
        .zip(100..)
        .map(|(number, vmid)| Vm::linux(vmid, &format!("pve{}", number % 3 + 1), &format!("node-{vmid}"), None))
        .collect();
    let sim = runtime().block_on(Simulator::builder(about).start()).context("start the simulator")?;
    for number in 0..AT_ONCE {
        sim.create_volume("pve1", &format!("ceph:vm-9999-{number}"), 64 << 20).map_err(anyhow::Error::msg)?;
    }
    let controller = Controller::start(&folder, &config(&sim))?;
    let most = most_while(&controller, |number, _| {
        let disk = format!("vm-9999-{number}");
        publish(&controller, &disk, 100 + number)?;
        unpublish(&controller, &disk, 100 + number)
    })?;
    drop(controller);
    std::fs::remove_dir_all(&folder).context("remove the controller's folder")?;
    Ok(most)
}

/// The rows, as Markdown.
///
/// # Errors
/// The release binary is missing, or a call fails.
pub fn memory() -> Result<String> {
    let folder = crate::folder::new("csi-cluster-", "-storm")?;
    let sim = runtime().block_on(Simulator::builder(cluster()).start()).context("start the simulator")?;
    let controller = Controller::start(&folder, &config(&sim))?;
    let mut text = String::from("| memory of the controller | resident | goal |\n|---|---|---|\n");
    row(&mut text, "idle, just started", controller.resident_kib()?, 4)?;
    let most = most_while(&controller, |number, turn| create(&controller, &format!("pvc-{number}-{turn}")).map(drop))?;
    row(&mut text, &format!("most, {AT_ONCE} creations at once"), most, 8)?;
    row(&mut text, &format!("most, {AT_ONCE} attachments and detachments at once"), attachments_at_once()?, 8)?;
    sim.create_volume("pve1", "ceph:vm-9999-new", 64 << 20).map_err(anyhow::Error::msg)?;
    publish(&controller, "vm-9999-new", 100)?;
    row(&mut text, &format!("{} volumes and {VMS} VMs known", (VMS - 1) * VOLUMES_PER_VM), controller.resident_kib()?, 20)?;
    sim.reset_counters();
    // The timer belongs to the runtime: made inside it.
    runtime().block_on(async { tokio::time::sleep(IDLE).await });
    row(&mut text, "the same, idle since", controller.resident_kib()?, 20)?;
    let requests = sim.requests().len();
    writeln!(text, "\nRequests in {} s of idleness: {requests}.", IDLE.as_secs())?;
    drop(controller);
    std::fs::remove_dir_all(&folder).context("remove the controller's folder")?;
    Ok(text)
}
