//! One cluster: endpoint, token, version, privileges, quorum, storages, owner, and every VM.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;
use tokio::time::Instant;

use super::Report;
use super::privileges::{self, Held};
use crate::error::Error;
use crate::pve::Meaning;
use crate::pve::api::{self, Resources, Storage};
use crate::run::Controller;
use crate::run::holders::Look;
use crate::run::region::Region;

/// As in the alert rules.
const FULL_PERCENT: u64 = 90;
const NEARLY_FULL_PERCENT: u64 = 80;

/// A cluster that answers.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) region: Arc<Region>,
    /// `vm-9999-`: how our disks' names begin.
    pub(super) owner: String,
    pub(super) resources: Arc<Resources>,
    pub(super) looks: BTreeMap<u32, Look>,
    /// A VM could not be read: what was not found may be there.
    pub(super) is_part: bool,
}

/// Nothing where it does not answer.
pub(super) async fn check(report: &mut Report, controller: &Controller, region: &Arc<Region>) -> Option<Found> {
    let about = |what: &str| format!("region {}: {what}", region.name);
    let request = api::version();
    let call = request.name();
    match region.client().call(request).await.and_then(|data| api::read_version(&call, &data)) {
        Ok(version) => {
            report.ok(&about("endpoint and token"), format!("{} answers and takes the credentials", region.client().url_in_use()));
            match crate::run::greeting(&region.name, &version) {
                Ok(known) => report.ok(&about("version"), known),
                Err(untested) => report.note(&about("version"), untested),
            }
        }
        Err(error) => {
            let what = if error.meaning() == Meaning::Unauthenticated { "token" } else { "endpoint" };
            let more = if error.meaning() == Meaning::Unreachable {
                "; looked for from here: a firewall or NetworkPolicy must let this through, and DNS must know the name"
            } else {
                ""
            };
            report.wrong(&about(what), Error::from(error).text + more);
            return None;
        }
    }
    let request = api::permissions();
    match region.client().call(request).await {
        Ok(permissions) => privileges(report, &about("privileges"), &permissions),
        Err(error) => report.wrong(&about("privileges"), Error::from(error).text),
    }
    let resources = match region.resources(Instant::now()).await {
        Ok(resources) => resources,
        Err(error) => {
            report.wrong(&about("cluster"), Error::from(error).text);
            return None;
        }
    };
    hosts(report, &about, region, &resources).await;
    storages(report, &about, &resources);
    let owner = controller.clusters().map(|clusters| clusters.features.controller_vmid).unwrap_or_default();
    owner_is_free(report, &about("controllerVmID"), region, &resources, owner).await;
    let (looks, unread) = region.look_at_all(&resources).await;
    for sentence in &unread {
        report.wrong(&about("VMs"), sentence.as_str());
    }
    if resources.vms.is_empty() {
        report.wrong(&about("VMs"), "no VM is shown to us: give the token's role VM.Audit on /vms, with propagation");
    } else if unread.is_empty() {
        report.ok(&about("VMs"), format!("{} were read", looks.len()));
    }
    Some(Found { region: Arc::clone(region), owner: format!("vm-{owner}-"), resources, looks, is_part: !unread.is_empty() })
}

fn privileges(report: &mut Report, about: &str, permissions: &Value) {
    if !privileges::has_any(permissions) {
        report.wrong(
            about,
            "the token may do nothing that is needed; with privilege separation a token needs its own ACL, whatever its user may do: \
             pveum acl modify / --tokens 'USER@REALM!NAME' --roles ROLE, or pveum user token modify USER@REALM NAME --privsep 0; look with: \
             pveum user permissions 'USER@REALM!NAME'",
        );
        return;
    }
    for needed in privileges::table() {
        let (privilege, path, what_for) = (needed.privilege, needed.path, needed.what_for);
        let give = format!("give the token's role {privilege} on {path}, with propagation (pveum acl list shows who has what where)");
        let said = match privileges::held(permissions, &needed) {
            Held::Yes => {
                report.ok(about, format!("{privilege} on {path}: {what_for}"));
                continue;
            }
            Held::No => format!("{privilege} on {path} is missing, which is for {what_for}; {give}"),
            Held::NotBelow => format!("{privilege} is held on {path} alone, and not below it, which is for {what_for}; {give}"),
            Held::OnlyOn(paths) => {
                let said = format!("{privilege} is held on {} only, which is for {what_for}; for others {give}", paths.join(", "));
                // Storages one by one are somebody's choice; VMs one by one would hide the holder of a volume.
                if path == "/storage" {
                    report.note(about, said);
                    continue;
                }
                said
            }
            Held::ButNotOn(paths) => {
                format!("{privilege} is held on {path}, but not on {}: another role there replaces it; {give}", paths.join(", "))
            }
        };
        if needed.feature == "always" { report.wrong(about, said) } else { report.note(about, format!("{}: {said}", needed.feature)) }
    }
}

