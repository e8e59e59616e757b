use super::*;
use crate::testing::FakeDisk;

const OURS: &str = "csi-0123456789abcdef";
const OTHER: &str = "csi-fedcba9876543210";
const WWID1: &str = "naa.5056432d49443031";
const WWID2: &str = "naa.5056432d49443032";

fn want() -> Want {
    Want { serial: OURS.into(), serial_promised: false, wwid: Some(WWID1.into()), lun: Some(1), size_bytes: None }
}

fn disk(host: u32, lun: u64, serial: Option<&str>, wwid: Option<&str>) -> Disk {
    let mut disk = FakeDisk::new(host, lun).named("sda", host * 16).0;
    disk.serial = serial.map(Into::into);
    disk.wwid = wwid.map(Into::into);
    disk
}

#[derive(Debug, PartialEq, Eq)]
enum Kind {
    Taken,
    NotYet,
    Refused,
}

fn kind(found: &Result<Found<'_>, Refusal>) -> Kind {
    match found {
        Ok(Found::Disk(_)) => Kind::Taken,
        Ok(Found::NotYet(_)) => Kind::NotYet,
        Err(_) => Kind::Refused,
    }
}

/// Every disk × every context, against decision 2 written down a second time, as a list of rules.
#[test]
fn one_disk_in_every_guise_against_every_context() {
    let mut taken = 0;
    for serial in [None, Some("own-serial"), Some(OURS), Some(OTHER)] {
        for disk_wwid in [None, Some(WWID1), Some(WWID2)] {
            for lun in [1, 2] {
                for vendor in ["QEMU", "ATA"] {
                    for state in [State::Running, State::Offline, State::Passing] {
                        for mounted in [false, true] {
                            let mut disk = disk(0, lun, serial, disk_wwid);
                            disk.vendor = vendor.into();
                            disk.state = state;
                            let mounts = if mounted { vec![(disk.dev, PathBuf::from("/mnt"))] } else { vec![] };
                            for promised in [false, true] {
                                for want_wwid in [None, Some(WWID1)] {
                                    for want_lun in [None, Some(1)] {
                                        for size_bytes in [None, Some(1 << 30), Some(2 << 30)] {
                                            let want = Want {
                                                serial: OURS.into(),
                                                serial_promised: promised,
                                                wwid: want_wwid.map(Into::into),
                                                lun: want_lun,
                                                size_bytes,
                                            };
                                            let seen = [disk.clone()];
                                            let found = find(&want, &seen, &mounts);
                                            assert_eq!(kind(&found), by_the_rules(&want, &disk, mounted), "{want:?} {disk:?} {mounted}");
                                            taken += u32::from(kind(&found) == Kind::Taken);
                                        }
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(taken > 100, "{taken} were taken: the walk reached the good cases too");
}

fn by_the_rules(want: &Want, disk: &Disk, mounted: bool) -> Kind {
    let lun_is_other = want.lun.is_some_and(|lun| u64::from(lun) != disk.address.lun);
    let ready = if disk.state == State::Passing { Kind::NotYet } else { Kind::Taken };
    if disk.serial.as_deref() == Some(OURS) {
        return if lun_is_other { Kind::NotYet } else { ready };
    }
    let drive = format!("drive-scsi{}", disk.address.lun);
    let slot = match (want.wwid.as_deref(), disk.wwid.as_deref()) {
        (Some(want), Some(disk)) => want == disk,
        (_, None) => want.lun.is_some_and(|lun| drive == format!("drive-scsi{lun}")),
        (None, Some(_)) => false,
    };
    if want.serial_promised || !slot || lun_is_other || disk.vendor != "QEMU" || disk.serial.as_deref() == Some(OTHER) {
        return Kind::NotYet;
    }
    if mounted || want.size_bytes.is_some_and(|size| size > disk.size_bytes) {
        return Kind::Refused;
    }
    ready
}

/// W03: slots and their WWNs are given out again at once, so a slot alone names no volume.
#[test]
fn our_serial_beats_the_slot() {
    // The slot's old disk, without a serial, is still there; ours has come at the same LUN on another controller.
    let seen = [disk(0, 1, None, Some(WWID1)), disk(1, 1, Some(OURS), Some(WWID1))];
    assert_eq!(find(&want(), &seen, &[]), Ok(Found::Disk(&seen[1])));
}

#[test]
fn two_disks_with_our_serial_are_refused() {
    let seen = [disk(0, 1, Some(OURS), None), disk(1, 1, Some(OURS), None)];
    let refused = find(&want(), &seen, &[]).unwrap_err().to_string();
    assert!(refused.contains("more than one disk") && refused.contains("1:0:0:1"), "{refused}");
}

#[test]
fn two_legacy_disks_in_one_slot_are_refused() {
    let seen = [disk(0, 1, None, Some(WWID1)), disk(1, 1, None, None)];
    assert!(matches!(find(&want(), &seen, &[]), Err(Refusal::Ambiguous { .. })));
}

#[test]
fn a_promised_serial_is_waited_for_whatever_sits_in_the_slot() {
    let want = Want { serial_promised: true, ..want() };
    let seen = [disk(0, 1, None, Some(WWID1))];
    let Ok(Found::NotYet(why)) = find(&want, &seen, &[]) else { panic!() };
    assert!(why.contains(OURS) && why.contains(WWID1), "{why}");
}

#[test]
fn the_sentence_about_a_missing_disk_lists_what_is_there_bounded() {
    let seen: Vec<Disk> = (0..20).map(|host| disk(host, 5, Some("else"), None)).collect();
    let Ok(Found::NotYet(why)) = find(&want(), &seen, &[]) else { panic!() };
    assert!(why.contains("and 12 more") && why.len() < 600, "{why}");
    let Ok(Found::NotYet(why)) = find(&want(), &[], &[]) else { panic!() };
    assert!(why.contains("no SCSI disks at all"), "{why}");
}

/// Every disk against `verify`: the serial decides; without one of ours, the disk's own slot.
#[test]
fn verify_in_every_guise() {
    for serial in [None, Some("own-serial"), Some(OURS), Some(OTHER)] {
        for disk_wwid in [None, Some(WWID1), Some(WWID2), Some("naa.5000000000000001")] {
            for lun in [0, 1, 2, 30, 300] {
                for designator in [None, Some(lun), Some(7)] {
                    for vendor in ["QEMU", "ATA"] {
                        let mut disk = disk(0, lun, serial, disk_wwid);
                        disk.vendor = vendor.into();
                        disk.designators = designator.map(|n| format!("drive-scsi{n}")).into_iter().collect();
                        let slot = (1..=29).contains(&lun)
                            && match disk_wwid {
                                Some(WWID1) => lun == 1,
                                Some(WWID2) => lun == 2,
                                Some(_) => false,
                                None => designator == Some(lun),
                            };
                        let good = serial == Some(OURS) || (serial != Some(OTHER) && vendor == "QEMU" && slot);
                        assert_eq!(verify(OURS, &disk).is_ok(), good, "{disk:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn the_drivers_own_disks_are_told_from_foreign_ones() {
    assert!(is_of_this_driver(&disk(0, 1, Some(OTHER), None)));
    assert!(is_of_this_driver(&disk(0, 1, None, Some(WWID1))));
    assert!(!is_of_this_driver(&disk(0, 2, None, Some(WWID1))));
    assert!(!is_of_this_driver(&disk(0, 2, Some("own-serial"), None)));
}

#[test]
fn wwns_become_wwids() {
    assert_eq!(wwid("0x5056432D49443031").as_deref(), Some(WWID1));
    for odd in ["", "5056432d49443031", "0x5056", "0x5056432d4944303g", "0x5056432d494430311"] {
        assert_eq!(wwid(odd), None, "{odd}");
    }
}

#[test]
fn a_legacy_disk_of_another_slot_does_not_fit() {
    let promised = Want { serial_promised: true, ..want() };
    for (disk, fits_legacy, fits_promised) in [
        (disk(0, 1, Some(OURS), None), true, true),
        (disk(0, 1, None, Some(WWID1)), true, false),
        (disk(0, 1, None, None), true, false),
        (disk(0, 2, None, Some(WWID2)), false, false),
        (disk(0, 2, None, None), false, false),
        (disk(0, 1, Some(OTHER), Some(WWID1)), false, false),
    ] {
        assert_eq!((fits(&want(), &disk), fits(&promised, &disk)), (fits_legacy, fits_promised), "{disk:?}");
    }
}
