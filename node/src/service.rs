//! CSI's Node service: one call at a time per volume, each on a thread of its own, its outcome as a gRPC code.

#![warn(clippy::wildcard_enum_match_arm)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use proto::csi::node_server::NodeServer;
use proto::csi::node_service_capability::{Rpc, Type, rpc};
use proto::csi::{self, VolumeUsage, volume_usage::Unit};
use tonic::{Code, Request, Response, Status};

use crate::error::{Cause, Error};
use crate::info::{self, Configured};
use crate::kill;
use crate::metrics;
use crate::plan;
use crate::request::{
    self, ExpandRequest, Passphrases, PublishRequest, StageRequest, StatsRequest, UnpublishRequest, UnstageRequest, Volume,
};
use crate::run::{Node, Progress, Stats};

/// A Secret has at most 1 MiB, a PersistentVolume 1.5 MiB; 4 MiB is what gRPC servers take by default.
const MAX_REQUEST_BYTES: usize = 4 << 20;

/// Below the two minutes that kubelet waits for a node call: a sentence from us says more than its "deadline exceeded".
const CALL_LIMIT: Duration = Duration::from_secs(100);

/// Looks at one volume at one time, whatever paths kubelet asks about: a disk that answers no more costs so many threads, and no more.
const MAX_LOOKS: usize = 2;
/// For a look's turn. Looks take milliseconds: those that go on for longer wait for a disk that does not answer.
const TURN_LIMIT: Duration = Duration::from_secs(10);
/// From one try to the next. A caller who waits costs no thread.
const TURN_EVERY: Duration = Duration::from_millis(20);

/// The Node service.
#[derive(Debug, Clone)]
pub struct Service {
    node: Arc<Node>,
    configured: Arc<Configured>,
    busy: Busy,
    /// Looks by volume and path: a disk that answers no more must not cost a thread each time kubelet asks.
    looks: Busy,
}

impl Service {
    /// Serves `node` under the configured identity.
    #[must_use]
    pub fn new(node: impl Into<Arc<Node>>, configured: Configured) -> Self {
        Self { node: node.into(), configured: Arc::new(configured), busy: Busy::default(), looks: Busy::default() }
    }

    /// As it is served: requests that are too large are OutOfRange.
    #[must_use]
    pub fn server(self) -> NodeServer<Self> {
        NodeServer::new(self).max_decoding_message_size(MAX_REQUEST_BYTES)
    }

    /// Runs `work` on a thread that may block, and answers when it has ended or the time is up. It goes on to its end even if the caller
    /// goes away, and holds the volume until then: a repeated call is answered ABORTED meanwhile, and nothing is begun twice.
    async fn work<T: Send + 'static>(
        &self,
        doing: &'static str,
        volume: &Volume,
        work: impl FnOnce(&Node) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Status> {
        let held = self.busy.hold(&volume.serial, doing).map_err(|progress| taken(volume, &progress))?;
        self.wait(volume, held, work).await
    }

    async fn wait<T: Send + 'static>(
        &self,
        volume: &Volume,
        held: Held,
        work: impl FnOnce(&Node) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Status> {
        let (node, answer) = (Arc::clone(&self.node), Arc::new(Mutex::new(None)));
        let answered = Arc::clone(&answer);
        let work = move || {
            let done = work(&node);
            let trouble = done.as_ref().err().cloned();
            *answered.lock().unwrap_or_else(PoisonError::into_inner) = Some(done);
            trouble
        };
        within(volume, held, kill::limit("CALL", CALL_LIMIT), Box::new(work)).await?;
        let answer = answer.lock().unwrap_or_else(PoisonError::into_inner).take();
        answer.ok_or_else(|| lost(volume, "no answer"))?.map_err(|error| status(&error))
    }
}

