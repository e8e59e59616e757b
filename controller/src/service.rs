//! CSI's Controller service: requests made typed, one call per volume at a time, errors to codes.
//!
//! Every call runs in a task of its own: when a sidecar gives up, the work goes on to a known end, and the guard is held
//! until then.

#![warn(clippy::wildcard_enum_match_arm)]

use std::collections::HashSet;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use proto::csi::controller_server::Controller as Service;
use proto::csi::controller_service_capability::{Rpc, Type, rpc};
use proto::csi::{self, ControllerServiceCapability};
use tonic::{Request, Response, Status};

use crate::deadline;
use crate::error::Error;
use crate::request::{Capacity, Create, Expand, ListPage, Modify, Publish, Unpublish, existing, supported};
use crate::run::{Condition, Controller, Listed};

/// gRPC carries a status message in a header; clients take some KiB of those.
const MAX_MESSAGE_CHARS: usize = 2000;

/// What is built, and nothing else.
const CAPABILITIES: [rpc::Type; 8] = [
    rpc::Type::CreateDeleteVolume,
    rpc::Type::PublishUnpublishVolume,
    rpc::Type::ListVolumes,
    rpc::Type::GetCapacity,
    rpc::Type::ExpandVolume,
    rpc::Type::VolumeCondition,
    rpc::Type::GetVolume,
    rpc::Type::SingleNodeMultiWriter,
];
/// What Kubernetes has to be asked for: how nodes call themselves, and what a volume's class says when it is attached anew.
const WITH_KUBERNETES: [rpc::Type; 2] = [rpc::Type::ListVolumesPublishedNodes, rpc::Type::ModifyVolume];

/// The service over one [`Controller`].
#[derive(Debug, Clone)]
pub struct ControllerService {
    controller: Arc<Controller>,
    busy: Arc<Mutex<HashSet<String>>>,
}

/// Held while one volume is worked on.
struct Turn {
    busy: Arc<Mutex<HashSet<String>>>,
    volume: String,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.volume);
    }
}

impl ControllerService {
    /// Serves `controller`.
    #[must_use]
    pub fn new(controller: Arc<Controller>) -> Self {
        Self { controller, busy: Arc::default() }
    }

    /// What it serves.
    #[must_use]
    pub fn controller(&self) -> &Arc<Controller> {
        &self.controller
    }

    /// Whether no call goes on, also none whose caller has given up.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// CSI: at most one call per volume in flight; the second answers ABORTED and is repeated.
    fn turn(&self, volume: &str) -> Result<Turn, Error> {
        if !self.busy.lock().unwrap_or_else(PoisonError::into_inner).insert(volume.into()) {
            return Err(Error::aborted(format!("another call for volume {volume} is in flight; repeated when it has ended")));
        }
        Ok(Turn { busy: Arc::clone(&self.busy), volume: volume.into() })
    }

    /// Runs `work` to its end, whoever waits for it. A refusal that needs a person is told as `reason`.
    async fn alone<T: Send + 'static>(
        &self,
        volume: &str,
        reason: Option<&'static str>,
        timeout: Option<String>,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let turn = self.turn(volume).map_err(status)?;
        let (controller, volume) = (Arc::clone(&self.controller), volume.to_owned());
        let task = tokio::spawn(proto::log::carried(async move {
            let done = deadline::within(timeout.as_deref(), work).await;
            drop(turn);
            // Stopped in the middle, perhaps: what was true then need not be true any more.
            let done = done.and_then(|done| controller.check_acts().map(|()| done));
            if let (Err(error), Some(reason)) = (&done, reason) {
                controller.tell(&volume, reason, error);
            }
            done
        }));
        match task.await {
            Ok(done) => done.map(Response::new).map_err(status),
            Err(cause) => Err(status(Error::internal(format!("the call broke off: {cause}")))),
        }
    }
}

/// What the caller says of its patience.
fn timeout_of<T>(request: &Request<T>) -> Option<String> {
    request.metadata().get("grpc-timeout")?.to_str().ok().map(String::from)
}

fn status(error: Error) -> Status {
    Status::new(error.code, error.text.chars().take(MAX_MESSAGE_CHARS).collect::<String>())
}

/// One entry for each zone; of the region alone where there is none.
fn topologies(region: &str, zones: &[String]) -> Vec<csi::Topology> {
    let of_region = (proto::TOPOLOGY_REGION.to_string(), region.to_string());
    if zones.is_empty() {
        return vec![csi::Topology { segments: [of_region].into() }];
    }
    let of_zone = |zone: &String| [of_region.clone(), (proto::TOPOLOGY_ZONE.to_string(), zone.clone())];
    zones.iter().map(|zone| csi::Topology { segments: of_zone(zone).into() }).collect()
}

