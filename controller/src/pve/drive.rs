//! The `scsiN: volid,key=value,…` grammar of a VM's config, and a VM's config as `/pending` shows it.
//!
//! Proxmox: qemu-server `PVE/QemuServer/Drive.pm`. Values carry no comma; the order of keys means nothing to Proxmox,
//! which stores them sorted, and so do we. Pure.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// One drive: a volume and its options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drive {
    /// `storage:disk`, an absolute path, or `none` (an empty CD drive).
    pub volid: String,
    /// Keys as written; sorted.
    pub options: BTreeMap<String, String>,
}

/// Why a text is no drive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoDrive(pub &'static str);

impl FromStr for Drive {
    type Err = NoDrive;

    fn from_str(text: &str) -> Result<Self, NoDrive> {
        let mut volid = None;
        let mut options = BTreeMap::new();
        for (index, part) in text.split(',').enumerate() {
            match part.split_once('=') {
                Some(("file" | "volume", value)) => {
                    if volid.replace(value.to_string()).is_some() {
                        return Err(NoDrive("names two volumes"));
                    }
                }
                // A volume's name may hold '=' only where it stands first and looks like a volid or a path.
                Some((key, _)) if index == 0 && key.contains([':', '/']) => volid = Some(part.to_string()),
                Some((key, value)) => {
                    if key.is_empty() || options.insert(key.to_string(), value.to_string()).is_some() {
                        return Err(NoDrive("has an empty key or one key twice"));
                    }
                }
                None if index == 0 => volid = Some(part.to_string()),
                None => return Err(NoDrive("has an option without a value")),
            }
        }
        match volid {
            Some(volid) if !volid.is_empty() => Ok(Self { volid, options }),
            _ => Err(NoDrive("names no volume")),
        }
    }
}

impl fmt::Display for Drive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without its key a volume like this would be read as an option.
        if self.volid.split_once('=').is_some_and(|(key, _)| !key.contains([':', '/'])) {
            f.write_str("file=")?;
        }
        f.write_str(&self.volid)?;
        self.options.iter().try_for_each(|(key, value)| write!(f, ",{key}={value}"))
    }
}

impl Drive {
    /// An option's text.
    #[must_use]
    pub fn option(&self, key: &str) -> Option<&str> {
        self.options.get(key).map(String::as_str)
    }

    /// `ro=1`, in any spelling that Proxmox takes inside a property string.
    #[must_use]
    pub fn is_readonly(&self) -> bool {
        self.option("ro").is_some_and(|value| matches!(value.to_ascii_lowercase().as_str(), "1" | "on" | "yes" | "true"))
    }

    /// `size=` in bytes: informational, set by Proxmox (`32M`, `1025K`, bare bytes).
    #[must_use]
    pub fn size_bytes(&self) -> Option<u64> {
        parse_size(self.option("size")?)
    }
}

