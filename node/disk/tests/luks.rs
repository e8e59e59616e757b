//! LUKS without a judge: what we make we open, at every cut of the writes; and nothing that stands on a disk panics.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test: small numbers, and a panic is the verdict"
)]

use disk::luks::{Argon2Cost, Error, Format, Hash, Header, Kdf, Keyslot, Material, NewKeyslot, Noise, Version, VolumeKey, within};
use disk::mark::{Mark, Marked};
use disk::{Write, mark};
use proptest::prelude::*;
use sha2::{Digest as _, Sha256};
use std::io;
use std::sync::LazyLock;
use zeroize::Zeroizing;

const SIZE: u64 = 17 << 20;
const UUID: &str = "0d7912f4-55a0-4c1e-9d0f-7fb0f2a2c0de";
const CHEAP: Kdf = Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: 1000 };
const NO_MEMORY: u64 = 0;

/// A generator of bytes that are the same in every run (splitmix64).
fn random(seed: u64) -> impl FnMut(&mut [u8]) -> Result<(), ()> {
    let mut state = seed;
    move |buffer| {
        for chunk in buffer.chunks_mut(8) {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            chunk.copy_from_slice(&(z ^ (z >> 31)).to_le_bytes()[..chunk.len()]);
        }
        Ok(())
    }
}

fn number(random: &mut impl FnMut(&mut [u8]) -> Result<(), ()>, below: usize) -> usize {
    let mut bytes = [0; 8];
    random(&mut bytes).unwrap();
    (u64::from_le_bytes(bytes) % below as u64) as usize
}

fn noise(seed: u8) -> impl Noise {
    Material::noise(&std::array::from_fn(|n| seed.wrapping_add(n as u8))).unwrap()
}

fn format(seed: u64) -> Format {
    Format { device_size_bytes: SIZE, sector_size: if seed.is_multiple_of(2) { 512 } else { 4096 }, uuid: UUID.to_owned(), kdf: CHEAP }
}

fn our_mark() -> Mark {
    Mark::new("csi-0123456789abcdef").unwrap()
}

fn new_volume(seed: u64, passphrase: &[u8]) -> (Vec<Write>, VolumeKey) {
    let material = Material::draw(random(seed)).unwrap();
    let plan = format(seed).plan(passphrase, &material, &[0..4096, (1 << 20) - 1000..1 << 20], noise(seed as u8)).unwrap();
    (mark::Format::new(plan, &our_mark()).collect(), material.volume_key.clone())
}

/// Of one write, what reached the disk: all of it, or the 512-byte sectors with their bit set.
#[derive(Clone, Copy)]
enum Landed<'a> {
    Whole(&'a Write),
    Torn(&'a Write, u64),
}

/// A disk that is a list of writes over zeros: no copy of 17 MiB for each cut.
struct Disk<'a>(Vec<Landed<'a>>);

