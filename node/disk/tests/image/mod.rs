//! A disk in memory, of any size: the 4096-byte units that were written, equal ones kept once (a large filesystem is
//! mostly copies of its descriptors).

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use disk::Write;

pub(crate) const UNIT: usize = 4096;
type Unit = Arc<[u8; UNIT]>;

#[derive(Clone)]
pub(crate) struct Image {
    pub(crate) size_bytes: u64,
    fill: u8,
    units: BTreeMap<u64, Unit>,
    known: HashMap<u64, Vec<Unit>>,
}

impl Image {
    /// A disk on which every byte is `fill`.
    pub(crate) fn new(size_bytes: u64, fill: u8) -> Self {
        Self { size_bytes, fill, units: BTreeMap::new(), known: HashMap::new() }
    }

    pub(crate) fn apply(&mut self, write: &Write) {
        match write {
            Write::Data { offset, bytes } => self.put(*offset, bytes),
            Write::Zeros { offset, length } => self.zero(*offset, *length),
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
            let unit = self.shared(unit);
            self.units.insert(key, unit);
            at += now.len() as u64;
            rest = later;
        }
    }

    fn zero(&mut self, offset: u64, length: u64) {
        let (whole, end) = (offset.next_multiple_of(UNIT as u64), offset + length);
        let whole_end = end / UNIT as u64 * UNIT as u64;
        if whole >= whole_end {
            return self.put(offset, &vec![0; usize::try_from(length).unwrap()]);
        }
        assert!(end <= self.size_bytes, "zeros beyond the end: {offset}+{length}");
        self.put(offset, &[0; UNIT][..usize::try_from(whole - offset).unwrap()]);
        self.put(whole_end, &[0; UNIT][..usize::try_from(end - whole_end).unwrap()]);
        let keys = whole / UNIT as u64..whole_end / UNIT as u64;
        if self.fill == 0 {
            let gone: Vec<u64> = self.units.range(keys).map(|(key, _)| *key).collect();
            gone.iter().for_each(|key| drop(self.units.remove(key)));
        } else {
            let zeros = self.shared([0; UNIT]);
            self.units.extend(keys.map(|key| (key, zeros.clone())));
        }
    }

    fn shared(&mut self, unit: [u8; UNIT]) -> Unit {
        let hash = unit.chunks_exact(8).fold(0_u64, |hash, word| {
            let word = u64::from_le_bytes(word.try_into().unwrap());
            (hash ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29)
        });
        let alike = self.known.entry(hash).or_default();
        if let Some(known) = alike.iter().find(|known| ***known == unit) {
            return known.clone();
        }
        let unit = Arc::new(unit);
        alike.push(unit.clone());
        unit
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
}
