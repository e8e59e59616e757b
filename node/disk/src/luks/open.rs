//! Reads a LUKS header and gets the volume key out of it.

use super::cipher::SectorCipher;
use super::header::{Copy, LEGAL_SIZES, MAGIC_PRIMARY, Place, field};
use super::keyslot::af_merge;
use super::metadata::{self, Digest, Keyslot, Segment};
use super::{CHUNK, Error, ReadAt, SECTOR, SECTOR_BYTES, VolumeKey, luks1, writes, zeroed};
use crate::{Mark, Write};
use std::ops::Range;
use zeroize::Zeroizing;

/// Which format a header has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Opened only.
    Luks1,
    /// Opened, made, rotated.
    Luks2,
}

/// The LUKS2 header that counts, and what is known of the other copy.
#[derive(Debug, Clone)]
pub(super) struct Luks2 {
    pub(super) copy: Copy,
    pub(super) digest_name: String,
    /// Why the other copy does not count; `None` if it says the same.
    pub(super) other_is_bad: Option<String>,
}

/// A header, read and checked.
#[derive(Debug, Clone)]
pub struct Header {
    /// Its format.
    pub version: Version,
    /// Text of at most 40 letters, digits and dashes.
    pub uuid: String,
    /// What the mapping is made of.
    pub segment: Segment,
    /// Those that can be tried, in the order in which they are.
    pub keyslots: Vec<Keyslot>,
    /// Those that cannot, each with its reason.
    pub skipped: Vec<String>,
    pub(super) digest: Digest,
    pub(super) luks2: Option<Luks2>,
}

impl Header {
    /// Reads the header of a device that was probed as LUKS: a second copy alone would also be found in what a former life of the disk left behind.
    ///
    /// Of two whole copies the one with the higher sequence number counts.
    pub fn read(device_size_bytes: u64, read: &mut ReadAt<'_>) -> Result<Self, Error> {
        if let Some(header) = luks1::read(device_size_bytes, read)? {
            return Ok(header);
        }
        let primary = Copy::read(Place::Primary, 0, device_size_bytes, read);
        let secondary = match &primary {
            Ok(copy) => Copy::read(Place::Secondary, copy.hdr_size, device_size_bytes, read),
            // The size of a lost primary is unknown: the second copy is looked for at every place it may have.
            Err(_) => {
                let mut why = "not found at any legal place".to_owned();
                let found = LEGAL_SIZES.into_iter().find_map(|at| match Copy::read(Place::Secondary, at, device_size_bytes, read) {
                    Ok(copy) => Some(copy),
                    Err(reason) => {
                        if !reason.contains("magic") && !reason.contains("ends before") {
                            why = reason;
                        }
                        None
                    }
                });
                found.ok_or(why)
            }
        };
        let (copy, other_is_bad) = match (primary, secondary) {
            (Ok(primary), Ok(secondary)) if secondary.seqid > primary.seqid => {
                let why = format!("sequence number {}, the second copy has {}", primary.seqid, secondary.seqid);
                (secondary, Some(why))
            }
            (Ok(primary), Ok(secondary)) => {
                let why = if secondary.seqid < primary.seqid {
                    Some(format!("sequence number {}, the primary has {}", secondary.seqid, primary.seqid))
                } else {
                    // cryptsetup takes the primary then, and so do we; nobody writes such a pair.
                    (!secondary.says_the_same(&primary))
                        .then(|| format!("it differs from the primary under one sequence number, {}", primary.seqid))
                };
                (primary, why)
            }
            (Ok(copy), Err(why)) | (Err(why), Ok(copy)) => (copy, Some(why)),
            (Err(primary), Err(secondary)) => return Err(Error::NoHeader { primary, secondary }),
        };
        Self::from_copy(copy, other_is_bad)
    }

    pub(super) fn from_copy(copy: Copy, other_is_bad: Option<String>) -> Result<Self, Error> {
        let uuid = copy.uuid().ok_or_else(|| Error::Metadata("its UUID is no UUID".to_owned()))?;
        let parsed = metadata::parse(&copy.metadata, 2 * copy.hdr_size)?;
        Ok(Self {
            version: Version::Luks2,
            uuid,
            segment: parsed.segment,
            keyslots: parsed.keyslots,
            skipped: parsed.skipped,
            digest: parsed.digest,
            luks2: Some(Luks2 { copy, digest_name: parsed.digest_name, other_is_bad }),
        })
    }

