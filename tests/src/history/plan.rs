//! What happens in a history: calls as an orchestrator makes them (and sometimes should not), and what goes wrong meanwhile.

use std::fmt;

use super::chance::{Chance, of_name};
use super::world::{Claim, Rpc};
use crate::sim::{Builder, Description, Effect, Inner, Latency, Node, Simulator, Storage, Version, Vm};

pub const NODES: [&str; 3] = ["pve1", "pve2", "pve3"];
/// VM 101 and 102 live on pve1, and so on.
pub const VMS: [u32; 6] = [101, 102, 201, 202, 301, 302];
const MIB: u64 = 1 << 20;
/// Calls of one volume: from its creation to its end, with a VM or two.
const MOST_CALLS: usize = 7;
const MOST_TROUBLES: usize = 6;
/// In steps of the scheduler: a lock, a pause, an absence.
const LONGEST_TROUBLE: usize = 60;

/// One thing that happens.
#[derive(Debug, Clone)]
pub enum Act {
    /// A call. Unless it `overlaps`, the volume's call before it has ended. `patience`: steps until the client gives up.
    Call { by: usize, rpc: Rpc, overlaps: bool, patience: Option<usize> },
    /// A fault of the next such request.
    Request { method: &'static str, path: &'static str, nth: u32, effect: Effect },
    /// A fault inside a VM or a task.
    Inside(Inner),
    /// SIGKILL, and a new process.
    Kill { controller: usize },
    /// SIGSTOP; SIGCONT after so many steps.
    Stop { controller: usize, steps: usize },
    /// Backup, say.
    Lock { vm: u32, lock: &'static str, steps: usize },
    /// Live migration.
    Move { vm: u32, node: &'static str },
    /// Somebody attaches the volume, as `qm set` does.
    ByHand { vm: u32, volume: usize },
    /// QEMU ends, and starts again with what is configured.
    Restart { vm: u32 },
    /// A Proxmox node cannot be reached.
    Away { node: &'static str, steps: usize },
}

/// It, and its number in the history as it was made: it keeps it when others are left out.
#[derive(Debug, Clone)]
pub struct Item {
    pub number: usize,
    pub act: Act,
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{} {:?}", self.number, self.act)
    }
}

/// All of it. The seed also orders what is free to happen in any order.
#[derive(Debug, Clone)]
pub struct History {
    pub seed: u64,
    pub controllers: usize,
    /// They have Kubernetes, and one of them acts at a time by its Lease.
    pub has_lease: bool,
    /// Volumes on shared storages are made by the driver, too, and not by hand.
    pub creates_shared: bool,
    /// What Proxmox is simulated.
    pub version: Version,
    pub items: Vec<Item>,
}

/// Three hosts with two VMs each; storages local to each and shared by all.
#[must_use]
pub fn cluster() -> Builder {
    let mut description = Description { nodes: NODES.map(Node::online).to_vec(), ..Description::standard() };
    description.vms = VMS.iter().map(|vmid| Vm::linux(*vmid, home(*vmid), &format!("node-{vmid}"), None)).collect();
    description.storages = vec![
        Storage::new("ds", "dir", &[("path", "/ds")]),
        Storage::new("thin", "lvmthin", &[("vgname", "pve"), ("thinpool", "data")]),
        Storage::new("nfs", "nfs", &[("path", "/mnt/pve/nfs")]),
        Storage::new("ceph", "rbd", &[("pool", "ceph")]),
    ];
    let request = std::time::Duration::ZERO;
    Simulator::builder(description).latency(Latency { request, ..Latency::RECORDED })
}

/// The node that a VM is on at first.
#[must_use]
pub fn home(vmid: u32) -> &'static str {
    NODES.get(usize::try_from(vmid / 100).unwrap_or(1) - 1).copied().unwrap_or("pve1")
}

/// The volumes that may come to be; each begins with the same number of a history.
#[must_use]
pub fn claims() -> Vec<Claim> {
    type Place = (&'static str, &'static [&'static str], Option<&'static str>);
    let places: [Place; 4] = [
        ("nfs", &[], Some("9999/vm-9999-pvc-0.raw")),
        ("ds", &["pve1"], None),
        ("ceph", &[], Some("vm-9999-pvc-2")),
        ("thin", &["pve2", "pve1"], None),
    ];
    let claim = |(number, (storage, zones, image)): (usize, Place)| Claim {
        name: format!("pvc-{number}"),
        storage: storage.to_owned(),
        zones: zones.iter().map(|zone| (*zone).to_owned()).collect(),
        bytes: 64 * MIB,
        image,
        id: None,
    };
    places.into_iter().enumerate().map(claim).collect()
}

/// Where a volume can be attached.
#[must_use]
pub fn vms_of(volume: usize) -> &'static [u32] {
    match volume {
        1 => &[101, 102],
        3 => &[201, 202],
        _ => &VMS,
    }
}

const PATHS: [(&str, &str); 9] = [
    ("POST", "/nodes/*/qemu/*/config"),
    ("POST", "/nodes/*/qemu/*/config"),
    ("GET", "/nodes/*/qemu/*/pending"),
    ("GET", "/nodes/*/qemu/*/status/current"),
    ("GET", "/nodes/*/tasks/**"),
    ("POST", "/nodes/*/storage/*/content"),
    ("DELETE", "/nodes/*/storage/*/content/**"),
    ("PUT", "/nodes/*/qemu/*/resize"),
    ("GET", "/cluster/resources"),
];

impl History {
    /// The history of a seed: always the same one.
    #[must_use]
    pub fn new(seed: u64) -> History {
        let mut chance = Chance::new(seed);
        let controllers = 1 + chance.below(2);
        let mut acts = Vec::new();
        let volumes = 1 + chance.below(3);
        let first = chance.below(4);
        for volume in (first..first + volumes).map(|volume| volume % 4) {
            calls(&mut chance, volume, controllers, &mut acts);
        }
        for _ in 0..chance.below(MOST_TROUBLES + 1) {
            let trouble = trouble(&mut chance, controllers, volumes, first);
            let place = chance.below(acts.len() + 1);
            acts.insert(place, trouble);
        }
        let items = acts.into_iter().enumerate().map(|(number, act)| Item { number, act }).collect();
        let version = chance.pick(&[Version::V9_2, Version::V9_0, Version::V8_4, Version::V8_2]).copied().unwrap_or_default();
        let (has_lease, creates_shared) = (of_name(seed, "lease").is_multiple_of(3), of_name(seed, "shared").is_multiple_of(2));
        History { seed, controllers, has_lease, creates_shared, version, items }
    }

