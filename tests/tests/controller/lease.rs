//! One controller acts at a time, by the driver's Lease: who gets it, when, and what one that loses it still does.

use std::sync::Arc;
use std::time::Duration;

use controller::kube::lease::{DURATION, LATE_WRITES, RENEW_WITHIN, RETRY, Taken};
use controller::kube::{Kube, Lease};
use controller::run::Controller;
use controller::service::ControllerService;
use proto::VolumeHandle;
use testbed::kube::Kubernetes;
use testbed::sim::{Effect, Fault, Simulator};
use tokio::time::Instant;
use tonic::Code;

use crate::bed::{Bed, MIB, assert_refused, clusters};
use crate::hold::{publish_by, shared_bed, unpublish_by};

const MS: Duration = Duration::from_millis(1);
/// Of one that was not there.
const NONE: Taken = Taken { late_writes: LATE_WRITES.saturating_add(RENEW_WITHIN), was_none: true };

/// Who waits for the Lease under that name.
fn candidate(kubernetes: &Kubernetes, name: &str) -> Arc<Lease> {
    let folder = std::env::temp_dir();
    let kube = Kube::new(kubernetes.access(&folder).unwrap()).unwrap().with_lease(name);
    Arc::clone(kube.lease().unwrap())
}

async fn within(limit: Duration, lease: &Arc<Lease>) -> Option<Taken> {
    tokio::time::timeout(limit, lease.acquire()).await.ok()
}

#[tokio::test(start_paused = true)]
async fn one_has_the_lease_and_the_others_stand_by() {
    let kubernetes = Kubernetes::start().await.unwrap();
    let (first, second) = (candidate(&kubernetes, "pod-1"), candidate(&kubernetes, "pod-2"));
    assert!(first.fence().check().is_err(), "nobody writes before it has it");
    assert_eq!(first.acquire().await, NONE, "there was none, or somebody has deleted it");
    let holding = Arc::clone(&first);
    let holding = tokio::spawn(async move { holding.hold().await });
    assert_eq!(within(Duration::from_secs(120), &second).await, None);
    assert!(first.fence().check().is_ok() && second.fence().check().is_err());
    assert_eq!(kubernetes.holder().as_deref(), Some("pod-1"));
    let lease = kubernetes.lease().unwrap();
    assert_eq!(lease["spec"]["leaseDurationSeconds"], DURATION.as_secs());
    for time in ["renewTime", "acquireTime"] {
        // MicroTime: the API server takes nothing else.
        let time = lease["spec"][time].as_str().unwrap();
        assert!(time.len() == 27 && time.as_bytes()[10] == b'T' && time.ends_with('Z') && time.as_bytes()[19] == b'.', "{time}");
    }
    holding.abort();
}

