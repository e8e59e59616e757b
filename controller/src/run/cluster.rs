//! What a cluster says of itself: which VM a node id names, whether everything is shown to us, who is quorate, who is off.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Controller;
use super::region::{EVIDENCE_AGE, Region, STATE_AGE, ago, locked};
use super::when;
use crate::error::Error;
use crate::pve::Meaning;
use crate::pve::api::{self, Resources, Vm};
use crate::request::NodeId;

/// A lost privilege makes lists shorter and nothing else: as old as the lists may be, no older.
const PERMISSIONS_AGE: Duration = EVIDENCE_AGE;

/// "Now" for all VMs of a node, which are asked about one after the other: once per call, not once per VM. A node that comes
/// back starts none of them within that time.
const NOW_AGE: Duration = Duration::from_secs(1);

/// What other clusters have of a name is asked to say more; a call of this cluster waits no longer for it.
const ELSEWHERE_LIMIT: Duration = Duration::from_secs(3);

/// A Proxmox node that is off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Off {
    /// When that was first seen.
    pub(crate) since: SystemTime,
    /// The operator says so, too: what its VMs held counts as let go.
    pub(crate) fenced: bool,
}

impl std::fmt::Display for Off {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "off since {} or longer", when::utc(self.since))
    }
}

impl Controller {
    /// Whether the VM is the Kubernetes node that is meant: a number alone may be another VM's, of a clone of the node's
    /// template, or in another cluster. Node and VM may have different names; a VM of exactly that name elsewhere is proof. Where the
    /// number came from a Node object that names no region, and there are several, only the name tells. An exact name of another
    /// region's node is no proof of being it either.
    ///
    /// # Errors
    /// It is another one, by name; or that cannot be told.
    pub(super) async fn check_is_node(&self, region: &Region, node: &NodeId, vm: &Vm, is_by_bare_number: bool) -> Result<(), Error> {
        let are_several = self.clusters()?.regions.len() > 1;
        let name = match node {
            NodeId::Vmid(name, _) => name,
            NodeId::Name(name) if is_by_bare_number => name,
            NodeId::Name(_) if are_several && !region.rules().capmox => {
                return match region.region_of_machine(node).await? {
                    Some(other) => Err(region.is_elsewhere(node, &other)),
                    None => Ok(()),
                };
            }
            NodeId::Name(_) => return Ok(()),
        };
        let is_named = vm.name.as_deref().map_or_else(|| region.was_named(vm.vmid, name), |shown| is_name_of(shown, name));
        if is_named {
            return Ok(());
        }
        let Some(shown) = vm.name.as_deref() else {
            if !is_by_bare_number || !are_several {
                return Ok(());
            }
            return Err(Error::unavailable(format!(
                "node {node}: its Node object names VM {} without a region, and that VM of region {} shows no name now (its Proxmox node is \
                 silent, or it is new); repeated",
                vm.vmid, region.name
            )));
        };
        if let Some(other) = region.vm_named(name).await {
            return Err(Error::precondition(format!(
                "node {node}: VM {} is named {shown:?}, and VM {} on {} is named {name:?}; the node carries another VM's number: set the \
                 VMID in its provider ID or SMBIOS serial right",
                vm.vmid, other.vmid, other.host
            )));
        }
        self.check_not_elsewhere(region, node).await?;
        // A cluster that is silent and was never read says nothing: its Node object may.
        if are_several && let Some(other) = region.region_of_machine(node).await? {
            return Err(region.is_elsewhere(node, &other));
        }
        if is_by_bare_number && are_several {
            return Err(Error::precondition(format!(
                "node {node}: its Node object names VM {} without a region, and that VM of region {} is named {shown:?}: it may be another \
                 region's node; give the Node the provider ID proxmox://REGION/{}",
                vm.vmid, region.name, vm.vmid
            )));
        }
        Ok(())
    }

