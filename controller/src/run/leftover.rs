//! Drives that VMs still have in their config while the volume lives elsewhere: their node was off when it was taken over, or a
//! write of a controller before us came late.
//!
//! A VM's config cannot be changed while its node is off. So the drive is noted when the volume is taken over, and removed
//! before the volume, or anything for that VM, is attached again. Without the note (after a restart) it is derived, and then
//! never from the only holder: another VM has the volume, configured and plugged, and either the operator still lists the old
//! one's node as fenced, or the drive is ours by its serial and Kubernetes has the volume attached to the other VM's node and
//! not to the old one's, so that no kubelet there has touched it.

use std::collections::BTreeSet;
use std::sync::Arc;

use proto::VolumeHandle;
use tokio::time::Instant;
use tonic::Code;

use super::evidence::{Depth, Reference};
use super::kubernetes::Word;
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

    /// Whether it was taken over from that VM.
    pub(super) fn is_noted(&self, handle: &VolumeHandle, vmid: u32) -> bool {
        locked(&self.leftovers).get(&handle.volid()).is_some_and(|(_, vmids)| vmids.contains(&vmid))
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
            // Our own is claimed by our caller. Another call may have brought another one back here, and said OK.
            let _claim = match if handle.volid() == volid { None } else { Some(self.claim(&handle).await) } {
                Some(Err(error)) if error.code == Code::Aborted => continue,
                claim => claim.transpose()?,
            };
            if !self.is_noted(&handle, vmid) {
                continue;
            }
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

    /// Whether config and QEMU of the VM both have the volume now, and whether the drive is ours by its serial.
    async fn has(&self, handle: &VolumeHandle, vm: &Vm) -> Result<(bool, bool), Error> {
        let (volid, serial) = (handle.volid(), handle.serial());
        let known = self.config(&vm.host, vm.vmid, Instant::now()).await?;
        let plugged = self.state_now(&vm.host, vm.vmid).await?.plugged.unwrap_or_default();
        let lines = known.config.naming(&volid).filter(|(key, _)| is_disk_slot(key));
        let drives: Vec<(&str, Drive)> = lines.filter_map(|(key, line)| Some((key, line.value.as_deref()?.parse().ok()?))).collect();
        let is_ours = |(_, drive): &(&str, Drive)| drive.option("serial") == Some(serial.as_str());
        Ok((drives.iter().any(|(key, _)| plugged.contains(*key)), !drives.is_empty() && drives.iter().all(is_ours)))
    }

    /// Whether what `old` has of the volume is a leftover, given that `holder` has it, too.
    async fn is_leftover(&self, handle: &VolumeHandle, old: &Vm, holder: &Vm) -> Result<bool, Error> {
        let of_old = self.word_of_kubernetes(handle, old.vmid).await?;
        // A kubelet there may use it: an entry that was left in fencedNodes says less.
        if of_old == Some(Word::Attached) {
            return Ok(false);
        }
        let fenced = self.rules().fenced;
        if fenced.contains(&old.host) && !fenced.contains(&holder.host) {
            return Ok(true);
        }
        if self.off(&old.host).await?.is_some() || self.off(&holder.host).await?.is_some() || !self.has(handle, old).await?.1 {
            return Ok(false);
        }
        let of_holder = self.word_of_kubernetes(handle, holder.vmid).await?;
        Ok(of_holder == Some(Word::Attached) && matches!(of_old, Some(Word::Nothing | Word::Wanted)))
    }

    /// Without a note: whether all those who hold the volume beside its VM have leftovers.
    ///
    /// # Errors
    /// Proxmox's or Kubernetes'.
    pub(super) async fn notice_leftovers_of(self: &Arc<Self>, handle: &VolumeHandle, vm: &Vm) -> Result<bool, Error> {
        if self.is_unexplainable() || !self.has(handle, vm).await?.0 {
            return Ok(false);
        }
        let references = self.references(handle, Instant::now(), Some(vm.vmid), Depth::Plugged).await?;
        let resources = self.resources(ago(EVIDENCE_AGE)).await?;
        let holders: Vec<_> = references.iter().filter(|one| one.counts()).collect();
        for holder in &holders {
            let Some(old) = resources.vms.get(&holder.vmid) else { return Ok(false) };
            if !self.is_leftover(handle, old, vm).await? {
                return Ok(false);
            }
        }
        holders.iter().for_each(|one| self.note_leftover(handle, one.vmid));
        Ok(!holders.is_empty())
    }

    /// Before the volume leaves its VM: afterwards a leftover elsewhere would look like its only holder. Asks nobody where no
    /// reading says that two VMs have it. A failure keeps nobody from detaching.
    pub(super) async fn remove_leftovers_beside(self: &Arc<Self>, handle: &VolumeHandle, vm: &Vm) {
        if self.is_unexplainable() || self.named_beside(vm.vmid, &BTreeSet::from([handle.volid()])).is_empty() {
            return;
        }
        let removed = match self.notice_leftovers_of(handle, vm).await {
            Ok(true) => self.remove_leftovers(handle, vm).await,
            Ok(false) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            proto::warn!("detach {handle}: whether another VM has a leftover of it cannot be told: {}", error.text);
        }
    }

    /// Neither the operator nor Kubernetes says anything.
    fn is_unexplainable(&self) -> bool {
        self.kube.is_none() && self.rules().fenced.is_empty()
    }

    /// The VM that holds the volume beside `old`, whose drive is a leftover then; nothing: there is none.
    async fn holder_beside(self: &Arc<Self>, handle: &VolumeHandle, old: &Vm) -> Result<Option<Reference>, Error> {
        if self.is_unexplainable() {
            return Ok(None);
        }
        let references = self.references_before_refusal(handle, Some(old.vmid), Depth::Plugged).await?;
        let resources = self.resources(ago(EVIDENCE_AGE)).await?;
        for reference in references.into_iter().filter(Reference::counts) {
            let Some(holder) = resources.vms.get(&reference.vmid) else { continue };
            if self.has(handle, holder).await?.0 && self.is_leftover(handle, old, holder).await? {
                return Ok(Some(reference));
            }
        }
        Ok(None)
    }

    /// Somebody else holds the volume: what this VM has of it beside, if that is a leftover, is removed.
    ///
    /// # Errors
    /// Proxmox's or Kubernetes'.
    pub(super) async fn remove_leftover_of(self: &Arc<Self>, handle: &VolumeHandle, vm: &Vm) -> Result<(), Error> {
        if self.off(&vm.host).await?.is_some() || !self.ever_naming(&handle.volid()).await.contains(&vm.vmid) {
            return Ok(());
        }
        let Some(holder) = self.holder_beside(handle, vm).await? else { return Ok(()) };
        let step = format!("{handle}: {holder}, and by Kubernetes it is that one's: the leftover in VM {} is removed", vm.vmid);
        proto::warn!("{step}");
        self.detach(handle, vm).await.map_err(|error| error.during(&step))
    }

    /// Without a note: removes drives of ours in a VM which another VM has by now. Asks nobody where no reading says that two
    /// VMs have one.
    ///
    /// # Errors
    /// Proxmox's or Kubernetes'.
    pub(super) async fn remove_leftovers_in(self: &Arc<Self>, except: &VolumeHandle, vm: &Vm) -> Result<(), Error> {
        if self.is_unexplainable() {
            return Ok(());
        }
        let is_fenced = self.rules().fenced.contains(&vm.host);
        let known = match self.last_known(vm.vmid).await {
            Some(known) if !is_fenced => known,
            // Of a node that was fenced all is looked at, also what no reading names.
            _ if is_fenced => self.config(&vm.host, vm.vmid, ago(STATE_AGE)).await?,
            _ => return Ok(()),
        };
        let resources = self.resources(ago(EVIDENCE_AGE)).await?;
        let slots = known.config.lines.iter().filter(|(key, _)| is_disk_slot(key));
        let drives = slots.filter_map(|(_, line)| line.value.as_deref()?.parse::<Drive>().ok());
        let ours = drives.filter(|drive| drive.option("serial").is_some_and(|serial| serial.starts_with("csi-")));
        let mut volids: BTreeSet<String> = ours.map(|drive| drive.volid).filter(|volid| *volid != except.volid()).collect();
        if !is_fenced {
            volids = self.named_beside(vm.vmid, &volids);
        }
        for volid in volids {
            let Some((storage, disk)) = volid.split_once(':') else { continue };
            if !resources.storages.iter().any(|one| one.storage == storage && one.shared) {
                continue;
            }
            let handle = VolumeHandle { region: self.name.clone(), zone: String::new(), storage: storage.into(), disk: disk.into() };
            // Another call works on it, and will see the same.
            let Ok(_claim) = self.claim(&handle).await else { continue };
            self.remove_leftover_of(&handle, vm).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ClusterConfig, Credentials, Trust};
    use crate::pve::Client;
    use crate::run::region::Rules;
    use crate::secret::Secret;

    /// No call can be made here: who tries fails.
    #[tokio::test]
    async fn another_volumes_leftover_is_left_alone_while_a_call_works_on_it() {
        let credentials = Credentials::Token { id: "csi@pve!csi".into(), secret: Secret::new("x".into()) };
        let urls = vec!["http://127.0.0.1:1/api2/json".into()];
        let cluster = ClusterConfig { region: "r".into(), urls, trust: Trust::System, credentials, fenced: BTreeSet::new() };
        let region = Arc::new(Region::new("r".into(), Client::new(&cluster, None), Rules::default(), None));
        let [own, other]: [VolumeHandle; 2] = ["r//san/vm-9999-a", "r//san/vm-9999-b"].map(|id| id.parse().unwrap());
        let vm = Vm { vmid: 101, host: "pve1".into(), name: None, template: false };
        region.note_leftover(&other, 101);
        let zoned: VolumeHandle = "r/pve1/san/vm-9999-b".parse().unwrap();
        // The storage is not listed: which volume is meant goes by the zone, and any is meant without one.
        region.put_resources(Instant::now(), crate::pve::api::Resources::default()).await;
        let claim = region.claim(&zoned).await.unwrap();
        assert_eq!(region.claim(&other).await.unwrap_err().code, Code::Aborted, "a handle without a zone");
        assert!(region.claim(&"r/pve2/san/vm-9999-b".parse().unwrap()).await.is_ok(), "its namesake on another node");
        region.remove_leftovers(&own, &vm).await.unwrap();
        assert!(region.is_noted(&other, 101));
        drop(claim);
        assert!(region.remove_leftovers(&own, &vm).await.is_err(), "now it is its turn");
    }
}
