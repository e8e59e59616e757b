//! Who refers to a volume: every VM that could hold it, read recently enough (docs/architecture.md, decision 5).
//!
//! Nothing in Proxmox stops two VMs holding one volume. Fail closed: a VM or a host that cannot be read is a refusal that
//! names it. On a storage local to one Proxmox node the VMs of that node can hold the volume, and those elsewhere whose
//! config still names it (moved there by HA, say).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use proto::VolumeHandle;
use proto::log::carried;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::cluster::Off;
use super::region::{EVIDENCE_AGE, Known, Region, ago};
use crate::attach::{Seen, unexplained};
use crate::error::Error;
use crate::look::metrics::{self, Lock};
use crate::pve::api::{Resources, VmState};
use crate::pve::drive::{is_disk_slot, volume_of};
use crate::pve::{self, Meaning};

/// Looks at a VM whose drives change between its state and its config, before what is odd is believed.
const MAX_LOOKS: usize = 4;

/// Storages whose volumes QEMU opens as files or block devices of its Proxmox node: what it opens in other ways it does not lock.
const LOCKED_BY_QEMU: [&str; 5] = ["btrfs", "dir", "lvm", "lvmthin", "zfspool"];

/// How much of each VM is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Depth {
    /// What is configured and planned: enough to see another's claim.
    Config,
    /// Also what is plugged.
    Plugged,
    /// Also what snapshots keep.
    Snapshots,
}

/// In which view a VM refers to the volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum View {
    /// Its config.
    Configured,
    /// Its planned changes.
    Planned,
    /// QEMU has it, though the config no longer says so.
    Plugged,
    /// QEMU has a drive of which the config says nothing: it could be this one.
    Unexplained,
    /// Set aside as `unusedN`.
    Unused,
    /// Kept by this snapshot.
    Snapshot(String),
    /// A mount point of a container.
    Container,
    /// Its VM cannot be read, and Kubernetes has it attached to that node.
    Attachment,
}

/// One reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reference {
    /// The VM.
    pub(crate) vmid: u32,
    /// Its Proxmox node.
    pub(crate) host: String,
    /// The slot.
    pub(crate) key: String,
    /// Where it is seen.
    pub(crate) view: View,
    /// Its Proxmox node is off: this is what was last read.
    pub(crate) off: Option<Off>,
}

/// Which VMs could hold a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Those of every Proxmox node.
    Shared,
    /// Those of the volume's own.
    Local,
    /// The storage is not listed, so that it cannot be told.
    Unlisted,
}

impl Reference {
    /// Whether the VM has the volume or will have it: no other may get it.
    #[must_use]
    pub(crate) fn holds(&self) -> bool {
        matches!(self.view, View::Configured | View::Planned | View::Plugged | View::Unexplained | View::Container | View::Attachment)
    }

    /// The same, where the operator's word does not say that it has let go.
    #[must_use]
    pub(crate) fn counts(&self) -> bool {
        self.holds() && self.off.as_ref().is_none_or(|off| !off.fenced)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.seen(f)?;
        match &self.off {
            Some(off) => write!(f, "; {} is {off}", self.host),
            None => Ok(()),
        }
    }
}

impl Reference {
    fn seen(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vmid, host, key, .. } = self;
        match &self.view {
            View::Configured => write!(f, "VM {vmid} on {host} has it configured as {key}"),
            View::Planned => write!(f, "VM {vmid} on {host} has it planned as {key}"),
            View::Plugged => write!(f, "VM {vmid} on {host} has it plugged as {key}, though its config no longer says so"),
            View::Unexplained => write!(
                f,
                "VM {vmid} on {host} has a drive plugged as {key} of which its config says nothing, so it could be this one; restart the VM"
            ),
            View::Unused => write!(f, "VM {vmid} on {host} has it set aside as {key}"),
            View::Snapshot(name) => write!(f, "snapshot {name:?} of VM {vmid} on {host} keeps it as {key}"),
            View::Container => write!(f, "container {vmid} on {host} has it as {key}"),
            View::Attachment => write!(f, "VM {vmid} on {host} has it by Kubernetes' VolumeAttachment to node {key}"),
        }
    }
}

