//! The system calls that the agent may make, as a BPF program for seccomp(2). Everything else is EPERM.
//!
//! A list of what is allowed: what a new kernel brings is refused too. The numbers are libc's for each architecture; x86_64's other
//! two tables (i386 by its own AUDIT_ARCH, x32 by bit 30 of the number) are not on the list.

use rustix::io::Errno;

/// From linux/audit.h: the ELF machine, 64 bits, little-endian.
#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xc000_00b7;

/// `CLONE_THREAD` is there, and no flag for a new namespace (cgroup, uts, ipc, user, pid, net, mount, time).
const CLONE_MASK: u32 = 0x0001_0000 | 0x7e02_0000 | 0x80;
const CLONE_THREAD: u32 = 0x0001_0000;
const AF_UNIX: u32 = 1;
const PROT_EXEC: u32 = 4;
const PR_SET_NAME: u32 = 15;
/// What the kernel compares of an `int` argument.
const WHOLE: u32 = u32::MAX;

/// Allowed whatever the arguments.
#[rustfmt::skip] // By what they are for, not one a line.
const ALLOWED: &[libc::c_long] = &[
    // Files and folders.
    libc::SYS_openat, libc::SYS_openat2, libc::SYS_close, libc::SYS_close_range, libc::SYS_read, libc::SYS_write, libc::SYS_pread64,
    libc::SYS_pwrite64, libc::SYS_readv, libc::SYS_writev, libc::SYS_preadv, libc::SYS_pwritev, libc::SYS_lseek, libc::SYS_fstat,
    libc::SYS_newfstatat, libc::SYS_statx, libc::SYS_statfs, libc::SYS_fstatfs, libc::SYS_faccessat, libc::SYS_faccessat2,
    libc::SYS_readlinkat, libc::SYS_getdents64, libc::SYS_getcwd, libc::SYS_mkdirat, libc::SYS_unlinkat, libc::SYS_renameat,
    libc::SYS_renameat2, libc::SYS_mknodat, libc::SYS_symlinkat, libc::SYS_fchmod, libc::SYS_fchmodat, libc::SYS_umask, libc::SYS_dup,
    libc::SYS_dup3, libc::SYS_fcntl, libc::SYS_pipe2, libc::SYS_ioctl,
    // Devices: write, flush, zero, advise.
    libc::SYS_fsync, libc::SYS_fdatasync, libc::SYS_syncfs, libc::SYS_sync_file_range, libc::SYS_fallocate, libc::SYS_fadvise64,
    // Mounts.
    libc::SYS_mount, libc::SYS_umount2, libc::SYS_fsopen, libc::SYS_fsconfig, libc::SYS_fsmount, libc::SYS_fspick, libc::SYS_open_tree,
    libc::SYS_move_mount, libc::SYS_mount_setattr,
    // Keys of encrypted volumes, for dm-crypt.
    libc::SYS_add_key, libc::SYS_keyctl, libc::SYS_request_key,
    // Sockets that are there; which may be made is below.
    libc::SYS_bind, libc::SYS_listen, libc::SYS_accept, libc::SYS_accept4, libc::SYS_connect, libc::SYS_getsockname,
    libc::SYS_getpeername, libc::SYS_getsockopt, libc::SYS_setsockopt, libc::SYS_sendto, libc::SYS_recvfrom, libc::SYS_sendmsg,
    libc::SYS_recvmsg, libc::SYS_shutdown,
    // Waiting.
    libc::SYS_epoll_create1, libc::SYS_epoll_ctl, libc::SYS_epoll_pwait, libc::SYS_epoll_pwait2, libc::SYS_eventfd2, libc::SYS_ppoll,
    libc::SYS_futex, libc::SYS_nanosleep, libc::SYS_clock_nanosleep, libc::SYS_restart_syscall,
    // Memory; to run code from is below.
    libc::SYS_munmap, libc::SYS_mremap, libc::SYS_madvise, libc::SYS_brk, libc::SYS_mlock, libc::SYS_mlock2, libc::SYS_munlock,
    // Threads and signals.
    libc::SYS_set_robust_list, libc::SYS_set_tid_address, libc::SYS_rseq, libc::SYS_membarrier, libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity, libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn, libc::SYS_sigaltstack,
    libc::SYS_tkill, libc::SYS_tgkill, libc::SYS_exit, libc::SYS_exit_group,
    // Who, when, how much, and chance.
    libc::SYS_getpid, libc::SYS_gettid, libc::SYS_getuid, libc::SYS_geteuid, libc::SYS_getgid, libc::SYS_getegid, libc::SYS_uname,
    libc::SYS_sysinfo, libc::SYS_getrusage, libc::SYS_prlimit64, libc::SYS_clock_gettime, libc::SYS_clock_getres,
    libc::SYS_gettimeofday, libc::SYS_getrandom, libc::SYS_capget,
];

/// The older names of the same, which musl still uses on x86_64, and other architectures never had.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const ALLOWED_BY_OLD_NAME: &[libc::c_long] = &[
    libc::SYS_open, libc::SYS_stat, libc::SYS_lstat, libc::SYS_access, libc::SYS_readlink, libc::SYS_mkdir, libc::SYS_rmdir,
    libc::SYS_unlink, libc::SYS_rename, libc::SYS_mknod, libc::SYS_symlink, libc::SYS_chmod, libc::SYS_dup2, libc::SYS_pipe,
    libc::SYS_poll, libc::SYS_epoll_wait, libc::SYS_getrlimit, libc::SYS_time,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_BY_OLD_NAME: &[libc::c_long] = &[];

