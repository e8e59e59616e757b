//! The cluster as a whole: version, nodes, resources, permissions, tasks.

use serde_json::{Map, Value, json};

use super::access::{Access, Caller};
use super::answer::{ApiError, Reply};
use super::route::Call;
use super::state::{Cluster, State};
use super::tasks::{Task, is_upid};
use super::vms;

type Result = std::result::Result<Reply, ApiError>;

/// Entries of the task list, lines of a log, when not asked for more.
const PAGE: usize = 50;

/// A Debian host's memory and disk, as good as any.
const NODE_MEMORY_BYTES: u64 = 25_276_502_016;
const NODE_DISK_BYTES: u64 = 270_553_174_016;
const FINGERPRINT: &str = "0E:1E:EF:93:96:B8:F1:25:2D:C3:AA:A5:4A:FC:20:B7:E9:C7:E4:C4:DC:87:81:CB:F7:CE:0D:24:2B:0B:C9:6A";

pub(crate) fn version(cluster: &Cluster) -> Result {
    let version = cluster.version;
    Ok(json!({"version": version.full(), "release": version.release(), "repoid": "f6997e69a1b2c3d4"}).into())
}

pub(crate) fn cluster_status(cluster: &Cluster) -> Result {
    let state = cluster.state();
    let clustered = !cluster.name.is_empty();
    let mut list = Vec::new();
    let members = || state.nodes.values().filter(|node| !node.stranger);
    if clustered {
        list.push(json!({
            "type": "cluster", "id": "cluster", "name": cluster.name, "nodes": members().count(), "version": 1,
            "quorate": u8::from(!state.without_quorum),
        }));
    }
    for (index, node) in members().enumerate() {
        let nodeid = if clustered { index + 1 } else { 0 };
        let mut entry = json!({
            "type": "node", "id": format!("node/{}", node.name), "name": node.name, "nodeid": nodeid, "level": "",
            "local": u8::from(node.name == cluster.entry_node), "online": u8::from(node.unreachable.is_none()),
        });
        if let (Some(entry), Some(ip)) = (entry.as_object_mut(), &node.ip) {
            entry.insert("ip".to_owned(), ip.clone().into());
        }
        list.push(entry);
    }
    Ok(Value::Array(list).into())
}

pub(crate) fn resources(cluster: &Cluster, call: &Call) -> Result {
    let state = cluster.state();
    let wanted = |kind: &str| call.get("type").is_none_or(|only| only == kind);
    let mut list = Vec::new();
    if wanted("vm") {
        for (vmid, vm) in &state.vms {
            if state.access.may(&call.caller, &format!("/vms/{vmid}"), &["VM.Audit"]) {
                list.push(vms::resource(cluster, &state, *vmid, vm));
            }
        }
    }
    if wanted("vm") {
        for (vmid, (node, _)) in &state.containers {
            if state.access.may(&call.caller, &format!("/vms/{vmid}"), &["VM.Audit"]) {
                list.push(json!({"id": format!("lxc/{vmid}"), "type": "lxc", "vmid": vmid, "node": node, "status": "running"}));
            }
        }
    }
    if wanted("node") {
        list.extend(node_entries(cluster, &state, &call.caller, false));
    }
    if wanted("storage") {
        list.extend(storage_entries(cluster, &state, &call.caller));
    }
    Ok(Value::Array(list).into())
}

fn storage_entries(cluster: &Cluster, state: &State, caller: &Caller) -> Vec<Value> {
    let mut list = Vec::new();
    for (id, storage) in &state.storages {
        if !state.access.may(caller, &format!("/storage/{id}"), &["Datastore.Audit"]) {
            continue;
        }
        for node in state.nodes.values().filter(|node| !node.stranger && storage.enabled_on(&node.name).is_ok()) {
            let known = state.has_statistics(&node.name, cluster.clock.elapsed()) && storage.is_active(&node.name);
            let mut entry = json!({
                "id": format!("storage/{}/{id}", node.name), "type": "storage", "storage": id, "node": node.name,
                "plugintype": storage.about.plugin, "content": storage.about.content.join(","), "shared": u8::from(storage.shared),
                "status": if known { "available" } else { "unknown" },
            });
            if let (Some(entry), true) = (entry.as_object_mut(), known) {
                let space = storage.space(&node.name);
                entry.insert("maxdisk".to_owned(), space.total.into());
                entry.insert("disk".to_owned(), space.used.into());
            }
            list.push(entry);
        }
    }
    list
}

