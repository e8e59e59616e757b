//! What is read: which volume Kubernetes has attached where, what its nodes are to us, and which are out of service. Asked only
//! when a Proxmox node is off, or when two VMs have one volume.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use proto::VolumeHandle;
use serde_json::Value;
use tokio::time::Instant;

use super::client::Call;
use super::events::pv_named_by;
use super::{Failure, Kube, text};
use crate::run::region::ago;

/// Entries of one page of a list.
const PAGE: usize = 500;
/// Pages of one list: half a million attachments.
const MAX_PAGES: usize = 1000;
/// One reading serves all calls that come together.
const READING_AGE: Duration = Duration::from_secs(5);
/// The reference driver's word on a PV: `keep`, and its disk stays when the PV is deleted.
const LIFECYCLE: &str = "csi.proxmox.sinextra.dev~1lifecycle";
/// The reference driver's word on a Node: its VMID.
const INSTANCE_ID: &str = "/metadata/annotations/proxmox.sinextra.dev~1instance-id";
/// VolumeAttributesClasses are GA since Kubernetes 1.34, and beta from 1.31.
const CLASS_APIS: [&str; 2] = ["/apis/storage.k8s.io/v1", "/apis/storage.k8s.io/v1beta1"];
/// A PV's handle never changes, but another PV may get its name.
const HANDLE_AGE: Duration = Duration::from_secs(60);
/// Kubernetes' own word for a node that is off: kubectl taint node NAME node.kubernetes.io/out-of-service=nodeshutdown:NoExecute
const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";

/// A claim is asked about while its volume waits.
const CLAIM_LIMIT: Duration = Duration::from_secs(3);
/// The scheduler's word: the claim's pod goes to that node.
const SELECTED_NODE: &str = "/metadata/annotations/volume.kubernetes.io~1selected-node";

/// A PersistentVolumeClaim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Where it is.
    pub namespace: String,
    /// Its name there.
    pub name: String,
    pub(super) uid: String,
    /// The scheduler has selected a node for its pod.
    pub has_node: bool,
}

/// A node that has our node agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CsiNode {
    /// Its name in Kubernetes.
    pub name: String,
    /// What the agent said that it is: `NAME/VMID` or `NAME`.
    pub node_id: String,
}

/// A PV of this driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pv {
    /// Its name.
    pub name: String,
    /// Its volume's id, as it has it.
    pub handle: String,
    /// Its VolumeAttributesClass.
    pub class: Option<String>,
    /// The disk is to stay when the PV goes.
    pub keeps_disk: bool,
}

/// What a Node object says of its machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Machine {
    /// `proxmox://REGION/VMID` by the cloud controller manager, `proxmox://UUID` by Cluster API.
    pub provider_id: Option<String>,
    /// A VMID, by an annotation of the reference driver's.
    pub instance_id: Option<String>,
    /// SMBIOS' UUID.
    pub system_uuid: Option<String>,
}

#[derive(Debug, Clone)]
pub(super) struct Attachment {
    node: String,
    volume: Attached,
    is_attached: bool,
}

#[derive(Debug, Clone)]
enum Attached {
    Pv(String),
    Handle(String),
}

impl Kube {
    /// Kubernetes nodes with our agent, and what they are to us.
    ///
    /// # Errors
    /// The call that failed.
    pub async fn nodes(self: &Arc<Self>) -> Result<Arc<Vec<CsiNode>>, Failure> {
        let read = |entry: Value| {
            let drivers = entry.pointer("/spec/drivers").and_then(Value::as_array);
            let ours = drivers.into_iter().flatten().find(|driver| text(driver, "/name").as_deref() == Some(proto::DRIVER_NAME))?;
            Some(CsiNode { name: text(&entry, "/metadata/name")?, node_id: text(ours, "/nodeID")? })
        };
        let list = async { Ok(Arc::new(self.list("/apis/storage.k8s.io/v1/csinodes", |entry| Ok(read(entry))).await?)) };
        self.nodes.since(ago(READING_AGE), list).await
    }

