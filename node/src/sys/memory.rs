//! How much memory this process may still take: the machine's, and what its control groups leave.
//!
//! A key derivation that takes more ends in the kernel's OOM killer, at every try; a look beforehand makes it a sentence.

use std::fmt;
use std::path::{Path, PathBuf};

use super::Error;

/// A control group's limits are at most so deep: Kubernetes' own are four levels.
const MAX_DEPTH: usize = 32;
/// Above it a cgroup v1 limit means none: `PAGE_COUNTER_MAX` rounded down to pages is just below 2^63.
const V1_NO_LIMIT_BYTES: u64 = 1 << 62;

/// The least of what machine and control groups leave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// KiB that may be allocated now.
    pub free_kib: u64,
    /// What it is limited to in all.
    pub limit_kib: u64,
    /// Whose limit that is: a control group's folder, or `/proc/meminfo`.
    pub by: PathBuf,
}

impl fmt::Display for Room {
    /// `of 196608 KiB (limit /sys/fs/cgroup) 100000 KiB are free`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "of {} KiB (limit: {}) {} KiB are free", self.limit_kib, self.by.display(), self.free_kib)
    }
}

/// What may be allocated now. `proc` is `/proc`, `cgroups` is `/sys/fs/cgroup`.
///
/// Clean and dirty file pages of a group count as free: the kernel takes them back before it kills anybody, and our own writes
/// to disks are among them. Swap is not counted.
///
/// # Errors
/// `/proc/meminfo` cannot be read. A control group that cannot be read sets no limit.
pub fn room(proc: &Path, cgroups: &Path) -> Result<Room, Error> {
    let path = proc.join("meminfo");
    let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let kib = |name: &str| meminfo_kib(&text, name).unwrap_or(u64::MAX);
    let machine = Room { free_kib: kib("MemAvailable"), limit_kib: kib("MemTotal"), by: path };
    let membership = std::fs::read_to_string(proc.join("self/cgroup")).unwrap_or_default();
    let rooms = folders(&membership, cgroups).into_iter().filter_map(|folder| of_group(&folder));
    Ok(rooms.fold(machine, |least, room| if room.free_kib < least.free_kib { room } else { least }))
}

/// The groups that count, from our own up to the root that we see. In a container's own cgroup namespace the path is `/`; with
/// the host's it is the whole way; with cgroup v1 it may name folders that the container does not see: those just are not there.
fn folders(membership: &str, cgroups: &Path) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for line in membership.lines() {
        // hierarchy:controllers:path; version 2 is 0 and without controllers.
        let mut parts = line.splitn(3, ':');
        let (Some(hierarchy), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let root = match (hierarchy, controllers) {
            ("0", "") => cgroups.to_path_buf(),
            (_, controllers) if controllers.split(',').any(|controller| controller == "memory") => cgroups.join("memory"),
            _ => continue,
        };
        let path = Path::new(path.trim_start_matches('/'));
        // `/../x`: a group outside of our namespace.
        let is_inside = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        let path = if is_inside { path } else { Path::new("") };
        folders.extend(path.ancestors().take(MAX_DEPTH).map(|part| root.join(part)));
    }
    folders
}

/// `None`: no limit there, or no such group.
fn of_group(folder: &Path) -> Option<Room> {
    let number = |name: &str| std::fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    let (limit, used, prefix) = match number("memory.max") {
        // "max" is no number: no limit.
        Some(limit) => (limit, number("memory.current")?, ""),
        None => (number("memory.limit_in_bytes").filter(|limit| *limit < V1_NO_LIMIT_BYTES)?, number("memory.usage_in_bytes")?, "total_"),
    };
    let stat = std::fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let of_files: u64 = ["inactive_file", "active_file"].map(|name| stat_bytes(&stat, &format!("{prefix}{name}"))).iter().sum();
    let free = limit.saturating_sub(used.saturating_sub(of_files));
    Some(Room { free_kib: free / 1024, limit_kib: limit / 1024, by: folder.into() })
}

/// `MemAvailable:   16318248 kB`
fn meminfo_kib(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().strip_suffix("kB")?.trim().parse().ok())
}

