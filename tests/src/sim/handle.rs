//! Starting a simulator, and what a test may do with a running one.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::machine::Machine;

use super::clock::{Busy, Clock, Held, Time};
use super::config::VmConfig;
use super::describe::{Acl, Description, STANDARD_SECRET, Vm};
use super::drive::{self, Drive};
use super::faults::{Fault, Inner};
use super::state::{Cluster, Latency, Plugged, local_lock};
use super::turns::{Door, Turns, Waiting};
use super::version::Version;
use super::{hotplug, http, tls};

/// In virtual time everything ends at once; what has not by then hangs.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);

/// When a scheduled simulator's day begins: an hour that is good for nothing but being the same.
const SCHEDULED_EPOCH: Duration = Duration::from_secs(1_800_000_000);

/// How to start a simulator.
#[derive(Debug, Clone)]
pub struct Builder {
    description: Description,
    version: Version,
    time: Time,
    latency: Latency,
    listen: SocketAddr,
    tls: bool,
    root: Option<PathBuf>,
    scheduled: bool,
}

/// A running simulator; ends when dropped.
#[derive(Debug)]
pub struct Simulator {
    cluster: Arc<Cluster>,
    url: String,
    certificate: Option<String>,
    root: PathBuf,
    owns_root: bool,
    server: JoinHandle<()>,
}

/// A VM as it really is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmState {
    pub node: String,
    pub running: bool,
    /// Configured.
    pub config: BTreeMap<String, String>,
    /// Planned.
    pub pending: BTreeMap<String, String>,
    /// Planned to go; the value: with its volume.
    pub pending_delete: BTreeMap<String, bool>,
    /// Really there.
    pub plugged: BTreeMap<String, Plugged>,
    pub leaked: BTreeSet<String>,
    /// Those of them that are left over because another VM had the image.
    pub leaked_to_rivals: BTreeSet<String>,
    pub digest: String,
}

impl Builder {
    #[must_use]
    pub fn version(mut self, version: Version) -> Builder {
        self.version = version;
        self
    }

    #[must_use]
    pub fn time(mut self, time: Time) -> Builder {
        self.time = time;
        self
    }

    #[must_use]
    pub fn latency(mut self, latency: Latency) -> Builder {
        self.latency = latency;
        self
    }

    /// Where to listen; port 0: any free one.
    #[must_use]
    pub fn listen(mut self, address: SocketAddr) -> Builder {
        self.listen = address;
        self
    }

    /// HTTPS with a certificate made for this run.
    #[must_use]
    pub fn https(mut self) -> Builder {
        self.tls = true;
        self
    }

    /// Keeps the images in this folder, and after the end too; else in a temporary one.
    #[must_use]
    pub fn root(mut self, root: impl Into<PathBuf>) -> Builder {
        self.root = Some(root.into());
        self
    }

    /// Every request waits until it is let in ([`Simulator::admit`]). Time is tokio's, which the test has paused, and begins on the
    /// same day in every run.
    #[must_use]
    pub fn scheduled(mut self) -> Builder {
        self.time = Time::Real;
        self.scheduled = true;
        self
    }

    /// Changes the description.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Description)) -> Builder {
        change(&mut self.description);
        self
    }

    /// Must be called inside a tokio runtime; the simulator lives in it.
    pub async fn start(self) -> anyhow::Result<Simulator> {
        let owns_root = self.root.is_none();
        let root = self.root.map_or_else(|| crate::folder::new("pve-simulator-", ""), Ok)?;
        std::fs::create_dir_all(&root).with_context(|| format!("create {}", root.display()))?;
        let clock = if self.scheduled { Clock::since(self.time, SCHEDULED_EPOCH) } else { Clock::new(self.time) };
        let mut cluster = Cluster::new(&self.description, &root, self.version, self.latency, clock)?;
        cluster.turns = self.scheduled.then(Turns::default);
        let cluster = Arc::new(cluster);
        prepare_images(&cluster)?;
        for vm in self.description.vms.iter().filter(|vm| vm.running) {
            hotplug::plug_all(&cluster, &vm.node, vm.vmid).map_err(|error| anyhow::anyhow!("VM {}: {}", vm.vmid, error.text()))?;
        }
        let listener = TcpListener::bind(self.listen).await.with_context(|| format!("listen on {}", self.listen))?;
        let address = listener.local_addr()?;
        let (acceptor, certificate) = if self.tls {
            let (acceptor, pem) = tls::acceptor(vec!["localhost".to_owned(), address.ip().to_string()])?;
            (Some(acceptor), Some(pem))
        } else {
            (None, None)
        };
        let scheme = if self.tls { "https" } else { "http" };
        let server = tokio::spawn(http::serve(listener, acceptor, Arc::clone(&cluster), String::new()));
        Ok(Simulator { cluster, url: format!("{scheme}://{address}/api2/json"), certificate, root, owns_root, server })
    }
}