    /// Whether a VM of the node's name is in another region: then node and volume do not belong together.
    ///
    /// # Errors
    /// It is, by region.
    pub(super) async fn check_not_elsewhere(&self, region: &Region, node: &NodeId) -> Result<(), Error> {
        let (NodeId::Vmid(name, _) | NodeId::Name(name)) = node;
        let mut looking = JoinSet::new();
        for (other, elsewhere) in self.clusters()?.regions.iter().filter(|(other, _)| **other != region.name) {
            let (other, elsewhere, name) = (other.clone(), Arc::clone(elsewhere), name.clone());
            looking.spawn(proto::log::carried(async move {
                // A cluster that hangs keeps nobody of another one waiting.
                let found = tokio::time::timeout(ELSEWHERE_LIMIT, elsewhere.vm_named(&name)).await;
                found.unwrap_or_else(|_| elsewhere.vm_last_named(&name)).map(|vm| (other, vm))
            }));
        }
        let found: BTreeMap<_, _> = looking.join_all().await.into_iter().flatten().collect();
        let Some((other, vm)) = found.into_iter().next() else { return Ok(()) };
        Err(Error::precondition(format!(
            "node {node} is VM {} on {} of region {other}, the volume is in region {}: a volume cannot leave its Proxmox cluster; give the PV \
             its nodeAffinity, or the pod a node of region {}",
            vm.vmid, vm.host, region.name, region.name
        )))
    }
}

/// As DNS compares names; a VM may carry the domain, too.
pub(crate) fn is_name_of(vm: &str, node: &str) -> bool {
    let first = |name: &str| name.split('.').next().unwrap_or_default().to_ascii_lowercase();
    vm.eq_ignore_ascii_case(node) || (first(vm) == first(node) && vm.contains('.') != node.contains('.'))
}

fn named_in(resources: &Resources, name: &str) -> Option<Vm> {
    let is_named = |vm: &&Vm| !vm.template && vm.name.as_deref().is_some_and(|shown| is_name_of(shown, name));
    resources.vms.values().find(is_named).cloned()
}

impl Region {
    /// The VM that a node id names; nothing: there is none in what is shown to us.
    ///
    /// # Errors
    /// Proxmox's; or several VMs have that name.
    pub(crate) async fn find_vm(&self, node: &NodeId) -> Result<Option<Vm>, Error> {
        for since in [ago(EVIDENCE_AGE), Instant::now()] {
            let resources = self.resources(since).await?;
            let mut found = resources.vms.values().filter(|vm| match node {
                NodeId::Vmid(_, vmid) => vm.vmid == *vmid,
                NodeId::Name(name) => !vm.template && vm.name.as_deref() == Some(name),
            });
            match (found.next(), found.next()) {
                (Some(one), None) => return Ok(Some(one.clone())),
                (Some(one), Some(other)) => {
                    return Err(Error::precondition(format!(
                        "node {node}: VMs {} and {} of region {} both have this name; node ids should carry the VMID (NAME/VMID)",
                        one.vmid, other.vmid, self.name
                    )));
                }
                (None, _) => (),
            }
        }
        let resources = self.resources(ago(STATE_AGE)).await?;
        if let (NodeId::Name(_), Some(nameless)) = (node, resources.vms.values().find(|vm| vm.name.is_none())) {
            return Err(Error::unavailable(format!(
                "node {node}: no VM of that name, but VM {} on {} shows no name now (its node is silent, or it is new); repeated",
                nameless.vmid, nameless.host
            )));
        }
        Ok(None)
    }

    /// The VM of that name, in what was read lately; in what was read last, where the cluster does not answer.
    async fn vm_named(&self, name: &str) -> Option<Vm> {
        match self.resources(ago(EVIDENCE_AGE)).await {
            Ok(resources) => named_in(&resources, name),
            Err(_) => self.vm_last_named(name),
        }
    }

    /// The same in what was read last, however long ago.
    fn vm_last_named(&self, name: &str) -> Option<Vm> {
        let (_, resources) = locked(&self.last_resources).clone()?;
        named_in(&resources, name)
    }

