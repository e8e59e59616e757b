//! What must be true of Proxmox and of the answers, whatever happened.

use std::collections::{BTreeMap, BTreeSet};

use proto::VolumeHandle;

use super::plan::{NODES, VMS};
use super::world::{Answer, Claim, Rpc};
use crate::sim::{Simulator, VmState};

/// What an orchestrator knows of one volume.
#[derive(Debug, Default, Clone)]
struct Believed {
    /// Ids given since the last successful deletion.
    ids: BTreeSet<String>,
    /// VMs whose attachment was answered OK, and whose detachment was not begun since.
    held: BTreeSet<u32>,
    /// VMs that an attachment was begun to, and none of whose detachments that began later was answered OK.
    perhaps: BTreeSet<u32>,
    /// Its deletion and another call went on at once, which no orchestrator may do: whoever has it then may have nothing.
    torn: bool,
    /// VMs whose attachment was begun and said neither OK nor definitely no: it may be there, until a repeat or a detachment is answered OK.
    unsure: BTreeSet<u32>,
    /// Its deletion was begun since it was last made.
    deleting: bool,
}

#[derive(Debug)]
struct Open {
    rpc: Rpc,
    /// Another call about the same volume began before this one was answered.
    disturbed: bool,
    /// One that takes away what this one is about: a detachment from the same VM, or a deletion; or the other way round.
    crossed: bool,
}

/// Keeps the books of a history.
#[derive(Debug, Default)]
pub struct Judge {
    volumes: Vec<Believed>,
    open: BTreeMap<usize, Open>,
    /// Attached by hand: VM and slot of each volume.
    by_hand: BTreeMap<usize, (u32, String)>,
    /// Slots whose leftovers were planned.
    pub phantoms: usize,
    /// Somebody else writes, too: another controller, one before a kill, a person.
    has_rivals: bool,
    /// Proxmox nodes that cannot be reached now.
    pub away: BTreeSet<&'static str>,
    /// How many attachments to each VM were begun.
    attempts: BTreeMap<u32, usize>,
}

/// Every trace of a volume in a VM: configured, planned, plugged.
#[must_use]
pub fn traces(sim: &Simulator, vmid: u32, volid: &str) -> Vec<String> {
    let Some(vm) = sim.vm(vmid) else { return Vec::new() };
    let names = |line: &str| line == volid || line.strip_prefix(volid).is_some_and(|rest| rest.starts_with(','));
    let configured = vm.config.iter().filter(|(_, line)| names(line)).map(|(key, _)| format!("configured {key}"));
    let planned = vm.pending.iter().filter(|(_, line)| names(line)).map(|(key, _)| format!("planned {key}"));
    let plugged = vm.plugged.iter().filter(|(_, drive)| drive.volid == volid).map(|(key, _)| format!("plugged {key}"));
    configured.chain(planned).chain(plugged).collect()
}

/// The traces in all VMs.
#[must_use]
pub fn all_traces(sim: &Simulator, volid: &str) -> Vec<(u32, Vec<String>)> {
    VMS.iter().map(|vmid| (*vmid, traces(sim, *vmid, volid))).filter(|(_, traces)| !traces.is_empty()).collect()
}

fn is_plugged(sim: &Simulator, vmid: u32, volid: &str) -> bool {
    sim.vm(vmid).is_some_and(|vm| vm.plugged.values().any(|drive| drive.volid == volid))
}

/// Configured and plugged once, in the same slot, and nothing else.
fn is_attached(traces: &[String]) -> bool {
    let slot = |trace: &String, view: &str| trace.strip_prefix(view).map(str::to_owned);
    matches!(traces, [configured, plugged]
        if slot(configured, "configured ").is_some() && slot(configured, "configured ") == slot(plugged, "plugged "))
}

/// Whether the two must not go on at once, for the answers to mean anything.
fn cross(one: &Rpc, other: &Rpc) -> bool {
    match (one, other) {
        (Rpc::Delete { .. }, _) | (_, Rpc::Delete { .. }) => true,
        (Rpc::Publish { vm, .. }, Rpc::Unpublish { vm: of, .. }) | (Rpc::Unpublish { vm, .. }, Rpc::Publish { vm: of, .. }) => vm == of,
        _ => false,
    }
}

