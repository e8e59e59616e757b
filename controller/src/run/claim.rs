//! One call of our own at a time for one volume, whatever its handle says.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use super::region::{Region, locked};
use crate::error::Error;

/// The volumes, by region, that a call of ours attaches or deletes now.
#[derive(Debug, Default)]
pub(super) struct Claims(Arc<Mutex<BTreeSet<String>>>);

/// Ends with its value.
#[derive(Debug)]
pub(super) struct Claim {
    claims: Arc<Mutex<BTreeSet<String>>>,
    volid: String,
}

impl Drop for Claim {
    fn drop(&mut self) {
        locked(&self.claims).remove(&self.volid);
    }
}

impl Region {
    /// A volume on shared storage has several handles (with a zone, and without), and calls go by those: one at a time all the same.
    ///
    /// # Errors
    /// Another call has it.
    pub(super) fn claim(&self, volid: &str) -> Result<Claim, Error> {
        if !locked(&self.claims.0).insert(volid.into()) {
            return Err(Error::aborted(format!(
                "another call for volume {volid} is in flight, under another handle; repeated when it has ended"
            )));
        }
        Ok(Claim { claims: Arc::clone(&self.claims.0), volid: volid.into() })
    }
}