/// Proxmox node → its VMs, or why they cannot be told.
type StatesByHost = BTreeMap<String, Result<BTreeMap<u32, VmState>, pve::Error>>;

/// Why a VM was not read.
enum Unread {
    /// It is not on that node.
    Gone,
    Failed(Error),
}

impl From<pve::Error> for Unread {
    fn from(error: pve::Error) -> Self {
        if error.meaning() == Meaning::NoSuchVm { Self::Gone } else { Self::Failed(error.into()) }
    }
}

impl Region {
    /// Which VMs could hold the volume.
    ///
    /// # Errors
    /// Proxmox's.
    pub(crate) async fn reach(&self, handle: &VolumeHandle) -> Result<Reach, pve::Error> {
        if handle.zone.is_empty() {
            return Ok(Reach::Shared);
        }
        let resources = self.resources(ago(EVIDENCE_AGE)).await?;
        let mut listed = resources.storages.iter().filter(|storage| storage.storage == handle.storage).peekable();
        if listed.peek().is_none() {
            return Ok(Reach::Unlisted);
        }
        Ok(if listed.any(|storage| storage.shared) { Reach::Shared } else { Reach::Local })
    }

    /// Whether no second QEMU can have the volume open for writing. QEMU locks an image file or block device when it plugs it, against
    /// every other process of the same Proxmox node (reference/proxmox-api.md, §12.1 and §15), and only VMs of that node reach a local
    /// storage. A second drive is one that Proxmox calls attached and QEMU does not have: that is seen before anybody asks this.
    ///
    /// # Errors
    /// Proxmox's.
    pub(crate) async fn qemu_keeps_others_off(&self, handle: &VolumeHandle) -> Result<bool, Error> {
        if self.reach(handle).await? != Reach::Local {
            return Ok(false);
        }
        let plugintype = self.plugintype(&handle.storage).await?;
        Ok(plugintype.is_some_and(|plugintype| LOCKED_BY_QEMU.contains(&plugintype.as_str())))
    }

    /// The Proxmox nodes whose VMs could hold the volume.
    async fn hosts_in_reach(&self, handle: &VolumeHandle, resources: &Resources) -> Result<Vec<String>, Error> {
        Ok(match self.reach(handle).await? {
            Reach::Local => vec![handle.zone.clone()],
            Reach::Shared | Reach::Unlisted => resources.hosts.keys().cloned().collect(),
        })
    }

    /// Every reference to the volume, from readings since `since`; `except` is not read.
    ///
    /// # Errors
    /// A VM or host that could hold the volume and cannot be read, by name.
    pub(crate) async fn references(
        self: &Arc<Self>,
        handle: &VolumeHandle,
        since: Instant,
        except: Option<u32>,
        depth: Depth,
    ) -> Result<Vec<Reference>, Error> {
        let (found, unread) = self.references_read(handle, since, except, depth).await?;
        unread.map_or(Ok(found), Err)
    }

    /// Every reference that could be read, and why others could not: for a question that one reference answers.
    ///
    /// # Errors
    /// It cannot be told which VMs could hold the volume.
    pub(crate) async fn references_read(
        self: &Arc<Self>,
        handle: &VolumeHandle,
        since: Instant,
        except: Option<u32>,
        depth: Depth,
    ) -> Result<(Vec<Reference>, Option<Error>), Error> {
        let no_earlier_writes = async { if depth == Depth::Config { Ok(()) } else { self.check_no_earlier_writes(handle).await } };
        tokio::try_join!(self.check_sees_all_vms(), no_earlier_writes)?;
        let volid = handle.volid();
        let (mut found, mut unread) = (Vec::new(), None);
        let mut reading = JoinSet::new();
        if depth != Depth::Config {
            for (vmid, host) in self.containers_in_reach(handle, since).await? {
                let (region, volid) = (Arc::clone(self), volid.clone());
                reading.spawn(carried(async move { region.references_of_container(vmid, host, &volid, since).await }));
            }
        }
        for (vmid, (host, state)) in self.who_could_hold(handle, since, depth).await? {
            if Some(vmid) == except {
                continue;
            }
            let (region, volid) = (Arc::clone(self), volid.clone());
            reading.spawn(carried(async move { region.references_of(vmid, host, state, &volid, since, depth).await }));
        }
        while let Some(read) = reading.join_next().await {
            match read.map_err(|cause| Error::internal(format!("a reading broke off: {cause}")))? {
                Ok(read) => found.extend(read),
                Err(error) => drop(unread.get_or_insert(error)),
            }
        }
        found.sort_by(|a, b| (a.vmid, &a.key).cmp(&(b.vmid, &b.key)));
        Ok((found, unread))
    }