impl Service {
    /// The turn of one of many who look at the volume: its pods, whose disk is sound, are all answered.
    async fn turn(&self, volume: &Volume, at: &str, limit: Duration) -> Result<Held, Status> {
        let begun = Instant::now();
        loop {
            match self.looks.hold_among(&volume.serial, at, MAX_LOOKS) {
                Ok(held) => return Ok(held),
                Err(progress) if begun.elapsed() >= limit => return Err(unanswered(volume, &progress)),
                // Not a sleep in hope: what is waited for is looked at again, until the limit.
                Err(_) => tokio::time::sleep(TURN_EVERY).await,
            }
        }
    }
}

/// The part of [`Service::wait`] that is the same for every call, and is in the program once.
async fn within(volume: &Volume, mut held: Held, limit: Duration, work: Box<dyn FnOnce() -> Option<Error> + Send>) -> Result<(), Status> {
    let (progress, over) = (held.progress.clone(), Arc::clone(&held.over));
    let done = aside(Box::new(move || {
        held.progress.take_over();
        held.ended(work());
    }));
    match tokio::time::timeout(limit, done).await {
        Ok(done) => done.map_err(|why| lost(volume, why)),
        Err(_) => {
            // Before the other may take it back.
            metrics::LATE.fetch_add(1, Ordering::Relaxed);
            if over.swap(true, Ordering::AcqRel) {
                // It has ended this very moment, and its answer is there.
                metrics::LATE.fetch_sub(1, Ordering::Relaxed);
                return Ok(());
            }
            Err(Status::deadline_exceeded(overdue(volume, &progress)))
        }
    }
}

fn overdue(volume: &Volume, progress: &Progress) -> String {
    let then = if progress.is_deriving() {
        "keys are derived one at a time: where it stays so, raise the node container's CPU limit"
    } else {
        "where it stays so, the disk does not answer: look at its storage on Proxmox"
    };
    format!("{volume}: {progress}, {} s in all; it goes on by itself, and is not begun again; {then}", progress.seconds())
}

/// On a thread that may block.
#[must_use]
pub fn aside(work: Box<dyn FnOnce() + Send>) -> tokio::task::JoinHandle<()> {
    let call = proto::log::call();
    tokio::task::spawn_blocking(move || {
        let _within = proto::log::enter(call);
        work();
    })
}

fn lost(volume: &Volume, why: impl std::fmt::Display) -> Status {
    Status::internal(format!("{volume}: the call was lost: {why}"))
}

fn taken(volume: &Volume, progress: &Progress) -> Status {
    Status::aborted(format!("{volume}: another call is working on this volume: {progress}; repeat this one later"))
}

fn unanswered(volume: &Volume, progress: &Progress) -> Status {
    Status::aborted(format!(
        "{volume}: it is not looked at again, as an earlier look has not ended: {progress}, {} s in all; where it stays so, the disk does not \
         answer: look at its storage on Proxmox",
        progress.seconds()
    ))
}

#[tonic::async_trait]
impl csi::node_server::Node for Service {
    async fn node_stage_volume(
        &self,
        request: Request<csi::NodeStageVolumeRequest>,
    ) -> Result<Response<csi::NodeStageVolumeResponse>, Status> {
        let mut request = request.into_inner();
        let passphrases = Passphrases::take(&mut request.secrets).map_err(|refusal| refused("stage", &request.volume_id, &refusal))?;
        let want = StageRequest::new(&request, passphrases.as_ref(), self.node.folders())
            .map_err(|refusal| refused("stage", &request.volume_id, &refusal))?;
        self.work("stage", &want.volume.clone(), move |node| node.stage(&want, passphrases.as_ref())).await?;
        Ok(Response::new(csi::NodeStageVolumeResponse {}))
    }

    async fn node_unstage_volume(
        &self,
        request: Request<csi::NodeUnstageVolumeRequest>,
    ) -> Result<Response<csi::NodeUnstageVolumeResponse>, Status> {
        let want = UnstageRequest::new(request.get_ref(), self.node.folders())
            .map_err(|refusal| refused("unstage", &request.get_ref().volume_id, &refusal))?;
        self.work("unstage", &want.volume.clone(), move |node| node.unstage(&want)).await?;
        Ok(Response::new(csi::NodeUnstageVolumeResponse {}))
    }

