//! Many volumes at once, many rounds, and an agent that is replaced under running pods: nothing fails, leaks or changes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proto::csi;
use testbed::calls::NodeVolume;
use testbed::guest::{Guest, GuestOptions, ScsiHardware, wait};

use crate::ciphertext::decrypted;
use crate::harness::{Agent, Image, MIB, SEEN_LIMIT, assert_clean, handle, start_release, wait_for_size};
use crate::luks::{PASSPHRASE, assert_no_key_is_left, encrypted, mappings};

/// Slots that a volume can have: all but slot 0, the system's.
const VOLUMES: u8 = 29;
/// What an agent may hold of memory at any time while all of them are staged (no encryption), in KiB.
const RESIDENT_LIMIT_KIB: u64 = 6 * 1024;
/// Files that a pod writes in turn.
const RING: u64 = 8;

fn one_controller(name: &str) -> Option<Agent> {
    let mut options = GuestOptions::named(name).with_node();
    options.scsi_hardware = ScsiHardware::VirtioScsiPci;
    Agent::start_on(&options)
}

/// The agent's open files, by what they are.
fn open_files(agent: &Agent) -> usize {
    agent.guest.list(&format!("/proc/{}/fd", agent.job.pid)).unwrap().len()
}

fn mounts(agent: &Agent) -> Vec<(String, String)> {
    agent.guest.mounts_below("/node").unwrap()
}

#[test]
fn guest_all_slots_of_a_node_at_once() {
    let Some(agent) = one_controller("all-slots") else { return };
    let mounts_before = mounts(&agent);
    let disks: Vec<(NodeVolume, Image)> = (1..=VOLUMES)
        .map(|lun| {
            let (handle, image) = (handle(&format!("slot-{lun}")), Image::new(64 * MIB));
            (agent.attach(&handle, &image, lun), image)
        })
        .collect();
    wait_for_size(&agent.guest, VOLUMES, Some(64 * MIB));
    let files_before = open_files(&agent);
    std::thread::scope(|scope| {
        for (volume, _) in &disks {
            scope.spawn(|| {
                agent.stage(volume);
                agent.publish(volume);
            });
        }
    });
    let peak_kib = agent.guest.peak_resident_kib(agent.job.pid).unwrap();
    println!("node: {peak_kib} KiB resident at most while {VOLUMES} volumes were staged at once");
    assert!(peak_kib <= RESIDENT_LIMIT_KIB, "{peak_kib} KiB with {VOLUMES} volumes");
    let targets: BTreeSet<_> = mounts(&agent).into_iter().map(|(point, _)| point).collect();
    for (volume, _) in &disks {
        assert!(targets.contains(&format!("/node{}", volume.target)), "{} is not published", volume.id);
        // Each pod sees its own volume and no other.
        let file = format!("/node{}/name", volume.target);
        agent.guest.write(&file, volume.id.as_bytes()).unwrap();
    }
    for (volume, _) in &disks {
        assert_eq!(agent.guest.read(&format!("/node{}/name", volume.target)).unwrap(), volume.id);
    }
    std::thread::scope(|scope| {
        for (volume, _) in &disks {
            scope.spawn(|| agent.put_away(volume));
        }
    });
    assert_eq!(mounts(&agent), mounts_before);
    // The connection of the calls may have opened one more.
    let files = open_files(&agent);
    assert!(files <= files_before + 2, "{files} open files, {files_before} before");
    for (lun, (_, image)) in (1..=VOLUMES).zip(&disks) {
        agent.guest.machine().unplug(lun).unwrap();
        if lun % 10 == 0 {
            assert_clean(image);
        }
    }
    agent.guest.power_off().unwrap();
}

/// 1,000 rounds with `scripts/test --long`, else 25.
#[test]
fn guest_rounds_of_stage_and_unstage_leak_nothing() {
    let Some(agent) = one_controller("rounds") else { return };
    let rounds = if std::env::var_os("PROXMOX_CSI_LONG").is_some() { 1000 } else { 25 };
    let images = [Image::new(64 * MIB), Image::new(64 * MIB)];
    let plain = agent.attach(&handle("rounds"), &images[0], 1);
    let volumes = [plain, encrypted(agent.attach(&handle("rounds-luks"), &images[1], 2), PASSPHRASE)];
    let mounts_before = mounts(&agent);
    let once = || {
        for volume in &volumes {
            agent.stage(volume);
            agent.publish(volume);
            agent.put_away(volume);
        }
    };
    // What is allocated once is allocated in the first rounds.
    (0..5).for_each(|_| once());
    let (files_before, resident_before) = (open_files(&agent), agent.guest.resident_kib(agent.job.pid).unwrap());
    (0..rounds).for_each(|_| once());
    assert_eq!(open_files(&agent), files_before);
    assert_eq!(mounts(&agent), mounts_before);
    assert_eq!(mappings(&agent), Vec::<String>::new());
    assert_no_key_is_left(&agent.guest);
    let resident_kib = agent.guest.resident_kib(agent.job.pid).unwrap();
    // Threads of the blocking pool come and go, each with its stack; a leak of 1 KiB a round would be a megabyte.
    assert!(resident_kib <= resident_before + 512, "{resident_kib} KiB after {rounds} rounds, {resident_before} before");
    [1, 2].into_iter().for_each(|lun| agent.detach(lun));
    assert_clean(&images[0]);
    assert_clean(&decrypted(&images[1], PASSPHRASE));
    agent.guest.power_off().unwrap();
}

