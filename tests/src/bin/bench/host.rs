//! On this machine: each work by our code and by the machine's own tools, in turns, each time on a fresh disk (a loop device over a
//! sparse file, on the machine's disk or in its memory).

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use testbed::tools;

use crate::report::{Report, Side, in_mib, median, say};

const GIB: u64 = 1 << 30;
/// Runs of each side; of those that take seconds, fewer.
const RUNS: usize = 7;
const FEW_RUNS: usize = 3;
const PASSPHRASE: &[u8] = b"of the bench";

/// A folder whose files are in memory (tmpfs).
const MEMORY: &str = "/dev/shm";

/// Where the disk's bytes are kept.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Medium {
    /// The machine's own disk: what it takes to flush is in every time.
    Disk,
    /// Flushes take nothing: what is left is the work itself.
    Memory,
}

/// A fresh disk of zeros, gone with its value.
struct Disk {
    file: PathBuf,
    device: String,
    folder: PathBuf,
}

impl Disk {
    fn new(size_bytes: u64, medium: Medium) -> Result<Self> {
        let place = match medium {
            Medium::Disk => std::env::temp_dir(),
            Medium::Memory => PathBuf::from(MEMORY),
        };
        // The name is one of those that the test bed sweeps when its process has ended.
        let file = place.join(format!("csi-disk-{}-bench.raw", std::process::id()));
        let folder = file.with_extension("mount");
        std::fs::create_dir_all(&folder)?;
        std::fs::File::create(&file)?.set_len(size_bytes)?;
        let device = output(&["losetup", "--find", "--show", &file.display().to_string()])?.trim().to_owned();
        Ok(Self { file, device, folder })
    }

    fn written_bytes(&self) -> Result<u64> {
        std::fs::File::open(&self.device)?.sync_all()?;
        let stat = std::fs::read_to_string(format!("/sys/block/{}/stat", self.device.trim_start_matches("/dev/")))?;
        Ok(512 * stat.split_whitespace().nth(6).context("stat without sectors written")?.parse::<u64>()?)
    }

    fn fill_in(&self, command: &[&str]) -> Vec<String> {
        command.iter().map(|word| word.replace("DISK", &self.device).replace("FOLDER", &self.folder.display().to_string())).collect()
    }

    fn is_mounted(&self) -> bool {
        std::fs::read_to_string("/proc/self/mounts").is_ok_and(|mounts| mounts.contains(&format!("{} ", self.folder.display())))
    }

    fn unmount(&self) {
        if self.is_mounted() {
            let _ = output(&["umount", &self.folder.display().to_string()]);
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.unmount();
        let _ = output(&["losetup", "--detach", &self.device]);
        let _ = std::fs::remove_file(&self.file);
        let _ = std::fs::remove_dir(&self.folder);
    }
}

fn output(words: &[&str]) -> Result<String> {
    let [program, args @ ..] = words else { return Ok(String::new()) };
    let path = if program.contains('/') {
        (*program).to_owned()
    } else {
        tools::program(program).with_context(|| format!("{program} is missing"))?
    };
    let output = Command::new(path).args(args).env("LC_ALL", "C").stdin(Stdio::null()).output().with_context(|| words.join(" "))?;
    let code = output.status.code();
    // blkid answers 2 for a disk that holds nothing.
    let is_good = code == Some(0) || (code == Some(2) && words.iter().any(|word| word.ends_with("blkid")));
    ensure!(is_good, "{}: {code:?}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The words of some commands that do one work; DISK and FOLDER stand for the disk and a folder to mount it at.
type Work<'a> = &'a [&'a [&'a str]];

/// How a side's time is taken.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Clock {
    /// From the start of its first process to the end of its last.
    Outside,
    /// Its own (`total_us=`): the agent runs already, and starts no program.
    Own,
}

struct Contest<'a> {
    size_bytes: u64,
    /// Done before the clock starts.
    prepare: Work<'a>,
    work: Work<'a>,
    clock: Clock,
    medium: Medium,
}

impl<'a> Contest<'a> {
    fn timed_outside(gib: u64, prepare: Work<'a>, work: Work<'a>) -> Self {
        Self { size_bytes: gib * GIB, prepare, work, clock: Clock::Outside, medium: Medium::Disk }
    }

