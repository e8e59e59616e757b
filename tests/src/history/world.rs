//! Controllers in this process, the simulator that lets their requests in one at a time, and tokio's paused clock for both.
//!
//! Between two steps nothing moves: every call to Proxmox waits at its door or for simulated time, and no task can go on. So the
//! order of everything is the order of the steps, and the same steps give the same log. Only what threads do between a door and the
//! controller is left to chance, and nothing depends on it: one request at a time is let in.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ::controller::kube::Kube;
use ::controller::run::Controller;
use ::controller::service::ControllerService;
use anyhow::{Context, Result, ensure};
use proto::VolumeHandle;
use proto::csi::controller_server::Controller as _;
use proto::csi::volume_capability::{AccessMode, AccessType, MountVolume, access_mode::Mode};
use proto::csi::{self, VolumeCapability};
use tokio::task::AbortHandle;
use tonic::{Request, Status};

use crate::kube::Kubernetes;
use crate::sim::{Builder, Door, STANDARD_SECRET, Simulator, Waiting};

/// What all volumes are in.
pub const REGION: &str = "fsn1";
/// Of the controllers for their answers, in real time: they wait at their doors for as long as the history says.
const PATIENCE: Duration = Duration::from_secs(3600);
/// Nothing moved for so many looks: nothing will.
const CALM_LOOKS: u32 = 4;
/// Between two looks while something moves.
const LOOK_PAUSE: Duration = Duration::from_micros(20);
/// What every step takes of simulated time.
const TICK: Duration = Duration::from_micros(10);
/// Real time; a step takes microseconds, on a machine that has them to give.
const STEP_LIMIT: Duration = Duration::from_secs(300);
/// The first pause of simulated time when nothing else can be done, and the longest: short ones see tasks end one by one.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// A Lease that nobody has is taken at once.
const LEASE_LIMIT: Duration = Duration::from_secs(10);

/// What is asked of a controller. Volumes are numbers: their names are made of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rpc {
    Create {
        volume: usize,
    },
    Publish {
        volume: usize,
        vm: u32,
    },
    Unpublish {
        volume: usize,
        vm: u32,
    },
    Expand {
        volume: usize,
        bytes: u64,
    },
    Delete {
        volume: usize,
    },
    /// A limit of so many operations per second; only with Kubernetes.
    Modify {
        volume: usize,
        iops: u32,
    },
}

impl Rpc {
    #[must_use]
    pub fn volume(&self) -> usize {
        match self {
            Rpc::Create { volume }
            | Rpc::Publish { volume, .. }
            | Rpc::Unpublish { volume, .. }
            | Rpc::Expand { volume, .. }
            | Rpc::Delete { volume }
            | Rpc::Modify { volume, .. } => *volume,
        }
    }
}

/// A volume that may come to be.
#[derive(Debug, Clone)]
pub struct Claim {
    pub name: String,
    pub storage: String,
    /// Empty: any.
    pub zones: Vec<String>,
    pub bytes: u64,
    /// Its image on a storage that all share, where a person makes it and not the driver.
    pub image: Option<&'static str>,
    /// Once it was created.
    pub id: Option<String>,
}

impl Claim {
    #[must_use]
    pub fn handle(&self) -> Option<VolumeHandle> {
        self.id.as_ref()?.parse().ok()
    }
}

/// What a call answered: a volume's id, or nothing worth keeping.
pub type Answer = Result<String, Status>;

/// One process of a controller, from its start to its end.
#[derive(Debug)]
struct Incarnation {
    door: Door,
    /// Its way to Kubernetes, where there is that.
    kube: Option<(Door, Arc<Kube>)>,
    serves: Arc<Mutex<Serves>>,
}

/// What its socket has behind it.
#[derive(Debug, Default)]
struct Serves {
    controller: Option<Arc<Controller>>,
    csi: Option<ControllerService>,
    /// It lost the Lease, and ends as soon as its calls have ended.
    ends: bool,
}

