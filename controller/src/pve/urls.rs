//! The addresses of one cluster: any of its nodes answers for all. One is used until it does not answer; then all are asked at
//! the same time, and the first that answers is used from there on.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Mutex as AsyncMutex;
use tokio::time::Instant;

/// A node that takes longer to accept, TLS included, is not used where there are others.
pub(super) const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// The same for a page that needs no work. With [`LOOK_AFTER`] it makes the 3 s that a dead node costs.
pub(super) const LOOK_LIMIT: Duration = Duration::from_secs(2);
/// A read that is not answered after this long: does its node still answer at all? A list of a big cluster takes half a second.
pub(super) const LOOK_AFTER: Duration = Duration::from_secs(1);
/// The same of a write: Proxmox may work on it for ten seconds, and who gives up must look later what became of it.
pub(super) const LOOK_AFTER_WRITE: Duration = Duration::from_secs(5);
/// It does: between two such looks.
pub(super) const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// None answered: for so long, calls are told without another look.
const NONE_AGE: Duration = Duration::from_secs(2);

/// A node that has lost the others is asked only where no other one answers, for so long.
const LEFT_AGE: Duration = Duration::from_secs(30);

/// Which of the addresses is used.
#[derive(Debug, Default)]
pub(super) struct Urls {
    pub(super) all: Vec<String>,
    state: Mutex<State>,
    /// Held by the one who asks them all.
    pub(super) looking: AsyncMutex<()>,
}

#[derive(Debug, Default)]
struct State {
    current: Option<usize>,
    /// None answered: when that was seen, and why, in one sentence.
    none: Option<(Instant, String)>,
    /// Those whose node had no quorum, and when that was seen.
    left: BTreeMap<usize, Instant>,
}

impl Urls {
    pub(super) fn new(all: Vec<String>) -> Self {
        // With one there is nothing to choose.
        let current = (all.len() == 1).then_some(0);
        Self { all, state: Mutex::new(State { current, ..State::default() }), looking: AsyncMutex::default() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn are_several(&self) -> bool {
        self.all.len() > 1
    }

    pub(super) fn at(&self, index: usize) -> &str {
        self.all.get(index).map(String::as_str).unwrap_or_default()
    }

    /// The one in use.
    pub(super) fn current(&self) -> Option<usize> {
        self.state().current
    }

    /// It answers.
    pub(super) fn note_alive(&self, index: usize) {
        let mut state = self.state();
        (state.current, state.none) = (Some(index), None);
    }

    /// It does not: whether it was in use. A single one stays.
    pub(super) fn note_dead(&self, index: usize) -> bool {
        let mut state = self.state();
        let was_used = self.are_several() && state.current == Some(index);
        if was_used {
            state.current = None;
        }
        was_used
    }

    /// The one in use has no quorum: whether others are asked now. Once in a while: perhaps none has.
    pub(super) fn leave(&self) -> Option<usize> {
        let mut state = self.state();
        let index = state.current.filter(|_| self.are_several())?;
        if state.left.get(&index).is_some_and(|at| at.elapsed() < LEFT_AGE) {
            return None;
        }
        state.left.insert(index, Instant::now());
        state.current = None;
        Some(index)
    }

    pub(super) fn was_left(&self, index: usize) -> bool {
        self.state().left.get(&index).is_some_and(|at| at.elapsed() < LEFT_AGE)
    }

    /// None does; each with its cause. The sentence.
    pub(super) fn note_none(&self, mut causes: Vec<(usize, String)>) -> String {
        causes.sort();
        let causes: Vec<String> = causes.into_iter().map(|(_, why)| why).collect();
        let why = format!("none of the {} urls answers: {}", self.all.len(), causes.join("; "));
        self.state().none = Some((Instant::now(), why.clone()));
        why
    }

    /// That none does, where it was seen since `since` or just now.
    pub(super) fn none(&self, since: Instant) -> Option<String> {
        let state = self.state();
        let (at, why) = state.none.as_ref()?;
        (*at >= since || at.elapsed() < NONE_AGE).then(|| why.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_used_until_it_is_dead() {
        let urls = Urls::new(vec!["a".into(), "b".into()]);
        assert_eq!(urls.current(), None);
        urls.note_alive(1);
        assert!(!urls.note_dead(0));
        assert_eq!((urls.current(), urls.at(1)), (Some(1), "b"));
        assert!(urls.note_dead(1) && !urls.note_dead(1));
        assert_eq!(urls.current(), None);
        let begun = Instant::now();
        assert_eq!(urls.none(begun), None);
        assert_eq!(urls.note_none(vec![(1, "b y".into()), (0, "a x".into())]), "none of the 2 urls answers: a x; b y");
        assert!(urls.none(begun).is_some());
        urls.note_alive(0);
        assert_eq!(urls.none(begun), None);
        // Isolated: left once, and used again where the other one is no better.
        assert_eq!(urls.leave(), Some(0));
        assert!(urls.current().is_none() && urls.was_left(0) && !urls.was_left(1));
        urls.note_alive(0);
        assert_eq!(urls.leave(), None);
        let single = Urls::new(vec!["a".into()]);
        assert_eq!(single.leave(), None);
        assert!(!single.note_dead(0));
        assert_eq!(single.current(), Some(0));
    }
}
