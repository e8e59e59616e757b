//! A format that is cut short, after the model of dm-log-writes: what was flushed is there; of what was written since,
//! anything may be missing. Whatever is left must be judged blank, unfinished or complete; "complete" must be true; and
//! from the other two the next format must end in the right image.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use disk::ext4::{Options, Surface, judge, plan};
use disk::mark::HEAD_BYTES;
use disk::{Format, Mark, Write};

const RANDOM_SUBSETS: u64 = 1000;
const SECTOR: usize = 512;
const UUID: [u8; 16] = *b"this volume's id";

/// Numbers by chance, always the same (splitmix64).
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        usize::try_from((mixed ^ (mixed >> 31)) % limit as u64).unwrap()
    }
}

fn apply(disk: &mut [u8], write: &Write) {
    let Some((offset, length)) = write.range() else { return };
    let (from, to) = (usize::try_from(offset).unwrap(), usize::try_from(offset + length).unwrap());
    match write {
        Write::Data { bytes, .. } => disk[from..to].copy_from_slice(bytes),
        Write::Zeros { .. } => disk[from..to].fill(0),
        Write::Flush => {}
    }
}

/// The write, but each of its sectors only by chance: a sector is written whole or not at all.
fn apply_torn(disk: &mut [u8], write: &Write, chance: &mut Chance) {
    let Some((offset, length)) = write.range() else { return };
    let mut whole = disk.to_vec();
    apply(&mut whole, write);
    let (from, to) = (usize::try_from(offset).unwrap(), usize::try_from(offset + length).unwrap());
    assert!(from.is_multiple_of(SECTOR) && to.is_multiple_of(SECTOR), "not in whole sectors: {write:?}");
    for sector in (from..to).step_by(SECTOR) {
        if chance.below(2) == 0 {
            disk[sector..sector + SECTOR].copy_from_slice(&whole[sector..sector + SECTOR]);
        }
    }
}

/// One volume, one surface, one format; and the one that follows where that was cut short: there, nothing is taken for zeros.
struct Crash {
    mark: Mark,
    surface: Vec<u8>,
    writes: Vec<Write>,
    complete: Vec<u8>,
    writes_again: Vec<Write>,
    complete_again: Vec<u8>,
}

#[derive(Debug, Default)]
struct Seen {
    blank: u32,
    unfinished: u32,
    complete: u32,
}

impl Crash {
    fn new(surface: Vec<u8>) -> Self {
        Self::of(surface, false)
    }

    fn of(surface: Vec<u8>, reads_zeros: bool) -> Self {
        let mark = Mark::new("csi-0123456789abcdef").unwrap();
        let format = |reads_zeros| {
            let options = Options { reads_zeros, ..Options::new(surface.len() as u64, UUID, [9; 16], 1_700_000_000) };
            let (mut complete, mut formatted) = (surface.clone(), surface.clone());
            plan(&options).unwrap().for_each(|write| apply(&mut complete, &write));
            let writes: Vec<Write> = Format::new(plan(&options).unwrap(), &mark).collect();
            writes.iter().for_each(|write| apply(&mut formatted, write));
            assert!(formatted == complete, "the mark leaves nothing behind");
            (writes, complete)
        };
        let ((writes, complete), (writes_again, complete_again)) = (format(reads_zeros), format(false));
        Self { mark, surface, writes, complete, writes_again, complete_again }
    }

    /// `before` with `issued` of these writes made, of which those since the last flush went as `fate` says.
    fn after(before: &[u8], writes: &[Write], issued: usize, mut fate: impl FnMut(&mut [u8], usize, &Write)) -> Vec<u8> {
        let mut disk = before.to_vec();
        let flushed = flushed(writes, issued);
        writes[..flushed].iter().for_each(|write| apply(&mut disk, write));
        for (index, write) in writes[..issued].iter().enumerate().skip(flushed) {
            fate(&mut disk, index, write);
        }
        disk
    }

    fn check(&self, disk: &[u8], seen: &mut Seen, what: &dyn Fn() -> String) {
        match judge(&disk[..HEAD_BYTES], &self.mark) {
            Surface::Blank => {
                assert!(disk == self.surface, "{}: blank, but written to", what());
                seen.blank += 1;
            }
            Surface::Unfinished => seen.unfinished += 1,
            Surface::Complete(superblock) => {
                assert!(disk == self.complete || disk == self.complete_again, "{}: looks complete, but is not", what());
                assert_eq!(superblock.uuid, UUID);
                seen.complete += 1;
                return;
            }
            Surface::Other(why) => panic!("{}: {why}", what()),
        }
        let mut again = disk.to_vec();
        self.writes_again.iter().for_each(|write| apply(&mut again, write));
        assert!(again == self.complete_again, "{}: formatted again, but not the right image", what());
    }

