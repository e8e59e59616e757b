//! Gives back what volumes do not use any more, in the background: one volume at a time, never as a part of a call.
//!
//! What is mounted is what the kernel says, as everywhere. Only a class's word against it (`discard: ignore`) is not to be seen there: it is kept
//! (`kept.rs`). Nothing depends on it: without it the kernel asks QEMU in vain, which drops what such a drive is asked.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::Node;
use super::health::UNASKED;
use super::kept::Kept;
use super::look::grown_as;
use super::mapping;
use crate::error::Cause;
use crate::identity;
use crate::kill;
use crate::metrics;
use crate::request::{Filesystem, Volume};
use crate::sys::scsi::{self, Disk};
use crate::sys::{self, Dev, block, mount};
use crate::trim;

/// What is kept, in the log.
const SPARED: &str = "volumes with discard=ignore";

/// For one piece of a volume: a slow storage takes seconds for it. After that the others go on without this one.
const PIECE_DEADLINE: Duration = Duration::from_secs(600);
/// Trims that may be left behind so, a thread each: where more storages do not answer, nothing is trimmed until one does.
const MAX_STUCK: usize = 4;

/// What the trimmer and the calls have to tell each other.
#[derive(Debug, Default)]
pub(super) struct Trimming {
    /// By serial: their class says `discard: ignore`.
    spared: Kept,
    /// The disks that are worked on: one, and those whose trims do not come to an end.
    now: Mutex<Vec<Arc<Trim>>>,
    /// One has done a piece, or has ended.
    moved: Condvar,
}

/// One volume's trim, shared between the thread that does it, the trimmer who waits for that, and calls that want the disk.
#[derive(Debug)]
struct Trim {
    disk: Dev,
    /// It is to end with the piece that is under way.
    end: AtomicBool,
    /// It has come to its end.
    is_over: AtomicBool,
    pieces: AtomicUsize,
    /// Nobody waits for it any more.
    is_left: AtomicBool,
}

/// A mounted filesystem of this driver's on a disk that takes discards.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    /// What it is called for good: its disk's serial, or else where it is mounted.
    pub(super) name: String,
    pub(super) disk: Dev,
    /// Of the filesystem.
    pub(super) dev: Dev,
    pub(super) point: PathBuf,
    size_bytes: u64,
    filesystem: Filesystem,
}

impl Trimming {
    /// With what an agent before this one has written down there.
    pub(super) fn kept_at(path: PathBuf) -> Self {
        Self { spared: Kept::at(path, SPARED), ..Self::default() }
    }
}

impl Node {
    /// Trims the volumes whose time lies between these moments, both since 1970, one after the other. Trouble is said in the log. One that does not
    /// come to an end is left to itself.
    pub fn trim_due(self: &Arc<Self>, from: Duration, to: Duration) {
        self.forget_unasked(UNASKED);
        let candidates = self.trim_candidates().unwrap_or_else(|cause| {
            proto::warn!("trim: {cause}");
            Vec::new()
        });
        let period = kill::limit("TRIM", trim::PERIOD);
        for candidate in candidates.into_iter().filter(|candidate| trim::is_due(&candidate.name, from, to, period)) {
            self.trim_aside(candidate);
        }
    }

