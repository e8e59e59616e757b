//! What is found and is not right: a disk offline, a mount of a disk that went or of another disk, a mapping that was cut short, somebody else's
//! hold. Each step that clears it, killed before it, inside and after it, then repeated until done; and what must not be cleared.

use proto::csi::volume_capability::access_mode::Mode;
use testbed::calls::{NodeVolume, block_capability};
use testbed::guest::wait;
use tonic::{Code, Status};

use crate::ciphertext::decrypted;
use crate::harness::{Agent, Image, MIB, SEEN_LIMIT, assert_clean, handle, wait_for_size};
use crate::luks::{PASSPHRASE, encrypted, mappings};

const LUN: u8 = 1;
const ELSEWHERE: &str = "/tmp/elsewhere";

/// Where an agent has told the kernel to take up I/O again, and has not looked whether it does.
const SET_RUNNING: &str = "inside:unstage:SetRunning:written";

/// What a step clears, and how it comes to be there.
struct Left {
    call: &'static str,
    step: &'static str,
    /// Points between the step's beginning and its end.
    inside: &'static [&'static str],
    is_encrypted: bool,
    prepare: fn(&mut Agent, &NodeVolume, &Image),
}

const EVERY: [Left; 6] = [
    Left { call: "stage", step: "SetRunning", inside: &["write"], is_encrypted: false, prepare: |agent, _, _| offline(agent) },
    Left { call: "unstage", step: "SetRunning", inside: &["write", "written"], is_encrypted: false, prepare: staged_and_offline },
    Left { call: "unstage", step: "Delete", inside: &["delete"], is_encrypted: false, prepare: staged_and_offline },
    Left { call: "unstage", step: "AwaitRelease", inside: &["wait"], is_encrypted: false, prepare: staged_and_held },
    Left { call: "stage", step: "CloseLeftover", inside: &["remove", "removed"], is_encrypted: true, prepare: half_opened },
    Left { call: "stage", step: "Unmount", inside: &["umount2"], is_encrypted: false, prepare: staged_and_pulled },
];

fn node_of(agent: &Agent, lun: u8) -> String {
    agent.guest.disk_at(lun).unwrap().unwrap()
}

/// As the reference driver leaves a disk that it has unstaged.
fn offline(agent: &Agent) {
    agent.guest.write(&format!("/sys/block/{}/device/state", node_of(agent, LUN)), b"offline\n").unwrap();
}

fn state(agent: &Agent) -> String {
    agent.guest.read(&format!("/sys/block/{}/device/state", node_of(agent, LUN))).unwrap()
}

fn staged_and_offline(agent: &mut Agent, volume: &NodeVolume, _: &Image) {
    agent.stage(volume);
    offline(agent);
}

fn staged_and_held(agent: &mut Agent, volume: &NodeVolume, _: &Image) {
    agent.stage(volume);
    agent.guest.make_folder(ELSEWHERE).unwrap();
    agent.guest.mount(&format!("/dev/{}", node_of(agent, LUN)), ELSEWHERE, "ext4", false).unwrap();
}

fn half_opened(agent: &mut Agent, volume: &NodeVolume, _: &Image) {
    assert_dies(agent, "inside:stage:Open:created", "stage", volume);
    // Without a table it is nowhere in sysfs; that it is there is shown by the step that clears it.
    agent.restart();
}

/// The hypervisor takes the disk away, and it comes again.
fn staged_and_pulled(agent: &mut Agent, volume: &NodeVolume, image: &Image) {
    agent.stage(volume);
    agent.detach(LUN);
    plug(agent, volume, image);
}

fn plug(agent: &Agent, volume: &NodeVolume, image: &Image) {
    let serial = volume.publish_context.get(proto::publish_context::SERIAL).map(String::as_str);
    agent.guest.machine().plug(&image.drive(LUN, serial)).unwrap();
    wait_for_size(&agent.guest, LUN, Some(image.size_bytes()));
}

