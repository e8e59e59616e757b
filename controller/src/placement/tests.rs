use super::*;
use proptest::prelude::*;
use std::sync::Arc;

const GIB: u64 = 1 << 30;

fn storage(host: &str, plugin: &str, total: u64, used: u64) -> Storage {
    Storage {
        storage: "ds".into(),
        host: host.into(),
        plugin: plugin.into(),
        active: true,
        shared: false,
        images: true,
        total_bytes: total,
        used_bytes: used,
    }
}

fn regions(storages: Vec<Storage>) -> BTreeMap<String, Arc<Resources>> {
    BTreeMap::from([("r".to_string(), Arc::new(Resources { storages, ..Resources::default() }))])
}

fn want(terms: &[&str]) -> Want {
    let terms: Vec<Term> = terms.iter().map(|zone| Term { region: Some("r".into()), zone: Some((*zone).into()) }).collect();
    let order = if terms.is_empty() { Order::Free } else { Order::Wish };
    Want { storage: "ds".into(), required_bytes: GIB, limit_bytes: None, terms, order, format: None, room: Room::default() }
}

fn candidates(want: &Want, regions: &BTreeMap<String, Arc<Resources>>) -> Result<Vec<Candidate>, Refusal> {
    super::candidates(want, Seen { regions, promised: &Promised::default(), loads: &Loads::new() })
}

fn zones(want: &Want, regions: &BTreeMap<String, Arc<Resources>>) -> Vec<String> {
    candidates(want, regions).unwrap().into_iter().map(|one| one.zone).collect()
}

#[test]
fn without_topology_the_zone_with_most_room_is_first() {
    let all = regions(vec![storage("a", "dir", 10 * GIB, 5 * GIB), storage("b", "dir", 10 * GIB, GIB), storage("c", "dir", GIB, 0)]);
    assert_eq!(zones(&want(&[]), &all), ["b", "a", "c"]);
}

#[test]
fn preference_beats_room_and_room_beats_none() {
    let all = regions(vec![storage("a", "lvm", 10 * GIB, 5 * GIB), storage("b", "lvm", 10 * GIB, GIB)]);
    assert_eq!(zones(&want(&["a", "b"]), &all), ["a", "b"]);
    let all = regions(vec![storage("a", "lvm", 10 * GIB, 10 * GIB), storage("b", "lvm", 10 * GIB, GIB)]);
    assert_eq!(zones(&want(&["a", "b"]), &all), ["b", "a"]);
    assert_eq!(zones(&want(&["a"]), &all), ["a"]);
    let full = candidates(&want(&["a"]), &all).unwrap();
    assert!(matches!(with_room(&want(&["a"]), &full), Err(Refusal::NotHere(why)) if why.contains("r/a: 0 bytes")));
}

#[test]
fn a_node_that_is_offline_has_no_active_storage() {
    let hosts = BTreeMap::from([("a".to_string(), "offline".to_string()), ("b".to_string(), "online".to_string())]);
    let storages = vec![storage("a", "dir", 10 * GIB, 0), storage("b", "dir", 10 * GIB, 5 * GIB)];
    let all = BTreeMap::from([("r".to_string(), Arc::new(Resources { storages, hosts, ..Resources::default() }))]);
    assert_eq!(zones(&want(&[]), &all), ["b"]);
    assert!(matches!(candidates(&want(&["a"]), &all), Err(Refusal::NotHere(why)) if why.contains("not active on r/a")));
}

#[test]
fn each_refusal_says_why() {
    let refused = |want: &Want, all: Vec<Storage>| format!("{:?}", candidates(want, &regions(all)).unwrap_err());
    let one = |change: &dyn Fn(&mut Storage)| {
        let mut one = storage("a", "dir", 10 * GIB, 0);
        change(&mut one);
        vec![one]
    };
    assert!(refused(&want(&[]), vec![]).contains("Datastore.Audit"));
    assert!(refused(&want(&["z"]), one(&|_| ())).contains("it is in r/a"));
    assert!(refused(&want(&[]), one(&|s| s.active = false)).contains("not active on r/a"));
    assert!(refused(&want(&[]), one(&|s| s.images = false)).contains("Disk image"));
    assert!(refused(&want(&[]), one(&|s| s.plugin = "pbs".into())).contains("cannot hold new VM disks"));
    let cephfs = |s: &mut Storage| (s.plugin, s.images) = ("cephfs".into(), false);
    assert!(refused(&want(&[]), one(&cephfs)).contains("cannot hold new VM disks"), "not to be mended by its content");
    let beyond = Want { required_bytes: 11 * GIB, ..want(&[]) };
    assert!(refused(&beyond, one(&|_| ())).contains("OutOfRange"));
    let qcow2 = Want { format: Some("qcow2".into()), ..want(&[]) };
    assert!(refused(&qcow2, one(&|s| s.plugin = "lvmthin".into())).contains("file storage"));
    let nowhere = Want { terms: vec![Term { region: Some("q".into()), zone: None }], ..want(&[]) };
    assert!(refused(&nowhere, one(&|_| ())).contains("known are r"));
}

