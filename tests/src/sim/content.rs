//! Storage endpoints: what there is, what is on it, new volumes, gone volumes.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::access::Caller;
use super::answer::{ApiError, Reply};
use super::route::Call;
use super::sha1;
use super::state::{Cluster, State};
use super::storage::{Name, Plugin, Storage};
use super::tasks::Log;

type Result<T = Reply> = std::result::Result<T, ApiError>;

/// A busy ZFS dataset is tried again this often, a second apart.
const ZFS_BUSY_TRIES: u64 = 6;

/// Proxmox takes 1024-based units; a bare number is KiB.
fn allocation_kib(size: &str) -> u64 {
    let (number, factor) = match size.strip_suffix('M') {
        Some(number) => (number, 1024),
        None => size.strip_suffix('G').map_or((size, 1), |number| (number, 1024 * 1024)),
    };
    number.parse::<u64>().unwrap_or(u64::MAX).saturating_mul(factor)
}

fn sees(state: &State, caller: &Caller, id: &str) -> bool {
    state.access.may(caller, &format!("/storage/{id}"), &["Datastore.Audit", "Datastore.AllocateSpace"])
}

/// Whether the caller may look at an image: the storage's master, or its auditor who also may change the owner's disks.
pub(crate) fn check_volume_access(state: &State, caller: &Caller, id: &str, owner: u32) -> Result<()> {
    let path = format!("/storage/{id}");
    if state.access.may(caller, &path, &["Datastore.Allocate"]) {
        return Ok(());
    }
    state.access.require(caller, &path, &["Datastore.Audit"])?;
    state.access.require(caller, &format!("/vms/{owner}"), &["VM.Config.Disk"])
}

/// storage.cfg's text stands in for its digest.
fn config_digest(state: &State) -> String {
    let text: String = state.storages.values().map(|storage| format!("{}: {}\n", storage.about.plugin, storage.about.id)).collect();
    sha1::hex(text.as_bytes())
}

fn config_entry(state: &State, storage: &Storage) -> Value {
    let about = &storage.about;
    let mut entry: Map<String, Value> = about.options.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
    entry.insert("storage".to_owned(), about.id.clone().into());
    entry.insert("type".to_owned(), about.plugin.clone().into());
    entry.insert("content".to_owned(), about.content.join(",").into());
    entry.insert("digest".to_owned(), config_digest(state).into());
    if about.disabled {
        entry.insert("disable".to_owned(), 1.into());
    }
    if let Some(nodes) = &about.nodes {
        entry.insert("nodes".to_owned(), nodes.join(",").into());
    }
    if about.shared == Some(true) {
        entry.insert("shared".to_owned(), 1.into());
    }
    Value::Object(entry)
}

pub(crate) fn configs(cluster: &Cluster, call: &Call) -> Result {
    let state = cluster.state();
    let shown = state
        .storages
        .values()
        .filter(|storage| sees(&state, &call.caller, &storage.about.id))
        .filter(|storage| call.get("type").is_none_or(|plugin| plugin == storage.about.plugin));
    Ok(Value::Array(shown.map(|storage| config_entry(&state, storage)).collect()).into())
}

pub(crate) fn config(cluster: &Cluster, call: &Call) -> Result {
    let state = cluster.state();
    let storage = state.storage(call.text("storage"))?;
    Ok(config_entry(&state, storage).into())
}

/// total, used, avail… of a storage on a node.
fn status_of(storage: &Storage, node: &str) -> Map<String, Value> {
    let (enabled, active) = (storage.enabled_on(node).is_ok(), storage.is_active(node));
    let space = if active { storage.space(node) } else { super::storage::Space::default() };
    let status = json!({
        "type": storage.about.plugin, "content": storage.about.content.join(","), "shared": u8::from(storage.shared),
        "enabled": u8::from(enabled), "active": u8::from(active), "total": space.total, "used": space.used, "avail": space.avail,
    });
    status.as_object().cloned().unwrap_or_default()
}

pub(crate) fn storages(cluster: &Cluster, call: &Call) -> Result {
    let state = cluster.state();
    if call.get("storage").is_some_and(|id| !state.storages.contains_key(id)) {
        return Err(ApiError::param("storage", "No such storage."));
    }
    let mut list = Vec::new();
    for (id, storage) in &state.storages {
        let wanted = call.get("storage").is_none_or(|only| only == id);
        if !wanted || !sees(&state, &call.caller, id) {
            continue;
        }
        let enabled = storage.enabled_on(&call.node).is_ok();
        let holds = |content: &str| content.split(',').any(|kind| storage.about.content.iter().any(|own| own == kind));
        if call.get("content").is_some_and(|content| !enabled || !holds(content)) {
            continue;
        }
        if call.flag("enabled") && !enabled {
            continue;
        }
        if call.get("target").is_some_and(|target| !storage.shared || !storage.is_on(target)) {
            continue;
        }
        let mut entry = status_of(storage, &call.node);
        entry.insert("storage".to_owned(), id.clone().into());
        let (total, used) = (entry.get("total").and_then(Value::as_f64), entry.get("used").and_then(Value::as_f64));
        if let (Some(total), Some(used)) = (total.filter(|total| *total > 0.0), used) {
            entry.insert("used_fraction".to_owned(), (used / total).into());
        }
        if call.flag("format") {
            add_formats(cluster, storage, &mut entry);
        }
        list.push(Value::Object(entry));
    }
    Ok(Value::Array(list).into())
}

