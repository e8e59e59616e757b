//! ControllerUnpublishVolume: OK only when no view of the VM holds the volume any more.

use std::sync::Arc;

use proto::VolumeHandle;
use tokio::time::Instant;
use tonic::Code;

use super::Controller;
use super::evidence::Depth;
use super::queue::Wish;
use super::region::{Known, Region};
use crate::attach::{Refusal, Seen, unexplained};
use crate::error::Error;
use crate::pve::api::{Vm, VmState};
use crate::pve::drive::volume_of;
use crate::request::{NodeId, Unpublish};

impl Controller {
    /// Takes the volume out of one VM, or out of every one.
    ///
    /// # Errors
    /// It is still in a view, or that cannot be told; or Proxmox's.
    pub async fn unpublish(&self, request: &Unpublish) -> Result<(), Error> {
        let region = self.region(&request.handle.region)?;
        let vms = match &request.node {
            Some(node) => match self.vm_to_detach(&region, &request.handle, node).await? {
                Some(Some(vm)) => vec![vm],
                // Another machine has the number, and does not hold it.
                Some(None) => Vec::new(),
                None => {
                    let gone = region.check_gone_with_it(&request.handle, node).await;
                    gone.map_err(|error| error.during(&format!("detach {} from {node}", request.handle)))?;
                    proto::info!("detach {}: VM of node {node} is gone", request.handle);
                    Vec::new()
                }
            },
            None => region.holders(&request.handle).await?,
        };
        // A doubt about another VM than the one asked for is that one's matter.
        let doubted = region.doubted_vms(&request.handle);
        let is_elsewhere = request.node.is_some() && !vms.is_empty() && !vms.iter().any(|vm| doubted.contains(&vm.vmid));
        let _claim = region.claim(&request.handle).await?;
        for vm in vms {
            let step = format!("detach {} from VM {} on {}", request.handle, vm.vmid, vm.host);
            region.remove_leftovers_beside(&request.handle, &vm).await;
            region.unpublish(&request.handle, &vm).await.map_err(|error| error.during(&step))?;
        }
        if is_elsewhere { Ok(()) } else { region.check_no_doubt(&request.handle, None).await }
    }
}

impl Controller {
    /// The node's VM, where it is listed; nothing inside: it is another machine's number or region, and nothing of this volume is there.
    /// The attacher repeats what is refused: as soon as the rightful node has let go it succeeds.
    ///
    /// # Errors
    /// By its name the VM is not that node, and it holds the volume: for another node, perhaps.
    async fn vm_to_detach(&self, region: &Arc<Region>, handle: &VolumeHandle, node: &NodeId) -> Result<Option<Option<Vm>>, Error> {
        let step = || format!("detach {handle} from {node}");
        let meant = match region.vm_meant(node).await? {
            Ok(meant) => meant,
            Err(other) => {
                region.check_gone_with_it(handle, node).await.map_err(|error| error.during(&step()))?;
                proto::info!("detach {handle}: node {node} is in region {other}, nothing is attached to it here");
                return Ok(Some(None));
            }
        };
        let Some(vm) = meant.vm else { return Ok(None) };
        let is_node = match (node, meant.is_by_bare_number) {
            (NodeId::Name(_), false) => Ok(()),
            (_, is_by_bare_number) => self.check_is_node(region, node, &vm, is_by_bare_number).await,
        };
        let Err(why) = is_node else { return Ok(Some(Some(vm))) };
        let references = region.references(handle, Instant::now(), None, Depth::Plugged).await.map_err(|error| error.during(&step()))?;
        match references.iter().find(|one| one.vmid == vm.vmid && one.counts()) {
            Some(holder) => Err(Error {
                code: why.code,
                text: format!(
                    "{}: {}; and {holder}: it is let go when the node that has it there lets it go; if it was attached for this node, give the VM the \
                 node's name, or detach it by hand: qm set {} --delete {}",
                    step(),
                    why.text,
                    vm.vmid,
                    holder.key
                ),
            }),
            None if region.doubted_vms(handle).contains(&vm.vmid) => Err(why.during(&step())),
            None => {
                proto::info!("detach {handle}: {}; it does not have it", why.text);
                Ok(Some(None))
            }
        }
    }
}

