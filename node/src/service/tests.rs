use std::time::Duration;

use proto::csi::node_server::Node as _;

use super::*;
use crate::request::Folders;
use crate::run::Usage;
use crate::testing::volume;
use crate::{identity, probe, sys};

fn service() -> Service {
    let folders = Folders::new(vec!["/nowhere/kubelet".into()]).unwrap();
    Service::new(Node::new(folders), Configured { node_id: "worker-1/107".into(), region: Some("r".into()), ..Configured::default() })
}

/// Runs one future without I/O.
fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

#[test]
fn every_cause_has_its_code() {
    let sys_error = || sys::Error { call: "open", subject: "/dev/sda".into(), errno: rustix::io::Errno::IO };
    let refused = |refusal| Cause::Refused(refusal);
    let what = String::new;
    let waited = Duration::from_secs(1);
    for (cause, expected) in [
        (refused(plan::Refusal::NotPublishedHere { what: what() }), Code::NotFound),
        (refused(plan::Refusal::OtherMode { read_only: true }), Code::AlreadyExists),
        (refused(plan::Refusal::StagedAsFilesystem), Code::AlreadyExists),
        (refused(plan::Refusal::SecondTarget { at: "/t".into() }), Code::FailedPrecondition),
        (refused(plan::Refusal::HoldsOther { what: what() }), Code::FailedPrecondition),
        (Cause::Disk(identity::Refusal::InUse { disk: what(), at: "/t".into() }), Code::FailedPrecondition),
        (Cause::StillHeld { waited, disk: what(), by: what() }, Code::FailedPrecondition),
        (Cause::Label { refused: Box::new(sys_error().into()), label: "context=a:b:c" }, Code::Internal),
        (Cause::InTrouble(what()), Code::FailedPrecondition),
        (Cause::Outside { real: "/etc".into() }, Code::InvalidArgument),
        (Cause::Geometry(what()), Code::InvalidArgument),
        (Cause::Crowded { waited, by: what() }, Code::Unavailable),
        (Cause::BeingMounted { waited, disk: what() }, Code::Unavailable),
        (Cause::NoDisk { waited, why: what() }, Code::Unavailable),
        (Cause::SizeNotSeen { waited, size_bytes: 1, required_bytes: 2 }, Code::Unavailable),
        (Cause::Sys(sys_error()), Code::Internal),
        (Cause::Probe(probe::Error(sys_error())), Code::Internal),
        (Cause::NoEnd { turns: 1 }, Code::Internal),
    ] {
        assert_eq!(code(&cause), expected, "{cause:?}");
    }
}

#[test]
fn requests_are_answered_as_csi_sanity_asks() {
    let service = service();
    let stage = csi::NodeStageVolumeRequest { volume_id: "fake-vol-id".into(), ..Default::default() };
    let stage = run(service.node_stage_volume(Request::new(stage))).unwrap_err();
    assert_eq!((stage.code(), stage.message()), (Code::InvalidArgument, "stage fake-vol-id: staging_target_path is missing"));
    let stats = csi::NodeGetVolumeStatsRequest { volume_id: "fake-vol-id".into(), volume_path: "some/path".into(), ..Default::default() };
    assert_eq!(run(service.node_get_volume_stats(Request::new(stats))).unwrap_err().code(), Code::NotFound);
    let expand = csi::NodeExpandVolumeRequest { volume_id: "fake-vol-id".into(), volume_path: "some/path".into(), ..Default::default() };
    assert_eq!(run(service.node_expand_volume(Request::new(expand))).unwrap_err().code(), Code::NotFound);
    let id = "r/z/s/vm-9999-pvc-1".to_string();
    let stats = csi::NodeGetVolumeStatsRequest { volume_id: id.clone(), volume_path: "/nowhere/kubelet/t".into(), ..Default::default() };
    assert_eq!(run(service.node_get_volume_stats(Request::new(stats))).unwrap_err().code(), Code::NotFound);
    let unpublish = csi::NodeUnpublishVolumeRequest { volume_id: id.clone(), target_path: "/nowhere/kubelet/t".into() };
    assert!(run(service.node_unpublish_volume(Request::new(unpublish))).is_ok(), "never published: nothing is left to do");
    let unstage = csi::NodeUnstageVolumeRequest { volume_id: id, staging_target_path: "/nowhere/kubelet/s".into() };
    assert!(run(service.node_unstage_volume(Request::new(unstage))).is_ok(), "never staged: nothing is left to do");
}

#[test]
fn without_a_zone_info_says_what_to_set_and_a_later_call_may_succeed() {
    let unknown = run(service().node_get_info(Request::new(csi::NodeGetInfoRequest {}))).unwrap_err();
    assert_eq!(unknown.code(), Code::Unavailable);
    assert!(unknown.message().contains("--zone"), "{unknown:?}");
}

#[test]
fn a_second_call_on_a_busy_volume_is_aborted_until_the_first_has_ended() {
    let service = service();
    let (first, second) = (volume("r/z/s/vm-9999-pvc-1"), volume("r/z/s/vm-9999-pvc-2"));
    run(async {
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let begun = Arc::new(tokio::sync::Notify::new());
        let (there, asked) = (service.clone(), first.clone());
        let working = Arc::clone(&begun);
        let call = tokio::spawn(async move {
            there
                .work("stage", &asked, move |_| {
                    working.notify_one();
                    wait.recv().unwrap();
                    Ok(())
                })
                .await
        });
        begun.notified().await;
        let status = service.work("unstage", &first, |_| Ok(())).await.unwrap_err();
        assert_eq!(status.code(), Code::Aborted);
        assert!(status.message().starts_with("r/z/s/vm-9999-pvc-1: another call"), "{status:?}");
        let alias = volume("r//s/vm-9999-pvc-1");
        assert_eq!(service.work("unstage", &alias, |_| Ok(())).await.unwrap_err().code(), Code::Aborted, "the same disk by another handle");
        assert!(service.work("unstage", &second, |_| Ok(())).await.is_ok(), "another volume is free");
        // The caller goes away; the work goes on and keeps the volume.
        call.abort();
        assert!(call.await.unwrap_err().is_cancelled());
        assert_eq!(service.work("unstage", &first, |_| Ok(())).await.unwrap_err().code(), Code::Aborted);
        go.send(()).unwrap();
    });
    // The runtime has waited for the thread.
    assert!(service.busy.hold(&first.serial, "stage").is_ok());
}

