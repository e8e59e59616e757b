use std::os::unix::fs::FileExt;

use disk::Write;
use disk::luks::{Format, Hash, Kdf, Material};

use super::*;
use crate::format;
use crate::sys::dm::{Crypt, Key, Target};
use crate::testing::{FakeDisk, Folder, volume};

const HANDLE: &str = "r/z/s/vm-9999-pvc-1";
const SIZE: u64 = 64 << 20;
const OFFSET_SECTORS: u64 = (16 << 20) / 512;
const ENCRYPTION: Encryption = Encryption { kdf: Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: 1000 }, discards: false };

fn disk() -> Disk {
    let mut disk = FakeDisk::new(0, 1).serial(&volume(HANDLE).serial).named("sdb", 16).0;
    disk.size_bytes = SIZE;
    disk
}

fn header(sector_size: u32) -> Header {
    let folder = Folder::new();
    let path = folder.path().join("image");
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    file.set_len(SIZE).unwrap();
    let material = Material::draw(|buffer| {
        buffer.fill(7);
        Ok::<_, ()>(())
    })
    .unwrap();
    let luks = Format { device_size_bytes: SIZE, sector_size, uuid: format::luks_uuid(&volume(HANDLE)), kdf: ENCRYPTION.kdf };
    for write in luks.plan(b"secret", &material, &[], |_: u64, buffer: &mut [u8]| buffer.fill(9)).unwrap() {
        if let Write::Data { offset, bytes } = write {
            file.write_all_at(&bytes, offset).unwrap();
        }
    }
    Header::read(SIZE, &mut |offset, buffer| file.read_exact_at(buffer, offset)).unwrap()
}

/// As the volume's mapping is when all is well.
fn mapping(header: &Header, opened_as: &str) -> dm::Mapping {
    let key = Key::Keyring { size_bytes: 64, kind: "logon".into(), description: "x".into() };
    let crypt = Crypt {
        cipher: "aes-xts-plain64".into(),
        key,
        iv_offset: 0,
        backing: disk().dev,
        offset_sectors: OFFSET_SECTORS,
        options: options(header, &ENCRYPTION),
    };
    let length_sectors = SIZE / 512 - OFFSET_SECTORS;
    dm::Mapping {
        name: "any".into(),
        uuid: header.dm_uuid(opened_as),
        dev: Dev { major: 253, minor: 0 },
        open_count: 0,
        is_suspended: false,
        read_only: false,
        has_other_table: false,
        targets: vec![Target { start_sectors: 0, length_sectors, kind: "crypt".into(), crypt: Some(crypt) }],
    }
}

type Change = fn(&mut dm::Mapping);

fn crypt(mapping: &mut dm::Mapping) -> &mut Crypt {
    mapping.targets[0].crypt.as_mut().unwrap()
}

/// W32: what is open already is taken over only where it is what would be opened. W45: with discards where the class says so.
#[test]
fn only_a_table_that_we_would_make_is_adopted() {
    let header = header(512);
    let differs = |change: Change, encryption: &Encryption| {
        let mut live = mapping(&header, "sdb-encrypted");
        change(&mut live);
        difference(&header, &disk(), encryption, &live)
    };
    let same: [Change; 4] = [
        |_| (),
        // A key in the table, as cryptsetup has LUKS1's; what makes it faster; a disk that has grown.
        |live| crypt(live).options = vec!["no_read_workqueue".into(), "same_cpu_crypt".into()],
        |live| live.targets[0].length_sectors -= 8,
        |live| live.name = "whatever".into(),
    ];
    for change in same {
        assert_eq!(differs(change, &ENCRYPTION), None);
    }
    let other: [(Change, &str); 10] = [
        (|live| live.uuid = live.uuid.replace("LUKS2", "LUKS1"), "UUID"),
        (|live| live.uuid = "CRYPT-LUKS2-00000000000000000000000000000000-x".into(), "UUID"),
        (|live| crypt(live).cipher = "aes-cbc-essiv:sha256".into(), "aes-xts-plain64"),
        (|live| crypt(live).offset_sectors = 4096, "sector 4096"),
        (|live| crypt(live).iv_offset = 8, "IV 8"),
        (|live| live.read_only = true, "read-only"),
        (|live| live.targets[0].length_sectors += 8, "the disk has room for"),
        (|live| crypt(live).options = vec!["sector_size:4096".into()], "sector_size:4096"),
        (|live| crypt(live).options = vec!["allow_discards".into()], "allow_discards"),
        (|live| live.targets[0].crypt = None, "not one piece of dm-crypt"),
    ];
    for (change, word) in other {
        let what = differs(change, &ENCRYPTION).unwrap();
        assert!(what.contains(word), "{what}");
    }
    let discards = Encryption { discards: true, ..ENCRYPTION };
    assert!(differs(|_| (), &discards).unwrap().contains("they should be [allow_discards]"));
    assert_eq!(differs(|live| crypt(live).options = vec!["allow_discards".into()], &discards), None);
}

#[test]
fn sectors_of_4096_bytes_are_an_option_of_the_table() {
    let header = header(4096);
    assert_eq!(options(&header, &ENCRYPTION), ["sector_size:4096"]);
    assert_eq!(options(&header, &Encryption { discards: true, ..ENCRYPTION }), ["allow_discards", "sector_size:4096"]);
    assert_eq!(difference(&header, &disk(), &ENCRYPTION, &mapping(&header, "x")), None);
}

#[test]
fn whose_a_mapping_is_stands_in_its_uuid() {
    let (header, volume) = (header(512), volume(HANDLE));
    let ours = name_of(&volume);
    assert_eq!(ours, format!("{}-encrypted", volume.serial));
    for (opened, drivers) in [
        (ours.as_str(), true),
        ("sdb-encrypted", true),
        ("wwn-0x5056432d49443031-encrypted", true),
        // Another disk's name, a pod's own, another volume's.
        ("sda-encrypted", false),
        ("ceph-0-block-dmcrypt", false),
        ("csi-0000000000000000-encrypted", false),
        ("", false),
    ] {
        let live = mapping(&header, opened);
        assert_eq!(opened_as(&live), Some(opened));
        assert_eq!(serial_of(&live).is_some(), opened.starts_with("csi-"), "{opened}");
        assert_eq!(is_drivers(&live, &volume, &disk()), drivers, "{opened}");
    }
    for uuid in ["", "LVM-abc", "CRYPT-PLAIN-sdb-encrypted", "CRYPT-LUKS2-0"] {
        let live = dm::Mapping { uuid: uuid.into(), ..mapping(&header, "x") };
        assert!(!is_drivers(&live, &volume, &disk()), "{uuid}");
    }
}

#[test]
fn a_medium_is_the_mapping_where_there_is_one() {
    let mapping = mapping(&header(512), "x");
    let encrypted = Medium { disk: disk(), mapping: Some(mapping) };
    assert_eq!((encrypted.dev(), encrypted.size_bytes()), (Dev { major: 253, minor: 0 }, SIZE - (16 << 20)));
    assert_eq!((encrypted.kernel_name().as_str(), encrypted.name().as_str()), ("dm-0", "any over sdb (0:0:0:1)"));
    let plain = Medium::of(&disk());
    assert_eq!((plain.dev(), plain.size_bytes(), plain.kernel_name().as_str()), (disk().dev, SIZE, "sdb"));
}
