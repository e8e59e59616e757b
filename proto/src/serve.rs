//! A private unix socket with Identity and one more service on it, or with one service alone.
//!
//! hyper's HTTP/2 straight under tonic's generated services: no router, and a drain that really ends at its deadline
//! (tonic's own waits for ever on a client that never answers).

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tonic::body::Body;
use tonic::server::NamedService;
use tower_service::Service;

use crate::csi::identity_server::IdentityServer;
use crate::identity::Identity;
use crate::log::{self, InCall};

/// Calls at one time on one connection; each sidecar has one connection and at most some ten workers.
const MAX_CONCURRENT_CALLS: u32 = 128;

/// Where a plugin listens: an absolute path, from `unix:///csi/csi.sock`, `unix:/csi/csi.sock` or `/csi/csi.sock`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint(PathBuf);

impl Endpoint {
    /// The socket's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(given: &str) -> Result<Self, String> {
        let path = given.strip_prefix("unix://").or_else(|| given.strip_prefix("unix:")).unwrap_or(given);
        if !path.starts_with('/') || path.ends_with('/') {
            return Err(format!("CSI endpoint {given:?} is no unix socket: write unix:///csi/csi.sock or an absolute path"));
        }
        Ok(Self(path.into()))
    }
}

/// Why serving could not begin, or could not go on.
#[derive(Debug)]
pub struct Error {
    step: &'static str,
    path: PathBuf,
    cause: std::io::Error,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CSI endpoint {}: {}: {}", self.path.display(), self.step, self.cause)
    }
}

impl std::error::Error for Error {}

/// Resolves at SIGTERM or SIGINT.
///
/// # Errors
/// The signal handlers could not be installed.
pub async fn terminated() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    tokio::select! { _ = term.recv() => (), _ = int.recv() => () }
    Ok(())
}

/// Serves `identity` and `service` on `endpoint` until `stop` resolves, then lets running calls end within `drain`.
///
/// A stale socket is replaced, a live one is an error; the socket is its owner's alone (mode 0600) from the first moment
/// that a client can see it. The socket is removed at the end.
///
/// # Errors
/// The socket cannot be made, or another process serves it.
pub async fn serve<S>(
    endpoint: &Endpoint,
    identity: Identity,
    service: S,
    stop: impl Future<Output = ()>,
    drain: Duration,
) -> Result<(), Error>
where
    S: Service<http::Request<Incoming>, Response = http::Response<Body>, Error = Infallible> + NamedService + Clone + Send + Sync + 'static,
    S::Future: Send + 'static,
{
    Socket::open(endpoint.path())?.serve(with_identity(identity, service), stop, drain).await
}

/// Both services as one, for [`Socket::serve`].
pub fn with_identity<S>(identity: Identity, service: S) -> Mux<S> {
    Mux { identity: IdentityServer::new(identity), service }
}

/// A listening socket.
#[derive(Debug)]
pub struct Socket {
    listener: std::os::unix::net::UnixListener,
    place: Place,
}

/// Where a socket of ours is, so that one can see whether it still is.
#[derive(Debug, Clone)]
pub struct Place {
    path: PathBuf,
    /// Device and inode.
    file: (u64, u64),
}

impl Place {
    /// Whether a client that goes to the path comes to us.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        std::fs::symlink_metadata(&self.path).is_ok_and(|there| (there.dev(), there.ino()) == self.file)
    }

    /// The path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Socket {
    /// Makes the socket: bound under another name, made private, then renamed into place. A stale one is replaced.
    ///
    /// # Errors
    /// It cannot be made, or another process serves it.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed = |step: &'static str| move |cause: std::io::Error| Error { step, path: path.to_path_buf(), cause };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed("make its folder"))?;
        }
        if let Ok(there) = std::fs::symlink_metadata(path) {
            if !there.file_type().is_socket() {
                let cause =
                    std::io::Error::new(std::io::ErrorKind::AlreadyExists, "it is there and no socket: remove it or name another path");
                return Err(failed("look")(cause));
            }
            // A socket that nobody listens on refuses: it is what a killed process left behind.
            if UnixStream::connect(path).is_ok() {
                let cause = std::io::Error::new(std::io::ErrorKind::AddrInUse, "another process serves it: stop that one first");
                return Err(failed("look")(cause));
            }
        }
        // Beside it, short (a socket's path has 107 bytes at most), and never seen by a client: kubelet, too, passes over
        // names that begin with a dot.
        let fresh = path.with_file_name(format!(".{}", std::process::id()));
        let _ = std::fs::remove_file(&fresh);
        let listener = std::os::unix::net::UnixListener::bind(&fresh).map_err(failed("bind"))?;
        listener.set_nonblocking(true).map_err(failed("make it non-blocking"))?;
        std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600)).map_err(failed("make it private"))?;
        let file = std::fs::symlink_metadata(&fresh).map_err(failed("look"))?;
        std::fs::rename(&fresh, path).map_err(failed("put it in place"))?;
        Ok(Self { listener, place: Place { path: path.into(), file: (file.dev(), file.ino()) } })
    }

    /// Where it is.
    #[must_use]
    pub fn place(&self) -> Place {
        self.place.clone()
    }

    /// Serves until `stop` resolves, then lets running calls end within `drain`. The socket is removed as soon as it stops,
    /// unless another process has put its own there.
    ///
    /// # Errors
    /// The runtime does not take the socket.
    pub async fn serve<S>(self, service: S, stop: impl Future<Output = ()>, drain: Duration) -> Result<(), Error>
    where
        S: Service<http::Request<Incoming>, Response = http::Response<Body>, Error = Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
    {
        let Self { listener, place } = self;
        let taken = UnixListener::from_std(listener);
        let listener = taken.map_err(|cause| Error { step: "listen", path: place.path.clone(), cause })?;
        crate::info!("serving {} on {}", S::NAME, place.path.display());
        // Without its type, so that HTTP/2 is compiled once, and not once a service.
        let service: Calls = Arc::new(move |request| Box::pin(service.clone().call(request)));
        // Each connection holds a receiver: when all are dropped, all connections have ended.
        let (stopping, stopped) = watch::channel(false);
        tokio::pin!(stop);
        loop {
            tokio::select! {
                () = &mut stop => break,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => { tokio::spawn(connection(stream, Arc::clone(&service), stopped.clone())); }
                    // Out of descriptors, a client that left at once: the next one may do better. Paced by the pause below.
                    Err(cause) => { crate::error!("accept: {cause}"); tokio::time::sleep(Duration::from_millis(50)).await; }
                },
            }
        }
        crate::info!("stopping {}: running calls have {} s to end", S::NAME, drain.as_secs());
        drop(listener);
        if place.is_ours() {
            let _ = std::fs::remove_file(&place.path);
        }
        drop(stopped);
        let _ = stopping.send(true);
        if tokio::time::timeout(drain, stopping.closed()).await.is_err() {
            crate::warn!("stopped {} with calls still running after {} s", S::NAME, drain.as_secs());
        }
        Ok(())
    }
}

