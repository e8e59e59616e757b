//! Stage: the disk, what is on it, the mapping over it, what is in that, what is mounted, keyslots, and sizes.

use std::collections::HashSet;
use std::mem::discriminant;

use super::*;
use crate::request::{Encryption, Zeroed};
use crate::sys::mount::Options;

/// At the staging path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum At {
    Nothing,
    /// The filesystem on the disk itself.
    Plain,
    /// The one inside the mapping.
    Inside,
    Gone,
    /// Another disk's, and whether somebody uses it all the same, which only the kernel knows.
    Stale {
        is_used: bool,
    },
    Stranger,
}
every!(every_at -> At {
    At::Nothing => [At::Nothing],
    At::Plain => [At::Plain],
    At::Inside => [At::Inside],
    At::Gone => [At::Gone],
    At::Stale { .. } => [At::Stale { is_used: false }, At::Stale { is_used: true }],
    At::Stranger => [At::Stranger],
});

/// The disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Drive {
    /// Not there, and it does not come.
    Never,
    /// Not there yet; it comes offline, as the reference driver left it.
    Comes,
    Offline,
    /// Cannot be set running.
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

/// Over the disk, or called as its mapping would be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Map {
    None,
    /// As the header says.
    Whole,
    /// So, but smaller than the disk; and whether it can be let grow.
    Short {
        grows: bool,
    },
    /// Ours, cut short before it had a table.
    Half,
    /// Ours, over a disk that is gone.
    OverGone,
    /// The driver's, with another table.
    Otherwise,
    /// A pod's own, on its raw block device.
    Foreign,
}
every!(every_map -> Map {
    Map::None => [Map::None],
    Map::Whole => [Map::Whole],
    Map::Short { .. } => [Map::Short { grows: true }, Map::Short { grows: false }],
    Map::Half => [Map::Half],
    Map::OverGone => [Map::OverGone],
    Map::Otherwise => [Map::Otherwise],
    Map::Foreign => [Map::Foreign],
});

/// What bytes are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum On {
    Blank,
    Unfinished,
    Ext,
    Xfs,
    /// With our UUID.
    OwnLuks,
    OtherLuks,
    Other,
}
every!(every_on -> On {
    On::Blank => [On::Blank],
    On::Unfinished => [On::Unfinished],
    On::Ext => [On::Ext],
    On::Xfs => [On::Xfs],
    On::OwnLuks => [On::OwnLuks],
    On::OtherLuks => [On::OtherLuks],
    On::Other => [On::Other],
});

impl On {
    fn surface(self) -> Surface {
        match self {
            Self::Blank => Surface::Blank,
            Self::Unfinished => Surface::Unfinished,
            Self::Ext => Surface::Ext("ext4".into()),
            Self::Xfs => Surface::Xfs,
            Self::OwnLuks | Self::OtherLuks => Surface::Luks,
            Self::Other => Surface::Other("btrfs".into()),
        }
    }

    fn is_luks(self) -> bool {
        matches!(self, Self::OwnLuks | Self::OtherLuks)
    }

    fn is_filesystem(self) -> bool {
        matches!(self, Self::Ext | Self::Xfs)
    }
}

/// What opens the LUKS volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Keys {
    Current,
    Previous,
    Both,
    Neither,
}
every!(every_keys -> Keys {
    Keys::Current => [Keys::Current],
    Keys::Previous => [Keys::Previous],
    Keys::Both => [Keys::Both],
    Keys::Neither => [Keys::Neither],
});

/// The filesystem against what it lies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Size {
    Fills,
    Grows,
    /// Less than a block group is left: the kernel grows nothing, and says nothing.
    Tail,
    /// The kernel refuses.
    Stuck,
}
every!(every_size -> Size {
    Size::Fills => [Size::Fills],
    Size::Grows => [Size::Grows],
    Size::Tail => [Size::Tail],
    Size::Stuck => [Size::Stuck],
});

/// `run::stage::Memory`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Memory {
    surface: Option<On>,
    inside: Option<On>,
    mapping_grow_tried: bool,
    grow_tried: bool,
    grow_left: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct World {
    at: At,
    drive: Drive,
    map: Map,
    on_disk: On,
    inside: On,
    keys: Keys,
    size: Size,
    memory: Memory,
}

