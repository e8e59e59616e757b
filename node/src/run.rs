//! The only actor: look → next step → do it → look again, bounded.
//!
//! Everything here blocks and runs on a thread of its own (`service.rs`); a caller that goes away stops nothing half-way.

mod encrypt;
mod expand;
mod health;
mod kept;
mod look;
mod mapping;
mod progress;
mod publish;
mod release;
mod slots;
mod stage;
mod trim;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::error::{Cause, Error};
use crate::format::Stop;
use crate::identity::{self, Found, Want};
use crate::kill;
use crate::request::{Folders, Volume};
use crate::sys::block::{Access, Device};
use crate::sys::scsi::{self, Disk, State};
use crate::sys::{self, mountinfo};
use slots::{MAX_DISK_WORKERS, Slots};

pub use health::{Stats, Usage};
pub use progress::Progress;

/// More steps than the longest honest way through any plan (14, see plan/walk.rs), with stacked mounts to take away.
const MAX_TURNS: usize = 20;
/// kubelet waits two minutes for a node call; a sentence from us within them is better than its "deadline exceeded".
/// QEMU's hot-plug is seen in the guest after 26 to 450 ms (measured with QEMU 7.2 and 10.0).
const DISK_DEADLINE: Duration = Duration::from_secs(30);
/// From a disk's name in sysfs to its first open; milliseconds, but seen to matter on a loaded machine.
const OPEN_DEADLINE: Duration = Duration::from_secs(5);
/// Time for the hot-plug event to do its work before hosts are asked to look, and between two such requests.
const HOST_RESCAN_EVERY: Duration = Duration::from_secs(3);
/// A resize is seen in the guest within 30 ms; this is for the lost event and the slow host.
const SIZE_DEADLINE: Duration = Duration::from_secs(20);
/// Between two requests to read a disk's size again.
const SIZE_RESCAN_EVERY: Duration = Duration::from_secs(1);
/// For containers that end just now to let go of their mounts.
const RELEASE_DEADLINE: Duration = Duration::from_secs(10);
/// Between two looks: short against a hot-plug, long against a scan of sysfs (under 1 ms).
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// File of the volumes whose class says `discard: ignore`, beside the socket.
const SPARED: &str = "discard-ignore";
/// The same of those whose passphrase is still to be replaced.
const ROTATIONS: &str = "rotations-outstanding";

/// The machine that we work on, and where to look.
#[derive(Debug)]
pub struct Node {
    sysfs: PathBuf,
    mountinfo: PathBuf,
    devices: PathBuf,
    proc: PathBuf,
    folders: Folders,
    workers: Slots,
    /// One key derivation at a time.
    kdf: Slots,
    /// Legacy disks that are being mounted; see `stage.rs`.
    mounting: Mutex<Vec<sys::Dev>>,
    /// Staging paths and the serials of the volumes that this process has staged there; see `stage.rs`.
    staged: Mutex<BTreeMap<PathBuf, String>>,
    /// By the volume's serial; see `stage.rs`.
    unstaging: Mutex<BTreeMap<String, stage::Known>>,
    /// See `health.rs`.
    health: Mutex<Vec<health::Known>>,
    trimming: trim::Trimming,
    /// Volumes whose passphrase is still to be replaced; see `encrypt.rs`.
    rotations: kept::Kept,
    stop: Stop,
    /// The Kubernetes node's, for lines that a person is to type; empty: unknown.
    name: String,
}

impl Node {
    /// This machine.
    #[must_use]
    pub fn new(folders: Folders) -> Self {
        Self {
            sysfs: "/sys".into(),
            mountinfo: "/proc/self/mountinfo".into(),
            devices: "/dev".into(),
            proc: "/proc".into(),
            folders,
            workers: Slots::new(MAX_DISK_WORKERS),
            kdf: Slots::new(1),
            mounting: Mutex::default(),
            staged: Mutex::default(),
            unstaging: Mutex::default(),
            health: Mutex::default(),
            trimming: trim::Trimming::default(),
            rotations: kept::Kept::default(),
            stop: Stop::default(),
            name: String::new(),
        }
    }

    /// The same, as this Kubernetes node (`name`, or `name/vmid`).
    #[must_use]
    pub fn called(mut self, node_id: &str) -> Self {
        self.name = node_id.split('/').next().unwrap_or_default().to_string();
        self
    }

    /// The same, which remembers in that folder what no kernel tells.
    #[must_use]
    pub fn remembering_in(mut self, folder: &Path) -> Self {
        self.trimming = trim::Trimming::kept_at(folder.join(SPARED));
        self.rotations = kept::Kept::at(folder.join(ROTATIONS), encrypt::OUTSTANDING);
        self
    }

    /// To tell the work that is under way that the process is about to end.
    #[must_use]
    pub fn stop(&self) -> Stop {
        self.stop.clone()
    }

    /// Probes and formats whose disks do not answer.
    #[must_use]
    pub fn stuck(&self) -> usize {
        self.workers.stuck()
    }

    /// Where sysfs is.
    #[must_use]
    pub fn sysfs(&self) -> &Path {
        &self.sysfs
    }

    /// Where kubelet's paths lie.
    #[must_use]
    pub fn folders(&self) -> &Folders {
        &self.folders
    }

