//! Plans of any options: no panic, no write beyond the filesystem, none longer than allowed, the superblock at the end.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use disk::ext4::{Options, Refusal, Superblock, backup_offsets, plan, superblock};
use disk::{MAX_WRITE_BYTES, Write};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

fn new(size_bytes: u64) -> Options {
    Options::new(size_bytes, [1; 16], [2; 16], 3)
}

fn parsed(write: &Write) -> Option<Superblock> {
    match write {
        Write::Data { bytes, .. } => superblock::parse(bytes).ok(),
        Write::Zeros { .. } | Write::Flush => None,
    }
}

/// On a disk of zeros, each page that is written gets something other than zeros.
fn assert_no_zeros(write: &Write, options: &Options) {
    const PAGE: usize = 4096;
    match write {
        Write::Data { offset, bytes } => {
            let empty = bytes.chunks(PAGE).position(|page| page.iter().all(|byte| *byte == 0));
            assert_eq!(empty, None, "zeros in that page from {offset} on, {options:?}");
        }
        Write::Zeros { offset, length } => panic!("{length} bytes of zeros at {offset}, {options:?}"),
        Write::Flush => {}
    }
}

/// What holds of every plan. Looks at no more than `most` writes.
fn check(options: &Options, most: usize) {
    let Ok(plan) = plan(options) else { return };
    let filesystem_bytes = plan.filesystem_bytes();
    assert!(filesystem_bytes <= options.size_bytes);
    let mut count = 0;
    for (index, write) in plan.take(most).enumerate() {
        count += 1;
        if let Some((offset, length)) = write.range() {
            assert!(0 < length && length <= MAX_WRITE_BYTES, "{length} bytes at {offset}");
            assert!(offset + length <= filesystem_bytes, "{length} bytes at {offset} of {filesystem_bytes}");
            assert!(offset % 512 == 0 && length % 512 == 0);
        }
        match index {
            0 if !options.reads_zeros => assert_eq!(write, Write::Zeros { offset: 0, length: 4096 }),
            1 if !options.reads_zeros => assert_eq!(write, Write::Flush),
            _ => {}
        }
        if options.reads_zeros {
            assert_no_zeros(&write, options);
        }
    }
    assert!(count > 10);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_options_are_planned_or_refused(
        size in prop_oneof![0..16 * MIB, 0..64 * GIB, 0..64 * TIB, any::<u64>()],
        sectors in prop::array::uniform4(prop_oneof![Just(0_u32), Just(512), Just(4096), any::<u32>()]),
        block_size in prop::option::of(prop_oneof![Just(1024_u32), Just(2048), Just(4096), any::<u32>()]),
        inode_size in prop::option::of(prop_oneof![Just(256_u32), Just(512), Just(4096), any::<u32>()]),
        reads_zeros: bool,
    ) {
        let [logical_sector_bytes, physical_sector_bytes, min_io_bytes, opt_io_bytes] = sectors;
        let options = Options {
            logical_sector_bytes, physical_sector_bytes, min_io_bytes, opt_io_bytes, block_size, inode_size, reads_zeros, ..new(size)
        };
        check(&options, 3000);
    }

    #[test]
    fn a_superblock_of_any_bytes_is_read_or_refused(
        mut bytes in prop::collection::vec(any::<u8>(), 0..2048), magic: bool, without_checksum: bool, changed in any::<prop::sample::Index>(),
    ) {
        if magic && bytes.len() > 0x68 {
            bytes[0x38..0x3A].copy_from_slice(&[0x53, 0xEF]);
            if without_checksum {
                bytes[0x65] &= !4;
            }
        }
        if let Ok(superblock) = superblock::parse(&bytes) {
            prop_assert!(superblock.block_size.is_power_of_two());
            let _ = superblock.blocks_to_grow_to(u64::MAX);
            let _ = superblock.filesystem_bytes();
        }
        // Any one byte changed in a good one is noticed.
        let mut good = plan(&new(4 * MIB)).unwrap().filter(|write| parsed(write).is_some()).last().map(|write| match write {
            Write::Data { bytes, .. } => bytes,
            Write::Zeros { .. } | Write::Flush => Vec::new(),
        }).unwrap();
        prop_assert!(superblock::parse(&good).is_ok());
        let at = changed.index(good.len());
        good[at] ^= 0x10;
        prop_assert!(superblock::parse(&good).is_err(), "byte {}", at);
    }
}

#[test]
fn the_superblock_is_written_last_between_flushes() {
    let writes: Vec<Write> = plan(&new(GIB)).unwrap().collect();
    let [.., flush, last, end] = &writes[..] else { panic!("few writes") };
    assert_eq!((flush, end), (&Write::Flush, &Write::Flush));
    assert_eq!(last.range(), Some((1024, 1024)));
    let superblock = parsed(last).unwrap();
    assert_eq!((superblock.group, superblock.filesystem_bytes(), superblock.uuid), (0, GIB, [1; 16]));
    assert!(superblock.is_clean() && !superblock.has_errors() && superblock.has_journal());
    let primaries = writes.iter().filter(|write| write.range().is_some_and(|(offset, length)| offset < 2048 && offset + length > 1024));
    assert_eq!(primaries.count(), 2, "destroyed once, written once");
}

