//! ListVolumes: every volume of ours, where it is published, and how it is.
//!
//! What there is: what the storages list under our owner VMIDs, and, with Kubernetes, every PV of this driver under its own handle.
//! Where it is published: what QEMU has of it in the VMs that are Kubernetes nodes, by the ids that their agents gave; without
//! Kubernetes nobody knows those ids, and they are not said.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proto::VolumeHandle;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Controller;
use super::condition::{Condition, Held, Place, condition, held};
use super::region::{EVIDENCE_AGE, Known, Region, ago, locked};
use crate::error::Error;
use crate::kube::{CsiNode, Kube};
use crate::pve::api::{self, Resources, VmState};
use crate::pve::drive::volume_of;
use crate::request::ListPage;

/// Entries of one answer, whatever was asked for: some 300 KiB, where gRPC clients take 4 MiB.
pub(super) const MAX_ENTRIES: usize = 1000;
/// external-attacher asks every minute, and a listing reads every image of a storage: what others make or delete is seen after this long,
/// what we do at once.
const LISTING_AGE: Duration = Duration::from_secs(300);
/// The reference driver's snapshots are disks under the same owner: `vm-9999-snapshot-<uuid>`.
const SNAPSHOT_NAME: &str = "snapshot-";

/// One volume.
#[derive(Debug, Clone)]
pub struct Listed {
    /// As its PV has it, where there is one.
    pub handle: VolumeHandle,
    /// Nothing: not known now.
    pub size_bytes: Option<u64>,
    /// Kubernetes nodes that have it, by the ids of their agents.
    pub nodes: Vec<String>,
    /// How it is.
    pub condition: Condition,
}

/// Some volumes, and where to go on.
#[derive(Debug)]
pub struct Page {
    /// In the order of their handles.
    pub entries: Vec<Listed>,
    /// Empty: these were the last.
    pub next_token: String,
}

/// volid → bytes, where shown.
type Listing = Arc<BTreeMap<String, Option<u64>>>;

/// What the storages were last seen to have.
#[derive(Debug, Default)]
pub(super) struct Listings {
    /// Proxmox node and storage → what was read, and since when it is so.
    read: Mutex<HashMap<(String, String), (Instant, Listing)>>,
    /// Storage → when we last made or deleted something there.
    changed: Mutex<HashMap<String, Instant>>,
}

impl Listings {
    /// We made or deleted something there, just now.
    pub(super) fn note_changed(&self, volid: &str) {
        let storage = volid.split(':').next().unwrap_or_default();
        locked(&self.changed).insert(storage.into(), Instant::now());
    }

    fn get(&self, host: &str, storage: &str) -> Option<Listing> {
        let changed = locked(&self.changed).get(storage).copied();
        let read = locked(&self.read);
        let (at, listing) = read.get(&(host.to_owned(), storage.to_owned()))?;
        (at.elapsed() < LISTING_AGE && changed.is_none_or(|changed| changed < *at)).then(|| Arc::clone(listing))
    }
}

/// A storage as one place: of each node, or of all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Source {
    /// Empty where it is shared.
    zone: String,
    storage: String,
    /// Whom to ask.
    host: String,
    active: bool,
}

/// The storages that may hold volumes, each once.
fn sources(resources: &Resources) -> Vec<Source> {
    let mut all: BTreeMap<(String, String), Source> = BTreeMap::new();
    for one in resources.storages.iter().filter(|one| one.images) {
        let zone = if one.shared { String::new() } else { one.host.clone() };
        let is_online = resources.hosts.get(&one.host).is_none_or(|status| status == "online");
        let source = Source { zone: zone.clone(), storage: one.storage.clone(), host: one.host.clone(), active: one.active && is_online };
        let known = all.entry((zone, one.storage.clone())).or_insert_with(|| source.clone());
        if source.active && !known.active {
            *known = source;
        }
    }
    all.into_values().collect()
}