/// Creates the images that configs name and that are not there yet.
fn prepare_images(cluster: &Cluster) -> anyhow::Result<()> {
    let state = cluster.state();
    for (vmid, vm) in &state.vms {
        for (key, line) in vm.config.current.iter().filter(|(key, _)| drive::is_drive(key) || drive::is_unused(key)) {
            let drive = Drive::stored(line);
            if drive.is_cdrom() || !drive.file.contains(':') {
                continue;
            }
            let context = || format!("VM {vmid}, {key}: {line}");
            let (storage, name) = state.volume(&drive.file).map_err(|error| anyhow::anyhow!("{}", error.text())).with_context(context)?;
            if storage.size(&vm.node, &name).is_none() {
                let bytes = drive.option("size").and_then(drive::parse_size).unwrap_or(1 << 30);
                storage
                    .allocate(&vm.node, name.owner, &name.format, Some(&name.file), bytes.div_ceil(1024), cluster.version)
                    .map_err(|error| anyhow::anyhow!("{}", error.text()))
                    .with_context(context)?;
            }
        }
    }
    Ok(())
}

impl Simulator {
    /// A simulator of what is described.
    #[must_use]
    pub fn builder(description: Description) -> Builder {
        Builder {
            description,
            version: Version::default(),
            time: Time::default(),
            latency: Latency::NONE,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            tls: false,
            root: None,
            scheduled: false,
        }
    }

    /// A simulator of [`Description::standard`].
    #[must_use]
    pub fn standard() -> Builder {
        Simulator::builder(Description::standard())
    }

    /// `http://127.0.0.1:PORT/api2/json`
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// What to trust, where it is HTTPS.
    #[must_use]
    pub fn certificate_pem(&self) -> Option<&str> {
        self.certificate.as_deref()
    }

    /// The standard description's token, as it stands after `PVEAPIToken=`.
    #[must_use]
    pub fn token(&self) -> String {
        format!("csi@pve!csi={STANDARD_SECRET}")
    }

    /// Where the images are.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The image file of a volume, if it is there.
    #[must_use]
    pub fn image(&self, node: &str, volid: &str) -> Option<PathBuf> {
        let state = self.cluster.state();
        let (storage, name) = state.volume(volid).ok()?;
        Some(storage.file(node, &name)).filter(|file| file.exists())
    }

    /// The volids on a storage.
    #[must_use]
    pub fn volumes(&self, node: &str, storage: &str) -> Vec<String> {
        let state = self.cluster.state();
        let Ok(known) = state.storage(storage) else { return Vec::new() };
        known.list(node).into_iter().map(|volume| format!("{storage}:{}", volume.name.volname)).collect()
    }

    /// Makes a volume without a request.
    pub fn create_volume(&self, node: &str, volid: &str, size_bytes: u64) -> Result<(), String> {
        let state = self.cluster.state();
        let (storage, name) = state.volume(volid).map_err(|error| error.text().to_owned())?;
        let made = storage.allocate(node, name.owner, &name.format, Some(&name.file), size_bytes.div_ceil(1024), self.cluster.version);
        made.map(drop).map_err(|error| error.text().to_owned())
    }

    /// Removes a volume's image without a request, whoever holds it.
    pub fn remove_volume(&self, node: &str, volid: &str) -> Result<(), String> {
        let state = self.cluster.state();
        let (storage, name) = state.volume(volid).map_err(|error| error.text().to_owned())?;
        storage.free(node, &name, false).map(drop).map_err(|error| error.text().to_owned())
    }

    /// Requests so far by endpoint (`GET /nodes/{node}/qemu/{vmid}/config`).
    #[must_use]
    pub fn counters(&self) -> BTreeMap<String, u64> {
        self.cluster.state().faults.counters().clone()
    }

    /// Requests so far, as they came (`GET /version`).
    #[must_use]
    pub fn requests(&self) -> Vec<String> {
        self.cluster.state().faults.log().to_vec()
    }

    /// Bytes answered so far, with their headers.
    #[must_use]
    pub fn bytes_answered(&self) -> u64 {
        self.cluster.state().faults.bytes()
    }

    pub fn reset_counters(&self) {
        self.cluster.state().faults.reset_counters();
    }

