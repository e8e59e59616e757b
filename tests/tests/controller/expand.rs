//! ControllerExpandVolume: attached disks only, the very slot, and a half done resize told to QEMU.

use proto::csi::{self, controller_server::Controller as _};
use testbed::sim::{Fault, Inner, Simulator, Storage, Vm};
use tonic::Code;

use crate::bed::{MIB, assert_refused, create_request, standard};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_nobody_holds_grows_when_a_pod_uses_it() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    assert_refused(
        bed.expand(&volume.to_string(), 128 * MIB, 0).await,
        Code::FailedPrecondition,
        &["Proxmox grows attached disks only; it grows when a pod uses it"],
    );
    assert_eq!(bed.expand(&volume.to_string(), 64 * MIB, 0).await.unwrap().capacity_bytes, 64 << 20, "large enough already");
    bed.publish(&volume, "node-101/101").await.unwrap();
    assert_eq!(bed.expand(&volume.to_string(), 128 * MIB, 128 * MIB).await.unwrap().capacity_bytes, 128 << 20);
    assert!(bed.sim.vm(101).unwrap().config["scsi1"].contains("size=128M"));
    bed.unpublish(&volume, "node-101/101").await.unwrap();
    assert_eq!(bed.expand(&volume.to_string(), 128 * MIB, 0).await.unwrap().capacity_bytes, 128 << 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_that_came_since_the_last_reading_is_found() {
    let bed = standard().await;
    let (warm, volume) = (bed.volume("pvc-0", "local").await, bed.volume("pvc-1", "local").await);
    bed.publish(&warm, "node-101/101").await.unwrap();
    let line = format!("{},size=64M", volume.volid());
    bed.sim.stop_vm(102);
    bed.sim.set_config(102, "scsi4", Some(&line));
    bed.sim.start_vm(102).unwrap();
    assert_eq!(bed.expand(&volume.to_string(), 128 * MIB, 0).await.unwrap().capacity_bytes, 128 << 20);
    assert!(bed.sim.vm(102).unwrap().config["scsi4"].contains("size=128M"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_expand_is_refused() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.publish(&volume, "node-101/101").await.unwrap();
    let id = volume.to_string();
    assert_refused(bed.expand("", MIB, 0).await, Code::InvalidArgument, &["volume_id"]);
    assert_refused(bed.expand(&id, 0, 0).await, Code::InvalidArgument, &["size 0"]);
    assert_refused(bed.expand(&id, 2 * MIB, MIB).await, Code::InvalidArgument, &["limit_bytes", "below required_bytes"]);
    assert_refused(bed.expand("nonsense", MIB, 0).await, Code::NotFound, &["nonsense"]);
    assert_refused(bed.expand("fsn1/pve1/local/9999/vm-9999-nope.raw", MIB, 0).await, Code::NotFound, &["vm-9999-nope"]);
    assert_refused(bed.expand(&id, MIB, 2 * MIB).await, Code::OutOfRange, &["cannot be made smaller"]);
    let lvm = bed.volume("pvc-2", "local-lvm").await;
    bed.publish(&lvm, "node-101/101").await.unwrap();
    assert_refused(bed.expand(&lvm.to_string(), 65 * MIB, 66 * MIB).await, Code::OutOfRange, &["steps of 4194304"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resize_that_qemu_was_not_told_of_is_told_with_one_step_more() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.publish(&volume, "node-101/101").await.unwrap();
    bed.sim.inject_inner(Inner::ResizeSecondHalf { vmid: 101 }, 1);
    assert!(bed.expand(&volume.to_string(), 128 * MIB, 0).await.is_err());
    assert!(bed.sim.vm(101).unwrap().config["scsi1"].contains("size=64M"));
    let grown = bed.expand(&volume.to_string(), 128 * MIB, 0).await.unwrap();
    assert_eq!(grown.capacity_bytes, (128 << 20) + 1024, "an equal size would tell QEMU nothing");
    assert_eq!(bed.expand(&volume.to_string(), 128 * MIB, 0).await.unwrap().capacity_bytes, (128 << 20) + 1024);
    // Where the limit leaves no step, a person must know.
    bed.sim.inject_inner(Inner::ResizeSecondHalf { vmid: 101 }, 1);
    assert!(bed.expand(&volume.to_string(), 256 * MIB, 256 * MIB).await.is_err());
    assert_refused(bed.expand(&volume.to_string(), 256 * MIB, 256 * MIB).await, Code::OutOfRange, &["QEMU was not told", "restart VM 101"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_changed_hands_is_not_resized() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.publish(&volume, "node-101/101").await.unwrap();
    bed.sim.before("PUT", "/nodes/*/qemu/*/resize", 1, |sim| sim.set_config(101, "scsi1", Some("local:101/vm-101-disk-5.raw,size=1M")));
    assert_refused(bed.expand(&volume.to_string(), 128 * MIB, 0).await, Code::Unavailable, &["VM 101 does not have it configured"]);
    assert!(bed.sim.vm(101).unwrap().config["scsi1"].contains("size=1M"), "another volume's slot stays as it was");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proxmoxs_word_for_a_missing_privilege_of_a_task_is_kept() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.publish(&volume, "node-101/101").await.unwrap();
    bed.sim.set_role("CSI", &["VM.Audit", "VM.Config.Disk", "Datastore.Allocate", "Datastore.Audit"]);
    assert_refused(
        bed.expand(&volume.to_string(), 128 * MIB, 0).await,
        Code::PermissionDenied,
        &["UPID:pve1:", "Permission check failed (/storage/local, Datastore.AllocateSpace)"],
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_answer_to_resize_is_looked_after_by_the_repeat() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "thick-lvm").await;
    bed.publish(&volume, "node-101/101").await.unwrap();
    bed.sim.inject(Fault::next("PUT", "/nodes/*/qemu/*/resize", testbed::sim::Effect::CloseAfterwards));
    assert_refused(bed.expand(&volume.to_string(), 128 * MIB, 0).await, Code::Unavailable, &["outcome unknown"]);
    let grown = bed.expand(&volume.to_string(), 128 * MIB, 0).await.unwrap();
    assert!(grown.capacity_bytes >= 128 << 20);
    let shown = bed.sim.vm(101).unwrap().config["scsi1"].clone();
    assert!(shown.contains("size=128M") || shown.contains("size=132M"), "{shown}");
    let _ = create_request("x", "local", 1);
}

/// W37, W62: one VM that cannot be read stops its own volumes only, and nobody is asked but the holder.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w37_a_vm_that_cannot_be_read_does_not_stop_the_others_volumes() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.publish(&volume, "node-101/101").await.unwrap();
    let broken = testbed::sim::Effect::Answer { status: 500, reason: "got timeout".into() };
    bed.sim.inject(Fault::next("GET", "/nodes/*/qemu/102/**", broken).times(100));
    bed.sim.reset_counters();
    bed.expand(&volume.to_string(), 128 * MIB, 0).await.unwrap();
    let requests: Vec<String> = bed.sim.requests().into_iter().filter(|request| !request.contains("/tasks/")).collect();
    assert!(requests.len() <= 3, "{requests:?}");
    // The next controller knows nobody, and finds the holder though 102 does not answer.
    let fresh = crate::hold::again(&bed);
    let range = Some(csi::CapacityRange { required_bytes: 192 << 20, limit_bytes: 0 });
    let request = csi::ControllerExpandVolumeRequest { volume_id: volume.to_string(), capacity_range: range, ..Default::default() };
    fresh.controller_expand_volume(tonic::Request::new(request)).await.unwrap();
}

/// W55: it grows where its VM runs now, not where its id says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w55_a_volume_grows_where_its_vm_runs_now() {
    let (bed, volume) = crate::hold::shared_bed().await;
    bed.publish(&volume, "node-201/201").await.unwrap();
    bed.sim.migrate_vm(201, "pve1");
    let fresh = crate::hold::again(&bed);
    let range = Some(csi::CapacityRange { required_bytes: 128 << 20, limit_bytes: 0 });
    let request = csi::ControllerExpandVolumeRequest { volume_id: volume.to_string(), capacity_range: range, ..Default::default() };
    fresh.controller_expand_volume(tonic::Request::new(request)).await.unwrap();
    assert!(bed.sim.vm(201).unwrap().config["scsi1"].contains("size=128M"));
}

/// W57: a backup holds the VM for a while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w57_expand_waits_for_a_locked_vm() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.publish(&volume, "node-101/101").await.unwrap();
    bed.sim.set_lock(101, Some("backup"));
    let range = Some(csi::CapacityRange { required_bytes: 128 << 20, limit_bytes: 0 });
    let request = csi::ControllerExpandVolumeRequest { volume_id: volume.to_string(), capacity_range: range, ..Default::default() };
    let expand = |seconds| {
        let mut request = tonic::Request::new(request.clone());
        request.set_timeout(std::time::Duration::from_secs(seconds));
        bed.csi.controller_expand_volume(request)
    };
    assert_refused(expand(2).await, Code::Unavailable, &["VM is locked (backup) since"]);
    let sim = std::sync::Arc::clone(&bed.sim);
    bed.sim.before("GET", "/nodes/*/qemu/101/pending", 2, move |_| sim.set_lock(101, None));
    expand(60).await.unwrap();
}

/// Disks of one name on two nodes' own storages: the other node's VM keeps its drive as it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namesake_on_another_nodes_own_storage_is_not_grown() {
    let bed = crate::bed::two_hosts().await;
    let volume = bed.volume_on("pvc-1", "ds", "pve1").await;
    let namesake = proto::VolumeHandle { zone: "pve2".into(), ..volume.clone() };
    bed.sim.create_volume("pve2", &namesake.volid(), 64 * MIB).unwrap();
    bed.publish(&namesake, "node-201/201").await.unwrap();
    assert_refused(bed.expand(&volume.to_string(), 128 * MIB, 0).await, Code::FailedPrecondition, &["attached disks only"]);
    assert!(bed.sim.vm(201).unwrap().config["scsi1"].contains("size=64M"));
    bed.expand(&namesake.to_string(), 128 * MIB, 0).await.unwrap();
    assert!(bed.sim.vm(201).unwrap().config["scsi1"].contains("size=128M"));
}

/// What a VM lost while its node was off, and still names, tells nothing to the QEMU of the VM that has it now.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leftover_with_the_lower_number_is_not_grown_in_its_holders_place() {
    let mut san = Storage::new("san", "lvm", &[("vgname", "san")]);
    san.shared = Some(true);
    let about = crate::bed::two_hosts_description().storage(san).vm(Vm::linux(100, "pve2", "node-100", None));
    let bed = crate::bed::start(Simulator::builder(about)).await;
    let volume: proto::VolumeHandle = "fsn1//san/vm-9999-a".parse().unwrap();
    bed.sim.create_volume("pve1", &volume.volid(), 64 * MIB).unwrap();
    bed.publish(&volume, "node-100/100").await.unwrap();
    bed.sim.set_node_unreachable("pve2", Some("595 No route to host"));
    crate::dead::fence(&bed, "pve2").await;
    bed.unpublish(&volume, "node-100/100").await.unwrap();
    bed.publish(&volume, "node-101/101").await.unwrap();
    bed.sim.set_node_unreachable("pve2", None);
    crate::dead::fence(&bed, "").await;
    bed.sim.advance(std::time::Duration::from_secs(61));
    bed.expand(&volume.to_string(), 128 * MIB, 0).await.unwrap();
    assert!(bed.sim.vm(101).unwrap().config["scsi1"].contains("size=128M"));
    assert!(bed.sim.vm(100).unwrap().config["scsi1"].contains("size=64M"), "the leftover stays as it was");
    // The next controller has no note, and nobody explains the two.
    let fresh = crate::hold::again(&bed);
    let range = Some(csi::CapacityRange { required_bytes: 192 << 20, limit_bytes: 0 });
    let request = csi::ControllerExpandVolumeRequest { volume_id: volume.to_string(), capacity_range: range, ..Default::default() };
    let words = ["VM 100 on pve2", "VM 101 on pve1", "detach it from all but one"];
    assert_refused(fresh.controller_expand_volume(tonic::Request::new(request)).await, Code::FailedPrecondition, &words);
}
