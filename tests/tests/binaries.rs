//! The release binaries as files and as processes: static, small when idle, alive on both architectures, and tolerant
//! of every command line that the reference driver's manifests use.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may fail by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use proto::csi;
use testbed::tools;

const ARCHITECTURES: [&str; 2] = ["x86_64", "aarch64"];
const BINARIES: [&str; 2] = ["proxmox-csi-node", "proxmox-csi-controller"];

fn binary(architecture: &str, name: &str) -> PathBuf {
    let x86_64 = tools::release_binary(name);
    let path = x86_64.to_string_lossy().replace("x86_64-unknown-linux-musl", &format!("{architecture}-unknown-linux-musl"));
    assert!(Path::new(&path).exists(), "{path} is missing: run scripts/build");
    path.into()
}

/// ELF program headers (gabi 4+, chapter 5): PT_INTERP (3) or a DT_NEEDED (1) entry in PT_DYNAMIC (2) would be dynamic.
fn is_static(elf: &[u8]) -> bool {
    let u16_at = |at: usize| u16::from_le_bytes(elf[at..at + 2].try_into().unwrap());
    let u64_at = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap());
    let (headers, size, count) = (usize::try_from(u64_at(32)).unwrap(), usize::from(u16_at(54)), usize::from(u16_at(56)));
    (0..count).map(|n| headers + n * size).all(|header| match elf[header] {
        3 => false,
        2 => {
            let (offset, length) = (usize::try_from(u64_at(header + 8)).unwrap(), usize::try_from(u64_at(header + 32)).unwrap());
            (offset..offset + length).step_by(16).all(|entry| u64_at(entry) != 1)
        }
        _ => true,
    })
}

#[test]
fn binaries_are_static_musl() {
    for architecture in ARCHITECTURES {
        for name in BINARIES {
            let elf = std::fs::read(binary(architecture, name)).unwrap();
            assert_eq!(&elf[..4], b"\x7fELF");
            let machine = u16::from_le_bytes([elf[18], elf[19]]);
            assert_eq!(machine, if architecture == "x86_64" { 62 } else { 183 }, "{architecture} {name}: e_machine");
            assert!(is_static(&elf), "{architecture} {name} wants a dynamic linker or a library");
            for text in [env!("CARGO_MANIFEST_DIR"), "/.cargo/registry"] {
                assert!(!elf.windows(text.len()).any(|window| window == text.as_bytes()), "{architecture} {name} carries the path {text}");
            }
        }
    }
}

/// A running binary, killed when the test ends.
struct Running {
    child: Child,
    folder: PathBuf,
    log: PathBuf,
}

