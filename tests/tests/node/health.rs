//! How well a volume is: said in its stats in one sentence, once in the log; and a filesystem that the kernel refuses, repaired by hand.

use proto::csi::volume_capability::AccessType;
use testbed::calls::{NodeVolume, block_capability, mount_capability};
use testbed::guest::{Fault, FaultyIo, GuestOptions, ScsiHardware, wait};
use tonic::Code;

use crate::harness::{Agent, Image, MIB, SEEN_LIMIT, assert_clean, handle, wait_for_size};
use crate::xfs::assert_clean_xfs;

/// `None`: no trouble is seen.
fn trouble(agent: &Agent, volume: &NodeVolume) -> Option<String> {
    let stats = agent.calls.node_get_volume_stats(volume.stats()).unwrap();
    // kubelet passes over an answer without one.
    assert!(!stats.usage.is_empty());
    let condition = stats.volume_condition.unwrap();
    assert!(!condition.message.is_empty());
    condition.abnormal.then_some(condition.message)
}

fn assert_trouble(agent: &Agent, volume: &NodeVolume, words: &[&str]) {
    let said = trouble(agent, volume).unwrap_or_else(|| panic!("{words:?} should be said; {}", agent.guest.quote()));
    println!("{said}");
    assert!(words.iter().all(|word| said.contains(word)), "{words:?} should be in {said:?}");
}

fn disk(agent: &Agent, lun: u8) -> String {
    agent.guest.disk_at(lun).unwrap().unwrap()
}

/// The kernel's count of commands that did not end well.
fn failed_commands(agent: &Agent, lun: u8) -> u64 {
    let text = agent.guest.read(&format!("/sys/block/{}/device/ioerr_cnt", disk(agent, lun))).unwrap();
    u64::from_str_radix(text.trim().trim_start_matches("0x"), 16).unwrap()
}

#[test]
fn guest_health_of_volumes() {
    let options = GuestOptions { scsi_hardware: ScsiHardware::VirtioScsiPci, ..GuestOptions::named("health").with_node() };
    let Some(agent) = Agent::start_on(&options) else { return };
    let attached = |name: &str, lun: u8, size_bytes: u64, fstype: &str, flags: &[&str]| {
        let image = Image::new(size_bytes);
        let mut volume = agent.attach(&handle(name), &image, lun);
        volume.capability = mount_capability(fstype);
        let Some(AccessType::Mount(mount)) = &mut volume.capability.access_type else { panic!("no filesystem") };
        mount.mount_flags = flags.iter().map(|flag| (*flag).to_string()).collect();
        agent.stage(&volume);
        agent.publish(&volume);
        assert_eq!(trouble(&agent, &volume), None);
        (volume, image)
    };

    // Errors of ext4, counted and gone on with; then as most distributions mount it.
    let (volume, image) = attached("counted", 1, 64 * MIB, "ext4", &[]);
    let fail = |lun| agent.guest.write_at(&format!("/sys/fs/ext4/{}/trigger_fs_error", disk(&agent, lun)), 0, b"the test").unwrap();
    fail(1);
    assert_trouble(&agent, &volume, &[&format!("the ext4 on {} ", disk(&agent, 1)), "1 errors", "docs/repair.md"]);
    assert_trouble(&agent, &volume, &["1 errors"]);
    agent.put_away(&volume);
    // The next life begins with what the superblock remembers, which the kernel does not grow.
    image.resize(128 * MIB);
    agent.guest.machine().resize(1, 128 * MIB).unwrap();
    wait_for_size(&agent.guest, 1, Some(128 * MIB));
    agent.stage(&volume);
    let why = "the kernel grows no ext4 with an error on record: the ext4 on ";
    let log = agent.log();
    let warned = log.lines().find(|line| line.contains("the filesystem stays smaller than its disk")).unwrap_or_else(|| panic!("{log}"));
    assert!(warned.contains(why) && warned.contains("1 errors") && warned.contains("docs/repair.md"), "{warned}");
    agent.publish(&volume);
    let refused = agent.calls.node_expand_volume(volume.expand(128 * MIB)).expect_err("it is not grown");
    assert!(refused.code() == Code::FailedPrecondition && refused.message().contains(why), "{refused:?}");
    assert_trouble(&agent, &volume, &["1 errors"]);
    agent.put_away(&volume);
    agent.detach(1);
    drop(image);
    let (volume, _image) = attached("read-only", 2, 64 * MIB, "ext4", &["errors=remount-ro"]);
    fail(2);
    // A kernel since 6.12 (and 6.1 with its fixes) refuses writes then and does not call it read-only.
    assert_trouble(&agent, &volume, &["1 errors", "stop the pod", "docs/repair.md"]);
    agent.put_away(&volume);

    // A disk that is offline, and xfs, which shuts itself down over it and stays so.
    let (volume, image) = attached("shut-down", 3, 300 * MIB, "xfs", &[]);
    let (name, file) = (disk(&agent, 3), format!("/node{}/file", volume.target));
    // What it needs to make a folder is in memory then: it comes to its journal, which cannot be written.
    agent.guest.write(&file, b"once").unwrap();
    agent.guest.write(&format!("/sys/block/{name}/device/state"), b"offline\n").unwrap();
    assert_trouble(&agent, &volume, &["offline"]);
    agent.guest.make_folder(&format!("/node{}/folder", volume.target)).unwrap();
    agent.guest.drop_caches().unwrap();
    agent.guest.write(&format!("/sys/block/{name}/device/state"), b"running\n").unwrap();
    assert_trouble(&agent, &volume, &["xfs on ", "shut itself down", "delete the pod"]);
    // As it says: the pod is deleted and comes again.
    agent.put_away(&volume);
    agent.stage(&volume);
    agent.publish(&volume);
    assert_eq!(trouble(&agent, &volume), None);
    agent.put_away(&volume);
    agent.detach(3);
    assert_clean_xfs(&image.0);

    // A sector that cannot be read, of a raw block volume, where no filesystem counts anything.
    let (bad, image) = (20 * MIB, Image::new(64 * MIB));
    let fault = Fault { io: FaultyIo::Read, sector: Some(bad / 512), errno: 5 };
    agent.guest.plug_faulty(&image.drive(4, Some(&handle("sector").serial())), &[fault]).unwrap();
    let volume = NodeVolume { capability: block_capability(), ..agent.volume(&handle("sector"), &image, 4) };
    agent.stage(&volume);
    agent.publish(&volume);
    assert_eq!(trouble(&agent, &volume), None);
    let before = failed_commands(&agent, 4);
    agent.guest.read_at(&format!("/node{}", volume.target), bad, 512).unwrap_err();
    println!("commands failed: {before} by the attach, {} with one bad sector read", failed_commands(&agent, 4) - before);
    assert_trouble(&agent, &volume, &["disk on ", "of late", "look at the storage"]);
    agent.put_away(&volume);

    // Read-only by the kernel: sysrq does it to whatever is on a disk, as ext4 does over an error up to Linux 6.11.
    let (volume, _image) = attached("pulled", 5, 64 * MIB, "ext4", &[]);
    agent.guest.write_at("/proc/sysrq-trigger", 0, b"u").unwrap();
    let made = wait::until(SEEN_LIMIT, || Ok::<_, ()>(trouble(&agent, &volume)));
    assert!(
        made.as_ref().is_ok_and(|said| said.as_ref().is_some_and(|said| said.contains("was made read-only by the kernel;"))),
        "{made:?}"
    );

    // A disk that is pulled.
    println!("commands failed of a disk that is well: {}", failed_commands(&agent, 5));
    agent.detach(5);
    assert_trouble(&agent, &volume, &["no longer there", "delete the pod"]);
    agent.put_away(&volume);

    let log = agent.log();
    // Three lives of trouble in ext4; what is said again is said once.
    assert_eq!(log.lines().filter(|line| line.contains(" 1 errors") && !line.contains(why)).count(), 3, "{log}");
    agent.guest.power_off().unwrap();
}

