//! ControllerPublishVolume: nobody else holds it, a free slot, plug, see that QEMU has it, look again that nobody else came.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use proto::{VolumeHandle, publish_context};
use tokio::time::Instant;

use super::Controller;
use super::evidence::{Depth, Reference};
use super::region::{Known, Region, STATE_AGE, ago};
use super::unpublish::words;
use crate::attach::{AttachStep, Seen, lun_of, next_attach, slot};
use crate::error::Error;
use crate::placement::is_zeroed;
use crate::pve::api::{Change, Vm, VmState};
use crate::pve::drive::Drive;
use crate::pve::{self, Meaning};
use crate::request::Publish;

/// Looks and steps of one attach: an old plan reverted, a leaked slot or three, a changed digest here and there.
const MAX_TURNS: usize = 12;
/// A removed phantom costs its slot until the VM restarts: tried in one more slot, then said.
const MAX_PHANTOMS: usize = 2;
/// With so many leaked slots, more tries would take the VM's last ones.
const MAX_LEAKED: usize = 6;
/// A removal, its repeat for a busy guest, and a changed digest.
const MAX_UNDO_TRIES: usize = 3;
/// How long the lower of two claims waits for the higher one to go: an attach is undone in some 3 s.
const RIVAL_WAIT: Duration = Duration::from_secs(12);
/// Between two looks at a rival.
const RIVAL_POLL: Duration = Duration::from_millis(500);

/// An attached volume.
#[derive(Debug)]
pub struct Published {
    /// What the node gets to know.
    pub publish_context: HashMap<String, String>,
}

/// One attach, from slot to slot.
struct Attempt {
    avoid: BTreeSet<u8>,
    phantoms: usize,
    last: Option<Error>,
}

impl Controller {
    /// Attaches the volume to the VM of a node.
    ///
    /// # Errors
    /// Another VM holds it, the VM cannot take it, or Proxmox's.
    pub async fn publish(&self, request: &Publish) -> Result<Published, Error> {
        let region = self.region(&request.handle.region).map_err(|error| Error::not_found(error.text))?;
        let Some(vm) = region.find_vm(&request.node).await? else {
            region.check_absence_counts().await?;
            return Err(Error::not_found(format!("node {}: no such VM in region {}", request.node, region.name)));
        };
        let step = format!("attach {} to VM {} on {}", request.handle, vm.vmid, vm.host);
        region.publish(request, vm).await.map_err(|error| error.during(&step))
    }
}

impl Region {
    async fn publish(self: &Arc<Self>, request: &Publish, vm: Vm) -> Result<Published, Error> {
        let _alone = self.change_alone(vm.vmid).await;
        let mut vm = vm;
        let mut attempt = Attempt { avoid: BTreeSet::new(), phantoms: 0, last: None };
        for _ in 0..MAX_TURNS {
            self.check_reach(&request.handle, &mut vm).await?;
            self.check_nobody_else(&request.handle, vm.vmid).await?;
            let Some((known, state)) = self.look(&request.handle, &vm).await? else {
                // It moved since the cluster was last read, or is gone.
                let resources = self.resources(Instant::now()).await?;
                let gone = || Error::not_found(format!("VM {} is gone", vm.vmid));
                vm = resources.vms.get(&vm.vmid).cloned().ok_or_else(gone)?;
                attempt.last = Some(Error::unavailable("the VM is moving; repeated"));
                continue;
            };
            let seen = Seen { config: &known.config, running: state.running, plugged: state.plugged.as_ref() };
            let refused = |refusal: crate::attach::Refusal| match attempt.last.clone() {
                Some(last) if refusal == crate::attach::Refusal::Full => last,
                _ => words(&refusal, vm.vmid),
            };
            attempt.avoid.extend(self.leaked(vm.vmid, state.pid));
            let next = next_attach(&request.handle.volid(), request.readonly, seen, &attempt.avoid).map_err(refused)?;
            let digest = &known.config.digest;
            match next {
                AttachStep::Attached(lun, drive) => {
                    // Ours, and never looked after: its answer was lost, or that look failed.
                    if self.doubted_vm(&request.handle.volid()) == Some(vm.vmid) {
                        self.settle_rivals(&request.handle, &vm).await?;
                    }
                    return self.published(request, lun, &drive).await;
                }
                AttachStep::Revert(key) => self.undo(&vm, Change::Revert(key), Some(digest)).await?,
                AttachStep::Detach(key) => {
                    self.undo(&vm, Change::Delete(key.clone()), Some(digest)).await?;
                    // A drive that QEMU never took leaves its block node behind.
                    if let Some(lun) = lun_of(&key).filter(|_| seen.plugged.is_some_and(|plugged| !plugged.contains(&key))) {
                        attempt.avoid.insert(lun);
                    }
                }
                AttachStep::AttachAt(lun) => {
                    let drive = request.parameters.drive(&request.handle, lun, request.readonly);
                    if self.plug(request, &vm, lun, &drive, digest, &mut attempt).await? {
                        self.settle_rivals(&request.handle, &vm).await?;
                        return self.published(request, lun, &drive).await;
                    }
                }
            }
        }
        Err(attempt.last.unwrap_or_else(|| Error::aborted("the VM's config changes all the time; repeated")))
    }

