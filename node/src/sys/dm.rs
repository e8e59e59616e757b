//! Device-mapper by its ioctls: dm-crypt mappings listed, made, grown and removed.
//!
//! Interface: include/uapi/linux/dm-ioctl.h and drivers/md/dm-ioctl.c. A mapping that cannot be finished is taken away again
//! (create or undo). A key is given to the kernel's keyrings after DEV_CREATE, so that what a sudden end leaves is found by the
//! mapping, and taken back after DEV_REMOVE: a mapping that cannot be removed can still be grown. What a sudden end leaves there,
//! the next start finds ([`forget_keys_of_gone`]).

mod call;
mod message;
mod node;
mod table;

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;

use self::call::{ANSWER_BYTES, Nr, ask, call, message, status};
use self::message::{Message, Which};
use super::keyring;
use super::kmsg;
use super::{Dev, Error};
use crate::kill;

#[cfg(fuzzing)]
pub use call::fuzz;
pub use node::Node;
pub use table::{Crypt, CryptTable, HexKey, Key};

/// `DM_UDEV_PRIMARY_SOURCE_FLAG` in the upper half: udev's rules for device-mapper act on such events alone.
const UDEV_COOKIE: u32 = 0x0040_0000;
/// Whoever opens a half-made mapping (udev's rules look at every new device) has done so within milliseconds.
const UNDO_TRIES: u32 = 40;
/// Between two of them.
const UNDO_EVERY: Duration = Duration::from_millis(25);
/// Stands for a table that is longer than any that could be ours.
pub const LONG_TABLE: &str = "(a table longer than 1 MiB)";
/// The target's name, and its module's: dm-crypt.
const CRYPT: &str = "crypt";

/// A mapping as the kernel has it now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// As in `/dev/mapper/<name>`.
    pub name: String,
    /// `CRYPT-LUKS2-<32 hex>-<name>` for cryptsetup's and ours; may be empty.
    pub uuid: String,
    /// Its own number.
    pub dev: Dev,
    /// Mounts and openers.
    pub open_count: u32,
    /// It holds all I/O back.
    pub is_suspended: bool,
    /// It refuses writes.
    pub read_only: bool,
    /// A table is loaded that a resume would put in force.
    pub has_other_table: bool,
    /// Its table in force. Empty: there is none yet, it was left half made. One that is too long to be read, which no table of
    /// dm-crypt alone is, is a single target of the kind [`LONG_TABLE`].
    pub targets: Vec<Target>,
}

/// A part of a mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Where it begins, in sectors of 512 bytes.
    pub start_sectors: u64,
    /// How long it is.
    pub length_sectors: u64,
    /// `crypt`, `linear`, …
    pub kind: String,
    /// What a `crypt` target says, as far as it is understood.
    pub crypt: Option<Crypt>,
}

impl Mapping {
    /// Its dm-crypt target, where that is all of it.
    #[must_use]
    pub fn crypt(&self) -> Option<&Crypt> {
        match self.targets.as_slice() {
            [Target { start_sectors: 0, crypt: Some(crypt), .. }] => Some(crypt),
            _ => None,
        }
    }

    /// Whether it was created, and has no table yet: what a sudden end leaves.
    #[must_use]
    pub fn is_half_made(&self) -> bool {
        self.targets.is_empty()
    }

    /// Its size in sectors of 512 bytes.
    #[must_use]
    pub fn length_sectors(&self) -> u64 {
        self.targets.last().map_or(0, |last| last.start_sectors.saturating_add(last.length_sectors))
    }

    /// The UUID of the LUKS header that it was opened by, with its dashes.
    #[must_use]
    pub fn luks_uuid(&self) -> Option<String> {
        luks_uuid(&self.uuid)
    }
}

fn luks_uuid(dm_uuid: &str) -> Option<String> {
    let rest = dm_uuid.strip_prefix("CRYPT-LUKS")?.get(1..)?.strip_prefix('-')?;
    let (hex, _name) = rest.split_once('-')?;
    if hex.len() != 32 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
    Some([part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32)].join("-"))
}

/// The kernel refused a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The call that failed, on what, and the errno.
    pub error: Error,
    /// The lines of the kernel's log about it.
    pub said: Vec<String>,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.error)?;
        if !self.said.is_empty() {
            write!(f, "; the kernel says: {}", self.said.join(" / "))?;
        }
        Ok(())
    }
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self { error, said: Vec::new() }
    }
}