/// A service's calls.
type Calls = Arc<dyn Fn(http::Request<Incoming>) -> Answer + Send + Sync>;

/// One client's connection, until it closes or is drained.
async fn connection(stream: tokio::net::UnixStream, service: Calls, mut stopped: watch::Receiver<bool>) {
    let served = http2::Builder::new(TokioExecutor::new()).max_concurrent_streams(MAX_CONCURRENT_CALLS).serve_connection(
        TokioIo::new(stream),
        hyper::service::service_fn(move |request| InCall::new(log::new_call(), logged(Arc::clone(&service), request))),
    );
    tokio::pin!(served);
    let ended = tokio::select! {
        ended = served.as_mut() => Some(ended),
        _ = stopped.wait_for(|stop| *stop) => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(cause) = ended {
        crate::debug!("connection ended: {cause}");
    }
}

/// One call, with its line in the log and its place in the metrics.
async fn logged(service: Calls, request: http::Request<Incoming>) -> Result<http::Response<Body>, Infallible> {
    let begun = Instant::now();
    let rpc = request.uri().path().rsplit('/').next().unwrap_or_default().to_string();
    let answer = service(request).await?;
    log_call(&rpc, &answer, begun.elapsed());
    Ok(answer)
}

/// Two services on one socket, told apart by the path's first part (`/csi.v1.Identity/…`).
#[derive(Clone)]
pub struct Mux<S> {
    identity: IdentityServer<Identity>,
    service: S,
}

impl<S> fmt::Debug for Mux<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mux").finish_non_exhaustive()
    }
}

type Answer = Pin<Box<dyn Future<Output = Result<http::Response<Body>, Infallible>> + Send>>;

impl<S> Service<http::Request<Incoming>> for Mux<S>
where
    S: Service<http::Request<Incoming>, Response = http::Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Incoming>) -> Answer {
        let identity = request.uri().path().starts_with("/csi.v1.Identity/");
        if identity { Box::pin(self.identity.call(request)) } else { Box::pin(self.service.call(request)) }
    }
}

impl<S: NamedService> NamedService for Mux<S> {
    const NAME: &'static str = S::NAME;
}

/// The call log: RPC, code, message, time. Nothing of the request, so no secret; messages name the volume.
fn log_call(rpc: &str, answer: &http::Response<Body>, took: Duration) {
    let status = tonic::Status::from_header_map(answer.headers());
    crate::metrics::count_call(rpc, status.as_ref().map_or(tonic::Code::Ok, tonic::Status::code), took);
    match status {
        Some(status) if status.code() != tonic::Code::Ok => {
            crate::warn!("{rpc}: {:?} after {} ms: {}", status.code(), took.as_millis(), status.message());
        }
        _ if matches!(rpc, "Probe" | "NodeGetCapabilities" | "ControllerGetCapabilities" | "GetPluginCapabilities" | "GetPluginInfo") => {
            crate::debug!("{rpc}: OK after {} ms", took.as_millis());
        }
        _ => crate::info!("{rpc}: OK after {} ms", took.as_millis()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_in_all_three_forms() {
        for given in ["unix:///csi/csi.sock", "unix:/csi/csi.sock", "/csi/csi.sock"] {
            assert_eq!(given.parse::<Endpoint>().unwrap().path(), Path::new("/csi/csi.sock"));
        }
        for given in ["", "tcp://127.0.0.1:1", "csi.sock", "unix://csi.sock", "/csi/"] {
            let refused = given.parse::<Endpoint>().unwrap_err();
            assert!(refused.contains("unix:///csi/csi.sock"), "{refused}");
        }
    }
}