fn no_snapshots() -> Status {
    Status::unimplemented("snapshots are not built yet; nothing was touched, and those that the reference driver made are still there")
}

fn volume(listed: &Listed) -> csi::Volume {
    let zone = Some(listed.handle.zone.clone()).filter(|zone| !zone.is_empty());
    csi::Volume {
        volume_id: listed.handle.to_string(),
        // CSI: 0 is "not known".
        capacity_bytes: listed.size_bytes.map_or(0, signed),
        accessible_topology: topologies(&listed.handle.region, zone.as_slice()),
        ..Default::default()
    }
}

fn condition(condition: Condition) -> csi::VolumeCondition {
    csi::VolumeCondition { abnormal: condition.abnormal, message: condition.message }
}

/// CSI's sizes are signed.
fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

#[tonic::async_trait]
impl Service for ControllerService {
    async fn create_volume(&self, request: Request<csi::CreateVolumeRequest>) -> Result<Response<csi::CreateVolumeResponse>, Status> {
        let timeout = timeout_of(&request);
        let create = Create::try_from(request.into_inner()).map_err(status)?;
        let controller = Arc::clone(&self.controller);
        // The provisioner tells the claim itself, and there is no PV yet.
        self.alone(&create.name.clone(), None, timeout, async move {
            let created = controller.create(create).await?;
            let accessible_topology = topologies(&created.handle.region, &created.zones);
            Ok(csi::CreateVolumeResponse {
                volume: Some(csi::Volume {
                    volume_id: created.handle.to_string(),
                    capacity_bytes: signed(created.capacity_bytes),
                    volume_context: created.volume_context,
                    accessible_topology,
                    ..Default::default()
                }),
            })
        })
        .await
    }

    async fn delete_volume(&self, request: Request<csi::DeleteVolumeRequest>) -> Result<Response<csi::DeleteVolumeResponse>, Status> {
        let timeout = timeout_of(&request);
        let volume_id = request.into_inner().volume_id;
        if volume_id.is_empty() {
            return Err(status(Error::invalid("volume_id is missing")));
        }
        // An id that can be no volume's: there is nothing to delete.
        let Ok(handle) = existing(&volume_id) else { return Ok(Response::new(csi::DeleteVolumeResponse {})) };
        let controller = Arc::clone(&self.controller);
        self.alone(&volume_id, Some("VolumeDeleteRefused"), timeout, async move {
            controller.delete(&handle).await.map(|()| csi::DeleteVolumeResponse {})
        })
        .await
    }

    async fn controller_publish_volume(
        &self,
        request: Request<csi::ControllerPublishVolumeRequest>,
    ) -> Result<Response<csi::ControllerPublishVolumeResponse>, Status> {
        let timeout = timeout_of(&request);
        let publish = Publish::try_from(request.into_inner()).map_err(status)?;
        let controller = Arc::clone(&self.controller);
        self.alone(&publish.handle.to_string(), Some("VolumeAttachRefused"), timeout, async move {
            let published = controller.publish(Arc::new(publish)).await?;
            Ok(csi::ControllerPublishVolumeResponse { publish_context: published.publish_context })
        })
        .await
    }

    async fn controller_unpublish_volume(
        &self,
        request: Request<csi::ControllerUnpublishVolumeRequest>,
    ) -> Result<Response<csi::ControllerUnpublishVolumeResponse>, Status> {
        let timeout = timeout_of(&request);
        let unpublish = Unpublish::try_from(request.into_inner()).map_err(status)?;
        let controller = Arc::clone(&self.controller);
        self.alone(&unpublish.handle.to_string(), Some("VolumeDetachRefused"), timeout, async move {
            controller.unpublish(&unpublish).await.map(|()| csi::ControllerUnpublishVolumeResponse {})
        })
        .await
    }

