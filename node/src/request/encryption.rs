//! What a request says of encryption: the passphrases, and how a new LUKS2 volume is to be made.
//!
//! Tolerant like the rest of this module: a bad value stops the making of a volume, never the use of one that exists.

use std::collections::HashMap;

use disk::luks::{Argon2Cost, Hash, Kdf};
use proto::{secrets, volume_context};
use zeroize::{Zeroize as _, Zeroizing};

use super::{Refusal, is_true, shorten};

/// PBKDF2 rounds where nothing is said: about a second of a core, once per stage. A secret of Kubernetes is random enough
/// for far fewer.
const DEFAULT_ITERATIONS: u32 = 1_000_000;

/// The passphrases of an encrypted volume: the raw bytes of the secrets. Wiped when dropped; no `Debug`, so that no log and
/// no error can show them.
#[allow(missing_debug_implementations, reason = "secrets")]
pub struct Passphrases {
    current: Zeroizing<Vec<u8>>,
    previous: Option<Zeroizing<Vec<u8>>>,
}

impl Passphrases {
    /// Takes them out of a request's secrets, and wipes what else is there; of that the names stay. `None`: the volume is not encrypted.
    ///
    /// # Errors
    /// The passphrase is empty, or only the previous one is given. An empty previous one counts as none.
    pub fn take(given: &mut HashMap<String, String>) -> Result<Option<Self>, Refusal> {
        let mut take = |key: &str| given.remove(key).map(|text| Zeroizing::new(text.into_bytes()));
        let (current, previous) = (take(secrets::PASSPHRASE), take(secrets::PASSPHRASE_PREVIOUS));
        for text in given.values_mut() {
            text.zeroize();
        }
        let previous = previous.filter(|previous| !previous.is_empty());
        match current {
            Some(current) if current.is_empty() => Err(Refusal::EmptyPassphrase),
            // As good as the same passphrase twice.
            Some(current) => Ok(Some(Self { previous: previous.filter(|previous| *previous != current), current })),
            None if previous.is_some() => Err(Refusal::OnlyPreviousPassphrase),
            None => Ok(None),
        }
    }

    /// What the volume is to be opened with.
    #[must_use]
    pub fn current(&self) -> &[u8] {
        &self.current
    }

    /// What opens it too, and is to be replaced; never the same as the current one.
    #[must_use]
    pub fn previous(&self) -> Option<&[u8]> {
        self.previous.as_deref().map(Vec::as_slice)
    }
}

/// How an encrypted volume is made and opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encryption {
    /// What a new keyslot costs.
    pub kdf: Kdf,
    /// Discards reach the disk: whoever sees it learns which blocks are unused.
    pub discards: bool,
}

/// Whether the StorageClass speaks of LUKS at all: such a volume is never taken for a plain one.
pub(super) fn is_asked_for(context: &HashMap<String, String>) -> bool {
    volume_context::LUKS_KEYS.iter().any(|key| context.get(*key).is_some_and(|value| !value.is_empty()))
}

/// The StorageClass' wishes, and what is wrong with them, where a new volume could not be made so.
pub(super) fn options(context: &HashMap<String, String>) -> (Encryption, Option<String>) {
    let discards = is_true(context, volume_context::LUKS_DISCARDS);
    match kdf(context) {
        Ok(kdf) => (Encryption { kdf, discards }, None),
        Err(why) => (Encryption { kdf: Kdf::DEFAULT, discards }, Some(why)),
    }
}

