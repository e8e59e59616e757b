//! Storages: what a plugin calls its volumes, how it rounds, and its words when something is wrong.
//!
//! Every volume is a real sparse file below the simulator's root folder, so that a QEMU can open it.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::answer::ApiError;
use super::describe;
use super::image;
use super::version::Version;

/// LVM's extent, ZFS's and RBD's padding.
const LVM_EXTENT: u64 = 4 << 20;
const MIB: u64 = 1 << 20;
const QCOW2_CLUSTER: u64 = 64 << 10;
/// ext4 refuses a longer file, and the recorded host's `dir` was on ext4.
const LONGEST_FILE: u64 = 16 << 40;

/// How volumes are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Plugin {
    /// dir, nfs, cifs, cephfs, btrfs: files below images/VMID.
    Dir,
    Lvm,
    LvmThin,
    Zfs,
    /// zfs over iSCSI: commands over ssh, whose errors nobody sees.
    ZfsTarget,
    Rbd,
    /// iscsi, iscsidirect, pbs, esxi: nothing new can be made there.
    Foreign,
}

/// A storage and where its images are.
#[derive(Debug, Clone)]
pub(crate) struct Storage {
    pub(crate) about: describe::Storage,
    pub(crate) plugin: Plugin,
    pub(crate) shared: bool,
    root: PathBuf,
}

/// A volume's name, understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Name {
    /// As after `storage:`.
    pub(crate) volname: String,
    /// The file's or LV's own name.
    pub(crate) file: String,
    pub(crate) owner: u32,
    pub(crate) format: String,
    /// images, or iso.
    pub(crate) content: &'static str,
}

/// A volume that is there.
#[derive(Debug, Clone)]
pub(crate) struct Volume {
    pub(crate) name: Name,
    pub(crate) size_bytes: u64,
    pub(crate) used_bytes: u64,
    pub(crate) ctime: u64,
}

/// total, used, available bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Space {
    pub(crate) total: u64,
    pub(crate) used: u64,
    pub(crate) avail: u64,
}

fn io_error(what: &str, path: &Path, error: &io::Error) -> ApiError {
    ApiError::die(format!("simulator: {what} {}: {error}", path.display()))
}

impl Storage {
    pub(crate) fn new(about: &describe::Storage, root: &Path) -> anyhow::Result<Storage> {
        let (plugin, shared) = match about.plugin.as_str() {
            "dir" => (Plugin::Dir, false),
            "btrfs" => (Plugin::Dir, false),
            "nfs" | "cifs" | "cephfs" => (Plugin::Dir, true),
            "lvm" => (Plugin::Lvm, false),
            "lvmthin" => (Plugin::LvmThin, false),
            "zfspool" => (Plugin::Zfs, false),
            "zfs" => (Plugin::ZfsTarget, true),
            "rbd" => (Plugin::Rbd, true),
            "iscsi" | "iscsidirect" | "pbs" | "esxi" => (Plugin::Foreign, true),
            other => anyhow::bail!(
                "storage {}: type {other:?} is not simulated: dir, nfs, cifs, cephfs, btrfs, lvm, lvmthin, zfspool, zfs, rbd, iscsi, iscsidirect, \
                 pbs, esxi",
                about.id
            ),
        };
        Ok(Storage { about: about.clone(), plugin, shared: about.shared.unwrap_or(shared), root: root.to_owned() })
    }

    pub(crate) fn option(&self, name: &str) -> &str {
        self.about.options.get(name).and_then(Value::as_str).unwrap_or_default()
    }

    fn group(&self) -> &str {
        let group = self.option(if matches!(self.plugin, Plugin::Lvm | Plugin::LvmThin) { "vgname" } else { "pool" });
        if group.is_empty() { &self.about.id } else { group }
    }

    pub(crate) fn is_on(&self, node: &str) -> bool {
        self.about.nodes.as_ref().is_none_or(|nodes| nodes.iter().any(|own| own == node))
    }