    /// Waits for the volume's disk, asking the hosts to look where the kernel has not seen it by itself.
    fn await_disk(&self, want: &Want) -> Result<Disk, Cause> {
        let mut asked = Instant::now();
        kill::inside("wait");
        let found = poll(DISK_DEADLINE, || {
            let disks = scsi::scan(&self.sysfs)?;
            let why = match identity::find(want, &disks, &self.mounted_devices()?)? {
                Found::Disk(disk) => return Ok(Ok(disk.clone())),
                Found::NotYet(why) => why,
            };
            if asked.elapsed() >= HOST_RESCAN_EVERY {
                let hosts = scsi::rescan_hosts(&self.sysfs)?;
                proto::info!("{}: asked {hosts} virtio-scsi hosts to look for new disks: {why}", want.serial);
                asked = Instant::now();
            }
            Ok::<_, Cause>(Err(why))
        })?;
        found.map_err(|why| Cause::NoDisk { waited: DISK_DEADLINE, why })
    }

    /// Takes an offline disk up again: the reference driver leaves disks so when it unstages them.
    fn set_running(&self, disk: &Disk) -> Result<(), Cause> {
        kill::called("write");
        match scsi::set_running(&self.sysfs, disk) {
            Err(error) if scsi::is_gone(error.errno) => return Err(Cause::OtherDiskNow { disk: identity::name(disk) }),
            done => done?,
        }
        kill::inside("written");
        proto::info!("{}: was offline, set running", identity::name(disk));
        match scsi::disk(&self.sysfs, disk.address)? {
            Some(now) if now.state == State::Running => Ok(()),
            Some(_) => Err(Cause::StaysOffline { disk: identity::name(disk) }),
            None => Err(Cause::OtherDiskNow { disk: identity::name(disk) }),
        }
    }

    /// Opens a disk that was identified by what sysfs says of it, and asks again once it is open: from then on the kernel
    /// gives its number to no other disk, so what is said of it stays true.
    fn open(&self, disk: &Disk, access: Access) -> Result<Device, Cause> {
        let device = Device::open(&self.node_of(disk), disk.dev, access)?;
        let same = scsi::disk(&self.sysfs, disk.address)?.is_some_and(|now| now.is(disk));
        if same { Ok(device) } else { Err(Cause::OtherDiskNow { disk: identity::name(disk) }) }
    }

    /// The same for a disk that may have come this moment: the kernel shows it in sysfs and `/dev` a little before it can be opened
    /// (`device_add_disk` in block/genhd.c makes the device before the block device: ENXIO between).
    fn open_new(&self, disk: &Disk, access: Access) -> Result<Device, Cause> {
        poll(OPEN_DEADLINE, || match self.open(disk, access) {
            Ok(device) => Ok(Ok(device)),
            Err(Cause::Sys(error)) if matches!(error.errno, Errno::NXIO | Errno::NOENT) => Ok(Err(Cause::Sys(error))),
            Err(cause) => Err(cause),
        })?
    }

    /// `/dev/sda`.
    fn node_of(&self, disk: &Disk) -> PathBuf {
        self.devices.join(&disk.name)
    }

    fn mounts(&self) -> Result<Vec<mountinfo::Mount>, sys::Error> {
        mountinfo::read(&self.mountinfo)
    }

    /// What is mounted from where, in kubelet's folders or elsewhere. For a mapping the disk below it.
    fn mounted_devices(&self) -> Result<Vec<(sys::Dev, PathBuf)>, Cause> {
        self.below(self.mounts()?.into_iter().map(|mount| (mount.dev, mount.point)))
    }

    /// How much memory there is for a key derivation.
    fn memory(&self) -> Result<sys::memory::Room, sys::Error> {
        sys::memory::room(&self.proc, &self.sysfs.join("fs/cgroup"))
    }

    /// The path with the links in its folder resolved; `None`: its folder is not there. Never outside kubelet's folders.
    fn real(&self, path: &Path) -> Result<Option<PathBuf>, Cause> {
        let real = match sys::mount::real(path) {
            Ok(real) => real,
            Err(error) if error.errno == Errno::NOENT => return self.real_below(path).map(|()| None),
            Err(error) => return Err(error.into()),
        };
        if self.is_inside(&real) { Ok(Some(real)) } else { Err(Cause::Outside { real }) }
    }

    /// For a path whose folder is not there, and would be made: what is there of it must not lead outside either.
    fn real_below(&self, path: &Path) -> Result<(), Cause> {
        let ours = |folder: &&Path| self.folders.contain(folder);
        for folder in path.ancestors().skip(1).take_while(ours) {
            match std::fs::canonicalize(folder) {
                Ok(real) if self.is_inside(&real) => return Ok(()),
                Ok(real) => return Err(Cause::Outside { real }),
                Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => (),
                Err(cause) => return Err(sys::Error::io("realpath", folder)(cause).into()),
            }
        }
        Ok(())
    }

    /// Whether a real path lies in kubelet's folders. Such a folder may itself be a link (`/var/lib/kubelet` → `/data/kubelet`).
    fn is_inside(&self, real: &Path) -> bool {
        self.folders.iter().filter_map(|folder| std::fs::canonicalize(folder).ok()).any(|folder| real != folder && real.starts_with(folder))
    }
}

/// Looks until there is something, or the time is up: then the last reason why not. Looks once more at the end.
fn poll<T, W, E>(deadline: Duration, mut look: impl FnMut() -> Result<Result<T, W>, E>) -> Result<Result<T, W>, E> {
    let begun = Instant::now();
    loop {
        let late = begun.elapsed() >= deadline;
        match look()? {
            Ok(found) => return Ok(Ok(found)),
            Err(why) if late => return Ok(Err(why)),
            // Not a sleep in hope: what is waited for is looked at again, until the deadline.
            Err(_) => std::thread::park_timeout(LOOK_EVERY),
        }
    }
}

/// For an error outside any `Result` chain.
fn failed(doing: &'static str, volume: &Volume, step: &'static str, cause: impl Into<Cause>) -> Error {
    Error { doing, volume: volume.to_string(), step, cause: Box::new(cause.into()) }
}

#[cfg(test)]
mod tests;
