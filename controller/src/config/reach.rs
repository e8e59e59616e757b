//! How a cluster is reached: its addresses, and what makes us believe that it is the one. Pure.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use serde_yaml::{Mapping, Value};

use super::{Lines, Refusal};

/// Each is asked at the same time where one has to be found, and holds a thread for that.
pub const MAX_URLS: usize = 32;

/// SHA-256 of a certificate as it goes over the wire (DER), as Proxmox shows it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint(pub [u8; 32]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02X}", if index == 0 { "" } else { ":" })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for Fingerprint {
    type Err = String;

    /// `AA:BB:…` or without the colons, in either case.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            String::from(
                "should be 64 hexadecimal digits, in pairs with colons between them or without, as Proxmox's web interface shows it under \
                 Node, System, Certificates",
            )
        };
        let digits: Vec<u32> = text.chars().filter(|c| *c != ':').map(|c| c.to_digit(16)).collect::<Option<_>>().ok_or_else(wrong)?;
        if digits.len() == 40 {
            return Err("is of SHA-1; the one of SHA-256 has 32 pairs of digits".into());
        }
        let bytes: Vec<u8> = digits.chunks_exact(2).filter_map(|two| u8::try_from(two.first()? * 16 + two.last()?).ok()).collect();
        if digits.len() != 64 {
            return Err(wrong());
        }
        bytes.try_into().map(Self).map_err(|_| wrong())
    }
}

/// What makes us believe that a certificate is the cluster's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// A CA of the system's bundle, or of SSL_CERT_FILE.
    System,
    /// A CA in this file, and no other.
    Ca {
        /// Where it was read.
        file: PathBuf,
        /// What it holds; not read yet: empty.
        pem: Vec<u8>,
    },
    /// It is one of these.
    Pinned(Vec<Fingerprint>),
    /// Nothing does.
    Blind,
}

impl Trust {
    /// The certificates that count, where only some do.
    #[must_use]
    pub fn pins(&self) -> &[Fingerprint] {
        match self {
            Self::Pinned(pins) => pins,
            Self::System | Self::Ca { .. } | Self::Blind => &[],
        }
    }
}

/// One word or a list of words; nothing: not given.
fn words(map: &Mapping, key: &str, place: &str, lines: &Lines<'_>, nth: usize) -> Result<Vec<String>, Refusal> {
    let wrong = || format!("{}{place}: {key} should be text or a list of texts; put each in quotes", lines.of_key(key, nth));
    let one = |value: &Value| value.as_str().map(|text| text.trim().to_string()).ok_or_else(wrong);
    let given = match map.get(key) {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Sequence(list)) => list.iter().map(one).collect::<Result<_, _>>()?,
        Some(value) => vec![one(value)?],
    };
    Ok(given.into_iter().filter(|word| !word.is_empty()).collect())
}

/// The cluster's addresses: `url`, then `urls`; each may be one or a list.
pub(super) fn urls(map: &Mapping, place: &str, lines: &Lines<'_>, nth: usize) -> Result<Vec<String>, Refusal> {
    let (mut urls, mut seen) = (Vec::new(), BTreeSet::new());
    for key in ["url", "urls"] {
        for url in words(map, key, place, lines, nth)? {
            // What stands before an `@` may be a password: then the url is not shown.
            let shown = if url.contains('@') { "(with a user or password in it)".into() } else { format!("{url:?}") };
            let line = lines.of_key(key, nth);
            let url = base_url(&url).map_err(|why| format!("{line}{place}: url {shown} {why}"))?;
            if !seen.insert(url.clone()) {
                return Err(format!("{line}{place}: url {shown} is there twice"));
            }
            urls.push(url);
        }
    }
    match urls.len() {
        0 => Err(format!("{place} has no url; write https://HOST:8006/api2/json, or several in urls: [...]")),
        1..=MAX_URLS => Ok(urls),
        more => Err(format!("{}{place} has {more} urls; at most {MAX_URLS} are used", lines.of_key("urls", nth))),
    }
}

/// At most one of `insecure: true`, `caFile` and `fingerprint`.
pub(super) fn trust(map: &Mapping, insecure: bool, urls: &[String], place: &str, lines: &Lines<'_>, nth: usize) -> Result<Trust, Refusal> {
    let (files, pins) = (words(map, "caFile", place, lines, nth)?, words(map, "fingerprint", place, lines, nth)?);
    if insecure && !(files.is_empty() && pins.is_empty()) {
        let key = if files.is_empty() { "fingerprint" } else { "caFile" };
        return Err(format!(
            "{}{place} has insecure: true, with which no certificate is looked at, and {key}; remove one",
            lines.of_key("insecure", nth)
        ));
    }
    if let (false, Some(plain)) = (files.is_empty() && pins.is_empty(), urls.iter().find(|url| url.starts_with("http://"))) {
        return Err(format!("{place} says which certificate to trust, and {plain} has none; write https://"));
    }
    match (files.as_slice(), pins.is_empty()) {
        ([], true) => Ok(if insecure { Trust::Blind } else { Trust::System }),
        ([], false) => {
            let read = |pin: &String| pin.parse().map_err(|why| format!("{}{place}: fingerprint {why}", lines.of_key("fingerprint", nth)));
            pins.iter().map(read).collect::<Result<_, _>>().map(Trust::Pinned)
        }
        ([file], true) if file.starts_with('/') => Ok(Trust::Ca { file: file.into(), pem: Vec::new() }),
        (_, true) => Err(format!("{}{place}: caFile should be one absolute path", lines.of_key("caFile", nth))),
        (_, false) => Err(format!("{}{place} has both caFile and fingerprint; write one of them", lines.of_key("caFile", nth))),
    }
}

