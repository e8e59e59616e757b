//! Reads a recording: requests with their answers, and what was looked at between them.

use serde_json::Value;

/// One request and its answer.
#[derive(Debug, Clone)]
pub(crate) struct Exchange {
    pub(crate) line: usize,
    pub(crate) who: String,
    pub(crate) method: String,
    /// Below /api2/json, with its query.
    pub(crate) path: String,
    pub(crate) body: Option<String>,
    pub(crate) status: u16,
    pub(crate) reason: String,
    pub(crate) content_type: String,
    pub(crate) connection: String,
    pub(crate) answer: String,
    /// The exit status that the recorder noted beside it (lines of requests sent together).
    pub(crate) task: Option<String>,
}

#[derive(Debug, Clone)]
pub(crate) enum Item {
    Heading(usize, String),
    Exchange(Exchange),
    /// Sent at the same time.
    Together(Vec<Exchange>),
    /// Status object of a task.
    Task(Value),
    Exit(String),
    Log(Value),
    Blockstat {
        vmid: Option<u32>,
        keys: Vec<String>,
        qmpstatus: Option<String>,
    },
    /// Drive lines of the config.
    Drives(Value),
    /// Image files in a folder (`/data/ds1/images/102`; empty: 9999 of ds1).
    Files {
        folder: String,
        files: Vec<String>,
    },
}

pub(crate) fn parse(text: &str) -> Vec<Item> {
    let lines: Vec<&str> = text.lines().collect();
    let mut items: Vec<Item> = Vec::new();
    let mut at = 0;
    while at < lines.len() {
        let line = lines[at];
        if let Some(request) = line.strip_prefix("--> ") {
            let (exchange, next) = exchange(&lines, at, request);
            items.push(Item::Exchange(exchange));
            at = next;
            continue;
        }
        let trimmed = line.trim();
        if let Some(compact) = compact(trimmed, at + 1) {
            match items.last_mut() {
                Some(Item::Together(all)) => all.push(compact),
                _ => items.push(Item::Together(vec![compact])),
            }
        } else if let Some((folder, files, next)) = files(&lines, at) {
            items.push(Item::Files { folder, files });
            at = next;
            continue;
        } else if let Some(item) = note(line, trimmed, at + 1) {
            items.push(item);
        }
        at += 1;
    }
    items
}

fn exchange(lines: &[&str], at: usize, request: &str) -> (Exchange, usize) {
    let (who, rest) = request.trim_start_matches('[').split_once("] ").unwrap();
    let (method, rest) = rest.split_once(' ').unwrap();
    let (path, body) = rest.split_once("   body: ").map_or((rest, None), |(path, body)| (path, Some(body.to_owned())));
    let status = lines[at + 1].strip_prefix("<-- HTTP ").unwrap();
    let status = status.rsplit_once("   (").unwrap().0;
    let (status, reason) = status.split_once(' ').unwrap();
    let (content_type, connection) = lines[at + 2].trim().strip_prefix("content-type: ").unwrap().split_once("; connection: ").unwrap();
    let mut answer = Vec::new();
    let mut next = at + 3;
    while let Some(line) = lines.get(next).and_then(|line| line.strip_prefix("    ")) {
        answer.push(line);
        next += 1;
    }
    let exchange = Exchange {
        line: at + 1,
        who: who.to_owned(),
        method: method.to_owned(),
        path: path.strip_prefix("/api2/json").unwrap().to_owned(),
        body,
        status: status.parse().unwrap(),
        reason: reason.to_owned(),
        content_type: content_type.to_owned(),
        connection: connection.to_owned(),
        answer: answer.join("\n"),
        task: None,
    };
    (exchange, next)
}

