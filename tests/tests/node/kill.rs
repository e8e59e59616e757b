//! Every deed of the agent cut short: before it, in the middle, after it. Then the same call again, until it is done.
//!
//! The agent for these tests (`scripts/build --kill-points`) tells the points that it passes, so the first life of a volume
//! lists them, and what is built in later is killed too. Further volumes live and die until every point has had its death.

use std::collections::{BTreeMap, HashMap, VecDeque};

use proto::publish_context::SERIAL;
use proto::{csi, secrets};
use testbed::calls::{NodeVolume, block_capability, mount_capability};
use testbed::guest::{GuestOptions, wait};
use testbed::tools;
use tonic::Status;

use crate::ciphertext::{assert_cryptsetup_opens, decrypted};
use crate::harness::{Agent, Image, MIB, SEEN_LIMIT, assert_clean, handle, start_node, wait_for_size};
use crate::luks::{PASSPHRASE, assert_no_key_is_left, encrypted, keyslots, mappings, volume_key};
use crate::xfs::assert_clean_xfs;

const KILL_AT: &str = "PROXMOX_CSI_KILL_AT";
/// The calls of a life, in order.
const CALLS: [&str; 5] = ["stage", "publish", "expand", "unpublish", "unstage"];
const LUN: u8 = 1;
/// A life ends with the points that come after what its deaths have done: a call has some four such places.
const MAX_LIVES: usize = 12;
/// SIGABRT.
const ABORTED: Option<i32> = Some(6);

/// What volumes are lived through, and how they are judged.
struct Kind {
    name: &'static str,
    /// Empty: it is shown as a block device.
    fstype: &'static str,
    size_bytes: u64,
    grown_bytes: u64,
    is_encrypted: bool,
    judge: fn(&Image),
    /// Points that there must be at least.
    must: &'static [&'static str],
    /// Deeds that are the same as another kind's, which dies at them.
    same: &'static [&'static str],
}

/// Of every kind with a filesystem.
const MUST: [&str; 4] =
    ["inside:stage:MakeFilesystem:write-4", "inside:stage:Mount:mounted", "inside:expand:Grow:ioctl", "inside:unstage:Unmount:umount2"];

impl Kind {
    fn is_block(&self) -> bool {
        self.fstype.is_empty()
    }

    /// Where a pod writes.
    fn file(&self, volume: &NodeVolume) -> String {
        if self.is_block() { format!("/node{}", volume.target) } else { format!("/node{}/file", volume.target) }
    }
}

/// A volume's image after its life, and what was written into it.
struct Lived {
    number: usize,
    image: Image,
    written: String,
}

/// The points of each call that no agent has died at yet.
type Points = BTreeMap<String, VecDeque<String>>;

struct Mortal<'a> {
    agent: Agent,
    kind: &'a Kind,
    /// What the running agent dies at.
    at: Option<String>,
    deaths: usize,
    is_plugged: bool,
}

impl<'a> Mortal<'a> {
    /// `None`, after saying so, where guests cannot run.
    fn boot(kind: &'a Kind) -> Option<Self> {
        let files = vec![(format!("{}/proxmox-csi-node", guest_init::NODE_ROOT), tools::kill_points_binary())];
        let agent = Agent::start_on(&GuestOptions { files, ..GuestOptions::named(kind.name) })?;
        Some(Self { agent, kind, at: None, deaths: 0, is_plugged: false })
    }

    /// The running agent's end, if it has not ended, and a new one that dies at that point.
    fn restart(&mut self, at: Option<&str>) {
        self.agent.guest.signal(self.agent.job, 9).unwrap();
        self.agent.guest.wait(self.agent.job, SEEN_LIMIT).unwrap();
        self.agent.job = start_node(&self.agent.guest, &at.map(|at| (KILL_AT, at)).into_iter().collect::<Vec<_>>());
        self.at = at.map(str::to_owned);
    }

