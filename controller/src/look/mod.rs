//! To look inside: numbers for Prometheus, pages for kubelet's probes.
//!
//! Nothing here asks Proxmox or Kubernetes for its own sake: an idle controller makes no calls, also when it is scraped.

pub mod health;
pub mod metrics;
