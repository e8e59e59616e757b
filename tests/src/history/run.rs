//! Makes a history happen, step by step; tidies up; finds a shorter one that goes wrong as well.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::chance::of_name;
use super::judge::{Judge, all_traces};
use super::plan::{self, Act, History, Item, home};
use super::world::{Answer, Rpc, World, under_paused_time};
use crate::sim::{Effect, Fault, Inner, Waiting};

/// No history takes a tenth of it.
const MOST_STEPS: usize = 4000;
/// A network that holds a request longer has lost it.
const LONGEST_WAIT: Duration = Duration::from_secs(25);
/// Calls end, tasks end, and what Proxmox gave up on comes late.
const DRY_LIMIT: Duration = Duration::from_secs(900);
/// A write whose answer was lost is not carried out after that (the controller's own limit is 120 s).
const OLD: Duration = Duration::from_secs(130);
/// How often a sidecar repeats before a person looks, and how long it waits in between.
const TRIES: usize = 8;
const BACK_OFF: Duration = Duration::from_secs(20);
/// A Lease that nobody gave back is somebody's after 15 s and what may still come, 35 s; and twice that.
const LEASE_LIMIT: Duration = Duration::from_secs(180);
const LEASE_LOOK: Duration = Duration::from_secs(2);
/// One call, with everything let in.
const CALL_LIMIT: Duration = Duration::from_secs(300);
/// Time that passes while something else could go on, in ms; the long ones only where nobody waits.
const SHORT_PAUSES: [u64; 5] = [30, 200, 700, 2000, 5000];
const LONG_PAUSES: [u64; 2] = [31_000, 61_000];
/// In so many of a hundred steps.
const PAUSE_PERCENT: u64 = 8;

/// A history that went wrong.
#[derive(Debug)]
pub struct Failure {
    pub history: History,
    pub what: String,
    pub log: Vec<String>,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "seed {}, {} controllers{}, Proxmox {}: {}",
            self.history.seed,
            self.history.controllers,
            if self.history.has_lease { " with a Lease" } else { "" },
            self.history.version,
            self.what
        )?;
        self.history.items.iter().try_for_each(|item| writeln!(f, "  {item}"))?;
        self.log.iter().try_for_each(|line| writeln!(f, "    {line}"))
    }
}

/// Runs it; the log, or what went wrong.
///
/// # Errors
/// The history went wrong.
pub fn check(history: &History) -> Result<Vec<String>, Failure> {
    let mut log = Vec::new();
    let done = under_paused_time(async {
        let mut run = Run::new(history).await?;
        let done = run.all().await;
        log = run.world.log().to_vec();
        done
    });
    done.map_err(|error| Failure { history: history.clone(), what: format!("{error:#}"), log: log.clone() })?;
    Ok(log)
}

/// A shorter history that goes wrong, too: items are left out, first many at once, as long as it helps.
#[must_use]
pub fn shrink(failure: Failure, most_runs: usize) -> Failure {
    let (mut best, mut runs) = (failure, 0);
    let mut size = best.history.items.len().div_ceil(2).max(1);
    loop {
        let (mut place, mut helped) = (0, false);
        while place < best.history.items.len() && runs < most_runs {
            runs += 1;
            match check(&best.history.without(place..place + size)) {
                Err(shorter) => {
                    best = shorter;
                    helped = true;
                }
                Ok(_) => place += size,
            }
        }
        if runs >= most_runs || (size == 1 && !helped) {
            return best;
        }
        size = (size / 2).max(1);
    }
}

enum Undo {
    Unlock(u32),
    Continue(usize),
    Back(&'static str),
}

struct Run<'a> {
    history: &'a History,
    world: World,
    judge: Judge,
    begun: BTreeSet<usize>,
    /// Call → item, volume and the step at which the client gives up.
    calls: BTreeMap<usize, (usize, usize, Option<usize>)>,
    undo: Vec<(usize, Undo)>,
    /// Controllers that are stopped, by door.
    stopped: BTreeSet<String>,
    first_seen: BTreeMap<Waiting, Duration>,
    step: usize,
}