    /// A local storage's volume can only be had on its own Proxmox node.
    async fn check_reach(&self, handle: &VolumeHandle, vm: &mut Vm) -> Result<(), Error> {
        if self.is_shared(handle).await? || handle.zone == vm.host {
            return Ok(());
        }
        // It may have moved there since the cluster was last read.
        if let Some(now) = self.resources(ago(STATE_AGE)).await?.vms.get(&vm.vmid) {
            vm.clone_from(now);
        }
        if handle.zone == vm.host {
            return Ok(());
        }
        Err(Error::precondition(format!(
            "the volume is on Proxmox node {}, the VM is on {}, and storage {:?} is local to each; move the VM, or the pod",
            handle.zone, vm.host, handle.storage
        )))
    }

    async fn check_nobody_else(self: &Arc<Self>, handle: &VolumeHandle, vmid: u32) -> Result<(), Error> {
        let references = self.references_before_refusal(handle, Some(vmid), Depth::Plugged).await?;
        if let Some(holder) = references.iter().find(|one| one.holds()) {
            return Err(held_elsewhere(holder));
        }
        for leftover in &references {
            proto::warn!("attach {handle}: {leftover}");
        }
        if references.is_empty() { self.check_no_doubt_elsewhere(handle, vmid).await } else { Ok(()) }
    }

    async fn check_no_doubt_elsewhere(&self, handle: &VolumeHandle, vmid: u32) -> Result<(), Error> {
        if self.doubted_vm(&handle.volid()).is_some_and(|doubted| doubted != vmid) {
            return self.check_no_doubt(&handle.volid()).await;
        }
        Ok(())
    }

    /// Config now, state some seconds old at most; nothing where the VM is not on that node.
    async fn look(&self, handle: &VolumeHandle, vm: &Vm) -> Result<Option<(Known, VmState)>, Error> {
        let Some(mut state) = self.states(&vm.host, ago(STATE_AGE)).await?.remove(&vm.vmid) else { return Ok(None) };
        if !state.running || state.plugged.is_none() {
            // Started since, or the list does not say what is plugged: ask the VM itself before it is refused.
            state = match self.state_now(&vm.host, vm.vmid).await {
                Err(error) if error.meaning() == Meaning::NoSuchVm => return Ok(None),
                state => state?,
            };
        }
        match self.config(&vm.host, vm.vmid, Instant::now()).await {
            Err(error) if error.meaning() == Meaning::NoSuchVm => Ok(None),
            known => {
                let mut known = known?;
                let volid = handle.volid();
                let is_new =
                    |(key, _): (&str, _)| !key.starts_with("unused") && state.plugged.as_ref().is_some_and(|all| !all.contains(key));
                if state.running && known.config.naming(&volid).any(is_new) {
                    // Attached since by another controller, perhaps: a live disk is not pulled because a list is old.
                    state = self.state_now(&vm.host, vm.vmid).await?;
                }
                self.remember(vm.vmid, &mut known, &state).await;
                Ok(Some((known, state)))
            }
        }
    }

