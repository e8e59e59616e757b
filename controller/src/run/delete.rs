//! DeleteVolume: only what is ours by its name, and only when no VM refers to it in any view. Proxmox itself unlinks a file under a
//! running QEMU.

use std::sync::Arc;

use proto::VolumeHandle;
use tokio::time::Instant;

use super::Controller;
use super::evidence::Depth;
use super::region::{EVIDENCE_AGE, Region, ago};
use crate::error::Error;
use crate::kube::Kube;
use crate::pve::api::{self, Resources};
use crate::pve::drive::owner_of;
use crate::pve::{self, Meaning};

impl Controller {
    /// Makes sure that a volume is gone.
    ///
    /// # Errors
    /// It is not ours to delete, a VM refers to it, or Proxmox's.
    pub async fn delete(&self, handle: &VolumeHandle) -> Result<(), Error> {
        let step = format!("delete {handle}");
        let region = self.region(&handle.region)?;
        if let Some(kube) = &self.kube
            && keeps_disk(kube, handle).await.map_err(|error| error.during(&step))?
        {
            proto::warn!("{step}: its PV says lifecycle: keep; the disk stays in Proxmox");
            return Ok(());
        }
        region.check_built(handle).await.map_err(|error| error.during(&step))?;
        let Some(host) = region.host_of(handle).await.map_err(|error| error.during(&step))? else {
            if handle.zone.is_empty() {
                return Err(Error::unavailable(format!("{step}: storage {:?} is active on no Proxmox node", handle.storage)));
            }
            // The node left the cluster, and its local storage with it.
            region.check_absence_counts().await.map_err(|error| error.during(&step))?;
            proto::warn!("{step}: Proxmox node {} is not in the cluster; the volume went with it", handle.zone);
            return Ok(());
        };
        if let Err(error) = region.check_is_ours(handle) {
            // What is gone is gone, whosever it was.
            return if region.is_gone(&host, handle).await { Ok(()) } else { Err(error.during(&step)) };
        }
        let _claim = region.claim(handle).await?;
        // Nobody can look after a deletion, as after an attachment: all that could hold it is read now. That what is plugged has the
        // names it had is not enough, by hand or by a rollback a slot may hold another volume than a moment ago.
        let begun = Instant::now();
        let references = region.references(handle, begun, None, Depth::Snapshots).await.map_err(|error| error.during(&step))?;
        if !references.is_empty() {
            let all: Vec<String> = references.iter().map(ToString::to_string).collect();
            return Err(Error::precondition(format!("{step}: refused while in use: {}", all.join("; "))));
        }
        region.check_owner_is_no_vm(handle, begun).await.map_err(|error| error.during(&step))?;
        region.check_no_doubt(handle, None).await?;
        let mut freed = region.free(&host, &handle.storage, &handle.volid()).await;
        if freed.as_ref().is_err_and(|error| error.meaning().is_outcome_unknown()) {
            region.note_deletion(handle, &freed);
            // Asking again is the look: a volume that is gone is OK, or said to be missing. The first one may come after it all the same.
            freed = region.free(&host, &handle.storage, &handle.volid()).await;
            region.note_deletion(handle, &freed);
        }
        if freed.as_ref().is_err_and(|error| error.meaning() == Meaning::Other) {
            // Not every plugin says plainly that there was nothing (btrfs).
            if region.is_gone(&host, handle).await {
                freed = Ok(());
            }
        }
        match freed {
            Err(error) if error.meaning() != Meaning::NoSuchVolume => Err(Error::from(error).during(&step)),
            missing => {
                if let Err(error) = missing {
                    // Said of a zvol without its logical unit, too: the disk would stay for ever.
                    region.check_unlisted(&host, handle, &error).await.map_err(|error| error.during(&step))?;
                }
                proto::info!("{step}: done");
                self.forget_tried(handle);
                region.forget_modified(handle);
                Ok(())
            }
        }
    }
}

/// Whether a PV of this volume says that its disk stays.
///
/// # Errors
/// Kubernetes does not say: then nothing is deleted.
async fn keeps_disk(kube: &Arc<Kube>, handle: &VolumeHandle) -> Result<bool, Error> {
    let of = |why| Error::unavailable(format!("whether its PV says lifecycle: keep cannot be told, so that nothing is deleted: {why}"));
    kube.keeps_disk(handle).await.map_err(of)
}

