//! Kubernetes' API server on the wire: where it is, who we are to it, one call.
//!
//! With the pod's own token, which is read again for each call: kubelet renews it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use base64ct::{Base64, Encoding as _};
use serde_json::Value;
use serde_yaml::Value as Yaml;
use tokio::sync::Semaphore;
use zeroize::Zeroizing;

use super::{Failure, text};
use crate::config::Trust;
use crate::fence::Fence;
use crate::pve::http;
use crate::secret::Secret;

/// Where kubelet puts the pod's credentials.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// A page of 500 attachments is half a megabyte.
const MAX_ANSWER_BYTES: u64 = 16 << 20;
/// Of what a refusal says, so much is repeated.
const MAX_SAID_CHARS: usize = 300;
/// A list of 500 entries takes a tenth of a second; whoever waits for it waits for a volume.
pub(super) const READ_LIMIT: Duration = Duration::from_secs(20);

/// Calls at a time, each on a thread, which may stay for a while after its call was given up.
const MOST_CALLS: usize = 24;
/// The same for the Lease, whose calls must wait for no other: one in 3 s at most, each on its thread for 40 s at most.
const MOST_OF_LEASE: usize = 16;
/// All threads that these calls can ever hold.
pub const THREADS: usize = MOST_CALLS + MOST_OF_LEASE;

/// Where the API server is, and who we are to it.
pub struct Access {
    url: String,
    token: Token,
    ca: Option<PathBuf>,
    /// Where it is in the kubeconfig itself.
    trust: Trust,
    /// Our own namespace.
    pub namespace: String,
}

enum Token {
    File(PathBuf),
    Inline(Secret),
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").field("url", &self.url).field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

impl Access {
    /// With a token in a file.
    #[must_use]
    pub fn new(url: &str, token: PathBuf, ca: Option<&Path>, namespace: &str) -> Self {
        Self { url: url.into(), token: Token::File(token), ca: ca.map(Into::into), trust: Trust::System, namespace: namespace.into() }
    }

    /// The API server of the cluster that this pod runs in, as kubelet says it; nothing outside of one, or in a pod without a
    /// token.
    ///
    /// # Errors
    /// The pod does not say its namespace, or whether it has a token.
    pub fn in_cluster() -> Result<Option<Self>, Failure> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let folder = Path::new(SERVICE_ACCOUNT);
        let token = folder.join("token");
        let Some(host) = variable("KUBERNETES_SERVICE_HOST") else { return Ok(None) };
        // One that cannot be looked at is not one that is not there: without the Lease two controllers would act.
        if !token.try_exists().map_err(|cause| format!("{}: {cause}; let the controller's user read it", token.display()))? {
            return Ok(None);
        }
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        let port = variable("KUBERNETES_SERVICE_PORT_HTTPS").or_else(|| variable("KUBERNETES_SERVICE_PORT"));
        let url = format!("https://{host}:{}", port.unwrap_or_else(|| "443".into()));
        let place = folder.join("namespace");
        let namespace = std::fs::read_to_string(&place).map_err(|cause| format!("{}: {cause}", place.display()))?;
        Ok(Some(Self::new(&url, token, Some(&folder.join("ca.crt")), namespace.trim())))
    }

