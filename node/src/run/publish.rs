//! Publish and unpublish.

use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{MAX_TURNS, Node, failed, kill_point};
use crate::error::{AtStep, Cause, Error};
use crate::identity::{self, Found};
use crate::plan::{self, PublishSeen, PublishStep, Source, UnpublishStep};
use crate::request::{PublishRequest, PublishSource, UnpublishRequest};
use crate::sys::scsi::{self, Disk, State};
use crate::sys::{self, mount};

impl Node {
    /// Shows the volume at the target path.
    ///
    /// # Errors
    /// See [`Error`]; repeating the call goes on where it stopped.
    pub fn publish(&self, want: &PublishRequest) -> Result<(), Error> {
        const DOING: &str = "publish";
        for _ in 0..MAX_TURNS {
            let (seen, disk) = self.look_publish(want).at(DOING, &want.volume, "look")?;
            let Some(step) = plan::next_publish_step(want, &seen).at(DOING, &want.volume, "")? else { return Ok(()) };
            proto::debug!("{DOING} {}: {step:?}", want.volume);
            let name = match step {
                PublishStep::FindDisk => "find the disk",
                PublishStep::SetRunning => "set the disk running",
                PublishStep::MakeFolder | PublishStep::MakeFile => "make the target",
                PublishStep::Bind => "bind",
            };
            self.perform_publish(want, step, disk.as_ref()).at(DOING, &want.volume, name)?;
            if step == PublishStep::Bind {
                let mode = if want.read_only { "read-only" } else { "writable" };
                proto::info!("{DOING} {}: shown at {}, {mode}", want.volume, want.target.display());
            }
        }
        Err(failed(DOING, &want.volume, "", Cause::NoEnd { turns: MAX_TURNS }))
    }

    fn look_publish(&self, want: &PublishRequest) -> Result<(PublishSeen, Option<Disk>), Cause> {
        let disks = scsi::scan(&self.sysfs)?;
        let real = self.real(&want.target)?;
        let target = self.look_target(&want.volume, real.as_deref(), &disks)?;
        let (source, disk, staging) = match &want.source {
            PublishSource::Staging(staging) => {
                let staging = self.real(staging)?;
                let (mount, from) = self.look_staging(&want.volume, staging.as_deref(), &disks)?;
                (Source::Staged(mount), from.map(|(disk, _)| disk), staging)
            }
            PublishSource::Device(wanted) => {
                // A legacy disk that is published already shows up as "in use" only where a filesystem is on it.
                let (seen, disk) = match identity::find(wanted, &disks, &self.mounted_devices()?)? {
                    Found::NotYet(_) => (plan::Disk::NotYet, None),
                    Found::Disk(disk) if disk.state == State::Running => {
                        (plan::Disk::Ready { read_only: disk.read_only }, Some(disk.clone()))
                    }
                    Found::Disk(disk) => (plan::Disk::Offline, Some(disk.clone())),
                };
                (Source::Device(seen), disk, None)
            }
        };
        let not: Vec<&Path> = real.iter().chain(&staging).map(PathBuf::as_path).collect();
        let other_targets = match &disk {
            Some(disk) if want.single_target => self.look_other_targets(disk, &not)?,
            _ => Vec::new(),
        };
        Ok((PublishSeen { source, target, other_targets }, disk))
    }

    fn perform_publish(&self, want: &PublishRequest, step: PublishStep, disk: Option<&Disk>) -> Result<(), Cause> {
        kill_point("publish", &format!("{step:?}"));
        let gone = || Cause::OtherDiskNow { disk: "the disk".into() };
        match (step, &want.source) {
            (PublishStep::FindDisk, PublishSource::Device(wanted)) => self.await_disk(wanted).map(|_| ()),
            (PublishStep::SetRunning, _) => self.set_running(disk.ok_or_else(gone)?),
            (PublishStep::MakeFolder, _) => Ok(make_folder(&want.target)?),
            (PublishStep::MakeFile, _) => Ok(make_file(&want.target)?),
            (PublishStep::Bind, PublishSource::Staging(staging)) => Ok(mount::bind(staging, &want.target, want.read_only)?),
            (PublishStep::Bind, PublishSource::Device(_)) => {
                let disk = disk.ok_or_else(gone)?;
                // Held open, so that the name stays this disk's until the bind is done.
                let device = self.open(disk, sys::block::Access::Shared)?;
                Ok(mount::bind(device.path(), &want.target, want.read_only)?)
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
                self.look_target(&want.volume, real.as_deref(), &scsi::scan(&self.sysfs)?)
            };
            let seen = looked().at(DOING, &want.volume, "look")?;
            let Some(step) = plan::next_unpublish_step(&seen).at(DOING, &want.volume, "")? else { return Ok(()) };
            proto::debug!("{DOING} {}: {step:?}", want.volume);
            kill_point(DOING, &format!("{step:?}"));
            let target = &want.target;
            match step {
                UnpublishStep::Unmount => {
                    mount::take_away(target).at(DOING, &want.volume, "unmount")?;
                    proto::info!("{DOING} {}: unmounted {}", want.volume, target.display());
                }
                UnpublishStep::RemoveFolder => {
                    std::fs::remove_dir(target).map_err(sys::Error::io("rmdir", target)).at(DOING, &want.volume, "remove the target")?;
                }
                UnpublishStep::RemoveFile => {
                    std::fs::remove_file(target).map_err(sys::Error::io("unlink", target)).at(DOING, &want.volume, "remove the target")?;
                }
            }
        }
        Err(failed(DOING, &want.volume, "", Cause::NoEnd { turns: MAX_TURNS }))
    }
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
