//! Unpublish: what is mounted at the target path, one above another, and what is below.

use super::*;

/// A mount at the target path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum On {
    Shown { read_only: bool },
    Gone,
    Stranger,
}
every!(every_on -> On {
    On::Shown { .. } => [On::Shown { read_only: false }, On::Shown { read_only: true }],
    On::Gone => [On::Gone],
    On::Stranger => [On::Stranger],
});

/// The target path itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Under {
    Absent,
    Folder,
    FullFolder,
    File,
    /// With bytes in it; a link, a socket.
    Other,
}
every!(every_under -> Under {
    Under::Absent => [Under::Absent],
    Under::Folder => [Under::Folder],
    Under::FullFolder => [Under::FullFolder],
    Under::File => [Under::File],
    Under::Other => [Under::Other],
});

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct World {
    /// The lower one, and the one above it.
    mounts: [Option<On>; 2],
    under: Under,
}

impl World {
    fn top(&self) -> Option<On> {
        self.mounts.into_iter().flatten().last()
    }
}

impl Toy for World {
    type Want = ();
    type Step = UnpublishStep;

    fn next(&self, (): &()) -> Result<Option<UnpublishStep>, Refusal> {
        next_unpublish_step(&match (self.top(), self.under) {
            (Some(On::Shown { read_only }), _) => Target::Shows { read_only },
            (Some(On::Gone), _) => Target::ShowsGone,
            (Some(On::Stranger), _) => Target::Other("tmpfs is mounted there".into()),
            (None, Under::Absent) => Target::Absent,
            (None, Under::Folder | Under::FullFolder) => Target::Folder,
            (None, Under::File) => Target::File,
            (None, Under::Other) => Target::Other("a file of 7 bytes".into()),
        })
    }

    fn perform(mut self, (): &(), step: UnpublishStep) -> Result<Self, &'static str> {
        match (step, self.top()) {
            (UnpublishStep::Unmount, Some(On::Shown { .. } | On::Gone)) => {
                self.mounts = [self.mounts[0].filter(|_| self.mounts[1].is_some()), None];
            }
            // rmdir(2) refuses by itself: nothing that a pod or somebody else wrote there goes.
            (UnpublishStep::RemoveFolder, None) if self.under == Under::FullFolder => return Err("ENOTEMPTY"),
            (UnpublishStep::RemoveFolder, None) if self.under == Under::Folder => self.under = Under::Absent,
            (UnpublishStep::RemoveFile, None) if self.under == Under::File => self.under = Under::Absent,
            (UnpublishStep::Unmount | UnpublishStep::RemoveFolder | UnpublishStep::RemoveFile, _) => panic!("{step:?}: {self:?}"),
        }
        Ok(self)
    }

    fn cut(self, (): &(), _: UnpublishStep) -> Vec<Self> {
        // One system call each.
        Vec::new()
    }

    fn forget(self) -> Self {
        self
    }

    fn happenings(self) -> Vec<Self> {
        let gone = |on: Option<On>| if let Some(On::Shown { .. }) = on { Some(On::Gone) } else { on };
        vec![Self { mounts: self.mounts.map(gone), ..self }]
    }

    fn assert_done(&self, (): &()) {
        assert_eq!((self.mounts, self.under), ([None, None], Under::Absent));
    }

    fn is_tried_again(&self, _: UnpublishStep) -> bool {
        false
    }
}

#[test]
fn unpublishing_ends_from_everywhere_with_nothing_left() {
    let mut worlds: Vec<World> = every_under().into_iter().map(|under| World { mounts: [None, None], under }).collect();
    // Something can be mounted on what is there only.
    for under in every_under().into_iter().filter(|under| *under != Under::Absent) {
        for lower in every_on() {
            worlds.push(World { mounts: [Some(lower), None], under });
            worlds.extend(every_on().into_iter().map(|upper| World { mounts: [Some(lower), Some(upper)], under }));
        }
    }
    assert_eq!(worlds.len(), 5 + 4 * (4 + 16));
    let walks = Walks::all(&(), &worlds);
    for world in &worlds {
        let (end, _) = &walks.ends[world];
        let is_stranger = world.mounts.contains(&Some(On::Stranger)) || world.under == Under::Other;
        let is_right = match end {
            End::Done(_) => !is_stranger && world.under != Under::FullFolder,
            End::Refused(refusal, _) => is_stranger && matches!(refusal, Refusal::TargetTaken { .. }),
            End::Failed(_, left) => !is_stranger && left.under == Under::FullFolder,
        };
        assert!(is_right, "{end:?} from {world:?}");
    }
    // And of all that can be seen, whatever a toy shows.
    for target in every_target() {
        if let Err(refusal) = next_unpublish_step(&target) {
            assert_says_its_subject(&refusal);
            assert!(matches!(target, Target::Other(_)));
        }
    }
}
