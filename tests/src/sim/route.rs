//! From a request to an answer, with the checks in Proxmox's order:
//! 401, URI lookup, conflicting parameters, token allowed, static permission, the other node, pvedaemon, schema, handler.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

use super::access::{Access, Caller, Credentials, percent_decode};
use super::answer::{ApiError, Reply};
use super::clock::Gate;
use super::endpoint::{self, Check, Endpoint, Route};
use super::faults::Effect;
use super::http::{Answer, Outcome, Request};
use super::params::{self, Params, Property};
use super::state::Cluster;
use super::{content, control, drives, inventory, update, vms};

/// pveproxy's patience with pvedaemon and with other nodes.
const PROXY_TIMEOUT: Duration = Duration::from_secs(30);
/// A refused login is answered this late.
const UNAUTHORISED_DELAY: Duration = Duration::from_secs(3);
/// No answer to ARP.
const DEAD_NODE: Duration = Duration::from_secs(3);
/// pvedaemon's workers on a node.
const WORKERS: usize = 3;

/// A request that has passed all checks before its schema.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) endpoint: Endpoint,
    pub(crate) properties: &'static [Property],
    pub(crate) caller: Caller,
    pub(crate) params: Params,
    /// The node that works on it.
    pub(crate) node: String,
}

impl Call {
    pub(crate) fn text(&self, name: &str) -> &str {
        self.params.get(name).map_or("", String::as_str)
    }

    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.params.get(name).map(String::as_str)
    }

    pub(crate) fn vmid(&self) -> u32 {
        self.text("vmid").parse().unwrap_or(0)
    }

    pub(crate) fn flag(&self, name: &str) -> bool {
        self.get(name) == Some("1")
    }
}

pub(crate) async fn respond(cluster: &Arc<Cluster>, request: &Request, door: &str) -> Outcome {
    let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
    if let Some(path) = path.strip_prefix("/_sim") {
        return control::respond(cluster, &request.method, path, &request.body);
    }
    let Some(turns) = &cluster.turns else { return answer(cluster, request, path, query).await };
    let text =
        format!("{} {} {}", request.method, percent_decode(&request.target), percent_decode(&String::from_utf8_lossy(&request.body)));
    let number = request.header("x-request-id").and_then(|number| number.rsplit('.').next()?.parse().ok()).unwrap_or(u64::MAX);
    let Some(working) = turns.arrive(door, text.trim_end(), number).await else { return Outcome::Close };
    let outcome = answer(cluster, request, path, query).await;
    if working.leave().await { outcome } else { Outcome::Close }
}

async fn answer(cluster: &Arc<Cluster>, request: &Request, path: &str, query: &str) -> Outcome {
    let _busy = cluster.clock.busy();
    let Some(path) = path.strip_prefix("/api2/json") else {
        return failed(cluster, &ApiError::server(501, format!("no such file '{path}'")), false);
    };
    let path = percent_decode(path);
    if !matches!(request.method.as_str(), "GET" | "POST" | "PUT" | "DELETE") {
        return failed(cluster, &ApiError::empty(501, format!("method '{}' not available", request.method)), false);
    }
    let route = endpoint::find(&request.method, &path);
    let name = route.as_ref().map_or_else(|| format!("{} {path}", request.method), |(route, _)| format!("{} {}", route.method, route.path));
    let (effect, hook) = {
        let mut state = cluster.state();
        let separator = if query.is_empty() { "" } else { "?" };
        state.faults.count(&name, format!("{} {path}{separator}{query}", request.method));
        (state.faults.effect(&request.method, &path), state.faults.hook(&request.method, &path))
    };
    if let Some(hook) = hook {
        hook();
    }
    match &effect {
        Some(Effect::Close) => return Outcome::Close,
        Some(Effect::Hang) => return Outcome::Hang,
        Some(answer @ Effect::Answer { .. }) => {
            if let Some(error) = answer.answer() {
                return failed(cluster, &error, false);
            }
        }
        Some(Effect::CloseAfterwards | Effect::TimeOutButComplete) | None => {}
    }
    let late = matches!(effect, Some(Effect::TimeOutButComplete));
    let outcome = match admit(cluster, request, &path, query, route).await {
        Ok((call, route)) => perform(cluster, call, route, late).await,
        Err(error) => {
            if cluster.latency.by_endpoint && error.status == 595 {
                cluster.clock.sleep(DEAD_NODE).await;
            }
            failed(cluster, &error, false)
        }
    };
    if matches!(effect, Some(Effect::CloseAfterwards)) { Outcome::Close } else { outcome }
}

