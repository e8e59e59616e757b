//! Plays a recording against a simulator and notes every difference.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;
use testbed::sim::Simulator;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::recording::{Exchange, Item};
use crate::same;
use crate::stage::{self, Stage};

/// What a simulator answered.
#[derive(Debug, Clone)]
struct Answer {
    status: u16,
    reason: String,
    content_type: String,
    connection: String,
    body: String,
}

/// Endpoints that the simulator does not have yet (it answers 501), finished by the issue that first uses them: method, path, and a
/// word of the body where only such a call is meant.
pub(crate) const NOT_THERE_YET: [(&str, &str, &str); 13] = [
    ("GET", "/nodes/*/status", ""),
    ("GET", "/nodes/*/storage/*/identity", ""),
    ("POST", "/nodes/*/qemu/*/move_disk", ""),
    ("POST", "/nodes/*/qemu/*/clone", ""),
    ("POST", "/nodes/*/qemu/*/template", ""),
    ("GET", "/nodes/*/qemu/*/migrate", ""),
    ("POST", "/nodes/*/qemu/*/migrate", ""),
    ("GET", "/nodes/*/qemu/*/feature", ""),
    ("POST", "/nodes/*/qemu/*/snapshot/*/rollback", ""),
    ("DELETE", "/nodes/*/qemu/*/snapshot/*", ""),
    ("DELETE", "/nodes/*/qemu/*", ""),
    ("PUT", "/nodes/*/qemu/*/config", "import-from"),
    ("POST", "/nodes/*/qemu/*/config", "import-from"),
];

/// Which entry of [`NOT_THERE_YET`] a request belongs to.
fn not_there_yet(exchange: &Exchange) -> Option<usize> {
    let path = exchange.path.split('?').next().unwrap();
    NOT_THERE_YET.iter().position(|(method, pattern, word)| {
        let fits = pattern.split('/').zip(path.split('/')).all(|(wanted, given)| wanted == "*" || wanted == given);
        let about = exchange.body.as_deref().unwrap_or_default().contains(word);
        *method == exchange.method && fits && about && pattern.split('/').count() == path.split('/').count()
    })
}

#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) differences: Vec<String>,
    /// Requests compared in full; those whose recorded body was cut; those not there yet, by entry.
    pub(crate) compared: usize,
    pub(crate) cut: usize,
    pub(crate) absent: BTreeMap<usize, usize>,
    /// Skips that were needed, by line.
    pub(crate) skipped: Vec<usize>,
}

pub(crate) struct Player<'a> {
    sim: Arc<Simulator>,
    stage: &'a Stage,
    report: Report,
    heading: String,
    /// Recorded UPID to ours.
    upids: BTreeMap<String, String>,
    /// Our latest tasks: type and UPID.
    tasks: Vec<(String, String)>,
    /// The VM last spoken to.
    vmid: Option<u32>,
    /// The last exchange was not played: what was noted of it is not compared.
    unplayed: bool,
    /// The task that an exit status or log belongs to.
    subject: Option<String>,
}

