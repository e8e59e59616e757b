//! The controller: drives the Proxmox API for Kubernetes' CSI sidecars.
//!
//! `service` takes gRPC, `request` and `parameters` make it typed, `placement` and `attach` decide, `run` acts through
//! `pve`. A library, so that the tests run the same code as the binary.
#![forbid(unsafe_code)]

pub mod attach;
pub mod config;
pub mod deadline;
pub mod error;
pub mod fence;
pub mod kube;
pub mod look;
pub mod mutable;
pub mod parameters;
pub mod placement;
pub mod pve;
mod reading;
pub mod request;
pub mod run;
pub mod secret;
pub mod service;
pub mod threads;
