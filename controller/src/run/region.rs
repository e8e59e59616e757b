//! One Proxmox cluster as we know it: what was read, when, and the calls that read and write.
//!
//! An idle controller makes no calls: everything is read on demand, no older than the caller allows, and once for all who
//! wait for it at the same time.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use proto::VolumeHandle;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard, Semaphore};
use tokio::time::Instant;

use super::claim::Claims;
use super::doubt::{DOUBT_AGE, Doubts, LostDeletions};
use super::list::Listings;
use super::modify::Modified;
use super::queue::Queue;
use crate::attach;
use crate::error::Error;
use crate::kube::Kube;
use crate::look::metrics::{self, Lock};
use crate::pve::api::{self, Change, Resources, VmState};
use crate::pve::drive::{Line, VmConfig, is_drive_key, volume_of};
use crate::pve::{self, Client, Meaning};
use crate::reading::Reading;

/// Evidence of who holds a volume may be this old (docs/architecture.md, decision 5). The cluster snapshot, too.
pub(crate) const EVIDENCE_AGE: Duration = Duration::from_secs(60);
/// Whether a VM runs must be known better: a VM that was stopped since would take the drive into its config only.
pub(crate) const STATE_AGE: Duration = Duration::from_secs(5);
/// VMs read at a time: each call holds a thread, and one of the node's three API workers for some milliseconds.
pub(crate) const PARALLEL_READS: usize = 8;
/// Calls per Proxmox node that may wait for their task inside the server: each holds one of its three API workers.
const DELAYED_PER_HOST: usize = 2;
/// Most attachments and deletions end in half a second; well below the 30 s of Proxmox's own proxy.
const DELAY_S: u8 = 10;
/// Proxmox looks whether a disk has left QEMU once a second, and again for its controller where it has one of its own.
const LEAST_UNPLUG: Duration = Duration::from_millis(900);
/// Sizes of volumes that are remembered; beyond it all are forgotten.
const MAX_SIZES: usize = 4096;

/// That long ago; "now" on a machine that has not been up for so long.
#[must_use]
pub(crate) fn ago(age: Duration) -> Instant {
    Instant::now().checked_sub(age).unwrap_or_else(Instant::now)
}

/// A VM's config as last read, and what its slots held.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    /// Where it was read.
    pub(crate) host: String,
    /// Configured and planned. The digest is empty after a write of ours.
    pub(crate) config: VmConfig,
    /// When the reading began.
    pub(crate) read_at: Instant,
    /// Slot → volume, for slots that QEMU still has when the config no longer says what is in them.
    pub(crate) held: BTreeMap<String, String>,
    /// What QEMU had when all this was put together: its process and slots. Those that were seen empty since are not in it.
    pub(crate) seen: Option<(Option<u64>, BTreeSet<String>)>,
    /// Read only where something is to be deleted.
    pub(crate) snapshots: Option<Snapshots>,
    /// A write of ours failed since, so that it may say something else now.
    pub(crate) is_stale: bool,
}

impl Known {
    /// Whether it says enough of what `host` has since `since`.
    fn counts(&self, host: &str, since: Instant) -> bool {
        self.read_at >= since && self.host == host && !self.is_stale
    }

    fn note_named(&self, slot: &VmSlot) {
        let drives = self.config.lines.iter().filter(|(key, _)| is_drive_key(key));
        let lines = drives.flat_map(|(_, line)| [line.value.as_deref(), line.pending.as_deref()]).flatten();
        *locked(&slot.named) = lines.map(|line| volume_of(line).to_string()).collect();
    }

    /// What Proxmox takes at least for a change: the disks that leave QEMU, one after the other.
    fn least(&self, change: &Change) -> Duration {
        let leaving = change.delete.iter().filter(|key| self.held.contains_key(*key)).count();
        let looks = if self.config.configured("scsihw") == Some("virtio-scsi-single") { 2 } else { 1 };
        LEAST_UNPLUG * u32::try_from(leaving * looks).unwrap_or(u32::MAX)
    }
}

