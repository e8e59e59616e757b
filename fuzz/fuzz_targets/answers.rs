//! Proxmox's answers: the first byte says to what, the rest is the JSON of `data`.
#![no_main]

use controller::pve::api;
use controller::pve::drive::{is_drive_key, volume_of};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(init: fuzz::limit_memory(), |data: &[u8]| {
    let Some((kind, json)) = data.split_first() else { return };
    let Ok(data) = serde_json::from_slice::<Value>(json) else { return };
    match kind % 11 {
        0 => {
            let Ok(all) = api::read_resources("x", &data) else { return };
            let entries = data.as_array().map_or(0, Vec::len);
            assert!(all.vms.len() + all.storages.len() + all.hosts.len() <= entries);
            assert!(all.vms.iter().all(|(vmid, vm)| *vmid == vm.vmid));
        }
        1 => drop(api::read_vm_states("x", &data)),
        2 => {
            let Ok(state) = api::read_vm_state("x", &data) else { return };
            assert!(!state.running || state.plugged.is_some() == data.get("blockstat").is_some_and(Value::is_object), "an answer was made up");
        }
        3 => {
            let Ok(config) = api::read_pending("x", &data) else { return };
            assert!(!config.digest.is_empty());
            for (key, line) in config.lines.iter().filter(|(key, _)| is_drive_key(key)) {
                for text in line.value.iter().chain(&line.pending) {
                    assert!(config.naming(volume_of(text)).any(|(found, _)| found == key), "{key}: {text} is not found by its volume");
                }
            }
        }
        4 => assert!(api::read_snapshots("x", &data).is_ok_and(|names| names.iter().all(|name| name != "current")) || !is_list_of_named(&data)),
        5 => assert!(api::read_snapshot_config("x", &data).is_err() || data.is_object()),
        6 => assert!(api::read_upid(&data).is_none_or(|upid| upid.starts_with("UPID:"))),
        7 => assert!(api::read_volume("x", &data).is_ok_and(|size| size > 0) || data.get("size").is_none_or(|size| !size.is_u64() || size == 0)),
        8 => {
            let quorate = api::read_quorate("x", &data);
            assert!(!quorate.is_ok_and(|quorate| quorate) || data.as_array().is_some_and(|entries| !entries.is_empty()));
        }
        9 => {
            let _ = api::read_sees_all_vms(&data);
        }
        _ => {
            let cause = api::refusal(500, "reason".into(), Some(data), "");
            let error = controller::pve::Error { call: "GET /x".into(), cause };
            let _ = (error.to_string(), error.words(), error.meaning());
        }
    }
});

fn is_list_of_named(data: &Value) -> bool {
    data.as_array().is_some_and(|entries| entries.iter().all(|entry| entry.get("name").is_some_and(|name| !name.is_null())))
}
