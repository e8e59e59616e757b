//! Publish: what is to be shown, what is at the target path, where else the volume is shown.

use super::*;
use crate::request::StagedAt;

/// What is to be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum From {
    /// The staging path.
    Staging(Staged),
    /// The raw block device.
    Device(Drive, Luks),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Staged {
    Nothing,
    Ours { read_only: bool },
    Gone,
    Stranger,
}
every!(every_staged -> Staged {
    Staged::Nothing => [Staged::Nothing],
    Staged::Ours { .. } => [Staged::Ours { read_only: false }, Staged::Ours { read_only: true }],
    Staged::Gone => [Staged::Gone],
    Staged::Stranger => [Staged::Stranger],
});

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Drive {
    Never,
    /// Offline, as the reference driver left it.
    Comes,
    Offline,
    StaysOffline,
    Writable,
    ReadOnly,
}
every!(every_drive -> Drive {
    Drive::Never => [Drive::Never],
    Drive::Comes => [Drive::Comes],
    Drive::Offline => [Drive::Offline],
    Drive::StaysOffline => [Drive::StaysOffline],
    Drive::Writable => [Drive::Writable],
    Drive::ReadOnly => [Drive::ReadOnly],
});

/// Of the raw block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Luks {
    No,
    NotOpen,
    Open,
}
every!(every_luks -> Luks {
    Luks::No => [Luks::No],
    Luks::NotOpen => [Luks::NotOpen],
    Luks::Open => [Luks::Open],
});

/// The target path itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Under {
    Absent,
    Folder,
    File,
    /// With bytes in it; a link, a socket.
    Other,
}
every!(every_under -> Under {
    Under::Absent => [Under::Absent],
    Under::Folder => [Under::Folder],
    Under::File => [Under::File],
    Under::Other => [Under::Other],
});

/// Mounted on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum On {
    Nothing,
    Shown {
        read_only: bool,
    },
    Gone,
    /// A device node whose disk is gone.
    Stale,
    /// Another volume's, another disk's, or the ciphertext below an open mapping.
    Stranger,
}
every!(every_on -> On {
    On::Nothing => [On::Nothing],
    On::Shown { .. } => [On::Shown { read_only: false }, On::Shown { read_only: true }],
    On::Gone => [On::Gone],
    On::Stale => [On::Stale],
    On::Stranger => [On::Stranger],
});

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct World {
    from: From,
    under: Under,
    on: On,
    /// The volume is shown at another target.
    elsewhere: bool,
}

fn every_request(source: &PublishSource) -> Vec<PublishRequest> {
    let mut wants = Vec::new();
    for read_only in BOTH {
        for single_target in BOTH {
            wants.push(PublishRequest { volume: volume(), target: "/t".into(), source: source.clone(), read_only, single_target });
        }
    }
    wants
}

impl World {
    fn seen(&self) -> PublishSeen {
        let ready = |read_only| Source::Device(Disk::Ready { read_only });
        let mut source = match self.from {
            From::Staging(Staged::Nothing) => Source::Staged(Mount::None),
            From::Staging(Staged::Ours { .. }) => Source::Staged(Mount::Ours),
            From::Staging(Staged::Gone) => Source::Staged(Mount::Gone),
            From::Staging(Staged::Stranger) => Source::Staged(Mount::Stranger("tmpfs".into())),
            From::Device(Drive::Never | Drive::Comes, _) => Source::Device(Disk::NotYet),
            From::Device(Drive::Offline | Drive::StaysOffline, _) => Source::Device(Disk::Offline),
            From::Device(Drive::Writable, _) => ready(false),
            From::Device(Drive::ReadOnly, _) => ready(true),
        };
        let target = match (self.on, self.under) {
            (On::Shown { read_only }, _) => Target::Shows { read_only },
            (On::Gone, _) => Target::ShowsGone,
            (On::Stale, _) => Target::Stale,
            (On::Stranger, _) => Target::Other("tmpfs is mounted there".into()),
            (On::Nothing, Under::Absent) => Target::Absent,
            (On::Nothing, Under::Folder) => Target::Folder,
            (On::Nothing, Under::File) => Target::File,
            (On::Nothing, Under::Other) => Target::Other("a symbolic link".into()),
        };
        let is_looked_into =
            matches!((&source, &target), (Source::Device(Disk::Ready { .. }), Target::Absent | Target::File | Target::Stale));
        if is_looked_into && matches!(self.from, From::Device(_, Luks::NotOpen)) {
            source = Source::NotOpen;
        }
        let other_targets = if self.elsewhere { vec!["/other".into()] } else { Vec::new() };
        PublishSeen { source, is_source_read_only: self.is_source_read_only(), target, other_targets }
    }