/// The request, and whether the secret carries the previous passphrase too.
#[derive(Debug)]
struct Wanted {
    request: StageRequest,
    has_previous: bool,
}

impl Wanted {
    fn is_encrypted(&self) -> bool {
        self.request.encryption.is_some()
    }

    fn every() -> Vec<Self> {
        let mut wants = Vec::new();
        for access in [Access::Block, Access::Filesystem(Options::default())] {
            for format in [Format::May(FormatOptions::default()), Format::Never("a static volume".into())] {
                for (is_encrypted, has_previous) in [(false, false), (true, false), (true, true)] {
                    for grow_required in BOTH {
                        let request = request(access.clone(), format.clone(), is_encrypted, grow_required);
                        wants.push(Self { request, has_previous });
                    }
                }
            }
        }
        wants
    }
}

fn request(access: Access, format: Format, is_encrypted: bool, grow_required: bool) -> StageRequest {
    StageRequest {
        volume: volume(),
        staging: "/s".into(),
        access,
        fstype: None,
        disk: disk(),
        encryption: is_encrypted.then_some(Encryption { kdf: disk::luks::Kdf::DEFAULT, discards: false }),
        format,
        zeroed: Zeroed::Yes,
        grow_required,
        trims: true,
    }
}

/// For other tests: without the previous passphrase, of which the plan knows nothing.
pub(in crate::plan) fn every_request() -> Vec<StageRequest> {
    Wanted::every().into_iter().filter(|want| !want.has_previous).map(|want| want.request).collect()
}

impl World {
    fn seen(&self, want: &Wanted) -> StageSeen {
        let mount = match self.at {
            At::Nothing => Mount::None,
            At::Plain | At::Inside => Mount::Ours,
            At::Gone => Mount::Gone,
            At::Stale { .. } => Mount::Stale("ext4 from /dev/sdb (8:16)".into()),
            At::Stranger => Mount::Stranger("tmpfs".into()),
        };
        let disk = match self.drive {
            Drive::Never | Drive::Comes => Disk::NotYet,
            Drive::Offline | Drive::StaysOffline => Disk::Offline,
            Drive::Writable => Disk::Ready { read_only: false },
            Drive::ReadOnly => Disk::Ready { read_only: true },
        };
        let is_ready = matches!(disk, Disk::Ready { .. });
        let mapping = if is_ready { self.seen_mapping(want) } else { Mapping::None };
        let mut surface = self.memory.surface.map_or(Surface::Unread, On::surface);
        if is_ready && !want.is_encrypted() && want.request.access == Access::Block && self.on_disk == On::OwnLuks {
            surface = Surface::Luks;
        }
        let growth = match (&mount, self.size) {
            (Mount::Ours, _) if self.memory.grow_left => Growth::Tried,
            (Mount::Ours, Size::Tail) if self.memory.grow_tried => Growth::Tried,
            (Mount::Ours, Size::Grows | Size::Tail | Size::Stuck) if self.drive != Drive::ReadOnly => Growth::Room,
            _ => Growth::Full,
        };
        StageSeen { mount, disk, mapping, surface, inside: self.memory.inside.map_or(Surface::Unread, On::surface), growth }
    }

    fn seen_mapping(&self, want: &Wanted) -> Mapping {
        match (self.map, want.is_encrypted()) {
            (Map::None, _) => Mapping::None,
            (Map::Whole | Map::Short { .. }, true) if !self.on_disk.is_luks() => Mapping::Strange("its disk has no header".into()),
            (Map::Whole, true) => Mapping::Open { short: false },
            (Map::Short { .. }, true) => Mapping::Open { short: !self.memory.mapping_grow_tried },
            (Map::Half | Map::OverGone, true) => Mapping::Leftover,
            (Map::Otherwise | Map::Foreign, true) => Mapping::Strange("its cipher is another".into()),
            (Map::Whole | Map::Short { .. } | Map::Otherwise, false) => Mapping::Open { short: false },
            (Map::Half | Map::OverGone | Map::Foreign, false) => Mapping::None,
        }
    }

