//! What Kubernetes says of VMs that cannot be read: which of our volumes they have, and whether they are off for certain.

use std::sync::Arc;

use proto::VolumeHandle;
use tonic::Code;

use super::cluster::{Off, is_name_of};
use super::evidence::{Reference, View};
use super::region::{EVIDENCE_AGE, Known, Region, ago, locked};
use crate::error::Error;
use crate::kube::{CsiNode, Kube, Machine};
use crate::pve;
use crate::pve::api::Vm;
use crate::request::{NodeId, node_id};

/// What Kubernetes' VolumeAttachments say of a volume and a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Word {
    /// There is none.
    Nothing,
    /// It is to be attached there, and no kubelet has been told that it is.
    Wanted,
    /// It is attached there.
    Attached,
}

/// Which VM a Node object means.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Is {
    Vmid(u32),
    /// A number without a region: every cluster may have one.
    Bare(u32),
    Uuid(String),
    Unsaid,
}

/// Which VM a node id names.
#[derive(Debug)]
pub(super) struct Meant {
    pub(super) vm: Option<Vm>,
    /// By a number that does not say of which region: its name must tell.
    pub(super) is_by_bare_number: bool,
}

impl From<Option<Vm>> for Meant {
    fn from(vm: Option<Vm>) -> Self {
        Self { vm, is_by_bare_number: false }
    }
}

/// `smbios1: uuid=...,serial=...`
fn uuid_of(known: &Known) -> Option<String> {
    let line = known.config.configured("smbios1")?;
    line.split(',').find_map(|part| part.strip_prefix("uuid=")).map(str::to_ascii_lowercase)
}

fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(at, b)| if matches!(at, 8 | 13 | 18 | 23) { b == b'-' } else { b.is_ascii_hexdigit() })
}

impl Region {
    /// What Kubernetes says of the volume and that VM; nothing where it cannot be asked, or which node the VM is cannot be told.
    ///
    /// # Errors
    /// It does not answer.
    pub(super) async fn word_of_kubernetes(&self, handle: &VolumeHandle, vmid: u32) -> Result<Option<Word>, Error> {
        let Some(kube) = &self.kube else { return Ok(None) };
        let nodes = self.nodes_for_certain(kube, vmid).await?;
        let [node] = nodes.as_slice() else { return Ok(None) };
        let attachments = kube.all_attached_to(node).await.map_err(Error::unavailable)?;
        let volid = handle.volid();
        let is_ours = |given: &str| given.parse::<VolumeHandle>().is_ok_and(|given| given.region == self.name && given.volid() == volid);
        let words = attachments.iter().filter(|(given, _)| is_ours(given));
        let word = |(_, attached): (&String, &bool)| if *attached { Word::Attached } else { Word::Wanted };
        Ok(Some(words.map(word).max().unwrap_or(Word::Nothing)))
    }

    /// Whether controllers act one at a time.
    pub(super) fn has_lease(&self) -> bool {
        self.kube.as_ref().is_some_and(|kube| kube.lease().is_some())
    }

    /// Whether no other controller can have acted until now: the Lease was ours, without a gap, by a renewal that began after
    /// what was just seen. Asked after a write and its verification; then no other one's claim can have come in between.
    pub(super) async fn was_alone(&self) -> bool {
        let Some(lease) = self.kube.as_ref().and_then(|kube| kube.lease()) else { return false };
        let confirmed = lease.confirm().await;
        if let Err(why) = &confirmed {
            proto::warn!("every VM is looked at again: {why}");
        }
        confirmed.is_ok()
    }

    /// Before a write that takes something away: with an unchanged digest Proxmox carries it out however late it comes, and our clock
    /// may have stood still since it was decided (the whole machine was paused). Without a Lease nothing is asked.
    ///
    /// # Errors
    /// It is not ours now, so that `call` is not sent.
    pub(super) async fn check_acts_now(&self, call: &str) -> Result<(), pve::Error> {
        let Some(lease) = self.kube.as_ref().and_then(|kube| kube.lease()) else { return Ok(()) };
        lease.confirm().await.map_err(|why| pve::Error { call: call.into(), cause: pve::Cause::NotSent(why) })
    }