    /// Plugs; `true` when QEMU has it. `false`: another look, and perhaps another slot.
    async fn plug(
        self: &Arc<Self>,
        request: &Publish,
        vm: &Vm,
        lun: u8,
        drive: &Drive,
        digest: &str,
        attempt: &mut Attempt,
    ) -> Result<bool, Error> {
        let key = slot(lun);
        if attempt.avoid.len() >= MAX_LEAKED {
            return Err(Error::precondition(format!(
                "VM {} has {MAX_LEAKED} slots in which QEMU keeps leftovers of drives it did not take; restart the VM",
                vm.vmid
            )));
        }
        // Until it is verified, whatever way this call ends.
        self.doubt(&drive.volid, vm.vmid, digest);
        if let Err(error) = self.change(&vm.host, vm.vmid, &Change::Set(key.clone(), drive.to_string()), digest).await {
            return self.failed_plug(request, vm, lun, error, attempt).await.map(|()| false);
        }
        let state = self.state_now(&vm.host, vm.vmid).await?;
        match &state.plugged {
            Some(plugged) if plugged.contains(&key) => {
                proto::info!("attach {} to VM {}: {key}", request.handle, vm.vmid);
                self.note_held(vm.vmid, &key, &drive.volid).await;
                return Ok(true);
            }
            None => return Err(words(&crate::attach::Refusal::QemuSilent, vm.vmid)),
            Some(_) => (),
        }
        // Written into the config only: QEMU refused it without Proxmox's saying so, or there is no QEMU.
        self.undo(vm, Change::Delete(key.clone()), None).await?;
        if !state.running {
            return Err(words(&crate::attach::Refusal::NotRunning, vm.vmid));
        }
        self.leak(vm.vmid, lun);
        attempt.avoid.insert(lun);
        attempt.phantoms += 1;
        let refused = Error::internal(format!(
            "Proxmox said OK, but QEMU has no {key}: it refused the drive (another QEMU may have the image open; see the log of QEMU)"
        ));
        if attempt.phantoms >= MAX_PHANTOMS {
            return Err(refused);
        }
        attempt.last = Some(refused);
        Ok(false)
    }

    /// After a plug that failed: what it left is undone by the next look's step. `Ok`: look again.
    async fn failed_plug(
        self: &Arc<Self>,
        request: &Publish,
        vm: &Vm,
        lun: u8,
        error: pve::Error,
        attempt: &mut Attempt,
    ) -> Result<(), Error> {
        let (meaning, key, volid) = (error.meaning(), slot(lun), request.handle.volid());
        let is_lost = matches!(meaning, Meaning::OutcomeUnknown | Meaning::TaskKilled);
        if !is_lost {
            // What it left, if anything, is in the config already.
            self.settle(&volid);
        }
        match meaning {
            Meaning::DigestChanged | Meaning::NoSuchVm => {
                attempt.last = Some(error.into());
                return Ok(());
            }
            Meaning::LeakedSlot => {
                self.leak(vm.vmid, lun);
                attempt.avoid.insert(lun);
                attempt.last = Some(error.into());
                return Ok(());
            }
            _ => (),
        }
        // What is left: nothing, a plan, or the drive itself.
        let known = self.config(&vm.host, vm.vmid, Instant::now()).await?;
        let Some(line) = known.config.lines.get(&key).filter(|_| known.config.naming(&volid).any(|(named, _)| named == key)) else {
            return match meaning {
                Meaning::NoSuchVolume => Err(self.missing(&request.handle, error).await),
                _ => Err(error.into()),
            };
        };
        if is_lost && line.value.is_some() {
            // It was carried out: the next look says whether QEMU has it, and whether a rival has it, too.
            self.state_now(&vm.host, vm.vmid).await?;
            return Ok(());
        }
        let change = if line.value.is_some() { Change::Delete(key) } else { Change::Revert(key) };
        let undone = self.undo(vm, change, Some(&known.config.digest)).await;
        let error = Error::from(error);
        Err(match undone {
            Ok(()) => error,
            Err(why) => Error { code: error.code, text: format!("{}; and undoing it failed: {}", error.text, why.text) },
        })
    }