impl Incarnation {
    fn serves(&self) -> MutexGuard<'_, Serves> {
        self.serves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Serves {
    fn begin(&mut self, controller: Arc<Controller>) {
        self.csi = Some(ControllerService::new(Arc::clone(&controller)));
        self.controller = Some(controller);
    }
}

type Answered = Arc<Mutex<Vec<(usize, Answer)>>>;

/// All of it. Ends with its value.
#[derive(Debug)]
pub struct World {
    pub sim: Arc<Simulator>,
    /// Where controllers need a Lease.
    pub kubernetes: Option<Kubernetes>,
    /// Those of the controllers from the second on, where each has its own.
    foreign: Vec<Kubernetes>,
    pub claims: Vec<Claim>,
    incarnations: Vec<Incarnation>,
    /// Which of them each controller is now.
    current: Vec<usize>,
    answered: Answered,
    /// Not answered: in which process, what waits for the answer, and what was asked.
    running: HashMap<usize, (usize, AbortHandle, Rpc)>,
    next_call: usize,
    began: tokio::time::Instant,
    log: Vec<String>,
    folder: PathBuf,
}

impl Drop for World {
    fn drop(&mut self) {
        // Temporary: what cannot be removed is left to the next run's sweep.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Runs `work` alone on this thread under a clock that stands still until it is told to go.
///
/// # Errors
/// Its own; or no runtime.
pub fn under_paused_time<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().context("start tokio")?;
    runtime.block_on(work)
}

impl World {
    /// Must run [`under_paused_time`].
    ///
    /// # Errors
    /// The simulator or a folder cannot be made.
    pub async fn new(builder: Builder, controllers: usize, claims: Vec<Claim>) -> Result<World> {
        let mut world = Self::empty(builder, claims).await?;
        for number in 0..controllers {
            let started = world.start(number).await?;
            world.current.push(started);
        }
        Ok(world)
    }

    /// The same with Kubernetes: controllers act one at a time, by its Lease. The first of them has it.
    ///
    /// # Errors
    /// As [`World::new`].
    pub async fn with_lease(builder: Builder, controllers: usize, claims: Vec<Claim>) -> Result<World> {
        let mut world = Self::empty(builder, claims).await?;
        let kubernetes = Kubernetes::start_with(world.sim.turns()).await?;
        kubernetes.lease_given_back();
        world.kubernetes = Some(kubernetes);
        for number in 0..controllers {
            let started = world.start(number).await?;
            world.current.push(started);
            if number == 0 {
                ensure!(world.go_on(LEASE_LIMIT, |world| world.serves(0)).await?, "nobody takes the Lease");
            }
        }
        Ok(world)
    }

    /// The same with a Kubernetes for each controller, and so a Lease for each: all of them act.
    ///
    /// # Errors
    /// As [`World::new`].
    pub async fn with_a_lease_each(builder: Builder, controllers: usize, claims: Vec<Claim>) -> Result<World> {
        let mut world = Self::with_lease(builder, 1, claims).await?;
        for number in 1..controllers {
            let kubernetes = Kubernetes::start_with(world.sim.turns()).await?;
            kubernetes.lease_given_back();
            world.foreign.push(kubernetes);
            let started = world.start(number).await?;
            world.current.push(started);
            ensure!(world.go_on(LEASE_LIMIT, |world| world.serves(number)).await?, "nobody takes the Lease of controller {number}");
        }
        Ok(world)
    }

    async fn empty(builder: Builder, claims: Vec<Claim>) -> Result<World> {
        controller::pve::be_patient(PATIENCE);
        let sim = Arc::new(builder.scheduled().start().await?);
        let folder = crate::folder::new("pve-csi-bed-", "-history")?;
        Ok(World {
            sim,
            kubernetes: None,
            foreign: Vec::new(),
            claims,
            incarnations: Vec::new(),
            current: Vec::new(),
            answered: Answered::default(),
            running: HashMap::new(),
            next_call: 0,
            began: tokio::time::Instant::now(),
            log: Vec::new(),
            folder,
        })
    }

