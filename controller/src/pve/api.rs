//! Each endpoint that we use, as build-request and read-answer. Pure.
//!
//! Numbers may come as strings and booleans as 0/1; unknown fields are passed over; what decides something must be
//! there, or the answer is refused.

mod contents;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

pub use contents::{contents, read_contents};

use super::drive::{Line, VmConfig};
use super::error::{Cause, Error};

/// The verbs that Proxmox takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Reads. Parameters in the query.
    Get,
    /// Writes. Parameters in the body.
    Post,
    /// Writes. Parameters in the body.
    Put,
    /// Removes. Parameters in the query: a body is refused.
    Delete,
}

/// One request below `/api2/json`. No `Debug`: a ticket's request holds a password.
#[derive(Clone)]
#[allow(missing_debug_implementations, reason = "the parameters of POST /access/ticket hold a password")]
pub struct Request {
    /// The verb.
    pub method: Method,
    path: String,
    params: Vec<(String, String)>,
}

impl Request {
    fn new(method: Method, path: String) -> Self {
        Self { method, path, params: Vec::new() }
    }

    fn with(mut self, key: &str, value: impl Into<String>) -> Self {
        self.params.push((key.into(), value.into()));
        self
    }

    /// `POST /nodes/pve1/qemu/101/config`, for messages: no parameters.
    #[must_use]
    pub fn name(&self) -> String {
        let method = match self.method {
            Method::Get => "GET",
            Method::Post => "POST",
            Method::Put => "PUT",
            Method::Delete => "DELETE",
        };
        format!("{method} {}", self.path)
    }

    /// `GET /nodes/{node}/qemu/{vmid}/pending`: the same for all nodes, VMs, storages, volumes and tasks.
    #[must_use]
    pub fn endpoint(&self) -> String {
        let name = self.name();
        let (mut endpoint, mut before) = (String::new(), "");
        for part in name.split('/') {
            let shown = match before {
                "nodes" => "{node}",
                "qemu" | "lxc" => "{vmid}",
                "storage" => "{storage}",
                "tasks" => "{upid}",
                "content" => "{volume}",
                _ => part,
            };
            if !endpoint.is_empty() {
                endpoint.push('/');
            }
            endpoint.push_str(shown);
            if before == "content" {
                // A volume's id may have slashes.
                break;
            }
            before = if shown == part { part } else { "" };
        }
        endpoint
    }

    /// The Proxmox node that it is about, as the path has it; nothing for calls that any node answers by itself.
    #[must_use]
    pub fn host(&self) -> Option<&str> {
        self.path.strip_prefix("/nodes/")?.split('/').next()
    }

    /// Whether a password is in it, and a ticket in its answer.
    #[must_use]
    pub fn is_login(&self) -> bool {
        self.path == "/access/ticket"
    }

    /// Whether it changes something.
    #[must_use]
    pub fn is_write(&self) -> bool {
        self.method != Method::Get && !self.is_login()
    }

    /// Path and query.
    #[must_use]
    pub fn target(&self) -> String {
        match self.method {
            Method::Get | Method::Delete if !self.params.is_empty() => format!("{}?{}", self.path, self.encoded()),
            _ => self.path.clone(),
        }
    }

    /// The form of a POST or PUT.
    #[must_use]
    pub fn body(&self) -> String {
        self.encoded()
    }

    fn encoded(&self) -> String {
        let pairs: Vec<String> =
            self.params.iter().map(|(key, value)| format!("{}={}", percent_encoded(key, ""), percent_encoded(value, ""))).collect();
        pairs.join("&")
    }
}

