//! ControllerPublishVolume: nobody else holds it, a free slot, plug, see that QEMU has it, look again that nobody else came.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use proto::{VolumeHandle, publish_context};
use tokio::time::Instant;
use tonic::Code;

use super::Controller;
use super::evidence::{Depth, Reach, Reference};
use super::queue::{Done, Wish};
use super::region::{EVIDENCE_AGE, Region, STATE_AGE, ago};
use crate::attach;
use crate::error::Error;
use crate::placement::is_zeroed;
use crate::pve;
use crate::pve::api::Vm;
use crate::pve::drive::{Drive, owner_of, volume_of};
use crate::request::{NodeId, Publish};

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

impl Controller {
    /// Attaches the volume to the VM of a node.
    ///
    /// # Errors
    /// Another VM holds it, the VM cannot take it, or Proxmox's.
    pub async fn publish(&self, request: Arc<Publish>) -> Result<Published, Error> {
        let region = self.region(&request.handle.region).map_err(|error| Error::not_found(error.text))?;
        let meant = region.vm_meant(&request.node).await?.map_err(|other| region.is_elsewhere(&request.node, &other))?;
        let is_by_bare_number = meant.is_by_bare_number;
        let Some(vm) = meant.vm else {
            self.check_not_elsewhere(&region, &request.node).await?;
            match &request.node {
                NodeId::Vmid(_, vmid) => region.check_vm_gone(*vmid).await?,
                NodeId::Name(_) => region.check_absence_counts().await?,
            }
            return Err(Error::not_found(format!("node {}: no such VM in region {}", request.node, region.name)));
        };
        let step = format!("attach {} to VM {} on {}", request.handle, vm.vmid, vm.host);
        let is_node = self.check_is_node(&region, &request.node, &vm, is_by_bare_number).await;
        is_node.map_err(|error| error.during(&step))?;
        region.publish(request, vm).await.map_err(|error| error.during(&step))
    }
}

impl Region {
    async fn publish(self: &Arc<Self>, mut request: Arc<Publish>, mut vm: Vm) -> Result<Published, Error> {
        self.check_built(&request.handle).await?;
        if request.parameters.is_replicated() {
            return Err(Error::precondition(
                "it is a replicated volume (replicate: 1), and replication is not built yet; nothing was touched, the reference driver attaches it",
            ));
        }
        if self.rules().attach_only_owned {
            self.check_may_attach(&request.handle)?;
        }
        let _claim = self.claim(&request.handle).await?;
        self.check_no_lost_deletion(&request.handle)?;
        self.check_reach(&request.handle, &mut vm).await?;
        // What reads as zeros where nothing was written takes no room there either.
        let plugintype = self.plugintype(&request.handle.storage).await?.unwrap_or_default();
        if is_zeroed(&plugintype, &request.handle.disk) == Some(true) {
            Arc::make_mut(&mut request).parameters.give_back_by_default();
        }
        let handle = &request.handle;
        self.warn_of_owner(handle).await?;
        self.remove_leftovers_in(handle, &vm).await?;
        self.remove_leftovers(handle, &vm).await?;
        if let Err(error) = self.check_nobody_else(handle, vm.vmid).await {
            if !self.notice_leftovers_of(handle, &vm).await? {
                self.remove_leftover_of(handle, &vm).await?;
                return Err(self.refused(handle, &vm, error).await);
            }
            self.remove_leftovers(handle, &vm).await?;
            self.check_nobody_else(handle, vm.vmid).await?;
        }
        match self.class_of(handle).await {
            Ok(class) if class.is_empty() => (),
            Ok(class) => Arc::make_mut(&mut request).parameters.mutable.extend(class),
            // What is attached stays as it is.
            Err(_) if self.ever_naming(&handle.volid()).await.contains(&vm.vmid) => (),
            Err(error) => return Err(error),
        }
        let handle = &request.handle;
        match self.submit(&vm, Wish::Attach(Arc::clone(&request))).await? {
            Done::Attached { lun, drive, vm, written } => {
                let since = written.unwrap_or_else(Instant::now);
                // New, or ours and never looked after: its answer was lost, or that look failed.
                if written.is_some() || self.is_unlooked(handle, vm.vmid) {
                    self.settle_rivals(handle, &vm, since).await?;
                } else if !self.was_found_alone(handle, vm.vmid) {
                    // Another controller's, one before us perhaps: whether that one looked nobody knows, nor whether it said OK.
                    if let Some(rival) = self.rival(handle, &vm, since, true).await? {
                        return Err(held_elsewhere(&rival));
                    }
                }
                self.published(&request, &vm, lun, &drive).await
            }
            Done::Detached => Err(Error::internal("an attach was answered as a detach")),
        }
    }

