//! What holds for every plan, and for what is read back: whatever the size, the options or the bytes on the disk.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use disk::xfs::superblock::{self, BYTES, MIN_GAIN_BYTES, NotAsuperblock, blocks_to_grow_to};
use disk::xfs::{BLOCK_SIZES, INODE_SIZES, MINIMUM_SIZE_BYTES, Options, Refusal, Superblock, Surface, backup_offsets, judge, plan};
use disk::{MAX_WRITE_BYTES, Mark, Write};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const UUID: [u8; 16] = *b"0123456789abcdef";

fn options(size_bytes: u64) -> Options {
    Options::new(size_bytes, UUID, 1_700_000_000)
}

/// Any options that there is an xfs for.
fn any_options() -> impl Strategy<Value = Options> {
    let size = prop_oneof![300 * MIB..4 * GIB, 4 * GIB..4 * TIB, 4 * TIB..100 * TIB];
    let sizes = prop::sample::select(vec![(4096, 512), (4096, 1024), (4096, 2048), (2048, 512), (2048, 1024), (1024, 512)]);
    let sector = prop::sample::select(vec![512_u32, 4096]);
    (size, sizes, sector, any::<bool>(), 0..2048_u32, 1..9_u32, any::<[u8; 16]>()).prop_map(
        |(size, (block_size, inode_size), sector, reads_zeros, unit, width, uuid)| Options {
            logical_sector_bytes: sector.min(block_size),
            physical_sector_bytes: sector,
            min_io_bytes: unit * 4096,
            opt_io_bytes: unit * 4096 * width,
            block_size: Some(block_size),
            inode_size: Some(inode_size),
            reads_zeros,
            ..Options::new(size.next_multiple_of(4096), uuid, 1)
        },
    )
}

/// The superblock that a plan writes, padded with the zeros that follow it.
fn superblock_bytes(writes: &[Write]) -> Vec<u8> {
    let [.., Write::Flush, Write::Data { offset: 0, bytes }, Write::Flush] = writes else {
        panic!("a plan ends with flush, superblock, flush: {:?}", &writes[writes.len().saturating_sub(3)..])
    };
    let mut bytes = bytes.clone();
    bytes.resize(BYTES, 0);
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_plan_keeps_its_promises(options in any_options()) {
        let writes: Vec<Write> = plan(&options).unwrap().collect();
        let mut data = Vec::new();
        for write in &writes {
            let Some((offset, length)) = write.range() else { continue };
            prop_assert!(0 < length && length <= MAX_WRITE_BYTES);
            prop_assert!(offset % 512 == 0 && length % 512 == 0);
            prop_assert!(offset + length <= options.size_bytes);
            match write {
                Write::Data { .. } => data.push((offset, offset + length)),
                _ => prop_assert!(!options.reads_zeros, "zeros on a disk of zeros"),
            }
        }
        data.sort_unstable();
        prop_assert!(data.windows(2).all(|pair| pair[0].1 <= pair[1].0), "nothing is written twice");
        prop_assert_eq!(writes.iter().filter(|write| **write == Write::Flush).count(), 2);
        let superblock_is_last = data.first().is_some_and(|range| *range == (0, 512)) && superblock_bytes(&writes).len() == BYTES;
        prop_assert!(superblock_is_last);
    }

    #[test]
    fn what_is_written_is_read_back(options in any_options()) {
        let writes: Vec<Write> = plan(&options).unwrap().collect();
        let read = superblock::parse(&superblock_bytes(&writes)).unwrap();
        prop_assert_eq!(read.uuid, options.uuid);
        prop_assert_eq!(Some(read.block_size), options.block_size);
        prop_assert_eq!(Some(u32::from(read.inode_size)), options.inode_size);
        prop_assert!(read.filesystem_bytes() <= options.size_bytes && read.filesystem_bytes() + 17 * MIB > options.size_bytes);
        prop_assert_eq!(read.blocks_to_grow_to(options.size_bytes), None, "a new filesystem is not grown");
        // The copies are where they are said to be, and nowhere else.
        let is_copy = |bytes: &[u8]| bytes.starts_with(b"XFSB");
        let written = writes.iter().filter_map(|write| match write {
            Write::Data { offset, bytes } if *offset > 0 && is_copy(bytes) => Some((*offset, bytes)),
            _ => None,
        });
        let mut copies = read.copies();
        for (offset, bytes) in written {
            prop_assert_eq!(Some(offset), copies.next());
            prop_assert_eq!(superblock::parse(bytes), Ok(Superblock { is_in_progress: true, ..read.clone() }));
        }
        prop_assert_eq!(copies.next(), None);
        if options.min_io_bytes == 0 {
            let expected = backup_offsets(options.size_bytes);
            prop_assert!(read.copies().take(31).all(|offset| expected.contains(&offset)));
        }
    }

    #[test]
    fn a_flipped_bit_is_never_a_superblock(options in any_options(), bit in 0..4096_usize) {
        let writes: Vec<Write> = plan(&options).unwrap().collect();
        let mut bytes = superblock_bytes(&writes);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(superblock::parse(&bytes).is_err());
    }

    #[test]
    fn parsing_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..1200), has_magic: bool, sector in any::<u16>(), is_sealed: bool) {
        if bytes.len() > 512 && has_magic {
            bytes[..4].copy_from_slice(b"XFSB");
            bytes[101] = 0xA5;
            bytes[102..104].copy_from_slice(&if sector % 3 == 0 { 512_u16 } else { sector }.to_be_bytes());
            if is_sealed {
                bytes[224..228].fill(0);
                let checksum = crc32c::crc32c(&bytes[..512]);
                bytes[224..228].copy_from_slice(&checksum.to_le_bytes());
            }
        }
        if let Ok(read) = superblock::parse(&bytes) {
            prop_assert!(has_magic && read.blocks > 0);
            prop_assert!(read.copies().take(1000).all(|offset| offset < read.filesystem_bytes()));
        }
        let _ = superblock::parse_leftover(&bytes);
        let _ = judge(&bytes, &Mark::new("csi-0123456789abcdef").unwrap());
    }

    #[test]
    fn growing_never_shrinks_and_never_exceeds_the_disk(block_size in any::<u32>(), blocks in any::<u64>(), size_bytes in any::<u64>()) {
        if let Some(target) = blocks_to_grow_to(block_size, blocks, size_bytes) {
            prop_assert!(target > blocks);
            prop_assert!(target.checked_mul(u64::from(block_size)).unwrap() <= size_bytes);
            prop_assert!((target - blocks) * u64::from(block_size) >= MIN_GAIN_BYTES);
        }
    }

    #[test]
    fn any_options_are_answered(
        size_bytes in any::<u64>(),
        sectors in any::<(u32, u32)>(),
        io in any::<(u32, u32)>(),
        block_size in prop::option::of(prop_oneof![any::<u32>(), prop::sample::select(BLOCK_SIZES.to_vec())]),
        inode_size in prop::option::of(prop_oneof![any::<u32>(), prop::sample::select(INODE_SIZES.to_vec())]),
        is_usual: bool,
    ) {
        let sectors = if is_usual { (512, 4096) } else { sectors };
        let options = Options {
            logical_sector_bytes: sectors.0,
            physical_sector_bytes: sectors.1,
            min_io_bytes: io.0,
            opt_io_bytes: io.1,
            block_size,
            inode_size,
            ..options(size_bytes)
        };
        match plan(&options) {
            Ok(plan) => prop_assert!(plan.take(100).filter_map(|write| write.range()).all(|(offset, length)| offset + length <= size_bytes)),
            Err(refusal) => prop_assert!(!refusal.to_string().is_empty()),
        }
    }
}

