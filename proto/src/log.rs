//! The log: one line per event on standard error, `LEVEL [call] what happened`, to which the container runtime adds the time; or the same
//! in JSON, with the time.
//!
//! `call` is one RPC: every line that is written for it carries the same number, also those of work that goes on when its caller has left.
//! No request is ever printed here, so no secret can be.

use std::cell::Cell;
use std::fmt;
use std::future::Future;
use std::io::Write;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

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
static IS_JSON: AtomicBool = AtomicBool::new(false);
static LAST_CALL: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// 0: none.
    static CALL: Cell<u64> = const { Cell::new(0) };
}

/// Sets the form from `LOG_FORMAT`: `text` or `json`.
///
/// # Errors
/// Another word.
pub fn set_format(given: &str) -> Result<(), String> {
    let is_json = match given {
        "text" => false,
        "json" => true,
        _ => return Err(format!("log format {given:?} is none of text, json")),
    };
    IS_JSON.store(is_json, Ordering::Relaxed);
    Ok(())
}

/// A number for a call, which no other has, nor one of another start of this process: its first digits are the second of the first call.
#[must_use]
pub fn new_call() -> u64 {
    let first = LAST_CALL.load(Ordering::Relaxed);
    if first == 0 {
        let begun = now().as_secs() << 20;
        let _ = LAST_CALL.compare_exchange(0, begun, Ordering::Relaxed, Ordering::Relaxed);
    }
    LAST_CALL.fetch_add(1, Ordering::Relaxed) + 1
}

fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// The call that this thread works for now; 0: none.
#[must_use]
pub fn call() -> u64 {
    CALL.get()
}

/// This thread works for `call` until the value is dropped.
#[must_use]
#[derive(Debug)]
pub struct Within(u64);

/// Works for `call` from now on.
pub fn enter(call: u64) -> Within {
    Within(CALL.replace(call))
}

impl Drop for Within {
    fn drop(&mut self) {
        CALL.set(self.0);
    }
}

/// A future that works for one call, on whatever thread.
#[derive(Debug)]
pub struct InCall<F> {
    call: u64,
    work: Pin<Box<F>>,
}

impl<F> InCall<F> {
    /// `work` for `call`.
    pub fn new(call: u64, work: F) -> Self {
        Self { call, work: Box::pin(work) }
    }
}

/// `work` for the call that this thread works for: for what is spawned.
pub fn carried<F>(work: F) -> InCall<F> {
    InCall::new(call(), work)
}

impl<F: Future> Future for InCall<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let _within = enter(self.call);
        self.work.as_mut().poll(context)
    }
}

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
    // One write, so that lines of parallel calls do not mix.
    let text = shaped(name, call(), &what.to_string(), IS_JSON.load(Ordering::Relaxed).then(now));
    if cfg!(debug_assertions) {
        // Seen by the test runner's capture. It panics where nobody reads any more, which a release must not.
        eprint!("{text}");
    } else {
        let _ = std::io::stderr().lock().write_all(text.as_bytes());
    }
}

/// `json`: the time, for a line in JSON.
fn shaped(level: &str, call: u64, what: &str, json: Option<Duration>) -> String {
    let Some(time) = json else {
        // A newline inside would forge a second line.
        let what = what.replace('\n', " | ");
        return if call == 0 { format!("{level} {what}\n") } else { format!("{level} [{call:x}] {what}\n") };
    };
    let mut text = format!("{{\"time\":{},\"level\":\"{level}\",", crate::metrics::seconds(time));
    if call != 0 {
        text.push_str(&format!("\"request\":\"{call:x}\","));
    }
    text.push_str("\"message\":\"");
    for character in what.chars() {
        match character {
            '"' | '\\' => text.extend(['\\', character]),
            '\0'..' ' => text.push_str(&format!("\\u{:04x}", u32::from(character))),
            _ => text.push(character),
        }
    }
    text + "\"}\n"
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

    #[test]
    fn a_line_stays_a_line_in_both_forms() {
        assert_eq!(shaped("INFO", 0, "a\nERROR b", None), "INFO a | ERROR b\n");
        assert_eq!(shaped("WARN", 0xab, "c", None), "WARN [ab] c\n");
        let json = shaped("WARN", 0xab, "say \"x\\y\"\n\u{1}ü", Some(Duration::from_millis(1_500)));
        assert_eq!(json, "{\"time\":1.5,\"level\":\"WARN\",\"request\":\"ab\",\"message\":\"say \\\"x\\\\y\\\"\\u000a\\u0001ü\"}\n");
        assert_eq!(shaped("INFO", 0, "", Some(Duration::ZERO)), "{\"time\":0,\"level\":\"INFO\",\"message\":\"\"}\n");
        assert!(set_format("xml").unwrap_err().contains("json"));
    }

    #[tokio::test]
    async fn a_call_keeps_its_number_through_what_it_spawns_and_leaves_none_behind() {
        let (one, two) = (new_call(), new_call());
        assert!(one != two && one >> 20 > 1_700_000_000);
        let work = async {
            tokio::task::yield_now().await;
            let spawned = tokio::spawn(carried(async { call() })).await.unwrap();
            (call(), spawned)
        };
        let (first, second) = tokio::join!(InCall::new(one, work), InCall::new(two, async { call() }));
        assert_eq!((first, second, call()), ((one, one), two, 0));
    }
}
