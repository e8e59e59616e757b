//! Flags and environment → controller → served socket. The only exit.
#![forbid(unsafe_code)]

mod commands;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use argh::FromArgs;
use controller::kube::{Access, Kube, lease};
use controller::look::health::Standing;
use controller::run::Controller;
use controller::service::ControllerService;
use controller::threads::runtime;
use proto::csi::controller_server::ControllerServer;
use proto::flags::{self, Flag};
use proto::health;
use proto::identity::Identity;
use proto::serve::{self, Endpoint, Socket, with_identity};

/// Kubernetes gives a pod 30 s between SIGTERM and SIGKILL.
const DRAIN: Duration = Duration::from_secs(20);

/// The reference driver's flags.
const FLAGS: &[Flag] = &[
    Flag::value("csi-address", Some("CSI_ENDPOINT")),
    Flag::value("cloud-config", Some("CLOUD_CONFIG")),
    Flag::value("kubeconfig", Some("KUBECONFIG")),
    Flag::value("metrics-address", Some("METRICS_ADDRESS")),
    Flag::value("metrics-path", Some("METRICS_PATH")),
    Flag::value("v", Some("LOG_LEVEL")).called("verbosity"),
    Flag::value("log-format", Some("LOG_FORMAT")),
    Flag::switch("check"),
    Flag::switch("version"),
];

/// Where the chart mounts the clusters file.
const CONFIG: &str = "/etc/proxmox/config.yaml";

/// CSI controller for Proxmox VE: creates, attaches, detaches, grows and deletes volumes.
#[derive(FromArgs)]
#[argh(
    note = "Also: {command_name} holders [VOLUME] [--json]                  who holds which volume; reads only\n      {command_name} node-labels --node-name NODE --to FILE   a Node's labels, for the node agent"
)]
struct Arguments {
    /// where to listen: unix:///csi/csi.sock (CSI_ENDPOINT)
    #[argh(option, default = "String::from(\"unix:///csi/csi.sock\")")]
    csi_address: String,
    /// the clusters file (CLOUD_CONFIG)
    #[argh(option, default = "PathBuf::from(CONFIG)")]
    cloud_config: PathBuf,
    /// outside of a pod: the Kubernetes API, by a kubeconfig with a token (KUBECONFIG)
    #[argh(option)]
    kubeconfig: Option<String>,
    /// address of /healthz, /readyz and the metrics, :8080 or 127.0.0.1:8080; off by default (METRICS_ADDRESS)
    #[argh(option)]
    metrics_address: Option<String>,
    /// where the metrics are there (METRICS_PATH)
    #[argh(option, default = "String::from(\"/metrics\")")]
    metrics_path: String,
    /// how much is logged: error, warn, info, debug, or a number as klog's -v (LOG_LEVEL)
    #[argh(option, default = "String::from(\"info\")")]
    verbosity: String,
    /// text or json (LOG_FORMAT)
    #[argh(option, default = "String::from(\"text\")")]
    log_format: String,
    /// why does it not work? Looks at config, Proxmox and Kubernetes, says a line of each, writes nothing, and exits with 1 where something is wrong
    #[argh(switch)]
    check: bool,
    /// print the version and exit
    #[argh(switch)]
    version: bool,
}

fn main() -> ExitCode {
    let given: Vec<String> = std::env::args().skip(1).collect();
    let done = match given.split_first() {
        Some((word, rest)) if word == "holders" => commands::holders(rest),
        Some((word, rest)) if word == "node-labels" => commands::node_labels(rest),
        _ => begin(&given),
    };
    done.unwrap_or_else(|why| refuse(&format!("{why:#}")))
}

fn begin(given: &[String]) -> anyhow::Result<ExitCode> {
    let arguments: Arguments = match parsed(&["proxmox-csi-controller"], given, FLAGS)? {
        Parsed::Arguments(arguments) => arguments,
        Parsed::Help(help) => {
            println!("{help}");
            return Ok(ExitCode::SUCCESS);
        }
    };
    if arguments.version {
        println!("proxmox-csi-controller {}", env!("CARGO_PKG_VERSION"));
        return Ok(ExitCode::SUCCESS);
    }
    if arguments.check {
        return commands::check(arguments.cloud_config, arguments.kubeconfig.as_deref());
    }
    serve(arguments).map(|()| ExitCode::SUCCESS)
}

/// What a command line says.
enum Parsed<T> {
    Arguments(T),
    Help(String),
}

fn parsed<T: FromArgs>(command: &[&str], given: &[String], flags: &[Flag]) -> anyhow::Result<Parsed<T>> {
    let given = flags::normalise(given, flags, |name| std::env::var(name).ok()).map_err(anyhow::Error::msg)?;
    let given: Vec<&str> = given.iter().map(String::as_str).collect();
    match T::from_args(command, &given) {
        Ok(arguments) => Ok(Parsed::Arguments(arguments)),
        Err(early) if early.status.is_ok() => Ok(Parsed::Help(early.output)),
        Err(early) => bail!("{}", early.output.trim()),
    }
}

/// Go's crypto/x509 reads it, too: the reference driver's users may have set it.
fn ca_bundle() -> Option<PathBuf> {
    std::env::var_os("SSL_CERT_FILE").filter(|path| !path.is_empty()).map(PathBuf::from)
}

fn refuse(why: &str) -> ExitCode {
    proto::error!("{}", why.trim());
    ExitCode::FAILURE
}

