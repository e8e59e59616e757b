//! Where `scripts/tools` put what it fetched.

use std::path::PathBuf;

/// The cache folder: `$PROXMOX_CSI_CACHE`, else `$XDG_CACHE_HOME/proxmox-csi`, else `~/.cache/proxmox-csi`.
#[must_use]
pub fn cache() -> PathBuf {
    if let Some(given) = std::env::var_os("PROXMOX_CSI_CACHE") {
        return given.into();
    }
    std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .unwrap_or_else(std::env::temp_dir)
        .join("proxmox-csi")
}