    /// The references as of the last minute; read again where one would be a reason to refuse: it may be gone by now.
    ///
    /// # Errors
    /// As [`Region::references`].
    pub(crate) async fn references_before_refusal(
        self: &Arc<Self>,
        handle: &VolumeHandle,
        except: Option<u32>,
        depth: Depth,
    ) -> Result<Vec<Reference>, Error> {
        let references = self.references(handle, ago(EVIDENCE_AGE), except, depth).await?;
        let refuses = |one: &Reference| depth == Depth::Snapshots || one.counts();
        if references.iter().any(refuses) { self.references(handle, Instant::now(), except, depth).await } else { Ok(references) }
    }

    /// After our own write, which was done at `since`, where no other controller of the Lease can have written: who has got the volume by
    /// hand or from another cluster since the VMs were read. One call per node, and a VM is read only if there is something new in it. What
    /// a stopped VM got into its config is not seen so: it has no QEMU that could write.
    ///
    /// Nobody is asked where QEMU itself refuses a second writer: that we have it plugged says that nobody else has.
    ///
    /// # Errors
    /// As [`Region::references`].
    pub(crate) async fn newcomers(self: &Arc<Self>, handle: &VolumeHandle, except: u32, since: Instant) -> Result<Vec<Reference>, Error> {
        if self.qemu_keeps_others_off(handle).await? {
            return Ok(Vec::new());
        }
        let volid = handle.volid();
        let mut resources = self.resources(ago(EVIDENCE_AGE)).await?;
        let is_off = |resources: &Resources, host: &String| resources.hosts.get(host).is_some_and(|status| status == "offline");
        if resources.hosts.keys().any(|host| is_off(&resources, host)) {
            // Back since, perhaps, with what was attached there by hand and nobody has read.
            resources = self.resources(since).await?;
        }
        let hosts = self.hosts_in_reach(handle, &resources).await?;
        let listed = self.states_of(hosts.into_iter().filter(|host| !is_off(&resources, host)).collect(), since).await?;
        let (mut found, mut reading) = (Vec::new(), JoinSet::new());
        let mut missed: BTreeMap<u32, String> = BTreeMap::new();
        if self.reach(handle).await? != Reach::Local {
            // On its way from a node asked late to one asked early.
            let listed: BTreeSet<u32> = listed.values().flatten().flat_map(BTreeMap::keys).copied().collect();
            let unlisted = resources.vms.values().filter(|vm| !listed.contains(&vm.vmid) && !is_off(&resources, &vm.host));
            missed.extend(unlisted.map(|vm| (vm.vmid, vm.host.clone())));
        }
        for (vmid, host) in missed.into_iter().filter(|(vmid, _)| *vmid != except) {
            let (region, volid, state) = (Arc::clone(self), volid.clone(), VmState { running: true, ..VmState::default() });
            reading.spawn(async move { region.references_of(vmid, host, state, &volid, since, Depth::Plugged).await });
        }
        for (host, states) in listed {
            let states = match states {
                Ok(states) => states,
                // Gone off since the cluster was read, perhaps.
                Err(_) if is_off(&*self.resources(Instant::now()).await?, &host) => continue,
                Err(error) => {
                    return Err(Error::from(error).during(&format!("which VMs of Proxmox node {host} hold {volid} cannot be told")));
                }
            };
            for (vmid, state) in states {
                if vmid == except || self.has_nothing_new(vmid, &host, &state, &volid).await {
                    continue;
                }
                let (region, volid, host) = (Arc::clone(self), volid.clone(), host.clone());
                reading.spawn(carried(async move { region.references_of(vmid, host, state, &volid, since, Depth::Plugged).await }));
            }
        }
        while let Some(read) = reading.join_next().await {
            found.extend(read.map_err(|cause| Error::internal(format!("a reading broke off: {cause}")))??);
        }
        found.sort_by(|a: &Reference, b: &Reference| (a.vmid, &a.key).cmp(&(b.vmid, &b.key)));
        Ok(found)
    }

