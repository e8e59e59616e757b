//! So many at one time. A place whose holder's disk does not answer goes to the next: one that never answers must not cost all the others theirs.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::Cause;
use crate::kill;
use crate::metrics;
use crate::pulse::Pulse;

/// Probes and formats at one time: each reads and writes megabytes.
pub(super) const MAX_DISK_WORKERS: u32 = 2;
/// For a place to become free. Within kubelet's two minutes, and longer than [`STUCK_AFTER`].
pub(super) const SLOT_DEADLINE: Duration = Duration::from_secs(60);
/// No single read or write (a flush: [`crate::pulse::granted`]) of a disk that answers takes longer: the kernel gives a SCSI command 30 s before it asks what has become of it
/// (SD_TIMEOUT), and QEMU's answer to that is "still at it".
const STUCK_AFTER: Duration = Duration::from_secs(30);
/// Threads that may wait for disks without a place. Half of a VM's 29 disks: where more do not answer, it is the storage that does not, and
/// others would only join them.
pub(super) const MAX_STUCK: usize = 16;

/// So many at one time, the others wait, and come in their order: who asks again and again keeps nobody out.
#[derive(Debug)]
pub(super) struct Slots {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[cfg(test)]
impl Slots {
    /// Who asks from now on is not waited for so long.
    pub(super) fn be_patient_for(&self, patience: Duration) {
        self.lock().patience = patience;
    }

    /// Until so many wait for a place.
    pub(super) fn await_waiting(&self, count: usize) {
        while self.lock().waiting.len() != count {
            std::thread::yield_now();
        }
    }
}

#[derive(Debug)]
struct Queue {
    /// Less than 0: those who were taken for stuck have come back to their work.
    free: i64,
    next_ticket: u64,
    /// For a place to work.
    patience: Duration,
    waiting: VecDeque<u64>,
    holders: Vec<Holder>,
}

#[derive(Debug)]
struct Holder {
    ticket: u64,
    /// For people.
    disk: String,
    /// `None`: it waits for no disk.
    pulse: Option<Pulse>,
    /// Its place has been given to another.
    is_stuck: bool,
}

impl Queue {
    fn stuck(&self) -> usize {
        self.holders.iter().filter(|holder| holder.is_stuck).count()
    }

    /// Takes the places of those whose disks do not answer, and gives back the places of those whose disks do again; the time until there may be
    /// another such.
    fn give_back(&mut self, stuck_after: Duration) -> Duration {
        let mut next = Duration::MAX;
        let mut stuck = self.stuck();
        for holder in &mut self.holders {
            let Some((idle, left)) = holder.pulse.as_ref().map(|pulse| pulse.idle(stuck_after)) else { continue };
            if !left.is_zero() {
                next = next.min(left);
                if std::mem::take(&mut holder.is_stuck) {
                    stuck -= 1;
                    self.free -= 1;
                    proto::info!("{} answers again: its call has its place back", holder.disk);
                }
            } else if !holder.is_stuck && stuck < MAX_STUCK {
                stuck += 1;
                holder.is_stuck = true;
                self.free += 1;
                metrics::STUCK_EVER.add();
                proto::warn!(
                    "{} has not answered for {} s while it is probed or formatted: its call goes on waiting, and its place goes to another \
                     volume; look at the disk's storage on Proxmox",
                    holder.disk,
                    idle.as_secs()
                );
            }
        }
        next
    }

    /// `sdb (0:0:0:1)`, several with commas.
    fn named(&self) -> String {
        let names: Vec<&str> = self.holders.iter().map(|holder| holder.disk.as_str()).collect();
        names.join(", ")
    }
}

impl Slots {
    pub(super) fn new(places: u32) -> Self {
        let queue = Queue { free: places.into(), next_ticket: 0, patience: SLOT_DEADLINE, waiting: VecDeque::new(), holders: Vec::new() };
        Self { queue: Mutex::new(queue), changed: Condvar::new() }
    }

    /// A place to work on that disk, which may never answer.
    pub(super) fn take(&self, disk: String) -> Result<Slot<'_>, Cause> {
        self.take_within(SLOT_DEADLINE, kill::limit("STUCK", STUCK_AFTER), Some(disk))
    }

