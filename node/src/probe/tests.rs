use disk::Write;
use proptest::prelude::*;

use super::*;
use crate::error::Cause;
use crate::format::{self, Ground, Stop};
use crate::request::{Filesystem, FormatOptions};
use crate::sys::scsi::Topology;
use crate::testing::{Folder, volume};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 200 * MIB;
/// xfs begins here.
const XFS_SIZE: u64 = 300 * MIB;
/// As QEMU's disks are.
const TOPOLOGY: Topology = Topology {
    logical_block_size: 512,
    physical_block_size: 512,
    minimum_io_size: 512,
    optimal_io_size: 0,
    rotational: false,
    is_misaligned: false,
};
const OURS: &str = "r/z/lvm/vm-9999-pvc-1";
const EACH: [Zeroed; 3] = [Zeroed::Yes, Zeroed::No, Zeroed::Unknown];

/// A sparse image in a folder that goes away with it.
struct Image {
    /// Removed with the image.
    _folder: Folder,
    device: Device,
}

impl Image {
    fn new(size_bytes: u64) -> Self {
        let folder = Folder::new();
        let path = folder.path().join("sda");
        std::fs::File::create(&path).unwrap().set_len(size_bytes).unwrap();
        let device = Device::of_file(&path);
        Self { _folder: folder, device }
    }

    fn with(size_bytes: u64, offset: u64, bytes: &[u8]) -> Self {
        let image = Self::new(size_bytes);
        image.device.write_at(offset, bytes).unwrap();
        image
    }

    fn probe(&self, zeroed: Zeroed) -> Surface {
        probe(&self.device, &volume(OURS), zeroed).unwrap()
    }

    /// Made by us, of 4 KiB blocks so that backups begin at 128 MiB.
    fn formatted(handle: &str) -> Self {
        let image = Self::new(SIZE);
        let options = FormatOptions { block_size: Some(4096), ..FormatOptions::default() };
        format::make(&image.device, &volume(handle), options, &TOPOLOGY, Ground::Zeros, &Stop::default()).unwrap();
        image
    }

    /// The first superblock lost, and with it all of the first MiB.
    fn beheaded(handle: &str) -> Self {
        let image = Self::formatted(handle);
        image.device.zero(0, 16 * MIB).unwrap();
        image
    }
}

fn other(surface: Surface) -> String {
    let Surface::Other(what) = surface else { panic!("{surface:?}") };
    what
}

#[test]
fn zeros_are_blank_in_every_mode() {
    for zeroed in EACH {
        assert_eq!(Image::new(SIZE).probe(zeroed), Surface::Blank);
        assert_eq!(Image::new(2 * MIB - 4096).probe(zeroed), Surface::Blank, "edges that overlap");
    }
}

#[test]
fn one_byte_of_data_at_an_edge_is_not_blank_where_zeros_were_promised() {
    for offset in [0, 511, 4096, MIB - 1, SIZE - MIB, SIZE - 1] {
        let image = Image::with(SIZE, offset, b"x");
        assert!(other(image.probe(Zeroed::Yes)).contains(&offset.to_string()));
        assert_eq!(image.probe(Zeroed::Unknown), image.probe(Zeroed::Yes), "unknown is as strict");
    }
}

#[test]
fn on_recycled_storage_only_the_first_4_kib_must_be_zero() {
    for (offset, blank) in [(0, false), (4095, false), (4096, true), (MIB, true), (SIZE - 1, true)] {
        let surface = Image::with(SIZE, offset, b"x").probe(Zeroed::No);
        assert_eq!(surface == Surface::Blank, blank, "{offset}: {surface:?}");
    }
}

#[test]
fn what_we_made_is_an_ext4() {
    for zeroed in EACH {
        assert_eq!(Image::formatted(OURS).probe(zeroed), Surface::Ext("ext4".into()));
    }
    let superblock = ext_superblock(&Image::formatted(OURS).device).unwrap();
    assert_eq!((superblock.blocks, superblock.uuid), (SIZE / 4096, volume(OURS).handle.uuid("ext4")));
}

#[test]
fn a_damaged_volume_of_ours_is_never_blank() {
    let image = Image::beheaded(OURS);
    image.device.zero(SIZE - MIB, MIB).unwrap();
    for zeroed in EACH {
        let what = other(image.probe(zeroed));
        assert!(what.contains("this volume's own ext4") && what.contains(&(128 * MIB).to_string()), "{what}");
    }
}

