//! What the recordings do not show: other releases, block storages, tickets, faults, HTTPS, the machine.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;
use crate::machine::{Machine, PluggedDrive};

/// A connection and the headers that go with every request.
struct Client {
    address: String,
    headers: String,
}

/// Status, reason and body.
#[derive(Debug, PartialEq)]
struct Answer(u16, String, Value);

impl Client {
    fn of(sim: &Simulator) -> Client {
        let address = sim.url().split("//").nth(1).unwrap().split('/').next().unwrap().to_owned();
        Client { address, headers: format!("Authorization: PVEAPIToken={}\r\n", sim.token()) }
    }

    async fn ask(&self, method: &str, path: &str, body: &str) -> Answer {
        self.try_ask(method, path, body).await.expect("an answer")
    }

    async fn try_ask(&self, method: &str, path: &str, body: &str) -> Option<Answer> {
        let mut stream = TcpStream::connect(&self.address).await.unwrap();
        let path = if path.starts_with("/_sim") { path.to_owned() } else { format!("/api2/json{path}") };
        let head =
            format!("{method} {path} HTTP/1.1\r\nHost: pve\r\nConnection: close\r\n{}Content-Length: {}\r\n\r\n", self.headers, body.len());
        stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let (status, reason) = head.lines().next()?.strip_prefix("HTTP/1.1 ")?.split_once(' ')?;
        Some(Answer(status.parse().unwrap(), reason.to_owned(), serde_json::from_str(body).unwrap_or(Value::Null)))
    }

    async fn get(&self, path: &str) -> Value {
        self.ask("GET", path, "").await.2["data"].clone()
    }

    async fn create(&self, storage: &str, file: &str, size: &str) -> Answer {
        let body = format!("vmid=9999&filename={file}&size={size}");
        self.ask("POST", &format!("/nodes/pve1/storage/{storage}/content"), &body).await
    }

    async fn attach(&self, vmid: u32, line: &str) -> Answer {
        self.ask("PUT", &format!("/nodes/pve1/qemu/{vmid}/config"), line).await
    }
}

fn failed(status: u16, text: &str) -> (u16, String) {
    (status, text.to_owned())
}

impl Answer {
    fn line(&self) -> (u16, String) {
        (self.0, self.1.clone())
    }
}

async fn end_of(sim: &Simulator, answer: &Answer) -> String {
    sim.task(answer.2["data"].as_str().expect("a UPID")).await.unwrap().0
}

#[tokio::test]
async fn block_storages_round_and_speak_as_their_plugins_do() {
    let sim = Simulator::standard().start().await.unwrap();
    let client = Client::of(&sim);
    for (storage, rounded) in [("local-lvm", 4 << 20), ("thick-lvm", 4 << 20), ("local-zfs", 2 << 20)] {
        assert_eq!(client.create(storage, "vm-9999-a", "1025").await.line().0, 200);
        let look = client.get(&format!("/nodes/pve1/storage/{storage}/content/{storage}:vm-9999-a")).await;
        assert_eq!(look["size"], rounded, "{storage}");
    }
    let again = client.create("local-lvm", "vm-9999-a", "1M").await;
    let text = "lvcreate 'pve/vm-9999-a' error:   Logical Volume \"vm-9999-a\" already exists in volume group \"pve\"";
    assert_eq!(again.line(), failed(500, text));
    let again = client.create("local-zfs", "vm-9999-a", "1M").await;
    assert_eq!(again.line(), failed(500, "zfs error: cannot create 'rpool/data/vm-9999-a': dataset already exists"));
    let foreign = client.create("local-lvm", "vm-100-a", "1M").await;
    assert_eq!(foreign.line(), failed(500, "illegal name 'vm-100-a' - should be 'vm-9999-*'"));
    assert_eq!(client.create("thick-lvm", "vm-100-a", "1M").await.0, 200, "9.x takes any VMID in an lvm name");
    let full = client.create("thick-lvm", "vm-9999-full", "200G").await;
    let text = "lvcreate 'thick/vm-9999-full' error:   Volume group \"thick\" has insufficient free space (25598 extents): 51200 required.";
    assert_eq!(full.line(), failed(500, text));
    assert_eq!(client.create("local-lvm", "vm-9999-thin", "200G").await.0, 200, "thin pools overcommit");
    for (storage, end) in [
        ("local-lvm", "OK"),
        ("local-zfs", "OK"),
        ("thick-lvm", "lvremove 'thick/vm-9999-no' error:   Failed to find logical volume \"thick/vm-9999-no\""),
    ] {
        let gone = client.ask("DELETE", &format!("/nodes/pve1/storage/{storage}/content/{storage}:vm-9999-no"), "").await;
        assert_eq!(end_of(&sim, &gone).await, end, "{storage}");
    }
}