    /// `attachOnlyOwned`: by its name it is one of ours.
    fn check_may_attach(&self, handle: &VolumeHandle) -> Result<(), Error> {
        let owners = self.rules().owners;
        match owner_of(&handle.disk) {
            Some(owner) if owners.contains(&owner) => Ok(()),
            Some(owner) => Err(Error::precondition(format!(
                "attachOnlyOwned: true is in the config file, and by its name it is VM {owner}'s; set attachOnlyOwned: false, or add {owner} to \
                 deleteAlsoOwnedBy (then DeleteVolume deletes them, too)"
            ))),
            None => Err(Error::precondition(
                "attachOnlyOwned: true is in the config file, and its name carries no owner; set attachOnlyOwned: false",
            )),
        }
    }

    /// An owner that is a VM may take the disk with it, whichever VM it is attached to.
    async fn warn_of_owner(&self, handle: &VolumeHandle) -> Result<(), Error> {
        let Some(owner) = owner_of(&handle.disk) else { return Ok(()) };
        let resources = self.resources(ago(EVIDENCE_AGE)).await?;
        if resources.vms.contains_key(&owner) || resources.containers.contains_key(&owner) {
            proto::warn!(
                "attach {handle}: by its name it is VM {owner}'s own disk: a detach from that VM sets it aside there as unused, and destroying \
                 the VM destroys it"
            );
        }
        Ok(())
    }

    /// Held elsewhere: what an earlier try of ours wrote into this VM and never looked after must not stay beside it.
    async fn refused(self: &Arc<Self>, handle: &VolumeHandle, vm: &Vm, error: Error) -> Error {
        if error.code != Code::FailedPrecondition || !self.is_unlooked(handle, vm.vmid) {
            return error;
        }
        proto::warn!("attach {handle}: {}: what an earlier try wrote into VM {} is taken back", error.text, vm.vmid);
        let taken = match self.detach(handle, vm).await {
            // Settled only if it cannot come any more.
            Ok(()) => self.check_no_doubt(handle, None).await,
            failed => failed,
        };
        match taken {
            Ok(()) => error,
            Err(why) => {
                Error { code: error.code, text: format!("{}; and taking back what an earlier try wrote: {}", error.text, why.text) }
            }
        }
    }