    /// The handles of our volumes that Kubernetes has attached to a node, or is attaching to or detaching from it, and whether
    /// they are attached by its own books. Without those whose PV is gone.
    ///
    /// # Errors
    /// The call that failed: nothing can be said then.
    pub async fn attached_to(self: &Arc<Self>, node: &str) -> Result<BTreeMap<String, bool>, Failure> {
        Ok(self.attachments_of(node).await?.0)
    }

    /// The same for whom it must be all of them.
    ///
    /// # Errors
    /// The call that failed; or a PV is gone under its attachment (its finalizer was taken away).
    pub async fn all_attached_to(self: &Arc<Self>, node: &str) -> Result<BTreeMap<String, bool>, Failure> {
        match self.attachments_of(node).await? {
            (handles, None) => Ok(handles),
            (_, Some(pv)) => {
                Err(format!("node {node} has a VolumeAttachment without its PV {pv}; find and remove it: kubectl get volumeattachment"))
            }
        }
    }

    /// And a PV that is gone, where there is one.
    async fn attachments_of(self: &Arc<Self>, node: &str) -> Result<(BTreeMap<String, bool>, Option<String>), Failure> {
        let attachments = self.attachments().await?;
        let (mut handles, mut gone) = (BTreeMap::new(), None);
        for attachment in attachments.iter().filter(|attachment| attachment.node == node) {
            let handle = match &attachment.volume {
                Attached::Handle(handle) => handle.clone(),
                Attached::Pv(pv) => match self.handle_of(pv).await? {
                    Some(handle) => handle,
                    None => {
                        gone.get_or_insert_with(|| pv.clone());
                        continue;
                    }
                },
            };
            *handles.entry(handle).or_default() |= attachment.is_attached;
        }
        Ok((handles, gone))
    }

    /// Nodes to which something of ours is attached, and of which there is no CSINode any more.
    ///
    /// # Errors
    /// The call that failed.
    pub async fn nodes_forgotten(self: &Arc<Self>) -> Result<Vec<String>, Failure> {
        let (attachments, nodes) = (self.attachments().await?, self.nodes().await?);
        let gone = attachments.iter().map(|attachment| &attachment.node).filter(|name| nodes.iter().all(|node| node.name != **name));
        Ok(gone.cloned().collect::<std::collections::BTreeSet<_>>().into_iter().collect())
    }

    /// Whether a person, or something that knows, has said that the node is off.
    ///
    /// # Errors
    /// The call that failed.
    pub async fn is_out_of_service(self: &Arc<Self>, node: &str) -> Result<bool, Failure> {
        let Some(node) = self.get(format!("/api/v1/nodes/{node}")).await? else { return Ok(false) };
        let taints = node.pointer("/spec/taints").and_then(Value::as_array);
        Ok(taints.into_iter().flatten().any(|taint| text(taint, "/key").as_deref() == Some(OUT_OF_SERVICE)))
    }

    /// A claim as it is now; nothing where there is none.
    ///
    /// # Errors
    /// The call that failed.
    pub async fn claim(self: &Arc<Self>, namespace: &str, name: &str) -> Result<Option<Claim>, Failure> {
        let segment = |text| crate::pve::api::percent_encoded(text, "");
        let path = format!("/api/v1/namespaces/{}/persistentvolumeclaims/{}", segment(namespace), segment(name));
        let Some(claim) = self.answered(Call { limit: CLAIM_LIMIT, ..Call::get(path) }).await? else { return Ok(None) };
        let uid = text(&claim, "/metadata/uid").unwrap_or_default();
        Ok(Some(Claim { namespace: namespace.into(), name: name.into(), uid, has_node: text(&claim, SELECTED_NODE).is_some() }))
    }