    async fn start(&mut self, controller: usize) -> Result<usize> {
        let number = self.incarnations.len();
        let door = self.sim.door(&format!("c{number}")).await?;
        let config = self.folder.join(format!("c{number}.yaml"));
        let text = format!(
            "clusters:\n  - url: {}\n    region: {REGION}\n    token_id: csi@pve!csi\n    token_secret: \"{STANDARD_SECRET}\"\n",
            door.url
        );
        std::fs::write(&config, text).context("write the clusters file")?;
        let serves: Arc<Mutex<Serves>> = Arc::default();
        let mut incarnation = Incarnation { door, kube: None, serves: Arc::clone(&serves) };
        let own = controller.checked_sub(1).and_then(|place| self.foreign.get(place));
        if let Some(kubernetes) = own.or(self.kubernetes.as_ref()) {
            let door = kubernetes.door(&format!("c{number} kube")).await?;
            let access = kubernetes.access_at(&door.url, &self.folder)?;
            let kube = Arc::new(Kube::new(access).map_err(anyhow::Error::msg)?.with_lease(&format!("c{number}")));
            incarnation.kube = Some((door, Arc::clone(&kube)));
            tokio::spawn(lead(kube, config, serves));
        } else {
            incarnation.serves().begin(Arc::new(Controller::new(config, None)));
        }
        self.incarnations.push(incarnation);
        Ok(number)
    }

    /// Whether a controller has its socket, and has not lost the Lease.
    #[must_use]
    pub fn serves(&self, controller: usize) -> bool {
        let at = self.current.get(controller).and_then(|current| self.incarnations.get(*current));
        at.is_some_and(|incarnation| {
            let serves = incarnation.serves();
            serves.csi.is_some() && !serves.ends
        })
    }

    /// Whether a controller is about to end: it has lost the Lease.
    #[must_use]
    pub fn ends(&self, controller: usize) -> bool {
        let at = self.current.get(controller).and_then(|current| self.incarnations.get(*current));
        at.is_some_and(|incarnation| incarnation.serves().ends)
    }

    /// SIGKILL and a new process. What was sent and not looked at is lost, what Proxmox works on goes on. The calls that nobody
    /// will answer any more, by number.
    ///
    /// # Errors
    /// A folder or a socket cannot be made.
    pub async fn kill(&mut self, controller: usize) -> Result<Vec<usize>> {
        let old = *self.current.get(controller).context("no such controller")?;
        if let Some(incarnation) = self.incarnations.get(old) {
            incarnation.door.shut();
            if let Some((door, _)) = &incarnation.kube {
                door.shut();
            }
        }
        let new = self.start(controller).await?;
        self.note(format!("kill controller {controller} (c{old}); it is c{new} now"));
        if let Some(current) = self.current.get_mut(controller) {
            *current = new;
        }
        let mut lost: Vec<usize> = self.running.iter().filter(|(_, (at, _, _))| *at == old).map(|(call, _)| *call).collect();
        lost.sort_unstable();
        for call in &lost {
            self.give_up(*call);
        }
        Ok(lost)
    }

    /// The door of a controller as it is now.
    #[must_use]
    pub fn door(&self, controller: usize) -> &str {
        let at = self.current.get(controller).and_then(|current| self.incarnations.get(*current));
        at.map_or("", |incarnation| incarnation.door.name.as_str())
    }

    /// Simulated time since the world began.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Writes a line into the log.
    pub fn note(&mut self, text: impl AsRef<str>) {
        let now = self.now().as_secs_f64();
        let mut line = format!("{now:9.3} {}", text.as_ref());
        // The port of a door is chance.
        for incarnation in &self.incarnations {
            line = line.replace(&incarnation.door.url, &format!("http://{}", incarnation.door.name));
            if let Some((door, _)) = &incarnation.kube {
                line = line.replace(&door.url, &format!("http://{}", door.name));
            }
        }
        // The controller tells people when it first saw a lock or an absence, by the calendar.
        if let Some((before, after)) = line.split_once("since ").and_then(|(before, rest)| Some((before, rest.split_once(" or longer")?.1)))
        {
            line = format!("{before}since then{after}");
        }
        self.log.push(line);
    }

