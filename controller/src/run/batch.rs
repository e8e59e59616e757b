//! Works off what waits for one VM: look once, one step for each, one call for all, and each is answered from its own slot.
//!
//! Several keys in one call are not atomic. When a call with several fails, what it left planned is reverted before any is
//! tried alone. A planned removal is repeated, never undone.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use proto::VolumeHandle;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::evidence::{Depth, Reference};
use super::publish::held_elsewhere;
use super::queue::{Done, Entry, Wish};
use super::region::{Known, Region, STATE_AGE, ago, locked};
use super::unpublish::words;
use super::when;
use crate::attach::{AttachStep, DetachStep, Refusal, Seen, Wanted, can_hotplug, lun_of, next_attach, next_detach, slot};
use crate::error::Error;
use crate::pve::api::{Change, Vm, VmState};
use crate::pve::drive::Drive;
use crate::pve::{self, Meaning};
use crate::request::Publish;

/// Looks and steps of one attach: an old plan reverted, a leaked slot or three, a changed digest here and there.
const MAX_ATTACH_TURNS: usize = 12;
/// Looks and steps of one detach: a removal, its repeat for a guest that was busy, a changed digest here and there.
const MAX_DETACH_TURNS: usize = 8;
/// A removed phantom costs its slot until the VM restarts: tried in one more slot, then said.
const MAX_PHANTOMS: usize = 2;
/// With so many leaked slots, more tries would take the VM's last ones.
const MAX_LEAKED: usize = 6;
/// A removal, its repeat for a busy guest, and a changed digest.
const MAX_UNDO_TRIES: usize = 3;
/// How long a locked VM is waited for by callers who say nothing of their patience: the least that sidecars wait.
pub(super) const LOCK_WAIT: Duration = Duration::from_secs(14);
/// Between two looks at a VM that carries a lock.
pub(super) const LOCK_POLL: Duration = Duration::from_secs(1);

/// One volume on its way, from slot to slot.
struct Work {
    wish: Wish,
    /// A locked VM is not waited for any longer.
    due: Instant,
    answer: Option<oneshot::Sender<Result<Done, Error>>>,
    done: Option<Result<Done, Error>>,
    turns: usize,
    avoid: BTreeSet<u8>,
    phantoms: usize,
    last: Option<Error>,
    /// We wrote its drive: it must not stay when the attach fails.
    wrote: bool,
    /// The attach failed with this, and what it left is being taken out.
    failed: Option<Error>,
    /// And it is out.
    is_out: bool,
}

/// What one call does for one of them.
#[derive(Debug, Clone)]
enum Step {
    Plug(u8, Box<Drive>),
    Remove(String),
    Forget(String),
    /// Write a plan again that QEMU has carried out.
    Finish(String, String),
}

/// The VM as all of them see it in one turn.
struct Look {
    known: Known,
    state: VmState,
}

impl Look {
    fn seen(&self) -> Seen<'_> {
        Seen { config: &self.known.config, running: self.state.running, plugged: self.state.plugged.as_ref() }
    }
}

/// Several changes of one VM, made together as far as they go together.
pub(super) struct Batch<'a> {
    region: &'a Arc<Region>,
    vm: Vm,
    works: Vec<Work>,
    together: bool,
}

impl Work {
    fn is_attach(&self) -> bool {
        matches!(self.wish, Wish::Attach(_))
    }

    fn volid(&self) -> String {
        self.wish.handle().volid()
    }

    fn max_turns(&self) -> usize {
        if self.is_attach() { MAX_ATTACH_TURNS } else { MAX_DETACH_TURNS }
    }

    fn end(&mut self, done: Result<Done, Error>) {
        let done = match (self.failed.clone(), done) {
            (None, done) => done,
            (Some(failed), Ok(_)) => {
                self.is_out = true;
                Err(failed)
            }
            (Some(failed), Err(why)) => {
                Err(Error { code: failed.code, text: format!("{}; and taking it out failed: {}", failed.text, why.text) })
            }
        };
        self.done.get_or_insert(done);
    }

    /// An attach will not be: what was written of it is taken out first.
    fn withdraw(&mut self, error: Error) {
        if !self.wrote || !self.is_attach() {
            return self.fail(error);
        }
        self.wish = Wish::Detach(self.wish.handle().clone());
        (self.failed, self.turns, self.last) = (Some(error), 0, None);
    }

