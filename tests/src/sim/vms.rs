//! What can be read of VMs, and switching them on and off.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::answer::{ApiError, Reply};
use super::config::VmConfig;
use super::drive::{self, Drive};
use super::hotplug;
use super::route::Call;
use super::state::{Cluster, State, Vm};
use super::update;

type Result<T = Reply> = std::result::Result<T, ApiError>;

/// What status/current waits for a QEMU that does not answer (as measured).
const HUNG_QMP_WAIT: Duration = Duration::from_secs(3);
const QEMU: &str = "10.0.2";

/// The size of the boot disk, as the config has it.
fn boot_disk_bytes(config: &VmConfig) -> u64 {
    let first = config.boot_order().first().cloned().unwrap_or_default();
    config.get(&first).and_then(|line| Drive::stored(line).option("size").and_then(drive::parse_size)).unwrap_or(0)
}

fn memory_bytes(config: &VmConfig) -> u64 {
    config.get("memory").and_then(|memory| memory.parse::<u64>().ok()).unwrap_or(512) << 20
}

fn cpus(config: &VmConfig) -> u64 {
    let number = |key| config.get(key).and_then(|text| text.parse::<u64>().ok()).unwrap_or(1);
    number("cores") * number("sockets")
}

/// The entry of a VM in /cluster/resources.
pub(crate) fn resource(cluster: &Cluster, state: &State, vmid: u32, vm: &Vm) -> Value {
    let mut entry = json!({"id": format!("qemu/{vmid}"), "type": "qemu", "vmid": vmid, "node": vm.node, "status": "unknown"});
    let Some(object) = entry.as_object_mut() else { return entry };
    if !vm.fresh && state.has_statistics(&vm.node, cluster.clock.elapsed()) {
        let status = if vm.running { "running" } else { "stopped" };
        let numbers = json!({
            "status": status, "name": vm.config.get("name").unwrap_or_default(), "template": u8::from(vm.config.is_set("template")),
            "maxcpu": cpus(&vm.config), "cpu": 0, "maxmem": memory_bytes(&vm.config), "mem": 0, "maxdisk": boot_disk_bytes(&vm.config),
            "disk": 0, "uptime": uptime(cluster, vm), "netin": 0, "netout": 0, "diskread": 0, "diskwrite": 0,
        });
        object.extend(numbers.as_object().cloned().unwrap_or_default());
        if cluster.version.is_nine() {
            object.insert("memhost".to_owned(), 0.into());
        }
    }
    for key in ["lock", "tags"] {
        if let Some(value) = vm.config.get(key) {
            object.insert(key.to_owned(), value.into());
        }
    }
    entry
}

fn uptime(cluster: &Cluster, vm: &Vm) -> u64 {
    if vm.running { 60 + cluster.clock.elapsed().as_secs() } else { 0 }
}

/// What list and status/current have in common.
fn describe(cluster: &Cluster, vmid: u32, vm: &Vm) -> Map<String, Value> {
    let config = &vm.config;
    let mut status = json!({
        "vmid": vmid, "name": config.get("name").unwrap_or_default(), "status": if vm.running { "running" } else { "stopped" },
        "cpus": cpus(config), "cpu": 0, "mem": 0, "maxmem": memory_bytes(config), "disk": 0, "maxdisk": boot_disk_bytes(config),
        "uptime": uptime(cluster, vm), "netin": 0, "netout": 0,
    })
    .as_object()
    .cloned()
    .unwrap_or_default();
    for key in ["lock", "tags"] {
        if let Some(value) = config.get(key) {
            status.insert(key.to_owned(), value.into());
        }
    }
    if config.is_set("template") {
        status.insert("template".to_owned(), 1.into());
    }
    if config.get("serial0").is_some() {
        status.insert("serial".to_owned(), 1.into());
    }
    if cluster.version.is_nine() {
        status.insert("memhost".to_owned(), 0.into());
    }
    if vm.running {
        status.insert("pid".to_owned(), (10_000 + vmid).into());
        if cluster.version.is_nine() {
            for kind in ["cpufull", "cpusome", "iofull", "iosome", "memoryfull", "memorysome"] {
                status.insert(format!("pressure{kind}"), 0.into());
            }
        }
    }
    status
}