    /// All that happened, in order.
    #[must_use]
    pub fn log(&self) -> &[String] {
        &self.log
    }

    /// Begins a call; its answer comes out of [`World::answers`] under this number.
    ///
    /// # Errors
    /// It is about a volume that was never created: there is no id to name it.
    pub fn call(&mut self, controller: usize, rpc: &Rpc) -> Result<usize> {
        let claim = self.claims.get(rpc.volume()).context("no such volume")?.clone();
        let at = *self.current.get(controller).context("no such controller")?;
        let csi = self.incarnations.get(at).context("no such process")?.serves().csi.clone().context("it stands by")?;
        let id = claim.id.clone();
        ensure!(id.is_some() || matches!(rpc, Rpc::Create { .. }), "{rpc:?}: never created");
        let number = self.next_call;
        self.next_call += 1;
        self.note(format!("call {number} of c{at}: {rpc:?}"));
        let (rpc, asked, answered) = (rpc.clone(), rpc.clone(), Arc::clone(&self.answered));
        if let (Rpc::Create { .. }, Some(image)) = (&rpc, claim.image) {
            let volid = format!("{}:{image}", claim.storage);
            // A person who makes it again while Proxmox still deletes the last one of the name loses it, whatever a controller says.
            if self.sim.deletes_late(&volid) {
                let answer = Err(Status::unavailable(format!("{volid} is still being deleted")));
                answered.lock().unwrap_or_else(PoisonError::into_inner).push((number, answer));
                self.running.insert(number, (at, tokio::spawn(async {}).abort_handle(), asked));
                return Ok(number);
            }
            // There already: so much the better.
            let made = self.sim.create_volume("pve1", &volid, claim.bytes).is_ok();
            self.note(format!("{volid} {}", if made { "is made by hand" } else { "is there" }));
            let id = format!("{REGION}//{}/{image}", claim.storage);
            answered.lock().unwrap_or_else(PoisonError::into_inner).push((number, Ok(id)));
            self.running.insert(number, (at, tokio::spawn(async {}).abort_handle(), asked));
            return Ok(number);
        }
        let task = tokio::spawn(async move {
            let answer = perform(&csi, &claim, id.unwrap_or_default(), &rpc).await;
            answered.lock().unwrap_or_else(PoisonError::into_inner).push((number, answer));
        });
        self.running.insert(number, (at, task.abort_handle(), asked));
        Ok(number)
    }

    /// The client gives up; the controller does not.
    pub fn give_up(&mut self, call: usize) {
        if let Some((_, task, _)) = self.running.remove(&call) {
            task.abort();
            self.note(format!("call {call}: the client gives up"));
        }
    }

    /// How many calls are not answered.
    #[must_use]
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Calls that were answered since this was asked last, in this order.
    pub fn answers(&mut self) -> Vec<(usize, Answer)> {
        let answers = std::mem::take(&mut *self.answered.lock().unwrap_or_else(PoisonError::into_inner));
        let mut known = Vec::new();
        for (call, answer) in answers {
            let Some((_, _, rpc)) = self.running.remove(&call) else { continue };
            if let (Rpc::Create { volume }, Ok(id)) = (&rpc, &answer)
                && let Some(claim) = self.claims.get_mut(*volume)
            {
                claim.id = Some(id.clone());
            }
            known.push((call, answer));
        }
        let answers = known;
        for (call, answer) in &answers {
            let text = match answer {
                Ok(id) => format!("OK {id}"),
                Err(status) => format!("{:?}: {}", status.code(), status.message()),
            };
            self.note(format!("call {call} answers {text}"));
        }
        answers
    }