    /// The Kubernetes nodes that this VM is, by the ids that their agents gave.
    async fn nodes_of(&self, kube: &Arc<Kube>, vmid: u32) -> Result<Vec<String>, Error> {
        let resources = self.resources(ago(EVIDENCE_AGE)).await?;
        let name = resources.vms.get(&vmid).and_then(|vm| vm.name.clone());
        let nodes = kube.nodes().await.map_err(Error::unavailable)?;
        let mut found = Vec::new();
        for node in nodes.iter() {
            let is_it = match node_id(&node.node_id) {
                Ok(NodeId::Vmid(_, of)) => of == vmid,
                Ok(NodeId::Name(of)) => {
                    let named = || resources.vms.values().filter(|vm| vm.name.as_ref() == Some(&of));
                    // A VM on a dead node loses its name after some minutes: any could be it that has no VM.
                    let by_name = name.as_ref().is_none_or(|name| *name == of);
                    match self.rules().capmox {
                        true => self.may_be(kube, &of, vmid).await?.unwrap_or(by_name),
                        false if named().next().is_some() => named().any(|vm| vm.vmid == vmid),
                        false => by_name || self.may_be(kube, &of, vmid).await?.unwrap_or(false),
                    }
                }
                Err(_) => true,
            };
            if is_it {
                found.push(node);
            }
        }
        // Another region may have a VM of that number: then the name says which is meant, as last seen (a silent node's VMs lose it).
        let is_named = |id: &str| match node_id(id) {
            Ok(NodeId::Vmid(of, _)) => self.was_named(vmid, &of),
            Ok(NodeId::Name(_)) | Err(_) => false,
        };
        let named: Vec<_> = found.iter().copied().filter(|node| is_named(&node.node_id)).collect();
        let these = if found.len() > 1 && !named.is_empty() { named } else { found };
        Ok(these.into_iter().map(|node| node.name.clone()).collect())
    }

    /// The same for whom the wrong one would let volumes go: none where a node that is gone could be it as well, and no name tells.
    async fn nodes_for_certain(&self, kube: &Arc<Kube>, vmid: u32) -> Result<Vec<String>, Error> {
        let mut nodes = self.nodes_of(kube, vmid).await?;
        if nodes.iter().any(|node| self.was_named(vmid, node)) {
            return Ok(nodes);
        }
        if !kube.nodes_forgotten().await.map_err(Error::unavailable)?.is_empty() {
            return Ok(Vec::new());
        }
        // Another cluster's, by its provider ID.
        let mut elsewhere = Vec::new();
        for node in &nodes {
            if kube.machine(node).await.map_err(Error::unavailable)?.is_some_and(|machine| self.machine_is(&machine).is_err()) {
                elsewhere.push(node.clone());
            }
        }
        nodes.retain(|node| !elsewhere.contains(node));
        Ok(nodes)
    }

    /// Whether a node could be that VM, by its Node object; nothing where that does not say.
    async fn may_be(&self, kube: &Arc<Kube>, node: &str, vmid: u32) -> Result<Option<bool>, Error> {
        match kube.machine(node).await.map_err(Error::unavailable)?.map(|machine| self.machine_is(&machine)) {
            Some(Ok(Is::Vmid(of) | Is::Bare(of))) => Ok(Some(of == vmid)),
            Some(Ok(Is::Uuid(uuid))) => Ok(Some(match self.last_with(&uuid).await {
                found if found.contains(&vmid) => true,
                found if !found.is_empty() => false,
                // Its VM's config may be what cannot be read.
                _ => self.rules().capmox || self.is_known_by_uuid(vmid).await,
            })),
            Some(Ok(Is::Unsaid)) | None => Ok(None),
            Some(Err(_)) => Ok(Some(false)),
        }
    }

    /// The VMs that had this UUID when they were last read.
    async fn last_with(&self, uuid: &str) -> Vec<u32> {
        let all: Vec<u32> = locked(&self.vms).keys().copied().collect();
        let mut found = Vec::new();
        for vmid in all {
            if self.last_known(vmid).await.is_some_and(|known| uuid_of(&known).as_deref() == Some(uuid)) {
                found.push(vmid);
            }
        }
        found
    }

    /// Whether a UUID could be that VM's: it was not read, or it has one.
    async fn is_known_by_uuid(&self, vmid: u32) -> bool {
        self.last_known(vmid).await.is_none_or(|known| uuid_of(&known).is_some())
    }

    /// What a Node object says of its VM; an error: it is in another region.
    fn machine_is(&self, machine: &Machine) -> Result<Is, String> {
        let vmid = |text: &str| text.parse::<u32>().ok().filter(|vmid| *vmid >= 100);
        if let Some(rest) = machine.provider_id.as_deref().and_then(|id| id.strip_prefix("proxmox://")) {
            match rest.rsplit_once('/') {
                Some((region, number)) => {
                    let region = region.trim_end_matches('/');
                    if let Some(vmid) = vmid(number) {
                        return match region {
                            "" => Ok(Is::Bare(vmid)),
                            region if region == self.name => Ok(Is::Vmid(vmid)),
                            region => Err(region.into()),
                        };
                    }
                }
                None if is_uuid(rest) => return Ok(Is::Uuid(rest.to_ascii_lowercase())),
                None => (),
            }
        }
        if let Some(vmid) = machine.instance_id.as_deref().and_then(vmid) {
            return Ok(Is::Bare(vmid));
        }
        let uuid = machine.system_uuid.as_deref().filter(|uuid| is_uuid(uuid));
        Ok(uuid.map_or(Is::Unsaid, |uuid| Is::Uuid(uuid.to_ascii_lowercase())))
    }