pub(crate) fn list(cluster: &Cluster, call: &Call) -> Result {
    let state = cluster.state();
    let shown = state
        .vms
        .iter()
        .filter(|(vmid, vm)| vm.node == call.node && state.access.may(&call.caller, &format!("/vms/{vmid}"), &["VM.Audit"]));
    // `full`: QEMU is asked, as for status/current (qemu-server: vmstatus(undef, $param->{full})).
    let full = call.flag("full");
    let describe_one = |vmid: u32, vm: &Vm| {
        let mut entry = describe(cluster, vmid, vm);
        if full && vm.running && !vm.hung {
            let blockstat = vm.plugged.keys().map(|key| (key.clone(), block_statistics())).collect();
            entry.insert("blockstat".to_owned(), Value::Object(blockstat));
        }
        Value::Object(entry)
    };
    Ok(Value::Array(shown.map(|(vmid, vm)| describe_one(*vmid, vm)).collect()).into())
}

/// status/current: `blockstat` has the drives that QEMU really has.
pub(crate) async fn status(cluster: &Cluster, call: &Call) -> Result {
    let hung = {
        let state = cluster.state();
        let vm = state.vm(&call.node, call.vmid())?;
        vm.running && vm.hung
    };
    if hung {
        cluster.clock.sleep(HUNG_QMP_WAIT).await;
    }
    let state = cluster.state();
    let vm = state.vm(&call.node, call.vmid())?;
    let mut status = describe(cluster, call.vmid(), vm);
    status.insert("ha".to_owned(), json!({"managed": 0}));
    status.insert("clipboard".to_owned(), Value::Null);
    let qmp = match (vm.running, vm.paused && !hung) {
        (false, _) => "stopped",
        (true, true) => "paused",
        (true, false) => "running",
    };
    status.insert("qmpstatus".to_owned(), qmp.into());
    if vm.running && !hung {
        let blockstat: Map<String, Value> = vm.plugged.keys().map(|key| (key.clone(), block_statistics())).collect();
        status.insert("blockstat".to_owned(), Value::Object(blockstat));
        status.insert("diskread".to_owned(), 0.into());
        status.insert("diskwrite".to_owned(), 0.into());
        status.insert("running-qemu".to_owned(), QEMU.into());
        status.insert("running-machine".to_owned(), "pc-i440fx-10.0+pve0".into());
        status.insert(
            "proxmox-support".to_owned(),
            json!({"pbs-dirty-bitmap": true, "query-bitmap-info": true, "pbs-library-version": "1.5.1"}),
        );
    }
    Ok(Value::Object(status).into())
}

fn block_statistics() -> Value {
    json!({
        "rd_bytes": 0, "wr_bytes": 0, "rd_operations": 0, "wr_operations": 0, "flush_operations": 0, "unmap_operations": 0,
        "wr_highest_offset": 0, "failed_rd_operations": 0, "failed_wr_operations": 0, "account_failed": true, "account_invalid": true,
        "timed_stats": [],
    })
}

pub(crate) fn config(cluster: &Cluster, call: &Call) -> Result {
    let state = cluster.state();
    let config = &state.vm(&call.node, call.vmid())?.config;
    match call.get("snapshot") {
        Some(name) => config.snapshot_view(name).map(Reply::from).ok_or_else(|| ApiError::die(format!("snapshot '{name}' does not exist"))),
        None => Ok(config.view(call.flag("current")).into()),
    }
}

pub(crate) fn pending(cluster: &Cluster, call: &Call) -> Result {
    Ok(cluster.state().vm(&call.node, call.vmid())?.config.pending_view().into())
}

pub(crate) fn start(cluster: &Arc<Cluster>, call: &Call) -> Result {
    let (node, vmid) = (call.node.clone(), call.vmid());
    if cluster.state().vm(&node, vmid)?.running {
        return Err(ApiError::die(format!("VM {vmid} already running")));
    }
    let task_node = node.clone();
    let upid = cluster.fork(&task_node, "qmstart", &vmid.to_string(), &call.caller, move |cluster, _| async move {
        let held = cluster.lock_config(vmid).await?;
        cluster.state().vm(&node, vmid)?.check_lock()?;
        let mut errors = BTreeMap::new();
        update::apply_pending(&cluster, &node, vmid, &mut errors).await?;
        if !errors.is_empty() {
            return Err(ApiError::params(errors));
        }
        hotplug::plug_all(&cluster, &node, vmid)?;
        drop(held);
        Ok(())
    });
    Ok(Value::String(upid).into())
}

