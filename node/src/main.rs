//! Flags and environment → configuration → serve. The only exit.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use argh::FromArgs;
use node::info::{self, Configured};
use node::request::Folders;
use node::run::Node;
use node::service::Service;
use proto::csi::node_server::NodeServer;
use proto::flags::Flag;
use proto::identity::Identity;
use proto::serve::{Endpoint, serve, terminated};

/// How long running calls may go on after SIGTERM: a pod has 30 s by default.
const DRAIN: Duration = Duration::from_secs(20);
/// For a thread that is in the middle of a write when the process ends.
const LAST_WORK: Duration = Duration::from_secs(1);
/// Calls that work at one time: 29 volumes, and looks beside them. Each is a thread while it lasts.
const MAX_THREADS: usize = 40;
/// An idle agent is one thread.
const THREAD_IDLE: Duration = Duration::from_secs(1);
/// Where kubelet lives, unless told otherwise.
const KUBELET: &str = "/var/lib/kubelet";

const FLAGS: &[Flag] = &[
    Flag::value("csi-address", Some("CSI_ENDPOINT")),
    Flag::value("node-id", Some("NODE_NAME")),
    Flag::value("vmid", Some("VMID")),
    Flag::value("region", Some("REGION")),
    Flag::value("zone", Some("ZONE")),
    Flag::value("kubelet-dir", Some("KUBELET_DIR")),
    Flag::value("kubeconfig", Some("KUBECONFIG")),
    Flag::value("master", Some("MASTER")),
    Flag::value("v", Some("LOG_LEVEL")).called("verbosity"),
    Flag::switch("version"),
];

#[derive(FromArgs)]
/// CSI node agent for Proxmox VE: finds, formats, mounts and grows volumes by direct system calls.
struct Args {
    /// the CSI socket, unix:///csi/csi.sock [CSI_ENDPOINT]
    #[argh(option, default = "\"unix:///csi/csi.sock\".into()")]
    csi_address: String,
    /// the Kubernetes node's name, or name/vmid [NODE_NAME]
    #[argh(option, default = "String::new()")]
    node_id: String,
    /// this VM's number on Proxmox, where SMBIOS does not say it [VMID]
    #[argh(option)]
    vmid: Option<u32>,
    /// the Proxmox cluster [REGION]
    #[argh(option)]
    region: Option<String>,
    /// the Proxmox node [ZONE]
    #[argh(option)]
    zone: Option<String>,
    /// folder in which kubelet's paths lie, /var/lib/kubelet; may be given several times [KUBELET_DIR]
    #[argh(option)]
    kubelet_dir: Vec<PathBuf>,
    /// taken for the reference driver's sake, not used yet [KUBECONFIG]
    #[argh(option)]
    kubeconfig: Option<String>,
    /// taken for the reference driver's sake, not used yet
    #[argh(option)]
    master: Option<String>,
    /// how much is logged: error, warn, info, debug, or klog's number; written -v 4 or --v=4 [LOG_LEVEL]
    #[argh(option, default = "\"info\".into()")]
    verbosity: String,
    /// print the version and end
    #[argh(switch)]
    version: bool,
}

fn main() -> ExitCode {
    let given: Vec<String> = std::env::args().skip(1).collect();
    match begin(&given) {
        Ok(code) => code,
        Err(sentence) => {
            proto::error!("{sentence}");
            ExitCode::FAILURE
        }
    }
}

fn begin(given: &[String]) -> Result<ExitCode, String> {
    let given = proto::flags::normalise(given, FLAGS, |name| std::env::var(name).ok())?;
    let given: Vec<&str> = given.iter().map(String::as_str).collect();
    let args = match Args::from_args(&["proxmox-csi-node"], &given) {
        Ok(args) => args,
        Err(early) if early.status.is_ok() => {
            println!("{}", early.output);
            return Ok(ExitCode::SUCCESS);
        }
        Err(early) => return Err(early.output.trim().to_string()),
    };
    if args.version {
        println!("proxmox-csi-node {}", env!("CARGO_PKG_VERSION"));
        return Ok(ExitCode::SUCCESS);
    }
    proto::log::set_level(&args.verbosity)?;
    run(args)?;
    Ok(ExitCode::SUCCESS)
}

fn run(args: Args) -> Result<(), String> {
    let endpoint: Endpoint = args.csi_address.parse()?;
    if let Some(vmid) = args.vmid.filter(|vmid| !info::is_vmid(vmid)) {
        return Err(format!("--vmid {vmid} is no VMID: Proxmox numbers VMs from 100 to 999999999"));
    }
    let folders = if args.kubelet_dir.is_empty() { vec![KUBELET.into()] } else { args.kubelet_dir };
    let node = Node::new(Folders::new(folders)?);
    let stop_work = node.stop();
    let configured = Configured { node_id: args.node_id, vmid: args.vmid, region: args.region, zone: args.zone };
    if let Err(unknown) = info::look(&configured, node.sysfs()) {
        // It stays up: NodeGetInfo says the same, and the volumes that are here already are served.
        proto::warn!("{unknown}");
    }
    if args.kubeconfig.is_some() || args.master.is_some() {
        proto::info!("--kubeconfig and --master are not used by this version");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MAX_THREADS)
        .thread_keep_alive(THREAD_IDLE)
        .build()
        .map_err(|cause| format!("start: {cause}"))?;
    let served = runtime.block_on(async {
        let stop = async {
            if let Err(cause) = terminated().await {
                proto::error!("signals: {cause}");
                std::future::pending::<()>().await;
            }
            stop_work.request();
        };
        serve(&endpoint, Identity::new(env!("CARGO_PKG_VERSION")), NodeServer::new(Service::new(node, configured)), stop, DRAIN).await
    });
    runtime.shutdown_timeout(LAST_WORK);
    served.map_err(|error| error.to_string())
}
