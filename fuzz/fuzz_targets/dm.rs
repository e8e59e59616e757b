//! Answers of device-mapper. The first byte 1: the rest is a table line, and the message around it is made.
#![no_main]

use libfuzzer_sys::fuzz_target;
use node::sys::dm::{Key, fuzz};

const HEADER_BYTES: usize = 312;
const TARGET_BYTES: usize = 40;

/// DM_TABLE_STATUS' answer with one crypt target.
fn message(line: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES + TARGET_BYTES];
    let end = HEADER_BYTES + TARGET_BYTES + line.len() + 1;
    for (at, number) in [(12, end), (16, HEADER_BYTES), (20, 1)] {
        bytes[at..at + 4].copy_from_slice(&u32::try_from(number).expect("small").to_ne_bytes());
    }
    bytes[HEADER_BYTES + 24..][..5].copy_from_slice(b"crypt");
    bytes.extend_from_slice(line);
    bytes.push(0);
    bytes
}

fuzz_target!(init: fuzz::limit_memory(), |data: &[u8]| {
    let answer = match data.split_first() {
        Some((1, line)) => message(line),
        _ => data.to_vec(),
    };
    let targets = fuzz(&answer);
    // A target of the kernel takes its 40 bytes; more of them than there is room for would be memory that a number asked for.
    assert!(targets.len() <= answer.len(), "{} targets in {} bytes", targets.len(), answer.len());
    for (target, printed) in targets {
        assert_eq!(target.crypt.is_some(), printed.is_some());
        let (Some(crypt), Some(printed)) = (&target.crypt, printed) else { continue };
        let again = fuzz(&message(printed.as_bytes()));
        let [(again, _)] = &again[..] else { panic!("{} targets out of one line", again.len()) };
        assert_eq!(again.crypt.as_ref(), Some(crypt), "{}", printed.as_str());
        let hex = matches!(crypt.key, Key::Hex(_)).then(|| printed.split(' ').nth(1)).flatten().filter(|hex| hex.len() > 8 && printed.matches(hex).count() == 1);
        assert!(hex.is_none_or(|hex| !format!("{target:?}").contains(hex)), "the key is shown");
    }
});