    /// Its volumes.
    #[must_use]
    pub fn claims(&self) -> Vec<Claim> {
        let image = |claim: &Claim| claim.image.filter(|_| !self.creates_shared);
        claims().into_iter().map(|claim| Claim { image: image(&claim), ..claim }).collect()
    }

    /// Whether anybody but one controller writes in it: another one, one after a kill that does not know the writes of the one before, a
    /// person.
    #[must_use]
    pub fn has_rivals(&self) -> bool {
        self.controllers > 1 || self.items.iter().any(|item| matches!(item.act, Act::Kill { .. } | Act::ByHand { .. }))
    }

    /// The same without the items at these places.
    #[must_use]
    pub fn without(&self, places: std::ops::Range<usize>) -> History {
        let items = self.items.iter().enumerate().filter(|(place, _)| !places.contains(place)).map(|(_, item)| item.clone());
        History { items: items.collect(), ..self.clone() }
    }
}

fn calls(chance: &mut Chance, volume: usize, controllers: usize, acts: &mut Vec<Act>) {
    let vm = |chance: &mut Chance| chance.pick(vms_of(volume)).copied().unwrap_or(101);
    let mut at: Option<u32> = None;
    for number in 0..2 + chance.below(MOST_CALLS) {
        let rpc = match (number, at, chance.below(100)) {
            (0, _, _) => Rpc::Create { volume },
            // What a second cluster, or an orchestrator that lost its memory, does.
            (_, _, 0..12) => Rpc::Publish { volume, vm: vm(chance) },
            (_, _, 12..16) => Rpc::Unpublish { volume, vm: vm(chance) },
            (_, _, 16..20) => Rpc::Create { volume },
            (_, _, 20..23) => Rpc::Delete { volume },
            (_, Some(vm), 23..45) => Rpc::Publish { volume, vm },
            (_, Some(_), 45..60) => Rpc::Expand { volume, bytes: 64 * MIB * u64::try_from(number + 1).unwrap_or(1) },
            (_, Some(vm), _) => {
                at = None;
                Rpc::Unpublish { volume, vm }
            }
            (_, None, 90..) => Rpc::Delete { volume },
            (_, None, _) => {
                let vm = vm(chance);
                at = Some(vm);
                Rpc::Publish { volume, vm }
            }
        };
        let overlaps = chance.percent(20);
        let patience = chance.percent(8).then(|| chance.below(40));
        acts.push(Act::Call { by: chance.below(controllers), rpc, overlaps, patience });
    }
}

fn trouble(chance: &mut Chance, controllers: usize, volumes: usize, first: usize) -> Act {
    let vm = chance.pick(&VMS).copied().unwrap_or(101);
    let steps = 5 + chance.below(LONGEST_TROUBLE);
    let controller = chance.below(controllers);
    let node = chance.pick(&NODES).copied().unwrap_or("pve1");
    match chance.below(100) {
        0..50 => {
            let (method, path) = chance.pick(&PATHS).copied().unwrap_or(PATHS[0]);
            let effect = match chance.below(10) {
                0..3 => Effect::Close,
                3..6 => Effect::CloseAfterwards,
                6..9 => Effect::TimeOutButComplete,
                _ => Effect::Answer { status: 500, reason: "got timeout".into() },
            };
            Act::Request { method, path, nth: 1 + u32::try_from(chance.below(4)).unwrap_or(0), effect }
        }
        50..65 => Act::Inside(match chance.below(8) {
            0 => Inner::PhantomAttach { vmid: vm },
            1 => Inner::PlugFails { vmid: vm, text: "adding blockdev 'drive-scsi1' failed: got timeout".into() },
            2 => Inner::DiskStays { vmid: vm },
            3 => Inner::ControllerStays { vmid: vm },
            4 => Inner::ResizeSecondHalf { vmid: vm },
            5 => Inner::TaskFails { kind: "imgdel".into(), exit_status: "unexpected status".into() },
            6 => Inner::TaskFails { kind: "qmconfig".into(), exit_status: "unexpected status".into() },
            _ => Inner::WorkerDies { vmid: vm },
        }),
        65..75 => Act::Kill { controller },
        75..80 => Act::Stop { controller, steps },
        80..85 => Act::Lock { vm, lock: "backup", steps },
        85..88 => Act::Move { vm, node },
        88..92 => Act::ByHand { vm, volume: (first + chance.below(volumes)) % 4 },
        92..96 => Act::Restart { vm },
        _ => Act::Away { node, steps },
    }
}
