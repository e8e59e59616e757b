//! The golden manifests: every entry's image made again in memory, and "sparse-sha256-v1", the digest of an image.

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::image::{Image, UNIT};

/// `compare` says of an entry what differs, if anything.
pub(crate) fn check(manifest: &str, entries: usize, compare: fn(&Value) -> Option<String>) {
    let manifest: Value = serde_json::from_str(manifest).unwrap();
    let all = manifest["entries"].as_array().unwrap();
    assert_eq!(all.len(), entries);
    let wrong: Vec<String> = all
        .iter()
        .filter_map(|entry| compare(entry).map(|why| format!("{} {} {}: {why}\n", entry["name"], entry["mode"], entry["label"])))
        .collect();
    assert!(wrong.is_empty(), "{} of {entries} differ:\n{}", wrong.len(), wrong.concat());
}

/// An entry's facts that are not ours, for a digest that differs.
pub(crate) fn differing_facts(entry: &Value, ours: &[(&str, u64)]) -> String {
    let facts = &entry["facts"];
    ours.iter().filter(|(name, ours)| facts[name] != *ours).map(|(name, ours)| format!("{name} {ours} is {}; ", facts[name])).collect()
}

/// Over every maximal run of written units: offset, length, bytes.
pub(crate) fn digest(image: &Image) -> String {
    let mut digest = Sha256::new();
    let mut units = image.written().peekable();
    while let Some((first, bytes)) = units.next() {
        let mut run = vec![bytes];
        while let Some((_, bytes)) = units.next_if(|(key, _)| *key == first + run.len() as u64) {
            run.push(bytes);
        }
        let length: usize = run.iter().map(|bytes| bytes.len()).sum();
        digest.update((first * UNIT as u64).to_le_bytes());
        digest.update((length as u64).to_le_bytes());
        run.iter().for_each(|bytes| digest.update(bytes));
    }
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