    fn timed_by_itself(gib: u64, prepare: Work<'a>, work: Work<'a>) -> Self {
        Self { clock: Clock::Own, ..Self::timed_outside(gib, prepare, work) }
    }

    fn on(self, medium: Medium) -> Self {
        Self { medium, ..self }
    }

    /// A fresh disk, prepared.
    fn disk(&self) -> Result<Disk> {
        let disk = Disk::new(self.size_bytes, self.medium)?;
        for command in self.prepare {
            perform(&disk, &[], command)?;
        }
        disk.unmount();
        Ok(disk)
    }

    fn run(&self) -> Result<(Duration, u64)> {
        let disk = self.disk()?;
        let before = disk.written_bytes()?;
        let begun = Instant::now();
        let mut said = String::new();
        for command in self.work {
            said = perform(&disk, &[], command)?;
        }
        let mut took = begun.elapsed();
        if self.clock == Clock::Own {
            let own = said.split("total_us=").nth(1).and_then(|rest| rest.trim().parse().ok());
            took = Duration::from_micros(own.with_context(|| format!("no total_us= in {said:?}"))?);
        }
        Ok((took, disk.written_bytes()? - before))
    }

    /// Peak memory by time(1), programs started by strace(1): both slow what they watch, so in runs of their own.
    fn watch(&self) -> Result<(u64, u64)> {
        let disk = self.disk()?;
        let notes = disk.file.with_extension("notes");
        let place = notes.display().to_string();
        let mut peak_kib = 0;
        for command in self.work {
            perform(&disk, &["/usr/bin/time", "-q", "-f", "%M", "-o", &place], command)?;
            peak_kib = peak_kib.max(std::fs::read_to_string(&notes)?.trim().parse()?);
        }
        drop(disk);
        let disk = self.disk()?;
        let mut processes = 0;
        for command in self.work {
            perform(&disk, &["strace", "-f", "-qq", "-z", "-e", "trace=execve", "-o", &place], command)?;
            processes += std::fs::read_to_string(&notes)?.matches("execve(").count() as u64;
        }
        std::fs::remove_file(&notes)?;
        let embedded = u64::from(self.clock == Clock::Own);
        Ok((peak_kib, processes - embedded))
    }
}

fn perform(disk: &Disk, before: &[&str], command: &[&str]) -> Result<String> {
    let command = disk.fill_in(command);
    let mut words: Vec<String> = before.iter().map(|word| (*word).to_owned()).collect();
    // time(1) and strace(1) look for it on PATH, which may lack /usr/sbin.
    let program = command.first().context("an empty command")?;
    words.push(if program.contains('/') {
        program.clone()
    } else {
        tools::program(program).with_context(|| format!("{program} is missing"))?
    });
    words.extend(command.into_iter().skip(1));
    output(&words.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Both sides in turns, so that what else the machine does befalls both.
fn compete(runs: usize, ours: &Contest<'_>, theirs: &Contest<'_>) -> Result<(Side, Side)> {
    let mut seen = [Vec::new(), Vec::new()];
    for _ in 0..runs {
        for (contest, seen) in [ours, theirs].into_iter().zip(&mut seen) {
            seen.push(contest.run()?);
        }
    }
    let [ours_seen, theirs_seen] = seen;
    let side = |contest: &Contest<'_>, seen: Vec<(Duration, u64)>| -> Result<Side> {
        let (peak_kib, processes) = contest.watch()?;
        let (times, written): (Vec<_>, _) = seen.into_iter().unzip();
        let fastest = times.iter().min().copied();
        Ok(Side { time: median(times), fastest, written_bytes: median(written), peak_kib: Some(peak_kib), processes: Some(processes) })
    };
    Ok((side(ours, ours_seen)?, side(theirs, theirs_seen)?))
}

/// Our examples, built as the binaries are.
struct Ours {
    mkfs: String,
    luks: String,
    stage: String,
}

pub(crate) fn run(examples: &Path, report: &mut Report) -> Result<()> {
    sweep();
    if let Err(why) = Disk::new(1 << 20, Medium::Disk).and_then(|_| Disk::new(1 << 20, Medium::Memory)) {
        say(&format!("SKIPPED on the host: a loop device is needed, and root for it: {why:#}"));
        report.note("Nothing was measured on the host: no loop devices.");
        return Ok(());
    }
    let example = |name: &str| examples.join(name).display().to_string();
    let ours = Ours { mkfs: example("mkfs"), luks: example("luks"), stage: example("stage") };
    make(&ours, report)?;
    probe(&ours, report)?;
    stage(&ours, report)?;
    luks(&ours, report)
}

/// Lets go of the loop devices of runs that were killed.
fn sweep() {
    let devices = output(&["losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE"]).unwrap_or_default();
    for line in devices.lines() {
        let Some((device, file)) = line.trim().split_once(char::is_whitespace) else { continue };
        let name = file.rsplit('/').next().unwrap_or_default();
        let pid = name.strip_prefix("csi-disk-").and_then(|rest| rest.split_once("-bench.raw")).map(|(pid, _)| pid);
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = output(&["losetup", "--detach", device]);
        }
    }
}

