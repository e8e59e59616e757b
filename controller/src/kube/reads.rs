//! What is read: which volume Kubernetes has attached where, what its nodes are to us, and which are out of service. Asked only
//! when a Proxmox node is off, or when two VMs have one volume.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use super::client::Call;
use super::{Failure, Kube, text};

/// Entries of one page of a list.
const PAGE: usize = 500;
/// Pages of one list: half a million attachments.
const MAX_PAGES: usize = 1000;
/// One reading serves all calls that come together.
const READING_AGE: Duration = Duration::from_secs(5);
/// Kubernetes' own word for a node that is off: kubectl taint node NAME node.kubernetes.io/out-of-service=nodeshutdown:NoExecute
const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";

/// A node that has our node agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CsiNode {
    /// Its name in Kubernetes.
    pub name: String,
    /// What the agent said that it is: `NAME/VMID` or `NAME`.
    pub node_id: String,
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
        let mut held = self.nodes.lock().await;
        if let Some((_, nodes)) = held.as_ref().filter(|(at, _)| at.elapsed() < READING_AGE) {
            return Ok(Arc::clone(nodes));
        }
        let at = Instant::now();
        let read = |entry: &Value| {
            let drivers = entry.pointer("/spec/drivers").and_then(Value::as_array);
            let ours = drivers.into_iter().flatten().find(|driver| text(driver, "/name").as_deref() == Some(proto::DRIVER_NAME))?;
            Some(CsiNode { name: text(entry, "/metadata/name")?, node_id: text(ours, "/nodeID")? })
        };
        let nodes = Arc::new(self.list("/apis/storage.k8s.io/v1/csinodes").await?.iter().filter_map(read).collect::<Vec<_>>());
        *held = Some((at, Arc::clone(&nodes)));
        Ok(nodes)
    }

    /// The handles of our volumes that Kubernetes has attached to a node, or is attaching to or detaching from it, and whether
    /// they are attached by its own books.
    ///
    /// # Errors
    /// The call that failed: nothing can be said then.
    pub async fn attached_to(self: &Arc<Self>, node: &str) -> Result<BTreeMap<String, bool>, Failure> {
        let attachments = self.attachments().await?;
        let mut handles = BTreeMap::new();
        for attachment in attachments.iter().filter(|attachment| attachment.node == node) {
            let handle = match &attachment.volume {
                Attached::Handle(handle) => Some(handle.clone()),
                Attached::Pv(pv) => self.handle_of(pv).await?,
            };
            if let Some(handle) = handle {
                *handles.entry(handle).or_default() |= attachment.is_attached;
            }
        }
        Ok(handles)
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

    async fn attachments(self: &Arc<Self>) -> Result<Arc<Vec<Attachment>>, Failure> {
        let mut held = self.attachments.lock().await;
        if let Some((_, attachments)) = held.as_ref().filter(|(at, _)| at.elapsed() < READING_AGE) {
            return Ok(Arc::clone(attachments));
        }
        let (at, path) = (Instant::now(), "/apis/storage.k8s.io/v1/volumeattachments");
        let mut all = Vec::new();
        for entry in self.list(path).await? {
            if text(&entry, "/spec/attacher").as_deref() != Some(proto::DRIVER_NAME) {
                continue;
            }
            let pv = text(&entry, "/spec/source/persistentVolumeName").map(Attached::Pv);
            let inline = || text(&entry, "/spec/source/inlineVolumeSpec/csi/volumeHandle").map(Attached::Handle);
            let is_attached = entry.pointer("/status/attached").and_then(Value::as_bool).unwrap_or_default();
            match (text(&entry, "/spec/nodeName"), pv.or_else(inline)) {
                (Some(node), Some(volume)) => all.push(Attachment { node, volume, is_attached }),
                _ => return Err(format!("GET {path}: an attachment without its node or volume")),
            }
        }
        let all = Arc::new(all);
        *held = Some((at, Arc::clone(&all)));
        Ok(all)
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
        if known.is_some() {
            return Ok(known);
        }
        let path = format!("/api/v1/persistentvolumes/{pv}");
        let Some(volume) = self.get(path.clone()).await? else { return Ok(None) };
        let handle = text(&volume, "/spec/csi/volumeHandle").ok_or_else(|| format!("GET {path}: no volumeHandle"))?;
        self.handles.lock().unwrap_or_else(PoisonError::into_inner).insert(pv.into(), handle.clone());
        Ok(Some(handle))
    }

    /// All objects of a kind, as they are.
    ///
    /// # Errors
    /// The call that failed.
    pub(crate) async fn objects(self: &Arc<Self>, path: &str) -> Result<Vec<Value>, Failure> {
        self.list(path).await
    }

    /// One object; nothing where it is not there.
    ///
    /// # Errors
    /// The call that failed.
    pub(crate) async fn object(self: &Arc<Self>, path: String) -> Result<Option<Value>, Failure> {
        self.get(path).await
    }

    async fn list(self: &Arc<Self>, path: &str) -> Result<Vec<Value>, Failure> {
        let (mut all, mut next) = (Vec::new(), String::new());
        for _ in 0..MAX_PAGES {
            let page = format!("{path}?limit={PAGE}&continue={}", crate::pve::api::percent_encoded(&next, ""));
            let mut answer = self.get(page).await?.ok_or_else(|| format!("GET {path}: 404, is this Kubernetes?"))?;
            next = text(&answer, "/metadata/continue").unwrap_or_default();
            match answer.get_mut("items").map(Value::take) {
                Some(Value::Array(items)) => all.extend(items),
                _ => return Err(format!("GET {path}: no list of items")),
            }
            if next.is_empty() {
                return Ok(all);
            }
        }
        Err(format!("GET {path}: more than {MAX_PAGES} pages"))
    }

    /// Nothing for 404.
    pub(super) async fn get(self: &Arc<Self>, path: String) -> Result<Option<Value>, Failure> {
        let call = Call::get(path);
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