#[test]
fn refusals_are_sentences_with_the_numbers() {
    let refusal = |options| plan(&options).err().map(|refusal| refusal.to_string()).unwrap_or_default();
    let small = refusal(options(MINIMUM_SIZE_BYTES - 1));
    assert_eq!(small, "xfs needs at least 314572800 bytes (300 MiB), there are 314572799; make the volume larger or use ext4");
    assert!(plan(&options(MINIMUM_SIZE_BYTES)).is_ok());
    let block = refusal(Options { block_size: Some(8192), ..options(GIB) });
    assert_eq!(block, "xfs block size 8192 is not possible; use 1024, 2048 or 4096");
    let inode = refusal(Options { inode_size: Some(1024), block_size: Some(1024), ..options(GIB) });
    assert_eq!(inode, "xfs inode size 1024 is not possible with blocks of 1024 bytes; use 512, 1024 or 2048, at most half a block");
    for inode_size in [0, 256, 511, 4096] {
        assert!(matches!(plan(&Options { inode_size: Some(inode_size), ..options(GIB) }), Err(Refusal::InodeSize { .. })));
    }
    let sectors = Options { logical_sector_bytes: 4096, physical_sector_bytes: 4096, block_size: Some(1024), ..options(GIB) };
    assert_eq!(
        refusal(sectors),
        "xfs block size 1024 is not possible on a disk with sectors of 4096 bytes; use 4096, and a disk with sectors of 512 to 4096 bytes"
    );
}