    async fn node_publish_volume(
        &self,
        request: Request<csi::NodePublishVolumeRequest>,
    ) -> Result<Response<csi::NodePublishVolumeResponse>, Status> {
        let mut request = request.into_inner();
        // Not asked for, and given all the same where a class names a node-publish-secret.
        request.secrets.values_mut().for_each(zeroize::Zeroize::zeroize);
        let want =
            PublishRequest::new(&request, self.node.folders()).map_err(|refusal| refused("publish", &request.volume_id, &refusal))?;
        self.work("publish", &want.volume.clone(), move |node| node.publish(&want)).await?;
        Ok(Response::new(csi::NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<csi::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<csi::NodeUnpublishVolumeResponse>, Status> {
        let want = UnpublishRequest::new(request.get_ref(), self.node.folders())
            .map_err(|refusal| refused("unpublish", &request.get_ref().volume_id, &refusal))?;
        self.work("unpublish", &want.volume.clone(), move |node| node.unpublish(&want)).await?;
        Ok(Response::new(csi::NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<csi::NodeGetVolumeStatsRequest>,
    ) -> Result<Response<csi::NodeGetVolumeStatsResponse>, Status> {
        let want = StatsRequest::new(request.get_ref(), self.node.folders())
            .map_err(|refusal| refused("stats", &request.get_ref().volume_id, &refusal))?;
        // A look changes nothing, so it waits for no other call; but for a disk that does not answer no second one waits.
        let at = format!("{} {}", want.volume.serial, want.path.display());
        let held = self.turn(&want.volume, &at, TURN_LIMIT).await?;
        Ok(Response::new(told(self.wait(&want.volume.clone(), held, move |node| node.stats(&want)).await?)))
    }

    async fn node_expand_volume(
        &self,
        request: Request<csi::NodeExpandVolumeRequest>,
    ) -> Result<Response<csi::NodeExpandVolumeResponse>, Status> {
        let mut request = request.into_inner();
        let passphrases = Passphrases::take(&mut request.secrets).map_err(|refusal| refused("expand", &request.volume_id, &refusal))?;
        let want = ExpandRequest::new(&request, self.node.folders()).map_err(|refusal| refused("expand", &request.volume_id, &refusal))?;
        let size_bytes = self.work("expand", &want.volume.clone(), move |node| node.expand(&want, passphrases.as_ref())).await?;
        Ok(Response::new(csi::NodeExpandVolumeResponse { capacity_bytes: signed(size_bytes) }))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<csi::NodeGetCapabilitiesRequest>,
    ) -> Result<Response<csi::NodeGetCapabilitiesResponse>, Status> {
        let capability = |kind: rpc::Type| csi::NodeServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: kind.into() })) };
        Ok(Response::new(csi::NodeGetCapabilitiesResponse {
            capabilities: vec![
                capability(rpc::Type::StageUnstageVolume),
                capability(rpc::Type::GetVolumeStats),
                capability(rpc::Type::ExpandVolume),
                capability(rpc::Type::SingleNodeMultiWriter),
                capability(rpc::Type::VolumeCondition),
            ],
        }))
    }

    async fn node_get_info(&self, _: Request<csi::NodeGetInfoRequest>) -> Result<Response<csi::NodeGetInfoResponse>, Status> {
        let configured = Arc::clone(&self.configured);
        let (node, answer) = (Arc::clone(&self.node), Arc::new(Mutex::new(None)));
        let answered = Arc::clone(&answer);
        let look = move || *answered.lock().unwrap_or_else(PoisonError::into_inner) = Some(info::look(&configured, node.sysfs()));
        let looked = tokio::time::timeout(kill::limit("CALL", CALL_LIMIT), aside(Box::new(look))).await;
        looked
            .map_err(|_| Status::deadline_exceeded(format!("NodeGetInfo: sysfs has not answered for {} s", CALL_LIMIT.as_secs())))?
            .map_err(|why| Status::internal(format!("NodeGetInfo: the call was lost: {why}")))?;
        let seen = answer.lock().unwrap_or_else(PoisonError::into_inner).take();
        let seen = seen.ok_or_else(|| Status::internal("NodeGetInfo: the call was lost"))?;
        let info = seen.map_err(|unknown| Status::unavailable(unknown.to_string()))?;
        let segments = [(proto::TOPOLOGY_REGION.to_string(), info.region), (proto::TOPOLOGY_ZONE.to_string(), info.zone)];
        Ok(Response::new(csi::NodeGetInfoResponse {
            node_id: info.node_id,
            max_volumes_per_node: info.max_volumes,
            accessible_topology: Some(csi::Topology { segments: segments.into_iter().collect() }),
        }))
    }
}

fn told(stats: Stats) -> csi::NodeGetVolumeStatsResponse {
    let seen = &stats.usage;
    let of = |unit: Unit, [total, used, available]: [u64; 3]| VolumeUsage {
        available: signed(available),
        total: signed(total),
        used: signed(used),
        unit: unit.into(),
    };
    let bytes = of(Unit::Bytes, seen.bytes);
    let usage = std::iter::once(bytes).chain(seen.inodes.map(|inodes| of(Unit::Inodes, inodes))).collect();
    let abnormal = stats.trouble.is_some();
    let message = stats.trouble.unwrap_or_else(|| "no trouble is seen".into());
    csi::NodeGetVolumeStatsResponse { usage, volume_condition: Some(csi::VolumeCondition { abnormal, message }) }
}

/// CSI counts in signed numbers; nothing that we measure needs the last bit.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn refused(doing: &str, volume_id: &str, refusal: &request::Refusal) -> Status {
    let code = match refusal {
        request::Refusal::Missing { .. }
        | request::Refusal::Handle(_)
        | request::Refusal::Path { .. }
        | request::Refusal::AccessMode { .. }
        | request::Refusal::NoAccessType
        | request::Refusal::Filesystem { .. }
        | request::Refusal::Context { .. }
        | request::Refusal::NoDiskNamed
        | request::Refusal::EmptyPassphrase
        | request::Refusal::OnlyPreviousPassphrase
        | request::Refusal::NoPassphrase
        | request::Refusal::OtherSerial { .. } => Code::InvalidArgument,
        request::Refusal::NoSuchVolume(_) | request::Refusal::NotAPublishedPath { .. } => Code::NotFound,
        request::Refusal::Range { .. } => Code::OutOfRange,
    };
    let volume: String = volume_id.chars().take(200).collect();
    Status::new(code, format!("{doing} {volume}: {refusal}"))
}

