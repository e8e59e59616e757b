//! One call of our own at a time for one volume, whatever its handle says.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use proto::VolumeHandle;

use super::evidence::Reach;
use super::region::{Region, locked};
use crate::error::Error;

/// Volumes that a call of ours attaches, detaches or deletes now.
#[derive(Debug, Default)]
pub(super) struct Claims(Arc<Mutex<BTreeSet<String>>>);

/// Ends with its value.
#[derive(Debug)]
pub(super) struct Claim {
    claims: Arc<Mutex<BTreeSet<String>>>,
    volume: String,
}

impl Drop for Claim {
    fn drop(&mut self) {
        locked(&self.claims).remove(&self.volume);
    }
}

impl Region {
    /// A volume on shared storage has several handles (with a zone, and without), and calls go by those: one at a time all the same.
    ///
    /// # Errors
    /// Another call has it; or Proxmox's.
    pub(super) async fn claim(&self, handle: &VolumeHandle) -> Result<Claim, Error> {
        let volid = handle.volid();
        // Of one name on each node, where the storage is local.
        let volume = if self.reach(handle).await? == Reach::Shared { volid.clone() } else { format!("{} {volid}", handle.zone) };
        if !locked(&self.claims.0).insert(volume.clone()) {
            return Err(Error::aborted(format!(
                "another call for volume {volid} is in flight, under another handle; repeated when it has ended"
            )));
        }
        Ok(Claim { claims: Arc::clone(&self.claims.0), volume })
    }
}