impl Region {
    /// Whether the name says that it is one of ours.
    ///
    /// # Errors
    /// It is not: whose, and what to do.
    pub(super) fn check_is_ours(&self, handle: &VolumeHandle) -> Result<(), Error> {
        let rules = self.rules();
        let owners: Vec<String> = rules.owners.iter().map(ToString::to_string).collect();
        let owners = owners.join(", ");
        match owner_of(&handle.disk) {
            Some(owner) if rules.owners.contains(&owner) => Ok(()),
            Some(owner) => Err(Error::precondition(format!(
                "by its name it is VM {owner}'s, and this driver deletes only volumes of {owners}: delete it by hand, or write \
                 deleteAlsoOwnedBy: [{owner}] under features in the config file"
            ))),
            None => Err(Error::precondition(format!(
                "its name carries no owner, and this driver deletes only volumes of {owners}: delete it by hand"
            ))),
        }
    }

    /// Whether Proxmox says so, and its storage does not list it either: a file that is there and cannot be read is said to have no
    /// format, as one that is missing. What cannot be told is not gone.
    async fn is_gone(&self, host: &str, handle: &VolumeHandle) -> bool {
        match self.volume_size(host, &handle.storage, &handle.volid()).await {
            Err(error) if error.meaning() == Meaning::NoSuchVolume => self.check_unlisted(host, handle, &error).await.is_ok(),
            _ => false,
        }
    }

    /// What Proxmox says is missing is not in its storage's listing either.
    ///
    /// # Errors
    /// It is; or Proxmox's.
    async fn check_unlisted(&self, host: &str, handle: &VolumeHandle, missing: &pve::Error) -> Result<(), Error> {
        // Storages list by the owner in the name.
        let Some(owner) = owner_of(&handle.disk) else { return Ok(()) };
        let request = api::content(host, &handle.storage, owner);
        let call = request.name();
        let listed = self.client().call(request).await.and_then(|data| api::read_content(&call, &data))?;
        if !listed.contains_key(&handle.volid()) {
            return Ok(());
        }
        Err(Error::precondition(format!(
            "{missing}, and storage {:?} lists it all the same: a file that cannot be read, or a zvol without its logical unit; look at it on \
             Proxmox node {host} (pvesm list {}), and delete it there by hand",
            handle.storage, handle.storage
        )))
    }

    /// Proxmox gives a volume to the VM of the number in its name: its own disk, perhaps, though no config says so now.
    ///
    /// # Errors
    /// There is one.
    async fn check_owner_is_no_vm(&self, handle: &VolumeHandle, since: Instant) -> Result<(), Error> {
        let Some(owner) = owner_of(&handle.disk) else { return Ok(()) };
        let resources = self.resources(since).await?;
        let host = resources.vms.get(&owner).map(|vm| &vm.host).or_else(|| resources.containers.get(&owner));
        match host {
            Some(host) => Err(Error::precondition(format!(
                "VM {owner} is there, on {host}, and by its name the volume is that one's; give the VM another number (backup, restore, \
                 destroy), or delete the volume by hand"
            ))),
            None => Ok(()),
        }
    }

    /// What the reference driver makes and this version does not: a volume on several nodes' own storages, kept alike by Proxmox's
    /// replication, has a handle without a zone.
    ///
    /// # Errors
    /// It is one: nothing was touched.
    pub(super) async fn check_built(&self, handle: &VolumeHandle) -> Result<(), Error> {
        if super::list::is_snapshot(&handle.disk) {
            return Err(Error::precondition(
                "it is a snapshot of the reference driver's, and snapshots are not built yet; nothing was touched",
            ));
        }
        let is_replicated = |resources: &Resources| {
            let mut listed = resources.storages.iter().filter(|storage| storage.storage == handle.storage).peekable();
            listed.peek().is_some() && !listed.any(|storage| storage.shared)
        };
        // Read again before it is refused.
        if !handle.zone.is_empty()
            || !is_replicated(&*self.resources(ago(EVIDENCE_AGE)).await?)
            || !is_replicated(&*self.resources(Instant::now()).await?)
        {
            return Ok(());
        }
        Err(Error::precondition(format!(
            "storage {:?} is local to each Proxmox node and the handle names none, so it is a replicated volume of the reference driver's, and \
             replication is not built yet; nothing was touched",
            handle.storage
        )))
    }
}
