//! `scripts/bench`: our work beside the machine's own tools', in one run: time, bytes written, peak memory, programs started.
//!
//! Nothing is asserted of times; a run that could not measure something says so in its tables. The byte counts are asserted in
//! tests/tests/node/zeros.rs.

mod guest;
mod host;
mod report;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use report::Report;

struct Arguments {
    parts: Vec<String>,
    /// Where our examples are, built as the release binaries are.
    examples: PathBuf,
    record: Option<PathBuf>,
    heading: String,
}

/// `[PART…] --examples FOLDER [--record FILE] --heading TEXT`, as scripts/bench gives them.
fn arguments() -> Result<Arguments> {
    let (mut parts, mut examples, mut record, mut heading) = (Vec::new(), None, None, String::new());
    let mut given = std::env::args().skip(1);
    while let Some(arg) = given.next() {
        let mut value = || given.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--examples" => examples = Some(value()?.into()),
            "--record" => record = Some(value()?.into()),
            "--heading" => heading = value()?,
            "host" | "guest" | "storm" | "memory" => parts.push(arg),
            _ => bail!("unknown argument {arg}: see scripts/bench --help"),
        }
    }
    Ok(Arguments { parts, examples: examples.context("--examples is missing: run scripts/bench")?, record, heading })
}

fn run() -> Result<()> {
    let arguments = arguments()?;
    let mut report = Report::default();
    for line in report::machine() {
        report.note(line);
    }
    let load = report::load();
    for part in &arguments.parts {
        match part.as_str() {
            "host" => host::run(&arguments.examples, &mut report).context("host")?,
            "guest" => guest::run(&mut report).context("guest")?,
            "memory" => report.table(testbed::storm::memory().context("memory")?),
            _ => storm(&mut report).context("storm")?,
        }
    }
    report.note(format!("Load of the machine: {load} at the beginning, {} at the end.", report::load()));
    let section = report.markdown(&arguments.heading);
    std::io::stdout().write_all(section.as_bytes())?;
    arguments.record.map_or(Ok(()), |file| report::record(&file, &section))
}

/// Simulated time and the release binary's memory: nothing of this run's load is in it.
fn storm(report: &mut Report) -> Result<()> {
    proto::log::set_level("error").map_err(anyhow::Error::msg)?;
    report.table(testbed::storm::times()?);
    report.table(testbed::storm::memory()?);
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            report::say(&format!("FAILED: {why:#}"));
            ExitCode::FAILURE
        }
    }
}
