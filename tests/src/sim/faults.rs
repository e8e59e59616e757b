//! Faults on demand, and the counters of requests.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;

use super::answer::ApiError;

/// How many requests the log keeps.
const LOG_LENGTH: usize = 10_000;

/// What happens to a request that a fault matches.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Effect {
    /// Answered with this status line instead of being done.
    Answer { status: u16, reason: String },
    /// Never answered; nothing is done.
    Hang,
    /// The connection is closed before the request is looked at.
    Close,
    /// Done, and then the connection is closed without an answer.
    CloseAfterwards,
    /// `596 Connection timed out`, while the operation completes afterwards.
    TimeOutButComplete,
}

/// A fault of a request: the `nth` one (from 1) whose method and path match, and the `times - 1` after it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// Absent: any.
    #[serde(default)]
    pub method: Option<String>,
    /// A path below /api2/json; `*` stands for one component, a last `**` for the rest.
    pub path: String,
    #[serde(default = "one")]
    pub nth: u32,
    #[serde(default = "one")]
    pub times: u32,
    pub effect: Effect,
}

fn one() -> u32 {
    1
}

/// A fault inside a VM or a task, used up by the next `times` operations that meet it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Inner {
    /// QEMU refuses the drive, Proxmox says OK (before 8.4: a 400).
    PhantomAttach { vmid: u32 },
    /// Plugging fails with this text, a 400.
    PlugFails { vmid: u32, text: String },
    /// The guest keeps the disk: the detach fails and the disk stays.
    DiskStays { vmid: u32 },
    /// The guest keeps the controller: the detach fails after ~17 s, and the disk is gone.
    ControllerStays { vmid: u32 },
    /// The volume grows, QEMU is not told, the task fails.
    ResizeSecondHalf { vmid: u32 },
    /// The task's worker is killed when QEMU has done its part and the config does not say so yet.
    WorkerDies { vmid: u32 },
    /// The next task, of whatever type, is killed: before it did anything, or with all done but its last line.
    TaskKilled { is_done: bool },
    /// A task of this type ends at once with this exit status, its work not done.
    TaskFails { kind: String, exit_status: String },
}

impl Fault {
    /// The next matching request.
    #[must_use]
    pub fn next(method: &str, path: &str, effect: Effect) -> Fault {
        Fault { method: Some(method.to_owned()), path: path.to_owned(), nth: 1, times: 1, effect }
    }

    /// The `nth` one from now.
    #[must_use]
    pub fn nth(mut self, nth: u32) -> Fault {
        self.nth = nth;
        self
    }

    /// That many in a row.
    #[must_use]
    pub fn times(mut self, times: u32) -> Fault {
        self.times = times;
        self
    }
}

/// Something a test does just before a matching request is worked on.
type Hook = Box<dyn FnOnce() + Send>;

/// All that is planned, and what was counted.
#[derive(Default)]
pub(crate) struct Faults {
    requests: Vec<Fault>,
    inner: Vec<(Inner, u32)>,
    hooks: Vec<(String, String, u32, Hook)>,
    counters: BTreeMap<String, u64>,
    log: Vec<String>,
    bytes: u64,
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults")
            .field("requests", &self.requests)
            .field("inner", &self.inner)
            .field("hooks", &self.hooks.len())
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

impl Faults {
    pub(crate) fn plan(&mut self, fault: Fault) {
        self.requests.push(fault);
    }

    pub(crate) fn plan_inner(&mut self, fault: Inner, times: u32) {
        self.inner.push((fault, times));
    }

    pub(crate) fn plan_hook(&mut self, method: &str, path: &str, nth: u32, hook: Hook) {
        self.hooks.push((method.to_owned(), path.to_owned(), nth, hook));
    }

    pub(crate) fn clear(&mut self) {
        *self = Faults::default();
    }

    pub(crate) fn count(&mut self, endpoint: &str, request: String) {
        *self.counters.entry(endpoint.to_owned()).or_default() += 1;
        if self.log.len() < LOG_LENGTH {
            self.log.push(request);
        }
    }

