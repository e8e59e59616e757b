//! A disk in memory: some bytes, then zeros up to its size.

use disk::Write;
use std::io;

/// See above.
#[derive(Debug, Clone)]
pub struct Disk {
    bytes: Vec<u8>,
    size_bytes: u64,
}

impl Disk {
    #[must_use]
    pub fn new(bytes: Vec<u8>, size_bytes: u64) -> Self {
        Self { bytes, size_bytes }
    }

    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// All of `buffer`; an error where that is beyond the end.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64).filter(|end| *end <= self.size_bytes);
        end.ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.fill(0);
        let there = usize::try_from(offset).ok().and_then(|offset| self.bytes.get(offset..)).unwrap_or_default();
        for (to, from) in buffer.iter_mut().zip(there) {
            *to = *from;
        }
        Ok(())
    }

    #[must_use]
    pub fn at(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.read(offset, &mut bytes).expect("a place on the disk");
        bytes
    }

    pub fn put(&mut self, offset: u64, bytes: &[u8]) {
        let start = usize::try_from(offset).expect("models are small");
        if self.bytes.len() < start + bytes.len() {
            self.bytes.resize(start + bytes.len(), 0);
        }
        self.bytes[start..start + bytes.len()].copy_from_slice(bytes);
    }

    /// Writes as a plan has them: whole sectors, on the disk.
    pub fn write(&mut self, writes: impl IntoIterator<Item = Write>) {
        for write in writes {
            if let Some((offset, length)) = write.range() {
                assert!(offset.is_multiple_of(512) && length.is_multiple_of(512), "{length} bytes at {offset} are no whole sectors");
                assert!(length <= disk::MAX_WRITE_BYTES || matches!(write, Write::Zeros { .. }), "a write of {length} bytes");
                assert!(
                    offset.checked_add(length).is_some_and(|end| end <= self.size_bytes),
                    "{length} bytes at {offset} are beyond the end"
                );
            }
            match write {
                Write::Data { offset, bytes } => self.put(offset, &bytes),
                Write::Zeros { offset, length } => self.put(offset, &vec![0; usize::try_from(length).expect("models are small")]),
                Write::Flush => (),
            }
        }
    }
}