#[test]
fn a_strangers_backup_counts_only_where_zeros_were_promised() {
    let image = Image::beheaded("r/z/lvm/vm-9999-pvc-2");
    assert!(other(image.probe(Zeroed::Yes)).contains("backup"));
    assert!(other(image.probe(Zeroed::Unknown)).contains("backup"));
    assert_eq!(image.probe(Zeroed::No), Surface::Blank);
}

#[test]
fn a_backup_whose_checksum_is_wrong_still_speaks() {
    let image = Image::beheaded(OURS);
    image.device.write_at(128 * MIB + 0x200, b"damage").unwrap();
    for zeroed in EACH {
        assert!(other(image.probe(zeroed)).contains("this volume's own ext4"));
    }
}

fn xfs(handle: &str) -> Image {
    let image = Image::new(XFS_SIZE);
    let options = FormatOptions { filesystem: Filesystem::Xfs, ..FormatOptions::default() };
    format::make(&image.device, &volume(handle), options, &TOPOLOGY, Ground::Zeros, &Stop::default()).unwrap();
    image
}

#[test]
fn what_we_made_is_an_xfs() {
    for zeroed in EACH {
        assert_eq!(xfs(OURS).probe(zeroed), Surface::Xfs);
    }
}

#[test]
fn an_xfs_without_its_head_is_found_by_its_second_group() {
    let beheaded = |handle: &str| {
        let image = xfs(handle);
        image.device.zero(0, 16 * MIB).unwrap();
        image
    };
    for zeroed in EACH {
        let what = other(beheaded(OURS).probe(zeroed));
        assert!(what.contains("this volume's own xfs") && what.contains("xfs_repair"), "{what}");
    }
    let strangers = beheaded("r/z/lvm/vm-9999-pvc-2");
    assert!(other(strangers.probe(Zeroed::Yes)).contains("an xfs without its first superblock"));
    assert_eq!(strangers.probe(Zeroed::No), Surface::Blank);
}

#[test]
fn a_damaged_xfs_is_neither_blank_nor_mounted() {
    for (offset, bytes) in [(8, &b"damage"[..]), (126, &[1][..]), (300, &[1][..])] {
        let image = xfs(OURS);
        image.device.write_at(offset, bytes).unwrap();
        for zeroed in EACH {
            let what = other(image.probe(zeroed));
            assert!(what.contains("xfs"), "{offset}: {what}");
        }
    }
}

#[test]
fn an_xfs_below_its_minimum_is_refused_before_anything_is_written() {
    let image = Image::new(XFS_SIZE - 512);
    let options = FormatOptions { filesystem: Filesystem::Xfs, ..FormatOptions::default() };
    let refused = format::make(&image.device, &volume(OURS), options, &TOPOLOGY, Ground::Unknown, &Stop::default()).unwrap_err();
    let Cause::TooSmall(sentence) = refused else { panic!("{refused:?}") };
    assert!(sentence.contains("314572800") && sentence.contains("314572288"), "{sentence}");
    assert_eq!(image.probe(Zeroed::Yes), Surface::Blank);
}

/// The crash at every single write: before the mark the disk is as it was, then unfinished, at the very end complete.
#[test]
fn a_format_cut_short_is_unfinished_for_this_volume_and_foreign_for_others() {
    let plan = || {
        let options = disk::ext4::Options::new(16 * MIB, volume(OURS).handle.uuid("ext4"), [1; 16], 1);
        disk::Format::new(disk::ext4::plan(&options).unwrap(), &mark(&volume(OURS)).unwrap())
    };
    let total = plan().count();
    let mut unfinished = 0;
    for cut in (0..=total).step_by(total / 40 + 1).chain([1, 2, total - 1, total]) {
        let image = Image::new(16 * MIB);
        for write in plan().take(cut) {
            match write {
                Write::Data { offset, bytes } => image.device.write_at(offset, &bytes).unwrap(),
                Write::Zeros { offset, length } => image.device.zero(offset, length).unwrap(),
                Write::Flush => (),
            }
        }
        match image.probe(Zeroed::Yes) {
            Surface::Blank => assert_eq!(cut, 0),
            Surface::Unfinished => {
                unfinished += 1;
                let foreign = probe(&image.device, &volume("r/z/lvm/vm-9999-pvc-2"), Zeroed::No).unwrap();
                let what = other(foreign);
                assert!(what.contains("another volume, at byte 0 (") && what.ends_with("/sda)"), "{what}");
            }
            Surface::Ext(_) => assert!(cut >= total - 2, "{cut} of {total}"),
            surface => panic!("{cut} of {total}: {surface:?}"),
        }
    }
    assert!(unfinished > 5, "{unfinished}");
}

