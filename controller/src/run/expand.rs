//! ControllerExpandVolume: Proxmox grows attached disks only, the volume first and then the guest's view of it.

use std::sync::Arc;

use tokio::time::Instant;

use super::Controller;
use super::evidence::{Depth, Reference, View};
use super::region::{EVIDENCE_AGE, Region, ago};
use crate::error::Error;
use crate::placement::{Plugin, size};
use crate::pve::drive::{Drive, volume_of};
use crate::pve::{Meaning, api};
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
        let host = self.host_of(handle).await?.ok_or_else(|| Error::not_found("no Proxmox node has its storage"))?;
        let actual = self.volume_size(&host, &handle.storage, &volid).await?;
        let plugin = self.plugintype(&handle.storage).await?.and_then(|name| Plugin::named(&name)).unwrap_or(Plugin::Lvm);
        let wanted = size(plugin, request.required_bytes, request.limit_bytes).map_err(Error::out_of_range)?;
        if request.limit_bytes.is_some_and(|limit| actual > limit) {
            return Err(Error::out_of_range(format!("it has {actual} bytes already; a volume cannot be made smaller")));
        }
        let mut references = self.references(handle, ago(EVIDENCE_AGE), None, Depth::Plugged).await?;
        if !references.iter().any(Reference::holds) {
            // It may have been attached since.
            references = self.references(handle, Instant::now(), None, Depth::Plugged).await?;
        }
        let configured = references.iter().find(|one| one.view == View::Configured);
        let Some(holder) = configured.or_else(|| references.iter().find(|one| one.holds())) else {
            // Nobody's QEMU has to be told: what is large enough is done.
            if actual >= request.required_bytes {
                return Ok(Expanded { capacity_bytes: actual });
            }
            return Err(Error::precondition("Proxmox grows attached disks only; it grows when a pod uses it"));
        };
        let resources = self.resources(ago(EVIDENCE_AGE)).await?;
        let vm = resources.vms.get(&holder.vmid).cloned().ok_or_else(|| Error::unavailable("the VM that holds it is gone; repeated"))?;
        let _alone = self.change_alone(vm.vmid).await;
        let mut last = None;
        for _ in 0..MAX_TURNS {
            let known = self.config(&vm.host, vm.vmid, Instant::now()).await?;
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
                    self.note_size(&volid, target);
                    proto::info!("expand {handle}: {target} bytes as {key} of VM {}", vm.vmid);
                    return Ok(Expanded { capacity_bytes: target });
                }
                Err(error) if error.meaning() == Meaning::DigestChanged => last = Some(error),
                Err(error) => return Err(error.into()),
            }
        }
        Err(last.map_or_else(|| Error::aborted("repeated"), Error::from))
    }

    async fn resize(&self, host: &str, vmid: u32, key: &str, bytes: u64, digest: &str) -> Result<(), crate::pve::Error> {
        let answer = self.client().call(api::resize(host, vmid, key, bytes, digest)).await?;
        match api::read_upid(&answer) {
            Some(upid) => self.client().wait(&upid).await,
            None => Ok(()),
        }
    }
}