#[tokio::test]
async fn thick_volumes_come_with_old_bytes_behind_a_zeroed_head() {
    let sim = Simulator::standard().start().await.unwrap();
    let client = Client::of(&sim);
    client.create("thick-lvm", "vm-9999-a", "8M").await;
    let image = sim.image("pve1", "thick-lvm:vm-9999-a").unwrap();
    let bytes = std::fs::read(&image).unwrap();
    assert!(bytes[..4096].iter().all(|byte| *byte == 0) && bytes[4096..8192].iter().any(|byte| *byte != 0));
    std::fs::write(&image, vec![0xa5; 8 << 20]).unwrap();
    client.ask("DELETE", "/nodes/pve1/storage/thick-lvm/content/thick-lvm:vm-9999-a?delay=5", "").await;
    assert_eq!(sim.image("pve1", "thick-lvm:vm-9999-a"), None);
    client.create("thick-lvm", "vm-9999-b", "8M").await;
    let bytes = std::fs::read(sim.image("pve1", "thick-lvm:vm-9999-b").unwrap()).unwrap();
    assert!(bytes[..4096].iter().all(|byte| *byte == 0) && bytes[4096..].iter().all(|byte| *byte == 0xa5), "recycled");
}

#[tokio::test]
async fn a_block_volume_in_use_is_not_removed() {
    let sim = Simulator::standard().start().await.unwrap();
    let client = Client::of(&sim);
    for (storage, end) in [
        ("local-lvm", "lvremove 'pve/vm-9999-a' error:   Logical volume pve/vm-9999-a in use."),
        ("local-zfs", "zfs error: cannot destroy 'rpool/data/vm-9999-a': dataset is busy"),
    ] {
        client.create(storage, "vm-9999-a", "4M").await;
        client.attach(101, &format!("scsi1={storage}:vm-9999-a")).await;
        let gone = client.ask("DELETE", &format!("/nodes/pve1/storage/{storage}/content/{storage}:vm-9999-a"), "").await;
        assert_eq!(end_of(&sim, &gone).await, end);
        client.attach(101, "delete=scsi1").await;
        let gone = client.ask("DELETE", &format!("/nodes/pve1/storage/{storage}/content/{storage}:vm-9999-a"), "").await;
        assert_eq!(end_of(&sim, &gone).await, "OK");
    }
}

#[tokio::test]
async fn releases_differ_in_what_they_say_and_where() {
    for (version, in_body, reason) in [
        (Version::V8_2, false, "invalid token value!"),
        (Version::V8_4, true, "invalid token value!"),
        (Version::V9_0, true, "invalid token value!"),
        (Version::V9_2, true, "Authentication failed!"),
    ] {
        let sim = Simulator::standard().version(version).start().await.unwrap();
        let client = Client::of(&sim);
        assert_eq!(client.get("/version").await["release"], version.release());
        let missing = client.ask("GET", "/nodes/pve1/qemu/888/config", "").await;
        assert_eq!(missing.line(), failed(500, "Configuration file 'nodes/pve1/qemu-server/888.conf' does not exist"));
        assert_eq!(missing.2.get("message").is_some(), in_body);
        let wrong = Client { headers: "Authorization: PVEAPIToken=csi@pve!csi=no\r\n".to_owned(), ..client };
        assert_eq!(wrong.ask("GET", "/version", "").await, Answer(401, reason.to_owned(), Value::Null));
    }
}