/// The code of an outcome. kubelet repeats all of these calls whatever the code; what differs is how it counts: for stage,
/// UNAVAILABLE leaves it open whether something was done, so that unstage is called before the disk is given up.
fn status(error: &Error) -> Status {
    metrics::count(&error.cause);
    Status::new(code(&error.cause), error.to_string())
}

fn code(cause: &Cause) -> Code {
    match cause {
        Cause::Refused(refusal) => match refusal {
            plan::Refusal::NotPublishedHere { .. } => Code::NotFound,
            plan::Refusal::OtherMode { .. } | plan::Refusal::StagedAsFilesystem => Code::AlreadyExists,
            plan::Refusal::NoPassphrase => Code::InvalidArgument,
            plan::Refusal::OtherMount { .. }
            | plan::Refusal::DiskGone
            | plan::Refusal::HoldsOther { .. }
            | plan::Refusal::NeverFormat { .. }
            | plan::Refusal::NeverFinish { .. }
            | plan::Refusal::ReadOnlyBlank
            | plan::Refusal::InPlain { .. }
            | plan::Refusal::StrangeMapping { .. }
            | plan::Refusal::NotOpen
            | plan::Refusal::NotStaged
            | plan::Refusal::NoGrowing { .. }
            | plan::Refusal::TargetTaken { .. }
            | plan::Refusal::SecondTarget { .. } => Code::FailedPrecondition,
        },
        Cause::Disk(_)
        | Cause::Damaged { .. }
        | Cause::InTrouble(_)
        | Cause::StillHeld { .. }
        | Cause::NotBlankAnyMore { .. }
        | Cause::Luks(_)
        | Cause::NoCrypt(_) => Code::FailedPrecondition,
        // Nothing is under way: kubelet would take RESOURCE_EXHAUSTED for "perhaps done", and the same call cannot succeed
        // before somebody has given the pod more memory, or mended the header.
        Cause::KeyslotCost(_) => Code::FailedPrecondition,
        // Of NodeExpandVolume kubelet takes this for "never, with these arguments" and asks seldom from then on.
        Cause::Outside { .. } | Cause::Geometry(_) | Cause::WrongPassphrase(_) | Cause::NoKey => Code::InvalidArgument,
        Cause::TooSmall(_) => Code::OutOfRange,
        Cause::Crowded { .. }
        | Cause::BeingMounted { .. }
        | Cause::Stopped { .. }
        | Cause::KdfBusy { .. }
        | Cause::NoDisk { .. }
        | Cause::SizeNotSeen { .. }
        | Cause::OtherDiskNow { .. }
        | Cause::StaysOffline { .. } => Code::Unavailable,
        Cause::Sys(_)
        | Cause::Mapping(_)
        | Cause::Mount(_)
        | Cause::Label { .. }
        | Cause::Probe(_)
        | Cause::LuksRead(_)
        | Cause::NotGrown { .. }
        | Cause::NoEnd { .. } => Code::Internal,
    }
}

