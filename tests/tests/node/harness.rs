//! What the tests of this binary share: guests, disks, and waiting for what the guest sees.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use proto::VolumeHandle;
use serde_json::json;
use testbed::calls::{Calls, NodeVolume};
use testbed::guest::{self, Guest, GuestOptions, Job, ScsiHardware, wait};
use testbed::machine::PluggedDrive;
use testbed::tools;

pub(crate) const MIB: u64 = 1 << 20;
/// A plug or a resize is seen in the guest within half a second; TCG on a loaded machine is slower.
pub(crate) const SEEN_LIMIT: Duration = Duration::from_secs(20);

/// `None`, after saying so, where guests cannot run.
pub(crate) fn boot(options: &GuestOptions) -> Option<Guest> {
    match guest::unavailable() {
        Some(why) => {
            tools::skipped(&why);
            None
        }
        None => Some(Guest::boot(options).unwrap()),
    }
}

/// A disk image on this host, gone with its value.
#[derive(Debug)]
pub(crate) struct Image(pub(crate) PathBuf);

impl Image {
    pub(crate) fn new(size_bytes: u64) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("csi-disk-{}-{number}.raw", std::process::id()));
        std::fs::File::create(&path).unwrap().set_len(size_bytes).unwrap();
        Self(path)
    }

    pub(crate) fn resize(&self, size_bytes: u64) {
        std::fs::File::options().write(true).open(&self.0).unwrap().set_len(size_bytes).unwrap();
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        std::fs::metadata(&self.0).unwrap().len()
    }

    /// What is really on the host's disk of it.
    pub(crate) fn allocated_bytes(&self) -> u64 {
        std::fs::metadata(&self.0).unwrap().blocks() * 512
    }

    pub(crate) fn write_at(&self, offset: u64, bytes: &[u8]) {
        std::fs::File::options().write(true).open(&self.0).unwrap().write_all_at(bytes, offset).unwrap();
    }

    pub(crate) fn read_at(&self, offset: u64, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        std::fs::File::open(&self.0).unwrap().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    /// All of it, to see whether anything was written.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.0).unwrap()
    }

    /// As the controller has it plugged at slot `lun`.
    pub(crate) fn drive(&self, lun: u8, serial: Option<&str>) -> PluggedDrive {
        PluggedDrive {
            index: lun,
            volid: format!("local:9999/{}", self.0.file_name().unwrap().display()),
            file: self.0.clone(),
            format: "raw".into(),
            wwn: Some(proto::wwn_of_lun(lun)),
            serial: serial.map(str::to_owned),
            ssd: false,
            read_only: false,
            discard: true,
            iothread: true,
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Waits until the guest's kernel shows disk `lun` with this size; `None`: no such disk.
pub(crate) fn wait_for_size(guest: &Guest, lun: u8, size_bytes: Option<u64>) {
    let mut last = None;
    // Behind a PCIe root port, as on aarch64's machine, each plug and unplug waits 5 s for somebody who might press the attention button again
    // (pciehp_ctrl.c), one after the other; and that machine is always emulated.
    let limit = if guest.runs_this_hosts_programs() { SEEN_LIMIT } else { 4 * SEEN_LIMIT };
    let seen = wait::until(limit, || {
        last = guest.disk_size_bytes(lun)?;
        Ok::<_, anyhow::Error>((last == size_bytes).then_some(()))
    });
    assert!(seen.unwrap().is_some(), "LUN {lun}: {last:?} bytes instead of {size_bytes:?} within {limit:?}; {}", guest.quote());
}

/// A guest with the node agent running in it.
pub(crate) struct Agent {
    pub(crate) guest: Guest,
    pub(crate) calls: Calls,
    pub(crate) job: Job,
}

/// Beside the agent with points; in its root.
const RELEASE: &str = "/proxmox-csi-node-release";
/// The end of a hold; in the agent's own root.
const HOLD_UNTIL: &str = "/csi/go";
pub(crate) const NODE_ID: &str = "guest-1/101";

impl Agent {
    /// `None`, after saying so, where guests cannot run.
    pub(crate) fn start(name: &str) -> Option<Self> {
        Self::start_on(&GuestOptions::named(name).with_node())
    }

    /// The same on a machine of another kind.
    pub(crate) fn start_on(options: &GuestOptions) -> Option<Self> {
        let guest = boot(options)?;
        let job = start_node(&guest, &[]);
        let calls = guest.node().unwrap();
        Some(Self { guest, calls, job })
    }

    /// With the agent that the tests can hold, hurry and kill: one SCSI controller for all disks. Beside it the release, for `restart_release`.
    pub(crate) fn start_with_points(name: &str) -> Option<Self> {
        let files = vec![
            (format!("{}/proxmox-csi-node", guest_init::NODE_ROOT), tools::kill_points_binary()),
            (format!("{}{RELEASE}", guest_init::NODE_ROOT), tools::release_binary("proxmox-csi-node")),
        ];
        Self::start_on(&GuestOptions { files, scsi_hardware: ScsiHardware::VirtioScsiPci, ..GuestOptions::named(name) })
    }

    /// From an agent with points to the release binary, as an upgrade does.
    pub(crate) fn restart_release(&mut self) {
        self.guest.signal(self.job, 9).unwrap();
        self.guest.wait(self.job, SEEN_LIMIT).unwrap();
        self.job = start_release(&self.guest);
    }

    /// SIGKILL, and a new one.
    pub(crate) fn restart(&mut self) {
        self.restart_with(&[]);
    }

    /// The same, with this environment beside the usual one.
    pub(crate) fn restart_with(&mut self, env: &[(&str, &str)]) {
        self.guest.signal(self.job, 9).unwrap();
        self.guest.wait(self.job, SEEN_LIMIT).unwrap();
        self.job = start_node(&self.guest, env);
    }

    /// One of those with points, which stays at this one until `let_go`.
    pub(crate) fn restart_to_hold(&mut self, at: &str, env: &[(&str, &str)]) {
        let _ = self.guest.remove(&format!("/node{HOLD_UNTIL}"));
        self.restart_with(&[&[("PROXMOX_CSI_HOLD_AT", at), ("PROXMOX_CSI_HOLD_UNTIL", HOLD_UNTIL)], env].concat());
    }

    pub(crate) fn wait_until_held(&self, at: &str) {
        let line = format!("held at {at}\n");
        let held = wait::until(SEEN_LIMIT, || Ok::<_, ()>(self.log().contains(&line).then_some(())));
        assert_eq!(held, Ok(Some(())), "{}", self.log());
    }

    pub(crate) fn let_go(&self) {
        self.guest.write(&format!("/node{HOLD_UNTIL}"), b"").unwrap();
    }

    /// What the running agent has written so far.
    pub(crate) fn log(&self) -> String {
        self.guest.output(self.job).unwrap().1
    }

    /// Plugs the volume's disk at `lun` and makes kubelet's folders for it.
    pub(crate) fn attach(&self, handle: &VolumeHandle, image: &Image, lun: u8) -> NodeVolume {
        self.guest.machine().plug(&image.drive(lun, Some(&handle.serial()))).unwrap();
        self.volume(handle, image, lun)
    }

    /// The same without the plugging.
    pub(crate) fn volume(&self, handle: &VolumeHandle, image: &Image, lun: u8) -> NodeVolume {
        let name = handle.disk.rsplit('/').next().unwrap().trim_end_matches(".raw");
        let volume = NodeVolume::attached(handle, name, lun, image.size_bytes());
        self.guest.make_folder(&volume.staging).unwrap();
        self.guest.make_folder(volume.target.rsplit_once('/').unwrap().0).unwrap();
        volume
    }

    pub(crate) fn detach(&self, lun: u8) {
        self.guest.machine().unplug(lun).unwrap();
        wait_for_size(&self.guest, lun, None);
    }

    pub(crate) fn stage(&self, volume: &NodeVolume) {
        self.calls.node_stage_volume(volume.stage()).unwrap_or_else(|status| panic!("stage: {status:?}; {}", self.guest.quote()));
    }

    pub(crate) fn publish(&self, volume: &NodeVolume) {
        self.calls.node_publish_volume(volume.publish()).unwrap_or_else(|status| panic!("publish: {status:?}; {}", self.guest.quote()));
    }

    /// How fast disk `lun` is: QEMU's throttle limits (`{}`: as fast as it can).
    pub(crate) fn throttle(&self, lun: u8, limits: serde_json::Value) {
        let arguments = json!({ "path": format!("/objects/throttle-drive-scsi{lun}"), "property": "limits", "value": limits });
        self.guest.monitor("qom-set", arguments).unwrap();
    }

    /// Unpublish and unstage.
    pub(crate) fn put_away(&self, volume: &NodeVolume) {
        self.calls
            .node_unpublish_volume(volume.unpublish())
            .unwrap_or_else(|status| panic!("unpublish: {status:?}; {}", self.guest.quote()));
        self.calls.node_unstage_volume(volume.unstage()).unwrap_or_else(|status| panic!("unstage: {status:?}; {}", self.guest.quote()));
    }

    /// What is mounted at exactly this path: filesystem types, the lowest first.
    pub(crate) fn mounted_at(&self, path: &str) -> Vec<String> {
        let path = format!("/node{path}");
        let mounts = self.guest.mounts_below(&path).unwrap();
        mounts.into_iter().filter(|(point, _)| *point == path).map(|(_, kind)| kind).collect()
    }
}

const ARGS: [&str; 6] =
    ["--csi-address=unix:///csi/csi.sock", "--node-id", NODE_ID, "--region=region-1", "--zone=pve-1", "--kubelet-dir=/var/lib/kubelet"];

/// The node agent, with this environment beside the usual one.
pub(crate) fn start_node(guest: &Guest, env: &[(&str, &str)]) -> Job {
    guest.start_node(&ARGS, &[&[("LOG_LEVEL", "debug")], env].concat()).unwrap()
}

/// The release where the guest has both builds.
pub(crate) fn start_release(guest: &Guest) -> Job {
    guest.start_node_of(RELEASE, &ARGS, &[("LOG_LEVEL", "debug")]).unwrap()
}

pub(crate) fn handle(name: &str) -> VolumeHandle {
    format!("region-1/pve-1/local/9999/vm-9999-pvc-{name}.raw").parse().unwrap()
}

/// e2fsck's word on an image that no guest has: 0 is clean.
pub(crate) fn assert_clean(image: &Image) {
    assert_clean_file(&image.0);
}

pub(crate) fn assert_clean_file(image: &Path) {
    let Some(e2fsck) = tools::program("e2fsck") else { return tools::skipped("e2fsck is missing: the image is not judged") };
    let output = std::process::Command::new(e2fsck).arg("-fn").arg(image).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
}
