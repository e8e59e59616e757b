//! Stage and unstage.

use std::path::PathBuf;

use rustix::io::Errno;

use super::expand::grow;
use super::look::{Room, is_empty_folder, not_named, usable};
use super::publish::make_folder;
use super::{MAX_TURNS, Node, RELEASE_DEADLINE, failed, poll};
use crate::error::{AtStep, Cause, Error};
use crate::format::{self, Ground};
use crate::identity::{self, Found};
use crate::plan::{self, Growth, StageSeen, StageStep, Surface, UnstageSeen, UnstageStep};
use crate::probe;
use crate::request::{Access, Filesystem, FormatOptions, StageRequest, UnstageRequest, Zeroed};
use crate::sys::scsi::{self, Disk};
use crate::sys::{self, block, mount};

/// What stage remembers between its turns: looks that cost much, and deeds that are tried once.
struct Memory {
    surface: Surface,
    grow_tried: bool,
    /// Growing failed, was not required, and is left to NodeExpandVolume.
    grow_left: bool,
}

/// What a turn of stage has seen, beside what the plan judges.
struct StageLook {
    seen: StageSeen,
    disk: Option<Disk>,
    room: Option<Room>,
}

impl Node {
    /// Finds the volume's disk, puts a filesystem on it if it is blank and may be formatted, mounts it.
    ///
    /// # Errors
    /// See [`Error`]; repeating the call goes on where it stopped.
    pub fn stage(&self, want: &StageRequest) -> Result<(), Error> {
        const DOING: &str = "stage";
        let mut memory = Memory { surface: Surface::Unread, grow_tried: false, grow_left: false };
        for _ in 0..MAX_TURNS {
            let look = self.look_stage(want, &memory).at(DOING, &want.volume, "look")?;
            let Some(step) = plan::next_stage_step(want, &look.seen).at(DOING, &want.volume, "")? else { return Ok(()) };
            proto::debug!("{DOING} {}: {step:?}", want.volume);
            let name = match step {
                StageStep::FindDisk => "find the disk",
                StageStep::SetRunning => "set the disk running",
                StageStep::Probe => "probe",
                StageStep::MakeFilesystem { .. } => "make the filesystem",
                StageStep::Mount(_) => "mount",
                StageStep::Grow => "grow the filesystem",
            };
            self.perform_stage(want, step, &look, &mut memory).at(DOING, &want.volume, name)?;
        }
        Err(failed(DOING, &want.volume, "", Cause::NoEnd { turns: MAX_TURNS }))
    }

    fn look_stage(&self, want: &StageRequest, memory: &Memory) -> Result<StageLook, Cause> {
        let disks = scsi::scan(&self.sysfs)?;
        let real = self.real(&want.staging)?;
        let (mut mount, from) = self.look_staging(&want.volume, real.as_deref(), &disks)?;
        let mut room = None;
        let disk = match &from {
            Some((disk, _)) if !identity::fits(&want.disk, disk) => {
                mount = plan::Mount::Stranger(not_named(disk, &want.disk));
                None
            }
            Some((disk, mounted)) => {
                room = self.look_room(disk, mounted)?;
                Some(disk.clone())
            }
            None => match identity::find(&want.disk, &disks, &self.in_use(&want.access)?)? {
                Found::Disk(disk) => Some(disk.clone()),
                Found::NotYet(_) => None,
            },
        };
        let growth = match room {
            Some(_) if memory.grow_left => Growth::Tried,
            Some(room) => room.growth(memory.grow_tried),
            None => Growth::Full,
        };
        let seen_disk = disk.as_ref().map_or(plan::Disk::NotYet, usable);
        Ok(StageLook { seen: StageSeen { mount, disk: seen_disk, surface: memory.surface.clone(), growth }, disk, room })
    }

    fn perform_stage(&self, want: &StageRequest, step: StageStep, look: &StageLook, memory: &mut Memory) -> Result<(), Cause> {
        kill_point("stage", &format!("{step:?}"));
        let disk = || look.disk.as_ref().ok_or_else(|| Cause::OtherDiskNow { disk: "the disk".into() });
        match step {
            StageStep::FindDisk => self.await_disk(&want.disk).map(|_| ()),
            StageStep::SetRunning => self.set_running(disk()?),
            StageStep::Probe => {
                let _one_of_few = self.workers.take()?;
                let device = self.open_new(disk()?, block::Access::Shared)?;
                memory.surface = probe::probe(&device, &want.volume, want.zeroed)?;
                Ok(())
            }
            StageStep::MakeFilesystem { options, unfinished } => {
                memory.surface = Surface::Unread;
                self.make_filesystem(want, disk()?, options, unfinished)
            }
            StageStep::Mount(by) => {
                warn_of_another_kind(want, &memory.surface);
                self.mount(want, disk()?, by)
            }
            StageStep::Grow => {
                let Some(room) = look.room else { return Ok(()) };
                if memory.grow_tried && want.grow_required {
                    return Err(room.not_grown());
                }
                let grown = if memory.grow_tried { Err(room.not_grown()) } else { grow(&want.staging, disk()?, room) };
                memory.grow_tried = true;
                match grown {
                    Err(cause) if !want.grow_required => {
                        // A pod starts on a filesystem that is too small sooner than not at all; NodeExpandVolume will say it.
                        proto::warn!("stage {}: the filesystem stays smaller than its disk: {cause}", want.volume);
                        memory.grow_left = true;
                        Ok(())
                    }
                    grown => grown,
                }
            }
        }
    }

