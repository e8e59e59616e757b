//! `/proc/self/mountinfo`, parsed (proc(5); Documentation/filesystems/proc.rst 3.5).

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::{Dev, Error};

/// A node of a thousand pods has some 10,000 mounts of 200 bytes each.
const MAX_BYTES: usize = 64 << 20;

/// One mount, the newest of a stack last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The number of the filesystem (`st_dev` of its files).
    pub dev: Dev,
    /// The folder or file of that filesystem that is shown; `/` for all of it.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
    /// This mount is read-only (the filesystem may not be).
    pub read_only: bool,
    /// `ext4`.
    pub fstype: String,
    /// `/dev/sda`: what the mounter said; a name only.
    pub source: String,
    /// The filesystem itself is read-only. ext4 in trouble is so since Linux 6.12 without saying `ro` (6.15 says `emergency_ro`).
    pub filesystem_read_only: bool,
    /// ext4 does not zero inode tables in the background, and so all of the new ones at once when it grows.
    pub noinit_itable: bool,
    /// It has shut itself down: every access fails (ext4 says so since Linux 6.15).
    pub shut_down: bool,
}

impl Mount {
    /// Whether what is shown has been removed since: of a bind of a device node, that the device went. The number that the node still
    /// bears may be another device's by now.
    #[must_use]
    pub fn is_of_removed(&self) -> bool {
        // d_path.c, seq_dentry.
        self.root.as_os_str().as_bytes().ends_with(b"//deleted")
    }
}

/// All mounts of this mount namespace.
///
/// # Errors
/// The file cannot be read, or a line is not what proc(5) says.
pub fn read(path: &Path) -> Result<Vec<Mount>, Error> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    if bytes.len() > MAX_BYTES {
        return Err(Error { call: "read", subject: path.into(), errno: Errno::FBIG });
    }
    parse(&bytes).ok_or_else(|| Error { call: "parse", subject: path.into(), errno: Errno::INVAL })
}

/// The mount that one sees at `point`: the newest there.
#[must_use]
pub fn at<'a>(mounts: &'a [Mount], point: &Path) -> Option<&'a Mount> {
    mounts.iter().rev().find(|mount| mount.point == point)
}

/// `None`: some line is malformed. No line is passed over: an unread mount could be the one that matters.
#[must_use]
pub fn parse(bytes: &[u8]) -> Option<Vec<Mount>> {
    bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(line).collect()
}

fn line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let (_id, _parent) = (fields.next()?, fields.next()?);
    let dev = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let root = path(fields.next()?);
    let point = path(fields.next()?);
    let options = fields.next()?;
    // Optional fields (`shared:1`, `master:2`) up to a lone dash.
    while fields.next()? != b"-" {}
    let fstype = String::from_utf8_lossy(&unescape(fields.next()?)).into_owned();
    let source = String::from_utf8_lossy(&unescape(fields.next()?)).into_owned();
    let filesystem_options = fields.next()?;
    Some(Mount {
        dev,
        root,
        point,
        read_only: has(options, b"ro"),
        fstype,
        source,
        filesystem_read_only: has(filesystem_options, b"ro") || has(filesystem_options, b"emergency_ro"),
        noinit_itable: has(filesystem_options, b"noinit_itable"),
        shut_down: has(filesystem_options, b"shutdown"),
    })
}

fn has(options: &[u8], wanted: &[u8]) -> bool {
    options.split(|byte| *byte == b',').any(|option| option == wanted)
}

fn path(field: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(unescape(field)))
}

/// The kernel writes space, tab, newline, backslash (and `#` in a source) as `\` and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        if *first == b'\\'
            && let Some((digits, after)) = tail.split_at_checked(3)
            && let Some(byte) = octal(digits)
        {
            out.push(byte);
            rest = after;
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    out
}

fn octal(digits: &[u8]) -> Option<u8> {
    digits.iter().try_fold(0_u8, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(digit - b'0'),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_of_a_real_node() {
        let text = b"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro\n\
            98 22 8:16 / /var/lib/kubelet/plugins/a\\040b/globalmount ro,noatime shared:7 master:2 - ext4 /dev/sdb rw,noinit_itable\n\
            99 22 0:5 /sdb /var/lib/kubelet/x rw - devtmpfs udev ro,size=4k\n\
            97 22 0:5 /sdb//deleted /var/lib/kubelet/y rw - devtmpfs udev rw,size=4k\n\
            96 22 8:32 / /var/lib/kubelet/z rw - ext4 /dev/sdc rw,emergency_ro,shutdown\n";
        let mounts = parse(text).unwrap();
        assert_eq!(mounts.len(), 5);
        assert!(mounts[3].is_of_removed() && !mounts[2].is_of_removed());
        assert!(mounts[4].filesystem_read_only && mounts[4].shut_down && !mounts[3].shut_down);
        assert_eq!(mounts[1].point, Path::new("/var/lib/kubelet/plugins/a b/globalmount"));
        assert_eq!((mounts[1].read_only, mounts[1].filesystem_read_only), (true, false));
        assert_eq!(mounts[1].dev, Dev { major: 8, minor: 16 });
        assert!(mounts[1].noinit_itable && !mounts[0].noinit_itable);
        assert_eq!((mounts[2].root.as_path(), mounts[2].fstype.as_str()), (Path::new("/sdb"), "devtmpfs"));
        assert!(mounts[2].filesystem_read_only && !mounts[2].read_only);
    }

    #[test]
    fn the_newest_of_a_stack_is_what_one_sees() {
        let text = b"1 0 8:0 / /a rw - ext4 /dev/sda rw\n2 1 8:16 / /a rw - ext4 /dev/sdb rw\n";
        assert_eq!(at(&parse(text).unwrap(), Path::new("/a")).unwrap().source, "/dev/sdb");
        assert_eq!(at(&parse(text).unwrap(), Path::new("/")), None);
    }

    #[test]
    fn a_malformed_line_spoils_the_look() {
        for text in ["1 0 8:0 / /a rw ext4 /dev/sda rw", "1 0 8 / /a rw - ext4 /dev/sda rw", "1 0 8:0", "1 0 8:0 / /a rw - ext4 /dev/sda"] {
            assert_eq!(parse(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn this_very_machine() {
        assert!(!read(Path::new("/proc/self/mountinfo")).unwrap().is_empty());
    }

    /// As the kernel's `mangle` does (fs/seq_file.c).
    fn escape(path: &[u8]) -> Vec<u8> {
        path.iter().flat_map(|byte| if b" \t\n\\#".contains(byte) { format!("\\{byte:03o}").into_bytes() } else { vec![*byte] }).collect()
    }

    proptest! {
        #[test]
        fn no_text_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) { let _ = parse(&bytes); }

        #[test]
        fn no_line_like_text_panics(text in "[0-9 :/a-z\\\\,\n-]{0,120}") { let _ = parse(text.as_bytes()); }

        #[test]
        fn any_path_comes_back(path in proptest::collection::vec(1_u8.., 1..60)) {
            let mut text = b"1 0 8:0 / /".to_vec();
            text.extend(escape(&path));
            text.extend(b" rw shared:1 - ext4 /dev/sda rw\n");
            let mounts = parse(&text).unwrap();
            prop_assert_eq!(mounts.len(), 1);
            prop_assert_eq!(mounts[0].point.as_os_str().as_encoded_bytes(), [b"/", &path[..]].concat());
        }
    }
}
