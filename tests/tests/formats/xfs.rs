//! xfs against the machine's own mkfs.xfs 6.1.0: random devices and options, no differing byte, and a clean xfs_repair.
//!
//! mkfs.xfs 6.1.0 takes its time from the clock alone, so it runs with a clock that stands still (a shared object made
//! by cc here). Another version of it is not compared with: then xfs_repair alone judges, and the run says so.
//! `PROXMOX_CSI_CASES` runs more.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use disk::xfs::{BLOCK_SIZES, INODE_SIZES, Options, Plan, Surface, plan, superblock};
use disk::{Format, Mark, Write};
use rustix::fs::{Advice, FallocateFlags, SeekFrom};
use testbed::tools;

use crate::ext4::dashed;
use crate::judges::{Chance, seed};

/// What a run tries at least.
const CASES: u32 = 300;
const UPSTREAM: &str = "mkfs.xfs version 6.1.0";
/// What the clock says to mkfs.xfs.
const NOW: u32 = 1_700_000_000;
const PRELOAD: &str = "
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
int gettimeofday(struct timeval *tv, void *tz) { if (tv) { tv->tv_sec = 1700000000; tv->tv_usec = 0; } return 0; }
int clock_gettime(clockid_t c, struct timespec *ts) { ts->tv_sec = 1700000000; ts->tv_nsec = 0; return 0; }
time_t time(time_t *t) { if (t) *t = 1700000000; return 1700000000; }
static unsigned long topology(int i) {
    unsigned long v[5] = {0};
    sscanf(getenv(\"TOPOLOGY\"), \"%lu %lu %lu %lu %lu\", v, v + 1, v + 2, v + 3, v + 4);
    return v[i];
}
unsigned long blkid_topology_get_logical_sector_size(void *t) { return topology(0); }
unsigned long blkid_topology_get_physical_sector_size(void *t) { return topology(1); }
unsigned long blkid_topology_get_alignment_offset(void *t) { return topology(2); }
unsigned long blkid_topology_get_minimum_io_size(void *t) { return topology(3); }
unsigned long blkid_topology_get_optimal_io_size(void *t) { return topology(4); }
";
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
/// ext4, the usual home of the target folder, takes no larger file.
const SIZE_MAX_BYTES: u64 = 15 * TIB;

struct Case {
    /// As a device with this stripe would make them.
    options: Options,
    /// Old bytes where the format's structures come.
    is_used: bool,
    target: Target,
}

/// What mkfs.xfs is given.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    /// A file; sector and stripe by name.
    File,
    /// A loop device that says of itself, by the shared object, what the options say.
    Device,
}

impl Case {
    /// A device with a topology that may make sense or not.
    fn device_by_chance(chance: &mut Chance) -> Self {
        let size_bytes = size(chance);
        let mut options = Options::new(size_bytes, chance.uuid(), NOW);
        options.logical_sector_bytes = chance.pick(&[512, 512, 512, 4096]);
        options.physical_sector_bytes = chance.pick(&[512, 512, 4096, 4096, 8192, 65536]).max(options.logical_sector_bytes);
        options.is_aligned = !chance.one_in(8);
        let any = |chance: &mut Chance| match chance.below(4) {
            0 => chance.pick(&[0, 0, 512, 4096, 65536]),
            1 => 512 * u32::try_from(chance.below(8192)).unwrap(),
            _ => (4096 << chance.below(11)) * chance.pick(&[1, 1, 1, 3]),
        };
        options.min_io_bytes = any(chance);
        let multiple = options.min_io_bytes * u32::try_from(1 + chance.below(8)).unwrap();
        options.opt_io_bytes = if chance.one_in(4) { any(chance) } else { multiple };
        (options.block_size, options.inode_size) = (Some(chance.pick(&BLOCK_SIZES)), Some(chance.pick(&INODE_SIZES)));
        let is_used = chance.one_in(3);
        options.reads_zeros = !is_used;
        Self { options, is_used, target: Target::Device }
    }

    fn by_chance(chance: &mut Chance) -> Self {
        let size_bytes = size(chance);
        let mut options = Options::new(size_bytes, chance.uuid(), NOW);
        let sector = chance.pick(&[512, 512, 4096]);
        (options.logical_sector_bytes, options.physical_sector_bytes) = (sector, sector);
        let blocks: Vec<u32> = BLOCK_SIZES.into_iter().filter(|size| *size >= sector).collect();
        let block_size = if chance.one_in(2) { 4096 } else { chance.pick(&blocks) };
        let inodes: Vec<u32> = INODE_SIZES.into_iter().filter(|size| *size <= block_size / 2).collect();
        (options.block_size, options.inode_size) = (Some(block_size), Some(chance.pick(&inodes)));
        options.nrext64 = chance.one_in(8);
        if size_bytes >= GIB + 4096 && chance.one_in(3) {
            (options.min_io_bytes, options.opt_io_bytes) = stripe(chance, block_size, sector).unwrap_or_default();
        }
        let is_used = chance.one_in(3);
        options.reads_zeros = !is_used && chance.one_in(2);
        Self { options, is_used, target: Target::File }
    }

    fn arguments(&self) -> Vec<String> {
        let options = &self.options;
        let (block_size, inode_size) = (options.block_size.unwrap(), options.inode_size.unwrap());
        let mut arguments = vec!["-q".into(), "-f".into(), "-K".into(), "-b".into(), format!("size={block_size}")];
        arguments.extend(["-i".into(), format!("size={inode_size},nrext64={}", u8::from(options.nrext64))]);
        arguments.extend(["-m".into(), format!("uuid={}", dashed(&options.uuid))]);
        if self.target == Target::Device {
            return arguments;
        }
        arguments.extend(["-s".into(), format!("size={}", options.physical_sector_bytes)]);
        if let Some(width) = options.opt_io_bytes.checked_div(options.min_io_bytes) {
            arguments.extend(["-d".into(), format!("su={},sw={width}", options.min_io_bytes)]);
        }
        arguments
    }

    fn topology(&self) -> String {
        let o = &self.options;
        let alignment = if o.is_aligned { 0 } else { 512 };
        format!("{} {} {alignment} {} {}", o.logical_sector_bytes, o.physical_sector_bytes, o.min_io_bytes, o.opt_io_bytes)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let surface = if self.is_used { "over old bytes" } else { "on zeros" };
        write!(f, "mkfs.xfs {} IMAGE, {surface}\n{:?}", self.arguments().join(" "), self.options)
    }
}

/// Every magnitude up to 15 TiB, often beside a round number, where layouts change.
fn size(chance: &mut Chance) -> u64 {
    let magnitude = match chance.below(10) {
        0..4 => 300 * MIB + chance.below(GIB - 300 * MIB),
        4..7 => GIB + chance.below(31 * GIB),
        7..9 => 32 * GIB + chance.below(2 * TIB),
        _ => chance.below(SIZE_MAX_BYTES),
    };
    let rounded = match chance.below(3) {
        0 => magnitude,
        1 => magnitude / (64 * MIB) * (64 * MIB),
        _ => 1 << magnitude.ilog2(),
    };
    let beside = chance.pick(&[0, 0, 512, 4096, 5 * MIB, 17 * MIB]) + 512 * chance.pick(&[0, 0, 1, 3]);
    let size = if chance.one_in(2) { rounded + beside } else { rounded.saturating_sub(beside) };
    size.clamp(300 * MIB + 4096, SIZE_MAX_BYTES)
}

/// Unit and width in bytes.
fn stripe(chance: &mut Chance, block_size: u32, sector: u32) -> Option<(u32, u32)> {
    let unit = (4096 << chance.below(12)) * chance.pick(&[1, 1, 1, 3, 5, 7]);
    let width = unit * (1 + u32::try_from(chance.below(12)).unwrap());
    // Asked for by name these are errors or taken as they are; from a device they are dropped, which unit tests cover.
    (unit <= 32 << 20 && unit.is_multiple_of(block_size) && unit != sector && width != sector).then_some((unit, width))
}

/// A folder of this run, gone at its end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        // Not in memory: mkfs.xfs reserves its log, up to 2 GiB of it, which costs nothing only on a disk's filesystem.
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Tools {
    /// None: another version than the one to be equal to.
    mkfs: Option<String>,
    repair: String,
    preload: PathBuf,
}

fn tools(folder: &Path) -> Option<Tools> {
    let (Some(mkfs), Some(repair), Some(cc)) = (tools::program("mkfs.xfs"), tools::program("xfs_repair"), tools::program("cc")) else {
        tools::skipped("xfs: mkfs.xfs, xfs_repair (apt-get install xfsprogs) and cc are needed");
        return None;
    };
    let version = output(Command::new(&mkfs).arg("-V"));
    let is_upstream = version.trim() == UPSTREAM;
    if !is_upstream {
        eprintln!("xfs: this machine has {}, not {UPSTREAM}: judged by xfs_repair -n only", version.trim());
    }
    let (source, preload) = (folder.join("preload.c"), folder.join("preload.so"));
    fs::write(&source, PRELOAD).unwrap();
    output(Command::new(cc).args(["-O1", "-shared", "-fPIC", "-o"]).arg(&preload).arg(&source));
    Some(Tools { mkfs: is_upstream.then_some(mkfs), repair, preload })
}

/// Standard output of a program that must succeed.
fn output(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    assert!(status.success(), "{command:?}: {status}\n{}\n{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap()
}

fn image(path: &Path, size_bytes: u64) -> File {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    file.set_len(size_bytes).unwrap();
    // Reading ahead would fill the page cache over holes, and SEEK_DATA takes cached pages of unwritten space for data.
    rustix::fs::fadvise(&file, 0, None, Advice::Random).unwrap();
    file
}

/// Puts old bytes around everything that the plan writes, so that a byte too few or too many shows.
fn soil(file: &File, size_bytes: u64, plan: Plan) {
    const AROUND: u64 = 64 << 10;
    let old = vec![0xA5; 3 * usize::try_from(AROUND).unwrap()];
    let around = |middle: u64| {
        let start = middle.saturating_sub(AROUND).min(size_bytes);
        let length = usize::try_from((size_bytes - start).min(old.len() as u64)).unwrap();
        file.write_all_at(&old[..length], start).unwrap();
    };
    let mut end = 0;
    for (offset, length) in plan.filter_map(|write| write.range()) {
        // Not between the pieces of one long range.
        if offset != end {
            [offset, end].into_iter().for_each(around);
        }
        end = offset + length;
    }
    [end, size_bytes].into_iter().for_each(around);
}

fn apply(file: &File, write: &Write) {
    match write {
        Write::Data { offset, bytes } => file.write_all_at(bytes, *offset).unwrap(),
        Write::Zeros { offset, length } => {
            let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
            if rustix::fs::fallocate(file, flags, *offset, *length).is_err() {
                let zeros = vec![0; usize::try_from(MIB).unwrap()];
                for start in (0..*length).step_by(zeros.len()) {
                    let length = usize::try_from(MIB.min(length - start)).unwrap();
                    file.write_all_at(&zeros[..length], offset + start).unwrap();
                }
            }
        }
        Write::Flush => {}
    }
}

/// Where the two files differ: `(offset, upstream's byte, ours)`, the first few. Holes are zeros, and are not read.
fn differences(upstream: &File, ours: &File, size_bytes: u64) -> Vec<(u64, u8, u8)> {
    const CHUNK: u64 = 64 << 10;
    const ENOUGH: usize = 24;
    let mut found = Vec::new();
    let (mut left, mut right) = (vec![0; usize::try_from(CHUNK).unwrap()], vec![0; usize::try_from(CHUNK).unwrap()]);
    let mut at = 0;
    while at < size_bytes && found.len() < ENOUGH {
        let data = |file: &File| match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(offset) => offset,
            Err(rustix::io::Errno::NXIO) => size_bytes,
            Err(errno) => panic!("lseek(SEEK_DATA): {errno}"),
        };
        at = data(upstream).min(data(ours)).max(at) / CHUNK * CHUNK;
        if at >= size_bytes {
            break;
        }
        let length = usize::try_from(CHUNK.min(size_bytes - at)).unwrap();
        upstream.read_exact_at(&mut left[..length], at).unwrap();
        ours.read_exact_at(&mut right[..length], at).unwrap();
        if left[..length] != right[..length] {
            let bytes = left.iter().zip(&right).take(length);
            found.extend(
                (at..).zip(bytes).filter(|(_, (left, right))| left != right).map(|(offset, (left, right))| (offset, *left, *right)),
            );
        }
        at += CHUNK;
    }
    found.truncate(ENOUGH);
    found
}

/// Runs one case; the sentence says what is wrong.
fn run(tools: &Tools, folder: &Path, case: &Case) -> Result<(), String> {
    let size_bytes = case.options.size_bytes;
    let worker = format!("{:?}", thread::current().id()).replace(|c: char| !c.is_ascii_digit(), "");
    let (upstream_path, our_path) = (folder.join(format!("upstream-{worker}.img")), folder.join(format!("ours-{worker}.img")));
    let (upstream, ours) = (image(&upstream_path, size_bytes), image(&our_path, size_bytes));
    let plan = match plan(&case.options) {
        Ok(plan) => plan,
        Err(refusal) => {
            let theirs = tools.mkfs.as_ref().map(|mkfs| upstream_formats(mkfs, tools, &upstream_path, case));
            return if matches!(theirs, Some(Ok(()))) { Err(format!("refused: {refusal}")) } else { Ok(()) };
        }
    };
    if case.is_used {
        soil(&upstream, size_bytes, plan.clone());
        soil(&ours, size_bytes, plan.clone());
    }
    let mark = Mark::new("csi-0123456789abcdef").unwrap();
    Format::new(plan, &mark).for_each(|write| apply(&ours, &write));
    if let Some(mkfs) = &tools.mkfs {
        upstream_formats(mkfs, tools, &upstream_path, case)?;
        let different = differences(&upstream, &ours, size_bytes);
        if !different.is_empty() {
            return Err(format!("(offset, upstream, ours): {different:x?}"));
        }
    }
    judge(tools, &our_path, &ours, &mark)
}

fn upstream_formats(mkfs: &str, tools: &Tools, path: &Path, case: &Case) -> Result<(), String> {
    let target = match case.target {
        Target::File => path.to_owned(),
        Target::Device => output(Command::new("losetup").args(["--find", "--show"]).arg(path)).trim().into(),
    };
    let mut command = Command::new(mkfs);
    command.args(case.arguments()).arg(&target).env("LD_PRELOAD", &tools.preload).env("TOPOLOGY", case.topology());
    let made = command.output().unwrap();
    if case.target == Target::Device {
        output(Command::new("losetup").arg("--detach").arg(&target));
    }
    if made.status.success() { Ok(()) } else { Err(format!("upstream fails: {}", String::from_utf8_lossy(&made.stderr))) }
}

/// xfs_repair finds nothing to do, and our own reader finds the superblock and each of its copies.
fn judge(tools: &Tools, path: &Path, image: &File, mark: &Mark) -> Result<(), String> {
    let repair = Command::new(&tools.repair).arg("-n").arg(path).output().unwrap();
    if !repair.status.success() {
        return Err(format!("xfs_repair -n: {}{}", String::from_utf8_lossy(&repair.stdout), String::from_utf8_lossy(&repair.stderr)));
    }
    let read = |offset: u64| {
        let mut bytes = vec![0; superblock::BYTES];
        image.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    };
    let Surface::Complete(primary) = disk::xfs::judge(&read(0), mark) else { return Err("read back as no complete xfs".into()) };
    for offset in primary.copies() {
        let copy = superblock::parse(&read(offset)).map_err(|error| format!("at {offset}: {error}"))?;
        if copy != (superblock::Superblock { is_in_progress: true, ..primary.clone() }) {
            return Err(format!("the copy at {offset} of {primary:?} is {copy:?}"));
        }
    }
    Ok(())
}

/// Runs `CASES` cases in parallel.
fn compare(name: &str, case_by_chance: fn(&mut Chance) -> Case) {
    let folder = Folder::new(name);
    let Some(tools) = tools(&folder.0) else { return };
    let seed = seed();
    let cases: u32 = std::env::var("PROXMOX_CSI_CASES").ok().map_or(CASES, |cases| cases.parse().unwrap());
    let next = AtomicU32::new(0);
    let work = || {
        let mut wrong = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= cases {
                return wrong;
            }
            // Each case has its own seed, so that the workers' order does not matter.
            let case = case_by_chance(&mut Chance::new(seed.wrapping_add(u64::from(number) << 48)));
            if let Err(what) = run(&tools, &folder.0, &case) {
                wrong.push(format!("case {number}: {case}\n{what}"));
            }
        }
    };
    // The work is mostly waiting for programs and files.
    let workers = 2 * thread::available_parallelism().map_or(1, usize::from);
    let wrong: Vec<String> = thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    let shown: Vec<&str> = wrong.iter().take(8).map(String::as_str).collect();
    assert!(wrong.is_empty(), "PROXMOX_CSI_SEED={seed}: {} of {cases} cases are wrong\n{}", wrong.len(), shown.join("\n\n"));
}