    /// Not disabled, and meant for this node.
    pub(crate) fn enabled_on(&self, node: &str) -> Result<(), ApiError> {
        let id = &self.about.id;
        if self.about.disabled {
            return Err(ApiError::die(format!("storage '{id}' is disabled")));
        }
        if !self.is_on(node) {
            return Err(ApiError::die(format!("storage '{id}' is not available on node '{node}'")));
        }
        Ok(())
    }

    /// Enabled, and what it needs is there.
    pub(crate) fn activate(&self, node: &str) -> Result<(), ApiError> {
        self.enabled_on(node)?;
        if !self.about.unmounted {
            return Ok(());
        }
        let id = &self.about.id;
        Err(ApiError::die(match self.plugin {
            Plugin::Dir => format!(
                "unable to activate storage '{id}' - directory is expected to be a mount point but is not mounted: '{}'",
                self.option("path")
            ),
            Plugin::Lvm | Plugin::LvmThin => format!("no such volume group '{}'", self.group()),
            Plugin::Zfs => {
                format!("could not activate storage '{id}', zfs error: cannot import '{}': no such pool available", self.group())
            }
            Plugin::ZfsTarget | Plugin::Rbd | Plugin::Foreign => format!("storage '{id}' is not online"),
        }))
    }

    pub(crate) fn is_active(&self, node: &str) -> bool {
        self.activate(node).is_ok()
    }

    pub(crate) fn default_format(&self) -> &str {
        let format = self.option("format");
        if !format.is_empty() {
            return format;
        }
        if self.has_chains() { "qcow2" } else { "raw" }
    }

    fn is_btrfs(&self) -> bool {
        self.about.plugin == "btrfs"
    }

    /// LVM with snapshot-as-volume-chain: logical volumes that hold a qcow2 each.
    pub(crate) fn has_chains(&self) -> bool {
        self.plugin == Plugin::Lvm && self.option("snapshot-as-volume-chain") == "1"
    }

    /// A command of zfs over iSCSI that failed: Proxmox tells which, and not why.
    fn zfs_command_failed(&self, command: &str) -> String {
        let portal = self.option("portal");
        format!(
            "command '/usr/bin/ssh -o 'BatchMode=yes' -i /etc/pve/priv/zfs/{portal}_id_rsa root@{portal} zfs {command}' failed: exit code 1"
        )
    }

    /// Proxmox asks the target which of its units is the volume.
    fn no_unit(name: &Name) -> String {
        format!("Could not find lu_name for zvol {} at /usr/share/perl5/PVE/Storage/ZFSPlugin.pm line 118.", name.file)
    }

    /// Whether a VM snapshot is possible with such a volume.
    pub(crate) fn has_snapshots(&self, name: &Name) -> bool {
        match self.plugin {
            Plugin::Dir => name.format == "qcow2" || self.is_btrfs(),
            Plugin::Lvm => name.format == "qcow2",
            Plugin::LvmThin | Plugin::Zfs | Plugin::ZfsTarget | Plugin::Rbd => true,
            Plugin::Foreign => false,
        }
    }

    fn folder(&self, node: &str) -> PathBuf {
        self.root.join(if self.shared { "shared" } else { node }).join(&self.about.id)
    }

    fn images(&self, node: &str) -> PathBuf {
        let folder = self.folder(node);
        if self.plugin == Plugin::Dir { folder.join("images") } else { folder }
    }

    /// The image on this host.
    pub(crate) fn file(&self, node: &str, name: &Name) -> PathBuf {
        let images = self.images(node);
        if self.plugin == Plugin::Dir { images.join(name.owner.to_string()).join(&name.file) } else { images.join(&name.file) }
    }

