//! What can be tried without a kernel's disks: a sysfs and a mountinfo of our own. The rest is tried in the guest.

use std::fs;
use std::os::unix::fs::symlink;

use super::mapping::Medium;
use super::*;
use crate::plan::{Mount, Target};
use crate::request::{
    Access, ExpandRequest, Format, PublishRequest, PublishSource, StageRequest, StagedAt, StatsRequest, UnpublishRequest, UnstageRequest,
    Zeroed,
};
use crate::testing::{FakeDisk, Folder, volume};

pub(super) const HANDLE: &str = "r/z/s/vm-9999-pvc-1";

pub(super) struct Bench {
    root: Folder,
    pub(super) node: Node,
}

impl Bench {
    /// `mounts`: device, path below kubelet's folder.
    pub(super) fn new(mounts: &[(&str, &str, &str)]) -> Self {
        let root = Folder::new();
        let path = fs::canonicalize(root.path()).unwrap();
        let kubelet = path.join("kubelet");
        fs::create_dir_all(&kubelet).unwrap();
        let lines: String = mounts
            .iter()
            .enumerate()
            .map(|(id, (dev, at, fstype))| format!("{} 1 {dev} / {}/{at} rw - {fstype} /dev/sdx rw\n", id + 2, kubelet.display()))
            .collect();
        fs::write(path.join("mountinfo"), lines).unwrap();
        let node = Node {
            sysfs: path.join("sys"),
            mountinfo: path.join("mountinfo"),
            devices: path.join("dev"),
            proc: path.join("proc"),
            folders: Folders::new(vec![kubelet]).unwrap(),
            workers: Slots::new(1),
            kdf: Slots::new(1),
            mounting: Mutex::default(),
            staged: Mutex::default(),
            unstaging: Mutex::default(),
            health: Mutex::default(),
            trimming: trim::Trimming::default(),
            rotations: kept::Kept::default(),
            name: "worker-1".into(),
            stop: Stop::default(),
        };
        Self { root, node }
    }

    pub(super) fn plug(&self, disk: &FakeDisk) {
        disk.plug(&self.node.sysfs);
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        fs::canonicalize(self.root.path()).unwrap().join("kubelet").join(name)
    }

    fn staging(&self) -> Mount {
        let disks = scsi::scan(&self.node.sysfs).unwrap();
        self.node.look_staging(&volume(HANDLE), Some(&self.path("staging")), &disks).unwrap().mount
    }

    fn target(&self, name: &str) -> Target {
        self.target_of(name, None)
    }

    /// `node`: whose device node is there.
    fn target_of(&self, name: &str, node: Option<sys::Dev>) -> Target {
        let disks = scsi::scan(&self.node.sysfs).unwrap();
        let real = self.node.real(&self.path(name)).unwrap();
        self.node.look_target(&volume(HANDLE), real.as_deref(), &disks, |_| Ok(node), |_| true).unwrap()
    }
}

pub(super) fn ours() -> FakeDisk {
    FakeDisk::new(0, 1).serial(&volume(HANDLE).serial)
}

/// W15: what is mounted at the staging path is the volume's only if its disk is.
#[test]
fn whose_a_staging_mount_is() {
    assert_eq!(Bench::new(&[]).staging(), Mount::None);
    assert_eq!(Bench::new(&[("8:0", "elsewhere", "ext4")]).staging(), Mount::None);
    let bench = Bench::new(&[("8:0", "staging", "ext4")]);
    assert_eq!(bench.staging(), Mount::Gone, "no such device is left");
    bench.plug(&ours());
    assert_eq!(bench.staging(), Mount::Ours);

    let bench = Bench::new(&[("8:0", "staging", "ext4")]);
    bench.plug(&FakeDisk::new(0, 1).serial("csi-fedcba9876543210"));
    let Mount::Stranger(why) = bench.staging() else { panic!() };
    assert!(why.contains("csi-fedcba9876543210"), "{why}");

    let bench = Bench::new(&[("0:35", "staging", "tmpfs")]);
    assert!(matches!(bench.staging(), Mount::Stranger(_)), "no device at all is not a device that went");
    let bench = Bench::new(&[("254:0", "staging", "ext4")]);
    fs::create_dir_all(bench.node.sysfs.join("dev/block/254:0")).unwrap();
    assert!(matches!(bench.staging(), Mount::Stranger(_)), "a device that is there and no SCSI disk");
}

