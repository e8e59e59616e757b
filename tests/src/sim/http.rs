//! HTTP/1.1 as pveproxy speaks it: its own reason phrases, two Connection headers on proxied answers, idle connections closed after 5 s.

use std::io::{self, Write as _};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::route;
use super::state::Cluster;

/// pveproxy closes an idle connection after this (really passing) time.
const IDLE: Duration = Duration::from_secs(5);
/// Requests per connection.
const REQUESTS_PER_CONNECTION: usize = 100;
/// Longer headers break the connection without an answer.
const HEADER_LIMIT: usize = 8 * 1024;
const HEADER_LINES: usize = 64;
/// A body is read to its end before it is refused, so that the client gets to read why; beyond this it is cut off.
const BODY_CAP: usize = 16 << 20;
/// Longer bodies are packed for who takes that (pve-http-server: `response`).
const PACKED_ABOVE: usize = 1024;
/// TLS handshake record type: anything else on the TLS port is plain HTTP.
const TLS_HANDSHAKE: u8 = 0x16;

/// A request as it came.
#[derive(Debug, Default)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// Path and query, undecoded.
    pub(crate) target: String,
    headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    minor: u8,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(own, _)| own.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

/// What goes back.
#[derive(Debug)]
pub(crate) enum Outcome {
    Answer(Answer),
    /// The connection ends without an answer.
    Close,
    /// No answer, ever.
    Hang,
}

/// A response.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) reason: String,
    pub(crate) json: bool,
    pub(crate) body: String,
    /// Came through another daemon: its `Connection: close` stands beside pveproxy's own header.
    pub(crate) proxied: bool,
    pub(crate) location: Option<String>,
}

/// Accepts connections until the task is aborted; `door`: what this listener is called.
pub(crate) async fn serve(listener: TcpListener, tls: Option<TlsAcceptor>, cluster: Arc<Cluster>, door: String) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        // Small answers, one at a time: waiting to fill a packet would cost 40 ms each.
        let _ = stream.set_nodelay(true);
        let (tls, cluster, door) = (tls.clone(), Arc::clone(&cluster), door.clone());
        connections.spawn(async move {
            // A broken connection is the client's business.
            let _ = greet(stream, tls, cluster, &door).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn greet(stream: TcpStream, tls: Option<TlsAcceptor>, cluster: Arc<Cluster>, door: &str) -> io::Result<()> {
    let Some(tls) = tls else { return talk(stream, &cluster, door, false).await };
    let mut first = [0];
    if stream.peek(&mut first).await? == 1 && first != [TLS_HANDSHAKE] {
        return talk(stream, &cluster, door, true).await;
    }
    talk(tls.accept(stream).await?, &cluster, door, false).await
}

async fn talk<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, cluster: &Arc<Cluster>, door: &str, misdirected: bool) -> io::Result<()> {
    let mut buffer = Vec::new();
    // Which connection a client's thread takes is chance: with a scheduler nothing may depend on it.
    let (requests, idle) = if cluster.turns.is_some() { (usize::MAX, None) } else { (REQUESTS_PER_CONNECTION, Some(IDLE)) };
    for _ in 0..requests {
        let Some(request) = read(&mut stream, &mut buffer, idle).await? else { return Ok(()) };
        let outcome = if misdirected { redirect(&request) } else { route::respond(cluster, &request, door).await };
        let answer = match outcome {
            Outcome::Answer(answer) => answer,
            Outcome::Close => return Ok(()),
            Outcome::Hang => return std::future::pending().await,
        };
        let wants_close = request.minor == 0 || request.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
        let closes = answer.status >= 400 || wants_close || misdirected || (answer.proxied && cluster.latency.by_endpoint);
        let takes_gzip = request.header("accept-encoding").is_some_and(|value| value.contains("gzip"));
        let bytes = render(&answer, closes, takes_gzip)?;
        cluster.state().faults.count_bytes(bytes.len());
        stream.write_all(&bytes).await?;
        stream.flush().await?;
        if closes {
            return stream.shutdown().await;
        }
    }
    Ok(())
}

/// Plain HTTP on the TLS port.
fn redirect(request: &Request) -> Outcome {
    let status = if matches!(request.method.as_str(), "GET" | "HEAD") { 301 } else { 308 };
    let location = format!("https://{}{}", request.header("host").unwrap_or_default(), request.target);
    let reason = if status == 301 { "Moved Permanently" } else { "Permanent Redirect" }.to_owned();
    Outcome::Answer(Answer { status, reason, json: false, body: String::new(), proxied: false, location: Some(location) })
}

/// The next request; `None`: the client has gone, or stayed idle too long.
pub(crate) async fn read<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    buffer: &mut Vec<u8>,
    idle: Option<Duration>,
) -> io::Result<Option<Request>> {
    let mut chunk = [0; 16 * 1024];
    let end = loop {
        if let Some(end) = buffer.windows(4).position(|four| four == b"\r\n\r\n") {
            break end;
        }
        if buffer.len() > HEADER_LIMIT {
            return Ok(None);
        }
        let count = match idle {
            None => stream.read(&mut chunk).await?,
            Some(idle) => match tokio::time::timeout(idle, stream.read(&mut chunk)).await {
                Ok(count) => count?,
                Err(_) => return Ok(None),
            },
        };
        if count == 0 {
            return Ok(None);
        }
        buffer.extend_from_slice(chunk.get(..count).unwrap_or_default());
    };
    let head = String::from_utf8_lossy(buffer.get(..end).unwrap_or_default()).into_owned();
    buffer.drain(..end + 4);
    let Some(mut request) = parse_head(&head) else { return Ok(None) };
    if request.header("expect").is_some_and(|value| value.eq_ignore_ascii_case("100-continue")) {
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
    }
    let length: usize = request.header("content-length").and_then(|value| value.trim().parse().ok()).unwrap_or(0);
    while buffer.len() < length.min(BODY_CAP) {
        let count = stream.read(&mut chunk).await?;
        if count == 0 {
            return Ok(None);
        }
        buffer.extend_from_slice(chunk.get(..count).unwrap_or_default());
    }
    request.body = buffer.drain(..length.min(buffer.len())).collect();
    Ok(Some(request))
}

