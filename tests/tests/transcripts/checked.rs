//! `scripts/pve-check`'s transcript of somebody's Proxmox beside the simulator's: for every kind of request the same statuses, and answers
//! of the same shape. What is left out of it (names, networks, descriptions) is a text in both.
//!
//! `PVE_CHECK_TRANSCRIPT=FILE cargo test -p proxmox-csi-tests --test transcripts -- checked` compares one that a user sent.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use testbed::sim::{STANDARD_SECRET, Simulator};

/// What is where it is by chance, or only on some hosts.
const SOMETIMES: [&str; 6] = [".errors", ".message", "].lock", "].template", "].shared", "].pool"];

/// Kind of request → what was seen of its answers: statuses, and every place with the type of what is there.
type Shapes = BTreeMap<String, BTreeSet<String>>;

/// `GET /nodes/pve1/qemu/101/pending?x` → `GET /nodes/*/qemu/*/pending`
fn kind(call: &str) -> String {
    let call = call.split('?').next().unwrap();
    let mut parts: Vec<&str> = call.split('/').collect();
    for at in 1..parts.len() {
        if ["nodes", "qemu", "lxc", "storage", "content", "tasks"].contains(&parts[at - 1]) {
            parts[at] = "*";
        }
    }
    parts.join("/")
}

fn shape(value: &Value, at: &str, into: &mut BTreeSet<String>) {
    let kind = match value {
        Value::Object(object) => {
            for (key, inner) in object {
                // Its keys are slots.
                let key = if at.ends_with(".blockstat") { "*" } else { key };
                shape(inner, &format!("{at}.{key}"), into);
            }
            return;
        }
        Value::Array(list) => return list.iter().for_each(|inner| shape(inner, &format!("{at}[]"), into)),
        Value::String(_) => "text",
        Value::Number(_) => "number",
        Value::Bool(_) => "bool",
        Value::Null => "null",
    };
    if !SOMETIMES.iter().any(|sometimes| at.contains(sometimes)) {
        into.insert(format!("{at} {kind}"));
    }
}

fn shapes(transcript: &str) -> Shapes {
    let mut shapes = Shapes::new();
    let mut call = "";
    let mut lines = transcript.lines().peekable();
    while let Some(line) = lines.next() {
        if let Some(request) = line.strip_prefix("> ") {
            call = request;
            // Its parameters.
            lines.next_if(|line| line.starts_with('>'));
        } else if let Some(answer) = line.strip_prefix("< ") {
            let seen = shapes.entry(kind(call)).or_default();
            match serde_json::from_str::<Value>(answer) {
                Ok(body) => shape(&body, "", seen),
                Err(_) => drop(seen.insert(format!("status {}", answer.split(' ').next().unwrap()))),
            }
        }
    }
    shapes
}

/// What the one has and the other one has not, of requests that both have.
fn differences(theirs: &Shapes, ours: &Shapes) -> Vec<String> {
    let mut found = Vec::new();
    for (call, theirs) in theirs {
        let Some(ours) = ours.get(call) else { continue };
        found.extend(theirs.difference(ours).map(|one| format!("{call}: {one}: not in the simulator's")));
        found.extend(ours.difference(theirs).map(|one| format!("{call}: {one}: in the simulator's only")));
    }
    found
}

async fn checked() -> String {
    let sim = Simulator::standard().start().await.unwrap();
    let folder = std::env::temp_dir().join(format!("pve-csi-bed-{}-checked", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (config, transcript) = (folder.join("config.yaml"), folder.join("transcript.txt"));
    let text = format!(
        "clusters:\n  - url: {}\n    region: fsn1\n    token_id: csi@pve!csi\n    token_secret: \"{STANDARD_SECRET}\"\n",
        sim.url()
    );
    std::fs::write(&config, text).unwrap();
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_pve-check"));
    command.arg("--config").arg(&config).args(["--vmid", "101", "--storage", "local-lvm"]).arg("--transcript").arg(&transcript);
    let output = command.output().await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let text = std::fs::read_to_string(&transcript).unwrap();
    let _ = std::fs::remove_dir_all(&folder);
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transcript_of_pve_check_is_compared_with_the_simulators() {
    let ours = checked().await;
    let theirs = match std::env::var("PVE_CHECK_TRANSCRIPT") {
        Ok(file) => std::fs::read_to_string(file).unwrap(),
        Err(_) => checked().await,
    };
    let (ours, theirs) = (shapes(&ours), shapes(&theirs));
    // All that the check does is in it, to be compared.
    for call in [
        "GET /version",
        "GET /cluster/resources",
        "POST /nodes/*/storage/*/content",
        "POST /nodes/*/qemu/*/config",
        "GET /nodes/*/qemu/*/pending",
        "PUT /nodes/*/qemu/*/resize",
        "DELETE /nodes/*/storage/*/content/*",
    ] {
        assert!(ours.contains_key(call) && theirs.contains_key(call), "{call} is not in {:?}", theirs.keys());
    }
    let found = differences(&theirs, &ours);
    assert!(found.is_empty(), "{} differences:\n{}", found.len(), found.join("\n"));
}

/// A Proxmox that answers otherwise than the simulator is told by the place.
#[test]
fn a_difference_is_found_by_its_place() {
    let ours =
        "> GET /nodes/pve1/qemu/101/pending\n> /x\n< 200 OK\n< {\"data\":[{\"key\":\"scsi1\",\"value\":\"a:b\"},{\"key\":\"digest\"}]}\n";
    let theirs = "# a step\n\n> GET /nodes/other/qemu/7/pending\n> /x\n< 200 OK\n< {\"data\":[{\"key\":\"scsi1\",\"value\":1}]}\n\n> GET /version\n> /x\n< 500 X\n< oops\n";
    let (ours, theirs) = (shapes(ours), shapes(theirs));
    let call = "GET /nodes/*/qemu/*/pending";
    assert_eq!(
        differences(&theirs, &ours),
        [format!("{call}: .data[].value number: not in the simulator's"), format!("{call}: .data[].value text: in the simulator's only")]
    );
    assert_eq!(theirs["GET /version"], ["status 500".to_string(), "status oops".to_string()].into());
}
