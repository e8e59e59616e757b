//! The buffer of a device-mapper call: `struct dm_ioctl` and what follows it (include/uapi/linux/dm-ioctl.h). Pure.
//!
//! A table that comes back may hold a volume key, so every buffer is wiped when it goes.

use rustix::fs::makedev;
use zeroize::Zeroizing;

use crate::sys::Dev;

/// `sizeof(struct dm_ioctl)`; data follows it at once.
pub(super) const HEADER_BYTES: usize = 312;
/// Offsets in it: version[3], data_size, data_start, target_count, open_count, flags, event_nr, padding, dev, name, uuid.
const DATA_SIZE: usize = 12;
const DATA_START: usize = 16;
const TARGET_COUNT: usize = 20;
const OPEN_COUNT: usize = 24;
const FLAGS: usize = 28;
const EVENT_NR: usize = 32;
const DEV: usize = 40;
const NAME: usize = 48;
const UUID: usize = 176;
/// `DM_NAME_LEN` and `DM_UUID_LEN`, each with its NUL.
const NAME_BYTES: usize = 128;
const UUID_BYTES: usize = 129;
/// `sizeof(struct dm_target_spec)`: sector_start, length, status, next, target_type[16].
const TARGET_BYTES: usize = 40;
/// The interface that we speak; any 4.x kernel takes it.
const VERSION: [u32; 3] = [4, 0, 0];

pub(super) const READONLY: u32 = 1;
pub(super) const SUSPEND: u32 = 1 << 1;
pub(super) const STATUS_TABLE: u32 = 1 << 4;
pub(super) const INACTIVE_PRESENT: u32 = 1 << 6;
/// The answer did not fit.
pub(super) const BUFFER_FULL: u32 = 1 << 8;
/// The kernel wipes its own copy of the buffer.
pub(super) const SECURE_DATA: u32 = 1 << 15;

/// Which mapping a call is about. The kernel takes one of the three, never two (DEV_CREATE aside).
#[derive(Debug, Clone, Copy)]
pub(super) enum Which<'a> {
    None,
    Uuid(&'a str),
    Name(&'a str),
    Dev(Dev),
    New { name: &'a str, uuid: &'a str },
}

/// What the kernel answers in the header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) target_count: u32,
    pub(super) open_count: u32,
    pub(super) flags: u32,
    pub(super) dev: Dev,
    pub(super) name: String,
    pub(super) uuid: String,
}

/// A target of a table, as it is listed.
#[derive(Debug)]
pub(super) struct RawTarget {
    pub(super) start_sectors: u64,
    pub(super) length_sectors: u64,
    pub(super) kind: String,
    pub(super) params: Zeroizing<String>,
}

/// A call's buffer. No `Debug`: there may be a key in it.
#[allow(missing_debug_implementations, reason = "there may be a key in it")]
pub(super) struct Message(Zeroizing<Vec<u8>>);

impl Message {
    /// A call without data, with room for `answer_bytes` of answer. `None`: a name or UUID that the kernel would not take.
    pub(super) fn new(which: Which<'_>, flags: u32, event_nr: u32, answer_bytes: usize) -> Option<Self> {
        let mut message = Self(Zeroizing::new(vec![0; HEADER_BYTES + answer_bytes]));
        for (at, part) in VERSION.into_iter().enumerate() {
            message.put(at * 4, &part.to_ne_bytes());
        }
        message.put(DATA_SIZE, &u32::try_from(HEADER_BYTES + answer_bytes).ok()?.to_ne_bytes());
        message.put(DATA_START, &u32::try_from(HEADER_BYTES).ok()?.to_ne_bytes());
        message.put(FLAGS, &flags.to_ne_bytes());
        message.put(EVENT_NR, &event_nr.to_ne_bytes());
        let (name, uuid) = match which {
            Which::None => ("", ""),
            Which::Uuid(uuid) => ("", uuid),
            Which::Name(name) => (name, ""),
            Which::New { name, uuid } => (name, uuid),
            Which::Dev(dev) => {
                message.put(DEV, &makedev(dev.major, dev.minor).to_ne_bytes());
                ("", "")
            }
        };
        let is_fine = |text: &str, room: usize| text.len() < room && !text.bytes().any(|byte| byte == 0);
        if !is_fine(name, NAME_BYTES) || !is_fine(uuid, UUID_BYTES) {
            return None;
        }
        message.put(NAME, name.as_bytes());
        message.put(UUID, uuid.as_bytes());
        Some(message)
    }

