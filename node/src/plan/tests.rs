//! Each walk starts from every state there is and lets a toy world do what the plan says: it must end, soon, staged or
//! refused, and nothing may be destroyed that was not proven blank.

use super::*;
use crate::identity::Want;
use crate::request::{Volume, Zeroed};
use crate::sys::mount::Options;

/// More turns than any honest way through needs.
const MAX_TURNS: usize = 8;

fn volume() -> Volume {
    let handle: proto::VolumeHandle = "r/z/s/vm-9999-pvc-1".parse().unwrap();
    Volume { serial: handle.serial(), handle }
}

fn disk() -> Want {
    Want { serial: volume().serial, serial_promised: true, wwid: None, lun: Some(1), size_bytes: None }
}

fn stage_wants() -> Vec<StageRequest> {
    let mut wants = Vec::new();
    for access in [Access::Block, Access::Filesystem(Options::default())] {
        for format in [Format::May(FormatOptions::default()), Format::Never("static".into())] {
            for zeroed in [Zeroed::Yes, Zeroed::No, Zeroed::Unknown] {
                for grow_required in [false, true] {
                    let (access, format) = (access.clone(), format.clone());
                    wants.push(StageRequest {
                        volume: volume(),
                        staging: "/s".into(),
                        access,
                        fstype: None,
                        disk: disk(),
                        format,
                        zeroed,
                        grow_required,
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

/// What is really on the toy's disk; a format that is cut short leaves `Unfinished`.
fn surfaces() -> Vec<Surface> {
    vec![Surface::Blank, Surface::Unfinished, Surface::Ext("ext3".into()), Surface::Xfs, Surface::Other("btrfs".into())]
}

/// The world after `step`, the last format being cut short or not.
fn staged_further(seen: &mut StageSeen, on_disk: &mut Surface, step: StageStep, cut_short: bool) {
    match step {
        StageStep::FindDisk => seen.disk = Disk::Offline,
        StageStep::SetRunning => seen.disk = Disk::Ready { read_only: false },
        StageStep::Probe => seen.surface = on_disk.clone(),
        StageStep::MakeFilesystem { unfinished, .. } => {
            assert_eq!(on_disk, if unfinished { &Surface::Unfinished } else { &Surface::Blank }, "destroyed what was not blank");
            *on_disk = if cut_short { Surface::Unfinished } else { Surface::Ext("ext4".into()) };
            seen.surface = Surface::Unread;
        }
        StageStep::Mount(by) => {
            let right = matches!((&on_disk, by), (Surface::Ext(_), Filesystem::Ext4) | (Surface::Xfs, Filesystem::Xfs));
            assert!(right, "mounted {on_disk:?} by {by:?}");
            seen.mount = Mount::Ours;
            seen.growth = Growth::Room;
        }
        StageStep::Grow => seen.growth = Growth::Tried,
    }
}

#[test]
fn staging_ends_from_everywhere_and_destroys_only_blanks() {
    let (mut walks, mut staged, mut formats) = (0, 0, 0);
    for want in stage_wants() {
        for mount in mounts() {
            for disk in disks() {
                for on_disk in surfaces() {
                    for growth in [Growth::Full, Growth::Room, Growth::Tried] {
                        for cut_short in [false, true] {
                            walks += 1;
                            let mut on_disk = on_disk.clone();
                            let mut seen = StageSeen { mount: mount.clone(), disk, surface: Surface::Unread, growth };
                            let mut formatted = 0;
                            let mut turns = 0;
                            let end = loop {
                                turns += 1;
                                assert!(turns <= MAX_TURNS + 2 * usize::from(cut_short), "no end from {mount:?} {disk:?} {on_disk:?}");
                                match next_stage_step(&want, &seen) {
                                    Ok(Some(step)) => {
                                        let makes = matches!(step, StageStep::MakeFilesystem { .. });
                                        assert!(!makes || matches!(want.format, Format::May(_)), "formatted what may never be");
                                        staged_further(&mut seen, &mut on_disk, step, cut_short && formatted == 0);
                                        formatted += u32::from(makes);
                                    }
                                    Ok(None) => break Ok(()),
                                    Err(refusal) => break Err(refusal),
                                }
                            };
                            formats += formatted;
                            if let Err(refusal) = end {
                                assert!(!refusal.to_string().is_empty());
                            } else {
                                staged += 1;
                                let mounted = seen.mount == Mount::Ours;
                                assert_eq!(mounted, matches!(want.access, Access::Filesystem(_)));
                                assert!(matches!(seen.disk, Disk::Ready { .. }));
                            }
                        }
                    }
                }
            }
        }
    }
    assert_eq!(walks, 24 * 4 * 4 * 5 * 3 * 2);
    assert!(staged > walks / 8 && formats > 100, "{staged} of {walks} staged, {formats} formats: the walk reached the good cases");
}

#[test]
fn a_repeated_stage_looks_once_and_does_nothing() {
    for want in stage_wants() {
        let mount = if want.access == Access::Block { Mount::None } else { Mount::Ours };
        let seen = StageSeen { mount, disk: Disk::Ready { read_only: false }, surface: Surface::Unread, growth: Growth::Full };
        assert_eq!(next_stage_step(&want, &seen), Ok(None));
    }
}

#[test]
fn a_foreign_mount_is_never_touched() {
    let stranger = || Mount::Stranger("ext4 from /dev/vda1".into());
    for disk in disks() {
        for want in stage_wants() {
            let seen = StageSeen { mount: stranger(), disk, surface: Surface::Blank, growth: Growth::Room };
            assert!(matches!(next_stage_step(&want, &seen), Err(Refusal::OtherMount { .. })));
        }
    }
    for (held, empty_folder) in [(false, false), (true, false), (false, true), (true, true)] {
        let seen = UnstageSeen { mount: stranger(), held, empty_folder };
        assert!(matches!(next_unstage_step(&seen), Err(Refusal::OtherMount { .. })));
    }
    assert!(matches!(next_unpublish_step(&Target::Other("tmpfs".into())), Err(Refusal::TargetTaken { .. })));
}

#[test]
fn unstaging_ends_from_everywhere_with_nothing_held() {
    for mount in mounts() {
        for held in [false, true] {
            for empty_folder in [false, true] {
                let mut seen = UnstageSeen { mount: mount.clone(), held, empty_folder };
                let mut turns = 0;
                while let Ok(Some(step)) = next_unstage_step(&seen) {
                    turns += 1;
                    assert!(turns <= MAX_TURNS);
                    match step {
                        UnstageStep::Unmount => seen.mount = Mount::None,
                        UnstageStep::AwaitRelease => seen.held = false,
                        UnstageStep::RemoveFolder => seen.empty_folder = false,
                    }
                }
                let stranger = matches!(mount, Mount::Stranger(_));
                assert!(stranger || seen == UnstageSeen { mount: Mount::None, held: false, empty_folder: false });
            }
        }
    }
}

fn targets() -> Vec<Target> {
    let shows = |read_only| Target::Shows { read_only };
    vec![Target::Absent, Target::Folder, Target::File, shows(true), shows(false), Target::ShowsGone, Target::Other("tmpfs".into())]
}

#[test]
fn publishing_ends_from_everywhere_and_shows_what_was_asked() {
    let mut published = 0;
    let sources = mounts().into_iter().map(Source::Staged).chain(disks().into_iter().map(Source::Device));
    for source in sources {
        let wanted = match source {
            Source::Staged(_) => PublishSource::Staging("/s".into()),
            Source::Device(_) => PublishSource::Device(disk()),
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
                                        PublishStep::Bind => seen.target = Target::Shows { read_only: read_only || is_source_read_only },
                                    }
                                }
                                end => break end,
                            }
                        };
                        if end.is_ok() {
                            published += 1;
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
    let seen = |shown: &Shown, size_bytes| ExpandSeen { shown: shown.clone(), size_bytes };
    for growth in [Growth::Full, Growth::Room, Growth::Tried] {
        let shown = Shown::Filesystem(growth);
        let wait = Ok(Some(ExpandStep::AwaitSize { required_bytes: 2 }));
        assert_eq!(next_expand_step(&want(Some(2)), &seen(&shown, 1)), wait);
        let then = (growth == Growth::Room).then_some(ExpandStep::Grow);
        assert_eq!(next_expand_step(&want(Some(2)), &seen(&shown, 2)), Ok(then));
        assert_eq!(next_expand_step(&want(None), &seen(&shown, 1)), Ok(then));
    }
    assert_eq!(next_expand_step(&want(Some(2)), &seen(&Shown::Device, 2)), Ok(None));
    let refused = next_expand_step(&want(Some(2)), &seen(&Shown::NotOurs("nothing is mounted there".into()), 9));
    assert!(matches!(refused, Err(Refusal::NotPublishedHere { .. })));
}