/// RFC 3986's unreserved characters, and those of `keep`, stay.
#[must_use]
pub fn percent_encoded(text: &str, keep: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || keep.as_bytes().contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

fn segment(text: &str) -> String {
    percent_encoded(text, "")
}

fn vm_path(host: &str, vmid: u32, rest: &str) -> String {
    format!("/nodes/{}/qemu/{vmid}/{rest}", segment(host))
}

/// Builds the cause of an answer above 399.
#[must_use]
pub fn refusal(status: u16, reason: String, body: Option<Value>, text: &str) -> Cause {
    let mut errors = BTreeMap::new();
    let mut message = String::new();
    match body {
        Some(body) => {
            message = body.get("message").and_then(Value::as_str).unwrap_or_default().to_string();
            if let Some(map) = body.get("errors").and_then(Value::as_object) {
                errors.extend(map.iter().map(|(name, why)| (name.clone(), string(why))));
            }
        }
        // The server's own errors are plain text since 5.2.0; a page of some other server is not worth keeping.
        None if !text.contains('<') => message = text.chars().take(500).collect(),
        None => (),
    }
    Cause::Answer { status, reason, message, errors }
}

fn string(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn text_of(value: &Value, key: &str) -> Option<String> {
    value.get(key).filter(|value| !value.is_null()).map(string)
}

fn number_of(value: &Value, key: &str) -> Option<u64> {
    match value.get(key)? {
        Value::Number(number) => number.as_u64().or_else(|| number.as_f64().filter(|n| (0.0..9e18).contains(n)).map(whole)),
        Value::String(text) => text.parse().ok(),
        _ => None,
    }
}

/// Proxmox computes some sizes as floating point.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the caller checked the range")]
fn whole(number: f64) -> u64 {
    number as u64
}

fn flag_of(value: &Value, key: &str) -> bool {
    matches!(value.get(key), Some(Value::Bool(true))) || number_of(value, key) == Some(1)
}

fn misread(call: &str, what: impl Into<String>) -> Error {
    Error { call: call.into(), cause: Cause::Shape(what.into()) }
}

fn list<'a>(call: &str, data: &'a Value) -> Result<&'a Vec<Value>, Error> {
    data.as_array().ok_or_else(|| misread(call, "a list was expected"))
}

/// `POST /access/ticket`.
#[must_use]
pub fn ticket(username: &str, password: &str) -> Request {
    Request::new(Method::Post, "/access/ticket".into()).with("username", username).with("password", password)
}

/// The ticket and its CSRF token.
pub fn read_ticket(call: &str, data: &Value) -> Result<(String, String), Error> {
    match (text_of(data, "ticket"), text_of(data, "CSRFPreventionToken")) {
        (Some(ticket), Some(csrf)) => Ok((ticket, csrf)),
        _ => Err(misread(call, "no ticket was given; a user with a second factor cannot be used, a token can")),
    }
}

/// A VM as the cluster lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vm {
    /// Its number, unique in the cluster.
    pub vmid: u32,
    /// The Proxmox node that it is on: true at once, also after a migration.
    pub host: String,
    /// Missing for some seconds after creation, and when the node is long silent.
    pub name: Option<String>,
    /// A template never runs.
    pub template: bool,
}

/// A storage on one Proxmox node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Storage {
    /// Its id, the same on every node that has it.
    pub storage: String,
    /// The node.
    pub host: String,
    /// `lvmthin`, `dir`…
    pub plugin: String,
    /// Seen active within the last five minutes.
    pub active: bool,
    /// One storage that several nodes see.
    pub shared: bool,
    /// May hold VM disks.
    pub images: bool,
    /// Bytes in all; 0 where unknown.
    pub total_bytes: u64,
    /// Bytes used.
    pub used_bytes: u64,
}

/// The cluster at one moment.
#[derive(Debug, Clone, Default)]
pub struct Resources {
    /// By VMID; QEMU machines only.
    pub vms: BTreeMap<u32, Vm>,
    /// Containers: VMID → Proxmox node.
    pub containers: BTreeMap<u32, String>,
    /// One per storage and node.
    pub storages: Vec<Storage>,
    /// Node → `online`, `offline` or `unknown`.
    pub hosts: BTreeMap<String, String>,
}

/// `GET /cluster/resources`: VMs, storages and nodes in one answer.
#[must_use]
pub fn resources() -> Request {
    Request::new(Method::Get, "/cluster/resources".into())
}