    /// The VM that a node id names.
    ///
    /// # Errors
    /// As [`Region::vm_meant`]; or its Node object names another region.
    pub(super) async fn vm_of(&self, node: &NodeId) -> Result<Option<Vm>, Error> {
        let meant = self.vm_meant(node).await?.map_err(|region| self.is_elsewhere(node, &region))?;
        Ok(meant.vm)
    }

    /// Its provider ID names another region.
    pub(super) fn is_elsewhere(&self, node: &NodeId, region: &str) -> Error {
        Error::precondition(format!(
            "node {node} is in region {region} by its provider ID, the volume is in region {}: a volume cannot leave its Proxmox cluster; \
             give the PV its nodeAffinity, or the pod a node of region {}",
            self.name, self.name
        ))
    }

    /// The other region that a node's provider ID names, where Kubernetes is there to say so.
    ///
    /// # Errors
    /// It does not answer.
    pub(super) async fn region_of_machine(&self, node: &NodeId) -> Result<Option<String>, Error> {
        let (Some(kube), NodeId::Name(name) | NodeId::Vmid(name, _)) = (&self.kube, node) else { return Ok(None) };
        let machine = kube.machine(name).await.map_err(Error::unavailable)?;
        Ok(machine.and_then(|machine| self.machine_is(&machine).err()))
    }

    /// By its number or its exact name; with Kubernetes also by what the Node object says, provider ID, annotation, SMBIOS UUID in this
    /// order, and with `provider: capmox` by that alone. The inner error: its Node object names that other region.
    ///
    /// # Errors
    /// Proxmox's or Kubernetes'; or several VMs could be meant.
    pub(super) async fn vm_meant(&self, node: &NodeId) -> Result<Result<Meant, String>, Error> {
        let NodeId::Name(name) = node else { return Ok(Ok(self.find_vm(node).await?.into())) };
        let capmox = self.rules().capmox;
        // That a VM shows no name now keeps no other one from being found by its Node object.
        let by_name = match self.find_vm(node).await {
            _ if capmox => Ok(None),
            Ok(Some(vm)) => return Ok(Ok(Some(vm).into())),
            Err(error) if error.code != Code::Unavailable => return Err(error),
            found => found,
        };
        let Some(kube) = &self.kube else {
            if !capmox {
                return by_name.map(|found| Ok(found.into()));
            }
            return Err(Error::precondition(format!(
                "node {node}: features.provider capmox finds nodes by their Node objects, and there is no Kubernetes API; node ids that carry the \
                 VMID, NAME/VMID, need none"
            )));
        };
        let Some(machine) = kube.machine(name).await.map_err(Error::unavailable)? else { return by_name.map(|found| Ok(found.into())) };
        match self.machine_is(&machine) {
            Err(region) => Ok(Err(region)),
            Ok(Is::Vmid(vmid)) => Ok(Ok(self.find_vm(&NodeId::Vmid(name.clone(), vmid)).await?.into())),
            Ok(Is::Bare(vmid)) => Ok(Ok(Meant { vm: self.find_vm(&NodeId::Vmid(name.clone(), vmid)).await?, is_by_bare_number: true })),
            Ok(Is::Uuid(uuid)) => match self.vm_by_uuid(node, &uuid, capmox).await? {
                None => by_name.map(|found| Ok(found.into())),
                found => Ok(Ok(found.into())),
            },
            Ok(Is::Unsaid) => by_name.map(|found| Ok(found.into())),
        }
    }

