//! The guest by itself: boots, sees disks come, grow and go, says its verdict, and is noticed when it dies.

use std::time::Duration;

use guest_init::PseudoRandom;
use testbed::guest::{Guest, GuestOptions, Program, ScsiHardware};

use crate::harness::{Image, MIB, boot, wait_for_size};

fn disk_comes_grows_and_goes(guest: &Guest) {
    let machine = guest.machine();
    let (first, second) = (Image::new(64 * MIB), Image::new(32 * MIB));
    let serial = "csi-0123456789abcdef";
    machine.plug(&first.drive(1, Some(serial))).unwrap();
    machine.plug(&second.drive(29, None)).unwrap();
    wait_for_size(guest, 1, Some(64 * MIB));
    wait_for_size(guest, 29, Some(32 * MIB));

    let disk = guest.disk_at(1).unwrap().unwrap();
    assert_eq!(guest.read(&format!("/sys/block/{disk}/device/wwid")).unwrap().trim(), "naa.5056432d49443031");
    let page = guest.read_at(&format!("/sys/block/{disk}/device/vpd_pg80"), 0, 255).unwrap();
    assert_eq!(String::from_utf8_lossy(&page[4..]), serial);
    let page = guest.read_at(&format!("/sys/block/{disk}/device/vpd_pg83"), 0, 255).unwrap();
    assert!(String::from_utf8_lossy(&page).contains("drive-scsi1"), "{page:?}");

    first.resize(96 * MIB);
    machine.resize(1, 96 * MIB).unwrap();
    wait_for_size(guest, 1, Some(96 * MIB));

    // What is written before an unplug is there at the next slot.
    guest.write_at(&format!("/dev/{disk}"), 80 * MIB, b"kept").unwrap();
    machine.unplug(1).unwrap();
    wait_for_size(guest, 1, None);
    machine.plug(&first.drive(7, Some(serial))).unwrap();
    wait_for_size(guest, 7, Some(96 * MIB));
    let disk = guest.disk_at(7).unwrap().unwrap();
    assert_eq!(guest.read_at(&format!("/dev/{disk}"), 80 * MIB, 4).unwrap(), b"kept");
    machine.unplug(7).unwrap();
    machine.unplug(29).unwrap();
    wait_for_size(guest, 7, None);
    wait_for_size(guest, 29, None);
}

#[test]
fn guest_disks_on_virtio_scsi_single() {
    let Some(guest) = boot(&GuestOptions::named("single")) else { return };
    disk_comes_grows_and_goes(&guest);
    guest.power_off().unwrap();
}

#[test]
fn guest_disks_on_virtio_scsi_pci() {
    let Some(guest) = boot(&GuestOptions { scsi_hardware: ScsiHardware::VirtioScsiPci, ..GuestOptions::named("pci") }) else { return };
    disk_comes_grows_and_goes(&guest);
    guest.power_off().unwrap();
}

#[test]
fn guest_files_programs_and_network() {
    let options = GuestOptions { smbios_serial: Some("h=web-02a;i=101".into()), ..GuestOptions::named("control") };
    let Some(guest) = boot(&options) else { return };
    assert_eq!(guest.read("/sys/class/dmi/id/product_serial").unwrap().trim(), "h=web-02a;i=101");

    let written = guest.fill("/tmp/random", 42, 3 * MIB + 5).unwrap();
    assert_eq!(guest.sha256("/tmp/random").unwrap(), written);
    let mut expected = [0; 16];
    PseudoRandom(42).fill(&mut expected);
    assert_eq!(guest.read_at("/tmp/random", 0, 16).unwrap(), expected);
    assert_eq!(guest.stat("/tmp/random").unwrap().unwrap().size_bytes, 3 * MIB + 5);
    assert_eq!(guest.stat("/tmp/missing").unwrap(), None);

    // The node's root holds no program, and nothing of ours.
    assert_eq!(guest.list("/node").unwrap(), ["csi", "dev", "proc", "sys", "var"]);
    assert_eq!(guest.list("/node/var").unwrap(), ["lib"]);

    // PID 1's own program is the only one in the guest, and it is not to be found in the node's root.
    let ended = guest
        .run(&Program { label: "none", root: Some("/node"), program: "/init", ..Program::default() }, Duration::from_secs(20))
        .unwrap();
    assert_eq!(ended.exit.code, Some(127), "{}", ended.output);
    assert!(ended.output.contains("exec /init in /node"), "{}", ended.output);
    guest.power_off().unwrap();
}

#[test]
fn guest_death_is_noticed() {
    let Some(guest) = boot(&GuestOptions::named("death")) else { return };
    // The kernel panics as sysrq tells it to; the call's own reply may be lost with it.
    let _ = guest.write("/proc/sysrq-trigger", b"c");
    let error = format!("{:#}", guest.power_off().unwrap_err());
    assert!(error.contains("the guest died") || error.contains("no reply"), "{error}");
    assert!(error.contains("sysrq"), "the console is quoted: {error}");
    std::fs::remove_dir_all(guest.folder()).unwrap();

    let Some(guest) = boot(&GuestOptions::named("killed")) else { return };
    guest.kill_qemu();
    assert!(guest.power_off().is_err());
    assert!(guest.machine().unplug(1).is_err());
}
