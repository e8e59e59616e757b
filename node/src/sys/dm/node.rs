//! Device nodes: the control node, and `/dev/mapper/<name>` where no udev makes it.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::io::Errno;

use crate::sys::{Dev, Error};

/// The kernel's list of misc devices: `236 device-mapper`.
const MISC: &str = "/proc/misc";
const MISC_MAJOR: u32 = 10;
/// `MAPPER_CTRL_MINOR` (include/linux/miscdevice.h), fixed since Linux 2.6.36: opening it loads the module.
const CONTROL_MINOR: u32 = 236;
/// udev links a new mapping within milliseconds; without its rules for device-mapper it never does.
const UDEV_DEADLINE: Duration = Duration::from_secs(1);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Where a mapping can be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// `/dev/mapper/<name>`: what the mount table is to show. It may be a link.
    pub named: PathBuf,
    /// The device node itself.
    pub real: PathBuf,
}

/// Whether device-mapper is in the kernel now; asks nothing of it, so loads nothing.
pub(super) fn is_loaded() -> Result<bool, Error> {
    let path = Path::new(MISC);
    let list = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    Ok(has_device_mapper(&list))
}

fn has_device_mapper(list: &str) -> bool {
    list.lines().any(|line| line.split_ascii_whitespace().eq([CONTROL_MINOR.to_string().as_str(), "device-mapper"]))
}

/// `/dev/mapper/control`, made where it is missing. ENODEV: the kernel has no device-mapper and no module of it.
pub(super) fn control(devices: &Path) -> Result<File, Error> {
    let path = devices.join("mapper/control");
    let dev = Dev { major: MISC_MAJOR, minor: CONTROL_MINOR };
    let is_right = |path: &Path| {
        std::fs::symlink_metadata(path).is_ok_and(|seen| seen.file_type().is_char_device() && Dev::from_raw(seen.rdev()) == dev)
    };
    if !is_right(&path) {
        make(&path, FileType::CharacterDevice, dev, 0o600, is_right)?;
    }
    std::fs::OpenOptions::new().read(true).write(true).open(&path).map_err(Error::io("open", &path))
}

/// The mapping's node below `devices` (`/dev`).
pub(super) fn of(devices: &Path, name: &str, dev: Dev) -> Result<Node, Error> {
    let named = devices.join("mapper").join(name);
    let is_right =
        |path: &Path| std::fs::metadata(path).is_ok_and(|seen| seen.file_type().is_block_device() && Dev::from_raw(seen.rdev()) == dev);
    // Links below /dev/disk are udev's alone: where there are none, nobody is waited for.
    let until = if devices.join("disk").is_dir() { UDEV_DEADLINE } else { Duration::ZERO };
    let begun = Instant::now();
    while !is_right(&named) {
        if begun.elapsed() >= until {
            make(&named, FileType::BlockDevice, dev, 0o660, is_right)?;
            break;
        }
        std::thread::park_timeout(LOOK_EVERY);
    }
    let real = std::fs::canonicalize(&named).map_err(Error::io("realpath", &named))?;
    Ok(Node { named, real })
}

/// Takes away the node that we made; a link is udev's own to remove.
pub(super) fn forget(devices: &Path, name: &str, dev: Dev) -> Result<(), Error> {
    let path = devices.join("mapper").join(name);
    let is_ours =
        std::fs::symlink_metadata(&path).is_ok_and(|seen| seen.file_type().is_block_device() && Dev::from_raw(seen.rdev()) == dev);
    match if is_ours { std::fs::remove_file(&path) } else { Ok(()) } {
        Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => Err(Error::io("unlink", &path)(cause)),
        _ => Ok(()),
    }
}

/// Replaces whatever is at the path: a link to nothing, or a node of a number that has gone to another device.
fn make(path: &Path, kind: FileType, dev: Dev, mode: u32, is_right: impl Fn(&Path) -> bool) -> Result<(), Error> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(Error::io("mkdir", folder))?;
    }
    match std::fs::remove_file(path) {
        Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("unlink", path)(cause)),
        _ => (),
    }
    match mknodat(CWD, path, kind, Mode::from_raw_mode(mode), makedev(dev.major, dev.minor)) {
        // The umask is not ours to change, in a process of many threads.
        Ok(()) => std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(Error::io("chmod", path)),
        // udev has come first.
        Err(Errno::EXIST) if is_right(path) => Ok(()),
        Err(errno) => Err(Error::at("mknod", path)(errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Folder;

    #[test]
    fn the_list_of_misc_devices_is_read() {
        assert!(has_device_mapper("234 btrfs-control\n236 device-mapper\n 59 x\n"));
        for without in ["", "234 btrfs-control\n", "123 device-mapper\n", "236 device-mapper-too\n"] {
            assert!(!has_device_mapper(without), "{without:?}");
        }
    }

    #[test]
    fn a_node_that_is_not_ours_stays() {
        let folder = Folder::new();
        let path = folder.path().join("mapper/x");
        std::fs::create_dir_all(folder.path().join("mapper")).unwrap();
        std::os::unix::fs::symlink("../dm-0", &path).unwrap();
        forget(folder.path(), "x", Dev { major: 253, minor: 0 }).unwrap();
        assert!(std::fs::symlink_metadata(&path).is_ok(), "udev's link");
        forget(folder.path(), "y", Dev { major: 253, minor: 0 }).unwrap();
    }
}
