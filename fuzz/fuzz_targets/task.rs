//! How a task goes on, as Proxmox answers it: the JSON of `data`. An end is never made up, and every other end is an error with its words.
#![no_main]

use controller::pve::{Cause, api};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

const UPID: &str = "UPID:pve1:00001002:00050020:6B49D201:qmconfig:100:csi@pve!csi:";

fuzz_target!(init: fuzz::limit_memory(), |data: &[u8]| {
    let Ok(data) = serde_json::from_slice::<Value>(data) else { return };
    let is = |key: &str, wanted: &str| data.get(key).and_then(Value::as_str) == Some(wanted);
    match api::read_task("GET /x", UPID, &data) {
        Ok(true) => {
            let exit = data.get("exitstatus").and_then(Value::as_str).unwrap_or_default();
            assert!(is("status", "stopped") && (exit == "OK" || exit.starts_with("WARNINGS:")), "an end was made up: {data}");
        }
        Ok(false) => assert!(is("status", "running"), "a task was kept alive: {data}"),
        Err(error) => {
            assert!(!(is("status", "running") || is("status", "stopped") && is("exitstatus", "OK")), "{data}");
            if let Cause::Task { upid, exit } = &error.cause {
                assert!(upid == UPID && is("status", "stopped") && error.to_string().contains(UPID), "{error}");
                assert!(data.get("exitstatus").and_then(Value::as_str).is_none_or(|told| told == exit), "{error}");
            }
            let _ = (error.words(), error.meaning(), error.meaning().is_outcome_unknown());
        }
    }
});
