//! A block device: opened, checked to be the one meant, read, written, zeroed, flushed; and the filesystem grown on it.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Advice, FallocateFlags, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Getter, Setter, Updater, ioctl, opcode};

use super::mount::Leads;
use super::{Dev, Error};
use crate::kill;
use crate::pulse;

/// A plain write of zeros, where the device takes no other request for them.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// What a flush may take longer than a read or a write: with it comes all that a format has written and the kernel has kept so far, which a disk
/// that does a few MB/s (a throttled one, a storage that rebuilds itself) takes its time for.
const FLUSH_GRANT: Duration = Duration::from_secs(90);

/// How a device is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// To read; anybody else may use it too. While it is open, the kernel gives its number to no other disk.
    Shared,
    /// To write, alone: EBUSY while it is mounted, or held by device-mapper, in any mount namespace.
    Exclusive,
    /// To learn whether [`Access::Exclusive`] would work, without the right to write.
    ExclusiveRead,
}

/// An open block device.
#[derive(Debug)]
pub struct Device {
    file: File,
    path: PathBuf,
}

impl Device {
    /// Opens the node at `path`, which must be the block device `dev`: a name may have gone to another disk meanwhile.
    ///
    /// # Errors
    /// It is not there (ENODEV when it is another device now), or busy.
    pub fn open(path: &Path, dev: Dev, access: Access) -> Result<Self, Error> {
        let (write, flags) = match access {
            Access::Shared => (false, OFlags::empty()),
            Access::Exclusive => (true, OFlags::EXCL),
            Access::ExclusiveRead => (false, OFlags::EXCL),
        };
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags((flags | OFlags::NOFOLLOW).bits().cast_signed())
            .open(path)
            .map_err(Error::io("open", path))?;
        let metadata = file.metadata().map_err(Error::io("fstat", path))?;
        if !metadata.file_type().is_block_device() || Dev::from_raw(metadata.rdev()) != dev {
            return Err(Error { call: "open", subject: path.into(), errno: Errno::NODEV });
        }
        Ok(Self { file, path: path.into() })
    }

    /// A plain file as a device, for tests on the host.
    #[cfg(test)]
    pub(crate) fn of_file(path: &Path) -> Self {
        let file = std::fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap();
        Self { file, path: path.into() }
    }

    /// The node it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size, from the kernel, now.
    ///
    /// # Errors
    /// The device is gone.
    pub fn size_bytes(&self) -> Result<u64, Error> {
        (&self.file).seek(SeekFrom::End(0)).map_err(Error::io("lseek", &self.path))
    }

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// Any byte of it could not be read; the error says which were asked for.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        answered(self.file.read_exact_at(buffer, offset)).map_err(|cause| Error::io("pread", &self.place(offset, buffer.len()))(cause))
    }

    /// Has the kernel begin to read a range: several ranges are read at the same time, where reading them in turn would wait for
    /// each. Nothing depends on it.
    pub fn read_ahead(&self, offset: u64, length: u64) {
        let _ = rustix::fs::fadvise(&self.file, offset, NonZeroU64::new(length), Advice::WillNeed);
    }

    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// As the kernel says; some of it may have been written.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        answered(self.file.write_all_at(bytes, offset)).map_err(|cause| Error::io("pwrite", &self.place(offset, bytes.len()))(cause))
    }

    /// What an error is about: `/dev/sdb (4096 bytes at byte 0)`.
    fn place(&self, offset: u64, length: usize) -> PathBuf {
        format!("{} ({length} bytes at byte {offset})", self.path.display()).into()
    }

    /// Makes a range read as zeros. FALLOC_FL_ZERO_RANGE on a block device is BLKZEROOUT (block/fops.c, both are
    /// `blkdev_issue_zeroout` with BLKDEV_ZERO_NOUNMAP) and needs no ioctl; the kernel itself writes zeros where the disk
    /// knows no such command. What it refuses (a range that is no multiple of the sector size) is written plainly.
    /// FALLOC_FL_PUNCH_HOLE would spare thin storage the zeros, but not under QEMU: its disks do not promise that what is
    /// unmapped reads as zeros (LBPRZ), so the kernel asks for written zeros all the same (measured, QEMU 7.2).
    ///
    /// # Errors
    /// As the kernel says.
    pub fn zero(&self, offset: u64, length: u64) -> Result<(), Error> {
        match answered(rustix::fs::fallocate(&self.file, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, offset, length)) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::INVAL) => self.write_zeros(offset, length),
            Err(errno) => Err(Error::at("fallocate(FALLOC_FL_ZERO_RANGE)", &self.path)(errno)),
        }
    }

    fn write_zeros(&self, offset: u64, length: u64) -> Result<(), Error> {
        let end = offset.saturating_add(length);
        let mut at = offset;
        while at < end {
            let now = usize::try_from(end - at).unwrap_or(usize::MAX).min(ZEROS.len());
            self.write_at(at, ZEROS.get(..now).unwrap_or(&ZEROS))?;
            at += now as u64;
        }
        Ok(())
    }

    /// Everything written is on the disk, its own cache included, when this returns.
    ///
    /// # Errors
    /// A write since the last flush failed.
    pub fn flush(&self) -> Result<(), Error> {
        pulse::granted(kill::limit("FLUSH", FLUSH_GRANT));
        answered(self.file.sync_all()).map_err(Error::io("fsync", &self.path))
    }
}

