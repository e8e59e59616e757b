//! Flags and environment → configuration → serve. The only exit.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use argh::FromArgs;
use node::info::{self, Configured};
use node::kill;
use node::metrics;
use node::registration::{self, Kubelet, Standing};
use node::request::Folders;
use node::run::Node;
use node::service::{Service, aside};
use node::status::Machine;
use node::sys::confine::{self, confine};
use node::sys::kernel;
use proto::flags::Flag;
use proto::health::{self, Pages};
use proto::identity::Identity;
use proto::serve::{Endpoint, Socket, terminated, with_identity};
use tokio::sync::watch;

/// How long running calls may go on after SIGTERM: a pod has 30 s by default.
const DRAIN: Duration = Duration::from_secs(20);
/// For a thread that is in the middle of a write when the process ends.
const LAST_WORK: Duration = Duration::from_secs(1);
/// Calls that work at one time: 29 volumes, each with a call and two looks (`MAX_LOOKS` in service.rs) that may hang with its disk, and some beside:
/// NodeGetInfo, registration, the trimmer. Each is a thread while it lasts.
const MAX_THREADS: usize = 96;
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
    Flag::value("max-volume-attachments", Some("MAX_VOLUME_ATTACHMENTS")),
    Flag::value("labels-file", Some("LABELS_FILE")),
    Flag::value("kubelet-dir", Some("KUBELET_DIR")),
    Flag::value("plugin-registration-path", Some("PLUGIN_REGISTRATION_PATH")),
    Flag::value("kubelet-registration-path", Some("KUBELET_REGISTRATION_PATH")),
    Flag::value("metrics-address", Some("METRICS_ADDRESS")),
    Flag::value("kubeconfig", Some("KUBECONFIG")),
    Flag::value("master", Some("MASTER")),
    Flag::value("v", Some("LOG_LEVEL")).called("verbosity"),
    Flag::value("log-format", Some("LOG_FORMAT")),
    Flag::switch("version"),
];

#[derive(FromArgs)]
#[argh(
    note = "Also: {command_name} status [--json]   what is on this node: disks, mounts, volumes, disagreements; reads only\n      {command_name} confinement       what the agent has given up, tried on itself"
)]
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
    /// how many volumes this node takes, 1 to 29; default: the slots that no other disk sits in [MAX_VOLUME_ATTACHMENTS]
    #[argh(option)]
    max_volume_attachments: Option<String>,
    /// file of labels (key="value" a line, as the downward API writes them) for what no flag says [LABELS_FILE]
    #[argh(option)]
    labels_file: Option<PathBuf>,
    /// folder in which kubelet's paths lie, /var/lib/kubelet; may be given several times [KUBELET_DIR]
    #[argh(option)]
    kubelet_dir: Vec<PathBuf>,
    /// kubelet's plugins_registry folder, to register without a registrar beside; off by default [PLUGIN_REGISTRATION_PATH]
    #[argh(option)]
    plugin_registration_path: Option<PathBuf>,
    /// the CSI socket as kubelet sees it; default: KUBELET_DIR/plugins/csi.proxmox.sinextra.dev/csi.sock [KUBELET_REGISTRATION_PATH]
    #[argh(option)]
    kubelet_registration_path: Option<PathBuf>,
    /// address of /healthz, /readyz and /metrics, :8080 or 127.0.0.1:8080; off by default [METRICS_ADDRESS]
    #[argh(option)]
    metrics_address: Option<String>,
    /// taken for the reference driver's sake, not used yet [KUBECONFIG]
    #[argh(option)]
    kubeconfig: Option<String>,
    /// taken for the reference driver's sake, not used yet
    #[argh(option)]
    master: Option<String>,
    /// how much is logged: error, warn, info, debug, or klog's number; written -v 4 or --v=4 [LOG_LEVEL]
    #[argh(option, default = "\"info\".into()")]
    verbosity: String,
    /// text or json [LOG_FORMAT]
    #[argh(option, default = "\"text\".into()")]
    log_format: String,
    /// print the version and end
    #[argh(switch)]
    version: bool,
}

const STATUS_FLAGS: &[Flag] = &[
    Flag::switch("json"),
    Flag::value("node-id", Some("NODE_NAME")),
    Flag::value("vmid", Some("VMID")),
    Flag::value("region", Some("REGION")),
    Flag::value("zone", Some("ZONE")),
    Flag::value("max-volume-attachments", Some("MAX_VOLUME_ATTACHMENTS")),
    Flag::value("labels-file", Some("LABELS_FILE")),
    Flag::value("kubelet-dir", Some("KUBELET_DIR")),
];

