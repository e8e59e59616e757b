//! What waits in Kubernetes, and why: the Lease, classes, claims, volumes, attachments, and what was said of them last.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use proto::VolumeHandle;
use serde_json::Value;
use tokio::time::Instant;

use super::Report;
use super::proxmox::Found;
use crate::kube::{Kube, text};
use crate::pve::drive::volume_of;
use crate::run::evidence::Depth;
use crate::run::seen::is_of;
use crate::run::when;

/// The driver's Lease is renewed every few seconds; after this long nobody acts.
const LEASE_AGE: Duration = Duration::from_secs(60);
/// kubelet says again every two minutes at most what goes on failing.
const EVENT_AGE: Duration = Duration::from_secs(300);
/// Waiting objects that are told one by one.
const MAX_TOLD: usize = 50;

const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces";
/// What kubelet says of volumes that do not come up.
const OF_KUBELET: [&str; 4] = ["FailedMount", "FailedAttachVolume", "FailedMapVolume", "VolumeResizeFailed"];

/// Kubernetes' word on a claim: which driver is to provision it; the second is the older one.
const PROVISIONER: [&str; 2] = [
    "/metadata/annotations/volume.kubernetes.io~1storage-provisioner",
    "/metadata/annotations/volume.beta.kubernetes.io~1storage-provisioner",
];

/// All that is looked at, read once.
struct Objects {
    classes: Vec<Value>,
    claims: Vec<Value>,
    volumes: Vec<Value>,
    attachments: Vec<Value>,
    events: Vec<Value>,
}

pub(super) async fn check(report: &mut Report, kube: &Arc<Kube>, found: &[Found]) {
    lease(report, kube).await;
    rivals(report, kube).await;
    let mut lists = Vec::new();
    for path in [
        "/apis/storage.k8s.io/v1/storageclasses",
        "/api/v1/persistentvolumeclaims",
        "/api/v1/persistentvolumes",
        "/apis/storage.k8s.io/v1/volumeattachments",
        "/api/v1/events",
    ] {
        match kube.objects(path).await {
            Ok(list) => lists.push(list),
            Err(why) => {
                report.wrong("Kubernetes", why);
                lists.push(Vec::new());
            }
        }
    }
    let mut lists = lists.into_iter();
    let mut next = || lists.next().unwrap_or_default();
    let all = Objects { classes: next(), claims: next(), volumes: next(), attachments: next(), events: next() };
    classes(report, &all, found);
    claims(report, &all, found).await;
    attachments(report, &all, found);
    drives(report, &all, found);
    mounts(report, &all);
}

fn is_ours(object: &Value, pointer: &str) -> bool {
    text(object, pointer).as_deref() == Some(proto::DRIVER_NAME)
}

fn name(object: &Value) -> String {
    text(object, "/metadata/name").unwrap_or_default()
}

/// `2026-11-21T16:33:07`, which sorts as time does.
fn moment(ago: Duration) -> String {
    let at = when::rfc3339(SystemTime::now().checked_sub(ago).unwrap_or(SystemTime::UNIX_EPOCH));
    at.get(..19).unwrap_or_default().to_owned()
}

async fn lease(report: &mut Report, kube: &Arc<Kube>) {
    let about = "controller";
    let look = format!("see: kubectl -n {} get pods -o wide -l app.kubernetes.io/component=controller, and its log", kube.namespace());
    match kube.object(format!("{LEASES}/{}/leases/{}", kube.namespace(), proto::DRIVER_NAME)).await {
        Err(why) => report.wrong(about, why),
        Ok(None) => {
            report.wrong(about, format!("none has ever acted in namespace {}: the plugin is not running; {look}", kube.namespace()))
        }
        Ok(Some(lease)) => {
            let holder = text(&lease, "/spec/holderIdentity");
            let renewed = text(&lease, "/spec/renewTime").unwrap_or_default();
            match holder {
                Some(holder) if renewed >= moment(LEASE_AGE) => report.ok(about, format!("{holder} acts")),
                _ => report.wrong(about, format!("none acts since {renewed}: the plugin is not running; {look}")),
            }
        }
    }
}