    /// The only place that destroys anything. The disk is probed once more when nobody else can hold it.
    fn make_filesystem(&self, want: &StageRequest, disk: &Disk, options: FormatOptions, unfinished: bool) -> Result<(), Cause> {
        let _one_of_few = self.workers.take()?;
        let device = self.open(disk, block::Access::Exclusive)?;
        let expected = if unfinished { Surface::Unfinished } else { Surface::Blank };
        let surface = probe::probe(&device, &want.volume, want.zeroed)?;
        if surface != expected {
            return Err(Cause::NotBlankAnyMore { surface: format!("{surface:?}") });
        }
        let ground = if want.zeroed == Zeroed::Yes && !unfinished { Ground::Zeros } else { Ground::Unknown };
        format::make(&device, &want.volume, options, &scsi::topology(&self.sysfs, disk)?, ground, &self.stop)
    }

    fn mount(&self, want: &StageRequest, disk: &Disk, by: Filesystem) -> Result<(), Cause> {
        let Access::Filesystem(options) = &want.access else { return Ok(()) };
        let options = if disk.read_only { options.clone().read_only() } else { options.clone() };
        let options = if by == Filesystem::Xfs { options.any_uuid() } else { options };
        make_folder(&want.staging)?;
        // Two volumes may claim one legacy disk (stale attachments). So those are mounted one after the other, each after a
        // look whether another volume has come first.
        let is_legacy = disk.serial.as_deref() != Some(&want.disk.serial);
        let _alone = if is_legacy { Some(self.legacy_mounts.take()?) } else { None };
        if is_legacy {
            match identity::find(&want.disk, &scsi::scan(&self.sysfs)?, &self.in_use(&want.access)?)? {
                Found::Disk(now) if now.dev == disk.dev => (),
                Found::Disk(_) | Found::NotYet(_) => return Err(Cause::OtherDiskNow { disk: identity::name(disk) }),
            }
        }
        // Held open, so that the name stays this disk's until the mount holds it.
        let device = self.open(disk, block::Access::Shared)?;
        mount::filesystem(by.name(), device.path(), &want.staging, &options)?;
        proto::info!("stage {}: mounted {} as {} at {}", want.volume, identity::name(disk), by.name(), want.staging.display());
        Ok(())
    }

    /// Takes the volume's mount at the staging path away, and answers only when the disk may be detached.
    ///
    /// # Errors
    /// See [`Error`]; repeating the call goes on where it stopped.
    pub fn unstage(&self, want: &UnstageRequest) -> Result<(), Error> {
        const DOING: &str = "unstage";
        let mut disk = None;
        let mut folder_stays = false;
        for _ in 0..MAX_TURNS {
            let mut seen = self.look_unstage(want, &mut disk).at(DOING, &want.volume, "look")?;
            seen.empty_folder &= !folder_stays;
            let Some(step) = plan::next_unstage_step(&seen).at(DOING, &want.volume, "")? else { return Ok(()) };
            proto::debug!("{DOING} {}: {step:?}", want.volume);
            kill_point(DOING, &format!("{step:?}"));
            match (step, &disk) {
                (UnstageStep::Unmount, _) => {
                    mount::take_away(&want.staging).at(DOING, &want.volume, "unmount")?;
                    proto::info!("{DOING} {}: unmounted {}", want.volume, want.staging.display());
                }
                (UnstageStep::AwaitRelease, Some(disk)) => {
                    self.await_release(disk).at(DOING, &want.volume, "wait for the disk's release")?
                }
                (UnstageStep::AwaitRelease, None) => (),
                (UnstageStep::RemoveFolder, _) => {
                    // kubelet's, and kubelet removes it too: one that stays harms nobody.
                    if let Err(cause) = std::fs::remove_dir(&want.staging).map_err(sys::Error::io("rmdir", &want.staging)) {
                        proto::warn!("{DOING} {}: {cause}", want.volume);
                    }
                    folder_stays = true;
                }
            }
        }
        Err(failed(DOING, &want.volume, "", Cause::NoEnd { turns: MAX_TURNS }))
    }

