//! `/proc/self/mountinfo`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use node::sys::mountinfo::{Mount, at, parse};
use std::os::unix::ffi::OsStrExt as _;

/// As the kernel prints it.
fn line(mount: &Mount) -> Vec<u8> {
    let mangled = |bytes: &[u8]| -> Vec<u8> {
        bytes.iter().flat_map(|byte| if b" \t\n\\#".contains(byte) { format!("\\{byte:03o}").into_bytes() } else { vec![*byte] }).collect()
    };
    let flag = |is_read_only| if is_read_only { &b"ro"[..] } else { b"rw" };
    [
        b"1 0",
        mount.dev.to_string().as_bytes(),
        &mangled(mount.root.as_os_str().as_bytes()),
        &mangled(mount.point.as_os_str().as_bytes()),
        flag(mount.read_only),
        b"shared:1 -",
        &mangled(mount.fstype.as_bytes()),
        &mangled(mount.source.as_bytes()),
        &[flag(mount.filesystem_read_only), if mount.noinit_itable { b",noinit_itable" } else { b"" }].concat(),
    ]
    .join(&b' ')
}

fuzz_target!(init: fuzz::limit_memory(), |data: &[u8]| {
    let Some(mounts) = parse(data) else { return };
    assert_eq!(mounts.len(), data.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count(), "a line was passed over");
    let text = mounts.iter().map(line).collect::<Vec<_>>().join(&b'\n');
    assert_eq!(parse(&text).as_ref(), Some(&mounts), "{}", String::from_utf8_lossy(&text));
    for mount in &mounts {
        assert!(at(&mounts, &mount.point).is_some_and(|seen| seen.point == mount.point));
    }
});
