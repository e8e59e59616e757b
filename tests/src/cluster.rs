//! All of it together: the simulator, the controller's release binary on this host, and guests with the node agent's release
//! binary in them, registered as the machines of the simulated VMs. A simulated attach is a real SCSI hot-plug.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use proto::csi;
use tonic::Status;

use crate::calls::{self, Calls, NodeVolume};
use crate::controller::Controller;
use crate::guest::{Guest, GuestOptions, Job};
use crate::kube::Kubernetes;
use crate::sim::{Description, Latency, Simulator, Time, Version};

/// A Lease that was given back.
const LEASE_LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, Clone)]
pub struct ClusterOptions {
    /// Which of the described VMs are guests; the first is `nodes[0]`.
    pub guests: Vec<u32>,
    pub memory_mib: u32,
    /// Files for every guest: (path there, file here).
    pub files: Vec<(String, PathBuf)>,
    pub description: Description,
    pub version: Version,
    /// What Proxmox takes beside what is really done.
    pub latency: Latency,
    /// The filesystem that its volumes are asked for with.
    pub fs_type: &'static str,
    /// The controller has a Kubernetes API, which knows the guests as nodes.
    pub kubernetes: bool,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        let (version, latency) = (Version::default(), Latency::NONE);
        let (description, fs_type) = (Description::standard(), "ext4");
        Self { guests: vec![101, 102], memory_mib: 256, files: Vec::new(), description, version, latency, fs_type, kubernetes: false }
    }
}

/// One VM with its node agent.
#[derive(Debug)]
pub struct ClusterNode {
    pub vmid: u32,
    /// What the agent says of itself, `<name>/<vmid>`.
    pub node_id: String,
    pub guest: Guest,
    pub agent: Job,
    pub calls: Calls,
    /// The agent's answer to NodeGetInfo.
    pub topology: csi::Topology,
}

/// Ends with its value: controller, guests, simulator, folder.
#[derive(Debug)]
pub struct Cluster {
    pub controller: Controller,
    pub nodes: Vec<ClusterNode>,
    pub sim: Simulator,
    /// Where it was asked for.
    pub kubernetes: Option<Kubernetes>,
    capability: csi::VolumeCapability,
    folder: Folder,
}

impl Cluster {
    /// Starts all of it, the guests at once; every agent and the controller have answered when it returns.
    pub fn start(options: &ClusterOptions) -> Result<Self> {
        let folder = Folder::new()?;
        let builder = Simulator::builder(options.description.clone()).version(options.version).latency(options.latency).time(Time::Real);
        let sim = calls::runtime().block_on(builder.start()).context("start the simulator")?;
        let region = options.description.cluster.clone();
        let vms: Vec<(u32, String, String)> = options.guests.iter().map(|vmid| described(options, *vmid)).collect::<Result<_>>()?;
        let guests = vms.iter().map(|(vmid, name, _)| GuestOptions {
            memory_mib: options.memory_mib,
            files: options.files.clone(),
            // As Proxmox' `smbios1` carries it: the agent finds its VMID there.
            smbios_serial: Some(format!("h={name};i={vmid}")),
            ..GuestOptions::named(name)
        });
        let guests = Guest::boot_all(&guests.map(GuestOptions::with_node).collect::<Vec<_>>())?;
        let mut nodes = Vec::new();
        for (guest, (vmid, name, zone)) in guests.into_iter().zip(vms) {
            sim.register_machine(vmid, guest.machine());
            nodes.push(ClusterNode::start(vmid, &name, &region, &zone, guest)?);
        }
        let kubernetes = if options.kubernetes { Some(calls::runtime().block_on(Kubernetes::start())?) } else { None };
        let controller = match &kubernetes {
            None => Controller::start(&folder.0, &clusters(&sim, &region))?,
            Some(kubernetes) => {
                // Given back: nothing of a holder before is waited for.
                kubernetes.give_lease_to("");
                nodes.iter().for_each(|node| kubernetes.node(node.node_id.split('/').next().unwrap_or_default(), &node.node_id));
                let controller = Controller::stand_by(&folder.0, &clusters(&sim, &region), &kubernetes.kubeconfig(&folder.0)?)?;
                ensure!(controller.acts_within(LEASE_LIMIT)?, "the controller does not act: {}", controller.quote());
                controller
            }
        };
        Ok(Self { controller, nodes, sim, kubernetes, capability: calls::mount_capability(options.fs_type), folder })
    }