fn serve(arguments: Arguments) -> anyhow::Result<()> {
    proto::log::set_level(&arguments.verbosity).map_err(anyhow::Error::msg)?;
    proto::log::set_format(&arguments.log_format).map_err(anyhow::Error::msg)?;
    let endpoint: Endpoint = arguments.csi_address.parse().map_err(anyhow::Error::msg)?;
    if !arguments.metrics_path.starts_with('/') {
        bail!("--metrics-path {:?} should begin with a slash", arguments.metrics_path);
    }
    let pages = arguments.metrics_address.as_deref().map(health::listen).transpose().map_err(anyhow::Error::msg)?;
    let standing = Standing::new(arguments.cloud_config.clone());
    let kube = kubernetes(arguments.kubeconfig.as_deref()).map_err(anyhow::Error::msg)?;
    runtime()?.block_on(async move {
        if let Some(listener) = pages {
            proto::info!("/healthz, /readyz and {} on {}", arguments.metrics_path, listener.local_addr()?);
            tokio::spawn(health::serve(listener, standing.pages(&arguments.metrics_path)));
        }
        let mut stop = Box::pin(async {
            if let Err(cause) = serve::terminated().await {
                proto::error!("signals cannot be received: {cause}");
            }
        });
        match kube {
            None => {
                let served = Served { endpoint, config: arguments.cloud_config, kube: None, standing };
                served.until(stop).await.map(drop)
            }
            Some(kube) => {
                let served = Served { endpoint, config: arguments.cloud_config, kube: Some(Arc::clone(&kube)), standing };
                served.while_leading(&kube, &mut stop).await
            }
        }
    })
}

/// The Kubernetes API, where it is there.
fn access(kubeconfig: Option<&str>) -> Result<Option<Access>, String> {
    let file = kubeconfig.filter(|path| !path.is_empty()).map(Path::new);
    let named = file.map(Access::from_kubeconfig).transpose()?.flatten();
    if let (Some(file), None) = (file, &named) {
        // Who names it wants the Lease; to serve without would make two that act.
        return Err(format!("kubeconfig {}: it is not there; name one that is, or none, to do without Kubernetes", file.display()));
    }
    match named {
        Some(access) => Ok(Some(access)),
        None => Access::in_cluster(),
    }
}

/// The same for who only reads.
fn reading(kubeconfig: Option<&str>) -> Result<Option<Arc<Kube>>, String> {
    access(kubeconfig)?.map(|access| Kube::new(access).map(Arc::new)).transpose()
}

/// The same for one of several controllers, of which one acts at a time, by the driver's Lease.
fn kubernetes(kubeconfig: Option<&str>) -> Result<Option<Arc<Kube>>, String> {
    let Some(access) = access(kubeconfig)? else {
        proto::info!("no Kubernetes API: without a Lease, all VMs are looked at again after each attach");
        return Ok(None);
    };
    let me = lease::identity().map_err(|cause| format!("/dev/urandom: {cause}"))?;
    Ok(Some(Arc::new(Kube::new(access)?.with_lease(&me))))
}

/// What is to be served, and where.
struct Served {
    endpoint: Endpoint,
    config: PathBuf,
    kube: Option<Arc<Kube>>,
    standing: Arc<Standing>,
}

impl Served {
    /// Serves until `stop`, and lets running calls end. Whether all of them have, and nothing of ours can come later.
    async fn until(self, stop: impl Future<Output = ()>) -> anyhow::Result<bool> {
        let controller = Arc::new(Controller::with_kube(self.config, ca_bundle(), self.kube));
        let readiness = Arc::clone(&controller);
        let identity = Identity::new(env!("CARGO_PKG_VERSION")).ready_when(Arc::new(move || readiness.ready()));
        let greeting = Arc::clone(&controller);
        tokio::spawn(async move { greeting.greet().await });
        let service = ControllerService::new(Arc::clone(&controller));
        let socket = Socket::open(self.endpoint.path())?;
        self.standing.act(&controller, socket.place());
        socket.serve(with_identity(identity, ControllerServer::new(service.clone())), stop, DRAIN).await?;
        Ok(service.is_idle() && controller.knows_all_outcomes())
    }

    /// The socket is there only while the Lease is ours: the sidecars of a standby wait for it, and those of one that loses it
    /// lose their connection, end, and wait for it again. Against a socket that answers UNAVAILABLE: each sidecar would repeat
    /// every call, write that answer into its objects, and compete with those of the one that acts.
    async fn while_leading(self, kube: &Arc<Kube>, stop: &mut (impl Future<Output = ()> + Unpin)) -> anyhow::Result<()> {
        let Some(lease) = kube.lease().cloned() else { return self.until(stop).await.map(drop) };
        if let Err(why) = controller::config::load(&self.config) {
            proto::error!("{why}");
        }
        let mut lost = tokio::select! {
            leading = lease.lead(kube.is_first()) => leading.map_err(anyhow::Error::msg)?,
            () = &mut *stop => {
                // Perhaps it is ours, and what its holder before us sent may still come: the next one waits for that, too.
                lease.release(false).await;
                return Ok(());
            }
        };
        let alone = tokio::select! {
            alone = kube.check_alone() => alone,
            () = &mut *stop => {
                lease.release(true).await;
                return Ok(());
            }
        };
        if let Err(why) = alone {
            lease.release(true).await;
            bail!("{why}");
        }
        let mut why = None;
        let all_is_known = self
            .until(async {
                tokio::select! {
                    lost = &mut lost => why = Some(lost),
                    () = stop => (),
                }
            })
            .await?;
        match why {
            Some(why) => bail!("{}", why?),
            None => lease.release(all_is_known).await,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kubeconfig_that_is_missing_or_unreadable_is_refused() {
        let unreadable = std::env::temp_dir();
        for (file, why) in [("/none/config", "it is not there"), (unreadable.to_str().unwrap(), "kubeconfig /")] {
            let refused = kubernetes(Some(file)).err().unwrap();
            assert!(refused.contains(file) && refused.contains(why), "{refused}");
        }
    }
}
