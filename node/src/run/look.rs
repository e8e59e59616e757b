//! Looks: what is mounted at a path, whose it is, and what could be grown.

use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use disk::ext4::Superblock;
use disk::xfs;
use rustix::io::Errno;

use super::Node;
use super::mapping::{self, Medium};
use crate::error::Cause;
use crate::identity;
use crate::label;
use crate::plan::{self, Growth, Mount, Target};
use crate::probe;
use crate::request::{self, Filesystem, Volume};
use crate::sys::block::{self, Access, XfsGeometry};
use crate::sys::scsi::{self, Disk, State};
use crate::sys::{self, Dev, dm, mountinfo};

/// kubelet's folder of binds for subPath mounts: they belong to a pod that the volume is published to, not to a target.
const SUBPATHS: &str = "volume-subpaths";

/// Whose a device number is.
pub(super) enum Owner {
    /// This volume's disk, or the mapping over it.
    Ours(Medium),
    /// No such device any more. The mapping that is left of it, if it was one.
    Gone(Option<dm::Mapping>),
    /// Somebody else's; a sentence.
    Stranger(String),
}

/// What is at a volume path.
pub(super) enum ShownAt {
    /// Not this volume; what instead.
    Nothing(String),
    /// Its filesystem, from there.
    Filesystem(Medium, mountinfo::Mount),
    /// Its block device.
    Device(Medium),
    /// A mount whose disk is no longer there; what it was made from.
    Gone(String),
}

/// What is mounted at a staging path.
pub(super) struct Staged {
    pub(super) mount: Mount,
    /// Where it is from, if it is ours.
    pub(super) from: Option<(Medium, mountinfo::Mount)>,
    /// The mapping that it is from, if its disk is gone.
    pub(super) left: Option<dm::Mapping>,
    /// The filesystem of another SCSI disk.
    pub(super) other: Option<Dev>,
}

/// A filesystem's size against its disk's, in filesystem blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    pub(super) filesystem: Filesystem,
    pub(super) blocks: u64,
    pub(super) wanted_blocks: u64,
    pub(super) block_size: u32,
    /// A tail below this may stay behind when the kernel has grown it.
    pub(super) blocks_per_group: u32,
    /// Mounted so that growing would zero all new inode tables before it answers: 1.6 % of the disk.
    pub(super) noinit_itable: bool,
}

impl Node {
    pub(super) fn owner(&self, volume: &Volume, dev: Dev, disks: &[Disk]) -> Result<Owner, Cause> {
        let of = |disk: &Disk, mapping: Option<dm::Mapping>| match identity::verify(&volume.serial, disk) {
            Ok(()) => Owner::Ours(Medium { disk: disk.clone(), mapping }),
            Err(refusal) => Owner::Stranger(refusal.to_string()),
        };
        if let Some(disk) = disks.iter().find(|disk| disk.dev == dev) {
            return Ok(of(disk, None));
        }
        // Major 0 is no block device at all; the number of a mounted disk is not given out again (see Node::open).
        if dev.major != 0 && !sys::is_block_device_there(&self.sysfs, dev)? {
            return Ok(Owner::Gone(None));
        }
        let mapping = if dev.major == 0 { None } else { self.mapping_at(dev)? };
        let Some((mapping, below)) = mapping.and_then(|mapping| mapping::backing(&mapping).map(|below| (mapping, below))) else {
            return Ok(Owner::Stranger(format!("device {dev} is no SCSI disk")));
        };
        match disks.iter().find(|disk| disk.dev == below) {
            Some(disk) => Ok(of(disk, Some(mapping))),
            // The number of a disk below a mapping is not given out again either.
            None if !sys::is_block_device_there(&self.sysfs, below)? => Ok(Owner::Gone(Some(mapping))),
            None => Ok(Owner::Stranger(format!("{} is over device {below}, which is no SCSI disk", mapping.name))),
        }
    }