    /// As a kubeconfig's current context says it; nothing where the file is not there. Tokens only.
    ///
    /// # Errors
    /// A sentence: what the file lacks.
    pub fn from_kubeconfig(path: &Path) -> Result<Option<Self>, Failure> {
        let failed = |why: &str| format!("kubeconfig {}: {why}", path.display());
        let content = match std::fs::read_to_string(path).map(Zeroizing::new) {
            Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            content => content.map_err(|cause| failed(&cause.to_string()))?,
        };
        // Its error would quote a line, and a line may hold the token.
        let yaml: Yaml = serde_yaml::from_str(&content).map_err(|_| failed("is no YAML"))?;
        let word = |value: Option<&Yaml>| value.and_then(Yaml::as_str).filter(|text| !text.is_empty()).map(String::from);
        let named = |list: &str, name: &str, part: &str| {
            let entries = yaml.get(list).and_then(Yaml::as_sequence).into_iter().flatten();
            let mut found = entries.filter(|entry| entry.get("name").and_then(Yaml::as_str) == Some(name));
            found.next().and_then(|entry| entry.get(part)).cloned().ok_or_else(|| failed(&format!("{list} has no {part} named {name:?}")))
        };
        let context = named("contexts", &word(yaml.get("current-context")).ok_or_else(|| failed("no current-context"))?, "context")?;
        let of_context = |key: &str| word(context.get(key)).ok_or_else(|| failed(&format!("its context names no {key}")));
        let (cluster, user) = (named("clusters", &of_context("cluster")?, "cluster")?, named("users", &of_context("user")?, "user")?);
        let url = word(cluster.get("server")).ok_or_else(|| failed("its cluster has no server"))?;
        let token = match (word(user.get("tokenFile")), word(user.get("token"))) {
            (Some(file), _) => Token::File(file.into()),
            (None, Some(token)) => Token::Inline(Secret::new(token)),
            (None, None) => return Err(failed("its user has no token or tokenFile; other ways are not supported")),
        };
        let ca = word(cluster.get("certificate-authority")).map(PathBuf::from);
        let trust = match (&ca, word(cluster.get("certificate-authority-data"))) {
            (None, Some(data)) => {
                let pem = Base64::decode_vec(&data).ok().filter(|pem| !http::certificates(pem).is_empty());
                let pem = pem.ok_or_else(|| failed("certificate-authority-data is no PEM certificate in base64"))?;
                Trust::Ca { file: path.into(), pem }
            }
            (Some(_), _) | (None, None) => Trust::System,
        };
        let namespace = word(context.get("namespace")).unwrap_or_else(|| "default".into());
        Ok(Some(Self { url: url.trim_end_matches('/').into(), token, ca, trust, namespace }))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    Get,
    Post,
    Put,
    /// A JSON merge patch.
    Patch,
}

impl Method {
    fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
        }
    }
}

/// One call.
#[derive(Debug, Clone)]
pub(super) struct Call {
    pub(super) method: Method,
    /// `/api/v1/nodes/NAME`
    pub(super) path: String,
    pub(super) body: Value,
    /// So long it is waited for.
    pub(super) limit: Duration,
}

impl Call {
    pub(super) fn get(path: impl Into<String>) -> Self {
        Self { method: Method::Get, path: path.into(), body: Value::Null, limit: READ_LIMIT }
    }

    fn is_of_lease(&self) -> bool {
        self.path.contains("/leases")
    }

    /// `GET /api/v1/nodes/NAME`
    pub(super) fn name(&self) -> String {
        format!("{} {}", self.method.name(), self.path)
    }
}

/// Any answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    /// Null, where it is no JSON.
    pub(super) body: Value,
}

impl Answer {
    /// Why it is no success: the status, and what the API server says with it.
    pub(super) fn refusal(&self, call: &str) -> Failure {
        let said = text(&self.body, "/message").unwrap_or_default();
        let said: String = said.chars().take(MAX_SAID_CHARS).collect();
        let separator = if said.is_empty() { "" } else { ": " };
        format!("Kubernetes API: {call}: {}{separator}{said}", self.status)
    }
}

/// The API server.
pub(super) struct Api {
    agent: ureq::Agent,
    access: Access,
    in_flight: Arc<AtomicUsize>,
    threads: Arc<Semaphore>,
    threads_of_lease: Arc<Semaphore>,
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.access.fmt(f)
    }
}

/// A call that has not ended: the thread's, or the caller's some time after it.
struct Flight(Arc<AtomicUsize>);

