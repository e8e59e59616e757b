//! An encrypted volume's image, judged on this host: by cryptsetup its header, by arithmetic of our own its data, and by the
//! filesystem's checker what is inside.

use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes256, Block};
use disk::luks::{Header, within};
use testbed::tools;

use crate::harness::Image;

/// Read, decrypted and written at one time.
const PIECE_BYTES: usize = 1 << 20;

static ZEROS: [u8; PIECE_BYTES] = [0; PIECE_BYTES];

/// cryptsetup's word on header and passphrase.
pub(crate) fn assert_cryptsetup_opens(image: &Image, passphrase: &str) {
    let Some(cryptsetup) = tools::program("cryptsetup") else { return tools::skipped("cryptsetup is missing: the header is not judged") };
    for args in [&["luksDump"][..], &["open", "--test-passphrase", "--key-file=-"]] {
        let mut command = Command::new(&cryptsetup);
        command.args(args).arg(&image.0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // luksDump does not read it.
        let _ = child.stdin.take().unwrap().write_all(passphrase.as_bytes());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "cryptsetup {args:?}: {output:?}");
    }
}

/// What the volume holds in plain, as an image: aes-xts-plain64, computed here from the volume key (XTS of IEEE 1619, the IV being
/// the number of the 512-byte sector). What was never written stays a hole.
pub(crate) fn decrypted(image: &Image, passphrase: &str) -> Image {
    let mut read = |offset: u64, buffer: &mut [u8]| {
        buffer.copy_from_slice(&image.read_at(offset, buffer.len()));
        Ok(())
    };
    let header = Header::read(image.size_bytes(), &mut read).unwrap();
    let (_, key) = header.unlock(passphrase.as_bytes(), &mut read, within(u64::MAX)).unwrap_or_else(|why| panic!("{why}"));
    assert_eq!((header.segment.cipher.as_str(), key.bytes().len()), ("aes-xts-plain64", 64));
    let half = |at: usize| Aes256::new_from_slice(&key.bytes()[at..at + 32]).unwrap();
    let (data, tweaks) = (half(0), half(32));
    let (offset, sector_size) = (header.segment.offset_bytes, header.segment.sector_size as usize);
    let plain = Image::new(image.size_bytes() - offset);
    let from = std::fs::File::open(&image.0).unwrap();
    let to = std::fs::File::options().write(true).open(&plain.0).unwrap();
    let mut piece = vec![0; PIECE_BYTES];
    for at in (0..plain.size_bytes()).step_by(PIECE_BYTES) {
        let length = usize::try_from(plain.size_bytes() - at).unwrap().min(PIECE_BYTES) / sector_size * sector_size;
        let piece = &mut piece[..length];
        from.read_exact_at(piece, offset + at).unwrap();
        if *piece == ZEROS[..length] {
            continue;
        }
        for (number, sector) in piece.chunks_mut(sector_size).enumerate() {
            // Slices are compared by memcmp, also in a debug build.
            if *sector != ZEROS[..sector_size] {
                let at = at + (number * sector_size) as u64;
                decrypt_sector(&data, &tweaks, at / 512, sector);
                to.write_all_at(sector, at).unwrap();
            }
        }
    }
    plain
}

/// Whole blocks only, which sectors are. Numbers of 128 bits instead of bytes one by one: this is a debug build.
fn decrypt_sector(data: &Aes256, tweaks: &Aes256, number: u64, sector: &mut [u8]) {
    let mut block = Block::from(u128::from(number).to_le_bytes());
    tweaks.encrypt_block(&mut block);
    let mut tweak = u128::from_le_bytes(block.into());
    for bytes in sector.chunks_exact_mut(16) {
        let mut block = Block::from((u128::from_le_bytes((&*bytes).try_into().unwrap()) ^ tweak).to_le_bytes());
        data.decrypt_block(&mut block);
        bytes.copy_from_slice(&(u128::from_le_bytes(block.into()) ^ tweak).to_le_bytes());
        // Times x in GF(2^128), with the polynomial's 0x87 for what falls out.
        tweak = (tweak << 1) ^ ((tweak >> 127) * 0x87);
    }
}