/// Reads [`resources`].
///
/// # Errors
/// An entry without what identifies it.
pub fn read_resources(call: &str, data: &Value) -> Result<Resources, Error> {
    let mut all = Resources::default();
    for entry in list(call, data)? {
        let host = || text_of(entry, "node").ok_or_else(|| misread(call, "an entry without its node"));
        match entry.get("type").and_then(Value::as_str) {
            Some("qemu") => {
                let vmid = vmid_of(entry).ok_or_else(|| misread(call, "a VM without its vmid"))?;
                let vm = Vm { vmid, host: host()?, name: text_of(entry, "name"), template: flag_of(entry, "template") };
                all.vms.insert(vmid, vm);
            }
            Some("lxc") => {
                let vmid = vmid_of(entry).ok_or_else(|| misread(call, "a container without its vmid"))?;
                all.containers.insert(vmid, host()?);
            }
            Some("storage") => all.storages.push(Storage {
                storage: text_of(entry, "storage").ok_or_else(|| misread(call, "a storage without its id"))?,
                host: host()?,
                plugin: text_of(entry, "plugintype").unwrap_or_default(),
                active: text_of(entry, "status").as_deref() == Some("available"),
                shared: flag_of(entry, "shared"),
                images: text_of(entry, "content").is_none_or(|content| content.split(',').any(|word| word.trim() == "images")),
                total_bytes: number_of(entry, "maxdisk").unwrap_or(0),
                used_bytes: number_of(entry, "disk").unwrap_or(0),
            }),
            Some("node") => {
                all.hosts.insert(host()?, text_of(entry, "status").unwrap_or_default());
            }
            _ => (),
        }
    }
    Ok(all)
}

fn vmid_of(entry: &Value) -> Option<u32> {
    number_of(entry, "vmid").and_then(|id| u32::try_from(id).ok())
}

/// A VM as its node sees it now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmState {
    /// A QEMU process is there.
    pub running: bool,
    /// The drives that QEMU really has; nothing where QEMU does not answer or was not asked.
    pub plugged: Option<BTreeSet<String>>,
    /// QEMU's process: another one has none of the leftovers of the last.
    pub pid: Option<u64>,
}

fn read_state(entry: &Value) -> VmState {
    let running = text_of(entry, "status").as_deref() == Some("running");
    let plugged = match entry.get("blockstat").and_then(Value::as_object) {
        Some(drives) => Some(drives.keys().cloned().collect()),
        None if !running => Some(BTreeSet::new()),
        None => None,
    };
    VmState { running, plugged, pid: number_of(entry, "pid") }
}

/// `GET /nodes/{host}/qemu?full=1`: every VM of a node with its state and its plugged drives.
#[must_use]
pub fn vm_states(host: &str) -> Request {
    Request::new(Method::Get, format!("/nodes/{}/qemu", segment(host))).with("full", "1")
}

/// Reads [`vm_states`].
///
/// # Errors
/// An entry without its VMID.
pub fn read_vm_states(call: &str, data: &Value) -> Result<BTreeMap<u32, VmState>, Error> {
    let read = |entry| vmid_of(entry).map(|vmid| (vmid, read_state(entry))).ok_or_else(|| misread(call, "a VM without its vmid"));
    list(call, data)?.iter().map(read).collect()
}

/// `GET …/status/current`: one VM's state and plugged drives.
#[must_use]
pub fn vm_state(host: &str, vmid: u32) -> Request {
    Request::new(Method::Get, vm_path(host, vmid, "status/current"))
}

/// Reads [`vm_state`].
///
/// # Errors
/// No status in it.
pub fn read_vm_state(call: &str, data: &Value) -> Result<VmState, Error> {
    text_of(data, "status").ok_or_else(|| misread(call, "no status"))?;
    Ok(read_state(data))
}

/// `GET …/pending`: what is configured and what is planned, with the digest.
#[must_use]
pub fn pending(host: &str, vmid: u32) -> Request {
    Request::new(Method::Get, vm_path(host, vmid, "pending"))
}

/// Reads [`pending`].
///
/// # Errors
/// No list, an entry without a key, or no digest.
pub fn read_pending(call: &str, data: &Value) -> Result<VmConfig, Error> {
    let mut config = VmConfig::default();
    for entry in list(call, data)? {
        let key = text_of(entry, "key").ok_or_else(|| misread(call, "an entry without its key"))?;
        if key == "digest" {
            config.digest = text_of(entry, "value").unwrap_or_default();
            continue;
        }
        let delete = number_of(entry, "delete").is_some_and(|n| n > 0) || entry.get("delete") == Some(&Value::Bool(true));
        config.lines.insert(key, Line { value: text_of(entry, "value"), pending: text_of(entry, "pending"), delete });
    }
    if config.digest.is_empty() {
        return Err(misread(call, "no digest"));
    }
    Ok(config)
}

/// `GET …/snapshot`: the names of a VM's snapshots.
#[must_use]
pub fn snapshots(host: &str, vmid: u32) -> Request {
    Request::new(Method::Get, vm_path(host, vmid, "snapshot"))
}