fn kdf(context: &HashMap<String, String>) -> Result<Kdf, String> {
    let text = |key: &str| context.get(key).map(|text| text.trim()).filter(|text| !text.is_empty());
    let number = |key: &'static str, otherwise: u32| match text(key) {
        None => Ok(otherwise),
        Some(given) => given.parse::<u32>().map_err(|_| format!("{key} is {:?}: it should be a number", shorten(given))),
    };
    let kdf = match text(volume_context::LUKS_KDF) {
        None | Some("argon2id") => {
            let Kdf::Argon2id(usual) = Kdf::DEFAULT else { return Ok(Kdf::DEFAULT) };
            let memory_mib = number(volume_context::LUKS_KDF_MEMORY, usual.memory_kib / 1024)?;
            Kdf::Argon2id(Argon2Cost {
                time: number(volume_context::LUKS_KDF_TIME, usual.time)?,
                memory_kib: memory_mib.saturating_mul(1024),
                lanes: usual.lanes,
            })
        }
        Some("pbkdf2") => Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: number(volume_context::LUKS_KDF_ITERATIONS, DEFAULT_ITERATIONS)? },
        Some(given) => return Err(format!("{} is {:?}: it should be argon2id or pbkdf2", volume_context::LUKS_KDF, shorten(given))),
    };
    kdf.check_new().map_err(|why| why.to_string())?;
    Ok(kdf)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_string(), (*value).to_string())).collect()
    }

    #[test]
    fn passphrases_are_raw_bytes_and_nothing_stays_in_the_request() {
        let mut given = map(&[("encryption-passphrase", "new\n"), ("encryption-passphrase-previous", "old"), ("else", "x")]);
        let taken = Passphrases::take(&mut given).ok().flatten().unwrap();
        assert_eq!((taken.current(), taken.previous()), (&b"new\n"[..], Some(&b"old"[..])));
        assert_eq!(given, map(&[("else", "")]));
        assert!(matches!(Passphrases::take(&mut map(&[("else", "x")])), Ok(None)));
        for same in ["", "new"] {
            let mut given = map(&[("encryption-passphrase", "new"), ("encryption-passphrase-previous", same)]);
            assert_eq!(Passphrases::take(&mut given).ok().flatten().unwrap().previous(), None, "{same:?}");
        }
    }

    #[test]
    fn an_empty_passphrase_and_a_previous_one_alone_are_refused() {
        let refused = |pairs: &[(&str, &str)]| Passphrases::take(&mut map(pairs)).err().unwrap();
        assert_eq!(refused(&[("encryption-passphrase", "")]), Refusal::EmptyPassphrase);
        assert_eq!(refused(&[("encryption-passphrase-previous", "old")]), Refusal::OnlyPreviousPassphrase);
    }

    #[test]
    fn a_class_chooses_the_cost_of_a_keyslot() {
        let (usual, wrong) = options(&map(&[]));
        assert_eq!((usual, wrong), (Encryption { kdf: Kdf::DEFAULT, discards: false }, None));
        let of = |pairs: &[(&str, &str)]| options(&map(pairs));
        let argon2id = Kdf::Argon2id(Argon2Cost { time: 5, memory_kib: 128 << 10, lanes: 1 });
        assert_eq!(of(&[("luksKdfMemory", "128"), ("luksKdfTime", "5")]), (Encryption { kdf: argon2id, discards: false }, None));
        let pbkdf2 = |iterations| Kdf::Pbkdf2 { hash: Hash::Sha256, iterations };
        assert_eq!(of(&[("luksKdf", "pbkdf2")]).0.kdf, pbkdf2(1_000_000));
        let given = of(&[("luksKdf", "pbkdf2"), ("luksKdfIterations", "1000"), ("luksDiscards", "true")]);
        assert_eq!(given, (Encryption { kdf: pbkdf2(1000), discards: true }, None));
        for (key, value) in [
            ("luksKdf", "scrypt"),
            ("luksKdfMemory", "31"),
            ("luksKdfMemory", "4194304"),
            ("luksKdfMemory", "1025"),
            ("luksKdfTime", "3"),
            ("luksKdfTime", "x"),
        ] {
            let (encryption, wrong) = of(&[(key, value)]);
            assert!(wrong.is_some_and(|why| !why.is_empty()) && encryption.kdf == Kdf::DEFAULT, "{key}={value}");
        }
        assert!(of(&[("luksKdf", "pbkdf2"), ("luksKdfIterations", "999")]).1.is_some());
    }

    proptest! {
        #[test]
        fn no_class_panics(key in proptest::sample::select(volume_context::LUKS_KEYS), value in "\\PC{0,20}") {
            let context = HashMap::from([(key.to_string(), value)]);
            let (encryption, _) = options(&context);
            prop_assert!(encryption.kdf.check_new().is_ok());
        }
    }
}