#[test]
fn a_damaged_mark_and_other_signatures_are_not_blank() {
    let mut sector = *mark(&volume(OURS)).unwrap().sector();
    sector[100] ^= 1;
    assert!(other(Image::with(SIZE, 0, &sector).probe(Zeroed::No)).contains("damaged mark"));
    let mut swap = vec![0; 4096];
    swap[1024] = 1;
    swap[1028..1032].copy_from_slice(&1000_u32.to_le_bytes());
    swap[4086..].copy_from_slice(b"SWAPSPACE2");
    assert!(other(Image::with(SIZE, 0, &swap).probe(Zeroed::No)).contains("swap"));
}

/// W13, W14: an error is not "nothing there".
#[test]
fn what_cannot_be_read_is_no_blank() {
    let failing = |at: u64| {
        move |offset: u64, buffer: &mut [u8]| {
            let hit = (offset..offset + buffer.len() as u64).contains(&at);
            if hit { Err(sys::Error { call: "pread", subject: "/dev/sda".into(), errno: Errno::IO }) } else { Ok(()) }
        }
    };
    for at in [0, MIB - 1, SIZE - MIB, SIZE - 1, 128 * MIB, SIZE / 4] {
        let error = remains(failing(at), SIZE, &volume(OURS), Zeroed::Yes).unwrap_err();
        assert_eq!(error.errno, Errno::IO, "{at}");
    }
    let text = Error(remains(failing(0), SIZE, &volume(OURS), Zeroed::No).unwrap_err()).to_string();
    assert!(text.contains("not taken for blank"), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Where zeros were promised, not one byte may be there in the first MiB, the last MiB or a backup's magic.
    #[test]
    fn any_byte_at_an_edge_speaks(at in 0_u64..MIB, end in any::<bool>(), byte in 1_u8..) {
        let at = if end { SIZE - 1 - at } else { at };
        let read = |offset: u64, buffer: &mut [u8]| {
            if let Some(hit) = at.checked_sub(offset).and_then(|index| buffer.get_mut(usize::try_from(index).unwrap())) { *hit = byte; }
            Ok(())
        };
        let clean = |zeroed| remains(read, SIZE, &volume(OURS), zeroed).unwrap().is_none();
        prop_assert!(!clean(Zeroed::Yes) && !clean(Zeroed::Unknown));
        prop_assert_eq!(clean(Zeroed::No), at >= RECYCLED_EDGE_BYTES);
    }
}

/// A LUKS volume of ours, with what a probe of its inside looks at written as it is at a format.
fn encrypted(handle: &str, size_bytes: u64) -> (Image, disk::luks::VolumeKey) {
    use disk::luks::{Format, Hash, Kdf, Material};
    let image = Image::new(size_bytes);
    let mut seed = 0_u8;
    let material = Material::draw(|buffer| {
        seed += 1;
        buffer.fill(seed);
        Ok::<_, ()>(())
    })
    .unwrap();
    let kdf = Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: 1000 };
    let luks = Format { device_size_bytes: size_bytes, sector_size: 512, uuid: format::luks_uuid(&volume(handle)), kdf };
    let writes = luks.plan(b"secret", &material, &[], Material::noise(&[3; 64]).unwrap()).unwrap();
    let mark = disk::Mark::new(&volume(handle).serial).unwrap();
    format::execute(&image.device, disk::Format::new(writes, &mark), &Default::default()).unwrap();
    (image, material.volume_key)
}