#[test]
fn a_stack_is_judged_by_its_newest_mount() {
    let bench = Bench::new(&[("8:0", "staging", "ext4"), ("0:35", "staging", "tmpfs")]);
    bench.plug(&ours());
    assert!(matches!(bench.staging(), Mount::Stranger(_)));
}

#[test]
fn what_is_at_a_target() {
    let bench = Bench::new(&[("8:0", "shown", "ext4"), ("0:35", "foreign", "tmpfs")]);
    bench.plug(&ours());
    fs::create_dir(bench.path("folder")).unwrap();
    fs::write(bench.path("empty"), "").unwrap();
    fs::write(bench.path("full"), "data").unwrap();
    symlink("/etc", bench.path("link")).unwrap();
    assert_eq!(bench.target("nothing"), Target::Absent);
    assert_eq!(bench.target("no/such/folder"), Target::Absent);
    assert_eq!(bench.target("folder"), Target::Folder);
    assert_eq!(bench.target("empty"), Target::File);
    assert_eq!(bench.target("shown"), Target::Shows { read_only: false });
    for name in ["full", "link", "foreign"] {
        assert!(matches!(bench.target(name), Target::Other(_)), "{name}");
    }
}

/// A bind of `/dev/sdb` that outlived the disk: the kernel removed the node, and the number may be another disk's.
#[test]
fn a_device_node_whose_disk_went_is_stale_whosever_its_number_is_now() {
    let bench = Bench::new(&[]);
    fs::write(bench.path("target"), "").unwrap();
    let show = |root: &str| {
        let line = format!("1 1 8:0 {root} {} rw - devtmpfs udev rw\n", bench.path("target").display());
        fs::write(&bench.node.mountinfo, line).unwrap();
    };
    let target = || bench.target_of("target", Some(sys::Dev { major: 8, minor: 0 }));
    let shown = |path: &str| bench.node.look_shown(&volume(HANDLE), &bench.path(path)).unwrap();
    show("/sda");
    assert_eq!(target(), Target::ShowsGone, "the node is about to go");
    show("/sda//deleted");
    assert_eq!(target(), Target::Stale);
    let stranger = FakeDisk::new(0, 1).serial("csi-fedcba9876543210");
    bench.plug(&stranger);
    assert_eq!(target(), Target::Stale);
    assert!(matches!(shown("target"), look::ShownAt::Nothing(_) | look::ShownAt::Gone(_)));
    show("/sda");
    assert!(matches!(target(), Target::Other(_)), "a node that is there shows what it says");
    // The same disk has come back under its number.
    bench.plug(&ours());
    show("/sda//deleted");
    assert_eq!(target(), Target::Shows { read_only: false });
}

/// kubelet's own, or another driver's: only a device node is what publish has made.
#[test]
fn a_deleted_file_on_a_tmpfs_is_not_a_stale_device_node() {
    let bench = Bench::new(&[]);
    fs::write(bench.path("target"), "").unwrap();
    let line = format!("1 1 0:35 /file//deleted {} rw - tmpfs tmpfs rw\n", bench.path("target").display());
    fs::write(&bench.node.mountinfo, line).unwrap();
    assert!(matches!(bench.target_of("target", None), Target::Other(_)));
    assert_eq!(bench.target_of("target", Some(sys::Dev { major: 8, minor: 0 })), Target::Stale);
}

#[test]
fn a_path_that_leads_outside_is_refused() {
    let bench = Bench::new(&[]);
    symlink("/etc", bench.path("out")).unwrap();
    assert_eq!(bench.node.real(&bench.path("out/x")), Err(Cause::Outside { real: "/etc/x".into() }));
    for absent in ["out/no/x", "out/no/such/folder"] {
        assert_eq!(bench.node.real(&bench.path(absent)), Err(Cause::Outside { real: "/etc".into() }), "it would be made there");
    }
    assert_eq!(bench.node.real(&bench.path("no/such/folder")), Ok(None));
    fs::create_dir(bench.path("in")).unwrap();
    assert_eq!(bench.node.real(&bench.path("in/no/x")), Ok(None));
    symlink(bench.path("in"), bench.path("link")).unwrap();
    assert_eq!(bench.node.real(&bench.path("link/x")), Ok(Some(bench.path("in/x"))));
}