    fn fail(&mut self, error: impl Into<Error>) {
        self.end(Err(error.into()));
    }
}

/// Which lock, since when, and what to do.
pub(super) fn locked_words(vmid: u32, lock: &str, since: SystemTime) -> Error {
    Error::unavailable(format!(
        "VM is locked ({lock}) since {} or longer; repeated until Proxmox has finished; if no such task runs: qm unlock {vmid}",
        when::utc(since)
    ))
}

impl<'a> Batch<'a> {
    pub(super) fn new(region: &'a Arc<Region>, vm: Vm, entries: Vec<Entry>) -> Self {
        let work = |entry: Entry| Work {
            wish: entry.wish,
            due: entry.due.unwrap_or_else(|| Instant::now() + LOCK_WAIT),
            answer: Some(entry.answer),
            done: None,
            turns: 0,
            avoid: BTreeSet::new(),
            phantoms: 0,
            last: None,
            wrote: false,
            failed: None,
            is_out: false,
        };
        Self { region, vm, works: entries.into_iter().map(work).collect(), together: true }
    }

    /// Until everyone has an answer.
    pub(super) async fn run(mut self) {
        loop {
            self.answer();
            if self.works.is_empty() {
                return;
            }
            self.turn().await;
        }
    }

    fn answer(&mut self) {
        let (region, vmid) = (self.region, self.vm.vmid);
        self.works.retain_mut(|work| match work.done.take() {
            Some(done) => {
                if work.is_out || matches!(done, Ok(Done::Detached)) {
                    region.note_out(work.wish.handle(), vmid);
                }
                // Nobody waits any more where the runtime ends.
                let _ = work.answer.take().map(|answer| answer.send(done));
                false
            }
            None => true,
        });
    }

    /// Those that this turn is for, and that are not done.
    fn active(&mut self) -> impl Iterator<Item = &mut Work> {
        let count = if self.together { self.works.len() } else { 1 };
        self.works.iter_mut().take(count).filter(|work| work.done.is_none())
    }

    fn fail_active(&mut self, error: &Error) {
        self.active().for_each(|work| work.fail(error.clone()));
    }

    async fn turn(&mut self) {
        for work in self.active() {
            work.turns += 1;
            if work.turns > work.max_turns() {
                let last = work.last.take();
                work.withdraw(last.unwrap_or_else(|| Error::aborted("the VM's config changes all the time; repeated")));
            }
        }
        self.check_evidence().await;
        if self.active().next().is_none() {
            return;
        }
        let Some(look) = self.look().await else { return };
        let plan = self.decide(&look).await;
        if plan.is_empty() || self.wait_for_lock(&look).await {
            return;
        }
        self.write(plan, &look).await;
    }

    /// Readings of the last minute count; a turn that comes late reads again.
    async fn check_evidence(&mut self) {
        let region = self.region;
        let mut vm = self.vm.clone();
        for work in self.active().filter(|work| work.is_attach()) {
            let handle = work.wish.handle().clone();
            let checked = match region.check_reach(&handle, &mut vm).await {
                Ok(()) if work.phantoms > 0 => region.check_nobody_else_now(&handle, vm.vmid).await,
                Ok(()) => region.check_nobody_else(&handle, vm.vmid).await,
                Err(error) => Err(error),
            };
            if let Err(error) = checked {
                work.withdraw(error);
            }
        }
        self.vm = vm;
    }

    /// Config now, state some seconds old at most; nothing: the VM is not there, or cannot be read.
    async fn look(&mut self) -> Option<Look> {
        let region = self.region;
        let (host, vmid) = (self.vm.host.clone(), self.vm.vmid);
        let attaches = self.active().any(|work| work.is_attach());
        let listed = region.states(&host, ago(STATE_AGE)).await;
        let mut state = match listed {
            Ok(mut states) => states.remove(&vmid).unwrap_or_default(),
            Err(_) => VmState::default(),
        };
        if attaches && (!state.running || state.plugged.is_none()) {
            // Started since, or the list does not say what is plugged: ask the VM itself before it is refused.
            state = self.state_now().await?;
        }
        let mut known = match region.config(&host, vmid, Instant::now()).await {
            Ok(known) => known,
            Err(error) => {
                self.not_read(error).await;
                return None;
            }
        };
        let plugged = state.plugged.clone().unwrap_or_default();
        let is_new = |work: &mut Work| {
            let volid = work.volid();
            known.config.naming(&volid).any(|(key, _)| !key.starts_with("unused") && !plugged.contains(key))
        };
        if state.running && self.active().any(is_new) {
            // Attached since by another controller, perhaps: a live disk is not pulled because a list is old.
            state = self.state_now().await?;
        }
        region.remember(vmid, &mut known, &state).await;
        Some(Look { known, state })
    }