/// What a VM's snapshots keep.
#[derive(Debug, Clone)]
pub(crate) struct Snapshots {
    /// The config's, which covers them.
    pub(crate) digest: String,
    /// Snapshot → key → drive line.
    pub(crate) drives: BTreeMap<String, BTreeMap<String, String>>,
}

#[derive(Debug, Default)]
pub(super) struct VmSlot {
    /// Who waits for a change of this VM.
    pub(super) queue: Queue,
    /// The `lock` of its config, and when it was first seen.
    pub(super) lock: Mutex<Option<(String, SystemTime)>>,
    /// Slots with a removal whose answer was lost, and when.
    late_removals: Mutex<BTreeMap<u8, Instant>>,
    /// Held from the look to the verified end of a change.
    changing: Arc<AsyncMutex<()>>,
    pub(super) known: AsyncMutex<Option<Known>>,
    /// Volumes that the last finished reading named: who only wonders waits for no reading that goes on.
    named: Mutex<BTreeSet<String>>,
    /// Of those, the ones whose attachment here we have answered OK.
    alone: Mutex<BTreeSet<String>>,
    /// Slots where QEMU keeps leftovers until the VM restarts, and the process that keeps them.
    pub(super) leaked: Mutex<(Option<u64>, BTreeSet<u8>)>,
}

/// What the config file says of a cluster, beside how it is reached.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rules {
    /// Proxmox nodes that are off by the operator's word.
    pub(crate) fenced: BTreeSet<String>,
    /// Attach to protected VMs, too.
    pub(crate) attach_to_protected: bool,
    /// Attach nothing that carries another owner's VMID.
    pub(crate) attach_only_owned: bool,
    /// Owner VMIDs whose volumes are ours to delete.
    pub(crate) owners: BTreeSet<u32>,
    /// Nodes are found by their Node objects, as Cluster API writes them.
    pub(crate) capmox: bool,
}

type StatesOfHost = Arc<Reading<BTreeMap<u32, VmState>>>;

/// One Proxmox cluster.
#[derive(Debug)]
pub(crate) struct Region {
    /// Its name in volume handles.
    pub(crate) name: String,
    /// Its API, as the config file says now.
    client: Mutex<Arc<Client>>,
    rules: Mutex<Rules>,
    /// Who says what was attached to VMs that cannot be read.
    pub(super) kube: Option<Arc<Kube>>,
    resources: Reading<Arc<Resources>>,
    /// The same, for who only looks and never waits.
    pub(super) last_resources: Mutex<Option<(Instant, Arc<Resources>)>>,
    states: Mutex<HashMap<String, StatesOfHost>>,
    /// In order: who waits for several of them waits in the same order every time.
    pub(super) vms: Mutex<BTreeMap<u32, Arc<VmSlot>>>,
    pub(super) containers: Mutex<HashMap<u32, ContainerSlot>>,
    delayed: Mutex<HashMap<String, Arc<Semaphore>>>,
    pub(super) sees_all_vms: Reading<(), Error>,
    pub(super) quorate: Reading<bool, Error>,
    pub(super) doubts: Arc<Mutex<Doubts>>,
    pub(super) lost_deletions: Arc<Mutex<LostDeletions>>,
    /// Proxmox node → when no change of an earlier controller was seen to go on there.
    pub(super) quiet: Mutex<HashMap<String, Instant>>,
    /// Proxmox node → when it was first seen offline.
    pub(super) offline_since: Mutex<HashMap<String, SystemTime>>,
    /// Volume → VMs whose drive of it is a leftover: it was taken over while their node was off.
    pub(super) leftovers: Mutex<BTreeMap<String, (VolumeHandle, BTreeSet<u32>)>>,
    /// VM → its name, where it last showed one.
    pub(super) names: Mutex<BTreeMap<u32, String>>,
    /// The most nodes that were ever seen: a list with one is not a host alone, then.
    pub(super) most_hosts: Mutex<usize>,
    /// Zone and volid → bytes.
    sizes: Mutex<HashMap<(String, String), u64>>,
    pub(super) listings: Listings,
    pub(super) modified: Mutex<Modified>,
    pub(super) claims: Claims,
    /// When we began to know.
    pub(super) begun: Instant,
    /// Limits parallel reading.
    pub(crate) readers: Semaphore,
}

