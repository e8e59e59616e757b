//! Whether another workload serves this driver's name: the reference driver, say, in its own namespace. Two of them would attach one
//! volume to two VMs, each with its own evidence.
//!
//! Whoever serves it has an external-attacher beside it, and that one holds a Lease of this name in its namespace. Our own replicas
//! wait for the driver's Lease before they have a socket, and their attachers wait for the socket: so who renews an attacher's
//! Lease while the driver's Lease is ours, is none of them. A renewal that we see is the proof, never a time that is written there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde_json::Value;
use tokio::time::Instant;

use super::lease::{DURATION, RETRY};
use super::{Failure, Kube, text};
use crate::run::when;

/// external-attacher's, made of the driver's name.
pub(super) const ATTACHER_LEASE: &str = "external-attacher-leader-csi-proxmox-sinextra-dev";
/// A Lease that was renewed last so long ago is not worth a line of --check. Who is to act waits for it all the same: clocks can be wrong
/// by more, and a minute is nothing.
const LONG_AGO: Duration = Duration::from_secs(600);
/// The longest that a holder is waited for: a Lease may carry any duration.
const LONGEST_LOOK: Duration = Duration::from_secs(60);
/// In our own namespace an attacher of ours may renew once more while it ends.
const RENEWALS_HERE: usize = 2;

/// Who holds an attacher's Lease, as last seen.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Attacher {
    holder: String,
    version: String,
    duration: Duration,
    renewals: usize,
    /// As its holder wrote it, by a clock that may be wrong.
    renewed: String,
}

impl Kube {
    /// Makes sure that nobody else serves this driver's name. Asked while the driver's Lease is ours.
    ///
    /// # Errors
    /// Somebody does: the sentence names both.
    pub async fn check_alone(self: &Arc<Self>) -> Result<(), Failure> {
        let begun = Instant::now();
        let mut seen = match self.attachers().await {
            Ok(seen) => seen,
            Err(why) => {
                proto::warn!("whether another workload serves {} cannot be told: {why}", proto::DRIVER_NAME);
                return Ok(());
            }
        };
        self.leave_out_ours(&mut seen).await;
        for (namespace, one) in &seen {
            proto::info!("waiting, {} s at most, whether {} in namespace {namespace} still serves", one.duration.as_secs(), one.holder);
        }
        while !seen.is_empty() {
            tokio::time::sleep(RETRY.min(Duration::from_secs(1))).await;
            // Not read: looked at again; the time goes on.
            if let Ok(now) = self.attachers().await {
                for (namespace, one) in &mut seen {
                    let Some(now) = now.get(namespace).filter(|now| now.holder == one.holder && now.version != one.version) else {
                        continue;
                    };
                    (one.version, one.renewals) = (now.version.clone(), one.renewals + 1);
                    let is_here = namespace == self.api.namespace();
                    if one.renewals >= if is_here { RENEWALS_HERE } else { 1 } {
                        return Err(self.not_alone(namespace, &one.holder));
                    }
                }
                seen.retain(|namespace, one| now.get(namespace).is_some_and(|now| now.holder == one.holder));
            }
            seen.retain(|_, one| begun.elapsed() < one.duration);
        }
        Ok(())
    }

    /// Namespace and pod of whoever held an attacher's Lease in another namespace within the last ten minutes.
    ///
    /// # Errors
    /// The call that failed.
    pub(crate) async fn rivals(self: &Arc<Self>) -> Result<Vec<(String, String)>, Failure> {
        let here = self.api.namespace();
        let long_ago = SystemTime::now().checked_sub(LONG_AGO).map(when::rfc3339).unwrap_or_default();
        // Both are UTC in one form, so that their texts are in order.
        let elsewhere = self.attachers().await?.into_iter().filter(|(namespace, one)| namespace != here && one.renewed >= long_ago);
        Ok(elsewhere.map(|(namespace, one)| (namespace, one.holder)).collect())
    }

    fn not_alone(&self, namespace: &str, holder: &str) -> Failure {
        let us = self.lease().map_or("this process", |lease| lease.pod());
        format!(
            "another workload serves {}: pod {holder} in namespace {namespace} renews the Lease {ATTACHER_LEASE}, and this is {us} in \
             namespace {}; two drivers would give one volume to two VMs: scale the other's controller to 0 first (kubectl -n {namespace} get \
             deployments)",
            proto::DRIVER_NAME,
            self.api.namespace()
        )
    }

    /// Namespace → who holds the attacher's Lease there.
    async fn attachers(self: &Arc<Self>) -> Result<BTreeMap<String, Attacher>, Failure> {
        let path = format!("/apis/coordination.k8s.io/v1/leases?fieldSelector=metadata.name%3D{ATTACHER_LEASE}&limit=500");
        let answer = self.get(path).await?.unwrap_or_default();
        let read = |entry: &Value| {
            let seconds = entry.pointer("/spec/leaseDurationSeconds").and_then(Value::as_u64).unwrap_or_default();
            let attacher = Attacher {
                holder: text(entry, "/spec/holderIdentity")?,
                version: text(entry, "/metadata/resourceVersion")?,
                duration: Duration::from_secs(seconds).clamp(DURATION, LONGEST_LOOK),
                renewals: 0,
                renewed: text(entry, "/spec/renewTime").unwrap_or_default(),
            };
            (text(entry, "/metadata/name").as_deref() == Some(ATTACHER_LEASE)).then_some((text(entry, "/metadata/namespace")?, attacher))
        };
        Ok(answer.get("items").and_then(Value::as_array).into_iter().flatten().filter_map(read).collect())
    }

    /// An attacher beside us, and one of ours whose pod has gone or goes, has nobody to wait for.
    async fn leave_out_ours(self: &Arc<Self>, seen: &mut BTreeMap<String, Attacher>) {
        let here = self.api.namespace().to_owned();
        let Some(one) = seen.get(&here) else { return };
        // client-go's own identity is the pod's name, and may have something behind it.
        let holder = one.holder.split('_').next().unwrap_or_default();
        let is_beside_us = self.lease().is_some_and(|lease| lease.pod() == holder);
        let pod = format!("/api/v1/namespaces/{here}/pods/{}", crate::pve::api::percent_encoded(holder, ""));
        let has_gone = match self.get(pod).await {
            Ok(None) => true,
            Ok(Some(pod)) => {
                let phase = text(&pod, "/status/phase").unwrap_or_default();
                text(&pod, "/metadata/deletionTimestamp").is_some() || matches!(phase.as_str(), "Succeeded" | "Failed")
            }
            // Then it is looked at.
            Err(_) => false,
        };
        if is_beside_us || has_gone {
            seen.remove(&here);
        }
    }
}