impl<'a> Player<'a> {
    pub(crate) fn new(sim: Arc<Simulator>, stage: &'a Stage) -> Player<'a> {
        Player {
            sim,
            stage,
            report: Report::default(),
            heading: String::new(),
            upids: BTreeMap::new(),
            tasks: Vec::new(),
            vmid: None,
            unplayed: false,
            subject: None,
        }
    }

    pub(crate) async fn play(mut self, items: &[Item]) -> Report {
        for item in items {
            match item {
                Item::Heading(line, heading) => {
                    self.heading.clone_from(heading);
                    stage::heading(self.stage, &self.sim, *line, heading).await;
                }
                Item::Exchange(exchange) => self.exchange(exchange).await,
                Item::Together(all) => self.together(all).await,
                observation => self.observe(observation).await,
            }
        }
        self.report
    }

    async fn exchange(&mut self, exchange: &Exchange) {
        if let Some(upid) = stage::before(self.stage, &self.sim, exchange.line, &mut self.tasks).await {
            self.upids.insert(upid.0, upid.1);
        }
        let answer = self.send(exchange).await;
        if let Some(index) = not_there_yet(exchange).filter(|_| answer.status == 501 && exchange.status != 501) {
            *self.report.absent.entry(index).or_default() += 1;
            self.unplayed = true;
            return;
        }
        self.unplayed = false;
        self.compare(exchange, &answer);
    }

    /// Requests that were sent at the same time: in the order in which their tasks began, while the lock they meet is held, so that
    /// all are under way before the first goes on.
    async fn together(&mut self, all: &[Exchange]) {
        let mut ordered: Vec<&Exchange> = all.iter().collect();
        ordered.sort_by_key(|exchange| recorded_upid(exchange).unwrap_or_default());
        self.unplayed = false;
        let answers = if all.len() == 1 {
            vec![self.send(ordered[0]).await]
        } else {
            let frozen = self.sim.freeze();
            let held = if all[0].path.contains("/storage/") { self.sim.hold_storage_lock("ds1") } else { self.sim.hold_config_lock(100) };
            let mut flights = Vec::new();
            for exchange in &ordered {
                let before = self.sim.requests().len();
                flights.push(tokio::spawn(request(Arc::clone(&self.sim), (*exchange).clone(), String::new(), BTreeMap::new())));
                while self.sim.requests().len() == before {
                    tokio::task::yield_now().await;
                }
                if recorded_upid(exchange).is_some() {
                    // Its answer comes at once: the task waits, not the request.
                    while !flights.last().unwrap().is_finished() {
                        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                    }
                }
            }
            drop(held);
            drop(frozen);
            let mut answers = Vec::new();
            for flight in flights {
                answers.push(flight.await.unwrap());
            }
            answers
        };
        assert!(self.sim.settle().await, "still busy after line {}", all[0].line);
        let mut recorded: Vec<String> = Vec::new();
        let mut ours: Vec<String> = Vec::new();
        for (exchange, answer) in ordered.iter().zip(&answers) {
            self.remember(exchange, answer);
            let task = match (&exchange.task, data_upid(&answer.body)) {
                (Some(_), Some(upid)) => Some(self.sim.task(&upid).await.unwrap().0),
                _ => None,
            };
            let by_itself = exchange.task.is_some() || all.len() == 1;
            let subject = if by_itself { exchange.body.clone().unwrap_or_default() } else { String::new() };
            recorded.push(format!("{subject} {} {} {:?}", exchange.status, exchange.reason, exchange.task.as_deref().map(str::trim)));
            ours.push(format!("{subject} {} {} {:?}", answer.status, answer.reason, task.as_deref().map(str::trim)));
        }
        recorded.sort();
        ours.sort();
        self.report.compared += all.len();
        if recorded != ours {
            self.note(all[0].line, format!("together: {ours:#?}\nrecorded {recorded:#?}"));
        }
    }

    async fn send(&mut self, exchange: &Exchange) -> Answer {
        let answer = request(Arc::clone(&self.sim), exchange.clone(), self.heading.clone(), self.upids.clone()).await;
        self.remember(exchange, &answer);
        answer
    }

    fn remember(&mut self, exchange: &Exchange, answer: &Answer) {
        let vmid = exchange.path.split("/qemu/").nth(1).and_then(|rest| rest.split('/').next()).and_then(|vmid| vmid.parse().ok());
        self.vmid = vmid.or(self.vmid);
        self.subject = None;
        if let Some(own) = data_upid(&answer.body) {
            if let Some(recorded) = recorded_upid(exchange) {
                self.upids.insert(recorded, own.clone());
            }
            self.tasks.push((own.split(':').nth(5).unwrap().to_owned(), own.clone()));
            self.subject = Some(own);
        }
    }

    fn note(&mut self, line: usize, text: String) {
        if self.stage.skips.iter().any(|(skipped, _)| *skipped == line) {
            self.report.skipped.push(line);
        } else {
            self.report.differences.push(format!("{}:{line}: {text}", self.stage.name));
        }
    }

    fn compare(&mut self, exchange: &Exchange, answer: &Answer) {
        let what = format!("{} {} {}", exchange.method, exchange.path, exchange.body.as_deref().unwrap_or_default());
        let what: String = what.chars().take(160).collect();
        let mut lines = Vec::new();
        if (exchange.status, &exchange.reason) != (answer.status, &answer.reason) {
            lines.push(format!("{} {}, recorded {} {}", answer.status, answer.reason, exchange.status, exchange.reason));
        }
        if (&exchange.content_type, &exchange.connection) != (&answer.content_type, &answer.connection) {
            lines.push(format!(
                "{}; {}, recorded {}; {}",
                answer.content_type, answer.connection, exchange.content_type, exchange.connection
            ));
        }
        if exchange.answer.contains(" …[") {
            self.report.cut += 1;
        } else {
            self.report.compared += 1;
            match (serde_json::from_str::<Value>(&exchange.answer), serde_json::from_str::<Value>(&answer.body)) {
                (Ok(recorded), Ok(ours)) => {
                    let (recorded, ours) = (same::normal(&recorded, &exchange.path), same::normal(&ours, &exchange.path));
                    lines.extend(same::differences(&recorded, &ours));
                }
                _ if exchange.answer.trim_end() != answer.body.trim_end() => {
                    lines.push(format!("body {:?}, recorded {:?}", answer.body, exchange.answer));
                }
                _ => {}
            }
        }
        if !lines.is_empty() {
            self.note(exchange.line, format!("[{}] {what}\n    {}", exchange.who, lines.join("\n    ")));
        }
    }

    async fn observe(&mut self, item: &Item) {
        if self.unplayed {
            return;
        }
        let differences = match item {
            Item::Task(recorded) => self.task(recorded).await,
            Item::Exit(recorded) => {
                let ours = self.finished().await.map(|(exit, _)| exit);
                if ours.as_ref() == Some(recorded) { Vec::new() } else { vec![format!("exit status {ours:?}, recorded {recorded}")] }
            }
            Item::Log(recorded) => {
                let ours = Value::from(self.finished().await.map(|(_, log)| log).unwrap_or_default());
                same::differences(recorded, &ours).into_iter().map(|line| format!("log{line}")).collect()
            }
            Item::Blockstat { vmid, keys, qmpstatus } => self.blockstat(vmid.or(self.vmid), keys, qmpstatus.as_deref()).await,
            Item::Drives(recorded) => {
                let config = self.sim.vm(100).unwrap();
                let mut ours = config.config.clone();
                ours.extend(config.pending.clone());
                ours.retain(|key, _| key.starts_with("scsi") && !config.pending_delete.contains_key(key));
                same::differences(recorded, &serde_json::to_value(ours).unwrap())
            }
            Item::Files { folder, files } => self.files(folder, files),
            Item::Heading(..) | Item::Exchange(_) | Item::Together(_) => Vec::new(),
        };
        for line in differences {
            self.note(0, format!("after \"{}\": {line}", self.heading));
        }
    }

    async fn finished(&self) -> Option<(String, Vec<String>)> {
        self.sim.task(self.subject.as_ref()?).await
    }

    async fn task(&mut self, recorded: &Value) -> Vec<String> {
        let kind = recorded["type"].as_str().unwrap();
        let Some((_, upid)) = self.tasks.iter().rev().find(|(own, _)| own == kind).cloned() else { return vec![format!("no task {kind}")] };
        self.subject = Some(upid.clone());
        self.sim.task(&upid).await;
        let ours = self.sim.task_status(&upid).unwrap();
        same::differences(&same::normal(recorded, "task"), &same::normal(&ours, "task"))
    }

    async fn blockstat(&self, vmid: Option<u32>, keys: &[String], qmpstatus: Option<&str>) -> Vec<String> {
        self.sim.settle().await;
        let vmid = vmid.unwrap();
        let ours: Vec<String> = self.sim.vm(vmid).unwrap().plugged.into_keys().collect();
        let mut lines = Vec::new();
        if ours != keys {
            lines.push(format!("VM {vmid} blockstat {ours:?}, recorded {keys:?}"));
        }
        if let Some(recorded) = qmpstatus {
            let look = plain("GET", &format!("/nodes/pve1/qemu/{vmid}/status/current"), "");
            let answer = request(Arc::clone(&self.sim), look, String::new(), BTreeMap::new()).await;
            let status: Value = serde_json::from_str(&answer.body).unwrap();
            if status["data"]["qmpstatus"] != recorded {
                lines.push(format!("VM {vmid} qmpstatus {}, recorded {recorded}", status["data"]["qmpstatus"]));
            }
        }
        lines
    }

    fn files(&self, folder: &str, files: &[String]) -> Vec<String> {
        let (storage, owner) = match folder {
            "" => ("ds1", "9999"),
            folder => {
                let storage = if folder.contains("local2") { "second" } else { "ds1" };
                (storage, folder.rsplit('/').next().unwrap())
            }
        };
        let prefix = format!("{storage}:{owner}/");
        let ours: Vec<String> =
            self.sim.volumes("pve1", storage).iter().filter_map(|volid| volid.strip_prefix(&prefix).map(str::to_owned)).collect();
        if ours == files { Vec::new() } else { vec![format!("files in {prefix} {ours:?}, recorded {files:?}")] }
    }
}

fn data_upid(body: &str) -> Option<String> {
    let body: Value = serde_json::from_str(body).ok()?;
    body["data"].as_str().filter(|data| data.starts_with("UPID:")).map(str::to_owned)
}

fn recorded_upid(exchange: &Exchange) -> Option<String> {
    data_upid(&exchange.answer)
}

/// Sends a request as the recorder did, with our UPIDs for the recorded ones.
async fn request(sim: Arc<Simulator>, exchange: Exchange, heading: String, upids: BTreeMap<String, String>) -> Answer {
    let mut path = exchange.path.clone();
    for (recorded, ours) in &upids {
        let encode = |upid: &str| upid.replace(':', "%3A").replace('@', "%40").replace('!', "%21");
        path = path.replace(&encode(recorded), &encode(ours)).replace(recorded.as_str(), ours);
    }
    let body = stage::body(&exchange, &heading);
    let mut head = format!("{} /api2/json{path} HTTP/1.1\r\nHost: pve1\r\n", exchange.method);
    if let Some(authorization) = stage::authorization(&exchange.who, &heading) {
        head.push_str(&format!("Authorization: {authorization}\r\n"));
    }
    if let Some(body) = &body {
        head.push_str(&format!("Content-Type: {}\r\nContent-Length: {}\r\n", stage::content_type(&heading), body.len()));
    }
    let address = sim.url().trim_start_matches("http://").split('/').next().unwrap().to_owned();
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("{head}\r\n{}", body.unwrap_or_default()).as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    loop {
        if let Some(answer) = complete(&bytes) {
            return answer;
        }
        let count = stream.read_buf(&mut bytes).await.unwrap();
        assert_ne!(count, 0, "no whole answer to {} {path}", exchange.method);
    }
}

/// A request off the record, by csi; its task.
pub(crate) async fn quietly(sim: &Arc<Simulator>, method: &str, path: &str, params: &str) -> Option<String> {
    data_upid(&request(Arc::clone(sim), plain(method, path, params), String::new(), BTreeMap::new()).await.body)
}

fn plain(method: &str, path: &str, params: &str) -> Exchange {
    Exchange {
        line: 0,
        who: "csi".to_owned(),
        method: method.to_owned(),
        path: path.to_owned(),
        body: (!params.is_empty()).then(|| params.to_owned()),
        status: 200,
        reason: String::new(),
        content_type: String::new(),
        connection: String::new(),
        answer: String::new(),
        task: None,
    }
}

/// The answer, once all of it is there.
fn complete(bytes: &[u8]) -> Option<Answer> {
    let text = String::from_utf8_lossy(bytes);
    let (head, body) = text.split_once("\r\n\r\n")?;
    let mut lines = head.split("\r\n");
    let (status, reason) = lines.next()?.strip_prefix("HTTP/1.1 ")?.split_once(' ')?;
    let headers: Vec<(&str, &str)> = lines.filter_map(|line| line.split_once(": ")).collect();
    let all = |name: &str| headers.iter().filter(|(own, _)| own.eq_ignore_ascii_case(name)).map(|(_, value)| *value).collect::<Vec<_>>();
    let length: usize = all("content-length").first()?.parse().ok()?;
    if body.len() < length {
        return None;
    }
    Some(Answer {
        status: status.parse().ok()?,
        reason: reason.to_owned(),
        content_type: all("content-type").first().unwrap_or(&"-").to_string(),
        connection: all("connection").join(" / "),
        body: body.to_owned(),
    })
}
