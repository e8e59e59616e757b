//! LUKS: a volume made, opened, its header mended, its passphrase replaced, its mapping grown.
//!
//! Volume keys live in these functions only, and are wiped when they end. One key derivation runs at a time in the process:
//! each may take all the memory that the pod has.

use std::ops::Range;
use std::time::Instant;

use disk::luks::{self, Format as LuksFormat, Header, Keyslot, Material, NewKeyslot, VolumeKey};
use disk::{Format, Write};
use rustix::io::Errno;
use zeroize::Zeroizing;

use super::Node;
use super::mapping::{self, Medium, read, read_header};
use super::progress::Deriving;
use super::slots::Slot;
use crate::error::Cause;
use crate::plan::{self, Surface};
use crate::request::{Access as Shown, Encryption, Format as MayFormat, Passphrases, StageRequest, Volume};
use crate::sys::block::{Access, Device};
use crate::sys::dm::{self, CryptTable};
use crate::sys::random;
use crate::sys::scsi::{self, Disk};
use crate::{format, identity, kill, probe};

/// dm-crypt's sectors.
const SECTOR_BYTES: u64 = 512;
/// What is kept of it, in the log.
pub(super) const OUTSTANDING: &str = "volumes whose passphrase is still to be replaced";
/// Random bytes behind a [`luks::Format`]'s noise.
const NOISE_KEY_BYTES: usize = 64;

/// The place of the one key derivation, and that its call is at that.
type Alone<'a> = (Slot<'a>, Deriving);

impl Node {
    /// Makes the disk a LUKS2 volume. With `make_filesystem`, the only places that destroy anything; as there, the disk is
    /// probed once more when nobody else can hold it.
    pub(super) fn encrypt(&self, want: &StageRequest, disk: &Disk, passphrases: &Passphrases, unfinished: bool) -> Result<(), Cause> {
        let Some(encryption) = &want.encryption else { return Err(plan::Refusal::NoPassphrase.into()) };
        // A kernel that cannot open it is found out before anything is written.
        dm::crypt_version(&self.devices)?;
        let topology = scsi::topology(&self.sysfs, disk)?;
        let luks = LuksFormat {
            device_size_bytes: disk.size_bytes,
            sector_size: luks::sector_size(topology.logical_block_size, topology.physical_block_size, disk.size_bytes),
            uuid: format::luks_uuid(&want.volume),
            kdf: encryption.kdf,
        };
        // The disk may have grown before there is a filesystem: then the zeros are no longer where a probe looks, and the mark is.
        let inside = if matches!(want.access, Shown::Filesystem(_)) { Some(probe::mark(&want.volume)?) } else { None };
        let inside_bytes = luks.segment().mapping_sectors(disk.size_bytes)? * SECTOR_BYTES;
        if let (MayFormat::May(options), Shown::Filesystem(_)) = (&want.format, &want.access) {
            // What does not fit inside is refused before the disk is touched.
            format::check(inside_bytes, &want.volume, *options, &topology)?;
        }
        let begun = Instant::now();
        let material = Material::draw(random::fill)?;
        let blank: Vec<Range<u64>> = probe::looked_at(inside_bytes);
        let writes = {
            let _alone = self.derive_alone(None, encryption.kdf.memory_kib())?;
            luks.plan_marked(passphrases.current(), &material, &blank, inside.as_ref(), noise()?)?
        };
        let derived_ms = begun.elapsed().as_millis();
        let _one_of_few = self.workers.take(identity::name(disk))?;
        let device = self.open(disk, Access::Exclusive)?;
        let expected = if unfinished { Surface::Unfinished } else { Surface::Blank };
        let surface = probe::probe(&device, &want.volume, want.zeroed)?;
        if device.size_bytes()? != disk.size_bytes {
            return Err(Cause::OtherDiskNow { disk: identity::name(disk) });
        }
        if surface != expected {
            return Err(Cause::NotBlankAnyMore { surface: format!("{surface:?}") });
        }
        format::execute(&device, Format::new(writes, &probe::mark(&want.volume)?), &self.stop)?;
        proto::info!(
            "{}: made a LUKS2 volume of {} bytes in {} ms (key: {derived_ms} ms)",
            want.volume,
            disk.size_bytes,
            begun.elapsed().as_millis()
        );
        Ok(())
    }

