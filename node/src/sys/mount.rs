//! Mounting by descriptor, with the kernel's own words when it refuses.
//!
//! A mount appears at its place complete or not at all: flags are set while it is still detached.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, StatVfsMountFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, fsconfig_create,
    fsconfig_reconfigure, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, fspick, mount_remount, move_mount, open_tree, unmount,
};

use super::{Dev, Error, kmsg};
use crate::kill;

/// Messages read from a filesystem context; each is at most a line.
const MAX_MESSAGES: usize = 16;
/// Longest single message that the kernel's fs context gives (fs/fs_context.c formats into its own allocation).
const MAX_MESSAGE_BYTES: usize = 4096;

/// What ext4 (fs/ext4/super.c), xfs (fs/xfs/xfs_super.c), the VFS and SELinux say of options and features that they cannot take, with EINVAL.
const OF_OPTIONS: &[&str] = &[
    "option",
    "optional features",
    "mount with",
    "nrecognized",
    "nknown parameter",
    "ad value",
    "not supported",
    "requires",
    "SELinux",
    "conflict",
    "incompatible",
];
/// What SELinux takes of mount options (security/selinux/hooks.c).
const OF_SELINUX: [&str; 5] = ["context", "fscontext", "defcontext", "rootcontext", "seclabel"];
/// What the block layer says of a disk that cannot be read, with EIO.
const OF_THE_DISK: &[&str] =
    &["I/O error, dev", "Buffer I/O error", "unable to read superblock", "SB validate failed with error -5", "SB buffer"];

/// The call that reads the filesystem.
const CREATE: &str = "fsconfig(FSCONFIG_CMD_CREATE)";

/// The kernel refused to mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The call that failed, on what, and the errno.
    pub error: Error,
    /// The mount option that it was about, if any.
    pub option: Option<String>,
    /// The context's own messages, else the new lines of the kernel log that name the device.
    pub said: Vec<String>,
}

impl Refused {
    /// Whether it is about what is on the disk, and a repair may help; not about an option, a right or the kernel.
    #[must_use]
    pub fn is_about_the_filesystem(&self) -> bool {
        let says = |words: &[&str]| self.said.iter().any(|line| words.iter().any(|word| line.contains(word)));
        let is_damage = match self.error.errno {
            Errno::UCLEAN | Errno::BADMSG | Errno::FBIG | Errno::NODATA => true,
            // Of the superblock, or of an option that does not fit it: only the kernel's words tell. Without any, nothing is said of the filesystem.
            Errno::INVAL => !self.said.is_empty() && !says(OF_OPTIONS),
            // Of a journal that makes no sense, or of a disk that cannot be read, which no repair mends.
            Errno::IO => !says(OF_THE_DISK),
            _ => false,
        };
        is_damage && self.error.call == CREATE
    }

    /// Whether it is, or may be, about the label that the mount was to have.
    #[must_use]
    pub fn is_about_the_label(&self) -> bool {
        let is_said = self.said.iter().any(|line| line.contains("SELinux"));
        is_said || self.option.as_deref() == Some("context") || matches!(self.error.errno, Errno::PERM | Errno::ACCESS)
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.error)?;
        if let Some(option) = &self.option {
            write!(f, ", option {option:?}")?;
        }
        if !self.said.is_empty() {
            write!(f, "; the kernel says: {}", self.said.join(" / "))?;
        }
        Ok(())
    }
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self { error, option: None, said: Vec::new() }
    }
}

/// Mount options, sorted into the kernel's three kinds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Options {
    attributes: u32,
    /// Key and, where there is one, value: for the filesystem.
    filesystem: Vec<(String, Option<String>)>,
    /// `context=` with nothing behind it: no label is to be added.
    no_label: bool,
}

