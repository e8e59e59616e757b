//! Encrypted volumes that somebody else has made or opened: cryptsetup, and with it the reference driver; and damage.

use std::process::Command;
use std::time::Duration;

use disk::{Write, ext4};
use proto::volume_context;
use testbed::calls::{NodeVolume, block_capability};
use testbed::guest::{Program, wait};
use testbed::tools;
use tonic::Code;

use crate::harness::{Agent, Image, MIB, handle, wait_for_size};
use crate::luks::{HEADER_BYTES, PASSPHRASE, assert_nothing_is_told, encrypted, judge, keyslots, mapping_of, mappings, volume_key};

/// Where cryptsetup finds the passphrase in the guest.
const KEY_FILE: &str = "/passphrase";
/// cryptsetup opens with PBKDF2 of 1,000 rounds, on an emulated machine.
const CRYPTSETUP_LIMIT: Duration = Duration::from_secs(60);
/// ext4lazyinit rests ten times as long as each table took it (`s_li_wait_mult`): a minute on a loaded machine.
const ZEROED_LIMIT: Duration = Duration::from_secs(180);
/// EXT4_BG_INODE_ZEROED, in `bg_flags` of a group descriptor.
const INODE_ZEROED: u8 = 4;

/// cryptsetup on this host formats the image; `None`, after saying so, where there is none.
pub(crate) fn format(image: &Image, args: &[&str]) -> Option<()> {
    let Some(cryptsetup) = tools::program("cryptsetup") else {
        tools::skipped("cryptsetup is missing: no volume of its making is opened");
        return None;
    };
    let key_file = image.0.with_extension("passphrase");
    std::fs::write(&key_file, PASSPHRASE).unwrap();
    let key_file_arg = format!("--key-file={}", key_file.display());
    let output = Command::new(cryptsetup).args(["luksFormat", "-q"]).args(args).arg(&key_file_arg).arg(&image.0).output().unwrap();
    std::fs::remove_file(&key_file).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(())
}

/// A static volume, as one is that came with the reference driver's PV.
pub(crate) fn fixed(mut volume: NodeVolume) -> NodeVolume {
    volume.volume_context.retain(|key, _| *key != volume_context::PROVISIONER_IDENTITY && *key != volume_context::CONTENT_SOURCE);
    volume
}

/// An ext4 in the mapping, written through the raw block volume: nothing is ever made inside a volume that was found.
fn make_ext4(agent: &Agent, volume: &NodeVolume, size_bytes: u64) {
    let block = NodeVolume { capability: block_capability(), ..volume.clone() };
    agent.stage(&block);
    agent.publish(&block);
    // On an image cryptsetup takes sectors of 4096 bytes.
    let options =
        ext4::Options { reads_zeros: false, block_size: Some(4096), ..ext4::Options::new(size_bytes, [5; 16], [6; 16], 1_700_000_000) };
    for write in ext4::plan(&options).unwrap() {
        let (offset, bytes) = match write {
            Write::Data { offset, bytes } => (offset, bytes),
            Write::Zeros { offset, length } => (offset, vec![0; usize::try_from(length).unwrap()]),
            Write::Flush => continue,
        };
        agent.guest.write_at(&format!("/node{}", block.target), offset, &bytes).unwrap();
    }
    agent.put_away(&block);
}