    /// An answer of so many bytes.
    pub(crate) fn count_bytes(&mut self, bytes: usize) {
        self.bytes += u64::try_from(bytes).unwrap_or(0);
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn counters(&self) -> &BTreeMap<String, u64> {
        &self.counters
    }

    pub(crate) fn log(&self) -> &[String] {
        &self.log
    }

    pub(crate) fn reset_counters(&mut self) {
        self.counters.clear();
        self.log.clear();
        self.bytes = 0;
    }

    /// The effect of the first fault that this request meets.
    pub(crate) fn effect(&mut self, method: &str, path: &str) -> Option<Effect> {
        let mut effect = None;
        for fault in &mut self.requests {
            if fault.method.as_ref().is_some_and(|wanted| wanted != method) || !matches(&fault.path, path) || fault.times == 0 {
                continue;
            }
            if fault.nth > 1 {
                fault.nth -= 1;
            } else if effect.is_none() {
                fault.times -= 1;
                effect = Some(fault.effect.clone());
            }
        }
        self.requests.retain(|fault| fault.times > 0);
        effect
    }

    /// The hook of this request, if one is due.
    pub(crate) fn hook(&mut self, method: &str, path: &str) -> Option<Hook> {
        let mut due = None;
        for (index, (wanted, pattern, nth, _)) in self.hooks.iter_mut().enumerate() {
            if wanted == method && matches(pattern, path) {
                *nth = nth.saturating_sub(1);
                if *nth == 0 && due.is_none() {
                    due = Some(index);
                }
            }
        }
        due.map(|index| self.hooks.remove(index).3)
    }

    /// Uses up one inner fault that `wanted` accepts.
    pub(crate) fn meets(&mut self, wanted: impl Fn(&Inner) -> bool) -> Option<Inner> {
        let (fault, times) = self.inner.iter_mut().find(|(fault, times)| *times > 0 && wanted(fault))?;
        *times -= 1;
        let met = fault.clone();
        self.inner.retain(|(_, times)| *times > 0);
        Some(met)
    }

    /// Whether the next task is killed: with its work done, or not.
    pub(crate) fn task_killed(&mut self) -> Option<bool> {
        match self.meets(|fault| matches!(fault, Inner::TaskKilled { .. })) {
            Some(Inner::TaskKilled { is_done }) => Some(is_done),
            _ => None,
        }
    }

    pub(crate) fn task_end(&mut self, kind: &str) -> Option<String> {
        match self.meets(|fault| matches!(fault, Inner::TaskFails { kind: wanted, .. } if wanted == kind)) {
            Some(Inner::TaskFails { exit_status, .. }) => Some(exit_status),
            _ => None,
        }
    }
}

/// What Proxmox says of a task whose worker is gone.
pub(crate) const KILLED: &str = "unexpected status";

impl Effect {
    pub(crate) fn answer(&self) -> Option<ApiError> {
        match self {
            Effect::Answer { status: status @ 595..=599, reason } => Some(ApiError::empty(*status, reason.clone())),
            Effect::Answer { status, reason } => Some(ApiError::handler(*status, format!("{reason}\n"))),
            Effect::Hang | Effect::Close | Effect::CloseAfterwards | Effect::TimeOutButComplete => None,
        }
    }
}

/// Whether `path` has the shape of `pattern`.
fn matches(pattern: &str, path: &str) -> bool {
    let mut wanted = pattern.split('/').filter(|part| !part.is_empty());
    let mut given = path.split('/').filter(|part| !part.is_empty());
    loop {
        match (wanted.next(), given.next()) {
            (Some("**"), _) | (None, None) => return true,
            (Some(wanted), Some(given)) if wanted == "*" || wanted == given => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nth_request_is_met_and_no_other() {
        let mut faults = Faults::default();
        faults.plan(Fault::next("PUT", "/nodes/*/qemu/*/config", Effect::Hang).nth(2));
        let mut ask = || faults.effect("PUT", "/nodes/pve1/qemu/100/config").is_some();
        assert_eq!([ask(), ask(), ask()], [false, true, false]);
    }

    #[test]
    fn patterns_match_by_component() {
        assert!(matches("/nodes/*/storage/*/content/**", "/nodes/a/storage/b/content/c:9999/x.raw"));
        assert!(!matches("/nodes/*", "/nodes/a/qemu"));
    }
}
