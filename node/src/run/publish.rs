//! Publish and unpublish.

use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::look::{ShownAt, not_named, rdev, usable};
use super::mapping::Medium;
use super::{MAX_TURNS, Node, failed, progress};
use crate::error::{AtStep, Cause, Error};
use crate::identity::{self, Found};
use crate::kill;
use crate::plan::{self, PublishSeen, PublishStep, Source, Target, UnpublishStep};
use crate::request::{PublishRequest, PublishSource, StagedAt, UnpublishRequest, Volume};
use crate::sys::scsi;
use crate::sys::{self, mount};

impl Node {
    /// Shows the volume at the target path.
    ///
    /// # Errors
    /// See [`Error`]; repeating the call goes on where it stopped.
    pub fn publish(&self, want: &PublishRequest) -> Result<(), Error> {
        const DOING: &str = "publish";
        for _ in 0..MAX_TURNS {
            let (seen, medium) = self.look_publish(want).at(DOING, &want.volume, "look")?;
            let Some(step) = plan::next_publish_step(want, &seen).at(DOING, &want.volume, "")? else { return Ok(()) };
            proto::debug!("{DOING} {}: {step:?}", want.volume);
            let name = match step {
                PublishStep::FindDisk => "find the disk",
                PublishStep::SetRunning => "set the disk running",
                PublishStep::MakeFolder | PublishStep::MakeFile => "make the target",
                PublishStep::Unmount => "unmount",
                PublishStep::Bind => "bind",
            };
            progress::at(name);
            let deed = kill::step(DOING, &step);
            self.perform_publish(want, step, medium.as_ref()).at(DOING, &want.volume, name)?;
            deed.done();
            progress::at("look");
            if step == PublishStep::Bind {
                let mode = if want.read_only { "read-only" } else { "writable" };
                proto::info!("{DOING} {}: shown at {}, {mode}", want.volume, want.target.display());
            }
        }
        Err(failed(DOING, &want.volume, "", Cause::NoEnd { turns: MAX_TURNS }))
    }

    fn look_publish(&self, want: &PublishRequest) -> Result<(PublishSeen, Option<Medium>), Cause> {
        let disks = scsi::scan(&self.sysfs)?;
        let real = self.real(&want.target)?;
        let (mut source, medium, staging, is_source_read_only) = match &want.source {
            PublishSource::Staging(StagedAt { path, disk }) => {
                let staging = self.real(path)?;
                let staged = self.look_staging(&want.volume, staging.as_deref(), &disks)?;
                let is_read_only = staged.from.as_ref().is_some_and(|(_, mounted)| mounted.read_only);
                // A disk without serial could be this volume's, and be another's all the same: as stage, show none that is not named.
                let (mount, medium) = match staged.from {
                    Some((medium, _)) if !identity::fits(disk, &medium.disk) => {
                        (plan::Mount::Stranger(not_named(&medium.disk, disk)), None)
                    }
                    from => (staged.mount, from.map(|(medium, _)| medium)),
                };
                (Source::Staged(mount), medium, staging, is_read_only)
            }
            PublishSource::Device(wanted) => {
                // A legacy disk that is published already shows up as "in use" only where a filesystem is on it.
                let medium = match identity::find(wanted, &disks, &self.mounted_devices()?)? {
                    Found::NotYet(_) => None,
                    // What stage has opened over it is shown, and never what is below that.
                    Found::Disk(disk) => Some(Medium { mapping: self.open_mapping(&want.volume, disk)?, disk: disk.clone() }),
                };
                let source = Source::Device(medium.as_ref().map_or(plan::Disk::NotYet, |medium| usable(&medium.disk)));
                (source, medium, None, false)
            }
        };
        let target = self.look_target(&want.volume, real.as_deref(), &disks, rdev, |shown| match (&want.source, &medium) {
            // An encrypted volume's disk itself is never what is to be shown.
            (PublishSource::Device(wanted), Some(medium)) => identity::fits(wanted, &shown.disk) && shown.dev() == medium.dev(),
            (PublishSource::Device(wanted), None) => identity::fits(wanted, &shown.disk),
            (PublishSource::Staging(_), Some(staged)) => shown.dev() == staged.dev(),
            (PublishSource::Staging(StagedAt { disk, .. }), None) => identity::fits(disk, &shown.disk),
        })?;
        if let (Source::Device(plan::Disk::Ready { .. }), Some(medium), Target::Absent | Target::File | Target::Stale) =
            (&source, &medium, &target)
            && medium.mapping.is_none()
            && self.is_own_luks(&medium.disk)?
        {
            source = Source::NotOpen;
        }
        let not: Vec<&Path> = real.iter().chain(&staging).map(PathBuf::as_path).collect();
        let other_targets = match &medium {
            Some(medium) if want.single_target => self.look_other_targets(medium, &not)?,
            _ => Vec::new(),
        };
        Ok((PublishSeen { source, is_source_read_only, target, other_targets }, medium))
    }

