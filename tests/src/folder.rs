//! Folders of the test bed in the system's temporary folder, named after the process that owns them. One is removed with its value;
//! what a killed process left is removed by the next one.

use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

/// Who makes what: `<prefix><pid>-…`.
const PREFIXES: [&str; 5] = ["csi-cluster-", "csi-guest-", "csi-disk-", "pve-csi-bed-", "pve-simulator-"];
/// In a folder whose logs somebody is to read.
const KEPT: &str = "kept";
/// Then nobody reads them any more.
const KEPT_FOR: Duration = Duration::from_secs(24 * 3600);

/// A new one, `<prefix><pid>-<number><suffix>`.
pub(crate) fn new(prefix: &str, suffix: &str) -> Result<PathBuf> {
    static SWEPT: Once = Once::new();
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    SWEPT.call_once(|| sweep(&std::env::temp_dir()));
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let folder = std::env::temp_dir().join(format!("{prefix}{}-{number}{suffix}", std::process::id()));
    std::fs::create_dir_all(&folder).with_context(|| format!("mkdir {}", folder.display()))?;
    Ok(folder)
}

/// Keeps it for a day, whatever becomes of its process.
pub(crate) fn keep(folder: &Path) {
    // It is a courtesy: without the mark the folder stays until the next run.
    let _ = std::fs::write(folder.join(KEPT), "");
}

/// Removes what ended processes left.
fn sweep(temporary: &Path) {
    let Ok(entries) = std::fs::read_dir(temporary) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if entry.file_name().to_str().and_then(owner).is_some_and(|pid| !Path::new("/proc").join(pid).exists()) && !is_kept(&path) {
            // Another user's, or another process was faster.
            let _ = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        }
    }
}

/// The process number in a name of ours.
fn owner(name: &str) -> Option<&str> {
    let rest = PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix))?;
    let pid = rest.split(['-', '.']).next()?;
    (!pid.is_empty() && pid.bytes().all(|byte| byte.is_ascii_digit())).then_some(pid)
}

fn is_kept(folder: &Path) -> bool {
    let age = std::fs::metadata(folder.join(KEPT)).and_then(|mark| mark.modified()).ok().map(|at| at.elapsed().unwrap_or_default());
    age.is_some_and(|age| age < KEPT_FOR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_ended_processes_left_is_swept() {
        let temporary = new("csi-cluster-", "-sweep").unwrap();
        // Beyond any pid_max (proc(5): 2^22 at most), and this process.
        let (ended, alive) = (u32::MAX, std::process::id());
        let gone = [format!("csi-cluster-{ended}-0"), format!("csi-guest-{ended}-1-node-102"), format!("csi-disk-{ended}-0.raw")];
        let stay = [
            format!("csi-cluster-{alive}-0"),
            format!("csi-guest-{ended}-2-failed"),
            format!("other-{ended}-0"),
            "csi-guest-x-0".to_owned(),
            "csi-cluster-".to_owned(),
        ];
        for name in gone.iter().chain(&stay) {
            if name.ends_with(".raw") {
                std::fs::write(temporary.join(name), "x").unwrap();
            } else {
                std::fs::create_dir(temporary.join(name)).unwrap();
            }
        }
        keep(&temporary.join(&stay[1]));
        sweep(&temporary);
        for name in &gone {
            assert!(!temporary.join(name).exists(), "{name}");
        }
        for name in &stay {
            assert!(temporary.join(name).exists(), "{name}");
        }
        std::fs::remove_dir_all(&temporary).unwrap();
    }
}
