//! Proxmox on the wire: a client of one cluster. Knows no CSI.
//!
//! `api` builds requests and reads answers, `http` owns the connections, `error` keeps Proxmox's words and says what
//! they mean, `drive` is the grammar of a VM's drives, `urls` are the cluster's addresses. A request is sent once, except where
//! nothing can have happened: a read whose connection broke or whose node fell silent, any call after a 401 whose ticket was
//! renewed, and any call of which nothing went out.

pub mod api;
pub mod drive;
pub mod error;
pub(crate) mod http;
#[cfg(test)]
pub(crate) mod known;
mod pin;
mod urls;

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;
use zeroize::Zeroizing;

use crate::config::{ClusterConfig, Credentials, MAX_URLS};
use crate::fence::Fence;
use crate::look::health::Heard;
use crate::look::metrics::{self, Lock};
use crate::secret::Secret;
use api::Identity;
pub use api::{Method, Request};
pub use error::{Cause, Error, Meaning};
use http::Gate;
use urls::{CONNECT_LIMIT, LOOK_AFTER, LOOK_AFTER_WRITE, LOOK_AGAIN, LOOK_LIMIT, Urls};

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

/// Calls to one cluster at a time.
const CALLS_PER_CLUSTER: usize = 16;
/// Threads that those hold, and the ones that nobody waits for any more: their caller, or the url that they wait for, was given up.
const CALL_THREADS: usize = 3 * CALLS_PER_CLUSTER;
/// All that one cluster can ever hold, however it hangs. Whoever makes the threads makes so many per cluster, and more: then
/// no cluster takes them from another one.
pub const THREADS_PER_CLUSTER: usize = CALL_THREADS + MAX_URLS;
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
    urls: Urls,
    auth: Auth,
    at_a_time: Semaphore,
    hosts: Mutex<HashMap<String, Arc<Semaphore>>>,
    fence: Fence,
    /// The cluster's name, for the metrics.
    region: String,
    /// Whether Proxmox answers.
    pub(crate) heard: Heard,
    /// The cluster that the url in use was of, where there are several.
    identity: Arc<Mutex<Option<Identity>>>,
    shared: Arc<Shared>,
}

/// What a client has in common with the one before it, whose calls may still go on.
#[derive(Debug)]
struct Shared {
    in_flight: Arc<AtomicUsize>,
    /// Of those, the ones that change something.
    writes: Arc<AtomicUsize>,
    /// Calls so far: each has its number on the wire, so that two that say the same are told apart.
    calls: AtomicU64,
    threads: Arc<Semaphore>,
    looks: Arc<Semaphore>,
}

impl Default for Shared {
    fn default() -> Self {
        let threads = |most| Arc::new(Semaphore::new(most));
        let (in_flight, writes) = Default::default();
        Self { in_flight, writes, calls: AtomicU64::default(), threads: threads(CALL_THREADS), looks: threads(MAX_URLS) }
    }
}

/// What a url that answers says of its cluster.
#[derive(Debug)]
enum Said {
    Cluster(Identity),
    /// We may not ask.
    Hidden,
    /// It does not know us: the call itself tells, where no other one does.
    Refused,
}

impl Said {
    fn cluster(&self) -> Option<&Identity> {
        match self {
            Self::Cluster(one) => Some(one),
            Self::Hidden | Self::Refused => None,
        }
    }

    /// Whether no other one is waited for. A node alone may have lost the others.
    fn is_enough(&self, is_known: bool) -> bool {
        match self {
            Self::Cluster(one) => is_known && one.is_quorate && one.cluster.is_some(),
            Self::Hidden => true,
            Self::Refused => false,
        }
    }
}

/// How a call did not succeed.
struct Broken {
    error: Error,
    /// It is that url's fault: another one may do.
    is_of_url: bool,
}

impl From<Error> for Broken {
    fn from(error: Error) -> Self {
        Self { error, is_of_url: false }
    }
}

/// What a call's number travels as: that of the RPC that it is made for, as the log has it, and its own.
const NUMBER_HEADER: &str = "X-Request-Id";