    fn perform_publish(&self, want: &PublishRequest, step: PublishStep, medium: Option<&Medium>) -> Result<(), Cause> {
        let gone = || Cause::OtherDiskNow { disk: "the disk".into() };
        match (step, &want.source) {
            (PublishStep::FindDisk, PublishSource::Device(wanted)) => self.await_disk(wanted).map(|_| ()),
            (PublishStep::SetRunning, _) => self.set_running(&medium.ok_or_else(gone)?.disk),
            (PublishStep::MakeFolder, _) => Ok(make_folder(&want.target)?),
            (PublishStep::MakeFile, _) => Ok(make_file(&want.target)?),
            (PublishStep::Unmount, _) => Ok(mount::take_away(&want.target)?),
            (PublishStep::Bind, PublishSource::Staging(staged)) => {
                let leads = mount::Leads::Into(medium.ok_or_else(gone)?.dev());
                Ok(mount::bind(&staged.path, leads, &want.target, want.read_only)?)
            }
            (PublishStep::Bind, PublishSource::Device(_)) => {
                let medium = medium.ok_or_else(gone)?;
                // Held open, so that the name stays this disk's until the bind is done.
                let device = self.open_medium(medium, sys::block::Access::Shared)?;
                Ok(mount::bind(device.path(), mount::Leads::To(medium.dev()), &want.target, want.read_only)?)
            }
            // The plan asks for the disk of a device source only.
            (PublishStep::FindDisk, PublishSource::Staging(_)) => Err(gone()),
        }
    }

    /// Takes the volume away from the target path and removes it.
    ///
    /// # Errors
    /// See [`Error`]; repeating the call goes on where it stopped.
    pub fn unpublish(&self, want: &UnpublishRequest) -> Result<(), Error> {
        const DOING: &str = "unpublish";
        for _ in 0..MAX_TURNS {
            let looked = || -> Result<_, Cause> {
                let real = self.real(&want.target)?;
                self.look_target(&want.volume, real.as_deref(), &scsi::scan(&self.sysfs)?, rdev, |_| true)
            };
            let seen = looked().at(DOING, &want.volume, "look")?;
            let Some(step) = plan::next_unpublish_step(&seen).at(DOING, &want.volume, "")? else { return Ok(()) };
            proto::debug!("{DOING} {}: {step:?}", want.volume);
            progress::at("take the target away");
            let deed = kill::step(DOING, &step);
            let target = &want.target;
            match step {
                UnpublishStep::Unmount => {
                    // Unstage cannot find a legacy disk again that only a device node shows.
                    if let ShownAt::Device(medium) = self.look_shown(&want.volume, target).at(DOING, &want.volume, "look")? {
                        self.write_out(&medium).at(DOING, &want.volume, "write out")?;
                    }
                    take_away(&want.volume, target, seen == Target::ShowsGone).at(DOING, &want.volume, "unmount")?;
                }
                UnpublishStep::RemoveFolder => {
                    std::fs::remove_dir(target).map_err(sys::Error::io("rmdir", target)).at(DOING, &want.volume, "remove the target")?;
                }
                UnpublishStep::RemoveFile => {
                    std::fs::remove_file(target).map_err(sys::Error::io("unlink", target)).at(DOING, &want.volume, "remove the target")?;
                }
            }
            deed.done();
            progress::at("look");
        }
        Err(failed(DOING, &want.volume, "", Cause::NoEnd { turns: MAX_TURNS }))
    }
}

/// Takes the newest mount away, also from those who still use it where its disk is gone.
pub(super) fn take_away(volume: &Volume, at: &Path, is_gone: bool) -> Result<(), sys::Error> {
    let is_used = if is_gone { mount::take_gone_away(at)? } else { mount::take_away(at).map(|()| false)? };
    if is_used {
        proto::warn!(
            "{volume}: unmounted {} under those who still use it: its disk is gone, and with it what was not written",
            at.display()
        );
    } else {
        proto::info!("{volume}: unmounted {}", at.display());
    }
    Ok(())
}

/// With the folders above it, as the reference driver and kubelet make them: 0750.
pub(super) fn make_folder(path: &Path) -> Result<(), sys::Error> {
    std::fs::DirBuilder::new().recursive(true).mode(0o750).create(path).map_err(sys::Error::io("mkdir", path))
}

fn make_file(path: &Path) -> Result<(), sys::Error> {
    if let Some(folder) = path.parent() {
        make_folder(folder)?;
    }
    let made = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o640).open(path);
    made.map(|_| ()).map_err(sys::Error::io("create", path))
}
