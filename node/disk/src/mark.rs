//! The mark of an unfinished format: the only state of ours on a disk.
//!
//! A format writes it into sector 0 and flushes before it writes anything else; its last act, after everything else is
//! flushed, puts into sector 0 what belongs there. So whatever a crash leaves behind, the disk carries the mark or it is
//! as it was before or it is complete. A surface with a valid mark of this very volume is formatted again, as not
//! zeroed, and is never mounted or opened.
//!
//! The sector, 512 bytes: `PVE-CSI unfinished format\n` at 0, the volume's serial (ASCII, zero-padded to 64 bytes)
//! at 64, zeros, CRC32C (with its usual inversions, little-endian) of the first 508 bytes at 508.

use std::fmt;

use crate::Write;
use crate::bytes::{get_u32, put, put_u32};

/// The unit that a disk writes whole or not at all.
pub const SECTOR_BYTES: usize = 512;
const MAGIC: &[u8; 26] = b"PVE-CSI unfinished format\n";
const SERIAL_AT: usize = 64;
/// A volume's serial is `csi-` and 16 hex digits; there is room for more.
pub const MAX_SERIAL_BYTES: usize = 64;
const CHECKSUM_AT: usize = 508;

/// The mark of one volume.
#[derive(Clone, PartialEq, Eq)]
pub struct Mark {
    sector: [u8; SECTOR_BYTES],
}

impl fmt::Debug for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let serial = self.sector.get(SERIAL_AT..SERIAL_AT + MAX_SERIAL_BYTES).unwrap_or_default();
        write!(f, "Mark({})", String::from_utf8_lossy(serial).trim_end_matches('\0'))
    }
}

/// How much of a disk's beginning its judges want to see: the largest sector that our xfs has; ext4's superblock lies within.
pub const HEAD_BYTES: usize = 4096;

/// What a disk is, as far as the mark and the reader of one format can tell; `S` is what that finds. A disk is Blank for the
/// probe only when the other looks of decision 3 (every range read, libblkid, backups) agree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Surface<S> {
    /// The head is all zeros: neither mark nor superblock.
    Blank,
    /// A format of this very volume was cut short: to be formatted again, never to be mounted.
    Unfinished,
    /// A superblock with a good checksum, and no mark.
    Complete(S),
    /// Something else: the mark of another volume, a damaged superblock, other data.
    Other(&'static str),
}

/// Which mark a sector carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marked {
    No,
    /// Of this very volume.
    Ours,
    /// A valid mark of another volume.
    Others,
    /// It begins like a mark, but the rest does not match.
    Damaged,
}

/// A serial that cannot be in a mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadSerial(String);

impl fmt::Display for BadSerial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "volume serial {:?} is not 1 to {MAX_SERIAL_BYTES} printable ASCII characters", self.0)
    }
}

impl std::error::Error for BadSerial {}

impl Mark {
    /// The mark of the volume with this serial.
    pub fn new(serial: &str) -> Result<Self, BadSerial> {
        if serial.is_empty() || serial.len() > MAX_SERIAL_BYTES || !serial.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(BadSerial(serial.to_owned()));
        }
        let mut sector = [0; SECTOR_BYTES];
        put(&mut sector, 0, MAGIC);
        put(&mut sector, SERIAL_AT, serial.as_bytes());
        let checksum = checksum(&sector);
        put_u32(&mut sector, CHECKSUM_AT, checksum);
        Ok(Self { sector })
    }

    #[must_use]
    pub const fn sector(&self) -> &[u8; SECTOR_BYTES] {
        &self.sector
    }

    /// Judges the first sector of a disk (or more than that).
    #[must_use]
    pub fn judge(&self, head: &[u8]) -> Marked {
        if !head.starts_with(MAGIC) {
            return Marked::No;
        }
        match head.get(..SECTOR_BYTES) {
            Some(sector) if sector == self.sector => Marked::Ours,
            Some(sector) if get_u32(sector, CHECKSUM_AT) == Some(checksum(sector)) => Marked::Others,
            _ => Marked::Damaged,
        }
    }

    /// Judges the first [`HEAD_BYTES`] of a disk that should be this mark's volume; `read` says what a head is that is neither
    /// marked nor zeros. Fewer bytes are Other, never Blank.
    pub fn surface<S>(&self, head: &[u8], read: impl FnOnce(&[u8]) -> Surface<S>) -> Surface<S> {
        let Some(head) = head.get(..HEAD_BYTES) else { return Surface::Other("fewer than 4096 bytes could be read") };
        match self.judge(head) {
            Marked::Ours => Surface::Unfinished,
            Marked::Others => Surface::Other("the mark of an unfinished format of another volume"),
            Marked::Damaged => Surface::Other("a damaged mark of an unfinished format"),
            Marked::No if head.iter().all(|byte| *byte == 0) => Surface::Blank,
            Marked::No => read(head),
        }
    }
}

fn checksum(sector: &[u8]) -> u32 {
    crc32c::crc32c(sector.get(..CHECKSUM_AT).unwrap_or_default())
}

/// A plan with the mark around it: mark, flush, the plan without sector 0, flush, sector 0 as the plan wants it, flush.
#[derive(Debug)]
pub struct Format<P> {
    plan: P,
    /// Writes that are due before the plan is asked again.
    due: std::collections::VecDeque<Write>,
    /// What belongs into sector 0 in the end: zeros until the plan says otherwise.
    sector: [u8; SECTOR_BYTES],
    is_planned: bool,
    is_flushed: bool,
}