    /// Whether a controller before us left changes that still go on.
    async fn check_no_earlier_writes(self: &Arc<Self>, handle: &VolumeHandle) -> Result<(), Error> {
        let resources = self.resources(ago(EVIDENCE_AGE)).await?;
        let mut looking = JoinSet::new();
        for host in self.hosts_in_reach(handle, &resources).await? {
            // What is off carries nothing out.
            if resources.hosts.get(&host).is_some_and(|status| status != "offline") && self.may_have_earlier_writes(&host) {
                let region = Arc::clone(self);
                looking.spawn(carried(async move {
                    let Err(error) = region.check_no_earlier_write(&host).await else { return Ok(()) };
                    // Gone off since the cluster was read, perhaps: then it carries nothing out.
                    let now = region.resources(Instant::now()).await?;
                    if now.hosts.get(&host).is_some_and(|status| status == "offline") { Ok(()) } else { Err(error) }
                }));
            }
        }
        while let Some(looked) = looking.join_next().await {
            looked.map_err(|cause| Error::internal(format!("a look broke off: {cause}")))??;
        }
        Ok(())
    }

    async fn containers_in_reach(&self, handle: &VolumeHandle, since: Instant) -> Result<Vec<(u32, String)>, Error> {
        let resources = self.resources(since).await?;
        let hosts = self.hosts_in_reach(handle, &resources).await?;
        let in_reach = resources.containers.iter().filter(|(_, host)| hosts.contains(host));
        Ok(in_reach.map(|(vmid, host)| (*vmid, host.clone())).collect())
    }

    /// A container can have a volume as a mount point; Proxmox then mounts it on the node itself.
    async fn references_of_container(
        self: Arc<Self>,
        vmid: u32,
        host: String,
        volid: &str,
        since: Instant,
    ) -> Result<Vec<Reference>, Error> {
        let step = || format!("whether container {vmid} on {host} holds {volid} cannot be told");
        let off = self.off(&host).await?;
        let read = {
            let _turn = metrics::waited(Lock::Readers, self.readers.acquire()).await;
            self.container(&host, vmid, if off.is_some() { self.begun } else { since }).await
        };
        let lines = match read {
            Err(_) if off.as_ref().is_some_and(|off| off.fenced) => return Ok(Vec::new()),
            // Gone or moved since; one that moves is stopped on the way, and is seen by the next reading.
            Err(error) if error.meaning() == Meaning::NoSuchVm => return Ok(Vec::new()),
            read => read.map_err(|error| Error::from(error).during(&step()))?,
        };
        let naming = lines.into_iter().filter(|(_, line)| volume_of(line) == volid);
        let view = |key: &str| if key.starts_with("unused") { View::Unused } else { View::Container };
        Ok(naming.map(|(key, _)| Reference { vmid, host: host.clone(), view: view(&key), key, off: off.clone() }).collect())
    }

