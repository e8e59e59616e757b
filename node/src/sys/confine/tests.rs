use super::filter::{ALLOW, AND, ERRNO, IF_EQUAL, Instruction, KILL_PROCESS, LOAD, RETURN, program};

/// As the kernel runs it (net/core/filter.c); fails on anything that it would not take.
fn verdict(program: &[Instruction], data: [u32; 16]) -> u32 {
    let (mut accumulator, mut at) = (0, 0);
    loop {
        let Instruction { code, if_true, if_false, k } = program[at];
        at += 1;
        match code {
            LOAD => {
                assert_eq!(k % 4, 0);
                accumulator = data[usize::try_from(k / 4).unwrap()];
            }
            AND => accumulator &= k,
            IF_EQUAL => at += usize::from(if accumulator == k { if_true } else { if_false }),
            RETURN => return k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

fn ask(number: libc::c_long, arguments: [u64; 3]) -> u32 {
    let architecture = if cfg!(target_arch = "x86_64") { 0xc000_003e } else { 0xc000_00b7 };
    let mut data = [0; 16];
    data[0] = u32::try_from(number).unwrap();
    data[1] = architecture;
    for (index, argument) in arguments.iter().enumerate() {
        data[4 + 2 * index] = u32::try_from(argument & 0xffff_ffff).unwrap();
        data[5 + 2 * index] = u32::try_from(argument >> 32).unwrap();
    }
    verdict(&program(), data)
}

const EPERM: u32 = ERRNO | 1;

#[test]
fn what_a_filesystem_agent_needs_is_allowed_and_nothing_else() {
    for number in [libc::SYS_openat, libc::SYS_mount, libc::SYS_move_mount, libc::SYS_ioctl, libc::SYS_add_key, libc::SYS_futex] {
        assert_eq!(ask(number, [0; 3]), ALLOW, "{number}");
    }
    let allowed = (0..1024).filter(|number| ask(*number, [0; 3]) == ALLOW).count();
    assert!((100..160).contains(&allowed), "{allowed} calls are allowed");
    for number in [libc::SYS_execve, libc::SYS_ptrace, libc::SYS_init_module, libc::SYS_bpf, libc::SYS_setns, libc::SYS_unshare, 1023] {
        assert_eq!(ask(number, [0; 3]), EPERM, "{number}");
    }
    assert_eq!(ask(libc::SYS_clone3, [0; 3]), ERRNO | 38, "ENOSYS: libc takes clone then");
    // x32's numbers have bit 30.
    assert_eq!(ask(libc::SYS_read | 0x4000_0000, [0; 3]), EPERM);
}

#[test]
fn a_process_with_keys_in_it_leaves_no_core_dump() {
    super::give_up_core_dumps().unwrap();
    assert_eq!(rustix::process::dumpable_behavior(), Ok(rustix::process::DumpableBehavior::NotDumpable));
}

#[test]
fn another_architectures_numbers_end_the_process() {
    for architecture in [0x4000_0003, 0x4000_0028, 0] {
        let mut data = [0; 16];
        data[1] = architecture;
        assert_eq!(verdict(&program(), data), KILL_PROCESS);
    }
}

#[test]
fn arguments_count_where_they_must() {
    for (family, expected) in [(1, ALLOW), (2, EPERM), (10, EPERM), (16, EPERM), (17, EPERM), (38, EPERM), (0, EPERM)] {
        assert_eq!(ask(libc::SYS_socket, [family, 1, 0]), expected, "family {family}");
    }
    // musl's pthread_create; the same with a namespace; fork; vfork.
    for (flags, expected) in
        [(0x007d_0f00, ALLOW), (0x007d_0f00 | 0x0002_0000, EPERM), (0x007d_0f00 | 0x80, EPERM), (17, EPERM), (0x4111, EPERM)]
    {
        assert_eq!(ask(libc::SYS_clone, [flags, 0, 0]), expected, "{flags:#x}");
    }
    for (protection, expected) in [(3, ALLOW), (0, ALLOW), (5, EPERM), (7, EPERM)] {
        assert_eq!(ask(libc::SYS_mmap, [0, 4096, protection]), expected, "{protection}");
        assert_eq!(ask(libc::SYS_mprotect, [0, 4096, protection]), expected, "{protection}");
    }
    assert_eq!((ask(libc::SYS_prctl, [15, 0, 0]), ask(libc::SYS_prctl, [22, 0, 0])), (ALLOW, EPERM));
}

/// The kernel takes 4,096 instructions at most.
#[test]
fn the_program_is_small_and_every_jump_lands_in_it() {
    let program = program();
    assert!(program.len() < 1000, "{}", program.len());
    for (at, instruction) in program.iter().enumerate() {
        let jump = usize::from(instruction.if_true.max(instruction.if_false));
        assert!(at + jump + 1 < program.len() || instruction.code == RETURN, "{at}");
    }
    assert_eq!(program.last().map(|last| (last.code, last.k)), Some((RETURN, EPERM)));
}
