//! NodeGetVolumeStats: how full a volume is, and how well it is.

use std::path::Path;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::Node;
use super::look::ShownAt;
use super::mapping::Medium;
use crate::error::{AtStep, Cause, Error};
use crate::health::{self, Commands, Seen};
use crate::metrics;
use crate::plan;
use crate::request::{StatsRequest, Volume};
use crate::sys::{self, block, mountinfo, scsi};

/// Volumes whose health is remembered, so that a change is said once: a VM has 29 slots, and each of them some history.
const MAX_KNOWN: usize = 256;

/// kubelet asks once a minute.
pub(super) const UNASKED: Duration = Duration::from_secs(1800);

/// What NodeGetVolumeStats tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stats {
    /// How full it is.
    pub usage: Usage,
    /// What is wrong with it, in a sentence.
    pub trouble: Option<String>,
}

/// How full a volume is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Total, used and available bytes.
    pub bytes: [u64; 3],
    /// Total, used and available inodes; none on a raw block device.
    pub inodes: Option<[u64; 3]>,
}

/// What was seen of a volume before.
#[derive(Debug)]
pub(super) struct Known {
    serial: String,
    commands: Option<Commands>,
    trouble: Option<String>,
    /// kubelet has asked.
    looked: Instant,
}

impl Node {
    /// How full the volume at that path is, and how well. Trouble is said in the log once.
    ///
    /// # Errors
    /// The path does not show this volume.
    pub fn stats(&self, want: &StatsRequest) -> Result<Stats, Error> {
        const DOING: &str = "stats";
        let (usage, what, device, seen) = match self.look_shown(&want.volume, &want.path).at(DOING, &want.volume, "look")? {
            ShownAt::Nothing(what) => return Err(plan::Refusal::NotPublishedHere { what }).at(DOING, &want.volume, ""),
            ShownAt::Gone(source) => (Usage::default(), "disk".into(), source, Seen { gone: true, ..Seen::default() }),
            ShownAt::Device(medium) => {
                let seen = self.look_disk(&want.volume, &medium).at(DOING, &want.volume, "look")?;
                (Usage { bytes: [medium.size_bytes(), 0, 0], inodes: None }, "disk".into(), medium.name(), seen)
            }
            ShownAt::Filesystem(medium, mount) => {
                let mut seen = self.look_filesystem(&want.volume, &medium, &mount).at(DOING, &want.volume, "look")?;
                let usage = match usage(&want.path, medium.dev()) {
                    Ok(usage) => usage,
                    // xfs that has shut itself down answers so (xfs_vn_getattr), ext4 in some ways to ask.
                    Err(error) if error.errno == Errno::IO => {
                        seen.shut_down = true;
                        Usage::default()
                    }
                    Err(error) => return Err(error).at(DOING, &want.volume, "statfs"),
                };
                (usage, mount.fstype, medium.name(), seen)
            }
        };
        let trouble = health::judge(&seen).map(|trouble| trouble.sentence(&what, &device));
        self.remember(&want.volume, trouble.clone());
        Ok(Stats { usage, trouble })
    }

    /// Of the disk below.
    fn look_disk(&self, volume: &Volume, medium: &Medium) -> Result<Seen, Cause> {
        let disk = &medium.disk;
        let failed = scsi::failed_commands(&self.sysfs, disk.address)?;
        let now = since_start();
        let mut known = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        let failed_commands = match (failed, entry(&mut known, volume)) {
            (Some(failed), Some(known)) => known.commands.get_or_insert(Commands::begin(disk.dev, failed, now)).look(disk.dev, failed, now),
            _ => 0,
        };
        Ok(Seen { offline: disk.state == scsi::State::Offline, failed_commands, ..Seen::default() })
    }

    /// With the filesystem on it.
    fn look_filesystem(&self, volume: &Volume, medium: &Medium, shown: &mountinfo::Mount) -> Result<Seen, Cause> {
        let made_read_only = self.is_made_read_only(medium, shown)?;
        let ext4_errors = self.ext4_errors(medium);
        Ok(Seen { shut_down: shown.shut_down, made_read_only, ext4_errors, ..self.look_disk(volume, medium)? })
    }

    /// By the kernel's count; one that cannot be read is said to be unknown, and is no trouble by itself.
    fn ext4_errors(&self, medium: &Medium) -> u64 {
        block::ext4_errors(&self.sysfs, &medium.kernel_name()).unwrap_or_else(|unknown| {
            proto::warn!("{}: how many errors its filesystem has is unknown: {unknown}", medium.name());
            0
        })
    }

    /// Whether the kernel has made the filesystem read-only; not so where that was asked for, or the disk refuses writes.
    fn is_made_read_only(&self, medium: &Medium, shown: &mountinfo::Mount) -> Result<bool, Cause> {
        // A bind for a pod that only reads is read-only of itself; the staged mount tells.
        let is_writable = |mount: &mountinfo::Mount| mount.dev == shown.dev && !mount.read_only;
        Ok(shown.filesystem_read_only && !medium.disk.read_only && self.mounts()?.iter().any(is_writable))
    }

