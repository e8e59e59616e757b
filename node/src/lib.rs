//! The node agent of proxmox-csi: finds, formats, mounts and grows volumes by direct system calls.
//!
//! gRPC → `request` (typed) → `plan` (pure: what next) → `run` (acts, looks again) → `sys` (kernel) and `disk` (bytes).
//! It starts no other program and keeps no state: the kernel is the state, and we look.

pub mod error;
pub mod format;
pub mod health;
pub mod identity;
pub mod info;
pub mod kill;
pub mod label;
pub mod metrics;
pub mod plan;
pub mod probe;
pub(crate) mod pulse;
pub mod registration;
pub mod request;
pub mod run;
pub mod service;
pub mod status;
pub mod sys;
pub mod trim;

#[cfg(test)]
mod testing;
