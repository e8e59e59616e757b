//! The storm: many calls at once on a model of Proxmox's own latencies (`Latency::MODEL`), under simulated time.
//!
//! Three API workers per node, connections closed after protected calls, one config task at a time per VM. What our own code takes
//! is not in these times: they are the same on every machine. Memory is measured on the release binary.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::history::{Claim, Rpc, World, under_paused_time};
use crate::sim::{Builder, Description, Latency, Node, Simulator, Storage, Vm};

mod memory;

pub use memory::memory;

const MIB: u64 = 1 << 20;
/// The step of simulated time: what is measured is right to one of it.
const TICK: Duration = Duration::from_millis(1);
/// No two requests are let in at the same moment.
const MOMENT: Duration = Duration::from_micros(10);
/// The longest that a part may take, simulated.
const LIMIT: Duration = Duration::from_secs(600);
/// A second kubelet's worth of volumes on one VM.
const DRAINED: usize = 20;

/// How large the cluster is.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    pub nodes: usize,
    pub vms: usize,
    /// Images of strangers on each storage.
    pub images: usize,
}

/// The model's own cluster.
pub const SMALL: Size = Size { nodes: 3, vms: 10, images: 0 };

impl Size {
    fn node(self, number: usize) -> String {
        format!("pve{}", number % self.nodes + 1)
    }

    fn vmid(number: usize) -> u32 {
        100 + u32::try_from(number).unwrap_or(0)
    }

    /// The VM of the `number`th volume: one after the other.
    fn vm_for(self, number: usize) -> u32 {
        Self::vmid(number % self.vms)
    }

    fn cluster(self, scsihw: &str) -> Builder {
        let mut description = Description { nodes: Vec::new(), vms: Vec::new(), storages: Vec::new(), ..Description::standard() };
        description.nodes = (0..self.nodes).map(|number| Node::online(&self.node(number))).collect();
        for number in 0..self.vms {
            let vmid = Self::vmid(number);
            let mut vm = Vm::linux(vmid, &self.node(number), &format!("node-{vmid}"), None);
            vm.config.insert("scsihw".to_owned(), scsihw.to_owned());
            description.vms.push(vm);
        }
        let huge = 1 << 50;
        let local = Storage { total_bytes: huge, ..Storage::new("ds", "dir", &[("path", "/ds")]) };
        let shared = Storage { total_bytes: huge, ..Storage::new("ceph", "rbd", &[("pool", "ceph")]) };
        description.storages = vec![local, shared];
        Simulator::builder(description).latency(Latency::MODEL)
    }

    /// Volumes on local storages, each on the node of its VM; or on the shared one, which are made beforehand.
    fn claims(self, count: usize, shared: bool) -> Vec<Claim> {
        let claim = |number: usize| Claim {
            name: format!("pvc-{number}"),
            storage: if shared { "ceph" } else { "ds" }.to_owned(),
            zones: if shared { Vec::new() } else { vec![self.node(number % self.vms)] },
            bytes: 64 * MIB,
            image: None,
            id: shared.then(|| format!("{}//ceph/vm-9999-pvc-{number}", crate::history::world::REGION)),
        };
        (0..count).map(claim).collect()
    }

    async fn world(self, scsihw: &str, count: usize, shared: bool) -> Result<World> {
        self.world_with(scsihw, count, shared, false).await
    }

    /// With Kubernetes and its Lease, where wanted.
    async fn world_with(self, scsihw: &str, count: usize, shared: bool, lease: bool) -> Result<World> {
        let (cluster, claims) = (self.cluster(scsihw), self.claims(count, shared));
        let world = if lease { World::with_lease(cluster, 1, claims).await? } else { World::new(cluster, 1, claims).await? };
        for number in 0..self.images {
            let make = |node: &str, volid: String| world.sim.create_volume(node, &volid, MIB).map_err(anyhow::Error::msg);
            make("pve1", format!("ds:7777/vm-7777-{number}.raw"))?;
            make("pve1", format!("ceph:vm-7777-{number}"))?;
        }
        if shared {
            for number in 0..count {
                world.sim.create_volume("pve1", &format!("ceph:vm-9999-pvc-{number}"), 64 * MIB).map_err(anyhow::Error::msg)?;
            }
        }
        Ok(world)
    }
}