    /// A local storage's volume can only be had on its own Proxmox node.
    pub(super) async fn check_reach(&self, handle: &VolumeHandle, vm: &mut Vm) -> Result<(), Error> {
        if self.reach(handle).await? == Reach::Shared || handle.zone == vm.host {
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
            "VM {} runs on {}, the volume lives on {}/{}, and that storage is local to each node; run: qm migrate {} {} --online, or let the \
             pod run on a node of {}",
            vm.vmid, vm.host, handle.zone, handle.storage, vm.vmid, handle.zone, handle.zone
        )))
    }

    pub(super) async fn check_nobody_else(self: &Arc<Self>, handle: &VolumeHandle, vmid: u32) -> Result<(), Error> {
        let references = self.references_before_refusal(handle, Some(vmid), Depth::Plugged).await?;
        self.check_references(handle, vmid, references).await
    }

    /// The same from readings of now: QEMU refused the volume, as it does when another one has it open.
    pub(super) async fn check_nobody_else_now(self: &Arc<Self>, handle: &VolumeHandle, vmid: u32) -> Result<(), Error> {
        let references = self.references(handle, Instant::now(), Some(vmid), Depth::Plugged).await?;
        self.check_references(handle, vmid, references).await
    }

    async fn check_references(&self, handle: &VolumeHandle, vmid: u32, references: Vec<Reference>) -> Result<(), Error> {
        if let Some(holder) = references.iter().find(|one| one.counts()) {
            return Err(held_elsewhere(holder));
        }
        for other in &references {
            proto::warn!("attach {handle}: {other}");
            if other.holds() {
                self.note_leftover(handle, other.vmid);
            }
        }
        self.check_no_doubt(handle, Some(vmid)).await
    }

    /// Whether a volume that Proxmox could not find is really missing (zfs says so of slow device links, too).
    pub(super) async fn missing(&self, handle: &VolumeHandle, error: pve::Error) -> Error {
        let host = if handle.zone.is_empty() { None } else { Some(handle.zone.as_str()) };
        match host {
            Some(host) => match self.volume_size(host, &handle.storage, &handle.volid()).await {
                Ok(_) => Error::unavailable(format!("{error}, but the volume is there; repeated")),
                Err(_) => error.into(),
            },
            None => error.into(),
        }
    }

    /// Who else has the volume, now that this VM has had it since `since`.
    async fn rival(self: &Arc<Self>, handle: &VolumeHandle, vm: &Vm, since: Instant, is_first: bool) -> Result<Option<Reference>, Error> {
        // With the Lease that other one is not of this Lease, and all VMs need not be read for it.
        let newcomers = match is_first && self.has_lease() {
            true => {
                let (was_alone, newcomers) = tokio::join!(self.was_alone(), self.newcomers(handle, vm.vmid, since));
                was_alone.then_some(newcomers)
            }
            false => None,
        };
        let references = match newcomers {
            Some(newcomers) => newcomers?,
            None => self.references(handle, since, Some(vm.vmid), Depth::Config).await?,
        };
        Ok(references.into_iter().find(Reference::counts))
    }

    /// Our claim is in the config since `written`. Another controller may have written its own at the same moment: of two, the higher VMID
    /// takes its own out again, and the lower waits for that, and yields too if the other stays.
    async fn settle_rivals(self: &Arc<Self>, handle: &VolumeHandle, vm: &Vm, written: Instant) -> Result<(), Error> {
        let (begun, mut since, mut is_first) = (Instant::now(), written, true);
        loop {
            let rival = match self.rival(handle, vm, since, is_first).await {
                Ok(rival) => rival,
                Err(error) => {
                    // Who cannot look again must not stay.
                    self.detach(handle, vm).await?;
                    return Err(error);
                }
            };
            let Some(rival) = rival else { return Ok(()) };
            if vm.vmid < rival.vmid && begun.elapsed() < RIVAL_WAIT {
                tokio::time::sleep(RIVAL_POLL).await;
                (since, is_first) = (Instant::now(), false);
                continue;
            }
            proto::warn!("attach {handle}: {rival}: our own attachment to VM {} is taken back", vm.vmid);
            self.detach(handle, vm).await?;
            return Err(held_elsewhere(&rival));
        }
    }

    /// The publish context, from the drive as it is.
    async fn published(&self, request: &Publish, vm: &Vm, lun: u8, drive: &Drive) -> Result<Published, Error> {
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
        context.extend(
            self.size_of(&request.handle, drive, vm, lun).await.map(|bytes| (publish_context::SIZE_BYTES.to_string(), bytes.to_string())),
        );
        if request.resize_required {
            context.insert(publish_context::RESIZE_REQUIRED.into(), "true".into());
        }
        self.note_looked_after(&request.handle, vm.vmid);
        Ok(Published { publish_context: context })
    }
}

impl Region {
    /// As the drive says, or as we made it; one that we attached for another controller's volume is in the VM's config by now.
    async fn size_of(&self, handle: &VolumeHandle, drive: &Drive, vm: &Vm, lun: u8) -> Option<u64> {
        if let Some(size) = drive.size_bytes().or_else(|| self.noted_size(handle)) {
            return Some(size);
        }
        let known = self.config(&vm.host, vm.vmid, Instant::now()).await.ok()?;
        let drive: Drive = known.config.configured(&attach::slot(lun)).filter(|line| volume_of(line) == drive.volid)?.parse().ok()?;
        let size = drive.size_bytes()?;
        self.keep_size(handle, size);
        Some(size)
    }
}

pub(super) fn held_elsewhere(holder: &Reference) -> Error {
    let then = match &holder.off {
        Some(_) => format!(
            "bring the node back and detach it there, or, if the node is off for certain, write fencedNodes: [{}] into the config file (or give the \
             Kubernetes node its out-of-service taint)",
            holder.host
        ),
        None => "detach it there first".into(),
    };
    Error::precondition(format!("refused, it would have two writers: {holder}; {then}"))
}
