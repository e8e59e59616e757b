//! Carries the RPCs out: look, take the next step, look again. The only actor.
//!
//! One file per RPC; `region` holds what is known of a cluster, `evidence` says who holds a volume. Every call runs in a
//! task of its own (see `service`), so that a client that goes away leaves nothing half noted.

mod batch;
mod binding;
mod capacity;
mod claim;
pub(crate) mod cluster;
mod condition;
mod create;
mod delete;
mod doubt;
pub(crate) mod evidence;
mod expand;
pub mod holders;
mod kubernetes;
mod leftover;
mod list;
mod modify;
mod placed;
mod publish;
mod queue;
pub(crate) mod region;
pub mod seen;
mod unpublish;
pub(crate) mod when;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use proto::VolumeHandle;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::config::{Features, Reading, Stamp, stamp_of};
use crate::error::Error;
use crate::kube::Kube;
use crate::placement::{Refusal, is_up};
use crate::pve::Client;
use crate::pve::api::{self, Storage};
pub use condition::Condition;
pub use create::Created;
use doubt::DOUBT_AGE;
pub use expand::Expanded;
pub use list::{Listed, Page};
use placed::Ledger;
pub use publish::Published;
use region::{EVIDENCE_AGE, Region, Rules, ago};
pub(crate) use unpublish::words;

/// The config file and the credential files are looked at again after this long, when a call comes.
const CONFIG_AGE: Duration = Duration::from_secs(1);
/// Names of creations that are remembered; beyond it those are forgotten that ended long ago.
const MAX_TRIED: usize = 1024;
/// An allocation whose answer was lost has ended by then, also one that writes the whole file first.
const TRIED_AGE: Duration = Duration::from_secs(600);

/// The releases that the simulator speaks, which recordings of the real daemons keep honest.
const OLDEST_TESTED: Release = Release(8, 2);
const NEWEST_TESTED: Release = Release(9, 2);

/// A release of Proxmox VE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Release(u32, u32);

impl std::fmt::Display for Release {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// `9.2.11`, by its first two numbers.
fn is_tested(version: &str) -> bool {
    let mut numbers = version.split(['.', '-', '~']).map_while(|number| number.parse().ok());
    let release = numbers.next().zip(numbers.next()).map(|(major, minor)| Release(major, minor));
    release.is_some_and(|release| (OLDEST_TESTED..=NEWEST_TESTED).contains(&release))
}

/// What is said of a region at start; an error: nobody tried that release.
pub(crate) fn greeting(region: &str, version: &str) -> Result<String, String> {
    let known = format!("region {region}: Proxmox VE {version}");
    if is_tested(version) {
        return Ok(known);
    }
    Err(format!("{known} is not tested; tested are {OLDEST_TESTED} to {NEWEST_TESTED}"))
}

/// All clusters of the config file.
#[derive(Debug)]
pub(crate) struct Clusters {
    pub(crate) features: Features,
    pub(crate) regions: BTreeMap<String, Arc<Region>>,
}

#[derive(Debug)]
struct Loaded {
    clusters: Result<Arc<Clusters>, String>,
    /// What was read, and as it was before.
    files: Vec<(PathBuf, Stamp)>,
    looked_at: Instant,
}

/// The controller without its gRPC.
#[derive(Debug)]
pub struct Controller {
    path: PathBuf,
    ca_bundle: Option<PathBuf>,
    kube: Option<Arc<Kube>>,
    loaded: Mutex<Loaded>,
    /// Volume name → the volume whose creation was begun: it is there, or its outcome is not known.
    tried: Mutex<create::Tried>,
    placed: Mutex<Ledger>,
    /// When this process began to act.
    begun: (Instant, SystemTime),
    /// Regions and storages whose claims were told that they are bound before their pods are scheduled.
    told_of_binding: Mutex<BTreeSet<(String, String)>>,
}

impl Controller {
    /// Reads the config file; one that is bad or missing is read again on demand. Makes no call.
    #[must_use]
    pub fn new(path: PathBuf, ca_bundle: Option<PathBuf>) -> Self {
        Self::with_kube(path, ca_bundle, None)
    }

    /// The same, where Kubernetes can be asked.
    #[must_use]
    pub fn with_kube(path: PathBuf, ca_bundle: Option<PathBuf>, kube: Option<Arc<Kube>>) -> Self {
        let loaded = load(&path, ca_bundle.as_ref(), kube.as_ref(), None);
        match &loaded.clusters {
            Ok(clusters) => {
                let regions: Vec<&str> = clusters.regions.keys().map(String::as_str).collect();
                proto::info!("config file {}: regions {}", path.display(), regions.join(", "));
            }
            Err(why) => proto::error!("{why}"),
        }
        let (tried, placed, told_of_binding) = Default::default();
        let begun = (Instant::now(), SystemTime::now());
        Self { path, ca_bundle, kube, loaded: Mutex::new(loaded), tried, placed, begun, told_of_binding }
    }

