//! `scripts/pve-check`: the controller against somebody's real Proxmox VE, one line per step, tidy on every exit.

use std::collections::HashMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use controller::config::{self, ClusterConfig};
use controller::pve::{self, Client, Exchange, api};
use controller::request::{Create, Expand, NodeId, Publish, Unpublish};
use controller::run::Controller;
use proto::VolumeHandle;
use proto::csi::volume_capability::{AccessMode, AccessType, MountVolume, access_mode::Mode};
use proto::csi::{self, VolumeCapability};
use serde_json::Value;

const SIZE_BYTES: i64 = 64 << 20;
const GROWN_BYTES: u64 = 128 << 20;
/// A step that was broken off may still be carried out for two minutes, and nothing is deleted while it may; then a detach, which a
/// guest can hold up for 17 s, three times.
const TIDY_LIMIT: Duration = Duration::from_secs(180);
/// Between two tries of it.
const TIDY_PAUSE: Duration = Duration::from_secs(2);
/// Texts of an answer that are shown; numbers are, all others are left out.
const SHOWN: &[&str] = &[
    "data",
    "message",
    "id",
    "type",
    "node",
    "status",
    "storage",
    "plugintype",
    "content",
    "key",
    "digest",
    "scsihw",
    "hotplug",
    "boot",
    "lock",
    "protection",
    "machine",
    "running-qemu",
    "running-machine",
    "qmpstatus",
    "upid",
    "exitstatus",
    "format",
    "version",
    "release",
    "size",
];
static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Arguments {
    config: PathBuf,
    vmid: u32,
    storage: String,
    region: Option<String>,
    transcript: PathBuf,
}

impl Arguments {
    fn read() -> Result<Self> {
        let mut given: HashMap<String, String> = HashMap::new();
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let name = word.strip_prefix("--").with_context(|| format!("{word:?} is no option; see scripts/pve-check --help"))?;
            let (name, value) = match name.split_once('=') {
                Some((name, value)) => (name.to_owned(), value.to_owned()),
                None => (name.to_owned(), words.next().with_context(|| format!("--{name} needs a value"))?),
            };
            ensure!(["config", "vmid", "storage", "region", "transcript"].contains(&name.as_str()), "--{name} is not known");
            given.insert(name, value);
        }
        let mut need = |name: &str| given.remove(name).with_context(|| format!("--{name} is missing; see scripts/pve-check --help"));
        let (config, vmid, storage) = (need("config")?.into(), need("vmid")?, need("storage")?);
        let vmid = vmid.parse().with_context(|| format!("--vmid {vmid:?} is no number"))?;
        let transcript = given.remove("transcript").map_or_else(|| PathBuf::from("pve-check.txt"), PathBuf::from);
        Ok(Self { config, vmid, storage, region: given.remove("region"), transcript })
    }
}

/// Whether a config line of a VM is shown: what says how disks are attached.
fn is_shown_line(key: &str) -> bool {
    pve::drive::is_drive_key(key) || SHOWN.contains(&key)
}

/// The answer without what is nobody's business: names, networks, descriptions, keys.
fn shown(value: &Value, key: &str) -> Value {
    match value {
        Value::Object(map) => {
            let line = map.get("key").and_then(Value::as_str);
            let inner = |key: &String, value: &Value| match (line, key.as_str()) {
                (Some(line), "value" | "pending") if is_shown_line(line) => value.clone(),
                _ => shown(value, key),
            };
            Value::Object(map.iter().map(|(key, value)| (key.clone(), inner(key, value))).collect())
        }
        Value::Array(list) => Value::Array(list.iter().map(|value| shown(value, key)).collect()),
        Value::String(_) if is_shown_line(key) => value.clone(),
        Value::String(_) => "(left out)".into(),
        Value::Null | Value::Bool(_) | Value::Number(_) => value.clone(),
    }
}

fn note(exchange: &Exchange<'_>) {
    let answer = match serde_json::from_str::<Value>(exchange.answer) {
        Ok(answer) => {
            let errors = answer.get("errors").cloned();
            let mut answer = shown(&answer, "data");
            if let (Some(errors), Some(map)) = (errors, answer.as_object_mut()) {
                map.insert("errors".to_owned(), errors);
            }
            answer.to_string()
        }
        Err(_) => exchange.answer.chars().take(500).collect(),
    };
    let Exchange { call, parameters, status, reason, .. } = exchange;
    LINES.lock().unwrap_or_else(PoisonError::into_inner).push(format!("> {call}\n> {parameters}\n< {status} {reason}\n< {answer}\n"));
}

fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
    LINES.lock().unwrap_or_else(PoisonError::into_inner).push(format!("# {line}\n"));
}

struct Check {
    controller: Controller,
    client: Arc<Client>,
    region: String,
    vm: api::Vm,
    storage: String,
    name: String,
}

fn plain(error: controller::error::Error) -> anyhow::Error {
    anyhow!("{error}")
}

/// Whether asking again can end otherwise: it was not refused by a word of Proxmox's.
fn may_pass(error: &controller::error::Error) -> bool {
    use tonic::Code;
    matches!(error.code, Code::Unavailable | Code::Aborted | Code::DeadlineExceeded | Code::Internal | Code::Unknown)
}

impl Check {
    async fn start(arguments: &Arguments) -> Result<Self> {
        let (config, _) = config::load(&arguments.config).map_err(anyhow::Error::msg)?;
        let is_asked_for = |cluster: &&ClusterConfig| arguments.region.as_ref().is_none_or(|region| *region == cluster.region);
        let mut clusters = config.clusters.iter().filter(is_asked_for);
        let cluster = clusters.next().with_context(|| format!("region {:?} is not in the config file", arguments.region))?;
        ensure!(clusters.next().is_none(), "the config file has several regions; say which by --region");
        let ca_bundle = std::env::var_os("SSL_CERT_FILE").filter(|path| !path.is_empty()).map(PathBuf::from);
        let client = Arc::new(Client::new(cluster, ca_bundle.as_deref()));
        let version = client.call(api::version()).await.and_then(|data| api::read_version("GET /version", &data))?;
        say(&format!("ok  version    Proxmox VE {version}, region {}", cluster.region));
        let data = client.call(api::resources()).await?;
        let resources = api::read_resources("GET /cluster/resources", &data)?;
        let vm = resources.vms.get(&arguments.vmid).cloned();
        let vm =
            vm.with_context(|| format!("VM {} is not shown to us: is its number right, and has the token VM.Audit?", arguments.vmid))?;
        say(&format!("ok  find       VM {} on {}", vm.vmid, vm.host));
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Ok(Self {
            controller: Controller::new(arguments.config.clone(), ca_bundle),
            client,
            region: cluster.region.clone(),
            vm,
            storage: arguments.storage.clone(),
            name: format!("pve-check-{since}"),
        })
    }

    fn node(&self) -> NodeId {
        NodeId::Vmid(self.vm.name.clone().unwrap_or_else(|| "pve-check".to_owned()), self.vm.vmid)
    }

    fn capability() -> VolumeCapability {
        VolumeCapability {
            access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
            access_type: Some(AccessType::Mount(MountVolume { fs_type: "ext4".to_owned(), ..Default::default() })),
        }
    }

    async fn create(&self) -> Result<VolumeHandle, controller::error::Error> {
        let segments = [(proto::TOPOLOGY_REGION.to_owned(), self.region.clone()), (proto::TOPOLOGY_ZONE.to_owned(), self.vm.host.clone())];
        let topology = csi::Topology { segments: segments.into() };
        let request = csi::CreateVolumeRequest {
            name: self.name.clone(),
            capacity_range: Some(csi::CapacityRange { required_bytes: SIZE_BYTES, limit_bytes: 0 }),
            volume_capabilities: vec![Self::capability()],
            parameters: [("storage".to_owned(), self.storage.clone())].into(),
            accessibility_requirements: Some(csi::TopologyRequirement { requisite: vec![topology], preferred: vec![] }),
            ..Default::default()
        };
        Ok(self.controller.create(Create::try_from(request)?).await?.handle)
    }

    async fn publish(&self, volume: &VolumeHandle) -> Result<String> {
        let NodeId::Vmid(name, vmid) = self.node() else { bail!("the node id has no number") };
        let request = csi::ControllerPublishVolumeRequest {
            volume_id: volume.to_string(),
            node_id: format!("{name}/{vmid}"),
            volume_capability: Some(Self::capability()),
            ..Default::default()
        };
        let request = Publish::try_from(request).map_err(plain)?;
        let context = self.controller.publish(Arc::new(request)).await.map_err(plain)?.publish_context;
        Ok(format!("scsi{}", context.get("lun").context("the publish context has no lun")?))
    }

