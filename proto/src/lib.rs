//! What controller, node and Kubernetes must agree on.
//!
//! Names here are wire contract: the CSI specification's, or the reference driver's, whose volumes we take over
//! (docs/decisions.md, 1). Nothing here does I/O but [`serve`], [`health`] and the log.

pub mod flags;
pub mod handle;
pub mod health;
pub mod identity;
pub mod log;
pub mod metrics;
pub mod serve;

/// CSI 1.12 messages, clients (feature `client`) and servers, generated from `csi.proto`.
#[allow(
    missing_debug_implementations,
    unreachable_pub,
    clippy::allow_attributes_without_reason,
    reason = "generated code; messages with secrets have no Debug on purpose"
)]
pub mod csi {
    tonic::include_proto!("csi.v1");

    /// The compiled `FileDescriptorSet` of all our files, for the test that compares them with the official ones.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors"));
}

/// kubelet's plugin registration, generated from `pluginregistration.proto`.
#[allow(missing_debug_implementations, unreachable_pub, clippy::allow_attributes_without_reason, reason = "generated code")]
pub mod pluginregistration {
    tonic::include_proto!("pluginregistration");
}

pub use handle::VolumeHandle;

/// The name in CSIDriver, StorageClasses and PVs; the reference driver's.
pub const DRIVER_NAME: &str = "csi.proxmox.sinextra.dev";

/// Topology keys that both binaries emit, always these two.
pub const TOPOLOGY_REGION: &str = "topology.kubernetes.io/region";
/// A zone is a Proxmox node.
pub const TOPOLOGY_ZONE: &str = "topology.kubernetes.io/zone";

/// Keys of the publish context: the controller's word to the node. Only `DevicePath` and `lun` are there when the
/// reference driver attached the volume; unknown keys are passed over.
pub mod publish_context {
    /// `/dev/disk/by-id/wwn-0x<16 hex digits>`, from the drive's real `wwn=`. A name of the slot, not of the volume.
    pub const DEVICE_PATH: &str = "DevicePath";
    /// N of `scsiN`, decimal; equals the guest's SCSI LUN.
    pub const LUN: &str = "lun";
    /// `true`: the filesystem is grown after the mount (a volume made from a smaller source).
    pub const RESIZE_REQUIRED: &str = "resizeRequired";
    /// `csi-<16 hex digits>`: the drive's `serial=`, when the VM's config has it ([`crate::VolumeHandle::serial`]).
    pub const SERIAL: &str = "serial";
    /// `1`: a new volume on this storage reads as zeros. `0`: it may hold a stranger's old bytes. Absent: unknown.
    pub const ZEROED: &str = "zeroed";
    /// The volume's size in bytes as Proxmox shows it, decimal.
    pub const SIZE_BYTES: &str = "sizeBytes";
}

/// Keys of the volume context that are ours or that both sides read. StorageClass parameters keep their own names.
pub mod volume_context {
    /// Set by the external-provisioner on every volume it made.
    pub const PROVISIONER_IDENTITY: &str = "storage.kubernetes.io/csiProvisionerIdentity";
    /// Ours, set by CreateVolume: `none`, `snapshot` or `volume`, as in CSI's VolumeContentSource. Only `none` may be formatted.
    pub const CONTENT_SOURCE: &str = "contentSource";
    /// The reference driver's mark on a volume made from a smaller source: never formatted.
    pub const RESIZE_REQUIRED: &str = "resizeRequired";
    /// mkfs block size in bytes.
    pub const BLOCK_SIZE: &str = "blockSize";
    /// mkfs inode size in bytes.
    pub const INODE_SIZE: &str = "inodeSize";
    /// `on` or `ignore`: the drive's own option. `ignore`: nothing is given back, and the node does not trim either.
    pub const DISCARD: &str = "discard";
    /// `1`: the class says SSD; the node adds `noatime`.
    pub const SSD: &str = "ssd";
    /// `argon2id` (the default) or `pbkdf2`: how a new LUKS keyslot's key is derived from the passphrase.
    pub const LUKS_KDF: &str = "luksKdf";
    /// argon2id: MiB of memory, needed again at every open.
    pub const LUKS_KDF_MEMORY: &str = "luksKdfMemory";
    /// argon2id: passes over that memory.
    pub const LUKS_KDF_TIME: &str = "luksKdfTime";
    /// pbkdf2: rounds.
    pub const LUKS_KDF_ITERATIONS: &str = "luksKdfIterations";
    /// `true` or `1`: discards go through the encryption to the disk.
    pub const LUKS_DISCARDS: &str = "luksDiscards";
    /// All of them: a volume whose context has one is never taken for a plain one.
    pub const LUKS_KEYS: &[&str] = &[LUKS_KDF, LUKS_KDF_MEMORY, LUKS_KDF_TIME, LUKS_KDF_ITERATIONS, LUKS_DISCARDS];
}

/// Keys of the secrets that make a volume an encrypted one; the first is the reference driver's. Their values are raw bytes,
/// a newline at the end included.
pub mod secrets {
    /// What opens the volume, and what a new one is made with.
    pub const PASSPHRASE: &str = "encryption-passphrase";
    /// Ours: what opened it until now. Opens it too, and is replaced by the first.
    pub const PASSPHRASE_PREVIOUS: &str = "encryption-passphrase-previous";
}

/// Slots of a VM that are ours: scsi0 is the system's.
pub const LUN_RANGE: std::ops::RangeInclusive<u8> = 1..=29;

/// `0x` + hex of ASCII `PVC-ID%02d`: the WWN that names slot `lun` (the reference driver's; it names no volume).
#[must_use]
pub fn wwn_of_lun(lun: u8) -> String {
    let mut wwn = String::from("0x");
    for byte in format!("PVC-ID{lun:02}").bytes() {
        wwn.push_str(&format!("{byte:02x}"));
    }
    wwn
}
