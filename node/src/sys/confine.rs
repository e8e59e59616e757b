//! What the agent gives up before it does anything else, for good: capabilities, new privileges, and most system calls.
//!
//! Its pod is privileged, because mounts must reach the host (Bidirectional). docs/confinement.md says what is kept, and why.

mod filter;

use rustix::io::Errno;
use rustix::process::DumpableBehavior;
use rustix::thread::{self, CapabilitySet, CapabilitySets};

use super::words;

/// What is kept, and what for.
pub const KEPT: [(CapabilitySet, &str, &str); 5] = [
    (CapabilitySet::SYS_ADMIN, "SYS_ADMIN", "mount and unmount, device-mapper, grow xfs, trim"),
    (CapabilitySet::SYS_RESOURCE, "SYS_RESOURCE", "grow ext4"),
    (
        CapabilitySet::DAC_READ_SEARCH,
        "DAC_READ_SEARCH",
        "open a volume's root folder that belongs to its pod alone, to grow the filesystem",
    ),
    (CapabilitySet::SYSLOG, "SYSLOG", "read from the kernel's log why a mount was refused"),
    (CapabilitySet::MKNOD, "MKNOD", "make the device node of an encrypted volume where no udev does"),
];

/// Gives up what is not used. Answers what could not be given up, and what is missing, in sentences: the agent works on
/// either way, as far as it can.
#[must_use = "what could not be done is to be said"]
pub fn confine() -> Vec<String> {
    let mut wrong = Vec::new();
    let kept = KEPT.iter().fold(CapabilitySet::empty(), |all, (one, ..)| all | *one);
    if let Err(errno) = drop_capabilities(kept, &mut wrong) {
        wrong.push(format!("capabilities could not be given up: {}", words(errno)));
    }
    if let Err(errno) = give_up_core_dumps() {
        wrong.push(format!("core dumps could not be given up: {}", words(errno)));
    }
    // The filter needs it, or CAP_SYS_ADMIN.
    if let Err(errno) = thread::set_no_new_privs(true) {
        wrong.push(format!("no_new_privs could not be set: {}", words(errno)));
    }
    if let Err(errno) = filter::install(&filter::program()) {
        wrong.push(format!("the system call filter could not be set: {}", words(errno)));
    }
    wrong
}

/// The host's handler of core dumps would keep passphrases and keys. A limit of 0 does not hold it off (core(5), "Piping core dumps").
fn give_up_core_dumps() -> Result<(), Errno> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
}

fn drop_capabilities(kept: CapabilitySet, wrong: &mut Vec<String>) -> Result<(), Errno> {
    let had = thread::capabilities(None)?;
    let _ = thread::clear_ambient_capability_set();
    // Only who may set capabilities can leave the bounding set; who may not, has little to lose.
    if had.effective.contains(CapabilitySet::SETPCAP) {
        for number in 0..u64::BITS {
            let one = CapabilitySet::from_bits_retain(1 << number);
            match thread::capability_is_in_bounding_set(one) {
                Ok(true) if !kept.contains(one) => thread::remove_capability_from_bounding_set(one)?,
                Ok(_) => (),
                // Past the kernel's last one.
                Err(_) => break,
            }
        }
    }
    let left = had.permitted & kept;
    thread::set_capabilities(None, CapabilitySets { effective: left, permitted: left, inheritable: CapabilitySet::empty() })?;
    for (_, name, what_for) in KEPT.iter().filter(|(one, ..)| !left.contains(*one)) {
        wrong.push(format!("CAP_{name} is missing ({what_for}): the container must be privileged"));
    }
    Ok(())
}

/// A system call that a confined agent tries on itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// In words, with the call's name.
    pub what: &'static str,
    /// `None`: it was let through.
    pub refused: Option<Errno>,
}

/// Tries what must not work: each call is of no effect where it is let through (a bad address, a bad descriptor, a bad flag).
#[must_use]
pub fn attempts() -> Vec<Attempt> {
    const NONE: usize = usize::MAX;
    let calls: [(&'static str, libc::c_long, [usize; 3]); 20] = [
        ("start a program (execve)", libc::SYS_execve, [0, 0, 0]),
        ("start a program (execveat)", libc::SYS_execveat, [NONE, 0, 0]),
        // CLONE_SIGHAND without CLONE_VM: EINVAL.
        ("make a process (clone)", libc::SYS_clone, [0x800, 0, 0]),
        ("look into another process (ptrace)", libc::SYS_ptrace, [16, NONE, 0]),
        ("look into another process (process_vm_readv)", libc::SYS_process_vm_readv, [NONE, 0, 0]),
        ("take another process' file (pidfd_getfd)", libc::SYS_pidfd_getfd, [NONE, NONE, 0]),
        ("load a kernel module (init_module)", libc::SYS_init_module, [0, 0, 0]),
        ("load a kernel module (finit_module)", libc::SYS_finit_module, [NONE, 0, 0]),
        ("load another kernel (kexec_load)", libc::SYS_kexec_load, [0, 0, 0]),
        ("load a program into the kernel (bpf)", libc::SYS_bpf, [NONE, 0, 0]),
        ("restart the machine (reboot)", libc::SYS_reboot, [0, 0, 0]),
        ("enter another namespace (setns)", libc::SYS_setns, [NONE, 0, 0]),
        ("open a file past all folders (open_by_handle_at)", libc::SYS_open_by_handle_at, [NONE, 0, 0]),
        ("change its root (chroot)", libc::SYS_chroot, [0, 0, 0]),
        ("memory to run code from (mmap)", libc::SYS_mmap, [0, 0, 4]),
        ("network by IPv4 (socket)", libc::SYS_socket, [2, 1, 0]),
        ("network by IPv6 (socket)", libc::SYS_socket, [10, 1, 0]),
        ("network past TCP (socket AF_PACKET)", libc::SYS_socket, [17, 3, 0]),
        ("the kernel's messages (socket AF_NETLINK)", libc::SYS_socket, [16, 3, 0]),
        ("system calls past the filter (io_uring_setup)", libc::SYS_io_uring_setup, [0, 0, 0]),
    ];
    let refused =
        |(what, number, arguments)| Attempt { what, refused: filter::call(number, arguments).err().filter(|errno| *errno == Errno::PERM) };
    calls.into_iter().map(refused).collect()
}

#[cfg(test)]
mod tests;
