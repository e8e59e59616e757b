//! How a volume is, in a word and a sentence; and ControllerGetVolume. `held` and `condition` are pure.

use std::sync::Arc;

use proto::VolumeHandle;
use tokio::time::Instant;

use super::Controller;
use super::evidence::{Depth, View};
use super::list::Listed;
use super::region::{EVIDENCE_AGE, Known, Region, ago};
use crate::error::Error;
use crate::pve::Meaning;
use crate::pve::api::VmState;
use crate::pve::drive::volume_of;

/// CSI's VolumeCondition.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Condition {
    /// Somebody should look at it.
    pub abnormal: bool,
    /// A sentence.
    pub message: String,
}

/// What its storage says of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// It is there.
    Fine,
    /// It is not.
    Missing,
    /// That cannot be looked at: why.
    Unread(String),
}

/// What one VM has of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) vmid: u32,
    host: String,
    key: String,
    how: How,
    /// Configured to stay, and QEMU has it.
    pub(super) is_attached: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Attached,
    /// The VM is off.
    Stopped,
    /// The config says so, and QEMU does not have it.
    NotPlugged,
    Planned,
    Leaving,
    /// QEMU has it, and the config does not say so.
    Left,
}

/// What a VM has of a volume, by its three views.
pub(super) fn held(vmid: u32, host: &str, known: &Known, state: &VmState, volid: &str) -> Vec<Held> {
    let is_plugged = |key: &str| state.plugged.as_ref().is_some_and(|plugged| plugged.contains(key));
    let of = |key: &str, how| Held { vmid, host: host.into(), key: key.into(), how, is_attached: how == How::Attached };
    let mut all: Vec<Held> = Vec::new();
    for (key, line) in known.config.naming(volid).filter(|(key, _)| !key.starts_with("unused")) {
        let is_configured = line.value.as_deref().is_some_and(|text| volume_of(text) == volid);
        all.push(of(
            key,
            match (is_configured, line.delete) {
                (false, _) => How::Planned,
                (true, true) => How::Leaving,
                (true, false) if !state.running => How::Stopped,
                (true, false) if is_plugged(key) => How::Attached,
                (true, false) => How::NotPlugged,
            },
        ));
    }
    for key in state.plugged.iter().flatten() {
        let is_held = known.held.get(key).is_some_and(|held| held == volid);
        if is_held && known.config.configured(key).map(volume_of) != Some(volid) {
            all.push(of(key, How::Left));
        }
    }
    all
}

/// How a volume is.
pub(super) fn condition(place: &Place, held: &[Held]) -> Condition {
    let abnormal = |message: String| Condition { abnormal: true, message };
    match place {
        Place::Missing => return abnormal("the volume is not on its storage any more".into()),
        Place::Unread(why) => return abnormal(format!("the volume cannot be looked at: {why}")),
        Place::Fine => (),
    }
    let all: Vec<String> = held.iter().map(ToString::to_string).collect();
    let all = all.join("; ");
    let mut vmids: Vec<u32> = held.iter().map(|one| one.vmid).collect();
    vmids.dedup();
    if vmids.len() > 1 {
        return abnormal(format!("more than one VM has the volume: {all}"));
    }
    match held.iter().find(|one| matches!(one.how, How::NotPlugged | How::Left | How::Leaving)) {
        Some(_) => abnormal(all),
        None if held.is_empty() => Condition { abnormal: false, message: "not attached".into() },
        None => Condition { abnormal: false, message: all },
    }
}

impl std::fmt::Display for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { vmid, host, key, .. } = self;
        match self.how {
            How::Attached => write!(f, "attached to VM {vmid} on {host} as {key}"),
            How::Stopped => write!(f, "configured as {key} of VM {vmid} on {host}, which is not running"),
            How::NotPlugged => write!(f, "configured as {key} of VM {vmid} on {host}, whose QEMU does not have it; it is attached anew"),
            How::Planned => write!(f, "planned as {key} of VM {vmid} on {host}"),
            How::Leaving => write!(f, "its removal as {key} of VM {vmid} on {host} is planned and not done"),
            How::Left => write!(f, "QEMU of VM {vmid} on {host} has it as {key}, though the config does not say so; restart the VM"),
        }
    }
}

