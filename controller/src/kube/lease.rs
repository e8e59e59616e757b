//! Which of several controllers acts: the holder of one coordination.k8s.io/v1 Lease, named after the driver, in our namespace.
//!
//! As client-go's leader election, and as strict: optimistic by resourceVersion; a holder is gone when its Lease has not
//! changed for its whole duration by *our* monotonic clock, so that no other machine's clock matters; a holder stops writing
//! [`RENEW_WITHIN`] after the start of its last renewal, which is well before anybody may take over.
//!
//! Three things make a hand-over safe, with an old holder stopped in the middle of a call:
//!
//! 1. What it sends after that time is not sent: the [`Fence`] is looked at when the bytes go out, on a connection that is
//!    open already. What a stopped process sends later meets a connection that Proxmox has closed: it does so after 5.0 s
//!    without a request (reference/proxmox-api.md §2.2), which is what lies between [`RENEW_WITHIN`] and [`DURATION`].
//! 2. What Proxmox's proxies got before that may be carried out later: up to 30 s. The new holder waits [`LATE_WRITES`] before
//!    it looks at anything, unless the old one gave the Lease back, which it does only when it knows the outcome of all its
//!    writes, and marks. A Lease that is not there, or has no holder without that mark, was deleted or emptied by hand as well as
//!    it may be new: it is waited for, too, unless Kubernetes shows no trace of a controller before us (`first`).
//! 3. A clock may stand still (the whole VM paused), so nothing rests on clocks alone: an attach counts as the only one
//!    without a second look at all VMs only after [`Lease::confirm`], a renewal that began after the attach was verified. By
//!    resourceVersion, nobody took over before that. Whoever took over later has read, after it took over, what was attached.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tokio::sync::Mutex as AsyncMutex;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::client::{Answer, Api, Call, Method};
use super::{Failure, text};
use crate::fence::Fence;
use crate::run::when;

/// client-go's defaults, which the sidecars have, too. A Lease that has not changed for so long is nobody's.
pub const DURATION: Duration = Duration::from_secs(15);
/// Who could not renew for so long does not write any more.
pub const RENEW_WITHIN: Duration = Duration::from_secs(10);
/// Between two renewals, and between two looks of one who waits.
pub const RETRY: Duration = Duration::from_secs(2);
/// Proxmox's proxy gives up after 30 s; what it passed on by then is carried out, or seen as a task that runs.
pub const LATE_WRITES: Duration = Duration::from_secs(35);
/// Three of them fit into [`RENEW_WITHIN`].
const CALL_LIMIT: Duration = Duration::from_secs(3);
/// A confirmation that does not come at the second try is none: then all VMs are looked at.
const CONFIRM_TRIES: usize = 2;
/// Its annotation where a holder gave it back: who.
const GIVEN_BACK: &str = "csi.proxmox.sinextra.dev/given-back-by";
/// A foreign hand may have written a year: it is not waited for longer than that.
const LONGEST_DURATION: Duration = Duration::from_secs(600);

/// The driver's Lease, as one controller sees it.
pub struct Lease {
    api: Arc<Api>,
    me: String,
    fence: Fence,
    core: AsyncMutex<Core>,
    /// Renewals that were begun.
    begun: AtomicU64,
}

#[derive(Default)]
struct Core {
    /// As last read, and since when it is like that by our clock.
    seen: Option<(Seen, Instant)>,
    /// Our own: which renewal succeeded last, and when that one began.
    renewed: Option<(u64, Instant)>,
    /// How we got it, and the wait that comes with that.
    taken: Taken,
    /// It is not ours any more, and will not be again.
    lost: Option<String>,
    /// What was logged last.
    said: String,
}

/// The Lease as the API server has it.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    holder: String,
    /// Its last holder gave it back, and knew the outcome of all its writes.
    is_given_back: bool,
    duration: Duration,
    version: String,
    object: Value,
}

