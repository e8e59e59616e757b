//! ControllerModifyVolume: what a VolumeAttributesClass says is written into the drive, and read back. A volume that no VM has gets it
//! when it is attached: from its PV's class, or from what was said here last, until the PV says it too.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use proto::VolumeHandle;
use tokio::time::Instant;
use tonic::Code;

use super::Controller;
use super::region::{Region, locked};
use super::unpublish::words;
use crate::attach::Refusal;
use crate::error::Error;
use crate::mutable::{self, Mutable};
use crate::pve::Meaning;
use crate::pve::api::{Change, Vm};
use crate::pve::drive::{Drive, volume_of};
use crate::request::Modify;

/// Digest changes and locks that one call puts up with.
const MAX_TURNS: usize = 5;
/// external-resizer writes the PV's class right after our answer, and again for minutes where the API server is slow.
const MODIFIED_AGE: Duration = Duration::from_secs(600);
/// Between two looks at a change that Proxmox has planned and not carried out: that takes a tenth of a second.
const PLAN_POLL: Duration = Duration::from_millis(400);
/// Volumes whose change is remembered; beyond it all are forgotten.
const MAX_MODIFIED: usize = 1024;

/// Zone and volid → what the volume was last changed to.
pub(super) type Modified = HashMap<(String, String), (Mutable, Instant)>;

fn key_of(handle: &VolumeHandle) -> (String, String) {
    (handle.zone.clone(), handle.volid())
}

impl Controller {
    /// Changes a volume's limits, and the like.
    ///
    /// # Errors
    /// NOT_FOUND; a change that cannot be made; or Proxmox's.
    pub async fn modify(&self, request: &Modify) -> Result<(), Error> {
        let step = format!("modify {}", request.handle);
        let region = self.region(&request.handle.region).map_err(|error| Error::not_found(error.text))?;
        region.modify(request).await.map_err(|error| error.during(&step))
    }
}

impl Region {
    async fn modify(self: &Arc<Self>, request: &Modify) -> Result<(), Error> {
        let handle = &request.handle;
        self.check_built(handle).await?;
        let host = self.host_of(handle).await?.ok_or_else(|| Error::not_found("no Proxmox node has its storage"))?;
        self.volume_size(&host, &handle.storage, &handle.volid()).await?;
        match self.expanding_vm(handle).await? {
            Some(vm) => self.modify_drive(handle, &vm, &request.wanted).await?,
            None => proto::info!("modify {handle}: no VM has it; it gets its new options when it is attached"),
        }
        self.note_modified(handle, &request.wanted);
        Ok(())
    }

    fn note_modified(&self, handle: &VolumeHandle, wanted: &Mutable) {
        let mut modified = locked(&self.modified);
        if modified.len() >= MAX_MODIFIED {
            modified.clear();
        }
        modified.insert(key_of(handle), (wanted.clone(), Instant::now()));
    }

    /// The volume is gone; another may get its name.
    pub(super) fn forget_modified(&self, gone: &VolumeHandle) {
        locked(&self.modified).remove(&key_of(gone));
    }

    async fn modify_drive(self: &Arc<Self>, handle: &VolumeHandle, vm: &Vm, wanted: &Mutable) -> Result<(), Error> {
        let volid = handle.volid();
        let _alone = self.change_alone(vm.vmid).await;
        let (mut last, mut is_planned) = (None, false);
        for _ in 0..MAX_TURNS {
            let known = self.unlocked_config(vm, Instant::now()).await?;
            let mut slots = known.config.naming(&volid).filter(|(key, _)| !key.starts_with("unused"));
            let there = slots.find_map(|(key, line)| Some((key, line, line.value.as_deref().filter(|text| volume_of(text) == volid)?)));
            let Some((key, line, text)) = there.filter(|(_, line, _)| !line.delete) else {
                return Err(Error::unavailable(format!("VM {} does not have it configured (any more); repeated", vm.vmid)));
            };
            let now: Drive = text.parse().map_err(|_| Error::precondition(format!("its drive {key} of VM {} cannot be read", vm.vmid)))?;
            let mut then = now.clone();
            wanted.apply(&mut then.options);
            mutable::check(&then.options).map_err(Error::invalid)?;
            if let Some(plan) = line.pending.as_deref() {
                if !is_same(plan, &then) {
                    return Err(words(&Refusal::OtherPlan(key.into()), vm.vmid));
                }
                // Our own, whose answer was lost: Proxmox is at it, or its worker died.
                is_planned = true;
                tokio::time::sleep(PLAN_POLL).await;
                continue;
            }
            if then == now {
                return Ok(());
            }
            if let Err(error) = self.check_changeable(vm, &now, &then).await {
                if error.code == Code::FailedPrecondition {
                    // The next attachment takes it over, and the repeat of this call finds it done.
                    self.note_modified(handle, wanted);
                }
                return Err(error);
            }
            match self.change(&vm.host, vm.vmid, &Change::plug(key, &then.to_string()), &known.config.digest).await {
                Ok(()) => {
                    self.check_changed(vm, key, &then).await?;
                    proto::info!("modify {handle}: {key} of VM {} is {then}", vm.vmid);
                    return Ok(());
                }
                // Looked at again: done, or not.
                Err(error) if matches!(error.meaning(), Meaning::DigestChanged | Meaning::VmLocked) => last = Some(error),
                Err(error) if error.meaning().is_outcome_unknown() => last = Some(error),
                Err(error) => {
                    self.take_back(vm, key).await?;
                    return Err(error.into());
                }
            }
        }
        if is_planned {
            self.take_back_of(vm, &volid).await?;
        }
        Err(last.map_or_else(|| Error::unavailable("Proxmox has it planned and does not carry it out; repeated"), Error::from))
    }

