//! The few Kubernetes calls that the controller makes, all optional and all reads: what is attached where, and which nodes are
//! out of service. Asked only when a Proxmox node is off.
//!
//! With the pod's own token, which is read again for each call: kubelet renews it.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::Instant;
use zeroize::Zeroizing;

use crate::pve::http;

/// Where kubelet puts the pod's credentials.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Entries of one page of a list.
const PAGE: usize = 500;
/// Pages of one list: half a million attachments.
const MAX_PAGES: usize = 1000;
/// A page of 500 attachments is half a megabyte.
const MAX_ANSWER_BYTES: u64 = 16 << 20;
/// One reading serves all calls that come together.
const READING_AGE: Duration = Duration::from_secs(5);
/// Kubernetes' own word for a node that is off: kubectl taint node NAME node.kubernetes.io/out-of-service=nodeshutdown:NoExecute
const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";

/// A sentence: which call, and why not.
pub type Failure = String;

/// Kubernetes' API server.
pub struct Kube {
    agent: ureq::Agent,
    url: String,
    token: PathBuf,
    attachments: AsyncMutex<Option<(Instant, Arc<Vec<Attachment>>)>>,
    nodes: AsyncMutex<Option<(Instant, Arc<Vec<CsiNode>>)>>,
    /// PV → volume handle, which never changes.
    handles: Mutex<HashMap<String, String>>,
}

impl fmt::Debug for Kube {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kube").field("url", &self.url).finish_non_exhaustive()
    }
}

/// A node that has our node agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CsiNode {
    /// Its name in Kubernetes.
    pub name: String,
    /// What the agent said that it is: `NAME/VMID` or `NAME`.
    pub node_id: String,
}

#[derive(Debug, Clone)]
struct Attachment {
    node: String,
    volume: Attached,
}

#[derive(Debug, Clone)]
enum Attached {
    Pv(String),
    Handle(String),
}

impl Kube {
    /// The API server of the cluster that this pod runs in; nothing outside of one.
    ///
    /// # Errors
    /// The pod's CA certificate cannot be used.
    pub fn in_cluster() -> Result<Option<Self>, Failure> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let token = Path::new(SERVICE_ACCOUNT).join("token");
        let (Some(host), true) = (variable("KUBERNETES_SERVICE_HOST"), token.exists()) else { return Ok(None) };
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        let port = variable("KUBERNETES_SERVICE_PORT_HTTPS").or_else(|| variable("KUBERNETES_SERVICE_PORT"));
        let url = format!("https://{host}:{}", port.unwrap_or_else(|| "443".into()));
        Self::new(&url, token, Some(&Path::new(SERVICE_ACCOUNT).join("ca.crt"))).map(Some)
    }

    /// Makes no call.
    ///
    /// # Errors
    /// There are no certificates to trust.
    pub fn new(url: &str, token: PathBuf, ca: Option<&Path>) -> Result<Self, Failure> {
        let agent = http::agent(url.starts_with("https://"), false, ca)?;
        let (attachments, nodes, handles) = (AsyncMutex::default(), AsyncMutex::default(), Mutex::default());
        Ok(Self { agent, url: url.into(), token, attachments, nodes, handles })
    }

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

    /// The handles of our volumes that Kubernetes has attached to a node, or is attaching to or detaching from it.
    ///
    /// # Errors
    /// The call that failed: nothing can be said then.
    pub async fn attached_to(self: &Arc<Self>, node: &str) -> Result<BTreeSet<String>, Failure> {
        let attachments = self.attachments().await?;
        let mut handles = BTreeSet::new();
        for attachment in attachments.iter().filter(|attachment| attachment.node == node) {
            match &attachment.volume {
                Attached::Handle(handle) => drop(handles.insert(handle.clone())),
                Attached::Pv(pv) => handles.extend(self.handle_of(pv).await?),
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
            match (text(&entry, "/spec/nodeName"), pv.or_else(inline)) {
                (Some(node), Some(volume)) => all.push(Attachment { node, volume }),
                _ => return Err(format!("GET {path}: an attachment without its node or volume")),
            }
        }
        let all = Arc::new(all);
        *held = Some((at, Arc::clone(&all)));
        Ok(all)
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
    async fn get(self: &Arc<Self>, path: String) -> Result<Option<Value>, Failure> {
        let kube = Arc::clone(self);
        let call = tokio::task::spawn_blocking(move || kube.get_blocking(&path)).await;
        call.unwrap_or_else(|cause| Err(format!("our own call broke off: {cause}")))
    }

    fn get_blocking(&self, path: &str) -> Result<Option<Value>, Failure> {
        let failed = |why: &str| format!("Kubernetes API: GET {path}: {why}");
        let token = std::fs::read_to_string(&self.token).map(Zeroizing::new);
        let token = token.map_err(|cause| failed(&format!("token {}: {cause}", self.token.display())))?;
        let bearer = Zeroizing::new(format!("Bearer {}", token.trim()));
        let answer = self.agent.get(format!("{}{path}", self.url)).header("Authorization", bearer.as_str()).call();
        let mut answer = answer.map_err(|cause| failed(&cause.to_string()))?;
        match answer.status().as_u16() {
            200 => (),
            404 => return Ok(None),
            status @ (401 | 403) => return Err(failed(&format!("{status}; give the controller's ServiceAccount get and list on it"))),
            status => return Err(failed(&status.to_string())),
        }
        let body = answer.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_string().map_err(|cause| failed(&cause.to_string()))?;
        serde_json::from_str(&body).map(Some).map_err(|cause| failed(&format!("no JSON: {cause}")))
    }
}

fn text(value: &Value, pointer: &str) -> Option<String> {
    value.pointer(pointer)?.as_str().filter(|text| !text.is_empty()).map(String::from)
}
