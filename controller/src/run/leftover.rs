//! Drives that VMs on a fenced node still have in their config when the node is back: the volume lives elsewhere by then.
//!
//! A VM's config cannot be changed while its node is off. So the drive is noted when the volume is taken over, and removed
//! before the volume, or anything for that VM, is attached again. Without the note (after a restart) a drive is a leftover
//! only if the operator still lists its node as fenced and another VM has the volume.

use std::sync::Arc;

use proto::VolumeHandle;
use tokio::time::Instant;

use super::evidence::Depth;
use super::region::{EVIDENCE_AGE, Region, STATE_AGE, ago, locked};
use crate::error::Error;
use crate::pve::api::Vm;
use crate::pve::drive::{Drive, is_disk_slot};

impl Region {
    /// The volume was taken over from that VM, or let go by the operator's word.
    pub(super) fn note_leftover(&self, handle: &VolumeHandle, vmid: u32) {
        let mut leftovers = locked(&self.leftovers);
        leftovers.entry(handle.volid()).or_insert_with(|| (handle.clone(), Default::default())).1.insert(vmid);
    }

    /// Removes the volume's leftovers from VMs that are back, and all leftovers from the VM that it goes to.
    ///
    /// # Errors
    /// One cannot be removed.
    pub(super) async fn remove_leftovers(self: &Arc<Self>, handle: &VolumeHandle, vm: &Vm) -> Result<(), Error> {
        let volid = handle.volid();
        let noted: Vec<(VolumeHandle, u32)> = {
            let mut leftovers = locked(&self.leftovers);
            // It comes back to where it was: no leftover any more.
            if let Some((_, vmids)) = leftovers.get_mut(&volid) {
                vmids.remove(&vm.vmid);
            }
            leftovers.retain(|_, (_, vmids)| !vmids.is_empty());
            let all = leftovers.values().flat_map(|(handle, vmids)| vmids.iter().map(|vmid| (handle.clone(), *vmid)));
            all.filter(|(handle, vmid)| handle.volid() == volid || *vmid == vm.vmid).collect()
        };
        for (handle, vmid) in noted {
            let Some(back) = self.resources(Instant::now()).await?.vms.get(&vmid).cloned() else { continue };
            if self.off(&back.host).await?.is_some() {
                continue;
            }
            let step = format!("{handle} was taken over while {} was off, and its leftover in VM {vmid} is removed first", back.host);
            proto::warn!("{step}");
            self.detach(&handle, &back).await.map_err(|error| error.during(&step))?;
            if let Some((_, vmids)) = locked(&self.leftovers).get_mut(&handle.volid()) {
                vmids.remove(&vmid);
            }
        }
        Ok(())
    }

    /// Without a note: whether those who hold the volume beside its VM are on nodes that were fenced and are back.
    ///
    /// # Errors
    /// Proxmox's.
    pub(super) async fn notice_leftovers_of(self: &Arc<Self>, handle: &VolumeHandle, vm: &Vm) -> Result<bool, Error> {
        let (fenced, volid) = (self.rules().fenced, handle.volid());
        if fenced.is_empty() || fenced.contains(&vm.host) {
            return Ok(false);
        }
        let known = self.config(&vm.host, vm.vmid, Instant::now()).await?;
        let state = self.states(&vm.host, ago(STATE_AGE)).await?.remove(&vm.vmid).unwrap_or_default();
        let plugged = state.plugged.unwrap_or_default();
        if !known.config.naming(&volid).any(|(key, line)| line.value.is_some() && plugged.contains(key)) {
            return Ok(false);
        }
        let references = self.references(handle, ago(EVIDENCE_AGE), Some(vm.vmid), Depth::Plugged).await?;
        let holders: Vec<_> = references.iter().filter(|one| one.counts()).collect();
        if !holders.iter().all(|one| fenced.contains(&one.host)) {
            return Ok(false);
        }
        holders.iter().for_each(|one| self.note_leftover(handle, one.vmid));
        Ok(!holders.is_empty())
    }

    /// Without a note: drives of ours in a VM whose node was fenced and is back, which another VM has by now.
    ///
    /// # Errors
    /// Proxmox's.
    pub(super) async fn notice_leftovers_in(self: &Arc<Self>, vm: &Vm) -> Result<(), Error> {
        let fenced = self.rules().fenced;
        if !fenced.contains(&vm.host) {
            return Ok(());
        }
        let resources = self.resources(ago(EVIDENCE_AGE)).await?;
        let known = self.config(&vm.host, vm.vmid, ago(STATE_AGE)).await?;
        let slots = known.config.lines.iter().filter(|(key, _)| is_disk_slot(key));
        let drives = slots.filter_map(|(_, line)| line.value.as_deref()?.parse::<Drive>().ok());
        for drive in drives.filter(|drive| drive.option("serial").is_some_and(|serial| serial.starts_with("csi-"))) {
            let Some((storage, disk)) = drive.volid.split_once(':') else { continue };
            if !resources.storages.iter().any(|one| one.storage == storage && one.shared) {
                continue;
            }
            let handle = VolumeHandle { region: self.name.clone(), zone: String::new(), storage: storage.into(), disk: disk.into() };
            let references = self.references(&handle, ago(EVIDENCE_AGE), Some(vm.vmid), Depth::Plugged).await?;
            if references.iter().any(|one| one.counts() && !fenced.contains(&one.host)) {
                self.note_leftover(&handle, vm.vmid);
            }
        }
        Ok(())
    }
}