/// Allowed where `argument & mask == value`.
struct If {
    number: libc::c_long,
    argument: u32,
    mask: u32,
    value: u32,
}

const ALLOWED_IF: &[If] = &[
    If { number: libc::SYS_clone, argument: 0, mask: CLONE_MASK, value: CLONE_THREAD },
    If { number: libc::SYS_socket, argument: 0, mask: WHOLE, value: AF_UNIX },
    If { number: libc::SYS_socketpair, argument: 0, mask: WHOLE, value: AF_UNIX },
    If { number: libc::SYS_mmap, argument: 2, mask: PROT_EXEC, value: 0 },
    If { number: libc::SYS_mprotect, argument: 2, mask: PROT_EXEC, value: 0 },
    If { number: libc::SYS_prctl, argument: 0, mask: WHOLE, value: PR_SET_NAME },
];

/// One instruction (`struct sock_filter` of linux/filter.h).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Instruction {
    pub(super) code: u16,
    pub(super) if_true: u8,
    pub(super) if_false: u8,
    pub(super) k: u32,
}

/// BPF_LD | BPF_W | BPF_ABS: a word of `struct seccomp_data`.
pub(super) const LOAD: u16 = 0x20;
/// BPF_ALU | BPF_AND | BPF_K.
pub(super) const AND: u16 = 0x54;
/// BPF_JMP | BPF_JEQ | BPF_K.
pub(super) const IF_EQUAL: u16 = 0x15;
/// BPF_RET | BPF_K.
pub(super) const RETURN: u16 = 0x06;
pub(super) const ALLOW: u32 = 0x7fff_0000;
pub(super) const KILL_PROCESS: u32 = 0x8000_0000;
/// SECCOMP_RET_ERRNO.
pub(super) const ERRNO: u32 = 0x0005_0000;

/// Offsets in `struct seccomp_data`: number, architecture, instruction pointer, six arguments of 64 bits. Of an argument, the lower
/// half: the kernel takes each of those looked at here for an `int`, or for flags in the lower half (little-endian on both architectures).
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const fn argument(index: u32) -> u32 {
    16 + 8 * index
}

/// All of it, in the order in which it is looked at.
pub(super) fn program() -> Vec<Instruction> {
    let step = |code, k| Instruction { code, if_true: 0, if_false: 0, k };
    let unless_skip = |k, if_false| Instruction { code: IF_EQUAL, if_true: 0, if_false, k };
    let number = |number: libc::c_long| u32::try_from(number).unwrap_or(u32::MAX);
    let refused = |errno: Errno| step(RETURN, ERRNO | errno.raw_os_error().unsigned_abs());
    let kill_other =
        [step(LOAD, ARCHITECTURE), Instruction { code: IF_EQUAL, if_true: 1, if_false: 0, k: AUDIT_ARCH }, step(RETURN, KILL_PROCESS)];
    let mut program = Vec::from(kill_other);
    program.push(step(LOAD, NUMBER));
    for allowed in ALLOWED.iter().chain(ALLOWED_BY_OLD_NAME) {
        program.extend([unless_skip(number(*allowed), 1), step(RETURN, ALLOW)]);
    }
    for allowed in ALLOWED_IF {
        program.extend([
            unless_skip(number(allowed.number), 5),
            step(LOAD, argument(allowed.argument)),
            step(AND, allowed.mask),
            unless_skip(allowed.value, 1),
            step(RETURN, ALLOW),
            refused(Errno::PERM),
        ]);
    }
    // Its flags are behind a pointer, where no filter can look: libc takes clone instead.
    program.extend([unless_skip(number(libc::SYS_clone3), 1), refused(Errno::NOSYS), refused(Errno::PERM)]);
    program
}

/// `struct sock_fprog`.
#[repr(C)]
struct Program {
    length: libc::c_ushort,
    instructions: *const Instruction,
}

/// For this thread and those that it makes; there is no way back.
///
/// # Errors
/// EINVAL, ENOSYS: the kernel has no filters. EACCES: no_new_privs is not set.
#[allow(unsafe_code, reason = "a system call that rustix lacks")]
pub(super) fn install(instructions: &[Instruction]) -> Result<(), Errno> {
    const SECCOMP_SET_MODE_FILTER: libc::c_uint = 1;
    let length = libc::c_ushort::try_from(instructions.len()).map_err(|_| Errno::TOOBIG)?;
    let program = Program { length, instructions: instructions.as_ptr() };
    let flags: libc::c_uint = 0;
    // SAFETY: seccomp(operation, flags, program): the kernel copies `length` instructions from `instructions`, which lives until
    // the call returns, writes nothing and keeps no pointer.
    let answer = unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    result(answer)
}

/// A call for its refusal's sake (`attempts`).
#[allow(unsafe_code, reason = "system calls that nothing here ever makes")]
pub(super) fn call(number: libc::c_long, [first, second, third]: [usize; 3]) -> Result<(), Errno> {
    // SAFETY: the numbers and arguments are those of `attempts`: null pointers, bad descriptors and bad flags. The kernel reads and
    // writes no memory of ours; what it gives where it lets one through is a descriptor (socket), which stays open until the end.
    let answer = unsafe { libc::syscall(number, first, second, third, 0_usize, 0_usize, 0_usize) };
    result(answer)
}

fn result(answer: libc::c_long) -> Result<(), Errno> {
    if answer >= 0 { Ok(()) } else { Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)) }
}
