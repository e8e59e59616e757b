//! Where a new volume goes: requirement, cluster snapshot and what was placed lately → zone and storage, size, disk name. Pure.
//!
//! A storage that several Proxmox nodes share is one place without a zone; any of its nodes carries the call.

mod room;
mod spread;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::pve::api::{Resources, Storage};
pub use room::{Promised, Room};
pub use spread::{Load, Loads, Order};
use spread::{Rank, ranked};

/// Where the reference driver starts: no capacity_range at all.
pub const DEFAULT_SIZE_BYTES: u64 = 10 << 30;
/// New volumes are whole MiB where the limit lets them: what every plugin can hold exactly.
const MIB: u64 = 1 << 20;
/// LVM's default extent; a volume group made with another one rounds further, which Proxmox does not show.
const LVM_EXTENT: u64 = 4 << 20;
/// The wire's unit.
const KIB: u64 = 1 << 10;
/// device-mapper names end at 127 bytes, with every `-` of the LV's name doubled; what is left is the volume group's.
const MAX_DISK_NAME: usize = 100;

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Want {
    /// The Proxmox storage id.
    pub storage: String,
    /// Bytes at least.
    pub required_bytes: u64,
    /// Bytes at most.
    pub limit_bytes: Option<u64>,
    /// Empty: anywhere.
    pub terms: Vec<Term>,
    /// What the order of the terms means.
    pub order: Order,
    /// `raw` or `qcow2`.
    pub format: Option<String>,
    /// How much of the storage may be used and promised.
    pub room: Room,
}

/// One topology segment: a region, a zone, or both.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Term {
    /// The Proxmox cluster.
    pub region: Option<String>,
    /// The Proxmox node.
    pub zone: Option<String>,
}

impl Term {
    /// Whether a place is in it.
    #[must_use]
    pub fn fits(&self, region: &str, zone: &str) -> bool {
        self.region.as_ref().is_none_or(|wanted| wanted == region) && self.zone.as_ref().is_none_or(|wanted| wanted == zone)
    }
}

/// A place that could hold the volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// The Proxmox cluster.
    pub region: String,
    /// The Proxmox node; empty: the storage is shared.
    pub zone: String,
    /// The Proxmox node that carries the calls.
    pub host: String,
    /// The Proxmox nodes that reach it; empty: every one of the region.
    pub reach: Vec<String>,
    /// The storage's plugin.
    pub plugin: Plugin,
    /// What is left there.
    pub free_bytes: u64,
    /// What the volume takes there.
    pub size_bytes: u64,
}

/// What is known when a place is looked for.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// Region → its cluster; empty for those that are not asked for.
    pub regions: &'a BTreeMap<String, Arc<Resources>>,
    /// What is in use by name, where a class limits that.
    pub promised: &'a Promised,
    /// What this controller placed lately, or is placing.
    pub loads: &'a Loads,
}

/// How a storage names and sizes its volumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plugin {
    /// dir, nfs, cifs, btrfs: a file in a folder per owner.
    File,
    /// lvm, lvmthin: extents.
    Lvm,
    /// qcow2 on lvm (snapshot-as-volume-chain): any size, in extents that hold its tables too.
    LvmChain,
    /// zfspool, rbd: whole MiB.
    Block,
    /// zfs (over iSCSI): whole MiB, by a command on another machine, whose errors Proxmox does not tell.
    ZfsTarget,
}

impl Plugin {
    /// By Proxmox's `plugintype`; nothing for those that hold no new disks.
    #[must_use]
    pub fn named(plugintype: &str) -> Option<Self> {
        match plugintype {
            "dir" | "nfs" | "cifs" | "btrfs" => Some(Self::File),
            "lvm" | "lvmthin" => Some(Self::Lvm),
            "zfspool" | "rbd" => Some(Self::Block),
            "zfs" => Some(Self::ZfsTarget),
            _ => None,
        }
    }

    /// The same for one volume, by its format or by its disk's name.
    #[must_use]
    pub fn of(plugintype: &str, format_or_disk: &str) -> Option<Self> {
        match Self::named(plugintype) {
            Some(Self::Lvm) if plugintype == "lvm" && format_or_disk.ends_with("qcow2") => Some(Self::LvmChain),
            plugin => plugin,
        }
    }

    /// Whether Proxmox wants the format at the end of the disk's name.
    fn has_suffix(self) -> bool {
        matches!(self, Self::File | Self::LvmChain)
    }

