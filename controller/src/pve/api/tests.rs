use super::*;
use serde_json::json;

#[test]
fn parameters_go_where_proxmox_takes_them() {
    let request = free("pve1", "local", "local:9999/vm-9999-a.raw", Some(10));
    assert_eq!(request.target(), "/nodes/pve1/storage/local/content/local:9999/vm-9999-a.raw?delay=10");
    let request = change("pve1", 101, &Change::plug("scsi1", "a:b,ro=1;x"), "abc", Some(5));
    assert_eq!(request.name(), "POST /nodes/pve1/qemu/101/config");
    assert_eq!(request.target(), "/nodes/pve1/qemu/101/config");
    assert_eq!(request.body(), "scsi1=a%3Ab%2Cro%3D1%3Bx&digest=abc&background_delay=5");
    assert_eq!(request.endpoint(), "POST /nodes/{node}/qemu/{vmid}/config");
    assert_eq!(resources().endpoint(), "GET /cluster/resources");
    assert_eq!(
        volume("qemu", "content", "local:9999/vm-9999-a.raw").endpoint(),
        "GET /nodes/{node}/storage/{storage}/content/{volume}",
        "names that are words of the path"
    );
    assert_eq!(allocate("n", "s", 1, "a", "raw", 1).endpoint(), "POST /nodes/{node}/storage/{storage}/content");
    let mut several = Change::plug("scsi1", "a:b");
    several.delete.extend(["scsi2".into(), "scsi3".into()]);
    several.revert.insert("scsi4".into());
    assert_eq!(several.len(), 4);
    assert_eq!(change("pve1", 101, &several, "", None).body(), "scsi1=a%3Ab&delete=scsi2%2Cscsi3&revert=scsi4");
    assert_eq!((request.host(), resources().host()), (Some("pve1"), None));
    let upid = "UPID:pve1:0003A2B1:01C9A2F0:66A1B2C3:resize:100:csi@pve!csi:";
    assert_eq!(
        task_status(upid).map(|request| request.target()).unwrap(),
        "/nodes/pve1/tasks/UPID%3Apve1%3A0003A2B1%3A01C9A2F0%3A66A1B2C3%3Aresize%3A100%3Acsi%40pve%21csi%3A/status"
    );
    // Found by fuzzing: a host that leads to another path.
    for wrong in ["nonsense", "UPID:", "UPID:.:", "UPID:..:0003A2B1:"] {
        assert!(task_status(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn the_cluster_is_read_as_proxmox_types_it() {
    let data = json!([
        {"type":"qemu","vmid":"101","node":"pve1","name":"a","status":"running","template":0},
        {"type":"qemu","vmid":102,"node":"pve2","status":"unknown"},
        {"type":"lxc","vmid":103,"node":"pve2"},
        {"type":"storage","storage":"ds","node":"pve1","plugintype":"dir","status":"available","shared":0,
         "content":"iso,images","maxdisk":100.5,"disk":"40"},
        {"type":"node","node":"pve1","status":"online"},
        {"type":"node","node":"pve2","status":"offline"},
        {"type":"sdn","sdn":"x"},
    ]);
    let all = read_resources("GET /cluster/resources", &data).unwrap();
    assert_eq!(all.vms.len(), 2);
    assert_eq!(all.containers[&103], "pve2");
    assert_eq!(all.vms[&101].name.as_deref(), Some("a"));
    assert_eq!((all.storages[0].total_bytes, all.storages[0].used_bytes, all.storages[0].images), (100, 40, true));
    assert_eq!((all.hosts["pve1"].as_str(), all.hosts["pve2"].as_str()), ("online", "offline"));
    assert!(read_resources("x", &json!([{"type":"qemu","node":"a"}])).is_err());
    assert!(read_resources("x", &json!({})).is_err());
}

#[test]
fn pending_gives_both_views_and_the_digest() {
    let data = json!([
        {"key":"scsi1","value":"a:b","delete":1}, {"key":"scsi2","pending":"a:c"}, {"key":"memory","value":2048},
        {"key":"digest","value":"abc"},
    ]);
    let config = read_pending("x", &data).unwrap();
    assert!(config.lines["scsi1"].delete);
    assert_eq!(config.lines["scsi2"].pending.as_deref(), Some("a:c"));
    assert_eq!(config.configured("memory"), Some("2048"));
    assert_eq!(config.digest, "abc");
    assert!(read_pending("x", &json!([])).is_err(), "no digest: not a config to write to");
}

/// W52: Perl gives a number where a text was, and the other way round; what is no drive may be anything.
#[test]
fn w52_odd_types_stop_nothing() {
    let data = json!([
        {"key": "memory", "value": 2048}, {"key": "onboot", "value": true}, {"key": "tags", "value": ["a", "b"]},
        {"key": "numa0", "value": {"cpus": 1}}, {"key": "name", "value": null}, {"key": "cores", "value": 1.5, "pending": 2},
        {"key": "scsi1", "value": "a:b", "delete": "1"}, {"key": "scsi2", "value": "a:c", "delete": true}, {"key": "scsi3", "value": 7, "delete": []},
        {"key": "digest", "value": "abc"},
    ]);
    let config = read_pending("x", &data).unwrap();
    assert_eq!((config.lines.len(), config.digest.as_str()), (9, "abc"));
    assert_eq!((config.configured("memory"), config.configured("onboot")), (Some("2048"), Some("true")));
    assert!(config.lines["scsi1"].delete && config.lines["scsi2"].delete && !config.lines["scsi3"].delete);
    assert_eq!(config.lines["name"].value, None);
    // A digest that is a number is its text; an entry that is none has no key.
    assert_eq!(read_pending("x", &json!([{"key": "digest", "value": 12}])).unwrap().digest, "12");
    for odd in [json!(["scsi1"]), json!([{"value": "a"}]), json!([null]), json!("x"), json!(null)] {
        assert!(read_pending("x", &odd).is_err(), "{odd}");
    }
    let data = json!([
        {"type": "qemu", "vmid": 101.0, "node": "pve1", "name": 7, "template": "1"},
        {"type": "qemu", "vmid": "102", "node": "pve1", "name": null, "template": true},
        {"type": "storage", "storage": 5, "node": "pve1", "status": true, "shared": "1", "content": ["images"], "maxdisk": "many", "disk": null},
        {"type": "node", "node": "pve1", "status": ["online"]}, {"type": ["qemu"]}, {"type": null}, {},
    ]);
    let all = read_resources("x", &data).unwrap();
    assert_eq!((all.vms[&101].name.as_deref(), all.vms[&101].template), (Some("7"), true));
    assert_eq!((all.vms[&102].name.as_deref(), all.vms[&102].template), (None, true));
    let storage = &all.storages[0];
    assert_eq!((storage.storage.as_str(), storage.shared, storage.active, storage.total_bytes), ("5", true, false, 0));
    assert!(all.hosts["pve1"] != "online", "what is no word of Proxmox's is no node that is there");
    for odd in [json!([{"type": "qemu", "vmid": [101], "node": "pve1"}]), json!([{"type": "qemu", "vmid": -1, "node": "pve1"}]), json!(7)] {
        assert!(read_resources("x", &odd).is_err(), "{odd}");
    }
}

#[test]
fn a_running_vm_without_blockstat_has_not_answered() {
    let state = read_vm_state("x", &json!({"status":"running","blockstat":{"scsi0":{},"ide2":{}}})).unwrap();
    assert_eq!(state.plugged.unwrap().len(), 2);
    assert_eq!(read_vm_state("x", &json!({"status":"running"})).unwrap().plugged, None);
    assert_eq!(read_vm_state("x", &json!({"status":"stopped"})).unwrap().plugged, Some(BTreeSet::new()));
    assert!(read_vm_state("x", &json!({})).is_err());
}

#[test]
fn quorum() {
    assert!(read_quorate("x", &json!([{"type":"node","online":1}])).unwrap());
    assert!(read_quorate("x", &json!([{"type":"cluster","quorate":1}])).unwrap());
    assert!(!read_quorate("x", &json!([{"type":"cluster","quorate":0}])).unwrap());
}

#[test]
fn a_status_that_says_nothing_is_not_taken_for_quorate() {
    assert!(!read_quorate("x", &json!([])).unwrap());
    assert!(!read_quorate("x", &json!([{"type":"node"}, {"type":"node"}])).unwrap());
    assert!(!read_quorate("x", &json!([{"type":"cluster"}, {"type":"node"}])).unwrap());
}

#[test]
fn privileges() {
    assert!(read_sees_all_vms(&json!({"/vms":{"VM.Audit":1}})));
    assert!(read_sees_all_vms(&json!({"/":{"VM.Audit":1},"/vms":{"VM.Audit":1}})));
    for no in [
        json!({}),
        json!({"/vms":{"VM.Audit":0}}),
        json!({"/":{"VM.Audit":1},"/vms":{}}),
        json!({"/vms/100":{"VM.Audit":1}}),
        json!({"/":{"Sys.Audit":1}}),
    ] {
        assert!(!read_sees_all_vms(&no), "{no}");
    }
}

#[test]
fn tasks_end_well_badly_or_not_yet() {
    let read = |data: Value| read_task("x", "UPID:a:", &data);
    assert!(!read(json!({"status":"running"})).unwrap());
    assert!(read(json!({"status":"stopped","exitstatus":"OK"})).unwrap());
    assert!(read(json!({"status":"stopped","exitstatus":"WARNINGS: 2"})).unwrap());
    assert!(read(json!({"status":"stopped","exitstatus":"no"})).unwrap_err().to_string().contains("UPID:a:"));
    assert!(read(json!({"status":"stopped"})).is_err());
    assert!(read(json!({})).is_err());
}

#[test]
fn a_refusal_keeps_message_errors_and_reason() {
    let body = json!({"data":null,"message":"Parameter verification failed.\n","errors":{"scsi1":"hotplug problem - x\n"}});
    let cause = refusal(400, "Parameter verification failed.".into(), Some(body), "");
    let error = Error { call: "POST /x".into(), cause };
    assert_eq!(error.to_string(), "POST /x: 400 Parameter verification failed. scsi1: hotplug problem - x");
    let html = Error { call: "x".into(), cause: refusal(502, "Bad Gateway".into(), None, "<html>") };
    assert_eq!(html.to_string(), "x: 502 Bad Gateway");
}