impl Options {
    /// From mount flags as CSI carries them: each may be one option or several with commas, as on mount(8)'s command line.
    /// What mount(8) keeps to itself (`defaults`, `nofail`, `x-…`) is passed over; unknown ones are for the kernel to judge.
    pub fn parse<'a>(flags: impl IntoIterator<Item = &'a str>) -> Self {
        let mut options = Self::default();
        for option in flags.into_iter().flat_map(split) {
            options.add(option);
        }
        options
    }

    /// Adds `ro` as if it had been given.
    #[must_use]
    pub fn read_only(self) -> Self {
        self.with("ro")
    }

    /// Adds `nouuid`: a clone of an xfs has the UUID of its source, and both may be mounted on one node.
    #[must_use]
    pub fn any_uuid(self) -> Self {
        self.with("nouuid")
    }

    /// Adds one more, as if it had been given.
    #[must_use]
    pub fn with(mut self, option: &str) -> Self {
        self.add(option);
        self
    }

    /// What SELinux is given: an option and its value.
    #[must_use]
    pub fn label(&self) -> Option<&(String, Option<String>)> {
        self.filesystem.iter().find(|(key, _)| OF_SELINUX.contains(&key.as_str()))
    }

    /// Whether a label is ruled out.
    #[must_use]
    pub const fn rules_label_out(&self) -> bool {
        self.no_label
    }

    fn add(&mut self, option: &str) {
        let (set, clear) = match option {
            "nosuid" => (MountAttrFlags::MOUNT_ATTR_NOSUID, MountAttrFlags::empty()),
            "suid" => (MountAttrFlags::empty(), MountAttrFlags::MOUNT_ATTR_NOSUID),
            "nodev" => (MountAttrFlags::MOUNT_ATTR_NODEV, MountAttrFlags::empty()),
            "dev" => (MountAttrFlags::empty(), MountAttrFlags::MOUNT_ATTR_NODEV),
            "noexec" => (MountAttrFlags::MOUNT_ATTR_NOEXEC, MountAttrFlags::empty()),
            "exec" => (MountAttrFlags::empty(), MountAttrFlags::MOUNT_ATTR_NOEXEC),
            "nodiratime" => (MountAttrFlags::MOUNT_ATTR_NODIRATIME, MountAttrFlags::empty()),
            "diratime" => (MountAttrFlags::empty(), MountAttrFlags::MOUNT_ATTR_NODIRATIME),
            "noatime" => (MountAttrFlags::MOUNT_ATTR_NOATIME, MountAttrFlags::MOUNT_ATTR_STRICTATIME),
            "strictatime" => (MountAttrFlags::MOUNT_ATTR_STRICTATIME, MountAttrFlags::MOUNT_ATTR_NOATIME),
            "atime" | "relatime" => (MountAttrFlags::empty(), MountAttrFlags::MOUNT_ATTR_NOATIME | MountAttrFlags::MOUNT_ATTR_STRICTATIME),
            "nosymfollow" => (MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW, MountAttrFlags::empty()),
            "" | "defaults" | "auto" | "noauto" | "nofail" | "_netdev" | "user" | "nouser" | "users" | "owner" | "group" => return,
            _ if ["x-", "X-", "comment="].iter().any(|own| option.starts_with(own)) => return,
            _ => {
                let (key, value) = match option.split_once('=') {
                    Some((key, value)) => (key, Some(value.trim_matches('"').to_string())),
                    None => (option, None),
                };
                if key == "context" && value.as_deref() == Some("") {
                    self.no_label = true;
                    return;
                }
                // "ro" is both the filesystem's and the mount's.
                match key {
                    "ro" => self.attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY.bits(),
                    "rw" => self.attributes &= !MountAttrFlags::MOUNT_ATTR_RDONLY.bits(),
                    _ => (),
                }
                self.filesystem.push((key.to_string(), value));
                return;
            }
        };
        self.attributes = (self.attributes & !clear.bits()) | set.bits();
    }
}

