//! Little- and big-endian fields in byte buffers, and the checksum that the formats share. Nothing here panics: a field
//! outside its buffer is not written, and reads as `None`.

/// Puts `value` at `at`. Every caller's offsets are constants inside a buffer that it made; anything else writes nothing.
pub(crate) fn put(buffer: &mut [u8], at: usize, value: &[u8]) {
    let field = at.checked_add(value.len()).and_then(|end| buffer.get_mut(at..end));
    debug_assert!(field.is_some(), "field at {at} of {} bytes", value.len());
    if let Some(field) = field {
        field.copy_from_slice(value);
    }
}

pub(crate) fn put_u16(buffer: &mut [u8], at: usize, value: u16) {
    put(buffer, at, &value.to_le_bytes());
}

pub(crate) fn put_u32(buffer: &mut [u8], at: usize, value: u32) {
    put(buffer, at, &value.to_le_bytes());
}

/// The `N` bytes at `at`, if they are there.
pub(crate) fn get<const N: usize>(buffer: &[u8], at: usize) -> Option<[u8; N]> {
    buffer.get(at..at.checked_add(N)?)?.try_into().ok()
}

pub(crate) fn get_u16(buffer: &[u8], at: usize) -> Option<u16> {
    get(buffer, at).map(u16::from_le_bytes)
}

pub(crate) fn get_u32(buffer: &[u8], at: usize) -> Option<u32> {
    get(buffer, at).map(u32::from_le_bytes)
}

/// The low 32 bits: how the formats split a 64-bit number into fields.
pub(crate) const fn low32(value: u64) -> u32 {
    (value & 0xFFFF_FFFF) as u32
}

/// Bits 32 to 63.
pub(crate) const fn high32(value: u64) -> u32 {
    (value >> 32) as u32
}

/// Bits 0 to 15.
pub(crate) const fn low16(value: u32) -> u16 {
    (value & 0xFFFF) as u16
}

/// Bits 16 to 31.
pub(crate) const fn high16(value: u32) -> u16 {
    (value >> 16) as u16
}

/// CRC32C (Castagnoli, reflected) over `data`, started from `init` and not inverted at the end, as ext4 stores it.
/// To go on where another left off, give its value as `init`.
pub(crate) fn crc32c_raw(init: u32, data: &[u8]) -> u32 {
    !crc32c::crc32c_append(!init, data)
}

/// A buffer length or index from a number of bytes that is known to be small (at most a write).
pub(crate) fn length(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_raw_is_the_plain_crc_without_its_inversions() {
        // RFC 3720 B.4: CRC32C of "123456789" is E3069283.
        assert_eq!(crc32c_raw(!0, b"123456789"), !0xE306_9283);
        assert_eq!(crc32c_raw(crc32c_raw(!0, b"1234"), b"56789"), !0xE306_9283);
    }

    #[test]
    fn numbers_split_into_their_fields() {
        let value = 0x0123_4567_89AB_CDEF_u64;
        assert_eq!((high32(value), low32(value)), (0x0123_4567, 0x89AB_CDEF));
        assert_eq!((high16(low32(value)), low16(low32(value))), (0x89AB, 0xCDEF));
    }
}
