//! CreateVolume: choose a zone, look in the other ones for an earlier try, allocate.
//!
//! Zones are chosen one call at a time, and each counts what the others have chosen: of twenty that come together none sees the
//! same emptiest zone.
//!
//! Proxmox allocates before it answers, under the storage's lock. The disk's name comes from the volume's name alone, so a
//! repeat meets "already exists": then the volume is looked at, and is the same one or a conflict.

use std::collections::HashMap;
use std::sync::{Arc, MutexGuard, PoisonError};

use proto::VolumeHandle;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::capacity::Look;
use super::region::{EVIDENCE_AGE, Region, ago};
use super::{Clusters, Controller, MAX_TRIED, TRIED_AGE};
use crate::error::Error;
use crate::placement::{Candidate, Order, Plugin, Refusal, Seen, Want, candidates, disk_name, disk_of, skipped, virtual_bytes, with_room};
use crate::pve::{self, Meaning, api};
use crate::request::Create;

/// Volume name → the volume whose creation was begun, and when, or when an answer was lost last.
pub(super) type Tried = HashMap<String, (VolumeHandle, Instant)>;

/// A volume that is there now.
#[derive(Debug)]
pub struct Created {
    /// Its name.
    pub handle: VolumeHandle,
    /// Its size.
    pub capacity_bytes: u64,
    /// What later calls get to know.
    pub volume_context: HashMap<String, String>,
    /// The Proxmox nodes that reach it; empty: every one of its region.
    pub zones: Vec<String>,
}

/// One place that the volume could be in, and its names there.
#[derive(Debug, Clone)]
pub(super) struct Place {
    candidate: Candidate,
    pub(super) region: Arc<Region>,
    pub(super) handle: VolumeHandle,
    /// The image's name without its folder.
    name: String,
    format: String,
}

/// A creation that failed.
struct Failed {
    error: Error,
    /// The node that was to carry it is off, and nothing was sent.
    is_host_off: bool,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self { error, is_host_off: false }
    }
}

impl Controller {
    /// Makes a volume, or finds that it is made.
    ///
    /// # Errors
    /// No place, a conflict, or Proxmox's.
    pub async fn create(&self, request: Create) -> Result<Created, Error> {
        for warning in &request.warnings {
            proto::warn!("create {}: {warning}", request.name);
        }
        let clusters = self.clusters()?;
        if request.want.order == Order::Wish && request.want.terms.len() > 1 && request.claim.is_some() {
            self.placed().note_selected(&request.want.storage);
        }
        let (request, unscheduled) = self.asked_kubernetes(request).await;
        let made = self.make(&clusters, &request).await;
        let (place, capacity_bytes) = match made {
            Ok((place, capacity_bytes)) => {
                self.placed().note(&request.name, &place.handle, capacity_bytes);
                (place, capacity_bytes)
            }
            Err(error) => {
                if !self.tried().contains_key(&request.name) {
                    self.placed().forget(&request.name);
                }
                return Err(error);
            }
        };
        place.region.note_size(&place.handle, capacity_bytes);
        proto::info!("create {}: {}, {capacity_bytes} bytes", request.name, place.handle);
        if let Some(claim) = unscheduled {
            self.tell_of_binding(&request, &place, claim).await;
        }
        let volume_context = request.parameters.volume_context();
        Ok(Created { handle: place.handle, capacity_bytes, volume_context, zones: place.candidate.reach })
    }

    async fn make(&self, clusters: &Clusters, request: &Create) -> Result<(Place, u64), Error> {
        for is_last in [false, true] {
            let (places, skipped) = self.places(clusters, request).await?;
            // Found or made: what is lost of the last one's deletion would take this one.
            places.iter().try_for_each(|place| place.region.check_no_lost_deletion(&place.handle))?;
            let elsewhere = if skipped.is_empty() { places.get(1..).unwrap_or_default() } else { &places };
            if let Some((place, size_bytes)) = earlier(elsewhere).await? {
                return Ok((place, fitting(&request.want, size_bytes)?));
            }
            self.check_earlier_controllers(request, &skipped).await?;
            match self.allocate(clusters, request, &places).await {
                Ok(made) => return Ok(made),
                // Nothing was sent; what is read next knows better who is there.
                Err(failed) if failed.is_host_off && !is_last => (),
                Err(failed) => return Err(failed.error),
            }
        }
        Err(Error::internal("no try to create it was the last"))
    }

