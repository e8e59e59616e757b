//! What a simulated cluster looks like at its start. Built in code, or read from YAML or JSON by `pve-simulator --description`.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

/// A whole cluster.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Description {
    /// Cluster name (a region, for the driver); empty: a host alone, without cluster.
    pub cluster: String,
    pub nodes: Vec<Node>,
    pub storages: Vec<Storage>,
    pub vms: Vec<Vm>,
    pub users: Vec<User>,
    /// Role name to privileges; Proxmox's own roles are there already.
    pub roles: BTreeMap<String, Vec<String>>,
    pub acl: Vec<Acl>,
    /// pvestatd does not run: resources have status `unknown` and no numbers.
    pub without_statistics: bool,
    /// The resolver does not answer (its text is in the error for an unknown node).
    pub without_resolver: bool,
}

/// One Proxmox node.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    pub name: String,
    #[serde(default)]
    pub ip: Option<String>,
    /// Why it cannot be reached (`595 No route to host`); absent: online. The first node of a description is the one that answers.
    #[serde(default)]
    pub unreachable: Option<String>,
    /// Known to the resolver and to nothing else (not a member of the cluster).
    #[serde(default)]
    pub stranger: bool,
}

/// One entry of storage.cfg.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Storage {
    pub id: String,
    /// dir, nfs, cifs, cephfs, btrfs, lvm, lvmthin, zfspool, zfs, rbd, iscsi, iscsidirect, pbs, esxi.
    #[serde(rename = "type")]
    pub plugin: String,
    #[serde(default = "images")]
    pub content: Vec<String>,
    /// Absent: what the type implies.
    #[serde(default)]
    pub shared: Option<bool>,
    #[serde(default)]
    pub nodes: Option<Vec<String>>,
    #[serde(default)]
    pub disabled: bool,
    #[serde(default = "hundred_gib")]
    pub total_bytes: u64,
    /// Taken by others than our volumes.
    #[serde(default)]
    pub used_bytes: u64,
    /// Activation fails: the mount point is not mounted.
    #[serde(default)]
    pub unmounted: bool,
    /// `path`, `vgname`, `thinpool`, `pool`, `format`, … as storage.cfg has them.
    #[serde(default)]
    pub options: BTreeMap<String, Value>,
}

fn images() -> Vec<String> {
    vec!["images".to_owned()]
}

fn hundred_gib() -> u64 {
    100 << 30
}

/// One virtual machine.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    pub vmid: u32,
    pub node: String,
    #[serde(default)]
    pub running: bool,
    /// The lines of its config file. A drive whose image is missing is created.
    #[serde(default)]
    pub config: BTreeMap<String, String>,
}

/// A user with its tokens.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// `csi@pve`
    pub id: String,
    #[serde(default)]
    pub password: Option<String>,
    #[serde(default)]
    pub disabled: bool,
    #[serde(default)]
    pub expired: bool,
    #[serde(default)]
    pub tokens: Vec<Token>,
}

/// An API token of a user.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// The part after the `!`.
    pub id: String,
    pub secret: String,
    /// Privilege separation.
    #[serde(default = "yes")]
    pub privsep: bool,
    #[serde(default)]
    pub expired: bool,
}

fn yes() -> bool {
    true
}

/// One line of the ACL.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Acl {
    pub path: String,
    /// A user (`csi@pve`) or a token (`csi@pve!csi`).
    pub who: String,
    pub role: String,
    #[serde(default = "yes")]
    pub propagate: bool,
}

/// The secret of the token `csi@pve!csi` in the standard description.
pub const STANDARD_SECRET: &str = "c5100000-0000-4000-8000-00000000c510";
/// The password of `csi@pve` in the standard description.
pub const STANDARD_PASSWORD: &str = "csi-password";
/// What the driver's role holds.
pub const CSI_PRIVILEGES: [&str; 6] =
    ["VM.Audit", "VM.Config.Disk", "Datastore.Allocate", "Datastore.AllocateSpace", "Datastore.Audit", "Sys.Audit"];

impl Node {
    #[must_use]
    pub fn online(name: &str) -> Node {
        Node { name: name.to_owned(), ip: Some("10.99.0.1".to_owned()), unreachable: None, stranger: false }
    }
}

impl Storage {
    #[must_use]
    pub fn new(id: &str, plugin: &str, options: &[(&str, &str)]) -> Storage {
        Storage {
            id: id.to_owned(),
            plugin: plugin.to_owned(),
            content: images(),
            shared: None,
            nodes: None,
            disabled: false,
            total_bytes: hundred_gib(),
            used_bytes: 0,
            unmounted: false,
            options: options.iter().map(|(key, value)| ((*key).to_owned(), Value::from(*value))).collect(),
        }
    }
}

impl Vm {
    /// A Linux guest as Proxmox's wizard makes it; `disk` is scsi0, if there is one.
    #[must_use]
    pub fn linux(vmid: u32, node: &str, name: &str, disk: Option<&str>) -> Vm {
        let mut config: BTreeMap<String, String> = [
            ("boot", "order=scsi0"),
            ("cores", "1"),
            ("memory", "512"),
            ("name", name),
            ("numa", "0"),
            ("ostype", "l26"),
            ("scsihw", "virtio-scsi-single"),
            ("sockets", "1"),
        ]
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
        config.insert("smbios1".to_owned(), format!("uuid=00000000-0000-4000-8000-{vmid:012}"));
        if let Some(disk) = disk {
            config.insert("scsi0".to_owned(), disk.to_owned());
        }
        Vm { vmid, node: node.to_owned(), running: true, config }
    }
}

impl Description {
    /// One cluster `fsn1` of the host `pve1`, two running VMs (101, 102), a storage of each local kind, and the driver's token.
    #[must_use]
    pub fn standard() -> Description {
        let mut local = Storage::new("local", "dir", &[("path", "/var/lib/vz")]);
        local.content.extend(["iso", "vztmpl", "backup"].map(str::to_owned));
        Description {
            cluster: "fsn1".to_owned(),
            nodes: vec![Node::online("pve1")],
            storages: vec![
                local,
                Storage::new("local-lvm", "lvmthin", &[("vgname", "pve"), ("thinpool", "data")]),
                Storage::new("local-zfs", "zfspool", &[("pool", "rpool/data")]),
                Storage::new("thick-lvm", "lvm", &[("vgname", "thick")]),
            ],
            vms: vec![Vm::linux(101, "pve1", "node-101", None), Vm::linux(102, "pve1", "node-102", None)],
            users: vec![User {
                id: "csi@pve".to_owned(),
                password: Some(STANDARD_PASSWORD.to_owned()),
                disabled: false,
                expired: false,
                tokens: vec![Token { id: "csi".to_owned(), secret: STANDARD_SECRET.to_owned(), privsep: false, expired: false }],
            }],
            roles: [("CSI".to_owned(), CSI_PRIVILEGES.map(str::to_owned).to_vec())].into(),
            acl: vec![Acl { path: "/".to_owned(), who: "csi@pve".to_owned(), role: "CSI".to_owned(), propagate: true }],
            ..Description::default()
        }
    }

    /// Adds a node.
    #[must_use]
    pub fn node(mut self, node: Node) -> Description {
        self.nodes.push(node);
        self
    }

    /// Adds a storage.
    #[must_use]
    pub fn storage(mut self, storage: Storage) -> Description {
        self.storages.push(storage);
        self
    }

    /// Adds a VM.
    #[must_use]
    pub fn vm(mut self, vm: Vm) -> Description {
        self.vms.push(vm);
        self
    }
}
