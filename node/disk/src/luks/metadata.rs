//! What the JSON of LUKS2 says, in types: segment, digest, keyslots. Everything is checked against the areas it names before anyone computes with it.

use super::json::Value;
use super::keyslot::{Hash, Kdf};
use super::{Argon2Cost, Error, SECTOR, work};
use base64ct::{Base64, Encoding as _};

/// LUKS2 numbers its keyslots 0 to 31.
pub(super) const MAX_KEYSLOTS: u8 = 32;
/// Stripes are 4000 in every LUKS; beyond this a header is damaged.
const MAX_STRIPES: usize = 8192;
const MAX_KEY_SIZE: usize = 512;
/// Twice the largest split key that the two above allow; ours are 252 KiB.
const MAX_AREA_BYTES: u64 = 8 << 20;
/// A dm-crypt cipher with its IV generator, `capi:` forms included.
const MAX_CIPHER_TEXT: usize = 64;
const MAX_SALT: usize = 1024;

/// What a dm-crypt table needs beside the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Where the data begins, from the start of the device. A multiple of 512.
    pub offset_bytes: u64,
    /// `None`: to the end of the device.
    pub size_bytes: Option<u64>,
    /// dm-crypt's words, `aes-xts-plain64`: letters, digits and `:()-_,.` only.
    pub cipher: String,
    /// 512, 1024, 2048 or 4096.
    pub sector_size: u32,
    /// IV offset, in 512-byte sectors.
    pub iv_tweak: u64,
}

impl Segment {
    /// 512-byte sectors of the mapping on a device of this size: what is behind the header, whole encryption sectors only.
    pub fn mapping_sectors(&self, device_size_bytes: u64) -> Result<u64, Error> {
        let unit = u64::from(self.sector_size);
        let too_small = |needs| Error::DeviceTooSmall { size_bytes: device_size_bytes, needs_bytes: needs };
        let least = self.offset_bytes.saturating_add(self.size_bytes.unwrap_or(unit));
        if device_size_bytes < least {
            return Err(too_small(least));
        }
        let size = self.size_bytes.unwrap_or(device_size_bytes - self.offset_bytes);
        Ok(size / unit * (unit / SECTOR))
    }
}

/// A keyslot that we can try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keyslot {
    /// 0 to 31.
    pub number: u8,
    /// 0: only when asked for by number; 1: normal; 2: first.
    pub priority: u8,
    /// How its key is derived, and at what cost.
    pub kdf: Kdf,
    pub(super) salt: Vec<u8>,
    pub(super) key_size: usize,
    pub(super) stripes: usize,
    pub(super) af_hash: Hash,
    pub(super) area_offset_bytes: u64,
    pub(super) area_size_bytes: u64,
    pub(super) area_cipher: String,
    pub(super) area_key_size: usize,
}

impl Keyslot {
    /// Bytes of the split key.
    pub(super) const fn split_size(&self) -> usize {
        self.key_size * self.stripes
    }

    pub(super) fn check(&self, data_offset_bytes: u64, first_byte: u64) -> Result<(), Error> {
        self.kdf.check_read()?;
        let bad = |what: &str| Err(Error::Metadata(format!("keyslot {}: {what}", self.number)));
        if !(1..=MAX_KEY_SIZE).contains(&self.key_size)
            || !(1..=MAX_KEY_SIZE).contains(&self.area_key_size)
            || !(1..=MAX_STRIPES).contains(&self.stripes)
        {
            return bad("key size or stripes");
        }
        if self.priority > 2 {
            return bad("priority");
        }
        let end = self.area_offset_bytes.checked_add(self.area_size_bytes);
        if self.area_offset_bytes < first_byte || end.is_none_or(|end| end > data_offset_bytes) {
            return bad("its area lies outside the keyslots area");
        }
        if !self.area_offset_bytes.is_multiple_of(SECTOR) || !self.area_size_bytes.is_multiple_of(SECTOR) {
            return bad("its area is not made of whole sectors");
        }
        if self.area_size_bytes > MAX_AREA_BYTES {
            return bad("its area is larger than 8 MiB");
        }
        if (self.split_size() as u64).next_multiple_of(SECTOR) > self.area_size_bytes {
            return bad("its area is too small for its key");
        }
        Ok(())
    }
}

/// What a volume key is checked with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Digest {
    pub(super) hash: Hash,
    pub(super) iterations: u32,
    pub(super) salt: Vec<u8>,
    pub(super) value: Vec<u8>,
}

