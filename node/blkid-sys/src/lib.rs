//! `libblkid-rs-sys` as this project builds it: the same names as on crates.io, fixed bindings, libblkid's C from its own
//! checksummed release, and a witness of every read that it does.

#![allow(non_camel_case_types, reason = "C's names")]
#![allow(missing_debug_implementations, reason = "C's opaque types")]

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("bindings.rs was generated for 64-bit Linux: generate it again for this target");

mod bindings;
pub mod witness;

pub use bindings::*;