#[test]
fn guest_volumes_that_cryptsetup_made() {
    let Some(agent) = Agent::start("cryptsetup") else { return };
    // LUKS1 puts its data at 2 MiB. The least that argon2id may take here; the reference driver's volumes take 1 GiB.
    let kinds: [(&str, &[&str], u64); 3] = [
        ("luks1", &["--type", "luks1", "--pbkdf-force-iterations", "1000"], 2 * MIB),
        ("pbkdf2", &["--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"], HEADER_BYTES),
        (
            "argon2id",
            &["--type", "luks2", "--pbkdf", "argon2id", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "64", "--pbkdf-parallel", "4"],
            HEADER_BYTES,
        ),
    ];
    // More memory than there is: a sentence with both numbers instead of the kernel's OOM killer.
    let (hungry, image) = (handle("hungry"), Image::new(40 * MIB));
    let memory = ["--type", "luks2", "--pbkdf", "argon2id", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "262144"];
    let Some(()) = format(&image, &memory) else { return };
    let volume = fixed(encrypted(agent.attach(&hungry, &image, 1), PASSPHRASE));
    let status = agent.calls.node_stage_volume(volume.stage()).unwrap_err();
    assert!(status.code() == Code::FailedPrecondition && status.message().contains("needs 256 MiB of memory"), "{status:?}");
    assert!(status.message().contains("/proc/meminfo") && status.message().contains("luksConvertKey"), "{status:?}");
    println!("{}", status.message());
    agent.detach(1);

    let mut keys = Vec::new();
    for (name, args, header_bytes) in kinds {
        let (handle, image) = (handle(name), Image::new(40 * MIB));
        let cipher = ["-c", "aes-xts-plain64", "--key-size", "512"];
        let Some(()) = format(&image, &[args, &cipher].concat()) else { return };
        let volume = fixed(encrypted(agent.attach(&handle, &image, 1), PASSPHRASE));
        // Its inside is noise: no filesystem is made of that.
        let status = agent.calls.node_stage_volume(volume.stage()).unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition, "{name}: {status:?}");
        agent.calls.node_unstage_volume(volume.unstage()).unwrap();
        make_ext4(&agent, &volume, 40 * MIB - header_bytes);
        agent.stage(&volume);
        agent.publish(&volume);
        assert_eq!(agent.mounted_at(&volume.target), ["ext4"], "{name}");
        let file = format!("/node{}/file", volume.target);
        let written = agent.guest.fill(&file, 1, MIB).unwrap();
        image.resize(64 * MIB);
        agent.guest.machine().resize(1, 64 * MIB).unwrap();
        wait_for_size(&agent.guest, 1, Some(64 * MIB));
        agent.calls.node_expand_volume(volume.expand(64 * MIB)).unwrap();
        let seen = agent.guest.stat_filesystem(&format!("/node{}", volume.target)).unwrap();
        assert!(seen.blocks * seen.block_bytes > 36 * MIB, "{name}: {seen:?}");
        agent.put_away(&volume);
        if name != "luks1" {
            // A copy of its header that was damaged is mended from the other.
            let whole = image.read_at(0, 32 << 10);
            image.write_at(if name == "pbkdf2" { 0 } else { 16 << 10 }, &[0xff; 512]);
            agent.detach(1);
            agent.guest.machine().plug(&image.drive(1, Some(&handle.serial()))).unwrap();
            agent.stage(&volume);
            let healed = image.read_at(0, 32 << 10);
            // All but the salts and the checksums over them.
            let without_salts = |header: &[u8]| [&header[..104], &header[168..448], &header[4096..16488], &header[20480..]].concat();
            assert_eq!(without_salts(&whole), without_salts(&healed), "{name}");
        } else {
            agent.stage(&volume);
        }
        agent.publish(&volume);
        agent.guest.drop_caches().unwrap();
        assert_eq!(agent.guest.sha256(&file).unwrap(), written, "{name}");
        agent.put_away(&volume);
        assert_eq!(mappings(&agent), Vec::<String>::new());
        agent.detach(1);
        keys.extend(volume_key(&image, PASSPHRASE));
    }
    assert_eq!(keys.len(), 3);
    assert_nothing_is_told(&agent, &[PASSPHRASE], &keys);
    agent.guest.power_off().unwrap();
}

/// As the reference driver opens a volume: by the disk's name, and without our options.
fn open_as_reference(agent: &Agent, disk: &str) -> Option<String> {
    let name = format!("{disk}-encrypted");
    agent.guest.write(KEY_FILE, PASSPHRASE.as_bytes()).unwrap();
    agent.guest.make_folder("/run/cryptsetup").unwrap();
    let (device, key_file) = (format!("/dev/{disk}"), format!("--key-file={KEY_FILE}"));
    let (code, output) = judge(agent, "cryptsetup", &["luksOpen", &device, &name, &key_file])?;
    assert_eq!(code, Some(0), "{output}");
    Some(name)
}

