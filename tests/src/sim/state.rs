//! The cluster's state, and the context that every handler gets.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::machine::Machine;

use super::access::{Access, Caller};
use super::answer::ApiError;
use super::clock::{Busy, Clock, Held};
use super::config::VmConfig;
use super::describe::{Description, Node};
use super::endpoint::Endpoint;
use super::faults::{Faults, KILLED};
use super::storage::{Name, Storage};
use super::tasks::{Log, Tasks};
use super::turns::Turns;
use super::version::Version;

/// How long the config flock and a local storage's flock are waited for.
const FLOCK_WAIT: Duration = Duration::from_secs(10);
/// pmxcfs forgets a silent node's numbers after this.
const STATISTICS_LAST: Duration = Duration::from_secs(300);
/// cfs locks are polled; the recording shows nine tries in 10 s.
const CFS_TRIES: usize = 9;

/// How long things take, beside what they really take. In virtual time this orders them; in real time it is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Latency {
    /// Each request.
    pub request: Duration,
    /// Plugging a drive.
    pub plug: Duration,
    /// Waiting for a disk to leave; a controller of its own takes as long again.
    pub unplug: Duration,
    /// Allocating or deleting a volume, growing one.
    pub storage: Duration,
    /// A config task, beside what it plugs.
    pub task: Duration,
    /// A config task that takes disks out, beside what each takes: the first look at the guest comes late.
    pub unplug_task: Duration,
    /// The same where disks have a controller of their own: they are waited for twice each.
    pub own_unplug_task: Duration,
    /// Each request takes what was measured of its endpoint, instead of `request`, and a dead node is found dead after 3 s.
    pub by_endpoint: bool,
}

const NO_TIME: Duration = Duration::ZERO;

impl Latency {
    /// No added waits.
    pub const NONE: Latency = Latency {
        request: NO_TIME,
        plug: NO_TIME,
        unplug: NO_TIME,
        storage: NO_TIME,
        task: NO_TIME,
        unplug_task: NO_TIME,
        own_unplug_task: NO_TIME,
        by_endpoint: false,
    };
    /// As measured on the recorded host.
    pub const RECORDED: Latency = Latency {
        request: Duration::from_millis(15),
        plug: Duration::from_millis(250),
        unplug: Duration::from_millis(1000),
        storage: Duration::from_millis(60),
        ..Latency::NONE
    };
    /// The model of the storm (the reference driver was run on the same): an attachment is a task of 400 ms and 100 ms more for each
    /// further disk, a detachment one of 2.2 s and 1.05 s more; with a controller for each disk 2.2 s and 2.1 s more.
    pub const MODEL: Latency = Latency {
        plug: Duration::from_millis(100),
        unplug: Duration::from_millis(1050),
        storage: Duration::from_millis(60),
        task: Duration::from_millis(300),
        unplug_task: Duration::from_millis(1150),
        own_unplug_task: Duration::from_millis(100),
        by_endpoint: true,
        ..Latency::NONE
    };

    /// What a request takes; `vms`: those of its node.
    pub(crate) fn of(&self, endpoint: Endpoint, vms: usize) -> Duration {
        if !self.by_endpoint {
            return self.request;
        }
        Duration::from_millis(match endpoint {
            Endpoint::StorageStatus | Endpoint::NodeStorages => 130,
            Endpoint::ContentList => 150,
            Endpoint::ContentLook | Endpoint::VmUpdateAsync | Endpoint::VmUpdate | Endpoint::VmUnlink | Endpoint::VmResize => 40,
            Endpoint::VmStatus => 30,
            // Every QEMU is asked.
            Endpoint::VmList => 30 + 2 * u64::try_from(vms).unwrap_or(0),
            Endpoint::VmConfig | Endpoint::VmPending | Endpoint::SnapshotList => 15,
            _ => 10,
        })
    }
}

/// A drive that QEMU really has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plugged {
    pub volid: String,
    /// The image that was opened; it may have been deleted since.
    pub file: PathBuf,
    /// Inode: a file made later under the same name is another one.
    pub(crate) inode: u64,
    pub read_only: bool,
    pub wwn: Option<String>,
    pub serial: Option<String>,
    pub size_bytes: u64,
}

/// A virtual machine.
#[derive(Debug, Default)]
pub(crate) struct Vm {
    pub(crate) node: String,
    pub(crate) config: VmConfig,
    pub(crate) running: bool,
    pub(crate) paused: bool,
    /// QEMU does not answer (SIGSTOP).
    pub(crate) hung: bool,
    /// Created this moment: pvestatd has not seen it.
    pub(crate) fresh: bool,
    pub(crate) plugged: BTreeMap<String, Plugged>,
    /// Indexes whose block node is left over: nothing can be plugged there until the VM restarts.
    pub(crate) leaked: BTreeSet<String>,
    /// Those of them that are left over because another VM had the image.
    pub(crate) leaked_to_rivals: BTreeSet<String>,
    pub(crate) machine: Option<Arc<dyn Machine>>,
}

