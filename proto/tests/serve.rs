//! The socket: private, replaces a stale one, refuses a live one, drains within its deadline.
#![allow(clippy::unwrap_used, reason = "a test may fail by panicking")]

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use proto::csi::{self, node_server::NodeServer};
use proto::identity::Identity;
use proto::serve::{Endpoint, serve};
use tokio::sync::oneshot;
use tonic::{Request, Response, Status};

struct Node {
    /// How long NodeGetInfo takes.
    pause: Duration,
}

#[tonic::async_trait]
impl csi::node_server::Node for Node {
    async fn node_get_info(&self, _: Request<csi::NodeGetInfoRequest>) -> Result<Response<csi::NodeGetInfoResponse>, Status> {
        tokio::time::sleep(self.pause).await;
        Ok(Response::new(csi::NodeGetInfoResponse { node_id: "n".into(), ..Default::default() }))
    }
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("csi-serve-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
    fn socket(&self) -> PathBuf {
        self.0.join("csi.sock")
    }
    fn endpoint(&self) -> Endpoint {
        format!("unix://{}", self.socket().display()).parse().unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

type Served = tokio::task::JoinHandle<Result<(), proto::serve::Error>>;

async fn start(folder: &Folder, pause: Duration, drain: Duration) -> (oneshot::Sender<()>, Served) {
    let (stop, stopped) = oneshot::channel();
    let endpoint = folder.endpoint();
    let served = tokio::spawn(async move {
        serve(&endpoint, Identity::new("1"), NodeServer::new(Node { pause }), async { drop(stopped.await) }, drain).await
    });
    let deadline = Instant::now() + Duration::from_secs(10);
    while UnixStream::connect(folder.socket()).is_err() {
        assert!(Instant::now() < deadline && !served.is_finished(), "the socket never came up");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    (stop, served)
}

#[tokio::test]
async fn stale_socket_is_replaced_and_the_new_one_is_private() {
    let folder = Folder::new("stale");
    drop(std::os::unix::net::UnixListener::bind(folder.socket()).unwrap());
    let (stop, served) = start(&folder, Duration::ZERO, Duration::from_secs(5)).await;
    assert_eq!(std::fs::metadata(folder.socket()).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 1, "nothing but the socket is left in its folder");
    stop.send(()).unwrap();
    served.await.unwrap().unwrap();
    assert!(!folder.socket().exists(), "the socket is removed at the end");
}

#[tokio::test]
async fn a_live_socket_and_a_plain_file_are_left_alone() {
    let folder = Folder::new("live");
    let (stop, served) = start(&folder, Duration::ZERO, Duration::from_secs(5)).await;
    let second =
        serve(&folder.endpoint(), Identity::new("1"), NodeServer::new(Node { pause: Duration::ZERO }), async {}, Duration::ZERO).await;
    assert!(second.unwrap_err().to_string().contains("another process serves it"));
    stop.send(()).unwrap();
    served.await.unwrap().unwrap();
    std::fs::write(folder.socket(), "precious").unwrap();
    let third =
        serve(&folder.endpoint(), Identity::new("1"), NodeServer::new(Node { pause: Duration::ZERO }), async {}, Duration::ZERO).await;
    assert!(third.unwrap_err().to_string().contains("no socket"));
    assert_eq!(std::fs::read(folder.socket()).unwrap(), b"precious");
}

/// tonic's own server was still there after 25 s.
#[tokio::test]
async fn a_client_that_never_answers_does_not_hold_up_the_end() {
    let folder = Folder::new("silent");
    let (stop, served) = start(&folder, Duration::ZERO, Duration::from_millis(300)).await;
    let mut silent = UnixStream::connect(folder.socket()).unwrap();
    silent.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00").unwrap();
    let mut answer = [0; 9];
    tokio::task::spawn_blocking(move || silent.read_exact(&mut answer).map(|()| silent)).await.unwrap().unwrap();
    stop.send(()).unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(10), served).await;
    ended.expect("serving must end at its drain deadline").unwrap().unwrap();
}

/// SIGTERM while a pod is being staged: the call ends, the socket takes no new one.
#[cfg(feature = "client")]
#[tokio::test]
async fn a_running_call_ends_and_no_new_one_begins() {
    let folder = Folder::new("drain");
    let (stop, served) = start(&folder, Duration::from_millis(400), Duration::from_secs(10)).await;
    let target = tonic::transport::Endpoint::from_shared(format!("unix://{}", folder.socket().display())).unwrap();
    let mut client = csi::node_client::NodeClient::new(target.connect().await.unwrap());
    let mut probe = csi::identity_client::IdentityClient::new(target.connect().await.unwrap());
    assert_eq!(probe.get_plugin_info(csi::GetPluginInfoRequest {}).await.unwrap().into_inner().name, proto::DRIVER_NAME);
    let running = tokio::spawn(async move { client.node_get_info(csi::NodeGetInfoRequest {}).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    stop.send(()).unwrap();
    assert_eq!(running.await.unwrap().unwrap().into_inner().node_id, "n");
    served.await.unwrap().unwrap();
    assert!(probe.probe(csi::ProbeRequest {}).await.is_err());
}