    /// The path that Proxmox would name.
    pub(crate) fn shown_path(&self, name: &Name) -> String {
        let file = &name.file;
        match self.plugin {
            Plugin::Dir if self.is_btrfs() && name.format == "raw" => format!("{}/disk.raw", self.subvolume(name)),
            Plugin::Dir => format!("{}/images/{}/{file}", self.option("path"), name.owner),
            Plugin::ZfsTarget => format!("iscsi://{}/{}/0", self.option("portal"), self.option("target")),
            Plugin::Foreign => String::new(),
            Plugin::Lvm | Plugin::LvmThin => format!("/dev/{}/{file}", self.group()),
            Plugin::Zfs => format!("/dev/zvol/{}/{file}", self.group()),
            Plugin::Rbd => format!("rbd:{}/{file}:conf=/etc/pve/ceph.conf", self.group()),
        }
    }

    /// btrfs: a raw image is a file in a subvolume of its own.
    fn subvolume(&self, name: &Name) -> String {
        format!("{}/images/{}/{}", self.option("path"), name.owner, name.file.trim_end_matches(".raw"))
    }

    /// Understands what stands after `storage:`.
    pub(crate) fn parse(&self, volname: &str) -> Result<Name, ApiError> {
        if self.plugin != Plugin::Dir {
            return self.parse_block(volname);
        }
        if let Some(file) = volname.strip_prefix("iso/") {
            let name = Name { volname: volname.to_owned(), file: file.to_owned(), owner: 0, format: "raw".to_owned(), content: "iso" };
            return Ok(name);
        }
        let unreadable = || ApiError::die(format!("unable to parse directory volume name '{volname}'"));
        let (owner, file) = volname.split_once('/').ok_or_else(unreadable)?;
        let owner = owner.parse().map_err(|_| unreadable())?;
        let format = parse_file_name(file)?;
        Ok(Name { volname: volname.to_owned(), file: file.to_owned(), owner, format, content: "images" })
    }

    fn parse_block(&self, volname: &str) -> Result<Name, ApiError> {
        let what = match self.plugin {
            Plugin::Zfs | Plugin::ZfsTarget => "zfs",
            Plugin::Rbd => "rbd",
            Plugin::Foreign => "iscsi",
            Plugin::Dir | Plugin::Lvm | Plugin::LvmThin => "lvm",
        };
        let unreadable = || ApiError::die(format!("unable to parse {what} volume name '{volname}'"));
        let mut parts = volname.splitn(3, '-');
        let (Some(prefix), Some(owner), Some(rest)) = (parts.next(), parts.next(), parts.next()) else { return Err(unreadable()) };
        let known = matches!((prefix, self.plugin), ("vm" | "base", _) | ("subvol" | "basevol", Plugin::Zfs));
        if !known || rest.is_empty() || volname.contains(char::is_whitespace) {
            return Err(unreadable());
        }
        let owner = owner.parse().map_err(|_| unreadable())?;
        let format = match prefix {
            "subvol" | "basevol" => "subvol",
            _ if self.has_chains() && volname.ends_with(".qcow2") => "qcow2",
            _ => "raw",
        };
        let format = format.to_owned();
        Ok(Name { volname: volname.to_owned(), file: volname.to_owned(), owner, format, content: "images" })
    }

    /// The name a new volume gets, if the plugin likes it.
    fn new_name(&self, vmid: u32, format: &str, file: &str, version: Version) -> Result<Name, ApiError> {
        if self.plugin == Plugin::Dir {
            let suffix = parse_file_name(file)?;
            if suffix != format {
                return Err(ApiError::die(format!("illegal name '{file}' - wrong extension for format ('{format} != '{suffix}')")));
            }
            if format == "subvol" {
                return Err(ApiError::die("storage does not support subvol quotas"));
            }
            return Ok(Name { volname: format!("{vmid}/{file}"), file: file.to_owned(), owner: vmid, format: suffix, content: "images" });
        }
        if self.plugin == Plugin::Foreign {
            return Err(ApiError::die(format!("can't allocate space in {} storage", self.about.plugin)));
        }
        if format != "raw" && !(format == "qcow2" && self.has_chains() && version.is_nine()) {
            return Err(ApiError::die(format!("unsupported format '{format}'")));
        }
        if format == "qcow2" && !file.ends_with(".qcow2") {
            return Err(ApiError::die(format!(
                "volume name '{file}' does not match requested format 'qcow2' (did you mean '{file}.qcow2'?)"
            )));
        }
        let checks_vmid = self.plugin != Plugin::Lvm || version.lvm_checks_vmid();
        if checks_vmid && !file.starts_with(&format!("vm-{vmid}-")) {
            return Err(ApiError::die(format!("illegal name '{file}' - should be 'vm-{vmid}-*'")));
        }
        let name = self.parse_block(file)?;
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if self.plugin == Plugin::Lvm && !file.bytes().all(plain) {
            return Err(ApiError::die(format!("lvm name '{file}' contains illegal characters")));
        }
        Ok(name)
    }