const UUID: &str = "01234567-89ab-cdef-0123-456789abcdef";

fn make(ours: &Ours, report: &mut Report) -> Result<()> {
    let ext4 = |rest: &[&'static str]| -> Vec<&str> {
        [&[ours.mkfs.as_str(), "ext4", "--uuid", UUID, "--hash-seed", UUID, "--time", "1700000000"], rest, &["DISK"]].concat()
    };
    let xfs = |rest: &[&'static str]| -> Vec<&str> {
        [&[ours.mkfs.as_str(), "xfs", "--uuid", UUID, "--time", "1700000000"], rest, &["DISK"]].concat()
    };
    let mkfs_ext4: &[&str] = &["mkfs.ext4", "-q", "-F", "-m0", "DISK"];
    let prezeroed: &[&str] = &["mkfs.ext4", "-q", "-F", "-m0", "-E", "assume_storage_prezeroed=1,nodiscard", "DISK"];
    let mkfs_xfs: &[&str] = &["mkfs.xfs", "-q", "-f", "DISK"];
    let cases = [
        ("ext4, 10 GiB of zeros", 10, ext4(&["--prezeroed"]), "mkfs.ext4", mkfs_ext4),
        ("ext4, 10 GiB of zeros", 10, ext4(&["--prezeroed"]), "mkfs.ext4, told of the zeros", prezeroed),
        ("ext4, 10 GiB, unsure", 10, ext4(&[]), "mkfs.ext4", mkfs_ext4),
        ("ext4, 100 GiB of zeros", 100, ext4(&["--prezeroed"]), "mkfs.ext4", mkfs_ext4),
        ("ext4, 100 GiB of zeros", 100, ext4(&["--prezeroed"]), "mkfs.ext4, told of the zeros", prezeroed),
        ("ext4, 1 TiB of zeros", 1024, ext4(&["--prezeroed"]), "mkfs.ext4", mkfs_ext4),
        ("xfs, 10 GiB of zeros", 10, xfs(&["--prezeroed"]), "mkfs.xfs", mkfs_xfs),
        ("xfs, 10 GiB, unsure", 10, xfs(&[]), "mkfs.xfs", mkfs_xfs),
        ("xfs, 1 TiB of zeros", 1024, xfs(&["--prezeroed"]), "mkfs.xfs", mkfs_xfs),
    ];
    for (what, gib, ours, beside, theirs) in cases {
        let (ours, theirs) = compete(RUNS, &Contest::timed_outside(gib, &[], &[&ours]), &Contest::timed_outside(gib, &[], &[theirs]))?;
        report.compare(format!("make {what}"), beside, ours, theirs);
    }
    Ok(())
}

fn probe(ours: &Ours, report: &mut Report) -> Result<()> {
    let mkfs: &[&str] = &["mkfs.ext4", "-q", "-F", "-m0", "DISK"];
    let (probe, blkid): (&[&str], &[&str]) =
        (&[&ours.stage, "DISK"], &["blkid", "-p", "-s", "TYPE", "-s", "PTTYPE", "-o", "export", "DISK"]);
    for (what, prepare) in [("a blank disk", &[][..]), ("an ext4", &[mkfs][..])] {
        let (ours, theirs) = compete(RUNS, &Contest::timed_outside(10, prepare, &[probe]), &Contest::timed_outside(10, prepare, &[blkid]))?;
        report.compare(format!("recognise {what}, as a program"), "blkid -p", ours, theirs);
    }
    Ok(())
}

