//! Death at a bad moment: of the agent, of the machine, of the disk under a mount.

use testbed::guest::wait;

use crate::harness::{Agent, Image, MIB, SEEN_LIMIT, assert_clean, handle};

/// Enough metadata that a format takes a while, in a sparse image that costs little.
const LARGE: u64 = 64 << 30;

/// Waits until the format has written this much to the image.
fn wait_for_format(image: &Image, bytes: u64) {
    let seen = wait::until(SEEN_LIMIT, || Ok::<_, ()>((image.allocated_bytes() >= bytes).then_some(())));
    assert_eq!(seen, Ok(Some(())), "the format wrote {} bytes only", image.allocated_bytes());
}

#[test]
fn guest_agent_killed_while_it_formats() {
    let Some(mut agent) = Agent::start("killed-agent") else { return };
    let (handle, image) = (handle("killed-agent"), Image::new(LARGE));
    let volume = agent.attach(&handle, &image, 1);
    for bytes in [4096, MIB, 8 * MIB] {
        let (calls, request) = (agent.calls.clone(), volume.stage());
        let staging = std::thread::spawn(move || calls.node_stage_volume(request));
        wait_for_format(&image, bytes);
        agent.restart();
        // Too late for the kill is an answer too; what counts is the next stage.
        let _ = staging.join().unwrap();
    }
    agent.stage(&volume);
    assert_eq!(agent.mounted_at(&volume.staging), ["ext4"]);
    // The agent's death does not touch the mount, and a new agent finds it.
    agent.publish(&volume);
    agent.restart();
    agent.stage(&volume);
    agent.publish(&volume);
    agent.put_away(&volume);
    agent.detach(1);
    assert_clean(&image);
    agent.guest.power_off().unwrap();
}

#[test]
fn guest_machine_killed() {
    let Some(agent) = Agent::start("killed-machine") else { return };
    let (handle, image) = (handle("killed-machine"), Image::new(LARGE));
    let volume = agent.attach(&handle, &image, 1);
    let (calls, request) = (agent.calls.clone(), volume.stage());
    let staging = std::thread::spawn(move || calls.node_stage_volume(request));
    wait_for_format(&image, MIB);
    agent.guest.kill_qemu();
    let _ = staging.join().unwrap();
    drop(agent);

    let Some(agent) = Agent::start("after-format") else { return };
    let volume = agent.attach(&handle, &image, 1);
    agent.stage(&volume);
    agent.publish(&volume);
    let file = format!("/node{}/synced", volume.target);
    let written = agent.guest.fill(&file, 3, 4 * MIB).unwrap();
    agent.guest.kill_qemu();
    drop(agent);

    // What was synced before the power failed is there: the kernel replays the journal at the next mount.
    let Some(agent) = Agent::start("after-power") else { return };
    let volume = agent.attach(&handle, &image, 9);
    agent.stage(&volume);
    agent.publish(&volume);
    assert_eq!(agent.guest.sha256(&file).unwrap(), written);
    agent.put_away(&volume);
    agent.detach(9);
    assert_clean(&image);
    agent.guest.power_off().unwrap();
}

#[test]
fn guest_disk_pulled_under_a_mount() {
    let Some(agent) = Agent::start("pulled") else { return };
    let (handle, image) = (handle("pulled"), Image::new(64 * MIB));
    let volume = agent.attach(&handle, &image, 1);
    agent.stage(&volume);
    agent.publish(&volume);
    let file = format!("/node{}/synced", volume.target);
    let written = agent.guest.fill(&file, 5, MIB).unwrap();
    // Somebody uses it, as a process that will not end would: umount2 answers EBUSY, for ever.
    let inside = format!("/node{}/inside", volume.target);
    agent.guest.make_folder(&inside).unwrap();
    agent.guest.mount("none", &inside, "tmpfs", false).unwrap();
    let status = agent.calls.node_unpublish_volume(volume.unpublish()).unwrap_err();
    assert!(status.message().contains("EBUSY"), "the disk is there, so nothing is taken from under anybody: {status:?}");
    agent.detach(1);
    // Unpublish and unstage clear what is left; a new attach begins from the disk.
    agent.put_away(&volume);
    for path in [&volume.staging, &volume.target] {
        assert_eq!(agent.guest.mounts_below(&format!("/node{path}")).unwrap(), []);
    }
    let (_, log) = agent.guest.output(agent.job).unwrap();
    assert!(log.contains("under those who still use it: its disk is gone"), "{log}");
    let volume = agent.attach(&handle, &image, 2);
    agent.stage(&volume);
    agent.publish(&volume);
    assert_eq!(agent.guest.sha256(&file).unwrap(), written);
    agent.put_away(&volume);
    agent.detach(2);
    assert_clean(&image);
    agent.guest.power_off().unwrap();
}
