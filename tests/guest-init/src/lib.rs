//! What the harness and the guest's PID 1 say to each other over the control channel.
//!
//! One TCP connection per call: a JSON line with the message and the length of the body, the body, and the same back.
//! No state is kept between calls but the jobs.
#![forbid(unsafe_code)]

use std::io::{BufRead, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// TCP port of the control channel in the guest.
pub const CONTROL_PORT: u16 = 5000;
/// TCP port in the guest that leads to [`NODE_SOCKET`].
pub const NODE_PORT: u16 = 10000;
/// The root of the node agent: the binary, `/dev`, `/proc`, `/sys`, `/csi`, `/var/lib/kubelet`, and nothing else.
pub const NODE_ROOT: &str = "/node";
/// The node agent's CSI socket, as PID 1 sees it; `/csi/csi.sock` inside [`NODE_ROOT`].
pub const NODE_SOCKET: &str = "/node/csi/csi.sock";
/// TCP port in the guest that leads to [`REGISTRATION_SOCKET`].
pub const REGISTRATION_PORT: u16 = 10001;
/// What the agent offers to kubelet in its `plugins_registry`, as PID 1 sees it.
pub const REGISTRATION_SOCKET: &str = "/node/var/lib/kubelet/plugins_registry/csi.proxmox.sinextra.dev-reg.sock";
/// The kernel modules in the order to load them, one file a line.
pub const MODULES: &str = "/modules/order";
/// Begins each line of PID 1 on the console.
pub const CONSOLE_PREFIX: &str = "guest-init: ";
/// The verdict lines: exactly one of them is printed in a guest's life, as its last word.
pub const SUCCESS: &str = "guest-init: success";
pub const FAILURE: &str = "guest-init: failure: ";

/// Bodies are files that a test reads or writes whole; 64 MiB is more than any of them (csi-sanity has 22).
const BODY_LIMIT_BYTES: u64 = 64 << 20;
/// A message line: paths and arguments.
const LINE_LIMIT_BYTES: u64 = 1 << 20;

/// Paths are PID 1's; a job's own are inside its root.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Request {
    /// Answers `Done` once the guest is set up.
    Ping,
    /// Starts a program with this environment alone. Its output goes to the console, each line with `label`, and is kept.
    Spawn {
        label: String,
        root: Option<String>,
        program: String,
        args: Vec<String>,
        env: Vec<(String, String)>,
    },
    /// Answers `Exited` with the output as the body, or `Running` after `limit_ms` with the output so far.
    Wait {
        job: u32,
        limit_ms: u64,
    },
    Signal {
        job: u32,
        signal: i32,
    },
    /// Body: at most 64 MiB from `offset`.
    Read {
        path: String,
        offset: u64,
        size_bytes: u64,
    },
    /// Writes the body at `offset` and syncs it; the file is made where it is missing, with `mode`.
    Write {
        path: String,
        offset: u64,
        truncate: bool,
        mode: u32,
    },
    /// What the name itself is: a symbolic link is not followed.
    Stat {
        path: String,
    },
    /// An extended attribute (xattr(7)) of what the name itself is, as the body.
    Attribute {
        path: String,
        name: String,
    },
    /// The filesystem that holds the path.
    StatFilesystem {
        path: String,
    },
    /// Names in a folder, sorted.
    List {
        path: String,
    },
    Sha256 {
        path: String,
    },
    /// Makes a file of `size_bytes` of [`PseudoRandom`] bytes, syncs it and answers its digest.
    Fill {
        path: String,
        seed: u64,
        size_bytes: u64,
    },
    MakeFolder {
        path: String,
    },
    /// A file, a symbolic link or an empty folder.
    Remove {
        path: String,
    },
    Mount {
        source: String,
        target: String,
        filesystem: String,
        read_only: bool,
    },
    /// Shows a file or folder at another place too.
    Bind {
        source: String,
        target: String,
    },
    Unmount {
        target: String,
    },
    /// Empties the kernel's caches (sync first), so that what is read comes from the disk.
    DropCaches,
    /// Prints the verdict and turns the machine off.
    PowerOff,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    Done,
    Started {
        job: u32,
        pid: u32,
    },
    Running,
    Exited(Exit),
    /// The bytes are the body.
    Bytes,
    Stat(Stat),
    Filesystem(Filesystem),
    Names(Vec<String>),
    /// SHA-256 in hex.
    Digest(String),
}

