//! `proxmox-csi-controller --check`: each way in which it does not work (reference/users.md §4.5) is found from it alone, in a line that says
//! what to do. Nothing is written.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use controller::kube::Kube;
use controller::look::check::{Report, Verdict, check};
use serde_json::{Value, json};
use testbed::kube::Kubernetes;
use testbed::sim::{Acl, Builder, Simulator, Storage, Token, User};

use crate::bed::{Bed, MIB, REGION, clusters, start, two_hosts_description, with_config};

/// A cluster and a Kubernetes in which all is right: nodes are VMs 101 and 102 (and 201 on pve2), a class for local-lvm.
struct Place {
    bed: Bed,
    kubernetes: Kubernetes,
}

/// `2026-11-21T16:33:07.000000Z` of so long ago.
fn moment(ago: Duration) -> String {
    let seconds = (SystemTime::now() - ago).duration_since(UNIX_EPOCH).unwrap().as_secs();
    let (days, of_day) = (i64::try_from(seconds / 86_400).unwrap(), seconds % 86_400);
    // Howard Hinnant's civil_from_days.
    let z = days + 719_468;
    let era = z / 146_097;
    let doe = z - era * 146_097;
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + i64::from(month <= 2);
    format!("{year}-{month:02}-{day:02}T{:02}:{:02}:{:02}.000000Z", of_day / 3600, of_day / 60 % 60, of_day % 60)
}

impl Place {
    async fn new() -> Self {
        Self::on(Simulator::standard(), &[("node-101", 101, "pve1"), ("node-102", 102, "pve1")]).await
    }

    async fn on(builder: Builder, nodes: &[(&str, u32, &str)]) -> Self {
        let (bed, kubernetes) = (start(builder).await, Kubernetes::start().await.unwrap());
        for (name, vmid, zone) in nodes {
            kubernetes.node(name, &format!("{name}/{vmid}"));
            kubernetes.put(&format!("/api/v1/nodes/{name}"), node(name, *vmid, zone));
        }
        let place = Self { bed, kubernetes };
        place.lease(Duration::ZERO);
        place.class("proxmox", "local-lvm");
        place
    }

    fn lease(&self, ago: Duration) {
        let spec = json!({"holderIdentity": "pod-1", "leaseDurationSeconds": 15, "renewTime": moment(ago)});
        let path = format!("/apis/coordination.k8s.io/v1/namespaces/csi-proxmox/leases/{}", proto::DRIVER_NAME);
        self.kubernetes.put(&path, json!({"metadata": {"name": proto::DRIVER_NAME}, "spec": spec}));
    }

    fn class(&self, name: &str, storage: &str) {
        let class = json!({"metadata": {"name": name}, "provisioner": proto::DRIVER_NAME, "parameters": {"storage": storage},
                           "volumeBindingMode": "Immediate"});
        self.kubernetes.put(&format!("/apis/storage.k8s.io/v1/storageclasses/{name}"), class);
    }

    fn claim(&self, name: &str, class: &str, more: &Value) {
        let mut claim = json!({"metadata": {"name": name, "namespace": "apps"}, "spec": {"storageClassName": class},
                               "status": {"phase": "Pending"}});
        for (key, value) in more.as_object().unwrap() {
            claim[key].as_object_mut().unwrap().extend(value.as_object().unwrap().clone());
        }
        self.kubernetes.put(&format!("/api/v1/persistentvolumeclaims/{name}"), claim);
    }

    fn warning(&self, kind: &str, name: &str, reason: &str, message: &str) {
        let event = json!({"metadata": {"name": format!("{name}.1")}, "type": "Warning", "reason": reason, "message": message,
                           "lastTimestamp": moment(Duration::from_secs(9)),
                           "involvedObject": {"kind": kind, "namespace": "apps", "name": name}});
        self.kubernetes.put(&format!("/api/v1/events/{name}.1"), event);
    }

