//! Buffers byte by byte; what needs a kernel is in `kernel.rs`.

use proptest::prelude::*;

use super::call::target;
use super::message::{self, HEADER_BYTES, Message, Which};
use super::*;

const LINE: &str =
    "aes-xts-plain64 :64:logon:cryptsetup:0b5b5bd9-6a0c-4a1c-8f4e-7c1a7a2f9d10-d0 0 8:16 32768 2 allow_discards sector_size:4096";

/// An answer as the kernel writes it: header with these fields, then `data`.
fn answer(name: &str, uuid: &str, fields: [u32; 3], dev: u64, data: &[u8]) -> Message {
    let mut bytes = vec![0; HEADER_BYTES];
    let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
    let [targets, opens, flags] = fields;
    for (at, word) in [(0, 4), (4, 48), (16, 312), (20, targets), (24, opens), (28, flags)] {
        put(at, &u32::to_ne_bytes(word));
    }
    put(12, &u32::try_from(HEADER_BYTES + data.len()).unwrap().to_ne_bytes());
    put(40, &dev.to_ne_bytes());
    put(48, name.as_bytes());
    put(176, uuid.as_bytes());
    bytes.extend(data);
    Message::of(bytes)
}

/// `struct dm_target_spec` and its parameters, padded to 8.
fn spec(start: u64, length: u64, next: u32, kind: &str, params: &str) -> Vec<u8> {
    let mut bytes = [start.to_ne_bytes(), length.to_ne_bytes()].concat();
    bytes.extend([0; 4]);
    bytes.extend(next.to_ne_bytes());
    bytes.extend(kind.bytes());
    bytes.resize(40, 0);
    bytes.extend(params.bytes());
    bytes.resize((bytes.len() + 1).next_multiple_of(8), 0);
    bytes
}

#[test]
fn a_header_is_laid_out_as_the_kernel_wants_it() {
    let message = Message::new(Which::New { name: "csi-x", uuid: "CRYPT-1" }, message::READONLY, UDEV_COOKIE, 8).unwrap();
    let bytes = message.bytes();
    assert_eq!(bytes.len(), 320);
    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!([0, 4, 8, 12, 16, 20, 28, 32].map(word), [4, 0, 0, 320, 312, 0, 1, 0x0040_0000]);
    assert_eq!((&bytes[48..54], &bytes[176..184]), (&b"csi-x\0"[..], &b"CRYPT-1\0"[..]));
}

#[test]
fn a_mapping_is_named_by_number_as_the_kernel_encodes_it() {
    let message = Message::new(Which::Dev(Dev { major: 253, minor: 0x1234 }), 0, 0, 0).unwrap();
    // huge_encode_dev: minor's low byte, major, minor's rest.
    assert_eq!(message.bytes()[40..48], (0x34_u64 | 253 << 8 | 0x12 << 20).to_ne_bytes());
    assert_eq!(message.header().dev, Dev { major: 253, minor: 0x1234 });
}

#[test]
fn names_that_the_kernel_would_cut_are_refused() {
    let long = "x".repeat(128);
    for (name, uuid) in [(long.as_str(), "u"), ("n\0", "u"), ("n", &*"u".repeat(129))] {
        assert!(Message::new(Which::New { name, uuid }, 0, 0, 0).is_none());
    }
    assert!(Message::new(Which::New { name: &long[..127], uuid: &"u".repeat(128) }, 0, 0, 0).is_some());
}

#[test]
fn a_table_is_laid_out_as_the_kernel_wants_it() {
    let message = Message::with_target(Which::Uuid("CRYPT-1"), 0, 2048, "crypt", "1234567").unwrap();
    let bytes = message.bytes();
    // 40 of target spec, 7 of text, its NUL: a multiple of 8 already.
    assert_eq!(bytes.len(), HEADER_BYTES + 48);
    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!((word(20), word(28)), (1, message::SECURE_DATA));
    assert_eq!(bytes[312..328], [0_u64.to_ne_bytes(), 2048_u64.to_ne_bytes()].concat());
    assert_eq!((word(332), &bytes[336..352]), (48, &b"crypt\0\0\0\0\0\0\0\0\0\0\0"[..]));
    assert_eq!(&bytes[352..], b"1234567\0");
    assert!(Message::with_target(Which::Uuid("u"), 0, 1, "crypt", "a\0b").is_none());
}

