//! As much of Kubernetes' API server as the controller calls, over HTTP: objects by path, lists in pages, writes refused when
//! their resourceVersion is old. What fails, and when, a test says.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ::controller::kube::Access;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::sim::http::{self, Request};
use crate::sim::turns::{Door, Turns};

/// The pod's token.
pub const TOKEN: &str = "pod-token";
/// Where the controller lives.
pub const NAMESPACE: &str = "csi-proxmox";
const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/csi-proxmox/leases";
const CSI_NODES: &str = "/apis/storage.k8s.io/v1/csinodes";
const ATTACHMENTS: &str = "/apis/storage.k8s.io/v1/volumeattachments";
const PVS: &str = "/api/v1/persistentvolumes";
const NODES: &str = "/api/v1/nodes";
/// What is a list when nothing is in it.
const PLURALS: [&str; 8] =
    ["leases", "csinodes", "volumeattachments", "persistentvolumes", "nodes", "events", "storageclasses", "persistentvolumeclaims"];

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<String, Value>,
    version: u64,
    /// `METHOD PREFIX` → what is answered instead; see [`Kubernetes::breaks`].
    broken: BTreeMap<String, u16>,
    asked: Vec<String>,
}

/// The API server; ends with its value.
#[derive(Debug)]
pub struct Kubernetes {
    state: Arc<Mutex<State>>,
    turns: Option<Turns>,
    url: String,
    server: JoinHandle<()>,
}

impl Drop for Kubernetes {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Kubernetes {
    /// # Errors
    /// No socket.
    pub async fn start() -> Result<Kubernetes> {
        Self::start_with(None).await
    }

    /// The same, whose requests wait until they are let in.
    pub(crate) async fn start_with(turns: Option<Turns>) -> Result<Kubernetes> {
        let state = Arc::default();
        let (url, server) = listen(Arc::clone(&state), turns.clone(), "kubernetes").await?;
        Ok(Kubernetes { state, turns, url, server })
    }

