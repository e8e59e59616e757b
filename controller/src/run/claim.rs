//! One call of our own at a time for one volume, whatever its handle says.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use proto::VolumeHandle;

use super::evidence::Reach;
use super::region::{Region, locked};
use crate::error::Error;

/// Volid and zone; no zone: whatever has that volid.
type Claimed = BTreeSet<(String, String)>;

/// Volumes that a call of ours attaches, detaches or deletes now.
#[derive(Debug, Default)]
pub(super) struct Claims(Arc<Mutex<Claimed>>);

/// Ends with its value.
#[derive(Debug)]
pub(super) struct Claim {
    claims: Arc<Mutex<Claimed>>,
    volume: (String, String),
}

impl Claims {
    /// The same ones, for a second Region.
    pub(super) fn shared(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
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
        // Of one name on each node, where the storage is local. A handle without a zone means any of them.
        let zone = if self.reach(handle).await? == Reach::Shared { String::new() } else { handle.zone.clone() };
        let mut claims = locked(&self.claims.0);
        let is_same = |(of, at): &(String, String)| *of == volid && (*at == zone || at.is_empty() || zone.is_empty());
        if claims.iter().any(is_same) {
            return Err(Error::aborted(format!(
                "another call for volume {volid} is in flight, under another handle; repeated when it has ended"
            )));
        }
        let volume = (volid, zone);
        claims.insert(volume.clone());
        drop(claims);
        Ok(Claim { claims: Arc::clone(&self.claims.0), volume })
    }
}