#[test]
fn unpublish_removes_what_publish_made_and_nothing_else() {
    let bench = Bench::new(&[("0:35", "foreign", "tmpfs")]);
    let unpublish = |name: &str| bench.node.unpublish(&UnpublishRequest { volume: volume(HANDLE), target: bench.path(name) });
    fs::create_dir(bench.path("folder")).unwrap();
    fs::write(bench.path("empty"), "").unwrap();
    fs::write(bench.path("full"), "data").unwrap();
    for name in ["folder", "empty", "nothing"] {
        unpublish(name).unwrap();
        unpublish(name).unwrap();
        assert!(fs::symlink_metadata(bench.path(name)).is_err());
    }
    fs::create_dir_all(bench.path("filled/sub")).unwrap();
    let error = unpublish("filled").unwrap_err().to_string();
    assert!(error.starts_with("unpublish r/z/s/vm-9999-pvc-1: remove the target: rmdir on /"), "{error}");
    for name in ["full", "foreign"] {
        assert!(matches!(*unpublish(name).unwrap_err().cause, Cause::Refused(_)), "{name}");
    }
    assert_eq!(fs::read(bench.path("full")).unwrap(), b"data");
}

/// W11: `findmnt --target` finds a filesystem above any path that exists; the pod would have written to the node's own disk.
#[test]
fn a_staging_path_that_is_no_mountpoint_is_not_published() {
    // All of kubelet's folder is a mount, as on most nodes: of another device, or of this volume's very disk.
    for above in ["259:1", "8:0"] {
        let bench = Bench::new(&[(above, "", "xfs")]);
        bench.plug(&ours());
        fs::create_dir(bench.path("staging")).unwrap();
        let want = PublishRequest {
            volume: volume(HANDLE),
            target: bench.path("target"),
            source: PublishSource::Staging(StagedAt { path: bench.path("staging"), disk: legacy_want() }),
            read_only: false,
            single_target: false,
        };
        for _ in 0..2 {
            assert_eq!(*bench.node.publish(&want).unwrap_err().cause, Cause::Refused(crate::plan::Refusal::NotStaged), "{above}");
        }
        assert!(fs::symlink_metadata(bench.path("target")).is_err(), "nothing was made at the target");
    }
}

/// W12: an unstage of a path that is no mountpoint trimmed the host's filesystem, closed its mapping and set its disk offline.
#[test]
fn an_unstage_of_a_plain_folder_touches_no_disk() {
    // kubelet's folder is on a SCSI disk of the node's own, which is called as a volume's could be.
    let bench = Bench::new(&[("8:16", "", "ext4")]);
    let node_disk = FakeDisk::new(0, 0).named("sdb", 16).plug(&bench.node.sysfs);
    fs::create_dir(bench.path("staging")).unwrap();
    let want = UnstageRequest { volume: volume(HANDLE), staging: bench.path("staging") };
    for _ in 0..2 {
        bench.node.unstage(&want).unwrap();
    }
    assert!(fs::symlink_metadata(bench.path("staging")).is_err());
    assert_eq!(fs::read(node_disk.join("state")).unwrap(), b"running\n");
    assert_eq!(fs::read(node_disk.join("rescan")).unwrap(), b"");
}

/// An unstage that failed is repeated when the slot, with its name and number, is another volume's.
#[test]
fn a_repeated_unstage_leaves_the_next_disk_in_the_slot_alone() {
    let bench = Bench::new(&[]);
    let gone = legacy_disk(1, "sda", 0);
    let next = FakeDisk::new(0, 1).serial("csi-fedcba9876543210").plug(&bench.node.sysfs);
    let want = UnstageRequest { volume: volume(HANDLE), staging: bench.path("staging") };
    for was_set_running in [true, false] {
        fs::write(next.join("state"), "offline\n").unwrap();
        fs::write(next.join("delete"), "").unwrap();
        bench.node.unstaging.lock().unwrap().insert(want.volume.serial.clone(), stage::Known::of(gone.0.clone(), was_set_running));
        bench.node.unstage(&want).unwrap();
        assert_eq!(fs::read_to_string(next.join("delete")).unwrap(), "");
        assert_eq!(fs::read_to_string(next.join("state")).unwrap(), "offline\n");
    }
    // It is there still, and is asked to take I/O before it is given up: what an earlier call has asked says nothing of now.
    let bench = Bench::new(&[]);
    let device = gone.plug(&bench.node.sysfs);
    fs::write(device.join("state"), "offline\n").unwrap();
    fs::write(device.join("delete"), "").unwrap();
    bench.node.unstaging.lock().unwrap().insert(want.volume.serial.clone(), stage::Known::of(gone.0.clone(), true));
    bench.node.unstage(&UnstageRequest { staging: bench.path("staging"), ..want }).unwrap();
    assert_eq!(fs::read_to_string(device.join("state")).unwrap(), "running\n");
    assert_eq!(fs::read_to_string(device.join("delete")).unwrap(), "");
}

