//! PID 1 of the test guest: mounts, modules, network, the way to the node's socket, and the control channel.
//!
//! Prints exactly one verdict line on the console before it turns the machine off. Starts nothing by itself.
//! Also called as `guest-init enter ROOT PROGRAM ARGS…`, between fork and exec, to change a program's root.
#![forbid(unsafe_code)]

mod control;
mod jobs;
mod network;

use std::ffi::OsString;
use std::fs::File;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use guest_init::{
    CONSOLE_PREFIX, CONTROL_PORT, FAILURE, MODULES, NODE_PORT, NODE_ROOT, NODE_SOCKET, REGISTRATION_PORT, REGISTRATION_SOCKET,
};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::system::RebootCommand;

/// Filesystem, where, options. The kubelet's folder is a mount of its own in the node's root, as in its pod.
const MOUNTS: [(&str, &str); 8] = [
    ("devtmpfs", "/dev"),
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
    ("devtmpfs", "/node/dev"),
    ("proc", "/node/proc"),
    ("sysfs", "/node/sys"),
];

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    if let [_, verb, root, program, rest @ ..] = args.as_slice()
        && verb == "enter"
    {
        // Only an error comes back.
        eprintln!("guest-init: {:#}", enter(root, program, rest));
        return ExitCode::from(127);
    }
    let Err(error) = set_up_and_serve();
    println!("{FAILURE}{error:#}");
    turn_off()
}

/// Replaces this process by a program that sees `root` alone.
fn enter(root: &OsString, program: &OsString, args: &[OsString]) -> anyhow::Error {
    if let Err(error) = rustix::process::chroot(root).and_then(|()| rustix::process::chdir("/")) {
        return anyhow::Error::from(error).context(format!("chroot to {}", root.display()));
    }
    anyhow::Error::from(Command::new(program).args(args).exec()).context(format!("exec {} in {}", program.display(), root.display()))
}

fn set_up_and_serve() -> Result<std::convert::Infallible> {
    mounts()?;
    modules()?;
    network::up("eth0", Ipv4Addr::new(10, 0, 2, 15), 24, Ipv4Addr::new(10, 0, 2, 2))?;
    for (port, socket) in [(NODE_PORT, NODE_SOCKET), (REGISTRATION_PORT, REGISTRATION_SOCKET)] {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).with_context(|| format!("listen for {socket}"))?;
        std::thread::Builder::new().spawn(move || forward(&listener, socket)).context("start the forwarding thread")?;
    }
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, CONTROL_PORT)).context("listen for the harness")?;
    println!("{CONSOLE_PREFIX}ready");
    let jobs = Arc::new(jobs::Jobs::default());
    loop {
        let (stream, _) = listener.accept().context("accept on the control channel")?;
        let jobs = Arc::clone(&jobs);
        std::thread::Builder::new().spawn(move || control::serve(&stream, &jobs)).context("start a control thread")?;
    }
}

fn mounts() -> Result<()> {
    // The node's root is a mount, as a container's is.
    std::fs::create_dir_all(NODE_ROOT).with_context(|| format!("mkdir {NODE_ROOT}"))?;
    rustix::mount::mount_bind(NODE_ROOT, NODE_ROOT).with_context(|| format!("bind {NODE_ROOT}"))?;
    for folder in ["/node/csi", "/node/var/lib/kubelet", "/var/lib"] {
        std::fs::create_dir_all(folder).with_context(|| format!("mkdir {folder}"))?;
    }
    for (filesystem, target) in MOUNTS.into_iter().chain([("tmpfs", "/node/var/lib/kubelet")]) {
        std::fs::create_dir_all(target).with_context(|| format!("mkdir {target}"))?;
        rustix::mount::mount("none", target, filesystem, MountFlags::empty(), None)
            .with_context(|| format!("mount {filesystem} on {target}"))?;
    }
    // One name for all: what runs outside the node's root (csi-sanity) uses the same paths.
    std::os::unix::fs::symlink("/node/var/lib/kubelet", "/var/lib/kubelet").context("symlink /var/lib/kubelet")?;
    let shared = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", shared).context("make / shared")?;
    Ok(())
}

fn modules() -> Result<()> {
    let order = std::fs::read_to_string(MODULES).with_context(|| format!("read {MODULES}"))?;
    for path in order.lines() {
        let file = File::open(path).with_context(|| format!("open module {path}"))?;
        rustix::system::finit_module(&file, c"", 0).with_context(|| format!("load module {path}"))?;
    }
    Ok(())
}

/// Carries each connection to the node's socket. While that is not there, the caller sees its connection closed.
fn forward(listener: &TcpListener, socket: &str) {
    for stream in listener.incoming().flatten() {
        let Ok(node) = UnixStream::connect(socket) else { continue };
        if let Err(error) = splice(stream, node) {
            println!("{CONSOLE_PREFIX}forward to {socket}: {error}");
        }
    }
}

fn splice(tcp: TcpStream, unix: UnixStream) -> std::io::Result<()> {
    tcp.set_nodelay(true)?;
    let (mut tcp_in, mut unix_out) = (tcp.try_clone()?, unix.try_clone()?);
    let (mut tcp_out, mut unix_in) = (tcp, unix);
    std::thread::Builder::new().spawn(move || {
        let _ = std::io::copy(&mut tcp_in, &mut unix_out);
        let _ = unix_out.shutdown(std::net::Shutdown::Write);
    })?;
    std::thread::Builder::new().spawn(move || {
        let _ = std::io::copy(&mut unix_in, &mut tcp_out);
        let _ = tcp_out.shutdown(std::net::Shutdown::Both);
    })?;
    Ok(())
}

/// The kernel would panic if PID 1 returned.
fn turn_off() -> ExitCode {
    rustix::fs::sync();
    loop {
        if let Err(error) = rustix::system::reboot(RebootCommand::PowerOff) {
            println!("{CONSOLE_PREFIX}power off: {error}");
        }
        std::thread::park_timeout(Duration::from_secs(1));
    }
}
