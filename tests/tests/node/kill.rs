//! Every deed of the agent cut short: before it, in the middle, after it. Then the same call again, until it is done.
//!
//! The agent for these tests (`scripts/build --kill-points`) tells the points that it passes, so the first life of a volume
//! lists them, and what is built in later is killed too. Each further life takes the next point of every call.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use proto::publish_context::SERIAL;
use testbed::calls::NodeVolume;
use testbed::guest::{GuestOptions, wait};
use testbed::tools;
use tonic::Status;

use crate::harness::{Agent, Image, MIB, SEEN_LIMIT, assert_clean, boot, handle, start_node, wait_for_size};
use crate::xfs::assert_clean_xfs;

const KILL_AT: &str = "PROXMOX_CSI_KILL_AT";
/// The calls of a life, in order.
const CALLS: [&str; 5] = ["stage", "publish", "expand", "unpublish", "unstage"];
const LUN: u8 = 1;
/// SIGABRT.
const ABORTED: Option<i32> = Some(6);

/// What volumes are lived through, and how they are judged.
struct Kind {
    name: &'static str,
    fstype: &'static str,
    size_bytes: u64,
    grown_bytes: u64,
    judge: fn(&Image),
}

/// A volume's image after its life, and what was written into it.
struct Lived {
    number: usize,
    image: Image,
    written: String,
}

struct Mortal<'a> {
    agent: Agent,
    kind: &'a Kind,
    /// What the running agent dies at.
    at: Option<String>,
}

impl Mortal<'_> {
    /// The running agent's end, and a new one that dies at that point.
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
            "expand" => calls.node_expand_volume(volume.expand(grown)).map(drop),
            "unpublish" => calls.node_unpublish_volume(volume.unpublish()).map(drop),
            _ => calls.node_unstage_volume(volume.unstage()).map(drop),
        }
    }

    /// Waits until the agent has told this point, or is dead.
    fn wait_for(&self, point: &str) {
        let line = format!("kill point {point}\n");
        let told = wait::until(SEEN_LIMIT, || {
            let (exit, output) = self.agent.guest.output(self.agent.job)?;
            Ok::<_, anyhow::Error>((exit.is_some() || output.contains(&line)).then_some(()))
        });
        assert!(told.unwrap().is_some(), "the agent does not come to {point}; {}", self.agent.guest.quote());
    }

    /// One call, killed at `point` and made again; `then` is the point that the next agent of this life dies at. What the agent waits
    /// for comes when it waits. Answers whether the point was passed.
    fn perform(&mut self, call: &str, volume: &NodeVolume, image: &Image, point: Option<&str>, then: Option<&str>, is_first: bool) -> bool {
        if let Some(point) = point.filter(|point| self.at.as_deref() != Some(point)) {
            self.restart(Some(point));
        }
        let attempt = std::thread::spawn(self.call(call, volume));
        let is_told = point.is_some() || is_first;
        match call {
            "stage" => {
                if is_told {
                    self.wait_for("before:stage:FindDisk");
                }
                self.agent.guest.machine().plug(&image.drive(LUN, volume.publish_context.get(SERIAL).map(String::as_str))).unwrap();
            }
            "expand" => {
                if is_told {
                    self.wait_for("before:expand:AwaitSize");
                }
                image.resize(self.kind.grown_bytes);
                self.agent.guest.machine().resize(LUN, self.kind.grown_bytes).unwrap();
            }
            _ => (),
        }
        let answer = attempt.join().unwrap();
        let Some(point) = point else {
            answer.unwrap_or_else(|status| panic!("{call}: {status:?}; {}", self.agent.guest.quote()));
            return true;
        };
        if answer.is_ok() {
            return false;
        }
        let ended = self.agent.guest.wait(self.agent.job, SEEN_LIMIT).unwrap();
        assert!(
            ended.exit.signal == ABORTED && ended.output.contains(&format!("killed at {point}\n")),
            "{call} at {point}: {answer:?}; {ended:?}"
        );
        self.restart(then);
        if call == "expand" {
            wait_for_size(&self.agent.guest, LUN, Some(self.kind.grown_bytes));
        }
        (self.call(call, volume))().unwrap_or_else(|status| panic!("{call} after {point}: {status:?}; {}", self.agent.guest.quote()));
        true
    }

    /// A volume from its first stage to its last unstage; `points`: where each call dies first. Answers the points that were not passed.
    fn live(&mut self, number: usize, points: &BTreeMap<&str, &str>) -> (Lived, Vec<String>) {
        let image = Image::new(self.kind.size_bytes);
        let volume = self.volume(number, &image);
        let mut written = String::new();
        let mut missed = Vec::new();
        for (index, call) in CALLS.into_iter().enumerate() {
            let then = CALLS[index + 1..].iter().find_map(|call| points.get(call));
            let point = points.get(call).copied();
            if !self.perform(call, &volume, &image, point, then.copied(), number == 0) {
                missed.extend(point.map(str::to_owned));
            }
            match call {
                "publish" => written = self.agent.guest.fill(&format!("/node{}/file", volume.target), number as u64, MIB).unwrap(),
                "expand" => {
                    let seen = self.agent.guest.stat_filesystem(&format!("/node{}", volume.target)).unwrap();
                    assert!(seen.blocks * seen.block_bytes > self.kind.size_bytes, "life {number} has not grown: {seen:?}");
                }
                _ => (),
            }
        }
        assert!(self.agent.guest.mounts_below("/node/var/lib/kubelet/").unwrap().is_empty(), "{number}: a mount is left");
        self.agent.detach(LUN);
        (self.kind.judge)(&image);
        (Lived { number, image, written }, missed)
    }

    fn volume(&self, number: usize, image: &Image) -> NodeVolume {
        let mut volume = self.agent.volume(&handle(&format!("{}-{number}", self.kind.name)), image, LUN);
        volume.capability = testbed::calls::mount_capability(self.kind.fstype);
        volume
    }

    /// What was written is there, in all of them.
    fn read_again(&mut self, lived: &[Lived]) {
        self.restart(None);
        for Lived { number, image, written } in lived {
            let volume = self.volume(*number, image);
            self.agent.guest.machine().plug(&image.drive(LUN, volume.publish_context.get(SERIAL).map(String::as_str))).unwrap();
            self.agent.stage(&volume);
            self.agent.publish(&volume);
            let seen = self.agent.guest.sha256(&format!("/node{}/file", volume.target)).unwrap();
            assert_eq!(seen, *written, "life {number}");
            self.agent.put_away(&volume);
            self.agent.detach(LUN);
        }
    }
}

