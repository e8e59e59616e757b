//! What is on a disk, and whose it is: nothing that is not proven blank is ever formatted.

use testbed::calls::NodeVolume;
use tonic::Code;

use crate::harness::{Agent, Image, MIB, assert_clean, handle};

/// Stage is refused; the image is byte for byte what it was. Answers the sentence.
fn assert_refused(agent: &Agent, volume: &NodeVolume, image: &Image) -> String {
    let before = image.bytes();
    let status = agent.calls.node_stage_volume(volume.stage()).expect_err("stage should be refused");
    assert!(status.code() != Code::Ok && status.message().contains(&volume.id), "{status:?}");
    assert!(image.bytes() == before, "the disk was written to: {status:?}");
    assert!(agent.mounted_at(&volume.staging).is_empty());
    status.message().to_string()
}

/// W03: the slot is right, the WWN is right, the disk is another volume's.
#[test]
fn guest_disk_of_another_volume() {
    let Some(agent) = Agent::start("foreign") else { return };
    // Slot 3 holds another volume's disk: with our context, and with one that says nothing of a serial, as the reference
    // driver's does. Slot 5 is empty. All three wait for their disk until the deadline, at the same time.
    let other = Image::new(32 * MIB);
    agent.guest.machine().plug(&other.drive(3, Some(&handle("other").serial()))).unwrap();
    let ours = agent.volume(&handle("ours"), &other, 3);
    let mut legacy = agent.volume(&handle("legacy"), &other, 3);
    legacy.publish_context.retain(|key, _| key == "DevicePath" || key == "lun");
    let absent = agent.volume(&handle("absent"), &other, 5);
    let before = other.bytes();
    let sentences = std::thread::scope(|scope| {
        let calls = [&ours, &legacy, &absent].map(|volume| scope.spawn(|| agent.calls.node_stage_volume(volume.stage()).unwrap_err()));
        calls.map(|call| call.join().unwrap())
    });
    for (volume, status) in [&ours, &legacy, &absent].into_iter().zip(&sentences) {
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        assert!(status.message().contains(&volume.id), "{status:?}");
        assert!(agent.mounted_at(&volume.staging).is_empty());
    }
    // What was looked for, and what is there instead.
    assert!(sentences[0].message().contains(&handle("ours").serial()), "{sentences:?}");
    assert!(sentences[0].message().contains(&handle("other").serial()), "{sentences:?}");
    assert!(sentences[1].message().contains(&handle("other").serial()), "{sentences:?}");
    assert!(sentences[2].message().contains(&handle("absent").serial()), "{sentences:?}");
    assert!(other.bytes() == before, "the other volume's disk was written to");
    agent.detach(3);

    // A disk without a serial that has the WWN and LUN is what the reference driver attached.
    agent.guest.machine().plug(&other.drive(3, None)).unwrap();
    agent.stage(&legacy);
    agent.put_away(&legacy);
    agent.detach(3);
    assert_clean(&other);
    agent.guest.power_off().unwrap();
}

/// The kernel shows a disk in sysfs a moment before it can be opened: stage once met ENXIO there.
#[test]
fn guest_stage_while_the_disk_is_just_coming() {
    let Some(agent) = Agent::start("coming") else { return };
    for round in 0..8 {
        let (handle, image) = (handle(&format!("coming-{round}")), Image::new(8 * MIB));
        let volume = agent.volume(&handle, &image, 1);
        let staged = std::thread::scope(|scope| {
            let staging = scope.spawn(|| agent.calls.node_stage_volume(volume.stage()));
            agent.guest.machine().plug(&image.drive(1, Some(&handle.serial()))).unwrap();
            staging.join().unwrap()
        });
        staged.unwrap_or_else(|status| panic!("round {round}: {status:?}"));
        agent.put_away(&volume);
        agent.detach(1);
    }
    agent.guest.power_off().unwrap();
}

/// The same ones each time (xorshift64).
fn random_bytes(size_bytes: u64) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let word = |_| {
        for shift in [|x: u64| x ^ (x << 13), |x| x ^ (x >> 7), |x| x ^ (x << 17)] {
            state = shift(state);
        }
        state.to_le_bytes()
    };
    (0..size_bytes / 8).flat_map(word).collect()
}