#[tokio::test]
async fn before_8_4_a_refused_device_is_an_error_and_nothing_leaks() {
    for (version, status) in [(Version::V8_2, 400), (Version::V9_2, 200)] {
        let sim = Simulator::standard().version(version).start().await.unwrap();
        let client = Client::of(&sim);
        client.create("local", "vm-9999-a.raw", "1M").await;
        client.attach(101, "scsi1=local:9999/vm-9999-a.raw").await;
        let second = client.attach(102, "scsi1=local:9999/vm-9999-a.raw").await;
        assert_eq!(second.0, status);
        let vm = sim.vm(102).unwrap();
        assert!(vm.plugged.is_empty());
        assert_eq!(vm.config.contains_key("scsi1"), status == 200);
        assert_eq!(vm.leaked.contains("scsi1"), status == 200);
    }
}

#[tokio::test]
async fn tickets_need_their_csrf_token_and_grow_old() {
    let sim = Simulator::standard().start().await.unwrap();
    let anonymous = Client { headers: String::new(), ..Client::of(&sim) };
    let login = anonymous.ask("POST", "/access/ticket", &format!("username=csi@pve&password={STANDARD_PASSWORD}")).await;
    let ticket = login.2["data"]["ticket"].as_str().unwrap().to_owned();
    assert_eq!(login.2["data"]["clustername"], "fsn1");
    let cookie = format!("Cookie: PVEAuthCookie={}\r\n", ticket.replace('@', "%40"));
    let reader = Client { headers: cookie.clone(), ..Client::of(&sim) };
    assert_eq!(reader.ask("GET", "/nodes", "").await.0, 200);
    assert_eq!(reader.create("local", "vm-9999-a.raw", "1M").await.line(), failed(401, "Permission denied - invalid csrf token"));
    let csrf = login.2["data"]["CSRFPreventionToken"].as_str().unwrap();
    let writer = Client { headers: format!("{cookie}CSRFPreventionToken: {csrf}\r\n"), ..Client::of(&sim) };
    assert_eq!(writer.create("local", "vm-9999-a.raw", "1M").await.0, 200);
    let renewed = anonymous.ask("POST", "/access/ticket", &format!("username=csi@pve&password={ticket}")).await;
    assert_eq!(renewed.0, 200, "a good ticket serves as the password");
    sim.advance(Duration::from_secs(2 * 3600 + 1));
    assert_eq!(reader.ask("GET", "/nodes", "").await.0, 401);
}

#[tokio::test]
async fn request_faults_meet_the_planned_request_only() {
    let sim = Simulator::standard().start().await.unwrap();
    let client = Client::of(&sim);
    let full = Effect::Answer { status: 500, reason: "got timeout".to_owned() };
    sim.inject(Fault::next("GET", "/nodes", full).nth(2));
    let seen = [client.ask("GET", "/nodes", "").await.0, client.ask("GET", "/nodes", "").await.0, client.ask("GET", "/nodes", "").await.0];
    assert_eq!(seen, [200, 500, 200]);
    sim.inject(Fault::next("GET", "/version", Effect::Close));
    assert_eq!(client.try_ask("GET", "/version", "").await, None);
    sim.inject(Fault::next("GET", "/version", Effect::Hang));
    assert!(tokio::time::timeout(Duration::from_millis(50), client.ask("GET", "/version", "")).await.is_err());
    sim.inject(Fault::next("POST", "/nodes/*/storage/*/content", Effect::TimeOutButComplete));
    assert_eq!(client.create("local", "vm-9999-a.raw", "1M").await.line(), failed(596, "Connection timed out"));
    assert!(sim.settle().await);
    assert_eq!(sim.volumes("pve1", "local"), ["local:9999/vm-9999-a.raw"], "it completed afterwards");
    sim.inject(Fault::next("POST", "/nodes/*/storage/*/content", Effect::CloseAfterwards));
    let body = "vmid=9999&filename=vm-9999-b.raw&size=1M";
    assert_eq!(client.try_ask("POST", "/nodes/pve1/storage/local/content", body).await, None);
    assert_eq!(sim.volumes("pve1", "local").len(), 2);
    assert_eq!(sim.counters()["GET /nodes"], 3);
    sim.reset_counters();
    assert!(sim.counters().is_empty());
}