    /// On a thread of its own, which is waited for as long as it does something.
    fn trim_aside(self: &Arc<Self>, candidate: Candidate) {
        let (name, at) = (candidate.name.clone(), candidate.point.display().to_string());
        let Some(trim) = self.begin_trim(candidate.disk) else {
            proto::warn!("trim {at}: put off: {MAX_STUCK} trims do not come to an end, or this volume's own does not");
            return;
        };
        let (node, of_thread) = (Arc::clone(self), Arc::clone(&trim));
        // The standard library's: the runtime would wait for it at the end.
        let thread = std::thread::Builder::new().name("trim".into()).spawn(move || {
            let _over = Over { node: &node, trim: &of_thread };
            node.trim_and_say(&candidate, &of_thread);
        });
        if let Err(cause) = thread {
            proto::warn!("trim {at}: no thread for it: {cause}");
            drop(Over { node: self, trim: &trim });
        }
        let deadline = kill::limit("TRIM_PIECE", PIECE_DEADLINE);
        let mut now = self.trimming();
        loop {
            let pieces = trim.pieces.load(Ordering::Relaxed);
            let waits = |_: &mut Vec<Arc<Trim>>| !trim.is_over.load(Ordering::Relaxed) && trim.pieces.load(Ordering::Relaxed) == pieces;
            let (still, waited) = self.trimming.moved.wait_timeout_while(now, deadline, waits).unwrap_or_else(PoisonError::into_inner);
            now = still;
            if trim.is_over.load(Ordering::Relaxed) {
                return;
            }
            if waited.timed_out() {
                trim.is_left.store(true, Ordering::Relaxed);
                metrics::STUCK_TRIMS.fetch_add(1, Ordering::Relaxed);
                metrics::STUCK_EVER.add();
                proto::warn!(
                    "trim {at}: the disk of {name} has not answered for {} s: the other volumes are trimmed without it; look at its storage on \
                     Proxmox",
                    deadline.as_secs()
                );
                return;
            }
        }
    }

    fn trim_and_say(&self, candidate: &Candidate, trim: &Trim) {
        let begun = Instant::now();
        let at = candidate.point.display();
        match self.trim(candidate, trim) {
            Ok(Some(bytes)) => proto::info!("trim {at}: {bytes} bytes in {} s", begun.elapsed().as_secs()),
            Ok(None) => proto::info!("trim {at}: ended early, the volume is unstaged or the agent ends"),
            Err(error) if matches!(error.errno, Errno::OPNOTSUPP | Errno::STALE | Errno::NOENT | Errno::INVAL) => {
                proto::debug!("trim {at}: {error}");
            }
            Err(error) => proto::warn!("trim {at}: {error}"),
        }
    }

    /// Each filesystem once, though it is mounted at several places.
    pub(super) fn trim_candidates(&self) -> Result<Vec<Candidate>, Cause> {
        let disks = scsi::scan(&self.sysfs)?;
        let mut found: Vec<Candidate> = Vec::new();
        for mount in self.mounts()? {
            let is_whole = mount.root == Path::new("/") && self.is_inside(&mount.point);
            let is_writable = !mount.read_only && !mount.filesystem_read_only && !mount.shut_down;
            let Some(filesystem) = grown_as(&mount.fstype) else { continue };
            if !is_whole || !is_writable || mount.dev.major == 0 || found.iter().any(|known| known.dev == mount.dev) {
                continue;
            }
            let Some(disk) = self.disk_below(mount.dev, &disks)? else { continue };
            if !identity::is_of_this_driver(disk) || disk.serial.as_deref().is_some_and(|serial| self.is_spared(serial)) {
                continue;
            }
            if scsi::takes_discards(&self.sysfs, mount.dev)? {
                let name = disk.serial.clone().unwrap_or_else(|| mount.point.display().to_string());
                found.push(Candidate { name, disk: disk.dev, dev: mount.dev, point: mount.point, size_bytes: disk.size_bytes, filesystem });
            }
        }
        Ok(found)
    }

