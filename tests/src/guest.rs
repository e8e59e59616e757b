//! The QEMU guest: a real kernel for the node agent, with disks hot-plugged as Proxmox does it.
//!
//! Debian's cloud kernel, an initramfs without tools ([`initramfs`]), QEMU with Proxmox's topology ([`command_line`]), the control
//! channel to PID 1 ([`control`]; the other end is `tests/guest-init`), and the monitor ([`plug`]). A guest ends with its value.

mod bridge;
mod command_line;
mod control;
mod initramfs;
mod plug;
mod qmp;
pub mod wait;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use guest_init::{CONSOLE_PREFIX, CONTROL_PORT, NODE_PORT, NODE_ROOT, REGISTRATION_PORT, Request};

pub use bridge::Bridge;
pub use control::{Ended, Job, Program};
pub use initramfs::with_libraries;
pub use plug::{Fault, FaultyIo};

use crate::calls::Calls;
use crate::console::Console;
use crate::folder;
use crate::machine::{Machine, PluggedDrive};
use crate::process::Process;
use crate::tools;

/// 2 s on an idle machine with TCG; a loaded one has been seen at 9.
const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// QEMU opens its monitor before it does anything else.
const MONITOR_LIMIT: Duration = Duration::from_secs(20);
/// The node agent opens its socket within milliseconds; TCG is slow in the first run of any code.
const NODE_LIMIT: Duration = Duration::from_secs(20);
/// Where the node's binary is, in its own root.
const NODE_PROGRAM: &str = "/proxmox-csi-node";
/// The host's loopback as the guest sees it (QEMU's user network).
pub const HOST_ADDRESS: &str = "10.0.2.2";

/// What the guest is. aarch64 is QEMU's machine `virt`, always emulated; drives are plugged behind PCIe root ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    X86_64,
    Aarch64,
}

impl Architecture {
    /// That of `$PROXMOX_CSI_GUEST`, which is how `scripts/soak` runs the same tests on another machine; else x86_64.
    fn wanted() -> Self {
        match std::env::var("PROXMOX_CSI_GUEST").as_deref() {
            Ok("aarch64") => Self::Aarch64,
            Ok(_) | Err(_) => Self::X86_64,
        }
    }

    fn emulator(self) -> &'static str {
        match self {
            Self::X86_64 => "qemu-system-x86_64",
            Self::Aarch64 => "qemu-system-aarch64",
        }
    }

    /// Rust's target of what runs in the guest.
    fn target(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-linux-musl",
            Self::Aarch64 => "aarch64-unknown-linux-musl",
        }
    }

    /// Behind the series in the name of the kernel's folder.
    fn kernel_suffix(self) -> &'static str {
        match self {
            Self::X86_64 => "",
            Self::Aarch64 => "-arm64",
        }
    }
}

/// The VM's `scsihw`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ScsiHardware {
    /// One controller per drive, hot-plugged with it: Proxmox's default for new VMs.
    #[default]
    VirtioScsiSingle,
    /// One controller for all drives.
    VirtioScsiPci,
}

/// What the guest's kernel has for encryption. All is loaded before anything else is started: there is no modprobe, as nothing is
/// on Talos that could load a module for a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Profile {
    /// As a Debian node, whose modules are at hand: dm-crypt, and AF_ALG, through which programs may use the kernel's ciphers.
    #[default]
    Debian,
    /// As Talos' kernel (6.18's config-amd64): dm-crypt, ext4, xfs, AES-NI and XTS are there from the beginning, AF_ALG is not; no
    /// udev (no guest has one). Its drives hang on virtio-scsi-single, as Proxmox makes them. Not Talos': the kernel itself.
    Talos,
    /// A node that lacks device-mapper.
    WithoutEncryption,
}

#[derive(Debug, Clone)]
pub struct GuestOptions {
    /// In messages and log names.
    pub name: String,
    pub architecture: Architecture,
    pub memory_mib: u32,
    pub scsi_hardware: ScsiHardware,
    /// Series of Debian's cloud kernel.
    pub kernel: String,
    pub profile: Profile,
    /// Files to have in the guest: (path there, file here), all executable.
    pub files: Vec<(String, PathBuf)>,
    /// Behind the usual words of the kernel's command line.
    pub kernel_options: String,
    /// SMBIOS type 1 serial, where Proxmox's `smbios1` can carry the VMID.
    pub smbios_serial: Option<String>,
}

