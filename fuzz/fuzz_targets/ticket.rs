//! The answer to a login: the JSON of `data`. What was given is in no error.
#![no_main]

use controller::pve::api;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

const PARTS: [&str; 2] = ["ticket", "CSRFPreventionToken"];
/// Shorter ones could be in any sentence.
const TOLD: usize = 12;

fuzz_target!(init: fuzz::limit_memory(), |data: &[u8]| {
    let Ok(data) = serde_json::from_slice::<Value>(data) else { return };
    let given = PARTS.map(|part| data.get(part).and_then(Value::as_str));
    match api::read_ticket("POST /access/ticket", &data) {
        Ok((ticket, csrf)) => {
            assert!(PARTS.iter().all(|part| data.get(part).is_some_and(|value| !value.is_null())), "a ticket was made up: {data}");
            assert!(given[0].is_none_or(|given| given == ticket) && given[1].is_none_or(|given| given == csrf));
        }
        Err(error) => {
            let told = format!("{error} {error:?} {}", error.words());
            assert!(given.iter().flatten().filter(|given| given.len() >= TOLD).all(|given| !told.contains(*given)), "{told}");
        }
    }
});
