//! What the kernel under us lacks, asked once at start: better said then than by the first volume that fails.

use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{FsOpenFlags, fsopen};

use super::mount;

/// Made for this and up (Debian 11's; Talos has 6.12 and up).
const FLOOR: (u32, u32) = (5, 10);
/// What we mount.
const FILESYSTEMS: [&str; 2] = ["ext4", "xfs"];
/// Of `/sys/fs/ext4/features`: growing beyond the reserved descriptor blocks (Linux 3.6).
const EXT4_FEATURE: &str = "meta_bg_resize";

/// Sentences, each with what does not work for want of it. `proc`, `sysfs`: where they are.
#[must_use]
pub fn missing(proc: &Path, sysfs: &Path) -> Vec<String> {
    let mut missing = Vec::new();
    let text = |path: &str| std::fs::read_to_string(proc.join(path)).unwrap_or_default();
    let release = text("sys/kernel/osrelease");
    if release_of(&release).is_some_and(|release| release < FLOOR) {
        missing.push(format!("Linux {} is older than {}.{}: nobody has tried this agent on it", release.trim(), FLOOR.0, FLOOR.1));
    }
    // A filesystem that nobody has: ENODEV, or EPERM without the right to mount, from a kernel that knows the call.
    if fsopen("proxmox-csi", FsOpenFlags::FSOPEN_CLOEXEC).err() == Some(Errno::NOSYS) {
        missing.push("the kernel has no fsopen (Linux 5.2): no volume can be mounted".into());
    }
    if !mount::has_mount_setattr() {
        missing.push("the kernel has no mount_setattr (Linux 5.12): a read-only mount of a pod is writable for its first moment".into());
    }
    let filesystems = text("filesystems");
    for filesystem in FILESYSTEMS {
        // Lines are `nodev\tproc` or `\text4`.
        if !filesystems.is_empty() && !filesystems.lines().any(|line| line.trim() == filesystem) {
            missing.push(format!(
                "{filesystem} is not in /proc/filesystems: unless the kernel loads its module at the first mount, {filesystem} volumes are refused"
            ));
        }
    }
    if !text("misc").lines().any(|line| line.trim().ends_with(" device-mapper")) {
        missing.push("device-mapper is not in /proc/misc: unless the kernel loads dm_mod on demand, encrypted volumes are refused".into());
    }
    let features = sysfs.join("fs/ext4/features");
    if features.is_dir() && !features.join(EXT4_FEATURE).exists() {
        missing.push(format!("ext4 has no {EXT4_FEATURE} (Linux 3.6): volumes cannot grow far beyond the size that they were made with"));
    }
    missing
}

/// `6.1.0-37-cloud-amd64` → (6, 1).
fn release_of(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.trim().split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Folder;

    #[test]
    fn releases_of_all_spellings() {
        for (text, release) in
            [("6.1.0-37-cloud-amd64\n", Some((6, 1))), ("5.10", Some((5, 10))), ("6.18.45-talos", Some((6, 18))), ("", None)]
        {
            assert_eq!(release_of(text), release, "{text}");
        }
    }

    #[test]
    fn what_is_missing_is_named_with_what_it_costs() {
        let root = Folder::new();
        let put = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        put("proc/sys/kernel/osrelease", "5.10.0-32-amd64\n");
        put("proc/filesystems", "nodev\tproc\n\text4\n\txfs\n");
        put("proc/misc", "236 device-mapper\n");
        put("sys/fs/ext4/features/meta_bg_resize", "supported\n");
        let look = || missing(&root.path().join("proc"), &root.path().join("sys"));
        let by_kernel: Vec<String> = look();
        assert!(by_kernel.iter().all(|sentence| sentence.contains("the kernel has no ")), "{by_kernel:?}");
        put("proc/sys/kernel/osrelease", "5.4.0\n");
        put("proc/filesystems", "nodev\tproc\nnodev\txfs2\n\text4\n");
        put("proc/misc", "");
        std::fs::remove_file(root.path().join("sys/fs/ext4/features/meta_bg_resize")).unwrap();
        let all = look().join("\n");
        for word in ["5.4.0 is older than 5.10", "xfs volumes are refused", "encrypted volumes are refused", "cannot grow"] {
            assert!(all.contains(word), "{all}");
        }
        assert!(!all.contains("ext4 volumes"), "{all}");
    }
}
