//! A new LUKS2 volume: parameters and random material in, writes out; the header that makes it recognisable last.

use super::cipher::SectorCipher;
use super::header::{Copy, Place};
use super::json::Value;
use super::keyslot::{Hash, Kdf, af_split};
use super::metadata::{Digest, Segment};
use super::open::{chunked, encrypted_zeros};
use super::{BLOCK, Error, KEY_SIZE, SECTOR, SECTOR_BYTES, STRIPES, VolumeKey, zeroed};
use crate::{Mark, Write};
use base64ct::{Base64, Encoding as _};
use std::ops::Range;
use zeroize::Zeroizing;

/// cryptsetup's default; the keyslots area ends here.
const DATA_OFFSET: u64 = 16 << 20;
const HDR_SIZE: u64 = 16 << 10;
const KEYSLOTS_OFFSET: u64 = 2 * HDR_SIZE;
const CIPHER: &str = "aes-xts-plain64";
/// The key is 512 random bits, so stretching it protects nothing; the least that cryptsetup takes.
const DIGEST_ITERATIONS: u32 = 1000;
/// What a volume has that cryptsetup just formatted: made 1, wiped 2, keyslot 3.
const FIRST_SEQID: u64 = 3;
/// Bytes of a split key.
pub(super) const SPLIT_SIZE: usize = KEY_SIZE * STRIPES;
/// A keyslot's area on disk.
pub(super) const AREA_SIZE: u64 = (SPLIT_SIZE as u64).next_multiple_of(BLOCK);

/// The encryption sector size for a disk: 4096 where the disk has such sectors, physically at least, and its size allows it.
#[must_use]
pub const fn sector_size(logical: u32, physical: u32, device_size_bytes: u64) -> u32 {
    let wanted = if logical >= 4096 {
        4096
    } else if physical > 512 && physical <= 4096 && logical > 0 && physical.is_multiple_of(logical) {
        physical
    } else {
        logical
    };
    let is_legal = wanted.is_power_of_two() && wanted >= 512;
    // The data offset is a multiple of 4096, so the size of the device decides.
    if is_legal && device_size_bytes.is_multiple_of(wanted as u64) { wanted } else { 512 }
}

/// Fills a buffer that goes to an offset of the device with what looks like ciphertext.
pub trait Noise: FnMut(u64, &mut [u8]) {}
impl<F: FnMut(u64, &mut [u8])> Noise for F {}

/// All that is random in a new volume. Wiped when dropped.
#[allow(missing_debug_implementations, reason = "holds the volume key")]
pub struct Material {
    /// 64 bytes.
    pub volume_key: VolumeKey,
    /// Of the two header copies.
    pub header_salts: [[u8; 64]; 2],
    /// Of the key derivation.
    pub keyslot_salt: [u8; 32],
    /// Of the volume key's digest.
    pub digest_salt: [u8; 32],
    /// All stripes of the split key but the last: 3999 · 64 bytes.
    pub stripes: Zeroizing<Vec<u8>>,
}

impl Material {
    /// Takes each part from `random`, in the order of the fields.
    pub fn draw<E>(mut random: impl FnMut(&mut [u8]) -> Result<(), E>) -> Result<Self, E> {
        let mut volume_key = Zeroizing::new([0; KEY_SIZE]);
        let (mut header_salts, mut keyslot_salt, mut digest_salt) = ([[0; 64]; 2], [0; 32], [0; 32]);
        let mut stripes = Zeroizing::new(vec![0; SPLIT_SIZE - KEY_SIZE]);
        random(volume_key.as_mut_slice())?;
        for salt in &mut header_salts {
            random(salt)?;
        }
        random(&mut keyslot_salt)?;
        random(&mut digest_salt)?;
        random(&mut stripes)?;
        Ok(Self { volume_key: VolumeKey::new(volume_key.as_slice()), header_salts, keyslot_salt, digest_salt, stripes })
    }

    /// A [`Noise`] out of 64 random bytes that nobody keeps: encrypted zeros.
    pub fn noise(key: &[u8; 64]) -> Result<impl Noise + use<>, Error> {
        let cipher = SectorCipher::new(CIPHER, key)?;
        Ok(move |offset_bytes: u64, buffer: &mut [u8]| {
            buffer.fill(0);
            cipher.encrypt(offset_bytes / SECTOR, SECTOR_BYTES, buffer);
        })
    }
}

