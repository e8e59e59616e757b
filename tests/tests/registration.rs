//! The release binary and kubelet: registered by itself, ready when kubelet has said so, and gone without a trace.
//!
//! kubelet's part is played as pkg/kubelet/pluginmanager does it: GetInfo on the socket in its folder, NodeGetInfo on the
//! endpoint that it was told, NotifyRegistrationStatus.
#![allow(clippy::unwrap_used, reason = "a test may fail by panicking")]

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use proto::csi;
use proto::pluginregistration::registration_client::RegistrationClient;
use proto::pluginregistration::{InfoRequest, RegistrationStatus};
use testbed::tools;
use tonic::transport::{Channel, Endpoint};

/// Longer than any pause of the agent (10 s after a refusal), on a loaded machine.
const LIMIT: Duration = Duration::from_secs(60);

/// An agent on this host, killed when the test ends.
struct Agent {
    child: Child,
    folder: PathBuf,
}

impl Agent {
    fn start(name: &str, args: &[&str]) -> Self {
        let folder = std::env::temp_dir().join(format!("csi-registration-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        let at = |path: &str| folder.join(path).display().to_string();
        let child = Command::new(tools::release_binary("proxmox-csi-node"))
            .args(["--csi-address", &at("csi.sock"), "--kubelet-registration-path", &at("csi.sock"), "--plugin-registration-path", &at("")])
            .args(["--metrics-address=127.0.0.1:0", "--node-id=worker-1/101"])
            .args(args)
            .env_clear()
            .stdin(Stdio::null())
            .stderr(std::fs::File::create(folder.join("log")).unwrap())
            .spawn()
            .unwrap();
        Self { child, folder }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    async fn until<T>(&self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(found) = look() {
                return found;
            }
            assert!(Instant::now() < deadline, "never: {what}; the agent says:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Status and body of one of the pages.
    async fn page(&self, path: &str) -> (u16, String) {
        let address = self.until("its address", || Some(self.log().split_once("/metrics on ")?.1.lines().next()?.to_string())).await;
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: test\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_string())
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("csi.proxmox.sinextra.dev-reg.sock")
    }

    async fn terminate(&mut self) {
        assert!(Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap().success());
        let deadline = Instant::now() + LIMIT;
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "still there after SIGTERM: {}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

async fn connect(path: &str) -> Channel {
    Endpoint::from_shared(format!("unix://{path}")).unwrap().connect().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn kubelet_registers_the_agent_refuses_it_and_is_offered_it_again() {
    let mut agent = Agent::start("kubelet", &["--region=fsn1", "--zone=pve-1"]);
    let socket = agent.socket();
    agent.until("the socket", || socket.exists().then_some(())).await;
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let (status, why) = agent.page("/readyz").await;
    assert!(status == 503 && why.contains("kubelet has not answered yet"), "{status} {why}");

    let mut registration = RegistrationClient::new(connect(&socket.display().to_string()).await);
    let info = registration.get_info(InfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.r#type.as_str(), info.name.as_str()), ("CSIPlugin", proto::DRIVER_NAME));
    assert_eq!(info.supported_versions, ["1.0.0"]);
    let mut node = csi::node_client::NodeClient::new(connect(&info.endpoint).await);
    let who = node.node_get_info(csi::NodeGetInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(who.node_id, "worker-1/101");
    registration.notify_registration_status(RegistrationStatus { plugin_registered: true, error: String::new() }).await.unwrap();
    assert_eq!(agent.page("/readyz").await, (200, "ok\n".into()));
    assert_eq!(agent.page("/healthz").await, (200, "ok\n".into()));
    let (_, metrics) = agent.page("/metrics").await;
    for line in ["proxmox_csi_node_ready 1\n", "proxmox_csi_rpc_duration_seconds_count{rpc=\"NodeGetInfo\",code=\"OK\"} 1\n"] {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }

    // kubelet does not come again by itself: the socket must go and come back.
    let refused = RegistrationStatus { plugin_registered: false, error: "detected topology value collision".into() };
    registration.notify_registration_status(refused).await.unwrap();
    let (status, why) = agent.page("/readyz").await;
    assert!(status == 503 && why.contains("topology value collision"), "{status} {why}");
    agent.until("the socket's end", || (!socket.exists()).then_some(())).await;
    agent.until("the next offer", || socket.exists().then_some(())).await;

    // Somebody tidied up; and whatever happens there, the agent is alive.
    std::fs::remove_file(&socket).unwrap();
    agent.until("another socket", || socket.exists().then_some(())).await;
    assert_eq!(agent.page("/healthz").await.0, 200);

    std::fs::remove_file(agent.folder.join("csi.sock")).unwrap();
    let (status, why) = agent.page("/healthz").await;
    assert!(status == 503 && why.contains("is not ours any more"), "{status} {why}");
    agent.terminate().await;
    assert!(!socket.exists(), "a driver that is gone does not stay in the CSINode: {}", agent.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn while_it_does_not_know_its_place_it_lives_unregistered_and_says_why() {
    let agent = Agent::start("unknown", &["--labels-file", "/nowhere/labels", "--region=fsn1"]);
    let (_, why) = loop {
        let seen = agent.page("/readyz").await;
        if !seen.1.contains("just been started") {
            break seen;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert!(why.contains("/nowhere/labels"), "{why}");
    assert_eq!(agent.page("/healthz").await.0, 200);
    assert!(!agent.socket().exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_over_the_limit_is_refused_and_the_next_one_answered() {
    let agent = Agent::start("large", &["--region=fsn1", "--zone=pve-1"]);
    agent.until("the socket", || agent.socket().exists().then_some(())).await;
    let channel = connect(&agent.folder.join("csi.sock").display().to_string()).await;
    let mut node = csi::node_client::NodeClient::new(channel);
    for _ in 0..8 {
        let large = csi::NodeGetVolumeStatsRequest { volume_id: "x".repeat(5 << 20), volume_path: "/x".into(), ..Default::default() };
        let refused = node.node_get_volume_stats(large).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::OutOfRange, "{refused:?}");
    }
    assert!(node.node_get_info(csi::NodeGetInfoRequest {}).await.is_ok());
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.child.id())).unwrap();
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok()).unwrap();
    assert!(rss < 8 << 10, "{rss} KiB after eight requests of 5 MiB");
}
