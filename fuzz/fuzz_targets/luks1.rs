//! The LUKS1 header: the bytes are the header's, its magic and version given.
#![no_main]

use disk::luks::{Header, Version, within};
use fuzz::disk_model::Disk;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: fuzz::limit_memory(), |data: &[u8]| {
    let mut head = data.to_vec();
    head.resize(4096, 0);
    head[..8].copy_from_slice(b"LUKS\xba\xbe\0\x01");
    let disk = Disk::new(head, 18 << 20);
    let mut read = |offset, buffer: &mut [u8]| disk.read(offset, buffer);
    let header = match Header::read(disk.size_bytes(), &mut read) {
        Ok(header) => header,
        Err(why) => return assert!(why.to_string().len() < 4096, "{why}"),
    };
    assert_eq!((header.version, header.damage()), (Version::Luks1, None));
    assert!(header.heal(&[0; 64]).is_ok_and(|writes| writes.is_empty()), "a LUKS1 header would be changed");
    assert!(header.keyslots.len() + header.skipped.len() <= 8);
    let _ = header.dm_uuid("csi-0123456789abcdef-encrypted");
    if let Ok(sectors) = header.segment.mapping_sectors(disk.size_bytes()) {
        assert!(sectors > 0 && header.segment.offset_bytes + sectors * 512 <= disk.size_bytes(), "a mapping beyond the end");
    }
    // Nobody's passphrase: the area is zeros. One keyslot, for speed.
    if let Some(slot) = header.keyslots.first() {
        assert_eq!(slot.kdf.memory_kib(), 0);
        assert!(header.unlock_keyslot(slot.number, b"p", &mut read, within(0)).is_ok_and(|key| key.is_none()) || !header.digest().is_empty());
    }
});