/// Everything that pveproxy itself looks at.
async fn admit(
    cluster: &Arc<Cluster>,
    request: &Request,
    path: &str,
    query: &str,
    route: Option<(&'static Route, Params)>,
) -> Result<(Call, &'static Route), ApiError> {
    let logs_in = route.as_ref().is_some_and(|(route, _)| route.endpoint == Endpoint::Ticket);
    let caller = match authenticate(cluster, request) {
        Ok(caller) => caller,
        Err(_) if logs_in => Access::parse_identity(""),
        Err(why) => {
            cluster.clock.sleep(UNAUTHORISED_DELAY).await;
            return Err(ApiError::empty(401, why));
        }
    };
    let mut params = body_params(cluster, request)?;
    params.extend(params::from_form(query));
    params.remove("_dc");
    let (route, uri) = route.ok_or_else(|| ApiError::not_implemented(&request.method, path))?;
    for (name, value) in &uri {
        if params.get(name).is_some_and(|given| given != value) {
            return Err(ApiError::param(name, "duplicate parameter (already defined in URI) with conflicting values!"));
        }
    }
    if logs_in && caller.token.is_some() {
        let text = "Permission check failed (URI '/access/ticket' not available with API token, need proper ticket.\n)\n";
        return Err(ApiError::handler(403, text));
    }
    check(cluster, &caller, route, &uri)?;
    params.extend(uri);
    let node = destination(cluster, &params)?;
    if params.contains_key("node") {
        params.insert("node".to_owned(), node.clone());
    }
    if route.protected && cluster.state().daemon_down {
        return Err(ApiError::empty(595, "Connection refused"));
    }
    Ok((Call { endpoint: route.endpoint, properties: route.properties, caller, params, node }, route))
}

fn authenticate(cluster: &Cluster, request: &Request) -> Result<Caller, String> {
    let credentials = Credentials {
        authorization: request.header("authorization"),
        cookie: request.header("cookie"),
        csrf: request.header("csrfpreventiontoken"),
        reads_only: request.method == "GET",
    };
    cluster.state().access.authenticate(&credentials, cluster.clock.elapsed(), cluster.version)
}

fn body_params(cluster: &Cluster, request: &Request) -> Result<Params, ApiError> {
    match request.header("transfer-encoding").map(str::to_ascii_lowercase).as_deref() {
        None => {}
        Some("chunked") => return Err(ApiError::server(501, "chunked transfer encoding not supported")),
        Some(other) => return Err(ApiError::server(501, format!("Unknown transfer encoding '{other}'"))),
    }
    if request.body.is_empty() {
        return Ok(Params::new());
    }
    if !matches!(request.method.as_str(), "PUT" | "POST") {
        return Err(ApiError::server(501, format!("Unexpected content for method '{}'", request.method)));
    }
    if request.body.len() > cluster.version.body_limit_bytes() {
        return Err(ApiError::server(501, "for data too large"));
    }
    let text = String::from_utf8_lossy(&request.body);
    let content_type = request.header("content-type").unwrap_or_default();
    match content_type.split(';').next().map(str::trim).unwrap_or_default() {
        "application/json" => params::from_json(&text),
        "" | "application/x-www-form-urlencoded" => Ok(params::from_form(&text)),
        _ => Err(ApiError::server(506, format!("upload 'Content-Type '{content_type}' not implemented"))),
    }
}

/// The endpoint's own permission, on the URI's raw words: before schema, before existence.
fn check(cluster: &Cluster, caller: &Caller, route: &Route, uri: &Params) -> Result<(), ApiError> {
    match route.check {
        Check::Anybody | Check::World => Ok(()),
        Check::RootOnly if caller.is_root() => Ok(()),
        Check::RootOnly => Err(ApiError::forbidden("user != root@pam")),
        Check::AnyOf(path, privileges) => {
            let mut at = path.to_owned();
            for (name, value) in uri {
                at = at.replace(&format!("{{{name}}}"), value);
            }
            cluster.state().access.require(caller, &at, privileges)
        }
    }
}

/// The node that works on the request, if it can be reached.
fn destination(cluster: &Cluster, params: &Params) -> Result<String, ApiError> {
    let Some(name) = params.get("node").filter(|name| *name != "localhost" && **name != cluster.entry_node) else {
        return Ok(cluster.entry_node.clone());
    };
    let state = cluster.state();
    let Some(node) = state.nodes.get(name) else {
        let why = if state.without_resolver { "Temporary failure in name resolution" } else { "Name or service not known" };
        return Err(ApiError::die(format!("hostname lookup '{name}' failed - failed to get address info for: {name}: {why}")));
    };
    match &node.unreachable {
        None => Ok(name.clone()),
        Some(why) => {
            let (status, reason) = why.split_once(' ').unwrap_or(("595", why));
            Err(ApiError::empty(status.parse().unwrap_or(595), reason))
        }
    }
}

/// Runs the handler: in pveproxy itself, or in one of pvedaemon's workers, which go on when the client has long been told 596.
async fn perform(cluster: &Arc<Cluster>, call: Call, route: &'static Route, late: bool) -> Outcome {
    let proxied = route.protected || call.node != cluster.entry_node;
    if !proxied && !late {
        cluster.clock.sleep(cluster.latency.of(call.endpoint, 0)).await;
        return finish(cluster, dispatch(Arc::clone(cluster), call).await, proxied);
    }
    let vms = cluster.state().vms.values().filter(|vm| vm.running && vm.node == call.node).count();
    let deletes = call.get("volume").filter(|_| late && matches!(call.endpoint, Endpoint::ContentDelete)).map(str::to_owned);
    cluster.state().late_deletions.extend(deletes.clone());
    let gate = Gate::default();
    let result = Arc::new(Mutex::new(None));
    let (busy, opened, slot, worker) = (cluster.clock.busy(), gate.clone(), Arc::clone(&result), Arc::clone(cluster));
    tokio::spawn(async move {
        let place = worker.clock.lock(&format!("pvedaemon-{}", call.node), WORKERS, None).await;
        let delay = if late { PROXY_TIMEOUT + Duration::from_secs(1) } else { worker.latency.of(call.endpoint, vms) };
        worker.clock.sleep(delay).await;
        let done = dispatch(Arc::clone(&worker), call).await;
        if let Some(volume) = deletes {
            let mut state = worker.state();
            let place = state.late_deletions.iter().position(|one| *one == volume);
            place.into_iter().for_each(|place| drop(state.late_deletions.swap_remove(place)));
        }
        *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(done);
        drop(place);
        worker.clock.open(&opened);
        drop(busy);
    });
    if !cluster.clock.pass(&gate, Some(PROXY_TIMEOUT)).await {
        return failed(cluster, &ApiError::empty(596, "Connection timed out"), true);
    }
    let done = result.lock().unwrap_or_else(PoisonError::into_inner).take();
    finish(cluster, done.unwrap_or_else(|| Err(ApiError::empty(596, "Connection reset by peer"))), proxied)
}

async fn dispatch(cluster: Arc<Cluster>, call: Call) -> Result<Reply, ApiError> {
    endpoint::verify(&call)?;
    match call.endpoint {
        Endpoint::Version => inventory::version(&cluster),
        Endpoint::ClusterStatus => inventory::cluster_status(&cluster),
        Endpoint::Resources => inventory::resources(&cluster, &call),
        Endpoint::NextId => inventory::next_id(&cluster, &call),
        Endpoint::HaResources | Endpoint::ClusterTasks => Ok(json!([]).into()),
        Endpoint::Nodes => inventory::nodes(&cluster, &call),
        Endpoint::Permissions => inventory::permissions(&cluster, &call),
        Endpoint::Ticket => login(&cluster, &call).await,
        Endpoint::TicketPage => Ok(serde_json::Value::Null.into()),
        Endpoint::StorageConfigs => content::configs(&cluster, &call),
        Endpoint::StorageConfig => content::config(&cluster, &call),
        Endpoint::NodeStorages => content::storages(&cluster, &call),
        Endpoint::NodeStorage => Ok(content::index().into()),
        Endpoint::StorageStatus => content::status(&cluster, &call),
        Endpoint::ContentList => content::list(&cluster, &call),
        Endpoint::ContentCreate => content::create(&cluster, &call).await,
        Endpoint::ContentLook => content::look(&cluster, &call),
        Endpoint::ContentSet => content::set_attributes(&cluster, &call),
        Endpoint::ContentCopy => Err(ApiError::not_implemented("POST", "content/{volume} (copy)")),
        Endpoint::ContentDelete => content::delete(&cluster, &call).await,
        Endpoint::TaskList => inventory::task_list(&cluster, &call),
        Endpoint::TaskStop => inventory::task_stop(&cluster, &call),
        Endpoint::TaskStatus => inventory::task_status(&cluster, &call),
        Endpoint::TaskLog => inventory::task_log(&cluster, &call),
        Endpoint::VmList => vms::list(&cluster, &call),
        Endpoint::VmStatus => vms::status(&cluster, &call).await,
        Endpoint::VmConfig => vms::config(&cluster, &call),
        Endpoint::VmPending => vms::pending(&cluster, &call),
        Endpoint::ContainerConfig => inventory::container(&cluster, &call),
        Endpoint::VmUpdate => update::put(&cluster, &call).await,
        Endpoint::VmUpdateAsync => update::post(&cluster, &call).await,
        Endpoint::VmUnlink => update::unlink(&cluster, &call).await,
        Endpoint::VmResize => drives::resize(&cluster, &call),
        Endpoint::VmStart => vms::start(&cluster, &call),
        Endpoint::VmStop => vms::stop(&cluster, &call),
        Endpoint::VmSuspend => vms::pause(&cluster, &call, true),
        Endpoint::VmResume => vms::pause(&cluster, &call, false),
        Endpoint::SnapshotList => vms::snapshots(&cluster, &call),
        Endpoint::SnapshotCreate => vms::snapshot(&cluster, &call),
    }
}

async fn login(cluster: &Arc<Cluster>, call: &Call) -> Result<Reply, ApiError> {
    let mut user = call.text("username").to_owned();
    if let Some(realm) = call.get("realm").filter(|_| !user.contains('@')) {
        user = format!("{user}@{realm}");
    }
    let now = cluster.clock.elapsed();
    let granted = cluster.state().access.login(&user, call.text("password"), now);
    let Some((ticket, csrf)) = granted else {
        cluster.clock.sleep(UNAUTHORISED_DELAY).await;
        return Err(ApiError::handler(401, "authentication failure\n"));
    };
    let mut data = json!({
        "username": user, "ticket": ticket, "CSRFPreventionToken": csrf,
        "cap": {"vms": {}, "storage": {}, "nodes": {}, "access": {}, "dc": {}, "sdn": {}, "mapping": {}},
    });
    if let (Some(data), false) = (data.as_object_mut(), cluster.name.is_empty()) {
        data.insert("clustername".to_owned(), cluster.name.clone().into());
    }
    Ok(data.into())
}

fn finish(cluster: &Cluster, result: Result<Reply, ApiError>, proxied: bool) -> Outcome {
    match result {
        Ok(reply) => {
            let mut body = json!({"data": reply.data});
            if let (Some(total), Some(body)) = (reply.total, body.as_object_mut()) {
                body.insert("total".to_owned(), Value::from(total));
            }
            let (reason, body) = ("OK".to_owned(), body.to_string());
            Outcome::Answer(Answer { status: 200, reason, json: true, body, proxied, location: None })
        }
        Err(error) => failed(cluster, &error, proxied),
    }
}

fn failed(cluster: &Cluster, error: &ApiError, proxied: bool) -> Outcome {
    let body = error.body(cluster.version);
    let json = error.kind == super::answer::Kind::Handler;
    let reason = error.reason().to_owned();
    Outcome::Answer(Answer { status: error.status, reason, json, body: body.unwrap_or_default(), proxied, location: None })
}