    fn call(&self, call: &str, volume: &NodeVolume) -> impl FnOnce() -> Result<(), Status> + Send + use<> {
        let (calls, call, volume, grown) = (self.agent.calls.clone(), call.to_owned(), volume.clone(), self.kind.grown_bytes);
        move || match call.as_str() {
            "stage" => calls.node_stage_volume(volume.stage()).map(drop),
            "publish" => calls.node_publish_volume(volume.publish()).map(drop),
            // The secret is not told again: the kernel still has the key, whichever agent gave it.
            "expand" => {
                let request = csi::NodeExpandVolumeRequest { secrets: HashMap::new(), ..volume.expand(grown) };
                calls.node_expand_volume(request).map(drop)
            }
            "unpublish" => calls.node_unpublish_volume(volume.unpublish()).map(drop),
            _ => calls.node_unstage_volume(volume.unstage()).map(drop),
        }
    }

    /// Until the agent has told this point; `false`: it is dead.
    fn lives_to(&self, point: &str) -> bool {
        let line = format!("kill point {point}\n");
        let told = wait::until(SEEN_LIMIT, || {
            let (exit, output) = self.agent.guest.output(self.agent.job)?;
            let is_told = exit.is_none() && output.contains(&line);
            Ok::<_, anyhow::Error>((exit.is_some() || is_told).then_some(is_told))
        });
        told.unwrap().unwrap_or_else(|| panic!("the agent does not come to {point}; {}", self.agent.guest.quote()))
    }

    /// One attempt at a call. What the agent waits for, disk or size, comes when it waits. `None`: it died, where it should.
    fn attempt(&mut self, call: &str, volume: &NodeVolume, image: &Image) -> Option<Result<(), Status>> {
        let attempt = std::thread::spawn(self.call(call, volume));
        if call == "stage" && !self.is_plugged && self.lives_to("before:stage:FindDisk") {
            self.is_plugged = true;
            self.agent.guest.machine().plug(&image.drive(LUN, volume.publish_context.get(SERIAL).map(String::as_str))).unwrap();
        }
        if call == "expand" && image.size_bytes() < self.kind.grown_bytes && self.lives_to("before:expand:AwaitSize") {
            image.resize(self.kind.grown_bytes);
            self.agent.guest.machine().resize(LUN, self.kind.grown_bytes).unwrap();
        }
        let answer = attempt.join().unwrap();
        if answer.is_ok() {
            return Some(answer);
        }
        let Some(point) = &self.at else { return Some(answer) };
        let ended = self.agent.guest.wait(self.agent.job, SEEN_LIMIT).unwrap();
        let has_died = ended.exit.signal == ABORTED && ended.output.contains(&format!("killed at {point}\n"));
        assert!(has_died, "{call} at {point}: {answer:?}; {ended:?}");
        self.deaths += 1;
        None
    }

    /// A call until it is done, dying on the way at as many of its points as it comes to, one after the other. What a death
    /// leaves done is not done again: a point behind it is left for the next volume.
    fn perform(&mut self, call: &str, volume: &NodeVolume, image: &Image, points: &mut VecDeque<String>) {
        loop {
            let point = points.front().cloned();
            if self.at != point {
                self.restart(point.as_deref());
            }
            match self.attempt(call, volume, image) {
                None => drop(points.pop_front()),
                Some(Ok(())) => break,
                Some(Err(status)) => panic!("{call}, {} deaths before: {status:?}; {}", self.deaths, self.agent.guest.quote()),
            }
        }
    }

    /// A volume from its first stage to its last unstage.
    fn live(&mut self, number: usize, points: &mut Points) -> Lived {
        let image = Image::new(self.kind.size_bytes);
        let volume = self.volume(number, &image);
        let mut written = String::new();
        for call in CALLS {
            self.perform(call, &volume, &image, points.entry(call.into()).or_default());
            match call {
                "publish" => {
                    self.agent.guest.fill(&self.kind.file(&volume), number as u64, MIB).unwrap();
                    written = self.content(&volume);
                }
                "expand" if self.kind.is_block() => {
                    assert_eq!(self.agent.guest.disk_size_bytes(LUN).unwrap(), Some(self.kind.grown_bytes), "life {number}");
                }
                "expand" => {
                    let seen = self.agent.guest.stat_filesystem(&format!("/node{}", volume.target)).unwrap();
                    assert!(seen.blocks * seen.block_bytes > self.kind.size_bytes, "life {number} has not grown: {seen:?}");
                }
                _ => (),
            }
        }
        let left = self.agent.guest.mounts_below("/node/var/lib/kubelet").unwrap();
        assert!(left.len() == 1, "life {number}: a mount is left: {left:?}");
        assert_eq!(mappings(&self.agent), Vec::<String>::new(), "life {number}");
        assert_no_key_is_left(&self.agent.guest);
        self.agent.detach(LUN);
        self.is_plugged = false;
        (self.kind.judge)(&image);
        Lived { number, image, written }
    }