/// Another driver of this name, in another namespace: its attacher renews a Lease there.
async fn rivals(report: &mut Report, kube: &Arc<Kube>) {
    match kube.rivals().await {
        Err(why) => report.note("controller", format!("whether another workload serves {} cannot be told: {why}", proto::DRIVER_NAME)),
        Ok(others) => others.iter().for_each(|(namespace, pod)| {
            report.wrong(
                "controller",
                format!(
                    "another workload serves {}: pod {pod} in namespace {namespace}, within the last ten minutes; two drivers would give one \
                     volume to two VMs, so ours does not start: scale the other's controller to 0 first (kubectl -n {namespace} get \
                     deployments)",
                    proto::DRIVER_NAME
                ),
            );
        }),
    }
}

fn classes(report: &mut Report, all: &Objects, found: &[Found]) {
    for class in all.classes.iter().filter(|class| is_ours(class, "/provisioner")) {
        let about = format!("StorageClass {}", name(class));
        let Some(storage) = text(class, "/parameters/storage") else {
            report.wrong(&about, "parameter storage is missing; it is the id of a Proxmox storage, e.g. local-lvm");
            continue;
        };
        let shown = || found.iter().flat_map(|one| one.resources.storages.iter());
        if found.is_empty() || shown().any(|one| one.storage == storage && one.images) {
            report.ok(&about, format!("storage {storage}"));
        } else if shown().any(|one| one.storage == storage) {
            report.wrong(&about, format!("storage {storage} does not take VM disks: pvesm set {storage} --content images"));
        } else {
            let mut known: Vec<&str> = shown().filter(|one| one.images).map(|one| one.storage.as_str()).collect();
            known.sort_unstable();
            known.dedup();
            report.wrong(
                &about,
                format!(
                    "no storage {storage:?} is shown to us, but {}; mind upper and lower case, or give the token's role Datastore.Audit on \
                     /storage/{storage}",
                    known.join(", ")
                ),
            );
        }
    }
}

impl Objects {
    /// Our volume of a claim, or of an attachment.
    fn handle(&self, volume: &str) -> Option<VolumeHandle> {
        let volume = self.volumes.iter().find(|one| name(one) == volume && is_ours(one, "/spec/csi/driver"))?;
        text(volume, "/spec/csi/volumeHandle")?.parse().ok()
    }

    /// What was last said of an object, as a warning.
    fn warned(&self, kind: &str, namespace: &str, of: &str) -> Option<String> {
        let is_it = |event: &&Value| {
            text(event, "/type").as_deref() == Some("Warning")
                && text(event, "/involvedObject/kind").as_deref() == Some(kind)
                && text(event, "/involvedObject/name").as_deref() == Some(of)
                && text(event, "/involvedObject/namespace").unwrap_or_default() == namespace
        };
        let last = self.events.iter().filter(is_it).max_by_key(|event| at(event))?;
        text(last, "/message").map(|message| format!("{message} (event of {})", at(last)))
    }
}

fn at(event: &Value) -> String {
    ["/lastTimestamp", "/series/lastObservedTime", "/eventTime", "/firstTimestamp"]
        .iter()
        .find_map(|one| text(event, one))
        .unwrap_or_default()
}

