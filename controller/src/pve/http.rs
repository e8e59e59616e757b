//! One connection pool to one Proxmox cluster, its certificate check, and the answer's reason phrase.
//!
//! ureq drops the reason phrase, and before pve-http-server 5.2.0 it is the only place where Proxmox says why. A
//! pass-through transport reads it from the status line; ureq runs the transport on the caller's thread, so a
//! thread-local carries it over. The same transport notes whether anything was sent: the difference between "not done"
//! and "outcome unknown".

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use ureq::Agent;
use ureq::config::Config;
use ureq::tls::{PemItem, RootCerts, TlsConfig, TlsProvider};
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, NextTimeout, RustlsConnector, TcpConnector, Transport};

use super::pin::PinConnector;
use crate::config::Trust;
use crate::fence::Fence;

/// A host that takes longer to accept, TLS included, is down or far: the call is repeated anyway.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Proxmox's own proxy gives up after 30 s without output (596): our limit only catches what says nothing at all.
const CALL_TIMEOUT: Duration = Duration::from_secs(40);
/// pveproxy closes an idle connection after 5.0 s; younger ones are safe to reuse.
const MAX_IDLE_AGE: Duration = Duration::from_secs(4);
/// One per blocking thread would be the most that can help.
const MAX_IDLE_CONNECTIONS: usize = 8;
/// ureq's default is 128 KiB each way per connection; our requests are lines, our answers are read as they come.
const BUFFER_BYTES: usize = 16 << 10;
/// Where a system keeps the certificates it trusts, in the order of Go's crypto/x509 (the reference driver's).
const CA_BUNDLES: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// What counts instead of [`CALL_TIMEOUT`] in this process.
static PATIENCE: OnceLock<Duration> = OnceLock::new();

thread_local! {
    static REASON: RefCell<String> = const { RefCell::new(String::new()) };
    static SENT: Cell<bool> = const { Cell::new(false) };
    static FENCE: RefCell<Fence> = RefCell::new(Fence::default());
    static GATE: RefCell<Gate> = RefCell::new(Gate::default());
    static HELD_BACK: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Between the one who waits for a request and the thread that makes it: whether it went out, or never will.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gate(Arc<Mutex<Passage>>);

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Passage {
    #[default]
    Open,
    Passed,
    Shut,
}

impl Gate {
    fn passage(&self) -> std::sync::MutexGuard<'_, Passage> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets nothing out from now on. Whether that is in time: nothing went out before.
    pub(super) fn shut(&self) -> bool {
        let mut passage = self.passage();
        if *passage == Passage::Open {
            *passage = Passage::Shut;
        }
        *passage == Passage::Shut
    }

    /// Whether bytes may go out.
    fn pass(&self) -> bool {
        let mut passage = self.passage();
        if *passage == Passage::Open {
            *passage = Passage::Passed;
        }
        *passage == Passage::Passed
    }
}

/// Forgets the last call on this thread. The next one goes out only while `fence` is open, and `gate` was not shut.
pub(crate) fn begin_call(fence: Fence, gate: Gate) {
    REASON.with_borrow_mut(String::clear);
    SENT.set(false);
    FENCE.set(fence);
    GATE.set(gate);
    HELD_BACK.set(None);
    super::pin::refused();
}

/// Why the last request on this thread was not let out.
pub(super) fn held_back() -> Option<String> {
    HELD_BACK.with_borrow(Clone::clone)
}

/// The reason phrase of the last answer on this thread.
pub(super) fn reason() -> String {
    REASON.with_borrow(Clone::clone)
}

/// Whether any byte of the last request went out.
pub(super) fn was_sent() -> bool {
    SENT.get()
}

/// Has clients that are made from now on wait so long for an answer.
pub(super) fn be_patient(limit: Duration) {
    let _ = PATIENCE.set(limit);
}

/// A pool. `bundle`: the file to trust instead of the system's, where the system's is trusted. `connect`: as [`CONNECT_TIMEOUT`].
///
/// # Errors
/// A sentence: no certificates to trust were found.
pub(crate) fn agent(https: bool, trust: &Trust, bundle: Option<&Path>, connect: Duration) -> Result<Agent, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let pins = PinConnector::new(trust.pins(), &provider)?;
    let roots = match trust {
        _ if !https => Vec::new(),
        Trust::System => trusted(bundle)?,
        Trust::Ca { pem, .. } => certificates(pem),
        Trust::Pinned(_) | Trust::Blind => Vec::new(),
    };
    // Without roots ureq panics at the first connection: they are always set, if only to none.
    let tls = TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .unversioned_rustls_crypto_provider(provider)
        .root_certs(RootCerts::from(roots))
        .disable_verification(*trust == Trust::Blind);
    let config: Config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .proxy(None)
        .tls_config(tls.build())
        .user_agent(concat!("proxmox-csi/", env!("CARGO_PKG_VERSION")))
        .timeout_resolve(Some(connect))
        .timeout_connect(Some(connect))
        .timeout_global(Some(PATIENCE.get().copied().unwrap_or(CALL_TIMEOUT)))
        .max_idle_age(MAX_IDLE_AGE)
        .max_idle_connections(MAX_IDLE_CONNECTIONS)
        .max_idle_connections_per_host(MAX_IDLE_CONNECTIONS)
        .input_buffer_size(BUFFER_BYTES)
        .output_buffer_size(BUFFER_BYTES)
        .build();
    let chain = ().chain(TcpConnector::default()).chain(pins).chain(RustlsConnector::default()).chain(WatchConnector);
    Ok(Agent::with_parts(config, chain, DefaultResolver::default()))
}