/// The same volume by one name, whatever zone an older release wrote into the handle of a shared one.
fn canonical(handle: &VolumeHandle, resources: &Resources) -> VolumeHandle {
    let is_shared = resources.storages.iter().any(|one| one.storage == handle.storage && one.shared);
    VolumeHandle { zone: if is_shared { String::new() } else { handle.zone.clone() }, ..handle.clone() }
}

/// One region's volumes by their canonical handles.
#[derive(Debug, Default)]
struct Found {
    volumes: BTreeMap<VolumeHandle, Listed>,
    holders: BTreeMap<VolumeHandle, Vec<Held>>,
}

impl Controller {
    /// A page of what there is.
    ///
    /// # Errors
    /// ABORTED for a token that is none of ours; Proxmox's or Kubernetes'.
    pub async fn list(&self, page: &ListPage) -> Result<Page, Error> {
        let clusters = self.clusters()?;
        let after: Option<VolumeHandle> = match page.starting_token.as_str() {
            "" => None,
            token => match token.parse::<VolumeHandle>() {
                Ok(handle) if clusters.regions.contains_key(&handle.region) => Some(handle),
                _ => return Err(Error::aborted("starting_token is none of ours; begin again without one")),
            },
        };
        let mut owners = clusters.features.delete_also_owned_by.clone();
        owners.insert(clusters.features.controller_vmid);
        let nodes = match &self.kube {
            Some(kube) => kube.nodes().await.map_err(Error::unavailable)?,
            None => Arc::default(),
        };
        let is_past = |region: &str| after.as_ref().is_some_and(|after| region < after.region.as_str());
        let mut volumes: BTreeMap<VolumeHandle, Listed> = BTreeMap::new();
        for (name, region) in clusters.regions.iter().filter(|(name, _)| !is_past(name)) {
            let only = clusters.regions.len() == 1;
            let of_region = match (region.resources(ago(EVIDENCE_AGE)).await, &self.kube) {
                // One cluster that is away must not keep what is known of the others from anybody.
                (Err(error), Some(kube)) if !only => region.volumes_by_kubernetes(kube, &nodes, &error.to_string()).await,
                _ => region.volumes(&owners, self.kube.as_ref(), &nodes, only).await,
            };
            volumes.extend(of_region.map_err(|error| error.during(&format!("region {name}")))?);
        }
        let most = if page.max_entries == 0 { MAX_ENTRIES } else { page.max_entries.min(MAX_ENTRIES) };
        let mut rest = volumes.into_iter().filter(|(handle, _)| after.as_ref().is_none_or(|after| handle > after));
        let entries: Vec<Listed> = rest.by_ref().take(most).map(|(_, listed)| listed).collect();
        let last = entries.last().map(|last| last.handle.to_string()).unwrap_or_default();
        let next_token = if rest.next().is_some() { last } else { String::new() };
        Ok(Page { entries, next_token })
    }
}

impl Region {
    /// This region's volumes by the handles that they are listed under.
    async fn volumes(
        self: &Arc<Self>,
        owners: &BTreeSet<u32>,
        kube: Option<&Arc<Kube>>,
        nodes: &[CsiNode],
        is_only: bool,
    ) -> Result<BTreeMap<VolumeHandle, Listed>, Error> {
        let resources = self.resources(ago(EVIDENCE_AGE)).await?;
        let mut unread = BTreeMap::new();
        let mut found = self.listed(owners, &resources, &mut unread).await?;
        match kube {
            // A failed look is no absence: without the PVs nobody can say what is on a storage that does not answer.
            None => {
                if let Some(((zone, storage), why)) = unread.pop_first() {
                    let at = if zone.is_empty() { String::new() } else { format!(" of Proxmox node {zone}") };
                    return Err(Error::unavailable(format!("what is on storage {storage:?}{at} cannot be told: {why}")));
                }
            }
            Some(kube) => {
                self.add_pvs(kube, &resources, &unread, &mut found).await?;
                self.add_nodes(kube, nodes, is_only, &resources, &mut found).await?;
            }
        }
        let holders = found.holders;
        let listed = found.volumes.into_iter().map(|(key, mut listed)| {
            let held = holders.get(&key).map(Vec::as_slice).unwrap_or_default();
            if !listed.condition.abnormal {
                listed.condition = condition(&Place::Fine, held);
            }
            (listed.handle.clone(), listed)
        });
        Ok(listed.collect())
    }

