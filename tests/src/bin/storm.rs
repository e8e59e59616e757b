//! `scripts/bench storm`: the storm's tables, as Markdown.

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

fn run() -> Result<()> {
    proto::log::set_level("error").map_err(anyhow::Error::msg)?;
    let parts: Vec<String> = std::env::args().skip(1).collect();
    let mut out = std::io::stdout();
    for part in if parts.is_empty() { vec!["times".to_owned(), "memory".to_owned()] } else { parts } {
        let text = match part.as_str() {
            "times" => testbed::storm::times().context("times")?,
            "memory" => testbed::storm::memory().context("memory")?,
            _ => bail!("unknown part {part:?}: times, memory"),
        };
        writeln!(out, "{text}")?;
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("storm: FAILED: {why:#}");
            ExitCode::FAILURE
        }
    }
}
