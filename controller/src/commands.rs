//! What a person runs beside the controller, in its pod or elsewhere: it reads, prints, and ends.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use argh::FromArgs;
use controller::look::{check, labels};
use controller::run::Controller;
use proto::VolumeHandle;
use proto::flags::Flag;

use crate::{Parsed, access, ca_bundle, parsed, reading, runtime};

const HOLDERS_FLAGS: &[Flag] =
    &[Flag::value("cloud-config", Some("CLOUD_CONFIG")), Flag::value("kubeconfig", Some("KUBECONFIG")), Flag::switch("json")];

/// Who holds which volume: each drive of ours in each VM, read now. Reads only, and needs no running controller.
#[derive(FromArgs)]
struct HoldersArguments {
    /// one volume's handle, as in its PV: REGION/ZONE/STORAGE/DISK; default: all of ours
    #[argh(positional)]
    volume: Option<String>,
    /// the clusters file (CLOUD_CONFIG)
    #[argh(option, default = "PathBuf::from(crate::CONFIG)")]
    cloud_config: PathBuf,
    /// outside of a pod: the Kubernetes API, by a kubeconfig with a token (KUBECONFIG)
    #[argh(option)]
    kubeconfig: Option<String>,
    /// one JSON object instead of text
    #[argh(switch)]
    json: bool,
}

/// `proxmox-csi-controller holders [VOLUME] [--json]`: fails where something could not be read.
pub(crate) fn holders(given: &[String]) -> anyhow::Result<ExitCode> {
    let arguments: HoldersArguments = match parsed(&["proxmox-csi-controller", "holders"], given, HOLDERS_FLAGS)? {
        Parsed::Arguments(arguments) => arguments,
        Parsed::Help(help) => return said(&help),
    };
    proto::log::set_level("error").map_err(anyhow::Error::msg)?;
    let volume = arguments.volume.map(|volume| volume.parse::<VolumeHandle>().with_context(|| format!("volume {volume:?}"))).transpose()?;
    let kube = reading(arguments.kubeconfig.as_deref()).map_err(anyhow::Error::msg)?;
    let controller = Controller::with_kube(arguments.cloud_config, ca_bundle(), kube);
    let found = runtime()?.block_on(controller.holders(volume.as_ref())).map_err(|error| anyhow::Error::msg(error.text))?;
    said(&if arguments.json { found.json() } else { found.text() })?;
    Ok(if found.unread.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// `proxmox-csi-controller --check`: fails where something is wrong.
pub(crate) fn check(config: PathBuf, kubeconfig: Option<&str>) -> anyhow::Result<ExitCode> {
    proto::log::set_level("error").map_err(anyhow::Error::msg)?;
    let kube = reading(kubeconfig);
    let report = runtime()?.block_on(check::check(config, ca_bundle(), kube));
    said(&report.to_string())?;
    Ok(if report.count_wrong() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

const LABELS_FLAGS: &[Flag] =
    &[Flag::value("node-name", Some("NODE_NAME")), Flag::value("to", None), Flag::value("kubeconfig", Some("KUBECONFIG"))];

/// Writes a Kubernetes Node's labels into a file, as the node agent's --labels-file reads them: for an init container of its pod, where
/// Kubernetes is older than 1.35.
#[derive(FromArgs)]
struct LabelsArguments {
    /// the Node (NODE_NAME)
    #[argh(option)]
    node_name: String,
    /// the file
    #[argh(option)]
    to: PathBuf,
    /// outside of a pod: the Kubernetes API, by a kubeconfig with a token (KUBECONFIG)
    #[argh(option)]
    kubeconfig: Option<String>,
}

/// `proxmox-csi-controller node-labels --node-name N --to FILE`: fails where the Node does not say its place yet; kubelet repeats it then.
pub(crate) fn node_labels(given: &[String]) -> anyhow::Result<ExitCode> {
    let arguments: LabelsArguments = match parsed(&["proxmox-csi-controller", "node-labels"], given, LABELS_FLAGS)? {
        Parsed::Arguments(arguments) => arguments,
        Parsed::Help(help) => return said(&help),
    };
    let Some(access) = access(arguments.kubeconfig.as_deref()).map_err(anyhow::Error::msg)? else {
        bail!("no Kubernetes API: give the pod its account's token, or name a --kubeconfig");
    };
    let kube = std::sync::Arc::new(controller::kube::Kube::new(access).map_err(anyhow::Error::msg)?);
    let text = runtime()?.block_on(labels::read(&kube, &arguments.node_name)).map_err(anyhow::Error::msg)?;
    labels::write(&arguments.to, &text).map_err(anyhow::Error::msg)?;
    Ok(ExitCode::SUCCESS)
}

/// On standard output; one that is closed is no reason to fail.
fn said(text: &str) -> anyhow::Result<ExitCode> {
    let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
    Ok(ExitCode::SUCCESS)
}
