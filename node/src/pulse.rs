//! When a thread last did something: who waits for its place can tell one that works for long from one whose disk does not answer.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

thread_local! {
    static OURS: RefCell<Option<Pulse>> = const { RefCell::new(None) };
}

/// Of one thread, seen by others.
#[derive(Debug, Clone)]
pub(crate) struct Pulse(Arc<Mutex<Instant>>);

impl Pulse {
    /// From now on this thread's, until the next.
    pub(crate) fn begin() -> Self {
        let pulse = Self(Arc::new(Mutex::new(Instant::now())));
        OURS.set(Some(pulse.clone()));
        pulse
    }

    /// For how long nothing has been done.
    pub(crate) fn idle(&self) -> Duration {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }
}

/// This thread has done something: a read, a write.
pub(crate) fn beat() {
    OURS.with_borrow(|ours| {
        if let Some(Pulse(last)) = ours {
            *last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        }
    });
}
