//! The label of a mount, on a kernel with SELinux: without a policy, with one on a machine that is not Talos, and on one that says it is.
//!
//! The policy (`selinux.conf`) is ours, with Talos' names. The kernel judges by it, enforcing and permissive. What the agent takes for Talos
//! (the kernel's release) is shown to it by a bind mount.

use std::process::Command;

use proto::csi;
use testbed::calls::{NodeVolume, mount_capability};
use testbed::guest::GuestOptions;
use testbed::tools;
use tonic::Code;

use crate::harness::{Agent, Image, MIB, assert_clean, handle};
use crate::modes::{mount_line, refused, with_flags};
use crate::xfs::assert_clean_xfs;

const SELINUX: &str = "/sys/fs/selinux";
const DEFAULT: &str = "system_u:object_r:ephemeral_t:s0";
const OWN: &str = "system_u:object_r:class_t:s0:c0,c2";
/// Of what has none of its own on an ext4 or xfs.
const UNLABELLED: &str = "system_u:object_r:file_t:s0";

/// The binary policy that the kernel takes; `None`, after saying so, where nothing compiles it.
fn compiled(policy: &str, agent: &Agent) -> Option<Vec<u8>> {
    let Some(checkpolicy) = tools::program("checkpolicy") else {
        tools::skipped("checkpolicy is missing: no policy");
        return None;
    };
    let (source, binary) = (agent.guest.folder().join("policy.conf"), agent.guest.folder().join("policy"));
    std::fs::write(&source, policy).unwrap();
    // 33 is what 6.1 knows at most, and the version of Talos' own. -U: what the policy does not name is allowed.
    let output = Command::new(checkpolicy).args(["-M", "-U", "allow", "-c", "33", "-o"]).args([&binary, &source]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(std::fs::read(binary).unwrap())
}

fn load(agent: &Agent, policy: &[u8]) {
    agent.guest.write_at(&format!("{SELINUX}/load"), 0, policy).unwrap();
}

fn enforce(agent: &Agent, is_enforced: bool) {
    let word: &[u8] = if is_enforced { b"1" } else { b"0" };
    agent.guest.write_at(&format!("{SELINUX}/enforce"), 0, word).unwrap();
    assert_eq!(agent.guest.read(&format!("{SELINUX}/enforce")).unwrap().as_bytes(), word);
}

fn context(label: &str) -> String {
    format!("context=\"{label}\"")
}

/// What the mount table says of the label: the option's value, without quotes.
fn mounted_label(agent: &Agent, path: &str) -> Option<String> {
    let line = mount_line(agent, path);
    // A label has commas, and is in quotes then.
    let (_, rest) = line.split_once("context=")?;
    let end = if let Some(quoted) = rest.strip_prefix('"') { quoted.split('"').next() } else { rest.split([',', ' ']).next() };
    end.map(str::to_owned)
}

/// Of the mount, and of what a pod makes there.
fn assert_labelled(agent: &Agent, volume: &NodeVolume, label: &str) {
    for path in [&volume.staging, &volume.target] {
        assert_eq!(mounted_label(agent, path).as_deref(), Some(label), "{}", mount_line(agent, path));
    }
    let file = format!("/node{}/of-a-pod", volume.target);
    agent.guest.write(&file, b"x").unwrap();
    assert_eq!(agent.guest.label(&file).unwrap(), label);
}

/// Without a policy no label is added, and none is taken. With one, on another system than Talos, none is added. On Talos volumes get its label,
/// the class' own wins, and what the kernel refuses is refused in its words; as ext4 and as xfs.
#[test]
fn guest_labels_with_and_without_a_policy() {
    let options = GuestOptions { kernel_options: "security=selinux selinux=1 enforcing=0".into(), ..GuestOptions::named("selinux") };
    let Some(mut agent) = Agent::start_on(&options.with_node()) else { return };
    if agent.guest.stat(SELINUX).unwrap().is_none() {
        return tools::skipped("the guest's kernel is built without SELinux");
    }
    let source = include_str!("selinux.conf");
    let (Some(policy), Some(without)) = (compiled(source, &agent), compiled(&source.replace("ephemeral_t", "unheard_of_t"), &agent)) else {
        return;
    };
    let (handle, image) = (handle("label"), Image::new(64 * MIB));
    let volume = agent.attach(&handle, &image, 1);
    without_a_policy(&agent, &volume);

    agent.guest.mount("none", SELINUX, "selinuxfs", false).unwrap();
    load(&agent, &policy);
    agent.restart();
    assert_eq!(agent.guest.read(&format!("/proc/{}/attr/current", agent.job.pid)).unwrap(), "system_u:system_r:pod_t:s0\0");
    agent.stage(&volume);
    assert_eq!(mounted_label(&agent, &volume.staging), None, "not Talos: the class or kubelet says it");
    agent.calls.node_unstage_volume(volume.unstage()).unwrap();

    pretend_talos(&agent);
    let xfs_image = Image::new(316 * MIB);
    let xfs = NodeVolume { capability: mount_capability("xfs"), ..agent.attach(&crate::harness::handle("label-xfs"), &xfs_image, 2) };
    for volume in [&volume, &xfs] {
        enforce(&agent, true);
        labels(&mut agent, volume);
        refusals(&agent, volume);
        no_label(&agent, volume, true);
        enforce(&agent, false);
        no_label(&agent, volume, false);
    }
    another_label_where_one_is_mounted(&agent, &volume);
    load(&agent, &without);
    a_policy_without_the_label(&agent, &volume);
    agent.detach(1);
    agent.detach(2);
    assert_clean(&image);
    assert_clean_xfs(&xfs_image.0);
    agent.guest.power_off().unwrap();
}

/// That is about the label, and nothing is said to be damaged.
fn without_a_policy(agent: &Agent, volume: &NodeVolume) {
    let status = agent.calls.node_stage_volume(with_flags(volume, &[&context(DEFAULT)]).stage()).unwrap_err();
    println!("{}", status.message());
    assert_eq!(status.code(), Code::Internal, "{status:?}");
    assert!(status.message().contains("EINVAL") && !status.message().contains("kubectl debug"), "{status:?}");
    assert!(status.message().contains("before the security server is initialized"), "the kernel's words: {status:?}");
    // Nothing is added. And with an empty label nothing would be, whatever is loaded.
    for flags in [&[] as &[&str], &["context=", "noatime"]] {
        let volume = with_flags(volume, flags);
        agent.stage(&volume);
        assert_eq!(mounted_label(agent, &volume.staging), None);
        agent.calls.node_unstage_volume(volume.unstage()).unwrap();
    }
}

fn pretend_talos(agent: &Agent) {
    agent.guest.write("/run/osrelease", b"6.18.45-talos\n").unwrap();
    agent.guest.bind("/run/osrelease", "/node/proc/sys/kernel/osrelease").unwrap();
}

/// The default one and the class' own, each repeated, and by an agent that has just been started.
fn labels(agent: &mut Agent, volume: &NodeVolume) {
    let own = context(OWN);
    for (flags, label) in [(&[] as &[&str], DEFAULT), (&[&own], OWN)] {
        let volume = with_flags(volume, flags);
        agent.stage(&volume);
        agent.publish(&volume);
        assert_labelled(agent, &volume, label);
        if label == DEFAULT {
            agent.restart();
        }
        let before = agent.guest.read("/proc/self/mounts").unwrap();
        agent.stage(&volume);
        agent.publish(&volume);
        assert_eq!(agent.guest.read("/proc/self/mounts").unwrap(), before, "nothing is mounted twice, or changed");
        assert_labelled(agent, &volume, label);
        agent.calls.node_get_volume_stats(volume.stats()).unwrap();
        agent.put_away(&volume);
    }
}

/// Where the policy is enforced. The kernel's own words, and nothing is mounted.
fn refusals(agent: &Agent, volume: &NodeVolume) {
    for (label, words) in [
        ("system_u:object_r:no_such_t:s0", "SELinux: security_context_str_to_sid"),
        ("system_u:object_r:ephemeral_t:s0:c9", "SELinux: security_context_str_to_sid"),
        ("nonsense", "SELinux: security_context_str_to_sid"),
        // Known to the policy, and not for a pod. Why is the audit's; what the filesystem logged, that it was mounted, is not the reason.
        ("system_u:object_r:secret_t:s0", "EACCES"),
    ] {
        let labelled = with_flags(volume, &[&context(label)]);
        let status = agent.calls.node_stage_volume(labelled.stage()).unwrap_err();
        println!("{}", status.message());
        assert_eq!(status.code(), Code::Internal, "{status:?}");
        assert!(status.message().contains(words) && !status.message().contains("kubectl debug"), "{label}: {status:?}");
        assert_eq!(agent.mounted_at(&volume.staging), [""; 0]);
    }
}

/// `context=` with nothing behind it. What is new on the filesystem has no label then, and the policy keeps a pod from it.
fn no_label(agent: &Agent, volume: &NodeVolume, is_enforced: bool) {
    let volume = with_flags(volume, &["context="]);
    for _ in 0..2 {
        agent.stage(&volume);
        agent.publish(&volume);
        assert_eq!(mounted_label(agent, &volume.target), None);
    }
    assert_eq!(agent.guest.label(&format!("/node{}", volume.target)).unwrap(), UNLABELLED);
    let written = agent.guest.write(&format!("/node{}/without", volume.target), b"x");
    assert_eq!(written.is_err(), is_enforced, "{written:?}");
    agent.put_away(&volume);
}

/// A filesystem has one label for all its mounts: while the target has it, another one on the staging path is refused.
fn another_label_where_one_is_mounted(agent: &Agent, volume: &NodeVolume) {
    let own = with_flags(volume, &[&context(OWN)]);
    agent.stage(&own);
    agent.publish(&own);
    agent.guest.unmount(&format!("/node{}", own.staging)).unwrap();
    refused(agent.calls.node_stage_volume(volume.stage()), Code::Internal, "Same superblock, different security settings");
    agent.stage(&own);
    assert_eq!(mounted_label(agent, &own.staging).as_deref(), Some(OWN));
    // A published volume stays as it is, whatever its class says by now.
    agent.stage(volume);
    let again = csi::NodePublishVolumeRequest { volume_capability: Some(volume.capability.clone()), ..own.publish() };
    agent.calls.node_publish_volume(again).unwrap();
    assert_eq!(mounted_label(agent, &own.staging).as_deref(), Some(OWN));
    agent.put_away(&own);
}

/// An older Talos, or another policy: the answer says where the label comes from, and how to leave it out.
fn a_policy_without_the_label(agent: &Agent, volume: &NodeVolume) {
    refused(agent.calls.node_stage_volume(volume.stage()), Code::Internal, "`context=` (empty) among the StorageClass' mountOptions");
    let volume = with_flags(volume, &["context="]);
    agent.stage(&volume);
    agent.publish(&volume);
    agent.put_away(&volume);
}