impl<P: Iterator<Item = Write>> Format<P> {
    pub fn new(plan: P, mark: &Mark) -> Self {
        let begin = Write::Data { offset: 0, bytes: mark.sector.to_vec() };
        Self { plan, due: [begin, Write::Flush].into(), sector: [0; SECTOR_BYTES], is_planned: false, is_flushed: true }
    }

    /// Keeps what `write` wants in sector 0 for the end, and gives the rest of it.
    fn without_sector_0(&mut self, write: Write) -> Option<Write> {
        const SECTOR: u64 = SECTOR_BYTES as u64;
        match write {
            Write::Data { offset, mut bytes } if offset < SECTOR => {
                let at = crate::bytes::length(offset);
                let kept = bytes.len().min(SECTOR_BYTES - at);
                let rest = bytes.split_off(kept);
                put(&mut self.sector, at, &bytes);
                (!rest.is_empty()).then_some(Write::Data { offset: SECTOR, bytes: rest })
            }
            Write::Zeros { offset, length } if offset < SECTOR => {
                let end = offset.saturating_add(length);
                let kept = crate::bytes::length(offset)..crate::bytes::length(end.min(SECTOR));
                self.sector.get_mut(kept).unwrap_or_default().fill(0);
                (end > SECTOR).then(|| Write::Zeros { offset: SECTOR, length: end - SECTOR })
            }
            other => Some(other),
        }
    }
}

impl<P: Iterator<Item = Write>> Iterator for Format<P> {
    type Item = Write;

    fn next(&mut self) -> Option<Write> {
        if let Some(write) = self.due.pop_front() {
            return Some(write);
        }
        while !self.is_planned {
            let Some(write) = self.plan.next() else {
                self.is_planned = true;
                if !self.is_flushed {
                    self.due.push_back(Write::Flush);
                }
                self.due.extend([Write::Data { offset: 0, bytes: self.sector.to_vec() }, Write::Flush]);
                break;
            };
            let Some(write) = self.without_sector_0(write) else { continue };
            let is_flush = write == Write::Flush;
            // A second flush waits for the disk once more, for nothing.
            if !(is_flush && self.is_flushed) {
                self.is_flushed = is_flush;
                return Some(write);
            }
        }
        self.due.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SERIAL: &str = "csi-0123456789abcdef";

    #[test]
    fn a_mark_is_judged_by_its_volume_and_its_checksum() {
        let mark = Mark::new(SERIAL).unwrap();
        let other = Mark::new("csi-fedcba9876543210").unwrap();
        assert_eq!(mark.judge(mark.sector()), Marked::Ours);
        assert_eq!(mark.judge(other.sector()), Marked::Others);
        assert_eq!(mark.judge(&[0; 512]), Marked::No);
        assert_eq!(mark.judge(&[]), Marked::No);
        assert_eq!(mark.judge(&mark.sector()[..511]), Marked::Damaged);
        for at in MAGIC.len()..SECTOR_BYTES {
            let mut sector = *mark.sector();
            sector[at] ^= 1;
            assert_eq!(mark.judge(&sector), Marked::Damaged, "byte {at}");
        }
    }

    #[test]
    fn a_serial_that_would_not_come_back_is_refused() {
        for bad in ["", "csi 1", "csi-\u{e9}", &"x".repeat(65)] {
            assert_eq!(Mark::new(bad), Err(BadSerial(bad.to_owned())));
        }
        assert!(Mark::new(&"x".repeat(64)).is_ok());
    }

    #[test]
    fn the_mark_is_first_and_sector_0_is_last_and_no_flush_is_idle() {
        let plan = [
            Write::Flush,
            Write::Zeros { offset: 0, length: 4096 },
            Write::Data { offset: 256, bytes: vec![7; 1024] },
            Write::Data { offset: 0, bytes: vec![1; 100] },
            Write::Data { offset: 8192, bytes: vec![2; 512] },
            Write::Flush,
            Write::Flush,
        ];
        let mark = Mark::new(SERIAL).unwrap();
        let mut last = vec![1; 100];
        last.resize(256, 0);
        last.resize(512, 7);
        let expected = [
            Write::Data { offset: 0, bytes: mark.sector().to_vec() },
            Write::Flush,
            Write::Zeros { offset: 512, length: 3584 },
            Write::Data { offset: 512, bytes: vec![7; 768] },
            Write::Data { offset: 8192, bytes: vec![2; 512] },
            Write::Flush,
            Write::Data { offset: 0, bytes: last },
            Write::Flush,
        ];
        assert_eq!(Format::new(plan.into_iter(), &mark).collect::<Vec<_>>(), expected);
    }

    proptest! {
        #[test]
        fn judging_never_panics(head in proptest::collection::vec(any::<u8>(), 0..600), with_magic: bool) {
            let mut head = head;
            if with_magic {
                head.splice(0..0, *MAGIC);
            }
            let judged = Mark::new(SERIAL).unwrap().judge(&head);
            prop_assert_eq!(judged == Marked::No, !with_magic && !head.starts_with(MAGIC));
        }
    }
}