pub(crate) fn stop(cluster: &Arc<Cluster>, call: &Call) -> Result {
    let (node, vmid) = (call.node.clone(), call.vmid());
    cluster.state().vm(&node, vmid)?;
    let upid = cluster.fork(&call.node, "qmstop", &vmid.to_string(), &call.caller, move |cluster, _| async move {
        let held = cluster.lock_config(vmid).await?;
        cluster.state().vm_mut(&node, vmid)?.power_off();
        drop(held);
        Ok(())
    });
    Ok(Value::String(upid).into())
}

pub(crate) fn pause(cluster: &Arc<Cluster>, call: &Call, paused: bool) -> Result {
    let (node, vmid) = (call.node.clone(), call.vmid());
    if !cluster.state().vm(&node, vmid)?.running {
        return Err(ApiError::die(format!("VM {vmid} not running")));
    }
    let kind = if paused { "qmpause" } else { "qmresume" };
    let upid = cluster.fork(&call.node, kind, &vmid.to_string(), &call.caller, move |cluster, _| async move {
        cluster.state().vm_mut(&node, vmid)?.paused = paused;
        Ok(())
    });
    Ok(Value::String(upid).into())
}

impl Vm {
    /// QEMU ends: nothing is plugged any more, and nothing is left over.
    pub(crate) fn power_off(&mut self) {
        self.running = false;
        self.paused = false;
        self.hung = false;
        self.plugged.clear();
        self.leaked.clear();
        self.leaked_to_rivals.clear();
    }
}

pub(crate) fn snapshots(cluster: &Cluster, call: &Call) -> Result {
    let state = cluster.state();
    let vm = state.vm(&call.node, call.vmid())?;
    let mut list = Vec::new();
    for (name, section) in &vm.config.snapshots {
        let mut entry = json!({"name": name, "description": "", "vmstate": 0});
        if let Some(entry) = entry.as_object_mut() {
            entry.insert("snaptime".to_owned(), section.get("snaptime").and_then(|time| time.parse::<u64>().ok()).into());
            if let Some(parent) = section.get("parent") {
                entry.insert("parent".to_owned(), parent.clone().into());
            }
        }
        list.push(entry);
    }
    let mut current =
        json!({"name": "current", "description": "You are here!", "digest": vm.config.digest(), "running": u8::from(vm.running)});
    if let (Some(current), Some(parent)) = (current.as_object_mut(), vm.config.get("parent")) {
        current.insert("parent".to_owned(), parent.into());
    }
    list.push(current);
    Ok(Value::Array(list).into())
}

/// Keeps the config as it is under a name; images are not copied (rollback is not there yet).
pub(crate) fn snapshot(cluster: &Arc<Cluster>, call: &Call) -> Result {
    let (node, vmid, name) = (call.node.clone(), call.vmid(), call.text("snapname").to_owned());
    if matches!(name.as_str(), "current" | "pending") {
        return Err(ApiError::die(format!("unable to use snapshot name '{name}' (reserved name)")));
    }
    let upid = cluster.fork(&call.node, "qmsnapshot", &vmid.to_string(), &call.caller, move |cluster, log| async move {
        let held = cluster.lock_config(vmid).await?;
        let now = cluster.clock.unix_seconds();
        let mut state = cluster.state();
        let vm = state.vm(&node, vmid)?;
        vm.check_lock()?;
        if vm.config.snapshots.contains_key(&name) {
            return Err(ApiError::die(format!("snapshot name '{name}' already used")));
        }
        let drives: Vec<(String, Drive)> = vm
            .config
            .current
            .iter()
            .filter(|(key, _)| drive::is_drive(key))
            .map(|(key, line)| (key.clone(), Drive::stored(line)))
            .filter(|(_, drive)| !drive.is_cdrom())
            .collect();
        for (_, drive) in &drives {
            let (storage, name) = state.volume(&drive.file)?;
            if !storage.has_snapshots(&name) {
                return Err(ApiError::die("snapshot feature is not available"));
            }
        }
        for (key, drive) in &drives {
            log.print(format!("snapshotting 'drive-{key}' ({})", drive.file));
        }
        let config = &mut state.vm_mut(&node, vmid)?.config;
        let mut section = config.current.clone();
        section.retain(|key, _| !drive::is_unused(key) && key != "lock");
        section.insert("snaptime".to_owned(), now.to_string());
        config.snapshots.insert(name.clone(), section);
        config.current.insert("parent".to_owned(), name);
        drop(held);
        Ok(())
    });
    Ok(Value::String(upid).into())
}
