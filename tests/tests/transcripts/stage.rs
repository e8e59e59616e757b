//! The stage of each recording: what was there at its beginning, and what happened off the record.
//!
//! An event stands at a heading (its line) or before a request (its line).

use std::sync::{Arc, Mutex};

use testbed::sim::{Acl, Description, Held, Node, Simulator, Storage, Token, User, Vm};

use crate::recording::Exchange;

pub(crate) const MIB: u64 = 1 << 20;

pub(crate) struct Stage {
    pub(crate) name: &'static str,
    pub(crate) describe: fn() -> Description,
    /// Volumes that were there: volid, size.
    pub(crate) volumes: &'static [(&'static str, u64)],
    /// Something done at this line (of a heading, or of a request: before it).
    pub(crate) events: &'static [(usize, Event)],
    /// Lines whose difference stays, each with its reason. An entry that is not needed fails the test. Line 0: an observation.
    pub(crate) skips: &'static [(usize, &'static str)],
    pub(crate) held: Mutex<Vec<Held>>,
}

/// What happened off the record.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Event {
    SetConfig(u32, &'static str, &'static str),
    DropConfig(u32, &'static str),
    HoldConfig(u32),
    HoldStorage(&'static str),
    Release,
    /// The grants of low@pve: path and privilege.
    Low(&'static [(&'static str, &'static str)]),
    StartVm(u32),
    StopVm(u32),
    Hung(u32, bool),
    Leak(u32, &'static str),
    KeyOrder(&'static [&'static str]),
    SlowAllocation(u64),
    DaemonDown,
    /// An unrecorded POST by csi, whose task the recording calls so.
    PostTask(&'static str, &'static str, &'static str),
    Create(&'static str, u64),
    Remove(&'static str),
    DropSnapshot(u32, &'static str),
    /// A snapshot's time, as recorded: it is part of the digest.
    SnapTime(u32, &'static str, &'static str),
}

impl Event {
    async fn happen(self, stage: &Stage, sim: &Arc<Simulator>) -> Option<(String, String)> {
        match self {
            Event::SetConfig(vmid, key, value) => sim.set_config(vmid, key, Some(value)),
            Event::DropConfig(vmid, key) => sim.set_config(vmid, key, None),
            Event::HoldConfig(vmid) => stage.held.lock().unwrap().extend(sim.hold_config_lock(vmid)),
            Event::HoldStorage(id) => stage.held.lock().unwrap().extend(sim.hold_storage_lock(id)),
            Event::Release => stage.held.lock().unwrap().clear(),
            Event::Low(grants) => grant_low(sim, grants.iter().map(|(path, privileges)| ((*path).to_owned(), (*privileges).to_owned()))),
            Event::StartVm(vmid) => sim.start_vm(vmid).unwrap(),
            Event::StopVm(vmid) => sim.stop_vm(vmid),
            Event::Hung(vmid, hung) => sim.set_hung(vmid, hung),
            Event::Leak(vmid, key) => sim.set_leaked(vmid, key),
            Event::KeyOrder(keys) => sim.set_key_order(keys),
            Event::SlowAllocation(seconds) => sim.set_slow_allocation(std::time::Duration::from_secs(seconds)),
            Event::DaemonDown => sim.set_daemon_down(true),
            Event::PostTask(path, params, recorded) => {
                let upid = crate::player::quietly(sim, "POST", path, params).await?;
                sim.task(&upid).await;
                return Some((recorded.to_owned(), upid));
            }
            Event::Create(volid, size) => sim.create_volume("pve1", volid, size).unwrap(),
            Event::Remove(volid) => sim.remove_volume("pve1", volid).unwrap(),
            Event::SnapTime(vmid, name, time) => sim.set_snapshot_line(vmid, name, "snaptime", time),
            Event::DropSnapshot(vmid, name) => sim.remove_snapshot(vmid, name),
        }
        None
    }
}

/// Events of a heading; `ACL of low@pve: PATH = PRIVILEGES; …` speaks for itself.
pub(crate) async fn heading(stage: &Stage, sim: &Arc<Simulator>, line: usize, heading: &str) {
    if let Some(grants) = heading.strip_prefix("ACL of low@pve: ") {
        grant_low(
            sim,
            grants.split("; ").filter_map(|grant| grant.split_once(" = ")).map(|(path, list)| (path.to_owned(), list.to_owned())),
        );
    }
    assert!(sim.settle().await, "{}: still busy at line {line}", stage.name);
    for (_, event) in stage.events.iter().filter(|(at, _)| *at == line) {
        event.happen(stage, sim).await;
    }
}

/// Events before a request; a task that was made off the record: its recorded UPID and ours.
pub(crate) async fn before(
    stage: &Stage,
    sim: &Arc<Simulator>,
    line: usize,
    tasks: &mut Vec<(String, String)>,
) -> Option<(String, String)> {
    let mut made = None;
    for (_, event) in stage.events.iter().filter(|(at, _)| *at == line) {
        made = event.happen(stage, sim).await.or(made);
    }
    if let Some((_, upid)) = &made {
        tasks.push((upid.split(':').nth(5).unwrap().to_owned(), upid.clone()));
    }
    made
}

fn grant_low(sim: &Simulator, grants: impl Iterator<Item = (String, String)>) {
    let mut acl = acl();
    acl.retain(|entry| entry.who != "low@pve");
    for (index, (path, privileges)) in grants.enumerate() {
        let role = format!("Low{index}");
        let privileges: Vec<&str> = privileges.split(',').filter(|privilege| !privilege.is_empty()).collect();
        sim.set_role(&role, &privileges);
        acl.push(entry(&path, "low@pve", &role));
    }
    sim.set_acl(acl);
}

fn entry(path: &str, who: &str, role: &str) -> Acl {
    Acl { path: path.to_owned(), who: who.to_owned(), role: role.to_owned(), propagate: true }
}

fn acl() -> Vec<Acl> {
    vec![entry("/", "csi@pve", "CSI"), entry("/storage", "low@pve", "Low")]
}

fn secret(who: &str) -> String {
    format!("00000000-0000-4000-8000-{who:0>12}")
}

fn user(id: &str, tokens: &[&str]) -> User {
    let token = |id: &&str| Token { id: (*id).to_owned(), secret: secret(id), privsep: false, expired: *id == "expired" };
    User { id: id.to_owned(), password: None, disabled: false, expired: false, tokens: tokens.iter().map(token).collect() }
}

pub(crate) fn authorization(who: &str, heading: &str) -> Option<String> {
    let token = |id: &str, name: &str| format!("PVEAPIToken={id}!{name}={}", secret(name));
    Some(match (who, heading) {
        ("None", "space form") => token("csi@pve", "csi").replacen('=', " ", 1),
        ("None", "percent-encoded") => token("csi@pve", "csi").replace('@', "%40").replace('!', "%21"),
        ("None", _) => return None,
        ("csi", _) => token("csi@pve", "csi"),
        ("other", _) => token("csi@pve", "other"),
        ("root", _) => token("root@pam", "full"),
        ("low", _) => token("low@pve", "low"),
        ("bad", _) => "PVEAPIToken=csi@pve!csi=wrong".to_owned(),
        ("nouser", _) => token("nobody@pve", "csi"),
        ("disabled", _) => token("disabled@pve", "csi"),
        ("expireduser", _) => token("expired@pve", "csi"),
        ("expiredtok", _) => token("csi@pve", "expired"),
        ("garbage", _) => "PVEAPIToken=garbage".to_owned(),
        (who, _) => panic!("who is {who}?"),
    })
}

pub(crate) fn content_type(heading: &str) -> &'static str {
    match heading {
        "JSON body" | "broken JSON" => "application/json",
        "bad content type" => "text/plain",
        _ => "application/x-www-form-urlencoded",
    }
}

/// The body as it was sent: the recorder printed it decoded.
pub(crate) fn body(exchange: &Exchange, heading: &str) -> Option<String> {
    let body = exchange.body.as_ref()?;
    if body.contains(" …[cut") {
        return Some(format!("x={}", "a".repeat(600_000)));
    }
    if content_type(heading) != "application/x-www-form-urlencoded" {
        return Some(body.clone());
    }
    let plus = body.split('&').map(|pair| pair.replace('+', "%2B").replace(' ', "+").replace(';', "%3B"));
    Some(plus.collect::<Vec<_>>().join("&"))
}

fn dir(id: &str, path: &str) -> Storage {
    Storage { total_bytes: 270_553_174_016, used_bytes: 32_040_210_432, ..Storage::new(id, "dir", &[("path", path)]) }
}

fn config(lines: &[(&str, &str)]) -> Vm {
    let vmid = 0;
    let config = lines.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    Vm { vmid, node: "pve1".to_owned(), running: false, config }
}

/// The recorder's VMs are alike but for their disks.
pub(crate) fn vm(vmid: u32, hardware: &str, disk: &str) -> Vm {
    let mut vm = config(&[
        ("args", "-kernel /data/guest/vmlinuz -initrd /data/guest/initrd.gz -append console=ttyS0"),
        ("boot", "order=scsi0"),
        ("cores", "1"),
        ("cpu", "qemu64"),
        ("kvm", "0"),
        ("memory", "256"),
        ("name", &format!("node-{vmid}")),
        ("numa", "0"),
        ("ostype", "l26"),
        ("scsihw", hardware),
        ("serial0", "socket"),
        ("sockets", "1"),
        ("tablet", "0"),
        ("vga", "none"),
    ]);
    vm.vmid = vmid;
    if !disk.is_empty() {
        vm.config.insert("scsi0".to_owned(), disk.to_owned());
    }
    vm
}

pub(crate) const SINGLE: &str = "virtio-scsi-single";
const DISK_100: &str = "ds1:100/vm-100-disk-0.raw,size=104858K";
const DISK_101: &str = "ds1:101/vm-101-disk-0.raw,size=104858K";
const DISK_103: &str = "ds1:103/vm-103-disk-0.raw,size=10486K";

/// Host, storages and users of all recordings.
fn host() -> Description {
    let mut local = dir("local", "/var/lib/vz");
    local.content.extend(["iso", "vztmpl", "backup", "rootdir", "snippets"].map(str::to_owned));
    let mut second = dir("second", "/data/local2");
    second.options.insert("format".to_owned(), "qcow2".into());
    let mut sharedir = dir("sharedir", "/data/shared");
    sharedir.shared = Some(true);
    let mut disabled = dir("disabled1", "/data/dis");
    disabled.disabled = true;
    let mut gone = dir("gone", "/data/gone");
    gone.unmounted = true;
    gone.options.insert("is_mountpoint".to_owned(), "1".into());
    gone.options.insert("create-base-path".to_owned(), 0.into());
    let mut othernode = dir("othernode", "/data/oth");
    othernode.nodes = Some(vec!["pve2".to_owned()]);
    let mut disabled_user = user("disabled@pve", &["csi"]);
    disabled_user.disabled = true;
    let mut expired_user = user("expired@pve", &["csi"]);
    expired_user.expired = true;
    let csi = ["VM.Audit", "VM.Config.Disk", "Datastore.Allocate", "Datastore.AllocateSpace", "Datastore.Audit"];
    Description {
        nodes: vec![Node::online("pve1")],
        storages: vec![local, second, sharedir, dir("ds1", "/data/ds1"), gone, disabled, othernode],
        users: vec![
            user("csi@pve", &["csi", "other", "expired"]),
            user("root@pam", &["full"]),
            user("low@pve", &["low"]),
            disabled_user,
            expired_user,
        ],
        roles: [("CSI".to_owned(), csi.map(str::to_owned).to_vec()), ("Low".to_owned(), vec!["Datastore.AllocateSpace".to_owned()])].into(),
        acl: acl(),
        without_statistics: true,
        without_resolver: true,
        ..Description::default()
    }
}

/// VM 100 alone: before the others were made.
pub(crate) fn first_vm() -> Description {
    host().vm(vm(100, SINGLE, DISK_100))
}

/// Four VMs, none running.
pub(crate) fn four_vms() -> Description {
    let mut last = vm(103, SINGLE, DISK_103);
    last.config.remove("args");
    host().vm(vm(100, SINGLE, DISK_100)).vm(vm(101, "virtio-scsi-pci", DISK_101)).vm(vm(102, SINGLE, "")).vm(last)
}

fn change(description: &mut Description, vmid: u32, act: impl FnOnce(&mut Vm)) {
    act(description.vms.iter_mut().find(|vm| vm.vmid == vmid).unwrap());
}

/// VM 100 and 101 running.
pub(crate) fn two_running() -> Description {
    let mut description = four_vms();
    change(&mut description, 100, |vm| vm.running = true);
    change(&mut description, 101, |vm| vm.running = true);
    description
}

/// After the recordings that set `hotplug=disk`.
pub(crate) fn hotplugging() -> Description {
    let mut description = two_running();
    for vmid in [100, 101] {
        change(&mut description, vmid, |vm| drop(vm.config.insert("hotplug".to_owned(), "disk".to_owned())));
    }
    description
}

/// VM 102 with disks on the second storage.
pub(crate) fn operations() -> Description {
    let mut description = hotplugging();
    change(&mut description, 102, |vm| {
        vm.config.insert("scsi0".to_owned(), "second:102/vm-102-disk-0.qcow2,size=1G".to_owned());
        vm.config.insert("scsi1".to_owned(), "ds1:9999/vm-9999-g1.raw,backup=0,size=10M".to_owned());
    });
    description
}

/// VM 102 before its disks are moved; the file is there, its size in the config is the request's.
pub(crate) fn moving() -> Description {
    let mut description = hotplugging();
    description.storages.retain(|storage| storage.id != "gone");
    change(&mut description, 102, |vm| {
        vm.config.insert("scsi0".to_owned(), "second:102/vm-102-disk-0.qcow2,size=1025M".to_owned());
        vm.config.insert("scsi1".to_owned(), "ds1:9999/vm-9999-m1.raw,backup=0,size=10M".to_owned());
        vm.config.insert("scsi3".to_owned(), "ds1:9999/vm-9999-m2.raw,size=10M".to_owned());
    });
    description
}

/// The template 151 is there, pvestatd runs, `gone` is gone.
pub(crate) fn with_statistics() -> Description {
    let mut description = hotplugging();
    description.without_statistics = false;
    description.storages.retain(|storage| storage.id != "gone");
    change(&mut description, 102, |vm| {
        vm.config.insert("scsi0".to_owned(), "second:102/vm-102-disk-0.qcow2,size=1025M".to_owned());
    });
    let mut template = vm(151, SINGLE, "second:151/base-151-disk-0.qcow2,size=1025M");
    template.config.insert("name".to_owned(), "Copy-of-VM-node-102".to_owned());
    template.config.insert("template".to_owned(), "1".to_owned());
    description.vm(template)
}

/// Neighbours that cannot be reached.
pub(crate) fn with_neighbours() -> Description {
    let mut description = hotplugging();
    for (name, why) in [("pve2", "596 error:0A000086:SSL routines::certificate verify failed"), ("pve3", "595 Network is unreachable")] {
        let stranger = Node { ip: None, unreachable: Some(why.to_owned()), stranger: true, ..Node::online(name) };
        description.nodes.push(stranger);
    }
    change(&mut description, 102, |vm| {
        vm.config.insert("scsi0".to_owned(), "second:102/vm-102-disk-0.qcow2,size=1025M".to_owned());
    });
    let grant = ("LowVm".to_owned(), vec!["VM.Audit".to_owned(), "VM.Config.Disk".to_owned()]);
    description.roles.extend([grant]);
    description.acl.push(entry("/vms", "low@pve", "LowVm"));
    description
}

/// VM 100 without a disk of its own.
pub(crate) fn diskless() -> Description {
    let mut description = four_vms();
    change(&mut description, 100, |vm| drop(vm.config.remove("scsi0")));
    description
}
