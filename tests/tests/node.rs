//! The node agent's release binary on a real kernel, with disks hot-plugged as Proxmox does it.
//!
//! `guest_…`: QEMU and the guest's kernel are needed; without them a test says SKIPPED, under CI it fails.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may fail by panicking")]

#[path = "node/agent.rs"]
mod agent;
#[path = "node/ciphertext.rs"]
mod ciphertext;
#[path = "node/crash.rs"]
mod crash;
#[path = "node/dm.rs"]
mod dm;
#[path = "node/hang.rs"]
mod hang;
#[path = "node/harness.rs"]
mod harness;
#[path = "node/health.rs"]
mod health;
#[path = "node/kernels.rs"]
mod kernels;
#[path = "node/keys.rs"]
mod keys;
#[path = "node/kill.rs"]
mod kill;
#[path = "node/left.rs"]
mod left;
#[path = "node/life.rs"]
mod life;
#[path = "node/limits.rs"]
mod limits;
#[path = "node/luks.rs"]
mod luks;
#[path = "node/luks_foreign.rs"]
mod luks_foreign;
#[path = "node/matrix.rs"]
mod matrix;
#[path = "node/modes.rs"]
mod modes;
#[path = "node/plug.rs"]
mod plug;
#[path = "node/selinux.rs"]
mod selinux;
#[path = "node/surfaces.rs"]
mod surfaces;
#[path = "node/together.rs"]
mod together;
#[path = "node/trim.rs"]
mod trim;
#[path = "node/xfs.rs"]
mod xfs;
#[path = "node/zeros.rs"]
mod zeros;
