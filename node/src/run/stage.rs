//! Stage and unstage.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::io::Errno;

use super::look::{Room, is_empty_folder, not_named, usable};
use super::mapping::{self, Medium};
use super::publish::{make_folder, take_away};
use super::slots::SLOT_DEADLINE;
use super::{MAX_TURNS, Node, RELEASE_DEADLINE, failed, poll, progress};
use crate::error::{AtStep, Cause, Error};
use crate::format::{self, Ground};
use crate::identity::{self, Found};
use crate::kill;
use crate::label;
use crate::plan::{self, Growth, StageSeen, StageStep, Surface, UnstageSeen, UnstageStep};
use crate::probe;
use crate::request::{Access, Filesystem, FormatOptions, Passphrases, StageRequest, UnstageRequest, Zeroed};
use crate::sys::scsi::{self, Disk};
use crate::sys::{self, Dev, block, dm, mount, mountinfo};

/// What stage remembers between its turns: looks that cost much, and deeds that are tried once.
struct Memory {
    surface: Surface,
    /// Of the mapping.
    inside: Surface,
    mapping_grow_tried: bool,
    grow_tried: bool,
    /// Growing failed, was not required, and is left to NodeExpandVolume.
    grow_left: bool,
}

/// What unstage knows of what was mounted, remembered over its end, and over the end of a call that did not succeed.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// A legacy disk cannot be found again without it.
    disk: Option<Disk>,
    /// The UUID of the mapping that was mounted.
    mounted: Option<String>,
    /// It, where it holds all I/O back: an unmount would wait for ever.
    suspended: Option<dm::Mapping>,
    /// What is to be closed.
    mappings: Vec<dm::Mapping>,
    /// The disk was offline, and was asked to take I/O again.
    was_set_running: bool,
}

#[cfg(test)]
impl Known {
    pub(super) fn of(disk: Disk, was_set_running: bool) -> Self {
        Self { disk: Some(disk), was_set_running, ..Self::default() }
    }
}

/// What a turn of stage has seen, beside what the plan judges.
struct StageLook {
    seen: StageSeen,
    /// The disk, and the mapping over it where the volume is encrypted.
    medium: Option<Medium>,
    room: Option<Room>,
}

/// Until it is dropped, nobody else mounts that disk.
#[derive(Debug)]
pub(super) struct Alone<'a> {
    mounting: &'a Mutex<Vec<Dev>>,
    dev: Dev,
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.mounting.lock().unwrap_or_else(PoisonError::into_inner).retain(|dev| *dev != self.dev);
    }
}

/// Staging paths that are remembered: a VM has 29 slots, and each of them some history, which goes when there is no more room.
pub(super) const MAX_STAGED: usize = 256;
/// Volumes whose unstage has begun and not ended: a VM has 29 slots, and each of them some history.
const MAX_UNSTAGING: usize = 256;

impl Node {
    /// Finds the volume's disk, puts a filesystem on it if it is blank and may be formatted, mounts it.
    ///
    /// # Errors
    /// See [`Error`]; repeating the call goes on where it stopped.
    pub fn stage(&self, want: &StageRequest, passphrases: Option<&Passphrases>) -> Result<(), Error> {
        const DOING: &str = "stage";
        self.spare(&want.volume, !want.trims);
        let mut memory =
            Memory { surface: Surface::Unread, inside: Surface::Unread, mapping_grow_tried: false, grow_tried: false, grow_left: false };
        for _ in 0..MAX_TURNS {
            let look = self.look_stage(want, &memory).at(DOING, &want.volume, "look")?;
            let Some(step) = plan::next_stage_step(want, &look.seen).at(DOING, &want.volume, "")? else {
                self.remember_staged(want);
                return Ok(());
            };
            proto::debug!("{DOING} {}: {step:?}", want.volume);
            let name = match step {
                StageStep::Unmount => "unmount what is left at the staging path",
                StageStep::FindDisk => "find the disk",
                StageStep::SetRunning => "set the disk running",
                StageStep::Probe => "probe",
                StageStep::Encrypt { .. } => "make the LUKS volume",
                StageStep::Open => "open the LUKS volume",
                StageStep::CloseLeftover => "close what an earlier call left",
                StageStep::GrowMapping => "grow the mapping",
                StageStep::ProbeInside => "probe inside the LUKS volume",
                StageStep::MakeFilesystem { .. } => "make the filesystem",
                StageStep::Mount(_) => "mount",
                StageStep::Grow => "grow the filesystem",
            };
            progress::at(name);
            let deed = kill::step(DOING, &step);
            self.perform_stage(want, step, passphrases, &look, &mut memory).at(DOING, &want.volume, name)?;
            deed.done();
            progress::at("look");
        }
        Err(failed(DOING, &want.volume, "", Cause::NoEnd { turns: MAX_TURNS }))
    }