    /// The steps it allocates in, in bytes.
    #[must_use]
    pub fn step_bytes(self) -> u64 {
        match self {
            Self::File | Self::LvmChain => KIB,
            Self::Lvm => LVM_EXTENT,
            Self::Block | Self::ZfsTarget => MIB,
        }
    }
}

/// Whether a new volume reads as zeros: `None` where the plugin is not known (decision 3).
#[must_use]
pub fn is_zeroed(plugintype: &str, disk: &str) -> Option<bool> {
    if disk.ends_with(".qcow2") {
        return Some(true);
    }
    match plugintype {
        "dir" | "nfs" | "cifs" | "btrfs" | "lvmthin" | "zfspool" | "rbd" => Some(true),
        "lvm" | "zfs" | "iscsi" | "iscsidirect" => Some(false),
        _ => None,
    }
}

/// Why there is no place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The request or the class is wrong: nothing will make it right but a person.
    Wrong(String),
    /// The size can be met nowhere.
    OutOfRange(String),
    /// Not here, not now: another zone might do.
    NotHere(String),
}

/// Chosen first, then the other candidates, in order; the others may hold the volume from an earlier try.
///
/// # Errors
/// No zone of the request has the storage, has it active, or has room.
pub fn candidates(want: &Want, seen: Seen<'_>) -> Result<Vec<Candidate>, Refusal> {
    let regions = seen.regions;
    for term in &want.terms {
        if let Some(region) = term.region.as_ref().filter(|region| !regions.contains_key(*region)) {
            let known: Vec<&str> = regions.keys().map(String::as_str).collect();
            return Err(Refusal::Wrong(format!(
                "region {region:?} of accessibility_requirements is not in the config file; known are {}",
                known.join(", ")
            )));
        }
    }
    let every: Vec<(&String, &Storage)> = regions
        .iter()
        .flat_map(|(region, all)| all.storages.iter().map(move |storage| (region, storage)))
        .filter(|(_, storage)| storage.storage == want.storage)
        .collect();
    if every.is_empty() {
        return Err(Refusal::Wrong(unknown_storage(want, regions)));
    }
    // Where no term is met, the storage is nowhere; where there are none, everywhere.
    let term_of = |region: &str, host: &str| match want.terms.is_empty() {
        true => Some(0),
        false => want.terms.iter().position(|term| term.fits(region, host)),
    };
    let chosen: Vec<(usize, &String, &Storage)> =
        every.iter().filter_map(|(region, storage)| Some((term_of(region, &storage.host)?, *region, *storage))).collect();
    if chosen.is_empty() {
        let zones: Vec<String> = every.iter().map(|(region, storage)| format!("{region}/{}", storage.host)).collect();
        return Err(Refusal::NotHere(format!(
            "storage {:?} is in none of the zones asked for; it is in {}",
            want.storage,
            zones.join(", ")
        )));
    }
    let of: BTreeSet<&str> = chosen.iter().map(|(_, region, _)| region.as_str()).collect();
    if of.len() > 1 && want.terms.iter().all(|term| term.region.is_none()) {
        return Err(Refusal::Wrong(format!(
            "storage {:?} is in several regions ({}), and the request names none; set allowedTopologies with {} in the StorageClass, or let the \
             provisioner send the nodes' topology",
            want.storage,
            of.into_iter().collect::<Vec<_>>().join(", "),
            proto::TOPOLOGY_REGION
        )));
    }
    usable(want, seen, &chosen)
}

/// Region and node of each storage of the request that cannot be looked at now, local to a node as it is.
#[must_use]
pub fn skipped(want: &Want, regions: &BTreeMap<String, std::sync::Arc<Resources>>) -> Vec<(String, String)> {
    let every = regions.iter().flat_map(|(region, all)| all.storages.iter().map(move |storage| (region, all, storage)));
    let those = every.filter(|(region, all, storage)| {
        let is_asked_for = want.terms.is_empty() || want.terms.iter().any(|term| term.fits(region, &storage.host));
        storage.storage == want.storage && !storage.shared && is_asked_for && !is_up(all, storage)
    });
    those.map(|(region, _, storage)| (region.clone(), storage.host.clone())).collect()
}

