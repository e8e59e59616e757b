//! Sees every read that libblkid does on the device it probes.
//!
//! libblkid forgives: a sector that cannot be read, or a device that ends early, is to several of its probers the same as
//! "no signature here". We may not mistake a failed look for an empty disk, so build.rs compiles libblkid's `probe.c`, the
//! only place where it reads devices, with `read`, `lseek` and `calloc` renamed to the three functions below. They call the
//! real ones and write down what came back. libblkid's own code stays as it was released.

use std::cell::Cell;

use libc::{c_int, c_void, off_t, size_t, ssize_t};

/// What libblkid has read in this thread since [`reset`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Witness {
    /// Reads that gave every byte asked for.
    pub reads: u64,
    /// The bytes of those reads.
    pub bytes: u64,
    /// The first read that did not.
    pub fault: Option<Fault>,
}

/// A read that failed or ended early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    pub offset_bytes: u64,
    pub wanted_bytes: u64,
    pub got_bytes: u64,
    /// The kernel's errno; 0: no error, the device just ended early.
    pub errno: i32,
}

const NOTHING: Witness = Witness { reads: 0, bytes: 0, fault: None };

thread_local! {
    static WITNESS: Cell<Witness> = const { Cell::new(NOTHING) };
    /// Where the last seek went: the offset of the next read.
    static OFFSET: Cell<u64> = const { Cell::new(0) };
}

/// Forgets what was seen in this thread.
pub fn reset() {
    WITNESS.set(NOTHING);
}

/// What was seen in this thread.
#[must_use]
pub fn seen() -> Witness {
    WITNESS.get()
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

fn note_fault(wanted_bytes: u64, got_bytes: u64, errno: i32) {
    let mut seen = WITNESS.get();
    seen.fault = seen.fault.or(Some(Fault { offset_bytes: OFFSET.get(), wanted_bytes, got_bytes, errno }));
    WITNESS.set(seen);
}

/// # Safety
/// That of `lseek(2)`: none beyond a descriptor that may be anything.
#[unsafe(no_mangle)]
unsafe extern "C" fn proxmox_csi_blkid_lseek(fd: c_int, offset: off_t, whence: c_int) -> off_t {
    // SAFETY: the kernel takes three numbers and touches no memory of ours.
    let at = unsafe { libc::lseek(fd, offset, whence) };
    OFFSET.set(u64::try_from(if at < 0 { offset } else { at }).unwrap_or_default());
    if at < 0 {
        note_fault(0, 0, errno());
    }
    at
}

/// # Safety
/// `buffer` is writable for `wanted` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn proxmox_csi_blkid_read(fd: c_int, buffer: *mut c_void, wanted: size_t) -> ssize_t {
    // SAFETY: libblkid passes a buffer that it allocated with at least `wanted` bytes (probe.c, read_buffer).
    let got = unsafe { libc::read(fd, buffer, wanted) };
    let wanted = wanted as u64;
    match u64::try_from(got) {
        Ok(bytes) if bytes == wanted => {
            let mut seen = WITNESS.get();
            seen.reads += 1;
            seen.bytes += bytes;
            WITNESS.set(seen);
        }
        Ok(short) => note_fault(wanted, short, 0),
        Err(_) => note_fault(wanted, 0, errno()),
    }
    got
}

/// A buffer that could not be had is a range that was not read.
///
/// # Safety
/// That of `calloc(3)`: none.
#[unsafe(no_mangle)]
unsafe extern "C" fn proxmox_csi_blkid_calloc(count: size_t, size: size_t) -> *mut c_void {
    // SAFETY: any two sizes are allowed; what is returned belongs to libblkid, which frees it with free(3).
    let memory = unsafe { libc::calloc(count, size) };
    if memory.is_null() {
        note_fault(count.saturating_mul(size) as u64, 0, libc::ENOMEM);
    }
    memory
}
