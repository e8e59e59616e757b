//! ControllerExpandVolume: Proxmox grows attached disks only, the volume first and then the guest's view of it.

use std::sync::Arc;

use proto::VolumeHandle;
use tokio::time::Instant;

use super::Controller;
use super::batch::{LOCK_POLL, LOCK_WAIT, locked_words};
use super::evidence::{Depth, Reach, Reference, View};
use super::kubernetes::Word;
use super::region::{EVIDENCE_AGE, Known, Region, ago};
use crate::deadline;
use crate::error::Error;
use crate::placement::{Plugin, size};
use crate::pve::Meaning;
use crate::pve::api::{self, Vm};
use crate::pve::drive::{Drive, volume_of};
use crate::request::Expand;

/// Digest changes that one call puts up with.
const MAX_TURNS: usize = 5;

/// A volume that is large enough now.
#[derive(Debug)]
pub struct Expanded {
    /// Its size.
    pub capacity_bytes: u64,
}

impl Controller {
    /// Grows a volume that a VM holds.
    ///
    /// # Errors
    /// Nobody holds it, no size fits, or Proxmox's.
    pub async fn expand(&self, request: &Expand) -> Result<Expanded, Error> {
        let step = format!("expand {} to {} bytes", request.handle, request.required_bytes);
        let region = self.region(&request.handle.region).map_err(|error| Error::not_found(error.text))?;
        region.expand(request).await.map_err(|error| error.during(&step))
    }
}

