//! Who holds a volume, where that is hard to see: hidden, renamed and foreign VMs, containers, lists that lack something,
//! hands, and controllers before us.

use std::sync::Arc;
use std::time::Duration;

use controller::run::Controller;
use controller::service::ControllerService;
use proto::VolumeHandle;
use proto::csi::{self, controller_server::Controller as _};
use testbed::sim::{Acl, CSI_PRIVILEGES, Effect, Fault, Simulator, Storage, Vm};
use tonic::{Code, Request, Status};

use crate::bed::{
    Bed, MIB, assert_refused, clusters, create_request, publish_request, standard, start, two_hosts, two_hosts_description, with_config,
};

/// Another controller on the same cluster, which knows nothing yet.
pub(crate) fn again(bed: &Bed) -> ControllerService {
    ControllerService::new(Arc::new(Controller::new(bed.config.clone(), None)))
}

pub(crate) async fn publish_by(csi: &ControllerService, volume: &VolumeHandle, node: &str) -> Result<u32, Status> {
    let context = csi.controller_publish_volume(Request::new(publish_request(volume, node))).await?.into_inner().publish_context;
    Ok(context["lun"].parse().unwrap())
}

pub(crate) async fn unpublish_by(csi: &ControllerService, volume: &VolumeHandle, node: &str) -> Result<(), Status> {
    let request = csi::ControllerUnpublishVolumeRequest { volume_id: volume.to_string(), node_id: node.into(), ..Default::default() };
    csi.controller_unpublish_volume(Request::new(request)).await.map(drop)
}

async fn delete_by(csi: &ControllerService, volume: &VolumeHandle) -> Result<(), Status> {
    let request = csi::DeleteVolumeRequest { volume_id: volume.to_string(), ..Default::default() };
    csi.delete_volume(Request::new(request)).await.map(drop)
}

/// Hosts pve1 and pve2 with a storage that both see, and a volume on it.
pub(crate) async fn shared_bed() -> (Bed, VolumeHandle) {
    let mut san = Storage::new("san", "lvm", &[("vgname", "san")]);
    san.shared = Some(true);
    let bed = start(Simulator::builder(two_hosts_description().storage(san))).await;
    let volume: VolumeHandle = "fsn1//san/vm-9999-a".parse().unwrap();
    bed.sim.create_volume("pve1", &volume.volid(), 64 * MIB).unwrap();
    (bed, volume)
}

fn acl(path: &str, role: &str) -> Acl {
    Acl { path: path.into(), who: "csi@pve".into(), role: role.into(), propagate: true }
}

/// W05: a VM that an ACL hides is not gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w05_a_vm_that_is_hidden_from_us_is_not_gone() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.publish(&volume, "node-101/101").await.unwrap();
    bed.sim.set_acl(vec![acl("/", "CSI"), acl("/vms/101", "NoAccess")]);
    let fresh = again(&bed);
    assert_refused(
        unpublish_by(&fresh, &volume, "node-101/101").await,
        Code::PermissionDenied,
        &["VM 101 is there", "/vms/101", "NoAccess"],
    );
    assert_refused(publish_by(&fresh, &volume, "node-101/101").await, Code::PermissionDenied, &["VM.Audit on /vms/101"]);
    assert_eq!(bed.traces(101, &volume).len(), 2);
    bed.sim.set_acl(vec![acl("/", "CSI")]);
    let fresh = again(&bed);
    unpublish_by(&fresh, &volume, "node-101/101").await.unwrap();
    assert!(bed.traces(101, &volume).is_empty());
}

/// W05: a node id without a VMID finds its VM by name alone; a VM that was renamed is not gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w05_a_renamed_vm_is_not_gone() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.publish(&volume, "node-101").await.unwrap();
    bed.sim.set_config(101, "name", Some("worker"));
    let fresh = again(&bed);
    assert_refused(
        unpublish_by(&fresh, &volume, "node-101").await,
        Code::FailedPrecondition,
        &["\"node-101\"", "VM 101 on pve1", "new name"],
    );
    bed.unpublish(&volume, "worker/101").await.unwrap();
    unpublish_by(&fresh, &volume, "node-101").await.unwrap();
}

