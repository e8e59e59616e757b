//! ControllerPublishVolume: who else holds it, what the VM can take, and everything that can go wrong on the way.

use proto::VolumeHandle;
use proto::csi;
use proto::csi::volume_capability::access_mode::Mode;
use testbed::sim::{Effect, Fault, Inner, Simulator, Version};
use tonic::Code;

use crate::bed::{MIB, assert_refused, capability, publish_request, release, standard, start, two_hosts, two_hosts_description};

const CONFIG: &str = "/nodes/*/qemu/*/config";

/// W02, W04: configured, planned and plugged all count.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_another_vm_holds_is_refused_in_every_view() {
    type Hold = fn(&Simulator, &str);
    let holds: &[(&str, Hold)] = &[
        ("configured", |sim, volid| sim.set_config(102, "scsi7", Some(volid))),
        ("planned", |sim, volid| sim.set_pending(102, "scsi7", volid)),
        ("configured", |sim, volid| {
            sim.set_config(102, "scsi7", Some(volid));
            sim.set_pending_delete(102, "scsi7");
        }),
        ("configured", |sim, volid| {
            sim.stop_vm(102);
            sim.set_config(102, "virtio3", Some(volid));
        }),
    ];
    for (view, hold) in holds {
        let bed = standard().await;
        let volume = bed.volume("pvc-1", "local").await;
        hold(&bed.sim, &volume.volid());
        assert_refused(bed.publish(&volume, "node-101/101").await, Code::FailedPrecondition, &["VM 102 on pve1", view]);
        assert!(bed.traces(101, &volume).is_empty());
        assert!(!bed.sim.requests().iter().any(|request| request.starts_with("POST") && request.contains("/qemu/")));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_qemu_has_and_no_config_explains_could_be_this_volume() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.publish(&volume, "node-102/102").await.unwrap();
    // Somebody edits the line out of the file of the running VM.
    bed.sim.set_config(102, "scsi1", None);
    let other = controller_again(&bed);
    let request = tonic::Request::new(publish_request(&volume, "node-101/101"));
    let answer = proto::csi::controller_server::Controller::controller_publish_volume(&other, request).await;
    assert_refused(answer, Code::FailedPrecondition, &["VM 102", "scsi1", "config says nothing"]);
    // The one that saw what was in the slot knows better.
    assert_refused(bed.unpublish(&volume, "node-102/102").await, Code::Unavailable, &["QEMU still has it as scsi1", "restart VM 102"]);
    bed.sim.stop_vm(102);
    bed.sim.start_vm(102).unwrap();
    bed.unpublish(&volume, "node-102/102").await.unwrap();
}

