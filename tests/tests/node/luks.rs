//! Encrypted volumes: made, opened, grown, closed; their passphrases; and what is never shown of them.
//!
//! PBKDF2 with 1,000 rounds, as argon2id takes 20 s on an emulated machine; `keys.rs` makes a volume by default.

use std::path::Path;
use std::time::Duration;

use disk::luks::{Header, VolumeKey, within};
use proto::{VolumeHandle, secrets, volume_context};
use testbed::calls::{NodeVolume, block_capability, mount_capability};
use testbed::guest::{Guest, Program, wait, with_libraries};
use testbed::machine::PluggedDrive;
use testbed::tools;
use tonic::Code;

use crate::ciphertext::decrypted;
use crate::harness::{Agent, Image, MIB, SEEN_LIMIT, assert_clean, handle, wait_for_size};
use crate::life::still_in_use;
use crate::xfs::assert_clean_xfs;

pub(crate) const PASSPHRASE: &str = "a passphrase that nobody may see\n";
/// Behind it the data of a LUKS2 volume begins.
pub(crate) const HEADER_BYTES: u64 = 16 * MIB;
/// A judge reads all metadata, on an emulated machine.
const JUDGE_LIMIT: Duration = Duration::from_secs(120);
/// Written in plain through the mapping, and looked for on the disk.
const MARKER: &[u8] = b"this text is for the pod alone, and never for the disk itself";

/// The same volume with a passphrase and a cheap key derivation.
pub(crate) fn encrypted(mut volume: NodeVolume, passphrase: &str) -> NodeVolume {
    volume.secrets.insert(secrets::PASSPHRASE.into(), passphrase.into());
    let cheap = [(volume_context::LUKS_KDF, "pbkdf2"), (volume_context::LUKS_KDF_ITERATIONS, "1000")];
    volume.volume_context.extend(cheap.map(|(key, value)| (key.to_owned(), value.to_owned())));
    volume
}

/// How the mapping of a volume is called.
pub(crate) fn mapping_of(handle: &VolumeHandle) -> String {
    format!("{}-encrypted", handle.serial())
}

/// Names of all mappings in the guest.
pub(crate) fn mappings(agent: &Agent) -> Vec<String> {
    let disks = agent.guest.list("/sys/block").unwrap();
    let dm = disks.iter().filter(|disk| disk.starts_with("dm-"));
    dm.map(|disk| agent.guest.read(&format!("/sys/block/{disk}/dm/name")).unwrap().trim().to_owned()).collect()
}

/// The kernel takes a key away a moment after its last link is gone.
pub(crate) fn assert_no_key_is_left(guest: &Guest) {
    let gone = wait::until(SEEN_LIMIT, || {
        let keys = guest.read("/proc/keys")?;
        Ok::<_, anyhow::Error>((!keys.contains("proxmox-csi:") && !keys.contains("logon")).then_some(()))
    });
    assert!(gone.unwrap().is_some(), "keys are left: {}", guest.read("/proc/keys").unwrap());
}

/// The volume key, by the header on the image.
pub(crate) fn volume_key(image: &Image, passphrase: &str) -> Option<VolumeKey> {
    let mut read = |offset: u64, buffer: &mut [u8]| {
        buffer.copy_from_slice(&image.read_at(offset, buffer.len()));
        Ok(())
    };
    let header = Header::read(image.size_bytes(), &mut read).unwrap();
    header.unlock(passphrase.as_bytes(), &mut read, within(u64::MAX)).ok().map(|(_, key)| key)
}

/// Numbers of the keyslots.
pub(crate) fn keyslots(image: &Image) -> Vec<u8> {
    let read = &mut |offset: u64, buffer: &mut [u8]| {
        buffer.copy_from_slice(&image.read_at(offset, buffer.len()));
        Ok(())
    };
    Header::read(image.size_bytes(), read).unwrap().keyslots.iter().map(|slot| slot.number).collect()
}