/// Where images of a volume's name are: node or `shared`, and volid.
#[must_use]
pub fn images(sim: &Simulator, claim: &Claim) -> BTreeSet<String> {
    let shared = matches!(claim.storage.as_str(), "nfs" | "ceph");
    let of_node = |node: &&str| {
        let place = if shared { "shared" } else { *node };
        let named = sim.volumes(node, &claim.storage).into_iter().filter(|volid| volid.contains(&format!("-{}", claim.name)));
        named.map(|volid| format!("{place} {volid}")).collect::<Vec<_>>()
    };
    NODES.iter().flat_map(of_node).collect()
}

impl Judge {
    #[must_use]
    pub fn new(volumes: usize) -> Judge {
        Judge { volumes: vec![Believed::default(); volumes], ..Judge::default() }
    }

    /// Somebody else writes, too, or nobody does.
    #[must_use]
    pub fn beside_rivals(self, has_rivals: bool) -> Judge {
        Judge { has_rivals, ..self }
    }

    fn volume(&mut self, volume: usize) -> &mut Believed {
        if self.volumes.len() <= volume {
            self.volumes.resize(volume + 1, Believed::default());
        }
        #[expect(clippy::indexing_slicing, reason = "made just before")]
        &mut self.volumes[volume]
    }

    /// VMs that the volume must be detached from before it can be said to be nowhere.
    #[must_use]
    pub fn perhaps_at(&self, volume: usize) -> Vec<u32> {
        self.volumes.get(volume).map_or_else(Vec::new, |volume| volume.perhaps.iter().copied().collect())
    }

    pub fn begins(&mut self, call: usize, rpc: &Rpc) {
        let (mut disturbed, mut crossed) = (false, false);
        for open in self.open.values_mut().filter(|open| open.rpc.volume() == rpc.volume()) {
            open.disturbed = true;
            disturbed = true;
            open.crossed |= cross(&open.rpc, rpc);
            crossed |= cross(&open.rpc, rpc);
        }
        let deletes = |rpc: &Rpc| matches!(rpc, Rpc::Delete { .. });
        let deleting = self.open.values().any(|open| open.rpc.volume() == rpc.volume() && deletes(&open.rpc));
        self.volume(rpc.volume()).torn |= deleting || (disturbed && deletes(rpc));
        match rpc {
            Rpc::Publish { volume, vm } => {
                *self.attempts.entry(*vm).or_default() += 1;
                self.volume(*volume).perhaps.insert(*vm);
            }
            Rpc::Unpublish { volume, vm } => drop(self.volume(*volume).held.remove(vm)),
            Rpc::Delete { volume } => self.volume(*volume).deleting = true,
            Rpc::Create { .. } | Rpc::Expand { .. } | Rpc::Modify { .. } => {}
        }
        self.open.insert(call, Open { rpc: rpc.clone(), disturbed, crossed });
    }

    /// The client does not get to know the answer; the controller may still work on it.
    pub fn unanswered(&mut self, call: usize) {
        if let Some(open) = self.open.get_mut(&call) {
            open.disturbed = true;
            if let Rpc::Publish { volume, vm } = open.rpc.clone() {
                self.volume(volume).unsure.insert(vm);
            }
        }
    }

    /// Also what no client waits for has ended.
    pub fn all_ended(&mut self) {
        for open in std::mem::take(&mut self.open).into_values() {
            if let Rpc::Delete { volume } = open.rpc {
                // Done or not: the next one of that name may be made elsewhere.
                self.volume(volume).ids.clear();
            }
        }
    }

    /// QEMU was started anew, say: what was held there may be gone.
    pub fn lets_go(&mut self, vm: u32) {
        for volume in &mut self.volumes {
            volume.held.remove(&vm);
        }
    }

    pub fn took_by_hand(&mut self, volume: usize, vm: u32, slot: String) {
        self.by_hand.insert(volume, (vm, slot));
    }

    pub fn by_hand(&self) -> &BTreeMap<usize, (u32, String)> {
        &self.by_hand
    }