/// Accepts the host alone, with `/api2/json`, and with a slash at the end.
fn base_url(given: &str) -> Result<String, &'static str> {
    let (scheme, rest) = given.split_once("://").ok_or("should begin with https:// or http://")?;
    if !matches!(scheme, "http" | "https") {
        return Err("should begin with https:// or http://");
    }
    let rest = rest.trim_end_matches('/');
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    if host.is_empty() || host.contains('@') || host.contains(|c: char| c.is_whitespace() || matches!(c, '?' | '#' | '\\' | ',')) {
        return Err("has no plain host; write https://HOST:8006/api2/json");
    }
    match path {
        "" | "api2" | "api2/json" => Ok(format!("{scheme}://{host}/api2/json")),
        _ => Err("has a path that is not Proxmox's; write https://HOST:8006/api2/json"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIN: &str = "00:11:22:33:44:55:66:77:88:99:aa:BB:CC:DD:EE:FF:00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF";

    fn reach(text: &str) -> Result<(Vec<String>, Trust), Refusal> {
        let map: Mapping = serde_yaml::from_str(text).unwrap();
        let lines = Lines { text };
        let urls = urls(&map, "cluster 1", &lines, 0)?;
        let insecure = map.get("insecure").is_some();
        trust(&map, insecure, &urls, "cluster 1", &lines, 0).map(|trust| (urls, trust))
    }

    #[test]
    fn one_url_or_several_in_either_key() {
        for (text, expected) in [
            ("url: http://a", vec!["http://a/api2/json"]),
            ("url: [http://a, http://b/]", vec!["http://a/api2/json", "http://b/api2/json"]),
            ("urls: [http://a]", vec!["http://a/api2/json"]),
            ("urls: [http://b]\nurl: http://a", vec!["http://a/api2/json", "http://b/api2/json"]),
        ] {
            assert_eq!(reach(text).unwrap().0, expected, "{text}");
        }
        let many: Vec<String> = (0..=MAX_URLS).map(|n| format!("http://a{n}")).collect();
        for (text, word) in [
            ("url: ''", "has no url"),
            ("urls: []", "has no url"),
            ("url: 7", "put each in quotes"),
            ("url: [http://a, 7]", "put each in quotes"),
            ("url: http://a\nurls: [http://a/]", "line 2: cluster 1: url \"http://a/\" is there twice"),
            ("url: http://a,http://b", "no plain host"),
            (&format!("urls: [{}]", many.join(", ")), "at most 32"),
        ] {
            let why = reach(text).unwrap_err();
            assert!(why.contains(word), "{text}: {why}");
        }
    }

    #[test]
    fn what_is_trusted_is_said_once() {
        let https = |rest: &str| reach(&format!("url: https://a\n{rest}"));
        assert_eq!(https("").unwrap().1, Trust::System);
        assert_eq!(https("insecure: true").unwrap().1, Trust::Blind);
        assert_eq!(https("caFile: /ca.pem").unwrap().1, Trust::Ca { file: "/ca.pem".into(), pem: vec![] });
        let (_, pinned) = https(&format!("fingerprint: {PIN}")).unwrap();
        assert_eq!(pinned.pins()[0].to_string(), PIN.to_uppercase());
        assert_eq!(https(&format!("fingerprint: ['{}', {PIN}]", PIN.replace(':', ""))).unwrap().1.pins().len(), 2);
        for (text, word) in [
            (format!("insecure: true\nfingerprint: {PIN}"), "line 2: cluster 1 has insecure: true"),
            (format!("caFile: /a\nfingerprint: {PIN}"), "both caFile and fingerprint"),
            ("caFile: ca.pem".into(), "absolute path"),
            ("caFile: [/a, /b]".into(), "one absolute path"),
            (format!("fingerprint: {PIN}:00"), "64 hexadecimal digits"),
            ("fingerprint: AA:BB".into(), "64 hexadecimal digits"),
            ("fingerprint: hunter2".into(), "64 hexadecimal digits"),
            (format!("fingerprint: {}", &PIN[..59]), "SHA-1"),
            (format!("urls: [http://b]\nfingerprint: {PIN}"), "http://b/api2/json has none"),
        ] {
            let why = https(&text).unwrap_err();
            assert!(why.contains(word) && !why.contains("hunter2"), "{text}: {why}");
        }
    }
}
