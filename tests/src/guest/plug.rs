//! Hot-plug as Proxmox does it: the commands, their order and their limits are qemu-server 9's (QemuServer.pm, Blockdev.pm),
//! devices through the human monitor, block nodes and throttle groups through QMP.
//!
//! Nothing is cleaned up that Proxmox would leave: after a refused `device_add`, block node and throttle group stay.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

use super::qmp::Qmp;
use super::{Architecture, ScsiHardware, wait};
use crate::machine::{Machine, PluggedDrive};

/// Proxmox looks 6 times, once a second, for a device to come or a disk to go.
const DEVICE_LIMIT: Duration = Duration::from_secs(6);
/// And 16 times for a disk's controller to go, which needs the guest's word.
const CONTROLLER_LIMIT: Duration = Duration::from_secs(16);

/// A guest's QEMU as the simulator sees it.
#[derive(Debug)]
pub(super) struct Qemu {
    qmp: Mutex<Qmp>,
    scsi_hardware: ScsiHardware,
    architecture: Architecture,
}

impl Qemu {
    pub(super) fn connect(socket: &Path, scsi_hardware: ScsiHardware, architecture: Architecture) -> Result<Self, String> {
        Ok(Self { qmp: Mutex::new(Qmp::connect(socket)?), scsi_hardware, architecture })
    }

    pub(super) fn monitor(&self) -> MutexGuard<'_, Qmp> {
        self.qmp.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The controller's bus for drive `index`; virtio-scsi-single has one controller per drive.
    fn add_controller(&self, qmp: &mut Qmp, index: u8, iothread: bool) -> Result<String, String> {
        if self.scsi_hardware == ScsiHardware::VirtioScsiPci {
            return Ok("scsihw0.0".into());
        }
        let id = format!("virtioscsi{index}");
        // A controller that an unfinished unplug left behind is used again.
        if !has_pci_device(qmp, &id)? {
            let thread = if iothread {
                qmp.execute("object-add", json!({ "qom-type": "iothread", "id": format!("iothread-{id}") }))?;
                format!(",iothread=iothread-{id}")
            } else {
                String::new()
            };
            let place = match self.architecture {
                Architecture::X86_64 => format!("bus=pci.3,addr={:#x}", u16::from(index) + 1),
                Architecture::Aarch64 => format!("bus=port{index}"),
            };
            qmp.human(&format!("device_add driver=virtio-scsi-pci,id={id},{place}{thread}"))?;
            let seen = wait::until(DEVICE_LIMIT, || has_pci_device(qmp, &id).map(|there| there.then_some(())))?;
            seen.ok_or_else(|| format!("error on hotplug device '{id}'"))?;
        }
        Ok(format!("{id}.0"))
    }
}

/// What a faulty disk fails at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultyIo {
    Read,
    Write,
    Flush,
}

/// A fault of a disk, for ever, by QEMU's `blkdebug` below the format: serial, WWN and LUN stay right.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    pub io: FaultyIo,
    /// Any request that touches this sector of 512 bytes; `None`: every request.
    pub sector: Option<u64>,
    /// Linux's number.
    pub errno: u32,
}

impl Qemu {
    pub(super) fn plug_faulty(&self, drive: &PluggedDrive, faults: &[Fault]) -> Result<(), String> {
        let qmp = &mut *self.monitor();
        let index = drive.index;
        let bus = self.add_controller(qmp, index, drive.iothread)?;
        let group = format!("throttle-drive-scsi{index}");
        // Fails where nothing is left of an earlier drive, which is the rule.
        let _ = qmp.execute("object-del", json!({ "id": group }));
        qmp.execute("object-add", json!({ "qom-type": "throttle-group", "id": group, "limits": {} }))?;
        qmp.execute("blockdev-add", block_node(drive, faults))?;
        let mut device = format!(
            "device_add driver=scsi-hd,bus={bus},channel=0,scsi-id=0,lun={index},drive=drive-scsi{index},id=scsi{index},device_id=drive-scsi{index}"
        );
        if drive.ssd {
            device += ",rotation_rate=1";
        }
        for (key, value) in [("wwn", &drive.wwn), ("serial", &drive.serial)] {
            if let Some(value) = value {
                device += &format!(",{key}={value}");
            }
        }
        qmp.human(&(device + ",write-cache=on")).map(drop)
    }
}

impl Machine for Qemu {
    fn plug(&self, drive: &PluggedDrive) -> Result<(), String> {
        self.plug_faulty(drive, &[])
    }

