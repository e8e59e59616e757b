//! What the tests of this binary share: guests, disks, and waiting for what the guest sees.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use testbed::guest::{self, Guest, GuestOptions, wait};
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

    pub(crate) fn grow(&self, size_bytes: u64) {
        std::fs::File::options().write(true).open(&self.0).unwrap().set_len(size_bytes).unwrap();
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

impl AsRef<Path> for Image {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

/// Waits until the guest's kernel shows disk `lun` with this size; `None`: no such disk.
pub(crate) fn wait_for_size(guest: &Guest, lun: u8, size_bytes: Option<u64>) {
    let mut last = None;
    let seen = wait::until(SEEN_LIMIT, || {
        last = guest.disk_size_bytes(lun)?;
        Ok::<_, anyhow::Error>((last == size_bytes).then_some(()))
    });
    assert!(seen.unwrap().is_some(), "LUN {lun}: {last:?} bytes instead of {size_bytes:?}; {}", guest.quote());
}
