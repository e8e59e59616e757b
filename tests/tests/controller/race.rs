//! Racing calls: one volume, two VMs, at the same moment. Never two OKs, none left attached twice, one after retries.
//!
//! `PROXMOX_CSI_PAIRS` says how many; a share runs by default.

use std::sync::Arc;

use controller::service::ControllerService;
use proto::VolumeHandle;
use testbed::sim::{Description, Node, Simulator, Storage, Vm};
use tokio::task::JoinSet;
use tonic::{Code, Status};

use crate::bed::{Bed, start};
use crate::hold::{again, publish_by, unpublish_by};

/// VMs of the bed: 101 to 110.
const VMS: u32 = 10;
/// Pairs at a time: ten VMs with 29 slots each take them all, whoever wins.
const AT_ONCE: usize = 25;
/// Repeats until one has it; sidecars repeat for ever.
const RETRIES: usize = 60;

fn pairs(otherwise: usize) -> usize {
    std::env::var("PROXMOX_CSI_PAIRS").ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// One VM per Proxmox node: on one node QEMU itself would refuse the second, and leave a slot unusable each time.
async fn bed() -> Arc<Bed> {
    let mut about = Description::standard();
    let host = |vmid: u32| format!("pve{}", vmid - 100);
    about.vms = (101..101 + VMS).map(|vmid| Vm::linux(vmid, &host(vmid), &format!("node-{vmid}"), None)).collect();
    about.nodes = (101..101 + VMS).map(|vmid| Node::online(&host(vmid))).collect();
    let mut san = Storage::new("san", "lvm", &[("vgname", "san")]);
    san.shared = Some(true);
    Arc::new(start(Simulator::builder(about.storage(san))).await)
}

fn holders(bed: &Bed, volume: &VolumeHandle) -> Vec<u32> {
    (101..101 + VMS).filter(|vmid| !bed.traces(*vmid, volume).is_empty()).collect()
}

/// Two calls for one volume; then repeats of whoever still wants it, until one has it.
async fn race(bed: Arc<Bed>, first: Arc<ControllerService>, second: Arc<ControllerService>, number: usize) {
    let volume: VolumeHandle = format!("fsn1//san/vm-9999-race-{number}").parse().unwrap();
    bed.sim.create_volume("pve1", &volume.volid(), 1 << 20).unwrap();
    let vms = [101 + u32::try_from(number).unwrap() % VMS, 101 + u32::try_from(number * 7 + 3).unwrap() % VMS];
    let vms = if vms[0] == vms[1] { [vms[0], 101 + (vms[0] - 100) % VMS] } else { vms };
    let nodes = vms.map(|vmid| format!("node-{vmid}/{vmid}"));
    let (mut oks, mut last) = (0, String::new());
    for turn in 0..RETRIES {
        let answers: [Result<u32, Status>; 2] =
            tokio::join!(publish_by(&first, &volume, &nodes[0]), publish_by(&second, &volume, &nodes[1])).into();
        oks = answers.iter().filter(|answer| answer.is_ok()).count();
        assert!(oks <= 1, "{volume}: both have it: {answers:?}");
        let holders = holders(&bed, &volume);
        for (vmid, answer) in vms.iter().zip(&answers) {
            match answer {
                Ok(_) => assert_eq!(holders, [*vmid], "{volume}, turn {turn}"),
                Err(refused) => assert!(
                    matches!(refused.code(), Code::FailedPrecondition | Code::Aborted | Code::Unavailable),
                    "{volume}: {}",
                    refused.message()
                ),
            }
        }
        if oks == 1 {
            break;
        }
        last = format!("{answers:?}");
        // Sidecars wait longer.
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(oks, 1, "{volume}: nobody has it after {RETRIES} tries each: {last}");
    for (controller, node) in [(&first, &nodes[0]), (&second, &nodes[1])] {
        unpublish_by(controller, &volume, node).await.unwrap();
    }
    assert!(holders(&bed, &volume).is_empty());
    // Others change the same VMs all the time, so that a view of them may be torn: refused then, never deleted in doubt.
    let mut deleted = bed.delete(&volume.to_string()).await;
    for _ in 0..RETRIES {
        if deleted.is_ok() {
            break;
        }
        deleted = bed.delete(&volume.to_string()).await;
    }
    deleted.unwrap();
}

async fn races(count: usize, first: impl Fn(&Bed) -> Arc<ControllerService>, second: impl Fn(&Bed) -> Arc<ControllerService>) {
    let bed = bed().await;
    let (first, second) = (first(&bed), second(&bed));
    let mut running = JoinSet::new();
    for number in 0..count {
        if running.len() >= AT_ONCE {
            running.join_next().await.unwrap().unwrap();
        }
        running.spawn(race(Arc::clone(&bed), Arc::clone(&first), Arc::clone(&second), number));
    }
    while let Some(done) = running.join_next().await {
        done.unwrap();
    }
    for vmid in 101..101 + VMS {
        let vm = bed.sim.vm(vmid).unwrap();
        assert!(vm.plugged.is_empty() && vm.pending.is_empty() && vm.pending_delete.is_empty(), "VM {vmid}: {vm:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w04_racing_pairs_in_one_controller() {
    let shared = |bed: &Bed| Arc::new(bed.csi.clone());
    races(pairs(40), shared, shared).await;
}

/// Nothing but Proxmox between them: no Lease, no common memory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn w04_racing_pairs_of_two_controllers() {
    let own = |bed: &Bed| Arc::new(again(bed));
    races(pairs(20), own, own).await;
}
