//! `proxmox-csi-node status`: what is on this machine, for a person who has no shell here. Reads only, and needs no running agent.
//!
//! Each SCSI disk with what it says of itself, what is on it, what was made from it, where it is mounted and whose volume it is;
//! then every disagreement in a sentence (`judge`), and the same as JSON (`print`).

mod judge;
mod print;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use disk::mark::{Mark, Marked, SECTOR_BYTES};

use crate::sys::block::{self, Access, Device};
use crate::sys::mountinfo::{self, Mount};
use crate::sys::scsi::{self, Disk, State};
use crate::sys::{self, Dev, blkid};

/// Volumes that kubelet keeps files of: 29 staged, and each published some times over; what pods left behind beside.
const MAX_CLAIMS: usize = 4096;
/// kubelet's `vol_data.json` has some 500 bytes.
const MAX_CLAIM_BYTES: u64 = 64 << 10;

/// A disk that answers does so within milliseconds, a slow storage within a second or two. All are asked at once.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// By the disks' order; `None`: not yet.
type Answers = Arc<(Mutex<Vec<Option<Result<String, String>>>>, Condvar)>;

/// Where to look.
#[derive(Debug, Clone)]
pub struct Machine {
    /// `/sys`.
    pub sysfs: PathBuf,
    /// `/proc`.
    pub proc: PathBuf,
    /// `/dev`.
    pub devices: PathBuf,
    /// kubelet's folders.
    pub kubelet: Vec<PathBuf>,
}

/// What was made from a disk: a partition, a device-mapper device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// `dm-0`, `sda1`.
    pub device: String,
    /// device-mapper's name of it, in `/dev/mapper`.
    pub name: Option<String>,
    /// device-mapper's UUID.
    pub uuid: Option<String>,
    dev: Dev,
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// What it says of itself.
    pub disk: Disk,
    /// What is on it, or why that cannot be told.
    pub holds: Result<String, String>,
    /// What was made from it.
    pub mappings: Vec<Mapping>,
    /// Where it, or what was made from it, is mounted.
    pub mounts: Vec<Mount>,
    /// The kernel's count of errors in the ext4 on it.
    pub ext4_errors: u64,
    /// Whose it is, by its serial or by where it is mounted.
    pub volume: Option<String>,
}

/// A volume that kubelet keeps at a path: staged (once), published (once per pod), or about to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The volume's handle.
    pub volume: String,
    /// The serial that its disk carries; `None`: the handle is none.
    pub serial: Option<String>,
    /// Where it is, or will be, mounted.
    pub path: PathBuf,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Who this node is, or why that is unknown.
    pub identity: Result<crate::info::Info, String>,
    /// By address.
    pub disks: Vec<Seen>,
    /// What does not fit together.
    pub disagreements: Vec<String>,
}

/// Looks.
///
/// # Errors
/// sysfs or mountinfo cannot be read.
pub fn look(machine: &Machine, configured: &crate::info::Configured) -> Result<Report, sys::Error> {
    let mounts = mountinfo::read(&machine.proc.join("self/mountinfo"))?;
    let claims = claims(&machine.kubelet);
    let mut disks = Vec::new();
    let found = scsi::scan(&machine.sysfs)?;
    let held = ask(machine, &found);
    for (disk, holds) in found.into_iter().zip(held) {
        disks.push(seen(machine, disk, holds, &mounts, &claims)?);
    }
    let mut disagreements = judge::disagreements(&disks, &claims, &mounts);
    let is_gone = |mount: &&Mount| {
        mount.dev.major != 0 && is_kubelets(machine, mount) && sys::is_block_device_there(&machine.sysfs, mount.dev) == Ok(false)
    };
    disagreements.extend(mounts.iter().filter(is_gone).map(judge::gone));
    disagreements.extend(sys::kernel::missing(&machine.proc, &machine.sysfs));
    let identity = crate::info::look(configured, &machine.sysfs).map_err(|unknown| unknown.to_string());
    Ok(Report { identity, disks, disagreements })
}

fn is_kubelets(machine: &Machine, mount: &Mount) -> bool {
    machine.kubelet.iter().any(|folder| mount.point.starts_with(folder) && mount.point != *folder)
}

/// What each disk holds, in their order. One that does not answer, because its storage does not, keeps the others and the report waiting no longer
/// than [`ANSWER_LIMIT`]. The process ends when it does answer: the kernel takes no file away whose read is under way.
fn ask(machine: &Machine, disks: &[Disk]) -> Vec<Result<String, String>> {
    let late = || {
        Err(format!(
            "it does not answer within {} s: look at its storage on Proxmox (this command ends when it does)",
            ANSWER_LIMIT.as_secs()
        ))
    };
    let answers: Answers = Arc::new((Mutex::new(vec![None; disks.len()]), Condvar::new()));
    for (number, disk) in disks.iter().enumerate() {
        let (machine, disk, answers) = (machine.clone(), disk.clone(), Arc::clone(&answers));
        // Without a thread nobody tells, and the disk is said not to answer.
        let _ = std::thread::Builder::new().spawn(move || {
            let held = holds(&machine, &disk);
            let (told, changed) = &*answers;
            if let Some(answer) = told.lock().unwrap_or_else(PoisonError::into_inner).get_mut(number) {
                *answer = Some(held);
            }
            changed.notify_all();
        });
    }
    let (told, changed) = &*answers;
    let told = told.lock().unwrap_or_else(PoisonError::into_inner);
    let waited = changed.wait_timeout_while(told, ANSWER_LIMIT, |told| told.iter().any(Option::is_none));
    let (told, _) = waited.unwrap_or_else(PoisonError::into_inner);
    told.iter().map(|answer| answer.clone().unwrap_or_else(late)).collect()
}

