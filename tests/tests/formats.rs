//! Images made by the `disk` crate, judged by strangers: equal to what the machine's mke2fs and mkfs.xfs make, clean for
//! e2fsck and xfs_repair, and seen by blkid for what they are.
//!
//! `PROXMOX_CSI_SEED` repeats a run: the seed is printed, and named in every failure.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

#[path = "formats/ext4.rs"]
mod ext4;
#[path = "../../node/disk/tests/image/mod.rs"]
mod image;
#[path = "formats/judges.rs"]
mod judges;
#[path = "formats/xfs.rs"]
mod xfs;