    /// The UUID of a mapping with this name: how cryptsetup and we know it again.
    #[must_use]
    pub fn dm_uuid(&self, name: &str) -> String {
        let kind = match self.version {
            Version::Luks1 => "LUKS1",
            Version::Luks2 => "LUKS2",
        };
        format!("CRYPT-{kind}-{}-{name}", self.uuid.replace('-', ""))
    }

    /// What is wrong with the header copy that does not count; [`Self::heal`] mends it.
    #[must_use]
    pub fn damage(&self) -> Option<&str> {
        self.luks2.as_ref()?.other_is_bad.as_deref()
    }

    /// The writes that make the other copy say what the good one says; none if it does, or for LUKS1, which has one copy only.
    pub fn heal(&self, salt: &[u8; 64]) -> Result<Vec<Write>, Error> {
        let Some(Luks2 { copy, other_is_bad: Some(_), .. }) = &self.luks2 else { return Ok(Vec::new()) };
        let other = match copy.place {
            Place::Primary => Place::Secondary,
            Place::Secondary => Place::Primary,
        };
        Ok(writes(copy.offset(other), &copy.bytes(other, salt)?).chain([Write::Flush]).collect())
    }

    /// KiB of memory that trying this keyslot takes, from its header alone. `None`: there is no such keyslot that can be tried.
    #[must_use]
    pub fn keyslot_memory_kib(&self, number: u8) -> Option<u64> {
        self.keyslots.iter().find(|slot| slot.number == number).map(|slot| slot.kdf.memory_kib())
    }

    /// Tries the keyslots in order; answers the number of the one that opened, and the volume key. All of them together cost no more
    /// than some minutes of a core: what would go beyond that is not tried, and told if nothing else opens.
    ///
    /// A keyslot is read before `admit` is asked for it, and its key derived while what that answers is held: a disk that does not
    /// answer holds nobody else up. Asked for a keyslot, `admit` may refuse it (the inner error: others are tried, and the first such
    /// error is told if none opens) or end it all.
    pub fn unlock<P, E: From<Error>>(
        &self,
        passphrase: &[u8],
        read: &mut ReadAt<'_>,
        mut admit: impl FnMut(&Keyslot) -> Result<Result<P, E>, E>,
    ) -> Result<(u8, VolumeKey), E> {
        let attempts = self.attempts();
        let (mut tried, mut refused, mut skipped) = (0, None, self.skipped.clone());
        for slot in attempts.keyslots {
            let opened = match slot.read_area(read) {
                Ok(area) => match admit(slot)? {
                    Ok(_place) => self.open_area(slot, passphrase, area),
                    Err(why) => {
                        refused.get_or_insert(why);
                        continue;
                    }
                },
                Err(why) => Err(why),
            };
            match opened {
                Ok(Some(key)) => return Ok((slot.number, key)),
                Ok(None) => tried += 1,
                // Another keyslot may still open; what stopped this one is told if none does.
                Err(why @ (Error::Unsupported(_) | Error::Read { .. })) => skipped.push(format!("keyslot {}: {why}", slot.number)),
                Err(why) => return Err(why.into()),
            }
        }
        let wrong = || attempts.refusal.unwrap_or(Error::WrongPassphrase { tried, skipped }).into();
        Err(refused.unwrap_or_else(wrong))
    }

    /// Tries one keyslot, as [`Self::unlock`] does; `None` if the passphrase is not its.
    pub fn unlock_keyslot<P, E: From<Error>>(
        &self,
        number: u8,
        passphrase: &[u8],
        read: &mut ReadAt<'_>,
        mut admit: impl FnMut(&Keyslot) -> Result<Result<P, E>, E>,
    ) -> Result<Option<VolumeKey>, E> {
        let slot = self.keyslots.iter().find(|slot| slot.number == number);
        let slot = slot.ok_or_else(|| Error::Metadata(format!("no keyslot {number}")))?;
        let area = slot.read_area(read)?;
        let _place = admit(slot)??;
        Ok(self.open_area(slot, passphrase, area)?)
    }

    fn open_area(&self, slot: &Keyslot, passphrase: &[u8], mut area: Zeroizing<Vec<u8>>) -> Result<Option<VolumeKey>, Error> {
        let derived = slot.kdf.derive(passphrase, &slot.salt, slot.area_key_size)?;
        SectorCipher::new(&slot.area_cipher, &derived)?.decrypt(0, SECTOR_BYTES, &mut area);
        let split = area.get(..slot.split_size()).unwrap_or_default();
        let key =
            af_merge(slot.af_hash, slot.key_size, split).ok_or_else(|| Error::Metadata(format!("keyslot {}: its stripes", slot.number)))?;
        let key = VolumeKey(key);
        Ok(self.is_volume_key(&key).then_some(key))
    }

