//! Tells people what waits for them: a refusal that needs a person is a Warning on the volume's claim, or on its PV where none
//! is bound.
//!
//! Beside the RPC and never in its way: told in a task of its own, at most so often, so many at a time, so many a minute; what
//! cannot be told is told once in the log. Events are of core/v1, which the sidecars' roles have, too. The same refusal again
//! is a count in the same Event.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use proto::VolumeHandle;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::client::{Call, Method};
use super::{Claim, Failure, Kube, text};
use crate::run::when;

/// One volume's refusals of one kind are written no more often; a sidecar repeats every few seconds at first.
pub const SAME_AGE: Duration = Duration::from_secs(60);
/// Of all volumes together: a cluster that went wrong has enough to do.
pub const MOST_A_MINUTE: usize = 30;
/// Each holds a thread while it is on its way.
const AT_ONCE: usize = 4;
/// Volumes that are remembered; beyond it all are forgotten, and their Events found again by name.
const MAX_TOLD: usize = 1024;
/// An Event is no reason to wait.
const CALL_LIMIT: Duration = Duration::from_secs(10);
/// Kubernetes takes no longer message.
const MAX_MESSAGE_BYTES: usize = 1024;
/// PVs that are looked at for one whose name its disk does not say.
const MAX_LOOKUPS: usize = 50;

const CLAIM: &str = "PersistentVolumeClaim";

#[derive(Debug)]
pub(super) struct Events {
    told: Mutex<Told>,
    at_once: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct Told {
    /// Volume and reason → when it was written last, and how often it came since.
    volumes: HashMap<(String, &'static str), (Option<Instant>, u64)>,
    /// When the last ones were written.
    lately: Vec<Instant>,
    /// What failed last.
    failure: Failure,
}

impl Default for Events {
    fn default() -> Self {
        Self { told: Mutex::default(), at_once: Arc::new(Semaphore::new(AT_ONCE)) }
    }
}

impl Events {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often it came, if it is to be written now.
    fn is_due(&self, volume: &str, reason: &'static str) -> Option<u64> {
        let (now, mut told) = (Instant::now(), self.told());
        if told.volumes.len() >= MAX_TOLD {
            told.volumes.clear();
        }
        told.lately.retain(|at| now.saturating_duration_since(*at) < Duration::from_secs(60));
        let is_full = told.lately.len() >= MOST_A_MINUTE;
        let (last, count) = told.volumes.entry((volume.into(), reason)).or_default();
        *count += 1;
        if is_full || last.is_some_and(|last| now.saturating_duration_since(last) < SAME_AGE) {
            return None;
        }
        let times = std::mem::take(count);
        *last = Some(now);
        told.lately.push(now);
        Some(times)
    }
}

/// What an Event is about.
struct Subject {
    kind: &'static str,
    /// Where the Event is: its own namespace, `default` for what has none.
    namespace: String,
    name: String,
    uid: String,
}

/// `9999/vm-9999-pvc-0d79.raw` → `pvc-0d79`: a disk that was made for a claim carries its PV's name.
pub(super) fn pv_named_by(disk: &str) -> Option<&str> {
    let file = disk.rsplit('/').next()?;
    let stem = [".raw", ".qcow2", ".vmdk"].iter().find_map(|extension| file.strip_suffix(extension)).unwrap_or(file);
    let (vmid, name) = stem.strip_prefix("vm-")?.split_once('-')?;
    let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte));
    (is_name && vmid.bytes().all(|byte| byte.is_ascii_digit())).then_some(name)
}

fn shortened(message: &str) -> &str {
    let end = (0..=MAX_MESSAGE_BYTES.min(message.len())).rev().find(|end| message.is_char_boundary(*end));
    message.get(..end.unwrap_or_default()).unwrap_or_default()
}

impl Kube {
    /// Has a refusal told to people. Waits for nothing.
    pub fn tell(self: &Arc<Self>, volume: &str, reason: &'static str, message: &str) {
        self.tell_about(volume, None, reason, message);
    }

    /// Has something told on a claim that has no PV yet. Waits for nothing.
    pub fn tell_claim(self: &Arc<Self>, claim: &Claim, reason: &'static str, message: &str) {
        let (namespace, name, uid) = (claim.namespace.clone(), claim.name.clone(), claim.uid.clone());
        let about = format!("claim {namespace}/{name}");
        self.tell_about(&about, Some(Subject { kind: CLAIM, namespace, name, uid }), reason, message);
    }

    fn tell_about(self: &Arc<Self>, volume: &str, subject: Option<Subject>, reason: &'static str, message: &str) {
        let Ok(permit) = Arc::clone(&self.events.at_once).try_acquire_owned() else { return };
        let Some(times) = self.events.is_due(volume, reason) else { return };
        let (kube, volume, message) = (Arc::clone(self), volume.to_owned(), message.to_owned());
        tokio::spawn(async move {
            let _permit = permit;
            let subject = match subject {
                Some(subject) => Ok(Some(subject)),
                None => kube.subject(&volume).await,
            };
            let written = match subject {
                Ok(Some(subject)) => kube.write_event(subject, reason, &message, times).await,
                Ok(None) => Ok(()),
                Err(failure) => Err(failure),
            };
            let failure = written.err().unwrap_or_default();
            let mut told = kube.events.told();
            if told.failure != failure {
                if !failure.is_empty() {
                    proto::warn!("no Event for {volume}: {failure}");
                }
                told.failure = failure;
            }
        });
    }