    /// One more listener, whose requests are known by its name.
    pub(crate) async fn door(&self, name: &str) -> Result<Door> {
        let (url, server) = listen(Arc::clone(&self.state), self.turns.clone(), name).await?;
        Ok(Door { name: name.to_owned(), url, turns: self.turns.clone(), server })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How a controller gets there; its token goes into `folder`.
    ///
    /// # Errors
    /// The token cannot be written.
    pub fn access(&self, folder: &Path) -> Result<Access> {
        self.access_at(&self.url, folder)
    }

    pub(crate) fn access_at(&self, url: &str, folder: &Path) -> Result<Access> {
        Ok(Access::new(url, token(folder)?, None, NAMESPACE))
    }

    /// A kubeconfig for it in `folder`.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn kubeconfig(&self, folder: &Path) -> Result<PathBuf> {
        let (path, token) = (folder.join("kubeconfig"), token(folder)?);
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: k, user: u, namespace: {NAMESPACE}}}}}]\n\
             clusters: [{{name: k, cluster: {{server: '{}'}}}}]\nusers: [{{name: u, user: {{tokenFile: {}}}}}]\n",
            self.url,
            token.display()
        );
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }

    /// Puts an object there, whatever was there.
    pub fn put(&self, path: &str, object: Value) {
        self.state().store(path, object);
    }

    pub fn remove(&self, path: &str) {
        self.state().objects.remove(path);
    }

    /// A Kubernetes node, by what its agent says that it is.
    pub fn node(&self, name: &str, node_id: &str) {
        let drivers = json!([{"name": "other.csi", "nodeID": "x"}, {"name": proto::DRIVER_NAME, "nodeID": node_id}]);
        self.put(&format!("{CSI_NODES}/{name}"), json!({"metadata": {"name": name}, "spec": {"drivers": drivers}}));
        self.put(&format!("{NODES}/{name}"), json!({"metadata": {"name": name}, "spec": {}}));
    }

    /// Kubernetes' word that the node is off; or takes it back.
    pub fn taint(&self, node: &str, is_out: bool) {
        let taint = json!({"key": "node.kubernetes.io/out-of-service", "value": "nodeshutdown", "effect": "NoExecute"});
        let taints = if is_out { vec![taint] } else { Vec::new() };
        self.put(&format!("{NODES}/{node}"), json!({"metadata": {"name": node}, "spec": {"taints": taints}}));
    }

    /// A PV, and the claim that it is bound to.
    pub fn pv(&self, name: &str, handle: &str) {
        let claim = json!({"kind": "PersistentVolumeClaim", "namespace": "apps", "name": format!("claim-{name}"), "uid": format!("uid-of-claim-{name}")});
        let spec = json!({"csi": {"driver": proto::DRIVER_NAME, "volumeHandle": handle}, "claimRef": claim});
        self.put(&format!("{PVS}/{name}"), json!({"metadata": {"name": name, "uid": format!("uid-of-{name}")}, "spec": spec}));
    }

    /// The PV is to be attached to the node, or is.
    pub fn attachment(&self, pv: &str, node: &str, is_attached: bool) {
        self.attachment_of(proto::DRIVER_NAME, pv, node, is_attached);
    }

    /// The same of any driver.
    pub fn attachment_of(&self, attacher: &str, pv: &str, node: &str, is_attached: bool) {
        let name = format!("csi-{pv}-{node}");
        let spec = json!({"attacher": attacher, "nodeName": node, "source": {"persistentVolumeName": pv}});
        let object = json!({"metadata": {"name": name}, "spec": spec, "status": {"attached": is_attached}});
        self.put(&format!("{ATTACHMENTS}/{name}"), object);
    }

    pub fn detached(&self, pv: &str, node: &str) {
        self.remove(&format!("{ATTACHMENTS}/csi-{pv}-{node}"));
    }

    /// Every such request (`GET /api/v1/nodes`) is answered so, until `None`; 0: not at all; 1: it is done, and not answered.
    pub fn breaks(&self, method_and_prefix: &str, status: Option<u16>) {
        let mut state = self.state();
        match status {
            Some(status) => drop(state.broken.insert(method_and_prefix.into(), status)),
            None => drop(state.broken.remove(method_and_prefix)),
        }
    }

    /// The Lease of the driver.
    #[must_use]
    pub fn lease(&self) -> Option<Value> {
        self.state().objects.get(&format!("{LEASES}/{}", proto::DRIVER_NAME)).cloned()
    }

    /// Who holds it; nobody where it was given back.
    #[must_use]
    pub fn holder(&self) -> Option<String> {
        let holder = self.lease()?.pointer("/spec/holderIdentity")?.as_str()?.to_owned();
        Some(holder).filter(|holder| !holder.is_empty())
    }

    /// As somebody else's process would.
    pub fn give_lease_to(&self, holder: &str) {
        let mut lease = self.lease().unwrap_or_else(|| json!({"metadata": {"name": proto::DRIVER_NAME}, "spec": {}}));
        if let Some(spec) = lease.pointer_mut("/spec").and_then(Value::as_object_mut) {
            spec.insert("holderIdentity".into(), holder.into());
            spec.insert("leaseDurationSeconds".into(), 15.into());
        }
        self.put(&format!("{LEASES}/{}", proto::DRIVER_NAME), lease);
    }

    /// As a controller that knew the outcome of all its writes left it: the next one takes it at once.
    pub fn lease_given_back(&self) {
        let annotations = json!({"csi.proxmox.sinextra.dev/given-back-by": "an-earlier-one"});
        let spec = json!({"holderIdentity": "", "leaseDurationSeconds": 15});
        let lease = json!({"metadata": {"name": proto::DRIVER_NAME, "annotations": annotations}, "spec": spec});
        self.put(&format!("{LEASES}/{}", proto::DRIVER_NAME), lease);
    }

    pub fn delete_lease(&self) {
        self.remove(&format!("{LEASES}/{}", proto::DRIVER_NAME));
    }

    /// All Events.
    #[must_use]
    pub fn events(&self) -> Vec<Value> {
        let state = self.state();
        state.objects.iter().filter(|(path, _)| path.contains("/events/")).map(|(_, event)| event.clone()).collect()
    }

    /// `METHOD PATH` of every request since this was asked last.
    #[must_use]
    pub fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.state().asked)
    }
}