    /// Of what `live` writes.
    fn content(&self, volume: &NodeVolume) -> String {
        let file = self.kind.file(volume);
        if !self.kind.is_block() {
            return self.agent.guest.sha256(&file).unwrap();
        }
        [0, MIB - 64].map(|at| format!("{:x?}", self.agent.guest.read_at(&file, at, 64).unwrap())).concat()
    }

    fn volume(&self, number: usize, image: &Image) -> NodeVolume {
        let mut volume = self.agent.volume(&handle(&format!("{}-{number}", self.kind.name)), image, LUN);
        volume.capability = if self.kind.is_block() { block_capability() } else { mount_capability(self.kind.fstype) };
        if self.kind.is_encrypted { encrypted(volume, PASSPHRASE) } else { volume }
    }

    /// What was written is there, in all of them.
    fn read_again(&mut self, lived: &[Lived]) {
        self.restart(None);
        for Lived { number, image, written } in lived {
            let volume = self.volume(*number, image);
            self.agent.guest.machine().plug(&image.drive(LUN, volume.publish_context.get(SERIAL).map(String::as_str))).unwrap();
            self.agent.stage(&volume);
            self.agent.publish(&volume);
            assert_eq!(self.content(&volume), *written, "life {number}");
            self.agent.put_away(&volume);
            self.agent.detach(LUN);
        }
    }
}

/// The points that an agent has told, by call, in their order.
fn points(output: &str) -> Points {
    let mut points = Points::new();
    for point in output.lines().filter_map(|line| line.strip_prefix("kill point ")) {
        let call = point.split(':').nth(1).unwrap_or_default();
        points.entry(call.into()).or_default().push_back(point.into());
    }
    points
}

fn walk(kind: &Kind) {
    let Some(mut mortal) = Mortal::boot(kind) else { return };
    mortal.walk(kind);
    mortal.agent.guest.power_off().unwrap();
}

impl<'a> Mortal<'a> {
    /// Volumes of this kind.
    fn walk(&mut self, kind: &'a Kind) {
        let mortal = self;
        (mortal.kind, mortal.deaths) = (kind, 0);
        // It tells each point once.
        mortal.restart(None);
        let mut lived = vec![mortal.live(0, &mut Points::new())];
        let (_, output) = mortal.agent.guest.output(mortal.agent.job).unwrap();
        let mut points = points(&output);
        for deed in kind.same {
            points.values_mut().for_each(|points| points.retain(|point| !format!("{point}:").contains(&format!(":{deed}:"))));
        }
        let told: String = points.values().flatten().map(|point| format!("{point}\n")).collect();
        let must: &[&str] = if kind.is_block() { &[] } else { &MUST };
        for must in must.iter().chain(kind.must) {
            assert!(told.contains(must), "{must} is not among the points:\n{told}");
        }
        while points.values().any(|left| !left.is_empty()) {
            assert!(lived.len() <= MAX_LIVES, "points of the first life that no other comes to: {points:?}");
            lived.push(mortal.live(lived.len(), &mut points));
        }
        mortal.read_again(&lived);
        println!("{}: {} deaths in {} lives at\n{told}", kind.name, mortal.deaths, lived.len() - 1);
        assert_eq!(mortal.deaths, told.lines().count());
    }
}

fn assert_clean_inside(image: &Image, judge: fn(&Image)) {
    assert_cryptsetup_opens(image, PASSPHRASE);
    judge(&decrypted(image, PASSPHRASE));
}

const EXT4: Kind = Kind {
    name: "killed-ext4",
    fstype: "ext4",
    size_bytes: 64 * MIB,
    grown_bytes: 96 * MIB,
    is_encrypted: false,
    judge: assert_clean,
    must: &["after:stage:FindDisk", "inside:publish:Bind:cloned", "after:unpublish:RemoveFolder", "after:unstage:RemoveFolder"],
    same: &[],
};

