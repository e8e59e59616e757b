//! One Proxmox cluster as we know it: what was read, when, and the calls that read and write.
//!
//! An idle controller makes no calls: everything is read on demand, no older than the caller allows, and once for all who
//! wait for it at the same time.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard, Semaphore};
use tokio::time::Instant;

use crate::attach;
use crate::error::Error;
use crate::pve::api::{self, Change, Resources, Vm, VmState};
use crate::pve::drive::{Line, VmConfig};
use crate::pve::{self, Client, Meaning};
use crate::request::NodeId;

/// Evidence of who holds a volume may be this old (docs/architecture.md, decision 5). The cluster snapshot, too.
pub(crate) const EVIDENCE_AGE: Duration = Duration::from_secs(60);
/// Whether a VM runs must be known better: a VM that was stopped since would take the drive into its config only.
pub(crate) const STATE_AGE: Duration = Duration::from_secs(5);
/// A lost privilege makes lists shorter and nothing else: as old as the lists may be, no older.
const PERMISSIONS_AGE: Duration = EVIDENCE_AGE;
/// VMs read at a time: each call holds a thread, and one of the node's three API workers for some milliseconds.
pub(crate) const PARALLEL_READS: usize = 8;
/// Calls per Proxmox node that may wait for their task inside the server: each holds one of its three API workers.
const DELAYED_PER_HOST: usize = 2;
/// Most hot-plugs end in 2.5 s; well below the 30 s of Proxmox's own proxy.
const DELAY_S: u8 = 10;
/// After this long, a write whose answer was lost is not carried out any more.
const DOUBT_AGE: Duration = Duration::from_secs(120);

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
    /// Read only where something is to be deleted.
    pub(crate) snapshots: Option<Snapshots>,
}

/// What a VM's snapshots keep.
#[derive(Debug, Clone)]
pub(crate) struct Snapshots {
    /// The config's, which covers them.
    pub(crate) digest: String,
    /// Snapshot → key → drive line.
    pub(crate) drives: BTreeMap<String, BTreeMap<String, String>>,
}

/// A write whose answer was lost: it may still be carried out, but only onto this very config.
#[derive(Debug, Clone)]
struct Doubt {
    vmid: u32,
    digest: String,
    since: Instant,
}

#[derive(Debug, Default)]
struct VmSlot {
    /// Held from the look to the verified end of a change.
    changing: Arc<AsyncMutex<()>>,
    known: AsyncMutex<Option<Known>>,
    /// Slots where QEMU keeps leftovers until the VM restarts, and the process that keeps them.
    leaked: Mutex<(Option<u64>, BTreeSet<u8>)>,
}

type StatesOfHost = Arc<AsyncMutex<Option<(Instant, BTreeMap<u32, VmState>)>>>;