/// At commas, but not inside double quotes: an SELinux label may contain some.
fn split(flags: &str) -> Vec<&str> {
    let mut quoted = false;
    flags
        .split(move |c: char| {
            quoted ^= c == '"';
            c == ',' && !quoted
        })
        .map(str::trim)
        .collect()
}

/// Mounts the filesystem on `source` (a device node, which the kernel's log calls `device`) at `target`.
///
/// # Errors
/// With the option at fault and the kernel's words.
pub fn filesystem(fstype: &str, source: &Path, device: &str, target: &Path, options: &Options) -> Result<(), Refused> {
    let mut log = kmsg::Log::from_now();
    let context =
        fsopen(fstype, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|errno| Refused::from(Error::at("fsopen", Path::new(fstype))(errno)))?;
    let mut refuse = |call: &'static str, option: Option<&(String, Option<String>)>, errno: Errno| {
        let mut said = messages(&context);
        if said.is_empty() {
            said = match option {
                Some((key, Some(label))) if OF_SELINUX.contains(&key.as_str()) => log.lines_about_label(label),
                Some(_) | None => log.lines_about(device),
            };
        }
        Refused { error: Error { call, subject: source.into(), errno }, option: option.map(|(key, _)| key.clone()), said }
    };
    fsconfig_set_string(&context, "source", source).map_err(|errno| refuse("fsconfig(source)", None, errno))?;
    for option in &options.filesystem {
        match option {
            (key, Some(value)) => fsconfig_set_string(&context, key.as_str(), value.as_str()),
            (key, None) => fsconfig_set_flag(&context, key.as_str()),
        }
        .map_err(|errno| refuse("fsconfig", Some(option), errno))?;
    }
    kill::called("create");
    // A policy that denies the label says so to the audit daemon alone. The filesystem had nothing against it.
    let denied = |errno| options.label().filter(|_| matches!(errno, Errno::PERM | Errno::ACCESS));
    fsconfig_create(&context).map_err(|errno| refuse(CREATE, denied(errno), errno))?;
    let attributes = MountAttrFlags::from_bits_retain(options.attributes);
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(|errno| refuse("fsmount", None, errno))?;
    kill::inside("mounted");
    attach(&mount, target)?;
    Ok(())
}

/// The root folder of what is mounted at `point`, open by a mount of its own that is in no place: what is at `point` can be unmounted meanwhile.
///
/// # Errors
/// As the kernel says; ESTALE: something else is at `point` now.
pub fn unseen(point: &Path, leads: Leads) -> Result<OwnedFd, Error> {
    use rustix::fs::{Mode, OFlags};
    let tree =
        open_tree(CWD, point, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC).map_err(Error::at("open_tree", point))?;
    leads.check(&tree, point)?;
    rustix::fs::openat(&tree, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(Error::at("open", point))
}

/// Adds one option to the mounted filesystem of the device `dev` at `point`; its other options and its mounts' stay as they are.
///
/// # Errors
/// With the kernel's words; ESTALE: something else is at `point` now.
pub fn add_option(point: &Path, dev: Dev, option: &str) -> Result<(), Refused> {
    use rustix::fs::{Mode, OFlags};
    let folder = rustix::fs::open(point, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(Error::at("open", point))?;
    Leads::Into(dev).check(&folder, point)?;
    let context = fspick(&folder, "", FsPickFlags::FSPICK_EMPTY_PATH | FsPickFlags::FSPICK_CLOEXEC).map_err(Error::at("fspick", point))?;
    let refuse = |call: &'static str, errno: Errno| Refused {
        error: Error { call, subject: point.into(), errno },
        option: Some(option.to_string()),
        said: messages(&context),
    };
    fsconfig_set_flag(&context, option).map_err(|errno| refuse("fsconfig", errno))?;
    fsconfig_reconfigure(&context).map_err(|errno| refuse("fsconfig(FSCONFIG_CMD_RECONFIGURE)", errno))
}

/// What a path must lead to, still, when it is used: between the look at it and the deed a mount may have gone, and the
/// path leads to what is below it then, the machine's own disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leads {
    /// Into the filesystem on this device.
    Into(Dev),
    /// To this block device's node.
    To(Dev),
}

