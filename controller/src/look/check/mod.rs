//! `--check`: why it does not work, from one command. A line for each thing that has to be right: `ok`, `WRONG` with what to do, or `note`.
//!
//! Reads the config file, Proxmox, and Kubernetes where it is there; writes nothing, and needs no running controller.

mod nodes;
mod objects;
mod privileges;
mod proxmox;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::kube::Kube;
use crate::run::Controller;

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// To be known.
    Note,
    /// To be mended.
    Wrong,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Right or wrong.
    pub verdict: Verdict,
    /// What was looked at: `region fsn1: token`.
    pub about: String,
    /// What was found, and what to do.
    pub said: String,
}

/// All lines.
#[derive(Debug, Default)]
pub struct Report {
    /// In the order of the looks: what comes first may be the cause of what follows.
    pub lines: Vec<Line>,
}

impl Report {
    fn add(&mut self, verdict: Verdict, about: &str, said: impl Into<String>) {
        self.lines.push(Line { verdict, about: about.into(), said: said.into() });
    }

    fn ok(&mut self, about: &str, said: impl Into<String>) {
        self.add(Verdict::Ok, about, said);
    }

    fn note(&mut self, about: &str, said: impl Into<String>) {
        self.add(Verdict::Note, about, said);
    }

    fn wrong(&mut self, about: &str, said: impl Into<String>) {
        self.add(Verdict::Wrong, about, said);
    }

    /// How many things are wrong.
    #[must_use]
    pub fn count_wrong(&self) -> usize {
        self.lines.iter().filter(|line| line.verdict == Verdict::Wrong).count()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Line { verdict, about, said } in &self.lines {
            let word = match verdict {
                Verdict::Ok => "ok    ",
                Verdict::Note => "note  ",
                Verdict::Wrong => "WRONG ",
            };
            writeln!(f, "{word} {about}: {}", said.trim().replace('\n', " | "))?;
        }
        match self.count_wrong() {
            0 => writeln!(f, "nothing is wrong"),
            wrong => writeln!(f, "{wrong} wrong; mend the first, and look again"),
        }
    }
}

/// Looks at everything. `kube`: nothing where there is no Kubernetes API; a sentence where there is one that cannot be used.
pub async fn check(config: PathBuf, ca_bundle: Option<PathBuf>, kube: Result<Option<Arc<Kube>>, String>) -> Report {
    let mut report = Report::default();
    let kube = match kube {
        Ok(kube) => kube,
        Err(why) => {
            report.wrong("Kubernetes", why);
            None
        }
    };
    let shown = config.display().to_string();
    let controller = Controller::with_kube(config, ca_bundle, kube.clone());
    let clusters = match controller.clusters() {
        Ok(clusters) => {
            let regions: Vec<&str> = clusters.regions.keys().map(String::as_str).collect();
            report.ok("config file", format!("{shown}: regions {}", regions.join(", ")));
            Some(clusters)
        }
        Err(error) => {
            report.wrong("config file", error.text);
            None
        }
    };
    let mut found = Vec::new();
    for region in clusters.iter().flat_map(|clusters| clusters.regions.values()) {
        found.extend(proxmox::check(&mut report, &controller, region).await);
    }
    match &kube {
        None => {
            report.note("Kubernetes", "no API here (no --kubeconfig, no pod's token): nodes, claims and attachments were not looked at");
            nodes::check_without(&mut report, &found);
        }
        Some(kube) => {
            nodes::check(&mut report, kube, &found).await;
            objects::check(&mut report, kube, &found).await;
        }
    }
    report
}