fn stage(ours: &Ours, report: &mut Report) -> Result<()> {
    const BLKID: &[&str] = &["blkid", "-p", "-s", "TYPE", "-s", "PTTYPE", "-o", "export", "DISK"];
    const EXT4: &[&str] = &["mkfs.ext4", "-F", "-m0", "DISK"];
    const XFS: &[&str] = &["mkfs.xfs", "-f", "DISK"];
    for (filesystem, mkfs, medium) in [("ext4", EXT4, Medium::Disk), ("ext4", EXT4, Medium::Memory), ("xfs", XFS, Medium::Disk)] {
        let staged: &[&str] = &[&ours.stage, "--fs", filesystem, "--mount", "FOLDER", "DISK"];
        let mount: &[&str] = &["mount", "-t", filesystem, "-o", "defaults", "DISK", "FOLDER"];
        let kind = if medium == Medium::Memory { format!("{filesystem} in memory") } else { filesystem.to_owned() };
        let (mine, theirs) = compete(
            RUNS,
            &Contest::timed_by_itself(10, &[], &[staged]).on(medium),
            &Contest::timed_outside(10, &[], &[BLKID, mkfs, mount]).on(medium),
        )?;
        report.compare(format!("stage a blank 10 GiB {kind}"), format!("blkid, mkfs.{filesystem}, mount"), mine, theirs);
        let fsck: &[&str] = &["fsck", "-a", "DISK"];
        let (again, beside) = compete(
            RUNS,
            &Contest::timed_by_itself(10, &[staged], &[staged]).on(medium),
            &Contest::timed_outside(10, &[staged], &[BLKID, fsck, mount]).on(medium),
        )?;
        report.compare(format!("stage a formatted 10 GiB {kind}"), "blkid, fsck -a, mount", again, beside);
        if medium == Medium::Memory {
            let ms = |side: &Side| side.fastest.map(|time| time.as_secs_f64() * 1e3).ok_or_else(|| "no time".to_owned());
            report.goal("stage of a blank 10 GiB ext4, host, disk in memory, fastest run", 12.0, "ms", ms(&mine));
            report.goal("stage of a formatted 10 GiB ext4, host, disk in memory, fastest run", 4.0, "ms", ms(&again));
        }
    }
    Ok(())
}

fn luks(ours: &Ours, report: &mut Report) -> Result<()> {
    let secret = std::env::temp_dir().join(format!("csi-disk-{}-bench.secret", std::process::id()));
    std::fs::write(&secret, PASSPHRASE)?;
    let file = secret.display().to_string();
    let format: &[&str] = &[&ours.luks, "format", "--passphrase-file", &file, "DISK"];
    let check: &[&str] = &[&ours.luks, "check", "--passphrase-file", &file, "DISK"];
    let same: &[&str] = &["--pbkdf", "argon2id", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "65536", "--pbkdf-parallel", "1"];
    let luks_format = |cost: &[&'static str]| -> Vec<&str> {
        [&["cryptsetup", "luksFormat", "-q", "--type", "luks2"][..], cost, &["--key-file", &file, "DISK"]].concat()
    };
    let (cheap, costly) = (luks_format(same), luks_format(&[]));
    let open: &[&str] = &["cryptsetup", "open", "--test-passphrase", "--key-file", &file, "DISK"];
    // By its own default it first measures the machine, then takes some seconds.
    for (what, formatted, runs) in [("at our cost", &cheap, FEW_RUNS), ("by its own default", &costly, 1)] {
        let (mine, beside) = compete(runs, &Contest::timed_outside(1, &[], &[format]), &Contest::timed_outside(1, &[], &[formatted]))?;
        report.compare("LUKS2: format", format!("cryptsetup luksFormat, {what}"), mine, beside);
        let (mine, beside) =
            compete(runs, &Contest::timed_outside(1, &[format], &[check]), &Contest::timed_outside(1, &[formatted], &[open]))?;
        if let Some(kib) = mine.peak_kib.filter(|_| what == "at our cost") {
            report
                .note(format!("Opening LUKS2 with 64 MiB of argon2id as a program of its own: {:.1} MiB at its peak.", in_mib(kib * 1024)));
        }
        report.compare("LUKS2: find the volume key", format!("cryptsetup open --test-passphrase, {what}"), mine, beside);
    }
    std::fs::remove_file(&secret)?;
    Ok(())
}
