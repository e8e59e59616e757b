//! Whether a controller has acted for this Kubernetes before. A Lease that is not there may be that of a first installation, or one that
//! somebody has deleted under its holder: then what the holder sent may still come, and is waited for.
//!
//! What a holder sends is about volumes. Those that it attaches, detaches, grows or deletes have a PV, and it is asked for them by
//! sidecars: external-attacher makes a Lease of its own as soon as a controller serves, and nobody takes that one away again. Where
//! Kubernetes knows no such Lease in any namespace, no PV of this driver, and nothing attached by it, nobody was there.

use std::sync::Arc;

use serde_json::Value;

use super::rivals::ATTACHER_LEASE;
use super::{Failure, Kube, text};

impl Kube {
    /// Whether nothing that an earlier controller sent can still come. What cannot be read is no such word. Asked while the driver's Lease
    /// is ours: what comes later comes by us.
    pub async fn is_first(self: &Arc<Self>) -> bool {
        match self.earlier().await {
            Ok(None) => proto::info!("no controller of {} was here before, so that nothing is waited for", proto::DRIVER_NAME),
            Ok(Some(trace)) => {
                proto::info!("a controller of {} was here before: there is {trace}", proto::DRIVER_NAME);
                return false;
            }
            Err(why) => {
                proto::warn!("whether a controller of {} was here before cannot be told: {why}", proto::DRIVER_NAME);
                return false;
            }
        }
        true
    }

    /// What an earlier controller left in Kubernetes.
    async fn earlier(self: &Arc<Self>) -> Result<Option<String>, Failure> {
        let leases = format!("/apis/coordination.k8s.io/v1/leases?fieldSelector=metadata.name%3D{ATTACHER_LEASE}");
        if let Some(namespace) = self.first_of(&leases, |lease| Some(text(lease, "/metadata/namespace").unwrap_or_default())).await? {
            return Ok(Some(format!("the Lease {ATTACHER_LEASE} in namespace {namespace}")));
        }
        let named = |entry: &Value, driver: &str| {
            let is_ours = text(entry, driver).as_deref() == Some(proto::DRIVER_NAME);
            is_ours.then(|| text(entry, "/metadata/name").unwrap_or_default())
        };
        if let Some(name) = self.first_of("/api/v1/persistentvolumes", |pv| named(pv, "/spec/csi/driver")).await? {
            return Ok(Some(format!("PV {name}")));
        }
        let attached = self.first_of("/apis/storage.k8s.io/v1/volumeattachments", |one| named(one, "/spec/attacher")).await?;
        Ok(attached.map(|name| format!("VolumeAttachment {name}")))
    }
}
