//! How much of a storage may be used, and how much may be promised on one that is thin. Pure.

use std::collections::BTreeMap;
use std::fmt;

use crate::pve::api::Storage;

/// `storageOvercommit` at most: a hundred times the storage is no limit any more.
const MAX_OVERCOMMIT_PERCENT: u64 = 10_000;

/// What a class says of the room on its storage: `storageReserve` and `storageOvercommit`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Room {
    reserve: Reserve,
    /// All volumes' sizes together may be so many hundredths of the storage.
    overcommit_percent: Option<u64>,
}

/// What stays free.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Reserve {
    #[default]
    Nothing,
    Percent(u64),
    Bytes(u64),
}

/// Region, Proxmox node and storage → the sizes of all volumes there together, in bytes.
#[derive(Debug, Clone, Default)]
pub struct Promised(BTreeMap<(String, String, String), u64>);

impl Promised {
    /// Notes the sum of one storage on one node.
    pub fn note(&mut self, region: &str, storage: &Storage, bytes: u64) {
        self.0.insert(key(region, storage), bytes);
    }

    /// That sum; what was not asked about is promised to nobody.
    #[must_use]
    pub fn of(&self, region: &str, storage: &Storage) -> u64 {
        self.0.get(&key(region, storage)).copied().unwrap_or(0)
    }
}

fn key(region: &str, storage: &Storage) -> (String, String, String) {
    (region.into(), storage.host.clone(), storage.storage.clone())
}

impl Room {
    /// From the class: `10%` or a Kubernetes quantity (`20Gi`), and a ratio (`1.5`).
    ///
    /// # Errors
    /// A sentence with the key, the value and what would be right.
    pub fn read(reserve: Option<&str>, overcommit: Option<&str>) -> Result<Self, String> {
        let reserve = match reserve {
            None => Reserve::Nothing,
            Some(text) => reserve_of(text).ok_or_else(|| {
                format!("parameter storageReserve {text:?} should be a part of the storage below 100% (\"10%\") or a size (\"20Gi\")")
            })?,
        };
        let overcommit_percent = overcommit.map(|text| {
            let percent = hundredths(text).filter(|percent| (100..=MAX_OVERCOMMIT_PERCENT).contains(percent));
            percent.ok_or_else(|| {
                format!("parameter storageOvercommit {text:?} should be a ratio from 1 to 100 with two decimals at most (\"1.5\")")
            })
        });
        Ok(Self { reserve, overcommit_percent: overcommit_percent.transpose()? })
    }

    /// Whether the sizes of what is there have to be known.
    #[must_use]
    pub fn is_overcommitting(&self) -> bool {
        self.overcommit_percent.is_some()
    }

    /// What a new volume may have.
    #[must_use]
    pub fn left_bytes(&self, storage: &Storage, promised_bytes: u64) -> u64 {
        let free = storage.total_bytes.saturating_sub(storage.used_bytes);
        let left = free.saturating_sub(self.reserved_bytes(storage));
        match self.overcommit_percent {
            None => left,
            // What is really full takes nothing, whatever might be promised.
            Some(_) if left == 0 => 0,
            Some(_) => self.most_bytes(storage).saturating_sub(promised_bytes),
        }
    }

    /// What a volume could have if nothing else were there.
    #[must_use]
    pub fn most_bytes(&self, storage: &Storage) -> u64 {
        match self.overcommit_percent {
            None => storage.total_bytes.saturating_sub(self.reserved_bytes(storage)),
            Some(percent) => part(storage.total_bytes, percent),
        }
    }

    fn reserved_bytes(&self, storage: &Storage) -> u64 {
        match self.reserve {
            Reserve::Nothing => 0,
            Reserve::Percent(percent) => part(storage.total_bytes, percent),
            Reserve::Bytes(bytes) => bytes,
        }
    }
}

impl fmt::Display for Room {
    /// To be added to a sentence; nothing where nothing is set.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reserve {
            Reserve::Nothing => (),
            Reserve::Percent(percent) => write!(f, "; storageReserve keeps {percent}% free")?,
            Reserve::Bytes(bytes) => write!(f, "; storageReserve keeps {bytes} bytes free")?,
        }
        match self.overcommit_percent {
            None => Ok(()),
            Some(percent) => write!(f, "; storageOvercommit lets all volumes together have {percent}% of the storage"),
        }
    }
}

fn part(bytes: u64, percent: u64) -> u64 {
    u64::try_from(u128::from(bytes) * u128::from(percent) / 100).unwrap_or(u64::MAX)
}

fn digits(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

fn reserve_of(text: &str) -> Option<Reserve> {
    if let Some(percent) = text.strip_suffix('%') {
        return digits(percent).filter(|percent| *percent < 100).map(Reserve::Percent);
    }
    let units = [("Ki", 10), ("Mi", 20), ("Gi", 30), ("Ti", 40), ("Pi", 50)];
    let (number, shift) = units.iter().find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift))).unwrap_or((text, 0));
    digits(number)?.checked_mul(1 << shift).map(Reserve::Bytes)
}

/// `1.5` → 150
fn hundredths(text: &str) -> Option<u64> {
    let (whole, rest) = text.split_once('.').unwrap_or((text, "0"));
    let rest = match rest.len() {
        1 => digits(rest)?.checked_mul(10)?,
        2 => digits(rest)?,
        _ => return None,
    };
    digits(whole)?.checked_mul(100)?.checked_add(rest)
}
