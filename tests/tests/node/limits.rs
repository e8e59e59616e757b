//! Many volumes at once, many rounds, and an agent that is replaced under running pods: nothing fails, leaks or changes.

use std::collections::BTreeSet;

use testbed::calls::NodeVolume;
use testbed::guest::{GuestOptions, ScsiHardware};

use crate::harness::{Agent, Image, MIB, SEEN_LIMIT, assert_clean, handle, wait_for_size};

/// Slots that a volume can have: all but slot 0, the system's.
const VOLUMES: u8 = 29;
/// What an agent may hold of memory with all of them staged (no encryption), in KiB.
const RESIDENT_LIMIT_KIB: u64 = 6 * 1024;

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
    let resident_kib = agent.guest.resident_kib(agent.job.pid).unwrap();
    assert!(resident_kib <= RESIDENT_LIMIT_KIB, "{resident_kib} KiB with {VOLUMES} volumes");
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
    let (handle, image) = (handle("rounds"), Image::new(64 * MIB));
    let volume = agent.attach(&handle, &image, 1);
    let mounts_before = mounts(&agent);
    let once = || {
        agent.stage(&volume);
        agent.publish(&volume);
        agent.put_away(&volume);
    };
    // What is allocated once is allocated in the first rounds.
    (0..5).for_each(|_| once());
    let (files_before, resident_before) = (open_files(&agent), agent.guest.resident_kib(agent.job.pid).unwrap());
    (0..rounds).for_each(|_| once());
    assert_eq!(open_files(&agent), files_before);
    assert_eq!(mounts(&agent), mounts_before);
    let resident_kib = agent.guest.resident_kib(agent.job.pid).unwrap();
    // Threads of the blocking pool come and go, each with its stack; a leak of 1 KiB a round would be a megabyte.
    assert!(resident_kib <= resident_before + 512, "{resident_kib} KiB after {rounds} rounds, {resident_before} before");
    agent.detach(1);
    assert_clean(&image);
    agent.guest.power_off().unwrap();
}

/// An upgrade or a crash of the agent's pod: the pods that use its volumes notice nothing.
#[test]
fn guest_agent_replaced_under_running_pods() {
    let Some(mut agent) = Agent::start("replaced") else { return };
    let (handle, image) = (handle("replaced"), Image::new(256 * MIB));
    let volume = agent.attach(&handle, &image, 1);
    agent.stage(&volume);
    agent.publish(&volume);
    let mounts_before = mounts(&agent);
    let port = agent.guest.node_port();
    let digests = std::thread::scope(|scope| {
        let target = format!("/node{}", volume.target);
        let guest = &agent.guest;
        let writer = scope.spawn(move || {
            let write = |number: u64| guest.fill(&format!("{target}/{number}"), number, 8 * MIB).unwrap();
            (0..12).map(write).collect::<Vec<_>>()
        });
        for (round, signal) in [(0, 9), (1, 15), (2, 9)] {
            guest.signal(agent.job, signal).unwrap_or_else(|error| panic!("round {round}: {error:#}"));
            guest.wait(agent.job, SEEN_LIMIT).unwrap();
            agent.job = crate::harness::start_node(guest, &[]);
        }
        writer.join().unwrap()
    });
    assert_eq!(agent.guest.node_port(), port);
    assert_eq!(mounts(&agent), mounts_before, "the new agent changed mounts");
    // What kubelet repeats after the agent's return finds all done.
    agent.stage(&volume);
    agent.publish(&volume);
    assert_eq!(mounts(&agent), mounts_before);
    agent.guest.drop_caches().unwrap();
    for (number, digest) in digests.iter().enumerate() {
        assert_eq!(agent.guest.sha256(&format!("/node{}/{number}", volume.target)).unwrap(), *digest);
    }
    agent.put_away(&volume);
    agent.detach(1);
    assert_clean(&image);
    agent.guest.power_off().unwrap();
}
