//! Programs started for the harness: their output on the console and kept, their end waited for.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, PipeReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use guest_init::{Answer, Exit};
use rustix::process::{Pid, Signal};

/// What is kept of a job's output; the rest is on the console only.
const OUTPUT_LIMIT_BYTES: usize = 8 << 20;

#[derive(Debug, Default)]
pub(crate) struct Jobs {
    jobs: Mutex<BTreeMap<u32, Arc<Job>>>,
}

#[derive(Debug)]
struct Job {
    pid: u32,
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    output: Vec<u8>,
    exit: Option<Exit>,
}

#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) label: String,
    pub(crate) root: Option<String>,
    pub(crate) program: String,
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Jobs {
    pub(crate) fn spawn(&self, program: Program) -> Result<Answer> {
        let (output, write) = std::io::pipe().context("pipe")?;
        let mut command = match &program.root {
            Some(root) => {
                // A program's root is changed by ourselves, in the new process: std has no stable chroot.
                let mut command = Command::new("/proc/self/exe");
                command.args(["enter", root, &program.program]);
                command
            }
            None => Command::new(&program.program),
        };
        let begun = Instant::now();
        let child = command
            .args(&program.args)
            .env_clear()
            .envs(program.env)
            .stdin(Stdio::null())
            .stdout(write.try_clone().context("dup")?)
            .stderr(write)
            .spawn()
            .with_context(|| format!("start {}", program.program))?;
        // The command holds the pipe's writing ends: the reader would never see the end of it.
        drop(command);
        let pid = child.id();
        let job = Arc::new(Job { pid, state: Mutex::default(), ended: Condvar::new() });
        let mut jobs = lock(&self.jobs);
        let number = u32::try_from(jobs.len())?;
        jobs.insert(number, Arc::clone(&job));
        std::thread::Builder::new().spawn(move || job.follow(child, begun, output, &program.label)).context("start a job's thread")?;
        Ok(Answer::Started { job: number, pid })
    }

    fn get(&self, number: u32) -> Result<Arc<Job>> {
        lock(&self.jobs).get(&number).cloned().with_context(|| format!("there is no job {number}"))
    }

    /// `Exited` or `Running`, and the output so far.
    pub(crate) fn wait(&self, number: u32, limit: Duration) -> Result<(Answer, Vec<u8>)> {
        let job = self.get(number)?;
        let state = lock(&job.state);
        let (state, _) = job.ended.wait_timeout_while(state, limit, |state| state.exit.is_none()).unwrap_or_else(PoisonError::into_inner);
        let answer = state.exit.map_or(Answer::Running, Answer::Exited);
        Ok((answer, state.output.clone()))
    }

    pub(crate) fn signal(&self, number: u32, signal: i32) -> Result<Answer> {
        let job = self.get(number)?;
        let signal = Signal::from_named_raw(signal).with_context(|| format!("{signal} is no signal's number"))?;
        // Under the lock, and only before its end was seen: the number may be another's afterwards.
        let state = lock(&job.state);
        if state.exit.is_none()
            && let Some(pid) = Pid::from_raw(i32::try_from(job.pid)?)
        {
            rustix::process::kill_process(pid, signal).with_context(|| format!("kill {}", job.pid))?;
        }
        Ok(Answer::Done)
    }
}

impl Job {
    /// Copies the output until all writers are gone, then takes the exit status.
    fn follow(&self, mut child: Child, begun: Instant, output: PipeReader, label: &str) {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        while matches!(output.read_until(b'\n', &mut line), Ok(1..)) {
            println!("[{label}] {}", String::from_utf8_lossy(&line).trim_end());
            let mut state = lock(&self.state);
            if state.output.len() + line.len() <= OUTPUT_LIMIT_BYTES {
                state.output.append(&mut line);
            }
            line.clear();
        }
        let (code, signal) = child.wait().map_or((None, None), |status| (status.code(), status.signal()));
        let exit = Exit { code, signal, took_us: u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX) };
        lock(&self.state).exit = Some(exit);
        self.ended.notify_all();
    }
}