impl Leads {
    /// # Errors
    /// ESTALE: the open file is something else.
    pub fn check(self, file: impl AsFd, path: &Path) -> Result<(), Error> {
        let seen = rustix::fs::fstat(file).map_err(Error::at("fstat", path))?;
        let is_right = match self {
            Self::Into(dev) => Dev::from_raw(seen.st_dev) == dev,
            Self::To(dev) => {
                rustix::fs::FileType::from_raw_mode(seen.st_mode) == rustix::fs::FileType::BlockDevice && Dev::from_raw(seen.st_rdev) == dev
            }
        };
        if is_right { Ok(()) } else { Err(Error { call: "open", subject: path.into(), errno: Errno::STALE }) }
    }
}

/// Shows the mount (or file) at `source`, which must lead where `leads` says, at `target` too. Read-only from its first
/// moment, where that is asked and the kernel can (5.12); on an older one, before this returns.
///
/// # Errors
/// As the kernel says; ESTALE: `source` has become something else.
pub fn bind(source: &Path, leads: Leads, target: &Path, read_only: bool) -> Result<(), Error> {
    let tree = open_tree(CWD, source, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)
        .map_err(Error::at("open_tree", source))?;
    leads.check(&tree, source)?;
    kill::inside("cloned");
    if !read_only {
        return attach(&tree, target);
    }
    match set_read_only(&tree) {
        Ok(()) => {
            kill::inside("read-only");
            attach(&tree, target)
        }
        Err(Errno::NOSYS) => attach_then_set_read_only(&tree, target),
        Err(errno) => Err(Error { call: "mount_setattr(MOUNT_ATTR_RDONLY)", subject: source.into(), errno }),
    }
}