    fn in_flight(&self) -> usize {
        let proxmox = |incarnation: &Incarnation| incarnation.serves().controller.as_ref().map_or(0, |one| one.calls_in_flight());
        let kube = |incarnation: &Incarnation| incarnation.kube.as_ref().map_or(0, |(_, kube)| kube.calls_in_flight());
        self.incarnations.iter().map(|incarnation| proxmox(incarnation) + kube(incarnation)).sum()
    }

    /// Waits until every call to Proxmox stands at its door or waits for time to pass, and no task can go on.
    ///
    /// # Errors
    /// Something moves on for minutes of real time.
    pub async fn calm(&self) -> Result<()> {
        let begun = Instant::now();
        let (mut looks, mut last) = (0, (0, 0, 0, 0));
        while looks < CALM_LOOKS {
            tokio::task::yield_now().await;
            let answered = self.answered.lock().unwrap_or_else(PoisonError::into_inner).len();
            let now = (self.in_flight(), self.sim.inside(), self.sim.working(), answered);
            if now.0 == now.1 && now == last {
                looks += 1;
            } else {
                looks = 0;
                last = now;
                pause();
                ensure!(
                    begun.elapsed() < STEP_LIMIT,
                    "calls in flight, at their doors, worked on, answered: {now:?}; {:#?}",
                    self.sim.waiting()
                );
            }
        }
        Ok(())
    }

    /// Lets one request in, and waits until nothing moves.
    ///
    /// # Errors
    /// As [`World::calm`].
    pub async fn admit(&mut self, waiting: &Waiting) -> Result<()> {
        // No two steps are at the same moment. What only waited for this moment goes first: it and the one let in would race.
        self.pass(TICK).await?;
        self.note(format!("{} {} {}", waiting.door, if waiting.answer { "<-" } else { "->" }, waiting.request));
        ensure!(!waiting.request.split(['&', ' ']).any(|part| part == "digest="), "a write that no digest guards: {}", waiting.request);
        self.sim.admit(waiting);
        self.calm().await
    }

    /// Simulated time passes.
    ///
    /// # Errors
    /// As [`World::calm`].
    pub async fn pass(&mut self, time: Duration) -> Result<()> {
        tokio::time::advance(time).await;
        self.calm().await
    }

