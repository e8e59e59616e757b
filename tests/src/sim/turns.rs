//! The simulator as the scheduler: with [`super::Builder::scheduled`] every request waits at its door until it is let in, one at a
//! time, in the order that a test says.
//!
//! A door is a listener of its own, so that it is known whose request waits: one for each controller. A door that is shut is what
//! a killed controller looks like from Proxmox: what waits is never looked at, what is worked on is finished and answered to nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// A request that waits to be looked at, or its answer that waits to be sent: whose it is, and the how manieth of its kind.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Waiting {
    /// Done, and on its way back.
    pub answer: bool,
    pub door: String,
    /// `POST /nodes/pve1/qemu/101/config digest=…&scsi1=…`
    pub request: String,
    /// From 1; the same for those that wait at once and say the same: of these the client's earlier call goes first.
    pub nth: u32,
}

#[derive(Debug)]
struct Turn {
    what: Waiting,
    /// The client's own number of the call. Who comes first is chance: threads of the client race.
    number: u64,
    go: oneshot::Sender<()>,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<Turn>,
    working: usize,
    /// Requests that were let in, by door and text.
    seen: BTreeMap<(String, String), u32>,
    shut: BTreeSet<String>,
    /// What was let in, in this order.
    log: Vec<String>,
}

/// Who waits, and who was let in; clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Turns(Arc<Mutex<State>>);

/// A request that was let in and is not answered yet.
#[derive(Debug)]
pub(crate) struct Working {
    turns: Turns,
    door: String,
    request: String,
    number: u64,
}

impl Turns {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits to be let in; `None`: the door is shut.
    pub(crate) async fn arrive(&self, door: &str, request: &str, number: u64) -> Option<Working> {
        let turn = {
            let mut state = self.state();
            if state.shut.contains(door) {
                return None;
            }
            let (door, request) = (door.to_owned(), request.to_owned());
            let nth = state.seen.get(&(door.clone(), request.clone())).copied().unwrap_or_default() + 1;
            let (go, turn) = oneshot::channel();
            state.waiting.push(Turn { what: Waiting { answer: false, door, request, nth }, number, go });
            turn
        };
        turn.await.ok()?;
        Some(Working { turns: self.clone(), door: door.to_owned(), request: request.to_owned(), number })
    }

    /// Who waits, in an order that does not depend on who came first.
    pub(crate) fn waiting(&self) -> Vec<Waiting> {
        let mut waiting: Vec<Waiting> = self.state().waiting.iter().map(|turn| turn.what.clone()).collect();
        waiting.sort();
        waiting
    }

    /// How many wait or are worked on.
    pub(crate) fn inside(&self) -> usize {
        let state = self.state();
        state.waiting.len() + state.working
    }

    pub(crate) fn working(&self) -> usize {
        self.state().working
    }

    /// Lets one in; false: none such waits.
    pub(crate) fn admit(&self, wanted: &Waiting, at: &str) -> bool {
        let mut state = self.state();
        let alike = state.waiting.iter().enumerate().filter(|(_, turn)| turn.what == *wanted);
        let Some((place, _)) = alike.min_by_key(|(_, turn)| turn.number) else { return false };
        let Turn { what: waiting, go, .. } = state.waiting.swap_remove(place);
        if !waiting.answer {
            state.log.push(format!("{at} {}: {}", waiting.door, waiting.request));
            *state.seen.entry((waiting.door, waiting.request)).or_default() += 1;
        }
        // Counted here and not when the request's task runs again: between the two nothing is lost sight of.
        state.working += 1;
        if go.send(()).is_err() {
            state.working -= 1;
        }
        true
    }

    pub(crate) fn shut(&self, door: &str) {
        let mut state = self.state();
        state.shut.insert(door.to_owned());
        state.waiting.retain(|turn| turn.what.door != door);
    }

    pub(crate) fn log(&self) -> Vec<String> {
        self.state().log.clone()
    }
}

impl Working {
    /// It is done: its answer waits to be sent. False: the one who asked is gone.
    pub(crate) async fn leave(self) -> bool {
        let turn = {
            let mut state = self.turns.state();
            if state.shut.contains(&self.door) {
                return false;
            }
            let key = (self.door.clone(), self.request.clone());
            let nth = state.seen.get(&key).copied().unwrap_or_default();
            let (go, turn) = oneshot::channel();
            state.waiting.push(Turn { what: Waiting { answer: true, door: key.0, request: key.1, nth }, number: self.number, go });
            state.working = state.working.saturating_sub(1);
            turn
        };
        let sent = turn.await.is_ok();
        if !sent {
            // What waits when its door is shut was not counted again.
            self.turns.state().working += 1;
        }
        sent
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        let mut state = self.turns.state();
        state.working = state.working.saturating_sub(1);
    }
}

/// A listener of its own; ends when dropped.
#[derive(Debug)]
pub struct Door {
    pub name: String,
    /// `http://127.0.0.1:PORT/api2/json`
    pub url: String,
    pub(crate) turns: Option<Turns>,
    pub(crate) server: JoinHandle<()>,
}

impl Door {
    /// Nothing more comes in or goes out here: its controller was killed.
    pub fn shut(&self) {
        if let Some(turns) = &self.turns {
            turns.shut(&self.name);
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.server.abort();
    }
}
