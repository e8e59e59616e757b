//! Where a new volume goes: requirement and cluster snapshot → zone and storage, size, disk name. Pure.
//!
//! Only storages local to one Proxmox node are provisioned by this version; a shared one is refused by name.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use crate::pve::api::{Resources, Storage};

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
    /// In order of preference; empty: anywhere.
    pub terms: Vec<Term>,
    /// `raw` or `qcow2`.
    pub format: Option<String>,
}

/// One topology segment: a region, a zone, or both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Term {
    /// The Proxmox cluster.
    pub region: Option<String>,
    /// The Proxmox node.
    pub zone: Option<String>,
}

/// A zone that could hold the volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// The Proxmox cluster.
    pub region: String,
    /// The Proxmox node.
    pub zone: String,
    /// The storage's plugin.
    pub plugin: Plugin,
    /// What is left there.
    pub free_bytes: u64,
    /// What the volume takes there.
    pub size_bytes: u64,
}

/// How a storage names and sizes its volumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plugin {
    /// dir, nfs, cifs, btrfs: a file in a folder per owner.
    File,
    /// lvm, lvmthin: extents.
    Lvm,
    /// zfspool, zfs, rbd: whole MiB.
    Block,
}

impl Plugin {
    /// By Proxmox's `plugintype`; nothing for those that hold no new disks.
    #[must_use]
    pub fn named(plugintype: &str) -> Option<Self> {
        match plugintype {
            "dir" | "nfs" | "cifs" | "btrfs" => Some(Self::File),
            "lvm" | "lvmthin" => Some(Self::Lvm),
            "zfspool" | "zfs" | "rbd" => Some(Self::Block),
            _ => None,
        }
    }