    async fn attachments(self: &Arc<Self>) -> Result<Arc<Vec<Attachment>>, Failure> {
        let path = "/apis/storage.k8s.io/v1/volumeattachments";
        let read = |entry: Value| {
            if text(&entry, "/spec/attacher").as_deref() != Some(proto::DRIVER_NAME) {
                return Ok(None);
            }
            let pv = text(&entry, "/spec/source/persistentVolumeName").map(Attached::Pv);
            let inline = || text(&entry, "/spec/source/inlineVolumeSpec/csi/volumeHandle").map(Attached::Handle);
            let is_attached = entry.pointer("/status/attached").and_then(Value::as_bool).unwrap_or_default();
            match (text(&entry, "/spec/nodeName"), pv.or_else(inline)) {
                (Some(node), Some(volume)) => Ok(Some(Attachment { node, volume, is_attached })),
                _ => Err(format!("GET {path}: an attachment without its node or volume")),
            }
        };
        self.attachments.since(ago(READING_AGE), async { Ok(Arc::new(self.list(path, read).await?)) }).await
    }

    /// All PVs of this driver.
    ///
    /// # Errors
    /// The call that failed: nothing can be said then.
    pub async fn pvs(self: &Arc<Self>) -> Result<Arc<Vec<Pv>>, Failure> {
        self.pvs_since(ago(READING_AGE)).await
    }

    async fn pvs_since(self: &Arc<Self>, since: Instant) -> Result<Arc<Vec<Pv>>, Failure> {
        let list = async { Ok(Arc::new(self.list("/api/v1/persistentvolumes", |entry| Ok(read_pv(&entry))).await?)) };
        self.pvs.since(since, list).await
    }

    /// The PVs that have this volume: the one that its disk is named after is read now, others within some seconds.
    ///
    /// # Errors
    /// The call that failed: nothing can be said then.
    pub async fn pvs_of(self: &Arc<Self>, handle: &VolumeHandle) -> Result<Vec<Pv>, Failure> {
        let named = match pv_named_by(&handle.disk) {
            Some(name) => self.get(format!("/api/v1/persistentvolumes/{name}")).await?.as_ref().and_then(read_pv),
            None => None,
        };
        let mut found: Vec<Pv> = named.into_iter().filter(|pv| is_of(pv, handle)).collect();
        if found.is_empty() {
            found.extend(self.pvs().await?.iter().filter(|pv| is_of(pv, handle)).cloned());
        }
        Ok(found)
    }

    /// Whether any PV of this volume, by whichever of its handles, says that its disk stays; all PVs are read now, once for all who
    /// wait for a reading that began after they asked.
    ///
    /// # Errors
    /// The call that failed: nothing can be said then.
    pub async fn keeps_disk(self: &Arc<Self>, handle: &VolumeHandle) -> Result<bool, Failure> {
        Ok(self.pvs_since(Instant::now()).await?.iter().any(|pv| pv.keeps_disk && is_of(pv, handle)))
    }

