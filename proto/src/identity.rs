//! CSI Identity: the same three answers from both binaries.

use std::fmt;
use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::csi::plugin_capability::{Service, Type, VolumeExpansion, service, volume_expansion};
use crate::csi::{self, PluginCapability};

/// Whether the plugin can work now: `Ok` or one sentence that says what is missing.
pub type Readiness = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// The Identity service of one binary.
#[derive(Clone)]
pub struct Identity {
    version: &'static str,
    ready: Readiness,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("version", &self.version).finish_non_exhaustive()
    }
}

impl Identity {
    /// Always ready: alive is all there is to it.
    #[must_use]
    pub fn new(version: &'static str) -> Self {
        Self { version, ready: Arc::new(|| Ok(())) }
    }

    /// Ready when `ready` says so; must not block.
    #[must_use]
    pub fn ready_when(self, ready: Readiness) -> Self {
        Self { ready, ..self }
    }
}

#[tonic::async_trait]
impl csi::identity_server::Identity for Identity {
    async fn get_plugin_info(&self, _: Request<csi::GetPluginInfoRequest>) -> Result<Response<csi::GetPluginInfoResponse>, Status> {
        Ok(Response::new(csi::GetPluginInfoResponse {
            name: crate::DRIVER_NAME.into(),
            vendor_version: self.version.into(),
            manifest: Default::default(),
        }))
    }

    /// The same from both binaries, as the reference driver answers: csi-sanity runs the node's chain only if the node's
    /// endpoint, too, says that there is a controller.
    async fn get_plugin_capabilities(
        &self,
        _: Request<csi::GetPluginCapabilitiesRequest>,
    ) -> Result<Response<csi::GetPluginCapabilitiesResponse>, Status> {
        let service = |kind: service::Type| PluginCapability { r#type: Some(Type::Service(Service { r#type: kind.into() })) };
        let online = VolumeExpansion { r#type: volume_expansion::Type::Online.into() };
        Ok(Response::new(csi::GetPluginCapabilitiesResponse {
            capabilities: vec![
                service(service::Type::ControllerService),
                service(service::Type::VolumeAccessibilityConstraints),
                PluginCapability { r#type: Some(Type::VolumeExpansion(online)) },
            ],
        }))
    }

    /// `ready: false` and the reason in the log, never an error: a plugin that waits for its configuration is healthy.
    async fn probe(&self, _: Request<csi::ProbeRequest>) -> Result<Response<csi::ProbeResponse>, Status> {
        let ready = (self.ready)();
        if let Err(why) = &ready {
            crate::warn!("Probe: not ready: {why}");
        }
        Ok(Response::new(csi::ProbeResponse { ready: Some(ready.is_ok()) }))
    }
}