    /// The drive was taken out by hand. What was attached by hand while its attachment to that very VM went on was rightly found there and
    /// answered OK: then it is not held any more, either.
    pub fn gave_back(&mut self, sim: &Simulator, claims: &[Claim], volume: usize) {
        let Some((vm, _)) = self.by_hand.remove(&volume) else { return };
        let volid = claims.get(volume).and_then(Claim::handle).map(|handle| handle.volid());
        if volid.is_some_and(|volid| traces(sim, vm, &volid).is_empty()) {
            self.volume(volume).held.remove(&vm);
        }
    }

    /// What is wrong with this answer, as things stand.
    pub fn answered(&mut self, sim: &Simulator, claims: &[Claim], call: usize, answer: &Answer) -> Result<(), String> {
        let Some(Open { rpc, disturbed, crossed }) = self.open.remove(&call) else { return Ok(()) };
        let Ok(id) = answer else {
            if let (Rpc::Publish { volume, vm }, false) = (&rpc, is_definite(answer)) {
                self.volume(*volume).unsure.insert(*vm);
            }
            return check_refusal(&rpc, answer);
        };
        let volume = rpc.volume();
        let claim = claims.get(volume).ok_or("no such volume")?;
        let handle = match &rpc {
            Rpc::Create { .. } => id.parse::<VolumeHandle>().map_err(|error| error.to_string())?,
            _ => claim.handle().ok_or("answered about a volume without an id")?,
        };
        let volid = handle.volid();
        match &rpc {
            Rpc::Create { .. } => {
                let ids = &mut self.volume(volume).ids;
                ids.insert(id.clone());
                let deletes = |open: &Open| matches!(open.rpc, Rpc::Delete { volume: of } if of == volume);
                let deleting = self.open.values().any(deletes);
                let believed = self.volume(volume);
                believed.deleting &= deleting;
                let ids = &believed.ids;
                if ids.len() > 1 && !disturbed {
                    return Err(format!("{} has two ids: {ids:?}", claim.name));
                }
                let images = images(sim, claim);
                if images.is_empty() && !disturbed {
                    return Err(format!("{id} was said to be made, and is not there"));
                }
            }
            Rpc::Publish { vm, .. } => return self.attached(sim, volume, *vm, &volid, (disturbed, crossed)),
            Rpc::Unpublish { vm, .. } => {
                let left = traces(sim, *vm, &volid);
                if !disturbed && !left.is_empty() && self.by_hand.get(&volume).is_none_or(|(by, _)| by != vm) {
                    return Err(format!("{volid} was said to be detached from VM {vm}, which has it {left:?}"));
                }
                if !disturbed {
                    self.volume(volume).perhaps.remove(vm);
                    self.volume(volume).unsure.remove(vm);
                }
            }
            Rpc::Expand { bytes, .. } => {
                let size = [handle.zone.as_str(), "pve1"]
                    .iter()
                    .find_map(|node| sim.image(node, &volid))
                    .and_then(|file| std::fs::metadata(file).ok());
                if !disturbed && size.is_none_or(|size| size.len() < *bytes) {
                    return Err(format!("{volid} was said to have {bytes} bytes, and has not"));
                }
            }
            Rpc::Delete { .. } => {
                let left = all_traces(sim, &volid);
                if !disturbed && !left.is_empty() {
                    return Err(format!("{volid} was said to be deleted, and is in {left:?}"));
                }
                if !self.volume(volume).held.is_empty() && !disturbed {
                    return Err(format!("{volid} was said to be deleted, while its attachment had been answered OK"));
                }
                self.volume(volume).ids.clear();
            }
            Rpc::Modify { iops, .. } => {
                let limit = format!("iops_rd={iops},");
                let lines = all_traces(sim, &volid).into_iter().filter_map(|(vm, _)| sim.vm(vm));
                let is_there = lines
                    .flat_map(|vm| vm.config.into_values())
                    .any(|line| line.starts_with(&volid) && format!("{line},").contains(&limit));
                if !disturbed && !is_there && !all_traces(sim, &volid).is_empty() {
                    return Err(format!("{volid} was said to be limited to {iops} operations a second, and is not"));
                }
            }
        }
        Ok(())
    }

