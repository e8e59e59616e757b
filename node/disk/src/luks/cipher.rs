//! Sectors in and out: AES-XTS and AES-CBC as dm-crypt numbers their sectors.
//!
//! Source: the kernel's Documentation/admin-guide/device-mapper/dm-crypt.rst (cipher words, IV generators) and IEEE 1619 for XTS.
//! The IV counts 512-byte units also where a sector is larger (dm-crypt without `iv_large_sectors`, which cryptsetup does not set).

use super::Error;
use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit, consts::U16};
use aes::{Aes128, Aes256};
use sha2::{Digest as _, Sha256};
use xts_mode::Xts128;
use zeroize::Zeroizing;

type Block = Array<u8, U16>;

/// What the IV of a sector is made of.
enum Iv {
    /// The sector's number, 32 bits of it.
    Plain,
    /// The sector's number, 64 bits.
    Plain64,
    /// The number, encrypted with a hash of the key.
    Essiv(Box<Aes256>),
}

trait BlockCipher: BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt {}
impl<C: BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt> BlockCipher for C {}

enum Mode {
    Xts128(Box<Xts128<Aes128>>),
    Xts256(Box<Xts128<Aes256>>),
    Cbc128(Box<Aes128>),
    Cbc256(Box<Aes256>),
}

/// A cipher with its key. The key schedules are wiped when it is dropped.
pub(super) struct SectorCipher {
    mode: Mode,
    iv: Iv,
}

impl SectorCipher {
    /// `encryption` in dm-crypt's words, `aes-xts-plain64`.
    pub(super) fn new(encryption: &str, key: &[u8]) -> Result<Self, Error> {
        let unsupported = || {
            Error::Unsupported(format!(
                "cipher {encryption} with a {}-bit key (known: aes-xts-plain64, aes-xts-plain, aes-cbc-essiv:sha256, aes-cbc-plain64, aes-cbc-plain)",
                key.len() * 8
            ))
        };
        let (mode, iv) = encryption.strip_prefix("aes-").and_then(|rest| rest.split_once('-')).ok_or_else(unsupported)?;
        let mode = match (mode, key.len()) {
            ("xts", 32) => xts::<Aes128>(key).map(Mode::Xts128),
            ("xts", 64) => xts::<Aes256>(key).map(Mode::Xts256),
            ("cbc", 16) => Aes128::new_from_slice(key).ok().map(Box::new).map(Mode::Cbc128),
            ("cbc", 32) => Aes256::new_from_slice(key).ok().map(Box::new).map(Mode::Cbc256),
            _ => None,
        }
        .ok_or_else(unsupported)?;
        let iv = match iv {
            "plain" => Iv::Plain,
            "plain64" => Iv::Plain64,
            "essiv:sha256" => {
                let hashed: Zeroizing<[u8; 32]> = Zeroizing::new(Sha256::digest(key).into());
                Iv::Essiv(Box::new(Aes256::new_from_slice(hashed.as_slice()).map_err(|_| unsupported())?))
            }
            _ => return Err(unsupported()),
        };
        Ok(Self { mode, iv })
    }

    fn iv(&self, sector_512: u64) -> Block {
        let mut block = Block::default();
        let number = if matches!(self.iv, Iv::Plain) { sector_512 & 0xffff_ffff } else { sector_512 };
        for (to, from) in block.iter_mut().zip(number.to_le_bytes()) {
            *to = from;
        }
        if let Iv::Essiv(cipher) = &self.iv {
            cipher.encrypt_block(&mut block);
        }
        block
    }

    /// Encrypts whole sectors in place; the first has the number `first_512`, in units of 512 bytes. A rest that is not a whole sector stays as it is.
    pub(super) fn encrypt(&self, first_512: u64, sector_size: usize, area: &mut [u8]) {
        for (number, sector) in numbered(first_512, sector_size, area) {
            let iv = self.iv(number);
            match &self.mode {
                Mode::Xts128(xts) => xts.encrypt_sector(sector, iv),
                Mode::Xts256(xts) => xts.encrypt_sector(sector, iv),
                Mode::Cbc128(aes) => cbc_encrypt(aes.as_ref(), iv, sector),
                Mode::Cbc256(aes) => cbc_encrypt(aes.as_ref(), iv, sector),
            }
        }
    }

