//! Proxmox on the wire. Knows no CSI.
pub mod drive;
pub mod error;
