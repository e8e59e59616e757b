//! One call of the harness: a request in, a deed, a reply out.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::time::Duration;

use anyhow::{Context, Result};
use guest_init::{Answer, Filesystem, Kind, PseudoRandom, Request, SUCCESS, Stat};
use rustix::fs::StatVfsMountFlags;
use rustix::mount::{MountFlags, UnmountFlags};
use sha2::{Digest, Sha256};

use crate::jobs::{Jobs, Program};

/// One pass of reading, writing or hashing: big enough for a disk, small beside the guest's memory.
const PIECE_BYTES: usize = 1 << 20;

/// The kernel's own limit (XATTR_SIZE_MAX).
const ATTRIBUTE_LIMIT_BYTES: usize = 64 << 10;

/// From our last reply to the harness closing the connection.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);

pub(crate) fn serve(stream: &TcpStream, jobs: &Jobs) {
    // A connection that closes without a request is the harness finding out whether we listen.
    let Ok((request, body)) = guest_init::receive::<Request>(&mut BufReader::new(stream)) else { return };
    let turn_off = matches!(request, Request::PowerOff);
    let (reply, body) = match perform(request, &body, jobs) {
        Ok((answer, body)) => (Ok(answer), body),
        Err(error) => (Err(format!("{error:#}")), Vec::new()),
    };
    let _ = guest_init::send(stream, reply, &body);
    if turn_off {
        // Until the harness has closed: turned off at once, the reply would be lost on its way.
        let _ = stream.set_read_timeout(Some(CLOSE_LIMIT));
        let _ = stream.shutdown(Shutdown::Write);
        let _ = std::io::copy(&mut { stream }, &mut std::io::sink());
        println!("{SUCCESS}");
        crate::turn_off();
    }
}

fn perform(request: Request, body: &[u8], jobs: &Jobs) -> Result<(Answer, Vec<u8>)> {
    let answer = match request {
        Request::Ping | Request::PowerOff => Answer::Done,
        Request::Spawn { label, root, program, args, env } => jobs.spawn(Program { label, root, program, args, env })?,
        Request::Wait { job, limit_ms } => return jobs.wait(job, Duration::from_millis(limit_ms)),
        Request::Signal { job, signal } => jobs.signal(job, signal)?,
        Request::Read { path, offset, size_bytes } => {
            return read(&path, offset, size_bytes).with_context(|| format!("read {path}")).map(|bytes| (Answer::Bytes, bytes));
        }
        Request::Write { path, offset, truncate, mode } => {
            write(&path, offset, truncate, mode, body).with_context(|| format!("write {path}"))?;
            Answer::Done
        }
        Request::Stat { path } => Answer::Stat(stat(&path).with_context(|| format!("stat {path}"))?),
        Request::Attribute { path, name } => {
            let bytes = attribute(&path, &name).with_context(|| format!("read the attribute {name} of {path}"))?;
            return Ok((Answer::Bytes, bytes));
        }
        Request::StatFilesystem { path } => Answer::Filesystem(statvfs(&path).with_context(|| format!("statvfs {path}"))?),
        Request::List { path } => Answer::Names(list(&path).with_context(|| format!("list {path}"))?),
        Request::Sha256 { path } => Answer::Digest(digest(&path).with_context(|| format!("hash {path}"))?),
        Request::Fill { path, seed, size_bytes } => {
            Answer::Digest(fill(&path, seed, size_bytes).with_context(|| format!("fill {path} with {size_bytes} bytes"))?)
        }
        Request::MakeFolder { path } => {
            std::fs::create_dir_all(&path).with_context(|| format!("mkdir {path}"))?;
            Answer::Done
        }
        Request::Remove { path } => {
            let folder = std::fs::symlink_metadata(&path).with_context(|| format!("stat {path}"))?.is_dir();
            if folder { std::fs::remove_dir(&path) } else { std::fs::remove_file(&path) }.with_context(|| format!("remove {path}"))?;
            Answer::Done
        }
        Request::Mount { source, target, filesystem, read_only } => {
            let flags = if read_only { MountFlags::RDONLY } else { MountFlags::empty() };
            rustix::mount::mount(&source, &target, &filesystem, flags, None)
                .with_context(|| format!("mount {source} as {filesystem} on {target}"))?;
            Answer::Done
        }
        Request::Bind { source, target } => {
            rustix::mount::mount_bind(&source, &target).with_context(|| format!("bind {source} to {target}"))?;
            Answer::Done
        }
        Request::Unmount { target } => {
            rustix::mount::unmount(&target, UnmountFlags::empty()).with_context(|| format!("unmount {target}"))?;
            Answer::Done
        }
        Request::DropCaches => {
            rustix::fs::sync();
            std::fs::write("/proc/sys/vm/drop_caches", "3").context("drop the caches")?;
            Answer::Done
        }
    };
    Ok((answer, Vec::new()))
}