/// One row: how long the calls took, and how many of them a second.
#[derive(Debug, Clone)]
pub struct Row {
    pub what: String,
    pub at_once: usize,
    pub times: Vec<Duration>,
    pub took: Duration,
    /// Answers other than OK (repeated until they were).
    pub refused: usize,
    /// The goal: percentile and time.
    pub goal: Option<(usize, Duration)>,
}

impl Row {
    #[must_use]
    pub fn percentile(&self, percent: usize) -> Duration {
        let mut times = self.times.clone();
        times.sort_unstable();
        let place = (times.len() * percent).div_ceil(100).saturating_sub(1);
        times.get(place).copied().unwrap_or_default()
    }

    fn line(&self) -> String {
        let seconds = |time: Duration| format!("{:.3} s", time.as_secs_f64());
        let rate = f64::from(u32::try_from(self.times.len()).unwrap_or(0)) / self.took.as_secs_f64().max(0.001);
        let goal = self.goal.map_or_else(
            || "–".to_owned(),
            |(percent, limit)| {
                let met = if self.percentile(percent) <= limit { "met" } else { "**not met**" };
                format!("p{percent} ≤ {}: {met}", seconds(limit))
            },
        );
        format!(
            "| {} | {} | {} | {} | {} | {rate:.1}/s | {} | {goal} |",
            self.what,
            self.at_once,
            self.times.len(),
            seconds(self.percentile(50)),
            seconds(self.percentile(99)),
            self.refused
        )
    }
}

/// Makes all calls, `at_once` at a time; who is refused asks again.
async fn run(world: &mut World, what: &str, calls: &[Rpc], at_once: usize) -> Result<Row> {
    let begun = world.now();
    let mut waiting: Vec<Rpc> = calls.iter().rev().cloned().collect();
    let mut open: BTreeMap<usize, (Rpc, Duration)> = BTreeMap::new();
    let mut row = Row { what: what.to_owned(), at_once, times: Vec::new(), took: Duration::ZERO, refused: 0, goal: None };
    let mut since: BTreeMap<String, Duration> = BTreeMap::new();
    while !open.is_empty() || !waiting.is_empty() {
        while open.len() < at_once
            && let Some(rpc) = waiting.pop()
        {
            let first = *since.entry(format!("{rpc:?}")).or_insert(world.now());
            let call = world.call(0, &rpc)?;
            open.insert(call, (rpc, first));
        }
        world.calm().await?;
        let doors = world.sim.waiting();
        for one in &doors {
            world.sim.admit(one);
        }
        world.pass(if doors.is_empty() { TICK } else { MOMENT }).await?;
        for (call, answer) in world.answers() {
            let Some((rpc, first)) = open.remove(&call) else { continue };
            match answer {
                Ok(_) => row.times.push(world.now() - first),
                Err(status) => {
                    row.refused += 1;
                    ensure!(row.refused < 10 * calls.len(), "{what}: {rpc:?}: {:?} {}", status.code(), status.message());
                    waiting.push(rpc);
                }
            }
        }
        ensure!(world.now() - begun < LIMIT, "{what}: {} calls still open after {} s", open.len(), LIMIT.as_secs());
    }
    row.took = world.now() - begun;
    Ok(row)
}

fn place(shared: bool, lease: bool) -> String {
    format!("{}{}", if shared { "shared" } else { "local" }, if lease { ", Lease" } else { "" })
}

/// Create, publish, unpublish and delete so many at once. With a Lease it is publish that differs.
async fn rounds(size: Size, shared: bool, lease: bool, at_once: usize, count: usize, rows: &mut Vec<Row>) -> Result<()> {
    let mut world = size.world_with("virtio-scsi-single", count, shared, lease).await?;
    let place = place(shared, lease);
    let vm = |volume: usize| size.vm_for(volume);
    let all = |make: &dyn Fn(usize) -> Rpc| (0..count).map(make).collect::<Vec<_>>();
    let mut add = |row: Row, goal: Option<(usize, u64)>| {
        let row = Row { goal: goal.map(|(percent, ms)| (percent, Duration::from_millis(ms))), ..row };
        say(&row.line());
        rows.push(row);
    };
    if !shared {
        let row = run(&mut world, &format!("create, {place}"), &all(&|volume| Rpc::Create { volume }), at_once).await?;
        add(row, (at_once == 1).then_some((50, 100)));
    }
    let row = run(&mut world, &format!("publish, {place}"), &all(&|volume| Rpc::Publish { volume, vm: vm(volume) }), at_once).await?;
    let goal = match at_once {
        1 => Some((50, 600)),
        10 => Some((99, 800)),
        _ => None,
    };
    add(row, goal);
    if lease {
        return Ok(());
    }
    let row = run(&mut world, &format!("unpublish, {place}"), &all(&|volume| Rpc::Unpublish { volume, vm: vm(volume) }), at_once).await?;
    add(row, (at_once == 10).then_some((99, 2500)));
    let row = run(&mut world, &format!("delete, {place}"), &all(&|volume| Rpc::Delete { volume }), at_once).await?;
    add(row, None);
    Ok(())
}