    /// The PVs of a cluster that does not answer, and where Kubernetes has them attached.
    async fn volumes_by_kubernetes(&self, kube: &Arc<Kube>, nodes: &[CsiNode], why: &str) -> Result<BTreeMap<VolumeHandle, Listed>, Error> {
        let mut all = BTreeMap::new();
        for pv in kube.pvs().await.map_err(Error::unavailable)?.iter() {
            let Some(handle) = pv.handle.parse::<VolumeHandle>().ok().filter(|handle| handle.region == self.name) else { continue };
            let (size_bytes, condition) = (self.noted_size(&handle), condition(&Place::Unread(why.into()), &[]));
            all.insert(handle.clone(), Listed { handle, size_bytes, nodes: Vec::new(), condition });
        }
        for node in nodes {
            for (given, is_attached) in kube.attached_to(&node.name).await.map_err(Error::unavailable)? {
                let listed = given.parse::<VolumeHandle>().ok().filter(|_| is_attached).and_then(|handle| all.get_mut(&handle));
                listed.into_iter().for_each(|listed| listed.nodes.push(node.node_id.clone()));
            }
        }
        Ok(all)
    }

    /// What the storages list, read side by side; `unread`: zone and storage → why not.
    async fn listed(
        self: &Arc<Self>,
        owners: &BTreeSet<u32>,
        resources: &Arc<Resources>,
        unread: &mut BTreeMap<(String, String), String>,
    ) -> Result<Found, Error> {
        let mut reading = JoinSet::new();
        for source in sources(resources) {
            if !source.active {
                let why = format!("the storage is not active on Proxmox node {}", source.host);
                unread.insert((source.zone, source.storage), why);
                continue;
            }
            let (region, owners) = (Arc::clone(self), owners.clone());
            reading.spawn(proto::log::carried(async move {
                let listing = region.listing(&source, &owners).await;
                (source, listing)
            }));
        }
        let mut found = Found::default();
        while let Some(read) = reading.join_next().await {
            let (source, listing) = read.map_err(|cause| Error::internal(format!("a listing broke off: {cause}")))?;
            let listing = match listing {
                Ok(listing) => listing,
                Err(error) => {
                    unread.insert((source.zone, source.storage), error.text);
                    continue;
                }
            };
            for (volid, size_bytes) in listing.iter() {
                let Some(disk) = volid.split_once(':').map(|(_, disk)| disk).filter(|disk| !is_snapshot(disk)) else { continue };
                let (region, zone, storage) = (self.name.clone(), source.zone.clone(), source.storage.clone());
                let handle = VolumeHandle { region, zone, storage, disk: disk.into() };
                // What we could not take back as a volume id is no volume of ours.
                if handle.to_string().parse::<VolumeHandle>().is_ok() {
                    let condition = Condition::default();
                    let listed = Listed { handle: handle.clone(), size_bytes: *size_bytes, nodes: Vec::new(), condition };
                    found.volumes.insert(handle, listed);
                }
            }
        }
        Ok(found)
    }

    async fn listing(&self, source: &Source, owners: &BTreeSet<u32>) -> Result<Listing, Error> {
        if let Some(listing) = self.listings.get(&source.host, &source.storage) {
            return Ok(listing);
        }
        let read_at = Instant::now();
        let mut all = BTreeMap::new();
        for owner in owners {
            let _turn = self.readers.acquire().await;
            let request = api::content(&source.host, &source.storage, *owner);
            let call = request.name();
            all.extend(api::read_content(&call, &self.client().call(request).await?)?);
        }
        let listing: Listing = Arc::new(all);
        locked(&self.listings.read).insert((source.host.clone(), source.storage.clone()), (read_at, Arc::clone(&listing)));
        Ok(listing)
    }