#[test]
fn a_luks_volume_is_known_by_either_copy_of_its_header() {
    let (image, _) = encrypted(OURS, SIZE);
    assert!(EACH.iter().all(|zeroed| image.probe(*zeroed) == Surface::Luks));
    assert!(holds_own_luks(&image.device).unwrap());
    // Its first copy damaged, then wiped: the second is this volume's own.
    for bytes in [&[0xff; 512][..], &[0; 4096]] {
        image.device.write_at(0, bytes).unwrap();
        assert!(EACH.iter().all(|zeroed| image.probe(*zeroed) == Surface::Luks), "{} bytes", bytes.len());
    }
    // Both: never blank where zeros were promised.
    image.device.zero(0, 32 << 10).unwrap();
    assert!(matches!(image.probe(Zeroed::Yes), Surface::Other(_)));
}

/// A raw block volume whose class asks for no passphrase: a copy of an encrypted one is not shown as ciphertext, a pod's own is the pod's.
#[test]
fn what_this_driver_encrypted_is_told_from_what_a_pod_did_also_in_a_copy() {
    let (image, _) = encrypted("r/z/lvm/the-source", SIZE);
    assert!(holds_own_luks(&image.device).unwrap(), "a copy has its source's UUID");
    for (uuid, ours) in [
        ("0b5b5bd9-6a0c-8a1c-8f4e-7c1a7a2f9d10\0", true),
        ("0b5b5bd9-6a0c-4a1c-8f4e-7c1a7a2f9d10\0", false),
        ("0b5b5bd9-6a0c-8a1c-8f4e-7c1a7a2f9d10x", false),
        ("0b5b5bd9x6a0c-8a1c-8f4e-7c1a7a2f9d10\0", false),
    ] {
        image.device.write_at(168, uuid.as_bytes()).unwrap();
        assert_eq!(holds_own_luks(&image.device).unwrap(), ours, "{uuid:?}");
    }
    assert!(!holds_own_luks(&Image::new(SIZE).device).unwrap());
}

/// Recycled storage wipes 4 KiB: the second header of what was there before must not stand beside the new filesystem, or libblkid sees two things.
#[test]
fn a_filesystem_over_a_former_encrypted_volume_is_all_that_is_seen() {
    for (filesystem, size_bytes, surface) in [
        (Filesystem::Ext4, SIZE, Surface::Ext("ext4".into())),
        (Filesystem::Ext4, 1 << 33, Surface::Ext("ext4".into())),
        (Filesystem::Xfs, XFS_SIZE, Surface::Xfs),
    ] {
        let (image, _) = encrypted("r/z/lvm/former", size_bytes);
        image.device.zero(0, 4096).unwrap();
        let options = FormatOptions { filesystem, ..FormatOptions::default() };
        format::make(&image.device, &volume(OURS), options, &TOPOLOGY, Ground::Unknown, &Stop::default()).unwrap();
        assert_eq!(image.probe(Zeroed::No), surface, "{filesystem:?}");
    }
}

#[test]
fn a_former_volumes_second_header_is_not_opened_for_a_new_volume() {
    let (image, _) = encrypted("r/z/lvm/former", SIZE);
    image.device.zero(0, 4096).unwrap();
    assert_eq!(image.probe(Zeroed::No), Surface::Blank, "as Proxmox gives out what another volume had");
    assert!(other(image.probe(Zeroed::Unknown)).contains("perhaps a former volume's"));
    // Zeros were promised: it cannot be a leftover, and its own first copy is what is lost.
    assert_eq!(image.probe(Zeroed::Yes), Surface::Luks);
    // A damaged head is no wiped one.
    image.device.write_at(0, &[0xff; 16]).unwrap();
    assert!(EACH.iter().all(|zeroed| image.probe(*zeroed) == Surface::Luks));
}

/// The inside of a new volume: noise, but for what the format has written.
#[test]
fn noise_with_zeros_where_a_probe_looks_is_blank() {
    for size_bytes in [SIZE, 3 * MIB] {
        let image = Image::new(size_bytes);
        let mut state = size_bytes;
        let noise: Vec<u8> = (0..MIB)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                state.to_be_bytes()[0]
            })
            .collect();
        for at in 0..size_bytes / MIB {
            image.device.write_at(at * MIB, &noise).unwrap();
        }
        for range in looked_at(size_bytes) {
            assert!(range.end <= size_bytes, "{range:?}");
            image.device.zero(range.start, range.end - range.start).unwrap();
        }
        assert_eq!(image.probe(Zeroed::Unknown), Surface::Blank);
    }
}