/// W12: what is mounted there is not the volume's: it stays, and so does what is in an unmounted folder.
#[test]
fn unstage_leaves_a_foreign_mount_and_a_filled_folder() {
    let bench = Bench::new(&[("0:35", "foreign", "tmpfs")]);
    let unstage = |name: &str| bench.node.unstage(&UnstageRequest { volume: volume(HANDLE), staging: bench.path(name) });
    fs::create_dir_all(bench.path("filled/sub")).unwrap();
    fs::create_dir(bench.path("empty")).unwrap();
    for name in ["nothing", "empty", "filled"] {
        unstage(name).unwrap();
    }
    assert!(fs::symlink_metadata(bench.path("empty")).is_err() && bench.path("filled/sub").exists());
    assert!(matches!(*unstage("foreign").unwrap_err().cause, Cause::Refused(_)));
}

#[test]
fn expand_and_stats_find_nothing_where_the_volume_is_not() {
    let bench = Bench::new(&[("0:35", "foreign", "tmpfs")]);
    for name in ["foreign", "nothing", "no/such/folder"] {
        let want = ExpandRequest { volume: volume(HANDLE), path: bench.path(name), required_bytes: Some(1) };
        let error = bench.node.expand(&want, None).unwrap_err();
        assert!(matches!(*error.cause, Cause::Refused(crate::plan::Refusal::NotPublishedHere { .. })), "{error}");
        let error = bench.node.stats(&StatsRequest { volume: volume(HANDLE), path: bench.path(name) }).unwrap_err();
        assert!(matches!(*error.cause, Cause::Refused(crate::plan::Refusal::NotPublishedHere { .. })), "{error}");
    }
}

#[test]
fn other_targets_are_whole_and_in_kubelets_folders() {
    let bench = Bench::new(&[
        ("8:0", "staging", "ext4"),
        ("8:0", "a/mount", "ext4"),
        ("8:0", "a/volume-subpaths/b/0", "ext4"),
        ("8:16", "c", "ext4"),
    ]);
    let others = bench.node.look_other_targets(&Medium::of(&ours().0), &[&bench.path("staging"), &bench.path("mine")]).unwrap();
    assert_eq!(others, [bench.path("a/mount")]);
}

/// W46: the kernel is asked to look at the size, though virtio-scsi mostly tells it before that.
#[test]
fn a_size_that_the_kernel_was_not_told_is_asked_for() {
    let bench = Bench::new(&[]);
    let device = ours().plug(&bench.node.sysfs);
    let (asked, size) = (device.join("rescan"), device.join("block/sda/size"));
    let has_asked = std::thread::scope(|scope| {
        let kernel = scope.spawn(|| {
            let has_asked = poll(Duration::from_secs(10), || Ok::<_, ()>(if fs::read(&asked).unwrap() == b"1" { Ok(()) } else { Err(()) }));
            // Whole at once, as sysfs shows it.
            let grown = device.join("grown");
            fs::write(&grown, format!("{}\n", (2_u64 << 30) / 512)).unwrap();
            fs::rename(&grown, &size).unwrap();
            has_asked
        });
        bench.node.await_size(&ours().0, 2 << 30).unwrap();
        kernel.join().unwrap()
    });
    assert_eq!(has_asked, Ok(Ok(())), "the disk's size is waited for, and nobody asks for it");
}

#[test]
fn a_poll_looks_once_more_when_the_time_is_up() {
    let mut looks = 0;
    let late = poll(Duration::ZERO, || {
        looks += 1;
        Ok::<Result<(), String>, ()>(Err(format!("look {looks}")))
    });
    assert_eq!(late, Ok(Err("look 1".into())));
    let mut looks = 0;
    let found = poll(Duration::from_secs(60), || {
        looks += 1;
        Ok::<_, ()>(if looks == 3 { Ok(looks) } else { Err(String::new()) })
    });
    assert_eq!(found, Ok(Ok(3)));
    assert_eq!(poll(Duration::from_secs(60), || Err::<Result<(), String>, _>("a failed look")), Err("a failed look"));
}

