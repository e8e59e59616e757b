//! What QEMU really has: plugging, unplugging, and all that can go wrong there.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Duration;

use crate::machine::{Machine, PluggedDrive};

use super::answer::ApiError;
use super::config::VmConfig;
use super::drive::{Drive, is_drive, scsi_index};
use super::faults::Inner;
use super::state::{Cluster, Plugged, State};

type Result<T> = std::result::Result<T, ApiError>;

/// A query to a QEMU that does not answer.
const QMP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long Proxmox polls for a controller to go.
const CONTROLLER_POLLS: Duration = Duration::from_secs(16);
/// How long it polls for a disk to go.
const DISK_POLLS: Duration = Duration::from_secs(6);
/// QEMU's words for an image that another QEMU writes to.
const WRITE_LOCK: &str = "Failed to get \"write\" lock";

fn meets(state: &mut State, fault: &Inner) -> bool {
    state.faults.meets(|planned| planned == fault).is_some()
}

fn lines(text: &str) -> String {
    text.trim_end().to_owned()
}

/// What the machine is told, and what is remembered of it.
fn drive_of(state: &State, node: &str, key: &str, drive: &Drive, in_task: bool) -> Result<(Plugged, Option<PluggedDrive>)> {
    let (storage, name) = state.volume(&drive.file)?;
    storage.activate(node)?;
    let file = storage.file(node, &name);
    let size_bytes = storage.size(node, &name).ok_or_else(|| storage.missing_at_attach(&name, in_task))?;
    let inode = fs::metadata(&file).map(|metadata| metadata.ino()).unwrap_or_default();
    let wwn = drive.option("wwn").map(str::to_owned);
    let serial = drive.option("serial").map(super::access::percent_decode);
    let plugged = Plugged {
        volid: drive.file.clone(),
        file: file.clone(),
        inode,
        read_only: drive.flag("ro"),
        wwn: wwn.clone(),
        serial: serial.clone(),
        size_bytes,
    };
    let told = scsi_index(key).map(|index| PluggedDrive {
        index,
        volid: drive.file.clone(),
        file,
        format: name.format,
        wwn,
        serial,
        ssd: drive.flag("ssd"),
        read_only: drive.flag("ro"),
        discard: drive.option("discard") == Some("on"),
        iothread: drive.flag("iothread"),
    });
    Ok((plugged, told))
}

/// QEMU's device list: the first thing that a plug or an unplug asks for.
async fn query(cluster: &Cluster, node: &str, vmid: u32) -> Result<()> {
    let (running, hung) = {
        let state = cluster.state();
        let vm = state.vm(node, vmid)?;
        (vm.running, vm.hung)
    };
    if !running {
        return Err(ApiError::die(format!("VM {vmid} not running")));
    }
    if hung {
        cluster.clock.sleep(QMP_TIMEOUT).await;
        return Err(ApiError::die(format!("VM {vmid} qmp command 'query-pci' failed - got timeout")));
    }
    Ok(())
}

/// Plugs a drive. Success does not mean that the guest has it.
pub(crate) async fn plug(cluster: &Arc<Cluster>, node: &str, vmid: u32, key: &str, drive: &Drive, in_task: bool) -> Result<()> {
    let (plugged, told) = drive_of(&cluster.state(), node, key, drive, in_task)?;
    query(cluster, node, vmid).await?;
    if cluster.state().vm(node, vmid)?.plugged.contains_key(key) {
        return Ok(());
    }
    cluster.clock.sleep(cluster.latency.plug).await;
    let block_nodes = cluster.version.has_block_nodes();
    let (machine, refusal, has_rival) = {
        let mut state = cluster.state();
        if state.vm(node, vmid)?.leaked.contains(key) {
            return Err(ApiError::die(if block_nodes {
                format!(
                    "VM {vmid} qmp command 'object-add' failed - attempt to add duplicate property 'throttle-drive-{key}' to object (type 'container')"
                )
            } else {
                format!("adding drive failed: Duplicate ID 'drive-{key}' for drive")
            }));
        }
        if let Some(Inner::PlugFails { text, .. }) =
            state.faults.meets(|fault| matches!(fault, Inner::PlugFails { vmid: wanted, .. } if *wanted == vmid))
        {
            return Err(ApiError::die(text));
        }
        let has_rival = state.is_held(node, plugged.inode, plugged.read_only);
        let phantom = meets(&mut state, &Inner::PhantomAttach { vmid }) || has_rival;
        (state.vm(node, vmid)?.machine.clone(), phantom.then(|| WRITE_LOCK.to_owned()), has_rival)
    };
    let refusal = match (refusal, machine, told) {
        (None, Some(machine), Some(told)) => ask(move || machine.plug(&told)).await.err(),
        (refusal, _, _) => refusal,
    };
    let mut state = cluster.state();
    let vm = state.vm_mut(node, vmid)?;
    match refusal {
        None => {
            vm.plugged.insert(key.to_owned(), plugged);
            Ok(())
        }
        // The block node is there, the device is not, and nobody reads what `device_add` said.
        Some(text) if cluster.version.swallows_device_add() && text.contains(WRITE_LOCK) => {
            vm.leaked.insert(key.to_owned());
            vm.leaked_to_rivals.extend(has_rival.then(|| key.to_owned()));
            Ok(())
        }
        Some(text) => Err(ApiError::die(format!("VM {vmid} qmp command 'device_add' failed - {}", lines(&text)))),
    }
}