#[test]
fn a_list_of_devices_is_read() {
    let entry = |dev: u64, next: u32, name: &[u8]| {
        let mut bytes = [&dev.to_ne_bytes()[..], &next.to_ne_bytes(), name].concat();
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    };
    let list = [entry(253 << 8, 24, b"one\0"), entry(253 << 8 | 1, 0, b"two\0")].concat();
    let list = [&list[..16], &[0; 8], &list[16..]].concat();
    let devices = answer("", "", [0; 3], 0, &list).devices();
    assert_eq!(devices, [Dev { major: 253, minor: 0 }, Dev { major: 253, minor: 1 }]);
    assert!(answer("", "", [0; 3], 0, &entry(0, 0, b"")).devices().is_empty());
    assert!(answer("", "", [0; 3], 0, &[]).devices().is_empty());
}

#[test]
fn targets_are_read_one_behind_the_other() {
    let first = spec(0, 4096, 0, "crypt", LINE);
    let next = u32::try_from(first.len()).unwrap();
    let data = [spec(0, 4096, next, "crypt", LINE), spec(4096, 8, next + 64, "linear", "8:0 0")].concat();
    let message = answer("csi-x", "CRYPT-1", [2, 1, message::READONLY], 253 << 8, &data);
    let targets: Vec<Target> = message.targets().into_iter().map(target).collect();
    let parts: Vec<_> = targets.iter().map(|target| (target.start_sectors, target.length_sectors, target.kind.as_str())).collect();
    assert_eq!(parts, [(0, 4096, "crypt"), (4096, 8, "linear")]);
    assert_eq!(targets[0].crypt.as_ref().unwrap().backing, Dev { major: 8, minor: 16 });
    assert_eq!(targets[1].crypt, None);
    let header = message.header();
    assert_eq!((header.name.as_str(), header.uuid.as_str(), header.open_count), ("csi-x", "CRYPT-1", 1));
}

#[test]
fn a_crypt_line_is_read_and_written() {
    let crypt = Crypt::parse(LINE).unwrap();
    assert_eq!((crypt.cipher.as_str(), crypt.iv_offset, crypt.offset_sectors), ("aes-xts-plain64", 0, 32768));
    assert_eq!(crypt.options, ["allow_discards", "sector_size:4096"]);
    let Key::Keyring { size_bytes: 64, kind, description } = &crypt.key else { panic!("{crypt:?}") };
    assert_eq!((kind.as_str(), description.as_str()), ("logon", "cryptsetup:0b5b5bd9-6a0c-4a1c-8f4e-7c1a7a2f9d10-d0"));
    assert_eq!(*crypt.print(), *LINE);
    for odd in ["", "aes", "aes zz 0 8:0 0", "aes 00 0 8 0", "aes 00 0 8:0 0 2 one", "aes 000 0 8:0 0", "aes :64:logon 0 8:0 0"] {
        assert_eq!(Crypt::parse(odd), None, "{odd:?}");
    }
}

#[test]
fn a_key_is_never_shown() {
    let key = [0xab; 64];
    let line = format!("aes-xts-plain64 {} 0 8:16 32768", "ab".repeat(64));
    let crypt = Crypt::parse(&line).unwrap();
    assert_eq!(*crypt.print(), *line);
    let backing = Dev { major: 8, minor: 16 };
    let table = table(&key, backing, &[]);
    let Key::Hex(hex) = &crypt.key else { panic!("hexadecimal") };
    assert!(hex.is(&key) && !hex.is(&[0xac; 64]));
    for shown in [format!("{crypt:?}"), format!("{table:?}"), format!("{:?}", crypt.key), format!("{hex:?}")] {
        assert!(!shown.contains("abab") && !shown.contains("171"), "{shown}");
        assert!(shown.contains("64 bytes"), "{shown}");
    }
}

fn table<'a>(key: &'a [u8], backing: Dev, options: &[&str]) -> CryptTable<'a> {
    CryptTable {
        cipher: "aes-xts-plain64",
        key,
        iv_offset: 0,
        backing,
        offset_sectors: 32768,
        length_sectors: 4096,
        options: options.iter().map(ToString::to_string).collect(),
    }
}

