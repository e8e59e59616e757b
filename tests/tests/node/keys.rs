//! Key derivations under a pod's memory limit: a real control group, one derivation at a time, and a rotation that has to wait.

use std::time::Duration;

use disk::luks::{Argon2Cost, Format, Kdf, Material};
use disk::{Mark, Write, mark};
use proto::{VolumeHandle, secrets, volume_context};
use testbed::calls::{NodeVolume, block_capability};
use testbed::guest::{GuestOptions, wait};
use tonic::Code;

use crate::harness::{Agent, Image, MIB, handle};
use crate::luks::{PASSPHRASE, assert_nothing_is_told, encrypted, keyslots, mappings, volume_key};
use crate::luks_foreign::{fixed, format};

const NEW: &str = "the passphrase that comes after it";
/// The agent's control group: version 2, as a container's.
const GROUPS: &str = "/node/sys/fs/cgroup";
const GROUP: &str = "/node/sys/fs/cgroup/agent";
const LIMIT_MIB: u64 = 48;
/// Room for the default's 64 MiB or for [`FITTING`], and not for both at once.
const ROOM_MIB: u64 = 80;
/// The least that a class can ask for: 10 s on an emulated machine.
const FITTING: Kdf = Kdf::Argon2id(Argon2Cost { time: 4, memory_kib: 32 << 10, lanes: 1 });
/// What is resident only while a key is being derived.
const DERIVING_KIB: u64 = 24 << 10;
/// An emulated machine comes to the first derivation after some seconds.
const DERIVING_LIMIT: Duration = Duration::from_secs(120);
/// Each waits a minute.
const MAX_TRIES: u32 = 5;

fn set(agent: &Agent, file: &str, value: &str) {
    agent.guest.write(&format!("{GROUP}/{file}"), value.as_bytes()).unwrap();
}

/// Into a group with that limit.
fn confine(agent: &Agent) {
    agent.guest.mount("none", GROUPS, "cgroup2", false).unwrap();
    agent.guest.write(&format!("{GROUPS}/cgroup.subtree_control"), b"+memory").unwrap();
    agent.guest.make_folder(GROUP).unwrap();
    set(agent, "memory.max", &(LIMIT_MIB * MIB).to_string());
    set(agent, "cgroup.procs", &agent.job.pid.to_string());
}

/// Nobody was killed, and the agent lives.
fn assert_alive(agent: &Agent) {
    let events = agent.guest.read(&format!("{GROUP}/memory.events")).unwrap();
    assert!(events.contains("oom_kill 0\n"), "{events}");
    let (exit, _) = agent.guest.output(agent.job).unwrap();
    assert!(exit.is_none(), "{exit:?}");
}

/// A volume as the node leaves it between LUKS and filesystem, made on this host, which is faster.
fn made(handle: &VolumeHandle, kdf: Kdf) -> Image {
    let image = Image::new(48 * MIB);
    let mut next = 0_u8;
    let material = Material::draw(|buffer: &mut [u8]| {
        for byte in buffer {
            next = next.wrapping_mul(5).wrapping_add(17);
            *byte = next;
        }
        Ok::<_, ()>(())
    });
    let uuid = "0d7912f4-55a0-8c1e-9d0f-7fb0f2a2c0de".to_owned();
    let format = Format { device_size_bytes: image.size_bytes(), sector_size: 512, uuid, kdf };
    let (mark, noise) = (Mark::new(&handle.serial()).unwrap(), Material::noise(&[7; 64]).unwrap());
    let plan = format.plan_marked(PASSPHRASE.as_bytes(), &material.unwrap(), std::slice::from_ref(&(0..4096)), Some(&mark), noise);
    for write in mark::Format::new(plan.unwrap(), &mark) {
        if let Write::Data { offset, bytes } = write {
            image.write_at(offset, &bytes);
        }
    }
    image
}

