//! Who am I: the node's id, its place, and how many volumes it can take (docs/architecture.md, decision 6).
//!
//! Region, zone and limit come from flags or the environment, else from a file of labels: the pod's own by the downward API
//! (Kubernetes 1.35 copies the Node's topology there), or the Node's, written by whoever may read it. The agent itself does not
//! speak to the Kubernetes API (docs/decisions.md).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::identity;
use crate::sys::{self, scsi};

/// Slots of a VM that are ours.
const SLOTS: usize = 29;
/// DMI strings are short; this one is written by the operator.
const MAX_SERIAL_BYTES: u64 = 4096;
/// Labels have at most 63 + 253 bytes of name and 63 of value; some thousand of them.
const MAX_LABELS_BYTES: u64 = 1 << 20;
/// The reference driver's own labels come before Kubernetes'; its code reads `node`, its documents say `zone`.
const REGION_LABELS: [&str; 2] = ["topology.proxmox.sinextra.dev/region", proto::TOPOLOGY_REGION];
const ZONE_LABELS: [&str; 3] = ["topology.proxmox.sinextra.dev/node", "topology.proxmox.sinextra.dev/zone", proto::TOPOLOGY_ZONE];
/// The operator's word on how many volumes this node takes.
const LIMIT_LABEL: &str = "csi.proxmox.sinextra.dev/max-volume-attachments";

/// What was configured.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Configured {
    /// `<name>` or `<name>/<vmid>`: the Kubernetes node.
    pub node_id: String,
    /// The VM's number on Proxmox, if given apart.
    pub vmid: Option<u32>,
    /// The Proxmox cluster.
    pub region: Option<String>,
    /// The Proxmox node.
    pub zone: Option<String>,
    /// How many volumes, by the operator's word.
    pub max_volumes: Option<String>,
    /// A file of labels, `key="value"` a line, for what is not given above.
    pub labels: Option<PathBuf>,
}

/// What NodeGetInfo answers.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are the answer's")]
pub struct Info {
    pub node_id: String,
    pub region: String,
    pub zone: String,
    pub max_volumes: i64,
}

/// Why there is no answer yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unknown {
    /// `region` or `zone`, its flag, its variable; where it was looked for in vain.
    Place(&'static str, &'static str, &'static str, Option<PathBuf>),
    /// No node name.
    Name,
    /// The look at the disks or at the labels failed.
    Sys(sys::Error),
}

impl std::fmt::Display for Unknown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Place(what, flag, variable, None) => {
                write!(f, "{what} unknown: set {flag} or {variable}, or give the Node's labels by --labels-file (LABELS_FILE)")
            }
            Self::Place(what, flag, variable, Some(labels)) => write!(
                f,
                "{what} unknown: {} holds no label topology.kubernetes.io/{what}: label the Node before this pod is made, or set {flag} or {variable}",
                labels.display()
            ),
            Self::Name => f.write_str("node name unknown: set --node-id or NODE_NAME to the Kubernetes node's name"),
            Self::Sys(error) => error.fmt(f),
        }
    }
}

/// Looks, and answers. `root`: where `/sys` is.
///
/// # Errors
/// What is not known, and how to say it.
pub fn look(configured: &Configured, sysfs: &Path) -> Result<Info, Unknown> {
    let (name, given_vmid) = match configured.node_id.split_once('/') {
        Some((name, vmid)) => (name, vmid.parse().ok().filter(is_vmid)),
        None => (configured.node_id.as_str(), None),
    };
    if name.is_empty() {
        return Err(Unknown::Name);
    }
    let labels = configured.labels.as_deref().map_or_else(|| Ok(Vec::new()), read_labels).map_err(Unknown::Sys)?;
    let place = |given: &Option<String>, keys: &[&str], what, flag, variable| {
        let given = given.as_deref().filter(|given| !given.is_empty());
        let found = given.or_else(|| keys.iter().find_map(|key| value_of(&labels, key)));
        found.map(str::to_string).ok_or_else(|| Unknown::Place(what, flag, variable, configured.labels.clone()))
    };
    let region = place(&configured.region, &REGION_LABELS, "region", "--region", "REGION")?;
    let zone = place(&configured.zone, &ZONE_LABELS, "zone", "--zone", "ZONE")?;
    let vmid = given_vmid.or(configured.vmid.filter(is_vmid)).or_else(|| vmid_of_serial(&smbios_serial(sysfs)));
    let node_id = vmid.map_or_else(|| name.to_string(), |vmid| format!("{name}/{vmid}"));
    let wanted = configured.max_volumes.as_deref().filter(|given| !given.is_empty()).or_else(|| value_of(&labels, LIMIT_LABEL));
    let max_volumes = max_volumes(&scsi::scan(sysfs).map_err(Unknown::Sys)?, wanted);
    Ok(Info { node_id, region, zone, max_volumes })
}

