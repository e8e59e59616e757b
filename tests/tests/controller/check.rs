//! `scripts/pve-check` against the simulator: each step in a line, nothing left, and a transcript without secrets.

use std::process::Output;

use testbed::sim::{Inner, STANDARD_SECRET};

use crate::bed::{Bed, standard};

async fn check(bed: &Bed, vmid: &str, storage: &str) -> (Output, String) {
    let transcript = bed.config.with_file_name("transcript.txt");
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_pve-check"));
    command.args(["--config", bed.config.to_str().unwrap(), "--vmid", vmid, "--storage", storage]);
    command.args(["--transcript", transcript.to_str().unwrap()]);
    let output = command.output().await.unwrap();
    (output, std::fs::read_to_string(&transcript).unwrap_or_default())
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