/// A storage counts as active for five minutes after its node went silent; the node's own status is quicker.
#[must_use]
pub fn is_up(all: &Resources, storage: &Storage) -> bool {
    storage.active && all.hosts.get(&storage.host).is_none_or(|status| status != "offline")
}

/// What the storage of one node is good for.
///
/// # Errors
/// It holds no such volumes, here or anywhere.
fn fit(want: &Want, storage: &Storage) -> Result<(Plugin, u64), Refusal> {
    let name = &want.storage;
    let format = want.format.as_deref().unwrap_or("raw");
    let Some(plugin) = Plugin::of(&storage.plugin, format) else {
        return Err(Refusal::Wrong(format!(
            "storage {name:?} is of type {:?}, which cannot hold new VM disks; those that can are dir, nfs, cifs, btrfs, lvm, lvmthin, zfspool, \
             zfs and rbd",
            storage.plugin
        )));
    };
    if !storage.images {
        return Err(Refusal::Wrong(format!(
            "storage {name:?} does not take VM disks; add \"Disk image\" to its content in Datacenter > Storage"
        )));
    }
    if format == "qcow2" && !plugin.has_suffix() {
        return Err(Refusal::Wrong(format!(
            "parameter storageFormat \"qcow2\" needs a file storage, or lvm with snapshot-as-volume-chain; {name:?} is of type {:?}: remove it",
            storage.plugin
        )));
    }
    if storage.plugin == "lvm" && want.room.is_overcommitting() {
        return Err(Refusal::Wrong(format!("parameter storageOvercommit needs a thin storage; {name:?} is of type \"lvm\": remove it")));
    }
    let size_bytes = size(plugin, want.required_bytes, want.limit_bytes).map_err(Refusal::OutOfRange)?;
    Ok((plugin, size_bytes))
}

fn usable(want: &Want, seen: Seen<'_>, chosen: &[(usize, &String, &Storage)]) -> Result<Vec<Candidate>, Refusal> {
    let (mut found, mut inactive): (Vec<(Candidate, Rank)>, Vec<String>) = (Vec::new(), Vec::new());
    let mut most_bytes = 0;
    for (term, region, storage) in chosen {
        let (plugin, size_bytes) = fit(want, storage)?;
        let Some(all) = seen.regions.get(*region) else { continue };
        if !is_up(all, storage) {
            inactive.push(format!("{region}/{}", storage.host));
            continue;
        }
        // A shared one is one place, whichever of its nodes is asked; the first in the order of terms is.
        let zone = if storage.shared { String::new() } else { storage.host.clone() };
        let free_bytes = want.room.left_bytes(storage, seen.promised.of(region, storage));
        most_bytes = most_bytes.max(want.room.most_bytes(storage));
        let load = seen.loads.get(&(region.to_string(), zone.clone())).copied().unwrap_or_default();
        let rank = Rank::new(*term, free_bytes, size_bytes, storage.total_bytes, load);
        let reach = if storage.shared { reach(all, &storage.storage) } else { vec![storage.host.clone()] };
        let host = storage.host.clone();
        let candidate = Candidate { region: (*region).clone(), zone, host, reach, plugin, free_bytes, size_bytes };
        match found.iter_mut().find(|(one, _)| storage.shared && (&one.region, &one.zone) == (&candidate.region, &candidate.zone)) {
            None => found.push((candidate, rank)),
            Some(one) if rank.term < one.1.term => *one = (candidate, rank),
            Some(_) => (),
        }
    }
    if found.is_empty() {
        return Err(Refusal::NotHere(format!("storage {:?} is not active on {}", want.storage, inactive.join(", "))));
    }
    if found.iter().all(|(candidate, _)| candidate.size_bytes > most_bytes) {
        return Err(Refusal::OutOfRange(format!(
            "required_bytes {} is beyond storage {:?}: the largest of the zones asked for has {most_bytes} bytes in all",
            want.required_bytes, want.storage
        )));
    }
    Ok(ranked(want.order, found))
}

/// The Proxmox nodes that have a storage; empty where all of the cluster do.
fn reach(all: &Resources, storage: &str) -> Vec<String> {
    let having: BTreeSet<&String> = all.storages.iter().filter(|one| one.storage == storage).map(|one| &one.host).collect();
    if all.hosts.keys().all(|host| having.contains(host)) { Vec::new() } else { having.into_iter().cloned().collect() }
}

