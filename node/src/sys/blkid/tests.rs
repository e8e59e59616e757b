//! What needs libblkid's reads to be seen; what needs the machine's tools is in node/tests/blkid.rs.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;

use super::*;

const MIB: u64 = 1 << 20;
const SIZE_BYTES: u64 = 64 * MIB;

/// An image in a folder of its own, gone when the test is.
struct Image {
    path: PathBuf,
}

impl Image {
    fn blank(name: &str, size_bytes: u64) -> Self {
        let path = std::env::temp_dir().join(format!("proxmox-csi-blkid-{}-{name}", std::process::id()));
        File::create(&path).unwrap().set_len(size_bytes).unwrap();
        Self { path }
    }

    fn probe(&self) -> Result<Found, Error> {
        let file = File::open(&self.path).unwrap();
        probe(file.as_fd(), &self.path, file.metadata().unwrap().len())
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[test]
fn blank_is_nothing_and_every_prober_has_read() {
    for size_bytes in [MIN_SIZE_BYTES, 4 * MIB, SIZE_BYTES, 1 << 40] {
        let image = Image::blank(&format!("blank-{size_bytes}"), size_bytes);
        assert_eq!(image.probe().unwrap(), Found::Nothing, "{size_bytes}");
        let seen = witness::seen();
        assert!(seen.reads > 40 && seen.fault.is_none(), "{size_bytes}: {seen:?}");
    }
}

/// libblkid alone says "nothing" here: its probers take a short read for a device without their signature.
#[test]
fn a_device_that_ends_under_the_probe_is_an_error() {
    for (number, left_bytes) in [0, 512, 1024, 60 * 1024, MIB, SIZE_BYTES - 64 * 1024, SIZE_BYTES - 1].into_iter().enumerate() {
        let image = Image::blank(&format!("short-{number}"), SIZE_BYTES);
        let file = OpenOptions::new().read(true).write(true).open(&image.path).unwrap();
        let mut prober = prepare(file.as_fd(), &image.path, SIZE_BYTES).unwrap();
        file.set_len(left_bytes).unwrap();
        let error = look(&mut prober, &image.path).expect_err(&format!("{left_bytes}"));
        assert_eq!((error.call, error.errno), ("read", Errno::IO), "{left_bytes}: {error}");
        assert!(error.to_string().contains("bytes at byte"), "{error}");
    }
}

#[test]
fn a_device_that_cannot_be_read_is_an_error() {
    let image = Image::blank("unreadable", SIZE_BYTES);
    let write_only = OpenOptions::new().write(true).open(&image.path).unwrap();
    let error = probe(write_only.as_fd(), &image.path, SIZE_BYTES).expect_err("a read cannot have succeeded");
    assert_eq!((error.call, error.errno), ("read", Errno::BADF), "{error}");
}

#[test]
fn a_fault_of_one_probe_is_forgotten_by_the_next() {
    let image = Image::blank("forgotten", SIZE_BYTES);
    let write_only = OpenOptions::new().write(true).open(&image.path).unwrap();
    assert!(probe(write_only.as_fd(), &image.path, SIZE_BYTES).is_err());
    assert_eq!(image.probe().unwrap(), Found::Nothing);
}

#[test]
fn sizes_that_prove_nothing_are_refused() {
    let image = Image::blank("sizes", MIN_SIZE_BYTES - 1);
    assert_eq!(image.probe().map_err(|error| error.errno), Err(Errno::INVAL));
    let image = Image::blank("sizes", SIZE_BYTES);
    let file = File::open(&image.path).unwrap();
    for wrong in [SIZE_BYTES - 512, SIZE_BYTES + 512] {
        let error = probe(file.as_fd(), &image.path, wrong).expect_err("the size is another");
        assert_eq!(error.errno, Errno::AGAIN, "{error}");
    }
}