/// The disk has, whatever: who waits for its place may know.
fn answered<T>(answer: T) -> T {
    pulse::beat();
    answer
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The kernel's count of errors in the mounted ext4 on the device `name` (`sda`, `dm-0`); it is kept in the superblock until a repair. 0 too: it is
/// no mounted ext4.
///
/// # Errors
/// It cannot be read.
pub fn ext4_errors(sysfs: &Path, name: &str) -> Result<u64, Error> {
    let path = sysfs.join("fs/ext4").join(name).join("errors_count");
    match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(|_| Error { call: "parse", subject: path, errno: Errno::INVAL }),
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(cause) => Err(Error::io("read", &path)(cause)),
    }
}

/// Grows the ext4 of the device `dev` that is mounted at `point` to `blocks` filesystem blocks.
///
/// Kernel: fs/ext4/ioctl.c, EXT4_IOC_RESIZE_FS, since 3.3. EBUSY: another resize is running. EPERM: CAP_SYS_RESOURCE is
/// missing, or the filesystem has its error flag set. EROFS: mounted read-only. ENOSPC: larger than the device.
///
/// # Errors
/// As above; ESTALE: something else is at `point` now, such as the machine's own filesystem.
pub fn ext4_grow(point: &Path, dev: Dev, blocks: u64) -> Result<(), Error> {
    let folder = File::open(point).map_err(Error::io("open", point))?;
    Leads::Into(dev).check(&folder, point)?;
    kill::called("ioctl");
    rustix::fs::ext4_ioc_resize_fs(&folder, blocks).map_err(Error::at("ioctl(EXT4_IOC_RESIZE_FS)", point))
}

/// `struct xfs_fsop_geom_v1` (fs/xfs/libxfs/xfs_fs.h), 112 bytes.
#[repr(C)]
struct XfsGeometryV1 {
    blocksize: u32,
    rtextsize: u32,
    agblocks: u32,
    agcount: u32,
    logblocks: u32,
    sectsize: u32,
    inodesize: u32,
    imaxpct: u32,
    datablocks: u64,
    rtblocks: u64,
    rtextents: u64,
    logstart: u64,
    uuid: [u8; 16],
    sunit: u32,
    swidth: u32,
    version: i32,
    flags: u32,
    logsectsize: u32,
    rtsectsize: u32,
    dirblocksize: u32,
}

/// `struct xfs_growfs_data` (the same file), 16 bytes: 4 of padding at its end.
#[repr(C)]
struct XfsGrowData {
    newblocks: u64,
    imaxpct: u32,
}

/// `XFS_IOC_FSGEOMETRY_V1`, `_IOR('X', 100, struct xfs_fsop_geom_v1)`: 0x80705864 on x86 and ARM.
const XFS_IOC_FSGEOMETRY_V1: rustix::ioctl::Opcode = opcode::read::<XfsGeometryV1>(b'X', 100);
/// `XFS_IOC_FSGROWFSDATA`, `_IOW('X', 110, struct xfs_growfs_data)`: 0x4010586e there.
const XFS_IOC_FSGROWFSDATA: rustix::ioctl::Opcode = opcode::write::<XfsGrowData>(b'X', 110);

