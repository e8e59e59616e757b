//! The numbers of a run, as two tables in Markdown: comparisons, and goals.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

/// What one side of a comparison took; what was not measured is `None`.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Side {
    /// Median of the runs.
    pub(crate) time: Option<Duration>,
    /// What it takes where nothing else disturbs it, as near as a busy machine can tell.
    pub(crate) fastest: Option<Duration>,
    /// By the block device's own counter, median.
    pub(crate) written_bytes: Option<u64>,
    /// The largest of its processes.
    pub(crate) peak_kib: Option<u64>,
    /// Programs started.
    pub(crate) processes: Option<u64>,
}

/// Something to be reached.
#[derive(Debug)]
pub(crate) struct Goal {
    pub(crate) what: String,
    pub(crate) limit: f64,
    pub(crate) unit: &'static str,
    /// None: why not.
    pub(crate) measured: Result<f64, String>,
}

#[derive(Debug, Default)]
pub(crate) struct Report {
    notes: Vec<String>,
    comparisons: Vec<(String, String, Side, Side)>,
    goals: Vec<Goal>,
    tables: Vec<String>,
}

const MIB: f64 = 1_048_576.0;

impl Report {
    /// A line under the tables.
    pub(crate) fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// Tables that are Markdown already.
    pub(crate) fn table(&mut self, markdown: String) {
        self.tables.push(markdown);
    }

    pub(crate) fn compare(&mut self, what: impl Into<String>, beside: impl Into<String>, ours: Side, theirs: Side) {
        let (what, beside) = (what.into(), beside.into());
        say(&format!("{what}: {}", row(&beside, &ours, &theirs)));
        self.comparisons.push((what, beside, ours, theirs));
    }

    pub(crate) fn goal(&mut self, what: impl Into<String>, limit: f64, unit: &'static str, measured: Result<f64, String>) {
        self.goals.push(Goal { what: what.into(), limit, unit, measured });
    }

    /// The run as a section of docs/bench.md.
    pub(crate) fn markdown(&self, heading: &str) -> String {
        let mut text = format!("## {heading}\n\n");
        if !self.comparisons.is_empty() {
            text += "Ours / theirs = ratio.\n\n| what | beside | time, ms | written, MiB | peak memory, MiB | programs started |\n|---|---|---|---|---|---|\n";
            for (what, beside, ours, theirs) in &self.comparisons {
                let _ = writeln!(text, "| {what} | {}", row(beside, ours, theirs));
            }
            text += "\n";
        }
        if !self.goals.is_empty() {
            text += "| goal | at most | measured | reached |\n|---|---|---|---|\n";
            for Goal { what, limit, unit, measured } in &self.goals {
                let (measured, reached) = match measured {
                    Ok(measured) => (format!("{measured:.2} {unit}"), if measured <= limit { "yes" } else { "**no**" }),
                    Err(why) => (format!("not measured: {why}"), "-"),
                };
                let _ = writeln!(text, "| {what} | {limit} {unit} | {measured} | {reached} |");
            }
            text += "\n";
        }
        for table in &self.tables {
            text += table;
            text += "\n";
        }
        for note in &self.notes {
            let _ = writeln!(text, "* {note}");
        }
        text
    }
}

/// Everything after the first column.
fn row(beside: &str, ours: &Side, theirs: &Side) -> String {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let cells = [
        cell(ours.time.map(ms), theirs.time.map(ms)),
        cell(ours.written_bytes.map(in_mib), theirs.written_bytes.map(in_mib)),
        cell(ours.peak_kib.map(|kib| in_mib(kib * 1024)), theirs.peak_kib.map(|kib| in_mib(kib * 1024))),
        match (ours.processes, theirs.processes) {
            (Some(ours), Some(theirs)) => format!("{ours} / {theirs}"),
            _ => "-".into(),
        },
    ];
    format!("{beside} | {} |", cells.join(" | "))
}

#[allow(clippy::cast_precision_loss, reason = "shown with two digits")]
pub(crate) fn in_mib(bytes: u64) -> f64 {
    bytes as f64 / MIB
}

fn cell(ours: Option<f64>, theirs: Option<f64>) -> String {
    match (ours, theirs) {
        (Some(ours), Some(theirs)) if theirs > 0.0 => format!("{ours:.2} / {theirs:.2} = {:.3}", ours / theirs),
        (Some(ours), Some(theirs)) => format!("{ours:.2} / {theirs:.2}"),
        (Some(ours), None) => format!("{ours:.2}"),
        _ => "-".into(),
    }
}

/// Puts the section before the earlier ones: behind the file's introduction.
pub(crate) fn record(file: &Path, section: &str) -> Result<()> {
    let text = std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let at = text.find("\n## ").map_or(text.len(), |at| at + 1);
    let (introduction, earlier) = text.split_at(at);
    std::fs::write(file, format!("{introduction}{section}\n{earlier}")).with_context(|| format!("write {}", file.display()))
}

pub(crate) fn say(line: &str) {
    // A reader that went away is no reason to stop half-way.
    let _ = writeln!(std::io::stderr(), "bench: {line}");
}

/// The machine, for whoever reads the numbers later.
pub(crate) fn machine() -> Vec<String> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let (cpus, memory, kernel) = (read("/proc/cpuinfo"), read("/proc/meminfo"), read("/proc/sys/kernel/osrelease"));
    let after = |text: &str, key: &str| -> String {
        text.lines().find_map(|line| Some(line.strip_prefix(key)?.split_once(':')?.1.trim().to_owned())).unwrap_or_default()
    };
    let cores = cpus.lines().filter(|line| line.starts_with("processor")).count();
    let version = |program: &str, args: &[&str]| {
        let output = testbed::tools::program(program).and_then(|program| Command::new(program).args(args).output().ok());
        let text = output.map(|output| [output.stdout, output.stderr].concat()).unwrap_or_default();
        String::from_utf8_lossy(&text).lines().next().unwrap_or(program).trim().to_owned()
    };
    vec![
        format!(
            "{cores} × {}, {} of memory, Linux {}",
            after(&cpus, "model name"),
            after(&memory, "MemTotal"),
            // Its version; what follows is the machine owner's.
            kernel.trim().split('-').next().unwrap_or_default()
        ),
        [version("mkfs.ext4", &["-V"]), version("mkfs.xfs", &["-V"]), version("blkid", &["-V"]), version("cryptsetup", &["--version"])]
            .join("; "),
    ]
}

/// How busy the machine was: the 1-minute load.
pub(crate) fn load() -> String {
    std::fs::read_to_string("/proc/loadavg").unwrap_or_default().split(' ').next().unwrap_or("?").to_owned()
}

/// The middle one of some runs.
pub(crate) fn median<T: Ord + Copy>(mut runs: Vec<T>) -> Option<T> {
    runs.sort_unstable();
    runs.get(runs.len() / 2).copied()
}
