//! Device-mapper and kernel keyrings: the node's own tests of them, on the guest's kernel.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use testbed::guest::{GuestOptions, Profile, Program, with_libraries};

use crate::harness::{Image, MIB, SEEN_LIMIT, boot};
use testbed::guest::wait;

/// The tests take seconds; TCG on a loaded machine takes more.
const TESTS_LIMIT: Duration = Duration::from_secs(120);

/// The node's unit tests as one program, built by cargo where it is not yet.
fn unit_tests() -> PathBuf {
    let arguments = ["test", "--quiet", "--no-run", "-p", "proxmox-csi-node", "--lib", "--message-format=json"];
    let output = Command::new("cargo").args(arguments).current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8_lossy(&output.stdout);
    let messages = lines.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    messages.into_iter().find_map(|message| message["executable"].as_str().map(PathBuf::from)).expect("cargo names the program")
}

/// `kernel_…` tests of the node's sys, one at a time, with a blank disk.
fn run(name: &str, kernel: &str, profile: Profile) {
    let options = GuestOptions { kernel: kernel.into(), profile, memory_mib: 512, ..GuestOptions::named(name) };
    if testbed::guest::unavailable().is_some() {
        // Says so.
        drop(boot(&options));
        return;
    }
    let program = unit_tests();
    // Not at its own path: the project may lie below /tmp, which is the guest's own.
    let place = "/unit-tests".to_string();
    let files = with_libraries(&program).unwrap().into_iter();
    let files = files.map(|(path, file)| if file == program { (place.clone(), file) } else { (path, file) }).collect();
    let Some(guest) = boot(&GuestOptions { files, ..options }) else { return };
    let image = Image::new(64 * MIB);
    guest.machine().plug(&image.drive(1, Some("csi-0"))).unwrap();
    let disk = wait::until(SEEN_LIMIT, || guest.disk_at(1)).unwrap().expect("the disk appears");
    let program = Program {
        label: "unit tests",
        program: &place,
        args: &["--ignored", "--test-threads=1", "kernel_"],
        env: &[("PROXMOX_CSI_TEST_DISK", &format!("/dev/{disk}"))],
        ..Program::default()
    };
    let ended = guest.run(&program, TESTS_LIMIT).unwrap();
    assert_eq!(ended.exit.code, Some(0), "{}", ended.output);
    assert!(ended.output.contains("kernel_a_mapping_lives_and_grows ... ok"), "{}", ended.output);
    println!("{}", ended.output);
    guest.power_off().unwrap();
}

#[test]
fn guest_device_mapper() {
    run("dm", &GuestOptions::default().kernel, Profile::Debian);
}

#[test]
fn guest_device_mapper_of_kernel_6_12() {
    run("dm-6.12", "6.12", Profile::Talos);
}