    /// Where a filesystem of this volume may lie: inside the mapping of an encrypted one, on the disk of a plain one.
    fn place(&self, want: &Wanted) -> On {
        assert_eq!(self.at, At::Nothing, "something is mounted: {self:?}");
        assert!(matches!(self.drive, Drive::Writable | Drive::ReadOnly), "{self:?}");
        if want.is_encrypted() {
            assert!(matches!(self.map, Map::Whole | Map::Short { .. }), "{self:?}");
            self.inside
        } else {
            assert_eq!(self.seen_mapping(want), Mapping::None, "{self:?}");
            self.on_disk
        }
    }

    /// The only ground on which something may be destroyed.
    fn assert_may_be_destroyed(&self, want: &Wanted, what: On, read: Option<On>, unfinished: bool) {
        assert_eq!(what, if unfinished { On::Unfinished } else { On::Blank }, "destroyed what was not blank: {self:?}");
        assert_eq!(read, Some(what), "destroyed what was not read: {self:?}");
        assert_eq!(self.drive, Drive::Writable, "{self:?}");
        assert!(matches!(want.request.format, Format::May(_)), "formatted what may never be: {self:?}");
    }

    /// A keyslot is added before one is removed, so that there is one at any time.
    fn opened(self, want: &Wanted) -> Result<Self, &'static str> {
        let keys = match (self.keys, want.has_previous) {
            (Keys::Neither, _) | (Keys::Previous, false) => return Err("no keyslot opens"),
            (Keys::Current, _) => Keys::Current,
            (Keys::Both, false) => Keys::Both,
            (Keys::Both, true) if self.drive == Drive::ReadOnly => Keys::Both,
            (Keys::Previous, true) if self.drive == Drive::ReadOnly => Keys::Previous,
            (Keys::Both | Keys::Previous, true) => Keys::Current,
        };
        Ok(Self { keys, map: Map::Whole, ..self })
    }
}

impl Toy for World {
    type Want = Wanted;
    type Step = StageStep;

    fn next(&self, want: &Wanted) -> Result<Option<StageStep>, Refusal> {
        next_stage_step(&want.request, &self.seen(want))
    }