/// A call that has not ended: it lasts as long as its last clone. Of all of them, and of the writes where it is one.
#[derive(Debug)]
struct Flight(Vec<Arc<AtomicUsize>>);

impl Flight {
    fn begin(of: Vec<Arc<AtomicUsize>>) -> Arc<Self> {
        of.iter().for_each(|count| {
            let _ = count.fetch_add(1, Ordering::SeqCst);
        });
        Arc::new(Self(of))
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.0.iter().for_each(|count| {
            let _ = count.fetch_sub(1, Ordering::SeqCst);
        });
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
        f.debug_struct("Client").field("urls", &self.urls.all).finish_non_exhaustive()
    }
}

impl Client {
    /// Makes no call. Without certificates to trust, every call answers with the sentence that says so.
    #[must_use]
    pub fn new(cluster: &ClusterConfig, ca_bundle: Option<&Path>) -> Self {
        let https = cluster.urls.iter().any(|url| url.starts_with("https://"));
        let urls = Urls::new(cluster.urls.clone());
        let connect = if urls.are_several() { CONNECT_LIMIT } else { http::CONNECT_TIMEOUT };
        let agent = http::agent(https, &cluster.trust, ca_bundle, connect);
        let auth = match &cluster.credentials {
            Credentials::Token { id, secret } => Auth::Token(Zeroizing::new(format!("PVEAPIToken={id}={}", secret.reveal()))),
            Credentials::Password { username, password } => {
                Auth::Password { username: username.clone(), password: password.clone(), ticket: Mutex::new(None) }
            }
        };
        Self {
            agent,
            urls,
            auth,
            at_a_time: Semaphore::new(CALLS_PER_CLUSTER),
            hosts: Mutex::default(),
            fence: Fence::default(),
            region: cluster.region.clone(),
            heard: Heard::default(),
            identity: Arc::default(),
            shared: Arc::default(),
        }
    }

    /// Writes go out only while `fence` is open.
    #[must_use]
    pub fn fenced(self, fence: Fence) -> Self {
        Self { fence, ..self }
    }

    /// Takes the place of one whose calls may still go on: they count as this one's.
    #[must_use]
    pub fn instead_of(self, before: &Self) -> Self {
        // At other addresses it may be another cluster.
        let identity = if self.is_of(&before.urls.all) { Arc::clone(&before.identity) } else { Arc::clone(&self.identity) };
        Self { shared: Arc::clone(&before.shared), identity, ..self }
    }

    /// Whether it talks to one of these addresses.
    #[must_use]
    pub fn is_of(&self, urls: &[String]) -> bool {
        self.urls.all.iter().any(|url| urls.contains(url))
    }

    /// Where it talks to.
    #[must_use]
    pub fn url_in_use(&self) -> &str {
        self.urls.at(self.urls.current().unwrap_or_default())
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
        let endpoint = request.endpoint();
        // First the node's place: who waits for a node that hangs must not hold one of the cluster's.
        let of_host = request.host().map(|host| self.host(host));
        let _of_host = match &of_host {
            Some(host) => metrics::waited(Lock::HostCalls, host.acquire()).await.ok(),
            None => None,
        };
        let _at_a_time = metrics::waited(Lock::ClusterCalls, self.at_a_time.acquire()).await;
        // The thread goes on when the caller gives up, and the caller some time after the thread: the flight ends with both.
        let mut counts = vec![Arc::clone(&self.shared.in_flight)];
        counts.extend(request.is_write().then(|| Arc::clone(&self.shared.writes)));
        let flight = Flight::begin(counts);
        let number = self.shared.calls.fetch_add(1, Ordering::Relaxed);
        let number = format!("{:x}.{number}", proto::log::call());
        let begun = Instant::now();
        let answer = self.at_some_url(&request, &number, &flight).await;
        metrics::count_request(&endpoint, &self.region, &answer, begun.elapsed());
        self.heard.note(&answer);
        if request.is_write() && answer.as_ref().is_err_and(|error| error.meaning().is_outcome_unknown()) {
            self.fence.note_unknown();
        }
        answer
    }