/// One Proxmox cluster.
#[derive(Debug)]
pub(crate) struct Region {
    /// Its name in volume handles.
    pub(crate) name: String,
    /// Its API.
    pub(crate) client: Arc<Client>,
    resources: AsyncMutex<Option<(Instant, Arc<Resources>)>>,
    states: Mutex<HashMap<String, StatesOfHost>>,
    vms: Mutex<HashMap<u32, Arc<VmSlot>>>,
    delayed: Mutex<HashMap<String, Arc<Semaphore>>>,
    sees_all_vms: AsyncMutex<Option<Instant>>,
    doubts: Mutex<HashMap<String, Doubt>>,
    /// Limits parallel reading.
    pub(crate) readers: Semaphore,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Region {
    /// Makes no call.
    #[must_use]
    pub(crate) fn new(name: String, client: Client) -> Self {
        Self {
            name,
            client: Arc::new(client),
            resources: AsyncMutex::default(),
            states: Mutex::default(),
            vms: Mutex::default(),
            delayed: Mutex::default(),
            sees_all_vms: AsyncMutex::default(),
            doubts: Mutex::default(),
            readers: Semaphore::new(PARALLEL_READS),
        }
    }

    fn vm(&self, vmid: u32) -> Arc<VmSlot> {
        Arc::clone(locked(&self.vms).entry(vmid).or_default())
    }

    /// Waits until no other call changes this VM.
    pub(crate) async fn change_alone(&self, vmid: u32) -> OwnedMutexGuard<()> {
        Arc::clone(&self.vm(vmid).changing).lock_owned().await
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

    /// Notes such a slot, of the process last asked about.
    pub(crate) fn leak(&self, vmid: u32, lun: u8) {
        locked(&self.vm(vmid).leaked).1.insert(lun);
    }

    /// VMs, storages and nodes, read since `since`.
    ///
    /// # Errors
    /// Proxmox's.
    pub(crate) async fn resources(&self, since: Instant) -> Result<Arc<Resources>, pve::Error> {
        let mut held = self.resources.lock().await;
        if let Some((_, resources)) = held.as_ref().filter(|(read_at, _)| *read_at >= since) {
            return Ok(Arc::clone(resources));
        }
        let (read_at, request) = (Instant::now(), api::resources());
        let call = request.name();
        let resources = Arc::new(api::read_resources(&call, &self.client.call(request).await?)?);
        *held = Some((read_at, Arc::clone(&resources)));
        Ok(resources)
    }

    /// The VMs of a node, whether they run and what is plugged, read since `since`.
    ///
    /// # Errors
    /// Proxmox's.
    pub(crate) async fn states(&self, host: &str, since: Instant) -> Result<BTreeMap<u32, VmState>, pve::Error> {
        let cell = Arc::clone(locked(&self.states).entry(host.into()).or_default());
        let mut held = cell.lock().await;
        if let Some((_, states)) = held.as_ref().filter(|(read_at, _)| *read_at >= since) {
            return Ok(states.clone());
        }
        let (read_at, request) = (Instant::now(), api::vm_states(host));
        let call = request.name();
        let states = api::read_vm_states(&call, &self.client.call(request).await?)?;
        *held = Some((read_at, states.clone()));
        Ok(states)
    }

    /// One VM's state now; the list of its node is kept true with it.
    ///
    /// # Errors
    /// Proxmox's.
    pub(crate) async fn state_now(&self, host: &str, vmid: u32) -> Result<VmState, pve::Error> {
        let request = api::vm_state(host, vmid);
        let call = request.name();
        let state = api::read_vm_state(&call, &self.client.call(request).await?)?;
        let cell = Arc::clone(locked(&self.states).entry(host.into()).or_default());
        if let Some((_, states)) = cell.lock().await.as_mut() {
            states.insert(vmid, state.clone());
        }
        Ok(state)
    }

    /// A VM's config, read since `since`.
    ///
    /// # Errors
    /// Proxmox's.
    pub(crate) async fn config(&self, host: &str, vmid: u32, since: Instant) -> Result<Known, pve::Error> {
        let slot = self.vm(vmid);
        let mut held = slot.known.lock().await;
        if let Some(known) = held.as_ref().filter(|known| known.read_at >= since && known.host == host) {
            return Ok(known.clone());
        }
        let (read_at, request) = (Instant::now(), api::pending(host, vmid));
        let call = request.name();
        let config = api::read_pending(&call, &self.client.call(request).await?)?;
        let (kept, snapshots) = held.take().map_or_else(Default::default, |old| (old.held, old.snapshots));
        let known = Known { host: host.into(), config, read_at, held: kept, snapshots };
        *held = Some(known.clone());
        Ok(known)
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
        for name in api::read_snapshots(&call, &self.client.call(request).await?)? {
            let request = api::snapshot_config(&known.host, vmid, &name);
            let call = request.name();
            let drives = api::read_snapshot_config(&call, &self.client.call(request).await?)?;
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
        }
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

    /// Forgets a VM that is gone.
    pub(crate) fn forget(&self, vmid: u32) {
        locked(&self.vms).remove(&vmid);
    }

    /// Changes one drive of a VM and waits for the task. The reading of the VM is kept true.
    ///
    /// # Errors
    /// Proxmox's; also the task's.
    pub(crate) async fn change(&self, host: &str, vmid: u32, change: &Change, digest: &str) -> Result<(), pve::Error> {
        let permit = self.delayed(host).try_acquire_owned().ok();
        let delay = permit.is_some().then_some(DELAY_S);
        let answer = self.client.call(api::change(host, vmid, change, digest, delay)).await;
        drop(permit);
        if let Some(upid) = api::read_upid(&answer?) {
            self.client.wait(&upid).await?;
        }
        if let Some(known) = self.vm(vmid).known.lock().await.as_mut() {
            known.config.digest.clear();
            match change {
                Change::Set(key, drive) => {
                    known.config.lines.insert(key.clone(), Line { value: Some(drive.clone()), ..Line::default() });
                }
                Change::Delete(key) => {
                    known.config.lines.remove(key);
                }
                Change::Revert(key) => match known.config.lines.get_mut(key) {
                    Some(line) if line.value.is_some() => (line.pending, line.delete) = (None, false),
                    _ => drop(known.config.lines.remove(key)),
                },
            }
        }
        Ok(())
    }

    /// Frees a volume and waits for the task.
    ///
    /// # Errors
    /// Proxmox's; also the task's.
    pub(crate) async fn free(&self, host: &str, storage: &str, volid: &str) -> Result<(), pve::Error> {
        let permit = self.delayed(host).try_acquire_owned().ok();
        let delay = permit.is_some().then_some(DELAY_S);
        let answer = self.client.call(api::free(host, storage, volid, delay)).await;
        drop(permit);
        match api::read_upid(&answer?) {
            Some(upid) => self.client.wait(&upid).await,
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
        api::read_volume(&call, &self.client.call(request).await?)
    }

    /// The VM that a node id names; nothing: there is none in what is shown to us.
    ///
    /// # Errors
    /// Proxmox's; or several VMs have that name.
    pub(crate) async fn find_vm(&self, node: &NodeId) -> Result<Option<Vm>, Error> {
        for since in [ago(EVIDENCE_AGE), Instant::now()] {
            let resources = self.resources(since).await?;
            let mut found = resources.vms.values().filter(|vm| match node {
                NodeId::Vmid(_, vmid) => vm.vmid == *vmid,
                NodeId::Name(name) => !vm.template && vm.name.as_deref() == Some(name),
            });
            match (found.next(), found.next()) {
                (Some(one), None) => return Ok(Some(one.clone())),
                (Some(one), Some(other)) => {
                    return Err(Error::precondition(format!(
                        "node {node}: VMs {} and {} of region {} both have this name; node ids should carry the VMID (NAME/VMID)",
                        one.vmid, other.vmid, self.name
                    )));
                }
                (None, _) => (),
            }
        }
        let resources = self.resources(ago(STATE_AGE)).await?;
        if let (NodeId::Name(_), Some(nameless)) = (node, resources.vms.values().find(|vm| vm.name.is_none())) {
            return Err(Error::unavailable(format!(
                "node {node}: no VM of that name, but VM {} on {} shows no name now (its node is silent, or it is new); repeated",
                nameless.vmid, nameless.host
            )));
        }
        Ok(None)
    }

    /// Whether every VM of the cluster is shown to us: without that, nobody can be said not to hold a volume.
    ///
    /// # Errors
    /// The privilege that is missing; or Proxmox's.
    pub(crate) async fn check_sees_all_vms(&self) -> Result<(), Error> {
        let mut checked = self.sees_all_vms.lock().await;
        if checked.is_some_and(|at| at >= ago(PERMISSIONS_AGE)) {
            return Ok(());
        }
        if api::read_sees_all_vms(&self.client.call(api::permissions()).await?) {
            *checked = Some(Instant::now());
            return Ok(());
        }
        Err(Error::precondition(format!(
            "region {}: not every VM is shown to us, so that the holder of a volume could be overlooked; give the token's role VM.Audit on \
             /vms (or /) with propagation",
            self.name
        )))
    }

    /// "Not there" is true only if the cluster is quorate, answered, and shows everything.
    ///
    /// # Errors
    /// What is missing.
    pub(crate) async fn check_absence_counts(&self) -> Result<(), Error> {
        self.check_sees_all_vms().await?;
        if self.is_quorate().await? {
            return Ok(());
        }
        Err(Error::unavailable(format!(
            "region {}: the cluster has no quorum, so that what is not shown may still be there; repeated until it has",
            self.name
        )))
    }

    /// By Proxmox's word; without Sys.Audit, by more than half of its nodes being online.
    ///
    /// # Errors
    /// Proxmox's.
    pub(crate) async fn is_quorate(&self) -> Result<bool, Error> {
        let request = api::cluster_status();
        let call = request.name();
        match self.client.call(request).await.and_then(|data| api::read_quorate(&call, &data)) {
            Ok(quorate) => Ok(quorate),
            Err(error) if error.meaning() == Meaning::Forbidden => {
                let resources = self.resources(ago(STATE_AGE)).await?;
                let online = resources.hosts.values().filter(|status| *status == "online").count();
                let alone = resources.hosts.len() == 1;
                Ok(alone || online * 2 > resources.hosts.len())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Notes a write of `volid` into a VM whose answer may be lost, and which is not verified yet.
    pub(crate) fn doubt(&self, volid: &str, vmid: u32, digest: &str) {
        let doubt = Doubt { vmid, digest: digest.into(), since: Instant::now() };
        locked(&self.doubts).insert(volid.into(), doubt);
    }

    /// Whether such a write can still be carried out, or was: Proxmox does it only onto the config of its digest. Time alone
    /// settles nothing: the VM is looked at again, after the last moment at which it could have come.
    ///
    /// # Errors
    /// It can, it was, or the VM cannot be looked at.
    pub(crate) async fn check_no_doubt(&self, volid: &str) -> Result<(), Error> {
        let Some(doubt) = locked(&self.doubts).get(volid).cloned() else { return Ok(()) };
        let host = self.resources(Instant::now()).await?.vms.get(&doubt.vmid).map(|vm| vm.host.clone());
        let Some(host) = host else {
            self.check_absence_counts().await?;
            self.settle(volid);
            return Ok(());
        };
        let may_come = doubt.since.elapsed() < DOUBT_AGE;
        let config = self.config(&host, doubt.vmid, Instant::now()).await?.config;
        if config.naming(volid).any(|(key, _)| !key.starts_with("unused")) {
            return Err(Error::unavailable(format!("volume {volid}: VM {} got it after all; repeated", doubt.vmid)));
        }
        if may_come && config.digest == doubt.digest {
            return Err(Error::unavailable(format!(
                "volume {volid}: the answer to its attachment to VM {} was lost, and Proxmox may still carry it out; decided within {} s",
                doubt.vmid,
                DOUBT_AGE.as_secs()
            )));
        }
        self.settle(volid);
        Ok(())
    }

    /// The VM of such a write.
    #[must_use]
    pub(crate) fn doubted_vm(&self, volid: &str) -> Option<u32> {
        locked(&self.doubts).get(volid).map(|doubt| doubt.vmid)
    }

    /// The outcome of such a write is known.
    pub(crate) fn settle(&self, volid: &str) {
        locked(&self.doubts).remove(volid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ClusterConfig, Credentials};
    use crate::secret::Secret;

    /// The host went away during an attach: what was sent may be in the VM's config, and nobody has looked.
    #[tokio::test]
    async fn a_lost_write_is_not_forgotten_before_its_vm_was_looked_at() {
        let credentials = Credentials::Token { id: "csi@pve!csi".into(), secret: Secret::new("x".into()) };
        let url = "http://127.0.0.1:1/api2/json".into();
        let cluster = ClusterConfig { region: "r".into(), url, insecure: false, credentials };
        let region = Region::new("r".into(), Client::new(&cluster, None));
        let vm = Vm { vmid: 101, host: "pve1".into(), name: None, template: false };
        let resources = Resources { vms: BTreeMap::from([(101, vm)]), ..Resources::default() };
        *region.resources.lock().await = Some((Instant::now() + Duration::from_secs(60), Arc::new(resources)));
        let long_ago = Doubt { vmid: 101, digest: "d".into(), since: ago(DOUBT_AGE + Duration::from_secs(1)) };
        locked(&region.doubts).insert("ds:vm-9999-a".into(), long_ago);
        assert_eq!(region.check_no_doubt("ds:vm-9999-a").await.unwrap_err().code, tonic::Code::Unavailable);
        assert_eq!(region.doubted_vm("ds:vm-9999-a"), Some(101));
    }
}
