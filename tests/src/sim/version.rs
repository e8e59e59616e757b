//! What differs between the Proxmox VE releases that can be simulated (`reference/proxmox-api.md` §18).

use std::fmt;
use std::str::FromStr;

/// A simulated Proxmox VE release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Version {
    /// 8.2: the error text is in the reason phrase only; the detail of a 401 leaks; a failed `device_add` is reported.
    V8_2,
    /// 8.4: the error text is in the body too; a failed `device_add` of a scsi disk is swallowed.
    V8_4,
    /// 9.0: block nodes (throttle groups); lvm names are no longer compared with the VMID.
    V9_0,
    /// 9.2: the recorded one.
    #[default]
    V9_2,
}

impl Version {
    /// `release` of GET /version.
    #[must_use]
    pub fn release(self) -> &'static str {
        match self {
            Version::V8_2 => "8.2",
            Version::V8_4 => "8.4",
            Version::V9_0 => "9.0",
            Version::V9_2 => "9.2",
        }
    }

    /// `version` of GET /version (pve-manager).
    pub(crate) fn full(self) -> &'static str {
        match self {
            Version::V8_2 => "8.2.4",
            Version::V8_4 => "8.4.14",
            Version::V9_0 => "9.0.11",
            Version::V9_2 => "9.2.11",
        }
    }

    /// http-server ≥ 5.2.0: `message` in JSON bodies, plain text in the bodies of its own refusals.
    pub(crate) fn message_in_body(self) -> bool {
        self >= Version::V8_4
    }

    /// http-server ≥ 5.2.1: 512 KiB, before: 64 KiB.
    pub(crate) fn body_limit_bytes(self) -> usize {
        if self >= Version::V8_4 { 512 * 1024 } else { 64 * 1024 }
    }

    /// pve-manager ≥ 9.1.5: one text for every bad token.
    pub(crate) fn hides_why_unauthorised(self) -> bool {
        self >= Version::V9_2
    }

    /// qemu-server ≥ 8.3.7: HMP `device_add`, whose error nobody reads.
    pub(crate) fn swallows_device_add(self) -> bool {
        self >= Version::V8_4
    }

    /// qemu-server ≥ 9.1.5.
    pub(crate) fn busy_suffix(self) -> &'static str {
        if self >= Version::V9_2 { " - still busy in guest?" } else { "" }
    }

    /// Machines ≥ 10.0 of PVE 9 use -blockdev and throttle groups.
    pub(crate) fn has_block_nodes(self) -> bool {
        self >= Version::V9_0
    }

    /// storage ≥ 9.0.4.
    pub(crate) fn lvm_checks_vmid(self) -> bool {
        self < Version::V9_0
    }

    /// PVE 9 adds `memhost`, pressure numbers, `formats`.
    pub(crate) fn is_nine(self) -> bool {
        self >= Version::V9_0
    }

    /// qemu-server ≥ 8.3.10.
    pub(crate) fn wants_explicit_cdrom(self) -> bool {
        self >= Version::V8_4
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.release())
    }
}

impl FromStr for Version {
    type Err = String;

    fn from_str(text: &str) -> Result<Version, String> {
        [Version::V8_2, Version::V8_4, Version::V9_0, Version::V9_2]
            .into_iter()
            .find(|version| version.release() == text)
            .ok_or_else(|| format!("Proxmox version {text:?} is not simulated: 8.2, 8.4, 9.0 or 9.2"))
    }
}
