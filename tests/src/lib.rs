//! The test bed: a Proxmox VE simulator over HTTP and a QEMU guest that hot-plugs as Proxmox does.
#![forbid(unsafe_code)]

pub mod calls;
pub mod guest;
pub mod machine;
pub mod sim;
pub mod tools;