/// W32: what it left open is adopted, or refused with the difference. W45: discards pass, where the class says so.
#[test]
fn guest_a_mapping_of_the_reference_driver_is_taken_over() {
    let Some(agent) = Agent::start("take-over") else { return };
    let (handle, image) = (handle("take-over"), Image::new(48 * MIB));
    // The reference driver's attachment carries no serial.
    agent.guest.machine().plug(&image.drive(3, None)).unwrap();
    let mut volume = encrypted(agent.volume(&handle, &image, 3), PASSPHRASE);
    volume.publish_context.retain(|key, _| key == "DevicePath" || key == "lun");
    agent.stage(&volume);
    agent.publish(&volume);
    let file = format!("/node{}/file", volume.target);
    let written = agent.guest.fill(&file, 1, MIB).unwrap();
    agent.put_away(&volume);

    // Staged by the reference driver, then this one comes: it finds all done, grows it, and puts it away.
    let disk = agent.guest.disk_at(3).unwrap().unwrap();
    let staging = format!("/node{}", volume.staging);
    let Some(name) = open_as_reference(&agent, &disk) else { return };
    let device = format!("/dev/mapper/{name}");
    agent.guest.make_folder(&staging).unwrap();
    agent.guest.mount(&device, &staging, "ext4", false).unwrap();
    agent.stage(&volume);
    assert_eq!((mappings(&agent), agent.mounted_at(&volume.staging)), (vec![name.clone()], vec!["ext4".to_string()]));
    agent.publish(&volume);
    assert_eq!(agent.guest.sha256(&file).unwrap(), written);
    image.resize(64 * MIB);
    agent.guest.machine().resize(3, 64 * MIB).unwrap();
    wait_for_size(&agent.guest, 3, Some(64 * MIB));
    // cryptsetup's key is its own: this needs the secret.
    let without = NodeVolume { secrets: Default::default(), ..volume.clone() };
    let status = agent.calls.node_expand_volume(without.expand(64 * MIB)).unwrap_err();
    assert!(status.code() == Code::InvalidArgument && status.message().contains("node-expand-secret-name"), "{status:?}");
    agent.calls.node_expand_volume(volume.expand(64 * MIB)).unwrap();
    let seen = agent.guest.stat_filesystem(&format!("/node{}", volume.target)).unwrap();
    assert!(seen.blocks * seen.block_bytes > 36 * MIB, "{seen:?}");
    // Still in use: the second call, too, which finds nothing mounted that would lead it to the disk.
    for _ in 0..2 {
        let status = agent.calls.node_unstage_volume(volume.unstage()).unwrap_err();
        assert!(status.code() == Code::FailedPrecondition && status.message().contains("still in use"), "{status:?}");
        assert_eq!((mappings(&agent), agent.mounted_at(&volume.staging)), (vec![name.clone()], Vec::new()));
    }
    agent.put_away(&volume);
    assert_eq!(mappings(&agent), Vec::<String>::new());

    // Open and not mounted: adopted. With another table: refused, untouched.
    open_as_reference(&agent, &disk);
    agent.stage(&volume);
    assert_eq!((mappings(&agent), agent.mounted_at(&volume.staging)), (vec![name.clone()], vec!["ext4".to_string()]));
    judge(&agent, "dmsetup", &["suspend", &name]);
    agent.put_away(&volume);
    open_as_reference(&agent, &disk);
    let mut other = volume.clone();
    other.volume_context.insert(volume_context::LUKS_DISCARDS.into(), "true".into());
    let status = agent.calls.node_stage_volume(other.stage()).unwrap_err();
    assert!(status.code() == Code::FailedPrecondition && status.message().contains("allow_discards"), "{status:?}");
    assert_eq!(mappings(&agent), [name]);
    let close =
        Program { label: "close", root: None, program: &tools::program("cryptsetup").unwrap(), args: &["luksClose", &device], env: &[] };
    assert_eq!(agent.guest.run(&close, CRYPTSETUP_LIMIT).unwrap().exit.code, Some(0));
    agent.stage(&other);
    if let Some((code, table)) = judge(&agent, "dmsetup", &["table", &mapping_of(&handle)]) {
        assert!(code == Some(0) && table.trim_end().ends_with("1 allow_discards"), "{table}");
    }
    agent.put_away(&other);
    agent.detach(3);
    agent.guest.power_off().unwrap();
}