/// `inactive_file 4096`
fn stat_bytes(text: &str, name: &str) -> u64 {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Folder;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    /// A /proc and a /sys/fs/cgroup; 1 GiB of the machine's 4 GiB are free.
    struct Machine(Folder);

    impl Machine {
        fn new(membership: &str) -> Self {
            let machine = Self(Folder::new());
            machine.put("proc/meminfo", "MemTotal:        4194304 kB\nMemFree: 1 kB\nMemAvailable:    1048576 kB\n");
            machine.put("proc/self/cgroup", membership);
            machine
        }

        fn put(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }

        fn v2(&self, group: &str, limit: &str, used_bytes: u64, file_bytes: u64) {
            self.put(&format!("cgroup{group}/memory.max"), &format!("{limit}\n"));
            self.put(&format!("cgroup{group}/memory.current"), &format!("{used_bytes}\n"));
            self.put(&format!("cgroup{group}/memory.stat"), &format!("anon 1\ninactive_file {file_bytes}\nactive_file 0\n"));
        }

        fn room(&self) -> (u64, u64, String) {
            let room = room(&self.0.path().join("proc"), &self.0.path().join("cgroup")).unwrap();
            (room.free_kib / 1024, room.limit_kib / 1024, room.by.strip_prefix(self.0.path()).unwrap().display().to_string())
        }
    }

    #[test]
    fn without_a_limit_the_machine_counts() {
        let machine = Machine::new("0::/\n");
        assert_eq!(machine.room(), (1024, 4096, "proc/meminfo".into()));
        machine.v2("", "max", 5 * MIB, 0);
        assert_eq!(machine.room(), (1024, 4096, "proc/meminfo".into()));
    }

    #[test]
    fn a_container_sees_its_own_group_as_the_root() {
        let machine = Machine::new("0::/\n");
        machine.v2("", &(192 * MIB).to_string(), 80 * MIB, 30 * MIB);
        // Pages of files can be taken back.
        assert_eq!(machine.room(), (142, 192, "cgroup".into()));
    }

    #[test]
    fn with_the_hosts_groups_the_tightest_on_the_way_counts() {
        let machine = Machine::new("0::/kubepods/burstable/pod1/c1\n");
        machine.v2("/kubepods", &(900 * MIB).to_string(), 880 * MIB, 0);
        machine.v2("/kubepods/burstable", "max", 880 * MIB, 0);
        machine.v2("/kubepods/burstable/pod1", &(400 * MIB).to_string(), 100 * MIB, 0);
        machine.v2("/kubepods/burstable/pod1/c1", &(200 * MIB).to_string(), 50 * MIB, 0);
        assert_eq!(machine.room(), (20, 900, "cgroup/kubepods".into()));
    }

    #[test]
    fn a_used_up_group_has_no_room() {
        let machine = Machine::new("0::/\n");
        machine.v2("", &(10 * MIB).to_string(), 12 * MIB, 0);
        assert_eq!(machine.room().0, 0);
    }

    #[test]
    fn version_one_is_read_where_the_container_sees_it() {
        // The path is the host's, and not to be seen here; the container's group is bound over the controller's folder.
        let machine = Machine::new("5:cpu,cpuacct:/x\n4:memory:/kubepods/pod1/c1\n");
        machine.put("cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
        machine.put("cgroup/memory/memory.usage_in_bytes", "1048576\n");
        assert_eq!(machine.room(), (1024, 4096, "proc/meminfo".into()));
        machine.put("cgroup/memory/memory.limit_in_bytes", &format!("{}\n", 100 * MIB));
        machine.put("cgroup/memory/memory.usage_in_bytes", &format!("{}\n", 60 * MIB));
        machine.put("cgroup/memory/memory.stat", &format!("inactive_file 1\ntotal_inactive_file {}\ntotal_active_file {MIB}\n", 9 * MIB));
        assert_eq!(machine.room(), (50, 100, "cgroup/memory".into()));
    }

    #[test]
    fn both_numbers_are_in_the_sentence() {
        let room = Room { free_kib: 184_320, limit_kib: 262_144, by: "/sys/fs/cgroup".into() };
        assert_eq!(room.to_string(), "of 262144 KiB (limit: /sys/fs/cgroup) 184320 KiB are free");
    }

    proptest! {
        #[test]
        fn no_membership_leads_out_of_the_folder(membership in "\\PC{0,60}", path in "[./a]{0,12}") {
            for text in [membership, format!("0::{path}"), format!("3:memory:{path}")] {
                for folder in folders(&text, Path::new("/cgroup")) {
                    prop_assert!(folder.starts_with("/cgroup") && !folder.components().any(|part| part.as_os_str() == ".."), "{}", folder.display());
                }
            }
        }
    }
}