    async fn controller_expand_volume(
        &self,
        request: Request<csi::ControllerExpandVolumeRequest>,
    ) -> Result<Response<csi::ControllerExpandVolumeResponse>, Status> {
        let timeout = timeout_of(&request);
        let expand = Expand::try_from(request.into_inner()).map_err(status)?;
        let controller = Arc::clone(&self.controller);
        self.alone(&expand.handle.to_string(), Some("VolumeExpandRefused"), timeout, async move {
            let expanded = controller.expand(&expand).await?;
            Ok(csi::ControllerExpandVolumeResponse { capacity_bytes: signed(expanded.capacity_bytes), node_expansion_required: true })
        })
        .await
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<csi::ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<csi::ValidateVolumeCapabilitiesResponse>, Status> {
        let request = request.into_inner();
        if request.volume_id.is_empty() {
            return Err(status(Error::invalid("volume_id is missing")));
        }
        if request.volume_capabilities.is_empty() {
            return Err(status(Error::invalid("volume_capabilities is missing")));
        }
        let handle = existing(&request.volume_id).map_err(status)?;
        self.controller.check_exists(&handle).await.map_err(status)?;
        let answer = match request.volume_capabilities.iter().try_for_each(supported) {
            Ok(()) => csi::ValidateVolumeCapabilitiesResponse {
                confirmed: Some(csi::validate_volume_capabilities_response::Confirmed {
                    volume_context: request.volume_context,
                    volume_capabilities: request.volume_capabilities,
                    parameters: request.parameters,
                    mutable_parameters: Default::default(),
                }),
                message: String::new(),
            },
            Err(why) => csi::ValidateVolumeCapabilitiesResponse { confirmed: None, message: why },
        };
        Ok(Response::new(answer))
    }

    async fn list_volumes(&self, request: Request<csi::ListVolumesRequest>) -> Result<Response<csi::ListVolumesResponse>, Status> {
        let page = ListPage::try_from(request.into_inner()).map_err(status)?;
        let page = self.controller.list(&page).await.map_err(status)?;
        let entry = |listed: Listed| csi::list_volumes_response::Entry {
            volume: Some(volume(&listed)),
            status: Some(csi::list_volumes_response::VolumeStatus {
                published_node_ids: listed.nodes,
                volume_condition: Some(condition(listed.condition)),
            }),
        };
        let entries = page.entries.into_iter().map(entry).collect();
        Ok(Response::new(csi::ListVolumesResponse { entries, next_token: page.next_token }))
    }

    async fn controller_get_volume(
        &self,
        request: Request<csi::ControllerGetVolumeRequest>,
    ) -> Result<Response<csi::ControllerGetVolumeResponse>, Status> {
        let volume_id = request.into_inner().volume_id;
        if volume_id.is_empty() {
            return Err(status(Error::invalid("volume_id is missing")));
        }
        let listed = self.controller.volume(&existing(&volume_id).map_err(status)?).await.map_err(status)?;
        Ok(Response::new(csi::ControllerGetVolumeResponse {
            volume: Some(volume(&listed)),
            status: Some(csi::controller_get_volume_response::VolumeStatus {
                published_node_ids: listed.nodes,
                volume_condition: Some(condition(listed.condition)),
            }),
        }))
    }

    async fn controller_modify_volume(
        &self,
        request: Request<csi::ControllerModifyVolumeRequest>,
    ) -> Result<Response<csi::ControllerModifyVolumeResponse>, Status> {
        if !self.controller.has_kubernetes() {
            return Err(Status::unimplemented(
                "ControllerModifyVolume needs the Kubernetes API, which says at the next attach what the volume's class is",
            ));
        }
        let timeout = timeout_of(&request);
        let modify = Modify::try_from(request.into_inner()).map_err(status)?;
        let controller = Arc::clone(&self.controller);
        self.alone(&modify.handle.to_string(), Some("VolumeModifyRefused"), timeout, async move {
            controller.modify(&modify).await.map(|()| csi::ControllerModifyVolumeResponse {})
        })
        .await
    }

    async fn create_snapshot(&self, _: Request<csi::CreateSnapshotRequest>) -> Result<Response<csi::CreateSnapshotResponse>, Status> {
        Err(no_snapshots())
    }

    async fn delete_snapshot(&self, _: Request<csi::DeleteSnapshotRequest>) -> Result<Response<csi::DeleteSnapshotResponse>, Status> {
        Err(no_snapshots())
    }

    async fn list_snapshots(&self, _: Request<csi::ListSnapshotsRequest>) -> Result<Response<csi::ListSnapshotsResponse>, Status> {
        Err(no_snapshots())
    }

    async fn get_capacity(&self, request: Request<csi::GetCapacityRequest>) -> Result<Response<csi::GetCapacityResponse>, Status> {
        let request = request.into_inner();
        let unsupported = !request.volume_capabilities.is_empty() && request.volume_capabilities.iter().any(|one| supported(one).is_err());
        let wanted = Capacity::try_from(request).map_err(status)?;
        // CSI: capacity for volumes of these capabilities; of those that are not made there is none.
        let (sum, most) = if unsupported { (0, 0) } else { self.controller.capacity(&wanted).await.map_err(status)? };
        Ok(Response::new(csi::GetCapacityResponse {
            available_capacity: signed(sum),
            maximum_volume_size: Some(signed(most)),
            minimum_volume_size: None,
        }))
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<csi::ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<csi::ControllerGetCapabilitiesResponse>, Status> {
        let capability = |kind: &rpc::Type| ControllerServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: (*kind).into() })) };
        let with_kubernetes = WITH_KUBERNETES.iter().filter(|_| self.controller.has_kubernetes());
        let capabilities = CAPABILITIES.iter().chain(with_kubernetes).map(capability).collect();
        Ok(Response::new(csi::ControllerGetCapabilitiesResponse { capabilities }))
    }
}
