//! `/healthz`, `/readyz` and `/metrics` over HTTP/1.1, for kubelet's probes and Prometheus.
//!
//! One request a connection, a few lines of it read, nothing of it used but method and path. Off unless an address was given.
//! `PUT /log/LEVEL` changes how much is logged, for whoever comes from this pod: Kubernetes then says who may (pods/portforward).

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// A probe's request has some 150 bytes.
const MAX_REQUEST_BYTES: usize = 8 << 10;
/// For the whole exchange; kubelet gives a probe one second, Prometheus ten.
const EXCHANGE_LIMIT: Duration = Duration::from_secs(10);
/// `PUT /log/debug`: how much is logged, from now on.
const LEVEL: &str = "/log/";
const ONLY_GET: &str = "only GET\n";
/// At one time; one more is closed unheard, so that nobody can take all our descriptors.
const MAX_CONNECTIONS: usize = 64;

/// What else is to be said, or one sentence that says what is wrong. Must not block.
pub type Check = Arc<dyn Fn() -> Result<String, String> + Send + Sync>;

/// What the pages say.
#[derive(Clone)]
pub struct Pages {
    /// `/healthz`: a new start of the process would help, if not.
    pub alive: Check,
    /// `/readyz`: it does its work, if so.
    pub ready: Check,
    /// Where the metrics are: `/metrics`.
    pub metrics_path: String,
    /// Prometheus' text format.
    pub metrics: Arc<dyn Fn() -> String + Send + Sync>,
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pages").finish_non_exhaustive()
    }
}