impl<'a> Disk<'a> {
    fn of(writes: impl IntoIterator<Item = &'a Write>) -> Self {
        Self(writes.into_iter().map(Landed::Whole).collect())
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if offset + buffer.len() as u64 > SIZE {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer.fill(0);
        for landed in &self.0 {
            let (write, sectors) = match *landed {
                Landed::Whole(write) => (write, u64::MAX),
                Landed::Torn(write, sectors) => (write, sectors),
            };
            let (start, length, bytes) = match write {
                Write::Data { offset, bytes } => (*offset, bytes.len() as u64, Some(bytes)),
                Write::Zeros { offset, length } => (*offset, *length, None),
                Write::Flush => continue,
            };
            // In pieces that are whole sectors of the write, so that a torn one is exact.
            let (mut at, end) = (start.max(offset), (start + length).min(offset + buffer.len() as u64));
            while at < end {
                let until = if sectors == u64::MAX { end } else { end.min(start + ((at - start) / 512 + 1) * 512) };
                if sectors == u64::MAX || sectors >> ((at - start) / 512 % 64) & 1 == 1 {
                    let to = &mut buffer[(at - offset) as usize..(until - offset) as usize];
                    match bytes {
                        Some(bytes) => to.copy_from_slice(&bytes[(at - start) as usize..(until - start) as usize]),
                        None => to.fill(0),
                    }
                }
                at = until;
            }
        }
        Ok(())
    }

    fn header(&self) -> Result<Header, Error> {
        Header::read(SIZE, &mut |offset, buffer| self.read(offset, buffer))
    }

    fn unlock(&self, passphrase: &[u8]) -> Result<(u8, VolumeKey), Error> {
        self.header()?.unlock(passphrase, &mut |offset, buffer| self.read(offset, buffer), within(NO_MEMORY))
    }

    /// This disk after some more writes.
    fn with<R>(&self, writes: &[Write], look: impl FnOnce(&Disk<'_>) -> R) -> R {
        look(&Disk(self.0.iter().copied().chain(writes.iter().map(Landed::Whole)).collect()))
    }

    fn is_unfinished(&self) -> bool {
        let mut sector = [0; 512];
        self.read(0, &mut sector).unwrap();
        our_mark().judge(&sector) == Marked::Ours
    }
}

/// Every state that a crash may leave, by the dm-log-writes model: all before the last flush is there; of what came after it, any part.
fn crash_states<'a>(base: &[&'a Write], writes: &'a [Write], mut judge: impl FnMut(&str, &Disk<'a>)) -> usize {
    let mut random = random(7);
    let mut states = 0;
    let mut judge = |name: &str, done: &[&'a Write], since: Vec<Landed<'a>>| {
        states += 1;
        let landed = base.iter().chain(done).map(|write| Landed::Whole(write)).chain(since).collect();
        judge(name, &Disk(landed));
    };
    let mut done: Vec<&Write> = Vec::new();
    for epoch in writes.split_inclusive(|write| *write == Write::Flush) {
        let whole = |write: &'a Write| Landed::Whole(write);
        for cut in 0..=epoch.len() {
            judge(&format!("after {} writes", done.len() + cut), &done, epoch[..cut].iter().map(whole).collect());
            let Some(torn) = epoch.get(cut).filter(|write| **write != Write::Flush) else { continue };
            let but_one = epoch.iter().enumerate().filter(|(n, _)| *n != cut).map(|(_, write)| Landed::Whole(write)).collect();
            judge(&format!("without write {}", done.len() + cut), &done, but_one);
            for sectors in (0..33).map(|n| (1u64 << n) - 1).chain((0..32).map(|n| !(1u64 << n))) {
                let before = epoch[..cut].iter().map(whole).chain([Landed::Torn(torn, sectors)]).collect();
                judge(&format!("write {} torn to {sectors:x}", done.len() + cut), &done, before);
            }
        }
        // All subsets where they are few, else a thousand of them.
        let few = if epoch.len() <= 8 { 1usize << epoch.len() } else { 1000 };
        for n in 0..few {
            let is_in = |bit: usize| if epoch.len() <= 8 { n >> bit & 1 == 1 } else { number(&mut random, 2) == 1 };
            let subset = epoch.iter().zip((0..).map(is_in)).filter(|(_, is_in)| *is_in).map(|(write, _)| whole(write)).collect();
            judge(&format!("subset {n} of the writes after {}", done.len()), &done, subset);
        }
        done.extend(epoch);
    }
    states
}

#[test]
fn what_we_make_we_open() {
    for seed in [1, 2] {
        let (plan, key) = new_volume(seed, b"pass\n");
        for write in &plan {
            if let Write::Data { bytes, .. } = write {
                assert!(bytes.len() <= 1 << 20 && bytes.len().is_multiple_of(512));
            }
        }
        let disk = Disk::of(&plan);
        let header = disk.header().unwrap();
        assert_eq!((header.version, header.uuid.as_str(), header.damage()), (Version::Luks2, UUID, None));
        assert_eq!(header.segment, format(seed).segment());
        assert_eq!(header.segment.mapping_sectors(SIZE + 512).unwrap(), if seed == 2 { 2049 } else { 2048 });
        assert!(header.segment.mapping_sectors(16 << 20).is_err());
        assert_eq!(header.keyslot_memory_kib(0), Some(0));
        assert_eq!(header.dm_uuid("csi-0-encrypted"), "CRYPT-LUKS2-0d7912f455a04c1e9d0f7fb0f2a2c0de-csi-0-encrypted");
        let (number, found) = disk.unlock(b"pass\n").unwrap();
        assert!(number == 0 && found == key);
        assert_eq!(header.digest_of(&key), header.digest());
        let Err(why) = disk.unlock(b"pass") else { panic!("opened without its newline") };
        assert!(matches!(why, Error::WrongPassphrase { tried: 1, .. }) && why.to_string().contains("newline"), "{why}");
    }
}

#[test]
fn a_keyslot_that_needs_more_memory_than_there_is_is_not_tried() {
    let material = Material::draw(random(3)).unwrap();
    let kdf = Kdf::Argon2id(Argon2Cost { time: 4, memory_kib: 32_768, lanes: 2 });
    let plan: Vec<Write> = Format { kdf, ..format(3) }.plan(b"p", &material, &[], noise(1)).unwrap().collect();
    let disk = Disk::of(&plan);
    let header = disk.header().unwrap();
    assert_eq!(header.keyslot_memory_kib(0), Some(32_768));
    let Err(why) = disk.unlock(b"p") else { panic!("opened with no memory") };
    assert!(why.to_string().contains("needs 32 MiB") && why.to_string().contains("leaves 0 MiB"), "{why}");
    let (_, key) = header.unlock(b"p", &mut |offset, buffer| disk.read(offset, buffer), within(32_768)).unwrap();
    assert!(key == material.volume_key);
}

#[test]
fn bad_parameters_are_refused_before_anything_is_planned() {
    let material = Material::draw(random(3)).unwrap();
    let beyond = (1 << 20) - 4096..(1 << 20) + 1;
    let Err(why) = format(1).plan(b"p", &material, std::slice::from_ref(&beyond), noise(1)).map(|_| ()) else {
        panic!("zeros behind the end")
    };
    assert!(why.to_string().contains("1048577"), "{why}");
    for (format, word) in [
        (Format { kdf: Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: 10 }, ..format(1) }, "iterations"),
        (Format { sector_size: 520, ..format(1) }, "sector size"),
        (Format { device_size_bytes: 16 << 20, ..format(1) }, "at least 16781312"),
        (Format { uuid: "not one".to_owned(), ..format(1) }, "UUID"),
    ] {
        let Err(why) = format.plan(b"p", &material, &[], noise(1)).map(|_| ()) else { panic!("{format:?} was planned") };
        assert!(why.to_string().contains(word), "{why}");
    }
}

