//! A unix socket on this host that leads to a TCP port: a guest's node socket as a tool on the host wants it.

use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Carries connections until it is dropped; then the socket is gone, and what runs ends by itself.
#[derive(Debug)]
pub struct Bridge {
    socket: PathBuf,
}

impl Bridge {
    /// Listens on `socket`, for its owner alone.
    pub fn open(socket: &Path, port: u16) -> Result<Self> {
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket).with_context(|| format!("listen on {}", socket.display()))?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600)).with_context(|| format!("chmod {}", socket.display()))?;
        std::thread::Builder::new().name("bridge".into()).spawn(move || {
            for unix in listener.incoming().flatten() {
                // A guest that is not there closes the connection; the caller sees that.
                let _ = TcpStream::connect(("127.0.0.1", port)).and_then(|tcp| splice(unix, tcp));
            }
        })?;
        Ok(Self { socket: socket.to_owned() })
    }

    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn splice(unix: UnixStream, tcp: TcpStream) -> std::io::Result<()> {
    tcp.set_nodelay(true)?;
    let (mut unix_in, mut tcp_out) = (unix.try_clone()?, tcp.try_clone()?);
    let (mut unix_out, mut tcp_in) = (unix, tcp);
    std::thread::Builder::new().spawn(move || {
        let _ = std::io::copy(&mut unix_in, &mut tcp_out);
        let _ = tcp_out.shutdown(std::net::Shutdown::Write);
    })?;
    std::thread::Builder::new().spawn(move || {
        let _ = std::io::copy(&mut tcp_in, &mut unix_out);
        let _ = unix_out.shutdown(std::net::Shutdown::Both);
    })?;
    Ok(())
}