impl Running {
    fn start(program: &Path, emulator: Option<&str>, label: &str, args: &[String], env: &[(&str, String)]) -> Self {
        let folder = std::env::temp_dir().join(format!("csi-bin-{label}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        let log = folder.join("log");
        let mut command = match emulator {
            Some(emulator) => {
                let mut command = Command::new(emulator);
                command.arg(program);
                command
            }
            None => Command::new(program),
        };
        let args = args.iter().map(|arg| arg.replace("@", &folder.to_string_lossy()));
        let env = env.iter().map(|(name, value)| (*name, value.replace("@", &folder.to_string_lossy())));
        let child = command
            .args(args)
            .env_clear()
            .envs(env)
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(&log).unwrap())
            .stderr(std::fs::File::options().append(true).open(&log).unwrap())
            .spawn()
            .unwrap();
        Self { child, folder, log }
    }

    /// Asks Probe until it answers; emulated binaries take their time.
    async fn probe(&mut self) -> csi::ProbeResponse {
        let socket = self.folder.join("csi.sock");
        let target = tonic::transport::Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if let Ok(channel) = target.connect().await {
                return csi::identity_client::IdentityClient::new(channel).probe(csi::ProbeRequest {}).await.unwrap().into_inner();
            }
            if let Some(ended) = self.child.try_wait().unwrap() {
                panic!("ended with {ended}: {}", self.log());
            }
            assert!(Instant::now() < deadline, "no answer after 30 s: {}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Its exit code, when it ends by itself within 30 s.
    async fn ended(&mut self) -> Option<i32> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "still there after 30 s: {}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// SIGTERM, then the exit code, within 15 s.
    async fn terminate(&mut self) -> Option<i32> {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let deadline = Instant::now() + Duration::from_secs(15);
        loop {
            if let Some(ended) = self.child.try_wait().unwrap() {
                return ended.code();
            }
            assert!(Instant::now() < deadline, "still there 15 s after SIGTERM: {}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Resident memory in KiB.
    fn rss_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn args(line: &str) -> Vec<String> {
    line.split_whitespace().map(String::from).collect()
}

fn minimal(name: &str) -> Vec<String> {
    args(match name {
        "proxmox-csi-node" => "--csi-address=unix://@/csi.sock --node-id=worker-1/101 --region=fsn1 --zone=pve-1",
        _ => "--csi-address=unix://@/csi.sock --cloud-config=@/missing.yaml",
    })
}

#[tokio::test]
async fn aarch64_binaries_start_and_answer_probe() {
    for name in BINARIES {
        let Some(emulator) = tools::program("qemu-aarch64-static") else {
            return tools::skipped("qemu-aarch64-static is missing: scripts/tools test installs it");
        };
        let mut running = Running::start(&binary("aarch64", name), Some(&emulator), &format!("arm-{name}"), &minimal(name), &[]);
        let answer = running.probe().await;
        assert_eq!(answer.ready, Some(name == "proxmox-csi-node"), "{name}");
        assert_eq!(running.terminate().await, Some(0), "{name}: {}", running.log());
    }
}

#[tokio::test]
async fn idle_binaries_are_small_and_end_at_sigterm() {
    for (name, limit_kib) in [("proxmox-csi-node", 2500), ("proxmox-csi-controller", 4000)] {
        let mut running = Running::start(&binary("x86_64", name), None, &format!("idle-{name}"), &minimal(name), &[]);
        running.probe().await;
        let rss_kib = running.rss_kib();
        println!("{name}: idle RSS {rss_kib} KiB");
        assert!(rss_kib <= limit_kib, "{name}: idle RSS {rss_kib} KiB, limit {limit_kib} KiB");
        assert_eq!(running.terminate().await, Some(0), "{name}: {}", running.log());
        assert!(!running.folder.join("csi.sock").exists(), "{name} leaves its socket behind");
    }
}

/// The argument lists of the reference driver's chart 0.5.9, its plain manifests and its Talos manifest, and each flag in each
/// form that Go's flag package takes.
#[tokio::test]
async fn command_lines_of_the_reference_drivers_manifests_work() {
    let lines = [
        ("proxmox-csi-node", "-v=5 --csi-address=unix://@/csi.sock --node-id=worker-1", vec![]),
        ("proxmox-csi-node", "-v=4 --csi-address=unix://@/csi.sock --node-id=worker-1 --master= --kubeconfig=", vec![]),
        ("proxmox-csi-node", "-v 5 -csi-address unix://@/csi.sock -node-id worker-1", vec![]),
        ("proxmox-csi-node", "", vec![("CSI_ENDPOINT", "unix://@/csi.sock"), ("NODE_NAME", "worker-1"), ("LOG_LEVEL", "5")]),
        ("proxmox-csi-controller", "-v=5 --csi-address=unix://@/csi.sock --cloud-config=@/config.yaml", vec![]),
        (
            "proxmox-csi-controller",
            "-v=5 --csi-address=unix://@/csi.sock --cloud-config=@/config.yaml --metrics-address=127.0.0.1:0 --metrics-path=/metrics --kubeconfig=",
            vec![],
        ),
        ("proxmox-csi-controller", "--v 5 -csi-address unix://@/csi.sock -cloud-config @/config.yaml", vec![]),
        (
            "proxmox-csi-controller",
            "",
            vec![("CSI_ENDPOINT", "unix://@/csi.sock"), ("CLOUD_CONFIG", "@/config.yaml"), ("KUBECONFIG", ""), ("LOG_LEVEL", "debug")],
        ),
    ];
    for (number, (name, line, env)) in lines.into_iter().enumerate() {
        let env: Vec<(&str, String)> = env.into_iter().map(|(name, value)| (name, value.to_string())).collect();
        let mut running = Running::start(&binary("x86_64", name), None, &format!("line-{number}"), &args(line), &env);
        running.probe().await;
        assert_eq!(running.terminate().await, Some(0), "{name} {line}: {}", running.log());
    }
}

/// Who names it wants the Lease: to serve without one would make two that act.
#[tokio::test]
async fn a_kubeconfig_that_is_not_there_is_no_reason_to_go_without() {
    let line = args("--csi-address=unix://@/csi.sock --cloud-config=@/config.yaml");
    let env = [("KUBECONFIG", "/none".to_string())];
    let mut refused = Running::start(&binary("x86_64", "proxmox-csi-controller"), None, "no-kubeconfig", &line, &env);
    let code = refused.ended().await;
    assert!(code == Some(1) && refused.log().contains("kubeconfig /none: it is not there"), "{code:?}: {}", refused.log());
}

#[test]
fn version_help_and_a_wrong_flag_answer_at_once() {
    for name in BINARIES {
        let run = |arg: &str| Command::new(binary("x86_64", name)).arg(arg).env_clear().output().unwrap();
        let version = run("--version");
        assert!(version.status.success(), "{name} --version");
        assert!(String::from_utf8_lossy(&version.stdout).contains(env!("CARGO_PKG_VERSION")), "{name} --version: {version:?}");
        let help = run("--help");
        assert!(help.status.success() && String::from_utf8_lossy(&help.stdout).contains("--csi-address"), "{name} --help: {help:?}");
        let wrong = run("--csi-adress=x");
        let said = String::from_utf8_lossy(&wrong.stderr).into_owned();
        assert!(!wrong.status.success() && said.contains("--csi-adress=x") && said.contains("--csi-address"), "{name}: {said}");
    }
}