fn read(path: &str, offset: u64, size_bytes: u64) -> Result<Vec<u8>> {
    let mut file = File::open(path)?;
    if offset > 0 {
        file.seek(SeekFrom::Start(offset))?;
    }
    let mut bytes = Vec::new();
    file.take(size_bytes).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn write(path: &str, offset: u64, truncate: bool, mode: u32, body: &[u8]) -> Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(truncate).mode(mode).open(path)?;
    if offset > 0 {
        file.seek(SeekFrom::Start(offset))?;
    }
    file.write_all(body)?;
    match file.sync_all() {
        // sysfs and proc have nothing to sync.
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => Ok(()),
        other => Ok(other?),
    }
}

fn stat(path: &str) -> Result<Stat> {
    let data = std::fs::symlink_metadata(path)?;
    let kind = match data.file_type() {
        kind if kind.is_file() => Kind::File,
        kind if kind.is_dir() => Kind::Folder,
        kind if kind.is_symlink() => Kind::SymbolicLink,
        kind if kind.is_block_device() => Kind::BlockDevice,
        kind if kind.is_socket() => Kind::Socket,
        _ => Kind::Other,
    };
    Ok(Stat { kind, mode: data.mode() & 0o7777, size_bytes: data.size(), device: data.dev(), inode: data.ino() })
}

fn attribute(path: &str, name: &str) -> Result<Vec<u8>> {
    let mut bytes = vec![0; ATTRIBUTE_LIMIT_BYTES];
    let length = rustix::fs::lgetxattr(path, name, &mut bytes[..])?;
    bytes.truncate(length);
    Ok(bytes)
}

fn statvfs(path: &str) -> Result<Filesystem> {
    let seen = rustix::fs::statvfs(path)?;
    Ok(Filesystem {
        block_bytes: seen.f_frsize,
        blocks: seen.f_blocks,
        blocks_free: seen.f_bfree,
        blocks_available: seen.f_bavail,
        inodes: seen.f_files,
        inodes_free: seen.f_ffree,
        read_only: seen.f_flag.contains(StatVfsMountFlags::RDONLY),
    })
}

fn list(path: &str) -> Result<Vec<String>> {
    let mut names =
        std::fs::read_dir(path)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

fn hex(digest: impl AsRef<[u8]>) -> String {
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn digest(path: &str) -> Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let read = file.read(&mut piece)?;
        let Some(bytes @ [_, ..]) = piece.get(..read) else { return Ok(hex(hash.finalize())) };
        hash.update(bytes);
    }
}

fn fill(path: &str, seed: u64, size_bytes: u64) -> Result<String> {
    let mut file = File::create(path)?;
    let (mut hash, mut random) = (Sha256::new(), PseudoRandom(seed));
    let mut piece = vec![0; PIECE_BYTES];
    let mut left = size_bytes;
    while left > 0 {
        piece.truncate(usize::try_from(left).unwrap_or(PIECE_BYTES));
        random.fill(&mut piece);
        hash.update(&piece);
        file.write_all(&piece)?;
        left -= piece.len() as u64;
    }
    file.sync_all()?;
    Ok(hex(hash.finalize()))
}