    /// Opens the LUKS volume on the disk: its mapping is there when this returns. Replaces the previous passphrase and mends its
    /// header on the way, both once a passphrase has opened it.
    pub(super) fn open_volume(&self, want: &StageRequest, disk: &Disk, passphrases: &Passphrases) -> Result<(), Cause> {
        let Some(encryption) = &want.encryption else { return Err(plan::Refusal::NoPassphrase.into()) };
        dm::crypt_version(&self.devices)?;
        let access = if disk.read_only { Access::ExclusiveRead } else { Access::Exclusive };
        // The table names the disk by its number, which is given to no other disk while this holds it.
        let _held = self.open_new(disk, Access::Shared)?;
        let (header, key) = {
            // device-mapper cannot take the disk while this holds it, and nobody else can write to it.
            let device = self.open_new(disk, access)?;
            let mut header = read_header(&device)?;
            // Said again, where it still is so.
            self.rotation_done(&want.volume);
            let key = self.unlock_and_rotate(&want.volume, encryption, disk, &device, &mut header, passphrases)?;
            if !disk.read_only {
                self.mend(&want.volume, &device, &header)?;
            }
            (header, key)
        };
        let name = mapping::name_of(&want.volume);
        let table = table(&header, disk, mapping::options(&header, encryption), &key)?;
        dm::create(&self.devices, &name, &header.dm_uuid(&name), &table, disk.read_only)?;
        proto::info!("{}: opened as {name}", want.volume);
        Ok(())
    }

    /// Makes both copies of the header say the same. Only of a volume that has opened: a copy behind the disk's beginning may be what a
    /// former volume left, and then what stands where the other copy would be is somebody's data.
    fn mend(&self, volume: &Volume, device: &Device, header: &Header) -> Result<(), Cause> {
        let Some(damage) = header.damage() else { return Ok(()) };
        proto::warn!("{volume}: one copy of its LUKS header is mended from the other: {damage}");
        let mut salt = [0; 64];
        random::fill(&mut salt)?;
        format::execute(device, header.heal(&salt)?, &self.stop).map(drop)
    }

    /// The volume key, by the current passphrase. By the previous one, where only that opens: then the current one gets a
    /// keyslot. Where both are given, keyslots of the previous one go, once the current one has been seen to open. What of that cannot be
    /// done is left to the next stage: the volume is open all the same.
    fn unlock_and_rotate(
        &self,
        volume: &Volume,
        encryption: &Encryption,
        disk: &Disk,
        device: &Device,
        header: &mut Header,
        passphrases: &Passphrases,
    ) -> Result<VolumeKey, Cause> {
        let refused = match (self.unlock(header, device, passphrases.current()), passphrases.previous()) {
            (Ok((number, key)), None) => {
                proto::debug!("{volume}: keyslot {number} opens");
                return Ok(key);
            }
            (Ok((number, key)), Some(previous)) => {
                match unchangeable(disk, header) {
                    Some(why) => {
                        self.outstanding(volume, &format!("a keyslot of the previous passphrase stays, where there is one: {why}"))
                    }
                    None => self.remove_previous(volume, device, header, number, previous)?,
                }
                return Ok(key);
            }
            (Err(refused @ (Cause::WrongPassphrase(_) | Cause::KeyslotCost(_))), Some(_)) => refused,
            (Err(cause), _) => return Err(cause),
        };
        let Some(previous) = passphrases.previous() else { return Err(refused) };
        // If neither opens, what is said is about the current one.
        let (old, key) = self.unlock(header, device, previous).map_err(|cause| match cause {
            Cause::WrongPassphrase(_) => Cause::WrongPassphrase(format!("{refused}; nor with encryption-passphrase-previous")),
            other => other,
        })?;
        match unchangeable(disk, header) {
            Some(why) => self.outstanding(volume, &format!("keyslot {old} opens with the previous passphrase only: {why}")),
            None => self.rotate(volume, encryption, device, header, (old, &key), [passphrases.current(), previous])?,
        }
        Ok(key)
    }

