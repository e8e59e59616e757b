//! Makes a filesystem as the node agent would, so that anyone can compare it with upstream's:
//!
//! ```text
//! truncate -s 1G ours theirs
//! U=01234567-89ab-cdef-0123-456789abcdef S=fedcba98-7654-3210-fedc-ba9876543210 T=1700000000
//! cargo run -p proxmox-csi-disk --example mkfs -- ext4 --uuid $U --hash-seed $S --time $T ours
//! E2FSPROGS_FAKE_TIME=$T mke2fs -t ext4 -F -m0 -U $U -E hash_seed=$S theirs
//! cmp ours theirs
//! ```
//!
//! For xfs the same, beside `mkfs.xfs -f` of xfsprogs 6.1.0. That takes its time from the clock alone, so it runs with one that
//! stands still (a shared object, or `faketime`); only the times in the first inodes come from it:
//!
//! ```text
//! cargo run -p proxmox-csi-disk --example mkfs -- xfs --uuid $U --time $T ours
//! faketime -f @1700000000 mkfs.xfs -f -m uuid=$U theirs
//! ```
#![allow(clippy::print_stderr, reason = "a program for the command line")]

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use argh::FromArgs;
use disk::Write;
use disk::{ext4, xfs};
use rustix::fs::{FallocateFlags, OFlags};

/// Makes a filesystem the way the node agent does: in this process, byte for byte as upstream's tool would.
#[derive(FromArgs)]
struct Arguments {
    #[argh(subcommand)]
    filesystem: Filesystem,
}

#[derive(FromArgs)]
#[argh(subcommand)]
enum Filesystem {
    Ext4(Ext4),
    Xfs(Xfs),
}

/// Makes an ext4 like `mke2fs -t ext4 -F -m0` of e2fsprogs 1.47.0 on Debian 12. EVERYTHING ON THE TARGET IS LOST.
#[derive(FromArgs)]
#[argh(subcommand, name = "ext4")]
struct Ext4 {
    /// UUID of the filesystem, as `mke2fs -U`
    #[argh(option, from_str_fn(parse_uuid))]
    uuid: [u8; 16],
    /// seed of the directory hashes, a UUID too, as `mke2fs -E hash_seed=`
    #[argh(option, from_str_fn(parse_uuid))]
    hash_seed: [u8; 16],
    /// when it is made, in seconds since 1970, as E2FSPROGS_FAKE_TIME
    #[argh(option)]
    time: u32,
    /// block size in bytes: 1024, 2048 or 4096 (default: by the size of the target)
    #[argh(option, short = 'b')]
    block_size: Option<u32>,
    /// inode size in bytes: 256 (default) up to the block size
    #[argh(option, short = 'I')]
    inode_size: Option<u32>,
    /// the target reads as zeros: nothing is discarded, and no zeros are written, as
    /// `mke2fs -E assume_storage_prezeroed=1,nodiscard`
    #[argh(switch)]
    prezeroed: bool,
    /// an existing image file, which is made zeros first (INODE_ZEROED says so), or block device, which is not
    #[argh(positional)]
    target: PathBuf,
}

/// Makes an xfs like `mkfs.xfs -f` of xfsprogs 6.1.0 on Debian 12. EVERYTHING ON THE TARGET IS LOST.
#[derive(FromArgs)]
#[argh(subcommand, name = "xfs")]
struct Xfs {
    /// UUID of the filesystem, as `mkfs.xfs -m uuid=`
    #[argh(option, from_str_fn(parse_uuid))]
    uuid: [u8; 16],
    /// when it is made, in seconds since 1970
    #[argh(option)]
    time: u32,
    /// block size in bytes: 1024, 2048 or 4096 (default), as `mkfs.xfs -b size=`
    #[argh(option, short = 'b')]
    block_size: Option<u32>,
    /// inode size in bytes: 512 (default), 1024 or 2048, at most half a block, as `mkfs.xfs -i size=`
    #[argh(option, short = 'i')]
    inode_size: Option<u32>,
    /// the target reads as zeros: nothing is discarded, and no zeros are written
    #[argh(switch)]
    prezeroed: bool,
    /// an existing image file or block device
    #[argh(positional)]
    target: PathBuf,
}

fn parse_uuid(text: &str) -> Result<[u8; 16], String> {
    let digits: String = text.chars().filter(|digit| *digit != '-').collect();
    let number = u128::from_str_radix(&digits, 16).ok().filter(|_| digits.len() == 32 && digits.is_ascii());
    number.map(u128::to_be_bytes).ok_or_else(|| format!("{text:?} is no UUID (32 hex digits, with or without dashes)"))
}