    async fn look(&self) -> Report {
        self.bed.sim.reset_counters();
        let _ = self.kubernetes.asked();
        let access = self.kubernetes.access(self.bed.config.parent().unwrap()).unwrap();
        let kube = Arc::new(Kube::new(access).unwrap());
        let report = check(self.bed.config.clone(), None, Ok(Some(kube))).await;
        let asked = self.bed.sim.requests().into_iter().chain(self.kubernetes.asked());
        let writes: Vec<String> = asked.filter(|request| !request.starts_with("GET ")).collect();
        assert!(writes.is_empty(), "{writes:?}");
        report
    }

    /// It finds this, and nothing else is wrong unless it is said, too.
    #[track_caller]
    fn finds(report: &Report, expected: &[(&str, &str)]) {
        let wrong: Vec<_> = report.lines.iter().filter(|line| line.verdict == Verdict::Wrong).collect();
        for (about, said) in expected {
            assert!(wrong.iter().any(|line| line.about.contains(about) && line.said.contains(said)), "no {about}: {said} in\n{report}");
        }
        for line in wrong {
            let is_expected = expected.iter().any(|(about, said)| line.about.contains(about) && line.said.contains(said));
            assert!(is_expected, "{line:?} in\n{report}");
        }
    }
}

fn node(name: &str, vmid: u32, zone: &str) -> Value {
    let labels = json!({proto::TOPOLOGY_REGION: REGION, proto::TOPOLOGY_ZONE: zone});
    json!({"metadata": {"name": name, "labels": labels}, "spec": {"providerID": format!("proxmox://{REGION}/{vmid}")},
           "status": {"nodeInfo": {"systemUUID": format!("00000000-0000-4000-8000-{vmid:012}")}}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_all_is_right_each_thing_has_its_line_and_nothing_is_wrong() {
    let place = Place::new().await;
    let report = place.look().await;
    Place::finds(&report, &[]);
    let text = report.to_string();
    for words in [
        "ok     region fsn1: endpoint and token: http://",
        "ok     region fsn1: privileges: VM.Config.Disk on /vms: attaching, detaching and growing disks",
        "ok     region fsn1: quorum: the cluster is quorate, with 1 nodes",
        "ok     region fsn1: storages: local-lvm on pve1: lvmthin, 0 of 100 GiB used",
        "ok     region fsn1: controllerVmID: 9999 is no VM's",
        "ok     node node-101: node id node-101/101 is VM 101 on pve1",
        "ok     node node-102: SMBIOS UUID 00000000-0000-4000-8000-000000000102 is VM 102's",
        "ok     VM 101 of region fsn1: takes disks: scsihw virtio-scsi-single, hot-plug, 29 of 29 slots free",
        "ok     controller: pod-1 acts",
        "ok     StorageClass proxmox: storage local-lvm",
        "nothing is wrong",
    ] {
        assert!(text.contains(words), "no {words:?} in\n{text}");
    }
    // By hand, without Kubernetes; a VM that may be no node is no mistake.
    place.bed.sim.set_config(102, "scsihw", Some("lsi"));
    let report = check(place.bed.config.clone(), None, Ok(None)).await;
    Place::finds(&report, &[]);
    assert!(report.to_string().contains("note   VM 102 of region fsn1: VM 102 has scsihw: lsi"), "{report}");
}

/// S1: better than CrashLoopBackOff.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flow_bad_credentials_unreachable_api_tls() {
    let place = Place::new().await;
    let good = clusters(place.bed.sim.url());
    std::fs::write(&place.bed.config, good.replace("token_secret: \"c5", "token_secret: \"d5")).unwrap();
    let unknown = ("node node-10", "is not in the config file, or does not answer");
    Place::finds(&place.look().await, &[("region fsn1: token", "(check token_id and token_secret"), unknown]);
    std::fs::write(&place.bed.config, good.replace("region", "regoin")).unwrap();
    Place::finds(&place.look().await, &[("config file", "unknown key \"regoin\""), unknown]);
    std::fs::remove_file(&place.bed.config).unwrap();
    Place::finds(&place.look().await, &[("config file", "cannot be read"), unknown]);
    let tls = Arc::new(Simulator::standard().https().start().await.unwrap());
    std::fs::write(&place.bed.config, clusters(tls.url())).unwrap();
    Place::finds(&place.look().await, &[("region fsn1: endpoint", "put its CA into SSL_CERT_FILE"), unknown]);
}

/// S1: from inside of the cluster: firewall, DNS, another service at that address.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flow_api_from_inside_the_cluster() {
    let place = Place::new().await;
    let unknown = ("node node-10", "does not answer");
    for (url, words) in [("http://127.0.0.1:1", "cannot be reached"), ("https://host.invalid:8006", "host.invalid")] {
        std::fs::write(&place.bed.config, clusters(url)).unwrap();
        let report = place.look().await;
        Place::finds(&report, &[("region fsn1: endpoint", words), unknown]);
        assert!(report.to_string().contains("firewall"), "{report}");
    }
    // One region of two: the other is looked at all the same.
    let dead = clusters("http://127.0.0.1:1").replace(REGION, "nbg1").replace("clusters:\n", "");
    std::fs::write(&place.bed.config, clusters(place.bed.sim.url()) + &dead).unwrap();
    Place::finds(&place.look().await, &[("region nbg1: endpoint", "cannot be reached")]);
}

/// S0, S1: a claim stays Pending.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flow_a_claim_stays_pending() {
    let place = Place::new().await;
    place.claim("a", "gold", &json!({"metadata": {"annotations": {"volume.kubernetes.io/storage-provisioner": proto::DRIVER_NAME}}}));
    Place::finds(&place.look().await, &[("PersistentVolumeClaim apps/a", "there is no StorageClass gold")]);
    // Another driver's, or of a volume made by hand, which needs no object of its class.
    place.claim("a", "manual", &json!({}));
    let report = place.look().await;
    Place::finds(&report, &[]);
    assert!(report.lines.iter().any(|line| line.verdict == Verdict::Note && line.said.contains("no StorageClass manual")), "{report}");
    place.claim("a", "proxmox", &json!({}));
    place.warning(
        "PersistentVolumeClaim",
        "a",
        "ProvisioningFailed",
        "Permission check failed (/storage/local-lvm, Datastore.AllocateSpace)",
    );
    let said = [("PersistentVolumeClaim apps/a", "it is Pending: Permission check failed (/storage/local-lvm")];
    Place::finds(&place.look().await, &said);
    // Bound since: what was said before says nothing.
    place.claim("a", "proxmox", &json!({"status": {"phase": "Bound"}}));
    Place::finds(&place.look().await, &[]);
    place.class("wrong", "Local-LVM");
    let names = ("StorageClass wrong", "no storage \"Local-LVM\" is shown to us, but local, local-lvm, local-zfs, thick-lvm; mind upper");
    Place::finds(&place.look().await, &[names]);
    place.class("wrong", "local-zfs");
    place.bed.sim.change_storage("local-zfs", |one| one.used_bytes = 95 << 30);
    Place::finds(&place.look().await, &[("storages", "local-zfs on pve1 is full to 95 %")]);
    place.bed.sim.change_storage("local-zfs", |one| one.used_bytes = 0);
    place.bed.sim.change_storage("local-zfs", |one| one.content = vec!["rootdir".into()]);
    Place::finds(&place.look().await, &[("StorageClass wrong", "pvesm set local-zfs --content images")]);
    place.class("wrong", "local-lvm");
    // The plugin does not run.
    place.lease(Duration::from_secs(600));
    Place::finds(&place.look().await, &[("controller", "the plugin is not running; see: kubectl -n csi-proxmox get pods")]);
    place.kubernetes.delete_lease();
    Place::finds(&place.look().await, &[("controller", "none has ever acted")]);
    place.lease(Duration::ZERO);
    // The reference driver still does.
    let name = "external-attacher-leader-csi-proxmox-sinextra-dev";
    let spec = json!({"holderIdentity": "old-0", "leaseDurationSeconds": 15, "renewTime": moment(Duration::from_secs(5))});
    let lease = json!({"metadata": {"name": name, "namespace": "kube-system"}, "spec": spec});
    place.kubernetes.put(&format!("/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/{name}"), lease);
    Place::finds(
        &place.look().await,
        &[("controller", "another workload serves csi.proxmox.sinextra.dev: pod old-0 in namespace kube-system")],
    );
}