#[derive(FromArgs)]
/// What is on this node: each SCSI disk, what it holds, where it is mounted, whose volume it is, and what does not fit together.
/// Reads only, and needs no running agent.
struct StatusArgs {
    /// one JSON object instead of text
    #[argh(switch)]
    json: bool,
    /// as the agent's [NODE_NAME]
    #[argh(option, default = "String::new()")]
    node_id: String,
    /// as the agent's [VMID]
    #[argh(option)]
    vmid: Option<u32>,
    /// as the agent's [REGION]
    #[argh(option)]
    region: Option<String>,
    /// as the agent's [ZONE]
    #[argh(option)]
    zone: Option<String>,
    /// as the agent's [MAX_VOLUME_ATTACHMENTS]
    #[argh(option)]
    max_volume_attachments: Option<String>,
    /// as the agent's [LABELS_FILE]
    #[argh(option)]
    labels_file: Option<PathBuf>,
    /// as the agent's [KUBELET_DIR]
    #[argh(option)]
    kubelet_dir: Vec<PathBuf>,
}

#[derive(FromArgs)]
/// Confines this process as the agent confines itself, tries what must not work, and says how it went; fails if anything was let through.
struct ConfinementArgs {}

fn main() -> ExitCode {
    let given: Vec<String> = std::env::args().skip(1).collect();
    let done = match given.split_first() {
        Some((word, rest)) if word == "status" => status(rest),
        Some((word, rest)) if word == "confinement" => confinement(rest),
        _ => begin(&given),
    };
    match done {
        Ok(code) => code,
        Err(sentence) => {
            proto::error!("{sentence}");
            ExitCode::FAILURE
        }
    }
}

/// The arguments, or what is to be printed instead (help).
fn parsed<T: FromArgs>(command: &[&str], given: &[String], flags: &[Flag]) -> Result<Result<T, String>, String> {
    let given = proto::flags::normalise(given, flags, |name| std::env::var(name).ok())?;
    let given: Vec<&str> = given.iter().map(String::as_str).collect();
    match T::from_args(command, &given) {
        Ok(args) => Ok(Ok(args)),
        Err(early) if early.status.is_ok() => Ok(Err(early.output)),
        Err(early) => Err(early.output.trim().to_string()),
    }
}

fn begin(given: &[String]) -> Result<ExitCode, String> {
    let args: Args = match parsed(&["proxmox-csi-node"], given, FLAGS)? {
        Ok(args) => args,
        Err(help) => return Ok(said(&help)),
    };
    if args.version {
        return Ok(said(concat!("proxmox-csi-node ", env!("CARGO_PKG_VERSION"))));
    }
    proto::log::set_level(&args.verbosity)?;
    proto::log::set_format(&args.log_format)?;
    run(args)?;
    Ok(ExitCode::SUCCESS)
}

fn status(given: &[String]) -> Result<ExitCode, String> {
    let args: StatusArgs = match parsed(&["proxmox-csi-node", "status"], given, STATUS_FLAGS)? {
        Ok(args) => args,
        Err(help) => return Ok(said(&help)),
    };
    for wrong in confine() {
        proto::warn!("{wrong}");
    }
    let kubelet = if args.kubelet_dir.is_empty() { vec![KUBELET.into()] } else { args.kubelet_dir };
    let machine = Machine { sysfs: "/sys".into(), proc: "/proc".into(), devices: "/dev".into(), kubelet };
    let configured = Configured {
        node_id: args.node_id,
        vmid: args.vmid,
        region: args.region,
        zone: args.zone,
        max_volumes: args.max_volume_attachments,
        labels: args.labels_file,
    };
    let report = node::status::look(&machine, &configured).map_err(|error| format!("status: {error}"))?;
    Ok(said(&if args.json { report.json() } else { report.text() }))
}

fn confinement(given: &[String]) -> Result<ExitCode, String> {
    let _: ConfinementArgs = match parsed(&["proxmox-csi-node", "confinement"], given, &[])? {
        Ok(args) => args,
        Err(help) => return Ok(said(&help)),
    };
    let mut lines: Vec<String> = confine();
    lines.extend(confine::KEPT.iter().map(|(_, name, what_for)| format!("kept     CAP_{name}: {what_for}")));
    let attempts = confine::attempts();
    let let_through = attempts.iter().filter(|attempt| attempt.refused.is_none()).count();
    let verdict = |attempt: &confine::Attempt| if attempt.refused.is_some() { "refused" } else { "LET THROUGH" };
    lines.extend(attempts.iter().map(|attempt| format!("{:8} {}", verdict(attempt), attempt.what)));
    let _ = said(&lines.join("\n"));
    if let_through == 0 { Ok(ExitCode::SUCCESS) } else { Err(format!("confinement: {let_through} of {} were let through", attempts.len())) }
}

/// On standard output; one that is closed is no reason to fail.
fn said(text: &str) -> ExitCode {
    use std::io::Write;
    let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
    ExitCode::SUCCESS
}