    async fn state_now(&mut self) -> Option<VmState> {
        match self.region.state_now(&self.vm.host, self.vm.vmid).await {
            Ok(state) => Some(state),
            Err(error) => {
                self.not_read(error).await;
                None
            }
        }
    }

    /// The VM moved since the cluster was last read, or is gone, or does not answer.
    async fn not_read(&mut self, error: pve::Error) {
        if error.meaning() != Meaning::NoSuchVm {
            return self.fail_active(&error.into());
        }
        let resources = match self.region.resources(Instant::now()).await {
            Ok(resources) => resources,
            Err(error) => return self.fail_active(&error.into()),
        };
        match resources.vms.get(&self.vm.vmid) {
            Some(vm) if vm.host != self.vm.host => self.vm = vm.clone(),
            Some(_) => self.fail_active(&Error::unavailable("the VM is moving; repeated")),
            None => match self.region.check_vm_gone(self.vm.vmid).await {
                Err(error) => self.fail_active(&error),
                Ok(()) => {
                    let vmid = self.vm.vmid;
                    self.active().for_each(|work| {
                        let is_attach = work.is_attach();
                        work.end(if is_attach { Err(Error::not_found(format!("VM {vmid} is gone"))) } else { Ok(Done::Detached) });
                    });
                }
            },
        }
    }

    /// The next step of each; who has none is done.
    async fn decide(&mut self, look: &Look) -> Vec<(usize, Step)> {
        let region = self.region;
        let vm = self.vm.clone();
        let (leaked, late) = (region.leaked(vm.vmid, look.state.pid), region.late_removals(vm.vmid));
        let allow_protected = region.rules().attach_to_protected;
        let (mut plan, mut taken) = (Vec::new(), BTreeSet::new());
        let count = if self.together { self.works.len() } else { 1 };
        for (index, work) in self.works.iter_mut().take(count).enumerate().filter(|(_, work)| work.done.is_none()) {
            let volid = work.volid();
            if look.known.config.naming(&volid).any(|(key, _)| !key.starts_with("unused")) {
                region.note_there(work.wish.handle(), vm.vmid);
            }
            let wish = work.wish.clone();
            let step = match &wish {
                Wish::Attach(request) => {
                    work.avoid.extend(&leaked);
                    let avoid: BTreeSet<u8> = work.avoid.iter().chain(&taken).chain(&late).copied().collect();
                    let wanted = Wanted { volid: &volid, readonly: request.readonly, avoid: &avoid, allow_protected };
                    attach_step(work, request, next_attach(wanted, look.seen()), &vm)
                }
                Wish::Detach(_) => match next_detach(&volid, look.seen()) {
                    Err(refusal) => {
                        work.fail(words(&refusal, vm.vmid));
                        None
                    }
                    Ok(DetachStep::Gone) => {
                        let left = region.check_not_left_in_qemu(&volid, &vm, &look.known, &look.state).await;
                        work.end(left.map(|()| Done::Detached));
                        None
                    }
                    Ok(DetachStep::Detach(key)) => Some(Step::Remove(key)),
                    Ok(DetachStep::Revert(key)) => Some(Step::Forget(key)),
                    Ok(DetachStep::Finish(key, line)) => Some(Step::Finish(key, line)),
                },
            };
            if let Some(Step::Plug(lun, _)) = &step {
                taken.insert(*lun);
            }
            plan.extend(step.map(|step| (index, step)));
        }
        plan
    }

    /// Whether the VM carries a lock: waited for, as long as those who wait for us do.
    async fn wait_for_lock(&mut self, look: &Look) -> bool {
        let vmid = self.vm.vmid;
        let lock = look.known.config.configured("lock").map(String::from);
        let since = self.region.note_lock(vmid, lock.as_deref());
        let Some(lock) = lock else { return false };
        let now = Instant::now();
        for work in self.active() {
            // Waiting is no turn.
            work.turns = work.turns.saturating_sub(1);
            if work.due <= now {
                work.fail(locked_words(vmid, &lock, since));
            }
        }
        if let Some(due) = self.active().map(|work| work.due).min() {
            tokio::time::sleep(due.saturating_duration_since(now).min(LOCK_POLL)).await;
        }
        true
    }