    fn look_stage(&self, want: &StageRequest, memory: &Memory) -> Result<StageLook, Cause> {
        let disks = scsi::scan(&self.sysfs)?;
        let real = self.real(&want.staging)?;
        let staged = self.look_staging(&want.volume, real.as_deref(), &disks)?;
        let (mut mount, mut room) = (staged.mount, None);
        if let (plan::Mount::Stranger(what), Some(other), Some(real)) = (&mount, staged.other, &real) {
            let ours = disks.iter().find(|disk| disk.serial.as_deref() == Some(&want.disk.serial));
            let ours = ours.map_or_else(|| "is not there".to_string(), |disk| format!("is {}", identity::name(disk)));
            let what = format!("{what}; this volume's own disk {ours}");
            mount = match self.staged_for_another(want) {
                Some(serial) => plan::Mount::Stranger(format!(
                    "{what}; this agent has staged the volume with the serial {serial} there: unstage that one first (kubelet gives each volume a \
                     path of its own)"
                )),
                None if self.is_unused_at(other, real)? => plan::Mount::Stale(what),
                None => plan::Mount::Stranger(format!("{what}; the other one is in use")),
            };
        }
        let mut medium = match staged.from {
            Some((medium, _)) if !identity::fits(&want.disk, &medium.disk) => {
                mount = plan::Mount::Stranger(not_named(&medium.disk, &want.disk));
                None
            }
            Some((medium, mounted)) => {
                room = self.look_room(&medium, &mounted)?;
                Some(medium)
            }
            None => match identity::find(&want.disk, &disks, &self.in_use(&want.access)?)? {
                Found::Disk(disk) => Some(Medium { disk: disk.clone(), mapping: None }),
                Found::NotYet(_) => None,
            },
        };
        let growth = match room {
            Some(_) if memory.grow_left => Growth::Tried,
            Some(room) => room.growth(memory.grow_tried),
            None => Growth::Full,
        };
        let (mut mapping, mut surface) = (plan::Mapping::None, memory.surface.clone());
        let disk = medium.as_ref().map_or(plan::Disk::NotYet, |medium| usable(&medium.disk));
        if let (Some(medium), plan::Disk::Ready { .. }) = (&mut medium, disk) {
            (mapping, medium.mapping) = self.look_mapping(want, medium)?;
            if want.encryption.is_none() && want.access == Access::Block && self.is_own_luks(&medium.disk)? {
                surface = Surface::Luks;
            }
        }
        if let (plan::Mapping::Open { short }, true) = (&mut mapping, memory.mapping_grow_tried) {
            *short = false;
        }
        let inside = memory.inside.clone();
        Ok(StageLook { seen: StageSeen { mount, disk, mapping, surface, inside, growth }, medium, room })
    }

