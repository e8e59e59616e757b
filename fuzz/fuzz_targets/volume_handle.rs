//! Volume handles, and what is made of them: drive strings and URLs.
#![no_main]

use controller::parameters::Parameters;
use controller::pve::api;
use controller::pve::drive::{Drive, volume_of};
use libfuzzer_sys::fuzz_target;
use proto::VolumeHandle;

fuzz_target!(init: fuzz::limit_memory(), |data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let handle: VolumeHandle = match text.parse() {
        Ok(handle) => handle,
        Err(why) => {
            let why: proto::handle::HandleError = why;
            return assert!(why.to_string().len() < 4096);
        }
    };
    assert_eq!(handle.to_string(), text);
    assert!(handle.serial().len() == 20 && handle.owner_vmid().is_none_or(|vmid| vmid >= 100));
    // Proxmox reads the very volume out of the drive that we write, and so do we.
    let line = Parameters::default().drive(&handle, 1, false).to_string();
    let read = line.parse::<Drive>();
    assert_eq!(read.as_ref().map(|drive| drive.volid.as_str()), Ok(handle.volid().as_str()), "{line}");
    assert_eq!(volume_of(&line), handle.volid());
    // And out of the URL.
    let target = api::volume(&handle.zone, &handle.storage, &handle.volid()).target();
    let parts: Vec<&str> = target.splitn(7, '/').collect();
    let ["", "nodes", zone, "storage", storage, "content", volid] = parts[..] else { panic!("{target}") };
    assert!((zone.is_empty() || fuzz::is_one_path_part(zone)) && fuzz::is_one_path_part(storage), "{target}");
    assert!(volid.split('/').all(|part| fuzz::is_one_path_part(&part.replace(':', "-"))), "{target}");
    for (encoded, plain) in [(zone, &handle.zone), (storage, &handle.storage), (volid, &handle.volid())] {
        assert_eq!(fuzz::percent_decoded(encoded).as_ref(), Some(plain), "{target}");
    }
});