async fn claims(report: &mut Report, all: &Objects, found: &[Found]) {
    let classes: BTreeMap<String, &Value> = all.classes.iter().map(|class| (name(class), class)).collect();
    let mut told = 0;
    for claim in &all.claims {
        let (namespace, of) = (text(claim, "/metadata/namespace").unwrap_or_default(), name(claim));
        let about = format!("PersistentVolumeClaim {namespace}/{of}");
        let class = text(claim, "/spec/storageClassName");
        let is_leaving = text(claim, "/metadata/deletionTimestamp").is_some();
        let is_pending = text(claim, "/status/phase").as_deref() == Some("Pending");
        let of_class = class.as_ref().and_then(|class| classes.get(class));
        let handle = text(claim, "/spec/volumeName").and_then(|volume| all.handle(&volume));
        // Who provisions it is written on a claim whose class was there once.
        let is_ours = handle.is_some()
            || of_class.is_some_and(|class| self::is_ours(class, "/provisioner"))
            || PROVISIONER.iter().any(|pointer| self::is_ours(claim, pointer));
        if !(is_leaving && is_ours || is_pending && (is_ours || of_class.is_none())) {
            continue;
        }
        told += 1;
        if told > MAX_TOLD {
            report.note("PersistentVolumeClaims", format!("more than {MAX_TOLD} wait; these are the first"));
            return;
        }
        if is_leaving {
            let volume = text(claim, "/spec/volumeName").unwrap_or_default();
            let said = format!(
                "it is Terminating while a pod uses it (kubectl -n {namespace} get pods: those with this claim); {}do not remove its finalizers",
                users(all, found, &volume).await
            );
            report.wrong(&about, said);
            continue;
        }
        match (&class, of_class) {
            (Some(class), None) => {
                let said = format!(
                    "it is Pending, for there is no StorageClass {class}; a claim's class cannot be changed: make the class, or the claim anew"
                );
                // Static volumes need no object of their class: whose it is cannot be told.
                if is_ours {
                    report.wrong(&about, said)
                } else {
                    report.note(&about, said + ", unless a volume made by hand is waited for")
                }
            }
            (None, None) => report.note(&about, "it is Pending and names no StorageClass, and none is the default"),
            (_, Some(class)) => match all.warned("PersistentVolumeClaim", &namespace, &of) {
                Some(said) => report.wrong(&about, format!("it is Pending: {said}")),
                None if text(class, "/volumeBindingMode").as_deref() == Some("WaitForFirstConsumer") => {
                    report.note(&about, "it is Pending until a pod uses it (WaitForFirstConsumer)");
                }
                None => report.wrong(&about, "it is Pending, and nobody says why: is the provisioner running? See the line \"controller\""),
            },
        }
    }
    for volume in all.volumes.iter().filter(|volume| is_ours(volume, "/spec/csi/driver")) {
        let of = name(volume);
        let is_leaving = text(volume, "/metadata/deletionTimestamp").is_some();
        if is_leaving || text(volume, "/status/phase").as_deref() == Some("Failed") {
            let said = all.warned("PersistentVolume", "", &of).map(|said| said + "; ").unwrap_or_default();
            report.wrong(
                &format!("PersistentVolume {of}"),
                format!("it is to be deleted and is not: {said}{}", users(all, found, &of).await),
            );
        }
    }
}

/// Who has a volume, by Kubernetes' attachments and by Proxmox.
async fn users(all: &Objects, found: &[Found], volume: &str) -> String {
    let mut said = Vec::new();
    for one in all.attachments.iter().filter(|one| text(one, "/spec/source/persistentVolumeName").as_deref() == Some(volume)) {
        said.push(format!("VolumeAttachment {} has it on node {}", name(one), text(one, "/spec/nodeName").unwrap_or_default()));
    }
    if let Some(handle) = all.handle(volume)
        && let Some(region) = found.iter().find(|one| one.region.name == handle.region)
    {
        match region.region.references_read(&handle, Instant::now(), None, Depth::Snapshots).await {
            Ok((references, unread)) => {
                said.extend(references.iter().map(ToString::to_string));
                said.extend(unread.map(|error| error.text));
            }
            Err(error) => said.push(error.text),
        }
    }
    said.iter().map(|one| format!("{one}; ")).collect()
}