/// What the kernel lacks for encryption.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Missing {
    /// device-mapper itself.
    DeviceMapper(Error),
    /// Its target for encryption.
    Crypt(Error),
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, module, error) = match self {
            Self::DeviceMapper(error) => ("no device-mapper", "dm_mod", error),
            Self::Crypt(error) => ("no dm-crypt", "dm_crypt", error),
        };
        write!(
            f,
            "this node's kernel has {what}: load the module {module} on the node (modprobe {module}; /etc/modules-load.d or \
             Talos' machine.kernel.modules for the next boots), then this call is repeated by itself ({error})"
        )
    }
}

/// The version of the kernel's dm-crypt: that it is there at all, its module loaded if need be.
///
/// # Errors
/// What is missing, in a sentence that says what to do.
pub fn crypt_version(devices: &Path) -> Result<[u32; 3], Missing> {
    let control = node::control(devices).map_err(Missing::DeviceMapper)?;
    let subject = Path::new(CRYPT);
    let asked = || -> Result<Option<[u32; 3]>, Error> {
        let mut message = message(Which::Name(CRYPT), 0, 0, ANSWER_BYTES, "ioctl(DM_GET_TARGET_VERSION)", subject)?;
        call(&control, Nr::GetTargetVersion, subject, &mut message)?;
        Ok(message.version())
    };
    let odd = Error { call: "ioctl(DM_GET_TARGET_VERSION)", subject: subject.into(), errno: Errno::BADMSG };
    asked().and_then(|version| version.ok_or(odd)).map_err(Missing::Crypt)
}

/// All mappings there are, anybody's. Loads no module: without device-mapper there is none.
///
/// # Errors
/// The kernel's. A mapping that goes away meanwhile is left out.
pub fn mappings(devices: &Path) -> Result<Vec<Mapping>, Error> {
    if !node::is_loaded()? {
        return Ok(Vec::new());
    }
    let control = node::control(devices)?;
    let list = ask(&control, Nr::ListDevices, Which::None, 0, &devices.join("mapper"))?;
    let mut mappings = Vec::new();
    for dev in list.devices() {
        mappings.extend(status(&control, Which::Dev(dev), &devices.join("mapper"))?);
    }
    Ok(mappings)
}

/// The mapping of this name; `None`: there is none.
///
/// # Errors
/// The kernel's.
pub fn mapping(devices: &Path, name: &str) -> Result<Option<Mapping>, Error> {
    if !node::is_loaded()? {
        return Ok(None);
    }
    status(&node::control(devices)?, Which::Name(name), &devices.join("mapper").join(name))
}

/// Makes a mapping. Its key goes to the kernel by a keyring, or in the table itself where keyrings are refused
/// ([`Mapping::crypt`] of the answer shows which). Nothing is left of one that could not be made.
///
/// # Errors
/// EEXIST: name or UUID are taken. EBUSY: the device below is mounted, or held by something else. EINVAL with the kernel's
/// words: the device is smaller than the table, or the cipher is unknown.
pub fn create(devices: &Path, name: &str, uuid: &str, table: &CryptTable<'_>, read_only: bool) -> Result<Mapping, Refused> {
    let control = node::control(devices)?;
    let subject = devices.join("mapper").join(name);
    let which = Which::New { name, uuid };
    let mut created = message(which, 0, 0, 0, Nr::DevCreate.call(), &subject)?;
    call(&control, Nr::DevCreate, &subject, &mut created).map_err(|error| match error.errno {
        // dm_hash_insert's word for a name or UUID that is taken.
        Errno::BUSY => Error { errno: Errno::EXIST, ..error },
        _ => error,
    })?;
    let it = It { control: &control, devices, subject: &subject, name, uuid, dev: created.header().dev };
    kill::inside("created");
    let made = || -> Result<Mapping, Refused> {
        it.put_in_force(|| it.load_with_key(table, read_only))?;
        let gone = Error { call: Nr::TableStatus.call(), subject: subject.clone(), errno: Errno::NXIO };
        Ok(status(&control, Which::Uuid(uuid), &subject)?.ok_or(gone)?)
    };
    made().inspect_err(|_| it.undo())
}