    /// VMID → host and state.
    async fn who_could_hold(
        self: &Arc<Self>,
        handle: &VolumeHandle,
        since: Instant,
        depth: Depth,
    ) -> Result<BTreeMap<u32, (String, VmState)>, Error> {
        let mut resources = self.resources(since).await?;
        // What is to be deleted must not be plugged now, whatever was read within the last minute.
        let listed_since = if depth == Depth::Snapshots { Instant::now() } else { since };
        let hosts = self.hosts_in_reach(handle, &resources).await?;
        let is_off = |resources: &Resources, host: &String| resources.hosts.get(host).is_some_and(|status| status == "offline");
        // Where what is plugged does not matter, the cluster's list says it all, and knows the newest VM.
        let asked: Vec<String> = hosts.iter().filter(|host| depth != Depth::Config && !is_off(&resources, host)).cloned().collect();
        let mut listed = self.states_of(asked, listed_since).await?;
        let mut all = BTreeMap::new();
        for host in hosts {
            match listed.remove(&host) {
                Some(Ok(states)) => {
                    all.extend(states.into_iter().map(|(vmid, state)| (vmid, (host.clone(), state))));
                    continue;
                }
                Some(Err(error)) => {
                    // Gone off since the cluster was read, perhaps.
                    resources = self.resources(Instant::now()).await?;
                    if !is_off(&resources, &host) {
                        let step = format!("which VMs of Proxmox node {host} hold {} cannot be told", handle.volid());
                        return Err(Error::from(error).during(&step));
                    }
                }
                None => (),
            }
            all.extend(resources.vms.values().filter(|vm| vm.host == host).map(|vm| (vm.vmid, (host.clone(), VmState::default()))));
        }
        let unseen = |vmid: &u32| VmState { running: true, plugged: None, pid: None }.at(vmid, &resources);
        if self.reach(handle).await? != Reach::Local {
            // On its way from a node read late to one read early.
            let missed: Vec<u32> = resources.vms.keys().filter(|vmid| !all.contains_key(vmid)).copied().collect();
            all.extend(missed.iter().filter_map(unseen));
        }
        let named: Vec<u32> = self.ever_naming(&handle.volid()).await.into_iter().filter(|vmid| !all.contains_key(vmid)).collect();
        all.extend(named.iter().filter_map(unseen));
        Ok(all)
    }

    /// The VMs of several nodes, read at the same time.
    async fn states_of(self: &Arc<Self>, hosts: Vec<String>, since: Instant) -> Result<StatesByHost, Error> {
        let mut reading = JoinSet::new();
        for host in hosts {
            let region = Arc::clone(self);
            reading.spawn(carried(async move {
                let states = region.states(&host, since).await;
                (host, states)
            }));
        }
        let mut read = BTreeMap::new();
        while let Some(one) = reading.join_next().await {
            read.extend([one.map_err(|cause| Error::internal(format!("a reading broke off: {cause}")))?]);
        }
        Ok(read)
    }

    async fn references_of(
        self: Arc<Self>,
        vmid: u32,
        host: String,
        state: VmState,
        volid: &str,
        since: Instant,
        depth: Depth,
    ) -> Result<Vec<Reference>, Error> {
        let step = format!("whether VM {vmid} on {host} holds {volid} cannot be told");
        let off = self.off(&host).await.map_err(|error| error.during(&step))?;
        if let Some(off) = off {
            return self.references_on_dead_host(vmid, &host, off, volid).await.map_err(|error| error.during(&step));
        }
        let read = {
            // Who finds it read, or waits until another has read it, takes no place from those who read.
            let is_read = depth != Depth::Snapshots && self.is_read(vmid, &host, since).await;
            let _turn = if is_read { None } else { metrics::waited(Lock::Readers, self.readers.acquire()).await.ok() };
            self.read(vmid, &host, state, since, depth).await
        };
        match read {
            Ok(Some((known, state))) => Ok(references_in(vmid, &known, &state, volid)),
            Ok(None) => Ok(Vec::new()),
            Err(error) => Err(error.during(&step)),
        }
    }