/// Reads [`snapshots`]; the pseudo entry `current` left out.
///
/// # Errors
/// No list, or an entry without a name.
pub fn read_snapshots(call: &str, data: &Value) -> Result<Vec<String>, Error> {
    let names = list(call, data)?.iter().map(|entry| text_of(entry, "name").ok_or_else(|| misread(call, "a snapshot without a name")));
    Ok(names.collect::<Result<Vec<_>, _>>()?.into_iter().filter(|name| name != "current").collect())
}

/// `GET …/config?snapshot=NAME`: the config that a snapshot keeps.
#[must_use]
pub fn snapshot_config(host: &str, vmid: u32, name: &str) -> Request {
    Request::new(Method::Get, vm_path(host, vmid, "config")).with("snapshot", name)
}

/// Reads [`snapshot_config`]: key → drive line, drives only.
///
/// # Errors
/// No map.
pub fn read_snapshot_config(call: &str, data: &Value) -> Result<BTreeMap<String, String>, Error> {
    let map = data.as_object().ok_or_else(|| misread(call, "a map was expected"))?;
    Ok(map.iter().filter(|(key, _)| super::drive::is_drive_key(key)).map(|(key, value)| (key.clone(), string(value))).collect())
}

/// What one call changes in a VM's drives. Several keys are not atomic: one that fails leaves the others planned, perhaps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Change {
    /// `scsiN` → drive
    pub set: BTreeMap<String, String>,
    /// `scsiN`: removed.
    pub delete: BTreeSet<String>,
    /// `scsiN`: what is planned is forgotten.
    pub revert: BTreeSet<String>,
}

impl Change {
    /// `scsiN=drive`
    #[must_use]
    pub fn plug(key: &str, drive: &str) -> Self {
        Self { set: BTreeMap::from([(key.into(), drive.into())]), ..Self::default() }
    }

    /// `delete=scsiN`
    #[must_use]
    pub fn remove(key: &str) -> Self {
        Self { delete: BTreeSet::from([key.into()]), ..Self::default() }
    }

    /// `revert=scsiN`
    #[must_use]
    pub fn forget(key: &str) -> Self {
        Self { revert: BTreeSet::from([key.into()]), ..Self::default() }
    }

    /// How many keys it names.
    #[must_use]
    pub fn len(&self) -> usize {
        self.set.len() + self.delete.len() + self.revert.len()
    }