    fn perform_stage(
        &self,
        want: &StageRequest,
        step: StageStep,
        passphrases: Option<&Passphrases>,
        look: &StageLook,
        memory: &mut Memory,
    ) -> Result<(), Cause> {
        let medium = || look.medium.as_ref().ok_or_else(|| Cause::OtherDiskNow { disk: "the disk".into() });
        let disk = || medium().map(|medium| &medium.disk);
        let secrets = || passphrases.ok_or(Cause::Refused(plan::Refusal::NoPassphrase));
        match step {
            StageStep::Unmount => self.unmount_left(want, &look.seen.mount),
            StageStep::FindDisk => self.await_disk(&want.disk).map(|_| ()),
            StageStep::SetRunning => self.set_running(disk()?),
            StageStep::Probe => {
                let _one_of_few = self.workers.take(identity::name(disk()?))?;
                let device = self.open_new(disk()?, block::Access::Shared)?;
                memory.surface = probe::probe(&device, &want.volume, want.zeroed)?;
                Ok(())
            }
            StageStep::Encrypt { unfinished } => {
                memory.surface = Surface::Unread;
                self.encrypt(want, disk()?, secrets()?, unfinished)
            }
            StageStep::Open => self.open_volume(want, disk()?, secrets()?),
            StageStep::CloseLeftover => {
                let left = medium()?.mapping.as_ref().ok_or_else(|| Cause::OtherDiskNow { disk: "the mapping".into() })?;
                self.close(left)
            }
            StageStep::GrowMapping => {
                memory.mapping_grow_tried = true;
                match self.grow_mapping(&want.volume, medium()?, passphrases) {
                    Err(cause) if !want.grow_required => {
                        proto::warn!("stage {}: the mapping stays smaller than its disk: {cause}", want.volume);
                        Ok(())
                    }
                    grown => grown,
                }
            }
            StageStep::ProbeInside => {
                let _one_of_few = self.workers.take(medium()?.name())?;
                let device = self.open_medium(medium()?, block::Access::Shared)?;
                // What is not written reads as noise here: nothing is promised but what was written at the format.
                memory.inside = probe::probe(&device, &want.volume, Zeroed::Unknown)?;
                Ok(())
            }
            StageStep::MakeFilesystem { options, unfinished } => {
                (memory.surface, memory.inside) = (Surface::Unread, Surface::Unread);
                self.make_filesystem(want, medium()?, options, unfinished)
            }
            StageStep::Mount(by) => {
                warn_of_another_kind(want, if want.encryption.is_some() { &memory.inside } else { &memory.surface });
                self.mount(want, medium()?, by)
            }
            StageStep::Grow => {
                let Some(room) = look.room else { return Ok(()) };
                if memory.grow_tried && want.grow_required {
                    return Err(room.not_grown());
                }
                let grown = if memory.grow_tried { Err(room.not_grown()) } else { self.grow(&want.staging, medium()?, room) };
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

    /// With `encrypt`, the only places that destroy anything. The surface is probed once more when nobody else can hold it.
    fn make_filesystem(&self, want: &StageRequest, medium: &Medium, options: FormatOptions, unfinished: bool) -> Result<(), Cause> {
        let _one_of_few = self.workers.take(medium.name())?;
        let device = self.open_medium(medium, block::Access::Exclusive)?;
        let expected = if unfinished { Surface::Unfinished } else { Surface::Blank };
        let (zeroed, topology) = match &medium.mapping {
            None => (want.zeroed, scsi::topology(&self.sysfs, &medium.disk)?),
            Some(mapping) => (Zeroed::Unknown, scsi::topology_of(&self.sysfs, mapping.dev)?),
        };
        let surface = probe::probe(&device, &want.volume, zeroed)?;
        if surface != expected {
            return Err(Cause::NotBlankAnyMore { surface: format!("{surface:?}") });
        }
        let ground = if zeroed == Zeroed::Yes && !unfinished { Ground::Zeros } else { Ground::Unknown };
        format::make(&device, &want.volume, options, &topology, ground, &self.stop)
    }

    fn mount(&self, want: &StageRequest, medium: &Medium, by: Filesystem) -> Result<(), Cause> {
        let Access::Filesystem(options) = &want.access else { return Ok(()) };
        let disk = &medium.disk;
        let options = if disk.read_only { options.clone().read_only() } else { options.clone() };
        let options = if by == Filesystem::Xfs { options.any_uuid() } else { options };
        let label = label::by_default(&self.look_machine()?, &options);
        let options = label.map_or(options.clone(), |label| options.with(label));
        make_folder(&want.staging)?;
        // Two volumes may claim one legacy disk (stale attachments). So it is mounted by one after the other, each after a look whether
        // another volume has come first.
        let is_legacy = disk.serial.as_deref() != Some(&want.disk.serial);
        let _alone = if is_legacy { Some(self.mount_alone(disk, SLOT_DEADLINE)?) } else { None };
        if is_legacy {
            match identity::find(&want.disk, &scsi::scan(&self.sysfs)?, &self.in_use(&want.access)?)? {
                Found::Disk(now) if now.dev == disk.dev => (),
                Found::Disk(_) | Found::NotYet(_) => return Err(Cause::OtherDiskNow { disk: identity::name(disk) }),
            }
        }
        // Held open, so that the name stays this disk's until the mount holds it.
        let _held = self.open_medium(medium, block::Access::Shared)?;
        let device = medium.kernel_name();
        mount::filesystem(by.name(), &self.source_of(medium)?, &device, &want.staging, &options).map_err(|refused| {
            let tool = if by == Filesystem::Xfs { "xfs_repair" } else { "e2fsck -f" };
            let node = if self.name.is_empty() { "NODE" } else { &self.name };
            match label {
                Some(label) if refused.is_about_the_label() => return Cause::Label { refused: Box::new(refused), label },
                Some(_) | None => (),
            }
            match refused.is_about_the_filesystem() {
                true => Cause::Damaged { refused: Box::new(refused), tool, device: device.as_str().into(), node: node.into() },
                false => Cause::Mount(refused),
            }
        })?;
        proto::info!("stage {}: mounted {} as {} at {}", want.volume, medium.name(), by.name(), want.staging.display());
        Ok(())
    }

    pub(super) fn remember_staged(&self, want: &StageRequest) {
        let mut staged = self.staged.lock().unwrap_or_else(PoisonError::into_inner);
        if staged.len() >= MAX_STAGED {
            match self.mounts() {
                // Where nothing is mounted any more, there is nothing to keep: pods that were taken from the node without an unstage.
                // A path that cannot be looked at is kept.
                Ok(mounts) => staged.retain(|at, _| match self.real(at) {
                    Ok(real) => real.is_some_and(|real| mountinfo::at(&mounts, &real).is_some()),
                    Err(_) => true,
                }),
                Err(error) => proto::warn!("{}: {error}", want.volume),
            }
        }
        if staged.len() < MAX_STAGED || staged.contains_key(&want.staging) {
            staged.insert(want.staging.clone(), want.volume.serial.clone());
        }
    }

    /// The serial of another volume that this agent has staged at that path. kubelet gives each volume a path of its own. A request that says
    /// otherwise takes nothing away from the one that is staged there.
    pub(super) fn staged_for_another(&self, want: &StageRequest) -> Option<String> {
        let staged = self.staged.lock().unwrap_or_else(PoisonError::into_inner);
        staged.get(&want.staging).filter(|serial| **serial != want.volume.serial).cloned()
    }

    /// Clears the staging path of what is not there any more, or is another disk's and unused: never from under anybody.
    fn unmount_left(&self, want: &StageRequest, mount: &plan::Mount) -> Result<(), Cause> {
        let plan::Mount::Stale(what) = mount else {
            return Ok(take_away(&want.volume, &want.staging, *mount == plan::Mount::Gone)?);
        };
        match mount::take_away(&want.staging) {
            Err(error) if error.errno == Errno::BUSY => {
                Err(plan::Refusal::OtherMount { what: format!("{what}; the other one is in use: umount2 answers EBUSY") }.into())
            }
            Err(error) => Err(error.into()),
            Ok(()) => {
                proto::warn!("stage {}: unmounted {}, which nothing used: {what}", want.volume, want.staging.display());
                Ok(())
            }
        }
    }

    /// The only one that mounts that disk, once nobody else does. Another disk's mount, which may never end, is not waited for.
    pub(super) fn mount_alone(&self, disk: &Disk, deadline: Duration) -> Result<Alone<'_>, Cause> {
        let mounting = || self.mounting.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = poll(deadline, || {
            let mut mounting = mounting();
            if mounting.contains(&disk.dev) {
                return Ok::<_, Cause>(Err(()));
            }
            mounting.push(disk.dev);
            Ok(Ok(Alone { mounting: &self.mounting, dev: disk.dev }))
        })?;
        taken.map_err(|()| Cause::BeingMounted { waited: deadline, disk: identity::name(disk) })
    }

    /// Takes the volume's mount at the staging path away, and answers only when the disk may be detached.
    ///
    /// # Errors
    /// See [`Error`]; repeating the call goes on where it stopped.
    pub fn unstage(&self, want: &UnstageRequest) -> Result<(), Error> {
        let left = || self.unstaging.lock().unwrap_or_else(PoisonError::into_inner);
        let mut known = left().remove(&want.volume.serial).unwrap_or_default();
        // Of this call: the disk may take I/O again by now.
        known.was_set_running = false;
        let done = self.unstage_on(want, &mut known);
        // A disk without serial is found by its mount alone: after the unmount, a repeated call would know of nothing that is still held.
        let is_found_again = known.disk.as_ref().is_some_and(|disk| disk.serial.as_deref() == Some(&want.volume.serial));
        if done.is_err() && !is_found_again && (known.disk.is_some() || known.mounted.is_some()) {
            let mut left = left();
            if left.len() < MAX_UNSTAGING {
                left.insert(want.volume.serial.clone(), known);
            }
        }
        if done.is_ok() {
            self.staged
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .retain(|at, serial| *at != want.staging || *serial != want.volume.serial);
            self.forget_health(&want.volume);
            self.spare(&want.volume, false);
            self.rotation_done(&want.volume);
        }
        done
    }

    fn unstage_on(&self, want: &UnstageRequest, known: &mut Known) -> Result<(), Error> {
        const DOING: &str = "unstage";
        let mut folder_stays = false;
        for _ in 0..MAX_TURNS {
            let mut seen = self.look_unstage(want, known).at(DOING, &want.volume, "look")?;
            seen.empty_folder &= !folder_stays;
            let Some(step) = plan::next_unstage_step(&seen).at(DOING, &want.volume, "")? else { return Ok(()) };
            proto::debug!("{DOING} {}: {step:?}", want.volume);
            if let Some(disk) = &known.disk {
                self.end_trim(disk.dev);
            }
            progress::at(match step {
                UnstageStep::SetRunning => "set the disk running",
                UnstageStep::Delete => "delete the disk",
                UnstageStep::Unmount => "unmount",
                UnstageStep::Close => "close the LUKS volume",
                UnstageStep::AwaitRelease => "wait for the disk's release",
                UnstageStep::RemoveFolder => "remove the folder",
            });
            let deed = kill::step(DOING, &step);
            match (step, &known.disk) {
                (UnstageStep::SetRunning, Some(disk)) => {
                    known.was_set_running = true;
                    match self.set_running(disk) {
                        Err(Cause::StaysOffline { disk }) => proto::warn!("{DOING} {}: {disk} stays offline", want.volume),
                        // The next look finds out.
                        Err(Cause::OtherDiskNow { .. }) => (),
                        done => done.at(DOING, &want.volume, "set the disk running")?,
                    }
                }
                (UnstageStep::Delete, Some(disk)) => {
                    kill::called("delete");
                    match scsi::delete(&self.sysfs, disk) {
                        Err(error) if scsi::is_gone(error.errno) => (),
                        done => done.at(DOING, &want.volume, "delete the disk")?,
                    }
                    proto::warn!(
                        "{DOING} {}: {} takes no I/O and nothing uses it: the kernel has forgotten it, and finds it anew where it is still attached",
                        want.volume,
                        identity::name(disk)
                    );
                }
                (UnstageStep::SetRunning | UnstageStep::Delete, None) => (),
                (UnstageStep::Unmount, _) => {
                    if let Some(mapping) = known.suspended.take() {
                        self.wake(&mapping).at(DOING, &want.volume, "resume the mapping")?;
                    }
                    let taken = take_away(&want.volume, &want.staging, seen.mount == plan::Mount::Gone);
                    taken.at(DOING, &want.volume, "unmount")?;
                }
                (UnstageStep::Close, _) => {
                    let disks = scsi::scan(&self.sysfs).at(DOING, &want.volume, "look")?;
                    for mapping in &known.mappings {
                        // Nothing reaches a disk that is gone.
                        if let Some(disk) = mapping::backing(mapping).and_then(|dev| disks.iter().find(|disk| disk.dev == dev)) {
                            let medium = Medium { disk: disk.clone(), mapping: Some(mapping.clone()) };
                            self.write_out(&medium).at(DOING, &want.volume, "write out")?;
                        }
                        self.close(mapping).at(DOING, &want.volume, "close the LUKS volume")?;
                    }
                }
                (UnstageStep::AwaitRelease, Some(disk)) => {
                    self.await_release(disk, &known.mappings).at(DOING, &want.volume, "wait for the disk's release")?
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
            deed.done();
            progress::at("look");
        }
        Err(failed(DOING, &want.volume, "", Cause::NoEnd { turns: MAX_TURNS }))
    }

    fn look_unstage(&self, want: &UnstageRequest, known: &mut Known) -> Result<UnstageSeen, Cause> {
        let disks = scsi::scan(&self.sysfs)?;
        let real = self.real(&want.staging)?;
        let staged = self.look_staging(&want.volume, real.as_deref(), &disks)?;
        let mounted = staged.from.as_ref().and_then(|(from, _)| from.mapping.as_ref()).or(staged.left.as_ref());
        known.suspended = mounted.filter(|mapping| mapping.is_suspended).cloned();
        if let Some((from, _)) = staged.from {
            known.disk = Some(from.disk);
            known.mounted = from.mapping.map(|mapping| mapping.uuid).or(known.mounted.take());
        } else if known.disk.is_none() {
            known.disk = disks.iter().find(|disk| disk.serial.as_deref() == Some(&want.volume.serial)).cloned();
        }
        known.mounted = staged.left.map(|mapping| mapping.uuid).or(known.mounted.take());
        let now = known.disk.as_ref().and_then(|known| disks.iter().find(|now| now.is(known)));
        let is_offline = now.is_some_and(|disk| disk.state == scsi::State::Offline);
        let (offline, dead) = (is_offline && !known.was_set_running, is_offline && known.was_set_running);
        let mut seen = UnstageSeen { mount: staged.mount, mapped: false, held: false, offline, dead, empty_folder: false };
        if seen.mount == plan::Mount::None {
            known.mappings = self.mappings_of(&want.volume, known.disk.as_ref(), known.mounted.as_deref())?;
            seen.mapped = !known.mappings.is_empty();
            if let (None, Some(mapping)) = (&known.disk, known.mappings.first()) {
                // A legacy disk is found again by what is open over it.
                known.disk = mapping::backing(mapping).and_then(|dev| disks.iter().find(|disk| disk.dev == dev)).cloned();
            }
            if let Some(disk) = &known.disk {
                seen.held = self.is_held(disk, &known.mappings)?.is_some();
                seen.mapped &= !seen.held;
            }
            // Only the folder itself: what is mounted on it may be a disk that answers no more.
            seen.empty_folder = real.as_deref().map_or(Ok(false), is_empty_folder)?;
        }
        Ok(seen)
    }

    /// Who is shown the disk or its mappings, or still has a filesystem of it mounted; `None`: nobody. The kernel refuses an exclusive open as
    /// long as a mount of it lives in any mount namespace, and a filesystem is written out only when its last mount goes. Who else holds a mapping
    /// is seen when it is closed.
    fn is_held(&self, disk: &Disk, mappings: &[dm::Mapping]) -> Result<Option<String>, Cause> {
        if !mappings.is_empty() {
            return self.mappings_shown_at(mappings);
        }
        match self.open(disk, block::Access::ExclusiveRead) {
            Ok(_) => match self.shown_at(&[disk.dev])? {
                Some(by) => Ok(Some(by)),
                // What a raw block volume's pod wrote may still be in the page cache: no unmount has written it out.
                None => self.write_out(&Medium::of(disk)).map(|()| None),
            },
            Err(Cause::OtherDiskNow { .. }) => Ok(None),
            Err(Cause::Sys(error)) if error.errno == Errno::BUSY => {
                if scsi::holders(&self.sysfs, &disk.name)?.is_empty() {
                    return self.mounted_by(disk).map(Some);
                }
                // LVM or md that the node has activated by itself holds the disk for ever, and is no use of it.
                match self.used_above(disk)? {
                    Some(by) => Ok(Some(by)),
                    None => self.write_out(&Medium::of(disk)).map(|()| None),
                }
            }
            // The disk is gone, or takes no I/O: nothing can be lost by detaching it.
            Err(Cause::Sys(error)) if matches!(error.errno, Errno::NXIO | Errno::NODEV | Errno::NOENT | Errno::NOMEDIUM) => Ok(None),
            Err(cause) => Err(cause),
        }
    }

    /// By whom a disk's filesystem is mounted that nobody may have.
    pub(super) fn mounted_by(&self, disk: &Disk) -> Result<String, Cause> {
        let at = self.mounted_devices()?.into_iter().find(|(dev, _)| *dev == disk.dev);
        Ok(match at {
            Some((_, at)) => format!("mounted at {}", at.display()),
            None if self.is_trimmed(disk.dev) => {
                "by this agent's own trim, which ends with the piece that the disk is at; repeat the call, and where it stays so, look at \
                 the disk's storage on Proxmox"
                    .to_string()
            }
            None => "mounted in another mount namespace (a container that has not ended)".to_string(),
        })
    }

    /// What was written to the disk itself or its mapping, not through a filesystem, reaches it. A disk that is gone has lost it.
    pub(super) fn write_out(&self, medium: &Medium) -> Result<(), Cause> {
        if medium.disk.read_only {
            return Ok(());
        }
        if let Some(mapping) = medium.mapping.as_ref().filter(|mapping| mapping.is_suspended) {
            self.wake(mapping)?;
        }
        match self.open_medium(medium, block::Access::Shared).and_then(|device| Ok(device.flush()?)) {
            Err(Cause::OtherDiskNow { .. }) => Ok(()),
            Err(Cause::Sys(error)) if matches!(error.errno, Errno::NXIO | Errno::NODEV | Errno::NOENT | Errno::NOMEDIUM) => Ok(()),
            // A mapping over a disk that stays offline can be opened, its flush fails each time (EIO on Linux 6.1), and it would be kept for ever.
            // A failed flush leaves nothing in memory for a second one; should the disk run again, `is_held` flushes it before unstage's OK.
            Err(Cause::Sys(error)) if error.errno == Errno::IO && self.is_offline(&medium.disk)? => Ok(()),
            done => done,
        }
    }

    fn is_offline(&self, disk: &Disk) -> Result<bool, sys::Error> {
        Ok(scsi::disk(&self.sysfs, disk.address)?.is_some_and(|now| now.is(disk) && now.state == scsi::State::Offline))
    }

    /// Whether a LUKS header that this driver made, for the volume or the one it is a copy of, is on its disk.
    pub(super) fn is_own_luks(&self, disk: &Disk) -> Result<bool, Cause> {
        Ok(probe::holds_own_luks(&self.open_new(disk, block::Access::Shared)?)?)
    }

    fn await_release(&self, disk: &Disk, mappings: &[dm::Mapping]) -> Result<(), Cause> {
        kill::inside("wait");
        let free = poll(RELEASE_DEADLINE, || Ok::<_, Cause>(self.is_held(disk, mappings)?.map_or(Ok(()), Err)))?;
        free.map_err(|by| Cause::StillHeld { waited: RELEASE_DEADLINE, disk: identity::name(disk), by })
    }
}

/// The reference driver says so too, and then fails to mount.
fn warn_of_another_kind(want: &StageRequest, surface: &Surface) {
    let found = match surface {
        Surface::Ext(kind) => kind.as_str(),
        Surface::Xfs => Filesystem::Xfs.name(),
        Surface::Unread | Surface::Blank | Surface::Unfinished | Surface::Luks | Surface::Other(_) => return,
    };
    if let Some(wanted) = want.fstype.filter(|wanted| *wanted != found) {
        proto::warn!("stage {}: {wanted} is asked for, {found} is on the disk: mounting what is there", want.volume);
    }
}
