//! QEMU's monitor: JSON commands over a unix socket, and the human commands that Proxmox sends through it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

/// A monitor command is done in milliseconds; a hung QEMU never answers.
const ANSWER_LIMIT: Duration = Duration::from_secs(25);

#[derive(Debug)]
pub(super) struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// QEMU listens from its first moment; the greeting comes first, then capabilities are negotiated.
    pub(super) fn connect(socket: &Path) -> Result<Self, String> {
        let stream = UnixStream::connect(socket).map_err(|error| format!("connect to {}: {error}", socket.display()))?;
        stream.set_read_timeout(Some(ANSWER_LIMIT)).map_err(|error| format!("QMP socket: {error}"))?;
        let mut qmp = Self { stream: BufReader::new(stream) };
        let greeting = qmp.line()?;
        if greeting.get("QMP").is_none() {
            return Err(format!("not a QMP greeting: {greeting}"));
        }
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<Value, String> {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => Err("QEMU has closed its monitor".into()),
            Ok(_) => serde_json::from_str(&line).map_err(|error| format!("QMP line {line:?}: {error}")),
            Err(error) => Err(format!("no answer of QEMU's monitor within {} s: {error}", ANSWER_LIMIT.as_secs())),
        }
    }

    /// One QMP command; the error is QEMU's own text.
    pub(super) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let mut message = json!({ "execute": command });
        if let (false, Some(message)) = (arguments.is_null(), message.as_object_mut()) {
            message.insert("arguments".into(), arguments);
        }
        self.stream.get_mut().write_all(format!("{message}\n").as_bytes()).map_err(|error| format!("QMP {command}: {error}"))?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                return Err(error.get("desc").and_then(Value::as_str).unwrap_or("an error without text").to_owned());
            }
            // Events come between.
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// A command of the human monitor: an empty answer is success.
    pub(super) fn human(&mut self, command: &str) -> Result<String, String> {
        let answer = self.execute("human-monitor-command", json!({ "command-line": command }))?;
        let text = answer.as_str().unwrap_or_default().trim().replace("\r\n", "\n");
        if text.starts_with("Error: ") { Err(text) } else { Ok(text) }
    }

    /// The host's TCP port that leads to the guest's `port`.
    pub(super) fn forwarded_port(&mut self, port: u16) -> Result<u16, String> {
        let table = self.human("info usernet")?;
        // Protocol[State] FD, source address, source port, destination address, destination port, queues.
        let found = table.lines().find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                ["TCP[HOST_FORWARD]", _, _, from, _, to, ..] if *to == port.to_string() => from.parse().ok(),
                _ => None,
            }
        });
        found.ok_or_else(|| format!("QEMU forwards no port to the guest's {port}: {table}"))
    }
}
