//! The release binary at a hand-over of the Lease: one process acts and the other has no socket; the one that acts is stopped in
//! the middle of an attach (SIGSTOP), the other takes over, the first goes on (SIGCONT). In real time.

use std::sync::Arc;
use std::time::Duration;

use proto::VolumeHandle;
use testbed::controller::Controller;
use testbed::kube::Kubernetes;
use testbed::tools;
use tonic::Code;

use crate::bed::{Bed, assert_refused, clusters, publish_request};
use crate::hold::shared_bed;

/// A Lease that nobody has, or that was given back.
const TAKEN_LIMIT: Duration = Duration::from_secs(30);
/// One that was not: 15 s, and 35 s for what may still come, on a machine with other things to do.
const HANDOVER_LIMIT: Duration = Duration::from_secs(180);
const END_LIMIT: Duration = Duration::from_secs(60);

/// The last that goes on before the first process is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stopped {
    /// Proxmox reads the VM's config for it: its write comes next.
    BeforeItsWrite,
    /// Proxmox has its write.
    AfterItsWrite,
}

struct Processes {
    bed: Bed,
    volume: VolumeHandle,
    kubernetes: Kubernetes,
    host: tokio::runtime::Runtime,
}

impl Processes {
    fn new() -> Self {
        let host = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let ((bed, volume), kubernetes) = host.block_on(async { (shared_bed().await, Kubernetes::start().await.unwrap()) });
        kubernetes.lease_given_back();
        Self { bed, volume, kubernetes, host }
    }

    fn start(&self, name: &str) -> Arc<Controller> {
        let folder = self.bed.config.with_file_name(name);
        std::fs::create_dir_all(&folder).unwrap();
        let kubeconfig = self.kubernetes.kubeconfig(&folder).unwrap();
        Arc::new(Controller::stand_by(&folder, &clusters(self.bed.sim.url()), &kubeconfig).unwrap())
    }

    fn holders(&self) -> Vec<u32> {
        [101, 102].into_iter().filter(|vmid| !self.bed.traces(*vmid, &self.volume).is_empty()).collect()
    }
}

fn handover(stopped: Stopped) {
    let all = Processes::new();
    let first = all.start("first");
    assert!(first.acts_within(TAKEN_LIMIT).unwrap(), "{}", first.quote());
    let second = all.start("second");
    let (says, is_stopped) = std::sync::mpsc::channel();
    let (method, path) = match stopped {
        Stopped::BeforeItsWrite => ("GET", "/nodes/*/qemu/101/pending"),
        Stopped::AfterItsWrite => ("POST", "/nodes/*/qemu/101/config"),
    };
    let target = Arc::clone(&first);
    all.bed.sim.before(method, path, 1, move |_| {
        target.stop(true).unwrap();
        says.send(()).unwrap();
    });
    let request = |vmid: u32| publish_request(&all.volume, &format!("node-{vmid}/{vmid}"));
    let (calls, of_first) = (first.calls().clone(), request(101));
    let old = std::thread::spawn(move || calls.controller_publish_volume(of_first));
    is_stopped.recv_timeout(TAKEN_LIMIT).unwrap();
    assert!(!second.socket().exists(), "two act: {}", second.quote());
    assert!(second.acts_within(HANDOVER_LIMIT).unwrap(), "{}", second.quote());
    assert!(all.kubernetes.holder().is_some());
    let rival = second.calls().controller_publish_volume(request(102));
    match stopped {
        Stopped::BeforeItsWrite => drop(rival.unwrap()),
        Stopped::AfterItsWrite => assert_refused(rival, Code::FailedPrecondition, &["VM 101 on pve1"]),
    }
    all.bed.sim.reset_counters();
    first.stop(false).unwrap();
    // Its sidecar may have lost the connection by then: anything but OK.
    assert!(old.join().unwrap().is_err(), "two OKs");
    let status = first.ended(END_LIMIT).unwrap();
    assert!(status.is_some_and(|status| !status.success()), "{status:?}: {}", first.quote());
    let writes: Vec<String> = all.bed.sim.requests().into_iter().filter(|request| !request.starts_with("GET")).collect();
    assert!(writes.is_empty(), "{writes:?}");
    let (holder, other) = if stopped == Stopped::BeforeItsWrite { (102, 101) } else { (101, 102) };
    assert_eq!(all.holders(), [holder]);
    // Both ask again: one has it.
    second.calls().controller_publish_volume(request(holder)).unwrap();
    assert!(second.calls().controller_publish_volume(request(other)).is_err());
    assert_eq!(all.holders(), [holder]);

    // Told to end, it gives the Lease back, and the next one need not wait.
    let third = all.start("third");
    assert!(second.terminate(END_LIMIT).unwrap().success(), "{}", second.quote());
    assert!(third.acts_within(TAKEN_LIMIT).unwrap(), "{}", third.quote());
    assert!(third.terminate(END_LIMIT).unwrap().success(), "{}", third.quote());
    assert_eq!(all.kubernetes.holder(), None);
    drop(all.host);
}

#[test]
fn two_processes_hand_over_the_lease_with_the_old_one_stopped_in_the_middle() {
    let binary = tools::release_binary("proxmox-csi-controller");
    if !binary.exists() {
        return tools::skipped(&format!("{} is missing: run scripts/build", binary.display()));
    }
    std::thread::scope(|scope| {
        let running = [Stopped::BeforeItsWrite, Stopped::AfterItsWrite].map(|stopped| scope.spawn(move || handover(stopped)));
        for one in running {
            one.join().unwrap();
        }
    });
}
