//! A Kubernetes Node's labels, for the node agent: it does not speak to Kubernetes itself, and the downward API gives it the Node's region
//! and zone from Kubernetes 1.35 on only (docs/decisions.md). Before, an init container of its pod writes them down.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use crate::kube::Kube;

/// The agent looks at these, the reference driver's own first.
const PLACES: [(&str, &[&str]); 2] = [
    ("region", &["topology.proxmox.sinextra.dev/region", proto::TOPOLOGY_REGION]),
    ("zone", &["topology.proxmox.sinextra.dev/node", "topology.proxmox.sinextra.dev/zone", proto::TOPOLOGY_ZONE]),
];

/// The labels of `node` as the downward API writes a pod's: `key="value"`, a line each.
///
/// # Errors
/// A sentence: Kubernetes does not answer, there is no such Node, or it does not say its place yet: then it is to be asked again.
pub async fn read(kube: &Arc<Kube>, node: &str) -> Result<String, String> {
    // A name would lead elsewhere with a slash in it.
    if node.is_empty() || !node.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-.".contains(&byte)) {
        return Err(format!("{node:?} is no name of a Node"));
    }
    let object = kube.object(format!("/api/v1/nodes/{node}")).await?.ok_or_else(|| format!("there is no Node {node}"))?;
    lines(node, &object)
}

fn lines(node: &str, object: &Value) -> Result<String, String> {
    let labels = object.pointer("/metadata/labels").and_then(Value::as_object);
    let value = |key: &str| labels.and_then(|labels| labels.get(key)).and_then(Value::as_str).filter(|value| !value.is_empty());
    for (what, keys) in PLACES {
        if !keys.iter().any(|key| value(key).is_some()) {
            let key = keys.last().copied().unwrap_or_default();
            return Err(format!(
                "Node {node} holds no label {key} yet, so that its {what} is unknown; kubectl label node {node} {key}=NAME"
            ));
        }
    }
    let mut text = String::new();
    for (key, value) in labels.into_iter().flatten() {
        // Kubernetes lets nothing into a label that needs quoting; what had it all the same would forge a line.
        let value = value.as_str().unwrap_or_default();
        if value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)) {
            let _ = writeln!(text, "{key}=\"{value}\"");
        }
    }
    Ok(text)
}

/// Puts the text in place at once, so that nobody reads half of it.
///
/// # Errors
/// It cannot be written.
pub fn write(to: &Path, text: &str) -> Result<(), String> {
    let failed = |cause: std::io::Error| format!("{}: {cause}", to.display());
    let part = to.with_extension("part");
    std::fs::write(&part, text).map_err(failed)?;
    std::fs::rename(&part, to).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn labels_are_written_as_the_downward_api_does() {
        let node = |labels: Value| json!({"metadata": {"name": "w1", "labels": labels}});
        let all = json!({"topology.kubernetes.io/region": "fsn1", "topology.kubernetes.io/zone": "pve-1", "forged": "a\"\nzone=\"b", "empty": ""});
        assert_eq!(
            lines("w1", &node(all)).unwrap(),
            "empty=\"\"\ntopology.kubernetes.io/region=\"fsn1\"\ntopology.kubernetes.io/zone=\"pve-1\"\n"
        );
        let own = json!({"topology.proxmox.sinextra.dev/region": "a", "topology.proxmox.sinextra.dev/node": "b"});
        assert!(lines("w1", &node(own)).is_ok(), "the reference driver's override labels");
        let why = lines("w1", &node(json!({"topology.kubernetes.io/region": "a"}))).unwrap_err();
        assert!(why.contains("Node w1 holds no label topology.kubernetes.io/zone"), "{why}");
        assert!(lines("w1", &json!({})).is_err());
    }
}
