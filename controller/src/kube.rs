//! The few Kubernetes calls that the controller makes, all optional: without its API everything works as well, at the cost of a
//! second look after each attach.
//!
//! `client` is the wire, `lease` says which of several controllers acts, `first` whether one acted before, `reads` what is attached
//! where and which nodes are off, `events` tells people what needs them, `rivals` who else serves this driver.

mod client;
pub mod events;
mod first;
pub mod lease;
mod reads;
mod rivals;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tokio::time::Instant;

use crate::fence::Fence;
use crate::reading::Reading;
use client::Api;
pub use client::{Access, THREADS};
use events::Events;
pub use lease::Lease;
use reads::Attachment;
pub use reads::{Claim, CsiNode, Machine, Pv};

/// A sentence: which call, and why not.
pub type Failure = String;

/// Kubernetes' API server.
pub struct Kube {
    api: Arc<Api>,
    lease: Option<Arc<Lease>>,
    events: Events,
    attachments: Reading<Arc<Vec<Attachment>>, Failure>,
    nodes: Reading<Arc<Vec<CsiNode>>, Failure>,
    pvs: Reading<Arc<Vec<Pv>>, Failure>,
    /// PV → when it was read, and its volume handle.
    handles: Mutex<HashMap<String, (Instant, String)>>,
}

impl fmt::Debug for Kube {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kube").field("api", &self.api).finish_non_exhaustive()
    }
}

impl Kube {
    /// Makes no call. Reads only: nobody says that one controller acts at a time.
    ///
    /// # Errors
    /// There are no certificates to trust.
    pub fn new(access: Access) -> Result<Self, Failure> {
        let (attachments, nodes, pvs, handles) = Default::default();
        Ok(Self { api: Arc::new(Api::new(access)?), lease: None, events: Events::default(), attachments, nodes, pvs, handles })
    }

    /// The same, for one who holds the Lease, or waits for it: see [`Lease::acquire`].
    #[must_use]
    pub fn with_lease(mut self, holder: &str) -> Self {
        self.lease = Some(Arc::new(Lease::new(Arc::clone(&self.api), holder)));
        self
    }

    /// The Lease, where there is one.
    #[must_use]
    pub fn lease(&self) -> Option<&Arc<Lease>> {
        self.lease.as_ref()
    }

    /// The namespace that we are in.
    #[must_use]
    pub(crate) fn namespace(&self) -> &str {
        self.api.namespace()
    }

    /// Closed where there is a Lease and it is not ours.
    #[must_use]
    pub fn fence(&self) -> Fence {
        self.lease.as_ref().map(|lease| lease.fence()).unwrap_or_default()
    }

    /// Calls that have begun and not ended.
    #[must_use]
    pub fn calls_in_flight(&self) -> usize {
        self.api.calls_in_flight()
    }
}

pub(crate) fn text(value: &Value, pointer: &str) -> Option<String> {
    value.pointer(pointer)?.as_str().filter(|text| !text.is_empty()).map(String::from)
}
