//! QEMU's command line, and which accelerator really runs a kernel.

use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result};
use guest_init::{CONTROL_PORT, NODE_PORT, REGISTRATION_PORT};

use super::initramfs::Kernel;
use super::{Architecture, GuestOptions, ScsiHardware};
use crate::console::Console;
use crate::process::{Process, Start};
use crate::tools;

/// A kernel says its version some 0.1 s after KVM has begun, if KVM works.
const KVM_LIMIT: Duration = Duration::from_secs(5);

/// `kvm` where it really runs a kernel, else `tcg`; `$PROXMOX_CSI_ACCEL` decides without a look.
fn accelerator(kernel: &Kernel) -> &'static str {
    static FOUND: OnceLock<&'static str> = OnceLock::new();
    FOUND.get_or_init(|| match std::env::var("PROXMOX_CSI_ACCEL").as_deref() {
        Ok("kvm") => "kvm",
        Ok(_) => "tcg",
        Err(_) if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() => "tcg",
        // A /dev/kvm that opens may still be refused its registers, or hang (nested, emulated).
        Err(_) if kvm_runs(kernel).is_ok() => "kvm",
        Err(_) => "tcg",
    })
}

fn kvm_runs(kernel: &Kernel) -> Result<()> {
    let console = Console::default();
    let mut args: Vec<String> = words("-machine pc,accel=kvm -cpu max -m 256 -nodefaults -no-user-config -display none -no-reboot");
    args.extend(words("-chardev stdio,id=console,signal=off -serial chardev:console -append console=ttyS0"));
    args.extend(["-kernel".into(), kernel.image.display().to_string()]);
    let _process = start(Architecture::X86_64, args, Path::new("/dev/null"), &console)?;
    console.wait_for("Linux version", KVM_LIMIT)
}

/// Starts QEMU; its own complaints go where the console goes.
pub(super) fn start(architecture: Architecture, args: Vec<String>, log: &Path, console: &Console) -> Result<Process> {
    let name = architecture.emulator();
    let program = tools::program(name).with_context(|| format!("{name} is missing: run scripts/tools demo, or scripts/tools aarch64"))?;
    Process::start(Start { program: program.into(), args, env: Vec::new(), log: log.into() }, console)
}

fn words(line: &str) -> Vec<String> {
    line.split(' ').map(str::to_owned).collect()
}

/// What is the same on every machine. An oops, a hung task or a lockup is a panic, and a panic is QEMU's end (-no-reboot).
const KERNEL_OPTIONS: &str = "quiet panic=-1 oops=panic hung_task_panic=1 softlockup_panic=1 mitigations=off random.trust_cpu=on";
/// Root ports of the machine `virt`: a drive at LUN 1 to here.
const ROOT_PORTS: u8 = 8;

pub(super) fn arguments(options: &GuestOptions, kernel: &Kernel, initramfs: &Path, monitor: &Path) -> Vec<String> {
    let mut args = match options.architecture {
        Architecture::X86_64 => pc(options, kernel),
        Architecture::Aarch64 => virt(options),
    };
    args.extend(words(&format!("-m {} -smp 1", options.memory_mib)));
    args.extend(words("-nodefaults -no-user-config -display none -no-reboot -chardev stdio,id=console,signal=off -serial chardev:console"));
    args.extend(["-qmp".into(), format!("unix:{},server=on,wait=off", monitor.display())]);
    args.extend(["-kernel".into(), kernel.image.display().to_string(), "-initrd".into(), initramfs.display().to_string()]);
    // Port 0: QEMU takes a free one and the monitor tells which.
    let forward = |port: u16| format!("hostfwd=tcp:127.0.0.1:0-:{port}");
    let forwards: Vec<String> = [CONTROL_PORT, NODE_PORT, REGISTRATION_PORT].into_iter().map(forward).collect();
    args.extend(["-netdev".into(), format!("user,id=net0,{}", forwards.join(","))]);
    if let Some(serial) = &options.smbios_serial {
        // QEMU's option syntax doubles a comma in a value.
        args.extend(["-smbios".into(), format!("type=1,serial={}", serial.replace(',', ",,"))]);
    }
    args
}

/// The topology is Proxmox's for the machine type pc, down to bus and slot.
fn pc(options: &GuestOptions, kernel: &Kernel) -> Vec<String> {
    let accelerator = accelerator(kernel);
    let mut args = words(&format!("-machine pc,accel={accelerator} -cpu max"));
    // TCG shows the host's own TSC, whose rate a kernel that boots beside other work gets wrong: its clock then runs at twice the speed.
    // And a timer interrupt that comes late is taken for a broken IO-APIC, which is a panic; under KVM the kernel leaves that check out.
    let clock = if accelerator == "tcg" { " clocksource=acpi_pm tsc=unstable no_timer_check" } else { "" };
    args.extend(["-append".into(), format!("console=ttyS0 {KERNEL_OPTIONS}{clock} {}", options.kernel_options)]);
    args.extend(words(
        "-device pci-bridge,id=pci.1,chassis_nr=1,bus=pci.0,addr=0x1e -device pci-bridge,id=pci.2,chassis_nr=2,bus=pci.0,addr=0x1f",
    ));
    args.extend(words(match options.scsi_hardware {
        ScsiHardware::VirtioScsiSingle => "-device pci-bridge,id=pci.3,chassis_nr=3,bus=pci.0,addr=0x5",
        ScsiHardware::VirtioScsiPci => "-device virtio-scsi-pci,id=scsihw0,bus=pci.0,addr=0x5",
    }));
    args.extend(words("-device virtio-net-pci,netdev=net0,bus=pci.0,addr=0x12,romfile="));
    args
}

/// Without firmware the kernel has a device tree, and hot-plug is PCIe's own: one root port for each controller. The processor is one
/// that has AES and no pointer authentication, whose emulation costs most of the time.
fn virt(options: &GuestOptions) -> Vec<String> {
    let mut args = words("-machine virt,accel=tcg -cpu cortex-a72");
    // Nothing is faster than its emulation: a machine that is busy with other work lets the guest stand still for half a minute.
    args.extend(["-append".into(), format!("console=ttyAMA0 {KERNEL_OPTIONS} watchdog_thresh=60 {}", options.kernel_options)]);
    match options.scsi_hardware {
        ScsiHardware::VirtioScsiSingle => {
            for port in 1..=ROOT_PORTS {
                args.extend(words(&format!("-device pcie-root-port,id=port{port},bus=pcie.0,chassis={port},slot={port}")));
            }
        }
        ScsiHardware::VirtioScsiPci => args.extend(words("-device virtio-scsi-pci,id=scsihw0,bus=pcie.0")),
    }
    args.extend(words("-device virtio-net-pci,netdev=net0,bus=pcie.0,romfile="));
    args
}
