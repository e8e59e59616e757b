//! Why a LUKS volume was not made, opened or changed. No sentence holds anything of a passphrase or key.

use std::fmt;

/// See [`fmt::Display`] for the sentences; the caller adds volume and step.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// Neither header copy is there or whole.
    NoHeader {
        /// What is wrong with the copy at 0.
        primary: String,
        /// What is wrong with the second copy.
        secondary: String,
    },
    /// The header is whole and says something that cannot be.
    Metadata(String),
    /// The header is whole and wants something that we do not do.
    Unsupported(String),
    /// A read failed.
    Read {
        /// Bytes from the start of the device.
        offset_bytes: u64,
        /// Bytes.
        length: usize,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// No keyslot opens with this passphrase. Not to be retried for ever.
    WrongPassphrase {
        /// Keyslots tried.
        tried: usize,
        /// Keyslots that could not be tried, each with its reason.
        skipped: Vec<String>,
    },
    /// A keyslot's derivation needs more memory than there is; nothing was allocated.
    KeyslotMemory {
        /// Its number.
        keyslot: u8,
        /// What its header says.
        needs_kib: u64,
        /// What the caller allows.
        limit_kib: u64,
    },
    /// No keyslot that was tried opens, and trying all would cost more than one passphrase may. Nothing but the tried ones was computed.
    KeyslotWork {
        /// Keyslots tried.
        tried: usize,
        /// Keyslots not tried.
        left_out: usize,
        /// Work of all of them, in KiB that Argon2 fills.
        all_kib: u64,
        /// What one passphrase may cost.
        limit_kib: u64,
    },
    /// The allocator refused.
    Allocation {
        /// What was asked for.
        needs_kib: u64,
    },
    /// A parameter outside its range.
    Range {
        /// Its name, with its unit.
        parameter: &'static str,
        /// As given.
        value: u64,
        /// Smallest.
        min: u64,
        /// Largest.
        max: u64,
    },
    /// The device is too small for what the header says, or for a header.
    DeviceTooSmall {
        /// Of the device.
        size_bytes: u64,
        /// At least.
        needs_bytes: u64,
    },
    /// No free keyslot number, area, or room in the metadata area.
    NoRoom(&'static str),
    /// The only keyslot is never removed.
    LastKeyslot(u8),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoHeader { primary, secondary } => {
                write!(
                    f,
                    "no usable LUKS header: primary: {primary}; secondary: {secondary} (restore it with `cryptsetup luksHeaderRestore`)"
                )
            }
            Self::Metadata(what) => write!(f, "LUKS metadata: {what}"),
            Self::Unsupported(what) => write!(f, "LUKS volume asks for what this driver does not do: {what}"),
            Self::Read { offset_bytes, length, source } => write!(f, "read {length} bytes at {offset_bytes}: {source}"),
            Self::WrongPassphrase { tried, skipped } => {
                write!(f, "no keyslot opens with this passphrase ({tried} tried")?;
                for why in skipped {
                    write!(f, "; {why}")?;
                }
                write!(f, "); the secret's encryption-passphrase must be the very bytes the volume was made with, newline included")
            }
            Self::KeyslotMemory { keyslot, needs_kib, limit_kib } => write!(
                f,
                "keyslot {keyslot} needs {} MiB of memory, the pod's limit leaves {} MiB: raise the node container's memory limit by {} MiB, or give the volume \
                 a smaller keyslot (`cryptsetup luksConvertKey --pbkdf-memory 65536`)",
                needs_kib.div_ceil(1024),
                limit_kib / 1024,
                needs_kib.saturating_sub(*limit_kib).div_ceil(1024)
            ),
            Self::KeyslotWork { tried, left_out, all_kib, limit_kib } => write!(
                f,
                "{tried} of its {} keyslots were tried and do not open with this passphrase; all of them would take as long as {} GiB of Argon2's memory \
                 passes, one call may take {} GiB (some minutes of a core): remove those that nobody needs (`cryptsetup luksKillSlot`), or prefer the right \
                 one (`cryptsetup config --priority prefer`)",
                tried + left_out,
                all_kib.div_ceil(1 << 20),
                limit_kib >> 20
            ),
            Self::Allocation { needs_kib } => {
                write!(f, "{} MiB of memory for the keyslot were refused by the kernel", needs_kib.div_ceil(1024))
            }
            Self::Range { parameter, value, min, max } => write!(f, "{parameter} is {value}, must be {min} to {max}"),
            Self::DeviceTooSmall { size_bytes, needs_bytes } => {
                write!(f, "the device has {size_bytes} bytes, the LUKS volume needs at least {needs_bytes}")
            }
            Self::NoRoom(what) => write!(f, "the LUKS header has no room for another keyslot: {what}"),
            Self::LastKeyslot(number) => write!(f, "keyslot {number} is the only one that can open the volume; it stays"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Read { source, .. } => Some(source),
            _ => None,
        }
    }
}
