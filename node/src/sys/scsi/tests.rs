use std::fs;

use proptest::prelude::*;

use super::*;
use crate::testing::{FakeDisk, Folder};

#[test]
fn a_disk_with_serial_wwn_and_designator_is_read() {
    let root = Folder::new();
    FakeDisk::new(2, 1).serial("csi-0123456789abcdef").wwid("naa.5056432d49443031").named("sdb", 16).plug(root.path());
    let disks = scan(root.path()).unwrap();
    assert_eq!(
        disks,
        [Disk {
            address: Address { host: 2, channel: 0, target: 0, lun: 1 },
            vendor: "QEMU".into(),
            state: State::Running,
            wwid: Some("naa.5056432d49443031".into()),
            serial: Some("csi-0123456789abcdef".into()),
            designators: vec!["drive-scsi1".into()],
            name: "sdb".into(),
            dev: Dev { major: 8, minor: 16 },
            size_bytes: 1 << 30,
            read_only: false,
        }]
    );
}

#[test]
fn a_disk_without_wwn_and_serial_still_says_its_slot() {
    let root = Folder::new();
    FakeDisk::new(0, 30).plug(root.path());
    let disks = scan(root.path()).unwrap();
    assert_eq!((disks[0].wwid.as_deref(), disks[0].serial.as_deref()), (None, None));
    assert_eq!(disks[0].designators, ["drive-scsi30"]);
}

#[test]
fn hosts_targets_and_half_made_disks_are_passed_over() {
    let root = Folder::new();
    let devices = root.path().join("bus/scsi/devices");
    for folder in ["host0", "target0:0:0", "1:0:0:0", "1:0:0:0:0", "x:0:0:0"] {
        fs::create_dir_all(devices.join(folder)).unwrap();
    }
    fs::create_dir_all(devices.join("2:0:0:1/block/sdc")).unwrap();
    assert_eq!(scan(root.path()).unwrap(), []);
}

#[test]
fn no_scsi_at_all_is_no_disk() {
    assert_eq!(scan(Folder::new().path()).unwrap(), []);
}

#[test]
fn a_size_that_is_no_number_is_an_error_not_an_absence() {
    let root = Folder::new();
    let device = FakeDisk::new(0, 1).plug(root.path());
    fs::write(device.join("block/sda/size"), "many").unwrap();
    assert_eq!(scan(root.path()).unwrap_err().errno, Errno::INVAL);
}

#[test]
fn a_serial_that_could_not_be_read_is_not_taken_for_none() {
    let root = Folder::new();
    let device = FakeDisk::new(0, 1).plug(root.path());
    let serial = || disk(root.path(), Address { host: 0, channel: 0, target: 0, lun: 1 }).unwrap().unwrap();
    fs::write(device.join("vpd_pg0"), [0, 0, 0, 3, 0x00, 0x83, 0xb0]).unwrap();
    assert_eq!(serial().serial, None);
    fs::write(device.join("vpd_pg0"), [0, 0, 0, 3, 0x00, 0x80, 0x83]).unwrap();
    assert_eq!(serial().serial.as_deref(), Some(UNREADABLE_SERIAL));
    assert!(crate::identity::verify("csi-0123456789abcdef", &serial()).is_err(), "it may be another volume's");
}

#[test]
fn only_virtio_scsi_hosts_are_rescanned() {
    let root = Folder::new();
    let hosts = root.path().join("class/scsi_host");
    for (host, driver) in [("host0", "ata_piix"), ("host1", "virtio_scsi"), ("host2", "virtio_scsi")] {
        fs::create_dir_all(hosts.join(host)).unwrap();
        fs::write(hosts.join(host).join("proc_name"), format!("{driver}\n")).unwrap();
        fs::write(hosts.join(host).join("scan"), "").unwrap();
    }
    assert_eq!(rescan_hosts(root.path()).unwrap(), 2);
    assert_eq!(fs::read_to_string(hosts.join("host0/scan")).unwrap(), "");
    assert_eq!(fs::read_to_string(hosts.join("host2/scan")).unwrap(), "- - -");
}

