//! What `/healthz` and `/readyz` say. The pages must not block: they tell what is known, and at most begin a question.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::health::Pages;
use proto::serve::Place;
use serde_json::Value;
use tokio::time::Instant;

use super::metrics;
use crate::config;
use crate::pve::{self, Cause, Meaning};
use crate::run::Controller;

/// While no cluster has answered yet, a probe asks them again after this long; kubelet probes every 10 s.
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// Whether Proxmox answers, by the calls that were made anyway.
#[derive(Debug, Default)]
pub struct Heard {
    ever: AtomicBool,
    trouble: Mutex<Option<String>>,
}

impl Heard {
    /// An answer counts when it is Proxmox's and knows us, a refusal of anything else included.
    pub(crate) fn note(&self, answer: &Result<Value, pve::Error>) {
        let trouble = match answer {
            Err(error) => match (&error.cause, error.meaning()) {
                (Cause::Answer { .. }, Meaning::Unauthenticated | Meaning::HostDown | Meaning::OutcomeUnknown) => Some(error.to_string()),
                (Cause::Answer { .. } | Cause::Task { .. } | Cause::TaskUnknown { .. }, _) => None,
                (Cause::NotSent(_) | Cause::NoAnswer(_) | Cause::Shape(_), _) => Some(error.to_string()),
            },
            Ok(_) => None,
        };
        if trouble.is_none() {
            self.ever.store(true, Ordering::Relaxed);
        }
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }

    /// What was heard under an earlier config counts, too.
    pub(crate) fn follow(&self, before: &Self) {
        self.ever.fetch_or(before.ever(), Ordering::Relaxed);
    }

    /// Since start.
    #[must_use]
    pub fn ever(&self) -> bool {
        self.ever.load(Ordering::Relaxed)
    }

    /// Why the last call had no answer; nothing where it had one, or none was made.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What the process is about.
#[derive(Debug, Default)]
enum Doing {
    /// Another controller has the Lease, or nobody yet.
    #[default]
    StandingBy,
    Acting(Arc<Controller>, Place),
}

/// What the pages are made of.
#[derive(Debug)]
pub struct Standing {
    config: std::path::PathBuf,
    doing: Mutex<Doing>,
    asked: Mutex<Option<Instant>>,
}

impl Standing {
    /// Not acting yet.
    #[must_use]
    pub fn new(config: std::path::PathBuf) -> Arc<Self> {
        Arc::new(Self { config, doing: Mutex::default(), asked: Mutex::default() })
    }

    /// It acts from now on, at that socket.
    pub fn act(&self, controller: &Arc<Controller>, place: Place) {
        *self.doing() = Doing::Acting(Arc::clone(controller), place);
    }

    fn doing(&self) -> std::sync::MutexGuard<'_, Doing> {
        self.doing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn alive(&self) -> Result<String, String> {
        match &*self.doing() {
            Doing::Acting(_, place) if !place.is_ours() => Err(format!("{} is not ours any more", place.path().display())),
            Doing::Acting(..) | Doing::StandingBy => Ok(String::new()),
        }
    }

    fn ready(&self) -> Result<String, String> {
        let controller = match &*self.doing() {
            Doing::Acting(controller, _) => Arc::clone(controller),
            // A config that cannot be read would be no standby's.
            Doing::StandingBy => {
                return config::load(&self.config).map(|_| "standby: another controller has the Lease, or will have it\n".into());
            }
        };
        let standing = controller.readiness();
        if standing.is_err() && self.is_time_to_ask() {
            tokio::spawn(async move { controller.greet().await });
        }
        standing
    }

    fn is_time_to_ask(&self) -> bool {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.is_some_and(|at| at.elapsed() < ASK_AGAIN) {
            return false;
        }
        *asked = Some(Instant::now());
        true
    }

    fn metrics(&self) -> String {
        let controller = match &*self.doing() {
            Doing::Acting(controller, _) => Some(Arc::clone(controller)),
            Doing::StandingBy => None,
        };
        metrics::page(controller.map(|controller| controller.seen()).as_ref())
    }

    /// The pages.
    #[must_use]
    pub fn pages(self: &Arc<Self>, metrics_path: &str) -> Pages {
        let [alive, ready, metrics] = [0; 3].map(|_| Arc::clone(self));
        Pages {
            alive: Arc::new(move || alive.alive()),
            ready: Arc::new(move || ready.ready()),
            metrics_path: metrics_path.into(),
            metrics: Arc::new(move || metrics.metrics()),
        }
    }
}
