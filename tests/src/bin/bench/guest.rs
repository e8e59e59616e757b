//! In the guest: the release agent on a real kernel with hot-plugged disks, beside the machine's own tools in the same guest.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use proto::VolumeHandle;
use testbed::calls::{Calls, NodeVolume, mount_capability};
use testbed::guest::{self, Guest, GuestOptions, Job, Program, wait, with_libraries};
use testbed::machine::PluggedDrive;
use testbed::tools;
use tonic::Status;

use crate::report::{Report, Side, in_mib, median, say};

const GIB: u64 = 1 << 30;
const RUNS: usize = 5;
/// A hot-plug is seen within half a second; TCG on a loaded machine is slower.
const SEEN_LIMIT: Duration = Duration::from_secs(30);
/// A tool under TCG; mkfs.ext4 of 100 GiB takes some seconds.
const TOOL_LIMIT: Duration = Duration::from_secs(120);
/// The first minutes of a filesystem's life. mkfs.ext4's is zeroed for so long and longer.
const WATCHED: Duration = Duration::from_secs(150);
const TOOLS: [&str; 5] = ["mkfs.ext4", "mkfs.xfs", "blkid", "mount", "fsck.ext4"];
const NODE_ARGS: [&str; 5] =
    ["--csi-address=unix:///csi/csi.sock", "--node-id=bench/101", "--region=region-1", "--zone=pve-1", "--kubelet-dir=/var/lib/kubelet"];

/// A sparse image, gone with its value.
struct Image(PathBuf, u64);

impl Image {
    fn new(size_bytes: u64) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("csi-disk-{}-bench-{number}.raw", std::process::id()));
        std::fs::File::create(&path)?.set_len(size_bytes)?;
        Ok(Self(path, size_bytes))
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

struct Bed {
    guest: Guest,
    calls: Calls,
    agent: Job,
}

fn refused(status: Status) -> anyhow::Error {
    anyhow!("{:?}: {}", status.code(), status.message())
}

impl Bed {
    fn start() -> Result<Self> {
        let mut options = GuestOptions { memory_mib: 512, ..GuestOptions::named("bench") }.with_node();
        for name in TOOLS {
            options.files.extend(with_libraries(Path::new(&tool(name)?))?);
        }
        options.files.sort();
        options.files.dedup();
        let guest = Guest::boot(&options)?;
        let agent = guest.start_node(&NODE_ARGS, &[("LOG_LEVEL", "info")])?;
        let calls = guest.node()?;
        Ok(Self { guest, calls, agent })
    }

    /// Plugged, and seen by the guest's kernel; its name there.
    fn plug(&self, image: &Image, lun: u8, serial: Option<&str>) -> Result<String> {
        let drive = PluggedDrive {
            index: lun,
            volid: format!("local:9999/{lun}"),
            file: image.0.clone(),
            format: "raw".into(),
            wwn: Some(proto::wwn_of_lun(lun)),
            serial: serial.map(str::to_owned),
            ssd: false,
            read_only: false,
            discard: true,
            iothread: true,
        };
        self.guest.machine().plug(&drive).map_err(anyhow::Error::msg)?;
        let seen = wait::until(SEEN_LIMIT, || {
            Ok::<_, anyhow::Error>(
                self.guest.disk_at(lun)?.filter(|_| self.guest.disk_size_bytes(lun).is_ok_and(|size| size == Some(image.1))),
            )
        })?;
        Ok(format!("/dev/{}", seen.with_context(|| format!("LUN {lun} is not seen; {}", self.guest.quote()))?))
    }

    fn unplug(&self, lun: u8) -> Result<()> {
        self.guest.machine().unplug(lun).map_err(anyhow::Error::msg)?;
        let gone = wait::until(SEEN_LIMIT, || Ok::<_, anyhow::Error>(self.guest.disk_at(lun)?.is_none().then_some(())))?;
        gone.with_context(|| format!("LUN {lun} stays; {}", self.guest.quote()))
    }

    fn volume(&self, name: &str, kind: &str, image: &Image, lun: u8) -> Result<NodeVolume> {
        let handle: VolumeHandle = format!("region-1/pve-1/local/9999/vm-9999-{name}.raw").parse().map_err(|error| anyhow!("{error}"))?;
        self.plug(image, lun, Some(&handle.serial()))?;
        let mut volume = NodeVolume::attached(&handle, name, lun, image.1);
        volume.capability = mount_capability(kind);
        self.guest.make_folder(&volume.staging)?;
        Ok(volume)
    }

