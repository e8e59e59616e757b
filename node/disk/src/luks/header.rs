//! The binary header of LUKS2, 4096 bytes before each copy of the metadata area, all numbers big-endian.

use super::json::Value;
use super::keyslot::Hash;
use super::{BLOCK, BLOCK_BYTES, Error, ReadAt, zeroed};

pub(super) const MAGIC_PRIMARY: [u8; 6] = *b"LUKS\xba\xbe";
const MAGIC_SECONDARY: [u8; 6] = *b"SKUL\xba\xbe";
/// Where a second copy may stand, which is also how long a header with its metadata area may be.
pub(super) const LEGAL_SIZES: [u64; 9] = [16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20];

const VERSION: usize = 6;
const HDR_SIZE: usize = 8;
const SEQID: usize = 16;
const CSUM_ALG: usize = 72;
const SALT: usize = 104;
const UUID: usize = 168;
const HDR_OFFSET: usize = 256;
const CSUM: usize = 448;
const CSUM_SIZE: usize = 64;
const UUID_SIZE: usize = 40;

/// One of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Primary,
    Secondary,
}

/// A copy whose checksum holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Copy {
    pub(super) place: Place,
    pub(super) hdr_size: u64,
    pub(super) seqid: u64,
    csum_alg: Hash,
    /// All of the binary header, so that what we do not know is kept.
    raw: Vec<u8>,
    pub(super) metadata: Value,
}

/// `N` bytes at `at`; zeros where `raw` ends earlier.
pub(super) fn field<const N: usize>(raw: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    if let Some(found) = raw.get(at..at + N) {
        out.copy_from_slice(found);
    }
    out
}

fn put(raw: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(to) = raw.get_mut(at..at + bytes.len()) {
        to.copy_from_slice(bytes);
    }
}

/// Text up to the first NUL; only what stands in names and UUIDs.
pub(super) fn text<const N: usize>(raw: &[u8], at: usize) -> Option<String> {
    let bytes = field::<N>(raw, at);
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(N);
    let text = std::str::from_utf8(bytes.get(..end)?).ok()?;
    text.bytes().all(|byte| byte.is_ascii_graphic()).then(|| text.to_owned())
}

impl Copy {
    /// A first header, before it has a metadata area on disk.
    pub(super) fn new(uuid: &str, seqid: u64, metadata: Value) -> Self {
        let hdr_size: u64 = 16 << 10;
        let mut raw = vec![0; BLOCK_BYTES];
        put(&mut raw, VERSION, &2u16.to_be_bytes());
        put(&mut raw, HDR_SIZE, &hdr_size.to_be_bytes());
        put(&mut raw, CSUM_ALG, Hash::Sha256.name().as_bytes());
        put(&mut raw, UUID, uuid.as_bytes());
        Self { place: Place::Primary, hdr_size, seqid, csum_alg: Hash::Sha256, raw, metadata }
    }

