//! Every image of the golden manifests (Debian's mkfs.xfs 6.1.0), made again in memory: the same digest.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod image;
mod manifest;

use disk::xfs::{Options, Refusal, plan};
use image::Image;
use manifest::{check, differing_facts, digest};
use serde_json::Value;

const UUID: [u8; 16] = [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef, 0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef];
const TIME: u32 = 1_700_000_000;

/// The options that an entry's command line and mode stand for.
fn options(entry: &Value) -> Options {
    let mut options = Options::new(entry["size"].as_u64().unwrap(), UUID, TIME);
    match entry["mode"].as_str().unwrap() {
        "loop4k" => (options.logical_sector_bytes, options.physical_sector_bytes) = (4096, 4096),
        "loop512" | "file" | "dirty" => {}
        other => panic!("a mode that this test does not know: {other}"),
    }
    options.reads_zeros = entry["mode"] != "dirty";
    let arguments: Vec<&str> = entry["args"].as_str().unwrap().split(' ').collect();
    for pair in arguments.windows(2) {
        match (pair[0], pair[1]) {
            ("-b", size) => options.block_size = Some(size.strip_prefix("size=").unwrap().parse().unwrap()),
            ("-i", "nrext64=1") => options.nrext64 = true,
            ("-i", size) => options.inode_size = Some(size.strip_prefix("size=").unwrap().parse().unwrap()),
            ("-d", "su=65536,sw=4") => (options.min_io_bytes, options.opt_io_bytes) = (65536, 4 * 65536),
            ("-d", "su=512k,sw=3") => (options.min_io_bytes, options.opt_io_bytes) = (512 << 10, 3 * (512 << 10)),
            ("-d", other) => panic!("a stripe that this test does not know: {other}"),
            _ => {}
        }
    }
    options
}

/// What differs from the entry, if anything.
fn compare(entry: &Value) -> Option<String> {
    let options = options(entry);
    let plan = match (plan(&options), entry["rc"] == 0) {
        (Ok(plan), true) => plan,
        (Err(Refusal::TooSmall { .. }), false) => return None,
        (Ok(_), false) => return Some(format!("made, but mkfs.xfs says: {}", entry["error"])),
        (Err(refusal), _) => return Some(format!("refused: {refusal}")),
    };
    let fill = u8::try_from(entry["image"]["fill"].as_u64().unwrap()).unwrap();
    let mut image = Image::new(options.size_bytes, fill);
    plan.for_each(|write| image.apply(&write));
    if digest(&image) == entry["image"]["digest"] {
        return None;
    }
    let sb = &image.unit(0)[..512];
    let word = |at: usize| u64::from(u32::from_be_bytes(sb[at..at + 4].try_into().unwrap()));
    let long = |at: usize| word(at) << 32 | word(at + 4);
    let ours = [
        ("dblocks", long(8)),
        ("logstart", long(48)),
        ("rootino", long(56)),
        ("agblocks", word(84)),
        ("agcount", word(88)),
        ("logblocks", word(96)),
        ("fdblocks", long(144)),
        ("inoalignmt", word(180)),
        ("unit", word(184)),
        ("width", word(188)),
    ];
    Some(format!("digest differs; {}", differing_facts(entry, &ours)))
}

#[test]
fn xfs_of_every_size_from_16_mib_to_100_tib_is_mkfs_xfs_6_1_0s() {
    check(include_str!("golden/xfs-6.1.0-loop512.json"), 61, compare);
}

#[test]
fn xfs_on_4096_byte_sectors_in_files_over_old_bytes_and_with_options_is_mkfs_xfs_6_1_0s() {
    check(include_str!("golden/xfs-6.1.0-modes.json"), 47, compare);
}
