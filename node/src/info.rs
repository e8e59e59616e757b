//! Who am I: the node's id, its place, and how many volumes it can take (docs/architecture.md, decision 6).
//!
//! Region and zone come from flags or the environment here; a later version also reads the own Node object.

use std::path::Path;

use crate::identity;
use crate::sys::{self, scsi};

/// Slots of a VM that are ours.
const SLOTS: usize = 29;
/// DMI strings are short; this one is written by the operator.
const MAX_SERIAL_BYTES: u64 = 4096;

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
    /// `region` or `zone`, its flag, its variable.
    Place(&'static str, &'static str, &'static str),
    /// No node name.
    Name,
    /// The look at the disks failed.
    Sys(sys::Error),
}

impl std::fmt::Display for Unknown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Place(what, flag, variable) => {
                write!(f, "{what} unknown: set {flag} or {variable} (this version does not read the Node object's labels)")
            }
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
    let place = |given: &Option<String>, what, flag, variable| {
        given.clone().filter(|given| !given.is_empty()).ok_or(Unknown::Place(what, flag, variable))
    };
    let (name, given_vmid) = match configured.node_id.split_once('/') {
        Some((name, vmid)) => (name, vmid.parse().ok().filter(is_vmid)),
        None => (configured.node_id.as_str(), None),
    };
    if name.is_empty() {
        return Err(Unknown::Name);
    }
    let region = place(&configured.region, "region", "--region", "REGION")?;
    let zone = place(&configured.zone, "zone", "--zone", "ZONE")?;
    let vmid = given_vmid.or(configured.vmid.filter(is_vmid)).or_else(|| vmid_of_serial(&smbios_serial(sysfs)));
    let node_id = vmid.map_or_else(|| name.to_string(), |vmid| format!("{name}/{vmid}"));
    Ok(Info { node_id, region, zone, max_volumes: max_volumes(&scsi::scan(sysfs).map_err(Unknown::Sys)?) })
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

/// The 29 slots less those that other disks of the VM sit in. At least 1: 0 would mean "no limit" to Kubernetes.
fn max_volumes(disks: &[scsi::Disk]) -> i64 {
    let foreign = disks.iter().filter(|disk| {
        let ours_to_use = u8::try_from(disk.address.lun).is_ok_and(|lun| proto::LUN_RANGE.contains(&lun));
        ours_to_use && disk.vendor == "QEMU" && !identity::is_of_this_driver(disk)
    });
    let left = SLOTS.saturating_sub(foreign.count());
    if left == 0 {
        proto::warn!(
            "all {SLOTS} slots of this VM are taken by disks that are not this driver's; Kubernetes is told 1, as 0 means no limit"
        );
    }
    i64::try_from(left.max(1)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeDisk, Folder};
    use proptest::prelude::*;

    fn configured() -> Configured {
        Configured { node_id: "worker-1".into(), vmid: None, region: Some("fsn1".into()), zone: Some("pve-1".into()) }
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
        for lun in 1..=29 {
            FakeDisk::new(2, lun).plug(root.path());
        }
        assert_eq!(max(&root), 1);
    }

    proptest! {
        #[test]
        fn no_serial_panics(serial in "\\PC{0,40}") { let _ = vmid_of_serial(&serial); }
    }
}
