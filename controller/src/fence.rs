//! Until when this process may write to Proxmox, by its own clock. One fence for all clients of a process, closed for good
//! when the Lease is lost.
//!
//! The clock is monotonic and nobody else's, so that no clock set wrong elsewhere matters. It can stand still while the whole
//! machine is paused: what rests on the fence alone is only that a late write is improbable. That it is harmless rests on
//! Proxmox's digest, on Kubernetes' resourceVersion (see `kube::lease`) and on what the next holder reads and waits for.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::time::Instant;

/// Whether writes may go out. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Fence(Option<Arc<Mutex<State>>>);

#[derive(Debug)]
struct State {
    /// Nothing: closed.
    until: Option<Instant>,
    /// A sentence, for when it is closed.
    why: String,
    /// When the outcome of a write was last not known.
    unknown: Option<Instant>,
}

impl Fence {
    /// A fence that is closed until [`Fence::open_until`]. `Default` is one that is never closed: without a Lease.
    #[must_use]
    pub fn closed(why: &str) -> Self {
        Self(Some(Arc::new(Mutex::new(State { until: None, why: why.into(), unknown: None }))))
    }

    /// Open until then; `why` says what is the case after that.
    pub fn open_until(&self, until: Instant, why: &str) {
        self.set(Some(until), why);
    }

    /// Closed from now on.
    pub fn close(&self, why: &str) {
        self.set(None, why);
    }

    fn set(&self, until: Option<Instant>, why: &str) {
        if let Some(state) = &self.0 {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            (state.until, state.why) = (until, why.into());
        }
    }

    /// The outcome of a write that went out is not known.
    pub fn note_unknown(&self) {
        if let Some(state) = &self.0 {
            state.lock().unwrap_or_else(PoisonError::into_inner).unknown = Some(Instant::now());
        }
    }

    /// When that was the case last.
    #[must_use]
    pub fn last_unknown(&self) -> Option<Instant> {
        self.0.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner).unknown
    }

    /// Whether a write may go out now.
    ///
    /// # Errors
    /// The sentence that says why not.
    pub fn check(&self) -> Result<(), String> {
        let Some(state) = &self.0 else { return Ok(()) };
        let state = state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.until.is_some_and(|until| Instant::now() < until) { Ok(()) } else { Err(state.why.clone()) }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_fence_closes_by_itself_and_when_told() {
        let hour = Duration::from_secs(3600);
        assert!(Fence::default().check().is_ok());
        let fence = Fence::closed("not yet");
        let other = fence.clone();
        assert_eq!(other.check().unwrap_err(), "not yet");
        fence.open_until(Instant::now() + hour, "not renewed");
        assert!(other.check().is_ok());
        fence.open_until(Instant::now(), "not renewed");
        assert_eq!(other.check().unwrap_err(), "not renewed");
        fence.open_until(Instant::now() + hour, "not renewed");
        fence.close("lost");
        assert_eq!(other.check().unwrap_err(), "lost");
        assert!(other.last_unknown().is_none());
        fence.note_unknown();
        assert!(other.last_unknown().is_some());
    }
}
