//! The ext4 superblock, and what the first 4 KiB say about ext4. The first byte: 1 mends the checksum; more than 1: without zeros before the superblock.
#![no_main]

use disk::Mark;
use disk::ext4::superblock;
use disk::ext4::{Surface, judge};
use disk::mark::HEAD_BYTES;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: fuzz::limit_memory(), |data: &[u8]| {
    let Some((how, data)) = data.split_first() else { return };
    let mut head = vec![0; HEAD_BYTES];
    let at = if *how > 1 { 0 } else { 1024 };
    let length = data.len().min(HEAD_BYTES - at);
    head[at..at + length].copy_from_slice(&data[..length]);
    if *how == 1 {
        let sum = !crc32c::crc32c(&head[1024..1024 + 1020]);
        head[1024 + 1020..2048].copy_from_slice(&sum.to_le_bytes());
    }
    let mark = Mark::new("csi-0123456789abcdef").expect("a serial");
    let surface = judge(&head, &mark);
    assert_eq!(surface == Surface::Blank, head.iter().all(|byte| *byte == 0), "blank");
    assert!(!matches!(judge(&head[..HEAD_BYTES - 1], &mark), Surface::Blank | Surface::Complete(_)), "a short look decided");
    let parsed = superblock::parse(&head[1024..]);
    if let Surface::Complete(found) = &surface {
        assert_eq!(parsed.as_ref(), Ok(found));
    }
    let Ok(found) = parsed else { return };
    let _ = (found.has_errors(), found.is_clean(), found.has_journal());
    let covered = found.filesystem_bytes();
    for size_bytes in [0, 1, covered, covered.saturating_add(4096), covered.saturating_mul(2), 1 << 44, u64::MAX] {
        if let Some(blocks) = found.blocks_to_grow_to(size_bytes) {
            assert!(blocks > found.blocks && blocks <= size_bytes / u64::from(found.block_size), "{blocks} blocks on {size_bytes} bytes");
        }
    }
});