    /// Plans a fault of a request.
    pub fn inject(&self, fault: Fault) {
        self.cluster.state().faults.plan(fault);
    }

    /// Plans a fault inside a VM or a task, for its next `times` occasions.
    pub fn inject_inner(&self, fault: Inner, times: u32) {
        self.cluster.state().faults.plan_inner(fault, times);
    }

    /// Drops all planned faults and hooks (and the counters).
    pub fn clear_faults(&self) {
        self.cluster.state().faults.clear();
    }

    /// Runs `act` just before the `nth` matching request is looked at: somebody else acts in between.
    pub fn before(self: &Arc<Self>, method: &str, path: &str, nth: u32, act: impl FnOnce(&Simulator) + Send + 'static) {
        let me = Arc::downgrade(self);
        let hook = Box::new(move || {
            if let Some(me) = me.upgrade() {
                act(&me);
            }
        });
        self.cluster.state().faults.plan_hook(method, path, nth, hook);
    }

    #[must_use]
    pub fn vm(&self, vmid: u32) -> Option<VmState> {
        let state = self.cluster.state();
        let vm = state.vms.get(&vmid)?;
        Some(VmState {
            node: vm.node.clone(),
            running: vm.running,
            config: vm.config.current.clone(),
            pending: vm.config.pending.clone(),
            pending_delete: vm.config.pending_delete.clone(),
            plugged: vm.plugged.clone(),
            leaked: vm.leaked.clone(),
            leaked_to_rivals: vm.leaked_to_rivals.clone(),
            digest: vm.config.digest(),
        })
    }

    fn change(&self, vmid: u32, change: impl FnOnce(&mut super::state::Vm)) {
        if let Some(vm) = self.cluster.state().vms.get_mut(&vmid) {
            change(vm);
        }
    }

    /// Writes (or with `None` removes) a line of the config, as if root edited the file.
    pub fn set_config(&self, vmid: u32, key: &str, value: Option<&str>) {
        self.change(vmid, |vm| match value {
            Some(value) => drop(vm.config.current.insert(key.to_owned(), value.to_owned())),
            None => drop(vm.config.current.remove(key)),
        });
    }

    /// A pending change that nobody applied yet.
    pub fn set_pending(&self, vmid: u32, key: &str, value: &str) {
        self.change(vmid, |vm| drop(vm.config.pending.insert(key.to_owned(), value.to_owned())));
    }

    /// A pending delete that nobody applied yet.
    pub fn set_pending_delete(&self, vmid: u32, key: &str) {
        self.change(vmid, |vm| vm.config.set_pending_delete(key, false));
    }

    /// Forgets all that is pending.
    pub fn drop_pending(&self, vmid: u32) {
        self.change(vmid, |vm| {
            vm.config.pending.clear();
            vm.config.pending_delete.clear();
        });
    }

    /// The config's `lock:` property.
    pub fn set_lock(&self, vmid: u32, lock: Option<&str>) {
        self.set_config(vmid, "lock", lock);
    }

    /// A snapshot section with these lines.
    pub fn set_snapshot(&self, vmid: u32, name: &str, lines: &[(&str, &str)]) {
        let section = lines.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        self.change(vmid, |vm| drop(vm.config.snapshots.insert(name.to_owned(), section)));
    }

    /// A line of a snapshot section.
    pub fn set_snapshot_line(&self, vmid: u32, name: &str, key: &str, value: &str) {
        self.change(vmid, |vm| {
            if let Some(section) = vm.config.snapshots.get_mut(name) {
                section.insert(key.to_owned(), value.to_owned());
            }
        });
    }

    /// Forgets a snapshot section.
    pub fn remove_snapshot(&self, vmid: u32, name: &str) {
        self.change(vmid, |vm| drop(vm.config.snapshots.remove(name)));
    }

    pub fn set_paused(&self, vmid: u32, paused: bool) {
        self.change(vmid, |vm| vm.paused = paused);
    }

    /// QEMU no longer answers.
    pub fn set_hung(&self, vmid: u32, hung: bool) {
        self.change(vmid, |vm| vm.hung = hung);
    }

    /// The block node of that index is left over.
    pub fn set_leaked(&self, vmid: u32, key: &str) {
        self.change(vmid, |vm| vm.leaked.extend([key.to_owned()]));
    }

    /// pvestatd has not seen the VM yet: no name, no status in /cluster/resources.
    pub fn set_fresh(&self, vmid: u32, fresh: bool) {
        self.change(vmid, |vm| vm.fresh = fresh);
    }