    /// Every PV of ours is there under its own handle, also one of another owner, or whose storage does not answer.
    async fn add_pvs(
        self: &Arc<Self>,
        kube: &Arc<Kube>,
        resources: &Resources,
        unread: &BTreeMap<(String, String), String>,
        found: &mut Found,
    ) -> Result<(), Error> {
        for pv in kube.pvs().await.map_err(Error::unavailable)?.iter() {
            let Ok(handle) = pv.handle.parse::<VolumeHandle>() else { continue };
            if handle.region != self.name {
                continue;
            }
            let key = canonical(&handle, resources);
            if let Some(listed) = found.volumes.get_mut(&key) {
                listed.handle = handle;
                continue;
            }
            let place = match unread.get(&(key.zone.clone(), key.storage.clone())) {
                Some(why) => Place::Unread(why.clone()),
                // Another owner's, or made by others since its storage was listed; or gone.
                None => self.place(&handle).await?,
            };
            let size_bytes = self.noted_size(&handle);
            let condition = if place == Place::Fine { Condition::default() } else { condition(&place, &[]) };
            found.volumes.insert(key, Listed { handle, size_bytes, nodes: Vec::new(), condition });
        }
        Ok(())
    }

    /// What the VMs that are Kubernetes nodes have.
    async fn add_nodes(
        self: &Arc<Self>,
        kube: &Arc<Kube>,
        nodes: &[CsiNode],
        is_only: bool,
        resources: &Resources,
        found: &mut Found,
    ) -> Result<(), Error> {
        let mut seen = BTreeSet::new();
        for node in nodes {
            let Some(vm) = self.vm_of_node(node, is_only).await? else { continue };
            if let Some((known, state)) = self.as_read(vm.vmid, &vm.host).await? {
                let named = named_in(&known);
                for (key, listed) in &mut found.volumes {
                    let volid = key.volid();
                    if (!key.zone.is_empty() && key.zone != vm.host) || !named.contains(volid.as_str()) {
                        continue;
                    }
                    let held = held(vm.vmid, &vm.host, &known, &state, &volid);
                    if held.iter().any(|one| one.is_attached) {
                        listed.nodes.push(node.node_id.clone());
                    }
                    if seen.insert((vm.vmid, key.clone())) {
                        found.holders.entry(key.clone()).or_default().extend(held);
                    }
                }
                continue;
            }
            // Off, and never read: what Kubernetes has attached there is the last that is known.
            for (given, _) in kube.attached_to(&node.name).await.map_err(Error::unavailable)?.into_iter().filter(|(_, attached)| *attached)
            {
                let Some(key) = given.parse::<VolumeHandle>().ok().map(|handle| canonical(&handle, resources)) else { continue };
                found.volumes.get_mut(&key).into_iter().for_each(|listed| listed.nodes.push(node.node_id.clone()));
            }
        }
        found.volumes.values_mut().for_each(|listed| listed.nodes.sort());
        Ok(())
    }