fn attachments(report: &mut Report, all: &Objects, found: &[Found]) {
    for one in all.attachments.iter().filter(|one| is_ours(one, "/spec/attacher")) {
        let volume = text(one, "/spec/source/persistentVolumeName").unwrap_or_default();
        let node = text(one, "/spec/nodeName").unwrap_or_default();
        let about = format!("VolumeAttachment of {volume} to {node}");
        let error = text(one, "/status/attachError/message").or_else(|| text(one, "/status/detachError/message"));
        if let Some(error) = error {
            report.wrong(&about, error);
            continue;
        }
        let Some(handle) = all.handle(&volume) else { continue };
        let Some(region) = found.iter().find(|one| one.region.name == handle.region && !one.is_part) else { continue };
        let volid = handle.volid();
        let has_it = region.looks.values().any(|look| look.known.config.naming(&volid).any(|(key, _)| !key.starts_with("unused")));
        if one.pointer("/status/attached").and_then(Value::as_bool) == Some(true) && !has_it {
            report.wrong(
                &about,
                format!(
                    "Kubernetes has {handle} attached, and no VM has it: it was detached behind the driver's back (Terraform without \
                     ignore_changes, the web UI, a restored VM); delete the pod, so that it is attached again, and see docs/node-vm.md"
                ),
            );
        }
    }
}

/// Volumes that two VMs name, and drives of which Kubernetes does not know.
fn drives(report: &mut Report, all: &Objects, found: &[Found]) {
    for region in found {
        let mut holders: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for look in region.looks.values() {
            for (key, line) in look.known.config.lines.iter().filter(|(key, _)| crate::pve::drive::is_disk_slot(key)) {
                let Some(volid) = line.value.as_deref().or(line.pending.as_deref()).map(volume_of) else { continue };
                if is_of(volid, &region.owner) {
                    holders.entry(volid).or_default().push(format!("VM {} on {} as {key}", look.vm.vmid, look.vm.host));
                }
            }
        }
        let known: Vec<String> =
            all.volumes.iter().filter_map(|one| Some(text(one, "/spec/csi/volumeHandle")?.parse::<VolumeHandle>().ok()?.volid())).collect();
        for (volid, vms) in &holders {
            let about = format!("volume {volid} of region {}", region.region.name);
            let is_local = |volid: &str| {
                let storage = volid.split(':').next().unwrap_or_default();
                !region.resources.storages.iter().any(|one| one.storage == storage && one.shared)
            };
            if vms.len() > 1 && !is_local(volid) {
                report.wrong(
                    &about,
                    format!("it is in several VMs, and would have two writers: {}; detach it from all but one", vms.join("; ")),
                );
            }
            if !known.iter().any(|one| one == volid) {
                let by = vms.join("; ");
                report
                    .note(&about, format!("{by} has it, and no PersistentVolume here names it: another Kubernetes cluster's, or a ghost"));
            }
        }
    }
}

/// What kubelet said in the last minutes of pods with volumes of ours.
fn mounts(report: &mut Report, all: &Objects) {
    let since = moment(EVENT_AGE);
    let volumes: Vec<String> = all.volumes.iter().filter(|one| is_ours(one, "/spec/csi/driver")).map(name).collect();
    let mut last: BTreeMap<String, (String, String)> = BTreeMap::new();
    for event in &all.events {
        let (Some(reason), Some(message)) = (text(event, "/reason"), text(event, "/message")) else { continue };
        let names_ours = volumes.iter().any(|volume| message.contains(volume.as_str())) || message.contains(proto::DRIVER_NAME);
        if !OF_KUBELET.contains(&reason.as_str()) || !names_ours || at(event) < since {
            continue;
        }
        let who = ["kind", "namespace", "name"].map(|part| text(event, &format!("/involvedObject/{part}")).unwrap_or_default());
        let about = format!("{} {}/{}", who[0], who[1], who[2]);
        if last.get(&about).is_none_or(|(before, _)| *before <= at(event)) {
            last.insert(about, (at(event), format!("{reason}: {message}")));
        }
    }
    for (about, (_, said)) in last.into_iter().take(MAX_TOLD) {
        report.wrong(&about, said);
    }
}
