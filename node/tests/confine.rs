//! What a confined process can do, on this machine's own kernel.
#![allow(clippy::unwrap_used, reason = "a test may fail by panicking")]
#![allow(clippy::disallowed_methods, reason = "a test, not the node, starts itself anew: what is given up does not come back")]

use std::process::Command;

use node::sys::confine::{KEPT, attempts, confine};
use rustix::io::Errno;

/// In a process of its own: what is given up does not come back.
#[test]
fn a_confined_process_cannot_do_what_it_must_not_and_still_works() {
    const IN_CHILD: &str = "PROXMOX_CSI_TEST_CONFINED";
    if std::env::var_os(IN_CHILD).is_none() {
        let own = std::env::current_exe().unwrap();
        let name = "a_confined_process_cannot_do_what_it_must_not_and_still_works";
        let child = Command::new(own).args([name, "--exact", "--nocapture", "--test-threads=1"]).env(IN_CHILD, "1").output().unwrap();
        let said = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success() && said.contains("confined and well"), "{said}{}", String::from_utf8_lossy(&child.stderr));
        return;
    }
    let wrong = confine();
    assert!(wrong.iter().all(|sentence| sentence.contains("is missing")), "{wrong:?}");
    for attempt in attempts() {
        assert_eq!(attempt.refused, Some(Errno::PERM), "{}", attempt.what);
    }
    assert!(std::net::UdpSocket::bind("127.0.0.1:0").is_err());
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let value = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_string();
    assert_eq!((value("NoNewPrivs:"), value("Seccomp:")), ("1".into(), "2".into()));
    let kept = KEPT.iter().fold(0, |all, (one, ..)| all | one.bits());
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(u64::from_str_radix(&value(set), 16).unwrap() & !kept, 0, "{set}");
    }
    // Threads, files, sockets and time are as before.
    let folder = std::env::temp_dir().join(format!("csi-confined-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("x");
    std::thread::spawn(move || std::fs::write(&path, "x").map(|()| std::fs::read(path))).join().unwrap().unwrap().unwrap();
    drop(std::os::unix::net::UnixListener::bind(folder.join("sock")).unwrap());
    std::fs::remove_dir_all(&folder).unwrap();
    println!("confined and well");
}