/// How a program ended: a code, or the signal that killed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    /// From just before its start until its output and itself had ended, by the guest's clock.
    pub took_us: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stat {
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    pub size_bytes: u64,
    pub device: u64,
    pub inode: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    File,
    Folder,
    SymbolicLink,
    BlockDevice,
    Socket,
    Other,
}

/// statvfs(3).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filesystem {
    pub block_bytes: u64,
    pub blocks: u64,
    pub blocks_free: u64,
    pub blocks_available: u64,
    pub inodes: u64,
    pub inodes_free: u64,
    pub read_only: bool,
}

/// The reply: an answer, or a sentence that says what failed.
pub type Reply = Result<Answer, String>;

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    message: T,
    body_bytes: u64,
}

/// Sends one message with its body.
pub fn send<T: Serialize>(mut to: impl Write, message: T, body: &[u8]) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(&Envelope { message, body_bytes: body.len() as u64 })?;
    line.push(b'\n');
    to.write_all(&line)?;
    to.write_all(body)?;
    to.flush()
}

/// Receives one message with its body.
pub fn receive<T: DeserializeOwned>(from: &mut impl BufRead) -> std::io::Result<(T, Vec<u8>)> {
    let mut line = Vec::new();
    from.take(LINE_LIMIT_BYTES).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    let Envelope { message, body_bytes } = serde_json::from_slice(&line)?;
    if body_bytes > BODY_LIMIT_BYTES {
        return Err(std::io::Error::other(format!("a body of {body_bytes} bytes: {BODY_LIMIT_BYTES} at most")));
    }
    let mut body = Vec::new();
    from.take(body_bytes).read_to_end(&mut body)?;
    if body.len() as u64 != body_bytes {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok((message, body))
}

/// Bytes that do not compress or repeat, the same from the same seed: splitmix64 (Steele, Lea, Flood 2014).
#[derive(Debug, Clone)]
pub struct PseudoRandom(pub u64);

impl PseudoRandom {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The next bytes of the sequence, when each call but the last asks for a multiple of 8.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            for (byte, random) in chunk.iter_mut().zip(self.next().to_le_bytes()) {
                *byte = random;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_back_with_their_bodies() {
        let mut wire = Vec::new();
        send(&mut wire, Request::Sha256 { path: "/a\nb".into() }, b"").unwrap();
        send(&mut wire, Reply::Err("no".into()), b"body\n\0").unwrap();
        let mut from = wire.as_slice();
        let (request, body) = receive::<Request>(&mut from).unwrap();
        assert!(matches!(request, Request::Sha256 { path } if path == "/a\nb"));
        assert!(body.is_empty());
        let (reply, body) = receive::<Reply>(&mut from).unwrap();
        assert_eq!((reply, body.as_slice()), (Err("no".into()), b"body\n\0".as_slice()));
        assert!(receive::<Request>(&mut from).is_err());
    }

    #[test]
    fn a_short_body_is_an_error() {
        let mut wire = Vec::new();
        send(&mut wire, Request::Ping, b"1234").unwrap();
        wire.pop();
        assert!(receive::<Request>(&mut wire.as_slice()).is_err());
    }

    #[test]
    fn pseudo_random_bytes_do_not_depend_on_the_pieces() {
        let (mut whole, mut pieces) = ([0; 61], [0; 61]);
        PseudoRandom(7).fill(&mut whole);
        let mut source = PseudoRandom(7);
        pieces.chunks_mut(16).for_each(|piece| source.fill(piece));
        assert_eq!(whole, pieces);
        // First output of splitmix64 for seed 0, from the reference implementation.
        let mut first = [0; 8];
        PseudoRandom(0).fill(&mut first);
        assert_eq!(u64::from_le_bytes(first), 0xe220_a839_7b1d_cdaf);
    }
}