    /// How many of those who have a place, or had one, wait for a disk that does not answer, at this moment.
    pub(super) fn stuck(&self) -> usize {
        self.stuck_for(kill::limit("STUCK", STUCK_AFTER))
    }

    fn stuck_for(&self, stuck_after: Duration) -> usize {
        let queue = self.lock();
        let pulses = queue.holders.iter().filter_map(|holder| holder.pulse.as_ref());
        pulses.filter(|pulse| pulse.idle(stuck_after).1.is_zero()).count()
    }

    /// How long who asks for a place to work waits for it.
    pub(super) fn patience(&self) -> Duration {
        self.lock().patience
    }

    /// A place for work that waits for no disk.
    pub(super) fn take_to_work(&self, deadline: Duration) -> Result<Slot<'_>, Cause> {
        self.take_within(deadline, Duration::MAX, None)
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn take_within(&self, deadline: Duration, stuck_after: Duration, disk: Option<String>) -> Result<Slot<'_>, Cause> {
        let begun = Instant::now();
        let mut queue = self.lock();
        let ticket = queue.next_ticket;
        queue.next_ticket += 1;
        queue.waiting.push_back(ticket);
        let is_due = loop {
            let next = queue.give_back(stuck_after);
            if queue.free > 0 && queue.waiting.front() == Some(&ticket) {
                break true;
            }
            let Some(left) = deadline.checked_sub(begun.elapsed()).filter(|left| !left.is_zero()) else { break false };
            let waited = self.changed.wait_timeout(queue, left.min(next));
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        };
        queue.waiting.retain(|waiting| *waiting != ticket);
        let by = queue.named();
        if is_due {
            queue.free -= 1;
            let pulse = disk.as_ref().map(|_| Pulse::begin());
            queue.holders.push(Holder { ticket, disk: disk.unwrap_or_default(), pulse, is_stuck: false });
        }
        // Somebody else is the first now.
        self.changed.notify_all();
        if is_due { Ok(Slot { slots: self, ticket }) } else { Err(Cause::Crowded { waited: deadline, by }) }
    }
}

