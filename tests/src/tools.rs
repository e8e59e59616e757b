//! Where `scripts/tools` put what it fetched.

use std::io::Write;
use std::path::PathBuf;

/// The cache folder: `$PROXMOX_CSI_CACHE`, else `$XDG_CACHE_HOME/proxmox-csi`, else `~/.cache/proxmox-csi`.
#[must_use]
pub fn cache() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(given) = set("PROXMOX_CSI_CACHE") {
        return given;
    }
    set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache"))).unwrap_or_else(std::env::temp_dir).join("proxmox-csi")
}

/// A release binary for x86_64: in `$PROXMOX_CSI_BIN`, else where `scripts/build` puts it.
#[must_use]
pub fn release_binary(name: &str) -> PathBuf {
    let folder = std::env::var_os("PROXMOX_CSI_BIN")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/x86_64-unknown-linux-musl/release")), PathBuf::from);
    folder.join(name)
}

/// The same for one of Rust's targets: the folders lie side by side.
#[must_use]
pub fn release_binary_for(name: &str, target: &str) -> PathBuf {
    let x86_64 = release_binary(name);
    if target.starts_with("x86_64") {
        return x86_64;
    }
    let all = x86_64.ancestors().nth(3).map(PathBuf::from).unwrap_or_default();
    all.join(target).join("release").join(name)
}

/// The node agent that dies at named points: in `$PROXMOX_CSI_KILL_BIN`, else where `scripts/build --kill-points` puts it.
#[must_use]
pub fn kill_points_binary() -> PathBuf {
    const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/kill-points/x86_64-unknown-linux-musl/release");
    std::env::var_os("PROXMOX_CSI_KILL_BIN").map_or_else(|| FOLDER.into(), PathBuf::from).join("proxmox-csi-node")
}

/// A program on PATH or in the system folders, by its full path.
#[must_use]
pub fn program(name: &str) -> Option<String> {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':').chain(["/usr/sbin", "/sbin"]).map(|folder| format!("{folder}/{name}")).find(|path| std::path::Path::new(path).is_file())
}

/// Says that a test cannot run, and why; under CI that is a failure.
///
/// # Panics
/// When `CI` is set.
pub fn skipped(why: &str) {
    // Past the test runner's capture, so that it is seen although the test passes.
    let _ = std::io::stderr().write_all(format!("SKIPPED: {why}\n").as_bytes());
    assert!(std::env::var_os("CI").is_none(), "SKIPPED under CI: {why}");
}