/// `POST /nodes/… {'a': 'b'} -> 200 OK 0.3s {"data":…} task: OK`
fn compact(line: &str, number: usize) -> Option<Exchange> {
    let (method, rest) = line.split_once(' ').filter(|(method, _)| matches!(*method, "POST" | "PUT" | "DELETE"))?;
    let (request, answer) = rest.split_once(" -> ")?;
    let (path, params) = request.split_once(' ')?;
    let body: Option<Value> = serde_json::from_str(&params.replace('\'', "\"")).ok();
    let body = body.and_then(|body| {
        let object = body.as_object()?.clone();
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        Some(object.iter().map(|(key, value)| format!("{key}={}", text(value))).collect::<Vec<_>>().join("&"))
    });
    let (status, rest) = answer.split_once(' ')?;
    let json = rest.find("s {").filter(|at| rest[..*at].ends_with(|digit: char| digit.is_ascii_digit()))?;
    let reason = rest[..json].rsplit_once(' ')?.0;
    let (answer, task) =
        rest[json + 2..].split_once(" task: ").map_or((&rest[json + 2..], None), |(answer, task)| (answer, Some(task.to_owned())));
    Some(Exchange {
        line: number,
        who: "csi".to_owned(),
        method: method.to_owned(),
        path: path.to_owned(),
        body,
        status: status.parse().ok()?,
        reason: reason.to_owned(),
        content_type: String::new(),
        connection: String::new(),
        answer: answer.to_owned(),
        task,
    })
}

/// A listing of image files, with the folder before it where `ls` printed it.
fn files(lines: &[&str], at: usize) -> Option<(String, Vec<String>, usize)> {
    let is_file = |line: &&str| {
        let image = [".raw", ".qcow2", ".vmdk"].iter().any(|suffix| line.ends_with(suffix));
        image && !line.contains([' ', '/', '>']) && !line.is_empty()
    };
    if let Some(missing) = lines[at].strip_prefix("ls: cannot access '/data/") {
        let folder = missing.split('\'').next()?;
        return Some((format!("/data/{folder}"), Vec::new(), at + 1));
    }
    let (folder, first) = match lines[at].strip_suffix(':').filter(|folder| folder.starts_with("/data/") && folder.contains("/images/")) {
        Some(folder) => (folder.to_owned(), at + 1),
        None => (String::new(), at),
    };
    let files: Vec<String> = lines[first..].iter().take_while(|line| is_file(line)).map(|line| (*line).to_owned()).collect();
    let next = first + files.len();
    (!files.is_empty()).then_some((folder, files, next))
}

fn keys(list: &str) -> Vec<String> {
    let inner = list.trim().trim_start_matches('[').split(']').next().unwrap();
    inner.split(", ").map(|key| key.trim_matches('\'').to_owned()).filter(|key| !key.is_empty()).collect()
}

fn note(line: &str, trimmed: &str, number: usize) -> Option<Item> {
    let json = |text: &str| serde_json::from_str::<Value>(text.trim_start_matches(':').trim()).ok();
    if let Some(list) = trimmed.strip_prefix("## blockstat: ").or_else(|| trimmed.strip_prefix("blockstat keys: ")) {
        return Some(Item::Blockstat { vmid: None, keys: keys(list), qmpstatus: None });
    }
    if let Some(heading) = line.strip_prefix("## ") {
        return Some(Item::Heading(number, heading.to_owned()));
    }
    if let Some(rest) = trimmed.strip_prefix("VM ") {
        let (vmid, list) = rest.split_once(" blockstat: ")?;
        let qmpstatus = list.split_once("qmpstatus=").map(|(_, status)| status.to_owned());
        return Some(Item::Blockstat { vmid: vmid.parse().ok(), keys: keys(list), qmpstatus });
    }
    for prefix in ["task: ", "resize task: ", "POST task: ", "imgdel task: "] {
        if let Some(task) = trimmed.strip_prefix(prefix) {
            return json(task).map(Item::Task);
        }
    }
    if let Some(exit) = trimmed.strip_prefix("exitstatus: ") {
        return Some(Item::Exit(exit.to_owned()));
    }
    if let Some(log) = trimmed.strip_prefix("log") {
        return json(log).map(Item::Log);
    }
    (line.starts_with("    {\"scsi")).then(|| json(trimmed)).flatten().map(Item::Drives)
}
