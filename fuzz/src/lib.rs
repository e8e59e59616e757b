//! What the targets share: a bound on memory, disks made of a few bytes, and a judge of LUKS2 headers.
//!
//! A target asserts more than "no panic": what is accepted and printed is accepted again and means the same; a header that we accept is the header that we
//! would write; what a header asks for is bounded before it is allocated; a surface that is not zero is never called blank.

pub mod disk_model;
pub mod luks;

use rustix::process::{Resource, Rlimit, setrlimit};

/// Address space of a target's process: some hundred MiB are libFuzzer's. An allocation that an input asked for and that goes beyond this is a finding.
const ADDRESS_SPACE_BYTES: u64 = 1 << 30;

/// To be called once, before the first input.
pub fn limit_memory() {
    let limit = Rlimit { current: Some(ADDRESS_SPACE_BYTES), maximum: Some(ADDRESS_SPACE_BYTES) };
    setrlimit(Resource::As, limit).expect("a process may lower its own limit");
}

/// Cuts `bytes` at each byte 0xFF, which no text has.
pub fn parts(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.split(|byte| *byte == 0xFF)
}

/// The reverse of percent-encoding; `None`: not well-formed.
#[must_use]
pub fn percent_decoded(text: &str) -> Option<String> {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        if *first != b'%' {
            out.push(*first);
            continue;
        }
        let (digits, after) = tail.split_at_checked(2)?;
        out.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
        rest = after;
    }
    String::from_utf8(out).ok()
}

/// Whether `text`, spliced into a URL's path, stays one part of it.
#[must_use]
pub fn is_one_path_part(text: &str) -> bool {
    !matches!(text, "" | "." | "..") && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~%".contains(&byte))
}
