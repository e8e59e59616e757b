//! The Proxmox VE simulator: a cluster's API over HTTP or HTTPS, in one process.
//!
//! It knows nothing of our client. It behaves as the sources of Proxmox VE say and as the recordings in `tests/transcripts/` show
//! (`tests/transcripts.rs` plays them all against it). Images are real files; plugging calls the [`crate::machine::Machine`] of the VM,
//! where one is registered. Time is virtual unless asked otherwise: waits of 3, 10 and 30 seconds happen, and cost nothing.
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use testbed::sim::{Effect, Fault, Simulator};
//! let sim = Simulator::standard().start().await?;
//! sim.inject(Fault::next("PUT", "/nodes/*/qemu/*/config", Effect::TimeOutButComplete));
//! println!("{} {}", sim.url(), sim.token());
//! # Ok(())
//! # }
//! ```

mod access;
mod answer;
mod clock;
mod config;
mod content;
mod control;
mod describe;
mod drive;
mod drives;
mod endpoint;
mod faults;
mod handle;
mod hotplug;
pub(crate) mod http;
mod image;
mod inventory;
mod options;
mod params;
mod route;
mod sha1;
mod state;
mod storage;
mod tasks;
#[cfg(test)]
mod tests;
mod tls;
pub(crate) mod turns;
mod update;
mod version;
mod vms;

pub use clock::{Busy, Held, Time};
pub use describe::{Acl, CSI_PRIVILEGES, Description, Node, STANDARD_PASSWORD, STANDARD_SECRET, Storage, Token, User, Vm};
pub use faults::{Effect, Fault, Inner};
pub use handle::{Builder, Simulator, VmState};
pub use state::{Latency, Plugged};
pub use turns::{Door, Waiting};
pub use version::Version;