    /// The reverse of [`Self::encrypt`].
    pub(super) fn decrypt(&self, first_512: u64, sector_size: usize, area: &mut [u8]) {
        for (number, sector) in numbered(first_512, sector_size, area) {
            let iv = self.iv(number);
            match &self.mode {
                Mode::Xts128(xts) => xts.decrypt_sector(sector, iv),
                Mode::Xts256(xts) => xts.decrypt_sector(sector, iv),
                Mode::Cbc128(aes) => cbc_decrypt(aes.as_ref(), iv, sector),
                Mode::Cbc256(aes) => cbc_decrypt(aes.as_ref(), iv, sector),
            }
        }
    }
}

fn numbered(first_512: u64, sector_size: usize, area: &mut [u8]) -> impl Iterator<Item = (u64, &mut [u8])> {
    let sector_size = sector_size.max(512);
    let step = (sector_size / 512) as u64;
    area.chunks_exact_mut(sector_size).scan(first_512, move |number, sector| {
        let this = *number;
        *number = number.wrapping_add(step);
        Some((this, sector))
    })
}

fn xts<C: BlockCipher + KeyInit>(key: &[u8]) -> Option<Box<Xts128<C>>> {
    let (data, tweak) = key.split_at_checked(key.len() / 2)?;
    Some(Box::new(Xts128::new(C::new_from_slice(data).ok()?, C::new_from_slice(tweak).ok()?)))
}

fn xor(block: &mut [u8], with: &[u8]) {
    for (to, from) in block.iter_mut().zip(with) {
        *to ^= from;
    }
}

fn cbc_encrypt<C: BlockCipher>(cipher: &C, iv: Block, sector: &mut [u8]) {
    let mut previous = iv;
    for chunk in sector.chunks_exact_mut(16) {
        xor(&mut previous, chunk);
        cipher.encrypt_block(&mut previous);
        chunk.copy_from_slice(&previous);
    }
}

fn cbc_decrypt<C: BlockCipher>(cipher: &C, iv: Block, sector: &mut [u8]) {
    let mut previous = iv;
    for chunk in sector.chunks_exact_mut(16) {
        let mut block = Block::default();
        block.copy_from_slice(chunk);
        let ciphertext = block;
        cipher.decrypt_block(&mut block);
        xor(&mut block, &previous);
        chunk.copy_from_slice(&block);
        previous = ciphertext;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mode_there_and_back() {
        for (encryption, key_size) in [
            ("aes-xts-plain64", 64),
            ("aes-xts-plain64", 32),
            ("aes-xts-plain", 64),
            ("aes-cbc-essiv:sha256", 32),
            ("aes-cbc-essiv:sha256", 16),
            ("aes-cbc-plain64", 32),
        ] {
            let key: Vec<u8> = (0..key_size).collect();
            let cipher = SectorCipher::new(encryption, &key).unwrap();
            let plain: Vec<u8> = (0..8192u32).map(|n| n.to_le_bytes()[0]).collect();
            let mut area = plain.clone();
            cipher.encrypt(7, 4096, &mut area);
            assert_ne!(area[4096..], plain[4096..], "{encryption}");
            // The second 4096-byte sector has the IV of 512-byte sector 7 + 8.
            cipher.decrypt(7 + 8, 4096, &mut area[4096..]);
            cipher.decrypt(7, 4096, &mut area[..4096]);
            assert_eq!(area, plain, "{encryption}");
        }
    }

    /// IEEE 1619-2007, vector 1: AES-128, key, tweak and plaintext all zero.
    #[test]
    fn xts_vector() {
        let cipher = SectorCipher::new("aes-xts-plain64", &[0; 32]).unwrap();
        let Mode::Xts128(xts) = &cipher.mode else { panic!("not AES-128") };
        let mut data = [0; 32];
        xts.encrypt_sector(&mut data, cipher.iv(0));
        assert_eq!(data[..8], [0x91, 0x7c, 0xf6, 0x9e, 0xbd, 0x68, 0xb2, 0xec]);
    }

    #[test]
    fn unknown_ciphers_are_named() {
        for encryption in ["twofish-xts-plain64", "aes-ctr-plain64", "aes-xts-random", "aes", ""] {
            let Err(why) = SectorCipher::new(encryption, &[1; 64]) else { panic!("{encryption} was taken") };
            assert!(why.to_string().contains(encryption), "{why}");
        }
        assert!(SectorCipher::new("aes-xts-plain64", &[1; 48]).is_err());
    }
}
