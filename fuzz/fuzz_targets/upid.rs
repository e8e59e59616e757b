//! Task ids, as Proxmox answers them.
#![no_main]

use controller::pve::api;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: fuzz::limit_memory(), |data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let target = match api::task_status(text) {
        Ok(request) => request.target(),
        Err(why) => return drop(why.to_string()),
    };
    let parts: Vec<&str> = target.split('/').collect();
    let ["", "nodes", host, "tasks", upid, "status"] = parts[..] else { panic!("{target}") };
    assert!(fuzz::is_one_path_part(host) && fuzz::is_one_path_part(upid), "{target}");
    assert_eq!(fuzz::percent_decoded(upid).as_deref(), Some(text));
    assert!(fuzz::percent_decoded(host).is_some_and(|host| text.split(':').nth(1) == Some(&host)), "{target}");
});