/// A mounted xfs, in its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XfsGeometry {
    /// Bytes of a block.
    pub block_size: u32,
    /// Blocks of the data section.
    pub blocks: u64,
    /// Of an allocation group.
    pub group_blocks: u32,
    /// At most so many percent of them are inodes.
    inode_percent: u32,
}

/// The size of the xfs of the device `dev` that is mounted at `point`.
///
/// # Errors
/// ENOTTY: it is no xfs. ESTALE: something else is at `point` now.
pub fn xfs_geometry(point: &Path, dev: Dev) -> Result<XfsGeometry, Error> {
    let folder = File::open(point).map_err(Error::io("open", point))?;
    Leads::Into(dev).check(&folder, point)?;
    xfs_geometry_of(&folder, point)
}

/// The same of the filesystem that is open as `folder`, by any path.
///
/// # Errors
/// ENOTTY: it is no xfs.
#[allow(unsafe_code, reason = "an ioctl that rustix lacks")]
pub fn xfs_geometry_of(folder: impl AsFd, point: &Path) -> Result<XfsGeometry, Error> {
    // SAFETY: this opcode is `_IOR` of exactly this `repr(C)` struct: the kernel writes its 112 bytes, all of them plain
    // numbers that take any value, reads none and keeps nothing.
    let getter = unsafe { Getter::<XFS_IOC_FSGEOMETRY_V1, XfsGeometryV1>::new() };
    // SAFETY: `getter` says rightly what the kernel does with its argument (above); another filesystem than xfs answers
    // ENOTTY and writes nothing, and the descriptor is open since `folder` lives.
    let seen = unsafe { ioctl(folder, getter) }.map_err(Error::at("ioctl(XFS_IOC_FSGEOMETRY_V1)", point))?;
    Ok(XfsGeometry { block_size: seen.blocksize, blocks: seen.datablocks, group_blocks: seen.agblocks, inode_percent: seen.imaxpct })
}

/// Grows the xfs of the device `dev` that is mounted at `point` to `blocks` filesystem blocks. Never shrinks it: Linux from 5.12 on takes fewer
/// blocks for that wish, and throws the end away. As many or fewer blocks than there are: nothing is done.
///
/// Kernel: fs/xfs/xfs_fsops.c, xfs_growfs_data. EIO: larger than the device. EWOULDBLOCK: another grow is running. EPERM:
/// CAP_SYS_ADMIN is missing. EROFS: mounted read-only.
///
/// # Errors
/// As above; ESTALE: something else is at `point` now, such as the machine's own filesystem.
#[allow(unsafe_code, reason = "an ioctl that rustix lacks")]
pub fn xfs_grow(point: &Path, dev: Dev, blocks: u64) -> Result<(), Error> {
    let folder = File::open(point).map_err(Error::io("open", point))?;
    Leads::Into(dev).check(&folder, point)?;
    let geometry = xfs_geometry_of(&folder, point)?;
    if blocks <= geometry.blocks {
        return Ok(());
    }
    kill::called("ioctl");
    let data = XfsGrowData { newblocks: blocks, imaxpct: geometry.inode_percent };
    // SAFETY: this opcode is `_IOW` of exactly this `repr(C)` struct: the kernel reads its 16 bytes (of the padding it makes
    // nothing), writes none and keeps nothing.
    let setter = unsafe { Setter::<XFS_IOC_FSGROWFSDATA, XfsGrowData>::new(data) };
    // SAFETY: `setter` says rightly what the kernel does with its argument (above); it lives until the call returns, and the
    // descriptor is open since `folder` is.
    unsafe { ioctl(&folder, setter) }.map_err(Error::at("ioctl(XFS_IOC_FSGROWFSDATA)", point))
}

/// `struct fstrim_range` (include/uapi/linux/fs.h).
#[repr(C)]
struct TrimRange {
    start: u64,
    len: u64,
    minlen: u64,
}

/// `FITRIM`, `_IOWR('X', 121, struct fstrim_range)`: 0xc0185879 on x86 and ARM.
const FITRIM: rustix::ioctl::Opcode = opcode::read_write::<TrimRange>(b'X', 121);