    /// Configured, planned, plugged: the slots in each that have the volume, or for `plugged` all of them.
    async fn views(&self, volume: &VolumeHandle) -> Result<(Vec<String>, Vec<String>, Vec<String>)> {
        let request = api::pending(&self.vm.host, self.vm.vmid);
        let config = api::read_pending(&request.name(), &self.client.call(request).await?)?;
        let request = api::vm_state(&self.vm.host, self.vm.vmid);
        let state = api::read_vm_state(&request.name(), &self.client.call(request).await?)?;
        let volid = volume.volid();
        let keys = |is: &dyn Fn(&pve::drive::Line) -> bool| {
            config.naming(&volid).filter(|(_, line)| is(line)).map(|(key, _)| key.into()).collect()
        };
        let plugged = state.plugged.context("QEMU does not say what is plugged (no blockstat)")?.into_iter().collect();
        Ok((keys(&|line| line.value.is_some()), keys(&|line| line.pending.is_some() || line.delete), plugged))
    }

    async fn steps(&self, made: &Mutex<Option<VolumeHandle>>) -> Result<()> {
        let timed = |step: &str, begun: Instant, what: &str| say(&format!("ok  {step:<10} {what} ({} ms)", begun.elapsed().as_millis()));
        let begun = Instant::now();
        let volume = self.create().await.map_err(plain).context("create")?;
        made.lock().unwrap_or_else(PoisonError::into_inner).replace(volume.clone());
        timed("create", begun, &format!("{volume}; if this check is killed: pvesm free {}", volume.volid()));
        let begun = Instant::now();
        let slot = self.publish(&volume).await.context("attach")?;
        timed("attach", begun, &slot);
        let (configured, planned, plugged) = self.views(&volume).await.context("views")?;
        ensure!(configured == [slot.clone()], "configured is {configured:?}, not {slot}");
        ensure!(planned.is_empty(), "planned is {planned:?}");
        ensure!(plugged.contains(&slot), "QEMU has {plugged:?}, not {slot}");
        say(&format!("ok  views      configured, not planned, and plugged as {slot}"));
        let begun = Instant::now();
        let request = Expand { handle: volume.clone(), required_bytes: GROWN_BYTES, limit_bytes: None };
        let grown = self.controller.expand(&request).await.map_err(plain).context("grow")?.capacity_bytes;
        let request = api::volume(&self.vm.host, &volume.storage, &volume.volid());
        let actual = api::read_volume(&request.name(), &self.client.call(request).await?)?;
        ensure!(grown >= GROWN_BYTES && actual >= grown, "grown to {grown} bytes, the storage says {actual}");
        timed("grow", begun, &format!("{actual} bytes"));
        let begun = Instant::now();
        self.detach(&volume).await?;
        let (configured, planned, plugged) = self.views(&volume).await.context("views")?;
        ensure!(configured.is_empty() && planned.is_empty(), "still configured {configured:?}, planned {planned:?}");
        ensure!(!plugged.contains(&slot), "QEMU still has {slot}");
        timed("detach", begun, "in none of the views");
        let begun = Instant::now();
        self.controller.delete(&volume).await.map_err(plain).context("delete")?;
        let request = api::volume(&self.vm.host, &volume.storage, &volume.volid());
        ensure!(self.client.call(request).await.is_err(), "the storage still has it");
        made.lock().unwrap_or_else(PoisonError::into_inner).take();
        timed("delete", begun, "gone");
        Ok(())
    }

    async fn detach(&self, volume: &VolumeHandle) -> Result<()> {
        let request = Unpublish { handle: volume.clone(), node: Some(self.node()) };
        self.controller.unpublish(&request).await.map_err(plain).context("detach")
    }

    /// Leaves nothing, also when a step failed or was broken off halfway: tried until nothing of it can come any more.
    async fn tidy(&self, made: Option<VolumeHandle>) {
        let (begun, mut made, mut said) = (Instant::now(), made, String::new());
        loop {
            let left = TIDY_LIMIT.saturating_sub(begun.elapsed());
            let tried = tokio::time::timeout(left, self.tidy_once(&mut made)).await.unwrap_or_else(|_| Err(anyhow!("it takes too long")));
            let Err(why) = tried else { return };
            let why = format!("{why:#}");
            if begun.elapsed() + TIDY_PAUSE >= TIDY_LIMIT {
                let what = made.as_ref().map_or_else(|| format!("a volume {}, perhaps,", self.name), ToString::to_string);
                let free = made.as_ref().map_or_else(|| "pvesm list".to_owned(), |volume| format!("pvesm free {}", volume.volid()));
                return say(&format!("NOT TIDY: {what} is left: {why}; detach it from VM {} and run: {free}", self.vm.vmid));
            }
            if why != said {
                say(&format!("    tidying    not yet, tried for {} s: {why}", TIDY_LIMIT.as_secs()));
            }
            said = why;
            tokio::time::sleep(TIDY_PAUSE).await;
        }
    }