fn with_passphrase(mut volume: NodeVolume) -> NodeVolume {
    volume.secrets.insert(secrets::PASSPHRASE.into(), PASSPHRASE.into());
    volume
}

/// Both passphrases, and what the new keyslot is to cost; nothing: the default, argon2id with 64 MiB.
fn rotated(volume: &NodeVolume, is_cheap: bool) -> NodeVolume {
    let mut volume = encrypted(volume.clone(), NEW);
    volume.secrets.insert(secrets::PASSPHRASE_PREVIOUS.into(), PASSPHRASE.into());
    if !is_cheap {
        volume.volume_context.retain(|key, _| ![volume_context::LUKS_KDF, volume_context::LUKS_KDF_ITERATIONS].contains(&key.as_str()));
    }
    volume
}

/// What agents remember of it, one after the other.
const REMEMBERED: &str = "/node/csi/rotations-outstanding";

/// Staged by the previous passphrase, nothing of the header changed, said in the log, and known to the next agent until the volume is unstaged.
fn stays_outstanding(agent: &mut Agent, volume: &NodeVolume, image: &Image, because: &str) {
    let before = image.read_at(0, 2 << 20);
    agent.stage(volume);
    let log = agent.log();
    let serial = volume.publish_context[proto::publish_context::SERIAL].as_str();
    assert_eq!(agent.guest.read(REMEMBERED).unwrap(), serial);
    agent.restart();
    set(agent, "cgroup.procs", &agent.job.pid.to_string());
    // Its socket is there once it has looked at what is open.
    agent.calls.node_get_capabilities(proto::csi::NodeGetCapabilitiesRequest {}).unwrap();
    assert_eq!(agent.guest.read(REMEMBERED).unwrap(), serial, "the volume is open, and known to be one of them");
    agent.calls.node_unstage_volume(volume.unstage()).unwrap();
    assert_eq!(agent.guest.read(REMEMBERED).unwrap(), "");
    assert!(image.read_at(0, 2 << 20) == before, "the header was changed");
    let line = log.lines().rfind(|line| line.contains("is outstanding")).unwrap_or_default();
    assert!(line.contains(&volume.id) && line.contains(because), "{line:?} of {log}");
    println!("{line}");
}

/// More memory than the group has: a sentence with both numbers, whether the volume is to be made or opened.
fn too_much_memory_is_refused(agent: &Agent) {
    let (blank, there) = (handle("keys-blank"), handle("keys-there"));
    for (handle, image, words) in
        [(&blank, Image::new(48 * MIB), "the new keyslot needs 64 MiB"), (&there, made(&there, Kdf::DEFAULT), "keyslot 0 needs 64 MiB")]
    {
        let volume = with_passphrase(agent.attach(handle, &image, 1));
        let before = image.bytes();
        let status = agent.calls.node_stage_volume(volume.stage()).unwrap_err();
        println!("{}", status.message());
        assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
        for words in [words, "/sys/fs/cgroup/agent", &format!("of {} KiB", LIMIT_MIB << 10)] {
            assert!(status.message().contains(words), "{words}: {status:?}");
        }
        assert!(image.bytes() == before, "the disk was written to");
        agent.detach(1);
    }
    assert_alive(agent);
}

fn rotation_waits_for_memory(agent: &mut Agent) {
    let (handle, image) = (handle("keys-rotated"), Image::new(48 * MIB));
    let volume = agent.attach(&handle, &image, 1);
    let old = encrypted(volume.clone(), PASSPHRASE);
    // PBKDF2 needs no memory.
    agent.stage(&old);
    agent.put_away(&old);
    stays_outstanding(agent, &rotated(&volume, false), &image, "the new keyslot needs 64 MiB");
    assert_eq!(keyslots(&image), [0]);
    // The next stage tries again.
    let both = rotated(&volume, true);
    agent.stage(&both);
    agent.put_away(&both);
    assert!(keyslots(&image) == [1] && volume_key(&image, NEW).is_some());
    agent.detach(1);
}

