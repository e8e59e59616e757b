//! A small LUKS2 volume with a known key, and the judge of what was made of its headers.

use crate::disk_model::Disk;
use disk::luks::{Error, Format, Hash, Header, Kdf, Material, NewKeyslot, Version, VolumeKey, within};
use sha2::{Digest as _, Sha256};
use std::sync::LazyLock;
use zeroize::Zeroizing;

const SIZE_BYTES: u64 = 18 << 20;
const COPY_BYTES: usize = 16 << 10;
const CHEAP: Kdf = Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: 1000 };
/// Both copies, and the first keyslot's area.
const HEAD_BYTES: usize = (32 << 10) + 258_048;
const BINARY_BYTES: usize = 4096;
const CSUM: std::ops::Range<usize> = 448..512;
const SALT: std::ops::Range<usize> = 104..168;

struct Template {
    head: Vec<u8>,
    key: VolumeKey,
}

static TEMPLATE: LazyLock<Template> = LazyLock::new(|| {
    let material = material();
    let format =
        Format { device_size_bytes: SIZE_BYTES, sector_size: 4096, uuid: "0d7912f4-55a0-4c1e-9d0f-7fb0f2a2c0de".into(), kdf: CHEAP };
    let plan = format.plan(b"old", &material, &[], |_, _: &mut [u8]| ()).expect("a plan");
    let mut disk = Disk::new(Vec::new(), SIZE_BYTES);
    disk.write(plan);
    Template { head: disk.at(0, HEAD_BYTES), key: material.volume_key.clone() }
});

fn material() -> Material {
    let mut state = 0_u8;
    let fill = |buffer: &mut [u8]| -> Result<(), ()> {
        for byte in buffer {
            state = state.wrapping_mul(5).wrapping_add(17);
            *byte = state;
        }
        Ok(())
    };
    Material::draw(fill).expect("no error is possible")
}

/// The volume with this text in the metadata areas of both copies.
#[must_use]
pub fn with_json(json: &[u8]) -> Disk {
    let mut head = TEMPLATE.head.clone();
    for at in [0, COPY_BYTES] {
        let area = &mut head[at + BINARY_BYTES..at + COPY_BYTES];
        area.fill(0);
        let length = json.len().min(area.len());
        area[..length].copy_from_slice(&json[..length]);
        sum(&mut head[at..at + COPY_BYTES]);
    }
    Disk::new(head, SIZE_BYTES)
}

/// The volume with the first 512 bytes of each copy laid over what it has, and a text in the metadata areas where there is more.
///
/// `how` says what is mended: 1 and 2, the checksums of the copies; 4: the second copy stands where the first says that it ends; 8: half of the
/// text is the second copy's.
#[must_use]
pub fn with_binary(how: u8, data: &[u8]) -> Disk {
    let (binaries, json) = data.split_at(data.len().min(1024));
    let mut copies = [0, COPY_BYTES].map(|at| TEMPLATE.head[at..at + COPY_BYTES].to_vec());
    for (copy, binary) in copies.iter_mut().zip(binaries.chunks(512)) {
        copy[..binary.len()].copy_from_slice(binary);
    }
    let (first, second) = if how & 8 == 0 { (json, json) } else { json.split_at(json.len() / 2) };
    for (copy, json) in copies.iter_mut().zip([first, second]) {
        if !json.is_empty() {
            copy[BINARY_BYTES..].fill(0);
            let length = json.len().min(COPY_BYTES - BINARY_BYTES);
            copy[BINARY_BYTES..][..length].copy_from_slice(&json[..length]);
        }
    }
    let [mut first, mut second] = copies;
    let stated = u64::from_be_bytes(first[8..16].try_into().expect("8 bytes"));
    let at = if how & 4 != 0 && stated <= 4 << 20 { usize::try_from(stated).expect("small") } else { COPY_BYTES };
    first.resize(at.max(BINARY_BYTES), 0);
    second.resize(at.max(BINARY_BYTES), 0);
    for (bit, copy) in [(1, &mut first), (2, &mut second)] {
        if how & bit != 0 {
            sum(copy);
        }
    }
    let mut disk = Disk::new(TEMPLATE.head.clone(), SIZE_BYTES);
    disk.put(0, &first);
    disk.put(at as u64, &second);
    disk
}

fn sum(copy: &mut [u8]) {
    copy[CSUM].fill(0);
    let sum = Sha256::digest(&*copy);
    copy[CSUM.start..CSUM.start + 32].copy_from_slice(&sum);
}

fn header(disk: &Disk) -> Result<Header, Error> {
    Header::read(disk.size_bytes(), &mut |offset, buffer| disk.read(offset, buffer))
}

fn same(a: &Header, b: &Header) -> bool {
    (a.version, &a.uuid, &a.segment, &a.keyslots, &a.skipped) == (b.version, &b.uuid, &b.segment, &b.keyslots, &b.skipped)
        && a.digest() == b.digest()
}

fn noise(_: u64, buffer: &mut [u8]) {
    buffer.fill(0xA5);
}

