//! Each walk starts from every state there is and lets a toy world do what the plan says: it must end, soon, staged or
//! refused, and nothing may be destroyed that was not proven blank.

use super::*;
use crate::identity::Want;
use crate::request::{Encryption, Volume, Zeroed};
use crate::sys::mount::Options;

/// More turns than any honest way through needs: find the disk, set it running, close what is left, probe, encrypt, probe, open,
/// probe inside, make the filesystem, probe inside, mount, grow.
const MAX_TURNS: usize = 13;

fn volume() -> Volume {
    let handle: proto::VolumeHandle = "r/z/s/vm-9999-pvc-1".parse().unwrap();
    Volume { serial: handle.serial(), handle }
}

fn disk() -> Want {
    Want { serial: volume().serial, serial_promised: true, wwid: None, lun: Some(1), size_bytes: None }
}

fn stage_wants() -> Vec<StageRequest> {
    let mut wants = Vec::new();
    let encrypted = Encryption { kdf: disk::luks::Kdf::DEFAULT, discards: false };
    for access in [Access::Block, Access::Filesystem(Options::default())] {
        for format in [Format::May(FormatOptions::default()), Format::Never("static".into())] {
            for encryption in [None, Some(encrypted.clone())] {
                for grow_required in [false, true] {
                    wants.push(StageRequest {
                        volume: volume(),
                        staging: "/s".into(),
                        access: access.clone(),
                        fstype: None,
                        disk: disk(),
                        encryption: encryption.clone(),
                        format: format.clone(),
                        zeroed: Zeroed::Yes,
                        grow_required,
                        trims: true,
                    });
                }
            }
        }
    }
    wants
}

fn mounts() -> Vec<Mount> {
    vec![Mount::None, Mount::Ours, Mount::Gone, Mount::Stranger("tmpfs".into())]
}

fn disks() -> Vec<Disk> {
    vec![Disk::NotYet, Disk::Offline, Disk::Ready { read_only: false }, Disk::Ready { read_only: true }]
}

fn mappings() -> Vec<Mapping> {
    let open = |short| Mapping::Open { short };
    vec![Mapping::None, open(false), open(true), Mapping::Leftover, Mapping::Strange("other options".into())]
}

/// What is really on the toy's disk, or inside its mapping; a format that is cut short leaves `Unfinished`.
fn surfaces() -> Vec<Surface> {
    vec![Surface::Blank, Surface::Unfinished, Surface::Ext("ext3".into()), Surface::Xfs, Surface::Luks, Surface::Other("btrfs".into())]
}

/// The toy: what stage sees, and what is really there.
#[derive(Debug, Clone)]
struct World {
    seen: StageSeen,
    on_disk: Surface,
    inside: Surface,
    /// The next formats so many are cut short.
    cuts: usize,
    formats: usize,
}

impl World {
    fn formatted(&mut self, done: Surface) -> Surface {
        self.formats += 1;
        (self.seen.surface, self.seen.inside) = (Surface::Unread, Surface::Unread);
        match self.cuts.checked_sub(1) {
            Some(left) => {
                self.cuts = left;
                Surface::Unfinished
            }
            None => done,
        }
    }

    fn do_step(&mut self, want: &StageRequest, step: StageStep) {
        let open = Mapping::Open { short: false };
        let is_encrypted = want.encryption.is_some();
        // Where a filesystem of this volume may lie: inside the mapping of an encrypted one, on the disk of a plain one.
        let is_in_its_place = self.seen.mapping == if is_encrypted { open.clone() } else { Mapping::None };
        match step {
            StageStep::FindDisk => self.seen.disk = Disk::Offline,
            StageStep::SetRunning => self.seen.disk = Disk::Ready { read_only: false },
            StageStep::Probe => self.seen.surface = self.on_disk.clone(),
            StageStep::Encrypt { unfinished } => {
                assert!(is_encrypted && self.seen.mapping == Mapping::None, "{self:?}");
                assert_eq!(self.on_disk, if unfinished { Surface::Unfinished } else { Surface::Blank }, "destroyed what was not blank");
                self.on_disk = self.formatted(Surface::Luks);
                self.inside = Surface::Blank;
            }
            StageStep::Open => {
                assert!(is_encrypted && self.seen.mapping == Mapping::None && self.on_disk == Surface::Luks, "{self:?}");
                self.seen.mapping = open;
            }
            StageStep::CloseLeftover => {
                assert!(is_encrypted && self.seen.mapping == Mapping::Leftover, "{self:?}");
                self.seen.mapping = Mapping::None;
            }
            StageStep::GrowMapping => {
                assert!(is_encrypted && self.seen.mapping == Mapping::Open { short: true }, "{self:?}");
                self.seen.mapping = open;
            }
            StageStep::ProbeInside => {
                assert!(is_encrypted && is_in_its_place, "{self:?}");
                self.seen.inside = self.inside.clone();
            }
            StageStep::MakeFilesystem { unfinished, .. } => {
                assert!(is_in_its_place, "{self:?}");
                let surface = if is_encrypted { &self.inside } else { &self.on_disk };
                assert_eq!(*surface, if unfinished { Surface::Unfinished } else { Surface::Blank }, "destroyed what was not blank");
                let made = self.formatted(Surface::Ext("ext4".into()));
                *if is_encrypted { &mut self.inside } else { &mut self.on_disk } = made;
            }
            StageStep::Mount(by) => {
                assert!(is_in_its_place, "{self:?}");
                let surface = if is_encrypted { &self.inside } else { &self.on_disk };
                let right = matches!((surface, by), (Surface::Ext(_), Filesystem::Ext4) | (Surface::Xfs, Filesystem::Xfs));
                assert!(right, "mounted {surface:?} by {by:?}");
                (self.seen.mount, self.seen.growth) = (Mount::Ours, Growth::Room);
            }
            StageStep::Grow => self.seen.growth = Growth::Tried,
        }
    }