    /// Whether this key is the volume's, by the header's digest.
    #[must_use]
    pub fn is_volume_key(&self, key: &VolumeKey) -> bool {
        same(&self.digest_of(key), &self.digest.value)
    }

    /// The digest that this key would have in this header: `luksDump`'s "Digest" (LUKS1: "MK digest") if the key is the volume's. Tells nothing about the key.
    #[must_use]
    pub fn digest_of(&self, key: &VolumeKey) -> Vec<u8> {
        self.digest.of(key.bytes())
    }

    /// The digest as the header has it.
    #[must_use]
    pub fn digest(&self) -> &[u8] {
        &self.digest.value
    }

    /// Writes to the device that make `ranges` of the mapping (bytes, widened to whole encryption sectors) read as zeros.
    pub fn encrypted_zeros(&self, key: &VolumeKey, ranges: &[Range<u64>]) -> Result<impl Iterator<Item = Write> + use<>, Error> {
        encrypted_zeros(&self.segment, key, ranges, None)
    }
}

impl Keyslot {
    /// What is in its area, of the split key's length.
    fn read_area(&self, read: &mut ReadAt<'_>) -> Result<Zeroizing<Vec<u8>>, Error> {
        let length = self.split_size().next_multiple_of(SECTOR_BYTES);
        let mut area = Zeroizing::new(vec![0; length]);
        let offset_bytes = self.area_offset_bytes;
        read(offset_bytes, &mut area).map_err(|source| Error::Read { offset_bytes, length, source })?;
        Ok(area)
    }
}

/// Admits keyslots that take no more memory than that: for [`Header::unlock`] where nobody else derives keys.
pub fn within(limit_kib: u64) -> impl FnMut(&Keyslot) -> Result<Result<(), Error>, Error> {
    move |slot| {
        let needs_kib = slot.kdf.memory_kib();
        let refused = Error::KeyslotMemory { keyslot: slot.number, needs_kib, limit_kib };
        Ok(if needs_kib <= limit_kib { Ok(()) } else { Err(refused) })
    }
}

/// As [`Header::encrypted_zeros`], before there is a header; at the mapping's beginning, where a range has it, with a mark.
pub(super) fn encrypted_zeros(
    segment: &Segment,
    key: &VolumeKey,
    ranges: &[Range<u64>],
    mark: Option<&Mark>,
) -> Result<impl Iterator<Item = Write> + use<>, Error> {
    let cipher = SectorCipher::new(&segment.cipher, key.bytes())?;
    let unit = u64::from(segment.sector_size);
    let sector_size = segment.sector_size as usize;
    let (offset, tweak) = (segment.offset_bytes, segment.iv_tweak);
    let ranges: Vec<Range<u64>> =
        ranges.iter().map(|range| range.start / unit * unit..range.end.div_ceil(unit).saturating_mul(unit)).collect();
    let chunks = ranges.into_iter().flat_map(|range| chunked(&range));
    let mark = mark.map(|mark| *mark.sector());
    Ok(chunks.map(move |chunk| {
        let mut bytes = zeroed(chunk.end - chunk.start);
        if let (0, Some(mark), Some(to)) = (chunk.start, &mark, bytes.get_mut(..SECTOR_BYTES)) {
            to.copy_from_slice(mark);
        }
        cipher.encrypt(tweak.wrapping_add(chunk.start / SECTOR), sector_size, &mut bytes);
        Write::Data { offset: offset + chunk.start, bytes }
    }))
}

/// A range in pieces of at most [`CHUNK`], cut at its multiples.
pub(super) fn chunked(range: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let end = range.end;
    std::iter::successors(Some(range.start), |at| Some((at / CHUNK + 1) * CHUNK))
        .take_while(move |at| *at < end)
        .map(move |at| at..end.min((at / CHUNK + 1) * CHUNK))
}

/// Compares without telling by its time where the first difference is.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |differences, (a, b)| differences | (a ^ b)) == 0
}

/// Whether the device begins with LUKS magic and this version.
pub(super) fn begins_with(version: u16, start: &[u8]) -> bool {
    field(start, 0) == MAGIC_PRIMARY && u16::from_be_bytes(field(start, 6)) == version
}
