//! Which of several zones takes a volume: what the order of the request means, and what was placed lately. Pure.
//!
//! external-provisioner rotates the zones by a hash of the claim's name where no node is selected, and puts the selected node's
//! first where there is one (its `pkg/controller/topology.go`). A rotation is not a wish; a selected node is.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::{Candidate, Term};

/// How far ahead of the emptiest zone, in volumes placed lately, the first zone of a request may be when its order could be a
/// selected node's or a rotation's: of 20 volumes on three zones, none gets more than 8.
const MOST_AHEAD: usize = 1;
/// A zone that keeps less than a tenth of its storage free takes volumes when no other one has room.
const TIGHT_PART: u64 = 10;

/// What the order of a request's terms means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// A node is selected, or somebody has a wish: by order, as long as there is room.
    Wish,
    /// The provisioner's rotation, or by chance the same with a selected node. Who knows more says [`Order::Wish`] or [`Order::Free`].
    Either,
    /// No wish: by room and spread.
    Free,
}

/// What was placed in a zone lately, or is being placed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Volumes of any storage.
    pub volumes: usize,
    /// Bytes on the storage that is asked for, which its numbers do not show yet.
    pub unseen_bytes: u64,
}

/// Region and zone → what was placed there.
pub type Loads = BTreeMap<(String, String), Load>;

impl Order {
    /// Of a request with these terms, for a claim of that name.
    #[must_use]
    pub fn of(preferred: &[Term], claim: Option<&str>) -> Self {
        if preferred.is_empty() {
            return Self::Free;
        }
        let Some(claim) = claim else { return Self::Wish };
        let mut sorted: Vec<&Term> = preferred.iter().collect();
        sorted.sort();
        let rotated = sorted.get(rotation(claim, sorted.len()));
        if sorted.len() > 1 && rotated.copied() == preferred.first() { Self::Either } else { Self::Wish }
    }
}

/// By how many of `zones` the provisioner rotates for this claim: FNV-1 of its name and the number at its end.
fn rotation(claim: &str, zones: usize) -> usize {
    let (mut hashed, mut index) = (claim, 0);
    if let Some((stem, number)) = claim.rsplit_once('-') {
        // Go's ParseUint(…, 10, 32): digits only.
        if let Some(number) = number.bytes().all(|byte| byte.is_ascii_digit()).then(|| number.parse::<u32>().ok()).flatten() {
            index = number;
            // The claims of one pod of a StatefulSet go together: CLAIM-STATEFULSET-NUMBER.
            hashed = stem.rsplit_once('-').map_or(stem, |(_, set)| set);
        }
    }
    let hash = hashed.bytes().fold(0x811c_9dc5_u32, |hash, byte| hash.wrapping_mul(0x0100_0193) ^ u32::from(byte));
    let zones = u32::try_from(zones).unwrap_or(u32::MAX).max(1);
    usize::try_from(hash.wrapping_add(index) % zones).unwrap_or(0)
}

/// What decides between candidates.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rank {
    /// Which term it meets first.
    pub(super) term: usize,
    has_room: bool,
    /// Also beside what its numbers do not show yet.
    is_roomy: bool,
    left_bytes: u64,
    volumes: usize,
}

impl Rank {
    pub(super) fn new(term: usize, free_bytes: u64, size_bytes: u64, total_bytes: u64, load: Load) -> Self {
        let left_bytes = free_bytes.saturating_sub(load.unseen_bytes);
        let is_roomy = left_bytes >= size_bytes.saturating_add(total_bytes / TIGHT_PART);
        Self { term, has_room: left_bytes >= size_bytes, is_roomy, left_bytes, volumes: load.volumes }
    }
}

/// In the order in which they are taken.
pub(super) fn ranked(order: Order, mut found: Vec<(Candidate, Rank)>) -> Vec<Candidate> {
    let least = found.iter().map(|(_, rank)| rank).filter(|rank| rank.is_roomy).map(|rank| rank.volumes).min().unwrap_or(usize::MAX);
    found.sort_by_key(|(candidate, rank)| {
        let is_ahead = rank.volumes > least.saturating_add(MOST_AHEAD);
        // What has room in its own numbers goes before what has none in any.
        let full = candidate.free_bytes < candidate.size_bytes;
        let (first, by_term) = match order {
            Order::Wish => ((full, false, false), rank.term),
            Order::Either => ((full, !rank.has_room, !rank.is_roomy || is_ahead), rank.term),
            Order::Free => ((full, !rank.has_room, !rank.is_roomy), 0),
        };
        (first, by_term, !rank.has_room, !rank.is_roomy, rank.volumes, Reverse(rank.left_bytes), rank.term)
    });
    found.into_iter().map(|(candidate, _)| candidate).collect()
}

#[cfg(test)]
mod tests;
