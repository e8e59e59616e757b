//! Numbers for Prometheus, in its text format 0.0.4: counters that live as long as the process, and the time of each RPC.
//!
//! Counted always, which costs nothing to speak of; shown only where an address was given ([`crate::health`]).

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tonic::Code;

/// Sets of labels that are told apart in one histogram: a service has at most 20 RPCs with some codes each, the controller some 25 endpoints,
/// and no client can make us remember more.
const MAX_SERIES: usize = 256;
/// Upper bounds in milliseconds: a call that finds all done, a mount, a format, a wait for a disk, kubelet's patience.
const BUCKETS_MS: [u64; 7] = [10, 100, 500, 2_000, 10_000, 30_000, 120_000];

/// A number that only grows.
#[derive(Debug)]
pub struct Counter {
    name: &'static str,
    help: &'static str,
    value: AtomicU64,
}

impl Counter {
    /// `name` as Prometheus wants it, with `_total` at its end.
    #[must_use]
    pub const fn new(name: &'static str, help: &'static str) -> Self {
        Self { name, help, value: AtomicU64::new(0) }
    }

    /// One more.
    pub fn add(&self) {
        self.value.fetch_add(1, Ordering::Relaxed);
    }

    /// How many.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.value.load(Ordering::Relaxed)
    }

    /// Appends it to `page`.
    pub fn write(&self, page: &mut String) {
        head(page, self.name, "counter", self.help);
        line(page, self.name, &[], self.value());
    }
}

/// Appends a number that was looked up just now.
pub fn gauge(page: &mut String, name: &str, help: &str, value: impl Display) {
    head(page, name, "gauge", help);
    line(page, name, &[], value);
}

/// Appends a fact: a gauge that is always 1, with labels that say it.
pub fn fact(page: &mut String, name: &str, help: &str, labels: &[(&str, &str)]) {
    head(page, name, "gauge", help);
    line(page, name, labels, 1);
}

fn head(page: &mut String, name: &str, kind: &str, help: &str) {
    let _ = write!(page, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
}

fn line(page: &mut String, name: &str, labels: &[(&str, &str)], value: impl Display) {
    page.push_str(name);
    for (index, (label, text)) in labels.iter().enumerate() {
        page.push(if index == 0 { '{' } else { ',' });
        let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let _ = write!(page, "{label}=\"{text}\"");
    }
    let _ = writeln!(page, "{} {value}", if labels.is_empty() { "" } else { "}" });
}

/// Appends a number of several things, each by its labels.
pub fn gauges<'a, const N: usize, V: Display>(
    page: &mut String,
    name: &str,
    help: &str,
    samples: impl IntoIterator<Item = ([(&'a str, &'a str); N], V)>,
) {
    head(page, name, "gauge", help);
    for (labels, value) in samples {
        line(page, name, &labels, value);
    }
}

/// What one kind of call took.
#[derive(Debug, Default)]
struct Took {
    /// Calls within each bound, and not within the one before.
    buckets: [u64; BUCKETS_MS.len()],
    count: u64,
    sum: Duration,
}

