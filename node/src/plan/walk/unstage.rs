//! Unstage: what is mounted at the staging path, one above another; the mapping; who still holds the disk; the folder.

use super::*;

/// A mount at the staging path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum At {
    /// The volume's filesystem, and whether it lies in a mapping.
    Ours {
        inside: bool,
    },
    /// The same, its disk gone.
    Gone {
        inside: bool,
    },
    Stranger,
}
every!(every_at -> At {
    At::Ours { .. } => [At::Ours { inside: false }, At::Ours { inside: true }],
    At::Gone { .. } => [At::Gone { inside: false }, At::Gone { inside: true }],
    At::Stranger => [At::Stranger],
});

/// How the volume's disk is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Drive {
    /// By its serial.
    Serial,
    /// Attached by the reference driver: by its mount or its mapping alone.
    Legacy,
    Absent,
}
every!(every_drive -> Drive {
    Drive::Serial => [Drive::Serial],
    Drive::Legacy => [Drive::Legacy],
    Drive::Absent => [Drive::Absent],
});

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Map {
    None,
    /// Called by the volume's serial.
    Named,
    /// The reference driver's: called by the disk's name.
    Reference,
    /// A pod's own, or one that the node has activated by itself: it stays, and who uses it holds the disk.
    Foreign,
}
every!(every_map -> Map {
    Map::None => [Map::None],
    Map::Named => [Map::Named],
    Map::Reference => [Map::Reference],
    Map::Foreign => [Map::Foreign],
});

/// Somebody else's hold on the disk or a mapping over it: another mount namespace, a pod that it is shown to, a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Held {
    No,
    /// It ends just now.
    Soon,
    Stays,
}
every!(every_held -> Held {
    Held::No => [Held::No],
    Held::Soon => [Held::Soon],
    Held::Stays => [Held::Stays],
});

/// The staging path itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Folder {
    Absent,
    Empty,
    /// Empty, and cannot be removed.
    Stays,
    Full,
}
every!(every_folder -> Folder {
    Folder::Absent => [Folder::Absent],
    Folder::Empty => [Folder::Empty],
    Folder::Stays => [Folder::Stays],
    Folder::Full => [Folder::Full],
});

/// Whether the disk takes I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Power {
    On,
    Offline,
    /// Cannot be set running.
    Dead,
}
every!(every_power -> Power {
    Power::On => [Power::On],
    Power::Offline => [Power::Offline],
    Power::Dead => [Power::Dead],
});

/// `run::stage::Known`, and what `unstage_on` remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Memory {
    disk: bool,
    mapping: bool,
    folder_stays: bool,
    was_set_running: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct World {
    /// The lower one, and the one above it.
    mounts: [Option<At>; 2],
    drive: Drive,
    power: Power,
    map: Map,
    held: Held,
    folder: Folder,
    memory: Memory,
}

impl World {
    fn top(&self) -> Option<At> {
        self.mounts.into_iter().flatten().last()
    }

    /// What the next look adds to what is known.
    fn known(&self) -> Memory {
        let is_mounted = matches!(self.top(), Some(At::Ours { .. }));
        let is_mapped = matches!(self.top(), Some(At::Ours { inside: true } | At::Gone { inside: true }));
        let by_mapping = self.top().is_none() && self.map == Map::Named && self.drive != Drive::Absent;
        Memory {
            disk: self.memory.disk || is_mounted || by_mapping || self.drive == Drive::Serial,
            mapping: self.memory.mapping || is_mapped,
            ..self.memory
        }
    }

    fn is_offline(&self) -> bool {
        self.known().disk && self.drive != Drive::Absent && self.power != Power::On
    }

    fn is_mapping_found(&self) -> bool {
        let known = self.known();
        match self.map {
            Map::None | Map::Foreign => false,
            Map::Named => true,
            Map::Reference => known.mapping || (known.disk && self.drive != Drive::Absent),
        }
    }
}

impl Toy for World {
    type Want = ();
    type Step = UnstageStep;

    fn next(&self, (): &()) -> Result<Option<UnstageStep>, Refusal> {
        let mount = match self.top() {
            None => Mount::None,
            Some(At::Ours { .. }) => Mount::Ours,
            Some(At::Gone { .. }) => Mount::Gone,
            Some(At::Stranger) => Mount::Stranger("tmpfs".into()),
        };
        let is_clear = mount == Mount::None;
        let mapped = is_clear && self.is_mapping_found();
        // Of a disk that takes no I/O too: the kernel claims it for the opener (EBUSY) before it asks the disk (ENXIO).
        let held = is_clear && !mapped && self.known().disk && self.drive != Drive::Absent && self.held != Held::No;
        let (offline, dead) = (self.is_offline() && !self.memory.was_set_running, self.is_offline() && self.memory.was_set_running);
        let empty_folder = is_clear && matches!(self.folder, Folder::Empty | Folder::Stays) && !self.memory.folder_stays;
        next_unstage_step(&UnstageSeen { mount, mapped, held, offline, dead, empty_folder })
    }