/// What is worked on now: volumes by serial (a handle with a zone and one without, as older releases wrote it on shared storage, may be one
/// disk), and what each call is at.
#[derive(Debug, Clone, Default)]
struct Busy(Arc<Mutex<Vec<(String, Progress)>>>);

impl Busy {
    /// The same for one of a few looks at a volume.
    fn hold_among(&self, serial: &str, key: &str, most: usize) -> Result<Held, Progress> {
        let mut busy = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_it = busy.iter().filter(|(held, _)| held.starts_with(serial)).nth(most - 1);
        match of_it.map(|(_, progress)| progress.clone()) {
            Some(progress) => Err(progress),
            None => self.hold_in(&mut busy, key, "stats"),
        }
    }

    /// Of another call that holds it: what that is at.
    fn hold(&self, key: &str, doing: &'static str) -> Result<Held, Progress> {
        self.hold_in(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner), key, doing)
    }

    fn hold_in(&self, busy: &mut Vec<(String, Progress)>, key: &str, doing: &'static str) -> Result<Held, Progress> {
        if let Some((_, progress)) = busy.iter().find(|(held, _)| held == key) {
            return Err(progress.clone());
        }
        let progress = Progress::begin(doing);
        busy.push((key.to_string(), progress.clone()));
        Ok(Held { busy: self.clone(), key: key.to_string(), progress, over: Arc::default(), trouble: None })
    }
}

/// Until it is dropped, the volume is this call's.
#[derive(Debug)]
struct Held {
    busy: Busy,
    key: String,
    progress: Progress,
    /// It has ended, or its caller has been told that it takes too long: who comes second sees the first.
    over: Arc<AtomicBool>,
    /// How it ended, for the case that nobody waits for its answer any more.
    trouble: Option<Error>,
}

impl Held {
    fn ended(&mut self, trouble: Option<Error>) {
        self.trouble = trouble;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.busy.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|(held, _)| *held != self.key);
        if !self.over.swap(true, Ordering::AcqRel) {
            return;
        }
        metrics::LATE.fetch_sub(1, Ordering::Relaxed);
        let (progress, seconds) = (&self.progress, self.progress.seconds());
        match &self.trouble {
            None => proto::info!("{}: a call that took too long has ended: {progress}, {seconds} s in all", self.key),
            Some(error) => {
                metrics::count(&error.cause);
                proto::warn!("{}: a call that took too long has failed: {error} ({progress}, {seconds} s in all)", self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests;