/// A list that does not show the storage says nothing of whose VMs could hold its volumes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storage_that_is_not_listed_counts_as_shared() {
    let (bed, volume) = shared_bed().await;
    bed.publish(&volume, "node-201/201").await.unwrap();
    let local: VolumeHandle = "fsn1/pve1/san/vm-9999-a".parse().unwrap();
    bed.sim.set_role("NoDatastoreAudit", &["VM.Audit", "VM.Config.Disk", "Datastore.Allocate", "Datastore.AllocateSpace", "Sys.Audit"]);
    bed.sim.set_acl(vec![acl("/", "CSI"), acl("/storage/san", "NoDatastoreAudit")]);
    let fresh = again(&bed);
    assert_refused(publish_by(&fresh, &local, "node-101/101").await, Code::FailedPrecondition, &["VM 201 on pve2", "scsi1"]);
    assert_refused(delete_by(&fresh, &local).await, Code::FailedPrecondition, &["VM 201 on pve2"]);
    // Its node left the cluster: gone with it, or shared? Not shown, so not said.
    let gone: VolumeHandle = "fsn1/pve9/san/vm-9999-a".parse().unwrap();
    assert_refused(delete_by(&fresh, &gone).await, Code::FailedPrecondition, &["pve9", "Datastore.Audit on /storage/san"]);
    assert_eq!(bed.traces(201, &volume).len(), 2);
}

/// A volume of a shared storage is not gone with the node that its id names.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w05_a_shared_volume_outlives_the_node_in_its_id() {
    let (bed, volume) = shared_bed().await;
    let old: VolumeHandle = "fsn1/pve9/san/vm-9999-a".parse().unwrap();
    bed.publish(&volume, "node-201/201").await.unwrap();
    assert_refused(bed.delete(&old.to_string()).await, Code::FailedPrecondition, &["VM 201 on pve2"]);
    bed.unpublish(&volume, "node-201/201").await.unwrap();
    bed.delete(&old.to_string()).await.unwrap();
    assert!(bed.sim.volumes("pve1", "san").is_empty());
}

/// The same for a detachment: OK only when it is in none of the views.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_whose_node_is_gone_is_detached_all_the_same() {
    let (bed, volume) = shared_bed().await;
    let old: VolumeHandle = "fsn1/pve9/san/vm-9999-a".parse().unwrap();
    for known in [true, false] {
        bed.publish(&volume, "node-201/201").await.unwrap();
        // By the one who attached it, and by one who knows nothing.
        let by = if known { None } else { Some(again(&bed)) };
        match &by {
            None => bed.unpublish(&old, "node-201/201").await.unwrap(),
            Some(by) => unpublish_by(by, &old, "node-201/201").await.unwrap(),
        }
        assert!(bed.traces(201, &volume).is_empty(), "{:?}", bed.traces(201, &volume));
    }
    // A local one, whose VM was moved with it, and the node of its id is gone.
    let local = bed.volume_on("pvc-1", "ds", "pve1").await;
    bed.publish(&local, "node-101/101").await.unwrap();
    bed.sim.migrate_vm(101, "pve2");
    unpublish_by(&again(&bed), &local, "node-101/101").await.unwrap();
    assert!(bed.traces(101, &local).is_empty(), "{:?}", bed.traces(101, &local));
}

/// W19: a number alone may be another VM's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w19_a_vm_of_another_name_is_not_the_node_if_one_of_that_name_is_there() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    assert_refused(bed.publish(&volume, "node-101/102").await, Code::FailedPrecondition, &["VM 102 is named", "VM 101 on pve1"]);
    assert!(bed.traces(102, &volume).is_empty());
    // Kubernetes' and Proxmox's names may differ where nothing else is meant.
    bed.publish(&volume, "talos-abc/102").await.unwrap();
}