    /// A filesystem that the kernel has made read-only cannot be grown: OK would mean that the pod has the room.
    pub(super) fn refuse_made_read_only(&self, medium: &Medium, shown: &mountinfo::Mount) -> Result<(), Cause> {
        if !self.is_made_read_only(medium, shown)? {
            return Ok(());
        }
        let ext4_errors = self.ext4_errors(medium);
        let seen = Seen { shut_down: shown.shut_down, made_read_only: true, ext4_errors, ..Seen::default() };
        health::judge(&seen).map_or(Ok(()), |trouble| Err(Cause::MadeReadOnly(trouble.sentence(&shown.fstype, &medium.name()))))
    }

    /// Says a change once.
    fn remember(&self, volume: &Volume, trouble: Option<String>) {
        let mut known = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(of_volume) = entry(&mut known, volume) else { return };
        of_volume.looked = Instant::now();
        match (&of_volume.trouble, &trouble) {
            (before, Some(sentence)) if before.as_ref() != Some(sentence) => {
                proto::warn!("{volume}: {sentence}");
                if before.is_none() {
                    metrics::FILESYSTEM_ERRORS.add();
                }
            }
            (Some(_), None) => proto::info!("{volume}: no trouble is seen any more"),
            _ => return,
        }
        of_volume.trouble = trouble;
        count(&known);
    }

    /// The volume is unstaged: what comes next is another life of it.
    pub(super) fn forget_health(&self, volume: &Volume) {
        let mut known = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|known| known.serial != volume.serial);
        count(&known);
    }
}

impl Node {
    /// Of volumes that kubelet has not asked about for so long nothing is known any more: they have left this node without an unstage.
    pub(super) fn forget_unasked(&self, since: Duration) {
        let mut known = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|known| known.looked.elapsed() < since);
        count(&known);
    }
}

/// `None`: too many are known already.
fn entry<'a>(known: &'a mut Vec<Known>, volume: &Volume) -> Option<&'a mut Known> {
    if known.len() < MAX_KNOWN && !known.iter().any(|known| known.serial == volume.serial) {
        known.push(Known { serial: volume.serial.clone(), commands: None, trouble: None, looked: Instant::now() });
    }
    known.iter_mut().find(|known| known.serial == volume.serial)
}

fn count(known: &[Known]) {
    metrics::IN_TROUBLE.store(known.iter().filter(|known| known.trouble.is_some()).count(), Ordering::Relaxed);
}

fn usage(path: &Path, dev: sys::Dev) -> Result<Usage, sys::Error> {
    let seen = sys::mount::usage(path, dev)?;
    let bytes = |blocks: u64| blocks.saturating_mul(seen.f_frsize);
    Ok(Usage {
        bytes: [bytes(seen.f_blocks), bytes(seen.f_blocks.saturating_sub(seen.f_bfree)), bytes(seen.f_bavail)],
        inodes: Some([seen.f_files, seen.f_files.saturating_sub(seen.f_ffree), seen.f_favail]),
    })
}

/// A clock that only goes on.
fn since_start() -> Duration {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Bench, HANDLE};
    use super::*;
    use crate::testing::volume;

    /// One that left this node without an unstage is in nobody's trouble.
    #[test]
    fn a_volume_that_kubelet_asks_about_no_more_is_forgotten() {
        let node = Bench::new(&[]).node;
        node.remember(&volume(HANDLE), Some("the ext4 on sdb is ill".into()));
        node.forget_unasked(UNASKED);
        assert_eq!(node.health.lock().unwrap().len(), 1);
        node.forget_unasked(Duration::ZERO);
        assert!(node.health.lock().unwrap().is_empty());
    }

    /// As other tests tell of their own nodes in the same process: so many as no other has, and looked at until they are seen.
    #[test]
    fn what_is_in_trouble_is_counted() {
        const VOLUMES: usize = 5;
        const LOOKS: usize = 1000;
        let node = Bench::new(&[]).node;
        let errors = metrics::FILESYSTEM_ERRORS.value();
        let is_told = |count: usize, sentence: &dyn Fn(usize) -> Option<String>| {
            (0..LOOKS).any(|look| {
                (0..VOLUMES).for_each(|number| node.remember(&volume(&format!("r/z/s/vm-9999-pvc-ill-{number}")), sentence(look)));
                metrics::IN_TROUBLE.load(Ordering::Relaxed) == count
            })
        };
        assert!(is_told(VOLUMES, &|look| Some(format!("the ext4 on sdb is ill in a way {look}"))));
        assert!(metrics::FILESYSTEM_ERRORS.value() >= errors + VOLUMES as u64, "each that falls ill");
        node.forget_unasked(Duration::ZERO);
        assert!(is_told(0, &|look| (look % 2 == 0).then(|| "ill".to_string())), "those that are well again");
    }
}
