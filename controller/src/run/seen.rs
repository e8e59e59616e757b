//! What is known now, for who only looks: nothing is asked, nobody waited for.

use std::sync::Arc;
use std::time::Duration;

use super::Controller;
use super::region::{Known, Region, VmSlot, locked};
use crate::pve::api::Resources;
use crate::pve::drive::{is_disk_slot, volume_of};

/// All clusters.
#[derive(Debug, Default)]
pub struct Seen {
    /// In the order of their names.
    pub regions: Vec<RegionSeen>,
}

/// One cluster.
#[derive(Debug)]
pub struct RegionSeen {
    /// Its name.
    pub name: String,
    /// Since start.
    pub answered: bool,
    /// As last read, and how long ago.
    pub resources: Option<(Duration, Arc<Resources>)>,
    /// VMs that were read; not those that are being read now.
    pub vms: Vec<VmSeen>,
    /// Drives that are to be removed from VMs that lost the volume.
    pub leftovers: usize,
}

/// One VM.
#[derive(Debug)]
pub struct VmSeen {
    /// Its number.
    pub vmid: u32,
    /// Where it was read.
    pub host: String,
    /// How long ago.
    pub age: Duration,
    /// Volumes were attached to it, or detached from it.
    pub is_node: bool,
    /// Drives in its config, planned ones included.
    pub drives: usize,
    /// Of our slots.
    pub slots_free: usize,
    /// Slots that QEMU keeps blocked.
    pub leaked: usize,
    /// Proxmox's lock of it, and since when it was seen.
    pub lock: Option<(String, Duration)>,
}

impl Controller {
    /// What is known, without a call.
    #[must_use]
    pub fn seen(&self) -> Seen {
        let Ok(clusters) = self.clusters() else { return Seen::default() };
        let owner = format!("vm-{}-", clusters.features.controller_vmid);
        Seen { regions: clusters.regions.values().map(|region| region.seen(&owner)).collect() }
    }

    /// Whether there is a config, and a cluster that has answered; and what is to be said of each, a line each.
    ///
    /// # Errors
    /// The config is bad, or no cluster has answered.
    pub fn readiness(&self) -> Result<String, String> {
        let clusters = self.clusters().map_err(|error| error.text)?;
        let mut lines = String::new();
        let mut ready = false;
        for (name, region) in &clusters.regions {
            let client = region.client();
            ready |= client.heard.ever();
            let word = match (client.heard.ever(), client.heard.trouble()) {
                (_, Some(trouble)) => format!("does not answer: {trouble}"),
                (true, None) => "answers".into(),
                (false, None) => "was not asked yet".into(),
            };
            lines.push_str(&format!("region {name} {word}\n"));
        }
        if ready { Ok(lines) } else { Err(lines.trim_end().into()) }
    }
}

impl Region {
    fn seen(&self, owner: &str) -> RegionSeen {
        let slots: Vec<(u32, Arc<VmSlot>)> = locked(&self.vms).iter().map(|(vmid, slot)| (*vmid, Arc::clone(slot))).collect();
        let resources = locked(&self.last_resources).clone();
        // A VM that was destroyed is never read again, and what was last read of it is nobody's.
        let last = resources.as_ref().map(|(_, resources)| Arc::clone(resources));
        let is_there = |(vmid, _): &(u32, Arc<VmSlot>)| last.as_ref().is_none_or(|last| last.vms.contains_key(vmid));
        RegionSeen {
            name: self.name.clone(),
            answered: self.client().heard.ever(),
            resources: resources.map(|(read_at, resources)| (read_at.elapsed(), resources)),
            vms: slots.into_iter().filter(is_there).filter_map(|(vmid, slot)| seen_of(vmid, &slot, owner)).collect(),
            leftovers: locked(&self.leftovers).values().map(|(_, vmids)| vmids.len()).sum(),
        }
    }
}

fn seen_of(vmid: u32, slot: &VmSlot, owner: &str) -> Option<VmSeen> {
    let known = slot.known.try_lock().ok()?;
    let known = known.as_ref()?;
    // Of an earlier QEMU process, or a lock that a later reading does not show, they are past.
    let pid = known.seen.as_ref().and_then(|(pid, _)| *pid);
    let leaked = Some(locked(&slot.leaked).clone()).filter(|(of, _)| *of == pid).map(|(_, luns)| luns).unwrap_or_default();
    let lock = locked(&slot.lock).clone().filter(|(lock, _)| known.config.configured("lock") == Some(lock.as_str()));
    let is_taken = |lun: &u8| {
        let key = format!("scsi{lun}");
        leaked.contains(lun) || known.held.contains_key(&key) || known.config.lines.contains_key(&key)
    };
    let drives = drives(known);
    Some(VmSeen {
        vmid,
        host: known.host.clone(),
        age: known.read_at.elapsed(),
        is_node: slot.queue.was_used() || drives.iter().any(|volid| is_of(volid, owner)),
        drives: drives.len(),
        slots_free: proto::LUN_RANGE.filter(|lun| !is_taken(lun)).count(),
        leaked: leaked.len(),
        lock: lock.map(|(lock, since)| (lock, since.elapsed().unwrap_or_default())),
    })
}

/// Volumes that a VM's config names, planned ones included.
fn drives(known: &Known) -> Vec<String> {
    let lines = known.config.lines.iter().filter(|(key, _)| is_disk_slot(key));
    lines.filter_map(|(_, line)| Some(volume_of(line.value.as_deref().or(line.pending.as_deref())?).to_owned())).collect()
}

/// `local:9999/vm-9999-a.raw`, `local-lvm:vm-9999-a`: the disk's name begins with its owner's.
pub(crate) fn is_of(volid: &str, owner: &str) -> bool {
    volid.rsplit([':', '/']).next().is_some_and(|disk| disk.starts_with(owner))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pve::drive::{Line, VmConfig};
    use std::time::SystemTime;
    use tokio::time::Instant;

    fn known(lock: Option<&str>, pid: u64) -> Known {
        let line = |text: &str| Line { value: Some(text.into()), ..Line::default() };
        let lines = lock.map(|lock| ("lock".to_string(), line(lock))).into_iter().collect();
        let config = VmConfig { lines, digest: String::new() };
        let (held, seen) = (Default::default(), Some((Some(pid), Default::default())));
        Known { host: "pve1".into(), config, read_at: Instant::now(), held, seen, snapshots: None, is_stale: false }
    }

    #[test]
    fn a_note_that_a_later_reading_contradicts_is_shown_to_nobody() {
        let slot = VmSlot::default();
        *locked(&slot.lock) = Some(("backup".into(), SystemTime::now()));
        *locked(&slot.leaked) = (Some(7), [3, 4].into());
        let seen = |lock: Option<&str>, pid: u64| {
            *slot.known.try_lock().unwrap() = Some(known(lock, pid));
            let seen = seen_of(101, &slot, "vm-9999-").unwrap();
            (seen.lock.map(|(lock, _)| lock), seen.leaked)
        };
        assert_eq!(seen(Some("backup"), 7), (Some("backup".into()), 2));
        assert_eq!(seen(None, 7), (None, 2), "the backup has ended");
        assert_eq!(seen(Some("migrate"), 8), (None, 0), "another lock, and the VM was started anew");
    }
}