/// Neither passphrases nor key are in anything that agent or kernel have said.
pub(crate) fn assert_nothing_is_told(agent: &Agent, passphrases: &[&str], keys: &[VolumeKey]) {
    let log = std::fs::read(agent.guest.folder().join("console.log")).unwrap();
    let says = |bytes: &[u8]| log.windows(bytes.len()).any(|window| window.eq_ignore_ascii_case(bytes));
    assert!(says(b"made a LUKS2 volume") || says(b"opened as csi-"), "the log is the agent's");
    for passphrase in passphrases {
        assert!(!says(passphrase.trim_end().as_bytes()), "a passphrase is in {}", agent.guest.quote());
    }
    for key in keys {
        for half in key.bytes().chunks(16) {
            let hex: String = half.iter().map(|byte| format!("{byte:02x}")).collect();
            assert!(!says(half) && !says(hex.as_bytes()), "a part of a volume key is in {}", agent.guest.quote());
        }
    }
}

/// Runs a judge of this host in the guest, on an open mapping.
pub(crate) fn judge(agent: &Agent, program: &str, args: &[&str]) -> Option<(Option<i32>, String)> {
    if !agent.guest.runs_this_hosts_programs() {
        eprintln!("what is inside the mapping is not judged: {program} is not of the guest's architecture");
        return None;
    }
    let Some(path) = tools::program(program) else {
        tools::skipped(&format!("{program} is missing: what is inside the mapping is not judged"));
        return None;
    };
    if agent.guest.stat(&path).unwrap().is_none() {
        for (path, file) in with_libraries(Path::new(&path)).unwrap() {
            let folder = Path::new(&path).parent().unwrap().display().to_string();
            agent.guest.make_folder(&folder).unwrap();
            agent.guest.write(&path, &std::fs::read(file).unwrap()).unwrap();
        }
    }
    let ended = agent.guest.run(&Program { label: "judge", root: None, program: &path, args, env: &[] }, JUDGE_LIMIT).unwrap();
    Some((ended.exit.code, ended.output))
}

fn life(fstype: &str, size_bytes: u64, judged_by: &str) {
    let Some(agent) = Agent::start(&format!("luks-{fstype}")) else { return };
    let (handle, image) = (handle(&format!("luks-{fstype}")), Image::new(size_bytes));
    let attach = |lun| {
        let volume = agent.attach(&handle, &image, lun);
        NodeVolume { capability: mount_capability(fstype), ..encrypted(volume, PASSPHRASE) }
    };
    let mut volume = attach(1);
    for _ in 0..2 {
        agent.stage(&volume);
        agent.publish(&volume);
    }
    assert_eq!((agent.mounted_at(&volume.staging), agent.mounted_at(&volume.target)), (vec![fstype.into()], vec![fstype.into()]));
    assert_eq!(mappings(&agent), [mapping_of(&handle)]);
    let file = format!("/node{}/file", volume.target);
    let written = agent.guest.fill(&file, 1, 8 * MIB).unwrap();
    agent.guest.write(&format!("/node{}/marked", volume.target), &MARKER.repeat(100)).unwrap();
    assert_eq!(image.read_at(0, 6), b"LUKS\xba\xbe");
    assert!(!holds_marker(&image), "plaintext is on the disk");

    // Grown while it is mounted, with no secret: the kernel has the key. A new agent finds it there too.
    volume.secrets.clear();
    let bytes = |agent: &Agent| {
        let seen = agent.guest.stat_filesystem(&format!("/node{}", volume.target)).unwrap();
        seen.blocks * seen.block_bytes
    };
    let mut agent = agent;
    let mut before = bytes(&agent);
    for factor in [2, 3] {
        let size_bytes = factor * size_bytes;
        image.resize(size_bytes);
        agent.guest.machine().resize(1, size_bytes).unwrap();
        wait_for_size(&agent.guest, 1, Some(size_bytes));
        for _ in 0..2 {
            let answer = agent.calls.node_expand_volume(volume.expand(size_bytes)).unwrap_or_else(|status| panic!("{status:?}"));
            assert_eq!(answer.capacity_bytes, size_bytes.cast_signed());
        }
        let after = bytes(&agent);
        assert!(after > before + size_bytes / factor * 8 / 10, "{before} {after}");
        before = after;
        agent.restart();
    }
    agent.put_away(&volume);
    agent.put_away(&volume);
    assert_eq!(mappings(&agent), Vec::<String>::new());
    assert_eq!(agent.guest.list("/dev/mapper").unwrap(), ["control"]);
    agent.detach(1);

    // Grown while it was away, in another slot.
    image.resize(4 * size_bytes);
    let attach = |lun| {
        let volume = agent.attach(&handle, &image, lun);
        NodeVolume { capability: mount_capability(fstype), ..encrypted(volume, PASSPHRASE) }
    };
    let volume = attach(4);
    agent.stage(&volume);
    agent.publish(&volume);
    assert!(bytes(&agent) > before + size_bytes * 8 / 10);
    agent.guest.drop_caches().unwrap();
    assert_eq!(agent.guest.sha256(&file).unwrap(), written);

    agent.calls.node_unpublish_volume(volume.unpublish()).unwrap();
    agent.guest.unmount(&format!("/node{}", volume.staging)).unwrap();
    let device = format!("/dev/mapper/{}", mapping_of(&handle));
    if let Some((code, output)) = judge(&agent, judged_by, &[if judged_by == "e2fsck" { "-fn" } else { "-n" }, &device]) {
        assert_eq!(code, Some(0), "{judged_by}: {output}");
    }
    // The mount is gone, and the mapping is found all the same.
    agent.put_away(&volume);
    assert_eq!(mappings(&agent), Vec::<String>::new());
    agent.detach(4);
    if !agent.guest.runs_this_hosts_programs() {
        // By this host's programs, on what this host decrypts.
        let plain = decrypted(&image, PASSPHRASE);
        if judged_by == "e2fsck" { assert_clean(&plain) } else { assert_clean_xfs(&plain.0) }
    }
    assert_nothing_is_told(&agent, &[PASSPHRASE], &[volume_key(&image, PASSPHRASE).unwrap()]);
    agent.guest.power_off().unwrap();
}