    async fn write(&mut self, plan: Vec<(usize, Step)>, look: &Look) {
        let digest = &look.known.config.digest;
        let mut change = Change::default();
        for (index, step) in &plan {
            if let (Some(work), Step::Plug(..)) = (self.works.get_mut(*index), step) {
                work.wrote = true;
                // Until it is looked after, whatever way this call ends.
                self.region.doubt(work.wish.handle(), self.vm.vmid, digest);
            }
            match step {
                Step::Plug(lun, drive) => {
                    change.set.insert(slot(*lun), drive.to_string());
                }
                Step::Remove(key) => drop(change.delete.insert(key.clone())),
                Step::Forget(key) => drop(change.revert.insert(key.clone())),
                Step::Finish(key, line) => drop(change.set.insert(key.clone(), line.clone())),
            }
            if let (Some(Work { wish: Wish::Attach(request), .. }), Step::Remove(_) | Step::Forget(_)) = (self.works.get(*index), step) {
                proto::warn!("attach {} to VM {}: first {step:?}, which an earlier attach or a removal left", request.handle, self.vm.vmid);
            }
        }
        let changed = self.region.change(&self.vm.host, self.vm.vmid, &change, digest).await;
        for (index, _) in plan.iter().filter(|(_, step)| matches!(step, Step::Plug(..))) {
            let handle = self.works.get(*index).map(|work| work.wish.handle());
            handle.into_iter().for_each(|handle| self.region.note_outcome(handle, self.vm.vmid, changed.as_ref().err()));
        }
        match changed {
            Ok(()) => self.verify(plan, look).await,
            Err(error) if plan.len() > 1 => self.failed_together(&plan, error).await,
            Err(error) => {
                if let Some((index, step)) = plan.into_iter().next() {
                    self.failed_alone(index, step, error).await;
                }
            }
        }
    }

    /// Our claims are in the config: what each caller will look at, for rivals, is read while QEMU is asked.
    fn look_ahead(&self, plan: &[(usize, Step)], written: Instant) {
        for (index, _) in plan.iter().filter(|(_, step)| matches!(step, Step::Plug(..))) {
            let Some(handle) = self.works.get(*index).map(|work| work.wish.handle().clone()) else { continue };
            let (region, vmid) = (Arc::clone(self.region), self.vm.vmid);
            // Who needs the answer asks for it, and finds it read.
            tokio::spawn(proto::log::carried(async move {
                match region.has_lease() {
                    true => region.newcomers(&handle, vmid, written).await.map(drop),
                    false => region.references(&handle, written, Some(vmid), Depth::Config).await.map(drop),
                }
            }));
        }
    }

    /// What QEMU has after our write: by the list of its node, where the look for rivals reads that anyway.
    async fn state_since(&self, plan: &[(usize, Step)], written: Instant) -> Result<VmState, pve::Error> {
        let (region, vmid) = (self.region, self.vm.vmid);
        let mut plugged = plan.iter().filter(|(_, step)| matches!(step, Step::Plug(..))).filter_map(|(index, _)| self.works.get(*index));
        let is_listed = match plugged.next() {
            Some(work) if region.has_lease() => !region.qemu_keeps_others_off(work.wish.handle()).await.unwrap_or(true),
            _ => false,
        };
        if is_listed && let Some(state) = region.listed_state(&self.vm.host, vmid, written).await? {
            return Ok(state);
        }
        region.state_now(&self.vm.host, vmid).await
    }