    /// To the end: staged or refused.
    fn walk(&mut self, want: &StageRequest) -> Result<(), Refusal> {
        let turns = MAX_TURNS + 2 * self.cuts;
        for _ in 0..turns {
            match next_stage_step(want, &self.seen)? {
                Some(step) => {
                    let destroys = matches!(step, StageStep::MakeFilesystem { .. } | StageStep::Encrypt { .. });
                    assert!(!destroys || matches!(want.format, Format::May(_)), "formatted what may never be");
                    self.do_step(want, step);
                }
                None => return Ok(()),
            }
        }
        panic!("no end after {turns} turns: {self:?}");
    }
}

/// Every state of everything.
fn worlds() -> Vec<World> {
    let mut worlds = Vec::new();
    for mount in mounts() {
        for disk in disks() {
            for mapping in mappings() {
                for on_disk in surfaces() {
                    for inside in surfaces() {
                        for growth in [Growth::Full, Growth::Room, Growth::Tried] {
                            let (mount, mapping) = (mount.clone(), mapping.clone());
                            let seen = StageSeen { mount, disk, mapping, surface: Surface::Unread, inside: Surface::Unread, growth };
                            worlds.push(World { seen, on_disk: on_disk.clone(), inside: inside.clone(), cuts: 0, formats: 0 });
                        }
                    }
                }
            }
        }
    }
    worlds
}

#[test]
fn staging_ends_from_everywhere_and_destroys_only_blanks() {
    let worlds = worlds();
    assert_eq!(worlds.len(), 4 * 4 * 5 * 6 * 6 * 3);
    for want in stage_wants() {
        let (mut walks, mut staged, mut formats) = (0, 0, 0);
        for begin in &worlds {
            for cuts in 0..3 {
                walks += 1;
                let mut world = World { cuts, ..begin.clone() };
                let end = world.walk(&want);
                formats += world.formats;
                let Err(refusal) = end else {
                    staged += 1;
                    assert_eq!(world.seen.mount == Mount::Ours, matches!(want.access, Access::Filesystem(_)));
                    assert!(matches!(world.seen.disk, Disk::Ready { .. }));
                    let open = Mapping::Open { short: false };
                    assert_eq!(
                        world.seen.mapping,
                        if want.encryption.is_some() { open } else { Mapping::None },
                        "in plain or not as asked"
                    );
                    continue;
                };
                assert!(!refusal.to_string().is_empty());
            }
        }
        let may = matches!(want.format, Format::May(_)) && (want.encryption.is_some() || want.access != Access::Block);
        assert!(staged > walks / 100, "{staged} of {walks} staged: the walk reached the good cases: {want:?}");
        assert_eq!(may, formats > 0, "{formats} formats: {want:?}");
    }
}

