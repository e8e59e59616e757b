//! Who holds which of our volumes, read now: the index as a person asks for it. Reads only.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proto::VolumeHandle;
use proto::log::carried;
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Controller;
use super::evidence::Depth;
use super::region::{Known, Region};
use super::seen::is_of;
use crate::attach::{Seen, unexplained};
use crate::error::Error;
use crate::pve::api::{Resources, Vm, VmState};
use crate::pve::drive::{is_drive_key, volume_of};

/// One VM, read just now.
#[derive(Debug)]
pub(crate) struct Look {
    pub(crate) vm: Vm,
    pub(crate) known: Known,
    pub(crate) state: VmState,
}

/// One drive of a VM that names a volume of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The Proxmox cluster.
    pub region: String,
    /// As a PV names it; without a zone where the storage is shared.
    pub volume: String,
    /// The VM.
    pub vmid: u32,
    /// Its name, where it is shown.
    pub name: String,
    /// Its Proxmox node.
    pub host: String,
    /// The slot.
    pub key: String,
    /// `attached`, `configured`, `planned`, `leaving` or `set aside`: by its config, its plans and QEMU.
    pub view: &'static str,
    /// How old the reading is.
    pub age: Duration,
}

/// What was found, and what could not be read.
#[derive(Debug, Default)]
pub struct Holders {
    /// In the order of region, volume and VM.
    pub all: Vec<Holder>,
    /// Who else refers to the one volume that was asked for, by the views that keep nobody from attaching it, a sentence each.
    pub more: Vec<String>,
    /// Each a sentence: then more may hold it than is listed.
    pub unread: Vec<String>,
    /// VMs that were read.
    pub vms: usize,
}

impl Controller {
    /// Who holds a volume, or all of ours.
    ///
    /// # Errors
    /// No config; or the region is not in it.
    pub async fn holders(&self, volume: Option<&VolumeHandle>) -> Result<Holders, Error> {
        let clusters = self.clusters()?;
        if let Some(volume) = volume {
            self.region(&volume.region)?;
        }
        let owner = format!("vm-{}-", clusters.features.controller_vmid);
        let mut found = Holders::default();
        for region in clusters.regions.values().filter(|region| volume.is_none_or(|volume| volume.region == region.name)) {
            let resources = match region.resources(Instant::now()).await {
                Ok(resources) => resources,
                Err(error) => {
                    found.unread.push(format!("region {}: {}", region.name, Error::from(error).text));
                    continue;
                }
            };
            let (looks, unread) = region.look_at_all(&resources).await;
            found.vms += looks.len();
            found.unread.extend(unread);
            for look in looks.values() {
                let is_meant = |volid: &str| volume.map_or_else(|| is_of(volid, &owner), |volume| volume.volid() == volid);
                found.all.extend(
                    holders_in(&region.name, look, &resources).into_iter().filter(|(volid, _)| is_meant(volid)).map(|(_, one)| one),
                );
            }
            if let Some(volume) = volume {
                let (references, unread) = region.references_read(volume, Instant::now(), None, Depth::Snapshots).await?;
                found.more.extend(references.iter().filter(|one| !one.holds()).map(ToString::to_string));
                found.unread.extend(unread.map(|error| error.text));
            }
        }
        found.all.sort_by(|a, b| (&a.region, &a.volume, a.vmid, &a.key).cmp(&(&b.region, &b.volume, b.vmid, &b.key)));
        found.unread.dedup();
        Ok(found)
    }
}

impl Region {
    /// Every VM but templates, read now; and why others could not be.
    pub(crate) async fn look_at_all(self: &Arc<Self>, resources: &Resources) -> (BTreeMap<u32, Look>, Vec<String>) {
        let (begun, mut reading) = (Instant::now(), JoinSet::new());
        for vm in resources.vms.values().filter(|vm| !vm.template).cloned() {
            let region = Arc::clone(self);
            reading.spawn(carried(async move {
                let _turn = region.readers.acquire().await;
                let read = region.look_at(&vm, begun).await;
                (vm, read)
            }));
        }
        let (mut looks, mut unread) = (BTreeMap::new(), Vec::new());
        while let Some(read) = reading.join_next().await {
            match read {
                Ok((vm, Ok((known, state)))) => drop(looks.insert(vm.vmid, Look { vm, known, state })),
                Ok((vm, Err(error))) => {
                    let step = format!("region {}: VM {} on {} was not read", self.name, vm.vmid, vm.host);
                    unread.push(Error::from(error).during(&step).text);
                }
                Err(cause) => unread.push(format!("a reading broke off: {cause}")),
            }
        }
        (looks, unread)
    }

