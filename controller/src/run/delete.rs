//! DeleteVolume: only when no VM refers to the volume in any view. Proxmox itself unlinks a file under a running QEMU.

use proto::VolumeHandle;
use tokio::time::Instant;

use super::Controller;
use super::evidence::Depth;
use crate::error::Error;
use crate::pve::Meaning;

impl Controller {
    /// Makes sure that a volume is gone.
    ///
    /// # Errors
    /// A VM refers to it, or Proxmox's.
    pub async fn delete(&self, handle: &VolumeHandle) -> Result<(), Error> {
        let step = format!("delete {handle}");
        let region = self.region(&handle.region)?;
        let Some(host) = region.host_of(handle).await.map_err(|error| error.during(&step))? else {
            if handle.zone.is_empty() {
                return Err(Error::unavailable(format!("{step}: storage {:?} is active on no Proxmox node", handle.storage)));
            }
            // The node left the cluster, and its local storage with it.
            region.check_absence_counts().await.map_err(|error| error.during(&step))?;
            proto::warn!("{step}: Proxmox node {} is not in the cluster; the volume went with it", handle.zone);
            return Ok(());
        };
        let _claim = region.claim(handle).await?;
        // Nobody can look after a deletion, as after an attachment: all that could hold it is read now. That what is plugged has the
        // names it had is not enough, by hand or by a rollback a slot may hold another volume than a moment ago.
        let references = region.references(handle, Instant::now(), None, Depth::Snapshots).await.map_err(|error| error.during(&step))?;
        if !references.is_empty() {
            let all: Vec<String> = references.iter().map(ToString::to_string).collect();
            return Err(Error::precondition(format!("{step}: refused while in use: {}", all.join("; "))));
        }
        region.check_no_doubt(&handle.volid()).await?;
        let mut freed = region.free(&host, &handle.storage, &handle.volid()).await;
        if freed.as_ref().is_err_and(|error| error.meaning().is_outcome_unknown()) {
            // Asking again is the look: a volume that is gone is OK, or said to be missing.
            freed = region.free(&host, &handle.storage, &handle.volid()).await;
        }
        if freed.as_ref().is_err_and(|error| error.meaning() == Meaning::Other) {
            // Not every plugin says plainly that there was nothing (btrfs).
            let looked = region.volume_size(&host, &handle.storage, &handle.volid()).await;
            if looked.as_ref().is_err_and(|error| error.meaning() == Meaning::NoSuchVolume) {
                freed = Ok(());
            }
        }
        match freed {
            Err(error) if error.meaning() != Meaning::NoSuchVolume => Err(Error::from(error).during(&step)),
            _ => {
                proto::info!("{step}: done");
                self.forget_tried(handle);
                Ok(())
            }
        }
    }
}
