//! Who waits for a change of a VM, and who makes it for all of them.
//!
//! Proxmox changes one VM at a time, and several drives in one call take hardly longer than one. Whoever gets the VM first
//! works off what waits, in batches; the others find their answer when their turn comes. Nobody waits for company.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use proto::VolumeHandle;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::batch::Batch;
use super::region::Region;
use crate::deadline;
use crate::error::Error;
use crate::look::metrics;
use crate::pve::api::Vm;
use crate::pve::drive::Drive;
use crate::request::Publish;

/// One call's task should end in this time: sidecars wait 15 s at least, others for the VM's lock, and 30 s end a proxied call.
const BATCH: Duration = Duration::from_secs(25);
/// What a drive adds to it, with a controller of its own (virtio-scsi-single): 0.25 s to 1.3 s were measured.
const PLUG: Duration = Duration::from_millis(1300);
/// Proxmox polls once a second for the disk, and again for its controller.
const UNPLUG: Duration = Duration::from_millis(2500);
/// How long a caller waits for the VM that says nothing of its patience: several batches.
const PATIENCE: Duration = Duration::from_secs(120);

/// What is to become of one volume in a VM.
#[derive(Debug, Clone)]
pub(super) enum Wish {
    /// It is there.
    Attach(Arc<Publish>),
    /// It is not there.
    Detach(VolumeHandle),
}

impl Wish {
    /// The volume.
    pub(super) fn handle(&self) -> &VolumeHandle {
        match self {
            Self::Attach(request) => &request.handle,
            Self::Detach(handle) => handle,
        }
    }

    fn cost(&self) -> Duration {
        match self {
            Self::Attach(_) => PLUG,
            Self::Detach(_) => UNPLUG,
        }
    }
}

/// What became of it.
#[derive(Debug)]
pub(super) enum Done {
    /// It is in this slot of this VM; and since when at the latest, if this call wrote it, or tried to.
    Attached { lun: u8, drive: Box<Drive>, vm: Vm, written: Option<Instant> },
    /// No view of the VM has it.
    Detached,
}

/// One who waits.
#[derive(Debug)]
pub(super) struct Entry {
    id: u64,
    pub(super) wish: Wish,
    /// When its caller should have an answer, if it says so.
    pub(super) due: Option<Instant>,
    pub(super) answer: oneshot::Sender<Result<Done, Error>>,
}

/// Those who wait for one VM, first come first served.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: Mutex<VecDeque<Entry>>,
    last_id: AtomicU64,
}

impl Queue {
    fn waiting(&self) -> std::sync::MutexGuard<'_, VecDeque<Entry>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, wish: Wish, due: Option<Instant>) -> (u64, oneshot::Receiver<Result<Done, Error>>) {
        let (answer, answered) = oneshot::channel();
        let id = self.last_id.fetch_add(1, Ordering::Relaxed);
        self.waiting().push_back(Entry { id, wish, due, answer });
        (id, answered)
    }

    /// Whether anybody ever waited here: a VM that is a node of Kubernetes'.
    pub(super) fn was_used(&self) -> bool {
        self.last_id.load(Ordering::Relaxed) > 0
    }

    /// Takes itself out again; not so when it is being worked on.
    fn leave(&self, id: u64) -> bool {
        let mut waiting = self.waiting();
        let before = waiting.len();
        waiting.retain(|entry| entry.id != id);
        waiting.len() < before
    }

    /// The first who wait, as many as fit into one call.
    fn take(&self) -> Vec<Entry> {
        let mut waiting = self.waiting();
        let (mut taken, mut left) = (Vec::new(), BATCH);
        while let Some(cost) = waiting.front().map(|entry| entry.wish.cost()).filter(|cost| taken.is_empty() || *cost <= left) {
            left = left.saturating_sub(cost);
            taken.extend(waiting.pop_front());
        }
        taken
    }
}

impl Region {
    /// Has a volume attached to or detached from a VM, together with whatever else waits for this VM.
    ///
    /// # Errors
    /// What the batch answers; or the caller's patience is over before the VM's turn came.
    pub(super) async fn submit(self: &Arc<Self>, vm: &Vm, wish: Wish) -> Result<Done, Error> {
        let due = deadline::of_caller();
        let slot = self.vm(vm.vmid);
        let _waits = metrics::Change::begin(&self.name, matches!(wish, Wish::Attach(_)));
        let (id, mut answered) = slot.queue.enter(wish, due);
        let broke_off = || Error::internal("the change broke off; repeated");
        let _alone = tokio::select! {
            biased;
            done = &mut answered => return done.unwrap_or_else(|_| Err(broke_off())),
            alone = self.change_alone(vm.vmid) => alone,
            () = tokio::time::sleep_until(due.unwrap_or_else(|| Instant::now() + PATIENCE)) => {
                if slot.queue.leave(id) {
                    return Err(self.still_busy(vm.vmid));
                }
                return answered.await.unwrap_or_else(|_| Err(broke_off()));
            }
        };
        loop {
            match answered.try_recv() {
                Ok(done) => return done,
                Err(oneshot::error::TryRecvError::Closed) => return Err(broke_off()),
                Err(oneshot::error::TryRecvError::Empty) => (),
            }
            let batch = slot.queue.take();
            if batch.is_empty() {
                return Err(broke_off());
            }
            Batch::new(self, vm.clone(), batch).run().await;
        }
    }

    fn still_busy(&self, vmid: u32) -> Error {
        match self.lock_seen(vmid) {
            Some((lock, since)) => super::batch::locked_words(vmid, &lock, since),
            None => Error::unavailable(format!("other changes of VM {vmid} still go on; repeated")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait(queue: &Queue, count: usize) {
        for n in 0..count {
            let handle = format!("r/z/ds/vm-9999-{n}").parse().unwrap();
            drop(queue.enter(Wish::Detach(handle), None));
        }
    }

    #[test]
    fn a_batch_is_no_more_than_fits_and_never_nothing() {
        let queue = Queue::default();
        assert!(queue.take().is_empty());
        wait(&queue, 23);
        let sizes: Vec<usize> = (0..4).map(|_| queue.take().len()).collect();
        assert_eq!(sizes, [10, 10, 3, 0], "25 s of 2.5 s each");
    }

    #[test]
    fn who_leaves_is_not_worked_on_and_who_is_worked_on_cannot_leave() {
        let queue = Queue::default();
        let (id, _answered) = queue.enter(Wish::Detach("r/z/ds/vm-9999-a".parse().unwrap()), None);
        assert!(queue.leave(id));
        assert!(queue.take().is_empty());
        let (id, _answered) = queue.enter(Wish::Detach("r/z/ds/vm-9999-a".parse().unwrap()), None);
        assert_eq!(queue.take().len(), 1);
        assert!(!queue.leave(id));
    }
}
