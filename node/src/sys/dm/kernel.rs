//! Against a real kernel: the guest test `guest_device_mapper` runs these, one at a time, with a blank disk of 64 MiB.

use std::os::unix::fs::FileExt;

use super::*;
use crate::testing::Folder;

const DEVICES: &str = "/dev";
const NAME: &str = "csi-00112233445566aa-encrypted";
const UUID: &str = "CRYPT-LUKS2-0b5b5bd96a0c4a1c8f4e7c1a7a2f9d10-csi-00112233445566aa-encrypted";
const KEY: [u8; 64] = [0x5a; 64];
const OFFSET: u64 = 32_768;

fn devices() -> &'static Path {
    Path::new(DEVICES)
}

/// What a test that failed has left must not fail the next.
struct Clean;

impl Clean {
    fn begin() -> Self {
        assert_nothing_left();
        Self
    }
}

impl Drop for Clean {
    fn drop(&mut self) {
        for mapping in mappings(devices()).unwrap_or_default() {
            let _ = remove(devices(), &mapping);
        }
        let _ = forget_keys_of_gone(devices());
    }
}

fn disk() -> PathBuf {
    std::env::var_os("PROXMOX_CSI_TEST_DISK").expect("the guest test names the disk").into()
}

fn number(path: &Path) -> Dev {
    use std::os::unix::fs::MetadataExt;
    Dev::from_raw(std::fs::metadata(path).unwrap().rdev())
}

fn table(length_sectors: u64) -> CryptTable<'static> {
    CryptTable {
        cipher: "aes-xts-plain64",
        key: &KEY,
        iv_offset: 0,
        backing: number(&disk()),
        offset_sectors: OFFSET,
        length_sectors,
        options: vec!["sector_size:4096".into()],
    }
}

fn make(length_sectors: u64) -> Mapping {
    create(devices(), NAME, UUID, &table(length_sectors), false).unwrap()
}

fn now() -> Option<Mapping> {
    mapping(devices(), NAME).unwrap()
}

fn assert_nothing_left() {
    assert_eq!((mappings(devices()).unwrap(), keyring::left().unwrap()), (Vec::new(), Vec::new()));
    assert!(!devices().join("mapper").join(NAME).exists());
}

fn write(path: &Path, offset: u64, bytes: &[u8]) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
    file.sync_all().unwrap();
}

