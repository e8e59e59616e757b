//! What this controller placed lately, and where: a zone that got volumes a moment ago comes after the others, and Proxmox's
//! numbers lag behind.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use proto::VolumeHandle;
use tokio::time::Instant;

use super::region::EVIDENCE_AGE;
use crate::placement::{Load, Loads};

/// So long a volume counts for its zone: a restore of some hundred lasts minutes.
const LATELY: Duration = Duration::from_secs(600);
/// The cluster was read so long ago at most, and its numbers were some 10 s old then.
const UNSEEN: Duration = Duration::from_secs(EVIDENCE_AGE.as_secs() + 15);
/// Volumes that are remembered; beyond it all are forgotten.
const MAX_PLACED: usize = 4096;

#[derive(Debug)]
struct Placed {
    handle: VolumeHandle,
    bytes: u64,
    at: Instant,
}

#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// Volume name → where it is, or is being made.
    volumes: HashMap<String, Placed>,
    /// Storage → when the provisioner last put a selected node's zone first there: its claims wait for their pods, then.
    selected: HashMap<String, Instant>,
}

impl Ledger {
    /// Notes where a volume goes, before it is made: concurrent calls count it.
    pub(super) fn note(&mut self, name: &str, handle: &VolumeHandle, bytes: u64) {
        if self.volumes.len() >= MAX_PLACED {
            self.volumes.retain(|_, placed| placed.at.elapsed() < LATELY);
        }
        if self.volumes.len() >= MAX_PLACED {
            self.volumes.clear();
        }
        self.volumes.insert(name.into(), Placed { handle: handle.clone(), bytes, at: Instant::now() });
    }

    /// A zone that came first was no rotation: a node was selected.
    pub(super) fn note_selected(&mut self, storage: &str) {
        self.selected.retain(|_, at| at.elapsed() < LATELY);
        if self.selected.len() < MAX_PLACED {
            self.selected.insert(storage.into(), Instant::now());
        }
    }

    /// Whether one that could be either is a selected node's, too.
    pub(super) fn was_selected(&self, storage: &str) -> bool {
        self.selected.get(storage).is_some_and(|at| at.elapsed() < LATELY)
    }

    /// It was not made.
    pub(super) fn forget(&mut self, name: &str) {
        self.volumes.remove(name);
    }

    /// It is gone.
    pub(super) fn forget_volume(&mut self, gone: &VolumeHandle) {
        self.volumes.retain(|_, placed| placed.handle.region != gone.region || placed.handle.volid() != gone.volid());
    }

    /// What counts for the next volume of that name on `storage`.
    pub(super) fn loads(&self, name: &str, storage: &str) -> Loads {
        let mut loads = Loads::new();
        for (_, placed) in self.volumes.iter().filter(|(of, placed)| *of != name && placed.at.elapsed() < LATELY) {
            let load: &mut Load = loads.entry((placed.handle.region.clone(), placed.handle.zone.clone())).or_default();
            load.volumes += 1;
            if placed.handle.storage == storage && placed.at.elapsed() < UNSEEN {
                load.unseen_bytes = load.unseen_bytes.saturating_add(placed.bytes);
            }
        }
        loads
    }

    /// Bytes of volumes there that a listing does not have yet; `zone` is empty for a shared storage.
    pub(super) fn unlisted_bytes(&self, name: &str, (region, zone, storage): (&str, &str, &str), listed: &BTreeMap<String, u64>) -> u64 {
        let there = |placed: &Placed| {
            (placed.handle.region.as_str(), placed.handle.zone.as_str(), placed.handle.storage.as_str()) == (region, zone, storage)
        };
        let unlisted = |placed: &Placed| placed.at.elapsed() < LATELY && there(placed) && !listed.contains_key(&placed.handle.volid());
        let of_others = self.volumes.iter().filter(|(of, placed)| *of != name && unlisted(placed));
        of_others.fold(0, |sum: u64, (_, placed)| sum.saturating_add(placed.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handle(text: &str) -> VolumeHandle {
        text.parse().unwrap()
    }

    fn age(ledger: &mut Ledger, by: Duration) {
        for placed in ledger.volumes.values_mut() {
            placed.at = placed.at.checked_sub(by).unwrap();
        }
    }

    #[tokio::test]
    async fn volumes_count_for_a_while_and_not_for_themselves() {
        let mut ledger = Ledger::default();
        ledger.note("a", &handle("r/x/ds/vm-9999-a"), 10);
        ledger.note("b", &handle("r/x/other/vm-9999-b"), 20);
        ledger.note("c", &handle("r/y/ds/vm-9999-c"), 40);
        let x = ("r".to_string(), "x".to_string());
        assert_eq!(ledger.loads("new", "ds")[&x], Load { volumes: 2, unseen_bytes: 10 });
        assert_eq!(ledger.loads("a", "ds")[&x], Load { volumes: 1, unseen_bytes: 0 });
        let listed = BTreeMap::from([("ds:vm-9999-z".to_string(), 1)]);
        assert_eq!(ledger.unlisted_bytes("new", ("r", "x", "ds"), &listed), 10);
        assert_eq!(ledger.unlisted_bytes("a", ("r", "x", "ds"), &listed), 0);
        assert_eq!(ledger.unlisted_bytes("new", ("r", "x", "ds"), &BTreeMap::from([("ds:vm-9999-a".to_string(), 10)])), 0);
        age(&mut ledger, UNSEEN);
        assert_eq!(ledger.loads("new", "ds")[&x], Load { volumes: 2, unseen_bytes: 0 });
        ledger.forget_volume(&handle("r/x/other/vm-9999-b"));
        ledger.forget("c");
        assert_eq!(ledger.loads("new", "ds").len(), 1);
        age(&mut ledger, LATELY);
        assert!(ledger.loads("new", "ds").is_empty());
        for n in 0..=MAX_PLACED {
            ledger.note(&n.to_string(), &handle("r/x/ds/vm-9999-a"), 1);
        }
        assert!(ledger.volumes.len() <= MAX_PLACED);
        ledger.note_selected("ds");
        assert!(ledger.was_selected("ds") && !ledger.was_selected("other"));
    }
}
