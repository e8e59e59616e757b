//! What can be tried without a kernel's disks: a sysfs and a mountinfo of our own. The rest is tried in the guest.

use std::fs;
use std::os::unix::fs::symlink;

use super::*;
use crate::plan::{Mount, Target};
use crate::request::{ExpandRequest, UnpublishRequest, UnstageRequest};
use crate::testing::{FakeDisk, Folder, volume};

const HANDLE: &str = "r/z/s/vm-9999-pvc-1";

struct Bench {
    root: Folder,
    node: Node,
}

impl Bench {
    /// `mounts`: device, path below kubelet's folder.
    fn new(mounts: &[(&str, &str, &str)]) -> Self {
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
            folders: Folders::new(vec![kubelet]).unwrap(),
            workers: Slots { free: Mutex::new(1), freed: Condvar::new() },
        };
        Self { root, node }
    }

    fn plug(&self, disk: &FakeDisk) {
        disk.plug(&self.node.sysfs);
    }

    fn path(&self, name: &str) -> PathBuf {
        fs::canonicalize(self.root.path()).unwrap().join("kubelet").join(name)
    }

    fn staging(&self) -> Mount {
        let disks = scsi::scan(&self.node.sysfs).unwrap();
        self.node.look_staging(&volume(HANDLE), Some(&self.path("staging")), &disks).unwrap().0
    }

    fn target(&self, name: &str) -> Target {
        let disks = scsi::scan(&self.node.sysfs).unwrap();
        let real = self.node.real(&self.path(name)).unwrap();
        self.node.look_target(&volume(HANDLE), real.as_deref(), &disks).unwrap()
    }
}

fn ours() -> FakeDisk {
    FakeDisk::new(0, 1).serial(&volume(HANDLE).serial)
}

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

#[test]
fn a_path_that_leads_outside_is_refused() {
    let bench = Bench::new(&[]);
    symlink("/etc", bench.path("out")).unwrap();
    assert_eq!(bench.node.real(&bench.path("out/x")), Err(Cause::Outside { real: "/etc/x".into() }));
    fs::create_dir(bench.path("in")).unwrap();
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
        let error = bench.node.expand(&want).unwrap_err();
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
    let others = bench.node.look_other_targets(&ours().0, &[&bench.path("staging"), &bench.path("mine")]).unwrap();
    assert_eq!(others, [bench.path("a/mount")]);
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
