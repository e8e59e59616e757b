//! The grammar of a drive line, `[file=]VOLID[,key=value…]`, checked as Proxmox's schema does (`reference/proxmox-api.md` §11).

use std::collections::BTreeMap;

use super::answer::ApiError;

/// A parsed drive line. Keys other than the volume are sorted when printed, as Proxmox does.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Drive {
    pub(crate) file: String,
    pub(crate) options: BTreeMap<String, String>,
}

enum Kind {
    Bool,
    Int(u64),
    Number,
    Enum(&'static str),
    Wwn,
    Encoded(usize),
    Text(usize),
}

/// Type of each key of a scsi drive.
fn kind(key: &str) -> Option<Kind> {
    Some(match key {
        "backup" | "replicate" | "detect_zeroes" | "shared" | "iothread" | "ro" | "scsiblock" | "ssd" | "snapshot" => Kind::Bool,
        "queues" => Kind::Int(2),
        "mbps" | "mbps_rd" | "mbps_wr" | "mbps_max" | "mbps_rd_max" | "mbps_wr_max" => Kind::Number,
        "iops" | "iops_rd" | "iops_wr" | "iops_max" | "iops_rd_max" | "iops_wr_max" | "bps" | "bps_rd" | "bps_wr" => Kind::Int(0),
        "bps_max_length" | "bps_rd_max_length" | "bps_wr_max_length" | "iops_max_length" | "iops_rd_max_length" | "iops_wr_max_length" => {
            Kind::Int(1)
        }
        "media" => Kind::Enum("cdrom, disk"),
        "cache" => Kind::Enum("none, writethrough, writeback, unsafe, directsync"),
        "format" => Kind::Enum("raw, qcow, qed, qcow2, vmdk, cloop"),
        "rerror" => Kind::Enum("ignore, report, stop"),
        "werror" => Kind::Enum("enospc, ignore, report, stop"),
        "aio" => Kind::Enum("native, threads, io_uring"),
        "discard" => Kind::Enum("ignore, on"),
        "wwn" => Kind::Wwn,
        "serial" => Kind::Encoded(60),
        "vendor" => Kind::Text(8),
        "product" => Kind::Text(16),
        "size" | "import-from" => Kind::Text(usize::MAX),
        _ => return None,
    })
}

/// Checks a value and gives it as it is stored.
fn checked(key: &str, value: &str) -> Result<String, String> {
    let Some(kind) = kind(key) else {
        return Err("property is not defined in schema and the schema does not allow additional properties".to_owned());
    };
    match kind {
        Kind::Bool => match value.to_ascii_lowercase().as_str() {
            "1" | "on" | "yes" | "true" => return Ok("1".to_owned()),
            "0" | "off" | "no" | "false" => return Ok("0".to_owned()),
            _ => return Err(format!("type check ('boolean') failed - got '{value}'")),
        },
        Kind::Int(minimum) => match value.parse::<u64>() {
            Ok(number) if number >= minimum => {}
            Ok(_) => return Err(format!("value must have a minimum value of {minimum}")),
            Err(_) => return Err(format!("type check ('integer') failed - got '{value}'")),
        },
        Kind::Number if value.parse::<f64>().is_err() => return Err(format!("type check ('number') failed - got '{value}'")),
        Kind::Enum(values) if !values.split(", ").any(|allowed| allowed == value) => {
            return Err(format!("value '{value}' does not have a value in the enumeration '{values}'"));
        }
        Kind::Wwn if !is_wwn(value) => return Err("value does not match the regex pattern".to_owned()),
        Kind::Encoded(_) if !value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-%_.!~*'()".contains(&byte)) => {
            return Err(format!("invalid format - invalid urlencoded string: {value}\n"));
        }
        Kind::Encoded(limit) | Kind::Text(limit) if value.len() > limit => {
            return Err(format!("value may only be {limit} characters long"));
        }
        Kind::Number | Kind::Enum(_) | Kind::Wwn | Kind::Encoded(_) | Kind::Text(_) => {}
    }
    Ok(value.to_owned())
}