    /// How long the agent itself says that it took.
    fn stage(&self, volume: &NodeVolume) -> Result<Duration> {
        // `NodeStageVolume: OK after 12 ms`
        let told = || -> Result<Vec<u64>> {
            let log = self.guest.output(self.agent)?.1;
            let lines = log.split("NodeStageVolume: OK after ").skip(1);
            Ok(lines.filter_map(|rest| rest.split_once(" ms")?.0.parse().ok()).collect())
        };
        let before = told()?.len();
        self.calls.node_stage_volume(volume.stage()).map_err(refused)?;
        // Its log comes by another way than its answer.
        let seen = wait::until(SEEN_LIMIT, || Ok::<_, anyhow::Error>(told()?.get(before).copied()))?;
        seen.map(Duration::from_millis).context("the agent's log tells no time of NodeStageVolume")
    }

    fn unstage(&self, volume: &NodeVolume) -> Result<()> {
        self.calls.node_unstage_volume(volume.unstage()).map_err(refused).map(drop)
    }

    /// Runs a tool in the guest; how long it ran there.
    fn run(&self, words: &[&str]) -> Result<Duration> {
        let [name, args @ ..] = words else { return Ok(Duration::ZERO) };
        let path = tool(name)?;
        let ended = self.guest.run(&Program { label: name, root: None, program: &path, args, env: &[] }, TOOL_LIMIT)?;
        let is_good = ended.exit.code == Some(0) || (*name == "blkid" && ended.exit.code == Some(2));
        ensure!(is_good, "{} in the guest: {:?}: {}", words.join(" "), ended.exit, ended.output);
        Ok(Duration::from_micros(ended.exit.took_us))
    }
}

fn tool(name: &str) -> Result<String> {
    tools::program(name).with_context(|| format!("{name} is missing"))
}

pub(crate) fn run(report: &mut Report) -> Result<()> {
    if let Some(why) = guest::unavailable() {
        say(&format!("SKIPPED in the guest: {why}"));
        report.note(format!("Nothing was measured in the guest: {why}."));
        return Ok(());
    }
    let bed = Bed::start()?;
    let kvm = bed.guest.monitor("query-kvm", serde_json::Value::Null)?;
    let accelerator = if kvm.get("enabled").and_then(serde_json::Value::as_bool) == Some(true) {
        "KVM"
    } else {
        "TCG (emulated: its times are for the ratio only)"
    };
    report.note(format!("The guest ran under {accelerator}, Linux {}.", bed.guest.read("/proc/sys/kernel/osrelease")?.trim()));
    stage_times(&bed, report)?;
    bytes_of_xfs(&bed, report)?;
    bytes_of_ext4(&bed, report)?;
    memory(&bed, report)?;
    bed.guest.power_off()
}

const BLKID: [&str; 7] = ["blkid", "-p", "-s", "TYPE", "-o", "export", "DISK"];