/// A disk that reads as zeros reads as noise through dm-crypt: the inode tables must not be called zeroed there.
#[test]
fn guest_a_damaged_group_inside_encryption_is_repaired() {
    let Some(agent) = Agent::start("luks-damaged") else { return };
    let (handle, image) = (handle("luks-damaged"), Image::new(144 * MIB));
    let mut volume = encrypted(agent.attach(&handle, &image, 1), PASSPHRASE);
    volume.volume_context.insert(volume_context::BLOCK_SIZE.into(), "1024".into());
    agent.stage(&volume);
    let device = format!("/dev/mapper/{}", mapping_of(&handle));
    // 16 groups of 8 MiB, their descriptors of 64 bytes in block 2.
    let flags = |group: u64| agent.guest.read_at(&device, 2048 + 64 * group + 0x12, 1).unwrap()[0];
    // The kernel zeroes them behind the mount, and says so then.
    let zeroed = wait::until(ZEROED_LIMIT, || Ok::<_, ()>((0..16).all(|group| flags(group) & INODE_ZEROED != 0).then_some(())));
    assert_eq!(zeroed, Ok(Some(())), "the kernel has not zeroed all inode tables");
    agent.guest.unmount(&format!("/node{}", volume.staging)).unwrap();
    // A group that no file is in.
    agent.guest.write_at(&device, 2048 + 64 * 9 + 0x1e, &[0xff; 2]).unwrap();
    let Some((_, output)) = judge(&agent, "e2fsck", &["-fy", &device]) else { return };
    assert!(output.contains("checksum") && !output.contains("garbage") && !output.contains("Inode"), "{output}");
    let (code, output) = judge(&agent, "e2fsck", &["-fn", &device]).unwrap();
    assert_eq!(code, Some(0), "{output}");
    agent.put_away(&volume);
    assert_eq!((mappings(&agent), keyslots(&image)), (vec![], vec![0]));
    agent.detach(1);
    agent.guest.power_off().unwrap();
}

#[test]
fn guest_disk_pulled_under_a_mapping() {
    let Some(mut agent) = Agent::start("luks-pulled") else { return };
    let (handle, image) = (handle("luks-pulled"), Image::new(48 * MIB));
    let volume = encrypted(agent.attach(&handle, &image, 1), PASSPHRASE);
    agent.stage(&volume);
    agent.publish(&volume);
    let file = format!("/node{}/synced", volume.target);
    let written = agent.guest.fill(&file, 5, MIB).unwrap();
    agent.detach(1);
    let status = agent.calls.node_stage_volume(volume.stage()).unwrap_err();
    // Its mount went with it; the pod's bind holds the mapping.
    assert!(status.code() == Code::Unavailable && status.message().contains("no disk has serial"), "{status:?}");
    agent.calls.node_unpublish_volume(volume.unpublish()).unwrap();
    // A new agent finds the mapping by its UUID alone.
    agent.restart();
    agent.put_away(&volume);
    assert_eq!(mappings(&agent), Vec::<String>::new());
    // Or it is left, and what is attached anew takes its place.
    let volume = encrypted(agent.attach(&handle, &image, 2), PASSPHRASE);
    agent.stage(&volume);
    agent.publish(&volume);
    assert_eq!(agent.guest.sha256(&file).unwrap(), written);
    agent.calls.node_unpublish_volume(volume.unpublish()).unwrap();
    agent.guest.unmount(&format!("/node{}", volume.staging)).unwrap();
    agent.detach(2);
    let volume = encrypted(agent.attach(&handle, &image, 5), PASSPHRASE);
    agent.stage(&volume);
    agent.publish(&volume);
    assert_eq!(agent.guest.sha256(&file).unwrap(), written);
    agent.put_away(&volume);
    assert_eq!(mappings(&agent), Vec::<String>::new());
    agent.detach(5);
    agent.guest.power_off().unwrap();
}