/// S1, S4: an attachment fails.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flow_an_attach_fails() {
    let place = Place::new().await;
    for lun in 1..=29 {
        place.bed.sim.set_config(101, &format!("scsi{lun}"), Some(&format!("thick-lvm:vm-101-disk-{lun},size=1G")));
    }
    let full = ("VM 101", "VM 101 has no free slot from scsi1 to scsi29");
    Place::finds(&place.look().await, &[full]);
    place.bed.sim.set_config(102, "scsihw", Some("lsi"));
    place.bed.sim.set_config(102, "hotplug", Some("network,usb"));
    place.bed.sim.set_config(102, "protection", Some("1"));
    let [scsihw, hotplug, protected] =
        ["--scsihw virtio-scsi-single", "--hotplug disk,network,usb", "--protection 0"].map(|said| ("VM 102", said));
    Place::finds(&place.look().await, &[full, scsihw, hotplug, protected]);

    let place = Place::new().await;
    place.bed.sim.change_storage("local-lvm", |one| one.unmounted = true);
    place.bed.sim.change_storage("local", |one| one.unmounted = true);
    let report = place.look().await;
    assert!(report.to_string().contains("WRONG  region fsn1: storages: storage local on pve1 is not active"), "{report}");

    // Held elsewhere: by Kubernetes' word, and by Proxmox' own.
    let mut san = Storage::new("san", "lvm", &[("vgname", "san")]);
    san.shared = Some(true);
    let nodes = [("node-101", 101, "pve1"), ("node-201", 201, "pve2")];
    let place = Place::on(Simulator::builder(two_hosts_description().storage(san)), &nodes).await;
    place.bed.sim.create_volume("pve1", "san:vm-9999-b", 64 * MIB).unwrap();
    for vmid in [101, 201] {
        place.bed.sim.set_config(vmid, "scsi4", Some("san:vm-9999-b,size=64M"));
    }
    place.kubernetes.pv("pv-b", "fsn1//san/vm-9999-b");
    place.kubernetes.attachment("pv-b", "node-101", false);
    let path = "/apis/storage.k8s.io/v1/volumeattachments/csi-pv-b-node-101";
    let spec = json!({"attacher": proto::DRIVER_NAME, "nodeName": "node-101", "source": {"persistentVolumeName": "pv-b"}});
    let refused = "VM 201 on pve2 has it configured as scsi4";
    let status = json!({"attached": false, "attachError": {"message": refused}});
    place.kubernetes.put(path, json!({"metadata": {"name": "csi-pv-b-node-101"}, "spec": spec, "status": status}));
    let two =
        ("volume san:vm-9999-b", "it is in several VMs, and would have two writers: VM 101 on pve1 as scsi4; VM 201 on pve2 as scsi4");
    Place::finds(&place.look().await, &[("VolumeAttachment of pv-b to node-101", refused), two]);
}