/// Listens at `given`: `127.0.0.1:8080`, `[::1]:8080`, or `:8080` for every address, as Go writes it.
///
/// # Errors
/// A sentence: no such address, or it is taken.
pub fn listen(given: &str) -> Result<std::net::TcpListener, String> {
    let all = given.strip_prefix(':').and_then(|port| port.parse::<u16>().ok());
    let addresses: Vec<SocketAddr> = match all {
        // Without IPv6 on the machine, the second is taken.
        Some(port) => vec![(Ipv6Addr::UNSPECIFIED, port).into(), (Ipv4Addr::UNSPECIFIED, port).into()],
        None => {
            vec![given.parse().map_err(|_| format!("metrics address {given:?} is no address and port: write :8080 or 127.0.0.1:8080"))?]
        }
    };
    let failed = |cause: io::Error| format!("metrics address {given}: {cause}");
    let listener = std::net::TcpListener::bind(addresses.as_slice()).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

/// Answers until it is dropped.
///
/// # Errors
/// The listener is of no use.
pub async fn serve(listener: std::net::TcpListener, pages: Pages) -> io::Result<std::convert::Infallible> {
    let listener = TcpListener::from_std(listener)?;
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok((stream, peer)) = listener.accept().await else {
            // Out of descriptors: the next one may do better.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        let pages = pages.clone();
        tokio::spawn(async move {
            let _place = place;
            let _ = tokio::time::timeout(EXCHANGE_LIMIT, exchange(&stream, peer, &pages)).await;
        });
    }
}

async fn exchange(stream: &TcpStream, peer: SocketAddr, pages: &Pages) -> io::Result<()> {
    let request = read(stream).await?;
    let answer = answer(&request, peer.ip().to_canonical().is_loopback(), pages);
    let mut rest = answer.as_bytes();
    while !rest.is_empty() {
        stream.writable().await?;
        match stream.try_write(rest) {
            Ok(written) => rest = rest.get(written..).unwrap_or_default(),
            Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => (),
            Err(cause) => return Err(cause),
        }
    }
    Ok(())
}

/// Up to the empty line; a request that is longer or ends before is answered as far as it goes.
async fn read(stream: &TcpStream) -> io::Result<Vec<u8>> {
    let mut request = Vec::new();
    let mut piece = [0; 1024];
    while request.len() < MAX_REQUEST_BYTES && !request.windows(4).any(|end| end == b"\r\n\r\n") {
        stream.readable().await?;
        match stream.try_read(&mut piece) {
            Ok(0) => break,
            Ok(length) => request.extend_from_slice(piece.get(..length).unwrap_or_default()),
            Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => (),
            Err(cause) => return Err(cause),
        }
    }
    Ok(request)
}

/// `is_near`: from this very pod, kubectl port-forward included. Only there is anything changed.
fn answer(request: &[u8], is_near: bool, pages: &Pages) -> String {
    let line = request.split(|byte| *byte == b'\r').next().and_then(|line| std::str::from_utf8(line).ok()).unwrap_or_default();
    let mut words = line.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let checked = |check: &Check| match check() {
        Ok(more) => ("200 OK", format!("ok\n{more}")),
        Err(why) => ("503 Service Unavailable", format!("{why}\n")),
    };
    let (status, body) = match (method, target.split('?').next().unwrap_or_default()) {
        ("GET" | "HEAD", "/healthz") => checked(&pages.alive),
        ("GET" | "HEAD", "/readyz") => checked(&pages.ready),
        ("GET" | "HEAD", path) if path == pages.metrics_path => ("200 OK", (pages.metrics)()),
        ("GET" | "HEAD", _) => ("404 Not Found", format!("there are: /healthz /readyz {}; PUT /log/LEVEL\n", pages.metrics_path)),
        ("PUT", path) if path.starts_with(LEVEL) && !is_near => {
            ("403 Forbidden", "from 127.0.0.1 only: kubectl port-forward\n".to_string())
        }
        ("PUT", path) => match path.strip_prefix(LEVEL).map(crate::log::set_level) {
            Some(Ok(())) => ("200 OK", "ok\n".to_string()),
            Some(Err(why)) => ("400 Bad Request", why + "\n"),
            None => ("405 Method Not Allowed", ONLY_GET.to_string()),
        },
        _ => ("405 Method Not Allowed", ONLY_GET.to_string()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    if method == "HEAD" { head } else { head + &body }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use proptest::prelude::*;

    fn pages() -> Pages {
        let ready: Check = Arc::new(|| Err("region unknown".into()));
        let alive: Check = Arc::new(|| Ok("b: 503\n".into()));
        Pages { alive, ready, metrics_path: "/metrics".into(), metrics: Arc::new(|| "a_total 1\n".into()) }
    }

    #[test]
    fn three_pages_and_nothing_else() {
        for (request, status, body) in [
            ("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", "200", "ok\nb: 503\n"),
            ("GET /readyz HTTP/1.1\r\n\r\n", "503", "region unknown\n"),
            ("GET /metrics?x=y HTTP/1.0\r\n\r\n", "200", "a_total 1\n"),
            ("HEAD /healthz HTTP/1.1\r\n\r\n", "200", ""),
            ("GET / HTTP/1.1\r\n\r\n", "404", "there are: /healthz /readyz /metrics; PUT /log/LEVEL\n"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "405", "only GET\n"),
            ("PUT /metrics HTTP/1.1\r\n\r\n", "405", "only GET\n"),
            ("PUT /log/info HTTP/1.1\r\n\r\n", "200", "ok\n"),
            ("PUT /log/2 HTTP/1.1\r\n\r\n", "200", "ok\n"),
            ("", "405", "only GET\n"),
        ] {
            let answer = answer(request.as_bytes(), true, &pages());
            let (head, rest) = answer.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?}: {head}");
            assert_eq!(rest, body, "{request:?}");
        }
        let put = b"PUT /log/loud HTTP/1.1\r\n\r\n";
        assert!(answer(put, true, &pages()).contains("loud"));
        assert!(answer(put, false, &pages()).starts_with("HTTP/1.1 403"), "only from the pod itself");
    }

    #[test]
    fn addresses_as_go_writes_them() {
        assert!(listen("127.0.0.1:0").is_ok());
        assert!(listen(":0").is_ok());
        for odd in ["", ":", "8080", "localhost:8080", ":99999"] {
            assert!(listen(odd).unwrap_err().contains(":8080"), "{odd}");
        }
    }

    #[tokio::test]
    async fn a_silent_client_and_a_full_house_stop_nobody() {
        let listener = listen("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let served = tokio::spawn(serve(listener, pages()));
        let asked = tokio::task::spawn_blocking(move || {
            let connect = || std::net::TcpStream::connect(address).unwrap();
            let silent: Vec<_> = (0..MAX_CONNECTIONS).map(|_| connect()).collect();
            // One too many is closed, once the server has come so far.
            let mut none = String::new();
            let _ = connect().read_to_string(&mut none);
            assert_eq!(none, "");
            drop(silent);
            // The places are free again when the server has seen them go.
            for _ in 0..200 {
                let mut stream = connect();
                let mut text = String::new();
                if stream.write_all(b"GET /healthz HTTP/1.1\r\n\r\n").and_then(|()| stream.read_to_string(&mut text)).is_ok()
                    && !text.is_empty()
                {
                    return text;
                }
            }
            String::new()
        });
        assert!(asked.await.unwrap().ends_with("ok\nb: 503\n"));
        served.abort();
    }

    proptest! {
        #[test]
        fn no_request_panics(request in proptest::collection::vec(any::<u8>(), 0..200)) { let _ = answer(&request, true, &pages()); }
    }
}