/// What to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Format {
    /// Of the device.
    pub device_size_bytes: u64,
    /// See [`sector_size`].
    pub sector_size: u32,
    /// In the volume's own name, see `proto::VolumeHandle::uuid`.
    pub uuid: String,
    /// The first keyslot's.
    pub kdf: Kdf,
}

impl Format {
    /// The writes, in the order in which a crash after any of them does no harm.
    ///
    /// To be put into [`crate::mark::Format`], which makes the sector that begins the primary header the very last one. `blank` are ranges of the mapping, in bytes, that will read as zeros: what a
    /// probe of the opened volume looks at. `noise` fills the keyslots area, so that nobody sees which keyslots are used, and no older header survives in it.
    /// Derives the keyslot's key: takes [`Kdf::memory_kib`] and its time.
    pub fn plan<N: Noise>(
        &self,
        passphrase: &[u8],
        material: &Material,
        blank: &[Range<u64>],
        noise: N,
    ) -> Result<impl Iterator<Item = Write> + use<N>, Error> {
        self.plan_marked(passphrase, material, blank, None, noise)
    }

    /// The same for a volume that is to get a filesystem: where a blank range has the mapping's beginning, there stands the mark of an
    /// unfinished format. Zeros are where a probe of this very size looks; the mark is found whatever size the volume has by then.
    pub fn plan_marked<N: Noise>(
        &self,
        passphrase: &[u8],
        material: &Material,
        blank: &[Range<u64>],
        mark: Option<&Mark>,
        mut noise: N,
    ) -> Result<impl Iterator<Item = Write> + use<N>, Error> {
        let header = self.header(material)?;
        let segment = self.segment();
        let mapping_bytes = segment.mapping_sectors(self.device_size_bytes)? * SECTOR;
        if let Some(beyond) = blank.iter().find(|range| range.end > mapping_bytes) {
            return Err(Error::Range { parameter: "end of a blank range in bytes", value: beyond.end, min: 0, max: mapping_bytes });
        }
        let area = keyslot_area(
            &self.kdf,
            passphrase,
            &material.keyslot_salt,
            &material.volume_key,
            &material.stripes,
            KEYSLOTS_OFFSET,
            &mut noise,
        )?;
        let [primary_salt, secondary_salt] = &material.header_salts;
        let primary = header.bytes(Place::Primary, primary_salt)?;
        let secondary = header.bytes(Place::Secondary, secondary_salt)?;
        let data = |offset, bytes| Write::Data { offset, bytes };
        // An old header of either place is gone before anything of the new one is there.
        let begin = [Write::Zeros { offset: 0, length: KEYSLOTS_OFFSET }, Write::Flush];
        let rest = chunked(&(KEYSLOTS_OFFSET + AREA_SIZE..DATA_OFFSET)).map(move |range| {
            let mut bytes = zeroed(range.end - range.start);
            noise(range.start, &mut bytes);
            data(range.start, bytes)
        });
        let end = [Write::Flush, data(HDR_SIZE, secondary), Write::Flush, data(0, primary), Write::Flush];
        let blank = encrypted_zeros(&segment, &material.volume_key, blank, mark)?;
        Ok(begin.into_iter().chain(blank).chain([data(KEYSLOTS_OFFSET, area)]).chain(rest).chain(end))
    }

    /// What the mapping of the new volume will be.
    #[must_use]
    pub fn segment(&self) -> Segment {
        Segment { offset_bytes: DATA_OFFSET, size_bytes: None, cipher: CIPHER.to_owned(), sector_size: self.sector_size, iv_tweak: 0 }
    }