    /// What is mounted at a staging path, and from which disk.
    pub(super) fn look_staging(&self, volume: &Volume, real: Option<&Path>, disks: &[Disk]) -> Result<Staged, Cause> {
        let staged = |mount| Staged { mount, from: None, left: None, other: None };
        let mounts = self.mounts()?;
        let Some(mount) = real.and_then(|real| mountinfo::at(&mounts, real)) else { return Ok(staged(Mount::None)) };
        let described = format!("{} from {} ({})", mount.fstype, mount.source, mount.dev);
        if mount.root != Path::new("/") {
            return Ok(staged(Mount::Stranger(format!("{} of {described}", mount.root.display()))));
        }
        Ok(match self.owner(volume, mount.dev, disks)? {
            Owner::Ours(medium) => Staged { from: Some((medium, mount.clone())), ..staged(Mount::Ours) },
            Owner::Gone(left) => Staged { left, ..staged(Mount::Gone) },
            Owner::Stranger(why) => {
                let other = self.disk_below(mount.dev, disks)?.map(|_| mount.dev);
                Staged { other, ..staged(Mount::Stranger(format!("{described}: {why}"))) }
            }
        })
    }

    /// Whether a filesystem is mounted there alone, and nowhere else that can be seen: no pod is shown it.
    pub(super) fn is_unused_at(&self, dev: Dev, real: &Path) -> Result<bool, Cause> {
        let mounts = self.mounts()?;
        let mut of_it = mounts.iter().filter(|mount| mount.dev == dev);
        let is_alone = of_it.next().is_some_and(|mount| mount.point == real) && of_it.next().is_none();
        let is_inside = |mount: &mountinfo::Mount| mount.point != real && mount.point.starts_with(real);
        Ok(is_alone && !mounts.iter().any(is_inside) && !self.shown_devices(rdev)?.iter().any(|(shown, _)| *shown == dev))
    }

    /// What is mounted from where, for the search of a legacy disk. For a filesystem volume a raw block volume's device node
    /// counts too: that is another volume's, or this one's in another mode.
    pub(super) fn in_use(&self, access: &request::Access) -> Result<Vec<(Dev, PathBuf)>, Cause> {
        let mut used = self.mounted_devices()?;
        if matches!(access, request::Access::Filesystem(_)) {
            used.extend(self.below(self.shown_devices(rdev)?)?);
        }
        Ok(used)
    }

    /// For the label of a mount.
    pub(super) fn look_machine(&self) -> Result<label::Machine, Cause> {
        let (kernel, selinux) = (self.proc.join("sys/kernel/osrelease"), self.sysfs.join("fs/selinux"));
        Ok(label::Machine {
            kernel: std::fs::read_to_string(&kernel).map_err(sys::Error::io("read", &kernel))?,
            has_selinux: selinux.try_exists().map_err(sys::Error::io("stat", &selinux))?,
            own: own_label(&self.proc.join("self/attr/current")),
        })
    }

    /// The device nodes that are shown in kubelet's folders; `rdev` says whose a node is.
    pub(super) fn shown_devices(&self, rdev: impl Fn(&Path) -> Result<Option<Dev>, sys::Error>) -> Result<Vec<(Dev, PathBuf)>, sys::Error> {
        let mut shown = Vec::new();
        for mount in
            self.mounts()?.into_iter().filter(|mount| is_of_devices(mount) && !mount.is_of_removed() && self.is_inside(&mount.point))
        {
            shown.extend(rdev(&mount.point)?.map(|dev| (dev, mount.point)));
        }
        Ok(shown)
    }

    /// What is at a target path. `is_it`: whether a disk that may be this volume's is the very one that is meant; `rdev` says whose a node is.
    pub(super) fn look_target(
        &self,
        volume: &Volume,
        real: Option<&Path>,
        disks: &[Disk],
        rdev: impl Fn(&Path) -> Result<Option<Dev>, sys::Error>,
        is_it: impl Fn(&Medium) -> bool,
    ) -> Result<Target, Cause> {
        let Some(real) = real else { return Ok(Target::Absent) };
        let mounts = self.mounts()?;
        let Some(mount) = mountinfo::at(&mounts, real) else { return Ok(unmounted(real)?) };
        let node = if is_of_devices(mount) { rdev(real)? } else { None };
        // A file on a tmpfs that somebody else has bound and deleted is no device node: it stays untouched.
        let is_removed_node = node.is_some() && mount.is_of_removed();
        Ok(match self.owner(volume, node.unwrap_or(mount.dev), disks)? {
            Owner::Ours(medium) if is_it(&medium) => Target::Shows { read_only: mount.read_only },
            Owner::Ours(_) | Owner::Gone(_) | Owner::Stranger(_) if is_removed_node => Target::Stale,
            Owner::Ours(medium) => Target::Other(format!("{} is shown there, which is not what is to be shown", medium.name())),
            Owner::Gone(_) => Target::ShowsGone,
            Owner::Stranger(why) => Target::Other(format!("{} from {} is mounted there: {why}", mount.fstype, mount.source)),
        })
    }