    async fn look_at(&self, vm: &Vm, since: Instant) -> Result<(Known, VmState), crate::pve::Error> {
        let known = self.config(&vm.host, vm.vmid, since).await?;
        let mut states = self.states(&vm.host, since).await?;
        let state = match states.remove(&vm.vmid) {
            Some(state) if state.plugged.is_some() => state,
            _ => self.state_now(&vm.host, vm.vmid).await?,
        };
        Ok((known, state))
    }
}

/// What a VM has of volumes, each with its id on Proxmox.
fn holders_in(region: &str, look: &Look, resources: &Resources) -> Vec<(String, Holder)> {
    let Look { vm, known, state } = look;
    let plugged = |key: &str| state.plugged.as_ref().is_some_and(|plugged| plugged.contains(key));
    let row = |key: &str, volid: &str, view| {
        let (storage, disk) = volid.split_once(':').unwrap_or((volid, ""));
        let is_shared = resources.storages.iter().any(|one| one.storage == storage && one.shared);
        let zone = if is_shared { "" } else { vm.host.as_str() };
        let holder = Holder {
            region: region.into(),
            volume: format!("{region}/{zone}/{storage}/{disk}"),
            vmid: vm.vmid,
            name: vm.name.clone().unwrap_or_default(),
            host: vm.host.clone(),
            key: key.into(),
            view,
            age: known.read_at.elapsed(),
        };
        (volid.to_owned(), holder)
    };
    let mut rows = Vec::new();
    for (key, line) in known.config.lines.iter().filter(|(key, _)| is_drive_key(key)) {
        if let Some(text) = &line.value {
            let view = match (key.starts_with("unused"), line.delete, plugged(key)) {
                (true, ..) => "set aside",
                (false, true, _) => "leaving",
                (false, false, true) => "attached",
                (false, false, false) => "configured",
            };
            rows.push(row(key, volume_of(text), view));
        }
        if let Some(text) = &line.pending {
            rows.push(row(key, volume_of(text), "planned"));
        }
    }
    let seen = Seen { config: &known.config, running: state.running, plugged: state.plugged.as_ref() };
    let held = unexplained(seen).filter_map(|key| Some(row(key, known.held.get(key)?, "leaving")));
    rows.extend(held);
    rows
}

impl Holders {
    /// For a person: a line each, in columns.
    #[must_use]
    pub fn text(&self) -> String {
        let mut rows = vec![["VOLUME".to_owned(), "VM".into(), "NODE".into(), "SLOT".into(), "STATE".into(), "AGE".into()]];
        for one in &self.all {
            let vm = if one.name.is_empty() { one.vmid.to_string() } else { format!("{} {}", one.vmid, one.name) };
            let age = format!("{} s", one.age.as_secs());
            rows.push([one.volume.clone(), vm, one.host.clone(), one.key.clone(), one.view.into(), age]);
        }
        let mut widths = [0; 6];
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = cell.chars().count().max(*width);
            }
        }
        let mut text = String::new();
        for row in &rows {
            let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
            text.push_str(cells.join("  ").trim_end());
            text.push('\n');
        }
        text.push_str(&format!("{} drives in {} VMs that were read\n", self.all.len(), self.vms));
        for line in &self.more {
            text.push_str(&format!("also: {line}\n"));
        }
        for line in &self.unread {
            text.push_str(&format!("NOT READ: {line}\n"));
        }
        text
    }

    /// The same as one JSON object.
    #[must_use]
    pub fn json(&self) -> String {
        let row = |one: &Holder| {
            json!({"region": one.region, "volume": one.volume, "vmid": one.vmid, "name": one.name, "node": one.host, "slot": one.key,
                   "state": one.view, "ageSeconds": one.age.as_secs()})
        };
        let all: Vec<_> = self.all.iter().map(row).collect();
        json!({"holders": all, "also": self.more, "vms": self.vms, "notRead": self.unread}).to_string()
    }
}