    /// Proxmox said OK: what QEMU has says the rest, slot by slot.
    async fn verify(&mut self, plan: Vec<(usize, Step)>, look: &Look) {
        let (region, vmid, written) = (self.region, self.vm.vmid, Instant::now());
        self.look_ahead(&plan, written);
        let state = match self.state_since(&plan, written).await {
            Ok(state) => state,
            Err(error) => {
                let error = Error::from(error);
                for (index, _) in plan {
                    self.works.get_mut(index).into_iter().for_each(|work| work.fail(error.clone()));
                }
                return;
            }
        };
        let mut phantoms = Vec::new();
        for (index, step) in plan {
            let Some(work) = self.works.get_mut(index) else { continue };
            match step {
                Step::Plug(lun, drive) => match &state.plugged {
                    Some(plugged) if plugged.contains(&slot(lun)) => {
                        proto::info!("attach {} to VM {vmid}: {}", work.wish.handle(), slot(lun));
                        region.note_held(vmid, &slot(lun), &drive.volid).await;
                        work.end(Ok(Done::Attached { lun, drive, vm: self.vm.clone(), written: Some(written) }));
                    }
                    None => work.fail(words(&Refusal::QemuSilent, vmid)),
                    Some(_) => phantoms.push((index, lun)),
                },
                Step::Remove(key) => verify_removal(work, &key, look, &state, vmid),
                Step::Forget(_) | Step::Finish(..) => (),
            }
        }
        if !phantoms.is_empty() {
            self.take_back(&phantoms, state.running).await;
        }
    }

    /// Written into the config only: QEMU refused it without Proxmox's saying so, or there is no QEMU.
    async fn take_back(&mut self, phantoms: &[(usize, u8)], is_running: bool) {
        let vmid = self.vm.vmid;
        let change = Change { delete: phantoms.iter().map(|(_, lun)| slot(*lun)).collect(), ..Change::default() };
        let undone = self.region.undo(&self.vm, &change, None).await;
        for (index, lun) in phantoms {
            let Some(work) = self.works.get_mut(*index) else { continue };
            if let Err(why) = &undone {
                work.fail(why.clone());
                continue;
            }
            self.region.note_out(work.wish.handle(), vmid);
            if !is_running {
                work.fail(words(&Refusal::NotRunning, vmid));
                continue;
            }
            self.region.leak(vmid, *lun);
            work.avoid.insert(*lun);
            work.phantoms += 1;
            // Most often a rival on the same node has the image open: one more try would cost one more slot.
            if let Some(rival) = self.region.holder_now(work.wish.handle(), vmid).await {
                work.fail(held_elsewhere(&rival));
                continue;
            }
            let refused = Error::internal(format!(
                "Proxmox said OK, but QEMU has no scsi{lun}: it refused the drive (another QEMU may have the image open; see the log of QEMU)"
            ));
            if work.phantoms >= MAX_PHANTOMS {
                work.fail(refused);
            } else {
                work.last = Some(refused);
            }
        }
    }

    /// One of several failed, and the others are plugged, planned, or not looked at: each is tried alone from here on.
    async fn failed_together(&mut self, plan: &[(usize, Step)], error: pve::Error) {
        let meaning = error.meaning();
        if matches!(meaning, Meaning::DigestChanged | Meaning::NoSuchVm | Meaning::VmLocked) {
            // None of them was begun.
            for (index, _) in plan {
                self.works.get_mut(*index).into_iter().for_each(|work| work.last = Some(error.clone().into()));
            }
            return;
        }
        proto::warn!("VM {}: of {} changes in one call one failed, each is tried alone: {error}", self.vm.vmid, plan.len());
        self.together = false;
        if let Err(why) = self.revert_planned(plan).await {
            let why = why.during(&format!("after a failed change of several drives ({error}) the rest could not be reverted"));
            for (index, _) in plan {
                self.works.get_mut(*index).into_iter().for_each(|work| work.fail(why.clone()));
            }
        }
    }

    /// Additions that the call left planned would be plugged by the next call that names them, or at the VM's start.
    async fn revert_planned(&self, plan: &[(usize, Step)]) -> Result<(), Error> {
        for _ in 0..MAX_UNDO_TRIES {
            let known = self.region.config(&self.vm.host, self.vm.vmid, Instant::now()).await?;
            let is_planned = |(_, step): &&(usize, Step)| match step {
                Step::Plug(lun, _) => known.config.lines.get(&slot(*lun)).is_some_and(|line| line.pending.is_some()),
                Step::Remove(_) | Step::Forget(_) | Step::Finish(..) => false,
            };
            let keys = plan.iter().filter(is_planned).filter_map(|(_, step)| match step {
                Step::Plug(lun, _) => Some(slot(*lun)),
                Step::Remove(_) | Step::Forget(_) | Step::Finish(..) => None,
            });
            let change = Change { revert: keys.collect(), ..Change::default() };
            if change.is_empty() {
                return Ok(());
            }
            match self.region.change(&self.vm.host, self.vm.vmid, &change, &known.config.digest).await {
                Err(error) if error.meaning() == Meaning::DigestChanged => (),
                reverted => return reverted.map_err(Error::from),
            }
        }
        Err(Error::aborted("the VM's config changes all the time; repeated"))
    }

