//! The control endpoint `/_sim`, outside Proxmox's API: counters, faults, state. For people and for tests in other processes.
//!
//! `GET /_sim/counters` · `GET /_sim/requests` · `POST /_sim/reset` (counters) · `GET /_sim/vms` · `GET /_sim/tasks`
//! `POST /_sim/faults` {method?, path, nth?, times?, effect} or {inner, times?} · `DELETE /_sim/faults`
//! `POST /_sim/node` {name, unreachable: "595 No route to host" | null} · `POST /_sim/vm` {vmid, running?, paused?, hung?, lock?, leaked?}

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::faults::{Fault, Inner};
use super::http::{Answer, Outcome};
use super::state::{Cluster, State};

#[derive(Deserialize)]
#[serde(untagged)]
enum Planned {
    Inner {
        inner: Inner,
        #[serde(default = "once")]
        times: u32,
    },
    Request(Fault),
}

fn once() -> u32 {
    1
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NodeChange {
    name: String,
    #[serde(default)]
    unreachable: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VmChange {
    vmid: u32,
    #[serde(default)]
    running: Option<bool>,
    #[serde(default)]
    paused: Option<bool>,
    #[serde(default)]
    hung: Option<bool>,
    /// Empty: unlocked.
    #[serde(default)]
    lock: Option<String>,
    /// `scsi3`: its block node is left over.
    #[serde(default)]
    leaked: Option<String>,
}

pub(crate) fn respond(cluster: &Cluster, method: &str, path: &str, body: &[u8]) -> Outcome {
    let (status, data) = match act(&mut cluster.state(), method, path, body) {
        Ok(data) => (200, data),
        Err(text) => (400, json!({"error": text})),
    };
    let reason = if status == 200 { "OK" } else { "Bad Request" }.to_owned();
    let body = format!("{data:#}\n");
    Outcome::Answer(Answer { status, reason, json: true, body, proxied: false, location: None })
}

fn act(state: &mut State, method: &str, path: &str, body: &[u8]) -> Result<Value, String> {
    match (method, path) {
        ("GET", "/counters") => return Ok(json!(state.faults.counters())),
        ("GET", "/requests") => return Ok(json!(state.faults.log())),
        ("POST", "/reset") => state.faults.reset_counters(),
        ("GET", "/vms") => return Ok(vms(state)),
        ("GET", "/tasks") => {
            let tasks = state.tasks.newest_first().map(|task| json!({"task": task.status(), "log": task.log.lines()}));
            return Ok(tasks.collect());
        }
        ("DELETE", "/faults") => state.faults.clear(),
        ("POST", "/faults") => match read(body)? {
            Planned::Inner { inner, times } => state.faults.plan_inner(inner, times),
            Planned::Request(fault) => state.faults.plan(fault),
        },
        ("POST", "/node") => {
            let change: NodeChange = read(body)?;
            state.nodes.get_mut(&change.name).ok_or("no such node")?.unreachable = change.unreachable;
        }
        ("POST", "/vm") => change_vm(state, read(body)?)?,
        _ => return Err(format!("no control {method} {path}: see the head of tests/src/sim/control.rs")),
    }
    Ok(json!({"ok": true}))
}

fn read<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, String> {
    serde_json::from_slice(body).map_err(|error| error.to_string())
}

fn change_vm(state: &mut State, change: VmChange) -> Result<(), String> {
    let vm = state.vms.get_mut(&change.vmid).ok_or("no such VM")?;
    match change.running {
        Some(true) => vm.running = true,
        Some(false) => vm.power_off(),
        None => {}
    }
    vm.paused = change.paused.unwrap_or(vm.paused);
    vm.hung = change.hung.unwrap_or(vm.hung);
    match change.lock {
        Some(lock) if lock.is_empty() => drop(vm.config.current.remove("lock")),
        Some(lock) => drop(vm.config.current.insert("lock".to_owned(), lock)),
        None => {}
    }
    vm.leaked.extend(change.leaked);
    Ok(())
}

fn vms(state: &State) -> Value {
    let all: Map<String, Value> = state
        .vms
        .iter()
        .map(|(vmid, vm)| {
            let plugged: Map<String, Value> =
                vm.plugged.iter().map(|(key, plugged)| (key.clone(), json!({"volid": plugged.volid, "file": plugged.file}))).collect();
            let value = json!({
                "node": vm.node, "running": vm.running, "config": vm.config.current, "pending": vm.config.pending,
                "pending_delete": vm.config.pending_delete, "plugged": plugged, "leaked": vm.leaked,
            });
            (vmid.to_string(), value)
        })
        .collect();
    Value::Object(all)
}
