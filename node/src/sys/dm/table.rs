//! dm-crypt's table line, parsed and printed (Documentation/admin-guide/device-mapper/dm-crypt.rst). Pure.

use std::fmt::{self, Write as _};

use zeroize::Zeroizing;

use crate::sys::Dev;

/// A dm-crypt target as it is to be loaded: sectors are of 512 bytes, whatever the encryption's own are.
#[derive(Clone)]
pub struct CryptTable<'a> {
    /// `aes-xts-plain64`.
    pub cipher: &'a str,
    /// The volume key's bytes.
    pub key: &'a [u8],
    /// Added to the sector number for the IV.
    pub iv_offset: u64,
    /// The device below.
    pub backing: Dev,
    /// Where the data begins on it.
    pub offset_sectors: u64,
    /// The mapping's size.
    pub length_sectors: u64,
    /// `allow_discards`, `sector_size:4096`, …
    pub options: Vec<String>,
}

impl fmt::Debug for CryptTable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cipher, key, iv_offset, backing, offset_sectors, length_sectors, options } = self;
        write!(f, "crypt {cipher} ({} bytes of key) {iv_offset} {backing} {offset_sectors}", key.len())?;
        write!(f, " for {length_sectors} sectors {options:?}")
    }
}

/// A dm-crypt target as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Crypt {
    /// `aes-xts-plain64`.
    pub cipher: String,
    /// Its key, or where it came from.
    pub key: Key,
    /// Added to the sector number for the IV.
    pub iv_offset: u64,
    /// The device below.
    pub backing: Dev,
    /// Where the data begins on it, in sectors of 512 bytes.
    pub offset_sectors: u64,
    /// In the kernel's order.
    pub options: Vec<String>,
}

/// A key as a table shows it.
#[derive(Clone, PartialEq, Eq)]
pub enum Key {
    /// The key itself.
    Hex(HexKey),
    /// A reference to a kernel key.
    Keyring {
        /// Bytes of the key.
        size_bytes: u32,
        /// `logon`, `user`, …
        kind: String,
        /// Its name in the kernel.
        description: String,
    },
}

/// A key in hexadecimal. Wiped when dropped; shows itself to nobody.
#[derive(Clone, PartialEq, Eq)]
pub struct HexKey(Zeroizing<String>);

impl HexKey {
    /// Whether it is this one.
    #[must_use]
    pub fn is(&self, key: &[u8]) -> bool {
        Self::of(key).0.eq_ignore_ascii_case(&self.0)
    }

    pub(super) fn of(key: &[u8]) -> Self {
        // Of its final size from the beginning: a string that grew would leave copies behind.
        let mut text = Zeroizing::new(String::with_capacity(2 * key.len() + 1));
        for byte in key {
            let _ = write!(text, "{byte:02x}");
        }
        if key.is_empty() {
            text.push('-');
        }
        Self(text)
    }
}

impl fmt::Debug for HexKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes in hexadecimal, not shown", self.0.len() / 2)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hex(key) => key.fmt(f),
            Self::Keyring { size_bytes, kind, description } => write!(f, ":{size_bytes}:{kind}:{description}"),
        }
    }
}

impl Crypt {
    /// From a table line's parameters. `None`: it does not read like one of dm-crypt's.
    pub(super) fn parse(params: &str) -> Option<Self> {
        let mut words = params.split_ascii_whitespace();
        let cipher = words.next()?.to_owned();
        let key = parse_key(words.next()?)?;
        let iv_offset = words.next()?.parse().ok()?;
        let backing = words.next()?.parse().ok()?;
        let offset_sectors = words.next()?.parse().ok()?;
        let count = words.next().map_or(Some(0), |count| count.parse().ok())?;
        let options: Vec<String> = words.map(str::to_owned).collect();
        (options.len() == count).then_some(Self { cipher, key, iv_offset, backing, offset_sectors, options })
    }

    /// The line that loads it again.
    pub(super) fn print(&self) -> Zeroizing<String> {
        print(&self.cipher, &self.key, self.iv_offset, self.backing, self.offset_sectors, &self.options)
    }

    /// Whether it does what `table` would do, its length aside. A kernel key cannot be read back: there the rest must do.
    #[must_use]
    pub fn does_as(&self, table: &CryptTable<'_>) -> bool {
        let sorted = |options: &[String]| {
            let mut options = options.to_vec();
            options.sort_unstable();
            options
        };
        let is_same_key = match &self.key {
            Key::Hex(key) => key.is(table.key),
            Key::Keyring { size_bytes, .. } => usize::try_from(*size_bytes) == Ok(table.key.len()),
        };
        is_same_key
            && (self.cipher.as_str(), self.iv_offset, self.backing, self.offset_sectors)
                == (table.cipher, table.iv_offset, table.backing, table.offset_sectors)
            && sorted(&self.options) == sorted(&table.options)
    }
}

impl CryptTable<'_> {
    /// With this key in it. `None`: a word with a space would become two.
    pub(super) fn print(&self, key: &Key) -> Option<Zeroizing<String>> {
        let is_word = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
        let is_fine = is_word(self.cipher) && self.options.iter().all(|option| is_word(option));
        is_fine.then(|| print(self.cipher, key, self.iv_offset, self.backing, self.offset_sectors, &self.options))
    }
}

fn parse_key(word: &str) -> Option<Key> {
    let Some(reference) = word.strip_prefix(':') else {
        let is_hex = word == "-" || (word.len().is_multiple_of(2) && word.bytes().all(|byte| byte.is_ascii_hexdigit()));
        return is_hex.then(|| Key::Hex(HexKey(Zeroizing::new(word.to_owned()))));
    };
    let mut parts = reference.splitn(3, ':');
    let size_bytes = parts.next()?.parse().ok()?;
    Some(Key::Keyring { size_bytes, kind: parts.next()?.to_owned(), description: parts.next()?.to_owned() })
}

fn print(cipher: &str, key: &Key, iv_offset: u64, backing: Dev, offset_sectors: u64, options: &[String]) -> Zeroizing<String> {
    // More than any key, name and options take, so that the string never grows and leaves a copy behind.
    let key_bytes = match key {
        Key::Hex(key) => key.0.len(),
        Key::Keyring { kind, description, .. } => kind.len() + description.len() + 16,
    };
    let size = cipher.len() + key_bytes + options.iter().map(|option| option.len() + 1).sum::<usize>() + 96;
    let mut line = Zeroizing::new(String::with_capacity(size));
    line.push_str(cipher);
    line.push(' ');
    match key {
        Key::Hex(key) => line.push_str(&key.0),
        Key::Keyring { size_bytes, kind, description } => {
            let _ = write!(line, ":{size_bytes}:{kind}:{description}");
        }
    }
    let _ = write!(line, " {iv_offset} {backing} {offset_sectors}");
    if !options.is_empty() {
        let _ = write!(line, " {}", options.len());
    }
    for option in options {
        let _ = write!(line, " {option}");
    }
    line
}