fn run(args: Args) -> Result<(), String> {
    let endpoint: Endpoint = args.csi_address.parse()?;
    if let Some(vmid) = args.vmid.filter(|vmid| !info::is_vmid(vmid)) {
        return Err(format!("--vmid {vmid} is no VMID: Proxmox numbers VMs from 100 to 999999999"));
    }
    let folders = if args.kubelet_dir.is_empty() { vec![KUBELET.into()] } else { args.kubelet_dir };
    let own_folder = folders.first().map(|folder| folder.join("plugins").join(proto::DRIVER_NAME).join("csi.sock"));
    let csi_socket = args.kubelet_registration_path.or(own_folder).unwrap_or_default();
    let kubelet = args.plugin_registration_path.map(|folder| Kubelet { folder, csi_socket });
    let folders = Folders::new(folders)?;
    let configured = Configured {
        node_id: args.node_id,
        vmid: args.vmid,
        region: args.region,
        zone: args.zone,
        max_volumes: args.max_volume_attachments,
        labels: args.labels_file,
    };
    // Before the confinement, which allows no socket but unix ones.
    let pages = args.metrics_address.as_deref().map(health::listen).transpose()?;
    for wrong in confine().into_iter().chain(kernel::missing(Path::new("/proc"), Path::new("/sys"))) {
        proto::warn!("{wrong}");
    }
    let beside_socket = endpoint.path().parent().unwrap_or(Path::new("/"));
    let node = Arc::new(Node::new(folders).called(&configured.node_id).remembering_in(beside_socket));
    node.forget_keys();
    node.recall_rotations();
    if args.kubeconfig.is_some() || args.master.is_some() {
        proto::info!("--kubeconfig and --master are not used by this version");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MAX_THREADS)
        .thread_keep_alive(THREAD_IDLE)
        .build()
        .map_err(|cause| format!("start: {cause}"))?;
    let served = runtime.block_on(serve(&endpoint, node, configured, kubelet, pages));
    runtime.shutdown_timeout(LAST_WORK);
    served
}

/// Serves until SIGTERM: the CSI socket, kubelet's registration where it is ours to do, and the pages where there is an address.
async fn serve(
    endpoint: &Endpoint,
    node: Arc<Node>,
    configured: Configured,
    kubelet: Option<Kubelet>,
    pages: Option<std::net::TcpListener>,
) -> Result<(), String> {
    let socket = Socket::open(endpoint.path()).map_err(|error| error.to_string())?;
    let (stopping, stop) = watch::channel(false);
    let stop_work = node.stop();
    tokio::spawn(async move {
        match terminated().await {
            Ok(()) => {
                stop_work.request();
                let _ = stopping.send(true);
            }
            Err(cause) => {
                proto::error!("signals: {cause}");
                // Kept: without it, everything that waits for the end would take it for reached.
                std::future::pending::<()>().await;
                drop(stopping);
            }
        }
    });
    let standing = Standing::default();
    let (identity, sysfs) = (configured.clone(), node.sysfs().to_path_buf());
    let known = move || info::look(&identity, &sysfs).map(drop).map_err(|unknown| unknown.to_string());
    let registering = tokio::spawn(registration::run(kubelet, known, standing.clone(), stop.clone()));
    if let Some(listener) = pages {
        let (place, is_ready) = (socket.place(), standing.clone());
        let nothing = String::new;
        let alive = move || if place.is_ours() { Ok(nothing()) } else { Err(format!("{} is not ours any more", place.path().display())) };
        let looked_at = Arc::clone(&node);
        let metrics = move || metrics::page(is_ready.get().is_ok(), looked_at.stuck(), looked_at.rotations_outstanding());
        let ready = move || standing.get().map(|()| nothing());
        let metrics_path = "/metrics".into();
        let pages = Pages { alive: Arc::new(alive), ready: Arc::new(ready), metrics_path, metrics: Arc::new(metrics) };
        let address = listener.local_addr().map_err(|cause| format!("metrics address: {cause}"))?;
        proto::info!("/healthz, /readyz and /metrics on {address}");
        tokio::spawn(health::serve(listener, pages));
    }
    let mut until = stop.clone();
    let until = async { drop(until.wait_for(|stop| *stop).await) };
    tokio::spawn(trim(Arc::clone(&node), stop));
    let service = Service::new(node, configured).server();
    let served = socket.serve(with_identity(Identity::new(env!("CARGO_PKG_VERSION")), service), until, DRAIN).await;
    let _ = registering.await;
    served.map_err(|error| error.to_string())
}

/// Gives back what volumes do not use any more, each once a week, until the end.
async fn trim(node: Arc<Node>, mut stop: watch::Receiver<bool>) {
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let pause = node::trim::pause(kill::limit("TRIM", node::trim::PERIOD));
    let mut before = now();
    while tokio::time::timeout(pause, stop.wait_for(|stop| *stop)).await.is_err() {
        let (node, from, to) = (Arc::clone(&node), before, now());
        // A filesystem that does not answer keeps the trimmer waiting, and nobody else.
        let _ = aside(Box::new(move || node.trim_due(from, to))).await;
        before = to;
    }
}