/// S4: the device is not found, the mount fails: what kubelet said last, and which VM the node really is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flow_the_device_is_not_found_or_the_mount_fails() {
    let place = Place::new().await;
    place.kubernetes.pv("pvc-1", "fsn1/pve1/local-lvm/vm-9999-pvc-1");
    place.warning("Pod", "db-0", "FailedMount", "MountVolume.MountDevice failed for volume \"pvc-1\" : no disk has serial csi-1");
    place.warning("Pod", "other", "FailedMount", "MountVolume.SetUp failed for volume \"nfs\"");
    let mount = ("Pod apps/db-0", "FailedMount: MountVolume.MountDevice failed for volume \"pvc-1\" : no disk has serial");
    Place::finds(&place.look().await, &[mount]);
    // The node carries another VM's number.
    place.kubernetes.node("node-102", "node-102/101");
    place.kubernetes.put("/api/v1/nodes/node-102", node("node-102", 102, "pve1"));
    let wrong_vm = ("node node-102", "SMBIOS UUID 00000000-0000-4000-8000-000000000102 is VM 102's, and VM 101 has");
    let provider = ("node node-102", "proxmox://fsn1/102 names another VM than its node id, VM 101");
    Place::finds(&place.look().await, &[mount, wrong_vm, provider]);
    place.kubernetes.node("node-102", "node-102/777");
    place.kubernetes.put("/api/v1/nodes/node-102", node("node-102", 102, "pve1"));
    Place::finds(&place.look().await, &[mount, ("node node-102", "no VM has the node id node-102/777")]);
    // An id without a number: the provider ID says it.
    place.kubernetes.node("node-102", "w2");
    let mut named = node("w2", 102, "pve1");
    named["metadata"]["name"] = "node-102".into();
    place.kubernetes.put("/api/v1/nodes/node-102", named.clone());
    place.kubernetes.put("/api/v1/nodes/w2", named);
    let report = place.look().await;
    assert!(report.to_string().contains("ok     node node-102: node id w2 is VM 102 on pve1"), "{report}");
    place.kubernetes.remove("/api/v1/nodes/w2");
    place.kubernetes.put("/api/v1/nodes/node-102", node("node-102", 102, "pve1"));
    // No agent there.
    place.kubernetes.remove("/apis/storage.k8s.io/v1/csinodes/node-102");
    Place::finds(&place.look().await, &[mount, ("node node-102", "its node agent has not registered")]);
    place.kubernetes.node("node-102", "node-102/102");
    place.kubernetes.put("/api/v1/nodes/node-102", node("node-102", 102, "pve7"));
    Place::finds(&place.look().await, &[mount, ("node node-102", "is pve7, and VM 102 is on pve1: it was migrated")]);
}