impl Flight {
    fn begin(of: &Arc<AtomicUsize>) -> Arc<Self> {
        of.fetch_add(1, Ordering::SeqCst);
        Arc::new(Self(Arc::clone(of)))
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Api {
    /// Makes no call.
    ///
    /// # Errors
    /// There are no certificates to trust.
    pub(super) fn new(access: Access) -> Result<Self, Failure> {
        let agent = http::agent(access.url.starts_with("https://"), &access.trust, access.ca.as_deref(), http::CONNECT_TIMEOUT)?;
        let threads = |most| Arc::new(Semaphore::new(most));
        Ok(Self { agent, access, in_flight: Arc::default(), threads: threads(MOST_CALLS), threads_of_lease: threads(MOST_OF_LEASE) })
    }

    pub(super) fn namespace(&self) -> &str {
        &self.access.namespace
    }

    pub(super) fn calls_in_flight(&self) -> usize {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// Performs one call on a blocking thread. Sent once.
    ///
    /// # Errors
    /// No answer came: what was sent may be done.
    pub(super) async fn call(self: &Arc<Self>, call: Call) -> Result<Answer, Failure> {
        let (api, name, limit) = (Arc::clone(self), call.name(), call.limit);
        let in_flight = Arc::clone(&self.in_flight);
        let threads = Arc::clone(if call.is_of_lease() { &self.threads_of_lease } else { &self.threads });
        let work = async move {
            let thread = threads.acquire_owned().await;
            // Not before: who still waits for a thread is not on its way.
            let flight = Flight::begin(&in_flight);
            let sent = Arc::clone(&flight);
            let work = move || {
                let _held = (sent, thread);
                api.call_blocking(&call)
            };
            let done = tokio::task::spawn_blocking(work).await;
            drop(flight);
            done
        };
        // Its thread goes on until its own, longer limit: a thread cannot be stopped.
        match tokio::time::timeout(limit, work).await {
            Ok(done) => done.unwrap_or_else(|cause| Err(format!("our own call broke off: {cause}"))),
            Err(_) => Err(format!("Kubernetes API: {name}: no answer within {} s", limit.as_secs())),
        }
    }

    fn call_blocking(&self, call: &Call) -> Result<Answer, Failure> {
        let failed = |why: &str| format!("Kubernetes API: {}: {why}", call.name());
        let bearer = match &self.access.token {
            Token::Inline(token) => Zeroizing::new(format!("Bearer {}", token.reveal())),
            Token::File(path) => {
                let token = std::fs::read_to_string(path).map(Zeroizing::new);
                let token = token.map_err(|cause| failed(&format!("token {}: {cause}", path.display())))?;
                Zeroizing::new(format!("Bearer {}", token.trim()))
            }
        };
        let url = format!("{}{}", self.access.url, call.path);
        // The fence is about Proxmox; this thread may have called that one before.
        http::begin_call(Fence::default(), http::Gate::default());
        let with_body = |builder: ureq::RequestBuilder<ureq::typestate::WithBody>, kind: &str| {
            builder.header("Authorization", bearer.as_str()).header("Content-Type", kind).send(call.body.to_string())
        };
        let answer = match call.method {
            Method::Get => self.agent.get(&url).header("Authorization", bearer.as_str()).call(),
            Method::Post => with_body(self.agent.post(&url), "application/json"),
            Method::Put => with_body(self.agent.put(&url), "application/json"),
            Method::Patch => with_body(self.agent.patch(&url), "application/merge-patch+json"),
        };
        let mut answer = answer.map_err(|cause| failed(&cause.to_string()))?;
        let status = answer.status().as_u16();
        let body = answer.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_string().map_err(|cause| failed(&cause.to_string()))?;
        let body = serde_json::from_str(&body).or_else(|cause| if status < 300 { Err(cause) } else { Ok(Value::Null) });
        Ok(Answer { status, body: body.map_err(|cause| failed(&format!("no JSON: {cause}")))? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Option<Access>, Failure> {
        let path = std::env::temp_dir().join(format!("pve-csi-kubeconfig-{}-{:x}", std::process::id(), text.len()));
        std::fs::write(&path, text).unwrap();
        let read = Access::from_kubeconfig(&path);
        let _ = std::fs::remove_file(&path);
        read
    }

    const GOOD: &str = "current-context: c\ncontexts: [{name: c, context: {cluster: k, user: u, namespace: csi}}]\n\
                        clusters: [{name: k, cluster: {server: 'http://127.0.0.1:1/'}}]\nusers: [{name: u, user: {token: s3cret}}]\n";

    #[test]
    fn a_kubeconfig_with_a_token_is_enough() {
        let access = read(GOOD).unwrap().unwrap();
        assert_eq!((access.url.as_str(), access.namespace.as_str()), ("http://127.0.0.1:1", "csi"));
        assert!(!format!("{access:?}").contains("s3cret"));
        assert!(Access::from_kubeconfig(Path::new("/none/config")).unwrap().is_none());
        for (from, to, word) in [
            ("current-context: c", "current-context: d", "\"d\""),
            ("token: s3cret", "password: s3cret", "tokenFile"),
            ("server: 'http://127.0.0.1:1/'", "server: ''", "server"),
            ("server:", "certificate-authority-data: x, server:", "no PEM certificate"),
            ("server:", "certificate-authority-data: aGVsbG8=, server:", "no PEM certificate"),
            ("contexts: [", "contexts: [[", "no YAML"),
        ] {
            let why = read(&GOOD.replace(from, to)).unwrap_err();
            assert!(why.contains(word) && !why.contains("s3cret"), "{why}");
        }
    }
}