/// Times by labels, for a histogram of each.
#[derive(Debug)]
pub struct Times<const N: usize> {
    name: &'static str,
    help: &'static str,
    labels: [&'static str; N],
    took: Mutex<BTreeMap<[String; N], Took>>,
}

static CALLS: Times<2> =
    Times::new("proxmox_csi_rpc_duration_seconds", "CSI calls by RPC and gRPC code, and the time that they took.", ["rpc", "code"]);

/// Counts a call that has ended.
pub fn count_call(rpc: &str, code: Code, took: Duration) {
    CALLS.count([rpc, code_name(code)], took);
}

/// Appends all calls so far: how many, with which code, how long they took.
pub fn calls(page: &mut String) {
    CALLS.write(page);
}

impl<const N: usize> Times<N> {
    /// `name` ends in `_seconds`; `labels` are its labels' names.
    #[must_use]
    pub const fn new(name: &'static str, help: &'static str, labels: [&'static str; N]) -> Self {
        Self { name, help, labels, took: Mutex::new(BTreeMap::new()) }
    }

    /// One more with these labels' values; beyond [`MAX_SERIES`] of them, the first is `other`.
    pub fn count(&self, values: [&str; N], took: Duration) {
        let mut all = self.took.lock().unwrap_or_else(PoisonError::into_inner);
        let mut values = values.map(String::from);
        if all.len() >= MAX_SERIES && !all.contains_key(&values) {
            values.iter_mut().take(1).for_each(|value| *value = "other".into());
        }
        let seen = all.entry(values).or_default();
        seen.count += 1;
        seen.sum += took;
        let within = |bound: &u64| took <= Duration::from_millis(*bound);
        if let Some(bucket) = BUCKETS_MS.iter().position(within).and_then(|index| seen.buckets.get_mut(index)) {
            *bucket += 1;
        }
    }

    /// Appends it to `page`.
    pub fn write(&self, page: &mut String) {
        let all = self.took.lock().unwrap_or_else(PoisonError::into_inner);
        head(page, self.name, "histogram", self.help);
        let [bucket, sum, count] = ["bucket", "sum", "count"].map(|part| format!("{}_{part}", self.name));
        let bounds = BUCKETS_MS.map(|ms| seconds(Duration::from_millis(ms)));
        for (values, seen) in all.iter() {
            let mut labels: Vec<(&str, &str)> = self.labels.iter().zip(values).map(|(label, value)| (*label, value.as_str())).collect();
            line(page, &sum, &labels, seconds(seen.sum));
            line(page, &count, &labels, seen.count);
            let mut within = 0;
            for (bound, calls) in bounds.iter().zip(seen.buckets) {
                within += calls;
                labels.push(("le", bound));
                line(page, &bucket, &labels, within);
                labels.truncate(N);
            }
            labels.push(("le", "+Inf"));
            line(page, &bucket, &labels, seen.count);
        }
    }
}

/// Appends what Prometheus' clients say of every process: memory and descriptors.
pub fn process(page: &mut String) {
    if let Some(bytes) = resident_bytes() {
        gauge(page, "process_resident_memory_bytes", "Resident memory.", bytes);
    }
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        gauge(page, "process_open_fds", "Open descriptors.", open.count());
    }
}

fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(kib.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

/// `0.01`, `120`, `1.25`: without floating point.
#[must_use]
pub fn seconds(time: Duration) -> String {
    let text = format!("{}.{:06}", time.as_secs(), time.subsec_micros());
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "Cancelled",
        Code::Unknown => "Unknown",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::AlreadyExists => "AlreadyExists",
        Code::PermissionDenied => "PermissionDenied",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::Aborted => "Aborted",
        Code::OutOfRange => "OutOfRange",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
        Code::DataLoss => "DataLoss",
        Code::Unauthenticated => "Unauthenticated",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_decimal_seconds() {
        for (micros, text) in [(0, "0"), (10_000, "0.01"), (1_250_000, "1.25"), (120_000_000, "120"), (7, "0.000007")] {
            assert_eq!(seconds(Duration::from_micros(micros)), text);
        }
    }

    #[test]
    fn buckets_count_up_to_their_bound_and_the_last_one_counts_all() {
        let (table, mut page) = (Times::new("proxmox_csi_rpc_duration_seconds", "h", ["rpc", "code"]), String::new());
        for ms in [5, 10, 11, 200_000] {
            table.count(["TestBuckets", "OK"], Duration::from_millis(ms));
        }
        table.write(&mut page);
        let value = |le: &str| {
            let line = format!("proxmox_csi_rpc_duration_seconds_bucket{{rpc=\"TestBuckets\",code=\"OK\",le=\"{le}\"}} ");
            page.lines().find_map(|text| text.strip_prefix(&line)).unwrap().parse::<u64>().unwrap()
        };
        assert_eq!([value("0.01"), value("0.1"), value("120"), value("+Inf")], [2, 3, 3, 4]);
        assert!(page.contains("_sum{rpc=\"TestBuckets\",code=\"OK\"} 200.026\n"), "{page}");
    }

    #[test]
    fn made_up_names_are_not_all_remembered() {
        let table = Times::new("x_seconds", "h", ["rpc"]);
        for number in 0..1000 {
            table.count([&format!("Made{number}")], Duration::ZERO);
        }
        assert_eq!(table.took.lock().unwrap().len(), MAX_SERIES + 1);
    }

    #[test]
    fn label_values_are_escaped() {
        let mut page = String::new();
        fact(&mut page, "x", "h", &[("a", "b\"c\\d\ne")]);
        assert_eq!(page, "# HELP x h\n# TYPE x gauge\nx{a=\"b\\\"c\\\\d\\ne\"} 1\n");
    }
}