/// S0, S1: 403, with privilege separation and without.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flow_403() {
    let place = Place::new().await;
    place.bed.sim.set_role("CSI", &["VM.Audit", "Datastore.Audit", "Datastore.AllocateSpace", "Datastore.Allocate"]);
    let report = place.look().await;
    let missing =
        "VM.Config.Disk on /vms is missing, which is for attaching, detaching and growing disks; give the token's role VM.Config.Disk";
    Place::finds(&report, &[("privileges", missing)]);
    assert!(report.to_string().contains("note   region fsn1: privileges: dead hosts: Sys.Audit on / is missing"), "{report}");
    // S0: the user may everything, the token with privilege separation nothing.
    let secret = testbed::sim::STANDARD_SECRET.to_owned();
    let token = Token { id: "csi".into(), secret, privsep: true, expired: false };
    place.bed.sim.set_user(User { id: "csi@pve".into(), password: None, disabled: false, expired: false, tokens: vec![token] });
    let report = place.look().await;
    assert!(report.to_string().contains("with privilege separation a token needs its own ACL"), "{report}");
    // One VM is withheld by a role on its path, in whole or in part.
    let place = Place::new().await;
    let acl = |path: &str, role: &str| Acl { path: path.into(), who: "csi@pve".into(), role: role.into(), propagate: true };
    place.bed.sim.set_acl(vec![acl("/", "CSI"), acl("/vms/102", "NoAccess")]);
    Place::finds(
        &place.look().await,
        &[("node node-102", "VM 102 is there and not shown to us; give the token's role VM.Audit on /vms/102")],
    );
    place.bed.sim.set_role("Look", &["VM.Audit"]);
    place.bed.sim.set_acl(vec![acl("/", "CSI"), acl("/vms/102", "Look")]);
    let part = "VM.Config.Disk is held on /vms, but not on /vms/102: another role there replaces it";
    Place::finds(&place.look().await, &[("privileges", part)]);
}

