//! New lines of the kernel's log, for the reason behind an errno.
//!
//! ext4 tells why it refuses a mount in the log only, SELinux why it refuses a label. Documentation/ABI/testing/dev-kmsg: one record per read,
//! `level,sequence,microseconds,flags;text`, continuation lines begin with a space.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

/// Records read after one refusal: a flooded log must not hold a call up.
const MAX_RECORDS: usize = 256;
/// Lines kept: ext4 says what is wrong in the first one or two.
const MAX_LINES: usize = 4;
/// `CONSOLE_EXT_LOG_MAX` of the kernel: a smaller buffer is refused with EINVAL.
const MAX_RECORD_BYTES: usize = 8192;

/// The log from now on.
#[derive(Debug)]
pub struct Log(Option<File>);

impl Log {
    /// Begins to listen. Without the right to read the log there will just be no lines.
    #[must_use]
    pub fn from_now() -> Self {
        let opened = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
            .open(Path::new("/dev/kmsg"))
            .and_then(|mut file| file.seek(SeekFrom::End(0)).map(|_| file));
        Self(opened.ok())
    }

    /// What was logged since then about `device` (`sda`), oldest first.
    #[must_use]
    pub fn lines_about(&mut self, device: &str) -> Vec<String> {
        self.lines(&|text| names(text, device))
    }

    /// What SELinux logged since then about `label`. It reads a mount's options before there is a filesystem, and names no device then.
    #[must_use]
    pub fn lines_about_label(&mut self, label: &str) -> Vec<String> {
        self.lines(&|text| is_of_label(text, label))
    }

    fn lines(&mut self, is_wanted: &dyn Fn(&str) -> bool) -> Vec<String> {
        let mut lines = Vec::new();
        let Some(file) = &mut self.0 else { return lines };
        let mut buffer = [0; MAX_RECORD_BYTES];
        for _ in 0..MAX_RECORDS {
            match file.read(&mut buffer) {
                Ok(length) => lines.extend(buffer.get(..length).and_then(text_of).filter(|text| is_wanted(text))),
                // Records were overwritten while we read: the next read goes on behind them.
                Err(cause) if cause.raw_os_error() == Some(rustix::io::Errno::PIPE.raw_os_error()) => (),
                Err(_) => break,
            }
            if lines.len() == MAX_LINES {
                break;
            }
        }
        lines
    }
}

fn text_of(record: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(record).ok()?;
    let (_, text) = text.split_once(';')?;
    Some(text.lines().next()?.trim().to_string())
}

/// `sda` in `EXT4-fs (sda): …`, but not in `sdaa` nor `dm-sda1`.
fn names(text: &str, device: &str) -> bool {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '_').any(|word| word == device)
}

/// security/selinux/hooks.c: the label in brackets, or that there is no policy to know any.
fn is_of_label(text: &str, label: &str) -> bool {
    text.starts_with("SELinux: ") && (text.contains(&format!("({label})")) || text.contains("security server"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_record_is_cut_to_its_text() {
        let record = b"3,1234,5678901,-;EXT4-fs (sda): VFS: Can't find ext4 filesystem\n SUBSYSTEM=block\n DEVICE=b8:0\n";
        assert_eq!(text_of(record).unwrap(), "EXT4-fs (sda): VFS: Can't find ext4 filesystem");
        assert_eq!(text_of(b"nothing"), None);
    }

    #[test]
    fn only_lines_that_name_the_device() {
        for text in ["EXT4-fs (sda): bad", "EXT4-fs error (device sda): bad", "sd 0:0:0:1: [sda] gone", "I/O error, dev sda, sector 2"] {
            assert!(names(text, "sda"), "{text}");
        }
        for text in ["EXT4-fs (sdaa): bad", "EXT4-fs (sda1): bad", "EXT4-fs (dm-sda): bad", ""] {
            assert!(!names(text, "sda"), "{text}");
        }
    }

    /// As 6.1 and 6.12 say it.
    #[test]
    fn only_selinux_lines_of_the_label() {
        let unknown = "SELinux: security_context_str_to_sid (a:b:c:s0) failed with errno=-22";
        let early = "SELinux: Unable to set superblock options before the security server is initialized";
        assert!(is_of_label(unknown, "a:b:c:s0") && is_of_label(early, "a:b:c:s0"));
        assert!(!is_of_label(unknown, "a:b:c") && !is_of_label("EXT4-fs (sda): (a:b:c:s0)", "a:b:c:s0"));
    }

    proptest! {
        #[test]
        fn no_record_panics(record in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = text_of(&record).map(|text| names(&text, "sda"));
        }
    }
}
