//! Single decisions by name. Every planner from every state there is: `walk`.

use super::walk::{every_disk, every_mapping, stage};
use super::*;

#[test]
fn plain_and_encrypted_are_never_taken_for_each_other() {
    let want = |is_encrypted: bool| stage::every_request().into_iter().filter(move |want| want.encryption.is_some() == is_encrypted);
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
    for want in stage::every_request() {
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
    for disk in every_disk() {
        for mapping in every_mapping() {
            for want in stage::every_request() {
                let (mount, mapping) = (stranger(), mapping.clone());
                let seen = StageSeen { mount, disk, mapping, surface: Surface::Blank, inside: Surface::Blank, growth: Growth::Room };
                assert!(matches!(next_stage_step(&want, &seen), Err(Refusal::OtherMount { .. })));
            }
        }
    }
    for bits in 0..32 {
        let [mapped, held, empty_folder, offline, dead] = [1, 2, 4, 8, 16].map(|bit| bits & bit != 0);
        let seen = UnstageSeen { mount: stranger(), mapped, held, offline, dead, empty_folder };
        assert!(matches!(next_unstage_step(&seen), Err(Refusal::OtherMount { .. })));
    }
    assert!(matches!(next_unpublish_step(&Target::Other("tmpfs".into())), Err(Refusal::TargetTaken { .. })));
}