impl Region {
    async fn expand(self: &Arc<Self>, request: &Expand) -> Result<Expanded, Error> {
        let handle = &request.handle;
        let volid = handle.volid();
        self.check_built(handle).await?;
        let host = self.host_of(handle).await?.ok_or_else(|| Error::not_found("no Proxmox node has its storage"))?;
        let mut actual = self.volume_size(&host, &handle.storage, &volid).await?;
        let plugin = self.plugintype(&handle.storage).await?.and_then(|name| Plugin::of(&name, &handle.disk)).unwrap_or(Plugin::Lvm);
        let wanted = size(plugin, request.required_bytes, request.limit_bytes).map_err(Error::out_of_range)?;
        if request.limit_bytes.is_some_and(|limit| actual > limit) {
            return Err(Error::out_of_range(format!("it has {actual} bytes already; a volume cannot be made smaller")));
        }
        let begun = Instant::now();
        let Some(vm) = self.expanding_vm(handle).await? else {
            // Nobody's QEMU has to be told: what is large enough is done.
            if actual >= request.required_bytes {
                return Ok(Expanded { capacity_bytes: actual });
            }
            return Err(Error::precondition("Proxmox grows attached disks only; it grows when a pod uses it"));
        };
        let _alone = self.change_alone(vm.vmid).await;
        let mut last = None;
        // What was read to find the VM counts once.
        let mut since = begun;
        for _ in 0..MAX_TURNS {
            let known = self.unlocked_config(&vm, since).await?;
            since = Instant::now();
            let slots = known.config.lines.iter().filter(|(key, _)| !key.starts_with("unused"));
            let Some((key, drive)) = slots
                .filter(|(_, line)| !line.delete)
                .find_map(|(key, line)| Some((key, line.value.as_deref().filter(|text| volume_of(text) == volid)?)))
            else {
                return Err(Error::unavailable(format!("VM {} does not have it configured (any more); repeated", vm.vmid)));
            };
            let shown = drive.parse::<Drive>().ok().and_then(|drive| drive.size_bytes());
            // The config's size is written last: with it, volume and QEMU have it too.
            if actual >= request.required_bytes && shown.is_none_or(|shown| shown >= request.required_bytes) {
                return Ok(Expanded { capacity_bytes: actual.max(request.required_bytes) });
            }
            let target = if actual < wanted {
                wanted
            } else {
                // The volume grew and QEMU was not told; an equal size would tell it nothing.
                actual.saturating_add(plugin.step_bytes())
            };
            if let Some(limit) = request.limit_bytes.filter(|limit| target > *limit) {
                return Err(Error::out_of_range(format!(
                    "the volume has {actual} bytes and QEMU was not told; telling it takes {target} bytes, above limit_bytes {limit}: restart \
                     VM {}",
                    vm.vmid
                )));
            }
            match self.resize(&vm.host, vm.vmid, key, target, &known.config.digest).await {
                Ok(()) => {
                    self.note_size(handle, target);
                    proto::info!("expand {handle}: {target} bytes as {key} of VM {}", vm.vmid);
                    return Ok(Expanded { capacity_bytes: target });
                }
                Err(error) if matches!(error.meaning(), Meaning::DigestChanged | Meaning::VmLocked) => last = Some(error),
                Err(error) if error.meaning() == Meaning::Shrinking => {
                    // Another call made it larger since it was looked at.
                    actual = self.volume_size(&host, &handle.storage, &volid).await?;
                    last = Some(error);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(last.map_or_else(|| Error::aborted("repeated"), Error::from))
    }

    /// The VM that has it. Those that are known to are asked first, so that a VM that cannot be read stops its own volumes only. What
    /// another node's storage has under that name, and what a VM lost and still names, is not it.
    ///
    /// # Errors
    /// Several have it and none of them is a leftover; or Proxmox's.
    pub(super) async fn expanding_vm(self: &Arc<Self>, handle: &VolumeHandle) -> Result<Option<Vm>, Error> {
        let volid = handle.volid();
        let resources = self.resources(ago(EVIDENCE_AGE)).await?;
        let is_local = self.reach(handle).await? == Reach::Local;
        let is_passed_over = |vmid: u32, host: &str| (is_local && host != handle.zone) || self.is_noted(handle, vmid);
        let mut known_to = Vec::new();
        for vmid in self.ever_naming(&volid).await {
            let Some(vm) = resources.vms.get(&vmid).filter(|vm| !is_passed_over(vmid, &vm.host)) else { continue };
            let known = self.config(&vm.host, vmid, Instant::now()).await;
            if known.is_ok_and(|known| known.config.naming(&volid).any(|(key, line)| !key.starts_with("unused") && line.value.is_some())) {
                known_to.push(vm.clone());
            }
        }
        if let [vm] = known_to.as_slice() {
            // The only one that this process has read may be the one that lost it.
            let word = self.word_of_kubernetes(handle, vm.vmid).await;
            if !matches!(word, Ok(Some(Word::Nothing | Word::Wanted))) {
                return Ok(Some(vm.clone()));
            }
        }
        let counts = |one: &Reference| one.counts() && !is_passed_over(one.vmid, &one.host);
        let (mut found, mut unread) = self.references_read(handle, ago(EVIDENCE_AGE), None, Depth::Plugged).await?;
        if !known_to.is_empty() || !found.iter().any(counts) {
            // It may have been attached since.
            (found, unread) = self.references_read(handle, Instant::now(), None, Depth::Plugged).await?;
        }
        found.retain(counts);
        if found.iter().any(|one| one.view == View::Configured) {
            found.retain(|one| one.view == View::Configured);
        }
        found.dedup_by_key(|one| one.vmid);
        let resources = self.resources(ago(EVIDENCE_AGE)).await?;
        match (found.as_slice(), unread) {
            ([], Some(unread)) => Err(unread),
            ([], None) => Ok(None),
            ([holder], _) => {
                let vm = resources.vms.get(&holder.vmid).cloned();
                vm.ok_or_else(|| Error::unavailable(format!("{holder}, and that VM is gone; repeated"))).map(Some)
            }
            (several, _) => {
                for vm in several.iter().filter_map(|one| resources.vms.get(&one.vmid)) {
                    if self.notice_leftovers_of(handle, vm).await? {
                        return Ok(Some(vm.clone()));
                    }
                }
                let all: Vec<String> = several.iter().map(ToString::to_string).collect();
                Err(Error::precondition(format!("more than one VM has it: {}; detach it from all but one", all.join("; "))))
            }
        }
    }

    /// A VM's config, once it carries no lock.
    pub(super) async fn unlocked_config(&self, vm: &Vm, since: Instant) -> Result<Known, Error> {
        let due = deadline::of_caller().unwrap_or_else(|| Instant::now() + LOCK_WAIT);
        let mut since = since;
        loop {
            let mut known = self.config(&vm.host, vm.vmid, since).await?;
            if known.config.digest.is_empty() {
                // A change of ours came after that reading: without a digest Proxmox would write onto whatever is there.
                known = self.config(&vm.host, vm.vmid, Instant::now()).await?;
            }
            let lock = known.config.configured("lock");
            let seen = self.note_lock(vm.vmid, lock);
            match lock {
                None => return Ok(known),
                Some(lock) if Instant::now() >= due => return Err(locked_words(vm.vmid, lock, seen)),
                Some(_) => tokio::time::sleep_until(due.min(Instant::now() + LOCK_POLL)).await,
            }
            since = Instant::now();
        }
    }

    async fn resize(&self, host: &str, vmid: u32, key: &str, bytes: u64, digest: &str) -> Result<(), crate::pve::Error> {
        let answer = self.client().call(api::resize(host, vmid, key, bytes, digest)).await?;
        match api::read_upid(&answer) {
            Some(upid) => self.client().wait(&upid, Instant::now()).await,
            None => Ok(()),
        }
    }
}