#[test]
fn sizes_meet_required_and_limit() {
    assert_eq!(size(Plugin::File, 64 << 20, Some(64 << 20)), Ok(64 << 20));
    assert_eq!(size(Plugin::File, (64 << 20) + 1, None), Ok(65 << 20));
    assert_eq!(size(Plugin::File, 1025, Some(2048)), Ok(2048));
    assert_eq!(size(Plugin::Block, 1, None), Ok(1 << 20));
    assert!(size(Plugin::Block, 1, Some(1000)).unwrap_err().contains("steps of 1048576"));
    assert_eq!(size(Plugin::Lvm, 5 << 20, None), Ok(8 << 20));
    assert_eq!(size(Plugin::LvmChain, 5 << 20, None), Ok(5 << 20));
    assert_eq!(size(Plugin::Lvm, 5 << 20, Some(8 << 20)), Ok(8 << 20));
    assert!(size(Plugin::Lvm, 5 << 20, Some(7 << 20)).is_err());
    assert!(size(Plugin::File, u64::MAX, None).is_err());
}

#[test]
fn names_stay_where_they_can() {
    let pv = "pvc-0d79ea1c-3a9b-4d6e-9f0e-1f3e2a7b9c11";
    assert_eq!(disk_name(9999, pv, Plugin::Lvm, "raw"), format!("vm-9999-{pv}"));
    assert_eq!(disk_name(9999, pv, Plugin::File, "qcow2"), format!("vm-9999-{pv}.qcow2"));
    let sanity = format!("sanity-controller-create-maxlen-1F2E3D4C-5B6A7988{}", "a".repeat(79));
    let name = disk_name(9999, &sanity, Plugin::Lvm, "raw");
    assert!(width(&name) <= MAX_DISK_NAME, "{name}");
    assert_ne!(name, disk_name(9999, &format!("{}b", &sanity[..127]), Plugin::Lvm, "raw"));
    assert_eq!(disk_of(9999, "vm-9999-a.raw", Plugin::File), "9999/vm-9999-a.raw");
}

proptest! {
    #[test]
    fn every_name_gives_a_volume_handle(name in "\\PC{1,140}", owner in 100u32..999_999_999) {
        for plugin in [Plugin::File, Plugin::Lvm, Plugin::Block] {
            let disk = disk_name(owner, &name, plugin, "raw");
            prop_assert!(width(&disk) <= MAX_DISK_NAME + 4);
            let begins = format!("vm-{}-", owner);
            prop_assert!(disk.starts_with(&begins) && disk.ends_with(|c: char| c.is_ascii_alphanumeric()));
            let handle = format!("r/z/ds/{}", disk_of(owner, &disk, plugin)).parse::<proto::VolumeHandle>();
            prop_assert_eq!(handle.unwrap().owner_vmid(), Some(owner));
        }
    }
}

fn shared(host: &str, plugin: &str, total: u64, used: u64) -> Storage {
    Storage { shared: true, ..storage(host, plugin, total, used) }
}

#[test]
fn a_shared_storage_is_one_place_and_reached_by_its_nodes() {
    let mut resources =
        Resources { storages: vec![shared("a", "rbd", 10 * GIB, 0), shared("b", "rbd", 10 * GIB, 0)], ..Resources::default() };
    resources.hosts = ["a", "b"].map(|host| (host.to_string(), "online".to_string())).into();
    let everywhere = BTreeMap::from([("r".to_string(), Arc::new(resources.clone()))]);
    let found = candidates(&want(&["b", "a"]), &everywhere).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].zone.as_str(), found[0].host.as_str(), found[0].reach.len()), ("", "b", 0), "{found:?}");
    resources.hosts.insert("c".into(), "online".into());
    let listed = BTreeMap::from([("r".to_string(), Arc::new(resources.clone()))]);
    assert_eq!(candidates(&want(&[]), &listed).unwrap()[0].reach, ["a", "b"]);
    assert!(matches!(candidates(&want(&["c"]), &listed), Err(Refusal::NotHere(why)) if why.contains("it is in r/a, r/b")));
    // The one that would be asked is off: another one is.
    resources.hosts.insert("b".into(), "offline".into());
    let one_off = BTreeMap::from([("r".to_string(), Arc::new(resources))]);
    assert_eq!(candidates(&want(&["b", "a"]), &one_off).unwrap()[0].host, "a");
}

