//! Drive lines of a VM's config, sizes, and keys.
#![no_main]

use controller::pve::drive::{Drive, is_disk_slot, is_drive_key, parse_size, volume_of};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: fuzz::limit_memory(), |data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = parse_size(text);
    assert!(is_drive_key(text) || !is_disk_slot(text));
    let Ok(drive) = text.parse::<Drive>() else { return };
    assert_eq!(volume_of(text), drive.volid, "the two readers see different volumes");
    let printed = drive.to_string();
    assert_eq!(printed.parse::<Drive>().as_ref(), Ok(&drive), "{printed}");
    assert_eq!(volume_of(&printed), drive.volid, "{printed}");
    let _ = (drive.is_readonly(), drive.size_bytes());
});