/// S3: a claim stays Terminating: who has it is named, so that nobody removes finalizers. Terraform took a disk away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flow_terminating_and_drift() {
    let place = Place::new().await;
    let volume = place.bed.volume("pvc-1", "local-lvm").await;
    place.bed.publish(&volume, "node-101/101").await.unwrap();
    place.kubernetes.pv("pvc-1", &volume.to_string());
    place.kubernetes.attachment("pvc-1", "node-101", true);
    Place::finds(&place.look().await, &[]);
    let more =
        json!({"metadata": {"deletionTimestamp": "2026-11-21T00:00:00Z"}, "spec": {"volumeName": "pvc-1"}, "status": {"phase": "Bound"}});
    place.claim("a", "proxmox", &more);
    let report = place.look().await;
    let holder = "VolumeAttachment csi-pvc-1-node-101 has it on node node-101; VM 101 on pve1 has it configured as scsi1; do not remove";
    Place::finds(&report, &[("PersistentVolumeClaim apps/a", holder)]);
    place.kubernetes.remove("/api/v1/persistentvolumeclaims/a");
    // Detached behind our back.
    place.bed.sim.detach_by_hand(101, "scsi1");
    let report = place.look().await;
    Place::finds(
        &report,
        &[("VolumeAttachment of pvc-1 to node-101", "no VM has it: it was detached behind the driver's back (Terraform")],
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_owner_s_number_and_the_quorum_are_looked_at() {
    let place = Place::new().await;
    place.bed.sim.add_vm(&testbed::sim::Vm::linux(9999, "pve1", "payroll", None));
    Place::finds(&place.look().await, &[("controllerVmID", "9999 is the number of VM payroll on pve1")]);
    let place = Place::new().await;
    place.bed.sim.set_quorate(false);
    let report = place.look().await;
    assert!(report.to_string().contains("WRONG  region fsn1: quorum: the cluster has no quorum"), "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn holders_are_listed_with_the_age_of_their_reading() {
    let bed = start(Simulator::builder(two_hosts_description())).await;
    let volume = bed.volume_on("pvc-1", "local-lvm", "pve1").await;
    bed.publish(&volume, "node-101/101").await.unwrap();
    bed.sim.set_config(102, "scsi9", Some("thick-lvm:vm-102-disk-1,size=1G"));
    bed.sim.set_snapshot(101, "before", &[("scsi1", &format!("{},size=64M", volume.volid()))]);
    bed.sim.reset_counters();
    let fresh = with_config(Arc::clone(&bed.sim), &clusters(bed.sim.url()));
    let controller = fresh.csi.controller();
    let all = controller.holders(None).await.unwrap();
    let rows: Vec<(String, u32, &str, &str)> =
        all.all.iter().map(|one| (one.volume.clone(), one.vmid, one.key.as_str(), one.view)).collect();
    assert_eq!(rows, [(volume.to_string(), 101, "scsi1", "attached")]);
    let text = all.text();
    assert!(text.starts_with("VOLUME ") && text.contains("101 node-101  pve1  scsi1  attached  0 s"), "{text}");
    let one = controller.holders(Some(&volume)).await.unwrap();
    assert_eq!((one.all.len(), one.more.len()), (1, 1), "{one:?}");
    assert!(one.more[0].contains("snapshot \"before\" of VM 101"), "{one:?}");
    let json: Value = serde_json::from_str(&one.json()).unwrap();
    assert_eq!(json["holders"][0]["vmid"], 101);
    // A VM that cannot be read is said, not passed over.
    bed.sim.set_node_unreachable("pve2", Some("595 No route to host"));
    let part = controller.holders(None).await.unwrap();
    assert!(part.unread.iter().any(|one| one.contains("VM 201 on pve2 was not read")), "{part:?}");
    assert!(bed.sim.requests().iter().all(|request| request.starts_with("GET ")), "{:?}", bed.sim.requests());
}
