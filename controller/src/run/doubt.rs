//! Writes whose outcome nobody has seen: our own, and those of a controller before us.
//!
//! Proxmox carries a config write out only onto the config of its digest. That is a hash of the file's text, and comes back with it
//! (what was attached is detached again), so that a lost write is harmless only when it is too old to be begun and the config is
//! another one, or so old that it has ended; and the VM was looked at since. No answer to a later write says anything of an earlier one.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use proto::VolumeHandle;
use tokio::time::Instant;

use super::region::{Region, STATE_AGE, locked};
use crate::error::Error;
use crate::pve::{self, Meaning, api};

/// After this long, a write whose answer was lost is not carried out any more.
pub(super) const DOUBT_AGE: Duration = Duration::from_secs(120);
/// After this long it is not begun any more: Proxmox's proxy gives up after 30 s, and the VM's config is waited for for 10 s.
const LAST_BEGIN: Duration = Duration::from_secs(45);
/// So long after our start a write of an earlier controller may still wait.
const EARLIER_WRITES: Duration = LAST_BEGIN;
/// A change of an earlier controller is waited for that long: a hot-plug takes some seconds.
const EARLIER_WAIT: Duration = Duration::from_secs(10);
/// Between two looks at it.
const EARLIER_POLL: Duration = Duration::from_millis(500);

/// A write of a volume into a VM, from before it is sent until nothing more can come of it and what it did was looked after.
#[derive(Debug, Clone)]
pub(super) struct Doubt {
    /// Of the volume; empty: whichever has the name.
    zone: String,
    vmid: u32,
    digest: String,
    /// When it was sent, or its answer was lost.
    since: Instant,
    /// Its outcome is in the config: it cannot come any more.
    is_over: bool,
    /// The volume's attachment to that VM was answered OK since: no rival had come at the same time.
    is_looked_after: bool,
}

impl Doubt {
    fn is_of(&self, zone: &str) -> bool {
        self.zone == zone || self.zone.is_empty() || zone.is_empty()
    }

    /// Whether it may be carried out yet, onto a config of this digest.
    fn may_come(&self, digest: &str, at: Instant) -> Option<Duration> {
        let limit = if self.digest == digest { DOUBT_AGE } else { LAST_BEGIN };
        Some(limit).filter(|limit| !self.is_over && at.saturating_duration_since(self.since) < *limit)
    }
}

/// By volid.
pub(super) type Doubts = HashMap<String, Vec<Doubt>>;

/// Volid → zone and when the answer to its deletion was lost last.
pub(super) type LostDeletions = HashMap<String, Vec<(String, Instant)>>;

impl Region {
    /// What is known of its deletion. If the answer was lost, Proxmox may yet carry it out, on whatever has the name by then.
    pub(crate) fn note_deletion(&self, handle: &VolumeHandle, outcome: &Result<(), pve::Error>) {
        if !outcome.as_ref().is_err_and(|error| error.meaning() == Meaning::OutcomeUnknown) {
            return;
        }
        let zone = self.zone_of(handle);
        let mut lost = locked(&self.lost_deletions);
        lost.retain(|_, of_name| {
            of_name.retain(|(_, at)| at.elapsed() < DOUBT_AGE);
            !of_name.is_empty()
        });
        lost.entry(handle.volid()).or_default().push((zone, Instant::now()));
    }

    /// Whether a volume of that name can be made or attached: a deletion whose answer was lost would take it.
    ///
    /// # Errors
    /// One may yet be carried out.
    pub(crate) fn check_no_lost_deletion(&self, handle: &VolumeHandle) -> Result<(), Error> {
        let zone = self.zone_of(handle);
        let may_come = |(of, at): &(String, Instant)| (*of == zone || of.is_empty() || zone.is_empty()) && at.elapsed() < DOUBT_AGE;
        match locked(&self.lost_deletions).get(&handle.volid()).is_some_and(|of_name| of_name.iter().any(may_come)) {
            true => Err(Error::unavailable(format!(
                "the answer to an earlier deletion of {handle} was lost, and Proxmox may still carry it out; repeated, and decided within {} s",
                DOUBT_AGE.as_secs()
            ))),
            false => Ok(()),
        }
    }