    /// Whether a deletion of the volume that was answered 596 is yet to be carried out.
    #[must_use]
    pub fn deletes_late(&self, volid: &str) -> bool {
        self.cluster.state().late_deletions.iter().any(|one| one == volid)
    }

    /// QEMU starts with what is configured.
    pub fn start_vm(&self, vmid: u32) -> Result<(), String> {
        let node = self.vm(vmid).map(|vm| vm.node).unwrap_or_default();
        hotplug::plug_all(&self.cluster, &node, vmid).map_err(|error| error.text().to_owned())
    }

    /// QEMU ends.
    pub fn stop_vm(&self, vmid: u32) {
        self.change(vmid, super::state::Vm::power_off);
    }

    /// The VM moves, with all that is plugged.
    pub fn migrate_vm(&self, vmid: u32, node: &str) {
        self.change(vmid, |vm| {
            node.clone_into(&mut vm.node);
            vm.leaked.clear();
            vm.leaked_to_rivals.clear();
        });
    }

    pub fn add_vm(&self, vm: &Vm) {
        let config = VmConfig { current: vm.config.clone(), ..VmConfig::default() };
        let made = super::state::Vm { node: vm.node.clone(), config, running: vm.running, ..Default::default() };
        self.cluster.state().vms.insert(vm.vmid, made);
    }

    /// A container with these lines in its config (`mp0`, `rootfs`).
    pub fn set_container(&self, vmid: u32, node: &str, lines: &[(&str, &str)]) {
        let lines = lines.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        self.cluster.state().containers.insert(vmid, (node.to_owned(), lines));
    }

    pub fn remove_vm(&self, vmid: u32) {
        self.cluster.state().vms.remove(&vmid);
    }

    /// Plugging into this VM calls the machine from now on. What is configured while the VM is stopped is not plugged into it at its
    /// start: a machine that starts again brings its own disks.
    pub fn register_machine(&self, vmid: u32, machine: Arc<dyn Machine>) {
        self.change(vmid, |vm| vm.machine = Some(machine));
    }

    /// `Some("595 No route to host")`, or reachable again. Its VMs are listed as last seen for five more minutes ([`Simulator::advance`]).
    pub fn set_node_unreachable(&self, node: &str, why: Option<&str>) {
        let now = self.cluster.clock.elapsed();
        self.cluster.state().set_unreachable(node, why.map(str::to_owned), now);
    }

    pub fn set_quorate(&self, quorate: bool) {
        self.cluster.state().without_quorum = !quorate;
    }

    pub fn set_daemon_down(&self, down: bool) {
        self.cluster.state().daemon_down = down;
    }

    pub fn set_statistics(&self, running: bool) {
        self.cluster.state().without_statistics = !running;
    }

    /// Changes a storage's description (disabled, unmounted, total_bytes…).
    pub fn change_storage(&self, id: &str, change: impl FnOnce(&mut super::describe::Storage)) {
        if let Some(storage) = self.cluster.state().storages.get_mut(id) {
            change(&mut storage.about);
        }
    }

    /// The definition goes; its images stay.
    pub fn remove_storage(&self, id: &str) {
        self.cluster.state().storages.remove(id);
    }

    /// Replaces the whole ACL.
    pub fn set_acl(&self, acl: Vec<Acl>) {
        self.cluster.state().access.set_acl(acl);
    }

    /// Defines a role.
    pub fn set_role(&self, role: &str, privileges: &[&str]) {
        self.cluster.state().access.set_role(role, privileges);
    }

    /// Adds or replaces a user with its tokens.
    pub fn set_user(&self, user: super::describe::User) {
        self.cluster.state().access.add_user(user);
    }

    /// The order in which the keys of one config call are worked on, instead of by name.
    pub fn set_key_order(&self, keys: &[&str]) {
        self.cluster.state().key_order = keys.iter().map(|key| (*key).to_owned()).collect();
    }

    /// Creating an image takes that much longer.
    pub fn set_slow_allocation(&self, by: Duration) {
        self.cluster.state().slow_allocation = by;
    }

    /// Somebody holds the VM's flock until this is dropped.
    #[must_use]
    pub fn hold_config_lock(&self, vmid: u32) -> Option<Held> {
        self.cluster.clock.try_lock(&format!("/var/lock/qemu-server/lock-{vmid}.conf"), 1)
    }

    /// `qm set VMID --SLOT VOLID` by somebody else, done at once; refused where Proxmox or QEMU would refuse it.
    pub fn attach_by_hand(&self, vmid: u32, key: &str, volid: &str) -> Result<(), String> {
        let Some(_held) = self.hold_config_lock(vmid) else { return Err("the VM is being changed".to_owned()) };
        let node = self.vm(vmid).map(|vm| vm.node).ok_or("no such VM")?;
        hotplug::plug_by_hand(&self.cluster, &node, vmid, key, volid).map_err(|error| error.text().to_owned())
    }