/// Discards what the filesystem whose root is `folder` (mounted at `point`) does not use between these bytes of it; answers how many
/// bytes that were, as the filesystem counts them.
///
/// Kernel: fs/ext4/ioctl.c, ext4_trim_fs; fs/xfs/xfs_discard.c. EOPNOTSUPP: the device takes no discards. EINVAL: `start` lies behind the end.
///
/// # Errors
/// As above; EROFS, EIO.
#[allow(unsafe_code, reason = "an ioctl that rustix lacks")]
pub fn trim(folder: impl AsFd, point: &Path, start: u64, length: u64) -> Result<u64, Error> {
    let mut range = TrimRange { start, len: length, minlen: 0 };
    // SAFETY: this opcode is `_IOWR` of exactly this `repr(C)` struct: the kernel reads its 24 bytes and writes them, plain numbers that take
    // any value, and keeps nothing.
    let updater = unsafe { Updater::<FITRIM, TrimRange>::new(&mut range) };
    // SAFETY: `updater` says rightly what the kernel does with its argument (above), which lives until the call returns, and the descriptor is
    // open since `folder` is.
    unsafe { ioctl(folder, updater) }.map_err(Error::at("ioctl(FITRIM)", point))?;
    Ok(range.len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Folder;

    #[test]
    fn a_file_is_no_device() {
        let folder = Folder::new();
        let path = folder.path().join("sda");
        std::fs::write(&path, "x").unwrap();
        let refused = Device::open(&path, Dev { major: 8, minor: 0 }, Access::Shared).unwrap_err();
        assert_eq!((refused.call, refused.errno), ("open", Errno::NODEV));
    }

    /// The numbers of xfs_fs.h as the kernel's compiler makes them on x86 and ARM.
    #[test]
    fn xfs_opcodes_are_the_kernels() {
        assert_eq!((size_of::<XfsGeometryV1>(), size_of::<XfsGrowData>()), (112, 16));
        assert_eq!(std::mem::offset_of!(XfsGeometryV1, datablocks), 32);
        assert_eq!((XFS_IOC_FSGEOMETRY_V1, XFS_IOC_FSGROWFSDATA), (0x8070_5864, 0x4010_586e));
        assert_eq!((FITRIM, size_of::<TrimRange>()), (0xc018_5879, 24));
    }

    #[test]
    fn what_is_no_xfs_has_no_geometry() {
        // proc is no xfs on any machine.
        let (path, proc) = (Path::new("/proc"), File::open("/proc").unwrap());
        let dev = Dev::from_raw(proc.metadata().unwrap().dev());
        for refused in [xfs_geometry(path, dev).map(|_| ()), xfs_grow(path, dev, u64::MAX)] {
            let refused = refused.unwrap_err();
            assert_eq!((refused.call, refused.errno), ("ioctl(XFS_IOC_FSGEOMETRY_V1)", Errno::NOTTY));
        }
    }

    #[test]
    fn the_filesystem_below_a_mount_that_went_is_not_grown() {
        let folder = Folder::new();
        let other = Dev { major: 8, minor: 4095 };
        for grown in [ext4_grow(folder.path(), other, 1), xfs_grow(folder.path(), other, 1), xfs_geometry(folder.path(), other).map(drop)] {
            assert_eq!(grown.unwrap_err().errno, Errno::STALE, "before the ioctl");
        }
    }

    #[test]
    fn zeros_reach_exactly_their_range_in_either_way() {
        let folder = Folder::new();
        let path = folder.path().join("image");
        std::fs::write(&path, vec![0xaa; 300 << 10]).unwrap();
        let device = Device::of_file(&path);
        device.zero(512, 1024).unwrap();
        device.write_zeros(4096, (64 << 10) + 5).unwrap();
        device.flush().unwrap();
        let is_zero = |at: usize| (512..1536).contains(&at) || (4096..4096 + (64 << 10) + 5).contains(&at);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 300 << 10);
        assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == if is_zero(at) { 0 } else { 0xaa }));
        assert_eq!(device.size_bytes().unwrap(), 300 << 10);
        assert_eq!(device.read_at((300 << 10) - 1, &mut [0; 2]).unwrap_err().errno, Errno::IO);
    }
}