    fn attached(&mut self, sim: &Simulator, volume: usize, vm: u32, volid: &str, (disturbed, crossed): (bool, bool)) -> Result<(), String> {
        if !disturbed && !is_plugged(sim, vm, volid) {
            return Err(format!("{volid} was said to be attached to VM {vm}, which has it {:?}", traces(sim, vm, volid)));
        }
        // Of a VM that was never read and whose host is off, Kubernetes' word is taken (clause 2 of a dead host): it knows nothing of a
        // person's.
        let still = |(by, slot): &&(u32, String)| {
            let is_there = |state: VmState| state.plugged.contains_key(slot) && !self.away.contains(state.node.as_str());
            *by != vm && sim.vm(*by).is_some_and(is_there)
        };
        if let Some((by, slot)) = self.by_hand.get(&volume).filter(still).filter(|_| !disturbed) {
            return Err(format!("{volid} was said to be attached to VM {vm}, and somebody else has it as {slot} of VM {by}"));
        }
        // Who attaches it now looks when it has written, and goes.
        let comes = |other: u32| self.open.values().any(|open| open.rpc == Rpc::Publish { volume, vm: other });
        let is_by_hand = |other: u32| self.by_hand.get(&volume).is_some_and(|(by, _)| *by == other);
        if let Some(other) =
            VMS.iter().find(|other| **other != vm && is_plugged(sim, **other, volid) && !comes(**other) && !is_by_hand(**other))
        {
            return Err(format!("{volid} was said to be attached to VM {vm}, and VM {other} has it {:?}", traces(sim, *other, volid)));
        }
        let Believed { held, unsure, .. } = self.volume(volume);
        if crossed {
            unsure.insert(vm);
            return Ok(());
        }
        unsure.remove(&vm);
        held.insert(vm);
        if held.len() > 1 {
            return Err(format!("{volid}: two attachments were answered OK: to VMs {held:?}"));
        }
        Ok(())
    }

    /// What was made and never asked to be deleted is there.
    pub fn none_lost(&self, sim: &Simulator, claims: &[Claim]) -> Result<(), String> {
        for (believed, claim) in self.volumes.iter().zip(claims) {
            if let Some(id) = claim.id.as_ref().filter(|_| !believed.torn && !believed.deleting && images(sim, claim).is_empty()) {
                return Err(format!("{id} was made, nobody asked to delete it, and it is gone"));
            }
        }
        Ok(())
    }

    /// In this VM, once, configured as plugged, and nowhere else.
    pub fn only_in(&self, sim: &Simulator, claim: &Claim, vm: u32) -> Result<(), String> {
        let volid = claim.handle().ok_or("attached without an id")?.volid();
        match all_traces(sim, &volid).as_slice() {
            [(only, traces)] if *only == vm && is_attached(traces) => Ok(()),
            others => Err(format!("{volid} was attached to VM {vm} alone, and is in {others:?}")),
        }
    }

    /// Nobody holds what was never asked for, and nothing is there twice. For a moment when nothing is going on.
    pub fn at_rest(&self, sim: &Simulator, claims: &[Claim]) -> Result<(), String> {
        for (number, claim) in claims.iter().enumerate() {
            let images = images(sim, claim);
            if images.len() > 1 {
                return Err(format!("{} is there more than once: {images:?}", claim.name));
            }
            let Some(handle) = claim.handle() else { continue };
            let volid = handle.volid();
            let holders = all_traces(sim, &volid);
            let known = self.perhaps_at(number);
            for (vm, traces) in &holders {
                let by_hand = self.by_hand.get(&number).is_some_and(|(by, _)| by == vm);
                if !known.contains(vm) && !by_hand {
                    return Err(format!("{volid} is left {traces:?} in VM {vm}, although its detachment was answered OK"));
                }
                if traces.iter().filter(|trace| trace.starts_with("plugged")).count() > 1 {
                    return Err(format!("{volid} is plugged twice in VM {vm}: {traces:?}"));
                }
            }
            let plugged: Vec<&(u32, Vec<String>)> = holders
                .iter()
                .filter(|(vm, traces)| {
                    let by_hand = self.by_hand.get(&number).is_some_and(|(by, _)| by == vm);
                    !by_hand && traces.iter().any(|trace| trace.starts_with("plugged"))
                })
                .collect();
            let is_known =
                |vm: &u32| self.volumes.get(number).is_some_and(|volume| !volume.held.contains(vm) && !volume.unsure.contains(vm));
            if plugged.len() > 1 && plugged.iter().any(|(vm, _)| is_known(vm)) {
                return Err(format!("{volid} is plugged in two VMs: {plugged:?}"));
            }
            let torn = self.volumes.get(number).is_some_and(|volume| volume.torn);
            let held = self.volumes.get(number).filter(|_| !torn).map(|volume| volume.held.clone()).unwrap_or_default();
            if let Some(vm) = held.iter().find(|vm| !is_attached(&traces(sim, **vm, &volid))) {
                return Err(format!("{volid} was attached to VM {vm}, and is not as it was: {:?}", traces(sim, *vm, &volid)));
            }
            if !torn && holders.iter().any(|(_, traces)| traces.iter().any(|trace| trace.starts_with("plugged"))) && images.is_empty() {
                return Err(format!("{volid} was deleted while {holders:?} has it"));
            }
        }
        Ok(())
    }

