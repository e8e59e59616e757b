//! Volume handles: `region/zone/storage/disk`, zone empty on shared storage; the reference driver's form.
//!
//! A handle is tolerant about what exists (old handles, any disk name of any storage plugin) and strict about what
//! could be smuggled: a handle is spliced into drive strings and URLs, so no comma, no control character, no `..`.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha256};

/// Longer than any of its parts can be on any storage plugin; bounds what a request makes us hold.
const MAX_HANDLE_BYTES: usize = 1024;

/// A volume's name: CSI's `volume_id`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VolumeHandle {
    /// The Proxmox cluster.
    pub region: String,
    /// The Proxmox node; empty where the storage is shared.
    pub zone: String,
    /// The Proxmox storage id.
    pub storage: String,
    /// The image's name inside the storage; may contain `/` (`9999/vm-9999-pvc-….raw`).
    pub disk: String,
}

/// Why a string is no volume handle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandleError {
    /// The string, shortened.
    pub given: String,
    /// What is wrong with it.
    pub wrong: &'static str,
}

impl fmt::Display for HandleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "volume id {:?} {}; it should be region/zone/storage/disk (zone empty on shared storage)", self.given, self.wrong)
    }
}

impl std::error::Error for HandleError {}

impl FromStr for VolumeHandle {
    type Err = HandleError;

    fn from_str(given: &str) -> Result<Self, HandleError> {
        let refuse = |wrong| Err(HandleError { given: given.chars().take(200).collect(), wrong });
        if given.len() > MAX_HANDLE_BYTES {
            return refuse("is longer than 1024 bytes");
        }
        if given.chars().any(|c| c.is_control() || c.is_whitespace() || matches!(c, ',' | ';' | '?' | '#' | '%' | '\\' | '"')) {
            return refuse("contains a character that no Proxmox volume has");
        }
        let mut parts = given.splitn(4, '/');
        let (Some(region), Some(zone), Some(storage), Some(disk)) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
            return refuse("has fewer than four parts");
        };
        if region.is_empty() {
            return refuse("has no region");
        }
        if storage.is_empty() {
            return refuse("has no storage");
        }
        if disk.is_empty() {
            return refuse("has no disk");
        }
        if [region, zone, storage].iter().any(|part| part.contains(':') || *part == "." || *part == "..") {
            return refuse("has a part that is no Proxmox name");
        }
        // It begins the drive string, where `=` would make a key of it. These are all that Proxmox has (pve-storage-id).
        if !storage.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)) {
            return refuse("has a storage that is no Proxmox name");
        }
        if disk.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
            return refuse("has a disk with an empty, '.' or '..' part");
        }
        // qemu-server reads `storage:100` as "make a disk of 100 GiB", and `storage:cloudinit` as "make such an image".
        if disk == "cloudinit" || disk.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
            return refuse("has a disk that Proxmox would take for an order to make a new one");
        }
        Ok(Self { region: region.into(), zone: zone.into(), storage: storage.into(), disk: disk.into() })
    }
}

impl fmt::Display for VolumeHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}/{}", self.region, self.zone, self.storage, self.disk)
    }
}

impl VolumeHandle {
    /// Proxmox's own id of the volume: `storage:disk`.
    #[must_use]
    pub fn volid(&self) -> String {
        format!("{}:{}", self.storage, self.disk)
    }

    /// The VMID that the disk's name gives as its owner: `vm-<vmid>-…`, `base-…`, `subvol-…`, after an optional folder.
    #[must_use]
    pub fn owner_vmid(&self) -> Option<u32> {
        let name = self.disk.rsplit('/').next()?;
        let mut parts = name.splitn(3, '-');
        let (kind, vmid, rest) = (parts.next()?, parts.next()?, parts.next());
        if !matches!(kind, "vm" | "base" | "subvol" | "basevol") || rest.is_none() {
            return None;
        }
        // Digits only: `+100` would be read as a number too.
        let is_plain = vmid.bytes().all(|byte| byte.is_ascii_digit()) && !vmid.starts_with('0');
        vmid.parse().ok().filter(|vmid| is_plain && (100..=999_999_999).contains(vmid))
    }

    /// The serial that a drive of this volume carries: `csi-` and 16 hex digits (decision 2). 20 bytes: all QEMU takes.
    #[must_use]
    pub fn serial(&self) -> String {
        let mut serial = String::from("csi-");
        for byte in self.digest().iter().take(8) {
            serial.push_str(&format!("{byte:02x}"));
        }
        serial
    }

    /// The UUID of the filesystem or LUKS header that we make on this volume (decision 3: a damaged volume of ours is
    /// told from a stranger's leftovers). `part` separates what lives on one disk: the LUKS header and the filesystem in it.
    /// RFC 9562 version 8 (custom), from SHA-256.
    #[must_use]
    pub fn uuid(&self, part: &str) -> [u8; 16] {
        let mut hash = Sha256::new();
        hash.update(self.digest());
        hash.update(part.as_bytes());
        let mut uuid = [0; 16];
        for (to, from) in uuid.iter_mut().zip(hash.finalize()) {
            *to = from;
        }
        uuid[6] = (uuid[6] & 0x0f) | 0x80;
        uuid[8] = (uuid[8] & 0x3f) | 0x80;
        uuid
    }

    /// SHA-256 of `region/storage/disk`. The zone is left out: a volume that moves to another node stays itself.
    fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(format!("{}/{}/{}", self.region, self.storage, self.disk));
        hash.finalize().into()
    }
}