    /// Nothing is to be done.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// `POST …/config`: a task. `delay_s`: seconds that Proxmox may hold the answer until the task has ended.
#[must_use]
pub fn change(host: &str, vmid: u32, change: &Change, digest: &str, delay_s: Option<u8>) -> Request {
    let list = |keys: &BTreeSet<String>| keys.iter().cloned().collect::<Vec<_>>().join(",");
    let mut request = Request::new(Method::Post, vm_path(host, vmid, "config"));
    for (key, drive) in &change.set {
        request = request.with(key, drive.clone());
    }
    for (name, keys) in [("delete", &change.delete), ("revert", &change.revert)] {
        if !keys.is_empty() {
            request = request.with(name, list(keys));
        }
    }
    let request = if digest.is_empty() { request } else { request.with("digest", digest) };
    match delay_s {
        Some(delay_s) => request.with("background_delay", delay_s.to_string()),
        None => request,
    }
}

/// `GET /version`
#[must_use]
pub fn version() -> Request {
    Request::new(Method::Get, "/version".into())
}

/// Reads [`version`]: `9.2.11`.
///
/// # Errors
/// No version in it.
pub fn read_version(call: &str, data: &Value) -> Result<String, Error> {
    text_of(data, "version").ok_or_else(|| misread(call, "no version"))
}

/// `GET /cluster/nextid?vmid=N`: whether a number is free, also of a VM that is not shown to us.
#[must_use]
pub fn next_id(vmid: u32) -> Request {
    Request::new(Method::Get, "/cluster/nextid".into()).with("vmid", vmid.to_string())
}

/// `GET /nodes/{host}/tasks?source=active&typefilter=qmconfig`: config changes that are going on; our own are always shown.
#[must_use]
pub fn active_changes(host: &str) -> Request {
    let path = format!("/nodes/{}/tasks", segment(host));
    Request::new(Method::Get, path).with("source", "active").with("typefilter", "qmconfig")
}

/// Reads [`active_changes`]: UPID and VMID of each that has not ended.
///
/// # Errors
/// No list, or an entry without its UPID.
pub fn read_active_changes(call: &str, data: &Value) -> Result<Vec<(String, Option<u32>)>, Error> {
    let going_on = list(call, data)?.iter().filter(|entry| text_of(entry, "endtime").is_none());
    let read = |entry| Ok((text_of(entry, "upid").ok_or_else(|| misread(call, "a task without its upid"))?, number_of(entry, "id")));
    going_on.map(|entry| read(entry).map(|(upid, vmid)| (upid, vmid.and_then(|id| u32::try_from(id).ok())))).collect()
}

/// `GET /nodes/{host}/lxc/{vmid}/config`: a container's config as it is.
#[must_use]
pub fn container(host: &str, vmid: u32) -> Request {
    Request::new(Method::Get, format!("/nodes/{}/lxc/{vmid}/config", segment(host)))
}

/// Reads [`container`]: key → line, those with volumes only.
///
/// # Errors
/// No map.
pub fn read_container(call: &str, data: &Value) -> Result<BTreeMap<String, String>, Error> {
    let map = data.as_object().ok_or_else(|| misread(call, "a map was expected"))?;
    let holds = |key: &str| key == "rootfs" || super::drive::is_mount_point(key);
    Ok(map.iter().filter(|(key, _)| holds(key)).map(|(key, value)| (key.clone(), string(value))).collect())
}

/// `PUT …/resize` to `bytes` in all: a task since qemu-server 8.0.2, done at once before.
#[must_use]
pub fn resize(host: &str, vmid: u32, key: &str, bytes: u64, digest: &str) -> Request {
    let size = match bytes {
        bytes if bytes % (1 << 20) == 0 => format!("{}M", bytes >> 20),
        bytes if bytes % (1 << 10) == 0 => format!("{}K", bytes >> 10),
        bytes => bytes.to_string(),
    };
    Request::new(Method::Put, vm_path(host, vmid, "resize")).with("disk", key).with("size", size).with("digest", digest)
}

/// The UPID in an answer; nothing where the work is done already.
#[must_use]
pub fn read_upid(data: &Value) -> Option<String> {
    data.as_str().filter(|text| text.starts_with("UPID:")).map(Into::into)
}

/// `GET /nodes/{host}/tasks/{upid}/status`, of the host that the UPID names.
///
/// # Errors
/// A text that is no UPID.
pub fn task_status(upid: &str) -> Result<Request, Error> {
    let host = upid.strip_prefix("UPID:").and_then(|rest| rest.split(':').next()).filter(|host| !matches!(*host, "" | "." | ".."));
    let host = host.ok_or_else(|| misread("task", format!("{upid:?} is no UPID")))?;
    Ok(Request::new(Method::Get, format!("/nodes/{}/tasks/{}/status", segment(host), segment(upid))))
}

/// Whether the task has ended well; an error when it ended badly.
pub fn read_task(call: &str, upid: &str, data: &Value) -> Result<bool, Error> {
    match (text_of(data, "status").as_deref(), text_of(data, "exitstatus")) {
        (Some("running"), _) => Ok(false),
        (Some("stopped"), Some(exit)) if exit == "OK" || exit.starts_with("WARNINGS:") => Ok(true),
        (Some("stopped"), exit) => {
            let exit = exit.unwrap_or_else(|| "unexpected status".into());
            Err(Error { call: call.into(), cause: Cause::Task { upid: upid.into(), exit } })
        }
        _ => Err(misread(call, "a task without a status")),
    }
}

fn content_path(host: &str, storage: &str, volid: Option<&str>) -> String {
    let path = format!("/nodes/{}/storage/{}/content", segment(host), segment(storage));
    match volid {
        Some(volid) => format!("{path}/{}", percent_encoded(volid, "/:")),
        None => path,
    }
}

/// `POST …/content`: a new volume, made before the answer. `name` has no folder. Sizes are KiB on this wire.
#[must_use]
pub fn allocate(host: &str, storage: &str, vmid: u32, name: &str, format: &str, kib: u64) -> Request {
    Request::new(Method::Post, content_path(host, storage, None))
        .with("vmid", vmid.to_string())
        .with("filename", name)
        .with("size", kib.to_string())
        .with("format", format)
}

/// `DELETE …/content/{volid}`: a task, or done within `delay_s`.
#[must_use]
pub fn free(host: &str, storage: &str, volid: &str, delay_s: Option<u8>) -> Request {
    let request = Request::new(Method::Delete, content_path(host, storage, Some(volid)));
    match delay_s {
        Some(delay_s) => request.with("delay", delay_s.to_string()),
        None => request,
    }
}

/// `GET …/content?content=images&vmid=N`: the images that carry an owner's number; those that are not shown to us are left out.
#[must_use]
pub fn content(host: &str, storage: &str, owner: u32) -> Request {
    Request::new(Method::Get, content_path(host, storage, None)).with("content", "images").with("vmid", owner.to_string())
}

/// Reads [`content`]: volid → bytes, where the storage says them at once.
pub fn read_content(call: &str, data: &Value) -> Result<BTreeMap<String, Option<u64>>, Error> {
    let volid = |entry| text_of(entry, "volid").ok_or_else(|| misread(call, "an image without its volid"));
    list(call, data)?.iter().map(|entry| Ok((volid(entry)?, number_of(entry, "size").filter(|size| *size > 0)))).collect()
}

/// `GET …/content/{volid}`: one volume.
#[must_use]
pub fn volume(host: &str, storage: &str, volid: &str) -> Request {
    Request::new(Method::Get, content_path(host, storage, Some(volid)))
}

/// Its size in bytes.
///
/// # Errors
/// No size in it.
pub fn read_volume(call: &str, data: &Value) -> Result<u64, Error> {
    number_of(data, "size").filter(|size| *size > 0).ok_or_else(|| misread(call, "a volume without its size"))
}

/// `GET /cluster/status`; needs Sys.Audit on `/`.
#[must_use]
pub fn cluster_status() -> Request {
    Request::new(Method::Get, "/cluster/status".into())
}

/// Whether the cluster is quorate; a host alone is. A list that shows neither a cluster nor just one host says nothing, and
/// that is not taken for quorate.
///
/// # Errors
/// No list.
pub fn read_quorate(call: &str, data: &Value) -> Result<bool, Error> {
    let entries = list(call, data)?;
    let of_type = |kind: &'static str| entries.iter().filter(move |entry| text_of(entry, "type").as_deref() == Some(kind));
    Ok(match of_type("cluster").next() {
        Some(cluster) => flag_of(cluster, "quorate"),
        None => of_type("node").count() == 1,
    })
}

/// Which cluster a node says that it is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    /// Nothing: a node alone.
    pub(crate) cluster: Option<String>,
    /// Its nodes.
    pub(crate) nodes: BTreeSet<String>,
    /// As [`read_quorate`].
    pub(crate) is_quorate: bool,
}

