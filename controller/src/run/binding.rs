//! What Kubernetes says of a new volume's claim: whether its pod has a node already, which the volume has to follow, or whether
//! the pod will follow the volume.

use super::Controller;
use super::create::Place;
use super::region::{EVIDENCE_AGE, ago};
use crate::kube::Claim;
use crate::placement::{Order, is_up};
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
