//! CSI calls as a sidecar or kubelet makes them, one at a time, each with a deadline; and one volume's requests to the node.

use std::collections::HashMap;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result};
use proto::csi::controller_client::ControllerClient;
use proto::csi::identity_client::IdentityClient;
use proto::csi::node_client::NodeClient;
use proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume, access_mode::Mode};
use proto::csi::{self, VolumeCapability};
use proto::{VolumeHandle, publish_context, volume_context};
use tokio::runtime::Runtime;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

/// The sidecars give a call 15 s to some minutes; under TCG a node's call can take a good part of that.
const CALL_LIMIT: Duration = Duration::from_secs(180);

/// For the connections of all [`Calls`]; the calls themselves block.
pub(crate) fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    #[allow(clippy::expect_used, reason = "without threads no test runs")]
    RUNTIME.get_or_init(|| tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("start tokio"))
}

/// One CSI endpoint: a node's, or the controller's. Connects at the first call, and anew when the peer was started again.
#[derive(Debug, Clone)]
pub struct Calls {
    channel: Channel,
}

macro_rules! rpcs {
    ($($client:ident $rpc:ident($request:ident) -> $response:ident;)*) => {
        impl Calls {
            $(
                #[doc = concat!("`", stringify!($request), "`, within three minutes.")]
                pub fn $rpc(&self, request: csi::$request) -> Result<csi::$response, Status> {
                    let mut client = $client::new(self.channel.clone());
                    runtime().block_on(async {
                        match tokio::time::timeout(CALL_LIMIT, client.$rpc(request)).await {
                            Ok(answer) => answer.map(tonic::Response::into_inner),
                            Err(_) => {
                                let limit = CALL_LIMIT.as_secs();
                                Err(Status::deadline_exceeded(format!("test bed: no answer to {} within {limit} s", stringify!($rpc))))
                            }
                        }
                    })
                }
            )*
        }
    };
}

rpcs! {
    IdentityClient get_plugin_info(GetPluginInfoRequest) -> GetPluginInfoResponse;
    IdentityClient get_plugin_capabilities(GetPluginCapabilitiesRequest) -> GetPluginCapabilitiesResponse;
    IdentityClient probe(ProbeRequest) -> ProbeResponse;
    ControllerClient create_volume(CreateVolumeRequest) -> CreateVolumeResponse;
    ControllerClient delete_volume(DeleteVolumeRequest) -> DeleteVolumeResponse;
    ControllerClient controller_publish_volume(ControllerPublishVolumeRequest) -> ControllerPublishVolumeResponse;
    ControllerClient controller_unpublish_volume(ControllerUnpublishVolumeRequest) -> ControllerUnpublishVolumeResponse;
    ControllerClient controller_expand_volume(ControllerExpandVolumeRequest) -> ControllerExpandVolumeResponse;
    ControllerClient validate_volume_capabilities(ValidateVolumeCapabilitiesRequest) -> ValidateVolumeCapabilitiesResponse;
    ControllerClient get_capacity(GetCapacityRequest) -> GetCapacityResponse;
    ControllerClient controller_get_capabilities(ControllerGetCapabilitiesRequest) -> ControllerGetCapabilitiesResponse;
    NodeClient node_stage_volume(NodeStageVolumeRequest) -> NodeStageVolumeResponse;
    NodeClient node_unstage_volume(NodeUnstageVolumeRequest) -> NodeUnstageVolumeResponse;
    NodeClient node_publish_volume(NodePublishVolumeRequest) -> NodePublishVolumeResponse;
    NodeClient node_unpublish_volume(NodeUnpublishVolumeRequest) -> NodeUnpublishVolumeResponse;
    NodeClient node_get_volume_stats(NodeGetVolumeStatsRequest) -> NodeGetVolumeStatsResponse;
    NodeClient node_expand_volume(NodeExpandVolumeRequest) -> NodeExpandVolumeResponse;
    NodeClient node_get_capabilities(NodeGetCapabilitiesRequest) -> NodeGetCapabilitiesResponse;
    NodeClient node_get_info(NodeGetInfoRequest) -> NodeGetInfoResponse;
}

impl Calls {
    fn lazily(uri: String) -> Result<Self> {
        let _inside = runtime().enter();
        let channel = Endpoint::from_shared(uri.clone()).with_context(|| format!("endpoint {uri}"))?.connect_lazy();
        Ok(Self { channel })
    }

    /// A socket on this host.
    pub fn unix(socket: &Path) -> Result<Self> {
        Self::lazily(format!("unix://{}", socket.display()))
    }

    /// A port of this host: a guest's node.
    pub fn port(port: u16) -> Result<Self> {
        Self::lazily(format!("http://127.0.0.1:{port}"))
    }

    /// The end of a call that is not CSI's, within three minutes.
    pub fn wait<T>(&self, call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
        let late = |_| Status::deadline_exceeded(format!("test bed: no answer within {} s", CALL_LIMIT.as_secs()));
        runtime().block_on(async { tokio::time::timeout(CALL_LIMIT, call).await.map_err(late)? })
    }