impl Digest {
    pub(super) fn of(&self, key: &[u8]) -> Vec<u8> {
        self.hash.pbkdf2(key, &self.salt, self.iterations, self.value.len()).to_vec()
    }
}

/// All that is read from a metadata area.
pub(super) struct Parsed {
    pub(super) segment: Segment,
    pub(super) digest: Digest,
    pub(super) digest_name: String,
    pub(super) keyslots: Vec<Keyslot>,
    /// Keyslots of the digest that we cannot try, each with its reason.
    pub(super) skipped: Vec<String>,
}

pub(super) fn need<'a>(object: &'a Value, key: &str) -> Result<&'a Value, Error> {
    object.get(key).ok_or_else(|| Error::Metadata(format!("{key:?} is missing")))
}

fn need_text<'a>(object: &'a Value, key: &str) -> Result<&'a str, Error> {
    need(object, key)?.text().ok_or_else(|| Error::Metadata(format!("{key:?} is no text")))
}

pub(super) fn need_u32(object: &Value, key: &str) -> Result<u32, Error> {
    need(object, key)?.u32().ok_or_else(|| Error::Metadata(format!("{key:?} is no number of 32 bits")))
}

pub(super) fn need_u64(object: &Value, key: &str) -> Result<u64, Error> {
    need(object, key)?.u64().ok_or_else(|| Error::Metadata(format!("{key:?} is no number in quotes")))
}

fn need_size(object: &Value, key: &str) -> Result<usize, Error> {
    usize::try_from(need_u32(object, key)?).map_err(|_| Error::Metadata(format!("{key:?} is too large")))
}

fn need_bytes(object: &Value, key: &str) -> Result<Vec<u8>, Error> {
    let bytes = Base64::decode_vec(need_text(object, key)?).map_err(|_| Error::Metadata(format!("{key:?} is no base64")))?;
    if bytes.is_empty() || bytes.len() > MAX_SALT {
        return Err(Error::Metadata(format!("{key:?} has {} bytes", bytes.len())));
    }
    Ok(bytes)
}

/// Reads and checks a metadata area whose keyslots begin at `first_byte`.
pub(super) fn parse(json: &Value, first_byte: u64) -> Result<Parsed, Error> {
    refuse_requirements(json)?;
    let (segment_name, segment) = segment(json)?;
    if segment.offset_bytes < first_byte {
        return Err(Error::Unsupported(format!("data at byte {}, inside the header (a detached header?)", segment.offset_bytes)));
    }
    let (digest_name, digest_json) = need(json, "digests")?
        .members()
        .iter()
        .find(|(_, digest)| digest.get("segments").is_some_and(|list| list.list().iter().any(|name| name.text() == Some(segment_name))))
        .ok_or_else(|| Error::Metadata(format!("no digest for segment {segment_name}")))?;
    let digest = digest(digest_json)?;
    let (mut keyslots, mut skipped) = (Vec::new(), Vec::new());
    for (name, slot) in need(json, "keyslots")?.members() {
        let is_bound = digest_json.get("keyslots").is_some_and(|list| list.list().iter().any(|bound| bound.text() == Some(name)));
        if !is_bound {
            continue;
        }
        let number: Option<u8> = name.parse().ok().filter(|number: &u8| *number < MAX_KEYSLOTS && *name == number.to_string());
        let number = number.ok_or_else(|| Error::Metadata(format!("keyslot {name:?}")))?;
        match keyslot(number, slot).and_then(|slot| slot.check(segment.offset_bytes, first_byte).map(|()| slot)) {
            Ok(slot) => keyslots.push(slot),
            Err(why) => skipped.push(format!("keyslot {number}: {why}")),
        }
    }
    work::sort(&mut keyslots);
    Ok(Parsed { segment, digest, digest_name: digest_name.clone(), keyslots, skipped })
}

fn refuse_requirements(json: &Value) -> Result<(), Error> {
    let wanted = need(json, "config")?.get("requirements").and_then(|requirements| requirements.get("mandatory"));
    let wanted: Vec<&str> = wanted.map_or(&[][..], Value::list).iter().map(|name| name.text().unwrap_or("?")).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    Err(Error::Unsupported(format!("requirement {} (a re-encryption under way? finish it with `cryptsetup reencrypt`)", wanted.join(", "))))
}