/// A container's volumes as last read: where, when, mount point → line.
pub(super) type ContainerSlot = Arc<AsyncMutex<Option<(String, Instant, BTreeMap<String, String>)>>>;

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Region {
    /// Makes no call.
    #[must_use]
    pub(crate) fn new(name: String, client: Client, rules: Rules, kube: Option<Arc<Kube>>) -> Self {
        Self {
            name,
            client: Mutex::new(Arc::new(client)),
            rules: Mutex::new(rules),
            kube,
            resources: Reading::default(),
            last_resources: Mutex::default(),
            states: Mutex::default(),
            vms: Mutex::default(),
            containers: Mutex::default(),
            delayed: Mutex::default(),
            sees_all_vms: Reading::default(),
            quorate: Reading::default(),
            doubts: Arc::default(),
            lost_deletions: Arc::default(),
            quiet: Mutex::default(),
            offline_since: Mutex::default(),
            leftovers: Mutex::default(),
            names: Mutex::default(),
            most_hosts: Mutex::default(),
            sizes: Mutex::default(),
            listings: Listings::default(),
            modified: Mutex::default(),
            claims: Claims::default(),
            begun: Instant::now(),
            readers: Semaphore::new(PARALLEL_READS),
        }
    }

    /// The config file changed; what is known of the cluster stays known.
    pub(crate) fn renew(&self, client: Client, rules: Rules) {
        let mut held = locked(&self.client);
        client.heard.follow(&held.heard);
        *held = Arc::new(client.instead_of(&held));
        *locked(&self.rules) = rules;
    }

    /// Takes the place of one of its name at other addresses: another cluster, perhaps. What that one began goes on, so that its claims
    /// and its doubts hold.
    #[must_use]
    pub(crate) fn after(self, before: &Self) -> Self {
        let (doubts, lost_deletions) = (Arc::clone(&before.doubts), Arc::clone(&before.lost_deletions));
        Self { doubts, lost_deletions, claims: before.claims.shared(), ..self }
    }

    /// Its API.
    #[must_use]
    pub(crate) fn client(&self) -> Arc<Client> {
        Arc::clone(&locked(&self.client))
    }

    /// What the config file says.
    #[must_use]
    pub(crate) fn rules(&self) -> Rules {
        locked(&self.rules).clone()
    }

    pub(super) fn vm(&self, vmid: u32) -> Arc<VmSlot> {
        Arc::clone(locked(&self.vms).entry(vmid).or_default())
    }

    /// Waits until no other call changes this VM.
    pub(crate) async fn change_alone(&self, vmid: u32) -> OwnedMutexGuard<()> {
        metrics::waited(Lock::Vm, Arc::clone(&self.vm(vmid).changing).lock_owned()).await
    }

    /// Whether one of our own calls changes this VM now.
    #[must_use]
    pub(super) fn is_changing(&self, vmid: u32) -> bool {
        self.vm(vmid).changing.try_lock().is_err()
    }

    /// Somebody else changes the VM: it is read again before it counts.
    pub(super) async fn distrust(&self, vmid: u32) {
        if let Some(known) = self.vm(vmid).known.lock().await.as_mut() {
            known.is_stale = true;
        }
    }

    /// Slots that are known to be unusable in this QEMU process.
    #[must_use]
    pub(crate) fn leaked(&self, vmid: u32, pid: Option<u64>) -> BTreeSet<u8> {
        let slot = self.vm(vmid);
        let mut leaked = locked(&slot.leaked);
        if leaked.0 != pid {
            *leaked = (pid, BTreeSet::new());
        }
        leaked.1.clone()
    }

    /// Slots out of which a removal may yet be carried out: with the same drive there again, the config would be the one it is meant for.
    #[must_use]
    pub(super) fn late_removals(&self, vmid: u32) -> BTreeSet<u8> {
        let slot = self.vm(vmid);
        let mut late = locked(&slot.late_removals);
        late.retain(|_, since| since.elapsed() < DOUBT_AGE);
        late.keys().copied().collect()
    }

    /// Notes such a slot, of the process last asked about.
    pub(crate) fn leak(&self, vmid: u32, lun: u8) {
        locked(&self.vm(vmid).leaked).1.insert(lun);
    }

    /// VMs, storages and nodes, read since `since`.
    ///
    /// # Errors
    /// Proxmox's.
    pub(crate) async fn resources(&self, since: Instant) -> Result<Arc<Resources>, pve::Error> {
        let read = async {
            let (read_at, request) = (Instant::now(), api::resources());
            let call = request.name();
            let resources = Arc::new(api::read_resources(&call, &self.client().call(request).await?)?);
            self.note_hosts(&resources);
            *locked(&self.last_resources) = Some((read_at, Arc::clone(&resources)));
            Ok(resources)
        };
        self.resources.since(since, read).await
    }

    /// A node that was said to be there is not: the next one who asks reads again.
    pub(super) async fn distrust_resources(&self) {
        self.resources.distrust().await;
    }

    #[cfg(test)]
    pub(super) async fn put_resources(&self, read_at: Instant, resources: Resources) {
        self.resources.put(read_at, Arc::new(resources)).await;
    }

    /// The VMs of a node, whether they run and what is plugged, read since `since`.
    ///
    /// # Errors
    /// Proxmox's.
    pub(crate) async fn states(&self, host: &str, since: Instant) -> Result<BTreeMap<u32, VmState>, pve::Error> {
        let cell = Arc::clone(locked(&self.states).entry(host.into()).or_default());
        let read = async {
            let request = api::vm_states(host);
            let call = request.name();
            api::read_vm_states(&call, &self.client().call(request).await?)
        };
        cell.since(since, read).await
    }

    /// One VM's state now; the list of its node is kept true with it.
    ///
    /// # Errors
    /// Proxmox's.
    pub(crate) async fn state_now(&self, host: &str, vmid: u32) -> Result<VmState, pve::Error> {
        let request = api::vm_state(host, vmid);
        let call = request.name();
        let state = api::read_vm_state(&call, &self.client().call(request).await?)?;
        let cell = Arc::clone(locked(&self.states).entry(host.into()).or_default());
        cell.amend(|states| drop(states.insert(vmid, state.clone()))).await;
        self.note_seen(vmid, &state).await;
        Ok(state)
    }

    /// One VM's state by the list of its node, read since `since`; nothing where it is not listed, or QEMU did not answer.
    ///
    /// # Errors
    /// Proxmox's.
    pub(crate) async fn listed_state(&self, host: &str, vmid: u32, since: Instant) -> Result<Option<VmState>, pve::Error> {
        let Some(state) = self.states(host, since).await?.remove(&vmid).filter(|state| state.plugged.is_some()) else { return Ok(None) };
        self.note_seen(vmid, &state).await;
        Ok(Some(state))
    }

    /// A slot that was seen empty holds something new when it is seen filled.
    async fn note_seen(&self, vmid: u32, state: &VmState) {
        if let (Some(known), Some(plugged)) = (self.vm(vmid).known.lock().await.as_mut(), &state.plugged) {
            known.seen.iter_mut().for_each(|(_, seen)| seen.retain(|key| plugged.contains(key)));
        }
    }

    /// A VM's config, read since `since`.
    ///
    /// # Errors
    /// Proxmox's.
    pub(crate) async fn config(&self, host: &str, vmid: u32, since: Instant) -> Result<Known, pve::Error> {
        let slot = self.vm(vmid);
        let mut held = slot.known.lock().await;
        if let Some(known) = held.as_ref().filter(|known| known.counts(host, since)) {
            return Ok(known.clone());
        }
        let (read_at, request) = (Instant::now(), api::pending(host, vmid));
        let call = request.name();
        let config = api::read_pending(&call, &self.client().call(request).await?)?;
        let (kept, seen, snapshots) = held.take().map_or_else(Default::default, |old| (old.held, old.seen, old.snapshots));
        let known = Known { host: host.into(), config, read_at, held: kept, seen, snapshots, is_stale: false };
        known.note_named(&slot);
        *held = Some(known.clone());
        Ok(known)
    }

    /// Whether that needs no call; waits for one that goes on.
    pub(crate) async fn is_read(&self, vmid: u32, host: &str, since: Instant) -> bool {
        self.vm(vmid).known.lock().await.as_ref().is_some_and(|known| known.counts(host, since))
    }

    /// The snapshots' drives, read again only when the VM's config changed: its digest covers them.
    ///
    /// # Errors
    /// Proxmox's.
    pub(crate) async fn snapshots(&self, known: &mut Known, vmid: u32) -> Result<(), pve::Error> {
        let digest = known.config.digest.clone();
        if known.snapshots.as_ref().is_some_and(|known| !digest.is_empty() && known.digest == digest) {
            return Ok(());
        }
        let request = api::snapshots(&known.host, vmid);
        let call = request.name();
        let mut all = BTreeMap::new();
        for name in api::read_snapshots(&call, &self.client().call(request).await?)? {
            let request = api::snapshot_config(&known.host, vmid, &name);
            let call = request.name();
            let drives = api::read_snapshot_config(&call, &self.client().call(request).await?)?;
            all.insert(name, drives);
        }
        known.snapshots = Some(Snapshots { digest, drives: all });
        if let Some(held) = self.vm(vmid).known.lock().await.as_mut() {
            held.snapshots.clone_from(&known.snapshots);
        }
        Ok(())
    }

    /// Keeps what the slots of a VM hold, as far as config and QEMU say it together.
    pub(crate) async fn remember(&self, vmid: u32, known: &mut Known, state: &VmState) {
        let seen = attach::Seen { config: &known.config, running: state.running, plugged: state.plugged.as_ref() };
        if let Some(plugged) = &state.plugged {
            known.held.retain(|key, _| plugged.contains(key));
        }
        let explained = attach::explained(seen);
        known.held.extend(explained);
        if let Some(held) = self.vm(vmid).known.lock().await.as_mut() {
            held.held.clone_from(&known.held);
            // Of this very reading only: another call may have read it again.
            if held.read_at == known.read_at {
                held.seen = state.plugged.clone().map(|plugged| (state.pid, plugged));
            }
        }
    }

    /// Whether a VM cannot have got the volume since it was last read: that does not name it, and the same QEMU has nothing more than
    /// it had, but what we saw it take ourselves.
    pub(crate) async fn has_nothing_new(&self, vmid: u32, host: &str, state: &VmState, volid: &str) -> bool {
        let slot = self.vm(vmid);
        let mut held = slot.known.lock().await;
        let Some(known) = held.as_mut().filter(|known| known.counts(host, ago(EVIDENCE_AGE))) else { return false };
        if locked(&slot.named).contains(volid) {
            return false;
        }
        let Some(plugged) = &state.plugged else { return !state.running };
        let Some((_, seen)) = known.seen.as_mut().filter(|(pid, _)| *pid == state.pid) else { return false };
        // A slot that was empty once is filled with something new.
        seen.retain(|key| plugged.contains(key));
        let took = |key: &String| known.held.get(key).is_some_and(|volid| known.config.configured(key).map(volume_of) == Some(volid));
        plugged.iter().all(|key| seen.contains(key) || took(key))
    }

    /// Notes what we saw QEMU take.
    pub(crate) async fn note_held(&self, vmid: u32, key: &str, volid: &str) {
        if let Some(held) = self.vm(vmid).known.lock().await.as_mut() {
            held.held.insert(key.into(), volid.into());
        }
    }

    /// The last reading of a VM, however old.
    pub(crate) async fn last_known(&self, vmid: u32) -> Option<Known> {
        self.vm(vmid).known.lock().await.clone()
    }

    /// VMIDs whose last reading names `volid`, wherever they are.
    pub(crate) async fn ever_naming(&self, volid: &str) -> Vec<u32> {
        let all: Vec<(u32, Arc<VmSlot>)> = locked(&self.vms).iter().map(|(vmid, slot)| (*vmid, Arc::clone(slot))).collect();
        let mut naming = Vec::new();
        for (vmid, slot) in all {
            if slot.known.lock().await.as_ref().is_some_and(|known| known.config.naming(volid).next().is_some()) {
                naming.push(vmid);
            }
        }
        naming
    }

    /// Of these volumes, those that the last finished reading of another VM names.
    pub(super) fn named_beside(&self, vmid: u32, volids: &BTreeSet<String>) -> BTreeSet<String> {
        let mut named = BTreeSet::new();
        for (_, slot) in locked(&self.vms).iter().filter(|(other, _)| **other != vmid && !volids.is_empty()) {
            named.extend(locked(&slot.named).intersection(volids).cloned());
        }
        named
    }

    /// Notes that the volume's attachment to this VM was answered OK.
    pub(super) fn note_alone(&self, handle: &VolumeHandle, vmid: u32) {
        let slot = self.vm(vmid);
        let mut alone = locked(&slot.alone);
        // No more than a VM can have.
        alone.retain(|volid| locked(&slot.named).contains(volid));
        alone.insert(handle.volid());
    }

    /// It is not there any more.
    pub(super) fn forget_alone(&self, handle: &VolumeHandle, vmid: u32) {
        locked(&self.vm(vmid).alone).remove(&handle.volid());
    }

    /// Whether we have answered the volume's attachment to this VM OK.
    pub(super) fn was_found_alone(&self, handle: &VolumeHandle, vmid: u32) -> bool {
        locked(&self.vm(vmid).alone).contains(&handle.volid())
    }

    /// Forgets a VM that is gone.
    pub(crate) async fn forget(&self, vmid: u32) {
        // Not its slot: others may wait there.
        let slot = self.vm(vmid);
        *slot.known.lock().await = None;
        locked(&slot.named).clear();
        locked(&slot.alone).clear();
    }

    /// Changes drives of a VM and waits for the task. The reading of the VM is kept true.
    ///
    /// # Errors
    /// Proxmox's; also the task's.
    pub(crate) async fn change(&self, host: &str, vmid: u32, change: &Change, digest: &str) -> Result<(), pve::Error> {
        let least = self.vm(vmid).known.lock().await.as_ref().map_or(Duration::ZERO, |known| known.least(change));
        let done = self.send_change(host, vmid, change, digest, least).await;
        if done.as_ref().is_err_and(|error| error.meaning() == Meaning::OutcomeUnknown) {
            let late = change.delete.iter().filter_map(|key| Some((attach::lun_of(key)?, Instant::now())));
            locked(&self.vm(vmid).late_removals).extend(late);
        }
        if let Some(known) = self.vm(vmid).known.lock().await.as_mut() {
            known.config.digest.clear();
            match done {
                Ok(()) => {
                    note_change(&mut known.config, change);
                    // By its digest it is ours, and nothing new to who looks for what others plugged.
                    known.seen.iter_mut().for_each(|(_, seen)| seen.extend(change.set.keys().cloned()));
                }
                Err(_) => known.is_stale = true,
            }
            known.note_named(&self.vm(vmid));
        }
        done
    }

    /// `least`: what it takes at least.
    async fn send_change(&self, host: &str, vmid: u32, change: &Change, digest: &str, least: Duration) -> Result<(), pve::Error> {
        if !change.delete.is_empty() {
            self.check_acts_now(&api::change(host, vmid, change, digest, None).name()).await?;
        }
        let sent = Instant::now();
        // What takes seconds would keep one of the node's three API workers from all others: it is asked about when it can have ended.
        let permit = if least.is_zero() { self.delayed(host).try_acquire_owned().ok() } else { None };
        let delay = permit.is_some().then_some(DELAY_S);
        let answer = self.client().call(api::change(host, vmid, change, digest, delay)).await;
        drop(permit);
        match api::read_upid(&answer?) {
            Some(upid) => self.client().wait(&upid, sent + least).await,
            None => Ok(()),
        }
    }

    /// A container's volumes by mount point, read since `since`.
    ///
    /// # Errors
    /// Proxmox's.
    pub(crate) async fn container(&self, host: &str, vmid: u32, since: Instant) -> Result<BTreeMap<String, String>, pve::Error> {
        let slot = Arc::clone(locked(&self.containers).entry(vmid).or_default());
        let mut held = slot.lock().await;
        if let Some((_, _, lines)) = held.as_ref().filter(|(at, read_at, _)| at == host && *read_at >= since) {
            return Ok(lines.clone());
        }
        let (read_at, request) = (Instant::now(), api::container(host, vmid));
        let call = request.name();
        let lines = api::read_container(&call, &self.client().call(request).await?)?;
        *held = Some((host.into(), read_at, lines.clone()));
        Ok(lines)
    }

    /// Notes the size of a volume that we made or grew.
    pub(crate) fn note_size(&self, handle: &VolumeHandle, bytes: u64) {
        self.listings.note_changed(&handle.volid());
        self.keep_size(handle, bytes);
    }

    /// Notes the size of a volume as it was read.
    pub(crate) fn keep_size(&self, handle: &VolumeHandle, bytes: u64) {
        let key = (self.zone_of(handle), handle.volid());
        let mut sizes = locked(&self.sizes);
        if sizes.len() >= MAX_SIZES {
            sizes.clear();
        }
        sizes.insert(key, bytes);
    }

    /// The size of a volume, where it was noted.
    #[must_use]
    pub(crate) fn noted_size(&self, handle: &VolumeHandle) -> Option<u64> {
        let key = (self.zone_of(handle), handle.volid());
        locked(&self.sizes).get(&key).copied()
    }

    /// Frees a volume and waits for the task.
    ///
    /// # Errors
    /// Proxmox's; also the task's.
    pub(crate) async fn free(&self, host: &str, storage: &str, volid: &str) -> Result<(), pve::Error> {
        self.check_acts_now(&api::free(host, storage, volid, None).name()).await?;
        let permit = self.delayed(host).try_acquire_owned().ok();
        let delay = permit.is_some().then_some(DELAY_S);
        let answer = self.client().call(api::free(host, storage, volid, delay)).await;
        drop(permit);
        self.listings.note_changed(volid);
        match api::read_upid(&answer?) {
            Some(upid) => {
                let freed = self.client().wait(&upid, Instant::now()).await;
                self.listings.note_changed(volid);
                freed
            }
            None => Ok(()),
        }
    }

    fn delayed(&self, host: &str) -> Arc<Semaphore> {
        let mut all = locked(&self.delayed);
        Arc::clone(all.entry(host.into()).or_insert_with(|| Arc::new(Semaphore::new(DELAYED_PER_HOST))))
    }

    /// A volume's size in bytes.
    ///
    /// # Errors
    /// Proxmox's; [`Meaning::NoSuchVolume`] where it is not there.
    pub(crate) async fn volume_size(&self, host: &str, storage: &str, volid: &str) -> Result<u64, pve::Error> {
        let request = api::volume(host, storage, volid);
        let call = request.name();
        api::read_volume(&call, &self.client().call(request).await?)
    }
}

