//! What a call is at, for those who wait for it. A call may wait in the kernel for a disk that answers no more; nothing ends such a wait, so its
//! thread stays behind, and others have to be told.

use std::cell::RefCell;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// The step that waits for no disk; see `Deriving`.
const DERIVE: &str = "derive a key";

thread_local! {
    static OURS: RefCell<Option<Progress>> = const { RefCell::new(None) };
}

/// A call's, shared between its thread and those who wait for it.
#[derive(Debug, Clone)]
pub struct Progress {
    doing: &'static str,
    begun: Instant,
    at: Arc<Mutex<(&'static str, Instant)>>,
}

impl Progress {
    /// `doing`: the call in a word.
    #[must_use]
    pub fn begin(doing: &'static str) -> Self {
        let begun = Instant::now();
        Self { doing, begun, at: Arc::new(Mutex::new(("look", begun))) }
    }

    /// From here on this thread does that call.
    pub fn take_over(&self) {
        OURS.set(Some(self.clone()));
    }

    /// Whether it waits for a key, and not for a disk.
    #[must_use]
    pub fn is_deriving(&self) -> bool {
        self.at.lock().unwrap_or_else(PoisonError::into_inner).0 == DERIVE
    }

    /// For how long it has gone on, in seconds.
    #[must_use]
    pub fn seconds(&self) -> u64 {
        self.begun.elapsed().as_secs()
    }
}

/// `unstage, at "unmount" for 97 s`
impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (step, since) = *self.at.lock().unwrap_or_else(PoisonError::into_inner);
        write!(f, "{}, at {step:?} for {} s", self.doing, since.elapsed().as_secs())
    }
}

/// This thread's call comes to that step.
pub(super) fn at(step: &'static str) {
    come_to(step);
}

/// The step before.
fn come_to(step: &'static str) -> &'static str {
    OURS.with_borrow(|ours| match ours {
        Some(ours) => std::mem::replace(&mut *ours.at.lock().unwrap_or_else(PoisonError::into_inner), (step, Instant::now())).0,
        None => "",
    })
}

/// This thread's call derives a key, or waits for its turn; until this is dropped, then it is at the step again that it was at.
pub(super) struct Deriving(&'static str);

impl Deriving {
    pub(super) fn begin() -> Self {
        Self(come_to(DERIVE))
    }
}

impl Drop for Deriving {
    fn drop(&mut self) {
        at(self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_says_what_it_is_at() {
        let progress = Progress::begin("unstage");
        let on_its_thread = progress.clone();
        std::thread::spawn(move || {
            on_its_thread.take_over();
            at("unmount");
        })
        .join()
        .unwrap();
        // Somebody else's.
        at("probe");
        assert_eq!(progress.to_string(), "unstage, at \"unmount\" for 0 s");
    }

    #[test]
    fn deriving_a_key_is_a_step_within_another() {
        let progress = Progress::begin("stage");
        let on_its_thread = progress.clone();
        std::thread::spawn(move || {
            on_its_thread.take_over();
            at("open the LUKS volume");
            let deriving = Deriving::begin();
            assert!(on_its_thread.is_deriving());
            drop(deriving);
            assert!(!on_its_thread.is_deriving());
        })
        .join()
        .unwrap();
        assert_eq!(progress.to_string(), "stage, at \"open the LUKS volume\" for 0 s");
    }
}
