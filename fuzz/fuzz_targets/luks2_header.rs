//! Both binary headers of LUKS2, and their order. The first byte: 16 adds a keyslot; for its other bits and the rest see [`fuzz::luks::with_binary`].
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(init: fuzz::limit_memory(), |data: &[u8]| {
    let Some((how, data)) = data.split_first() else { return };
    fuzz::luks::judge(&fuzz::luks::with_binary(*how, data), how & 16 != 0);
});
