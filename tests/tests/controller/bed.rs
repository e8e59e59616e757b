//! A simulated cluster and a controller on it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use controller::run::Controller;
use controller::service::ControllerService;
use proto::VolumeHandle;
use proto::csi::controller_server::Controller as _;
use proto::csi::volume_capability::{AccessMode, AccessType, MountVolume, access_mode::Mode};
use proto::csi::{self, VolumeCapability};
use testbed::sim::{Builder, Description, Node, STANDARD_SECRET, Simulator, Storage, Version, Vm};
use tonic::{Code, Request, Status};

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const REGION: &str = "fsn1";

static BEDS: AtomicU32 = AtomicU32::new(0);

pub(crate) struct Bed {
    pub(crate) sim: Arc<Simulator>,
    pub(crate) csi: ControllerService,
    pub(crate) config: PathBuf,
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(self.config.parent().unwrap());
    }
}

/// One host `pve1`, VMs 101 and 102.
pub(crate) async fn standard() -> Bed {
    start(Simulator::standard()).await
}

/// Hosts `pve1` (VMs 101, 102) and `pve2` (VM 201), storage `ds` on both.
pub(crate) async fn two_hosts() -> Bed {
    start(Simulator::builder(two_hosts_description())).await
}

pub(crate) fn two_hosts_description() -> Description {
    Description::standard().node(Node::online("pve2")).vm(Vm::linux(201, "pve2", "node-201", None)).storage(Storage::new(
        "ds",
        "dir",
        &[("path", "/ds")],
    ))
}

/// The release of Proxmox VE that the beds simulate, by `PROXMOX_CSI_SIM_RELEASE` (`8.2`); scripts/test goes through all.
pub(crate) fn release() -> Version {
    let release = std::env::var("PROXMOX_CSI_SIM_RELEASE").ok().filter(|release| !release.is_empty());
    release.map_or_else(Version::default, |release| release.parse().expect("a release that the simulator knows"))
}

pub(crate) async fn start(builder: Builder) -> Bed {
    start_as_it_is(builder.version(release())).await
}

pub(crate) async fn start_as_it_is(builder: Builder) -> Bed {
    let sim = Arc::new(builder.start().await.unwrap());
    let text = clusters(sim.url());
    with_config(sim, &text)
}

pub(crate) fn clusters(url: &str) -> String {
    format!("clusters:\n  - url: {url}\n    region: {REGION}\n    token_id: csi@pve!csi\n    token_secret: \"{STANDARD_SECRET}\"\n")
}

pub(crate) fn with_config(sim: Arc<Simulator>, text: &str) -> Bed {
    let folder = std::env::temp_dir().join(format!("pve-csi-bed-{}-{}", std::process::id(), BEDS.fetch_add(1, Ordering::Relaxed)));
    std::fs::create_dir_all(&folder).unwrap();
    let config = folder.join("config.yaml");
    std::fs::write(&config, text).unwrap();
    let csi = ControllerService::new(Arc::new(Controller::new(config.clone(), None)));
    Bed { sim, csi, config }
}

pub(crate) fn capability(mode: Mode) -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode { mode: mode.into() }),
        access_type: Some(AccessType::Mount(MountVolume { fs_type: "ext4".into(), ..Default::default() })),
    }
}

pub(crate) fn create_request(name: &str, storage: &str, bytes: u64) -> csi::CreateVolumeRequest {
    csi::CreateVolumeRequest {
        name: name.into(),
        capacity_range: Some(csi::CapacityRange { required_bytes: i64::try_from(bytes).unwrap(), limit_bytes: 0 }),
        volume_capabilities: vec![capability(Mode::SingleNodeWriter)],
        parameters: HashMap::from([("storage".to_string(), storage.to_string())]),
        ..Default::default()
    }
}

pub(crate) fn topology(zones: &[&str]) -> Option<csi::TopologyRequirement> {
    let one = |zone: &&str| csi::Topology {
        segments: HashMap::from([
            (proto::TOPOLOGY_REGION.to_string(), REGION.to_string()),
            (proto::TOPOLOGY_ZONE.to_string(), (*zone).to_string()),
        ]),
    };
    Some(csi::TopologyRequirement { requisite: zones.iter().map(one).collect(), preferred: vec![] })
}

impl Bed {
    pub(crate) async fn create_as(&self, request: csi::CreateVolumeRequest) -> Result<csi::Volume, Status> {
        Ok(self.csi.create_volume(Request::new(request)).await?.into_inner().volume.unwrap())
    }

