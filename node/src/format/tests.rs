use std::os::unix::fs::MetadataExt;
use std::path::Path;

use disk::mark::{HEAD_BYTES, Marked};

use super::*;
use crate::testing::{Folder, volume};

const HANDLE: &str = "r/z/s/vm-9999-pvc-1";
const SIZE: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

fn image(folder: &Folder) -> Device {
    let path = folder.path().join("image");
    std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
    Device::of_file(&path)
}

fn topology() -> Topology {
    Topology {
        logical_block_size: 512,
        physical_block_size: 512,
        minimum_io_size: 512,
        optimal_io_size: 0,
        is_misaligned: false,
        rotational: false,
    }
}

fn options(filesystem: Filesystem) -> FormatOptions {
    FormatOptions { filesystem, ..FormatOptions::default() }
}

fn make_on(device: &Device, filesystem: Filesystem, ground: Ground, stop: &Stop) -> Result<(), Cause> {
    make(device, &volume(HANDLE), options(filesystem), &topology(), ground, stop)
}

fn marked(device: &Device) -> Marked {
    let mut head = [0; HEAD_BYTES];
    device.read_at(0, &mut head).unwrap();
    probe::mark(&volume(HANDLE)).unwrap().judge(&head)
}

fn on_disk_bytes(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

/// The journal of 1 GiB is 32 MiB, the log 64.
#[test]
fn zeros_are_written_only_where_the_disk_may_hold_something_else() {
    for (filesystem, most) in [(Filesystem::Ext4, MIB), (Filesystem::Xfs, MIB / 4)] {
        let plan = |ground| -> Box<dyn Iterator<Item = Write>> {
            let (volume, topology) = (volume(HANDLE), topology());
            match filesystem {
                Filesystem::Ext4 => Box::new(ext4_plan(SIZE, &volume, options(filesystem), &topology, ground, 1).unwrap()),
                Filesystem::Xfs => Box::new(xfs_plan(SIZE, &volume, options(filesystem), &topology, ground, 1).unwrap()),
            }
        };
        let folder = Folder::new();
        let device = image(&folder);
        let written = execute(&device, plan(Ground::Zeros), &Stop::default()).unwrap();
        assert!(written.zeros == 0 && written.data < most, "{filesystem:?}: {written:?}");
        assert!(on_disk_bytes(device.path()) < most, "{filesystem:?}: {} bytes on the disk", on_disk_bytes(device.path()));
        let written = execute(&device, plan(Ground::Unknown), &Stop::default()).unwrap();
        assert!(written.zeros >= 32 * MIB && written.data < most, "{filesystem:?}: {written:?}");
    }
}

#[test]
fn a_stopped_format_leaves_its_mark_and_can_be_made_again() {
    for filesystem in [Filesystem::Ext4, Filesystem::Xfs] {
        let folder = Folder::new();
        let (device, stop) = (image(&folder), Stop::default());
        stop.request();
        let Err(Cause::Stopped { zeroed_bytes: 0 }) = make_on(&device, filesystem, Ground::Unknown, &stop) else { panic!("not stopped") };
        assert_eq!(marked(&device), Marked::Ours);
        make_on(&device, filesystem, Ground::Unknown, &Stop::default()).unwrap();
        assert_eq!(marked(&device), Marked::No);
    }
}

#[test]
fn a_format_is_stopped_between_two_of_its_zeroed_pieces() {
    let folder = Folder::new();
    let (device, stop) = (image(&folder), Stop::default());
    let plan = xfs_plan(SIZE, &volume(HANDLE), options(Filesystem::Xfs), &topology(), Ground::Unknown, 1).unwrap();
    let mut zeros = 0;
    let writes = Format::new(plan, &probe::mark(&volume(HANDLE)).unwrap()).inspect(|write| {
        zeros += u32::from(matches!(write, Write::Zeros { .. }));
        if zeros == 5 {
            stop.request();
        }
    });
    let stopped = execute(&device, writes, &stop).unwrap_err();
    // Both ends of 128 KiB, without the mark's sector; then two pieces of the log.
    assert_eq!(stopped, Cause::Stopped { zeroed_bytes: 2 * MIB + (256 << 10) - 512 });
    assert!(stopped.to_string().contains(&(2 * MIB + (256 << 10) - 512).to_string()), "{stopped}");
    assert_eq!(marked(&device), Marked::Ours);
}

/// Cut short, it would lose what it knows of the disk, to save seconds.
#[test]
fn a_format_that_zeroes_nothing_is_not_stopped() {
    for filesystem in [Filesystem::Ext4, Filesystem::Xfs] {
        let folder = Folder::new();
        let (device, stop) = (image(&folder), Stop::default());
        stop.request();
        make_on(&device, filesystem, Ground::Zeros, &stop).unwrap();
        assert_eq!(marked(&device), Marked::No);
    }
}
