//! Every image of the golden manifests (Debian's mke2fs 1.47.0), made again in memory: the same digest.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod image;
mod manifest;

use disk::ext4::{Options, plan};
use image::Image;
use manifest::{check, differing_facts, digest};
use serde_json::Value;

const UUID: [u8; 16] = [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef, 0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef];
const HASH_SEED: [u8; 16] = [0xfe, 0xdc, 0xba, 0x98, 0x76, 0x54, 0x32, 0x10, 0xfe, 0xdc, 0xba, 0x98, 0x76, 0x54, 0x32, 0x10];
const TIME: u32 = 1_700_000_000;

/// The options that an entry's command line and mode stand for.
fn options(entry: &Value) -> Options {
    let mut options = Options::new(entry["size"].as_u64().unwrap(), UUID, HASH_SEED, TIME);
    match entry["mode"].as_str().unwrap() {
        "loop4k" => {
            options.logical_sector_bytes = 4096;
            options.physical_sector_bytes = 4096;
        }
        "file" => options.reads_zeros = true,
        _ => {}
    }
    let arguments: Vec<&str> = entry["args"].as_str().unwrap().split(' ').collect();
    for pair in arguments.windows(2) {
        match pair[0] {
            "-b" => options.block_size = Some(pair[1].parse().unwrap()),
            "-I" => options.inode_size = Some(pair[1].parse().unwrap()),
            "-E" if pair[1].contains("stride=4,stripe_width=8") => {
                let block_size = u32::try_from(entry["facts"]["block_size"].as_u64().unwrap()).unwrap();
                options.min_io_bytes = 4 * block_size;
                options.opt_io_bytes = 8 * block_size;
            }
            _ => {}
        }
    }
    options
}

/// What differs from the entry, if anything.
fn compare(entry: &Value) -> Option<String> {
    let options = options(entry);
    let fill = if entry["mode"] == "dirty" { 0xA5 } else { 0 };
    let plan = match plan(&options) {
        Ok(plan) => plan,
        Err(_) if entry["rc"] != 0 => return None,
        Err(refusal) => return Some(format!("refused: {refusal}")),
    };
    if entry["rc"] != 0 {
        return Some(format!("made, but mke2fs says: {}", entry["error"]));
    }
    let mut image = Image::new(options.size_bytes, fill);
    plan.for_each(|write| image.apply(&write));
    if digest(&image) == entry["image"]["digest"] {
        return None;
    }
    let sb = &image.unit(0)[1024..2048];
    let word = |at: usize| u64::from(u32::from_le_bytes(sb[at..at + 4].try_into().unwrap()));
    let ours = [
        ("blocks", word(4) | word(0x150) << 32),
        ("inodes", word(0)),
        ("free_blocks", word(0xC) | word(0x158) << 32),
        ("ipg", word(0x28)),
        ("rsv_gdt", word(0xCE) & 0xFFFF),
        ("kbytes_written", word(0x178)),
        ("stride", word(0x164) & 0xFFFF),
        ("stripe", word(0x170)),
        ("overhead", word(0x248)),
    ];
    let mut differs = differing_facts(entry, &ours);
    for journal in 0..17 {
        if entry["facts"]["jnl"][journal] != word(0x10C + 4 * journal) {
            differs += &format!("jnl[{journal}] {} is {}; ", word(0x10C + 4 * journal), entry["facts"]["jnl"][journal]);
        }
    }
    Some(format!("digest differs; {differs}"))
}

#[test]
fn ext4_of_every_size_on_512_byte_sectors_is_mke2fs_1_47_0s() {
    check(include_str!("golden/ext4-1.47.0-loop512.json"), 92, compare);
}

#[test]
fn ext4_on_4096_byte_sectors_in_files_and_over_old_bytes_is_mke2fs_1_47_0s() {
    check(include_str!("golden/ext4-1.47.0-modes.json"), 44, compare);
}

#[test]
fn ext4_with_options_is_mke2fs_1_47_0s() {
    check(include_str!("golden/ext4-1.47.0-options.json"), 17, compare);
}