/// A place, until it is dropped.
pub(super) struct Slot<'a> {
    slots: &'a Slots,
    ticket: u64,
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let mut queue = self.slots.lock();
        let Some(at) = queue.holders.iter().position(|holder| holder.ticket == self.ticket) else { return };
        let holder = queue.holders.swap_remove(at);
        if holder.is_stuck {
            proto::info!("{} is waited for no more: it has answered, or it is gone", holder.disk);
        } else {
            queue.free += 1;
        }
        self.slots.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT_ONCE: Duration = Duration::ZERO;

    fn disk(number: usize) -> Option<String> {
        Some(format!("sd{number} (0:0:0:{number})"))
    }

    #[test]
    fn a_place_that_stays_taken_is_waited_for_no_longer_than_said() {
        let slots = Slots::new(1);
        let held = slots.take("sda (0:0:0:1)".into()).unwrap();
        let Err(Cause::Crowded { by, .. }) = slots.take_within(AT_ONCE, Duration::MAX, disk(2)) else { panic!() };
        assert_eq!(by, "sda (0:0:0:1)", "who holds the places is named");
        drop(held);
        drop(slots.take_within(AT_ONCE, Duration::MAX, disk(2)).unwrap());
    }

    #[test]
    fn the_place_of_a_disk_that_does_not_answer_goes_to_another() {
        let slots = Slots::new(1);
        let stuck = slots.take_within(AT_ONCE, AT_ONCE, disk(1)).unwrap();
        // Two of them: as many as there are places, and more.
        let second = slots.take_within(AT_ONCE, AT_ONCE, disk(2)).unwrap();
        let sound = slots.take_within(AT_ONCE, AT_ONCE, disk(3)).unwrap();
        assert_eq!(slots.lock().stuck(), 2);
        drop(stuck);
        drop(second);
        let seen = |slots: &Slots| {
            let queue = slots.lock();
            (queue.free, queue.stuck(), queue.holders.len())
        };
        assert_eq!(seen(&slots), (0, 0, 1), "one that was given away does not come twice");
        drop(sound);
        assert_eq!(seen(&slots), (1, 0, 0));
    }

    #[test]
    fn no_more_threads_than_said_wait_for_disks_without_a_place() {
        let slots = Slots::new(1);
        let taken: Vec<_> = (0..=MAX_STUCK).map(|number| slots.take_within(AT_ONCE, AT_ONCE, disk(number)).unwrap()).collect();
        let Err(Cause::Crowded { by, .. }) = slots.take_within(AT_ONCE, AT_ONCE, disk(99)) else { panic!() };
        assert!(by.contains("sd0 (0:0:0:0)") && by.contains("sd16 ("), "{by}");
        drop(taken);
        drop(slots.take_within(AT_ONCE, AT_ONCE, disk(99)).unwrap());
    }

    #[test]
    fn one_that_works_for_long_keeps_its_place() {
        let (slots, file) = (Slots::new(1), crate::testing::Folder::new());
        let device = crate::sys::block::Device::of_file(&file.path().join("disk"));
        // Of two threads: each has its own pulse.
        let (limit, hour) = (Duration::from_millis(50), Duration::from_secs(3600));
        let asked = |stuck_after| {
            std::thread::scope(|scope| scope.spawn(|| slots.take_within(AT_ONCE, stuck_after, disk(2)).map(drop)).join().unwrap())
        };
        let rest = || {
            let begun = Instant::now();
            while begun.elapsed() <= limit {
                std::thread::park_timeout(limit);
            }
        };
        let working = slots.take_within(AT_ONCE, limit, disk(1)).unwrap();
        let alive: [fn(&crate::sys::block::Device); 4] = [
            |device| device.write_at(0, b"data").unwrap(),
            |device| device.read_at(0, &mut [0; 4]).unwrap(),
            |device| device.zero(0, 4096).unwrap(),
            |device| device.flush().unwrap(),
        ];
        let state = || {
            let queue = slots.lock();
            (queue.free, queue.stuck())
        };
        let idle = || slots.lock().holders[0].pulse.as_ref().unwrap().idle(limit).0;
        for (number, does) in alive.into_iter().enumerate() {
            rest();
            assert_eq!(slots.stuck_for(limit), 1, "seen without anybody who waits");
            let before = Instant::now();
            does(&device);
            let idle = idle();
            assert!(idle <= before.elapsed(), "{number}");
        }
        // A flush has more time.
        rest();
        crate::pulse::granted(hour);
        rest();
        assert!(asked(limit).is_err());
        crate::pulse::beat();
        rest();
        assert!(asked(limit).is_ok(), "one that does nothing for so long loses its place");
        assert_eq!(state(), (1, 1));
        // And has it again when its disk answers.
        crate::pulse::beat();
        assert!(asked(hour).is_err());
        assert_eq!(state(), (0, 0));
        drop(working);
        assert_eq!(slots.lock().free, 1);
        // Work that waits for no disk is never taken for stuck.
        let working = slots.take_to_work(AT_ONCE).unwrap();
        assert!(slots.take_within(AT_ONCE, AT_ONCE, disk(1)).is_err());
        drop(working);
    }

    #[test]
    fn places_are_given_in_the_order_in_which_they_were_asked_for() {
        let (slots, order) = (Slots::new(1), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            let held = slots.take_to_work(SLOT_DEADLINE).unwrap();
            for number in 0..4 {
                let (slots, order) = (&slots, &order);
                scope.spawn(move || {
                    let _place = slots.take_to_work(SLOT_DEADLINE).unwrap();
                    order.lock().unwrap().push(number);
                });
                slots.await_waiting(number + 1);
            }
            drop(held);
            // One who has just had it comes after those who wait.
            let _again = slots.take_to_work(SLOT_DEADLINE).unwrap();
            order.lock().unwrap().push(9);
        });
        assert_eq!(*order.lock().unwrap(), [0, 1, 2, 3, 9]);
    }
}