/// W19: the same number in another cluster is another machine.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w19_node_and_volume_of_different_regions_are_refused() {
    let (one, other) = (Simulator::standard().start().await.unwrap(), two_hosts_description());
    let other = Simulator::builder(other).with(|about| about.vms[0] = Vm::linux(101, "pve1", "hel-101", None)).start().await.unwrap();
    let second = clusters(other.url()).replace("clusters:\n", "").replace("fsn1", "hel1");
    let text = format!("{}{second}", clusters(one.url()));
    let bed = with_config(Arc::new(one), &text);
    let request = csi::CreateVolumeRequest {
        accessibility_requirements: crate::bed::topology(&["pve1"]),
        ..create_request("pvc-1", "local", 64 * MIB)
    };
    let volume: VolumeHandle = bed.create_as(request).await.unwrap().volume_id.parse().unwrap();
    assert_eq!(volume.region, "fsn1");
    assert_refused(bed.publish(&volume, "hel-101/101").await, Code::FailedPrecondition, &["region hel1", "region fsn1", "nodeAffinity"]);
    assert_refused(bed.publish(&volume, "node-201/201").await, Code::FailedPrecondition, &["region hel1"]);
    assert!(bed.traces(101, &volume).is_empty());
    bed.publish(&volume, "node-101/101").await.unwrap();
}

/// Attached by hand within the minute that readings count: the guest would write into a deleted volume.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_attached_by_hand_a_moment_ago_is_not_deleted() {
    let bed = standard().await;
    let (warm, volume) = (bed.volume("pvc-0", "local").await, bed.volume("pvc-1", "local").await);
    bed.publish(&warm, "node-102/102").await.unwrap();
    bed.sim.stop_vm(101);
    bed.sim.set_config(101, "scsi4", Some(&volume.volid()));
    assert_refused(bed.delete(&volume.to_string()).await, Code::FailedPrecondition, &["VM 101 on pve1", "configured as scsi4"]);
    bed.sim.start_vm(101).unwrap();
    assert_refused(bed.delete(&volume.to_string()).await, Code::FailedPrecondition, &["VM 101 on pve1", "scsi4"]);
    assert_eq!(bed.sim.volumes("pve1", "local").len(), 2);
}

/// The same on a shared storage, where not everything is read again: what is plugged is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shared_volume_attached_by_hand_a_moment_ago_is_not_deleted() {
    for runs in [true, false] {
        let (bed, volume) = shared_bed().await;
        let other: VolumeHandle = "fsn1//san/vm-9999-b".parse().unwrap();
        bed.sim.create_volume("pve1", &other.volid(), 64 * MIB).unwrap();
        bed.publish(&other, "node-101/101").await.unwrap();
        bed.sim.stop_vm(201);
        bed.sim.set_config(201, "scsi4", Some(&volume.volid()));
        if runs {
            bed.sim.start_vm(201).unwrap();
        }
        assert_refused(bed.delete(&volume.to_string()).await, Code::FailedPrecondition, &["VM 201 on pve2", "scsi4"]);
        assert_eq!(bed.sim.volumes("pve1", "san").len(), 2);
    }
}

/// By hand, by a rollback, by a second Kubernetes cluster's controller: refused, and not deleted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w04_w21_whoever_attached_it_holds_it() {
    type Attach = fn(&Simulator, &str);
    let ways: &[(&str, Attach)] = &[
        ("by hand", |sim, volid| {
            sim.stop_vm(102);
            sim.set_config(102, "virtio2", Some(volid));
            sim.start_vm(102).unwrap();
        }),
        ("by a rollback, the VM stopped after it", |sim, volid| {
            sim.set_snapshot(102, "before", &[("scsi3", volid)]);
            sim.stop_vm(102);
            sim.set_config(102, "scsi3", Some(volid));
        }),
        ("by another controller, which plans it", |sim, volid| sim.set_pending(102, "scsi3", volid)),
        ("by another controller, whose drive carries another serial", |sim, volid| {
            sim.stop_vm(102);
            sim.set_config(102, "scsi3", Some(&format!("{volid},serial=csi-0000000000000000")));
            sim.start_vm(102).unwrap();
        }),
    ];
    for (way, attach) in ways {
        let bed = standard().await;
        let volume = bed.volume("pvc-1", "local").await;
        attach(&bed.sim, &volume.volid());
        assert_refused(bed.publish(&volume, "node-101/101").await, Code::FailedPrecondition, &["VM 102 on pve1"]);
        assert_refused(bed.delete(&volume.to_string()).await, Code::FailedPrecondition, &["VM 102 on pve1"]);
        assert!(bed.traces(101, &volume).is_empty() && bed.sim.volumes("pve1", "local").len() == 1, "{way}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_with_the_volume_as_a_mount_point_holds_it() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local-lvm").await;
    let line = format!("{},mp=/data,size=64M", volume.volid());
    bed.sim.set_container(150, "pve1", &[("rootfs", "local-lvm:vm-150-disk-0,size=8G"), ("mp0", &line)]);
    assert_refused(again_publish(&bed, &volume).await, Code::FailedPrecondition, &["container 150 on pve1 has it as mp0"]);
    let fresh = again(&bed);
    assert_refused(delete_by(&fresh, &volume).await, Code::FailedPrecondition, &["container 150"]);
    assert_refused(unpublish_by(&fresh, &volume, "").await, Code::FailedPrecondition, &["container 150", "by hand"]);
    // The number of a VM that is gone may be a container's by now.
    unpublish_by(&fresh, &volume, "gone/150").await.unwrap();
    bed.sim.set_container(150, "pve1", &[("rootfs", "local-lvm:vm-150-disk-0,size=8G")]);
    again_publish(&bed, &volume).await.unwrap();
}

