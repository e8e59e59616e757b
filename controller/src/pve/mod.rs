//! Proxmox on the wire: a client of one cluster. Knows no CSI.
//!
//! `api` builds requests and reads answers, `http` owns the connections, `error` keeps Proxmox's words and says what
//! they mean, `drive` is the grammar of a VM's drives. A request is sent once, except where nothing can have happened:
//! a read whose pooled connection had been closed, and any call after a 401 whose ticket was renewed.

pub mod api;
pub mod drive;
pub mod error;
pub(crate) mod http;
#[cfg(test)]
pub(crate) mod known;

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use zeroize::Zeroizing;

use crate::config::{ClusterConfig, Credentials};
use crate::fence::Fence;
use crate::look::health::Heard;
use crate::look::metrics::{self, Lock};
use crate::secret::Secret;
pub use api::{Method, Request};
pub use error::{Cause, Error, Meaning};

/// A ticket lives 2 h; renewed well before.
const TICKET_AGE: Duration = Duration::from_secs(105 * 60);
/// `/cluster/resources` of a thousand VMs is half a megabyte.
const MAX_ANSWER_BYTES: u64 = 16 << 20;
/// The shortest pause between two questions about a task: most end within a third of a second.
const TASK_POLL_SHORTEST: Duration = Duration::from_millis(30);
/// The longest one.
const TASK_POLL_LONGEST: Duration = Duration::from_secs(1);
/// In between: the end is noticed late by this part of what the task took (beyond what it takes at least).
const TASK_POLL_PART: u32 = 4;
/// Hot-plug may wait 10 s for the VM's lock and 60 s for QEMU; a task that runs longer is looked at by the next call.
pub const TASK_DEADLINE: Duration = Duration::from_secs(100);

/// Calls to one cluster at a time: each holds a thread of ours. A cluster that hangs so leaves threads to the others.
pub const CALLS_PER_CLUSTER: usize = 16;
/// Calls about one Proxmox node at a time: it works on three, and one that hangs must leave room for calls about the others.
const CALLS_PER_HOST: usize = 6;

/// One request and its answer, as a check of somebody's Proxmox writes them down. Never of a login; no header is in it.
#[derive(Debug)]
pub struct Exchange<'a> {
    /// `POST /nodes/pve1/qemu/101/config`
    pub call: String,
    /// Path and query, or the form.
    pub parameters: String,
    /// HTTP status.
    pub status: u16,
    /// The status line's reason.
    pub reason: String,
    /// The body.
    pub answer: &'a str,
}