/// The points that an agent has told, by call, in their order.
fn points(output: &str) -> BTreeMap<&str, Vec<&str>> {
    let mut points: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for point in output.lines().filter_map(|line| line.strip_prefix("kill point ")) {
        let call = point.split(':').nth(1).unwrap_or_default();
        points.entry(call).or_default().push(point);
    }
    points
}

fn walk(kind: &Kind) {
    let binary = tools::kill_points_binary();
    let files = vec![(format!("{}/proxmox-csi-node", guest_init::NODE_ROOT), binary)];
    let Some(guest) = boot(&GuestOptions { files, ..GuestOptions::named(kind.name) }) else { return };
    let (job, calls) = (start_node(&guest, &[]), guest.node().unwrap());
    let mut mortal = Mortal { agent: Agent { guest, calls, job }, kind, at: None };
    let mut lived = vec![mortal.live(0, &BTreeMap::new()).0];
    let (_, output) = mortal.agent.guest.output(mortal.agent.job).unwrap();
    let points = points(&output);
    assert_eq!(points.keys().copied().collect::<Vec<_>>(), ["expand", "publish", "stage", "unpublish", "unstage"], "{output}");
    let lives = points.values().map(Vec::len).max().unwrap_or_default();
    let mut missed = Vec::new();
    for life in 0..lives {
        let of_life = points.iter().filter_map(|(call, points)| Some((*call, *points.get(life)?))).collect();
        let (volume, not_passed) = mortal.live(life + 1, &of_life);
        lived.push(volume);
        missed.extend(not_passed);
    }
    mortal.read_again(&lived);
    let mut told = String::new();
    for (call, points) in &points {
        let _ = writeln!(told, "{call}: {}", points.join(" "));
    }
    println!("{}: {} deaths in {lives} lives\n{told}", kind.name, points.values().map(Vec::len).sum::<usize>() - missed.len());
    assert_eq!(missed, Vec::<String>::new(), "points of the first life that the others never came to");
    for must in
        ["inside:stage:MakeFilesystem:write-4", "inside:stage:Mount:mounted", "inside:publish:Bind:cloned", "after:unstage:RemoveFolder"]
    {
        assert!(told.contains(must), "{must} is not among the points:\n{told}");
    }
    mortal.agent.guest.power_off().unwrap();
}

#[test]
fn guest_ext4_killed_at_every_point() {
    walk(&Kind { name: "killed-ext4", fstype: "ext4", size_bytes: 64 * MIB, grown_bytes: 96 * MIB, judge: assert_clean });
}

#[test]
fn guest_xfs_killed_at_every_point() {
    let judge = |image: &Image| assert_clean_xfs(&image.0);
    walk(&Kind { name: "killed-xfs", fstype: "xfs", size_bytes: 300 * MIB, grown_bytes: 400 * MIB, judge });
}