/// W31: grown while it was away, it is opened first, then grown through all layers. W32: no mapping is left behind, nor in the way.
#[test]
fn guest_life_of_an_encrypted_ext4() {
    life("ext4", 64 * MIB, "e2fsck");
}

#[test]
fn guest_life_of_an_encrypted_xfs() {
    life("xfs", 316 * MIB, "xfs_repair");
}

/// Whether a sector of the disk begins inside of what was written as [`MARKER`] over and over.
fn holds_marker(image: &Image) -> bool {
    let twice = MARKER.repeat(2);
    image.bytes().chunks(512).any(|sector| twice.windows(MARKER.len()).any(|window| sector.starts_with(window)))
}

/// Stage is refused; the image is byte for byte what it was, and nothing is open.
fn refused(agent: &Agent, volume: &NodeVolume, image: &Image) -> (Code, String) {
    let before = image.bytes();
    let status = agent.calls.node_stage_volume(volume.stage()).expect_err("stage should be refused");
    assert!(status.message().contains(&volume.id), "{status:?}");
    assert!(image.bytes() == before, "the disk was written to: {status:?}");
    assert!(agent.mounted_at(&volume.staging).is_empty());
    assert_eq!(mappings(agent), Vec::<String>::new());
    println!("{}", status.message());
    (status.code(), status.message().to_string())
}

