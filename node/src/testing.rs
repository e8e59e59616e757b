//! A sysfs of our own in a temporary folder, for tests on the host.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::request::Volume;
use crate::sys::scsi::{Address, Disk, State};
use crate::sys::{Dev, scsi};

/// A folder that is removed with its content when the test ends.
#[derive(Debug)]
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let path = std::env::temp_dir().join(format!("proxmox-csi-node-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A volume by its handle.
pub(crate) fn volume(handle: &str) -> Volume {
    let handle: proto::VolumeHandle = handle.parse().unwrap();
    Volume { serial: handle.serial(), handle }
}

/// A disk as QEMU makes it: at `host:0:0:lun`, 1 GiB, with `drive-scsi<lun>` in VPD page 0x83.
#[derive(Debug, Clone)]
pub(crate) struct FakeDisk(pub(crate) Disk);

impl FakeDisk {
    pub(crate) fn new(host: u32, lun: u64) -> Self {
        Self(Disk {
            address: Address { host, channel: 0, target: 0, lun },
            vendor: "QEMU".into(),
            state: State::Running,
            wwid: None,
            serial: None,
            designators: vec![format!("drive-scsi{lun}")],
            name: "sda".into(),
            dev: Dev { major: 8, minor: 0 },
            size_bytes: 1 << 30,
            read_only: false,
        })
    }

    pub(crate) fn serial(mut self, serial: &str) -> Self {
        self.0.serial = Some(serial.into());
        self
    }

    pub(crate) fn wwid(mut self, wwid: &str) -> Self {
        self.0.wwid = Some(wwid.into());
        self
    }

    pub(crate) fn named(mut self, name: &str, minor: u32) -> Self {
        self.0.name = name.into();
        self.0.dev = Dev { major: 8, minor };
        self
    }

    /// Puts it into the sysfs at `root`; answers its device folder.
    pub(crate) fn plug(&self, root: &Path) -> PathBuf {
        let disk = &self.0;
        let device = root.join("bus/scsi/devices").join(disk.address.to_string());
        let block = device.join("block").join(&disk.name);
        std::fs::create_dir_all(block.join("queue")).unwrap();
        std::fs::create_dir_all(root.join("dev/block").join(disk.dev.to_string())).unwrap();
        let put = |path: PathBuf, bytes: &[u8]| std::fs::write(path, bytes).unwrap();
        put(device.join("vendor"), format!("{:8}\n", disk.vendor).as_bytes());
        put(device.join("state"), b"running\n");
        put(device.join("rescan"), b"");
        if let Some(wwid) = &disk.wwid {
            put(device.join("wwid"), format!("{wwid}\n").as_bytes());
        }
        if let Some(serial) = &disk.serial {
            put(device.join("vpd_pg80"), &page(0x80, serial.as_bytes()));
        }
        let descriptors: Vec<u8> = disk.designators.iter().flat_map(|text| descriptor(text)).collect();
        put(device.join("vpd_pg83"), &page(0x83, &descriptors));
        put(block.join("dev"), format!("{}\n", disk.dev).as_bytes());
        put(block.join("size"), format!("{}\n", disk.size_bytes / 512).as_bytes());
        put(block.join("ro"), if disk.read_only { b"1\n" } else { b"0\n" });
        for (name, bytes) in
            [("logical_block_size", "512"), ("physical_block_size", "512"), ("minimum_io_size", "512"), ("optimal_io_size", "0")]
        {
            put(block.join("queue").join(name), bytes.as_bytes());
        }
        assert!(scsi::disk(root, disk.address).unwrap().is_some(), "the fake disk is whole");
        device
    }
}

fn page(code: u8, content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(content.len()).unwrap().to_be_bytes();
    [&[0, code], &length[..], content].concat()
}

fn descriptor(text: &str) -> Vec<u8> {
    [&[2, 0, 0, u8::try_from(text.len()).unwrap()][..], text.as_bytes()].concat()
}