    async fn write_event(self: &Arc<Self>, subject: Subject, reason: &str, message: &str, times: u64) -> Result<(), Failure> {
        let hash = Sha256::digest(format!("{}/{reason}", subject.uid));
        let hash: String = hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        let (name, now) = (format!("{}.{hash}", subject.name), when::rfc3339(SystemTime::now()));
        let folder = format!("/api/v1/namespaces/{}/events", subject.namespace);
        let mut object = json!({"apiVersion": "v1", "kind": subject.kind, "name": subject.name, "uid": subject.uid});
        if let Some(object) = object.as_object_mut().filter(|_| subject.kind == CLAIM) {
            object.insert("namespace".into(), subject.namespace.clone().into());
        }
        let body = json!({
            "apiVersion": "v1", "kind": "Event", "metadata": {"name": name, "namespace": subject.namespace},
            "involvedObject": object, "type": "Warning", "reason": reason, "message": shortened(message), "count": times,
            "firstTimestamp": now, "lastTimestamp": now, "source": {"component": proto::DRIVER_NAME},
            "reportingComponent": proto::DRIVER_NAME, "reportingInstance": proto::DRIVER_NAME,
        });
        let create = Call { method: Method::Post, path: folder.clone(), body, limit: CALL_LIMIT };
        let call = create.name();
        let answer = self.api.call(create).await?;
        match answer.status {
            200 | 201 => return Ok(()),
            409 => (),
            _ => return Err(answer.refusal(&call)),
        }
        let path = format!("{folder}/{name}");
        let there = self.api.call(Call { limit: CALL_LIMIT, ..Call::get(&path) }).await?;
        let count = there.body.pointer("/count").and_then(Value::as_u64).unwrap_or_default().saturating_add(times);
        let body = json!({"count": count, "lastTimestamp": now, "message": shortened(message)});
        let patch = Call { method: Method::Patch, path, body, limit: CALL_LIMIT };
        let call = patch.name();
        let answer = self.api.call(patch).await?;
        // Kubernetes forgets Events after an hour: the next one is new then.
        if matches!(answer.status, 200 | 404) { Ok(()) } else { Err(answer.refusal(&call)) }
    }

    /// The claim, or the PV; nothing where no PV has that volume.
    async fn subject(self: &Arc<Self>, volume: &str) -> Result<Option<Subject>, Failure> {
        let Ok(handle) = volume.parse::<VolumeHandle>() else { return Ok(None) };
        let named = pv_named_by(&handle.disk).map(String::from);
        let mut found = match named {
            Some(name) => self.pv_of(&name, &handle).await?,
            None => None,
        };
        if found.is_none() {
            for name in self.attached_pvs().await?.into_iter().take(MAX_LOOKUPS) {
                found = self.pv_of(&name, &handle).await?;
                if found.is_some() {
                    break;
                }
            }
        }
        let Some(pv) = found else { return Ok(None) };
        let of = |kind, at: &str, namespace: String| {
            let (name, uid) = (text(&pv, &format!("{at}/name"))?, text(&pv, &format!("{at}/uid"))?);
            Some(Subject { kind, namespace, name, uid })
        };
        let claim = text(&pv, "/spec/claimRef/namespace").and_then(|namespace| of(CLAIM, "/spec/claimRef", namespace));
        Ok(claim.or_else(|| of("PersistentVolume", "/metadata", "default".into())))
    }

    /// The PV of that name, if it is of that volume.
    async fn pv_of(self: &Arc<Self>, name: &str, handle: &VolumeHandle) -> Result<Option<Value>, Failure> {
        let pv = self.get(format!("/api/v1/persistentvolumes/{name}")).await?;
        Ok(pv.filter(|pv| text(pv, "/spec/csi/volumeHandle").is_some_and(|of| of.parse::<VolumeHandle>().is_ok_and(|of| of == *handle))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_names_its_pv() {
        for (disk, pv) in [
            ("vm-9999-pvc-0d79", Some("pvc-0d79")),
            ("9999/vm-9999-pvc-0d79.raw", Some("pvc-0d79")),
            ("vm-9999-pvc-a.b", Some("pvc-a.b")),
            ("vm-9999-", None),
            ("vm-x-pvc", None),
            ("base-9999-disk-0", None),
            ("vm-1-Upper", None),
            ("vm-1-../x", None),
        ] {
            assert_eq!(pv_named_by(disk), pv, "{disk}");
        }
    }

    #[test]
    fn a_message_is_cut_between_characters() {
        let long = "ü".repeat(MAX_MESSAGE_BYTES);
        assert_eq!(shortened(&long).len(), MAX_MESSAGE_BYTES);
        assert_eq!(shortened(&format!("x{long}")).len(), MAX_MESSAGE_BYTES - 1);
        assert_eq!(shortened("short"), "short");
    }

    #[tokio::test]
    async fn the_same_is_told_once_and_of_many_only_so_many() {
        let events = Events::default();
        assert_eq!(events.is_due("a", "AttachRefused"), Some(1));
        assert_eq!(events.is_due("a", "AttachRefused"), None);
        assert_eq!(events.is_due("a", "DetachRefused"), Some(1));
        let told = (0..100).filter(|n| events.is_due(&n.to_string(), "AttachRefused").is_some()).count();
        assert_eq!(told, MOST_A_MINUTE - 2);
        // A minute later, with what was not said in between.
        let long_ago = Instant::now().checked_sub(SAME_AGE).unwrap();
        let mut held = events.told();
        held.lately.clear();
        held.volumes.values_mut().for_each(|(last, _)| *last = last.map(|_| long_ago));
        drop(held);
        assert_eq!(events.is_due("a", "AttachRefused"), Some(2));
        assert_eq!(events.is_due("99", "AttachRefused"), Some(2));
    }
}
