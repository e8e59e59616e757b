//! A block device: opened, checked to be the one meant, read, written, zeroed, flushed; and the filesystem grown on it.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;

use super::{Dev, Error};

/// A plain write of zeros, where the device takes no other request for them.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

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
    /// Any byte of it could not be read.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        self.file.read_exact_at(buffer, offset).map_err(Error::io("pread", &self.path))
    }

    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// As the kernel says; some of it may have been written.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.file.write_all_at(bytes, offset).map_err(Error::io("pwrite", &self.path))
    }

    /// Makes a range read as zeros. FALLOC_FL_ZERO_RANGE on a block device is BLKZEROOUT (block/fops.c, both are
    /// `blkdev_issue_zeroout` with BLKDEV_ZERO_NOUNMAP) and needs no ioctl; the kernel itself writes zeros where the disk
    /// knows no such command. What it refuses (a range that is no multiple of the sector size) is written plainly.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn zero(&self, offset: u64, length: u64) -> Result<(), Error> {
        match rustix::fs::fallocate(&self.file, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, offset, length) {
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
        self.file.sync_all().map_err(Error::io("fsync", &self.path))
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Grows the ext4 that is mounted at `point` to `blocks` filesystem blocks.
///
/// Kernel: fs/ext4/ioctl.c, EXT4_IOC_RESIZE_FS, since 3.3. EBUSY: another resize is running. EPERM: CAP_SYS_RESOURCE is
/// missing, or the filesystem has its error flag set. EROFS: mounted read-only. ENOSPC: larger than the device.
///
/// # Errors
/// As above.
pub fn ext4_grow(point: &Path, blocks: u64) -> Result<(), Error> {
    let folder = File::open(point).map_err(Error::io("open", point))?;
    rustix::fs::ext4_ioc_resize_fs(&folder, blocks).map_err(Error::at("ioctl(EXT4_IOC_RESIZE_FS)", point))
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