#[tokio::test]
async fn faults_of_plugging_leave_what_the_real_ones_leave() {
    let sim = Simulator::standard().start().await.unwrap();
    let client = Client::of(&sim);
    client.create("local", "vm-9999-a.raw", "1M").await;
    let line = "scsi1=local:9999/vm-9999-a.raw";
    sim.inject_inner(Inner::PhantomAttach { vmid: 101 }, 1);
    assert_eq!(client.attach(101, line).await.0, 200);
    let vm = sim.vm(101).unwrap();
    assert!(vm.config.contains_key("scsi1") && vm.plugged.is_empty() && vm.leaked.contains("scsi1"), "configured, not there, slot leaked");

    assert_eq!(client.attach(102, line).await.0, 200);
    sim.inject_inner(Inner::ControllerStays { vmid: 102 }, 1);
    let busy = client.attach(102, "delete=scsi1").await;
    let text = "hotplug problem - error on hot-unplugging device 'virtioscsi1' - still busy in guest?\n";
    assert_eq!(busy.2["errors"], json!({"scsi1": text}));
    let vm = sim.vm(102).unwrap();
    assert!(
        vm.plugged.is_empty() && vm.config.contains_key("scsi1") && vm.pending_delete.contains_key("scsi1"),
        "gone, and still configured"
    );
    assert_eq!(client.attach(102, "delete=scsi1").await.0, 200);

    assert_eq!(client.attach(102, "scsi2=local:9999/vm-9999-a.raw").await.0, 200);
    sim.inject_inner(Inner::DiskStays { vmid: 102 }, 1);
    assert_eq!(client.attach(102, "delete=scsi2").await.0, 400);
    assert!(sim.vm(102).unwrap().plugged.contains_key("scsi2"), "the guest kept it");
}

#[tokio::test]
async fn the_second_half_of_a_resize_can_fail() {
    let sim = Simulator::standard().start().await.unwrap();
    let client = Client::of(&sim);
    client.create("local-lvm", "vm-9999-a", "4M").await;
    client.attach(101, "scsi1=local-lvm:vm-9999-a").await;
    sim.inject_inner(Inner::ResizeSecondHalf { vmid: 101 }, 1);
    let resize = client.ask("PUT", "/nodes/pve1/qemu/101/resize", "disk=scsi1&size=8M").await;
    assert_eq!(end_of(&sim, &resize).await, "VM 101 qmp command 'block_resize' failed - got timeout");
    assert_eq!(std::fs::metadata(sim.image("pve1", "local-lvm:vm-9999-a").unwrap()).unwrap().len(), 8 << 20, "the volume has grown");
    assert_eq!(sim.vm(101).unwrap().config["scsi1"], "local-lvm:vm-9999-a,size=4M", "the config has not");
    let again = client.ask("PUT", "/nodes/pve1/qemu/101/resize", "disk=scsi1&size=8M").await;
    assert_eq!(end_of(&sim, &again).await, "OK");
    assert_eq!(sim.vm(101).unwrap().plugged["scsi1"].size_bytes, 4 << 20, "an equal size tells QEMU nothing");
}

#[tokio::test]
async fn a_node_that_goes_away_is_offline_and_its_vms_stale() {
    let standard = Simulator::standard().with(|description| {
        description.nodes.push(Node::online("pve2"));
        description.vms.push(Vm::linux(201, "pve2", "node-201", None));
    });
    let sim = standard.start().await.unwrap();
    let client = Client::of(&sim);
    sim.set_node_unreachable("pve2", Some("595 No route to host"));
    assert_eq!(client.ask("GET", "/nodes/pve2/qemu/201/config", "").await, Answer(595, "No route to host".to_owned(), Value::Null));
    let node = client.get("/cluster/status").await.as_array().unwrap().iter().find(|entry| entry["name"] == "pve2").cloned().unwrap();
    assert_eq!(node["online"], 0);
    let status = |list: Value| list.as_array().unwrap().iter().find(|vm| vm["vmid"] == 201).unwrap()["status"].clone();
    assert_eq!(status(client.get("/cluster/resources?type=vm").await), "running", "as last seen");
    sim.advance(Duration::from_secs(300));
    assert_eq!(status(client.get("/cluster/resources?type=vm").await), "unknown");
    sim.set_node_unreachable("pve2", None);
    assert_eq!(client.ask("GET", "/nodes/pve2/qemu/201/config", "").await.0, 200);
    let elsewhere = client.ask("GET", "/nodes/pve1/qemu/201/config", "").await;
    assert_eq!(elsewhere.line(), failed(500, "Configuration file 'nodes/pve1/qemu-server/201.conf' does not exist"));
}