static TRANSCRIPT: OnceLock<fn(&Exchange<'_>)> = OnceLock::new();

/// Has every exchange of this process shown to `to`, from now on.
pub fn transcribe(to: fn(&Exchange<'_>)) {
    // Once for a process: a second one would see what it was not meant to.
    let _ = TRANSCRIPT.set(to);
}

/// Has this process wait so long for each answer: where time is simulated, an answer of a second may take minutes on a busy machine.
pub fn be_patient(limit: Duration) {
    http::be_patient(limit);
}

/// A client of one Proxmox cluster.
pub struct Client {
    agent: Result<ureq::Agent, String>,
    url: String,
    auth: Auth,
    at_a_time: Semaphore,
    hosts: Mutex<HashMap<String, Arc<Semaphore>>>,
    in_flight: Arc<AtomicUsize>,
    fence: Fence,
    /// The cluster's name, for the metrics.
    region: String,
    /// Whether Proxmox answers.
    pub(crate) heard: Heard,
    /// Calls so far: each has its number on the wire, so that two that say the same are told apart.
    calls: AtomicU64,
}

/// What a call's number travels as: that of the RPC that it is made for, as the log has it, and its own.
const NUMBER_HEADER: &str = "X-Request-Id";

/// A call that has not ended: it lasts as long as its last clone.
#[derive(Debug)]
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

enum Auth {
    Token(Zeroizing<String>),
    Password { username: String, password: Secret, ticket: Mutex<Option<Ticket>> },
}

#[derive(Clone)]
struct Ticket {
    cookie: Zeroizing<String>,
    csrf: Zeroizing<String>,
    made: Instant,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Client {
    /// Makes no call. Without certificates to trust, every call answers with the sentence that says so.
    #[must_use]
    pub fn new(cluster: &ClusterConfig, ca_bundle: Option<&Path>) -> Self {
        let agent = http::agent(cluster.url.starts_with("https://"), cluster.insecure, ca_bundle);
        let auth = match &cluster.credentials {
            Credentials::Token { id, secret } => Auth::Token(Zeroizing::new(format!("PVEAPIToken={id}={}", secret.reveal()))),
            Credentials::Password { username, password } => {
                Auth::Password { username: username.clone(), password: password.clone(), ticket: Mutex::new(None) }
            }
        };
        Self {
            agent,
            url: cluster.url.clone(),
            auth,
            at_a_time: Semaphore::new(CALLS_PER_CLUSTER),
            hosts: Mutex::default(),
            in_flight: Arc::default(),
            fence: Fence::default(),
            region: cluster.region.clone(),
            heard: Heard::default(),
            calls: AtomicU64::default(),
        }
    }

    /// Writes go out only while `fence` is open.
    #[must_use]
    pub fn fenced(self, fence: Fence) -> Self {
        Self { fence, ..self }
    }

    /// Whether it talks to that address.
    #[must_use]
    pub fn is_of(&self, url: &str) -> bool {
        self.url == url
    }

    /// Where it talks to.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Places of one Proxmox node.
    fn host(&self, host: &str) -> Arc<Semaphore> {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(hosts.entry(host.into()).or_insert_with(|| Arc::new(Semaphore::new(CALLS_PER_HOST))))
    }

    /// Performs one request on a blocking thread and gives the answer's `data`.
    ///
    /// # Errors
    /// Every status above 399, and every way not to get an answer.
    pub async fn call(self: &Arc<Self>, request: Request) -> Result<Value, Error> {
        let (client, call, is_write, endpoint) = (Arc::clone(self), request.name(), request.is_write(), request.endpoint());
        // First the node's place: who waits for a node that hangs must not hold one of the cluster's.
        let of_host = request.host().map(|host| self.host(host));
        let _of_host = match &of_host {
            Some(host) => metrics::waited(Lock::HostCalls, host.acquire()).await.ok(),
            None => None,
        };
        let _at_a_time = metrics::waited(Lock::ClusterCalls, self.at_a_time.acquire()).await;
        // The thread goes on when the caller gives up, and the caller some time after the thread: the flight ends with both.
        let flight = Flight::begin(&self.in_flight);
        let sent = Arc::clone(&flight);
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        let number = format!("{:x}.{number}", proto::log::call());
        let work = move || {
            let _sent = sent;
            client.call_blocking(&request, &number)
        };
        let begun = Instant::now();
        let answer = match tokio::task::spawn_blocking(work).await {
            Ok(answer) => answer,
            Err(cause) => Err(Error { call, cause: Cause::NoAnswer(format!("our own call broke off: {cause}")) }),
        };
        metrics::count_request(&endpoint, &self.region, &answer, begun.elapsed());
        self.heard.note(&answer);
        if is_write && answer.as_ref().is_err_and(|error| error.meaning().is_outcome_unknown()) {
            self.fence.note_unknown();
        }
        answer
    }

    /// Calls that have begun and not ended.
    #[must_use]
    pub fn calls_in_flight(&self) -> usize {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// Waits for a task to end well, which it hardly does before `earliest`: until then it is asked about once, for a refusal comes at
    /// once. `WARNINGS: n` is well.
    ///
    /// # Errors
    /// The task's exit status; or that its end was not seen in [`TASK_DEADLINE`], or is not known any more.
    pub async fn wait(self: &Arc<Self>, upid: &str, earliest: Instant) -> Result<(), Error> {
        let request = api::task_status(upid)?;
        let call = request.name();
        let begun = Instant::now();
        let (mut failures, mut odd_ends) = (0, 0);
        loop {
            let unknown = |why: String| {
                self.fence.note_unknown();
                Error { call: call.clone(), cause: Cause::TaskUnknown { upid: upid.into(), why } }
            };
            if begun.elapsed() > TASK_DEADLINE {
                return Err(unknown(format!("still running after {} s", TASK_DEADLINE.as_secs())));
            }
            let pause = earliest.max(begun).elapsed() / TASK_POLL_PART;
            tokio::time::sleep(pause.clamp(TASK_POLL_SHORTEST, TASK_POLL_LONGEST)).await;
            match self.call(request.clone()).await.and_then(|data| api::read_task(&call, upid, &data)) {
                Ok(false) => tokio::time::sleep_until(earliest).await,
                Ok(true) => return Ok(()),
                // Read in the instant between the worker's end and its last line: one more look.
                Err(error) if error.meaning() == Meaning::TaskKilled && odd_ends == 0 => odd_ends += 1,
                Err(error) if matches!(error.cause, Cause::Task { .. }) => return Err(error),
                Err(error) if error.meaning() == Meaning::NoSuchTask => return Err(unknown(error.words())),
                // The task goes on without us: a few lost answers are no end of it.
                Err(error) if failures >= 3 => return Err(unknown(error.words())),
                Err(_) => failures += 1,
            }
        }
    }

    /// A repetition keeps its number.
    fn call_blocking(&self, request: &Request, number: &str) -> Result<Value, Error> {
        let first = self.attempt(request, number);
        match &first {
            Err(Error { cause: Cause::NoAnswer(why), .. }) if request.method == Method::Get && !why.contains("timeout") => {
                self.attempt(request, number)
            }
            // 401 means not done, so even a write may be repeated under a new ticket.
            Err(Error { cause: Cause::Answer { status: 401, .. }, .. }) if self.forget_ticket() => self.attempt(request, number),
            _ => first,
        }
    }

    /// Whether there was a ticket to forget.
    fn forget_ticket(&self) -> bool {
        match &self.auth {
            Auth::Token(_) => false,
            Auth::Password { ticket, .. } => ticket.lock().unwrap_or_else(PoisonError::into_inner).take().is_some(),
        }
    }

    fn attempt(&self, request: &Request, number: &str) -> Result<Value, Error> {
        let number = (NUMBER_HEADER, number);
        match &self.auth {
            Auth::Token(header) => self.send(request, &[number, ("Authorization", header.as_str())]),
            Auth::Password { username, password, ticket } => {
                let ticket = self.ticket(username, password, ticket)?;
                let cookie = Zeroizing::new(format!("PVEAuthCookie={}", api::percent_encoded(&ticket.cookie, "")));
                self.send(request, &[number, ("Cookie", cookie.as_str()), ("CSRFPreventionToken", ticket.csrf.as_str())])
            }
        }
    }

    /// The ticket held, or a new one; parallel calls wait for the one that asks.
    fn ticket(&self, username: &str, password: &Secret, held: &Mutex<Option<Ticket>>) -> Result<Ticket, Error> {
        let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ticket) = held.as_ref().filter(|ticket| ticket.made.elapsed() < TICKET_AGE) {
            return Ok(ticket.clone());
        }
        let request = api::ticket(username, password.reveal());
        let data = self.send(&request, &[])?;
        let (cookie, csrf) = api::read_ticket(&request.name(), &data)?;
        let ticket = Ticket { cookie: Zeroizing::new(cookie), csrf: Zeroizing::new(csrf), made: Instant::now() };
        *held = Some(ticket.clone());
        Ok(ticket)
    }

    fn send(&self, request: &Request, headers: &[(&str, &str)]) -> Result<Value, Error> {
        let failed = |cause: Cause| Error { call: request.name(), cause };
        let agent = self.agent.as_ref().map_err(|why| failed(Cause::NotSent(why.clone())))?;
        http::begin_call(if request.is_write() { self.fence.clone() } else { Fence::default() });
        let answer = self.exchange(agent, request, headers);
        let (status, text) = answer.map_err(|error| {
            let why = self.explained(&error);
            failed(if http::was_sent() { Cause::NoAnswer(why) } else { Cause::NotSent(why) })
        })?;
        if let Some(to) = TRANSCRIPT.get().filter(|_| !request.is_login()) {
            let parameters = if matches!(request.method, Method::Get | Method::Delete) { request.target() } else { request.body() };
            to(&Exchange { call: request.name(), parameters, status, reason: http::reason(), answer: &text });
        }
        if (300..400).contains(&status) {
            let why = format!("{} answers {status}, a redirection; the url should begin with https://", self.url);
            return Err(failed(Cause::NotSent(why)));
        }
        let body: Option<Value> = serde_json::from_str(&text).ok();
        if status >= 400 {
            return Err(failed(api::refusal(status, http::reason(), body, &text)));
        }
        match body {
            Some(Value::Object(mut body)) if body.contains_key("data") => Ok(body.remove("data").unwrap_or(Value::Null)),
            _ => Err(failed(Cause::Shape(format!("status {status} without JSON data; is {} Proxmox VE's API?", self.url)))),
        }
    }

    fn exchange(&self, agent: &ureq::Agent, request: &Request, headers: &[(&str, &str)]) -> Result<(u16, String), ureq::Error> {
        let url = format!("{}{}", self.url, request.target());
        let mut answer = match request.method {
            Method::Get => with_headers(agent.get(&url), headers).call()?,
            Method::Delete => with_headers(agent.delete(&url), headers).call()?,
            Method::Post | Method::Put => {
                let builder = if request.method == Method::Post { agent.post(&url) } else { agent.put(&url) };
                let body = Zeroizing::new(request.body());
                with_headers(builder, headers).header("Content-Type", "application/x-www-form-urlencoded").send(body.as_str())?
            }
        };
        let text = answer.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_string()?;
        Ok((answer.status().as_u16(), text))
    }

    /// Our words for what ureq met: what, where, and what to do about it.
    fn explained(&self, error: &ureq::Error) -> String {
        if let Some(why) = http::held_back() {
            return why;
        }
        let url = &self.url;
        let text = error.to_string();
        let certificate = matches!(error, ureq::Error::Rustls(_) | ureq::Error::Tls(_))
            || ["certificate", "UnknownIssuer", "handshake"].iter().any(|word| text.contains(word));
        if certificate && !http::was_sent() {
            return format!(
                "the TLS certificate of {url} is not trusted ({text}); put its CA into SSL_CERT_FILE, use the name it was made for, or write \
                 insecure: true"
            );
        }
        match error {
            ureq::Error::HostNotFound => format!("the host of {url} has no address (DNS)"),
            ureq::Error::Timeout(which) => format!("timeout ({which}) at {url}"),
            _ if http::was_sent() => format!("{url} broke the connection: {text}"),
            _ => format!("{url} cannot be reached: {text}"),
        }
    }
}

fn with_headers<B>(mut builder: ureq::RequestBuilder<B>, headers: &[(&str, &str)]) -> ureq::RequestBuilder<B> {
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    builder
}