fn call(agent: &Agent, call: &str, volume: &NodeVolume) -> Result<(), Status> {
    match call {
        "stage" => agent.calls.node_stage_volume(volume.stage()).map(drop),
        "unpublish" => agent.calls.node_unpublish_volume(volume.unpublish()).map(drop),
        _ => agent.calls.node_unstage_volume(volume.unstage()).map(drop),
    }
}

/// What the kernel wrote while the disk was offline is lost, and said once to whoever asks first (lib/errseq.c): the repeat goes on.
fn call_to_its_end(agent: &Agent, name: &str, volume: &NodeVolume) {
    let answer = match call(agent, name, volume) {
        Err(status) if status.code() == Code::Internal && status.message().contains("fsync on") => {
            println!("{status:?}");
            call(agent, name, volume)
        }
        done => done,
    };
    answer.unwrap_or_else(|status| panic!("{status:?}; {}", agent.guest.quote()));
}

/// What the guest holds for somebody else is let go of, where it is: while a call waits for it, or after its death.
fn let_go(agent: &Agent) {
    let _ = agent.guest.unmount(ELSEWHERE);
}

fn assert_dies(agent: &mut Agent, point: &str, name: &str, volume: &NodeVolume) {
    if point.contains(":Delete") {
        let _ = unstage_while_it_stays_offline(agent, volume, &[("PROXMOX_CSI_KILL_AT", point)]);
        return assert_has_died(agent, point);
    }
    agent.restart_with(&[("PROXMOX_CSI_KILL_AT", point)]);
    let answer = std::thread::scope(|scope| {
        let answer = scope.spawn(|| call(agent, name, volume));
        if point == "after:unstage:AwaitRelease" {
            let comes =
                wait::until(SEEN_LIMIT, || Ok::<_, ()>(agent.log().contains("kill point before:unstage:AwaitRelease\n").then_some(())));
            assert_eq!(comes, Ok(Some(())), "{}", agent.log());
            let_go(agent);
        }
        answer.join().unwrap()
    });
    assert!(answer.is_err(), "{name} at {point}");
    assert_has_died(agent, point);
}

fn assert_has_died(agent: &Agent, point: &str) {
    let ended = agent.guest.wait(agent.job, SEEN_LIMIT).unwrap();
    assert!(ended.output.contains(&format!("killed at {point}\n")), "{point}: {ended:?}");
}

/// The agent sets the disk running, and it is offline again before the agent looks: as one whose host gives it up again and again.
fn unstage_while_it_stays_offline(agent: &mut Agent, volume: &NodeVolume, env: &[(&str, &str)]) -> Result<(), Status> {
    agent.restart_to_hold(SET_RUNNING, env);
    std::thread::scope(|scope| {
        let answer = scope.spawn(|| call(agent, "unstage", volume));
        agent.wait_until_held(SET_RUNNING);
        assert_eq!(state(agent), "running\n", "the agent has set it so");
        offline(agent);
        agent.let_go();
        answer.join().unwrap()
    })
}

#[test]
fn guest_what_is_left_is_cleared_and_killed_at_every_point() {
    let Some(mut agent) = Agent::start_with_points("left") else { return };
    let images = [Image::new(64 * MIB), Image::new(64 * MIB)];
    let volumes =
        [agent.volume(&handle("left"), &images[0], LUN), encrypted(agent.volume(&handle("left-luks"), &images[1], LUN), PASSPHRASE)];
    for (number, (volume, image)) in volumes.iter().zip(&images).enumerate() {
        plug(&agent, volume, image);
        let file = format!("/node{}/file", volume.target);
        agent.restart();
        agent.stage(volume);
        agent.publish(volume);
        let written = agent.guest.fill(&file, number as u64, MIB).unwrap();
        agent.put_away(volume);
        let mut deaths = 0;
        for left in EVERY.iter().filter(|left| left.is_encrypted == (number == 1)) {
            let at = format!("{}:{}", left.call, left.step);
            let inside = left.inside.iter().map(|place| format!("inside:{at}:{place}"));
            for point in [format!("before:{at}")].into_iter().chain(inside).chain([format!("after:{at}")]) {
                agent.restart();
                (left.prepare)(&mut agent, volume, image);
                assert_dies(&mut agent, &point, left.call, volume);
                deaths += 1;
                let_go(&agent);
                agent.restart();
                println!("{point}");
                call_to_its_end(&agent, left.call, volume);
                agent.stage(volume);
                agent.publish(volume);
                assert_eq!(agent.guest.sha256(&file).unwrap(), written, "{point}");
                agent.put_away(volume);
                assert_eq!(mappings(&agent), Vec::<String>::new(), "{point}");
            }
        }
        println!("{deaths} deaths");
        a_disk_that_stays_offline(&mut agent, volume, image);
        agent.detach(LUN);
        if number == 0 { assert_clean(image) } else { assert_clean(&decrypted(image, PASSPHRASE)) }
    }
    written_while_offline(&agent);
    a_disk_that_grows_while_its_filesystem_does(&mut agent);
    a_mount_of_another_disk(&agent);
    a_disk_that_vanished(&agent);
    a_raw_block_device_that_went_and_came(&agent);
    agent.guest.power_off().unwrap();
}