/// Everything that is done with a LUKS2 header, and what must hold then. An error is fine. Adding a keyslot is most of the time.
pub fn judge(disk: &Disk, is_adding: bool) {
    let Some(found) = read(disk) else { return };
    let healed = healing(disk, &found);
    rewriting(&healed);
    let first = found.keyslots.first().map(|slot| slot.number);
    if let Some(number) = first {
        removing(&healed, number);
    }
    if is_adding {
        adding(&healed);
    }
}

/// Reads, and asks all that needs no key. `None`: refused, or nothing that could be written to.
fn read(disk: &Disk) -> Option<Header> {
    let found = match header(disk) {
        Ok(found) => found,
        Err(why) => {
            // Whatever stands on the disk, the sentence stays one that can be read.
            assert!(why.to_string().len() < 16 << 10, "{why}");
            return None;
        }
    };
    // Bytes can be a LUKS1 header as well: that has one copy, and `luks1` is its judge.
    if found.version != Version::Luks2 {
        return None;
    }
    let _ = found.dm_uuid("csi-0123456789abcdef-encrypted");
    for slot in &found.keyslots {
        assert_eq!(found.keyslot_memory_kib(slot.number), Some(slot.kdf.memory_kib()));
    }
    let sectors = found.segment.mapping_sectors(disk.size_bytes()).ok()?;
    assert!(sectors > 0 && (sectors * 512).is_multiple_of(found.segment.sector_size.into()));
    assert!(found.segment.offset_bytes + sectors * 512 <= disk.size_bytes(), "a mapping beyond the end");
    Some(found)
}

/// Both copies are good after it and say what the good one said.
fn healing(disk: &Disk, found: &Header) -> Disk {
    let writes = found.heal(&[7; 64]).expect("what was read fits where it was read from");
    assert_eq!(writes.is_empty(), found.damage().is_none());
    let mut healed = disk.clone();
    healed.write(writes);
    let after = header(&healed).expect("a healed header");
    assert!(after.damage().is_none() && same(&after, found), "healed: {:?}", after.damage());
    healed
}

/// A header that we accept is the one that we would write: once in our spelling, each copy made from the other has the same bytes again.
fn rewriting(disk: &Disk) {
    let copy_bytes = u64::from_be_bytes(disk.at(8, 8).try_into().expect("8 bytes"));
    let whole = usize::try_from(2 * copy_bytes).expect("small");
    let remade = |disk: &Disk, at: u64| {
        let salt: [u8; 64] = disk.at(at + SALT.start as u64, SALT.len()).try_into().expect("64 bytes");
        let mut harmed = disk.clone();
        harmed.put(at, &[0; 512]);
        let found = header(&harmed).expect("the other copy is whole");
        harmed.write(found.heal(&salt).expect("room"));
        harmed
    };
    let spelled = remade(&remade(disk, 0), copy_bytes);
    for at in [0, copy_bytes] {
        assert!(remade(&spelled, at).at(0, whole) == spelled.at(0, whole), "the copy at {at} was remade with other bytes");
    }
}

fn removing(disk: &Disk, number: u8) {
    let before = header(disk).expect("a healed header");
    match before.remove_keyslot(number, &[[1; 64], [2; 64]], noise) {
        Ok(writes) => {
            let mut after = disk.clone();
            after.write(writes);
            let after = header(&after).expect("a header after a keyslot was removed");
            let left: Vec<_> = before.keyslots.iter().filter(|slot| slot.number != number).cloned().collect();
            assert!(after.damage().is_none() && after.keyslots == left && after.segment == before.segment, "removed {number}");
        }
        Err(Error::LastKeyslot(_)) => assert!(before.keyslots.iter().all(|slot| slot.number == number || slot.priority == 0)),
        Err(why) => assert!(matches!(why, Error::NoRoom(_)), "{why}"),
    }
}

fn adding(disk: &Disk) {
    let before = header(disk).expect("a healed header");
    let Template { key, .. } = &*TEMPLATE;
    if !before.is_volume_key(key) {
        return;
    }
    let material = material();
    let new = NewKeyslot {
        passphrase: b"new",
        kdf: CHEAP,
        salt: material.keyslot_salt,
        stripes: Zeroizing::new(material.stripes.to_vec()),
        header_salts: material.header_salts,
    };
    let opens = |disk: &Disk, header: &Header, number, passphrase: &[u8]| {
        let key = header.unlock_keyslot(number, passphrase, &mut |offset, buffer| disk.read(offset, buffer), within(u64::MAX));
        key.ok().flatten()
    };
    let Ok((number, writes)) = before.add_keyslot(key, &new, noise) else { return };
    let opened = before.keyslots.iter().filter(|slot| slot.number < 2 && opens(disk, &before, slot.number, b"old").is_some());
    let opened: Vec<u8> = opened.map(|slot| slot.number).collect();
    let mut written = disk.clone();
    written.write(writes);
    let after = header(&written).expect("a header after a keyslot was added");
    assert!(after.damage().is_none() && after.segment == before.segment && after.skipped == before.skipped);
    let old: Vec<_> = after.keyslots.iter().filter(|slot| slot.number != number).cloned().collect();
    assert!(old == before.keyslots, "other keyslots have changed");
    assert!(opens(&written, &after, number, b"new").is_some_and(|found| found == *key), "the new keyslot does not open");
    for number in opened {
        assert!(opens(&written, &after, number, b"old").is_some_and(|found| found == *key), "keyslot {number} opens no more");
    }
}