    fn told_of_binding(&self) -> MutexGuard<'_, BTreeSet<(String, String)>> {
        self.told_of_binding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn placed(&self) -> MutexGuard<'_, Ledger> {
        self.placed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is a config to work with.
    ///
    /// # Errors
    /// The sentence that says what is wrong with the file.
    pub fn ready(&self) -> Result<(), String> {
        self.clusters().map(drop).map_err(|error| error.text)
    }

    /// Says once, in the log, which Proxmox VE each region is, and whether that one was ever tried.
    pub async fn greet(&self) {
        let Ok(clusters) = self.clusters() else { return };
        let mut greeting_all = JoinSet::new();
        for (name, region) in &clusters.regions {
            let (name, region) = (name.clone(), Arc::clone(region));
            greeting_all.spawn(async move {
                let request = api::version();
                let call = request.name();
                match region.client().call(request).await.and_then(|data| api::read_version(&call, &data)) {
                    Ok(version) => match greeting(&name, &version) {
                        Ok(known) => proto::info!("{known}"),
                        Err(untested) => proto::warn!("{untested}"),
                    },
                    Err(error) => proto::warn!("region {name}: {}", Error::from(error).text),
                }
            });
        }
        // One that hangs keeps no other one from being heard: readiness waits for that.
        greeting_all.join_all().await;
    }

    pub(crate) fn clusters(&self) -> Result<Arc<Clusters>, Error> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if loaded.looked_at.elapsed() >= CONFIG_AGE {
            loaded.looked_at = Instant::now();
            if loaded.clusters.is_err() || loaded.files.iter().any(|(path, stamp)| stamp_of(path) != *stamp) {
                let again = load(&self.path, self.ca_bundle.as_ref(), self.kube.as_ref(), loaded.clusters.as_ref().ok());
                match (&again.clusters, &loaded.clusters) {
                    (Err(why), Ok(_)) => {
                        proto::error!("{why}; the config read before stays in use");
                        loaded.files = again.files;
                    }
                    (Ok(_), _) => {
                        proto::info!("config file {} read again", self.path.display());
                        *loaded = again;
                    }
                    (Err(_), Err(_)) => *loaded = again,
                }
            }
        }
        loaded.clusters.clone().map_err(Error::precondition)
    }

    fn region(&self, name: &str) -> Result<Arc<Region>, Error> {
        let clusters = self.clusters()?;
        clusters.regions.get(name).cloned().ok_or_else(|| {
            let known: Vec<&str> = clusters.regions.keys().map(String::as_str).collect();
            Error::precondition(format!("region {name:?} is not in the config file; known are {}", known.join(", ")))
        })
    }

    /// Whether Kubernetes can be asked.
    #[must_use]
    pub fn has_kubernetes(&self) -> bool {
        self.kube.is_some()
    }

    /// Whether this controller still acts: without a Lease always.
    ///
    /// # Errors
    /// It does not: why.
    pub fn check_acts(&self) -> Result<(), Error> {
        let fence = self.kube.as_ref().map(|kube| kube.fence()).unwrap_or_default();
        fence.check().map_err(|why| Error::unavailable(format!("{why}; the next holder of the Lease looks what became of this call")))
    }

    /// Tells people of a refusal that needs one, where there is Kubernetes.
    pub fn tell(&self, volume: &str, reason: &'static str, error: &Error) {
        if let Some(kube) = self.kube.as_ref().filter(|_| error.needs_person()) {
            kube.tell(volume, reason, &error.text);
        }
    }

    /// Whether the outcome of every write is known, so that nothing of ours comes later.
    #[must_use]
    pub fn knows_all_outcomes(&self) -> bool {
        let fence = self.kube.as_ref().map(|kube| kube.fence()).unwrap_or_default();
        let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let mut regions = loaded.clusters.iter().flat_map(|clusters| clusters.regions.values());
        regions.all(|region| region.client().writes_in_flight() == 0) && fence.last_unknown().is_none_or(|at| at.elapsed() >= DOUBT_AGE)
    }

    /// Calls to Proxmox that have begun and not ended, also those whose caller has given up.
    #[must_use]
    pub fn calls_in_flight(&self) -> usize {
        let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.clusters.iter().flat_map(|clusters| clusters.regions.values()).map(|region| region.client().calls_in_flight()).sum()
    }

    /// Makes sure that a volume is there.
    ///
    /// # Errors
    /// NOT_FOUND, or Proxmox's.
    pub async fn check_exists(&self, handle: &VolumeHandle) -> Result<u64, Error> {
        let clusters = self.clusters()?;
        let missing = |why: &str| Error::not_found(format!("volume {handle} is not there: {why}"));
        let region = clusters.regions.get(&handle.region).ok_or_else(|| missing("its region is not in the config file"))?;
        let Some(host) = region.host_of(handle).await? else { return Err(missing("no Proxmox node has its storage")) };
        region.volume_size(&host, &handle.storage, &handle.volid()).await.map_err(|error| Error::from(error).during(&handle.to_string()))
    }
}