#[test]
fn a_disk_of_zeros_gets_few_bytes_and_a_huge_one_no_more_memory() {
    let written = |size_bytes, reads_zeros| {
        let plan = plan(&Options { reads_zeros, ..options(size_bytes) }).unwrap();
        plan.fold((0, 0), |(data, zeros), write| match write {
            Write::Data { bytes, .. } => (data + bytes.len() as u64, zeros),
            Write::Zeros { length, .. } => (data, zeros + length),
            Write::Flush => (data, zeros),
        })
    };
    // The goal for 1 TiB is 0.2 MiB.
    let (data, zeros) = written(TIB, true);
    assert!(data < 200 << 10, "{data} bytes");
    assert_eq!(zeros, 0);
    assert_eq!(written(GIB, false).1, 64 * MIB + (256 << 10), "the log and both ends");
    let (data, zeros) = written(100 * TIB, false);
    assert_eq!(zeros, 2 * GIB - 10 * MIB + (256 << 10));
    assert!(data < 4 * MIB, "{data} bytes");
}

#[test]
fn growing_follows_the_disk_from_16_mib_on() {
    let new = |size_bytes| superblock::parse(&superblock_bytes(&plan(&options(size_bytes)).unwrap().collect::<Vec<_>>())).unwrap();
    assert_eq!(new(300 * MIB).blocks_to_grow_to(3 * GIB), Some(3 * GIB / 4096));
    assert_eq!(new(GIB).blocks_to_grow_to(TIB), Some(TIB / 4096));
    assert_eq!(new(GIB).blocks_to_grow_to(GIB), None);
    assert_eq!(new(GIB).blocks_to_grow_to(GIB + 16 * MIB - 1), None);
    assert_eq!(new(GIB).blocks_to_grow_to(GIB + 16 * MIB), Some((GIB + 16 * MIB) / 4096));
    assert_eq!(new(2 * GIB).blocks_to_grow_to(GIB), None, "never smaller: Linux would shrink it");
    // Dropped by mkfs: the last group would be smaller than 16 MiB.
    assert_eq!(new(4 * TIB + 4096).blocks_to_grow_to(4 * TIB + 4096), None);
}

#[test]
fn copies_are_looked_for_at_the_usual_group_sizes() {
    let offsets = backup_offsets(GIB);
    // 4 groups, and up to 32 where the disk names a stripe.
    assert!([GIB / 4, GIB / 2, 3 * GIB / 4, GIB / 32].iter().all(|offset| offsets.contains(offset)));
    assert!(offsets.len() < 40 && offsets.is_sorted());
    assert!(backup_offsets(8 * TIB).contains(&(268_435_455 * 4096)), "groups of 1 TiB less a block");
    assert!(backup_offsets((300 << 20) + 4096).contains(&(19201 * 4096)), "76801 blocks, groups of 19201");
    assert!(backup_offsets(u64::MAX).len() < 400);
    assert!(backup_offsets(511).is_empty());
}

#[test]
fn a_leftover_is_told_by_its_magic_and_possible_sizes() {
    let mut sector = superblock_bytes(&plan(&options(GIB)).unwrap().collect::<Vec<_>>());
    sector.truncate(512);
    let whole = superblock::parse(&sector).unwrap();
    assert_eq!(superblock::parse_leftover(&sector), Some(whole));
    sector[300] = 1;
    assert_eq!(superblock::parse(&sector), Err(NotAsuperblock::BadChecksum));
    assert_eq!(superblock::parse_leftover(&sector).map(|read| read.uuid), Some(UUID), "damaged, but a leftover");
    assert_eq!(superblock::parse_leftover(&sector[..511]), None);
    sector[7] = 1;
    assert_eq!(superblock::parse_leftover(&sector), None);
}

#[test]
fn a_head_is_judged() {
    let mark = Mark::new("csi-0123456789abcdef").unwrap();
    let writes: Vec<Write> = plan(&options(GIB)).unwrap().collect();
    let good = superblock_bytes(&writes);
    assert!(matches!(judge(&good, &mark), Surface::Complete(read) if read.uuid == UUID));
    assert_eq!(judge(&[0; 4096], &mark), Surface::Blank);
    assert!(matches!(judge(&[0; 4095], &mark), Surface::Other(_)), "what was not read is not blank");
    let mut other = [0; 4096];
    other[4095] = 1;
    assert!(matches!(judge(&other, &mark), Surface::Other(_)));
    other[..512].copy_from_slice(mark.sector());
    assert_eq!(judge(&other, &mark), Surface::Unfinished);
    let mut damaged = good.clone();
    damaged[9] ^= 1;
    assert_eq!(superblock::parse(&damaged), Err(NotAsuperblock::BadChecksum));
    assert!(matches!(judge(&damaged, &mark), Surface::Other(_)));
    // What mkfs.xfs leaves when it is killed.
    let unfinished = writes.iter().find_map(|write| match write {
        Write::Data { offset, bytes } if *offset > 0 && bytes.starts_with(b"XFSB") => Some([bytes.as_slice(), &[0; 4096]].concat()),
        _ => None,
    });
    assert!(matches!(judge(&unfinished.unwrap(), &mark), Surface::Other(_)));
}
