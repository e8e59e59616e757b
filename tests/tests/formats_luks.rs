//! The judge of LUKS is cryptsetup itself, on image files: it opens ours, we open its, and its images are rebuilt byte for byte.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation, reason = "a test: a panic is the verdict")]

use aes::Aes256;
use aes::cipher::KeyInit as _;
use disk::Write;
use disk::luks::{Argon2Cost, Error, Format, Hash, Header, Kdf, Material, NewKeyslot, Version, VolumeKey, sector_size, within};
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{LazyLock, Mutex};
use testbed::tools;
use zeroize::Zeroizing;

const SIZE: u64 = 18 << 20;
const UUID: &str = "0d7912f4-55a0-4c1e-9d0f-7fb0f2a2c0de";
const PASSPHRASE: &[u8] = b"correct horse\n";
const CHEAP: Kdf = Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: 1000 };
const CHEAP_ARGS: &str = "--pbkdf pbkdf2 --pbkdf-force-iterations 1000";
/// What a pod without a limit has.
const MEMORY_KIB: u64 = 2 << 20;

static CRYPTSETUP: LazyLock<Option<String>> = LazyLock::new(|| {
    let found = tools::program("cryptsetup");
    if found.is_none() {
        tools::skipped("no cryptsetup (package cryptsetup-bin) to judge LUKS volumes");
    }
    found
});

/// A folder of one test, removed when it passes.
struct Bench(PathBuf);