    /// The candidates in order, from a snapshot that is read again before anything is refused; and where, with no try noted, nobody
    /// can look: regions and nodes.
    async fn places(&self, clusters: &Clusters, request: &Create) -> Result<(Vec<Place>, Vec<(String, String)>), Error> {
        let want = &request.want;
        let tried = self.tried().get(&request.name).cloned();
        let begun = tried.as_ref().map(|(_, begun)| *begun);
        let tried = tried.map(|(handle, _)| handle);
        let owner = clusters.features.controller_vmid;
        let mut look = self.storages_seen(clusters, want, ago(EVIDENCE_AGE)).await?;
        let mut found = self.choose(request, &look, tried.as_ref(), owner);
        let lacks_tried = |found: &[Candidate]| tried.as_ref().is_some_and(|tried| !found.iter().any(|one| is_of(one, tried)));
        let refused = |found: &Result<Vec<Candidate>, Refusal>| match found {
            Ok(found) => with_room(want, found).is_err() || lacks_tried(found),
            Err(_) => true,
        };
        let skips = |look: &Look| if tried.is_none() { skipped(want, &look.regions) } else { Vec::new() };
        if refused(&found) || (self.is_young() && !skips(&look).is_empty()) {
            look = self.storages_seen(clusters, want, Instant::now()).await?;
            found = self.choose(request, &look, tried.as_ref(), owner);
        }
        let found = found?;
        if let Some(tried) = &tried
            && lacks_tried(&found)
            && !(begun.is_some_and(|begun| begun.elapsed() > TRIED_AGE) && is_nowhere(clusters, tried).await)
        {
            return Err(Error::unavailable(format!(
                "an earlier try to create {} was sent to {}/{}, and storage {} cannot be looked at there now; waiting for it, so that no \
                 second volume is made",
                request.name, tried.region, tried.zone, tried.storage
            )));
        }
        let place = |candidate: Candidate| {
            let region = clusters.regions.get(&candidate.region).cloned()?;
            let (handle, name, format) = named(request, owner, &candidate);
            Some(Place { candidate, region, handle, name, format })
        };
        Ok((found.into_iter().filter_map(place).collect(), skips(&look)))
    }

    /// What is there, read since `since`. A region that is not asked for is still known by its name, but not read.
    async fn storages_seen(&self, clusters: &Clusters, want: &Want, since: Instant) -> Result<Look, Error> {
        let mut look = Look::default();
        for (name, region) in &clusters.regions {
            let is_asked_for =
                want.terms.is_empty() || want.terms.iter().any(|term| term.region.as_ref().is_none_or(|wanted| wanted == name));
            let resources = if is_asked_for {
                region.resources(since).await.map_err(|error| Error::from(error).during(&format!("region {name}")))?
            } else {
                Arc::default()
            };
            look.regions.insert(name.clone(), resources);
        }
        let counts = |region: &str, one: &api::Storage| {
            one.storage == want.storage && (want.terms.is_empty() || want.terms.iter().any(|term| term.fits(region, &one.host)))
        };
        look.list(clusters, want.room, counts).await?;
        Ok(look)
    }

    /// Chooses, and lets every other call count the choice from this moment on.
    fn choose(&self, request: &Create, look: &Look, tried: Option<&VolumeHandle>, owner: u32) -> Result<Vec<Candidate>, Refusal> {
        let (mut want, mut placed) = (request.want.clone(), self.placed());
        if want.order == Order::Either && placed.was_selected(&want.storage) {
            want.order = Order::Wish;
        }
        let promised = look.promised(&placed, &request.name, &want.storage);
        let loads = placed.loads(&request.name, &want.storage);
        let mut found = candidates(&want, Seen { regions: &look.regions, promised: &promised, loads: &loads })?;
        if let Some(tried) = tried {
            // It may still be on its way there: not seen yet is not "not made". A stable sort keeps the rest as it was.
            found.sort_by_key(|one| !is_of(one, tried));
        }
        if let Some(first) = found.first() {
            placed.note(&request.name, &named(request, owner, first).0, first.size_bytes);
        }
        Ok(found)
    }

