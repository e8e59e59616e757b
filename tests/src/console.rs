//! What a guest's console or a program's log says: kept, searched for the lines that mean death, quoted in every error.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use guest_init::{FAILURE, SUCCESS};

/// Lines after which nothing that the guest says counts. The kernel is told to panic on an oops and on a hung task.
const FATAL: [&str; 6] = ["Kernel panic", "BUG:", "Oops:", "INFO: task ", "rcu_sched self-detected stall", "Out of memory: Killed process"];
/// What an error quotes of the log.
const TAIL_LINES: usize = 25;

#[derive(Debug, Default)]
struct State {
    lines: Vec<String>,
    fatal: Option<String>,
    closed: bool,
}

/// Only the kernel's own lines count: a program's (`[label] …`) may quote anything.
fn is_fatal(line: &str) -> bool {
    let of_a_program = line.starts_with('[') && !line.starts_with("[ ");
    !of_a_program && FATAL.iter().any(|mark| line.contains(mark))
}

/// Cheap to clone; ends when the process does.
#[derive(Debug, Clone, Default)]
pub(crate) struct Console {
    shared: Arc<(Mutex<State>, Condvar)>,
}

impl Console {
    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads until the process closes it; copies it to `log`.
    pub(crate) fn follow(&self, console: impl Read, log: &Path) -> std::io::Result<()> {
        let mut log = File::create(log)?;
        let mut console = BufReader::new(console);
        let mut line = Vec::new();
        while matches!(console.read_until(b'\n', &mut line), Ok(1..)) {
            log.write_all(&line)?;
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            let mut state = self.state();
            if state.fatal.is_none() && is_fatal(&text) {
                state.fatal = Some(text.clone());
            }
            state.lines.push(text);
            self.shared.1.notify_all();
            line.clear();
        }
        self.state().closed = true;
        self.shared.1.notify_all();
        Ok(())
    }

    /// An error when the guest is dead: says of what.
    pub(crate) fn alive(&self) -> Result<()> {
        let state = self.state();
        ensure!(state.fatal.is_none(), "the guest died: {}", state.fatal.as_deref().unwrap_or_default());
        ensure!(!state.closed, "it has ended");
        Ok(())
    }

    /// The line that said that the guest is dead.
    pub(crate) fn fatal(&self) -> Option<String> {
        self.state().fatal.clone()
    }

    pub(crate) fn tail(&self) -> String {
        let state = self.state();
        let from = state.lines.len().saturating_sub(TAIL_LINES);
        let tail = state.lines.get(from..).unwrap_or_default();
        format!("the last {} lines:\n    {}", tail.len(), tail.join("\n    "))
    }

    /// Waits for a line that contains `text`.
    pub(crate) fn wait_for(&self, text: &str, limit: Duration) -> Result<()> {
        let waiting = |state: &mut State| !state.closed && !state.lines.iter().any(|line| line.contains(text));
        let (state, _) = self.shared.1.wait_timeout_while(self.state(), limit, waiting).unwrap_or_else(PoisonError::into_inner);
        let seen = state.lines.iter().any(|line| line.contains(text));
        drop(state);
        ensure!(seen, "no line {text:?} within {} s; {}", limit.as_secs(), self.tail());
        Ok(())
    }

    /// Waits for QEMU's end, and for the one verdict line that says success.
    pub(crate) fn verdict(&self, limit: Duration) -> Result<()> {
        let (state, _) =
            self.shared.1.wait_timeout_while(self.state(), limit, |state| !state.closed).unwrap_or_else(PoisonError::into_inner);
        let verdicts: Vec<&String> = state.lines.iter().filter(|line| line.starts_with(SUCCESS) || line.starts_with(FAILURE)).collect();
        let result = match (state.closed, verdicts.as_slice()) {
            (true, [verdict]) if *verdict == SUCCESS => Ok(()),
            (closed, verdicts) => Err(format!("verdict lines {verdicts:?} (one that says success is right), QEMU ended: {closed}")),
        };
        drop(state);
        result.map_err(anyhow::Error::msg).with_context(|| self.tail())?;
        self.state().fatal.as_ref().map_or(Ok(()), |fatal| Err(anyhow::anyhow!("the guest died: {fatal}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console(text: &str) -> Console {
        let console = Console::default();
        console.follow(text.as_bytes(), Path::new("/dev/null")).unwrap();
        console
    }

    #[test]
    fn one_success_is_the_right_verdict() {
        let limit = Duration::from_secs(1);
        console("boot\nguest-init: success\n").verdict(limit).unwrap();
        assert!(console("boot\n").verdict(limit).is_err());
        assert!(console("guest-init: failure: no eth0\n").verdict(limit).unwrap_err().to_string().contains("no eth0"));
        assert!(console("guest-init: success\nguest-init: success\n").verdict(limit).is_err());
        let oops = "[    5.1] BUG: unable to handle page fault\nguest-init: success\n";
        assert!(console(oops).verdict(limit).unwrap_err().to_string().contains("page fault"));
    }

    #[test]
    fn a_program_may_quote_a_panic() {
        assert_eq!(console("[node] the kernel says: Kernel panic\n").fatal(), None);
        assert!(console("[    2.0] Kernel panic - not syncing\n").fatal().is_some());
        assert!(console("Kernel panic - not syncing\n").alive().is_err());
    }
}