/// Proxmox's `disk-size`: a number, whole or with a fraction, and K, M, G, T (of 1024) or nothing.
#[must_use]
pub fn parse_size(text: &str) -> Option<u64> {
    let (number, unit) = match text.char_indices().last()? {
        (at, 'K') => (text.get(..at)?, 1 << 10),
        (at, 'M') => (text.get(..at)?, 1 << 20),
        (at, 'G') => (text.get(..at)?, 1 << 30),
        (at, 'T') => (text.get(..at)?, 1u64 << 40),
        _ => (text, 1),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || !whole.bytes().chain(fraction.bytes()).all(|b| b.is_ascii_digit()) || fraction.len() > 6 {
        return None;
    }
    let mut bytes = whole.parse::<u64>().ok()?.checked_mul(unit)?;
    if !fraction.is_empty() {
        let scale = 10u64.pow(u32::try_from(fraction.len()).ok()?);
        bytes = bytes.checked_add(u64::try_from(u128::from(fraction.parse::<u64>().ok()?) * u128::from(unit) / u128::from(scale)).ok()?)?;
    }
    Some(bytes)
}

/// Whether a config key holds a volume: every bus, the firmware's disks, and disks set aside.
#[must_use]
pub fn is_drive_key(key: &str) -> bool {
    numbered(key, &["scsi", "virtio", "sata", "ide", "unused"]) || matches!(key, "efidisk0" | "tpmstate0")
}

/// Whether a key of `blockstat` is a guest disk that hot-plugs or is plugged at start.
#[must_use]
pub fn is_disk_slot(key: &str) -> bool {
    numbered(key, &["scsi", "virtio", "sata"])
}

/// The VM that Proxmox takes for the owner of a volume, by its name alone: `vm-9999-x`, `9999/vm-9999-x.raw`.
#[must_use]
pub fn owner_of(disk: &str) -> Option<u32> {
    let digits = match disk.split_once('/') {
        Some((folder, _)) => folder,
        None => ["vm-", "base-", "subvol-", "basevol-"].iter().find_map(|prefix| disk.strip_prefix(prefix))?.split('-').next()?,
    };
    digits.parse().ok()
}

/// Whether a key of a container's config is a mount point, or a volume set aside.
#[must_use]
pub fn is_mount_point(key: &str) -> bool {
    numbered(key, &["mp", "unused"])
}

fn numbered(key: &str, prefixes: &[&str]) -> bool {
    prefixes.iter().any(|prefix| key.strip_prefix(prefix).is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())))
}

/// One line of `/pending`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Line {
    /// What is configured.
    pub value: Option<String>,
    /// What is planned in its place.
    pub pending: Option<String>,
    /// The removal is planned.
    pub delete: bool,
}

/// A VM's config in two of its three views, and the digest of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmConfig {
    /// By option.
    pub lines: BTreeMap<String, Line>,
    /// SHA-1 of the file, for "write only if still this"; empty where unknown after our own write.
    pub digest: String,
}

impl VmConfig {
    /// The configured value of an option (what the running VM was last told, not what is planned).
    #[must_use]
    pub fn configured(&self, key: &str) -> Option<&str> {
        self.lines.get(key)?.value.as_deref()
    }

    /// Whether a `0`/`1` option is on.
    #[must_use]
    pub fn is_on(&self, key: &str) -> bool {
        self.configured(key).is_some_and(|value| value == "1")
    }

    /// The drives that name `volid`, by key: configured or planned.
    pub fn naming<'a>(&'a self, volid: &'a str) -> impl Iterator<Item = (&'a str, &'a Line)> {
        self.lines.iter().filter(|(key, _)| is_drive_key(key)).filter_map(move |(key, line)| {
            let names = |text: &Option<String>| text.as_deref().is_some_and(|text| volume_of(text) == volid);
            (names(&line.value) || names(&line.pending)).then_some((key.as_str(), line))
        })
    }
}