#[test]
fn guest_passphrases_that_do_not_fit() {
    let Some(agent) = Agent::start("luks-refused") else { return };
    let (handle, image) = (handle("luks-refused"), Image::new(48 * MIB));
    let volume = agent.attach(&handle, &image, 1);
    // Plain on the disk, and a secret: neither opened nor encrypted.
    agent.stage(&volume);
    agent.put_away(&volume);
    let with_secret = encrypted(volume.clone(), PASSPHRASE);
    let (code, sentence) = refused(&agent, &with_secret, &image);
    assert!(code == Code::FailedPrecondition && sentence.contains("ext4 is on the disk itself"), "{code:?} {sentence}");
    // The class speaks of LUKS, and there is no secret.
    let forgotten = NodeVolume { secrets: Default::default(), ..with_secret };
    let (code, sentence) = refused(&agent, &forgotten, &image);
    assert!(code == Code::InvalidArgument && sentence.contains("node-stage-secret-name"), "{code:?} {sentence}");
    agent.detach(1);

    // Encrypted on the disk, and the wrong secret, or none.
    std::fs::write(&image.0, b"").unwrap();
    image.resize(48 * MIB);
    let volume = agent.attach(&handle, &image, 1);
    let right = encrypted(volume.clone(), PASSPHRASE);
    agent.stage(&right);
    agent.put_away(&right);
    for wrong in ["wrong", PASSPHRASE.trim_end()] {
        let (code, sentence) = refused(&agent, &encrypted(volume.clone(), wrong), &image);
        assert!(code == Code::InvalidArgument && sentence.contains("no keyslot opens"), "{code:?} {sentence}");
    }
    // Whose header it is shows only when it opens: a damaged copy is not mended before.
    let second = image.read_at(16 << 10, 512);
    image.write_at(16 << 10, &[0x55; 512]);
    agent.detach(1);
    agent.guest.machine().plug(&image.drive(1, Some(&handle.serial()))).unwrap();
    let (code, sentence) = refused(&agent, &encrypted(volume.clone(), "wrong"), &image);
    assert!(code == Code::InvalidArgument && sentence.contains("no keyslot opens"), "{code:?} {sentence}");
    agent.stage(&right);
    agent.put_away(&right);
    assert_eq!(image.read_at(16 << 10, 6), second[..6], "mended");
    let (code, sentence) = refused(&agent, &volume, &image);
    assert!(code == Code::InvalidArgument && sentence.contains("encrypted with LUKS"), "{code:?} {sentence}");
    let (code, sentence) = refused(&agent, &encrypted(volume.clone(), ""), &image);
    assert!(code == Code::InvalidArgument && sentence.contains("empty"), "{code:?} {sentence}");
    agent.stage(&right);
    agent.put_away(&right);
    agent.detach(1);

    // A static volume is never made an encrypted one.
    let blank = Image::new(48 * MIB);
    let mut fixed = encrypted(agent.attach(&crate::harness::handle("luks-static"), &blank, 1), PASSPHRASE);
    fixed.volume_context.clear();
    let (code, sentence) = refused(&agent, &fixed, &blank);
    assert!(code == Code::FailedPrecondition && sentence.contains("static"), "{code:?} {sentence}");
    agent.detach(1);
    // Nor an xfs where the header leaves less than 300 MiB.
    let small = Image::new(315 * MIB);
    let mut xfs = encrypted(agent.attach(&crate::harness::handle("luks-small"), &small, 1), PASSPHRASE);
    xfs.capability = mount_capability("xfs");
    let (code, sentence) = refused(&agent, &xfs, &small);
    assert!(code == Code::OutOfRange && sentence.contains(&(299 * MIB).to_string()), "{code:?} {sentence}");
    agent.detach(1);
    assert_nothing_is_told(&agent, &[PASSPHRASE], &[volume_key(&image, PASSPHRASE).unwrap()]);
    agent.guest.power_off().unwrap();
}

#[test]
fn guest_a_passphrase_is_replaced() {
    const NEW: &str = "the passphrase that comes after it";
    let Some(agent) = Agent::start("luks-rotated") else { return };
    let (handle, image) = (handle("luks-rotated"), Image::new(48 * MIB));
    let volume = agent.attach(&handle, &image, 1);
    let old = encrypted(volume.clone(), PASSPHRASE);
    let mut both = encrypted(volume.clone(), NEW);
    both.secrets.insert(secrets::PASSPHRASE_PREVIOUS.into(), PASSPHRASE.into());
    agent.stage(&old);
    agent.publish(&old);
    let file = format!("/node{}/file", old.target);
    let written = agent.guest.fill(&file, 3, MIB).unwrap();
    agent.put_away(&old);
    let key = volume_key(&image, PASSPHRASE).unwrap();
    assert_eq!(keyslots(&image), [0]);

    // A disk that refuses writes is opened by the previous one, and keeps it.
    agent.detach(1);
    agent.guest.machine().plug(&PluggedDrive { read_only: true, ..image.drive(1, Some(&handle.serial())) }).unwrap();
    agent.stage(&both);
    agent.publish(&both);
    assert_eq!(agent.guest.sha256(&file).unwrap(), written);
    agent.put_away(&both);
    agent.detach(1);
    assert_eq!(keyslots(&image), [0]);
    agent.guest.machine().plug(&image.drive(1, Some(&handle.serial()))).unwrap();

    // Twice: the second finds nothing left to replace.
    for _ in 0..2 {
        agent.stage(&both);
        agent.publish(&both);
        assert_eq!(agent.guest.sha256(&file).unwrap(), written);
        agent.put_away(&both);
        assert_eq!(keyslots(&image), [1]);
    }
    assert!(volume_key(&image, NEW).unwrap() == key && volume_key(&image, PASSPHRASE).is_none());
    let (code, _) = refused(&agent, &old, &image);
    assert_eq!(code, Code::InvalidArgument);
    // Neither opens.
    let mut neither = encrypted(volume, "wrong");
    neither.secrets.insert(secrets::PASSPHRASE_PREVIOUS.into(), "wrong too".into());
    let (code, sentence) = refused(&agent, &neither, &image);
    assert!(code == Code::InvalidArgument && sentence.contains("nor with encryption-passphrase-previous"), "{sentence}");
    agent.detach(1);

    // A clone that is larger than its source: opened and grown, never formatted.
    let clone = Image::new(0);
    std::fs::copy(&image.0, &clone.0).unwrap();
    clone.resize(96 * MIB);
    let mut cloned = encrypted(agent.attach(&crate::harness::handle("luks-clone"), &clone, 1), NEW);
    cloned.volume_context.insert(volume_context::CONTENT_SOURCE.into(), "snapshot".into());
    cloned.volume_context.insert(volume_context::RESIZE_REQUIRED.into(), "true".into());
    agent.stage(&cloned);
    agent.publish(&cloned);
    let seen = agent.guest.stat_filesystem(&format!("/node{}", cloned.target)).unwrap();
    assert!(seen.blocks * seen.block_bytes > 64 * MIB, "{seen:?}");
    assert_eq!(agent.guest.sha256(&format!("/node{}/file", cloned.target)).unwrap(), written);
    agent.put_away(&cloned);
    agent.detach(1);
    assert_nothing_is_told(&agent, &[PASSPHRASE, NEW], &[key]);
    agent.guest.power_off().unwrap();
}

