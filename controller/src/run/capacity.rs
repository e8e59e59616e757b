//! GetCapacity, and what CreateVolume has to know of storages: from one reading of each cluster. Where a class limits what may be
//! promised, the volumes that are there are listed, too.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::placed::Ledger;
use super::region::{Region, ago};
use super::{Clusters, Controller};
use crate::error::Error;
use crate::placement::{Plugin, Promised, Room, is_up};
use crate::pve::api::{self, Resources, Storage};
use crate::request::Capacity;

/// The provisioner asks for every zone and class at once, every minute; Proxmox's own numbers are up to 10 s old.
const CAPACITY_AGE: Duration = Duration::from_secs(10);

/// Region, zone (none: shared) and storage → volid → bytes; nothing where it could not be listed.
type Listings = BTreeMap<(String, String, String), Option<BTreeMap<String, u64>>>;

/// What was read of the clusters.
#[derive(Debug, Default)]
pub(super) struct Look {
    pub(super) regions: BTreeMap<String, Arc<Resources>>,
    listings: Listings,
}

impl Look {
    /// What is promised by now on `storage`, beside what `name` takes itself.
    pub(super) fn promised(&self, ledger: &Ledger, name: &str, storage: &str) -> Promised {
        let mut promised = Promised::default();
        if self.listings.is_empty() {
            return promised;
        }
        for (region, all) in &self.regions {
            for one in all.storages.iter().filter(|one| one.storage == storage) {
                let key = key_of(region, one);
                let Some(listed) = self.listings.get(&key) else { continue };
                // What is not known may be anything: no place for a promise.
                let bytes = listed.as_ref().map_or(u64::MAX, |listed| {
                    let there = listed.values().fold(0, |sum: u64, bytes| sum.saturating_add(*bytes));
                    there.saturating_add(ledger.unlisted_bytes(name, (&key.0, &key.1, &key.2), listed))
                });
                promised.note(region, one, bytes);
            }
        }
        promised
    }

    /// Lists the storages that `counts`, where the class limits what may be promised.
    ///
    /// # Errors
    /// None of them could be listed.
    pub(super) async fn list(&mut self, clusters: &Clusters, room: Room, counts: impl Fn(&str, &Storage) -> bool) -> Result<(), Error> {
        if !room.is_overcommitting() {
            return Ok(());
        }
        let mut failure = None;
        for (name, all) in &self.regions {
            let Some(region) = clusters.regions.get(name) else { continue };
            for storage in all.storages.iter().filter(|one| is_up(all, one) && counts(name, one)) {
                let key = key_of(name, storage);
                if self.listings.get(&key).is_some_and(Option::is_some) {
                    continue;
                }
                let listed = listed(region, storage).await;
                if let Err(error) = &listed {
                    proto::warn!("region {name}: {}", error.text);
                }
                self.listings.insert(key, listed.map_err(|error| failure = Some(error)).ok());
            }
        }
        match failure {
            Some(error) if self.listings.values().all(Option::is_none) => Err(error),
            _ => Ok(()),
        }
    }
}

fn key_of(region: &str, storage: &Storage) -> (String, String, String) {
    let zone = if storage.shared { String::new() } else { storage.host.clone() };
    (region.into(), zone, storage.storage.clone())
}

async fn listed(region: &Region, storage: &Storage) -> Result<BTreeMap<String, u64>, Error> {
    let request = api::contents(&storage.host, &storage.storage);
    let call = request.name();
    let data = region.client().call(request).await.map_err(Error::from)?;
    Ok(api::read_contents(&call, &data)?)
}

impl Controller {
    /// Bytes left in all, and in the place with most; unknown storages and zones have none.
    ///
    /// # Errors
    /// Proxmox's, where no cluster answers.
    pub async fn capacity(&self, wanted: &Capacity) -> Result<(u64, u64), Error> {
        let clusters = self.clusters()?;
        let counts = |region: &str, one: &Storage| {
            one.images
                && Plugin::named(&one.plugin).is_some()
                && wanted.storage.as_ref().is_none_or(|wanted| *wanted == one.storage)
                && wanted.term.as_ref().is_none_or(|term| term.fits(region, &one.host))
                // Refused at CreateVolume.
                && !(one.plugin == "lvm" && wanted.room.is_overcommitting())
        };
        let in_region = |name: &str| wanted.term.as_ref().and_then(|term| term.region.as_deref()).is_none_or(|wanted| wanted == name);
        let mut look = self.look(&clusters, in_region, ago(CAPACITY_AGE)).await?;
        look.list(&clusters, wanted.room, counts).await?;
        let mut left: BTreeMap<(String, String, String), u64> = BTreeMap::new();
        let storages: BTreeSet<&String> = look.regions.values().flat_map(|all| all.storages.iter().map(|one| &one.storage)).collect();
        let promised: BTreeMap<&String, Promised> =
            storages.into_iter().map(|storage| (storage, look.promised(&self.placed(), "", storage))).collect();
        for (name, all) in &look.regions {
            for one in all.storages.iter().filter(|one| is_up(all, one) && counts(name, one)) {
                let bytes = promised.get(&one.storage).map_or(0, |promised| promised.of(name, one));
                let here = wanted.room.left_bytes(one, bytes);
                left.entry(key_of(name, one)).and_modify(|left| *left = here.max(*left)).or_insert(here);
            }
        }
        let sum = left.values().fold(0, |sum: u64, left| sum.saturating_add(*left));
        Ok((sum, left.values().copied().max().unwrap_or(0)))
    }

    /// The regions that are asked for; one that does not answer is left out as long as another one does.
    ///
    /// # Errors
    /// None answers.
    async fn look(&self, clusters: &Clusters, is_asked_for: impl Fn(&str) -> bool, since: Instant) -> Result<Look, Error> {
        let (mut look, mut failure) = (Look::default(), None);
        for (name, region) in clusters.regions.iter().filter(|(name, _)| is_asked_for(name)) {
            match region.resources(since).await {
                Ok(resources) => drop(look.regions.insert(name.clone(), resources)),
                Err(error) => {
                    let error = Error::from(error).during(&format!("region {name}"));
                    proto::warn!("capacity: {}", error.text);
                    failure = Some(error);
                }
            }
        }
        match failure {
            Some(error) if look.regions.is_empty() => Err(error),
            _ => Ok(look),
        }
    }
}