fn parse_head(head: &str) -> Option<Request> {
    let mut lines = head.split("\r\n");
    let mut words = lines.next()?.split(' ');
    let (method, target, protocol) = (words.next()?, words.next()?, words.next()?);
    let minor = protocol.strip_prefix("HTTP/1.")?.parse().ok()?;
    let headers: Vec<(String, String)> =
        lines.filter_map(|line| line.split_once(':')).map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned())).collect();
    (headers.len() < HEADER_LINES).then(|| Request {
        method: method.to_owned(),
        target: target.to_owned(),
        headers,
        body: Vec::new(),
        minor,
    })
}

fn render(answer: &Answer, closes: bool, takes_gzip: bool) -> io::Result<Vec<u8>> {
    let is_packed = takes_gzip && answer.body.len() > PACKED_ABOVE;
    let body = if is_packed { gzip(answer.body.as_bytes())? } else { answer.body.clone().into_bytes() };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let date = http_date(now);
    // A reason is one line: what would break the status line cannot be in it.
    let mut text = format!("HTTP/1.1 {} {}\r\n", answer.status, answer.reason);
    text.push_str("Cache-Control: max-age=0\r\n");
    if closes && (answer.status >= 400 || !answer.proxied) {
        text.push_str("Connection: close\r\n");
    } else {
        if answer.proxied {
            text.push_str("Connection: close\r\n");
        }
        text.push_str("Connection: Keep-Alive\r\n");
    }
    text.push_str(&format!("Date: {date}\r\nPragma: no-cache\r\nServer: pve-api-daemon/3.0\r\nContent-Length: {}\r\n", body.len()));
    if is_packed {
        text.push_str("Content-Encoding: gzip\r\n");
    }
    if answer.json {
        text.push_str("Content-Type: application/json;charset=UTF-8\r\n");
    }
    if let Some(location) = &answer.location {
        text.push_str(&format!("Location: {location}\r\n"));
    }
    text.push_str(&format!("Expires: {date}\r\n\r\n"));
    let mut bytes = text.into_bytes();
    bytes.extend(body);
    Ok(bytes)
}

/// As Perl's `Compress::Zlib::memGzip` does by default.
fn gzip(body: &[u8]) -> io::Result<Vec<u8>> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    packed.write_all(body)?;
    packed.finish()
}

/// `Sat, 21 Nov 2026 02:44:43 GMT`
fn http_date(seconds: u64) -> String {
    let (days, second) = (seconds / 86400, seconds % 86400);
    // Days to a civil date: Howard Hinnant's algorithm, for years from 1970.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let name = |names: &str, index: u64| names.split(' ').nth(usize::try_from(index).unwrap_or(0)).unwrap_or_default().to_owned();
    format!(
        "{}, {day:02} {} {year} {:02}:{:02}:{:02} GMT",
        name("Thu Fri Sat Sun Mon Tue Wed", days % 7),
        name("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec", month - 1),
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    #[test]
    fn dates_are_right() {
        assert_eq!(super::http_date(1_795_229_083), "Sat, 21 Nov 2026 02:44:43 GMT");
        assert_eq!(super::http_date(951_782_400), "Tue, 29 Feb 2000 00:00:00 GMT");
    }
}