fn read(path: &Path, offset: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    std::fs::File::open(path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
#[ignore = "needs device-mapper: the guest test runs it"]
fn kernel_a_mapping_lives_and_grows() {
    let _clean = Clean::begin();
    let version = crypt_version(devices()).unwrap();
    assert!(version >= [1, 20, 0], "{version:?}");
    assert_eq!((now(), mappings(devices()).unwrap()), (None, Vec::new()));
    let made = make(4096);
    assert_eq!((made.name.as_str(), made.uuid.as_str(), made.length_sectors()), (NAME, UUID, 4096));
    assert!(!made.is_suspended && !made.read_only && !made.has_other_table && !made.is_half_made());
    assert_eq!((now().as_ref(), mappings(devices()).unwrap().as_slice()), (Some(&made), &[made.clone()][..]));
    let crypt = made.crypt().unwrap();
    assert!(crypt.does_as(&table(4096)), "{crypt:?}");
    let Key::Keyring { description, .. } = &crypt.key else { panic!("the key is in the table: {crypt:?}") };
    assert_eq!(description, "cryptsetup:0b5b5bd9-6a0c-4a1c-8f4e-7c1a7a2f9d10-d0");
    assert_eq!(keyring::left().unwrap(), [UUID]);

    // What is written is not what the disk holds.
    let node = node(devices(), &made).unwrap();
    assert_eq!((node.named, number(&node.real)), (devices().join("mapper").join(NAME), made.dev));
    write(&node.real, 0, &[0x11; 4096]);
    let below = read(&disk(), OFFSET * 512, 4096);
    assert!(below != [0x11; 4096] && below != [0; 4096]);
    assert_eq!(read(&node.real, 0, 4096), [0x11; 4096]);

    // A namesake, a second of its kind, and another holder of the disk.
    for (name, uuid) in [(NAME, "CRYPT-LUKS2-1"), ("csi-other", UUID)] {
        let refused = create(devices(), name, uuid, &table(4096), false).unwrap_err();
        assert_eq!((refused.error.errno, refused.error.call), (Errno::EXIST, "ioctl(DM_DEV_CREATE)"), "{refused}");
    }
    assert_eq!(mappings(devices()).unwrap(), std::slice::from_ref(&made));

    // Grown by the key, by the kernel's own key while it is open, and by another thread than the first.
    let open = std::fs::File::open(&node.real).unwrap();
    replace(devices(), &made, &table(8192)).unwrap();
    let grown = now().unwrap();
    assert_eq!((grown.length_sectors(), grown.open_count), (8192, 1));
    std::thread::spawn(move || resize(devices(), &grown, 16_384).unwrap()).join().unwrap();
    let grown = now().unwrap();
    assert_eq!((grown.length_sectors(), grown.dev, grown.has_other_table), (16_384, made.dev, false));
    write(&node.real, 16_384 * 512 - 4096, &[0x22; 4096]);
    assert_eq!(read(&node.real, 0, 4096), [0x11; 4096]);

    // Larger than the disk: the kernel says so, and all stays as it was.
    let refused = resize(devices(), &grown, 1 << 30).unwrap_err();
    assert_eq!(refused.error.errno, Errno::INVAL);
    assert!(refused.said.iter().any(|line| line.contains("too small")), "{refused}");
    let kept = now().unwrap();
    assert_eq!((kept.length_sectors(), kept.is_suspended, kept.has_other_table), (16_384, false, false));

    // Without the kernel's key only the passphrase helps.
    keyring::forget(UUID).unwrap();
    assert_eq!(resize(devices(), &grown, 20_480).unwrap_err().error.errno, Errno::NOKEY);
    replace(devices(), &grown, &table(20_480)).unwrap();
    assert_eq!(keyring::left().unwrap(), [UUID]);

    // Held: one try, and it is still there.
    assert_eq!(remove(devices(), &now().unwrap()).unwrap_err().errno, Errno::BUSY);
    drop(open);
    remove(devices(), &now().unwrap()).unwrap();
    assert_nothing_left();
    remove(devices(), &made).unwrap();
}

#[test]
#[ignore = "needs device-mapper: the guest test runs it"]
fn kernel_nothing_is_left_of_a_mapping_that_cannot_be_made() {
    let _clean = Clean::begin();
    let refused = create(devices(), NAME, UUID, &table(1 << 30), false).unwrap_err();
    assert_eq!((refused.error.errno, refused.error.call), (Errno::INVAL, "ioctl(DM_TABLE_LOAD)"), "{refused}");
    assert!(refused.to_string().contains("too small"), "{refused}");
    assert!(!refused.to_string().contains("5a5a"), "{refused}");
    assert_nothing_left();
    let unknown = CryptTable { cipher: "serpent-nonsense-plain64", ..table(4096) };
    let refused = create(devices(), NAME, UUID, &unknown, false).unwrap_err();
    assert!(refused.error.call == "ioctl(DM_TABLE_LOAD)" && !refused.said.is_empty(), "{refused}");
    assert_nothing_left();
    // The disk has another holder.
    use std::os::unix::fs::OpenOptionsExt;
    let held = std::fs::OpenOptions::new().read(true).custom_flags(rustix::fs::OFlags::EXCL.bits().cast_signed()).open(disk()).unwrap();
    assert_eq!(create(devices(), NAME, UUID, &table(4096), false).unwrap_err().error.errno, Errno::BUSY);
    drop(held);
    assert_nothing_left();
}

#[test]
#[ignore = "needs device-mapper: the guest test runs it"]
fn kernel_without_a_keyring_the_key_is_in_the_table() {
    let _clean = Clean::begin();
    let quota = "/proc/sys/kernel/keys/root_maxbytes";
    let before = std::fs::read_to_string(quota).unwrap();
    std::fs::write(quota, "1").unwrap();
    let made = create(devices(), NAME, UUID, &table(4096), false);
    std::fs::write(quota, before.trim()).unwrap();
    let made = made.unwrap();
    let Some(Crypt { key: Key::Hex(key), .. }) = made.crypt() else { panic!("{made:?}") };
    assert!(key.is(&KEY) && keyring::left().unwrap().is_empty());
    assert!(!format!("{made:?}").contains("5a5a"));
    // Grown by what the table shows.
    let node = node(devices(), &made).unwrap().real;
    write(&node, 0, &[0x33; 4096]);
    resize(devices(), &made, 8192).unwrap();
    assert_eq!((now().unwrap().length_sectors(), read(&node, 0, 4096)), (8192, vec![0x33; 4096]));
    remove(devices(), &made).unwrap();
    assert_nothing_left();
}

#[test]
#[ignore = "needs device-mapper: the guest test runs it"]
fn kernel_what_a_sudden_end_leaves_is_found() {
    let _clean = Clean::begin();
    // Between DEV_CREATE and TABLE_LOAD.
    let control = node::control(devices()).unwrap();
    let mut created = Message::new(Which::New { name: NAME, uuid: UUID }, 0, 0, 0).unwrap();
    call(&control, Nr::DevCreate, devices(), &mut created).unwrap();
    let left = now().unwrap();
    assert!(left.is_half_made() && left.crypt().is_none(), "{left:?}");
    // Between TABLE_LOAD and resume.
    let subject = devices().join("mapper").join(NAME);
    let it = It::of(&control, devices(), &subject, &left);
    it.load_with_key(&table(4096), false).unwrap();
    let left = now().unwrap();
    assert!(left.is_half_made() && left.has_other_table, "{left:?}");
    remove(devices(), &left).unwrap();
    assert_nothing_left();
    // A table that was loaded over a live one, and never put in force, is nothing to the next.
    let made = make(4096);
    It::of(&control, devices(), &subject, &made).load_with_key(&table(8192), false).unwrap();
    assert!(now().unwrap().has_other_table && now().unwrap().length_sectors() == 4096);
    resize(devices(), &now().unwrap(), 12_288).unwrap();
    assert_eq!((now().unwrap().has_other_table, now().unwrap().length_sectors()), (false, 12_288));
    // Somebody else closes it: its key is ours to forget.
    let mut message = Message::new(Which::Name(NAME), 0, 0, 0).unwrap();
    call(&control, Nr::DevRemove, devices(), &mut message).unwrap();
    assert_eq!(keyring::left().unwrap(), [UUID]);
    forget_keys_of_gone(devices()).unwrap();
    assert_nothing_left();
}

#[test]
#[ignore = "needs device-mapper: the guest test runs it"]
fn kernel_nodes_are_made_where_nobody_makes_them() {
    let _clean = Clean::begin();
    let made = make(4096);
    let folder = Folder::new();
    let named = folder.path().join("mapper").join(NAME);
    // None, a link to nothing, another device's node: each becomes the right one.
    for wrong in ["", "dangling", "stale"] {
        match wrong {
            "dangling" => std::os::unix::fs::symlink("../dm-9", &named).unwrap(),
            "stale" => {
                let (mode, dev) = (rustix::fs::Mode::from_raw_mode(0o600), number(&disk()));
                let raw = rustix::fs::makedev(dev.major, dev.minor);
                rustix::fs::mknodat(rustix::fs::CWD, &named, rustix::fs::FileType::BlockDevice, mode, raw).unwrap();
            }
            _ => (),
        }
        let node = node(folder.path(), &made).unwrap();
        assert_eq!((number(&node.real), &node.named), (made.dev, &named), "{wrong}");
        node::forget(folder.path(), NAME, made.dev).unwrap();
        assert!(!named.exists(), "{wrong}");
    }
    // udev's link is taken as it is, also when it comes a little later, and left to udev.
    std::fs::create_dir(folder.path().join("disk")).unwrap();
    let real = devices().join(format!("dm-{}", made.dev.minor));
    let (link, to) = (named.clone(), real.clone());
    let udev = std::thread::spawn(move || {
        std::thread::park_timeout(Duration::from_millis(50));
        std::os::unix::fs::symlink(to, link).unwrap();
    });
    assert_eq!(node(folder.path(), &made).unwrap().real, real);
    udev.join().unwrap();
    node::forget(folder.path(), NAME, made.dev).unwrap();
    assert!(named.is_symlink());
    // A control node of a container's own /dev.
    assert!(node::control(folder.path()).is_ok() && mapping(folder.path(), NAME).unwrap().is_some());
    remove(devices(), &made).unwrap();
    assert_nothing_left();
}

#[test]
#[ignore = "needs device-mapper: the guest test runs it"]
fn kernel_a_read_only_mapping_refuses_writes() {
    let _clean = Clean::begin();
    let made = create(devices(), NAME, UUID, &table(4096), true).unwrap();
    assert!(made.read_only);
    let node = node(devices(), &made).unwrap();
    // At open, or at the first write, by the kernel's age.
    let opened = std::fs::OpenOptions::new().write(true).open(node.real);
    assert!(opened.and_then(|file| file.write_all_at(&[1; 4096], 0)).is_err());
    resize(devices(), &made, 8192).unwrap();
    assert!(now().unwrap().read_only);
    remove(devices(), &made).unwrap();
    assert_nothing_left();
}

/// The kernel's key is needed for as long as the mapping is there.
#[test]
#[ignore = "needs device-mapper: the guest test runs it"]
fn kernel_a_mapping_that_could_not_be_removed_can_still_be_grown() {
    let _clean = Clean::begin();
    let made = make(4096);
    let open = std::fs::File::open(node(devices(), &made).unwrap().real).unwrap();
    for _ in 0..2 {
        assert_eq!(remove(devices(), &made).unwrap_err().errno, Errno::BUSY);
        assert_eq!(keyring::left().unwrap(), [UUID]);
    }
    resize(devices(), &made, 8192).unwrap();
    assert_eq!(now().unwrap().length_sectors(), 8192);
    drop(open);
    remove(devices(), &made).unwrap();
    assert_nothing_left();
}

/// 30,000 targets, which the kernel lists in 48 bytes each.
#[test]
#[ignore = "needs device-mapper: the guest test runs it"]
fn kernel_a_table_too_long_to_be_read_is_somebody_elses() {
    const TARGETS: u32 = 30_000;
    const TARGET_BYTES: usize = 48;
    let _clean = Clean::begin();
    let control = node::control(devices()).unwrap();
    let subject = devices().join("mapper/long");
    let mut message = Message::new(Which::New { name: "long", uuid: "" }, 0, 0, 0).unwrap();
    call(&control, Nr::DevCreate, &subject, &mut message).unwrap();
    let mut loading = Message::new(Which::Name("long"), 0, 0, TARGETS as usize * TARGET_BYTES).unwrap();
    let (header, specs) = loading.bytes_mut().split_at_mut(message::HEADER_BYTES);
    // target_count; then sector_start, length, next (from here) and target_type of each.
    header[20..24].copy_from_slice(&TARGETS.to_ne_bytes());
    for (start, spec) in (0_u64..).zip(specs.chunks_mut(TARGET_BYTES)) {
        spec[..8].copy_from_slice(&start.to_ne_bytes());
        spec[8..16].copy_from_slice(&1_u64.to_ne_bytes());
        spec[20..24].copy_from_slice(&48_u32.to_ne_bytes());
        spec[24..29].copy_from_slice(b"error");
    }
    call(&control, Nr::TableLoad, &subject, &mut loading).unwrap();
    let mut message = Message::new(Which::Name("long"), 0, UDEV_COOKIE, 0).unwrap();
    call(&control, Nr::DevSuspend, &subject, &mut message).unwrap();

    let long = mapping(devices(), "long").unwrap().unwrap();
    let kinds: Vec<&str> = long.targets.iter().map(|target| target.kind.as_str()).collect();
    assert_eq!((long.name.as_str(), kinds, long.is_half_made()), ("long", vec![LONG_TABLE], false));
    assert_eq!(long.crypt(), None);
    // Ours beside it is found.
    let made = make(4096);
    let there = mappings(devices()).unwrap();
    assert!(there.len() == 2 && there.contains(&made) && there.contains(&long), "{there:?}");
    for mapping in [&made, &long] {
        remove(devices(), mapping).unwrap();
    }
    assert_nothing_left();
}