/// A context of the reference driver: slot 1, no serial.
fn legacy_want() -> crate::identity::Want {
    let wwid = crate::identity::wwid(&proto::wwn_of_lun(1));
    crate::identity::Want { serial: volume(HANDLE).serial, serial_promised: false, wwid, lun: Some(1), size_bytes: None }
}

fn legacy_disk(lun: u8, name: &str, minor: u32) -> FakeDisk {
    FakeDisk::new(0, lun.into()).named(name, minor).wwid(&crate::identity::wwid(&proto::wwn_of_lun(lun)).unwrap())
}

fn legacy_stage(bench: &Bench) -> StageRequest {
    StageRequest {
        encryption: None,
        volume: volume(HANDLE),
        staging: bench.path("staging"),
        access: Access::Filesystem(crate::sys::mount::Options::default()),
        fstype: None,
        disk: legacy_want(),
        format: Format::Never("a test".into()),
        zeroed: Zeroed::Unknown,
        grow_required: false,
        trims: true,
    }
}

#[test]
fn a_staged_legacy_disk_of_another_slot_is_not_taken_for_this_attachment() {
    let bench = Bench::new(&[("8:16", "staging", "ext4")]);
    bench.plug(&legacy_disk(2, "sdb", 16));
    let error = bench.node.stage(&legacy_stage(&bench), None).unwrap_err();
    assert!(matches!(*error.cause, Cause::Refused(crate::plan::Refusal::OtherMount { .. })), "{error}");
    assert!(error.to_string().contains("not in the slot"), "{error}");
}

#[test]
fn a_target_that_shows_another_legacy_disk_is_not_published() {
    let bench = Bench::new(&[("8:16", "target", "ext4")]);
    bench.plug(&legacy_disk(1, "sda", 0));
    bench.plug(&legacy_disk(2, "sdb", 16));
    let publish = |source| {
        let want = PublishRequest { volume: volume(HANDLE), target: bench.path("target"), source, read_only: false, single_target: false };
        bench.node.publish(&want)
    };
    let staged = StagedAt { path: bench.path("staging"), disk: legacy_want() };
    for source in [PublishSource::Device(legacy_want()), PublishSource::Staging(staged)] {
        let error = publish(source).unwrap_err();
        assert!(matches!(*error.cause, Cause::Refused(crate::plan::Refusal::TargetTaken { .. })), "{error}");
    }
}

/// W03, W15: the reference driver has staged another volume at this one's path, and kubelet, which sees a mount there, only publishes. A disk
/// without serial could be anybody's: one of another slot, or any where a serial is promised, is not this volume's.
#[test]
fn a_staging_path_with_another_legacy_disk_is_not_published() {
    let promised = crate::identity::Want { serial_promised: true, ..legacy_want() };
    for (lun, want, word) in [(2, legacy_want(), "not in the slot"), (1, promised, "without the serial")] {
        // Also where the target shows it already.
        let bench = Bench::new(&[("8:16", "staging", "ext4"), ("8:16", "shown", "ext4")]);
        bench.plug(&legacy_disk(lun, "sdb", 16));
        let publish = |target: &str| {
            let source = PublishSource::Staging(StagedAt { path: bench.path("staging"), disk: want.clone() });
            let want =
                PublishRequest { volume: volume(HANDLE), target: bench.path(target), source, read_only: false, single_target: false };
            bench.node.publish(&want).unwrap_err()
        };
        let error = publish("target");
        assert!(matches!(*error.cause, Cause::Refused(crate::plan::Refusal::OtherMount { .. })), "{error}");
        assert!(error.to_string().contains(word) && error.to_string().contains("sdb"), "{error}");
        assert!(fs::symlink_metadata(bench.path("target")).is_err(), "nothing was made at the target");
        let error = publish("shown");
        assert!(matches!(*error.cause, Cause::Refused(crate::plan::Refusal::TargetTaken { .. })), "{error}");
    }
}