async fn hosts(report: &mut Report, about: &dyn Fn(&str) -> String, region: &Arc<Region>, resources: &Resources) {
    match region.is_quorate(Instant::now()).await {
        Ok(true) => report.ok(&about("quorum"), format!("the cluster is quorate, with {} nodes", resources.hosts.len())),
        Ok(false) => report.wrong(
            &about("quorum"),
            "the cluster has no quorum (or, without Sys.Audit on /, half of its nodes are off): Proxmox changes nothing then; see: pvecm status",
        ),
        Err(error) => report.wrong(&about("quorum"), error.text),
    }
    for (host, status) in resources.hosts.iter().filter(|(_, status)| *status != "online") {
        report.wrong(
            &about("nodes"),
            format!(
                "Proxmox node {host} is {status}; bring it back, or, if it is off for certain and its volumes are needed elsewhere, write \
                 fencedNodes: [{host}]"
            ),
        );
    }
}

fn storages(report: &mut Report, about: &dyn Fn(&str) -> String, resources: &Resources) {
    let is_up = |one: &&Storage| resources.hosts.get(&one.host).is_none_or(|status| status == "online");
    let mut any = false;
    for one in resources.storages.iter().filter(|one| one.images).filter(is_up) {
        any = true;
        let name = format!("{} on {}", one.storage, one.host);
        let used = one.used_bytes.saturating_mul(100).checked_div(one.total_bytes);
        let gib = |bytes: u64| bytes >> 30;
        let room = format!("{} of {} GiB used", gib(one.used_bytes), gib(one.total_bytes));
        match used {
            _ if !one.active => report.wrong(
                &about("storages"),
                format!("storage {name} is not active: the storage should be active on this node and is not; see: pvesm status"),
            ),
            Some(used) if used >= FULL_PERCENT => {
                report.wrong(&about("storages"), format!("{name} is full to {used} %, {room}: delete, move or add room"));
            }
            Some(used) if used >= NEARLY_FULL_PERCENT => report.note(&about("storages"), format!("{name} is full to {used} %, {room}")),
            Some(_) => report.ok(&about("storages"), format!("{name}: {}, {room}", one.plugin)),
            None => report.note(&about("storages"), format!("{name}: Proxmox says no size of it")),
        }
    }
    if !any {
        report.wrong(
            &about("storages"),
            "no storage for disks of VMs is shown to us: give the token's role Datastore.Audit on /storage, or let one take them: pvesm set \
             STORAGE --content images",
        );
    }
}

async fn owner_is_free(report: &mut Report, about: &str, region: &Arc<Region>, resources: &Resources, owner: u32) {
    let taken = |by: String| {
        format!(
            "{owner} is the number of {by}: our disks would look like its own, and go when it is destroyed; choose a free one under \
             features: controllerVmID, before the first volume is made"
        )
    };
    if let Some(vm) = resources.vms.get(&owner) {
        return report.wrong(about, taken(format!("VM {} on {}", vm.name.as_deref().unwrap_or("without a name"), vm.host)));
    }
    if let Some(host) = resources.containers.get(&owner) {
        return report.wrong(about, taken(format!("a container on {host}")));
    }
    match region.client().call(api::next_id(owner)).await {
        Ok(_) => report.ok(about, format!("{owner} is no VM's")),
        Err(error) if error.meaning() == Meaning::VmidTaken => report.wrong(about, taken("a VM that is not shown to us".into())),
        Err(error) => report.wrong(about, Error::from(error).text),
    }
}