async fn again_publish(bed: &Bed, volume: &VolumeHandle) -> Result<u32, Status> {
    publish_by(&again(bed), volume, "node-101/101").await
}

/// The controller was killed while Proxmox worked on its attach; the next one knows nothing of it but what Proxmox shows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attach_of_a_controller_before_us_is_waited_for() {
    let bed = Arc::new(standard().await);
    let volume = bed.volume("pvc-1", "local").await;
    // The task waits for the VM's lock, and time stands still.
    let (stopped, held) = (bed.sim.freeze(), bed.sim.hold_config_lock(101).unwrap());
    let (first, wanted) = (Arc::clone(&bed), volume.clone());
    let lost = tokio::spawn(async move { first.publish(&wanted, "node-101/101").await });
    until(|| bed.sim.requests().iter().any(|request| request.starts_with("POST") && request.contains("/qemu/101/config"))).await;
    bed.sim.reset_counters();
    let (fresh, wanted) = (again(&bed), volume.clone());
    let second = tokio::spawn(async move { publish_by(&fresh, &wanted, "node-102/102").await });
    until(|| bed.sim.requests().iter().filter(|request| request.contains("/tasks?")).count() >= 2).await;
    assert!(bed.traces(102, &volume).is_empty() && !second.is_finished());
    drop((held, stopped));
    lost.await.unwrap().unwrap();
    assert_refused(second.await.unwrap(), Code::FailedPrecondition, &["VM 101 on pve1", "scsi1"]);
}

pub(crate) async fn until(holds: impl Fn() -> bool) {
    let all = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), all).await.expect("30 s were enough");
}

/// One Proxmox node hangs: calls about it must not take all threads.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_hangs_does_not_starve_the_others() {
    let bed = Arc::new(two_hosts().await);
    let good = bed.volume_on("pvc-0", "ds", "pve1").await;
    bed.publish(&good, "node-101/101").await.unwrap();
    bed.unpublish(&good, "node-101/101").await.unwrap();
    bed.sim.inject(Fault { method: None, path: "/nodes/pve2/**".into(), nth: 1, times: 1000, effect: Effect::Hang });
    for n in 0..40 {
        let bed = Arc::clone(&bed);
        tokio::spawn(async move {
            let volume = format!("fsn1/pve2/ds/9999/vm-9999-pvc-{n}.raw").parse().unwrap();
            bed.publish(&volume, "node-201/201").await
        });
    }
    until(|| bed.sim.requests().iter().filter(|request| request.contains("/nodes/pve2/")).count() >= 1).await;
    let attached = tokio::time::timeout(Duration::from_secs(10), bed.publish(&good, "node-101/101")).await;
    attached.expect("before the calls about pve2 give up").unwrap();
    bed.sim.stop();
}

