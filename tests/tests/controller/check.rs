//! `scripts/pve-check` against the simulator: each step in a line, nothing left, and a transcript without secrets.

use std::process::{Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use testbed::sim::{Effect, Fault, Inner, STANDARD_PASSWORD, STANDARD_SECRET, Simulator};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use crate::bed::{Bed, REGION, standard, with_config};

const CONFIG: &str = "/nodes/*/qemu/101/config";
/// Whatever a test waits for is there long before.
const LIMIT: Duration = Duration::from_secs(240);

fn command(bed: &Bed, vmid: &str, storage: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pve-check"));
    command.args(["--config", bed.config.to_str().unwrap(), "--vmid", vmid, "--storage", storage]);
    command.args(["--transcript", transcript(bed).to_str().unwrap()]);
    command
}

fn transcript(bed: &Bed) -> std::path::PathBuf {
    bed.config.with_file_name("transcript.txt")
}

async fn check(bed: &Bed, vmid: &str, storage: &str) -> (Output, String) {
    let output = command(bed, vmid, storage).output().await.unwrap();
    (output, std::fs::read_to_string(transcript(bed)).unwrap_or_default())
}

async fn signal(child: &Child, name: &str) {
    let pid = child.id().unwrap().to_string();
    assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().await.unwrap().success());
}

/// Until a request of this kind has come.
async fn asked(sim: &Simulator, request: &str) {
    let come = async {
        while !sim.requests().iter().any(|one| one.starts_with(request)) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(LIMIT, come).await.unwrap_or_else(|_| panic!("no {request} in {:?}", sim.requests()));
}

fn nothing_is_left(bed: &Bed, storage: &str) {
    let vm = bed.sim.vm(101).unwrap();
    assert!(vm.plugged.is_empty() && vm.pending.is_empty() && vm.pending_delete.is_empty(), "{vm:?}");
    assert!(bed.sim.volumes("pve1", storage).is_empty(), "{:?}", bed.sim.volumes("pve1", storage));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_good_proxmox_passes_step_by_step() {
    let bed = standard().await;
    bed.sim.set_config(101, "description", Some("payroll of the moon base"));
    let (output, transcript) = check(&bed, "101", "local-lvm").await;
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}");
    let steps: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("ok  ")?.split_whitespace().next()).collect();
    assert_eq!(steps, ["version", "find", "create", "attach", "views", "grow", "detach", "delete"], "{said}");
    nothing_is_left(&bed, "local-lvm");
    for part in ["> POST /nodes/pve1/qemu/101/config", "blockstat", "digest", "< 200 OK"] {
        assert!(transcript.contains(part), "no {part} in the transcript");
    }
    for secret in [STANDARD_SECRET, "PVEAPIToken", "payroll"] {
        assert!(!transcript.contains(secret) && !said.contains(secret), "{secret} is told");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_that_fails_is_said_and_nothing_is_left() {
    let bed = standard().await;
    bed.sim.inject_inner(Inner::PlugFails { vmid: 101, text: "adding drive failed: something".into() }, 1);
    let (output, transcript) = check(&bed, "101", "local-lvm").await;
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(!output.status.success() && said.contains("FAILED") && said.contains("adding drive failed: something"), "{said}");
    assert!(said.contains("ok  tidied"), "{said}");
    assert!(transcript.contains("adding drive failed: something"));
    nothing_is_left(&bed, "local-lvm");
    // Half grown, and the guest keeps the disk for a while.
    bed.sim.inject_inner(Inner::ResizeSecondHalf { vmid: 101 }, 1);
    bed.sim.inject_inner(Inner::ControllerStays { vmid: 101 }, 1);
    let (output, _) = check(&bed, "101", "local-lvm").await;
    assert!(!output.status.success());
    nothing_is_left(&bed, "local-lvm");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_is_said_before_anything_is_made() {
    let bed = standard().await;
    for (vmid, storage, words) in [("999", "local-lvm", "VM 999 is not shown to us"), ("101", "nope", "no such storage")] {
        let (output, _) = check(&bed, vmid, storage).await;
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(!output.status.success() && said.contains(words), "{said}");
    }
    assert!(!bed.sim.requests().iter().any(|request| request.starts_with("POST")));
}

/// Broken off while Proxmox works on the attachment, which then lands: tidied all the same, by each of the signals.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_in_the_middle_of_an_attach_leaves_nothing() {
    tokio::join!(stopped_by("TERM", "terminated"), stopped_by("HUP", "the terminal is gone"), stopped_by("INT", "interrupted"));
}

async fn stopped_by(name: &str, word: &str) {
    let bed = standard().await;
    // The VM's config is somebody else's, and no time passes: the attachment stands there.
    let (frozen, held) = (bed.sim.freeze(), bed.sim.hold_config_lock(101).unwrap());
    let mut child = command(&bed, "101", "local-lvm").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    asked(&bed.sim, "POST /nodes/pve1/qemu/101/config").await;
    signal(&child, name).await;
    // It has heard, and does not give up; nor by another signal.
    let mut said = Vec::new();
    while let Some(line) = tokio::time::timeout(LIMIT, lines.next_line()).await.unwrap().unwrap() {
        said.push(line);
        if said.last().unwrap().contains("tidying") {
            break;
        }
    }
    signal(&child, name).await;
    drop((held, frozen));
    while let Some(line) = tokio::time::timeout(LIMIT, lines.next_line()).await.unwrap().unwrap() {
        said.push(line);
    }
    let said = said.join("\n");
    assert!(!child.wait().await.unwrap().success() && said.contains(&format!("FAILED      {word}")), "{said}");
    assert!(said.contains("ok  tidied") && !said.contains("NOT TIDY"), "{said}");
    assert!(bed.sim.settle().await);
    nothing_is_left(&bed, "local-lvm");
}

/// The answer to the attachment, or to the creation, is lost, and Proxmox carries it out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_answer_leaves_nothing() {
    for (path, effect) in [
        (CONFIG, Effect::TimeOutButComplete),
        (CONFIG, Effect::CloseAfterwards),
        ("/nodes/*/storage/*/content", Effect::TimeOutButComplete),
        ("/nodes/*/storage/*/content", Effect::CloseAfterwards),
    ] {
        let bed = standard().await;
        bed.sim.inject(Fault::next("POST", path, effect.clone()));
        let (output, _) = check(&bed, "101", "local-lvm").await;
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() || said.contains("ok  tidied"), "{path} {effect:?}: {said}");
        assert!(!said.contains("NOT TIDY"), "{said}");
        assert!(bed.sim.settle().await);
        nothing_is_left(&bed, "local-lvm");
    }
}

/// With a password there are three secrets: it, the ticket, and what each write carries beside the ticket.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_login_leaves_no_secret_in_the_transcript() {
    let sim = Arc::new(Simulator::standard().start().await.unwrap());
    let text =
        format!("clusters:\n  - url: {}\n    region: {REGION}\n    username: csi@pve\n    password: {STANDARD_PASSWORD}\n", sim.url());
    let bed = with_config(sim, &text);
    let (output, transcript) = check(&bed, "101", "local-lvm").await;
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}");
    assert!(bed.sim.requests().iter().any(|request| request == "POST /access/ticket"));
    assert!(transcript.contains("> POST /nodes/pve1/qemu/101/config"));
    for secret in [STANDARD_PASSWORD, "PVE:csi", "PVE%3Acsi", "CSRF", "access/ticket", "PVEAuthCookie"] {
        assert!(!transcript.contains(secret) && !said.contains(secret), "{secret} is told");
    }
}