#[test]
fn a_raw_block_volumes_legacy_disk_is_in_use() {
    let bench = Bench::new(&[("0:5", "block", "devtmpfs"), ("0:35", "other", "tmpfs")]);
    let lines = fs::read_to_string(&bench.node.mountinfo).unwrap().replace(" / ", " /sda ");
    fs::write(&bench.node.mountinfo, lines).unwrap();
    let dev = sys::Dev { major: 8, minor: 0 };
    let shown = bench.node.shown_devices(|path| Ok((path == bench.path("block")).then_some(dev))).unwrap();
    assert_eq!(shown, [(dev, bench.path("block"))]);
    let disks = [legacy_disk(1, "sda", 0).0];
    assert!(matches!(identity::find(&legacy_want(), &disks, &shown), Err(identity::Refusal::InUse { .. })));
}

#[test]
fn a_filesystem_that_cannot_be_grown_is_not_said_to_be_grown() {
    let bench = Bench::new(&[("8:0", "shown", "btrfs")]);
    bench.plug(&ours());
    let error =
        bench.node.expand(&ExpandRequest { volume: volume(HANDLE), path: bench.path("shown"), required_bytes: None }, None).unwrap_err();
    assert!(matches!(*error.cause, Cause::Refused(crate::plan::Refusal::NoGrowing { .. })), "{error}");
}

#[test]
fn a_filesystem_that_the_kernel_made_read_only_is_not_said_to_be_grown() {
    let bench = Bench::new(&[("8:0", "shown", "ext4")]);
    bench.plug(&ours());
    let expand = || bench.node.expand(&ExpandRequest { volume: volume(HANDLE), path: bench.path("shown"), required_bytes: None }, None);
    let lines = fs::read_to_string(&bench.node.mountinfo).unwrap().replace("/dev/sdx rw", "/dev/sdx ro");
    fs::write(&bench.node.mountinfo, &lines).unwrap();
    let error = expand().unwrap_err();
    assert!(matches!(*error.cause, Cause::InTrouble(_)) && error.to_string().contains("made read-only by the kernel"), "{error}");
    // As its user wants it: mounted read-only, or on a disk that refuses writes.
    fs::write(&bench.node.mountinfo, lines.replace("/shown rw", "/shown ro")).unwrap();
    assert_eq!(expand(), Ok(1 << 30));
    fs::write(&bench.node.mountinfo, &lines).unwrap();
    let mut write_protected = ours();
    write_protected.0.read_only = true;
    bench.plug(&write_protected);
    assert_eq!(expand(), Ok(1 << 30));
}

#[test]
fn a_volume_published_read_only_is_grown_where_it_is_writable() {
    let bench = Bench::new(&[("8:0", "staging", "ext4"), ("8:0", "a/mount", "ext4"), ("8:16", "other", "ext4")]);
    fs::create_dir(bench.path("a")).unwrap();
    let point = || bench.node.writable_point(&Medium::of(&ours().0), &bench.path("a/mount")).unwrap();
    assert_eq!(point(), bench.path("a/mount"));
    let lines = fs::read_to_string(&bench.node.mountinfo).unwrap().replace("/a/mount rw", "/a/mount ro");
    fs::write(&bench.node.mountinfo, &lines).unwrap();
    assert_eq!(point(), bench.path("staging"));
    fs::write(&bench.node.mountinfo, lines.replace("/staging rw", "/staging ro")).unwrap();
    assert_eq!(point(), bench.path("a/mount"), "the kernel's own word then");
}

#[test]
fn a_keyslot_that_needs_more_memory_than_there_is_is_a_sentence_with_both_numbers() {
    let bench = Bench::new(&[]);
    fs::create_dir_all(bench.node.proc.join("self")).unwrap();
    fs::write(bench.node.proc.join("meminfo"), "MemTotal: 4194304 kB\nMemAvailable: 2097152 kB\n").unwrap();
    fs::write(bench.node.proc.join("self/cgroup"), "0::/\n").unwrap();
    let group = bench.node.sysfs.join("fs/cgroup");
    fs::create_dir_all(&group).unwrap();
    fs::write(group.join("memory.max"), format!("{}\n", 192 << 20)).unwrap();
    fs::write(group.join("memory.current"), format!("{}\n", 12 << 20)).unwrap();
    drop(bench.node.derive_alone(None, 64 << 10).unwrap());
    let Some(Cause::KeyslotCost(why)) = bench.node.derive_alone(Some(3), 1 << 20).err() else { panic!() };
    assert!(
        why.contains("keyslot 3 needs 1024 MiB") && why.contains("leaves 180 MiB") && why.contains("192 MiB") | why.contains("196608 KiB"),
        "{why}"
    );
    // The place is free again.
    drop(bench.node.derive_alone(None, 0).unwrap());
}