    pub(super) fn disk_below<'a>(&self, dev: Dev, disks: &'a [Disk]) -> Result<Option<&'a Disk>, Cause> {
        if let Some(disk) = disks.iter().find(|disk| disk.dev == dev) {
            return Ok(Some(disk));
        }
        let below = self.mapping_at(dev)?.as_ref().and_then(mapping::backing);
        Ok(disks.iter().find(|disk| Some(disk.dev) == below))
    }

    /// Bytes given back, as the kernel counts them; `None`: it was ended early.
    fn trim(&self, candidate: &Candidate, trim: &Trim) -> Result<Option<u64>, sys::Error> {
        // By a mount of its own that is nowhere to be seen: the staged one can be taken away meanwhile, and unstage then waits for the disk's release.
        // Only now, and given back before what is said above: who wants the disk finds out who holds it.
        let folder = mount::unseen(&candidate.point, mount::Leads::Into(candidate.dev))?;
        proto::debug!("trim {}: begins", candidate.point.display());
        let group_bytes = match candidate.filesystem {
            Filesystem::Ext4 => 0,
            Filesystem::Xfs => {
                let geometry = block::xfs_geometry_of(&folder, &candidate.point)?;
                u64::from(geometry.group_blocks).saturating_mul(geometry.block_size.into())
            }
        };
        let usual = trim::piece_bytes(candidate.size_bytes);
        let (mut at, mut bytes, mut piece) = (0_u64, 0_u64, usual);
        while at < candidate.size_bytes {
            if trim.end.load(Ordering::Relaxed) || self.stop.is_requested() {
                return Ok(None);
            }
            match block::trim(&folder, &candidate.point, at, piece) {
                Ok(given) => {
                    bytes = bytes.saturating_add(given);
                    at = at.saturating_add(piece);
                    if group_bytes > 0 && (given > piece || piece != usual) {
                        piece = trim::whole_groups(at, usual, group_bytes);
                    }
                }
                // The filesystem is smaller than its disk.
                Err(error) if error.errno == Errno::INVAL && at > 0 => break,
                Err(error) => return Err(error),
            }
            trim.pieces.fetch_add(1, Ordering::Relaxed);
            drop(self.trimming());
            self.trimming.moved.notify_all();
        }
        Ok(Some(bytes))
    }

    fn trimming(&self) -> MutexGuard<'_, Vec<Arc<Trim>>> {
        self.trimming.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None`: it is trimmed already, or too many do not come to an end.
    fn begin_trim(&self, disk: Dev) -> Option<Arc<Trim>> {
        let mut now = self.trimming();
        if now.len() >= MAX_STUCK || now.iter().any(|trim| trim.disk == disk) {
            return None;
        }
        let trim = Arc::new(Trim {
            disk,
            end: AtomicBool::default(),
            is_over: AtomicBool::default(),
            pieces: AtomicUsize::default(),
            is_left: AtomicBool::default(),
        });
        now.push(Arc::clone(&trim));
        Some(trim)
    }

    /// The disk is wanted: whoever trims it ends with the piece that is under way, and lets go.
    pub(super) fn end_trim(&self, disk: Dev) {
        self.trimming().iter().filter(|trim| trim.disk == disk).for_each(|trim| trim.end.store(true, Ordering::Relaxed));
    }

    /// Whether this agent trims it now.
    pub(super) fn is_trimmed(&self, disk: Dev) -> bool {
        self.trimming().iter().any(|trim| trim.disk == disk)
    }

    /// What the volume's class says of it.
    pub(super) fn spare(&self, volume: &Volume, is_spared: bool) {
        self.trimming.spared.set(&volume.serial, is_spared, SPARED);
    }

    fn is_spared(&self, serial: &str) -> bool {
        self.trimming.spared.contains(serial)
    }
}

/// The thread's end, however it comes.
struct Over<'a> {
    node: &'a Node,
    trim: &'a Arc<Trim>,
}

impl Drop for Over<'_> {
    fn drop(&mut self) {
        let mut now = self.node.trimming();
        now.retain(|trim| !Arc::ptr_eq(trim, self.trim));
        self.trim.is_over.store(true, Ordering::Relaxed);
        if self.trim.is_left.load(Ordering::Relaxed) {
            metrics::STUCK_TRIMS.fetch_sub(1, Ordering::Relaxed);
        }
        self.node.trimming.moved.notify_all();
    }
}

#[cfg(test)]
mod tests;