/// Everything that changes.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) nodes: BTreeMap<String, Node>,
    /// When a node went away; what pvestatd last said of it is believed for a while.
    pub(crate) down_since: BTreeMap<String, Duration>,
    pub(crate) storages: BTreeMap<String, Storage>,
    pub(crate) vms: BTreeMap<u32, Vm>,
    /// Volumes with a deletion that was answered 596 and is yet to be carried out, once for each.
    pub(crate) late_deletions: Vec<String>,
    /// Containers: VMID to node and config.
    pub(crate) containers: BTreeMap<u32, (String, BTreeMap<String, String>)>,
    pub(crate) access: Access,
    pub(crate) tasks: Tasks,
    pub(crate) faults: Faults,
    pub(crate) without_statistics: bool,
    pub(crate) without_resolver: bool,
    /// pvedaemon is stopped.
    pub(crate) daemon_down: bool,
    /// Corosync lost its majority.
    pub(crate) without_quorum: bool,
    /// In which order the keys of one config call are worked on, when not by name (Perl's hash order is random).
    pub(crate) key_order: Vec<String>,
    /// Extra time that creating an image takes.
    pub(crate) slow_allocation: Duration,
}

/// What every handler works with; clones share it.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) name: String,
    /// The node whose pveproxy answers.
    pub(crate) entry_node: String,
    pub(crate) version: Version,
    pub(crate) latency: Latency,
    pub(crate) clock: Clock,
    /// Requests wait until they are let in.
    pub(crate) turns: Option<Turns>,
    pub(crate) state: Mutex<State>,
}

/// The clock's name for a node's lock of a local storage.
pub(crate) fn local_lock(node: &str, id: &str) -> String {
    format!("{node} pve-storage-{id}")
}

impl Cluster {
    pub(crate) fn new(
        description: &Description,
        root: &std::path::Path,
        version: Version,
        latency: Latency,
        clock: Clock,
    ) -> anyhow::Result<Cluster> {
        let mut storages = BTreeMap::new();
        for about in &description.storages {
            storages.insert(about.id.clone(), Storage::new(about, root)?);
        }
        let entry_node = description.nodes.first().ok_or_else(|| anyhow::anyhow!("the description names no node"))?.name.clone();
        let vms = description.vms.iter().map(|vm| {
            let config = VmConfig { current: vm.config.clone(), ..VmConfig::default() };
            (vm.vmid, Vm { node: vm.node.clone(), config, ..Vm::default() })
        });
        let state = State {
            nodes: description.nodes.iter().map(|node| (node.name.clone(), node.clone())).collect(),
            down_since: BTreeMap::new(),
            storages,
            vms: vms.collect(),
            late_deletions: Vec::new(),
            containers: BTreeMap::new(),
            access: Access::new(description),
            tasks: Tasks::default(),
            faults: Faults::default(),
            without_statistics: description.without_statistics,
            without_resolver: description.without_resolver,
            daemon_down: false,
            without_quorum: false,
            key_order: Vec::new(),
            slow_allocation: Duration::ZERO,
        };
        Ok(Cluster { name: description.cluster.clone(), entry_node, version, latency, clock, turns: None, state: Mutex::new(state) })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a task and gives its UPID.
    pub(crate) fn fork<F, W>(self: &Arc<Self>, node: &str, kind: &str, id: &str, caller: &Caller, work: F) -> String
    where
        F: FnOnce(Arc<Cluster>, Log) -> W,
        W: Future<Output = Result<(), ApiError>> + Send + 'static,
    {
        let task = self.state().tasks.begin(node, kind, id, caller, self.clock.unix_seconds());
        let future = work(Arc::clone(self), task.log.clone());
        let (cluster, upid, busy): (_, _, Busy) = (Arc::clone(self), task.upid.clone(), self.clock.busy());
        let kind = kind.to_owned();
        tokio::spawn(async move {
            let planned = cluster.state().faults.task_end(&kind);
            let killed = cluster.state().faults.task_killed();
            let exit = match (planned, killed) {
                (Some(text), _) => text,
                (None, Some(false)) => KILLED.to_owned(),
                (None, killed) => {
                    let done = future.await.map_or_else(|error| error.exit_status(), |()| "OK".to_owned());
                    if killed.is_some() { KILLED.to_owned() } else { done }
                }
            };
            cluster.state().tasks.end(&upid, exit, cluster.clock.unix_seconds());
            cluster.clock.open(&task.done);
            drop(busy);
        });
        task.upid
    }

    /// The per-VM flock.
    pub(crate) async fn lock_config(&self, vmid: u32) -> Result<Held, ApiError> {
        let file = format!("/var/lock/qemu-server/lock-{vmid}.conf");
        // A VM is on one node.
        self.flock(&file, &file, None).await
    }

    /// The lock under which a storage allocates and frees: of the cluster, or of each node.
    pub(crate) async fn lock_storage(&self, node: &str, id: &str, shared: bool, log: Option<&Log>) -> Result<Held, ApiError> {
        if !shared {
            let file = format!("/var/lock/pve-manager/pve-storage-{id}");
            return self.flock(&local_lock(node, id), &file, log).await;
        }
        if self.state().without_quorum {
            return Err(ApiError::die(format!("cfs-lock 'storage-{id}' error: no quorum!")));
        }
        let key = format!("cfs-{id}");
        if let Some(held) = self.clock.try_lock(&key, 1) {
            return Ok(held);
        }
        let Some(held) = self.clock.lock(&key, 1, Some(FLOCK_WAIT)).await else {
            for _ in 0..CFS_TRIES {
                log.inspect(|log| log.print(format!("trying to acquire cfs lock 'storage-{id}' ...")));
            }
            return Err(ApiError::die(format!("cfs-lock 'storage-{id}' error: got lock request timeout")));
        };
        log.inspect(|log| log.print(format!("trying to acquire cfs lock 'storage-{id}' ...")));
        Ok(held)
    }

    async fn flock(&self, key: &str, file: &str, log: Option<&Log>) -> Result<Held, ApiError> {
        if let Some(held) = self.clock.try_lock(key, 1) {
            return Ok(held);
        }
        log.inspect(|log| log.print("trying to acquire lock..."));
        let Some(held) = self.clock.lock(key, 1, Some(FLOCK_WAIT)).await else {
            return Err(ApiError::die(format!("can't lock file '{file}' - got timeout")));
        };
        log.inspect(|log| log.append(" OK"));
        Ok(held)
    }
}

impl State {
    pub(crate) fn storage(&self, id: &str) -> Result<&Storage, ApiError> {
        self.storages.get(id).ok_or_else(|| ApiError::die(format!("storage '{id}' does not exist")))
    }