#[test]
fn a_live_table_is_compared_with_the_wanted_one() {
    let (backing, key) = (Dev { major: 8, minor: 16 }, [7; 64]);
    let crypt = Crypt::parse(LINE).unwrap();
    // The options' order is nobody's business.
    assert!(crypt.does_as(&table(&key, backing, &["sector_size:4096", "allow_discards"])));
    assert!(!crypt.does_as(&table(&key, backing, &["sector_size:4096"])));
    assert!(!crypt.does_as(&table(&key[..32], backing, &["sector_size:4096", "allow_discards"])));
    assert!(!crypt.does_as(&table(&key, Dev { major: 8, minor: 0 }, &["sector_size:4096", "allow_discards"])));
    let shown = Crypt::parse(&format!("aes-xts-plain64 {} 0 8:16 32768", "07".repeat(64))).unwrap();
    assert!(shown.does_as(&table(&key, backing, &[])));
    assert!(!shown.does_as(&table(&[8; 64], backing, &[])));
}

#[test]
fn a_word_with_a_space_makes_no_table() {
    let key = Key::Hex(HexKey::of(&[1; 64]));
    let backing = Dev { major: 8, minor: 16 };
    assert!(table(&[1; 64], backing, &["allow_discards"]).print(&key).is_some());
    assert!(table(&[1; 64], backing, &["allow_discards 1"]).print(&key).is_none());
    let spaced = CryptTable { cipher: "aes 0", ..table(&[1; 64], backing, &[]) };
    assert!(spaced.print(&key).is_none());
}

#[test]
fn a_mapping_is_known_by_its_uuid() {
    let uuid = "CRYPT-LUKS2-0b5b5bd96a0c4a1c8f4e7c1a7a2f9d10-csi-0123456789abcdef-encrypted";
    assert_eq!(luks_uuid(uuid).as_deref(), Some("0b5b5bd9-6a0c-4a1c-8f4e-7c1a7a2f9d10"));
    assert_eq!(luks_uuid(&uuid.replace("LUKS2", "LUKS1")).as_deref(), Some("0b5b5bd9-6a0c-4a1c-8f4e-7c1a7a2f9d10"));
    for other in ["", "LVM-abc", "CRYPT-PLAIN-x", "CRYPT-LUKS2-0b5b-x", "CRYPT-LUKS2-0b5b5bd96a0c4a1c8f4e7c1a7a2f9d10"] {
        assert_eq!(luks_uuid(other), None, "{other:?}");
    }
}

#[test]
fn what_is_missing_is_said_with_the_module() {
    let error = Error { call: "open", subject: "/dev/mapper/control".into(), errno: Errno::NODEV };
    let text = Missing::DeviceMapper(error.clone()).to_string();
    assert!(text.contains("modprobe dm_mod") && text.contains("open on /dev/mapper/control"), "{text}");
    assert!(Missing::Crypt(error).to_string().contains("modprobe dm_crypt"));
}

proptest! {
    #[test]
    fn no_answer_panics(head in proptest::collection::vec(any::<u8>(), 0..400), targets in 0_u32..5, size in 0_u32..800, data in proptest::collection::vec(any::<u8>(), 0..200)) {
        let whole = Message::of(head);
        let mut bytes = answer("n", "u", [targets, 0, 0], 1, &data).bytes().to_vec();
        bytes[12..16].copy_from_slice(&size.to_ne_bytes());
        for message in [whole, Message::of(bytes)] {
            let _ = (message.header(), message.devices(), message.version());
            let _ = message.targets().into_iter().map(target).count();
        }
    }

    #[test]
    fn no_line_panics(line in "\\PC{0,80}") {
        if let Some(crypt) = Crypt::parse(&line) {
            prop_assert!(Crypt::parse(&crypt.print()).is_some());
        }
    }

    #[test]
    fn what_is_loaded_can_be_read_back(key in proptest::collection::vec(any::<u8>(), 1..65), iv_offset: u64, offset_sectors: u64, major in 0_u32..4096, minor in 0_u32..1 << 20, options in proptest::collection::vec("[a-z_:0-9]{1,20}", 0..4)) {
        let backing = Dev { major, minor };
        let table = CryptTable { cipher: "aes-xts-plain64", key: &key, iv_offset, backing, offset_sectors, length_sectors: 8, options };
        let line = table.print(&Key::Hex(HexKey::of(&key))).unwrap();
        prop_assert!(Crypt::parse(&line).unwrap().does_as(&table));
    }
}
