//! ext4 against the machine's own mke2fs and e2fsck.

use std::fmt::Write as _;
use std::sync::Mutex;

use disk::ext4::{Options, Refusal, Surface, judge, plan};
use disk::mark::HEAD_BYTES;
use disk::{Format, Mark, Write};

use crate::image::Image;
use crate::judges::{Chance, Scratch, differing_units, run, seed};

/// Sizes and options per run, and per long run (`scripts/test --long`).
const CASES: u64 = 320;
const LONG_CASES: u64 = 10 * CASES;
/// Of these, every so many are also given to e2fsck.
const CASES_PER_CHECK: u64 = 20;
/// The version whose bytes we write.
const VERSION: &str = "mke2fs 1.47.0";
const KIB: u64 = 1 << 10;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// One filesystem to be made twice.
#[derive(Debug, Clone)]
struct Case {
    number: u64,
    options: Options,
    /// `-E stride` and `stripe_width`, in blocks.
    stripes: Option<(u32, u32)>,
    ground: Ground,
}

/// Why mke2fs takes its target for zeros, if it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ground {
    Unknown,
    /// It has punched holes into a plain file.
    Punched,
    /// It was told so.
    Prezeroed,
}

impl Case {
    fn by_chance(seed: u64, number: u64) -> Self {
        let mut chance = Chance::new(seed.wrapping_add(number.wrapping_mul(0x1000_0001)));
        let block_size = if chance.one_in(3) { Some(chance.pick(&[1024, 2048, 4096])) } else { None };
        let mut options =
            Options::new(size(&mut chance, block_size), chance.uuid(), chance.uuid(), chance.pick(&[1, 1_700_000_000, u32::MAX]));
        options.block_size = block_size;
        options.inode_size = if chance.one_in(4) { Some(chance.pick(&[256, 512, 1024])) } else { None };
        let mut stripes = None;
        if let (true, Ok(made)) = (chance.one_in(5), plan(&options)) {
            let block_size = u32::try_from(made.block_size()).unwrap();
            let (stride, width) = (chance.pick(&[2, 4, 16, 100]), chance.pick(&[2, 8, 128, 1000]));
            options.min_io_bytes = block_size * stride;
            options.opt_io_bytes = block_size * width;
            stripes = Some((stride, width));
        }
        let ground = chance.pick(&[Ground::Unknown, Ground::Punched, Ground::Prezeroed, Ground::Prezeroed]);
        Self::new(number, Options { reads_zeros: ground != Ground::Unknown, ..options }, stripes, ground)
    }

    fn new(number: u64, options: Options, stripes: Option<(u32, u32)>, ground: Ground) -> Self {
        Self { number, options, stripes, ground }
    }

    /// mke2fs's command line for the same.
    fn arguments(&self, target: &str) -> Vec<String> {
        let options = &self.options;
        let mut arguments: Vec<String> = ["-q", "-t", "ext4", "-F", "-m0", "-U"].map(str::to_owned).into();
        arguments.push(dashed(&options.uuid));
        let mut extended = format!("hash_seed={}", dashed(&options.hash_seed));
        extended += match self.ground {
            Ground::Unknown => ",nodiscard",
            Ground::Punched => "",
            Ground::Prezeroed => ",assume_storage_prezeroed=1,nodiscard",
        };
        if let Some((stride, width)) = self.stripes {
            let _ = write!(extended, ",stride={stride},stripe_width={width}");
        }
        arguments.extend(["-E".to_owned(), extended]);
        for (flag, value) in [("-b", options.block_size), ("-I", options.inode_size)] {
            if let Some(value) = value {
                arguments.extend([flag.to_owned(), value.to_string()]);
            }
        }
        arguments.push(target.to_owned());
        arguments
    }

    /// Makes it both ways. What differs, if anything.
    fn compare(&self, judge: Judge) -> Option<String> {
        let ours = match plan(&self.options) {
            Ok(plan) => {
                let mut image = Image::new(self.options.size_bytes, 0);
                for write in plan {
                    if self.options.reads_zeros && write.is_zeros() {
                        return Some(format!("zeros at {:?} of a disk of zeros: {:?}", write.range(), self.options));
                    }
                    image.apply(&write);
                }
                Ok(image)
            }
            Err(refusal) => Err(refusal),
        };
        match (judge, &ours) {
            (Judge::Nobody, _) | (Judge::E2fsck, Err(_)) => return None,
            (Judge::E2fsck, Ok(image)) => return self.check(image),
            (Judge::Mke2fs, _) => {}
        }
        let theirs = Scratch::new(&format!("theirs-{}", self.number), self.options.size_bytes);
        let target = theirs.path().to_str().unwrap();
        let arguments = self.arguments(target);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let time = self.options.time.to_string();
        let made = run("mke2fs", &arguments, &[("E2FSPROGS_FAKE_TIME", &time), ("MKE2FS_SKIP_CHECK_MSG", "1")])?;
        let command = format!("truncate -s {} …; E2FSPROGS_FAKE_TIME={time} mke2fs {}", self.options.size_bytes, arguments.join(" "));
        match (ours, made.code) {
            (Ok(image), Some(0)) => {
                let differing = differing_units(theirs.path(), &image);
                if !differing.is_empty() {
                    return Some(format!("differs at bytes {differing:?}: {command}"));
                }
                if self.number.is_multiple_of(CASES_PER_CHECK) { self.check(&image) } else { None }
            }
            (Ok(_), _) => Some(format!("made here, not by {command}: {}", made.text)),
            (Err(_), Some(1)) => None,
            (Err(refusal), code) => Some(format!("refused here ({refusal}), {code:?} from {command}: {}", made.text)),
        }
    }

