//! `GET /nodes/{host}/storage/{storage}/content`: which volumes a storage has, and how large they may become.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Method, Request, content_path, list, misread, number_of, text_of};
use crate::pve::Error;

/// All that a storage holds, as one of its nodes sees it. Proxmox filters by one kind only, and containers' disks count, too.
#[must_use]
pub fn contents(host: &str, storage: &str) -> Request {
    Request::new(Method::Get, content_path(host, storage, None))
}

/// Reads [`contents`]: volid → bytes of VMs' and containers' disks; 0 where Proxmox does not know. Volumes of VMs that are hidden from us are left out by Proxmox.
///
/// # Errors
/// No list, or an entry without its volid.
pub fn read_contents(call: &str, data: &Value) -> Result<BTreeMap<String, u64>, Error> {
    let bytes = |entry| number_of(entry, "size").or_else(|| number_of(entry, "approximate-size")).unwrap_or(0);
    let read = |entry| Ok((text_of(entry, "volid").ok_or_else(|| misread(call, "a volume without its volid"))?, bytes(entry)));
    let is_disk = |entry: &&Value| text_of(entry, "content").is_none_or(|content| matches!(content.as_str(), "images" | "rootdir"));
    list(call, data)?.iter().filter(is_disk).map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn volumes_and_their_sizes() {
        assert_eq!(contents("pve1", "ds").target(), "/nodes/pve1/storage/ds/content");
        let data = json!([
            {"volid": "ds:9999/vm-9999-a.raw", "size": 1024, "vmid": 9999, "used": 0},
            {"volid": "ds:iso/talos.iso", "size": 1, "content": "iso"},
            {"volid": "ds:vm-9999-b.qcow2", "content": "rootdir", "approximate-size": "4096"},
            {"volid": "ds:vm-9999-c"},
        ]);
        let read = read_contents("x", &data).unwrap();
        assert_eq!(read.values().copied().collect::<Vec<_>>(), [1024, 4096, 0]);
        assert!(read_contents("x", &json!([{"size": 1}])).is_err() && read_contents("x", &json!({})).is_err());
    }
}