    /// A VM's config and what QEMU has, of the last minute; as last read, where its node is off; nothing: that was never.
    pub(super) async fn as_read(self: &Arc<Self>, vmid: u32, host: &str) -> Result<Option<(Known, VmState)>, Error> {
        if self.off(host).await?.is_some() {
            let Some(known) = self.last_known(vmid).await else { return Ok(None) };
            let plugged = known.held.keys().cloned().collect();
            return Ok(Some((known, VmState { running: true, plugged: Some(plugged), pid: None })));
        }
        let step = || format!("what VM {vmid} on {host} has cannot be told");
        let since = ago(EVIDENCE_AGE);
        let mut known = self.config(host, vmid, since).await.map_err(|error| Error::from(error).during(&step()))?;
        let mut state =
            self.states(host, since).await.map_err(|error| Error::from(error).during(&step()))?.remove(&vmid).unwrap_or_default();
        let is_plugged = |state: &VmState, key: &str| state.plugged.as_ref().is_some_and(|plugged| plugged.contains(key));
        let mut slots = known.config.lines.iter().filter(|(key, _)| crate::pve::drive::is_disk_slot(key));
        if state.running && slots.any(|(key, line)| line.value.is_some() != is_plugged(&state, key)) {
            // Read one after the other, perhaps with a change in between.
            state = self.state_now(host, vmid).await.map_err(|error| Error::from(error).during(&step()))?;
            known = self.config(host, vmid, Instant::now()).await.map_err(|error| Error::from(error).during(&step()))?;
        }
        self.remember(vmid, &mut known, &state).await;
        Ok(Some((known, state)))
    }
}

/// Every volume that a VM has in one of its views.
fn named_in(known: &Known) -> BTreeSet<&str> {
    let lines = known.config.lines.values().flat_map(|line| [&line.value, &line.pending]).flatten();
    lines.map(|line| volume_of(line)).chain(known.held.values().map(String::as_str)).collect()
}

/// Whether a disk is a full copy that the reference driver made for a VolumeSnapshot.
pub(super) fn is_snapshot(disk: &str) -> bool {
    let name = disk.rsplit('/').next().unwrap_or(disk);
    name.strip_prefix("vm-").and_then(|rest| rest.split_once('-')).is_some_and(|(_, name)| name.starts_with(SNAPSHOT_NAME))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pve::api::Storage;

    fn storage(storage: &str, host: &str, shared: bool, active: bool) -> Storage {
        let (storage, host, plugin) = (storage.into(), host.into(), "dir".into());
        Storage { storage, host, plugin, active, shared, images: true, total_bytes: 0, used_bytes: 0 }
    }

    #[test]
    fn a_shared_storage_is_one_place_and_is_asked_of_a_node_that_has_it() {
        let hosts = [("pve1", "offline"), ("pve2", "online")].map(|(host, status)| (host.to_string(), status.to_string()));
        let storages = vec![
            storage("san", "pve1", true, true),
            storage("san", "pve2", true, true),
            storage("ds", "pve1", false, true),
            storage("ds", "pve2", false, true),
        ];
        let resources = Resources { storages, hosts: hosts.into(), ..Resources::default() };
        let all: Vec<(String, String, String, bool)> =
            sources(&resources).into_iter().map(|one| (one.zone, one.storage, one.host, one.active)).collect();
        let row = |zone: &str, storage: &str, host: &str, active| (zone.to_string(), storage.to_string(), host.to_string(), active);
        assert_eq!(all, [row("", "san", "pve2", true), row("pve1", "ds", "pve1", false), row("pve2", "ds", "pve2", true)]);
        let old: VolumeHandle = "r/pve1/san/vm-9999-a".parse().unwrap();
        assert_eq!(canonical(&old, &resources).to_string(), "r//san/vm-9999-a");
    }

    #[test]
    fn snapshots_are_known_by_their_names() {
        for (disk, is) in [("vm-9999-snapshot-0b", true), ("9999/vm-9999-snapshot-0b.qcow2", true), ("vm-9999-pvc-0b", false), ("x", false)]
        {
            assert_eq!(is_snapshot(disk), is, "{disk}");
        }
    }

    #[test]
    fn what_we_changed_is_read_again() {
        let listings = Listings::default();
        let place = || ("pve1".to_string(), "ds".to_string());
        locked(&listings.read).insert(place(), (Instant::now(), Listing::default()));
        assert!(listings.get("pve1", "ds").is_some());
        listings.note_changed("ds:vm-9999-a");
        assert!(listings.get("pve1", "ds").is_none());
    }
}