/// Every role that the documents hand out works, or is told which privilege lacks and where, before anything is touched; with
/// privilege separation, where the token needs an ACL of its own, and without.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_role_works_or_is_told_what_lacks() {
    let all = ["VM.Audit", "VM.Config.Disk", "Datastore.Allocate", "Datastore.AllocateSpace", "Datastore.Audit"];
    let without = |one: &str| all.into_iter().filter(|privilege| *privilege != one).collect::<Vec<_>>();
    let roles: [(&str, Vec<&str>, &[&str]); 4] = [
        ("S1 and S2", all.to_vec(), &[]),
        ("S0", CSI_PRIVILEGES.to_vec(), &[]),
        ("S3", without("Datastore.AllocateSpace"), &["/storage/local", "Datastore.AllocateSpace"]),
        ("S4", without("Datastore.Audit"), &["/storage/local", "Datastore.Audit"]),
    ];
    for (separated, (name, privileges, lacks)) in [false, true].into_iter().flat_map(|on| roles.iter().map(move |role| (on, role))) {
        let bed = start(Simulator::standard().with(|about| about.users[0].tokens[0].privsep = separated)).await;
        bed.sim.set_role("CSI", privileges);
        if separated {
            bed.sim.set_acl(vec![acl("/", "CSI"), Acl { who: "csi@pve!csi".into(), ..acl("/", "CSI") }]);
        }
        let created = bed.create_as(create_request("pvc-1", "local", 64 * MIB)).await;
        if lacks.is_empty() {
            let volume: VolumeHandle = created.unwrap().volume_id.parse().unwrap();
            bed.publish(&volume, "node-101/101").await.unwrap();
            bed.expand(&volume.to_string(), 128 * MIB, 0).await.unwrap();
            bed.unpublish(&volume, "node-101/101").await.unwrap();
            bed.delete(&volume.to_string()).await.unwrap();
            continue;
        }
        let refused = created.expect_err(name);
        for word in *lacks {
            assert!(refused.message().contains(word), "{name}, separated: {separated}: {} lacks {word}", refused.message());
        }
        assert!(bed.sim.volumes("pve1", "local").is_empty());
    }
}

/// The same for what a role may lack beside: what is there is neither attached nor deleted by half.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_lost_a_privilege_is_told_before_anything_is_touched() {
    let all = ["VM.Audit", "VM.Config.Disk", "Datastore.Allocate", "Datastore.AllocateSpace", "Datastore.Audit"];
    let cases = [("VM.Audit", "/vms"), ("VM.Config.Disk", "/vms/101"), ("Datastore.Allocate", "/storage/local")];
    for (lost, path) in cases {
        let bed = standard().await;
        let (volume, held) = (bed.volume("pvc-1", "local").await, bed.volume("pvc-2", "local").await);
        bed.publish(&held, "node-101/101").await.unwrap();
        // Another controller, which read nothing while it could.
        let fresh = again(&bed);
        let left: Vec<&str> = all.into_iter().filter(|privilege| *privilege != lost).collect();
        bed.sim.set_role("CSI", &left);
        let volumes = bed.sim.volumes("pve1", "local");
        let refused = match lost {
            "Datastore.Allocate" => delete_by(&fresh, &volume).await.expect_err("a deletion"),
            _ => publish_by(&fresh, &volume, "node-101/101").await.map(drop).expect_err("an attachment"),
        };
        assert!(refused.message().contains(lost) && refused.message().contains(path), "{lost}: {}", refused.message());
        assert_eq!(bed.traces(101, &held), ["configured scsi1", "plugged scsi1"], "{lost}");
        assert!(bed.traces(101, &volume).is_empty() && bed.sim.volumes("pve1", "local") == volumes, "{lost}");
    }
}

/// Privilege separation: the token needs an ACL of its own, and has no more than its user.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_with_privilege_separation_needs_its_own_acl() {
    let bed = start(Simulator::standard().with(|about| about.users[0].tokens[0].privsep = true)).await;
    let refused = bed.create_as(create_request("pvc-1", "local", 64 * MIB)).await.expect_err("no ACL of its own");
    assert!(refused.message().contains("Datastore.Audit"), "{}", refused.message());
    let of_token = Acl { who: "csi@pve!csi".into(), ..acl("/", "CSI") };
    bed.sim.set_acl(vec![acl("/", "CSI"), of_token]);
    let volume = bed.volume("pvc-1", "local").await;
    bed.publish(&volume, "node-101/101").await.unwrap();
    bed.unpublish(&volume, "node-101/101").await.unwrap();
    bed.delete(&volume.to_string()).await.unwrap();
}
