//! What no kernel tells, and the next agent has to know: of which volumes something is so. By their serials, one a line, in a file beside the
//! socket, where it outlives the agent and goes with the driver.

use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{identity, sys};

/// As many as may be staged, and some history.
pub(super) const MAX_KEPT: usize = 256;
/// Of the file: a serial has 20 bytes and its line's end; and the line of `?`.
const MAX_KEPT_BYTES: u64 = 21 * MAX_KEPT as u64 + 2;
/// A line that says: of others it may be so, too.
const NOT_ALL: &str = "?";

/// Volumes of which one thing is so.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// `None`: they are forgotten when the agent ends.
    path: Option<PathBuf>,
    list: Mutex<List>,
}

#[derive(Debug, Default)]
struct List {
    serials: Vec<String>,
    /// There may be more of them: nobody has written them down, or what was written cannot be read.
    is_partial: bool,
}

impl Kept {
    /// With what an agent before this one has written down there. `what`: what they are, for the log.
    pub(super) fn at(path: PathBuf, what: &str) -> Self {
        let (text, is_there) = match sys::read_at_most(&path, MAX_KEPT_BYTES) {
            Ok(text) => (text, true),
            Err(cause) => {
                if cause.kind() != io::ErrorKind::NotFound {
                    proto::warn!("{what} are not known: {}: {cause}", path.display());
                }
                (String::new(), false)
            }
        };
        let is_whole = is_there && (text.len() as u64) < MAX_KEPT_BYTES;
        let is_partial = !is_whole || text.lines().any(|line| line == NOT_ALL);
        let serials = text.lines().filter(|line| line.starts_with(identity::OUR_SERIALS)).take(MAX_KEPT).map(str::to_owned).collect();
        Self { path: Some(path), list: Mutex::new(List { serials, is_partial }) }
    }

    fn list(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn contains(&self, serial: &str) -> bool {
        self.list().serials.iter().any(|kept| kept == serial)
    }

    /// How many there are; `None`: nobody knows.
    pub(super) fn count(&self) -> Option<usize> {
        let list = self.list();
        (!list.is_partial).then_some(list.serials.len())
    }

    /// Whether it is so of that volume from now on. `what`: for the log, where it could not be written down.
    pub(super) fn set(&self, serial: &str, is_so: bool, what: &str) {
        let mut list = self.list();
        if list.serials.iter().any(|kept| kept == serial) == is_so {
            return;
        }
        list.serials.retain(|kept| kept != serial);
        match is_so {
            true if list.serials.len() < MAX_KEPT => list.serials.push(serial.to_owned()),
            is_left_out => list.is_partial |= is_left_out,
        }
        self.write(&list, what);
    }

    /// It can be so of these volumes only: of all others it is forgotten. None at all: then what was not written down is known, too.
    pub(super) fn keep_only(&self, these: &[&str], what: &str) {
        let mut list = self.list();
        list.serials.retain(|kept| these.contains(&kept.as_str()));
        list.is_partial &= !these.is_empty();
        self.write(&list, what);
    }

    fn write(&self, list: &List, what: &str) {
        let Some(path) = &self.path else { return };
        let new = path.with_extension("new");
        let mut lines = list.serials.join("\n");
        if list.is_partial {
            lines = format!("{NOT_ALL}\n{lines}");
        }
        // At once whole: who reads it finds the old or the new one.
        if let Err(cause) = std::fs::write(&new, lines).and_then(|()| std::fs::rename(&new, path)) {
            proto::warn!("{what} are forgotten when the agent ends: {}: {cause}", path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Folder;

    #[test]
    fn what_is_kept_is_known_to_the_next_agent_and_what_may_be_missing_is_said() {
        let folder = Folder::new();
        let agent = || Kept::at(folder.path().join("list"), "they");
        let first = agent();
        assert_eq!(first.count(), None, "whoever was here before has written nothing down");
        first.set("csi-1", true, "they");
        assert_eq!((agent().count(), agent().contains("csi-1")), (None, true), "there may be others still");
        let second = agent();
        second.keep_only(&["csi-1", "csi-2"], "they");
        assert_eq!(second.count(), None);
        second.keep_only(&[], "they");
        assert_eq!((second.count(), agent().count()), (Some(0), Some(0)), "none that it could be so of");
        second.set("csi-1", true, "they");
        second.set("csi-2", true, "they");
        second.set("csi-2", true, "they");
        assert_eq!(agent().count(), Some(2));
        let third = agent();
        third.keep_only(&["csi-2", "csi-3"], "they");
        assert_eq!((third.count(), agent().contains("csi-1"), agent().contains("csi-2")), (Some(1), false, true));
        third.set("csi-2", false, "they");
        assert_eq!(agent().count(), Some(0));
        // Nothing is read from a folder, and nothing written.
        let unreadable = Kept::at(folder.path().into(), "they");
        assert_eq!(unreadable.count(), None);
        unreadable.set("csi-1", true, "they");
        assert!(unreadable.contains("csi-1"), "this agent knows it all the same");
    }
}