fn node_entries(cluster: &Cluster, state: &State, caller: &Caller, with_fingerprint: bool) -> Vec<Value> {
    let mut list = Vec::new();
    for node in state.nodes.values().filter(|node| !node.stranger) {
        let status = match (&node.unreachable, state.without_statistics) {
            (Some(_), _) => "offline",
            (None, true) => "unknown",
            (None, false) => "online",
        };
        let mut entry = Map::new();
        entry.insert("id".to_owned(), format!("node/{}", node.name).into());
        entry.insert("node".to_owned(), node.name.clone().into());
        entry.insert("type".to_owned(), "node".into());
        entry.insert("status".to_owned(), status.into());
        if with_fingerprint {
            entry.insert("ssl_fingerprint".to_owned(), FINGERPRINT.into());
        }
        if status == "online" {
            entry.insert("level".to_owned(), "".into());
            if !with_fingerprint {
                entry.insert("cgroup-mode".to_owned(), 1.into());
            }
            if state.access.may(caller, &format!("/nodes/{}", node.name), &["Sys.Audit"]) {
                let uptime = 3600 + cluster.clock.elapsed().as_secs();
                let numbers = json!({
                    "uptime": uptime, "cpu": 0.05, "maxcpu": 2, "mem": NODE_MEMORY_BYTES / 5, "maxmem": NODE_MEMORY_BYTES,
                    "disk": NODE_DISK_BYTES / 8, "maxdisk": NODE_DISK_BYTES,
                });
                entry.extend(numbers.as_object().cloned().unwrap_or_default());
            }
        }
        list.push(Value::Object(entry));
    }
    list
}

pub(crate) fn nodes(cluster: &Cluster, call: &Call) -> Result {
    let state = cluster.state();
    Ok(Value::Array(node_entries(cluster, &state, &call.caller, true)).into())
}

pub(crate) fn next_id(cluster: &Cluster, call: &Call) -> Result {
    let state = cluster.state();
    if call.get("vmid").is_some() {
        let vmid = call.vmid();
        if state.vms.contains_key(&vmid) || state.containers.contains_key(&vmid) {
            return Err(ApiError::param("vmid", format!("VM {vmid} already exists")));
        }
        return Ok(json!(vmid.to_string()).into());
    }
    let free = (100..1_000_000).find(|vmid| !state.vms.contains_key(vmid) && !state.containers.contains_key(vmid));
    free.map(|vmid| json!(vmid.to_string()).into()).ok_or_else(|| ApiError::die("unable to get any free VMID in range [100, 1000000]"))
}

/// GET /access/permissions: the value is the propagate flag, the key's presence the privilege.
pub(crate) fn permissions(cluster: &Cluster, call: &Call) -> Result {
    let state = cluster.state();
    let caller = match call.get("userid").filter(|userid| *userid != call.caller.id()) {
        Some(userid) => {
            state.access.require(&call.caller, "/access", &["Sys.Audit"])?;
            Access::parse_identity(userid)
        }
        None => call.caller.clone(),
    };
    let mut all = Map::new();
    let held = |path: &str| -> Map<String, Value> {
        let privileges = state.access.privileges(&caller, path);
        privileges.into_iter().map(|(privilege, propagate)| (privilege, u8::from(propagate).into())).collect()
    };
    match call.get("path") {
        Some(path) => {
            all.insert(path.to_owned(), held(path).into());
        }
        None => {
            for path in state.access.listed_paths() {
                let privileges = held(&path);
                if !privileges.is_empty() {
                    all.insert(path, privileges.into());
                }
            }
        }
    }
    Ok(Value::Object(all).into())
}