#[test]
fn one_key_is_derived_at_a_time_and_the_others_are_told() {
    let bench = Bench::new(&[]);
    let first = bench.node.kdf.take_to_work(Duration::ZERO).unwrap();
    let refused = bench.node.kdf.take_to_work(Duration::from_millis(1)).map(drop).unwrap_err();
    assert!(matches!(super::encrypt::busy(refused), Cause::KdfBusy { .. }));
    // Probes, formats and mounts of other volumes wait for nothing of it.
    drop(bench.node.workers.take("sda".into()).unwrap());
    drop(first);
    drop(bench.node.kdf.take_to_work(Duration::ZERO).unwrap());
}

#[test]
fn a_keyslot_that_cannot_be_tried_puts_a_rotation_off_and_fails_no_stage() {
    let why = String::new;
    let put_off = [Cause::LuksRead(why()), Cause::KdfBusy { waited: Duration::ZERO }, Cause::KeyslotCost(why()), Cause::Luks(why())];
    assert!(put_off.iter().all(super::encrypt::is_put_off));
    let told = [Cause::OtherDiskNow { disk: why() }, Cause::Stopped { zeroed_bytes: 0 }, Cause::WrongPassphrase(why())];
    assert!(!told.iter().any(super::encrypt::is_put_off));
}

/// Two volumes may claim one: the second is told what it waits for, and not that disks are probed.
#[test]
fn a_disk_without_serial_that_another_volume_is_mounting_is_named() {
    let bench = Bench::new(&[]);
    let (disk, other) = (legacy_disk(1, "sda", 0).0, legacy_disk(2, "sdb", 16).0);
    let alone = bench.node.mount_alone(&disk, Duration::ZERO).unwrap();
    let cause = bench.node.mount_alone(&disk, Duration::ZERO).unwrap_err();
    let words = cause.to_string();
    assert!(words.starts_with("sda (0:0:0:1) has no serial, and another volume") && words.contains("mounting it for 0 s"), "{words}");
    drop(bench.node.mount_alone(&other, Duration::ZERO).unwrap());
    drop(alone);
    drop(bench.node.mount_alone(&disk, Duration::ZERO).unwrap());
}

/// Nothing uses what is mounted there, and it is another volume's all the same.
#[test]
fn a_path_that_this_agent_has_staged_for_another_volume_is_refused_by_name() {
    let bench = Bench::new(&[("8:16", "staging", "ext4")]);
    fs::create_dir(bench.path("staging")).unwrap();
    let (other, ours) = (volume("r/z/s/vm-9999-pvc-2"), legacy_stage(&bench));
    bench.plug(&FakeDisk::new(0, 2).named("sdb", 16).serial(&other.serial));
    let stale = || bench.node.stage(&ours, None).unwrap_err().to_string();
    bench.node.remember_staged(&StageRequest { volume: other.clone(), ..legacy_stage(&bench) });
    let words = stale();
    let expected = format!("this agent has staged the volume with the serial {} there: unstage that one first", other.serial);
    assert!(words.contains(&expected) && words.contains("nothing was touched"), "{words}");
    // Its own path it is.
    bench.node.remember_staged(&ours);
    assert_eq!(bench.node.staged_for_another(&ours), None);
}

/// Of pods that were taken from the node without an unstage.
#[test]
fn what_is_remembered_of_staged_paths_makes_room_where_nothing_is_mounted() {
    let bench = Bench::new(&[("8:0", "p0", "ext4")]);
    let at = |number: usize| StageRequest { staging: bench.path(&format!("p{number}")), ..legacy_stage(&bench) };
    for number in 0..stage::MAX_STAGED {
        fs::create_dir(bench.path(&format!("p{number}"))).unwrap();
        bench.node.remember_staged(&at(number));
    }
    let staged = || bench.node.staged.lock().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(staged().len(), stage::MAX_STAGED);
    bench.node.remember_staged(&at(stage::MAX_STAGED));
    let mut left = [bench.path("p0"), bench.path(&format!("p{}", stage::MAX_STAGED))];
    left.sort();
    assert_eq!(staged(), left);
}