    /// `made`: nothing where the creation was not answered, or failed.
    async fn tidy_once(&self, made: &mut Option<VolumeHandle>) -> Result<()> {
        let volume = match made {
            Some(volume) => volume.clone(),
            // It is asked for by its name: making it again gives it back.
            None => match self.create().await {
                Ok(volume) => made.insert(volume).clone(),
                Err(error) if may_pass(&error) => return Err(plain(error)).context("what became of the creation"),
                Err(_) => return Ok(()),
            },
        };
        self.detach(&volume).await?;
        self.controller.delete(&volume).await.map_err(plain).context("delete")?;
        say(&format!("ok  tidied     {volume} is removed"));
        Ok(())
    }
}

/// From here on none of these signals ends the process by itself: tidying is not broken off.
struct Stop([(tokio::signal::unix::Signal, &'static str); 3]);

impl Stop {
    fn listen() -> Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self([
            (signal(SignalKind::interrupt())?, "interrupted"),
            (signal(SignalKind::terminate())?, "terminated"),
            (signal(SignalKind::hangup())?, "the terminal is gone"),
        ]))
    }

    async fn wait(&mut self) -> &'static str {
        let [(interrupt, interrupted), (terminate, terminated), (hangup, hung_up)] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => interrupted,
            _ = terminate.recv() => terminated,
            _ = hangup.recv() => hung_up,
        }
    }
}

async fn run(arguments: &Arguments) -> Result<()> {
    let mut stop = Stop::listen()?;
    let check = tokio::select! {
        check = Check::start(arguments) => check?,
        why = stop.wait() => bail!("{why}"),
    };
    let made = Mutex::new(None);
    let done = tokio::select! {
        done = check.steps(&made) => done,
        why = stop.wait() => {
            say(&format!("    tidying    {why}: what was begun is waited for and removed, within {} s", TIDY_LIMIT.as_secs()));
            Err(anyhow!("{why}"))
        }
    };
    let left = made.lock().unwrap_or_else(PoisonError::into_inner).take();
    if done.is_err() {
        check.tidy(left).await;
    }
    done
}

fn write_transcript(path: &Path) -> Result<()> {
    let lines = LINES.lock().unwrap_or_else(PoisonError::into_inner).join("\n");
    std::fs::write(path, lines).with_context(|| format!("write {}", path.display()))
}

fn main() -> ExitCode {
    let arguments = match Arguments::read() {
        Ok(arguments) => arguments,
        Err(why) => {
            eprintln!("pve-check: {why:#}");
            return ExitCode::from(2);
        }
    };
    let _ = proto::log::set_level("error");
    pve::transcribe(note);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let done = runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(run(&arguments)));
    if let Err(why) = &done {
        say(&format!("FAILED      {why:#}"));
    }
    match write_transcript(&arguments.transcript) {
        Ok(()) => eprintln!("transcript: {}", arguments.transcript.display()),
        Err(why) => eprintln!("pve-check: no transcript: {why:#}"),
    }
    if done.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_nobodys_business_is_left_out() {
        let answer = json!({"data": [
            {"key": "scsi1", "value": "ds:vm-1-a,size=1G"}, {"key": "cipassword", "value": "hunter2"}, {"key": "net0", "value": "virtio=AA:BB"},
            {"id": "qemu/101", "name": "payroll", "status": "running", "vmid": 101, "blockstat": {"scsi1": {"rd_bytes": 7}}},
        ]});
        let text = shown(&answer, "data").to_string();
        for kept in ["ds:vm-1-a,size=1G", "qemu/101", "running", "101", "rd_bytes", "cipassword"] {
            assert!(text.contains(kept), "{text} lacks {kept}");
        }
        for hidden in ["hunter2", "AA:BB", "payroll"] {
            assert!(!text.contains(hidden), "{text} has {hidden}");
        }
        assert_eq!(shown(&json!({"data": "UPID:a:"}), "data"), json!({"data": "UPID:a:"}));
    }
}
