//! The outside tools, the files they look at, and chance that can be repeated.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::image::{Image, UNIT};

/// A file of its own for one image, removed when dropped.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    /// A sparse file of `size_bytes`; `name` is unique within the test run.
    pub(crate) fn new(name: &str, size_bytes: u64) -> Self {
        // In memory if possible: holes are punched and zeros are written here all the time.
        let memory = PathBuf::from("/dev/shm");
        let folder = if memory.is_dir() { memory } else { std::env::temp_dir() };
        let path = folder.join(format!("proxmox-csi-{}-{name}.img", std::process::id()));
        let file = File::create(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        file.set_len(size_bytes).unwrap_or_else(|error| panic!("{}: {size_bytes} bytes: {error}", path.display()));
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Writes what differs from zeros.
    pub(crate) fn fill(&self, image: &Image) {
        let file = File::options().write(true).open(&self.0).unwrap();
        for (unit, bytes) in image.written() {
            file.write_all_at(bytes, unit * UNIT as u64).unwrap();
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The 4096-byte units in which the file and the image differ, in bytes; at most the first few. Holes are not read.
pub(crate) fn differing_units(path: &Path, image: &Image) -> Vec<u64> {
    const ENOUGH: usize = 8;
    let file = File::open(path).unwrap();
    let size_bytes = file.metadata().unwrap().len();
    assert_eq!(size_bytes, image.size_bytes, "the file has grown");
    let mut ours = image.written().peekable();
    let mut differing = Vec::new();
    let mut buffer = vec![0_u8; 256 * UNIT];
    let mut at = 0;
    while differing.len() < ENOUGH {
        at = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
            Ok(data) => data / UNIT as u64 * UNIT as u64,
            Err(Errno::NXIO) => break,
            Err(error) => panic!("{}: lseek(SEEK_DATA): {error}", path.display()),
        };
        let hole = rustix::fs::seek(&file, SeekFrom::Hole(at)).unwrap();
        while at < hole {
            let length = buffer.len().min(usize::try_from(size_bytes - at).unwrap_or(usize::MAX));
            let chunk = &mut buffer[..length];
            file.read_exact_at(chunk, at).unwrap();
            for (theirs, unit) in chunk.chunks(UNIT).zip(at / UNIT as u64..) {
                while let Some((missing, _)) = ours.next_if(|(unit_of_ours, _)| *unit_of_ours < unit) {
                    differing.push(missing);
                }
                let same = match ours.next_if(|(unit_of_ours, _)| *unit_of_ours == unit) {
                    Some((_, bytes)) => bytes == theirs,
                    None => theirs == &[0; UNIT][..theirs.len()],
                };
                if !same {
                    differing.push(unit);
                }
            }
            at += length as u64;
        }
    }
    differing.extend(ours.map(|(unit, _)| unit).take(ENOUGH));
    differing.iter().map(|unit| unit * UNIT as u64).collect()
}

/// What a tool answered.
pub(crate) struct Answer {
    pub(crate) code: Option<i32>,
    pub(crate) text: String,
}

/// Runs a tool, in the C locale; `None` if it is not there.
pub(crate) fn run(tool: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Option<Answer> {
    let program = if tool.contains('/') { tool.to_owned() } else { testbed::tools::program(tool)? };
    let mut command = Command::new(program);
    command.args(arguments).env("LC_ALL", "C").envs(environment.iter().copied());
    match command.output() {
        Ok(output) => {
            let text = [output.stdout, output.stderr].concat();
            Some(Answer { code: output.status.code(), text: String::from_utf8_lossy(&text).trim().to_owned() })
        }
        Err(error) => panic!("{tool}: {error}"),
    }
}

/// Numbers by chance, the same for the same seed (splitmix64).
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.number() % limit
    }

    pub(crate) fn one_in(&mut self, chances: u64) -> bool {
        self.below(chances) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::try_from(self.below(choices.len() as u64)).unwrap()]
    }

    pub(crate) fn uuid(&mut self) -> [u8; 16] {
        (u128::from(self.number()) << 64 | u128::from(self.number())).to_be_bytes()
    }
}

/// The seed of this run: `PROXMOX_CSI_SEED`, else the clock's.
pub(crate) fn seed() -> u64 {
    let seed = match std::env::var("PROXMOX_CSI_SEED") {
        Ok(given) => given.parse().unwrap_or_else(|_| panic!("PROXMOX_CSI_SEED={given:?} is no number")),
        Err(_) => {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
            u64::from(now.subsec_nanos()) ^ now.as_secs() << 20
        }
    };
    // Past the test runner's capture, so that a run that passes can be repeated too.
    let _ = std::io::stderr().write_all(format!("PROXMOX_CSI_SEED={seed}\n").as_bytes());
    seed
}
