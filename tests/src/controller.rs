//! The controller's release binary as a process of this host, with its clusters file and its socket.

use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use proto::csi;

use crate::calls::Calls;
use crate::console::Console;
use crate::guest::wait;
use crate::process::{Process, Start};
use crate::tools;

/// It opens its socket within milliseconds, whatever Proxmox does.
const SOCKET_LIMIT: Duration = Duration::from_secs(20);

/// Killed when dropped.
#[derive(Debug)]
pub struct Controller {
    process: Process,
    console: Console,
    socket: PathBuf,
    log: PathBuf,
    calls: Calls,
}

impl Controller {
    /// Writes `clusters` (the reference driver's YAML) to `folder`, starts the binary there and waits until it answers.
    pub fn start(folder: &Path, clusters: &str) -> Result<Self> {
        let controller = Self::launch(folder, clusters, &[])?;
        let answers = wait::until(SOCKET_LIMIT, || {
            controller.console.alive().with_context(|| format!("the controller: {}", controller.quote()))?;
            Ok::<_, anyhow::Error>(controller.calls.get_plugin_info(csi::GetPluginInfoRequest {}).ok())
        })?;
        ensure!(answers.is_some(), "the controller does not answer within {} s; {}", SOCKET_LIMIT.as_secs(), controller.quote());
        Ok(controller)
    }

    /// The same with Kubernetes, whose Lease it waits for before it has a socket.
    pub fn stand_by(folder: &Path, clusters: &str, kubeconfig: &Path) -> Result<Self> {
        Self::launch(folder, clusters, &[format!("--kubeconfig={}", kubeconfig.display())])
    }

    fn launch(folder: &Path, clusters: &str, more: &[String]) -> Result<Self> {
        let program = tools::release_binary("proxmox-csi-controller");
        ensure!(program.exists(), "{} is missing: run scripts/build", program.display());
        let (config, socket, log) = (folder.join("clusters.yaml"), folder.join("controller.sock"), folder.join("controller.log"));
        std::fs::write(&config, clusters).with_context(|| format!("write {}", config.display()))?;
        let mut args = vec![format!("--csi-address=unix://{}", socket.display()), format!("--cloud-config={}", config.display())];
        args.extend_from_slice(more);
        let env = vec![("LOG_LEVEL".into(), std::env::var("LOG_LEVEL").unwrap_or_else(|_| "info".into()))];
        let console = Console::default();
        let process = Process::start(Start { program, args, env, log: log.clone() }, &console)?;
        Ok(Self { process, console, calls: Calls::unix(&socket)?, socket, log })
    }

    /// Waits until its socket is there: it acts.
    pub fn acts_within(&self, limit: Duration) -> Result<bool> {
        Ok(wait::until(limit, || Ok::<_, anyhow::Error>(self.socket.exists().then_some(())))?.is_some())
    }

    /// SIGSTOP or SIGCONT.
    pub fn stop(&self, is_stopped: bool) -> Result<()> {
        self.process.signal(if is_stopped { "STOP" } else { "CONT" })
    }

    /// How it ended by itself; `None` when it still runs at the limit.
    pub fn ended(&self, limit: Duration) -> Result<Option<ExitStatus>> {
        self.process.ended(limit)
    }

    #[must_use]
    pub fn calls(&self) -> &Calls {
        &self.calls
    }

    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Resident memory in KiB.
    pub fn resident_kib(&self) -> Result<u64> {
        self.process.resident_kib()
    }

    /// SIGKILL: what a crash leaves behind is tested with a new one on the same folder.
    pub fn kill(&self) {
        self.process.kill();
    }

    /// SIGTERM, and how it ended.
    pub fn terminate(&self, limit: Duration) -> Result<ExitStatus> {
        match self.process.terminate(limit)? {
            Some(status) => Ok(status),
            None => bail!("the controller still runs {} s after SIGTERM; {}", limit.as_secs(), self.quote()),
        }
    }

    /// Its log's last lines and where all of it is, for an error.
    #[must_use]
    pub fn quote(&self) -> String {
        format!("{} (all of it: {})", self.console.tail(), self.log.display())
    }
}
