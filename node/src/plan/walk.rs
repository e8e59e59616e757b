//! Every planner from every state there is: toy worlds, one for each call, in which a step does what the real one does.
//!
//! Shown of each state: the call ends within a named number of turns, done or with a sentence; nothing is destroyed that was not
//! read as blank or as our own unfinished format, and nothing touched that is not ours (the toys' `perform`); a process that dies
//! before, inside or after any step, and a call repeated then, end as the first one would have; a call repeated after its end finds
//! all done. What is new in a plan's types does not compile here ([`every`]), and no list can shrink unseen: states are counted.

mod expand;
mod publish;
pub(super) mod stage;
mod unpublish;
mod unstage;

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;

use super::*;
use crate::identity::Want;
use crate::request::Volume;

/// More turns than any honest way through needs: clear the path, find the disk, set it running, close what is left, probe, encrypt, probe, open, grow
/// the mapping, probe inside, make the filesystem, probe inside, mount, grow.
pub(super) const MAX_TURNS: usize = 14;

/// Each variant of an enum with its values; one that is not named does not compile, and a value under a wrong name panics.
macro_rules! every {
    ($visible:vis $name:ident -> $of:ty { $($variant:pat => [$($value:expr),+ $(,)?]),+ $(,)? }) => {
        $visible fn $name() -> Vec<$of> {
            let is_named = |value: &$of| match value { $($variant => ()),+ };
            let mut all: Vec<$of> = Vec::new();
            $(for value in [$($value),+] {
                assert!(matches!(&value, $variant), "{value:?} is listed as another variant");
                is_named(&value);
                all.push(value);
            })+
            all
        }
    };
}
use every;

every!(pub(super) every_mount -> Mount {
    Mount::None => [Mount::None],
    Mount::Ours => [Mount::Ours],
    Mount::Gone => [Mount::Gone],
    Mount::Stale(_) => [Mount::Stale("ext4 from /dev/sdb (8:16)".into())],
    Mount::Stranger(_) => [Mount::Stranger("tmpfs from none (0:42)".into())],
});
every!(pub(super) every_disk -> Disk {
    Disk::NotYet => [Disk::NotYet],
    Disk::Offline => [Disk::Offline],
    Disk::Ready { .. } => [Disk::Ready { read_only: false }, Disk::Ready { read_only: true }],
});
every!(pub(super) every_mapping -> Mapping {
    Mapping::None => [Mapping::None],
    Mapping::Open { .. } => [Mapping::Open { short: false }, Mapping::Open { short: true }],
    Mapping::Leftover => [Mapping::Leftover],
    Mapping::Strange(_) => [Mapping::Strange("x is over it, and its cipher is y".into())],
});
every!(pub(super) every_surface -> Surface {
    Surface::Unread => [Surface::Unread],
    Surface::Blank => [Surface::Blank],
    Surface::Unfinished => [Surface::Unfinished],
    Surface::Ext(_) => [Surface::Ext("ext3".into())],
    Surface::Xfs => [Surface::Xfs],
    Surface::Luks => [Surface::Luks],
    Surface::Other(_) => [Surface::Other("btrfs".into())],
});
every!(pub(super) every_growth -> Growth {
    Growth::Full => [Growth::Full],
    Growth::Room => [Growth::Room],
    Growth::Tried => [Growth::Tried],
});
every!(pub(super) every_target -> Target {
    Target::Absent => [Target::Absent],
    Target::Folder => [Target::Folder],
    Target::File => [Target::File],
    Target::Shows { .. } => [Target::Shows { read_only: false }, Target::Shows { read_only: true }],
    Target::ShowsGone => [Target::ShowsGone],
    Target::Stale => [Target::Stale],
    Target::Other(_) => [Target::Other("a symbolic link".into())],
});

pub(super) const BOTH: [bool; 2] = [false, true];

pub(super) fn volume() -> Volume {
    let handle: proto::VolumeHandle = "r/z/s/vm-9999-pvc-1".parse().unwrap();
    Volume { serial: handle.serial(), handle }
}

pub(super) fn disk() -> Want {
    Want { serial: volume().serial, serial_promised: true, wwid: None, lun: Some(1), size_bytes: None }
}

/// A refusal says what it is about, and where something was seen, what: by each variant's own words.
fn assert_says_its_subject(refusal: &Refusal) {
    let text = refusal.to_string();
    let words: Vec<&str> = match refusal {
        Refusal::OtherMount { what } | Refusal::HoldsOther { what } | Refusal::StrangeMapping { what } => {
            vec![what, "the path", "the disk"]
        }
        Refusal::InPlain { what } | Refusal::TargetTaken { what } | Refusal::NotPublishedHere { what } => {
            vec![what, "target_path", "volume"]
        }
        Refusal::NeverFormat { why } | Refusal::NeverFinish { why } => vec![why, "the disk holds"],
        Refusal::DiskGone => vec!["the volume", "disk", "unstage"],
        Refusal::StagedAsFilesystem => vec!["the volume", "filesystem", "block device"],
        Refusal::ReadOnlyBlank => vec!["the disk", "refuses writes"],
        Refusal::NoPassphrase => vec!["the volume", "LUKS", proto::secrets::PASSPHRASE],
        Refusal::NotOpen => vec!["the volume", "encrypted", "staged first"],
        Refusal::NotStaged => vec!["the volume", "staging_target_path"],
        Refusal::OtherMode { .. } => vec!["the volume", "target_path", "writable", "read-only"],
        Refusal::SecondTarget { at } => vec!["the volume", "SINGLE_NODE_SINGLE_WRITER", at.to_str().unwrap()],
        Refusal::NoGrowing { fstype } => vec!["the volume", fstype],
    };
    let (what, about) = words.split_first().unwrap();
    assert!(!what.is_empty() && text.contains(what), "{what:?} is not in {text:?}");
    assert!(about.iter().any(|word| text.contains(word)), "none of {about:?} is in {text:?}");
}