impl<'a> Run<'a> {
    async fn new(history: &'a History) -> Result<Run<'a>> {
        let cluster = plan::cluster().version(history.version);
        let world = match history.has_lease {
            true => World::with_lease(cluster, history.controllers, history.claims()).await?,
            false => World::new(cluster, history.controllers, history.claims()).await?,
        };
        Ok(Run {
            history,
            judge: Judge::new(world.claims.len()).beside_rivals(history.has_rivals()),
            world,
            begun: BTreeSet::new(),
            calls: BTreeMap::new(),
            undo: Vec::new(),
            stopped: BTreeSet::new(),
            first_seen: BTreeMap::new(),
            step: 0,
        })
    }

    async fn all(&mut self) -> Result<()> {
        self.happen().await?;
        self.come_to_rest().await?;
        self.tidy().await
    }

    async fn happen(&mut self) -> Result<()> {
        let mut pause = Duration::from_millis(20);
        while self.step < MOST_STEPS {
            self.step += 1;
            self.take_answers()?;
            self.keep_appointments().await?;
            self.replace_ended().await?;
            match self.choose() {
                Choice::Admit(waiting) => self.world.admit(&waiting).await?,
                Choice::Begin(item) => self.begin(&item).await?,
                Choice::Pass(time) => self.world.pass(time).await?,
                Choice::Wait
                    if self.world.running() > 0 || !self.undo.is_empty() || self.world.sim.inside() > 0 || self.waits_for_lease() =>
                {
                    self.world.pass(pause).await?;
                    pause = (pause * 2).min(Duration::from_secs(2));
                    continue;
                }
                Choice::Wait => return Ok(()),
            }
            pause = Duration::from_millis(20);
        }
        bail!("it goes on for {MOST_STEPS} steps: {:?}", self.world.sim.waiting())
    }

    fn take_answers(&mut self) -> Result<()> {
        for (call, answer) in self.world.answers() {
            self.calls.remove(&call);
            self.book(call, &answer)?;
        }
        Ok(())
    }

    fn book(&mut self, call: usize, answer: &Answer) -> Result<()> {
        let booked = self.judge.answered(&self.world.sim, &self.world.claims, call, answer);
        booked.map_err(anyhow::Error::msg)
    }

    /// Clients that give up, locks that end, nodes that come back.
    async fn keep_appointments(&mut self) -> Result<()> {
        let step = self.step;
        let impatient: Vec<usize> =
            self.calls.iter().filter(|(_, (_, _, until))| until.is_some_and(|until| until <= step)).map(|(call, _)| *call).collect();
        for call in impatient {
            self.calls.remove(&call);
            self.world.give_up(call);
            self.judge.unanswered(call);
        }
        let (due, later) = std::mem::take(&mut self.undo).into_iter().partition(|(at, _)| *at <= step);
        self.undo = later;
        let due: Vec<(usize, Undo)> = due;
        for (_, undo) in due {
            self.undo_now(undo).await?;
        }
        Ok(())
    }

    async fn undo_now(&mut self, undo: Undo) -> Result<()> {
        match undo {
            Undo::Unlock(vm) => {
                self.world.note(format!("VM {vm} is unlocked"));
                self.world.sim.set_lock(vm, None);
            }
            Undo::Continue(controller) => {
                self.world.note(format!("SIGCONT to controller {controller}"));
                let door = self.world.door(controller).to_owned();
                self.stopped.remove(&door);
                // So long, no connection stays: what it was about to send meets a closed one. Its Lease rests on that.
                let lost = self.world.sim.waiting().into_iter().filter(|one| self.history.has_lease && one.door == door && !one.answer);
                for one in lost.collect::<Vec<_>>() {
                    self.world.sim.inject(Fault { method: None, path: "/**".into(), nth: 1, times: 1, effect: Effect::Close });
                    self.world.admit(&one).await?;
                }
            }
            Undo::Back(node) => {
                self.world.note(format!("{node} is back"));
                self.world.sim.set_node_unreachable(node, None);
                self.judge.away.remove(node);
            }
        }
        Ok(())
    }

    /// Who has lost the Lease ends, and kubelet starts it again.
    async fn replace_ended(&mut self) -> Result<()> {
        for controller in 0..self.history.controllers {
            if self.world.ends(controller) && !self.is_stopped(controller) {
                self.restart(controller).await?;
            }
        }
        Ok(())
    }

    async fn restart(&mut self, controller: usize) -> Result<()> {
        for call in self.world.kill(controller).await? {
            self.calls.remove(&call);
            self.judge.unanswered(call);
        }
        Ok(())
    }

    /// Nothing of it goes in or out, its way to Kubernetes neither.
    fn is_stopped(&self, controller: usize) -> bool {
        self.stopped.contains(self.world.door(controller))
    }

    /// Whoever is asked for, or the one that acts.
    fn acting(&self, wanted: usize) -> Option<usize> {
        let others = (0..self.history.controllers).filter(|other| *other != wanted);
        [wanted].into_iter().chain(others).find(|controller| self.world.serves(*controller))
    }

    /// Nobody acts now, and there is more to do.
    fn waits_for_lease(&self) -> bool {
        let is_left = self.history.items.iter().any(|item| !self.begun.contains(&item.number) && matches!(item.act, Act::Call { .. }));
        self.history.has_lease && is_left && self.acting(0).is_none()
    }

    fn can_begin(&self, place: usize, item: &Item) -> bool {
        let Act::Call { by, rpc, overlaps, .. } = &item.act else { return true };
        if self.acting(*by).is_none() {
            return false;
        }
        let earlier = self.history.items.iter().take(place);
        let mut same = earlier.filter(|earlier| matches!(&earlier.act, Act::Call { rpc: other, .. } if other.volume() == rpc.volume()));
        let running = |number: usize| self.calls.values().any(|(item, _, _)| *item == number);
        let known = self.world.claims.get(rpc.volume()).is_some_and(|claim| claim.id.is_some()) || matches!(rpc, Rpc::Create { .. });
        // Without an id the call cannot be made; its turn is over when those before it have ended.
        same.all(|earlier| self.begun.contains(&earlier.number) && ((*overlaps && known) || !running(earlier.number)))
    }

    fn choose(&mut self) -> Choice {
        let now = self.world.now();
        let all = self.world.sim.waiting();
        self.first_seen.retain(|waiting, _| all.contains(waiting));
        let waiting: Vec<Waiting> =
            all.into_iter().filter(|waiting| !self.stopped.contains(waiting.door.trim_end_matches(" kube"))).collect();
        for one in &waiting {
            self.first_seen.entry(one.clone()).or_insert(now);
        }
        let chance = of_name(self.history.seed, &format!("step {}", self.step));
        if chance % 100 < PAUSE_PERCENT {
            let pauses = if waiting.is_empty() { &LONG_PAUSES[..] } else { &SHORT_PAUSES[..] };
            let place = usize::try_from(chance / 100).unwrap_or(0) % pauses.len();
            return Choice::Pass(Duration::from_millis(pauses.get(place).copied().unwrap_or(30)));
        }
        let admits = waiting.into_iter().map(|one| {
            let overdue = self.first_seen.get(&one).is_some_and(|seen| now.saturating_sub(*seen) >= LONGEST_WAIT);
            let rank = if overdue { u64::MAX } else { of_name(self.history.seed, &format!("{one:?}")) };
            (rank, Choice::Admit(one))
        });
        let items = self.history.items.iter().enumerate().filter(|(_, item)| !self.begun.contains(&item.number));
        let begins = items
            .filter(|(place, item)| self.can_begin(*place, item))
            .map(|(_, item)| (of_name(self.history.seed, &format!("item {}", item.number)), Choice::Begin(item.clone())));
        admits.chain(begins).max_by_key(|(rank, _)| *rank).map_or(Choice::Wait, |(_, choice)| choice)
    }

    async fn begin(&mut self, item: &Item) -> Result<()> {
        self.begun.insert(item.number);
        match &item.act {
            Act::Call { by, rpc, patience, .. } => {
                let by = self.acting(*by).unwrap_or(*by);
                if let Ok(call) = self.world.call(by, rpc) {
                    self.judge.begins(call, rpc);
                    self.calls.insert(call, (item.number, rpc.volume(), patience.map(|patience| self.step + patience)));
                }
            }
            Act::Kill { controller } => {
                let door = self.world.door(*controller).to_owned();
                self.stopped.remove(&door);
                self.restart(*controller).await?;
            }
            act => self.trouble(act),
        }
        self.world.calm().await
    }

    fn trouble(&mut self, act: &Act) {
        let sim = std::sync::Arc::clone(&self.world.sim);
        match act {
            Act::Request { method, path, nth, effect } => sim.inject(Fault::next(method, path, effect.clone()).nth(*nth)),
            Act::Inside(inner) => {
                self.judge.phantoms += usize::from(matches!(inner, Inner::PhantomAttach { .. }));
                sim.inject_inner(inner.clone(), 1);
            }
            Act::Stop { controller, steps } => {
                self.stopped.insert(self.world.door(*controller).to_owned());
                self.undo.push((self.step + steps, Undo::Continue(*controller)));
            }
            Act::Lock { vm, lock, steps } => {
                // A backup takes the config's flock to write its lock: not while a change is going on.
                let Some(_held) = sim.hold_config_lock(*vm) else { return };
                sim.set_lock(*vm, Some(lock));
                self.undo.push((self.step + steps, Undo::Unlock(*vm)));
            }
            Act::Move { vm, node } => {
                let Some(_held) = sim.hold_config_lock(*vm) else { return };
                let local = sim.vm(*vm).is_some_and(|state| {
                    let lines = state.config.values().chain(state.pending.values());
                    lines.clone().any(|line| line.starts_with("ds:") || line.starts_with("thin:")) || state.config.contains_key("lock")
                });
                if local {
                    return;
                }
                sim.migrate_vm(*vm, node);
            }
            Act::ByHand { vm, volume } => {
                let Some(handle) = self.world.claims.get(*volume).and_then(super::world::Claim::handle) else { return };
                let volid = handle.volid();
                if !all_traces(&sim, &volid).is_empty() || sim.attach_by_hand(*vm, "scsi20", &volid).is_err() {
                    return;
                }
                self.judge.took_by_hand(*volume, *vm, "scsi20".to_owned());
            }
            Act::Restart { vm } => {
                let Some(_held) = sim.hold_config_lock(*vm) else { return };
                self.judge.lets_go(*vm);
                sim.stop_vm(*vm);
                if sim.start_vm(*vm).is_err() {
                    self.world.note(format!("VM {vm} does not start: another has its disk"));
                }
            }
            Act::Away { node, steps } => {
                // The first one is where the API is asked.
                if *node == "pve1" {
                    return;
                }
                sim.set_node_unreachable(node, Some("595 No route to host"));
                self.judge.away.insert(node);
                self.undo.push((self.step + steps, Undo::Back(node)));
            }
            Act::Call { .. } | Act::Kill { .. } => {}
        }
        self.world.note(format!("{act:?}"));
    }

    /// All trouble is over, and everything that was begun ends.
    async fn come_to_rest(&mut self) -> Result<()> {
        for (_, undo) in std::mem::take(&mut self.undo) {
            self.undo_now(undo).await?;
        }
        self.stopped.clear();
        self.world.sim.clear_faults();
        self.world.note("all trouble is over");
        let mut late = Vec::new();
        let idle = |world: &mut World| {
            late.extend(world.answers());
            world.running() == 0 && world.sim.inside() == 0
        };
        if !self.world.go_on(DRY_LIMIT, idle).await? {
            bail!("{} calls still run after {} s", self.world.running(), DRY_LIMIT.as_secs());
        }
        for (call, answer) in late {
            self.book(call, &answer)?;
        }
        self.judge.all_ended();
        self.world.go_on(OLD, |_| false).await?;
        for vm in plan::VMS {
            if !self.world.sim.vm(vm).is_some_and(|vm| vm.running) {
                self.judge.lets_go(vm);
            }
        }
        self.judge.at_rest(&self.world.sim, &self.world.claims).map_err(anyhow::Error::msg)
    }

    /// As an orchestrator that wants everything gone: every call ends right, and nothing is left.
    async fn tidy(&mut self) -> Result<()> {
        self.judge.none_lost(&self.world.sim, &self.world.claims).map_err(anyhow::Error::msg)?;
        for (volume, (vm, slot)) in self.judge.by_hand().clone() {
            self.world.sim.detach_by_hand(vm, &slot);
            self.judge.gave_back(&self.world.sim, &self.world.claims, volume);
        }
        for vm in plan::VMS {
            let local = self.world.sim.vm(vm).is_some_and(|state| state.config.values().any(|line| line.starts_with("ds:")));
            if !local {
                self.world.sim.migrate_vm(vm, home(vm));
            }
        }
        let used: BTreeSet<usize> = self
            .history
            .items
            .iter()
            .filter_map(|item| match &item.act {
                Act::Call { rpc, .. } => Some(rpc.volume()),
                _ => None,
            })
            .collect();
        for volume in used {
            self.until_ok(&Rpc::Create { volume }).await?;
            for vm in self.judge.perhaps_at(volume) {
                self.until_ok(&Rpc::Unpublish { volume, vm }).await?;
            }
            for vm in plan::VMS {
                if !self.world.sim.vm(vm).is_some_and(|vm| vm.running) {
                    self.world.sim.start_vm(vm).map_err(anyhow::Error::msg).with_context(|| format!("start VM {vm}"))?;
                }
            }
            let vms = plan::vms_of(volume);
            let zone = self.world.claims.get(volume).and_then(super::world::Claim::handle).map(|handle| handle.zone).unwrap_or_default();
            let mut fitting = vms.iter().chain(&plan::VMS).filter(|vm| zone.is_empty() || home(**vm) == zone);
            let vm = *fitting.next().context("no VM for this zone")?;
            self.until_ok(&Rpc::Publish { volume, vm }).await?;
            self.until_ok(&Rpc::Publish { volume, vm }).await?;
            self.judge.at_rest(&self.world.sim, &self.world.claims).map_err(anyhow::Error::msg)?;
            let claim = self.world.claims.get(volume).context("no such volume")?;
            self.judge.only_in(&self.world.sim, claim, vm).map_err(anyhow::Error::msg)?;
            self.until_ok(&Rpc::Unpublish { volume, vm }).await?;
            self.until_ok(&Rpc::Delete { volume }).await?;
        }
        self.judge.at_the_end(&self.world.sim, &self.world.claims).map_err(anyhow::Error::msg)
    }

    /// That one, or whoever acts; waited for.
    async fn somebody(&mut self, wanted: usize) -> Result<usize> {
        let begun = self.world.now();
        loop {
            self.replace_ended().await?;
            if let Some(controller) = self.acting(wanted) {
                return Ok(controller);
            }
            if self.world.now() - begun > LEASE_LIMIT {
                bail!("nobody takes the Lease for {} s", LEASE_LIMIT.as_secs());
            }
            self.world.go_on(LEASE_LOOK, |_| false).await?;
        }
    }

    async fn until_ok(&mut self, rpc: &Rpc) -> Result<()> {
        let mut last = None;
        for turn in 0..TRIES {
            let by = self.somebody(turn % self.history.controllers).await?;
            let call = self.world.call(by, rpc)?;
            self.judge.begins(call, rpc);
            let mut found = None;
            let mut done = |world: &mut World| {
                found = found.take().or_else(|| world.answers().into_iter().find(|(number, _)| *number == call));
                found.is_some()
            };
            self.world.go_on(CALL_LIMIT, &mut done).await?;
            let (_, answer) = found.with_context(|| format!("{rpc:?}: no answer within {} s", CALL_LIMIT.as_secs()))?;
            self.book(call, &answer)?;
            match answer {
                Ok(_) => return Ok(()),
                Err(status) => last = Some(status),
            }
            self.world.go_on(BACK_OFF, |_| false).await?;
        }
        bail!(
            "with all trouble over, {rpc:?} still answers {:?}: {}",
            last.as_ref().map(tonic::Status::code),
            last.map_or_else(String::new, |last| last.message().to_owned())
        )
    }
}

enum Choice {
    Admit(Waiting),
    Begin(Item),
    Pass(Duration),
    Wait,
}