#[test]
fn plain_and_encrypted_are_never_taken_for_each_other() {
    let want = |is_encrypted: bool| stage_wants().into_iter().filter(move |want| want.encryption.is_some() == is_encrypted);
    let seen = |surface: Surface, mapping: Mapping| StageSeen {
        mount: Mount::None,
        disk: Disk::Ready { read_only: false },
        mapping,
        surface,
        inside: Surface::Unread,
        growth: Growth::Full,
    };
    for want in want(true) {
        for surface in [Surface::Ext("ext4".into()), Surface::Xfs] {
            assert!(matches!(next_stage_step(&want, &seen(surface, Mapping::None)), Err(Refusal::InPlain { .. })));
        }
        let mounted = StageSeen { mount: Mount::Ours, ..seen(Surface::Unread, Mapping::None) };
        let plain = Err(Refusal::InPlain { what: "the filesystem that is mounted".into() });
        assert_eq!(next_stage_step(&want, &mounted), if want.access == Access::Block { Err(Refusal::StagedAsFilesystem) } else { plain });
    }
    for want in want(false) {
        assert_eq!(next_stage_step(&want, &seen(Surface::Luks, Mapping::None)), Err(Refusal::NoPassphrase));
        assert_eq!(next_stage_step(&want, &seen(Surface::Unread, Mapping::Open { short: false })), Err(Refusal::NoPassphrase));
    }
}

#[test]
fn a_repeated_stage_looks_once_and_does_nothing() {
    for want in stage_wants() {
        let mount = if want.access == Access::Block { Mount::None } else { Mount::Ours };
        let mapping = if want.encryption.is_some() { Mapping::Open { short: false } } else { Mapping::None };
        let disk = Disk::Ready { read_only: false };
        let seen = StageSeen { mount, disk, mapping, surface: Surface::Unread, inside: Surface::Unread, growth: Growth::Full };
        assert_eq!(next_stage_step(&want, &seen), Ok(None));
    }
}

#[test]
fn a_foreign_mount_is_never_touched() {
    let stranger = || Mount::Stranger("ext4 from /dev/vda1".into());
    for disk in disks() {
        for mapping in mappings() {
            for want in stage_wants() {
                let (mount, mapping) = (stranger(), mapping.clone());
                let seen = StageSeen { mount, disk, mapping, surface: Surface::Blank, inside: Surface::Blank, growth: Growth::Room };
                assert!(matches!(next_stage_step(&want, &seen), Err(Refusal::OtherMount { .. })));
            }
        }
    }
    for bits in 0..8 {
        let [mapped, held, empty_folder] = [1, 2, 4].map(|bit| bits & bit != 0);
        let seen = UnstageSeen { mount: stranger(), mapped, held, empty_folder };
        assert!(matches!(next_unstage_step(&seen), Err(Refusal::OtherMount { .. })));
    }
    assert!(matches!(next_unpublish_step(&Target::Other("tmpfs".into())), Err(Refusal::TargetTaken { .. })));
}

#[test]
fn unstaging_ends_from_everywhere_with_nothing_held() {
    for mount in mounts() {
        for bits in 0..8 {
            let [mapped, held, empty_folder] = [1, 2, 4].map(|bit| bits & bit != 0);
            let mut seen = UnstageSeen { mount: mount.clone(), mapped, held, empty_folder };
            let mut turns = 0;
            while let Ok(Some(step)) = next_unstage_step(&seen) {
                turns += 1;
                assert!(turns <= MAX_TURNS);
                match step {
                    UnstageStep::Unmount => seen.mount = Mount::None,
                    UnstageStep::Close => {
                        assert_eq!(seen.mount, Mount::None, "closed what is mounted");
                        seen.mapped = false;
                    }
                    UnstageStep::AwaitRelease => {
                        assert!(!seen.mapped, "the mapping holds it");
                        seen.held = false;
                    }
                    UnstageStep::RemoveFolder => seen.empty_folder = false,
                }
            }
            let stranger = matches!(mount, Mount::Stranger(_));
            assert!(stranger || seen == UnstageSeen { mount: Mount::None, mapped: false, held: false, empty_folder: false });
        }
    }
}

fn targets() -> Vec<Target> {
    let shows = |read_only| Target::Shows { read_only };
    vec![
        Target::Absent,
        Target::Folder,
        Target::File,
        shows(true),
        shows(false),
        Target::ShowsGone,
        Target::Stale,
        Target::Other("tmpfs".into()),
    ]
}