    fn perform(mut self, want: &Wanted, step: StageStep) -> Result<Self, &'static str> {
        let is_cleared = matches!(self.at, At::Nothing | At::Plain | At::Inside);
        assert_eq!(is_cleared, step != StageStep::Unmount, "{step:?} though the path is not the volume's: {self:?}");
        let fresh = Memory { surface: None, inside: None, ..self.memory };
        match step {
            StageStep::Unmount => match self.at {
                At::Stale { is_used: true } => return Err("in use: EBUSY"),
                At::Gone | At::Stale { is_used: false } => self.at = At::Nothing,
                At::Nothing | At::Plain | At::Inside | At::Stranger => panic!("unmounted what must stay: {self:?}"),
            },
            StageStep::FindDisk if self.drive == Drive::Comes => self.drive = Drive::Offline,
            StageStep::FindDisk => return Err("no disk within 30 s"),
            StageStep::SetRunning if self.drive == Drive::Offline => self.drive = Drive::Writable,
            StageStep::SetRunning => return Err("stays offline"),
            StageStep::Probe => self.memory.surface = Some(self.on_disk),
            StageStep::Encrypt { unfinished } => {
                assert!(want.is_encrypted() && self.map == Map::None && self.at == At::Nothing, "{self:?}");
                self.assert_may_be_destroyed(want, self.on_disk, self.memory.surface, unfinished);
                // With the mark of the filesystem to come, which a pod's own raw volume must not have.
                let inside = if want.request.access == Access::Block { On::Blank } else { On::Unfinished };
                (self.on_disk, self.inside, self.keys, self.memory) = (On::OwnLuks, inside, Keys::Current, fresh);
            }
            StageStep::Open => {
                assert!(want.is_encrypted() && self.map == Map::None && self.on_disk.is_luks(), "{self:?}");
                return self.opened(want);
            }
            StageStep::CloseLeftover => {
                assert!(want.is_encrypted() && matches!(self.map, Map::Half | Map::OverGone) && self.at == At::Nothing, "{self:?}");
                self.map = Map::None;
            }
            StageStep::GrowMapping => {
                let Map::Short { grows } = self.map else { panic!("{self:?}") };
                assert!(want.is_encrypted(), "{self:?}");
                self.memory.mapping_grow_tried = true;
                match (grows, self.size) {
                    (false, _) if want.request.grow_required => return Err("the mapping cannot grow"),
                    (false, _) => (),
                    // What filled the smaller mapping has room now.
                    (true, Size::Fills) => (self.map, self.size) = (Map::Whole, Size::Grows),
                    (true, Size::Grows | Size::Tail | Size::Stuck) => self.map = Map::Whole,
                }
            }
            StageStep::ProbeInside => {
                assert!(want.is_encrypted());
                self.memory.inside = Some(self.place(want));
            }
            StageStep::MakeFilesystem { unfinished, .. } => {
                let read = if want.is_encrypted() { self.memory.inside } else { self.memory.surface };
                self.assert_may_be_destroyed(want, self.place(want), read, unfinished);
                *if want.is_encrypted() { &mut self.inside } else { &mut self.on_disk } = On::Ext;
                (self.size, self.memory) = (Size::Fills, fresh);
            }
            StageStep::Mount(by) => {
                let right = matches!((self.place(want), by), (On::Ext, Filesystem::Ext4) | (On::Xfs, Filesystem::Xfs));
                assert!(right, "mounted by {by:?}: {self:?}");
                // The kernel lets nobody mount what somebody else's mapping holds.
                if !want.is_encrypted() && self.map == Map::Foreign {
                    return Err("EBUSY");
                }
                self.at = if want.is_encrypted() { At::Inside } else { At::Plain };
            }
            StageStep::Grow => {
                let is_first = !std::mem::replace(&mut self.memory.grow_tried, true);
                match self.size {
                    Size::Grows if is_first => self.size = Size::Fills,
                    Size::Tail if is_first => (),
                    _ if want.request.grow_required => return Err("not grown"),
                    Size::Fills | Size::Grows | Size::Tail | Size::Stuck => self.memory.grow_left = true,
                }
            }
        }
        Ok(self)
    }

    fn cut(self, want: &Wanted, step: StageStep) -> Vec<Self> {
        let world = self.forget();
        match step {
            StageStep::Encrypt { .. } => vec![Self { on_disk: On::Unfinished, ..world }],
            StageStep::MakeFilesystem { .. } if want.is_encrypted() => vec![Self { inside: On::Unfinished, ..world }],
            StageStep::MakeFilesystem { .. } => vec![Self { on_disk: On::Unfinished, ..world }],
            // The mapping is there before it has its table; a second keyslot before the first one goes.
            StageStep::Open => match self.opened(want) {
                Ok(opened) if opened.keys != self.keys => vec![Self { map: Map::Half, ..world }, Self { keys: Keys::Both, ..world }],
                Ok(_) => vec![Self { map: Map::Half, ..world }],
                Err(_) => vec![],
            },
            // One system call each, or nothing that stays.
            StageStep::Unmount
            | StageStep::FindDisk
            | StageStep::SetRunning
            | StageStep::Probe
            | StageStep::CloseLeftover
            | StageStep::GrowMapping
            | StageStep::ProbeInside
            | StageStep::Mount(_)
            | StageStep::Grow => vec![],
        }
    }

    fn forget(self) -> Self {
        Self { memory: Memory::default(), ..self }
    }

    fn happenings(self) -> Vec<Self> {
        // The hypervisor takes the disk away, and it comes again or not.
        let at = if matches!(self.at, At::Plain | At::Inside) { At::Gone } else { self.at };
        let map = match self.map {
            Map::None | Map::Half => self.map,
            Map::Whole | Map::Short { .. } | Map::OverGone => Map::OverGone,
            // Not over the volume's next disk.
            Map::Otherwise | Map::Foreign => Map::None,
        };
        vec![Self { at, map, drive: Drive::Never, ..self }.forget(), Self { at, map, drive: Drive::Comes, ..self }.forget()]
    }

    fn assert_done(&self, want: &Wanted) {
        let is_block = want.request.access == Access::Block;
        assert_eq!(
            self.at,
            if is_block {
                At::Nothing
            } else if want.is_encrypted() {
                At::Inside
            } else {
                At::Plain
            },
            "{self:?}"
        );
        assert!(matches!(self.drive, Drive::Writable | Drive::ReadOnly), "{self:?}");
        assert_eq!(matches!(self.map, Map::Whole | Map::Short { .. }), want.is_encrypted(), "in plain or not as asked: {self:?}");
        if want.request.grow_required {
            assert!(!matches!(self.map, Map::Short { .. }), "{self:?}");
            assert!(is_block || self.drive == Drive::ReadOnly || matches!(self.size, Size::Fills | Size::Tail), "{self:?}");
        }
    }

    fn is_tried_again(&self, step: StageStep) -> bool {
        (step == StageStep::Grow && matches!(self.size, Size::Tail | Size::Stuck))
            || (step == StageStep::GrowMapping && self.map == Map::Short { grows: false })
    }
}

