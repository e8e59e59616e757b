//! Expand: the disk's new size seen by the kernel, then the filesystem grown while it is mounted.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::look::{Room, ShownAt, grown_as};
use super::mapping::{self, Medium};
use super::{MAX_TURNS, Node, SIZE_DEADLINE, SIZE_RESCAN_EVERY, failed, poll, progress};
use crate::error::{AtStep, Cause, Error};
use crate::identity;
use crate::kill;
use crate::plan::{self, ExpandSeen, ExpandStep, Growth, Shown};
use crate::request::{ExpandRequest, Filesystem, Passphrases};
use crate::sys::scsi::{self, Disk};
use crate::sys::{Dev, block, mount, mountinfo};

impl Node {
    /// Grows the volume that is shown at the path; answers the disk's size in bytes.
    ///
    /// # Errors
    /// See [`Error`]; repeating the call goes on where it stopped.
    pub fn expand(&self, want: &ExpandRequest, passphrases: Option<&Passphrases>) -> Result<u64, Error> {
        const DOING: &str = "expand";
        let mut tried = None;
        for _ in 0..MAX_TURNS {
            let (seen, medium, room) = self.look_expand(want, tried.is_some()).at(DOING, &want.volume, "look")?;
            let step = plan::next_expand_step(want, &seen).at(DOING, &want.volume, "")?;
            let (Some(step), Some(medium)) = (step, medium) else { return Ok(seen.size_bytes) };
            proto::debug!("{DOING} {}: {step:?}", want.volume);
            progress::at("grow");
            let deed = kill::step(DOING, &step);
            match (step, room) {
                (ExpandStep::AwaitSize { required_bytes }, _) => {
                    self.await_size(&medium.disk, required_bytes).at(DOING, &want.volume, "wait for the disk's new size")?;
                }
                (ExpandStep::GrowMapping, _) => {
                    self.grow_mapping(&want.volume, &medium, passphrases).at(DOING, &want.volume, "grow the mapping")?;
                }
                // Not so where the disk has grown once more meanwhile.
                (ExpandStep::Grow, Some(room)) if tried == Some(room.wanted_blocks) => {
                    return Err(failed(DOING, &want.volume, "grow the filesystem", room.not_grown()));
                }
                (ExpandStep::Grow, Some(room)) => {
                    let point = self.writable_point(&medium, &want.path).at(DOING, &want.volume, "look")?;
                    grow(&point, medium.dev(), room).at(DOING, &want.volume, "grow the filesystem")?;
                    tried = Some(room.wanted_blocks);
                }
                (ExpandStep::Grow, None) => return Ok(seen.size_bytes),
            }
            deed.done();
            progress::at("look");
        }
        Err(failed(DOING, &want.volume, "", Cause::NoEnd { turns: MAX_TURNS }))
    }

    fn look_expand(&self, want: &ExpandRequest, tried: bool) -> Result<(ExpandSeen, Option<Medium>, Option<Room>), Cause> {
        Ok(match self.look_shown(&want.volume, &want.path)? {
            ShownAt::Nothing(what) => (ExpandSeen { shown: Shown::NotOurs(what), size_bytes: 0, short: false }, None, None),
            ShownAt::Gone(_) => {
                (ExpandSeen { shown: Shown::NotOurs("its disk is no longer there".into()), size_bytes: 0, short: false }, None, None)
            }
            ShownAt::Device(medium) => (
                ExpandSeen { shown: Shown::Device, size_bytes: medium.disk.size_bytes, short: self.is_short(&medium)? },
                Some(medium),
                None,
            ),
            // OK would mean that the pod has the room.
            ShownAt::Filesystem(_, mount) if grown_as(&mount.fstype).is_none() => {
                return Err(plan::Refusal::NoGrowing { fstype: mount.fstype }.into());
            }
            ShownAt::Filesystem(medium, mount) => {
                self.refuse_made_read_only(&medium, &mount)?;
                let room = self.look_room(&medium, &mount)?;
                let shown = Shown::Filesystem(room.map_or(Growth::Full, |room| room.growth(tried)));
                (ExpandSeen { shown, size_bytes: medium.disk.size_bytes, short: self.is_short(&medium)? }, Some(medium), room)
            }
        })
    }

    /// Whether the disk has more room than its mapping takes.
    fn is_short(&self, medium: &Medium) -> Result<bool, Cause> {
        let Some(mapping) = &medium.mapping else { return Ok(false) };
        Ok(mapping.length_sectors() < mapping::length(&self.luks_header(&medium.disk)?, &medium.disk)?)
    }

    /// Where the filesystem can be asked to grow: a read-only bind of it refuses (EROFS), though the filesystem is writable.
    pub(super) fn writable_point(&self, medium: &Medium, shown: &Path) -> Result<PathBuf, Cause> {
        let real = self.real(shown)?;
        let mounts = self.mounts()?;
        let is_read_only = real.as_deref().and_then(|real| mountinfo::at(&mounts, real)).is_some_and(|mount| mount.read_only);
        let another = |mount: &&mountinfo::Mount| mount.dev == medium.dev() && !mount.read_only && self.is_inside(&mount.point);
        let instead = if is_read_only { mounts.iter().find(another) } else { None };
        Ok(instead.map_or_else(|| shown.to_path_buf(), |mount| mount.point.clone()))
    }

    /// Until the kernel knows the disk to be so large.
    pub(super) fn await_size(&self, disk: &Disk, required_bytes: u64) -> Result<(), Cause> {
        let mut size_bytes = disk.size_bytes;
        let mut asked: Option<Instant> = None;
        let seen = poll(SIZE_DEADLINE, || {
            let Some(now) = scsi::disk(&self.sysfs, disk.address)?.filter(|now| (now.dev, &now.serial) == (disk.dev, &disk.serial)) else {
                return Err(Cause::OtherDiskNow { disk: identity::name(disk) });
            };
            size_bytes = now.size_bytes;
            if size_bytes >= required_bytes {
                return Ok(Ok(()));
            }
            if asked.is_none_or(|asked| asked.elapsed() >= SIZE_RESCAN_EVERY) {
                scsi::rescan_size(&self.sysfs, disk.address)?;
                asked = Some(Instant::now());
            }
            Ok(Err(String::new()))
        })?;
        seen.map_err(|_| Cause::SizeNotSeen { waited: SIZE_DEADLINE, size_bytes, required_bytes })
    }
}

/// Grows the filesystem that is mounted at `point` to its disk.
pub(super) fn grow(point: &Path, dev: Dev, room: Room) -> Result<(), Cause> {
    match room.filesystem {
        Filesystem::Ext4 => {
            if room.noinit_itable {
                // The kernel zeroes them in the background then, as it does by default.
                mount::add_option(point, dev, "init_itable")?;
                proto::info!("{}: noinit_itable taken back: growing would zero all new inode tables at once", point.display());
            }
            block::ext4_grow(point, dev, room.wanted_blocks)?;
        }
        Filesystem::Xfs => block::xfs_grow(point, dev, room.wanted_blocks)?,
    }
    proto::info!("{}: grown from {} to {} blocks of {} bytes", point.display(), room.blocks, room.wanted_blocks, room.block_size);
    Ok(())
}

impl Room {
    pub(super) fn not_grown(&self) -> Cause {
        Cause::NotGrown { blocks: self.blocks, wanted_blocks: self.wanted_blocks, block_size: self.block_size }
    }
}
