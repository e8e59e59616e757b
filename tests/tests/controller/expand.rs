//! ControllerExpandVolume: attached disks only, the very slot, and a half done resize told to QEMU.

use testbed::sim::{Fault, Inner};
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