/// What a controller does next about a Lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Move {
    /// There is none.
    Create,
    /// It is ours.
    Renew,
    /// Its holder gave it back.
    TakeReleased,
    /// Somebody has taken it from its holder.
    TakeEmptied,
    /// Its holder has not renewed it.
    TakeExpired,
    /// Its holder lives.
    Wait,
}

/// The Lease is ours.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Taken {
    /// So long, what the holder before us sent may still be carried out.
    pub late_writes: Duration,
    /// There was none, so that nobody may have been before us.
    pub was_none: bool,
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("api", &self.api).field("me", &self.me).finish_non_exhaustive()
    }
}

fn next_move(seen: Option<&Seen>, unchanged: Duration, me: &str) -> Move {
    match seen {
        None => Move::Create,
        Some(seen) if seen.holder == me => Move::Renew,
        Some(seen) if seen.holder.is_empty() => {
            if seen.is_given_back {
                Move::TakeReleased
            } else {
                Move::TakeEmptied
            }
        }
        Some(seen) if unchanged >= seen.duration.clamp(DURATION, LONGEST_DURATION) => Move::TakeExpired,
        Some(_) => Move::Wait,
    }
}

fn read(object: &Value) -> Result<Seen, Failure> {
    let version = text(object, "/metadata/resourceVersion").ok_or("Kubernetes API: a Lease without resourceVersion")?;
    let seconds = object.pointer("/spec/leaseDurationSeconds").and_then(Value::as_u64).unwrap_or_default();
    let holder = text(object, "/spec/holderIdentity").unwrap_or_default();
    let annotations = object.pointer("/metadata/annotations").and_then(Value::as_object);
    let is_given_back = holder.is_empty() && annotations.is_some_and(|annotations| annotations.contains_key(GIVEN_BACK));
    Ok(Seen { holder, is_given_back, duration: Duration::from_secs(seconds), version, object: object.clone() })
}

impl Lease {
    /// Makes no call. `me` is nobody else's: a pod's name and something that no other process of that name has.
    pub(super) fn new(api: Arc<Api>, me: &str) -> Self {
        let fence = Fence::closed(&format!("this controller does not hold the Lease {}/{}", api.namespace(), proto::DRIVER_NAME));
        Self { api, me: me.into(), fence, core: AsyncMutex::default(), begun: AtomicU64::default() }
    }

    /// Open while it is ours.
    #[must_use]
    pub fn fence(&self) -> Fence {
        self.fence.clone()
    }

    /// The pod that we are, as [`identity`] says it.
    #[must_use]
    pub fn pod(&self) -> &str {
        self.me.rsplit_once('_').map_or(self.me.as_str(), |(pod, _)| pod)
    }

    fn name(&self) -> String {
        format!("Lease {}/{}", self.api.namespace(), proto::DRIVER_NAME)
    }

    fn path(&self) -> String {
        format!("/apis/coordination.k8s.io/v1/namespaces/{}/leases", self.api.namespace())
    }

