//! Random histories: concurrent calls, faults, other hands, in an order that a seed says, and what must be true afterwards.
//!
//! `world` is Proxmox and the controllers under one clock, `plan` what is to happen, `judge` what must be true, `run` makes it
//! happen and looks for the shortest history that still goes wrong.

pub mod chance;
pub mod judge;
pub mod plan;
pub mod run;
pub mod world;

pub use plan::{Act, History, Item};
pub use run::{Failure, check, shrink};
pub use world::{Answer, Claim, Rpc, World, under_paused_time};
