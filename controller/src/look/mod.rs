//! To look inside: numbers for Prometheus, pages for kubelet's probes, and `--check`.
//!
//! Numbers and pages ask neither Proxmox nor Kubernetes for their own sake: an idle controller makes no calls, also when it is scraped.

pub mod check;
pub mod health;
pub mod labels;
pub mod metrics;