    fn header(&self, material: &Material) -> Result<Copy, Error> {
        if ![512, 1024, 2048, 4096].contains(&self.sector_size) {
            return Err(Error::Range { parameter: "encryption sector size in bytes", value: self.sector_size.into(), min: 512, max: 4096 });
        }
        self.kdf.check_new()?;
        check_sizes(&material.volume_key, &material.stripes)?;
        let keyslot = keyslot_json(&self.kdf, &material.keyslot_salt, KEYSLOTS_OFFSET);
        let digest = Digest { hash: Hash::Sha256, iterations: DIGEST_ITERATIONS, salt: material.digest_salt.to_vec(), value: vec![0; 32] };
        let json = format!(
            concat!(
                r#"{{"keyslots":{{"0":{}}},"tokens":{{}},"segments":{{"0":{{"type":"crypt","offset":"{}","size":"dynamic","iv_tweak":"0","#,
                r#""encryption":"{}","sector_size":{}}}}},"digests":{{"0":{{"type":"pbkdf2","keyslots":["0"],"segments":["0"],"hash":"sha256","#,
                r#""iterations":{},"salt":"{}","digest":"{}"}}}},"config":{{"json_size":"{}","keyslots_size":"{}"}}}}"#
            ),
            keyslot,
            DATA_OFFSET,
            CIPHER,
            self.sector_size,
            DIGEST_ITERATIONS,
            Base64::encode_string(&material.digest_salt),
            Base64::encode_string(&digest.of(material.volume_key.bytes())),
            HDR_SIZE - BLOCK,
            DATA_OFFSET - KEYSLOTS_OFFSET,
        );
        let is_uuid = self.uuid.len() == 36 && self.uuid.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
        if !is_uuid {
            return Err(Error::Metadata(format!("{:?} is no UUID", self.uuid)));
        }
        Ok(Copy::new(&self.uuid, FIRST_SEQID, Value::parse(&json).map_err(Error::Metadata)?))
    }
}

pub(super) fn check_sizes(key: &VolumeKey, stripes: &[u8]) -> Result<(), Error> {
    for (parameter, found, wanted) in
        [("volume key in bytes", key.bytes().len(), KEY_SIZE), ("random stripes in bytes", stripes.len(), SPLIT_SIZE - KEY_SIZE)]
    {
        if found != wanted {
            return Err(Error::Range { parameter, value: found as u64, min: wanted as u64, max: wanted as u64 });
        }
    }
    Ok(())
}

/// A keyslot's entry in the metadata, key order as cryptsetup writes it.
pub(super) fn keyslot_json(kdf: &Kdf, salt: &[u8; 32], area_offset_bytes: u64) -> String {
    let salt = Base64::encode_string(salt);
    let kdf = match kdf {
        Kdf::Argon2i(cost) | Kdf::Argon2id(cost) => {
            let name = if matches!(kdf, Kdf::Argon2i(_)) { "argon2i" } else { "argon2id" };
            format!(r#"{{"type":"{name}","time":{},"memory":{},"cpus":{},"salt":"{salt}"}}"#, cost.time, cost.memory_kib, cost.lanes)
        }
        Kdf::Pbkdf2 { hash, iterations } => {
            format!(r#"{{"type":"pbkdf2","hash":"{}","iterations":{iterations},"salt":"{salt}"}}"#, hash.name())
        }
    };
    format!(
        concat!(
            r#"{{"type":"luks2","key_size":{},"af":{{"type":"luks1","stripes":{},"hash":"sha256"}},"#,
            r#""area":{{"type":"raw","offset":"{}","size":"{}","encryption":"{}","key_size":{}}},"kdf":{}}}"#
        ),
        KEY_SIZE, STRIPES, area_offset_bytes, AREA_SIZE, CIPHER, KEY_SIZE, kdf
    )
}

/// All bytes of a keyslot's area: the volume key, split and encrypted, and noise up to the end.
pub(super) fn keyslot_area(
    kdf: &Kdf,
    passphrase: &[u8],
    salt: &[u8; 32],
    key: &VolumeKey,
    stripes: &[u8],
    area_offset_bytes: u64,
    noise: &mut impl Noise,
) -> Result<Vec<u8>, Error> {
    let derived = kdf.derive(passphrase, salt, KEY_SIZE)?;
    let mut split = af_split(Hash::Sha256, key.bytes(), stripes);
    SectorCipher::new(CIPHER, &derived)?.encrypt(0, SECTOR_BYTES, &mut split);
    let mut area = zeroed(AREA_SIZE);
    noise(area_offset_bytes, &mut area);
    for (to, from) in area.iter_mut().zip(split.iter()) {
        *to = *from;
    }
    Ok(area)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sector_size_follows_the_disk() {
        for (logical, physical, size, expected) in [
            (512, 512, 1 << 30, 512),
            (512, 4096, 1 << 30, 4096),
            (4096, 4096, 1 << 30, 4096),
            (8192, 8192, 1 << 30, 4096),
            (512, 8192, 1 << 30, 512),
            (512, 4096, (1 << 30) + 512, 512),
            (512, 1536, 1 << 30, 512),
            (0, 0, 1 << 30, 512),
        ] {
            assert_eq!(sector_size(logical, physical, size), expected, "{logical}/{physical}, {size} bytes");
        }
    }
}