/// Writes down what it is asked.
#[derive(Debug, Default)]
struct Witness(Mutex<Vec<String>>);

impl Machine for Witness {
    fn plug(&self, drive: &PluggedDrive) -> Result<(), String> {
        self.0.lock().unwrap().push(format!("plug {} {} {:?} {:?}", drive.index, drive.volid, drive.wwn, drive.serial));
        if drive.index == 7 { Err("Bus is full".to_owned()) } else { Ok(()) }
    }

    fn unplug(&self, index: u8) -> Result<(), String> {
        self.0.lock().unwrap().push(format!("unplug {index}"));
        Ok(())
    }

    fn resize(&self, index: u8, size_bytes: u64) -> Result<(), String> {
        self.0.lock().unwrap().push(format!("resize {index} {size_bytes}"));
        Ok(())
    }
}

#[tokio::test]
async fn a_registered_machine_is_plugged_for_real() {
    let sim = Simulator::standard().start().await.unwrap();
    let client = Client::of(&sim);
    let witness = Arc::new(Witness::default());
    sim.register_machine(101, witness.clone());
    client.create("local-lvm", "vm-9999-a", "4M").await;
    client.attach(101, "scsi3=local-lvm:vm-9999-a,wwn=0x5056432d49443033,serial=csi-0123").await;
    let resize = client.ask("PUT", "/nodes/pve1/qemu/101/resize", "disk=scsi3&size=8M").await;
    assert_eq!(end_of(&sim, &resize).await, "OK");
    client.attach(101, "delete=scsi3").await;
    let refused = client.attach(101, "scsi7=local-lvm:vm-9999-a").await;
    assert_eq!(refused.2["errors"], json!({"scsi7": "hotplug problem - VM 101 qmp command 'device_add' failed - Bus is full\n"}));
    let told = witness.0.lock().unwrap().clone();
    let plug = "plug 3 local-lvm:vm-9999-a Some(\"0x5056432d49443033\") Some(\"csi-0123\")";
    assert_eq!(told, [plug, "resize 3 8388608", "unplug 3", "plug 7 local-lvm:vm-9999-a None None"]);
}

#[tokio::test]
async fn a_task_runs_for_as_long_as_the_lock_is_held_and_time_stands_still() {
    let sim = Simulator::standard().start().await.unwrap();
    let client = Client::of(&sim);
    client.create("local", "vm-9999-a.raw", "1M").await;
    let (frozen, held) = (sim.freeze(), sim.hold_config_lock(101));
    let post = client.ask("POST", "/nodes/pve1/qemu/101/config", "scsi1=local:9999/vm-9999-a.raw").await;
    let upid = post.2["data"].as_str().unwrap().to_owned();
    let status = client.get(&format!("/nodes/pve1/tasks/{upid}/status")).await;
    assert_eq!((&status["status"], status.get("exitstatus")), (&json!("running"), None));
    drop(held);
    drop(frozen);
    assert_eq!(sim.task(&upid).await.unwrap().0, "OK");
    let other = Client { headers: "Authorization: PVEAPIToken=csi@pve!other=no\r\n".to_owned(), ..Client::of(&sim) };
    assert_eq!(other.ask("GET", &format!("/nodes/pve1/tasks/{upid}/status"), "").await.0, 401);
    sim.purge_task(&upid);
    let purged = client.ask("GET", &format!("/nodes/pve1/tasks/{upid}/status"), "").await;
    assert_eq!(purged.2["errors"], json!({"upid": "no such task"}));
}

