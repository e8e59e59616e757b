//! Who else may act: another controller, unless a Lease keeps it from that; another call of our own, for the same volume under
//! another handle.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use proto::VolumeHandle;
use tokio::time::Instant;

use super::evidence::Reach;
use super::region::{EVIDENCE_AGE, Region, locked};
use crate::error::Error;

/// Whether this controller is the only one that acts, by the word of whoever holds its Lease. Nobody's word: others may act at any
/// moment. A word that is not renewed ends by itself: a process that was stopped meanwhile goes on with an old one.
#[derive(Debug, Default)]
pub struct Sole(Mutex<Option<Held>>);

#[derive(Debug, Clone, Copy)]
struct Held {
    since: Instant,
    until: Instant,
}

impl Sole {
    /// Nobody else acts before `until`: when the Lease was last asked to be renewed, and as long as it lasts from then. Said again
    /// before that moment it goes on, later it begins anew.
    pub fn hold(&self, until: Instant) {
        self.hold_at(Instant::now(), until);
    }

    fn hold_at(&self, now: Instant, until: Instant) {
        let mut held = locked(&self.0);
        let since = held.filter(|held| now < held.until).map_or(now, |held| held.since);
        *held = Some(Held { since, until });
    }

    /// The Lease was lost or given back.
    pub fn end(&self) {
        *locked(&self.0) = None;
    }

    /// Since when, without a break.
    #[must_use]
    pub fn since(&self) -> Option<Instant> {
        self.since_at(Instant::now())
    }

    fn since_at(&self, now: Instant) -> Option<Instant> {
        locked(&self.0).filter(|held| now < held.until).map(|held| held.since)
    }
}

/// Volumes that a call of ours attaches or deletes now.
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
    /// Since when nobody else acts, where that is so long ago that no evidence in use is older. Equal answers before and after a
    /// write mean that nobody else wrote: its look at all others afterwards falls away (docs/architecture.md, decision 5).
    #[must_use]
    pub(super) fn sole_writer(&self) -> Option<Instant> {
        self.sole.since().filter(|since| since.elapsed() >= EVIDENCE_AGE)
    }

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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_word_lasts_as_long_as_it_is_renewed() {
        let (sole, begun) = (Sole::default(), Instant::now());
        assert_eq!(sole.since_at(begun), None, "nobody said so");
        sole.hold_at(begun, begun + 10 * SECOND);
        sole.hold_at(begun + 9 * SECOND, begun + 19 * SECOND);
        assert_eq!(sole.since_at(begun + 18 * SECOND), Some(begun));
        assert_eq!(sole.since_at(begun + 19 * SECOND), None, "stopped, say: it was not renewed");
        let again = begun + 20 * SECOND;
        sole.hold_at(again, again + 10 * SECOND);
        assert_eq!(sole.since_at(again), Some(again), "another one may have acted in between");
        sole.end();
        assert_eq!(sole.since_at(again), None);
    }
}