/// Puts another table in force, mounted or not: how a mapping grows when its key is at hand.
///
/// # Errors
/// The kernel's; the old table stays in force.
pub fn replace(devices: &Path, mapping: &Mapping, table: &CryptTable<'_>) -> Result<(), Refused> {
    let (control, subject) = (node::control(devices)?, devices.join("mapper").join(&mapping.name));
    let it = It::of(&control, devices, &subject, mapping);
    it.exchange(|| it.load_with_key(table, mapping.read_only))
}

/// Gives a mapping another length with the key that it has: shown in its table, or ours in the kernel's keyrings.
///
/// # Errors
/// ENOKEY: the key is a kernel key that is no longer to be had; the passphrase is needed. Else the kernel's; the old table
/// stays in force.
pub fn resize(devices: &Path, mapping: &Mapping, length_sectors: u64) -> Result<(), Refused> {
    let (control, subject) = (node::control(devices)?, devices.join("mapper").join(&mapping.name));
    let it = It::of(&control, devices, &subject, mapping);
    let Some(crypt) = mapping.crypt() else { return Err(it.error(Nr::TableLoad, Errno::INVAL).into()) };
    // Held until the table is loaded: dm-crypt finds it by this thread.
    let _held = match &crypt.key {
        Key::Hex(_) => None,
        Key::Keyring { .. } => Some(keyring::find(&mapping.uuid)?),
    };
    it.exchange(|| it.load(&crypt.print(), length_sectors, mapping.read_only))
}

/// Ends a suspension: what a sudden end in the middle of an exchange of tables, or somebody else, has left. The table in force
/// stays so: one that is loaded beside it, which a resume would put in its place, is thrown away.
///
/// # Errors
/// The kernel's.
pub fn resume(devices: &Path, mapping: &Mapping) -> Result<(), Error> {
    let (control, subject) = (node::control(devices)?, devices.join("mapper").join(&mapping.name));
    let it = It::of(&control, devices, &subject, mapping);
    if mapping.has_other_table {
        it.plainly(Nr::TableClear, 0)?;
    }
    it.resume()
}

/// Takes a mapping away, its key and the node that we made with it: one try. One that is gone already is no error.
///
/// # Errors
/// EBUSY: something still holds it. Ask again when [`Mapping::open_count`] is 0.
pub fn remove(devices: &Path, mapping: &Mapping) -> Result<(), Error> {
    let (control, subject) = (node::control(devices)?, devices.join("mapper").join(&mapping.name));
    It::of(&control, devices, &subject, mapping).remove()?;
    kill::inside("removed");
    // Where keyrings are refused, there is no key of ours.
    let _ = keyring::forget(&mapping.uuid);
    kill::inside("key-forgotten");
    node::forget(devices, &mapping.name, mapping.dev)
}

/// Where the mapping can be opened, below `devices` (`/dev`): made where udev makes no node.
///
/// # Errors
/// The node cannot be made.
pub fn node(devices: &Path, mapping: &Mapping) -> Result<Node, Error> {
    node::of(devices, &mapping.name, mapping.dev)
}

/// Takes keys of ours back whose mappings are gone: somebody else has closed them.
///
/// # Errors
/// The mappings cannot be read.
pub fn forget_keys_of_gone(devices: &Path) -> Result<(), Error> {
    // The keys first: one that comes later has its mapping already.
    let left = keyring::left().unwrap_or_default();
    if left.is_empty() {
        return Ok(());
    }
    let there = mappings(devices)?;
    for uuid in left.iter().filter(|uuid| there.iter().all(|mapping| mapping.uuid != **uuid)) {
        let _ = keyring::forget(uuid);
    }
    Ok(())
}

/// One mapping under work.
struct It<'a> {
    control: &'a File,
    devices: &'a Path,
    subject: &'a PathBuf,
    name: &'a str,
    uuid: &'a str,
    dev: Dev,
}

impl<'a> It<'a> {
    fn of(control: &'a File, devices: &'a Path, subject: &'a PathBuf, mapping: &'a Mapping) -> Self {
        Self { control, devices, subject, name: &mapping.name, uuid: &mapping.uuid, dev: mapping.dev }
    }