fn stage_times(bed: &Bed, report: &mut Report) -> Result<()> {
    let mut seen: [Vec<Duration>; 4] = Default::default();
    let [blank, formatted, their_blank, their_formatted] = &mut seen;
    bed.guest.make_folder("/mnt")?;
    for round in 0..RUNS {
        let image = Image::new(10 * GIB)?;
        let volume = bed.volume(&format!("time-{round}"), "ext4", &image, 1)?;
        blank.push(bed.stage(&volume)?);
        bed.unstage(&volume)?;
        formatted.push(bed.stage(&volume)?);
        bed.unstage(&volume)?;
        bed.unplug(1)?;

        let image = Image::new(10 * GIB)?;
        let disk = bed.plug(&image, 2, None)?;
        let of_disk =
            |words: &[&'static str]| -> Vec<&str> { words.iter().map(|word| if *word == "DISK" { disk.as_str() } else { word }).collect() };
        let steps = |steps: &[&[&'static str]]| -> Result<Duration> { steps.iter().map(|words| bed.run(&of_disk(words))).sum() };
        let mount: &[&'static str] = &["mount", "-t", "ext4", "-o", "defaults", "DISK", "/mnt"];
        their_blank.push(steps(&[&BLKID, &["mkfs.ext4", "-F", "-m0", "DISK"], mount])?);
        bed.guest.unmount("/mnt")?;
        their_formatted.push(steps(&[&BLKID, &["fsck.ext4", "-a", "DISK"], mount])?);
        bed.guest.unmount("/mnt")?;
        bed.unplug(2)?;
    }
    let children = bed.guest.read(&format!("/proc/{0}/task/{0}/children", bed.agent.pid)).unwrap_or_default();
    let processes = Some(children.split_whitespace().count() as u64);
    let [blank, formatted, their_blank, their_formatted] = seen;
    let side = |times: Vec<Duration>, processes| Side { time: median(times), processes, ..Side::default() };
    report.compare(
        "NodeStageVolume of a blank 10 GiB ext4, guest",
        "blkid, mkfs.ext4, mount",
        side(blank, processes),
        side(their_blank, Some(3)),
    );
    report.compare(
        "NodeStageVolume of a formatted one, guest",
        "blkid, fsck.ext4 -a, mount",
        side(formatted, processes),
        side(their_formatted, Some(3)),
    );
    Ok(())
}

fn bytes_of_xfs(bed: &Bed, report: &mut Report) -> Result<()> {
    let image = Image::new(1024 * GIB)?;
    let volume = bed.volume("bytes-xfs", "xfs", &image, 1)?;
    // With an option that no kernel knows it is formatted, and not mounted: each mount of an xfs writes 2 MiB of its own.
    let mut unmountable = volume.stage();
    if let Some(proto::csi::volume_capability::AccessType::Mount(mount)) =
        unmountable.volume_capability.as_mut().and_then(|one| one.access_type.as_mut())
    {
        mount.mount_flags = vec!["no-such-option".into()];
    }
    ensure!(bed.calls.node_stage_volume(unmountable).is_err(), "mounted with an option that there is not");
    let formatted = bed.guest.disk_written_bytes(1)?;
    bed.stage(&volume)?;
    bed.guest.drop_caches()?;
    let mounted = bed.guest.disk_written_bytes(1)?;
    bed.unstage(&volume)?;
    bed.unplug(1)?;
    let image = Image::new(1024 * GIB)?;
    let disk = bed.plug(&image, 2, None)?;
    bed.run(&["mkfs.xfs", "-q", "-f", &disk])?;
    let theirs = bed.guest.disk_written_bytes(2)?;
    bed.unplug(2)?;
    let side = |bytes| Side { written_bytes: Some(bytes), ..Side::default() };
    report.compare("a fresh 1 TiB xfs, guest", "mkfs.xfs", side(formatted), side(theirs));
    report.goal("written for a fresh 1 TiB xfs", 0.2, "MiB", Ok(in_mib(formatted)));
    report.note(format!(
        "Mounting that xfs wrote another {:.2} MiB: the kernel clears the log ahead of its head at every mount.",
        in_mib(mounted - formatted)
    ));
    Ok(())
}

/// Ours and mkfs.ext4's, mounted and left alone beside each other.
fn bytes_of_ext4(bed: &Bed, report: &mut Report) -> Result<()> {
    let images = [Image::new(100 * GIB)?, Image::new(100 * GIB)?];
    let [mine, its] = &images;
    let volume = bed.volume("bytes-ext4", "ext4", mine, 1)?;
    bed.stage(&volume)?;
    let disk = bed.plug(its, 2, None)?;
    bed.run(&["mkfs.ext4", "-q", "-F", "-m0", &disk])?;
    bed.run(&["mount", "-t", "ext4", "-o", "defaults", &disk, "/mnt"])?;
    let written = || -> Result<[u64; 2]> { Ok([bed.guest.disk_written_bytes(1)?, bed.guest.disk_written_bytes(2)?]) };
    let fresh = written()?;
    say(&format!("watching two mounted filesystems for {} s", WATCHED.as_secs()));
    let begun = Instant::now();
    while begun.elapsed() < WATCHED {
        // What the kernel does by itself is what is measured: nothing to wait for.
        std::thread::park_timeout(WATCHED - begun.elapsed());
    }
    bed.guest.drop_caches()?;
    let later = written()?;
    bed.unstage(&volume)?;
    bed.unplug(1)?;
    bed.guest.unmount("/mnt")?;
    bed.unplug(2)?;
    let side = |bytes| Side { written_bytes: Some(bytes), ..Side::default() };
    report.compare("a fresh 100 GiB ext4, guest", "mkfs.ext4", side(fresh[0]), side(fresh[1]));
    report.compare(
        format!("the same after {} s mounted", WATCHED.as_secs()),
        "mkfs.ext4 (the kernel still zeroes)",
        side(later[0]),
        side(later[1]),
    );
    report.goal("written for a fresh 100 GiB ext4 and its first minutes", 6.0, "MiB", Ok(in_mib(later[0])));
    Ok(())
}

/// The agent's peak memory: after all of the above, then after an encrypted stage.
fn memory(bed: &Bed, report: &mut Report) -> Result<()> {
    let peak_mib = || -> Result<f64> {
        let status = bed.guest.read(&format!("/proc/{}/status", bed.agent.pid))?;
        let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        Ok(in_mib(1024 * kib.context("no VmHWM")?))
    };
    report.note(format!("The agent's peak memory after {} bare stages: {:.1} MiB.", 2 * RUNS + 3, peak_mib()?));
    let image = Image::new(GIB)?;
    let mut volume = bed.volume("encrypted", "ext4", &image, 1)?;
    volume.secrets.insert(proto::secrets::PASSPHRASE.into(), "of the bench".into());
    // Made, then opened: argon2id with 64 MiB each time.
    for _ in 0..2 {
        bed.stage(&volume)?;
        bed.unstage(&volume)?;
    }
    bed.unplug(1)?;
    report.goal("peak memory of the agent over an encrypted stage", 72.0, "MiB", Ok(peak_mib()?));
    Ok(())
}