    /// The parameters of a VolumeAttributesClass; nothing where there is none of that name.
    ///
    /// # Errors
    /// The call that failed.
    pub async fn class(self: &Arc<Self>, name: &str) -> Result<Option<HashMap<String, String>>, Failure> {
        for api in CLASS_APIS {
            let path = format!("{api}/volumeattributesclasses/{}", crate::pve::api::percent_encoded(name, ""));
            let Some(class) = self.get(path).await? else { continue };
            let parameters = class.get("parameters").and_then(Value::as_object);
            let pairs = parameters.into_iter().flatten().filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())));
            return Ok(Some(pairs.collect()));
        }
        Ok(None)
    }

    /// What a Node object says of its machine; nothing where there is no such Node.
    ///
    /// # Errors
    /// The call that failed.
    pub async fn machine(self: &Arc<Self>, node: &str) -> Result<Option<Machine>, Failure> {
        let node = self.get(format!("/api/v1/nodes/{}", crate::pve::api::percent_encoded(node, ""))).await?;
        Ok(node.map(|node| Machine {
            provider_id: text(&node, "/spec/providerID"),
            instance_id: text(&node, INSTANCE_ID),
            system_uuid: text(&node, "/status/nodeInfo/systemUUID"),
        }))
    }

    /// The PVs of our volumes that are attached somewhere, or are to be.
    ///
    /// # Errors
    /// The call that failed.
    pub(super) async fn attached_pvs(self: &Arc<Self>) -> Result<Vec<String>, Failure> {
        let pv = |attachment: &Attachment| match &attachment.volume {
            Attached::Pv(pv) => Some(pv.clone()),
            Attached::Handle(_) => None,
        };
        Ok(self.attachments().await?.iter().filter_map(pv).collect())
    }

    /// Nothing where the PV is gone.
    async fn handle_of(self: &Arc<Self>, pv: &str) -> Result<Option<String>, Failure> {
        let known = self.handles.lock().unwrap_or_else(PoisonError::into_inner).get(pv).cloned();
        if let Some((_, handle)) = known.filter(|(at, _)| at.elapsed() < HANDLE_AGE) {
            return Ok(Some(handle));
        }
        let at = Instant::now();
        let path = format!("/api/v1/persistentvolumes/{pv}");
        let Some(volume) = self.get(path.clone()).await? else { return Ok(None) };
        let handle = text(&volume, "/spec/csi/volumeHandle").ok_or_else(|| format!("GET {path}: no volumeHandle"))?;
        self.handles.lock().unwrap_or_else(PoisonError::into_inner).insert(pv.into(), (at, handle.clone()));
        Ok(Some(handle))
    }

    /// All objects of a kind, as they are.
    ///
    /// # Errors
    /// The call that failed.
    pub(crate) async fn objects(self: &Arc<Self>, path: &str) -> Result<Vec<Value>, Failure> {
        self.list(path, |entry| Ok(Some(entry))).await
    }

    /// One object; nothing where it is not there.
    ///
    /// # Errors
    /// The call that failed.
    pub(crate) async fn object(self: &Arc<Self>, path: String) -> Result<Option<Value>, Failure> {
        self.get(path).await
    }

    /// What `read` makes of each entry; of one page at a time, for ten thousand PVs as they are would be a hundred megabytes.
    async fn list<T>(self: &Arc<Self>, path: &str, read: impl FnMut(Value) -> Result<Option<T>, Failure>) -> Result<Vec<T>, Failure> {
        let mut pages = Pages { path, read, all: Vec::new() };
        self.pages(path, &mut |page| pages.take(page).map(|()| None::<()>)).await?;
        Ok(pages.all)
    }

    /// What is meant in the first entry of a list that has it; no more is read, nor kept.
    pub(super) async fn first_of<T>(self: &Arc<Self>, path: &str, meant: impl Fn(&Value) -> Option<T>) -> Result<Option<T>, Failure> {
        self.pages(path, &mut |mut page| Ok(entries(path, &mut page)?.iter().find_map(&meant))).await
    }

    /// Page by page, until one has what is looked for.
    async fn pages<T>(
        self: &Arc<Self>,
        path: &str,
        look: &mut impl FnMut(Value) -> Result<Option<T>, Failure>,
    ) -> Result<Option<T>, Failure> {
        let mut next = String::new();
        let separator = if path.contains('?') { '&' } else { '?' };
        for _ in 0..MAX_PAGES {
            let page = format!("{path}{separator}limit={PAGE}&continue={}", crate::pve::api::percent_encoded(&next, ""));
            let page = self.get(page).await?.ok_or_else(|| format!("GET {path}: 404, is this Kubernetes?"))?;
            next = text(&page, "/metadata/continue").unwrap_or_default();
            let found = look(page)?;
            if found.is_some() || next.is_empty() {
                return Ok(found);
            }
        }
        Err(format!("GET {path}: more than {MAX_PAGES} pages"))
    }

    /// Nothing for 404.
    pub(super) async fn get(self: &Arc<Self>, path: String) -> Result<Option<Value>, Failure> {
        self.answered(Call::get(path)).await
    }

    async fn answered(self: &Arc<Self>, call: Call) -> Result<Option<Value>, Failure> {
        let name = call.name();
        let answer = self.api.call(call).await?;
        match answer.status {
            200 => Ok(Some(answer.body)),
            404 => Ok(None),
            401 | 403 => Err(format!("{}; give the controller's ServiceAccount get and list on it", answer.refusal(&name))),
            _ => Err(answer.refusal(&name)),
        }
    }
}