#[test]
fn the_probe_ranges_of_a_new_volume_read_as_zeros() {
    let (plan, key) = new_volume(1, b"p");
    let disk = Disk::of(&plan);
    let header = disk.header().unwrap();
    // 4096-byte sectors: the second range was widened to its sector.
    for (range, expected) in [(0..4096u64, true), ((1 << 20) - 4096..1 << 20, true), (8192..12_288, false)] {
        let mut there = vec![0; (range.end - range.start) as usize];
        disk.read((16 << 20) + range.start, &mut there).unwrap();
        let wanted: Vec<Write> = header.encrypted_zeros(&key, std::slice::from_ref(&range)).unwrap().collect();
        let [Write::Data { offset, bytes }] = &wanted[..] else { panic!("{} writes", wanted.len()) };
        assert_eq!(*offset, (16 << 20) + range.start);
        assert_eq!(*bytes == there, expected, "{range:?}");
    }
}

/// The zeros of a new volume are where a probe of its size looks; one that has grown meanwhile is known by its mark.
#[test]
fn a_new_volume_can_begin_with_the_mark_of_an_unfinished_format() {
    for (seed, ranges) in [(1, std::slice::from_ref(&(0..1 << 19))), (2, &[0..512, 4096..8192][..])] {
        let material = Material::draw(random(seed)).unwrap();
        let plan = format(seed).plan_marked(b"p", &material, ranges, Some(&our_mark()), noise(1)).unwrap();
        let plan: Vec<Write> = mark::Format::new(plan, &Mark::new("csi-fedcba9876543210").unwrap()).collect();
        let disk = Disk::of(&plan);
        let (header, (_, key)) = (disk.header().unwrap(), disk.unlock(b"p").unwrap());
        // What the first sector would be if it began with zeros is not there; deciphered by hand it is the mark.
        let unit = u64::from(header.segment.sector_size);
        let mut there = vec![0; unit as usize];
        disk.read(16 << 20, &mut there).unwrap();
        let zeros: Vec<Write> = header.encrypted_zeros(&key, std::slice::from_ref(&(0..unit))).unwrap().collect();
        assert!(matches!(&zeros[..], [Write::Data { bytes, .. }] if *bytes != there));
        let plain = decrypted(&key, &there);
        assert_eq!(our_mark().judge(&plain), Marked::Ours, "sectors of {unit} bytes");
        assert!(plain[512..].iter().all(|byte| *byte == 0));
    }
}