/// The certificates in a PEM file.
pub(crate) fn certificates(pem: &[u8]) -> Vec<ureq::tls::Certificate<'static>> {
    let certificate = |item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    };
    ureq::tls::parse_pem(pem).filter_map(certificate).collect()
}

fn trusted(ca_bundle: Option<&Path>) -> Result<Vec<ureq::tls::Certificate<'static>>, String> {
    let candidates: Vec<PathBuf> = match ca_bundle {
        Some(path) => vec![path.into()],
        None => CA_BUNDLES.iter().map(PathBuf::from).collect(),
    };
    for path in &candidates {
        let Ok(text) = std::fs::read(path) else { continue };
        let certificates = certificates(&text);
        if !certificates.is_empty() {
            return Ok(certificates);
        }
    }
    let names: Vec<String> = candidates.iter().map(|path| path.display().to_string()).collect();
    Err(format!(
        "no certificates to trust in {}; mount the CA's certificate and name it in SSL_CERT_FILE or as the cluster's caFile, or write its fingerprint, or insecure: true",
        names.join(", ")
    ))
}

#[derive(Debug, Clone)]
struct WatchConnector;

#[derive(Debug)]
struct Watch<T> {
    inner: T,
    /// A request went out, and its status line has not been seen yet.
    awaited: bool,
}

impl<In: Transport> Connector<In> for WatchConnector {
    type Out = Watch<In>;

    fn connect(&self, _: &ConnectionDetails, chained: Option<In>) -> Result<Option<Self::Out>, ureq::Error> {
        Ok(chained.map(|inner| Watch { inner, awaited: false }))
    }
}

impl<T: Transport> Transport for Watch<T> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.inner.buffers()
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        // Here and not before: a name may be looked up, a connection and its TLS be made for seconds.
        if let Err(why) = FENCE.with_borrow(Fence::check) {
            HELD_BACK.set(Some(why));
            return Err(ureq::Error::Io(std::io::ErrorKind::PermissionDenied.into()));
        }
        if !GATE.with_borrow(Gate::pass) {
            HELD_BACK.set(Some("it was given up before it was sent".into()));
            return Err(ureq::Error::Io(std::io::ErrorKind::TimedOut.into()));
        }
        self.awaited = true;
        SENT.set(true);
        self.inner.transmit_output(amount, timeout)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        let progress = self.inner.await_input(timeout)?;
        if self.awaited
            && let Some(reason) = status_line(self.inner.buffers().input())
        {
            self.awaited = false;
            REASON.set(reason);
        }
        Ok(progress)
    }

    fn is_open(&mut self) -> bool {
        self.inner.is_open()
    }

    fn is_tls(&self) -> bool {
        self.inner.is_tls()
    }
}

/// The reason in `HTTP/1.1 596 Connection timed out\r\n`; nothing for an interim answer or half a line.
fn status_line(input: &[u8]) -> Option<String> {
    let end = input.windows(2).position(|two| two == b"\r\n")?;
    let line = String::from_utf8_lossy(input.get(..end)?);
    let mut parts = line.splitn(3, ' ');
    let (version, status, reason) = (parts.next()?, parts.next()?, parts.next().unwrap_or(""));
    (version.starts_with("HTTP/1.") && status.parse::<u16>().ok()? >= 200).then(|| reason.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Fingerprint;

    #[test]
    fn the_reason_is_all_after_the_status() {
        assert_eq!(status_line(b"HTTP/1.1 596 Connection timed out\r\nx").as_deref(), Some("Connection timed out"));
        assert_eq!(status_line(b"HTTP/1.1 200 \r\n").as_deref(), Some(""));
        for none in [&b"HTTP/1.1 100 Continue\r\n"[..], b"HTTP/1.1 200 OK", b"", b"\r\n", b"\xff\xfe \r\n"] {
            assert_eq!(status_line(none), None);
        }
    }

    #[test]
    fn without_certificates_there_is_a_sentence() {
        let agent = |https, trust, bundle| agent(https, &trust, bundle, CONNECT_TIMEOUT);
        let why = agent(true, Trust::System, Some(Path::new("/nonexistent/ca.pem"))).unwrap_err();
        assert!(why.contains("/nonexistent/ca.pem") && why.contains("insecure: true"), "{why}");
        assert!(agent(true, Trust::Blind, None).is_ok());
        assert!(agent(true, Trust::Pinned(vec![Fingerprint([7; 32])]), None).is_ok());
        assert!(agent(false, Trust::System, None).is_ok());
    }

    #[test]
    fn what_is_given_up_before_it_is_sent_is_never_sent() {
        let (early, late) = (Gate::default(), Gate::default());
        assert!(early.shut() && !early.pass() && early.shut());
        assert!(late.pass() && !late.shut() && late.pass());
    }
}
