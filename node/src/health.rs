//! Judges a volume's health from what the kernel counts and says of it.
//!
//! Pure: no I/O, and "now" is an argument. What is wrong is one sentence, with what to do. Nothing is repaired by itself: a mount replays the
//! journal, and what is left after that is for a person (docs/repair.md).

use std::time::Duration;

use crate::sys::Dev;

/// More failed commands than a look at a disk makes by itself (a capacity that changed, a page that QEMU does not have: one each), and fewer
/// than one read that fails: the kernel repeats that five times (`SD_MAX_RETRIES`).
const FAILED_COMMANDS: u64 = 6;
/// What was counted is forgotten after so long without another one: an hour, which is 60 looks of kubelet's.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(3600);

/// What is wrong with a volume, the worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// Its disk has gone from under the mount.
    Gone,
    /// The kernel refuses all I/O to the disk.
    Offline,
    /// The filesystem refuses everything.
    ShutDown,
    /// The kernel has made the filesystem read-only; and how many errors ext4 counts.
    ReadOnly(u64),
    /// ext4 counts so many errors, since the last repair.
    Errors(u64),
    /// So many commands to the disk have failed of late.
    FailedCommands(u64),
}

/// What is seen of a volume that is mounted or shown as a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs, reason = "as Trouble's")]
pub struct Seen {
    pub gone: bool,
    pub offline: bool,
    pub shut_down: bool,
    /// Mounted writable, and read-only now.
    pub made_read_only: bool,
    pub ext4_errors: u64,
    pub failed_commands: u64,
}

/// The worst that is wrong; `None`: no trouble is seen.
#[must_use]
pub fn judge(seen: &Seen) -> Option<Trouble> {
    let Seen { gone, offline, shut_down, made_read_only, ext4_errors, failed_commands } = *seen;
    let all = [
        (gone, Trouble::Gone),
        (offline, Trouble::Offline),
        (shut_down, Trouble::ShutDown),
        (made_read_only, Trouble::ReadOnly(ext4_errors)),
        (ext4_errors > 0, Trouble::Errors(ext4_errors)),
        (failed_commands >= FAILED_COMMANDS, Trouble::FailedCommands(failed_commands)),
    ];
    all.into_iter().find(|(is_so, _)| *is_so).map(|(_, trouble)| trouble)
}

impl Trouble {
    /// In one sentence, with what to do. `what`: the filesystem's kind, `disk` without one; `device`: by its names.
    #[must_use]
    pub fn sentence(self, what: &str, device: &str) -> String {
        let counted = |errors: u64| if errors == 0 { String::new() } else { format!(" after {errors} errors") };
        let (happened, then) = match self {
            Self::Gone => ("is no longer there, and what was not written is lost".into(), "delete the pod: its volume is attached anew"),
            Self::Offline => ("is offline: every read and write fails".into(), "delete the pod: staging the volume sets its disk running"),
            Self::ShutDown => ("has shut itself down: every access fails".into(), "delete the pod: the next mount replays the journal"),
            Self::ReadOnly(errors) => {
                (format!("was made read-only by the kernel{}", counted(errors)), "stop the pod and repair it, see docs/repair.md")
            }
            Self::Errors(errors) => {
                (format!("has {errors} errors by the kernel's count"), "save the data, stop the pod and repair it, see docs/repair.md")
            }
            Self::FailedCommands(commands) => {
                (format!("has failed {commands} commands of late"), "look at the storage on Proxmox, and into the kernel's log")
            }
        };
        format!("the {what} on {device} {happened}; {then}")
    }
}

/// Failed commands of one disk, over time. The kernel's count (`ioerr_cnt`) is of all commands that did not end well since the disk came, the
/// harmless ones of its first moments included: what matters is its growth while the volume is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Commands {
    dev: Dev,
    forgotten: u64,
    failed: u64,
    changed: Duration,
}

impl Commands {
    /// Since now. `failed`: the kernel's count; `now`: since any fixed moment.
    #[must_use]
    pub const fn begin(dev: Dev, failed: u64, now: Duration) -> Self {
        Self { dev, forgotten: failed, failed, changed: now }
    }

    /// With the count of now; how many have failed of late.
    pub fn look(&mut self, dev: Dev, failed: u64, now: Duration) -> u64 {
        if dev != self.dev || failed < self.failed {
            *self = Self::begin(dev, failed, now);
        } else if failed > self.failed {
            (self.failed, self.changed) = (failed, now);
        } else if now.saturating_sub(self.changed) >= FORGOTTEN_AFTER {
            self.forgotten = failed;
        }
        self.failed - self.forgotten
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEV: Dev = Dev { major: 8, minor: 16 };

    #[test]
    fn the_worst_is_said_in_one_sentence_with_what_to_do() {
        let mut seen = Seen { failed_commands: FAILED_COMMANDS, ..Seen::default() };
        let mut said = Vec::new();
        let worse: [fn(&mut Seen); 6] = [
            |_| (),
            |seen| seen.ext4_errors = 3,
            |seen| seen.made_read_only = true,
            |seen| seen.shut_down = true,
            |seen| seen.offline = true,
            |seen| seen.gone = true,
        ];
        for change in worse {
            change(&mut seen);
            said.push(judge(&seen).unwrap().sentence("ext4", "sdb"));
        }
        for (sentence, word) in
            said.iter().zip(["6 commands", "3 errors", "read-only by the kernel after 3", "shut itself", "offline", "lost"])
        {
            assert!(sentence.contains(word) && sentence.starts_with("the ext4 on sdb ") && sentence.contains("; "), "{sentence}");
            assert!(!sentence.contains(". ") && !sentence.ends_with('.'), "one sentence: {sentence}");
        }
        assert_eq!(judge(&Seen::default()), None);
        assert_eq!(judge(&Seen { failed_commands: FAILED_COMMANDS - 1, ..Seen::default() }), None);
    }

    #[test]
    fn failed_commands_count_while_they_go_on_and_for_an_hour_after() {
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        let mut commands = Commands::begin(DEV, 5, minutes(0));
        assert_eq!(commands.look(DEV, 5, minutes(1)), 0, "what was counted before is of the attach");
        assert_eq!(commands.look(DEV, 9, minutes(2)), 4);
        assert_eq!(commands.look(DEV, 12, minutes(61)), 7);
        assert_eq!(commands.look(DEV, 12, minutes(120)), 7);
        assert_eq!(commands.look(DEV, 12, minutes(121)), 0, "an hour without another");
        assert_eq!(commands.look(DEV, 14, minutes(122)), 2);
        assert_eq!(commands.look(DEV, 3, minutes(123)), 0, "counted anew");
        assert_eq!(commands.look(Dev { major: 8, minor: 32 }, 100, minutes(124)), 0, "another disk");
    }
}
