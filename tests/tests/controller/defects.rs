//! Defects of the reference driver that have no test elsewhere, by their numbers.

use std::collections::HashMap;

use proto::VolumeHandle;
use proto::csi;
use tonic::Code;

use crate::bed::{MIB, assert_refused, create_request, publish_request, standard, two_hosts};
use crate::hold::{again, publish_by};

/// W03: a drive's WWN is the one that it has, not the one of its slot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w03_the_wwn_is_the_drives_own() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.sim.stop_vm(101);
    bed.sim.set_config(101, "scsi3", Some(&format!("{},size=64M,wwn=0x5056432d49443037", volume.volid())));
    bed.sim.start_vm(101).unwrap();
    let context = bed.publish(&volume, "node-101/101").await.unwrap();
    assert_eq!((context["lun"].as_str(), context["DevicePath"].as_str()), ("3", "/dev/disk/by-id/wwn-0x5056432d49443037"));
}

/// W07, W08, W09, W10, W34, W35, W40, W56: no copies, no snapshots, no replicas in this version, and none is pretended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w07_to_w10_what_is_not_built_is_refused() {
    let bed = standard().await;
    let source = csi::VolumeContentSource {
        r#type: Some(csi::volume_content_source::Type::Volume(csi::volume_content_source::VolumeSource { volume_id: "a/b/c/d".into() })),
    };
    let request = csi::CreateVolumeRequest { volume_content_source: Some(source), ..create_request("pvc-1", "local", MIB) };
    assert_refused(bed.create_as(request).await, Code::InvalidArgument, &["volume_content_source"]);
    let mut request = create_request("pvc-1", "local-zfs", MIB);
    request.parameters.insert("replicateSchedule".into(), "*/15".into());
    assert_refused(bed.create_as(request).await, Code::InvalidArgument, &["replicateSchedule", "no replication"]);
    assert!(bed.sim.volumes("pve1", "local").is_empty());
}

/// W20: a volume that by its name is the VM's own is set aside there at its detach, and is not deleted before that is over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w20_a_static_volume_that_a_vm_owns_is_not_lost() {
    let bed = standard().await;
    let volume: VolumeHandle = "fsn1/pve1/local-lvm/vm-101-disk-5".parse().unwrap();
    bed.sim.create_volume("pve1", &volume.volid(), 64 * MIB).unwrap();
    bed.publish(&volume, "node-101/101").await.unwrap();
    bed.unpublish(&volume, "node-101/101").await.unwrap();
    assert_eq!(bed.sim.vm(101).unwrap().config["unused0"], volume.volid());
    assert_refused(bed.delete(&volume.to_string()).await, Code::FailedPrecondition, &["by its name it is VM 101's"]);
    // Nor where the config file says that such are ours to delete.
    let also = crate::owner::with_features(&bed, "{deleteAlsoOwnedBy: [101]}");
    assert_refused(also.delete(&volume.to_string()).await, Code::FailedPrecondition, &["VM 101 on pve1 has it set aside as unused0"]);
    bed.publish(&volume, "node-102/102").await.unwrap();
    bed.unpublish(&volume, "node-102/102").await.unwrap();
    assert_eq!(bed.sim.volumes("pve1", "local-lvm").len(), 1);
}

/// W33: that the filesystem is to grow is said at each attach, not only at the first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w33_a_repeated_attach_still_says_that_the_filesystem_grows() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    let request = csi::ControllerPublishVolumeRequest {
        volume_context: HashMap::from([(proto::volume_context::RESIZE_REQUIRED.to_string(), "1".to_string())]),
        ..publish_request(&volume, "node-101/101")
    };
    for _ in 0..3 {
        let context = bed.publish_as(request.clone()).await.unwrap();
        assert_eq!(context[proto::publish_context::RESIZE_REQUIRED], "true");
    }
}

/// W36: a volume with another number in its name is deleted where the config file says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w36_volumes_of_earlier_owners_are_deleted() {
    let plain = standard().await;
    let bed = crate::owner::with_features(&plain, "{deleteAlsoOwnedBy: [100, 4711]}");
    for disk in ["vm-100-disk-7", "vm-4711-pvc-a"] {
        let volume: VolumeHandle = format!("fsn1/pve1/local-lvm/{disk}").parse().unwrap();
        bed.sim.create_volume("pve1", &volume.volid(), 64 * MIB).unwrap();
        bed.delete(&volume.to_string()).await.unwrap();
    }
    assert!(bed.sim.volumes("pve1", "local-lvm").is_empty());
}

/// W37, W38: the numbers of a silent host are gone; its VMs are still known by number, and others are not mistaken for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w38_a_vm_without_a_name_is_found_by_number_and_none_by_half_a_name() {
    let bed = two_hosts().await;
    let volume = bed.volume_on("pvc-1", "ds", "pve1").await;
    bed.sim.set_fresh(102, true);
    bed.sim.set_config(102, "name", Some("node-1010"));
    assert_refused(bed.publish(&volume, "node-10").await, Code::Unavailable, &["VM 102 on pve1 shows no name now"]);
    bed.sim.set_fresh(102, false);
    let fresh = again(&bed);
    assert_refused(publish_by(&fresh, &volume, "node-10").await, Code::NotFound, &["node-10", "no such VM"]);
    bed.sim.set_fresh(101, true);
    let fresh = again(&bed);
    publish_by(&fresh, &volume, "node-101/101").await.unwrap();
}

/// W42: the format is said, whatever the storage's own is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w42_a_volume_is_raw_where_the_storage_would_make_qcow2() {
    let bed = standard().await;
    bed.sim.change_storage("local", |about| drop(about.options.insert("format".into(), "qcow2".into())));
    let volume = bed.volume("pvc-1", "local").await;
    assert!(volume.disk.ends_with(".raw"), "{volume}");
    bed.publish(&volume, "node-101/101").await.unwrap();
}

/// W52: of a VM's config only drives and a few options are read; whatever else is in it stops nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w52_odd_lines_of_a_config_stop_nothing() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    for (key, value) in
        [("cores", "many"), ("memory", "-1"), ("net0", ""), ("tags", "a;b,c=d"), ("vmgenid", "\u{fc}"), ("ide2", "none,media=cdrom")]
    {
        bed.sim.set_config(101, key, Some(value));
    }
    bed.publish(&volume, "node-101/101").await.unwrap();
    bed.expand(&volume.to_string(), 128 * MIB, 0).await.unwrap();
    bed.unpublish(&volume, "node-101/101").await.unwrap();
    bed.delete(&volume.to_string()).await.unwrap();
}