/// GET …/lxc/{vmid}/config.
pub(crate) fn container(cluster: &Cluster, call: &Call) -> Result {
    let state = cluster.state();
    let missing = || ApiError::die(format!("Configuration file 'nodes/{}/lxc/{}.conf' does not exist", call.node, call.vmid()));
    let (_, lines) = state.containers.get(&call.vmid()).filter(|(node, _)| *node == call.node).ok_or_else(missing)?;
    Ok(json!(lines).into())
}

/// The task, if it is known and the caller may see it.
fn task(state: &State, call: &Call, privilege: &str) -> std::result::Result<Option<Task>, ApiError> {
    let upid = call.text("upid");
    if !is_upid(upid) {
        return Err(ApiError::param("upid", "unable to parse worker upid"));
    }
    let owner = upid.split(':').nth(7).map(Access::parse_identity);
    let own = owner.is_some_and(|owner| owner == call.caller || (call.caller.token.is_none() && owner.user == call.caller.user));
    if !own {
        state.access.require(&call.caller, &format!("/nodes/{}", call.node), &[privilege])?;
    }
    Ok(state.tasks.by_upid.get(upid).cloned())
}

pub(crate) fn task_status(cluster: &Cluster, call: &Call) -> Result {
    let task = task(&cluster.state(), call, "Sys.Audit")?;
    task.map(|task| task.status().into()).ok_or_else(|| ApiError::param("upid", "no such task"))
}

pub(crate) fn task_log(cluster: &Cluster, call: &Call) -> Result {
    let number = |name: &str, otherwise: usize| call.get(name).and_then(|text| text.parse().ok()).unwrap_or(otherwise);
    let mut lines = match task(&cluster.state(), call, "Sys.Audit")? {
        Some(task) => task.log.lines(),
        None => vec!["unable to open file - No such file or directory".to_owned()],
    };
    if lines.is_empty() {
        lines.push("no content".to_owned());
    }
    let total = lines.len();
    let limit = match number("limit", PAGE) {
        0 => total,
        limit => limit,
    };
    let data: Vec<Value> =
        lines.iter().enumerate().skip(number("start", 0)).take(limit).map(|(index, line)| json!({"n": index + 1, "t": line})).collect();
    Ok(Reply { data: Value::Array(data), total: Some(total) })
}

pub(crate) fn task_list(cluster: &Cluster, call: &Call) -> Result {
    let state = cluster.state();
    let sees_all = state.access.may(&call.caller, &format!("/nodes/{}", call.node), &["Sys.Audit"]);
    let active = call.get("source") == Some("active");
    let tasks: Vec<&Task> = state
        .tasks
        .newest_first()
        .filter(|task| task.node == call.node && (sees_all || task.is_owned_by(&call.caller)))
        .filter(|task| if active { task.exit_status.is_none() } else { task.exit_status.is_some() || call.get("source") == Some("all") })
        .filter(|task| call.get("vmid").is_none_or(|vmid| task.id == vmid))
        .filter(|task| call.get("typefilter").is_none_or(|kind| task.kind == kind))
        .collect();
    let number = |name: &str, otherwise: usize| call.get(name).and_then(|text| text.parse().ok()).unwrap_or(otherwise);
    let data: Vec<Value> = tasks.iter().skip(number("start", 0)).take(number("limit", PAGE)).map(|task| task.entry()).collect();
    Ok(Reply { data: Value::Array(data), total: (!tasks.is_empty()).then_some(tasks.len()) })
}

/// Stopping a task that has ended does nothing. A running one is not interrupted here: its work is done in an instant of virtual time.
pub(crate) fn task_stop(cluster: &Cluster, call: &Call) -> Result {
    let state = cluster.state();
    task(&state, call, "Sys.Modify")?;
    Ok(Value::Null.into())
}