/// A VM with 20 volumes is drained: all at once, as the attacher does.
async fn drain(scsihw: &str) -> Result<Row> {
    let size = Size { nodes: 1, vms: 2, images: 0 };
    let mut world = size.world(scsihw, DRAINED, false).await?;
    let all = |make: &dyn Fn(usize) -> Rpc| (0..DRAINED).map(make).collect::<Vec<_>>();
    run(&mut world, "create", &all(&|volume| Rpc::Create { volume }), DRAINED).await?;
    run(&mut world, "fill", &all(&|volume| Rpc::Publish { volume, vm: 100 }), DRAINED).await?;
    let calls = all(&|volume| Rpc::Unpublish { volume, vm: 100 });
    let mut row = run(&mut world, &format!("drain {DRAINED} volumes, {scsihw}"), &calls, DRAINED).await?;
    row.goal = (scsihw == "virtio-scsi-pci").then_some((100, Duration::from_secs(28)));
    Ok(row)
}

/// From the controller's start to the first answered attachment. What a dead host's VMs hold on a shared storage is known only to a
/// controller that read them before: there it is the first attachment after the host died.
///
/// With Kubernetes one that was just started knows enough, too: its VolumeAttachments.
async fn first(size: Size, shared: bool, dead: bool, lease: bool) -> Result<Row> {
    let mut world = size.world_with("virtio-scsi-single", 2, shared, lease).await?;
    if !shared {
        run(&mut world, "create", &[Rpc::Create { volume: 0 }], 1).await?;
        world.kill(0).await?;
    }
    let knows = shared && dead && !lease;
    if knows {
        run(&mut world, "before", &[Rpc::Publish { volume: 1, vm: Size::vmid(1) }], 1).await?;
        world.pass(Duration::from_secs(61)).await?;
    }
    if dead {
        world.sim.set_node_unreachable(&size.node(size.nodes - 1), Some("595 No route to host"));
    }
    let vm = Size::vmid(0);
    let (place, off) = (place(shared, lease), if dead { ", one host dead" } else { "" });
    let begin = if knows { "host died → first publish" } else { "start → first publish" };
    let what = format!("{begin}, {place}, {}/{}{off}", size.nodes, size.vms);
    let mut row = run(&mut world, &what, &[Rpc::Publish { volume: 0, vm }], 1).await?;
    row.goal = (size.nodes > 3).then(|| (100, Duration::from_secs(if dead { 10 } else { 5 })));
    Ok(row)
}

/// What one call cost.
#[derive(Debug, Clone)]
pub struct Cost {
    /// `publish, warm`
    pub what: &'static str,
    /// The how manieth of its kind.
    pub number: usize,
    place: String,
    size: Size,
    /// Without the questions about tasks.
    pub requests: usize,
    pub polls: usize,
    /// Of all answers, as they come over the wire.
    pub bytes: u64,
}

impl Cost {
    /// At most so many requests.
    pub const EXPAND_REQUESTS: usize = 3;
    /// At most so many bytes.
    pub const WARM_PUBLISH_BYTES: u64 = 5000;

    fn line(&self) -> String {
        let Self { what, number, place, size, requests, polls, bytes } = self;
        let met = |is_met: bool| if is_met { "met" } else { "**not met**" };
        let goal = match *what {
            "expand" => format!("≤ {}: {}", Self::EXPAND_REQUESTS, met(*requests <= Self::EXPAND_REQUESTS)),
            "publish, warm" => format!("≤ 5 kB: {}", met(*bytes <= Self::WARM_PUBLISH_BYTES)),
            _ => "–".to_owned(),
        };
        let kilobytes = kilobytes(*bytes);
        format!("| {what} ({number}) | {place} | {}/{} | {requests} | {polls} | {kilobytes:.1} kB | {goal} |", size.nodes, size.vms)
    }
}