    async fn failed_alone(&mut self, index: usize, step: Step, error: pve::Error) {
        let (region, vm) = (self.region, self.vm.clone());
        let Some(work) = self.works.get_mut(index) else { return };
        let meaning = error.meaning();
        if matches!(meaning, Meaning::DigestChanged | Meaning::NoSuchVm | Meaning::VmLocked) {
            work.last = Some(error.into());
            return;
        }
        match (&work.wish, &step) {
            (Wish::Attach(request), Step::Plug(lun, _)) => {
                let request = Arc::clone(request);
                region.failed_plug(&request, &vm, *lun, error, work).await;
            }
            // The disk is gone from QEMU by then, and the repeat is quick.
            _ if meaning == Meaning::StillBusyInGuest => work.last = Some(error.into()),
            // Looked at again: the removal was done, is planned, or is to be repeated. The digest keeps it from landing
            // after a later change.
            _ if meaning == Meaning::OutcomeUnknown && work.last.is_none() => work.last = Some(error.into()),
            _ => work.fail(error),
        }
    }
}

/// The step that an attach takes; nothing: it is done, one way or the other.
fn attach_step(work: &mut Work, request: &Publish, next: Result<AttachStep, Refusal>, vm: &Vm) -> Option<Step> {
    match next {
        Err(Refusal::Full) if work.last.is_some() => {
            let last = work.last.take();
            work.end(Err(last.unwrap_or_else(|| words(&Refusal::Full, vm.vmid))));
            None
        }
        Err(refusal) => {
            work.withdraw(words(&refusal, vm.vmid));
            None
        }
        Ok(AttachStep::Attached(lun, drive)) => {
            // What we wrote in this call may be a try before the last one, or somebody else's: new all the same.
            let written = work.wrote.then(Instant::now);
            work.end(Ok(Done::Attached { lun, drive, vm: vm.clone(), written }));
            None
        }
        Ok(AttachStep::Revert(key)) => Some(Step::Forget(key)),
        Ok(AttachStep::Detach(key)) => Some(Step::Remove(key)),
        Ok(AttachStep::AttachAt(_)) if work.avoid.len() >= MAX_LEAKED => {
            work.fail(Error::precondition(format!(
                "VM {} has {MAX_LEAKED} slots in which QEMU keeps leftovers of drives it did not take; restart the VM",
                vm.vmid
            )));
            None
        }
        Ok(AttachStep::AttachAt(lun) | AttachStep::Finish(lun)) => {
            Some(Step::Plug(lun, Box::new(request.parameters.drive(&request.handle, lun, request.readonly))))
        }
    }
}

fn verify_removal(work: &mut Work, key: &str, look: &Look, state: &VmState, vmid: u32) {
    if work.is_attach() {
        // A drive that QEMU never took leaves its block node behind.
        let was_plugged = look.state.plugged.as_ref().is_none_or(|plugged| plugged.contains(key));
        work.avoid.extend(lun_of(key).filter(|_| !was_plugged));
        return;
    }
    if state.running
        && let Err(refusal) = can_hotplug(&look.known.config)
    {
        // Without hot-plug Proxmox says OK and only plans the removal.
        return work.fail(words(&refusal, vmid));
    }
    if state.plugged.as_ref().is_none_or(|plugged| plugged.contains(key)) {
        work.last = Some(Error::unavailable(format!("Proxmox said OK, but QEMU still has {key}; the removal is repeated")));
        return;
    }
    let volid = work.volid();
    proto::info!("detach {volid} from VM {vmid}: {key} is free");
    // Another line of the same VM may name it, too; the last reading knows.
    if look.known.config.naming(&volid).filter(|(key, _)| !key.starts_with("unused")).count() == 1 {
        work.end(Ok(Done::Detached));
    }
}

