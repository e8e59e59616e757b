//! What can be tried of a rotation without a kernel that opens the volume.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use disk::luks::{Hash, Kdf};
use proto::secrets;

use super::super::tests::{Bench, HANDLE};
use super::*;
use crate::testing::{FakeDisk, Folder, volume};

const SIZE: u64 = 64 << 20;
const ENCRYPTION: Encryption = Encryption { kdf: Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: 1000 }, discards: false };
const OLD: &str = "the passphrase before";
const NEW: &str = "the passphrase that comes after it";

/// A volume that the old passphrase opens, and a node with memory for its keys.
struct Made {
    bench: Bench,
    folder: Folder,
    device: Device,
    header: Header,
    key: VolumeKey,
}

impl Made {
    fn new() -> Self {
        let (bench, folder) = (Bench::new(&[]), Folder::new());
        fs::create_dir_all(bench.node.proc.join("self")).unwrap();
        fs::write(bench.node.proc.join("meminfo"), "MemTotal: 4194304 kB\nMemAvailable: 2097152 kB\n").unwrap();
        fs::write(bench.node.proc.join("self/cgroup"), "0::/\n").unwrap();
        let device = Device::of_file(&folder.path().join("disk"));
        let file = fs::File::options().write(true).open(folder.path().join("disk")).unwrap();
        file.set_len(SIZE).unwrap();
        let luks = LuksFormat { device_size_bytes: SIZE, sector_size: 512, uuid: format::luks_uuid(&volume(HANDLE)), kdf: ENCRYPTION.kdf };
        let material = Material::draw(random::fill).unwrap();
        for write in luks.plan(OLD.as_bytes(), &material, &[], noise().unwrap()).unwrap() {
            if let Write::Data { offset, bytes } = write {
                file.write_all_at(&bytes, offset).unwrap();
            }
        }
        let header = read_header(&device).unwrap();
        let (_, key) = bench.node.unlock(&header, &device, OLD.as_bytes()).unwrap();
        Self { bench, folder, device, header, key }
    }

    fn is_outstanding(&self) -> bool {
        self.bench.node.rotations.contains(&volume(HANDLE).serial)
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(self.folder.path().join("disk")).unwrap()
    }

    /// By which passphrases it opens, the old and the new one.
    fn opens(&self) -> [bool; 2] {
        let header = read_header(&self.device).unwrap();
        [OLD, NEW]
            .map(|passphrase| self.bench.node.unlock(&header, &self.device, passphrase.as_bytes()).is_ok_and(|(_, key)| key == self.key))
    }
}

/// As the next stage: by both passphrases.
fn stage_again(made: &Made) {
    let both = [(secrets::PASSPHRASE, NEW), (secrets::PASSPHRASE_PREVIOUS, OLD)];
    let mut given = both.map(|(key, passphrase)| (key.to_string(), passphrase.to_string())).into();
    let passphrases = Passphrases::take(&mut given).unwrap().unwrap();
    let (node, disk) = (&made.bench.node, FakeDisk::new(0, 1).0);
    node.rotation_done(&volume(HANDLE));
    let mut header = read_header(&made.device).unwrap();
    node.unlock_and_rotate(&volume(HANDLE), &ENCRYPTION, &disk, &made.device, &mut header, &passphrases).unwrap();
    assert!(!made.is_outstanding());
    assert_eq!(made.opens(), [false, true]);
}

/// The volume is open: a stage that fails over the place for one more key would keep a pod from its data.
#[test]
fn a_new_keyslot_is_put_off_while_other_keys_are_derived() {
    let mut made = Made::new();
    let before = made.bytes();
    let Made { bench, device, header, key, .. } = &mut made;
    let node = &bench.node;
    node.kdf.be_patient_for(Duration::ZERO);
    let other = node.kdf.take_to_work(Duration::ZERO).unwrap();
    node.rotate(&volume(HANDLE), &ENCRYPTION, device, header, (0, &*key), [NEW.as_bytes(), OLD.as_bytes()]).unwrap();
    drop(other);
    assert!(made.is_outstanding() && made.bytes() == before, "said and counted, and nothing is written");
    assert_eq!(made.opens(), [true, false]);
    stage_again(&made);
}

/// The new keyslot is there, and has not been seen to open: the previous passphrase stays.
#[test]
fn a_new_keyslot_that_cannot_be_tried_leaves_the_previous_passphrase() {
    let mut made = Made::new();
    std::thread::scope(|scope| {
        let Made { bench, device, header, key, .. } = &mut made;
        let node = &bench.node;
        // Places are given in the order in which they were asked for: the new keyslot's key, another volume's, and then the trial of the keyslot.
        let first = node.kdf.take_to_work(Duration::ZERO).unwrap();
        let rotation =
            scope.spawn(move || node.rotate(&volume(HANDLE), &ENCRYPTION, device, header, (0, &*key), [NEW.as_bytes(), OLD.as_bytes()]));
        node.kdf.await_waiting(1);
        let (done, over) = std::sync::mpsc::channel::<()>();
        let other = scope.spawn(move || {
            let _place = node.kdf.take_to_work(Duration::from_secs(3600)).unwrap();
            let _ = over.recv();
        });
        node.kdf.await_waiting(2);
        node.kdf.be_patient_for(Duration::ZERO);
        drop(first);
        rotation.join().unwrap().unwrap();
        drop(done);
        other.join().unwrap();
    });
    assert!(made.is_outstanding());
    assert_eq!(made.opens(), [true, true]);
    stage_again(&made);
}