    /// Where the controller's files are.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder.0
    }

    /// Creates a volume of the class `parameters` as the provisioner does for a pod that is to run on `node`.
    pub fn create(&self, name: &str, size_bytes: i64, parameters: &[(&str, &str)], node: &ClusterNode) -> Result<csi::Volume, Status> {
        let topology = vec![node.topology.clone()];
        let answer = self.controller.calls().create_volume(csi::CreateVolumeRequest {
            name: name.into(),
            capacity_range: Some(csi::CapacityRange { required_bytes: size_bytes, limit_bytes: 0 }),
            volume_capabilities: vec![self.capability.clone()],
            parameters: parameters.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect(),
            accessibility_requirements: Some(csi::TopologyRequirement { requisite: topology.clone(), preferred: topology }),
            ..Default::default()
        })?;
        answer.volume.ok_or_else(|| Status::internal("test bed: CreateVolume answered no volume"))
    }

    /// Attaches a volume; what the node is to be told of it.
    pub fn attach(&self, volume: &csi::Volume, name: &str, node: &ClusterNode) -> Result<NodeVolume, Status> {
        let answer = self.controller.calls().controller_publish_volume(csi::ControllerPublishVolumeRequest {
            volume_id: volume.volume_id.clone(),
            node_id: node.node_id.clone(),
            volume_capability: Some(self.capability.clone()),
            volume_context: volume.volume_context.clone(),
            ..Default::default()
        })?;
        let node_volume = NodeVolume::new(&volume.volume_id, name, answer.publish_context, volume.volume_context.clone());
        Ok(NodeVolume { capability: self.capability.clone(), ..node_volume })
    }

    pub fn detach(&self, volume: &csi::Volume, node: &ClusterNode) -> Result<(), Status> {
        let request = csi::ControllerUnpublishVolumeRequest {
            volume_id: volume.volume_id.clone(),
            node_id: node.node_id.clone(),
            secrets: HashMap::new(),
        };
        self.controller.calls().controller_unpublish_volume(request).map(drop)
    }

    pub fn expand(&self, volume: &csi::Volume, size_bytes: i64) -> Result<csi::ControllerExpandVolumeResponse, Status> {
        self.controller.calls().controller_expand_volume(csi::ControllerExpandVolumeRequest {
            volume_id: volume.volume_id.clone(),
            capacity_range: Some(csi::CapacityRange { required_bytes: size_bytes, limit_bytes: 0 }),
            volume_capability: Some(self.capability.clone()),
            ..Default::default()
        })
    }

    pub fn delete(&self, volume: &csi::Volume) -> Result<(), Status> {
        let request = csi::DeleteVolumeRequest { volume_id: volume.volume_id.clone(), secrets: HashMap::new() };
        self.controller.calls().delete_volume(request).map(drop)
    }
}

impl ClusterNode {
    fn start(vmid: u32, name: &str, region: &str, zone: &str, guest: Guest) -> Result<Self> {
        let args =
            ["--csi-address=unix:///csi/csi.sock", &format!("--node-id={name}"), &format!("--region={region}"), &format!("--zone={zone}")];
        let agent = guest.start_node(&args, &[])?;
        let calls = guest.node()?;
        let info = calls.node_get_info(csi::NodeGetInfoRequest {}).map_err(|status| anyhow!("node {name}: NodeGetInfo: {status:?}"))?;
        let topology = info.accessible_topology.with_context(|| format!("node {name} names no topology"))?;
        ensure!(info.node_id == format!("{name}/{vmid}"), "node {name} calls itself {:?}: its SMBIOS serial says i={vmid}", info.node_id);
        Ok(Self { vmid, node_id: info.node_id, guest, agent, calls, topology })
    }

    /// Makes the folders that kubelet makes before it calls the node.
    pub fn prepare(&self, volume: &NodeVolume) -> Result<()> {
        let parent = Path::new(&volume.target).parent().context("the target has no parent")?;
        self.guest.make_folder(&volume.staging)?;
        self.guest.make_folder(&parent.display().to_string())
    }
}

/// VMID, name and Proxmox node of a described VM.
fn described(options: &ClusterOptions, vmid: u32) -> Result<(u32, String, String)> {
    let vm = options.description.vms.iter().find(|vm| vm.vmid == vmid).with_context(|| format!("no VM {vmid} is described"))?;
    let name = vm.config.get("name").cloned().unwrap_or_else(|| format!("node-{vmid}"));
    Ok((vmid, name, vm.node.clone()))
}

/// The clusters file, as the reference driver reads it.
fn clusters(sim: &Simulator, region: &str) -> String {
    let token = sim.token();
    let (id, secret) = token.split_once('=').unwrap_or_default();
    format!(
        "clusters:\n  - url: {}\n    insecure: false\n    token_id: \"{id}\"\n    token_secret: \"{secret}\"\n    region: {region}\n",
        sim.url()
    )
}

/// Removed with its value, unless a test fails.
#[derive(Debug)]
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        crate::folder::new("csi-cluster-", "").map(Self)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if std::thread::panicking() || std::env::var_os("PROXMOX_CSI_KEEP_LOGS").is_some() {
            crate::folder::keep(&self.0);
            eprintln!("the controller's log is kept in {}", self.0.display());
        } else {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}