/// A list as it comes in.
struct Pages<'a, T, F> {
    path: &'a str,
    read: F,
    all: Vec<T>,
}

impl<T, F: FnMut(Value) -> Result<Option<T>, Failure>> Pages<'_, T, F> {
    /// Reads one page and lets it go.
    fn take(&mut self, mut page: Value) -> Result<(), Failure> {
        for entry in entries(self.path, &mut page)? {
            self.all.extend((self.read)(entry)?);
        }
        Ok(())
    }
}

fn entries(path: &str, page: &mut Value) -> Result<Vec<Value>, Failure> {
    match page.get_mut("items").map(Value::take) {
        Some(Value::Array(entries)) => Ok(entries),
        _ => Err(format!("GET {path}: no list of items")),
    }
}

fn read_pv(entry: &Value) -> Option<Pv> {
    if text(entry, "/spec/csi/driver").as_deref() != Some(proto::DRIVER_NAME) {
        return None;
    }
    let words = [format!("/metadata/annotations/{LIFECYCLE}"), format!("/spec/csi/volumeAttributes/{LIFECYCLE}")];
    let keeps = |pointer: &String| text(entry, pointer).is_some_and(|word| word.eq_ignore_ascii_case("keep"));
    Some(Pv {
        name: text(entry, "/metadata/name")?,
        handle: text(entry, "/spec/csi/volumeHandle")?,
        class: text(entry, "/spec/volumeAttributesClassName"),
        keeps_disk: words.iter().any(keeps),
    })
}

/// Whether the PV has that volume; its handle may carry a zone, or not, where the other does not.
fn is_of(pv: &Pv, handle: &VolumeHandle) -> bool {
    let Ok(given) = pv.handle.parse::<VolumeHandle>() else { return false };
    let is_there = given.zone == handle.zone || given.zone.is_empty() || handle.zone.is_empty();
    is_there && given.region == handle.region && given.volid() == handle.volid()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn of_a_page_only_what_is_read_is_kept() {
        let mut pages = Pages { path: "/x", read: |entry| Ok(read_pv(&entry)), all: Vec::new() };
        let padding = "x".repeat(1 << 12);
        let pv = |name: &str, driver: &str| json!({"metadata": {"name": name, "annotations": {"padding": padding}}, "spec": {"csi": {"driver": driver, "volumeHandle": name}}});
        let ours = [pv("a", proto::DRIVER_NAME), pv("b", "other.csi"), pv("c", proto::DRIVER_NAME)];
        assert_eq!(pages.take(json!({"metadata": {"continue": "2"}, "items": ours})), Ok(()));
        assert_eq!(pages.all.len(), 2, "read before the next page is asked for");
        assert_eq!(pages.take(json!({"metadata": {"continue": ""}, "items": [pv("d", proto::DRIVER_NAME)]})), Ok(()));
        assert_eq!(pages.all.iter().map(|pv| pv.name.as_str()).collect::<Vec<_>>(), ["a", "c", "d"]);
        assert!(pages.take(json!({"metadata": {}})).unwrap_err().contains("no list of items"));
    }
}