impl Identity {
    /// Whether both can be one cluster: a node alone may have become one of a cluster, and never the other way.
    #[must_use]
    pub(crate) fn is_followed_by(&self, now: &Self) -> bool {
        let is_renamed = self.cluster.is_some() && self.cluster != now.cluster;
        !is_renamed && !self.nodes.is_disjoint(&now.nodes)
    }
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let nodes = self.nodes.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        match &self.cluster {
            Some(cluster) => write!(f, "cluster {cluster} (nodes {nodes})"),
            None => write!(f, "node {nodes} alone"),
        }
    }
}

/// Reads [`cluster_status`].
///
/// # Errors
/// No list.
pub(crate) fn read_identity(call: &str, data: &Value) -> Result<Identity, Error> {
    let (mut cluster, mut nodes) = (None, BTreeSet::new());
    for entry in list(call, data)? {
        match text_of(entry, "type").as_deref() {
            Some("cluster") => cluster = text_of(entry, "name"),
            Some("node") => nodes.extend(text_of(entry, "name")),
            _ => (),
        }
    }
    Ok(Identity { cluster, nodes, is_quorate: read_quorate(call, data)? })
}

/// `GET /access/permissions`: our own.
#[must_use]
pub fn permissions() -> Request {
    Request::new(Method::Get, "/access/permissions".into())
}

/// Whether every VM is shown to us: VM.Audit, propagated, on `/` or `/vms`.
#[must_use]
pub fn read_sees_all_vms(data: &Value) -> bool {
    // The value is the propagate flag: with 0 it is held for that path alone. An entry on a deeper path replaces what is
    // inherited, so what `/vms` says counts where it is listed.
    data.get("/vms").or_else(|| data.get("/")).is_some_and(|held| flag_of(held, "VM.Audit"))
}

#[cfg(test)]
mod tests;
