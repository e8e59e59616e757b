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

use super::mapping::{self, Medium, read, read_header};
use super::{Node, Slot};
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
/// Random bytes behind a [`luks::Format`]'s noise.
const NOISE_KEY_BYTES: usize = 64;

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
        let inside_bytes = luks.segment().mapping_sectors(disk.size_bytes)? * SECTOR_BYTES;
        if let (MayFormat::May(options), Shown::Filesystem(_)) = (&want.format, &want.access) {
            // What does not fit inside is refused before the disk is touched.
            format::check(inside_bytes, &want.volume, *options, &topology)?;
        }
        let begun = Instant::now();
        let material = Material::draw(random::fill)?;
        let blank: Vec<Range<u64>> = probe::looked_at(inside_bytes);
        let writes = {
            let _alone = self.derive_alone(encryption.kdf.memory_kib())?;
            luks.plan(passphrases.current(), &material, &blank, noise()?)?
        };
        let derived_ms = begun.elapsed().as_millis();
        let _one_of_few = self.workers.take()?;
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
    /// keyslot. Where both are given, keyslots of the previous one go, once the current one has been seen to open.
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
                if !disk.read_only && header.version == luks::Version::Luks2 {
                    self.remove_previous(volume, device, header, number, previous)?;
                }
                return Ok(key);
            }
            (Err(refused @ (Cause::WrongPassphrase(_) | Cause::KeyslotMemory(_))), Some(_)) => refused,
            (Err(cause), _) => return Err(cause),
        };
        let Some(previous) = passphrases.previous() else { return Err(refused) };
        // If neither opens, what is said is about the current one.
        let (old, key) = self.unlock(header, device, previous).map_err(|cause| match cause {
            Cause::WrongPassphrase(_) => Cause::WrongPassphrase(format!("{refused}; nor with encryption-passphrase-previous")),
            other => other,
        })?;
        if disk.read_only || header.version == luks::Version::Luks1 {
            proto::warn!(
                "{volume}: keyslot {old} opens with the previous passphrase only, and stays: the disk is read-only, or its header LUKS1"
            );
            return Ok(key);
        }
        let number = self.add_keyslot(encryption, device, header, passphrases.current(), &key)?;
        proto::info!("{volume}: the new passphrase has keyslot {number}");
        self.remove_previous(volume, device, header, number, previous)?;
        Ok(key)
    }

    /// Gives the passphrase a keyslot, and opens the volume by it before it answers its number.
    fn add_keyslot(
        &self,
        encryption: &Encryption,
        device: &Device,
        header: &mut Header,
        passphrase: &[u8],
        key: &VolumeKey,
    ) -> Result<u8, Cause> {
        let drawn = Material::draw(random::fill)?;
        let new = NewKeyslot {
            passphrase,
            kdf: encryption.kdf,
            salt: drawn.keyslot_salt,
            stripes: drawn.stripes,
            header_salts: drawn.header_salts,
        };
        let (number, writes) = {
            let _alone = self.derive_alone(encryption.kdf.memory_kib())?;
            header.add_keyslot(key, &new, noise()?)?
        };
        kill::inside("add-keyslot");
        format::execute(device, writes, &self.stop)?;
        kill::inside("keyslot-added");
        *header = read_header(device)?;
        match self.try_keyslot(header, device, number, passphrase)? {
            Some(opened) if opened == *key => Ok(number),
            Some(_) | None => Err(Cause::Luks(format!("the new keyslot {number} does not open; the previous passphrase still does"))),
        }
    }

    /// Removes the keyslots that the previous passphrase opens; `keep` has just opened with the current one.
    fn remove_previous(&self, volume: &Volume, device: &Device, header: &mut Header, keep: u8, previous: &[u8]) -> Result<(), Cause> {
        let others: Vec<u8> = header.keyslots.iter().map(|slot: &Keyslot| slot.number).filter(|number| *number != keep).collect();
        for number in others {
            match self.try_keyslot(header, device, number, previous) {
                Ok(Some(_)) => (),
                Ok(None) => continue,
                // What cannot be tried may be anybody's.
                Err(cause @ (Cause::KeyslotMemory(_) | Cause::Luks(_))) => {
                    proto::warn!("{volume}: keyslot {number} could not be tried with the previous passphrase, and stays: {cause}");
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
        let _alone = self.kdf.take().map_err(busy)?;
        let room = self.memory()?;
        header.unlock(passphrase, room.free_kib, &mut |offset, buffer| read(device, offset, buffer)).map_err(|error| {
            match Cause::from(error) {
                Cause::KeyslotMemory(why) => Cause::KeyslotMemory(format!("{why}; {room}")),
                cause => cause,
            }
        })
    }

    fn try_keyslot(&self, header: &Header, device: &Device, number: u8, passphrase: &[u8]) -> Result<Option<VolumeKey>, Cause> {
        let _alone = self.derive_alone(header.keyslot_memory_kib(number).unwrap_or_default())?;
        Ok(header.unlock_keyslot(number, passphrase, &mut |offset, buffer| read(device, offset, buffer))?)
    }

    /// The place of the one key derivation, where there is memory for it.
    pub(super) fn derive_alone(&self, needs_kib: u64) -> Result<Slot<'_>, Cause> {
        let alone = self.kdf.take().map_err(busy)?;
        let room = self.memory()?;
        if needs_kib <= room.free_kib {
            return Ok(alone);
        }
        Err(Cause::KeyslotMemory(format!(
            "the keyslot needs {} MiB of memory, the pod's limit leaves {} MiB: raise the node container's memory limit, or choose less with \
             luksKdfMemory, or luksKdf pbkdf2; {room}",
            needs_kib.div_ceil(1024),
            room.free_kib / 1024
        )))
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

/// All places being taken has another reason here.
pub(super) fn busy(cause: Cause) -> Cause {
    match cause {
        Cause::Crowded { waited } => Cause::KdfBusy { waited },
        other => other,
    }
}