    /// What the plugin makes of a wish.
    pub(crate) fn rounded(&self, bytes: u64) -> u64 {
        match self.plugin {
            Plugin::Dir => bytes.next_multiple_of(1024),
            Plugin::Lvm | Plugin::LvmThin => bytes.next_multiple_of(LVM_EXTENT),
            Plugin::Zfs | Plugin::ZfsTarget | Plugin::Rbd | Plugin::Foreign => bytes.next_multiple_of(MIB),
        }
    }

    /// What an image takes: a qcow2 in a logical volume has room for all its tables, and is as large as was asked.
    fn taken(&self, format: &str, bytes: u64) -> u64 {
        if self.plugin != Plugin::Lvm || format != "qcow2" {
            return self.rounded(bytes);
        }
        // qemu-img measure, fully allocated: 8 bytes of L2 and 2 of refcount for each cluster, whole clusters of each, a header.
        let clusters = bytes.div_ceil(QCOW2_CLUSTER);
        let tables = [clusters * 8, clusters * 2, clusters / 1024].map(|table| table.next_multiple_of(QCOW2_CLUSTER));
        (bytes.next_multiple_of(QCOW2_CLUSTER) + tables.iter().sum::<u64>() + 2 * QCOW2_CLUSTER).next_multiple_of(LVM_EXTENT)
    }