    fn check(&self, image: &Image) -> Option<String> {
        let file = Scratch::new(&format!("ours-{}", self.number), self.options.size_bytes);
        file.fill(image);
        let answer = run("e2fsck", &["-fn", file.path().to_str().unwrap()], &[])?;
        (answer.code != Some(0)).then(|| format!("e2fsck -fn says {:?} of {:?}: {}", answer.code, self.options, answer.text))
    }
}

/// 64 KiB to 6 TiB: anywhere, with as many small as large ones; next to where something changes; and not whole blocks.
fn size(chance: &mut Chance, block_size: Option<u32>) -> u64 {
    // Beyond 736 GiB blocks of 1 KiB would need meta_bg; and mke2fs takes long over them.
    let most = match block_size {
        Some(1024) => 100 * GIB,
        Some(2048) => TIB,
        _ if chance.one_in(40) => 6 * TIB,
        _ => 300 * GIB,
    };
    let power = 6 + chance.below(u64::from((most / KIB).ilog2()) - 6 + 1);
    let base = (KIB << power).min(most);
    let group = u64::from(block_size.unwrap_or(if base < GIB / 2 { 1024 } else { 4096 })).pow(2) * 8;
    let size = match chance.below(4) {
        0 => base + chance.below(base),
        1 => base,
        2 => base.next_multiple_of(group) + chance.below(4) * group + chance.below(group.min(4 << 20)),
        _ => base + chance.below(16) * 4 * KIB,
    };
    size.min(most).saturating_sub(chance.pick(&[0, 0, 512, 4096, 4608]))
}

pub(crate) fn dashed(uuid: &[u8; 16]) -> String {
    let digits: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-")
}

#[derive(Debug, Clone, Copy)]
enum Judge {
    /// mke2fs of our version: not a byte may differ.
    Mke2fs,
    /// Another version: ours must be clean.
    E2fsck,
    /// Neither tool is there.
    Nobody,
}

impl Judge {
    fn of_this_machine() -> Self {
        let Some(version) = run("mke2fs", &["-V"], &[]).map(|answer| answer.text) else {
            testbed::tools::skipped("no mke2fs, no e2fsck");
            return Self::Nobody;
        };
        if version.starts_with(VERSION) {
            return Self::Mke2fs;
        }
        println!("this machine has {version:?}, not {VERSION}: judged by e2fsck -fn alone");
        Self::E2fsck
    }
}

