//! Writes whose outcome nobody has seen: our own, and those of a controller before us.
//!
//! Proxmox carries a config write out only onto the config of its digest, so a lost one is harmless as soon as that config
//! changed, or the VM was looked at after the last moment at which it could come.

use std::time::Duration;

use tokio::time::Instant;

use super::region::{Region, STATE_AGE, locked};
use crate::error::Error;
use crate::pve::api;

/// After this long, a write whose answer was lost is not carried out any more.
pub(super) const DOUBT_AGE: Duration = Duration::from_secs(120);
/// So long after our start a write of an earlier controller may still wait in Proxmox's proxy, which gives up after 30 s.
const EARLIER_WRITES: Duration = Duration::from_secs(45);
/// A change of an earlier controller is waited for that long: a hot-plug takes some seconds.
const EARLIER_WAIT: Duration = Duration::from_secs(10);
/// Between two looks at it.
const EARLIER_POLL: Duration = Duration::from_millis(500);

/// A write whose answer was lost: it may still be carried out, but only onto this very config.
#[derive(Debug, Clone)]
pub(super) struct Doubt {
    vmid: u32,
    digest: String,
    since: Instant,
}

impl Region {
    /// Notes a write of `volid` into a VM whose answer may be lost, and which is not verified yet.
    pub(crate) fn doubt(&self, volid: &str, vmid: u32, digest: &str) {
        let doubt = Doubt { vmid, digest: digest.into(), since: Instant::now() };
        locked(&self.doubts).insert(volid.into(), doubt);
    }

    /// Whether such a write can still be carried out, or was: Proxmox does it only onto the config of its digest. Time alone
    /// settles nothing: the VM is looked at again, after the last moment at which it could have come.
    ///
    /// # Errors
    /// It can, it was, or the VM cannot be looked at.
    pub(crate) async fn check_no_doubt(&self, volid: &str) -> Result<(), Error> {
        let Some(doubt) = locked(&self.doubts).get(volid).cloned() else { return Ok(()) };
        let host = self.resources(Instant::now()).await?.vms.get(&doubt.vmid).map(|vm| vm.host.clone());
        let Some(host) = host else {
            self.check_vm_gone(doubt.vmid).await?;
            self.settle(volid);
            return Ok(());
        };
        if self.off(&host).await?.is_some_and(|off| off.fenced) {
            // Its VM does not run any more, whatever its config says.
            self.settle(volid);
            return Ok(());
        }
        let may_come = doubt.since.elapsed() < DOUBT_AGE;
        let config = self.config(&host, doubt.vmid, Instant::now()).await?.config;
        if config.naming(volid).any(|(key, _)| !key.starts_with("unused")) {
            return Err(Error::unavailable(format!("volume {volid}: VM {} got it after all; repeated", doubt.vmid)));
        }
        if may_come && config.digest == doubt.digest {
            return Err(Error::unavailable(format!(
                "volume {volid}: the answer to its attachment to VM {} was lost, and Proxmox may still carry it out; decided within {} s",
                doubt.vmid,
                DOUBT_AGE.as_secs()
            )));
        }
        self.settle(volid);
        Ok(())
    }

    /// The VM of such a write.
    #[must_use]
    pub(crate) fn doubted_vm(&self, volid: &str) -> Option<u32> {
        locked(&self.doubts).get(volid).map(|doubt| doubt.vmid)
    }

    /// The outcome of such a write is known.
    pub(crate) fn settle(&self, volid: &str) {
        locked(&self.doubts).remove(volid);
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
    use std::collections::{BTreeMap, BTreeSet};

    use super::super::region::{Rules, ago};
    use super::*;
    use crate::config::{ClusterConfig, Credentials, Trust};
    use crate::pve::Client;
    use crate::pve::api::{Resources, Vm};
    use crate::secret::Secret;

    /// The host went away during an attach: what was sent may be in the VM's config, and nobody has looked.
    #[tokio::test]
    async fn a_lost_write_is_not_forgotten_before_its_vm_was_looked_at() {
        let credentials = Credentials::Token { id: "csi@pve!csi".into(), secret: Secret::new("x".into()) };
        let urls = vec!["http://127.0.0.1:1/api2/json".into()];
        let cluster = ClusterConfig { region: "r".into(), urls, trust: Trust::System, credentials, fenced: BTreeSet::new() };
        let region = Region::new("r".into(), Client::new(&cluster, None), Rules::default(), None);
        let vm = Vm { vmid: 101, host: "pve1".into(), name: None, template: false };
        let resources = Resources { vms: BTreeMap::from([(101, vm)]), ..Resources::default() };
        region.put_resources(Instant::now() + Duration::from_secs(60), resources).await;
        let long_ago = Doubt { vmid: 101, digest: "d".into(), since: ago(DOUBT_AGE + Duration::from_secs(1)) };
        locked(&region.doubts).insert("ds:vm-9999-a".into(), long_ago);
        assert_eq!(region.check_no_doubt("ds:vm-9999-a").await.unwrap_err().code, tonic::Code::Unavailable);
        assert_eq!(region.doubted_vm("ds:vm-9999-a"), Some(101));
    }
}