    /// Whether a volume that Proxmox could not find is really missing (zfs says so of slow device links, too).
    async fn missing(&self, handle: &VolumeHandle, error: pve::Error) -> Error {
        let host = if handle.zone.is_empty() { None } else { Some(handle.zone.as_str()) };
        match host {
            Some(host) => match self.volume_size(host, &handle.storage, &handle.volid()).await {
                Ok(_) => Error::unavailable(format!("{error}, but the volume is there; repeated")),
                Err(_) => error.into(),
            },
            None => error.into(),
        }
    }

    /// Takes back what a failed attach left, or finishes a removal. Without a digest the config is read first.
    async fn undo(&self, vm: &Vm, change: Change, digest: Option<&str>) -> Result<(), Error> {
        proto::warn!("VM {} on {}: {change:?}, to undo a failed attach or to finish a removal", vm.vmid, vm.host);
        let mut digest = digest.map(String::from);
        for _ in 0..MAX_UNDO_TRIES {
            let of = match digest.take() {
                Some(digest) => digest,
                None => self.config(&vm.host, vm.vmid, Instant::now()).await?.config.digest,
            };
            match self.change(&vm.host, vm.vmid, &change, &of).await {
                // The disk is gone from QEMU by then, and the repeat is quick; or the config changed in between.
                Err(error) if matches!(error.meaning(), Meaning::StillBusyInGuest | Meaning::DigestChanged) => (),
                changed => return changed.map_err(Error::from),
            }
        }
        // The next look sees what is left.
        Ok(())
    }

    /// Our claim is in the config. Another controller may have written its own at the same moment: of two, the higher VMID
    /// takes its own out again, and the lower waits for that, and yields too if the other stays.
    async fn settle_rivals(self: &Arc<Self>, handle: &VolumeHandle, vm: &Vm) -> Result<(), Error> {
        let begun = Instant::now();
        loop {
            let references = self.references(handle, Instant::now(), Some(vm.vmid), Depth::Config).await;
            let rival = match references {
                Ok(references) => references.into_iter().find(Reference::holds),
                Err(error) => {
                    // Who cannot look again must not stay.
                    self.detach_alone(handle, vm.clone()).await?;
                    return Err(error);
                }
            };
            let Some(rival) = rival else { return Ok(()) };
            if vm.vmid < rival.vmid && begun.elapsed() < RIVAL_WAIT {
                tokio::time::sleep(RIVAL_POLL).await;
                continue;
            }
            proto::warn!("attach {handle}: {rival}: our own attachment to VM {} is taken back", vm.vmid);
            self.detach_alone(handle, vm.clone()).await?;
            return Err(held_elsewhere(&rival));
        }
    }

    /// The publish context, from the drive as it is.
    async fn published(&self, request: &Publish, lun: u8, drive: &Drive) -> Result<Published, Error> {
        let device_path = match drive.option("wwn") {
            Some(wwn) => format!("/dev/disk/by-id/wwn-{}", wwn.to_ascii_lowercase()),
            // A drive of other hands without a WWN: udev's name for VPD 0x83.
            None => format!("/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_drive-scsi{lun}"),
        };
        let mut context =
            HashMap::from([(publish_context::DEVICE_PATH.to_string(), device_path), (publish_context::LUN.into(), lun.to_string())]);
        context.extend(drive.option("serial").map(|serial| (publish_context::SERIAL.to_string(), serial.to_string())));
        let plugintype = self.plugintype(&request.handle.storage).await?.unwrap_or_default();
        let zeroed = is_zeroed(&plugintype, &request.handle.disk);
        context.extend(zeroed.map(|zeroed| (publish_context::ZEROED.to_string(), String::from(if zeroed { "1" } else { "0" }))));
        context.extend(drive.size_bytes().map(|bytes| (publish_context::SIZE_BYTES.to_string(), bytes.to_string())));
        if request.resize_required {
            context.insert(publish_context::RESIZE_REQUIRED.into(), "true".into());
        }
        self.settle(&request.handle.volid());
        Ok(Published { publish_context: context })
    }
}

fn held_elsewhere(holder: &Reference) -> Error {
    Error::precondition(format!("refused, it would have two writers: {holder}; detach it there first"))
}