    /// A plan of ours for that volume that stayed one.
    async fn take_back_of(&self, vm: &Vm, volid: &str) -> Result<(), Error> {
        let known = self.config(&vm.host, vm.vmid, Instant::now()).await?;
        let planned = known.config.naming(volid).find(|(_, line)| line.value.is_some() && line.pending.is_some());
        match planned {
            Some((key, _)) => self.take_back(vm, key).await,
            None => Ok(()),
        }
    }

    /// `cache` of a plugged drive would only be planned, and the whole line with it.
    async fn check_changeable(&self, vm: &Vm, now: &Drive, then: &Drive) -> Result<(), Error> {
        let cache = |drive: &Drive| drive.option("cache").unwrap_or("none").to_owned();
        let (is, wanted) = (cache(now), cache(then));
        if is == wanted || !self.state_now(&vm.host, vm.vmid).await?.running {
            return Ok(());
        }
        Err(Error::precondition(format!(
            "it is attached to VM {} with cache={is}, and Proxmox changes that only when a volume is attached anew: stop its pod, and \
             cache={wanted} is taken over",
            vm.vmid
        )))
    }

    /// Reads back: configured as written, and nothing planned.
    async fn check_changed(&self, vm: &Vm, key: &str, then: &Drive) -> Result<(), Error> {
        let known = self.config(&vm.host, vm.vmid, Instant::now()).await?;
        let Some(line) = known.config.lines.get(key) else {
            return Err(Error::unavailable(format!("VM {} has no {key} any more; repeated", vm.vmid)));
        };
        if line.pending.is_some() {
            self.take_back(vm, key).await?;
            return Err(Error::precondition(format!(
                "Proxmox only planned the change of {key} of VM {}, and it is taken back; stop the pod that uses the volume",
                vm.vmid
            )));
        }
        if line.value.as_deref().is_some_and(|text| is_same(text, then)) {
            return Ok(());
        }
        let written = line.value.clone().unwrap_or_default();
        Err(Error::unavailable(format!("{key} of VM {} is {written}, {then} was written; repeated", vm.vmid)))
    }

    /// A plan of ours must not wait for the VM's next start.
    async fn take_back(&self, vm: &Vm, key: &str) -> Result<(), Error> {
        let known = self.config(&vm.host, vm.vmid, Instant::now()).await?;
        if known.config.lines.get(key).is_none_or(|line| line.pending.is_none()) {
            return Ok(());
        }
        proto::warn!("VM {} on {}: what is planned of {key} is taken back", vm.vmid, vm.host);
        self.change(&vm.host, vm.vmid, &Change::forget(key), &known.config.digest).await.map_err(Error::from)
    }

    /// What a volume's class says now, in the order in which it is applied: what its PV names, and what was said last.
    ///
    /// # Errors
    /// Kubernetes does not say.
    pub(super) async fn class_of(&self, handle: &VolumeHandle) -> Result<Vec<Mutable>, Error> {
        let Some(kube) = &self.kube else { return Ok(Vec::new()) };
        let mut all = Vec::new();
        let pvs = kube.pvs_of(handle).await.map_err(Error::unavailable)?;
        if let Some(class) = pvs.iter().find_map(|pv| pv.class.clone()) {
            match kube.class(&class).await.map_err(Error::unavailable)? {
                Some(given) => {
                    let (mutable, warnings) = Mutable::of_existing_class(&given);
                    for warning in warnings {
                        proto::warn!("attach {handle}: VolumeAttributesClass {class}: {warning}");
                    }
                    all.push(mutable);
                }
                None => proto::warn!("attach {handle}: VolumeAttributesClass {class} is not there; its options are left out"),
            }
        }
        let modified = locked(&self.modified).get(&key_of(handle)).filter(|(_, at)| at.elapsed() < MODIFIED_AGE).cloned();
        all.extend(modified.map(|(mutable, _)| mutable));
        Ok(all)
    }
}

/// Whether a line says what was meant; the size is Proxmox's own.
fn is_same(line: &str, meant: &Drive) -> bool {
    let Ok(mut drive) = line.parse::<Drive>() else { return false };
    let mut meant = meant.clone();
    for one in [&mut drive, &mut meant] {
        one.options.remove("size");
    }
    drive == meant
}
