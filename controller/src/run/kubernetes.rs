//! What Kubernetes says of VMs that cannot be read: which of our volumes they have, and whether they are off for certain.

use std::sync::Arc;

use proto::VolumeHandle;

use super::cluster::Off;
use super::evidence::{Reference, View};
use super::region::{EVIDENCE_AGE, Region, ago};
use crate::error::Error;
use crate::kube::Kube;
use crate::pve;
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

impl Region {
    /// What Kubernetes says of the volume and that VM; nothing where it cannot be asked, or which node the VM is cannot be told.
    ///
    /// # Errors
    /// It does not answer.
    pub(super) async fn word_of_kubernetes(&self, handle: &VolumeHandle, vmid: u32) -> Result<Option<Word>, Error> {
        let Some(kube) = &self.kube else { return Ok(None) };
        let nodes = self.nodes_of(kube, vmid).await?;
        let [node] = nodes.as_slice() else { return Ok(None) };
        let attachments = kube.attached_to(node).await.map_err(Error::unavailable)?;
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
        let is_it = |id: &str| match node_id(id) {
            Ok(NodeId::Vmid(_, of)) => of == vmid,
            // A VM on a dead node loses its name after some minutes: any could be it.
            Ok(NodeId::Name(of)) => name.as_ref().is_none_or(|name| *name == of),
            Err(_) => true,
        };
        let found: Vec<_> = nodes.iter().filter(|node| is_it(&node.node_id)).collect();
        // Another region may have a VM of that number: then the name says which is meant, as last seen (a silent node's VMs lose it).
        let is_named = |id: &str| match node_id(id) {
            Ok(NodeId::Vmid(of, _)) => self.was_named(vmid, &of),
            Ok(NodeId::Name(_)) | Err(_) => false,
        };
        let named: Vec<_> = found.iter().copied().filter(|node| is_named(&node.node_id)).collect();
        let these = if found.len() > 1 && !named.is_empty() { named } else { found };
        Ok(these.into_iter().map(|node| node.name.clone()).collect())
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
        if nodes.is_empty() {
            // Its objects are gone with the Kubernetes node, what was attached to it may still be: any of those could be it.
            nodes = kube.nodes_forgotten().await.map_err(Error::unavailable)?;
        }
        for node in nodes {
            if kube.attached_to(&node).await.map_err(Error::unavailable)?.keys().any(is_ours) {
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
        let nodes = self.nodes_of(kube, vmid).await?;
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