/// The holder is gone without a word. Whoever comes next waits until that is certain, and for what may still come of it.
#[tokio::test(start_paused = true)]
async fn a_holder_that_does_not_renew_stops_writing_before_the_next_one_may() {
    let kubernetes = Kubernetes::start().await.unwrap();
    let (first, second) = (candidate(&kubernetes, "pod-1"), candidate(&kubernetes, "pod-2"));
    first.acquire().await;
    let begun = Instant::now();
    let waiting = Arc::clone(&second);
    let taken = tokio::spawn(async move { (waiting.acquire().await, Instant::now()) });
    while first.fence().check().is_ok() {
        tokio::time::sleep(10 * MS).await;
    }
    let stopped = begun.elapsed();
    assert!(stopped <= RENEW_WITHIN + 20 * MS, "{stopped:?}");
    let (taken, at) = taken.await.unwrap();
    assert_eq!(taken, Taken { late_writes: LATE_WRITES, was_none: false });
    assert!(at - begun >= DURATION && at - begun <= DURATION + RETRY * 2, "{:?}", at - begun);
    // It wakes up: the Lease is another's, and it ends.
    let why = first.hold().await;
    assert!(why.contains("pod-2 has it"), "{why}");
    assert_eq!(kubernetes.lease().unwrap()["spec"]["leaseTransitions"], 1);
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_is_given_back_is_taken_at_once_and_one_with_an_open_write_is_not() {
    for (all_is_known, expected) in [(true, Duration::ZERO), (false, LATE_WRITES)] {
        let kubernetes = Kubernetes::start().await.unwrap();
        let (first, second) = (candidate(&kubernetes, "pod-1"), candidate(&kubernetes, "pod-2"));
        first.acquire().await;
        first.release(all_is_known).await;
        assert!(first.fence().check().is_err());
        assert_eq!(kubernetes.holder().is_none(), all_is_known);
        let begun = Instant::now();
        assert_eq!(second.acquire().await, Taken { late_writes: expected, was_none: false });
        assert_eq!(begun.elapsed() < DURATION, all_is_known, "{:?}", begun.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn renewals_that_fail_for_a_while_lose_nothing_and_for_long_all() {
    let kubernetes = Kubernetes::start().await.unwrap();
    let first = candidate(&kubernetes, "pod-1");
    first.acquire().await;
    let holding = Arc::clone(&first);
    let mut holding = tokio::spawn(async move { holding.hold().await });
    // Done and not answered: its own new version is no rival's.
    for (status, seconds) in [(500, 6), (0, 6), (1, 6)] {
        kubernetes.breaks("PUT /apis/coordination.k8s.io", Some(status));
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        kubernetes.breaks("PUT /apis/coordination.k8s.io", None);
        tokio::time::sleep(RETRY * 2).await;
        assert!(first.fence().check().is_ok() && !holding.is_finished(), "{status}");
        first.confirm().await.unwrap();
    }
    kubernetes.breaks("PUT /apis/coordination.k8s.io", Some(500));
    assert!(first.confirm().await.is_err());
    let why = tokio::time::timeout(RENEW_WITHIN + RETRY * 2, &mut holding).await.unwrap().unwrap();
    assert!(why.contains("could not be renewed for 10 s") && why.contains("500"), "{why}");
    assert_eq!(first.fence().check().unwrap_err(), why);
    // It does not come back by itself.
    kubernetes.breaks("PUT /apis/coordination.k8s.io", None);
    assert!(first.confirm().await.is_err() && first.fence().check().is_err());
}

#[tokio::test(start_paused = true)]
async fn a_lease_taken_away_is_lost_at_the_next_renewal() {
    for by in [Some("pod-2"), Some(""), None] {
        let kubernetes = Kubernetes::start().await.unwrap();
        let first = candidate(&kubernetes, "pod-1");
        first.acquire().await;
        match by {
            Some(name) => kubernetes.give_lease_to(name),
            None => kubernetes.delete_lease(),
        }
        let why = first.confirm().await.unwrap_err();
        let expected = by.map_or("it was deleted", |name| if name.is_empty() { "nobody has it" } else { "pod-2 has it" });
        assert!(why.contains(expected) && first.fence().check().is_err(), "{why}");
        assert_eq!(first.hold().await, why);
    }
}

#[tokio::test(start_paused = true)]
async fn without_the_privilege_nobody_acts() {
    let kubernetes = Kubernetes::start().await.unwrap();
    let first = candidate(&kubernetes, "pod-1");
    for call in ["GET /apis/coordination.k8s.io", "POST /apis/coordination.k8s.io"] {
        kubernetes.breaks(call, Some(403));
        assert_eq!(within(Duration::from_secs(60), &first).await, None, "{call}");
        kubernetes.breaks(call, None);
    }
    assert!(within(RETRY * 2, &first).await.is_some());
}

/// Its creation was done and not answered: it is ours, and not somebody's who is waited for.
#[tokio::test(start_paused = true)]
async fn a_lease_taken_without_an_answer_is_known_again() {
    let kubernetes = Kubernetes::start().await.unwrap();
    let first = candidate(&kubernetes, "pod-1");
    kubernetes.breaks("POST /apis/coordination.k8s.io", Some(1));
    let taken = within(Duration::from_secs(10), &first).await;
    assert_eq!(taken, Some(NONE));
}

/// By hand, while a holder acts: what that one sent may still come, though nobody holds it.
#[tokio::test(start_paused = true)]
async fn a_lease_deleted_or_emptied_by_hand_is_no_lease_given_back() {
    for is_deleted in [true, false] {
        let kubernetes = Kubernetes::start().await.unwrap();
        let (first, second) = (candidate(&kubernetes, "pod-1"), candidate(&kubernetes, "pod-2"));
        first.acquire().await;
        if is_deleted {
            kubernetes.delete_lease()
        } else {
            kubernetes.give_lease_to("")
        }
        // Its holder does not know yet, and may write until it could not renew for RENEW_WITHIN.
        assert_eq!(second.acquire().await, Taken { was_none: is_deleted, ..NONE }, "{is_deleted}");
        // Nor is the mark of an earlier holder one of this holder's.
        second.release(true).await;
        let third = candidate(&kubernetes, "pod-3");
        assert_eq!(third.acquire().await, Taken::default());
        kubernetes.give_lease_to("");
        let fourth = candidate(&kubernetes, "pod-4");
        assert_eq!(fourth.acquire().await, Taken { was_none: false, ..NONE });
    }
}

/// How long it takes until it acts, with what Kubernetes shows of others before it.
async fn time_to_lead(kubernetes: &Kubernetes) -> Duration {
    let kube = Arc::new(Kube::new(kubernetes.access(&std::env::temp_dir()).unwrap()).unwrap().with_lease("pod-1"));
    let begun = Instant::now();
    let holding = kube.lease().unwrap().lead(kube.is_first()).await.unwrap();
    holding.abort();
    begun.elapsed()
}

/// A PVC is a filesystem in seconds on a first installation, too; other drivers' objects are no trace.
#[tokio::test(start_paused = true)]
async fn a_first_installation_waits_for_nobody() {
    let kubernetes = Kubernetes::start().await.unwrap();
    for number in 0..600 {
        let spec = serde_json::json!({"csi": {"driver": "other.csi", "volumeHandle": "x"}});
        let object = serde_json::json!({"metadata": {"name": format!("a-{number}")}, "spec": spec});
        kubernetes.put(&format!("/api/v1/persistentvolumes/a-{number}"), object);
    }
    kubernetes.attachment_of("other.csi", "a-1", "node-101", true);
    let took = time_to_lead(&kubernetes).await;
    assert!(took < DURATION, "{took:?}");
}

/// What one of ours leaves wherever it acted, each alone; and what cannot be read is not known to be absent.
#[tokio::test(start_paused = true)]
async fn any_trace_of_a_controller_before_us_is_waited_for() {
    let attacher = "/apis/coordination.k8s.io/v1/namespaces/elsewhere/leases/external-attacher-leader-csi-proxmox-sinextra-dev";
    type Leaves<'a> = &'a dyn Fn(&Kubernetes);
    let traces: [(&str, Leaves<'_>); 7] = [
        ("pv", &|kubernetes| kubernetes.pv("z", "fsn1/pve1/local/9999/vm-9999-z.raw")),
        ("attachment", &|kubernetes| kubernetes.attachment("gone", "node-101", true)),
        // Given back, as client-go does.
        ("attacher", &|kubernetes| {
            let lease = serde_json::json!({"metadata": {"namespace": "elsewhere"}, "spec": {"holderIdentity": ""}});
            kubernetes.put(attacher, lease);
        }),
        ("pvs unread", &|kubernetes| kubernetes.breaks("GET /api/v1/persistentvolumes", Some(500))),
        ("pvs forbidden", &|kubernetes| kubernetes.breaks("GET /api/v1/persistentvolumes", Some(403))),
        ("attachments unread", &|kubernetes| kubernetes.breaks("GET /apis/storage.k8s.io/v1/volumeattachments", Some(500))),
        ("attachers unread", &|kubernetes| kubernetes.breaks("GET /apis/coordination.k8s.io/v1/leases", Some(403))),
    ];
    for (name, leave) in traces {
        let kubernetes = Kubernetes::start().await.unwrap();
        // Ours is on a later page than the first.
        for number in 0..500 {
            let object = serde_json::json!({"metadata": {"name": format!("a-{number}")}, "spec": {"nfs": {}}});
            kubernetes.put(&format!("/api/v1/persistentvolumes/a-{number}"), object);
        }
        leave(&kubernetes);
        let took = time_to_lead(&kubernetes).await;
        assert!(took >= NONE.late_writes, "{name}: {took:?}");
    }
    // Nor is one that was emptied a first one, whatever is not there.
    let kubernetes = Kubernetes::start().await.unwrap();
    kubernetes.give_lease_to("");
    let took = time_to_lead(&kubernetes).await;
    assert!(took >= NONE.late_writes, "{took:?}");
}

/// A controller that has the Lease, and its bed.
async fn leading() -> (Bed, VolumeHandle, Kubernetes, Arc<Lease>, ControllerService) {
    let (bed, volume) = shared_bed().await;
    let kubernetes = Kubernetes::start().await.unwrap();
    let kube = Kube::new(kubernetes.access(bed.config.parent().unwrap()).unwrap()).unwrap().with_lease("pod-1");
    let kube = Arc::new(kube);
    let lease = Arc::clone(kube.lease().unwrap());
    lease.acquire().await;
    let by = ControllerService::new(Arc::new(Controller::with_kube(bed.config.clone(), None, Some(kube))));
    (bed, volume, kubernetes, lease, by)
}

/// Of VMs that have nothing to do with it.
fn others_read(bed: &Bed) -> usize {
    bed.sim.requests().iter().filter(|request| request.contains("/pending") && !request.contains("/qemu/101/")).count()
}

/// By hand, a moment before our own write, and after every VM was read: seen by what QEMU has, and nobody has two.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_hand_attached_since_the_vms_were_read_is_seen_with_the_lease_too() {
    for (vmid, key) in [(102, "scsi7"), (201, "scsi3")] {
        let (bed, volume, _kubernetes, _lease, by) = leading().await;
        // All of them are read, and counted as known for a minute.
        let warm: VolumeHandle = "fsn1//san/vm-9999-warm".parse().unwrap();
        bed.sim.create_volume("pve1", &warm.volid(), 64 * MIB).unwrap();
        publish_by(&by, &warm, "node-101/101").await.unwrap();
        let volid = volume.volid();
        bed.sim.attach_by_hand(vmid, key, &volid).unwrap();
        let name = format!("VM {vmid}");
        let words = ["two writers", name.as_str()];
        // The higher of the two goes at once; the lower waits for the other, and goes as well.
        assert_refused(publish_by(&by, &volume, "node-101/101").await, Code::FailedPrecondition, &words);
        assert!(bed.traces(101, &volume).is_empty(), "{:?}", bed.traces(101, &volume));
        assert_eq!(bed.traces(vmid, &volume).len(), 2, "what is there stays");
    }
}

/// On a storage of one Proxmox node nobody is asked for that: QEMU locks what it opens, and the second drive is none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_hand_attached_on_a_local_storage_is_kept_apart_by_qemu_itself() {
    for storage in ["local", "local-lvm", "local-zfs"] {
        let (bed, _, _kubernetes, _lease, by) = leading().await;
        let (warm, volume) = (bed.volume_on("warm", storage, "pve1").await, bed.volume_on("one", storage, "pve1").await);
        publish_by(&by, &warm, "node-101/101").await.unwrap();
        bed.sim.attach_by_hand(102, "scsi7", &volume.volid()).unwrap();
        let refused = publish_by(&by, &volume, "node-101/101").await.expect_err("VM 102 has it");
        assert!(["VM 102", "write"].iter().any(|word| refused.message().contains(word)), "{refused:?}");
        assert!(bed.traces(101, &volume).is_empty(), "{:?}", bed.traces(101, &volume));
        assert_eq!(bed.traces(102, &volume).len(), 2, "what is there stays");
    }
}

/// With the digest unchanged Proxmox takes it however late it comes: whoever's clock stood still must ask before it takes away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_taken_away_before_the_lease_is_confirmed() {
    let (bed, volume, kubernetes, lease, by) = leading().await;
    publish_by(&by, &volume, "node-101/101").await.unwrap();
    // Its fence is open still, by its own clock.
    kubernetes.give_lease_to("pod-2");
    assert!(lease.fence().check().is_ok());
    bed.sim.reset_counters();
    let refused = unpublish_by(&by, &volume, "node-101/101").await;
    assert_refused(refused, Code::Unavailable, &["POST /nodes/pve1/qemu/101/config", "pod-2 has it"]);
    assert!(bed.sim.requests().iter().all(|request| request.starts_with("GET")), "{:?}", bed.sim.requests());
    assert_eq!(bed.traces(101, &volume).len(), 2);
}

/// Decision 5: the look at every VM after the own write is for those without a Lease.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_lease_an_attach_takes_no_second_look_at_other_vms() {
    let mut read = Vec::new();
    for has_lease in [true, false] {
        let (bed, volume, kubernetes, _lease, by) = leading().await;
        // What the first one reads, both read.
        let warm: VolumeHandle = "fsn1//san/vm-9999-warm".parse().unwrap();
        bed.sim.create_volume("pve1", &warm.volid(), 64 * MIB).unwrap();
        let by = if has_lease { by } else { bed.csi.clone() };
        publish_by(&by, &warm, "node-101/101").await.unwrap();
        bed.sim.reset_counters();
        let _ = kubernetes.asked();
        publish_by(&by, &volume, "node-101/101").await.unwrap();
        read.push(others_read(&bed));
        let renewals = kubernetes.asked().iter().filter(|call| call.starts_with("PUT")).count();
        assert_eq!(renewals, usize::from(has_lease), "one small write to Kubernetes instead");
    }
    assert_eq!(read, [0, 2], "other VMs read, with the Lease and without");
}

/// The Lease goes to another one while a call is on its way: it looks at every VM, and is not answered OK.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_lost_during_a_call_is_no_ok_and_nothing_is_written_after_it() {
    let (bed, volume, kubernetes, lease, by) = leading().await;
    let kubernetes = Arc::new(kubernetes);
    let thief = Arc::clone(&kubernetes);
    bed.sim.before("POST", "/nodes/*/qemu/101/config", 1, move |_| thief.give_lease_to("pod-2"));
    let refused = publish_by(&by, &volume, "node-101/101").await;
    assert_refused(refused, Code::Unavailable, &["csi-proxmox/csi.proxmox.sinextra.dev is lost", "pod-2 has it"]);
    assert!(lease.fence().check().is_err());
    bed.sim.reset_counters();
    for refused in [unpublish_by(&by, &volume, "node-101/101").await.map(drop), publish_by(&by, &volume, "node-102/102").await.map(drop)] {
        assert!(refused.is_err());
    }
    let writes: Vec<String> = bed.sim.requests().into_iter().filter(|request| !request.starts_with("GET")).collect();
    assert!(writes.is_empty(), "{writes:?}");
    assert_eq!(bed.traces(101, &volume).len(), 2, "what was done stays done");
}

