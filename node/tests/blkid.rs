//! What we find on a disk, compared with the machine's own `blkid -p` on images of the machine's own tools and on some made by hand.

#![allow(clippy::disallowed_methods, reason = "the judges are programs: mke2fs, cryptsetup, blkid")]
#![allow(clippy::cast_possible_truncation, reason = "test images are small")]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test")]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use node::sys::blkid::{Found, Signature, Usage, probe};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;
const SIZE_BYTES: u64 = 64 * MIB;

/// An image in a folder of its own, gone when the test is.
struct Image {
    folder: PathBuf,
    path: PathBuf,
}

impl Image {
    fn blank(name: &str, size_bytes: u64) -> Self {
        let folder = std::env::temp_dir().join(format!("proxmox-csi-blkid-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("image");
        File::create(&path).unwrap().set_len(size_bytes).unwrap();
        Self { folder, path }
    }

    fn with(name: &str, writes: &[(u64, Vec<u8>)]) -> Self {
        let image = Self::blank(name, SIZE_BYTES);
        image.write(writes);
        image
    }

    fn write(&self, writes: &[(u64, Vec<u8>)]) {
        let file = OpenOptions::new().write(true).open(&self.path).unwrap();
        for (offset, bytes) in writes {
            file.write_all_at(bytes, *offset).unwrap();
        }
    }

    fn found(&self) -> Found {
        let file = File::open(&self.path).unwrap();
        probe(file.as_fd(), &self.path, file.metadata().unwrap().len()).unwrap()
    }

    fn signature(&self) -> Signature {
        match self.found() {
            Found::Signature(signature) => signature,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// A tool of the machine, which sbin is not always on the PATH of. A missing one is said aloud, and is a failure in CI.
fn run(tool: &str, arguments: &[&str], image: &Image) -> Option<std::process::Output> {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let Some(program) = path.split(':').map(|folder| Path::new(folder).join(tool)).find(|program| program.exists()) else {
        assert!(std::env::var_os("CI").is_none(), "{tool} is missing: scripts/tools test");
        // Past the test runner's capture, so that it is seen although the test passes.
        let _ = std::io::stderr().write_all(format!("SKIPPED: {tool} is missing: scripts/tools test installs it\n").as_bytes());
        return None;
    };
    // A cache file or the environment must not answer for the image.
    let command = Command::new(program).args(arguments).arg(&image.path).env("BLKID_FILE", "/dev/null").env("LC_ALL", "C").output();
    Some(command.unwrap())
}

/// Makes the image with a tool. `None`: skipped.
fn make(tool: &str, arguments: &[&str], image: &Image) -> Option<()> {
    let output = run(tool, arguments, image)?;
    assert!(output.status.success(), "{tool} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Some(())
}

/// The machine's `blkid -p` must say the same in every tag we read. Its bytes are compared as it prints them.
fn judge_by_blkid(image: &Image) {
    let Some(output) = run("blkid", &["-p", "-o", "export"], image) else { return };
    let found = image.found();
    let tags: BTreeMap<String, String> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.replace('\\', "")))
        .collect();
    let tag = |name: &str| tags.get(name).cloned();
    match (output.status.code(), &found) {
        (Some(2), Found::Nothing) => {}
        // Damaged: blkid leaves those out.
        (Some(2), Found::Signature(signature)) if signature.is_checksum_bad => {}
        // blkid names one of each chain; we call that ambivalent, and blkid has its own code for two superblocks.
        (Some(8), Found::Ambivalent(signatures)) => assert!(signatures.len() > 1, "{found:?}"),
        (Some(0), Found::Ambivalent(signatures)) => {
            assert_eq!([tag("TYPE"), tag("PTTYPE")], [Some(signatures[0].kind.clone()), Some(signatures[1].kind.clone())]);
        }
        (Some(0), Found::Signature(signature)) if signature.usage == Usage::PartitionTable => {
            assert_eq!((tag("PTTYPE"), tag("PTUUID")), (Some(signature.kind.clone()), signature.uuid.clone()));
        }
        (Some(0), Found::Signature(signature)) => {
            assert_eq!(tag("TYPE").as_ref(), Some(&signature.kind));
            assert_eq!(
                (tag("UUID"), tag("LABEL"), tag("VERSION")),
                (signature.uuid.clone(), signature.label.clone(), signature.version.clone())
            );
            let usage = tag("USAGE").unwrap();
            let word = match signature.usage {
                Usage::Filesystem => "filesystem",
                Usage::Raid => "raid",
                Usage::Crypto => "crypto",
                Usage::Other | Usage::PartitionTable => "other",
            };
            assert_eq!(usage, word);
        }
        (code, _) => panic!("blkid ended with {code:?}, {tags:?}; we found {found:?}"),
    }
}

/// CRC-32 of Ethernet, bit by bit: what GPT and LVM2 carry.
fn crc32(seed: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(seed, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 })
    })
}

/// An LVM2 physical volume's label, in sector 1, as lib/label documents it: id, sector, crc from byte 20 on, offset, type.
fn lvm2_label() -> Vec<u8> {
    let mut label = vec![0_u8; 512];
    label[..8].copy_from_slice(b"LABELONE");
    label[8..16].copy_from_slice(&1_u64.to_le_bytes());
    label[20..24].copy_from_slice(&32_u32.to_le_bytes());
    label[24..32].copy_from_slice(b"LVM2 001");
    label[32..64].copy_from_slice(b"abcdefghijklmnopqrstuvwxyz012345");
    let crc = crc32(0xf597_a6cf, &label[20..]);
    label[16..20].copy_from_slice(&crc.to_le_bytes());
    label
}

/// Sector 0 of a disk with one Linux partition; `kind` 0xee makes it the protective one of a GPT.
fn dos_table(kind: u8) -> Vec<u8> {
    let mut sector = vec![0_u8; 512];
    sector[440..444].copy_from_slice(&0x1234_5678_u32.to_le_bytes());
    sector[446 + 4] = kind;
    sector[446 + 8..446 + 12].copy_from_slice(&1_u32.to_le_bytes());
    sector[446 + 12..446 + 16].copy_from_slice(&((SIZE_BYTES / 512) as u32 - 1).to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// A GPT header with an empty table of 128 entries (UEFI 2.10, 5.3.2).
fn gpt_header() -> Vec<u8> {
    let last = SIZE_BYTES / 512 - 1;
    let mut header = vec![0_u8; 512];
    header[..8].copy_from_slice(b"EFI PART");
    header[8..12].copy_from_slice(&0x0001_0000_u32.to_le_bytes());
    header[12..16].copy_from_slice(&92_u32.to_le_bytes());
    for (offset, value) in [(24, 1), (32, last), (40, 34), (48, last - 33), (72, 2_u64)] {
        header[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
    }
    header[56..72].copy_from_slice(&[7; 16]);
    header[80..84].copy_from_slice(&128_u32.to_le_bytes());
    header[84..88].copy_from_slice(&128_u32.to_le_bytes());
    header[88..92].copy_from_slice(&(!crc32(!0, &[0; 128 * 128])).to_le_bytes());
    let crc = !crc32(!0, &header[..92]);
    header[16..20].copy_from_slice(&crc.to_le_bytes());
    header
}

/// A btrfs superblock, at 64 KiB: as much of it as libblkid reads.
fn btrfs_superblock() -> Vec<u8> {
    let mut superblock = vec![0_u8; 4096];
    superblock[32..48].copy_from_slice(&[0xb7; 16]);
    superblock[48..56].copy_from_slice(&65536_u64.to_le_bytes());
    superblock[64..72].copy_from_slice(b"_BHRfS_M");
    superblock[0x12b..0x12b + 4].copy_from_slice(b"data");
    superblock
}

fn words(words: &[(usize, u32)], length: usize) -> Vec<u8> {
    let mut bytes = vec![0_u8; length];
    for (offset, word) in words {
        bytes[*offset..offset + 4].copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Four uberblocks in the array of the first ZFS label: fewer are not believed.
fn zfs_label() -> Vec<(u64, Vec<u8>)> {
    (0..8).map(|number| (128 * 1024 + number * 1024, words(&[(0, 0x00ba_b10c), (8, 5000)], 1024))).collect()
}

#[test]
fn judge_a_blank_disk() {
    for size_bytes in [4 * MIB, SIZE_BYTES, 1 << 40] {
        let image = Image::blank(&format!("blank-{size_bytes}"), size_bytes);
        assert_eq!(image.found(), Found::Nothing, "{size_bytes}");
        judge_by_blkid(&image);
    }
}

#[test]
fn judge_filesystems_of_the_machine_s_tools() {
    let uuid = "0d79a1b2-c3d4-4e5f-8061-728394a5b6c7";
    for (tool, arguments, kind, usage) in [
        ("mke2fs", &["-q", "-F", "-t", "ext2", "-U", uuid][..], "ext2", Usage::Filesystem),
        ("mke2fs", &["-q", "-F", "-t", "ext3", "-U", uuid], "ext3", Usage::Filesystem),
        ("mke2fs", &["-q", "-F", "-t", "ext4", "-U", uuid, "-L", "data"], "ext4", Usage::Filesystem),
        ("mke2fs", &["-q", "-F", "-t", "ext4", "-b", "1024", "-O", "64bit", "-U", uuid], "ext4", Usage::Filesystem),
        ("mkfs.xfs", &["-q", "-f", "-L", "data"], "xfs", Usage::Filesystem),
        ("mkfs.vfat", &["-n", "DATA"], "vfat", Usage::Filesystem),
        ("mkswap", &["-L", "data"], "swap", Usage::Other),
    ] {
        // mkfs.xfs wants 300 MB.
        let image = Image::blank(&format!("{tool}-{kind}-{}", arguments.len()), 400 * MIB);
        if make(tool, arguments, &image).is_none() {
            continue;
        }
        let signature = image.signature();
        assert_eq!((signature.kind.as_str(), signature.usage), (kind, usage));
        assert!(signature.uuid.is_some() && signature.offset_bytes.is_some() && !signature.is_checksum_bad, "{signature:?}");
        judge_by_blkid(&image);
    }
}

#[test]
fn judge_luks_of_the_machine_s_cryptsetup() {
    for (kind, more) in [("luks1", &[][..]), ("luks2", &["--pbkdf", "pbkdf2", "--label", "data"])] {
        let image = Image::blank(kind, SIZE_BYTES);
        let key = image.folder.join("key");
        fs::write(&key, "not a secret").unwrap();
        let key = key.to_str().unwrap().to_owned();
        let mut arguments = vec!["luksFormat", "-q", "--type", kind, "--pbkdf-force-iterations", "1000", "--key-file", &key];
        arguments.extend(more);
        if make("cryptsetup", &arguments, &image).is_none() {
            continue;
        }
        let signature = image.signature();
        assert_eq!((signature.kind.as_str(), signature.usage), ("crypto_LUKS", Usage::Crypto));
        assert_eq!(signature.version.as_deref(), kind.strip_prefix("luks"));
        judge_by_blkid(&image);
    }
}

#[test]
fn judge_signatures_made_by_hand() {
    let md = words(&[(0, 0xa92b_4efc), (4, 1), (144, 8)], 256);
    for (name, writes, kind, usage) in [
        ("lvm2", vec![(512, lvm2_label())], "LVM2_member", Usage::Raid),
        ("dos", vec![(0, dos_table(0x83))], "dos", Usage::PartitionTable),
        ("gpt", vec![(0, dos_table(0xee)), (512, gpt_header())], "gpt", Usage::PartitionTable),
        ("btrfs", vec![(65536, btrfs_superblock())], "btrfs", Usage::Filesystem),
        ("zfs", zfs_label(), "zfs_member", Usage::Filesystem),
        ("md", vec![(4096, md)], "linux_raid_member", Usage::Raid),
        ("squashfs", vec![(0, [b"hsqs".to_vec(), words(&[(24, 4)], 92)].concat())], "squashfs", Usage::Filesystem),
    ] {
        let image = Image::with(name, &writes);
        let signature = image.signature();
        assert_eq!((signature.kind.as_str(), signature.usage), (kind, usage));
        // A refusal says where.
        assert!(signature.offset_bytes.is_some(), "{signature:?}");
        judge_by_blkid(&image);
    }
}

#[test]
fn two_signatures_are_ambivalent_and_both_are_named() {
    let image = Image::blank("ambivalent", SIZE_BYTES);
    if make("mke2fs", &["-q", "-F", "-t", "ext4"], &image).is_none() {
        return;
    }
    image.write(&[(65536, btrfs_superblock())]);
    let Found::Ambivalent(signatures) = image.found() else { panic!("{:?}", image.found()) };
    assert_eq!(signatures.iter().map(|signature| signature.kind.as_str()).collect::<Vec<_>>(), ["ext4", "btrfs"]);
    judge_by_blkid(&image);
}

/// `blkid` names both and calls it a success; who stages it cannot know which one the user meant.
#[test]
fn a_filesystem_beside_a_partition_table_is_ambivalent() {
    let image = Image::with("both", &[(0, dos_table(0x83)), (65536, btrfs_superblock())]);
    let Found::Ambivalent(signatures) = image.found() else { panic!("{:?}", image.found()) };
    assert_eq!(signatures.iter().map(|signature| signature.kind.as_str()).collect::<Vec<_>>(), ["btrfs", "dos"]);
    judge_by_blkid(&image);
}

#[test]
fn a_damaged_signature_is_not_blank() {
    let mut label = lvm2_label();
    label[40] ^= 1;
    let image = Image::with("damaged", &[(512, label)]);
    let signature = image.signature();
    assert_eq!((signature.kind.as_str(), signature.is_checksum_bad), ("LVM2_member", true));
    assert!(signature.to_string().ends_with("checksum wrong"), "{signature}");
    judge_by_blkid(&image);
}

#[test]
fn a_label_that_is_no_text_does_not_hide_the_filesystem() {
    let mut superblock = btrfs_superblock();
    superblock[0x12b..0x12b + 4].copy_from_slice(&[0xff, 0xfe, 0x80, 0x41]);
    let image = Image::with("label", &[(65536, superblock)]);
    let signature = image.signature();
    assert_eq!((signature.kind.as_str(), signature.label.as_deref()), ("btrfs", Some("(not UTF-8)")));
}

/// Random bytes look like something now and then (a sector that ends in 55 aa). Then we and blkid must agree on it.
#[test]
fn judge_random_bytes() {
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig { cases: 16, failure_persistence: None, ..Default::default() });
    let strategy = (any::<[u8; 32]>(), prop::bool::ANY);
    runner
        .run(&strategy, |(seed, zeros_first)| {
            let image = Image::blank("random", 4 * MIB);
            let mut state = u64::from_le_bytes(seed[..8].try_into().unwrap()) | 1;
            let mut bytes = vec![0_u8; 4 << 20];
            for chunk in bytes[if zeros_first { 4096 } else { 0 }..].chunks_mut(8) {
                // xorshift64
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                chunk.copy_from_slice(&state.to_le_bytes());
            }
            image.write(&[(0, bytes)]);
            judge_by_blkid(&image);
            Ok(())
        })
        .unwrap();
}

/// The magic of a format that people use, followed by a stranger's bytes: an answer, never a crash.
#[test]
fn hostile_bytes_behind_a_magic_never_crash() {
    let magics: [(u64, &[u8]); 14] = [
        (1080, &[0x53, 0xef]),
        (0, b"XFSB"),
        (0, b"LUKS\xba\xbe"),
        (64 * 1024 + 64, b"_BHRfS_M"),
        (512, b"LABELONE"),
        (512, b"EFI PART"),
        (510, &[0x55, 0xaa]),
        (0, b"hsqs"),
        (32769, b"CD001"),
        (32769, b"BEA01"),
        (3, b"NTFS    "),
        (3, b"EXFAT   "),
        (1024, &[0x10, 0x20, 0xf5, 0xf2]),
        (4086, b"SWAPSPACE2"),
    ];
    let image = Image::blank("hostile", 4 * MIB);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() });
    let strategy = (prop::sample::select(magics.to_vec()), prop::collection::vec(any::<u8>(), 8192), 0..40_960_u64);
    runner
        .run(&strategy, |((at, magic), noise, noise_at)| {
            image.write(&[(0, vec![0; 128 * 1024]), (noise_at / 1024 * 1024, noise), (at, magic.to_vec())]);
            image.found();
            Ok(())
        })
        .unwrap();
}