impl Bench {
    /// `None` where there is no cryptsetup.
    fn new(name: &str) -> Option<Self> {
        CRYPTSETUP.as_ref()?;
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("luks-{name}"));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("passphrase"), PASSPHRASE).unwrap();
        Some(Self(folder))
    }

    fn image(&self, name: &str, size: u64) -> Image {
        let path = self.0.join(name);
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        file.set_len(size).unwrap();
        Image { path, file, passphrase: self.0.join("passphrase") }
    }

    fn secret(&self, name: &str, bytes: &[u8]) -> PathBuf {
        fs::write(self.0.join(name), bytes).unwrap();
        self.0.join(name)
    }

    /// An image that cryptsetup formats.
    fn theirs(&self, name: &str, args: &str) -> Image {
        let image = self.image(name, SIZE);
        image.must(&format!("luksFormat -q {args}"), &image.passphrase);
        image
    }

    fn ours(&self, name: &str, sector_size: u32, kdf: Kdf) -> (Image, VolumeKey) {
        let image = self.image(name, SIZE);
        let material = Material::draw(urandom).unwrap();
        let format = Format { device_size_bytes: SIZE, sector_size, uuid: UUID.to_owned(), kdf };
        let plan = format.plan(PASSPHRASE, &material, std::slice::from_ref(&(0..1 << 20)), Material::noise(&[7; 64]).unwrap()).unwrap();
        image.write(disk::mark::Format::new(plan, &disk::Mark::new("csi-0123456789abcdef").unwrap()));
        (image, material.volume_key.clone())
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

fn urandom(buffer: &mut [u8]) -> std::io::Result<()> {
    File::open("/dev/urandom")?.read_exact_at(buffer, 0)
}

struct Image {
    path: PathBuf,
    file: File,
    passphrase: PathBuf,
}

impl Image {
    /// `cryptsetup ACTION IMAGE`, the passphrase from a file. One at a time: argon2 in several processes at once would need their memory together.
    fn cryptsetup(&self, action: &str, passphrase: &Path, more: &[&Path]) -> Output {
        static ONE: Mutex<()> = Mutex::new(());
        let _one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut command = Command::new(CRYPTSETUP.as_ref().unwrap());
        command.args(action.split_whitespace()).arg("--key-file").arg(passphrase).arg(&self.path).args(more);
        command.output().unwrap()
    }

    fn must(&self, action: &str, passphrase: &Path) -> String {
        let output = self.cryptsetup(action, passphrase, &[]);
        assert!(
            output.status.success(),
            "cryptsetup {action}: {}{}",
            String::from_utf8_lossy(&output.stderr),
            String::from_utf8_lossy(&output.stdout)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// The passphrase is the first one; `more` are the arguments after the image.
    fn must_with(&self, action: &str, more: &[&Path]) {
        let output = self.cryptsetup(action, &self.passphrase, more);
        assert!(output.status.success(), "cryptsetup {action}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn opens(&self, passphrase: &Path) -> bool {
        let output = self.cryptsetup("open --test-passphrase", passphrase, &[]);
        assert!(matches!(output.status.code(), Some(0 | 2)), "{output:?}");
        output.status.success()
    }

    fn their_key(&self, passphrase: &Path) -> VolumeKey {
        let to = self.path.with_extension("key");
        let _ = fs::remove_file(&to);
        self.must(&format!("luksDump -q --dump-volume-key --volume-key-file {}", to.display()), passphrase);
        VolumeKey::new(&fs::read(to).unwrap())
    }

    fn bytes(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    fn write(&self, writes: impl IntoIterator<Item = Write>) {
        for write in writes {
            match write {
                Write::Data { offset, bytes } => self.file.write_all_at(&bytes, offset).unwrap(),
                Write::Zeros { offset, length } => self.file.write_all_at(&vec![0; length as usize], offset).unwrap(),
                Write::Flush => (),
            }
        }
    }

    fn header(&self) -> Header {
        Header::read(self.file.metadata().unwrap().len(), &mut |at, buffer| self.file.read_exact_at(buffer, at)).unwrap()
    }

    fn unlock(&self, passphrase: &[u8]) -> Result<(u8, VolumeKey), Error> {
        self.header().unlock(passphrase, &mut |at, buffer| self.file.read_exact_at(buffer, at), within(MEMORY_KIB))
    }

    /// Cryptsetup and we get the same key out of it, with this passphrase and no other.
    fn same_key(&self, what: &str) -> VolumeKey {
        let (_, ours) = self.unlock(PASSPHRASE).unwrap_or_else(|why| panic!("{what}: {why}"));
        assert!(ours == self.their_key(&self.passphrase), "{what}: another volume key than cryptsetup's");
        // Not where one more try costs a GiB and seconds.
        if self.header().keyslots.iter().all(|slot| slot.kdf.memory_kib() < 1 << 19) {
            assert!(matches!(self.unlock(b"wrong"), Err(Error::WrongPassphrase { .. })), "{what}: opened with a wrong passphrase");
        }
        ours
    }
}

fn argon2id(time: u32, memory_kib: u32, lanes: u32) -> Kdf {
    Kdf::Argon2id(Argon2Cost { time, memory_kib, lanes })
}

#[test]
fn judge_cryptsetup_opens_ours() {
    let Some(bench) = Bench::new("ours") else { return };
    let wrong = bench.secret("wrong", b"correct horse");
    let second = bench.secret("second", b"second");
    for (sector_size, kdf) in
        [(512, CHEAP), (4096, CHEAP), (4096, Kdf::DEFAULT), (512, argon2id(5, 32_768, 4)), (2048, argon2id(4, 40_001, 3))]
    {
        let (image, key) = bench.ours("image", sector_size, kdf);
        assert!(image.same_key(&format!("{kdf:?}")) == key);
        assert!(!image.opens(&wrong), "opened without the newline");
        image.must("isLuks --type luks2", &image.passphrase);
        assert_eq!(image.must("luksUUID", &image.passphrase).trim(), UUID);
        let dump = image.must("luksDump", &image.passphrase);
        for line in [
            "offset: 16777216 [bytes]",
            "length: (whole device)",
            "cipher: aes-xts-plain64",
            &format!("sector: {sector_size} [bytes]"),
            "Epoch:         \t3",
        ] {
            assert!(dump.contains(line), "{line:?} is missing in {dump}");
        }
        // It adds a keyslot to ours, and finds our second copy, from which it mends the first.
        image.must_with(&format!("luksAddKey -q {CHEAP_ARGS} --key-slot 5"), &[&second]);
        assert_eq!(image.unlock(b"second").unwrap().0, 5);
        image.file.write_all_at(&[0; 4096], 0).unwrap();
        assert!(image.header().damage().unwrap().contains("no LUKS magic"));
        assert!(image.opens(&image.passphrase) && image.opens(&second));
        assert_eq!(image.header().damage(), None);
    }
}

#[test]
fn judge_we_open_what_cryptsetup_made() {
    let Some(bench) = Bench::new("theirs") else { return };
    let argon = "--pbkdf-force-iterations 4 --pbkdf-memory 32768";
    for (args, version, cipher, kdf) in [
        ("--type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000", Version::Luks2, "aes-xts-plain64", Some(CHEAP)),
        ("--type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --hash sha512", Version::Luks2, "aes-xts-plain64", None),
        (
            "--type luks2 --pbkdf pbkdf2 --hash sha1 --pbkdf-force-iterations 1234 --key-size 256",
            Version::Luks2,
            "aes-xts-plain64",
            Some(Kdf::Pbkdf2 { hash: Hash::Sha1, iterations: 1234 }),
        ),
        (
            &format!("--type luks2 {argon} --pbkdf argon2id --pbkdf-parallel 2 -c aes-xts-plain64 --key-size=512"),
            Version::Luks2,
            "aes-xts-plain64",
            Some(argon2id(4, 32_768, 2)),
        ),
        (
            &format!("--type luks2 {argon} --pbkdf argon2i --sector-size 512 --label x --subsystem y"),
            Version::Luks2,
            "aes-xts-plain64",
            None,
        ),
        (
            &format!("--type luks2 {CHEAP_ARGS} --luks2-metadata-size 64k --luks2-keyslots-size 512k"),
            Version::Luks2,
            "aes-xts-plain64",
            Some(CHEAP),
        ),
        (&format!("--type luks2 {CHEAP_ARGS} -c aes-cbc-essiv:sha256 --key-size 256"), Version::Luks2, "aes-cbc-essiv:sha256", Some(CHEAP)),
        ("--type luks1 --pbkdf-force-iterations 1000", Version::Luks1, "aes-xts-plain64", Some(CHEAP)),
        ("--type luks1 --hash sha1 --key-size 256 --pbkdf-force-iterations 1000", Version::Luks1, "aes-xts-plain64", None),
        (
            "--type luks1 --hash sha512 -c aes-cbc-essiv:sha256 --key-size 256 --pbkdf-force-iterations 1000",
            Version::Luks1,
            "aes-cbc-essiv:sha256",
            None,
        ),
        ("--type luks1 -c aes-cbc-plain --key-size 128 --pbkdf-force-iterations 1000", Version::Luks1, "aes-cbc-plain", Some(CHEAP)),
    ] {
        let image = bench.theirs("image", args);
        let header = image.header();
        assert_eq!((header.version, header.segment.cipher.as_str()), (version, cipher), "{args}");
        assert_eq!(header.uuid, image.must("luksUUID", &image.passphrase).trim(), "{args}");
        let dump = image.must("luksDump", &image.passphrase);
        let offset = if version == Version::Luks1 {
            format!("Payload offset:\t{}", header.segment.offset_bytes / 512)
        } else {
            format!("offset: {} [bytes]", header.segment.offset_bytes)
        };
        assert!(dump.contains(&offset), "{args}: {offset:?} is missing in {dump}");
        if version == Version::Luks2 {
            assert!(dump.contains(&format!("sector: {} [bytes]", header.segment.sector_size)), "{args}");
        }
        if let Some(kdf) = kdf {
            assert_eq!(header.keyslots[0].kdf, kdf, "{args}");
        }
        let key = image.same_key(args);
        assert_eq!(header.digest_of(&key), header.digest(), "{args}");
    }
}

#[test]
fn judge_several_keyslots_and_priorities() {
    let Some(bench) = Bench::new("slots") else { return };
    for kind in ["luks1", "luks2"] {
        let image = bench.theirs("image", &format!("--type {kind} --pbkdf pbkdf2 --pbkdf-force-iterations 1000"));
        let key = image.same_key(kind);
        let more: Vec<Vec<u8>> = (1..=5u8).map(|n| vec![0, n, 255]).collect();
        for passphrase in &more {
            let file = bench.secret("more", passphrase);
            image.must_with("luksAddKey -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000", &[&file]);
        }
        image.must_with("luksKillSlot -q", &[Path::new("2")]);
        for (n, passphrase) in (1u8..).zip(&more) {
            match image.unlock(passphrase) {
                Ok((number, found)) => assert!(number == n && n != 2 && found == key, "{kind}: {number}"),
                Err(why) => assert!(n == 2 && matches!(why, Error::WrongPassphrase { tried: 5, .. }), "{kind}: {why}"),
            }
        }
        if kind == "luks1" {
            let refused = image.header().add_keyslot(&key, &new_keyslot(b"x"), |_, _: &mut [u8]| ());
            assert!(refused.is_err_and(|why| why.to_string().contains("LUKS1")));
            // The same volume, the same key, in the other format, there and back.
            image.must_with("convert -q --type luks2", &[]);
            assert_eq!(image.header().version, Version::Luks2);
            assert!(image.same_key("converted to luks2") == key);
            image.must_with("convert -q --type luks1", &[]);
            assert_eq!(image.header().version, Version::Luks1);
            assert!(image.same_key("converted to luks1") == key);
            continue;
        }
        // 4 first, 0 only when asked for.
        image.must_with("config --priority prefer --key-slot 4", &[]);
        image.must_with("config --priority ignore --key-slot 0", &[]);
        let header = image.header();
        assert_eq!(header.keyslots.iter().map(|slot| slot.number).collect::<Vec<_>>(), [4, 1, 3, 5, 0]);
        assert!(matches!(image.unlock(PASSPHRASE), Err(Error::WrongPassphrase { tried: 4, .. })));
        let asked =
            header.unlock_keyslot(0, PASSPHRASE, &mut |at, buffer| image.file.read_exact_at(buffer, at), within(MEMORY_KIB)).unwrap();
        assert!(asked.is_some_and(|found| found == key));
    }
}

fn new_keyslot(passphrase: &[u8]) -> NewKeyslot<'_> {
    let material = Material::draw(urandom).unwrap();
    NewKeyslot {
        passphrase,
        kdf: CHEAP,
        salt: material.keyslot_salt,
        stripes: Zeroizing::new(material.stripes.to_vec()),
        header_salts: material.header_salts,
    }
}

#[test]
fn judge_a_damaged_header_copy_of_theirs_is_read_and_healed() {
    let Some(bench) = Bench::new("damage") else { return };
    for (at, harm) in HARMS {
        let image = bench.theirs("image", &format!("--type luks2 {CHEAP_ARGS}"));
        let key = image.same_key("whole");
        image.file.write_all_at(harm, at).unwrap();
        let header = image.header();
        assert!(header.damage().is_some(), "damage at {at} was not seen");
        assert!(image.unlock(PASSPHRASE).unwrap().1 == key);
        image.write(header.heal(&[3; 64]).unwrap());
        assert_eq!(image.header().damage(), None);
        // The healed copy alone is enough for cryptsetup.
        let other = if at < 16_384 { 16_384 } else { 0 };
        image.file.write_all_at(&[0; 16_384], other).unwrap();
        assert!(image.opens(&image.passphrase), "cryptsetup does not open by the copy healed after damage at {at}");
    }
}

const HARMS: [(u64, &[u8]); 6] =
    [(0, &[0; 512]), (0, &[0; 16_384]), (4096 + 20, b"x"), (16_384, &[0; 16_384]), (16_384 + 16, &[9; 8]), (16_384 + 5000, b"x")];

#[test]
fn judge_a_damaged_header_copy_of_ours_is_healed_by_cryptsetup() {
    let Some(bench) = Bench::new("damage-ours") else { return };
    for (at, harm) in HARMS {
        let (image, key) = bench.ours("image", 4096, CHEAP);
        let whole = image.bytes(0, 32 << 10);
        image.file.write_all_at(harm, at).unwrap();
        assert!(image.opens(&image.passphrase), "cryptsetup does not open ours with damage at {at}");
        // It has mended what it read; with a salt of its own, so that the bytes differ from ours there and in the checksum.
        assert_eq!(image.header().damage(), None, "damage at {at}");
        let (ours, healed) = (&whole[4096..16_384], image.bytes(0, 32 << 10));
        assert!(healed[4096..16_384] == *ours && healed[16_384 + 4096..] == *ours, "damage at {at}: other metadata");
        assert!(image.same_key("healed by cryptsetup") == key);
    }
}

/// At every cut of a rotation, also within a header copy, cryptsetup opens it with the very passphrases with which we do, one of the two at least.
#[test]
fn judge_a_rotation_cut_short() {
    let Some(bench) = Bench::new("cut") else { return };
    let new_file = bench.secret("new", b"new");
    let noise = |_: u64, buffer: &mut [u8]| urandom(buffer).unwrap();
    let (image, key) = bench.ours("image", 4096, CHEAP);
    let before = image.bytes(0, 1 << 20);
    let (_, add) = image.header().add_keyslot(&key, &new_keyslot(b"new"), noise).unwrap();
    image.write(add.clone());
    let between = image.bytes(0, 1 << 20);
    let remove = image.header().remove_keyslot(0, &[[5; 64], [6; 64]], noise).unwrap();
    let (mut by_old, mut by_new) = (0, 0);
    for (start, writes) in [(&before, &add), (&between, &remove)] {
        for cut in 0..=writes.len() {
            // Of the write that is cut, so many sectors from its beginning and from its end have landed.
            let torn: &[(usize, usize)] =
                if matches!(writes.get(cut), Some(Write::Data { .. })) { &[(0, 0), (1, 0), (9, 0), (0, 9)] } else { &[(0, 0)] };
            for (first, last) in torn {
                image.file.write_all_at(start, 0).unwrap();
                image.write(writes[..cut].iter().cloned());
                if let Some(Write::Data { offset, bytes }) = writes.get(cut) {
                    image.file.write_all_at(&bytes[..first * 512], *offset).unwrap();
                    let from = bytes.len() - last * 512;
                    image.file.write_all_at(&bytes[from..], offset + from as u64).unwrap();
                }
                let ours = [image.unlock(PASSPHRASE).is_ok(), image.unlock(b"new").is_ok()];
                let theirs = [image.opens(&image.passphrase), image.opens(&new_file)];
                assert_eq!(ours, theirs, "after {cut} writes, {first} and {last} sectors of the next");
                assert!(ours[0] || ours[1], "after {cut} writes, {first} and {last} sectors of the next, nothing opens");
                by_old += u32::from(ours[0]);
                by_new += u32::from(ours[1]);
            }
        }
    }
    assert!(by_old > 10 && by_new > 10, "{by_old} opened by the old passphrase, {by_new} by the new one");
}

/// The reference driver's command: what it costs is what cryptsetup measures, up to 1 GiB of memory. It takes no more than half of what is free, so that
/// the whole GiB, which takes a minute, is ours to make in the long run.
#[test]
fn judge_the_reference_drivers_volume_opens() {
    let Some(bench) = Bench::new("reference") else { return };
    let image = bench.theirs("image", "--type luks2 -c aes-xts-plain64 --key-size=512");
    let header = image.header();
    let Kdf::Argon2id(found) = header.keyslots[0].kdf else { panic!("{:?}", header.keyslots[0].kdf) };
    println!("argon2id, t={}, {} MiB, {} lanes", found.time, found.memory_kib / 1024, found.lanes);
    image.same_key("the reference driver's");
    let refused =
        header.unlock(PASSPHRASE, &mut |at, buffer| image.file.read_exact_at(buffer, at), within(u64::from(found.memory_kib) - 1));
    assert!(matches!(refused, Err(Error::KeyslotMemory { .. })));
    if std::env::var_os("PROXMOX_CSI_LONG").is_some() {
        let (image, key) = bench.ours("image", 4096, argon2id(4, 1 << 20, 4));
        assert!(image.same_key("of 1 GiB") == key);
    }
}

/// A cryptsetup whose second copy is newer is a write cut short: the newer one counts, for it and for us.
#[test]
fn judge_the_newer_copy_counts() {
    let Some(bench) = Bench::new("newer") else { return };
    let image = bench.theirs("image", &format!("--type luks2 {CHEAP_ARGS}"));
    let before = image.bytes(0, 16_384);
    let second = bench.secret("second", b"second");
    image.must_with(&format!("luksAddKey -q {CHEAP_ARGS}"), &[&second]);
    image.file.write_all_at(&before, 0).unwrap();
    assert!(image.header().damage().unwrap().contains("the second copy has 4"));
    assert!(image.unlock(b"second").is_ok() && image.opens(&second));
}

/// Recovers all stripes of keyslot `number` with arithmetic of its own, given the passphrase.
fn stripes(image: &Image, passphrase: &[u8], keyslot: &serde_json::Value) -> Zeroizing<Vec<u8>> {
    let kdf = &keyslot["kdf"];
    let salt = base64(&kdf["salt"]);
    let mut derived = [0; 64];
    let number = |name: &str| kdf[name].as_u64().unwrap() as u32;
    if kdf["type"] == "pbkdf2" {
        pbkdf2::pbkdf2_hmac::<sha2::Sha256>(passphrase, &salt, number("iterations"), &mut derived);
    } else {
        let params = argon2::Params::new(number("memory"), number("time"), number("cpus"), Some(64)).unwrap();
        argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params)
            .hash_password_into(passphrase, &salt, &mut derived)
            .unwrap();
    }
    let mut area = image.bytes(keyslot["area"]["offset"].as_str().unwrap().parse().unwrap(), 64 * 4000);
    xts(&derived).decrypt_area(&mut area, 512, 0, xts_mode::get_tweak_default);
    area.truncate(64 * 3999);
    Zeroizing::new(area)
}

fn xts(key: &[u8]) -> xts_mode::Xts128<Aes256> {
    xts_mode::Xts128::new(Aes256::new_from_slice(&key[..32]).unwrap(), Aes256::new_from_slice(&key[32..]).unwrap())
}

fn base64(value: &serde_json::Value) -> Vec<u8> {
    use base64ct::{Base64, Encoding as _};
    Base64::decode_vec(value.as_str().unwrap()).unwrap()
}

fn json(image: &Image) -> serde_json::Value {
    let area = image.bytes(4096, 12_288);
    serde_json::from_slice(&area[..area.iter().position(|byte| *byte == 0).unwrap()]).unwrap()
}

fn salts(image: &Image) -> [[u8; 64]; 2] {
    [0, 16_384].map(|at| image.bytes(at + 104, 64).try_into().unwrap())
}

fn first_difference(a: &Image, b: &Image) -> Option<usize> {
    let (a, b) = (a.bytes(0, 16 << 20), b.bytes(0, 16 << 20));
    a.iter().zip(&b).position(|(a, b)| a != b)
}

#[test]
fn judge_their_images_are_rebuilt_byte_for_byte() {
    let Some(bench) = Bench::new("rebuild") else { return };
    for (args, kdf) in [
        (CHEAP_ARGS, CHEAP),
        ("--pbkdf-force-iterations 4 --pbkdf-memory 32768 --pbkdf-parallel 1 --sector-size 512", argon2id(4, 32_768, 1)),
        (CHEAP_ARGS, CHEAP),
    ] {
        let theirs = bench.theirs("theirs", &format!("--type luks2 {args} -c aes-xts-plain64 --key-size 512"));
        let metadata = json(&theirs);
        let material = Material {
            volume_key: theirs.their_key(&theirs.passphrase),
            header_salts: salts(&theirs),
            keyslot_salt: base64(&metadata["keyslots"]["0"]["kdf"]["salt"]).try_into().unwrap(),
            digest_salt: base64(&metadata["digests"]["0"]["salt"]).try_into().unwrap(),
            stripes: stripes(&theirs, PASSPHRASE, &metadata["keyslots"]["0"]),
        };
        let format = Format {
            device_size_bytes: SIZE,
            sector_size: metadata["segments"]["0"]["sector_size"].as_u64().unwrap() as u32,
            uuid: theirs.must("luksUUID", &theirs.passphrase).trim().to_owned(),
            kdf,
        };
        let ours = bench.image("ours", SIZE);
        let noise = |at: u64, buffer: &mut [u8]| theirs.file.read_exact_at(buffer, at).unwrap();
        ours.write(disk::mark::Format::new(format.plan(PASSPHRASE, &material, &[], noise).unwrap(), &disk::Mark::new("csi-0").unwrap()));
        assert_eq!(first_difference(&ours, &theirs), None, "{args}: luksFormat");

        // And the same for a second keyslot.
        let before = theirs.bytes(0, 16 << 20);
        let second = bench.secret("second", b"second");
        theirs.must_with(&format!("luksAddKey -q {CHEAP_ARGS}"), &[&second]);
        let metadata = json(&theirs);
        let new = NewKeyslot {
            passphrase: b"second",
            kdf: CHEAP,
            salt: base64(&metadata["keyslots"]["1"]["kdf"]["salt"]).try_into().unwrap(),
            stripes: stripes(&theirs, b"second", &metadata["keyslots"]["1"]),
            header_salts: salts(&theirs),
        };
        ours.file.write_all_at(&before, 0).unwrap();
        let noise = |at: u64, buffer: &mut [u8]| theirs.file.read_exact_at(buffer, at).unwrap();
        let (number, writes) = ours.header().add_keyslot(&material.volume_key, &new, noise).unwrap();
        ours.write(writes);
        assert_eq!((number, first_difference(&ours, &theirs)), (1, None), "{args}: luksAddKey");
    }
}

#[test]
fn judge_rotation_on_volumes_of_either_make() {
    let Some(bench) = Bench::new("rotate") else { return };
    let new_file = bench.secret("new", b"new");
    let (ours, _) = bench.ours("ours", 4096, CHEAP);
    let labelled = format!("--type luks2 {CHEAP_ARGS} --label a/b --subsystem c --luks2-metadata-size 32k --luks2-keyslots-size 1m");
    for image in [ours, bench.theirs("theirs", &format!("--type luks2 {CHEAP_ARGS}")), bench.theirs("labelled", &labelled)] {
        // A token of somebody else's, bound to the keyslot that goes.
        let token = bench.secret("token", br#"{"type":"unknown/kind","keyslots":["0"],"word":"\u00e9\t"}"#);
        image.must_with(&format!("token import --json-file {}", token.display()), &[]);
        let key = image.same_key("before");
        let noise = |_: u64, buffer: &mut [u8]| urandom(buffer).unwrap();
        let (number, add) = image.header().add_keyslot(&key, &new_keyslot(b"new"), noise).unwrap();
        image.write(add);
        assert!(image.unlock(b"new").unwrap() == (number, key.clone()));
        assert!(image.opens(&new_file) && image.opens(&image.passphrase));
        let remove = image.header().remove_keyslot(0, &[[5; 64], [6; 64]], noise).unwrap();
        image.write(remove);
        assert!(image.opens(&new_file) && !image.opens(&image.passphrase));
        assert!(image.their_key(&new_file) == key);
        assert_eq!(image.header().damage(), None);
        let dump = image.must("luksDump", &image.passphrase);
        assert!(dump.contains("unknown/kind") && !dump.contains("Keyslot:    0"), "{dump}");
        // What is left is well-formed for a change by cryptsetup.
        let third = bench.secret("third", b"third");
        let output = image.cryptsetup(&format!("luksAddKey -q {CHEAP_ARGS}"), &new_file, &[&third]);
        assert!(output.status.success(), "{output:?}");
        assert!(image.unlock(b"third").unwrap() == (0, key));
    }
}

#[test]
fn judge_sector_sizes_are_cryptsetups() {
    let Some(bench) = Bench::new("sector") else { return };
    // It takes a plain file for a disk with 4096-byte physical sectors.
    for size in [18 << 20, (18 << 20) + 512, (18 << 20) + 2048, (16 << 20) + 4096, (16 << 20) + 512] {
        let image = bench.image("image", size);
        let output = image.cryptsetup(&format!("luksFormat -q --type luks2 {CHEAP_ARGS}"), &image.passphrase, &[]);
        assert!(output.status.success(), "{size}: {output:?}");
        assert_eq!(image.header().segment.sector_size, sector_size(512, 4096, size), "{size} bytes");
    }
}

/// The ciphertext that reads as zeros, by arithmetic of its own; the kernel's word comes in the guest.
#[test]
fn judge_encrypted_zeros() {
    let Some(bench) = Bench::new("zeros") else { return };
    for size in [512usize, 4096] {
        let (image, key) = bench.ours("image", size as u32, CHEAP);
        let mut first_mib = image.bytes(16 << 20, 1 << 20);
        // plain64 counts 512-byte units for large sectors too.
        xts(key.bytes()).decrypt_area(&mut first_mib, size, 0, |n| xts_mode::get_tweak_default(n * (size as u128 / 512)));
        assert!(first_mib.iter().all(|byte| *byte == 0), "{size}");
    }
}

#[test]
fn judge_what_we_do_not_do_is_said() {
    let Some(bench) = Bench::new("refused") else { return };
    let image = bench.theirs("image", &format!("--type luks2 {CHEAP_ARGS}"));
    image.must(&format!("reencrypt --init-only -q {CHEAP_ARGS} --resilience checksum"), &image.passphrase);
    let read = Header::read(SIZE, &mut |at, buffer| image.file.read_exact_at(buffer, at));
    assert!(read.is_err_and(|why| why.to_string().contains("cryptsetup reencrypt")), "a re-encryption under way was taken for a volume");
    let image = bench.theirs("image", "--type luks2 --pbkdf argon2id --pbkdf-force-iterations 4 --pbkdf-memory 65536");
    assert_eq!(image.header().keyslot_memory_kib(0), Some(65_536));
    let refused = image.header().unlock(PASSPHRASE, &mut |at, buffer| image.file.read_exact_at(buffer, at), within(65_535));
    let Err(why @ Error::KeyslotMemory { .. }) = refused else { panic!("opened beyond the limit") };
    assert!(why.to_string().contains("needs 64 MiB") && why.to_string().contains("leaves 63 MiB"), "{why}");
}