/// Without a renewal in time, by the own clock: the fence is looked at when the bytes go out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_without_a_lease_is_not_sent() {
    let (bed, volume, _kubernetes, lease, by) = leading().await;
    publish_by(&by, &volume, "node-101/101").await.unwrap();
    lease.release(true).await;
    bed.sim.reset_counters();
    let refused = unpublish_by(&by, &volume, "node-101/101").await;
    assert_refused(refused, Code::Unavailable, &["POST /nodes/pve1/qemu/101/config", "it is given back", "writes nothing any more"]);
    assert!(bed.sim.requests().iter().all(|request| request.starts_with("GET")), "{:?}", bed.sim.requests());
}

/// Regions whose nodes answer nothing hold many threads, each for as long as it waits: none that a renewal needs.
#[test]
fn the_lease_is_renewed_while_every_region_hangs() {
    const REGIONS: usize = 5;
    const CALLS_EACH: usize = 30;
    // Longer than a Lease that is not renewed lasts.
    const RENEWALS: usize = 7;
    const LIMIT: Duration = Duration::from_secs(120);
    let host = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let kubernetes = host.block_on(Kubernetes::start()).unwrap();
    let regions: Vec<Simulator> = (0..REGIONS).map(|_| host.block_on(Simulator::standard().start()).unwrap()).collect();
    let folder = std::env::temp_dir().join(format!("pve-csi-hanging-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let mut text = String::from("clusters:\n");
    for (number, sim) in regions.iter().enumerate() {
        sim.inject(Fault { method: None, path: "/nodes/**".into(), nth: 1, times: u32::MAX, effect: Effect::Hang });
        text.push_str(&clusters(sim.url()).replace("clusters:\n", "").replace("fsn1", &format!("r{number}")));
    }
    let config = folder.join("config.yaml");
    std::fs::write(&config, text).unwrap();
    let kube = Arc::new(Kube::new(kubernetes.access(&folder).unwrap()).unwrap().with_lease("pod-1"));
    let lease = Arc::clone(kube.lease().unwrap());
    let process = controller::threads::runtime().unwrap();
    process.block_on(async {
        lease.acquire().await;
        let holding = tokio::spawn({
            let lease = Arc::clone(&lease);
            async move { lease.hold().await }
        });
        let by = ControllerService::new(Arc::new(Controller::with_kube(config.clone(), None, Some(Arc::clone(&kube)))));
        for number in 0..REGIONS * CALLS_EACH {
            let by = by.clone();
            let volume: VolumeHandle = format!("r{}/pve1/local/9999/vm-9999-{number}.raw", number % REGIONS).parse().unwrap();
            tokio::spawn(async move { publish_by(&by, &volume, "node-101/101").await });
        }
        let begun = Instant::now();
        let mut renewals = 0;
        while renewals < RENEWALS && !holding.is_finished() {
            assert!(begun.elapsed() < LIMIT, "{renewals} renewals");
            renewals += kubernetes.asked().iter().filter(|call| call.starts_with("PUT")).count();
            tokio::time::sleep(RETRY / 4).await;
        }
        assert!(!holding.is_finished() && lease.fence().check().is_ok(), "lost after {renewals} renewals: {:?}", lease.fence().check());
        assert_eq!(kubernetes.holder().as_deref(), Some("pod-1"));
    });
    let hanging = |sim: &Simulator| sim.requests().iter().filter(|request| request.contains("/nodes/")).count();
    // Several each, and together more than a process has threads for nothing.
    let all: usize = regions.iter().map(hanging).sum();
    assert!(all >= REGIONS * 5, "{:?}", regions.iter().map(hanging).collect::<Vec<_>>());
    // Calls hang on; nobody waits for them.
    process.shutdown_background();
    std::fs::remove_dir_all(&folder).unwrap();
}
