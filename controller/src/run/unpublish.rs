//! ControllerUnpublishVolume: OK only when no view of the VM holds the volume any more.

use std::sync::Arc;

use proto::VolumeHandle;
use tokio::time::Instant;

use super::Controller;
use super::evidence::Depth;
use super::region::{EVIDENCE_AGE, Known, Region, STATE_AGE, ago};
use crate::attach::{DetachStep, Refusal, Seen, can_hotplug, next_detach, unexplained};
use crate::error::Error;
use crate::pve::Meaning;
use crate::pve::api::{Change, Vm, VmState};
use crate::pve::drive::volume_of;
use crate::request::Unpublish;
/// Looks and steps of one detach: a removal, its repeat for a guest that was busy, a changed digest here and there.
const MAX_TURNS: usize = 8;

impl Controller {
    /// Takes the volume out of one VM, or out of every one.
    ///
    /// # Errors
    /// It is still in a view, or that cannot be told; or Proxmox's.
    pub async fn unpublish(&self, request: &Unpublish) -> Result<(), Error> {
        let region = self.region(&request.handle.region)?;
        let vms = match &request.node {
            Some(node) => match region.find_vm(node).await? {
                Some(vm) => vec![vm],
                None => {
                    region.check_absence_counts().await.map_err(|error| error.during(&format!("detach {} from {node}", request.handle)))?;
                    proto::info!("detach {}: VM of node {node} is gone", request.handle);
                    Vec::new()
                }
            },
            None => region.holders(&request.handle).await?,
        };
        // A doubt about another VM than the one asked for is that one's matter.
        let doubted = region.doubted_vm(&request.handle.volid());
        let is_elsewhere = request.node.is_some() && !vms.is_empty() && !vms.iter().any(|vm| Some(vm.vmid) == doubted);
        for vm in vms {
            let step = format!("detach {} from VM {} on {}", request.handle, vm.vmid, vm.host);
            region.detach(&request.handle, vm).await.map_err(|error| error.during(&step))?;
        }
        if is_elsewhere { Ok(()) } else { region.check_no_doubt(&request.handle.volid()).await }
    }
}

impl Region {
    async fn holders(self: &Arc<Self>, handle: &VolumeHandle) -> Result<Vec<Vm>, Error> {
        let references = self.references(handle, ago(EVIDENCE_AGE), None, Depth::Plugged).await?;
        let resources = self.resources(ago(EVIDENCE_AGE)).await?;
        let mut vmids: Vec<u32> = references.iter().filter(|one| one.holds()).map(|one| one.vmid).collect();
        vmids.dedup();
        Ok(vmids.iter().filter_map(|vmid| resources.vms.get(vmid).cloned()).collect())
    }

    /// Detaches, whatever the state is; done when neither config nor plan nor QEMU has it.
    pub(super) async fn detach(self: &Arc<Self>, handle: &VolumeHandle, vm: Vm) -> Result<(), Error> {
        let _alone = self.change_alone(vm.vmid).await;
        self.detach_alone(handle, vm).await
    }

    /// [`Region::detach`] for one who already changes this VM alone.
    pub(super) async fn detach_alone(self: &Arc<Self>, handle: &VolumeHandle, vm: Vm) -> Result<(), Error> {
        let (volid, mut vm) = (handle.volid(), vm);
        let mut last: Option<Error> = None;
        for _ in 0..MAX_TURNS {
            let mut known = match self.config(&vm.host, vm.vmid, Instant::now()).await {
                Err(error) if error.meaning() == Meaning::NoSuchVm => match self.resources(Instant::now()).await?.vms.get(&vm.vmid) {
                    Some(moved) if moved.host != vm.host => {
                        vm = moved.clone();
                        continue;
                    }
                    Some(_) => return Err(error.into()),
                    None => return self.check_absence_counts().await,
                },
                read => read?,
            };
            let state =
                self.states(&vm.host, ago(STATE_AGE)).await.ok().and_then(|states| states.get(&vm.vmid).cloned()).unwrap_or_default();
            self.remember(vm.vmid, &mut known, &state).await;
            let seen = Seen { config: &known.config, running: state.running, plugged: state.plugged.as_ref() };
            let change = match next_detach(&volid, seen).map_err(|refusal| words(&refusal, vm.vmid))? {
                DetachStep::Gone => return self.check_not_left_in_qemu(&volid, &vm, &known, &state).await,
                DetachStep::Detach(key) => Change::Delete(key),
                DetachStep::Revert(key) => Change::Revert(key),
            };
            match self.change(&vm.host, vm.vmid, &change, &known.config.digest).await {
                Ok(()) => {
                    let Change::Delete(key) = &change else { continue };
                    let state = self.state_now(&vm.host, vm.vmid).await?;
                    if state.running {
                        // Without hot-plug Proxmox says OK and only plans the removal.
                        can_hotplug(&known.config).map_err(|refusal| words(&refusal, vm.vmid))?;
                    }
                    if !state.plugged.as_ref().is_none_or(|plugged| plugged.contains(key)) {
                        proto::info!("detach {volid} from VM {}: {key} is free", vm.vmid);
                        // Another line of the same VM may name it, too; the last reading knows.
                        if known.config.naming(&volid).filter(|(key, _)| !key.starts_with("unused")).count() == 1 {
                            return Ok(());
                        }
                        continue;
                    }
                    last = Some(Error::unavailable(format!("Proxmox said OK, but QEMU still has {key}; the removal is repeated")));
                }
                Err(error) => match error.meaning() {
                    Meaning::DigestChanged | Meaning::StillBusyInGuest => last = Some(error.into()),
                    // Looked at again: the removal was done, is planned, or is to be repeated. The digest keeps it from
                    // landing after a later change.
                    Meaning::OutcomeUnknown if last.is_none() => last = Some(error.into()),
                    _ => return Err(error.into()),
                },
            }
        }
        Err(last.unwrap_or_else(|| Error::aborted("the VM's config changes all the time; repeated")))
    }

