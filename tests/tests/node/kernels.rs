//! Encrypted volumes on other kernels and on other machines than the rest of the tests: 6.12, a node like Talos', a node without
//! device-mapper.

use guest_init::Kind;
use proto::volume_context;
use testbed::calls::{NodeVolume, mount_capability};
use testbed::guest::{GuestOptions, Profile};
use tonic::Code;

use crate::ciphertext::{assert_cryptsetup_opens, decrypted};
use crate::harness::{Agent, Image, MIB, assert_clean, handle, wait_for_size};
use crate::luks::{PASSPHRASE, encrypted, mapping_of, mappings};
use crate::xfs::assert_clean_xfs;

/// Stage, write, expand, unstage; and staged again in another slot.
fn walk(agent: &Agent, fstype: &str, is_argon2id: bool) {
    let sizes = if fstype == "xfs" { [316 * MIB, 416 * MIB] } else { [48 * MIB, 64 * MIB] };
    let (handle, image) = (handle(&format!("kernel-{fstype}-{is_argon2id}")), Image::new(sizes[0]));
    let attach = |lun: u8| {
        let mut volume = encrypted(agent.attach(&handle, &image, lun), PASSPHRASE);
        if is_argon2id {
            volume.volume_context.retain(|key, _| ![volume_context::LUKS_KDF, volume_context::LUKS_KDF_ITERATIONS].contains(&key.as_str()));
        }
        NodeVolume { capability: mount_capability(fstype), ..volume }
    };
    let mut volume = attach(1);
    agent.stage(&volume);
    agent.publish(&volume);
    let file = format!("/node{}/file", volume.target);
    let written = agent.guest.fill(&file, 1, 8 * MIB).unwrap();
    // No udev: the node is ours. It is what the mount table shows, as the reference driver wants it after a switch back.
    let node = format!("/dev/mapper/{}", mapping_of(&handle));
    assert_eq!(agent.guest.stat(&format!("/node{node}")).unwrap().map(|seen| seen.kind), Some(Kind::BlockDevice));
    let table = agent.guest.read("/proc/self/mountinfo").unwrap();
    assert!(table.lines().any(|line| line.contains(&volume.staging) && line.contains(&format!(" {node} "))), "{table}");

    let before = agent.guest.stat_filesystem(&format!("/node{}", volume.target)).unwrap();
    image.resize(sizes[1]);
    agent.guest.machine().resize(1, sizes[1]).unwrap();
    wait_for_size(&agent.guest, 1, Some(sizes[1]));
    volume.secrets.clear();
    agent.calls.node_expand_volume(volume.expand(sizes[1])).unwrap_or_else(|status| panic!("{status:?}; {}", agent.guest.quote()));
    let after = agent.guest.stat_filesystem(&format!("/node{}", volume.target)).unwrap();
    assert!(after.blocks > before.blocks, "{before:?} {after:?}");
    agent.put_away(&volume);
    assert_eq!((mappings(agent), agent.guest.list("/dev/mapper").unwrap()), (Vec::new(), vec!["control".to_owned()]));
    agent.detach(1);

    assert_cryptsetup_opens(&image, PASSPHRASE);
    let plain = decrypted(&image, PASSPHRASE);
    if fstype == "xfs" {
        assert_clean_xfs(&plain.0)
    } else {
        assert_clean(&plain)
    }

    let volume = attach(3);
    agent.stage(&volume);
    agent.publish(&volume);
    agent.guest.drop_caches().unwrap();
    assert_eq!(agent.guest.sha256(&file).unwrap(), written);
    agent.put_away(&volume);
    agent.detach(3);
}

fn walks(name: &str, kernel: &str, profile: Profile, with_argon2id: bool) {
    let options = GuestOptions { kernel: kernel.into(), profile, memory_mib: 384, ..GuestOptions::named(name).with_node() };
    let Some(agent) = Agent::start_on(&options) else { return };
    assert!(agent.guest.read("/proc/version").unwrap().starts_with(&format!("Linux version {kernel}.")));
    let modules = agent.guest.read("/proc/modules").unwrap();
    assert_eq!(modules.contains("af_alg"), profile == Profile::Debian, "{modules}");
    for fstype in ["ext4", "xfs"] {
        walk(&agent, fstype, false);
    }
    if with_argon2id {
        walk(&agent, "ext4", true);
    }
    agent.guest.power_off().unwrap();
}

/// argon2id on 6.1 is in `keys.rs`.
#[test]
fn guest_encrypted_on_a_node_like_talos() {
    walks("talos", "6.1", Profile::Talos, false);
}

#[test]
fn guest_encrypted_on_kernel_6_12() {
    walks("kernel-6.12", "6.12", Profile::Debian, true);
}

#[test]
fn guest_encrypted_without_device_mapper() {
    let Some(agent) = Agent::start_on(&GuestOptions { profile: Profile::WithoutEncryption, ..GuestOptions::named("no-dm").with_node() })
    else {
        return;
    };
    let image = Image::new(48 * MIB);
    let volume = agent.attach(&handle("no-dm"), &image, 1);
    let status = agent.calls.node_stage_volume(encrypted(volume.clone(), PASSPHRASE).stage()).unwrap_err();
    assert!(status.code() == Code::FailedPrecondition && status.message().contains("modprobe dm_mod"), "{status:?}");
    println!("{}", status.message());
    assert!(image.bytes().iter().all(|byte| *byte == 0), "the disk was written to");
    // What is not encrypted does not need it.
    agent.stage(&volume);
    agent.put_away(&volume);
    agent.detach(1);
    assert_clean(&image);
    agent.guest.power_off().unwrap();
}
