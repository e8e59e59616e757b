//! When a thread last did something: who waits for its place can tell one that works for long from one whose disk does not answer.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

thread_local! {
    static OURS: RefCell<Option<Pulse>> = const { RefCell::new(None) };
}

/// Of one thread, seen by others: when it last did something, and how much longer than others what it does now may take.
#[derive(Debug, Clone)]
pub(crate) struct Pulse(Arc<Mutex<(Instant, Duration)>>);

impl Pulse {
    /// From now on this thread's, until the next.
    pub(crate) fn begin() -> Self {
        let pulse = Self(Arc::new(Mutex::new((Instant::now(), Duration::ZERO))));
        OURS.set(Some(pulse.clone()));
        pulse
    }

    /// For how long nothing has been done, and what is left of that limit for it.
    pub(crate) fn idle(&self, limit: Duration) -> (Duration, Duration) {
        let (last, more) = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = last.elapsed();
        (idle, limit.saturating_add(more).saturating_sub(idle))
    }
}

/// This thread has done something: a read, a write.
pub(crate) fn beat() {
    granted(Duration::ZERO);
}

/// It begins something now that may take so much longer than a read or a write.
pub(crate) fn granted(more: Duration) {
    OURS.with_borrow(|ours| {
        if let Some(Pulse(last)) = ours {
            *last.lock().unwrap_or_else(PoisonError::into_inner) = (Instant::now(), more);
        }
    });
}