    /// `step`: of the single ones, every how many-th.
    fn every_write_and_every_single_one_missing(&self, step: usize) {
        let mut seen = Seen::default();
        for issued in 0..=self.writes.len() {
            let disk = Self::after(&self.surface, &self.writes, issued, |disk, _, write| apply(disk, write));
            self.check(&disk, &mut seen, &|| format!("after write {issued}"));
            for missing in (flushed(&self.writes, issued)..issued).rev().step_by(step) {
                let disk = Self::after(&self.surface, &self.writes, issued, |disk, index, write| {
                    if index != missing {
                        apply(disk, write);
                    }
                });
                self.check(&disk, &mut seen, &|| format!("after write {issued} without {missing}"));
            }
        }
        assert!(seen.blank >= 2 && seen.complete >= 2 && seen.unfinished as usize > self.writes.len(), "{seen:?}");
    }

    /// Lost, torn or there, by chance; every other time it happens again to the format that follows.
    fn random_subsets_missing(&self) {
        let mut seen = Seen::default();
        for number in 0..RANDOM_SUBSETS {
            let mut chance = Chance(number);
            let mut disk = self.surface.clone();
            for writes in [&self.writes, &self.writes_again].into_iter().take(if number % 2 == 0 { 1 } else { 2 }) {
                // Where only a flush or two remain there is little to lose: most crashes are in the long part.
                let issued = 1 + chance.below(writes.len());
                disk = Self::after(&disk, writes, issued, |disk, _, write| match chance.below(3) {
                    0 => {}
                    1 => apply_torn(disk, write, &mut Chance(number ^ 0xABCD)),
                    _ => apply(disk, write),
                });
                self.check(&disk, &mut seen, &|| format!("random subset {number}"));
                if matches!(judge(&disk[..HEAD_BYTES], &self.mark), Surface::Complete(_)) {
                    break;
                }
            }
        }
        assert!(seen.unfinished > 500, "{seen:?}");
    }
}

/// How many of the first `issued` writes are surely there: all up to the last flush.
fn flushed(writes: &[Write], issued: usize) -> usize {
    writes[..issued].iter().rposition(|write| *write == Write::Flush).map_or(0, |flush| flush + 1)
}

const MIB: usize = 1 << 20;

fn zeros(bytes: usize) -> Vec<u8> {
    vec![0; bytes]
}

/// Recycled storage: the first 4 KiB zeroed, then what another volume left: a filesystem, and data where it had none.
fn old_bytes(bytes: usize) -> Vec<u8> {
    let mut chance = Chance(42);
    let mut disk: Vec<u8> = (0..bytes).map(|_| chance.below(256).to_le_bytes()[0]).collect();
    plan(&Options::new(bytes as u64, *b"another volume's", [8; 16], 1)).unwrap().for_each(|write| apply(&mut disk, &write));
    disk[..HEAD_BYTES].fill(0);
    disk
}

#[test]
fn crash_on_zeros_at_every_write() {
    Crash::new(zeros(2 * MIB)).every_write_and_every_single_one_missing(1);
}

/// Two groups, so with a backup of the superblock.
#[test]
fn crash_on_two_groups_at_every_write() {
    Crash::new(zeros(9 * MIB)).every_write_and_every_single_one_missing(20);
}

#[test]
fn crash_on_old_bytes_at_every_write() {
    Crash::new(old_bytes(2 * MIB)).every_write_and_every_single_one_missing(1);
}

#[test]
fn crash_on_zeros_with_random_subsets_missing() {
    Crash::new(zeros(2 * MIB)).random_subsets_missing();
}

/// Where what would only write zeros is left out, the format that follows a cut one leaves nothing out.
#[test]
fn crash_on_what_is_taken_for_zeros_at_every_write() {
    Crash::of(zeros(9 * MIB), true).every_write_and_every_single_one_missing(1);
}

#[test]
fn crash_on_what_is_taken_for_zeros_with_random_subsets_missing() {
    Crash::of(zeros(9 * MIB), true).random_subsets_missing();
}

#[test]
fn crash_on_old_bytes_with_random_subsets_missing() {
    Crash::new(old_bytes(2 * MIB)).random_subsets_missing();
}

/// Over what an unfinished format of ours left, not only over what the storage had: the mark is all that counts.
#[test]
fn crash_in_a_format_over_an_unfinished_one() {
    let first = Crash::new(old_bytes(MIB));
    let middle = first.writes.len() / 2;
    let mut unfinished = Crash::after(&first.surface, &first.writes, middle, |disk, _, write| apply(disk, write));
    assert_eq!(judge(&unfinished[..HEAD_BYTES], &first.mark), Surface::Unfinished);
    let stranger = Mark::new("csi-fedcba9876543210").unwrap();
    assert!(matches!(judge(&unfinished[..HEAD_BYTES], &stranger), Surface::Other(_)));
    first.writes.iter().for_each(|write| apply(&mut unfinished, write));
    assert!(unfinished == first.complete);
}
