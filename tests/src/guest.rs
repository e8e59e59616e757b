//! The QEMU guest.