    /// The VM with that SMBIOS UUID; of all VMs, or of those whose name begins with the node's.
    async fn vm_by_uuid(&self, node: &NodeId, uuid: &str, of_all: bool) -> Result<Option<Vm>, Error> {
        let (NodeId::Name(name) | NodeId::Vmid(name, _)) = node;
        let resources = self.resources(ago(EVIDENCE_AGE)).await?;
        let (mut found, mut unread, mut unread_off): (Vec<Vm>, Option<Error>, Option<Error>) = Default::default();
        for vm in resources.vms.values().filter(|vm| !vm.template) {
            if !of_all && vm.name.as_ref().is_none_or(|shown| !shown.starts_with(name.as_str())) {
                continue;
            }
            // One that is off cannot change; what could not be read then may be it, if no other is.
            let is_off = self.off(&vm.host).await?.is_some();
            let since = if is_off { self.begun } else { ago(EVIDENCE_AGE) };
            match self.config(&vm.host, vm.vmid, since).await {
                Ok(known) if uuid_of(&known).as_deref() == Some(uuid) => found.push(vm.clone()),
                Ok(_) => (),
                Err(error) => {
                    let unread = if is_off { &mut unread_off } else { &mut unread };
                    unread.get_or_insert(Error::from(error).during(&format!("whether VM {} is node {node}", vm.vmid)));
                }
            }
        }
        match (found.as_slice(), unread.or(if found.is_empty() { unread_off } else { None })) {
            // A copy that was restored beside the original has its UUID, too.
            ([_] | [], Some(unread)) => Err(unread),
            ([one], None) => Ok(Some(one.clone())),
            ([], None) => Ok(None),
            ([one, other, ..], _) => Err(Error::precondition(format!(
                "node {node}: VMs {} and {} have the same SMBIOS UUID {uuid}; give the clone one of its own: qm set {} --smbios1 uuid=...",
                one.vmid, other.vmid, other.vmid
            ))),
        }
    }

    /// The VM of a Kubernetes node, where it is one of this region's.
    ///
    /// # Errors
    /// As [`Region::vm_of`].
    pub(crate) async fn vm_of_node(&self, node: &CsiNode, is_only: bool) -> Result<Option<Vm>, Error> {
        let resources = self.resources(ago(EVIDENCE_AGE)).await?;
        match node_id(&node.node_id) {
            // A number alone may be another cluster's.
            Ok(NodeId::Vmid(name, vmid)) => {
                let vm = resources.vms.get(&vmid);
                Ok(vm.filter(|vm| is_only || vm.name.as_deref().is_none_or(|shown| is_name_of(shown, &name))).cloned())
            }
            Ok(id @ NodeId::Name(_)) => match self.vm_of(&id).await {
                // Another region's node.
                Err(error) if error.code == Code::FailedPrecondition && !is_only => Ok(None),
                vm => vm,
            },
            Err(_) => Ok(None),
        }
    }

    /// Who has the volume attached to that VM, by Kubernetes' VolumeAttachments.
    ///
    /// # Errors
    /// Kubernetes cannot be asked, or does not answer: then nothing is known.
    pub(super) async fn attached_by_kubernetes(&self, vmid: u32, host: &str, off: &Off, volid: &str) -> Result<Vec<Reference>, Error> {
        let Some(kube) = &self.kube else {
            return Err(Error::unavailable(format!(
                "Proxmox node {host} is {off} and the VM was not read before; bring the node back, or, if it is off for certain, write \
                 fencedNodes: [{host}] into the config file"
            )));
        };
        let is_ours = |handle: &String| {
            let handle: Option<VolumeHandle> = handle.parse().ok();
            handle.is_some_and(|handle| handle.region == self.name && handle.volid() == volid)
        };
        let mut found = Vec::new();
        let mut nodes = self.nodes_of(kube, vmid).await?;
        // Its objects may be gone with the Kubernetes node, and what was attached to it may still be: any of those could be it, and one
        // that is there may be another cluster's VM of that number.
        nodes.extend(kube.nodes_forgotten().await.map_err(Error::unavailable)?);
        for node in nodes {
            if kube.all_attached_to(&node).await.map_err(Error::unavailable)?.keys().any(is_ours) {
                found.push(Reference { vmid, host: host.into(), key: node, view: View::Attachment, off: None });
            }
        }
        Ok(found)
    }

    /// Whether Kubernetes has been told that the VM's node is out of service.
    ///
    /// # Errors
    /// Kubernetes does not answer.
    pub(super) async fn is_out_of_service(&self, vmid: u32) -> Result<bool, Error> {
        let Some(kube) = &self.kube else { return Ok(false) };
        let nodes = self.nodes_for_certain(kube, vmid).await?;
        // With names alone it may be any of several: all of them, then.
        for node in &nodes {
            if !kube.is_out_of_service(node).await.map_err(Error::unavailable)? {
                return Ok(false);
            }
        }
        if nodes.is_empty() {
            return Ok(false);
        }
        // That lets volumes go: it must still be off.
        let host = self.resources(ago(EVIDENCE_AGE)).await?.vms.get(&vmid).map(|vm| vm.host.clone());
        match host {
            Some(host) if self.off_now(&host).await?.is_none() => {
                Err(Error::unavailable(format!("Proxmox node {host} of VM {vmid} is not off any more; repeated")))
            }
            _ => Ok(true),
        }
    }
}
