//! What a test may do inside the guest: run programs, read and write files, mount.

use std::io::BufReader;
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use guest_init::{Answer, Exit, Filesystem, Reply, Request, Stat};

use super::Guest;

/// Beside what the call itself may take: the way there and back on a loaded machine.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// A read without a given size.
const WHOLE_FILE_BYTES: u64 = 16 << 20;

/// A program started in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Job {
    pub number: u32,
    pub pid: u32,
}

/// A program to start.
#[derive(Debug, Clone, Default)]
pub struct Program<'a> {
    /// Before each line of its output on the console.
    pub label: &'a str,
    /// The folder it sees as `/`.
    pub root: Option<&'a str>,
    pub program: &'a str,
    pub args: &'a [&'a str],
    pub env: &'a [(&'a str, &'a str)],
}

#[derive(Debug)]
pub struct Ended {
    pub exit: Exit,
    /// Standard output and error, as they came.
    pub output: String,
}

impl Guest {
    /// One call over the control channel.
    pub fn call(&self, request: Request, body: &[u8]) -> Result<(Answer, Vec<u8>)> {
        self.call_within(CALL_LIMIT, request, body)
    }

    fn call_within(&self, limit: Duration, request: Request, body: &[u8]) -> Result<(Answer, Vec<u8>)> {
        self.console.alive().with_context(|| self.quote())?;
        let what = format!("{request:?}");
        let exchange = || -> Result<(Reply, Vec<u8>)> {
            let stream = TcpStream::connect(("127.0.0.1", self.control_port))?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(limit))?;
            stream.set_write_timeout(Some(limit))?;
            guest_init::send(&stream, request, body)?;
            Ok(guest_init::receive(&mut BufReader::new(&stream))?)
        };
        let (reply, body) =
            exchange().with_context(|| format!("guest {}: {what}: no reply within {} s; {}", self.name, limit.as_secs(), self.quote()))?;
        match reply {
            Ok(answer) => Ok((answer, body)),
            Err(error) => bail!("guest {}: {error}", self.name),
        }
    }

    fn done(&self, request: Request, body: &[u8]) -> Result<()> {
        match self.call(request, body)? {
            (Answer::Done, _) => Ok(()),
            (other, _) => bail!("guest {}: unexpected answer {other:?}", self.name),
        }
    }

    pub fn spawn(&self, program: &Program<'_>) -> Result<Job> {
        let request = Request::Spawn {
            label: program.label.into(),
            root: program.root.map(Into::into),
            program: program.program.into(),
            args: program.args.iter().map(ToString::to_string).collect(),
            env: program.env.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect(),
        };
        match self.call(request, &[])? {
            (Answer::Started { job, pid }, _) => Ok(Job { number: job, pid }),
            (other, _) => bail!("guest {}: unexpected answer {other:?}", self.name),
        }
    }

    /// Waits for a program's end.
    pub fn wait(&self, job: Job, limit: Duration) -> Result<Ended> {
        let limit_ms = u64::try_from(limit.as_millis())?;
        match self.call_within(limit + CALL_LIMIT, Request::Wait { job: job.number, limit_ms }, &[])? {
            (Answer::Exited(exit), output) => Ok(Ended { exit, output: String::from_utf8_lossy(&output).into_owned() }),
            (_, output) => bail!(
                "guest {}: process {} still runs after {} s; its output:\n{}\n{}",
                self.name,
                job.pid,
                limit.as_secs(),
                String::from_utf8_lossy(&output),
                self.quote()
            ),
        }
    }

    /// What a program has written so far, and how it ended if it did.
    pub fn output(&self, job: Job) -> Result<(Option<Exit>, String)> {
        let (answer, output) = self.call(Request::Wait { job: job.number, limit_ms: 0 }, &[])?;
        let exit = if let Answer::Exited(exit) = answer { Some(exit) } else { None };
        Ok((exit, String::from_utf8_lossy(&output).into_owned()))
    }

    /// Runs a program to its end.
    pub fn run(&self, program: &Program<'_>, limit: Duration) -> Result<Ended> {
        self.wait(self.spawn(program)?, limit)
    }

    /// Sends a signal (9 is SIGKILL, 15 SIGTERM); nothing when the program has ended.
    pub fn signal(&self, job: Job, signal: i32) -> Result<()> {
        self.done(Request::Signal { job: job.number, signal }, &[])
    }

    pub fn read_at(&self, path: &str, offset: u64, size_bytes: u64) -> Result<Vec<u8>> {
        Ok(self.call(Request::Read { path: path.into(), offset, size_bytes }, &[])?.1)
    }

    /// A whole text file, `/proc` and `/sys` included.
    pub fn read(&self, path: &str) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.read_at(path, 0, WHOLE_FILE_BYTES)?).into_owned())
    }

    /// Replaces a file, or makes it; executable, as programs come this way too.
    pub fn write(&self, path: &str, bytes: &[u8]) -> Result<()> {
        self.done(Request::Write { path: path.into(), offset: 0, truncate: true, mode: 0o755 }, bytes)
    }

    /// Writes into a file or device.
    pub fn write_at(&self, path: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        self.done(Request::Write { path: path.into(), offset, truncate: false, mode: 0o644 }, bytes)
    }

    /// `None` where there is nothing of that name.
    pub fn stat(&self, path: &str) -> Result<Option<Stat>> {
        match self.call(Request::Stat { path: path.into() }, &[]) {
            Ok((Answer::Stat(stat), _)) => Ok(Some(stat)),
            Ok((other, _)) => bail!("guest {}: unexpected answer {other:?}", self.name),
            Err(error) if format!("{error:#}").contains("(os error 2)") => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The SELinux label, as getxattr(2) gives it.
    pub fn label(&self, path: &str) -> Result<String> {
        let (_, bytes) = self.call(Request::Attribute { path: path.into(), name: "security.selinux".into() }, &[])?;
        Ok(String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned())
    }

    pub fn stat_filesystem(&self, path: &str) -> Result<Filesystem> {
        match self.call(Request::StatFilesystem { path: path.into() }, &[])? {
            (Answer::Filesystem(seen), _) => Ok(seen),
            (other, _) => bail!("guest {}: unexpected answer {other:?}", self.name),
        }
    }

    pub fn list(&self, path: &str) -> Result<Vec<String>> {
        match self.call(Request::List { path: path.into() }, &[])? {
            (Answer::Names(names), _) => Ok(names),
            (other, _) => bail!("guest {}: unexpected answer {other:?}", self.name),
        }
    }

    fn digest(&self, request: Request) -> Result<String> {
        match self.call(request, &[])? {
            (Answer::Digest(digest), _) => Ok(digest),
            (other, _) => bail!("guest {}: unexpected answer {other:?}", self.name),
        }
    }

    pub fn sha256(&self, path: &str) -> Result<String> {
        self.digest(Request::Sha256 { path: path.into() })
    }

    /// Makes a file of pseudo-random bytes, synced; answers its SHA-256, computed from what was written.
    pub fn fill(&self, path: &str, seed: u64, size_bytes: u64) -> Result<String> {
        self.digest(Request::Fill { path: path.into(), seed, size_bytes })
    }

    /// With its parents; already there is fine.
    pub fn make_folder(&self, path: &str) -> Result<()> {
        self.done(Request::MakeFolder { path: path.into() }, &[])
    }

    pub fn remove(&self, path: &str) -> Result<()> {
        self.done(Request::Remove { path: path.into() }, &[])
    }

    pub fn mount(&self, source: &str, target: &str, filesystem: &str, read_only: bool) -> Result<()> {
        self.done(Request::Mount { source: source.into(), target: target.into(), filesystem: filesystem.into(), read_only }, &[])
    }

    /// Shows `source` at `target` too, which must be there.
    pub fn bind(&self, source: &str, target: &str) -> Result<()> {
        self.done(Request::Bind { source: source.into(), target: target.into() }, &[])
    }

    pub fn unmount(&self, target: &str) -> Result<()> {
        self.done(Request::Unmount { target: target.into() }, &[])
    }

    /// Syncs, and forgets what was read: the next read comes from the disk.
    pub fn drop_caches(&self) -> Result<()> {
        self.done(Request::DropCaches, &[])
    }

    /// Mount points and their filesystem types at or below `path`, from PID 1's mountinfo (proc(5)).
    pub fn mounts_below(&self, path: &str) -> Result<Vec<(String, String)>> {
        let table = self.read("/proc/self/mountinfo")?;
        let parsed = table.lines().filter_map(|line| {
            let (front, back) = line.split_once(" - ")?;
            Some((front.split(' ').nth(4)?.to_owned(), back.split(' ').next()?.to_owned()))
        });
        Ok(parsed.filter(|(point, _)| std::path::Path::new(point).starts_with(path)).collect())
    }

    /// Resident memory of a process in KiB.
    pub fn resident_kib(&self, pid: u32) -> Result<u64> {
        self.memory_kib(pid, "VmRSS:")
    }

    /// The most that it ever was.
    pub fn peak_resident_kib(&self, pid: u32) -> Result<u64> {
        self.memory_kib(pid, "VmHWM:")
    }

    fn memory_kib(&self, pid: u32, what: &str) -> Result<u64> {
        let status = self.read(&format!("/proc/{pid}/status"))?;
        let value = status.lines().find_map(|line| line.strip_prefix(what)?.trim().strip_suffix(" kB")?.parse().ok());
        value.with_context(|| format!("no {what} in /proc/{pid}/status"))
    }

    /// The disk whose SCSI LUN is `lun`: its name below `/sys/block`. sdX and hostN are reused and unordered.
    pub fn disk_at(&self, lun: u8) -> Result<Option<String>> {
        for entry in self.list("/sys/class/scsi_device")? {
            if entry.rsplit(':').next() == Some(&lun.to_string()) {
                // The disk's name comes a moment after the SCSI device.
                let names = self.list(&format!("/sys/class/scsi_device/{entry}/device/block")).unwrap_or_default();
                return Ok(names.into_iter().next());
            }
        }
        Ok(None)
    }

    /// What the guest's kernel takes disk `lun` to be, in bytes.
    pub fn disk_size_bytes(&self, lun: u8) -> Result<Option<u64>> {
        let Some(disk) = self.disk_at(lun)? else { return Ok(None) };
        match self.read(&format!("/sys/block/{disk}/size")) {
            Ok(sectors) => Ok(Some(sectors.trim().parse::<u64>()? * 512)),
            // It went in between.
            Err(error) if format!("{error:#}").contains("(os error 2)") => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What the guest's kernel has written to disk `lun` since it appeared, in bytes, requests for zeros included: the seventh number
    /// of Documentation/block/stat.rst counts 512-byte sectors.
    pub fn disk_written_bytes(&self, lun: u8) -> Result<u64> {
        let disk = self.disk_at(lun)?.with_context(|| format!("guest {}: no disk at LUN {lun}", self.name))?;
        let stat = self.read(&format!("/sys/block/{disk}/stat"))?;
        let sectors: u64 = stat.split_whitespace().nth(6).with_context(|| format!("/sys/block/{disk}/stat: {stat:?}"))?.parse()?;
        Ok(sectors * 512)
    }

    /// Whether a kernel thread of this name runs.
    pub fn has_thread(&self, name: &str) -> Result<bool> {
        let pids = self.list("/proc")?.into_iter().filter(|entry| entry.bytes().all(|byte| byte.is_ascii_digit()));
        // A process may end between the two looks.
        Ok(pids.into_iter().any(|pid| self.read(&format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == name)))
    }

    /// Turns the guest off and judges its verdict.
    pub fn power_off(&self) -> Result<()> {
        // The verdict judges: the reply itself may be lost when the machine is gone first.
        let asked = self.call(Request::PowerOff, &[]);
        self.console.verdict(CALL_LIMIT).with_context(|| format!("guest {}: turning off: {asked:?}", self.name))
    }
}
