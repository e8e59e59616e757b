//! New keyslots in, old ones out, of a LUKS2 volume that is opened and perhaps in use.
//!
//! One header copy stays whole at every moment: the one that does not count is written first, then flushed, then the other.

use super::format::{AREA_SIZE, check_sizes, keyslot_area, keyslot_json};
use super::header::Place;
use super::json::Value;
use super::metadata::{MAX_KEYSLOTS, need, need_u64};
use super::open::{Header, Luks2};
use super::{Error, Kdf, Noise, VolumeKey, writes, zeroed};
use crate::Write;
use std::ops::Range;
use zeroize::Zeroizing;

/// All of a new keyslot but its place.
#[allow(missing_debug_implementations, reason = "stripes and key together are the keyslot")]
pub struct NewKeyslot<'a> {
    /// What opens it.
    pub passphrase: &'a [u8],
    /// Its cost; [`Kdf::DEFAULT`].
    pub kdf: Kdf,
    /// Of the key derivation.
    pub salt: [u8; 32],
    /// All stripes of the split key but the last: 3999 · 64 random bytes.
    pub stripes: Zeroizing<Vec<u8>>,
    /// Of the two header copies.
    pub header_salts: [[u8; 64]; 2],
}

impl Header {
    /// Plans another keyslot for the volume key; answers its number and the writes. Takes [`Kdf::memory_kib`] and its time.
    ///
    /// After the writes, read the header again and open the new keyslot before anything is removed.
    pub fn add_keyslot(&self, key: &VolumeKey, new: &NewKeyslot<'_>, mut noise: impl Noise) -> Result<(u8, Vec<Write>), Error> {
        let luks2 = self.changeable()?;
        new.kdf.check_new()?;
        check_sizes(key, &new.stripes)?;
        if !self.is_volume_key(key) {
            return Err(Error::Metadata("the key for the new keyslot is not the volume's".to_owned()));
        }
        let mut copy = luks2.copy.clone();
        let slots = need(&copy.metadata, "keyslots")?;
        let number =
            (0..MAX_KEYSLOTS).find(|number| slots.get(&number.to_string()).is_none()).ok_or(Error::NoRoom("all 32 keyslots are used"))?;
        let offset_bytes = self.free_area(luks2)?;
        let entry = Value::parse(&keyslot_json(&new.kdf, &new.salt, offset_bytes)).map_err(Error::Metadata)?;
        insert_keyslot(&mut copy.metadata, number, entry)?;
        for_keyslot_lists(&mut copy.metadata, "digests", |name, list| {
            if name == luks2.digest_name {
                list.push(Value::Text(number.to_string()));
            }
        });
        let area = keyslot_area(&new.kdf, new.passphrase, &new.salt, key, &new.stripes, offset_bytes, &mut noise)?;
        let mut plan: Vec<Write> = writes(offset_bytes, &area).chain([Write::Flush]).collect();
        plan.extend(both_copies(luks2, copy.metadata, &new.header_salts)?);
        Ok((number, plan))
    }

    /// Plans the end of a keyslot: out of both header copies first, then noise over its area. The last one that can open the volume is refused.
    pub fn remove_keyslot(&self, number: u8, header_salts: &[[u8; 64]; 2], mut noise: impl Noise) -> Result<Vec<Write>, Error> {
        let luks2 = self.changeable()?;
        let slot =
            self.keyslots.iter().find(|slot| slot.number == number).ok_or_else(|| Error::Metadata(format!("no keyslot {number}")))?;
        if !self.keyslots.iter().any(|other| other.number != number && other.priority > 0) {
            return Err(Error::LastKeyslot(number));
        }
        let name = number.to_string();
        let mut metadata = luks2.copy.metadata.clone();
        if let Some(Value::Object(slots)) = metadata.get_mut("keyslots") {
            slots.retain(|(key, _)| *key != name);
        }
        for owner in ["digests", "tokens"] {
            for_keyslot_lists(&mut metadata, owner, |_, list| list.retain(|bound| bound.text() != Some(&name)));
        }
        let mut plan = both_copies(luks2, metadata, header_salts)?;
        let mut bytes = zeroed(slot.area_size_bytes);
        noise(slot.area_offset_bytes, &mut bytes);
        plan.extend(writes(slot.area_offset_bytes, &bytes).chain([Write::Flush]));
        Ok(plan)
    }

    fn changeable(&self) -> Result<&Luks2, Error> {
        self.luks2.as_ref().ok_or_else(|| {
            Error::Unsupported("a change of LUKS1 keyslots (`cryptsetup convert --type luks2`, or `luksAddKey` by hand)".to_owned())
        })
    }

    /// Where an area fits between those that keyslots of any kind name.
    fn free_area(&self, luks2: &Luks2) -> Result<u64, Error> {
        let begin = 2 * luks2.copy.hdr_size;
        let metadata = &luks2.copy.metadata;
        let end = begin.saturating_add(need_u64(need(metadata, "config")?, "keyslots_size")?).min(self.segment.offset_bytes);
        let mut used: Vec<Range<u64>> = Vec::new();
        for (_, slot) in need(metadata, "keyslots")?.members() {
            let area = need(slot, "area")?;
            let start = need_u64(area, "offset")?;
            used.push(start..start.saturating_add(need_u64(area, "size")?));
        }
        used.sort_by_key(|area| area.start);
        let mut at = begin;
        for area in used {
            if area.start >= at.saturating_add(AREA_SIZE) {
                break;
            }
            at = at.max(area.end).checked_next_multiple_of(super::BLOCK).unwrap_or(u64::MAX);
        }
        if at.saturating_add(AREA_SIZE) <= end { Ok(at) } else { Err(Error::NoRoom("its keyslots area is full")) }
    }
}

/// Keyslots stand in the order of their numbers.
fn insert_keyslot(metadata: &mut Value, number: u8, entry: Value) -> Result<(), Error> {
    let Some(Value::Object(slots)) = metadata.get_mut("keyslots") else {
        return Err(Error::Metadata("\"keyslots\" is no object".to_owned()));
    };
    let at = slots.iter().position(|(name, _)| name.parse::<u8>().is_ok_and(|other| other > number)).unwrap_or(slots.len());
    slots.insert(at, (number.to_string(), entry));
    Ok(())
}

/// Calls `change` with each member of `owner` that lists keyslots.
fn for_keyslot_lists(metadata: &mut Value, owner: &str, mut change: impl FnMut(&str, &mut Vec<Value>)) {
    if let Some(Value::Object(members)) = metadata.get_mut(owner) {
        for (name, member) in members {
            if let Some(Value::List(list)) = member.get_mut("keyslots") {
                change(name, list);
            }
        }
    }
}

fn both_copies(luks2: &Luks2, metadata: Value, salts: &[[u8; 64]; 2]) -> Result<Vec<Write>, Error> {
    let mut copy = luks2.copy.clone();
    copy.metadata = metadata;
    copy.seqid = copy.seqid.checked_add(1).ok_or(Error::NoRoom("its sequence number is at its end"))?;
    let [primary_salt, secondary_salt] = salts;
    let primary = (copy.offset(Place::Primary), copy.bytes(Place::Primary, primary_salt)?);
    let secondary = (copy.offset(Place::Secondary), copy.bytes(Place::Secondary, secondary_salt)?);
    // Where only one copy is whole, it is the other one that is written first.
    let both = if luks2.copy.place == Place::Primary { [secondary, primary] } else { [primary, secondary] };
    Ok(both.iter().flat_map(|(offset, bytes)| writes(*offset, bytes).chain([Write::Flush])).collect())
}
