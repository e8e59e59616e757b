//! What can be tried without a kernel that trims.

use std::fs;

use super::super::kept::MAX_KEPT;
use super::super::tests::{Bench, HANDLE, ours};
use super::*;
use crate::testing::{FakeDisk, volume};

#[test]
fn a_disk_that_the_trimmer_holds_is_said_to_be_held_by_it() {
    let bench = Bench::new(&[("8:16", "elsewhere", "ext4")]);
    bench.plug(&ours());
    let by = || bench.node.mounted_by(&ours().0).unwrap();
    assert!(by().contains("another mount namespace"), "{}", by());
    let _other = bench.node.begin_trim(sys::Dev { major: 8, minor: 16 });
    assert!(by().contains("another mount namespace"), "another disk's: {}", by());
    let _ours = bench.node.begin_trim(ours().0.dev);
    assert!(by().contains("own trim"), "{}", by());
}

#[test]
fn filesystems_of_this_driver_that_are_writable_are_trimmed_each_once() {
    let bench = Bench::new(&[
        ("8:0", "staging", "ext4"),
        ("8:0", "a/mount", "ext4"),
        ("8:16", "foreign", "xfs"),
        ("8:32", "spared", "xfs"),
        ("8:48", "deaf", "ext4"),
        ("8:64", "btrfs", "btrfs"),
        ("0:35", "tmpfs", "tmpfs"),
    ]);
    let takes = |dev: &str, most: &str| {
        let queue = bench.node.sysfs.join("dev/block").join(dev).join("queue");
        fs::create_dir_all(&queue).unwrap();
        fs::write(queue.join("discard_max_bytes"), most).unwrap();
    };
    let spared = volume("r/z/s/vm-9999-pvc-2");
    bench.plug(&ours());
    bench.plug(&FakeDisk::new(0, 2).named("sdb", 16).serial("somebody's"));
    bench.plug(&FakeDisk::new(0, 3).named("sdc", 32).serial(&spared.serial));
    bench.plug(&FakeDisk::new(0, 4).named("sdd", 48).serial("csi-0000000000000004"));
    bench.plug(&FakeDisk::new(0, 5).named("sde", 64).serial("csi-0000000000000005"));
    ["8:0", "8:16", "8:32", "8:64"].iter().for_each(|dev| takes(dev, "1073741824\n"));
    takes("8:48", "0\n");
    bench.node.spare(&spared, true);
    let candidates = || -> Vec<_> {
        let found = bench.node.trim_candidates().unwrap();
        found.into_iter().map(|candidate| (candidate.name, candidate.point)).collect()
    };
    let first = (volume(HANDLE).serial, bench.path("staging"));
    assert_eq!(candidates(), std::slice::from_ref(&first));
    // Staged anew by a class that says nothing.
    bench.node.spare(&spared, false);
    assert_eq!(candidates(), [first, (spared.serial, bench.path("spared"))]);
}

#[test]
fn a_trim_that_does_not_end_is_left_to_itself_and_bounded() {
    let bench = Bench::new(&[]);
    let disk = |minor: u32| Dev { major: 8, minor };
    let trims: Vec<_> = (0_u32..).take(MAX_STUCK).map(|minor| bench.node.begin_trim(disk(minor)).unwrap()).collect();
    assert!(bench.node.begin_trim(disk(99)).is_none(), "so many at most");
    drop(Over { node: &bench.node, trim: &trims[1] });
    assert!(bench.node.begin_trim(disk(0)).is_none(), "its own goes on");
    assert!(bench.node.begin_trim(disk(1)).is_some());
    bench.node.end_trim(disk(2));
    assert!(trims[2].end.load(Ordering::Relaxed) && !trims[3].end.load(Ordering::Relaxed), "only that disk's");
}

/// An agent that is started anew knows of no class, and its volumes are mounted still.
#[test]
fn what_is_not_to_be_trimmed_is_known_to_the_next_agent() {
    let folder = crate::testing::Folder::new();
    let agent = || Bench::new(&[]).node.remembering_in(folder.path());
    let (first, second) = (volume("r/z/s/vm-9999-pvc-1"), volume("r/z/s/vm-9999-pvc-2"));
    let node = agent();
    node.spare(&first, true);
    node.spare(&second, true);
    node.spare(&first, false);
    let after = agent();
    assert!(after.is_spared(&second.serial) && !after.is_spared(&first.serial));
    after.spare(&second, false);
    assert!(!agent().is_spared(&second.serial));
    // Whatever is in the file, only serials are taken, and not without end.
    fs::write(folder.path().join("discard-ignore"), format!("x\n{}\n", "csi-1\n".repeat(2 * MAX_KEPT))).unwrap();
    let spared = |agent: Node| agent.trimming.spared.count();
    assert_eq!(spared(agent()), Some(MAX_KEPT));
    // Nor is all of it read: it may be of any size.
    let serial = &first.serial;
    fs::write(folder.path().join("discard-ignore"), format!("{}\n{serial}\n", "x".repeat(1 << 20))).unwrap();
    assert!(!agent().is_spared(serial));
    assert_eq!(spared(agent()), None, "there may be more");
    let full: String = (0..MAX_KEPT).map(|number| format!("csi-{number:016x}\n")).collect();
    fs::write(folder.path().join("discard-ignore"), full).unwrap();
    assert_eq!(spared(agent()), Some(MAX_KEPT), "a full one is read whole");
}

/// It is read before the agent answers anybody: whoever can write there must not keep it from starting.
#[test]
fn what_is_not_to_be_trimmed_is_not_waited_for() {
    let folder = crate::testing::Folder::new();
    rustix::fs::mknodat(rustix::fs::CWD, folder.path().join("discard-ignore"), rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
        .unwrap();
    let node = Bench::new(&[]).node.remembering_in(folder.path());
    assert!(!node.is_spared("csi-1"));
}