    /// Reads the copy at `offset_bytes`. The error says why it is not one.
    pub(super) fn read(place: Place, offset_bytes: u64, device_size_bytes: u64, read: &mut ReadAt<'_>) -> Result<Self, String> {
        let mut raw = vec![0; BLOCK_BYTES];
        read_part(offset_bytes, device_size_bytes, &mut raw, read)?;
        let (magic, name) = match place {
            Place::Primary => (MAGIC_PRIMARY, "LUKS"),
            Place::Secondary => (MAGIC_SECONDARY, "SKUL"),
        };
        if field(&raw, 0) != magic {
            return Err(format!("no {name} magic at {offset_bytes}"));
        }
        let version = u16::from_be_bytes(field(&raw, VERSION));
        if version != 2 {
            return Err(format!("version {version} at {offset_bytes}"));
        }
        let hdr_size = u64::from_be_bytes(field(&raw, HDR_SIZE));
        if !LEGAL_SIZES.contains(&hdr_size) || (place == Place::Secondary && hdr_size != offset_bytes) {
            return Err(format!("header size {hdr_size} at {offset_bytes}"));
        }
        if u64::from_be_bytes(field(&raw, HDR_OFFSET)) != offset_bytes {
            return Err(format!("the header at {offset_bytes} says that it stands elsewhere"));
        }
        let csum_alg = text::<32>(&raw, CSUM_ALG).unwrap_or_default();
        let csum_alg = Hash::named(&csum_alg).map_err(|_| format!("checksum by {csum_alg:?} at {offset_bytes}"))?;
        let mut area = zeroed(hdr_size - BLOCK);
        read_part(offset_bytes + BLOCK, device_size_bytes, &mut area, read)?;
        let stored: [u8; CSUM_SIZE] = field(&raw, CSUM);
        put(&mut raw, CSUM, &[0; CSUM_SIZE]);
        let computed = csum_alg.of(&[&raw, &area]);
        if stored.get(..csum_alg.length()) != Some(computed.as_slice()) {
            return Err(format!("checksum of the header at {offset_bytes} is wrong"));
        }
        let end = area.iter().position(|byte| *byte == 0).ok_or("the metadata area has no end")?;
        let json = area.get(..end).and_then(|bytes| std::str::from_utf8(bytes).ok()).ok_or("the metadata area is no text")?;
        let metadata = Value::parse(json)?;
        Ok(Self { place, hdr_size, seqid: u64::from_be_bytes(field(&raw, SEQID)), csum_alg, raw, metadata })
    }

    /// Beside what differs in every pair: magic, salt, place.
    pub(super) fn says_the_same(&self, other: &Self) -> bool {
        let plain = |copy: &Self| {
            let mut raw = copy.raw.clone();
            put(&mut raw, 0, &[0; MAGIC_PRIMARY.len()]);
            put(&mut raw, SALT, &[0; 64]);
            put(&mut raw, HDR_OFFSET, &[0; 8]);
            raw
        };
        self.metadata == other.metadata && plain(self) == plain(other)
    }

    pub(super) fn uuid(&self) -> Option<String> {
        text::<UUID_SIZE>(&self.raw, UUID)
            .filter(|uuid| !uuid.is_empty() && uuid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'))
    }

    pub(super) fn offset(&self, place: Place) -> u64 {
        match place {
            Place::Primary => 0,
            Place::Secondary => self.hdr_size,
        }
    }

    /// Header and metadata area as they stand on disk.
    pub(super) fn bytes(&self, place: Place, salt: &[u8; 64]) -> Result<Vec<u8>, Error> {
        let mut out = self.raw.clone();
        put(&mut out, 0, if place == Place::Primary { &MAGIC_PRIMARY } else { &MAGIC_SECONDARY });
        put(&mut out, SEQID, &self.seqid.to_be_bytes());
        put(&mut out, SALT, salt);
        put(&mut out, HDR_OFFSET, &self.offset(place).to_be_bytes());
        put(&mut out, CSUM, &[0; CSUM_SIZE]);
        out.extend_from_slice(self.metadata.print().as_bytes());
        let size = usize::try_from(self.hdr_size).map_err(|_| Error::NoRoom("its size does not fit this machine"))?;
        // The text ends with a NUL inside the area.
        if out.len() >= size {
            return Err(Error::NoRoom("its metadata area is full"));
        }
        out.resize(size, 0);
        let csum = self.csum_alg.of(&[&out]);
        put(&mut out, CSUM, &csum);
        Ok(out)
    }
}

fn read_part(offset_bytes: u64, device_size_bytes: u64, buffer: &mut [u8], read: &mut ReadAt<'_>) -> Result<(), String> {
    let end = offset_bytes.checked_add(buffer.len() as u64).filter(|end| *end <= device_size_bytes);
    if end.is_none() {
        return Err(format!("the device ends before {offset_bytes} + {}", buffer.len()));
    }
    read(offset_bytes, buffer).map_err(|errno| format!("read {} bytes at {offset_bytes}: {errno}", buffer.len()))
}