#[tokio::test]
async fn somebody_else_can_act_between_two_requests() {
    let sim = Arc::new(Simulator::standard().start().await.unwrap());
    let client = Client::of(&sim);
    client.create("local", "vm-9999-a.raw", "1M").await;
    let digest = client.get("/nodes/pve1/qemu/101/config").await["digest"].as_str().unwrap().to_owned();
    sim.before("PUT", "/nodes/*/qemu/101/config", 1, |sim| sim.set_config(101, "description", Some("changed")));
    let late = client.attach(101, &format!("scsi1=local:9999/vm-9999-a.raw&digest={digest}")).await;
    assert_eq!(late.line(), failed(500, "checksum mismatch (file change by other user?)"));
}

#[tokio::test]
async fn control_requests_are_outside_the_api_and_not_counted() {
    let sim = Simulator::standard().start().await.unwrap();
    let client = Client::of(&sim);
    client.get("/version").await;
    assert_eq!(client.ask("GET", "/_sim/counters", "").await.2, json!({"GET /version": 1}));
    let fault = r#"{"method":"GET","path":"/version","effect":{"answer":{"status":595,"reason":"Connection refused"}}}"#;
    assert_eq!(client.ask("POST", "/_sim/faults", fault).await.0, 200);
    assert_eq!(client.ask("GET", "/version", "").await.line(), failed(595, "Connection refused"));
    assert_eq!(client.ask("POST", "/_sim/faults", r#"{"inner":{"phantom_attach":{"vmid":101}}}"#).await.0, 200);
    assert_eq!(client.ask("POST", "/_sim/faults", r#"{"path":"/x","effect":"explode"}"#).await.0, 400);
    assert_eq!(client.ask("POST", "/_sim/vm", r#"{"vmid":101,"lock":"backup"}"#).await.0, 200);
    assert_eq!(client.attach(101, "delete=scsi9").await.line(), failed(500, "VM is locked (backup)"));
}

#[tokio::test]
async fn one_connection_serves_many_requests() {
    let sim = Simulator::standard().start().await.unwrap();
    let client = Client::of(&sim);
    let mut stream = TcpStream::connect(&client.address).await.unwrap();
    for _ in 0..3 {
        let request = format!("GET /api2/json/version HTTP/1.1\r\nHost: pve\r\n{}\r\n", client.headers);
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut seen = Vec::new();
        while !seen.ends_with(b"}}") {
            assert_ne!(stream.read_buf(&mut seen).await.unwrap(), 0);
        }
        assert!(String::from_utf8(seen).unwrap().starts_with("HTTP/1.1 200 OK"));
    }
}

#[tokio::test]
async fn https_answers_and_plain_http_on_its_port_is_sent_there() {
    use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
    use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring};
    let sim = Simulator::standard().https().start().await.unwrap();
    let client = Client::of(&sim);
    assert_eq!(client.ask("GET", "/version", "").await.line(), failed(301, "Moved Permanently"));
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(sim.certificate_pem().unwrap().as_bytes()).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(&client.address).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let mut stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    let request = format!("GET /api2/json/version HTTP/1.1\r\nHost: pve\r\nConnection: close\r\n{}\r\n", client.headers);
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.contains("\"release\":\"9.2\""), "{answer}");
}

#[test]
fn a_description_is_read_from_yaml() {
    let text = "
cluster: fsn1
nodes: [{name: pve1}, {name: pve2, unreachable: 595 No route to host}]
storages: [{id: ceph, type: rbd, options: {pool: kube}}, {id: thin, type: lvmthin, nodes: [pve1], total_bytes: 1073741824}]
vms: [{vmid: 101, node: pve1, running: true, config: {name: a, scsihw: virtio-scsi-single}}]
users: [{id: csi@pve, tokens: [{id: csi, secret: s, privsep: false}]}]
roles: {CSI: [VM.Audit]}
acl: [{path: /, who: csi@pve, role: CSI}]
";
    let description: Description = serde_yaml::from_str(text).unwrap();
    assert_eq!((description.nodes.len(), description.storages.len(), description.vms[0].vmid), (2, 2, 101));
    assert!(serde_yaml::from_str::<Description>("nodez: []").is_err(), "an unknown key is refused");
}
