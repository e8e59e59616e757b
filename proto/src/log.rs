//! The log: one line per event on standard error, `LEVEL what happened`. The container runtime adds the time.
//!
//! No request is ever printed here, so no secret can be.

use std::fmt;
use std::io::Write;
use std::sync::atomic::{AtomicU8, Ordering};

/// How much is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Something failed.
    Error = 1,
    /// Something needs a person's eye.
    Warn = 2,
    /// What was done.
    Info = 3,
    /// Each call and each step.
    Debug = 4,
}

static LEVEL: AtomicU8 = AtomicU8::new(Level::Info as u8);

/// Sets the level from `LOG_LEVEL`: a word (`error`, `warn`, `info`, `debug`) or klog's number (0–3 info, 4 and up debug).
///
/// An unknown word is an error that lists the known ones.
pub fn set_level(given: &str) -> Result<(), String> {
    let level = match given.trim().to_ascii_lowercase().as_str() {
        "error" => Level::Error,
        "warn" | "warning" => Level::Warn,
        "info" | "" => Level::Info,
        "debug" | "trace" => Level::Debug,
        other => match other.parse::<u8>() {
            Ok(0..=3) => Level::Info,
            Ok(_) => Level::Debug,
            Err(_) => return Err(format!("log level {given:?} is none of error, warn, info, debug, or a number as klog's -v")),
        },
    };
    LEVEL.store(level as u8, Ordering::Relaxed);
    Ok(())
}

/// Writes one line, if the level is on. A log that cannot be written is no reason to stop.
pub fn line(level: Level, what: fmt::Arguments<'_>) {
    if level as u8 > LEVEL.load(Ordering::Relaxed) {
        return;
    }
    let name = match level {
        Level::Error => "ERROR",
        Level::Warn => "WARN",
        Level::Info => "INFO",
        Level::Debug => "DEBUG",
    };
    // One write, so that lines of parallel calls do not mix; a newline inside would forge a second line.
    let text = format!("{name} {}\n", what.to_string().replace('\n', " | "));
    if cfg!(debug_assertions) {
        // Seen by the test runner's capture. It panics where nobody reads any more, which a release must not.
        eprint!("{text}");
    } else {
        let _ = std::io::stderr().lock().write_all(text.as_bytes());
    }
}

/// `error!("…")`: something failed.
#[macro_export]
macro_rules! error { ($($what:tt)*) => { $crate::log::line($crate::log::Level::Error, format_args!($($what)*)) } }
/// `warn!("…")`: something needs a person's eye.
#[macro_export]
macro_rules! warn { ($($what:tt)*) => { $crate::log::line($crate::log::Level::Warn, format_args!($($what)*)) } }
/// `info!("…")`: what was done.
#[macro_export]
macro_rules! info { ($($what:tt)*) => { $crate::log::line($crate::log::Level::Info, format_args!($($what)*)) } }
/// `debug!("…")`: each call and each step.
#[macro_export]
macro_rules! debug { ($($what:tt)*) => { $crate::log::line($crate::log::Level::Debug, format_args!($($what)*)) } }

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_klog_numbers_are_levels() {
        for given in ["info", "WARN", "error", "debug", "0", "5", ""] {
            assert!(set_level(given).is_ok(), "{given}");
        }
        let refused = set_level("loud").unwrap_err();
        assert!(refused.contains("loud") && refused.contains("debug"), "{refused}");
        set_level("info").unwrap();
    }
}