    /// Of one name on each node, where the storage is local; else every handle means the same.
    pub(super) fn zone_of(&self, handle: &VolumeHandle) -> String {
        let resources = locked(&self.last_resources).as_ref().map(|(_, resources)| std::sync::Arc::clone(resources));
        let mut listed = resources.iter().flat_map(|all| all.storages.iter()).filter(|one| one.storage == handle.storage).peekable();
        let is_local = listed.peek().is_some() && !listed.any(|one| one.shared);
        if is_local { handle.zone.clone() } else { String::new() }
    }

    /// What is known of the writes of a volume.
    fn doubts_of<T>(&self, handle: &VolumeHandle, then: impl FnOnce(&mut Vec<Doubt>, &str) -> T) -> T {
        let zone = self.zone_of(handle);
        let mut doubts = locked(&self.doubts);
        let of_volume = doubts.entry(handle.volid()).or_default();
        let said = then(of_volume, &zone);
        if of_volume.is_empty() {
            doubts.remove(&handle.volid());
        }
        said
    }

    /// Notes a write of the volume into a VM that is about to be sent.
    pub(crate) fn doubt(&self, handle: &VolumeHandle, vmid: u32, digest: &str) {
        self.doubts_of(handle, |doubts, zone| {
            let (zone, digest) = (zone.into(), digest.into());
            doubts.push(Doubt { zone, vmid, digest, since: Instant::now(), is_over: false, is_looked_after: false });
        });
    }

    /// What became of it. That says nothing of those before it.
    pub(crate) fn note_outcome(&self, handle: &VolumeHandle, vmid: u32, outcome: Option<&pve::Error>) {
        let meaning = outcome.map(pve::Error::meaning);
        self.doubts_of(handle, |doubts, zone| {
            let Some(place) = doubts.iter().rposition(|one| one.is_of(zone) && one.vmid == vmid && !one.is_over) else { return };
            match (meaning, doubts.get_mut(place)) {
                // It was not begun.
                (Some(Meaning::DigestChanged | Meaning::NoSuchVm | Meaning::VmLocked), _) => drop(doubts.remove(place)),
                (Some(Meaning::OutcomeUnknown), Some(doubt)) => doubt.since = Instant::now(),
                (_, Some(doubt)) => doubt.is_over = true,
                (_, None) => (),
            }
        });
    }

    /// The VM's config has the volume: if only one write can have done that, it did.
    pub(crate) fn note_there(&self, handle: &VolumeHandle, vmid: u32) {
        self.doubts_of(handle, |doubts, zone| {
            let mut of_vm = doubts.iter_mut().filter(|one| one.is_of(zone) && one.vmid == vmid);
            if let (Some(only), None) = (of_vm.next(), of_vm.next()) {
                only.is_over = true;
            }
        });
    }

    /// No view of the VM has the volume any more. What may yet come is new when it comes.
    pub(crate) fn note_out(&self, handle: &VolumeHandle, vmid: u32) {
        self.forget_alone(handle, vmid);
        self.doubts_of(handle, |doubts, zone| {
            doubts.retain_mut(|one| {
                let is_of_vm = one.is_of(zone) && one.vmid == vmid;
                one.is_looked_after &= !is_of_vm;
                !(is_of_vm && one.is_over)
            });
        });
    }

    /// The volume's attachment to that VM is answered OK: nobody else had come since it was written.
    pub(crate) fn note_looked_after(&self, handle: &VolumeHandle, vmid: u32) {
        self.note_alone(handle, vmid);
        self.doubts_of(handle, |doubts, zone| {
            doubts.retain_mut(|one| {
                let is_of_vm = one.is_of(zone) && one.vmid == vmid;
                one.is_looked_after |= is_of_vm;
                !(is_of_vm && one.is_over)
            });
        });
    }

    /// Whether such writes can still be carried out, or were: time alone settles nothing, each VM is looked at again, after the last
    /// moment at which one could have come. Of `except` nothing is asked.
    ///
    /// # Errors
    /// It can, it was, or the VM cannot be looked at.
    pub(crate) async fn check_no_doubt(&self, handle: &VolumeHandle, except: Option<u32>) -> Result<(), Error> {
        for vmid in self.doubted_vms(handle).into_iter().filter(|vmid| Some(*vmid) != except) {
            self.check_no_doubt_of(handle, vmid).await?;
            self.doubts_of(handle, |doubts, zone| doubts.retain(|one| !(one.is_of(zone) && one.vmid == vmid)));
        }
        Ok(())
    }

