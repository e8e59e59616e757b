//! The options of a VM's config: their types, and which privilege changes them.

use super::drive::{indexed, is_drive, is_unused};
use super::params::Type;

const LONG: usize = 8192;

/// The type of a config option; `None`: there is no such option.
pub(crate) fn option_type(name: &str) -> Option<Type> {
    if is_drive(name) {
        return Some(Type::Drive);
    }
    let numbered = ["net", "serial", "parallel", "usb", "hostpci", "ipconfig", "numa", "virtiofs"];
    if is_unused(name) || numbered.iter().any(|prefix| indexed(name, prefix, 32).is_some()) {
        return Some(Type::Text(LONG));
    }
    Some(match name {
        "cores" | "sockets" | "vcpus" => Type::Integer(1, 4096),
        "balloon" | "shares" | "cpuunits" | "cpulimit" | "migrate_downtime" => Type::Integer(0, i64::MAX),
        "onboot" | "protection" | "kvm" | "tablet" | "numa" | "template" | "acpi" | "freeze" | "localtime" | "reboot" | "autostart" => {
            Type::Boolean
        }
        "scsihw" => Type::Choice("lsi, lsi53c810, virtio-scsi-pci, virtio-scsi-single, megasas, pvscsi"),
        "lock" => Type::Choice("backup, clone, create, migrate, rollback, snapshot, snapshot-delete, suspending, suspended"),
        "agent" | "args" | "bios" | "boot" | "bootdisk" | "cdrom" | "cicustom" | "cipassword" | "citype" | "ciuser" | "cpu"
        | "description" | "hookscript" | "hotplug" | "hugepages" | "ivshmem" | "keyboard" | "machine" | "memory" | "migrate_speed"
        | "name" | "nameserver" | "ostype" | "rng0" | "audio0" | "searchdomain" | "smbios1" | "spice_enhancements" | "sshkeys"
        | "startdate" | "startup" | "tags" | "vga" | "vmgenid" | "vmstatestorage" | "watchdog" => Type::Text(LONG),
        _ => return None,
    })
}

/// What a change of the option needs: a privilege on the VM, or root itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Needs {
    Privilege(&'static str),
    Root,
    /// Looked at where the drive is worked on.
    Drive,
}

pub(crate) fn needs(name: &str) -> Needs {
    if is_drive(name) || is_unused(name) {
        return Needs::Drive;
    }
    match name {
        "cpu" | "cores" | "sockets" | "vcpus" | "cpulimit" | "cpuunits" | "numa" => Needs::Privilege("VM.Config.CPU"),
        "memory" | "balloon" | "shares" => Needs::Privilege("VM.Config.Memory"),
        "scsihw" | "hotplug" | "machine" | "vga" | "watchdog" | "acpi" | "kvm" | "bios" | "tablet" | "rng0" | "audio0" => {
            Needs::Privilege("VM.Config.HWType")
        }
        "cicustom" | "cipassword" | "citype" | "ciuser" | "nameserver" | "searchdomain" | "sshkeys" => {
            Needs::Privilege("VM.Config.Cloudinit")
        }
        "lock" | "args" | "hookscript" => Needs::Root,
        _ if name.starts_with("net") => Needs::Privilege("VM.Config.Network"),
        _ if name.starts_with("ipconfig") => Needs::Privilege("VM.Config.Cloudinit"),
        _ if ["serial", "parallel", "usb", "hostpci"].iter().any(|prefix| name.starts_with(prefix)) => Needs::Privilege("VM.Config.HWType"),
        _ => Needs::Privilege("VM.Config.Options"),
    }
}