    /// Lets everything in as it comes, in a fixed order, until `done`; at most for `limit` of simulated time.
    ///
    /// # Errors
    /// As [`World::calm`].
    pub async fn go_on(&mut self, limit: Duration, mut done: impl FnMut(&mut World) -> bool) -> Result<bool> {
        let end = self.now() + limit;
        let mut pause = SHORTEST_PAUSE;
        self.calm().await?;
        while !done(self) {
            if let Some(first) = self.sim.waiting().last() {
                self.admit(first).await?;
                pause = SHORTEST_PAUSE;
            } else if self.now() >= end {
                return Ok(false);
            } else {
                self.pass(pause.min(end - self.now())).await?;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
        Ok(true)
    }

    /// Makes one call and lets everything in until it is answered.
    ///
    /// # Errors
    /// As [`World::call`]; or it is not answered within `limit`.
    pub async fn answer_to(&mut self, controller: usize, rpc: &Rpc, limit: Duration) -> Result<Answer> {
        let call = self.call(controller, rpc)?;
        let mut found = None;
        self.go_on(limit, |world| {
            found = found.take().or_else(|| world.answers().into_iter().find(|(number, _)| *number == call));
            found.is_some()
        })
        .await?;
        let (_, answer) = found.with_context(|| format!("{rpc:?}: no answer within {} s", limit.as_secs()))?;
        Ok(answer)
    }

    /// Everything that was begun ends: calls, tasks, and what pveproxy gave up on.
    ///
    /// # Errors
    /// As [`World::calm`]; or something goes on for `limit`.
    pub async fn run_dry(&mut self, limit: Duration) -> Result<()> {
        let idle = |world: &mut World| {
            let answered = world.answers();
            drop(answered);
            world.running() == 0 && world.sim.inside() == 0 && world.in_flight() == 0
        };
        ensure!(self.go_on(limit, idle).await?, "{} calls still run after {} s", self.running(), limit.as_secs());
        Ok(())
    }
}

/// Not a mere yield: on a busy machine that waits for everybody else's turn.
#[expect(clippy::disallowed_methods, reason = "between two looks at a named condition, which has its deadline")]
fn pause() {
    std::thread::sleep(LOOK_PAUSE);
}

/// A process as it goes: waits for the Lease, serves while it has it, ends.
async fn lead(kube: Arc<Kube>, config: PathBuf, serves: Arc<Mutex<Serves>>) {
    let Some(lease) = kube.lease().cloned() else { return };
    let lock = || serves.lock().unwrap_or_else(PoisonError::into_inner);
    if let Ok(lost) = lease.lead(kube.is_first()).await {
        lock().begin(Arc::new(Controller::with_kube(config, None, Some(kube))));
        let _ = lost.await;
    }
    lock().ends = true;
}

fn capability() -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
        access_type: Some(AccessType::Mount(MountVolume { fs_type: "ext4".into(), ..Default::default() })),
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

fn creation(claim: &Claim) -> csi::CreateVolumeRequest {
    let topology = |zone: &String| csi::Topology {
        segments: HashMap::from([
            (proto::TOPOLOGY_REGION.to_string(), REGION.to_string()),
            (proto::TOPOLOGY_ZONE.to_string(), zone.clone()),
        ]),
    };
    let requisite: Vec<csi::Topology> = claim.zones.iter().map(topology).collect();
    csi::CreateVolumeRequest {
        name: claim.name.clone(),
        capacity_range: Some(csi::CapacityRange { required_bytes: signed(claim.bytes), limit_bytes: 0 }),
        volume_capabilities: vec![capability()],
        parameters: HashMap::from([("storage".to_string(), claim.storage.clone())]),
        accessibility_requirements: (!requisite.is_empty()).then(|| csi::TopologyRequirement { preferred: requisite.clone(), requisite }),
        ..Default::default()
    }
}

async fn perform(csi: &ControllerService, claim: &Claim, volume_id: String, rpc: &Rpc) -> Answer {
    match rpc {
        Rpc::Create { .. } => {
            let answer = csi.create_volume(Request::new(creation(claim))).await?.into_inner();
            Ok(answer.volume.unwrap_or_default().volume_id)
        }
        Rpc::Publish { vm, .. } => {
            let request = csi::ControllerPublishVolumeRequest {
                volume_id,
                node_id: format!("node-{vm}/{vm}"),
                volume_capability: Some(capability()),
                ..Default::default()
            };
            let context = csi.controller_publish_volume(Request::new(request)).await?.into_inner().publish_context;
            Ok(context.get(proto::publish_context::LUN).cloned().unwrap_or_default())
        }
        Rpc::Unpublish { vm, .. } => {
            let request = csi::ControllerUnpublishVolumeRequest { volume_id, node_id: format!("node-{vm}/{vm}"), ..Default::default() };
            csi.controller_unpublish_volume(Request::new(request)).await.map(|_| String::new())
        }
        Rpc::Expand { bytes, .. } => {
            let request = csi::ControllerExpandVolumeRequest {
                volume_id,
                capacity_range: Some(csi::CapacityRange { required_bytes: signed(*bytes), limit_bytes: 0 }),
                volume_capability: Some(capability()),
                ..Default::default()
            };
            csi.controller_expand_volume(Request::new(request)).await.map(|answer| answer.into_inner().capacity_bytes.to_string())
        }
        Rpc::Delete { .. } => {
            let request = csi::DeleteVolumeRequest { volume_id, ..Default::default() };
            csi.delete_volume(Request::new(request)).await.map(|_| String::new())
        }
        Rpc::Modify { iops, .. } => {
            let mutable_parameters = HashMap::from([("diskIOPS".to_string(), iops.to_string())]);
            let request = csi::ControllerModifyVolumeRequest { volume_id, mutable_parameters, ..Default::default() };
            csi.controller_modify_volume(Request::new(request)).await.map(|_| String::new())
        }
    }
}