#[test]
fn judge_xfs_equals_mkfs_xfs() {
    compare("xfs", Case::by_chance);
}

#[test]
fn judge_xfs_on_devices_of_any_topology_equals_mkfs_xfs() {
    if std::env::var_os("PROXMOX_CSI_LONG").is_none() {
        println!("only with scripts/test --long: it needs root, loop devices and a minute");
        return;
    }
    compare("xfs-topology", Case::device_by_chance);
}

/// The command that a person would type, over a file that holds something else: the same file as mkfs.xfs makes of it.
#[test]
fn judge_the_mkfs_example_makes_what_mkfs_xfs_makes() {
    let folder = Folder::new("xfs-example");
    let Some(tools) = tools(&folder.0) else { return };
    let Some(upstream) = &tools.mkfs else { return };
    let uuid = dashed(&[0xAB; 16]);
    let example = |target: &Path, rest: &[&str]| {
        let mut command = Command::new(env!("CARGO"));
        command.args([
            "run",
            "-q",
            "-p",
            "proxmox-csi-disk",
            "--example",
            "mkfs",
            "--",
            "xfs",
            "--uuid",
            &uuid,
            "--time",
            &NOW.to_string(),
        ]);
        command.args(rest).arg(target).output().unwrap()
    };
    let (ours, theirs) = (folder.0.join("ours"), folder.0.join("theirs"));
    let size_bytes = 300 * MIB + 512;
    for path in [&ours, &theirs] {
        let file = image(path, size_bytes);
        for offset in [0, 64 << 20, size_bytes - MIB] {
            file.write_all_at(&vec![0xA5; usize::try_from(MIB).unwrap()], offset).unwrap();
        }
    }
    let made = example(&ours, &["-b", "2048", "-i", "1024"]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let m = format!("uuid={uuid}");
    let mut command = Command::new(upstream);
    command.args(["-q", "-f", "-m", &m, "-b", "size=2048", "-i", "size=1024"]).arg(&theirs).env("LD_PRELOAD", &tools.preload);
    output(command.env("TOPOLOGY", "512 512 0 512 0"));
    let different = differences(&File::open(&theirs).unwrap(), &File::open(&ours).unwrap(), size_bytes);
    assert!(different.is_empty(), "(offset, upstream, ours): {different:x?}");

    let small = folder.0.join("small");
    fs::write(&small, vec![0xA5; usize::try_from(MIB).unwrap()]).unwrap();
    let refused = example(&small, &[]);
    let sentence = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && sentence.contains("314572800 bytes (300 MiB), there are 1048576"), "{sentence}");
    assert!(fs::read(&small).unwrap().iter().all(|byte| *byte == 0xA5), "refused before anything is touched");
}
