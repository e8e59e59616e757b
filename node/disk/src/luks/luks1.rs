//! The one header of LUKS1: 592 bytes, big-endian, eight keyslots, no second copy. Read only.

use super::header::{field, text};
use super::keyslot::{Hash, Kdf};
use super::metadata::{Digest, Keyslot, Segment, check_segment};
use super::open::{Header, Version, begins_with};
use super::{BLOCK, BLOCK_BYTES, Error, ReadAt, SECTOR, work};

const CIPHER_NAME: usize = 8;
const CIPHER_MODE: usize = 40;
const HASH_SPEC: usize = 72;
const PAYLOAD_OFFSET: usize = 104;
const KEY_BYTES: usize = 108;
const MK_DIGEST: usize = 112;
const MK_DIGEST_SALT: usize = 132;
const MK_DIGEST_ITER: usize = 164;
const UUID: usize = 168;
const KEYSLOTS: usize = 208;
const KEYSLOT_SIZE: usize = 48;
const HEADER_SIZE: u64 = 592;
const KEYSLOT_ACTIVE: u32 = 0x00ac_71f3;

/// `None` if the device does not begin with a LUKS1 header.
pub(super) fn read(device_size_bytes: u64, read: &mut ReadAt<'_>) -> Result<Option<Header>, Error> {
    let mut start = vec![0; BLOCK_BYTES];
    // A sector that cannot be read is no LUKS1 header; LUKS2 may still have its second copy.
    if device_size_bytes < BLOCK || read(0, &mut start).is_err() || !begins_with(1, &start) {
        return Ok(None);
    }
    parse(&start).map(Some)
}

fn parse(raw: &[u8]) -> Result<Header, Error> {
    let number = |at| u32::from_be_bytes(field(raw, at));
    let name =
        |found: Option<String>, what: &str| found.filter(|name| !name.is_empty()).ok_or_else(|| Error::Metadata(format!("LUKS1 {what}")));
    let cipher = name(text::<32>(raw, CIPHER_NAME), "cipher name")? + "-" + &name(text::<32>(raw, CIPHER_MODE), "cipher mode")?;
    let hash = Hash::named(&name(text::<32>(raw, HASH_SPEC), "hash")?)?;
    let uuid = name(text::<40>(raw, UUID).filter(|uuid| uuid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')), "UUID")?;
    let segment =
        Segment { offset_bytes: u64::from(number(PAYLOAD_OFFSET)) * SECTOR, size_bytes: None, cipher, sector_size: 512, iv_tweak: 0 };
    check_segment(&segment)?;
    if segment.offset_bytes < HEADER_SIZE {
        return Err(Error::Unsupported("LUKS1 with a detached header".to_owned()));
    }
    let key_size = number(KEY_BYTES) as usize;
    let digest = Digest {
        hash,
        iterations: number(MK_DIGEST_ITER),
        salt: field::<32>(raw, MK_DIGEST_SALT).to_vec(),
        value: field::<20>(raw, MK_DIGEST).to_vec(),
    };
    Kdf::Pbkdf2 { hash, iterations: digest.iterations }.check_read()?;
    let (mut keyslots, mut skipped) = (Vec::new(), Vec::new());
    for index in 0..8u8 {
        let at = KEYSLOTS + usize::from(index) * KEYSLOT_SIZE;
        if number(at) != KEYSLOT_ACTIVE {
            continue;
        }
        let stripes = number(at + 44) as usize;
        let slot = Keyslot {
            number: index,
            priority: 1,
            kdf: Kdf::Pbkdf2 { hash, iterations: number(at + 4) },
            salt: field::<32>(raw, at + 8).to_vec(),
            key_size,
            stripes,
            af_hash: hash,
            area_offset_bytes: u64::from(number(at + 40)) * SECTOR,
            area_size_bytes: (key_size as u64).saturating_mul(stripes as u64).saturating_add(SECTOR - 1) / SECTOR * SECTOR,
            area_cipher: segment.cipher.clone(),
            area_key_size: key_size,
        };
        match slot.check(segment.offset_bytes, SECTOR * 2) {
            Ok(()) => keyslots.push(slot),
            Err(why) => skipped.push(format!("keyslot {index}: {why}")),
        }
    }
    work::sort(&mut keyslots);
    Ok(Header { version: Version::Luks1, uuid, segment, keyslots, skipped, digest, luks2: None })
}