/// Requests and bytes of one call after another.
///
/// # Errors
/// A call does not come to its end.
pub async fn costs(size: Size, shared: bool, lease: bool) -> Result<Vec<Cost>> {
    let mut world = size.world_with("virtio-scsi-single", 3, shared, lease).await?;
    // All on one node, and to one VM: the second call of a kind finds everything known.
    world.claims.iter_mut().for_each(|claim| claim.zones = if shared { Vec::new() } else { vec![size.node(0)] });
    let place = place(shared, lease);
    let vm = |_: usize| Size::vmid(0);
    let create = |volume| (Rpc::Create { volume }, "create");
    let publish = |volume| (Rpc::Publish { volume, vm: vm(volume) }, "publish");
    let mut calls: Vec<(Rpc, &'static str)> = Vec::new();
    if !shared {
        calls.extend([create(0), create(1), create(2)]);
        calls.extend([(Rpc::Create { volume: 2 }, "create again")]);
    }
    calls.extend([publish(0), (publish(1).0, "publish, warm"), (publish(1).0, "publish again")]);
    calls.extend([
        (Rpc::Expand { volume: 1, bytes: 128 * MIB }, "expand"),
        (Rpc::Unpublish { volume: 1, vm: vm(1) }, "unpublish"),
        (Rpc::Unpublish { volume: 1, vm: vm(1) }, "unpublish again"),
        (Rpc::Delete { volume: 1 }, "delete"),
        (Rpc::Delete { volume: 1 }, "delete again"),
    ]);
    let mut costs: Vec<Cost> = Vec::new();
    for (rpc, what) in calls {
        world.sim.reset_counters();
        run(&mut world, what, &[rpc], 1).await?;
        let all = world.sim.requests();
        let polls = all.iter().filter(|request| request.contains("/tasks/")).count();
        let number = 1 + costs.iter().filter(|other| other.what == what).count();
        let (requests, bytes) = (all.len() - polls, world.sim.bytes_answered());
        let cost = Cost { what, number, place: place.clone(), size, requests, polls, bytes };
        say(&cost.line());
        costs.push(cost);
    }
    Ok(costs)
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn kilobytes(bytes: u64) -> f64 {
    bytes as f64 / 1000.0
}

/// The whole storm as Markdown.
///
/// # Errors
/// A part did not come to its end.
pub fn times() -> Result<String> {
    let mut text = String::new();
    let mut rows = Vec::new();
    for (shared, lease) in [(false, false), (false, true), (true, false), (true, true)] {
        for (at_once, count) in [(1, 12), (10, 60), (100, 120)] {
            let done = under_paused_time(rounds(SMALL, shared, lease, at_once, count, &mut rows));
            done.with_context(|| format!("{at_once} at once, shared: {shared}"))?;
        }
    }
    for scsihw in ["virtio-scsi-pci", "virtio-scsi-single"] {
        let row = under_paused_time(drain(scsihw)).with_context(|| format!("drain, {scsihw}"))?;
        say(&row.line());
        rows.push(row);
    }
    let large = Size { nodes: 32, vms: 500, images: 1000 };
    for (size, dead) in [(SMALL, false), (large, false), (large, true)] {
        for (shared, lease) in [(false, false), (true, false), (true, true)] {
            let row = under_paused_time(first(size, shared, dead, lease)).with_context(|| format!("first publish, {size:?}"))?;
            say(&row.line());
            rows.push(row);
        }
    }
    text.push_str("| call | at once | calls | p50 | p99 | rate | refused | goal |\n|---|---|---|---|---|---|---|---|\n");
    rows.iter().try_for_each(|row| writeln!(text, "{}", row.line()))?;
    text.push_str("\n| call | storage | nodes/VMs | requests | polls | answers | goal |\n|---|---|---|---|---|---|---|\n");
    for size in [Size { nodes: 3, vms: 20, images: 1000 }, large] {
        for (shared, lease) in [(false, false), (false, true), (true, false), (true, true)] {
            let costs = under_paused_time(costs(size, shared, lease)).with_context(|| format!("costs, {size:?}"))?;
            // With a Lease it is publish that differs.
            let shown = costs.iter().filter(|cost| !lease || cost.what.starts_with("publish"));
            shown.into_iter().try_for_each(|cost| writeln!(text, "{}", cost.line()))?;
        }
    }
    Ok(text)
}

pub(crate) fn say(what: &str) {
    eprintln!("storm: {what}");
}