    /// Replaces the previous passphrase, which has just opened the keyslot `old`, by the current one.
    fn rotate(
        &self,
        volume: &Volume,
        encryption: &Encryption,
        device: &Device,
        header: &mut Header,
        (old, key): (u8, &VolumeKey),
        [current, previous]: [&[u8]; 2],
    ) -> Result<(), Cause> {
        let (number, writes) = match self.plan_keyslot(encryption, header, current, key) {
            Ok(planned) => planned,
            // Nothing is written yet.
            Err(why) if is_put_off(&why) => {
                self.outstanding(
                    volume,
                    &format!("keyslot {old} opens with the previous passphrase only, and the new one gets none: {why}"),
                );
                return Ok(());
            }
            Err(why) => return Err(why),
        };
        kill::inside("add-keyslot");
        format::execute(device, writes, &self.stop)?;
        kill::inside("keyslot-added");
        *header = read_header(device)?;
        match self.try_keyslot(header, device, number, current) {
            Ok(Some(opened)) if opened == *key => (),
            // Not waited for again: a call has no time for a second minute. The previous passphrase stays until the new one has been seen to open.
            Err(why @ (Cause::KdfBusy { .. } | Cause::KeyslotCost(_) | Cause::LuksRead(_))) => {
                self.outstanding(volume, &format!("keyslot {number} has the new passphrase, and could not be tried: {why}"));
                return Ok(());
            }
            Err(why) => return Err(why),
            Ok(Some(_) | None) => {
                return Err(Cause::Luks(format!("the new keyslot {number} does not open; the previous passphrase still does")));
            }
        }
        proto::info!("{volume}: the new passphrase has keyslot {number}");
        self.remove_previous(volume, device, header, number, previous)
    }

    /// Another keyslot for the passphrase: its number, and what makes it.
    fn plan_keyslot(
        &self,
        encryption: &Encryption,
        header: &Header,
        passphrase: &[u8],
        key: &VolumeKey,
    ) -> Result<(u8, Vec<Write>), Cause> {
        let drawn = Material::draw(random::fill)?;
        let new = NewKeyslot {
            passphrase,
            kdf: encryption.kdf,
            salt: drawn.keyslot_salt,
            stripes: drawn.stripes,
            header_salts: drawn.header_salts,
        };
        let _alone = self.derive_alone(None, encryption.kdf.memory_kib())?;
        Ok(header.add_keyslot(key, &new, noise()?)?)
    }

    /// Removes the keyslots that the previous passphrase opens; `keep` has just opened with the current one.
    fn remove_previous(&self, volume: &Volume, device: &Device, header: &mut Header, keep: u8, previous: &[u8]) -> Result<(), Cause> {
        let affordable = header.affordable();
        let (others, dear): (Vec<u8>, Vec<u8>) =
            header.keyslots.iter().map(|slot| slot.number).filter(|number| *number != keep).partition(|number| affordable.contains(number));
        if !dear.is_empty() {
            self.outstanding(
                volume,
                &format!("trying keyslots {dear:?} with the previous passphrase, too, would take more than a call may"),
            );
        }
        for number in others {
            match self.try_keyslot(header, device, number, previous) {
                Ok(Some(_)) => (),
                Ok(None) => continue,
                // What cannot be tried may be anybody's.
                Err(cause) if is_put_off(&cause) => {
                    self.outstanding(
                        volume,
                        &format!("keyslot {number} could not be tried with the previous passphrase, and stays: {cause}"),
                    );
                    // The others would each wait as long.
                    if matches!(cause, Cause::KdfBusy { .. }) {
                        break;
                    }
                    continue;
                }
                Err(cause) => return Err(cause),
            }
            let mut salts = [[0; 64]; 2];
            for salt in &mut salts {
                random::fill(salt)?;
            }
            let writes: Vec<Write> = header.remove_keyslot(number, &salts, noise()?)?;
            kill::inside("remove-keyslot");
            format::execute(device, writes, &self.stop)?;
            kill::inside("keyslot-removed");
            *header = read_header(device)?;
            proto::info!("{volume}: the previous passphrase's keyslot {number} is gone");
        }
        Ok(())
    }