fn segment(json: &Value) -> Result<(&str, Segment), Error> {
    let [(name, segment)] = need(json, "segments")?.members() else {
        return Err(Error::Unsupported("not exactly one segment (a re-encryption under way?)".to_owned()));
    };
    if need_text(segment, "type")? != "crypt" || segment.get("integrity").is_some() {
        return Err(Error::Unsupported("a segment that is not plain dm-crypt (integrity, linear or hw-opal)".to_owned()));
    }
    let size_bytes = match need_text(segment, "size")? {
        "dynamic" => None,
        _ => Some(need_u64(segment, "size")?),
    };
    let segment = Segment {
        offset_bytes: need_u64(segment, "offset")?,
        size_bytes,
        cipher: need_text(segment, "encryption")?.to_owned(),
        sector_size: need_u32(segment, "sector_size")?,
        iv_tweak: need_u64(segment, "iv_tweak")?,
    };
    check_segment(&segment)?;
    Ok((name, segment))
}

pub(super) fn check_segment(segment: &Segment) -> Result<(), Error> {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || b":()-_,.".contains(&byte);
    if !(1..=MAX_CIPHER_TEXT).contains(&segment.cipher.len()) || !segment.cipher.bytes().all(is_word) {
        return Err(Error::Metadata("the segment's cipher".to_owned()));
    }
    if ![512, 1024, 2048, 4096].contains(&segment.sector_size) {
        return Err(Error::Metadata(format!("sector size {}", segment.sector_size)));
    }
    let unit = u64::from(segment.sector_size);
    if !segment.offset_bytes.is_multiple_of(SECTOR) || segment.size_bytes.is_some_and(|size| size == 0 || !size.is_multiple_of(unit)) {
        return Err(Error::Metadata("the segment's offset or size is no multiple of its sectors".to_owned()));
    }
    Ok(())
}

fn digest(json: &Value) -> Result<Digest, Error> {
    if need_text(json, "type")? != "pbkdf2" {
        return Err(Error::Unsupported(format!("digest of type {:?}", need_text(json, "type")?)));
    }
    let digest = Digest {
        hash: Hash::named(need_text(json, "hash")?)?,
        iterations: need_u32(json, "iterations")?,
        salt: need_bytes(json, "salt")?,
        value: need_bytes(json, "digest")?,
    };
    // Fewer bytes of digest would let a wrong key pass.
    if digest.value.len() < 20 || digest.value.len() > 64 {
        return Err(Error::Metadata(format!("a digest of {} bytes", digest.value.len())));
    }
    Kdf::Pbkdf2 { hash: digest.hash, iterations: digest.iterations }.check_read()?;
    Ok(digest)
}

fn keyslot(number: u8, json: &Value) -> Result<Keyslot, Error> {
    let (af, area) = (need(json, "af")?, need(json, "area")?);
    for (what, object, known) in [("keyslot", json, "luks2"), ("af", af, "luks1"), ("area", area, "raw")] {
        if need_text(object, "type")? != known {
            return Err(Error::Unsupported(format!("{what} of type {:?}", need_text(object, "type")?)));
        }
    }
    let (kdf, salt) = kdf(need(json, "kdf")?)?;
    let priority = match json.get("priority") {
        None => 1,
        Some(priority) => priority.u32().and_then(|priority| priority.try_into().ok()).unwrap_or(u8::MAX),
    };
    Ok(Keyslot {
        number,
        priority,
        kdf,
        salt,
        key_size: need_size(json, "key_size")?,
        stripes: need_size(af, "stripes")?,
        af_hash: Hash::named(need_text(af, "hash")?)?,
        area_offset_bytes: need_u64(area, "offset")?,
        area_size_bytes: need_u64(area, "size")?,
        area_cipher: need_text(area, "encryption")?.to_owned(),
        area_key_size: need_size(area, "key_size")?,
    })
}

fn kdf(json: &Value) -> Result<(Kdf, Vec<u8>), Error> {
    let cost = || {
        Ok::<_, Error>(Argon2Cost { time: need_u32(json, "time")?, memory_kib: need_u32(json, "memory")?, lanes: need_u32(json, "cpus")? })
    };
    let kdf = match need_text(json, "type")? {
        "argon2i" => Kdf::Argon2i(cost()?),
        "argon2id" => Kdf::Argon2id(cost()?),
        "pbkdf2" => Kdf::Pbkdf2 { hash: Hash::named(need_text(json, "hash")?)?, iterations: need_u32(json, "iterations")? },
        other => return Err(Error::Unsupported(format!("key derivation {other:?}"))),
    };
    Ok((kdf, need_bytes(json, "salt")?))
}
