//! The report for people, and as JSON.

use std::fmt::Write as _;

use crate::identity;
use crate::sys::scsi::State;

use super::{Report, Seen};

impl Report {
    /// Some lines a disk, and the disagreements.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        let _ = match &self.identity {
            Ok(info) => {
                writeln!(out, "node {}, region {}, zone {}, {} volumes at most", info.node_id, info.region, info.zone, info.max_volumes)
            }
            Err(why) => writeln!(out, "node: {why}"),
        };
        for seen in &self.disks {
            out.push('\n');
            disk(&mut out, seen);
        }
        let count = match self.disagreements.len() {
            0 => "none".to_string(),
            count => count.to_string(),
        };
        let _ = writeln!(out, "\nSCSI disks: {}, disagreements: {count}", self.disks.len());
        for sentence in &self.disagreements {
            let _ = writeln!(out, "- {sentence}");
        }
        out
    }

    /// One object, on one line.
    #[must_use]
    pub fn json(&self) -> String {
        let node = match &self.identity {
            Ok(info) => object(&[
                ("id", text(&info.node_id)),
                ("region", text(&info.region)),
                ("zone", text(&info.zone)),
                ("maxVolumes", info.max_volumes.to_string()),
            ]),
            Err(why) => object(&[("unknown", text(why))]),
        };
        object(&[
            ("version", text(env!("CARGO_PKG_VERSION"))),
            ("node", node),
            ("disks", list(self.disks.iter().map(disk_json))),
            ("disagreements", list(self.disagreements.iter().map(|sentence| text(sentence)))),
        ])
    }
}

fn state(state: State) -> &'static str {
    match state {
        State::Running => "running",
        State::Offline => "offline",
        State::Passing => "passing",
    }
}

fn disk(out: &mut String, seen: &Seen) {
    let disk = &seen.disk;
    let read_only = if disk.read_only { ", read-only" } else { "" };
    let _ = writeln!(
        out,
        "{}  LUN {}, {} bytes ({} MiB), {}{read_only}",
        identity::name(disk),
        disk.address.lun,
        disk.size_bytes,
        disk.size_bytes >> 20,
        state(disk.state)
    );
    let mut line = |what: &str, value: &str| {
        let _ = writeln!(out, "  {what:8} {value}");
    };
    line("serial", disk.serial.as_deref().unwrap_or("none"));
    line("WWN", disk.wwid.as_deref().unwrap_or("none"));
    match &seen.holds {
        Ok(what) => line("holds", what),
        Err(why) => line("holds", &format!("unknown: {why}")),
    }
    for mapping in &seen.mappings {
        let named = mapping.name.as_deref().map(|name| format!(", {name}")).unwrap_or_default();
        line("mapping", &format!("{}{named}", mapping.device));
    }
    line("volume", seen.volume.as_deref().unwrap_or("none known"));
    for mount in &seen.mounts {
        let read_only = if mount.read_only || mount.filesystem_read_only { ", read-only" } else { "" };
        line("mounted", &format!("{} ({}{read_only})", mount.point.display(), mount.fstype));
    }
}

fn disk_json(seen: &Seen) -> String {
    let disk = &seen.disk;
    let maybe = |value: Option<&str>| value.map_or_else(|| "null".to_string(), text);
    let mappings = seen.mappings.iter().map(|mapping| {
        object(&[("device", text(&mapping.device)), ("name", maybe(mapping.name.as_deref())), ("uuid", maybe(mapping.uuid.as_deref()))])
    });
    let mounts = seen.mounts.iter().map(|mount| {
        let read_only = mount.read_only || mount.filesystem_read_only;
        object(&[("path", text(&mount.point.to_string_lossy())), ("filesystem", text(&mount.fstype)), ("readOnly", read_only.to_string())])
    });
    object(&[
        ("name", text(&disk.name)),
        ("address", text(&disk.address.to_string())),
        ("lun", disk.address.lun.to_string()),
        ("wwn", maybe(disk.wwid.as_deref())),
        ("serial", maybe(disk.serial.as_deref())),
        ("sizeBytes", disk.size_bytes.to_string()),
        ("state", text(state(disk.state))),
        ("readOnly", disk.read_only.to_string()),
        ("holds", maybe(seen.holds.as_deref().ok())),
        ("unreadable", maybe(seen.holds.as_ref().err().map(String::as_str))),
        ("mappings", list(mappings)),
        ("mounts", list(mounts)),
        ("volume", maybe(seen.volume.as_deref())),
    ])
}

fn object(members: &[(&str, String)]) -> String {
    format!("{{{}}}", members.iter().map(|(key, value)| format!("{}:{value}", text(key))).collect::<Vec<_>>().join(","))
}

fn list(items: impl Iterator<Item = String>) -> String {
    format!("[{}]", items.collect::<Vec<_>>().join(","))
}

/// RFC 8259, 7.
fn text(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if c < ' ' => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_texts_are_escaped() {
        assert_eq!(text("a\"b\\c\nd\u{1f}é"), "\"a\\\"b\\\\c\\u000ad\\u001fé\"");
    }
}