#[test]
fn usage_counts_are_total_used_available() {
    let stats = |bytes, inodes| Stats { usage: Usage { bytes, inodes }, trouble: None };
    let answer = told(stats([10, 7, 2], Some([5, 4, 1])));
    let counts: Vec<_> = answer.usage.iter().map(|usage| (usage.unit, usage.total, usage.used, usage.available)).collect();
    assert_eq!(counts, [(Unit::Bytes.into(), 10, 7, 2), (Unit::Inodes.into(), 5, 4, 1)]);
    assert_eq!(told(stats([u64::MAX, 0, 0], None)).usage[0].total, i64::MAX);
    assert!(!answer.volume_condition.unwrap().abnormal);
    let ill = Stats { trouble: Some("the ext4 on sdb is ill; do something".into()), ..stats([1, 1, 0], None) };
    let condition = told(ill).volume_condition.unwrap();
    assert!(condition.abnormal && condition.message == "the ext4 on sdb is ill; do something");
}

#[test]
fn the_outcome_of_a_call_that_is_too_late_is_counted_and_keys_are_not_blamed_on_a_disk() {
    let busy = Busy::default();
    let held = busy.hold("csi-1", "stage").unwrap();
    assert!(overdue(&volume("r/z/s/vm-9999-pvc-1"), &held.progress).contains("the disk does not answer"));
    let before = metrics::FILESYSTEM_ERRORS.value();
    run(async {
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let volume = volume("r/z/s/vm-9999-pvc-1");
        let work = Box::new(move || {
            wait.recv().unwrap();
            let cause = Cause::NotGrown { blocks: 1, wanted_blocks: 2, block_size: 4096 };
            Some(Error { doing: "stage", volume: String::new(), step: "grow the filesystem", cause: Box::new(cause) })
        });
        let late = within(&volume, held, Duration::ZERO, work).await.unwrap_err();
        assert_eq!(late.code(), Code::DeadlineExceeded);
        assert!(busy.hold("csi-1", "unstage").is_err(), "it goes on");
        go.send(()).unwrap();
    });
    // The runtime has waited for the thread.
    assert!(metrics::FILESYSTEM_ERRORS.value() > before && busy.hold("csi-1", "unstage").is_ok());
}

/// A disk that answers no more costs a thread for each look at it that is let in.
#[test]
fn a_volume_is_looked_at_so_often_at_one_time_whatever_paths_are_asked_about() {
    let looks = Busy::default();
    let look = |volume: &str, path: &str| looks.hold_among(volume, &format!("{volume} {path}"), 2);
    let first = look("csi-1", "/a").unwrap();
    assert!(look("csi-1", "/a").is_err(), "the same path");
    let _second = look("csi-1", "/b").unwrap();
    assert!(look("csi-1", "/c").is_err());
    let _another = look("csi-2", "/c").unwrap();
    drop(first);
    assert!(look("csi-1", "/c").is_ok());
}

/// kubelet asks once for each pod: the third of a volume's was told that another call is working on it.
#[test]
fn pods_of_one_volume_are_looked_at_in_turn_and_all_answered() {
    let service = service();
    let (id, serial) = ("r/z/s/vm-9999-pvc-1".to_string(), volume("r/z/s/vm-9999-pvc-1").serial);
    let stats = |path: &str| csi::NodeGetVolumeStatsRequest { volume_id: id.clone(), volume_path: path.into(), ..Default::default() };
    run(async {
        let mut looks: Vec<_> =
            ["/a", "/b"].map(|path| service.looks.hold_among(&serial, &format!("{serial} {path}"), MAX_LOOKS).unwrap()).into();
        let asked: Vec<_> = ["/nowhere/kubelet/c", "/nowhere/kubelet/d", "/nowhere/kubelet/c"]
            .map(|path| {
                let (service, request) = (service.clone(), stats(path));
                tokio::spawn(async move { service.node_get_volume_stats(Request::new(request)).await })
            })
            .into();
        // Each has asked once.
        tokio::task::yield_now().await;
        assert!(!asked.iter().any(|asked| asked.is_finished()));
        looks.pop();
        for asked in asked {
            // Nothing is there: that is what a look has found.
            assert_eq!(asked.await.unwrap().unwrap_err().code(), Code::NotFound);
        }
    });
}

#[test]
fn a_look_that_does_not_end_is_named_to_those_behind_it() {
    let (service, volume) = (service(), volume("r/z/s/vm-9999-pvc-1"));
    let look = |path: &str| service.looks.hold_among(&volume.serial, &format!("{} {path}", volume.serial), MAX_LOOKS).unwrap();
    let _looks = [look("/a"), look("/b")];
    let refused = run(service.turn(&volume, "/c", Duration::ZERO)).unwrap_err();
    assert_eq!(refused.code(), Code::Aborted);
    for words in ["r/z/s/vm-9999-pvc-1: ", "an earlier look has not ended: stats, at \"look\" for 0 s", "look at its storage on Proxmox"] {
        assert!(refused.message().contains(words), "{refused:?}");
    }
}
