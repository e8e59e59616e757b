//! The agent itself: what it gave up, how kubelet gets to know it, and what it says of the machine.

use std::time::Duration;

use proto::csi::NodeGetInfoRequest;
use proto::pluginregistration::registration_client::RegistrationClient;
use proto::pluginregistration::{InfoRequest, RegistrationStatus};
use testbed::calls::Calls;
use testbed::guest::{Ended, Guest, GuestOptions, Program, wait};
use testbed::machine::PluggedDrive;

use crate::harness::{Agent, Image, MIB, NODE_ID, SEEN_LIMIT, boot, handle, start_node, wait_for_size};

/// kubelet's, as the agent's pod has it mounted.
const PLUGINS_REGISTRY: &str = "/var/lib/kubelet/plugins_registry";

/// A subcommand looks once and ends; under TCG on a loaded machine that takes a second.
const SUBCOMMAND_LIMIT: Duration = Duration::from_secs(60);

/// `kubectl exec` in the agent's pod.
fn subcommand<'a>(args: &'a [&'a str]) -> Program<'a> {
    Program {
        label: "exec",
        root: Some("/node"),
        program: "/proxmox-csi-node",
        args,
        env: &[("NODE_NAME", "guest-1/101"), ("REGION", "region-1"), ("ZONE", "pve-1")],
    }
}

fn exec(guest: &Guest, args: &[&str]) -> Ended {
    guest.run(&subcommand(args), SUBCOMMAND_LIMIT).unwrap()
}

#[test]
fn guest_agent_is_confined() {
    let Some(guest) = boot(&GuestOptions::named("confined").with_node()) else { return };
    guest.make_folder(&format!("/node{PLUGINS_REGISTRY}")).unwrap();
    let socket = "/csi/csi.sock";
    let job = start_node(&guest, &[("PLUGIN_REGISTRATION_PATH", PLUGINS_REGISTRY), ("KUBELET_REGISTRATION_PATH", socket)]);
    let agent = Agent { calls: guest.node().unwrap(), guest, job };
    kubelet_registers(&agent, socket);
    let status = agent.guest.read(&format!("/proc/{}/status", agent.job.pid)).unwrap();
    let value = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim().to_string();
    // SYS_ADMIN 21, SYS_RESOURCE 24, DAC_READ_SEARCH 2, SYSLOG 34, MKNOD 27.
    let kept = format!("{:016x}", 1_u64 << 21 | 1 << 24 | 1 << 2 | 1 << 34 | 1 << 27);
    for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
        assert_eq!(value(set), kept, "{set} {status}");
    }
    for set in ["CapInh:", "CapAmb:"] {
        assert_eq!(value(set), format!("{:016x}", 0), "{set} {status}");
    }
    assert_eq!((value("NoNewPrivs:"), value("Seccomp:")), ("1".into(), "2".into()), "{status}");

    // The same, tried: exec, ptrace, modules, network sockets and the rest.
    let tried = exec(&agent.guest, &["confinement"]);
    assert_eq!(tried.exit.code, Some(0), "{}", tried.output);
    for word in ["execve", "ptrace", "finit_module", "IPv4", "IPv6"] {
        let line = tried.output.lines().find(|line| line.contains(word)).unwrap_or_default();
        assert!(line.starts_with("refused "), "{word}: {}", tried.output);
    }
    let (_, log) = agent.guest.output(agent.job).unwrap();
    assert!(!log.contains("could not be"), "{log}");
    agent.guest.power_off().unwrap();
}