/// What the config is after a change that was carried out.
fn note_change(config: &mut VmConfig, change: &Change) {
    for (key, drive) in &change.set {
        config.lines.insert(key.clone(), Line { value: Some(drive.clone()), ..Line::default() });
    }
    for key in &change.delete {
        config.lines.remove(key);
    }
    for key in &change.revert {
        match config.lines.get_mut(key) {
            Some(line) if line.value.is_some() => (line.pending, line.delete) = (None, false),
            _ => drop(config.lines.remove(key)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ClusterConfig, Credentials, Trust};
    use crate::secret::Secret;

    /// Another call reads the VM that has the leftover, and its node takes its time.
    #[tokio::test]
    async fn a_vm_that_is_being_read_is_known_by_its_last_reading() {
        let credentials = Credentials::Token { id: "csi@pve!csi".into(), secret: Secret::new("x".into()) };
        let urls = vec!["http://127.0.0.1:1/api2/json".into()];
        let cluster = ClusterConfig { region: "r".into(), urls, trust: Trust::System, credentials, fenced: BTreeSet::new() };
        let region = Region::new("r".into(), Client::new(&cluster, None), Rules::default(), None);
        let line = Line { value: Some("san:vm-9999-a,size=1G".into()), ..Line::default() };
        let config = VmConfig { lines: BTreeMap::from([("scsi1".into(), line)]), digest: "d".into() };
        let (read_at, held) = (Instant::now(), BTreeMap::new());
        let known = Known { host: "pve1".into(), config, read_at, held, seen: None, snapshots: None, is_stale: false };
        let slot = region.vm(102);
        known.note_named(&slot);
        let mut reading = slot.known.lock().await;
        *reading = Some(known);
        let volids = BTreeSet::from(["san:vm-9999-a".to_string(), "san:vm-9999-b".to_string()]);
        assert_eq!(region.named_beside(101, &volids), BTreeSet::from(["san:vm-9999-a".to_string()]));
        assert!(region.named_beside(102, &volids).is_empty());
        drop(reading);
        region.forget(102).await;
        assert!(region.named_beside(101, &volids).is_empty());
    }

    /// Twenty ask, and whoever answers for Proxmox hangs up: the one who reads and one more find that out for all.
    #[tokio::test]
    async fn a_proxmox_that_is_down_is_found_out_once_for_all_who_wait() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/api2/json", listener.local_addr().unwrap());
        let connections = Arc::<std::sync::atomic::AtomicUsize>::default();
        let count = Arc::clone(&connections);
        std::thread::spawn(move || {
            while listener.accept().is_ok() {
                count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            }
        });
        let credentials = Credentials::Token { id: "csi@pve!csi".into(), secret: Secret::new("x".into()) };
        let cluster = ClusterConfig { region: "r".into(), urls: vec![url], trust: Trust::System, credentials, fenced: BTreeSet::new() };
        let region = Arc::new(Region::new("r".into(), Client::new(&cluster, None), Rules::default(), None));
        let mut asking = tokio::task::JoinSet::new();
        for _ in 0..20 {
            for what in 0..4 {
                let region = Arc::clone(&region);
                asking.spawn(async move {
                    match what {
                        0 => region.resources(Instant::now()).await.is_err(),
                        1 => region.states("pve1", Instant::now()).await.is_err(),
                        2 => region.is_quorate(Instant::now()).await.is_err(),
                        _ => region.check_sees_all_vms().await.is_err(),
                    }
                });
            }
        }
        assert!(asking.join_all().await.iter().all(|failed| *failed));
        // Four things, two tries of each, and a read whose connection broke is sent once more.
        let tried = connections.load(std::sync::atomic::Ordering::SeqCst);
        assert!(tried <= 4 * 2 * 2, "{tried} connections for 80 who asked");
    }
}