fn controller_again(bed: &crate::bed::Bed) -> controller::service::ControllerService {
    controller::service::ControllerService::new(std::sync::Arc::new(controller::run::Controller::new(bed.config.clone(), None)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_and_disks_set_aside_do_not_hold_but_are_no_reason_to_delete() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.sim.set_snapshot(102, "before", &[("scsi4", &volume.volid())]);
    bed.sim.set_config(102, "unused0", Some(&volume.volid()));
    assert_refused(
        bed.delete(&volume.to_string()).await,
        Code::FailedPrecondition,
        &["snapshot \"before\" of VM 102", "set aside as unused0"],
    );
    bed.publish(&volume, "node-101/101").await.unwrap();
    bed.unpublish(&volume, "node-101/101").await.unwrap();
    bed.sim.remove_snapshot(102, "before");
    bed.sim.set_config(102, "unused0", None);
    let other = controller_again(&bed);
    let request = csi::DeleteVolumeRequest { volume_id: volume.to_string(), ..Default::default() };
    proto::csi::controller_server::Controller::delete_volume(&other, tonic::Request::new(request)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_claims_the_higher_vmid_goes() {
    // Another controller writes its claim in the same moment: just before our own look after the write.
    for (own, rival, stays) in [(102, 101, false), (101, 102, false)] {
        let bed = standard().await;
        let volume = bed.volume("pvc-1", "local").await;
        let volid = volume.volid();
        bed.sim.before("POST", CONFIG, 1, move |sim| sim.set_config(rival, "scsi9", Some(&volid)));
        let answer = bed.publish(&volume, &format!("node-{own}/{own}")).await;
        assert_eq!(answer.is_ok(), stays);
        assert_refused(answer, Code::FailedPrecondition, &[&format!("VM {rival} on pve1"), "scsi9"]);
        assert!(bed.traces(own, &volume).is_empty(), "{:?}", bed.traces(own, &volume));
        assert_eq!(bed.traces(rival, &volume), ["configured scsi9"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lower_claim_stays_when_the_higher_one_goes() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    let volid = volume.volid();
    bed.sim.before("POST", CONFIG, 1, move |sim| sim.set_config(102, "scsi9", Some(&volid)));
    bed.sim.before("GET", "/nodes/*/qemu/102/pending", 3, |sim| sim.set_config(102, "scsi9", None));
    bed.publish(&volume, "node-101/101").await.unwrap();
    assert_eq!(bed.traces(101, &volume), ["configured scsi1", "plugged scsi1"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_cannot_take_a_disk_is_refused_before_any_write() {
    type Change = fn(&Simulator);
    let cases: &[(Change, Code, &[&str])] = &[
        (|sim| sim.stop_vm(101), Code::Unavailable, &["VM 101 is not running"]),
        (|sim| sim.set_config(101, "hotplug", Some("network,usb")), Code::FailedPrecondition, &["qm set 101 --hotplug disk,network,usb"]),
        (|sim| sim.set_config(101, "hotplug", Some("0")), Code::FailedPrecondition, &["qm set 101 --hotplug"]),
        (|sim| sim.set_config(101, "scsihw", Some("lsi")), Code::FailedPrecondition, &["qm set 101 --scsihw virtio-scsi-single"]),
        (|sim| sim.set_config(101, "scsihw", None), Code::FailedPrecondition, &["--scsihw"]),
        (|sim| sim.set_config(101, "template", Some("1")), Code::FailedPrecondition, &["template"]),
        (
            |sim| sim.set_config(101, "protection", Some("1")),
            Code::FailedPrecondition,
            &["protection: 1", "qm set 101 --protection 0", "attachToProtectedVMs: true"],
        ),
        (|sim| sim.set_hung(101, true), Code::Unavailable, &["QEMU of VM 101 does not answer"]),
        (
            |sim| (1..=29).for_each(|n| sim.set_config(101, &format!("scsi{n}"), Some("local:101/vm-101-disk-9.raw"))),
            Code::ResourceExhausted,
            &["no free slot"],
        ),
    ];
    for (change, code, words) in cases {
        let bed = standard().await;
        let volume = bed.volume("pvc-1", "local").await;
        change(&bed.sim);
        assert_refused(bed.publish(&volume, "node-101/101").await, *code, words);
        assert!(!bed.sim.requests().iter().any(|request| request.contains("/qemu/101/config")), "{words:?}");
    }
}

/// By the operator's word; its disks stay until the protection is taken off, which Proxmox says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_protected_vm_takes_disks_where_the_config_file_says_so() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.sim.set_config(101, "protection", Some("1"));
    let by = crate::owner::with_features(&bed, "{attachToProtectedVMs: true}");
    by.publish(&volume, "node-101/101").await.unwrap();
    assert_eq!(bed.traces(101, &volume), ["configured scsi1", "plugged scsi1"]);
    assert_refused(by.unpublish(&volume, "node-101/101").await, Code::FailedPrecondition, &["protection"]);
    assert_eq!(bed.traces(101, &volume), ["configured scsi1", "plugged scsi1"]);
    bed.sim.set_config(101, "protection", None);
    by.unpublish(&volume, "node-101/101").await.unwrap();
    assert!(bed.traces(101, &volume).is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_are_found_by_number_or_by_exact_name() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.publish(&volume, "node-101").await.unwrap();
    bed.unpublish(&volume, "node-101").await.unwrap();
    for node in ["fake-node-id", "node-10", "node-101/999", "NODE-101"] {
        assert_refused(bed.publish(&volume, node).await, Code::NotFound, &[node]);
    }
    bed.sim.set_config(102, "name", Some("node-101"));
    let other = controller_again(&bed);
    let request = tonic::Request::new(publish_request(&volume, "node-101"));
    let answer = proto::csi::controller_server::Controller::controller_publish_volume(&other, request).await;
    assert_refused(answer, Code::FailedPrecondition, &["101 and 102", "NAME/VMID"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_publish_is_refused() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    let good = || publish_request(&volume, "node-101/101");
    assert_refused(
        bed.publish_as(csi::ControllerPublishVolumeRequest { volume_capability: Some(capability(Mode::MultiNodeMultiWriter)), ..good() })
            .await,
        Code::InvalidArgument,
        &["MULTI_NODE_MULTI_WRITER"],
    );
    for id in ["fake-vol-id", "a/b", "fsn1/pve1/local/../x", "fsn1/pve1/local/a,ro=1", "nowhere/pve1/local/vm-9999-a"] {
        assert_refused(
            bed.publish_as(csi::ControllerPublishVolumeRequest { volume_id: id.into(), ..good() }).await,
            Code::NotFound,
            &[id.split('/').next().unwrap()],
        );
    }
    let missing: VolumeHandle = "fsn1/pve1/local/9999/vm-9999-nope.raw".parse().unwrap();
    assert_refused(bed.publish(&missing, "node-101/101").await, Code::NotFound, &["vm-9999-nope"]);
    assert!(bed.traces(101, &missing).is_empty());
    for storage in ["local-lvm", "local-zfs", "thick-lvm"] {
        let missing: VolumeHandle = format!("fsn1/pve1/{storage}/vm-9999-nope").parse().unwrap();
        assert_refused(bed.publish(&missing, "node-101/101").await, Code::NotFound, &["vm-9999-nope"]);
        assert!(bed.traces(101, &missing).is_empty(), "{storage}");
    }

    bed.publish_as(csi::ControllerPublishVolumeRequest { readonly: true, ..good() }).await.unwrap();
    assert!(bed.sim.vm(101).unwrap().config["scsi1"].contains(",ro=1"));
    assert_refused(bed.publish_as(good()).await, Code::AlreadyExists, &["scsi1", "readonly"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_on_another_host_is_out_of_reach() {
    let bed = two_hosts().await;
    let request = csi::CreateVolumeRequest {
        accessibility_requirements: crate::bed::topology(&["pve2"]),
        ..crate::bed::create_request("pvc-1", "ds", MIB)
    };
    let volume = bed.create_as(request).await.unwrap().volume_id.parse().unwrap();
    assert_refused(bed.publish(&volume, "node-101/101").await, Code::FailedPrecondition, &["pve2", "pve1", "local to each"]);
    bed.publish(&volume, "node-201/201").await.unwrap();
    // A VM that moved since the cluster was read is found.
    bed.unpublish(&volume, "node-201/201").await.unwrap();
    bed.sim.migrate_vm(101, "pve2");
    let other = controller_again(&bed);
    let request = tonic::Request::new(publish_request(&volume, "node-101/101"));
    proto::csi::controller_server::Controller::controller_publish_volume(&other, request).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_left_with_the_volume_in_its_config_still_counts() {
    let bed = two_hosts().await;
    let volume = bed.volume_on("pvc-1", "ds", "pve1").await;
    bed.publish(&volume, "node-102/102").await.unwrap();
    // HA moved it: its config names a disk that is not there.
    bed.sim.stop_vm(102);
    bed.sim.migrate_vm(102, "pve2");
    assert_refused(bed.publish(&volume, "node-101/101").await, Code::FailedPrecondition, &["VM 102 on pve2"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_phantom_is_removed_and_another_slot_tried() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.sim.inject_inner(Inner::PhantomAttach { vmid: 101 }, 1);
    if release() < Version::V8_4 {
        // That one says so.
        let words = &["device_add", "write", "something still has the volume open"];
        assert_refused(bed.publish(&volume, "node-101/101").await, Code::FailedPrecondition, words);
        assert!(bed.traces(101, &volume).is_empty());
        return;
    }
    let context = bed.publish(&volume, "node-101/101").await.unwrap();
    assert_eq!(context["lun"], "2");
    assert_eq!(context["DevicePath"], "/dev/disk/by-id/wwn-0x5056432d49443032");
    assert_eq!(bed.traces(101, &volume), ["configured scsi2", "plugged scsi2"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn phantoms_without_end_are_said_and_leave_nothing() {
    if release() < Version::V8_4 {
        // No refusal of QEMU is swallowed there: the test above says what is answered.
        return;
    }
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.sim.inject_inner(Inner::PhantomAttach { vmid: 101 }, 50);
    assert_refused(bed.publish(&volume, "node-101/101").await, Code::Internal, &["Proxmox said OK, but QEMU has no scsi2"]);
    assert!(bed.traces(101, &volume).is_empty());
    // Tries do not eat the VM's slots for ever.
    for _ in 0..5 {
        assert!(bed.publish(&volume, "node-101/101").await.is_err());
    }
    assert!(bed.sim.vm(101).unwrap().leaked.len() <= 6, "{:?}", bed.sim.vm(101).unwrap().leaked);
    assert_refused(bed.publish(&volume, "node-101/101").await, Code::FailedPrecondition, &["restart the VM"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leaked_slot_is_skipped_for_another() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.sim.set_leaked(101, "scsi1");
    bed.sim.set_leaked(101, "scsi2");
    let context = bed.publish(&volume, "node-101/101").await.unwrap();
    assert_eq!(context["lun"], "3");
    assert_eq!(bed.traces(101, &volume), ["configured scsi3", "plugged scsi3"]);
    // Known now: the next one costs nothing.
    let next = bed.volume("pvc-2", "local").await;
    bed.sim.reset_counters();
    assert_eq!(bed.publish(&next, "node-101/101").await.unwrap()["lun"], "4");
    assert!(bed.own_requests(101).len() <= 3, "{:?}", bed.own_requests(101));
}

/// W01: a hot-plug that failed is an error with Proxmox's words, and nothing of it stays planned.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_attach_is_reverted() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.sim.inject_inner(Inner::PlugFails { vmid: 101, text: "adding drive failed: something".into() }, 1);
    assert_refused(bed.publish(&volume, "node-101/101").await, Code::Internal, &["hotplug problem - adding drive failed"]);
    assert!(bed.traces(101, &volume).is_empty(), "{:?}", bed.traces(101, &volume));
    bed.publish(&volume, "node-101/101").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_earlier_crash_left_is_undone_first() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.sim.set_pending(101, "scsi5", &volume.volid());
    assert_eq!(bed.publish(&volume, "node-101/101").await.unwrap()["lun"], "1");
    assert_eq!(bed.traces(101, &volume), ["configured scsi1", "plugged scsi1"]);
    bed.unpublish(&volume, "node-101/101").await.unwrap();
    // A drive in the config that QEMU does not have: removed, never believed.
    bed.sim.set_config(101, "scsi5", Some(&volume.volid()));
    assert_eq!(bed.publish(&volume, "node-101/101").await.unwrap()["lun"], "1");
    assert_eq!(bed.traces(101, &volume), ["configured scsi1", "plugged scsi1"]);
    // A removal that was begun is finished, and the disk attached anew.
    bed.sim.set_pending_delete(101, "scsi1");
    bed.publish(&volume, "node-101/101").await.unwrap();
    assert_eq!(bed.traces(101, &volume).len(), 2);
    assert!(bed.sim.vm(101).unwrap().pending_delete.is_empty());
}

/// W43: what the proxy gives up on after 30 s goes on, and is looked after.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_answer_is_looked_after() {
    for effect in [Effect::CloseAfterwards, Effect::TimeOutButComplete] {
        let bed = standard().await;
        let volume = bed.volume("pvc-1", "local").await;
        bed.sim.inject(Fault::next("POST", CONFIG, effect.clone()));
        let mut answer = bed.publish(&volume, "node-101/101").await;
        for _ in 0..100 {
            if answer.is_ok() {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            answer = bed.publish(&volume, "node-101/101").await;
        }
        answer.unwrap();
        let traces = bed.traces(101, &volume);
        assert_eq!(traces, ["configured scsi1", "plugged scsi1"], "{effect:?}: one attachment, whatever was lost");
    }
    // Never arrived: told as it is, and done by the repeat.
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.sim.inject(Fault::next("POST", CONFIG, Effect::Close));
    assert_refused(bed.publish(&volume, "node-101/101").await, Code::Unavailable, &["outcome unknown"]);
    // It could still be carried out as far as we know: no delete, and no other VM, until that is settled.
    assert_refused(bed.delete(&volume.to_string()).await, Code::Unavailable, &["may still carry it out"]);
    assert_refused(bed.publish(&volume, "node-102/102").await, Code::Unavailable, &["may still carry it out"]);
    bed.publish(&volume, "node-101/101").await.unwrap();
    bed.unpublish(&volume, "node-101/101").await.unwrap();
    bed.publish(&volume, "node-102/102").await.unwrap();
}

/// Every write names the config that it was decided on; nothing undoes what came in between (W18 itself: modify.rs).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_digest_is_read_again_and_a_taken_slot_left() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.sim.before("POST", CONFIG, 1, |sim| sim.set_config(101, "scsi1", Some("local:101/vm-101-disk-5.raw")));
    assert_eq!(bed.publish(&volume, "node-101/101").await.unwrap()["lun"], "2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w57_a_locked_vm_is_waited_for_and_a_dead_host_is_unavailable() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.sim.set_lock(101, Some("backup"));
    let publish = |seconds| {
        let mut request = tonic::Request::new(publish_request(&volume, "node-101/101"));
        request.set_timeout(std::time::Duration::from_secs(seconds));
        csi::controller_server::Controller::controller_publish_volume(&bed.csi, request)
    };
    assert_refused(publish(2).await, Code::Unavailable, &["VM is locked (backup) since 20", "UTC", "qm unlock 101"]);
    assert!(bed.traces(101, &volume).is_empty());
    // Unlocked while the call waits.
    let sim = std::sync::Arc::clone(&bed.sim);
    bed.sim.before("GET", "/nodes/*/qemu/101/pending", 3, move |_| sim.set_lock(101, None));
    publish(60).await.unwrap();

    let bed = two_hosts().await;
    let volume = bed.volume_on("pvc-1", "ds", "pve2").await;
    bed.sim.set_node_unreachable("pve2", Some("595 No route to host"));
    let other = controller_again(&bed);
    let request = tonic::Request::new(publish_request(&volume, "node-201/201"));
    let answer = proto::csi::controller_server::Controller::controller_publish_volume(&other, request).await;
    assert_refused(answer, Code::Unavailable, &["pve2"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_cannot_be_read_is_named() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    bed.sim.inject(Fault::next("GET", "/nodes/*/qemu/102/pending", Effect::Answer { status: 500, reason: "got timeout".into() }));
    assert_refused(bed.publish(&volume, "node-101/101").await, Code::Internal, &["whether VM 102 on pve1 holds", "got timeout"]);
    bed.sim.set_hung(102, true);
    let other = controller_again(&bed);
    let request = tonic::Request::new(publish_request(&volume, "node-101/101"));
    let answer = proto::csi::controller_server::Controller::controller_publish_volume(&other, request).await;
    assert_refused(answer, Code::Unavailable, &["VM 102", "QEMU does not answer"]);
}

/// W03: nor does a drive that exists get another identity.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drive_of_the_reference_driver_keeps_its_names() {
    let bed = standard().await;
    let volume = bed.volume("pvc-1", "local").await;
    let line = format!("{},backup=0,iothread=1,replicate=0,size=64M,wwn=0x5056432d49443037", volume.volid());
    bed.sim.stop_vm(101);
    bed.sim.set_config(101, "scsi3", Some(&line));
    bed.sim.start_vm(101).unwrap();
    let context = bed.publish(&volume, "node-101/101").await.unwrap();
    assert_eq!((context["lun"].as_str(), context["DevicePath"].as_str()), ("3", "/dev/disk/by-id/wwn-0x5056432d49443037"));
    assert!(!context.contains_key("serial"), "it has none, and none is written onto a live drive");
    assert_eq!(context["sizeBytes"], (64 * MIB).to_string());
    assert!(!bed.sim.vm(101).unwrap().config["scsi3"].contains("serial"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_proxmox_version_attaches_and_detaches() {
    for version in [Version::V8_2, Version::V8_4, Version::V9_0, Version::V9_2] {
        let bed = crate::bed::start_as_it_is(Simulator::builder(two_hosts_description()).version(version)).await;
        let volume = bed.volume_on("pvc-1", "ds", "pve1").await;
        bed.publish(&volume, "node-101/101").await.unwrap();
        bed.expand(&volume.to_string(), 128 * MIB, 0).await.unwrap();
        bed.unpublish(&volume, "node-101/101").await.unwrap();
        bed.delete(&volume.to_string()).await.unwrap();
    }
}

/// W49: slots that are taken are not offered, and a full VM is RESOURCE_EXHAUSTED.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thirty_volumes_at_once_get_thirty_answers() {
    let bed = std::sync::Arc::new(standard().await);
    let mut publishing = tokio::task::JoinSet::new();
    for n in 0..30 {
        let bed = std::sync::Arc::clone(&bed);
        publishing.spawn(async move {
            let volume = bed.volume(&format!("pvc-{n}"), "local-lvm").await;
            bed.publish(&volume, "node-101/101").await
        });
    }
    let answers = publishing.join_all().await;
    let mut luns: Vec<u32> = answers.iter().flatten().map(|context| context["lun"].parse().unwrap()).collect();
    luns.sort_unstable();
    assert_eq!(luns, (1..=29).collect::<Vec<_>>());
    let full = answers.into_iter().find(Result::is_err).unwrap();
    assert_refused(full, Code::ResourceExhausted, &["no free slot from scsi1 to scsi29"]);
}

/// Hosts pve1 and pve2 with a storage that both see, and a volume of the reference driver on it.
async fn shared_bed() -> (crate::bed::Bed, VolumeHandle) {
    let mut description = two_hosts_description();
    let mut san = testbed::sim::Storage::new("san", "lvm", &[("vgname", "san")]);
    san.shared = Some(true);
    description = description.storage(san);
    let bed = start(Simulator::builder(description)).await;
    let volume: VolumeHandle = "fsn1//san/vm-9999-a".parse().unwrap();
    bed.sim.create_volume("pve1", &volume.volid(), 64 * MIB).unwrap();
    (bed, volume)
}

/// What a pod has deleted is room again on a storage that is thin; a thick one has nothing to give back, unless its class says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drives_give_room_back_where_that_is_worth_something() {
    let (bed, thick) = shared_bed().await;
    let mut lun = 0;
    for (volume, class, expected) in [
        (thick.clone(), None, None),
        ("fsn1//san/vm-9999-b".parse().unwrap(), Some("on"), Some("discard=on")),
        ("fsn1/pve1/ds/9999/vm-9999-c.raw".parse().unwrap(), None, Some("discard=on")),
        ("fsn1/pve1/ds/9999/vm-9999-d.raw".parse().unwrap(), Some("ignore"), Some("discard=ignore")),
    ] {
        let volume: VolumeHandle = volume;
        if volume != thick {
            bed.sim.create_volume("pve1", &volume.volid(), 64 * MIB).unwrap();
        }
        let mut request = publish_request(&volume, "node-101/101");
        request.volume_context.extend(class.map(|class| (proto::volume_context::DISCARD.to_string(), class.to_string())));
        bed.publish_as(request).await.unwrap();
        lun += 1;
        let drive = bed.sim.vm(101).unwrap().config[&format!("scsi{lun}")].clone();
        assert_eq!(drive.split(',').find(|option| option.starts_with("discard=")), expected, "{drive}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_shared_storage_every_vm_of_the_cluster_counts() {
    let (bed, volume) = shared_bed().await;
    bed.publish(&volume, "node-201/201").await.unwrap();
    assert_refused(bed.publish(&volume, "node-101/101").await, Code::FailedPrecondition, &["VM 201 on pve2"]);
    // A host that is off cannot let go: what its VMs held counts, and what they did not hold does not stop others.
    let other: VolumeHandle = "fsn1//san/vm-9999-b".parse().unwrap();
    bed.sim.create_volume("pve1", &other.volid(), 64 * MIB).unwrap();
    bed.sim.set_node_unreachable("pve2", Some("595 No route to host"));
    let refused = bed.publish(&volume, "node-101/101").await;
    assert_refused(refused, Code::FailedPrecondition, &["VM 201 on pve2"]);
    bed.publish(&other, "node-101/101").await.unwrap();
    // One that was never read could hold anything.
    let fresh = controller_again(&bed);
    let request = tonic::Request::new(publish_request(&other, "node-102/102"));
    let answer = proto::csi::controller_server::Controller::controller_publish_volume(&fresh, request).await;
    assert_refused(answer, Code::Unavailable, &["VM 201 on pve2", "was not read before"]);
    // A new one is nobody's yet.
    assert_eq!(bed.volume("pvc-1", "san").await.to_string(), "fsn1//san/vm-9999-pvc-1");
}