    fn unlock(&self, header: &Header, device: &Device, passphrase: &[u8]) -> Result<(u8, VolumeKey), Cause> {
        header.unlock(passphrase, &mut |offset, buffer| read(device, offset, buffer), |slot| self.admit(slot))
    }

    fn try_keyslot(&self, header: &Header, device: &Device, number: u8, passphrase: &[u8]) -> Result<Option<VolumeKey>, Cause> {
        header.unlock_keyslot(number, passphrase, &mut |offset, buffer| read(device, offset, buffer), |slot| self.admit(slot))
    }

    /// The place of the one key derivation for one keyslot, whose bytes have been read. The inner error: there is no memory for this one.
    fn admit(&self, slot: &Keyslot) -> Result<Result<Alone<'_>, Cause>, Cause> {
        match self.derive_alone(Some(slot.number), slot.kdf.memory_kib()) {
            Err(why @ Cause::KeyslotCost(_)) => Ok(Err(why)),
            taken => taken.map(Ok),
        }
    }

    /// The place of the one key derivation, where there is memory for it. No disk is read or written by who holds it.
    pub(super) fn derive_alone(&self, keyslot: Option<u8>, needs_kib: u64) -> Result<Alone<'_>, Cause> {
        let deriving = Deriving::begin();
        let alone = self.kdf.take_to_work(self.kdf.patience()).map_err(busy)?;
        let room = self.memory()?;
        if needs_kib <= room.free_kib {
            return Ok((alone, deriving));
        }
        let why = match keyslot {
            Some(keyslot) => luks::Error::KeyslotMemory { keyslot, needs_kib, limit_kib: room.free_kib }.to_string(),
            None => format!(
                "the new keyslot needs {} MiB of memory, the pod's limit leaves {} MiB: raise the node container's memory limit, or choose less \
                 with luksKdfMemory, or luksKdf pbkdf2",
                needs_kib.div_ceil(1024),
                room.free_kib / 1024
            ),
        };
        Err(Cause::KeyslotCost(format!("{why}; {room}")))
    }

    /// The volume is open, by a passphrase that is to go: that is said, and counted, until it is done.
    fn outstanding(&self, volume: &Volume, why: &str) {
        self.rotations.set(&volume.serial, true, OUTSTANDING);
        proto::warn!("{volume}: the replacement of its passphrase is outstanding, and tried again by the next stage: {why}");
    }

    /// It is not, or nobody has the volume here any more.
    pub(super) fn rotation_done(&self, volume: &Volume) {
        self.rotations.set(&volume.serial, false, OUTSTANDING);
    }

    /// At the start: of what an agent before this one has written down, what is still so. It can be so of a volume that is open only, and none
    /// is opened by another than us while it is so.
    pub fn recall_rotations(&self) {
        match self.opened_volumes() {
            Ok(open) => self.rotations.keep_only(&open.iter().map(String::as_str).collect::<Vec<_>>(), OUTSTANDING),
            Err(error) => proto::warn!("{OUTSTANDING} are not known: {error}"),
        }
    }

    /// Volumes staged here whose passphrase is still to be replaced; `None`: not known.
    #[must_use]
    pub fn rotations_outstanding(&self) -> Option<usize> {
        self.rotations.count()
    }

    /// Lets the mapping have all of its disk, while it is in use. The key is the live one where the kernel gives it out again,
    /// else the passphrase's.
    pub(super) fn grow_mapping(&self, volume: &Volume, medium: &Medium, passphrases: Option<&Passphrases>) -> Result<(), Cause> {
        let Some(live) = &medium.mapping else { return Ok(()) };
        let device = self.open(&medium.disk, Access::Shared)?;
        let header = read_header(&device)?;
        let sectors = mapping::length(&header, &medium.disk)?;
        // Another table over the same data would show, and write, something else.
        let is_discarding = live.crypt().is_some_and(|crypt| crypt.options.iter().any(|option| option == mapping::DISCARDS));
        let same = Encryption { kdf: luks::Kdf::DEFAULT, discards: is_discarding };
        if let Some(what) = mapping::difference(&header, &medium.disk, &same, live) {
            return Err(plan::Refusal::StrangeMapping { what: format!("{} is over it, and {what}", live.name) }.into());
        }
        match dm::resize(&self.devices, live, sectors) {
            Err(refused) if refused.error.errno == Errno::NOKEY => {
                let Some(passphrases) = passphrases else { return Err(Cause::NoKey) };
                let (_, key) =
                    self.unlock(&header, &device, passphrases.current()).or_else(|cause| match (cause, passphrases.previous()) {
                        (Cause::WrongPassphrase(_), Some(previous)) => self.unlock(&header, &device, previous),
                        (cause, _) => Err(cause),
                    })?;
                let options = live.crypt().map(|crypt| crypt.options.clone()).unwrap_or_default();
                dm::replace(&self.devices, live, &table(&header, &medium.disk, options, &key)?)?;
            }
            resized => resized?,
        }
        proto::info!("{volume}: {} has grown from {} to {sectors} sectors", live.name, live.length_sectors());
        Ok(())
    }
}