/// What pods write while their agent is killed, upgraded and rolled back: rings of files, with what is in each.
struct Written {
    rounds: AtomicU64,
    is_over: AtomicBool,
}

impl Written {
    /// Until it is over; the digests of the last round of each file.
    fn write(&self, guest: &Guest, targets: &[String]) -> BTreeMap<String, String> {
        let mut digests = BTreeMap::new();
        while !self.is_over.load(Ordering::Relaxed) {
            let round = self.rounds.load(Ordering::Relaxed);
            for target in targets {
                let file = format!("{target}/{}", round % RING);
                let digest = guest.fill(&file, round, 2 * MIB).unwrap();
                digests.insert(file, digest);
            }
            self.rounds.fetch_add(1, Ordering::Relaxed);
        }
        digests
    }

    /// A whole round, from its begin to its end.
    fn await_a_round(&self, when: &str) {
        let before = self.rounds.load(Ordering::Relaxed);
        let goes_on = wait::until(SEEN_LIMIT, || Ok::<_, ()>((self.rounds.load(Ordering::Relaxed) >= before + 2).then_some(())));
        assert_eq!(goes_on, Ok(Some(())), "nothing is written {when}");
    }
}

/// An upgrade, its rollback, or a crash of the agent's pod: the pods that use its volumes notice nothing, and the other build takes up what it finds.
#[test]
fn guest_agent_replaced_under_running_pods() {
    let Some(mut agent) = Agent::start_with_points("replaced") else { return };
    agent.restart_release();
    let images = [Image::new(128 * MIB), Image::new(128 * MIB)];
    let plain = agent.attach(&handle("replaced"), &images[0], 1);
    let volumes = [plain, encrypted(agent.attach(&handle("replaced-luks"), &images[1], 2), PASSPHRASE)];
    for volume in &volumes {
        agent.stage(volume);
        agent.publish(volume);
    }
    let mounts_before = mounts(&agent);
    let port = agent.guest.node_port();
    let targets = [0, 1].map(|number: usize| format!("/node{}", volumes[number].target));
    let written = Written { rounds: AtomicU64::new(0), is_over: AtomicBool::new(false) };
    let digests = std::thread::scope(|scope| {
        let guest = &agent.guest;
        let writer = scope.spawn(|| written.write(guest, &targets));
        let replaced = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for (signal, is_release) in [(9, false), (15, true), (9, false), (9, true)] {
                guest.signal(agent.job, signal).unwrap();
                guest.wait(agent.job, SEEN_LIMIT).unwrap();
                written.await_a_round("while there is no agent");
                agent.job = if is_release { start_release(guest) } else { crate::harness::start_node(guest, &[]) };
                // What kubelet repeats after the agent's return finds all done.
                for volume in &volumes {
                    agent.calls.node_stage_volume(volume.stage()).unwrap_or_else(|status| panic!("{status:?}; {}", guest.quote()));
                    agent.calls.node_publish_volume(volume.publish()).unwrap_or_else(|status| panic!("{status:?}; {}", guest.quote()));
                }
                written.await_a_round("under the next agent");
            }
        }));
        written.is_over.store(true, Ordering::Relaxed);
        let digests = writer.join().unwrap();
        replaced.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        digests
    });
    assert_eq!(agent.guest.node_port(), port);
    assert_eq!(mounts(&agent), mounts_before, "a new agent changed mounts");
    // The key that another agent has given to the kernel is enough.
    images[1].resize(192 * MIB);
    agent.guest.machine().resize(2, 192 * MIB).unwrap();
    let request = csi::NodeExpandVolumeRequest { secrets: HashMap::new(), ..volumes[1].expand(192 * MIB) };
    agent.calls.node_expand_volume(request).unwrap_or_else(|status| panic!("{status:?}; {}", agent.guest.quote()));
    agent.guest.drop_caches().unwrap();
    println!("{} rounds", written.rounds.load(Ordering::Relaxed));
    assert!(digests.len() > 8, "{digests:?}");
    for (file, digest) in &digests {
        assert_eq!(agent.guest.sha256(file).unwrap(), *digest, "{file}");
    }
    volumes.iter().for_each(|volume| agent.put_away(volume));
    assert_eq!(mappings(&agent), Vec::<String>::new());
    [1, 2].into_iter().for_each(|lun| agent.detach(lun));
    assert_clean(&images[0]);
    assert_clean(&decrypted(&images[1], PASSPHRASE));
    agent.guest.power_off().unwrap();
}
