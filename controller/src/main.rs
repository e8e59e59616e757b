//! Flags and environment → controller → served socket. The only exit.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use argh::FromArgs;
use controller::kube::Kube;
use controller::run::Controller;
use controller::service::ControllerService;
use proto::csi::controller_server::ControllerServer;
use proto::flags::{self, Flag};
use proto::identity::Identity;
use proto::serve::{self, Endpoint};

/// Each call to Proxmox holds one thread while it waits. Enough for three clusters that hang and one that does not; threads
/// are made when needed only.
const MAX_BLOCKING_THREADS: usize = 4 * controller::pve::CALLS_PER_CLUSTER;
/// Idle threads go, and their stacks with them.
const THREAD_KEEP_ALIVE: Duration = Duration::from_secs(10);
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
    Flag::switch("version"),
];

/// CSI controller for Proxmox VE: creates, attaches, detaches, grows and deletes volumes.
#[derive(FromArgs)]
struct Arguments {
    /// where to listen: unix:///csi/csi.sock (CSI_ENDPOINT)
    #[argh(option, default = "String::from(\"unix:///csi/csi.sock\")")]
    csi_address: String,
    /// the clusters file (CLOUD_CONFIG)
    #[argh(option, default = "PathBuf::from(\"/etc/proxmox/config.yaml\")")]
    cloud_config: PathBuf,
    /// accepted, without effect yet (KUBECONFIG)
    #[argh(option)]
    kubeconfig: Option<String>,
    /// accepted, without effect yet (METRICS_ADDRESS)
    #[argh(option)]
    metrics_address: Option<String>,
    /// accepted, without effect yet (METRICS_PATH)
    #[argh(option)]
    metrics_path: Option<String>,
    /// how much is logged: error, warn, info, debug, or a number as klog's -v (LOG_LEVEL)
    #[argh(option, default = "String::from(\"info\")")]
    verbosity: String,
    /// print the version and exit
    #[argh(switch)]
    version: bool,
}

fn main() -> ExitCode {
    let given: Vec<String> = std::env::args().skip(1).collect();
    let arguments = match flags::normalise(&given, FLAGS, |name| std::env::var(name).ok()) {
        Ok(arguments) => arguments,
        Err(why) => return refuse(&why),
    };
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let arguments = match Arguments::from_args(&["proxmox-csi-controller"], &arguments) {
        Ok(arguments) => arguments,
        Err(early) if early.status.is_ok() => {
            println!("{}", early.output);
            return ExitCode::SUCCESS;
        }
        Err(early) => return refuse(&early.output),
    };
    if arguments.version {
        println!("proxmox-csi-controller {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    match serve(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => refuse(&format!("{why:#}")),
    }
}

fn refuse(why: &str) -> ExitCode {
    proto::error!("{}", why.trim());
    ExitCode::FAILURE
}

fn serve(arguments: Arguments) -> anyhow::Result<()> {
    proto::log::set_level(&arguments.verbosity).map_err(anyhow::Error::msg)?;
    let endpoint: Endpoint = arguments.csi_address.parse().map_err(anyhow::Error::msg)?;
    let without_effect = [
        ("--kubeconfig", &arguments.kubeconfig),
        ("--metrics-address", &arguments.metrics_address),
        ("--metrics-path", &arguments.metrics_path),
    ];
    for (flag, _) in without_effect.iter().filter(|(_, value)| value.is_some()) {
        proto::warn!("{flag} has no effect in this version");
    }
    // Go's crypto/x509 reads it, too: the reference driver's users may have set it.
    let ca_bundle = std::env::var_os("SSL_CERT_FILE").filter(|path| !path.is_empty()).map(PathBuf::from);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .thread_keep_alive(THREAD_KEEP_ALIVE)
        .build()?;
    runtime.block_on(async move {
        let kube = Kube::in_cluster().unwrap_or_else(|why| {
            proto::error!("Kubernetes is not asked what dead nodes hold: {why}");
            None
        });
        let controller = Arc::new(Controller::with_kube(arguments.cloud_config, ca_bundle, kube.map(Arc::new)));
        let readiness = Arc::clone(&controller);
        let identity = Identity::new(env!("CARGO_PKG_VERSION")).ready_when(Arc::new(move || readiness.ready()));
        let greeting = Arc::clone(&controller);
        tokio::spawn(async move { greeting.greet().await });
        let service = ControllerServer::new(ControllerService::new(controller));
        let stop = async {
            if let Err(cause) = serve::terminated().await {
                proto::error!("signals cannot be received: {cause}");
            }
        };
        serve::serve(&endpoint, identity, service, stop, DRAIN).await
    })?;
    Ok(())
}
