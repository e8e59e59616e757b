//! A program on this host that ends with its value: QEMU, the controller.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::console::Console;
use crate::guest::wait;
use crate::tools;

/// From the end of its output to its own.
const END_LIMIT: Duration = Duration::from_secs(10);

/// What to start.
#[derive(Debug, Clone, Default)]
pub(crate) struct Start {
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<String>,
    /// All of its environment.
    pub(crate) env: Vec<(String, String)>,
    /// Where its output goes.
    pub(crate) log: PathBuf,
}

/// Killed when dropped.
#[derive(Debug)]
pub(crate) struct Process {
    child: Arc<Mutex<Child>>,
    pid: u32,
}

impl Process {
    /// A thread of its own starts it, reads its output into `console` and waits for it: it dies with that thread (setpriv), so that a
    /// test that is killed leaves nothing behind.
    pub(crate) fn start(start: Start, console: &Console) -> Result<Self> {
        let setpriv = tools::program("setpriv").context("setpriv is missing: install Debian's util-linux")?;
        let name = start.program.display().to_string();
        let (started, answer) = std::sync::mpsc::channel();
        let console = console.clone();
        std::thread::Builder::new().name("process".into()).spawn(move || {
            let mut command = Command::new(setpriv);
            command.args(["--pdeathsig", "KILL"]).arg(start.program).args(start.args).env_clear().envs(start.env).stdin(Stdio::null());
            let spawned = std::io::pipe().and_then(|(output, write)| {
                command.stdout(write.try_clone()?).stderr(write);
                Ok((output, command.spawn()?))
            });
            // It holds the pipe's writing ends.
            drop(command);
            match spawned {
                Ok((output, child)) => {
                    let child = Arc::new(Mutex::new(child));
                    let _ = started.send(Ok(Arc::clone(&child)));
                    let _ = console.follow(output, &start.log);
                    // The lock is not held while it runs: kill() needs it.
                    let _ = wait::until(END_LIMIT, || lock(&child).try_wait());
                }
                Err(error) => drop(started.send(Err(error))),
            }
        })?;
        let child = answer.recv().map_err(|_| anyhow!("its thread ended"))?.with_context(|| format!("start {name}"))?;
        let pid = lock(&child).id();
        Ok(Self { child, pid })
    }

    /// SIGKILL.
    pub(crate) fn kill(&self) {
        // An error means that it has ended.
        let _ = lock(&self.child).kill();
    }

    /// SIGTERM, and how it ended; `None` when it still runs at the limit.
    pub(crate) fn terminate(&self, limit: Duration) -> Result<Option<ExitStatus>> {
        self.signal("TERM")?;
        self.ended(limit)
    }

    /// `TERM`, `STOP`, `CONT`; nothing happens where it has ended.
    pub(crate) fn signal(&self, name: &str) -> Result<()> {
        let mut child = lock(&self.child);
        if child.try_wait()?.is_none() {
            // std sends SIGKILL only.
            Command::new("kill").args([&format!("-{name}"), &self.pid.to_string()]).status().context("start kill")?;
        }
        Ok(())
    }

    /// How it ended; `None` when it still runs at the limit.
    pub(crate) fn ended(&self, limit: Duration) -> Result<Option<ExitStatus>> {
        wait::until(limit, || Ok(lock(&self.child).try_wait()?))
    }

    /// Resident memory in KiB.
    pub(crate) fn resident_kib(&self) -> Result<u64> {
        let status = std::fs::read_to_string(Path::new("/proc").join(self.pid.to_string()).join("status"))?;
        let value = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok());
        value.context("no VmRSS in its status")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn lock(child: &Mutex<Child>) -> MutexGuard<'_, Child> {
    child.lock().unwrap_or_else(PoisonError::into_inner)
}