/// Every state of everything. What nobody can see is not told apart: keyslots where there is no LUKS, sizes where there is no
/// filesystem, what is inside of nothing.
fn worlds() -> Vec<World> {
    let mut worlds = Vec::new();
    for at in every_at() {
        for drive in every_drive() {
            for map in every_map() {
                // The kernel lets one holder have a disk: what is mounted from it, or what is mapped over it.
                let is_over = matches!(map, Map::Whole | Map::Short { .. } | Map::Otherwise);
                let is_possible = match at {
                    At::Nothing | At::Gone | At::Stale { .. } | At::Stranger => true,
                    At::Plain => !is_over && map != Map::Foreign,
                    At::Inside => is_over,
                };
                for on_disk in every_on().into_iter().filter(|_| is_possible) {
                    let insides = if on_disk.is_luks() { every_on() } else { vec![On::Blank] };
                    for inside in insides {
                        let keys = if on_disk.is_luks() && map == Map::None { every_keys() } else { vec![Keys::Current] };
                        for keys in keys {
                            let has_filesystem = on_disk.is_filesystem() || inside.is_filesystem() || matches!(at, At::Plain | At::Inside);
                            for size in if has_filesystem { every_size() } else { vec![Size::Fills] } {
                                worlds.push(World { at, drive, map, on_disk, inside, keys, size, memory: Memory::default() });
                            }
                        }
                    }
                }
            }
        }
    }
    worlds
}

/// Of the surfaces and mappings that the plan knows, all were met.
fn assert_nothing_was_missed(seen: &[StageSeen]) {
    let met = |of: &dyn Fn(&StageSeen) -> Vec<String>| seen.iter().flat_map(of).collect::<HashSet<String>>().len();
    let kinds = |count: usize, met: usize, what: &str| assert_eq!(met, count, "kinds of {what}");
    kinds(every_mount().len(), met(&|seen| vec![format!("{:?}", discriminant(&seen.mount))]), "mount");
    kinds(every_disk().len(), met(&|seen| vec![format!("{:?}", seen.disk)]), "disk");
    kinds(4, met(&|seen| vec![format!("{:?}", discriminant(&seen.mapping))]), "mapping");
    kinds(every_surface().len(), met(&|seen| vec![format!("{:?}", discriminant(&seen.surface))]), "surface");
    kinds(every_surface().len(), met(&|seen| vec![format!("{:?}", discriminant(&seen.inside))]), "surface inside");
    kinds(every_growth().len(), met(&|seen| vec![format!("{:?}", seen.growth)]), "growth");
}

/// W13, W14, W15, W16, W30, W31, W32, W33: from no state is anything formatted but a blank, mounted but what was asked for, left
/// in plain, offline, half open or half grown.
#[test]
fn staging_ends_from_everywhere_and_destroys_only_blanks() {
    let worlds = worlds();
    assert_eq!(worlds.len(), 15_420);
    let mut seen: Vec<StageSeen> = Vec::new();
    for want in Wanted::every() {
        let walks = Walks::all(&want, &worlds);
        assert!(walks.ends.len() > worlds.len(), "{}", walks.ends.len());
        assert!(walks.done() > worlds.len() / 100, "{} done: the walk reached the good cases: {want:?}", walks.done());
        let formatted = walks
            .ends
            .iter()
            .any(|(state, _)| matches!(state.next(&want), Ok(Some(StageStep::MakeFilesystem { .. } | StageStep::Encrypt { .. }))));
        let may = matches!(want.request.format, Format::May(_)) && (want.is_encrypted() || want.request.access != Access::Block);
        assert_eq!(formatted, may, "{want:?}");
        for (state, (end, _)) in &walks.ends {
            // Nobody finds out after a format that the volume cannot be staged.
            if let (Ok(Some(StageStep::MakeFilesystem { .. } | StageStep::Encrypt { .. })), End::Refused(..)) = (state.next(&want), end) {
                panic!("formatted, then refused: {state:?}: {end:?}");
            }
        }
        seen.extend(walks.ends.keys().step_by(7).map(|state| state.seen(&want)));
    }
    assert_nothing_was_missed(&seen);
}