    /// Whether every VM of the cluster is shown to us: without that, nobody can be said not to hold a volume.
    ///
    /// # Errors
    /// The privilege that is missing; or Proxmox's.
    pub(crate) async fn check_sees_all_vms(&self) -> Result<(), Error> {
        let read = async {
            if api::read_sees_all_vms(&self.client().call(api::permissions()).await?) {
                return Ok(());
            }
            Err(Error::precondition(format!(
                "region {}: not every VM is shown to us, so that the holder of a volume could be overlooked; give the token's role VM.Audit \
                 on /vms (or /) with propagation",
                self.name
            )))
        };
        self.sees_all_vms.since(ago(PERMISSIONS_AGE), read).await
    }

    /// "Not there" is true only if the cluster is quorate, answered, and shows everything.
    ///
    /// # Errors
    /// What is missing.
    pub(crate) async fn check_absence_counts(&self) -> Result<(), Error> {
        self.check_sees_all_vms().await?;
        if self.is_quorate(Instant::now()).await? {
            return Ok(());
        }
        Err(Error::unavailable(format!(
            "region {}: the cluster has no quorum, so that what is not shown may still be there; repeated until it has",
            self.name
        )))
    }

    /// A VM that is not listed is gone, not merely hidden from us (an ACL with NoAccess leaves no other trace).
    ///
    /// # Errors
    /// It is there, or absence does not count.
    pub(crate) async fn check_vm_gone(&self, vmid: u32) -> Result<(), Error> {
        self.check_absence_counts().await?;
        match self.client().call(api::next_id(vmid)).await {
            Ok(_) => Ok(()),
            Err(error) if error.meaning() == Meaning::VmidTaken => {
                let resources = self.resources(Instant::now()).await?;
                if resources.containers.contains_key(&vmid) {
                    // A container has the number now.
                    return Ok(());
                }
                if resources.vms.contains_key(&vmid) {
                    return Err(Error::unavailable(format!("VM {vmid} is there again; repeated")));
                }
                Err(Error::denied(format!(
                    "VM {vmid} is there and not shown to us; give the token's role VM.Audit on /vms/{vmid} (look for NoAccess or another role \
                     of that path: pveum acl list)"
                )))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// By Proxmox's word since `since`; without Sys.Audit, by more than half of its nodes being online.
    ///
    /// # Errors
    /// Proxmox's; without Sys.Audit and without that half, its name.
    pub(crate) async fn is_quorate(&self, since: Instant) -> Result<bool, Error> {
        self.quorate.since(since, self.read_quorate(since)).await
    }

    async fn read_quorate(&self, since: Instant) -> Result<bool, Error> {
        let request = api::cluster_status();
        let call = request.name();
        let quorate = match self.client().call(request).await.and_then(|data| api::read_quorate(&call, &data)) {
            // One that was part of a cluster and shows only itself has lost the others, not outlived them.
            Ok(quorate) => quorate && !self.has_lost_the_others(),
            Err(error) if error.meaning() == Meaning::Forbidden => {
                let resources = self.resources(since.min(ago(STATE_AGE))).await?;
                let online = resources.hosts.values().filter(|status| *status == "online").count();
                let hosts = resources.hosts.len().max(*locked(&self.most_hosts));
                // One that was part of a cluster and shows only itself has lost the others, not outlived them.
                let alone = resources.hosts.len() == 1 && hosts == 1;
                if !alone && online * 2 <= hosts {
                    return Err(Error::denied(format!(
                        "region {}: {online} of {hosts} Proxmox nodes are online, and we may not ask whether those have a quorum; give the \
                         token's role Sys.Audit on /",
                        self.name
                    )));
                }
                true
            }
            Err(error) => return Err(error.into()),
        };
        if !quorate {
            self.client().leave_isolated();
        }
        Ok(quorate)
    }

    /// Whether the cluster as last read is one node alone, and was more.
    fn has_lost_the_others(&self) -> bool {
        let hosts = locked(&self.last_resources).as_ref().map_or(0, |(_, resources)| resources.hosts.len());
        hosts == 1 && *locked(&self.most_hosts) > 1
    }

    /// Whether that VM had this name when it last showed one.
    #[must_use]
    pub(super) fn was_named(&self, vmid: u32, name: &str) -> bool {
        locked(&self.names).get(&vmid).is_some_and(|shown| is_name_of(shown, name))
    }

    /// Keeps since when nodes are off, and how VMs are named.
    pub(super) fn note_hosts(&self, resources: &Resources) {
        let mut names = locked(&self.names);
        names.retain(|vmid, _| resources.vms.contains_key(vmid));
        names.extend(resources.vms.values().filter_map(|vm| Some((vm.vmid, vm.name.clone()?))));
        drop(names);
        let mut most = locked(&self.most_hosts);
        *most = resources.hosts.len().max(*most);
        let mut offline = locked(&self.offline_since);
        for (host, status) in &resources.hosts {
            if status == "offline" {
                offline.entry(host.clone()).or_insert_with(SystemTime::now);
            } else {
                offline.remove(host);
            }
        }
    }

    /// Since when a node is off, by the cluster as read within the last minute; nothing where it is not. Read now where the
    /// operator says so, too: that lets volumes go.
    ///
    /// # Errors
    /// Proxmox's; or it is called offline by a cluster without quorum.
    pub(crate) async fn off(&self, host: &str) -> Result<Option<Off>, Error> {
        match self.off_since(host, ago(EVIDENCE_AGE), ago(STATE_AGE)).await? {
            Some(off) if off.fenced => self.off_now(host).await,
            off => Ok(off),
        }
    }

    /// The same by a reading of now: it may be back, and its VMs may run again.
    ///
    /// # Errors
    /// As `off`.
    pub(super) async fn off_now(&self, host: &str) -> Result<Option<Off>, Error> {
        self.off_since(host, ago(NOW_AGE), ago(NOW_AGE)).await
    }

    async fn off_since(&self, host: &str, since: Instant, quorate_since: Instant) -> Result<Option<Off>, Error> {
        let resources = self.resources(since).await?;
        if resources.hosts.get(host).is_none_or(|status| status != "offline") {
            return Ok(None);
        }
        if !self.is_quorate(quorate_since).await? {
            return Err(Error::unavailable(format!("Proxmox node {host} is offline and the cluster has no quorum")));
        }
        let since = locked(&self.offline_since).get(host).copied().unwrap_or_else(SystemTime::now);
        Ok(Some(Off { since, fenced: self.rules().fenced.contains(host) }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::region::Rules;
    use super::*;
    use crate::config::{ClusterConfig, Credentials, Trust};
    use crate::pve::Client;
    use crate::secret::Secret;

    /// It hangs or refuses now: what it showed last keeps a detach by number from another cluster's VM.
    #[tokio::test]
    async fn a_cluster_that_does_not_answer_is_known_by_its_last_reading() {
        let credentials = Credentials::Token { id: "csi@pve!csi".into(), secret: Secret::new("x".into()) };
        let urls = vec!["http://127.0.0.1:1/api2/json".into()];
        let cluster = ClusterConfig { region: "r".into(), urls, trust: Trust::System, credentials, fenced: Default::default() };
        let region = Region::new("r".into(), Client::new(&cluster, None), Rules::default(), None);
        assert!(region.vm_named("worker-1").await.is_none());
        let vm = Vm { vmid: 101, host: "pve1".into(), name: Some("worker-1.lan".into()), template: false };
        let resources = Resources { vms: BTreeMap::from([(101, vm)]), ..Resources::default() };
        *locked(&region.last_resources) = Some((ago(EVIDENCE_AGE * 60), Arc::new(resources)));
        assert_eq!(region.vm_named("worker-1").await.map(|vm| vm.vmid), Some(101));
        assert!(region.vm_named("worker-2").await.is_none());
    }

    #[test]
    fn names_are_compared_as_dns_does() {
        for (vm, node, same) in [
            ("worker-1", "worker-1", true),
            ("Worker-1", "worker-1", true),
            ("worker-1.lan", "worker-1", true),
            ("worker-1", "worker-1.lan", true),
            ("worker-1.a", "worker-1.b", false),
            ("worker-1", "worker-10", false),
            ("worker-1", "worker-2", false),
        ] {
            assert_eq!(is_name_of(vm, node), same, "{vm} {node}");
        }
    }
}
