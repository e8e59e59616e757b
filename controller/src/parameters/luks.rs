//! What a StorageClass says of LUKS: checked where a volume is made, and passed on to the node.
//!
//! The ranges are those of `node/disk/src/luks`, which makes the volume: what is refused there is refused here first.

use std::collections::HashMap;

use proto::volume_context::{LUKS_DISCARDS, LUKS_KDF, LUKS_KDF_ITERATIONS, LUKS_KDF_MEMORY, LUKS_KDF_TIME, LUKS_KEYS};

use super::{boolean, number};

/// Argon2's memory is needed again at every open, in the node's pod: more than 1 GiB there is nobody's wish.
const MEMORY_MIB: std::ops::RangeInclusive<u64> = 32..=1024;
const TIME: std::ops::RangeInclusive<u64> = 4..=256;
const ITERATIONS: std::ops::RangeInclusive<u64> = 1000..=100_000_000;

/// The LUKS parameters of a class, in the form that the node reads; empty where it has none.
///
/// # Errors
/// A sentence with the key, the value and what would be right.
pub(super) fn of_class(given: &HashMap<String, String>) -> Result<Vec<(&'static str, String)>, String> {
    let text = |key: &str| given.get(key).map(String::as_str).filter(|value| !value.is_empty());
    let kdf = text(LUKS_KDF);
    let unused: &[&str] = match kdf {
        None | Some("argon2id") => &[LUKS_KDF_ITERATIONS],
        Some("pbkdf2") => &[LUKS_KDF_MEMORY, LUKS_KDF_TIME],
        Some(other) => return Err(format!("parameter {LUKS_KDF} {other:?} should be argon2id or pbkdf2")),
    };
    if let Some(key) = unused.iter().find(|key| text(key).is_some()) {
        return Err(format!("parameter {key} is not for {LUKS_KDF} {}; remove one of them", kdf.unwrap_or("argon2id")));
    }
    for (key, range, what) in [
        (LUKS_KDF_MEMORY, MEMORY_MIB, "a number of MiB from 32 to 1024"),
        (LUKS_KDF_TIME, TIME, "a number from 4 to 256"),
        (LUKS_KDF_ITERATIONS, ITERATIONS, "a number from 1000 to 100000000"),
    ] {
        number(key, text(key), |n| range.contains(&n), what)?;
    }
    let discards = text(LUKS_DISCARDS).map(|value| boolean(LUKS_DISCARDS, value)).transpose()?;
    let discards = discards.map(|on| String::from(if on { "1" } else { "0" }));
    let value = |key: &'static str| if key == LUKS_DISCARDS { discards.clone() } else { text(key).map(String::from) };
    Ok(LUKS_KEYS.iter().filter_map(|key| value(key).map(|value| (*key, value))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&str, &str)]) -> Result<Vec<(&'static str, String)>, String> {
        of_class(&pairs.iter().map(|(key, value)| ((*key).to_string(), (*value).to_string())).collect())
    }

    #[test]
    fn what_is_right_goes_to_the_node() {
        assert_eq!(of(&[]), Ok(vec![]));
        assert_eq!(of(&[("luksKdfMemory", "")]), Ok(vec![]));
        let expected = vec![("luksKdf", "argon2id".to_string()), ("luksKdfMemory", "32".into()), ("luksKdfTime", "256".into())];
        assert_eq!(of(&[("luksKdfTime", "256"), ("luksKdfMemory", "32"), ("luksKdf", "argon2id")]), Ok(expected));
        let expected = vec![("luksKdf", "pbkdf2".to_string()), ("luksKdfIterations", "1000".into()), ("luksDiscards", "1".into())];
        assert_eq!(of(&[("luksKdf", "pbkdf2"), ("luksKdfIterations", "1000"), ("luksDiscards", "true")]), Ok(expected));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_range() {
        for (key, value, right) in [
            ("luksKdf", "argon2i", "argon2id or pbkdf2"),
            ("luksKdfMemory", "31", "32 to 1024"),
            ("luksKdfMemory", "1025", "32 to 1024"),
            ("luksKdfMemory", "64Mi", "32 to 1024"),
            ("luksKdfTime", "3", "4 to 256"),
            ("luksKdfIterations", "1000", "not for luksKdf argon2id"),
            ("luksDiscards", "yes", "\"true\""),
        ] {
            let why = of(&[(key, value)]).unwrap_err();
            assert!(why.contains(key) && why.contains(right), "{why}");
        }
        for (key, value, right) in [("luksKdfIterations", "999", "from 1000"), ("luksKdfMemory", "64", "not for luksKdf pbkdf2")] {
            let why = of(&[("luksKdf", "pbkdf2"), (key, value)]).unwrap_err();
            assert!(why.contains(key) && why.contains(right), "{why}");
        }
    }

    /// The same numbers on both sides.
    #[test]
    fn the_node_makes_what_is_taken_here() {
        use disk::luks::{Argon2Cost, Hash, Kdf};
        let argon2id = |memory_mib: u64, time: u64| {
            let [memory_kib, time] = [memory_mib * 1024, time].map(|n| u32::try_from(n).unwrap());
            Kdf::Argon2id(Argon2Cost { time, memory_kib, lanes: 1 }).check_new().is_ok()
        };
        let pbkdf2 =
            |iterations: u64| Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: u32::try_from(iterations).unwrap() }.check_new().is_ok();
        assert!(argon2id(*MEMORY_MIB.start(), *TIME.start()) && argon2id(*MEMORY_MIB.end(), *TIME.end()));
        assert!(!argon2id(MEMORY_MIB.end() + 1, 4) && !argon2id(MEMORY_MIB.start() - 1, 4) && !argon2id(64, TIME.end() + 1));
        assert!(pbkdf2(*ITERATIONS.start()) && pbkdf2(*ITERATIONS.end()) && !pbkdf2(ITERATIONS.end() + 1));
    }
}