    async fn allocate(&self, clusters: &Clusters, request: &Create, places: &[Place]) -> Result<(Place, u64), Failed> {
        let place = places.first().ok_or_else(|| Error::internal("no candidate zone was found"))?;
        // Without room the volume may still be there from an earlier try that took the room: only a look can tell.
        let all: Vec<Candidate> = places.iter().map(|place| place.candidate.clone()).collect();
        if let Err(full) = with_room(&request.want, &all) {
            return match place.size().await {
                Ok(size_bytes) => Ok((place.clone(), fitting(&request.want, size_bytes)?)),
                Err(_) => {
                    self.forget_refused(request, place).await;
                    Err(Error::from(full).into())
                }
            };
        }
        let step = format!("create {}", place.handle);
        let was_tried = self.note_tried(request, place);
        let mut answer = place.allocate(clusters.features.controller_vmid).await;
        let mut is_lost = was_tried;
        if answer.as_ref().is_err_and(|error| error.meaning() == Meaning::OutcomeUnknown) {
            // Asking again is the look: it waits for the storage's lock, and finds the name taken if it was done.
            is_lost = true;
            self.note_lost(request);
            answer = place.allocate(clusters.features.controller_vmid).await;
        }
        let made = match answer {
            Ok(volid) => {
                let mut place = place.clone();
                if let Some(disk) = volid.strip_prefix(&format!("{}:", place.handle.storage)) {
                    place.handle.disk = disk.into();
                }
                let size_bytes = place.candidate.size_bytes;
                (place, size_bytes)
            }
            Err(error) if error.meaning() == Meaning::VolumeExists => {
                (place.clone(), place.fitting(&request.want).await.map_err(|error| error.during(&step))?)
            }
            // Its error has no reason; the volume speaks for itself.
            Err(error)
                if place.candidate.plugin == Plugin::ZfsTarget && error.meaning() == Meaning::Other && place.size().await.is_ok() =>
            {
                (place.clone(), place.fitting(&request.want).await.map_err(|error| error.during(&step))?)
            }
            Err(error) => {
                if !is_lost {
                    // Refused, and nothing else is on its way: any zone may be tried next.
                    self.tried().remove(&request.name);
                } else if error.meaning() == Meaning::OutcomeUnknown {
                    self.note_lost(request);
                } else {
                    self.forget_refused(request, place).await;
                }
                let is_host_off = !is_lost && error.meaning() == Meaning::HostDown;
                if is_host_off {
                    place.region.distrust_resources().await;
                }
                return Err(Failed { error: refused(place, error).during(&step), is_host_off });
            }
        };
        // Kept: while its zone is away, a repeat must not make a second one elsewhere.
        Ok(made)
    }

    fn tried(&self) -> MutexGuard<'_, Tried> {
        self.tried.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it was noted before.
    fn note_tried(&self, request: &Create, place: &Place) -> bool {
        noted(&mut self.tried(), &request.name, &place.handle, Instant::now())
    }

    /// An answer was lost: from now on it may still be on its way.
    fn note_lost(&self, request: &Create) {
        if let Some((_, begun)) = self.tried().get_mut(&request.name) {
            *begun = Instant::now();
        }
    }

    /// Its zone refuses it, and what was begun there before has ended without it: any zone may be tried next.
    async fn forget_refused(&self, request: &Create, place: &Place) {
        let is_old = |(handle, begun): &(VolumeHandle, Instant)| *handle == place.handle && begun.elapsed() > TRIED_AGE;
        if self.tried().get(&request.name).is_some_and(is_old)
            && place.size().await.is_err_and(|error| error.meaning() == Meaning::NoSuchVolume)
        {
            self.tried().remove(&request.name);
        }
    }

    /// A volume that is gone binds its name to no zone.
    pub(super) fn forget_tried(&self, gone: &VolumeHandle) {
        self.tried().retain(|_, (handle, _)| handle != gone);
        self.placed().forget_volume(gone);
    }
}

impl Place {
    async fn size(&self) -> Result<u64, pve::Error> {
        let shown = self.region.volume_size(&self.candidate.host, &self.handle.storage, &self.handle.volid()).await?;
        Ok(virtual_bytes(self.candidate.plugin, self.candidate.size_bytes, shown))
    }

    /// The size of what is there, if it is what was asked for.
    async fn fitting(&self, want: &Want) -> Result<u64, Error> {
        fitting(want, self.size().await?)
    }

    async fn allocate(&self, owner: u32) -> Result<String, pve::Error> {
        let kib = self.candidate.size_bytes.div_ceil(1 << 10);
        let request = api::allocate(&self.candidate.host, &self.handle.storage, owner, &self.name, &self.format, kib);
        let answer = self.region.client().call(request).await?;
        Ok(answer.as_str().unwrap_or_default().to_string())
    }
}

/// Whether it was noted before. What was begun there stays begun when it was: a repeat that is refused leaves nothing on its way.
fn noted(tried: &mut Tried, name: &str, handle: &VolumeHandle, now: Instant) -> bool {
    let was_tried = tried.get(name).cloned();
    if was_tried.as_ref().is_none_or(|(before, _)| before != handle) {
        tried.insert(name.to_owned(), (handle.clone(), now));
    }
    while tried.len() > MAX_TRIED {
        let ended = tried.iter().filter(|(_, (_, begun))| now.duration_since(*begun) > TRIED_AGE);
        let oldest = ended.min_by_key(|(_, (_, begun))| *begun).map(|(name, _)| name.clone());
        // Those that may still go on are never so many that they matter.
        let Some(oldest) = oldest else { break };
        tried.remove(&oldest);
    }
    was_tried.is_some()
}