/// The volume of a drive line, without reading its options: a line that we cannot parse must still block.
#[must_use]
pub fn volume_of(line: &str) -> &str {
    let first = line.split(',').next().unwrap_or(line);
    match first.split_once('=') {
        Some(("file" | "volume", volume)) => volume,
        Some((key, _)) if !key.contains([':', '/']) => {
            line.split(',').find_map(|part| part.strip_prefix("file=").or_else(|| part.strip_prefix("volume="))).unwrap_or(first)
        }
        _ => first,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_drive_is_read_and_printed_as_proxmox_stores_it() {
        let text = "ds1:9999/vm-9999-h1.raw,backup=0,discard=on,iothread=1,serial=pvc-h1,size=32M,ssd=1,wwn=0x5056432d49443031";
        let drive: Drive = text.parse().unwrap();
        assert_eq!(drive.volid, "ds1:9999/vm-9999-h1.raw");
        assert_eq!(drive.option("wwn"), Some("0x5056432d49443031"));
        assert_eq!(drive.size_bytes(), Some(32 << 20));
        assert!(!drive.is_readonly());
        assert_eq!(drive.to_string(), text);
        assert_eq!("file=a:b,ro=on".parse::<Drive>().unwrap().volid, "a:b");
        assert!("file=a:b,ro=on".parse::<Drive>().unwrap().is_readonly());
        assert_eq!("none,media=cdrom".parse::<Drive>().unwrap().volid, "none");
        for wrong in ["", ",", "backup=1", "a:b,ro", "a:b,ro=1,ro=0"] {
            assert!(wrong.parse::<Drive>().is_err(), "{wrong}");
        }
    }

    /// Found by fuzzing.
    #[test]
    fn both_readers_see_the_same_volume() {
        for (text, volid) in [("ro=b:c,file=x:y", "x:y"), ("file=a=b", "a=b"), ("file=a=b:c,ro=1", "a=b:c"), ("a:b=c,ro=1", "a:b=c")] {
            let drive: Drive = text.parse().unwrap();
            assert_eq!((drive.volid.as_str(), volume_of(text)), (volid, volid), "{text}");
            assert_eq!(drive.to_string().parse::<Drive>().as_ref(), Ok(&drive), "{text}");
        }
        for two in ["a:b,file=c:d", "file=a:b,volume=c:d"] {
            assert_eq!(two.parse::<Drive>(), Err(NoDrive("names two volumes")), "{two}");
        }
    }

    #[test]
    fn sizes_are_binary() {
        for (text, bytes) in [("1025K", 1025 << 10), ("1536M", 1536 << 20), ("1G", 1 << 30), ("2T", 2 << 40), ("22020097", 22_020_097)] {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
        assert_eq!(parse_size("1.5G"), Some(3 << 29));
        for wrong in ["", "K", "-1G", "1P", "1.G.", "99999999999999T", "1.1234567G"] {
            assert_eq!(parse_size(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn owners_are_read_from_names() {
        for (disk, owner) in [
            ("vm-9999-a", Some(9999)),
            ("101/vm-101-disk-0.qcow2", Some(101)),
            ("base-105-disk-1", Some(105)),
            ("x", None),
            ("vm-x-1", None),
        ] {
            assert_eq!(owner_of(disk), owner, "{disk}");
        }
    }

    #[test]
    fn keys_with_volumes_are_known() {
        for key in ["scsi0", "scsi30", "virtio1", "sata2", "ide2", "unused12", "efidisk0", "tpmstate0"] {
            assert!(is_drive_key(key), "{key}");
        }
        for key in ["scsihw", "scsi", "net0", "name", "serial0", "unusedx"] {
            assert!(!is_drive_key(key), "{key}");
        }
    }

    #[test]
    fn a_volume_is_found_in_both_views_and_only_whole() {
        let mut config = VmConfig::default();
        let line = |value: &str| Line { value: Some(value.into()), ..Line::default() };
        config.lines.insert("scsi1".into(), line("a:vm-100-disk-10,size=1G"));
        config.lines.insert("scsi2".into(), Line { pending: Some("a:vm-100-disk-1".into()), ..Line::default() });
        config.lines.insert("unused0".into(), line("a:vm-100-disk-1"));
        config.lines.insert("args".into(), line("a:vm-100-disk-1"));
        let keys: Vec<&str> = config.naming("a:vm-100-disk-1").map(|(key, _)| key).collect();
        assert_eq!(keys, ["scsi2", "unused0"]);
    }

    proptest! {
        #[test]
        fn a_drive_survives_printing(
            volid in "[a-z]{2,8}:[a-z0-9/._-]{1,30}",
            options in proptest::collection::btree_map("[a-eg-u][a-z_]{1,9}", "[A-Za-z0-9._-]{0,12}", 0..8),
        ) {
            prop_assume!(!options.contains_key("volume") && !options.contains_key("file"));
            let drive = Drive { volid, options };
            prop_assert_eq!(drive.to_string().parse::<Drive>().unwrap(), drive.clone());
            let text = drive.to_string();
            prop_assert_eq!(volume_of(&text), drive.volid.as_str());
        }

        #[test]
        fn no_text_panics(text in "\\PC*") {
            let _ = text.parse::<Drive>();
            let _ = parse_size(&text);
            let _ = volume_of(&text);
        }
    }
}