impl Region {
    /// After a plug that failed alone: what it left is undone. Not done: look again.
    async fn failed_plug(self: &Arc<Self>, request: &Publish, vm: &Vm, lun: u8, error: pve::Error, work: &mut Work) {
        let (meaning, key, volid) = (error.meaning(), slot(lun), request.handle.volid());
        let is_lost = meaning.is_outcome_unknown();
        if meaning == Meaning::LeakedSlot {
            self.leak(vm.vmid, lun);
            work.avoid.insert(lun);
            work.last = Some(error.into());
            return;
        }
        // What is left: nothing, a plan, or the drive itself.
        let known = match self.config(&vm.host, vm.vmid, Instant::now()).await {
            Ok(known) => known,
            Err(error) => return work.fail(error),
        };
        let Some(line) = known.config.lines.get(&key).filter(|_| known.config.naming(&volid).any(|(named, _)| named == key)) else {
            if known.config.naming(&volid).all(|(key, _)| key.starts_with("unused")) {
                self.note_out(&request.handle, vm.vmid);
            }
            return work.fail(self.refused_plug(request, vm, error).await);
        };
        let is_planned = line.value.is_none();
        if is_lost || is_planned {
            // Carried out, or half: the next look says what QEMU has, and whether a rival has it, too.
            match self.state_now(&vm.host, vm.vmid).await {
                Ok(state) if is_planned && state.plugged.as_ref().is_none_or(|plugged| !plugged.contains(&key)) => (),
                Ok(_) => {
                    // A plan taken back would leave QEMU a drive of which the config says nothing, and only a restart of the VM helps then.
                    work.last = Some(error.into());
                    return;
                }
                Err(error) => return work.fail(error),
            }
        }
        let change = if line.value.is_some() { Change::remove(&key) } else { Change::forget(&key) };
        let undone = self.undo(vm, &change, Some(&known.config.digest)).await;
        let error = self.refused_plug(request, vm, error).await;
        work.fail(match undone {
            Ok(()) => error,
            Err(why) => Error { code: error.code, text: format!("{}; and undoing it failed: {}", error.text, why.text) },
        });
    }

    /// Why a plug failed, with what more can be told of it.
    async fn refused_plug(self: &Arc<Self>, request: &Publish, vm: &Vm, error: pve::Error) -> Error {
        match error.meaning() {
            Meaning::NoSuchVolume => self.missing(&request.handle, error).await,
            // QEMU said that another one has the image open (Proxmox from 8.3.7 on keeps that to itself).
            Meaning::VolumeInUse => match self.holder_now(&request.handle, vm.vmid).await {
                Some(rival) => held_elsewhere(&rival).during(&error.to_string()),
                None => error.into(),
            },
            _ => error.into(),
        }
    }

    /// Who else has the volume in his config now, where that can be told.
    async fn holder_now(self: &Arc<Self>, handle: &VolumeHandle, vmid: u32) -> Option<Reference> {
        let others = self.references(handle, Instant::now(), Some(vmid), Depth::Config).await;
        others.ok()?.into_iter().find(Reference::counts)
    }

    /// Takes back what a failed attach left. Without a digest the config is read first.
    async fn undo(&self, vm: &Vm, change: &Change, digest: Option<&str>) -> Result<(), Error> {
        proto::warn!("VM {} on {}: {change:?}, to undo a failed attach", vm.vmid, vm.host);
        let mut digest = digest.map(String::from);
        for _ in 0..MAX_UNDO_TRIES {
            let of = match digest.take() {
                Some(digest) => digest,
                None => self.config(&vm.host, vm.vmid, Instant::now()).await?.config.digest,
            };
            match self.change(&vm.host, vm.vmid, change, &of).await {
                // The disk is gone from QEMU by then, and the repeat is quick; or the config changed in between.
                Err(error) if matches!(error.meaning(), Meaning::StillBusyInGuest | Meaning::DigestChanged) => (),
                changed => return changed.map_err(Error::from),
            }
        }
        // The next look sees what is left.
        Ok(())
    }

    /// Notes the lock that a VM carries, or that it carries none. When it was first seen.
    pub(super) fn note_lock(&self, vmid: u32, lock: Option<&str>) -> SystemTime {
        let slot = self.vm(vmid);
        let mut seen = locked(&slot.lock);
        let Some(lock) = lock else {
            *seen = None;
            return SystemTime::now();
        };
        match seen.as_ref().filter(|(name, _)| name == lock) {
            Some((_, since)) => *since,
            None => seen.insert((lock.into(), SystemTime::now())).1,
        }
    }

    /// The lock that a VM was last seen to carry.
    pub(super) fn lock_seen(&self, vmid: u32) -> Option<(String, SystemTime)> {
        locked(&self.vm(vmid).lock).clone()
    }
}
