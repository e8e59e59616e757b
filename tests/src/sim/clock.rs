//! The simulator's time, and everything that waits: sleeps, locks with a limit, gates that open once.
//!
//! A virtual clock jumps to the next deadline as soon as nothing in the simulator is busy, so that a wait of 30 s costs nothing and
//! still happens in the right order. Busy means: a request or a task is being worked on and is not itself waiting here. What a client
//! does between its requests does not count. A real clock waits for real, by tokio's clock, which a test may have paused.
//!
//! A wait is never cancelled (its future must be polled to its end): the count of the busy would be wrong.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::oneshot;
use tokio::time::Instant;

/// How time passes in the simulator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Time {
    /// Jumps over every wait (tests).
    #[default]
    Virtual,
    /// Passes (demo, by hand).
    Real,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Woken {
    /// The lock was handed over, or the gate opened.
    Granted,
    /// The deadline passed.
    TimedOut,
}

#[derive(Debug, Default)]
struct Lock {
    holders: usize,
    queue: VecDeque<u64>,
}

#[derive(Debug, Default)]
struct State {
    now: Duration,
    busy: usize,
    next_id: u64,
    waiting: HashMap<u64, (Option<Duration>, oneshot::Sender<Woken>)>,
    deadlines: BTreeSet<(Duration, u64)>,
    locks: HashMap<String, Lock>,
}

impl State {
    fn wake(&mut self, id: u64, how: Woken) -> bool {
        let Some((deadline, sender)) = self.waiting.remove(&id) else { return false };
        if let Some(deadline) = deadline {
            self.deadlines.remove(&(deadline, id));
        }
        self.busy += 1;
        if sender.send(how).is_err() {
            self.busy = self.busy.saturating_sub(1);
            return false;
        }
        true
    }

    /// Jumps to the next deadline when nothing is busy.
    fn settle(&mut self) {
        while self.busy == 0 {
            let Some((deadline, id)) = self.deadlines.first().copied() else { return };
            self.now = self.now.max(deadline);
            for lock in self.locks.values_mut() {
                lock.queue.retain(|waiter| *waiter != id);
            }
            self.wake(id, Woken::TimedOut);
        }
    }
}

#[derive(Debug)]
struct Inner {
    time: Time,
    started: Instant,
    epoch: Duration,
    state: Mutex<State>,
}

/// The clock; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Clock(Arc<Inner>);

/// Opens once; whoever waits for it goes on.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gate(Arc<Mutex<GateState>>);

#[derive(Debug, Default)]
struct GateState {
    open: bool,
    waiters: Vec<u64>,
}

/// Work is going on: the virtual clock stands still until this is dropped.
#[derive(Debug)]
pub struct Busy(Clock);

/// A held lock; released when dropped.
#[derive(Debug)]
pub struct Held {
    clock: Clock,
    key: String,
}

fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Clock {
    pub(crate) fn new(time: Time) -> Clock {
        Clock::since(time, SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
    }

    /// A clock that shows that long after 1970 now.
    pub(crate) fn since(time: Time, epoch: Duration) -> Clock {
        Clock(Arc::new(Inner { time, started: Instant::now(), epoch, state: Mutex::default() }))
    }

    /// Since the simulator started.
    pub(crate) fn elapsed(&self) -> Duration {
        match self.0.time {
            Time::Virtual => guard(&self.0.state).now,
            Time::Real => self.0.started.elapsed(),
        }
    }

    /// Seconds since 1970.
    pub(crate) fn unix_seconds(&self) -> u64 {
        (self.0.epoch + self.elapsed()).as_secs()
    }

    /// Lets virtual time pass while nothing waits for it (a ticket grows old).
    pub(crate) fn advance(&self, by: Duration) {
        guard(&self.0.state).now += by;
    }

    /// Nothing is worked on, and nothing waits for its time.
    pub(crate) fn is_idle(&self) -> bool {
        let state = guard(&self.0.state);
        state.busy == 0 && state.waiting.is_empty()
    }

    pub(crate) fn busy(&self) -> Busy {
        guard(&self.0.state).busy += 1;
        Busy(self.clone())
    }

    pub(crate) async fn sleep(&self, duration: Duration) {
        if !duration.is_zero() {
            self.wait(Some(duration), |_, _| ()).await;
        }
    }

    /// Takes a place of the lock `key`, which has `places`; `None` after `limit`.
    pub(crate) async fn lock(&self, key: &str, places: usize, limit: Option<Duration>) -> Option<Held> {
        if let Some(held) = self.try_lock(key, places) {
            return Some(held);
        }
        let woken = self.wait(limit, |state, id| state.locks.entry(key.to_owned()).or_default().queue.push_back(id)).await;
        (woken == Woken::Granted).then(|| Held { clock: self.clone(), key: key.to_owned() })
    }

    pub(crate) fn try_lock(&self, key: &str, places: usize) -> Option<Held> {
        let mut state = guard(&self.0.state);
        let lock = state.locks.entry(key.to_owned()).or_default();
        if lock.holders >= places {
            return None;
        }
        lock.holders += 1;
        Some(Held { clock: self.clone(), key: key.to_owned() })
    }

    /// Waits until the gate opens: false after `limit`.
    pub(crate) async fn pass(&self, gate: &Gate, limit: Option<Duration>) -> bool {
        let mut open = false;
        let wait = {
            let mut state = guard(&gate.0);
            if state.open {
                open = true;
                None
            } else {
                Some(self.enter_wait(limit, |_, id| state.waiters.push(id)))
            }
        };
        match wait {
            Some(wait) => self.finish_wait(wait).await == Woken::Granted,
            None => open,
        }
    }

    pub(crate) fn open(&self, gate: &Gate) {
        let waiters = {
            let mut state = guard(&gate.0);
            state.open = true;
            std::mem::take(&mut state.waiters)
        };
        let mut state = guard(&self.0.state);
        for id in waiters {
            state.wake(id, Woken::Granted);
        }
    }

    async fn wait(&self, limit: Option<Duration>, register: impl FnOnce(&mut State, u64)) -> Woken {
        let wait = self.enter_wait(limit, register);
        self.finish_wait(wait).await
    }

    fn enter_wait(&self, limit: Option<Duration>, register: impl FnOnce(&mut State, u64)) -> Wait {
        let (sender, receiver) = oneshot::channel();
        let mut state = guard(&self.0.state);
        let id = state.next_id;
        state.next_id += 1;
        let virtually = self.0.time == Time::Virtual;
        let deadline = limit.filter(|_| virtually).map(|limit| state.now + limit);
        state.waiting.insert(id, (deadline, sender));
        register(&mut state, id);
        state.busy = state.busy.saturating_sub(1);
        if let Some(deadline) = deadline {
            state.deadlines.insert((deadline, id));
        }
        if virtually {
            state.settle();
        }
        Wait { id, receiver, real: limit.filter(|_| !virtually) }
    }

    async fn finish_wait(&self, mut wait: Wait) -> Woken {
        let Some(limit) = wait.real else { return wait.receiver.await.unwrap_or(Woken::TimedOut) };
        if let Ok(woken) = tokio::time::timeout(limit, &mut wait.receiver).await {
            return woken.unwrap_or(Woken::TimedOut);
        }
        let mut state = guard(&self.0.state);
        if state.waiting.remove(&wait.id).is_none() {
            return wait.receiver.try_recv().unwrap_or(Woken::Granted);
        }
        for lock in state.locks.values_mut() {
            lock.queue.retain(|waiter| *waiter != wait.id);
        }
        state.busy += 1;
        Woken::TimedOut
    }
}

struct Wait {
    id: u64,
    receiver: oneshot::Receiver<Woken>,
    real: Option<Duration>,
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut state = guard(&self.0.0.state);
        state.busy = state.busy.saturating_sub(1);
        if self.0.0.time == Time::Virtual {
            state.settle();
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut state = guard(&self.clock.0.state);
        loop {
            let next = state.locks.get_mut(&self.key).and_then(|lock| lock.queue.pop_front());
            match next {
                Some(next) if state.wake(next, Woken::Granted) => return,
                Some(_) => {}
                None => break,
            }
        }
        if let Some(lock) = state.locks.get_mut(&self.key) {
            lock.holders = lock.holders.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn long_waits_cost_nothing_and_keep_their_order() {
        let clock = Clock::new(Time::Virtual);
        let held = clock.try_lock("vm", 1).unwrap();
        let waiter = clock.clone();
        let busy = clock.busy();
        let first = tokio::spawn(async move {
            let _busy = busy;
            waiter.lock("vm", 1, Some(Duration::from_secs(10))).await.is_some()
        });
        assert!(!first.await.unwrap(), "the lock is held: 10 s pass, then it is refused");
        assert_eq!(clock.elapsed(), Duration::from_secs(10));
        drop(held);
        assert!(clock.lock("vm", 1, Some(Duration::from_secs(10))).await.is_some());
    }

    #[tokio::test]
    async fn a_released_lock_goes_to_the_first_in_line() {
        let clock = Clock::new(Time::Virtual);
        let holder = clock.clone();
        let (busy, other) = (clock.busy(), clock.busy());
        let held = clock.try_lock("vm", 1).unwrap();
        let work = tokio::spawn(async move {
            let _busy = busy;
            holder.sleep(Duration::from_secs(9)).await;
            drop(held);
        });
        let waiter = clock.clone();
        let next = tokio::spawn(async move {
            let _busy = other;
            waiter.lock("vm", 1, Some(Duration::from_secs(10))).await.map(|_| waiter.elapsed())
        });
        work.await.unwrap();
        assert_eq!(next.await.unwrap(), Some(Duration::from_secs(9)));
    }
}