fn main() -> ExitCode {
    let arguments: Arguments = argh::from_env();
    let (target, made) = match &arguments.filesystem {
        Filesystem::Ext4(ext4) => (&ext4.target, make_ext4(ext4)),
        Filesystem::Xfs(xfs) => (&xfs.target, make_xfs(xfs)),
    };
    match made {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mkfs: {}: {error}", target.display());
            ExitCode::FAILURE
        }
    }
}

/// The target, its size in bytes, and whether it is a block device: then nobody else has it.
fn open(target: &Path) -> io::Result<(File, u64, bool)> {
    let is_block_device = std::fs::metadata(target)?.file_type().is_block_device();
    let exclusive = if is_block_device { OFlags::EXCL.bits().cast_signed() } else { 0 };
    let mut file = OpenOptions::new().read(true).write(true).custom_flags(exclusive).open(target)?;
    let size_bytes = file.seek(SeekFrom::End(0))?;
    Ok((file, size_bytes, is_block_device))
}

fn make_xfs(xfs: &Xfs) -> Result<(), Box<dyn std::error::Error>> {
    let (file, size_bytes, is_block_device) = open(&xfs.target)?;
    let mut options = xfs::Options::new(size_bytes, xfs.uuid, xfs.time);
    options.block_size = xfs.block_size;
    options.inode_size = xfs.inode_size;
    if is_block_device {
        options.logical_sector_bytes = queue_limit(&xfs.target, "logical_block_size")?;
        options.physical_sector_bytes = queue_limit(&xfs.target, "physical_block_size")?;
        options.is_aligned = limit(&xfs.target, "alignment_offset")? == 0;
        options.min_io_bytes = queue_limit(&xfs.target, "minimum_io_size")?;
        options.opt_io_bytes = queue_limit(&xfs.target, "optimal_io_size")?;
    }
    options.reads_zeros = xfs.prezeroed;
    for write in xfs::plan(&options)? {
        perform(&file, is_block_device, &write)?;
    }
    Ok(())
}

fn make_ext4(ext4: &Ext4) -> Result<(), Box<dyn std::error::Error>> {
    let (file, size_bytes, is_block_device) = open(&ext4.target)?;
    let mut options = ext4::Options::new(size_bytes, ext4.uuid, ext4.hash_seed, ext4.time);
    options.block_size = ext4.block_size;
    options.inode_size = ext4.inode_size;
    if is_block_device {
        options.logical_sector_bytes = queue_limit(&ext4.target, "logical_block_size")?;
        options.physical_sector_bytes = queue_limit(&ext4.target, "physical_block_size")?;
        options.min_io_bytes = queue_limit(&ext4.target, "minimum_io_size")?;
        options.opt_io_bytes = queue_limit(&ext4.target, "optimal_io_size")?;
    }
    let filesystem_bytes = ext4::plan(&options)?.filesystem_bytes();
    // mke2fs discards first. Of a plain file it then knows that it reads as zeros; of a block device it does not.
    let is_punched = !is_block_device && !ext4.prezeroed && rustix::fs::fallocate(&file, punch(), 0, filesystem_bytes).is_ok();
    options.reads_zeros = ext4.prezeroed || is_punched;
    for write in ext4::plan(&options)? {
        perform(&file, is_block_device, &write)?;
    }
    Ok(())
}

fn punch() -> FallocateFlags {
    FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
}

/// Zeros as the node agent asks a device for them; in a file, as holes.
fn perform(file: &File, is_block_device: bool, write: &Write) -> io::Result<()> {
    let zeros = if is_block_device { FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE } else { punch() };
    match write {
        Write::Data { offset, bytes } => file.write_all_at(bytes, *offset),
        Write::Flush => file.sync_all(),
        Write::Zeros { offset, length } => rustix::fs::fallocate(file, zeros, *offset, *length)
            .or_else(|_| file.write_all_at(&vec![0; usize::try_from(*length).map_err(io::Error::other)?], *offset)),
    }
}

/// One of the numbers that the kernel tells about a block device; those of the whole disk for a partition.
fn queue_limit(device: &Path, name: &str) -> Result<u32, Box<dyn std::error::Error>> {
    limit(device, &format!("queue/{name}"))
}

fn limit(device: &Path, name: &str) -> Result<u32, Box<dyn std::error::Error>> {
    let number = std::fs::metadata(device)?.rdev();
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let folder = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    let of_disk = folder.join(name);
    let path = if of_disk.exists() { of_disk } else { folder.join("..").join(name) };
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(text.trim().parse()?)
}