    async fn check_no_doubt_of(&self, handle: &VolumeHandle, vmid: u32) -> Result<(), Error> {
        let volid = handle.volid();
        let host = self.resources(Instant::now()).await?.vms.get(&vmid).map(|vm| vm.host.clone());
        let Some(host) = host else { return self.check_vm_gone(vmid).await };
        if self.off(&host).await?.is_some_and(|off| off.fenced) {
            // Its VM does not run any more, whatever its config says.
            return Ok(());
        }
        let asked = Instant::now();
        let config = self.config(&host, vmid, asked).await?.config;
        if config.naming(&volid).any(|(key, _)| !key.starts_with("unused")) {
            return Err(Error::unavailable(format!("volume {volid}: VM {vmid} got it after all; repeated")));
        }
        let may_come = self.doubts_of(handle, |doubts, zone| {
            let of_vm = doubts.iter().filter(|one| one.is_of(zone) && one.vmid == vmid);
            of_vm.filter_map(|one| one.may_come(&config.digest, asked)).max()
        });
        match may_come {
            Some(limit) => Err(Error::unavailable(format!(
                "volume {volid}: the answer to its attachment to VM {vmid} was lost, and Proxmox may still carry it out; decided within {} s",
                limit.as_secs()
            ))),
            None => Ok(()),
        }
    }

    /// The VMs of such writes.
    #[must_use]
    pub(crate) fn doubted_vms(&self, handle: &VolumeHandle) -> BTreeSet<u32> {
        self.doubts_of(handle, |doubts, zone| doubts.iter().filter(|one| one.is_of(zone)).map(|one| one.vmid).collect())
    }

    /// Whether what that VM has of the volume came by a write of ours after which nobody has looked.
    #[must_use]
    pub(crate) fn is_unlooked(&self, handle: &VolumeHandle, vmid: u32) -> bool {
        self.doubts_of(handle, |doubts, zone| doubts.iter().any(|one| one.is_of(zone) && one.vmid == vmid && !one.is_looked_after))
    }

    /// Whether that is still to be looked for.
    #[must_use]
    pub(crate) fn may_have_earlier_writes(&self, host: &str) -> bool {
        let looked = locked(&self.quiet).get(host).copied();
        looked.is_none_or(|at| at < self.begun + EARLIER_WRITES && at.elapsed() >= STATE_AGE)
    }