impl Default for GuestOptions {
    fn default() -> Self {
        let kernel = std::env::var("PROXMOX_CSI_KERNEL").unwrap_or_else(|_| "6.1".into());
        let scsi_hardware = ScsiHardware::default();
        Self {
            name: "guest".into(),
            architecture: Architecture::wanted(),
            memory_mib: 256,
            scsi_hardware,
            kernel,
            profile: Profile::default(),
            files: Vec::new(),
            kernel_options: String::new(),
            smbios_serial: None,
        }
    }
}

impl GuestOptions {
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// Puts the release binary of the node agent where [`Guest::start_node`] finds it.
    #[must_use]
    pub fn with_node(mut self) -> Self {
        self.files.push((format!("{NODE_ROOT}{NODE_PROGRAM}"), tools::release_binary_for("proxmox-csi-node", self.architecture.target())));
        self
    }
}

/// Why guests cannot run here, if so; a test says SKIPPED with it.
#[must_use]
pub fn unavailable() -> Option<String> {
    let options = GuestOptions::default();
    let missing = [options.architecture.emulator(), "setpriv"].into_iter().find(|name| tools::program(name).is_none());
    let no_kernel =
        || initramfs::Kernel::find(&options.kernel, options.architecture).err().map(|error| format!("no guest kernel: {error:#}"));
    missing.map(|name| format!("{name} is missing")).or_else(no_kernel)
}

/// A running guest.
#[derive(Debug)]
pub struct Guest {
    name: String,
    architecture: Architecture,
    folder: PathBuf,
    console: Console,
    process: Process,
    qemu: Arc<plug::Qemu>,
    control_port: u16,
    node_port: u16,
    registration_port: u16,
}

impl Guest {
    /// Boots a guest and waits until its PID 1 answers.
    pub fn boot(options: &GuestOptions) -> Result<Self> {
        let folder = folder::new("csi-guest-", &format!("-{}", options.name))?;
        Self::boot_in(&folder, options).inspect_err(|_| {
            // Else the guest's own end does it.
            folder::keep(&folder);
            eprintln!("guest {}: its log is kept in {}", options.name, folder.display());
        })
    }

    fn boot_in(folder: &Path, options: &GuestOptions) -> Result<Self> {
        let name = options.name.clone();
        let kernel = initramfs::Kernel::find(&options.kernel, options.architecture)?;
        let (archive, monitor) = (folder.join("initramfs"), folder.join("qmp.sock"));
        initramfs::write(&archive, &kernel, options.profile, &options.files)?;
        let console = Console::default();
        let process = command_line::start(
            options.architecture,
            command_line::arguments(options, &kernel, &archive, &monitor),
            &folder.join("console.log"),
            &console,
        )?;
        let explain = |what: &str| format!("guest {name}: {what}; {}", console.tail());
        let qemu = wait::until(MONITOR_LIMIT, || {
            console.alive()?;
            Ok::<_, anyhow::Error>(plug::Qemu::connect(&monitor, options.scsi_hardware, options.architecture).ok())
        });
        let qemu = qemu.with_context(|| explain("QEMU did not start"))?.with_context(|| explain("QEMU's monitor does not answer"))?;
        let forwarded = |port| qemu.monitor().forwarded_port(port).map_err(anyhow::Error::msg).with_context(|| explain("port forwarding"));
        let (control_port, node_port, registration_port) = (forwarded(CONTROL_PORT)?, forwarded(NODE_PORT)?, forwarded(REGISTRATION_PORT)?);
        console.wait_for(&format!("{CONSOLE_PREFIX}ready"), BOOT_LIMIT).with_context(|| format!("guest {name} did not boot"))?;
        // Its memory has it now.
        let _ = std::fs::remove_file(&archive);
        let guest = Self {
            name,
            architecture: options.architecture,
            folder: folder.to_owned(),
            console,
            process,
            qemu: Arc::new(qemu),
            control_port,
            node_port,
            registration_port,
        };
        guest.call(Request::Ping, &[])?;
        Ok(guest)
    }

