//! Tasks: UPID, log, exit status (`reference/proxmox-api.md` §5).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};

use super::access::Caller;
use super::clock::Gate;

/// The first worker's process id; each task takes the next.
const FIRST_PID: u32 = 0x1000;

/// What a task has printed so far; clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    pub(crate) fn print(&self, line: impl Into<String>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(line.into());
    }

    /// Replaces the last line (a message that goes on: `trying to acquire lock...` + ` OK`).
    pub(crate) fn append(&self, text: &str) {
        if let Some(line) = self.0.lock().unwrap_or_else(PoisonError::into_inner).last_mut() {
            line.push_str(text);
        }
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// One task.
#[derive(Debug, Clone)]
pub(crate) struct Task {
    pub(crate) upid: String,
    pub(crate) node: String,
    pub(crate) caller: Caller,
    pub(crate) kind: String,
    pub(crate) id: String,
    pub(crate) pid: u32,
    pub(crate) pstart: u64,
    pub(crate) started: u64,
    pub(crate) ended: Option<u64>,
    pub(crate) exit_status: Option<String>,
    pub(crate) log: Log,
    pub(crate) done: Gate,
}

/// All tasks of the cluster, by UPID, in order of their start.
#[derive(Debug, Default)]
pub(crate) struct Tasks {
    pub(crate) by_upid: BTreeMap<String, Task>,
    order: Vec<String>,
}

impl Tasks {
    /// A new running task.
    pub(crate) fn begin(&mut self, node: &str, kind: &str, id: &str, caller: &Caller, now: u64) -> Task {
        let count = u32::try_from(self.order.len()).unwrap_or(u32::MAX);
        let pid = FIRST_PID.wrapping_add(count);
        let pstart = 0x0005_0000_u64 + u64::from(count) * 16;
        let upid = format!("UPID:{node}:{pid:08X}:{pstart:08X}:{now:08X}:{kind}:{id}:{}:", caller.id());
        let task = Task {
            upid: upid.clone(),
            node: node.to_owned(),
            caller: caller.clone(),
            kind: kind.to_owned(),
            id: id.to_owned(),
            pid,
            pstart,
            started: now,
            ended: None,
            exit_status: None,
            log: Log::default(),
            done: Gate::default(),
        };
        self.by_upid.insert(upid.clone(), task.clone());
        self.order.push(upid);
        task
    }

    pub(crate) fn end(&mut self, upid: &str, exit_status: String, now: u64) {
        let Some(task) = self.by_upid.get_mut(upid) else { return };
        let last = if exit_status == "OK" { "TASK OK".to_owned() } else { format!("TASK ERROR: {exit_status}") };
        task.log.print(last);
        task.ended = Some(now);
        task.exit_status = Some(exit_status);
    }

    /// Newest first.
    pub(crate) fn newest_first(&self) -> impl Iterator<Item = &Task> {
        self.order.iter().rev().filter_map(|upid| self.by_upid.get(upid))
    }

    /// Forgets a finished task, as the daily clean-up does.
    pub(crate) fn purge(&mut self, upid: &str) {
        self.by_upid.remove(upid);
        self.order.retain(|known| known != upid);
    }
}

impl Task {
    /// GET status.
    pub(crate) fn status(&self) -> Value {
        let mut status = self.describe();
        if let Some(status) = status.as_object_mut() {
            status.insert("status".to_owned(), if self.exit_status.is_some() { "stopped" } else { "running" }.into());
            if let Some(exit) = &self.exit_status {
                status.insert("exitstatus".to_owned(), exit.clone().into());
            }
        }
        status
    }

    /// An entry of the task list.
    pub(crate) fn entry(&self) -> Value {
        let mut entry = self.describe();
        if let Some(entry) = entry.as_object_mut() {
            if let Some(ended) = self.ended {
                entry.insert("endtime".to_owned(), ended.into());
            }
            if let Some(exit) = &self.exit_status {
                entry.insert("status".to_owned(), exit.clone().into());
            }
        }
        entry
    }

    fn describe(&self) -> Value {
        let mut value = json!({
            "upid": self.upid, "node": self.node, "pid": self.pid, "pstart": self.pstart, "starttime": self.started,
            "type": self.kind, "id": self.id, "user": self.caller.user,
        });
        if let (Some(value), Some(token)) = (value.as_object_mut(), &self.caller.token) {
            value.insert("tokenid".to_owned(), token.clone().into());
        }
        value
    }

    /// A user sees the tasks of its tokens; a token sees its own only.
    pub(crate) fn is_owned_by(&self, caller: &Caller) -> bool {
        self.caller == *caller || (caller.token.is_none() && self.caller.user == caller.user)
    }
}

/// Whether `text` follows the grammar of a UPID.
pub(crate) fn is_upid(text: &str) -> bool {
    let parts: Vec<&str> = text.split(':').collect();
    let [head, node, pid, pstart, start, kind, id, user, tail] = parts.as_slice() else { return false };
    let hex = |text: &str, lengths: std::ops::RangeInclusive<usize>| {
        lengths.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
    };
    let plain = |text: &str| !text.contains(|letter: char| letter.is_whitespace() || letter == '/');
    *head == "UPID"
        && tail.is_empty()
        && !node.is_empty()
        && node.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        && hex(pid, 8..=8)
        && hex(pstart, 8..=9)
        && hex(start, 8..=8)
        && !kind.is_empty()
        && plain(kind)
        && plain(id)
        && !user.is_empty()
        && plain(user)
}