impl Region {
    /// Who holds it now: nobody is overlooked because he came within the last minute.
    async fn holders(self: &Arc<Self>, handle: &VolumeHandle) -> Result<Vec<Vm>, Error> {
        let now = Instant::now();
        let references = self.references(handle, now, None, Depth::Plugged).await?;
        let resources = self.resources(now).await?;
        if let Some(container) = references.iter().find(|one| one.holds() && resources.containers.contains_key(&one.vmid)) {
            return Err(Error::precondition(format!("detach {handle}: {container}; a container's mount point is removed by hand")));
        }
        let mut vmids: Vec<u32> = references.iter().filter(|one| one.holds()).map(|one| one.vmid).collect();
        vmids.dedup();
        Ok(vmids.iter().filter_map(|vmid| resources.vms.get(vmid).cloned()).collect())
    }

    /// The node's VM is not listed: it is gone, and what it held is free.
    ///
    /// # Errors
    /// It is hidden from us; or it may have another name now.
    async fn check_gone_with_it(self: &Arc<Self>, handle: &VolumeHandle, node: &NodeId) -> Result<(), Error> {
        let NodeId::Name(name) = node else {
            let NodeId::Vmid(_, vmid) = node else { return Ok(()) };
            return self.check_vm_gone(*vmid).await;
        };
        self.check_absence_counts().await?;
        let references = self.references(handle, Instant::now(), None, Depth::Plugged).await?;
        match references.iter().find(|one| one.counts()) {
            Some(holder) => Err(Error::precondition(format!(
                "no VM is named {name:?}, and {holder}: it could be the same VM under a new name; give it its name back, or detach the \
                 volume there (node ids that carry the VMID, NAME/VMID, leave no such doubt)"
            ))),
            None => Ok(()),
        }
    }

    async fn unpublish(self: &Arc<Self>, handle: &VolumeHandle, vm: &Vm) -> Result<(), Error> {
        let off = match self.off(&vm.host).await? {
            Some(off) => off,
            None => match self.detach(handle, vm).await {
                Err(error) if error.code == Code::Unavailable => {
                    // Gone off since the cluster was read, perhaps.
                    self.resources(Instant::now()).await?;
                    self.off(&vm.host).await?.ok_or(error)?
                }
                done => return done,
            },
        };
        if off.fenced || self.is_out_of_service(vm.vmid).await? {
            proto::warn!("detach {handle} from VM {}: {} is {off}, for certain; its drive is removed when it is back", vm.vmid, vm.host);
            self.note_leftover(handle, vm.vmid);
            return Ok(());
        }
        // What cannot run cannot change: it counts as last read.
        let volid = handle.volid();
        let is_free = |known: &Known| known.config.naming(&volid).next().is_none() && !known.held.values().any(|held| *held == volid);
        match self.last_known(vm.vmid).await {
            Some(known) if is_free(&known) && !known.is_stale => Ok(()),
            _ => Err(Error::unavailable(format!(
                "Proxmox node {} is {off}; the volume is let go when the node is back, or, if it is off for certain, by fencedNodes: [{}] in \
                 the config file",
                vm.host, vm.host
            ))),
        }
    }

    /// Detaches, whatever the state is; done when neither config nor plan nor QEMU has it.
    pub(super) async fn detach(self: &Arc<Self>, handle: &VolumeHandle, vm: &Vm) -> Result<(), Error> {
        self.submit(vm, Wish::Detach(handle.clone())).await.map(drop)
    }

    /// A drive that QEMU has and the config forgot: nothing in the API removes it.
    pub(super) async fn check_not_left_in_qemu(&self, volid: &str, vm: &Vm, known: &Known, state: &VmState) -> Result<(), Error> {
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
pub(crate) fn words(refusal: &Refusal, vmid: u32) -> Error {
    match refusal {
        Refusal::Template => Error::precondition(format!("VM {vmid} is a template, which never runs")),
        Refusal::NotRunning => Error::unavailable(format!("VM {vmid} is not running; it gets its disk when it runs: qm start {vmid}")),
        Refusal::QemuSilent => Error::unavailable(format!("QEMU of VM {vmid} does not answer, so that what is plugged is not known")),
        Refusal::NoHotplug(value) => {
            Error::precondition(format!("VM {vmid} has hotplug: {value}, without disk; run: qm set {vmid} --hotplug disk,network,usb"))
        }
        Refusal::ScsiHw(value) => Error::precondition(format!(
            "VM {vmid} has scsihw: {value}, which gives disks no usable LUN; run: qm set {vmid} --scsihw virtio-scsi-single, and restart it"
        )),
        Refusal::Protected => Error::precondition(format!(
            "VM {vmid} has protection: 1, so that its disks could never be detached; run: qm set {vmid} --protection 0 (or write \
             attachToProtectedVMs: true under features in the config file)"
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