#[test]
fn judge_ext4_of_random_sizes_and_options_is_the_machines_mke2fs() {
    let judge = Judge::of_this_machine();
    let seed = seed();
    let cases = if std::env::var_os("PROXMOX_CSI_LONG").is_some() { LONG_CASES } else { CASES };
    let (next, wrong) = (Mutex::new(0..cases), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from).min(8) {
            scope.spawn(|| {
                loop {
                    let number = next.lock().unwrap().next();
                    let Some(number) = number else { return };
                    if let Some(why) = Case::by_chance(seed, number).compare(judge) {
                        wrong.lock().unwrap().push(format!("case {number}: {why}\n"));
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "PROXMOX_CSI_SEED={seed}: {} of {cases}:\n{}", wrong.len(), wrong.concat());
}

/// Each found by chance, once.
#[test]
fn judge_ext4_of_sizes_that_once_differed_is_the_machines_mke2fs() {
    let sizes = [
        // The middle of the disk at the edge of a group, in blocks of 1 KiB: the journal lies a group further down.
        (67_162_112, None),
        (134_221_824, Some(1024)),
        (8_589_950_464, Some(1024)),
        // A last flex group of one group: its bitmaps are 16 apart all the same.
        ((2 << 30) + (128 << 20), None),
    ];
    for (number, (size_bytes, block_size)) in (2_000_000..).zip(sizes) {
        let mut options = Options::new(size_bytes, [1; 16], [2; 16], 3);
        options.block_size = block_size;
        if let Some(why) = Case::new(number, options, None, Ground::Unknown).compare(Judge::of_this_machine()) {
            panic!("{why}");
        }
    }
}

#[test]
fn judge_ext4_is_refused_where_mke2fs_refuses() {
    for (kib, is_possible) in [(64, false), (100, false), (104, true), (108, true)] {
        let options = Options::new(kib * KIB, [7; 16], [8; 16], 1);
        let made = plan(&options);
        assert_eq!(made.is_ok(), is_possible, "{kib} KiB");
        assert!(is_possible || matches!(made, Err(Refusal::TooSmall { .. })));
        if let Some(why) = Case::new(1_000_000 + kib, options, None, Ground::Unknown).compare(Judge::of_this_machine()) {
            panic!("{kib} KiB: {why}");
        }
    }
}

/// A format stopped after each of some writes: blkid may see a filesystem only where the mark says "unfinished" or where
/// it is complete; the mark itself is no signature to it.
#[test]
fn judge_blkid_sees_a_filesystem_only_if_complete_or_marked() {
    const SIZE_BYTES: u64 = 40 << 20;
    if run("blkid", &["-V"], &[]).is_none() {
        return testbed::tools::skipped("no blkid");
    }
    let uuid = [0x5A; 16];
    let mark = Mark::new("csi-0123456789abcdef").unwrap();
    let writes: Vec<Write> = Format::new(plan(&Options::new(SIZE_BYTES, uuid, [1; 16], 1)).unwrap(), &mark).collect();
    let file = Scratch::new("blkid", SIZE_BYTES);
    let mut image = Image::new(SIZE_BYTES, 0);
    let mut seen = [0; 4];
    for (done, write) in (0..).zip(&writes) {
        let is_sampled = done % 16 == 0 || done + 5 > writes.len();
        if is_sampled {
            std::fs::File::options().write(true).open(file.path()).unwrap().set_len(0).unwrap();
            std::fs::File::options().write(true).open(file.path()).unwrap().set_len(SIZE_BYTES).unwrap();
            file.fill(&image);
            let answer = run("blkid", &["-p", "-o", "value", "-s", "TYPE", file.path().to_str().unwrap()], &[]).unwrap();
            let judged = judge(&image.unit(0)[..HEAD_BYTES], &mark);
            let state = match (&judged, answer.text.as_str()) {
                (Surface::Blank, "") => 0,
                (Surface::Unfinished, "") => 1,
                (Surface::Unfinished, "ext4") => 2,
                (Surface::Complete(superblock), "ext4") if superblock.uuid == uuid => 3,
                (judged, text) => panic!("after {done} writes: {judged:?}, blkid says {text:?}"),
            };
            seen[state] += 1;
        }
        image.apply(write);
    }
    // The last look is before the last flush, when sector 0 has been written.
    assert!(seen.iter().all(|count| *count > 0), "blank, unfinished, unfinished with superblock, complete: {seen:?}");
}

/// The command that a person would type, over a file that holds something else: the same file as mke2fs makes of it.
#[test]
fn judge_the_mkfs_example_makes_what_mke2fs_makes() {
    const SIZE_BYTES: u64 = (12 << 20) + 512;
    let Judge::Mke2fs = Judge::of_this_machine() else { return };
    let (uuid, seed) = (dashed(&[0xAB; 16]), dashed(&[0xCD; 16]));
    let mkfs = |rest: &[&str]| {
        let program = ["run", "-q", "-p", "proxmox-csi-disk", "--example", "mkfs", "--"];
        run(env!("CARGO"), &[&program[..], &["ext4", "--uuid", &uuid, "--hash-seed", &seed, "--time", "1700000000"], rest].concat(), &[])
            .unwrap()
    };
    let old = vec![0xA5_u8; usize::try_from(SIZE_BYTES).unwrap()];
    let (ours, theirs) = (Scratch::new("example-ours", SIZE_BYTES), Scratch::new("example-theirs", SIZE_BYTES));
    std::fs::write(ours.path(), &old).unwrap();
    std::fs::write(theirs.path(), &old).unwrap();
    let answer = mkfs(&["-b", "2048", "-I", "512", ours.path().to_str().unwrap()]);
    assert_eq!(answer.code, Some(0), "{}", answer.text);
    let extended = format!("hash_seed={seed}");
    let arguments =
        ["-q", "-t", "ext4", "-F", "-m0", "-U", &uuid, "-E", &extended, "-b", "2048", "-I", "512", theirs.path().to_str().unwrap()];
    let answer = run("mke2fs", &arguments, &[("E2FSPROGS_FAKE_TIME", "1700000000")]).unwrap();
    assert_eq!(answer.code, Some(0), "{}", answer.text);
    assert!(std::fs::read(ours.path()).unwrap() == std::fs::read(theirs.path()).unwrap());

    let tiny = Scratch::new("example-tiny", 51200);
    let answer = mkfs(&[tiny.path().to_str().unwrap()]);
    assert_eq!(answer.code, Some(1));
    assert!(answer.text.ends_with("does not fit into 51200 bytes; make the volume larger"), "{}", answer.text);
    assert!(std::fs::read(tiny.path()).unwrap().iter().all(|byte| *byte == 0), "refused before anything is written");
}