const BLOCK: Kind = Kind {
    name: "killed-block",
    fstype: "",
    // Whatever a pod writes is its own business.
    judge: |_| (),
    must: &[
        "after:stage:FindDisk",
        "before:publish:MakeFile",
        "inside:publish:Bind:cloned",
        "after:expand:AwaitSize",
        "inside:unpublish:Unmount:umount2",
        "after:unpublish:RemoveFile",
        "before:unstage:RemoveFolder",
    ],
    ..EXT4
};

const XFS: Kind = Kind {
    name: "killed-xfs",
    fstype: "xfs",
    size_bytes: 300 * MIB,
    grown_bytes: 400 * MIB,
    judge: |image| assert_clean_xfs(&image.0),
    ..EXT4
};

const LUKS: Kind = Kind {
    is_encrypted: true,
    must: &[
        "inside:stage:Open:created",
        "inside:stage:Open:key-held",
        "inside:stage:Open:loaded",
        "inside:expand:GrowMapping:loaded",
        "inside:unstage:Close:removed",
        "inside:unstage:Close:key-forgotten",
    ],
    ..EXT4
};

#[test]
fn guest_ext4_killed_at_every_point() {
    walk(&EXT4);
}

/// Plain, and then encrypted in the same guest: a header without a filesystem's mark in it, and the mapping shown. What dies as with plain ones, or as
/// with an encrypted filesystem, is left out.
#[test]
fn guest_raw_block_killed_at_every_point() {
    let luks = Kind {
        name: "killed-luks-block",
        size_bytes: 64 * MIB,
        is_encrypted: true,
        judge: |image| assert_cryptsetup_opens(image, PASSPHRASE),
        must: &[
            "inside:stage:Encrypt:write-4",
            "inside:publish:Bind:cloned",
            "inside:expand:GrowMapping:loaded",
            "after:unpublish:Unmount",
        ],
        same: &["FindDisk", "Probe", "MakeFolder", "MakeFile", "AwaitSize", "RemoveFile", "RemoveFolder"],
        ..BLOCK
    };
    let Some(mut mortal) = Mortal::boot(&BLOCK) else { return };
    mortal.walk(&BLOCK);
    mortal.walk(&luks);
    mortal.agent.guest.power_off().unwrap();
}

#[test]
fn guest_xfs_killed_at_every_point() {
    walk(&XFS);
}

#[test]
fn guest_encrypted_ext4_killed_at_every_point() {
    walk(&Kind { name: "killed-luks-ext4", judge: |image| assert_clean_inside(image, assert_clean), ..LUKS });
}

/// The header is made and the pod shown the volume as with ext4.
#[test]
fn guest_encrypted_xfs_killed_at_every_point() {
    walk(&Kind {
        name: "killed-luks-xfs",
        fstype: "xfs",
        size_bytes: 316 * MIB,
        grown_bytes: 416 * MIB,
        judge: |image| assert_clean_inside(image, XFS.judge),
        same: &["FindDisk", "Probe", "Encrypt", "MakeFolder", "Bind", "AwaitSize", "unpublish", "RemoveFolder"],
        ..LUKS
    });
}