#[test]
fn a_region_is_chosen_only_where_there_is_no_choice() {
    let one = |storage: &str| {
        let storages = vec![Storage { storage: storage.into(), ..self::storage("a", "dir", 10 * GIB, 0) }];
        Arc::new(Resources { storages, ..Resources::default() })
    };
    let two = BTreeMap::from([("r".to_string(), one("ds")), ("s".to_string(), one("ds"))]);
    assert!(matches!(candidates(&want(&[]), &two), Err(Refusal::Wrong(why)) if why.contains("in several regions (r, s)")));
    let in_s = Want { terms: vec![Term { region: Some("s".into()), zone: None }], ..want(&[]) };
    assert_eq!(candidates(&in_s, &two).unwrap()[0].region, "s");
    let else_where = BTreeMap::from([("r".to_string(), one("else")), ("s".to_string(), one("ds"))]);
    assert_eq!(candidates(&want(&[]), &else_where).unwrap()[0].region, "s");
}

#[test]
fn reserve_and_overcommit() {
    let room = |reserve, overcommit| Room::read(reserve, overcommit).unwrap();
    let half_used = storage("a", "lvmthin", 100 * GIB, 50 * GIB);
    for (reserve, overcommit, promised, left) in [
        (None, None, 0, 50),
        (Some("10%"), None, 0, 40),
        (Some("20Gi"), None, 0, 30),
        (Some("60%"), None, 0, 0),
        (None, Some("1"), 60, 40),
        (None, Some("1.5"), 60, 90),
        (None, Some("2"), 300, 0),
        (Some("50%"), Some("10"), 60, 0),
        (Some("49%"), Some("10"), 60, 940),
    ] {
        assert_eq!(room(reserve, overcommit).left_bytes(&half_used, promised * GIB), left * GIB, "{reserve:?} {overcommit:?} {promised}");
    }
    let room = room(Some("10%"), Some("1.50"));
    let more = Want { room, required_bytes: 120 * GIB, ..want(&["a"]) };
    let all = regions(vec![half_used.clone()]);
    let mut promised = Promised::default();
    let mut found = |bytes: u64| {
        promised.note("r", &half_used, bytes);
        super::candidates(&more, Seen { regions: &all, promised: &promised, loads: &Loads::new() }).unwrap()
    };
    assert_eq!(with_room(&more, &found(30 * GIB)).unwrap().zone, "a", "more than the whole storage, by the class's word");
    let refused = format!("{:?}", with_room(&more, &found(31 * GIB)).unwrap_err());
    assert!(refused.contains("storageReserve keeps 10% free") && refused.contains("150% of the storage"), "{refused}");
    let thick = Want { room, ..want(&[]) };
    let all = regions(vec![storage("a", "lvm", 100 * GIB, 0)]);
    assert!(matches!(candidates(&thick, &all), Err(Refusal::Wrong(why)) if why.contains("storageOvercommit")));
}

#[test]
fn a_qcow2_on_lvm_has_its_format_in_its_name_and_tables_in_its_size() {
    let qcow2 = Want { format: Some("qcow2".into()), required_bytes: 5 << 20, ..want(&[]) };
    let all = regions(vec![storage("a", "lvm", 10 * GIB, 0)]);
    let found = candidates(&qcow2, &all).unwrap();
    assert_eq!((found[0].plugin, found[0].size_bytes), (Plugin::LvmChain, 5 << 20));
    assert_eq!(disk_name(9999, "pvc-1", Plugin::LvmChain, "qcow2"), "vm-9999-pvc-1.qcow2");
    assert_eq!(disk_of(9999, "vm-9999-pvc-1.qcow2", Plugin::LvmChain), "vm-9999-pvc-1.qcow2");
    assert_eq!(Plugin::of("lvm", "vm-9999-pvc-1.qcow2"), Some(Plugin::LvmChain));
    assert_eq!(Plugin::of("lvmthin", "qcow2"), Some(Plugin::Lvm));
    assert_eq!(virtual_bytes(Plugin::LvmChain, 10 * GIB, (10 * GIB) + (8 << 20)), 10 * GIB);
    assert_eq!(virtual_bytes(Plugin::LvmChain, 10 * GIB, 20 * GIB), 20 * GIB);
    assert_eq!(virtual_bytes(Plugin::Lvm, 5 << 20, 8 << 20), 8 << 20);
}