    fn is_source_read_only(&self) -> bool {
        self.from == From::Staging(Staged::Ours { read_only: true })
    }
}

impl Toy for World {
    type Want = PublishRequest;
    type Step = PublishStep;

    fn next(&self, want: &PublishRequest) -> Result<Option<PublishStep>, Refusal> {
        next_publish_step(want, &self.seen())
    }

    fn perform(mut self, want: &PublishRequest, step: PublishStep) -> Result<Self, &'static str> {
        assert!(!(want.single_target && self.elsewhere), "a second target of a single writer: {self:?}");
        let is_unmount = matches!(step, PublishStep::Unmount);
        let is_in_the_way = self.on != if is_unmount { On::Stale } else { On::Nothing };
        // The disk is looked for first, whatever the target shows.
        let is_of_disk = matches!(step, PublishStep::FindDisk | PublishStep::SetRunning) && self.on == On::Stale;
        assert!(!is_in_the_way || is_of_disk, "{step:?} stacks a mount, or takes one away that is not ours: {self:?}");
        match (step, self.from) {
            (PublishStep::Unmount, _) => self.on = On::Nothing,
            (PublishStep::FindDisk, From::Device(Drive::Comes, luks)) => self.from = From::Device(Drive::Offline, luks),
            (PublishStep::FindDisk, From::Device(_, _)) => return Err("no disk within 30 s"),
            (PublishStep::SetRunning, From::Device(Drive::Offline, luks)) => self.from = From::Device(Drive::Writable, luks),
            (PublishStep::SetRunning, From::Device(_, _)) => return Err("stays offline"),
            (PublishStep::FindDisk | PublishStep::SetRunning, From::Staging(_)) => panic!("{step:?}: {self:?}"),
            (PublishStep::MakeFolder, From::Staging(_)) if self.under == Under::Absent => self.under = Under::Folder,
            (PublishStep::MakeFile, From::Device(_, _)) if self.under == Under::Absent => self.under = Under::File,
            (PublishStep::MakeFolder | PublishStep::MakeFile, _) => panic!("{step:?}: {self:?}"),
            (PublishStep::Bind, from) => {
                let is_right = match from {
                    From::Staging(staged) => matches!(staged, Staged::Ours { .. }) && self.under == Under::Folder,
                    From::Device(drive, luks) => {
                        assert_ne!(luks, Luks::NotOpen, "ciphertext is shown: {self:?}");
                        matches!(drive, Drive::Writable | Drive::ReadOnly) && self.under == Under::File
                    }
                };
                assert!(is_right, "{step:?}: {self:?}");
                self.on = On::Shown { read_only: want.read_only || self.is_source_read_only() };
            }
        }
        Ok(self)
    }

    fn cut(self, _: &PublishRequest, _: PublishStep) -> Vec<Self> {
        // The mount is made aside, with its mode, and moved to the target in one system call; folders above the target harm nobody.
        Vec::new()
    }

    fn forget(self) -> Self {
        self
    }

    fn happenings(self) -> Vec<Self> {
        let on = match (self.on, self.from) {
            (On::Shown { .. }, From::Staging(_)) => On::Gone,
            (On::Shown { .. }, From::Device(..)) => On::Stale,
            (on, _) => on,
        };
        let from = match self.from {
            From::Staging(Staged::Ours { .. }) => From::Staging(Staged::Gone),
            From::Staging(other) => From::Staging(other),
            From::Device(_, luks) => From::Device(Drive::Never, luks),
        };
        vec![Self { from, on, ..self }]
    }

    fn assert_done(&self, want: &PublishRequest) {
        let read_only = want.read_only || self.is_source_read_only();
        let is_shown = self.on == On::Shown { read_only } || self.on == On::Shown { read_only: want.read_only };
        assert!(is_shown, "{self:?} of {want:?}");
    }

    fn is_tried_again(&self, _: PublishStep) -> bool {
        false
    }
}

fn staged() -> PublishSource {
    PublishSource::Staging(StagedAt { path: "/s".into(), disk: disk() })
}