/// W16: a raw block volume is encrypted, or refused. W46: its mapping follows the disk, whose size the agent looks up.
#[test]
fn guest_an_encrypted_block_volume() {
    let Some(agent) = Agent::start("luks-block") else { return };
    let (handle, image) = (handle("luks-block"), Image::new(64 * MIB));
    let mut volume = encrypted(agent.attach(&handle, &image, 2), PASSPHRASE);
    volume.capability = block_capability();
    for _ in 0..2 {
        agent.stage(&volume);
        agent.publish(&volume);
    }
    let target = format!("/node{}", volume.target);
    agent.guest.write_at(&target, 20 * MIB, &MARKER.repeat(100)).unwrap();
    assert!(!holds_marker(&image), "plaintext is on the disk");
    assert_eq!(agent.guest.read_at(&target, 20 * MIB, MARKER.len() as u64).unwrap(), MARKER);
    let size = |agent: &Agent| agent.calls.node_get_volume_stats(volume.stats()).unwrap().usage[0].total;
    assert_eq!(size(&agent), (64 * MIB - HEADER_BYTES).cast_signed());
    image.resize(96 * MIB);
    agent.guest.machine().resize(2, 96 * MIB).unwrap();
    let answer = agent.calls.node_expand_volume(volume.expand(96 * MIB)).unwrap();
    assert_eq!(answer.capacity_bytes, (96 * MIB).cast_signed());
    assert_eq!(size(&agent), (96 * MIB - HEADER_BYTES).cast_signed());
    still_in_use(&agent, &volume, &format!("shown at {}", volume.target));
    assert_eq!(mappings(&agent), [mapping_of(&handle)]);
    // Somebody has suspended it: what would wait for it for ever resumes it.
    judge(&agent, "dmsetup", &["suspend", &mapping_of(&handle)]);
    agent.put_away(&volume);
    agent.put_away(&volume);
    assert_eq!((mappings(&agent), agent.guest.stat(&target).unwrap()), (Vec::new(), None));

    // Not open: its ciphertext is not shown instead, whatever the request says.
    let status = agent.calls.node_publish_volume(volume.publish()).unwrap_err();
    assert!(status.code() == Code::FailedPrecondition && status.message().contains("not open"), "{status:?}");
    let plain = NodeVolume { secrets: Default::default(), volume_context: Default::default(), ..volume.clone() };
    let status = agent.calls.node_stage_volume(plain.stage()).unwrap_err();
    assert!(status.code() == Code::InvalidArgument && status.message().contains("encrypted with LUKS"), "{status:?}");
    agent.stage(&volume);
    agent.publish(&volume);
    assert_eq!(agent.guest.read_at(&target, 20 * MIB, MARKER.len() as u64).unwrap(), MARKER);
    agent.put_away(&volume);
    agent.detach(2);
    agent.guest.power_off().unwrap();
}
