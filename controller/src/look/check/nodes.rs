//! Kubernetes' nodes and Proxmox' VMs: which is which, and whether the VM takes a disk.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::Value;

use super::Report;
use super::proxmox::Found;
use crate::attach::{Refusal, Seen, Wanted, next_attach, unexplained};
use crate::kube::{CsiNode, Kube, text};
use crate::pve::drive::volume_of;
use crate::request::{NodeId, node_id};
use crate::run::cluster::is_name_of;
use crate::run::holders::Look;
use crate::run::seen::is_of;
use crate::run::words;

/// No disk is called so.
const NO_VOLUME: &str = "none:check";

/// Without Kubernetes: VMs that hold a volume of ours must be right; of others it is not known whether they are nodes.
pub(super) fn check_without(report: &mut Report, found: &[Found]) {
    for region in found {
        for look in region.looks.values().filter(|look| look.state.running) {
            let is_ours =
                look.known.config.lines.values().filter_map(|line| line.value.as_deref()).any(|line| is_of(volume_of(line), &region.owner));
            vm(report, region, look, is_ours);
        }
    }
}

pub(super) async fn check(report: &mut Report, kube: &Arc<Kube>, found: &[Found]) {
    let (nodes, agents) = match (kube.objects("/api/v1/nodes").await, kube.nodes().await) {
        (Ok(nodes), Ok(agents)) => (nodes, agents),
        (Err(why), _) | (_, Err(why)) => return report.wrong("Kubernetes nodes", why),
    };
    let agents: BTreeMap<&str, &str> = agents.iter().map(|agent| (agent.name.as_str(), agent.node_id.as_str())).collect();
    for node in &nodes {
        let Some(name) = text(node, "/metadata/name") else { continue };
        let about = format!("node {name}");
        let Some(id) = agents.get(name.as_str()) else {
            report.wrong(
                &about,
                format!(
                    "its node agent has not registered with kubelet, so that no volume is mounted there; see: kubectl -n {} get pods -o wide \
                     -l app.kubernetes.io/component=node, and its log",
                    kube.namespace()
                ),
            );
            continue;
        };
        match vm_of(node, &name, id, found).await {
            Ok((region, look)) => {
                report.ok(&about, format!("node id {id} is VM {} on {} of region {}", look.vm.vmid, look.vm.host, region.region.name));
                identity(report, &about, node, &name, region, look);
                vm(report, region, look, true);
            }
            Err(why) => report.wrong(&about, hidden(id, found).await.unwrap_or(why)),
        }
    }
}

/// Whether the VM that the id names is there, and not shown to us.
async fn hidden(id: &str, found: &[Found]) -> Option<String> {
    let Ok(NodeId::Vmid(_, vmid)) = node_id(id) else { return None };
    for one in found {
        if one.looks.contains_key(&vmid) {
            return None;
        }
        if let Err(error) = one.region.check_vm_gone(vmid).await {
            return Some(error.text);
        }
    }
    None
}

fn label(node: &Value, key: &str) -> Option<String> {
    node.pointer("/metadata/labels")?.get(key)?.as_str().map(String::from)
}

/// The VM that the node's id names, in the region that the node says that it is in.
async fn vm_of<'a>(node: &Value, name: &str, id: &str, found: &'a [Found]) -> Result<(&'a Found, &'a Look), String> {
    let region = label(node, proto::TOPOLOGY_REGION);
    let of_region = |one: &&Found| region.as_ref().is_none_or(|region| *region == one.region.name);
    if let Some(region) = &region
        && !found.iter().any(|one| one.region.name == *region)
    {
        return Err(format!("its region {region:?} (label {}) is not in the config file, or does not answer", proto::TOPOLOGY_REGION));
    }
    let meant: Vec<&Found> = found.iter().filter(of_region).collect();
    let node = CsiNode { name: name.into(), node_id: id.into() };
    let mut vms = Vec::new();
    for one in &meant {
        match one.region.vm_of_node(&node, meant.len() == 1).await {
            Ok(vm) => vms.extend(vm.and_then(|vm| Some((*one, one.looks.get(&vm.vmid)?)))),
            Err(error) => return Err(error.text),
        }
    }
    match vms.as_slice() {
        [one] => Ok(*one),
        [] if found.is_empty() => Err("no Proxmox cluster answers, so that its VM cannot be looked for".into()),
        [] => Err(format!(
            "no VM has the node id {id}: a VM's name must be the node's, or the node must know its VMID (SMBIOS serial i=VMID, --vmid, or its \
             provider ID); without VM.Audit on /vms it is not shown to us"
        )),
        _ => Err(format!(
            "several VMs have the node id {id}; node ids should carry the VMID (NAME/VMID), and nodes the label of their region"
        )),
    }
}