fn is_wwn(value: &str) -> bool {
    value.strip_prefix("0x").is_some_and(|digits| digits.len() == 16 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// `STORAGE:VOLUME`, an absolute path, `none` or `cdrom`.
fn is_volume(text: &str) -> bool {
    matches!(text, "none" | "cdrom")
        || text.starts_with('/')
        || text.split_once(':').is_some_and(|(storage, volume)| !storage.is_empty() && !volume.is_empty() && !storage.contains('/'))
}

impl Drive {
    /// Parses and checks `text` for the config key `key`; the error is the text of the 400.
    pub(crate) fn parse(key: &str, text: &str) -> Result<Drive, String> {
        let mut file: Option<String> = None;
        let mut options = BTreeMap::new();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let duplicate = |name: &str| format!("invalid format - duplicate key in comma-separated list property: {name}\n");
            match part.split_once('=') {
                Some((name, value)) if !name.is_empty() && !value.is_empty() => {
                    let name = if name == "volume" { "file" } else { name };
                    if name == "file" {
                        if file.replace(value.to_owned()).is_some() {
                            return Err(duplicate("file"));
                        }
                    } else if options.insert(name.to_owned(), value.to_owned()).is_some() {
                        return Err(duplicate(name));
                    }
                }
                Some(_) => return Err("invalid format - missing key in comma-separated list property\n".to_owned()),
                None if file.replace(part.to_owned()).is_some() => return Err(duplicate("file")),
                None => {}
            }
        }
        let mut errors = BTreeMap::new();
        match &file {
            None => {
                errors.insert("file".to_owned(), "property is missing and it is not optional".to_owned());
            }
            Some(volume) if !is_volume(volume) => {
                errors.insert("file".to_owned(), format!("invalid format - unable to parse volume ID '{volume}'\n"));
            }
            Some(_) => {}
        }
        for (name, value) in &mut options {
            match checked(name, value) {
                Ok(stored) => *value = stored,
                Err(error) => {
                    errors.insert(name.clone(), error);
                }
            }
        }
        if !errors.is_empty() {
            let lines: String = errors.iter().map(|(name, error)| format!("{key}.{name}: {error}\n")).collect();
            return Err(format!("invalid format - format error\n{lines}"));
        }
        let drive = Drive { file: file.unwrap_or_default(), options };
        if drive.contradicts_itself() {
            return Err("unable to parse drive options".to_owned());
        }
        Ok(drive)
    }

    /// A line of the config: known to be good, read leniently.
    pub(crate) fn stored(text: &str) -> Drive {
        let mut drive = Drive::default();
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("file" | "volume", value)) => drive.file = value.to_owned(),
                Some((name, value)) => {
                    drive.options.insert(name.to_owned(), value.to_owned());
                }
                None => drive.file = part.to_owned(),
            }
        }
        drive
    }

    /// The cross rules of §11.
    fn contradicts_itself(&self) -> bool {
        let has = |key: &str| self.options.contains_key(key);
        let either = |a: &str, b: &str| has(a) && has(b);
        let needs = |a: &str, b: &str| has(a) && !has(b);
        ["mbps", "iops"].iter().any(|what| either(what, &format!("{what}_rd")) || either(what, &format!("{what}_wr")))
            || either("bps", "mbps")
            || ["mbps", "mbps_rd", "mbps_wr"].iter().any(|what| needs(&format!("{what}_max"), what))
            || ["", "_rd", "_wr"].iter().any(|side| {
                needs(&format!("bps{side}_max_length"), &format!("mbps{side}_max"))
                    || needs(&format!("iops{side}_max_length"), &format!("iops{side}_max"))
            })
            || self.is_cdrom() && (has("snapshot") || has("format"))
    }

    pub(crate) fn is_cdrom(&self) -> bool {
        self.option("media") == Some("cdrom") || matches!(self.file.as_str(), "none" | "cdrom")
    }

    pub(crate) fn option(&self, key: &str) -> Option<&str> {
        self.options.get(key).map(String::as_str)
    }

    pub(crate) fn flag(&self, key: &str) -> bool {
        self.option(key) == Some("1")
    }

    /// `STORAGE:SIZE_IN_GIB`: the storage and the size in KiB, if the volume is to be allocated.
    pub(crate) fn allocation(&self) -> Option<(&str, u64)> {
        let (storage, size) = self.file.split_once(':')?;
        let (whole, fraction) = size.split_once('.').unwrap_or((size, "0"));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(whole) || !digits(fraction) {
            return None;
        }
        let gib: f64 = size.parse().ok()?;
        // Rounded up to a whole KiB: 0.02 GiB is 20972 KiB in the recording.
        Some((storage, kib_of(gib)))
    }

    /// The line as Proxmox writes it: volume first, then the keys in order.
    pub(crate) fn print(&self) -> String {
        let mut line = self.file.clone();
        for (key, value) in &self.options {
            line.push_str(&format!(",{key}={value}"));
        }
        line
    }

    pub(crate) fn set_size(&mut self, size_bytes: u64) {
        self.options.insert("size".to_owned(), print_size(size_bytes));
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a size in KiB, from a schema of digits; saturates")]
fn kib_of(gib: f64) -> u64 {
    (gib * 1024.0 * 1024.0).ceil() as u64
}

/// K, M, G or T: the largest unit that divides; else plain bytes.
pub(crate) fn print_size(bytes: u64) -> String {
    let mut number = bytes;
    let mut unit = "";
    for next in ["K", "M", "G", "T"] {
        if number == 0 || !number.is_multiple_of(1024) {
            break;
        }
        number /= 1024;
        unit = next;
    }
    format!("{number}{unit}")
}

/// `1025K` → bytes.
pub(crate) fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match text.get(digits.len()..)? {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// `scsi3` → 3.
pub(crate) fn scsi_index(key: &str) -> Option<u8> {
    indexed(key, "scsi", 31)
}

/// Whether `key` is PREFIX and a number below `limit`, without leading zeros.
pub(crate) fn indexed(key: &str, prefix: &str, limit: u8) -> Option<u8> {
    let digits = key.strip_prefix(prefix)?;
    let index: u8 = digits.parse().ok()?;
    (index < limit && digits == index.to_string()).then_some(index)
}

/// Any drive key but unusedN.
pub(crate) fn is_drive(key: &str) -> bool {
    [("ide", 4), ("scsi", 31), ("virtio", 16), ("sata", 6)].iter().any(|(prefix, limit)| indexed(key, prefix, *limit).is_some())
        || matches!(key, "efidisk0" | "tpmstate0")
}

pub(crate) fn is_unused(key: &str) -> bool {
    key.strip_prefix("unused").and_then(|digits| digits.parse::<u16>().ok()).is_some_and(|index| index < 256)
}

/// The drive names of the resize schema, in its order.
pub(crate) fn all_names() -> String {
    let range = |prefix: &str, count: u8| (0..count).map(|index| format!("{prefix}{index}")).collect::<Vec<_>>();
    let mut names = [range("ide", 4), range("scsi", 31), range("virtio", 16), range("sata", 6)].concat();
    names.extend(["efidisk0".to_owned(), "tpmstate0".to_owned()]);
    names.join(", ")
}

/// The 400 for a bad drive line.
pub(crate) fn refused(key: &str, text: String) -> ApiError {
    ApiError::param(key, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_normalised_and_reads_back() {
        let drive = Drive::parse("scsi1", "ds1:9999/a.raw,ssd=yes,iothread=1,backup=off,discard=on").unwrap();
        assert_eq!(drive.print(), "ds1:9999/a.raw,backup=0,discard=on,iothread=1,ssd=1");
        assert_eq!(Drive::stored(&drive.print()), drive);
    }

    #[test]
    fn sizes_take_the_largest_unit_that_divides() {
        for (bytes, text) in [(1536 << 20, "1536M"), (1 << 30, "1G"), (22_020_097, "22020097"), (104_858 << 10, "104858K"), (0, "0")] {
            assert_eq!(print_size(bytes), text);
            assert_eq!(parse_size(text), Some(bytes));
        }
    }

    #[test]
    fn allocation_syntax_takes_fractions_of_a_gib() {
        let drive = Drive::parse("scsi3", "ds1:0.02").unwrap();
        assert_eq!(drive.allocation(), Some(("ds1", 20972)));
        assert_eq!(Drive::parse("scsi3", "ds1:9999/a.raw").unwrap().allocation(), None);
    }
}