/// The same of everything that can be seen, whether a toy shows it or not: each answer is one that is harmless there.
#[test]
fn staging_decides_harmlessly_whatever_is_seen() {
    let mut decided = 0;
    for want in every_request() {
        for mount in every_mount() {
            for disk in every_disk() {
                for mapping in every_mapping() {
                    for surface in every_surface() {
                        for inside in every_surface() {
                            for growth in every_growth() {
                                let (mount, mapping, surface) = (mount.clone(), mapping.clone(), surface.clone());
                                let seen = StageSeen { mount, disk, mapping, surface, inside: inside.clone(), growth };
                                assert_harmless(&want, &seen);
                                decided += 1;
                            }
                        }
                    }
                }
            }
        }
    }
    assert_eq!(decided, 16 * 5 * 4 * 5 * 7 * 7 * 3);
}

fn assert_harmless(want: &StageRequest, seen: &StageSeen) {
    let StageSeen { mount, disk, mapping, surface, inside, growth } = seen;
    let is_encrypted = want.encryption.is_some();
    let step = match next_stage_step(want, seen) {
        Err(refusal) => return assert_says_its_subject(&refusal),
        Ok(step) => step,
    };
    let is_left = *mount == Mount::Gone || (matches!(mount, Mount::Stale(_)) && want.access != Access::Block);
    assert_eq!(step == Some(StageStep::Unmount), is_left, "{step:?} at {seen:?}");
    assert!(is_left || matches!(mount, Mount::None | Mount::Ours), "{step:?} at {seen:?}");
    let is_ready = matches!(disk, Disk::Ready { .. });
    let is_open = matches!(mapping, Mapping::Open { .. });
    let place = if is_encrypted { inside } else { surface };
    let may = matches!(want.format, Format::May(_)) && *disk == (Disk::Ready { read_only: false }) && *mount == Mount::None;
    let from = |unfinished: bool| if unfinished { Surface::Unfinished } else { Surface::Blank };
    let is_right = match step {
        None => is_ready && is_encrypted == is_open && (want.access == Access::Block) == (*mount == Mount::None),
        Some(StageStep::Unmount) => is_left,
        Some(StageStep::FindDisk) => *disk == Disk::NotYet,
        Some(StageStep::SetRunning) => *disk == Disk::Offline,
        Some(StageStep::Probe) => is_ready && *surface == Surface::Unread && *mapping == Mapping::None,
        Some(StageStep::Encrypt { unfinished }) => may && is_encrypted && *mapping == Mapping::None && *surface == from(unfinished),
        Some(StageStep::Open) => is_ready && is_encrypted && *mapping == Mapping::None && *surface == Surface::Luks,
        Some(StageStep::CloseLeftover) => is_encrypted && *mapping == Mapping::Leftover && *mount == Mount::None,
        Some(StageStep::GrowMapping) => is_encrypted && *mapping == Mapping::Open { short: true },
        Some(StageStep::ProbeInside) => is_encrypted && is_open && *inside == Surface::Unread,
        Some(StageStep::MakeFilesystem { unfinished, .. }) => may && is_encrypted == is_open && *place == from(unfinished),
        Some(StageStep::Mount(by)) => {
            let fits = matches!((place, by), (Surface::Ext(_), Filesystem::Ext4) | (Surface::Xfs, Filesystem::Xfs));
            fits && is_ready && is_encrypted == is_open && *mount == Mount::None
        }
        Some(StageStep::Grow) => *mount == Mount::Ours && *growth == Growth::Room && is_encrypted == is_open,
    };
    assert!(is_right, "{step:?} at {seen:?} of {want:?}");
}