    /// By UUID, so that a namesake that came meanwhile is not meant.
    fn which(&self) -> Which<'a> {
        if self.uuid.is_empty() { Which::Name(self.name) } else { Which::Uuid(self.uuid) }
    }

    fn error(&self, nr: Nr, errno: Errno) -> Error {
        Error { call: nr.call(), subject: self.subject.clone(), errno }
    }

    fn load_with_key(&self, table: &CryptTable<'_>, read_only: bool) -> Result<(), Error> {
        let size_bytes = u32::try_from(table.key.len()).unwrap_or(u32::MAX);
        let odd = || self.error(Nr::TableLoad, Errno::INVAL);
        // cryptsetup's own name for it, so that its resize knows the mapping for its own.
        let description = match luks_uuid(self.uuid) {
            Some(uuid) => format!("cryptsetup:{uuid}-d0"),
            None => format!("proxmox-csi:{}", self.uuid),
        };
        // Held until the table is loaded: dm-crypt finds it by this thread.
        if let Ok(_held) = keyring::hold(self.uuid, &description, table.key) {
            kill::inside("key-held");
            let key = Key::Keyring { size_bytes, kind: "logon".into(), description };
            match self.load(&table.print(&key).ok_or_else(odd)?, table.length_sectors, read_only) {
                // A kernel whose dm-crypt may not look keys up.
                Err(error) if matches!(error.errno, Errno::NOKEY | Errno::ACCESS | Errno::PERM) => {}
                loaded => return loaded,
            }
        }
        let _ = keyring::forget(self.uuid);
        let key = Key::Hex(HexKey::of(table.key));
        self.load(&table.print(&key).ok_or_else(odd)?, table.length_sectors, read_only)
    }

    fn load(&self, params: &str, length_sectors: u64, read_only: bool) -> Result<(), Error> {
        let flags = if read_only { message::READONLY } else { 0 };
        let loading = Message::with_target(self.which(), flags, length_sectors, CRYPT, params);
        let mut loading = loading.ok_or_else(|| self.error(Nr::TableLoad, Errno::INVAL))?;
        call(self.control, Nr::TableLoad, self.subject, &mut loading)
    }

    /// Puts the loaded table in force, and ends a suspension.
    fn resume(&self) -> Result<(), Error> {
        kill::called("resume");
        self.plainly(Nr::DevSuspend, UDEV_COOKIE)
    }

    /// `loads` a table and puts it in force. The kernel's reasons may come with either: a table that is too large is found out
    /// when it is to be put in force.
    fn put_in_force(&self, loads: impl FnOnce() -> Result<(), Error>) -> Result<(), Refused> {
        let mut log = kmsg::Log::from_now();
        let loaded = loads().inspect(|()| kill::inside("loaded"));
        loaded.and_then(|()| self.resume()).map_err(|error| {
            // `device-mapper: table: 253:0: crypt: …`
            let mark = format!(" {}: ", self.dev);
            Refused { error, said: log.lines_about("device-mapper").into_iter().filter(|line| line.contains(&mark)).collect() }
        })
    }

    /// The same for a mapping in use, which goes on with its old table where the new one is refused: do_resume (drivers/md/dm-ioctl.c)
    /// suspends it for the exchange, and leaves it suspended when that fails.
    fn exchange(&self, loads: impl FnOnce() -> Result<(), Error>) -> Result<(), Refused> {
        self.put_in_force(loads).inspect_err(|_| {
            let _ = self.plainly(Nr::TableClear, 0);
            let _ = self.resume();
        })
    }

    /// A call without data.
    fn plainly(&self, nr: Nr, event_nr: u32) -> Result<(), Error> {
        let mut message = message(self.which(), 0, event_nr, 0, nr.call(), self.subject)?;
        call(self.control, nr, self.subject, &mut message)
    }

    fn remove(&self) -> Result<(), Error> {
        kill::called("remove");
        match self.plainly(Nr::DevRemove, UDEV_COOKIE) {
            Err(error) if error.errno == Errno::NXIO => Ok(()),
            done => done,
        }
    }

    /// Of a mapping that we have just created. What stays all the same is found half made by the next call.
    fn undo(&self) {
        let _ = keyring::forget(self.uuid);
        for _ in 0..UNDO_TRIES {
            match self.remove() {
                Err(error) if error.errno == Errno::BUSY => std::thread::park_timeout(UNDO_EVERY),
                _ => break,
            }
        }
        let _ = node::forget(self.devices, self.name, self.dev);
    }
}

#[cfg(test)]
mod kernel;
#[cfg(test)]
mod tests;