    /// Boots several at once.
    pub fn boot_all(options: &[GuestOptions]) -> Result<Vec<Self>> {
        std::thread::scope(|scope| {
            let boots: Vec<_> = options.iter().map(|options| scope.spawn(|| Self::boot(options))).collect();
            boots.into_iter().map(|boot| boot.join().unwrap_or_else(|_| bail!("a booting thread panicked"))).collect()
        })
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The guest as the simulator plugs drives into it.
    #[must_use]
    pub fn machine(&self) -> Arc<dyn Machine> {
        Arc::clone(&self.qemu) as Arc<dyn Machine>
    }

    /// Plugs a drive whose disk fails at what the faults say.
    pub fn plug_faulty(&self, drive: &PluggedDrive, faults: &[Fault]) -> Result<()> {
        self.qemu.plug_faulty(drive, faults).map_err(|error| anyhow::anyhow!("guest {}: plug: {error}", self.name))
    }

    /// One QMP command, for what [`Machine`] does not cover (`stop`, `cont`).
    pub fn monitor(&self, command: &str, arguments: serde_json::Value) -> Result<serde_json::Value> {
        self.qemu.monitor().execute(command, arguments).map_err(|error| anyhow::anyhow!("guest {}: QMP {command}: {error}", self.name))
    }

    /// Starts the node agent in a root that holds its binary, `/dev`, `/proc`, `/sys`, `/csi`, `/var/lib/kubelet`, and no program
    /// else; waits until its socket (`/csi/csi.sock`) answers.
    pub fn start_node(&self, args: &[&str], env: &[(&str, &str)]) -> Result<Job> {
        self.start_node_of(NODE_PROGRAM, args, env)
    }

    /// The same with another build of the agent, which is in that root under this name.
    pub fn start_node_of(&self, program: &str, args: &[&str], env: &[(&str, &str)]) -> Result<Job> {
        let job = self.spawn(&Program { label: "node", root: Some(NODE_ROOT), program, args, env })?;
        let answers = wait::until(NODE_LIMIT, || {
            if let (Some(exit), output) = self.output(job)? {
                bail!("guest {}: the node agent ended ({exit:?}): {output}", self.name);
            }
            Ok(speaks_http2(self.node_port).then_some(()))
        })?;
        ensure!(
            answers.is_some(),
            "guest {}: no answer on the node's socket within {} s; {}",
            self.name,
            NODE_LIMIT.as_secs(),
            self.quote()
        );
        Ok(job)
    }

    /// Whether what is installed here can be run there.
    #[must_use]
    pub fn runs_this_hosts_programs(&self) -> bool {
        self.architecture == Architecture::X86_64
    }

    /// The port of this host that leads to the node's CSI socket.
    #[must_use]
    pub fn node_port(&self) -> u16 {
        self.node_port
    }

    /// The port of this host that leads to what the node offers to kubelet.
    #[must_use]
    pub fn registration_port(&self) -> u16 {
        self.registration_port
    }

    /// Calls to the node's CSI socket.
    pub fn node(&self) -> Result<Calls> {
        Calls::port(self.node_port)
    }

    /// Where the console's log is, and whatever a test wants to find beside it.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The machine's sudden death: what the guest had not written to its disks is lost.
    pub fn kill_qemu(&self) {
        self.process.kill();
    }

    /// The console's last lines and where all of it is, for an error.
    #[must_use]
    pub fn quote(&self) -> String {
        format!("{} (all of it: {})", self.console.tail(), self.folder.join("console.log").display())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let died = self.console.fatal().is_some();
        self.process.kill();
        if died || std::thread::panicking() || std::env::var_os("PROXMOX_CSI_KEEP_LOGS").is_some() {
            folder::keep(&self.folder);
            eprintln!("guest {}: its log is kept in {}", self.name, self.folder.display());
        } else {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }
}

/// Whether an HTTP/2 server is behind the port: QEMU accepts before the guest listens, and the guest before the node does.
fn speaks_http2(port: u16) -> bool {
    const WORD_LIMIT: Duration = Duration::from_secs(2);
    // RFC 9113, 3.4: the client's preface and an empty SETTINGS frame; the server's own SETTINGS are its first word.
    const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let greet = || -> std::io::Result<usize> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(WORD_LIMIT))?;
        stream.write_all(HELLO)?;
        stream.read(&mut [0; 9])
    };
    greet().is_ok_and(|read| read > 0)
}
