//! What the controller counts beside its calls, and its metrics page. Pure but for the counters, which live as long as the process.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use proto::metrics::{self, Times};
use serde_json::Value;
use tokio::time::Instant;

use crate::pve;
use crate::run::seen::{Seen, VmSeen};

static REQUESTS: Times<3> = Times::new(
    "proxmox_csi_controller_proxmox_request_duration_seconds",
    "Requests to Proxmox by endpoint, region and outcome (OK or the class of the error), and the time that they took.",
    ["endpoint", "region", "outcome"],
);
static LOCK_WAITS: Times<1> = Times::new(
    "proxmox_csi_controller_lock_wait_seconds",
    "Waits for one another: vm, changes of one VM; node_calls and cluster_calls, places for requests to one Proxmox node and to one cluster; \
     readers, VMs read at a time.",
    ["lock"],
);
/// Who waits now, by lock.
static WAITING: [AtomicUsize; Lock::ALL.len()] = [const { AtomicUsize::new(0) }; Lock::ALL.len()];
/// Attaches and detaches that go on: region, whether it is an attach, since when.
static CHANGES: Mutex<BTreeMap<u64, (String, bool, Instant)>> = Mutex::new(BTreeMap::new());
static LAST_CHANGE: AtomicU64 = AtomicU64::new(0);

/// What calls wait for one another at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lock {
    /// One VM is changed by one call at a time.
    Vm,
    /// Requests about one Proxmox node.
    HostCalls,
    /// Requests to one cluster.
    ClusterCalls,
    /// VMs that are read at a time.
    Readers,
}

impl Lock {
    const ALL: [Self; 4] = [Self::Vm, Self::HostCalls, Self::ClusterCalls, Self::Readers];

    const fn name(self) -> &'static str {
        match self {
            Self::Vm => "vm",
            Self::HostCalls => "node_calls",
            Self::ClusterCalls => "cluster_calls",
            Self::Readers => "readers",
        }
    }

    fn waiting(self) -> Option<&'static AtomicUsize> {
        WAITING.get(self as usize)
    }
}

