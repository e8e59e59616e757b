//! The test bed: a Proxmox VE simulator over HTTP and a QEMU guest that hot-plugs as Proxmox does.
#![forbid(unsafe_code)]

pub mod calls;
pub mod cluster;
mod console;
pub mod controller;
mod folder;
pub mod guest;
pub mod history;
pub mod kube;
pub mod machine;
mod process;
pub mod sim;
pub mod storm;
pub mod tools;
