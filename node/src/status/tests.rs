use super::*;
use crate::identity;
use crate::info::Configured;
use crate::testing::{FakeDisk, Folder, volume};

const HANDLE: &str = "r/z/s/vm-9999-pvc-1";

/// A machine in a folder: sysfs, mountinfo, kubelet; its disks' nodes are not there.
struct Fake {
    root: Folder,
    mounts: String,
}

impl Fake {
    fn new() -> Self {
        Self { root: Folder::new(), mounts: String::new() }
    }

    fn put(&self, path: &str, text: &str) {
        let path = self.root.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn plug(&self, disk: FakeDisk) {
        disk.plug(&self.root.path().join("sys"));
    }

    fn mount(&mut self, dev: &str, path: &str, options: &str, filesystem_options: &str) {
        let point = self.path(path);
        self.mounts += &format!("1 0 {dev} / {} {options} - ext4 /dev/x {filesystem_options}\n", point.display());
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join("kubelet").join(path)
    }

    /// As kubelet notes a staged volume; answers where it is staged.
    fn stage(&self, name: &str, handle: &str) -> String {
        let folder = format!("plugins/kubernetes.io/csi/csi.proxmox.sinextra.dev/{name}");
        self.put(
            &format!("kubelet/{folder}/vol_data.json"),
            &format!("{{\"driverName\":\"csi.proxmox.sinextra.dev\", \"volumeHandle\" : \"{handle}\"}}"),
        );
        format!("{folder}/globalmount")
    }

    fn look(&self) -> Report {
        self.put("proc/self/mountinfo", &self.mounts);
        self.put("proc/misc", "1 device-mapper\n");
        let at = |path| self.root.path().join(path);
        let machine = Machine { sysfs: at("sys"), proc: at("proc"), devices: at("dev"), kubelet: vec![at("kubelet")] };
        let mut report = look(&machine, &Configured { node_id: "w/101".into(), ..Configured::default() }).unwrap();
        // No device node: none of these disks can be opened.
        report.disagreements.retain(|sentence| !sentence.contains("cannot be looked at"));
        report
    }
}

fn ours(host: u32, lun: u8, handle: &str, name: &str) -> FakeDisk {
    let wwid = identity::wwid(&proto::wwn_of_lun(lun)).unwrap();
    FakeDisk::new(host, u64::from(lun)).serial(&volume(handle).serial).wwid(&wwid).named(name, u32::from(lun) * 16)
}

#[test]
fn a_staged_volume_is_shown_and_agrees() {
    let mut fake = Fake::new();
    fake.plug(ours(0, 1, HANDLE, "sdb"));
    let staging = fake.stage("a", HANDLE);
    fake.mount("8:16", &staging, "rw", "rw");
    let report = fake.look();
    assert_eq!(report.disagreements, [""; 0]);
    let seen = &report.disks[0];
    assert_eq!((seen.volume.as_deref(), seen.mounts.len()), (Some(HANDLE), 1));
    let text = report.text();
    for word in [
        "LUN 1, 1073741824 bytes",
        "naa.5056432d49443031",
        HANDLE,
        "globalmount (ext4)",
        "SCSI disks: 1, disagreements: none",
        "region unknown",
    ] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let json = report.json();
    for word in [
        "\"lun\":1,",
        "\"volume\":\"r/z/s/vm-9999-pvc-1\"",
        "\"filesystem\":\"ext4\",\"readOnly\":false",
        "\"disagreements\":[]",
        "\"holds\":null",
    ] {
        assert!(json.contains(word), "{word}: {json}");
    }
}

/// One kind of trouble a case: the sentence names the disk or the path.
#[test]
fn every_disagreement_is_a_sentence() {
    let said = |change: &dyn Fn(&mut Fake)| {
        let mut fake = Fake::new();
        change(&mut fake);
        fake.look().disagreements
    };
    let one = |change: &dyn Fn(&mut Fake), words: &[&str]| {
        let said = said(change);
        let all = said.join("\n");
        assert!(words.iter().all(|word| said.iter().any(|sentence| sentence.contains(word))), "{words:?}: {all}");
    };
    one(&|fake| drop(fake.stage("a", HANDLE)), &["nothing is mounted there"]);
    one(&|fake| drop(fake.stage("a", "vol-1")), &["no volume id of this driver"]);
    one(&|fake| fake.plug(ours(0, 1, HANDLE, "sdb")), &["sdb (0:0:0:1) is attached, but kubelet keeps no volume"]);
    one(
        &|fake| {
            fake.plug(ours(0, 1, HANDLE, "sdb"));
            fake.plug(ours(1, 2, HANDLE, "sdc"));
        },
        &["sdb (0:0:0:1) and sdc (1:0:0:2) both carry the serial csi-"],
    );
    one(
        &|fake| {
            fake.plug(ours(0, 1, HANDLE, "sdb"));
            fake.plug(ours(1, 1, "r/z/s/vm-9999-pvc-2", "sdc"));
        },
        &["both at LUN 1"],
    );
    one(&|fake| fake.plug(FakeDisk::new(0, 7).serial("database")), &["takes slot 7"]);
    one(&|fake| fake.plug(FakeDisk::new(0, 30).serial("csi-0123456789abcdef")), &["outside 1 to 29"]);
    one(&|fake| fake.plug(ours(0, 1, HANDLE, "sdb").wwid("naa.5056432d49443039")), &["a drive of slot 1 should have naa.5056432d49443031"]);
    one(
        &|fake| {
            fake.plug(ours(0, 1, HANDLE, "sdb"));
            fake.put("sys/bus/scsi/devices/0:0:0:1/state", "offline\n");
        },
        &["sdb (0:0:0:1) is offline"],
    );
    one(
        &|fake| {
            fake.plug(ours(0, 1, "r/z/s/vm-9999-pvc-2", "sdb"));
            let staging = fake.stage("a", HANDLE);
            fake.mount("8:16", &staging, "rw", "rw");
        },
        &["is not this volume's disk"],
    );
    one(
        &|fake| {
            fake.plug(ours(0, 1, HANDLE, "sdb"));
            let staging = fake.stage("a", HANDLE);
            fake.mount("8:16", &staging, "rw", "ro");
            fake.put("sys/fs/ext4/sdb/errors_count", "3\n");
        },
        &["is read-only, though its mount", "counted 3 errors"],
    );
    one(
        &|fake| {
            let staging = fake.stage("a", HANDLE);
            fake.mount("8:64", &staging, "rw", "rw");
        },
        &["the device 8:64 mounted at", "no SCSI disk"],
    );
}

#[test]
fn a_mapping_belongs_to_its_disk() {
    let mut fake = Fake::new();
    fake.plug(ours(0, 1, HANDLE, "sdb"));
    fake.put("sys/class/block/sdb/holders/dm-0/x", "");
    fake.put("sys/class/block/dm-0/dev", "253:0\n");
    fake.put("sys/class/block/dm-0/dm/name", "csi-x\n");
    let staging = fake.stage("a", HANDLE);
    fake.mount("253:0", &staging, "rw", "rw");
    fake.put("sys/dev/block/253:0/x", "");
    let report = fake.look();
    assert_eq!(report.disagreements, [""; 0]);
    assert_eq!(report.disks[0].mappings[0].name.as_deref(), Some("csi-x"));
    assert!(report.text().contains("mapping  dm-0, csi-x") && report.json().contains("\"name\":\"csi-x\""));
}

#[test]
fn kubelets_notes_are_read_with_care() {
    assert_eq!(member("{\"a\":\"b\"}", "a").as_deref(), Some("b"));
    for (json, key) in [("{}", "a"), ("{\"a\":1}", "a"), ("{\"a\":\"b", "a"), ("{\"a\":\"\\u0041\"}", "a"), ("\"a\"", "a")] {
        assert_eq!(member(json, key), None, "{json}");
    }
}