/// One call, and what it meets: what is really there, and what the call remembers between its turns.
pub(super) trait Toy: Copy + Eq + Hash + Debug {
    type Want: Debug;
    type Step: Copy + Debug;

    /// Looks as `run` does, and asks the plan.
    fn next(&self, want: &Self::Want) -> Result<Option<Self::Step>, Refusal>;

    /// The deed; fails the test where it must not be done. `Err`: it fails, and may be repeated.
    fn perform(self, want: &Self::Want, step: Self::Step) -> Result<Self, &'static str>;

    /// What is there if the process dies inside the deed; beside "nothing yet" and "all of it".
    fn cut(self, want: &Self::Want, step: Self::Step) -> Vec<Self>;

    /// Another process, which remembers nothing.
    fn forget(self) -> Self;

    /// Whether what only that process knew makes a difference: a named limit of the driver.
    fn is_known_to_this_process_alone(&self) -> bool {
        false
    }

    /// What may happen from outside: from each of these the call ends too.
    fn happenings(self) -> Vec<Self>;

    /// What must be so when the call has answered OK.
    fn assert_done(&self, want: &Self::Want);

    /// What a call that is repeated after its success does once more: what did not work, and was not required.
    fn is_tried_again(&self, step: Self::Step) -> bool;
}

/// How a call ended, and what is left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End<T> {
    Done(T),
    Refused(Refusal, T),
    Failed(&'static str, T),
}

/// All walks of one request.
pub(super) struct Walks<'a, T: Toy> {
    want: &'a T::Want,
    /// Of each state: its end, and how many turns it takes.
    pub(super) ends: HashMap<T, (End<T>, usize)>,
    order: Vec<T>,
    refusals: Vec<Refusal>,
}

impl<'a, T: Toy> Walks<'a, T> {
    /// From each of these states, and from each that comes of them when a process dies or something happens from outside.
    pub(super) fn all(want: &'a T::Want, from: &[T]) -> Self {
        let mut walks = Self { want, ends: HashMap::new(), order: Vec::new(), refusals: Vec::new() };
        for state in from {
            walks.end(*state);
        }
        let mut at = 0;
        while let Some(state) = walks.order.get(at).copied() {
            walks.disturb(state);
            at += 1;
        }
        walks
    }

    fn end(&mut self, state: T) -> End<T> {
        let (mut path, mut at) = (Vec::new(), state);
        let (end, mut turns) = loop {
            if let Some((end, turns)) = self.ends.get(&at) {
                break (end.clone(), *turns);
            }
            path.push(at);
            assert!(path.len() <= MAX_TURNS + 1, "no end within {MAX_TURNS} turns of {:?}: {path:#?}", self.want);
            match at.next(self.want) {
                Err(refusal) => break (End::Refused(self.said(refusal), at.forget()), 0),
                Ok(None) => break (End::Done(at.forget()), 0),
                Ok(Some(step)) => match at.perform(self.want, step) {
                    Err(why) => break (End::Failed(why, at.forget()), 0),
                    Ok(next) => {
                        assert_ne!(next, at, "{step:?} changes nothing: {:?}", self.want);
                        at = next;
                    }
                },
            }
        };
        for passed in path.into_iter().rev() {
            turns += 1;
            assert!(turns <= MAX_TURNS + 1, "{turns} turns from {passed:?} of {:?}", self.want);
            self.ends.insert(passed, (end.clone(), turns));
            self.order.push(passed);
        }
        end
    }

    fn said(&mut self, refusal: Refusal) -> Refusal {
        if !self.refusals.contains(&refusal) {
            assert_says_its_subject(&refusal);
            self.refusals.push(refusal.clone());
        }
        refusal
    }

    fn disturb(&mut self, state: T) {
        for happened in state.happenings() {
            self.end(happened);
        }
        let end = self.end(state);
        let mut others = vec![state.forget()];
        match state.next(self.want) {
            Ok(Some(step)) => {
                others.extend(state.cut(self.want, step));
                others.extend(state.perform(self.want, step).ok().map(T::forget));
            }
            Ok(None) => {
                state.assert_done(self.want);
                let again = state.forget().next(self.want);
                let is_at_once = match again {
                    Ok(Some(step)) => state.is_tried_again(step) || state.is_known_to_this_process_alone(),
                    Ok(None) => true,
                    Err(_) => false,
                };
                assert!(is_at_once, "repeated after done: {again:?} from {state:?} of {:?}", self.want);
            }
            Err(_) => (),
        }
        for other in others {
            let again = self.end(other.forget());
            if !state.is_known_to_this_process_alone() {
                assert_eq!(again, end, "repeated from {other:?}, which a dead process left of {state:?}: {:?}", self.want);
            }
        }
    }

    /// How many end with success.
    pub(super) fn done(&self) -> usize {
        self.ends.values().filter(|(end, _)| matches!(end, End::Done(_))).count()
    }
}