    /// At the url in use; where that fails and nothing can have happened, at the next one that answers.
    async fn at_some_url(self: &Arc<Self>, request: &Request, number: &str, flight: &Arc<Flight>) -> Result<Value, Error> {
        let begun = Instant::now();
        for is_last in (0..self.urls.all.len()).map(|tries| tries + 1 == self.urls.all.len()) {
            let index = self.url(begun).await.map_err(|why| Error { call: request.name(), cause: Cause::NotSent(why) })?;
            let broken = match self.at(index, request, number, flight).await {
                Ok(data) => return Ok(data),
                Err(broken) => broken,
            };
            if broken.error.meaning() == Meaning::NoQuorum {
                self.leave_isolated();
            }
            if broken.is_of_url && self.urls.note_dead(index) {
                proto::warn!("{}: {}; the cluster's other urls are asked", self.urls.at(index), broken.error.words());
            }
            // A write that went out is never sent twice.
            let is_nothing_done = matches!(broken.error.cause, Cause::NotSent(_)) || !request.is_write();
            if is_last || !broken.is_of_url || !is_nothing_done {
                return Err(broken.error);
            }
        }
        Err(Error { call: request.name(), cause: Cause::NotSent("the cluster has no url".into()) })
    }

    /// The node in use says that it has no quorum: it may have lost the others, and those have one.
    pub(crate) fn leave_isolated(&self) {
        if let Some(index) = self.urls.leave() {
            proto::warn!("{}: no quorum; the cluster's other urls are asked", self.urls.at(index));
        }
    }

    /// The url in use, or the first that answers: for the cluster that it was until now, and with a quorum, where one is.
    async fn url(self: &Arc<Self>, begun: Instant) -> Result<usize, String> {
        if let Some(index) = self.urls.current() {
            return Ok(index);
        }
        let _looking = self.urls.looking.lock().await;
        // Another call has looked meanwhile.
        match (self.urls.current(), self.urls.none(begun)) {
            (Some(index), _) => return Ok(index),
            (None, Some(why)) => return Err(why),
            (None, None) => (),
        }
        let (mut looks, mut causes) = (JoinSet::new(), Vec::new());
        for index in 0..self.urls.all.len() {
            let client = Arc::clone(self);
            looks.spawn(async move { (index, client.ask(index).await) });
        }
        let known = self.identity().clone();
        let mut answered = Vec::new();
        while let Some(looked) = looks.join_next().await {
            let (index, said) = looked.map_err(|cause| format!("our own look broke off: {cause}"))?;
            match said {
                Err(why) => causes.push((index, why)),
                Ok(Said::Cluster(one)) if known.as_ref().is_some_and(|known| !known.is_followed_by(&one)) => {
                    causes.push((index, self.stranger(index, &one, known.as_ref())));
                }
                // The first time all are heard: any could be the wrong one.
                Ok(said) if !self.urls.was_left(index) && said.is_enough(known.is_some()) => return Ok(self.now_at(index, said)),
                Ok(said) => answered.push((index, said)),
            }
        }
        let clusters = |of_cluster: bool| {
            let said = answered.iter().filter_map(|(index, said)| said.cluster().map(|one| (*index, one)));
            said.filter(move |(_, one)| one.cluster.is_some() || !of_cluster)
        };
        // One that was in a cluster and left it answers for itself.
        let first = clusters(true).next().or_else(|| clusters(false).next()).map(|(_, one)| one.clone());
        if let Some(first) = &first {
            let strangers = clusters(false).filter(|(_, one)| !first.is_followed_by(one));
            let strangers: Vec<_> = strangers
                .map(|(index, one)| (index, one.cluster.is_some() || first.cluster.is_none(), self.stranger(index, one, Some(first))))
                .collect();
            // Of two clusters nobody can tell which is meant.
            let is_undecided = strangers.iter().any(|(_, is_equal, _)| *is_equal);
            answered.retain(|(index, _)| !is_undecided && strangers.iter().all(|(stranger, ..)| stranger != index));
            causes.extend(strangers.into_iter().map(|(index, _, why)| (index, why)));
        }
        let best = answered.into_iter().min_by_key(|(index, said)| (self.urls.was_left(*index), !said.is_enough(true)));
        match best {
            Some((index, said)) => Ok(self.now_at(index, said)),
            None => Err(self.urls.note_none(causes)),
        }
    }