impl Controller {
    /// One volume: its size, where it is published (with Kubernetes), how it is.
    ///
    /// # Errors
    /// NOT_FOUND; Proxmox's or Kubernetes'.
    pub async fn volume(&self, handle: &VolumeHandle) -> Result<Listed, Error> {
        let region = self.region(&handle.region).map_err(|error| Error::not_found(error.text))?;
        let nodes = match &self.kube {
            Some(kube) => kube.nodes().await.map_err(Error::unavailable)?,
            None => Arc::default(),
        };
        let is_only = self.clusters()?.regions.len() == 1;
        let place = region.place(handle).await?;
        if place == Place::Missing {
            return Err(Error::not_found(format!("volume {handle} is not there")));
        }
        let (references, unread) = region.references_read(handle, ago(EVIDENCE_AGE), None, Depth::Plugged).await?;
        // A container is no VM to read.
        let of_vms = references.iter().filter(|one| one.holds() && one.view != View::Container);
        let mut vms: Vec<(u32, String)> = of_vms.map(|one| (one.vmid, one.host.clone())).collect();
        vms.dedup();
        let volid = handle.volid();
        let (mut all, mut published) = (Vec::new(), Vec::new());
        for (vmid, host) in vms {
            // A VM that is off may never have been read: the reference says all there is.
            let Some((known, state)) = region.as_read(vmid, &host).await? else { continue };
            all.extend(held(vmid, &host, &known, &state, &volid));
        }
        for node in nodes.iter() {
            if references.iter().any(|one| one.view == View::Attachment && one.key == node.name) {
                published.push(node.node_id.clone());
                continue;
            }
            let Some(vm) = region.vm_of_node(node, is_only).await? else { continue };
            if all.iter().any(|one| one.vmid == vm.vmid && one.is_attached) {
                published.push(node.node_id.clone());
            }
        }
        published.sort();
        let mut condition = condition(&place, &all);
        let holding: Vec<String> = references.iter().filter(|one| one.holds()).map(ToString::to_string).collect();
        if all.is_empty() && !holding.is_empty() && !condition.abnormal {
            condition = Condition { abnormal: true, message: holding.join("; ") };
        }
        if let Some(unread) = unread.filter(|_| !condition.abnormal) {
            condition = Condition { abnormal: true, message: format!("{}; {}", condition.message, unread.text) };
        }
        let size_bytes = region.noted_size(handle);
        Ok(Listed { handle: handle.clone(), size_bytes, nodes: published, condition })
    }
}

impl Region {
    /// Whether a volume is on its storage now; its size is noted then.
    ///
    /// # Errors
    /// Proxmox's, where it should answer.
    pub(super) async fn place(self: &Arc<Self>, handle: &VolumeHandle) -> Result<Place, Error> {
        let Some(host) = self.host_of(handle).await? else { return Ok(Place::Missing) };
        if let Some(off) = self.off(&host).await? {
            return Ok(Place::Unread(format!("Proxmox node {host} is {off}")));
        }
        match self.volume_size(&host, &handle.storage, &handle.volid()).await {
            Ok(bytes) => {
                self.keep_size(handle, bytes);
                Ok(Place::Fine)
            }
            Err(error) => match error.meaning() {
                Meaning::NoSuchVolume => Ok(Place::Missing),
                Meaning::StorageOffline | Meaning::StorageNotHere | Meaning::HostDown => {
                    self.resources(Instant::now()).await?;
                    Ok(Place::Unread(error.to_string()))
                }
                _ => Err(Error::from(error).during(&handle.to_string())),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(vmid: u32, how: How) -> Held {
        Held { vmid, host: "pve1".into(), key: "scsi3".into(), how, is_attached: how == How::Attached }
    }

    #[test]
    fn what_is_worth_a_look_is_abnormal() {
        for (place, held, abnormal, words) in [
            (Place::Fine, vec![], false, "not attached"),
            (Place::Fine, vec![one(101, How::Attached)], false, "attached to VM 101 on pve1 as scsi3"),
            (Place::Fine, vec![one(101, How::Stopped)], false, "not running"),
            (Place::Fine, vec![one(101, How::Planned)], false, "planned as scsi3"),
            (Place::Fine, vec![one(101, How::NotPlugged)], true, "QEMU does not have it"),
            (Place::Fine, vec![one(101, How::Leaving)], true, "planned and not done"),
            (Place::Fine, vec![one(101, How::Left)], true, "restart the VM"),
            (Place::Fine, vec![one(101, How::Attached), one(102, How::Stopped)], true, "more than one VM"),
            (Place::Missing, vec![], true, "not on its storage"),
            (Place::Unread("pve1 is off".into()), vec![], true, "pve1 is off"),
        ] {
            let condition = condition(&place, &held);
            assert_eq!(condition.abnormal, abnormal, "{condition:?}");
            assert!(condition.message.contains(words), "{condition:?}");
        }
    }
}