    /// Reads one VM; nothing where it is gone.
    async fn read(
        self: &Arc<Self>,
        vmid: u32,
        host: &str,
        state: VmState,
        since: Instant,
        depth: Depth,
    ) -> Result<Option<(Known, VmState)>, Error> {
        match self.read_at(vmid, host, state, since, depth).await {
            Err(Unread::Gone) => (),
            Err(Unread::Failed(error)) => return Err(error),
            Ok(read) => return Ok(Some(read)),
        }
        // Moved, or destroyed, since the cluster was read.
        let Some(vm) = self.resources(Instant::now()).await?.vms.get(&vmid).cloned() else {
            self.check_vm_gone(vmid).await?;
            self.forget(vmid).await;
            return Ok(None);
        };
        let state = VmState { running: true, ..VmState::default() };
        match self.read_at(vmid, &vm.host, state, since, depth).await {
            Err(Unread::Gone) => Err(Error::unavailable("it is moving; repeated")),
            Err(Unread::Failed(error)) => Err(error),
            Ok(read) => Ok(Some(read)),
        }
    }

    async fn read_at(
        self: &Arc<Self>,
        vmid: u32,
        host: &str,
        state: VmState,
        since: Instant,
        depth: Depth,
    ) -> Result<(Known, VmState), Unread> {
        let (mut state, mut known) = (state, self.config(host, vmid, since).await?);
        if depth == Depth::Config {
            return Ok((known, VmState::default()));
        }
        if depth == Depth::Snapshots && !is_as_configured(&known, &state) {
            // Changed since, or nothing but the config can say so.
            known = self.config(host, vmid, Instant::now()).await?;
        }
        let is_odd = |known: &Known, state: &VmState| {
            let seen = Seen { config: &known.config, running: state.running, plugged: state.plugged.as_ref() };
            state.plugged.is_none() || unexplained(seen).any(|key| !known.held.contains_key(key))
        };
        for _ in 0..MAX_LOOKS {
            if !is_odd(&known, &state) {
                break;
            }
            // The list and the config were read one after the other; what changed between them explains itself now.
            state = self.state_now(host, vmid).await?;
            if state.plugged.is_none() {
                break;
            }
            if is_odd(&known, &state) {
                known = self.config(host, vmid, Instant::now()).await?;
            }
        }
        if state.plugged.is_none() {
            return Err(Unread::Failed(Error::unavailable(
                "its QEMU does not answer (no blockstat), so that what is plugged is not known; look at the VM, or stop it",
            )));
        }
        self.remember(vmid, &mut known, &state).await;
        if depth == Depth::Snapshots {
            self.snapshots(&mut known, vmid).await?;
        }
        Ok((known, state))
    }

    /// A host that a quorate cluster calls offline cannot change its VMs: they count as last read; one that was never read by
    /// what Kubernetes has attached to it, or by the operator's word that it holds nothing.
    async fn references_on_dead_host(&self, vmid: u32, host: &str, off: Off, volid: &str) -> Result<Vec<Reference>, Error> {
        let found = match self.last_known(vmid).await {
            // What QEMU had there may still run: everything that was held counts as plugged.
            Some(known) => {
                let plugged = known.held.keys().cloned().collect();
                references_in(vmid, &known, &VmState { running: true, plugged: Some(plugged), pid: None }, volid)
            }
            None if off.fenced => Vec::new(),
            None => self.attached_by_kubernetes(vmid, host, &off, volid).await?,
        };
        let holds = found.iter().any(Reference::holds);
        let fenced = off.fenced || (holds && self.is_out_of_service(vmid).await?);
        Ok(found.into_iter().map(|one| Reference { off: Some(Off { fenced, ..off.clone() }), ..one }).collect())
    }
}

impl VmState {
    /// The same, at the place where the cluster lists the VM.
    fn at(self, vmid: &u32, resources: &Resources) -> Option<(u32, (String, Self))> {
        let vm = resources.vms.get(vmid)?;
        Some((vm.vmid, (vm.host.clone(), self)))
    }
}

/// Whether a running VM has plugged what its config was read to say, so that nobody changed it since by any means but a plan.
fn is_as_configured(known: &Known, state: &VmState) -> bool {
    let Some(plugged) = state.plugged.as_ref().filter(|_| state.running) else { return false };
    let mut lines = known.config.lines.iter().filter(|(key, _)| is_disk_slot(key));
    lines.all(|(key, line)| line.value.is_some() == plugged.contains(key))
        && plugged.iter().filter(|key| is_disk_slot(key)).all(|key| known.config.configured(key).is_some())
}