#[test]
fn states_size_and_topology_are_written_and_read() {
    let root = Folder::new();
    let device = FakeDisk::new(0, 1).plug(root.path());
    let address = Address { host: 0, channel: 0, target: 0, lun: 1 };
    for (text, state) in [("offline", State::Offline), ("transport-offline", State::Offline), ("blocked", State::Passing)] {
        fs::write(device.join("state"), format!("{text}\n")).unwrap();
        assert_eq!(disk(root.path(), address).unwrap().unwrap().state, state);
    }
    let now = disk(root.path(), address).unwrap().unwrap();
    set_running(root.path(), &now).unwrap();
    assert_eq!(fs::read(device.join("state")).unwrap(), b"running\n", "the kernel takes no state without a newline");
    let running = disk(root.path(), address).unwrap().unwrap();
    assert_eq!(running.state, State::Running);
    rescan_size(root.path(), address).unwrap();
    assert_eq!(fs::read_to_string(device.join("rescan")).unwrap(), "1");
    fs::write(device.join("delete"), "").unwrap();
    delete(root.path(), &running).unwrap();
    assert_eq!(fs::read_to_string(device.join("delete")).unwrap(), "1");
    let other = Disk { address: Address { lun: 2, ..address }, ..running.clone() };
    assert_eq!(delete(root.path(), &other).unwrap_err().errno, Errno::NOENT, "no file is made of it");
    assert_eq!(topology(root.path(), &running).unwrap().logical_block_size, 512);
    assert_eq!(rescan_size(root.path(), Address { lun: 2, ..address }).unwrap_err().errno, Errno::NOENT);
}

#[test]
fn the_next_disk_in_a_slot_is_neither_deleted_nor_set_running() {
    let root = Folder::new();
    let before = FakeDisk::new(0, 1).serial("csi-0123456789abcdef");
    let device = before.plug(root.path());
    fs::write(device.join("delete"), "").unwrap();
    // Same address, name and number.
    FakeDisk::new(0, 1).serial("csi-fedcba9876543210").plug(root.path());
    for refused in [delete(root.path(), &before.0), set_running(root.path(), &before.0)] {
        let refused = refused.unwrap_err();
        assert_eq!((refused.errno, refused.subject), (Errno::NODEV, root.path().join("bus/scsi/devices/0:0:0:1")));
    }
    assert_eq!(fs::read_to_string(device.join("delete")).unwrap(), "");
}

#[test]
fn a_real_vpd_83_page_of_qemu() {
    // QEMU 7.2, wwn=0x5056432d49443031: a vendor-specific ASCII descriptor, then NAA (binary).
    let mut page = vec![0x00, 0x83, 0x00, 0x1b, 0x02, 0x00, 0x00, 0x0b];
    page.extend(b"drive-scsi1");
    page.extend([0x01, 0x03, 0x00, 0x08, 0x50, 0x56, 0x43, 0x2d, 0x49, 0x44, 0x30, 0x31]);
    assert_eq!(ascii_designators(&page), ["drive-scsi1"]);
}

proptest! {
    #[test]
    fn no_page_panics(page in proptest::collection::vec(any::<u8>(), 0..80)) {
        let _ = (serial_of(&page), ascii_designators(&page));
        let mut page = page;
        if page.len() > 1 {
            for code in [0x80, 0x83] { page[1] = code; let _ = (serial_of(&page), ascii_designators(&page)); }
        }
    }

    #[test]
    fn a_serial_comes_back_whole(serial in "[!-~]([ -~]{0,18}[!-~])?") {
        let mut page = vec![0, 0x80, 0, u8::try_from(serial.len()).unwrap()];
        page.extend(serial.bytes());
        prop_assert_eq!(serial_of(&page), Some(serial));
    }

    #[test]
    fn no_address_panics(text in "\\PC{0,20}") { let _ = text.parse::<Address>(); }
}