    /// Other targets of the same volume. A node that was removed since counts: whoever opens it gets what has its number now. Whole, in kubelet's folders, and no subPath bind.
    pub(super) fn look_other_targets(&self, medium: &Medium, not: &[&Path]) -> Result<Vec<PathBuf>, Cause> {
        let mut others = Vec::new();
        for mount in self.mounts()? {
            let inside = self.is_inside(&mount.point) && !mount.point.components().any(|part| part.as_os_str() == SUBPATHS);
            if !inside || not.contains(&mount.point.as_path()) {
                continue;
            }
            let shown = (mount.dev == medium.dev() && mount.root == Path::new("/"))
                || (is_of_devices(&mount) && rdev(&mount.point)? == Some(medium.dev()));
            if shown {
                others.push(mount.point);
            }
        }
        Ok(others)
    }

    /// What of the volume is at a path that kubelet calls its own.
    pub(super) fn look_shown(&self, volume: &Volume, path: &Path) -> Result<ShownAt, Cause> {
        let Some(real) = self.real(path)? else { return Ok(ShownAt::Nothing("there is no such path".into())) };
        let mounts = self.mounts()?;
        let Some(mount) = mountinfo::at(&mounts, &real) else { return Ok(ShownAt::Nothing("nothing is mounted there".into())) };
        let device = if is_of_devices(mount) { rdev(&real)? } else { None };
        Ok(match (self.owner(volume, device.unwrap_or(mount.dev), &scsi::scan(&self.sysfs)?)?, device) {
            (Owner::Ours(medium), None) => ShownAt::Filesystem(medium, mount.clone()),
            (Owner::Ours(medium), Some(_)) => ShownAt::Device(medium),
            (Owner::Gone(_), _) => ShownAt::Gone(mount.source.clone()),
            (Owner::Stranger(_), Some(_)) if mount.is_of_removed() => ShownAt::Gone(mount.source.clone()),
            (Owner::Stranger(why), _) => ShownAt::Nothing(format!("{} from {} is mounted there: {why}", mount.fstype, mount.source)),
        })
    }

    /// How much the mounted filesystem could grow; `None`: it must not (read-only, or nothing that we grow).
    pub(super) fn look_room(&self, medium: &Medium, mount: &mountinfo::Mount) -> Result<Option<Room>, Cause> {
        let writable = !medium.disk.read_only && !mount.filesystem_read_only;
        let Some(filesystem) = grown_as(&mount.fstype).filter(|_| writable) else { return Ok(None) };
        let device = self.open_medium(medium, Access::Shared)?;
        let size_bytes = device.size_bytes()?;
        Ok(Some(match filesystem {
            Filesystem::Ext4 => Room::of_ext(&probe::ext_superblock(&device)?, size_bytes, mount.noinit_itable),
            // Its superblock on the disk lags behind while it is mounted.
            Filesystem::Xfs => Room::of_xfs(block::xfs_geometry(&mount.point, medium.dev())?, size_bytes),
        }))
    }
}

impl Room {
    fn of_xfs(geometry: XfsGeometry, disk_bytes: u64) -> Self {
        let wanted = xfs::superblock::blocks_to_grow_to(geometry.block_size, geometry.blocks, disk_bytes);
        Self {
            filesystem: Filesystem::Xfs,
            blocks: geometry.blocks,
            wanted_blocks: wanted.unwrap_or(geometry.blocks),
            block_size: geometry.block_size,
            blocks_per_group: 0,
            noinit_itable: false,
        }
    }

