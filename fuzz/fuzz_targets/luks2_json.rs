//! The metadata of LUKS2: the bytes are the text, under a good checksum.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(init: fuzz::limit_memory(), |data: &[u8]| fuzz::luks::judge(&fuzz::luks::with_json(data), true));