    /// The steps it allocates in, in bytes.
    #[must_use]
    pub fn step_bytes(self) -> u64 {
        match self {
            Self::File => KIB,
            Self::Lvm => LVM_EXTENT,
            Self::Block => MIB,
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
pub fn candidates(want: &Want, regions: &BTreeMap<String, std::sync::Arc<Resources>>) -> Result<Vec<Candidate>, Refusal> {
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
    let mut chosen: Vec<(&String, &Storage)> = Vec::new();
    for fits in terms_of(want) {
        let mut of_term: Vec<_> = every.iter().filter(|(region, storage)| fits(region, &storage.host)).copied().collect();
        of_term.sort_by_key(|(_, storage)| std::cmp::Reverse(free(storage)));
        for found in of_term {
            if !chosen.iter().any(|(region, storage)| (*region, &storage.host) == (found.0, &found.1.host)) {
                chosen.push(found);
            }
        }
    }
    if chosen.is_empty() {
        let zones: Vec<String> = every.iter().map(|(region, storage)| format!("{region}/{}", storage.host)).collect();
        return Err(Refusal::NotHere(format!(
            "storage {:?} is in none of the zones asked for; it is in {}",
            want.storage,
            zones.join(", ")
        )));
    }
    // A storage counts as active for five minutes after its node went silent; the node's own status is quicker.
    let is_up = |region: &str, storage: &Storage| {
        let status = regions.get(region).and_then(|all| all.hosts.get(&storage.host));
        storage.active && status.is_none_or(|status| status != "offline")
    };
    usable(want, &chosen, is_up)
}

fn usable(want: &Want, chosen: &[(&String, &Storage)], is_up: impl Fn(&str, &Storage) -> bool) -> Result<Vec<Candidate>, Refusal> {
    let mut found = Vec::new();
    let mut inactive = Vec::new();
    for (region, storage) in chosen {
        let name = &want.storage;
        if storage.shared {
            return Err(Refusal::Wrong(format!(
                "storage {name:?} is shared between Proxmox nodes; this version provisions on storages local to one node"
            )));
        }
        if !storage.images {
            return Err(Refusal::Wrong(format!(
                "storage {name:?} does not take VM disks; add \"Disk image\" to its content in Datacenter > Storage"
            )));
        }
        let Some(plugin) = Plugin::named(&storage.plugin) else {
            return Err(Refusal::Wrong(format!("storage {name:?} is of type {:?}, which takes no new disks", storage.plugin)));
        };
        if want.format.as_deref() == Some("qcow2") && plugin != Plugin::File {
            return Err(Refusal::Wrong(format!(
                "parameter storageFormat \"qcow2\" needs a file storage; {name:?} is of type {:?}: remove it",
                storage.plugin
            )));
        }
        let size_bytes = size(plugin, want.required_bytes, want.limit_bytes).map_err(Refusal::OutOfRange)?;
        if is_up(region, storage) {
            let free_bytes = free(storage);
            found.push((
                Candidate { region: (*region).clone(), zone: storage.host.clone(), plugin, free_bytes, size_bytes },
                storage.total_bytes,
            ));
        } else {
            inactive.push(format!("{region}/{}", storage.host));
        }
    }
    if found.is_empty() {
        return Err(Refusal::NotHere(format!("storage {:?} is not active on {}", want.storage, inactive.join(", "))));
    }
    if found.iter().all(|(candidate, total)| candidate.size_bytes > *total) {
        let largest = found.iter().map(|(_, total)| *total).max().unwrap_or(0);
        return Err(Refusal::OutOfRange(format!(
            "required_bytes {} is beyond storage {:?}: the largest of the zones asked for has {largest} bytes in all",
            want.required_bytes, want.storage
        )));
    }
    // Zones with room first; a stable sort keeps the order of preference.
    found.sort_by_key(|(candidate, _)| candidate.free_bytes < candidate.size_bytes);
    Ok(found.into_iter().map(|(candidate, _)| candidate).collect())
}

/// The first candidate, if it has room.
///
/// # Errors
/// None has.
pub fn with_room<'a>(want: &Want, candidates: &'a [Candidate]) -> Result<&'a Candidate, Refusal> {
    match candidates.first() {
        Some(first) if first.free_bytes >= first.size_bytes => Ok(first),
        _ => {
            let room: Vec<String> = candidates.iter().map(|one| format!("{}/{}: {} bytes", one.region, one.zone, one.free_bytes)).collect();
            Err(Refusal::NotHere(format!(
                "storage {:?} has no room for {} bytes in the zones asked for (free: {})",
                want.storage,
                want.required_bytes,
                room.join(", ")
            )))
        }
    }
}

fn free(storage: &Storage) -> u64 {
    storage.total_bytes.saturating_sub(storage.used_bytes)
}

type Fits<'a> = Box<dyn Fn(&str, &str) -> bool + 'a>;

fn terms_of(want: &Want) -> Vec<Fits<'_>> {
    if want.terms.is_empty() {
        return vec![Box::new(|_, _| true)];
    }
    let fits = |term: &'_ Term| -> Fits<'_> {
        let (wanted_region, wanted_zone) = (term.region.clone(), term.zone.clone());
        Box::new(move |region, zone| {
            wanted_region.as_ref().is_none_or(|wanted| wanted == region) && wanted_zone.as_ref().is_none_or(|wanted| wanted == zone)
        })
    };
    want.terms.iter().map(fits).collect()
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

/// Bytes to ask for: whole MiB, or the storage's step where the limit is narrower, never above the limit.
///
/// # Errors
/// The storage has no size between the two.
pub fn size(plugin: Plugin, required_bytes: u64, limit_bytes: Option<u64>) -> Result<u64, String> {
    let up = |step: u64| required_bytes.checked_next_multiple_of(step);
    let fits = |bytes: &u64| limit_bytes.is_none_or(|limit| *bytes <= limit);
    let coarse = up(if plugin == Plugin::Lvm && limit_bytes.is_some() { LVM_EXTENT } else { MIB });
    coarse.filter(fits).or_else(|| up(plugin.step_bytes()).filter(fits)).ok_or_else(|| {
        let limit = limit_bytes.map_or_else(String::new, |limit| format!(" and limit_bytes {limit}"));
        format!(
            "required_bytes {required_bytes}{limit} leave no size that the storage can have; it allocates in steps of {} bytes",
            plugin.step_bytes()
        )
    })
}

/// The image's name without a folder: `vm-<owner>-<name>[.format]`. Long or odd names are shortened, and carry a hash of
/// the whole; the same name always gives the same disk.
#[must_use]
pub fn disk_name(owner: u32, name: &str, plugin: Plugin, format: &str) -> String {
    let suffix = if plugin == Plugin::File { format!(".{format}") } else { String::new() };
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
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;

    const GIB: u64 = 1 << 30;

    fn storage(host: &str, plugin: &str, total: u64, used: u64) -> Storage {
        Storage {
            storage: "ds".into(),
            host: host.into(),
            plugin: plugin.into(),
            active: true,
            shared: false,
            images: true,
            total_bytes: total,
            used_bytes: used,
        }
    }

    fn regions(storages: Vec<Storage>) -> BTreeMap<String, Arc<Resources>> {
        BTreeMap::from([("r".to_string(), Arc::new(Resources { storages, ..Resources::default() }))])
    }

    fn want(terms: &[&str]) -> Want {
        let terms = terms.iter().map(|zone| Term { region: Some("r".into()), zone: Some((*zone).into()) }).collect();
        Want { storage: "ds".into(), required_bytes: GIB, limit_bytes: None, terms, format: None }
    }

    fn zones(want: &Want, regions: &BTreeMap<String, Arc<Resources>>) -> Vec<String> {
        candidates(want, regions).unwrap().into_iter().map(|one| one.zone).collect()
    }

    #[test]
    fn without_topology_the_zone_with_most_room_is_first() {
        let all = regions(vec![storage("a", "dir", 10 * GIB, 5 * GIB), storage("b", "dir", 10 * GIB, GIB), storage("c", "dir", GIB, 0)]);
        assert_eq!(zones(&want(&[]), &all), ["b", "a", "c"]);
    }

    #[test]
    fn preference_beats_room_and_room_beats_none() {
        let all = regions(vec![storage("a", "lvm", 10 * GIB, 5 * GIB), storage("b", "lvm", 10 * GIB, GIB)]);
        assert_eq!(zones(&want(&["a", "b"]), &all), ["a", "b"]);
        let all = regions(vec![storage("a", "lvm", 10 * GIB, 10 * GIB), storage("b", "lvm", 10 * GIB, GIB)]);
        assert_eq!(zones(&want(&["a", "b"]), &all), ["b", "a"]);
        assert_eq!(zones(&want(&["a"]), &all), ["a"]);
        let full = candidates(&want(&["a"]), &all).unwrap();
        assert!(matches!(with_room(&want(&["a"]), &full), Err(Refusal::NotHere(why)) if why.contains("r/a: 0 bytes")));
    }

    #[test]
    fn a_node_that_is_offline_has_no_active_storage() {
        let hosts = BTreeMap::from([("a".to_string(), "offline".to_string()), ("b".to_string(), "online".to_string())]);
        let storages = vec![storage("a", "dir", 10 * GIB, 0), storage("b", "dir", 10 * GIB, 5 * GIB)];
        let all = BTreeMap::from([("r".to_string(), Arc::new(Resources { storages, hosts, ..Resources::default() }))]);
        assert_eq!(zones(&want(&[]), &all), ["b"]);
        assert!(matches!(candidates(&want(&["a"]), &all), Err(Refusal::NotHere(why)) if why.contains("not active on r/a")));
    }

    #[test]
    fn each_refusal_says_why() {
        let refused = |want: &Want, all: Vec<Storage>| format!("{:?}", candidates(want, &regions(all)).unwrap_err());
        let one = |change: &dyn Fn(&mut Storage)| {
            let mut one = storage("a", "dir", 10 * GIB, 0);
            change(&mut one);
            vec![one]
        };
        assert!(refused(&want(&[]), vec![]).contains("Datastore.Audit"));
        assert!(refused(&want(&["z"]), one(&|_| ())).contains("it is in r/a"));
        assert!(refused(&want(&[]), one(&|s| s.active = false)).contains("not active on r/a"));
        assert!(refused(&want(&[]), one(&|s| s.shared = true)).contains("shared"));
        assert!(refused(&want(&[]), one(&|s| s.images = false)).contains("Disk image"));
        assert!(refused(&want(&[]), one(&|s| s.plugin = "pbs".into())).contains("no new disks"));
        let beyond = Want { required_bytes: 11 * GIB, ..want(&[]) };
        assert!(refused(&beyond, one(&|_| ())).contains("OutOfRange"));
        let qcow2 = Want { format: Some("qcow2".into()), ..want(&[]) };
        assert!(refused(&qcow2, one(&|s| s.plugin = "lvmthin".into())).contains("file storage"));
        let nowhere = Want { terms: vec![Term { region: Some("q".into()), zone: None }], ..want(&[]) };
        assert!(refused(&nowhere, one(&|_| ())).contains("known are r"));
    }

    #[test]
    fn sizes_meet_required_and_limit() {
        assert_eq!(size(Plugin::File, 64 << 20, Some(64 << 20)), Ok(64 << 20));
        assert_eq!(size(Plugin::File, (64 << 20) + 1, None), Ok(65 << 20));
        assert_eq!(size(Plugin::File, 1025, Some(2048)), Ok(2048));
        assert_eq!(size(Plugin::Block, 1, None), Ok(1 << 20));
        assert!(size(Plugin::Block, 1, Some(1000)).unwrap_err().contains("steps of 1048576"));
        assert_eq!(size(Plugin::Lvm, 5 << 20, None), Ok(5 << 20));
        assert_eq!(size(Plugin::Lvm, 5 << 20, Some(8 << 20)), Ok(8 << 20));
        assert!(size(Plugin::Lvm, 5 << 20, Some(7 << 20)).is_err());
        assert!(size(Plugin::File, u64::MAX, None).is_err());
    }

    #[test]
    fn names_stay_where_they_can() {
        let pv = "pvc-0d79ea1c-3a9b-4d6e-9f0e-1f3e2a7b9c11";
        assert_eq!(disk_name(9999, pv, Plugin::Lvm, "raw"), format!("vm-9999-{pv}"));
        assert_eq!(disk_name(9999, pv, Plugin::File, "qcow2"), format!("vm-9999-{pv}.qcow2"));
        let sanity = format!("sanity-controller-create-maxlen-1F2E3D4C-5B6A7988{}", "a".repeat(79));
        let name = disk_name(9999, &sanity, Plugin::Lvm, "raw");
        assert!(width(&name) <= MAX_DISK_NAME, "{name}");
        assert_ne!(name, disk_name(9999, &format!("{}b", &sanity[..127]), Plugin::Lvm, "raw"));
        assert_eq!(disk_of(9999, "vm-9999-a.raw", Plugin::File), "9999/vm-9999-a.raw");
    }

    proptest! {
        #[test]
        fn every_name_gives_a_volume_handle(name in "\\PC{1,140}", owner in 100u32..999_999_999) {
            for plugin in [Plugin::File, Plugin::Lvm, Plugin::Block] {
                let disk = disk_name(owner, &name, plugin, "raw");
                prop_assert!(width(&disk) <= MAX_DISK_NAME + 4);
                let begins = format!("vm-{}-", owner);
                prop_assert!(disk.starts_with(&begins) && disk.ends_with(|c: char| c.is_ascii_alphanumeric()));
                let handle = format!("r/z/ds/{}", disk_of(owner, &disk, plugin)).parse::<proto::VolumeHandle>();
                prop_assert_eq!(handle.unwrap().owner_vmid(), Some(owner));
            }
        }
    }
}
