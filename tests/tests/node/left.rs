//! What is found and is not right: a disk offline, a mount of a disk that went or of another disk, a mapping that was cut short, somebody else's
//! hold; and a disk that has grown, or is late. Each step that no life of `kill.rs` comes to, killed before it, inside and after it, then repeated until
//! done; and what must not be cleared, by the release binary.

use proto::csi;
use proto::csi::volume_capability::access_mode::Mode;
use testbed::calls::{NodeVolume, block_capability};
use testbed::guest::wait;
use tonic::{Code, Status};

use crate::ciphertext::decrypted;
use crate::harness::{Agent, Image, MIB, SEEN_LIMIT, assert_clean, handle, wait_for_size};
use crate::luks::{PASSPHRASE, encrypted, mappings};

const LUN: u8 = 1;
const OTHER_LUN: u8 = 9;
const ELSEWHERE: &str = "/tmp/elsewhere";

/// Where an agent has told the kernel to take up I/O again, and has not looked whether it does.
const SET_RUNNING: &str = "inside:unstage:SetRunning:written";

/// What the volume of a row is.
#[derive(Clone, Copy, PartialEq)]
enum Of {
    Ext4,
    Luks,
    Block,
}

/// A step, and how it comes to be due.
struct Left {
    call: &'static str,
    step: &'static str,
    /// Points between the step's beginning and its end.
    inside: &'static [&'static str],
    of: Of,
    prepare: fn(&mut Agent, &NodeVolume, &Image),
}

const EVERY: [Left; 11] = [
    // First: after a disk that was offline the kernel has an error of its filesystem on record, and grows it no more.
    Left { call: "stage", step: "Grow", inside: &["ioctl"], of: Of::Ext4, prepare: |agent, _, image| grow(agent, image) },
    Left { call: "stage", step: "SetRunning", inside: &["write"], of: Of::Ext4, prepare: |agent, _, _| offline(agent) },
    Left { call: "unstage", step: "SetRunning", inside: &["write", "written"], of: Of::Ext4, prepare: staged_and_offline },
    Left { call: "unstage", step: "Delete", inside: &["delete"], of: Of::Ext4, prepare: staged_and_offline },
    Left { call: "unstage", step: "AwaitRelease", inside: &["wait"], of: Of::Ext4, prepare: staged_and_held },
    Left { call: "stage", step: "CloseLeftover", inside: &["remove", "removed"], of: Of::Luks, prepare: half_opened },
    Left { call: "stage", step: "Unmount", inside: &["umount2"], of: Of::Ext4, prepare: staged_and_pulled },
    Left { call: "stage", step: "GrowMapping", inside: &["loaded", "resume"], of: Of::Luks, prepare: opened_and_grown },
    Left { call: "publish", step: "FindDisk", inside: &["wait"], of: Of::Block, prepare: staged_and_detached },
    Left { call: "publish", step: "SetRunning", inside: &["write"], of: Of::Block, prepare: staged_and_offline },
    Left { call: "publish", step: "Unmount", inside: &["umount2"], of: Of::Block, prepare: published_and_pulled },
];
/// A publish for a pod that only reads: another branch of one step.
const READ_ONLY: &str = "publish read-only";
const READ_ONLY_POINTS: [&str; 3] = ["inside:publish:Bind:read-only", "inside:publish:Bind:move_mount", "after:publish:Bind"];

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

fn half_opened(agent: &mut Agent, volume: &NodeVolume, image: &Image) {
    assert_dies(agent, "inside:stage:Open:created", "stage", volume, image);
    // Without a table it is nowhere in sysfs; that it is there is shown by the step that clears it.
    agent.restart();
}

/// The hypervisor takes the disk away, and it comes again.
fn staged_and_pulled(agent: &mut Agent, volume: &NodeVolume, image: &Image) {
    agent.stage(volume);
    agent.detach(LUN);
    plug(agent, volume, image);
}

/// While it is open, and before its filesystem is mounted.
fn opened_and_grown(agent: &mut Agent, volume: &NodeVolume, image: &Image) {
    assert_dies(agent, "after:stage:Open", "stage", volume, image);
    grow(agent, image);
    agent.restart();
}

fn staged_and_detached(agent: &mut Agent, volume: &NodeVolume, _: &Image) {
    agent.stage(volume);
    agent.detach(LUN);
}