fn add_formats(cluster: &Cluster, storage: &Storage, entry: &mut Map<String, Value>) {
    let formats: &[&str] = match storage.plugin {
        Plugin::Dir => &["qcow2", "raw", "subvol", "vmdk"],
        Plugin::Zfs => &["raw", "subvol"],
        Plugin::Lvm if storage.has_chains() => &["qcow2", "raw"],
        Plugin::Lvm | Plugin::LvmThin | Plugin::ZfsTarget | Plugin::Rbd | Plugin::Foreign => &["raw"],
    };
    let map: Map<String, Value> = formats.iter().map(|format| ((*format).to_owned(), 1.into())).collect();
    entry.insert("format".to_owned(), json!([map, storage.default_format()]));
    if cluster.version.is_nine() {
        entry.insert("formats".to_owned(), json!({"supported": formats, "default": storage.default_format()}));
    }
}

/// The directory index of a storage.
pub(crate) fn index() -> Value {
    let names = "content download-url file-restore import-metadata identity oci-registry-pull prunebackups rrd rrddata status upload";
    Value::Array(names.split(' ').map(|name| json!({"subdir": name})).collect())
}

pub(crate) fn status(cluster: &Cluster, call: &Call) -> Result {
    let state = cluster.state();
    let storage = state.storages.get(call.text("storage")).ok_or_else(|| ApiError::param("storage", "No such storage."))?;
    Ok(Value::Object(status_of(storage, &call.node)).into())
}

pub(crate) fn list(cluster: &Cluster, call: &Call) -> Result {
    let state = cluster.state();
    let id = call.text("storage");
    let storage = state.storage(id)?;
    storage.activate(&call.node)?;
    let images = call.get("content").is_none_or(|kinds| kinds.split(',').any(|kind| kind == "images"));
    if !images || !storage.about.content.iter().any(|kind| kind == "images") {
        return Ok(json!([]).into());
    }
    let owner: Option<u32> = call.get("vmid").and_then(|vmid| vmid.parse().ok());
    let volumes = storage.list(&call.node);
    let shown = volumes
        .iter()
        .filter(|volume| owner.is_none_or(|owner| owner == volume.name.owner))
        .filter(|volume| check_volume_access(&state, &call.caller, id, volume.name.owner).is_ok());
    Ok(Value::Array(shown.map(|volume| storage.entry(volume)).collect()).into())
}

pub(crate) async fn create(cluster: &Arc<Cluster>, call: &Call) -> Result {
    let (id, node, file) = (call.text("storage").to_owned(), call.node.clone(), call.text("filename"));
    let (format, shared) = {
        let state = cluster.state();
        let storage = state.storage(&id)?;
        storage.enabled_on(&node)?;
        let suffix =
            file.rsplit_once('.').map(|(_, suffix)| suffix).filter(|suffix| matches!(*suffix, "raw" | "qcow2" | "vmdk" | "subvol"));
        let format = match (call.get("format"), suffix) {
            (Some(wanted), Some(suffix)) if wanted != suffix => {
                return Err(ApiError::param("format", format!("different storage formats ({wanted} != {suffix})")));
            }
            (Some(wanted), _) => wanted.to_owned(),
            (None, Some(suffix)) => suffix.to_owned(),
            (None, None) => storage.default_format().to_owned(),
        };
        storage.activate(&node)?;
        (format, storage.shared)
    };
    let held = cluster.lock_storage(&node, &id, shared, None).await?;
    let slow = cluster.state().slow_allocation;
    cluster.clock.sleep(cluster.latency.storage + slow).await;
    let name = {
        let state = cluster.state();
        let size = allocation_kib(call.text("size"));
        state.storage(&id)?.allocate(&node, call.vmid(), &format, Some(file), size, cluster.version)?
    };
    drop(held);
    Ok(json!(format!("{id}:{}", name.volname)).into())
}

/// The volume that the path means: a volid, or a name on the path's storage.
fn named(state: &State, call: &Call) -> Result<(String, Name)> {
    let volume = call.text("volume");
    let id = call.text("storage");
    let volname = match volume.split_once(':') {
        Some((given, _)) if given != id => {
            return Err(ApiError::param("volume", format!("storage ID mismatch ({given} != {id})\n")));
        }
        Some((_, volname)) => volname,
        None => volume,
    };
    let name = state.storage(id)?.parse(volname)?;
    Ok((id.to_owned(), name))
}