    fn perform(mut self, (): &(), step: UnstageStep) -> Result<Self, &'static str> {
        self.memory = self.known();
        match step {
            UnstageStep::SetRunning => {
                assert!(self.is_offline() && self.top() != Some(At::Stranger), "{self:?}");
                self.memory.was_set_running = true;
                if self.power == Power::Offline {
                    self.power = Power::On;
                }
            }
            UnstageStep::Delete => {
                let is_unused = self.top().is_none() && !self.is_mapping_found() && self.held == Held::No;
                assert!(is_unused && self.power == Power::Dead, "deleted what is in use: {self:?}");
                self.drive = Drive::Absent;
            }
            UnstageStep::Unmount => {
                assert!(matches!(self.top(), Some(At::Ours { .. } | At::Gone { .. })), "unmounted what is not ours: {self:?}");
                self.mounts = [self.mounts[0].filter(|_| self.mounts[1].is_some()), None];
            }
            UnstageStep::Close => {
                assert_eq!(self.top(), None, "closed what is mounted: {self:?}");
                assert!(matches!(self.map, Map::Named | Map::Reference), "closed what is not ours: {self:?}");
                match self.held {
                    Held::Stays => return Err("still held"),
                    Held::No | Held::Soon => (self.map, self.held) = (Map::None, Held::No),
                }
            }
            UnstageStep::AwaitRelease => match self.held {
                Held::Stays => return Err("still held"),
                Held::No | Held::Soon => self.held = Held::No,
            },
            UnstageStep::RemoveFolder => {
                self.memory.folder_stays = true;
                match self.folder {
                    Folder::Empty => self.folder = Folder::Absent,
                    Folder::Stays => (),
                    Folder::Absent | Folder::Full => panic!("removed what is no empty folder: {self:?}"),
                }
            }
        }
        Ok(self)
    }

    fn cut(self, (): &(), _: UnstageStep) -> Vec<Self> {
        // One system call each.
        Vec::new()
    }

    fn forget(self) -> Self {
        Self { memory: Memory::default(), ..self }
    }

    /// A disk without serial, once it is not mounted, is one of many to a new process: what is still held of it, or open over it
    /// by the reference driver's name, is not found again.
    fn is_known_to_this_process_alone(&self) -> bool {
        let is_passing = self.drive == Drive::Legacy || (self.drive == Drive::Absent && self.map == Map::Reference);
        is_passing && (self.held != Held::No || self.map == Map::Reference || self.power != Power::On)
    }

    fn happenings(self) -> Vec<Self> {
        let gone = |at: Option<At>| match at {
            Some(At::Ours { inside }) => Some(At::Gone { inside }),
            other => other,
        };
        vec![Self { mounts: self.mounts.map(gone), drive: Drive::Absent, ..self }]
    }

    fn assert_done(&self, (): &()) {
        assert_eq!(self.mounts, [None, None], "{self:?}");
        assert!(!self.is_mapping_found() && self.map != Map::Named, "left open: {self:?}");
        assert!(!self.known().disk || self.drive == Drive::Absent || self.held == Held::No, "still held: {self:?}");
        assert_ne!(self.folder, Folder::Empty, "{self:?}");
    }

    fn is_tried_again(&self, step: UnstageStep) -> bool {
        step == UnstageStep::RemoveFolder && self.folder == Folder::Stays
    }
}

fn worlds() -> Vec<World> {
    let mut stacks = vec![[None, None]];
    for lower in every_at() {
        stacks.push([Some(lower), None]);
        stacks.extend(every_at().into_iter().map(|upper| [Some(lower), Some(upper)]));
    }
    let mut worlds = Vec::new();
    for mounts in stacks {
        for (drive, power) in every_drive().into_iter().flat_map(|drive| every_power().into_iter().map(move |power| (drive, power))) {
            for map in every_map() {
                for held in every_held() {
                    for folder in every_folder() {
                        worlds.push(World { mounts, drive, power, map, held, folder, memory: Memory::default() });
                    }
                }
            }
        }
    }
    worlds
}

/// W12: nothing but the volume's own mount, mapping and disk; W32: no mapping is left.
#[test]
fn unstaging_ends_from_everywhere_with_nothing_held() {
    let worlds = worlds();
    assert_eq!(worlds.len(), (1 + 5 + 25) * 3 * 3 * 4 * 3 * 4);
    let walks = Walks::all(&(), &worlds);
    for world in &worlds {
        let (end, _) = &walks.ends[world];
        let stranger = world.mounts.contains(&Some(At::Stranger));
        let is_right = match end {
            End::Done(_) => !stranger,
            End::Refused(Refusal::OtherMount { .. }, left) => stranger && left.top() == Some(At::Stranger),
            End::Refused(..) => false,
            // Never answered with OK while somebody may still write.
            End::Failed(_, _) => !stranger && world.held == Held::Stays,
        };
        assert!(is_right, "{end:?} from {world:?}");
    }
}

/// The same of everything that can be seen.
#[test]
fn unstaging_decides_harmlessly_whatever_is_seen() {
    let mut decided = 0;
    for mount in every_mount() {
        for bits in 0..32 {
            let [mapped, held, empty_folder, offline, dead] = [1, 2, 4, 8, 16].map(|bit| bits & bit != 0);
            let seen = UnstageSeen { mount: mount.clone(), mapped, held, offline, dead, empty_folder };
            let is_clear = mount == Mount::None && !offline && !mapped;
            let is_right = match next_unstage_step(&seen) {
                Err(refusal) => {
                    assert_says_its_subject(&refusal);
                    matches!(mount, Mount::Stranger(_) | Mount::Stale(_))
                }
                Ok(Some(UnstageStep::SetRunning)) => offline && matches!(mount, Mount::None | Mount::Ours | Mount::Gone),
                Ok(Some(UnstageStep::Unmount)) => matches!(mount, Mount::Ours | Mount::Gone) && !offline,
                Ok(Some(UnstageStep::Close)) => mount == Mount::None && mapped && !offline,
                Ok(Some(UnstageStep::Delete)) => is_clear && dead && !held,
                Ok(Some(UnstageStep::AwaitRelease)) => is_clear && held,
                Ok(Some(UnstageStep::RemoveFolder)) => is_clear && !dead && !held && empty_folder,
                Ok(None) => is_clear && !dead && !held && !empty_folder,
            };
            assert!(is_right, "{seen:?}");
            decided += 1;
        }
    }
    assert_eq!(decided, 5 * 32);
}
