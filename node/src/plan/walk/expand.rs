//! Expand: the disk's size on the hypervisor, as the kernel knows it, its mapping's, the filesystem's.

use super::*;

/// At the volume path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum At {
    Nothing,
    Gone,
    Stranger,
    Device,
    Filesystem(Kind),
}
every!(every_at -> At {
    At::Nothing => [At::Nothing],
    At::Gone => [At::Gone],
    At::Stranger => [At::Stranger],
    At::Device => [At::Device],
    At::Filesystem(_) => [
        At::Filesystem(Kind::Grows), At::Filesystem(Kind::Tail), At::Filesystem(Kind::Stuck), At::Filesystem(Kind::ReadOnly),
        At::Filesystem(Kind::Unknown),
    ],
});

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Grows,
    /// What is left is less than a block group: the kernel grows nothing, and says nothing.
    Tail,
    /// The kernel refuses.
    Stuck,
    ReadOnly,
    /// None that we grow.
    Unknown,
}

/// Sizes are from 1 to this.
const LARGEST: u64 = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct World {
    at: At,
    /// On the hypervisor.
    real: u64,
    /// As the kernel knows it.
    known: u64,
    mapping: Option<u64>,
    mapping_grows: bool,
    filesystem: u64,
    /// To what the filesystem was asked to grow.
    tried: Option<u64>,
}

impl World {
    fn below(&self) -> u64 {
        self.mapping.unwrap_or(self.known)
    }

    fn growth(&self, kind: Kind) -> Growth {
        match kind {
            Kind::ReadOnly | Kind::Unknown => Growth::Full,
            _ if self.filesystem >= self.below() => Growth::Full,
            Kind::Tail if self.tried.is_some() => Growth::Tried,
            Kind::Grows | Kind::Tail | Kind::Stuck => Growth::Room,
        }
    }
}

fn every_request() -> Vec<ExpandRequest> {
    let required = (1..=LARGEST + 1).map(Some).chain([None]);
    required.map(|required_bytes| ExpandRequest { volume: volume(), path: "/t".into(), required_bytes }).collect()
}

impl Toy for World {
    type Want = ExpandRequest;
    type Step = ExpandStep;

    fn next(&self, want: &ExpandRequest) -> Result<Option<ExpandStep>, Refusal> {
        let shown = match self.at {
            At::Nothing => Shown::NotOurs("nothing is mounted there".into()),
            At::Gone => Shown::NotOurs("its disk is no longer there".into()),
            At::Stranger => Shown::NotOurs("tmpfs is mounted there".into()),
            At::Device => Shown::Device,
            At::Filesystem(Kind::Unknown) => return Err(Refusal::NoGrowing { fstype: "btrfs".into() }),
            At::Filesystem(kind) => Shown::Filesystem(self.growth(kind)),
        };
        let short = self.mapping.is_some_and(|mapping| mapping < self.known);
        next_expand_step(want, &ExpandSeen { shown, size_bytes: self.known, short })
    }

    fn perform(mut self, want: &ExpandRequest, step: ExpandStep) -> Result<Self, &'static str> {
        let is_large_enough = want.required_bytes.is_none_or(|required| self.known >= required);
        match (step, self.at) {
            (ExpandStep::AwaitSize { required_bytes }, At::Device | At::Filesystem(_)) => {
                assert_eq!(Some(required_bytes), want.required_bytes);
                if self.real < required_bytes {
                    return Err("the kernel does not see the new size");
                }
                self.known = self.real;
            }
            // The disk, its mapping, the filesystem in it: in this order.
            (ExpandStep::GrowMapping, At::Device | At::Filesystem(_)) => {
                assert!(is_large_enough && self.mapping.is_some_and(|mapping| mapping < self.known), "{self:?}");
                if !self.mapping_grows {
                    return Err("the mapping cannot grow");
                }
                self.mapping = Some(self.known);
            }
            (ExpandStep::Grow, At::Filesystem(kind)) => {
                assert!(is_large_enough && self.mapping.is_none_or(|mapping| mapping == self.known), "{self:?}");
                if self.tried.replace(self.below()) == Some(self.below()) {
                    return Err("not grown");
                }
                match kind {
                    Kind::Grows => self.filesystem = self.below(),
                    Kind::Tail | Kind::Stuck => (),
                    Kind::ReadOnly | Kind::Unknown => panic!("{step:?}: {self:?}"),
                }
            }
            (ExpandStep::AwaitSize { .. } | ExpandStep::GrowMapping | ExpandStep::Grow, _) => panic!("{step:?}: {self:?}"),
        }
        Ok(self)
    }

    fn cut(self, _: &ExpandRequest, _: ExpandStep) -> Vec<Self> {
        // The kernel grows as a whole or not at all: a journal stands behind it.
        Vec::new()
    }

    fn forget(self) -> Self {
        Self { tried: None, ..self }
    }

    fn happenings(self) -> Vec<Self> {
        let at = if matches!(self.at, At::Device | At::Filesystem(_)) { At::Gone } else { self.at };
        // The disk grows once more meanwhile, and the kernel hears of it by itself.
        vec![Self { at, ..self }, Self { real: LARGEST, ..self }, Self { real: LARGEST, known: LARGEST, ..self }]
    }

    fn assert_done(&self, want: &ExpandRequest) {
        assert!(want.required_bytes.is_none_or(|required| self.known >= required), "{self:?} of {want:?}");
        assert!(self.mapping.is_none_or(|mapping| mapping == self.known), "{self:?}");
        match self.at {
            At::Device | At::Filesystem(Kind::Tail | Kind::ReadOnly) => (),
            At::Filesystem(Kind::Grows | Kind::Stuck) => assert_eq!(self.filesystem, self.known, "{self:?}"),
            At::Nothing | At::Gone | At::Stranger | At::Filesystem(Kind::Unknown) => panic!("done: {self:?}"),
        }
    }

    fn is_tried_again(&self, step: ExpandStep) -> bool {
        step == ExpandStep::Grow && self.at == At::Filesystem(Kind::Tail)
    }
}

