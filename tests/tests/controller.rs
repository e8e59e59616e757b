//! Every controller RPC against the Proxmox simulator, in one process: the same code as the binary, without its socket.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may fail by panicking")]

#[path = "controller/attach.rs"]
mod attach;
#[path = "controller/batch.rs"]
mod batch;
#[path = "controller/bed.rs"]
mod bed;
#[path = "controller/capacity.rs"]
mod capacity;
#[path = "controller/check.rs"]
mod check;
#[path = "controller/claims.rs"]
mod claims;
#[path = "controller/create.rs"]
mod create;
#[path = "controller/dead.rs"]
mod dead;
#[path = "controller/defects.rs"]
mod defects;
#[path = "controller/detach.rs"]
mod detach;
#[path = "controller/events.rs"]
mod events;
#[path = "controller/expand.rs"]
mod expand;
#[path = "controller/flows.rs"]
mod flows;
#[path = "controller/hold.rs"]
mod hold;
#[path = "controller/kube.rs"]
mod kube;
#[path = "controller/lease.rs"]
mod lease;
#[path = "controller/life.rs"]
mod life;
#[path = "controller/list.rs"]
mod list;
#[path = "controller/look.rs"]
mod look;
#[path = "controller/modify.rs"]
mod modify;
#[path = "controller/nodes.rs"]
mod nodes;
#[path = "controller/owner.rs"]
mod owner;
#[path = "controller/privileges.rs"]
mod privileges;
#[path = "controller/process.rs"]
mod process;
#[path = "controller/race.rs"]
mod race;
#[path = "controller/rivals.rs"]
mod rivals;
#[path = "controller/spread.rs"]
mod spread;
#[path = "controller/storages.rs"]
mod storages;
#[path = "controller/takeover.rs"]
mod takeover;
#[path = "controller/trouble.rs"]
mod trouble;
#[path = "controller/urls.rs"]
mod urls;
