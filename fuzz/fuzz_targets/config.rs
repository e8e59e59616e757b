//! The clusters file.
#![no_main]

use controller::config;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: fuzz::limit_memory(), |data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match config::fuzz(text) {
        Ok((vmid, clusters)) => {
            assert!((101..=999_999_999).contains(&vmid) && !clusters.is_empty());
            for (region, url) in &clusters {
                assert!(!region.is_empty() && !region.contains('/'), "{region:?}");
                let host = url.strip_suffix("/api2/json").and_then(|url| url.split_once("://")).map(|(_, host)| host);
                assert!(host.is_some_and(|host| !host.is_empty() && !host.contains(['/', '@', '?', '#', ' '])), "{url:?}");
                assert_eq!(clusters.iter().filter(|(other, _)| other == region).count(), 1);
            }
        }
        Err(why) => {
            for secret in secrets(text) {
                assert!(text.matches(secret).count() > 1 || !why.contains(secret), "{secret:?} is shown: {why}");
            }
        }
    }
});

/// What stands behind the keys of secrets, as far as that can be seen without YAML.
fn secrets(text: &str) -> impl Iterator<Item = &str> {
    let values = text.lines().filter_map(|line| line.split_once(':')).filter(|(key, _)| {
        let key = key.trim_start().trim_start_matches("- ").trim();
        key == "token_secret" || key == "password"
    });
    values.map(|(_, value)| value.trim().trim_matches(['"', '\''])).filter(|value| value.len() > 5)
}