    /// For what the blocking calls do not do (several at once).
    #[must_use]
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }
}

/// One writer; `fs_type` may be empty.
#[must_use]
pub fn mount_capability(fs_type: &str) -> VolumeCapability {
    let mount = MountVolume { fs_type: fs_type.into(), ..MountVolume::default() };
    capability(AccessType::Mount(mount))
}

/// One writer, the device itself.
#[must_use]
pub fn block_capability() -> VolumeCapability {
    capability(AccessType::Block(BlockVolume {}))
}

fn capability(access: AccessType) -> VolumeCapability {
    VolumeCapability { access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }), access_type: Some(access) }
}

/// One volume as kubelet tells a node about it.
#[derive(Debug, Clone)]
pub struct NodeVolume {
    pub id: String,
    pub publish_context: HashMap<String, String>,
    pub volume_context: HashMap<String, String>,
    pub capability: VolumeCapability,
    /// Of stage and expand.
    pub secrets: HashMap<String, String>,
    pub staging: String,
    pub target: String,
}

impl NodeVolume {
    /// Paths as kubelet makes them, by `name`; contexts as the controller gave them.
    #[must_use]
    pub fn new(id: &str, name: &str, publish: HashMap<String, String>, volume: HashMap<String, String>) -> Self {
        Self {
            id: id.into(),
            publish_context: publish,
            volume_context: volume,
            capability: mount_capability("ext4"),
            secrets: HashMap::new(),
            staging: format!("/var/lib/kubelet/plugins/kubernetes.io/csi/{}/{name}/globalmount", proto::DRIVER_NAME),
            target: format!("/var/lib/kubelet/pods/{name}/volumes/kubernetes.io~csi/{name}/mount"),
        }
    }

    /// A provisioned volume whose storage reads as zeros, attached by our controller at slot `lun`.
    #[must_use]
    pub fn attached(handle: &VolumeHandle, name: &str, lun: u8, size_bytes: u64) -> Self {
        let publish = [
            (publish_context::DEVICE_PATH, format!("/dev/disk/by-id/wwn-{}", proto::wwn_of_lun(lun))),
            (publish_context::LUN, lun.to_string()),
            (publish_context::SERIAL, handle.serial()),
            (publish_context::ZEROED, "1".to_string()),
            (publish_context::SIZE_BYTES, size_bytes.to_string()),
        ];
        let volume = [(volume_context::PROVISIONER_IDENTITY, "test"), (volume_context::CONTENT_SOURCE, "none")];
        Self::new(
            &handle.to_string(),
            name,
            publish.map(|(key, value)| (key.to_string(), value)).into(),
            volume.map(|(key, value)| (key.to_string(), value.to_string())).into(),
        )
    }

    #[must_use]
    pub fn stage(&self) -> csi::NodeStageVolumeRequest {
        csi::NodeStageVolumeRequest {
            volume_id: self.id.clone(),
            publish_context: self.publish_context.clone(),
            staging_target_path: self.staging.clone(),
            volume_capability: Some(self.capability.clone()),
            secrets: self.secrets.clone(),
            volume_context: self.volume_context.clone(),
        }
    }

    #[must_use]
    pub fn unstage(&self) -> csi::NodeUnstageVolumeRequest {
        csi::NodeUnstageVolumeRequest { volume_id: self.id.clone(), staging_target_path: self.staging.clone() }
    }

    #[must_use]
    pub fn publish(&self) -> csi::NodePublishVolumeRequest {
        csi::NodePublishVolumeRequest {
            volume_id: self.id.clone(),
            publish_context: self.publish_context.clone(),
            staging_target_path: self.staging.clone(),
            target_path: self.target.clone(),
            volume_capability: Some(self.capability.clone()),
            volume_context: self.volume_context.clone(),
            ..Default::default()
        }
    }

    #[must_use]
    pub fn unpublish(&self) -> csi::NodeUnpublishVolumeRequest {
        csi::NodeUnpublishVolumeRequest { volume_id: self.id.clone(), target_path: self.target.clone() }
    }

    /// Of the published path, as kubelet asks.
    #[must_use]
    pub fn stats(&self) -> csi::NodeGetVolumeStatsRequest {
        csi::NodeGetVolumeStatsRequest {
            volume_id: self.id.clone(),
            volume_path: self.target.clone(),
            staging_target_path: self.staging.clone(),
        }
    }

    /// Of the published path, to at least `size_bytes`.
    #[must_use]
    pub fn expand(&self, size_bytes: u64) -> csi::NodeExpandVolumeRequest {
        let required_bytes = i64::try_from(size_bytes).unwrap_or(i64::MAX);
        csi::NodeExpandVolumeRequest {
            volume_id: self.id.clone(),
            volume_path: self.target.clone(),
            staging_target_path: self.staging.clone(),
            capacity_range: Some(csi::CapacityRange { required_bytes, limit_bytes: 0 }),
            volume_capability: Some(self.capability.clone()),
            secrets: self.secrets.clone(),
        }
    }
}