fn token(folder: &Path) -> Result<PathBuf> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let path = folder.join("kubernetes-token");
    // Many tests, and several runs of them, may share the folder: nobody may read half of it.
    let part = folder.join(format!("kubernetes-token.{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed)));
    std::fs::write(&part, format!("{TOKEN}\n")).with_context(|| format!("write {}", part.display()))?;
    std::fs::rename(&part, &path).with_context(|| format!("rename {}", part.display()))?;
    Ok(path)
}

async fn listen(state: Arc<Mutex<State>>, turns: Option<Turns>, door: &str) -> Result<(String, JoinHandle<()>)> {
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.context("listen as Kubernetes")?;
    let url = format!("http://{}", listener.local_addr()?);
    Ok((url, tokio::spawn(serve(listener, state, turns, door.to_owned()))))
}

async fn serve(listener: TcpListener, state: Arc<Mutex<State>>, turns: Option<Turns>, door: String) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let (state, turns, door) = (Arc::clone(&state), turns.clone(), door.clone());
        connections.spawn(async move {
            // A broken connection is the client's business.
            let _ = talk(stream, &state, turns.as_ref(), &door).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn talk(mut stream: TcpStream, state: &Mutex<State>, turns: Option<&Turns>, door: &str) -> std::io::Result<()> {
    let _ = stream.set_nodelay(true);
    let mut buffer = Vec::new();
    while let Some(request) = http::read(&mut stream, &mut buffer, None).await? {
        let working = match turns {
            None => None,
            Some(turns) => {
                let path = request.target.split('?').next().unwrap_or_default();
                let Some(working) = turns.arrive(door, &format!("{} {path}", request.method), u64::MAX).await else { return Ok(()) };
                Some(working)
            }
        };
        let answer = state.lock().unwrap_or_else(PoisonError::into_inner).answer(&request);
        if let Some(working) = working
            && !working.leave().await
        {
            return Ok(());
        }
        let Some((status, body)) = answer else { return Ok(()) };
        let body = body.to_string();
        let head = format!("HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all(format!("{head}{body}").as_bytes()).await?;
        stream.flush().await?;
    }
    Ok(())
}

fn refused(code: u16, reason: &str) -> (u16, Value) {
    (code, json!({"kind": "Status", "status": "Failure", "reason": reason, "message": format!("refused: {reason}"), "code": code}))
}

impl State {
    fn store(&mut self, path: &str, mut object: Value) -> Value {
        self.version += 1;
        if let Some(metadata) = object.pointer_mut("/metadata").and_then(Value::as_object_mut) {
            metadata.insert("resourceVersion".into(), self.version.to_string().into());
        }
        self.objects.insert(path.into(), object.clone());
        object
    }

    /// Nothing: the connection ends.
    fn answer(&mut self, request: &Request) -> Option<(u16, Value)> {
        let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
        let call = format!("{} {path}", request.method);
        self.asked.push(call.clone());
        if let Some(status) = self.broken.iter().find(|(prefix, _)| call.starts_with(*prefix)).map(|(_, status)| *status) {
            if status == 1 {
                let _ = self.perform(request, path, query);
            }
            return (status > 1).then(|| refused(status, "Broken"));
        }
        if request.header("authorization") != Some(&format!("Bearer {TOKEN}")) {
            return Some(refused(401, "Unauthorized"));
        }
        Some(self.perform(request, path, query))
    }

    fn perform(&mut self, request: &Request, path: &str, query: &str) -> (u16, Value) {
        let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        match request.method.as_str() {
            "GET" if PLURALS.iter().any(|plural| path.ends_with(&format!("/{plural}"))) => (200, self.page(path, query)),
            "GET" => self.objects.get(path).map_or_else(|| refused(404, "NotFound"), |object| (200, object.clone())),
            "POST" => {
                let name = body.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
                let place = format!("{path}/{name}");
                if self.objects.contains_key(&place) { refused(409, "AlreadyExists") } else { (201, self.store(&place, body)) }
            }
            "PUT" => {
                let version = |object: &Value| object.pointer("/metadata/resourceVersion").cloned();
                match self.objects.get(path) {
                    None => refused(404, "NotFound"),
                    Some(there) if version(&body).is_some_and(|given| Some(given) != version(there)) => refused(409, "Conflict"),
                    Some(_) => (200, self.store(path, body)),
                }
            }
            "PATCH" => match self.objects.get(path).cloned() {
                None => refused(404, "NotFound"),
                Some(mut there) => {
                    merge(&mut there, &body);
                    (200, self.store(path, there))
                }
            },
            _ => refused(405, "MethodNotAllowed"),
        }
    }

    fn page(&self, path: &str, query: &str) -> Value {
        let number = |key: &str| query.split('&').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('=')?.parse::<usize>().ok());
        let (limit, from) = (number("limit").unwrap_or(usize::MAX), number("continue").unwrap_or(0));
        let inside = format!("{path}/");
        // Leases of all namespaces, by name.
        let name = query.split('&').find_map(|pair| pair.strip_prefix("fieldSelector=metadata.name%3D"));
        let is_in = |place: &str| match name {
            Some(name) => place.ends_with(&format!("/leases/{name}")),
            None => place.starts_with(&inside),
        };
        let all: Vec<&Value> = self.objects.iter().filter(|(place, _)| is_in(place)).map(|(_, object)| object).collect();
        let next = from.saturating_add(limit);
        let more = if next < all.len() { next.to_string() } else { String::new() };
        let items: Vec<&Value> = all.into_iter().skip(from).take(limit).collect();
        json!({"metadata": {"continue": more}, "items": items})
    }
}

/// RFC 7396.
fn merge(into: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *into = patch.clone();
        return;
    };
    if !into.is_object() {
        *into = json!({});
    }
    if let Value::Object(into) = into {
        for (key, value) in patch {
            if value.is_null() {
                into.remove(key);
            } else {
                merge(into.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
    }
}