/// Calls the machine from a thread that may block.
async fn ask(call: impl FnOnce() -> std::result::Result<(), String> + Send + 'static) -> std::result::Result<(), String> {
    tokio::task::spawn_blocking(call).await.unwrap_or_else(|error| Err(format!("simulator: the machine's call panicked: {error}")))
}

/// Takes a drive out: the disk at once and without asking the guest, its own controller only with the guest's help.
pub(crate) async fn unplug(cluster: &Arc<Cluster>, node: &str, vmid: u32, key: &str, config: &VmConfig) -> Result<()> {
    query(cluster, node, vmid).await?;
    let machine = {
        let state = cluster.state();
        let vm = state.vm(node, vmid)?;
        if !vm.plugged.contains_key(key) {
            return Ok(());
        }
        vm.machine.clone()
    };
    if config.boot_order().iter().any(|device| device == key) {
        return Err(ApiError::die(format!("can't unplug bootdisk '{key}'")));
    }
    let suffix = cluster.version.busy_suffix();
    if meets(&mut cluster.state(), &Inner::DiskStays { vmid }) {
        cluster.clock.sleep(DISK_POLLS).await;
        return Err(ApiError::die(format!("error on hot-unplugging device '{key}'{suffix}")));
    }
    if let (Some(machine), Some(index)) = (machine, scsi_index(key)) {
        ask(move || machine.unplug(index)).await.map_err(|text| ApiError::die(lines(&text)))?;
    }
    cluster.clock.sleep(cluster.latency.unplug).await;
    let own_controller = config.get("scsihw") == Some("virtio-scsi-single") && key.starts_with("scsi");
    let stays = {
        let mut state = cluster.state();
        let paused = {
            let vm = state.vm_mut(node, vmid)?;
            vm.plugged.remove(key);
            vm.paused
        };
        meets(&mut state, &Inner::ControllerStays { vmid }) || (own_controller && paused)
    };
    if stays {
        cluster.clock.sleep(CONTROLLER_POLLS).await;
        let controller = key.replace("scsi", "virtioscsi");
        return Err(ApiError::die(format!("error on hot-unplugging device '{controller}'{suffix}")));
    }
    if own_controller {
        cluster.clock.sleep(cluster.latency.unplug).await;
    }
    Ok(())
}

/// Switches a VM on: every configured drive is plugged, or the start fails.
pub(crate) fn plug_all(cluster: &Cluster, node: &str, vmid: u32) -> Result<()> {
    let mut state = cluster.state();
    let drives: Vec<(String, Drive)> = state
        .vm(node, vmid)?
        .config
        .current
        .iter()
        .filter(|(key, _)| is_drive(key))
        .map(|(key, line)| (key.clone(), Drive::stored(line)))
        .filter(|(_, drive)| !drive.is_cdrom())
        .collect();
    let mut all = Vec::new();
    for (key, drive) in &drives {
        let (plugged, _) = drive_of(&state, node, key, drive, true)?;
        if state.is_held(node, plugged.inode, plugged.read_only) {
            return Err(ApiError::die(format!("start failed: QEMU exited with code 1: {WRITE_LOCK}")));
        }
        all.push((key.clone(), plugged));
    }
    let vm = state.vm_mut(node, vmid)?;
    vm.power_off();
    vm.running = true;
    vm.plugged.extend(all);
    Ok(())
}

/// All of an attachment in one moment.
pub(crate) fn plug_by_hand(cluster: &Cluster, node: &str, vmid: u32, key: &str, volid: &str) -> Result<()> {
    let mut state = cluster.state();
    let drive = Drive::stored(volid);
    let (plugged, _) = drive_of(&state, node, key, &drive, false)?;
    let held = state.is_held(node, plugged.inode, false);
    let vm = state.vm_mut(node, vmid)?;
    vm.check_lock()?;
    if held || !vm.running || vm.config.current.contains_key(key) || vm.plugged.contains_key(key) {
        return Err(ApiError::die(format!("VM {vmid} cannot take {volid} as {key} now")));
    }
    vm.config.current.insert(key.to_owned(), volid.to_owned());
    vm.plugged.insert(key.to_owned(), plugged);
    Ok(())
}

/// Tells QEMU of a disk's new size.
pub(crate) async fn announce_size(cluster: &Arc<Cluster>, node: &str, vmid: u32, key: &str, bytes: u64) -> Result<()> {
    let machine: Option<Arc<dyn Machine>> = {
        let mut state = cluster.state();
        let failure = |text: &str| Err(ApiError::die(format!("VM {vmid} qmp command 'block_resize' failed - {text}")));
        if meets(&mut state, &Inner::ResizeSecondHalf { vmid }) {
            return failure("got timeout");
        }
        let vm = state.vm_mut(node, vmid)?;
        match vm.plugged.get_mut(key) {
            Some(plugged) => plugged.size_bytes = bytes,
            None => return failure(&format!("Cannot find device='' nor node-name='drive-{key}'")),
        }
        vm.machine.clone()
    };
    let (Some(machine), Some(index)) = (machine, scsi_index(key)) else { return Ok(()) };
    let told = ask(move || machine.resize(index, bytes)).await;
    told.map_err(|text| ApiError::die(format!("VM {vmid} qmp command 'block_resize' failed - {}", lines(&text))))
}
