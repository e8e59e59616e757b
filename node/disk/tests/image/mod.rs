//! A disk in memory, of any size: the 4096-byte units that were written, equal ones kept once (a large filesystem is
//! mostly copies of its descriptors).

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use disk::Write;
use sha2::{Digest, Sha256};

pub(crate) const UNIT: usize = 4096;
type Unit = Arc<[u8; UNIT]>;

#[derive(Clone)]
pub(crate) struct Image {
    pub(crate) size_bytes: u64,
    fill: u8,
    units: BTreeMap<u64, Unit>,
    known: HashMap<[u8; UNIT], Unit>,
}

impl Image {
    /// A disk on which every byte is `fill`.
    pub(crate) fn new(size_bytes: u64, fill: u8) -> Self {
        Self { size_bytes, fill, units: BTreeMap::new(), known: HashMap::new() }
    }

    pub(crate) fn apply(&mut self, write: &Write) {
        match write {
            Write::Data { offset, bytes } => self.put(*offset, bytes),
            Write::Zeros { offset, length } => self.put(*offset, &vec![0; usize::try_from(*length).unwrap()]),
            Write::Flush => {}
        }
    }

    pub(crate) fn put(&mut self, offset: u64, bytes: &[u8]) {
        assert!(offset + bytes.len() as u64 <= self.size_bytes, "a write beyond the end: {offset}+{}", bytes.len());
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let within = usize::try_from(at % UNIT as u64).unwrap();
            let (now, later) = rest.split_at(rest.len().min(UNIT - within));
            let key = at / UNIT as u64;
            let mut unit = if now.len() == UNIT { [0; UNIT] } else { self.unit(key) };
            unit[within..within + now.len()].copy_from_slice(now);
            let unit = self.known.entry(unit).or_insert_with(|| Arc::new(unit)).clone();
            self.units.insert(key, unit);
            at += now.len() as u64;
            rest = later;
        }
    }

    pub(crate) fn unit(&self, key: u64) -> [u8; UNIT] {
        self.units.get(&key).map_or([self.fill; UNIT], |unit| **unit)
    }

    /// The units that differ from the fill: their numbers and bytes, the last one cut to the size of the disk.
    pub(crate) fn written(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.units.iter().filter_map(|(key, unit)| {
            let left = self.size_bytes - key * UNIT as u64;
            let bytes = &unit[..UNIT.min(usize::try_from(left).unwrap_or(UNIT))];
            bytes.iter().any(|byte| *byte != self.fill).then_some((*key, bytes))
        })
    }

    /// "sparse-sha256-v1" of the golden data: every maximal run of written units, as offset, length, bytes.
    pub(crate) fn digest(&self) -> String {
        let mut digest = Sha256::new();
        let mut units = self.written().peekable();
        while let Some((first, bytes)) = units.next() {
            let mut run = vec![bytes];
            while let Some((_, bytes)) = units.next_if(|(key, _)| *key == first + run.len() as u64) {
                run.push(bytes);
            }
            let length: usize = run.iter().map(|bytes| bytes.len()).sum();
            digest.update((first * UNIT as u64).to_le_bytes());
            digest.update((length as u64).to_le_bytes());
            run.iter().for_each(|bytes| digest.update(bytes));
        }
        digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