/// A volume's table with all of the disk behind the header.
fn table<'a>(header: &'a Header, disk: &Disk, options: Vec<String>, key: &'a VolumeKey) -> Result<CryptTable<'a>, Cause> {
    Ok(CryptTable {
        cipher: &header.segment.cipher,
        key: key.bytes(),
        iv_offset: header.segment.iv_tweak,
        backing: disk.dev,
        offset_sectors: header.segment.offset_bytes / SECTOR_BYTES,
        length_sectors: mapping::length(header, disk)?,
        options,
    })
}

/// What looks like ciphertext, out of a key that nobody keeps.
fn noise() -> Result<impl luks::Noise, Cause> {
    let mut key = Zeroizing::new([0; NOISE_KEY_BYTES]);
    random::fill(key.as_mut_slice())?;
    Ok(Material::noise(&key)?)
}

/// Why no keyslot of it is written; `None`: it can be.
fn unchangeable(disk: &Disk, header: &Header) -> Option<&'static str> {
    match header.version {
        _ if disk.read_only => Some("the disk is read-only; stage the volume writable once"),
        luks::Version::Luks1 => Some("its header is LUKS1, which this driver does not change; use `cryptsetup luksChangeKey`"),
        luks::Version::Luks2 => None,
    }
}

/// Whether the volume, which is open already, is staged all the same and the rest of the replacement left to the next stage.
pub(super) fn is_put_off(cause: &Cause) -> bool {
    matches!(cause, Cause::KeyslotCost(_) | Cause::Luks(_) | Cause::LuksRead(_) | Cause::Geometry(_) | Cause::KdfBusy { .. })
}

/// All places being taken has another reason here.
pub(super) fn busy(cause: Cause) -> Cause {
    match cause {
        Cause::Crowded { waited, .. } => Cause::KdfBusy { waited },
        other => other,
    }
}

#[cfg(test)]
mod tests;
