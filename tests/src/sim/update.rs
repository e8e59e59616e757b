//! PUT and POST config: checks before the fork, then, under the VM's flock, everything to [PENDING] first, and from there by hotplug or
//! at once into the config.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::Value;

use super::access::Caller;
use super::answer::{ApiError, Reply};
use super::config::VmConfig;
use super::content;
use super::drive::{self, Drive, is_drive, is_unused};
use super::faults::{Inner, KILLED};
use super::hotplug;
use super::options::{self, Needs};
use super::params::Params;
use super::route::Call;
use super::state::{Cluster, State};
use super::tasks::Log;

type Result<T = Reply> = std::result::Result<T, ApiError>;

/// What one call wants changed.
#[derive(Debug, Clone)]
struct Change {
    node: String,
    vmid: u32,
    caller: Caller,
    set: Params,
    delete: Vec<String>,
    revert: BTreeSet<String>,
    force: bool,
    digest: Option<String>,
    /// `-scsi1 ds1:9999/x.raw`, as asked for.
    printed: String,
    /// A zvol is waited for longer in a task.
    in_task: bool,
}

fn words(list: &str) -> Vec<String> {
    list.split([',', ';', ' ', '\0']).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

pub(crate) async fn put(cluster: &Arc<Cluster>, call: &Call) -> Result {
    let change = Change::prepare(cluster, call)?;
    Work::run(cluster, change, None).await?;
    Ok(Value::Null.into())
}

pub(crate) async fn post(cluster: &Arc<Cluster>, call: &Call) -> Result {
    let mut change = Change::prepare(cluster, call)?;
    change.in_task = true;
    let (node, vmid) = (call.node.clone(), call.vmid());
    let upid = cluster.fork(&node, "qmconfig", &vmid.to_string(), &call.caller, move |cluster, log| async move {
        Work::run(&cluster, change, Some(log)).await
    });
    content::finish_within(cluster, upid, call.get("background_delay"), &format!("failed to update VM {vmid}: ")).await
}

/// The same as `delete=`.
pub(crate) async fn unlink(cluster: &Arc<Cluster>, call: &Call) -> Result {
    let mut call = call.clone();
    if let Some(list) = call.params.remove("idlist") {
        call.params.insert("delete".to_owned(), list);
    }
    put(cluster, &call).await
}

/// Pending changes of a VM that is not running go into its config (also at its start).
pub(crate) async fn apply_pending(cluster: &Arc<Cluster>, node: &str, vmid: u32, errors: &mut BTreeMap<String, String>) -> Result<()> {
    let config = cluster.state().vm(node, vmid)?.config.clone();
    let caller = super::access::Access::parse_identity("root@pam");
    let mut work = Work { cluster: Arc::clone(cluster), node: node.to_owned(), vmid, caller, log: None, in_task: true, config };
    work.apply_all(errors).await;
    work.write()
}

impl Change {
    /// Everything that is an HTTP error also for POST.
    fn prepare(cluster: &Cluster, call: &Call) -> Result<Change> {
        if call.flag("skiplock") && !call.caller.is_root() {
            return Err(ApiError::param("skiplock", "Only root may use this option."));
        }
        let mut set = call.params.clone();
        for own in ["node", "vmid", "digest", "background_delay", "skiplock", "import-working-storage"] {
            set.remove(own);
        }
        let printed: Vec<String> = set.iter().map(|(key, value)| format!("-{key} {value}")).collect();
        let (delete, revert) = (set.remove("delete"), set.remove("revert"));
        let force = set.remove("force").as_deref() == Some("1");
        if delete.is_none() && revert.is_none() && set.is_empty() {
            return Err(ApiError::die("no options specified"));
        }
        let delete = words(&delete.unwrap_or_default());
        let revert: BTreeSet<String> = words(&revert.unwrap_or_default()).into_iter().collect();
        check_lists(&set, &delete, &revert)?;
        parse_drives(cluster, &mut set)?;
        let state = cluster.state();
        let vmid = call.vmid();
        for key in delete.iter().chain(set.keys()) {
            check_option(&state, &call.caller, vmid, key)?;
        }
        for (key, line) in set.iter().filter(|(key, _)| is_drive(key) || is_unused(key)) {
            check_storage_access(&state, &call.caller, vmid, key, line)?;
        }
        let vm = state.vm(&call.node, vmid)?;
        vm.check_digest(call.get("digest"))?;
        vm.check_lock()?;
        let digest = call.get("digest").map(str::to_owned);
        let (node, caller, printed) = (call.node.clone(), call.caller.clone(), printed.join(" "));
        Ok(Change { node, vmid, caller, set, delete, revert, force, digest, printed, in_task: false })
    }
}

fn check_lists(set: &Params, delete: &[String], revert: &BTreeSet<String>) -> Result<()> {
    for key in revert {
        if options::option_type(key).is_none() {
            return Err(ApiError::param("revert", format!("unknown option '{key}'")));
        }
        if set.contains_key(key) {
            return Err(ApiError::param("revert", format!("you can't use '-{key}' and '-revert {key}' at the same time")));
        }
    }
    for key in delete {
        if set.contains_key(key) {
            // The quote is missing in the original, too.
            return Err(ApiError::param("delete", format!("you can't use '-{key}' and -delete {key}' at the same time")));
        }
        if revert.contains(key) {
            return Err(ApiError::param("revert", format!("you can't use '-revert {key}' and '-delete {key}' at the same time")));
        }
        if options::option_type(key).is_none() {
            return Err(ApiError::param("delete", format!("unknown option '{key}'")));
        }
    }
    Ok(())
}

/// Drives are stored as parsed and printed again.
fn parse_drives(cluster: &Cluster, set: &mut Params) -> Result<()> {
    for (key, line) in set.iter_mut().filter(|(key, _)| is_drive(key)) {
        let drive = Drive::parse(key, line).map_err(|text| drive::refused(key, text))?;
        if drive.options.contains_key("import-from") {
            if drive.allocation().is_none_or(|(_, size)| size != 0) {
                let text = "'import-from' requires special syntax - use <storage ID>:0,import-from=<source>";
                return Err(ApiError::param(key, text));
            }
            return Err(ApiError::not_implemented("PUT", "config with import-from"));
        }
        let is_iso = drive.file.split_once(':').is_some_and(|(_, volume)| volume.starts_with("iso/"));
        if is_iso && !drive.is_cdrom() && cluster.version.wants_explicit_cdrom() {
            return Err(ApiError::param(key, "explicit 'media=cdrom' is required for iso images"));
        }
        *line = drive.print();
    }
    Ok(())
}

fn check_option(state: &State, caller: &Caller, vmid: u32, key: &str) -> Result<()> {
    match options::needs(key) {
        Needs::Root if !caller.is_root() => Err(ApiError::die(format!("only root can set '{key}' config"))),
        Needs::Privilege(privilege) if !caller.is_root() => state.access.require(caller, &format!("/vms/{vmid}"), &[privilege]),
        Needs::Root | Needs::Privilege(_) | Needs::Drive => Ok(()),
    }
}

fn check_storage_access(state: &State, caller: &Caller, vmid: u32, key: &str, line: &str) -> Result<()> {
    let drive = Drive::stored(line);
    if drive.is_cdrom() && !drive.file.contains(':') {
        return Ok(());
    }
    if drive.file.starts_with('/') {
        if caller.is_root() {
            return Ok(());
        }
        return Err(ApiError::die("Only root can pass arbitrary filesystem paths. at /usr/share/perl5/PVE/Storage.pm line 651."));
    }
    if let Some((id, _)) = drive.allocation() {
        state.access.require(caller, &format!("/storage/{id}"), &["Datastore.AllocateSpace"])?;
        let storage = state.storage(id)?;
        if !storage.about.content.iter().any(|kind| kind == "images") {
            return Err(ApiError::param("storage", format!("storage '{id}' does not support vm images")));
        }
        return Ok(());
    }
    let (storage, name) = state.volume(&drive.file)?;
    if name.owner == vmid || is_unused(key) && caller.is_root() {
        return Ok(());
    }
    content::check_volume_access(state, caller, &storage.about.id, name.owner)
}

/// A change at work. The VM's flock is held; `config` is what will be written.
struct Work {
    cluster: Arc<Cluster>,
    node: String,
    vmid: u32,
    caller: Caller,
    log: Option<Log>,
    in_task: bool,
    config: VmConfig,
}

impl Work {
    async fn run(cluster: &Arc<Cluster>, mut change: Change, log: Option<Log>) -> Result<()> {
        let held = cluster.lock_config(change.vmid).await?;
        let config = {
            let state = cluster.state();
            let vm = state.vm(&change.node, change.vmid)?;
            vm.check_digest(change.digest.as_deref())?;
            vm.check_lock()?;
            vm.config.clone()
        };
        let mut work = Work {
            cluster: Arc::clone(cluster),
            node: change.node.clone(),
            vmid: change.vmid,
            caller: change.caller.clone(),
            log,
            in_task: change.in_task,
            config,
        };
        for key in &change.revert {
            if let Some(line) = work.config.get(key) {
                change.set.insert(key.clone(), line.to_owned());
            } else if work.config.pending.contains_key(key) {
                change.delete.push(key.clone());
            }
        }
        work.print(format!("update VM {}: {}", change.vmid, change.printed));
        let modified = work.make_pending(&change).await?;
        work.take_effect(&modified).await?;
        drop(held);
        Ok(())
    }

    fn print(&self, line: String) {
        self.log.as_ref().inspect(|log| log.print(line));
    }

    /// Writes the file; an unusedN whose volume is in use again goes.
    fn write(&mut self) -> Result<()> {
        let used: BTreeSet<String> = self
            .config
            .current
            .iter()
            .chain(&self.config.pending)
            .filter(|(key, _)| is_drive(key))
            .map(|(_, line)| Drive::stored(line).file)
            .collect();
        self.config.current.retain(|key, line| !is_unused(key) || !used.contains(line));
        let mut state = self.cluster.state();
        if state.without_quorum {
            let text =
                format!("unable to open file '/etc/pve/nodes/{}/qemu-server/{}.conf.tmp.1' - Permission denied", self.node, self.vmid);
            return Err(ApiError::die(text));
        }
        state.vm_mut(&self.node, self.vmid)?.config = self.config.clone();
        Ok(())
    }

    async fn make_pending(&mut self, change: &Change) -> Result<BTreeSet<String>> {
        let mut modified = BTreeSet::new();
        let mut order = self.config.boot_order();
        for key in &change.delete {
            if self.delete(key, change.force, &mut order).await? {
                modified.insert(key.clone());
                if self.config.pending.contains_key("boot") {
                    modified.insert("boot".to_owned());
                }
            }
        }
        let wished = self.cluster.state().key_order.clone();
        let mut keys: Vec<&String> = change.set.keys().collect();
        keys.sort_by_key(|key| (wished.iter().position(|wish| wish == *key).unwrap_or(usize::MAX), (*key).clone()));
        for key in keys {
            modified.insert(key.clone());
            let line = change.set.get(key).cloned().unwrap_or_default();
            self.add(key, line).await?;
        }
        let before = self.config.clone();
        self.config.drop_void_changes();
        if before != self.config {
            self.write()?;
        }
        Ok(modified)
    }

    /// Puts a deletion among the pending changes; false: there is nothing to delete.
    async fn delete(&mut self, key: &str, force: bool, order: &mut Vec<String>) -> Result<bool> {
        let was_pending = self.config.pending.get(key).cloned();
        let Some(line) = self.config.get(key).map(str::to_owned).or_else(|| was_pending.clone()) else {
            self.print(format!("cannot delete '{key}' - not set in current configuration!"));
            return Ok(false);
        };
        self.config.pending.remove(key);
        if order.iter().any(|device| device == key) {
            order.retain(|device| device != key);
            // An empty order is printed as one blank.
            let boot = if order.is_empty() { " ".to_owned() } else { format!("order={}", order.join(";")) };
            self.config.pending.insert("boot".to_owned(), boot);
        }
        if is_unused(key) {
            self.check_protection(&format!("can't remove unused disk '{line}'"))?;
            self.require_disk_privilege()?;
            self.deallocate(key, &line).await?;
            self.config.current.remove(key);
            self.write()?;
            return Ok(true);
        }
        if is_drive(key) {
            self.check_protection(&format!("can't remove drive '{key}'"))?;
            self.require_disk_privilege()?;
            if let Some(pending) = was_pending {
                self.register_unused(&Drive::stored(&pending))?;
            }
        }
        self.config.set_pending_delete(key, force);
        self.write()?;
        Ok(true)
    }

    fn check_protection(&self, what: &str) -> Result<()> {
        if self.config.is_set("protection") { Err(ApiError::die(format!("{what} - protection mode enabled"))) } else { Ok(()) }
    }

    fn require_disk_privilege(&self) -> Result<()> {
        self.cluster.state().access.require(&self.caller, &format!("/vms/{}", self.vmid), &["VM.Config.Disk"])
    }

    /// Puts an addition or a change among the pending ones.
    async fn add(&mut self, key: &str, line: String) -> Result<()> {
        if self.config.pending.get(key) == Some(&line) {
            return Ok(());
        }
        let line = if is_drive(key) {
            self.require_disk_privilege()?;
            if let Some(old) = self.config.pending.get(key).map(|old| Drive::stored(old)) {
                self.register_unused(&old)?;
            }
            self.make_disk(key, Drive::stored(&line)).await?.print()
        } else {
            line
        };
        self.config.pending.insert(key.to_owned(), line);
        self.config.pending_delete.remove(key);
        self.write()
    }

    /// Allocates a new volume, or makes sure that the named one is there; the real size goes into the line.
    async fn make_disk(&self, key: &str, mut drive: Drive) -> Result<Drive> {
        if drive.is_cdrom() || drive.file.starts_with('/') {
            return Ok(drive);
        }
        if let Some((id, size_kib)) = drive.allocation().map(|(id, size)| (id.to_owned(), size)) {
            let (shared, format) = {
                let state = self.cluster.state();
                let storage = state.storage(&id)?;
                storage.activate(&self.node)?;
                (storage.shared, drive.option("format").unwrap_or(storage.default_format()).to_owned())
            };
            let held = self.cluster.lock_storage(&self.node, &id, shared, self.log.as_ref()).await?;
            self.cluster.clock.sleep(self.cluster.latency.storage).await;
            let state = self.cluster.state();
            let storage = state.storage(&id)?;
            let name = storage.allocate(&self.node, self.vmid, &format, None, size_kib, self.cluster.version)?;
            let size = storage.size(&self.node, &name).unwrap_or(0);
            drop(held);
            drive.options.remove("format");
            drive.file = format!("{id}:{}", name.volname);
            drive.set_size(size);
            return Ok(drive);
        }
        let state = self.cluster.state();
        let (storage, name) = state.volume(&drive.file)?;
        storage.activate(&self.node)?;
        let size = storage.size(&self.node, &name).ok_or_else(|| storage.missing_at_attach(&name, self.in_task))?;
        if let Some(format) = drive.option("format").filter(|format| *format != name.format) {
            return Err(ApiError::die(format!(
                "drive '{key}' - volume '{}' - 'format={format}' option different from storage format '{}'",
                drive.file, name.format
            )));
        }
        drive.set_size(size);
        Ok(drive)
    }

    /// The pending changes named by this call reach the running VM, or all of them the config of a stopped one.
    async fn take_effect(&mut self, modified: &BTreeSet<String>) -> Result<()> {
        if self.config.pending.is_empty() && self.config.pending_delete.is_empty() {
            return Ok(());
        }
        let running = self.cluster.state().vm(&self.node, self.vmid)?.running;
        let own_controllers = self.config.get("scsihw") == Some("virtio-scsi-single");
        let unplugs = self.config.pending_delete.keys().any(|key| is_drive(key));
        let latency = self.cluster.latency;
        let task = match (unplugs, own_controllers) {
            (true, true) => latency.own_unplug_task,
            (true, false) => latency.unplug_task,
            (false, _) => latency.task,
        };
        self.cluster.clock.sleep(task).await;
        let mut errors = BTreeMap::new();
        if running {
            self.hotplug_all(modified, &mut errors).await;
            let dies = Inner::WorkerDies { vmid: self.vmid };
            if self.cluster.state().faults.meets(|planned| *planned == dies).is_some() {
                return Err(ApiError::die(KILLED));
            }
        } else {
            self.apply_all(&mut errors).await;
        }
        self.write()?;
        if errors.is_empty() { Ok(()) } else { Err(ApiError::params(errors)) }
    }

    async fn apply_all(&mut self, errors: &mut BTreeMap<String, String>) {
        let mut failed = |key: &str, error: &ApiError| {
            errors.insert(key.to_owned(), format!("unable to apply pending change {key} : {}", error.message));
        };
        for (key, force) in self.config.pending_delete.clone() {
            match self.detach(&key, force).await {
                Ok(()) => {
                    self.config.pending_delete.remove(&key);
                    self.config.current.remove(&key);
                }
                Err(error) => failed(&key, &error),
            }
        }
        self.config.drop_void_changes();
        for (key, line) in self.config.pending.clone() {
            let old = self.config.get(&key).filter(|_| is_drive(&key)).map(Drive::stored);
            match old.map_or(Ok(()), |old| self.register_unused(&old)) {
                Ok(()) => {
                    self.config.pending.remove(&key);
                    self.config.current.insert(key, line);
                }
                Err(error) => failed(&key, &error),
            }
        }
    }

    async fn hotplug_all(&mut self, modified: &BTreeSet<String>, errors: &mut BTreeMap<String, String>) {
        let mut failed = |key: &str, error: &ApiError| {
            errors.insert(key.to_owned(), format!("hotplug problem - {}", error.message));
        };
        for (key, force) in self.config.pending_delete.clone().into_iter().filter(|(key, _)| modified.contains(key)) {
            match self.unplug(&key, force).await {
                Ok(true) => {
                    self.config.current.remove(&key);
                    self.config.pending_delete.remove(&key);
                }
                Ok(false) => {}
                Err(error) => failed(&key, &error),
            }
        }
        for (key, line) in self.config.pending.clone().into_iter().filter(|(key, _)| modified.contains(key)) {
            match self.plug(&key, &line).await {
                Ok(true) => {
                    self.config.pending.remove(&key);
                    self.config.current.insert(key, line);
                }
                Ok(false) => {}
                Err(error) => failed(&key, &error),
            }
        }
    }

    /// Options that a running VM takes at once.
    fn is_live(key: &str) -> bool {
        matches!(key, "name" | "hotplug" | "onboot" | "shares" | "startup" | "description" | "protection" | "tags" | "lock")
            || is_unused(key)
    }

    /// False: stays pending.
    async fn unplug(&mut self, key: &str, force: bool) -> Result<bool> {
        if !is_drive(key) {
            return Ok(Self::is_live(key));
        }
        if !self.config.hotplugs_disks() || key.starts_with("ide") || key.starts_with("sata") {
            return Ok(false);
        }
        hotplug::unplug(&self.cluster, &self.node, self.vmid, key, &self.config).await?;
        self.detach(key, force).await?;
        Ok(true)
    }

    /// False: stays pending.
    async fn plug(&mut self, key: &str, line: &str) -> Result<bool> {
        if !is_drive(key) {
            return Ok(Self::is_live(key));
        }
        let hotplugs = self.config.hotplugs_disks();
        let drive = Drive::stored(line);
        if let Some(old) = self.config.get(key).map(Drive::stored) {
            if old.is_cdrom() != drive.is_cdrom() {
                return Err(ApiError::die("unable to change media type"));
            }
            if old.file == drive.file {
                let fixed = ["aio", "discard", "iothread", "queues", "product", "vendor", "cache", "ssd", "ro"];
                return Ok(fixed.iter().all(|option| old.option(option) == drive.option(option)));
            }
            if !hotplugs {
                return Ok(false);
            }
            hotplug::unplug(&self.cluster, &self.node, self.vmid, key, &self.config).await?;
            self.register_unused(&old)?;
        }
        if !hotplugs || key.starts_with("ide") || key.starts_with("sata") {
            return Ok(false);
        }
        hotplug::plug(&self.cluster, &self.node, self.vmid, key, &drive, self.in_task).await?;
        Ok(true)
    }

    /// A drive leaves the config: its volume becomes unused, or goes too (force); a foreign one is just forgotten.
    async fn detach(&mut self, key: &str, force: bool) -> Result<()> {
        let Some(line) = self.config.get(key).filter(|_| is_drive(key)).map(str::to_owned) else { return Ok(()) };
        if force { self.deallocate(key, &line).await } else { self.register_unused(&Drive::stored(&line)) }
    }

    fn owns(&self, volid: &str) -> bool {
        self.cluster.state().volume(volid).is_ok_and(|(_, name)| name.owner == self.vmid)
    }

    fn register_unused(&mut self, drive: &Drive) -> Result<()> {
        let known = self.config.current.iter().any(|(key, line)| is_unused(key) && *line == drive.file);
        if drive.is_cdrom() || known || !self.owns(&drive.file) {
            return Ok(());
        }
        let Some(key) = self.config.free_unused() else {
            return Err(ApiError::die("Too many unused volumes - please delete them first."));
        };
        self.config.current.insert(key, drive.file.clone());
        Ok(())
    }

    /// Destroys an owned volume that nothing else names.
    async fn deallocate(&mut self, key: &str, line: &str) -> Result<()> {
        let volid = Drive::stored(line).file;
        if !self.owns(&volid) {
            return Ok(());
        }
        let storage = volid.split(':').next().unwrap_or_default();
        self.cluster.state().access.require(&self.caller, &format!("/storage/{storage}"), &["Datastore.AllocateSpace"])?;
        if self.config.names_volume(&volid, key) {
            return Err(ApiError::die(format!("unable to delete '{volid}' - volume is still in use (snapshot?)")));
        }
        content::free(&self.cluster, &self.node, &volid, self.log.as_ref()).await
    }
}
