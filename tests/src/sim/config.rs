//! A VM's config file: what is configured, what is pending, snapshots, and the digest over it all.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::sha1;

pub(crate) type Section = BTreeMap<String, String>;

/// One `/etc/pve/nodes/N/qemu-server/V.conf`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct VmConfig {
    pub(crate) current: Section,
    pub(crate) pending: Section,
    /// Keys to be deleted, and whether their volume goes too (force).
    pub(crate) pending_delete: BTreeMap<String, bool>,
    pub(crate) snapshots: BTreeMap<String, Section>,
}

/// Options whose schema says integer or boolean: JSON numbers in answers. Everything else is a string, `memory` too.
const NUMBERS: [&str; 20] = [
    "acpi",
    "autostart",
    "balloon",
    "cores",
    "cpulimit",
    "cpuunits",
    "freeze",
    "kvm",
    "localtime",
    "migrate_downtime",
    "numa",
    "onboot",
    "protection",
    "reboot",
    "shares",
    "snaptime",
    "sockets",
    "tablet",
    "template",
    "vcpus",
];

fn value(key: &str, text: &str) -> Value {
    let number = NUMBERS.contains(&key).then(|| text.parse::<i64>().ok()).flatten();
    number.map_or_else(|| Value::from(text), Value::from)
}

fn print(section: &Section) -> String {
    section.iter().map(|(key, value)| format!("{key}: {value}\n")).collect()
}

impl VmConfig {
    /// The file's text, byte for byte as Proxmox writes it (the digests of the recordings come out equal).
    pub(crate) fn print(&self) -> String {
        let mut text = print(&self.current);
        let mut pending = self.pending.clone();
        if !self.pending_delete.is_empty() {
            let keys: Vec<String> =
                self.pending_delete.iter().map(|(key, force)| format!("{}{key}", if *force { "!" } else { "" })).collect();
            pending.insert("delete".to_owned(), keys.join(","));
        }
        if !pending.is_empty() {
            text.push_str(&format!("\n[PENDING]\n{}", print(&pending)));
        }
        for (name, section) in &self.snapshots {
            text.push_str(&format!("\n[{name}]\n{}", print(section)));
        }
        text
    }

    pub(crate) fn digest(&self) -> String {
        sha1::hex(self.print().as_bytes())
    }

    /// GET config: pending changes folded in, or without them.
    pub(crate) fn view(&self, current_only: bool) -> Value {
        let mut section = self.current.clone();
        if !current_only {
            section.extend(self.pending.clone());
            section.retain(|key, _| !self.pending_delete.contains_key(key));
        }
        self.object(&section)
    }

    /// GET config?snapshot=
    pub(crate) fn snapshot_view(&self, name: &str) -> Option<Value> {
        self.snapshots.get(name).map(|section| self.object(section))
    }

    fn object(&self, section: &Section) -> Value {
        let mut object: Map<String, Value> = section.iter().map(|(key, text)| (key.clone(), value(key, text))).collect();
        object.insert("digest".to_owned(), self.digest().into());
        Value::Object(object)
    }

    /// GET pending: both views side by side.
    pub(crate) fn pending_view(&self) -> Value {
        let mut entries = vec![json!({"key": "digest", "value": self.digest()})];
        for (key, text) in &self.current {
            let mut entry = json!({"key": key, "value": value(key, text)});
            if let Some(entry) = entry.as_object_mut() {
                if let Some(pending) = self.pending.get(key) {
                    entry.insert("pending".to_owned(), value(key, pending));
                }
                if let Some(force) = self.pending_delete.get(key) {
                    entry.insert("delete".to_owned(), if *force { 2 } else { 1 }.into());
                }
            }
            entries.push(entry);
        }
        for (key, text) in self.pending.iter().filter(|(key, _)| !self.current.contains_key(*key)) {
            entries.push(json!({"key": key, "pending": value(key, text)}));
        }
        Value::Array(entries)
    }

    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.current.get(key).map(String::as_str)
    }

    pub(crate) fn is_set(&self, key: &str) -> bool {
        self.get(key).is_some_and(|value| !matches!(value, "0" | ""))
    }

    pub(crate) fn set_pending_delete(&mut self, key: &str, force: bool) {
        self.pending.remove(key);
        self.pending_delete.insert(key.to_owned(), force);
    }

    /// Drops pending entries that change nothing.
    pub(crate) fn drop_void_changes(&mut self) {
        let current = &self.current;
        self.pending.retain(|key, text| current.get(key) != Some(text));
        self.pending_delete.retain(|key, _| current.contains_key(key));
    }

    /// The devices of `boot: order=…`.
    pub(crate) fn boot_order(&self) -> Vec<String> {
        let boot = self.get("boot").unwrap_or_default();
        let order = boot.split(',').find_map(|part| part.trim().strip_prefix("order=")).unwrap_or_default();
        order.split(';').filter(|device| !device.is_empty()).map(str::to_owned).collect()
    }

    /// Whether `hotplug` includes `disk`.
    pub(crate) fn hotplugs_disks(&self) -> bool {
        self.get("hotplug").is_none_or(|hotplug| hotplug == "1" || hotplug.split(',').any(|kind| kind.trim() == "disk"))
    }

    /// Whether anything but `except` still names the volume: configured or in a snapshot.
    pub(crate) fn names_volume(&self, volid: &str, except: &str) -> bool {
        let names = |line: &str| line == volid || line.strip_prefix(volid).is_some_and(|rest| rest.starts_with(','));
        self.current.iter().any(|(key, line)| key != except && names(line)) || self.in_snapshot(volid)
    }

    pub(crate) fn in_snapshot(&self, volid: &str) -> bool {
        let names = |line: &String| line == volid || line.strip_prefix(volid).is_some_and(|rest| rest.starts_with(','));
        self.snapshots.values().any(|section| section.values().any(names))
    }

    pub(crate) fn free_unused(&self) -> Option<String> {
        (0..256).map(|index| format!("unused{index}")).find(|key| !self.current.contains_key(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_equals_the_recorded_one() {
        // vmconfig-stopped.txt: VM 102 after its force delete.
        let config = VmConfig {
            current: [
                ("args", "-kernel /data/guest/vmlinuz -initrd /data/guest/initrd.gz -append console=ttyS0"),
                ("boot", "order=scsi0"),
                ("cores", "1"),
                ("cpu", "qemu64"),
                ("kvm", "0"),
                ("memory", "256"),
                ("name", "node-102"),
                ("numa", "0"),
                ("ostype", "l26"),
                ("scsihw", "virtio-scsi-single"),
                ("serial0", "socket"),
                ("sockets", "1"),
                ("tablet", "0"),
                ("vga", "none"),
            ]
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect(),
            ..VmConfig::default()
        };
        assert_eq!(config.digest(), "c0840a4c005ae217efc0dfc30a33a7c9e4418832");
    }
}