/// The mapping's first encryption sector, by AES-XTS with the tweak 0.
fn decrypted(key: &VolumeKey, sector: &[u8]) -> Vec<u8> {
    use aes::cipher::KeyInit as _;
    let (first, second) = key.bytes().split_at(32);
    let xts = xts_mode::Xts128::new(aes::Aes256::new_from_slice(first).unwrap(), aes::Aes256::new_from_slice(second).unwrap());
    let mut plain = sector.to_vec();
    xts.decrypt_sector(&mut plain, [0; 16].into());
    plain
}

/// On a disk that held another volume: before the mark the old one opens; under the mark nobody asks; after it only the new one opens.
#[test]
fn a_format_cut_short_is_blank_unfinished_or_complete() {
    let (old, _) = new_volume(2, b"old");
    let (new, _) = new_volume(1, b"new");
    let (mut unfinished, mut complete) = (0, 0);
    let states = crash_states(&old.iter().collect::<Vec<_>>(), &new, |name, disk| {
        if disk.is_unfinished() {
            unfinished += 1;
            return;
        }
        let is_old = disk.unlock(b"old").is_ok();
        let is_new = disk.unlock(b"new").is_ok();
        assert!(is_old ^ is_new, "{name}: old {is_old}, new {is_new}");
        complete += usize::from(is_new);
    });
    assert!(states > 1000 && unfinished > 500 && complete > 30, "{states} states, {unfinished} unfinished, {complete} complete");
}

fn new_keyslot(seed: u64, passphrase: &[u8]) -> NewKeyslot<'_> {
    let material = Material::draw(random(seed)).unwrap();
    NewKeyslot {
        passphrase,
        kdf: CHEAP,
        salt: material.keyslot_salt,
        stripes: Zeroizing::new(material.stripes.to_vec()),
        header_salts: material.header_salts,
    }
}

#[test]
fn rotation_cut_short_opens_with_the_old_or_the_new_passphrase() {
    let (volume, key) = new_volume(1, b"old");
    let damage = |offset| Write::Data { offset, bytes: vec![0x55; 4096] };
    // Both copies whole, the primary lost, the second copy lost.
    for harm in [vec![], vec![damage(0)], vec![damage(16_384 + 4096)]] {
        let base: Vec<&Write> = volume.iter().chain(&harm).collect();
        let before = Disk::of(base.iter().copied()).header().unwrap();
        assert_eq!(before.damage().is_some(), !harm.is_empty());
        let (number, add) = before.add_keyslot(&key, &new_keyslot(11, b"new"), noise(5)).unwrap();
        assert_eq!(number, 1);
        let mut opened_by_new = 0;
        crash_states(&base, &add, |name, disk| {
            assert!(disk.unlock(b"old").is_ok_and(|(_, found)| found == key), "adding, {name}");
            opened_by_new += usize::from(disk.unlock(b"new").is_ok());
        });
        assert!(opened_by_new > 10);

        let base: Vec<&Write> = base.into_iter().chain(&add).collect();
        let both = Disk::of(base.iter().copied()).header().unwrap();
        assert_eq!((both.damage(), both.keyslots.len()), (None, 2));
        let remove = both.remove_keyslot(0, &new_keyslot(12, b"").header_salts, noise(6)).unwrap();
        crash_states(&base, &remove, |name, disk| {
            assert!(disk.unlock(b"new").is_ok_and(|(_, found)| found == key), "removing, {name}");
        });
        let after = Disk::of(base.iter().copied().chain(&remove));
        assert!(matches!(after.unlock(b"old"), Err(Error::WrongPassphrase { tried: 1, .. })));
        let header = after.header().unwrap();
        assert!(matches!(header.remove_keyslot(1, &[[0; 64]; 2], noise(6)), Err(Error::LastKeyslot(1))));
        // The freed number and area are taken again.
        let (number, again) = header.add_keyslot(&key, &new_keyslot(13, b"third"), noise(7)).unwrap();
        assert!(number == 0 && matches!(&again[0], Write::Data { offset: 32_768, .. }));
    }
}

