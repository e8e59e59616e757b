//! What sysfs says of a SCSI disk: attributes, cut at 0xFF, in the order of [`ATTRIBUTES`].
#![no_main]

use libfuzzer_sys::fuzz_target;
use node::info::{Configured, look};
use node::sys::scsi::{Address, disk, scan, topology};
use node::{identity, sys};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

/// Text before pages, which may hold any byte but 0xFF.
const ATTRIBUTES: [&str; 17] = [
    "block/sda/dev",
    "block/sda/size",
    "state",
    "vendor",
    "wwid",
    "vpd_pg80",
    "vpd_pg83",
    "vpd_pg0",
    "block/sda/ro",
    "block/sda/queue/logical_block_size",
    "block/sda/queue/physical_block_size",
    "block/sda/queue/minimum_io_size",
    "block/sda/queue/optimal_io_size",
    "block/sda/queue/rotational",
    "block/sda/alignment_offset",
    "../../../../class/dmi/id/product_serial",
    "../../../../labels",
];

static ROOT: LazyLock<PathBuf> = LazyLock::new(|| {
    let memory = Path::new("/dev/shm");
    let root = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() }.join(format!("fuzz-sysfs-{}", std::process::id()));
    for folder in ["bus/scsi/devices/0:0:0:1/block/sda/queue", "class/dmi/id"] {
        fs::create_dir_all(root.join(folder)).expect("a folder of our own");
    }
    root
});

fuzz_target!(init: fuzz::limit_memory(), |data: &[u8]| {
    let device = ROOT.join("bus/scsi/devices/0:0:0:1");
    let mut parts = fuzz::parts(data);
    for name in ATTRIBUTES {
        let path = device.join(name);
        match parts.next() {
            Some(bytes) => fs::write(path, bytes).expect("written"),
            None => drop(fs::remove_file(path)),
        }
    }
    let address: Address = "0:0:0:1".parse().expect("an address");
    let seen = disk(&ROOT, address);
    assert_eq!(scan(&ROOT).map(|disks| disks.first().cloned()), seen.clone());
    let labels = Configured { node_id: "n".into(), labels: Some(ROOT.join("labels")), ..Configured::default() };
    let flags = Configured { region: Some("r".into()), zone: Some("z".into()), ..labels.clone() };
    for info in [&labels, &flags].into_iter().filter_map(|configured| look(configured, &ROOT).ok()) {
        assert!((1..=29).contains(&info.max_volumes) && info.node_id.starts_with('n') && !info.region.is_empty());
    }
    let Ok(Some(seen)) = seen else { return };
    assert_eq!(seen.dev.to_string().parse::<sys::Dev>(), Ok(seen.dev));
    for text in seen.serial.iter().chain(&seen.designators) {
        assert!(text.is_ascii() && !text.is_empty() && text.trim_matches([' ', '\0']) == text, "{text:?}");
    }
    let _ = (identity::name(&seen), identity::is_of_this_driver(&seen), topology(&ROOT, &seen));
});