/// Whether all that says which VM the node is says the same.
fn identity(report: &mut Report, about: &str, node: &Value, name: &str, region: &Found, look: &Look) {
    let vmid = look.vm.vmid;
    let uuid_of = |look: &Look| {
        let smbios = look.known.config.configured("smbios1")?;
        smbios.split(',').find_map(|part| part.strip_prefix("uuid=")).map(str::to_ascii_lowercase)
    };
    let seen = text(node, "/status/nodeInfo/systemUUID").map(|uuid| uuid.to_ascii_lowercase());
    if let (Some(seen), Some(own)) = (&seen, uuid_of(look)) {
        if *seen == own {
            report.ok(about, format!("SMBIOS UUID {seen} is VM {vmid}'s"));
        } else {
            let other = region.looks.values().find(|look| uuid_of(look).as_ref() == Some(seen));
            let whose = other.map_or_else(|| "no VM's that is shown to us".into(), |look| format!("VM {}'s", look.vm.vmid));
            report.wrong(
                about,
                format!(
                    "the node's SMBIOS UUID {seen} is {whose}, and VM {vmid} has {own}: volumes would go to the wrong VM; set the VMID in its \
                     provider ID or SMBIOS serial right"
                ),
            );
        }
    }
    if let Some(id) = text(node, "/spec/providerID").filter(|id| id.starts_with("proxmox://")) {
        let says = id.rsplit('/').next().and_then(|last| last.parse::<u32>().ok());
        if says.is_some_and(|says| says != vmid) {
            report.wrong(about, format!("its provider ID {id} names another VM than its node id, VM {vmid}; one of them is wrong"));
        }
    }
    if let Some(shown) = look.vm.name.as_deref().filter(|shown| !is_name_of(shown, name)) {
        report.note(about, format!("its VM {vmid} is named {shown:?}"));
    }
    if let Some(zone) = label(node, proto::TOPOLOGY_ZONE).filter(|zone| *zone != look.vm.host) {
        report.wrong(
            about,
            format!(
                "its zone (label {}) is {zone}, and VM {vmid} is on {}: it was migrated, and volumes of {zone} that are not on shared storage \
                 cannot follow; migrate it back, or label the node anew",
                proto::TOPOLOGY_ZONE,
                look.vm.host
            ),
        );
    }
}

/// Whether it takes a disk. `is_node`: it must.
fn vm(report: &mut Report, region: &Found, look: &Look, is_node: bool) {
    let (vmid, config) = (look.vm.vmid, &look.known.config);
    let about = format!("VM {vmid} of region {}", region.region.name);
    let mut bad = |said: String| if is_node { report.wrong(&about, said) } else { report.note(&about, said + " (if it is a node)") };
    let seen = Seen { config, running: look.state.running, plugged: look.state.plugged.as_ref() };
    // Each for itself: one that is mended should not show the next.
    let hotplug = config.configured("hotplug").filter(|value| *value != "1" && !value.split(',').any(|one| one.trim() == "disk"));
    let scsihw = config.configured("scsihw").unwrap_or("lsi");
    let mut refusals = Vec::new();
    refusals.extend(hotplug.map(|value| Refusal::NoHotplug(value.into())));
    refusals.extend(Some(scsihw).filter(|one| !one.starts_with("virtio-scsi")).map(|one| Refusal::ScsiHw(one.into())));
    let allow_protected = region.region.rules().attach_to_protected;
    let (avoid, volid) = (BTreeSet::new(), NO_VOLUME);
    match next_attach(Wanted { volid, readonly: false, avoid: &avoid, allow_protected }, seen) {
        Err(refusal) if !refusals.contains(&refusal) => refusals.push(refusal),
        _ => (),
    }
    if config.is_on("protection") && !allow_protected && !refusals.contains(&Refusal::Protected) {
        refusals.push(Refusal::Protected);
    }
    let is_able = refusals.is_empty();
    refusals.iter().for_each(|refusal| bad(words(refusal, vmid).text));
    for key in unexplained(seen).filter(|key| !look.known.held.contains_key(*key)) {
        bad(format!("QEMU has a drive as {key} of which the config says nothing, so it could be any volume; restart VM {vmid}"));
    }
    for (key, line) in config.lines.iter().filter(|(key, _)| key.starts_with("scsi") && *key != "scsihw") {
        let names = |line: &Option<String>| line.as_deref().is_some_and(|line| is_of(volume_of(line), &region.owner));
        if (line.pending.is_some() || line.delete) && (names(&line.value) || names(&line.pending)) {
            bad(format!("a change of {key} is planned and was not carried out; if nothing works on it now: qm set {vmid} --revert {key}"));
        }
    }
    if let Some(lock) = config.configured("lock") {
        report.note(&about, format!("it is locked ({lock}): attaches and detaches wait; if no such task runs: qm unlock {vmid}"));
    }
    if is_able && is_node {
        let is_free = |lun: &u8| {
            let key = format!("scsi{lun}");
            !config.lines.contains_key(&key) && !look.state.plugged.as_ref().is_some_and(|plugged| plugged.contains(&key))
        };
        let free = proto::LUN_RANGE.filter(is_free).count();
        report.ok(&about, format!("takes disks: scsihw {scsihw}, hot-plug, {free} of 29 slots free"));
    }
}
