//! The guest's root: a newc cpio with PID 1, the kernel modules it loads, and the files a test asks for. No tools.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail, ensure};
use guest_init::MODULES;

use super::{Architecture, Profile};
use crate::tools;

/// Enough for disks, network and filesystems; what they need in turn is read from the modules. ext4 itself is built in.
/// `crc32c_intel`: without it, libcrc32c takes the slow generic one.
const WANTED_MODULES: [&str; 6] = ["virtio_pci", "virtio_net", "virtio_scsi", "sd_mod", "crc32c_intel", "xfs"];
/// dm-crypt with the ciphers of LUKS. `ecb` and `xts` are asked for by name, which no dependency shows. AES by the processor's own
/// instructions is called by its architecture.
const ENCRYPTION_MODULES: [&str; 5] = ["ecb", "xts", "aesni_intel", "aes_ce_blk", "dm_crypt"];
/// The kernel's ciphers for programs, AF_ALG.
const USER_CRYPTO_MODULES: [&str; 2] = ["af_alg", "algif_skcipher"];

/// A cloud kernel as `scripts/tools` unpacks it.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) image: PathBuf,
    /// Module name (with `_`) → file, relative to [`Kernel::folder`].
    modules: BTreeMap<String, PathBuf>,
    folder: PathBuf,
    architecture: Architecture,
}

impl Kernel {
    pub(super) fn find(series: &str, architecture: Architecture) -> Result<Self> {
        let root = tools::cache().join(format!("kernel-{series}{}", architecture.kernel_suffix()));
        let only = |folder: PathBuf, prefix: &str| -> Result<PathBuf> {
            let entries = std::fs::read_dir(&folder).with_context(|| format!("{}: run scripts/tools demo", folder.display()))?;
            let found = entries.filter_map(|entry| Some(entry.ok()?.path())).find(|path| name(path).starts_with(prefix));
            found.with_context(|| format!("{} holds no {prefix}…", folder.display()))
        };
        let image = only(root.join("boot"), "vmlinuz-")?;
        let folder = only(root.join("lib/modules"), series)?;
        let order = std::fs::read_to_string(folder.join("modules.order")).context("read modules.order")?;
        let modules = order.lines().map(|line| (name(Path::new(line)).trim_end_matches(".ko").replace('-', "_"), line.into())).collect();
        Ok(Self { image, modules, folder, architecture })
    }

    /// The wanted modules and what they depend on, in loading order: file name in the guest and bytes.
    fn load_order(&self, profile: Profile) -> Result<Vec<(String, Vec<u8>)>> {
        let (encryption, user_crypto): (&[&str], &[&str]) = match profile {
            Profile::Debian => (&ENCRYPTION_MODULES, &USER_CRYPTO_MODULES),
            Profile::Talos => (&ENCRYPTION_MODULES, &[]),
            Profile::WithoutEncryption => (&[], &[]),
        };
        let mut order = Vec::new();
        for wanted in WANTED_MODULES.iter().chain(encryption).chain(user_crypto) {
            self.visit(wanted, &mut order)?;
        }
        Ok(order)
    }

    fn visit(&self, module: &str, order: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
        let file = format!("/modules/{module}.ko");
        if order.iter().any(|(seen, _)| *seen == file) {
            return Ok(());
        }
        // What modules.order does not list is built in.
        let Some(path) = self.modules.get(module) else { return Ok(()) };
        let path = self.folder.join(path);
        let bytes = std::fs::read(&path).with_context(|| format!("read module {}", path.display()))?;
        ensure!(bytes.starts_with(b"\x7fELF"), "{} is compressed: only plain modules are loaded", path.display());
        for dependency in depends(&bytes).with_context(|| format!("{} has no depends= in its .modinfo", path.display()))? {
            self.visit(&dependency, order)?;
        }
        order.push((file, bytes));
        Ok(())
    }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// `depends=a,b` in .modinfo (include/linux/module.h); the package carries no modules.dep, which depmod makes when it is installed.
fn depends(module: &[u8]) -> Option<Vec<String>> {
    const KEY: &[u8] = b"\0depends=";
    let at = module.windows(KEY.len()).position(|window| window == KEY)? + KEY.len();
    let value = module.get(at..)?.split(|byte| *byte == 0).next()?;
    let names = String::from_utf8_lossy(value);
    Some(names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect())
}

/// PID 1, built once per process; `$PROXMOX_CSI_GUEST_INIT` names one built before, for x86_64.
fn guest_init(architecture: Architecture) -> Result<PathBuf> {
    static BUILT: [OnceLock<Result<PathBuf, String>>; 2] = [OnceLock::new(), OnceLock::new()];
    let [x86_64, aarch64] = &BUILT;
    let built = match (architecture, std::env::var_os("PROXMOX_CSI_GUEST_INIT")) {
        (Architecture::X86_64, Some(path)) => return Ok(path.into()),
        (Architecture::X86_64, None) => x86_64,
        (Architecture::Aarch64, _) => aarch64,
    };
    let build = || build_guest_init(architecture.target()).map_err(|error| format!("{error:#}"));
    built.get_or_init(build).clone().map_err(anyhow::Error::msg)
}

fn build_guest_init(triple: &str) -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let output = Command::new("cargo")
        .args(["build", "--quiet", "--release", "--target", triple, "-p", "proxmox-csi-guest-init", "--bin", "guest-init"])
        .current_dir(&root)
        .output()
        .context("start cargo for the guest's PID 1")?;
    if !output.status.success() {
        bail!("cargo build of the guest's PID 1: {}", String::from_utf8_lossy(&output.stderr).trim_end());
    }
    Ok(target.join(triple).join("release/guest-init"))
}

