//! `deploy/proxmox/privileges.tsv` against Proxmox's permission model: all of it is enough for everything we do, and each line
//! of it is needed: without it its feature fails with a sentence that names privilege and path.

use std::collections::BTreeMap;

use proto::VolumeHandle;
use testbed::sim::{Acl, Simulator, Storage};
use tonic::Status;

use crate::bed::{Bed, MIB, create_request, start, two_hosts_description};

const TABLE: &str = include_str!("../../../deploy/proxmox/privileges.tsv");

/// Privilege and path of each line.
fn table() -> Vec<(&'static str, &'static str)> {
    let lines = TABLE.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let mut fields = line.split('\t');
            (fields.next().unwrap(), fields.next().unwrap())
        })
        .collect()
}

/// Gives the token what the table says, each at its path, but for `lost`; nothing else anywhere.
fn grant(bed: &Bed, lost: Option<&str>) {
    let mut roles: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (privilege, path) in table() {
        let of_path = roles.entry(path).or_default();
        of_path.extend(Some(privilege).filter(|one| Some(*one) != lost));
    }
    let name = |path: &str| format!("CSI{}", path.replace('/', "-"));
    for (path, privileges) in &roles {
        bed.sim.set_role(&name(path), privileges);
    }
    let acl = |path: &&str| Acl { path: (*path).into(), who: "csi@pve".into(), role: name(path), propagate: true };
    bed.sim.set_acl(roles.keys().map(acl).collect());
}

/// What we do with a volume, on hosts pve1 and pve2: the first thing that fails, and its name.
async fn life(bed: &Bed) -> Result<(), (&'static str, Status)> {
    let request = create_request("pvc-1", "local", 64 * MIB);
    let volume: VolumeHandle = bed.create_as(request).await.map_err(|why| ("create", why))?.volume_id.parse().unwrap();
    bed.publish(&volume, "node-101/101").await.map_err(|why| ("publish", why))?;
    bed.expand(&volume.to_string(), 128 * MIB, 0).await.map_err(|why| ("expand", why))?;
    bed.unpublish(&volume, "node-101/101").await.map_err(|why| ("unpublish", why))?;
    bed.delete(&volume.to_string()).await.map_err(|why| ("delete", why))?;
    // One host of two is off; what its VM never held attaches.
    let other: VolumeHandle = "fsn1//san/vm-9999-b".parse().unwrap();
    bed.sim.create_volume("pve1", &other.volid(), 64 * MIB).unwrap();
    // Reads all that could hold it, while it can.
    bed.publish(&other, "node-101/101").await.map_err(|why| ("publish of a shared volume", why))?;
    bed.unpublish(&other, "node-101/101").await.map_err(|why| ("unpublish of a shared volume", why))?;
    bed.sim.set_node_unreachable("pve2", Some("595 No route to host"));
    bed.publish(&other, "node-101/101").await.map(drop).map_err(|why| ("dead host", why))
}

async fn bed() -> Bed {
    let mut san = Storage::new("san", "lvm", &[("vgname", "san")]);
    san.shared = Some(true);
    start(Simulator::builder(two_hosts_description().storage(san))).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_privileges_of_the_table_are_enough() {
    let bed = bed().await;
    grant(&bed, None);
    life(&bed).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_privilege_of_the_table_is_needed_and_named_where_it_lacks() {
    for (lost, path) in table() {
        let bed = bed().await;
        grant(&bed, Some(lost));
        let Err((step, refused)) = life(&bed).await else { panic!("all works without {lost}") };
        let said = refused.message();
        assert!(said.contains(lost) && (path == "/" || said.contains(path)), "{step} without {lost} on {path}: {said}");
    }
}