/// Nothing reaches it any more: once nobody uses it, the kernel forgets it, and finds it anew for the next stage. What was synced is there.
fn a_disk_that_stays_offline(agent: &mut Agent, volume: &NodeVolume, image: &Image) {
    let file = format!("/node{}/file", volume.target);
    agent.restart();
    agent.stage(volume);
    agent.publish(volume);
    let written = agent.guest.sha256(&file).unwrap();
    agent.calls.node_unpublish_volume(volume.unpublish()).unwrap();
    offline(agent);
    let answer = unstage_while_it_stays_offline(agent, volume, &[]);
    answer.unwrap_or_else(|status| panic!("{status:?}; {}", agent.guest.quote()));
    let log = agent.log();
    for words in ["stays offline", "takes no I/O and nothing uses it: the kernel has forgotten it"] {
        assert!(log.contains(words), "no {words:?} in {log}");
    }
    assert_eq!(agent.guest.disk_at(LUN).unwrap(), None, "the kernel still has it");
    assert_eq!(mappings(agent), Vec::<String>::new());
    assert_eq!(agent.mounted_at(&volume.staging), Vec::<String>::new());
    // Again: there is nothing left to do.
    agent.calls.node_unstage_volume(volume.unstage()).unwrap();
    agent.stage(volume);
    agent.publish(volume);
    assert_eq!(agent.guest.sha256(&file).unwrap(), written);
    agent.put_away(volume);
    wait_for_size(&agent.guest, LUN, Some(image.size_bytes()));
}

/// Somebody writes meanwhile: that write fails, what was there before is kept, and each call ends.
fn written_while_offline(agent: &Agent) {
    for is_encrypted in [false, true] {
        let image = Image::new(64 * MIB);
        let volume = agent.attach(&handle(if is_encrypted { "written-luks" } else { "written" }), &image, LUN);
        let volume = if is_encrypted { encrypted(volume, PASSPHRASE) } else { volume };
        let file = format!("/node{}/file", volume.target);
        agent.stage(&volume);
        agent.publish(&volume);
        let written = agent.guest.fill(&file, 7, MIB).unwrap();
        offline(agent);
        let error = agent.guest.fill(&format!("{file}-2"), 8, MIB).expect_err("it takes no I/O");
        println!("{error:#}");
        agent.calls.node_unpublish_volume(volume.unpublish()).unwrap();
        call_to_its_end(agent, "unstage", &volume);
        agent.stage(&volume);
        agent.publish(&volume);
        assert_eq!(agent.guest.sha256(&file).unwrap(), written);
        agent.put_away(&volume);
        agent.detach(LUN);
    }
    // A mapping over such a disk can still be opened, and flushed it is by unpublish, too.
    let image = Image::new(64 * MIB);
    let mut volume = encrypted(agent.attach(&handle("written-raw"), &image, LUN), PASSPHRASE);
    volume.capability = block_capability();
    let device = format!("/node{}", volume.target);
    agent.stage(&volume);
    agent.publish(&volume);
    agent.guest.write_at(&device, 0, b"before").unwrap();
    offline(agent);
    let error = agent.guest.write_at(&device, MIB, b"meanwhile").expect_err("it takes no I/O");
    println!("{error:#}");
    call_to_its_end(agent, "unpublish", &volume);
    call_to_its_end(agent, "unstage", &volume);
    agent.stage(&volume);
    agent.publish(&volume);
    assert_eq!(agent.guest.read_at(&device, 0, 6).unwrap(), b"before");
    agent.put_away(&volume);
    agent.detach(LUN);
}