#[test]
fn publishing_ends_from_everywhere_and_shows_what_was_asked() {
    let mut published = 0;
    let sources = mounts().into_iter().map(Source::Staged).chain(disks().into_iter().map(Source::Device)).chain([Source::NotOpen]);
    for source in sources {
        let wanted = match source {
            Source::Staged(_) => PublishSource::Staging("/s".into()),
            Source::Device(_) | Source::NotOpen => PublishSource::Device(disk()),
        };
        for target in targets() {
            for read_only in [false, true] {
                for single_target in [false, true] {
                    for (other_targets, is_source_read_only) in
                        [(vec![], false), (vec![PathBuf::from("/other")], false), (vec![], true), (vec![PathBuf::from("/other")], true)]
                    {
                        let second = single_target && !other_targets.is_empty();
                        let want =
                            PublishRequest { volume: volume(), target: "/t".into(), source: wanted.clone(), read_only, single_target };
                        let mut seen = PublishSeen { source: source.clone(), is_source_read_only, target: target.clone(), other_targets };
                        let mut turns = 0;
                        let end = loop {
                            turns += 1;
                            assert!(turns <= MAX_TURNS);
                            match next_publish_step(&want, &seen) {
                                Ok(Some(step)) => {
                                    assert!(!second, "a second target of a single writer");
                                    match step {
                                        PublishStep::FindDisk => seen.source = Source::Device(Disk::Offline),
                                        PublishStep::SetRunning => seen.source = Source::Device(Disk::Ready { read_only: false }),
                                        PublishStep::MakeFolder => seen.target = Target::Folder,
                                        PublishStep::MakeFile => seen.target = Target::File,
                                        PublishStep::Unmount => {
                                            assert_eq!(seen.target, Target::Stale, "nothing else is taken away");
                                            seen.target = Target::File;
                                        }
                                        PublishStep::Bind => seen.target = Target::Shows { read_only: read_only || is_source_read_only },
                                    }
                                }
                                end => break end,
                            }
                        };
                        if end.is_ok() {
                            published += 1;
                            let shown_before = matches!(target, Target::Shows { .. });
                            assert!(source != Source::NotOpen || shown_before, "ciphertext was shown");
                            let shown = [Target::Shows { read_only }, Target::Shows { read_only: read_only || is_source_read_only }];
                            assert!(shown.contains(&seen.target), "{:?}", seen.target);
                        } else if matches!((&source, &target), (Source::Staged(Mount::Ours), Target::Absent | Target::Folder)) {
                            assert!(second, "a volume staged read-only is published as it is: {end:?}");
                        }
                    }
                }
            }
        }
    }
    assert!(published > 50, "{published}");
}

#[test]
fn unpublishing_ends_from_everywhere_with_nothing_left() {
    for target in targets() {
        let mut seen = target.clone();
        let mut turns = 0;
        while let Ok(Some(step)) = next_unpublish_step(&seen) {
            turns += 1;
            assert!(turns <= MAX_TURNS);
            seen = match step {
                UnpublishStep::Unmount => Target::Folder,
                UnpublishStep::RemoveFolder | UnpublishStep::RemoveFile => Target::Absent,
            };
        }
        assert!(seen == Target::Absent || matches!(target, Target::Other(_)), "{target:?}");
    }
}

#[test]
fn expanding_waits_for_the_disk_before_it_grows() {
    let want = |required_bytes| ExpandRequest { volume: volume(), path: "/t".into(), required_bytes };
    let seen = |shown: &Shown, size_bytes| ExpandSeen { shown: shown.clone(), size_bytes, short: false };
    for growth in [Growth::Full, Growth::Room, Growth::Tried] {
        let shown = Shown::Filesystem(growth);
        let wait = Ok(Some(ExpandStep::AwaitSize { required_bytes: 2 }));
        assert_eq!(next_expand_step(&want(Some(2)), &seen(&shown, 1)), wait);
        let then = (growth == Growth::Room).then_some(ExpandStep::Grow);
        assert_eq!(next_expand_step(&want(Some(2)), &seen(&shown, 2)), Ok(then));
        assert_eq!(next_expand_step(&want(None), &seen(&shown, 1)), Ok(then));
    }
    assert_eq!(next_expand_step(&want(Some(2)), &seen(&Shown::Device, 2)), Ok(None));
    // The disk, its mapping, the filesystem in it: in this order.
    for shown in [Shown::Device, Shown::Filesystem(Growth::Room), Shown::Filesystem(Growth::Full)] {
        let seen = |size_bytes| ExpandSeen { short: true, ..seen(&shown, size_bytes) };
        assert_eq!(next_expand_step(&want(Some(2)), &seen(1)), Ok(Some(ExpandStep::AwaitSize { required_bytes: 2 })));
        assert_eq!(next_expand_step(&want(Some(2)), &seen(2)), Ok(Some(ExpandStep::GrowMapping)));
    }
    let refused = next_expand_step(&want(Some(2)), &seen(&Shown::NotOurs("nothing is mounted there".into()), 9));
    assert!(matches!(refused, Err(Refusal::NotPublishedHere { .. })));
}