/// Before Linux 5.12 only a mount that is in its place can be changed, by its path. No pod runs yet that could write to it.
fn attach_then_set_read_only(tree: &OwnedFd, target: &Path) -> Result<(), Error> {
    let has = rustix::fs::fstatvfs(tree).map_err(Error::at("statfs", target))?.f_flag;
    attach(tree, target)?;
    // A bind remount takes away what it does not name, the atime flags aside (path_mount in fs/namespace.c).
    let mut flags = MountFlags::BIND | MountFlags::RDONLY;
    for (flag, keep) in [
        (StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
        (StatVfsMountFlags::NODEV, MountFlags::NODEV),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
    ] {
        flags.set(keep, has.contains(flag));
    }
    mount_remount(target, flags, c"").map_err(Error::at("mount(MS_REMOUNT|MS_BIND|MS_RDONLY)", target)).inspect_err(|_| {
        // Not left writable. Where this fails too, the error says enough.
        let _ = take_away(target);
    })
}

fn attach(mount: &OwnedFd, target: &Path) -> Result<(), Error> {
    kill::called("move_mount");
    move_mount(mount, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(Error::at("move_mount", target))
}

/// What statfs says of the filesystem of the device `dev` at `point`.
///
/// # Errors
/// As the kernel says; ESTALE: something else is there now.
pub fn usage(point: &Path, dev: Dev) -> Result<rustix::fs::StatVfs, Error> {
    use rustix::fs::{Mode, OFlags};
    let folder = rustix::fs::open(point, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(Error::at("open", point))?;
    Leads::Into(dev).check(&folder, point)?;
    rustix::fs::fstatvfs(&folder).map_err(Error::at("statfs", point))
}

/// Takes the newest mount at `target` away.
///
/// # Errors
/// EBUSY: a process works in it. EINVAL: nothing is mounted there.
pub fn take_away(target: &Path) -> Result<(), Error> {
    kill::called("umount2");
    unmount(target, UnmountFlags::NOFOLLOW).map_err(Error::at("umount2", target))
}

/// The same where the disk is gone: what is still open there, or mounted in it, would keep it for ever, and can save nothing any more.
/// Answers whether it had to go without them: then it ends with the last of them.
///
/// # Errors
/// As the kernel says.
pub fn take_gone_away(target: &Path) -> Result<bool, Error> {
    match take_away(target) {
        Err(error) if error.errno == Errno::BUSY => {
            unmount(target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH).map_err(Error::at("umount2(MNT_DETACH)", target))?;
            Ok(true)
        }
        done => done.map(|()| false),
    }
}

/// What the kernel wrote into a filesystem context: `e ext4: Unknown parameter 'foo'`, one message per read.
fn messages(context: &OwnedFd) -> Vec<String> {
    let mut said = Vec::new();
    let mut buffer = [0; MAX_MESSAGE_BYTES];
    for _ in 0..MAX_MESSAGES {
        // ENODATA: no more.
        let Ok(length) = rustix::io::read(context, &mut buffer) else { break };
        let Some(text) = buffer.get(..length).filter(|text| !text.is_empty()) else { break };
        let text = String::from_utf8_lossy(text);
        let text = text.trim();
        // "e ", "w ", "i ": how bad it is.
        said.push(text.get(2..).filter(|_| text.get(1..2) == Some(" ")).unwrap_or(text).to_string());
    }
    said
}

/// `struct mount_attr` of mount_setattr(2), size 32 (MOUNT_ATTR_SIZE_VER0).
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

fn set_read_only(tree: &OwnedFd) -> Result<(), Errno> {
    let attr = MountAttr { attr_set: MountAttrFlags::MOUNT_ATTR_RDONLY.bits().into(), attr_clr: 0, propagation: 0, userns_fd: 0 };
    mount_setattr(tree, &attr, size_of::<MountAttr>())
}

/// Kernel 5.12 and up; rustix has no such call.
#[allow(unsafe_code, reason = "a system call that rustix lacks")]
fn mount_setattr(tree: impl AsFd, attr: &MountAttr, size: usize) -> Result<(), Errno> {
    let fd = tree.as_fd().as_raw_fd();
    let size = size.min(size_of::<MountAttr>());
    // SAFETY: mount_setattr(dfd, path, flags, uattr, size): the kernel reads the empty C string and at most `size` bytes of `attr`,
    // writes neither and keeps nothing; both live until the call returns, and `fd` is open since `tree` lives.
    let answer = unsafe { libc::syscall(libc::SYS_mount_setattr, fd, c"".as_ptr(), libc::AT_EMPTY_PATH, std::ptr::from_ref(attr), size) };
    if answer == 0 { Ok(()) } else { Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)) }
}

/// Whether the kernel has it. A size of 0 is EINVAL to one that has, before it looks at anything else.
#[must_use]
pub fn has_mount_setattr() -> bool {
    let attr = MountAttr { attr_set: 0, attr_clr: 0, propagation: 0, userns_fd: 0 };
    mount_setattr(CWD, &attr, 0).err() != Some(Errno::NOSYS)
}

/// Where a path really is: its folder with links resolved, its last part as given. mountinfo knows real paths only.
///
/// # Errors
/// The folder is not there (ENOENT), or the path has no last part.
pub fn real(path: &Path) -> Result<PathBuf, Error> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error { call: "realpath", subject: path.into(), errno: Errno::INVAL });
    };
    let folder = std::fs::canonicalize(folder).map_err(Error::io("realpath", folder))?;
    Ok(folder.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Folder;
    use proptest::prelude::*;

    fn filesystem_options(options: &Options) -> Vec<String> {
        options.filesystem.iter().map(|(key, value)| value.as_ref().map_or(key.clone(), |value| format!("{key}={value}"))).collect()
    }

    #[test]
    fn a_path_that_leads_elsewhere_now_is_not_used() {
        use std::os::unix::fs::MetadataExt;
        let folder = Folder::new();
        let open = std::fs::File::open(folder.path()).unwrap();
        let dev = Dev::from_raw(open.metadata().unwrap().dev());
        let other = Dev { major: dev.major, minor: dev.minor + 1 };
        Leads::Into(dev).check(&open, folder.path()).unwrap();
        for elsewhere in [Leads::Into(other), Leads::To(dev)] {
            let refused = elsewhere.check(&open, folder.path()).unwrap_err();
            assert_eq!((refused.errno, refused.subject.as_path()), (Errno::STALE, folder.path()), "{elsewhere:?}");
        }
    }

    #[test]
    fn options_are_sorted_by_who_takes_them() {
        let options = Options::parse(["noatime", "discard,data=ordered", "defaults", "x-systemd.automount", "nodev"]);
        assert_eq!(options.attributes, (MountAttrFlags::MOUNT_ATTR_NOATIME | MountAttrFlags::MOUNT_ATTR_NODEV).bits());
        assert_eq!(filesystem_options(&options), ["discard", "data=ordered"]);
    }

    #[test]
    fn the_last_of_two_contraries_wins() {
        let last = |flags: &[&str]| Options::parse(flags.iter().copied()).attributes;
        assert_eq!(last(&["noatime", "relatime"]), 0);
        assert_eq!(last(&["noatime", "strictatime"]), MountAttrFlags::MOUNT_ATTR_STRICTATIME.bits());
        assert_eq!(last(&["ro", "rw"]), 0);
        assert_eq!(Options::default().read_only().attributes, MountAttrFlags::MOUNT_ATTR_RDONLY.bits());
    }

    #[test]
    fn a_quoted_label_keeps_its_commas() {
        let options = Options::parse(["context=\"system_u:object_r:container_file_t:s0:c1,c2\",noexec"]);
        assert_eq!(filesystem_options(&options), ["context=system_u:object_r:container_file_t:s0:c1,c2"]);
        assert_eq!(options.attributes, MountAttrFlags::MOUNT_ATTR_NOEXEC.bits());
    }

    #[test]
    fn a_refusal_reads_as_a_sentence() {
        let error = Error { call: "fsconfig", subject: "/dev/sda".into(), errno: Errno::INVAL };
        let refused = Refused { error, option: Some("foo".into()), said: vec!["ext4: Unknown parameter 'foo'".into()] };
        let text = refused.to_string();
        assert!(text.starts_with("fsconfig on /dev/sda: EINVAL ("), "{text}");
        assert!(text.ends_with(", option \"foo\"; the kernel says: ext4: Unknown parameter 'foo'"), "{text}");
    }

    /// EINVAL and EIO are of many things: what a repair may mend is told by the kernel's words.
    #[test]
    fn an_option_or_a_disk_is_not_taken_for_a_damaged_filesystem() {
        let refused = |errno: Errno, said: &[&str]| Refused {
            error: Error { call: CREATE, subject: "/dev/sdb".into(), errno },
            option: None,
            said: said.iter().map(|line| (*line).to_string()).collect(),
        };
        for (errno, said) in [
            (Errno::UCLEAN, ""),
            (Errno::INVAL, "EXT4-fs (sdb): VFS: Can't find ext4 filesystem"),
            (Errno::INVAL, "EXT4-fs (sdb): bad geometry: block count 16384 exceeds size of device (8192 blocks)"),
            (Errno::INVAL, "XFS (sdb): Invalid superblock magic number"),
            (Errno::IO, "EXT4-fs (sdb): error loading journal"),
        ] {
            assert!(refused(errno, &[said]).is_about_the_filesystem(), "{said}");
        }
        for (errno, said) in [
            (Errno::INVAL, "EXT4-fs (sdb): can't mount with journal_checksum, fs mounted w/o journal"),
            (Errno::INVAL, "ext4: Bad value for 'data'"),
            (Errno::INVAL, "EXT4-fs (sdb): couldn't mount RDWR because of unsupported optional features (400)"),
            (Errno::INVAL, "XFS (sdb): alignment check failed: sunit/swidth vs. blocksize(4096); option ignored"),
            (Errno::INVAL, "SELinux: Unable to set superblock options before the security server is initialized"),
            (Errno::IO, "I/O error, dev sdb, sector 2 op 0x0:(READ) flags 0x1000 phys_seg 1 prio class 2"),
            (Errno::IO, "EXT4-fs (sdb): unable to read superblock"),
            (Errno::NOMEM, ""),
        ] {
            assert!(!refused(errno, &[said]).is_about_the_filesystem(), "{said}");
        }
        assert!(!refused(Errno::INVAL, &[]).is_about_the_filesystem(), "nothing is said of it");
        let label = Refused { option: Some("context".into()), ..refused(Errno::INVAL, &[]) };
        assert!(label.is_about_the_label() && !refused(Errno::INVAL, &["EXT4-fs (sdb): bad geometry"]).is_about_the_label());
    }

    #[test]
    fn a_real_path_keeps_its_last_part() {
        let folder = Folder::new();
        let real_folder = std::fs::canonicalize(folder.path()).unwrap();
        std::os::unix::fs::symlink(&real_folder, real_folder.join("link")).unwrap();
        assert_eq!(real(&real_folder.join("link/x")).unwrap(), real_folder.join("x"));
        assert_eq!(real(&real_folder.join("no/x")).unwrap_err().errno, Errno::NOENT);
        assert_eq!(real(Path::new("/")).unwrap_err().errno, Errno::INVAL);
    }

    /// In a mount namespace of one thread; for Linux 5.10 and 5.11, tried on whatever runs here.
    #[test]
    #[allow(unsafe_code, reason = "unshare is unsafe in rustix")]
    fn an_old_kernels_read_only_mount_keeps_its_other_flags() {
        use rustix::mount::{MountPropagationFlags, mount, mount_change};
        let folder = Folder::new();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        std::fs::create_dir(&from).and_then(|()| std::fs::create_dir(&to)).unwrap();
        let (has, from) = (to.clone(), from.clone());
        let flags = std::thread::spawn(move || {
            // SAFETY: this thread gets a mount namespace (and a working folder) of its own; no memory or descriptor is unshared.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }?;
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
            mount("tmpfs", &from, "tmpfs", MountFlags::NODEV | MountFlags::NOATIME, None)?;
            let tree = open_tree(CWD, &from, OpenTreeFlags::OPEN_TREE_CLONE)?;
            attach_then_set_read_only(&tree, &has).unwrap();
            std::fs::write(from.join("x"), "the staged mount stays writable").unwrap();
            let refused = std::fs::write(has.join("x"), "").unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(Errno::ROFS.raw_os_error()));
            Ok::<_, Errno>(rustix::fs::statvfs(&has)?.f_flag)
        });
        match flags.join().unwrap() {
            Ok(flags) => {
                let kept = StatVfsMountFlags::NODEV | StatVfsMountFlags::NOATIME | StatVfsMountFlags::RDONLY;
                assert!(flags.contains(kept), "{flags:?}");
                assert!(!flags.intersects(StatVfsMountFlags::NOEXEC | StatVfsMountFlags::NOSUID), "{flags:?}");
            }
            Err(errno) => {
                use std::io::Write as _;
                let _ = writeln!(std::io::stderr(), "SKIPPED: no mount namespace here: {}", super::super::words(errno));
                assert!(std::env::var_os("CI").is_none(), "SKIPPED under CI");
            }
        }
    }

    #[test]
    fn asking_for_mount_setattr_changes_nothing() {
        // The machine's own kernel is newer than 5.12, as far as anyone builds this.
        assert!(has_mount_setattr());
    }

    proptest! {
        #[test]
        fn no_flags_panic(flags in proptest::collection::vec("\\PC{0,20}", 0..4)) {
            let _ = Options::parse(flags.iter().map(String::as_str)).read_only();
        }
    }
}