/// What a repeated stage does: mends the header, gives the new passphrase a keyslot if it has none, takes the old one's away.
fn repeated(left: &Disk<'_>, key: &VolumeKey) -> Vec<Write> {
    let mut writes = Vec::new();
    let now = |writes: &[Write]| left.with(writes, |disk| disk.header().unwrap());
    let opened_by = |writes: &[Write], passphrase: &[u8]| left.with(writes, |disk| disk.unlock(passphrase).ok().map(|(number, _)| number));
    writes.extend(now(&writes).heal(&[8; 64]).unwrap());
    if opened_by(&writes, b"new").is_none() {
        let (_, add) = now(&writes).add_keyslot(key, &new_keyslot(21, b"new"), noise(8)).unwrap();
        writes.extend(add);
    }
    assert!(opened_by(&writes, b"new").is_some());
    if let Some(number) = opened_by(&writes, b"old") {
        writes.extend(now(&writes).remove_keyslot(number, &[[9; 64]; 2], noise(9)).unwrap());
    }
    writes
}

#[test]
fn rotation_cut_short_and_repeated_ends_with_the_new_passphrase_alone() {
    let (volume, key) = new_volume(1, b"old");
    let base: Vec<&Write> = volume.iter().collect();
    let (_, add) = Disk::of(&volume).header().unwrap().add_keyslot(&key, &new_keyslot(11, b"new"), noise(5)).unwrap();
    let both: Vec<&Write> = volume.iter().chain(&add).collect();
    let remove = Disk::of(both.iter().copied()).header().unwrap().remove_keyslot(0, &[[1; 64]; 2], noise(6)).unwrap();
    let mut states = 0;
    let mut judge = |name: &str, disk: &Disk<'_>| {
        states += 1;
        // Each costs a dozen key derivations.
        if states % 5 != 0 {
            return;
        }
        disk.with(&repeated(disk, &key), |after| {
            let header = after.header().unwrap();
            assert_eq!((header.damage(), header.keyslots.len()), (None, 1), "{name}");
            assert!(after.unlock(b"new").is_ok_and(|(_, found)| found == key), "{name}");
            assert!(matches!(after.unlock(b"old"), Err(Error::WrongPassphrase { tried: 1, .. })), "{name}");
        });
    };
    crash_states(&base, &add, |name, disk| judge(&format!("adding, {name}"), disk));
    crash_states(&both, &remove, |name, disk| judge(&format!("removing, {name}"), disk));
    assert!(states > 300, "{states}");
}

#[test]
fn mending_cut_short_leaves_a_volume_that_opens() {
    let (volume, key) = new_volume(1, b"old");
    for at in [0, 4096, 16_384, 16_384 + 4096] {
        let damage = Write::Data { offset: at, bytes: vec![0x55; 512] };
        let base: Vec<&Write> = volume.iter().chain([&damage]).collect();
        let heal = Disk::of(base.iter().copied()).header().unwrap().heal(&[3; 64]).unwrap();
        let mut mended = 0;
        crash_states(&base, &heal, |name, disk| {
            assert!(disk.unlock(b"old").is_ok_and(|(_, found)| found == key), "damage at {at}, {name}");
            mended += usize::from(disk.header().unwrap().damage().is_none());
        });
        assert!(mended > 1);
    }
}