    /// `disk`: the one behind the mount, remembered over its end, since a legacy disk cannot be found again without it.
    fn look_unstage(&self, want: &UnstageRequest, disk: &mut Option<Disk>) -> Result<UnstageSeen, Cause> {
        let disks = scsi::scan(&self.sysfs)?;
        let real = self.real(&want.staging)?;
        let (mount, from) = self.look_staging(&want.volume, real.as_deref(), &disks)?;
        if let Some((from, _)) = from {
            *disk = Some(from);
        } else if disk.is_none() {
            *disk = disks.into_iter().find(|disk| disk.serial.as_deref() == Some(&want.volume.serial));
        }
        let held = match (&mount, disk) {
            (plan::Mount::None, Some(disk)) => self.is_held(disk)?.is_some(),
            _ => false,
        };
        let empty_folder = real.as_deref().map_or(Ok(false), is_empty_folder)?;
        Ok(UnstageSeen { mount, held, empty_folder })
    }

    /// Who still has a filesystem of the disk mounted; `None`: nobody. The kernel refuses an exclusive open as long as a
    /// mount of it lives in any mount namespace, and a filesystem is written out only when its last mount goes.
    fn is_held(&self, disk: &Disk) -> Result<Option<String>, Cause> {
        match self.open(disk, block::Access::ExclusiveRead) {
            // What a raw block volume's pod wrote may still be in the page cache: no unmount has written it out.
            Ok(_) => self.write_out(disk).map(|()| None),
            Err(Cause::OtherDiskNow { .. }) => Ok(None),
            Err(Cause::Sys(error)) if error.errno == Errno::BUSY => {
                let holders = scsi::holders(&self.sysfs, &disk.name)?;
                if !holders.is_empty() {
                    // The guest's own LVM or md sits on what a raw block volume holds: no data of a pod is in it.
                    proto::warn!("{} is held by {}", identity::name(disk), holders.join(", "));
                    return self.write_out(disk).map(|()| None);
                }
                let at: Vec<PathBuf> = self.mounted_devices()?.into_iter().filter(|(dev, _)| *dev == disk.dev).map(|(_, at)| at).collect();
                Ok(Some(match at.first() {
                    Some(at) => format!("mounted at {}", at.display()),
                    None => "mounted in another mount namespace (a container that has not ended)".to_string(),
                }))
            }
            // The disk is gone, or takes no I/O: nothing can be lost by detaching it.
            Err(Cause::Sys(error)) if matches!(error.errno, Errno::NXIO | Errno::NODEV | Errno::NOENT | Errno::NOMEDIUM) => Ok(None),
            Err(cause) => Err(cause),
        }
    }

    /// What was written to the disk itself, not through a filesystem, reaches it. A disk that is gone has lost it.
    pub(super) fn write_out(&self, disk: &Disk) -> Result<(), Cause> {
        if disk.read_only {
            return Ok(());
        }
        match self.open(disk, block::Access::Shared).and_then(|device| Ok(device.flush()?)) {
            Err(Cause::OtherDiskNow { .. }) => Ok(()),
            Err(Cause::Sys(error)) if matches!(error.errno, Errno::NXIO | Errno::NODEV | Errno::NOENT | Errno::NOMEDIUM) => Ok(()),
            done => done,
        }
    }

    fn await_release(&self, disk: &Disk) -> Result<(), Cause> {
        let free = poll(RELEASE_DEADLINE, || Ok::<_, Cause>(self.is_held(disk)?.map_or(Ok(()), Err)))?;
        free.map_err(|by| Cause::StillHeld { waited: RELEASE_DEADLINE, disk: identity::name(disk), by })
    }
}

/// The reference driver says so too, and then fails to mount.
fn warn_of_another_kind(want: &StageRequest, surface: &Surface) {
    let found = match surface {
        Surface::Ext(kind) => kind.as_str(),
        Surface::Xfs => Filesystem::Xfs.name(),
        Surface::Unread | Surface::Blank | Surface::Unfinished | Surface::Other(_) => return,
    };
    if let Some(wanted) = want.fstype.filter(|wanted| *wanted != found) {
        proto::warn!("stage {}: {wanted} is asked for, {found} is on the disk: mounting what is there", want.volume);
    }
}

/// For the crash tests (feature `kill-points`): dies before the step that `PROXMOX_CSI_KILL_AT` names, as in
/// `stage:Mount`. In a release it is nothing.
pub fn kill_point(doing: &str, step: &str) {
    #[cfg(feature = "kill-points")]
    if std::env::var("PROXMOX_CSI_KILL_AT").is_ok_and(|at| format!("{doing}:{step}").starts_with(&at)) {
        eprintln!("killed at {doing}:{step}");
        std::process::abort();
    }
    #[cfg(not(feature = "kill-points"))]
    let _ = (doing, step);
}
