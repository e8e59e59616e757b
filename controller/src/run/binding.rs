//! What Kubernetes says of a new volume's claim: whether its pod has a node already, which the volume has to follow, or whether
//! the pod will follow the volume.

use super::create::Place;
use super::region::{EVIDENCE_AGE, ago};
use super::{Controller, TRIED_AGE, when};
use crate::error::Error;
use crate::kube::{Claim, text};
use crate::placement::{Order, is_up};
use crate::pve::api::percent_encoded;
use crate::request::Create;

impl Controller {
    /// The request, the meaning of its order settled where it is in doubt; and the claim, if it is bound before its pod has a node.
    pub(super) async fn asked_kubernetes(&self, mut request: Create) -> (Create, Option<Claim>) {
        // One zone leaves no choice, and a wish is one.
        if request.want.order == Order::Wish || request.want.terms.len() == 1 {
            return (request, None);
        }
        let (Some(kube), Some((namespace, name))) = (&self.kube, &request.claim) else { return (request, None) };
        match kube.claim(namespace, name).await {
            Ok(Some(claim)) => {
                request.want.order = if claim.has_node { Order::Wish } else { Order::Free };
                let claim = (!claim.has_node).then_some(claim);
                (request, claim)
            }
            Ok(None) => (request, None),
            Err(why) => {
                proto::warn!("create {}: whether a node is selected for the pod of claim {namespace}/{name}: {why}", request.name);
                (request, None)
            }
        }
    }

    /// Whether what a controller before this one began may still go on.
    pub(super) fn is_young(&self) -> bool {
        self.begun.0.elapsed() < TRIED_AGE
    }

    /// A controller before us may have begun this creation where nobody can look now; a second volume would be made elsewhere. For
    /// as long as such a creation could still go on it is waited for, then no longer: a node may be off for days.
    ///
    /// # Errors
    /// It is waited for: the zone.
    pub(super) async fn check_earlier_controllers(&self, request: &Create, skipped: &[(String, String)]) -> Result<(), Error> {
        let (Some(kube), [(region, host), ..]) = (&self.kube, skipped) else { return Ok(()) };
        let path = request.claim.as_ref().map(|(namespace, name)| {
            let segment = |text| percent_encoded(text, "");
            format!("/api/v1/namespaces/{}/persistentvolumeclaims/{}", segment(namespace), segment(name))
        });
        let made_at = match path {
            Some(path) => kube.object(path).await.ok().flatten().and_then(|claim| text(&claim, "/metadata/creationTimestamp")),
            None => None,
        };
        // Both are UTC in one form, so that their texts are in order. A claim that is not known may be of any age.
        if made_at.is_some_and(|made_at| made_at > when::rfc3339(self.begun.1)) {
            return Ok(());
        }
        let storage = &request.want.storage;
        if self.is_young() {
            return Err(Error::unavailable(format!(
                "storage {storage} of Proxmox node {region}/{host} cannot be looked at, and a controller before this one may have made {} \
                 there; waiting for the node, at most {} s after the start, so that no second volume is made",
                request.name,
                TRIED_AGE.as_secs()
            )));
        }
        proto::warn!(
            "create {}: made though storage {storage} of Proxmox node {region}/{host} was not looked at: if a controller before this one \
             made it there, that disk is nobody's",
            request.name
        );
        Ok(())
    }

    /// Once for each storage: a pod can run only where its volume was made by chance.
    pub(super) async fn tell_of_binding(&self, request: &Create, place: &Place, claim: Claim) {
        let (Some(kube), false) = (&self.kube, place.handle.zone.is_empty()) else { return };
        let Ok(resources) = place.region.resources(ago(EVIDENCE_AGE)).await else { return };
        let want = &request.want;
        let is_choice = |host: &str| want.terms.is_empty() || want.terms.iter().any(|term| term.fits(&place.handle.region, host));
        let of_storage = resources.storages.iter().filter(|one| one.storage == want.storage && is_up(&resources, one));
        let hosts: Vec<&str> = of_storage.map(|one| one.host.as_str()).filter(|host| is_choice(host)).collect();
        let key = (place.handle.region.clone(), want.storage.clone());
        if hosts.len() < 2 || !self.told_of_binding().insert(key) {
            return;
        }
        let message = format!(
            "this StorageClass binds its claims before their pods are scheduled (volumeBindingMode Immediate), and storage {:?} is local to each of {}: \
             the volume was made on {}, and its pod can run only there; use WaitForFirstConsumer, unless something waits for the claim before it \
             makes the pod. Told once for this storage",
            want.storage,
            hosts.join(", "),
            place.handle.zone
        );
        proto::warn!("create {}: {message}", request.name);
        kube.tell_claim(&claim, "ImmediateOnLocalStorage", &message);
    }
}
