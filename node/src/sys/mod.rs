//! The one door to the kernel. Knows no volume, no CSI and no disk format.
//!
//! `unsafe` in this crate exists here only: one operation per block, with a SAFETY note that says what the kernel reads,
//! writes and keeps. Everything that rustix offers goes through rustix.

pub mod blkid;
pub mod block;
pub mod confine;
pub mod dm;
pub mod kernel;
pub mod keyring;
pub mod kmsg;
pub mod memory;
pub mod mount;
pub mod mountinfo;
pub mod random;
pub mod scsi;

use std::fmt;
use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::io::Errno;

/// A system call that failed: which one, on what, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// `open`, `ioctl(EXT4_IOC_RESIZE_FS)`, …
    pub call: &'static str,
    /// The file, folder or device.
    pub subject: PathBuf,
    /// The kernel's number.
    pub errno: Errno,
}

impl Error {
    /// For `map_err`, after a rustix call.
    pub fn at<'a>(call: &'static str, subject: &'a Path) -> impl Fn(Errno) -> Self + 'a {
        move |errno| Self { call, subject: subject.to_path_buf(), errno }
    }

    /// For `map_err`, after a call of the standard library. What has no errno (a short read) counts as EIO.
    pub fn io<'a>(call: &'static str, subject: &'a Path) -> impl Fn(std::io::Error) -> Self + 'a {
        move |cause| Self { call, subject: subject.to_path_buf(), errno: Errno::from_io_error(&cause).unwrap_or(Errno::IO) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {}: {}", self.call, self.subject.display(), words(self.errno))
    }
}

impl std::error::Error for Error {}

/// An errno in words: its C name and libc's sentence.
#[must_use]
pub fn words(errno: Errno) -> String {
    let name = match errno {
        Errno::PERM => "EPERM",
        Errno::NOENT => "ENOENT",
        Errno::IO => "EIO",
        Errno::NXIO => "ENXIO",
        Errno::BADF => "EBADF",
        Errno::AGAIN => "EAGAIN",
        Errno::NOMEM => "ENOMEM",
        Errno::ACCESS => "EACCES",
        Errno::BUSY => "EBUSY",
        Errno::EXIST => "EEXIST",
        Errno::NODEV => "ENODEV",
        Errno::NOTDIR => "ENOTDIR",
        Errno::ISDIR => "EISDIR",
        Errno::INVAL => "EINVAL",
        Errno::NOTTY => "ENOTTY",
        Errno::FBIG => "EFBIG",
        Errno::NOSPC => "ENOSPC",
        Errno::ROFS => "EROFS",
        Errno::LOOP => "ELOOP",
        Errno::NAMETOOLONG => "ENAMETOOLONG",
        Errno::NOTEMPTY => "ENOTEMPTY",
        Errno::NOTBLK => "ENOTBLK",
        Errno::OPNOTSUPP => "EOPNOTSUPP",
        Errno::NOSYS => "ENOSYS",
        Errno::TIMEDOUT => "ETIMEDOUT",
        Errno::STALE => "ESTALE",
        Errno::UCLEAN => "EUCLEAN",
        Errno::BADMSG => "EBADMSG",
        Errno::REMOTEIO => "EREMOTEIO",
        Errno::DQUOT => "EDQUOT",
        Errno::NOKEY => "ENOKEY",
        Errno::KEYREVOKED => "EKEYREVOKED",
        Errno::KEYEXPIRED => "EKEYEXPIRED",
        _ => "errno",
    };
    format!("{name} ({})", std::io::Error::from_raw_os_error(errno.raw_os_error()))
}

/// A device number, as `major:minor` everywhere in sysfs and mountinfo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Dev {
    /// 0: no block device behind it (tmpfs, overlay, …).
    pub major: u32,
    /// The rest of the number.
    pub minor: u32,
}

impl Dev {
    /// From `stat`'s `st_dev` or `st_rdev`.
    #[must_use]
    pub fn from_raw(dev: u64) -> Self {
        Self { major: rustix::fs::major(dev), minor: rustix::fs::minor(dev) }
    }
}

impl std::str::FromStr for Dev {
    type Err = ();

    fn from_str(given: &str) -> Result<Self, ()> {
        let (major, minor) = given.split_once(':').ok_or(())?;
        Ok(Self { major: major.parse().map_err(|_| ())?, minor: minor.parse().map_err(|_| ())? })
    }
}

impl fmt::Display for Dev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// At most so many bytes from the beginning of a file, as text, whoever has put what there: a fifo that nobody writes to is empty, and not waited for.
///
/// # Errors
/// As the kernel says.
pub fn read_at_most(path: &Path, bytes: u64) -> std::io::Result<String> {
    let mut read = Vec::new();
    let nonblock = OFlags::NONBLOCK.bits().cast_signed();
    OpenOptions::new().read(true).custom_flags(nonblock).open(path)?.take(bytes).read_to_end(&mut read)?;
    Ok(String::from_utf8_lossy(&read).into_owned())
}

/// Whether a block device with this number is there (`/sys/dev/block/<major>:<minor>`).
///
/// # Errors
/// The look itself failed.
pub fn is_block_device_there(sysfs: &Path, dev: Dev) -> Result<bool, Error> {
    let path = sysfs.join("dev/block").join(dev.to_string());
    path.try_exists().map_err(Error::io("stat", &path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_call_subject_and_errno() {
        let error = Error { call: "open", subject: "/dev/sda".into(), errno: Errno::BUSY };
        let text = error.to_string();
        assert!(text.starts_with("open on /dev/sda: EBUSY ("), "{text}");
        assert!(text.to_lowercase().contains("busy"), "{text}");
    }

    #[test]
    fn device_numbers_are_read_and_written() {
        assert_eq!("8:16".parse(), Ok(Dev { major: 8, minor: 16 }));
        assert_eq!(Dev { major: 8, minor: 16 }.to_string(), "8:16");
        for odd in ["", "8", "8:", ":8", "8:x", "-1:0", "8:1:2"] {
            assert!(odd.parse::<Dev>().is_err(), "{odd}");
        }
    }
}