    fn of_ext(superblock: &Superblock, disk_bytes: u64, noinit_itable: bool) -> Self {
        Self {
            filesystem: Filesystem::Ext4,
            blocks: superblock.blocks,
            wanted_blocks: superblock.blocks_to_grow_to(disk_bytes).unwrap_or(superblock.blocks),
            block_size: superblock.block_size,
            blocks_per_group: superblock.blocks_per_group,
            noinit_itable,
        }
    }

    /// `tried`: the kernel was asked to grow it. It drops a tail that is too small for a block group, and says nothing.
    pub(super) fn growth(&self, tried: bool) -> Growth {
        match self.wanted_blocks.checked_sub(self.blocks) {
            None | Some(0) => Growth::Full,
            Some(left) if tried && left < u64::from(self.blocks_per_group) => Growth::Tried,
            Some(_) => Growth::Room,
        }
    }
}

/// For a disk that shows the volume, but is not the one that the publish context describes.
pub(super) fn not_named(disk: &Disk, want: &identity::Want) -> String {
    if want.serial_promised {
        format!("{} without the serial {} that the publish context promises", disk.name, want.serial)
    } else {
        format!(
            "{}, which is not in the slot that the publish context names: an older attachment's; unstage it first",
            identity::name(disk)
        )
    }
}

/// How a mounted filesystem grows; `None`: not by us. The reference driver mounts ext2 and ext3 by their names, we as ext4.
pub(super) fn grown_as(fstype: &str) -> Option<Filesystem> {
    match fstype {
        "ext2" | "ext3" | "ext4" => Some(Filesystem::Ext4),
        "xfs" => Some(Filesystem::Xfs),
        _ => None,
    }
}

/// What can be done with a disk that was found.
pub(super) fn usable(disk: &Disk) -> plan::Disk {
    match disk.state {
        State::Running => plan::Disk::Ready { read_only: disk.read_only },
        State::Offline => plan::Disk::Offline,
        State::Passing => plan::Disk::NotYet,
    }
}

/// A bind of a device node shows up as its filesystem: devtmpfs, or a container's tmpfs on /dev.
fn is_of_devices(mount: &mountinfo::Mount) -> bool {
    matches!(mount.fstype.as_str(), "devtmpfs" | "tmpfs") && mount.root != Path::new("/")
}

/// The number of the device that a node stands for; `None`: it is no block device, or nothing is there.
pub(super) fn rdev(path: &Path) -> Result<Option<Dev>, sys::Error> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_block_device() => Ok(Some(Dev::from_raw(metadata.rdev()))),
        Ok(_) => Ok(None),
        Err(cause) if cause.kind() == ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(sys::Error::io("lstat", path)(cause)),
    }
}

/// A target with nothing mounted on it.
fn unmounted(path: &Path) -> Result<Target, sys::Error> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => Ok(Target::Folder),
        Ok(metadata) if metadata.is_file() && metadata.len() == 0 => Ok(Target::File),
        Ok(metadata) if metadata.is_file() => Ok(Target::Other(format!("a file of {} bytes", metadata.len()))),
        Ok(metadata) if metadata.is_symlink() => Ok(Target::Other("a symbolic link".into())),
        Ok(_) => Ok(Target::Other("neither a folder nor a plain file".into())),
        Err(cause) if cause.kind() == ErrorKind::NotFound => Ok(Target::Absent),
        Err(cause) => Err(sys::Error::io("lstat", path)(cause)),
    }
}

/// Empty where there is no security module (EINVAL). One that cannot be read is said to be unknown: no label is added then.
fn own_label(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|cause| {
        if !matches!(Errno::from_io_error(&cause), Some(Errno::INVAL | Errno::NOENT)) {
            proto::warn!("the agent's own SELinux label is unknown: read on {}: {cause}", path.display());
        }
        String::new()
    })
}

/// Whether a folder is there and empty.
pub(super) fn is_empty_folder(path: &Path) -> Result<bool, sys::Error> {
    match std::fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(cause) if matches!(Errno::from_io_error(&cause), Some(Errno::NOENT | Errno::NOTDIR)) => Ok(false),
        Err(cause) => Err(sys::Error::io("read folder", path)(cause)),
    }
}