#[test]
fn all_32_keyslots_and_no_more() {
    let (mut writes, key) = new_volume(1, b"0");
    for n in 1..=32u64 {
        let header = Disk::of(&writes).header().unwrap();
        match header.add_keyslot(&key, &new_keyslot(n, n.to_string().as_bytes()), noise(n as u8)) {
            Ok((number, add)) => {
                assert_eq!(u64::from(number), n);
                writes.extend(add);
            }
            Err(why) => {
                assert_eq!(n, 32, "{why}");
                assert!(why.to_string().contains("all 32"), "{why}");
            }
        }
    }
    assert!(matches!(Disk::of(&writes).unlock(b"31"), Ok((31, _))));
}

/// A disk that does not answer must not hold up those that do: what is read is read before, what is computed while the place is held.
#[test]
fn a_keyslot_is_read_before_its_place_is_asked_for() {
    use std::cell::RefCell;
    struct Place<'a>(&'a RefCell<Vec<String>>);
    impl Drop for Place<'_> {
        fn drop(&mut self) {
            self.0.borrow_mut().push("left".into());
        }
    }
    let (mut writes, key) = new_volume(1, b"old");
    let (_, add) = Disk::of(&writes).header().unwrap().add_keyslot(&key, &new_keyslot(11, b"new"), noise(5)).unwrap();
    writes.extend(add);
    let disk = Disk::of(&writes);
    let header = disk.header().unwrap();
    let events = RefCell::new(Vec::new());
    let mut read = |offset: u64, buffer: &mut [u8]| {
        events.borrow_mut().push(format!("read {offset}"));
        disk.read(offset, buffer)
    };
    let admit = |slot: &Keyslot| {
        events.borrow_mut().push(format!("asked for {}", slot.number));
        Ok::<_, Error>(Ok(Place(&events)))
    };
    let (number, _) = header.unlock(b"new", &mut read, admit).unwrap();
    assert_eq!(number, 1);
    assert_eq!(events.take(), ["read 32768", "asked for 0", "left", "read 290816", "asked for 1", "left"]);
    assert!(header.unlock_keyslot(0, b"old", &mut read, admit).unwrap().is_some());
    assert_eq!(events.take(), ["read 32768", "asked for 0", "left"]);
    // One that is refused is told if no other opens; or the refusal is the end of it.
    let refuse_0 =
        |slot: &Keyslot| if slot.number == 0 { within(0)(slot).map(|_| Err(Error::Allocation { needs_kib: 7 })) } else { Ok(Ok(())) };
    assert_eq!(header.unlock(b"new", &mut read, refuse_0).map(|(number, _)| number).unwrap(), 1);
    assert!(matches!(header.unlock(b"old", &mut read, refuse_0), Err(Error::Allocation { needs_kib: 7 })));
    events.take();
    let stop = |_: &Keyslot| Err::<Result<(), Error>, _>(Error::Allocation { needs_kib: 8 });
    assert!(matches!(header.unlock(b"new", &mut read, stop), Err(Error::Allocation { needs_kib: 8 })));
    assert_eq!(events.take(), ["read 32768"]);
}