/// kubelet's part, as pkg/kubelet/pluginmanager does it: GetInfo on the socket in its folder, NodeGetInfo on the endpoint that it was
/// told, NotifyRegistrationStatus. From inside the confinement, which allows unix sockets alone.
fn kubelet_registers(agent: &Agent, socket: &str) {
    let offered = wait::until(SEEN_LIMIT, || {
        let names = agent.guest.list(&format!("/node{PLUGINS_REGISTRY}"))?;
        Ok::<_, anyhow::Error>(names.contains(&format!("{}-reg.sock", proto::DRIVER_NAME)).then_some(()))
    });
    assert!(offered.unwrap().is_some(), "nothing is offered to kubelet; {}", agent.guest.quote());
    let kubelet = Calls::port(agent.guest.registration_port()).unwrap();
    let mut registration = RegistrationClient::new(kubelet.channel());
    let info = kubelet.wait(registration.get_info(InfoRequest {})).unwrap().into_inner();
    assert_eq!((info.r#type.as_str(), info.name.as_str(), info.endpoint.as_str()), ("CSIPlugin", proto::DRIVER_NAME, socket));
    assert_eq!(info.supported_versions, ["1.0.0"]);
    let who = agent.calls.node_get_info(NodeGetInfoRequest {}).unwrap();
    assert_eq!((who.node_id.as_str(), who.max_volumes_per_node), (NODE_ID, 29));
    let registered = RegistrationStatus { plugin_registered: true, error: String::new() };
    kubelet.wait(registration.notify_registration_status(registered)).unwrap();
    let (_, log) = agent.guest.output(agent.job).unwrap();
    assert!(log.contains("kubelet has not answered yet"), "{log}");
    let is_ready = wait::until(SEEN_LIMIT, || {
        let (_, log) = agent.guest.output(agent.job)?;
        Ok::<_, anyhow::Error>(log.lines().any(|line| line.trim_end().ends_with("ready") && !line.contains("not ready")).then_some(()))
    });
    assert!(is_ready.unwrap().is_some(), "kubelet's word was not heard; {}", agent.guest.quote());
}

#[test]
fn guest_status_shows_disks_and_disagreements() {
    let Some(agent) = Agent::start("status") else { return };
    let (staged, waiting) = (handle("status-1"), handle("status-2"));
    let images = [Image::new(64 * MIB), Image::new(32 * MIB), Image::new(32 * MIB)];
    let volume = agent.attach(&staged, &images[0], 3);
    agent.stage(&volume);
    agent.publish(&volume);
    note(&agent, &volume.staging, &staged.to_string());
    agent.attach(&waiting, &images[1], 4);
    agent.guest.machine().plug(&PluggedDrive { wwn: None, ..images[2].drive(5, Some("database")) }).unwrap();
    wait_for_size(&agent.guest, 5, Some(32 * MIB));

    let shown = exec(&agent.guest, &["status"]);
    assert_eq!(shown.exit.code, Some(0), "{}", shown.output);
    for words in [
        "node guest-1/101, region region-1, zone pve-1, 28 volumes at most".to_string(),
        "LUN 3, 67108864 bytes (64 MiB), running".into(),
        format!("serial   {}", staged.serial()),
        "WWN      naa.5056432d49443033".into(),
        "holds    ext4 filesystem, UUID ".into(),
        "holds    nothing that is known".into(),
        format!("volume   {staged}"),
        format!("mounted  {} (ext4)", volume.staging),
        format!("mounted  {} (ext4)", volume.target),
        "LUN 4, 33554432 bytes".into(),
        "is attached, but kubelet keeps no volume for it".into(),
        "is not this driver's and takes slot 5 of 1 to 29".into(),
        "SCSI disks: 3, disagreements: ".into(),
    ] {
        assert!(shown.output.contains(&words), "{words:?} is missing:\n{}", shown.output);
    }

    // As JSON, while no agent runs; and nothing was changed by looking.
    agent.guest.signal(agent.job, 9).unwrap();
    agent.guest.wait(agent.job, SUBCOMMAND_LIMIT).unwrap();
    let shown = exec(&agent.guest, &["status", "--json"]);
    let line = shown.output.lines().find(|line| line.starts_with('{')).unwrap_or_default();
    let json: serde_json::Value = serde_json::from_str(line).unwrap();
    let disk = json["disks"].as_array().unwrap().iter().find(|disk| disk["lun"] == 3).unwrap().clone();
    assert_eq!((disk["volume"].as_str(), disk["sizeBytes"].as_u64()), (Some(staged.to_string().as_str()), Some(64 * MIB)), "{json}");
    assert_eq!(disk["mounts"].as_array().unwrap().len(), 2, "{json}");
    assert_eq!(json["node"]["maxVolumes"], 28, "{json}");
    assert!(images[1].bytes().iter().all(|byte| *byte == 0), "status only reads");

    // One that does not answer: all is said, and the process ends when the kernel lets go of the read.
    agent.throttle(4, serde_json::json!({ "bps-read": 1 }));
    let job = agent.guest.spawn(&subcommand(&["status"])).unwrap();
    let said = wait::until(SUBCOMMAND_LIMIT, || {
        let (_, output) = agent.guest.output(job)?;
        Ok::<_, anyhow::Error>(output.contains("SCSI disks: 3, disagreements: ").then_some(output))
    });
    let output = said.unwrap().expect("status waits for a disk that does not answer");
    for words in ["does not answer within 5 s", "holds    ext4 filesystem, UUID "] {
        assert!(output.contains(words), "{words:?} is missing:\n{output}");
    }
    agent.throttle(4, serde_json::json!({ "bps-read": 0 }));
    // What QEMU holds back waits for its old time, unless all I/O is drained.
    agent.guest.monitor("stop", serde_json::json!({})).unwrap();
    agent.guest.monitor("cont", serde_json::json!({})).unwrap();
    assert_eq!(agent.guest.wait(job, SUBCOMMAND_LIMIT).unwrap().exit.code, Some(0));
    agent.guest.power_off().unwrap();
}

/// kubelet's own note of a staged volume.
fn note(agent: &Agent, staging: &str, volume: &str) {
    let folder = staging.rsplit_once('/').unwrap().0;
    let json = format!("{{\"driverName\":\"{}\",\"volumeHandle\":\"{volume}\"}}", proto::DRIVER_NAME);
    agent.guest.write(&format!("/node{folder}/vol_data.json"), json.as_bytes()).unwrap();
}