impl Region {
    /// The node to ask about a volume: its zone, or any that has its storage; nothing where there is none, and the cluster
    /// shows so.
    ///
    /// # Errors
    /// Proxmox's; or the storage is not listed, so that nothing can be said.
    async fn host_of(&self, handle: &VolumeHandle) -> Result<Option<String>, Error> {
        let resources = self.resources(ago(EVIDENCE_AGE)).await?;
        let of_storage: Vec<&Storage> = resources.storages.iter().filter(|storage| storage.storage == handle.storage).collect();
        if of_storage.iter().any(|storage| storage.shared) {
            // Any node that has it, for a handle with a zone (the reference driver's, by hand) as well.
            let up = of_storage.iter().filter(|storage| is_up(&resources, storage));
            let host = up.min_by_key(|storage| storage.host != handle.zone).map(|storage| storage.host.clone());
            return host.map(Some).ok_or_else(|| {
                Error::unavailable(format!("storage {:?} is active on no Proxmox node of region {}", handle.storage, handle.region))
            });
        }
        if resources.hosts.contains_key(&handle.zone) {
            return Ok(Some(handle.zone.clone()));
        }
        if !handle.zone.is_empty() {
            if of_storage.is_empty() {
                return Err(Error::precondition(format!(
                    "Proxmox node {} is not in the cluster, and storage {:?} is not shown to us, so that it cannot be told whether the volume \
                     is elsewhere; give the token's role Datastore.Audit on /storage/{}, or enable the storage",
                    handle.zone, handle.storage, handle.storage
                )));
            }
            // Local to the node that is gone, and gone with it.
            return Ok(None);
        }
        Ok(of_storage.into_iter().find(|storage| storage.active).map(|storage| storage.host.clone()))
    }

    /// The storage's plugin as Proxmox names it, where it is shown.
    pub(super) async fn plugintype(&self, storage: &str) -> Result<Option<String>, Error> {
        let resources = self.resources(ago(EVIDENCE_AGE)).await?;
        let found = resources.storages.iter().find(|one| one.storage == storage && !one.plugin.is_empty());
        Ok(found.map(|one| one.plugin.clone()))
    }
}

/// Reads the file. A region of the same name, with one of its urls as before, keeps what it knows: who held what on a node that is off now,
/// and which of our writes are in doubt.
fn load(path: &Path, ca_bundle: Option<&PathBuf>, kube: Option<&Arc<Kube>>, before: Option<&Arc<Clusters>>) -> Loaded {
    let looked_at = Instant::now();
    let Reading { config, files } = Reading::of(path);
    let clusters = config.map(|config| {
        let features = config.features;
        let regions = config.clusters.iter().map(|cluster| {
            let fence = kube.map(|kube| kube.fence()).unwrap_or_default();
            let client = Client::new(cluster, ca_bundle.map(PathBuf::as_path)).fenced(fence);
            let rules = Rules {
                fenced: cluster.fenced.clone(),
                attach_to_protected: features.attach_to_protected,
                attach_only_owned: features.attach_only_owned,
                owners: features.delete_also_owned_by.iter().copied().chain([features.controller_vmid]).collect(),
                capmox: features.capmox,
            };
            let known = before.and_then(|before| before.regions.get(&cluster.region));
            let region = match known.filter(|region| region.client().is_of(&cluster.urls)) {
                Some(region) => {
                    region.renew(client, rules);
                    Arc::clone(region)
                }
                // At other addresses; what was sent to the old ones may still go on.
                None => {
                    let new = |client| Region::new(cluster.region.clone(), client, rules, kube.cloned());
                    Arc::new(match known {
                        Some(region) => new(client.instead_of(&region.client())).after(region),
                        None => new(client),
                    })
                }
            };
            (cluster.region.clone(), region)
        });
        let regions = regions.collect();
        Arc::new(Clusters { features, regions })
    });
    Loaded { clusters, files, looked_at }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Wrong(text) => Self::invalid(text),
            Refusal::OutOfRange(text) => Self::out_of_range(text),
            Refusal::NotHere(text) => Self::exhausted(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_that_were_tried() {
        for (version, tested) in [
            ("8.2.4", true),
            ("8.4.14", true),
            ("9.2.11", true),
            ("9.0~beta1", true),
            ("8.1.10", false),
            ("7.4-17", false),
            ("9.3.1", false),
            ("10.0.1", false),
            ("", false),
            ("x", false),
        ] {
            let said = greeting("fsn1", version);
            assert_eq!(said.is_ok(), tested, "{version}");
            let (Ok(text) | Err(text)) = said;
            assert!(text.contains("region fsn1") && text.contains(version), "{text}");
            assert_eq!(text.contains("not tested; tested are 8.2 to 9.2"), !tested, "{text}");
        }
    }
}
