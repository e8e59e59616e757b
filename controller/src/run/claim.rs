//! One call of our own at a time for one volume, whatever its handle says.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use proto::VolumeHandle;

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
    /// Another call has it.
    pub(super) fn claim(&self, handle: &VolumeHandle) -> Result<Claim, Error> {
        let volid = handle.volid();
        // Without the zone, also where it says which of two volumes is meant: a storage not flagged as shared may be shared all the
        // same, and waiting for a namesake costs one repeat.
        if !locked(&self.claims.0).insert(volid.clone()) {
            return Err(Error::aborted(format!(
                "another call for volume {volid} is in flight, under another handle; repeated when it has ended"
            )));
        }
        Ok(Claim { claims: Arc::clone(&self.claims.0), volume: volid })
    }
}
