//! Gives back what volumes do not use any more, in the background: one volume at a time, never as a part of a call.
//!
//! What is mounted is what the kernel says, as everywhere. Only a class's word against it (`discard: ignore`) is not to be seen here after the agent
//! was started anew: then the kernel asks QEMU in vain, which drops what such a drive is asked.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::Node;
use super::look::grown_as;
use super::mapping;
use crate::error::Cause;
use crate::identity;
use crate::kill;
use crate::request::Volume;
use crate::sys::scsi::{self, Disk};
use crate::sys::{self, Dev, block, mount};
use crate::trim;

/// Volumes of which it is remembered that they are not to be trimmed: as many as may be staged, and some history.
const MAX_SPARED: usize = 256;

/// What the trimmer and the calls have to tell each other.
#[derive(Debug, Default)]
pub(super) struct Trimming {
    /// By serial: their class says `discard: ignore`.
    spared: Mutex<Vec<String>>,
    /// The disk that is worked on, and the way to end that.
    now: Mutex<Option<(Dev, Arc<AtomicBool>)>>,
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
}

impl Node {
    /// Trims the volumes whose time lies between these moments, both since 1970. Trouble is said in the log.
    pub fn trim_due(&self, from: Duration, to: Duration) {
        let candidates = self.trim_candidates().unwrap_or_else(|cause| {
            proto::warn!("trim: {cause}");
            Vec::new()
        });
        for candidate in candidates.iter().filter(|candidate| trim::is_due(&candidate.name, from, to, kill::limit("TRIM", trim::PERIOD))) {
            let begun = Instant::now();
            let at = candidate.point.display();
            match self.trim(candidate) {
                Ok(Some(bytes)) => proto::info!("trim {at}: {bytes} bytes in {} s", begun.elapsed().as_secs()),
                Ok(None) => proto::info!("trim {at}: ended early, the volume is unstaged or the agent ends"),
                Err(error) if matches!(error.errno, Errno::OPNOTSUPP | Errno::STALE | Errno::NOENT | Errno::INVAL) => {
                    proto::debug!("trim {at}: {error}");
                }
                Err(error) => proto::warn!("trim {at}: {error}"),
            }
        }
    }

    /// Each filesystem once, though it is mounted at several places.
    pub(super) fn trim_candidates(&self) -> Result<Vec<Candidate>, Cause> {
        let disks = scsi::scan(&self.sysfs)?;
        let mut found: Vec<Candidate> = Vec::new();
        for mount in self.mounts()? {
            let is_whole = mount.root == Path::new("/") && self.is_inside(&mount.point);
            let is_writable = !mount.read_only && !mount.filesystem_read_only && !mount.shut_down;
            if !is_whole
                || !is_writable
                || mount.dev.major == 0
                || grown_as(&mount.fstype).is_none()
                || found.iter().any(|known| known.dev == mount.dev)
            {
                continue;
            }
            let Some(disk) = self.disk_below(mount.dev, &disks)? else { continue };
            if !identity::is_of_this_driver(disk) || disk.serial.as_deref().is_some_and(|serial| self.is_spared(serial)) {
                continue;
            }
            if scsi::takes_discards(&self.sysfs, mount.dev)? {
                let name = disk.serial.clone().unwrap_or_else(|| mount.point.display().to_string());
                found.push(Candidate { name, disk: disk.dev, dev: mount.dev, point: mount.point, size_bytes: disk.size_bytes });
            }
        }
        Ok(found)
    }

    fn disk_below<'a>(&self, dev: Dev, disks: &'a [Disk]) -> Result<Option<&'a Disk>, Cause> {
        if let Some(disk) = disks.iter().find(|disk| disk.dev == dev) {
            return Ok(Some(disk));
        }
        let below = self.mapping_at(dev)?.as_ref().and_then(mapping::backing);
        Ok(disks.iter().find(|disk| Some(disk.dev) == below))
    }

    /// Bytes given back, as the kernel counts them; `None`: it was ended early.
    fn trim(&self, candidate: &Candidate) -> Result<Option<u64>, sys::Error> {
        let end = Arc::new(AtomicBool::new(false));
        let mut now = self.trimming.now.lock().unwrap_or_else(PoisonError::into_inner);
        *now = Some((candidate.disk, Arc::clone(&end)));
        drop(now);
        let _cleared = Cleared(&self.trimming);
        // By a mount of its own that is nowhere to be seen: the staged one can be taken away meanwhile, and unstage then waits for the disk's release.
        // Only now, and given back before what is said above: who wants the disk finds out who holds it.
        let folder = mount::unseen(&candidate.point, mount::Leads::Into(candidate.dev))?;
        proto::debug!("trim {}: begins", candidate.point.display());
        let piece = trim::piece_bytes(candidate.size_bytes);
        let (mut at, mut bytes) = (0_u64, 0_u64);
        while at < candidate.size_bytes {
            if end.load(Ordering::Relaxed) || self.stop.is_requested() {
                return Ok(None);
            }
            match block::trim(&folder, &candidate.point, at, piece) {
                Ok(given) => bytes = bytes.saturating_add(given),
                // The filesystem is smaller than its disk.
                Err(error) if error.errno == Errno::INVAL && at > 0 => break,
                Err(error) => return Err(error),
            }
            at = at.saturating_add(piece);
        }
        Ok(Some(bytes))
    }

    /// The disk is wanted: whoever trims it ends with the piece that is under way, and lets go.
    pub(super) fn end_trim(&self, disk: Dev) {
        let now = self.trimming.now.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, end)) = now.as_ref().filter(|(trimmed, _)| *trimmed == disk) {
            end.store(true, Ordering::Relaxed);
        }
    }

    /// Whether this agent trims it now.
    pub(super) fn is_trimmed(&self, disk: Dev) -> bool {
        self.trimming.now.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(|(trimmed, _)| *trimmed == disk)
    }

    #[cfg(test)]
    pub(super) fn begin_trim(&self, disk: Dev) {
        *self.trimming.now.lock().unwrap() = Some((disk, Arc::default()));
    }

    /// What the volume's class says of it.
    pub(super) fn spare(&self, volume: &Volume, is_spared: bool) {
        let mut spared = self.trimming.spared.lock().unwrap_or_else(PoisonError::into_inner);
        spared.retain(|serial| *serial != volume.serial);
        if is_spared && spared.len() < MAX_SPARED {
            spared.push(volume.serial.clone());
        }
    }

    fn is_spared(&self, serial: &str) -> bool {
        self.trimming.spared.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|spared| spared == serial)
    }
}

struct Cleared<'a>(&'a Trimming);

impl Drop for Cleared<'_> {
    fn drop(&mut self) {
        *self.0.now.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