/// Writes the archive. `files` are (path in the guest, file here); each keeps whether it is executable.
pub(super) fn write(to: &Path, kernel: &Kernel, profile: Profile, files: &[(String, PathBuf)]) -> Result<()> {
    let init = guest_init(kernel.architecture)?;
    let mut archive = Cpio::default();
    // The kernel opens it for PID 1's input and output before anything is mounted.
    archive.entry("dev/console", 0o020_600, (5, 1), &[]);
    archive.entry("init", 0o100_755, (0, 0), &std::fs::read(&init).with_context(|| format!("read {}", init.display()))?);
    let modules = kernel.load_order(profile)?;
    let order: String = modules.iter().map(|(file, _)| format!("{file}\n")).collect();
    archive.entry(MODULES.trim_start_matches('/'), 0o100_644, (0, 0), order.as_bytes());
    for (file, bytes) in &modules {
        archive.entry(file.trim_start_matches('/'), 0o100_644, (0, 0), bytes);
    }
    for (path, file) in files {
        let bytes = std::fs::read(file)
            .with_context(|| format!("read {} for the guest's {path} (scripts/build makes the release binaries)", file.display()))?;
        archive.entry(path.trim_start_matches('/'), 0o100_755, (0, 0), &bytes);
    }
    std::fs::write(to, archive.finish()).with_context(|| format!("write {}", to.display()))
}

/// A program and the shared libraries that `ldd` finds for it, at the same paths in the guest.
pub fn with_libraries(program: &Path) -> Result<Vec<(String, PathBuf)>> {
    let output = Command::new("ldd").arg(program).output().context("start ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    // `libc.so.6 => /lib/… (0x…)`, `/lib64/ld-linux-x86-64.so.2 (0x…)`; a static program has no such line.
    let libraries = text.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned);
    Ok(std::iter::once(program.display().to_string()).chain(libraries).map(|path| (path.clone(), path.into())).collect())
}

/// The newc format: Documentation/driver-api/early-userspace/buffer-format.rst.
#[derive(Debug, Default)]
struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
    folders: Vec<String>,
}

impl Cpio {
    /// Adds the parent folders first: the kernel makes none by itself.
    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        for (at, _) in path.match_indices('/') {
            let parent = path.get(..at).unwrap_or_default().to_owned();
            if !self.folders.contains(&parent) {
                self.record(&parent, 0o040_755, (0, 0), &[]);
                self.folders.push(parent);
            }
        }
        self.record(path, mode, device, content);
    }

    fn record(&mut self, path: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        self.entries += 1;
        let links = 1;
        // Magic; inode, mode, user, group, links, time, size, device, special device, length of the name with its NUL, checksum.
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name_bytes = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
        self.bytes.extend(b"070701");
        for field in [self.entries, mode, 0, 0, links, 0, size, 0, 0, major, minor, name_bytes, 0] {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(path.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.record("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpio_is_read_back_by_cpio() {
        let Some(cpio) = tools::program("cpio") else { return tools::skipped("cpio is missing") };
        let mut archive = Cpio::default();
        archive.entry("dev/console", 0o020_600, (5, 1), &[]);
        archive.entry("a/b/file", 0o100_755, (0, 0), b"12345");
        archive.entry("a/b/other", 0o100_644, (0, 0), b"");
        let file = std::env::temp_dir().join(format!("csi-cpio-{}", std::process::id()));
        std::fs::write(&file, archive.finish()).unwrap();
        let list = Command::new(cpio).args(["-itv", "--quiet", "-F"]).arg(&file).output().unwrap();
        std::fs::remove_file(&file).unwrap();
        let text = String::from_utf8_lossy(&list.stdout);
        let names: Vec<&str> = text.lines().filter_map(|line| line.split_whitespace().last()).collect();
        assert_eq!(names, ["dev", "dev/console", "a", "a/b", "a/b/file", "a/b/other"], "{text}{}", String::from_utf8_lossy(&list.stderr));
        assert!(text.contains("crw-------") && text.contains("5,   1"), "{text}");
    }

    #[test]
    fn dependencies_are_read_from_modinfo() {
        assert_eq!(depends(b"\0license=GPL\0depends=virtio-ring,virtio\0name=x\0"), Some(vec!["virtio_ring".into(), "virtio".into()]));
        assert_eq!(depends(b"\0license=GPL\0depends=\0"), Some(vec![]));
        assert_eq!(depends(b"\0license=GPL\0"), None);
    }
}