/// Expand while the disk grew again: what is there after the filesystem's growth is more than it was grown to, and that is no failure.
fn a_disk_that_grows_while_its_filesystem_does(agent: &mut Agent) {
    const AT: &str = "after:expand:Grow";
    let image = Image::new(64 * MIB);
    let volume = agent.attach(&handle("grows"), &image, LUN);
    agent.restart_with(&[("PROXMOX_CSI_HOLD_AT", AT), ("PROXMOX_CSI_LIMIT_HOLD", "4000")]);
    agent.stage(&volume);
    agent.publish(&volume);
    let grow = |agent: &Agent, size_bytes: u64| {
        image.resize(size_bytes);
        agent.guest.machine().resize(LUN, size_bytes).unwrap();
        wait_for_size(&agent.guest, LUN, Some(size_bytes));
    };
    grow(agent, 96 * MIB);
    let answer = std::thread::scope(|scope| {
        let call = scope.spawn(|| agent.calls.node_expand_volume(volume.expand(96 * MIB)));
        let line = format!("held at {AT}");
        let held = wait::until(SEEN_LIMIT, || Ok::<_, ()>(agent.log().contains(&line).then_some(())));
        assert_eq!(held, Ok(Some(())), "{}", agent.log());
        grow(agent, 128 * MIB);
        call.join().unwrap()
    });
    let answer = answer.unwrap_or_else(|status| panic!("{status:?}; {}", agent.guest.quote()));
    assert_eq!(answer.capacity_bytes.cast_unsigned(), 128 * MIB, "the growth came too late to be seen; {}", agent.log());
    let seen = agent.guest.stat_filesystem(&format!("/node{}", volume.target)).unwrap();
    assert!(seen.blocks * seen.block_bytes > 110 * MIB, "{seen:?}");
    agent.put_away(&volume);
    agent.detach(LUN);
    assert_clean(&image);
}

