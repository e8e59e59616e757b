//! The xfs superblock, and what the first 4 KiB say about xfs. The first byte: 1 mends the checksum.
#![no_main]

use disk::Mark;
use disk::mark::HEAD_BYTES;
use disk::xfs::superblock;
use disk::xfs::{Surface, judge};
use libfuzzer_sys::fuzz_target;

const CRC: usize = 224;

fuzz_target!(init: fuzz::limit_memory(), |data: &[u8]| {
    let Some((how, data)) = data.split_first() else { return };
    let mut head = vec![0; superblock::BYTES];
    let length = data.len().min(head.len());
    head[..length].copy_from_slice(&data[..length]);
    let sector = usize::from(u16::from_be_bytes([head[102], head[103]]));
    if *how == 1 && (512..=head.len()).contains(&sector) {
        head[CRC..CRC + 4].fill(0);
        let sum = crc32c::crc32c(&head[..sector]);
        head[CRC..CRC + 4].copy_from_slice(&sum.to_le_bytes());
    }
    let mark = Mark::new("csi-0123456789abcdef").expect("a serial");
    let surface = judge(&head[..HEAD_BYTES], &mark);
    assert_eq!(surface == Surface::Blank, head[..HEAD_BYTES].iter().all(|byte| *byte == 0), "blank");
    assert!(!matches!(judge(&head[..HEAD_BYTES - 1], &mark), Surface::Blank | Surface::Complete(_)), "a short look decided");
    let parsed = superblock::parse(&head);
    if let Surface::Complete(found) = &surface {
        assert_eq!(parsed.as_ref(), Ok(found));
        assert!(!found.is_in_progress);
    }
    let leftover = superblock::parse_leftover(&head[..512]);
    let Ok(found) = parsed else {
        let _ = leftover.map(|found| (found.filesystem_bytes(), found.copies().take(9).last(), found.blocks_to_grow_to(1 << 40)));
        return;
    };
    assert_eq!(leftover.as_ref(), Some(&found), "whole, but not even a leftover");
    let group_bytes = u64::from(found.group_blocks) * u64::from(found.block_size);
    let covered = found.filesystem_bytes();
    assert!(found.copies().take(9).zip(1..).all(|(offset, group)| offset == group * group_bytes));
    assert!(found.groups < 2 || u64::from(found.groups - 1) * group_bytes < covered, "a last group without blocks");
    for size_bytes in [0, 1, covered, covered.saturating_add(superblock::MIN_GAIN_BYTES), covered.saturating_mul(2), 1 << 44, u64::MAX] {
        if let Some(blocks) = found.blocks_to_grow_to(size_bytes) {
            assert!(blocks > found.blocks && blocks <= size_bytes / u64::from(found.block_size), "{blocks} blocks on {size_bytes} bytes");
        }
    }
});