    /// A volid's storage and name.
    pub(crate) fn volume(&self, volid: &str) -> Result<(&Storage, Name), ApiError> {
        let (storage, volname) = volid.split_once(':').ok_or_else(|| ApiError::die(format!("unable to parse volume ID '{volid}'")))?;
        let storage = self.storage(storage)?;
        let name = storage.parse(volname)?;
        Ok((storage, name))
    }

    pub(crate) fn vm(&self, node: &str, vmid: u32) -> Result<&Vm, ApiError> {
        self.vms.get(&vmid).filter(|vm| vm.node == node).ok_or_else(|| missing_vm(node, vmid))
    }

    pub(crate) fn vm_mut(&mut self, node: &str, vmid: u32) -> Result<&mut Vm, ApiError> {
        self.vms.get_mut(&vmid).filter(|vm| vm.node == node).ok_or_else(|| missing_vm(node, vmid))
    }

    pub(crate) fn set_unreachable(&mut self, name: &str, why: Option<String>, now: Duration) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        if why.is_none() {
            self.down_since.remove(name);
        } else {
            self.down_since.entry(name.to_owned()).or_insert(now);
        }
        node.unreachable = why;
    }

    /// Whether what pvestatd said of the node is still believed.
    pub(crate) fn has_statistics(&self, name: &str, now: Duration) -> bool {
        let lost = self.down_since.get(name).is_some_and(|since| now.saturating_sub(*since) >= STATISTICS_LAST);
        let never = self.nodes.get(name).is_none_or(|node| node.unreachable.is_some()) && !self.down_since.contains_key(name);
        !(self.without_statistics || lost || never)
    }

    /// Whether a running VM of `node` holds the image, so that another writer is refused.
    pub(crate) fn is_held(&self, node: &str, inode: u64, read_only: bool) -> bool {
        self.vms
            .values()
            .filter(|vm| vm.node == node && vm.running)
            .flat_map(|vm| vm.plugged.values())
            .any(|plugged| plugged.inode == inode && !(read_only && plugged.read_only))
    }
}

fn missing_vm(node: &str, vmid: u32) -> ApiError {
    ApiError::die(format!("Configuration file 'nodes/{node}/qemu-server/{vmid}.conf' does not exist"))
}

impl Vm {
    /// Refused while the config's `lock:` is set.
    pub(crate) fn check_lock(&self) -> Result<(), ApiError> {
        match self.config.get("lock") {
            Some(lock) => Err(ApiError::die(format!("VM is locked ({lock})"))),
            None => Ok(()),
        }
    }

    /// An empty one guards nothing, as with Proxmox.
    pub(crate) fn check_digest(&self, digest: Option<&str>) -> Result<(), ApiError> {
        if digest.is_none_or(|digest| digest.is_empty() || digest == self.config.digest()) {
            return Ok(());
        }
        Err(ApiError::die("checksum mismatch (file change by other user?)"))
    }
}