/// On our staging path: unmounted if nothing uses it, else refused with both disks' names.
fn a_mount_of_another_disk(agent: &Agent) {
    let images = [Image::new(64 * MIB), Image::new(64 * MIB)];
    let ours = agent.attach(&handle("stale-ours"), &images[0], 2);
    let other = agent.attach(&handle("stale-other"), &images[1], 3);
    for lun in [2, 3] {
        wait_for_size(&agent.guest, lun, Some(64 * MIB));
    }
    // Made and published: a pod uses it.
    agent.stage(&other);
    agent.publish(&other);
    let devices = [node_of(agent, 2), node_of(agent, 3)];
    let staging = format!("/node{}", ours.staging);
    agent.guest.mount(&format!("/dev/{}", devices[1]), &staging, "ext4", false).unwrap();
    let status = agent.calls.node_stage_volume(ours.stage()).expect_err("another volume's pod uses what is mounted there");
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    for word in [devices[0].as_str(), devices[1].as_str(), ours.id.as_str(), "in use", "nothing was touched"] {
        assert!(status.message().contains(word), "no {word:?} in {status:?}");
    }
    let unstaged = agent.calls.node_unstage_volume(ours.unstage()).expect_err("unstage acts on what is ours only");
    assert_eq!(unstaged.code(), Code::FailedPrecondition, "{unstaged:?}");
    agent.calls.node_unpublish_volume(other.unpublish()).unwrap();
    agent.guest.unmount(&format!("/node{}", other.staging)).unwrap();
    // Something is mounted in it: used, though by nobody that has it for a volume.
    let nested = format!("{staging}/nested");
    agent.guest.make_folder(&nested).unwrap();
    agent.guest.mount("none", &nested, "tmpfs", false).unwrap();
    assert_eq!(agent.calls.node_stage_volume(ours.stage()).unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(agent.mounted_at(&ours.staging), ["ext4"]);
    agent.guest.unmount(&nested).unwrap();
    // Nothing uses it now.
    agent.stage(&ours);
    assert_eq!(agent.mounted_at(&ours.staging), ["ext4"]);
    assert!(agent.log().contains("which nothing used"), "{}", agent.log());
    // What is no disk's stays, whoever's it is.
    agent.calls.node_unstage_volume(ours.unstage()).unwrap();
    agent.guest.make_folder(&staging).unwrap();
    agent.guest.mount("none", &staging, "tmpfs", false).unwrap();
    assert_eq!(agent.calls.node_stage_volume(ours.stage()).unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(agent.mounted_at(&ours.staging), ["tmpfs"]);
    agent.guest.unmount(&staging).unwrap();
    for (lun, image) in (2..).zip(&images) {
        agent.detach(lun);
        assert_clean(image);
    }
}

/// `device_del` with no unstage before it, and the volume staged anew from where it comes again.
fn a_disk_that_vanished(agent: &Agent) {
    let images = [Image::new(64 * MIB), Image::new(64 * MIB)];
    let handles = [handle("vanished"), handle("vanished-luks")];
    let kind = |number: usize, lun: u8| {
        let volume = agent.attach(&handles[number], &images[number], lun);
        if number == 1 { encrypted(volume, PASSPHRASE) } else { volume }
    };
    for (number, lun) in [(0, 2_u8), (1, 4)] {
        let volume = kind(number, lun);
        agent.stage(&volume);
        agent.publish(&volume);
        let file = format!("/node{}/file", volume.target);
        let written = agent.guest.fill(&file, 7, MIB).unwrap();
        agent.detach(lun);
        let volume = kind(number, lun + 1);
        if number == 1 {
            // The pod's mount holds the mapping over the disk that is gone; its end is awaited.
            agent.calls.node_unpublish_volume(volume.unpublish()).unwrap();
        }
        agent.stage(&volume);
        if number == 0 {
            let status = agent.calls.node_publish_volume(volume.publish()).expect_err("the pod still has the disk that is gone");
            assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
            agent.calls.node_unpublish_volume(volume.unpublish()).unwrap();
        }
        agent.publish(&volume);
        assert_eq!(agent.guest.sha256(&file).unwrap(), written);
        assert_eq!(mappings(agent).len(), number);
        // Once more, and this time it is unstaged.
        agent.detach(lun + 1);
        agent.put_away(&volume);
        assert_eq!(mappings(agent), Vec::<String>::new());
        for path in [&volume.staging, &volume.target] {
            assert_eq!(agent.guest.mounts_below(&format!("/node{path}")).unwrap(), []);
        }
    }
}

/// What showed the old disk shows the new one, which has its number: whoever has that is a second writer.
fn a_raw_block_device_that_went_and_came(agent: &Agent) {
    let image = Image::new(64 * MIB);
    let mut volume = agent.attach(&handle("raw-again"), &image, 2);
    volume.capability = block_capability();
    volume.capability.access_mode.as_mut().unwrap().mode = Mode::SingleNodeSingleWriter.into();
    agent.stage(&volume);
    agent.publish(&volume);
    let name = node_of(agent, 2);
    agent.detach(2);
    agent.attach(&handle("raw-again"), &image, 2);
    wait_for_size(&agent.guest, 2, Some(64 * MIB));
    assert_eq!(node_of(agent, 2), name);
    let second = NodeVolume { target: format!("{}-second", volume.target), ..volume.clone() };
    let status = agent.calls.node_publish_volume(second.publish()).expect_err("somebody else has the device still");
    assert!(status.code() == Code::FailedPrecondition && status.message().contains(&volume.target), "{status:?}");
    agent.calls.node_unpublish_volume(volume.unpublish()).unwrap();
    agent.publish(&second);
    agent.put_away(&second);
    agent.detach(2);
}