    /// A drive that QEMU refused costs its slot. It does where another VM of the node got the image between a look and the write (from another
    /// controller, by hand, or because the write was carried out late), and no look can prevent that: one slot for each attachment, and none
    /// where nobody else writes.
    fn check_leftovers(&self, vmid: u32, vm: &VmState) -> Result<(), String> {
        let (lost, others): (Vec<_>, Vec<_>) = vm.leaked.iter().partition(|key| vm.leaked_to_rivals.contains(*key));
        if others.len() > self.phantoms {
            return Err(format!("VM {vmid} has leftovers in {others:?}, of {} planned", self.phantoms));
        }
        let most = if self.has_rivals { self.attempts.get(&vmid).copied().unwrap_or_default() } else { 0 };
        if lost.len() > most {
            return Err(format!("VM {vmid} has leftovers in {lost:?}, since another VM had the images, and {most} may be"));
        }
        Ok(())
    }

    /// Nothing is left of anything: after everything was detached and deleted.
    pub fn at_the_end(&self, sim: &Simulator, claims: &[Claim]) -> Result<(), String> {
        for claim in claims {
            let images = images(sim, claim);
            if !images.is_empty() {
                return Err(format!("{} was deleted, and is there: {images:?}", claim.name));
            }
        }
        for vmid in VMS {
            let Some(vm) = sim.vm(vmid) else { continue };
            let disks: Vec<&String> = vm.config.keys().filter(|key| key.starts_with("scsi") && *key != "scsihw").collect();
            if !disks.is_empty() || !vm.plugged.is_empty() || !vm.pending.is_empty() || !vm.pending_delete.is_empty() {
                let (pending, deletes, plugged) = (&vm.pending, &vm.pending_delete, &vm.plugged);
                return Err(format!(
                    "VM {vmid} should be empty: configured {disks:?}, planned {pending:?} {deletes:?}, plugged {plugged:?}"
                ));
            }
            self.check_leftovers(vmid, &vm)?;
        }
        Ok(())
    }
}

/// What a refusal says is not there, is not; unless it says that it could not be taken out.
fn is_definite(answer: &Answer) -> bool {
    use tonic::Code;
    let codes = [Code::FailedPrecondition, Code::NotFound, Code::AlreadyExists, Code::ResourceExhausted];
    answer.as_ref().is_err_and(|status| codes.contains(&status.code()) && !status.message().contains("and taking"))
}

/// An error says something, in one of the codes that we mean.
fn check_refusal(rpc: &Rpc, answer: &Answer) -> Result<(), String> {
    let Err(status) = answer else { return Ok(()) };
    use tonic::Code;
    let meant = matches!(
        status.code(),
        Code::Unavailable
            | Code::Aborted
            | Code::FailedPrecondition
            | Code::NotFound
            | Code::AlreadyExists
            | Code::Internal
            | Code::ResourceExhausted
    );
    if !meant || status.message().is_empty() || status.message().contains("broke off") {
        return Err(format!("{rpc:?} answered {:?} {:?}", status.code(), status.message()));
    }
    Ok(())
}