/// The first candidate, if it has room.
///
/// # Errors
/// None has.
pub fn with_room<'a>(want: &Want, candidates: &'a [Candidate]) -> Result<&'a Candidate, Refusal> {
    match candidates.first() {
        Some(first) if first.free_bytes >= first.size_bytes => Ok(first),
        _ => {
            let room: Vec<String> = candidates.iter().map(|one| format!("{}/{}: {} bytes", one.region, one.host, one.free_bytes)).collect();
            Err(Refusal::NotHere(format!(
                "storage {:?} has no room for {} bytes in the zones asked for ({}: {}{})",
                want.storage,
                want.required_bytes,
                if want.room == Room::default() { "free" } else { "left" },
                room.join(", "),
                want.room
            )))
        }
    }
}

fn unknown_storage(want: &Want, regions: &BTreeMap<String, std::sync::Arc<Resources>>) -> String {
    let mut known: Vec<&str> = regions
        .values()
        .flat_map(|all| all.storages.iter().filter(|storage| storage.images).map(|storage| storage.storage.as_str()))
        .collect();
    known.sort_unstable();
    known.dedup();
    let known = if known.is_empty() { "none".into() } else { known.join(", ") };
    format!(
        "parameter storage {:?}: no such storage is shown to us; shown are {known} (a storage shows itself to a token whose role has \
         Datastore.Audit on /storage/{})",
        want.storage, want.storage
    )
}

/// Bytes to ask for: whole MiB (LVM: whole extents), or the storage's step where the limit is narrower, never above the limit.
///
/// # Errors
/// The storage has no size between the two.
pub fn size(plugin: Plugin, required_bytes: u64, limit_bytes: Option<u64>) -> Result<u64, String> {
    let up = |step: u64| required_bytes.checked_next_multiple_of(step);
    let fits = |bytes: &u64| limit_bytes.is_none_or(|limit| *bytes <= limit);
    let coarse = up(if plugin == Plugin::Lvm { LVM_EXTENT } else { MIB });
    coarse.filter(fits).or_else(|| up(plugin.step_bytes()).filter(fits)).ok_or_else(|| {
        let limit = limit_bytes.map_or_else(String::new, |limit| format!(" and limit_bytes {limit}"));
        format!(
            "required_bytes {required_bytes}{limit} leave no size that the storage can have; it allocates in steps of {} bytes",
            plugin.step_bytes()
        )
    })
}

/// A volume's size as a guest will see it, from what Proxmox shows of one that should have `size_bytes`: of a qcow2 on LVM it shows
/// the logical volume, which holds the tables for every block of it, too (`qemu-img measure`: fully allocated).
#[must_use]
pub fn virtual_bytes(plugin: Plugin, size_bytes: u64, shown_bytes: u64) -> u64 {
    let most = size_bytes.saturating_add(size_bytes / 4096).saturating_add(2 * LVM_EXTENT);
    if plugin == Plugin::LvmChain && (size_bytes..=most).contains(&shown_bytes) { size_bytes } else { shown_bytes }
}

/// The image's name without a folder: `vm-<owner>-<name>[.format]`. Long or odd names are shortened, and carry a hash of
/// the whole; the same name always gives the same disk.
#[must_use]
pub fn disk_name(owner: u32, name: &str, plugin: Plugin, format: &str) -> String {
    let suffix = if plugin.has_suffix() { format!(".{format}") } else { String::new() };
    let plain = format!("vm-{owner}-{name}");
    let charset = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    let ends = |name: &str| name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.ends_with(|c: char| c.is_ascii_alphanumeric());
    if charset && ends(name) && width(&plain) <= MAX_DISK_NAME {
        return plain + &suffix;
    }
    let clean: String = name.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(24).collect();
    let clean = clean.trim_matches('-');
    let hash: String = Sha256::digest(name).iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    let dash = if clean.is_empty() { "" } else { "-" };
    format!("vm-{owner}-{clean}{dash}{hash}{suffix}")
}

/// As long as device-mapper sees it.
fn width(name: &str) -> usize {
    name.len() + name.bytes().filter(|b| *b == b'-').count()
}

/// The disk part of the volume handle: file storages keep a folder per owner.
#[must_use]
pub fn disk_of(owner: u32, name: &str, plugin: Plugin) -> String {
    if plugin == Plugin::File { format!("{owner}/{name}") } else { name.to_string() }
}

#[cfg(test)]
mod tests;