/// W13: what is there is never overwritten, whatever it is.
#[test]
fn guest_disks_that_are_not_blank() {
    let Some(agent) = Agent::start("not-blank") else { return };
    // (name, offset, bytes): a table of partitions, an XFS, a few stray bytes at the start and at the very end, and nothing but noise.
    let mut table = vec![0; 512];
    table[446..462].copy_from_slice(&[0, 0x20, 0x21, 0, 0x83, 0x28, 0x20, 8, 0, 8, 0, 0, 0, 0, 1, 0]);
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    let random = random_bytes(32 * MIB);
    let stray: [(&str, u64, &[u8]); 5] = [
        ("table", 0, &table),
        ("xfs", 0, b"XFSB\0\0\x10\0"),
        ("start", 100 * 1024, b"stray"),
        ("end", 32 * MIB - 5, b"stray"),
        ("random", 0, &random),
    ];
    for (name, offset, bytes) in stray {
        let (handle, image) = (handle(name), Image::new(32 * MIB));
        image.write_at(offset, bytes);
        let volume = agent.attach(&handle, &image, 5);
        let sentence = assert_refused(&agent, &volume, &image);
        // What was seen, where, and on which disk.
        let device = format!("/dev/{}", agent.guest.disk_at(5).unwrap().unwrap());
        assert!(sentence.contains(&format!("at byte {offset}")) && sentence.contains(&device), "{name}: {sentence}");
        agent.detach(5);
    }
    // A static volume is never formatted, even blank.
    let (fixed, image) = (handle("static"), Image::new(32 * MIB));
    let mut volume = agent.attach(&fixed, &image, 5);
    volume.volume_context.clear();
    assert_refused(&agent, &volume, &image);
    agent.detach(5);

    // On recycled storage, old bytes behind a zeroed first 4 KiB are normal.
    let (recycled, image) = (handle("recycled"), Image::new(32 * MIB));
    image.write_at(100 * 1024, &vec![0x5a; 1 << 20]);
    let mut volume = agent.attach(&recycled, &image, 5);
    volume.publish_context.insert(proto::publish_context::ZEROED.into(), "0".into());
    agent.stage(&volume);
    agent.put_away(&volume);
    agent.detach(5);
    assert_clean(&image);
    agent.guest.power_off().unwrap();
}

#[test]
fn guest_damaged_filesystems() {
    let Some(agent) = Agent::start("damaged") else { return };
    let (handle, image) = (handle("damaged"), Image::new(256 * MIB));
    let volume = agent.attach(&handle, &image, 1);
    agent.stage(&volume);
    agent.put_away(&volume);
    agent.detach(1);
    let sound = image.bytes();

    // The superblock speaks of more blocks than the disk has: the kernel's own sentence comes through.
    image.resize(128 * MIB);
    let volume = agent.attach(&handle, &image, 2);
    let sentence = assert_refused(&agent, &volume, &image);
    assert!(sentence.contains("bad geometry: block count"), "{sentence}");
    agent.detach(2);

    // Group descriptors destroyed behind a sound superblock: in the block after it (s_log_block_size 0 means 1 KiB).
    std::fs::write(&image.0, &sound).unwrap();
    image.write_at(if sound[1024 + 24] == 0 { 2048 } else { 4096 }, &[0xff; 64]);
    let volume = agent.attach(&handle, &image, 2);
    let sentence = assert_refused(&agent, &volume, &image);
    assert!(sentence.contains("group descriptors corrupted") || sentence.contains("ext4_check_descriptors"), "{sentence}");
    agent.detach(2);

    // The superblock itself: whatever is said, nothing is formatted. First its checksum, then all of it.
    for (offset, length) in [(1024 + 0x3fc, 4), (1024, 1024)] {
        std::fs::write(&image.0, &sound).unwrap();
        image.write_at(offset, &vec![0xff; length]);
        let volume = agent.attach(&handle, &image, 2);
        let sentence = assert_refused(&agent, &volume, &image);
        println!("damaged superblock ({length} bytes): {sentence}");
        agent.detach(2);
        // Even zeroed: the backups carry this volume's UUID.
        image.write_at(1024, &[0; 1024]);
        let volume = agent.attach(&handle, &image, 2);
        println!("zeroed superblock: {}", assert_refused(&agent, &volume, &image));
        agent.detach(2);
    }
    agent.guest.power_off().unwrap();
}