    /// Waits until it is ours, and nothing of a holder before us can come any more. The task that keeps it; that one ends with
    /// why it is lost. Where there was no Lease, `is_first` says whether nobody was before us: see [`super::Kube::is_first`].
    ///
    /// # Errors
    /// It was lost meanwhile.
    pub async fn lead(self: &Arc<Self>, is_first: impl Future<Output = bool>) -> Result<JoinHandle<String>, String> {
        let taken = self.acquire().await;
        let lease = Arc::clone(self);
        let mut holding = tokio::spawn(async move { lease.hold().await });
        let nobody_was_before = async {
            if !taken.was_none || !is_first.await {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = tokio::time::sleep(taken.late_writes) => Ok(holding),
            () = nobody_was_before => Ok(holding),
            lost = &mut holding => Err(lost.unwrap_or_else(|cause| cause.to_string())),
        }
    }

    /// Waits until it is ours, whatever is in the way; says in the log what that is. From then on [`Lease::hold`] must run.
    pub async fn acquire(&self) -> Taken {
        loop {
            let mut core = self.core.lock().await;
            let said = match self.try_acquire(&mut core).await {
                Ok(None) => {
                    let taken = core.taken;
                    let wait = match (taken.late_writes.as_secs(), taken.was_none) {
                        (0, _) => String::new(),
                        (wait, false) => format!("; no holder before us gave it back, so what one may have sent is waited for, {wait} s"),
                        (wait, true) => format!("; there was none, so what one before us may have sent is waited for, {wait} s at most"),
                    };
                    proto::info!("{} is ours, {}{wait}", self.name(), self.me);
                    return taken;
                }
                Ok(Some(holder)) => format!("standing by: {} is held by {holder}", self.name()),
                Err(why) => format!("standing by: {why}"),
            };
            if core.said != said {
                proto::info!("{said}");
                core.said = said;
            }
            drop(core);
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Who holds it, where that is somebody else.
    async fn try_acquire(&self, core: &mut Core) -> Result<Option<String>, Failure> {
        let seen = self.look().await?;
        let now = Instant::now();
        let since = match (&core.seen, &seen) {
            (Some((before, since)), Some(seen)) if before.version == seen.version => *since,
            _ => now,
        };
        core.seen = seen.map(|seen| (seen, since));
        let seen = core.seen.as_ref().map(|(seen, _)| seen);
        match next_move(seen, now.saturating_duration_since(since), &self.me) {
            Move::Wait => return Ok(seen.map(|seen| seen.holder.clone())),
            // An answer of ours was lost, and what was the case then still is.
            Move::Renew => (),
            Move::TakeReleased => core.taken = Taken::default(),
            // Its holder may not know yet, and writes on until it cannot renew.
            Move::Create => core.taken = Taken { late_writes: LATE_WRITES + RENEW_WITHIN, was_none: true },
            Move::TakeEmptied => core.taken = Taken { late_writes: LATE_WRITES + RENEW_WITHIN, was_none: false },
            Move::TakeExpired => core.taken = Taken { late_writes: LATE_WRITES, was_none: false },
        }
        let number = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
        let answer = match core.seen.as_ref().map(|(seen, _)| seen.clone()) {
            None => self.create().await?,
            Some(seen) => self.put(&seen, &self.me, true).await?,
        };
        match answer.status {
            200 | 201 => self.note(core, &answer.body, number, now).map(|()| None),
            409 => Ok(Some("another one, which was quicker".into())),
            _ => Err(self.refusal(&answer)),
        }
    }

    /// Keeps it until it is lost; why it was.
    pub async fn hold(&self) -> String {
        loop {
            tokio::time::sleep(RETRY).await;
            let mut core = self.core.lock().await;
            self.renew(&mut core).await;
            if let Some(why) = &core.lost {
                return why.clone();
            }
        }
    }

    /// Proof that nobody else held it until now: it was renewed, after this was asked.
    ///
    /// # Errors
    /// There is no such proof.
    pub async fn confirm(&self) -> Result<(), Failure> {
        let asked = self.begun.load(Ordering::SeqCst);
        let mut core = self.core.lock().await;
        for _ in 0..CONFIRM_TRIES {
            // Another one asked, too, and was answered meanwhile.
            if core.renewed.is_none_or(|(number, _)| number <= asked) {
                self.renew(&mut core).await;
            }
            if let Some(why) = &core.lost {
                return Err(why.clone());
            }
            if core.renewed.is_some_and(|(number, _)| number > asked) {
                return Ok(());
            }
        }
        Err(format!("{} could not be renewed: {}", self.name(), core.said))
    }

    async fn renew(&self, core: &mut Core) {
        let (Some((_, last)), Some((seen, _)), None) = (core.renewed, core.seen.clone(), &core.lost) else { return };
        let (number, now) = (self.begun.fetch_add(1, Ordering::SeqCst) + 1, Instant::now());
        let renewed = match self.put(&seen, &self.me, false).await {
            Ok(Answer { status: 200, body }) => self.note(core, &body, number, now).map(|()| true),
            Ok(Answer { status: 404, .. }) => return self.lose(core, "it was deleted"),
            // Somebody has changed it. Our own renewal whose answer was lost has, too.
            Ok(Answer { status: 409, .. }) => match self.look().await {
                Ok(None) => return self.lose(core, "it was deleted"),
                Ok(Some(seen)) if seen.holder != self.me => {
                    return self.lose(core, &format!("{} has it", if seen.holder.is_empty() { "nobody" } else { &seen.holder }));
                }
                Ok(Some(seen)) => {
                    core.seen = Some((seen, now));
                    Ok(false)
                }
                Err(why) => Err(why),
            },
            Ok(answer) => Err(self.refusal(&answer)),
            Err(why) => Err(why),
        };
        if let Err(why) = renewed {
            if core.said != why {
                proto::warn!("{} is not renewed: {why}", self.name());
                core.said = why;
            }
            if last.elapsed() >= RENEW_WITHIN {
                let why = format!("it could not be renewed for {} s: {}", RENEW_WITHIN.as_secs(), core.said);
                self.lose(core, &why);
            }
        }
    }

    fn lose(&self, core: &mut Core, why: &str) {
        let why = format!("{} is lost: {why}; this controller writes nothing any more", self.name());
        self.fence.close(&why);
        core.lost = Some(why);
    }

    fn note(&self, core: &mut Core, object: &Value, number: u64, begun: Instant) -> Result<(), Failure> {
        core.seen = Some((read(object)?, begun));
        core.renewed = Some((number, begun));
        core.said.clear();
        let why = format!("{} was not renewed for {} s; this controller writes nothing any more", self.name(), RENEW_WITHIN.as_secs());
        self.fence.open_until(begun + RENEW_WITHIN, &why);
        Ok(())
    }

    /// Stops writing, and gives it back if the outcome of every write is known, so that the next one need not wait.
    pub async fn release(&self, all_is_known: bool) {
        let mut core = self.core.lock().await;
        if core.lost.is_some() || core.renewed.is_none() {
            return;
        }
        self.lose(&mut core, "it is given back");
        if !all_is_known {
            return proto::warn!("{} is not given back: the outcome of a write is not known; the next holder waits for it", self.name());
        }
        let Some((seen, _)) = core.seen.take() else { return };
        match self.put(&seen, "", false).await {
            Ok(Answer { status: 200, .. }) => proto::info!("{} is given back", self.name()),
            Ok(answer) => proto::warn!("{} is not given back: {}", self.name(), self.refusal(&answer)),
            Err(why) => proto::warn!("{} is not given back: {why}", self.name()),
        }
    }

    fn refusal(&self, answer: &Answer) -> Failure {
        let why = answer.refusal(&self.name());
        if !matches!(answer.status, 401 | 403) {
            return why;
        }
        let namespace = self.api.namespace();
        format!(
            "{why}; give the controller's ServiceAccount get, create and update on leases of coordination.k8s.io in namespace {namespace}"
        )
    }

    /// Nothing where there is none.
    async fn look(&self) -> Result<Option<Seen>, Failure> {
        let call = Call { limit: CALL_LIMIT, ..Call::get(format!("{}/{}", self.path(), proto::DRIVER_NAME)) };
        let answer = self.api.call(call).await?;
        match answer.status {
            200 => read(&answer.body).map(Some),
            404 => Ok(None),
            _ => Err(self.refusal(&answer)),
        }
    }

    async fn create(&self) -> Result<Answer, Failure> {
        let now = when::rfc3339(SystemTime::now());
        let body = json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {"name": proto::DRIVER_NAME, "namespace": self.api.namespace()},
            "spec": {"holderIdentity": self.me, "leaseDurationSeconds": DURATION.as_secs(), "acquireTime": now, "renewTime": now,
                "leaseTransitions": 0},
        });
        self.api.call(Call { method: Method::Post, path: self.path(), body, limit: CALL_LIMIT }).await
    }

    /// Writes it as it was seen, with another holder perhaps (none: given back); refused where it has changed since.
    async fn put(&self, seen: &Seen, holder: &str, is_taken: bool) -> Result<Answer, Failure> {
        let mut body = seen.object.clone();
        let now = when::rfc3339(SystemTime::now());
        if let Some(spec) = body.pointer_mut("/spec").and_then(Value::as_object_mut) {
            spec.insert("holderIdentity".into(), holder.into());
            spec.insert("leaseDurationSeconds".into(), DURATION.as_secs().into());
            spec.insert("renewTime".into(), now.clone().into());
            if is_taken && seen.holder != self.me {
                let transitions = spec.get("leaseTransitions").and_then(Value::as_u64).unwrap_or_default();
                spec.insert("leaseTransitions".into(), (transitions + 1).into());
                spec.insert("acquireTime".into(), now.into());
            }
        }
        if let Some(metadata) = body.pointer_mut("/metadata").and_then(Value::as_object_mut) {
            let annotations = metadata.entry("annotations").or_insert_with(|| json!({}));
            match annotations.as_object_mut() {
                Some(annotations) if holder.is_empty() => drop(annotations.insert(GIVEN_BACK.into(), self.me.clone().into())),
                Some(annotations) => drop(annotations.remove(GIVEN_BACK)),
                None => *annotations = if holder.is_empty() { json!({GIVEN_BACK: self.me}) } else { json!({}) },
            }
        }
        let path = format!("{}/{}", self.path(), proto::DRIVER_NAME);
        self.api.call(Call { method: Method::Put, path, body, limit: CALL_LIMIT }).await
    }
}

/// What no other process is called: the pod's name, and chance.
///
/// # Errors
/// The kernel gives no chance.
pub fn identity() -> std::io::Result<String> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let name = variable("POD_NAME").or_else(|| variable("HOSTNAME")).unwrap_or_else(|| proto::DRIVER_NAME.into());
    let mut chance = [0; 8];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut chance)?;
    Ok(format!("{name}_{:016x}", u64::from_ne_bytes(chance)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(holder: &str, seconds: u64) -> Seen {
        read(&json!({"metadata": {"resourceVersion": "7"}, "spec": {"holderIdentity": holder, "leaseDurationSeconds": seconds}})).unwrap()
    }

    #[test]
    fn a_lease_is_taken_from_nobody_who_may_live() {
        let after = |holder, seconds, unchanged| next_move(Some(&seen(holder, seconds)), Duration::from_secs(unchanged), "me");
        assert_eq!(next_move(None, Duration::ZERO, "me"), Move::Create);
        assert_eq!(after("me", 15, 0), Move::Renew);
        // Emptied by hand, while what its holder sent is on its way.
        assert_eq!(after("", 1, 0), Move::TakeEmptied);
        let mark =
            json!({"metadata": {"resourceVersion": "7", "annotations": {GIVEN_BACK: "other"}}, "spec": {"leaseDurationSeconds": 15}});
        assert_eq!(next_move(Some(&read(&mark).unwrap()), Duration::ZERO, "me"), Move::TakeReleased);
        assert_eq!(after("other", 15, 14), Move::Wait);
        assert_eq!(after("other", 15, 15), Move::TakeExpired);
        // A short one is as long as ours, a long one as long as it says, within reason.
        assert_eq!(after("other", 1, 14), Move::Wait);
        assert_eq!(after("other", 60, 59), Move::Wait);
        assert_eq!(after("other", 60, 60), Move::TakeExpired);
        assert_eq!(after("other", 31_536_000, 600), Move::TakeExpired);
    }

    /// The margins that the head of this file speaks of.
    #[test]
    fn a_holder_stops_before_anybody_may_take_over() {
        const IDLE_CLOSE: Duration = Duration::from_secs(5);
        const PROXY: Duration = Duration::from_secs(30);
        assert!(RENEW_WITHIN + IDLE_CLOSE <= DURATION);
        assert!(RENEW_WITHIN >= CALL_LIMIT * 3 && RETRY < CALL_LIMIT);
        assert!(LATE_WRITES > PROXY);
    }

    #[test]
    fn no_two_processes_have_one_identity() {
        assert_ne!(identity().unwrap(), identity().unwrap());
    }
}