fn worlds() -> Vec<World> {
    let mut worlds = Vec::new();
    for at in every_at() {
        for real in 1..=LARGEST {
            for known in 1..=real {
                for mapping in (1..=known).map(Some).chain([None]) {
                    for mapping_grows in BOTH {
                        for filesystem in 1..=mapping.unwrap_or(known) {
                            worlds.push(World { at, real, known, mapping, mapping_grows, filesystem, tried: None });
                        }
                    }
                }
            }
        }
    }
    worlds
}

/// W46: the kernel's new size is waited for, through every layer.
#[test]
fn expanding_ends_from_everywhere_with_every_layer_grown() {
    let worlds = worlds();
    assert_eq!(worlds.len(), 9 * 2 * 25);
    for want in every_request() {
        let walks = Walks::all(&want, &worlds);
        for world in &worlds {
            let (end, _) = &walks.ends[world];
            let is_ours = matches!(world.at, At::Device | At::Filesystem(Kind::Grows | Kind::Tail | Kind::ReadOnly));
            let comes = want.required_bytes.is_none_or(|required| world.real >= required);
            // Whether the kernel knows already decides whether the mapping is short at all.
            if is_ours && comes && world.mapping_grows {
                assert!(matches!(end, End::Done(_)), "{end:?} from {world:?} of {want:?}");
            }
            if !comes {
                assert!(!matches!(end, End::Done(_)), "{end:?} from {world:?} of {want:?}");
            }
        }
    }
}

/// The same of everything that can be seen.
#[test]
fn expanding_waits_for_the_disk_before_it_grows() {
    let mut decided = 0;
    let every_shown = [Shown::NotOurs("nothing is mounted there".into()), Shown::Device];
    let every_shown = every_shown.into_iter().chain(every_growth().into_iter().map(Shown::Filesystem));
    for shown in every_shown {
        for want in every_request() {
            for size_bytes in 1..=LARGEST + 1 {
                for short in BOTH {
                    let seen = ExpandSeen { shown: shown.clone(), size_bytes, short };
                    let is_large_enough = want.required_bytes.is_none_or(|required| size_bytes >= required);
                    let is_ours = !matches!(shown, Shown::NotOurs(_));
                    let has_room = shown == Shown::Filesystem(Growth::Room);
                    let is_right = match next_expand_step(&want, &seen) {
                        Err(refusal) => {
                            assert_says_its_subject(&refusal);
                            !is_ours
                        }
                        Ok(Some(ExpandStep::AwaitSize { required_bytes })) => {
                            is_ours && !is_large_enough && Some(required_bytes) == want.required_bytes
                        }
                        Ok(Some(ExpandStep::GrowMapping)) => is_ours && is_large_enough && short,
                        Ok(Some(ExpandStep::Grow)) => is_large_enough && !short && has_room,
                        Ok(None) => is_ours && is_large_enough && !short && !has_room,
                    };
                    assert!(is_right, "{seen:?} of {want:?}");
                    decided += 1;
                }
            }
        }
    }
    assert_eq!(decided, 5 * 5 * 4 * 2);
}