#[test]
fn every_backup_lies_where_the_probe_looks() {
    for (size, block_size) in [(GIB, None), (200 * MIB, None), (3 * GIB, Some(2048)), (20 * GIB, Some(1024)), (5 * TIB, None)] {
        let options = Options { block_size, ..new(size) };
        let backups: Vec<u64> = plan(&options)
            .unwrap()
            .filter(|write| parsed(write).is_some_and(|superblock| superblock.group > 0))
            .filter_map(|write| write.range().map(|range| range.0))
            .collect();
        let looked = backup_offsets(size);
        assert!(backups.len() >= 4 && backups.iter().all(|offset| looked.contains(offset)), "{size}: {backups:?} in {looked:?}");
        assert!(looked.len() < 100 && looked.is_sorted());
    }
    assert_eq!(backup_offsets(0), []);
    assert_eq!(backup_offsets(8 * MIB + 2047), []);
    assert_eq!(backup_offsets(8 * MIB + 2048), [8 * MIB + 1024]);
    assert!(backup_offsets(u64::MAX).len() < 300);
}

/// The goal is 6 MiB for 100 GiB, with what the kernel writes in the first minutes.
#[test]
fn a_disk_of_zeros_gets_few_bytes() {
    let written = |size_bytes, reads_zeros| {
        plan(&Options { reads_zeros, ..new(size_bytes) }).unwrap().fold((0, 0), |(data, zeros), write| match write {
            Write::Data { bytes, .. } => (data + bytes.len() as u64, zeros),
            Write::Zeros { length, .. } => (data, zeros + length),
            Write::Flush => (data, zeros),
        })
    };
    let (data, zeros) = written(100 * GIB, true);
    assert!(data < 5 * MIB + MIB / 4, "{data} bytes");
    assert_eq!(zeros, 0);
    let bitmap_of_the_last_group = 4096;
    let (all, zeros) = written(100 * GIB, false);
    assert_eq!((all, zeros), (data + bitmap_of_the_last_group, 512 * MIB + (64 << 10) + 4096), "the journal and both ends");
    // One group: nothing is listed in the blocks that are kept for its growth.
    let (data, zeros) = written(7 * MIB, true);
    assert!(data < 64 << 10 && zeros == 0, "{data} bytes");
}

#[test]
fn growing_is_to_whole_pages_and_never_shrinks() {
    let superblock = plan(&new(100 * MIB)).unwrap().filter_map(|write| parsed(&write)).last().unwrap();
    assert_eq!((superblock.block_size, superblock.blocks), (1024, 100 * 1024));
    assert_eq!(superblock.blocks_to_grow_to(100 * MIB), None);
    assert_eq!(superblock.blocks_to_grow_to(100 * MIB + 4095), None);
    assert_eq!(superblock.blocks_to_grow_to(100 * MIB + 4096 + 3072), Some(100 * 1024 + 4));
    assert_eq!(superblock.blocks_to_grow_to(0), None);
}

#[test]
fn refusals_are_sentences_with_numbers() {
    let sentence = |options: &Options| plan(options).unwrap_err().to_string();
    assert_eq!(sentence(&new(65536)), "ext4 with blocks of 1024 bytes does not fit into 65536 bytes; make the volume larger");
    let block_size = Options { block_size: Some(8192), ..new(GIB) };
    assert!(sentence(&block_size).contains("block size 8192 is not possible"));
    let small_block = Options { block_size: Some(1024), logical_sector_bytes: 4096, ..new(GIB) };
    assert!(sentence(&small_block).contains("sectors of 4096 bytes"));
    let inode_size = Options { inode_size: Some(128), ..new(GIB) };
    assert!(sentence(&inode_size).contains("inode size 128"));
    let inodes = Options { block_size: Some(4096), inode_size: Some(4096), ..new(100 * MIB) };
    assert!(matches!(plan(&inodes), Err(Refusal::InodesTooLarge { .. })));
    let meta_bg = Options { block_size: Some(1024), ..new(TIB) };
    assert!(sentence(&meta_bg).contains("meta_bg"));
    assert!(matches!(plan(&new(u64::MAX)), Err(Refusal::NeedsMetaBg { .. })));
}

#[test]
fn device_limits_become_stride_and_stripe_width() {
    let stripes = |options: &Options| {
        let Some(Write::Data { bytes, .. }) = plan(options).unwrap().filter(|write| parsed(write).is_some()).last() else { panic!() };
        (u16::from_le_bytes([bytes[0x164], bytes[0x165]]), u32::from_le_bytes(bytes[0x170..0x174].try_into().unwrap()))
    };
    let limits =
        |min_io_bytes, opt_io_bytes, physical_sector_bytes| Options { min_io_bytes, opt_io_bytes, physical_sector_bytes, ..new(GIB) };
    assert_eq!(stripes(&limits(0, 0, 512)), (0, 0));
    assert_eq!(stripes(&limits(512, 0, 4096)), (0, 0));
    assert_eq!(stripes(&limits(65536, 1 << 20, 512)), (16, 256));
    assert_eq!(stripes(&limits(65536, 0, 512)), (16, 16));
    // 512-byte sectors on a disk that works in 4 KiB, with blocks of 1 KiB.
    assert_eq!(stripes(&Options { size_bytes: 100 * MIB, ..limits(4096, 0, 4096) }), (4, 4));
    assert_eq!(stripes(&Options { size_bytes: 100 * MIB, ..limits(0, 0, 4096) }), (4, 4));
}