    fn unplug(&self, index: u8) -> Result<(), String> {
        let qmp = &mut *self.monitor();
        let (device, node) = (format!("scsi{index}"), format!("drive-scsi{index}"));
        if has_block_device(qmp, &device)? {
            qmp.human(&format!("device_del {device}"))?;
            let gone = wait::until(DEVICE_LIMIT, || has_block_device(qmp, &device).map(|there| (!there).then_some(())))?;
            gone.ok_or_else(|| format!("error on hot-unplugging device '{device}'"))?;
            qmp.execute("blockdev-del", json!({ "node-name": node }))?;
            qmp.execute("object-del", json!({ "id": format!("throttle-{node}") }))?;
        }
        let controller = format!("virtioscsi{index}");
        if self.scsi_hardware == ScsiHardware::VirtioScsiSingle && has_pci_device(qmp, &controller)? {
            qmp.human(&format!("device_del {controller}"))?;
            let gone = wait::until(CONTROLLER_LIMIT, || has_pci_device(qmp, &controller).map(|there| (!there).then_some(())))?;
            gone.ok_or_else(|| format!("error on hot-unplugging device '{controller}' - still busy in guest?"))?;
            // There is one only where the drive asked for it.
            let _ = qmp.execute("object-del", json!({ "id": format!("iothread-{controller}") }));
        }
        Ok(())
    }

    fn resize(&self, index: u8, size_bytes: u64) -> Result<(), String> {
        let size = size_bytes.next_multiple_of(1024);
        self.monitor().execute("block_resize", json!({ "node-name": format!("drive-scsi{index}"), "size": size })).map(drop)
    }
}

fn block_node(drive: &PluggedDrive, faults: &[Fault]) -> Value {
    let (discard, zeroes) = if drive.discard { ("unmap", "unmap") } else { ("ignore", "on") };
    let is_device = std::fs::metadata(&drive.file).is_ok_and(|data| std::os::unix::fs::FileTypeExt::is_block_device(&data.file_type()));
    // The host's page cache outlives QEMU: only the guest and QEMU die in our tests, so the host's fsync would prove nothing.
    let mut file = json!({
        "driver": if is_device { "host_device" } else { "file" }, "filename": drive.file, "aio": "threads", "read-only": drive.read_only,
        "discard": discard, "cache": { "direct": false, "no-flush": true },
    });
    if !faults.is_empty() {
        let rules: Vec<Value> = faults.iter().map(Fault::rule).collect();
        file = json!({ "driver": "blkdebug", "image": file, "inject-error": rules, "discard": discard, "read-only": drive.read_only });
    }
    json!({
        "driver": "throttle", "node-name": format!("drive-scsi{}", drive.index), "throttle-group": format!("throttle-drive-scsi{}", drive.index),
        "discard": discard, "detect-zeroes": zeroes, "read-only": drive.read_only,
        "file": {
            "driver": drive.format, "read-only": drive.read_only, "discard": discard, "file": file,
        },
    })
}

impl Fault {
    fn rule(&self) -> Value {
        let io = match self.io {
            FaultyIo::Read => "read",
            FaultyIo::Write => "write",
            FaultyIo::Flush => "flush",
        };
        let mut rule = json!({ "event": "none", "iotype": io, "errno": self.errno, "once": false, "immediately": false });
        if let (Some(sector), Some(rule)) = (self.sector, rule.as_object_mut()) {
            rule.insert("sector".into(), json!(sector));
        }
        rule
    }
}

/// `query-block` names a drive's device by its QOM path's last word.
fn has_block_device(qmp: &mut Qmp, id: &str) -> Result<bool, String> {
    let answer = qmp.execute("query-block", Value::Null)?;
    let devices = answer.as_array().into_iter().flatten().filter_map(|entry| entry.get("qdev")?.as_str());
    Ok(devices.into_iter().any(|qdev| qdev.rsplit('/').next() == Some(id) || qdev.split('/').any(|part| part == id)))
}

/// `query-pci`, bridges and what is behind them.
fn has_pci_device(qmp: &mut Qmp, id: &str) -> Result<bool, String> {
    fn holds(devices: Option<&Value>, id: &str) -> bool {
        devices.and_then(Value::as_array).into_iter().flatten().any(|device| {
            device.get("qdev_id").and_then(Value::as_str) == Some(id)
                || holds(device.get("pci_bridge").and_then(|bridge| bridge.get("devices")), id)
        })
    }
    let answer = qmp.execute("query-pci", Value::Null)?;
    Ok(answer.as_array().into_iter().flatten().any(|bus| holds(bus.get("devices"), id)))
}
