//! The background trim: what a volume does not use any more goes back to the storage, and no call waits for it.

use serde_json::json;
use testbed::calls::{NodeVolume, mount_capability};
use testbed::guest::wait;

use crate::harness::{Agent, Image, MIB, SEEN_LIMIT, assert_clean, handle};
use crate::luks::{PASSPHRASE, encrypted};
use crate::xfs::assert_clean_xfs;

/// A week of the trimmer's.
const WEEK: (&str, &str) = ("PROXMOX_CSI_LIMIT_TRIM", "2000");

fn said(agent: &Agent, volume: &NodeVolume, what: &str) -> usize {
    let begin = format!("trim {}: ", volume.staging);
    agent.log().lines().filter(|line| line.split_once(&begin).is_some_and(|(_, rest)| rest.contains(what))).count()
}

fn wait_for(agent: &Agent, what: &str, is_so: impl Fn() -> bool) {
    let seen = wait::until(SEEN_LIMIT, || Ok::<_, ()>(is_so().then_some(())));
    assert_eq!(seen, Ok(Some(())), "{what} is not seen within {SEEN_LIMIT:?}; {}", agent.guest.quote());
}

/// Staged and published, with 32 MiB written and removed again.
fn emptied(agent: &Agent, volume: &NodeVolume) {
    agent.stage(volume);
    agent.publish(volume);
    let file = format!("/node{}/file", volume.target);
    agent.guest.fill(&file, 1, 32 * MIB).unwrap();
    agent.guest.remove(&file).unwrap();
}

#[test]
fn guest_trim_gives_back_what_is_free_and_ends_for_an_unstage() {
    let Some(mut agent) = Agent::start_with_points("trim") else { return };
    let attach = |agent: &Agent, name: &str, lun: u8, size_bytes: u64, fstype: &str| {
        let image = Image::new(size_bytes);
        let volume = NodeVolume { capability: mount_capability(fstype), ..agent.attach(&handle(name), &image, lun) };
        (volume, image)
    };
    let (ext4, ext4_image) = attach(&agent, "trimmed-ext4", 1, 512 * MIB, "ext4");
    let (xfs, xfs_image) = attach(&agent, "trimmed-xfs", 2, 512 * MIB, "xfs");
    let (mut spared, spared_image) = attach(&agent, "spared", 3, 512 * MIB, "ext4");
    spared.volume_context.insert(proto::volume_context::DISCARD.into(), "ignore".into());
    // Its mapping lets no discard through.
    let (sealed, sealed_image) = attach(&agent, "sealed", 4, 512 * MIB, "ext4");
    let sealed = encrypted(sealed, PASSPHRASE);
    // Its mapping does, by its class' word.
    let (open, open_image) = attach(&agent, "open", 6, 512 * MIB, "ext4");
    let mut open = encrypted(open, PASSPHRASE);
    open.volume_context.insert(proto::volume_context::LUKS_DISCARDS.into(), "true".into());
    [&spared, &sealed, &open, &ext4, &xfs].iter().for_each(|volume| emptied(&agent, volume));
    agent.guest.drop_caches().unwrap();
    // Which is told nothing of a class.
    agent.restart_with(&[WEEK]);
    // The journal and the header are noise there, and stay.
    wait_for(&agent, "room given back through LUKS", || open_image.allocated_bytes() < sealed_image.allocated_bytes() - 28 * MIB);
    for (volume, image) in [(&ext4, &ext4_image), (&xfs, &xfs_image)] {
        wait_for(&agent, "room given back", || image.allocated_bytes() < 28 * MIB);
        wait_for(&agent, "the end of its trim", || said(&agent, volume, " bytes in ") > 0);
        let trims = said(&agent, volume, " bytes in ");
        wait_for(&agent, "another week", || said(&agent, volume, " bytes in ") > trims + 1);
    }
    for (volume, image) in [(&spared, &spared_image), (&sealed, &sealed_image)] {
        assert_eq!(said(&agent, volume, ""), 0, "{}", agent.log());
        assert!(image.allocated_bytes() >= 32 * MIB, "{} bytes", image.allocated_bytes());
    }

    // Unstaged while it is trimmed, on a storage that takes two to four seconds for a piece (of xfs an allocation group, a quarter of it); and the agent killed in a trim.
    for (fstype, is_killed) in [("ext4", false), ("xfs", true)] {
        let (slow, slow_image) = attach(&agent, &format!("slow-{fstype}"), 5, 4096 * MIB, fstype);
        agent.stage(&slow);
        agent.throttle(5, json!({ "bps-write": if fstype == "ext4" { 64 * MIB } else { 512 * MIB } }));
        let begins = |agent: &Agent| {
            let before = said(agent, &slow, "begins");
            wait_for(agent, "a trim that begins", || said(agent, &slow, "begins") > before);
        };
        begins(&agent);
        if is_killed {
            agent.restart_with(&[WEEK]);
            begins(&agent);
        }
        agent.calls.node_unstage_volume(slow.unstage()).unwrap();
        assert_eq!(said(&agent, &slow, "ended early"), 1, "{}", agent.log());
        agent.detach(5);
        if fstype == "ext4" { assert_clean(&slow_image) } else { assert_clean_xfs(&slow_image.0) }
    }
    // One whose disk takes no more of it: the others go on, and it is named.
    agent.restart_with(&[WEEK, ("PROXMOX_CSI_LIMIT_TRIM_PIECE", "3000")]);
    agent.throttle(2, json!({ "bps-write": 1 }));
    wait_for(&agent, "the volume that hangs", || said(&agent, &xfs, "has not answered for 3 s") == 1);
    let trims = said(&agent, &ext4, " bytes in ");
    wait_for(&agent, "another's trim", || said(&agent, &ext4, " bytes in ") > trims);
    agent.throttle(2, json!({ "bps-write": 0 }));
    agent.guest.monitor("stop", json!({})).unwrap();
    agent.guest.monitor("cont", json!({})).unwrap();
    let trims = said(&agent, &xfs, " bytes in ");
    wait_for(&agent, "its trim", || said(&agent, &xfs, " bytes in ") > trims);

    [&spared, &sealed, &open, &ext4, &xfs].iter().for_each(|volume| agent.put_away(volume));
    agent.detach(1);
    assert_clean(&ext4_image);
    agent.guest.power_off().unwrap();
}