    /// A drive that QEMU has and the config forgot: nothing in the API removes it.
    async fn check_not_left_in_qemu(&self, volid: &str, vm: &Vm, known: &Known, state: &VmState) -> Result<(), Error> {
        let slot_in =
            |state: &VmState| state.plugged.iter().flatten().find(|key| known.held.get(*key).is_some_and(|held| held == volid)).cloned();
        let unknown_in = |state: &VmState| {
            let seen = Seen { config: &known.config, running: state.running, plugged: state.plugged.as_ref() };
            unexplained(seen).find(|key| !known.held.contains_key(*key)).map(String::from)
        };
        if state.plugged.is_some() && slot_in(state).is_none() && unknown_in(state).is_none() {
            return Ok(());
        }
        // Asked of the VM itself: the list may be some seconds old.
        let now = self.state_now(&vm.host, vm.vmid).await?;
        if now.plugged.is_none() {
            return Err(words(&Refusal::QemuSilent, vm.vmid));
        }
        let Some(key) = slot_in(&now) else {
            let Some(key) = unknown_in(&now) else { return Ok(()) };
            return Err(Error::unavailable(format!(
                "QEMU has a drive as {key} of which the config says nothing, so it could be this one; restart VM {} to let go of it",
                vm.vmid
            )));
        };
        if known.config.configured(&key).is_some_and(|line| volume_of(line) != volid) {
            return Ok(());
        }
        Err(Error::unavailable(format!(
            "QEMU still has it as {key}, though the config does not name it; restart VM {} to let go of it",
            vm.vmid
        )))
    }
}

/// Why a VM cannot take or give a disk, and the line that makes it able.
pub(super) fn words(refusal: &Refusal, vmid: u32) -> Error {
    match refusal {
        Refusal::Template => Error::precondition(format!("VM {vmid} is a template, which never runs")),
        Refusal::NotRunning => Error::unavailable(format!("VM {vmid} is not running; it gets its disk when it runs")),
        Refusal::QemuSilent => Error::unavailable(format!("QEMU of VM {vmid} does not answer, so that what is plugged is not known")),
        Refusal::NoHotplug(value) => {
            Error::precondition(format!("VM {vmid} has hotplug: {value}, without disk; run: qm set {vmid} --hotplug disk,network,usb"))
        }
        Refusal::ScsiHw(value) => Error::precondition(format!(
            "VM {vmid} has scsihw: {value}, which gives disks no usable LUN; run: qm set {vmid} --scsihw virtio-scsi-single, and restart it"
        )),
        Refusal::ReadonlyDiffers(key) => {
            Error::already_exists(format!("VM {vmid} has the volume as {key} with another readonly; detach it first"))
        }
        Refusal::OtherPlan(key) => {
            Error::precondition(format!("VM {vmid} has another change of {key} planned; run: qm set {vmid} --revert {key}"))
        }
        Refusal::OtherBus(key) => {
            Error::precondition(format!("VM {vmid} has the volume as {key}, which is no slot of ours (scsi0 to scsi30); detach it first"))
        }
        Refusal::Full => Error::exhausted(format!("VM {vmid} has no free slot from scsi1 to scsi29")),
    }
}