/// It comes again under another number, which its own is another disk's by then.
fn published_and_pulled(agent: &mut Agent, volume: &NodeVolume, image: &Image) {
    agent.stage(volume);
    agent.publish(volume);
    let name = node_of(agent, LUN);
    agent.detach(LUN);
    let other = Image::new(8 * MIB);
    agent.guest.machine().plug(&other.drive(OTHER_LUN, None)).unwrap();
    wait_for_size(&agent.guest, OTHER_LUN, Some(8 * MIB));
    assert_eq!(node_of(agent, OTHER_LUN), name);
    plug(agent, volume, image);
}

/// By 64 MiB.
fn grow(agent: &Agent, image: &Image) {
    let size_bytes = image.size_bytes() + 64 * MIB;
    image.resize(size_bytes);
    agent.guest.machine().resize(LUN, size_bytes).unwrap();
    wait_for_size(&agent.guest, LUN, Some(size_bytes));
}

fn plug(agent: &Agent, volume: &NodeVolume, image: &Image) {
    let serial = volume.publish_context.get(proto::publish_context::SERIAL).map(String::as_str);
    agent.guest.machine().plug(&image.drive(LUN, serial)).unwrap();
    wait_for_size(&agent.guest, LUN, Some(image.size_bytes()));
}

fn call(agent: &Agent, call: &str, volume: &NodeVolume) -> Result<(), Status> {
    match call {
        "stage" => agent.calls.node_stage_volume(volume.stage()).map(drop),
        "publish" => agent.calls.node_publish_volume(volume.publish()).map(drop),
        READ_ONLY => {
            let request = csi::NodePublishVolumeRequest { readonly: true, ..volume.publish() };
            agent.calls.node_publish_volume(request).map(drop)
        }
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

/// What the guest holds for somebody else is let go of, where it is, and the disk comes that is late: while a call waits for that, or after its death.
fn let_go(agent: &Agent, point: &str, volume: &NodeVolume, image: &Image) {
    let _ = agent.guest.unmount(ELSEWHERE);
    if point.contains(":FindDisk") && agent.guest.disk_at(LUN).unwrap().is_none() {
        plug(agent, volume, image);
    }
}

fn assert_dies(agent: &mut Agent, point: &str, name: &str, volume: &NodeVolume, image: &Image) {
    if point.contains(":Delete") {
        let _ = unstage_while_it_stays_offline(agent, volume, &[("PROXMOX_CSI_KILL_AT", point)]);
        return assert_has_died(agent, point);
    }
    agent.restart_with(&[("PROXMOX_CSI_KILL_AT", point)]);
    let answer = std::thread::scope(|scope| {
        let answer = scope.spawn(|| call(agent, name, volume));
        if let ("after:unstage:AwaitRelease" | "after:publish:FindDisk", Some((_, step))) = (point, point.split_once(':')) {
            let line = format!("kill point inside:{step}:wait\n");
            let comes = wait::until(SEEN_LIMIT, || Ok::<_, ()>(agent.log().contains(&line).then_some(())));
            assert_eq!(comes, Ok(Some(())), "{}", agent.log());
            let_go(agent, point, volume, image);
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

/// A volume of its kind, as its pod has it.
struct Held<'a> {
    of: Of,
    volume: &'a NodeVolume,
    image: &'a Image,
    written: String,
}

impl Held<'_> {
    fn file(&self) -> String {
        if self.of == Of::Block { format!("/node{}", self.volume.target) } else { format!("/node{}/file", self.volume.target) }
    }

    /// Of what was written at first.
    fn content(&self, agent: &Agent) -> String {
        match self.of {
            Of::Ext4 | Of::Luks => agent.guest.sha256(&self.file()).unwrap(),
            Of::Block => [0, MIB - 64].map(|at| format!("{:x?}", agent.guest.read_at(&self.file(), at, 64).unwrap())).concat(),
        }
    }

    /// All is as it was before, and the filesystem as large as its disk.
    fn assert_whole(&self, agent: &Agent, point: &str) {
        agent.stage(self.volume);
        agent.publish(self.volume);
        assert_eq!(self.content(agent), self.written, "{point}");
        if self.of != Of::Block {
            let seen = agent.guest.stat_filesystem(&format!("/node{}", self.volume.target)).unwrap();
            assert!(seen.blocks * seen.block_bytes > self.image.size_bytes() - 48 * MIB, "{point}: not grown: {seen:?}");
        }
        agent.put_away(self.volume);
        assert_eq!(mappings(agent), Vec::<String>::new(), "{point}");
        if agent.guest.disk_at(OTHER_LUN).unwrap().is_some() {
            // Both, so that the volume's own has the first name again.
            [OTHER_LUN, LUN].into_iter().for_each(|lun| agent.detach(lun));
            plug(agent, self.volume, self.image);
        }
    }

    fn dies_and_is_repeated(&self, agent: &mut Agent, point: &str, name: &str) {
        assert_dies(agent, point, name, self.volume, self.image);
        let_go(agent, point, self.volume, self.image);
        agent.restart();
        println!("{point}");
        call_to_its_end(agent, name, self.volume);
    }

    fn dies_everywhere(&self, agent: &mut Agent) -> usize {
        let mut deaths = 0;
        for left in EVERY.iter().filter(|left| left.of == self.of) {
            let at = format!("{}:{}", left.call, left.step);
            let inside = left.inside.iter().map(|place| format!("inside:{at}:{place}"));
            for point in [format!("before:{at}")].into_iter().chain(inside).chain([format!("after:{at}")]) {
                agent.restart();
                (left.prepare)(agent, self.volume, self.image);
                self.dies_and_is_repeated(agent, &point, left.call);
                deaths += 1;
                self.assert_whole(agent, &point);
            }
        }
        for point in READ_ONLY_POINTS.into_iter().filter(|_| self.of == Of::Ext4) {
            agent.restart();
            agent.stage(self.volume);
            self.dies_and_is_repeated(agent, point, READ_ONLY);
            deaths += 1;
            let refused = format!("{:#}", agent.guest.write(&self.file(), b"x").unwrap_err());
            assert!(refused.contains("Read-only") || refused.contains("os error 30"), "{point}: {refused}");
            agent.put_away(self.volume);
        }
        deaths
    }
}

#[test]
fn guest_what_is_left_is_cleared_and_killed_at_every_point() {
    let Some(mut agent) = Agent::start_with_points("left") else { return };
    for (name, of) in [("left", Of::Ext4), ("left-luks", Of::Luks), ("left-block", Of::Block)] {
        let image = Image::new(64 * MIB);
        let mut volume = agent.volume(&handle(name), &image, LUN);
        match of {
            Of::Ext4 => (),
            Of::Luks => volume = encrypted(volume, PASSPHRASE),
            Of::Block => volume.capability = block_capability(),
        }
        plug(&agent, &volume, &image);
        agent.restart();
        agent.stage(&volume);
        agent.publish(&volume);
        let mut held = Held { of, volume: &volume, image: &image, written: String::new() };
        agent.guest.fill(&held.file(), 7, MIB).unwrap();
        held.written = held.content(&agent);
        agent.put_away(&volume);
        println!("{name}: {} deaths", held.dies_everywhere(&mut agent));
        if of != Of::Block {
            a_disk_that_stays_offline(&mut agent, &volume, &image);
        }
        agent.detach(LUN);
        match of {
            Of::Ext4 => assert_clean(&image),
            Of::Luks => assert_clean(&decrypted(&image, PASSPHRASE)),
            Of::Block => (),
        }
    }
    written_while_offline(&agent);
    a_disk_that_grows_while_its_filesystem_does(&mut agent);
    agent.restart_release();
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
    agent.restart_to_hold(AT, &[]);
    agent.stage(&volume);
    agent.publish(&volume);
    grow(agent, &image);
    let answer = std::thread::scope(|scope| {
        let call = scope.spawn(|| agent.calls.node_expand_volume(volume.expand(128 * MIB)));
        agent.wait_until_held(AT);
        grow(agent, &image);
        agent.let_go();
        call.join().unwrap()
    });
    let answer = answer.unwrap_or_else(|status| panic!("{status:?}; {}", agent.guest.quote()));
    assert_eq!(answer.capacity_bytes.cast_unsigned(), 192 * MIB, "{}", agent.log());
    let seen = agent.guest.stat_filesystem(&format!("/node{}", volume.target)).unwrap();
    assert!(seen.blocks * seen.block_bytes > 150 * MIB, "{seen:?}");
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
