//! Formats an image or a device as LUKS2, and prints the volume key's digest in `cryptsetup luksDump`'s form, for comparison.
//!
//! ```text
//! cargo run -p proxmox-csi-disk --example luks -- format --passphrase-file F [--uuid U] [--sector-size N] [--pbkdf argon2id|pbkdf2]
//!     [--time N] [--memory KIB] [--lanes N] [--iterations N] IMAGE-OR-DEVICE
//! cargo run -p proxmox-csi-disk --example luks -- check (--passphrase-file F | --volume-key-file F) IMAGE-OR-DEVICE
//! cryptsetup luksDump IMAGE                                                     # shows "Digest:" as the header has it
//! cryptsetup luksDump --dump-volume-key --volume-key-file F --key-file P IMAGE  # a volume key for `check`
//! ```
//!
//! All bytes of the passphrase's file are the passphrase, a newline at its end included, as with `cryptsetup --key-file`.

use disk::luks::{Argon2Cost, Format, Hash, Header, Kdf, Material, VolumeKey, sector_size, within};
use disk::{Mark, Write, mark};
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::process::ExitCode;
use zeroize::{Zeroize as _, Zeroizing};

/// Nobody asks for this volume by name; a format cut short is told by its mark all the same.
const SERIAL: &str = "luks-example";
/// As cryptsetup's limit for key files.
const MAX_SECRET_BYTES: u64 = 8 << 20;
/// What this program lets a keyslot use: cryptsetup writes no more.
const MEMORY_LIMIT_KIB: u64 = 4 << 20;

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    match run(std::env::args().skip(1).collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("luks: {why}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Vec<String>) -> Result<(), Failure> {
    let mut args = args.into_iter();
    let action = args.next().unwrap_or_default();
    let (mut options, mut target) = (Vec::new(), None);
    while let Some(arg) = args.next() {
        match arg.strip_prefix("--") {
            Some(name) => options.push((name.to_owned(), args.next().ok_or(format!("--{name} needs a value"))?)),
            None => target = Some(arg),
        }
    }
    let target = target.ok_or("usage: luks format|check --passphrase-file F [OPTIONS] IMAGE-OR-DEVICE (see the head of its source)")?;
    let mut options = Options(options);
    let result = match action.as_str() {
        "format" => format(&target, &mut options)?,
        "check" => check(&target, &mut options)?,
        other => return Err(format!("{other:?} is neither format nor check").into()),
    };
    match options.0.first() {
        Some((name, _)) => Err(format!("--{name} is unknown to {action}").into()),
        None => result(),
    }
}

struct Options(Vec<(String, String)>);

impl Options {
    fn take(&mut self, name: &str) -> Option<String> {
        let at = self.0.iter().position(|(given, _)| given == name)?;
        Some(self.0.remove(at).1)
    }

    fn number(&mut self, name: &str, default: u32) -> Result<u32, Failure> {
        self.take(name).map_or(Ok(default), |text| text.parse().map_err(|_| format!("--{name} {text}: not a number").into()))
    }
}

/// What is left to do once all options are known to be good.
type Deed = Box<dyn FnOnce() -> Result<(), Failure>>;

fn secret(path: &str) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let mut bytes = Zeroizing::new(Vec::new());
    File::open(path).map_err(|errno| format!("{path}: {errno}"))?.take(MAX_SECRET_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn random(buffer: &mut [u8]) -> std::io::Result<()> {
    File::open("/dev/urandom")?.read_exact(buffer)
}

fn new_uuid() -> Result<String, Failure> {
    let mut bytes = [0; 16];
    random(&mut bytes)?;
    let number = u128::from_be_bytes(bytes) & !(0xf << 76) & !(3 << 62) | (4 << 76) | (2 << 62);
    let mut text = format!("{number:032x}");
    for at in [20, 16, 12, 8] {
        text.insert(at, '-');
    }
    Ok(text)
}

fn format(target: &str, options: &mut Options) -> Result<Deed, Failure> {
    let passphrase = secret(&options.take("passphrase-file").ok_or("--passphrase-file is missing")?)?;
    let Kdf::Argon2id(default) = Kdf::DEFAULT else { return Err("the default is argon2id".into()) };
    let kdf = match options.take("pbkdf").as_deref() {
        None | Some("argon2id") => Kdf::Argon2id(Argon2Cost {
            time: options.number("time", default.time)?,
            memory_kib: options.number("memory", default.memory_kib)?,
            lanes: options.number("lanes", default.lanes)?,
        }),
        Some("pbkdf2") => Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: options.number("iterations", 1_000_000)? },
        Some(other) => return Err(format!("--pbkdf {other}: neither argon2id nor pbkdf2").into()),
    };
    let mut file = File::options().read(true).write(true).open(target).map_err(|errno| format!("{target}: {errno}"))?;
    let device_size_bytes = file.seek(SeekFrom::End(0))?;
    let mut start = [0; 4096];
    file.read_exact_at(&mut start, 0)?;
    let is_ours = Mark::new(SERIAL)?.judge(&start) == mark::Marked::Ours;
    if start != [0; 4096] && !is_ours {
        return Err(format!("{target} is not blank: its first 4096 bytes are not zeros").into());
    }
    // cryptsetup's rule for a plain file; a device's sectors can be given.
    let sector_size = options.number("sector-size", sector_size(512, 4096, device_size_bytes))?;
    let uuid = options.take("uuid").map_or_else(new_uuid, Ok)?;
    let format = Format { device_size_bytes, sector_size, uuid, kdf };
    let target = target.to_owned();
    Ok(Box::new(move || {
        let material = Material::draw(random)?;
        let mut noise_key = [0; 64];
        random(&mut noise_key)?;
        let noise = Material::noise(&noise_key)?;
        noise_key.zeroize();
        for write in mark::Format::new(format.plan(&passphrase, &material, &[], noise)?, &Mark::new(SERIAL)?) {
            match write {
                Write::Data { offset, bytes } => file.write_all_at(&bytes, offset)?,
                Write::Zeros { offset, length } => file.write_all_at(&vec![0; usize::try_from(length)?], offset)?,
                Write::Flush => file.sync_data()?,
            }
        }
        report(&file, device_size_bytes, &target, &material.volume_key)
    }))
}

fn check(target: &str, options: &mut Options) -> Result<Deed, Failure> {
    let mut file = File::open(target).map_err(|errno| format!("{target}: {errno}"))?;
    let size = file.seek(SeekFrom::End(0))?;
    let passphrase = options.take("passphrase-file").map(|path| secret(&path)).transpose()?;
    let key = options.take("volume-key-file").map(|path| secret(&path)).transpose()?;
    let target = target.to_owned();
    Ok(Box::new(move || {
        let key = match (passphrase, key) {
            (None, Some(key)) => VolumeKey::new(&key),
            (Some(passphrase), None) => {
                let mut read = |offset: u64, buffer: &mut [u8]| file.read_exact_at(buffer, offset);
                let header = Header::read(size, &mut read)?;
                let (number, key) = header.unlock(&passphrase, &mut read, within(MEMORY_LIMIT_KIB))?;
                println!("Key slot {number} unlocked.");
                key
            }
            _ => return Err("one of --passphrase-file and --volume-key-file".into()),
        };
        report(&file, size, &target, &key)
    }))
}

fn report(file: &File, size: u64, target: &str, key: &VolumeKey) -> Result<(), Failure> {
    let header = Header::read(size, &mut |offset, buffer| file.read_exact_at(buffer, offset))?;
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ");
    println!("UUID:   {}", header.uuid);
    if let Some(damage) = header.damage() {
        println!("Damage: {damage}");
    }
    println!("Digest: {}", hex(&header.digest_of(key)));
    if header.is_volume_key(key) {
        return Ok(());
    }
    Err(format!("this is not the volume key of {target}, whose header has the digest {}", hex(header.digest())).into())
}