fn seen(machine: &Machine, disk: Disk, holds: Result<String, String>, mounts: &[Mount], claims: &[Claim]) -> Result<Seen, sys::Error> {
    let mappings = mappings(machine, &disk)?;
    let is_from = |mount: &&Mount| mount.dev == disk.dev || mappings.iter().any(|mapping| mapping.dev == mount.dev);
    let mounts: Vec<Mount> = mounts.iter().filter(is_from).cloned().collect();
    let by_serial = |claim: &&Claim| claim.serial.is_some() && claim.serial == disk.serial;
    let by_place = |claim: &&Claim| disk.serial.is_none() && mounts.iter().any(|mount| mount.point == claim.path);
    let volume = claims.iter().find(by_serial).or_else(|| claims.iter().find(by_place)).map(|claim| claim.volume.clone());
    let names = std::iter::once(&disk.name).chain(mappings.iter().map(|mapping| &mapping.device));
    let unknown = |unknown| {
        proto::warn!("status: how many errors a filesystem has is unknown: {unknown}");
        0
    };
    let ext4_errors = names.map(|name| block::ext4_errors(&machine.sysfs, name).unwrap_or_else(unknown)).sum();
    Ok(Seen { holds, mappings, mounts, ext4_errors, volume, disk })
}

/// Partitions and holders.
fn mappings(machine: &Machine, disk: &Disk) -> Result<Vec<Mapping>, sys::Error> {
    let class = machine.sysfs.join("class/block");
    let mut names = scsi::holders(&machine.sysfs, &disk.name)?;
    if let Ok(folder) = std::fs::read_dir(class.join(&disk.name)) {
        let inside = folder.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        names.extend(inside.filter(|name| name.starts_with(&disk.name)));
    }
    names.sort();
    let mapping = |device: String| {
        let folder = class.join(&device);
        let dev = text(&folder.join("dev"))?.parse().ok()?;
        Some(Mapping { name: text(&folder.join("dm/name")), uuid: text(&folder.join("dm/uuid")), dev, device })
    };
    Ok(names.into_iter().filter_map(mapping).collect())
}

/// By our mark, then by libblkid. It proves nothing blank; staging does, with more reads.
fn holds(machine: &Machine, disk: &Disk) -> Result<String, String> {
    if disk.state != State::Running {
        return Err("it is offline".into());
    }
    let path = machine.devices.join(&disk.name);
    let device = Device::open(&path, disk.dev, Access::Shared).map_err(|error| error.to_string())?;
    let mut sector = [0; SECTOR_BYTES];
    device.read_at(0, &mut sector).map_err(|error| error.to_string())?;
    let mark = disk.serial.as_deref().and_then(|serial| Mark::new(serial).ok()).map(|mark| mark.judge(&sector));
    match mark {
        Some(Marked::Ours) => return Ok("an unfinished format of its own volume, at byte 0".into()),
        Some(Marked::Others) => return Ok("an unfinished format of another volume, at byte 0".into()),
        Some(Marked::Damaged) => return Ok("a damaged mark of an unfinished format, at byte 0".into()),
        Some(Marked::No) | None => (),
    }
    let size_bytes = device.size_bytes().map_err(|error| error.to_string())?;
    match blkid::probe(std::os::fd::AsFd::as_fd(&device), &path, size_bytes).map_err(|error| error.to_string())? {
        blkid::Found::Signature(signature) => Ok(signature.to_string()),
        blkid::Found::Ambivalent(all) => Ok(all.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")),
        blkid::Found::Nothing => Ok("nothing that is known".into()),
    }
}

/// kubelet's notes beside the paths that it hands to drivers (pkg/volume/csi, `vol_data.json`).
fn claims(kubelet: &[PathBuf]) -> Vec<Claim> {
    let mut claims = Vec::new();
    for folder in kubelet {
        let csi = folder.join("plugins/kubernetes.io/csi");
        for staged in folders(&csi.join(proto::DRIVER_NAME)) {
            claims.extend(claim(&staged, staged.join("globalmount")));
        }
        for block in folders(&csi.join("volumeDevices")) {
            let name = block.file_name().unwrap_or_default().to_owned();
            claims.extend(claim(&block.join("data"), csi.join("volumeDevices/staging").join(name)));
        }
        for pod in folders(&folder.join("pods")) {
            for published in folders(&pod.join("volumes/kubernetes.io~csi")) {
                claims.extend(claim(&published, published.join("mount")));
            }
        }
    }
    claims.truncate(MAX_CLAIMS);
    claims
}

/// The folders in a folder, sorted; none where there is no such folder.
fn folders(path: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten().take(MAX_CLAIMS);
    let mut folders: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    folders.sort();
    folders
}

fn claim(folder: &Path, path: PathBuf) -> Option<Claim> {
    use std::io::Read;
    let mut json = String::new();
    std::fs::File::open(folder.join("vol_data.json")).ok()?.take(MAX_CLAIM_BYTES).read_to_string(&mut json).ok()?;
    if member(&json, "driverName")? != proto::DRIVER_NAME {
        return None;
    }
    let volume = member(&json, "volumeHandle")?;
    let serial = volume.parse::<proto::VolumeHandle>().ok().map(|handle| handle.serial());
    Some(Claim { volume, serial, path })
}

/// A text member of kubelet's flat object. A text with an escape in it is no name of ours.
fn member(json: &str, key: &str) -> Option<String> {
    let (_, rest) = json.split_once(&format!("\"{key}\""))?;
    let (value, _) = rest.trim_start().strip_prefix(':')?.trim_start().strip_prefix('"')?.split_once('"')?;
    (!value.contains('\\')).then(|| value.to_string())
}

fn text(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_string()).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests;