/// One who waits; counted until dropped, so that who gives up is not counted for ever.
struct Waiting(Lock);

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(waiting) = self.0.waiting() {
            waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Waits for `turn` and counts how long that took.
pub async fn waited<T>(lock: Lock, turn: impl Future<Output = T>) -> T {
    let begun = Instant::now();
    if let Some(waiting) = lock.waiting() {
        waiting.fetch_add(1, Ordering::Relaxed);
    }
    let _waiting = Waiting(lock);
    let got = turn.await;
    LOCK_WAITS.count([lock.name()], begun.elapsed());
    got
}

/// Counts a request to Proxmox.
pub fn count_request(endpoint: &str, region: &str, answer: &Result<Value, pve::Error>, took: Duration) {
    match answer {
        Ok(_) => REQUESTS.count([endpoint, region, "OK"], took),
        Err(error) => REQUESTS.count([endpoint, region, &format!("{:?}", error.meaning())], took),
    }
}

/// An attach or a detach that goes on until this is dropped.
#[derive(Debug)]
pub struct Change(u64);

impl Change {
    /// From now on.
    #[must_use]
    pub fn begin(region: &str, is_attach: bool) -> Self {
        let id = LAST_CHANGE.fetch_add(1, Ordering::Relaxed);
        changes().insert(id, (region.into(), is_attach, Instant::now()));
        Self(id)
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        changes().remove(&self.0);
    }
}

fn changes() -> std::sync::MutexGuard<'static, BTreeMap<u64, (String, bool, Instant)>> {
    CHANGES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The page. `seen`: nothing on a standby.
#[must_use]
pub fn page(seen: Option<&Seen>) -> String {
    let mut page = String::new();
    let nothing = Seen::default();
    metrics::fact(&mut page, "proxmox_csi_controller_build_info", "The controller's version.", &[("version", env!("CARGO_PKG_VERSION"))]);
    metrics::gauge(&mut page, "proxmox_csi_controller_acts", "1: it serves; 0: it is a standby.", u8::from(seen.is_some()));
    regions(&mut page, seen.unwrap_or(&nothing));
    vms(&mut page, seen.unwrap_or(&nothing));
    storages(&mut page, seen.unwrap_or(&nothing));
    waits(&mut page, seen.unwrap_or(&nothing));
    REQUESTS.write(&mut page);
    LOCK_WAITS.write(&mut page);
    metrics::calls(&mut page);
    metrics::process(&mut page);
    page
}

fn age(age: Duration) -> String {
    metrics::seconds(age)
}

fn regions(page: &mut String, seen: &Seen) {
    let all = || seen.regions.iter();
    metrics::gauges(
        page,
        "proxmox_csi_controller_region_answered",
        "1: the cluster has answered since start.",
        all().map(|one| ([("region", one.name.as_str())], u8::from(one.answered))),
    );
    metrics::gauges(
        page,
        "proxmox_csi_controller_cluster_age_seconds",
        "Age of the last reading of the cluster's VMs, storages and nodes.",
        all().filter_map(|one| Some(([("region", one.name.as_str())], age(one.resources.as_ref()?.0)))),
    );
    metrics::gauges(
        page,
        "proxmox_csi_controller_index_vms",
        "VMs whose drives are known: the index of who holds what.",
        all().map(|one| ([("region", one.name.as_str())], one.vms.len())),
    );
    metrics::gauges(
        page,
        "proxmox_csi_controller_index_drives",
        "Drives in that index.",
        all().map(|one| ([("region", one.name.as_str())], one.vms.iter().map(|vm| vm.drives).sum::<usize>())),
    );
    metrics::gauges(
        page,
        "proxmox_csi_controller_index_age_seconds",
        "Age of its oldest reading; it is read again on demand only.",
        all().filter_map(|one| Some(([("region", one.name.as_str())], age(one.vms.iter().map(|vm| vm.age).max()?)))),
    );
    metrics::gauges(
        page,
        "proxmox_csi_controller_leftover_drives",
        "Ghosts: drives that VMs still have in their config though the volume was taken over elsewhere.",
        all().map(|one| ([("region", one.name.as_str())], one.leftovers)),
    );
}

fn vms(page: &mut String, seen: &Seen) {
    let vms: Vec<(&str, String, &VmSeen)> =
        seen.regions.iter().flat_map(|one| one.vms.iter().map(|vm| (one.name.as_str(), vm.vmid.to_string(), vm))).collect();
    metrics::gauges(
        page,
        "proxmox_csi_controller_vm_slots_free",
        "Slots from scsi1 to scsi29 that are free, of VMs that volumes were attached to.",
        vms.iter()
            .filter(|(_, _, vm)| vm.is_node)
            .map(|(region, vmid, vm)| ([("region", *region), ("host", vm.host.as_str()), ("vmid", vmid)], vm.slots_free)),
    );
    metrics::gauges(
        page,
        "proxmox_csi_controller_vm_leaked_slots",
        "Ghosts: slots where QEMU keeps what is left of a drive until the VM restarts.",
        vms.iter().filter(|(_, _, vm)| vm.is_node).map(|(region, vmid, vm)| ([("region", *region), ("vmid", vmid)], vm.leaked)),
    );
    metrics::gauges(
        page,
        "proxmox_csi_controller_vm_lock_age_seconds",
        "Since when a lock of Proxmox's (a backup, a snapshot, a migration) is seen on a VM that a volume waits for.",
        vms.iter().filter_map(|(region, vmid, vm)| {
            let (lock, since) = vm.lock.as_ref()?;
            Some(([("region", *region), ("vmid", vmid), ("lock", lock.as_str())], age(*since)))
        }),
    );
}

fn storages(page: &mut String, seen: &Seen) {
    let all = || {
        let read = seen.regions.iter().filter_map(|one| Some((one.name.as_str(), &one.resources.as_ref()?.1)));
        read.flat_map(|(region, resources)| {
            resources.storages.iter().filter(|storage| storage.images).map(move |storage| (region, storage))
        })
    };
    type Number = fn(&crate::pve::api::Storage) -> u64;
    let numbers: [(&str, &str, Number); 3] = [
        ("proxmox_csi_controller_storage_total_bytes", "Room of each storage for disks, by Proxmox node.", |one| one.total_bytes),
        ("proxmox_csi_controller_storage_used_bytes", "What is used of it.", |one| one.used_bytes),
        ("proxmox_csi_controller_storage_available_bytes", "What is left of it.", |one| one.total_bytes.saturating_sub(one.used_bytes)),
    ];
    for (name, help, number) in numbers {
        // Where Proxmox says nothing, nothing is said: 0 of 0 bytes would be a full storage.
        let known = all().filter(|(_, one)| one.total_bytes > 0);
        metrics::gauges(
            page,
            name,
            help,
            known.map(|(region, one)| ([("region", region), ("host", one.host.as_str()), ("storage", one.storage.as_str())], number(one))),
        );
    }
    metrics::gauges(
        page,
        "proxmox_csi_controller_storage_active",
        "1: Proxmox has seen the storage active on that node within five minutes.",
        all().map(|(region, one)| {
            ([("region", region), ("host", one.host.as_str()), ("storage", one.storage.as_str())], u8::from(one.active))
        }),
    );
}

fn waits(page: &mut String, seen: &Seen) {
    let changes: Vec<(String, bool, Instant)> = changes().values().cloned().collect();
    let mut waiting: BTreeMap<(&str, &str), (usize, Duration)> = BTreeMap::new();
    for region in &seen.regions {
        for kind in ["attach", "detach"] {
            waiting.insert((&region.name, kind), (0, Duration::ZERO));
        }
    }
    for (region, is_attach, since) in &changes {
        let (count, longest) = waiting.entry((region, if *is_attach { "attach" } else { "detach" })).or_default();
        (*count, *longest) = (*count + 1, since.elapsed().max(*longest));
    }
    let labels = |(region, kind): (&'_ str, &'_ str)| [("region", region.to_owned()), ("kind", kind.to_owned())];
    let waiting: Vec<_> = waiting.into_iter().map(|(key, value)| (labels(key), value)).collect();
    let each = || waiting.iter().map(|(labels, value)| (labels.each_ref().map(|(name, text)| (*name, text.as_str())), value));
    metrics::gauges(
        page,
        "proxmox_csi_controller_changes_waiting",
        "Attaches and detaches that were asked for and have no answer yet.",
        each().map(|(labels, (count, _))| (labels, count)),
    );
    metrics::gauges(
        page,
        "proxmox_csi_controller_changes_longest_wait_seconds",
        "How long the first of them waits.",
        each().map(|(labels, (_, longest))| (labels, age(*longest))),
    );
    metrics::gauges(
        page,
        "proxmox_csi_controller_lock_waiting",
        "Who waits at a lock now; see proxmox_csi_controller_lock_wait_seconds.",
        Lock::ALL.into_iter().map(|lock| ([("lock", lock.name())], lock.waiting().map_or(0, |waiting| waiting.load(Ordering::Relaxed)))),
    );
}