    /// A volume of 64 MiB on `storage`.
    pub(crate) async fn volume(&self, name: &str, storage: &str) -> VolumeHandle {
        self.create_as(create_request(name, storage, 64 * MIB)).await.unwrap().volume_id.parse().unwrap()
    }

    /// The same in a zone.
    pub(crate) async fn volume_on(&self, name: &str, storage: &str, zone: &str) -> VolumeHandle {
        let request = csi::CreateVolumeRequest { accessibility_requirements: topology(&[zone]), ..create_request(name, storage, 64 * MIB) };
        self.create_as(request).await.unwrap().volume_id.parse().unwrap()
    }

    pub(crate) async fn publish(&self, volume: &VolumeHandle, node: &str) -> Result<HashMap<String, String>, Status> {
        self.publish_as(publish_request(volume, node)).await
    }

    pub(crate) async fn publish_as(&self, request: csi::ControllerPublishVolumeRequest) -> Result<HashMap<String, String>, Status> {
        Ok(self.csi.controller_publish_volume(Request::new(request)).await?.into_inner().publish_context)
    }

    pub(crate) async fn unpublish(&self, volume: &VolumeHandle, node: &str) -> Result<(), Status> {
        let request = csi::ControllerUnpublishVolumeRequest { volume_id: volume.to_string(), node_id: node.into(), ..Default::default() };
        self.csi.controller_unpublish_volume(Request::new(request)).await.map(drop)
    }

    pub(crate) async fn delete(&self, volume_id: &str) -> Result<(), Status> {
        let request = csi::DeleteVolumeRequest { volume_id: volume_id.into(), ..Default::default() };
        self.csi.delete_volume(Request::new(request)).await.map(drop)
    }

    pub(crate) async fn expand(&self, volume_id: &str, required: u64, limit: u64) -> Result<csi::ControllerExpandVolumeResponse, Status> {
        let range = csi::CapacityRange { required_bytes: i64::try_from(required).unwrap(), limit_bytes: i64::try_from(limit).unwrap() };
        let request = csi::ControllerExpandVolumeRequest { volume_id: volume_id.into(), capacity_range: Some(range), ..Default::default() };
        Ok(self.csi.controller_expand_volume(Request::new(request)).await?.into_inner())
    }

    /// Drives of a VM that are configured, planned or plugged, and name the volume.
    pub(crate) fn traces(&self, vmid: u32, volume: &VolumeHandle) -> Vec<String> {
        let vm = self.sim.vm(vmid).unwrap();
        let volid = volume.volid();
        let names = |line: &str| line == volid || line.starts_with(&format!("{volid},"));
        let configured = vm.config.iter().filter(|(_, line)| names(line)).map(|(key, _)| format!("configured {key}"));
        let planned = vm.pending.iter().filter(|(_, line)| names(line)).map(|(key, _)| format!("planned {key}"));
        let plugged = vm.plugged.iter().filter(|(_, drive)| drive.volid == volid).map(|(key, _)| format!("plugged {key}"));
        configured.chain(planned).chain(plugged).collect()
    }

    /// Requests since the counters were reset, without task polls and what decision 5 reads: the cluster, node lists,
    /// privileges and VMs other than `vmid`.
    pub(crate) fn own_requests(&self, vmid: u32) -> Vec<String> {
        let of_vm = format!("/qemu/{vmid}/");
        let counts = |request: &&String| {
            let evidence = ["/cluster/resources", "/qemu?full=1", "/access/permissions", "/cluster/status", "/tasks/", "/tasks?"];
            !evidence.iter().any(|part| request.contains(part)) && (!request.contains("/qemu/") || request.contains(&of_vm))
        };
        self.sim.requests().iter().filter(counts).cloned().collect()
    }
}

pub(crate) fn publish_request(volume: &VolumeHandle, node: &str) -> csi::ControllerPublishVolumeRequest {
    csi::ControllerPublishVolumeRequest {
        volume_id: volume.to_string(),
        node_id: node.into(),
        volume_capability: Some(capability(Mode::SingleNodeWriter)),
        ..Default::default()
    }
}

/// The error has this code and all of these words.
#[track_caller]
pub(crate) fn assert_refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, words: &[&str]) {
    let status = answer.expect_err("a refusal");
    assert_eq!(status.code(), code, "{}", status.message());
    for word in words {
        assert!(status.message().contains(word), "{:?} lacks {word:?}", status.message());
    }
}
