//! What counts as the same answer: everything but the volatile.

use serde_json::{Map, Value};

/// Numbers of the recorded host and moment; whether they are zero still counts.
const HOST_NUMBERS: [&str; 5] = ["total", "avail", "used", "used_fraction", "ctime"];
/// Numbers that change while one looks.
const MOMENTS: [&str; 18] = [
    "cpu",
    "uptime",
    "mem",
    "pid",
    "pstart",
    "starttime",
    "endtime",
    "snaptime",
    "netin",
    "netout",
    "diskread",
    "diskwrite",
    "pressurecpufull",
    "pressurecpusome",
    "pressureiofull",
    "pressureiosome",
    "pressurememoryfull",
    "pressurememorysome",
];
/// What the recorded host is and runs.
const OF_THE_HOST: [&str; 6] = ["ip", "ssl_fingerprint", "running-machine", "running-qemu", "proxmox-support", "repoid"];

/// An answer without what is volatile, in one order.
pub(crate) fn normal(value: &Value, path: &str) -> Value {
    walk("", value, path)
}

fn walk(key: &str, value: &Value, path: &str) -> Value {
    let in_resources = path.starts_with("/cluster/resources") || path.starts_with("/nodes?") || path == "/nodes";
    match value {
        Value::String(text) if text.starts_with("UPID:") => Value::from(upid(text)),
        Value::String(text) if key == "content" || key == "nodes" => {
            let mut words: Vec<&str> = text.split(',').collect();
            words.sort_unstable();
            words.join(",").into()
        }
        // storage.cfg's digest: its text is not simulated.
        Value::String(_) if key == "digest" && path.starts_with("/storage") => "*".into(),
        // Blocks allocated: the recorded filesystem's business.
        Value::Number(_) if key == "used" && path.contains("/content") => "*".into(),
        Value::Number(number) if HOST_NUMBERS.contains(&key) && path.contains("/storage") => {
            if number.as_f64() == Some(0.0) {
                0.into()
            } else {
                "*".into()
            }
        }
        Value::Number(_) if in_resources && key == "disk" => "*".into(),
        Value::Number(_) if MOMENTS.contains(&key) => "*".into(),
        _ if OF_THE_HOST.contains(&key) => "*".into(),
        Value::Object(object) if key == "blockstat" => Value::Array(object.keys().map(|key| key.clone().into()).collect()),
        Value::Object(object) => {
            let is_node = object.get("type").is_some_and(|kind| kind == "node" || kind == "storage");
            let keep = |(name, value): (&String, &Value)| {
                let sized = is_node && matches!(name.as_str(), "maxdisk" | "maxmem" | "maxcpu");
                (name.clone(), if sized { "*".into() } else { walk(name, value, path) })
            };
            Value::Object(object.iter().map(keep).collect::<Map<String, Value>>())
        }
        Value::Array(list) => {
            let mut list: Vec<Value> = list.iter().map(|item| walk("", item, path)).collect();
            list.sort_by_key(ToString::to_string);
            Value::Array(list)
        }
        other => other.clone(),
    }
}

/// A UPID without process and time.
fn upid(text: &str) -> String {
    let parts: Vec<&str> = text.split(':').collect();
    format!("UPID:{}:*:{}", parts.get(1).unwrap_or(&""), parts.get(5..).unwrap_or_default().join(":"))
}

/// The differences, as lines.
pub(crate) fn differences(recorded: &Value, ours: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    compare("", recorded, ours, &mut lines);
    lines
}

fn compare(at: &str, recorded: &Value, ours: &Value, lines: &mut Vec<String>) {
    match (recorded, ours) {
        (Value::Object(recorded), Value::Object(ours)) => {
            for (key, value) in recorded {
                match ours.get(key) {
                    Some(own) => compare(&format!("{at}.{key}"), value, own, lines),
                    None => lines.push(format!("{at}.{key}: missing, recorded {value}")),
                }
            }
            for (key, own) in ours.iter().filter(|(key, _)| !recorded.contains_key(*key)) {
                lines.push(format!("{at}.{key}: {own}, not in the recording"));
            }
        }
        (Value::Array(recorded), Value::Array(ours)) if recorded.len() == ours.len() => {
            for (index, (value, own)) in recorded.iter().zip(ours).enumerate() {
                compare(&format!("{at}[{index}]"), value, own, lines);
            }
        }
        (recorded, ours) if recorded != ours => lines.push(format!("{at}: {ours}, recorded {recorded}")),
        _ => {}
    }
}