    /// DM_TABLE_LOAD of a table with one target from sector 0.
    pub(super) fn with_target(which: Which<'_>, flags: u32, length_sectors: u64, kind: &str, params: &str) -> Option<Self> {
        if kind.len() >= 16 || params.bytes().any(|byte| byte == 0) {
            return None;
        }
        // The kernel looks for the NUL inside the spec's share of the buffer, and for the next spec at a multiple of 8.
        let size = (TARGET_BYTES + params.len() + 1).next_multiple_of(8);
        let mut message = Self::new(which, flags | SECURE_DATA, 0, size)?;
        message.put(TARGET_COUNT, &1_u32.to_ne_bytes());
        message.put(HEADER_BYTES + 8, &length_sectors.to_ne_bytes());
        message.put(HEADER_BYTES + 20, &u32::try_from(size).ok()?.to_ne_bytes());
        message.put(HEADER_BYTES + 24, kind.as_bytes());
        message.put(HEADER_BYTES + TARGET_BYTES, params.as_bytes());
        Some(message)
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn of(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.0.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    /// For the kernel, which reads and writes it.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }

    #[cfg(test)]
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub(super) fn header(&self) -> Header {
        Header {
            target_count: self.u32_at(TARGET_COUNT),
            open_count: self.u32_at(OPEN_COUNT),
            flags: self.u32_at(FLAGS),
            dev: Dev::from_raw(u64_at(&self.0, DEV).unwrap_or_default()),
            name: text(self.0.get(NAME..NAME + NAME_BYTES).unwrap_or_default()),
            uuid: text(self.0.get(UUID..UUID + UUID_BYTES).unwrap_or_default()),
        }
    }

    /// What the kernel answered: from data_start to data_size, both its own.
    fn answer(&self) -> &[u8] {
        let at = |offset| usize::try_from(self.u32_at(offset)).unwrap_or(usize::MAX);
        let end = at(DATA_SIZE).min(self.0.len());
        self.0.get(at(DATA_START)..end).unwrap_or_default()
    }

    fn u32_at(&self, at: usize) -> u32 {
        u32_at(&self.0, at).unwrap_or_default()
    }

    /// DM_LIST_DEVICES: `struct dm_name_list` { u64 dev; u32 next; char name[] }, `next` from this entry to the following; no
    /// device at all is one entry with dev 0. Only the numbers are taken: names may be any bytes, numbers find them all.
    pub(super) fn devices(&self) -> Vec<Dev> {
        let mut devices = Vec::new();
        let mut rest = self.answer();
        while let (Some(dev @ 1..), Some(next)) = (u64_at(rest, 0), u32_at(rest, 8)) {
            devices.push(Dev::from_raw(dev));
            rest = match usize::try_from(next) {
                Ok(next @ 1..) => rest.get(next..).unwrap_or_default(),
                _ => break,
            };
        }
        devices
    }

    /// DM_TABLE_STATUS: `next` of each spec is from the start of the first to the following one.
    pub(super) fn targets(&self) -> Vec<RawTarget> {
        let answer = self.answer();
        let mut targets = Vec::new();
        let mut at = 0;
        for _ in 0..self.header().target_count {
            let Some(spec) = answer.get(at..) else { break };
            let (Some(start), Some(length), Some(next)) = (u64_at(spec, 0), u64_at(spec, 8), u32_at(spec, 20)) else { break };
            let (Some(kind), Some(params)) = (spec.get(24..TARGET_BYTES), spec.get(TARGET_BYTES..)) else { break };
            targets.push(RawTarget {
                start_sectors: start,
                length_sectors: length,
                kind: text(kind),
                params: Zeroizing::new(text(params)),
            });
            match usize::try_from(next) {
                Ok(next) if next > at => at = next,
                _ => break,
            }
        }
        targets
    }

    /// DM_GET_TARGET_VERSION: `struct dm_target_versions` { u32 next; u32 version[3]; char name[] }.
    pub(super) fn version(&self) -> Option<[u32; 3]> {
        let answer = self.answer();
        Some([u32_at(answer, 4)?, u32_at(answer, 8)?, u32_at(answer, 12)?])
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..)?.get(..4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..)?.get(..8)?.try_into().ok()?))
}

/// Up to the first NUL.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}