    /// The same the other way round.
    pub fn detach_by_hand(&self, vmid: u32, key: &str) {
        self.change(vmid, |vm| {
            vm.config.current.remove(key);
            vm.plugged.remove(key);
        });
    }

    /// Somebody holds the storage's lock (a local one's on the entry node) until this is dropped.
    #[must_use]
    pub fn hold_storage_lock(&self, id: &str) -> Option<Held> {
        let shared = self.cluster.state().storage(id).ok()?.shared;
        let key = if shared { format!("cfs-{id}") } else { local_lock(&self.cluster.entry_node, id) };
        self.cluster.clock.try_lock(&key, 1)
    }

    /// Virtual time stands still until this is dropped: what waits goes on waiting. With a lock held ([`Simulator::hold_config_lock`])
    /// a task can so be seen `running` for as long as a test wants.
    #[must_use]
    pub fn freeze(&self) -> Busy {
        self.cluster.clock.busy()
    }

    /// Waits until nothing goes on any more: tasks, and handlers whose client was told 596. False: it still does after 10 (real) seconds.
    pub async fn settle(&self) -> bool {
        let idle = async {
            while !self.cluster.clock.is_idle() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(SETTLE_LIMIT, idle).await.is_ok()
    }

    /// Lets virtual time pass (tickets expire).
    pub fn advance(&self, by: Duration) {
        self.cluster.clock.advance(by);
    }

    /// Waits until a task has ended; its exit status and log. `None`: unknown.
    pub async fn task(&self, upid: &str) -> Option<(String, Vec<String>)> {
        let done = self.cluster.state().tasks.by_upid.get(upid)?.done.clone();
        let busy = self.cluster.clock.busy();
        self.cluster.clock.pass(&done, None).await;
        drop(busy);
        let state = self.cluster.state();
        let task = state.tasks.by_upid.get(upid)?;
        Some((task.exit_status.clone()?, task.log.lines()))
    }

    /// The status object of a task.
    #[must_use]
    pub fn task_status(&self, upid: &str) -> Option<Value> {
        Some(self.cluster.state().tasks.by_upid.get(upid)?.status())
    }

    /// The log of an old task was rotated away.
    pub fn purge_task(&self, upid: &str) {
        self.cluster.state().tasks.purge(upid);
    }

    /// One more listener, without TLS, whose requests are known by its name.
    pub async fn door(&self, name: &str) -> anyhow::Result<Door> {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.context("open a door")?;
        let url = format!("http://{}/api2/json", listener.local_addr()?);
        let server = tokio::spawn(http::serve(listener, None, Arc::clone(&self.cluster), name.to_owned()));
        Ok(Door { name: name.to_owned(), url, turns: self.cluster.turns.clone(), server })
    }

    /// The requests that wait, sorted.
    #[must_use]
    pub fn waiting(&self) -> Vec<Waiting> {
        self.cluster.turns.iter().flat_map(Turns::waiting).collect()
    }

    /// How many requests wait or are worked on: all that are on their way in are there when a client has as many in flight.
    #[must_use]
    pub fn inside(&self) -> usize {
        self.cluster.turns.iter().map(Turns::inside).sum()
    }

    /// How many were let in and are not answered.
    #[must_use]
    pub fn working(&self) -> usize {
        self.cluster.turns.iter().map(Turns::working).sum()
    }

    /// Who lets in, for servers beside Proxmox that wait at doors, too.
    pub(crate) fn turns(&self) -> Option<Turns> {
        self.cluster.turns.clone()
    }

    /// Lets a request in; false: none such waits.
    pub fn admit(&self, waiting: &Waiting) -> bool {
        let at = format!("{:9.3}", self.cluster.clock.elapsed().as_secs_f64());
        self.cluster.turns.as_ref().is_some_and(|turns| turns.admit(waiting, &at))
    }

    /// What was let in, with time and door.
    #[must_use]
    pub fn admitted(&self) -> Vec<String> {
        self.cluster.turns.iter().flat_map(Turns::log).collect()
    }

    /// Stops listening and closes all connections.
    pub fn stop(&self) {
        self.server.abort();
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        self.server.abort();
        if self.owns_root {
            // The folder is temporary: what cannot be removed is left to the system.
            let _ = std::fs::remove_dir_all(&self.root);
        }
    }
}