    /// Allocates a volume; `file` absent: the lowest free `vm-VMID-disk-N`.
    pub(crate) fn allocate(
        &self,
        node: &str,
        vmid: u32,
        format: &str,
        file: Option<&str>,
        size_kib: u64,
        version: Version,
    ) -> Result<Name, ApiError> {
        let name = match file {
            Some(file) => self.new_name(vmid, format, file, version)?,
            None => self.automatic_name(node, vmid, format, version)?,
        };
        let path = self.file(node, &name);
        if path.exists() {
            return Err(ApiError::die(self.already_there(&name)));
        }
        let wanted = size_kib.saturating_mul(1024);
        let bytes = if name.format == "qcow2" { wanted } else { self.rounded(wanted) };
        self.check_room(node, &name, self.taken(&name.format, wanted))?;
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|error| io_error("create", folder, &error))?;
        }
        let made = match (self.plugin, name.format.as_str()) {
            (Plugin::Lvm, "raw") => image::recycle(&self.folder(node), &path, bytes),
            (_, "qcow2") => image::create_qcow2(&path, bytes),
            (Plugin::Dir, _) => image::create_raw(&path, bytes),
            _ => image::create_sparse(&path, bytes),
        };
        made.map_err(|error| io_error("create", &path, &error))?;
        Ok(name)
    }

    fn automatic_name(&self, node: &str, vmid: u32, format: &str, version: Version) -> Result<Name, ApiError> {
        for index in 0..1024 {
            let suffix = if self.plugin == Plugin::Dir { format!(".{format}") } else { String::new() };
            let name = self.new_name(vmid, format, &format!("vm-{vmid}-disk-{index}{suffix}"), version)?;
            let taken = self.list(node).iter().any(|volume| {
                let stem = |file: &str| file.split('.').next().map(str::to_owned);
                volume.name.owner == vmid && stem(&volume.name.file) == stem(&name.file)
            });
            if !taken {
                return Ok(name);
            }
        }
        Err(ApiError::die(format!("unable to allocate an image name for VM {vmid} in storage '{}'", self.about.id)))
    }

    fn already_there(&self, name: &Name) -> String {
        let (group, file) = (self.group(), &name.file);
        match self.plugin {
            Plugin::Dir if self.is_btrfs() => format!("disk image '{}' already exists", self.subvolume(name)),
            Plugin::Dir => format!("disk image '{}' already exists", self.shown_path(name)),
            Plugin::ZfsTarget => self.zfs_command_failed(&format!("create -b 8k -V 65536k {group}/{file}")),
            Plugin::Foreign => String::new(),
            Plugin::Lvm | Plugin::LvmThin => {
                format!("lvcreate '{group}/{file}' error:   Logical Volume \"{file}\" already exists in volume group \"{group}\"")
            }
            Plugin::Zfs => format!("zfs error: cannot create '{group}/{file}': dataset already exists"),
            Plugin::Rbd => format!("rbd create '{file}' error: rbd: create error: (17) File exists"),
        }
    }

    fn check_room(&self, node: &str, name: &Name, bytes: u64) -> Result<(), ApiError> {
        let (group, file) = (self.group(), &name.file);
        match self.plugin {
            Plugin::Dir if bytes > LONGEST_FILE => Err(ApiError::die(format!(
                "unable to create image: qemu-img: {}: The image size is too large for file format '{}'",
                self.shown_path(name),
                name.format
            ))),
            Plugin::Lvm if bytes > self.space(node).avail => Err(ApiError::die(format!(
                "lvcreate '{group}/{file}' error:   Volume group \"{group}\" has insufficient free space ({} extents): {} required.",
                self.space(node).avail / LVM_EXTENT,
                bytes / LVM_EXTENT
            ))),
            Plugin::ZfsTarget if bytes > self.space(node).avail && self.option("sparse") != "1" => {
                Err(ApiError::die(self.zfs_command_failed(&format!("create -b 8k -V {}k {group}/{file}", bytes >> 10))))
            }
            Plugin::Zfs if bytes > self.space(node).avail && self.option("sparse") != "1" => {
                Err(ApiError::die(format!("zfs error: cannot create '{group}/{file}': out of space")))
            }
            _ => Ok(()),
        }
    }

    /// The size of an image; `None`: it is not there.
    pub(crate) fn size(&self, node: &str, name: &Name) -> Option<u64> {
        image::virtual_size(&self.file(node, name), &name.format).ok()
    }

    /// The words for an image that is not there when a VM wants it.
    pub(crate) fn missing_at_attach(&self, name: &Name, in_task: bool) -> ApiError {
        let (group, file) = (self.group(), &name.file);
        ApiError::die(match self.plugin {
            Plugin::Dir | Plugin::Rbd => format!("volume '{}:{}' does not exist", self.about.id, name.volname),
            Plugin::Lvm => format!("can't activate LV '/dev/{group}/{file}':   Failed to find logical volume \"{group}/{file}\""),
            Plugin::LvmThin => format!("no such logical volume {group}/{file}"),
            Plugin::ZfsTarget => Self::no_unit(name),
            Plugin::Foreign => String::new(),
            Plugin::Zfs => {
                format!("timeout: no zvol device link for '{file}' found after {} sec.", if in_task { 300 } else { 10 })
            }
        })
    }

    /// The same when somebody asks for its attributes.
    pub(crate) fn missing_at_look(&self, name: &Name) -> ApiError {
        let (group, file) = (self.group(), &name.file);
        ApiError::die(match self.plugin {
            Plugin::Dir => format!("volume_size_info on '{}:{}' failed - no format", self.about.id, name.volname),
            Plugin::Lvm | Plugin::LvmThin => {
                format!("can't get size of '/dev/{group}/{file}':   Failed to find logical volume \"{group}/{file}\"")
            }
            Plugin::Zfs => format!("zfs error: cannot open '{group}/{file}': dataset does not exist"),
            Plugin::ZfsTarget => Self::no_unit(name),
            Plugin::Foreign => String::new(),
            Plugin::Rbd => format!("rbd error: rbd: error opening image {file}: (2) No such file or directory"),
        })
    }

    /// Grows an image to `bytes` (rounded as the plugin does).
    pub(crate) fn resize(&self, node: &str, name: &Name, bytes: u64) -> Result<(), ApiError> {
        let (path, is_chain) = (self.file(node, name), self.plugin == Plugin::Lvm && name.format == "qcow2");
        let rounded = if is_chain { bytes } else { self.rounded(bytes) };
        let more = rounded.saturating_sub(self.size(node, name).unwrap_or(0));
        let (group, file, avail) = (self.group(), &name.file, self.space(node).avail);
        if self.plugin == Plugin::Lvm && more > avail {
            return Err(ApiError::die(format!(
                "lvextend '{group}/{file}' error:   Insufficient free space: {} extents needed, but only {} available",
                more / LVM_EXTENT,
                avail / LVM_EXTENT
            )));
        }
        if self.plugin == Plugin::Zfs && more > avail && self.option("sparse") != "1" {
            return Err(ApiError::die(format!("zfs error: cannot set property for '{group}/{file}': out of space")));
        }
        let grown = if self.plugin == Plugin::Lvm && !is_chain {
            image::extend_recycled(&path, rounded)
        } else {
            image::grow(&path, &name.format, rounded)
        };
        grown.map_err(|error| io_error("resize", &path, &error))
    }

    /// Deletes an image: what the task prints, or dies of.
    pub(crate) fn free(&self, node: &str, name: &Name, in_use: bool) -> Result<Vec<String>, ApiError> {
        let (group, file, path) = (self.group(), &name.file, self.file(node, name));
        let missing = !path.exists();
        match self.plugin {
            Plugin::ZfsTarget if missing => return Err(ApiError::die(Self::no_unit(name))),
            Plugin::Dir if missing && self.is_btrfs() && name.format == "raw" => {
                return Err(ApiError::die("btrfs error: ERROR: Could not statfs: No such file or directory"));
            }
            Plugin::Dir if missing => return Ok(vec![format!("disk image '{}' does not exist", self.shown_path(name))]),
            Plugin::LvmThin | Plugin::Zfs if missing => return Ok(Vec::new()),
            Plugin::Lvm if missing => {
                return Err(ApiError::die(format!("lvremove '{group}/{file}' error:   Failed to find logical volume \"{group}/{file}\"")));
            }
            Plugin::Rbd if missing => {
                return Err(ApiError::die(format!("rbd error: rbd: error opening image {file}: (2) No such file or directory")));
            }
            Plugin::Lvm | Plugin::LvmThin if in_use => {
                return Err(ApiError::die(format!("lvremove '{group}/{file}' error:   Logical volume {group}/{file} in use.")));
            }
            Plugin::Zfs if in_use => return Err(ApiError::die(format!("zfs error: cannot destroy '{group}/{file}': dataset is busy"))),
            Plugin::ZfsTarget if in_use => {
                return Err(ApiError::die(self.zfs_command_failed(&format!("destroy -r {group}/{file}"))));
            }
            Plugin::Rbd if in_use => {
                return Err(ApiError::die(format!("rbd rm '{file}' error: rbd: error: image still has watchers")));
            }
            _ => {}
        }
        let removed =
            if self.plugin == Plugin::Lvm { image::keep_for_recycling(&self.folder(node), &path) } else { fs::remove_file(&path) };
        removed.map_err(|error| io_error("remove", &path, &error))?;
        if let (Plugin::Dir, Some(folder)) = (self.plugin, path.parent()) {
            // As Proxmox does: the folder goes with its last image. One that is not empty stays, which is no error.
            let _ = fs::remove_dir(folder);
        }
        Ok(match self.plugin {
            Plugin::Lvm | Plugin::LvmThin => vec![format!("  Logical volume \"{file}\" successfully removed.")],
            Plugin::Dir | Plugin::Zfs | Plugin::ZfsTarget | Plugin::Rbd | Plugin::Foreign => Vec::new(),
        })
    }

    /// All images on `node`, by lower-cased volid.
    pub(crate) fn list(&self, node: &str) -> Vec<Volume> {
        let images = self.images(node);
        let mut volumes: Vec<Volume> = match self.plugin {
            Plugin::Dir => entries(&images)
                .into_iter()
                .flat_map(|folder| entries(&images.join(&folder)).into_iter().map(move |file| format!("{folder}/{file}")))
                .filter_map(|volname| self.look(node, &volname))
                .collect(),
            Plugin::Lvm | Plugin::LvmThin | Plugin::Zfs | Plugin::ZfsTarget | Plugin::Rbd | Plugin::Foreign => {
                entries(&images).iter().filter_map(|file| self.look(node, file)).collect()
            }
        };
        volumes.sort_by_key(|volume| volume.name.volname.to_lowercase());
        volumes
    }

    /// One image, if it is there.
    pub(crate) fn look(&self, node: &str, volname: &str) -> Option<Volume> {
        let name = self.parse(volname).ok()?;
        let metadata = fs::metadata(self.file(node, &name)).ok()?;
        let mut size_bytes = self.size(node, &name)?;
        if self.plugin == Plugin::Lvm {
            // Proxmox asks LVM, not the image.
            size_bytes = self.taken(&name.format, size_bytes);
        }
        Some(Volume { name, size_bytes, used_bytes: metadata.blocks() * 512, ctime: u64::try_from(metadata.ctime()).unwrap_or(0) })
    }

    /// An entry of the content list.
    pub(crate) fn entry(&self, volume: &Volume) -> Value {
        let mut entry = json!({
            "volid": format!("{}:{}", self.about.id, volume.name.volname),
            "content": "images", "format": volume.name.format, "size": volume.size_bytes, "vmid": volume.name.owner,
        });
        if let Some(entry) = entry.as_object_mut() {
            match self.plugin {
                Plugin::Dir => {
                    entry.insert("used".to_owned(), volume.used_bytes.into());
                    entry.insert("parent".to_owned(), Value::Null);
                    entry.insert("ctime".to_owned(), volume.ctime.into());
                }
                Plugin::Lvm | Plugin::LvmThin => {
                    entry.insert("ctime".to_owned(), volume.ctime.to_string().into());
                }
                Plugin::Zfs | Plugin::ZfsTarget | Plugin::Rbd | Plugin::Foreign => {
                    entry.insert("name".to_owned(), volume.name.file.clone().into());
                    entry.insert("parent".to_owned(), Value::Null);
                }
            }
        }
        entry
    }

    pub(crate) fn space(&self, node: &str) -> Space {
        let volumes = self.list(node);
        let taken: u64 = match self.plugin {
            Plugin::Lvm | Plugin::Zfs | Plugin::ZfsTarget => volumes.iter().map(|volume| volume.size_bytes).sum(),
            Plugin::Dir | Plugin::LvmThin | Plugin::Rbd | Plugin::Foreign => volumes.iter().map(|volume| volume.used_bytes).sum(),
        };
        let total = self.about.total_bytes;
        let used = self.about.used_bytes.saturating_add(taken).min(total);
        Space { total, used, avail: total - used }
    }
}

fn entries(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| !name.starts_with('.')).collect()
}

/// Checks an image file's name and gives its format.
pub(crate) fn parse_file_name(file: &str) -> Result<String, ApiError> {
    let unreadable = || ApiError::die(format!("unable to parse volume filename '{file}'"));
    if file.contains('/') || file.contains(char::is_whitespace) {
        return Err(unreadable());
    }
    let (stem, suffix) = file.rsplit_once('.').ok_or_else(unreadable)?;
    if stem.is_empty() || !matches!(suffix, "raw" | "qcow2" | "vmdk" | "subvol") {
        return Err(unreadable());
    }
    if stem.starts_with("snap-") && suffix == "qcow2" {
        return Err(ApiError::die(format!("'{file}' is a snapshot filename, not a volume!")));
    }
    Ok(suffix.to_owned())
}