fn references_in(vmid: u32, known: &Known, state: &VmState, volid: &str) -> Vec<Reference> {
    let reference = |key: &str, view| Reference { vmid, host: known.host.clone(), key: key.into(), view, off: None };
    let mut found: Vec<Reference> = Vec::new();
    for (key, line) in known.config.naming(volid) {
        let configured = line.value.as_deref().is_some_and(|text| volume_of(text) == volid);
        found.push(match (key.starts_with("unused"), configured) {
            (true, _) => reference(key, View::Unused),
            (false, true) => reference(key, View::Configured),
            (false, false) => reference(key, View::Planned),
        });
    }
    for key in state.plugged.iter().flatten() {
        let configured = known.config.configured(key).map(volume_of);
        if known.held.get(key).is_some_and(|held| held == volid) && configured != Some(volid) {
            found.push(reference(key, View::Plugged));
        }
    }
    let seen = Seen { config: &known.config, running: state.running, plugged: state.plugged.as_ref() };
    found.extend(unexplained(seen).filter(|key| !known.held.contains_key(*key)).map(|key| reference(key, View::Unexplained)));
    for (name, drives) in known.snapshots.iter().flat_map(|known| &known.drives) {
        let keys = drives.iter().filter(|(_, line)| volume_of(line) == volid);
        found.extend(keys.map(|(key, _)| reference(key, View::Snapshot(name.clone()))));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::region::Snapshots;
    use super::*;
    use crate::pve::drive::{Line, VmConfig};

    fn known(lines: &[(&str, &str)], held: &[(&str, &str)]) -> Known {
        let line = |text: &str| Line { value: Some(text.into()), ..Line::default() };
        Known {
            host: "pve1".into(),
            config: VmConfig { lines: lines.iter().map(|(key, text)| ((*key).to_string(), line(text))).collect(), digest: "d".into() },
            read_at: Instant::now(),
            held: held.iter().map(|(key, volid)| ((*key).to_string(), (*volid).to_string())).collect(),
            seen: None,
            snapshots: Some(Snapshots {
                digest: "d".into(),
                drives: BTreeMap::from([("s1".into(), BTreeMap::from([("scsi9".to_string(), "ds:a,size=1G".to_string())]))]),
            }),
            is_stale: false,
        }
    }

    fn running(keys: &[&str]) -> VmState {
        VmState { running: true, plugged: Some(keys.iter().map(|key| (*key).to_string()).collect()), pid: None }
    }

    #[test]
    fn each_view_is_a_reference_and_only_holding_ones_hold() {
        let known = known(&[("scsi1", "ds:a,size=1G"), ("unused0", "ds:a"), ("scsi2", "ds:b")], &[("scsi3", "ds:a")]);
        let found = references_in(101, &known, &running(&["scsi1", "scsi2", "scsi3", "scsi4"]), "ds:a");
        let views: Vec<(&str, &View, bool)> = found.iter().map(|one| (one.key.as_str(), &one.view, one.holds())).collect();
        assert_eq!(
            views,
            [
                ("scsi1", &View::Configured, true),
                ("unused0", &View::Unused, false),
                ("scsi3", &View::Plugged, true),
                ("scsi4", &View::Unexplained, true),
                ("scsi9", &View::Snapshot("s1".into()), false),
            ]
        );
        for one in &found {
            let text = one.to_string();
            assert!(text.contains("VM 101") && text.contains("pve1") && text.contains(&one.key), "{text}");
        }
    }

    #[test]
    fn another_volume_in_a_reused_slot_is_not_this_one() {
        let known = known(&[("scsi3", "ds:b")], &[("scsi3", "ds:b")]);
        let found = references_in(101, &known, &running(&["scsi3"]), "ds:x");
        assert!(found.is_empty(), "{found:?}");
    }
}