    fn identity(&self) -> std::sync::MutexGuard<'_, Option<Identity>> {
        self.identity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stranger(&self, index: usize, one: &Identity, known: Option<&Identity>) -> String {
        let of = known.map(|known| format!(", the others are of {known}")).unwrap_or_default();
        let why = format!("{} is of {one}{of}: it is not used; all urls of an entry must be of one cluster", self.urls.at(index));
        proto::warn!("{why}");
        why
    }

    fn now_at(&self, index: usize, said: Said) -> usize {
        if let Said::Cluster(one) = said {
            *self.identity() = Some(one);
        }
        self.urls.note_alive(index);
        proto::info!("calls go to {}", self.urls.at(index));
        index
    }

    /// Whether a url answers, and of which cluster it says that it is; without an answer, why not.
    async fn ask(self: &Arc<Self>, index: usize) -> Result<Said, String> {
        if !self.urls.are_several() {
            return self.look(index).await.map(|()| Said::Hidden);
        }
        let (client, thread) = (Arc::clone(self), Arc::clone(&self.shared.looks).acquire_owned().await);
        let work = move || {
            let _held = thread;
            client.look_blocking(index)?;
            client.identity_blocking(index)
        };
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|cause| Err(format!("our own look broke off: {cause}")))
    }

    /// What cannot be read says nothing of the cluster, and such a url is not used: it could be another one's.
    fn identity_blocking(&self, index: usize) -> Result<Said, String> {
        let (request, call) = (api::cluster_status(), api::cluster_status().name());
        let unsaid = |why: &str| format!("{}: {call}: {why}, so that its cluster cannot be told", self.urls.at(index));
        let agent = self.agent.as_ref().map_err(Clone::clone)?;
        let page = format!("{}{}", self.urls.at(index), request.target());
        let get = match &self.auth {
            Auth::Token(header) => agent.get(&page).header("Authorization", header.as_str()),
            Auth::Password { username, password, ticket } => {
                // A ticket that the others do not take is renewed there.
                let Ok(ticket) = self.ticket(index, username, password, ticket) else { return Ok(Said::Refused) };
                agent.get(&page).header("Cookie", format!("PVEAuthCookie={}", api::percent_encoded(&ticket.cookie, "")))
            }
        };
        http::begin_call(Fence::default(), Gate::default());
        let mut answer = get.config().timeout_global(Some(LOOK_LIMIT)).build().call().map_err(|why| unsaid(&why.to_string()))?;
        match answer.status().as_u16() {
            200 => (),
            401 => return Ok(Said::Refused),
            // Without Sys.Audit.
            403 => return Ok(Said::Hidden),
            status => return Err(unsaid(&format!("{status} {}", http::reason()))),
        }
        let text = answer.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_string().map_err(|why| unsaid(&why.to_string()))?;
        let body: Value = serde_json::from_str(&text).map_err(|why| unsaid(&why.to_string()))?;
        let data = body.get("data").ok_or_else(|| unsaid("no data"))?;
        api::read_identity(&call, data).map(Said::Cluster).map_err(|why| unsaid(&why.words()))
    }

    /// Whether a url answers; without, why not.
    async fn look(self: &Arc<Self>, index: usize) -> Result<(), String> {
        let (client, thread) = (Arc::clone(self), Arc::clone(&self.shared.looks).acquire_owned().await);
        let work = move || {
            let _held = thread;
            client.look_blocking(index)
        };
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|cause| Err(format!("our own look broke off: {cause}")))
    }

    fn look_blocking(&self, index: usize) -> Result<(), String> {
        let agent = self.agent.as_ref().map_err(Clone::clone)?;
        let (begun, mut limit) = (Instant::now(), LOOK_LIMIT);
        loop {
            http::begin_call(Fence::default(), Gate::default());
            // Any user's, answered by the proxy itself; without a token, for we may not have one yet.
            let page = format!("{}/access/ticket", self.urls.at(index));
            let answer = agent.get(&page).config().timeout_global(Some(limit)).build().call();
            match answer.map(|answer| answer.status().as_u16()) {
                // Of what stands before it.
                Ok(status @ (502..=504)) => return Err(format!("{} answers {status} {}", self.urls.at(index), http::reason())),
                Ok(_) => return Ok(()),
                // A connection that had been closed, perhaps: one of now says more.
                Err(_) if http::was_sent() && limit == LOOK_LIMIT && begun.elapsed() < LOOK_LIMIT / 2 => {
                    limit = LOOK_LIMIT.saturating_sub(begun.elapsed());
                }
                Err(error) => return Err(self.explained(index, &error)),
            }
        }
    }

    /// On a thread; where there are other urls, not for longer than this one answers at all.
    async fn at(self: &Arc<Self>, index: usize, request: &Request, number: &str, flight: &Arc<Flight>) -> Result<Value, Broken> {
        let (gate, call) = (Gate::default(), request.name());
        let work = {
            let (client, request, number) = (Arc::clone(self), request.clone(), number.to_string());
            let (gate, flight) = (gate.clone(), Arc::clone(flight));
            let thread = Arc::clone(&self.shared.threads).acquire_owned().await;
            move || {
                let _held = (thread, flight);
                client.call_blocking(index, &request, &number, &gate)
            }
        };
        let mut working = tokio::task::spawn_blocking(work);
        let mut pause = if request.is_write() { LOOK_AFTER_WRITE } else { LOOK_AFTER };
        loop {
            let silence = async {
                match self.urls.are_several() {
                    true => tokio::time::sleep(pause).await,
                    false => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                answer = &mut working => return answer.unwrap_or_else(|cause| {
                    Err(Error { call, cause: Cause::NoAnswer(format!("our own call broke off: {cause}")) }.into())
                }),
                () = silence => pause = LOOK_AGAIN,
            }
            if let Err(why) = self.look(index).await
                && !working.is_finished()
            {
                let why = format!("{why}, while its answer was waited for");
                let cause = if gate.shut() { Cause::NotSent(why) } else { Cause::NoAnswer(why) };
                return Err(Broken { error: Error { call, cause }, is_of_url: true });
            }
        }
    }

    /// Calls that have begun and not ended.
    #[must_use]
    pub fn calls_in_flight(&self) -> usize {
        self.shared.in_flight.load(Ordering::SeqCst)
    }

    /// Those of them that change something: a read leaves nothing that could come later.
    #[must_use]
    pub fn writes_in_flight(&self) -> usize {
        self.shared.writes.load(Ordering::SeqCst)
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
    fn call_blocking(&self, index: usize, request: &Request, number: &str, gate: &Gate) -> Result<Value, Broken> {
        let attempt = || self.attempt(index, request, number, gate);
        let first = attempt();
        match first.as_ref().err().map(|broken| &broken.error.cause) {
            Some(Cause::NoAnswer(why)) if request.method == Method::Get && !why.contains("timeout") => attempt(),
            // 401 means not done, so even a write may be repeated under a new ticket.
            Some(Cause::Answer { status: 401, .. }) if self.forget_ticket() => attempt(),
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

    fn attempt(&self, index: usize, request: &Request, number: &str, gate: &Gate) -> Result<Value, Broken> {
        let number = (NUMBER_HEADER, number);
        match &self.auth {
            Auth::Token(header) => self.send(index, request, &[number, ("Authorization", header.as_str())], gate),
            Auth::Password { username, password, ticket } => {
                let ticket = self.ticket(index, username, password, ticket)?;
                let cookie = Zeroizing::new(format!("PVEAuthCookie={}", api::percent_encoded(&ticket.cookie, "")));
                self.send(index, request, &[number, ("Cookie", cookie.as_str()), ("CSRFPreventionToken", ticket.csrf.as_str())], gate)
            }
        }
    }

    /// The ticket held, or a new one; parallel calls wait for the one that asks.
    fn ticket(&self, index: usize, username: &str, password: &Secret, held: &Mutex<Option<Ticket>>) -> Result<Ticket, Broken> {
        let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ticket) = held.as_ref().filter(|ticket| ticket.made.elapsed() < TICKET_AGE) {
            return Ok(ticket.clone());
        }
        let request = api::ticket(username, password.reveal());
        let data = self.send(index, &request, &[], &Gate::default()).map_err(|broken| {
            // What the ticket is for was not sent.
            let cause = match broken.error.cause {
                Cause::NoAnswer(why) => Cause::NotSent(why),
                cause => cause,
            };
            Broken { error: Error { cause, ..broken.error }, ..broken }
        })?;
        let (cookie, csrf) = api::read_ticket(&request.name(), &data)?;
        let ticket = Ticket { cookie: Zeroizing::new(cookie), csrf: Zeroizing::new(csrf), made: Instant::now() };
        *held = Some(ticket.clone());
        Ok(ticket)
    }

    fn send(&self, index: usize, request: &Request, headers: &[(&str, &str)], gate: &Gate) -> Result<Value, Broken> {
        let failed = |cause: Cause| Error { call: request.name(), cause };
        let agent = self.agent.as_ref().map_err(|why| failed(Cause::NotSent(why.clone())))?;
        http::begin_call(if request.is_write() { self.fence.clone() } else { Fence::default() }, gate.clone());
        let answer = self.exchange(agent, index, request, headers);
        let (status, text) = answer.map_err(|error| {
            let why = self.explained(index, &error);
            let is_of_url = http::held_back().is_none() && !matches!(error, ureq::Error::BodyExceedsLimit(_));
            Broken { error: failed(if http::was_sent() { Cause::NoAnswer(why) } else { Cause::NotSent(why) }), is_of_url }
        })?;
        if let Some(to) = TRANSCRIPT.get().filter(|_| !request.is_login()) {
            let parameters = if matches!(request.method, Method::Get | Method::Delete) { request.target() } else { request.body() };
            to(&Exchange { call: request.name(), parameters, status, reason: http::reason(), answer: &text });
        }
        let url = self.urls.at(index);
        if (300..400).contains(&status) {
            let why = format!("{url} answers {status}, a redirection; the url should begin with https://");
            return Err(failed(Cause::NotSent(why)).into());
        }
        let body: Option<Value> = serde_json::from_str(&text).ok();
        if status >= 400 {
            return Err(failed(api::refusal(status, http::reason(), body, &text)).into());
        }
        match body {
            Some(Value::Object(mut body)) if body.contains_key("data") => Ok(body.remove("data").unwrap_or(Value::Null)),
            _ => Err(failed(Cause::Shape(format!("status {status} without JSON data; is {url} Proxmox VE's API?"))).into()),
        }
    }

    fn exchange(
        &self,
        agent: &ureq::Agent,
        index: usize,
        request: &Request,
        headers: &[(&str, &str)],
    ) -> Result<(u16, String), ureq::Error> {
        let url = format!("{}{}", self.urls.at(index), request.target());
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
    fn explained(&self, index: usize, error: &ureq::Error) -> String {
        if let Some(why) = http::held_back() {
            return why;
        }
        let url = self.urls.at(index);
        if let Some(seen) = pin::refused() {
            return format!(
                "the certificate of {url} has the fingerprint {seen}, which the config file does not name; write it there if it was renewed"
            );
        }
        let text = error.to_string();
        let certificate = matches!(error, ureq::Error::Rustls(_) | ureq::Error::Tls(_))
            || ["certificate", "UnknownIssuer", "handshake"].iter().any(|word| text.contains(word));
        if certificate && !http::was_sent() {
            return format!(
                "the TLS certificate of {url} is not trusted ({text}); put its CA into SSL_CERT_FILE or name it as caFile, use the name it was made for, \
                 or write its fingerprint, or insecure: true"
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