/// A passphrase that is replaced: after every death, one of the two opens.
#[test]
fn guest_rotation_killed_at_every_point() {
    const NEW: &str = "the passphrase that comes after it";
    let Some(mut mortal) = Mortal::boot(&Kind { name: "killed-rotation", size_bytes: 48 * MIB, ..LUKS }) else { return };
    let (handle, made) = (handle("killed-rotation"), Image::new(48 * MIB));
    let volume = mortal.agent.attach(&handle, &made, LUN);
    mortal.is_plugged = true;
    let (old, mut both) = (encrypted(volume.clone(), PASSPHRASE), encrypted(volume, NEW));
    both.secrets.insert(secrets::PASSPHRASE_PREVIOUS.into(), PASSPHRASE.into());
    mortal.agent.stage(&old);
    mortal.agent.put_away(&old);
    mortal.agent.detach(LUN);
    let key = volume_key(&made, PASSPHRASE).unwrap();

    let mut points: Option<VecDeque<String>> = None;
    for lives in 0.. {
        let image = Image::new(made.size_bytes());
        std::fs::copy(&made.0, &image.0).unwrap();
        mortal.agent.attach(&handle, &image, LUN);
        loop {
            let point = points.as_ref().and_then(|points| points.front().cloned());
            mortal.restart(point.as_deref());
            match mortal.attempt("stage", &both, &image) {
                Some(Ok(())) => break,
                Some(Err(status)) => panic!("{status:?}; {}", mortal.agent.guest.quote()),
                None => (),
            }
            points.as_mut().unwrap().pop_front();
            let opened = volume_key(&image, PASSPHRASE).or_else(|| volume_key(&image, NEW));
            assert!(opened.is_some_and(|opened| opened == key), "neither opens after {point:?}");
        }
        let left = points.get_or_insert_with(|| {
            let (_, output) = mortal.agent.guest.output(mortal.agent.job).unwrap();
            let mut told = self::points(&output).remove("stage").unwrap();
            told.retain(|point| point.contains(":stage:Open"));
            println!("{told:#?}");
            for must in ["add-keyslot", "keyslot-added", "remove-keyslot", "keyslot-removed"] {
                assert!(told.iter().any(|point| point.ends_with(must)), "{must} is not among {told:?}");
            }
            told
        });
        let is_done = left.is_empty();
        mortal.agent.put_away(&both);
        mortal.agent.detach(LUN);
        assert!(volume_key(&image, NEW).is_some_and(|opened| opened == key) && volume_key(&image, PASSPHRASE).is_none());
        assert_eq!(keyslots(&image).len(), 1, "a keyslot of a rotation that was cut short is left");
        assert_cryptsetup_opens(&image, NEW);
        if is_done {
            println!("{} deaths in {lives} lives", mortal.deaths);
            break;
        }
        assert!(lives <= MAX_LIVES, "points that no life comes to: {points:?}");
    }
    mortal.agent.guest.power_off().unwrap();
}

/// A LUKS volume is made, and the agent dies before there is a filesystem in it; then the controller grows the disk, and it is staged
/// anew: what a probe of its new size looks at was never written.
#[test]
fn guest_a_volume_that_grew_before_its_filesystem_was_made() {
    let Some(mut mortal) = Mortal::boot(&Kind { name: "grown-before", ..LUKS }) else { return };
    let kinds = [
        ("after:stage:Encrypt", "ext4", 64 * MIB, 96 * MIB, assert_clean as fn(&Image)),
        ("after:stage:Encrypt", "xfs", 316 * MIB, 416 * MIB, XFS.judge),
        // The mapping stays, and is smaller than its disk.
        ("after:stage:Open", "ext4", 64 * MIB, 96 * MIB, assert_clean),
    ];
    for (number, (point, fstype, size_bytes, grown_bytes, judge)) in kinds.into_iter().enumerate() {
        let image = Image::new(size_bytes);
        let mut volume = mortal.volume(number, &image);
        volume.capability = mount_capability(fstype);
        let plug = |mortal: &Mortal<'_>| {
            let drive = image.drive(LUN, volume.publish_context.get(SERIAL).map(String::as_str));
            mortal.agent.guest.machine().plug(&drive).unwrap();
            wait_for_size(&mortal.agent.guest, LUN, Some(image.size_bytes()));
        };
        plug(&mortal);
        mortal.is_plugged = true;
        mortal.restart(Some(point));
        assert!(mortal.attempt("stage", &volume, &image).is_none(), "it does not die at {point}");
        assert_eq!(image.read_at(0, 6), b"LUKS\xba\xbe");
        if mappings(&mortal.agent).is_empty() {
            mortal.agent.detach(LUN);
            image.resize(grown_bytes);
            plug(&mortal);
        } else {
            image.resize(grown_bytes);
            mortal.agent.guest.machine().resize(LUN, grown_bytes).unwrap();
            wait_for_size(&mortal.agent.guest, LUN, Some(grown_bytes));
        }
        mortal.restart(None);
        mortal.agent.stage(&volume);
        mortal.agent.publish(&volume);
        let seen = mortal.agent.guest.stat_filesystem(&format!("/node{}", volume.target)).unwrap();
        assert!(seen.blocks * seen.block_bytes > size_bytes, "{point}, {fstype}: {seen:?}");
        mortal.agent.put_away(&volume);
        mortal.agent.detach(LUN);
        assert_clean_inside(&image, judge);
    }
    mortal.agent.guest.power_off().unwrap();
}
