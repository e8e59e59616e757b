//! Does on any block device what NodeStageVolume does once it has found the volume's disk, with the same code: looks at it, makes a
//! filesystem if it is blank, mounts it; and prints how many microseconds each part took.
//!
//! ```text
//! truncate -s 10G image; D=$(losetup --find --show image)
//! cargo run --release -p proxmox-csi-node --example stage -- --mount /mnt $D
//! ```
//!
//! A DEVICE THAT READS AS BLANK IS FORMATTED, and taken to be zeros from end to end.
#![allow(clippy::print_stderr, clippy::print_stdout, reason = "a program for the command line")]

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use argh::FromArgs;
use node::format::{self, Ground, Stop};
use node::plan::Surface;
use node::probe::probe;
use node::request::{Filesystem, FormatOptions, Volume, Zeroed};
use node::sys::block::{Access, Device};
use node::sys::scsi::Topology;
use node::sys::{Dev, mount};

/// Stages a block device as the node agent would.
#[derive(FromArgs)]
struct Arguments {
    /// what to make of a blank device: ext4 (default) or xfs
    #[argh(option, from_str_fn(filesystem), default = "Filesystem::Ext4")]
    fs: Filesystem,
    /// an existing folder to mount it at; without, it is only looked at
    #[argh(option)]
    mount: Option<PathBuf>,
    /// a block device of 512-byte sectors, such as a loop device
    #[argh(positional)]
    device: PathBuf,
}

fn filesystem(name: &str) -> Result<Filesystem, String> {
    match name {
        "ext4" => Ok(Filesystem::Ext4),
        "xfs" => Ok(Filesystem::Xfs),
        other => Err(format!("{other:?} is neither ext4 nor xfs")),
    }
}

fn main() -> ExitCode {
    let arguments: Arguments = argh::from_env();
    match stage(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stage: {}: {error}", arguments.device.display());
            ExitCode::FAILURE
        }
    }
}

fn stage(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let path = &arguments.device;
    let handle: proto::VolumeHandle = "example/example/example/vm-9999-example".parse()?;
    let volume = Volume { serial: handle.serial(), handle };
    let dev = Dev::from_raw(std::fs::metadata(path)?.rdev());
    let look = |access| -> Result<(Device, Surface), Box<dyn std::error::Error>> {
        let device = Device::open(path, dev, access)?;
        let surface = probe(&device, &volume, Zeroed::Yes).map_err(|error| error.to_string())?;
        Ok((device, surface))
    };
    let begun = Instant::now();
    let (_, mut surface) = look(Access::Shared)?;
    let probed = begun.elapsed();
    let Some(folder) = &arguments.mount else {
        println!("{surface:?} probe_us={} total_us={}", probed.as_micros(), probed.as_micros());
        return Ok(());
    };
    if surface == Surface::Blank {
        // Once more, when nobody else can have it.
        let (device, now) = look(Access::Exclusive)?;
        if now != Surface::Blank {
            return Err(format!("{now:?} now").into());
        }
        let options = FormatOptions { filesystem: arguments.fs, ..FormatOptions::default() };
        let topology = Topology {
            logical_block_size: 512,
            physical_block_size: 512,
            minimum_io_size: 512,
            optimal_io_size: 0,
            rotational: false,
            is_misaligned: false,
        };
        format::make(&device, &volume, options, &topology, Ground::Zeros, &Stop::default()).map_err(|cause| cause.to_string())?;
        drop(device);
        surface = look(Access::Shared)?.1;
    }
    let made = begun.elapsed();
    let by = match surface {
        Surface::Ext(_) => Filesystem::Ext4,
        Surface::Xfs => Filesystem::Xfs,
        other => return Err(format!("holds {other:?}").into()),
    };
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    mount::filesystem(by.name(), path, &name, folder, &mount::Options::default()).map_err(|refused| refused.to_string())?;
    let mounted = begun.elapsed();
    println!(
        "probe_us={} make_us={} mount_us={} total_us={}",
        probed.as_micros(),
        (made - probed).as_micros(),
        (mounted - made).as_micros(),
        mounted.as_micros()
    );
    Ok(())
}