/// As a stranger writes it, who needs no passphrase for that: each keyslot is within what is read at all.
#[test]
fn a_header_of_32_dear_keyslots_costs_no_more_than_the_budget() {
    let (mut writes, key) = new_volume(1, b"0");
    for n in 1..32u8 {
        let (_, add) = Disk::of(&writes).header().unwrap().add_keyslot(&key, &new_keyslot(n.into(), &[n]), noise(n)).unwrap();
        writes.extend(add);
    }
    let with = |from: &str, to: &str, times: usize| {
        let mut image = vec![0; 16 << 20];
        Disk::of(&writes).read(0, &mut image).unwrap();
        for at in [4096, 16_384 + 4096] {
            let area = &mut image[at..at + 12_288];
            let text = String::from_utf8(area.iter().copied().take_while(|byte| *byte != 0).collect()).unwrap();
            let text = text.replacen(from, to, times);
            area.fill(0);
            area[..text.len()].copy_from_slice(text.as_bytes());
        }
        with_checksum(&mut image);
        image.resize(SIZE as usize, 0);
        image
    };
    let open = |image: &[u8], passphrase: &[u8]| {
        let read = &mut |offset: u64, buffer: &mut [u8]| {
            buffer.copy_from_slice(&image[offset as usize..][..buffer.len()]);
            Ok(())
        };
        Header::read(SIZE, read).unwrap().unlock(passphrase, read, within(NO_MEMORY)).map(|(number, _)| number)
    };
    // All but the last: it is cheap, so it comes first.
    let rounds = r#""hash":"sha256","iterations":1000,"salt""#;
    let image = with(
        &format!(r#""kdf":{{"type":"pbkdf2",{rounds}"#),
        r#""kdf":{"type":"pbkdf2","hash":"sha256","iterations":268435456,"salt""#,
        31,
    );
    assert_eq!(open(&image, &[31]).unwrap(), 31);
    // Each by itself more than one passphrase may cost: nothing is computed.
    let dear = r#""key_size":512},"kdf":{"type":"pbkdf2","hash":"sha256","iterations":268435456,"salt""#;
    let image = with(&format!(r#""key_size":64}},"kdf":{{"type":"pbkdf2",{rounds}"#), dear, 32);
    let why = open(&image, b"0").unwrap_err();
    assert!(matches!(why, Error::KeyslotWork { tried: 0, left_out: 32, .. }) && why.to_string().contains("of its 32 keyslots"), "{why}");
}

#[test]
fn a_strangers_key_makes_no_keyslot() {
    let (writes, _) = new_volume(1, b"p");
    let header = Disk::of(&writes).header().unwrap();
    assert!(header.add_keyslot(&VolumeKey::new(&[1; 64]), &new_keyslot(1, b"q"), noise(1)).is_err());
}

#[test]
fn healing_makes_both_copies_equal() {
    let (mut writes, _) = new_volume(1, b"p");
    for (harmed, other) in [(0, 16_384), (16_384, 0)] {
        writes.push(Write::Data { offset: harmed + 4096, bytes: vec![b'x'; 512] });
        let header = Disk::of(&writes).header().unwrap();
        assert!(header.damage().unwrap().contains("checksum"), "{:?}", header.damage());
        writes.extend(header.heal(&[9; 64]).unwrap());
        assert_eq!(Disk::of(&writes).header().unwrap().damage(), None);
        assert!(Disk::of(&writes).header().unwrap().heal(&[9; 64]).unwrap().is_empty());
        writes.push(Write::Data { offset: other, bytes: vec![0; 512] });
        assert!(Disk::of(&writes).unlock(b"p").is_ok());
        let header = Disk::of(&writes).header().unwrap();
        writes.extend(header.heal(&[10; 64]).unwrap());
    }
    writes.extend([0, 16_384].map(|offset| Write::Data { offset, bytes: vec![0; 512] }));
    let Err(why) = Disk::of(&writes).header() else { panic!("a header out of nothing") };
    assert!(matches!(why, Error::NoHeader { .. }) && why.to_string().contains("no LUKS magic at 0"), "{why}");
}

/// Found by fuzzing: cryptsetup takes the primary then too, and nothing would have mended the other copy.
#[test]
fn copies_that_differ_under_one_sequence_number_are_made_equal() {
    let mut image = VOLUME.clone();
    image[16_384 + 168..16_384 + 172].copy_from_slice(b"ffff");
    with_checksum(&mut image);
    let read = |image: &[u8]| {
        Header::read(SIZE, &mut |offset, buffer| {
            buffer.copy_from_slice(&image[offset as usize..][..buffer.len()]);
            Ok(())
        })
    };
    let header = read(&image).unwrap();
    assert!(header.uuid == UUID && header.damage().unwrap().contains("differs from the primary"), "{:?}", header.damage());
    for write in header.heal(&[1; 64]).unwrap() {
        if let Write::Data { offset, bytes } = write {
            image[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
    }
    image[..512].fill(0);
    assert_eq!(read(&image).unwrap().uuid, UUID);
}

/// Found by fuzzing: removing such a keyslot would have been a write of parts of sectors.
#[test]
fn a_keyslot_whose_area_is_not_made_of_whole_sectors_is_not_tried() {
    let mut image = VOLUME.clone();
    for (from, to) in [("\"offset\":\"32768\"", "\"offset\":\"32769\""), ("\"size\":\"258048\"", "\"size\":\"258049\"")] {
        for at in [4096, 16_384 + 4096] {
            let there = (at..at + 2000).find(|at| image[*at..].starts_with(from.as_bytes())).unwrap();
            image[there..there + to.len()].copy_from_slice(to.as_bytes());
        }
        with_checksum(&mut image);
        let why = poke(&image).unwrap_err().to_string();
        assert!(why.contains("whole sectors"), "{why}");
        image.clone_from(&VOLUME);
    }
}

static VOLUME: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut image = vec![0; 1 << 20];
    let writes = new_volume(1, b"p").0;
    Disk::of(&writes).read(0, &mut image).unwrap();
    image
});

/// Reads and, where that works, opens what may be anything: it answers, and soon.
fn poke(image: &[u8]) -> Result<(), Error> {
    let mut read = |offset: u64, buffer: &mut [u8]| {
        let start = usize::try_from(offset).ok().filter(|start| start + buffer.len() <= image.len());
        buffer.copy_from_slice(&image[start.ok_or(io::ErrorKind::UnexpectedEof)?..][..buffer.len()]);
        Ok(())
    };
    let header = Header::read(image.len() as u64, &mut read)?;
    let _ = (header.segment.mapping_sectors(SIZE), header.heal(&[0; 64]), header.remove_keyslot(0, &[[0; 64]; 2], |_, _: &mut [u8]| ()));
    let _ = header.add_keyslot(&VolumeKey::new(&[0; 64]), &new_keyslot(1, b"q"), |_, _: &mut [u8]| ());
    header.unlock(b"p", &mut read, within(NO_MEMORY)).map(|_| ())
}

fn with_checksum(image: &mut [u8]) {
    for at in [0, 16_384] {
        image[at + 448..at + 512].fill(0);
        let sum = Sha256::digest(&image[at..at + 16_384]);
        image[at + 448..at + 480].copy_from_slice(&sum);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Under a good checksum, so that the metadata behind it is reached.
    #[test]
    fn no_metadata_panics(changes in prop::collection::vec((0..1600usize, any::<u8>()), 1..4), is_text in any::<bool>()) {
        let mut image = VOLUME.clone();
        for (at, byte) in changes {
            let byte = if is_text { b' ' + byte % 95 } else { byte };
            // The iterations of a keyslot stay below 10,000: time is bounded elsewhere, by KDF limits.
            image[4096 + at] = byte;
            image[16_384 + 4096 + at] = byte;
        }
        with_checksum(&mut image);
        let _ = poke(&image);
    }

    #[test]
    fn no_binary_header_panics(changes in prop::collection::vec((0..4096usize, any::<u8>()), 1..6), is_summed in any::<bool>()) {
        let mut image = VOLUME.clone();
        for (at, byte) in changes {
            image[at] = byte;
        }
        if is_summed {
            with_checksum(&mut image);
        }
        prop_assert!(poke(&image).is_ok() || is_summed || image[..8] != VOLUME[..8] || image[8..512] != VOLUME[8..512]);
    }

    #[test]
    fn no_luks1_header_panics(bytes in prop::collection::vec(any::<u8>(), 4096), words in any::<bool>(), payload in 0..4096u32, slot in 0..8usize) {
        let mut image = bytes;
        image[..8].copy_from_slice(b"LUKS\xba\xbe\0\x01");
        if words {
            for (at, word) in [(8, "aes"), (40, "xts-plain64"), (72, "sha256"), (168, UUID)] {
                image[at..at + word.len()].copy_from_slice(word.as_bytes());
                image[at + word.len()] = 0;
            }
            image[104..108].copy_from_slice(&payload.to_be_bytes());
            image[108..112].copy_from_slice(&64u32.to_be_bytes());
            image[164..168].copy_from_slice(&1000u32.to_be_bytes());
            for (at, value) in [(0, 0x00ac_71f3u32), (4, 1000), (40, 8), (44, 4000)] {
                image[208 + 48 * slot + at..][..4].copy_from_slice(&value.to_be_bytes());
            }
        }
        image.resize(1 << 20, 0);
        let _ = poke(&image);
    }

    #[test]
    fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..9000)) {
        let _ = poke(&bytes);
    }
}