pub(crate) fn look(cluster: &Cluster, call: &Call) -> Result {
    let state = cluster.state();
    let (id, name) = named(&state, call)?;
    check_volume_access(&state, &call.caller, &id, name.owner)?;
    let storage = state.storage(&id)?;
    let Some(volume) = storage.look(&call.node, &name.volname) else { return Err(storage.missing_at_look(&name)) };
    if volume.size_bytes == 0 {
        return Err(ApiError::die(format!("volume '{id}:{}' has size zero", name.volname)));
    }
    let path = storage.shown_path(&name);
    Ok(json!({"path": path, "size": volume.size_bytes, "used": volume.used_bytes, "format": name.format}).into())
}

/// Only backups have notes and protection.
pub(crate) fn set_attributes(cluster: &Cluster, call: &Call) -> Result {
    let state = cluster.state();
    let (id, _) = named(&state, call)?;
    state.access.require(&call.caller, &format!("/storage/{id}"), &["Datastore.Allocate"])?;
    let plugin = &state.storage(&id)?.about.plugin;
    let is_dir = state.storage(&id)?.plugin == Plugin::Dir;
    match ["notes", "protected"].into_iter().find(|attribute| call.get(attribute).is_some()) {
        None => Ok(Value::Null.into()),
        Some("notes") if is_dir => Err(ApiError::die("only backups can have notes")),
        Some(attribute) if is_dir => Err(ApiError::die(format!("only backups support attribute '{attribute}'"))),
        Some(attribute) => Err(ApiError::die(format!("attribute '{attribute}' is not supported for storage type '{plugin}'"))),
    }
}

pub(crate) async fn delete(cluster: &Arc<Cluster>, call: &Call) -> Result {
    let (id, name) = {
        let state = cluster.state();
        let (id, name) = named(&state, call)?;
        state.access.require(&call.caller, &format!("/storage/{id}"), &["Datastore.Allocate"])?;
        state.storage(&id)?.activate(&call.node)?;
        (id, name)
    };
    let (node, volid) = (call.node.clone(), format!("{id}:{}", name.volname));
    let task_id = if name.owner == 0 { id.clone() } else { format!("{}@{id}", name.owner) };
    let upid = cluster.fork(&node, "imgdel", &task_id, &call.caller, {
        let node = node.clone();
        move |cluster, log| async move {
            free(&cluster, &node, &volid, Some(&log)).await?;
            log.print(format!("Removed volume '{volid}'"));
            Ok(())
        }
    });
    finish_within(cluster, upid, call.get("delay"), "").await
}

/// Frees an image under the storage's lock.
pub(crate) async fn free(cluster: &Arc<Cluster>, node: &str, volid: &str, log: Option<&Log>) -> Result<()> {
    let (id, shared, name) = {
        let state = cluster.state();
        let (storage, name) = state.volume(volid)?;
        (storage.about.id.clone(), storage.shared, name)
    };
    let held = cluster.lock_storage(node, &id, shared, log).await?;
    cluster.clock.sleep(cluster.latency.storage).await;
    let in_use = |state: &State| {
        let mut plugged = state.vms.values().filter(|vm| vm.running).flat_map(|vm| vm.plugged.values());
        plugged.any(|plugged| plugged.volid == volid)
    };
    let zfs = cluster.state().storage(&id)?.plugin == Plugin::Zfs;
    for _ in 0..ZFS_BUSY_TRIES {
        let busy = in_use(&cluster.state());
        if !zfs || !busy {
            break;
        }
        cluster.clock.sleep(Duration::from_secs(1)).await;
    }
    let printed = {
        let state = cluster.state();
        let in_use = in_use(&state);
        state.storage(&id)?.free(node, &name, in_use)?
    };
    drop(held);
    for line in printed {
        log.inspect(|log| log.print(line));
    }
    Ok(())
}

/// `delay`, `background_delay`: waits for the task; null when it is done, its UPID when it is not, 500 when it failed.
pub(crate) async fn finish_within(cluster: &Arc<Cluster>, upid: String, delay: Option<&str>, prefix: &str) -> Result {
    let Some(delay) = delay.and_then(|seconds| seconds.parse().ok()) else { return Ok(Value::String(upid).into()) };
    let done = cluster.state().tasks.by_upid.get(&upid).map(|task| task.done.clone());
    let Some(done) = done else { return Ok(Value::String(upid).into()) };
    if !cluster.clock.pass(&done, Some(Duration::from_secs(delay))).await {
        return Ok(Value::String(upid).into());
    }
    let exit = cluster.state().tasks.by_upid.get(&upid).and_then(|task| task.exit_status.clone()).unwrap_or_default();
    if exit == "OK" || exit.starts_with("WARNINGS") { Ok(Value::Null.into()) } else { Err(ApiError::die(format!("{prefix}{exit}"))) }
}
