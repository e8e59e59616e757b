//! From a unix socket to a TCP port of this host and back: a guest's node as a tool on the host wants it, and the controller
//! as a tool in the guest can reach it.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

/// Carries connections until it is dropped. What runs then ends by itself.
#[derive(Debug)]
pub struct Bridge {
    stop: Arc<AtomicBool>,
    from: From,
}

#[derive(Debug)]
enum From {
    Socket(PathBuf),
    Port(u16),
}

impl Bridge {
    /// Listens on a unix socket, for its owner alone; leads to `port` of this host.
    pub fn from_socket(socket: &Path, port: u16) -> Result<Self> {
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket).with_context(|| format!("listen on {}", socket.display()))?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600)).with_context(|| format!("chmod {}", socket.display()))?;
        carry(From::Socket(socket.into()), move || {
            let (unix, _) = listener.accept()?;
            // A peer that is not there closes the connection; the caller sees that.
            Ok(TcpStream::connect(("127.0.0.1", port)).map(|tcp| (unix, tcp)).ok())
        })
    }

    /// Listens on a free TCP port of the loopback; leads to a unix socket.
    pub fn from_port(socket: &Path) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).context("listen on a free port")?;
        let port = listener.local_addr().context("look which port it is")?.port();
        let socket = socket.to_owned();
        carry(From::Port(port), move || {
            let (tcp, _) = listener.accept()?;
            Ok(UnixStream::connect(&socket).map(|unix| (unix, tcp)).ok())
        })
    }

    /// The port that [`Bridge::from_port`] took.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        if let From::Port(port) = self.from { Some(port) } else { None }
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // One more connection, so that the thread looks.
        match &self.from {
            From::Socket(socket) => {
                let _ = UnixStream::connect(socket);
                let _ = std::fs::remove_file(socket);
            }
            From::Port(port) => drop(TcpStream::connect(("127.0.0.1", *port))),
        }
    }
}

fn carry(from: From, accept: impl Fn() -> std::io::Result<Option<(UnixStream, TcpStream)>> + Send + 'static) -> Result<Bridge> {
    let bridge = Bridge { stop: Arc::default(), from };
    let stop = Arc::clone(&bridge.stop);
    std::thread::Builder::new().name("bridge".into()).spawn(move || {
        while let Ok(pair) = accept()
            && !stop.load(Ordering::Relaxed)
        {
            if let Some((unix, tcp)) = pair {
                // Without a thread the connection closes; the caller sees that.
                let _ = splice(unix, tcp);
            }
        }
    })?;
    Ok(bridge)
}

fn splice(unix: UnixStream, tcp: TcpStream) -> std::io::Result<()> {
    tcp.set_nodelay(true)?;
    let (from_unix, to_tcp) = (unix.try_clone()?, tcp.try_clone()?);
    one_way(from_unix, to_tcp, |tcp| tcp.shutdown(Shutdown::Write))?;
    one_way(tcp, unix, |unix| unix.shutdown(Shutdown::Write))
}

fn one_way<R, W>(mut from: R, mut to: W, end: impl FnOnce(&W) -> std::io::Result<()> + Send + 'static) -> std::io::Result<()>
where
    R: Read + Send + 'static,
    W: Write + Send + 'static,
{
    std::thread::Builder::new().spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = end(&to);
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_there_and_back() {
        let folder = std::env::temp_dir().join(format!("csi-bridge-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (behind, front) = (folder.join("behind"), folder.join("front"));
        let server = UnixListener::bind(&behind).unwrap();
        // front (unix) → port → behind (unix).
        let inner = Bridge::from_port(&behind).unwrap();
        let outer = Bridge::from_socket(&front, inner.port().unwrap()).unwrap();
        let mut client = UnixStream::connect(&front).unwrap();
        let (mut peer, _) = server.accept().unwrap();
        client.write_all(b"there").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut heard = String::new();
        peer.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "there");
        peer.write_all(b"back").unwrap();
        drop(peer);
        heard.clear();
        client.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "back");
        drop((outer, inner));
        assert!(UnixStream::connect(&front).is_err());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
