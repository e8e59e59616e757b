//! A format cut short, after the model of dm-log-writes: at any write, with any of the writes since the last flush
//! missing. What is there is blank, unfinished or complete, and formatting again ends as if nothing had happened.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod image;

use disk::mark::HEAD_BYTES;
use disk::xfs::{Options, Surface, judge, plan};
use disk::{Format, Mark, Write};
use image::Image;

/// Random subsets of the missing at each cut.
const SUBSETS: u32 = 1000;
/// How many of all states are formatted again to the end.
const REPEATED: usize = 24;
const OLD: u8 = 0xA5;
const MIB: u64 = 1 << 20;

fn mark() -> Mark {
    Mark::new("csi-0123456789abcdef").unwrap()
}

fn options(sector: u32) -> Options {
    let mut options = Options::new(300 * MIB, [7; 16], 1_700_000_000);
    (options.logical_sector_bytes, options.physical_sector_bytes) = (sector, sector);
    options
}

fn writes(options: &Options) -> Vec<Write> {
    Format::new(plan(options).unwrap(), &mark()).collect()
}

/// A disk as a new volume on recycled storage is: old bytes, but for the first 4 KiB.
fn recycled(size_bytes: u64) -> Image {
    let mut image = Image::new(size_bytes, OLD);
    image.put(0, &[0; 4096]);
    image
}

/// SplitMix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

/// The writes that reached the disk, of all those of the cut format: `durable` for certain, `kept` of the later ones.
struct State<'a> {
    durable: &'a [Write],
    kept: Vec<&'a Write>,
}

impl State<'_> {
    fn present(&self) -> impl Iterator<Item = &Write> {
        self.durable.iter().chain(self.kept.iter().copied())
    }

    /// The disk's first bytes, from what they were before.
    fn head(&self, before: &[u8]) -> Vec<u8> {
        let mut head = before.to_vec();
        for write in self.present() {
            let Some((offset, length)) = write.range().filter(|(offset, _)| *offset < HEAD_BYTES as u64) else { continue };
            let (start, end) = (usize::try_from(offset).unwrap(), HEAD_BYTES.min(usize::try_from(offset + length).unwrap()));
            match write {
                Write::Data { bytes, .. } => head[start..end].copy_from_slice(&bytes[..end - start]),
                Write::Zeros { .. } => head[start..end].fill(0),
                Write::Flush => {}
            }
        }
        head
    }
}

/// Calls `look` with every state that a cut can leave.
fn cuts<'a>(writes: &'a [Write], mut look: impl FnMut(State<'a>)) {
    let mut seed = 1;
    for cut in 0..=writes.len() {
        let flushed = writes[..cut].iter().rposition(|write| *write == Write::Flush).map_or(0, |flush| flush + 1);
        let (durable, late) = (&writes[..flushed], &writes[flushed..cut]);
        look(State { durable, kept: late.iter().collect() });
        for missing in 0..late.len() {
            let kept = late.iter().enumerate().filter(|(number, _)| *number != missing).map(|(_, write)| write).collect();
            look(State { durable, kept });
        }
        if late.len() > 1 {
            for _ in 0..SUBSETS {
                look(State { durable, kept: late.iter().filter(|_| random(&mut seed) & 1 == 0).collect() });
            }
        }
    }
}

/// What the disk's head must say in each state, if it said `before` when the format began.
fn check_heads(writes: &[Write], before: &[u8], undisturbed: &Surface) -> u32 {
    let mut states = 0;
    cuts(writes, |state| {
        states += 1;
        let present = state.present().filter(|write| **write != Write::Flush).count();
        let all = writes.iter().filter(|write| **write != Write::Flush).count();
        match judge(&state.head(before), &mark()) {
            surface if surface == *undisturbed && present == 0 => {}
            Surface::Unfinished if present < all => {}
            Surface::Complete(_) if present == all => {}
            surface => panic!("{present} of {all} writes are on the disk, and it is judged {surface:?}"),
        }
    });
    states
}

#[test]
fn a_cut_leaves_blank_unfinished_or_complete() {
    for sector in [512, 4096] {
        for reads_zeros in [false, true] {
            let writes = writes(&Options { reads_zeros, ..options(sector) });
            let states = check_heads(&writes, &[0; HEAD_BYTES], &Surface::Blank);
            assert!(states > 1000 * u32::try_from(writes.len() - 8).unwrap(), "{states} states of {} writes", writes.len());
        }
        // The format of an unfinished disk may be cut as well.
        let mut before = [0; HEAD_BYTES];
        before[..512].copy_from_slice(mark().sector());
        check_heads(&writes(&options(sector)), &before, &Surface::Unfinished);
    }
}

/// Whatever of a first format is there, the second overwrites: its result cannot depend on the first.
#[test]
fn formatting_again_covers_every_byte_that_a_cut_format_wrote() {
    for sector in [512, 4096] {
        let ranges = |reads_zeros| {
            let writes = writes(&Options { reads_zeros, ..options(sector) });
            let mut ranges: Vec<(u64, u64)> =
                writes.iter().filter_map(Write::range).map(|(offset, length)| (offset, offset + length)).collect();
            ranges.sort_unstable();
            ranges
        };
        let mut covered: Vec<(u64, u64)> = Vec::new();
        for (start, end) in ranges(false) {
            match covered.last_mut() {
                Some(last) if start <= last.1 => last.1 = last.1.max(end),
                _ => covered.push((start, end)),
            }
        }
        for (start, end) in [ranges(true), ranges(false)].concat() {
            assert!(covered.iter().any(|range| range.0 <= start && end <= range.1), "{start}..{end} is not written again");
        }
    }
}

#[test]
fn formatting_again_ends_as_if_nothing_had_happened() {
    for (before, reads_zeros) in [(Image::new(300 * MIB, 0), true), (recycled(300 * MIB), false)] {
        let first = writes(&Options { reads_zeros, ..options(512) });
        let again = writes(&options(512));
        let mut expected = before.clone();
        again.iter().for_each(|write| expected.apply(write));
        let mut states = 0;
        cuts(&first, |_| states += 1);
        let (mut number, mut repeated) = (0, 0);
        cuts(&first, |state| {
            number += 1;
            // Evenly among all states, so that each of the kinds is met.
            if number % (states / REPEATED) != 0 {
                return;
            }
            repeated += 1;
            let mut disk = before.clone();
            state.present().for_each(|write| disk.apply(write));
            again.iter().for_each(|write| disk.apply(write));
            assert!(disk.written().eq(expected.written()), "state {number}");
        });
        assert!(repeated >= REPEATED);
    }
}