/// As kubelet does it: on a slow machine the other derivation may take longer than a call waits.
fn stage_in_turn(agent: &Agent, volume: &NodeVolume) {
    for _ in 0..MAX_TRIES {
        match agent.calls.node_stage_volume(volume.stage()) {
            Ok(_) => return,
            Err(status) if status.message().contains("one at a time is allowed") => println!("{}", status.message()),
            Err(status) => panic!("{status:?}; {}", agent.guest.quote()),
        }
    }
    panic!("{} has not had its turn in {MAX_TRIES} calls; {}", volume.id, agent.guest.quote());
}

/// Two keys at once would be the group's end. One is of a volume that is made now, with no word about its keyslot in the class.
fn one_derivation_at_a_time_and_nobody_else_waits(agent: &Agent) {
    let handles = ["keys-1", "keys-2", "keys-plain"].map(handle);
    let images = [Image::new(48 * MIB), made(&handles[1], FITTING), Image::new(48 * MIB)];
    set(agent, "memory.max", &(ROOM_MIB * MIB).to_string());
    let volumes: Vec<NodeVolume> =
        (1..).zip(handles.iter().zip(&images)).map(|(lun, (handle, image))| agent.attach(handle, image, lun)).collect();
    let [first, second, plain] = volumes.as_slice() else { panic!() };
    std::thread::scope(|scope| {
        let staged = [first, second].map(|volume| scope.spawn(|| stage_in_turn(agent, &with_passphrase(volume.clone()))));
        let deriving =
            wait::until(DERIVING_LIMIT, || Ok::<_, anyhow::Error>((agent.guest.resident_kib(agent.job.pid)? > DERIVING_KIB).then_some(())));
        assert!(deriving.unwrap().is_some(), "no key is derived; {}", agent.guest.quote());
        agent.stage(plain);
        agent.publish(plain);
        agent.put_away(plain);
        let is_done = staged.each_ref().map(|staged| staged.is_finished());
        assert!(!is_done.iter().all(|is_done| *is_done), "the plain volume's calls came after both derivations");
        for staged in staged {
            staged.join().unwrap();
        }
    });
    assert_eq!(mappings(agent).len(), 2);
    let metadata = String::from_utf8_lossy(&images[0].read_at(4096, 1024)).into_owned();
    assert!(metadata.contains(r#""type":"argon2id","time":4,"memory":65536,"cpus":1"#), "{metadata}");
    for volume in [first, second] {
        assert_eq!(agent.mounted_at(&volume.staging), ["ext4"]);
        agent.put_away(volume);
    }
    assert_alive(agent);
    (1..=3).for_each(|lun| agent.detach(lun));
}

/// cryptsetup makes headers with room for one keyslot, too.
fn rotation_waits_for_a_free_keyslot(agent: &mut Agent) {
    let (handle, image) = (handle("keys-full"), Image::new(48 * MIB));
    let args = ["--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--luks2-keyslots-size", "256k"];
    let Some(()) = format(&image, &args) else { return };
    let mut volume = fixed(agent.attach(&handle, &image, 1));
    volume.capability = block_capability();
    stays_outstanding(agent, &rotated(&volume, true), &image, "no room for another keyslot");
    agent.detach(1);
}

#[test]
fn guest_keys_within_a_memory_limit() {
    let Some(mut agent) = Agent::start_on(&GuestOptions { memory_mib: 384, ..GuestOptions::named("keys").with_node() }) else { return };
    confine(&agent);
    too_much_memory_is_refused(&agent);
    rotation_waits_for_memory(&mut agent);
    one_derivation_at_a_time_and_nobody_else_waits(&agent);
    rotation_waits_for_a_free_keyslot(&mut agent);
    assert_alive(&agent);
    assert_nothing_is_told(&agent, &[PASSPHRASE, NEW], &[]);
    agent.guest.power_off().unwrap();
}