    /// What an earlier controller began and we cannot know of: config changes that go on on `host` and are not ours. Looked
    /// for until long enough after our start.
    ///
    /// # Errors
    /// One goes on, by its UPID; or Proxmox's.
    pub(crate) async fn check_no_earlier_write(&self, host: &str) -> Result<(), Error> {
        let begun = Instant::now();
        loop {
            if !self.may_have_earlier_writes(host) {
                return Ok(());
            }
            let (at, request) = (Instant::now(), api::active_changes(host));
            let call = request.name();
            let active = api::read_active_changes(&call, &self.client().call(request).await?)?;
            let foreign = active.into_iter().find(|(_, vmid)| vmid.is_none_or(|vmid| !self.is_changing(vmid)));
            let Some((upid, vmid)) = foreign else {
                locked(&self.quiet).insert(host.into(), at);
                return Ok(());
            };
            if let Some(vmid) = vmid {
                self.distrust(vmid).await;
            }
            if begun.elapsed() > EARLIER_WAIT {
                return Err(Error::unavailable(format!(
                    "a change that this controller did not begin goes on on Proxmox node {host}: {upid}; repeated when it has ended"
                )));
            }
            tokio::time::sleep(EARLIER_POLL).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::region::{Rules, ago};
    use super::*;
    use crate::config::{ClusterConfig, Credentials, Trust};
    use crate::pve::Client;
    use crate::pve::api::{Resources, Vm};
    use crate::secret::Secret;

    fn region_with(resources: Resources) -> Region {
        let credentials = Credentials::Token { id: "csi@pve!csi".into(), secret: Secret::new("x".into()) };
        let urls = vec!["http://127.0.0.1:1/api2/json".into()];
        let cluster = ClusterConfig { region: "r".into(), urls, trust: Trust::System, credentials, fenced: BTreeSet::new() };
        let region = Region::new("r".into(), Client::new(&cluster, None), Rules::default(), None);
        *locked(&region.last_resources) = Some((Instant::now(), std::sync::Arc::new(resources)));
        region
    }

    fn refused(text: &str) -> pve::Error {
        let cause = pve::Cause::Task { upid: "UPID:pve1".into(), exit: text.into() };
        pve::Error { call: "POST /x".into(), cause }
    }

    fn lost() -> pve::Error {
        pve::Error { call: "POST /x".into(), cause: pve::Cause::NoAnswer("connection closed".into()) }
    }

    #[test]
    fn a_later_writes_refusal_says_nothing_of_the_one_before() {
        let (region, handle) = (region_with(Resources::default()), "r//san/vm-9999-a".parse().unwrap());
        region.doubt(&handle, 101, "d");
        region.note_outcome(&handle, 101, Some(&lost()));
        region.doubt(&handle, 101, "d");
        region.note_outcome(&handle, 101, Some(&refused("checksum mismatch")));
        assert!(region.is_unlooked(&handle, 101), "the first one");
        // What is there now came by it: there is no other.
        region.note_there(&handle, 101);
        region.note_looked_after(&handle, 101);
        assert!(region.doubted_vms(&handle).is_empty());
        assert!(region.was_found_alone(&handle, 101));
    }

    #[test]
    fn what_comes_after_a_detachment_was_looked_after_by_nobody() {
        let (region, handle) = (region_with(Resources::default()), "r//san/vm-9999-a".parse().unwrap());
        region.doubt(&handle, 101, "d");
        region.note_outcome(&handle, 101, Some(&lost()));
        region.doubt(&handle, 101, "d");
        region.note_outcome(&handle, 101, None);
        region.note_there(&handle, 101);
        region.note_looked_after(&handle, 101);
        assert!(!region.is_unlooked(&handle, 101));
        assert_eq!(region.doubted_vms(&handle), BTreeSet::from([101]), "one of the two may yet come");
        region.note_out(&handle, 101);
        assert!(region.is_unlooked(&handle, 101) && !region.was_found_alone(&handle, 101));
    }

    /// Its text may be the old one again: what was attached is detached, a lock is gone.
    #[test]
    fn another_digest_settles_only_what_cannot_be_begun_any_more() {
        let since = ago(Duration::from_secs(1000));
        let doubt = Doubt { zone: String::new(), vmid: 101, digest: "d".into(), since, is_over: false, is_looked_after: false };
        let may_come = |digest, after| doubt.may_come(digest, since + Duration::from_secs(after)).is_some();
        assert!(may_come("other", 44) && !may_come("other", 46));
        assert!(may_come("d", 119) && !may_come("d", 121));
        assert!(Doubt { is_over: true, ..doubt.clone() }.may_come("d", since).is_none());
    }

    #[test]
    fn namesakes_on_two_nodes_have_doubts_and_sizes_of_their_own() {
        let storage = |host: &str| api::Storage { storage: "ds".into(), host: host.into(), ..api::Storage::default() };
        let region = region_with(Resources { storages: vec![storage("pve1"), storage("pve2")], ..Resources::default() });
        let [one, other]: [VolumeHandle; 2] = ["r/pve1/ds/vm-9999-a", "r/pve2/ds/vm-9999-a"].map(|id| id.parse().unwrap());
        region.doubt(&one, 101, "d");
        region.doubt(&other, 201, "e");
        region.note_outcome(&other, 201, None);
        region.note_looked_after(&other, 201);
        assert_eq!((region.doubted_vms(&one), region.doubted_vms(&other)), (BTreeSet::from([101]), BTreeSet::new()));
        region.keep_size(&one, 1);
        region.keep_size(&other, 2);
        assert_eq!((region.noted_size(&one), region.noted_size(&other)), (Some(1), Some(2)));
    }

    /// The host went away during an attach: what was sent may be in the VM's config, and nobody has looked.
    #[tokio::test]
    async fn a_lost_write_is_not_forgotten_before_its_vm_was_looked_at() {
        let region = region_with(Resources::default());
        let vm = Vm { vmid: 101, host: "pve1".into(), name: None, template: false };
        let resources = Resources { vms: BTreeMap::from([(101, vm)]), ..Resources::default() };
        region.put_resources(Instant::now() + Duration::from_secs(60), resources).await;
        let handle: VolumeHandle = "r/pve1/ds/vm-9999-a".parse().unwrap();
        region.doubt(&handle, 101, "d");
        locked(&region.doubts).values_mut().flatten().for_each(|one| one.since = ago(DOUBT_AGE + Duration::from_secs(1)));
        assert_eq!(region.check_no_doubt(&handle, None).await.unwrap_err().code, tonic::Code::Unavailable);
        assert_eq!(region.doubted_vms(&handle), BTreeSet::from([101]));
        assert!(region.is_unlooked(&handle, 101));
    }
}