/// What docs/repair.md says, on the disk that stays attached while stage is refused.
#[test]
fn guest_a_refused_filesystem_is_repaired_by_hand_and_staged() {
    let judges = [("ext4", "e2fsck", "-fy", 64 * MIB), ("xfs", "xfs_repair", "-L", 300 * MIB)];
    let Some(agent) = Agent::start("refused") else { return };
    for (lun, (fstype, tool, flag, size_bytes)) in (1..).zip(judges) {
        let image = Image::new(size_bytes);
        let volume = NodeVolume { capability: mount_capability(fstype), ..agent.attach(&handle(fstype), &image, lun) };
        agent.stage(&volume);
        agent.publish(&volume);
        let written = agent.guest.fill(&format!("/node{}/file", volume.target), 7, MIB).unwrap();
        agent.put_away(&volume);
        agent.detach(lun);
        if fstype == "ext4" {
            // The group descriptors, of which each group has a copy.
            image.write_at(2048, &[0xff; 1024]);
        } else {
            // sb_rootino; inodes of 512 bytes.
            let root = u64::from_be_bytes(image.read_at(56, 8).try_into().unwrap());
            image.write_at(root * 512, &[0xff; 512]);
        }
        agent.attach(&handle(fstype), &image, lun);
        wait_for_size(&agent.guest, lun, Some(size_bytes));
        let device = disk(&agent, lun);
        let status = agent.calls.node_stage_volume(volume.stage()).expect_err("the kernel should refuse it");
        println!("{}", status.message());
        assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
        let node = crate::harness::NODE_ID.split('/').next().unwrap();
        for word in [
            volume.id.as_str(),
            "EUCLEAN",
            "the kernel says: ",
            &format!("{tool} {}", if fstype == "ext4" { "-f " } else { "" }),
            &format!("/dev/{device}"),
            &format!("kubectl debug node/{node} -it --profile=sysadmin --image="),
        ] {
            assert!(status.message().contains(word), "no {word:?} in {status:?}");
        }
        let Some((code, output)) = crate::luks::judge(&agent, tool, &[flag, &format!("/dev/{device}")]) else { return };
        // e2fsck: 1 is "errors corrected".
        assert!(matches!(code, Some(0 | 1)), "{tool}: {output}");
        agent.stage(&volume);
        agent.publish(&volume);
        if fstype == "ext4" {
            assert_eq!(agent.guest.sha256(&format!("/node{}/file", volume.target)).unwrap(), written);
        }
        agent.put_away(&volume);
        agent.detach(lun);
        if fstype == "ext4" {
            assert_clean(&image);
        } else {
            assert_clean_xfs(&image.0);
        }
    }
    agent.guest.power_off().unwrap();
}