fn is_of(one: &Candidate, tried: &VolumeHandle) -> bool {
    (&one.region, &one.zone) == (&tried.region, &tried.zone)
}

/// The volume's handle there, the image's name without a folder, its format.
fn named(request: &Create, owner: u32, candidate: &Candidate) -> (VolumeHandle, String, String) {
    let format = match (candidate.plugin, request.parameters.format.as_deref()) {
        (Plugin::File | Plugin::LvmChain, Some(format)) => format,
        _ => "raw",
    };
    let name = disk_name(owner, &request.name, candidate.plugin, format);
    let disk = disk_of(owner, &name, candidate.plugin);
    let (region, zone, storage) = (candidate.region.clone(), candidate.zone.clone(), request.want.storage.clone());
    (VolumeHandle { region, zone, storage, disk }, name, format.into())
}

/// What Proxmox refused, with what to do where its words do not say it.
fn refused(place: &Place, error: pve::Error) -> Error {
    if place.candidate.plugin == Plugin::LvmChain && error.words().contains("unsupported format") {
        return Error::invalid(format!(
            "{error}; storage {:?} makes no qcow2: switch on its snapshot-as-volume-chain (Proxmox VE 9), or remove storageFormat from the class",
            place.handle.storage
        ));
    }
    error.into()
}

/// Whether its zone itself says that this volume is not there; not so when nobody answers.
async fn is_nowhere(clusters: &Clusters, handle: &VolumeHandle) -> bool {
    let Some(region) = clusters.regions.get(&handle.region) else { return false };
    let Ok(Some(host)) = region.host_of(handle).await else { return false };
    let size = region.volume_size(&host, &handle.storage, &handle.volid()).await;
    size.is_err_and(|error| error.meaning() == Meaning::NoSuchVolume)
}

/// The volume in one of these places, from an earlier try; looked for in all of them at once.
async fn earlier(places: &[Place]) -> Result<Option<(Place, u64)>, Error> {
    let mut looking = JoinSet::new();
    for place in places.iter().cloned() {
        looking.spawn(proto::log::carried(async move {
            let size = place.size().await;
            (place, size)
        }));
    }
    let mut found = None;
    while let Some(looked) = looking.join_next().await {
        match looked {
            Ok((place, Ok(size_bytes))) => found = Some((place, size_bytes)),
            Ok((_, Err(error))) if error.meaning() == Meaning::NoSuchVolume => (),
            Ok((place, Err(error))) => {
                let step = format!("whether {} is there from an earlier try cannot be told", place.handle);
                return Err(Error::from(error).during(&step));
            }
            Err(cause) => return Err(Error::internal(format!("a look broke off: {cause}"))),
        }
    }
    Ok(found)
}

/// CSI: the same name with a size that does not fit is another volume.
fn fitting(want: &Want, size_bytes: u64) -> Result<u64, Error> {
    if size_bytes >= want.required_bytes && want.limit_bytes.is_none_or(|limit| size_bytes <= limit) {
        return Ok(size_bytes);
    }
    let limit = want.limit_bytes.map_or_else(String::new, |limit| format!(", limit_bytes {limit}"));
    Err(Error::already_exists(format!(
        "a volume of this name is there with {size_bytes} bytes; asked for were required_bytes {}{limit}",
        want.required_bytes
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_creations_make_none_forgotten_that_may_still_go_on() {
        let handle: VolumeHandle = "r/pve1/ds/vm-9999-a".parse().unwrap();
        let (mut tried, first) = (Tried::new(), Instant::now());
        let names: Vec<String> = (0..=MAX_TRIED).map(|n| format!("pvc-{n}")).collect();
        assert!(names.iter().all(|name| !noted(&mut tried, name, &handle, first)));
        assert_eq!(tried.len(), MAX_TRIED + 1, "all of them may go on");
        // A repeat begins nothing anew; elsewhere it does.
        let later = first + TRIED_AGE;
        assert!(noted(&mut tried, "pvc-1", &handle, later) && tried["pvc-1"].1 == first);
        let elsewhere = VolumeHandle { zone: "pve2".into(), ..handle.clone() };
        assert!(noted(&mut tried, "pvc-2", &elsewhere, later) && tried["pvc-2"] == (elsewhere, later));
        let after = later + std::time::Duration::from_secs(1);
        noted(&mut tried, "new", &handle, after);
        assert_eq!(tried.len(), MAX_TRIED);
        assert!(tried.contains_key("new") && tried.contains_key("pvc-2"));
    }
}