/// The downward API's form (`metadata.labels` in a volume): `key="value"`, one a line; no quotes is taken too.
fn read_labels(path: &Path) -> Result<Vec<(String, String)>, sys::Error> {
    use std::io::Read;
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(sys::Error::io("open", path))?;
    file.take(MAX_LABELS_BYTES).read_to_string(&mut text).map_err(sys::Error::io("read", path))?;
    let pair = |line: &str| {
        let (key, value) = line.split_once('=')?;
        Some((key.trim().to_string(), value.trim().trim_matches('"').to_string()))
    };
    Ok(text.lines().filter_map(pair).collect())
}

fn value_of<'a>(labels: &'a [(String, String)], key: &str) -> Option<&'a str> {
    labels.iter().find(|(name, value)| name == key && !value.is_empty()).map(|(_, value)| value.as_str())
}

/// SMBIOS type 1 serial, as the operator set it in Proxmox (`smbios1: serial=…`); empty where it cannot be read.
fn smbios_serial(sysfs: &Path) -> String {
    use std::io::Read;
    let mut text = String::new();
    if let Ok(file) = std::fs::File::open(sysfs.join("class/dmi/id/product_serial")) {
        let _ = file.take(MAX_SERIAL_BYTES).read_to_string(&mut text);
    }
    text
}

/// `h=web-02a;i=12020`: the value of `i`, in any case, as the Proxmox cloud controller and Karpenter write it.
fn vmid_of_serial(serial: &str) -> Option<u32> {
    let pairs = serial.trim().split(';').filter_map(|pair| pair.split_once('='));
    pairs.filter(|(key, _)| key.trim().eq_ignore_ascii_case("i")).find_map(|(_, value)| value.trim().parse().ok()).filter(is_vmid)
}

/// Proxmox's range of VMIDs.
#[must_use]
pub fn is_vmid(vmid: &u32) -> bool {
    (100..=999_999_999).contains(vmid)
}