fn worlds(from: &[From]) -> Vec<World> {
    let mut worlds = Vec::new();
    for from in from {
        for under in every_under() {
            // Something can be mounted on what is there only.
            for on in every_on().into_iter().filter(|on| *on == On::Nothing || matches!(under, Under::Folder | Under::File)) {
                for elsewhere in BOTH {
                    worlds.push(World { from: *from, under, on, elsewhere });
                }
            }
        }
    }
    worlds
}

/// W11: what is not staged is not shown. W44: nothing is mounted over what is there, and what is there is what was asked for.
#[test]
fn publishing_ends_from_everywhere_and_shows_what_was_asked() {
    let staging: Vec<From> = every_staged().into_iter().map(From::Staging).collect();
    let device: Vec<From> =
        every_drive().into_iter().flat_map(|drive| every_luks().into_iter().map(move |luks| From::Device(drive, luks))).collect();
    for (source, from) in [(staged(), staging), (PublishSource::Device(disk()), device)] {
        let worlds = worlds(&from);
        assert_eq!(worlds.len(), from.len() * (4 + 2 * 5) * 2);
        for want in every_request(&source) {
            let walks = Walks::all(&want, &worlds);
            assert!(walks.done() > worlds.len() / 10, "{} of {} done: {want:?}", walks.done(), worlds.len());
            for world in &worlds {
                let (end, _) = &walks.ends[world];
                let is_free = match (&source, world.under) {
                    (_, Under::Absent) | (PublishSource::Staging(_), Under::Folder) | (PublishSource::Device(_), Under::File) => true,
                    (_, Under::Folder | Under::File | Under::Other) => false,
                };
                let is_second = want.single_target && world.elsewhere;
                let is_there = match world.from {
                    From::Staging(staged) => matches!(staged, Staged::Ours { .. }),
                    From::Device(drive, luks) => !matches!(drive, Drive::Never | Drive::StaysOffline) && luks != Luks::NotOpen,
                };
                if matches!(world.on, On::Nothing | On::Stale) {
                    let is_done = matches!(end, End::Done(_));
                    assert_eq!(is_done, is_free && is_there && !is_second, "{end:?} from {world:?} of {want:?}");
                }
            }
        }
    }
}

/// The same of everything that can be seen.
#[test]
fn publishing_decides_harmlessly_whatever_is_seen() {
    let mut decided = 0;
    let sources =
        every_mount().into_iter().map(Source::Staged).chain(every_disk().into_iter().map(Source::Device)).chain([Source::NotOpen]);
    for source in sources {
        let from = match source {
            Source::Staged(_) => staged(),
            Source::Device(_) | Source::NotOpen => PublishSource::Device(disk()),
        };
        for want in every_request(&from) {
            for target in every_target() {
                for is_source_read_only in BOTH {
                    for other_targets in [vec![], vec![PathBuf::from("/other")]] {
                        let seen = PublishSeen { source: source.clone(), is_source_read_only, target: target.clone(), other_targets };
                        assert_harmless(&want, &seen);
                        decided += 1;
                    }
                }
            }
        }
    }
    assert_eq!(decided, (5 + 4 + 1) * 4 * 8 * 4);
}

fn assert_harmless(want: &PublishRequest, seen: &PublishSeen) {
    let PublishSeen { source, is_source_read_only, target, other_targets } = seen;
    let step = match next_publish_step(want, seen) {
        Err(refusal) => return assert_says_its_subject(&refusal),
        Ok(step) => step,
    };
    let is_second = want.single_target && !other_targets.is_empty();
    let is_ready = matches!(source, Source::Staged(Mount::Ours) | Source::Device(Disk::Ready { .. }));
    let is_of_device = matches!(want.source, PublishSource::Device(_));
    let is_right = match step {
        None => {
            *target == Target::Shows { read_only: want.read_only } || (*target == Target::Shows { read_only: true } && *is_source_read_only)
        }
        Some(PublishStep::FindDisk) => *source == Source::Device(Disk::NotYet) && !is_second,
        Some(PublishStep::SetRunning) => *source == Source::Device(Disk::Offline) && !is_second,
        Some(PublishStep::MakeFolder) => is_ready && !is_of_device && *target == Target::Absent && !is_second,
        Some(PublishStep::MakeFile) => is_ready && is_of_device && *target == Target::Absent && !is_second,
        Some(PublishStep::Unmount) => is_ready && *target == Target::Stale && !is_second,
        Some(PublishStep::Bind) => is_ready && *target == (if is_of_device { Target::File } else { Target::Folder }) && !is_second,
    };
    assert!(is_right, "{step:?} at {seen:?} of {want:?}");
}