/// The 29 slots less those that other disks of the VM sit in, and not more than the operator says. At least 1: 0 would mean
/// "no limit" to Kubernetes.
fn max_volumes(disks: &[scsi::Disk], wanted: Option<&str>) -> i64 {
    let foreign: BTreeSet<u64> = disks
        .iter()
        .filter(|disk| {
            let ours_to_use = u8::try_from(disk.address.lun).is_ok_and(|lun| proto::LUN_RANGE.contains(&lun));
            ours_to_use && disk.vendor == "QEMU" && !identity::is_of_this_driver(disk)
        })
        .map(|disk| disk.address.lun)
        .collect();
    let left = SLOTS.saturating_sub(foreign.len());
    if left == 0 {
        proto::warn!(
            "all {SLOTS} slots of this VM are taken by disks that are not this driver's; Kubernetes is told 1, as 0 means no limit"
        );
    }
    let left = left.max(1);
    let limit = match wanted.map(str::parse::<usize>) {
        None => left,
        Some(Ok(wanted @ 1..)) if wanted <= left => wanted,
        Some(Ok(wanted @ 1..=SLOTS)) => {
            proto::warn!("{LIMIT_LABEL}={wanted}, but {left} of the {SLOTS} slots are free of other disks: the limit is {left}");
            left
        }
        Some(_) => {
            proto::warn!("{LIMIT_LABEL}={:?} is no number from 1 to {SLOTS}: the limit is {left}", wanted.unwrap_or_default());
            left
        }
    };
    i64::try_from(limit).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeDisk, Folder};
    use proptest::prelude::*;

    fn configured() -> Configured {
        Configured { node_id: "worker-1".into(), region: Some("fsn1".into()), zone: Some("pve-1".into()), ..Configured::default() }
    }

    fn with_serial(serial: &str) -> Folder {
        let root = Folder::new();
        std::fs::create_dir_all(root.path().join("class/dmi/id")).unwrap();
        std::fs::write(root.path().join("class/dmi/id/product_serial"), serial).unwrap();
        root
    }

    #[test]
    fn the_vmid_comes_from_the_id_then_the_flag_then_smbios() {
        let root = with_serial("h=worker-1;i=12020\n");
        let id = |node_id: &str, vmid| look(&Configured { node_id: node_id.into(), vmid, ..configured() }, root.path()).unwrap().node_id;
        assert_eq!(id("worker-1/107", Some(108)), "worker-1/107");
        assert_eq!(id("worker-1", Some(108)), "worker-1/108");
        assert_eq!(id("worker-1", None), "worker-1/12020");
        assert_eq!(look(&configured(), Folder::new().path()).unwrap().node_id, "worker-1");
    }

    #[test]
    fn serials_in_all_their_forms() {
        for (serial, vmid) in
            [("h=a;i=12020", Some(12020)), ("I=100", Some(100)), ("i=99", None), ("i=x", None), ("i=", None), ("", None), ("12020", None)]
        {
            assert_eq!(vmid_of_serial(serial), vmid, "{serial}");
        }
    }

    #[test]
    fn an_unknown_place_says_what_to_set() {
        let unknown = |change: fn(&mut Configured)| {
            let mut configured = configured();
            change(&mut configured);
            look(&configured, Folder::new().path()).unwrap_err().to_string()
        };
        assert!(unknown(|configured| configured.region = None).starts_with("region unknown: set --region or REGION"));
        assert!(unknown(|configured| configured.zone = Some(String::new())).starts_with("zone unknown: set --zone or ZONE"));
        assert!(unknown(|configured| configured.node_id = "/107".into()).starts_with("node name unknown"));
    }

    #[test]
    fn foreign_disks_take_slots_and_ours_do_not() {
        let root = Folder::new();
        let max = |root: &Folder| look(&configured(), root.path()).unwrap().max_volumes;
        assert_eq!(max(&root), 29);
        FakeDisk::new(0, 0).plug(root.path());
        FakeDisk::new(0, 30).plug(root.path());
        FakeDisk::new(1, 1).serial("csi-0123456789abcdef").plug(root.path());
        FakeDisk::new(1, 2).wwid("naa.5056432d49443032").plug(root.path());
        assert_eq!(max(&root), 29);
        FakeDisk::new(1, 3).serial("database").plug(root.path());
        assert_eq!(max(&root), 28);
        // A second disk at the same LUN of another controller takes no second slot.
        FakeDisk::new(3, 3).serial("database-2").plug(root.path());
        assert_eq!(max(&root), 28);
        for lun in 1..=29 {
            FakeDisk::new(2, lun).plug(root.path());
        }
        assert_eq!(max(&root), 1);
    }

    #[test]
    fn the_operators_limit_counts_where_it_can_be_kept() {
        let root = Folder::new();
        FakeDisk::new(0, 3).serial("database").plug(root.path());
        let max = |wanted: &str| look(&Configured { max_volumes: Some(wanted.into()), ..configured() }, root.path()).unwrap().max_volumes;
        for (wanted, expected) in [("", 28), ("1", 1), ("16", 16), ("28", 28), ("29", 28), ("30", 28), ("0", 28), ("-1", 28), ("x", 28)] {
            assert_eq!(max(wanted), expected, "{wanted}");
        }
    }

    #[test]
    fn labels_fill_in_what_no_flag_says() {
        let root = Folder::new();
        let file = root.path().join("labels");
        let with = |text: &str| {
            std::fs::write(&file, text).unwrap();
            let bare = Configured { node_id: "worker-1".into(), labels: Some(file.clone()), ..Configured::default() };
            look(&bare, root.path())
        };
        let of = |text: &str| with(text).map(|info| (info.region, info.zone, info.max_volumes)).unwrap();
        let kubernetes = "app=\"csi\"\ntopology.kubernetes.io/region=\"fsn1\"\ntopology.kubernetes.io/zone=\"pve-1\"\n";
        assert_eq!(of(kubernetes), ("fsn1".into(), "pve-1".into(), 29));
        let own = "topology.proxmox.sinextra.dev/region=\"a\"\ntopology.proxmox.sinextra.dev/node=\"b\"\n";
        let limit = "csi.proxmox.sinextra.dev/max-volume-attachments=\"7\"\n";
        assert_eq!(of(&format!("{kubernetes}{own}{limit}")), ("a".into(), "b".into(), 7));
        let told = Configured { labels: Some(file.clone()), ..configured() };
        assert_eq!(look(&told, root.path()).unwrap().zone, "pve-1", "a flag comes before a label");
        for text in ["", "topology.kubernetes.io/region=\"\"", "=", "\"\"=\"", "region=fsn1"] {
            let why = with(text).unwrap_err().to_string();
            assert!(why.starts_with("region unknown: ") && why.contains("topology.kubernetes.io/region"), "{text}: {why}");
        }
        std::fs::remove_file(&file).unwrap();
        let gone = Configured { node_id: "worker-1".into(), labels: Some(file.clone()), ..Configured::default() };
        assert!(look(&gone, root.path()).unwrap_err().to_string().contains("ENOENT"));
    }

    proptest! {
        #[test]
        fn no_serial_panics(serial in "\\PC{0,40}") { let _ = vmid_of_serial(&serial); }
    }
}
